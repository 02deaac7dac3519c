"""A smaller model that drafts for another: it reads what is known of each request and guesses how it goes on.

It chooses as the target will, with the noise of the same seed, position and token id, the same temperature, penalties
and biases: where both models find the same token likeliest, they choose the same. It has pages and states of its own.
Prompts are computed a part in each step, so that nobody waits for them; a request that is behind has no drafts.

What it guessed wrong is overwritten where memory lies by position. Layers with recurrent state have two slots for each
request: one is moved by known tokens only, and its copy by guesses.
"""

import contextlib
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from lockstep.engine.cache.pages import PageGroup
from lockstep.engine.model import Model
from lockstep.engine.request import Request
from lockstep.engine.runner import Limits, Runner, Span
from lockstep.engine.sampling import guessed
from lockstep.engine.speculation.draft_memory import DraftMemory, Follower
from lockstep.engine.speculation.drafts import MODEL
from lockstep.engine.speculation.step_costs import GUESS_GAIN, StepCosts
from lockstep.native.kernel import OnCompile
from lockstep.runtime.threads import Team

SLOTS = 2  # of a request, for recurrent layers: moved by known tokens, and by guesses
MAX_STEP = 16  # known tokens that may be new since the last step, if there were guesses in it
CATCH_UP = 128  # known tokens that a step computes beside as many as the target does


@contextlib.contextmanager
def named(path: object) -> Iterator[None]:
    """A ValueError raised within says that it is about the draft model, and which that is: the target has tensors and
    config keys of the same names."""
    try:
        yield
    except ValueError as error:
        said = str(error) if str(error).startswith(str(path)) else f"{path}: {error}"
        raise ValueError(f"speculate: the draft model {said}") from None


def check_vocabulary(target: Model, draft: Model) -> None:
    """ValueError for a draft model that knows another number of tokens, or that makes no text."""
    expected, found = target.config.vocab_size, draft.config.vocab_size
    if found != expected:
        raise ValueError(
            f"speculate: the draft model has another vocabulary: {found} tokens, expected {expected} as of the model"
        )
    if not draft.can_generate:
        raise ValueError("speculate: the draft model has no lm_head: it makes embeddings, and no text")


@dataclass(eq=False)
class Guesses:
    """Guesses of a follower's next tokens: how many are wanted, and those made so far."""

    follower: Follower
    most: int
    tokens: list[int] = field(default_factory=list)


