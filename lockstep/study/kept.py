"""Files that a study's folder keeps between runs: the ids of its trials, and the statistics of calibration."""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lockstep.new_files import USUAL_FILE, new_file
from lockstep.ptq.observers import Stat
from lockstep.study.records import CALIBRATION, IDS, ROUNDS, Lines, going_on, save_text
from lockstep.study.rounds import ANEW, FLOAT_NAME
from lockstep.study.scoring.calibrate import COUNTED
from lockstep.study.trials import Study

# exceptions with which NumPy refuses a file that is damaged or of another kind
BROKEN = (ValueError, TypeError, AttributeError, KeyError, EOFError, zipfile.BadZipFile, zlib.error)


def check_same(folder: Path, study: Study) -> None:
    """ValueError if the folder belongs to another study, or if nothing in it says to which it belongs."""
    path, ids = folder / IDS, ids_of(study)
    there = _read_ids(path) if path.exists() else _ids_of_rounds(folder, ids)
    if there != ids:
        raise ValueError(
            f"{folder}: it holds a study of other trials, another model or other texts; expected a new folder"
        )


def save_ids(folder: Path, study: Study) -> None:
    """Writes into the folder to which study it belongs."""
    save_text(folder / IDS, json.dumps(ids_of(study)) + "\n")


def ids_of(study: Study) -> list[str]:
    """What identifies a study: the ids of its trials, which cover model and texts, and the windows of a round."""
    return [trial.id for trial in study.trials] + [str(study.round)]


def _read_ids(path: Path) -> Any:
    try:
        return json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: it cannot be read as JSON ({error}); delete it: rounds tell the same") from None


def _ids_of_rounds(folder: Path, ids: list[str]) -> list[str]:
    """For a folder without ids: the given ids if its rounds have no other trials, else the trials of its rounds.
    ValueError if the folder has a calibration and no rounds, so that nothing says to which study it belongs."""
    found = {str(record.get("trial")) for record in Lines(folder / ROUNDS, ANEW).records} - {FLOAT_NAME}
    if not found and (folder / CALIBRATION).exists():
        raise ValueError(
            f"{folder / CALIBRATION}: nothing says which study it is of, since {IDS} is missing; delete it: "
            f"{going_on(folder)} makes it anew"
        )
    return ids if found <= set(ids) else sorted(found)


# ------------------------------------------------------------ calibration


def save_stats(path: Path, stats: Mapping[str, Stat]) -> None:
    """Writes the statistics of calibration, whole or not at all. OSError, with the path."""
    arrays = {f"{name}/{field}": getattr(stat, field) for name, stat in stats.items() for field in COUNTED}
    with new_file(path, USUAL_FILE) as file:
        np.savez_compressed(file, **arrays)


def load_stats(path: Path) -> dict[str, Stat]:
    """The statistics of a study's calibration. ValueError, with the path, for a file that does not hold them."""
    try:
        with np.load(path) as found:
            names = dict.fromkeys(key.rpartition("/")[0] for key in found.files)
            return {name: Stat(name, *(found[f"{name}/{field}"] for field in COUNTED)) for name in names}
    except (*BROKEN, OSError) as error:
        if isinstance(error, OSError) and error.errno:
            raise
        raise ValueError(
            f"{path}: it is cut short or was changed, so that what calibration saw cannot be read; delete it: "
            f"{going_on(path.parent)} makes it anew"
        ) from None
