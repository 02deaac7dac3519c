"""A report in a real browser, opened as a file."""

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
