"""Plausible mistakes in Gemma 4: see `test_mutations.py`."""

import numpy as np

from lockstep.ops.attention.kv_cache import AttentionInputs, AttentionQueries
from lockstep.ops.elementwise.add import Add, AddScaled
from lockstep.ops.elementwise.embed import MappedEmbed
from lockstep.ops.linear.altup import AltupCorrect, AltupPredict
from lockstep.ops.linear.per_layer import PerLayerInputs
from lockstep.runtime.program import Weight
from lockstep.weights.tensor import StoredTensor
from tests.models.mistakes import ATTENTION, INPUTS, SANDWICH, filled, of_norm, params


def with_factor(value):
    """A change of the number by which each layer's output is multiplied."""
    return lambda op: op.changed(factor=filled(value, op.factor)) if isinstance(op, AddScaled) else op


def with_short_window_of(name):
    """A change of the layers whose names contain `name`, which then see one key less."""
    return lambda op: op.changed(window=8) if op.kind == "attention" and name in op.out.name else op


def without_norm_of_queries(op):
    return op.changed(q_norm=filled(1, op.q_norm)) if isinstance(op, AttentionQueries) else op


def with_values_of_queries(op):
    """A change of layers without a projection of values, which then take the first query head's columns."""
    is_one = isinstance(op, AttentionInputs) and op.k_offset == op.v_offset
    return op.changed(v_offset=0) if is_one else op


def second_embedding_times(factor):
    """A change of the second embedding's factor."""
    return lambda op: op.changed(scale=factor) if isinstance(op, MappedEmbed) else op


def inputs_times(factor):
    """A change of the layers' own inputs: both terms times a factor."""

    def change(op):
        if isinstance(op, MappedEmbed):
            return op.changed(scale=factor * op.scale)
        if isinstance(op, PerLayerInputs):
            [part] = op.weight.parts
            scaled = StoredTensor("mutant", "f32", part.shape, (factor * part.data).astype(np.float32))
            return op.changed(weight=Weight("mutant", "f32", part.shape, (scaled,)))
        return op

    return change


def params_of_route(**changed):
    return lambda op: op.changed(**changed) if op.kind == "route" else op


def router_times(factor):
    """A change of the factor with which routers see rows."""

    def change(op):
        if op.kind != "rms_norm" or "router.scale" not in op.weight.name:
            return op
        [part] = op.weight.parts
        scaled = StoredTensor("mutant", "f32", part.shape, (factor * part.data).astype(np.float32))
        return op.changed(weight=Weight(f"{op.weight.name}.mutant", "f32", part.shape, (scaled,)))

    return change


def router_of_ones(op):
    """A change of routers, which then see rows divided by the root of their width only."""
    is_router = op.kind == "rms_norm" and "router.scale" in op.weight.name
    return op.changed(weight=filled(1 / 8, op.weight)) if is_router else op


def changed_of(declaration, **changes):
    """A change of operands of all ops of a declaration: functions of the op."""

    def change(op):
        return op.changed(**{k: v(op) for k, v in changes.items()}) if isinstance(op, declaration) else op

    return change


def without_sizes(op):
    """A change of streams, which keep the size that their projection gives them."""
    return Add(out=op.out, x=op.x, y=op.x, width=op.width, factor=0.0) if op.kind == "match_rms" else op


def transposed_coefs(op):
    [part] = op.coefs.parts
    turned = np.ascontiguousarray(part.data.reshape(4, 4, 4).swapaxes(0, 1).reshape(16, 4))
    return Weight("mutant", "f32", (16, 4), (StoredTensor("mutant", "f32", (16, 4), turned),))


def last_row_beyond(op):
    """A change of the second embedding: tokens beyond it have its last row."""
    if not isinstance(op, MappedEmbed):
        return op
    [part] = op.table.parts
    rows = np.concatenate([part.data, np.repeat(part.data[-1:], 16, axis=0)])
    whole = StoredTensor("mutant", "f32", rows.shape, rows)
    return op.changed(table=Weight("mutant", "f32", rows.shape, (whole,)), num_rows=0)


