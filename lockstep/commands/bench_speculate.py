"""`lockstep bench speculate`: the speedup by drafts, for several shares of right drafts."""

import json
from collections.abc import Callable
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.console import Console

from lockstep.commands.options import KvDtype, ModelName, Threads, Weights, load, say_unused
from lockstep.commands.terminal.output import say_stage, write
from lockstep.commands.terminal.tables import made_table, report_console, speed
from lockstep.engine.engine import EngineOptions
from lockstep.engine.speculation.drafts import MAX_DRAFTS
from lockstep.lab import speculation as measure

PARTS = ("steps", "answers", "grouped")


def command(
    invoked: typer.Context,
    *,
    model: ModelName = None,
    weights: Weights = "auto",
    kv_dtype: KvDtype = None,
    threads: Threads = None,
    acceptance: Annotated[str, typer.Option(help="Percent of drafts that are right, comma-separated.")] = "0,50,70,90",
    requests: Annotated[str, typer.Option(help="Requests at a time, comma-separated.")] = "1,4,8,16,32",
    contexts: Annotated[str, typer.Option(help="Context lengths of the steps, comma-separated.")] = "128,1000",
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of a prompt.")] = 128,
    tokens: Annotated[int, typer.Option(min=8, help="Tokens of an answer.")] = 128,
    rounds: Annotated[int, typer.Option(min=1, help="Runs of each comparison; medians are shown.")] = 3,
    replay: Annotated[
        bool,
        typer.Option("--replay", help="Let the model's MTP head compute all drafts before they are replaced."),
    ] = False,
    parts: Annotated[str, typer.Option(help=f"What is measured: of {', '.join(PARTS)}.")] = ",".join(PARTS),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure what drafts gain on this machine: steps by their rows, and answers whose drafts are right as often as
    asked for, against none; exit code 1 if an answer differs."""
    chosen_parts = _parts(parts)
    plan = measure.Plan(
        tuple(percent / 100 for percent in _numbers("--acceptance", acceptance, 0, 100)),
        tuple(_numbers("--requests", requests, 1, 256)),
        tuple(_numbers("--contexts", contexts, 1, 1 << 20)),
        prompt,
        tokens,
        rounds,
    )
    if "steps" not in chosen_parts:
        say_unused(invoked, ["contexts"], "without --parts steps")
    if "answers" not in chosen_parts:
        say_unused(invoked, ["acceptance", "requests", "prompt", "tokens", "replay"], "without --parts answers")
    sizes: dict[str, Any] = dict(max_requests=max(plan.requests), prefix_cache=False, kv_tokens=plan.kv_tokens)
    llm = load(model, weights=weights, kv_dtype=kv_dtype, threads=threads, needed_context=plan.longest, **sizes)
    if plan.longest > llm.max_context:
        raise ValueError(f"--contexts, --prompt and --tokens: {plan.longest} tokens, the model has {llm.max_context}")
    options = EngineOptions(
        **sizes, threads=llm.engine.team.num_threads, speculate="mtp" if replay else "lookup", draft=MAX_DRAFTS
    )
    bench = measure.Bench(llm.model, llm.engine, options)
    found = run(bench, plan, chosen_parts, say_stage)
    bench.close()
    llm.close()
    write(json.dumps(found) + "\n") if as_json else show(found, report_console())
    raise typer.Exit(1 if any(row["differing"] for row in found["answers"]) else 0)


def _parts(text: str) -> list[str]:
    chosen = [part for part in text.split(",") if part]
    if not chosen or not set(chosen) <= set(PARTS):
        raise ValueError(f"--parts {text!r}: expected some of {', '.join(PARTS)}, comma-separated")
    return chosen


def _numbers(option: str, text: str, low: int, high: int) -> list[int]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(part.isdecimal() and low <= int(part) <= high for part in parts):
        raise ValueError(f"{option} {text!r}: expected whole numbers from {low} to {high}, comma-separated")
    return [int(part) for part in parts]


def run(bench: measure.Bench, plan: measure.Plan, parts: list[str], say: Callable[[str], None]) -> dict[str, Any]:
    """What is asked for, as plain data."""
    found: dict[str, Any] = dict(threads=bench.plain.team.num_threads, steps=[], answers=[], grouped=None)
    if "steps" in parts:
        for context in plan.contexts:
            say(f"steps after {context} tokens")
            seconds = measure.step_seconds(bench, 1, context, measure.WIDTHS, 10 * plan.rounds)
            found["steps"].append(dict(context=context, milliseconds={k: 1e3 * v for k, v in seconds.items()}))
    if "answers" in parts:
        for count in plan.requests:
            say(f"answers of {count} at a time")
            found["answers"] += [asdict(row) for row in measure.answers(bench, plan, count)]
    if "grouped" in parts:
        say("grouped_linear")
        found["grouped"] = asdict(measure.grouped(bench.plain.team, 3 * plan.rounds))
    return found


# ------------------------------------------------------------ report


def show(found: dict[str, Any], console: Console) -> None:
    """Prints the tables."""
    if found["steps"]:
        console.print(steps_table(found["steps"]))
    if found["answers"]:
        console.print(answers_table(found["answers"]))
    if found["grouped"]:
        console.print(grouped_words(found["grouped"]), highlight=False)


def steps_table(steps: list[dict[str, Any]]) -> Any:
    """The time of a step with several rows of one request (one token and its drafts), against a step of one row."""
    table = made_table("a step of one request", ">rows", *(f">after {row['context']}" for row in steps))
    for width in steps[0]["milliseconds"]:
        cells = []
        for row in steps:
            of_width, of_one_row = row["milliseconds"][width], row["milliseconds"][1]
            cells.append(f"{of_width:.2f} ms  {of_width / of_one_row:.2f}x")
        table.add_row(str(width), *cells)
    return table


def answers_table(rows: list[dict[str, Any]]) -> Any:
    """The speedup of answers by drafts, and the share of drafts that were right."""
    names = ">requests", ">right", ">drafts", ">tok/s off", ">decode", ">whole", ">per step", ">were right"
    table = made_table("answers with drafts against none", *names)
    for row in rows:
        setting = row["setting"]
        draft = "auto" if setting["draft"] is None else str(setting["draft"])
        differs = f"  {row['differing']} ANSWERS DIFFER" if row["differing"] else ""
        table.add_row(
            str(setting["requests"]),
            f"{setting['acceptance']:.0%}",
            draft,
            speed(row["tokens_per_second"]),
            f"{row['decode']:.2f}x",
            f"{row['whole']:.2f}x",
            f"{row['tokens_per_step']:.2f}",
            f"{row['accepted']}/{row['drafted']}{differs}",
        )
    return table


def grouped_words(row: dict[str, Any]) -> str:
    """A line about `grouped_linear`, which reads its weights once for all rows."""
    return (
        f"grouped_linear, q8_0, {row['rows']} rows: {1e3 * row['together']:.2f} ms, one row at a time "
        f"{1e3 * row['per_token']:.2f} ms: {row['per_token'] / row['together']:.2f}x "
        f"(which reads {row['per_token_gb']:.1f} GB/s, a linear layer of one row {row['linear_gb']:.1f})"
    )
