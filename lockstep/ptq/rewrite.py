"""Finding the sites of a recorded program, and rewriting the program so that it rounds them.

Boundary sites are tensors, or columns of tensors, of the recorded program: a FakeQuant op rounds them in place. Inner
sites (products of the rotation, scores, weights of softmax, sigmoid) exist only if the op that makes them is taken
apart: replaced by an op that rounds every intermediate. Three groups of ops can be, in every layer or in none:
attention's inputs, attention, SwiGLU. An op taken apart has other bits than the engine's own even without a grid,
because it rounds products that the engine fuses. All other ops, and sites without a grid, keep the engine's bits.
"""

import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lockstep.ops.attention.attention import Attention
from lockstep.ops.attention.kv_cache import PAGE_TOKENS, AttentionInputs
from lockstep.ops.elementwise.add import Add
from lockstep.ops.elementwise.add_bias import AddBias
from lockstep.ops.elementwise.embed import Embed
from lockstep.ops.elementwise.gated_mul import GatedMul
from lockstep.ops.elementwise.rms_norm import RmsNorm
from lockstep.ops.linear.linear import Linear
from lockstep.ops.linear.moe import CombineExperts
from lockstep.ops.recurrent.gated_delta import DeltaInputs, GatedDelta
from lockstep.ops.recurrent.gated_norm import GatedNorm
from lockstep.ops.rounded import attention as rounded_attention
from lockstep.ops.rounded import inputs as rounded_inputs
from lockstep.ops.rounded import silu_mul as rounded_silu_mul
from lockstep.ops.rounded.attention import RoundedAttention
from lockstep.ops.rounded.fake_quant import FakeQuant
from lockstep.ops.rounded.grids import GRID_WORDS
from lockstep.ops.rounded.inputs import K_SITES, Q_SITES, TABLE_SITES, RoundedInputs
from lockstep.ops.rounded.silu_mul import RoundedSiluMul
from lockstep.ptq.fuse import fused
from lockstep.ptq.plan import INSIDE
from lockstep.ptq.site import Site
from lockstep.runtime.executor import aligned
from lockstep.runtime.operands import Operands
from lockstep.runtime.program import Program, Setting, Tensor, Weight

LAYER = re.compile(r"(?<=layers\.)\d+(?=\.)")
NAMES = {
    "q_proj": "q",
    "k_proj": "k",
    "v_proj": "v",
    "o_proj": "o",
    "out_proj": "o",
    "gate_proj": "gate",
    "up_proj": "up",
    "down_proj": "down",
    "input_layernorm": "norm1",
    "post_attention_layernorm": "norm2",
}


@dataclass(frozen=True)
class Treatment:
    """How to rewrite a program.

    sites: names of the sites that have a grid; None: all. inside: the groups of INSIDE that are taken apart. additive,
    fill: of the mask, see `ops.rounded.attention`. pre_negated: the sign of the rotation, see `ops.rounded.inputs`.
    fuse_scale: where attention's scale moves first, see `fuse.fused`. max_keys: the most keys of a sequence.
    """

    sites: Collection[str] | None = None
    inside: tuple[str, ...] = ()
    additive: bool = False
    fill: float = -120.0
    pre_negated: bool = False
    fuse_scale: str = "none"
    max_keys: int = 4096


@dataclass(frozen=True)
class Part:
    """The part (stored tensor) of a program's weight that a site stands for."""

    weight: Weight
    index: int


@dataclass
class Rounded:
    """A rewritten program with its sites.

    sites: by name, in order. grids: {site that is rounded: float32 [heads, GRID_WORDS]}, off at first; the program's
    kernels read this memory. weights: {site: parts of weights that must be rounded before the program runs}.
    """

    program: Program
    sites: dict[str, Site] = field(default_factory=dict)
    grids: dict[str, np.ndarray] = field(default_factory=dict)
    weights: dict[str, list[Part]] = field(default_factory=dict)


def sites_of(program: Program, additive: bool = False, fuse_scale: str = "none") -> list[Site]:
    """Every site that a recorded program has, inner ones included, in the order of its ops.

    additive: with the sites of an additive mask. fuse_scale: without the sites of a scale that is in the weights.
    """
    everything = Treatment(inside=INSIDE, additive=additive)
    return list(_Rewriter(fused(program, fuse_scale), everything, only_lists=True).run().sites.values())


def rounded(program: Program, treatment: Treatment) -> Rounded:
    """The program with its sites rounded. ValueError for an inner site whose op is not, or cannot be, taken apart, and
    for weights that cannot hold attention's scale."""
    rewritten = _Rewriter(fused(program, treatment.fuse_scale), treatment).run()
    missing = next((name for name in treatment.sites or () if name not in rewritten.sites), None)
    if missing is not None:
        raise ValueError(f"site {missing!r}: the program has none of this name with {treatment.inside} taken apart")
    return rewritten


