"""The number of drafts follows from how often drafts were right and what steps cost."""

import numpy as np
import pytest

from lockstep.engine.speculation.acceptance import OWN_AFTER, Acceptance
from lockstep.engine.speculation.draft_width import (
    HEAD,
    PROBE_EVERY,
    TEXTS,
    TRIED_FOR,
    Guesser,
    WidthChoice,
    best_widths,
)
from lockstep.engine.speculation.step_costs import FORGET_AFTER, StepCosts

DEPTHS = 7


def rates(right, width=DEPTHS, steps=400):
    made = Acceptance(width)
    for i in range(steps):
        made.note(["lookup"] * width, right(i))
    return made


def best_width(acceptance, sources, table, rows=1):
    return best_widths([acceptance.hopes_for(sources)], table, rows)[0]


def costs(seconds):
    made = StepCosts()
    for _ in range(40):  # a first one may have been held up
        for rows, each in seconds.items():
            made.note(rows, each)
    return made


FLAT = costs({n: 1 + 0.01 * n for n in range(1, 17)})
STEEP = costs({n: float(n) for n in range(1, 17)})


@pytest.mark.parametrize(
    "right, table, width", [(7, FLAT, 7), (0, FLAT, 0), (2, FLAT, 2), (7, STEEP, 0), (0, STEEP, 0)]
)
def test_as_many_as_pay(right, table, width):
    assert best_width(rates(lambda i: right), ["lookup"] * DEPTHS, table) == width
    assert best_widths([rates(lambda i: right).hopes()], table, 1) == [width]


def test_where_rows_are_dear_fewer_are_worth_it():
    half, all_found = rates(lambda i: (0, 7)[i % 2]), ["lookup"] * DEPTHS
    widths = [best_width(half, all_found, costs({1: 1.0, 8: 1 + 7 * each})) for each in (0.01, 0.1, 0.3, 0.6)]
    assert widths == sorted(widths, reverse=True) and widths[0] == 7 and widths[-1] == 0


def test_rows_go_to_the_requests_whose_drafts_are_likeliest():
    cheap_to_8 = costs({n: 1.0 if n <= 8 else 3.0 for n in range(1, 17)})
    assert best_widths([[0.9, 0.8, 0.7], [0.3, 0.1, 0.0], [0.6, 0.5, 0.4]], cheap_to_8, 3) == [3, 0, 2]
    assert best_widths([[1.0, 1.0, 1.0]] * 4, cheap_to_8, 4) == [0, 0, 1, 3]


def test_nothing_is_tried_before_a_step_without_drafts_was_measured_nor_far_beyond_what_was():
    sure = [[1.0] * DEPTHS] * 3
    assert best_widths(sure, StepCosts(), 3) == [0, 0, 0]
    assert best_widths(sure, costs({5: 1.0}), 3) == [0, 0, 0]
    assert sum(best_widths(sure, costs({3: 1.0}), 3)) == 2
    assert sum(best_widths(sure, costs({3: 1.0, 16: 1.0}), 3)) == 17
    assert best_widths([[1.0, 1.0, 1.0]], costs({1: 1.0}), 1) == [2]


def test_only_drafts_whose_predecessors_were_right_are_judged():
    made = rates(lambda i: DEPTHS)
    before = list(made.of("lookup"))
    made.note(["lookup"] * 3, 0)
    assert made.of("lookup")[0] < before[0] and made.of("lookup")[1:] == before[1:]
    made.note(["lookup"], 1)
    assert made.of("lookup")[1:] == before[1:]


def test_what_a_grammar_forces_raises_no_hopes():
    made = rates(lambda i: 0)
    low = made.hopes()
    for _ in range(50):
        made.note(["grammar"] * 5, 5)
    assert made.hopes() == low and sum(made.hopes_for(["grammar"] * 5)) > 4.5
    assert best_width(made, ["grammar"] * 5, FLAT) == 5


def test_depths_that_were_never_seen_are_as_good_as_the_one_before():
    made = Acceptance(4)
    for _ in range(50):
        made.note(["lookup"] * 2, 2)
    first, *others = made.of("lookup")
    assert first > 0.9 and others == [others[0]] * 3 and others[0] > 0.9
    made.note(["lookup"] * 3, 2)
    assert made.of("lookup")[1] > made.of("lookup")[2] == made.of("lookup")[3]


def test_each_source_is_judged_by_its_own_drafts():
    made = Acceptance(3)
    for _ in range(400):
        made.note(["prediction", "prediction", "lookup"], 2)
    assert made.of("prediction")[:2] == pytest.approx([1, 1], abs=0.01)
    assert made.of("lookup")[2] == pytest.approx(0, abs=0.01)
    assert made.hopes_for(["prediction", "prediction", "lookup"]) == pytest.approx([1, 1, 0], abs=0.03)
    assert best_width(made, ["prediction", "prediction", "lookup"], FLAT) == 2
    assert made.hopes() == pytest.approx([1, 1, 1], abs=0.03)  # the third might be predicted, too


