"""What drafts gain on this machine: steps of more rows than one, and whole answers with drafts against none.

Drafts come from a recording: the answer is known, from a run without drafts, and each draft is its next token with a
given probability and another token otherwise. So acceptance is what was asked for, on any model, and a draft costs
nothing but its row. All that is compared runs in turns in one process, and a ratio is one of two that ran in turns.
"""

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lockstep.engine.cache.pages import everywhere
from lockstep.engine.engine import Engine, EngineOptions
from lockstep.engine.model import Model
from lockstep.engine.request import Request, SamplingParams
from lockstep.engine.runner import Runner, Span
from lockstep.engine.speculation.draft_head import Head
from lockstep.engine.speculation.drafts import MAX_DRAFTS, MOST_BY_ITSELF, Drafter
from lockstep.engine.speculation.lookup import Guess
from lockstep.lab.layer_speed import Case
from lockstep.lab.parity import GREEDY
from lockstep.ops.attention.kv_cache import PAGE_TOKENS
from lockstep.ops.linear import linear_cpu
from lockstep.runtime.threads import Team

GROUPED_SHAPE, LINEAR_SHAPE = "8192x4096x8", "4096x8192"  # the two halves of the output projection
TURN = 0.05  # seconds: longer than threads take to wake up
WIDTHS = range(1, MAX_DRAFTS + 2)  # rows of a request in a step: its certain token and its drafts


class Replay:
    """A source of drafts whose acceptance is chosen: the recorded answer's tokens, each with this probability, else
    another token.

    answers: {id of a request: its answer}.
    """

    def __init__(
        self, answers: Mapping[int, Sequence[int]], acceptance: float, vocab_size: int, seed: int, name: str = "replay"
    ) -> None:
        self._drafts, self._name = {}, name
        for i, (request_id, answer) in enumerate(answers.items()):
            is_wrong = np.random.default_rng([seed, i]).random(len(answer)) >= acceptance
            self._drafts[request_id] = ((np.array(answer) + is_wrong) % vocab_size).tolist()

    def __call__(self, request: Request, most: int, drafts: Sequence[int]) -> Guess:
        known = len(request.output_ids) + len(drafts)
        return Guess(self._drafts[request.id][known : known + most], self._name)


class ReplayedHead:
    """A `draft_head.Head` that guesses as another does, at its cost, and says what a Replay says instead."""

    def __init__(self, head: Head, replay: Replay) -> None:
        self._head, self._replay, self.name = head, replay, head.name
        self.wants_hidden, self.observe, self.ready = head.wants_hidden, head.observe, head.ready
        self.is_behind, self.seconds, self.forget = head.is_behind, head.seconds, head.forget

    @property
    def may_rest(self) -> bool:
        """See the head's."""
        return self._head.may_rest

    def guess(self, wanted: Sequence[tuple[Request, int]], num_planned: int) -> dict[int, list[int]]:
        """As many as the head guesses, and others."""
        found, requests = self._head.guess(wanted, num_planned), {request.id: request for request, _ in wanted}
        return {i: self._replay(requests[i], len(ids), ()).tokens for i, ids in found.items() if i in requests}


@dataclass(frozen=True)
class Answered:
    """Requests that were answered together: seconds in all, and tokens and seconds after all had their first token;
    native steps there, and how many drafts were computed and right."""

    answers: list[list[int]]
    seconds: float
    decode_tokens: int
    decode_seconds: float
    steps: int
    drafted: int
    accepted: int

    @property
    def tokens_per_second(self) -> float:
        return self.decode_tokens / self.decode_seconds


class Course:
    """Requests that were just added to an engine, on their way to their ends; only the engine's own time counts."""

    def __init__(self, engine: Engine, requests: Sequence[Request]) -> None:
        self._engine, self._requests = engine, requests
        self.seconds, self._decode_began, self._known, self._steps = 0.0, 0.0, 0, 0

    def advance(self, seconds: float) -> bool:
        """Runs steps for about so long; whether there is more to do."""
        until = self.seconds + seconds
        while self._engine.has_work and self.seconds < until:
            began = time.perf_counter()
            self._engine.step()
            self.seconds += time.perf_counter() - began
            self._steps += self._known > 0
            if not self._known and all(r.output_ids for r in self._requests):
                self._decode_began, self._known = self.seconds, sum(len(r.output_ids) for r in self._requests)
        return self._engine.has_work

    def answered(self) -> Answered:
        """What came of it, when all have ended."""
        answers = [r.output_ids for r in self._requests]
        return Answered(
            answers,
            seconds=self.seconds,
            decode_tokens=sum(map(len, answers)) - self._known,
            decode_seconds=self.seconds - self._decode_began,
            steps=self._steps,
            drafted=sum(r.num_drafted for r in self._requests),
            accepted=sum(r.num_accepted for r in self._requests),
        )


