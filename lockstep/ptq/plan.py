"""Plans: which sites are rounded to which grids, and with which variant of the arithmetic around them.

rules = [
    ["*", "i16"],             # names of sites, with ? and * and [..] as in file names; the last match wins
    ["*.w", "u4/row:mse"],
    ["L*.k.all", "i8/head"],
]
mask = "additive"
fill = -120.0
rope = "hf"
fuse_scale = "none"
arithmetic = "float"
apart = ["attention"]         # taken apart even if no rule rounds a site inside
"""

from __future__ import annotations

import difflib
import fnmatch
import hashlib
import json
import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from lockstep.ops.rounded.attention import SITES as ATTENTION
from lockstep.ops.rounded.inputs import SITES as INPUTS
from lockstep.ops.rounded.silu_mul import SITES as SWIGLU
from lockstep.ptq.site import Site
from lockstep.ptq.spec import Spec

INSIDE = ("inputs", "attention", "swiglu")  # groups of ops that can be taken apart: see `ptq.rewrite`
OPTIONS = {
    "mask": ("structural", "additive"),
    "rope": ("hf", "pre_negated"),
    "fuse_scale": ("none", "q", "k"),
    "arithmetic": ("float", "integer"),
}
USUAL_FILL = -120.0
NUM_NEAREST = 3
INNER = {  # sites inside the ops of each group of INSIDE
    "inputs": (*(f"{name}.{site}" for name in ("q", "k") for site in INPUTS), "v.all"),
    "attention": ATTENTION,
    "swiglu": SWIGLU[:-1],  # the last one is a boundary, too
}
WHOLE = {  # why an op of a group is never taken apart, see `rewrite.is_plain`
    "inputs": "inputs of attention with a window, with norms over all heads at once or with a rope of the queries' own "
    "(Ministral 3's) have no sites inside",
    "attention": "attention with a window, a soft cap or sinks has no sites inside",
    "swiglu": "a gated product without SiLU has no sites inside",
}
FORM = "lockstep plan 1\n"  # begins the hashed text; another number when the same plan gives other bits


@dataclass(frozen=True)
class Plan:
    """Which sites are rounded to which grids.

    rules: (glob over names of sites, text of a spec), kept as tuples; the last rule that matches a site counts.
    mask: "structural" (masked keys are left out) or "additive" (`fill` is added to their scores). fill: None for a
    structural mask. rope: "hf" rotates (-x2, x1), "pre_negated" has the sign in the table of sines. fuse_scale: "q" or
    "k" for attention's scale in the weights of q or k, see `fuse.fused`. arithmetic: "float", or "integer" where there
    are kernels for it. apart: groups of INSIDE that are taken apart even if no rule rounds a site inside, so that the
    trials of a study have the same bits where only some of them round such a site.
    Raises ValueError for other values.
    """

    rules: Sequence[Sequence[str]] = ()
    mask: str = "structural"
    fill: float | None = None
    rope: str = "hf"
    fuse_scale: str = "none"
    arithmetic: str = "float"
    apart: Sequence[str] = ()

    def __post_init__(self) -> None:
        for name, allowed in OPTIONS.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"plan: {name} is {getattr(self, name)!r}, expected one of {', '.join(allowed)}")
        object.__setattr__(self, "fill", _fill(self.mask, self.fill))
        object.__setattr__(self, "apart", _apart(self.apart))
        object.__setattr__(self, "rules", tuple(_rule(i, rule) for i, rule in enumerate(_list(self.rules), 1)))

    # ------------------------------------------------------------ sites

    def resolve(self, sites: Sequence[Site]) -> dict[str, Spec]:
        """{site: its resolved spec}, in the order of the sites; "off" for a site that no rule matches.

        ValueError for a rule that matches no site, for a spec that a site cannot have, and for a group of `apart` that
        no op of the model can be of.
        """
        names = [site.name for site in sites]
        for group in self.apart:
            if sites and not any(_matching(names, f"*.{own}") for own in INNER[group]):
                raise ValueError(f"plan: apart names {group!r}, but {WHOLE[group]}, and this model has no others")
        matched = [_matching(names, glob) for glob, _ in self.rules]
        for (glob, text), found in zip(self.rules, matched, strict=True):
            if not found:
                why = _why_whole(glob, names)
                raise ValueError(f"plan: rule {glob!r} = {text!r} matches no site; {why}{_nearest(glob, names)}")
        return {site.name: self._spec(site, matched) for site in sites}

    def _spec(self, site: Site, matched: list[set[str]]) -> Spec:
        for (glob, text), found in zip(reversed(self.rules), reversed(matched), strict=True):
            if site.name in found:
                try:
                    return Spec.parse(text).resolved(site.is_weight)
                except ValueError as error:
                    raise ValueError(f"plan: rule {glob!r} = {text!r}, site {site.name}: {error}") from None
        return Spec("off")

    # ------------------------------------------------------------ text

    def to_toml(self) -> str:
        """The plan as TOML. `from_toml` gives an equal plan, and equal plans have equal texts."""
        rules = "".join(f"    [{_quoted(glob)}, {_quoted(text)}],\n" for glob, text in self.rules)
        lines = [f"rules = [\n{rules}]" if rules else "rules = []", f"mask = {_quoted(self.mask)}"]
        if self.fill is not None:
            lines.append(f"fill = {self.fill!r}")
        lines += [f"{name} = {_quoted(getattr(self, name))}" for name in ("rope", "fuse_scale", "arithmetic")]
        if self.apart:
            lines.append(f"apart = [{', '.join(map(_quoted, self.apart))}]")
        return "\n".join(lines) + "\n"

    @staticmethod
    def from_toml(text: str) -> Plan:
        """The plan in a TOML text; ValueError for a text that is no plan."""
        try:
            return Plan.from_table(tomllib.loads(text))
        except tomllib.TOMLDecodeError as error:
            raise ValueError(f"plan: it cannot be read as TOML: {error}") from None

    @staticmethod
    def from_table(table: Mapping[str, Any]) -> Plan:
        """The plan in a table that was read from TOML or JSON; ValueError for a key that plans do not have."""
        names = [field.name for field in fields(Plan)]
        if not isinstance(table, Mapping):
            raise ValueError(f"plan: it is {table!r:.80}, expected a table with {', '.join(names)}")
        unknown = next((name for name in table if name not in names), None)
        if unknown is not None:
            raise ValueError(f"plan: there is no {unknown!r}; a plan has {', '.join(names)}")
        return Plan(**table)

    def to_table(self) -> dict[str, Any]:
        """The plan as a table for JSON or TOML, without fields that are None."""
        table: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        table["rules"] = [list(rule) for rule in self.rules]
        table["apart"] = list(self.apart) or None
        return {name: value for name, value in table.items() if value is not None}

    @property
    def hash(self) -> str:
        """SHA-256 of the plan, in hexadecimal: equal for equal plans, however their texts were written."""
        return hashlib.sha256((FORM + self.to_toml()).encode()).hexdigest()


