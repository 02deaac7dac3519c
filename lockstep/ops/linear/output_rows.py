"""A rewrite of a recorded program: rows without an output are dropped as early as possible.

After the last op that mixes tokens (attention, a gated delta rule) every row depends on itself only, so from there on
only rows with an output (sampled or embedded) are computed. A prompt has one such row; for its other tokens most of the
last layer is not computed. Every row that is computed keeps its bits.
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

    Tensors of all rows that are read from there on, at most a few, are copied for the rows with an output ("O").
    """
    ops = program.ops
    last = max((i for i, op in enumerate(ops) if op.rows == "T" and not is_by_row(op)), default=-1)
    first = next((i for i, op in enumerate(ops) if i > last and isinstance(op, Linear) and op.rows == "T"), None)
    if first is None or _is_result({t for op in ops[first:] for t in op.outputs}, program):
        return program
    before = {tensor for op in ops[:first] for tensor in op.outputs} | {*program.given}
    read = [v for op in ops[first:] for v in op.inputs if v in before and v.rows == "T"]
    copies, replaced = _copies(program, dict.fromkeys(read), ops[first].out)
    later = [_on_output_rows(op, replaced) for op in ops[first:]]
    return program.rewritten([*ops[:first], *copies, *later])


def is_by_row(op: Operands) -> bool:
    """Whether each row that an op writes depends on the same row of its inputs, and on nothing else of the step."""
    reads_rows = any(isinstance(value, Tensor) for value in op.inputs)
    return reads_rows and not op.caches and not any(isinstance(value, Table) for value in op.inputs)


def _is_result(tensors: set[Tensor], program: Program) -> bool:
    """Whether one of the tensors has rows of all tokens and is a result of the step."""
    return any(t in tensors and t.rows == "T" for t in program.results.values())


def _copies(
    program: Program, tensors: Iterable[Tensor], consumer: Tensor
) -> tuple[Sequence[SelectRows], dict[Tensor, Tensor]]:
    """Ops that copy the rows with an output, and {tensor: its copy}.

    A copy is named after the consumer's layer, in which the other rows are dropped; the copy of a tensor that comes
    from outside the layer is named residual.
    """
    match = LAYER.match(consumer.name)
    layer = match[0] if match else consumer.name
    ops, copies = [], {}
    for x in tensors:
        part = x.name.rpartition(".")[2] if x.name.startswith(f"{layer}.") else "residual"
        copies[x] = program.tensor(f"{layer}.{part}.output", "O", x.width)
        ops.append(SelectRows(out=copies[x], x=x, width=x.width, selected=selected_rows("O")))
    return ops, copies


def _on_output_rows(op: Operands, replaced: dict[Tensor, Tensor]) -> Operands:
    """The op on the rows with an output; its own outputs are added to `replaced`."""
    for tensor in op.outputs:
        if tensor.rows == "T":
            replaced.setdefault(tensor, Tensor(tensor.name, "O", tensor.width, tensor.dtype))
    values = {name: getattr(op, name) for name, _ in op.declared()}
    changed = {name: replaced[v] for name, v in values.items() if isinstance(v, Tensor) and v in replaced}
    return op.changed(**changed) if changed else op
