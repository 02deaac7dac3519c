"""Random schedules: everything that a server may do to a request; each step is compared bit for bit with the same
request alone.

One `Walk` owns a Runner whose memory is full of NaN bytes. A step takes any of the running requests, in any order, with
any number of tokens each, on 1 to 8 threads, and samples any rows and embeds some. Requests arrive, end, are cancelled
in the middle, and are recomputed from their first token on other pages; memory that they leave is filled with NaN bytes
again.
"""

from collections import Counter
from dataclasses import dataclass

import numpy as np

from lockstep.engine.cache.pages import Held, pages_for
from lockstep.engine.runner import Limits, Runner, Span
from lockstep.ops.attention.kv_cache import PAGE_TOKENS
from lockstep.runtime.threads import Team
from tests.promise.trace import Sequence, Trace, positions, report, state_digest

POISON = 0xFF  # float32, bfloat16 and int8 of all ones: NaN or -1
CUTS = (1, 1, 1, 2, 3, 5, 8, 15, 16, 17, 31, 33, 63, 64, 65, 127, 130, 513)
LONG_CUTS = (1, 64, 65, 130, 513, 600)
NUM_THREADS = range(1, 9)
THREADS = (*NUM_THREADS, 1, 1, 1, 2, 2, 2)  # of a step; mostly few, since more threads than cores mostly wait


class Differs(AssertionError):
    """A step gave other bits than the reference."""


@dataclass
class Running:
    """A running request."""

    sequence: Sequence
    trace: Trace
    pages: list[Held]  # of each group
    slot: int
    stop_at: int  # the number of tokens after which it is cancelled, if it is longer
    num_computed: int = 0

    @property
    def num_left(self):
        return min(self.stop_at, len(self.sequence.token_ids)) - self.num_computed


class Teams:
    """One Team of each number of threads, so that a step may run on any."""

    def __init__(self):
        self.by_size = {n: Team(n) for n in NUM_THREADS}

    def close(self):
        for team in self.by_size.values():
            team.close()


