"""Speed of ragged paged attention on the head shape of Llama 3 8B, against padded, ungrouped and transposed variants.

    python bench/bench_ragged.py [--threads 2] [--rounds 5] [--dtype f32] [--mix mixed] [--contexts 4096,16384,65536]

--dtype: the type of the pages, f32, bf16 or e4m3 (float8).

The mixes of lengths are those that JAX's own tests publish. Variants, on the same kernel and the same numbers:

    ragged        one call on the batch as it is
    padded        every sequence padded to the longest q and the longest kv, as one batch of equal shapes
    ungrouped     each query head reads K and V for itself
    transposed    q and the sequences' K and V copied to [heads, tokens, head_dim], attended, copied back

All variants run interleaved in one process; medians of the rounds. A multiply-add counts as two operations, only
visible keys count; "% done" also counts operations on padding. The copies of "transposed" are NumPy's, on one thread.
The ceilings are measured in the same run (`lockstep.lab.ceiling`).
"""

import statistics
import time
from dataclasses import dataclass

import ml_dtypes
import numpy as np
from options import Parser, several, whole_number

from lockstep.lab import ceiling
from lockstep.ops import ragged_paged_attention
from lockstep.ops.attention.ragged import scoring_of, workers
from lockstep.ops.attention.ragged_attention import Sequences
from lockstep.ops.attention.ragged_checks import MAX_PAGE_SIZE, pages
from lockstep.runtime.executor import aligned

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
KV = [18, 129, 597, 122, 64, 322, 463, 181, 1107, 123, 31, 18, 1229, 229, 87, 1328]
MIXES = {
    "mixed": [5, 1, 120, 1, 1, 32, 251, 1, 1, 99, 1, 5, 3, 117, 1, 1],
    "prefill": [5, 15, 120, 100, 21, 32, 251, 40, 64, 99, 10, 5, 3, 120, 9, 2],
    "decode": [1] * 16,
}
BF16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = {"f32": np.dtype(np.float32), "bf16": BF16, "e4m3": np.dtype(ml_dtypes.float8_e4m3fn)}  # of pages
SM_SCALE = HEAD_DIM**-0.5


@dataclass
class Batch:
    """The arguments of one call, and where its result goes."""

    q: np.ndarray
    kv: np.ndarray
    kv_lens: np.ndarray
    table: np.ndarray
    starts: np.ndarray
    num_seqs: np.ndarray
    out: np.ndarray

    @property
    def operations(self):
        return 4 * HEADS * HEAD_DIM * visible(np.diff(self.starts), self.kv_lens)

    @property
    def bytes_read(self):
        return 2 * KV_HEADS * HEAD_DIM * self.kv.itemsize * int(self.kv_lens.sum())


