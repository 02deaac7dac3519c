"""Integer linear layers: kernels equal definitions bit for bit, and sums equal Python's own integers."""

import itertools
import subprocess
import sys
from dataclasses import dataclass

import numpy as np
import pytest

from lockstep.formats.parts.panels import padded_width
from lockstep.native.kernel import interpreted
from lockstep.ops import BACKENDS
from lockstep.ops.integer import code_linear, code_rows, code_weights
from lockstep.ops.integer.code_linear import MOST_VALUES, CodeLinear
from lockstep.ops.integer.code_rows import CodeRows, row_width
from lockstep.ops.integer.code_weights import CodeTensor, code_tensor, code_weight
from lockstep.ops.rounded.fake_quant import FakeQuant
from lockstep.ops.rounded.grids import FLOAT, HIGH, INTEGER, KIND, LOW, OFF, ROW_ASYMMETRIC, ROW_SYMMETRIC
from lockstep.ptq.spec import Spec
from lockstep.ptq.weights import fold
from lockstep.runtime.program import Setting, Tensor, Weight
from tests.ops.harness import run_op, same_bits
from tests.ops.integer import code_target
from tests.targets import compiling_for, pretending, skip_own, skip_without


def grid(scale, zero, low, high, kind=INTEGER):
    """A grid [1, GRID_WORDS], laid out as `ops/rounded/grids.py` says."""
    scale = np.float32(scale)
    return np.array([[kind, scale, np.float32(1) / scale, zero, low, high, 0, 0]], np.float32)


def name_of(grid):
    return "-".join(f"{n:g}" for n in grid[0, [KIND, LOW, HIGH]])


I8, U8, U4, I16 = grid(0.02, 0, -128, 127), grid(0.03, 100, 0, 255), grid(0.4, 7, 0, 15), grid(1e-4, 0, -32768, 32767)
I12, U16 = grid(2e-3, 0, -2048, 2047), grid(1e-4, 30000, 0, 65535)
OF_ROWS = [
    grid(1, 0, -128, 127, ROW_SYMMETRIC),
    grid(1, 0, 0, 255, ROW_ASYMMETRIC),
    grid(1, 0, 0, 65535, ROW_ASYMMETRIC),
]
GRIDS = [I8, U8, U4, I16, I12, U16, *OF_ROWS]
ENDS = [grid(1, *ends) for ends in ((-128, -128, 127), (0, 0, 255), (-32768, -32768, 32767), (65535, 0, 65535))]
WEIGHTS = [(-128, 127), (0, 255), (0, 15)]  # the codes of an 8-bit, an unsigned and a 4-bit weight


def coded(x, grid, backend="cpu", num_threads=1):
    """x as rows of codes."""
    out, table = (row_width(x.shape[1]), "i8"), BACKENDS[backend]
    return run_op(table, CodeRows, num_threads=num_threads, out=out, x=x, grid=grid, width=x.shape[1])["out"]


def decoded(rows, K):
    """(codes less zero point int64 [T, K], scales [T]) of rows of codes."""
    tails = rows[:, -16:].copy().view(np.int32)
    centered = [code_linear.centered_row(np.ascontiguousarray(row).ctypes.data, K) for row in rows]
    return np.stack(centered), tails[:, 0].copy().view(np.float32)


