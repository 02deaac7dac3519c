"""Linear layers of all formats: kernels equal definitions, and rows do not depend on the other rows of a step."""

import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

from lockstep.formats import BLOCK_FORMATS, FORMATS, bf16
from lockstep.formats.parts import products
from lockstep.formats.parts.panels import padded_width
from lockstep.formats.parts.rows import ROW_FORMATS, quantized_row
from lockstep.native import targets
from lockstep.native.host import UnfitMachine
from lockstep.native.kernel import interpreted
from lockstep.ops.elementwise import activations, activations_cpu, gated_mul, rms_norm_cpu
from lockstep.ops.elementwise.activations_cpu import MADE
from lockstep.ops.elementwise.gated_mul import GatedMul
from lockstep.ops.elementwise.rms_norm import RmsNorm
from lockstep.ops.linear import linear, linear_cpu
from lockstep.ops.linear.linear import PREPARATION, Linear
from lockstep.ops.rewrite import PREPARATIONS
from lockstep.runtime.program import Weight
from lockstep.weights.tensor import StoredTensor
from tests.ops.harness import run_op, same_bits
from tests.ops.linear import linear_target
from tests.targets import compiling_for, pretending, skip_own

RNG = np.random.default_rng(1)
INTEGER_FORMATS = list(BLOCK_FORMATS)
KEPT_FORMATS = [name for name, format in BLOCK_FORMATS.items() if format.stored.encode is None]
TOLERANCE = {
    "f32": 1e-5,
    "f16": 1e-5,
    "q2_k": 0.1,
    "q3_k": 0.1,
    "q4_k": 0.1,
    "q5_k": 0.2,
    "q6_k": 0.3,
    "iq4_nl": 0.1,
    "iq4_xs": 0.3,
    "mxfp4": 0.1,
    "nvfp4": 0.3,
    "nvfp4_scaled": 0.1,
    "group4": 0.1,
    "group8": 0.5,
    "channel8": 0.1,
}  # of the others 0.03
SIZES = {"nvfp4": 0.03}  # of scales; smaller ones are few numbers of 8 bits, or none


