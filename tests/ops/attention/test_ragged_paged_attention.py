"""Ragged paged attention: the kernel equals the definition and JAX, for any batch, page size, layout and target."""

import ctypes
import itertools
import mmap
import os
import pathlib
import subprocess
import sys
import threading

import numpy as np
import pytest

from lockstep.native.kernel import interpreted
from lockstep.ops import ragged_paged_attention
from lockstep.ops.attention import attention
from lockstep.ops.attention.formulas import score_scales
from lockstep.ops.attention.ragged import scoring_of, workers
from lockstep.ops.attention.ragged_attention import Scoring, Sequences, attend_ragged
from lockstep.ops.attention.ragged_checks import pages
from tests.ops.attention import ragged_isa
from tests.ops.attention.ragged_cases import BF16, E4M3, E5M2, F32, I8, MIXED, RECORDED, Batch
from tests.ops.harness import same_bits
from tests.targets import FEATURES, compiling_for

ROOT = pathlib.Path(__file__).parents[3]
SINKS = np.linspace(-2, 6, 48, dtype=np.float32)
LONG = [1, 65, 7, 0, 130, 1], [1, 65, 1027, 3, 1090, 2050]
CASES = {
    "multi-head f32": Batch(*LONG, (2, 2, 64), options=dict(sm_scale=0.125)),
    "GQA 2 bf16": Batch(*LONG, (4, 2, 32), 1, BF16, options=dict(sm_scale=0.2)),
    "GQA 4, five columns": Batch(*LONG, (4, 1, 80), 7, options=dict(sm_scale=0.1)),
    "GQA 4 bf16, six columns": Batch(*LONG, (8, 2, 96), 32, BF16, options=dict(sm_scale=0.1)),
    "GQA 7 bf16, one column": Batch(*LONG, (7, 1, 16), 100, BF16, options=dict(sm_scale=0.25)),
    "GQA 3 bf16, three columns": Batch(*LONG, (6, 2, 48), 13, BF16, options=dict(sm_scale=0.25)),
    "GQA 16, wide": Batch(*LONG, (16, 1, 256), 256, BF16, options=dict(sm_scale=0.0625)),
    "GQA 8, 240": Batch(*LONG, (8, 1, 240), 64, options=dict(sm_scale=0.0625)),
    "GQA 48": Batch(*LONG, (48, 1, 32), 16, options=dict(sm_scale=0.2, sinks=SINKS)),
    "window 1": Batch(*LONG, (2, 1, 16), options=dict(sliding_window=1)),
    "window 5 bf16": Batch(*LONG, (3, 3, 16), 3, BF16, options=dict(sliding_window=5)),
    "window 64": Batch(*LONG, (2, 1, 48), options=dict(sm_scale=0.1, sliding_window=64)),
    "window 100, cap, sinks": Batch(
        *LONG, (4, 1, 32), 5, BF16, options=dict(sliding_window=100, soft_cap=3.0, sinks=SINKS[:4])
    ),
    "window 1500": Batch(*LONG, (2, 1, 16), 128, options=dict(sliding_window=1500)),
    "soft cap": Batch(*LONG, (2, 2, 32), 2, options=dict(soft_cap=30.0)),
    "sinks": Batch(*LONG, (8, 2, 128), options=dict(sm_scale=0.1, sinks=SINKS[:8])),
    "scales": Batch(*LONG, (4, 2, 32), options=dict(sm_scale=0.2, k_scale=0.5, v_scale=-1.5)),
    "heads of 512": Batch([1, 9, 0, 70], [65, 9, 3, 1090], (3, 1, 512), 5, options=dict(sm_scale=0.05)),
    "e4m3, bf16": Batch(*LONG, (8, 2, 128), 16, BF16, pages_dtype=E4M3, options=dict(sm_scale=0.1, v_scale=0.5)),
    "e4m3": Batch(*LONG, (3, 1, 80), 100, pages_dtype=E4M3, options=dict(sm_scale=0.1, sliding_window=70)),
    "e5m2, 16 query heads": Batch(*LONG, (16, 1, 64), 1, pages_dtype=E5M2, options=dict(sinks=SINKS[:16], k_scale=0.2)),
    "int8": Batch(*LONG, (4, 2, 48), pages_dtype=I8, options=dict(sm_scale=0.2, k_scale=1 / 32, v_scale=1 / 32)),
}


@pytest.mark.parametrize("name", CASES)
def test_kernel_equals_definition(name):
    batch = CASES[name]
    arguments, tolerance = batch.arguments(), 0.02 if batch.dtype == BF16 else 5e-6
    expected = ragged_paged_attention(*arguments, **batch.options, backend="reference")
    for num_threads in (1, 2, 5):
        same_bits(ragged_paged_attention(*arguments, **batch.options, threads=num_threads), expected)
    assert expected.dtype == batch.dtype
    assert np.abs(expected.astype(np.float64) - batch.exact()).max() < tolerance


