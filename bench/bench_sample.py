"""Sampling: time of the ops after the head, by the sampling parameters of the rows.

    python bench/bench_sample.py [--threads 2] [--rounds 40] [--vocabulary 151936]

Logits are normally distributed, with 300 tokens that stand out as in a language model, or without ("flat": the worst
case). Medians; the two ops are adjust_logits and sample.
"""

from types import SimpleNamespace

import numpy as np
from options import Parser, whole_number

from lockstep.engine.cache.pages import everywhere
from lockstep.engine.model import emit_sampling
from lockstep.engine.request import SamplingParams
from lockstep.engine.runner import Limits, Runner, Span
from lockstep.engine.sampling import Adjustment
from lockstep.ops import BACKENDS
from lockstep.ops.elementwise.embed import Embed
from lockstep.ops.elementwise.select_rows import SelectRows, selected_rows
from lockstep.runtime.program import Program, Weight
from lockstep.runtime.threads import Team
from lockstep.weights.store import WeightStore
from lockstep.weights.tensor import StoredTensor

ROWS, PENALIZED = 8, 2000
WISHES = {
    "greedy": {},
    "greedy, 20 alternatives": dict(logprobs=20),
    "temperature 0.8": dict(temperature=0.8),
    "temperature 0.7, top-k 20, top-p 0.8": dict(temperature=0.7, top_k=20, top_p=0.8),
    "temperature 1, top-p 0.95": dict(temperature=1.0, top_p=0.95),
    "temperature 1, min-p 0.05": dict(temperature=1.0, min_p=0.05),
    f"greedy, penalties of {PENALIZED} tokens": dict(repetition_penalty=1.1),
    "greedy, a mask": dict(logits_mask=True),
}


def model(vocabulary, flat):
    """A model for a Runner whose logits are the rows of a table."""
    logits = (3 * np.random.RandomState(1).standard_normal((ROWS, vocabulary))).astype(np.float32)
    if not flat:
        logits[:, np.random.RandomState(2).permutation(vocabulary)[:300]] += np.linspace(14, 0, 300, dtype=np.float32)
    program, stored = Program(), StoredTensor("logits", "f32", logits.shape, logits)
    table = Weight("logits", "f32", logits.shape, (stored,))
    rows, made = program.tensor("rows", "T", vocabulary), program.tensor("logits", "R", vocabulary)
    program.emit(Embed(out=rows, table=table, width=vocabulary, scale=1.0))
    program.emit(SelectRows(out=made, x=rows, width=vocabulary, selected=selected_rows("R")))
    emit_sampling(program, made, vocabulary)
    ops = {**BACKENDS["reference"], **BACKENDS["cpu"]}
    return SimpleNamespace(
        backend=lambda swaps, base: ops,
        rewritten=lambda backend, fused: program,
        store=WeightStore(),
        max_context=ROWS,
    )


def fields(wishes, vocabulary):
    """(Fields of a row's record, the arrays that hold their memory)."""
    if "logits_mask" in wishes:
        bits = np.full(-(-vocabulary // 32), 0x7FFFFFFF, np.uint32)
        wishes = dict(logits_mask=lambda _: bits)
    p = SamplingParams(max_tokens=1, **wishes)
    adjustment = Adjustment(list(range(PENALIZED)), p, frozenset(), vocabulary)
    return dict(
        temperature=p.temperature,
        top_p=p.top_p,
        min_p=p.min_p,
        top_k=p.top_k,
        seed=1,
        position=1,
        num_logprobs=p.logprobs or 0,
        **adjustment.rows([])[0],
    ), adjustment


def microseconds(runner, record, num_rows, rounds):
    """Median time of each of the last two ops."""
    span = Span(list(range(num_rows)), 0, everywhere([0]), 0, dict.fromkeys(range(num_rows), record))
    clock = np.zeros(4, np.int64)
    times = []
    for _ in range(rounds):
        runner.step([span], clock)
        times.append(np.diff(clock)[1:])
    return np.median(times, axis=0) / 1e3


def main():
    parser = Parser(__doc__)
    parser.add_threads()
    parser.add_counts(rounds=40)
    parser.add_argument("--vocabulary", type=whole_number(PENALIZED), default=151936)
    args = parser.parse_args()
    team = Team(args.threads)
    print(f"{'':40}{'1 row':>16}{f'{ROWS} rows':>16}   us, adjust_logits + sample")
    for flat in (False, True):
        runner = Runner(model(args.vocabulary, flat), team, Limits(ROWS, 1, 1, ROWS))
        for name, wishes in WISHES.items():
            record, _held = fields(wishes, args.vocabulary)
            cells = [microseconds(runner, record, n, args.rounds) for n in (1, ROWS)]
            print(f"{name + ', flat' * flat:40}" + "".join(f"{f'{a:.0f} + {s:.0f}':>16}" for a, s in cells))
    team.close()


if __name__ == "__main__":
    main()
