"""Ops, in a folder for each sort: a file is one op's definition, its `_cpu` twin is the fast kernel.

BACKENDS are tables from op kind to implementation. "reference" runs definitions, "cpu" the fast kernels, "per_token"
the fast arithmetic one token at a time (what the batched forms are measured against). All give the same bits.
"""

from importlib import import_module

# modules with tables of implementations, by folder: REFERENCE of definitions; CPU and PER_TOKEN of kernels
MODULES = dict(
    attention="attention attention_cpu attention_q8 kv_cache kv_cache_cpu kv_cache_q8 kv_cache_q8_cpu",
    elementwise="activations activations_cpu add add_bias add_cpu concat concat_cpu embed embed_cpu gated_mul "
    "gated_mul_cpu rms_norm rms_norm_cpu select_columns select_rows select_rows_cpu",
    integer="code_fixed code_linear code_linear_cpu code_rows code_rows_cpu",
    linear="experts experts_cpu grouped_linear linear linear_cpu moe moe_cpu per_layer per_layer_cpu altup altup_cpu "
    "sparse_gate sparse_gate_cpu",
    recurrent="conv1d conv1d_cpu gated_delta gated_delta_cpu gated_delta_verify gated_delta_verify_cpu gated_norm "
    "gated_norm_cpu",
    rounded="attention attention_cpu fake_quant fake_quant_cpu inputs inputs_cpu observe observe_cpu silu_mul "
    "silu_mul_cpu unrolled_heads unrolled_heads_cpu unrolled_rows unrolled_rows_cpu",
    sampling="adjust_logits adjust_logits_cpu sample sample_cpu score score_cpu soft_cap soft_cap_cpu",
)


def backend(table, modules=MODULES):
    """The tables of one name ("CPU") of all modules, merged; ValueError if two modules implement one kind of op."""
    merged = {}
    for folder, name in ((folder, name) for folder, names in modules.items() for name in names.split()):
        implementations = getattr(import_module(f"lockstep.ops.{folder}.{name}"), table, {})
        if twice := merged.keys() & implementations.keys():
            raise ValueError(f"ops/{folder}/{name}.py: {table} has {min(twice)!r}, as another module's has")
        merged |= implementations
    return merged


BACKENDS = {"reference": backend("REFERENCE"), "cpu": backend("CPU"), "per_token": backend("PER_TOKEN")}


def __getattr__(name):
    """The public op is imported when first asked for: whoever only runs models does not load it."""
    if name == "ragged_paged_attention":
        from lockstep.ops.attention.ragged import ragged_paged_attention

        return ragged_paged_attention
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
