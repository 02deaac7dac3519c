"""The scheduler without a model against a naive scheduler: the same plan, page ids and slots in every step."""

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lockstep.engine.cache.pages import PageAllocator, PageGroup
from lockstep.engine.cache.prefix import PrefixCache, block_name, first_name
from lockstep.engine.request import Request, SamplingParams, sample_seed, samples
from lockstep.engine.runner import Limits
from lockstep.engine.scheduler import Scheduler
from lockstep.replicas.link import MOVED_PRIORITY
from tests.engine.naive import Naive

# a prompt is one of four texts, cut to a length, so that prompts share prefixes
ARRIVAL = st.tuples(
    st.integers(0, 3), st.integers(1, 200), st.integers(1, 150), st.integers(0, 2), st.sampled_from(["", "", "b"])
)
# the requests that arrive; the requests that are cancelled; the number of steps that follow
STEP = st.tuples(st.lists(ARRIVAL, max_size=3), st.lists(st.integers(0, 5), max_size=1), st.integers(1, 60))
TEXTS = [[7] * 200, [7] * 100 + [8] * 100, [7] * 130 + [9] * 70, [5] * 200]


def request(name, prompt, max_tokens, **options):
    tokens = [name] * prompt if isinstance(prompt, int) else prompt
    return Request(name, tokens, SamplingParams(max_tokens=max_tokens), **options)


def cached(pages):
    """The prefix cache of a model without recurrent state; it copies no memory."""
    return PrefixCache(pages, None, b"model")


def planned(scheduler):
    return [(r.id, count, list(r.pages[0].ids), r.slot) for r, count in scheduler.schedule()]


def by_block(held):
    return dict(enumerate(held.ids, held.first))


def advance(scheduler, plan, token=0):
    """Does what the engine does after a step: a request without tokens left gets one more."""
    counts = {name: count for name, count, *_ in plan}
    for r in [r for r in scheduler.running if r.id in counts]:
        scheduler.computed(r, counts[r.id])
        if r.num_left == 0:
            r.output_ids.append(token)


def both_step(scheduler, naive, budget):
    plan = [(r.id, count, [by_block(held) for held in r.pages], r.slot) for r, count in scheduler.schedule()]
    assert plan == naive.step()
    assert sum(count for _, count, *_ in plan) <= budget
    advance(scheduler, plan, 7)
    naive.done(plan, 7)
    assert [a.num_free for a in scheduler.pages.allocators] == [len(g.free) + len(g.idle) for g in naive.groups]
    for r in [r for r in scheduler.running if r.max_num_tokens <= r.num_tokens]:
        scheduler.remove(r)
        naive.end(r.id)


@settings(max_examples=200, deadline=None)
@given(
    st.integers(1, 200), st.integers(1, 4), st.integers(6, 10), st.booleans(), st.lists(STEP, min_size=1, max_size=12)
)
def test_plans_pages_and_slots_equal_those_of_a_naive_scheduler(budget, num_slots, num_pages, caches, steps):
    compare(budget, num_slots, [(num_pages, 0)], caches, steps)


# (pages, window) of each group: few pages or enough, with and without a group that has no window
GROUPS = st.lists(
    st.sampled_from([(6, 0), (9, 0), (7, 400), (4, 130), (9, 130), (3, 65), (2, 64), (2, 24), (6, 24), (1, 1)]),
    min_size=1,
    max_size=3,
    unique_by=lambda group: group[1],
)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 200), st.integers(1, 4), GROUPS, st.booleans(), st.lists(STEP, min_size=1, max_size=12))
def test_plans_equal_those_of_a_naive_scheduler_with_windows(budget, num_slots, groups, caches, steps):
    compare(budget, num_slots, groups, caches, steps)


