"""A plan's scales and zero points in the form in which TICO 0.3.0 loads them: by its observers' names, for a Llama
model.

    for name, numbers in json.loads(text).items():
        scale, zero = torch.tensor(numbers["scale"]), torch.tensor(numbers["zero_point"])
        model.get_observer(name).load_qparams(scale, zero, lock=True)

between TICO's `prepare` and `convert`; TICO then needs no calibration of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from lockstep.engine.model import Model
from lockstep.ops.attention.attention import Attention
from lockstep.ops.rounded.grids import SCALE, ZERO_POINT
from lockstep.ptq.observers import Stat
from lockstep.ptq.parts import fold_part
from lockstep.ptq.plan import USUAL_FILL
from lockstep.ptq.rewrite import Part, Treatment, layer_of, rounded
from lockstep.ptq.site import Site
from lockstep.ptq.solved import Solved
from lockstep.ptq.spec import MINMAX, Spec
from lockstep.ptq.treatment import sites_for
from lockstep.runtime.program import Program

ROTATED = ("x1", "x2", "cat", "cos", "sin", "rot")
LAYER = {  # {site of a layer: TICO's observers of the same numbers}
    "norm1.in": ["input_layernorm.act_in"],
    "norm1.w": ["input_layernorm.weight"],
    "norm1": ["input_layernorm.act_out", "self_attn.hidden", *(f"self_attn.{x}_proj.act_in" for x in "qkv")],
    **{f"{x}.w": [f"self_attn.{x}_proj.weight"] for x in "qkvo"},
    **{x: [f"self_attn.{x}_proj.act_out"] for x in "qkvo"},
    **{f"{x}.{part}": [f"self_attn.{x}_{part}"] for x in "qk" for part in ROTATED},
    "k.all": [f"self_attn.{name}" for name in ("new_k", "past_key", "present_key")],
    "v.all": [f"self_attn.{name}" for name in ("new_v", "past_value", "present_value")],
    "qk.raw": ["self_attn.logits_raw"],
    "qk": ["self_attn.logits"],
    "qk.masked": ["self_attn.mask_add"],
    "p": ["self_attn.softmax", "self_attn.attn_weights"],
    "ctx": ["self_attn.attn_out", "self_attn.attn_out_h", "self_attn.o_proj.act_in"],
    "norm2.in": ["post_attention_layernorm.act_in"],
    "norm2.w": ["post_attention_layernorm.weight"],
    "norm2": ["post_attention_layernorm.act_out", "mlp.act_in", "mlp.gate_proj.act_in", "mlp.up_proj.act_in"],
    **{f"{x}.w": [f"mlp.{x}_proj.weight"] for x in ("gate", "up", "down")},
    "gate": ["mlp.gate_proj.act_out", "mlp.act_fn.act_in"],
    "up": ["mlp.up_proj.act_out"],
    "act.sig": ["mlp.act_fn.sigmoid"],
    "act": ["mlp.act_fn.mul"],
    "mul": ["mlp.mul", "mlp.down_proj.act_in"],
    "down": ["mlp.down_proj.act_out"],
    "res.mlp": ["mlp_residual_out"],
}
OUTSIDE = {  # the same, for sites that belong to no layer
    "embed.w": ["model.embed_tokens.weight"],
    "embed": ["model.embed_tokens.act_out"],
    "norm.in": ["model.norm.act_in"],
    "norm.w": ["model.norm.weight"],
    "norm": ["model.norm.act_out", "lm_head.act_in"],
    "head.w": ["lm_head.weight"],
    "head": ["lm_head.act_out"],
}


def qparams(solved: Solved, model: Model) -> dict[str, dict[str, Any]]:
    """{observer: {"scale", "zero_point"}} of a solved plan: numbers, or lists of numbers for a matrix with a grid a
    row.

    Written as JSON, the digits give back the same float32. Observers of sites that are off are left out. The mask and
    the scale of attention, which TICO rounds and plans do not name, get the kind of grid of the logits that are
    computed with them. TICO's configuration has to name the same kinds of grids.

    TICO's scale_fusion ("none", "q_proj" or "k_proj") corresponds to the plan's fuse_scale.

    ValueError for what TICO cannot express: another model_type than "llama", a structural mask, a grid after
    attention's addition, and grids that are not integers, of a tensor or of a matrix's rows.
    """
    _check(solved, model)
    sites = sites_for(model.recorded, solved.plan)
    specs = solved.plan.resolve(sites)
    program = rounded(model.recorded, Treatment(sites=(), fuse_scale=solved.plan.fuse_scale))
    made: dict[str, dict[str, Any]] = {}
    for site in sites:
        spec = specs[site.name]
        if not spec.is_off:
            names = _observers(site, spec, model.config.num_layers)
            grid = _weight(program.weights[site.name][0], spec) if site.is_weight else _numbers(solved.grids[site.name])
            made |= dict.fromkeys(names, grid)
    return made | dict(_constants(solved, program.program, specs))


def _check(solved: Solved, model: Model) -> None:
    plan, kind = solved.plan, model.config.model_type
    if kind != "llama":
        raise ValueError(f"TICO's observers are known for models of type 'llama', and this one is {kind!r}")
    if plan.mask != "additive":
        raise ValueError(f"plan: mask is {plan.mask!r}, expected 'additive' for TICO")


def _observers(site: Site, spec: Spec, num_layers: int) -> list[str]:
    """TICO's observers of a site that has a grid."""
    allowed = ("tensor", "row") if site.is_weight else ("tensor",)
    if not spec.what.is_integer or spec.per not in allowed:
        of = " or /".join(allowed)
        raise ValueError(f"site {site.name}: {spec} is no grid of TICO's; expected i2 .. i16 or u2 .. u16, /{of}")
    if site.name.startswith("rope."):
        return [f"{where}{site.name.removeprefix('rope.')}" for where in _places(num_layers)]
    own = site.name if site.layer is None else site.name.removeprefix(f"L{site.layer}.")
    known, where = (OUTSIDE, "") if site.layer is None else (LAYER, f"model.layers.{site.layer}.")
    if own not in known:
        raise ValueError(f"site {site.name}: TICO rounds nothing there; expected off")
    return [where + name for name in known[own]]


