"""Granite 3's mixtures of experts: Granite, with experts in place of MLPs. A token's weights are the softmax of the
logits of its experts; computed as the softmax of all logits, divided by the sum over its experts, which is the same but
for roundings.

Checkpoints have all experts of a layer as two tensors, input_linear [E, 2 width, D], an expert's gate first, and
output_linear [E, D, width]; GGUF files have three.
"""

import itertools
import re
from collections.abc import Callable, Container, Iterator
from dataclasses import replace

from lockstep.models.config import Config, check_keys, need
from lockstep.models.families.granite import MULTIPLIERS, multipliers, record, scaled_model
from lockstep.models.families.llama import undo
from lockstep.models.families.llama_like import biases, heads_of
from lockstep.models.family import Family
from lockstep.models.model_config import Experts, Layer, ModelConfig
from lockstep.weights.gguf.architecture import Architecture, has_biases
from lockstep.weights.gguf.keys import Keys
from lockstep.weights.gguf.names import ATTENTION, EXPERTS
from lockstep.weights.tensor import StoredTensor, TensorInfo, TensorMap, bounded, numbers_of

# ------------------------------------------------------------ config.json


def read(config: Config) -> ModelConfig:
    """The ModelConfig. num_experts is what files of GGUF name num_local_experts."""
    key = "num_experts" if config.get("num_experts") is not None else "num_local_experts"
    check_keys(config, ["attention_bias", key, "num_experts_per_tok", *MULTIPLIERS])
    num_experts, num_per_token = need(config, key, high=4096), need(config, "num_experts_per_tok", high=256)
    if num_per_token > num_experts:
        raise ValueError(f"config key 'num_experts_per_tok': expected at most {num_experts}, got {num_per_token}")
    experts = Experts(num_experts, num_per_token, need(config, "intermediate_size"), renormalise=True)
    return scaled_model(config, Layer(heads_of(config, **biases(config)), experts))


# ------------------------------------------------------------ tensors

PART = re.compile(r"(.*\.)block_sparse_moe\.(.*)")
ROUTERS = ("router.layer.weight", "router.weight")  # the second in files of transformers 5
STACKS = {
    "input_linear.weight": ("gate_proj", "up_proj"),
    "experts.gate_up_proj": ("gate_proj", "up_proj"),
    "output_linear.weight": ("down_proj",),
    "experts.down_proj": ("down_proj",),
}
Change = Callable[[StoredTensor], StoredTensor]


def one_by_one(tensors: TensorMap) -> TensorMap:
    """The tensors with one for each matrix of an expert, named as those of other families."""
    parts = bounded((name, *part) for name in tensors.info for part in parts_of(tensors.info[name]))
    found = {info.name: (name, info, change) for name, info, change in parts}
    infos = {name: info for name, (_, info, _) in found.items()}
    return TensorMap(infos, lambda name: found[name][2](tensors[found[name][0]]))


def parts_of(info: TensorInfo) -> Iterator[tuple[TensorInfo, Change]]:
    """(name, format and shape of a tensor, how to make it) of all that are in one of the checkpoint's."""
    layer, part = match.groups() if (match := PART.fullmatch(info.name)) else ("", "")
    if part in ROUTERS:
        renamed = replace(info, name=f"{layer}mlp.gate.weight")
        yield renamed, lambda tensor: replace(tensor, name=renamed.name)
    elif part in STACKS and len(info.shape) == 3 and info.shape[1] % len(STACKS[part]) == 0:
        for expert, index in itertools.product(numbers_of(info), range(len(STACKS[part]))):
            name = f"{layer}mlp.experts.{expert}.{STACKS[part][index]}.weight"
            yield matrix_of(info, name, expert, index, len(STACKS[part]))
    else:
        yield info, lambda tensor: tensor


def matrix_of(info: TensorInfo, name: str, expert: int, index: int, count: int) -> tuple[TensorInfo, Change]:
    """Part number `index` of the `count` equal parts of an expert's rows."""
    num_rows = info.shape[1] // count
    shape, rows = (num_rows, info.shape[2]), slice(index * num_rows, (index + 1) * num_rows)
    own = TensorInfo(name, info.format, shape, info.num_bytes // info.shape[0] // count)
    return own, lambda tensor: StoredTensor(name, tensor.format, shape, tensor.data[expert, rows])


# ------------------------------------------------------------ GGUF


def gguf_config(config: dict, keys: Keys, names: Container[str]) -> dict:
    """Adds biases, multipliers and experts."""
    counts = {"num_experts": keys.integer("expert_count"), "num_experts_per_tok": keys.integer("expert_used_count")}
    return config | has_biases(names, "attention_bias") | multipliers(keys) | counts


NAMES = {**ATTENTION, **EXPERTS, "ffn_norm": "post_attention_layernorm"}
GRANITEMOE = Family(
    model_types=("granitemoe",),
    read=read,
    record=record,
    tensors=one_by_one,
    gguf=Architecture("granitemoe", "granitemoe", "GraniteMoeForCausalLM", NAMES, gguf_config, undo),
)