@pytest.mark.parametrize("num_spare", [0, 1])
@pytest.mark.parametrize("windows", [(), ((8, 24),), ((10, 65), (14, 130))])
def test_plans_equal_those_of_a_naive_scheduler_under_load(windows, num_spare):
    seen, rng = Counter(), random.Random(0)
    for _ in range(20 if windows else 40):
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
            steps.append((arrivals, [rng.randrange(6)] * rng.randrange(2), rng.randint(1, 20 if num_spare else 60)))
        num_slots, num_pages = num_spare + rng.randint(2, 4), rng.randint(6, 10)
        budget = rng.randint(20, 60 if num_spare else 200)
        compare(budget, num_slots, [(num_pages, 0), *windows], True, steps, seen, num_spare)
    few = 5 if windows else 20  # a request that would lack pages of a window is not admitted
    assert all(seen[what] > few for what in ("preempted", "evicted", "found", "recovered")), seen
    assert not num_spare or seen["made_way"] > 5, seen


def compare(budget, num_slots, groups, caches, steps, seen=None, num_spare=0):
    """Takes both schedulers through the same arrivals and ends; every plan must be equal. groups: (pages, window) of
    each. seen: a Counter of events. num_spare: spare slots; every third request was moved then."""
    made = tuple(PageGroup(*group) for group in groups)
    limits = Limits(budget, num_slots, 0, num_slots, made, num_spare)
    scheduler = Scheduler(limits, cached if caches else None)
    naive, names = Naive(budget, num_slots, groups, caches, num_spare), 0
    for arrivals, ends, num_steps in steps:
        for text, prompt, max_tokens, priority, salt in arrivals:
            is_moved = num_spare > 0 and names % 3 == 2
            of = dict(priority=priority - MOVED_PRIORITY * is_moved, is_moved=is_moved)
            scheduler.add(request(names, TEXTS[text][:prompt], max_tokens, cache_salt=salt, **of))
            naive.add(names, TEXTS[text][:prompt], max_tokens, salt=salt, **of)
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
            made_way=naive.made_way,
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
    assert [(name, count) for name, count, *_ in planned(scheduler)] == [(2, 30), (1, 45), (0, 25)]


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


def test_a_request_that_waits_for_a_prefix_goes_on_when_the_one_that_computes_it_is_cancelled():
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


