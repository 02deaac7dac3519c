"""The rules for arguments of ragged paged attention. An error says what was wrong, what was given, what is allowed."""

import ml_dtypes
import numpy as np

from lockstep.native.host import num_cores
from lockstep.native.kernel import native
from lockstep.native.numbers import int32
from lockstep.native.simd import peek
from lockstep.ops.attention.formulas import MAX_GROUP, MAX_HEAD_DIM, first_key

FLOATS = (np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16))
# dtypes of pages, with their names in `tiles_rows.ROW_NUMBERS`
PAGE_DTYPES = {
    np.dtype(np.float32): "f32",
    np.dtype(ml_dtypes.bfloat16): "bf16",
    np.dtype(ml_dtypes.float8_e4m3fn): "f8_e4m3",
    np.dtype(ml_dtypes.float8_e5m2): "f8_e5m2",
    np.dtype(np.int8): "i8",
}
MAX_PAGE_SIZE, MAX_THREADS = 1 << 20, 1024
LARGEST = float(np.finfo(np.float32).max)
REAL = int | float | np.integer | np.floating
OVERLAP_WORK = 1000  # steps that NumPy may take to tell interleaved arrays from overlapping ones
MAX_MASK = -1000.0  # a larger mask_value would let hidden keys through in a kernel that adds it to scores


def refuse(what, got, allowed):
    raise ValueError(f"{what}: got {got}, allowed: {allowed}")


def pages(kv_pages):
    """(K, V), each [N, B, G, K], from one interleaved array or from a pair."""
    if isinstance(kv_pages, tuple | list):
        if len(kv_pages) != 2:
            refuse("kv_pages as separate arrays", f"{len(kv_pages)} of them", "a pair (k_pages, v_pages)")
        k, v = (array("kv_pages", a, 4, PAGE_DTYPES) for a in kv_pages)
        if k.shape != v.shape or k.dtype != v.dtype:
            refuse("k_pages and v_pages", f"{k.shape} {k.dtype} and {v.shape} {v.dtype}", "the same shape and dtype")
        return k, v
    array("kv_pages", kv_pages, 4, PAGE_DTYPES)
    if kv_pages.shape[2] % 2:
        refuse("kv_pages.shape[2], keys and values interleaved", kv_pages.shape[2], "an even number, 2 * kv heads")
    return kv_pages[:, :, 0::2], kv_pages[:, :, 1::2]


def array(name, value, rank, dtypes):
    """The array itself, if it has the rank and one of the dtypes, and its last axis is contiguous."""
    if not isinstance(value, np.ndarray) or value.ndim != rank:
        got = f"shape {value.shape}" if isinstance(value, np.ndarray) else type(value).__name__
        refuse(name, got, f"a NumPy array of rank {rank}")
    if value.dtype not in dtypes:
        refuse(f"dtype of {name}", value.dtype, " or ".join(d.name for d in dtypes))
    if value.size == 0:  # the strides of an empty array mean nothing, and nothing is read
        return value
    if value.shape[-1] > 1 and value.strides[-1] != value.itemsize:
        refuse(f"last stride of {name}", f"{value.strides[-1]} bytes", f"{value.itemsize}: the last axis contiguous")
    if not value.flags.aligned:
        refuse(f"strides and address of {name}", (*value.strides, value.ctypes.data), f"multiples of {value.itemsize}")
    return value


def shapes(q, k, sequences):
    """Checks all that follows from shapes and dtypes alone. k: pages [N, B, G, K]; the pages of V are alike."""
    array("q", q, 3, FLOATS)
    kv_lens, page_indices, cu_q_lens, num_seqs = sequences
    for name, value, rank in (
        ("kv_lens", kv_lens, 1),
        ("page_indices", page_indices, 2),
        ("cu_q_lens", cu_q_lens, 1),
        ("num_seqs", num_seqs, 1),
    ):
        array(name, value, rank, (np.dtype(np.int32),))
    (_, H, K), (_, B, G, kv_K), S = q.shape, k.shape, page_indices.shape[0]
    if kv_K != K:
        refuse("head_dim of kv_pages", kv_K, f"{K}, as in q {q.shape}")
    if K % 16 or not 0 < K <= MAX_HEAD_DIM:
        refuse("head_dim", K, f"multiples of 16 up to {MAX_HEAD_DIM}")
    if G == 0 or H == 0 or H % G or H // G > MAX_GROUP:
        refuse("query heads", f"{H} with {G} kv heads", f"a multiple of them, at most {MAX_GROUP} times as many")
    if not 0 < B <= MAX_PAGE_SIZE:
        refuse("page size, kv_pages.shape[1]", B, f"1 to {MAX_PAGE_SIZE}")
    if num_seqs.shape != (1,):
        refuse("shape of num_seqs", num_seqs.shape, "(1,)")
    if kv_lens.shape != (S,):
        refuse("shape of kv_lens", kv_lens.shape, f"{(S,)}, one for each row of page_indices {page_indices.shape}")
    if cu_q_lens.shape != (S + 1,):
        refuse("shape of cu_q_lens", cu_q_lens.shape, f"{(S + 1,)}, one more than kv_lens has")


