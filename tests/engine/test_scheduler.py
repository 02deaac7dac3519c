"""The scheduler without a model, against a naive one: same plan, same page ids, same slots, at every step."""

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lockstep.engine.pages import PageAllocator
from lockstep.engine.prefix import PrefixCache, block_name, first_name
from lockstep.engine.request import Request, SamplingParams, sample_seed, samples
from lockstep.engine.runner import Limits
from lockstep.engine.scheduler import Scheduler
from tests.engine.naive import Naive

# a prompt is one of four texts, cut to a length, so that prompts share prefixes
ARRIVAL = st.tuples(
    st.integers(0, 3), st.integers(1, 200), st.integers(1, 150), st.integers(0, 2), st.sampled_from(["", "", "b"])
)
# who arrives; which of the known requests end; how many steps follow
STEP = st.tuples(st.lists(ARRIVAL, max_size=3), st.lists(st.integers(0, 5), max_size=1), st.integers(1, 60))
TEXTS = [[7] * 200, [7] * 100 + [8] * 100, [7] * 130 + [9] * 70, [5] * 200]


def request(name, prompt, max_tokens, **options):
    tokens = [name] * prompt if isinstance(prompt, int) else prompt
    return Request(name, tokens, SamplingParams(max_tokens=max_tokens), **options)


def cached(pages):
    """A prefix cache of a model without recurrent state: nothing of it needs memory."""
    return PrefixCache(pages, None, b"model")


def planned(scheduler):
    return [(r.id, count, list(r.pages[0].ids), r.slot) for r, count in scheduler.schedule()]


def advance(scheduler, plan, token=0):
    """What the engine does after a step: whoever has nothing left to compute gets a token."""
    counts = {name: count for name, count, *_ in plan}
    for r in [r for r in scheduler.running if r.id in counts]:
        scheduler.computed(r, counts[r.id])
        if r.num_left == 0:
            r.output_ids.append(token)


def both_step(scheduler, naive, budget):
    plan = planned(scheduler)
    assert plan == naive.step()
    assert sum(count for _, count, *_ in plan) <= budget
    advance(scheduler, plan, 7)
    naive.done(plan, 7)
    assert scheduler.pages.num_free == len(naive.free) + len(naive.idle)
    for r in [r for r in scheduler.running if r.max_num_tokens <= r.num_tokens]:
        scheduler.remove(r)
        naive.end(r.id)


@settings(max_examples=200, deadline=None)
@given(
    st.integers(1, 200), st.integers(1, 4), st.integers(6, 10), st.booleans(), st.lists(STEP, min_size=1, max_size=12)
)
def test_plans_pages_and_slots_equal_those_of_a_naive_scheduler(budget, num_slots, num_pages, caches, steps):
    compare(budget, num_slots, num_pages, caches, steps)


def test_they_are_equal_under_load_too_with_preemption_eviction_and_shared_pages():
    seen, rng = Counter(), random.Random(0)
    for _ in range(40):
        steps = []
        for _ in range(30):
            arrivals = [
                (
                    rng.randrange(4),
                    rng.randint(1, 200),
                    rng.randint(1, 150),
                    rng.randrange(3),
                    rng.choice(["", "", "b"]),
                )
                for _ in range(rng.randint(1, 2))
            ]
            steps.append((arrivals, [rng.randrange(6)] * rng.randrange(2), rng.randint(1, 60)))
        compare(rng.randint(20, 200), rng.randint(2, 4), rng.randint(6, 10), True, steps, seen)
    assert all(seen[what] > 20 for what in ("preempted", "evicted", "found", "recovered")), seen


def compare(budget, num_slots, num_pages, caches, steps, seen=None):
    """Takes both schedulers through the same arrivals and ends; every plan must be equal. seen: a Counter of events."""
    scheduler = Scheduler(Limits(budget, num_slots, num_pages, num_slots), cached if caches else None)
    naive, names = Naive(budget, num_slots, num_pages, caches), 0
    for arrivals, ends, num_steps in steps:
        for text, prompt, max_tokens, priority, salt in arrivals:
            scheduler.add(request(names, TEXTS[text][:prompt], max_tokens, priority=priority, cache_salt=salt))
            naive.add(names, TEXTS[text][:prompt], max_tokens, priority, salt)
            names += 1
        for _ in range(num_steps):
            both_step(scheduler, naive, budget)
        for index in ends:
            alive = [*scheduler.running, *scheduler.waiting]
            if index < len(alive):
                name = alive[index].id
                scheduler.remove(alive[index])
                naive.end(name)
    assert scheduler.num_preempted == naive.preempted
    if seen is not None:
        counts = scheduler.prefix.counts
        seen.update(
            preempted=naive.preempted,
            evicted=scheduler.pages.num_evicted,
            found=counts.hit_tokens,
            recovered=counts.recovered_tokens,
        )


def test_decodes_go_first_and_prompts_fill_the_budget():
    scheduler = Scheduler(Limits(10, 3, 8, 3))
    for name, prompt in enumerate((25, 1, 30)):
        scheduler.add(request(name, prompt, 5))
    assert [(name, count) for name, count, *_ in planned(scheduler)] == [(1, 1), (0, 9)]


def test_a_short_prompt_does_not_wait_for_a_long_one():
    scheduler = Scheduler(Limits(100, 3, 40, 3))
    for name, prompt in enumerate((1000, 900, 30)):
        scheduler.add(request(name, prompt, 5))
    assert [(name, count) for name, count, *_ in planned(scheduler)] == [(2, 30), (1, 20), (0, 50)]


