"""Random traffic through the whole engine; each step is compared bit for bit with every request alone, without a cache.

In `schedule.py` the test decides what runs in a step; here the engine's own scheduler and prefix cache decide. Memory
is too small for the requests, prompts share prefixes, requests have priorities, samples and salts, and are preempted
and cancelled at any time. Every page that is taken and every slot that is given back is filled with NaN bytes.
"""

import functools
from collections import Counter
from dataclasses import replace

import numpy as np

from lockstep.engine.cache.pages import Held
from lockstep.engine.engine import Engine, EngineOptions
from lockstep.engine.request import SamplingParams
from lockstep.ops.attention.kv_cache import PAGE_TOKENS
from tests.promise.alone import answer
from tests.promise.schedule import POISON, Differs
from tests.promise.trace import positions, state_digest

PAGES, SLOTS = 9, 5
MOST_STEPS = 3000  # in which the requests that are left at the end must finish


class Menu:
    """Prompts that share prefixes, and the answer to each alone. sizes: EngineOptions in place of PAGES and SLOTS."""

    def __init__(self, model, **sizes):
        self.model, self.sizes, self._answers = model, sizes, {}
        self.page_bytes, self.state_bytes = (
            sum(c.bytes_each for c in model.recorded.caches if c.kind == kind) for kind in ("pages", "state")
        )
        draw = np.random.RandomState(3).randint
        one, two, three = (draw(0, model.config.vocab_size, n).tolist() for n in (300, 300, 40))
        self.prompts = [
            one[:200],
            one[:130] + two[:60],
            one[:65],
            one[:64],
            one[:129] + three,
            three[:3],
            two[:256],
            one[:128],
            two[:64] + one[64:150],
        ]
        heats = (0.0, 0.9, 1.3)
        self.params = [
            SamplingParams(max_tokens=m, temperature=heats[i % 3], top_p=(1, 0.9)[i % 2], seed=i, ignore_eos=True)
            for i, m in enumerate((9, 60, 150, 90, 30, 200, 20, 5, 10))
        ]
        # a second turn: the prompt and answer of the first turn, and more
        self.prompts.append(self.answer(0, self.params[0]).known + three[:20])
        self.params.append(self.params[1])

    def answer(self, index, params):
        """The Answer to prompt `index` with the params of one sample."""
        key = index, replace(params, n=1)
        if key not in self._answers:
            self._answers[key] = answer(self.model, self.prompts[index], params)
        return self._answers[key]


