"""The scheduler without a model, against a naive one: same plan, same page ids, same slots, at every step."""
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lockstep.engine.pages import PageAllocator
from lockstep.engine.request import Request, SamplingParams
from lockstep.engine.runner import Limits
from lockstep.engine.scheduler import Scheduler
from tests.engine.naive import Naive

ARRIVALS = st.lists(st.tuples(st.integers(1, 300), st.integers(1, 150)), max_size=3)
STEP = st.tuples(ARRIVALS, st.lists(st.integers(0, 5), max_size=2))  # who arrives; which of the known requests end


def request(name, prompt, max_tokens):
    return Request(name, [0] * prompt, SamplingParams(max_tokens=max_tokens))


def planned(scheduler):
    return [(r.id, count, r.pages, r.slot) for r, count in scheduler.schedule()]


def advance(scheduler, plan):
    """What the engine does after a step: whoever has nothing left to compute gets a token."""
    counts = {name: count for name, count, *_ in plan}
    for r in scheduler.running:
        r.num_computed += counts.get(r.id, 0)
        if r.num_left == 0:
            r.output_ids.append(0)


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 70), st.integers(1, 4), st.integers(8, 12), st.lists(STEP, min_size=1, max_size=25))
def test_plans_pages_and_slots_equal_those_of_a_naive_scheduler(budget, num_slots, num_pages, steps):
    scheduler, naive, names = Scheduler(Limits(budget, num_slots, num_pages, num_slots)), Naive(budget, num_slots, num_pages), 0
    for arrivals, ends in steps:
        for prompt, max_tokens in arrivals:
            scheduler.add(request(names, prompt, max_tokens))
            naive.add(names, prompt, max_tokens)
            names += 1
        plan = planned(scheduler)
        assert plan == naive.step()
        assert sum(count for _, count, *_ in plan) <= budget
        advance(scheduler, plan)
        naive.done(plan)
        for index in ends:
            alive = [*scheduler.running, *scheduler.waiting]
            if index < len(alive):
                name = alive[index].id
                scheduler.remove(alive[index])
                naive.end(name)
        assert scheduler.pages.num_free == len(naive.pages)


def test_decodes_go_first_and_prompts_fill_the_budget():
    scheduler = Scheduler(Limits(10, 3, 8, 3))
    for name, prompt in enumerate((25, 1, 30)):
        scheduler.add(request(name, prompt, 5))
    assert [(name, count) for name, count, *_ in planned(scheduler)] == [(1, 1), (0, 9)]


def test_a_request_waits_until_all_pages_it_can_ever_need_are_free():
    scheduler = Scheduler(Limits(10, 4, 4, 4))
    first, second, third = request(0, 64, 65), request(1, 64, 1), request(2, 1, 1)
    for r in (first, second, third):
        scheduler.add(r)
    assert [name for name, *_ in planned(scheduler)] == [0]
    assert (first.pages, second.pages, third.pages) == ([0, 1, 2], [], []), "nobody overtakes who waits for pages"
    scheduler.remove(first)
    scheduler.schedule()
    assert (second.pages, third.pages) == ([0, 1], [2])


def test_what_could_never_run_is_refused():
    scheduler = Scheduler(Limits(10, 4, 2, 4))
    scheduler.add(request(0, 100, 28))
    with pytest.raises(ValueError, match="100 tokens and max_tokens 29: the KV cache holds 128 tokens"):
        scheduler.add(request(1, 100, 29))


def test_a_page_given_back_twice_is_noticed():
    pages = PageAllocator(3)
    taken = pages.take(2)
    assert pages.take(2) is None and pages.num_free == 1, "a failed request takes nothing"
    pages.give_back(taken)
    with pytest.raises(AssertionError, match="twice"):
        pages.give_back(taken)


@pytest.mark.parametrize("bad", [{"max_tokens": 0}, {"temperature": -1}, {"temperature": float("nan")}, {"top_p": 0}, {"top_p": 1.5},
                                 {"min_p": 2}, {"top_k": -1}, {"top_k": True}, {"seed": 1 << 63}, {"stop": ("",)}, {"logprobs": 21},
                                 {"temperature": "1"}])
def test_a_bad_sampling_parameter_is_named(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        SamplingParams(**bad)


def test_token_ids_of_a_request_cross_from_prompt_to_output():
    r = Request(0, [1, 2, 3], SamplingParams(), output_ids=[4, 5])
    known = [1, 2, 3, 4, 5]
    assert all(r.token_ids(i, j) == known[i:j] for i in range(5) for j in range(i, 6))
