"""The folder of packed weights: one folder for each model and target CPU, and how much all of them may take."""

import contextlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lockstep.weights.packed_file import MAKING

LIMIT_VARIABLE = "LOCKSTEP_CACHE_GB"
MOST_BYTES = 64_000_000_000
SHARE_OF_FREE = 0.2
DAY_SECONDS = 86400
ABOUT = "about.json"
HIDDEN = "."
REMOVED = ".removed-"  # how folders begin that are being removed
FORGOTTEN_SECONDS = 3600  # what is still being made after so long has been left behind
PROVISIONAL = "provisional-"  # how folders begin whose model's content hash is not known yet


@dataclass(frozen=True)
class PackedModel:
    """A model's folder: path, what it was made from (empty where nothing says so), bytes, seconds since the epoch."""

    folder: Path
    about: dict
    num_bytes: int
    last_used: float

    @property
    def model(self) -> str:
        """Where the model was when it was packed."""
        return self.about.get("model", "of an earlier version of Lockstep")


def models(root: Path) -> list[PackedModel]:
    """All models that are packed, the one used longest ago first."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        return sorted(map(_model, _folders(root)), key=lambda model: model.last_used)
    return []


def _folders(root: Path) -> list[Path]:
    return [
        Path(entry.path)
        for entry in os.scandir(root)
        if entry.is_dir(follow_symlinks=False) and not entry.name.startswith(HIDDEN)
    ]


def _model(folder: Path) -> PackedModel:
    about = read_about(folder)
    used = folder / ABOUT if about else folder
    with contextlib.suppress(OSError):
        return PackedModel(folder, about, num_bytes(folder), used.stat().st_mtime)
    return PackedModel(folder, about, 0, 0)


def read_about(folder: Path) -> dict:
    """What a folder was made from; empty where nothing says so."""
    with contextlib.suppress(OSError, ValueError):
        found = json.loads((folder / ABOUT).read_text())
        return found if isinstance(found, dict) else {}
    return {}


def write_about(folder: Path, about: dict) -> None:
    """Says what a folder is made from, and that it is used now."""
    handle, beside = tempfile.mkstemp(dir=folder, prefix=MAKING)
    try:
        with os.fdopen(handle, "w") as file:
            json.dump(about, file)
        os.replace(beside, folder / ABOUT)
    except OSError:
        os.unlink(beside)
        raise


def num_bytes(folder: Path) -> int:
    """Bytes of all files below a folder. What vanishes meanwhile counts as nothing."""
    total = 0
    for parent, _, files in os.walk(folder):
        for name in files:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(parent, name)).st_size
    return total


def allowed_bytes(root: Path, used: int) -> int:
    """How much packed weights may take, given what they take: 20 % of what the disk has free for them, at most 64 GB.

    LOCKSTEP_CACHE_GB names another number of gigabytes. Raises ValueError if it is none.
    """
    told = os.environ.get(LIMIT_VARIABLE)
    if not told:
        return min(MOST_BYTES, int(SHARE_OF_FREE * (shutil.disk_usage(root).free + used)))
    try:
        gigabytes = float(told)
    except ValueError:
        gigabytes = -1.0
    if not 0 <= gigabytes < 1e9:
        raise ValueError(f"{LIMIT_VARIABLE}: expected a number of gigabytes from 0, got {told!r:.80}")
    return int(gigabytes * 1e9)


def remove(folder: Path) -> None:
    """Removes a folder of the cache. A process that has its files mapped keeps them; another packs again.

    It gets a name of its own first, so that nobody finds half of it.
    """
    gone = folder.with_name(f"{REMOVED}{os.getpid()}-{folder.name}")
    with contextlib.suppress(OSError):
        os.rename(folder, gone)
        shutil.rmtree(gone, ignore_errors=True)


def remove_leftovers(root: Path) -> None:
    """Removes what killed processes left behind: folders that were being removed, files that were being made."""
    with contextlib.suppress(OSError):
        for entry in os.scandir(root):
            if entry.name.startswith(REMOVED):
                shutil.rmtree(entry.path, ignore_errors=True)
        for path in root.glob(f"*/{MAKING}*"):
            if time.time() - path.stat().st_mtime > FORGOTTEN_SECONDS:
                path.unlink()


def prune(root: Path, most_bytes: int, may_go: Callable[[PackedModel], bool] = lambda model: True) -> int:
    """Removes models, those used longest ago first, until all take at most so many bytes; returns their bytes."""
    remove_leftovers(root)
    found = models(root)
    used = sum(model.num_bytes for model in found)
    for model in found:
        if used > most_bytes and may_go(model):
            remove(model.folder)
            used -= model.num_bytes
    return used


def older_than(days: float) -> Callable[[PackedModel], bool]:
    """Whether a model was last used more than so many days ago."""
    return lambda model: time.time() - model.last_used > days * DAY_SECONDS


def remove_old(folder: Path, days: float) -> None:
    """Removes what lies in a folder and was last used more than so many days ago."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        for entry in os.scandir(folder):
            with contextlib.suppress(OSError):
                if time.time() - entry.stat(follow_symlinks=False).st_mtime >= days * DAY_SECONDS:
                    if entry.is_dir(follow_symlinks=False):
                        remove(Path(entry.path))
                    else:
                        os.unlink(entry.path)
