"""A study's report: its content, that the page loads nothing else, and errors for bad folders."""

import json
import re
import shutil

import pytest

from lockstep.study.report.data import frontier, report_data, verdict
from lockstep.study.report.markup import NONE, Markup, decibels, plain, script_json, spread, tag
from lockstep.study.report.report import text_table, write_report
from lockstep.study.report.sites import by_head
from tests.study import plausible

HOSTILE = "</script><img src=x onerror=alert(1)>\"'&<!-- data -->\u2028"


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return plausible.write(tmp_path_factory.mktemp("study"))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return plausible.write(tmp_path_factory.mktemp("small"), num_trials=14)


@pytest.fixture
def copy(small, tmp_path):
    """A folder that a test may change."""
    return shutil.copytree(small, tmp_path / "study")


def change(path, line, edit):
    """Edits one line of JSON, or the whole file where line is None."""
    lines = path.read_text("utf-8").splitlines() if line is not None else [path.read_text("utf-8")]
    found = json.loads(lines[line or 0])
    edit(found)
    lines[line or 0] = json.dumps(found)
    path.write_text("\n".join(lines) + "\n", "utf-8")


def trial_of(data, id):
    return next(trial for trial in data["trials"] if trial["id"] == id)


def embedded(html):
    """The JSON that the page's script reads."""
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.S)[1])


# ---------------------------------------------------------------- what it says


def test_the_report_holds_all_parts_in_order(study):
    html = write_report(study).read_text("utf-8")
    parts = re.findall(r'<section id="(\w+)"', html)
    assert parts == "verdict bytes trials sensitivity heads weights confirm work origin recipe".split()
    assert json.loads((study / "report.json").read_text("utf-8")) == report_data(study)


def test_equal_folders_give_equal_bytes(small, copy):
    files = [
        [(write_report(folder).parent / name).read_bytes() for name in ("report.html", "report.json")]
        for folder in (small, copy)
    ]
    assert files[0] == files[1]


def test_the_report_needs_nothing_from_elsewhere(study):
    html = write_report(study).read_text("utf-8")
    without = html.replace('"http://www.w3.org/2000/svg"', "")  # the name of SVG's elements, which is never asked for
    assert not re.search(r"https?://|//[a-z]|<link|\bsrc=|@import|url\(|fetch\(|\bimport\b", without)
    assert "default-src 'none'" in html


def test_the_verdict_names_winner_loss_and_noise(study):
    data = report_data(study)
    won = trial_of(data, data["verdict"]["winner"])
    assert won["plan"] == json.loads((study / "winner.json").read_text("utf-8"))["plan"]
    assert not data["verdict"]["like_float"] and data["verdict"]["like"] == []
    html = write_report(study).read_text("utf-8")
    said = html[html.index('id="verdict"') : html.index('id="bytes"')]
    following = trial_of(data, data["ranking"][1])["name"]
    for text in (won["name"], "more than noise", following, "KL, p99", "same top-1", "confirmed on prefill"):
        assert text in said


def test_the_winner_is_given_as_a_recipe_if_it_is_its_own(copy):
    data = report_data(copy)
    won = trial_of(data, data["verdict"]["winner"])
    assert data["winner_recipe"] == won["plan_text"]
    recipe = 'model = "m"\n[plan]\n' + won["plan_text"]
    (copy / "winner.toml").write_text(recipe, "utf-8")
    assert report_data(copy)["winner_recipe"] == recipe
    (copy / "winner.toml").write_text(recipe.replace("i16", "i12"), "utf-8")
    assert report_data(copy)["winner_recipe"] == won["plan_text"]


def case(id, windows, low=0.01, high=0.03, **metrics):
    return dict(id=id, window_nll=windows, metrics=dict(delta_nll=0.02, delta_low=low, delta_high=high, **metrics))


def test_a_loss_whose_interval_holds_zero_is_noise():
    assert not verdict(case(1, [2.0, 3.0]), [], {})["like_float"]
    assert verdict(case(1, [2.0, 3.0], low=-0.01), [], {})["like_float"]
    assert not verdict(case(1, [2.0, 3.0], low=-0.03, high=-0.01), [], {})["like_float"]  # better than float


def test_a_trial_is_as_good_where_the_paired_difference_may_be_zero():
    # the windows differ much more from each other than the trials do: only pairs can tell them apart
    winner, close, worse = case(1, [2.0, 3.0, 4.0]), case(2, [2.1, 2.9, 4.01]), case(3, [2.01, 3.011, 4.012])
    found = verdict(winner, [winner, close, worse], {})
    assert found["like"] == [2]
    assert found["next"]["id"] == 2 and found["next"]["mean"] == pytest.approx(0.01 / 3)
    difference = verdict(winner, [winner, worse], {})["next"]
    assert difference["low"] == pytest.approx(0.011 - 1.96 * 0.001 / 3**0.5)


