"""Recording a mixture of experts."""

from typing import Any

from lockstep.formats.choice import compute_format
from lockstep.formats.parts.rows import ROW_FORMATS
from lockstep.models.model_config import Experts
from lockstep.models.record import Recorder
from lockstep.ops.linear.experts import ExpertGated, ExpertLinear, ExpertRows, ExpertScatter
from lockstep.ops.linear.linear import PREPARATION
from lockstep.ops.linear.moe import CombineExperts, GroupExperts, Route
from lockstep.runtime.program import Tensor, Weight


def experts(ops: Recorder, x: Tensor, shape: Experts, label: str) -> Tensor:
    """A mixture of experts: each row goes through the MLPs of its most probable experts, whose outputs are added up,
    each multiplied by the router's weight.

    D: hidden size, E: experts, X: experts per token.
    """
    D, E, X = x.width, shape.num_experts, shape.num_per_token
    tensor, emit = ops.program.tensor, ops.program.emit
    logits = ops.linear(x, [(f"{label}.gate", E)])
    counts = dict(num_experts=E, top_k=X)
    route = Route(
        expert_ids=tensor(f"{label}.expert_ids", x.rows, X, "i32"),
        weights=tensor(f"{label}.weights", x.rows, X),
        logits=logits,
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
    gate_up, down = _weights(ops, label, shape, D)
    prepared = _prepared_rows(ops, f"{label}.expert_rows", x.rows, X, gate_up.format, D)
    h = emit(ExpertRows(x=x, order=order, **prepared))
    out = tensor(f"{label}.experts.gate_up", x.rows, X * 2 * shape.width)
    h = emit(ExpertLinear(out=out, x=h, weight=gate_up, width=D, features=2 * shape.width, **grouping))
    prepared = _prepared_rows(ops, f"{label}.experts.act", x.rows, X, down.format, shape.width)
    h = emit(ExpertGated(x=h, activation=shape.activation, **prepared))
    out = tensor(f"{label}.experts.down", x.rows, X * D)
    h = emit(ExpertLinear(out=out, x=h, weight=down, width=shape.width, features=D, **grouping))
    y = tensor(f"{label}.experts", x.rows, X * D)
    y = emit(ExpertScatter(out=y, x=h, order=order, width=D, top_k=X))
    out = tensor(f"{label}.combined", x.rows, D)
    return emit(CombineExperts(out=out, weights=route.weights, y=y, width=D, top_k=X))


def _prepared_rows(ops: Recorder, label: str, rows: str, top_k: int, format: str, width: int) -> dict[str, Any]:
    """The output and parameters of an op that prepares top_k rows per token for experts' weights of a format."""
    prepared = ROW_FORMATS[PREPARATION[format]]
    out = ops.program.tensor(label, rows, top_k * prepared.width(width), prepared.dtype)
    return dict(out=out, width=width, top_k=top_k, preparation=PREPARATION[format])


def _weights(ops: Recorder, label: str, shape: Experts, D: int) -> tuple[Weight, Weight]:
    """Two weights: gate and up of all experts, expert after expert, and down of all experts.

    Each weight has one format: where the formats of its parts differ, it is packed as q8_0.
    """

    def joined(names: tuple[str, ...], rows: int, width: int) -> Weight:
        each = [f"{label}.experts.{e}.{n}_proj.weight" for e in range(shape.num_experts) for n in names]
        parts = tuple(ops.stored(name, rows, width) for name in each)
        formats = {compute_format(p.format, ops.weights, width) for p in parts}
        format = formats.pop() if len(formats) == 1 else "q8_0"
        return Weight(f"{label}.experts.{'_'.join(names)}", format, (len(parts) * rows, width), parts)

    return joined(("gate", "up"), shape.width, D), joined(("down",), D, shape.width)
