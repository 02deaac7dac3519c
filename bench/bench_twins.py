"""Both twins of a rounded model on one window: `prefill` (head by head) against `prefill_reference` (an op a layer).

    python bench/bench_twins.py FOLDER [--tokens 512] [--threads 2] [--rounds 7] [--weights f32]

Every site has an int16 grid. The programs run interleaved, without head and score. Printed are medians of wall clock
and of processor time (the better measure on a shared machine, with --threads 1), the time that making a program takes,
its number of ops, the memory of its activations, and whether the hidden states have equal bits.
"""

import statistics
import time
from contextlib import closing

import numpy as np
from options import Parser, folder

from lockstep.engine.model import load_model
from lockstep.models.checkpoint import open_checkpoint
from lockstep.ops.rounded.grids import INTEGER
from lockstep.ptq.rewrite import INSIDE, Rounded, Treatment
from lockstep.ptq.unroll import unroll
from lockstep.runtime.executor import lay_out
from lockstep.runtime.program import Program
from lockstep.runtime.threads import Team
from lockstep.study.scoring.rig import Rig
from lockstep.weights.store import WeightStore

GRID = np.array([INTEGER, 1 / 1024, 1024, 0, -32768, 32767, 0, 0], np.float32)


def unrolled(rounded: Rounded) -> Program:
    return unroll(rounded.program)


def build(model, team, num_tokens, additive, change):
    """(rig, seconds that it took to make)."""
    started = time.perf_counter()
    treatment = Treatment(inside=INSIDE, additive=additive, max_keys=num_tokens)
    rig = Rig(model, treatment, team, num_tokens, change)
    seconds = time.perf_counter() - started
    rig.set_grids(dict.fromkeys(rig.rounded.grids, GRID))
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, num_tokens).tolist()
    rig.load(ids, [-1] * num_tokens)
    return rig, seconds


def seconds(rig):
    """(wall clock, processor time) of one window."""
    started, busy = time.perf_counter(), time.process_time()
    rig.run(0, rig.score_index)
    return time.perf_counter() - started, time.process_time() - busy


def memory(rig):
    """Bytes of a program's activations."""
    rows = dict.fromkeys("TOE", rig.length) | dict(R=1, S=1)
    return lay_out(rig.program, rows, False, rig.program.given)[1]


def compare(model, team, num_tokens, additive, rounds):
    """Prints a line for each twin."""
    rigs = {name: build(model, team, num_tokens, additive, change) for name, change in CHANGES.items()}
    times = {name: [] for name in rigs}
    for _ in range(rounds + 1):
        for name, (rig, _) in rigs.items():
            times[name].append(seconds(rig))
    medians = {name: [statistics.median(each) for each in zip(*some[1:], strict=True)] for name, some in times.items()}
    hidden = [rig.hidden().tobytes() for rig, _ in rigs.values()]
    for name, (rig, made) in rigs.items():
        pairs = zip(("wall", "busy"), medians[name], medians["prefill_reference"], strict=True)
        shown = "  ".join(f"{clock} {1e3 * taken:8.1f} ms {taken / least:5.2f}x" for clock, taken, least in pairs)
        print(
            f"{'additive' if additive else 'structural':11}{name:18} {shown}  "
            f"{len(rig.program.ops):6} ops, {memory(rig) / 1e6:.0f} MB, made in {made:.2f} s"
        )
    print(f"{'':11}equal bits: {hidden[0] == hidden[1]}")


CHANGES = {"prefill_reference": None, "prefill": unrolled}


def main():
    parser = Parser(__doc__)
    parser.add_argument("folder", type=folder)
    parser.add_counts(tokens=512, rounds=7)
    parser.add_threads()
    parser.add_argument("--weights", default="f32")
    args = parser.parse_args()
    with parser.refusing():
        model = load_model(open_checkpoint(args.folder), WeightStore(), args.weights, "f32", args.tokens)
    if args.tokens > model.max_context:
        parser.error(f"--tokens {args.tokens}: expected at most {model.max_context} for this model")
    with closing(Team(args.threads)) as team:
        for additive in (False, True):
            compare(model, team, args.tokens, additive, args.rounds)


if __name__ == "__main__":
    main()
