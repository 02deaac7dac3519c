"""Runs a program: lays out memory once, encodes every op as a row of a table, and walks the table with a team.

After construction nothing is allocated or compiled: buffers are sized for max_step_tokens rows, and a step only changes
the words of the step block.
"""

import numpy as np

from lockstep.native.compile import compile_kernels
from lockstep.runtime.independence import may_go_on
from lockstep.runtime.operands import WeightArrays
from lockstep.runtime.program import DTYPES, ROW_COUNTS, CacheArray, Setting, Table, Tensor, Weight
from lockstep.runtime.step import COUNTER, FLAGS, FLUSHES, GOES_ON, KERNEL, OPERANDS, OWN_STEP, ROW_WORDS, ROWS
from lockstep.runtime.step_block import STEP_WORDS
from lockstep.runtime.threads import run_in_turns

ALIGNMENT = 64


def aligned(num_bytes):
    """A zeroed byte array that starts on a cache line."""
    memory = np.zeros(num_bytes + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + num_bytes]


def encode(declaration, row, values):
    """Writes the fields of an op to the words of its row.

    values: {field: number, address, WeightArrays of a packed weight, or None for an operand that is left out}.
    """
    words = []
    for name, kind, _ in declaration.words():
        value = values[name]
        if kind == "weight":
            words += value or [0] * len(WeightArrays._fields)
        else:
            words.append(int(np.float32(value).view(np.int32)) if kind == "float" else value or 0)
    row[OPERANDS : OPERANDS + len(words)] = words


def last_uses(program):
    """For every tensor, the index of the last op that touches it."""
    return {
        value: i for i, op in enumerate(program.ops) for value in (*op.outputs, *op.inputs) if isinstance(value, Tensor)
    }


def tensors_between(program, index):
    """The tensors that ops before an index of a program write and ops from there on read, in order of first use."""
    written, read = {}, set()
    for i, op in enumerate(program.ops):
        for tensor in op.outputs if i < index else ():
            written.setdefault(tensor)
        if i >= index:
            read.update(value for value in op.inputs if isinstance(value, Tensor))
    return [tensor for tensor in written if tensor in read]


def lay_out(program, max_rows, keep_all, elsewhere=()):
    """Offsets of all tensors in one block of memory, where later tensors reuse the space of dead ones unless keep_all.

    elsewhere: tensors that have memory of their own already.
    """
    offsets, free, end, dying = {}, [], 0, {}
    for tensor, index in last_uses(program).items():
        dying.setdefault(index, []).append(tensor)
    results = {*program.results.values()}
    for i, op in enumerate(program.ops):
        for tensor in op.outputs:
            if tensor in offsets or tensor in elsewhere:
                continue
            size = _tensor_bytes(tensor, max_rows)
            best = min((hole for hole in free if hole[1] >= size), key=lambda hole: hole[1], default=None)
            if best:
                free.remove(best)
                offsets[tensor] = best[0]
                if best[1] > size:
                    free.append((best[0] + size, best[1] - size))
            else:
                offsets[tensor], end = end, end + size
        if not keep_all:
            dead = [t for t in dying.get(i, ()) if t in offsets and t not in results]
            free += [(offsets[t], _tensor_bytes(t, max_rows)) for t in dead]
    return offsets, end


