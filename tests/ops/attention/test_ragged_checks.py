"""Arguments that ragged paged attention refuses; and calls neither compile nor allocate."""

import tracemalloc
from functools import partial

import numpy as np
import pytest
from numba.core import event
from numba.core.runtime import _nrt_python, rtsys

from lockstep.native.kernel import Kernel
from lockstep.ops import ragged_paged_attention
from tests.ops.attention.ragged_cases import BF16, F32, Batch

BATCH = Batch([1, 5, 0], [70, 20, 10], (4, 2, 32))
Q, KV, KV_LENS, TABLE, STARTS, NUM_SEQS = BATCH.arguments()
NAMES = ("q", "kv_pages", "kv_lens", "page_indices", "cu_q_lens", "num_seqs")


def changed(array, index, value):
    copy = array.copy()
    copy[index] = value
    return copy


def i32(*values):
    return np.array(values, np.int32)


def misplaced(array):
    """The same numbers at an odd address."""
    copy = np.zeros(array.nbytes + 1, np.uint8)[1:].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def apart(array):
    """The same numbers, in rows whose stride is no multiple of a number's bytes."""
    rows = np.zeros((len(array), array[0].nbytes + 1), np.uint8)[:, :-1].view(array.dtype).reshape(array.shape)
    rows[...] = array
    return rows