def test_a_new_request_has_the_rates_of_all_requests_until_its_own_count():
    everybody = rates(lambda i: 0)
    own = Acceptance(DEPTHS, everybody)
    assert own.of("lookup") is everybody.of("lookup") and own.hopes() == everybody.hopes()
    for _ in range(OWN_AFTER):
        own.note(["lookup"], 1)
    for _ in range(20):
        own.note(["lookup"], 1)
    assert own.of("lookup")[0] > 0.8 and everybody.of("lookup")[0] < 0.1


def test_costs_between_and_beyond_what_was_measured():
    table = costs({1: 1.0, 5: 2.0})
    assert [table.of(rows) for rows in (1, 3, 9)] == pytest.approx([1.0, 1.5, 3.0], rel=0.01)
    assert StepCosts().of(4) == 1.0


def test_a_step_costs_no_more_than_a_quicker_one_of_more_rows():
    table = costs({4: 10.0, 5: 1.0, 6: 1.1})
    assert table.of(4) == pytest.approx(1.0, rel=0.1) and table.of(4) < table.of(5) < table.of(6) < 1.2


def test_one_slow_step_changes_little():
    table = costs({2: 1.0})
    for rows in (2, 3):
        table.note(rows, 1000.0)
    assert table.of(2) < 1.2 and table.of(3) < 1.6
    table.note(3, 900.0)
    assert table.of(3) == 900.0  # now it was seen twice


def test_a_cost_that_was_not_seen_for_long_is_found_out_again():
    table = costs({1: 1.0, 2: 50.0})
    assert table.of(2) > 40.0
    for _ in range(2 * FORGET_AFTER):
        table.note(1, 1.0)
    assert table.of(2) < 1.2 and table.knows(1)


# ---------------------------------------------------------------- on a machine that is made up


def decode(probability, seconds, requests=1, steps=400, seed=0):
    """(speed as a factor of that without drafts, widths of one request). probability: that a draft is right, a function
    of the step. seconds: of a step, a function of its rows; a measurement adds up to half."""
    rng, choice, tokens, spent, widths = np.random.default_rng(seed), WidthChoice(DEPTHS), 0, 0.0, []
    seen = [choice.newcomer() for _ in range(requests)]
    for step in range(steps):
        choice.begin()
        found = [["lookup"] * DEPTHS] * requests
        chosen = [0] * requests if choice.is_to_be_timed(requests) else choice.choose(seen, found, requests).of_texts
        for each, width in zip(seen, chosen, strict=True):
            wrong = rng.random(width) >= probability(step)
            right = int(np.argmax(wrong)) if wrong.any() else width
            tokens += 1 + right
            if width:
                choice.note(each, ["lookup"] * width, right)
        rows = requests + sum(chosen)
        spent += seconds(rows)
        choice.time(requests, sum(chosen), seconds(rows) * (1 + 0.5 * rng.random() ** 4))
        widths.append(chosen[0])
    return tokens / requests * seconds(requests) / spent, widths


def bend(at, each=0.02):
    """Seconds by rows of a machine whose steps are bound by memory up to `at` rows, and by arithmetic from there on."""
    return lambda rows: max(1 + each * (rows - 1), rows / at)


@pytest.mark.parametrize("requests", [1, 4, 8, 32])
@pytest.mark.parametrize("machine", [bend(8), bend(3), bend(2)])
def test_where_no_draft_is_right_next_to_nothing_is_lost(requests, machine):
    for steps in (64, 400):
        assert decode(lambda step: 0, machine, requests, steps)[0] > 0.97


@pytest.mark.parametrize("requests", [8, 32])
def test_where_rows_cost_what_they_give_next_to_nothing_is_lost(requests):
    assert decode(lambda step: 0.7, bend(4), requests)[0] > 0.97


@pytest.mark.parametrize("requests, probability, gain", [(1, 0.5, 1.6), (1, 0.7, 2.4), (1, 0.9, 4.0), (4, 0.7, 1.4)])
def test_what_can_be_gained_is_gained(requests, probability, gain):
    for steps in (128, 400):
        assert np.mean([decode(lambda _: probability, bend(8), requests, steps, s)[0] for s in range(4)]) > gain


def test_a_text_that_becomes_predictable_is_noticed():
    _, widths = decode(lambda step: float(step >= 200), bend(8), steps=300)
    assert max(widths[100:200]) <= 1 and sum(widths[100:200]) <= 100 / PROBE_EVERY + 1
    assert min(widths[260:]) >= 5


def test_guesses_that_take_time_themselves_are_worth_less():
    right = [rates(lambda i: 7).hopes()] * 2
    widths = [best_widths(right, costs({2: 1.0, 16: 1.2}), 2, each) for each in (0.0, 0.1, 0.5, 5.0)]
    assert widths[0] == [7, 7] and widths[-1] == [0, 0] and widths == sorted(widths, reverse=True)