def in_turns(*courses: Course) -> list[Answered]:
    """Runs courses to their ends by turns of TURN seconds, so that what slows the machine slows all of them."""
    left = list(courses)
    while left:
        left = [course for course in left if course.advance(TURN)]
    return [course.answered() for course in courses]


@dataclass(frozen=True)
class Setting:
    """What is compared with no drafts. acceptance: from 0 to 1; draft: drafts of a request in a step, None for as many
    as pay."""

    requests: int
    acceptance: float
    draft: int | None


@dataclass(frozen=True)
class Plan:
    """What is measured.

    acceptances: from 0 to 1. requests: numbers of them. contexts: of steps. prompt, tokens: of each answer. rounds: of
    each comparison.
    """

    acceptances: tuple[float, ...]
    requests: tuple[int, ...]
    contexts: tuple[int, ...]
    prompt: int
    tokens: int
    rounds: int

    @property
    def longest(self) -> int:
        """Tokens that a request may have."""
        return max(self.prompt + self.tokens, *self.contexts) + MAX_DRAFTS + 1

    @property
    def kv_tokens(self) -> int:
        """Tokens of KV cache, drafts included, with which nobody waits."""
        return max(self.requests) * (self.prompt + self.tokens + MAX_DRAFTS + PAGE_TOKENS) + self.longest + PAGE_TOKENS


class Bench:
    """An engine without drafts and one with them, of the same weights.

    plain: the engine without; no other thread may use it meanwhile. options: of the engine with drafts. If it has an
    MTP head, that computes them in full before they are replaced.
    """

    def __init__(self, model: Model, plain: Engine, options: EngineOptions) -> None:
        assert options.draft == MAX_DRAFTS and not options.prefix_cache
        self.model, self.plain = model, plain
        self.drafting = Engine(model, options, eos_ids=plain.eos_ids, new_detokenizer=plain.new_detokenizer)
        assert self.drafting.drafter is not None
        self._head = self.drafting.drafter.head

    def close(self) -> None:
        """Ends the threads of the engine that was made here."""
        self.drafting.close()

    def prompts(self, requests: int, length: int) -> list[list[int]]:
        """Random prompts, always the same."""
        rng = np.random.default_rng([7, requests])
        return rng.integers(0, self.model.config.vocab_size, (requests, length)).tolist()

    def without(self, prompts: Sequence[list[int]], tokens: int) -> Course:
        """To answers of so many tokens without drafts."""
        return Course(self.plain, self._add(self.plain, prompts, tokens))

    def drafted(self, prompts: Sequence[list[int]], recorded: Answered, setting: Setting, seed: int) -> Course:
        """To the same answers with drafts. All that is learnt about acceptance and costs is learnt anew."""
        engine, tokens = self.drafting, len(recorded.answers[0])
        requests = self._add(engine, prompts, tokens)
        answers = {r.id: answer for r, answer in zip(requests, recorded.answers, strict=True)}
        replay = Replay(answers, setting.acceptance, self.model.config.vocab_size, seed)
        source, head = (None, ReplayedHead(self._head, replay)) if self._head else (replay, None)
        engine.drafter = Drafter(engine.scheduler, source, setting.draft, engine.eos_ids, head)
        return Course(engine, requests)

    def seconds_of_guess(self, requests: int) -> float:
        """What the head takes for one more draft of each of so many requests, once it was asked for some."""
        return self._head.seconds(requests) if self._head else 0.0

    @staticmethod
    def _add(engine: Engine, prompts: Sequence[list[int]], tokens: int) -> list[Request]:
        return [engine.add(ids, SamplingParams(max_tokens=tokens, ignore_eos=True)) for ids in prompts]


@dataclass(frozen=True)
class Compared:
    """A Setting against no drafts: medians of the ratios of its runs, above 1 where drafts gain; lowest and
    highest of decode's; tokens a second without; drafts of all runs, those that were right, tokens of a step and
    request, and how many answers were not the same (none, or there is a fault)."""

    setting: Setting
    decode: float
    spread: tuple[float, float]
    whole: float
    tokens_per_second: float
    drafted: int
    accepted: int
    tokens_per_step: float
    differing: int


def compare(bench: Bench, settings: Sequence[Setting], prompt: int, tokens: int, rounds: int) -> list[Compared]:
    """Runs settings with the same number of requests, each in turns with a run without drafts."""
    prompts = bench.prompts(settings[0].requests, prompt)
    [recorded] = in_turns(bench.without(prompts, tokens))
    runs: dict[Setting, list[list[Answered]]] = {setting: [] for setting in settings}
    for i in range(rounds):
        for setting in settings:
            pair = bench.without(prompts, tokens), bench.drafted(prompts, recorded, setting, i)
            runs[setting].append(in_turns(*pair))
    return [_compared(setting, pairs, recorded) for setting, pairs in runs.items()]


