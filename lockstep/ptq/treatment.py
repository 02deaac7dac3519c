"""From plans to how a program is treated: which sites have grids, and what is taken apart for them."""

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
    """How to treat a program so that a plan can be set on it, or each of several, given by their specs by site.

    plan: of several any, for what they have in common: mask, rotation, attention's scale, and what is taken apart in
    any case. More is taken apart where a plan rounds a site that is inside, or adds its mask. sites: see `sites_for`.
    max_keys: of a sequence.
    """
    all_specs = [plan.resolve(sites)] if specs is None else specs
    named = {name for each in all_specs for name, spec in each.items() if not spec.is_off}
    there = [site for site in sites if site.name in named and not site.is_weight]
    is_additive = plan.mask == "additive"
    return Treatment(
        sites=tuple(site.name for site in there),
        inside=inside_of(there, [*plan.apart, *(["attention"] if is_additive else [])]),
        additive=is_additive,
        fill=USUAL_FILL if plan.fill is None else plan.fill,
        pre_negated=plan.rope == "pre_negated",
        fuse_scale=plan.fuse_scale,
        max_keys=max_keys,
    )