def test_priority_goes_before_arrival_in_admission_and_in_every_step():
    scheduler = Scheduler(Limits(10, 2, 20, 2))
    for name, priority in enumerate((3, 1, 2)):
        scheduler.add(request(name, 20, 5, priority=priority))
    assert [(name, count) for name, count, *_ in planned(scheduler)] == [(1, 10)]


def test_a_request_waits_until_all_its_known_tokens_have_pages_and_nobody_overtakes_it():
    scheduler = Scheduler(Limits(10, 4, 4, 4))
    first, second, third = request(0, 130, 5), request(1, 64, 1), request(2, 1, 1)
    for r in (first, second, third):
        scheduler.add(r)
    assert [name for name, *_ in planned(scheduler)] == [0]
    assert ([held.ids for held in first.pages], second.pages, third.pages) == ([[0, 1, 2]], [], []), (
        "a page is left for the first to grow"
    )
    scheduler.remove(first)
    scheduler.schedule()
    assert (second.pages[0].ids, third.pages[0].ids) == ([0], [1])


def test_the_lowest_in_rank_is_preempted_keeps_its_tokens_and_comes_back():
    scheduler = Scheduler(Limits(200, 4, 4, 4))
    old, new = request(0, 60, 100), request(1, 60, 100)
    for r in (old, new):
        scheduler.add(r)
    for _ in range(300):
        if old.num_tokens < 160:
            advance(scheduler, planned(scheduler))
    assert (len(old.pages[0].ids), new.num_preemptions) == (3, 1)
    kept = new.num_tokens
    assert new.slot is None and kept > 100 and new.num_computed == 0
    scheduler.remove(old)
    assert [(name, count) for name, count, *_ in planned(scheduler)] == [(1, kept)]


def test_a_shared_prefix_is_computed_once_even_if_all_ask_at_once():
    scheduler = Scheduler(Limits(500, 4, 20, 4), cached)
    for name in range(3):
        scheduler.add(request(name, [9] * 200 + [name] * 10, 5))
    plan = planned(scheduler)
    assert [(name, count) for name, count, *_ in plan] == [(0, 210)]
    advance(scheduler, plan)
    plan = planned(scheduler)
    assert [(name, count) for name, count, *_ in plan] == [(0, 1), (1, 18), (2, 18)]
    assert [pages[:3] for _, _, pages, _ in plan] == [[0, 1, 2]] * 3
    assert scheduler.prefix.counts.hit_tokens == 2 * 192


def test_who_waits_for_a_prefix_goes_on_when_its_maker_is_cancelled():
    scheduler = Scheduler(Limits(50, 4, 20, 4), cached)
    maker, other = request(0, [9] * 200, 5), request(1, [9] * 200, 5)
    for r in (maker, other):
        scheduler.add(r)
    assert [name for name, *_ in planned(scheduler)] == [0]
    scheduler.remove(maker)
    assert [name for name, *_ in planned(scheduler)] == [1]


def test_requests_with_another_salt_share_nothing():
    scheduler = Scheduler(Limits(500, 4, 20, 4), cached)
    for name, salt in enumerate(("a", "b", "a")):
        scheduler.add(request(name, [9] * 200, 5, cache_salt=salt))
        advance(scheduler, planned(scheduler))
    assert [r.pages[0].ids[0] for r in scheduler.running] == [0, 4, 0]


def test_the_least_recently_used_prefix_is_evicted_last_blocks_first():
    scheduler = Scheduler(Limits(500, 1, 6, 1), cached)
    for name, prompt in enumerate(([1] * 129, [2] * 129, [1] * 129, [3] * 129)):
        scheduler.add(request(name, prompt, 1))
        advance(scheduler, planned(scheduler))
        scheduler.remove(scheduler.running[0])
    [pages], names = scheduler.pages.allocators, [block_name(first_name(b"model", ""), [n] * 64) for n in (1, 2, 3)]
    assert pages.num_evicted == 1 and [pages.find(name) for name in names] == [0, 2, 4]
    assert pages.find(block_name(names[1], [2] * 64)) is None and pages.find(block_name(names[0], [1] * 64)) == 1


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


@pytest.mark.parametrize(
    "bad",
    [
        {"max_tokens": 0},
        {"temperature": -1},
        {"temperature": float("nan")},
        {"top_p": 0},
        {"top_p": 1.5},
        {"min_p": 2},
        {"top_k": -1},
        {"top_k": True},
        {"seed": 1 << 63},
        {"stop": ("",)},
        {"logprobs": 21},
        {"n": 0},
        {"temperature": "1"},
    ],
)
def test_a_bad_sampling_parameter_is_named(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        SamplingParams(**bad)


def test_token_ids_of_a_request_cross_from_prompt_to_output():
    r = Request(0, [1, 2, 3], SamplingParams(), output_ids=[4, 5])
    known = [1, 2, 3, 4, 5]
    assert all(r.token_ids(i, j) == known[i:j] for i in range(5) for j in range(i, 6))


def test_samples_have_seeds_of_their_own_and_the_first_has_the_given_one():
    seeds = [p.seed for p in samples(SamplingParams(seed=-5, n=4))]
    assert seeds[0] == -5 and len(set(seeds)) == 4
    assert seeds == [sample_seed(-5, i) for i in range(4)] and sample_seed(0, 1) == SAMPLE_1_OF_SEED_0


SAMPLE_1_OF_SEED_0 = 3586058455694805751
