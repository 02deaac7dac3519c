"""Recipes: the description of a study, as TOML. `docs/ptq/README.md` lists the keys."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lockstep.formats.choice import CHOICES
from lockstep.ptq.plan import OPTIONS, Plan
from lockstep.ptq.spec import Spec
from lockstep.study.scoring.subject import BUNDLED
from lockstep.study.scoring.text import LIKE

ONE_AT_A_TIME, LEAVE_ONE_OUT, ARITHMETIC = "one_at_a_time", "leave_one_out", "arithmetic"
KEYS = ("model", "weights", "calibrate", "evaluate", "plan", "sweep", "confirm")
TEXT_KEYS = {
    "calibrate": ("text", "sha256", "windows", "length"),
    "evaluate": ("text", "sha256", "windows", "length", "like", "round", "early_stop"),
}
LENGTH, CALIBRATION_WINDOWS, ROUND, TOP = 512, 32, 8, 3
HASH = re.compile(r"[0-9a-fA-F]{64}")


@dataclass(frozen=True)
class TextChoice:
    """Which windows of which file, see `text.windows_of`. windows: their number; None for all (of a calibration text:
    at most CALIBRATION_WINDOWS)."""

    text: Path
    sha256: str | None
    windows: int | None
    length: int
    like: str | None = None


@dataclass(frozen=True)
class Sweep:
    """A group of trials. kind: "product", "one_at_a_time" or "leave_one_out". lists: {name: (glob of sites, specs)};
    the latter two kinds have one list, named as the kind. arithmetic: values that a product combines with its lists;
    empty: the arithmetic of the base plan."""

    kind: str
    lists: Mapping[str, tuple[str, tuple[str, ...]]]
    arithmetic: tuple[str, ...] = ()


@dataclass(frozen=True)
class Recipe:
    """A study. round: after how many windows trials are compared. early_stop: whether trials of products that are
    clearly worse than the best are stopped then. top: how many trials are confirmed. table: the recipe as TOML's
    table."""

    model: str
    weights: str
    calibrate: TextChoice | None
    evaluate: TextChoice
    plan: Plan
    sweeps: tuple[Sweep, ...] = ()
    round: int = ROUND
    early_stop: bool = True
    top: int = TOP
    table: Mapping[str, Any] = field(default_factory=dict, compare=False)

    @staticmethod
    def load(path: Path, changes: Sequence[str] = ()) -> Recipe:
        """The recipe in a file. changes: "key=value", such as "evaluate.windows=8", replace values of the file. Paths
        are relative to the file's folder. ValueError, with file and key, if it is not a recipe."""
        try:
            table = tomllib.loads(path.read_text("utf-8"))
            for change in changes:
                _change(table, change)
            return Recipe.from_table(table, path.parent)
        except tomllib.TOMLDecodeError as error:
            raise ValueError(f"{path}: it cannot be read as TOML: {error}") from None
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    @staticmethod
    def from_table(table: Mapping[str, Any], folder: Path) -> Recipe:
        """The recipe in a table that was read from TOML. folder: where relative paths begin."""
        _check_keys(table, KEYS, "")
        evaluate = _table(table, "evaluate")
        choices = {name: _text(table, name, folder) for name in ("evaluate", "calibrate")}
        if choices["evaluate"] is None:
            raise ValueError("evaluate is missing; expected a table with text")
        plan = Plan.from_table(table.get("plan", {}))
        top = _table(table, "confirm")
        _check_keys(top, ("top",), "confirm.")
        made = Recipe(
            model=_model(table.get("model", BUNDLED), folder),
            weights=_word(table, "weights", CHOICES, "f32"),
            calibrate=choices["calibrate"],
            evaluate=choices["evaluate"],
            plan=plan,
            sweeps=_sweeps(table.get("sweep", [])),
            round=_whole(evaluate, "round", "evaluate.", ROUND, 2) or ROUND,
            early_stop=_flag(evaluate, "early_stop", "evaluate.", True),
            top=_whole(top, "top", "confirm.", TOP, 0) or 0,
        )
        object.__setattr__(made, "table", made.to_table())
        return made

    def to_table(self) -> dict[str, Any]:
        """The recipe in full, with absolute paths."""
        made: dict[str, Any] = dict(model=self.model, weights=self.weights)
        if self.calibrate is not None:
            made["calibrate"] = _text_table(self.calibrate)
        made["evaluate"] = _text_table(self.evaluate) | dict(round=self.round, early_stop=self.early_stop)
        made["plan"] = self.plan.to_table()
        made["sweep"] = [_sweep_table(sweep) for sweep in self.sweeps]
        return made | dict(confirm=dict(top=self.top))


