"""Elementwise ops: time and memory traffic, batched over threads against one token at a time on one thread.

    python bench/bench_elementwise.py [--threads 2] [--rounds 15]

Both forms and NumPy's sum of two arrays (on one thread: the bandwidth of one core) run interleaved; medians of the
rounds. GB/s counts once what an op must read and write.
"""

import time

import numpy as np
from options import Parser

from lockstep.formats.parts.rows import ROW_FORMATS
from lockstep.native.kernel import kernel
from lockstep.ops import BACKENDS
from lockstep.ops.elementwise.activations import QuantizeQ8, RoundBf16
from lockstep.ops.elementwise.add import Add
from lockstep.ops.elementwise.gated_mul import GatedMul
from lockstep.ops.elementwise.rms_norm import RmsNorm
from lockstep.runtime.backend import Implementation
from lockstep.runtime.executor import Executor
from lockstep.runtime.program import DTYPES, Program
from lockstep.runtime.threads import Team
from lockstep.weights.store import WeightStore
from tests.ops.harness import Given, ragged_step, weight

SHAPES = [(1, 1024), (32, 2048), (512, 1024), (512, 6144)]
PREPARATIONS = ("quantize_q8", "round_bf16")
KINDS = (
    "add",
    *PREPARATIONS,
    *(f"{kind}{then}" for kind in ("rms_norm", "silu_mul") for then in ("", "+quantize_q8", "+round_bf16")),
)


@kernel
def nothing(op, step, thread, num_threads):
    """A kernel in the place of the ops that produce the inputs."""


def emit(program, kind, width):
    """Records one op of KINDS on rows `width` wide; returns its inputs and its output."""
    x, y = (program.emit(Given(out=program.tensor(name, "T", width))) for name in "xy")
    then = next((name for name in PREPARATIONS if kind.endswith(name)), "")
    made, num_values = kind.removesuffix(then).removesuffix("+"), width // 2 if "silu_mul" in kind else width
    rows = ROW_FORMATS[then]
    out = program.tensor("out", "T", rows.width(num_values), rows.dtype)
    common = dict(out=out, x=x, width=num_values)
    if made == "add":
        return [x, y], program.emit(Add(y=y, **common))
    if made == "silu_mul":
        return [x], program.emit(GatedMul(activation="silu", preparation=then, **common))
    if made == "rms_norm":
        norm = weight(np.linspace(0.5, 1.5, width, dtype=np.float32), f"norm{width}")
        return [x], program.emit(RmsNorm(weight=norm, eps=1e-6, offset=0.0, preparation=then, **common))
    return [x], program.emit((QuantizeQ8 if then == "quantize_q8" else RoundBf16)(**common))


def build(table, kind, num_tokens, width, team):
    """An executor of one op on random rows, and the bytes that the op must read and write."""
    program = Program()
    inputs, out = emit(program, kind, width)
    backend = {**table, "given": Implementation(nothing)}
    rows = {"T": num_tokens, "R": 1, "S": 1}
    executor = Executor(program, backend, team, WeightStore(), rows, {}, keep_all=True)
    for tensor in inputs:
        executor.view(tensor, num_tokens)[...] = np.random.default_rng(0).standard_normal((num_tokens, width))
    row_bytes = sum(DTYPES[tensor.dtype].itemsize * tensor.width for tensor in (*inputs, out))
    return executor, num_tokens * row_bytes


def seconds(call, repeat):
    started = time.perf_counter()
    for _ in range(repeat):
        call()
    return (time.perf_counter() - started) / repeat


def compare(kind, num_tokens, width, team, rounds):
    tables = {"batched": BACKENDS["cpu"], "per token": {**BACKENDS["cpu"], **BACKENDS["per_token"]}}
    step, _held = ragged_step([num_tokens])
    runs, moved = {}, 0
    for name, table in tables.items():
        executor, moved = build(table, kind, num_tokens, width, team)
        runs[name] = lambda executor=executor: executor.run(step)
    a, b, c = (np.full(num_tokens * width, 0.5, np.float32) for _ in range(3))
    runs["numpy add"] = lambda: np.add(a, b, out=c)
    repeat = max(1, (1 << 21) // (num_tokens * width))
    times = {name: [] for name in runs}
    for _ in range(rounds):
        for name, call in runs.items():
            times[name].append(seconds(call, repeat))
    bytes_of = {"batched": moved, "per token": moved, "numpy add": 3 * a.nbytes}
    return {name: (np.median(t), bytes_of[name] / np.median(t)) for name, t in times.items()}


def main():
    parser = Parser(__doc__)
    parser.add_threads()
    parser.add_counts(rounds=15)
    args = parser.parse_args()
    team = Team(args.threads)
    print(f"{'op':20} {'shape':14}" + "".join(f"{n:>24}" for n in ("batched", "per token", "numpy add")))
    for kind in KINDS:
        for num_tokens, width in SHAPES:
            result = compare(kind, num_tokens, width, team, args.rounds)
            cells = "".join(f"{1e6 * t:12.1f} us {rate / 1e9:5.1f} GB/s" for t, rate in result.values())
            print(f"{kind:20} {f'[{num_tokens}, {width}]':14}{cells}")
    team.close()


if __name__ == "__main__":
    main()