class DraftModel:
    """Guesses of a smaller model: a `draft_head.Head`.

    limits: the target's. groups: its own pages, of which there are as many as the target's (see DraftMemory); who finds
    none is not followed. eos_ids: end tokens, after which nothing is guessed. ValueError for another vocabulary than
    the target's."""

    def __init__(
        self,
        model: Model,
        target: Model,
        team: Team,
        limits: Limits,
        groups: tuple[PageGroup, ...],
        eos_ids: frozenset[int],
        on_compile: OnCompile | None = None,
    ) -> None:
        check_vocabulary(target, model)
        self.model = replace(model, max_context=min(model.max_context, target.max_context))
        self._eos_ids = eos_ids
        states = [c for c in model.recorded.caches if c.kind != "pages"]
        num_slots = limits.max_requests * (SLOTS if states else 1)
        num_tokens = max(limits.max_step_tokens, limits.max_requests)
        own = Limits(num_tokens, num_slots, limits.num_pages, limits.max_requests, groups)
        with named(model.checkpoint.path):
            self.runner = Runner(self.model, team, own, on_compile=on_compile)
        self.memory = DraftMemory(groups, limits.max_requests, bool(states))
        self._states = [self.runner.caches[c.name].reshape(-1, c.bytes_each) for c in states]
        self._first_copy = limits.max_requests
        self.followers: dict[int, Follower] = {}
        self._costs = StepCosts(GUESS_GAIN, GUESS_GAIN)

    name = MODEL

    @property
    def may_rest(self) -> bool:
        """It holds nothing that a step changes."""
        return True

    def wants_hidden(self, request: Request) -> bool:
        """It reads tokens."""
        return False

    def observe(self, request: Request, start: int, hidden: np.ndarray) -> None:
        """Nothing is told."""

    def ready(self, request: Request, most: int) -> int:
        """`most`, unless a request is not followed any more."""
        f = self.followers.get(request.id)
        return 0 if f is not None and f.is_done else most

    def guess(self, wanted: Sequence[tuple[Request, int]], num_planned: int) -> dict[int, list[int]]:
        """{id of a request: guesses of its next tokens}, for each at most as many as wanted; 0: it has yet to be read.

        num_planned: tokens that the target computes in this step.
        """
        began = time.perf_counter()
        self._leave([f for f in self.followers.values() if f.request.slot is None])
        if not wanted:
            return {}
        guesses = [Guesses(self._follower(request, most), most) for request, most in wanted]
        followed = [g for g in guesses if not g.follower.is_done]
        has_read = any(g.most == 0 or g.follower.num_left > MAX_STEP for g in followed)
        asking, num_steps = self._read(followed, CATCH_UP + num_planned), 1
        self._copy_states(asking)
        while asking:
            asking, num_steps = self._go_on(asking), num_steps + 1
        if followed and not has_read:
            self._costs.note(len(followed), (time.perf_counter() - began) / num_steps)
        return {g.follower.request.id: g.tokens for g in guesses}

    def seconds(self, num_requests: int) -> float:
        """Seconds that one more guess for each of so many requests takes, all that is done for it included; 0 before
        any was measured."""
        return self._costs.of(num_requests) if self._costs else 0.0

    def is_behind(self, request: Request) -> bool:
        """Whether a request is read, and has known tokens that were not yet."""
        f = self.followers.get(request.id)
        return f is not None and not f.is_done and f.num_left > 0

    def forget(self, request: Request) -> None:
        """Takes leave of a request; it may come again."""
        if request.id in self.followers:
            self._leave([self.followers[request.id]])

    # ------------------------------------------------------------ memory

    def _follower(self, request: Request, most: int) -> Follower:
        """A request's Follower, with pages for its known tokens and guesses; or done, where there is no room."""
        if request.id not in self.followers:
            self.followers[request.id] = self.memory.begin(request)
        f = self.followers[request.id]
        if f.is_done:
            return f
        self._keep_right(f)
        end = request.num_tokens + most
        if end > self.model.max_context or not self.memory.grow(f, end):
            self.memory.stop(f)  # for good: it would begin and stop again and again
        return f

    def _keep_right(self, f: Follower) -> None:
        """Notes which known tokens are computed: also those that were guessed, unless they moved the copy of a state.

        The last known token never is: what follows it is asked for.
        """
        last = f.request.num_tokens - 1
        known = f.request.token_ids(f.num_fed, last) if not self._states else []
        pairs = enumerate(zip(known, f.guessed, strict=False))
        f.num_fed += next((i for i, (a, b) in pairs if a != b), min(len(known), len(f.guessed)))
        f.guessed = []
        if f.num_fed > last:  # a step that was broken off added none
            f.num_fed = 0 if self._states else last

    def _leave(self, followers: Iterable[Follower]) -> None:
        for f in followers:
            if not f.is_done:
                self._keep_right(f)
            del self.followers[f.request.id]
            self.memory.end(f)

    def _copy_states(self, guesses: Sequence[Guesses]) -> None:
        """What known tokens made of the states is where guesses go on from."""
        for rows in self._states if guesses else ():
            for g in guesses:
                rows[self._copy_of(g.follower)] = rows[g.follower.slot]

    def _copy_of(self, f: Follower) -> int:
        """The slot that guesses change."""
        return f.slot + self._first_copy if self._states else f.slot

    # ------------------------------------------------------------ steps

    def _read(self, guesses: Sequence[Guesses], budget: int) -> list[Guesses]:
        """Computes known tokens, up to the budget, of those first that have the fewest left. Returns those that have
        none left, and of whose guesses more than the first are wanted."""
        budget, spans, asking = min(budget, self.runner.limits.max_step_tokens), [], []
        for g in sorted(guesses, key=lambda g: g.follower.num_left):
            f = g.follower
            count = self._with_pages(g, min(f.num_left - (g.most == 0), budget))
            if count:
                asks = count == f.num_left
                spans.append(self._span(g, f.request.token_ids(f.num_fed, f.num_fed + count), f.num_fed, f.slot, asks))
                budget, f.num_fed = budget - count, f.num_fed + count
                asking += [g] if asks else []
        return self._run(spans, asking)

    def _with_pages(self, g: Guesses, count: int) -> int:
        """How many of `count` known tokens there are pages for: not all that are left where guesses have none."""
        f = g.follower
        ahead = g.most if count == f.num_left else 0
        found = self.memory.extend(f, count + ahead)
        return count if found == count + ahead else max(0, min(count - (ahead > 0), found))

    def _go_on(self, guesses: Sequence[Guesses]) -> list[Guesses]:
        """Computes the last guess of each; returns those of which more are wanted."""
        spans = []
        for g in guesses:
            token, at = g.tokens[-1], g.follower.request.num_tokens + len(g.tokens) - 1
            spans.append(self._span(g, [token], at, self._copy_of(g.follower), True))
            g.follower.guessed.append(token)
        return self._run(spans, guesses)

    def _span(self, g: Guesses, token_ids: list[int], start: int, slot: int, asks: bool) -> Span:
        """Tokens of a request, and whether the next one is asked for."""
        request, vocab_size = g.follower.request, self.model.config.vocab_size
        chosen = {len(token_ids) - 1: guessed(request, self._eos_ids, vocab_size, g.tokens)} if asks else {}
        return Span(token_ids, start, g.follower.pages, slot, chosen)

    def _run(self, spans: list[Span], asking: Sequence[Guesses]) -> list[Guesses]:
        """Runs a step, if there is anything to run; those that ask, in the order of their spans, get a token. Returns
        those that want more."""
        if not spans:
            return []
        tokens, logprobs, _ = self.runner.step(spans)
        got = zip(asking, tokens[: len(asking)].tolist(), logprobs[: len(asking)].tolist(), strict=True)
        return [g for g, token, logprob in got if self._takes(g, token, logprob)]

    def _takes(self, g: Guesses, token: int, logprob: float) -> bool:
        """Takes in a guess; whether another one is wanted. What is no number ends the guesses, and nothing else."""
        p = g.follower.request.params
        if not math.isfinite(logprob):
            self.memory.stop(g.follower)
            return False
        if token in p.stop_token_ids or (token in self._eos_ids and not p.ignore_eos):
            return False
        g.tokens.append(token)
        return len(g.tokens) < g.most