class Walk:
    """A random walk through the states of an engine.

    library: [(Sequence, Trace), ...], the longest last. teams: Teams. options: of the Runner."""

    def __init__(self, model, library, teams, seed, limits, **options):
        self.rng, self.library, self.teams, self.seed = np.random.default_rng(seed), library, teams, seed
        self.limits, self.events = limits, Counter()
        self.runner = Runner(model, teams.by_size[1], limits, **options)
        for memory in self.runner.caches.values():
            memory[:] = POISON
        self.windows, self.free_slots = self.runner.program.windows(), list(range(limits.max_requests))
        self.free_pages = [list(range(limits.num_pages)) for _ in self.windows]
        self.used_pages, self.used_slots, self.running = [set() for _ in self.windows], set(), []

    def run(self, num_steps):
        """Runs steps; raises Differs at the first wrong bit."""
        for number in range(num_steps):
            self.arrive()
            if self.running:
                self.step(number)
            self.disturb()
        while self.running:
            self.leave(self.running[0], "cancelled")
        self.check_untouched()
        return self.events

    def take(self, free, used, count, plural):
        """Random members of a free list. plural: what they are, for the events."""
        taken = [free.pop(self.rng.integers(len(free))) for _ in range(count)]
        self.events[f"{plural} used again"] += len(used.intersection(taken))
        used.update(taken)
        return taken

    def take_pages(self, count):
        """`count` random pages of each group."""
        groups = zip(self.free_pages, self.used_pages, strict=True)
        return [Held(0, self.take(free, used, count, "pages")) for free, used in groups]

    def arrive(self):
        """Admits random requests while there are slots and pages."""
        while self.free_slots and (not self.running or self.rng.random() < 0.5):
            # the longest sequence comes first, and is not cancelled
            first = not self.events["arrived"]
            sequence, trace = self.library[-1 if first else self.rng.integers(len(self.library))]
            length = len(sequence.token_ids)
            needed = -(-length // PAGE_TOKENS)
            if needed > min(map(len, self.free_pages)):
                return
            pages = self.take_pages(needed)
            slot = self.take(self.free_slots, self.used_slots, 1, "slots")[0]
            stop_at = int(self.rng.integers(1, length + 1)) if self.rng.random() < 0.3 and not first else length
            self.events["arrived"] += 1
            self.events["pages out of order"] += any(held.ids != sorted(held.ids) for held in pages)
            self.running.append(Running(sequence, trace, pages, slot, stop_at))

    def step(self, number):
        """Runs a step of random requests on memory that is full of NaN bytes, and compares it with the reference."""
        num_chosen = self.rng.integers(1, len(self.running) + 1)
        chosen = [self.running[i] for i in self.rng.permutation(len(self.running))[:num_chosen]]
        budget, spans, members = int(self.rng.integers(1, self.limits.max_step_tokens + 1)), [], []
        for request in chosen:
            cut = int(self.rng.choice(CUTS if request.num_left < 500 else LONG_CUTS))
            count = min(cut, request.num_left, budget)
            if count:
                budget -= count
                members.append((request, count))
                spans.append(self.span(request, count))
        threads = int(self.rng.choice(THREADS))
        self.runner.executor.team = self.teams.by_size[threads]
        self.runner.executor.fill(POISON)
        tokens, logprobs, logits = self.runner.step(spans)
        self.count(members, spans, threads)
        batch = [(r.sequence.name, r.num_computed, n) for r, n in members]
        where = f"seed {self.seed}, step {number}, {threads} threads, {batch}"
        self.compare(members, spans, (logits, tokens, logprobs), where)

    def span(self, request, count):
        """The Span of a request's next `count` tokens, of which random rows sample and are embedded."""
        start, choice = request.num_computed, self.rng.choice(["all", "last", "some"])
        rows = {"all": range(count), "last": [count - 1], "some": self.rng.permutation(count)[:3].tolist()}[choice]
        sampled = {row: request.sequence.sampling(start + row) for row in rows}
        embedded = range(int(self.rng.integers(count)), count)
        return Span(
            request.sequence.token_ids[start : start + count], start, request.pages, request.slot, sampled, embedded
        )

    def count(self, members, spans, threads):
        """Counts the events of a step."""
        e, ends = self.events, [r.num_computed + n for r, n in members]
        e["steps"] += 1
        e["tokens"] += sum(n for _, n in members)
        e[f"{threads} threads"] += 1
        e["batch mates"] += len(members) > 1
        e["prefill beside decode"] += len({n == 1 for _, n in members}) == 2
        e["cut inside a page"] += sum(
            end % PAGE_TOKENS != 0 and n > 1 for end, (_, n) in zip(ends, members, strict=True)
        )
        e["chunk over a page's end"] += sum(
            (end - 1) // PAGE_TOKENS > (end - n) // PAGE_TOKENS for end, (_, n) in zip(ends, members, strict=True)
        )
        e["past 2048"] += sum(end > 2048 for end in ends)
        e["order changed"] += [r.slot for r, _ in members] != sorted(r.slot for r, _ in members)
        e["rows out of order"] += sum(list(s.sampled) != sorted(s.sampled) for s in spans)

    def compare(self, members, spans, results, where):
        """Raises Differs if a row, a report or a state has other bits than the request alone. results: (logits, tokens,
        logprobs) of the step. where: words for the message."""
        row = hidden_row = 0
        for (request, count), span in zip(members, spans, strict=True):
            for offset, hidden in zip(span.embedded, self.runner.hidden(hidden_row, len(span.embedded)), strict=True):
                if hidden.tobytes() != request.trace.hidden[span.start + offset].tobytes():
                    raise Differs(f"hidden state of {request.sequence.name} at {span.start + offset} ({where})")
            hidden_row += len(span.embedded)
            for offset in span.sampled:
                expected = (request.trace.logits, request.trace.tokens, request.trace.logprobs)
                for name, actual, alone in zip(("logits", "token", "logprob"), results, expected, strict=True):
                    if actual[row].tobytes() != alone[span.start + offset].tobytes():
                        raise Differs(f"{name} of {request.sequence.name} at position {span.start + offset} ({where})")
                if report(self.runner, row) != request.trace.reports[span.start + offset]:
                    raise Differs(f"report on {request.sequence.name} at position {span.start + offset} ({where})")
                row += 1
            request.num_computed += count
            if state_digest(self.runner, request.slot) != request.trace.states[request.num_computed - 1]:
                raise Differs(f"state of {request.sequence.name} after {request.num_computed} tokens ({where})")
            self.drop_unseen(request)

    def drop_unseen(self, request):
        """Gives back the pages behind the windows, which no later token sees."""
        for group, (window, held) in enumerate(zip(self.windows, request.pages, strict=True)):
            unseen = max(0, request.num_computed + 1 - window) // PAGE_TOKENS - held.first if window else 0
            if unseen > 0:
                self.check_pages(request)
                self.events["pages before a window"] += unseen
                self.give_back(group, held.ids[:unseen])
                del held.ids[:unseen]
                held.first += unseen

    def check_pages(self, request):
        """Compares all keys and values that a request holds."""
        for name, (start, held) in positions(self.runner, request.pages, request.num_computed).items():
            different = np.flatnonzero((held != request.trace.cache[name][start : request.num_computed]).any((1, 2, 3)))
            if len(different):
                where = f"at position {start + different[0]} (seed {self.seed})"
                raise Differs(f"{name} of {request.sequence.name} {where}")

    def give_back(self, group, pages):
        """Poisons and frees pages."""
        for cache in self.runner.program.caches:
            if cache.kind == "pages" and cache.group == group:
                self.runner.caches[cache.name].reshape(-1, cache.bytes_each)[pages] = POISON
        self.free_pages[group] += pages

    def disturb(self):
        """Ends what is done; cancels and recomputes at random."""
        for request in list(self.running):
            if request.num_left == 0:
                whole = request.num_computed == len(request.sequence.token_ids)
                self.leave(request, "finished" if whole else "cancelled")
            elif request.num_computed and self.rng.random() < 0.02:
                self.recompute(request)

    def recompute(self, request):
        """Preemption: the request loses its memory and starts again from its first token on other pages."""
        self.leave(request, "recomputed")
        pages = self.take_pages(pages_for(len(request.sequence.token_ids)))
        slot = self.take(self.free_slots, self.used_slots, 1, "slots")[0]
        self.running.append(Running(request.sequence, request.trace, pages, slot, request.stop_at))

    def leave(self, request, event):
        """Compares all that a request wrote, then poisons and frees its memory."""
        self.events[event] += 1
        self.check_pages(request)
        self.running.remove(request)
        for cache in self.runner.program.caches:
            if cache.kind != "pages":
                self.runner.caches[cache.name].reshape(-1, cache.bytes_each)[request.slot] = POISON
        for group, held in enumerate(request.pages):
            self.give_back(group, held.ids)
        self.free_slots.append(request.slot)

    def check_untouched(self):
        """Raises Differs if a step wrote to free memory, which must still hold the NaN bytes."""
        for cache in self.runner.program.caches:
            if not (self.runner.caches[cache.name] == POISON).all():
                raise Differs(f"{cache.name}: memory that belongs to no request was written (seed {self.seed})")


def limits(model, max_step_tokens, max_requests, num_pages):
    return Limits(max_step_tokens, max_requests, num_pages, max_step_tokens)
