"""`bench scaling`: what limits an op, by its tasks, bytes and barrier; and the command on the bundled model."""

import io
import json

import pytest
from rich.console import Console

from lockstep.cli import main
from lockstep.commands.bench_scaling import doubts_of, show
from lockstep.lab.ceiling import Ceiling
from lockstep.lab.scaling import PARTS, arrivals, bandwidth, barrier, op_time, step_times, total
from lockstep.lab.shares import Like, Machine, Measured, Workload

HERE = Machine(2, Ceiling(10e9, 1, 1), Ceiling(16e9, 1, 1), 2e-6, 1e-10)


def like(tasks, longest, alone=64e-6, num_bytes=0, *, meets=1, count=1, passed=0):
    return Like("op", count, meets, num_bytes, passed, alone, {64: tasks}, {64: longest})


@pytest.mark.parametrize(
    ("op", "limit", "seconds"),
    [
        (like(640, 1e-3, alone=64e-3), "arithmetic", 1e-3 + 16e-6),
        (like(1, 64e-6), "tasks", 64e-6 + 16e-6),
        (like(64, 1e-6), "barrier", 1e-6 + 16e-6),
        (like(64, 1e-6, num_bytes=640_000), "memory", 40e-6 + 16e-6),
        (like(64, 1e-6, num_bytes=64_000_000), "barrier", 1e-6 + 16e-6),  # faster than memory: from a cache
        (like(64, 1e-6, meets=0), "arithmetic", 1e-6),
        (like(64, 1e-6, meets=0, passed=6_400_000), "passing", 1e-6 + 1e-5 * 63 / 64),
        (like(2, 32e-6, meets=0, passed=640_000), "tasks", 32e-6 + 32e-6 * 63 / 64),
    ],
)
def test_what_limits_an_op(op, limit, seconds):
    time = op_time(op, 64, HERE)
    assert time.limit == limit and time.seconds == pytest.approx(seconds)


def test_memory_and_barriers_of_other_machines():
    assert [bandwidth(HERE, n, most) for n, most in ((1, None), (8, None), (8, 60e9), (8, 400e9))] == [
        10e9,
        16e9,
        60e9,
        80e9,
    ]
    assert [arrivals(n) for n in (2, 8, 9, 64, 256)] == [2, 8, 10, 16, 40]
    assert barrier(HERE, 1) == 0 and barrier(HERE, 2) == 2e-6 and barrier(HERE, 64) == 16e-6


def test_a_step_is_the_sum_of_its_ops():
    ops = [like(64, 1e-6, count=3, meets=3), like(1, 64e-6, count=2, meets=2)]
    times = step_times(Measured(Workload("w", 1, 1, 1), ops, 0, 0), 64, HERE)
    parts = {part: total(times, part) for part in PARTS}
    assert parts == pytest.approx(dict(even=5e-6, tasks=126e-6, memory=0, passing=0, barrier=80e-6))
    assert total(times) == pytest.approx(sum(parts.values()))


def test_the_command(capsys):
    sizes = ["--prompt", "64", "--context", "20", "--requests", "2", "--rounds", "1", "--here", "1"]
    assert main(["bench", "scaling", "--threads", "4,16", *sizes, "--json"]) == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert "barriers and the passing of activations are not measured" in " ".join(printed.err.split())
    assert found["machine"]["barrier_seconds"] == 0 and isinstance(found["doubts"], list)
    assert [step["rows"] for step in found["steps"]] == [1, 2, 64]
    for step in found["steps"]:
        assert [each["threads"] for each in step["predicted"]] == [4, 16] and step["check"]["measured"] > 0
        assert {op["op"].split()[0] for op in step["ops"]} >= {"attention_bf16", "sample", "linear_bf16"}
        for each in step["predicted"]:
            assert sum(op["seconds"] for op in each["ops"]) == pytest.approx(each["seconds"])
    [prefill] = [step for step in found["steps"] if step["rows"] == 64]
    tasks = {}
    for op, there in zip(prefill["ops"], prefill["predicted"][1]["ops"], strict=True):
        tasks.setdefault(op["op"].split()[0], there["tasks"])  # the first: the last one has few rows
    assert tasks["rms_norm+round_bf16"] == 16 and tasks["attention_bf16"] >= 8


@pytest.mark.parametrize("threads", ["", "0", "4,x", "257"])
def test_numbers_of_threads_are_checked(threads, capsys):
    assert main(["bench", "scaling", "--threads", threads]) == 2
    assert "expected whole numbers from 1 to 256" in capsys.readouterr().err


def test_the_speed_of_a_memory_is_finite(capsys):
    assert main(["bench", "scaling", "--memory-gbs", "inf"]) == 2
    assert "--memory-gbs: expected a number, got inf" in capsys.readouterr().err


# ------------------------------------------------------------ doubts


def scaled(error=0.1, alone=10e9, together=16e9):
    step = dict(name="decode of 1", check=dict(error=error))
    return dict(threads=2, machine=dict(bytes_per_second=[alone, together]), steps=[step, step | dict(name="other")])


@pytest.mark.parametrize(("found", "doubts"), [
    (scaled(), []), (scaled(error=-0.25), []), (scaled(together=9.9e9), []),
    (scaled(together=5e9) | dict(threads=1), []),
    (scaled(error=-0.428), ["the prediction for this machine is off by more than 25% (decode of 1 -43%, other -43%)"]),
    (scaled(together=9e9), ["2 threads read memory more slowly than one"]),
])  # fmt: skip
def test_a_machine_that_was_busy_is_doubted(found, doubts):
    assert doubts_of(found) == doubts


def test_doubts_are_the_last_sentence_of_the_report():
    found = scaled(error=0.5, together=9e9)
    check = dict(error=0.5, threads=2, predicted=1.5, measured=1.0, alone=1.0)
    step = dict(name="decode of 1", rows=1, alone=1.0, check=check, ops=[], predicted=[])
    found |= dict(memory_gbs=None, steps=[step])
    found["doubts"] = doubts_of(found)
    found["machine"]["barrier_seconds"] = 1e-6
    console = Console(file=io.StringIO(), width=1000)
    show(found, console)
    assert console.file.getvalue().splitlines()[-1] == (
        "Do not rely on this: the prediction for this machine is off by more than 25% (decode of 1 +50%) and 2 threads"
        " read memory more slowly than one. Other programs were probably busy."
    )
