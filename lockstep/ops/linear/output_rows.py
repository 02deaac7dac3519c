"""A rewrite of a recorded program: rows that nobody asks for are dropped as early as they can be.

After the last op that mixes tokens (attention, a gated delta rule) no row is read by another, so from there on only
rows with an output (sampled or embedded) go on: a prompt has one, and nearly the whole last layer of its other tokens
is not computed. Every row that is computed keeps its bits.
"""

import re
from collections.abc import Iterable, Sequence

from lockstep.ops.elementwise.select_rows import SelectRows, selected_rows
from lockstep.ops.linear.linear import Linear
from lockstep.runtime.operands import Operands
from lockstep.runtime.program import Program, Table, Tensor

LAYER = re.compile(r".*\blayers\.\d+(?=\.)")


def output_rows_only(program: Program) -> Program:
    """The program whose rows without an output end before the first linear layer after the last op that mixes tokens.

    What is read of them from there on, at most a few tensors, is copied for the rows that go on ("O").
    """
    ops = program.ops
    last = max((i for i, op in enumerate(ops) if op.rows == "T" and not is_by_row(op)), default=-1)
    first = next((i for i, op in enumerate(ops) if i > last and isinstance(op, Linear) and op.rows == "T"), None)
    if first is None or _is_result({t for op in ops[first:] for t in op.outputs}, program):
        return program
    before = {tensor for op in ops[:first] for tensor in op.outputs} | {*program.given}
    read = [v for op in ops[first:] for v in op.inputs if v in before and v.rows == "T"]
    copies, made = _copies(program, dict.fromkeys(read), ops[first].out)
    later = [_with_other_rows(op, made) for op in ops[first:]]
    return program.rewritten([*ops[:first], *copies, *later])


def is_by_row(op: Operands) -> bool:
    """Whether what an op writes in a row depends on that row of what it reads, and on nothing else of the step."""
    reads_rows = any(isinstance(value, Tensor) for value in op.inputs)
    return reads_rows and not op.caches and not any(isinstance(value, Table) for value in op.inputs)


def _is_result(tensors: set[Tensor], program: Program) -> bool:
    """Whether some rows of all tokens are a result of the step."""
    return any(t in tensors and t.rows == "T" for t in program.results.values())


def _copies(
    program: Program, tensors: Iterable[Tensor], consumer: Tensor
) -> tuple[Sequence[SelectRows], dict[Tensor, Tensor]]:
    """Ops that copy the rows with an output, and {tensor: its copy}.

    A copy is named after the layer of the consumer, which drops the rows; what came into the layer is its residual.
    """
    found = LAYER.match(consumer.name)
    layer = found[0] if found else consumer.name
    ops, made = [], {}
    for x in tensors:
        part = x.name.rpartition(".")[2] if x.name.startswith(f"{layer}.") else "residual"
        made[x] = program.tensor(f"{layer}.{part}.output", "O", x.width)
        ops.append(SelectRows(out=made[x], x=x, width=x.width, selected=selected_rows("O")))
    return ops, made


def _with_other_rows(op: Operands, made: dict[Tensor, Tensor]) -> Operands:
    """The op on the rows with an output; `made` grows by what it writes."""
    for tensor in op.outputs:
        if tensor.rows == "T":
            made.setdefault(tensor, Tensor(tensor.name, "O", tensor.width, tensor.dtype))
    values = {name: getattr(op, name) for name, _ in op.declared()}
    changed = {name: made[v] for name, v in values.items() if isinstance(v, Tensor) and v in made}
    return op.changed(**changed) if changed else op
