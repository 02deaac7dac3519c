"""The prefix cache of models with recurrent state, without a model: which states are kept, which prefixes are found."""

import numpy as np
import pytest

from lockstep.engine.cache.prefix import PrefixCache, block_name, first_name
from lockstep.engine.cache.states import StateStore
from lockstep.engine.request import Request, SamplingParams
from lockstep.engine.runner import Limits
from lockstep.engine.scheduler import Scheduler


class Slots:
    """Stands in for Memory: a slot's state is the number of tokens that went through it."""

    def __init__(self, scheduler):
        self.scheduler, self.restored = scheduler, []

    def read_state(self, slot, position, num_pending, out):
        request = next(r for r in self.scheduler.running if r.slot == slot)
        out[:] = np.array([request.num_computed], np.int32).view(np.uint8)

    def write_state(self, slot, position, data):
        self.restored.append(int(data.view(np.int32)[0]))


@pytest.fixture
def scheduler():
    def make(budget=10_000, every=256, num_states=20):
        def prefix(pages):
            return PrefixCache(pages, slots, b"model", StateStore(4 * num_states, 4), None, every)

        slots = Slots(None)
        made = slots.scheduler = Scheduler(Limits(budget, 4, 100, 4), prefix)
        return made

    return make


def run(scheduler, name, prompt, max_tokens=1, **params):
    """Runs one request to its end; returns the positions where its steps ended."""
    request = Request(name, prompt, SamplingParams(max_tokens=max_tokens, **params))
    scheduler.add(request)
    ends = []
    while len(request.output_ids) < max_tokens:
        for r, count in scheduler.schedule():
            scheduler.computed(r, count)
            ends.append(r.num_computed)
            if r.num_left == 0:
                r.output_ids.append(0)
    scheduler.remove(request)
    return ends


def kept(scheduler, prompt):
    """The positions of a text after which the state is kept."""
    name, found = first_name(b"model", ""), []
    for end in range(64, len(prompt) + 1, 64):
        name = block_name(name, prompt[end - 64 : end])
        found += [end] * (name in scheduler.prefix.states)
    return found


TEXT = list(range(1000))


def test_steps_are_cut_where_states_are_kept(scheduler):
    made = scheduler()
    assert run(made, 0, TEXT[:700]) == [256, 512, 640, 700]
    assert kept(made, TEXT) == [256, 512, 640]


def test_a_state_that_is_hardly_further_than_another_is_not_kept(scheduler):
    made = scheduler(every=512)
    assert run(made, 0, TEXT[:600]) == [512, 600], "576 is only 64 further"
    assert run(made, 1, [7] * 100) == [100]
    assert run(made, 2, [8] * 100, n=2) == [64, 100], "but other samples want it"


def test_the_same_prompt_is_found_up_to_its_last_kept_state(scheduler):
    made = scheduler()
    run(made, 0, TEXT[:700])
    assert run(made, 1, TEXT[:700]) == [700]
    assert made.prefix.memory.restored == [640] and made.prefix.counts.hit_tokens == 640


def test_a_prompt_that_fills_its_last_block_computes_that_block_again(scheduler):
    made = scheduler()
    run(made, 0, TEXT[:640])
    run(made, 1, TEXT[:640])
    assert made.prefix.memory.restored == [576]
    run(made, 2, TEXT[:641])
    assert made.prefix.memory.restored == [576, 640], "the state at the prompt's end was kept too"


def test_where_two_prompts_part_the_state_is_kept_for_the_third(scheduler):
    made, shared = scheduler(every=512), TEXT[:200]
    run(made, 0, shared + [1] * 300)
    assert run(made, 1, shared + [2] * 300) == [192, 448, 500], "pages are known up to 192, and no state"
    assert run(made, 2, shared + [3] * 300) == [448, 500]
    assert made.prefix.memory.restored == [192]


def test_an_answer_keeps_its_newest_state_only_and_the_next_turn_finds_it(scheduler):
    made = scheduler()
    run(made, 0, TEXT[:100], 150)
    text = TEXT[:100] + [0] * 400
    assert kept(made, text) == [64, 192]
    run(made, 1, text[:249])
    assert made.prefix.memory.restored == [192]
    run(made, 2, TEXT[:100], 600)
    assert [p for p in kept(made, TEXT[:100] + [0] * 600) if p >= 256] == [256, 512, 640], "those in between went"


def test_without_its_state_a_page_is_no_prefix(scheduler):
    made = scheduler(num_states=1)
    run(made, 0, TEXT[:300])
    run(made, 1, [5] * 300)
    assert made.prefix.states.num_evicted == 1
    assert run(made, 2, TEXT[:300]) == [256, 300] and made.prefix.memory.restored == []


def test_states_are_bounded_by_bytes_and_the_least_recently_used_goes():
    store = StateStore(3 * 8 + 7, 8)
    for i in range(3):
        store.put(i, lambda out, i=i: out.fill(i))
    assert store.get(0).tolist() == [0] * 8
    store.put(3, lambda out: out.fill(3))
    assert [i in store for i in range(4)] == [True, False, True, True] and store.num_evicted == 1
    store.drop(2)
    store.put(4, lambda out: out.fill(4))
    assert len(store) == 3 and store.num_evicted == 1 and store.get(4).tolist() == [4] * 8