def random_blocks(format, N, K):
    """Blocks of random bytes, which have all codes and all scales within a block, with small scales."""
    block = BLOCK_FORMATS[format]
    blocks = RNG.integers(0, 256, (N, K // block.block_size, block.block_bytes), np.uint8)
    size = SIZES.get(format, 2e-3 if block.block_size == 32 else 2e-4)
    scales = RNG.normal(0, size, blocks.shape[:2])
    block.put_scales(blocks, scales[:, :1] if block.packed.per_row else scales)
    return blocks.reshape(N, -1)


def stored(format, N, K, name="w"):
    if format in KEPT_FORMATS:
        return StoredTensor(name, format, (N, K), random_blocks(format, N, K))
    values = (RNG.standard_normal((N, K)) * 0.05).astype(np.float32)
    return StoredTensor(name, format, (N, K), FORMATS[format].data_of(values))


def narrow(format):
    """A small width: three blocks, or two blocks of 256."""
    return {256: 512, 64: 192}.get(FORMATS[format].block_size, 96)


def prepared(format, x, table=activations_cpu.CPU):
    kind, K = PREPARATION[format], x.shape[1]
    if not kind:
        return x
    return run_op(table, PREPARATIONS[kind], out=(ROW_FORMATS[kind].width(K), "i8"), x=x, width=K)["out"]


def run(table, format, x, parts, residual=None, num_threads=1):
    N, K = sum(p.shape[0] for p in parts), parts[0].shape[1]
    weight, width = Weight("w", format, (N, K), tuple(parts)), padded_width(N)
    sizes = dict(in_features=K, out_features=N, width=width + 48, column=32)
    rows = dict(x=prepared(format, x)) | ({} if residual is None else dict(residual=shifted(residual)))
    out = run_op(table, Linear, num_threads=num_threads, weight=weight, format=format, **rows, **sizes)["out"]
    assert np.isnan(out[:, :32]).all() and np.isnan(out[:, 32 + width :]).all(), "wrote outside its columns"
    filled = out[:, 32 + N : 32 + width]  # of rows that are not finite, these are not either
    assert residual is not None or not filled[np.isfinite(filled)].any(), "columns that fill up a panel are not zero"
    return out[:, 32 : 32 + N]


def shifted(x):
    return np.pad(x, ((0, 0), (32, 16)))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("num_tokens", [1, 2, 3, 4, 5, 6, 7, 13])
def test_kernel_equals_definition(format, num_tokens):
    K = narrow(format)
    parts = [stored(format, 37, K, "a"), stored(format, 16, K, "b"), stored(format, 22, K, "c")]
    x = RNG.standard_normal((num_tokens, K)).astype(np.float32)
    residual = RNG.standard_normal((num_tokens, padded_width(75))).astype(np.float32) if num_tokens % 2 else None
    expected = run(linear.REFERENCE, format, x, parts, residual)
    same_bits(run(linear_cpu.CPU, format, x, parts, residual, num_threads=3), expected)
    weights = np.concatenate([p.to_f32() for p in parts])
    exact = x.astype(np.float64) @ weights.T + (0 if residual is None else residual[:, :75])
    assert np.abs(expected - exact).max() < TOLERANCE.get(format, 0.03)


@pytest.mark.parametrize("format", ["q8_0", "bf16"])
def test_rows_that_whole_blocks_do_not_fill_are_refused(format):
    with pytest.raises(ValueError, match="out has rows of 898 values, expected a multiple of 32"):
        prepared(format, np.ones((2, 898), np.float32))


@pytest.mark.parametrize("format", ["q8_0", "bf16"])
@pytest.mark.parametrize("num_tokens", [1, 2, 3, 150])
def test_layers_are_cut_finer_for_many_threads(format, num_tokens):
    panels, threads = 39, 40
    parts, x = [stored(format, 16 * panels - 3, 96)], RNG.standard_normal((num_tokens, 96)).astype(np.float32)
    ends_earlier = interpreted(linear_cpu.of_one_panel)
    assert ends_earlier(panels, threads) and not ends_earlier(panels, 4)
    residual = RNG.standard_normal((num_tokens, 16 * panels)).astype(np.float32)
    one = run(linear_cpu.CPU, format, x, parts, residual)
    same_bits(run(linear_cpu.CPU, format, x, parts, residual, num_threads=threads), one)
    same_bits(run(linear.REFERENCE, format, x, parts, residual), one)


@pytest.mark.parametrize("format", INTEGER_FORMATS)
def test_integer_formats_multiply_the_weights_of_the_file(format):
    """Only activations are quantized: a product equals that of the quantized activations and the decoded weights."""
    K = narrow(format)
    part, x = stored(format, 48, K), RNG.standard_normal((3, K)).astype(np.float32)
    rows = [quantized_row(row.ctypes.data, K) for row in prepared(format, x)]
    quantized = np.stack([codes * np.repeat(scales.astype(np.float64), 32) for codes, scales in rows])
    exact, size = quantized @ part.to_f32().T, np.abs(quantized) @ np.abs(part.to_f32().T)
    assert (np.abs(run(linear.REFERENCE, format, x, [part]) - exact) <= 2e-6 * size).all()


@pytest.mark.parametrize("format", ["q4_1", "q5_0", "q5_1", "q5_k"])
def test_keeping_a_format_is_nearer_than_requantizing_it(format):
    """Against float64: kept, a format has the error of the activations only; as q8_0, also that of the weights."""
    part, x = [stored(format, 256, 1024)], RNG.standard_normal((16, 1024)).astype(np.float32)
    exact = x.astype(np.float64) @ part[0].to_f32().T
    error = {f: np.sqrt(np.mean((run(linear_cpu.CPU, f, x, part) - exact) ** 2)) for f in (format, "q8_0")}
    assert error["q8_0"] > 1.1 * error[format], error  # measured: 1.21 to 1.24 times


@pytest.mark.parametrize("format", FORMATS)
def test_many_rows_equal_each_row_alone(format):
    part = [stored(format, 96, 1024)]
    x = RNG.standard_normal((200, 1024)).astype(np.float32)
    out = run(linear_cpu.CPU, format, x, part, num_threads=2)
    for t in (0, 5, 101, 199):
        same_bits(out[t : t + 1], run(linear_cpu.CPU, format, x[t : t + 1], part))


@pytest.mark.parametrize("format", FORMATS)
def test_per_token_equals_together(format):
    K = narrow(format)
    part, x = [stored(format, 80, K)], RNG.standard_normal((9, K)).astype(np.float32)
    residual = RNG.standard_normal((9, 80)).astype(np.float32)
    same_bits(
        run(linear_cpu.PER_TOKEN, format, x, part, residual, num_threads=2),
        run(linear_cpu.CPU, format, x, part, residual),
    )


@pytest.mark.parametrize("kind", ["quantize_q8", "round_bf16"])
def test_prepared_rows_equal_definition(kind):
    x = RNG.standard_normal((5, 96)).astype(np.float32) * np.float32(10.0) ** RNG.integers(-20, 20, (5, 96)).astype(
        np.float32
    )
    x[1, :32], x[2, 32:64], x[3] = 0, 1e-35, 2.5
    format = "q8_0" if kind == "quantize_q8" else "bf16"
    same_bits(prepared(format, x), prepared(format, x, activations.REFERENCE))


@pytest.mark.parametrize("num_blocks", [1, 3, 4, 5, 8, 21])
def test_blocks_of_every_kind_beside_each_other(num_blocks):
    """Blocks are quantized several at a time; what one holds changes no bit of another."""
    kinds = RNG.standard_normal((9, 32)).astype(np.float32)
    kinds *= np.float32([1, 1e-38, 1e-31, 1e30, 1, 1, 1, 0, 1]).reshape(9, 1)
    kinds[4, 7], kinds[5, 20], kinds[6, 31], kinds[8, ::2] = (
        np.nan,
        np.inf,
        -np.inf,
        127.5 / 127 * np.abs(kinds[8]).max(),
    )
    x = kinds[RNG.integers(0, 9, (40, num_blocks))].reshape(40, -1)
    expected = prepared("q8_0", x, activations.REFERENCE)
    same_bits(prepared("q8_0", x), expected)
    for t in (0, 17, 39):
        same_bits(prepared("q8_0", x[t : t + 1]), expected[t : t + 1])


@pytest.mark.parametrize("format", FORMATS)
def test_a_row_that_is_not_finite_gives_no_finite_number(format):
    """Otherwise a quantized layer would turn NaN into an ordinary number. The other rows keep their bits."""
    x = RNG.standard_normal((6, narrow(format))).astype(np.float32)
    parts, sound = [stored(format, 40, x.shape[1])], x.copy()
    x[1], x[2, 5], x[3, 40], x[4, 40] = np.nan, np.nan, np.inf, -np.inf
    for table in (linear_cpu.CPU, linear_cpu.PER_TOKEN, linear.REFERENCE):
        out, expected = run(table, format, x, parts), run(table, format, sound, parts)
        assert not np.isfinite(out[1:5]).any()
        same_bits(out[[0, 5]], expected[[0, 5]])
    if PREPARATION[format] == "quantize_q8":
        same_bits(prepared(format, x), prepared(format, x, activations.REFERENCE))


@pytest.mark.parametrize("width", [32, 64, MADE, 2 * MADE + 96])
@pytest.mark.parametrize("kind", ["quantize_q8", "round_bf16"])
def test_fused_norm_and_gate_equal_their_parts(kind, width):
    format = "q8_0" if kind == "quantize_q8" else "bf16"
    x, w = RNG.standard_normal((5, 2 * width)).astype(np.float32), RNG.standard_normal(2 * width).astype(np.float32)
    norm, gate = dict(x=x, weight=w, width=2 * width, eps=1e-6, offset=1.0), dict(x=x, width=width, activation="silu")
    out = lambda K: (ROW_FORMATS[kind].width(K), "i8")
    normed = run_op(rms_norm_cpu.CPU, RmsNorm, out=(2 * width, "f32"), **norm)["out"]
    gated = run_op(gated_mul.REFERENCE, GatedMul, out=(width, "f32"), **gate)["out"]
    for table in (activations_cpu.CPU, activations_cpu.PER_TOKEN):
        fused = run_op(table, RmsNorm, num_threads=2, out=out(2 * width), preparation=kind, **norm)["out"]
        same_bits(fused, prepared(format, normed))
        fused = run_op(table, GatedMul, num_threads=2, out=out(width), preparation=kind, **gate)["out"]
        same_bits(fused, prepared(format, gated))


def test_definitions_interpreted():
    x, w = (RNG.standard_normal(64).astype(ml_dtypes.bfloat16).astype(np.float32) for _ in range(2))
    x[3], w[3], x[8:10], w[8:10] = 2.0**-100, 2.0**-30, 0, -1
    for dot in (products.dot_f32, bf16.dot_bf16):
        assert np.float32(interpreted(dot)(x, w)).tobytes() == np.float32(dot(x, w)).tobytes()
    a, codes = RNG.integers(-127, 128, (2, 64)).astype(np.int8)
    scales = RNG.random((2, 2)).astype(np.float32)
    args = a, scales[0], codes, scales[1]
    assert np.float32(interpreted(products.dot_q8)(*args)).tobytes() == np.float32(products.dot_q8(*args)).tobytes()


def test_bf16_flushes_denormals_everywhere():
    K, N = 64, 16
    x = (RNG.standard_normal((7, K)) * 2.0**-63).astype(np.float32)
    w = (RNG.standard_normal((N, K)) * 2.0**-64).astype(ml_dtypes.bfloat16)
    parts = [StoredTensor("w", "bf16", (N, K), w)]
    expected = run(linear.REFERENCE, "bf16", x, parts)
    same_bits(run(linear_cpu.CPU, "bf16", x, parts), expected)
    assert (expected == 0).any() and (expected != 0).any()


def test_sums_with_a_residual_keep_denormals():
    """Products of pairs flush them; the definition adds the residual as IEEE 754 says."""
    x, w = np.zeros((7, 64), np.float32), np.zeros((48, 64), np.float32)
    x[:, 5], w[:, 5] = 2.0**-63, 2.0**-63
    residual = np.full((7, 48), 1e-40, np.float32)
    residual[:, ::2] = -1.5 * np.float32(2.0**-126)
    parts = [StoredTensor("w", "bf16", w.shape, w.astype(ml_dtypes.bfloat16))]
    expected = run(linear.REFERENCE, "bf16", x, parts, residual)
    for table in (linear_cpu.CPU, linear_cpu.PER_TOKEN):
        for rows in (1, 7):
            same_bits(run(table, "bf16", x[:rows], parts, residual[:rows]), expected[:rows])
    assert (expected[:, ::2] == -(2.0**-127)).all() and (expected[:, 1::2] > 2.0**-126).all()


@pytest.mark.parametrize("last", [4, 7])
def test_bf16_rounds_before_it_flushes(last):
    """Sums in [2**-126 - 2**-151, 2**-126) are 2**-126; a CPU that flushes before it rounds, as ARM's do, gives 0."""
    x, w = np.zeros((7, 64), np.float32), np.zeros((40, 64), np.float32)
    x[:, 5], w[:, 5] = 2.0**-63, 2.0**-63
    x[:, last], w[:, last] = 2.0**-76, -(2.0**-76)
    parts = [StoredTensor("w", "bf16", w.shape, w.astype(ml_dtypes.bfloat16))]
    expected = run(linear.REFERENCE, "bf16", x, parts)
    same_bits(run(linear_cpu.CPU, "bf16", x, parts), expected)
    assert (expected == np.float32(2.0**-126)).all()


def test_nan_weight_is_refused():
    bad = np.zeros((16, 32), np.float32)
    bad[3, 5] = np.nan
    with pytest.raises(ValueError, match=r"'spoilt'.*NaN"):
        run(linear_cpu.CPU, "f32", np.ones((1, 32), np.float32), [StoredTensor("spoilt", "f32", (16, 32), bad)])


# Code without a dot instruction differs from that for AVX2 only in what multiplies, which a tile of one row has, too.
ONE_ROW = [f"{format}_per_token" for format in ("q5_0", "q3_k", "group8", "iq4_nl", "nvfp4")]


@pytest.mark.parametrize(
    "variant, cpu, formats",
    [
        (
            "native",
            "haswell",
            ["q8_0", "q5_0", "q5_1", "q2_k", "q3_k", "group8", "channel8", "iq4_nl", "iq4_xs", "mxfp4", "nvfp4"],
        ),
        ("generic", "", ["q6_k", *ONE_ROW]),
        (
            "avx512",
            "",
            ["q8_0", "q4_k", "q6_k", "q2_k", "q3_k", "q5_1", "group4", "group8", "iq4_xs", "mxfp4", "nvfp4", "bf16"],
        ),
    ],
)
def test_other_targets_give_the_same_bits(variant, cpu, formats, tmp_path):
    if variant == "avx512":
        skip_own("avx512_vnni-bf16")
    environment = compiling_for(cpu) if cpu else pretending(tmp_path)
    command = [sys.executable, "-m", "tests.ops.linear.linear_target", variant, *formats]
    printed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert printed.split() == [word for format in formats for word in (format, linear_target.digest(format))]


def test_targets_by_name():
    ask = lambda cpu, features="", triple="x86_64-unknown-linux-gnu": targets.of((triple, cpu, features)).name
    cpus = {"znver5": "avx512_vnni-bf16", "icelake-server": "avx512_vnni", "alderlake": "avx_vnni", "znver3": "avx2"}
    assert {cpu: ask(cpu) for cpu in cpus} == cpus
    assert ask("anything", "+avx2,+fma") == "avx2" and ask("anything", "+avx2,+avx512vnni") == "avx512_vnni"
    wide = lambda cpu: targets.of(("x86_64-unknown-linux-gnu", cpu, "")).is_wide
    assert [wide(cpu) for cpu in ("znver4", "skylake-avx512", "skylake", "alderlake")] == [True, True, False, False]
    assert (
        ask("neoverse-n1", triple="aarch64-linux-gnu") == "sdot"
        and ask("generic", triple="aarch64-linux-gnu") == "generic"
    )
    assert ask("", triple="riscv64-linux-gnu") == "generic"
    with pytest.raises(UnfitMachine, match=r"AVX2.*'nehalem'"):
        ask("nehalem")
