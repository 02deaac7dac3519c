"""gpt-oss: attention with sinks, biases everywhere, windows on every other layer, experts with a clamped SwiGLU.

A softmax over the chosen experts' logits is one over all experts, renormalised, which is how it is computed. GGUF files
do not say that the limits of yarn are not rounded to whole channels (truncate false); they are not, as in transformers,
where llama.cpp rounds them.
"""

from collections.abc import Container
from functools import partial

import numpy as np

from lockstep.formats.mxfp4 import MXFP4, from_pairs
from lockstep.models.config import Config, check_keys, layer_types, need, need_float
from lockstep.models.decoder import decoder
from lockstep.models.experts import ExpertMatrices, experts, usual_matrices
from lockstep.models.families.llama_like import (
    biases,
    heads_of,
    model_of,
    num_layers,
    pre_norm,
    self_attention,
    with_windows,
)
from lockstep.models.family import Family
from lockstep.models.model_config import Experts, Layer, ModelConfig
from lockstep.models.record import Norm, Recorder
from lockstep.models.tiny import BASE
from lockstep.ops.elementwise.gates.clamped_swiglu import LIMIT, SLOPE
from lockstep.runtime.program import Tensor
from lockstep.weights.gguf.architecture import Architecture
from lockstep.weights.gguf.config import yarn_scaling
from lockstep.weights.gguf.keys import Keys
from lockstep.weights.gguf.names import ATTENTION
from lockstep.weights.tensor import MadeTensor, StoredTensor

KEYS = """attention_bias sliding_window layer_types num_local_experts num_experts num_experts_per_tok experts_per_token
swiglu_limit swiglu_alpha quantization_config""".split()
THETA = 150_000.0
YARN = {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096, "truncate": False}
DEFAULTS = {"attention_bias": True, "sliding_window": 128, "swiglu_limit": LIMIT, "swiglu_alpha": SLOPE}
TYPES = ("sliding_attention", "full_attention")

# ------------------------------------------------------------ config.json


def read(config: Config) -> ModelConfig:
    """The ModelConfig; some keys that may be absent have the values of `DEFAULTS`, and ropes are those of `YARN`."""
    check_keys(config, KEYS)
    config = {**DEFAULTS, **config}
    if config.get("rope_scaling") is None and config.get("rope_parameters") is None:
        config = {**config, "rope_scaling": YARN}
    _check_quantization(config.get("quantization_config"))
    one = Layer(heads_of(config, {"theta": THETA}, sinks=True, **biases(config)), experts_of(config))
    types = layer_types(config, *TYPES) or [TYPES[i % 2] for i in range(num_layers(config))]
    return model_of(config, with_windows([one] * len(types), config, types))


def experts_of(config: Config) -> Experts:
    """The shape of the experts. ValueError for other constants of their activation than those of the kernels."""
    for key, value in (("swiglu_limit", LIMIT), ("swiglu_alpha", SLOPE)):
        if need_float(config, key, 0, 1e6) != value:
            raise ValueError(f"config key {key!r}: {config[key]} is not supported, only {value}")
    key = "num_experts_per_tok" if config.get("num_experts_per_tok") is not None else "experts_per_token"
    num_experts, num_chosen = need(config, "num_local_experts", high=4096), need(config, key, high=256)
    if num_chosen > num_experts:
        raise ValueError(f"config key {key!r}: expected at most {num_experts}, got {num_chosen}")
    return Experts(num_experts, num_chosen, need(config, "intermediate_size"), True, "clamped_swiglu", bias=True)


def _check_quantization(given: object) -> None:
    """ValueError for experts stored in another way than as `MXFP4`. Which tensors are, their names say."""
    method = given.get("quant_method") if isinstance(given, dict) else given
    if method not in (None, MXFP4.name):
        raise ValueError(f"config key 'quantization_config': {method!r} is not supported, only {MXFP4.name!r}")


# ------------------------------------------------------------ the model


def layer(ops: Recorder, x: Tensor, config: ModelConfig, shape: Layer, label: str) -> Tensor:
    """x += attention(norm(x)); x += experts(norm(x))."""
    assert isinstance(shape.mlp, Experts), label
    mlp = partial(experts, ops, shape=shape.mlp, label=f"{label}.mlp", router="router", matrices=matrices)
    mixer = lambda h: self_attention(ops, h, shape.mixer, f"{label}.self_attn")
    return pre_norm(ops, x, label, Norm(config.rms_eps), mixer, mlp)


# ------------------------------------------------------------ experts of Hugging Face folders


def matrices(ops: Recorder, label: str, shape: Experts, D: int) -> ExpertMatrices:
    """The experts' tensors. In folders gate and up are one matrix, whose outputs alternate: gate, up, gate, ..."""
    E, F = shape.num_experts, shape.width
    if f"{label}.gate_up_proj_blocks" in ops.tensors:
        stack = blocks_of
    elif f"{label}.gate_up_proj" in ops.tensors:
        stack = columns_of
    else:
        return usual_matrices(ops, label, shape, D)
    both = ops.stored(f"{label}.gate_up_proj_bias", E, 2 * F)
    return ExpertMatrices(
        stack(ops, f"{label}.gate_up_proj", (E, 2 * F, D), 2),
        stack(ops, f"{label}.down_proj", (E, D, F), 1),
        [every_other(both, first) for first in (0, 1)],
        [ops.stored(f"{label}.down_proj_bias", E, D)],
    )


