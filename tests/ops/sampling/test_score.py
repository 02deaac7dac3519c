"""Scores: the kernel equals the definition, which is the engine's log-probability and accurate in float64."""

import subprocess
import sys

import numpy as np
import pytest

from lockstep.native.kernel import interpreted
from lockstep.ops.integer.code_rows import row_width
from lockstep.ops.integer.code_weights import FORMAT as CODES
from lockstep.ops.integer.code_weights import code_tensor
from lockstep.ops.linear import linear, linear_cpu
from lockstep.ops.linear.linear import PREPARATION
from lockstep.ops.rewrite import lower
from lockstep.ops.rounded.grids import (
    FLOAT,
    GRID_WORDS,
    INTEGER,
    MICROSCALED,
    NVFP4,
    OFF,
    Q8,
    ROW_ASYMMETRIC,
    ROW_SYMMETRIC,
    SMALL_FLOATS,
    quantize_row,
)
from lockstep.ops.sampling import sample, score, score_cpu
from lockstep.ops.sampling.score import (
    BASE_NLL,
    BASE_TOP,
    CHUNK,
    DELTA_P,
    KL,
    NLL,
    NUM_SCORES,
    SAME_TOP,
    TOP,
    TOP_LOGPROB,
    Score,
    num_chunks,
    scratch_width,
)
from lockstep.runtime.program import Program, Weight
from lockstep.weights.tensor import StoredTensor
from tests.kernels import ALL_FORMATS
from tests.ops.harness import Given, run_op, same_bits
from tests.ops.integer.test_code_linear import I16, U8, coded
from tests.ops.linear.test_linear import narrow, prepared, stored
from tests.ops.linear.test_linear import run as run_linear
from tests.ops.sampling import score_target
from tests.targets import compiling_for

RNG = np.random.default_rng(3)
FORMATS = ["f32", "bf16", "q8_0", "q4_0", "q4_k", CODES]
VOCABULARIES = [1, 15, 17, CHUNK + 3]
ROWS = [1, 2, 3, 4, 5, 6, 7, 13]


def run(table, x, part, target, base=None, base_part=None, grid=None, num_threads=1):
    """Scores [rows, 8]; base_part: the base's head, by default the same head. grid: [GRID_WORDS]."""
    head, operands = Weight("head", part.format, part.shape, (part,)), {}
    if base is not None:
        base_head = head if base_part is None else Weight("base head", base_part.format, part.shape, (base_part,))
        plain = base_head.format != head.format
        operands = dict(base_x=rows_for(base_head, base), base_weight=base_head, base_f32=plain)
    if grid is not None:
        operands["grid"] = grid[None]
    V, K = part.shape
    sizes = dict(in_features=K, vocab_size=V, scratch_width=scratch_width(V), format=part.format)
    rows = dict(x=rows_for(head, x), target=np.asarray(target, np.int32)[:, None])
    return run_op(table, Score, num_threads=num_threads, weight=head, **rows, **operands, **sizes)["out"]


def rows_for(head, x):
    """Rows of values as a head multiplies them; for codes on a grid of 8 bits, or of 16 if there are many rows."""
    return coded(x, I16 if len(x) > 5 else U8) if head.format == CODES else prepared(head.format, x)


def head_of(format, V, name="w"):
    """A random head, of an awkward width."""
    if format != CODES:
        return stored(format, V, narrow(format), name)
    codes, zero = RNG.integers(-100, 128, (V, 83)), RNG.integers(-3, 9, V)
    return code_tensor(name, codes, (RNG.random(V) * 1e-3).astype(np.float32), zero)


def rows_of(num_rows, format, scale=3.0):
    K = 83 if format == CODES else narrow(format)
    return (scale * RNG.standard_normal((num_rows, K))).astype(np.float32)


def near(x):
    return x + np.float32(0.1) * RNG.standard_normal(x.shape).astype(np.float32)


def targets_of(num_rows, vocabulary):
    """Random tokens; some rows have none, and the last has the last token, in another chunk than most."""
    made = RNG.integers(0, vocabulary, num_rows)
    made[::3], made[-1] = -1, vocabulary - 1
    return made


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("format", FORMATS)
def test_kernel_equals_definition(format, vocabulary):
    part, other = (head_of(format, vocabulary, name) for name in ("w", "w0"))
    plain = StoredTensor("plain", "f32", part.shape, RNG.standard_normal(part.shape).astype(np.float32))
    for num_rows in ROWS:
        x, target = rows_of(num_rows, format), targets_of(num_rows, vocabulary)
        base = near(x)
        for operands in ((), (base,), (base, other), (base, plain)):
            expected = run(score.REFERENCE, x, part, target, *operands)
            for num_threads in (1, 2, 3) if num_rows in (1, 7, 13) else (1,):
                same_bits(run(score_cpu.CPU, x, part, target, *operands, num_threads=num_threads), expected)


