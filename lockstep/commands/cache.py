"""`lockstep cache`: lists packed weights, compiled kernels and hashes that are kept on disk."""

import json
import sys
import time
from typing import Annotated

import typer
from rich.text import Text

from lockstep.commands.terminal.output import shown
from lockstep.commands.terminal.tables import made_table, report_console
from lockstep.user_cache import cache_lasts, user_cache
from lockstep.weights import packed_cache
from lockstep.weights.content import hub_cache

OTHER_FOLDERS = ("kernels", "hashes", "selfcheck")  # of the cache, besides packed weights


def command(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """List what is kept on disk: packed weights by model, compiled kernels, hashes of files, and what the Hugging Face
    hub's client has downloaded.

    All of it is made, or downloaded, again when it is missing. `lockstep cache prune` removes all but downloads.
    """
    found = described(user_cache())
    if as_json:
        print(json.dumps(found))
    else:
        show(found)


def described(root):
    """The content of a cache folder, as a JSON object. Without a folder that lasts, nothing is kept."""
    packed = root / "packed"
    models = packed_cache.models(packed)
    used = sum(model.num_bytes for model in models)
    others = {name: packed_cache.num_bytes(root / name) for name in OTHER_FOLDERS}
    hub = hub_cache()
    return dict(
        folder=str(root) if cache_lasts() else None,
        packed_bytes=used,
        allowed_bytes=packed_cache.allowed_bytes(root, used) if cache_lasts() else 0,
        models=[
            dict(
                model=model.model,
                folder=str(model.folder),
                target=model.about.get("target"),
                bytes=model.num_bytes,
                last_used=model.last_used,
            )
            for model in reversed(models)
        ],
        **{f"{name}_bytes": size for name, size in others.items()},
        hub_folder=str(hub),
        hub_bytes=packed_cache.num_bytes(hub),
    )


def show(found) -> None:
    """Prints the tables."""
    console = report_console()
    if found["folder"] is None:
        console.print("nothing is kept")
    else:
        _show_kept(console, found)
    if found["hub_bytes"]:
        folder = Text(shown(found["hub_folder"], sys.stdout))
        console.print(
            Text(f"downloads of the hub's client {size(found['hub_bytes'])} in ").append(folder), soft_wrap=True
        )


def _show_kept(console, found) -> None:
    table = made_table(shown(found["folder"], sys.stdout), "packed weights of", "for", ">size", "last used")
    for model in found["models"]:
        name, used = Text(shown(model["model"], sys.stdout)), ago(model["last_used"])
        table.add_row(name, model["target"] or "", size(model["bytes"]), used)
    console.print(table)
    console.print(
        f"packed weights {size(found['packed_bytes'])}, at most {size(found['allowed_bytes'])} "
        f"(LOCKSTEP_CACHE_GB changes that); compiled kernels {size(found['kernels_bytes'])}; hashes of files "
        f"{size(found['hashes_bytes'] + found['selfcheck_bytes'])}",
        highlight=False,
    )


def size(num_bytes) -> str:
    """A number of bytes in words, such as "1.2 GB"."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6)):
        if num_bytes >= factor:
            return f"{num_bytes / factor:.1f} {unit}"
    return f"{num_bytes / 1e3:.0f} kB"


def ago(when) -> str:
    """How long ago a time was, in words, such as "3 days ago"."""
    seconds = time.time() - when
    for unit, length in (("days", packed_cache.DAY_SECONDS), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit} ago"
    return "just now"
