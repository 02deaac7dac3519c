"""Rewrites of a recorded program, each leaving every named tensor's bits as they are.

A recorded program is unfused; `lower` turns linear layers into what kernels do (prepare the rows, multiply), and `fuse`
joins neighbours so that rows pass through memory less often. What can be joined is what declarations say.
"""

import dataclasses
from collections import Counter
from collections.abc import Container
from typing import Any

from lockstep.formats.parts.rows import ROW_FORMATS
from lockstep.ops.elementwise.activations import Preparable, Preparation, QuantizeQ8, RoundBf16
from lockstep.ops.elementwise.add import Add
from lockstep.ops.integer.code_weights import FORMAT as CODES
from lockstep.ops.linear.linear import PREPARATION, Linear
from lockstep.ops.recurrent.gated_delta import DeltaInputs, GatedDelta
from lockstep.ops.recurrent.gated_delta_verify import DeltaInputsVerify, GatedDeltaVerify
from lockstep.ops.sampling.score import Score
from lockstep.runtime.operands import Operands
from lockstep.runtime.program import CacheArray, Program, Tensor

PREPARED = PREPARATION | {CODES: ""}  # rows of codes are recorded as such
PREPARATIONS = {op.name(): op for op in (QuantizeQ8, RoundBf16)}
# kinds of ops in the place of which `verifying` puts others: {its own: the kind that a program is recorded with}
RECORDED_KINDS = {v.name(): op.name() for v, op in ((DeltaInputsVerify, DeltaInputs), (GatedDeltaVerify, GatedDelta))}


def lower(program: Program) -> Program:
    """Every linear layer takes the format of its weight, and prepared rows; rows prepared alike are prepared once."""
    ops, prepared = [], {}
    for op in program.ops:
        if isinstance(op, (Linear, Score)):
            rows = {name: getattr(op, name) for name in op.multiplied if getattr(op, name) is not None}
            for name, x in rows.items():
                kind = PREPARED[getattr(op, op.multiplied[name]).format]
                if kind and (x, kind) not in prepared:
                    ops.append(_preparation(program, x, kind))
                    prepared[x, kind] = ops[-1].out
                rows[name] = prepared[x, kind] if kind else x
            op = op.changed(format=op.weight.format, **rows)
        ops.append(op)
        prepared = {key: rows for key, rows in prepared.items() if key[0] not in op.outputs}
    return program.rewritten(ops)


def _preparation(program: Program, x: Tensor, kind: str) -> Preparation:
    rows = ROW_FORMATS[kind]
    out = program.tensor(f"{x.name}.{kind}", x.rows, rows.width(x.width), rows.dtype)
    return PREPARATIONS[kind](out=out, x=x, width=x.width)


def fuse(program: Program, kinds: Container[str]) -> Program:
    """Joins residual additions with linear layers; norms and gated products with the preparation of their rows, where
    the backend has the fused op (kinds)."""
    return fuse_preparations(fuse_residuals(program), kinds)


def _neighbours(program: Program, first: type, second: type, name: str) -> dict[Any, Any]:
    """{op: who made its operand `name`}, for ops of two kinds that can be one, where the second stands.

    The operand is written and read only once, the step's results included; what its maker reads is not written until
    then, and the second writes nothing that either reads.
    """
    read = Counter([v for op in program.ops for v in op.inputs] + list(program.results.values()))
    written = Counter(v for op in program.ops for v in op.outputs)
    found, made = {}, {}
    for op in program.ops:
        if isinstance(op, second) and getattr(op, name) in made:
            found[op] = made[getattr(op, name)]
        made = {t: maker for t, maker in made.items() if t not in op.inputs and not {*op.outputs} & {*maker.inputs}}
        if isinstance(op, first) and read[op.out] == written[op.out] == 1:
            made[op.out] = op
    return {op: maker for op, maker in found.items() if op.out not in (*maker.inputs, *op.inputs)}


def fuse_residuals(program: Program) -> Program:
    """add(x, linear(h)) becomes one linear with a residual, if it has none."""
    pairs = {op: maker for op, maker in _neighbours(program, Linear, Add, "y").items() if maker.residual is None}
    joined = {op: maker.changed(out=op.out, residual=op.x) for op, maker in pairs.items()}
    return _replaced(program, joined, {*pairs.values()})


def fuse_preparations(program: Program, kinds: Container[str]) -> Program:
    """What makes rows, followed only by their preparation, becomes one op, if there is a kernel for it."""
    pairs = _neighbours(program, Preparable, Preparation, "x")
    joined = {op: maker.changed(out=op.out, preparation=op.kind) for op, maker in pairs.items()}
    joined = {op: both for op, both in joined.items() if both.kind in kinds}
    return _replaced(program, joined, {pairs[op] for op in joined})


def _replaced(program: Program, joined: dict, left_out: set) -> Program:
    """The program with some ops in place of others, and some left out."""
    return program.rewritten([joined.get(op, op) for op in program.ops if op not in left_out])


def verifying(program: Program, num_drafts: int) -> Program:
    """Layers with recurrent state become such as can forget up to so many drafts of a request."""
    caches, ops = {cache: [cache] for cache in program.caches}, list(program.ops)
    for i, op in enumerate(ops):
        if isinstance(op, DeltaInputs):
            rows = op.conv_width - 1 + num_drafts
            ring = CacheArray(op.state.name, "ring", "f32", (rows, op.channels))
            ops[i] = _extended(op, DeltaInputsVerify, state=ring, num_rows=rows)
            caches[op.state] = [ring]
        elif isinstance(op, GatedDelta):
            width = op.num_v_heads * (op.v_head_dim + 1) + op.num_k_heads * op.k_head_dim
            records = CacheArray(f"{op.state.name}.records", "records", "f32", (2 * num_drafts + 1, width))
            ops[i] = _extended(op, GatedDeltaVerify, records=records, num_records=2 * num_drafts + 1)
            caches[op.state].append(records)
    made = program.rewritten(ops)
    made.caches = [cache for each in caches.values() for cache in each]
    return made


def _extended(op: Operands, declaration: type[Operands], **operands) -> Operands:
    """The op as one of a declaration that adds operands to its own, or has others in their place."""
    return declaration(**{field.name: getattr(op, field.name) for field in dataclasses.fields(op)} | operands)