@pytest.mark.skipif(not ALL_FORMATS, reason="kernels take a minute to compile: make test-formats")
@pytest.mark.parametrize("format", [format for format in PREPARATION if format not in FORMATS])
def test_every_format_has_a_kernel(format):
    part, x = stored(format, 83, narrow(format)), rows_of(4, format)
    for operands in ((), (near(x),)):
        expected = run(score.REFERENCE, x, part, [82, 0, -1, 5], *operands)
        same_bits(run(score_cpu.CPU, x, part, [82, 0, -1, 5], *operands), expected)


@pytest.mark.parametrize("num_rows", [60, 200])
def test_many_rows_equal_each_row_alone(num_rows):
    """More rows than a claim takes, by several chunks."""
    part, x = stored("q8_0", 3 * CHUNK + 100, 96), rows_of(num_rows, "q8_0")
    base, target = near(x), targets_of(num_rows, 3 * CHUNK)
    together = run(score_cpu.CPU, x, part, target, base, num_threads=2)
    same_bits(together, run(score_cpu.CPU, x, part, target, base, num_threads=1))
    same_bits(together[:, NLL], run(score_cpu.CPU, x, part, target, num_threads=3)[:, NLL])
    for t in (0, 5, 47, 48, num_rows - 1):
        one = slice(t, t + 1)
        same_bits(together[one], run(score_cpu.CPU, x[one], part, target[one], base[one]))
        same_bits(together[one], run(score.REFERENCE, x[one], part, target[one], base[one]))


@pytest.mark.parametrize("format", ["f32", "q8_0"])
def test_nll_is_the_log_probability_that_the_engine_reports(format):
    part, x = stored(format, 2 * CHUNK + 9, narrow(format)), rows_of(6, format)
    target = targets_of(6, 2 * CHUNK)
    target[target < 0] = 0
    logits, none = run_linear(linear_cpu.CPU, format, x, [part]), (np.zeros(20, np.int32), np.zeros(20, np.float32))
    reported = [sample.report(row, token, 0, *none) for row, token in zip(logits, target, strict=True)]
    found = run(score_cpu.CPU, x, part, target)
    same_bits(found[:, NLL], -np.array(reported, np.float32))
    assert (found[:, TOP] == logits.argmax(1)).all()
    greatest = [sample.report(row, row.argmax(), 0, *none) for row in logits]
    same_bits(found[:, TOP_LOGPROB], np.array(greatest, np.float32))


def exactly(logits, base, target):
    """Scores in float64, from the float32 logits."""
    rows = np.arange(len(logits))
    l, l0 = logits.astype(np.float64), base.astype(np.float64)
    lp, lp0 = (
        x - np.log(np.exp(x - x.max(1, keepdims=True)).sum(1, keepdims=True)) - x.max(1, keepdims=True) for x in (l, l0)
    )
    made = np.zeros((len(logits), NUM_SCORES))
    made[:, NLL], made[:, BASE_NLL] = -lp[rows, target], -lp0[rows, target]
    made[:, KL], made[:, DELTA_P] = (
        (np.exp(lp0) * (lp0 - lp)).sum(1),
        np.exp(lp[rows, target]) - np.exp(lp0[rows, target]),
    )
    made[:, TOP], made[:, BASE_TOP] = l.argmax(1), l0.argmax(1)
    made[:, SAME_TOP], made[:, TOP_LOGPROB] = made[:, TOP] == made[:, BASE_TOP], lp.max(1)
    return made