@dataclass(frozen=True)
class _Columns:
    """The columns of a tensor that hold one projection. name: of its site. column: the first one."""

    name: str
    column: int
    width: int


def inside_of(sites: Iterable[Site], others: Iterable[str] = ()) -> tuple[str, ...]:
    """The groups of INSIDE that must be taken apart: those of the inner sites, and `others`."""
    groups = {_group_of(site.name) for site in sites if site.is_inner} | {*others}
    return tuple(group for group in INSIDE if group in groups)


def _group_of(name: str) -> str:
    """The group of INSIDE that an inner site belongs to."""
    own = re.sub(r"^L\d+\.", "", name)
    if own in rounded_silu_mul.SITES:
        return "swiglu"
    return "attention" if own in rounded_attention.SITES else "inputs"


def layer_of(name: str) -> int | None:
    """The number of the decoder layer in a tensor's name; None if there is none."""
    match = LAYER.search(name)
    return int(match[0]) if match else None


def component(name: str) -> str:
    """The name of a checkpoint tensor in rules, within its layer: "q" for model.layers.3.self_attn.q_proj.weight."""
    if name.endswith(".mlp.gate.weight"):
        return "router"
    last = name.removesuffix(".weight").removesuffix(".bias").split(".")[-1]
    return NAMES.get(last, last)


