"""Unrolling a rounded program: its twin has the same bits, and a tensor of its own for every number on a grid.

`rounded_inputs`, `rounded_attention` and `rounded_silu_mul` become small ops: for each kv head its key and value, then
its query heads one after the other, each from its columns of the projection to its weighted values; at the end the
heads are put side by side. TICO exports a decoder layer to its hardware in this order. After each small op comes a
FakeQuant, whose grid is a row of the rounded op's grids: both twins read the same memory.

Tensors are named "{output of the rounded op}.{site}.{head}", where sites of attention's inputs begin with "q.", "k." or
"v.".
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from lockstep.ops.elementwise.add import Add
from lockstep.ops.elementwise.rms_norm import RmsNorm
from lockstep.ops.rounded.attention import MASKED, PV, QK, RAW, P, RoundedAttention
from lockstep.ops.rounded.fake_quant import FakeQuant
from lockstep.ops.rounded.inputs import ALL, CAT, COS, NORM, ROT, SIN, TABLE_SITES, X1, X2, RoundedInputs
from lockstep.ops.rounded.silu_mul import RoundedSiluMul
from lockstep.ops.rounded.unrolled_heads import HeadScores, HeadValues, KeepHead, MaskRows, ScaleRows, SoftmaxRows
from lockstep.ops.rounded.unrolled_rows import Columns, GateRows, Multiply, RopeRows, Sigmoid, SwapHalves
from lockstep.runtime.operands import Operands
from lockstep.runtime.program import Program, Setting, Tensor

SPARE_COLUMNS = 16  # padding of a row of scores, so that rows do not all fall into the same sets of a cache


def unroll(program: Program) -> Program:
    """The twin of a recorded program (not lowered yet), with its rounded ops taken apart.

    Results, and tensors that other ops read or write, keep their names and their bits. Both programs share the memory
    of grids: a change in one is a change in both.
    """
    return _Unroller(program).run()


@dataclass(frozen=True)
class _Head:
    """One head of a rounded op. label: prefix of its tensors. grids: of the op, in rows site * num_heads + head.
    by_key: more operands of FakeQuant, for rows of one number per key."""

    label: str
    rows: str
    grids: Setting
    num_heads: int = 1
    head: int = 0
    by_key: dict[str, bool] = field(default_factory=dict)


class _Unroller:
    """Takes a program apart, op after op."""

    def __init__(self, program: Program) -> None:
        self._program, self._ops = program, list[Operands]()
        read = [value for op in program.ops for value in op.inputs if isinstance(value, Tensor)]
        self._num_reads = Counter([*read, *program.results.values()])

    def run(self) -> Program:
        ops: list[Any] = list(self._program.ops)
        while ops:
            op = ops.pop(0)
            if isinstance(op, RoundedInputs):
                follows = bool(ops) and isinstance(ops[0], RoundedAttention) and _feeds(op, ops[0])
                self._inputs(op, ops.pop(0) if follows else None)
            elif isinstance(op, RoundedAttention):
                self._attention(op)
            elif isinstance(op, RoundedSiluMul):
                self._silu_mul(op)
            else:
                self._ops.append(op)
        return self._program.rewritten(self._ops)

    # ------------------------------------------------------------ small ops

    def _make(self, head: _Head, name: str, width: int, declaration: Any, /, **operands: Any) -> Tensor:
        """Emits a small op with a new tensor as output."""
        out = self._program.tensor(f"{head.label}.{name}.{head.head}", head.rows, width)
        self._ops.append(declaration(out=out, **operands))
        return out

    def _site(self, head: _Head, name: str, site: int, width: int, declaration: Any, /, **operands: Any) -> Tensor:
        """Emits a small op, and rounds its output."""
        out = self._make(head, name, width, declaration, **operands)
        self._ops.append(self._rounding(head, site, out, out))
        return out

    def _copy(self, head: _Head, name: str, site: int, x: Tensor) -> Tensor:
        """A rounded copy of a tensor."""
        out = self._program.tensor(f"{head.label}.{name}.{head.head}", head.rows, x.width)
        self._ops.append(self._rounding(head, site, x, out))
        return out

    def _rounding(self, head: _Head, site: int, x: Tensor, out: Tensor) -> FakeQuant:
        row = site * head.num_heads + head.head
        grid = Setting(out.name, head.grids.values[row : row + 1])
        where = dict(width=x.width, column=0, stride=x.width, head_width=x.width, num_heads=1)
        return FakeQuant(out=out, x=x, grids=grid, **where, **head.by_key)

    def _side_by_side(self, heads: Sequence[Tensor], out: Tensor) -> None:
        for i, x in enumerate(heads):
            self._ops.append(_columns(out, i * x.width, x, 0, x.width))

    # ------------------------------------------------------------ attention

    def _inputs(self, op: RoundedInputs, attention: RoundedAttention | None) -> None:
        """attention: the op that reads the queries next, if its heads can be interleaved with them."""
        queries, outs, group = [], [], op.num_heads // op.num_kv_heads
        tables = [self._table(op, i) for i in range(len(TABLE_SITES))] if op.rope_dim else []
        for h in range(op.num_heads):
            if h % group == 0:
                self._key_and_value(op, h // group, tables)
            head = _Head(f"{op.q.name}.q", op.q.rows, op.q_grids, op.num_heads, h)
            queries.append(self._rotated(op, head, op.q_offset + h * op.q_stride, op.q_norm, tables))
            if attention is not None:
                outs.append(self._attended(attention, h, queries[-1]))
        if self._num_reads[op.q] > (attention is not None):
            self._side_by_side(queries, op.q)
        if attention is not None:
            self._side_by_side(outs, attention.out)

    def _table(self, op: RoundedInputs, site: int) -> Tensor:
        """The cosines (site 0) or sines (site 1) of the rows' positions."""
        values, negated = (op.cos, False) if site == 0 else (op.sin, op.pre_negated)
        head, half = _Head(op.q.name, op.q.rows, op.rope_grids), op.rope_dim // 2
        return self._site(head, TABLE_SITES[site], site, 2 * half, RopeRows, values=values, half=half, negated=negated)

    def _key_and_value(self, op: RoundedInputs, g: int, tables: Sequence[Tensor]) -> None:
        """Key and value of one kv head, stored in their pages."""
        G, K = op.num_kv_heads, op.head_dim
        key = _Head(f"{op.q.name}.k", op.q.rows, op.k_grids, G, g)
        rotated = self._rotated(op, key, op.k_offset + g * K, op.k_norm, tables)
        k = self._copy(key, "all", ALL, rotated)
        value = _Head(f"{op.q.name}.v", op.q.rows, op.v_grids, G, g)
        v = self._site(value, "all", 0, K, _columns, x_column=op.v_offset + g * K, x=op.x, width=K)
        pages = dict(k_pages=op.k_pages, v_pages=op.v_pages, page_group=op.page_group)
        self._ops.append(KeepHead(k=k, v=v, **pages, num_kv_heads=G, head_dim=K, kv_head=g))

    def _rotated(self, op: RoundedInputs, head: _Head, column: int, weight: Any, tables: Sequence[Tensor]) -> Tensor:
        """A query or key head: its columns of the projection, normed and rotated."""
        K, width = op.head_dim, op.rope_dim
        taken = dict(x=op.x, x_column=column, width=K)
        if weight is None:
            norm = self._site(head, "norm", NORM, K, _columns, **taken)
        else:
            x, numbers = self._make(head, "in", K, _columns, **taken), dict(eps=op.eps, offset=op.norm_offset)
            norm = self._site(head, "norm", NORM, K, RmsNorm, x=x, weight=weight, width=K, **numbers)
        if width == 0:
            return self._copy(head, "rot", ROT, norm)
        cos = self._site(head, "cos", COS, width, _multiply, x=norm, y=tables[0])
        cat = self._cat(op, head, norm)
        sin = self._site(head, "sin", SIN, width, _multiply, x=cat, y=tables[1])
        if width == K:
            return self._site(head, "rot", ROT, K, Add, x=cos, y=sin, width=K)
        both = self._make(head, "sum", width, Add, x=cos, y=sin, width=width)
        rot = self._make(head, "rot", K, _columns, x=both, x_column=0, width=width)
        self._ops += [_columns(rot, width, norm, width, K - width), self._rounding(head, ROT, rot, rot)]
        return rot

    def _cat(self, op: RoundedInputs, head: _Head, norm: Tensor) -> Tensor:
        """The two halves of the rotated channels, swapped."""
        R = op.rope_dim // 2
        x1 = self._site(head, "x1", X1, R, _columns, x=norm, x_column=0, width=R)
        x2 = self._site(head, "x2", X2, R, _columns, x=norm, x_column=R, width=R)
        return self._site(head, "cat", CAT, 2 * R, SwapHalves, x1=x1, x2=x2, half=R, pre_negated=op.pre_negated)

    def _attention(self, op: RoundedAttention) -> None:
        """Attention whose queries are one tensor, because another op reads them, too, or made them."""
        outs, K = [], op.head_dim
        for h in range(op.num_heads):
            head = _Head(op.out.name, op.out.rows, op.grids, op.num_heads, h)
            q = self._make(head, "q", K, _columns, x=op.q, x_column=h * K, width=K)
            outs.append(self._attended(op, h, q))
        self._side_by_side(outs, op.out)

    def _attended(self, op: RoundedAttention, h: int, q: Tensor) -> Tensor:
        """The weighted values of one query head."""
        by_key = dict(seen_only=True, additive=op.additive)
        scores = _Head(op.out.name, op.out.rows, op.grids, op.num_heads, h, by_key)
        width = -(-op.max_keys // 16) * 16 + SPARE_COLUMNS
        keys = dict(width=width, additive=op.additive)
        kv = dict(num_kv_heads=op.num_kv_heads, head_dim=op.head_dim, kv_head=h // (op.num_heads // op.num_kv_heads))
        kv |= dict(page_group=op.page_group)
        raw = "qk" if op.scale == 1 else "qk.raw"
        x = self._site(scores, raw, RAW, width, HeadScores, q=q, k_pages=op.k_pages, **kv, **keys)
        if op.scale == 1:
            self._ops.append(self._rounding(scores, QK, x, x))
        else:
            x = self._site(scores, "qk", QK, width, ScaleRows, x=x, factor=op.scale, **keys)
        if op.additive:
            x = self._site(scores, "qk.masked", MASKED, width, MaskRows, x=x, fill=op.fill, **keys)
        p = self._site(scores, "p", P, width, SoftmaxRows, x=x, **keys)
        head = _Head(op.out.name, op.out.rows, op.grids, op.num_heads, h)
        pv = self._site(head, "pv", PV, op.head_dim, HeadValues, p=p, v_pages=op.v_pages, **kv, **keys)
        if op.gate is None:
            return pv
        gate = dict(gate=op.gate, gate_width=op.gate_width, gate_column=op.gate_offset + h * op.gate_stride)
        return self._make(head, "gated", op.head_dim, GateRows, x=pv, width=op.head_dim, **gate)

    # ------------------------------------------------------------ SwiGLU

    def _silu_mul(self, op: RoundedSiluMul) -> None:
        F, head = op.width, _Head(op.out.name, op.out.rows, op.grids)
        sigmoid = self._site(head, "act.sig", 0, F, Sigmoid, x=op.x, x_width=2 * F, x_column=0, width=F)
        act = self._site(head, "act", 1, F, _multiply, x=op.x, y=sigmoid)
        self._ops += [_multiply(op.out, act, op.x, y_column=F), self._rounding(head, 2, op.out, op.out)]


def _feeds(inputs: RoundedInputs, attention: RoundedAttention) -> bool:
    """Whether attention reads the queries, keys and values that inputs makes."""
    return attention.q is inputs.q and attention.k_pages is inputs.k_pages and attention.v_pages is inputs.v_pages


def _columns(out: Tensor, out_column: int = 0, x: Any = None, x_column: int = 0, width: int = 0) -> Columns:
    """Copies columns of x to columns of out."""
    wide = dict(x_width=x.width, out_width=out.width)
    return Columns(out=out, x=x, width=width, x_column=x_column, out_column=out_column, **wide)


def _multiply(out: Tensor, x: Tensor, y: Tensor, y_column: int = 0) -> Multiply:
    """Multiplies the first columns of x with columns of y."""
    wide = dict(x_width=x.width, x_column=0, y_width=y.width, y_column=y_column)
    return Multiply(out=out, x=x, y=y, width=out.width, **wide)
