"""HTML that is safe by construction, and numbers as people read them."""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

VOID = ("input", "meta", "br", "wbr")
MINUS, NONE = "\N{MINUS SIGN}", "\N{EN DASH}"  # a real minus sign; a dash in the place of a missing number


class Markup(str):
    """Text that is HTML already."""


class Metric(NamedTuple):
    """A figure of a table: its heading, and the function that writes a value of it as text."""

    heading: str
    to_text: Callable[[Any], str]


def tag(name: str, *children: Any, **attributes: Any) -> Markup:
    """An HTML element. Text that is not Markup is escaped, lists of children are joined, None is left out. Attributes
    that are None or False are left out, True is an attribute without a value; class_ and data_x are class and
    data-x."""
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
    """JSON for a script element, escaped so that no text in it can end the element."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return Markup(text)


# ---------------------------------------------------------------- numbers


def plain(x: float | None, digits: int = 4) -> str:
    """A number with `digits` significant digits."""
    if x is None:
        return NONE
    text = f"{x:.{digits}g}" if x == 0 or 1e-4 <= abs(x) < 1e6 else f"{x:.{digits - 1}e}"
    return text.replace("-", MINUS)


def nats(x: float | None) -> str:
    """A difference of losses, with its sign, always with five decimals, so that columns can be compared."""
    return NONE if x is None else f"{x:+.5f}".replace("-", MINUS)


def divergence(x: float | None) -> str:
    """A KL divergence."""
    return plain(x, 3)


def signed(x: float | None, digits: int = 3) -> str:
    """A number with its sign."""
    return plain(x, digits) if x is None or x <= 0 else "+" + plain(x, digits)


def interval(low: float | None, high: float | None) -> str:
    """The two ends of a confidence interval."""
    return NONE if low is None or high is None else f"[{nats(low)}, {nats(high)}]"


def percent(x: float | None, digits: int = 2) -> str:
    """A share of one."""
    return NONE if x is None else f"{100 * x:.{digits}f} %".replace("-", MINUS)


def rough_percent(x: float | None) -> str:
    """A share of one, with one decimal."""
    return percent(x, 1)


def byte_size(x: float | None) -> str:
    """Bytes, in units of a thousand."""
    if x is None:
        return NONE
    for unit in ("B", "kB", "MB"):
        if abs(x) < 1000:
            return f"{x:.4g} {unit}"
        x /= 1000
    return f"{x:.4g} GB"


def whole_number(x: float | None) -> str:
    """A whole number, with spaces between its thousands."""
    return NONE if x is None else f"{x:,}".replace(",", "\u202f")


def decibels(x: float | None) -> str:
    """A ratio of powers."""
    return NONE if x is None else f"{x:.1f} dB".replace("-", MINUS)


def counted(number: int, word: str) -> str:
    """A number of things: "1 trial", "3 trials"."""
    return f"{whole_number(number)} {word}{'' if number == 1 else 's'}"


def spread(values: Any, to_text: Callable[[Any], str]) -> str:
    """A number, or the smallest and the largest of a list of numbers."""
    found = [x for x in (values if isinstance(values, list) else [values]) if x is not None]
    if not found:
        return NONE
    low, high = to_text(min(found)), to_text(max(found))
    unit = high[high.rfind(" ") :] if " " in high else ""
    return low if low == high else f"{low.removesuffix(unit)} … {high}"
