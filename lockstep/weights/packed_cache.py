"""The cache folder of packed weights: a subfolder for each model and target CPU, and a limit on their size."""

import contextlib
import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lockstep.new_files import new_file, remove_leftovers
from lockstep.user_cache import VARIABLE, free_bytes

LIMIT_VARIABLE = "LOCKSTEP_CACHE_GB"
MOST_BYTES = 64_000_000_000
SHARE_OF_FREE = 0.2
DAY_SECONDS = 86400
ABOUT = "about.json"
HIDDEN = "."
REMOVED = ".removed-"  # prefix of folders that are being removed
PROVISIONAL = "provisional-"  # prefix of folders of models whose content hash is not known yet


@dataclass(frozen=True)
class PackedModel:
    """A packed model. about: what it was packed from, empty if unknown. last_used: seconds since the epoch."""

    folder: Path
    about: dict
    num_bytes: int
    last_used: float

    @property
    def model(self) -> str:
        """The path of the model when it was packed."""
        return self.about.get("model", "of an earlier version of Lockstep")


def models(root: Path) -> list[PackedModel]:
    """All packed models, the least recently used first."""
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
    """What a folder was packed from; empty if unknown."""
    with contextlib.suppress(OSError, ValueError):
        about = json.loads((folder / ABOUT).read_text())
        return about if isinstance(about, dict) else {}
    return {}


def write_about(folder: Path, about: dict) -> None:
    """Writes what a folder was packed from, which also marks it as used now."""
    with new_file(folder / ABOUT) as file:
        file.write(json.dumps(about).encode())


def num_bytes(folder: Path) -> int:
    """Bytes of all files below a folder, without those that are removed meanwhile."""
    size = 0
    for parent, _, files in os.walk(folder):
        for name in files:
            with contextlib.suppress(OSError):
                size += os.lstat(os.path.join(parent, name)).st_size
    return size


def allowed_bytes(root: Path, used: int) -> int:
    """The limit of packed weights: 20 % of the disk's free bytes and the `used` bytes together, at most 64 GB.

    LOCKSTEP_CACHE_GB sets another number of gigabytes. Raises ValueError if it is not a number.
    """
    setting = os.environ.get(LIMIT_VARIABLE)
    if not setting:
        return min(MOST_BYTES, int(SHARE_OF_FREE * ((free_bytes(root) or 0) + used)))
    try:
        gigabytes = float(setting)
    except ValueError:
        gigabytes = -1.0
    if not 0 <= gigabytes < 1e9:
        raise ValueError(f"{LIMIT_VARIABLE}: expected a number of gigabytes from 0, got {setting!r:.80}")
    return int(gigabytes * 1e9)


def limit_words(root: Path, allowed: int) -> str:
    """In words: how many bytes packed weights may take in a folder, and what allows more."""
    setting, free = os.environ.get(LIMIT_VARIABLE), free_bytes(root) or 0
    limit = f"{LIMIT_VARIABLE}={setting:.20} allows" if setting else "they may take"
    is_share = not setting and allowed < MOST_BYTES
    share = f", {SHARE_OF_FREE:.0%} of the room on this disk, where {free / 1e6:,.0f} MB are free" if is_share else ""
    advice = f"Set {LIMIT_VARIABLE} to more gigabytes, or {VARIABLE} to a folder elsewhere."
    return f"{limit} {allowed / 1e6:,.0f} MB{share}. {advice}"


def remove(folder: Path) -> None:
    """Removes a folder of the cache. A process that has its files mapped keeps them; other processes pack again.

    The folder is renamed first, so that no process finds it half removed.
    """
    gone = folder.with_name(f"{REMOVED}{os.getpid()}-{folder.name}")
    with contextlib.suppress(OSError):
        os.rename(folder, gone)
        shutil.rmtree(gone, ignore_errors=True)


def tidy(root: Path) -> None:
    """Removes what killed processes left: half-removed folders and unfinished files."""
    with contextlib.suppress(OSError):
        for entry in os.scandir(root):
            if entry.name.startswith(REMOVED):
                shutil.rmtree(entry.path, ignore_errors=True)
            elif entry.is_dir(follow_symlinks=False):
                remove_leftovers(Path(entry.path))


def prune(root: Path, max_bytes: int, may_go: Callable[[PackedModel], bool] = lambda model: True) -> int:
    """Removes models, the least recently used first, until the rest takes at most max_bytes; returns their bytes.

    may_go: whether a model may be removed.
    """
    tidy(root)
    packed = models(root)
    used = sum(model.num_bytes for model in packed)
    for model in packed:
        if used > max_bytes and may_go(model):
            remove(model.folder)
            used -= model.num_bytes
    return used


def older_than(days: float) -> Callable[[PackedModel], bool]:
    """A test for models that were last used more than `days` days ago."""
    return lambda model: time.time() - model.last_used > days * DAY_SECONDS


def remove_old(folder: Path, days: float) -> None:
    """Removes files and folders in a folder that were last used at least `days` days ago."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        for entry in os.scandir(folder):
            with contextlib.suppress(OSError):
                if time.time() - entry.stat(follow_symlinks=False).st_mtime >= days * DAY_SECONDS:
                    if entry.is_dir(follow_symlinks=False):
                        remove(Path(entry.path))
                    else:
                        os.unlink(entry.path)
