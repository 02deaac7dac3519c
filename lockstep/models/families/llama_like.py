"""What Llama-like families share: how their config.json is read, and how a layer of theirs is recorded."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from lockstep.models.config import Config, end_ids, flag, is_headless, need, need_float, optional
from lockstep.models.experts import experts
from lockstep.models.model_config import (
    Experts,
    Heads,
    Layer,
    LinearAttention,
    Mlp,
    ModelConfig,
    checked,
    checked_head_dim,
)
from lockstep.models.record import Recorder
from lockstep.models.rope_config import rope
from lockstep.runtime.program import Tensor

Rows = Callable[[Tensor], Tensor]

# ------------------------------------------------------------ config.json


def model_of(config: Config, layers: Sequence[Layer], tied: bool = False, **others: Any) -> ModelConfig:
    """The ModelConfig of such layers. tied: whether the head is the embedding where the config is silent."""
    vocab_size = need(config, "vocab_size")
    made = ModelConfig(
        model_type=config["model_type"],
        vocab_size=vocab_size,
        hidden_size=need(config, "hidden_size"),
        rms_eps=need_float(config, "rms_norm_eps", 0, 1),
        max_positions=need(config, "max_position_embeddings"),
        layers=tuple(layers),
        tied=flag(config, "tie_word_embeddings", tied),
        eos_ids=tuple(i for i in end_ids(config) if 0 <= i < vocab_size),
        headless=is_headless(config),
        **others,
    )
    return checked(made)


def num_layers(config: Config) -> int:
    """How many decoder layers a config says."""
    return need(config, "num_hidden_layers", high=1000)


def heads_of(config: Config, rope_defaults: Config | None = None, **others: Any) -> Heads:
    """Heads that see all keys, scaled by the root of their size. rope_defaults: see `rope_config.rope`."""
    num_heads = need(config, "num_attention_heads")
    head_dim = head_dim_of(config, num_heads)
    turned = rope(config, head_dim, **(rope_defaults or {}))
    num_kv_heads = optional(config, "num_key_value_heads", num_heads)
    return Heads(num_heads, num_kv_heads, head_dim, float(head_dim) ** -0.5, turned, **others)


def head_dim_of(config: Config, num_heads: int) -> int:
    """The size of a head: head_dim, or the hidden size's share; ValueError for one that the kernels cannot run."""
    hidden_size = need(config, "hidden_size")
    if config.get("head_dim") is None:
        return checked_head_dim(hidden_size // num_heads, f"hidden_size {hidden_size} / {num_heads} heads =")
    return checked_head_dim(need(config, "head_dim"))


def biases(config: Config) -> dict[str, Any]:
    """Biases on all four attention projections if attention_bias."""
    bias = flag(config, "attention_bias")
    return {"qkv_bias": bias, "o_bias": bias}


def mlp_of(config: Config, **others: Any) -> Mlp:
    """The MLP of every layer."""
    return Mlp(need(config, "intermediate_size"), **others)


def with_windows(layers: Sequence[Layer], config: Config, types: Sequence[str]) -> list[Layer]:
    """Layers of which those of type "sliding_attention" see so many keys as sliding_window says."""
    return [
        with_heads(layer, window=need(config, "sliding_window")) if kind == "sliding_attention" else layer
        for layer, kind in zip(layers, types, strict=True)
    ]


def with_heads(layer: Layer, **changes: Any) -> Layer:
    """An attention layer whose heads are changed."""
    assert isinstance(layer.mixer, Heads), layer
    return replace(layer, mixer=replace(layer.mixer, **changes))


# ------------------------------------------------------------ a layer


class Norm(NamedTuple):
    """A norm's parameters. offset: 1 where checkpoints store w - 1."""

    eps: float
    offset: float = 0.0


def pre_norm(ops: Recorder, x: Tensor, label: str, norm: Norm, mixer: Rows, mlp: Rows) -> Tensor:
    """x += mixer(norm(x)); x += mlp(norm(x))."""
    x = ops.add(x, mixer(ops.rms_norm(x, f"{label}.input_layernorm.weight", *norm)))
    return ops.add(x, mlp(ops.rms_norm(x, f"{label}.post_attention_layernorm.weight", *norm)))


def layer(
    ops: Recorder, x: Tensor, config: ModelConfig, shape: Layer, label: str, head_norms: Norm | None = None
) -> Tensor:
    """Llama's layer. head_norms: of a norm of each query and key head."""
    return pre_norm(
        ops,
        x,
        label,
        Norm(config.rms_eps),
        mixer=lambda h: self_attention(ops, h, shape.mixer, f"{label}.self_attn", head_norms=head_norms),
        mlp=lambda h: feed_forward(ops, h, shape.mlp, f"{label}.mlp"),
    )


def self_attention(ops: Recorder, h: Tensor, heads: Heads | LinearAttention, label: str, **how: Any) -> Tensor:
    """Attention and what its heads are projected by. how: see `Recorder.attention`."""
    assert isinstance(heads, Heads), (label, heads)
    out = ops.attention(h, heads, label, **how)
    return ops.linear(out, [(f"{label}.o_proj", h.width)], bias=heads.o_bias)


def feed_forward(ops: Recorder, h: Tensor, mlp: Mlp | Experts, label: str) -> Tensor:
    """The MLP of a layer, or its experts."""
    return experts(ops, h, mlp, label) if isinstance(mlp, Experts) else ops.gated_mlp(h, mlp, label)