@pytest.mark.parametrize("scale, distance", [(3.0, 0.01), (3.0, 1.0), (30.0, 0.1), (0.01, 0.01)])
def test_scores_against_float64(scale, distance):
    """Both have the same float32 logits, so that differences are errors of the scores alone.

    Of kl: exp has relative errors of 2**-23 and its argument, a rounded difference of up to s = the spread of a row's
    logits, of s * 2**-24; lanes and trees of sums of positive terms, as many as a lane has of a chunk, 256, and then
    chunks, add (256 + 4 + 3) * 2**-24 at worst, relative to the sum of |terms|. The terms are p0 * (l0 - l), with
    |l0 - l| at most d. A mean of |l0 - l| over p0 so is off by at most d * (s + 2 + 263) * 2**-24, twice for the
    division; the four numbers that are added at last are each rounded to 2**-24 of themselves, and the two logarithms
    have the error of `sample.report`, 3e-6, which is also the bound of nll.
    """
    part, x = stored("f32", 2 * CHUNK + 77, 96), rows_of(12, "f32", scale)
    base = x + np.float32(distance) * RNG.standard_normal(x.shape).astype(np.float32)
    target = RNG.integers(0, 2 * CHUNK, 12)
    logits, base_logits = (run_linear(linear.REFERENCE, "f32", rows, [part]) for rows in (x, base))
    found, exact = run(score_cpu.CPU, x, part, target, base), exactly(logits, base_logits, target)
    assert (found[:, [TOP, BASE_TOP, SAME_TOP]] == exact[:, [TOP, BASE_TOP, SAME_TOP]]).all()
    ulp, spread = 2.0**-24, np.ptp(base_logits, axis=1)
    nll_bound = 3e-6 + 2 * ulp * np.abs(exact[:, NLL]).max()
    for column in (NLL, BASE_NLL, TOP_LOGPROB):
        assert np.abs(found[:, column] - exact[:, column]).max() < nll_bound
    assert np.abs(found[:, DELTA_P] - exact[:, DELTA_P]).max() < 2 * nll_bound
    largest = np.abs(base_logits - logits).max(1)
    bound = 2 * largest * (spread + 265) * ulp + 6e-6 + 4 * ulp * np.abs(base_logits).max(1)
    assert (np.abs(found[:, KL] - exact[:, KL]) < bound).all()
    # measured errors are far smaller: the worst case of sums does not occur
    assert np.abs(found[:, KL] - exact[:, KL]).max() < 2e-6 * max(1, largest.max())


def grids():
    """Grids of each kind, for logits of a size of about 1."""
    made = {"off": [OFF], "integers": [INTEGER, 0.01, 100, 3, -128, 127], "q8": [Q8], "nvfp4": [NVFP4, 0.01, 100]}
    for name, (kind, scales) in {"e4m3": (FLOAT, [0.5, 2]), "int8": (MICROSCALED, [0, 0])}.items():
        made[name] = [kind, *scales, *SMALL_FLOATS[name]]
    return {name: np.float32(values + [0] * (GRID_WORDS - len(values))) for name, values in made.items()}


@pytest.mark.parametrize("name, grid", grids().items(), ids=grids())
def test_logits_pass_a_grid_before_they_are_scored(name, grid):
    """Base logits do not. The definition rounds a whole row at once, the kernel chunk after chunk."""
    part, x = stored("f32", CHUNK + 37, 96), rows_of(7, "f32")
    base, target = near(x), targets_of(7, CHUNK)
    expected = run(score.REFERENCE, x, part, target, base, grid=grid)
    same_bits(run(score_cpu.CPU, x, part, target, base, grid=grid, num_threads=2), expected)
    same_bits(run(score_cpu.CPU, x, part, target, grid=grid)[:, NLL], expected[:, NLL])
    logits, base_logits = (run_linear(linear_cpu.CPU, "f32", rows, [part]) for rows in (x, base))
    for row in logits:
        quantize_row(row, grid)
    by_hand = np.zeros_like(expected)
    for t, row in enumerate(logits):
        score.scores(row, base_logits[t], target[t], by_hand[t])
    same_bits(expected, by_hand)
    assert (name == "off") == (expected == run(score_cpu.CPU, x, part, target, base)).all()


@pytest.mark.parametrize("kind", [ROW_SYMMETRIC, ROW_ASYMMETRIC])
def test_a_grid_that_the_whole_row_would_make_is_seen(kind):
    part, x, grid = stored("f32", 70, 96), rows_of(3, "f32"), np.float32([kind, 0, 0, 0, -128, 127, 0, 0])
    for table in (score.REFERENCE, score_cpu.CPU):
        out = run(table, x, part, [1, 2, 3], near(x), grid=grid)
        assert np.isnan(out[:, [NLL, KL, DELTA_P, SAME_TOP, TOP]]).all() and np.isfinite(out[:, BASE_NLL]).all()


@pytest.mark.parametrize("format", FORMATS)
def test_a_base_of_the_same_rows_and_head_is_equal(format):
    part, x = head_of(format, CHUNK + 40), rows_of(9, format)
    out = run(score_cpu.CPU, x, part, targets_of(9, CHUNK), x, num_threads=2)
    assert (out[:, [KL, DELTA_P]] == 0).all() and (out[:, SAME_TOP] == 1).all()
    same_bits(out[:, [NLL, TOP]], out[:, [BASE_NLL, BASE_TOP]])


