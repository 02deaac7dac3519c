"""Changes of ops of a recorded program, as plausible mistakes would make them: see `test_mutations.py`."""

import numpy as np

from lockstep.ops.elementwise.add_bias import AddBias
from lockstep.ops.elementwise.embed import Embed
from lockstep.ops.elementwise.gated_mul import GatedMul
from lockstep.runtime.program import Weight
from lockstep.weights.tensor import StoredTensor

INPUTS, ATTENTION = ("attention_inputs",), ("attention",)
SANDWICH = [f"{name}_layernorm" for name in ("input", "post_attention", "pre_feedforward", "post_feedforward")]


def params(kinds, **changed):
    """A change of parameters of all ops of these kinds; a value may be a function of the op."""

    def change(op):
        if op.kind not in kinds:
            return op
        assert set(changed) <= set(op.params), (op.kind, op.params)
        return op.changed(**{k: v(op) if callable(v) else v for k, v in changed.items()})

    return change


def filled(value, like):
    part = StoredTensor("mutant", "f32", like.shape, np.full(like.shape, value, np.float32))
    return Weight(f"{like.name}.mutant", "f32", like.shape, (part,))


def without_bias(op):
    return op.changed(bias=filled(0, op.bias)) if isinstance(op, AddBias) else op


def without_bias_of(name):
    """Leaves out the biases of projections whose names contain `name`."""
    return lambda op: without_bias(op) if any(name in x.name for x in op.inputs[1:]) else op


def of_norm(name, **changed):
    """A change of parameters of the norms whose names contain `name`."""
    return lambda op: params(["rms_norm"], **changed)(op) if op.kind == "rms_norm" and name in op.weight.name else op


def embedding_times(scale):
    """A change of the embedding's factor."""
    return lambda op: op.changed(scale=scale) if isinstance(op, Embed) else op


def with_activation(name):
    """A change of the activation in every gated MLP."""
    return lambda op: op.changed(activation=name) if isinstance(op, GatedMul) else op
