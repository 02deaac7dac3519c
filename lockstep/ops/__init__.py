"""Ops: each file is one op's definition; its `_cpu` twin is the fast kernel.

BACKENDS are tables from op kind to implementation. "reference" runs definitions, "cpu" the fast kernels, "per_token"
the fast arithmetic one token at a time (what the batched forms are measured against). All give the same bits.
"""

from lockstep.ops import (
    activations,
    activations_cpu,
    add,
    add_bias,
    add_cpu,
    adjust_logits,
    adjust_logits_cpu,
    attention,
    attention_cpu,
    attention_q8,
    conv1d,
    conv1d_cpu,
    embed,
    embed_cpu,
    experts,
    experts_cpu,
    gated_delta,
    gated_delta_cpu,
    gated_norm,
    gated_norm_cpu,
    kv_cache,
    kv_cache_cpu,
    kv_cache_q8,
    kv_cache_q8_cpu,
    linear,
    linear_cpu,
    moe,
    moe_cpu,
    rms_norm,
    rms_norm_cpu,
    sample,
    sample_cpu,
    select_rows,
    select_rows_cpu,
    silu_mul,
    silu_mul_cpu,
)

_DEFINITIONS = (
    activations,
    add,
    add_bias,
    adjust_logits,
    attention,
    attention_q8,
    conv1d,
    embed,
    experts,
    gated_delta,
    gated_norm,
    kv_cache,
    kv_cache_q8,
    linear,
    moe,
    rms_norm,
    sample,
    select_rows,
    silu_mul,
)
_KERNELS = (
    activations_cpu,
    add_bias,
    add_cpu,
    adjust_logits_cpu,
    attention_cpu,
    conv1d_cpu,
    embed_cpu,
    experts_cpu,
    gated_delta_cpu,
    gated_norm_cpu,
    kv_cache_cpu,
    kv_cache_q8_cpu,
    linear_cpu,
    moe_cpu,
    rms_norm_cpu,
    sample_cpu,
    select_rows_cpu,
    silu_mul_cpu,
)


def _table(modules, name):
    return {kind: made for module in modules for kind, made in getattr(module, name, {}).items()}


BACKENDS = {
    "reference": _table(_DEFINITIONS, "REFERENCE"),
    "cpu": _table(_KERNELS, "CPU"),
    "per_token": _table(_KERNELS, "PER_TOKEN"),
}


def __getattr__(name):
    """The public op is imported when first asked for: whoever only runs models does not load it."""
    if name == "ragged_paged_attention":
        from lockstep.ops.ragged import ragged_paged_attention

        return ragged_paged_attention
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
