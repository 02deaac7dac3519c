import re
import tomllib

import pytest

from lockstep.ptq.plan import Plan
from lockstep.ptq.site import Site

SITES = [
    Site("embed.w", is_weight=True),
    Site("embed", width=64),
    Site("rope.cos", width=16),
    *(
        Site(f"L{i}.{name}", heads, 16, i, is_weight=name.endswith(".w"))
        for i in (0, 1)
        for name, heads in (("q.w", 1), ("q", 8), ("q.norm", 8), ("q.x1", 8), ("k", 2), ("k.all", 2), ("p", 8))
    ),
    Site("head", width=512),
]


def resolved(*rules):
    return {name: str(spec) for name, spec in Plan(rules).resolve(SITES).items()}


def test_the_last_rule_that_matches_counts():
    found = resolved(("*", "i16"), ("*.w", "u4:mse"), ("L*.k*", "i8/head"), ("L1.k", "off"), ("embed", "mxfp8"))
    assert list(found) == [site.name for site in SITES]
    assert found["embed.w"] == found["L1.q.w"] == "u4/row:mse"
    assert found["embed"] == "mxfp8"
    assert found["L0.k"] == found["L0.k.all"] == found["L1.k.all"] == "i8/head:minmax"
    assert found["L1.k"] == "off"
    assert found["head"] == found["L0.p"] == "i16/tensor:minmax"


def test_a_glob_is_of_the_whole_name():
    found = resolved(("L*.q", "i8"), ("L[01].q.x?", "u8/row"))
    assert {name for name, text in found.items() if text != "off"} == {"L0.q", "L1.q", "L0.q.x1", "L1.q.x1"}
    assert set(resolved().values()) == {"off"}


@pytest.mark.parametrize(
    "rules, message",
    [
        ([("L*.kall", "i8")], "plan: rule 'L*.kall' = 'i8' matches no site; the nearest are L1.k.all, L0.k.all,"),
        ([("l*.q", "i8")], "plan: rule 'l*.q' = 'i8' matches no site; the nearest are L"),
        ([("*", "i8"), ("L7.q", "i8"), ("*", "off")], "plan: rule 'L7.q' = 'i8' matches no site; the nearest are L"),
        ([("*", "i8/head")], "plan: rule '*' = 'i8/head', site embed.w: i8/head: a weight has no heads"),
        ([("L*", "i8/32")], "plan: rule 'L*' = 'i8/32', site L0.q: i8/32: groups of columns are for weights"),
        ([("L0.p", "q4_0")], "plan: rule 'L0.p' = 'q4_0', site L0.p: q4_0: q4_0 is a format of weights"),
    ],
)
def test_rules_that_sites_cannot_follow(rules, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        resolved(*rules)


def test_a_rule_that_later_ones_replace_may_be_what_a_site_cannot_have():
    assert resolved(("*", "i8/head"), ("*.w", "u4"))["L0.q.w"] == "u4/row:minmax"
    with pytest.raises(ValueError, match="matches no site; the model has no sites"):
        Plan([("*", "i8")]).resolve([])


@pytest.mark.parametrize(
    "made, message",
    [
        (dict(mask="add"), "plan: mask is 'add', expected one of structural, additive"),
        (dict(rope="neox"), "plan: rope is 'neox', expected one of hf, pre_negated"),
        (dict(fuse_scale="v"), "plan: fuse_scale is 'v', expected one of none, q, k"),
        (dict(arithmetic=["float"]), "plan: arithmetic is ['float'], expected one of float, integer"),
        (dict(fill=-20), 'plan: fill is -20, but mask is "structural"; only "additive" has a fill'),
        (dict(mask="additive", fill=1.0), "plan: fill is 1.0, expected a number below 0, at least -1e30"),
        (dict(mask="additive", fill=float("nan")), "plan: fill is nan"),
        (dict(mask="additive", fill=float("-inf")), "plan: fill is -inf"),
        (dict(mask="additive", fill=True), "plan: fill is True"),
        (dict(rules="* = i8"), "plan: rules is '* = i8', expected a list of [sites, grid]"),
        (dict(rules=[["*"]]), "plan: rule 1 is ['*'], expected [sites, grid]"),
        (dict(rules=[["*", "i8"], ["*", 8]]), "plan: rule 2 is ['*', 8], expected [sites, grid]"),
        (dict(rules=[["", "i8"]]), "plan: rule 1 is ['', 'i8'], expected"),
        (dict(rules=[["*.w", "int4"]]), "plan: rule 1, '*.w': 'int4' is no grid; there are i2 .. i16"),
        (dict(layout="prefill"), "plan: there is no 'layout'; a plan has rules, mask, fill, rope, fuse_scale, arith"),
    ],
)
def test_what_is_no_plan_is_named(made, message):
    with pytest.raises(ValueError) as raised:
        Plan.from_table(made)
    assert message in str(raised.value)


def test_text_and_hash():
    awkward = 'a"b\\[!x]\u00e9\x7f'
    plan = Plan([["*", "i8:p99.90"], (awkward, "u4/32")], "additive", -20, "pre_negated", "k", "integer")
    assert plan.fill == -20.0 and plan.rules == (("*", "i8:p99.9"), (awkward, "u4/32"))
    assert Plan.from_toml(plan.to_toml()) == plan == Plan.from_table(plan.to_table())
    assert tomllib.loads(plan.to_toml()) == plan.to_table()
    assert Plan.from_toml("") == Plan() == Plan.from_toml(Plan().to_toml())
    assert Plan(mask="additive") == Plan(mask="additive", fill=-120)
    with pytest.raises(ValueError, match="plan: it cannot be read as TOML: "):
        Plan.from_toml("rules = [")


def test_every_part_of_a_plan_is_in_its_hash():
    plans = [
        Plan(),
        Plan([("*", "i8")]),
        Plan([("*", "i8"), ("*", "i8")]),
        Plan([("*", "i8/tensor")]),
        Plan(mask="additive"),
        Plan(mask="additive", fill=-20),
        Plan(rope="pre_negated"),
        Plan(fuse_scale="q"),
        Plan(fuse_scale="k"),
        Plan(arithmetic="integer"),
    ]
    assert len({plan.hash for plan in plans}) == len(plans)
    assert Plan([("*", "i8:p99.90")]).hash == Plan((("*", "i8:p99.9"),)).hash
    recorded = Plan([("*", "i16"), ("*.w", "u4/row:mse")], mask="additive").hash
    assert recorded == "be785c0b9357f96ada770a1733295431c5844cae6c7d603c6ea9144c98298335"


def test_a_glob_of_any_characters_reads_back():
    plan = Plan([("\U0001f600*", "i8"), ('\x7f"\\', "i4")])
    assert Plan.from_toml(plan.to_toml()) == plan