def first_difference(old: Any, new: Any, key: str = "") -> str | None:
    """A sentence about the first key in which two recipes' tables differ; None if they are equal."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for name in [*old, *(name for name in new if name not in old)]:
            inner = f"{key}.{name}" if key else name
            if name not in old or name not in new:
                there, value = ("study", old[name]) if name in old else ("recipe", new[name])
                return f"{inner} is only in the {there}: {value!r:.80}"
            found = first_difference(old[name], new[name], inner)
            if found:
                return found
        return None
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = enumerate(zip(old, new, strict=True), 1)
        return next(filter(None, (first_difference(a, b, f"{key}[{i}]") for i, (a, b) in pairs)), None)
    return None if old == new else f"{key} was {_shown(old)} and is now {_shown(new)}"


# ------------------------------------------------------------ TOML

BARE = re.compile(r"[A-Za-z0-9_-]+", re.ASCII)  # keys that TOML takes without quotes


def to_toml(table: Mapping[str, Any]) -> str:
    """A table as TOML: numbers and texts first, then tables and lists of tables."""
    is_tables = lambda value: isinstance(value, list) and bool(value) and all(isinstance(v, dict) for v in value)
    plain = {k: v for k, v in table.items() if not isinstance(v, dict) and not is_tables(v)}
    parts = ["".join(f"{_key(k)} = {_value(v)}\n" for k, v in plain.items() if v != [] or k == "rules")]
    for name, value in table.items():
        if name not in plain:
            head, inner = (f"[[{_key(name)}]]", value) if is_tables(value) else (f"[{_key(name)}]", [value])
            parts += [f"{head}\n" + "".join(f"{_key(k)} = {_value(v)}\n" for k, v in each.items()) for each in inner]
    return "\n".join(parts)


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{_key(k)} = {_value(v)}" for k, v in value.items()) + " }"
    if isinstance(value, list) and any(isinstance(v, list) for v in value):
        return "[\n" + "".join(f"    {_value(v)},\n" for v in value) + "]"
    if isinstance(value, list):
        return "[" + ", ".join(map(_value, value)) + "]"
    return _quoted(value) if isinstance(value, str) else repr(value)


def _key(name: str) -> str:
    """A key, in quotes unless TOML allows it without."""
    return name if BARE.fullmatch(name) else _quoted(name)


def _quoted(value: str) -> str:
    """A TOML basic string. A JSON string is one, except for DEL and for escaped surrogates."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _change(table: dict[str, Any], change: str) -> None:
    """Puts "key=value" into a table; a value that is not TOML is taken as a text."""
    key, equals, text = change.partition("=")
    *path, last = key.strip().split(".")
    if not equals or not last:
        raise ValueError(f"--set {change}: expected KEY=VALUE, as evaluate.windows=8")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    for name in path:
        table = table.setdefault(name, {})
        if not isinstance(table, dict):
            raise ValueError(f"--set {change}: {name} is no table")
    table[last] = value


# ------------------------------------------------------------ keys


def _check_keys(table: Mapping[str, Any], allowed: Sequence[str], where: str) -> None:
    unknown = next((name for name in table if name not in allowed), None)
    if unknown is not None:
        raise ValueError(f"there is no {where}{unknown}; expected one of {', '.join(allowed)}")