def every_other(both: StoredTensor, first: int) -> StoredTensor:
    """Columns first, first + 2, ... of a matrix."""
    shape = (both.shape[0], both.shape[1] // 2)
    return MadeTensor.of(f"{both.name}.{first}", both.format, shape, lambda rows: both.read(rows)[:, first::2])


def columns_of(ops: Recorder, name: str, shape: tuple[int, int, int], step: int) -> list[StoredTensor]:
    """The matrices [N / step, K] of a stack [E, K, N], expert after expert: outputs 0, step, ..., then 1, step + 1, ...

    shape: (E, N, K).
    """
    E, N, K = shape
    stack = ops.stored(name, E, K, N)

    def part(e: int, first: int) -> StoredTensor:
        def make(rows: slice) -> np.ndarray:
            return np.ascontiguousarray(stack.read(slice(e, e + 1))[0, :, first::step].T[rows])

        return MadeTensor.of(f"{name}.{e}.{first}", stack.format, (N // step, K), make)

    return [part(e, first) for e in range(E) for first in range(step)]


def blocks_of(ops: Recorder, name: str, shape: tuple[int, int, int], step: int) -> list[StoredTensor]:
    """The same matrices of a stack [E, N, K] of blocks, which are stored as codes and scales."""
    E, N, K = shape
    if K % MXFP4.block_size:
        raise ValueError(f"tensor '{name}_blocks': rows of {K} weights are not whole blocks of {MXFP4.block_size}")
    stored = [_bytes_of(ops, f"{name}_blocks", E, N, K // 32, 16), _bytes_of(ops, f"{name}_scales", E, N, K // 32)]

    def part(e: int, first: int) -> StoredTensor:
        def make(rows: slice) -> np.ndarray:
            start, stop, _ = rows.indices(N // step)
            source = slice(e * N + step * start, e * N + step * stop)
            return from_pairs(*(tensor.read(source)[first::step] for tensor in stored))

        return MadeTensor.of(f"{name}.{e}.{first}", MXFP4.name, (N // step, K), make)

    return [part(e, first) for e in range(E) for first in range(step)]


def _bytes_of(ops: Recorder, name: str, E: int, N: int, *rest: int) -> StoredTensor:
    """A tensor of bytes [E, N, ...] as [E N, ...]."""
    tensor = ops.stored(name, E, N, *rest)
    if tensor.format != "u8":
        raise ValueError(f"tensor {name!r}: expected bytes, found {tensor.format}")
    return StoredTensor(name, "u8", (E * N, *rest), tensor.data.reshape(E * N, *rest))


# ------------------------------------------------------------ GGUF

MATRICES = ("gate", "up", "down")
NAMES = {
    **ATTENTION,
    "attn_sinks.weight": "self_attn.sinks",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_gate_inp": "mlp.router",
    **{f"ffn_{name}_exps.weight": f"mlp.experts.{{expert}}.{name}_proj.weight" for name in MATRICES},
    **{f"ffn_{name}_exps.bias": f"mlp.experts.{name}_proj_bias" for name in MATRICES},
}


# Ollama's own conversion: other names, gate and up as alternating rows, MXFP4 as folders have it (`undo.FromPairs`).
OLLAMA_NAMES = {
    **{name: hf for name, hf in NAMES.items() if not name.startswith(("ffn_gate_exps", "ffn_up_exps"))},
    "attn_out": "self_attn.o_proj",
    "attn_sinks": "self_attn.sinks",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate_up_exps.weight": "mlp.experts.{expert}.{gate_up}_proj.weight",
    "ffn_gate_up_exps.bias": "mlp.experts.{gate_up}_proj_bias",
}


def ollama_config(config: dict, keys: Keys, names: Container[str]) -> dict:
    """As `gguf_config`. The files do not say that their rope is yarn."""
    return gguf_config({**config, "rope_scaling": yarn_scaling(keys)}, keys, names)


def gguf_config(config: dict, keys: Keys, names: Container[str]) -> dict:
    """Adds the experts and windows, and that yarn does not round."""
    num_experts = keys.integer("expert_count")
    scaling = config["rope_scaling"]
    return config | {
        "rope_scaling": scaling and {**scaling, **({"truncate": False} if scaling["rope_type"] == "yarn" else {})},
        "intermediate_size": keys.integer("expert_feed_forward_length", config["intermediate_size"]),
        "num_experts": num_experts,
        "num_local_experts": num_experts,
        "num_experts_per_tok": keys.integer("expert_used_count"),
        "sliding_window": keys.integer("attention.sliding_window"),
    }


GPT_OSS = Family(
    model_types=("gpt_oss",),
    read=read,
    record=partial(decoder, layer=layer),
    gguf=Architecture("gpt-oss", "gpt_oss", "GptOssForCausalLM", NAMES, gguf_config),
    other_gguf=(Architecture("gptoss", "gpt_oss", "GptOssForCausalLM", OLLAMA_NAMES, ollama_config),),
    tiny={
        **BASE,
        "model_type": "gpt_oss",
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_local_experts": 16,
        "num_experts_per_tok": 2,
        "sliding_window": 40,
        "rope_scaling": {**YARN, "original_max_position_embeddings": 16, "factor": 8.0},
    },
)