METADATA = [
    (dict(num_seqs=i32(5)), r"num_seqs: got 5, allowed: 0 to 4"),
    (dict(num_seqs=i32(-1)), r"num_seqs: got -1"),
    (dict(cu_q_lens=changed(STARTS, 0, 1)), r"cu_q_lens\[0\]: got 1, allowed: 0"),
    (dict(cu_q_lens=changed(STARTS, 2, 0)), r"cu_q_lens\[1 \+ 1\] - cu_q_lens\[1\]: got -1, allowed: 0 or more"),
    (dict(cu_q_lens=changed(STARTS, 3, 10)), r"cu_q_lens\[num_seqs\]: got 10, allowed: at most 9"),
    (dict(kv_lens=changed(KV_LENS, 1, 4)), r"kv_lens\[1\]: got 4, allowed: at least 5"),
    (dict(kv_lens=changed(KV_LENS, 2, -1)), r"kv_lens\[2\]: got -1, allowed: at least 0"),
    (dict(kv_lens=changed(KV_LENS, 0, 97)), r"kv_lens\[0\]: got 97, allowed: at most 96"),
    (dict(page_indices=changed(TABLE, (0, 4), 10)), r"page_indices\[0, 4\]: got 10, allowed: 0 to 10 - 1"),
    (dict(page_indices=changed(TABLE, (1, 0), -1)), r"page_indices\[1, 0\]: got -1"),
]
SHAPES = [
    (dict(q=Q[0]), "q: got shape .*allowed: a NumPy array of rank 3"),
    (dict(q=Q.tolist()), "q: got list"),
    (dict(q=Q.astype(np.float64)), "dtype of q: got float64, allowed: float32 or bfloat16"),
    (dict(q=np.asfortranarray(Q)), "last stride of q"),
    (dict(q=misplaced(Q)), "strides and address of q: got .*allowed: multiples of 4"),
    (dict(q=apart(Q)), "strides and address of q: got .*allowed: multiples of 4"),
    (dict(kv_pages=misplaced(KV.astype(BF16))), "strides and address of kv_pages: got .*allowed: multiples of 2"),
    (dict(q=Q[:, :, :16]), "head_dim of kv_pages: got 32, allowed: 16"),
    (dict(q=Q[:, :3]), "query heads: got 3 with 2 kv heads"),
    (dict(q=Q[:, :, :8], kv_pages=KV[..., :8]), "head_dim: got 8, allowed: multiples of 16 up to 512"),
    (dict(q=np.zeros((9, 4, 528), np.float32), kv_pages=np.zeros((10, 16, 4, 528), np.float32)), "head_dim: got 528"),
    (dict(q=np.zeros((9, 194, 32), np.float32)), "query heads: got 194 with 2 kv heads"),
    (dict(kv_pages=KV[:, :, :3]), r"kv_pages.shape\[2\].*got 3, allowed: an even number"),
    (dict(kv_pages=(KV, KV, KV)), "kv_pages as separate arrays: got 3 of them"),
    (dict(kv_pages=KV.astype(np.float16)), "kv_pages: got float16, allowed: float32 or bfloat16 or float8_e4m3fn or"),
    (dict(kv_pages=(KV, KV.astype(BF16))), "k_pages and v_pages: .* allowed: the same shape and dtype"),
    (dict(kv_pages=np.zeros((4, 16, 0, 32), np.float32)), "query heads: got 4 with 0 kv heads"),
    (dict(kv_pages=KV[:, :0]), r"page size, kv_pages.shape\[1\]: got 0"),
    (dict(kv_lens=KV_LENS.astype(np.int64)), "dtype of kv_lens: got int64, allowed: int32"),
    (dict(kv_lens=KV_LENS[:3]), r"shape of kv_lens: got \(3,\), allowed: \(4,\)"),
    (dict(kv_lens=np.repeat(KV_LENS, 2)[::2]), "last stride of kv_lens"),
    (dict(cu_q_lens=STARTS[:4]), r"shape of cu_q_lens: got \(4,\), allowed: \(5,\)"),
    (dict(page_indices=TABLE[:, ::2]), "last stride of page_indices"),
    (dict(num_seqs=i32(1, 1)), r"shape of num_seqs: got \(2,\), allowed: \(1,\)"),
]
OPTIONS = [
    (dict(sliding_window=0), "sliding_window: got 0, allowed: None or an integer from 1"),
    (dict(sliding_window=2.5), "sliding_window: got 2.5"),
    (dict(soft_cap=0.0), "soft_cap: got 0.0, allowed: any number but 0.0"),
    (dict(soft_cap=1e-60), "soft_cap: got 1e-60, allowed: any number but 0.0 that float32 holds"),
    (dict(soft_cap=1e-45), "sm_scale [*] k_scale / soft_cap: got .*inf"),
    (dict(soft_cap=np.array([1.0, 2.0])), "soft_cap: got array"),
    (dict(sm_scale=1e38, k_scale=1e38), "sm_scale [*] k_scale / soft_cap: got .*inf"),
    (dict(k_scale=np.complex64(1j)), "k_scale: got .*allowed: a finite number"),
    (dict(mask_value="low"), "mask_value: got 'low', allowed: None or at most -1000"),
    (dict(backend=np.array(["cpu", "gpu"])), "backend: got array"),
    (dict(out=Q), r"out: got memory of an input of shape \(9, 4, 32\), allowed: memory of its own"),
    (dict(soft_cap=float("nan")), "soft_cap: got nan"),
    (dict(sm_scale=float("inf")), "sm_scale: got inf, allowed: a finite number"),
    (dict(sm_scale="1"), "sm_scale: got '1'"),
    (dict(k_scale=1e39), "k_scale: got 1e[+]39"),
    (dict(v_scale=float("nan")), "v_scale: got nan"),
    (dict(mask_value=0.0), "mask_value: got 0.0, allowed: None or at most -1000"),
    (dict(sinks=np.zeros(3, np.float32)), r"shape of sinks: got \(3,\), allowed: \(4,\)"),
    (dict(sinks=np.zeros(4)), "dtype of sinks: got float64"),
    (dict(threads=0), "threads: got 0, allowed: None or an integer from 1 to"),
    (dict(backend="gpu"), "backend: got 'gpu', allowed: 'cpu' or 'reference'"),
    (dict(out=Q[:3]), "out: got shape"),
    (dict(out=Q.astype(BF16)), "dtype of out: got bfloat16, allowed: float32"),
    (dict(num_kv_pages_per_block=7), "num_kv_pages_per_block: got 7, allowed: None or an integer from 1 to 6"),
    (dict(num_queries_per_block=0), "num_queries_per_block: got 0"),
    (dict(vmem_limit_bytes=-1), "vmem_limit_bytes: got -1"),
]


