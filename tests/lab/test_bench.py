"""`bench`: what it says while it measures, and what it compares."""

import io
import json
import statistics
from types import SimpleNamespace

import pytest
from rich.console import Console

from lockstep.cli import main
from lockstep.commands import bench_pictures as pictures
from lockstep.commands.bench import above_ceiling, show
from lockstep.lab import model_speed
from lockstep.lab.model_speed import chunk_sizes, paired

SMALL = ("--prompts", "20", "--contexts", "8", "--repeat", "1", "--threads", "1")


@pytest.fixture
def no_ceiling(monkeypatch):
    """The ceiling is given: it takes seconds to measure, and is another one each time."""
    from lockstep.lab.ceiling import Ceiling

    monkeypatch.setattr("lockstep.lab.ceiling.measure", lambda team: Ceiling(1e10, 1e11, 1e10))


@pytest.mark.parametrize(("num_tokens", "largest", "sizes"), [
    (20, 512, [64]), (64, 512, [64]), (65, 512, [64, 512]), (512, 512, [64, 512]), (1000, 512, [64, 512]),
    (1000, 64, [64]),
])  # fmt: skip
def test_no_two_chunks_are_the_same(num_tokens, largest, sizes):
    assert chunk_sizes(num_tokens, largest) == sizes


def test_each_measurement_has_a_line_before_it_off_a_terminal_too(capsys, no_ceiling):
    assert main(["bench", *SMALL, "--json"]) == 0
    printed = capsys.readouterr()
    found, said = json.loads(printed.out), printed.err.splitlines()
    assert found["about"]["model"] == "bundled model" and found["about"]["threads"] == 1
    assert list(found["per_token"]["ratios"]) == ["chunks of 64"] and found["prefill"].keys() == {"20"}
    stages = [line.removeprefix("lockstep: ") for line in said if line.startswith("lockstep: ")]
    assert stages == [
        "the machine's ceiling",
        "20 tokens, one at a time",
        "20 tokens, one at a time against chunks of 64",
        "prefill of 20 tokens",
        "decode after 8 tokens",
        *(f"{name}, per token against batched" for name in found["switches"]),
        "a profile of prefill",
        "a profile of decode",
        "the machine's ceiling again",
    ]


@pytest.mark.parametrize(("seconds", "lines"), [(1.0, []), (30.0, ["pair 2 of 3", "pair 3 of 3"])])
def test_a_long_comparison_has_a_line_for_each_pair(seconds, lines):
    said = []
    found = paired(lambda: seconds, lambda: seconds / 2, 3, said.append)
    assert said == lines and found.ratio == statistics.median([2.0] * 3)
    assert model_speed.LONG_SECONDS <= 10


# ------------------------------------------------------------ pictures

PAIRED = dict(a_seconds=2.0, b_seconds=1.0, ratio=2.0, spread=(1.9, 2.1))
ABOUT = dict(model="org/model", weights=["q8_0", "f32"], kv_dtype="bf16", threads=2, began="2026-11-30T21:15:46+00:00")
QUICK = dict(
    about=ABOUT, prefill={}, decode={}, per_token=dict(ratios={"chunks of 64": PAIRED | dict(ratio=98.7)}), switches={}
)
FULL = QUICK | dict(prefill={64: 102799.8}, decode={128: 12.3}, switches=dict(attention=PAIRED))


def drawn(found, monkeypatch, tmp_path):
    """The figure that is drawn of a measurement."""
    pytest.importorskip("matplotlib")
    kept = []
    monkeypatch.setattr(pictures.pyplot(), "close", kept.append)
    pictures.draw(found, str(tmp_path / "x.png"))
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    return kept[0]


def test_a_picture_has_only_panels_with_bars():
    assert [label for label, *_ in pictures.panels(QUICK)] == ["times slower without it (same bits)"]
    assert [words for _, _, words, _ in pictures.panels(FULL)] == [["102,800", "12.3"], ["98.7x", "2.0x"]]


def test_the_labels_of_a_picture_are_within_its_frame(monkeypatch, tmp_path):
    figure = drawn(FULL, monkeypatch, tmp_path)
    title = "org/model (q8_0, f32; KV cache bf16), 2 threads, 2026-11-30"
    assert len(figure.axes) == 2 and figure.get_suptitle() == title
    for axis in figure.axes:
        frame = axis.get_window_extent()
        assert len(axis.texts) == 2 and all(text.get_window_extent().x1 < frame.x1 for text in axis.texts)
    assert len(drawn(QUICK, monkeypatch, tmp_path).axes) == 1


def test_a_model_is_named_as_it_was_typed_but_a_folder_by_its_last_part(tmp_path):
    model = SimpleNamespace(main_formats=["f32"], kv_dtype="f32")
    llm = SimpleNamespace(model=model, engine=SimpleNamespace(team=SimpleNamespace(num_threads=3)))
    folder = tmp_path / "a model"
    folder.mkdir()
    names = [pictures.about(typed, llm)["model"] for typed in (None, "org/model:Q8_0", f"{folder}/", "no/such")]
    assert names == ["bundled model", "org/model:Q8_0", "a model", "no/such"]
    assert pictures.about(None, llm)["threads"] == 3


# ------------------------------------------------------------ the ceiling


def test_ops_above_the_ceiling_are_named_below_the_tables():
    ceiling = dict(bytes_per_second=1e9, int8_per_second=1e12, f32_per_second=1e12)
    rows = [("linear_q8_0", 1.0, 1.2e9, 10, True), ("linear_f32", 1.0, 1.05e9, 10, False), ("norm", 1.0, 9e9, 0, False)]
    profiles = dict(prefill=rows[1:], decode=rows)
    assert above_ceiling(profiles, ceiling) == ["linear_q8_0 of decode at 120%"]
    console = Console(file=io.StringIO(), width=1000)
    per_token = dict(tokens=20, max_abs_diff=0.0, ratios={})
    show(FULL | dict(threads=1, ceiling=ceiling, profiles=profiles, per_token=per_token, switches={}), console)
    assert (
        "Above the ceiling: linear_q8_0 of decode at 120%. It moved during" in console.file.getvalue().splitlines()[-1]
    )
