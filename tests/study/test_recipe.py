"""Recipes: what is read is what is run; errors name the key; sweeps become trials."""

import hashlib
import pathlib
import tomllib
from pathlib import Path

import pytest

from lockstep.ptq.plan import Plan
from lockstep.ptq.rewrite import sites_of
from lockstep.study.recipe import Recipe, Sweep, TextChoice, first_difference, to_toml
from lockstep.study.trials import expand
from tests.study.models import recorded

STUDIES = Path(__file__).parents[2] / "studies"
WHOLE = """
model = "bundled"
[calibrate]
text = "a.txt"
windows = 4
[evaluate]
text = "texts/b.txt"
sha256 = "%s"
length = 64
[plan]
rules = [["*", "i16"], ["*.w", "u4/row:mse"]]
[[sweep]]
k = { sites = "L*.k.all", spec = ["i8", "i8/head"] }
p = { sites = "L*.p", spec = "u8" }
arithmetic = ["float", "integer"]
[[sweep]]
one_at_a_time = { sites = "L0.*", spec = ["u8", "u4"] }
[[sweep]]
leave_one_out = { sites = "*.w" }
[confirm]
top = 2
""" % ("0f" * 32)


def read(folder, text=WHOLE, changes=()):
    path = folder / "recipe.toml"
    path.write_text(text)
    return Recipe.load(path, changes)


def test_a_recipe_is_read(tmp_path):
    made = read(tmp_path)
    assert made.calibrate == TextChoice(tmp_path / "a.txt", None, 4, 64)
    assert made.evaluate == TextChoice(tmp_path / "texts/b.txt", "0f" * 32, None, 64)
    assert made.plan == Plan([["*", "i16"], ["*.w", "u4/row:mse"]])
    assert made.sweeps == (
        Sweep("product", {"k": ("L*.k.all", ("i8", "i8/head")), "p": ("L*.p", ("u8",))}, ("float", "integer")),
        Sweep("one_at_a_time", {"one_at_a_time": ("L0.*", ("u8", "u4"))}),
        Sweep("leave_one_out", {"leave_one_out": ("*.w", ("off",))}),
    )
    assert (made.weights, made.round, made.early_stop, made.top) == ("f32", 8, True, 2)


def test_a_recipe_written_in_full_is_the_same(tmp_path):
    made = read(tmp_path)
    other = tmp_path / "elsewhere"
    other.mkdir()
    again = read(other, to_toml(made.table))
    assert again == made and again.table == made.table


def test_values_may_be_set(tmp_path):
    made = read(tmp_path, changes=["evaluate.windows=8", "model=org/name", "confirm.top=0", 'plan.mask="additive"'])
    assert (made.evaluate.windows, made.model, made.top, made.plan.fill) == (8, "org/name", 0, -120)
    with pytest.raises(ValueError, match=r"recipe.toml: --set x: expected KEY=VALUE, as evaluate.windows=8"):
        read(tmp_path, changes=["x"])
    with pytest.raises(ValueError, match=r"--set model.x=1: model is no table"):
        read(tmp_path, changes=["model.x=1"])


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (
            'model = "bundled"',
            "model = 3",
            "model is 3, expected a text: a folder, a .gguf file, a hub name or 'bundled'",
        ),
        ('model = "bundled"', 'modell = "x"', "there is no modell; expected one of model, weights, calibrate"),
        ('model = "bundled"', 'weights = "f8"', "weights is 'f8', expected one of auto, f32, bf16"),
        ('model = "bundled"', "model = ", "it cannot be read as TOML"),
        ("windows = 4", "windows = 0", "calibrate.windows is 0, expected a whole number from 1 on"),
        ("windows = 4", "window = 4", "there is no calibrate.window; expected one of text, sha256, windows, length"),
        ("length = 64", "windows = 1", "evaluate.windows is 1, expected a whole number from 2 on"),
        ("length = 64", "length = true", "evaluate.length is true, expected a whole number from 2 on"),
        ("length = 64", 'like = "vllm"', "evaluate.like is 'vllm', expected llama.cpp"),
        ("length = 64", "early_stop = 1", "evaluate.early_stop is 1, expected true or false"),
        ('text = "a.txt"', "text = []", r"calibrate.text is \[\], expected the path of a file"),
        ("0f0f", "0f0g", "evaluate.sha256 is .*, expected 64 hexadecimal digits"),
        ("[evaluate]", "[confirm.x]", "evaluate is missing; expected a table with text"),
        ('"u4/row:mse"', '"u99"', "plan: rule 2, .*: 'u99' is no grid"),
        ('spec = "u8" }', 'spec = "u99" }', r"sweep\[1\].p.spec: 'u99' is no grid"),
        ('spec = "u8" }', "spec = [] }", r"sweep\[1\].p.spec is \[\], expected a grid or a list of grids"),
        ('"float", "int', '"float", "dint', r"sweep\[1\].arithmetic is .*, expected a list of float, integer"),
        ("leave_one_out = {", 'arithmetic = "float"\nleave_one_out = {', r"sweep\[3\].arithmetic stands beside leave"),
        ('sites = "L*.p"', "sites = 1", r"sweep\[1\].p.sites is 1, expected names of sites"),
        ('sites = "L*.p"', 'site = "L*.p"', r"there is no sweep\[1\].p.site; expected one of sites, spec"),
        (
            "leave_one_out = {",
            'one_at_a_time = "x"\nleave_one_out = {',
            r"sweep\[3\].leave_one_out stands beside one_at",
        ),
        ("top = 2", "top = -1", "confirm.top is -1, expected a whole number from 0 on"),
        ("top = 2", "topp = 2", "there is no confirm.topp; expected one of top"),
    ],
)
def test_a_mistake_names_its_key(old, new, said, tmp_path):
    assert old in WHOLE
    text = WHOLE.replace(old, new, 1)
    with pytest.raises(ValueError, match=said):
        read(tmp_path, text if new != "[confirm.x]" else text.replace("[confirm]\ntop = 2", ""))


