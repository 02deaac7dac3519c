"""A study's report: its table of weights, and its origin."""

import pytest

from lockstep.study.report.data import report_data
from lockstep.study.report.markup import decibels
from lockstep.study.report.report import write_report
from lockstep.study.report.sites import by_weight
from tests.study import plausible


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return plausible.write(tmp_path_factory.mktemp("study"))


def test_weights_are_listed_the_worst_first(study):
    data = report_data(study)
    rows = by_weight(data["sites"])
    assert {row["site"] for row in rows} == {name for name, site in data["sites"].items() if site["is_weight"]}
    assert [row["sqnr"] for row in rows] == sorted(row["sqnr"] for row in rows) and len({r["spec"] for r in rows}) == 3
    html = write_report(study).read_text("utf-8")
    said = html[html.index('id="weights"') : html.index('id="confirm"')]
    worst = f'data-site="{rows[0]["site"]}">{rows[0]["site"]}</button></td><td>{rows[0]["spec"]}</td>'
    assert said.index(worst) < said.index("</tr>", said.index("<tbody>")) and decibels(rows[0]["sqnr"]) in said


def test_the_origin_says_that_nothing_is_random(study):
    assert "<dt>seeds</dt><dd>none: nothing in a study is random</dd>" in write_report(study).read_text("utf-8")