def _tensor_bytes(tensor, max_rows):
    # one line more than asked for: a kernel may load whole lanes past the end of the last row
    size = max_rows[tensor.rows] * tensor.width * DTYPES[tensor.dtype].itemsize + ALIGNMENT
    return -(-size // ALIGNMENT) * ALIGNMENT


def _implementation(op, backend):
    if op.kind not in backend:
        raise ValueError(
            f"op {op}: the backend has no implementation of {op.kind!r}; those of lowered ops are in the tables of "
            f"the modules that lockstep/ops/__init__.py lists"
        )
    return backend[op.kind]


class Executor:
    """A program bound to a backend, memory and threads.

    max_rows: the largest T, O, R, E and S of a step, by letter. caches: address of each CacheArray, by name. keep_all:
    give every tensor memory of its own, so that all can be read after a step. elsewhere: {tensor: address} of tensors
    that have memory already, with one cache line after it; those given to the program must be among them.
    """

    def __init__(self, program, backend, team, weights, max_rows, caches, *, keep_all=False, elsewhere=None):
        self.program, self.backend, self.team, self.max_rows = program, backend, team, max_rows
        self._weights, self._caches, self._elsewhere = weights, caches, elsewhere or {}
        self._read_arrays = {}  # {index of an op: the arrays of its weights}: held as long as the op reads them
        self._unpacked = {}  # {index of an op: the parts of its weight}, where some of them are not packed yet
        missing = next((tensor for tensor in program.given if tensor not in self._elsewhere), None)
        if missing is not None:
            raise ValueError(f"{missing} is given to the program, expected an address of it in `elsewhere`")
        self._offsets, size = lay_out(program, max_rows, keep_all, self._elsewhere)
        self._memory = aligned(size)
        self._memory.fill(0)  # pages that are touched now do not have to be faulted in by the first step
        self._counters = np.zeros(max(1, len(program.ops)), np.int64)
        self._table = aligned(8 * ROW_WORDS * max(1, len(program.ops))).view(np.int64).reshape(-1, ROW_WORDS)
        implementations = [_implementation(op, backend) for op in program.ops]
        compile_kernels([i.kernel for i in implementations])
        for i, (op, implementation) in enumerate(zip(program.ops, implementations, strict=True)):
            self._encode(i, op, implementation)
        self._table[: len(program.ops), FLAGS] |= np.multiply(GOES_ON, may_go_on(program.ops, self._place))
        self._row_limits = [(letter, ROW_COUNTS[letter], limit) for letter, limit in max_rows.items()]
        self._table_address, self._step, self._step_address = self._table.ctypes.data, None, 0

    def _encode(self, index, op, implementation):
        row, self._index = self._table[index], index
        self._arrays_of_op = self._read_arrays[index] = []
        self._unpacked.pop(index, None)
        encode(op, row, {word.name: self._field(op, word, implementation) for word in op.words()})
        row[KERNEL] = implementation.kernel.address
        row[FLAGS] = row[FLAGS] & ~FLUSHES | FLUSHES * implementation.flushes
        row[ROWS], row[COUNTER] = ROW_COUNTS[op.rows], self._counters[index:].ctypes.data

    def _field(self, op, word, implementation):
        """The value of an op's field, for `encode`."""
        value = getattr(op, word.name)
        if value is None or word.kind not in ("address", "weight"):
            return value
        layout = implementation.layouts.get(word.name, implementation.layout)
        addresses = self._weight_addresses(op, value, layout) if isinstance(value, Weight) else self._addresses(value)
        if word.kind == "address":
            return addresses[0]
        return WeightArrays(**dict.fromkeys(WeightArrays._fields, 0) | dict(zip(layout.arrays, addresses, strict=True)))

    def _addresses(self, value):
        if isinstance(value, Tensor):
            return [self._elsewhere.get(value) or self._memory.ctypes.data + self._offsets[value]]
        if isinstance(value, CacheArray):
            return [self._caches[value.name]]
        if isinstance(value, Table):
            return [value.rows.ctypes.data]
        if isinstance(value, Setting):
            return [value.values.ctypes.data]
        raise AssertionError(value)

    def _weight_addresses(self, op, weight, layout):
        weight = weight.whole or weight
        if op.part_start is None:
            arrays = self._weights.arrays(weight, layout)
        else:
            arrays, parts = self._weights.arrays_in_parts(weight, layout, op.part_start.width - 1)
            if parts is not None:
                self._unpacked[self._index] = parts
        self._arrays_of_op.append(arrays)
        return [a.ctypes.data if a.nbytes else 0 for a in arrays]

    def _place(self, tensor):
        """First and last byte of a tensor's memory."""
        [start] = self._addresses(tensor)
        return start, start + _tensor_bytes(tensor, self.max_rows)

    def weight_arrays(self):
        """The arrays of the weights that ops read, as kernels read them."""
        return [array for held in self._read_arrays.values() for arrays in held for array in arrays]

    def view(self, tensor, num_rows):
        """A tensor's first rows, as a view of the executor's memory."""
        dtype, start = DTYPES[tensor.dtype], self._offsets[tensor]
        flat = self._memory[start : start + num_rows * tensor.width * dtype.itemsize]
        return flat.view(dtype).reshape(num_rows, tensor.width)

    def fill(self, byte):
        """Overwrites all activations with one byte; with 0xFF all are NaN, so that values that no kernel wrote show."""
        self._memory[:] = byte

    def run_op(self, index, step):
        """Runs one op of the program by itself on a step block; may be called again and again."""
        self.pack_all()
        self._counters[index] = 0
        self.team.run(self._table[index:].ctypes.data, 1, step.ctypes.data)

    def run_in_turns(self, step, num_threads):
        """Runs the program on a step block on the calling thread, which takes the part of each of num_threads threads.

        Returns nanoseconds of each share, int64 [ops, num_threads], and how many tasks were claimed, int64 [ops]: see
        `threads.run_in_turns`. What ops compute means nothing, since some run more than once.
        """
        self.pack_all()
        self.begin(step)
        for i, op in enumerate(self.program.ops):
            if self.backend[op.kind].waits:  # of threads that are never all there
                self._counters[i] = 1 << 40
        times, claims = np.zeros((len(self.program.ops), num_threads), np.int64), np.zeros_like(self._counters)
        addresses = self._table_address, len(times), step.ctypes.data, num_threads, times.ctypes.data
        run_in_turns(*addresses, claims.ctypes.data)
        return times, claims

    def meets_after(self):
        """For each op, whether all threads wait for one another after it."""
        return (self._table[: len(self.program.ops), FLAGS] & GOES_ON == 0).tolist()

    def run(self, step, clock=None, first=0, last=None):
        """Runs the ops first .. last (all of them) on a step block (int64[STEP_WORDS]).

        clock: int64[last - first] for the time when each op ended. The tensors that the first op reads must hold their
        values: see `tensors_between`.
        """
        self.begin(step)
        if step is not self._step:
            self._step, self._step_address = step, step.ctypes.data
        stop, address = len(self._table) if last is None else last, clock.ctypes.data if clock is not None else 0
        for index in [index for index in self._unpacked if first <= index < stop]:
            self._run_ops(first, index, address)
            self._pack_chosen(index)
            first, address = index, address and address + 8 * (index - first)
        self._run_ops(first, stop, address)

    def _run_ops(self, first, stop, clock_address):
        self.team.run(self._table_address + 8 * ROW_WORDS * first, stop - first, self._step_address, clock_address)

    def _pack_chosen(self, index):
        """Packs the parts of an op's weight that this step reads, as the tensor says that an op before it wrote."""
        parts, op = self._unpacked[index], self.program.ops[index]
        starts = self.view(op.part_start, 1)[0]
        parts.pack(np.flatnonzero(np.diff(starts)).tolist())
        if parts.is_whole:
            del self._unpacked[index]

    def pack_all(self):
        """Packs what is not packed yet of the weights, so that ops may be run in other ways than by `run`."""
        while self._unpacked:
            _, parts = self._unpacked.popitem()
            parts.pack(range(parts.num_parts))

    def change(self, index, op):
        """Replaces an op by one of the same declaration and outputs with other weights or numbers; its kernel may be
        another, too, as where a table of embeddings has another format."""
        old, implementation = self.program.ops[index], _implementation(op, self.backend)
        if type(op) is not type(old) or op.outputs != old.outputs:
            raise ValueError(f"op {op} cannot take the place of {old}: expected one of its declaration and outputs")
        self._encode(index, op, implementation)
        self.program.ops[index] = op

    def begin(self, step):
        """Prepares for running on a step block. ValueError for a block with more rows than there is memory for."""
        assert step.shape == (STEP_WORDS,) and step.dtype == np.int64, (step.shape, step.dtype)
        words = step.tolist()  # reading one element of an array takes as long as this list
        for letter, word, limit in self._row_limits:
            num_rows = words[word]
            if num_rows > limit:
                raise ValueError(f"a step of {num_rows} rows {letter}, this executor was made for at most {limit}")
        self._counters.fill(0)

    def table_on(self, step):
        """A copy of the op table whose ops use this step block, not the one that a run is given: see `Chain`."""
        self.pack_all()
        table = self._table.copy()
        table[:, OWN_STEP] = step.ctypes.data
        return table


class Chain:
    """Executors of one team that run one after the other in one native call, each on its own step block.

    An executor and its step block may read what an earlier executor wrote: the token that one chose is the next one's
    input.
    """

    def __init__(self, executors, steps):
        self._executors, self._steps, self._team = executors, steps, executors[0].team
        tables = [executor.table_on(step) for executor, step in zip(executors, steps, strict=True)]
        self._ends = np.cumsum([len(table) for table in tables]).tolist()
        self._table = aligned(8 * ROW_WORDS * self._ends[-1]).view(np.int64).reshape(-1, ROW_WORDS)
        self._table[:] = np.concatenate(tables)
        self._addresses = self._table.ctypes.data, steps[0].ctypes.data

    def run(self, num_executors):
        """Runs the first num_executors executors."""
        for executor, step in zip(self._executors[:num_executors], self._steps[:num_executors], strict=True):
            executor.begin(step)
        table, step = self._addresses
        self._team.run(table, self._ends[num_executors - 1], step)