def test_confirmed_metrics_are_those_of_the_verdict():
    winner = case(1, [2.0, 3.0])
    found = verdict(winner, [winner], {1: dict(id=1, metrics=dict(kl_mean=0.5))})
    assert found["metrics"] == {**winner["metrics"], "kl_mean": 0.5} and found["is_confirmed"]


def test_the_frontier_has_what_no_other_trial_beats():
    sizes = {1: (100, 0.5), 2: (100, 0.4), 3: (200, 0.4), 4: (300, 0.1), 5: (400, 0.2)}
    trials = [dict(id=id, metrics=dict(delta_nll=loss, weight_bytes=size)) for id, (size, loss) in sizes.items()]
    trials.append(dict(id=6, metrics=dict(delta_nll=-1.0)))  # of unknown size
    assert frontier(trials, "weight_bytes", "delta_nll") == [2, 4]


def test_sensitivity_is_the_difference_that_one_site_makes(study):
    data = report_data(study)
    [group] = data["sensitivity"]
    base = next(trial for trial in data["trials"] if trial["name"] == "base")
    assert group["title"] == "each alone on u8, beside * i16, *.w i8" and group["base"] == base["id"]
    assert {row["trial"] for row in group["rows"]} == {
        trial["id"] for trial in data["trials"] if "site" in trial["swept"] and trial["status"] == "done"
    }
    for row in group["rows"]:
        trial = trial_of(data, row["trial"])
        assert trial["plan"]["rules"] == [*base["plan"]["rules"], [row["site"], "u8"]]
        change = trial["metrics"]["delta_nll"] - base["metrics"]["delta_nll"]
        assert row["delta_nll"] == pytest.approx(change) and row["delta_low"] < change < row["delta_high"]
        assert row["site"] == f"L{row['layer']}.{row['component']}"
    assert [r["delta_nll"] for r in group["rows"]] == sorted((r["delta_nll"] for r in group["rows"]), reverse=True)


def test_sites_that_are_spared_are_a_group_the_best_first(copy):
    for line, (site, loss) in enumerate({"L0.qk": 2.3, "L0.p": 2.2, "L1.p": 2.4}.items(), 1):
        rules = [*plausible.BASE, [site, "off"]]
        change(copy / "trials.jsonl", line, lambda t, r=rules: t["plan"].update(rules=r))
        change(copy / "trials.jsonl", line, lambda t, x=loss: t.update(window_nll=[x] * plausible.WINDOWS))
    (copy / "confirm.jsonl").unlink()
    group = next(g for g in report_data(copy)["sensitivity"] if g["spared"])
    assert group["title"] == "each alone not rounded, beside * i16, *.w i8"
    assert [row["site"] for row in group["rows"]] == ["L0.p", "L0.qk", "L1.p"]


def test_without_a_base_sensitivity_is_against_float(copy):
    path = copy / "trials.jsonl"
    path.write_text(path.read_text("utf-8").split("\n", 1)[1], "utf-8")
    for name in ("confirm.jsonl", "winner.json"):
        (copy / name).unlink()
    data = report_data(copy)
    [group] = data["sensitivity"]
    assert group["base"] is None
    assert all(row["delta_nll"] == trial_of(data, row["trial"])["metrics"]["delta_nll"] for row in group["rows"])


def test_sensitivity_may_be_of_globs(copy):
    for line, glob in enumerate(("L*.qk", "L*.p"), 1):
        change(
            copy / "trials.jsonl", line, lambda t, glob=glob: t["plan"].update(rules=[*plausible.BASE, [glob, "i4"]])
        )
    (copy / "confirm.jsonl").unlink()
    group = next(g for g in report_data(copy)["sensitivity"] if "on i4" in g["title"])
    rows = {(row["site"], row["is_site"], row["layer"]) for row in group["rows"]}
    assert rows == {("L*.qk", False, None), ("L*.p", False, None)}
    write_report(copy)


def test_a_grid_reaches_from_its_lowest_to_its_highest_value(copy):
    made = dict(spec="u4/head", scale=[0.5, 0.25], zero=[8, 0])
    change(copy / "trials.jsonl", 3, lambda t: t["sites"].update({"L0.q": made}))
    grids = report_data(copy)["sites"]["L0.q"]["grids"]
    assert [g["reach"] for g in grids if g["spec"] == "u4/head"] == [[-4.0, 3.75]]


def test_heads_with_grids_of_their_own_are_listed(study):
    found = by_head(report_data(study)["sites"])
    assert {row["site"].split(".", 1)[1] for row in found} == {"k.all", "v.all", "p"}
    assert {len(row["sqnr"]) for row in found if row["site"].endswith(".p")} == {plausible.HEADS}


