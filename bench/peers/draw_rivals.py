#!/usr/bin/env python3
"""Draws what `bench/rivals.py --json` wrote: a panel for each measurement, in it a group of bars for each model.

    python bench/peers/draw_rivals.py docs/figures/rivals-zen4.json docs/figures/rivals-zen4.png \\
        --metrics prefill_1000,decode_b1,decode_b8 --title "2 cores of a Zen 4, 30 November 2026"
"""

import json
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))
from options import Parser, file, new_file, several

COLOURS = {"lockstep": "#d1495b", "llama.cpp": "#30638e", "openvino": "#8fb8de", "vllm-cpu": "#b7b7b7"}
NAMES = {"lockstep": "Lockstep", "openvino": "OpenVINO", "vllm-cpu": "vLLM"}
BAR, GAP = 0.21, 0.2  # inches: the height of a bar, and what is free between two groups
WIDTH, LETTERS = 10, 9  # of the figure in inches, and of its letters in points: a page shows it 850 pixels wide


def arguments():
    """The options' values, and the results."""
    parser = Parser(__doc__)
    parser.add_argument("results", type=file)
    parser.add_argument("plot", type=new_file)
    parser.add_argument("--metrics", type=several(str), help="usual: all")
    parser.add_argument("--title", default="", help="which machine, and when")
    a = parser.parse_args()
    parser.need("matplotlib")
    found = json.loads(a.results.read_text())
    known = list(dict.fromkeys(metric for engines in found.values() for e in engines.values() for metric in e))
    for metric in a.metrics or ():
        if metric not in known:
            parser.error(f"--metrics: {metric!r}: expected some of {', '.join(known)}")
    return a, found, a.metrics or known


def bars_of(found, metric):
    """[(group, engine, weights, value, place from the top in inches)] of a metric."""
    bars, place = [], 0.0
    for group, engines in found.items():
        for engine, metrics in engines.items():
            if metric in metrics:
                bars.append((group, *engine.split(" ", 1), metrics[metric], place))
            place += BAR  # a group has the same place in each panel
        place += GAP
    return bars


def draw_panel(axis, bars, metric):
    """One measurement. Weights that a rival has in place of the group's stand behind its value."""
    longest = max(value for *_, value, _ in bars)
    for group, engine, weights, value, place in bars:
        axis.barh(place, value, height=BAR * 0.86, color=COLOURS[engine])
        other = "" if weights.lower() == group.split()[-1].lower() else f" {weights}"
        text = f" {value:.0f}{other}" if value >= 100 else f" {value:.1f}{other}"
        axis.text(value, place, text, va="center", fontsize=LETTERS, weight="bold" if engine == "lockstep" else None)
    axis.set_xlim(0, longest * 1.4)
    axis.set_title(described(metric), fontsize=LETTERS + 1)
    axis.tick_params(labelsize=LETTERS - 1)
    axis.spines[["top", "right"]].set_visible(False)
    axis.invert_yaxis()


def described(metric):
    """prefill_512 and decode_b4 in words."""
    kind, number = metric.rsplit("_", 1)
    if kind == "prefill":
        return f"prompt of {number} tokens"
    return f"decode, {number[1:]} request{'s' if number != 'b1' else ''}"


def middles(bars):
    """{group: the middle of its bars}."""
    places = {}
    for group, *_, place in bars:
        places.setdefault(group, []).append(place)
    return {group: sum(p) / len(p) for group, p in places.items()}


def main():
    a, found, metrics = arguments()
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch

    panels = [bars_of(found, metric) for metric in metrics]
    columns, tallest = min(3, len(metrics)), max(bars[-1][-1] for bars in panels if bars)
    rows = -(-len(metrics) // columns)
    size = (WIDTH, rows * (tallest + 1.1) + 0.5)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, sharey=True, layout="constrained")
    for axis, bars, metric in zip(axes.flat, panels, metrics, strict=False):
        draw_panel(axis, bars, metric)
        labels = middles(bars)
        axis.set_yticks(list(labels.values()), [label.replace(" ", "\n", 1) for label in labels], fontsize=LETTERS)
    for axis in axes.flat[len(metrics) :]:
        axis.axis("off")
    axes[0, 0].set_ylim(tallest + BAR, -BAR)
    engines = dict.fromkeys(engine for bars in panels for _, engine, *_ in bars)
    patches = [Patch(color=COLOURS[engine], label=NAMES.get(engine, engine)) for engine in engines]
    figure.legend(handles=patches, loc="outside upper right", ncols=len(patches), fontsize=LETTERS, frameon=False)
    figure.suptitle(f"Tokens per second. {a.title}", fontsize=LETTERS + 1, x=0.01, ha="left")
    figure.savefig(a.plot, dpi=130)


if __name__ == "__main__":
    main()
