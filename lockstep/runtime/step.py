"""How kernels read op rows and step blocks: by the names of their declarations, each field a load from its word."""

import functools
from collections import namedtuple

from lockstep.native.kernel import inlined
from lockstep.native.numbers import float32, int32, int64
from lockstep.native.readable import readable
from lockstep.native.simd import peek
from lockstep.runtime.operands import WeightArrays
from lockstep.runtime.step_block import StepBlock
from lockstep.runtime.words import Readable

# an op row: ROW_WORDS int64 words
KERNEL, FLAGS, ROWS, COUNTER, OWN_STEP, OPERANDS = 0, 1, 2, 3, 4, 5
ROW_WORDS = 48
# flags. FLUSHES: the kernel runs with denormals flushed (ops that multiply bfloat16 pairs, and no others); GOES_ON:
# threads that have done their share begin the next op without waiting for the others, see `runtime.independence`
FLUSHES, GOES_ON = 1, 2


@inlined
def num_rows(op, step):
    """How many rows the op's first output has in this step (T, O, R, E or S, by the op's ROWS word)."""
    return peek(step + 8 * peek(op + 8 * ROWS, int64), int64)


@inlined
def entry(array, index):
    """One number of an int32 array of the step, as int64."""
    return int64(peek(array + 4 * index, int32))


@inlined
def pages_of(batch, request, group):
    """Address of a request's page table in a group: int32, a page id for each 64 positions from 0 on."""
    return batch.page_table + 4 * batch.pages_per_request * (request * batch.num_page_groups + group)


@functools.cache
def reader(declared):
    """The inlined function from the address of an op row or a step block to its fields by name."""
    words, first = declared.words(), 0 if declared is StepBlock else OPERANDS
    record = namedtuple(declared.__name__, [w.name for w in words])
    source = f"def read(address):\n    return record({', '.join(_expression(w, first) for w in words)})\n"
    names = dict(record=record, peek=peek, int64=int64, float32=float32, WeightArrays=WeightArrays)
    exec(source, names)
    return inlined(names["read"])


def _expression(word, first):
    """The source code that reads a field; first: the word at which the fields begin."""
    place, kind = 8 * (first + word.index), "float32" if word.kind == "float" else "int64"
    if word.kind == "weight":
        parts = (f"peek(address + {place + 8 * i}, int64)" for i in range(len(WeightArrays._fields)))
        return f"WeightArrays({', '.join(parts)})"
    return f"peek(address + {place}, {kind})"


readable(Readable, reader)
