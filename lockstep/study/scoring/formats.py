"""Whether a plan can round a model's weights: rounded weights are float32, and their layers have to multiply that."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from lockstep.ops.linear.linear import Linear
from lockstep.ptq.rewrite import Treatment, rounded
from lockstep.ptq.spec import Spec
from lockstep.runtime.program import Program


def check_formats(program: Program, specs: Iterable[Mapping[str, Spec]]) -> None:
    """ValueError if a plan, given by its specs by site, rounds the weights of a layer that multiplies another format
    than float32. program: as recorded."""
    named = {name for each in specs for name, spec in each.items() if not spec.is_off}
    formats = {op.weight: op.format or op.weight.format for op in program.ops if isinstance(op, Linear)}
    for name, parts in rounded(program, Treatment(sites=())).weights.items():
        other = next((formats[part.weight] for part in parts if formats.get(part.weight, "f32") != "f32"), None)
        if name in named and other:
            raise ValueError(
                f"site {name}: its layer multiplies {other}, and rounded weights are float32; expected a model with "
                f"weights f32, or no rule that rounds them"
            )