def test_the_first_difference_of_two_recipes(tmp_path):
    made = read(tmp_path).table
    assert first_difference(made, read(tmp_path).table) is None
    for change, said in (
        ("evaluate.windows=8", "evaluate.windows is only in the recipe: 8"),
        ("calibrate.windows=8", "calibrate.windows was 4 and is now 8"),
        ('plan.rules=[["*", "i16"], ["*.w", "u5"]]', r"plan.rules[2][2] was 'u4/row:mse' and is now 'u5'"),
    ):
        assert first_difference(made, read(tmp_path, changes=[change]).table) == said


# ------------------------------------------------------------ trials


def test_sweeps_add_up():
    sites, plan = sites_of(recorded("plain").recorded), Plan([["*", "i16"]])
    product = Sweep("product", {"k": ("L*.k.all", ("i8", "i8/head")), "p": ("L*.p", ("u8", "i16"))})
    alone = Sweep("one_at_a_time", {"one_at_a_time": ("L0.q*", ("u8",))})
    without = Sweep("leave_one_out", {"leave_one_out": ("L1.p", ("off",))})
    trials = expand(plan, [product, alone, without], sites)
    assert [trial.name for trial in trials[:5]] == [
        "base",
        "k i8, p u8",
        "k i8, p i16",
        "k i8/head, p u8",
        "k i8/head, p i16",
    ]
    assert trials[1].swept == dict(k="i8", p="u8") and trials[1].plan.rules[1:] == (("L*.k.all", "i8"), ("L*.p", "u8"))
    assert "L0.q.rot u8" in [trial.name for trial in trials] and trials[-1].name == "without L1.p"
    assert [trial.may_stop for trial in (trials[0], trials[1], trials[-1])] == [False, True, False]


def test_plans_that_round_alike_are_one():
    sites, plan = sites_of(recorded("plain").recorded), Plan([["*", "i16"]])
    names = [t.name for t in expand(plan, [Sweep("product", {"p": ("L*.p", ("i16", "u8"))})] * 2, sites)]
    assert names == ["base", "p u8"]


def test_arithmetic_can_be_swept():
    sites, plan = sites_of(recorded("plain").recorded), Plan([["*", "i16"], ["*.w", "i8"]])
    sweep = Sweep("product", {"p": ("L*.p", ("i16", "u8"))}, ("float", "integer"))
    trials = {trial.name: trial for trial in expand(plan, [sweep], sites)}
    assert list(trials) == ["base", "p i16, arithmetic integer", "p u8, arithmetic float", "p u8, arithmetic integer"]
    assert trials["p u8, arithmetic integer"].swept == dict(p="u8", arithmetic="integer")
    assert [trial.plan.arithmetic for trial in trials.values()] == ["float", "integer", "float", "integer"]


def test_sites_that_there_are_none_of():
    sites = sites_of(recorded("plain").recorded)
    for kind in ("product", "one_at_a_time", "leave_one_out"):
        with pytest.raises(ValueError, match=r"rule 'L9.p' = 'u8' matches no site; the nearest are"):
            expand(Plan(), [Sweep(kind, {kind: ("L9.p", ("u8",))})], sites)
    with pytest.raises(ValueError, match=r"L0.q.w: u8/head: a weight has no heads"):
        expand(Plan(), [Sweep("one_at_a_time", {"one_at_a_time": ("L0.q*", ("u8/head",))})], sites)


@pytest.mark.parametrize("path", sorted((STUDIES / "recipes").glob("*.toml")), ids=lambda path: path.stem)
def test_recipes_that_are_shipped_name_texts_that_are_there(path):
    made = Recipe.load(path)
    for choice in (made.calibrate, made.evaluate):
        assert hashlib.sha256(choice.text.read_bytes()).hexdigest() == choice.sha256
    assert made.sweeps and (made.model == "bundled" or (Path(made.model) / "config.json").is_file())


@pytest.mark.parametrize("name", ["plain", "a b.c", "a.b", "ü", "x=1", "", "\U0001f600", 'quo"te', "tab\t"])
def test_any_name_and_text_reads_back(name):
    table = {"model": name, "sweep": [{name: {"sites": name, "spec": ["u4", name]}}], "plan": {"rules": [[name, "i8"]]}}
    assert tomllib.loads(to_toml(table)) == table


@pytest.mark.parametrize("name", ["", "a\nb", "\x1b[2J"])
def test_a_name_of_a_sweep_can_be_printed(name):
    table = dict(evaluate=dict(text="t"), sweep=[{name: dict(sites="*", spec=["u8"])}])
    with pytest.raises(ValueError, match="expected a name of one or more printable characters"):
        Recipe.from_table(table, pathlib.Path())