class _Rewriter:
    """Rewrites a program, op after op. only_lists: register all sites, but round none and take no op apart."""

    def __init__(self, program: Program, treatment: Treatment, only_lists: bool = False) -> None:
        self._program, self._treatment, self._only_lists = program, treatment, only_lists
        self._ops: list[Operands] = []
        self._columns: dict[Tensor, list[_Columns]] = {}  # projections that no op has read yet, by tensor
        self._tables: np.ndarray | None = None  # grids of TABLE_SITES
        self.result = Rounded(program)
        self._visit: dict[type, Callable[[Any], None]] = {
            Embed: self._embed,
            RmsNorm: self._norm,
            Linear: self._linear,
            AddBias: self._bias,
            AttentionInputs: self._inputs,
            Attention: self._attention,
            GatedMul: self._gated_mul,
            Add: self._add,
            DeltaInputs: self._plain,
            GatedDelta: self._delta,
            GatedNorm: self._gated_norm,
            CombineExperts: self._experts,
        }

    def run(self) -> Rounded:
        for op in self._program.ops:
            if not isinstance(op, (Linear, AddBias, AttentionInputs, GatedMul)):
                self._finish_columns(op.inputs)
            self._visit.get(type(op), self._plain)(op)
        self.result.program = self._program.rewritten(self._ops)
        return self.result

    # ------------------------------------------------------------ sites

    def _site(self, name: str, layer: int | None, heads: int = 1, width: int = 0, is_inner: bool = False) -> str:
        """Registers an activation's site; returns its full name."""
        full = f"L{layer}.{name}" if layer is not None else name
        self.result.sites.setdefault(full, Site(full, heads, width, layer, is_inner=is_inner))
        return full

    def _has_grid(self, name: str) -> bool:
        """Whether the treatment gives a site a grid. name: its full name."""
        sites = self._treatment.sites
        return not self._only_lists and (sites is None or name in sites)

    def _grids(self, name: str, heads: int) -> np.ndarray:
        if name not in self.result.grids:
            self.result.grids[name] = off_grids(heads)
        return self.result.grids[name]

    def _place(self, name: str, layer: int | None, tensor: Tensor, column: int, stride: int, heads: int, width: int):
        """Registers a site and, if it has a grid, rounds its columns of a tensor in place.

        column: the first one of the first head. stride: columns from head to head. width: columns of a head.
        """
        full = self._site(name, layer, heads, width)
        if self._has_grid(full):
            where = dict(width=tensor.width, column=column, stride=stride, head_width=width, num_heads=heads)
            setting = Setting(full, self._grids(full, heads))
            self._ops.append(FakeQuant(out=tensor, x=tensor, grids=setting, **where))

    def _whole(self, name: str, tensor: Tensor, width: int | None = None) -> None:
        """`_place` for a site that is a whole tensor, or its first columns."""
        width = width or tensor.width
        self._place(name, layer_of(tensor.name), tensor, 0, width, 1, width)

    def _weight(self, name: str, layer: int | None, op: Operands, operand: str, part: int = 0) -> None:
        """Registers the site of a part of an op's weight. operand: the field of the op that holds the weight."""
        full = f"L{layer}.{name}.w" if layer is not None else f"{name}.w"
        weight = getattr(op, operand)
        self.result.sites.setdefault(full, Site(full, 1, weight.parts[part].shape[-1], layer, is_weight=True))
        parts = self.result.weights.setdefault(full, [])
        if not any(known.weight is weight for known in parts):
            parts.append(Part(weight, part))

    # ------------------------------------------------------------ ops

    def _plain(self, op: Operands) -> None:
        self._ops.append(op)

    def _embed(self, op: Embed) -> None:
        self._ops.append(op)
        self._weight("embed", None, op, "table")
        self._whole("embed", op.out)

    def _norm(self, op: RmsNorm) -> None:
        """A norm's input is rounded into a tensor of its own, because other ops read the original."""
        name, layer = component(op.weight.name), layer_of(op.weight.name)
        full = self._site(f"{name}.in", layer, 1, op.width)
        if self._has_grid(full):
            x = self._program.tensor(f"{op.out.name}.in", op.x.rows, op.width)
            where = dict(width=op.width, column=0, stride=op.width, head_width=op.width, num_heads=1)
            self._ops.append(FakeQuant(out=x, x=op.x, grids=Setting(full, self._grids(full, 1)), **where))
            op = op.changed(x=x)
        self._ops.append(op)
        self._weight(name, layer, op, "weight")
        self._place(name, layer, op.out, 0, op.width, 1, op.width)

    def _linear(self, op: Linear) -> None:
        self._ops.append(op)
        column = op.column
        for i, part in enumerate(op.weight.parts):
            is_head = layer_of(part.name) is None and layer_of(op.out.name) is None
            name = "head" if is_head else component(part.name)
            self._weight(name, layer_of(op.out.name), op, "weight", i)
            width = min(part.shape[0], op.column + op.out_features - column)
            self._columns.setdefault(op.out, []).append(_Columns(name, column, width))
            column += part.shape[0]

    def _bias(self, op: AddBias) -> None:
        self._ops.append(op)
        self._columns[op.out] = self._columns.pop(op.x, [])

    def _finish_columns(self, inputs: Iterable[Any]) -> None:
        """Rounds the projections in an op's inputs, before the op reads them."""
        for tensor in inputs:
            for part in self._columns.pop(tensor, ()) if isinstance(tensor, Tensor) else ():
                self._place(part.name, layer_of(tensor.name), tensor, part.column, part.width, 1, part.width)

    def _inputs(self, op: AttentionInputs) -> None:
        layer, K = layer_of(op.q.name), op.head_dim
        if op.norms_values:
            raise ValueError(f"layer {layer}: plans for models whose values are normed (Gemma 4) are not supported")
        self._columns.pop(op.x, None)
        heads = [("q", op.q_offset, op.q_stride, op.num_heads)]
        if op.q_stride == 2 * K:
            heads.append(("q.gate", op.q_offset + K, op.q_stride, op.num_heads))
        heads += [("k", op.k_offset, K, op.num_kv_heads), ("v", op.v_offset, K, op.num_kv_heads)]
        for name, column, stride, num_heads in heads:
            self._place(name, layer, op.x, column, stride, num_heads, K)
        if "inputs" in self._treatment.inside and is_plain(op):
            op = self._apart(op, layer)
        self._ops.append(op)
        for name in ("q", "k") if op.q_norm is not None else ():
            self._weight(f"{name}.norm", layer, op, f"{name}_norm")

    def _apart(self, op: AttentionInputs, layer: int | None) -> Any:
        """The op taken apart: with a grid for every intermediate."""
        H, G, K, R = op.num_heads, op.num_kv_heads, op.head_dim, op.rope_dim
        self._need_f32(op, layer)
        widths = dict(norm=K, x1=R // 2, x2=R // 2, cat=R, cos=R, sin=R, rot=K, all=K)
        existing = [s for s in rounded_inputs.SITES if (s != "norm" or op.q_norm is not None) and widths[s]]
        groups = dict(
            q=self._group("q.", layer, rounded_inputs.SITES[:Q_SITES], H, existing, widths),
            k=self._group("k.", layer, rounded_inputs.SITES[:K_SITES], G, existing, widths),
            v=self._group("v.", layer, ("all",), G, existing, widths),
            rope=self._group("", None, TABLE_SITES, 1, TABLE_SITES if R else (), dict.fromkeys(TABLE_SITES, R)),
        )
        if self._only_lists:
            return op
        settings = {f"{name}_grids": Setting(f"{op.q.name}.{name}", rows) for name, rows in groups.items()}
        shared = {f: getattr(op, f) for f in RoundedInputs.__dataclass_fields__ if hasattr(op, f)}
        return RoundedInputs(**shared, **settings, pre_negated=self._treatment.pre_negated)

    def _attention(self, op: Attention) -> None:
        layer, H = layer_of(op.out.name), op.num_heads
        if "attention" in self._treatment.inside and is_plain(op):
            self._need_f32(op, layer)
            existing = [s for s in rounded_attention.SITES if s != "pv" or op.gate is not None]
            existing = [s for s in existing if s != "qk.masked" or self._treatment.additive]
            existing = [s for s in existing if s != "qk.raw" or op.scale != 1]  # without a scale it is "qk"
            widths = dict.fromkeys(rounded_attention.SITES, 0) | dict(pv=op.head_dim)
            grids = self._group("", layer, rounded_attention.SITES, H, existing, widths)
            if not self._only_lists:
                shared = {f: getattr(op, f) for f in RoundedAttention.__dataclass_fields__ if hasattr(op, f)}
                mask = dict(additive=self._treatment.additive, fill=self._treatment.fill)
                keys = -(-self._treatment.max_keys // PAGE_TOKENS) * PAGE_TOKENS
                op = RoundedAttention(**shared, grids=Setting(op.out.name, grids), max_keys=keys, **mask)
        self._ops.append(op)
        self._place("ctx", layer, op.out, 0, op.head_dim, H, op.head_dim)

    def _gated_mul(self, op: GatedMul) -> None:
        layer, F = layer_of(op.out.name), op.width
        self._columns.pop(op.x, None)
        for name, column in (("gate", 0), ("up", F)):
            self._place(name, layer, op.x, column, F, 1, F)
        if "swiglu" in self._treatment.inside and is_plain(op):
            sites = rounded_silu_mul.SITES
            grids = self._group("", layer, sites, 1, sites, dict.fromkeys(sites, F))
            if not self._only_lists:
                self._ops.append(RoundedSiluMul(out=op.out, x=op.x, width=F, grids=Setting(op.out.name, grids)))
                return
        self._ops.append(op)
        self._whole("mul", op.out)

    def _group(
        self, prefix: str, layer: int | None, names: Iterable[str], heads: int, existing: Collection[str], widths
    ):
        """The grids of an op's inner sites in one array, [sites * heads, GRID_WORDS]. Registers the existing sites.

        prefix: of the names of sites. widths: by name.
        """
        names = tuple(names)
        if names == TABLE_SITES and self._tables is not None:  # all layers share them
            return self._tables
        rows = off_grids(len(names) * heads)
        if names == TABLE_SITES:
            self._tables = rows
        for i, name in enumerate(names):
            if name in existing:
                full = self._site(prefix + name, layer, heads, widths[name], is_inner=name != "mul")
                if self._has_grid(full):
                    self.result.grids[full] = rows[i * heads : (i + 1) * heads]
        return rows

    def _need_f32(self, op: Any, layer: int | None) -> None:
        if op.kv_dtype != "f32" and not self._only_lists:
            raise ValueError(
                f"layer {layer}: sites inside attention need a cache of float32, and this one is {op.kv_dtype}; "
                f"grids take its place"
            )

    def _add(self, op: Add) -> None:
        self._ops.append(op)
        self._whole("res.mlp" if ".mlp." in op.y.name or ".post_feedforward_" in op.y.name else "res.attn", op.out)

    def _delta(self, op: GatedDelta) -> None:
        self._ops.append(op)
        layer, width = layer_of(op.out.name), op.v_head_dim
        self._place("delta", layer, op.out, 0, width, op.num_v_heads, width)

    def _gated_norm(self, op: GatedNorm) -> None:
        self._ops.append(op)
        self._place("ctx", layer_of(op.out.name), op.out, 0, op.head_dim, op.num_heads, op.head_dim)

    def _experts(self, op: CombineExperts) -> None:
        self._ops.append(op)
        self._whole("experts", op.out)


def is_plain(op: AttentionInputs | Attention | GatedMul) -> bool:
    """Whether there is a rounded op that computes what this one does; others are never taken apart, and a plan that
    asks for it is refused (`plan.WHOLE` says why)."""
    if isinstance(op, AttentionInputs):
        return op.q_cos is None and not (op.whole_norms or op.k_pages.window)
    if isinstance(op, Attention):
        return not (op.window or op.soft_cap) and op.sinks is None
    return op.activation == "silu"


def off_grids(num_grids: int) -> np.ndarray:
    """Grids that leave numbers as they are, float32 [num_grids, GRID_WORDS], aligned to a cache line."""
    return aligned(4 * GRID_WORDS * num_grids).view(np.float32).reshape(num_grids, GRID_WORDS)
