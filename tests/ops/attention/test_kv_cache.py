"""The op that prepares queries, keys and values: kernels equal definitions, and what is written where in the pages."""

import numpy as np
import pytest

from lockstep.native.kernel import interpreted
from lockstep.ops import BACKENDS
from lockstep.ops.attention import kv_cache, kv_cache_q8
from lockstep.ops.attention.kv_cache import KV_DTYPES, AttentionInputs, AttentionQueries, page_shapes
from lockstep.ops.elementwise.rms_norm import RmsNorm
from lockstep.runtime.program import CacheArray, Table, Tensor
from tests.ops.attention.test_rope import complete_tables
from tests.ops.harness import ragged_step, run_op, same_bits, weight
from tests.ops.pages import NEVER, by_row, in_fours, in_pairs, on_cache_line, page_table, quantize, round_bf16, widen

LENGTHS, CONTEXTS = [1, 30, 66, 2], [65, 30, 130, 64]
SHAPES = {
    "plain, queries with tables of their own": (4, 2, 32, 32, False),
    "normed": (4, 2, 32, 32, True),
    "partial, normed": (8, 2, 64, 16, True),
    "odd rotation, normed": (3, 3, 80, 40, True),
    "no rotation": (7, 1, 16, 0, False),
    "widest, normed": (2, 1, 512, 256, True),
    "values normed, too": (4, 2, 48, 48, True, True),
    "values are the keys, normed": (2, 1, 512, 512, True, True, True),
    "all heads normed at once": (6, 3, 48, 48, "whole"),
    "few heads normed at once": (2, 2, 32, 8, "whole"),
}  # H, G, K, rope_dim, normed, whether values are normed, whether they are the keys before norm and rotation
UNTOUCHED = 0xFF  # every byte of a page before a run: no number that the op writes has it
GAP = 3  # columns between the parts of a row


