"""What Llama-like families share: reading their config.json, and recording their layers."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

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
from lockstep.models.record import Norm, Recorder
from lockstep.models.rope_config import rope
from lockstep.runtime.program import Tensor

Sublayer = Callable[[Tensor], Tensor]  # records a token mixer or an MLP: from normed rows to its output

# ------------------------------------------------------------ config.json


def model_of(config: Config, layers: Sequence[Layer], tied: bool = False, **others: Any) -> ModelConfig:
    """The ModelConfig of these layers. tied: default of tie_word_embeddings. others: more fields of ModelConfig."""
    vocab_size = need(config, "vocab_size")
    model = ModelConfig(
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
    return checked(model)


def num_layers(config: Config) -> int:
    """The number of decoder layers."""
    return need(config, "num_hidden_layers", high=1000)


def heads_of(config: Config, rope_defaults: Config | None = None, **others: Any) -> Heads:
    """Heads that see all keys, with scores scaled by 1 / sqrt(head_dim). rope_defaults: keywords of `rope_config.rope`.

    others: further fields of Heads.
    """
    num_heads = need(config, "num_attention_heads")
    head_dim = head_dim_of(config, num_heads)
    head_rope = rope(config, head_dim, **(rope_defaults or {}))
    num_kv_heads = optional(config, "num_key_value_heads", num_heads)
    return Heads(num_heads, num_kv_heads, head_dim, math.sqrt(1 / head_dim), head_rope, **others)


def head_dim_of(config: Config, num_heads: int) -> int:
    """head_dim, by default hidden_size / num_heads; ValueError for a size that the kernels cannot run."""
    hidden_size = need(config, "hidden_size")
    if config.get("head_dim") is None:
        return checked_head_dim(hidden_size // num_heads, f"hidden_size {hidden_size} / {num_heads} heads =")
    return checked_head_dim(need(config, "head_dim"))


def biases(config: Config) -> dict[str, Any]:
    """Fields of Heads: biases on all four attention projections if attention_bias."""
    bias = flag(config, "attention_bias")
    return {"qkv_bias": bias, "o_bias": bias}


def mlp_of(config: Config, **others: Any) -> Mlp:
    """The MLP of a layer. others: further fields of Mlp."""
    return Mlp(need(config, "intermediate_size"), **others)


def with_windows(layers: Sequence[Layer], config: Config, types: Sequence[str]) -> list[Layer]:
    """The layers, where those of type "sliding_attention" have a window of sliding_window keys."""
    return [
        with_heads(layer, window=need(config, "sliding_window")) if layer_type == "sliding_attention" else layer
        for layer, layer_type in zip(layers, types, strict=True)
    ]


def with_heads(layer: Layer, **changes: Any) -> Layer:
    """An attention layer with changed fields of its heads."""
    assert isinstance(layer.mixer, Heads), layer
    return replace(layer, mixer=replace(layer.mixer, **changes))


# ------------------------------------------------------------ a layer


def pre_norm(
    ops: Recorder, x: Tensor, label: str, norm: Norm, mixer: Sublayer, mlp: Sublayer, factor: float = 1.0
) -> Tensor:
    """x += factor * mixer(norm(x)); x += factor * mlp(norm(x))."""
    x = ops.add(x, mixer(ops.rms_norm(x, f"{label}.input_layernorm.weight", *norm)), factor)
    return ops.add(x, mlp(ops.rms_norm(x, f"{label}.post_attention_layernorm.weight", *norm)), factor)


def layer(
    ops: Recorder, x: Tensor, config: ModelConfig, shape: Layer, label: str, head_norms: Norm | None = None
) -> Tensor:
    """Llama's layer. head_norms: the norm of each query and key head, None without one."""
    return pre_norm(
        ops,
        x,
        label,
        Norm(config.rms_eps),
        mixer=lambda h: self_attention(ops, h, shape.mixer, f"{label}.self_attn", head_norms=head_norms),
        mlp=lambda h: feed_forward(ops, h, shape.mlp, f"{label}.mlp"),
        factor=config.residual_multiplier,
    )


def self_attention(ops: Recorder, h: Tensor, heads: Heads | LinearAttention, label: str, **options: Any) -> Tensor:
    """Attention and its output projection. options: of `Recorder.attention`."""
    assert isinstance(heads, Heads), (label, heads)
    out = ops.attention(h, heads, label, **options)
    return ops.linear(out, [(f"{label}.o_proj", h.width)], bias=heads.o_bias)


def feed_forward(ops: Recorder, h: Tensor, mlp: Mlp | Experts, label: str, fused: bool = False) -> Tensor:
    """The MLP of a layer, or its experts. fused: see `Recorder.gated_mlp`."""
    return experts(ops, h, mlp, label) if isinstance(mlp, Experts) else ops.gated_mlp(h, mlp, label, fused)