def test_without_a_base_its_columns_are_zero_and_without_a_target_there_is_no_nll():
    part, x = stored("f32", 50, 96), rows_of(4, "f32")
    alone = run(score_cpu.CPU, x, part, [3, -1, 49, -1])
    assert (alone[:, [BASE_NLL, KL, DELTA_P, SAME_TOP, BASE_TOP]] == 0).all()
    both = run(score_cpu.CPU, x, part, [3, -1, 49, -1], near(x))
    for out in (alone, both):
        assert (out[[1, 3], NLL] == 0).all() and (out[[0, 2], NLL] > 0).all()
    assert (both[[1, 3]][:, [BASE_NLL, DELTA_P]] == 0).all() and (both[:, KL] > 0).all()
    same_bits(both[:, [NLL, TOP, TOP_LOGPROB]], alone[:, [NLL, TOP, TOP_LOGPROB]])


@pytest.mark.parametrize("table", [score.REFERENCE, score_cpu.CPU], ids=["definition", "kernel"])
def test_a_target_that_is_no_token_is_seen(table):
    part, x = stored("f32", 50, 96), rows_of(4, "f32")
    out = run(table, x, part, [50, -2, 2**31 - 1, -(2**31)], near(x))
    assert np.isnan(out[:, [NLL, BASE_NLL, DELTA_P]]).all() and np.isfinite(out[:, [KL, SAME_TOP, TOP]]).all()


@pytest.mark.parametrize("format", ["f32", "q8_0"])
@pytest.mark.parametrize("vocabulary", [40, CHUNK + 40])
def test_rows_that_are_not_finite_are_seen(format, vocabulary):
    """Rows of the model, of the base, or of both; the other rows do not change."""
    part, x = stored(format, vocabulary, narrow(format)), rows_of(6, format)
    base, target = near(x), [3, 7, -1, 39, 0, 1]
    sound = run(score.REFERENCE, x, part, target, base)
    x[1, 5], x[2], x[4, 40], base[3, 2], base[4] = np.nan, np.inf, -np.inf, np.nan, np.inf
    out = run(score.REFERENCE, x, part, target, base)
    same_bits(run(score_cpu.CPU, x, part, target, base, num_threads=2), out)
    assert np.isnan(out[1:5][:, [KL, DELTA_P, SAME_TOP]]).all()
    assert np.isnan(out[[1, 2, 4]][:, [NLL, TOP, TOP_LOGPROB]]).all()
    assert np.isnan(out[[3, 4]][:, [BASE_NLL, BASE_TOP]]).all()
    same_bits(out[[0, 5]], sound[[0, 5]])
    same_bits(out[3][[NLL, TOP, TOP_LOGPROB]], sound[3][[NLL, TOP, TOP_LOGPROB]])
    same_bits(run(score_cpu.CPU, x, part, target), run(score.REFERENCE, x, part, target))