def answers(bench: Bench, plan: Plan, requests: int) -> list[Compared]:
    """Each acceptance with the number of drafts that pays best if it is fixed, and with as many as pay.

    The best fixed number follows from steps (and guesses of the head) that are measured first; where none pays, only
    the other is run.
    """
    seconds = step_seconds(bench, requests, plan.prompt, range(1, MOST_BY_ITSELF + 2), 3 * plan.rounds)
    tried = Setting(requests, 1.0, 2)
    compare(bench, [tried], plan.prompt, 8, 1)
    each, settings = bench.seconds_of_guess(requests), []
    for acceptance in plan.acceptances:
        best = best_draft(acceptance, {width: s + (width - 1) * each for width, s in seconds.items()})
        settings += [Setting(requests, acceptance, draft) for draft in ([best] if best else []) + [None]]
    return compare(bench, settings, plan.prompt, plan.tokens, plan.rounds)


def _compared(setting: Setting, pairs: Sequence[Sequence[Answered]], recorded: Answered) -> Compared:
    decode = [with_.tokens_per_second / without.tokens_per_second for without, with_ in pairs]
    own = [with_ for _, with_ in pairs]
    return Compared(
        setting=setting,
        decode=statistics.median(decode),
        spread=(min(decode), max(decode)),
        whole=statistics.median(without.seconds / with_.seconds for without, with_ in pairs),
        tokens_per_second=statistics.median(without.tokens_per_second for without, _ in pairs),
        drafted=sum(run.drafted for run in own),
        accepted=sum(run.accepted for run in own),
        tokens_per_step=sum(r.decode_tokens for r in own) / sum(r.steps for r in own) / setting.requests,
        differing=sum(a != b for run in own for a, b in zip(run.answers, recorded.answers, strict=True)),
    )


# ---------------------------------------------------------------- steps


def step_seconds(bench: Bench, requests: int, context: int, widths: Sequence[int], rounds: int) -> dict[int, float]:
    """{rows of each request: seconds of a step after so many tokens}, by the lower quartile of rounds in turns.

    Width 1 is a step without drafts. Wider ones have as many pending records as half of their drafts.
    """
    ids = np.random.default_rng(8).integers(0, bench.model.config.vocab_size, max(widths)).tolist()
    times, rng = {width: [] for width in widths}, np.random.default_rng(9)
    for _ in range(rounds + 1):
        for width in rng.permutation(np.array(widths)).tolist():
            runner = bench.plain.runner if width == 1 else bench.drafting.runner
            spans = [_span(ids[:width], context, slot) for slot in range(requests)]
            times[width].append(_timed(runner, spans))
    return {width: float(np.percentile(found[1:], 25)) for width, found in times.items()}


def _span(ids: list[int], context: int, slot: int) -> Span:
    each = -(-(context + MAX_DRAFTS + 1) // PAGE_TOKENS)
    sampled = {i: dict(GREEDY, position=context + i + 1) for i in range(len(ids))}
    drafts = len(ids) - 1
    return Span(
        ids,
        context,
        everywhere(range(slot * each, (slot + 1) * each)),
        slot,
        sampled,
        num_drafts=drafts,
        num_pending=drafts // 2,
    )


def _timed(runner: Runner, spans: Sequence[Span]) -> float:
    began = time.perf_counter()
    runner.step(spans)
    return time.perf_counter() - began


def best_draft(acceptance: float, seconds: Mapping[int, float]) -> int:
    """The fixed number of drafts with the most tokens a second, by steps of each width that were measured; 0: none."""
    if not acceptance:
        return 0
    tokens = {width: sum(acceptance**i for i in range(width)) for width in seconds}
    return max(seconds, key=lambda width: tokens[width] / seconds[width]) - 1


# ---------------------------------------------------------------- a layer that is read once for all rows


@dataclass(frozen=True)
class Grouped:
    """`grouped_linear` at the shape of DeepSeek-V4's attention output: seconds of one row, of `rows` rows that share a
    read of the weights, and of the baseline, which reads them for every row; GB/s of the baseline at `rows` rows, and
    of a `linear` with one row."""

    rows: int
    one_row: float
    together: float
    per_token: float
    per_token_gb: float
    linear_gb: float


def grouped(team: Team, rounds: int, rows: int = 8, format: str = "q8_0") -> Grouped:
    """Measures them in turns."""
    cases = [
        Case(format, GROUPED_SHAPE, rows, team, linear_cpu.CPU),
        Case(format, GROUPED_SHAPE, rows, team, linear_cpu.PER_TOKEN),
        Case(format, LINEAR_SHAPE, 1, team, linear_cpu.CPU),
    ]
    for _ in range(rounds + 1):
        for case, count in zip((cases[0], *cases), (1, rows, rows, 1), strict=True):
            case.run(count)
    together, per_token, linear = cases
    return Grouped(
        rows,
        together.seconds(1),
        together.seconds(rows),
        per_token.seconds(rows),
        rows * per_token.weight_bytes / per_token.seconds(rows) / 1e9,
        linear.weight_bytes / linear.seconds(1) / 1e9,
    )
