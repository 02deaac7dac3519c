"""`lockstep bench scaling`: the speed of steps on more cores than this machine has, op by op, and what limits it."""

import json
import math
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import typer
from rich.console import Console

from lockstep.commands.options import KvDtype, ModelName, Numa, Weights, load
from lockstep.commands.terminal.output import say_stage, write
from lockstep.commands.terminal.tables import made_table, report_console, speed
from lockstep.lab import scaling as predict
from lockstep.lab import shares as measure
from lockstep.runtime.threads import Team

SHOWN = 0.01  # of a step's time: an op with less is not in the table
MOST_THREADS = 256
LEAST_TOGETHER = 0.95  # of one thread's speed of memory, for all threads: two measurements of the same differ a little
MOST_ERROR = 0.25  # of the prediction for this machine, by which the others are still worth something


def command(
    *,
    model: ModelName = None,
    weights: Weights = "auto",
    kv_dtype: KvDtype = None,
    here: Annotated[
        int | None, typer.Option("--here", min=1, max=256, help="Threads to measure with.", show_default="all cores")
    ] = None,
    numa: Numa = "off",
    threads: Annotated[str, typer.Option(help="Numbers of threads to predict, comma-separated.")] = "8,16,64",
    memory_gbs: Annotated[
        float | None,
        typer.Option("--memory-gbs", min=0.1, help="GB/s of the memory there.", show_default="this machine's"),
    ] = None,
    prompt: Annotated[int, typer.Option(min=2, help="Tokens of the prompt whose prefill is measured.")] = 512,
    context: Annotated[int, typer.Option(min=1, help="Tokens before those that are decoded.")] = 512,
    requests: Annotated[int, typer.Option(min=1, max=256, help="Requests that decode at a time, beside one.")] = 8,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds in which all measurements take turns.")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure how steps are cut into tasks, how long these take and what they read, and predict from it how long the
    steps would take on more threads, each on a core of its own; what is predicted for this machine is measured, too."""
    counts = _counts(threads)
    if memory_gbs is not None and not math.isfinite(memory_gbs):
        raise ValueError(f"--memory-gbs: expected a number, got {memory_gbs}")
    workloads = [
        *(measure.Workload(f"decode of {number}", number, 1, context) for number in sorted({1, requests})),
        measure.Workload(f"prefill of {prompt}", 1, prompt, 0),
    ]
    longest = max(context + 1, prompt)
    llm = load(model, weights=weights, kv_dtype=kv_dtype, threads=here, numa=numa, needed_context=longest)
    if longest > llm.max_context:
        raise ValueError(f"--prompt and --context: the model's context is {llm.max_context} tokens, got {longest}")
    rig = measure.Rig(llm.model, llm.model.config.vocab_size, llm.engine.team, workloads)
    found = run(rig, llm.engine.team, workloads, Asked(counts, memory_gbs, rounds), say_stage)
    rig.close()
    llm.close()
    write(json.dumps(found) + "\n") if as_json else show(found, report_console())


class Asked(NamedTuple):
    """What is asked for: numbers of threads, GB/s of the memory (None: this machine's), rounds."""

    counts: list[int]
    memory_gbs: float | None
    rounds: int


def _counts(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(part.isdecimal() and 1 <= int(part) <= MOST_THREADS for part in parts):
        raise ValueError(f"--threads {text!r}: expected whole numbers from 1 to {MOST_THREADS}, comma-separated")
    return sorted({int(part) for part in parts})


def run(
    rig: measure.Rig, team: Team, workloads: list[measure.Workload], asked: Asked, say: Callable[[str], None]
) -> dict[str, Any]:
    """Measures and predicts, as plain data."""
    say("the machine")
    here, most = measure.machine(team), asked.memory_gbs and 1e9 * asked.memory_gbs
    if here.num_threads == 1 < asked.counts[-1]:
        say("one thread meets no other: barriers and the passing of activations are not measured, and not predicted")
    found: dict[str, Any] = dict(threads=here.num_threads, memory_gbs=asked.memory_gbs, steps=[])
    found["machine"] = dict(
        bytes_per_second=[here.alone.bytes_per_second, here.together.bytes_per_second], barrier_seconds=here.barrier
    )
    for workload in workloads:
        say(workload.name)
        measured = rig.measure(workload, [*asked.counts, here.num_threads], asked.rounds)
        found["steps"].append(step_data(measured, here, asked.counts, most))
    return found | dict(doubts=doubts_of(found))


def step_data(
    measured: measure.Measured, here: measure.Machine, counts: list[int], most: float | None
) -> dict[str, Any]:
    """One step, as plain data."""
    on_this = predict.step_times(measured, here.num_threads, here)
    check = dict(threads=here.num_threads, predicted=predict.total(on_this), measured=measured.together)
    check |= dict(error=check["predicted"] / check["measured"] - 1, alone=measured.alone)
    step: dict[str, Any] = dict(
        name=measured.workload.name,
        rows=measured.workload.requests * measured.workload.tokens,
        alone=predict.total(predict.step_times(measured, 1, here)),
        check=check,
        ops=[
            dict(op=o.label, count=o.count, seconds=o.count * o.alone, bytes=o.count * o.num_bytes)
            for o in measured.ops
        ],
        predicted=[],
    )
    for count in counts:
        times = predict.step_times(measured, count, here, most)
        parts = {part: predict.total(times, part) for part in predict.PARTS}
        ops = [dict(tasks=t.like.tasks[count], seconds=t.like.count * t.seconds, limit=t.limit) for t in times]
        step["predicted"].append(dict(threads=count, seconds=predict.total(times), parts=parts, ops=ops))
    return step


# ------------------------------------------------------------ report


def show(found: dict[str, Any], console: Console) -> None:
    """Prints the tables."""
    alone, together = (rate / 1e9 for rate in found["machine"]["bytes_per_second"])
    there = f", {found['memory_gbs']:g} GB/s there" if found["memory_gbs"] else ""
    console.print(
        f"measured here: memory {alone:.1f} GB/s for one thread, {together:.1f} for {found['threads']}{there}; "
        f"a barrier {1e6 * found['machine']['barrier_seconds']:.2f} us",
        highlight=False,
    )
    for step in found["steps"]:
        for predicted in step["predicted"]:
            console.print(ops_table(step, predicted))
        console.print(total_table(step))
        console.print(check_words(step), highlight=False)
    if found["doubts"]:
        console.print(
            f"Do not rely on this: {' and '.join(found['doubts'])}. Other programs were probably busy.", highlight=False
        )


def ops_table(step: dict[str, Any], predicted: dict[str, Any]) -> Any:
    """Every op that takes time on some threads: into how many tasks it is cut, and what limits it."""
    title = f"{step['name']}, {predicted['threads']} threads"
    columns = "op", ">ops", ">MB", ">ms on 1", ">ms", ">share", ">tasks of one", "limit"
    table = made_table(title, *columns)
    for op, there in zip(step["ops"], predicted["ops"], strict=True):
        if (share := there["seconds"] / predicted["seconds"]) < SHOWN:
            continue
        head = op["op"], str(op["count"]), f"{op['bytes'] / 1e6:.1f}", f"{1e3 * op['seconds']:.2f}"
        table.add_row(*head, f"{1e3 * there['seconds']:.3f}", f"{share:.0%}", str(there["tasks"]), there["limit"])
    return table


def total_table(step: dict[str, Any]) -> Any:
    """The whole step, and where its time goes."""
    names = ">threads", ">ms", ">tok/s", ">speedup", ">even", ">few tasks", ">memory", ">passing", ">barriers"
    table = made_table(None, *names)
    for each in step["predicted"]:
        shares = [f"{each['parts'][part] / each['seconds']:.0%}" for part in predict.PARTS]
        rate, speedup = step["rows"] / each["seconds"], step["alone"] / each["seconds"]
        table.add_row(str(each["threads"]), f"{1e3 * each['seconds']:.3f}", speed(rate), f"{speedup:.1f}x", *shares)
    return table


def doubts_of(found: dict[str, Any]) -> list[str]:
    """What shows that the machine was not at rest while it was measured, in words."""
    alone, together = found["machine"]["bytes_per_second"]
    wrong = [step for step in found["steps"] if abs(step["check"]["error"]) > MOST_ERROR]
    doubts = []
    if wrong:
        steps = ", ".join(f"{step['name']} {step['check']['error']:+.0%}" for step in wrong)
        doubts.append(f"the prediction for this machine is off by more than {MOST_ERROR:.0%} ({steps})")
    if found["threads"] > 1 and together < LEAST_TOGETHER * alone:
        doubts.append(f"{found['threads']} threads read memory more slowly than one")
    return doubts


def check_words(step: dict[str, Any]) -> str:
    """How right the prediction for this machine is."""
    check = step["check"]
    return (
        f"check: {check['threads']} threads predicted {1e3 * check['predicted']:.3f} ms, measured "
        f"{1e3 * check['measured']:.3f} ms ({check['error']:+.1%}); "
        f"one thread {1e3 * step['alone']:.3f} ms as the sum of its ops, {1e3 * check['alone']:.3f} ms measured\n"
    )
