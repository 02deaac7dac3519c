"""Ragged paged attention on the head shape of Llama 3 8B: against the padded formulation, heads apart, and transposed.

    python bench/bench_ragged.py [--threads 2] [--rounds 5] [--dtype f32] [--mix mixed] [--contexts 4096,16384,65536]

--dtype: of the pages, f32, bf16 or e4m3 (float8).

The mixes of lengths are those that JAX's own tests publish. Variants, on the same kernel and the same numbers:

    ragged        one call on the batch as it is
    padded        every sequence padded to the longest q and the longest kv, as one batch of equal shapes
    ungrouped     each query head reads K and V for itself
    transposed    q and the sequences' K and V copied to [heads, tokens, head_dim], attended, copied back

All run interleaved in one process; medians of the rounds. A multiply-add counts as two operations, only visible keys
count; "% done" also counts what padding adds. The copies of "transposed" are NumPy's, on one thread. The ceilings are
measured in the same run (`lockstep.lab.ceiling`).
"""

import argparse
import statistics
import time
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from lockstep.lab import ceiling
from lockstep.ops import ragged_paged_attention
from lockstep.ops.attention.ragged import scoring_of, workers
from lockstep.ops.attention.ragged_attention import Sequences
from lockstep.ops.attention.ragged_checks import pages
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
    """Pairs of a query and a key that it sees."""
    return sum(int(n) * int(c) - int(n) * (int(n) - 1) // 2 for n, c in zip(q_lens, kv_lens, strict=True))


def numbers(shape, dtype, seed):
    """Random numbers on a cache line."""
    made = aligned(int(np.prod(shape)) * dtype.itemsize).view(dtype).reshape(shape)
    rng = np.random.default_rng(seed)
    for part in made:
        part[...] = rng.standard_normal(part.shape, np.float32)
    return made


def batch(q_lens, kv_lens, dtype, page_size):
    """Sequences on pages in a random order. dtype: of the pages; where it has one byte, queries are bfloat16."""
    counts = [-(-c // page_size) for c in kv_lens]
    order, table = np.random.default_rng(2).permutation(sum(counts)), np.zeros((len(counts), max(counts)), np.int32)
    for s, count in enumerate(counts):
        table[s, :count] = order[sum(counts[:s]) : sum(counts[: s + 1])]
    q = numbers((sum(q_lens), HEADS, HEAD_DIM), dtype if dtype.itemsize > 1 else BF16, 0)
    kv = numbers((sum(counts), page_size, 2 * KV_HEADS, HEAD_DIM), dtype, 1)
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
    """Copies of q, K and V with heads outermost; attention reads those, and its result is copied back."""
    page_size, kinds = b.kv.shape[1], pages(b.kv)
    counts = -(-b.kv_lens // page_size)
    kept = np.concatenate([b.table[s, :count] for s, count in enumerate(counts)])
    table = np.zeros_like(b.table)
    for s, count in enumerate(counts):
        table[s, :count] = np.arange(counts[:s].sum(), counts[: s + 1].sum())
    copies = [np.ascontiguousarray(x[kept].reshape(-1, KV_HEADS, HEAD_DIM).transpose(1, 0, 2)) for x in kinds]
    k, v = (x.reshape(KV_HEADS, len(kept), page_size, HEAD_DIM).transpose(1, 2, 0, 3) for x in copies)
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


def cases(args):
    """{name: (variant, batch, operations that count)}, in the order in which they are shown."""
    made = {}
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
                made[dtype, mix, name] = run, b, whole
        for context in args.contexts:
            one = batch([1], [context], DTYPES[dtype], args.page_size)
            for name, run in (("ragged", ragged), ("ungrouped", ungrouped)):
                made[dtype, f"decode {context}", name] = run, one, one
    return made


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--page-size", type=int, default=16)
    parser.add_argument("--dtype", choices=DTYPES, action="append")
    parser.add_argument("--mix", choices=MIXES, action="append")
    parser.add_argument("--contexts", type=lambda s: [int(n) for n in s.split(",") if n], default=[4096, 16384, 65536])
    args = parser.parse_args()
    made, team, tops = cases(args), workers(args.threads).team, []
    times = {name: [] for name in made}
    for _ in range(args.rounds + 1):
        tops.append(ceiling.measure(team))
        for name, (run, b, _whole) in made.items():
            times[name].append(seconds(run, b, args.threads))
    show(
        made,
        {name: statistics.median(t[1:]) for name, t in times.items()},
        statistics.median(t.f32_per_second for t in tops),
        statistics.median(t.bytes_per_second for t in tops),
        args,
    )


def show(made, took, f32_top, read_top, args):
    print(
        f"{args.threads} threads, {f32_top / 1e9:.0f} GFLOP/s, {read_top / 1e9:.1f} GB/s; {HEADS} query heads, "
        f"{KV_HEADS} kv heads, head_dim {HEAD_DIM}, pages of {args.page_size}"
    )
    for name, (_, b, whole) in made.items():
        useful, done, read = whole.operations / took[name], b.operations / took[name], whole.bytes_read / took[name]
        ratio = took[name] / took[*name[:2], "ragged"]
        print(
            f"{' '.join(name):32} {1e3 * took[name]:9.3f} ms {ratio:6.2f}x {useful / 1e9:7.1f} GFLOP/s = "
            f"{100 * useful / f32_top:5.1f} % ({100 * done / f32_top:5.1f} % done) {read / 1e9:6.1f} GB/s ="
            f" {100 * read / read_top:5.1f} %"
        )


if __name__ == "__main__":
    main()