def test_logits_that_overflow_or_are_all_alike():
    """A head of ones and signs: minus infinity has no weight, ties go to the first, zeros are equal."""
    signs = np.ones((3 * CHUNK // 2, 2), np.float32)
    signs[::3, 0], signs[5::7, 1] = -1, -1
    part = StoredTensor("signs", "f32", signs.shape, signs)
    x = np.array([[0, 0], [1, 0], [0, -1], [3e38, 2e38], [-3e38, -3e38], [1e-40, 1e-41], [20, -20]], np.float32)
    base = np.array([[0, 0], [0, 1], [0, 0], [1, 0], [3e38, -2e38], [1e-41, 1e-40], [1, 1]], np.float32)
    target = [0, 1, 2, 3, 5, 4100, -1]
    for one, other in ((x, base), (base, x)):
        expected = run(score.REFERENCE, one, part, target, other)
        for num_threads in (1, 2):
            same_bits(run(score_cpu.CPU, one, part, target, other, num_threads=num_threads), expected)
        same_bits(run(score_cpu.CPU, one, part, target), run(score.REFERENCE, one, part, target))
    assert run(score_cpu.CPU, x[:1], part, [0])[0, TOP] == 0


def test_definition_interpreted():
    logits, base = RNG.standard_normal((2, 60)).astype(np.float32)
    for target in (3, -1, 60):
        made, slow = np.zeros((2, NUM_SCORES), np.float32)
        score.scores(logits, base, target, made)
        interpreted(score.scores)(logits, base, target, slow)
        same_bits(slow, made)


def test_other_targets_give_the_same_bits():
    """Also on a target without bf16 dot products, where only the products of pairs are flushed."""
    formats = ["bf16", "q8_0", "q4_k"]
    command = [sys.executable, "-m", "tests.ops.sampling.score_target", *formats]
    printed = subprocess.run(command, env=compiling_for("haswell"), capture_output=True, text=True, check=True).stdout
    assert printed.split() == [
        word for format in formats for word in (format, score_target.digest(format, score.REFERENCE))
    ]


# ---------------------------------------------------------------- the declaration


def declared(format="f32", V=50, K=96, base=True, **changes):
    """A recorded op, and its program."""
    program = Program()
    operands = dict(x=program.tensor("x", "T", K), target=program.give("target", "T", 1, "i32"))
    if base:
        operands["base_x"] = program.tensor("base", "T", K)
    for x in (operands["x"], *([operands["base_x"]] if base else [])):
        program.emit(Given(out=x))
    head = Weight("head", format, (V, K), (stored(format, V, K),))
    operands |= dict(weight=head) | (dict(base_weight=head) if base else {})
    outputs = dict(out=program.tensor("scores", "T", NUM_SCORES), scratch=program.tensor("s", "T", scratch_width(V)))
    sizes = dict(in_features=K, vocab_size=V, scratch_width=scratch_width(V))
    return Score(**operands | outputs | sizes | changes), program


@pytest.mark.parametrize("format, preparation", [("f32", ""), ("q8_0", "quantize_q8"), ("bf16", "round_bf16")])
def test_lowering_prepares_rows_of_both_heads(format, preparation):
    op, program = declared(format)
    program.emit(op)
    made = lower(program).ops
    expected = ["given", "given", *([preparation] * 2 if preparation else []), f"score_{format}"]
    assert [each.kind for each in made] == expected
    assert (made[-1].x is op.x) == (not preparation) and made[-1].weight is made[-1].base_weight
    op, program = declared(format)
    program.emit(op.changed(base_x=op.x))
    assert len(lower(program).ops) == (4 if preparation else 3)


def test_lowering_prepares_rows_of_heads_of_two_formats():
    op, program = declared("q8_0")
    plain = Weight("plain", "f32", (50, 96), (stored("f32", 50, 96),))
    program.emit(op.changed(base_weight=plain, base_f32=True))
    made = lower(program).ops
    assert [each.kind for each in made] == ["given", "given", "quantize_q8", "score_q8_0_base_f32"]
    assert made[-1].base_x is op.base_x and made[-1].x is made[2].out
    op, program = declared("f32")
    coded = program.tensor("coded", "T", row_width(96), "i8")
    program.emit(Given(out=coded))
    program.emit(op.changed(x=coded, weight=Weight("codes", CODES, (50, 96), ()), base_f32=True))
    assert lower(program).ops[-1].kind == "score_codes_base_f32"


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(base_x=None), "base_x and base_weight are given both or neither"),
        (dict(base_weight=None), "base_x and base_weight are given both or neither"),
        (dict(format="q8_0"), "format is 'q8_0', expected that of the weight, 'f32'"),
        (dict(vocab_size=49), r"weight \(head\) is 50 x 96 wide, expected 49 x 96"),
        (
            dict(base_weight=Weight("b", "q8_0", (50, 96), ())),
            "the base's head is q8_0, expected f32 or f32 as the oth",
        ),
        (dict(base_f32=True), "base_f32 is True for a base's head in f32 beside one in f32"),
        (
            dict(weight=Weight("b", "q8_0", (50, 96), ())),
            "base_f32 is False for a base's head in f32 beside one in q8_0",
        ),
        (dict(weight=Weight("b", CODES, (50, 96), ()), base_f32=True), "x is x f32.T, 96., expected i8.T, 208."),
    ],
)
def test_wrong_operands_are_named(changes, message):
    op, _ = declared()
    with pytest.raises(ValueError, match=message):
        op.changed(**changes)


def test_a_scratch_that_is_too_small_is_refused():
    op, program = declared()
    with pytest.raises(ValueError, match="scratch_width is 8, expected 9 for 50 tokens"):
        op.changed(scratch=program.tensor("small", "T", 8), scratch_width=8)


def test_a_vocabulary_that_no_float_holds_is_refused():
    V = 2**24 + 1
    with pytest.raises(ValueError, match="expected 0 < vocab_size <= 16777216, got vocab_size 16777217"):
        declared()[0].changed(vocab_size=V, scratch_width=scratch_width(V))
    assert num_chunks(V) == 4097
