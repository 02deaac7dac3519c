"""Recording a mixture of experts.

Checkpoints have the experts' matrices one by one, `experts.3.gate_proj.weight` [width, D] and so on, or stacked:
`experts.gate_up_proj` [E, 2 width, D], an expert's gate first, and `experts.down_proj` [E, D, width].
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from lockstep.formats.parts.panels import padded_width
from lockstep.formats.parts.rows import ROW_FORMATS
from lockstep.models.model_config import Experts, Mlp
from lockstep.models.record import Recorder
from lockstep.ops.linear.experts import ExpertBias, ExpertGated, ExpertLinear, ExpertRows, ExpertScatter
from lockstep.ops.linear.linear import PREPARATION
from lockstep.ops.linear.moe import CombineExperts, GroupExperts, Route
from lockstep.runtime.program import Tensor, Weight
from lockstep.weights.rearranged import flattened, transposed
from lockstep.weights.tensor import StoredTensor


class ExpertMatrices(NamedTuple):
    """The stored tensors of a layer's experts: rows [width, D] of gate and up, expert after expert; rows [D, width] of
    down; and their biases [experts, rows], in parts side by side, if the experts have biases."""

    gate_up: Sequence[StoredTensor]
    down: Sequence[StoredTensor]
    gate_up_bias: Sequence[StoredTensor] = ()
    down_bias: Sequence[StoredTensor] = ()


Matrices = Callable[[Recorder, str, Experts, int], ExpertMatrices]  # called with the label of the experts and D


def usual_matrices(ops: Recorder, label: str, shape: Experts, D: int) -> ExpertMatrices:
    """A tensor for each matrix, or stacks of them, and a tensor for the biases of all experts."""

    def each(stack: str, names: Sequence[str], rows: int, width: int) -> list[StoredTensor]:
        one_by_one = [f"{label}.{e}.{name}_proj.weight" for e in range(shape.num_experts) for name in names]
        stacked = _stacked(ops, f"{label}.{stack}", shape, len(names) * rows, width)
        return stacked or [ops.stored(name, rows, width) for name in one_by_one]

    def biases(names: Sequence[str], rows: int) -> list[StoredTensor]:
        return [ops.stored(f"{label}.{name}_proj_bias", shape.num_experts, rows) for name in names if shape.bias]

    gate_up, down = each("gate_up_proj", ("gate", "up"), shape.width, D), each("down_proj", ("down",), D, shape.width)
    return ExpertMatrices(gate_up, down, biases(("gate", "up"), shape.width), biases(("down",), D))


def _stacked(ops: Recorder, name: str, shape: Experts, rows: int, width: int) -> list[StoredTensor]:
    """The matrices [rows, width] of all experts, below one another, if the checkpoint has them as one tensor; else no
    tensor."""
    if name not in ops.tensors:
        return []
    is_turned_back = rows != width and tuple(ops.tensors[name].shape) == (shape.num_experts, rows, width)
    if shape.transposed and not is_turned_back:
        stack = ops.stored(name, shape.num_experts, width, rows)
        return [transposed(stack, expert) for expert in range(shape.num_experts)]
    return [flattened(ops.stored(name, shape.num_experts, rows, width))]


def experts(
    ops: Recorder,
    x: Tensor,
    shape: Experts,
    label: str,
    router: str = "gate",
    matrices: Matrices = usual_matrices,
    logits: Tensor | None = None,
    scale: Weight | None = None,
) -> Tensor:
    """A mixture of experts: each row goes through the MLPs of its most probable experts, whose outputs are added up,
    each multiplied by the router's weight. An expert that all rows share is added, multiplied by its gate.

    router: the name of its projection. matrices: finds those of the experts.

    logits: of the router; None: x times its projection. scale: a factor [E] for each expert's weights. D: hidden
    size, E: experts, X: experts per token.
    """
    D, E, X = x.width, shape.num_experts, shape.num_per_token
    tensor, emit = ops.program.tensor, ops.program.emit
    stored = matrices(ops, f"{label}.experts", shape, D)
    logits = logits or _logits(ops, x, shape, label, router)
    counts = dict(num_experts=E, top_k=X)
    route = Route(
        expert_ids=tensor(f"{label}.expert_ids", x.rows, X, "i32"),
        weights=tensor(f"{label}.weights", x.rows, X),
        logits=logits,
        scale=scale,
        renormalise=shape.renormalise,
        width=logits.width,
        **counts,
    )
    group = GroupExperts(
        order=tensor(f"{label}.order", x.rows, X, "i32"),
        expert_start=tensor(f"{label}.expert_start", x.rows, E + 1, "i32"),
        expert_ids=emit(route),
        **counts,
    )
    order, grouping = emit(group), dict(expert_start=group.expert_start, **counts)
    gate_up, down = _weights(ops, label, shape, D, stored)
    prepared = _prepared_rows(ops, f"{label}.expert_rows", x.rows, X, gate_up.format, D)
    h = emit(ExpertRows(x=x, order=order, **prepared))
    out = tensor(f"{label}.experts.gate_up", x.rows, X * 2 * shape.width)
    h = emit(ExpertLinear(out=out, x=h, weight=gate_up, width=D, features=2 * shape.width, **grouping))
    biased = dict(order=order, expert_ids=route.expert_ids, **counts)
    h = _with_biases(ops, h, stored.gate_up_bias, 2 * shape.width, biased)
    prepared = _prepared_rows(ops, f"{label}.experts.act", x.rows, X, down.format, shape.width)
    h = emit(ExpertGated(x=h, activation=shape.activation, **prepared))
    out = tensor(f"{label}.experts.down", x.rows, X * D)
    h = emit(ExpertLinear(out=out, x=h, weight=down, width=shape.width, features=D, **grouping))
    h = _with_biases(ops, h, stored.down_bias, D, biased)
    y = tensor(f"{label}.experts", x.rows, X * D)
    y = emit(ExpertScatter(out=y, x=h, order=order, width=D, top_k=X))
    out = tensor(f"{label}.combined", x.rows, D)
    shared = _shared_expert(ops, x, logits, shape, label)
    return emit(CombineExperts(out=out, weights=route.weights, y=y, width=D, top_k=X, **shared))


def _logits(ops: Recorder, x: Tensor, shape: Experts, label: str, router: str) -> Tensor:
    """The router's logits, and beside them the gate of the shared expert, if there is one."""
    layers = [(f"{label}.{router}", shape.num_experts), (f"{label}.shared_expert_gate", 1)]
    if not shape.shared_width:
        return ops.linear(x, layers[:1], bias=shape.bias)
    parts = [ops.stored(f"{name}.weight", n, x.width) for name, n in layers]
    return ops.projected(x, parts, f"{label}.{router}")


