"""HTML that is safe by construction, and numbers as people read them."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable
from typing import Any

VOID = ("input", "meta", "br", "wbr")
MINUS, NONE = "\N{MINUS SIGN}", "\N{EN DASH}"  # a real minus sign; what stands for a number that is not there


class Markup(str):
    """Text that is HTML already."""


def tag(name: str, *children: Any, **attributes: Any) -> Markup:
    """An element. Children that are not Markup are escaped, lists are laid out, None is left out; attributes that are
    None or False are left out, True has no value, and class_, data_x stand for class, data-x."""
    words = "".join(map(_attribute, attributes.items()))
    inside = "".join(map(_child, children))
    return Markup(f"<{name}{words}>" if name in VOID else f"<{name}{words}>{inside}</{name}>")


def joined(children: Iterable[Any]) -> Markup:
    """Several children without an element around them."""
    return Markup("".join(map(_child, children)))


def _child(child: Any) -> str:
    if child is None:
        return ""
    if isinstance(child, Markup):
        return child
    return html.escape(child) if isinstance(child, str) else "".join(map(_child, child))


def _attribute(item: tuple[str, Any]) -> str:
    name, value = item[0].strip("_").replace("_", "-"), item[1]
    if value is None or value is False:
        return ""
    return f" {name}" if value is True else f' {name}="{html.escape(str(value))}"'


def script_json(value: Any) -> Markup:
    """JSON for a script element, which nothing in it can end."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return Markup(text)


# ---------------------------------------------------------------- numbers


def plain(x: float | None, digits: int = 4) -> str:
    """A number with so many digits that count."""
    if x is None:
        return NONE
    text = f"{x:.{digits}g}" if x == 0 or 1e-4 <= abs(x) < 1e6 else f"{x:.{digits - 1}e}"
    return text.replace("-", MINUS)


def nats(x: float | None) -> str:
    """A difference of losses, with its sign: always so many digits, so that columns can be read."""
    return NONE if x is None else f"{x:+.5f}".replace("-", MINUS)


def divergence(x: float | None) -> str:
    """A KL divergence."""
    return plain(x, 3)


def signed(x: float | None, digits: int = 3) -> str:
    """A number with its sign."""
    return plain(x, digits) if x is None or x <= 0 else "+" + plain(x, digits)


def interval(low: float | None, high: float | None) -> str:
    """Its two ends."""
    return NONE if low is None or high is None else f"[{nats(low)}, {nats(high)}]"


def percent(x: float | None, digits: int = 2) -> str:
    """A share of one."""
    return NONE if x is None else f"{100 * x:.{digits}f} %".replace("-", MINUS)


def part(x: float | None) -> str:
    """A share of one, with fewer digits."""
    return percent(x, 1)


def num_bytes(x: float | None) -> str:
    """In units of a thousand."""
    if x is None:
        return NONE
    for unit in ("B", "kB", "MB"):
        if abs(x) < 1000:
            return f"{x:.4g} {unit}"
        x /= 1000
    return f"{x:.4g} GB"


def count(x: float | None) -> str:
    """A whole number, its thousands apart."""
    return NONE if x is None else f"{x:,}".replace(",", "\u202f")


def decibels(x: float | None) -> str:
    """A ratio of powers."""
    return NONE if x is None else f"{x:.1f} dB".replace("-", MINUS)


def many(number: int, word: str) -> str:
    """A number of things: "1 trial", "3 trials"."""
    return f"{count(number)} {word}{'' if number == 1 else 's'}"


def spread(values: Any, how: Any) -> str:
    """A number, or the least and the largest of a list of them."""
    found = [x for x in (values if isinstance(values, list) else [values]) if x is not None]
    if not found:
        return NONE
    low, high = how(min(found)), how(max(found))
    unit = high[high.rfind(" ") :] if " " in high else ""
    return low if low == high else f"{low.removesuffix(unit)} … {high}"
