"""Penalties, biases and masks: the kernel equals the definition, which is what the options say."""

import numpy as np
import pytest

from lockstep.native.kernel import interpreted
from lockstep.ops.sampling import adjust_logits, adjust_logits_cpu, sample
from lockstep.ops.sampling.adjust_logits import AdjustLogits, Bias, Penalties
from tests.ops.harness import ragged_step, run_op, same_bits

SIZES = (1, 2, 3, 17, 31, 32, 33, 300, 4096 + 5)
NOTHING = dict(seen=(), repetition=1.0, presence=0.0, frequency=0.0, bias={}, banned=(), mask=None)


def arguments(options):
    """The arrays and numbers of a row's options, as the definition takes them. mask: a list of booleans."""
    w = {**NOTHING, **options}
    bits = np.zeros(0, np.int32)
    if w["mask"] is not None:
        padded = np.zeros(-(-len(w["mask"]) // 32) * 32, bool)
        padded[: len(w["mask"])] = w["mask"]
        bits = np.packbits(padded, bitorder="little").view(np.int32)
    return (
        np.array(w["seen"], np.int32).reshape(-1, 2),
        Penalties(*(np.float32(w[name]) for name in Penalties._fields)),
        Bias(np.array(list(w["bias"]), np.int32), np.array(list(w["bias"].values()), np.float32)),
        np.array(w["banned"], np.int32),
        bits,
    )


def run(backend, logits, rows, num_threads=1):
    """Adjusted logits; rows: the options of each (a dict), or None. Unwritten elements are NaN."""
    records, held = np.zeros(len(rows), sample.SAMPLING_RECORD), []
    for record, options in zip(records, rows, strict=True):
        if options is not None:
            seen, penalties, (ids, bias), banned, mask = arguments(options)
            made = np.zeros(1, adjust_logits.ADJUSTMENT_RECORD)
            made[0] = (*(a.ctypes.data for a in (seen, ids, bias, banned)), len(ids), *penalties)
            record["adjustment"], record["mask"] = made.ctypes.data, mask.ctypes.data if mask.size else 0
            record["num_seen"], record["num_banned"] = len(seen), len(banned)
            held += [seen, ids, bias, banned, mask, made]
    step, _arrays = ragged_step([1] * len(logits), sampling=records)
    width = -(-logits.shape[1] // 16) * 16
    padded = np.pad(logits, ((0, 0), (0, width - logits.shape[1])), constant_values=7)
    operands = dict(logits=padded, vocab_size=logits.shape[1], width=width)
    out = run_op(backend, AdjustLogits, step, num_threads, "R", **operands)["out"]
    return out[:, : logits.shape[1]]


def random_row(rng, vocabulary):
    """Random options of a row."""
    tokens = rng.integers(0, vocabulary, rng.integers(0, 30))
    prompt, output = tokens[: len(tokens) // 2], tokens[len(tokens) // 2 :].tolist()
    seen = [(t, 0) for t in dict.fromkeys(prompt.tolist())]
    seen += [(t, output[: n + 1].count(t)) for n, t in enumerate(output)]
    some = lambda size: rng.permutation(vocabulary)[:size].tolist()
    return dict(
        seen=seen if rng.random() < 0.8 else (),
        repetition=rng.choice([1.0, 1.3, 0.7]),
        presence=rng.choice([0.0, 0.6, -2.0]),
        frequency=rng.choice([0.0, 0.2, -1.1]),
        bias={t: rng.choice([-100.0, 3.5, 100.0]) for t in some(rng.integers(0, 5))},
        banned=some(rng.integers(0, 3)),
        mask=(rng.random(vocabulary) < 0.6) if rng.random() < 0.6 else None,
    )


def many(vocabulary, seed=0, num_rows=24):
    rng = np.random.default_rng(seed)
    rows = [random_row(rng, vocabulary) if i % 4 else None for i in range(num_rows)]
    return (4 * rng.standard_normal((num_rows, vocabulary))).astype(np.float32), rows


@pytest.mark.parametrize("vocabulary", SIZES)
def test_kernel_equals_definition_and_writes_only_adjusted_rows(vocabulary):
    logits, rows = many(vocabulary)
    logits[5], logits[6, ::2] = -0.0, -np.inf
    expected = run(adjust_logits.REFERENCE, logits, rows)
    for threads in (1, 2, 5):
        same_bits(run(adjust_logits_cpu.CPU, logits, rows, threads), expected)
    adjusted = np.array([r is not None for r in rows])
    assert np.isnan(expected[~adjusted]).all() and not np.isnan(expected[adjusted]).any()


def test_definition_compiled_equals_interpreted():
    logits, rows = many(40)
    expected = run(adjust_logits.REFERENCE, logits, rows)
    for x, options, found in zip(logits, rows, expected, strict=True):
        if options is not None:
            out = np.empty_like(x)
            interpreted(adjust_logits.adjust_row)(x, *arguments(options), out)
            same_bits(out, found)


def in_float64(x, w):
    """What the options mean, straight from their description."""
    w, y = {**NOTHING, **w}, x.astype(np.float64)
    counts = dict(map(tuple, w["seen"]))  # the last entry of a token counts
    for t, count in counts.items():
        y[t] = y[t] / w["repetition"] if y[t] > 0 else y[t] * w["repetition"]
        y[t] -= count * w["frequency"] + (count > 0) * w["presence"]
    for t, b in w["bias"].items():
        y[t] += b
    y[[t for t in w["banned"]]] = -np.inf
    return y if w["mask"] is None else np.where(w["mask"], y, -np.inf)


@pytest.mark.parametrize("vocabulary", [3, 50, 4101])
def test_accuracy_in_float64(vocabulary):
    logits, rows = many(vocabulary, 1, 60)
    for x, options, found in zip(logits, rows, run(adjust_logits.REFERENCE, logits, rows), strict=True):
        if options is not None:
            exact = in_float64(x, options)
            assert (np.isneginf(found) == np.isneginf(exact)).all()
            finite = np.isfinite(exact)
            np.testing.assert_allclose(found[finite], exact[finite], rtol=3e-7, atol=3e-5)  # a bias is up to 100


def test_a_row_does_not_depend_on_the_others():
    logits, rows = many(333)
    together = run(adjust_logits_cpu.CPU, logits, rows, 3)
    for x, options, found in zip(logits, rows, together, strict=True):
        same_bits(run(adjust_logits_cpu.CPU, x[None], [options])[0], found)
    order = np.random.default_rng(3).permutation(len(rows))
    same_bits(run(adjust_logits_cpu.CPU, logits[order], [rows[i] for i in order], 2), together[order])


def test_a_prefix_of_what_was_seen_gives_an_earlier_position():
    x, outputs = np.array([[2.0, -1.0, 0.5, 3.0]], np.float32), [3, 0, 3, 3]
    seen = [(1, 0)] + [(t, outputs[: n + 1].count(t)) for n, t in enumerate(outputs)]
    for n, expected in (
        (1, [2, -2, 0.5, 3]),
        (2, [2, -2, 0.5, 0.25]),
        (3, [-0.25, -2, 0.5, 0.25]),
        (5, [-0.25, -2, 0.5, -1.75]),
    ):
        options = dict(seen=seen[:n], repetition=2.0, presence=0.25, frequency=1.0)
        assert run(adjust_logits_cpu.CPU, x, [options])[0].tolist() == expected


def test_nothing_overflows_to_plus_infinity_or_nan():
    x = np.array([[3.4e38, -3.4e38, 3.4e38, -np.inf]], np.float32)
    seen = [(i, 5) for i in range(4)]
    for repetition in (0.01, 100.0):
        for sign in (-2.0, 2.0):
            out = run(
                adjust_logits_cpu.CPU,
                x,
                [
                    dict(
                        seen=seen,
                        repetition=repetition,
                        presence=sign,
                        frequency=sign,
                        bias={0: 100.0, 1: -100.0, 3: 100.0},
                    )
                ],
            )
            assert not (np.isnan(out) | np.isposinf(out)).any() and np.isneginf(out[0, 3])


@pytest.mark.parametrize("backend", [adjust_logits.REFERENCE, adjust_logits_cpu.CPU])
def test_tokens_past_the_row_are_passed_over(backend):
    logits = np.random.default_rng(3).standard_normal((1, 40)).astype(np.float32)
    within = dict(seen=[(3, 1), (39, 2)], repetition=1.5, frequency=0.5, bias={5: 2.0, 38: -1.0}, banned=(7,))
    past = dict(
        within, seen=[(3, 1), (40, 9), (39, 2), (47, 1)], bias={5: 2.0, 40: 5.0, 38: -1.0, 95: 1.0}, banned=(7, 41)
    )
    same_bits(run(backend, logits, [past]), run(backend, logits, [within]))
