"""`lockstep bench`: this machine's ceiling, speed of prefill and decode, A/B comparisons, and profiles of steps."""

import itertools
import json
import statistics
from typing import Annotated

import typer

from lockstep.commands.bench_pictures import about, check_plot, draw
from lockstep.commands.options import KvDtype, ModelName, Numa, Threads, Weights, load, say_unused
from lockstep.commands.terminal.output import say_stage
from lockstep.commands.terminal.tables import made_table, report_console, speed
from lockstep.lab import ceiling as machine
from lockstep.lab import model_speed as measure

MOST_OF_CEILING = 1.1  # what an op may reach: the ceiling is measured at another moment


def command(
    invoked: typer.Context,
    *,
    model: ModelName = None,
    weights: Weights = "auto",
    kv_dtype: KvDtype = None,
    threads: Threads = None,
    numa: Numa = "off",
    prompts: Annotated[str, typer.Option(help="Prompt lengths, comma-separated.")] = "64,512,1000",
    contexts: Annotated[str, typer.Option(help="Context lengths for decode, comma-separated.")] = "128,1024",
    repeat: Annotated[int, typer.Option(min=1, help="Runs of each measurement; medians are shown.")] = 3,
    quick: Annotated[
        bool, typer.Option("--quick", help="Only the A/B of whole prompt against one token at a time.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    plot: Annotated[str | None, typer.Option(metavar="FILE.png", help="Draw the results.")] = None,
) -> None:
    """Measure a model on this machine, each comparison interleaved in one process with paired ratios."""
    lengths, depths = _numbers("--prompts", prompts), _numbers("--contexts", contexts)
    longest = max(*lengths, *(d + 17 for d in depths), 64)
    if plot:
        check_plot(plot)
    if quick:
        say_unused(invoked, ["contexts", "repeat"], "with --quick, which compares prompts once")
    llm = load(model, weights=weights, kv_dtype=kv_dtype, threads=threads, numa=numa, needed_context=longest)
    if longest > llm.max_context:
        raise ValueError(f"--prompts and --contexts: the model's context is {llm.max_context} tokens, got {longest}")
    found = dict(about=about(model, llm))
    found |= run(measure.Bench(llm.model, llm.engine.team, longest), lengths, depths, repeat, quick, say_stage)
    print(json.dumps(found)) if as_json else show(found, report_console())
    if plot:
        draw(found, plot)


def _numbers(option, text):
    try:
        numbers = [int(n) for n in text.split(",") if n]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 2:
        raise ValueError(f"{option} {text!r}: expected numbers of at least 2, comma-separated")
    return list(dict.fromkeys(numbers))  # each once


def run(bench, lengths, depths, repeat, quick: bool = False, say=lambda text: None):
    """Measures everything; returns plain data. lengths: of prompts; depths: contexts of decode. say: is told what is
    measured next."""
    say("the machine's ceiling")
    ceiling = machine.measure(bench.team)
    found = dict(threads=bench.team.num_threads, ceiling=vars(ceiling), prefill={}, decode={}, switches={}, profiles={})
    length = min(512 if quick else 1000, max(lengths))
    ratios, largest = measure.against_per_token(bench, length, 1 if quick else repeat, say)
    found["per_token"] = dict(tokens=length, max_abs_diff=largest, ratios={k: vars(r) for k, r in ratios.items()})
    if quick:
        return found
    for length in lengths:
        say(f"prefill of {length} tokens")
        found["prefill"][length] = length / statistics.median(bench.prefill(length)[0] for _ in range(repeat))
    for depth in depths:
        say(f"decode after {depth} tokens")
        found["decode"][depth] = 1 / statistics.median(bench.decode(depth) for _ in range(repeat))
    ratios = measure.switch_ratios(bench, min(512, max(lengths)), repeat, say)
    found["switches"] = {name: vars(paired) for name, paired in ratios.items()}
    for name, (tokens, context) in dict(prefill=(min(512, max(lengths)), 0), decode=(1, depths[0])).items():
        say(f"a profile of {name}")
        profile = bench.profile(tokens, context)
        found["profiles"][name] = measure.summed(profile, {"T": tokens, "O": 1, "R": 1, "E": 0, "S": 1})
    say("the machine's ceiling again")  # other programs may slow one of the two measurements: the better one counts
    again = vars(machine.measure(bench.team))
    found["ceiling"] = {name: max(rate, again[name]) for name, rate in found["ceiling"].items()}
    return found


def show(found, console) -> None:
    """Prints the tables."""
    ceiling = found["ceiling"]
    console.print(
        f"ceiling of {found['threads']} threads: {ceiling['bytes_per_second'] / 1e9:.1f} GB/s, "
        f"{ceiling['int8_per_second'] / 1e9:.0f} GOPS int8, {ceiling['f32_per_second'] / 1e9:.0f} GFLOP/s float32"
    )
    if found["prefill"]:
        table = made_table(None, ">tokens", ">prefill tok/s", ">context", ">decode tok/s")
        cells = [[(str(k), speed(v)) for k, v in found[part].items()] for part in ("prefill", "decode")]
        for prefill, decode in itertools.zip_longest(*cells, fillvalue=("", "")):
            table.add_row(*prefill, *decode)
        console.print(table)
    against = found["per_token"]
    table = made_table(f"interleaved; max_abs_diff {against['max_abs_diff']:g}", "A", "B", ">A s", ">B s", ">A / B")
    for name, paired in against["ratios"].items():
        table.add_row(f"{against['tokens']} tokens one at a time", name, *_paired_cells(paired))
    for name, paired in found["switches"].items():
        table.add_row(f"{name}=per_token", f"{name} batched", *_paired_cells(paired))
    console.print(table)
    for name, rows in found["profiles"].items():
        console.print(profile_table(name, rows, ceiling))
    if above := above_ceiling(found["profiles"], ceiling):
        console.print(
            f"Above the ceiling: {', '.join(above)}. It moved during the run, as where other programs are busy, or "
            "these weights lay in a cache.",
            highlight=False,
        )


def _paired_cells(paired):
    low, high = paired["spread"]
    seconds = f"{paired['a_seconds']:.3f}", f"{paired['b_seconds']:.3f}"
    return *seconds, f"{paired['ratio']:.2f}x ({low:.2f}..{high:.2f})"


def shown_rows(rows):
    """The rows of a profile that take enough of the step's time to be shown."""
    total = sum(row[1] for row in rows)
    return [row for row in rows if row[1] >= 0.002 * total]


def share_of_ceiling(row, ceiling):
    """How near a row of a profile comes to the ceiling that is nearer, of memory or of arithmetic; 1: it is there."""
    _, seconds, num_bytes, macs, int8 = row
    peak = ceiling["int8_per_second" if int8 else "f32_per_second"]
    return max(num_bytes / ceiling["bytes_per_second"], 2 * macs / peak) / seconds


def above_ceiling(profiles, ceiling):
    """In words: the ops of each profile that are faster than the ceiling by more than its measurement may be wrong."""
    ratios = [
        (f"{row[0]} of {name}", share_of_ceiling(row, ceiling))
        for name, rows in profiles.items()
        for row in shown_rows(rows)
        if row[3]
    ]
    return [f"{words} at {ratio:.0%}" for words, ratio in ratios if ratio > MOST_OF_CEILING]


def profile_table(name, rows, ceiling):
    """The time of each kind of op in a step, and how near linear layers come to the machine's ceiling."""
    table = made_table(f"{name}, one step", "op", ">ms", ">share", ">GB/s", ">GOPS", ">% of ceiling")
    total = sum(row[1] for row in rows)
    for row in shown_rows(rows):
        kind, seconds, num_bytes, macs, _ = row
        rate, ops = num_bytes / seconds, 2 * macs / seconds
        table.add_row(
            kind,
            f"{seconds * 1e3:.2f}",
            f"{seconds / total:.1%}",
            f"{rate / 1e9:.1f}" if macs else "",
            f"{ops / 1e9:.0f}" if macs else "",
            f"{share_of_ceiling(row, ceiling):.0%}" if macs else "",
        )
    return table
