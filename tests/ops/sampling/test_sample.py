"""Sampling: the kernel equals the definition bit for bit, and the definition draws what its description says."""

import numpy as np
import pytest

from lockstep.native.kernel import interpreted
from lockstep.ops.sampling import sample, sample_cpu
from lockstep.ops.sampling.philox import noise
from lockstep.ops.sampling.sample import Sample, scratch_width
from lockstep.runtime.program import Tensor
from tests.ops.harness import ragged_step, run_op, same_bits

RNG = np.random.default_rng(0)
GREEDY = dict(temperature=0)


def run_all(backend, logits, settings, num_threads=1, adjusted=None):
    """Everything that the op writes for rows of logits, each row with its settings (a dict of record fields)."""
    records = np.zeros(len(settings), sample.SAMPLING_RECORD)
    for record, chosen in zip(records, settings, strict=True):
        for name, value in {"temperature": 1, "top_p": 1, "seed": 5, "position": 9, **chosen}.items():
            record[name] = value
    step, _held = ragged_step([1] * len(logits), sampling=records)
    # columns past the vocabulary are not read, nor rows of adjusted logits without an adjustment
    rows, adjusted_rows = (
        np.pad(x, ((0, 0), (0, 5)), constant_values=1e30)
        for x in (logits, np.full_like(logits, 1e30) if adjusted is None else adjusted)
    )
    V = logits.shape[1]
    sizes = dict(vocab_size=V, width=rows.shape[1], scratch_width=scratch_width(V))
    out = run_op(backend, Sample, step, num_threads, "R", logits=rows, adjusted=adjusted_rows, **sizes)
    return {name: out[name] for name in ("token", "logprob", "top_token", "top_logprob")}


def run(backend, logits, settings, num_threads=1):
    """Tokens and logprobs."""
    out = run_all(backend, logits, settings, num_threads)
    return np.rec.fromarrays([out["token"][:, 0], out["logprob"][:, 0]], names="token,logprob")


def same_outputs(logits, settings, adjusted=None):
    """The fast kernel, on one thread and on three, equals the definition in all that it writes, and writes no more."""
    expected = run_all(sample.REFERENCE, logits, settings, 1, adjusted)
    for threads in (1, 3):
        found = run_all(sample_cpu.CPU, logits, settings, threads, adjusted)
        for name in expected:
            same_bits(found[name], expected[name])
    return expected


def logits_of(rows, vocabulary, scale=3.0):
    return (scale * RNG.standard_normal((rows, vocabulary))).astype(np.float32)


SETTINGS = [
    GREEDY,
    {},
    dict(temperature=0.3),
    dict(top_k=1),
    dict(top_k=5, temperature=0.7),
    dict(top_k=20, top_p=0.95),
    dict(top_p=0.9),
    dict(top_p=0.5, min_p=0.1),
    dict(min_p=0.05),
    dict(top_p=0),
    dict(top_k=40, top_p=0.3, min_p=0.2),
    dict(temperature=3, top_p=0.999),
    dict(top_k=700, top_p=0.8),
    dict(min_p=1),
    dict(seed=-2, position=2**33),
]


@pytest.mark.parametrize("vocabulary", [1, 2, 15, 16, 17, 63, 65, 255, 257, 1000, 4095, 4097, 20011])
def test_kernel_equals_definition(vocabulary):
    logits = logits_of(len(SETTINGS), vocabulary)
    expected = run(sample.REFERENCE, logits, SETTINGS)
    for threads in (1, 3):
        same_bits(run(sample_cpu.CPU, logits, SETTINGS, threads), expected)


@pytest.mark.parametrize("vocabulary", [3, 300, 5000])
def test_ties_zeros_and_forbidden_tokens(vocabulary):
    for levels in ([0.0, -0.0], [1.5], [2.0, 1.0, -np.inf], [-1.0, -np.inf, 0.0, -0.0], [-np.inf]):
        logits = RNG.choice(np.array(levels, np.float32), (len(SETTINGS), vocabulary))
        same_bits(run(sample_cpu.CPU, logits, SETTINGS, 2), run(sample.REFERENCE, logits, SETTINGS))