def _places(num_layers: int) -> list[str]:
    """Prefixes of the modules in which TICO rounds the rope's tables and the mask."""
    layers = [f"model.layers.{layer}." for layer in range(num_layers)]
    return ["model.", *layers, *(f"{layer}self_attn." for layer in layers)]


def _constants(solved: Solved, program: Program, specs: Mapping[str, Spec]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The grids that plans do not name: those of the mask and, unless it is fused into weights, of attention's
    scale."""
    fill = USUAL_FILL if solved.plan.fill is None else solved.plan.fill
    attention = {layer_of(op.out.name): op for op in program.ops if isinstance(op, Attention)}
    for place in _places(len(attention)):
        name = "causal_mask" if place == "model." else "attn_mask"
        spec = specs[f"L{layer_of(place) or 0}.qk.masked"]
        yield from _constant(place + name, spec, fill, 0.0)
    for layer, op in attention.items():
        if solved.plan.fuse_scale == "none":
            name = f"model.layers.{layer}.self_attn.scale"
            yield from _constant(name, specs[f"L{layer}.qk"], op.scale, op.scale)


def _constant(name: str, spec: Spec, low: float, high: float) -> Iterator[tuple[str, dict[str, Any]]]:
    """The grid of numbers from low to high, unless it is off."""
    if not spec.is_off:
        stat = Stat.empty(name)
        stat.count[:], stat.low[:], stat.high[:] = 1, low, high
        yield name, _numbers(stat.solve(replace(spec, observer=MINMAX)))


def _numbers(rows: np.ndarray) -> dict[str, Any]:
    return dict(scale=float(rows[0, SCALE]), zero_point=int(rows[0, ZERO_POINT]))


def _weight(part: Part, spec: Spec) -> dict[str, Any]:
    """Scale and zero point of a weight: lists for a matrix whose spec is a row; a norm's weight has one of each."""
    stored = part.weight.parts[part.index]
    made = fold_part(stored, spec)
    assert made.scale is not None and made.zero is not None
    scale, zero = made.scale.ravel().tolist(), made.zero.ravel().astype(int).tolist()
    if spec.per == "tensor" or len(stored.shape) == 1:
        [scale], [zero] = scale, zero
    return dict(scale=scale, zero_point=zero)