class Traffic:
    """One engine under random requests. num_states: how many states fit in memory. num_entries: how many states or
    pages fit on disk. options: of the engine."""

    def __init__(self, menu, seed, num_states=1000, num_entries=1000, **options):
        self.rng, self.menu, self.seed, self.events = np.random.default_rng(seed), menu, seed, Counter()
        options = {"kv_tokens": PAGE_TOKENS * PAGES, "max_requests": SLOTS, **menu.sizes, **options}
        options["state_bytes"] = num_states * menu.state_bytes
        options["cache_dir_bytes"] = num_entries * (max(menu.state_bytes, menu.page_bytes) + 100)
        self.engine = Engine(menu.model, EngineOptions(**options))
        self.memory = self.engine.runner.caches
        for array in self.memory.values():
            array[:] = POISON
        self.expected, self.requests, self._plan, self._step = {}, [], [], self.engine.runner.step
        self._watch()

    def _watch(self):
        """Hooks checks into the scheduler, the allocators and the Runner of the engine."""
        scheduler = self.engine.scheduler
        schedule, strip = scheduler.schedule, scheduler.strip

        def taken(group, take, count):
            pages = take(count)
            self._poison("pages", pages or [], group)
            return pages

        def stripped(request):
            slot = request.slot
            strip(request)
            self._poison("state", slot)

        def planned():
            before = {r.id: r.slot for r in scheduler.running}
            self._plan = schedule()
            self._count_admissions([r for r in scheduler.running if r.id not in before])
            return self._plan

        scheduler.schedule, scheduler.strip = planned, stripped
        for group, allocator in enumerate(scheduler.pages.allocators):
            allocator.take = functools.partial(taken, group, allocator.take)
        self.engine.runner.step = self._checked_step
        pages = scheduler.pages
        self._hidden = [a.take(1) if g.window else [] for g, a in zip(pages.groups, pages.allocators, strict=True)]

    def _with_hidden(self, span):
        """A span whose page tables name a page of NaN bytes for each page behind a window: reading one shows."""
        pages = [Held(0, hidden * held.first + held.ids) for held, hidden in zip(span.pages, self._hidden, strict=True)]
        return replace(span, pages=pages)

    def _poison(self, kind, rows, group=0):
        for cache in self.engine.runner.program.caches:
            if cache.kind == kind and cache.group == group:
                self.memory[cache.name].reshape(-1, cache.bytes_each)[rows] = POISON

    # ------------------------------------------------------------ running

    def run(self, num_steps):
        """Runs steps with arrivals, then the requests that are left; raises Differs at the first wrong bit. Returns the
        events."""
        scheduler = self.engine.scheduler
        for _ in range(num_steps):
            while len(self.engine.scheduler.waiting) < 3 and self.rng.random() < 0.5:
                self.arrive()
            self.engine.step()
            if self.rng.random() < 0.06:
                self.cancel()
            if self.rng.random() < 0.02 and scheduler.running:
                scheduler.preempt(scheduler.running[self.rng.integers(len(scheduler.running))])
        for _ in range(MOST_STEPS):
            if not self.engine.has_work:
                return self.finish()
            self.engine.step()
        raise Differs(f"requests that never end (seed {self.seed})")

    def arrive(self):
        index, n = int(self.rng.integers(len(self.menu.prompts))), int(self.rng.choice([1, 1, 1, 2, 3]))
        params = replace(self.menu.params[index], n=n)
        requests = self.engine.add_samples(
            self.menu.prompts[index],
            params,
            priority=int(self.rng.integers(-1, 2)),
            cache_salt=str(self.rng.choice(["", "", "", "salt"])),
        )
        self.events["samples"] += n > 1
        for request in requests:
            self.expected[request.id] = self.menu.answer(index, request.params)
        self.requests += requests

    def cancel(self):
        alive = [r for r in self.requests if r.finish_reason is None]
        if alive:
            request = alive[self.rng.integers(len(alive))]
            pages = self.engine.scheduler.pages
            num_free, num_held = pages.num_free, sum(len(held.ids) for held in request.pages)
            num_shared = sum(self._is_shared(g, p) for g, held in enumerate(request.pages) for p in held.ids)
            self.events["cancelled running" if request.slot is not None else "cancelled waiting"] += 1
            self.engine.cancel(request)
            assert pages.num_free == num_free + num_held - num_shared and request.pages == []

    def _is_shared(self, group, page):
        """Whether several running requests hold a page of a group."""
        return sum(page in request.pages[group].ids for request in self.engine.scheduler.running) > 1

    def finish(self):
        """After the last step: all pages and slots are free, and every answer is the expected one."""
        scheduler = self.engine.scheduler
        for allocator, hidden in zip(scheduler.pages.allocators, self._hidden, strict=True):
            allocator.give_back(hidden)
        assert scheduler.pages.num_free == scheduler.pages.num_pages
        assert sorted(scheduler.free_slots) == list(range(scheduler.limits.max_requests))
        for request in self.requests:
            answer = self.expected[request.id]
            if request.finish_reason != "cancelled" and request.output_ids != answer.known[answer.num_prompt :]:
                raise Differs(f"tokens of request {request.id} (seed {self.seed})")
            self.events["finished"] += request.finish_reason == "length"
        self.engine.close()
        self.events.update(self.engine.counts())
        return self.events

    # ------------------------------------------------------------ checks

    def _count_admissions(self, admitted):
        self._fresh = {r.id for r in admitted}
        for r in admitted:
            num_found = r.num_computed // PAGE_TOKENS
            found = [(group, held.ids[: num_found - held.first]) for group, held in enumerate(r.pages)]
            hot = any(self._is_shared(group, page) for group, pages in found for page in pages)
            self.events["hot hit" if hot else "cold hit"] += num_found > 0
            self.events["hit without what is before a window"] += any(held.first > 0 for held in r.pages)
            self.events["hit with a state"] += num_found > 0 and self.engine.scheduler.prefix.states is not None
            self.events["second admission"] += r.num_preemptions > 0

    def _checked_step(self, spans):
        """Runs a step in place of `Runner.step`, and checks each span."""
        results = self._step([self._with_hidden(span) for span in spans])
        row = 0
        for (request, _), span in zip(self._plan, spans, strict=True):
            self._check(request, span, [result[row] for result in results] if span.sampled else None)
            row += len(span.sampled)
        self.events["steps"] += 1
        self.events["prefill beside decode"] += len({count == 1 for _, count in self._plan}) == 2
        return results

    def _check(self, request, span, sampled):
        """Raises Differs if a span gave other bits than its request alone. sampled: token, log-probability and
        logits."""
        runner, answer, end = self.engine.runner, self.expected[request.id], span.start + len(span.token_ids)
        where = f"request {request.id} at {span.start} to {end}, seed {self.seed}, step {self.events['steps']}"
        if sampled:
            at = end - answer.num_prompt
            if int(sampled[0]) != answer.known[end] or sampled[1].tobytes() != answer.logprobs[at].tobytes():
                raise Differs(f"token or its log-probability ({where})")
            if sampled[2].tobytes() != answer.logits[at].tobytes():
                raise Differs(f"logits ({where})")
        if state_digest(runner, span.slot) != answer.states[end - 1]:
            raise Differs(f"recurrent state ({where})")
        # all positions that the request holds: after prefill, after a prefix hit, and now and then while it decodes
        if len(span.token_ids) > 1 or request.id in self._fresh or self.rng.random() < 0.1:
            for name, (first, bytes_) in positions(runner, span.pages, end).items():
                if (bytes_ != answer.cache[name][first:end]).any():
                    raise Differs(f"{name} ({where})")
