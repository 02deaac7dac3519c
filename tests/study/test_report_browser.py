"""A report in a real browser, opened as a file."""

import itertools
import re
from importlib import resources

import pytest

from lockstep.study.report.data import report_data
from lockstep.study.report.markup import plain, spread
from lockstep.study.report.report import write_report
from tests.serve.page import browser as driver
from tests.study import plausible

pytestmark = pytest.mark.skipif(driver.missing() is not None, reason=f"{driver.missing()}: the report is not looked at")
FOCUSED = "return document.activeElement.textContent"


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return plausible.write(tmp_path_factory.mktemp("study"))


@pytest.fixture(scope="module")
def page(study):
    with driver.chromium() as browser:
        browser.look(1280, 900)
        browser.open(write_report(study).as_uri())
        browser.until(lambda: browser.shown("#plot svg") == 1)
        yield browser
        assert browser.complaints() == []


def test_every_trial_that_is_done_is_a_point(page, study):
    data = report_data(study)
    assert len(page.texts("#plot circle.point")) == data["work"]["done"]
    assert len(page.texts("#plot circle.on")) == len(data["frontiers"]["delta_nll/weight_bytes"])
    page.run(
        "const e = document.getElementById('plot-size'); e.value = 'kv_bytes'; e.dispatchEvent(new Event('change'))"
    )
    assert len(page.texts("#plot circle.on")) == len(data["frontiers"]["delta_nll/kv_bytes"])


LABELS = "return [...document.querySelectorAll('#plot text')].map(e => [e.textContent, +e.getAttribute('y')])"


def test_the_scale_of_losses_is_said_and_can_be_read(page):
    texts = {text.replace("\N{MINUS SIGN}", "-"): y for text, y in page.run(LABELS)}
    [caption] = [text for text in texts if text.startswith("↑")]
    assert re.fullmatch(r"↑ ΔNLL \(logarithmic, linear within ±0\.[\d]+\)", caption)
    ticks = {float(text): y for text, y in texts.items() if re.fullmatch(r"-?[\d.]+(e-?\d+)?", text)}
    assert 0 in ticks and len(ticks) >= 6
    heights = sorted(ticks.values())
    assert min(b - a for a, b in itertools.pairwise(heights)) >= 22
    assert max(b - a for a, b in itertools.pairwise(heights)) <= 80


@pytest.mark.parametrize(("low", "high", "knee", "expected"), [
    (0, 0.3, 0.002, [0, 0.001, 0.003, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.3]),
    (-0.02, 0.3, 0.02, [-0.02, -0.01, 0, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.3]),
    (0, 0.009, 0.009, [0, 0.001, 0.002, 0.003, 0.005]),
    (0, 1, 1, [0, 0.1, 0.2, 0.3, 0.5, 1]),
    (0, 1e12, 1e-6, [0, 1e-4, 1e-2, 1, 1e2, 1e4, 1e6, 1e8, 1e10, 1e12]),
])  # fmt: skip
def test_ticks_of_a_scale(low, high, knee, expected, page):
    """Checks the function alone, with the scale of the plot."""
    script = (resources.files("lockstep.study.report") / "page" / "plot.js").read_text("utf-8")
    bend = f"const bend = v => Math.asinh(v / {knee}), from = bend({low}), to = bend({high});"
    at = "v => 336 - 320 * (bend(v) - from) / (to - from)"
    made = page.run(f"{script}\n{bend} return errorTicks({low}, {high}, {knee}, {at})")
    assert sorted(made) == expected


def test_a_point_shows_its_trial_to_mouse_and_keyboard(page, study):
    page.hover("#plot circle.on")
    page.until(lambda: page.shown("#card") == 1)
    page.run("document.querySelector('#plot circle[tabindex=\"0\"]').focus()")
    page.press("ArrowRight", "Enter")
    assert page.shown("#detail") == 1
    assert page.text("#detail-title") in [trial["name"] for trial in report_data(study)["trials"]]
    page.press("Escape")
    assert page.shown("#detail") == 0


def test_arrow_keys_walk_a_heat_map_and_a_cell_shows_its_site(page, study):
    cells = page.run(
        "return [...document.querySelectorAll('.heats tbody tr:first-child button')].map(b => b.dataset.site)"
    )
    page.run("document.querySelector('.heats button').focus()")
    page.press("ArrowRight", "Enter")
    site = report_data(study)["sites"][cells[1]]
    assert page.text("#detail-title") == cells[1]
    assert len(page.texts("#detail rect")) == sum(count > 0 for count in site["histogram"]["counts"])
    assert page.texts("#detail tbody td:first-child")[0] == site["grids"][0]["spec"]
    page.press("ArrowLeft", "Enter")
    assert page.text("#detail-title") == cells[0]
    page.press("Escape")
    assert page.run("return document.activeElement.dataset.site") == cells[0]


def test_what_is_said_of_a_grid_stands_under_it(page, study):
    """Checks a site that was tried on several grids, also with tables of heads between them."""
    page.run("document.querySelector('.heads [data-site=\"L0.k.all\"]').click()")
    grids = report_data(study)["sites"]["L0.k.all"]["grids"]
    rows = page.run("return [...document.querySelector('#detail tbody').rows].map(row => row.textContent)")
    assert len(rows) == 2 * len(grids) > 4 and any("/head" in grid["spec"] for grid in grids)
    for grid, row, below in zip(grids, rows[::2], rows[1::2], strict=True):
        assert row.startswith(grid["spec"]) and below.startswith("scale ")
        assert ("2 heads" in below) == ("/head" in grid["spec"])
        assert f"scale {spread(grid['scale'], plain)}, zero" in below
    page.press("Escape")


def test_a_click_on_a_column_sorts_by_its_numbers(page, study):
    page.run("document.getElementById('trials').scrollIntoView()")
    page.click(".sortable th:nth-child(6) button")  # KL, p99
    names = page.texts(".sortable tbody [data-trial]")
    trials = [t for t in report_data(study)["trials"] if t["metrics"].get("kl_p99") is not None]
    ordered = [t["name"] for t in sorted(trials, key=lambda t: t["metrics"]["kl_p99"])]
    assert names[: len(ordered)] == ordered
    page.click(".sortable th:nth-child(6) button")
    assert page.texts(".sortable tbody [data-trial]")[: len(ordered)] == ordered[::-1]


@pytest.mark.parametrize("width", [375, 1280])
def test_nothing_is_wider_than_the_window(page, width):
    page.look(width, 800, "dark")
    assert page.run("return document.documentElement.scrollWidth <= innerWidth")
