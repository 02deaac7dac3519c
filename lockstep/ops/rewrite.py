"""Rewrites of a recorded program, each leaving every named tensor's bits as they are.

A recorded program is unfused; `lower` turns linear layers into what kernels do (prepare the rows, multiply), and `fuse`
joins neighbours so that rows pass through memory less often. What can be joined is what declarations say.
"""

from collections import Counter
from collections.abc import Container

from lockstep.ops.activations import ROW_FORMATS, Preparable, Preparation, QuantizeQ8, RoundBf16
from lockstep.ops.add import Add
from lockstep.ops.linear import PREPARATION, Linear
from lockstep.runtime.program import Program, Tensor

PREPARATIONS = {op.name(): op for op in (QuantizeQ8, RoundBf16)}


def lower(program: Program) -> Program:
    """Every linear layer takes the format of its weight, and prepared rows; rows prepared alike are prepared once."""
    ops, prepared = [], {}
    for op in program.ops:
        if isinstance(op, Linear):
            kind = PREPARATION[op.weight.format]
            if kind and (op.x, kind) not in prepared:
                ops.append(_preparation(program, op.x, kind))
                prepared[op.x, kind] = ops[-1].out
            op = op.changed(x=prepared[op.x, kind] if kind else op.x, format=op.weight.format)
        ops.append(op)
    return program.rewritten(ops)


def _preparation(program: Program, x: Tensor, kind: str) -> Preparation:
    rows = ROW_FORMATS[kind]
    out = program.tensor(f"{x.name}.{kind}", x.rows, rows.width(x.width), rows.dtype)
    return PREPARATIONS[kind](out=out, x=x, width=x.width)


def fuse(program: Program, kinds: Container[str]) -> Program:
    """Joins residual additions with linear layers; norms and silu_mul with the preparation of their rows, where the
    backend has the fused op (kinds)."""
    return fuse_preparations(fuse_residuals(program), kinds)


def _uses(program: Program) -> Counter:
    """How often each tensor is read, after the step, too."""
    read = [v for op in program.ops for v in op.inputs if isinstance(v, Tensor)]
    return Counter(read + list(program.results.values()))


def fuse_residuals(program: Program) -> Program:
    """add(x, linear(h)) becomes one linear with a residual, if nothing else reads the linear's output."""
    uses, writers = _uses(program), Counter(v for op in program.ops for v in op.outputs)
    made = {op.out: op for op in program.ops if isinstance(op, Linear) and writers[op.out] == 1}
    joined = {
        op: made[op.y].changed(out=op.out, residual=op.x)
        for op in program.ops
        if isinstance(op, Add) and op.y in made and uses[op.y] == 1 and op.x != op.y
    }
    return _replaced(program, joined, {made[op.y] for op in joined})


def fuse_preparations(program: Program, kinds: Container[str]) -> Program:
    """What makes rows, followed only by their preparation, becomes one op, if there is a kernel for it."""
    uses, made = _uses(program), {op.out: op for op in program.ops if isinstance(op, Preparable)}
    joined = {
        op: made[op.x].changed(out=op.out, preparation=op.kind)
        for op in program.ops
        if isinstance(op, Preparation) and op.x in made and uses[op.x] == 1
    }
    joined = {op: both for op, both in joined.items() if both.kind in kinds}
    return _replaced(program, joined, {made[op.x] for op in joined})


def _replaced(program: Program, joined: dict, left_out: set) -> Program:
    """The program with some ops in place of others, and some left out."""
    return program.rewritten([joined.get(op, op) for op in program.ops if op not in left_out])
