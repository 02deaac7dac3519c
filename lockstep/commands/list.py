"""`lockstep list`: the models on this disk, and which of them can be run."""

import json
import os
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer

from lockstep.commands.cache import size
from lockstep.commands.terminal.errors import is_told, sentence
from lockstep.commands.terminal.output import counted, shown
from lockstep.commands.terminal.tables import made_table, report_console
from lockstep.user_cache import user_cache
from lockstep.weights import packed_cache
from lockstep.weights.folders.mistral import PARAMS
from lockstep.weights.hub import resolve_model
from lockstep.weights.sources.found import FoundModel, file_bytes
from lockstep.weights.sources.on_disk import SOURCES

BUNDLED, RUN_BEFORE = "bundled", "run before"
NO_NAME = "(without MODEL)"  # stands for the bundled model's name


@dataclass(frozen=True)
class Row:
    """A model of the list. name: what to type; None: nothing. format: of most of its weights. runs: whether it can be
    run; None if it was not opened. only: all that one can do that runs, but continues no texts. reason: why it cannot
    be run, or do more. packed: whether its packed weights are in Lockstep's cache."""

    name: str | None
    source: str
    path: str
    num_bytes: int
    format: str | None
    runs: bool | None
    only: str | None
    reason: str | None
    packed: bool


@dataclass(frozen=True)
class Check:
    """What the headers of a model say: see Row."""

    format: str | None = None
    runs: bool | None = None
    only: str | None = None
    reason: str | None = None


def command(
    text: Annotated[
        str | None, typer.Argument(metavar="[TEXT]", show_default=False, help="List only names with this text.")
    ] = None,
    check: Annotated[bool, typer.Option(help="Open each model to see whether it can be run.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON list.")] = False,
) -> None:
    """List the models that are on this disk: in the Hugging Face hub's cache, Ollama's store and LM Studio's folders,
    those that Lockstep has run before, and the bundled one; what to type for each, and whether it can be run.

    Only their headers are read.
    """
    all_models = found_models(say_unread)
    models = [(source, model) for source, model in all_models if _has(model, text)]
    rows = rows_of(models, check)
    if text and not rows:
        hint = f"{counted(len(all_models), 'model')} on this disk, none with {text!r} in the name"
        print(shown(f"lockstep: {hint} (lockstep list shows all)", sys.stderr), file=sys.stderr)
    if as_json:
        print(json.dumps([asdict(row) for row in rows]))
    elif rows:
        show(rows)


def _has(model: FoundModel, text: str | None) -> bool:
    return text is None or text.lower() in (model.name or BUNDLED).lower()


def say_unread(error: OSError) -> None:
    """Says that a folder cannot be read."""
    print(f"lockstep: {error.filename}: {error.strerror}: what is there is not listed", file=sys.stderr)


def found_models(on_error: Callable[[OSError], None]) -> list[tuple[str, FoundModel]]:
    """(source, model) of all models on this disk. on_error: called for each folder that cannot be read."""
    bundled = resolve_model(None)
    models = [(BUNDLED, FoundModel("", bundled, file_bytes(*bundled.glob("*.safetensors"))))]
    models += [(source, model) for source, found in SOURCES.items() for model in found(on_error)]
    known = {os.path.realpath(model.path) for _, model in models}
    for path in map(Path, packed_paths()):
        if path.parts[-2:] == bundled.parts[-2:]:  # that of another installation
            continue
        is_file = os.path.isfile(path)
        is_folder = any(os.path.isfile(path / name) for name in ("config.json", PARAMS))
        if os.path.realpath(path) not in known and (is_file or is_folder):
            weights = [path] if is_file else [*path.glob("*.safetensors")]
            models.append((RUN_BEFORE, FoundModel(str(path), path, file_bytes(*weights))))
    return models


def packed_paths() -> list[str]:
    """The paths of the models whose packed weights are in Lockstep's cache, each once, in the order of the names."""
    packed = packed_cache.models(user_cache() / "packed")
    return sorted({model.about["model"] for model in packed if isinstance(model.about.get("model"), str)})


