"""A model under a quantization plan: it rounds where the plan's hardware would round."""

from __future__ import annotations

from dataclasses import replace

from lockstep.engine.model import Model
from lockstep.ops.rounded.attention import MAX_KEYS
from lockstep.ptq.folded import FoldedStore, FoldedWeights, with_weight
from lockstep.ptq.integer import integers
from lockstep.ptq.plan import Plan
from lockstep.ptq.rewrite import rounded
from lockstep.ptq.solved import Solved
from lockstep.ptq.spec import Spec
from lockstep.ptq.treatment import sites_for, treatment_of
from lockstep.runtime.operands import Operands
from lockstep.runtime.program import Weight


def planned(model: Model, solved: Solved, content: str) -> Model:
    """The model with its activations and weights on the grids of a solved plan. Its bits, too, do not depend on how
    prompts are cut into steps, or on other requests. content: the hash of the model's files.

    ValueError for a plan of another model; for a plan whose results depend on the rest of a step (with an additive
    mask, later tokens count); and for a model whose weights or KV cache are not float32.
    """
    sites = sites_for(model.recorded, solved.plan)
    solved.check(model.config.model_type, content, sites)
    plan = solved.plan
    _check(model, plan)
    treatment = treatment_of(plan, sites, min(model.max_context, MAX_KEYS))
    on_grids = rounded(model.recorded, treatment)
    for name, rows in on_grids.grids.items():
        rows[...] = solved.grids.get(name, 0)
    specs = plan.resolve(sites)
    program, folded = on_grids.program, FoldedWeights(on_grids.weights)
    if plan.arithmetic == "integer":
        program = integers(on_grids, specs).program
    program = program.rewritten([_on_grids(op, folded, specs) for op in program.ops])
    return replace(model, recorded=program, store=FoldedStore(model.store), plan=solved.hash)


def _check(model: Model, plan: Plan) -> None:
    """ValueError where the model's formats or the plan's mask do not allow the plan to run in an engine."""
    for name, format in (("weights", model.weights), ("kv_dtype", model.kv_dtype)):
        if format != "f32":
            raise ValueError(
                f"plan: {name} is {format!r}, expected 'f32': a plan's grids take the place of other formats"
            )
    if plan.mask == "additive":
        raise ValueError(
            "plan: mask is 'additive', so that what a token sees depends on the later tokens of its step; expected "
            "'structural' outside of studies"
        )


def _on_grids(op: Operands, folded: FoldedWeights, specs: dict[str, Spec]) -> Operands:
    """The op with its weights on the plan's grids."""
    for name, operand in op.declared():
        weight = getattr(op, name)
        if operand.role in ("constant", "packed") and isinstance(weight, Weight):
            changed = folded.weight(weight, specs)
            op = op if changed is weight else with_weight(op, name, changed)
    return op