def test_work_is_summed_over_trials(study):
    lines = [json.loads(line) for line in (study / "trials.jsonl").read_text("utf-8").splitlines()]
    work = report_data(study)["work"]
    assert work["layers_saved"] == sum(line.get("layers_saved", 0) for line in lines) > 0
    assert (work["done"], work["stopped"], work["failed"], work["calibration_forwards"]) == (57, 2, 1, 16)


def test_the_text_table_has_every_trial_the_best_first(study):
    lines = text_table(study).splitlines()
    data = report_data(study)
    assert lines[0].startswith(f"study-llama: {trial_of(data, data['ranking'][0])['name']}, ΔNLL ")
    assert len(lines) == 3 + len(data["trials"]) + 2
    assert all(trial_of(data, id)["name"] in line for id, line in zip(data["ranking"], lines[3:], strict=False))
    assert lines[-3].endswith("stopped") or lines[-3].endswith("failed")
    [failed] = [trial for trial in data["trials"] if trial["status"] == "failed"]
    assert lines[-2:] == ["", f"{failed['name']} failed: site L3.qk: calibration saw no number (head 2)"]


def test_parity_is_said_with_its_first_difference(study):
    html = write_report(study).read_text("utf-8")
    said = html[html.index('id="confirm"') : html.index('id="work"')]
    assert said.count("equal to the bit in 12\u202f264 tokens") == 4
    assert "first difference: window 3, token 17, score nll, fast 2.25, prefill 2.2500002" in said
    shares = re.findall(r"<dd>([\d.]+ %)", said)
    assert shares[:3] == ["0.210 %", "0.170 %", "0.000 %"]


# ---------------------------------------------------------------- parts that are not there


@pytest.mark.parametrize("name", ["confirm.jsonl", "winner.json", "recipe.toml"])
def test_a_file_that_is_not_there_yet_is_left_out(copy, name):
    (copy / name).unlink()
    html = write_report(copy).read_text("utf-8")
    assert ('id="confirm"' in html) == (name != "confirm.jsonl")


def test_a_study_without_trials_says_so(copy):
    for name in ("trials.jsonl", "confirm.jsonl", "winner.json"):
        (copy / name).unlink()
    assert "No trial is done yet" in write_report(copy).read_text("utf-8")
    assert "no trial is done yet" in text_table(copy)


def test_losses_of_a_single_window_have_no_interval(copy):
    path = copy / "trials.jsonl"
    trials = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    for trial in trials:
        trial.get("metrics", {}).update(delta_low=None, delta_high=None)
    path.write_text(plausible.lines(trials), "utf-8")
    (copy / "confirm.jsonl").unlink()
    assert "what is noise cannot be told" in write_report(copy).read_text("utf-8")
    assert "within noise" not in text_table(copy)


def test_a_torn_last_line_is_left_out_and_said(copy):
    path = copy / "trials.jsonl"
    path.write_bytes(path.read_bytes()[:-40])
    data = report_data(copy)
    assert data["torn"] and len(data["trials"]) == 13
    assert "cut short" in write_report(copy).read_text("utf-8")


def test_the_last_line_of_a_trial_counts(copy):
    path = copy / "trials.jsonl"
    first = json.loads(path.read_text("utf-8").splitlines()[0])
    first["metrics"]["delta_nll"] = 9.0  # as written by a later run
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(first) + "\n")
    data = report_data(copy)
    assert len(data["trials"]) == 14 and trial_of(data, first["id"])["metrics"]["delta_nll"] == 9.0


def test_layers_that_a_plan_leaves_in_floats_are_named(copy):
    floats = {f"L{i}.q.w": f"L{i}.q.w is off" for i in range(13)}
    change(copy / "trials.jsonl", 3, lambda t: t.update(integer=dict(layers=5, floats=floats)))
    facts = embedded(write_report(copy).read_text("utf-8"))["trials"][3]["facts"]
    assert facts[-14:-12] == [["layers in integers", "5"], ["in floats", "L0.q.w: L0.q.w is off"]]
    assert facts[-1] == ["in floats", "and 1 other"]


# ---------------------------------------------------------------- bad folders