def rows_of(models: list[tuple[str, FoundModel]], check: bool) -> list[Row]:
    """The rows of the list, with progress on stderr while the models are opened."""
    from lockstep.progress import Progress

    packed, rows = set(packed_paths()), []
    with Progress() as progress:
        say = progress.counter("looking at models", "model")
        for source, model in models:
            say(len(rows) + 1, len(models))
            seen = Check() if model.problem is None else Check(runs=False, reason=model.problem)
            if check and model.problem is None:
                seen = checked(model)
            place = model.name or None, source, str(model.path), model.num_bytes
            row = Row(*place, **asdict(seen), packed=str(model.path) in packed)
            rows.append(row)
    return rows


def checked(model: FoundModel) -> Check:
    """Whether a model can be run, from its headers."""
    from lockstep.engine.model import load_model
    from lockstep.models.checkpoint import open_checkpoint
    from lockstep.weights.store import WeightStore

    try:
        checkpoint = open_checkpoint(model.path)
        loaded = load_model(checkpoint, WeightStore(), "auto", None)
    except Exception as error:  # whatever is wrong with a model, the others are listed
        return Check(runs=False, reason=reason_of(error, model.path))
    formats = ", ".join(loaded.main_formats)
    if (lack := lacking_memory(model.num_bytes)) is not None:
        return Check(formats, runs=False, reason=lack)
    if not loaded.can_generate:
        return Check(formats, runs=True, only="embeddings")
    problem = text_problem(model.path, checkpoint.metadata)
    return Check(formats, runs=True, only=None if problem is None else "token ids", reason=problem)


def reason_of(error: Exception, path: Path) -> str:
    """Why a model cannot be opened, in one line, without its path, which stands beside it."""
    reason = sentence(error) if is_told(error) else f"{type(error).__name__}: {error}"
    return " ".join(reason.split()).removeprefix(f"{path}: ").removeprefix(f"{path}{os.sep}")


def lacking_memory(num_bytes: int) -> str | None:
    """In words: the memory that weights of so many bytes would need and this machine does not have; None if it has."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGESIZE")
    if num_bytes <= memory:
        return None
    return f"its weights take {size(num_bytes)} of memory, this machine has {size(memory)}"


def text_problem(path: Path, metadata: Mapping[str, object]) -> str | None:
    """Why prompts of a model must be token ids, and can be no texts; None if they can."""
    from lockstep.text.tokenizer.gguf import unknown_pre_tokenizer
    from lockstep.text.tokenizer.tokenizer import has_tokenizer

    if not has_tokenizer(path, metadata):
        return "it has no tokenizer"
    return unknown_pre_tokenizer(metadata) if "tokenizer.ggml.model" in metadata else None


def show(rows: list[Row]) -> None:
    """Prints the table."""
    from rich.text import Text

    table = made_table(None, "MODEL to type", ">size", "format", "from", "runs")
    table.columns[0].no_wrap = True  # so that it can be copied
    for row in rows:
        name, runs = Text(shown(row.name or NO_NAME, sys.stdout)), Text(shown(in_words(row), sys.stdout))
        table.add_row(name, size(row.num_bytes) if row.num_bytes else "", row.format or "", row.source, runs)
    report_console().print(table)
    total = size(sum(row.num_bytes for row in rows))
    print(f"{counted(len(rows), 'model')}, {total}{_example(rows)}")


def in_words(row: Row) -> str:
    """What a model can be run with, and why no more, or why not."""
    if row.runs is None:
        return ""
    answer = f"{row.only} only" if row.only else "yes" if row.runs else "no"
    return answer + (f": {row.reason}" if row.reason else "")


def _example(rows: Iterable[Row]) -> str:
    """A command that runs the first model of the list that continues texts, with "; " before it; the bundled one, which
    has no name, if no other does; "" if none does."""
    able = [row for row in rows if row.runs is not False and row.only is None]
    first = next((row for row in able if row.name), next(iter(able), None))
    if first is None:
        return ""
    name = f" {shlex.quote(shown(first.name, sys.stdout))}" if first.name else ""
    return f"; for example: lockstep generate{name} -p Hello"
