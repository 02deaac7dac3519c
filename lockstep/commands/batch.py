"""`lockstep batch`: answer all requests of a file."""

import asyncio
import contextlib
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from lockstep.commands.options import (
    CacheDir,
    Draft,
    GenerationConfig,
    KvDtype,
    KvTokens,
    LargestContext,
    OpSwaps,
    PlanFile,
    PrefixCache,
    RayAddress,
    Replicas,
    RopeFactors,
    Speculate,
    Threads,
    VerifyWeights,
    Weights,
    loader,
    say_unused,
)
from lockstep.commands.serve import model_names
from lockstep.commands.terminal.output import counted, shown, unread
from lockstep.new_files import USUAL_FILE, new_file, scratch_folder
from lockstep.progress import Progress

if TYPE_CHECKING:
    from lockstep.batch.finished import Finished
    from lockstep.batch.journal import Journal
    from lockstep.batch.work import Counts, Work
    from lockstep.loading import LoadedModel
    from lockstep.serve.limits import Limits
    from lockstep.serve.service import Service

FAILED, INTERRUPTED = 1, 130
LINES_AHEAD = 2  # lines that are in work or prepared, for each that the engine runs
NO_HURRY = 1e9  # seconds: nobody waits for a single line
MOST_OF_ERROR = 300  # characters of an error that are shown
CLOSE_SECONDS = 1.0  # for the engine to end its step, after Ctrl-C


class Files(NamedTuple):
    """The files of a run. source: the input, which can be read again; output: where the answers go, at the end; shown:
    what the user calls the output; total: lines of the input."""

    source: Path
    output: Path
    shown: str
    journal: "Journal"
    earlier: "Finished"
    total: int


def command(
    invoked: typer.Context,
    input_file: Annotated[
        str,
        typer.Argument(metavar="IN.jsonl", show_default=False, help="Requests, one on each line; -: standard input."),
    ],
    output_file: Annotated[
        str,
        typer.Argument(metavar="OUT.jsonl", show_default=False, help="Where the answers go; -: standard output."),
    ],
    *,
    model: Annotated[
        str | None,
        typer.Option(metavar="MODEL", show_default="the bundled model", help="The model that answers."),
    ] = None,
    name: Annotated[
        list[str] | None,
        typer.Option(
            help="The model's name in requests. Repeatable: all names work; the first is the default in answers.",
            show_default="its own name",
        ),
    ] = None,
    any_model: Annotated[
        bool, typer.Option("--any-model", help="Answer whatever name requests call the model, and repeat that name.")
    ] = False,
    max_requests: Annotated[int, typer.Option(min=1, help="Most sequences in a step.")] = 32,
    max_step_tokens: Annotated[int, typer.Option(min=1, help="Most tokens in a step.")] = 512,
    max_body_mb: Annotated[int, typer.Option(min=1, max=1024, help="Megabytes of a request's body.")] = 8,
    kv_tokens: KvTokens = None,
    prefix_cache: PrefixCache = True,
    max_context: LargestContext = None,
    generation_config: GenerationConfig = "auto",
    weights: Weights = "auto",
    kv_dtype: KvDtype = None,
    rope: RopeFactors = "auto",
    threads: Threads = None,
    cache_dir: CacheDir = None,
    speculate: Speculate = "off",
    plan: PlanFile = None,
    draft: Draft = None,
    verify_weights: VerifyWeights = False,
    replicas: Replicas = None,
    ray: RayAddress = None,
    op: OpSwaps = None,
) -> None:
    """Answer all requests of a file, in OpenAI's form for batches: see docs/serving/batch.md.

    A line of IN.jsonl is {"custom_id", "method": "POST", "url", "body"}; OUT.jsonl gets a line for each, in the same
    order. A run that was interrupted goes on when it is started again. Exit code 0: all lines were answered; 1: some
    are errors; 2: the run is not possible.
    """
    from lockstep.serve.limits import Limits

    if speculate == "off":
        say_unused(invoked, ["draft"], "without --speculate")
    limits = Limits(max_body_bytes=max_body_mb << 20, request_seconds=NO_HURRY, offload_seconds=NO_HURRY)
    names = model_names(name, model)
    with opened(input_file, output_file, limits) as files:
        sizes: dict[str, Any] = dict(
            ops=op,
            weights=weights,
            kv_dtype=kv_dtype,
            rope=rope,
            threads=threads,
            max_context=max_context or files.journal.about.get("max_context"),
            max_requests=max_requests,
            max_step_tokens=max_step_tokens,
            kv_tokens=kv_tokens,
            prefix_cache=prefix_cache,
            cache_dir=cache_dir,
            speculate=speculate,
            plan=plan,
            draft=draft,
            generation_config=generation_config,
            wait_for_content=True,
            verify_weights=verify_weights,
        )
        counts = run(files, loader(replicas, ray)(model, **sizes), names[0], None if any_model else names, limits)
        if output_file == "-":
            copy_to_standard_output(files.output)
    if counts.failed:
        raise typer.Exit(FAILED)


