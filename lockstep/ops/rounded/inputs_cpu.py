"""The inputs of attention, every intermediate on a grid: the fast kernel. A token's heads one after the other."""

from collections import namedtuple

from lockstep.native.kernel import inlined, separate, variant
from lockstep.native.machine import kept_apart, stack_memory
from lockstep.native.numbers import float32
from lockstep.native.simd import peek, poke
from lockstep.ops.attention.kv_cache import PAGE_TOKENS, k_index, v_index
from lockstep.ops.attention.kv_cache_cpu import slot_of
from lockstep.ops.elementwise.rms_norm_cpu import norm_row
from lockstep.ops.rounded.grids import GRID_WORDS
from lockstep.ops.rounded.grids_cpu import quantize_row
from lockstep.ops.rounded.inputs import ALL, CAT, COS, NORM, ROT, SIN, X1, X2, RoundedInputs
from lockstep.ops.rounded.row_math_cpu import add_rows, copy_row, multiply_rows, negate_row
from lockstep.runtime.backend import Implementation
from lockstep.runtime.step import StepBlock, entry, num_rows

MAX_HEAD_DIM = 256
ROW = 4 * MAX_HEAD_DIM  # bytes of a vector of scratch
COSINES, SINES, FIRST, SECOND, SWAPPED, PRODUCT, KEY = (i * ROW for i in range(7))
SCRATCH_BYTES = 7 * ROW
ONE_THREAD = None  # constant of a variant: whether one thread does all tokens

# a head's norm weight (0: none), the address of its grids, and the number of heads (query or key) between its grids
Head = namedtuple("Head", "norm grids num_heads")


@inlined
def double_row(values, R, negated, out):
    """R values twice, the first half negated if `negated`."""
    if negated:
        negate_row(values, R, out)
    else:
        copy_row(values, R, out)
    copy_row(values, R, out + 4 * R)


@inlined
def swap_halves(x1, x2, R, pre_negated, out):
    """cat: the second half, negated unless the table of sines is (pre_negated), then the first."""
    if pre_negated:
        copy_row(x2, R, out)
    else:
        negate_row(x2, R, out)
    copy_row(x1, R, out + 4 * R)


@inlined
def make_tables(a, position, memory):
    """Writes cos and sin of a position, twice each and on their grids, to scratch."""
    R = a.rope_dim // 2
    double_row(a.cos + 4 * R * position, R, False, memory + COSINES)
    double_row(a.sin + 4 * R * position, R, a.pre_negated, memory + SINES)
    quantize_row(memory + COSINES, 2 * R, a.rope_grids)
    quantize_row(memory + SINES, 2 * R, a.rope_grids + 4 * GRID_WORDS)


@inlined
def round_at(x, num_values, head, site):
    """Rounds a head's vector to the grid of a site."""
    quantize_row(x, num_values, head.grids + 4 * GRID_WORDS * site * head.num_heads)


@inlined
def make_cat(a, out, head, memory):
    """Writes cat of the rotated channels at `out` to scratch."""
    R = a.rope_dim // 2
    copy_row(out, R, memory + FIRST)
    copy_row(out + 4 * R, R, memory + SECOND)
    round_at(memory + FIRST, R, head, X1)
    round_at(memory + SECOND, R, head, X2)
    swap_halves(memory + FIRST, memory + SECOND, R, a.pre_negated, memory + SWAPPED)
    round_at(memory + SWAPPED, 2 * R, head, CAT)


@separate
def make_head(a, x, head, out, memory):
    """Writes one head of float32 at x, normed and rotated, to out."""
    kept_apart()  # a kernel needs it for queries and for keys
    K, R2 = a.head_dim, a.rope_dim
    if head.norm != 0:
        norm_row(x, head.norm, K, a.eps, a.norm_offset, out)
    else:
        copy_row(x, K, out)
    round_at(out, K, head, NORM)
    if R2 > 0:
        make_cat(a, out, head, memory)
        multiply_rows(memory + SWAPPED, memory + SINES, R2, memory + PRODUCT)
        round_at(memory + PRODUCT, R2, head, SIN)
        multiply_rows(out, memory + COSINES, R2, out)
        round_at(out, R2, head, COS)
        add_rows(out, memory + PRODUCT, R2, out)
    round_at(out, K, head, ROT)


@inlined
def write_key_value(a, row, page, slot, g, memory):
    """Writes a token's key and value of one kv head to their page."""
    G, K = a.num_kv_heads, a.head_dim
    head, key = Head(a.k_norm, a.k_grids + 4 * GRID_WORDS * g, G), memory + KEY
    make_head(a, row + 4 * (a.k_offset + g * K), head, key, memory)
    round_at(key, K, head, ALL)
    column = a.k_pages + 4 * k_index(page, g, 0, slot, G, K, False)
    for d in range(K):
        poke(column + 4 * PAGE_TOKENS * d, peek(key + 4 * d, float32))
    value = a.v_pages + 4 * v_index(page, g, 0, slot, G, K, False)
    copy_row(row + 4 * (a.v_offset + g * K), K, value)
    quantize_row(value, K, a.v_grids + 4 * GRID_WORDS * g)


def make_tokens(op, step, thread, num_threads):
    """Each thread takes a run of tokens: neighbours share lines of K."""
    a, batch, memory = RoundedInputs.read(op), StepBlock.read(step), stack_memory(SCRATCH_BYTES)
    T, H = num_rows(op, step), a.num_heads
    first, last = (
        (0, T if thread == 0 else 0) if ONE_THREAD else (T * thread // num_threads, T * (thread + 1) // num_threads)
    )
    for t in range(first, last):
        row = a.x + 4 * a.row_width * t
        make_tables(a, entry(batch.position, t), memory)
        for h in range(H):
            head = Head(a.q_norm, a.q_grids + 4 * GRID_WORDS * h, H)
            make_head(a, row + 4 * (a.q_offset + h * a.q_stride), head, a.q + 4 * a.head_dim * (H * t + h), memory)
        _, page, slot = slot_of(a, batch, t)
        for g in range(a.num_kv_heads):
            write_key_value(a, row, page, slot, g, memory)


rounded_inputs = variant(make_tokens, "rounded_inputs", ONE_THREAD=False)
rounded_inputs_per_token = variant(make_tokens, "rounded_inputs_per_token", ONE_THREAD=True)

CPU = {"rounded_inputs": Implementation(rounded_inputs)}
PER_TOKEN = {"rounded_inputs": Implementation(rounded_inputs_per_token)}