BAD = [
    ("study.json", None, lambda t: t.pop("model"), r"study\.json: model is missing"),
    ("study.json", None, lambda t: t["model"].pop("hash"), r"study\.json: model: hash is missing"),
    (
        "study.json",
        None,
        lambda t: t["baseline"].update(nll="low"),
        r"study\.json: baseline: nll is 'low', expected a number",
    ),
    ("trials.jsonl", 3, lambda t: t.pop("window_nll"), r"line 4: window_nll is missing"),
    ("trials.jsonl", 3, lambda t: t["window_nll"].pop(), r"line 4: window_nll has 23 numbers, and 24 windows ran"),
    ("winner.json", None, lambda t: t.pop("plan"), r"winner\.json: plan is missing"),
    ("study.json", None, lambda t: t["sites"].append("q"), r"study\.json: site \d+ is 'q', expected an object"),
    (
        "study.json",
        None,
        lambda t: t["stats"]["L0.q"].update(histogram=[1, 2]),
        r"stats of L0\.q: histogram is \[1, 2\]",
    ),
    ("trials.jsonl", 3, lambda t: t.pop("id"), r"trials\.jsonl, line 4: id is missing"),
    (
        "trials.jsonl",
        3,
        lambda t: t.update(status="odd"),
        r"line 4: status is 'odd', expected one of done, stopped, failed",
    ),
    (
        "trials.jsonl",
        3,
        lambda t: t["metrics"].pop("delta_low"),
        r"line 4: metrics: delta_low is missing, and the other end",
    ),
    ("trials.jsonl", 3, lambda t: t["metrics"].update(nll=float("nan")), r"line 4: it cannot be read as JSON: NaN"),
    ("trials.jsonl", 3, lambda t: t.update(plan=dict(odd=1)), r"trial '0003': plan: there is no 'odd'"),
    (
        "trials.jsonl",
        3,
        lambda t: t["sites"].update(nowhere={}),
        r"sites has 'nowhere', and study\.json has no such site",
    ),
    ("trials.jsonl", 3, lambda t: t["sites"].update({"L0.q": {}}), r"site L0\.q: \{\}, expected figures with a spec"),
    ("trials.jsonl", 3, lambda t: t["sites"].update({"L0.q": dict(spec="odd")}), r"site L0\.q: 'odd' is no grid"),
    ("trials.jsonl", 3, lambda t: t.update(integer=dict(layers=5)), r"line 4: integer: floats is missing"),
    ("confirm.jsonl", 0, lambda t: t.pop("parity"), r"confirm\.jsonl, line 1: parity is missing"),
    ("confirm.jsonl", 0, lambda t: t["parity"].update(equal=1), r"parity: equal is 1, expected true or false"),
    ("confirm.jsonl", 0, lambda t: t["disagreement"].update({"L0.q": 0.1}), r"disagreement of L0\.q is 0\.1"),
    (
        "confirm.jsonl",
        0,
        lambda t: t.update(id=999),
        r"confirm\.jsonl, line 1: id is 999, and trials\.jsonl has no such",
    ),
]


@pytest.mark.parametrize("name, line, edit, said", BAD, ids=[said[:40] for *_, said in BAD])
def test_what_is_wrong_is_named(copy, name, line, edit, said):
    change(copy / name, line, edit)
    with pytest.raises(ValueError, match=said):
        report_data(copy)


def test_a_broken_line_is_named(copy):
    path = copy / "trials.jsonl"
    path.write_text("{\n" + path.read_text("utf-8"), "utf-8")
    with pytest.raises(ValueError, match=r"trials\.jsonl, line 1: it cannot be read as JSON"):
        report_data(copy)


def test_a_folder_that_is_no_study_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"there is no study\.json"):
        write_report(tmp_path)


def test_a_winner_that_was_not_tried_is_named(copy):
    (copy / "winner.json").write_text(json.dumps(dict(plan=dict(rules=[["L0.q", "i3"]]))), "utf-8")
    with pytest.raises(ValueError, match=r"winner\.json: no trial of trials\.jsonl has its plan"):
        report_data(copy)


# ---------------------------------------------------------------- hostile names


def test_names_cannot_become_markup(copy):
    change(copy / "study.json", None, lambda t: t["model"].update(name=HOSTILE))
    change(copy / "trials.jsonl", 3, lambda t: t.update(name=HOSTILE))
    change(copy / "trials.jsonl", 11, lambda t: t.update(reason=HOSTILE))
    change(copy / "study.json", None, lambda t: t["sites"].append(dict(name=HOSTILE)))
    (copy / "recipe.toml").write_text(f"# {HOSTILE}\n", "utf-8")
    html = write_report(copy).read_text("utf-8")
    assert "<img" not in html and html.count("<script") == 2 == html.count("</script>")
    found = embedded(html)
    assert found["trials"][3]["name"] == HOSTILE and HOSTILE in found["sites"]


def test_a_spread_has_its_unit_once():
    assert spread([1.25, 3.0, None], decibels) == "1.2 … 3.0 dB"
    assert spread([2, 2], plain) == spread(2, plain) == "2"
    assert spread([None], plain) == spread(None, plain) == NONE


def test_what_is_no_markup_is_escaped():
    assert tag("b", "<i>", Markup("<i>"), None, ["&"], title='"<', data_site=1) == (
        '<b title="&quot;&lt;" data-site="1">&lt;i&gt;<i>&amp;</b>'
    )
    assert json.loads(script_json({"<": "\u2028</script>"})) == {"<": "\u2028</script>"}
    assert "<" not in script_json("</script>")