def asked(choice, seen, seconds_of_guess):
    """How many guesses of a Head a request gets in the next step."""
    choice.begin()
    return choice.choose([seen], [[]], 1, Guesser("model", seconds_of_guess)).of_head[0]


def hopeless(seconds_of_guess, follows=False):
    """(a WidthChoice after no guess was right and steps of two rows were measured, an Acceptance, widths of its
    steps)."""
    choice = WidthChoice(DEPTHS, follows)
    seen = choice.newcomer()
    for rows in (0, 1):
        choice.time(1, rows, 1.0)
    for _ in range(60):
        choice.note(seen, ["model"] * DEPTHS, 0, HEAD)
    return choice, seen, [asked(choice, seen, seconds_of_guess) for _ in range(100)]


@pytest.mark.parametrize("follows, times", [(False, 1), (True, 2)])
def test_guesses_are_tried_again_only_where_sure_ones_would_pay(follows, times):
    widths = hopeless(0.1, follows)[2]
    first, second, *_ = [step for step, width in enumerate(widths) if width and not widths[step - 1]]
    assert widths[first : first + TRIED_FOR + 1] == [1, *[2] * (TRIED_FOR - 1), 0]
    assert second - first == times * PROBE_EVERY + TRIED_FOR - 1  # to follow a request costs time
    assert sum(hopeless(1.0, follows)[2]) == 0


def test_a_guess_that_was_to_be_tried_and_was_not_made_is_asked_for_again():
    choice, seen, _ = hopeless(0.1)
    assert asked(choice, seen, 0.1) == 0
    choice.try_again(seen)
    assert [asked(choice, seen, 0.1) for _ in range(TRIED_FOR + 1)] == [1, 2, 2, 2, 0]


def test_texts_are_tried_whatever_became_of_the_head():
    choice, seen, _ = hopeless(0.1)
    for _ in range(60):
        choice.note(seen, ["lookup"] * DEPTHS, 0)
    tried = []
    for step in range(2 * PROBE_EVERY):
        choice.begin()
        tried += [step] * choice.choose([seen], [["lookup"] * DEPTHS], 1, Guesser("model", 0.1)).of_texts[0]
    assert tried and tried[0] <= PROBE_EVERY


def test_texts_or_the_head_whichever_give_more_tokens_a_second():
    choice = WidthChoice(DEPTHS)
    seen = choice.newcomer()
    choice.begin()
    for num_drafts in (*range(DEPTHS + 1), *range(DEPTHS + 1)):
        choice.time(1, num_drafts, 1 + 0.1 * num_drafts)
    for _ in range(60):
        choice.note(seen, ["lookup 0"] * DEPTHS, 0)
        choice.note(seen, ["lookup 1"] * DEPTHS, 3)
        choice.note(seen, ["lookup 3"] * DEPTHS, DEPTHS)
        choice.note(seen, ["grammar"] * DEPTHS, DEPTHS)
        choice.note(seen, ["model"] * DEPTHS, 5, HEAD)
    for kind, seconds, of_texts, of_head in (
        ("lookup 0", 0.1, 0, 5),
        ("lookup 1", 0.02, 0, 5),
        ("lookup 1", 0.3, 3, 0),
        ("lookup 3", 0.1, 7, 0),
        ("grammar", 0.0, 7, 0),
    ):
        choice.begin()
        made = choice.choose([seen], [[kind] * DEPTHS], 1, Guesser("model", seconds))
        assert (made.of_texts, made.of_head) == ([of_texts], [of_head]), (kind, seconds)


def test_steps_that_were_not_measured_count_as_time():
    table = costs({1: 1.0, 2: 50.0})
    table.note(1, 1.0, FORGET_AFTER)
    table.note(1, 1.0, FORGET_AFTER)
    assert table.of(2) < 1.2


def test_where_no_draft_is_worth_it_nothing_is_chosen_for_a_while():
    choice, seen, _ = hopeless(1.0)
    rested = 0
    for _ in range(400):
        choice.begin()
        if choice.rests(HEAD, 1):
            rested += 1
        else:
            assert choice.choose([seen], [[]], 1, Guesser("model", 1.0)).of_head == [0]
    assert 350 < rested < 400 and not choice.rests(HEAD, 2)
    choice.note(seen, ["model"], 1, HEAD)
    assert not choice.rests(HEAD, 1)


def test_texts_in_which_nothing_is_found_for_long_are_left_alone_for_a_while():
    choice, looked = WidthChoice(DEPTHS), []
    for step in range(60):
        choice.begin()
        if not choice.rests(TEXTS, 1):
            looked.append(step)
            choice.found_nothing(1)
    assert looked[:8] == list(range(8)) and 8 < len(looked) < 20