@pytest.mark.parametrize("scale", [1e-3, 0.5, 30])
@pytest.mark.parametrize("vocabulary", [9000, 40000])
def test_flat_and_peaked_rows(scale, vocabulary):
    logits = logits_of(len(SETTINGS), vocabulary, scale)
    same_bits(run(sample_cpu.CPU, logits, SETTINGS, 2), run(sample.REFERENCE, logits, SETTINGS))


def test_definition_compiled_equals_interpreted():
    logits = logits_of(len(SETTINGS), 40)
    expected = run(sample.REFERENCE, logits, SETTINGS)
    for row, settings, (token, logprob) in zip(logits, SETTINGS, expected, strict=True):
        full = {"temperature": 1, "top_p": 1, "seed": 5, "position": 9, "top_k": 0, "min_p": 0, **settings}
        with np.errstate(over="ignore", invalid="ignore"):
            slow = interpreted(sample.sample_row)(
                row,
                np.float32(full["temperature"]),
                full["top_k"],
                np.float32(full["top_p"]),
                np.float32(full["min_p"]),
                np.int64(full["seed"]),
                np.int64(full["position"]),
            )
            likeliest, logprobs = np.zeros(20, np.int32), np.zeros(20, np.float32)
            slow_logprob = interpreted(sample.report)(row, slow, 7, likeliest, logprobs)
        assert (slow, np.float32(slow_logprob).tobytes()) == (token, logprob.tobytes())
        fast = run_all(sample_cpu.CPU, row[None], [dict(settings, num_logprobs=7)])
        same_bits(fast["top_token"][0, :7], likeliest[:7])
        same_bits(fast["top_logprob"][0, :7], logprobs[:7])


def test_greedy_takes_the_first_largest_and_logprob_is_accurate():
    logits = logits_of(20, 9000)
    logits[:, [17, 5000, 8999]] = 20
    out = run(sample.REFERENCE, logits, [GREEDY] * 20)
    assert (out.token == 17).all()
    x = logits.astype(np.float64)
    exact = (x - np.log(np.exp(x).sum(1, keepdims=True)))[np.arange(20), out.token]
    assert np.abs(out.logprob - exact).max() < 3e-6


