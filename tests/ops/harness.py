"""Runs one op through the executor on arrays, as a model would, and compares backends bit for bit."""

import numpy as np

from lockstep.ops.sampling.sample import SAMPLING_RECORD
from lockstep.runtime.executor import Executor
from lockstep.runtime.operands import Operands, output
from lockstep.runtime.program import DTYPES, ROW_COUNTS, Program, Setting, Table, Tensor, Weight
from lockstep.runtime.step_block import StepBlock
from lockstep.runtime.threads import Team
from lockstep.weights.store import WeightStore
from lockstep.weights.tensor import StoredTensor

NAN_BYTES = 0xFF  # float32 and bf16 of all ones are NaN: elements that a kernel does not write show


def weight(array, name="weight"):
    """A Weight made from an array (or an object with to_f32, shape and format)."""
    if not hasattr(array, "to_f32"):
        array = StoredTensor(name, "f32", np.shape(array), np.asarray(array, np.float32))
    return Weight(name, array.format, tuple(array.shape), (array,))


def ragged_step(lengths=(1,), contexts=None, pages=None, **arrays):
    """(A step block, its arrays, which it needs alive) for requests of `lengths` new tokens and `contexts` in all.

    arrays: fields of the step block in place of those made here.
    """
    contexts = contexts if contexts is not None else lengths
    start = np.cumsum([0, *lengths])
    fields = dict(
        query_start=start,
        context_len=contexts,
        state_slot=np.arange(len(lengths)),
        position=np.concatenate([np.arange(c - n, c) for n, c in zip(lengths, contexts, strict=True)]),
        request=np.repeat(np.arange(len(lengths)), lengths),
        token_ids=np.zeros(start[-1]),
        sampled_row=start[1:] - 1,
        embedded_row=[],
        output_row=[],
        num_drafts=np.zeros(len(lengths)),
        num_pending=np.zeros(len(lengths)),
        page_table=pages if pages is not None else np.zeros((len(lengths), 1)),
    )
    held = {
        name: np.ascontiguousarray(array, np.int32) for name, array in (fields | arrays).items() if name != "sampling"
    }
    counted_by = dict(T="token_ids", S="context_len", R="sampled_row", E="embedded_row", O="output_row")
    counts = {letter: len(held[name]) for letter, name in counted_by.items()} | dict(P=held["page_table"].shape[1])
    counts["W"] = len(held["page_table"]) // counts["S"]
    held["sampling"] = arrays.get("sampling", np.zeros(counts["R"], SAMPLING_RECORD))
    for name, shape in StepBlock.shapes(**counts).items():
        assert held[name].shape == shape, (name, held[name].shape, shape)
    step = StepBlock.made(**held)
    for letter, index in StepBlock.counts().items():
        step[index] = counts[letter]
    return step, held


class Given(Operands):
    """An activation that a test writes."""

    out: Tensor = output(dtype=None)


def run_op(backend, declaration, step=None, num_threads=1, rows="T", **operands):
    """Runs one op, declared by an `Operands` class. Returns {name: array} of its outputs, which all start as NaN.

    backend: a table of implementations, or the implementation. operands: by name: numbers; arrays [rows, width] for
    activations, of any shape for constants, [pages or slots, *shape] for caches (changed in place), [positions, width]
    for tables, [rows, columns] for settings; Weights. Outputs are made as declared, with the rows of a letter; one
    whose width or type the declaration leaves open is given as (width, dtype).
    """
    program, written, caches, values = Program(), [], {}, {}
    for group in range(operands.get("page_group", 0)):  # the groups before it belong to other layers
        program.cache(f"pages of group {group}", "pages", "f32", (1,), window=1 + group)
        caches[f"pages of group {group}"] = 0
    for name, operand in declaration.declared():
        given = operands.get(name)
        if operand.role == "output":
            width, dtype = given or (operand.shape, operand.dtype)
            width = eval(width, {}, operands) if isinstance(width, str) else width
            values[name] = program.tensor(name, rows, width, dtype)
        elif operand.role == "cache":
            caches[name] = given.ctypes.data
            dtype = next(k for k, d in DTYPES.items() if d == given.dtype)
            values[name] = program.cache(name, operand.kind or "pages", dtype, given.shape[1:])
        elif operand.role == "table" and given is not None:
            values[name] = Table(name, given, None)
        elif operand.role == "setting" and given is not None:
            values[name] = Setting(name, given)
        elif operand.role == "rows" and given is not None:
            dtype = next(k for k, d in DTYPES.items() if d == given.dtype)
            values[name] = program.tensor(name, "T" if operand.other_rows else rows, given.shape[1], dtype)
            written.append((values[name], given))
        elif given is not None:
            values[name] = given if isinstance(given, Weight) else weight(given, name)
    for tensor, _ in written:
        program.emit(Given(out=tensor))
    op = declaration(**operands | values)
    program.emit(op)
    return _run_last(program, backend, op, written, caches, step, num_threads)


def _run_last(program, backend, op, written, caches, step, num_threads):
    """Runs the last op of a program on given activations."""
    if step is None:
        step, _held = ragged_step([max([len(value) for _, value in written], default=1)])
    implementation = backend[op.kind] if isinstance(backend, dict) else backend
    rows = {letter: int(step[count]) for letter, count in ROW_COUNTS.items()}
    table, team = {"given": implementation, op.kind: implementation}, Team(num_threads)
    try:
        executor = Executor(program, table, team, WeightStore(), rows, caches, keep_all=True)
        executor.fill(NAN_BYTES)
        for tensor, value in written:
            executor.view(tensor, len(value))[...] = value
        executor.run_op(len(program.ops) - 1, step)
        return {t.name: executor.view(t, rows[t.rows]).copy() for t in op.outputs}
    finally:
        team.close()


def same_bits(a, b):
    """Asserts equality byte for byte, naming the first difference."""
    assert a.shape == b.shape and a.dtype == b.dtype, (a.shape, b.shape, a.dtype, b.dtype)
    if a.tobytes() != b.tobytes():
        bits = np.ascontiguousarray(a).view(np.uint8).reshape(*a.shape, -1) != np.ascontiguousarray(b).view(
            np.uint8
        ).reshape(*b.shape, -1)
        where = tuple(int(i) for i in np.argwhere(bits.any(-1))[0])
        raise AssertionError(
            f"first difference at {where}: {a[where]!r} and {b[where]!r}; {int(bits.any(-1).sum())} differ"
        )
