"""`lockstep cache prune`: remove packed weights, compiled kernels and hashes from the disk."""

from typing import Annotated

import typer

from lockstep.commands.cache import OTHER_FOLDERS, size
from lockstep.new_files import SCRATCH_FOLDER, remove_leftovers
from lockstep.user_cache import user_cache
from lockstep.weights import packed_cache


def command(
    older_than: Annotated[
        float | None,
        typer.Option(metavar="DAYS", min=0, show_default=False, help="Remove what was not used for so many days."),
    ] = None,
    max_gb: Annotated[
        float | None,
        typer.Option(
            "--max-gb",
            min=0,
            show_default=False,
            help="Remove the models used longest ago until packed weights take so many GB.",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(metavar="TEXT", show_default=False, help="Remove the models whose path contains this text."),
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Remove all packed weights, kernels and hashes.")] = False,
) -> None:
    """Remove packed weights, and with --older-than or --all compiled kernels and hashes of files, too.

    Without options, packed weights above the cache's limit are removed. Running processes are not disturbed.
    """
    if model == "":
        raise ValueError("--model: expected a part of a model's path, got nothing")
    if sum(given is not None for given in (older_than, max_gb, model)) + everything > 1:
        raise ValueError("expected at most one of --older-than, --max-gb, --model and --all")
    root = user_cache()
    before = _total(root)
    if model is not None:
        _check_named(root, model)
    _prune(root, older_than, max_gb, model, everything)
    after = _total(root)
    print(f"removed {size(before - after)}; {size(after)} are kept in {root}")


MOST_GB = 1e9  # stands for no limit


def _check_named(root, model) -> None:
    """ValueError unless a packed model's path contains the text."""
    known = [one.model for one in packed_cache.models(root / "packed")]
    if not any(model in path for path in known):
        raise ValueError(
            f"--model {model!r}: no packed model's path contains it, there "
            f"{'are ' + ', '.join(known) if known else 'is none'}"
        )


def _total(root):
    return sum(packed_cache.num_bytes(root / kind) for kind in ("packed", *OTHER_FOLDERS))


def _prune(root, older_than, max_gb, model, everything) -> None:
    packed, allowed = root / "packed", 0
    may_go = lambda one: True
    if older_than is not None:
        may_go = packed_cache.older_than(older_than)
    elif model is not None:
        may_go = lambda one: model in one.model
    elif not everything:
        used = packed_cache.num_bytes(packed)
        allowed = packed_cache.allowed_bytes(root, used) if max_gb is None else int(min(max_gb, MOST_GB) * 1e9)
    packed_cache.prune(packed, allowed, may_go)
    packed_cache.tidy(root / "kernels")
    remove_leftovers(root / "hashes")
    remove_leftovers(root, SCRATCH_FOLDER)
    days = 0 if everything else older_than
    if days is not None:
        for kind in OTHER_FOLDERS:
            packed_cache.remove_old(root / kind, days)
