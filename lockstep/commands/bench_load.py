"""`lockstep bench load`: throughput, latencies and cache hits of requests that arrive over time, without HTTP."""

import json
from typing import Annotated, Any

import typer

from lockstep.commands.bench_pictures import about, about_in_words, check_plot, pyplot
from lockstep.commands.options import KvDtype, ModelName, Threads, Weights, load, say_unused
from lockstep.commands.terminal.output import counted, say_stage, write
from lockstep.commands.terminal.tables import made_table, report_console, speed
from lockstep.lab import load as measure
from lockstep.ops.attention.kv_cache import PAGE_TOKENS

COLOURS = dict(running="#3b6fb6", waiting="#b6693b", first="#3b6fb6", between="#b6693b")


def command(
    invoked: typer.Context,
    *,
    model: ModelName = None,
    weights: Weights = "auto",
    kv_dtype: KvDtype = None,
    threads: Threads = None,
    requests: Annotated[int, typer.Option(help="How many requests arrive.")] = 192,
    rate: Annotated[float, typer.Option(help="Arrivals per second, at random moments (Poisson). 0: all at once.")] = 80,
    burst: Annotated[int, typer.Option(help="Requests that arrive together.")] = 1,
    prompt: Annotated[str, typer.Option(metavar="MIN-MAX", help="Tokens of a prompt.")] = "32-512",
    output: Annotated[str, typer.Option(metavar="MIN-MAX", help="Tokens of an answer.")] = "16-64",
    shared_prefix: Annotated[int, typer.Option(help="Tokens in front of every prompt, the same for all.")] = 0,
    concurrency: Annotated[
        int | None,
        typer.Option(min=1, show_default="no limit", help="Most requests under way; the next is sent when one ends."),
    ] = None,
    temperature: Annotated[float, typer.Option(help="0 takes the most probable token.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of arrivals, lengths and tokens.")] = 0,
    max_requests: Annotated[int, typer.Option(min=1, help="Most requests in a step.")] = 16,
    max_step_tokens: Annotated[int, typer.Option(min=1, help="Most tokens in a step.")] = 512,
    kv_tokens: Annotated[
        int | None,
        typer.Option(
            min=1, show_default="what all requests of a step need, up to 2 GiB", help="Tokens of KV cache in all."
        ),
    ] = None,
    prefix_cache: Annotated[
        bool, typer.Option(help="Reuse the KV cache of earlier requests with the same first tokens.")
    ] = True,
    check: Annotated[
        bool,
        typer.Option("--check", help="Run some requests again, alone, and compare bits; exit code 1 on a difference."),
    ] = False,
    check_sample: Annotated[int, typer.Option(min=1, help="How many requests --check runs.")] = 8,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    plot: Annotated[str | None, typer.Option(metavar="FILE.png", help="Draw load and latencies.")] = None,
):
    """Drive arrivals against the engine, without HTTP, and report throughput, latencies, cache hits and preemptions."""
    workload = measure.Workload(
        requests, rate, burst, _range("--prompt", prompt), _range("--output", output), shared_prefix, temperature, seed
    )
    if plot:
        check_plot(plot)
    if not rate:
        say_unused(invoked, ["burst"], "with --rate 0, where all requests arrive together")
    if not check:
        say_unused(invoked, ["check_sample"], "without --check")
    llm = load(
        model,
        weights=weights,
        kv_dtype=kv_dtype,
        threads=threads,
        needed_context=workload.max_tokens,
        max_requests=max_requests,
        max_step_tokens=max_step_tokens,
        kv_tokens=kv_tokens,
        prefix_cache=prefix_cache,
    )
    _check_context(workload, llm)
    visits = measure.prepare(llm.engine, workload)
    say_stage(f"measuring {_arrivals(workload)}")
    found: dict[str, Any] = dict(about=about(model, llm), engine=_sizes(llm.engine, concurrency))
    measured = measure.measure(llm.engine, visits, concurrency)
    found |= measure.plain(workload, measured)
    if check:
        differing, num_compared = measure.differing(llm.engine, visits, check_sample)
        found["check"] = dict(differing=differing, compared=num_compared)
    llm.close()
    write(json.dumps(found) + "\n") if as_json else show(found, workload, report_console())
    if plot:
        draw(measured, f"{about_in_words(found['about'])}\n{_arrivals(workload)}", plot)
    raise typer.Exit(1 if check and found["check"]["differing"] else 0)


