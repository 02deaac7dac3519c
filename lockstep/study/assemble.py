"""Makes a study from a recipe: loads its model; reads, checks and cuts its texts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from lockstep.progress import OnProgress
from lockstep.study.recipe import CALIBRATION_WINDOWS, Recipe, TextChoice, first_difference, to_toml
from lockstep.study.records import RECIPE, WINNER_RECIPE, check_folder, save_text
from lockstep.study.scoring.subject import Subject, load_subject
from lockstep.study.scoring.text import Text, Window, check_disjoint, read_text, windows_hash, windows_of
from lockstep.study.trials import Study, make_study
from lockstep.text.tokenizer.tokenizer import Tokenizer


def assembled(recipe: Recipe, progress: OnProgress | None = None) -> tuple[Study, Subject]:
    """The study that a recipe describes, and its model. ValueError or OSError for files that are missing or refused."""
    longest = max(choice.length for choice in (recipe.evaluate, recipe.calibrate) if choice)
    subject = load_subject(recipe.model, longest, recipe.weights, "f32", progress)
    tokenizer = subject.tokenizer
    text, evaluation = _read(recipe.evaluate, tokenizer)
    records = dict(evaluation=[_record(recipe.evaluate, text, evaluation)])
    calibration: list[Window] = []
    if recipe.calibrate is not None:
        fitted, calibration = _calibration(recipe.calibrate, tokenizer)
        check_disjoint(fitted, text, tokenizer)
        records["calibration"] = [_record(recipe.calibrate, fitted, calibration)]
    study = make_study(
        subject,
        recipe.plan,
        recipe.sweeps,
        [window.ids for window in calibration],
        evaluation,
        round=recipe.round,
        early_stop=recipe.early_stop,
        by_token=recipe.evaluate.like is not None,
        texts=records,
    )
    return study, subject


def _read(choice: TextChoice, tokenizer: Tokenizer) -> tuple[Text, list[Window]]:
    text = read_text(choice.text, tokenizer, choice.sha256)
    return text, windows_of(text, choice.length, choice.windows, choice.like)


def _calibration(choice: TextChoice, tokenizer: Tokenizer) -> tuple[Text, list[Window]]:
    """Text and windows of calibration: where the recipe gives no number, CALIBRATION_WINDOWS or as many as there
    are."""
    text, every = _read(replace(choice, windows=None), tokenizer)
    num_windows = choice.windows or min(CALIBRATION_WINDOWS, len(every))
    return text, windows_of(text, choice.length, num_windows)


def _record(choice: TextChoice, text: Text, windows: list[Window]) -> dict[str, Any]:
    """The entry of study.json for a text."""
    return dict(
        file=choice.text.name,
        sha256=text.sha256,
        bytes=text.num_bytes,
        tokens=len(text.ids),
        windows=len(windows),
        length=choice.length,
        windows_hash=windows_hash(windows),
        like=choice.like,
    )


# ------------------------------------------------------------ a study's folder


def keep_recipe(folder: Path, recipe: Recipe) -> None:
    """Writes a recipe into the folder of its study. ValueError, with the first key that differs, if the folder has
    another recipe: trials of two recipes are not mixed."""
    path = folder / RECIPE
    if path.exists():
        found = first_difference(kept_recipe(folder).table, recipe.table)
        if found:
            raise ValueError(
                f"{path}: the folder holds a study of another recipe: {found}; expected a new folder (--out), or the "
                f"recipe as it was"
            )
        return
    folder.mkdir(parents=True, exist_ok=True)
    save_text(path, to_toml(recipe.table))


def kept_recipe(folder: Path) -> Recipe:
    """The recipe of a study's folder. ValueError if it is missing or cannot be read."""
    check_folder(folder)
    if not (folder / RECIPE).is_file():
        raise ValueError(f"{folder}: there is no {RECIPE}; expected the folder of a study")
    try:
        return Recipe.load(folder / RECIPE)
    except ValueError as error:
        raise ValueError(
            f"{error}; delete it: `lockstep ptq run` writes it again when it is given the study's recipe"
        ) from None


def save_winner(folder: Path, recipe: Recipe, plan: dict[str, Any]) -> None:
    """Writes the winning plan as a recipe on the same texts, without sweeps."""
    made = {**recipe.table, "plan": plan, "sweep": []}
    save_text(folder / WINNER_RECIPE, to_toml(made))
