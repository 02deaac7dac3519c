"""`lockstep bench`: this machine's ceiling, prefill and decode, paths A/B, and where the time goes."""

import importlib.util
import itertools
import json
import pathlib
from typing import Annotated

import typer
from rich.console import Console

from lockstep.commands.options import KvDtype, ModelName, Threads, Weights, load
from lockstep.commands.terminal.output import made_table, pyplot
from lockstep.lab import ceiling as machine
from lockstep.lab import model_speed as measure

PICTURES = (".png", ".svg", ".pdf")


def command(
    *,
    model: ModelName = None,
    weights: Weights = "auto",
    kv_dtype: KvDtype = None,
    threads: Threads = None,
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
    llm = load(model, weights=weights, kv_dtype=kv_dtype, threads=threads, max_context=longest)
    if longest > llm.max_context:
        raise ValueError(f"--prompts and --contexts: the model's context is {llm.max_context} tokens, got {longest}")
    console = Console(stderr=True)
    with console.status("measuring") as status:
        found = run(measure.Bench(llm.model, llm.engine.team, longest), lengths, depths, repeat, quick, status.update)
    print(json.dumps(found)) if as_json else show(found, Console())
    if plot:
        draw(found, plot)


def _numbers(option, text):
    try:
        numbers = [int(n) for n in text.split(",") if n]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 2:
        raise ValueError(f"{option} {text!r}: expected numbers of at least 2, comma-separated")
    return numbers


def run(bench, lengths, depths, repeat, quick: bool = False, say=lambda text: None):
    """All measurements, as plain data."""
    say("machine ceiling")
    ceiling = machine.measure(bench.team)
    found = dict(threads=bench.team.num_threads, ceiling=vars(ceiling), prefill={}, decode={}, switches={}, profiles={})
    length = min(512 if quick else 1000, max(lengths))
    say(f"{length} tokens, one at a time and in chunks")
    ratios, largest = measure.against_per_token(bench, length, 1 if quick else repeat)
    found["per_token"] = dict(tokens=length, max_abs_diff=largest, ratios={k: vars(r) for k, r in ratios.items()})
    if quick:
        return found
    for n in lengths:
        say(f"prefill of {n}")
        found["prefill"][n] = n / measure.statistics.median(bench.prefill(n)[0] for _ in range(repeat))
    for d in depths:
        say(f"decode after {d}")
        found["decode"][d] = 1 / measure.statistics.median(bench.decode(d) for _ in range(repeat))
    say("founding changes, with and without")
    found["switches"] = {k: vars(r) for k, r in measure.switch_ratios(bench, min(512, max(lengths)), repeat).items()}
    for name, (tokens, context) in dict(prefill=(min(512, max(lengths)), 0), decode=(1, depths[0])).items():
        say(f"profile of {name}")
        profile = bench.profile(tokens, context)
        found["profiles"][name] = measure.summed(profile, {"T": tokens, "O": 1, "R": 1, "E": 0, "S": 1})
    say("machine ceiling again")  # cores may be shared with strangers: the better of two moments counts
    again = vars(machine.measure(bench.team))
    found["ceiling"] = {k: max(v, again[k]) for k, v in found["ceiling"].items()}
    return found


def show(found, console) -> None:
    """The tables."""
    c = found["ceiling"]
    console.print(
        f"ceiling of {found['threads']} threads: {c['bytes_per_second'] / 1e9:.1f} GB/s, "
        f"{c['int8_per_second'] / 1e9:.0f} GOPS int8, {c['f32_per_second'] / 1e9:.0f} GFLOP/s float32"
    )
    if found["prefill"]:
        speed = made_table(None, "tokens", "prefill tok/s", "context", "decode tok/s")
        cells = [[(str(k), f"{v:.1f}") for k, v in found[part].items()] for part in ("prefill", "decode")]
        for a, b in itertools.zip_longest(*cells, fillvalue=("", "")):
            speed.add_row(*a, *b)
        console.print(speed)
    against = found["per_token"]
    table = made_table(f"interleaved; max_abs_diff {against['max_abs_diff']:g}", "A", "B", "A s", "B s", "A / B")
    for name, r in against["ratios"].items():
        table.add_row(f"{against['tokens']} tokens one at a time", name, *_paired(r))
    for name, r in found["switches"].items():
        table.add_row(f"{name}=per_token", f"{name} batched", *_paired(r))
    console.print(table)
    for name, rows in found["profiles"].items():
        console.print(profile_table(name, rows, c))


def _paired(r):
    low, high = r["spread"]
    return f"{r['a_seconds']:.3f}", f"{r['b_seconds']:.3f}", f"{r['ratio']:.2f}x ({low:.2f}..{high:.2f})"


def profile_table(name, rows, ceiling):
    """Where a step's time goes, and how near each kind of linear layer is to what the machine can do."""
    table = made_table(f"{name}, one step", "op", "ms", "share", "GB/s", "GOPS", "% of ceiling")
    total = sum(r[1] for r in rows)
    for kind, seconds, num_bytes, macs, int8 in rows:
        if seconds < 0.002 * total:
            continue
        rate, ops = num_bytes / seconds, 2 * macs / seconds
        peak = ceiling["int8_per_second" if int8 else "f32_per_second"]
        percent = max(rate / ceiling["bytes_per_second"], ops / peak) if macs else None
        table.add_row(
            kind,
            f"{seconds * 1e3:.2f}",
            f"{seconds / total:.1%}",
            f"{rate / 1e9:.1f}" if macs else "",
            f"{ops / 1e9:.0f}" if macs else "",
            f"{percent:.0%}" if macs else "",
        )
    return table


def check_plot(path) -> None:
    """Refuses, before anything is measured, a picture that could not be drawn."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--plot needs matplotlib: pip install lockstep-llm[plot]")
    if not pathlib.Path(path).parent.is_dir() or pathlib.Path(path).suffix not in PICTURES:
        raise ValueError(f"--plot {path}: expected a file name ending in {', '.join(PICTURES)} in a folder that exists")


def draw(found, path) -> None:
    """Prefill and decode speed, and the ratios, as a picture."""
    plt = pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), width_ratios=(2, 3))
    left.bar(
        [f"prefill {k}" for k in found["prefill"]] + [f"decode @{k}" for k in found["decode"]],
        [*found["prefill"].values(), *found["decode"].values()],
        color="#3b6fb6",
    )
    left.set_ylabel("tokens per second")
    left.tick_params(axis="x", rotation=35)
    ratios = {
        **{f"one at a time / {k}": r for k, r in found["per_token"]["ratios"].items()},
        **{f"{k}: per token / batched": r for k, r in found["switches"].items()},
    }
    right.barh(list(ratios), [r["ratio"] for r in ratios.values()], color="#b6693b")
    right.axvline(1, color="black", linewidth=0.8)
    right.set_xlabel("times slower without it (same bits)")
    for i, r in enumerate(ratios.values()):
        right.text(r["ratio"], i, f" {r['ratio']:.1f}x", va="center")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
