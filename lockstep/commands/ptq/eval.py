"""`lockstep ptq eval`: perplexity of a text by a model, with or without a quantization plan."""

import json
import pathlib
import sys
from typing import Annotated

import typer

from lockstep.commands.options import KvDtype, ModelName, Threads
from lockstep.commands.terminal.output import counted
from lockstep.progress import Progress

CALIBRATION_WINDOWS = 32


def command(
    *,
    model: ModelName = None,
    text: Annotated[pathlib.Path, typer.Option(metavar="FILE", help="The text, in UTF-8.")],
    plan: Annotated[
        pathlib.Path | None,
        typer.Option(metavar="FILE", help="A plan (.toml), or a plan with its grids (.json). Default: no rounding."),
    ] = None,
    calibrate: Annotated[
        pathlib.Path | None,
        typer.Option(metavar="FILE", help="The text that gives a .toml plan its ranges. It must not be in --text."),
    ] = None,
    calibration_windows: Annotated[
        int | None,
        typer.Option(min=1, help="Windows of --calibrate, evenly spread.", show_default=f"up to {CALIBRATION_WINDOWS}"),
    ] = None,
    length: Annotated[int, typer.Option(min=2, help="Tokens of a window; each window is scored on its own.")] = 512,
    windows: Annotated[
        int | None, typer.Option(min=1, help="Windows, evenly spread over the text.", show_default="all")
    ] = None,
    like: Annotated[
        str | None,
        typer.Option(
            metavar="llama.cpp",
            show_default="none",
            help="Cut and score windows as llama-perplexity does: only the second half of each, --windows the first.",
        ),
    ] = None,
    twin: Annotated[
        str,
        typer.Option(metavar="TWIN", help="prefill_reference, or prefill: head by head, as hardware. The same bits."),
    ] = "prefill_reference",
    weights: Annotated[
        str | None,
        typer.Option(metavar="FORMAT", help="As for generate.", show_default="auto; f32 with a plan"),
    ] = None,
    kv_dtype: KvDtype = None,
    threads: Threads = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Score a text: mean negative log-likelihood, perplexity with its standard error, and, with a plan, the comparison
    with the unrounded model: paired differences, KL divergence, share of equal top tokens."""
    from lockstep.study.scoring.evaluate import TWINS, evaluate
    from lockstep.study.scoring.subject import load_subject
    from lockstep.study.scoring.text import LIKE, read_text, windows_of

    for option, value, allowed in (("--like", like, LIKE), ("--twin", twin, TWINS)):
        if value is not None and value not in allowed:
            raise ValueError(f"{option} {value!r}: expected {' or '.join(allowed)}")
    if plan is None and (calibrate or calibration_windows):
        raise ValueError("--calibrate and --calibration-windows: expected only with --plan")
    for option, value, allowed in (("--weights", weights, ("f32", "auto")), ("--kv-dtype", kv_dtype, ("f32",))):
        if plan is not None and value is not None and value not in allowed:
            raise ValueError(
                f"{option} {value}: with --plan weights and cache are float32; expected f32, or no {option}"
            )
    plan_of_file = None if plan is None else read_plan(plan, calibrate)
    with Progress() as progress:
        formats = (weights or "auto", kv_dtype) if plan is None else ("f32", "f32")
        subject = load_subject(model, length, *formats, progress)
        tokenizer = subject.tokenizer
        read = read_text(text, tokenizer)
        cut = windows_of(read, length, windows, like)
        with made_team(threads) as team:
            solved = None
            if plan_of_file is not None:
                calibration = calibration_text(calibrate, read, tokenizer)
                solved = solved_plan(
                    subject, plan, plan_of_file, calibration, calibration_windows, team, length, progress
                )
            scored = progress.counter("scoring", "window")
            found = evaluate(subject, cut, team, solved, twin, like is not None, scored)
    found |= dict(text=read.sha256, model=subject.content, windows=len(cut), length=length, twin=twin)
    found["plan_hash"] = solved.plan.hash if solved else None
    print(json.dumps(found)) if as_json else show(found)


def made_team(threads):
    """A context with a team of threads, which ends with it."""
    import contextlib

    from lockstep.native.host import num_cores, team_size
    from lockstep.runtime.threads import Team

    if (threads or 0) > num_cores():
        print(f"lockstep: {threads} threads on {num_cores()} cores: {num_cores()} run", file=sys.stderr)
    return contextlib.closing(Team(team_size(threads)))


def calibration_text(path, evaluation, tokenizer):
    """The calibration text, or None where no file is given. ValueError where it is part of the evaluation text."""
    from lockstep.study.scoring.text import check_disjoint, read_text

    if path is None:
        return None
    read = read_text(path, tokenizer)
    check_disjoint(read, evaluation, tokenizer)
    return read


def read_plan(path, calibrate):
    """The plan of a file: a Solved with its grids (.json), or a Plan (.toml)."""
    import tomllib

    from lockstep.ptq.plan import Plan
    from lockstep.ptq.solved import EXPECTED, Solved

    if path.suffix == ".json":
        if calibrate is not None:
            raise ValueError(f"--calibrate: {path} has its grids already; expected only with a plan in .toml")
        return Solved.load(path)
    text = path.read_text("utf-8")
    try:
        table = tomllib.loads(text)
        if "evaluate" in table:
            raise ValueError(f"it is a recipe; expected its [plan] alone, as a file with rules = [..], or {EXPECTED}")
        return Plan.from_table(table)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path}: it cannot be read as TOML: {error}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def solved_plan(subject, path, plan, text, num_windows, team, length, progress):
    """The plan with its grids (a Solved), which calibration on a text finds if the file does not have them."""
    from lockstep.ptq.solved import Solved
    from lockstep.study.scoring.evaluate import needs_ranges, solve
    from lockstep.study.scoring.text import windows_of

    if isinstance(plan, Solved):
        return plan
    if text is None and needs_ranges(plan, subject):
        raise ValueError(f"{path}: its grids need ranges; expected --calibrate FILE, or a plan with its grids (.json)")
    windows = []
    if text is not None:
        every = len(windows_of(text, length))
        windows = windows_of(text, length, num_windows or min(every, CALIBRATION_WINDOWS))
    return solve(subject, plan, team, windows, progress.counter("calibrating", "window"))


def plain(value) -> str:
    """A number with four digits after the point, or with an exponent from a million on."""
    return f"{value:.4f}" if abs(value) < 1e6 else f"{value:.5g}"


def show(found) -> None:
    """Prints the figures as lines."""
    for name in ("float", "plan"):
        if name in found:
            scores = found[name]
            error = "" if scores["ppl_error"] is None else f" +- {plain(scores['ppl_error'])}"
            print(f"{name:6} {scores['nll']:.6f} nats a token, perplexity {plain(scores['ppl'])}{error}")
    if "against float" in found:
        delta = found["against float"]
        within = "" if delta["delta_low"] is None else f" ({delta['delta_low']:+.6f} .. {delta['delta_high']:+.6f})"
        print(
            f"delta  {delta['delta_nll']:+.6f} nats a token{within}, KL mean {delta['kl_mean']:.6f}, "
            f"p99 {delta['kl_p99']:.5f}, max {delta['kl_max']:.4f}, same top token {delta['top1']:.2%}"
        )
    for site, reason in found.get("in floats", {}).items():
        print(f"{site}: its layer stays in float arithmetic: {reason}")
    windows = counted(found["windows"], "window")
    print(f"{found['float']['tokens']} tokens scored, {windows} of {found['length']}, twin {found['twin']}")