# ------------------------------------------------------------ files


@contextlib.contextmanager
def opened(input_file: str, output_file: str, limits: "Limits") -> Iterator[Files]:
    """A context with the Files of a run. ValueError or OSError where they cannot be those of one."""
    from lockstep.batch.finished import Finished
    from lockstep.batch.journal import Journal, journal_path

    with contextlib.ExitStack() as stack:
        source = readable_again(input_file, stack)
        scratch = stack.enter_context(scratch_folder()) if output_file == "-" else None
        output = scratch / "answers.jsonl" if scratch is not None else Path(output_file)
        check_output(source, output)
        journal = stack.enter_context(contextlib.closing(Journal(journal_path(output))))
        earlier = stack.enter_context(contextlib.closing(Finished(output)))
        total = lines_of(source, output, journal, earlier, limits)
        yield Files(source, output, "standard output" if scratch is not None else output_file, journal, earlier, total)


def readable_again(input_file: str, stack: contextlib.ExitStack) -> Path:
    """The input as a file that can be read several times: itself, or a copy of what is none, such as a pipe."""
    if input_file != "-" and (Path(input_file).is_file() or not Path(input_file).exists()):
        with open(input_file, "rb"):
            return Path(input_file)
    if input_file != "-" and Path(input_file).is_dir():
        raise ValueError(f"{input_file}: expected a file, this is a folder")
    copy = stack.enter_context(scratch_folder()) / "requests.jsonl"
    with open(copy, "wb") as file:
        if input_file != "-":
            with open(input_file, "rb") as given:
                shutil.copyfileobj(given, file)
        elif sys.stdin is None:
            raise ValueError("standard input is closed: expected requests there")
        else:
            shutil.copyfileobj(sys.stdin.buffer, file)
    return copy


def check_output(source: Path, output: Path) -> None:
    """ValueError for an output that cannot be a file of its own."""
    if output.exists() and not output.is_file():
        raise ValueError(f"{output}: expected a file, or a name for a new one")
    if output.exists() and output.samefile(source):
        raise ValueError(f"{output}: this is the input; give OUT another name")
    if not output.parent.is_dir():
        raise ValueError(f"{output}: there is no folder {output.parent}")


def lines_of(source: Path, output: Path, journal: "Journal", earlier: "Finished", limits: "Limits") -> int:
    """The number of lines of the input. ValueError where answers are there, and are all of another input."""
    from itertools import chain

    from lockstep.batch.work import count_lines
    from lockstep.serve.batches.line_reader import most_line_bytes

    kept = chain(journal.output_lines(), earlier.output_lines())
    total, is_of_input = count_lines(source, most_line_bytes(limits), kept)
    if not is_of_input:
        of = journal.path if len(journal) else output
        raise ValueError(
            f"{of}: this has the answers to another input, none of its custom_ids is in {source}; "
            "remove it, or give OUT another name"
        )
    return total


def copy_to_standard_output(path: Path) -> None:
    """Writes a file to standard output; ends the command quietly if its reader has gone."""
    try:
        with open(path, "rb") as file:
            shutil.copyfileobj(file, sys.stdout.buffer)
        sys.stdout.flush()
    except BrokenPipeError:
        raise typer.Exit(unread()) from None


