"""A study's folder with files that are missing, cut short or wrong: errors name the file and the command that makes it
anew."""

import shutil
from types import SimpleNamespace

import numpy as np
import pytest

from lockstep.ptq.observers import Stat
from lockstep.study.assemble import kept_recipe
from lockstep.study.kept import check_same, ids_of, load_stats, save_ids, save_stats
from lockstep.study.records import line_of
from lockstep.study.report.data import report_data
from lockstep.study.report.report import text_table, write_report
from tests.study import plausible


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return plausible.write(tmp_path_factory.mktemp("study"), num_trials=14)


@pytest.fixture
def copy(whole, tmp_path):
    """A folder that a test may change."""
    return shutil.copytree(whole, tmp_path / "study")


def cut(path):
    """Cuts a file in half; a TOML file inside its last string, since half of it may be valid TOML."""
    content = path.read_bytes()
    path.write_bytes(content[: content.rindex(b'"') if path.suffix == ".toml" else len(content) // 2])


RUN = r"`lockstep ptq run \S*study/recipe\.toml --out \S*study` "
ANEW = RUN + "makes it anew"
MISSING = {
    "study.json": r"there is no study\.json; expected the folder of a study whose .* done; " + RUN + "goes on",
    "trials.jsonl": r"trials\.jsonl: it is missing; " + RUN + r"makes the others, of which confirm\.jsonl has one",
}
TORN = {
    "recipe.toml": r"recipe\.toml: it cannot be read as TOML.* delete recipe\.toml: `lockstep ptq run`, given",
    "study.json": r"study\.json: it cannot be read as JSON.*; delete study\.json: " + ANEW,
    "trials.jsonl": r"trials\.jsonl: its last line is cut short; " + RUN + r"makes the others, of which confirm\.jsonl",
    "winner.json": r"winner\.json: it cannot be read as JSON.*; delete winner\.json: " + ANEW,
    "winner.toml": r"winner\.toml: it cannot be read as TOML.*; delete winner\.toml: " + ANEW,
}


@pytest.mark.parametrize("name, said", MISSING.items())
def test_a_file_that_is_missing_is_named(copy, name, said):
    (copy / name).unlink()
    with pytest.raises(ValueError, match=said):
        report_data(copy)


@pytest.mark.parametrize("name, said", TORN.items())
def test_a_file_that_is_cut_short_is_named(copy, name, said):
    (copy / "winner.toml").write_text((copy / "recipe.toml").read_text())
    cut(copy / name)
    with pytest.raises(ValueError, match=said):
        report_data(copy)


def test_trials_that_are_missing_are_not_the_winners_fault(copy):
    (copy / "confirm.jsonl").unlink()
    (copy / "trials.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"trials\.jsonl: it has 0 of the trials; .*, of which winner\.json has one"):
        report_data(copy)


def test_confirmations_that_are_cut_short_are_left_out_and_said(copy):
    cut(copy / "confirm.jsonl")
    assert report_data(copy)["torn"] == ["confirm.jsonl"]
    said = "The last line of confirm.jsonl is cut short, and left out: lockstep ptq confirm makes it again."
    assert said in write_report(copy).read_text("utf-8") and text_table(copy).endswith(said + "\n")


def test_a_file_is_no_folder(copy):
    for read in (report_data, kept_recipe):
        with pytest.raises(ValueError, match=r"recipe\.toml: it is a file, expected the folder of a study"):
            read(copy / "recipe.toml")


def test_a_recipe_that_is_cut_short_says_what_writes_it(copy):
    cut(copy / "recipe.toml")
    with pytest.raises(ValueError, match=r"recipe\.toml: .*; delete it: `lockstep ptq run` writes it again when it is"):
        kept_recipe(copy)


# ------------------------------------------------------------ whose trials these are

STUDY = SimpleNamespace(trials=[SimpleNamespace(id="a"), SimpleNamespace(id="b")], round=2)


def rounds(folder, *names):
    (folder / "rounds.jsonl").write_bytes(b"".join(line_of(dict(round=0, trial=name)) for name in names))


def test_ids_say_whose_a_folder_is(tmp_path):
    check_same(tmp_path, STUDY)
    save_ids(tmp_path, STUDY)
    check_same(tmp_path, STUDY)
    assert ids_of(STUDY) == ["a", "b", "2"]
    with pytest.raises(ValueError, match="it holds a study of other trials, another model or other texts"):
        check_same(tmp_path, SimpleNamespace(trials=STUDY.trials, round=3))
    cut(tmp_path / "ids.json")
    with pytest.raises(ValueError, match=r"ids\.json: it cannot be read as JSON \(.*\); delete it: rounds tell"):
        check_same(tmp_path, STUDY)


def test_without_ids_rounds_say_it(tmp_path):
    rounds(tmp_path, "float", "a")
    (tmp_path / "calibration.npz").write_text("")
    check_same(tmp_path, STUDY)
    rounds(tmp_path, "float", "c")
    with pytest.raises(ValueError, match="it holds a study of other trials"):
        check_same(tmp_path, STUDY)
    rounds(tmp_path)
    with pytest.raises(ValueError, match=r"calibration\.npz: nothing says which study it is of, since ids\.json is"):
        check_same(tmp_path, STUDY)


# ------------------------------------------------------------ calibration


def other_bytes(path):
    path.write_bytes(path.read_bytes()[:200] + bytes(100) + path.read_bytes()[300:])


def an_array(path):
    with open(path, "wb") as file:
        np.save(file, np.zeros(3))


def other_arrays(path):
    with open(path, "wb") as file:
        np.savez(file, **{"q/count": np.zeros(1)})


@pytest.mark.parametrize("change", [cut, other_bytes, an_array, other_arrays, lambda path: path.write_bytes(b"")])
def test_a_broken_calibration_is_named(tmp_path, change):
    path = tmp_path / "calibration.npz"
    save_stats(path, {"q": Stat.empty("q", 2)})
    assert load_stats(path)["q"].num_heads == 2
    change(path)
    with pytest.raises(ValueError, match=r"npz: it is cut short or was changed.*; delete it: `lockstep ptq run RECIPE"):
        load_stats(path)