OPS = {
    **{
        f"+1 in {name}": ("gemma4_per_layer", of_norm(name, offset=1.0))
        for name in (*SANDWICH, "post_per_layer_input_norm")
    },
    "no factor of each expert": ("gemma4_experts", params_of_route(scale=None)),
    "experts of gemma4 not renormalised": ("gemma4_experts", params(["route"], renormalise=False)),
    "a router that sees normed rows": ("gemma4_experts", router_times(8.0)),
    "a router whose scale is forgotten": ("gemma4_experts", router_of_ones),
    "values not normed": ("gemma4", params(INPUTS, norms_values=False)),
    "scores scaled": ("gemma4", params(ATTENTION, scale=0.25)),
    "values that are the normed, rotated keys": ("gemma4", with_values_of_queries),
    "windows in a layer that reads another's keys one too short": (
        "gemma4_per_layer",
        with_short_window_of("layers.4"),
    ),
    "no rope of queries alone": ("gemma4_per_layer", params(["attention_queries"], rope_dim=0)),
    "queries alone not normed": ("gemma4_per_layer", without_norm_of_queries),
    "no factor of the layer": ("gemma4", with_factor(1)),
    "inputs of the layer before": (
        "gemma4_per_layer",
        params(["per_layer_gate"], column=lambda op: max(0, op.column - 16)),
    ),
    "inputs' norm without the root of the width in its eps": (
        "gemma4_per_layer",
        params(["per_layer_inputs"], eps=0.01),
    ),
    "inputs not divided by the root of 2": ("gemma4_per_layer", inputs_times(2**0.5)),
    "second embedding not scaled": ("gemma4_per_layer", second_embedding_times(0.5**0.5)),
    **{
        f"+1 in {name} of gemma3n": ("gemma3n", of_norm(name, offset=1.0))
        for name in (*SANDWICH, "post_laurel_norm", "post_per_layer_input_norm")
    },
    "streams not brought to one size": ("gemma3n", without_sizes),
    "all gates": ("gemma3n", params(["sparse_gate"], deviations=-50.0)),
    "gates above their mean": ("gemma3n", params(["sparse_gate"], deviations=0.0)),
    "sums of attention and Laurel not divided": ("gemma3n", with_factor(1)),
    "an output scale of ones": ("gemma3n", changed_of(AltupCorrect, scale=lambda op: filled(1, op.scale))),
    "no predictions": ("gemma3n", changed_of(AltupPredict, coefs=lambda op: filled(0, op.coefs))),
    "coefficients of predictions transposed": ("gemma3n", changed_of(AltupPredict, coefs=transposed_coefs)),
    "values of gemma3n not normed": ("gemma3n", params(INPUTS, norms_values=False)),
    "scores of gemma3n scaled": ("gemma3n", params(ATTENTION, scale=0.25)),
    "windows of gemma3n one too short": ("gemma3n", with_short_window_of("layers.5")),
    "tokens beyond the second embedding have its last row": ("gemma3n", last_row_beyond),
}
WEIGHTS = {
    "the two projections of streams swapped": (
        "gemma3n",
        {"altup_projections": "altup_unembed_projections", "altup_unembed_projections": "altup_projections"},
    ),
    "neighbouring streams swapped": (
        "gemma3n",
        {"altup_projections.0": "altup_projections.1", "altup_projections.1": "altup_projections.0"},
    ),
    "norms of attention and of Laurel swapped": (
        "gemma3n",
        {
            "post_attention_layernorm": "laurel.post_laurel_norm",
            "laurel.post_laurel_norm": "post_attention_layernorm",
        },
    ),
    "gate and up of stacked experts swapped": (
        "gemma4_experts",
        {"gate_up_proj": lambda a, c: np.concatenate(np.split(a, 2, axis=1)[::-1], axis=1)},
    ),
    "the norms before the MLP and before the experts swapped": (
        "gemma4_experts",
        {
            "pre_feedforward_layernorm": "pre_feedforward_layernorm_2",
            "pre_feedforward_layernorm_2": "pre_feedforward_layernorm",
        },
    ),
    "the norms after the MLP and after the experts swapped": (
        "gemma4_experts",
        {
            "post_feedforward_layernorm_1": "post_feedforward_layernorm_2",
            "post_feedforward_layernorm_2": "post_feedforward_layernorm_1",
        },
    ),
}
