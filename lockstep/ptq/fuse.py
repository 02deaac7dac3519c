"""Moving attention's scale into the weights of queries or keys, for hardware that has no op for it.

The scale is multiplied into the rows and the bias of the projection, or, where heads are normed, into the weight of the
norm (which would undo a factor before it). The attention op then has scale 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import numpy as np

from lockstep.ops.attention.attention import Attention
from lockstep.ops.attention.kv_cache import AttentionInputs
from lockstep.ops.elementwise.add_bias import AddBias
from lockstep.ops.linear.linear import Linear
from lockstep.ptq.parts import FoldedWeight, ScaledTensor
from lockstep.runtime.operands import Operands
from lockstep.runtime.program import Program, Tensor, Weight
from lockstep.weights.tensor import StoredTensor


def fused(program: Program, into: str) -> Program:
    """A recorded program with attention's scale in the weights of queries (into "q") or keys ("k"); for "none" the
    program itself.

    The offset of head norms moves into their weights, too. ValueError for a projection that is not multiplied as
    float32, and for a stored projection of more than the queries or keys.
    """
    return program if into == "none" else _Fuser(program, into).run()


class _Fuser:
    """Moves the scale of one attention op after the other."""

    def __init__(self, program: Program, into: str) -> None:
        self._program, self._into, self._ops = program, into, list[Operands](program.ops)

    def run(self) -> Program:
        for index, op in enumerate(self._ops):
            if isinstance(op, Attention) and op.scale != 1:
                self._fuse(op)
                self._ops[index] = op.changed(scale=1.0)
        return self._program.rewritten(self._ops)

    def _fuse(self, op: Attention) -> None:
        factor = float(np.float32(op.scale))
        for index, inputs in self._writers(op.q):
            if inputs.q_norm is not None:
                self._ops[index] = self._normed(inputs, factor)
            elif not self._project(inputs, factor):
                raise ValueError(
                    f"plan: fuse_scale is {self._into!r}, and {inputs.x.name} has no projection of {self._into} alone; "
                    f"expected 'none'"
                )

    def _writers(self, tensor: Tensor) -> Iterator[tuple[int, Any]]:
        """(index, op) of all ops that write a tensor."""
        return ((index, op) for index, op in enumerate(self._ops) if tensor in op.outputs)

    def _normed(self, op: AttentionInputs, factor: float) -> AttentionInputs:
        """The op with the scale in one of its two norms. Their shared offset moves into both weights, because
        afterwards it differs."""
        norms: dict[str, Weight] = {}
        for name in "qk":
            own = factor if name == self._into else 1.0
            norms[f"{name}_norm"] = _scaled(getattr(op, f"{name}_norm"), 0, own, own * op.norm_offset)
        return op.changed(norm_offset=0.0, **norms)

    def _project(self, op: AttentionInputs, factor: float) -> bool:
        """Multiplies the rows and biases of the projection of queries or keys; whether there is one."""
        K, columns = op.head_dim, dict(q=(op.q_offset, op.num_heads), k=(op.k_offset, op.num_kv_heads))
        start, heads = columns[self._into]
        writers = list(self._writers(op.x))
        for index, writer in writers:
            if isinstance(writer, AddBias):
                self._scale_part(index, "bias", 0, (start, heads * K), factor)
                writers = list(self._writers(writer.x))
        linears = [(index, writer) for index, writer in writers if isinstance(writer, Linear)]
        return any(self._scale_part(i, "weight", o.column, (start, heads * K), factor) for i, o in linears)

    def _scale_part(self, index: int, name: str, column: int, columns: tuple[int, int], factor: float) -> bool:
        """Multiplies the part of an op's weight whose output is `columns` (first column, number); whether there is one.

        column: the first column of the whole weight's output.
        """
        weight = getattr(self._ops[index], name)
        for i, part in enumerate(weight.parts):
            if (column, part.shape[0]) == columns:
                self._ops[index] = self._ops[index].changed(**{name: _scaled(weight, i, factor, 0.0)})
                return True
            column += part.shape[0]
        return False


def _scaled(weight: Weight, index: int, factor: float, offset: float) -> Weight:
    """A weight with part `index` times factor, plus offset; the weight itself if that changes nothing."""
    if factor == 1 and offset == 0:
        return weight
    if weight.format != "f32":
        raise ValueError(
            f"plan: weight {weight.name} is multiplied as {weight.format}, and attention's scale goes into float32; "
            f"expected a model that was loaded with weights f32, or fuse_scale 'none'"
        )
    parts = list(weight.parts)
    stored = {field.name: getattr(parts[index], field.name) for field in fields(StoredTensor)}
    parts[index] = ScaledTensor(**stored, factor=factor, offset=float(np.float32(offset)))
    name = f"part {index} * {factor!r} + {offset!r} of {weight.name}"
    return FoldedWeight(name, weight.format, weight.shape, tuple(parts))