def _matching(names: Sequence[str], glob: str) -> set[str]:
    """The names that a glob matches, case-sensitively on every system."""
    return {name for name in names if fnmatch.fnmatchcase(name, glob)}


def _why_whole(glob: str, names: Sequence[str]) -> str:
    """For an error about a glob without a match: why a layer that is there has no such site inside of its ops."""
    layer, _, own = glob.partition(".")
    group = next((group for group, sites in INNER.items() if own in sites), None)
    if group is None or not _matching(names, f"{layer}.*"):
        return ""
    is_whole = not any(_matching(names, f"{layer}.{site}") for site in INNER[group])
    of_group = "mul" if group == "swiglu" else "ctx"
    return f"{WHOLE[group]}; " if is_whole and _matching(names, f"{layer}.{of_group}") else ""


def _nearest(glob: str, names: Sequence[str]) -> str:
    """For an error about a glob without a match: the most similar names of sites."""
    if not names:
        return "the model has no sites"
    near = difflib.get_close_matches(glob, names, NUM_NEAREST, 0.0)
    return f"the nearest are {', '.join(near)}"


def _list(rules: Any) -> Sequence[Any]:
    if isinstance(rules, (list, tuple)):
        return rules
    raise ValueError(f"plan: rules is {rules!r:.80}, expected a list of [sites, grid]")


def _apart(groups: Any) -> tuple[str, ...]:
    """The groups that are taken apart, checked, in the order of INSIDE."""
    if not isinstance(groups, (list, tuple)) or not all(group in INSIDE for group in groups):
        raise ValueError(f"plan: apart is {groups!r:.80}, expected a list of {', '.join(INSIDE)}")
    return tuple(group for group in INSIDE if group in groups)


def _rule(number: int, rule: Any) -> tuple[str, str]:
    """A rule as (glob, canonical text of its spec)."""
    is_pair = isinstance(rule, (list, tuple)) and len(rule) == 2
    if not is_pair or not all(isinstance(part, str) for part in rule) or not rule[0]:
        raise ValueError(f'plan: rule {number} is {rule!r:.80}, expected [sites, grid], as ["*.w", "u4/row"]')
    try:
        return rule[0], str(Spec.parse(rule[1]))
    except ValueError as error:
        raise ValueError(f"plan: rule {number}, {rule[0]!r}: {error}") from None


def _fill(mask: str, fill: Any) -> float | None:
    """The fill of a mask, checked, or the usual one; None for a structural mask."""
    if mask == "structural":
        if fill is not None:
            raise ValueError(f'plan: fill is {fill!r}, but mask is "structural"; only "additive" has a fill')
        return None
    if fill is None:
        return USUAL_FILL
    if isinstance(fill, bool) or not isinstance(fill, (int, float)) or not -1e30 <= fill < 0 or math.isnan(fill):
        raise ValueError(f"plan: fill is {fill!r}, expected a number below 0, at least -1e30")
    return float(fill)


def _quoted(text: str) -> str:
    """A TOML basic string: a JSON string without surrogate escapes, in which DEL is escaped, too."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
