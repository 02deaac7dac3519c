"""How many drafts are made follows what they gave and what steps cost."""

import pytest

from lockstep.engine.draft_width import FRESH, Acceptance, StepCosts, best_width


def rates(right, width=7, steps=200):
    made = Acceptance(width)
    for i in range(steps):
        made.note(["lookup"] * width, right(i))
    return made


def expected(acceptance, width=7):
    return acceptance.expected(["lookup"] * width)


def costs(seconds):
    made = StepCosts()
    for rows, each in seconds.items():
        made.note(rows, each)
    return made


FLAT = costs({n: 1 + 0.01 * n for n in range(1, 17)})
STEEP = costs({n: float(n) for n in range(1, 17)})


@pytest.mark.parametrize(
    "right, table, width", [(7, FLAT, 7), (0, FLAT, 0), (2, FLAT, 2), (7, STEEP, 0), (0, STEEP, 0)]
)
def test_as_many_as_pay(right, table, width):
    assert best_width(expected(rates(lambda i: right)), table, 1, 1) == width


def test_where_rows_are_dear_fewer_are_worth_it():
    half = expected(rates(lambda i: (0, 7)[i % 2]))
    widths = [best_width(half, costs({1: 1.0, 8: 1 + 7 * each}), 1, 1) for each in (0.01, 0.1, 0.3, 0.6)]
    assert widths == sorted(widths, reverse=True) and widths[0] == 7 and widths[-1] == 0


def test_only_drafts_whose_predecessors_were_right_are_judged():
    made = Acceptance(3)
    before = list(made.of("lookup"))
    made.note(["lookup"] * 3, 0)
    assert made.of("lookup")[0] < before[0] and made.of("lookup")[1:] == before[1:]
    made.note(["lookup"], 1)
    assert made.of("lookup")[1:] == before[1:]


def test_each_source_is_judged_by_its_own_drafts():
    made = Acceptance(3)
    for _ in range(100):
        made.note(["grammar", "grammar", "lookup"], 2)
    assert made.of("grammar")[:2] == pytest.approx([1, 1]) and made.of("lookup")[2] == pytest.approx(0, abs=1e-6)
    assert made.expected(["grammar", "grammar", "lookup"]) == pytest.approx([0, 1, 2, 2])
    assert best_width(made.expected(["grammar", "grammar", "lookup"]), FLAT, 1, 1) == 2


def test_a_request_begins_with_what_others_saw():
    others = rates(lambda i: 1)
    assert Acceptance(7, others).rates == others.rates
    assert Acceptance(7, others).of("lookup") is not others.of("lookup")


def test_costs_between_and_beyond_what_was_measured():
    table = costs({1: 1.0, 5: 2.0})
    assert table.of(3) == 1.5 and table.of(1) == 1.0 and table.of(9) > 2.0
    assert StepCosts().of(4) == 1.0
    assert costs({8: 2.0}).of(4) < 2.0


def test_one_slow_step_changes_little():
    table = costs({2: 1.0})
    table.note(2, 1000.0)
    assert table.of(2) < 1.2


def test_a_number_of_rows_that_was_slow_once_is_tried_again():
    table, wrong = costs({1: 50.0}), expected(rates(lambda i: 0))
    table.note(8, 1.0)
    assert best_width(wrong, table, 1, 1) > 0
    for _ in range(2 * FRESH):
        table.note(8, 1.0)
    assert best_width(wrong, table, 1, 1) == 0 and len(table) == 1


def test_guesses_that_take_time_themselves_are_worth_less():
    right = expected(rates(lambda i: 7))
    widths = [best_width(right, FLAT, 1, 1, [each * k for k in range(8)]) for each in (0.0, 0.1, 5.0)]
    assert widths == [7, 7, 0]
    assert best_width(expected(rates(lambda i: (0, 7)[i % 2])), FLAT, 1, 1, [0.6 * k for k in range(8)]) == 0