def _range(option, text):
    """ "32-512" as (32, 512), and "32" as (32, 32)."""
    low, dash, high = text.partition("-")
    numbers = low, high if dash else low
    if not all(n.isdecimal() for n in numbers) or not 1 <= int(numbers[0]) <= int(numbers[1]):
        raise ValueError(f"{option} {text!r}: expected MIN-MAX or one number, in tokens, of at least 1")
    return int(numbers[0]), int(numbers[1])


def _check_context(workload, llm) -> None:
    size = llm.context
    if workload.max_tokens > size.num_tokens:
        what = "--kv-tokens hold" if size.limit == "kv_tokens" else "the model's context is"
        raise ValueError(
            f"--shared-prefix, --prompt and --output: together up to {workload.max_tokens} tokens, but "
            f"{what} {size.num_tokens}"
        )


def _sizes(engine, concurrency):
    limits = engine.runner.limits
    return dict(
        max_requests=limits.max_requests,
        max_step_tokens=limits.max_step_tokens,
        kv_tokens=limits.num_pages * PAGE_TOKENS,
        threads=engine.team.num_threads,
        concurrency=concurrency,
        prefix_cache=engine.scheduler.prefix is not None,
    )


def _arrivals(workload):
    """A workload's arrivals in words."""
    rate, burst = workload.rate, workload.burst
    groups = f" in groups of {burst}" if burst > 1 and rate else ""
    return f"{counted(workload.requests, 'request')}, " + (f"{rate:g} a second{groups}" if rate else "all at once")


# ------------------------------------------------------------ report


def show(found, workload, console) -> None:
    """Prints the report."""
    say = lambda text: console.print(text, highlight=False)
    for line in _headlines(workload, found["engine"]):
        say(line)
    say(_throughput(found))
    say(_latencies(found))
    for name, text in _remarks(found):
        say(f"{name:14s}{text}")


def _headlines(workload, sizes):
    """Yields lines about the workload and the engine. sizes: of `_sizes`."""
    prefix = f", {workload.shared_prefix:,} more in front of each" if workload.shared_prefix else ""
    yield f"{_arrivals(workload)} (seed {workload.seed})"
    yield f"prompts of {_between(workload.prompt)} tokens{prefix}, answers of {_between(workload.output)}"
    yield (
        f"engine: {counted(sizes['threads'], 'thread')}; a step has up to {counted(sizes['max_requests'], 'request')}, "
        f"{sizes['max_step_tokens']:,} tokens"
    )
    cap = f"; up to {counted(sizes['concurrency'], 'request')} under way" if sizes["concurrency"] else ""
    yield f"KV cache of {sizes['kv_tokens']:,} tokens{cap}"


def _between(limits):
    low, high = limits
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _throughput(found):
    table = made_table(None, "throughput", ">total", ">per second")
    for name, total in found["totals"].items():
        rate = speed(found["rates"][name]) if name in found["rates"] else ""
        table.add_row(name.replace("_", " "), f"{total:,}", rate)
    return table


def _latencies(found):
    names = ("mean", *(f"p{p}" for p in measure.PERCENTILES), "max")
    table = made_table(None, "milliseconds", *(f">{name}" for name in names))
    rows = {row: found[f"{row}_ms"] for row in ("first_token", "between_tokens", "whole_answer", "held_back")}
    for row, values in (rows | dict(step=found["steps"]["ms"])).items():
        if values:
            table.add_row(row.replace("_", " "), *(_milliseconds(values[name]) for name in names))
    return table


