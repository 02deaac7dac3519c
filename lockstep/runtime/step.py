"""What one step is made of: the words of a step block and of an op row, as kernels read them.

A step is a ragged batch: the tokens of several requests laid end to end. Request s owns rows
`query_start[s] .. query_start[s + 1]`, the last tokens of a sequence of `context_len[s]` tokens (this step's included).
Nothing else is prepared on the host: which tile works on which rows and pages is found inside the kernels.
"""

from numba import float32, int32, int64

from lockstep.runtime.kernel import inlined
from lockstep.runtime.simd import peek

# words of a step block: three counts, then addresses of arrays
NUM_TOKENS, NUM_REQUESTS, NUM_SAMPLED = 0, 1, 2
TOKEN_IDS = 3  # i32[T]
QUERY_START = 4  # i32[S + 1]
CONTEXT_LEN = 5  # i32[S]
PAGE_TABLE = 6  # i32[S, P]: page page_table[s, p] holds positions 64 p .. 64 (p + 1) of request s
PAGES_PER_REQUEST = 7  # P, a count
STATE_SLOT = 8  # i32[S]: row of each recurrent-state array that belongs to the request
SAMPLED_ROW = 9  # i32[R]: output rows that reach the last norm and the head
POSITION = 10  # i32[T]: position of each token in its sequence
REQUEST = 11  # i32[T]: which request of the step each token belongs to
SAMPLING = 12  # one record of ops.sample.SAMPLING_RECORD per sampled row
NUM_EMBEDDED = 13  # E, a count
EMBEDDED_ROW = 14  # i32[E]: output rows whose last hidden state is wanted for itself
NUM_OUTPUTS = 15  # O, a count
OUTPUT_ROW = 16  # i32[O]: rows of the step that are sampled or embedded
STEP_WORDS = 24

# an op row: ROW_WORDS int64 words
KERNEL, FLAGS, ROWS, COUNTER, OPERANDS = 0, 1, 2, 3, 4
ROW_WORDS = 48
FLUSHES = 1  # flag: the kernel runs with denormals flushed (ops that multiply bfloat16 pairs, and no others)


@inlined
def word(op, index):
    """Operand or parameter number `index` of an op row, as int64 (an address or an integer)."""
    return peek(op + 8 * (OPERANDS + index), int64)


@inlined
def number(op, index):
    """Parameter number `index` of an op row, as float32."""
    return peek(op + 8 * (OPERANDS + index), float32)


@inlined
def num_rows(op, step):
    """How many rows the op's first output has in this step (T, O, R, E or S, by the op's ROWS word)."""
    return peek(step + 8 * peek(op + 8 * ROWS, int64), int64)


@inlined
def step_word(step, index):
    """Word number `index` of a step block: a count or the address of an array."""
    return peek(step + 8 * index, int64)


@inlined
def entry(step, array, index):
    """One number of an int32 array of the step, as int64; array: its word."""
    return int64(peek(step_word(step, array) + 4 * index, int32))
