"""Attention over the paged cache: kernels equal definitions, definitions equal float64, and only visible keys count."""

import itertools
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from lockstep.native.kernel import interpreted
from lockstep.ops import BACKENDS
from lockstep.ops.attention import attention, attention_q8
from lockstep.ops.attention.attention import Attention
from lockstep.ops.attention.formulas import score_scales
from lockstep.ops.attention.kv_cache import KV_DTYPES, page_shapes
from lockstep.ops.rounded.attention import RoundedAttention
from lockstep.runtime.program import Program, Setting, Tensor
from tests.ops.attention import q8_target
from tests.ops.harness import ragged_step, run_op, same_bits
from tests.ops.pages import NEVER, quantize, random_cache, round_bf16, scales_of, widen
from tests.targets import compiling_for, pretending, skip_without

ROOT = pathlib.Path(__file__).parents[3]

REFERENCE, CPU, PER_TOKEN = (BACKENDS[name] for name in ("reference", "cpu", "per_token"))
MIXED = [1, 65, 7, 130, 1], [1, 65, 1027, 1090, 2050]  # new tokens and context in all, of each request
FEWER = [1, 65, 7, 3, 1], [1, 65, 130, 1090, 2050]  # for wide heads, as the definition takes seconds


class Batch:
    """Requests with random queries, keys and values, and attention over them."""

    def __init__(
        self, lengths, contexts, H, G, K, kv_dtype="f32", window=0, *, soft_cap=0.0, sinks=None, v_scale=1.0, seed=0
    ):
        rng = np.random.default_rng(seed)
        self.lengths, self.contexts, self.shape, self.kv_dtype = lengths, contexts, (H, G, K), kv_dtype
        self.window, self.soft_cap, self.v_scale = window, soft_cap, v_scale
        self.sinks = None if sinks is None else np.array(sinks, np.float32)
        self.k_pages, self.v_pages, self.table, self.keys, self.values = random_cache(contexts, G, K, kv_dtype, rng)
        self.q_TD = rng.standard_normal((sum(lengths), H * K), np.float32)
        self.gate_TW = rng.standard_normal((sum(lengths), 2 * H * K + 5), np.float32)

    def run(
        self,
        backend,
        num_threads=1,
        gated=False,
        rows=slice(None),
        lengths=None,
        contexts=None,
        requests=slice(None),
        group=0,
    ):
        """(out, stats); rows, lengths, contexts and requests choose a part of the batch. group: the page group; page
        tables of the groups before it name pages that must not be read."""
        H, G, K = self.shape
        tables = np.concatenate([np.full_like(self.table, NEVER)] * group + [self.table], axis=1)[requests]
        tables = tables.reshape(-1, self.table.shape[1])
        step, _held = ragged_step(lengths or self.lengths, contexts or self.contexts, tables)
        gate = dict(gate=self.gate_TW[rows], gate_width=self.gate_TW.shape[1], gate_offset=5 + K, gate_stride=2 * K)
        outputs = run_op(
            backend,
            Attention,
            step=step,
            num_threads=num_threads,
            q=self.q_TD[rows],
            k_pages=self.k_pages,
            v_pages=self.v_pages,
            num_heads=H,
            num_kv_heads=G,
            head_dim=K,
            scale=K**-0.5,
            window=self.window,
            soft_cap=self.soft_cap,
            page_group=group,
            sinks=self.sinks,
            v_scale=self.v_scale,
            **(gate if gated else {}),
        )
        return outputs["out"], outputs["stats"]

    def spoil(self, request, position):
        """Makes a slot's key and value NaN and infinite."""
        page, slot, bits = self.table[request, position // 64], position % 64, self.kv_dtype == "bf16"
        if self.kv_dtype == "q8":
            scales_of(self.k_pages)[page, :, slot], scales_of(self.v_pages)[page, :, slot] = 0x7FC0, 0x7F80
            return
        self.k_pages[page, :, :, slot] = 0x7FC0 if bits else np.nan
        if bits:
            self.v_pages[page, :, slot // 2, :, slot % 2] = 0x7F80
        else:
            self.v_pages[page, :, slot] = np.inf

    def shrink(self, factor):
        """Multiplies queries and values by a factor."""
        self.q_TD *= factor
        values = scales_of(self.v_pages) if self.kv_dtype == "q8" else self.v_pages
        values[...] = widen(values) * factor if self.kv_dtype == "f32" else round_bf16(widen(values) * factor)

    def exact(self):
        """In float64, without blocks."""
        (H, G, K), rows = self.shape, []
        positions = [
            (s, c - n + i) for s, (n, c) in enumerate(zip(self.lengths, self.contexts, strict=True)) for i in range(n)
        ]
        keys, values = ([x.transpose(1, 0, 2).astype(np.float64) for x in xs] for xs in (self.keys, self.values))
        for (s, p), q_GJK in zip(positions, self.q_TD.reshape(-1, G, H // G, K).astype(np.float64), strict=True):
            seen = slice(max(0, p + 1 - self.window) if self.window else 0, p + 1)
            score = q_GJK @ keys[s][:, seen].transpose(0, 2, 1) * K**-0.5
            if self.soft_cap:
                score = self.soft_cap * np.tanh(score / self.soft_cap)
            sink = np.full(H, -np.inf) if self.sinks is None else self.sinks.astype(np.float64)
            sink = sink.reshape(G, H // G, 1)
            top = np.maximum(score.max(-1, keepdims=True), sink)
            weight, rest = np.exp(score - top), np.exp(sink - top)
            rows.append(self.v_scale * (weight @ values[s][:, seen]) / (weight.sum(-1, keepdims=True) + rest))
        return np.array(rows).reshape(-1, H * K)


CASES = {
    "multi-head f32": dict(H=2, G=2, K=64),
    "GQA 2 bf16": dict(H=4, G=2, K=32, kv_dtype="bf16"),
    "GQA 4, odd width": dict(H=4, G=1, K=80),
    "GQA 7 bf16": dict(H=7, G=1, K=16, kv_dtype="bf16"),
    "GQA 16, wide": dict(H=16, G=1, K=256, kv_dtype="bf16"),
    "window 1": dict(H=2, G=1, K=16, window=1),
    "window 5 bf16": dict(H=3, G=3, K=16, window=5, kv_dtype="bf16"),
    "window 64": dict(H=2, G=1, K=48, window=64),
    "window 100, soft cap": dict(H=4, G=1, K=32, window=100, soft_cap=3.0, kv_dtype="bf16"),
    "window 1500": dict(H=2, G=1, K=16, window=1500),
    "soft cap": dict(H=2, G=2, K=32, soft_cap=30.0),
    "sinks": dict(H=4, G=2, K=32, sinks=[-2, 0, 3, 60]),
    "window 5 bf16, soft cap, sinks": dict(
        H=2, G=1, K=64, window=5, soft_cap=5.0, kv_dtype="bf16", sinks=[0.5, -1], v_scale=-0.5
    ),
    "window 100 q8, sinks": dict(H=3, G=1, K=48, window=100, kv_dtype="q8", sinks=[1, 2, -3], v_scale=0.25),
    "heads of 512": dict(H=2, G=1, K=512),
    "heads of 512 bf16": dict(H=3, G=1, K=512, kv_dtype="bf16"),
    "heads of 496 q8": dict(H=7, G=1, K=496, kv_dtype="q8"),
    "multi-head q8": dict(H=2, G=2, K=64, kv_dtype="q8"),
    "GQA 4 q8, odd width": dict(H=4, G=1, K=80, kv_dtype="q8"),
    "GQA 2 q8": dict(H=4, G=2, K=96, kv_dtype="q8"),
    "GQA 7 q8": dict(H=7, G=1, K=128, kv_dtype="q8"),
    "GQA 16 q8, wide": dict(H=16, G=1, K=256, kv_dtype="q8"),
    "window 1 q8": dict(H=2, G=1, K=16, window=1, kv_dtype="q8"),
    "window 5 q8": dict(H=3, G=3, K=16, window=5, kv_dtype="q8"),
    "window 100 q8, soft cap": dict(H=4, G=1, K=32, window=100, soft_cap=3.0, kv_dtype="q8"),
    "window 1500 q8": dict(H=2, G=1, K=48, window=1500, kv_dtype="q8"),
}


def tolerance(batch):
    """The error of rounding queries and weights (to bfloat16: 2**-9 of each) where scores and values are around 1."""
    return {"f32": 5e-6, "bf16": 0.012, "q8": 0.03}[batch.kv_dtype]


@pytest.mark.parametrize("name", CASES)
def test_kernel_equals_definition(name):
    batch = Batch(*(FEWER if CASES[name]["K"] >= 256 else MIXED), **CASES[name])
    expected = batch.run(REFERENCE)
    for num_threads in (1, 2, 5):
        for result, want in zip(batch.run(CPU, num_threads), expected, strict=True):
            same_bits(result, want)
    for result, want in zip(batch.run(PER_TOKEN, 3), expected, strict=True):
        same_bits(result, want)
    assert np.abs(expected[0] - batch.exact()).max() < tolerance(batch)


@pytest.mark.parametrize(("kv_dtype", "from_cache", "from_source"), [("bf16", 0.002, 0.0035), ("q8", 0.006, 0.012)])
def test_relative_error_from_the_cache_and_from_the_numbers_before_it(kv_dtype, from_cache, from_source):
    shape = dict(H=8, G=2, K=128)
    batch, before = Batch(*MIXED, **shape, kv_dtype=kv_dtype), Batch(*MIXED, **shape)
    same_bits(batch.q_TD, before.q_TD)
    result, rms = batch.run(CPU, 2)[0], lambda x: np.sqrt((x**2).mean())
    for exact, allowed in ((batch.exact(), from_cache), (before.exact(), from_source)):
        assert rms(result - exact) < allowed * rms(exact)


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("window", [0, 70])
@pytest.mark.parametrize("num_threads", [1, 4])
def test_chunks_give_the_same_bits_as_the_whole(window, num_threads, kv_dtype):
    batch = Batch([2060], [2060], 2, 1, 16, kv_dtype, window)
    whole = batch.run(CPU, num_threads)
    cuts = [0, 1, 2, 50, 63, 64, 65, 128, 200, 1023, 1024, 1025, 1100, 2047, 2049, 2060]
    for first, last in itertools.pairwise(cuts):
        part = batch.run(CPU, num_threads, rows=slice(first, last), lengths=[last - first], contexts=[last])
        for result, want in zip(part, whole, strict=True):
            same_bits(result, want[first:last])


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("num_threads", [2, 3, 8])
def test_long_contexts_are_cut_into_spans_and_merged_in_order(num_threads, kv_dtype):
    batch = Batch([1, 3], [5000, 3073], 2, 1, 16, kv_dtype)
    for result, want in zip(batch.run(CPU, num_threads), batch.run(CPU), strict=True):
        same_bits(result, want)


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_batch_mates_do_not_matter(kv_dtype):
    batch = Batch(*MIXED, H=4, G=2, K=32, kv_dtype=kv_dtype)
    out, start = batch.run(CPU)[0], 0
    for s, (length, context) in enumerate(zip(*MIXED, strict=True)):
        alone, _ = batch.run(
            CPU, rows=slice(start, start + length), lengths=[length], contexts=[context], requests=slice(s, s + 1)
        )
        same_bits(alone, out[start : start + length])
        start += length


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("window", [0, 70])
@pytest.mark.parametrize("spoilt", [0, 64, 80, 126, 127, 128, 190, 191, 192])
def test_what_a_query_does_not_see_cannot_reach_it(spoilt, window, kv_dtype):
    batch = Batch([180, 2], [200, 200], 3, 1, 32, kv_dtype, window)
    clean = batch.run(CPU)[0]
    batch.spoil(0, spoilt)
    out, position = batch.run(CPU)[0], np.r_[20:200, 0, 0]
    sees = (position >= spoilt) & (position < spoilt + window if window else True)
    sees[180:] = False
    same_bits(out[~sees], clean[~sees])
    assert not np.isfinite(out[sees]).all(axis=-1).any()


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("backend", [CPU, PER_TOKEN, REFERENCE], ids=["cpu", "per_token", "reference"])
def test_the_page_table_of_the_group_is_read_and_of_it_what_a_window_shows(backend, kv_dtype):
    batch = Batch([3, 1, 70], [140, 1, 265], 2, 1, 16, kv_dtype, window=70)
    expected = batch.run(backend)
    for s, (length, context) in enumerate(zip(batch.lengths, batch.contexts, strict=True)):
        batch.table[s, : max(0, context - length - 70 + 1) // 64] = NEVER
    assert (batch.table == NEVER).sum(1).tolist() == [1 + 3, 0 + 5, 1 + 1]
    for group in (0, 2):
        for result, want in zip(batch.run(backend, group=group), expected, strict=True):
            same_bits(result, want)


@pytest.mark.parametrize("kv_dtype", ["f32", "bf16"])
@pytest.mark.parametrize("query", [-5.5, -10])
def test_scores_that_nearly_overflow_are_not_below_what_is_hidden(query, kv_dtype):
    batch = Batch([1, 70], [1, 70], 2, 1, 16, kv_dtype)
    batch.q_TD[...], large = query, np.array([1e37], np.float32)
    batch.k_pages[...] = large if kv_dtype == "f32" else round_bf16(large)
    expected, result = batch.run(REFERENCE)[0], batch.run(CPU)[0]
    assert np.array_equal(result, expected, equal_nan=True) and np.isfinite(expected).all() == (query > -6)


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_gate(kv_dtype):
    batch = Batch([5, 1], [5, 70], 4, 2, 32, kv_dtype)
    for result, want in zip(batch.run(CPU, 2, gated=True), batch.run(REFERENCE, gated=True), strict=True):
        same_bits(result, want)
    gate = batch.gate_TW[:, 5:].reshape(-1, 4, 2, 32)[:, :, 1].reshape(-1, 128).astype(np.float64)
    want = batch.exact() / (1 + np.exp(-gate))
    assert np.abs(batch.run(CPU, gated=True)[0] - want).max() < tolerance(batch)


def test_a_gate_that_does_not_fit_its_rows_is_refused():
    batch = Batch([1], [1], 4, 2, 32)
    batch.gate_TW = batch.gate_TW[:, :-1]
    with pytest.raises(ValueError, match="Attention: the gate ends at column 261 of rows of 260"):
        batch.run(CPU, gated=True)


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("scale", [1e-38, 3e-39, 1e-19])
def test_denormal_products_are_the_same_bits_everywhere(scale, kv_dtype):
    """Values and scores so small that sums and products fall below the normal numbers."""
    batch = Batch(*MIXED, H=4, G=2, K=32, kv_dtype=kv_dtype)
    batch.shrink(np.float32(scale))
    expected = batch.run(REFERENCE)
    assert np.isfinite(expected[0]).all()
    for backend in (CPU, PER_TOKEN):
        for result, want in zip(batch.run(backend, 2), expected, strict=True):
            same_bits(result, want)


@pytest.mark.parametrize("lengths", [[1], [24]])
def test_pairs_of_values_are_rounded_before_they_are_flushed(lengths):
    """The first pair's sum is in [2**-126 - 2**-151, 2**-126) and so 2**-126; a CPU that flushes first gives 0."""
    batch = Batch(lengths, [40], 2, 1, 16, "bf16")
    number = lambda *values: round_bf16(np.array(values, np.float32))
    batch.q_TD[...], batch.k_pages[...], batch.v_pages[...] = 4, 0, 0
    page = batch.table[0, 0]
    batch.k_pages[page, :, :, 0] = number(-2)  # a weight of exp(-32)
    batch.v_pages[page, :, 0] = number(-(2.0**-126), 2.0**-126)
    batch.v_pages[page, :, 1] = number(2.0**-120)[0]
    expected = batch.run(REFERENCE)[0]
    for backend in (CPU, PER_TOKEN):
        same_bits(batch.run(backend, 2)[0], expected)
    num_weights = np.arange(40 - lengths[0], 40)[:, None]  # of 1, of each token
    assert (expected.astype(np.float64) * num_weights > 2.0**-119 + 2.0**-127).all()


DEFINITIONS = {"f32": attention.attend, "bf16": attention.attend_pairs, "q8": attention_q8.attend_quantized}


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("window, soft_cap", [(0, 0.0), (71, 5.0)])
def test_definition_compiled_equals_interpreted(window, soft_cap, kv_dtype):
    rng, attend = np.random.default_rng(0), DEFINITIONS[kv_dtype]
    k, v = (rng.standard_normal((1030, 4), np.float32) for _ in "kv")
    if kv_dtype == "bf16":
        k, v = widen(round_bf16(k)), widen(round_bf16(v))
    elif kv_dtype == "q8":
        k, v = (attention_q8.Quantized(codes, widen(scale)[:, 0]) for codes, scale in map(quantize, (k, v)))
    q, outs = rng.standard_normal(4, np.float32), np.empty((2, 4), np.float32)
    scales = interpreted(score_scales)(np.float32(0.5), np.float32(soft_cap))
    position = 1026 if window else 130
    results = []
    for form, out in zip((lambda f: f, interpreted), outs, strict=True):
        top, total = form(attend)(q, k, v, position, window, scales, out)
        form(attention.finished)(out, np.float32(top), np.float32(total), np.array([1.5], np.float32), np.float32(0.7))
        results.append(np.array([top, total], np.float32))
    same_bits(outs[0], outs[1])
    same_bits(*results)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (dict(H=98), "expected num_heads <= 96 [*] num_kv_heads, got num_heads 98, num_kv_heads 1"),
        (dict(K=528), "expected head_dim <= 512, got head_dim 528"),
        (dict(sinks=[1.0, 2.0]), r"sinks \(sinks\) is 2 wide, expected 4"),
    ],
)
def test_what_a_kernel_could_not_hold_is_refused(changed, message):
    with pytest.raises(ValueError, match=f"Attention: {message}"):
        Batch([1], [1], **(dict(H=4, G=1, K=16) | changed)).run(CPU)


@pytest.mark.parametrize("window", [0, 8])
def test_a_token_may_not_see_more_than_its_pages_are_kept_for(window):
    program, sizes = Program(), dict(num_heads=2, num_kv_heads=1, head_dim=16, scale=0.25, soft_cap=0.0)
    q, out = (Tensor(name, "T", 32) for name in ("q", "out"))
    shapes = zip("kv", page_shapes(1, 16, "f32"), strict=True)
    pages = {f"{p}_pages": program.cache(p, "pages", "f32", shape, 7) for p, shape in shapes}
    operands = dict(out=out, stats=Tensor("stats", "T", 4), q=q, **pages, **sizes)
    Attention(**operands, window=7)
    with pytest.raises(ValueError, match=f"Attention: window is {window}, but k is kept for 7 tokens"):
        Attention(**operands, window=window)
    rounded = dict(max_keys=64, scale=0.25, additive=False, fill=0.0, grids=Setting("g", np.zeros((10, 8), np.float32)))
    sizes = dict(num_heads=2, num_kv_heads=1, head_dim=16)
    with pytest.raises(ValueError, match="RoundedAttention: k is kept for a window of 7 tokens, expected no window"):
        RoundedAttention(out=out, q=q, **pages, **sizes, **rounded)


@pytest.mark.parametrize("variant, cpu", [("native", "haswell"), ("avx_vnni", ""), ("generic", "")])
def test_8_bit_attention_gives_the_same_bits_for_another_target(variant, cpu, tmp_path):
    if variant == "generic" and not os.environ.get("LOCKSTEP_ALL_TARGETS"):
        pytest.skip("dots without an instruction are tested in linear layers: make test-targets runs this test, too")
    skip_without(*(("avx512vl", "avx512_vnni") if variant == "avx_vnni" else ()))
    printed = subprocess.run(
        [sys.executable, "-m", "tests.ops.attention.q8_target", variant],
        cwd=ROOT,
        text=True,
        check=True,
        env=compiling_for(cpu) if cpu else pretending(tmp_path),
        capture_output=True,
    )
    assert printed.stdout.split() == q8_target.digests()


@pytest.mark.parametrize("kv_dtype", ["bf16", "q8"])
@pytest.mark.parametrize(("lengths", "contexts"), [([1, 1], [70, 1030]), ([150], [150])])
def test_many_threads_have_heads_and_tiles_of_their_own(kv_dtype, lengths, contexts):
    batch = Batch(lengths, contexts, 8, 2, 32, kv_dtype, window=60)
    one = batch.run(CPU)
    for mine, other in zip(batch.run(CPU, num_threads=24), one, strict=True):
        same_bits(mine, other)
    same_bits(batch.run(REFERENCE)[0], one[0])
