"""MLX folders, quantized or not, under Hugging Face's names and in its order.

    X.switch_mlp.gate_proj.weight [E, N, K]: a stack of experts; also X.experts.switch_glu... (Gemma 4) and X.experts...
    (gpt-oss), there with their biases, X.experts.gate_proj.bias [E, N]
    X.conv1d.weight [C, K, 1], where Hugging Face has [C, 1, K]; norms beside it are stored as 1 + w

Source: `sanitize` of mlx-lm's models.
"""

import re
from collections.abc import Iterator

import numpy as np

from lockstep.weights.folders.modules import FLOATS, replaced
from lockstep.weights.tensor import MadeTensor, StoredTensor, TensorMap, bounded, numbers_of

STACK = re.compile(r"(.*)\.(?:switch_mlp|experts\.switch_glu|experts)\.((?:gate|up|down)_proj)\.(weight|bias)")
CONV = ".linear_attn.conv1d.weight"
# Norms that Qwen3.5 and Qwen3-Next compute as 1 + w, which MLX adds once, when it converts.
NORMS = tuple(
    f"{name}.weight"
    for name in (".input_layernorm", ".post_attention_layernorm", "model.norm", ".q_norm", ".k_norm")
)  # fmt: skip


def with_usual_names(tensors: TensorMap) -> TensorMap:
    """The tensors, with MLX's in Hugging Face's form. Those of other folders stay as they are."""
    stacks = [name for name in tensors if STACK.fullmatch(name)]
    made: dict[str, list[StoredTensor]] = {}
    for name, part in bounded((stack, part) for stack in stacks for part in made_of(tensors, stack)):
        made.setdefault(name, []).append(part)
    convs = [name for name in tensors if name.endswith(CONV) and is_turned(tensors.info[name].shape)]
    norms = [name for name in tensors if convs and name.endswith(NORMS)]
    made.update((name, [turned(tensors[name])]) for name in convs)
    made.update((name, [minus_one(tensors[name])]) for name in norms)
    return replaced(tensors, [part for parts in made.values() for part in parts], made) if made else tensors


def made_of(tensors: TensorMap, name: str) -> Iterator[StoredTensor]:
    """The matrices of a stack, as views, or its biases; nothing for other tensors."""
    shape = tensors.info[name].shape
    if name.endswith(".weight") and len(shape) == 3:
        stack = tensors[name]
        for e in numbers_of(tensors.info[name]):
            yield StoredTensor(expert_name(name, e), stack.format, shape[1:], stack.data[e])
    if name.endswith(".bias") and len(shape) == 2:
        stack = tensors[name]
        own = expert_name(name, None).removesuffix(".bias") + "_bias"
        yield StoredTensor(own, stack.format, stack.shape, stack.data)


def expert_name(name: str, expert: int | None) -> str:
    """Hugging Face's name of one of a stack's matrices, or of the stack. ValueError for the name of no stack."""
    found = STACK.fullmatch(name)
    if found is None:
        raise ValueError(f"tensor {name!r}: stacks are supported only of 'switch_mlp', 'switch_glu' and 'experts'")
    place = re.sub(r"\.block_sparse_moe$", ".mlp", found[1])  # of Granite
    return ".".join([place, "experts", *([] if expert is None else [str(expert)]), found[2], found[3]])


def is_turned(shape: tuple[int, ...]) -> bool:
    """Whether the taps of a convolution are in MLX's order."""
    return len(shape) == 3 and shape[2] == 1 and shape[1] > 1


def turned(conv: StoredTensor) -> StoredTensor:
    """[C, K, 1] as [C, 1, K], a view."""
    shape = (conv.shape[0], 1, conv.shape[1])
    return StoredTensor(conv.name, conv.format, shape, conv.data.reshape(shape))


def minus_one(norm: StoredTensor) -> MadeTensor:
    """w of a norm that is stored as 1 + w, in float32, whose sum with 1 is the stored number again."""
    if norm.format not in FLOATS or len(norm.shape) != 1:
        raise ValueError(f"tensor {norm.name!r}: expected a vector of floats, found {norm.format} {list(norm.shape)}")
    return MadeTensor.of(norm.name, "f32", norm.shape, lambda rows: norm.to_f32(rows) - np.float32(1))