def scoring(num_heads, sliding_window, soft_cap, mask_value, sinks):
    """Checks the arguments that say how keys are weighed, but for the scales, which `finite` checks."""
    if sliding_window is not None:
        whole("sliding_window", sliding_window, np.iinfo(np.int32).max)
    if soft_cap is not None:
        finite("soft_cap", soft_cap)
        if not np.float32(soft_cap):
            refuse("soft_cap", soft_cap, "any number but 0.0 that float32 holds, or None for no cap")
    if mask_value is not None and not (isinstance(mask_value, REAL) and mask_value <= MAX_MASK):
        refuse("mask_value", repr(mask_value), f"None or at most {MAX_MASK}: hidden keys have no weight at all")
    if sinks is not None and array("sinks", sinks, 1, FLOATS[:1]).shape != (num_heads,):
        refuse("shape of sinks", sinks.shape, f"{(num_heads,)}, one for each query head")


def resources(backend, pages_per_seq, num_kv_pages_per_block, num_queries_per_block, vmem_limit_bytes):
    """Checks the arguments that say where and in which pieces the work is done."""
    if not (isinstance(backend, str) and backend in ("cpu", "reference")):
        refuse("backend", repr(backend), "'cpu' or 'reference'")
    if num_kv_pages_per_block is not None:
        whole("num_kv_pages_per_block", num_kv_pages_per_block, pages_per_seq)
    for name, value in (("num_queries_per_block", num_queries_per_block), ("vmem_limit_bytes", vmem_limit_bytes)):
        if value is not None:
            whole(name, value, np.iinfo(np.int64).max)


def whole(name, value, max_value):
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or not 0 < value <= max_value:
        refuse(name, f"{value!r:.80}", f"None or an integer from 1 to {max_value}")


def finite(name, value):
    if value is not None and not (isinstance(value, REAL) and abs(value) <= LARGEST):
        refuse(name, f"{value!r:.80}", "a finite number that float32 holds")


def output(out, q, inputs):
    """The array out itself, if results can be written to it without changing an input."""
    array("out", out, 3, (q.dtype,))
    if out.shape != q.shape or not out.flags.writeable:
        refuse("out", f"shape {out.shape}{'' if out.flags.writeable else ', read-only'}", f"shape {q.shape}, writeable")
    for x in inputs:
        if x is not None and np.may_share_memory(out, x, OVERLAP_WORK):
            refuse("out", f"memory of an input of shape {x.shape}", "memory of its own")
    return out


def thread_count(threads):
    """The number of threads: the given number, or one for each core that this process may use."""
    if threads is None:
        return num_cores()
    whole("threads", threads, MAX_THREADS)
    return int(threads)


RULES = {
    1: ("num_seqs", "0 to {3}, the rows of page_indices"),
    2: ("cu_q_lens[0]", "0"),
    3: ("cu_q_lens[{0} + 1] - cu_q_lens[{0}]", "0 or more: cu_q_lens may not decrease"),
    4: ("cu_q_lens[num_seqs]", "at most {2}, the rows of q"),
    5: ("kv_lens[{0}]", "at least {2}, the rows of sequence {0} in q"),
    6: ("kv_lens[{0}]", "at most {2}: as many tokens as a row of page_indices holds"),
    7: ("page_indices[{0}, {3}]", "0 to {2} - 1, the pages there are"),
}


@native
def first_fault(limits, arrays, row_bytes, window):
    """The first rule of RULES that the metadata breaks: (rule or 0, sequence, got, limit, detail).

    limits: rows of q, pages, slots of a page, rows and columns of page_indices. arrays: addresses of the arrays of
    `Sequences`; row_bytes: from one row of page_indices to the next. Only numbers that the kernel reads are checked: no
    entry past num_seqs, no page that no row sees.
    """
    num_tokens, num_pages, page_size, max_seqs, pages_per_seq = limits
    kv_lens, page_indices, cu_q_lens, num_seqs = arrays
    count = np.int64(peek(num_seqs, int32))
    if not 0 <= count <= max_seqs:
        return 1, 0, count, 0, max_seqs
    start = np.int64(peek(cu_q_lens, int32))
    if start != 0:
        return 2, 0, start, 0, 0
    for s in range(count):
        stop, length = np.int64(peek(cu_q_lens + 4 * (s + 1), int32)), np.int64(peek(kv_lens + 4 * s, int32))
        tokens = stop - start
        if tokens < 0:
            return 3, s, tokens, 0, 0
        if stop > num_tokens:
            return 4, s, stop, num_tokens, 0
        if length < tokens:
            return 5, s, length, tokens, 0
        if length > pages_per_seq * page_size:
            return 6, s, length, pages_per_seq * page_size, 0
        first = first_key(length - tokens, window)
        for p in range(first // page_size, (length - 1) // page_size + 1 if tokens > 0 else 0):
            page = np.int64(peek(page_indices + row_bytes * s + 4 * p, int32))
            if not 0 <= page < num_pages:
                return 7, s, page, num_pages, p
        start = stop
    return 0, 0, 0, 0, 0


def metadata(num_tokens, pages_shape, sequences, sliding_window):
    """Checks the numbers in kv_lens, page_indices, cu_q_lens and num_seqs."""
    for name in ("kv_lens", "cu_q_lens"):
        value = getattr(sequences, name)
        if value.strides[0] != 4 and value.size > 1:
            refuse(f"stride of {name}", value.strides[0], "4 bytes: contiguous")
    table = sequences.page_indices
    limits, addresses = (num_tokens, *pages_shape[:2], *table.shape), tuple(a.ctypes.data for a in sequences)
    rule, s, got, limit, detail = first_fault(limits, addresses, table.strides[0], sliding_window or 0)
    if rule:
        name, allowed = RULES[rule]
        refuse(name.format(s, got, limit, detail), got, allowed.format(s, got, limit, detail))
