"""Pictures of measurements (`--plot`), and the line above each: what was measured, with what, and when."""

import datetime
import importlib
import importlib.util
import os
import pathlib
import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lockstep.commands.terminal.output import counted
from lockstep.commands.terminal.tables import speed

if TYPE_CHECKING:
    from lockstep.llm import LLM

MATPLOTLIB = "matplotlib>=3.9"  # the extra `plot` of pyproject.toml
PICTURES = (".png", ".svg", ".pdf")
BLUE, BROWN = "#3b6fb6", "#b6693b"
ROOM = 0.22  # beyond the longest bar, of its length: for its label


def check_plot(path: str) -> None:
    """ValueError, before anything is measured, where the picture could not be drawn."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError(f"--plot needs matplotlib: {shlex.quote(sys.executable)} -m pip install '{MATPLOTLIB}'")
    if not pathlib.Path(path).parent.is_dir() or pathlib.Path(path).suffix not in PICTURES:
        raise ValueError(f"--plot {path}: expected a file name ending in {', '.join(PICTURES)} in a folder that exists")


def pyplot() -> Any:
    """matplotlib.pyplot, drawing to files. Only --plot needs it."""
    importlib.import_module("matplotlib").use("Agg")
    return importlib.import_module("matplotlib.pyplot")


# ------------------------------------------------------------ what was measured


def about(model: str | None, llm: "LLM") -> dict[str, Any]:
    """What a measurement is of, as plain data. model: what the user typed; None: the bundled model."""
    name = "bundled model" if model is None else os.path.basename(os.path.abspath(model))
    return dict(
        model=name if model is None or os.path.exists(model) else model,
        weights=llm.model.main_formats,
        kv_dtype=llm.model.kv_dtype,
        threads=llm.engine.team.num_threads,
        began=datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
    )


def about_in_words(values: Mapping[str, Any]) -> str:
    """The line above a picture. values: of `about`."""
    weights, threads = ", ".join(values["weights"]), counted(values["threads"], "thread")
    return f"{values['model']} ({weights}; KV cache {values['kv_dtype']}), {threads}, {values['began'][:10]}"


# ------------------------------------------------------------ the picture of `bench`


def draw(found: Mapping[str, Any], path: str) -> None:
    """Draws the speed of prefill and decode, and the ratios, to a file. What was not measured has no place in it."""
    plt, shown = pyplot(), panels(found)
    figure, axes = plt.subplots(1, len(shown), figsize=(6.2 * len(shown), 4.2), squeeze=False)
    for axis, (label, bars, words, colour) in zip(axes[0], shown, strict=True):
        drawn = axis.barh(list(bars), list(bars.values()), color=colour)
        axis.bar_label(drawn, labels=words, padding=3)
        axis.set_xlim(0, max(bars.values()) * (1 + ROOM))
        axis.invert_yaxis()  # the first bar on top, as in the tables
        axis.set_xlabel(label)
        axis.spines[["top", "right"]].set_visible(False)
    if found["per_token"]["ratios"]:
        axes[0][-1].axvline(1, color="black", linewidth=0.8)
    figure.suptitle(about_in_words(found["about"]), fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def panels(found: Mapping[str, Any]) -> Sequence[tuple[str, dict[str, float], list[str], str]]:
    """(what the bars count, the bars, their labels, their colour) of each panel that has bars."""
    speeds = {f"prefill of {k}": v for k, v in found["prefill"].items()}
    speeds |= {f"decode after {k}": v for k, v in found["decode"].items()}
    against, switches = found["per_token"]["ratios"], found["switches"]
    ratios = {f"one at a time /\n{name}": paired["ratio"] for name, paired in against.items()}
    ratios |= {f"{name}:\nper token / batched": paired["ratio"] for name, paired in switches.items()}
    all_panels = (
        ("tokens per second", speeds, list(map(speed, speeds.values())), BLUE),
        ("times slower without it (same bits)", ratios, [f"{ratio:.1f}x" for ratio in ratios.values()], BROWN),
    )
    return [panel for panel in all_panels if panel[1]]