def visible(q_lens, kv_lens):
    """The number of pairs of a query and a key that the query sees."""
    return sum(int(n) * int(c) - int(n) * (int(n) - 1) // 2 for n, c in zip(q_lens, kv_lens, strict=True))


def numbers(shape, dtype, seed):
    """An array of random numbers that begins on a cache line."""
    array = aligned(int(np.prod(shape)) * dtype.itemsize).view(dtype).reshape(shape)
    rng = np.random.default_rng(seed)
    for part in array:
        part[...] = rng.standard_normal(part.shape, np.float32)
    return array


def batch(q_lens, kv_lens, dtype, page_size):
    """A Batch with pages in a random order. dtype: of the pages; where it has one byte, queries are bfloat16."""
    num_pages = [-(-c // page_size) for c in kv_lens]
    order = np.random.default_rng(2).permutation(sum(num_pages))
    table = np.zeros((len(num_pages), max(num_pages)), np.int32)
    for s, num in enumerate(num_pages):
        table[s, :num] = order[sum(num_pages[:s]) : sum(num_pages[: s + 1])]
    q = numbers((sum(q_lens), HEADS, HEAD_DIM), dtype if dtype.itemsize > 1 else BF16, 0)
    kv = numbers((sum(num_pages), page_size, 2 * KV_HEADS, HEAD_DIM), dtype, 1)
    starts = np.concatenate([[0], np.cumsum(q_lens)]).astype(np.int32)
    return Batch(q, kv, np.array(kv_lens, np.int32), table, starts, np.array([len(q_lens)], np.int32), np.empty_like(q))


def ragged(b, threads):
    ragged_paged_attention(
        b.q, b.kv, b.kv_lens, b.table, b.starts, b.num_seqs, sm_scale=SM_SCALE, out=b.out, threads=threads
    )


def ungrouped(b, threads):
    k, v = pages(b.kv)
    sequences = Sequences(b.kv_lens, b.table, b.starts, b.num_seqs)
    workers(threads).attend(b.q, k, v, sequences, scoring_of(SM_SCALE), b.out, grouped=False)


def transposed(b, threads):
    """Copies q, K and V with heads outermost, attends over the copies, and copies the result back."""
    page_size, k_and_v = b.kv.shape[1], pages(b.kv)
    num_pages = -(-b.kv_lens // page_size)
    used = np.concatenate([b.table[s, :num] for s, num in enumerate(num_pages)])
    table = np.zeros_like(b.table)
    for s, num in enumerate(num_pages):
        table[s, :num] = np.arange(num_pages[:s].sum(), num_pages[: s + 1].sum())
    copies = [np.ascontiguousarray(x[used].reshape(-1, KV_HEADS, HEAD_DIM).transpose(1, 0, 2)) for x in k_and_v]
    k, v = (x.reshape(KV_HEADS, len(used), page_size, HEAD_DIM).transpose(1, 2, 0, 3) for x in copies)
    q_HTK = np.ascontiguousarray(b.q.transpose(1, 0, 2))
    out_HTK = np.empty_like(q_HTK)
    ragged_paged_attention(
        q_HTK.transpose(1, 0, 2),
        (k, v),
        b.kv_lens,
        table,
        b.starts,
        b.num_seqs,
        sm_scale=SM_SCALE,
        out=out_HTK.transpose(1, 0, 2),
        threads=threads,
    )
    b.out[...] = out_HTK.transpose(1, 0, 2)


def seconds(run, *args):
    started = time.perf_counter()
    run(*args)
    return time.perf_counter() - started


def make_cases(args):
    """{name: (variant, its batch, the batch without padding)}, in the order in which they are shown."""
    cases = {}
    for dtype in args.dtype or ("f32", "bf16"):
        for mix in args.mix or MIXES:
            whole = batch(MIXES[mix], KV, DTYPES[dtype], args.page_size)
            padded = batch([max(MIXES[mix])] * len(KV), [max(KV)] * len(KV), DTYPES[dtype], args.page_size)
            for name, run, b in (
                ("ragged", ragged, whole),
                ("padded", ragged, padded),
                ("ungrouped", ungrouped, whole),
                ("transposed", transposed, whole),
            ):
                cases[dtype, mix, name] = run, b, whole
        for context in args.contexts:
            decode = batch([1], [context], DTYPES[dtype], args.page_size)
            for name, run in (("ragged", ragged), ("ungrouped", ungrouped)):
                cases[dtype, f"decode {context}", name] = run, decode, decode
    return cases


def main():
    parser = Parser(__doc__)
    parser.add_threads()
    parser.add_counts(rounds=5)
    parser.add_argument("--page-size", type=whole_number(1, MAX_PAGE_SIZE), default=16)
    parser.add_argument("--dtype", choices=DTYPES, action="append")
    parser.add_argument("--mix", choices=MIXES, action="append")
    parser.add_argument("--contexts", type=several(whole_number(), or_none=True), default="4096,16384,65536")
    args = parser.parse_args()
    cases, team, ceilings = make_cases(args), workers(args.threads).team, []
    times = {name: [] for name in cases}
    for _ in range(args.rounds + 1):  # the first warms up
        ceilings.append(ceiling.measure(team))
        for name, (run, b, _whole) in cases.items():
            times[name].append(seconds(run, b, args.threads))
    show(
        cases,
        {name: statistics.median(t[1:]) for name, t in times.items()},
        statistics.median(t.f32_per_second for t in ceilings),
        statistics.median(t.bytes_per_second for t in ceilings),
        args,
    )


def show(cases, seconds_of, f32_ceiling, read_ceiling, args):
    print(
        f"{args.threads} threads, {f32_ceiling / 1e9:.0f} GFLOP/s, {read_ceiling / 1e9:.1f} GB/s; {HEADS} query heads, "
        f"{KV_HEADS} kv heads, head_dim {HEAD_DIM}, pages of {args.page_size}"
    )
    for name, (_, b, whole) in cases.items():
        took = seconds_of[name]
        useful, done, read = whole.operations / took, b.operations / took, whole.bytes_read / took
        ratio = took / seconds_of[*name[:2], "ragged"]
        print(
            f"{' '.join(name):32} {1e3 * took:9.3f} ms {ratio:6.2f}x {useful / 1e9:7.1f} GFLOP/s = "
            f"{100 * useful / f32_ceiling:5.1f} % ({100 * done / f32_ceiling:5.1f} % done) {read / 1e9:6.1f} GB/s ="
            f" {100 * read / read_ceiling:5.1f} %"
        )


if __name__ == "__main__":
    main()