def kept_exactly(x, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """The kept tokens, straight from the description, in float64."""
    order = np.argsort(-x, kind="stable")[: top_k or x.size]
    p = np.exp((x[order] - x.max()) / temperature)
    before = np.concatenate([[0], np.cumsum(p)[:-1]]) / p.sum()
    return set(order[(before < top_p) & (p >= min_p) | (np.arange(p.size) == 0)])


@pytest.mark.parametrize(
    "settings",
    [
        dict(top_k=3),
        dict(top_p=0.7),
        dict(min_p=0.21),
        dict(temperature=0.5, top_k=6, top_p=0.8),
        dict(temperature=2, top_k=9, top_p=0.9, min_p=0.3),
    ],
)
def test_exactly_the_kept_tokens_are_drawn(settings):
    row = np.log(np.array([1, 2, 30, 4, 11, 6, 7, 8, 9, 10, 5, 12, 3, 14, 20, 25], np.float32))
    draws = run(sample_cpu.CPU, np.tile(row, (3000, 1)), [dict(settings, position=i) for i in range(3000)], 2).token
    assert set(draws) == kept_exactly(row.astype(np.float64), **settings)


def test_draws_follow_the_softmax():
    row, draws = logits_of(1, 12, 1.0)[0], 40000
    settings = [dict(temperature=0.8, seed=3, position=i) for i in range(draws)]
    tokens = run(sample_cpu.CPU, np.tile(row, (draws, 1)), settings).token
    p = np.exp(row.astype(np.float64) / 0.8)
    expected = draws * p / p.sum()
    chi2 = ((np.bincount(tokens, minlength=12) - expected) ** 2 / expected).sum()
    assert chi2 < 31.3  # 11 degrees of freedom, 1 in 1000


def test_choice_depends_on_seed_and_position_only():
    logits, settings = np.tile(logits_of(1, 500), (4, 1)), dict(seed=7, position=3)
    alone = run(sample_cpu.CPU, logits[:1], [settings]).token[0]
    others = [dict(seed=8, position=3), settings, GREEDY, dict(seed=7, position=4)]
    together = run(sample_cpu.CPU, logits, others).token
    assert together[1] == alone
    scores = logits[0] + np.array([noise(7, 3, i) for i in range(500)], np.float32)
    assert alone == scores.argmax()


# ---------------------------------------------------------------- log-probabilities

ASKING = [dict(num_logprobs=n, temperature=t) for n in (0, 1, 2, 3, 5, 19, 20) for t in (0, 0.9)]


@pytest.mark.parametrize("vocabulary", [1, 2, 3, 17, 31, 32, 33, 257, 4096 + 5, 9000])
def test_likeliest_tokens_of_kernel_and_definition(vocabulary):
    same_outputs(logits_of(len(ASKING), vocabulary), ASKING)


@pytest.mark.parametrize("vocabulary", [3, 21, 300, 5000])
def test_likeliest_tokens_with_ties_zeros_and_few_finite_logits(vocabulary):
    for levels in ([0.0, -0.0], [1.5], [2.0, 1.0, -np.inf], [-np.inf], [-np.inf] * 200 + [1.0], [-3e38, -3.4028235e38]):
        same_outputs(RNG.choice(np.array(levels, np.float32), (len(ASKING), vocabulary)), ASKING)


def test_likeliest_tokens_in_float64():
    logits = logits_of(6, 5003)
    logits[:, [40, 41, 5000]] = 12
    out = run_all(sample_cpu.CPU, logits, [dict(num_logprobs=20)] * 6, 2)
    x = logits.astype(np.float64)
    exact = x - np.log(np.exp(x).sum(1, keepdims=True))
    for row, tokens, logprobs in zip(exact, out["top_token"], out["top_logprob"], strict=True):
        assert tokens.tolist() == sorted(range(5003), key=lambda i: (-row[i], i))[:20]
        assert np.abs(row[tokens] - logprobs).max() < 3e-6


def test_a_given_token_is_not_chosen_and_its_logprob_is_that_of_the_same_token_chosen():
    logits = logits_of(40, 4100)
    chosen = run_all(sample_cpu.CPU, logits, [dict(position=i, num_logprobs=3) for i in range(40)])
    settings = [dict(given=1 + t, num_logprobs=3, temperature=i % 2) for i, t in enumerate(chosen["token"][:, 0])]
    given = same_outputs(logits, settings)
    for name in chosen:
        same_bits(given[name], chosen[name])
    others = [dict(given=1 + (t + 1) % 4100) for t in chosen["token"][:, 0]]
    assert (run(sample_cpu.CPU, logits, others).logprob != chosen["logprob"][:, 0]).all()


@pytest.mark.parametrize("vocabulary", [2, 33, 4101])
def test_an_adjusted_row_chooses_by_adjusted_logits_and_reports_by_its_own(vocabulary):
    settings = [dict(s, adjustment=(i + 1) % 3 and 1, num_logprobs=i) for i, s in enumerate(SETTINGS)]
    logits, adjusted = logits_of(len(settings), vocabulary), logits_of(len(settings), vocabulary)
    adjusted[:, 1:][RNG.random((len(settings), vocabulary - 1)) < 0.3] = -np.inf
    adjusted[4] = -np.inf
    out = same_outputs(logits, settings, adjusted)
    is_adjusted = np.array([s["adjustment"] != 0 for s in settings])
    same_bits(
        out["token"][:, 0], run(sample.REFERENCE, np.where(is_adjusted[:, None], adjusted, logits), SETTINGS).token
    )
    x = logits.astype(np.float64)
    exact = (x - np.log(np.exp(x).sum(1, keepdims=True)))[np.arange(len(settings)), out["token"][:, 0]]
    assert np.abs(out["logprob"][:, 0] - exact).max() < 3e-6


@pytest.mark.parametrize("temperature", [1e-3, 0.02, 0.5, 1, 20, 1e4])
def test_groups_that_cannot_win_are_left_out_and_nothing_else(temperature):
    """Rows on which a draw is won by a narrow margin, at any size of logit: long, flat, and with many equal logits."""
    rows = [logits_of(1, 20011, scale)[0] for scale in (1e-4, 1.0, 8.0)]
    rows += [RNG.choice(np.array(levels, np.float32), 20011) for levels in ([0.0, 1.0], [-50.0, -50.5], [3e4, 3e4 - 8])]
    logits = np.array(rows * 3)
    settings = [dict(temperature=temperature, position=i, min_p=(0, 0.01)[i % 2]) for i in range(len(logits))]
    same_outputs(logits, settings)


# ---------------------------------------------------------------- what only a broken model or machine makes

BROKEN = [np.float32(np.nan), np.float32(np.inf), np.array(0xFFC12345, np.uint32).view(np.float32)]
ASKED = [dict(s, num_logprobs=3 + i % 3) for i, s in enumerate(SETTINGS)]


@pytest.mark.parametrize("vocabulary", [1, 17, 257, 4101])
@pytest.mark.parametrize("value", BROKEN, ids=["nan", "inf", "payload"])
def test_a_row_that_is_not_sound_has_no_logprobs_and_a_token_of_the_vocabulary(vocabulary, value):
    """One bad logit at any place, or nothing but bad ones; a neighbour's row is what it is without them."""
    logits = logits_of(len(ASKED), vocabulary)
    for r in range(0, len(ASKED) - 1):
        logits[r, RNG.integers(vocabulary) if r % 3 else slice(None)] = value
    out = same_outputs(logits, ASKED)
    assert (out["token"][:-1] == 0).all() and np.isnan(out["logprob"][:-1]).all()
    for settings, tokens, logprobs in zip(ASKED[:-1], out["top_token"][:-1], out["top_logprob"][:-1], strict=True):
        count = min(settings["num_logprobs"], vocabulary)
        assert tokens[:count].tolist() == list(range(count)) and np.isnan(logprobs[:count]).all()
    alone = same_outputs(logits[-1:], ASKED[-1:])
    for name in alone:
        same_bits(out[name][-1:], alone[name])


@pytest.mark.parametrize("vocabulary", [5, 4101])
def test_adjusted_rows_of_which_one_side_is_not_sound(vocabulary):
    settings = [dict(s, adjustment=1) for s in ASKED]
    sound, broken = logits_of(len(settings), vocabulary), logits_of(len(settings), vocabulary)
    broken[:, vocabulary // 2] = np.nan
    for logits, adjusted in ((sound, broken), (broken, sound), (broken, broken)):
        out = same_outputs(logits, settings, adjusted)
        assert np.isnan(out["logprob"]).all() and (out["token"] >= 0).all() and (out["token"] < vocabulary).all()
    given = same_outputs(broken, [dict(given=1 + vocabulary // 2, num_logprobs=2)] * len(settings))
    assert (given["token"] == vocabulary // 2).all() and np.isnan(given["logprob"]).all()


@pytest.mark.parametrize("temperature", [1e-3, 0.5])
def test_logits_at_the_end_of_the_range_are_chosen_like_others(temperature):
    """Their division by the temperature overflows: then the largest is taken, as at temperature 0."""
    for levels in ([3.4e38, 3e38, 1.0], [-3.4e38, -3e38], [3.4e38, -3.4e38, -np.inf], [3.4e35, 1e35, 0]):
        logits = RNG.choice(np.array(levels, np.float32), (len(ASKED), 4101))
        out = same_outputs(logits, [dict(s, temperature=temperature) for s in ASKED])
        assert (logits[np.arange(len(ASKED)), out["token"][:, 0]] == logits.max(1)).all()


def test_rows_that_are_not_sound_by_the_interpreted_definition():
    row = logits_of(1, 9)[0]
    row[4] = np.nan
    tokens, logprobs = np.zeros(20, np.int32), np.zeros(20, np.float32)
    choose, one = interpreted(sample.sample_row), np.float32(1)
    chosen = choose(row, one, 0, one, np.float32(0), np.int64(1), np.int64(2))
    assert chosen == 0 and np.isnan(interpreted(sample.report)(row, 0, 2, tokens, logprobs)) and tokens[1] == 1


def test_scratch_of_another_vocabulary_is_refused():
    outputs = dict(token=Tensor("t", "R", 1, "i32"), logprob=Tensor("p", "R", 1), scratch=Tensor("s", "R", 54))
    outputs.update(top_token=Tensor("tt", "R", 20, "i32"), top_logprob=Tensor("tp", "R", 20))
    rows = dict(logits=Tensor("l", "R", 5008), adjusted=Tensor("a", "R", 5008), width=5008)
    with pytest.raises(ValueError, match="Sample: scratch_width is 54, expected 92 for 5000 tokens"):
        Sample(vocab_size=5000, scratch_width=54, **outputs, **rows)