def _table(table: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = table.get(key, {})
    if not isinstance(found, Mapping):
        raise ValueError(f"{key} is {_shown(found)}, expected a table")
    return found


def _shown(value: Any) -> str:
    """A value as TOML writes it, cut to 80 characters."""
    return str(value).lower() if isinstance(value, bool) else f"{value!r:.80}"


def _whole(table: Mapping[str, Any], key: str, where: str, default: int | None, least: int) -> int | None:
    found = table.get(key, default)
    if found is not None and (type(found) is not int or found < least):
        raise ValueError(f"{where}{key} is {_shown(found)}, expected a whole number from {least} on")
    return found


def _flag(table: Mapping[str, Any], key: str, where: str, default: bool) -> bool:
    found = table.get(key, default)
    if not isinstance(found, bool):
        raise ValueError(f"{where}{key} is {_shown(found)}, expected true or false")
    return found


def _word(table: Mapping[str, Any], key: str, allowed: Sequence[str], default: str) -> str:
    found = table.get(key, default)
    if found not in allowed:
        raise ValueError(f"{key} is {_shown(found)}, expected one of {', '.join(allowed)}")
    return found


def _model(name: Any, folder: Path) -> str:
    if not isinstance(name, str) or not name:
        raise ValueError(f"model is {_shown(name)}, expected a text: a folder, a .gguf file, a hub name or {BUNDLED!r}")
    return str((folder / name).resolve()) if name != BUNDLED and (folder / name).exists() else name


def _text(table: Mapping[str, Any], name: str, folder: Path) -> TextChoice | None:
    if name not in table:
        return None
    found, where = _table(table, name), f"{name}."
    _check_keys(found, TEXT_KEYS[name], where)
    path, digest, like = found.get("text"), found.get("sha256"), found.get("like")
    if not isinstance(path, str) or not path:
        raise ValueError(f"{where}text is {_shown(path)}, expected the path of a file")
    if digest is not None and not (isinstance(digest, str) and HASH.fullmatch(digest)):
        raise ValueError(f"{where}sha256 is {_shown(digest)}, expected 64 hexadecimal digits")
    if like is not None and like not in LIKE:
        raise ValueError(f"{where}like is {_shown(like)}, expected {' or '.join(LIKE)}")
    default = LENGTH if name == "evaluate" else _table(table, "evaluate").get("length", LENGTH)
    length = _whole(found, "length", where, default, 2) or LENGTH
    least = 2 if name == "evaluate" else 1  # differences of one window have no interval
    return TextChoice((folder / path).resolve(), digest, _whole(found, "windows", where, None, least), length, like)


def _text_table(choice: TextChoice) -> dict[str, Any]:
    made = dict(
        text=str(choice.text), sha256=choice.sha256, windows=choice.windows, length=choice.length, like=choice.like
    )
    return {name: value for name, value in made.items() if value is not None}


# ------------------------------------------------------------ sweeps


def _sweeps(found: Any) -> tuple[Sweep, ...]:
    if not isinstance(found, list) or not all(isinstance(each, Mapping) and each for each in found):
        raise ValueError(f"sweep is {_shown(found)}, expected tables [[sweep]]")
    return tuple(_sweep(each, f"sweep[{i}].") for i, each in enumerate(found, 1))


def _sweep(table: Mapping[str, Any], where: str) -> Sweep:
    kind = next((kind for kind in (ONE_AT_A_TIME, LEAVE_ONE_OUT) if kind in table), "product")
    if kind != "product" and len(table) > 1:
        other = next(name for name in table if name != kind)
        raise ValueError(f"{where}{other} stands beside {kind}; expected a [[sweep]] of its own")
    lists = {name: _list(name, found, where, kind) for name, found in table.items() if name != ARITHMETIC}
    return Sweep(kind, lists, _arithmetic(table[ARITHMETIC], where) if ARITHMETIC in table else ())


def _arithmetic(found: Any, where: str) -> tuple[str, ...]:
    allowed = OPTIONS[ARITHMETIC]
    words = [found] if isinstance(found, str) else found
    if not isinstance(words, list) or not words or any(word not in allowed for word in words):
        raise ValueError(f"{where}{ARITHMETIC} is {_shown(found)}, expected a list of {', '.join(allowed)}")
    return tuple(words)


def _sweep_table(sweep: Sweep) -> dict[str, Any]:
    made: dict[str, Any] = {name: dict(sites=glob, spec=list(specs)) for name, (glob, specs) in sweep.lists.items()}
    return made | ({ARITHMETIC: list(sweep.arithmetic)} if sweep.arithmetic else {})


def _list(name: str, found: Any, where: str, kind: str) -> tuple[str, tuple[str, ...]]:
    """(Glob of sites, specs) of one list of a sweep."""
    if not name or not name.isprintable():
        raise ValueError(f"{where}{name!r:.80}: expected a name of one or more printable characters")
    if not isinstance(found, Mapping):
        raise ValueError(f'{where}{name} is {_shown(found)}, expected a table, as {{ sites = "L*.p", spec = ["u8"] }}')
    _check_keys(found, ("sites", "spec"), f"{where}{name}.")
    glob, specs = found.get("sites"), found.get("spec", "off" if kind == LEAVE_ONE_OUT else None)
    if not isinstance(glob, str) or not glob:
        raise ValueError(f"{where}{name}.sites is {_shown(glob)}, expected names of sites with *, ? or [..]")
    specs = [specs] if isinstance(specs, str) else specs
    if not isinstance(specs, list) or not specs:
        raise ValueError(f"{where}{name}.spec is {_shown(specs)}, expected a grid or a list of grids")
    try:
        return glob, tuple(str(Spec.parse(spec)) for spec in specs)
    except ValueError as error:
        raise ValueError(f"{where}{name}.spec: {error}") from None