# ------------------------------------------------------------ the run


def run(files: Files, llm: "LoadedModel", name: str, names: list[str] | None, limits: "Limits") -> "Counts":
    """Answers the lines that have no answer yet, and writes the output."""
    from lockstep.batch.work import Work
    from lockstep.serve.batches.line_reader import LineReader, identity_of, most_line_bytes
    from lockstep.serve.service import Service

    service = Service(name, limits, names=names)
    service.open(llm)
    began = time.monotonic()
    try:
        identity = identity_of(service)
        files.journal.tell(max_context=service.max_context)
        work = Work(
            files.source, most_line_bytes(limits), lambda: LineReader(identity, limits), files.journal, files.earlier
        )
        work.counts.total = files.total
        answer_all(work, service, llm.max_requests)
        counts = write(work, files)
    except KeyboardInterrupt:
        raise typer.Exit(interrupted(work.counts, files, service)) from None
    print(ending(counts, files, service, time.monotonic() - began), file=sys.stderr)
    service.close()
    return counts


def answer_all(work: "Work", service: "Service", max_requests: int) -> None:
    """Answers the lines that have no answer yet, with progress on standard error."""
    from lockstep.serve.app import inner_app
    from lockstep.serve.batches.asking import Asking

    counts, began = work.counts, time.monotonic()
    with Progress(detail=lambda: f"{counts.failed} failed, {speed(service, time.monotonic() - began)}") as progress:
        tell = progress.counter("answering", "line")
        asking = Asking(inner_app(service), service)
        has_room = lambda num_running: num_running < LINES_AHEAD * max_requests
        asyncio.run(work.ask(asking, has_room, lambda: tell(counts.done, counts.total)))


def write(work: "Work", files: Files) -> "Counts":
    """Writes the output and removes the journal, whose answers are in it. InputChanged, OSError."""
    with new_file(files.output, USUAL_FILE) as file:
        counts = work.write(file)
    files.journal.remove()
    return counts


def interrupted(counts: "Counts", files: Files, service: "Service") -> int:
    """Says how to go on after Ctrl-C; returns the exit code."""
    words = f"lockstep: interrupted, {counts.done} of {counted(counts.total, 'line')} are done"
    if files.shown == "standard output":
        words += ", and lost: an output that is a file would keep them"
    elif len(files.journal):
        words += f" and kept in {files.journal.path}: the same command goes on from there"
    print(words, file=sys.stderr)
    closing = threading.Thread(target=service.close, daemon=True)
    closing.start()
    closing.join(CLOSE_SECONDS)
    return INTERRUPTED


def ending(counts: "Counts", files: Files, service: "Service", seconds: float) -> str:
    """What a run has done, in words."""
    words = [f"{counted(counts.total, 'line')} in {files.shown}, {failures(counts)}"]
    words += [f"{counts.known} answered before"] if counts.known else []
    made = service.metrics.generated_tokens
    words += [f"{counted(made, 'token')} in {seconds:.1f} s, {speed(service, seconds)}"] if made else []
    return f"lockstep: {'; '.join(words)}"


def failures(counts: "Counts") -> str:
    """How many lines failed, and why the first of them did, in words."""
    if counts.first_error is None:
        return f"{counts.failed} failed"
    error = " ".join(counts.first_error.split())
    error = shown(error if len(error) <= MOST_OF_ERROR else f"{error[:MOST_OF_ERROR]}...", sys.stderr)
    with_it = "" if counts.failed == 1 else f", {counts.num_like_first} of them with the first error"
    return f"{counts.failed} failed{with_it}: {error}"


def speed(service: "Service", seconds: float) -> str:
    """Tokens a second so far, those of prompts where none was generated."""
    metrics = service.metrics
    made, noun = metrics.generated_tokens, "tok/s"
    if not made:
        made, noun = metrics.prompt_tokens, "prompt tok/s"
    return f"{made / seconds if seconds > 0 else 0:.0f} {noun}"
