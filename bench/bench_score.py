"""Time of scores against the linear layer that computes the logits: for the nll alone, and with KL.

    python bench/bench_score.py [--formats f32,q8_0] [--vocabularies 4096,151936] [--rows 512] [--cpu-time]

One line for each vocabulary and format: time of the layer alone, which writes all logits, of `score` without a base,
and of `score` with a base of the same head, which multiplies twice; the latter two as shares of the layer's time. The
three run one after the other in every round; medians of the rounds, and of the rounds' shares. --cpu-time measures
processor time of one thread, for a machine that is shared.
"""

import time

import numpy as np
from options import Parser, one_of, several, whole_number

from lockstep.formats import FORMATS
from lockstep.formats.parts.panels import padded_width
from lockstep.lab.layer_speed import nothing, stored
from lockstep.ops.elementwise import activations_cpu
from lockstep.ops.linear import linear_cpu
from lockstep.ops.linear.linear import Linear
from lockstep.ops.rewrite import lower
from lockstep.ops.sampling import score_cpu
from lockstep.ops.sampling.score import NUM_SCORES, Score, scratch_width
from lockstep.runtime.backend import Implementation
from lockstep.runtime.executor import Executor
from lockstep.runtime.operands import Operands, output
from lockstep.runtime.program import Program, Tensor, Weight
from lockstep.runtime.step_block import StepBlock
from lockstep.runtime.threads import Team
from lockstep.weights.store import WeightStore

TABLE = {**activations_cpu.CPU, **linear_cpu.CPU, **score_cpu.CPU, "given": Implementation(nothing)}


class Given(Operands):
    """An op in the place of those that produce the rows, which are written before a step."""

    out: Tensor = output(dtype=None)


def executor(format: str, vocabulary: int, width: int, rows: int, team: Team) -> Executor:
    """The executor of a program with a head's linear layer, and scores without and with a base."""
    program, part = Program(), stored(format, vocabulary, width)
    head = Weight("head", format, (vocabulary, width), (part,))
    x, base = program.tensor("x", "T", width), program.tensor("base", "T", width)
    target = program.tensor("target", "T", 1, "i32")
    for given in (x, base, target):
        program.emit(Given(out=given))
    padded = padded_width(vocabulary)
    logits, sizes = program.tensor("logits", "T", padded), dict(in_features=width, out_features=vocabulary)
    program.emit(Linear(out=logits, x=x, weight=head, width=padded, column=0, **sizes))
    scratch = scratch_width(vocabulary)
    for name, operands in {"nll": {}, "kl": dict(base_x=base, base_weight=head)}.items():
        outputs = dict(
            out=program.tensor(name, "T", NUM_SCORES), scratch=program.tensor(f"{name}.scratch", "T", scratch)
        )
        sizes = dict(in_features=width, vocab_size=vocabulary, scratch_width=scratch)
        program.emit(Score(x=x, weight=head, target=target, **outputs, **operands, **sizes))
    made, rng = (
        Executor(lower(program), TABLE, team, WeightStore(), {"T": rows}, {}, keep_all=True),
        np.random.default_rng(1),
    )
    made.view(x, rows)[...] = rng.standard_normal((rows, width), np.float32)
    made.view(base, rows)[...] = made.view(x, rows) + 0.01 * rng.standard_normal((rows, width), np.float32)
    made.view(target, rows)[...] = rng.integers(0, vocabulary, (rows, 1))
    return made


def seconds(made: Executor, rows: int, rounds: int, cpu_time: bool) -> np.ndarray:
    """[rounds, 3]: seconds of the layer, of scores without a base and with one, in each round."""
    step = StepBlock.made(num_tokens=rows, num_requests=1, num_sampled=1)
    clock = np.zeros(len(made.program.ops), np.int64)
    ops = [i for i, op in enumerate(made.program.ops) if isinstance(op, (Linear, Score))]
    times = []
    for _ in range(rounds + 1):
        made.run(step, clock)
        on_clock = [(clock[i] - clock[i - 1]) / 1e9 for i in ops]
        times.append([processor_seconds(made, i, step) for i in ops] if cpu_time else on_clock)
    return np.array(times[1:])


def processor_seconds(made: Executor, index: int, step: np.ndarray) -> float:
    """Processor time that an op takes in the calling thread."""
    started = time.thread_time()
    made.run_op(index, step)
    return time.thread_time() - started


def arguments():
    """The options' values."""
    parser = Parser(__doc__)
    parser.add_argument("--formats", type=several(one_of(FORMATS)), default="f32,bf16,q8_0,q4_k")
    parser.add_argument("--vocabularies", type=several(whole_number()), default="4096,151936")
    parser.add_counts(width=1024, rows=512, rounds=5)
    parser.add_threads()
    parser.add_argument("--cpu-time", action="store_true", help="processor time, of one thread")
    args = parser.parse_args()
    parser.check_blocks({"--width": args.width}, {format: FORMATS[format].block_size for format in args.formats})
    return args


def main() -> None:
    args = arguments()
    num_threads = 1 if args.cpu_time else args.threads
    team = Team(num_threads)
    print(f"{args.rows} rows of {args.width} values, threads: {num_threads}; ms, and times as long as the layer")
    for vocabulary in args.vocabularies:
        for format in args.formats:
            made = executor(format, vocabulary, args.width, args.rows, team)
            times = seconds(made, args.rows, args.rounds, args.cpu_time)
            layer, nll, kl = np.median(times, axis=0) * 1e3
            nll_share, kl_share = np.median(times[:, 1:] / times[:, :1], axis=0)
            print(
                f"{vocabulary:7d} {format:5s} layer {layer:8.1f}   nll {nll:8.1f} ({nll_share:.2f})   "
                f"kl {kl:8.1f} ({kl_share:.2f})   kl / nll {np.median(times[:, 2] / times[:, 1]):.2f}",
                flush=True,
            )
    team.close()


if __name__ == "__main__":
    main()
