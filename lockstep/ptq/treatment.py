"""From plans to a `Treatment` of a program: which sites have grids, and which ops are taken apart for them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from lockstep.ptq.plan import USUAL_FILL, Plan
from lockstep.ptq.rewrite import Treatment, inside_of, sites_of
from lockstep.ptq.site import Site
from lockstep.ptq.spec import Spec
from lockstep.runtime.program import Program


def sites_for(program: Program, plan: Plan) -> list[Site]:
    """The sites that a recorded program has under a plan's mask and scale of attention."""
    return sites_of(program, plan.mask == "additive", plan.fuse_scale)


def treatment_of(
    plan: Plan, sites: Sequence[Site], max_keys: int, specs: Iterable[Mapping[str, Spec]] | None = None
) -> Treatment:
    """The Treatment of a program that can run a plan, or each of several plans.

    plan: the plan, or any of several: they must agree in mask, rope, fuse_scale and apart. specs: {site: Spec} of each
    plan; None for one plan. sites: see `sites_for`. max_keys: the most keys of a sequence. Groups of ops are taken
    apart if `plan.apart` names them, a plan rounds a site inside, or the mask is additive.
    """
    all_specs = [plan.resolve(sites)] if specs is None else specs
    rounded = {name for specs_by_site in all_specs for name, spec in specs_by_site.items() if not spec.is_off}
    activations = [site for site in sites if site.name in rounded and not site.is_weight]
    is_additive = plan.mask == "additive"
    return Treatment(
        sites=tuple(site.name for site in activations),
        inside=inside_of(activations, [*plan.apart, *(["attention"] if is_additive else [])]),
        additive=is_additive,
        fill=USUAL_FILL if plan.fill is None else plan.fill,
        pre_negated=plan.rope == "pre_negated",
        fuse_scale=plan.fuse_scale,
        max_keys=max_keys,
    )