@pytest.mark.parametrize("window", [512, 1000, 1024])
@pytest.mark.parametrize("budget", [1, 100, 512])
def test_a_long_request_holds_pages_for_its_window_and_its_step(window, budget):
    """With a window in five of six layers, a request of 20,000 tokens holds at most the pages that counting gives."""
    pages, length = 400, 20_000
    limits = Limits(budget, 1, pages, 1, (PageGroup(pages), PageGroup(pages, window)))
    scheduler, most = Scheduler(limits), [0, 0]
    scheduler.add(request(0, length, 200))
    while scheduler.running or scheduler.waiting:
        plan = scheduler.schedule()
        most = [max(n, a.num_pages - a.num_free) for n, a in zip(most, scheduler.pages.allocators, strict=True)]
        for r, count in plan:
            assert all(held.end * 64 >= r.num_computed + count for held in r.pages)
            assert r.pages[1].first == max(0, r.num_computed - window + 1) // 64, "the first page with a key it sees"
            scheduler.computed(r, count)
            if r.num_left == 0:
                r.output_ids.append(0)
        if scheduler.running[0].num_tokens > length + 150:
            scheduler.remove(scheduler.running[0])
    span = window - 1 + budget  # keys that the tokens of a step see, their own included
    assert most[0] == -(-(length + 151) // 64) and most[1] in (-(-span // 64), -(-(span - 1) // 64) + 1)
    whole, held = 6 * most[0], most[0] + 5 * most[1]
    assert held < 0.44 * whole


def test_what_could_never_run_is_refused():
    scheduler = Scheduler(Limits(10, 4, 2, 4))
    scheduler.add(request(0, 100, 28))
    with pytest.raises(ValueError, match="100 tokens and max_tokens 29: the KV cache holds 128 tokens"):
        scheduler.add(request(1, 100, 29))
    scheduler = Scheduler(Limits(10, 4, 2, 4, (PageGroup(2, 24),)))
    scheduler.add(request(0, 100, 10_000))
    scheduler = Scheduler(Limits(10, 4, 2, 4, (PageGroup(2, 90),)))
    with pytest.raises(ValueError, match="the KV cache holds 128 tokens"):
        scheduler.add(request(0, 100, 29))


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


def test_a_prefix_is_found_without_the_pages_that_a_window_has_left():
    """Of the second turn's prefix, layers with a window have the last pages only: the first turn's later tokens took
    the others again."""
    groups = (PageGroup(40), PageGroup(4, 100))
    scheduler, text = Scheduler(Limits(64, 1, 40, 1, groups), cached), list(range(2000))
    first, second, other = request(0, text[:1000], 1), request(1, text[:1100], 1), request(2, text[:500] + [7] * 9, 1)
    for r in (first, second, other):
        scheduler.add(r)
        while not r.output_ids:
            advance(scheduler, [(r.id, n) for r, n in scheduler.schedule()])
        scheduler.remove(r)
    assert second.num_cached == 1000 // 64 * 64, "those that it sees are there"
    assert other.num_cached == 0, "where the texts part they are not"


def test_requests_share_what_both_see_and_each_holds_its_own_window():
    groups = (PageGroup(40), PageGroup(20, 100))
    scheduler, text = Scheduler(Limits(1000, 2, 40, 2, groups), cached), list(range(2000))
    first, second = request(0, text[:400], 300), request(1, text[:400], 300)
    for r in (first, second):
        scheduler.add(r)
        advance(scheduler, planned(scheduler))
    shared = [set(a.ids) & set(b.ids) for a, b in zip(first.pages, second.pages, strict=True)]
    assert [len(pages) for pages in shared] == [6, 2] and first.pages[1].first == 301 // 64
    for _ in range(200):
        advance(scheduler, planned(scheduler))
    assert [len(set(a.ids) & set(b.ids)) for a, b in zip(first.pages, second.pages, strict=True)] == [6, 0]
    assert first.pages[1].first == second.pages[1].first + (first.num_computed - second.num_computed) // 64 == 501 // 64


def test_a_step_is_as_long_as_there_are_pages_of_a_window():
    scheduler = Scheduler(Limits(500, 2, 40, 2, (PageGroup(40), PageGroup(5, 65))))
    first, second = request(0, 700, 20), request(1, 700, 20)
    scheduler.add(first)
    assert [count for _, count, *_ in planned(scheduler)] == [5 * 64]
    advance(scheduler, [(0, 5 * 64)])
    scheduler.add(second)
    plan = planned(scheduler)
    assert [(name, count) for name, count, *_ in plan] == [(0, 2 * 64), (1, 2 * 64)], "two are kept for the other"
    advance(scheduler, plan)
    assert [(name, count) for name, count, *_ in planned(scheduler)] == [(0, 2 * 64), (1, 64)]
    assert scheduler.num_preempted == 0


@pytest.mark.parametrize("keeps", [True, False])
def test_where_two_prompts_part_the_third_finds_what_a_window_shows(keeps, monkeypatch):
    """The third prompt also finds them at the end of a prompt, however long the answer was."""
    if not keeps:
        monkeypatch.setattr(PrefixCache, "stops", lambda self, request: ())
    scheduler, found = Scheduler(Limits(64, 1, 100, 1, (PageGroup(100), PageGroup(8, 100))), cached), []
    for name, tail in enumerate(([1] * 700, [2] * 700, [3] * 700, [3] * 700)):
        made = request(name, list(range(256)) + tail, 700)
        scheduler.add(made)
        while len(made.output_ids) < 700:
            advance(scheduler, [(r.id, n) for r, n in scheduler.schedule()])
        scheduler.remove(made)
        found.append(made.num_cached)
    assert (found[2:] == [256, 956 // 64 * 64]) == keeps, found