def test_bf16_is_rounded_once():
    batch = CASES["GQA 2 bf16"]
    q, kv, *rest = batch.arguments()
    wide = ragged_paged_attention(q.astype(np.float32), kv, *rest, **batch.options)
    assert np.abs(wide - batch.exact()).max() < 5e-6
    same_bits(ragged_paged_attention(q, kv, *rest, **batch.options), wide.astype(BF16))


@pytest.mark.parametrize("K", [16, 80])
@pytest.mark.parametrize("dtype", [E4M3, E5M2, I8], ids=str)
def test_all_codes_of_a_byte_are_what_they_are_in_float32(dtype, K):
    """With one row, which reads values in place, and with many rows, for which values are packed."""
    codes = np.arange(256, dtype=np.uint8).view(dtype)
    finite = codes[np.isfinite(codes.astype(np.float32))]
    kv = np.resize(finite, (40, 7, 2, K))  # 7 * 2 * K is no multiple of the number of codes: each comes everywhere
    q = np.resize(np.array([1, -0.5, 0.25], np.float32), (31, 2, K))
    rest = np.array([190, 200]), np.resize(np.random.default_rng(0).permutation(40), (2, 40)), np.array([0, 1, 31]), [2]
    rest = [np.array(x, np.int32) for x in rest]
    results = [ragged_paged_attention(q, pages, *rest, sm_scale=1e-5) for pages in (kv, kv.astype(np.float32))]
    same_bits(*results)
    assert np.isfinite(results[0]).all()
    if len(finite) < 256:
        kv.view(np.uint8)[rest[1][1, 199 // 7], 199 % 7] = 0x7F  # NaN in both types; only the last row sees it
        result = ragged_paged_attention(q, kv, *rest)
        assert np.isnan(result[30]).all() and np.isfinite(result[:30]).all()


@pytest.mark.parametrize("name", RECORDED)
def test_like_jax(name):
    batch, recorded = RECORDED[name], np.load(ROOT / "tests/golden/ragged.npz")[name]
    if batch.dtype == BF16:
        recorded = (recorded.astype(np.uint32) << 16).view(np.float32)
    result = ragged_paged_attention(*batch.arguments(), **batch.options).astype(np.float32)
    # JAX's reference rounds the weights to bfloat16, too
    assert np.abs(result[: len(recorded)] - recorded).max() < (0.03 if batch.dtype == BF16 else 5e-6)
    assert len(recorded) == sum(batch.lengths) and not result[len(recorded) :].any()


@pytest.mark.parametrize("window, cap", [(0, 0.0), (7, 5.0)])
def test_definition_compiled_equals_interpreted(window, cap):
    batch = Batch([2, 1], [5, 70], (2, 1, 2), 3)
    q, kv, *rest = batch.arguments()
    scale, cap = (np.float32(x) for x in interpreted(score_scales)(np.float32(0.5), np.float32(cap)))
    outs = np.full((2, *q.shape), np.nan, np.float32)
    for run, out in zip((attend_ragged, interpreted(attend_ragged)), outs, strict=True):
        run(
            q,
            *(np.ascontiguousarray(x) for x in pages(kv)),
            Sequences(*rest),
            Scoring(scale, cap, np.float32(0.5), window, SINKS[:2]),
            out,
        )
    same_bits(*outs)
    assert np.isfinite(outs).all()


def test_a_row_has_the_bits_of_the_engine_s_attention():
    batch = Batch([3], [1100], (2, 1, 16), options=dict(sm_scale=0.25))
    (k, v), result = batch.kv(0), ragged_paged_attention(*batch.arguments(), **batch.options)
    scales = scoring_of(0.25)[:2]
    for t in range(3):
        for h in range(2):
            out = np.empty(16, np.float32)
            attention.attend(batch.q[t, h], k[:, 0].copy(), v[:, 0].copy(), 1097 + t, 0, scales, out)
            same_bits(result[t, h], out)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_page_size_and_layout_are_invisible(dtype):
    batch = Batch(*LONG, (4, 2, 64), 16, dtype, options=dict(sm_scale=0.125, sliding_window=700))
    expected = ragged_paged_attention(*batch.arguments(), **batch.options)
    for page_size in (1, 2, 63, 65, 256):
        same_bits(ragged_paged_attention(*batch.with_pages_of(page_size).arguments(), **batch.options), expected)
    q, kv, *rest = batch.arguments()
    pair = tuple(np.ascontiguousarray(x) for x in pages(kv))
    same_bits(ragged_paged_attention(q, pair, *rest, **batch.options), expected)
    by_head = tuple(np.ascontiguousarray(x.transpose(2, 0, 1, 3)).transpose(1, 2, 0, 3) for x in pair)
    out_HTK = np.empty((4, len(q), 64), dtype)
    q_by_head = np.ascontiguousarray(q.transpose(1, 0, 2)).transpose(1, 0, 2)
    out = ragged_paged_attention(q_by_head, by_head, *rest, **batch.options, out=out_HTK.transpose(1, 0, 2))
    same_bits(np.ascontiguousarray(out), expected)


def test_any_address_will_do():
    batch = CASES["GQA 4 bf16, six columns"]
    q, kv, *rest = batch.arguments()
    moved = []
    for array in (q, kv):
        memory = np.zeros(array.nbytes + 66, np.uint8)
        start = 2 - memory.ctypes.data % 2 + 2
        moved.append(memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape))
        moved[-1][...] = array
    result = ragged_paged_attention(*moved, *rest, **batch.options)
    same_bits(result, ragged_paged_attention(q, kv, *rest, **batch.options))


def guarded(array, at_end):
    """(copy, memory, guards): a copy that ends (or starts) at a page of memory which must not be touched, the memory
    that holds the copy, and the addresses of the guarding pages."""
    page, size = mmap.PAGESIZE, -(-array.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, size + 2 * page)
    whole = np.frombuffer(memory, np.uint8)
    start = page + (size - array.nbytes if at_end else 0)
    copy = whole[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy, whole, [whole.ctypes.data, whole.ctypes.data + page + size]


@pytest.mark.skipif(sys.platform != "linux", reason="protects memory with Linux's mprotect")
@pytest.mark.parametrize("at_end", [True, False])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_nothing_outside_the_arrays_is_touched(dtype, at_end):
    mprotect = ctypes.CDLL(None).mprotect
    mprotect.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    for K in (16, 48, 80):
        batch = Batch(*MIXED, (4, 2, K), 7, dtype, padding_rows=1)
        arrays = (*batch.arguments(), np.empty_like(batch.q))
        *arguments, out = copies = [guarded(array, at_end) for array in arrays]
        guards = [address for _, _, addresses in copies for address in addresses]
        assert not any(mprotect(address, mmap.PAGESIZE, 0) for address in guards)
        ragged_paged_attention(*(copy for copy, *_ in arguments), out=out[0])
        assert not any(mprotect(address, mmap.PAGESIZE, mmap.PROT_READ | mmap.PROT_WRITE) for address in guards)
        same_bits(out[0], ragged_paged_attention(*arrays[:6]))


@pytest.mark.parametrize("window", [None, 70])
def test_chunks_give_the_same_bits_as_the_whole(window):
    whole = Batch([2060], [2060], (2, 1, 16), options=dict(sliding_window=window))
    q, kv, _, table, _, num_seqs = whole.arguments()
    expected = ragged_paged_attention(*whole.arguments(), **whole.options)
    cuts = [0, 1, 2, 50, 63, 64, 65, 128, 200, 1023, 1024, 1025, 1100, 2047, 2049, 2060]
    for first, last in itertools.pairwise(cuts):
        result = ragged_paged_attention(
            q[first:last],
            kv,
            np.array([last], np.int32),
            table[:1],
            np.array([0, last - first], np.int32),
            num_seqs,
            **whole.options,
        )
        same_bits(result, expected[first:last])


def test_batch_mates_do_not_matter():
    batch = CASES["sinks"]
    expected = ragged_paged_attention(*batch.arguments(), **batch.options)
    for s in range(len(batch.lengths)):
        arguments, rows = batch.alone(s)
        same_bits(ragged_paged_attention(*arguments, **batch.options), expected[rows])


@pytest.mark.parametrize("num_threads", [2, 3, 8])
def test_long_contexts_are_cut_into_spans_and_merged_in_order(num_threads):
    batch = Batch([1, 3], [5000, 3073], (2, 1, 16), dtype=BF16)
    for _ in range(5):
        same_bits(
            ragged_paged_attention(*batch.arguments(), threads=num_threads),
            ragged_paged_attention(*batch.arguments(), threads=1),
        )


def test_heads_that_read_alone_give_the_same_bits():
    batch = CASES["GQA 4, five columns"]
    q, kv, *rest = batch.arguments()
    out = np.empty_like(q)
    workers(2).attend(q, *pages(kv), Sequences(*rest), scoring_of(0.1), out, grouped=False)
    same_bits(out, ragged_paged_attention(q, kv, *rest, **batch.options))


@pytest.mark.parametrize("window", [None, 70])
@pytest.mark.parametrize("spoilt", [0, 64, 80, 126, 127, 128, 190, 191, 192])
def test_what_a_query_does_not_see_cannot_reach_it(spoilt, window):
    batch = Batch([180, 2], [200, 200], (3, 1, 32), options=dict(sliding_window=window), padding_rows=0)
    q, kv, kv_lens, table, *rest = batch.arguments()
    clean = ragged_paged_attention(q, kv, kv_lens, table, *rest, **batch.options)
    kv[table[0, spoilt // 16], spoilt % 16, 0], kv[table[0, spoilt // 16], spoilt % 16, 1] = np.nan, np.inf
    out, position = ragged_paged_attention(q, kv, kv_lens, table, *rest, **batch.options), np.r_[20:200, 0, 0]
    sees = (position >= spoilt) & (position < spoilt + window if window else True)
    sees[180:] = False
    same_bits(out[~sees], clean[~sees])
    assert sees.any() and not np.isfinite(out[sees]).all(axis=-1).any()


@pytest.mark.parametrize("score", [-2.2e38, -4e38])
def test_scores_that_nearly_overflow_are_not_below_what_is_hidden(score):
    batch = Batch([1, 70], [1, 70], (8, 1, 16), 16, padding_rows=0)
    q, kv, *rest = batch.arguments()
    q[..., 1:], kv[:, :, 0] = 0, 1e37
    q[..., 0] = score / 1e37
    expected = ragged_paged_attention(q, kv, *rest, backend="reference")
    result = ragged_paged_attention(q, kv, *rest)
    assert np.array_equal(result, expected, equal_nan=True) and np.isfinite(expected).all() == (score > -3e38)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_pages_before_the_window_may_be_freed(backend):
    batch = Batch([1, 30], [300, 200], (2, 1, 32), options=dict(sliding_window=70))
    q, kv, kv_lens, table, *rest = batch.arguments()
    expected = ragged_paged_attention(q, kv, kv_lens, table, *rest, **batch.options)
    table[0, : (300 - 70) // 16], table[1, : (170 - 69) // 16] = -1, 2**30
    same_bits(ragged_paged_attention(q, kv, kv_lens, table, *rest, **batch.options, backend=backend), expected)


def test_shared_pages():
    batch = Batch([4, 4], [90, 90], (4, 2, 32))
    q, kv, kv_lens, table, *rest = batch.arguments()
    table[1, :4] = table[0, :4]  # a prefix of 64 tokens
    q[4:8] = q[:4]
    for s in range(64, 90):
        kv[table[1, s // 16], s % 16] = kv[table[0, s // 16], s % 16]
    result = ragged_paged_attention(q, kv, kv_lens, table, *rest)
    same_bits(result[:4], result[4:8])


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_nothing_to_do_gives_zeros(backend):
    q, kv, kv_lens, table, starts, _ = Batch([0, 0], [5, 0]).arguments()
    for num_seqs in (0, 2):
        out = np.full(q.shape, np.nan, np.float32)
        result = ragged_paged_attention(
            q, kv, kv_lens, table, starts, np.array([num_seqs], np.int32), out=out, backend=backend
        )
        assert result is out and not result.any()
    empty = ragged_paged_attention(q[:0], kv, kv_lens, table, starts, np.zeros(1, np.int32), backend=backend)
    assert empty.shape == (0, 4, 32)


def test_num_seqs_is_read_at_run_time():
    batch = Batch(*MIXED)
    arguments = batch.arguments()
    whole = ragged_paged_attention(*arguments)
    for num_seqs in range(6):
        arguments[5][0] = num_seqs
        result, rows = ragged_paged_attention(*arguments), sum(batch.lengths[:num_seqs])
        same_bits(result[:rows], whole[:rows])
        assert not result[rows:].any()


def test_callers_in_many_threads():
    batches = [Batch(*MIXED, seed=s) for s in range(4)]
    expected, results_of = [ragged_paged_attention(*b.arguments()) for b in batches], {}

    def call(i):
        results_of[i] = [ragged_paged_attention(*batches[i].arguments(), threads=2) for _ in range(20)]

    threads = [threading.Thread(target=call, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, results in results_of.items():
        for result in results:
            same_bits(result, expected[i])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_process_has_threads_of_its_own():
    code = """if True:
        import os
        from lockstep.ops import ragged_paged_attention
        from tests.ops.attention.ragged_cases import Batch
        arguments = Batch([3], [40]).arguments()
        expected = ragged_paged_attention(*arguments, threads=2).tobytes()
        child = os.fork()
        if child == 0:
            os._exit(int(ragged_paged_attention(*arguments, threads=2).tobytes() != expected))
        assert os.waitpid(child, 0)[1] == 0
    """
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, check=True, timeout=300)


@pytest.mark.parametrize("cpu", FEATURES)
def test_a_target_gives_the_bits_of_this_machine(cpu):
    found = subprocess.run(
        [sys.executable, "-m", "tests.ops.attention.ragged_isa"],
        cwd=ROOT,
        env=compiling_for(cpu),
        check=True,
        capture_output=True,
        text=True,
        timeout=600,
    ).stdout.split()
    assert found == [cpu, ragged_isa.digest()]