def _shared_expert(ops: Recorder, x: Tensor, logits: Tensor, shape: Experts, label: str) -> dict[str, Any]:
    """Operands of CombineExperts: the output of the shared expert and its gate; empty without one."""
    if not shape.shared_width:
        return {}
    out = ops.gated_mlp(x, Mlp(shape.shared_width, shape.activation), f"{label}.shared_expert")
    column = padded_width(shape.num_experts)
    return dict(shared_y=out, gates=logits, gates_width=logits.width, gate_column=column)


def _prepared_rows(ops: Recorder, label: str, rows: str, top_k: int, format: str, width: int) -> dict[str, Any]:
    """The output and parameters of an op that prepares top_k rows per token for experts' weights of a format."""
    prepared = ROW_FORMATS[PREPARATION[format]]
    out = ops.program.tensor(label, rows, top_k * prepared.width(width), prepared.dtype)
    return dict(out=out, width=width, top_k=top_k, preparation=PREPARATION[format])


def _with_biases(ops: Recorder, x: Tensor, parts: Sequence[StoredTensor], width: int, operands: Any) -> Tensor:
    """x plus the biases of each row's expert, [experts, width] in parts side by side; x itself if there are none."""
    if not parts:
        return x
    name = "|".join(part.name for part in parts)
    weight = Weight(name, "f32", (operands["num_experts"], width), tuple(parts))
    out = ops.program.tensor(f"{x.name}.biased", x.rows, x.width)
    return ops.program.emit(ExpertBias(out=out, x=x, bias=weight, width=width, **operands))


def _weights(ops: Recorder, label: str, shape: Experts, D: int, stored: ExpertMatrices) -> tuple[Weight, Weight]:
    """Two weights: gate and up of all experts, expert after expert, and down of all experts.

    Each weight has one format: where the formats of its parts differ, it is packed as q8_0.
    """

    def joined(name: str, parts: Sequence[StoredTensor], rows: int, width: int) -> Weight:
        formats = {ops.format_of(part, width) for part in parts}
        format = formats.pop() if len(formats) == 1 else "q8_0"
        return Weight(f"{label}.experts.{name}", format, (shape.num_experts * rows, width), tuple(parts))

    return joined("gate_up", stored.gate_up, 2 * shape.width, D), joined("down", stored.down, D, shape.width)