@dataclass
class Layer:
    """A layer on rows of codes, whose weight has several parts; its codes and zero points are integers."""

    rows: np.ndarray
    codes: np.ndarray
    scale: np.ndarray
    zero: np.ndarray
    residual: np.ndarray | None = None

    def weight(self):
        cuts = [0, len(self.codes) // 15, len(self.codes) // 2, len(self.codes)]
        pieces = [slice(*ends) for ends in itertools.pairwise(cuts) if ends[0] < ends[1]]
        return code_weight("w", *(code_tensor("w", self.codes[p], self.scale[p], self.zero[p]) for p in pieces))

    def run(self, backend, num_threads=1):
        N, K = self.codes.shape
        width, rows = padded_width(N), dict(x=self.rows)
        if self.residual is not None:
            rows["residual"] = np.pad(self.residual, ((0, 0), (32, 16)))
        sizes = dict(in_features=K, out_features=N, width=width + 48, column=32)
        out = run_op(BACKENDS[backend], CodeLinear, num_threads=num_threads, weight=self.weight(), **rows, **sizes)[
            "out"
        ]
        assert np.isnan(out[:, :32]).all() and np.isnan(out[:, 32 + width :]).all(), "wrote outside its columns"
        return out[:, 32 : 32 + N]

    def sums(self):
        """acc [T, N] as Python's integers."""
        x = decoded(self.rows, self.codes.shape[1])[0].astype(object)
        return x @ (self.codes.astype(object) - self.zero.astype(object)[:, None]).T


def layer(grid, T=7, K=100, N=75, codes=(-128, 127), residual=False, seed=0):
    """A layer of random numbers; N is no multiple of 16, K none of 32."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((T, K)).astype(np.float32) * 3
    w = rng.integers(codes[0], codes[1] + 1, (N, K))
    residuals = rng.standard_normal((T, padded_width(N))).astype(np.float32) if residual else None
    scale = (rng.random(N) * 0.01).astype(np.float32)
    return Layer(coded(x, grid), w, scale, rng.integers(codes[0], codes[1] + 1, N), residuals)


def extreme_layer(grid, K=3072, N=40):
    """Codes at the ends of their range, in rows that add up and in rows that cancel; scales of one."""
    x, w = np.full((9, K), 1e9, np.float32), np.empty((N, K), np.int64)
    x[1], x[2, ::2], x[3, 1::2], x[4:8], x[8, : K // 2] = -1e9, -1e9, -1e9, 0, -1e9
    x[4:8, ::3] = np.array([1e9, -1e9, 1e9, -1e9], np.float32)[:, None]
    w[0::4], w[1::4] = -128, 127
    w[2::4], w[3::4] = np.where(np.arange(K) % 2, -128, 127), np.where(np.arange(K) % 3, 127, -128)
    return Layer(coded(x, grid), w, np.ones(N, np.float32), np.array([0, -128, 127, 0, 0] * (N // 5), np.int64))


@pytest.mark.parametrize("grid", GRIDS, ids=name_of)
@pytest.mark.parametrize("K", [1, 15, 16, 17, 32, 100])
def test_rows_of_codes_equal_the_definition(grid, K):
    x = np.random.default_rng(K).standard_normal((7, K)).astype(np.float32)
    x[1], x[2], x[3, 0], x[4, -1], x[5], x[6, 0] = 0, x[2] * 1e6, np.nan, -np.inf, 1e-30, np.inf
    same_bits(coded(x, grid, num_threads=3), coded(x, grid, "reference"))


@pytest.mark.parametrize("grid", GRIDS, ids=name_of)
@pytest.mark.parametrize("x", [4, 1e-30], ids=["", "tiny"])
def test_the_values_of_codes_are_those_of_fake_quant(grid, x):
    x = np.random.default_rng(1).standard_normal((5, 96)).astype(np.float32) * np.float32(x)
    x[0, :8] = (np.arange(8) - 3.5) * grid[0, 1]  # ties go to even codes
    x[1] = 0
    sizes = dict(width=96, column=0, stride=0, head_width=96, num_heads=1)
    expected = run_op(BACKENDS["cpu"], FakeQuant, x=x, grids=grid, **sizes)["out"]
    codes, scales = decoded(coded(x, grid), 96)
    assert (codes.astype(np.float32) * scales[:, None] == expected).all()
    if grid[0, KIND] == INTEGER:  # what is on the grid keeps its codes
        same_bits(coded(expected, grid), coded(x, grid))


@pytest.mark.parametrize("T", [1, 2, 3, 4, 5, 6, 7, 13, 48])
@pytest.mark.parametrize("grid", [U8, I16, OF_ROWS[1]], ids=["u8", "i16", "u8 of rows"])
def test_kernel_equals_definition(T, grid):
    made = layer(grid, T, codes=WEIGHTS[T % 3], residual=T % 2 == 1, seed=T)
    expected = made.run("reference")
    for threads in (1, 2, 3):
        same_bits(made.run("cpu", threads), expected)


@pytest.mark.parametrize("codes", WEIGHTS)
@pytest.mark.parametrize("K, N", [(1, 1), (33, 16), (96, 17), (640, 48)])
def test_shapes(K, N, codes):
    for grid in (I8, U16):
        made = layer(grid, 3, K, N, codes, seed=K)
        same_bits(made.run("cpu", 2), made.run("reference"))


@pytest.mark.parametrize("grid", ENDS, ids=name_of)
@pytest.mark.parametrize("K", [3072, MOST_VALUES])
def test_sums_are_those_of_pythons_integers(grid, K):
    """With 16-bit codes, sums exceed 32 bits by far, or cancel after partial sums that do."""
    made = extreme_layer(grid, K)
    sums = made.sums()
    assert max(abs(n) for n in sums.flat) > (2**31 if grid[0, HIGH] > 255 else 2**31 * 0.99 * K / MOST_VALUES)
    expected = np.array([[np.float32(int(n)) for n in row] for row in sums], np.float32)
    same_bits(made.run("cpu", 2), expected)
    if K == 3072:
        same_bits(made.run("reference"), expected)


def test_values_are_those_of_the_formula():
    made = layer(I16, codes=(0, 15))
    scales = decoded(made.rows, 100)[1].astype(np.float64)[:, None] * made.scale.astype(np.float64)
    same_bits(made.run("cpu"), (made.sums().astype(np.float64) * scales).astype(np.float32))


def test_definitions_interpreted():
    rng = np.random.default_rng(3)
    x, w = rng.integers(-70000, 70000, 64), rng.integers(-128, 128, 64).astype(np.int8)
    assert interpreted(code_linear.code_dot)(x, w, -7) == code_linear.code_dot(x, w, -7) == int(x @ (w.astype(int) + 7))
    args = 123456789012, np.float32(0.1), np.float32(0.3)
    assert interpreted(code_linear.scaled)(*args) == code_linear.scaled(*args)
    values = rng.standard_normal(40).astype(np.float32)
    for grid in GRIDS:
        planes = np.zeros((2, 2, 64), np.int8)
        made = [
            f(values, grid[0], *planes[i]) for i, f in enumerate((code_rows.code_row, interpreted(code_rows.code_row)))
        ]
        assert tuple(map(float, made[0])) == tuple(map(float, made[1]))
        same_bits(planes[0], planes[1])


@pytest.mark.parametrize("grid", [U8, I16, OF_ROWS[0], OF_ROWS[1]], ids=name_of)
def test_a_row_that_is_not_finite_gives_nan(grid):
    """A clamp must not turn NaN into an ordinary answer. An infinity saturates on a grid with a scale of its own."""
    x = np.random.default_rng(4).standard_normal((4, 40)).astype(np.float32)
    sound = layer(grid, 4, 40)
    spoilt = Layer(None, sound.codes, sound.scale, sound.zero)
    sound.rows, x[1, 39], x[2, 0] = coded(x, grid), np.nan, np.inf
    spoilt.rows = coded(x, grid)
    x[2, 0] = 1e9
    saturated = Layer(coded(x, grid), sound.codes, sound.scale, sound.zero)
    for backend in ("cpu", "reference"):
        out = spoilt.run(backend)
        assert np.isnan(out[1]).all()
        same_bits(out[[0, 3]], sound.run(backend)[[0, 3]])
        if grid[0, KIND] == INTEGER:
            same_bits(out[2], saturated.run(backend)[2])
        else:
            assert np.isnan(out[2]).all()


@pytest.mark.parametrize("kind", [OFF, FLOAT])
def test_other_kinds_of_grids_give_nan(kind):
    made = layer(grid(0.1, 3, -6, 8, kind), 3)
    assert np.isnan(made.run("cpu")).all() and np.isnan(made.run("reference")).all()


def test_weights_are_written_in_place():
    """A trial with other weights allocates nothing."""
    first, second = layer(U8, codes=(0, 15), seed=1).weight(), layer(U8, codes=(0, 255), seed=2).weight()
    arrays = code_weights.pack_panels(first)
    code_weights.fill_panels(second, *arrays)
    for found, expected in zip(arrays, code_weights.pack_panels(second), strict=True):
        same_bits(found, expected)


WRONG_WEIGHTS = [
    (dict(codes=np.zeros((4, 8), np.int16)), r"'w': codes is int16\[4, 8\], expected int8\[4, 8\]"),
    (dict(scale=np.zeros((4, 2), np.float32)), r"scale is float32\[4, 2\], expected float32\[4\]: .* one scale .* row"),
    (dict(zero=np.zeros(3, np.int32)), r"zero is int32\[3\], expected int32\[4\]"),
    (dict(zero=np.full(4, 128, np.int32)), "zero point is outside int8"),
]


@pytest.mark.parametrize("wrong, said", WRONG_WEIGHTS)
def test_weights_that_are_no_codes_are_refused(wrong, said):
    right = dict(codes=np.zeros((4, 8), np.int8), scale=np.ones(4, np.float32), zero=np.zeros(4, np.int32))
    with pytest.raises(ValueError, match=said):
        CodeTensor("w", **right | wrong)


def test_weights_that_have_no_kernel_are_refused():
    one = np.ones((1, 1), np.float32)
    with pytest.raises(ValueError, match=r"'w': codes and zero points from 0 to 256, expected -128..127 or 0..255"):
        code_tensor("w", np.array([[0, 256]]), one, 0 * one)
    with pytest.raises(ValueError, match=r"'w': scales or zero points \[4, 2\], .* groups of columns have no integer"):
        code_tensor("w", np.zeros((4, 8), np.int8), np.ones((4, 2), np.float32), np.zeros((4, 2), np.float32))


@pytest.mark.parametrize("spec", ["i8/tensor", "u8", "i4/row:mse", "u4/row"])
def test_folded_weights_are_multiplied_as_they_are(spec):
    """The codes that a plan folds are multiplied unchanged: sums of whole numbers are exact in float64."""
    folded = fold(np.random.default_rng(5).standard_normal((20, 64)).astype(np.float32), Spec.parse(spec))
    weight = code_weight("w", code_tensor("w", folded.codes, folded.scale, folded.zero))
    x = np.random.default_rng(6).integers(-100, 101, (3, 64)).astype(np.float32)
    rows = coded(x, grid(1, 0, -128, 127))
    sizes = dict(in_features=64, out_features=20, width=32, column=0)
    out = run_op(BACKENDS["cpu"], CodeLinear, x=rows, weight=weight, **sizes)["out"][:, :20]
    codes = (folded.codes.astype(np.float64) - folded.zero.astype(np.float64)) @ x.T.astype(np.float64)
    same_bits(out, (codes * folded.scale.astype(np.float64)).T.astype(np.float32))


def test_what_does_not_fit_is_refused():
    weight = layer(U8).weight()
    right = dict(out=Tensor("y", "T", 80), x=Tensor("c", "T", row_width(100), "i8"), weight=weight)
    right |= dict(in_features=100, out_features=75, width=80, column=0)
    CodeLinear(**right)
    wrong = [
        (dict(x=Tensor("c", "T", 100, "i8")), r"x is c i8\[T, 100\], expected i8\[T, 272\]"),
        (dict(weight=Weight("w", "f32", (75, 100), ())), "weight w is f32, expected codes"),
        (dict(column=16), "75 features from column 16 on do not fit a row of 80"),
        (dict(in_features=40000), "expected 0 < in_features <= 32768"),
    ]
    for change, said in wrong:
        with pytest.raises(ValueError, match=said):
            CodeLinear(**right | change)
    with pytest.raises(ValueError, match=r"out is c i8\[T, 100\], expected i8\[T, 272\]"):
        one = Setting("g", U8)
        CodeRows(out=Tensor("c", "T", 100, "i8"), x=Tensor("x", "T", 100), grid=one, width=100)


@pytest.mark.parametrize("variant, cpu", [("native", "haswell"), ("avx512", ""), ("avx_vnni", ""), ("generic", "")])
def test_other_targets_give_the_same_bits(variant, cpu, tmp_path):
    if variant.startswith("avx"):  # avx_vnni differs only in the width of registers
        skip_own("avx512_vnni-bf16")
    skip_without(*(("avx512vl", "avx512_vnni") if variant == "avx_vnni" else ()))
    names = ["u8", "i16", *["fixed"][: variant == "native"]]
    environment = compiling_for(cpu) if cpu else pretending(tmp_path)
    command = [sys.executable, "-m", "tests.ops.integer.code_target", variant, *names]
    printed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert printed.split() == [code_target.digest(name) for name in names]