def codes_and_scales(pages, K, cell):
    """q8 pages as codes [N, G, *cell] and scales uint16 [N, G, 64]."""
    rows, width = cell
    codes = pages[..., : 64 * K].reshape(*pages.shape[:2], rows // 4, width, 4)
    return by_row(codes, 4), pages[..., 64 * K :].view(np.uint16)


class Inputs:
    """A projection of random numbers, with q and gate interleaved by head (unless all heads are normed at once), and
    empty pages."""

    def __init__(self, H, G, K, rope_dim, normed, *flags, kv_dtype, group=0):
        self.norms_values, are_keys = (*flags, False, False)[:2]
        rng = np.random.default_rng(0)
        self.shape, self.rope_dim, self.normed, self.kv_dtype = (H, G, K), rope_dim, normed, kv_dtype
        self.whole = normed == "whole"
        self.q_stride = K if self.whole else 2 * K
        self.k_offset = GAP + H * self.q_stride
        self.v_offset = self.k_offset + GAP + G * K
        self.x = rng.standard_normal((sum(LENGTHS), self.v_offset + G * K + GAP), np.float32)
        self.v_offset = self.k_offset if are_keys else self.v_offset
        self.norms = [rng.standard_normal((n if self.whole else 1) * K, np.float32) for n in (H, G)]
        self.tables = complete_tables(200, rope_dim or 16, 1e4)
        grows = rope_dim == K and not normed
        self.q_tables = [t * rng.uniform(1, 2, (200, 1)).astype(np.float32) if grows else None for t in self.tables]
        self.table, self.num_pages = page_table(CONTEXTS, rng)
        tables = np.concatenate([np.full_like(self.table, NEVER)] * group + [self.table], axis=1)
        self.group = group
        self.step, self.held = ragged_step(LENGTHS, CONTEXTS, tables.reshape(-1, self.table.shape[1]))

    def run(self, backend, num_threads=1):
        """(q, K pages, V pages) of one run; q8 pages as codes and scales."""
        H, G, K = self.shape
        dtype = {"f32": np.float32, "bf16": np.uint16, "q8": np.int8}[self.kv_dtype]
        pages = [np.zeros((self.num_pages, G, *cell), dtype) for cell in ((K, 64), (64, K))]
        for page in pages:
            page.view(np.uint8)[...] = UNTOUCHED
        scales = np.full((self.num_pages, G, 64), 0xFFFF, np.uint16)
        kept = {"f32": lambda p: p, "bf16": in_pairs, "q8": lambda p: in_fours(p, scales)}[self.kv_dtype]
        pages = [on_cache_line(kept(p)) for p in pages]
        q = run_op(
            backend,
            AttentionInputs,
            step=self.step,
            num_threads=num_threads,
            x=self.x,
            cos=self.tables[0],
            sin=self.tables[1],
            q_cos=self.q_tables[0],
            q_sin=self.q_tables[1],
            k_pages=pages[0],
            v_pages=pages[1],
            q_norm=self.norms[0] if self.normed else None,
            k_norm=self.norms[1] if self.normed else None,
            num_heads=H,
            num_kv_heads=G,
            head_dim=K,
            rope_dim=self.rope_dim,
            row_width=self.x.shape[1],
            q_offset=GAP,
            q_stride=self.q_stride,
            k_offset=self.k_offset,
            v_offset=self.v_offset,
            eps=1e-6,
            norm_offset=1.0,
            bf16=self.kv_dtype == "bf16",
            page_group=self.group,
            norms_values=self.norms_values,
            whole_norms=self.whole,
        )["q"]
        if self.kv_dtype == "q8":
            return q, *codes_and_scales(pages[0], K, (K, 64)), *codes_and_scales(pages[1], K, (64, K))
        return q, *(by_row(p) for p in pages)

    def exact(self, heads_THK, norm, are_queries=False):
        """Norm and rotation in float64."""
        x = heads_THK.astype(np.float64)
        if self.normed:
            axes = (1, 2) if self.whole else 2
            weight = norm.reshape(-1, x.shape[-1]) + 1.0
            x = x / np.sqrt((x**2).mean(axes, keepdims=True) + 1e-6) * weight
        half, out = self.rope_dim // 2, x.copy()
        position = np.concatenate([np.arange(c - n, c) for n, c in zip(LENGTHS, CONTEXTS, strict=True)])
        tables = self.q_tables if are_queries and self.q_tables[0] is not None else self.tables
        cos, sin = (t[position][:, None, :half].astype(np.float64) for t in tables)
        low, high = x[..., :half], x[..., half : 2 * half]
        out[..., :half], out[..., half : 2 * half] = low * cos - high * sin, high * cos + low * sin
        return out


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("name", SHAPES)
def test_kernel_equals_definition(name, kv_dtype):
    inputs = Inputs(*SHAPES[name], kv_dtype=kv_dtype)
    expected = inputs.run(BACKENDS["reference"])
    for num_threads in (1, 3):
        for result, want in zip(inputs.run(BACKENDS["cpu"], num_threads), expected, strict=True):
            same_bits(result, want)


@pytest.mark.parametrize("kv_dtype", ["f32", "bf16"])
@pytest.mark.parametrize("name", SHAPES)
def test_queries_keys_and_values_are_right_and_in_place(name, kv_dtype):
    inputs = Inputs(*SHAPES[name], kv_dtype=kv_dtype)
    (H, G, K), T = inputs.shape, sum(LENGTHS)
    q, k_pages, v_pages = inputs.run(BACKENDS["cpu"], 2)
    heads = lambda offset, num, stride: np.stack(
        [inputs.x[:, offset + h * stride :][:, :K] for h in range(num)], axis=1
    )
    assert np.abs(q.reshape(T, H, K) - inputs.exact(heads(GAP, H, inputs.q_stride), inputs.norms[0], True)).max() < 3e-6
    k, v = inputs.exact(heads(inputs.k_offset, G, K), inputs.norms[1]), heads(inputs.v_offset, G, K)
    if inputs.norms_values:
        # the bits of a norm whose weights are 1
        rows = np.ascontiguousarray(v.reshape(-1, K))
        operands = dict(x=rows, weight=np.ones(K), width=K, eps=1e-6, offset=0.0)
        v = run_op(BACKENDS["reference"], RmsNorm, **operands, out=(K, "f32"))["out"].reshape(T, G, K)
    written, t = np.zeros((inputs.num_pages, 64), bool), 0
    for s, (n, c) in enumerate(zip(LENGTHS, CONTEXTS, strict=True)):
        for position in range(c - n, c):
            page, slot = inputs.table[s, position // 64], position % 64
            written[page, slot] = True
            if kv_dtype == "bf16":
                same_bits(v_pages[page, :, slot], round_bf16(v[t]))
                assert np.abs(widen(k_pages[page, :, :, slot]) - k[t]).max() <= np.abs(k[t]).max() / 256 + 3e-6
            else:
                same_bits(v_pages[page, :, slot], v[t])
                assert np.abs(k_pages[page, :, :, slot] - k[t]).max() < 3e-6
            t += 1
    assert (k_pages.transpose(0, 3, 1, 2)[~written].view(np.uint8) == UNTOUCHED).all()
    assert (v_pages.transpose(0, 2, 1, 3)[~written].view(np.uint8) == UNTOUCHED).all()


@pytest.mark.parametrize("name", SHAPES)
def test_keys_and_values_in_8_bits_are_right_and_in_place(name):
    """Codes and scales are those that NumPy makes of the keys and values of a float32 cache; other slots stay."""
    found = Inputs(*SHAPES[name], kv_dtype="q8").run(BACKENDS["cpu"], 2)[1:]
    plain = Inputs(*SHAPES[name], kv_dtype="f32")
    exact = plain.run(BACKENDS["cpu"], 2)[1:]
    written = np.zeros((plain.num_pages, 64), bool)
    for s, (n, c) in enumerate(zip(LENGTHS, CONTEXTS, strict=True)):
        for position in range(c - n, c):
            written[plain.table[s, position // 64], position % 64] = True
    for pages, codes, scales, slots in ((exact[0], *found[:2], 3), (exact[1], *found[2:], 2)):
        by_slot = lambda x, slots=slots: np.moveaxis(x, slots, 1)[written]  # [slot, G, K]
        same_bits(by_slot(codes), quantize(by_slot(pages))[0])
        same_bits(scales.transpose(0, 2, 1)[written], quantize(by_slot(pages))[1][..., 0])
        error = np.abs(by_slot(codes) * widen(scales).transpose(0, 2, 1)[written][..., None] - by_slot(pages))
        assert (error <= np.abs(by_slot(pages)).max(-1, keepdims=True) / 254 * (1 + 2**-8)).all()
        assert (np.moveaxis(codes, slots, 1)[~written] == -1).all()
        assert (scales.transpose(0, 2, 1)[~written] == 0xFFFF).all()


@pytest.mark.parametrize(
    "x",
    [
        np.zeros(16),
        np.full(16, 1e-31),
        np.full(16, 1e-38),
        np.r_[3.0, np.zeros(15)],
        np.full(16, 3e38),
        np.r_[-1e-30, np.full(15, 1.7e-31)],
        np.linspace(-254, 254, 16),
    ],
)
def test_heads_of_extreme_size_are_quantized_as_numpy_does(x):
    x, codes = x.astype(np.float32), np.full((2, 16), 99, np.int8)
    scales = [
        f(x, c) for f, c in zip((kv_cache_q8.quantize_head, interpreted(kv_cache_q8.quantize_head)), codes, strict=True)
    ]
    with np.errstate(divide="ignore", invalid="ignore"):
        want, scale = quantize(x) if np.abs(x).max() >= 1e-30 else (np.zeros(16, np.int8), np.zeros(1, np.uint16))
    same_bits(codes[0], want)
    same_bits(codes[1], want)
    assert [float(s) for s in scales] == [float(widen(scale)[0])] * 2 and codes.min() >= -127


def test_definition_compiled_equals_interpreted():
    x, norm = (np.random.default_rng(0).standard_normal(s, np.float32) for s in ((2, 16), 16))
    cos, sin = (t[5] for t in complete_tables(6, 8, 1e4))
    outs = [
        f(x.copy(), norm, np.float32(1e-6), np.float32(1), cos, sin)
        for f in (kv_cache.prepared, interpreted(kv_cache.prepared))
    ]
    same_bits(*outs)


@pytest.mark.parametrize("backend, num_threads", [("reference", 1), ("cpu", 1), ("cpu", 3), ("per_token", 2)])
@pytest.mark.parametrize(
    "name", [name for name, shape in SHAPES.items() if "whole" not in shape and "tables" not in name]
)
def test_queries_alone_are_those_of_the_whole_op(name, backend, num_threads):
    """The projection of a layer that reads another's keys has queries only, side by side."""
    inputs = Inputs(*SHAPES[name], kv_dtype="f32")
    H, _, K = inputs.shape
    x = np.concatenate([inputs.x[:, GAP + 2 * K * h :][:, :K] for h in range(H)], axis=1)
    sizes = dict(num_heads=H, head_dim=K, rope_dim=inputs.rope_dim, row_width=H * K, eps=1e-6, norm_offset=1.0)
    tables = dict(cos=inputs.tables[0], sin=inputs.tables[1], q_norm=inputs.norms[0] if inputs.normed else None)
    operands = dict(x=x, **tables, **sizes)
    found = run_op(BACKENDS[backend], AttentionQueries, step=inputs.step, num_threads=num_threads, **operands)["q"]
    same_bits(found, inputs.run(BACKENDS["reference"])[0])


def declared(**changed):
    """An op on a projection of 2 query heads and 1 kv head, with some operands changed."""
    part = lambda name, width: Tensor(name, "T", width)
    pages = {
        f"{p}_pages": CacheArray(p, "pages", "f32", s) for p, s in zip("kv", page_shapes(1, 32, "f32"), strict=True)
    }
    tables = {name: Table(name, np.zeros((9, 8), np.float32), None) for name in ("cos", "sin")}
    columns = dict(row_width=128, q_offset=0, q_stride=32, k_offset=64, v_offset=96)
    sizes = dict(num_heads=2, num_kv_heads=1, head_dim=32, rope_dim=16, eps=1e-6, norm_offset=0.0, bf16=False)
    operands = dict(q=part("q", 64), x=part("x", 128), **tables, **pages, **columns, **sizes)
    return AttentionInputs(**operands | changed)


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_pages_are_found_in_the_table_of_the_group(backend, kv_dtype):
    expected, results = (
        Inputs(4, 2, 32, 16, True, kv_dtype=kv_dtype, group=group).run(BACKENDS[backend]) for group in (0, 2)
    )
    for result, want in zip(results, expected, strict=True):
        same_bits(result, want)


TABLE = Table("q", np.zeros((9, 8), np.float32), None)
NORM = weight(np.ones(32), "n")
WRONG = [
    (dict(page_group=1), "page_group is 1, expected 0 as of k"),
    (dict(q_norm=weight(np.ones(32), "n")), "there is only one of q_norm and k_norm, expected both or none"),
    (dict(bf16=True), "bf16 is True, the pages are f32"),
    (dict(q_norm=NORM, k_norm=NORM, whole_norms=True), r"q_norm \(n\) is 32 wide, expected 64"),
    (
        dict(q_norm=NORM, k_norm=NORM, whole_norms=True, q_stride=64, row_width=192, x=Tensor("x", "T", 192)),
        "expected q_",
    ),
    (dict(q_cos=TABLE), "there is only one of q_cos and q_sin, expected both or none"),
    (dict(q_cos=TABLE, q_sin=TABLE), "q_cos with rope_dim 16, expected 32"),
    (dict(q_cos=TABLE, q_sin=Table("q", np.zeros((9, 4), np.float32), None)), r"q_cos and q_sin are \(8, 4\) wide"),
    (dict(rope_dim=32), r"cos and sin are \(8, 8\) wide, expected 16 both"),
    (
        dict(v_pages=CacheArray("v", "pages", "f32", (1, 32, 64))),
        r"a page of v is f32 \(1, 32, 64\), expected f32 \(1, 64",
    ),
    (
        dict(v_pages=CacheArray("v", "pages", "bf16", (1, 64, 32))),
        r"a page of v is bf16 .*, expected f32 \(1, 64, 32\)",
    ),
    (dict(k_pages=CacheArray("k", "pages", "i32", (1, 32, 64))), "pages of i32, expected f32, bf16, i8"),
    (dict(head_dim=528), "expected head_dim <= 512, got head_dim 528"),
    (dict(k_offset=97), "k ends at column 129 of x, which has 128"),
    (dict(q_stride=97), "q ends at column 129 of x, which has 128"),
]


@pytest.mark.parametrize("changed, message", WRONG)
def test_operands_that_do_not_fit_are_refused(changed, message):
    assert declared().kind == "attention_inputs" and declared().kv_dtype == "f32"
    with pytest.raises(ValueError, match=f"AttentionInputs: {message}"):
        declared(**changed)