def call(**arguments):
    defaults = {"threads": 2} | dict(zip(NAMES, (Q, KV, KV_LENS, TABLE, STARTS, NUM_SEQS), strict=True)) | arguments
    return ragged_paged_attention(**defaults)


@pytest.mark.parametrize("arguments, message", METADATA + SHAPES + OPTIONS, ids=lambda x: x if type(x) is str else "")
def test_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        call(**arguments)


def test_accepted():
    expected = call()
    for same in (
        dict(mask_value=-1e30),
        dict(num_kv_pages_per_block=2, num_queries_per_block=8),
        dict(sm_scale=1),
        dict(vmem_limit_bytes=1 << 20),
        dict(k_scale=1.0, v_scale=1.0),
        dict(sliding_window=np.int64(70)),
    ):
        assert call(**same).tobytes() == expected.tobytes()
    assert call(soft_cap=-3.0).tobytes() == call(soft_cap=3).tobytes()


def test_arrays_without_anything_in_them_are_accepted():
    nothing = dict(
        kv_pages=KV[:0].copy(),
        kv_lens=i32(),
        page_indices=np.zeros((0, 3), np.int32),
        cu_q_lens=i32(0),
        num_seqs=i32(0),
    )
    assert not call(**nothing).any() and call(q=np.zeros((0, 4, 32), np.float32), **nothing).shape == (0, 4, 32)
    rows = dict(kv_lens=i32(0), page_indices=np.zeros((1, 0), np.int32), cu_q_lens=i32(0, 0), num_seqs=i32(1))
    assert not call(**rows).any()


def test_out_may_lie_between_the_rows_of_an_input():
    both = np.zeros((9, 8, 32), np.float32)
    both[:, 4:] = Q
    assert np.array_equal(call(q=both[:, 4:], out=both[:, :4]), call())


def random_mix(rng):
    """Arguments of a random batch of up to twelve sequences, in float32 or bfloat16."""
    lengths = rng.integers(0, 40, rng.integers(1, 12))
    contexts = list(lengths + rng.integers(0, 200, len(lengths)))
    batch = Batch(
        list(lengths),
        contexts,
        (4, 2, 32),
        int(rng.integers(1, 65)),
        F32 if rng.random() < 0.5 else BF16,
        int(rng.integers(1 << 20)),
    )
    return batch.arguments(), dict(
        sliding_window=int(rng.integers(1, 100)) if rng.random() < 0.3 else None,
        soft_cap=5.0 if rng.random() < 0.3 else None,
        threads=int(rng.integers(1, 4)),
    )


@pytest.fixture
def native_allocations():
    """A function that returns the number of allocations by native code so far."""
    _nrt_python.memsys_enable_stats()
    yield lambda: rtsys.get_allocation_stats().alloc
    _nrt_python.memsys_disable_stats()


def python_bytes(run):
    """The most bytes that Python's allocators, NumPy's included, held during a call beyond those held before."""
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        run()
        return tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()


def test_a_hundred_mixes_compile_and_allocate_nothing(native_allocations, monkeypatch):
    rng, compiled = np.random.default_rng(0), []
    mixes = [random_mix(rng) for _ in range(100)]
    outs = [np.full_like(arguments[0], np.nan) for arguments, _ in mixes]
    for threads in (1, 2, 3):
        call(threads=threads)
        call(kv_pages=KV.astype(BF16), threads=threads)
    monkeypatch.setattr(Kernel, "compile", lambda kernel, *_: compiled.append(kernel.name))
    before = native_allocations()
    with event.install_recorder("numba:compile") as recorder:
        largest = max(
            python_bytes(partial(ragged_paged_attention, *arguments, **options, out=out))
            for (arguments, options), out in zip(mixes, outs, strict=True)
        )
    assert not compiled and not recorder.buffer
    assert native_allocations() == before
    assert largest < 8 << 10, "Python's own small objects only: views, strides, the words of the call"
    assert all(np.isfinite(out.astype(np.float32)).all() for out in outs)
    call(backend="reference")
    assert native_allocations() > before and python_bytes(lambda: call()) > Q.nbytes, "the counters count"
