import json
import re

import numpy as np
import pytest

from lockstep.ops.rounded import grids, observe
from lockstep.ops.rounded.observe import cleared
from lockstep.ptq.observers import Stat
from lockstep.ptq.plan import Plan
from lockstep.ptq.site import Site
from lockstep.ptq.solved import Solved

RNG = np.random.default_rng(13)
SITES = [
    Site("L0.q.w", is_weight=True, layer=0),
    Site("L0.q", 4, 16, 0),
    Site("L0.k.all", 2, 16, 0),
    Site("L0.p", 4, 0, 0),
    Site("head", 1, 64),
]
PLAN = Plan(
    [("*", "i16"), ("*.w", "u4"), ("L0.q", "u8/head:mse"), ("L0.k.all", "i8/row"), ("L0.p", "nvfp4:p99")],
    mask="additive",
)
NAME, HASH = "study", "12" * 32


def stats():
    made = {}
    for site in SITES:
        made[site.name] = Stat.empty(site.name, site.heads)
        words = cleared(site.heads, 1)
        for head in range(site.heads):
            observe.observe_row(RNG.standard_normal(99).astype(np.float32), words[head])
        made[site.name].take(words)
    return made


STATS = stats()
SOLVED = Solved.solve(PLAN, NAME, HASH, SITES, STATS)


def changed(**keys):
    return json.dumps(json.loads(SOLVED.to_json()) | keys)


def test_solved_are_the_activations_that_a_plan_rounds():
    assert {name: len(rows) for name, rows in SOLVED.grids.items()} == {"L0.q": 4, "L0.k.all": 1, "L0.p": 1, "head": 1}
    for name, spec in PLAN.resolve(SITES).items():
        if name in SOLVED.grids:
            np.testing.assert_array_equal(SOLVED.grids[name], STATS[name].solve(spec))
    SOLVED.check(NAME, HASH, SITES)
    SOLVED.check("the same under another name", HASH, SITES)
    assert not Solved.solve(Plan(), NAME, HASH, SITES, {}).grids
    only_rows = Plan([("L0.q", "i8/row"), ("L0.p", "mxfp4")])
    assert len(Solved.solve(only_rows, NAME, HASH, SITES, {}).grids) == 2
    with pytest.raises(ValueError, match=r"site head: calibration saw no number"):
        Solved.solve(PLAN, NAME, HASH, SITES, {name: stat for name, stat in STATS.items() if name != "head"})


def test_a_file_gives_back_the_same_bits(tmp_path):
    SOLVED.save(tmp_path / "plan.json")
    read = Solved.load(tmp_path / "plan.json")
    assert (read.plan, read.model, read.model_hash, read.hash) == (PLAN, NAME, HASH, SOLVED.hash)
    assert read.to_json() == SOLVED.to_json()
    for name, rows in SOLVED.grids.items():
        assert read.grids[name].dtype == np.float32 and read.grids[name].tobytes() == rows.tobytes()
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]
    with pytest.raises(OSError, match=re.escape(str(tmp_path / "no" / "plan.json"))):
        SOLVED.save(tmp_path / "no" / "plan.json")


def test_every_part_is_in_the_hash():
    q = SOLVED.grids["L0.q"].copy()
    q[3, grids.SCALE] = np.nextafter(q[3, grids.SCALE], np.float32(1))
    others = [
        SOLVED,
        Solved(Plan(PLAN.rules), NAME, HASH, SOLVED.grids),
        Solved(PLAN, NAME, "34" * 32, SOLVED.grids),
        Solved(PLAN, NAME, HASH, {**SOLVED.grids, "L0.q": q}),
    ]
    assert len({each.hash for each in others}) == len(others)
    assert Solved(PLAN, "renamed", HASH, dict(reversed(list(SOLVED.grids.items())))).hash == SOLVED.hash


def test_a_plan_of_another_model_is_named():
    message = "a plan of another model: it is for study (121212121212), this is qwen (abcdabcdabcd)"
    with pytest.raises(ValueError, match=re.escape(message)):
        SOLVED.check("qwen", "abcd" * 16, SITES)


def test_grids_must_be_those_of_the_rules():
    def refused(message, **changes):
        grids = {name: rows for name, rows in (dict(SOLVED.grids) | changes).items() if rows is not None}
        with pytest.raises(ValueError, match=re.escape(message)):
            Solved(PLAN, NAME, HASH, grids).check(NAME, HASH, SITES)

    rows = {name: rows.copy() for name, rows in SOLVED.grids.items()}
    refused("site head: its rules round it, and there is no grid", head=None)
    refused("site embed: its rules do not round it", embed=rows["head"])
    refused("site L0.q: 1 grids, expected 4 (u8/head:mse)", **{"L0.q": rows["L0.q"][:1]})
    refused("site head: its grid is none of i16/tensor:minmax", head=rows["L0.p"])
    for word, value in ((grids.SCALE, 0.5), (grids.INVERSE, 0.5), (grids.LOW, -9), (grids.ZERO_POINT, 1)):
        wrong = rows["head"].copy()
        wrong[0, word] = value
        refused("site head: its grid is none of i16/tensor:minmax", head=wrong)
    for value in (7.5, -1e6, 256):  # zero points of codes from 0 to 255
        wrong = rows["L0.q"].copy()
        wrong[1, grids.ZERO_POINT] = value
        refused("site L0.q: its grid is none of u8/head:mse", **{"L0.q": wrong})
    with pytest.raises(ValueError, match=r"rule 'L0\.q' = 'u8/head:mse' matches no site"):
        SOLVED.check(NAME, HASH, SITES[:1])


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "a solved plan cannot be read as JSON"),
        ("[" * 100000, "a solved plan cannot be read as JSON"),
        ("[]", "a solved plan is [], expected an object with form, plan, model, model_hash, grids"),
        ("{}", "expected an object with form, plan, model, model_hash, grids"),
        (changed(more=1), "a solved plan is an object with form, plan, model, model_hash, grids, more, expected"),
        (changed(form=2), "a solved plan of form 2, expected 1"),
        (changed(model=None), "a solved plan: model is None, expected a text"),
        (changed(plan={"rule": []}), "plan: there is no 'rule'; a plan has rules"),
        (changed(plan=3), "plan: it is 3, expected a table with rules"),
        (changed(grids=[]), "a solved plan: grids is [], expected an object of sites"),
        (changed(grids={"q": [[1, 2]]}), "a solved plan: site q: [[1, 2]], expected rows of 8 finite float32"),
        (changed(grids={"q": []}), "a solved plan: site q: [], expected rows of 8 finite float32"),
        (changed(grids={"q": [[1, 0.1, 10, 0, 0, 7, 0, 0]]}), "a solved plan: site q: [[1, 0.1, 10"),
        (changed(grids={"q": [[1, 1e39, 10, 0, 0, 7, 0, 0]]}), "a solved plan: site q: [[1, 1e+39, 10"),
        (changed(grids={"q": [[1, "1", 10, 0, 0, 7, 0, 0]]}), "a solved plan: site q: [[1, '1', 10"),
        (changed(grids={"q": [[1, True, 10, 0, 0, 7, 0, 0]]}), "a solved plan: site q: [[1, True, 10"),
        (changed(grids={"q": [[1, 10**400, 10, 0, 0, 7, 0, 0]]}), "a solved plan: site q: [[1, 1000"),
    ],
)
def test_files_that_hold_no_plan_are_named(tmp_path, text, message):
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(ValueError) as raised:
        Solved.load(path)
    assert str(raised.value).startswith(f"{path}: ") and message in str(raised.value)
