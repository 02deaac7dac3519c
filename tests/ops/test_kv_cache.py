import numpy as np
import pytest

from lockstep.ops import kv_cache, kv_cache_cpu
from lockstep.ops.rope import rope_table
from lockstep.runtime.kernel import interpreted
from tests.ops.harness import ragged_step, run_op, same_bits, weight
from tests.ops.pages import by_row, in_pairs, on_cache_line, page_table, round_bf16, widen

LENGTHS, CONTEXTS = [1, 30, 66, 2], [65, 30, 130, 64]
SHAPES = {"plain": (4, 2, 32, 32, False), "normed": (4, 2, 32, 32, True), "partial, normed": (8, 2, 64, 16, True),
          "odd rotation, normed": (3, 3, 80, 40, True), "no rotation": (7, 1, 16, 0, False),
          "wide, no rotation, normed": (2, 1, 256, 0, True)}  # H, G, K, rope_dim, normed
GAP = 3  # columns between the parts of a row


class Inputs:
    """A projection of random numbers, its q and gate interleaved by head, and empty pages."""

    def __init__(self, H, G, K, rope_dim, normed, bf16):
        rng = np.random.default_rng(0)
        self.shape, self.rope_dim, self.normed, self.bf16 = (H, G, K), rope_dim, normed, bf16
        self.k_offset, self.v_offset = GAP + 2 * H * K, 2 * GAP + 2 * H * K + G * K
        self.x = rng.standard_normal((sum(LENGTHS), self.v_offset + G * K + GAP), np.float32)
        self.norms = [rng.standard_normal(K, np.float32) for _ in "qk"]
        self.tables = rope_table(200, rope_dim or 16, 1e4)
        self.table, self.num_pages = page_table(CONTEXTS, rng)
        self.step, self.held = ragged_step(LENGTHS, CONTEXTS, self.table)

    def run(self, backend, num_threads=1):
        """(q, k pages, v pages) of one run."""
        H, G, K = self.shape
        dtype = np.dtype(np.uint16 if self.bf16 else np.uint32)
        pages = [np.full((self.num_pages, G, *cell), np.iinfo(dtype).max, dtype) for cell in ((K, 64), (64, K))]
        pages = [on_cache_line(in_pairs(p) if self.bf16 else p) for p in pages]
        norms = [weight(n, name) for n, name in zip(self.norms, ("q_norm", "k_norm"))] if self.normed else []
        extra = dict(eps=1e-6, norm_offset=1.0) if self.normed else {}
        q = run_op(backend["normed_attention_inputs" if self.normed else "attention_inputs"],
                   {"q": ("T", H * K, "f32")},
                   [self.x, weight(self.tables[0], "cos"), weight(self.tables[1], "sin"),
                    *(("cache", p) for p in pages), *norms],
                   step=self.step, num_threads=num_threads, num_heads=H, num_kv_heads=G, head_dim=K,
                   rope_dim=self.rope_dim, row_width=self.x.shape[1], q_offset=GAP, q_stride=2 * K,
                   k_offset=self.k_offset, v_offset=self.v_offset, kv_bf16=int(self.bf16), **extra)["q"]
        return q, *(by_row(p) for p in pages)

    def exact(self, heads_THK, norm):
        """Norm and rotation in float64."""
        x = heads_THK.astype(np.float64)
        if self.normed:
            x = x / np.sqrt((x ** 2).mean(-1, keepdims=True) + 1e-6) * (norm + 1.0)
        half, out = self.rope_dim // 2, x.copy()
        position = np.concatenate([np.arange(c - n, c) for n, c in zip(LENGTHS, CONTEXTS)])
        cos, sin = (t[position][:, None, :half].astype(np.float64) for t in self.tables)
        low, high = x[..., :half], x[..., half:2 * half]
        out[..., :half], out[..., half:2 * half] = low * cos - high * sin, high * cos + low * sin
        return out


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("name", SHAPES)
def test_kernel_equals_definition(name, bf16):
    inputs = Inputs(*SHAPES[name], bf16)
    expected = inputs.run(kv_cache.REFERENCE)
    for num_threads in (1, 3):
        for made, want in zip(inputs.run(kv_cache_cpu.CPU, num_threads), expected):
            same_bits(made, want)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("name", SHAPES)
def test_queries_keys_and_values_are_right_and_in_place(name, bf16):
    inputs = Inputs(*SHAPES[name], bf16)
    (H, G, K), T = inputs.shape, sum(LENGTHS)
    q, k_pages, v_pages = inputs.run(kv_cache_cpu.CPU, 2)
    heads = lambda offset, num, stride: np.stack([inputs.x[:, offset + h * stride:][:, :K] for h in range(num)], axis=1)
    assert np.abs(q.reshape(T, H, K) - inputs.exact(heads(GAP, H, 2 * K), inputs.norms[0])).max() < 3e-6
    k, v = inputs.exact(heads(inputs.k_offset, G, K), inputs.norms[1]), heads(inputs.v_offset, G, K)
    written, t = np.zeros((inputs.num_pages, 64), bool), 0
    for s, (n, c) in enumerate(zip(LENGTHS, CONTEXTS)):
        for position in range(c - n, c):
            page, slot = inputs.table[s, position // 64], position % 64
            written[page, slot] = True
            if bf16:
                same_bits(v_pages[page, :, slot], round_bf16(v[t]))
                assert np.abs(widen(k_pages[page, :, :, slot]) - k[t]).max() <= np.abs(k[t]).max() / 256 + 3e-6
            else:
                same_bits(v_pages[page, :, slot].view(np.float32), v[t])
                assert np.abs(k_pages[page, :, :, slot].view(np.float32) - k[t]).max() < 3e-6
            t += 1
    untouched = np.iinfo(k_pages.dtype).max
    assert (k_pages.transpose(0, 3, 1, 2)[~written] == untouched).all()
    assert (v_pages.transpose(0, 2, 1, 3)[~written] == untouched).all()


def test_definition_compiled_equals_interpreted():
    x, norm = (np.random.default_rng(0).standard_normal(s, np.float32) for s in ((2, 16), 16))
    cos, sin = (t[5] for t in rope_table(6, 8, 1e4))
    outs = [f(x.copy(), norm, np.float32(1e-6), np.float32(1), cos, sin)
            for f in (kv_cache.prepared, interpreted(kv_cache.prepared))]
    same_bits(*outs)
