"""Speed of the linear layers against the ceilings of this machine, which are measured in the same run.

    python bench/bench_linear.py [--formats q8_0,bf16] [--rows 1,4,512] [--shapes 4096x1024] [--per-token] [--threads 2]

A shape is features x values; for a block-diagonal layer (`grouped_linear`) it is features of all groups x values of one
group x groups, as 8192x4096x8. Each format, shape and number of rows has one line: time, GOP/s (two for each
multiply-add), GB/s of packed weights, and both as shares of the ceilings. Each layer has several copies, whose weights
together exceed the caches, so that one row reads from memory as in a model. --per-token: also the baseline, which reads
the weights anew for each row, and how many times as long the baseline takes. Formats and rows are interleaved, and
ceilings are measured just before and just after each, as clocks change within seconds; medians of the rounds are
reported.
"""

import itertools
import statistics

from options import Parser, layer_shape, one_of, several, values_of, whole_number

from lockstep.formats import FORMATS
from lockstep.lab.ceiling import Meter
from lockstep.lab.layer_speed import Case
from lockstep.ops.linear import linear_cpu
from lockstep.runtime.threads import Team

SHAPES = ["4096x1024", "1024x2048", "6144x1024", "1024x3072", "151936x1024"]


FIELDS = dict(float32="f32_per_second", int8="int8_per_second", read="bytes_per_second")


class Ceilings:
    """float32 and int8 GOP/s and GB/s of this machine, measured again and again (`lockstep.lab.ceiling`)."""

    def __init__(self, team):
        self.num_threads, self._meter, self._seen, self._beside = team.num_threads, Meter(team), [], {}
        self._meter.run()
        self.measure()

    def measure(self):
        self._seen.append(self._meter.run())

    def run(self, case, rows):
        """Runs a case between two measurements, of which the first is the last one so far."""
        case.run(rows)
        self.measure()
        self._beside.setdefault((case, rows), []).append(self._seen[-2:])

    def share(self, case, rows, work, name):
        """What part of a ceiling a case reaches that does `work` operations or reads as many bytes: the median of its
        runs, each beside the mean of the ceiling before and after it."""
        field = FIELDS[name]
        return statistics.median(
            work / seconds / statistics.mean(getattr(ceiling, field) for ceiling in beside)
            for seconds, beside in zip(case.times[rows], self._beside[case, rows], strict=True)
        )

    def median(self, name):
        """The median of "float32" or "int8" in GOP/s, or of "read" in GB/s."""
        return statistics.median(getattr(ceiling, FIELDS[name]) for ceiling in self._seen) / 1e9

    def __str__(self):
        return (
            f"ceilings, {self.num_threads} threads: float32 {self.median('float32'):.0f} GOP/s, "
            f"int8 {self.median('int8'):.0f} GOP/s, read {self.median('read'):.1f} GB/s"
        )


def report(case, rows, ceilings, fast_case=None):
    """Prints a line. fast_case: if `case` is a baseline, the case to compare it with."""
    seconds = case.seconds(rows)
    operations, num_bytes = 2 * rows * case.N * case.K, (rows if fast_case else 1) * case.weight_bytes
    peak = ceilings.share(case, rows, operations, "int8" if FORMATS[case.format].is_quantized else "float32")
    times = f"  per token: {seconds / fast_case.seconds(rows):.2f} times as long" if fast_case else ""
    print(
        f"{case.format:5s} {case.shape:14s} rows {rows:4d}  {seconds * 1e6:9.1f} us  "
        f"{operations / seconds / 1e9:7.1f} GOP/s {peak:5.1%}"
        f"  {num_bytes / seconds / 1e9:5.1f} GB/s {ceilings.share(case, rows, num_bytes, 'read'):5.1%}{times}",
        flush=True,
    )


def arguments():
    """The options' values."""
    parser = Parser(__doc__)
    parser.add_argument("--formats", type=several(one_of(FORMATS)), default=",".join(FORMATS))
    parser.add_argument("--shapes", type=several(layer_shape), default=",".join(SHAPES))
    parser.add_argument("--rows", type=several(whole_number()), default="1,2,4,8,512")
    parser.add_counts(rounds=5)
    parser.add_threads()
    parser.add_argument("--per-token", action="store_true", help="also the baseline, one row at a time")
    args = parser.parse_args()
    blocks = {format: FORMATS[format].block_size for format in args.formats}
    parser.check_blocks({f"--shapes {shape}": values_of(shape) for shape in args.shapes}, blocks)
    return args


def main():
    args = arguments()
    rows, tables = args.rows, [linear_cpu.CPU, linear_cpu.PER_TOKEN][: 1 + args.per_token]
    team = Team(args.threads)
    ceilings = Ceilings(team)
    for shape in args.shapes:
        cases = [Case(format, shape, max(rows), team, table) for format in args.formats for table in tables]
        for _ in range(args.rounds):
            for case, r in itertools.product(cases, rows):
                ceilings.run(case, r)
        for i, r in itertools.product(range(len(cases)), rows):
            report(cases[i], r, ceilings, cases[i - 1] if cases[i].table is linear_cpu.PER_TOKEN else None)
    print(ceilings)
    team.close()


if __name__ == "__main__":
    main()