def _milliseconds(number):
    return f"{number:,.2f}" if number < 1000 else f"{number:,.0f}"


def _remarks(found):
    """Yields (title, text) of the lines below the tables."""
    counts, steps, rate = found["counts"], found["steps"], found["hit_rate"]
    hits = "off" if rate is None else f"{rate:.1%} of {counts['query_tokens']:,} prompt tokens were in it"
    yield "prefix cache", hits
    yield "preemptions", f"{counts['preempted']}; at most {counted(steps['most_waiting'], 'request')} waited"
    if found["num_held_back"]:
        yield "held back", f"{counted(found['num_held_back'], 'request')} found no place among the concurrent ones"
    means = f"{steps['mean_requests']:.1f} requests and {steps['mean_tokens']:.1f} tokens on average"
    yield "steps", f"{steps['count']:,} of {means}; busy {steps['busy']:.0%}"
    share = steps["shares"]
    parts = f"schedule {share['scheduling']:.1%}, build {share['building']:.1%}, take {share['taking']:.1%}"
    yield "host", f"{steps['host_share']:.1%} of the steps' time ({parts})"
    if "check" in found:
        check = found["check"]
        yield "check", f"{len(check['differing'])} of {check['compared']} differ from the same request alone"


# ------------------------------------------------------------ picture


def draw(measured, title, path) -> None:
    """Draws the load over time, and the distributions of latencies: to the first token, and between tokens."""
    plt = pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), width_ratios=(3, 2))
    _draw_load(left, measured)
    _draw_latencies(right, measured)
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _draw_load(axis, measured) -> None:
    """Running and waiting requests, with the arrivals as strokes below them."""
    steps = measured.steps
    times = [moment for step in steps for moment in (step.started, step.ended)]
    for name, counts in (
        ("running", [number for step in steps for number in (step.num_running, step.num_staying)]),
        ("waiting", [step.num_waiting for step in steps for _ in range(2)]),
    ):
        axis.step(times, counts, where="post", color=COLOURS[name], linewidth=1, label=name)
    most = max(step.num_running + step.num_waiting for step in steps)
    axis.vlines(
        [visit.arrived for visit in measured.visits],
        -0.09 * most,
        -0.03 * most,
        color="black",
        linewidth=0.6,
        label="arrivals",
    )
    axis.set_xlabel("seconds")
    axis.set_ylabel("requests")
    axis.yaxis.get_major_locator().set_params(integer=True)
    axis.set_yticks([tick for tick in axis.get_yticks() if 0 <= tick <= axis.get_ylim()[1]])
    axis.legend(frameon=False, fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)


def _draw_latencies(axis, measured) -> None:
    """The share of tokens that came within each number of milliseconds, with p50, p95 and p99 as dots."""
    parts = {
        "first": ("first token", [visit.first_token for visit in measured.visits]),
        "between": ("between tokens", [gap for visit in measured.visits for gap in visit.between_tokens]),
    }
    for name, (label, seconds) in parts.items():
        ms = sorted(1e3 * each for each in seconds)
        if ms:
            axis.plot(
                ms,
                [(i + 1) / len(ms) for i in range(len(ms))],
                drawstyle="steps-post",
                color=COLOURS[name],
                linewidth=1.2,
                label=label,
            )
            spread = measure.spread(seconds)
            axis.plot(
                [spread[f"p{percent}"] for percent in measure.PERCENTILES],
                [percent / 100 for percent in measure.PERCENTILES],
                "o",
                color=COLOURS[name],
                markersize=4,
            )
    axis.set_xscale("log")
    axis.xaxis.set_major_formatter("{x:g}")
    axis.set_xlabel("milliseconds; dots: " + ", ".join(f"p{p}" for p in measure.PERCENTILES))
    axis.set_ylabel("share that came within")
    axis.legend(frameon=False, fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)
