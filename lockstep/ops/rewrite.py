"""Rewrites of a recorded program that change no bit of a tensor.

A recorded program is unfused. `lower` splits linear layers as their kernels work (prepare the rows, then multiply), and
`fuse` joins neighbouring ops so that rows pass through memory less often. Declarations of ops say which can be joined.
"""

import dataclasses
from collections import Counter
from collections.abc import Container
from typing import Any

from lockstep.formats.parts.rows import ROW_FORMATS
from lockstep.ops.elementwise.activations import Preparable, Preparation, QuantizeQ8, RoundBf16
from lockstep.ops.elementwise.add import Add
from lockstep.ops.integer.code_weights import FORMAT as CODES
from lockstep.ops.linear.experts import ExpertBias, ExpertLinear
from lockstep.ops.linear.linear import PREPARATION, Linear
from lockstep.ops.recurrent.gated_delta import DeltaInputs, GatedDelta
from lockstep.ops.recurrent.gated_delta_verify import DeltaInputsVerify, GatedDeltaVerify
from lockstep.ops.sampling.score import Score
from lockstep.runtime.operands import Operands
from lockstep.runtime.program import CacheArray, Program, Tensor

PREPARED = PREPARATION | {CODES: ""}  # a recorded program makes rows of codes itself
PREPARATIONS = {op.name(): op for op in (QuantizeQ8, RoundBf16)}
# {kind of an op that `verifying` puts in: kind of the recorded op that it replaces}
RECORDED_KINDS = {v.name(): op.name() for v, op in ((DeltaInputsVerify, DeltaInputs), (GatedDeltaVerify, GatedDelta))}


def lower(program: Program) -> Program:
    """Gives linear layers the format of their weight and prepared rows; layers that read the same rows share them."""
    ops, prepared = [], {}
    for op in program.ops:
        if isinstance(op, (Linear, Score)):
            rows = {name: getattr(op, name) for name in op.multiplied if getattr(op, name) is not None}
            for name, x in rows.items():
                preparation = PREPARED[getattr(op, op.multiplied[name]).format]
                if preparation and (x, preparation) not in prepared:
                    ops.append(_preparation(program, x, preparation))
                    prepared[x, preparation] = ops[-1].out
                rows[name] = prepared[x, preparation] if preparation else x
            op = op.changed(format=op.weight.format, **rows)
        ops.append(op)
        prepared = {key: rows for key, rows in prepared.items() if key[0] not in op.outputs}
    return program.rewritten(ops)


def _preparation(program: Program, x: Tensor, kind: str) -> Preparation:
    rows = ROW_FORMATS[kind]
    out = program.tensor(f"{x.name}.{kind}", x.rows, rows.width(x.width), rows.dtype)
    return PREPARATIONS[kind](out=out, x=x, width=x.width)


def fuse(program: Program, kinds: Container[str]) -> Program:
    """Joins residual additions with the linear layer before them, biases with the experts' linear layer before them,
    and preparations of rows with the norm or gated product before them where the fused op is one of kinds, those that
    the backend has."""
    return fuse_preparations(fuse_expert_biases(fuse_residuals(program)), kinds)


def _neighbours(program: Program, first: type, second: type, name: str) -> dict[Any, Any]:
    """{op: the op that makes its operand `name`}, for pairs of two types that can be one op at the place of the second.

    The operand has one writer, one reader, and is no result of the step. Inputs of the first op are not written before
    the second, which itself writes no input of either.
    """
    read = Counter([v for op in program.ops for v in op.inputs] + list(program.results.values()))
    written = Counter(v for op in program.ops for v in op.outputs)
    pairs, makers = {}, {}
    for op in program.ops:
        if isinstance(op, second) and getattr(op, name) in makers:
            pairs[op] = makers[getattr(op, name)]
        makers = {t: maker for t, maker in makers.items() if t not in op.inputs and not {*op.outputs} & {*maker.inputs}}
        if isinstance(op, first) and read[op.out] == written[op.out] == 1:
            makers[op.out] = op
    return {op: maker for op, maker in pairs.items() if op.out not in (*maker.inputs, *op.inputs)}


def fuse_residuals(program: Program) -> Program:
    """add(x, linear(h)) becomes one linear layer with the residual x, unless the layer has a residual already, or is
    multiplied by a factor."""
    found = _neighbours(program, Linear, Add, "y").items()
    pairs = {op: maker for op, maker in found if maker.residual is None and op.factor == 1}
    joined = {op: maker.changed(out=op.out, residual=op.x) for op, maker in pairs.items()}
    return _replaced(program, joined, {*pairs.values()})


def fuse_expert_biases(program: Program) -> Program:
    """The biases of experts become an operand of the linear layer before them."""
    pairs = _neighbours(program, ExpertLinear, ExpertBias, "x")
    joined = {op: maker.changed(out=op.out, bias=op.bias) for op, maker in pairs.items()}
    return _replaced(program, joined, {*pairs.values()})


def fuse_preparations(program: Program, kinds: Container[str]) -> Program:
    """An op whose rows only a preparation reads becomes one op with it, if the fused kind is one of kinds."""
    pairs = _neighbours(program, Preparable, Preparation, "x")
    joined = {op: maker.changed(out=op.out, preparation=op.kind) for op, maker in pairs.items()}
    joined = {op: fused for op, fused in joined.items() if fused.kind in kinds}
    return _replaced(program, joined, {pairs[op] for op in joined})


def _replaced(program: Program, joined: dict, left_out: set) -> Program:
    """The program with ops replaced as `joined` maps them, and without those in left_out."""
    return program.rewritten([joined.get(op, op) for op in program.ops if op not in left_out])


def verifying(program: Program, num_drafts: int) -> Program:
    """Gives layers with recurrent state ops that can forget up to num_drafts rejected drafts of a request."""
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
    rewritten = program.rewritten(ops)
    rewritten.caches = [cache for replaced in caches.values() for cache in replaced]
    return rewritten


def _extended(op: Operands, declaration: type[Operands], **operands) -> Operands:
    """The op as one of another declaration, with all its operands; `operands` are added or replaced."""
    return declaration(**{field.name: getattr(op, field.name) for field in dataclasses.fields(op)} | operands)
