"""A solved plan: a plan and the grids that calibration found for it, as a file. With the weights it is a planned
model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lockstep.new_files import USUAL_FILE, new_file
from lockstep.ops.rounded.grids import GRID_WORDS, HIGH, INVERSE, LOW, SCALE, ZERO_POINT
from lockstep.ptq.observers import Stat
from lockstep.ptq.plan import Plan
from lockstep.ptq.site import Site
from lockstep.ptq.spec import Spec

FORM = 1  # version of the file; another number when its content means something else
KEYS = ("form", "plan", "model", "model_hash", "grids")
LARGEST = float(np.finfo(np.float32).max)
SHOWN = 12  # digits of a hash in an error
WHAT = "a solved plan"
FILE = "winner.json"  # the file name in a study's folder
EXPECTED = f"{WHAT}: a plan with its grids in JSON, as `lockstep ptq run RECIPE` writes it ({FILE})"


@dataclass(frozen=True, eq=False)
class Solved:
    """A plan, the grids of all activations that it rounds, and the model that they are for.

    model: its name, for people. model_hash: its content hash. grids: {site: float32 [heads or 1, GRID_WORDS]} of every
    activation that is not off. Weights have none: they are rounded again as the plan's specs say.
    """

    plan: Plan
    model: str
    model_hash: str
    grids: Mapping[str, np.ndarray]

    @staticmethod
    def solve(plan: Plan, model: str, model_hash: str, sites: Sequence[Site], stats: Mapping[str, Stat]) -> Solved:
        """The grids of a plan from statistics of its sites. ValueError names a site at which no number was seen."""
        empty = {site.name: Stat.empty(site.name) for site in sites}
        grids = {name: stats.get(name, empty[name]).solve(spec) for name, spec in rounded(plan, sites).items()}
        return Solved(plan, model, model_hash, grids)

    def check(self, model: str, model_hash: str, sites: Sequence[Site]) -> None:
        """ValueError if the plan was solved for another model, or its grids do not fit the model's sites."""
        if model_hash != self.model_hash:
            raise ValueError(
                f"a plan of another model: it is for {self.model} ({self.model_hash[:SHOWN]}), this is {model} "
                f"({model_hash[:SHOWN]})"
            )
        specs, heads = rounded(self.plan, sites), {site.name: site.heads for site in sites}
        for name in [*specs, *self.grids]:
            if name not in self.grids or name not in specs:
                where = "its rules round it, and there is no grid" if name in specs else "its rules do not round it"
                raise ValueError(f"{WHAT} for {self.model}: site {name}: {where}")
        for name, rows in self.grids.items():
            self._check_rows(name, rows, specs[name], heads[name])

    def _check_rows(self, name: str, rows: np.ndarray, spec: Spec, num_heads: int) -> None:
        """ValueError unless the grids of a site have the kind and number that its spec says."""
        expected = num_heads if spec.per == "head" else 1
        if len(rows) != expected:
            raise ValueError(f"{WHAT} for {self.model}: site {name}: {len(rows)} grids, expected {expected} ({spec})")
        free = [SCALE, INVERSE] + [ZERO_POINT] * (not spec.symmetric)
        without_range, usual = rows.copy(), spec.activation_row()
        if spec.observer is not None:
            without_range[:, free] = usual[free]
            good = (rows[:, SCALE] > 0) & (rows[:, INVERSE] == np.float32(1) / rows[:, SCALE])
            if not spec.symmetric:
                zero = rows[:, ZERO_POINT]
                good &= (zero == np.rint(zero)) & (rows[:, LOW] <= zero) & (zero <= rows[:, HIGH])
        else:
            good = np.ones(len(rows), bool)
        if not (good & (without_range == usual).all(1)).all():
            raise ValueError(f"{WHAT} for {self.model}: site {name}: its grid is none of {spec}: {rows.tolist()}")

    # ------------------------------------------------------------ text

    def to_json(self) -> str:
        """The file's content, equal for equal solved plans. Its digits give every float32 back exactly."""
        content = dict(
            form=FORM,
            plan=self.plan.to_table(),
            model=self.model,
            model_hash=self.model_hash,
            grids={name: rows.tolist() for name, rows in sorted(self.grids.items())},
        )
        return json.dumps(content, indent=1, allow_nan=False) + "\n"

    @staticmethod
    def from_json(text: str) -> Solved:
        """The solved plan in a text that `to_json` wrote; ValueError for any other text."""
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{WHAT} cannot be read as JSON: {error}") from None
        if not isinstance(content, dict) or sorted(content) != sorted(KEYS):
            what = f"an object with {', '.join(content)}" if isinstance(content, dict) else f"{content!r:.80}"
            raise ValueError(f"{WHAT} is {what}, expected an object with {', '.join(KEYS)}")
        if content["form"] != FORM:
            raise ValueError(f"{WHAT} of form {content['form']!r:.80}, expected {FORM}")
        for key in ("model", "model_hash"):
            if not isinstance(content[key], str):
                raise ValueError(f"{WHAT}: {key} is {content[key]!r:.80}, expected a text")
        if not isinstance(content["grids"], dict):
            raise ValueError(f"{WHAT}: grids is {content['grids']!r:.80}, expected an object of sites")
        grids = {name: _rows(name, rows) for name, rows in content["grids"].items()}
        return Solved(Plan.from_table(content["plan"]), content["model"], content["model_hash"], grids)

    def save(self, path: Path) -> None:
        """Writes a file, whole or not at all. OSError names the path, if the disk is full."""
        with new_file(path, USUAL_FILE) as file:
            file.write(self.to_json().encode())

    @staticmethod
    def load(path: Path) -> Solved:
        """The solved plan in a file that `save` wrote; ValueError names the path of any other file."""
        if path.suffix == ".toml" and path.is_file():
            raise ValueError(f"{path}: a plan or a recipe in TOML has no grids yet; expected {EXPECTED}{_beside(path)}")
        try:
            return Solved.from_json(path.read_text("utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}: {error}; expected {EXPECTED}") from None

    @property
    def hash(self) -> str:
        """SHA-256 of plan, model hash and grids, in hexadecimal: it identifies a planned model."""
        content = json.loads(self.to_json()) | dict(model="", plan=self.plan.hash)
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _beside(path: Path) -> str:
    """For an error: the solved plan in the same folder, if there is one."""
    beside = path.with_name(FILE)
    return f"; there is {beside}" if beside.is_file() else ""


def rounded(plan: Plan, sites: Sequence[Site]) -> dict[str, Spec]:
    """{site: spec} of the activations that a plan rounds."""
    weights = {site.name for site in sites if site.is_weight}
    return {name: spec for name, spec in plan.resolve(sites).items() if name not in weights and not spec.is_off}


def _rows(name: str, rows: Any) -> np.ndarray:
    """The grids of a site from JSON, checked."""
    if isinstance(rows, list) and rows and all(map(_is_row, rows)):
        grids = np.array(rows, np.float32)
        if (grids == np.array(rows, np.float64)).all():
            return grids
    raise ValueError(f"{WHAT}: site {name}: {rows!r:.80}, expected rows of {GRID_WORDS} finite float32")


def _is_row(row: Any) -> bool:
    return (
        isinstance(row, list)
        and len(row) == GRID_WORDS
        and all(type(x) in (int, float) and abs(x) <= LARGEST for x in row)
    )
