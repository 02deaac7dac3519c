"""Measures the speedup by drafts on this machine: times of steps with several rows, and answers with drafts against
answers without.

Drafts come from a recording: the answer is known from a run without drafts, and each draft token is the answer's token
with a chosen probability (the acceptance), else a wrong one. So any acceptance can be measured on any model, and a
draft costs nothing but its row. The two sides of a comparison run in turns, in one process.
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
TURN = 0.05  # seconds of a turn: longer than threads take to wake up
WIDTHS = range(1, MAX_DRAFTS + 2)  # rows of a request in a step: its sampled token and its drafts


class Replay:
    """A source of drafts with a chosen acceptance: a draft is the recorded answer's token with this probability, else a
    wrong token.

    answers: {id of a request: its recorded answer}.
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
    """A `draft_head.Head` that lets another head compute its drafts, for their cost, and returns a Replay's drafts."""

    def __init__(self, head: Head, replay: Replay) -> None:
        self._head, self._replay, self.name = head, replay, head.name
        self.wants_hidden, self.observe, self.ready = head.wants_hidden, head.observe, head.ready
        self.is_behind, self.seconds, self.forget = head.is_behind, head.seconds, head.forget

    @property
    def may_rest(self) -> bool:
        """As of the replaced head."""
        return self._head.may_rest

    def guess(self, wanted: Sequence[tuple[Request, int]], num_planned: int) -> dict[int, list[int]]:
        """As many drafts as the head guesses, with the Replay's tokens."""
        guesses, requests = self._head.guess(wanted, num_planned), {request.id: request for request, _ in wanted}
        return {i: self._replay(requests[i], len(ids), ()).tokens for i, ids in guesses.items() if i in requests}


@dataclass(frozen=True)
class Answered:
    """The results of requests that were answered together. seconds: of the whole run; decode_tokens, decode_seconds,
    steps: after all requests had their first token; drafted, accepted: computed and right drafts."""

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
    """Runs requests of an engine in time slices; only the time of the engine's steps counts."""

    def __init__(self, engine: Engine, requests: Sequence[Request]) -> None:
        self._engine, self._requests = engine, requests
        self.seconds, self._decode_began, self._known, self._steps = 0.0, 0.0, 0, 0

    def advance(self, seconds: float) -> bool:
        """Runs steps for about this time; returns whether the engine has more to do."""
        until = self.seconds + seconds
        while self._engine.has_work and self.seconds < until:
            began = time.perf_counter()
            self._engine.step()
            self.seconds += time.perf_counter() - began
            self._steps += self._known > 0
            if not self._known and all(request.output_ids for request in self._requests):
                self._decode_began = self.seconds
                self._known = sum(len(request.output_ids) for request in self._requests)
        return self._engine.has_work

    def answered(self) -> Answered:
        """The results, once all requests have ended."""
        answers = [request.output_ids for request in self._requests]
        return Answered(
            answers,
            seconds=self.seconds,
            decode_tokens=sum(map(len, answers)) - self._known,
            decode_seconds=self.seconds - self._decode_began,
            steps=self._steps,
            drafted=sum(request.num_drafted for request in self._requests),
            accepted=sum(request.num_accepted for request in self._requests),
        )


def in_turns(*courses: Course) -> list[Answered]:
    """Runs courses to their ends in turns of TURN seconds, so that a slow moment of the machine slows all of them."""
    left = list(courses)
    while left:
        left = [course for course in left if course.advance(TURN)]
    return [course.answered() for course in courses]


@dataclass(frozen=True)
class Setting:
    """A run with drafts, to compare with one without. requests: their number; acceptance: from 0 to 1; draft: drafts of
    a request in a step, None for as many as pay."""

    requests: int
    acceptance: float
    draft: int | None


@dataclass(frozen=True)
class Plan:
    """All that is measured.

    acceptances: from 0 to 1. requests: numbers of requests that run together. contexts: context lengths of steps.
    prompt, tokens: tokens of each prompt and of each answer. rounds: of each comparison.
    """

    acceptances: tuple[float, ...]
    requests: tuple[int, ...]
    contexts: tuple[int, ...]
    prompt: int
    tokens: int
    rounds: int

    @property
    def longest(self) -> int:
        """The most tokens of a request."""
        return max(self.prompt + self.tokens, *self.contexts) + MAX_DRAFTS + 1

    @property
    def kv_tokens(self) -> int:
        """Tokens of KV cache that all requests need, drafts included, so that none has to wait."""
        return max(self.requests) * (self.prompt + self.tokens + MAX_DRAFTS + PAGE_TOKENS) + self.longest + PAGE_TOKENS


class Bench:
    """An engine without drafts and one with drafts, of the same weights.

    plain: the engine without drafts, which no other thread may use meanwhile. options: of the engine with drafts. An
    MTP head of that engine computes all drafts before recorded ones replace them.
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
        """A Course of answers of `tokens` tokens without drafts."""
        return Course(self.plain, self._add(self.plain, prompts, tokens))

    def drafted(self, prompts: Sequence[list[int]], recorded: Answered, setting: Setting, seed: int) -> Course:
        """A Course of the recorded answers with drafts, with a new Drafter, which has learnt no acceptance or costs."""
        engine, tokens = self.drafting, len(recorded.answers[0])
        requests = self._add(engine, prompts, tokens)
        answers = {request.id: answer for request, answer in zip(requests, recorded.answers, strict=True)}
        replay = Replay(answers, setting.acceptance, self.model.config.vocab_size, seed)
        source, head = (None, ReplayedHead(self._head, replay)) if self._head else (replay, None)
        engine.drafter = Drafter(engine.scheduler, source, setting.draft, engine.eos_ids, head)
        return Course(engine, requests)

    def seconds_of_guess(self, requests: int) -> float:
        """Seconds that the head, which must have drafted before, takes for one more draft of each of the requests."""
        return self._head.seconds(requests) if self._head else 0.0

    @staticmethod
    def _add(engine: Engine, prompts: Sequence[list[int]], tokens: int) -> list[Request]:
        return [engine.add(ids, SamplingParams(max_tokens=tokens, ignore_eos=True)) for ids in prompts]


@dataclass(frozen=True)
class Compared:
    """A Setting against no drafts.

    decode, whole: median ratios of speed, of decode and of whole runs, above 1 where drafts are faster; spread: the
    lowest and highest ratio of decode; tokens_per_second: of decode without drafts; drafted, accepted: computed and
    right drafts of all runs; tokens_per_step: of a request in a step; differing: the number of answers that differ from
    the one without drafts, 0 unless there is a fault.
    """

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
    """Runs settings, which all have the same number of requests, each in turns with a run without drafts."""
    prompts = bench.prompts(settings[0].requests, prompt)
    [recorded] = in_turns(bench.without(prompts, tokens))
    runs: dict[Setting, list[list[Answered]]] = {setting: [] for setting in settings}
    for i in range(rounds):
        for setting in settings:
            pair = bench.without(prompts, tokens), bench.drafted(prompts, recorded, setting, i)
            runs[setting].append(in_turns(*pair))
    return [_compared(setting, pairs, recorded) for setting, pairs in runs.items()]


def answers(bench: Bench, plan: Plan, requests: int) -> list[Compared]:
    """Compares each acceptance twice: with the best fixed number of drafts, and with as many as pay.

    The best fixed number follows from the times of steps (and of the head's drafts), which are measured first. Where
    drafts do not pay, only the second comparison is run.
    """
    seconds = step_seconds(bench, requests, plan.prompt, range(1, MOST_BY_ITSELF + 2), 3 * plan.rounds)
    compare(bench, [Setting(requests, 1.0, 2)], plan.prompt, 8, 1)  # so that the head has drafted, and knows its time
    of_guess, settings = bench.seconds_of_guess(requests), []
    for acceptance in plan.acceptances:
        best = best_draft(acceptance, {width: step + (width - 1) * of_guess for width, step in seconds.items()})
        settings += [Setting(requests, acceptance, draft) for draft in ([best] if best else []) + [None]]
    return compare(bench, settings, plan.prompt, plan.tokens, plan.rounds)


def _compared(setting: Setting, pairs: Sequence[Sequence[Answered]], recorded: Answered) -> Compared:
    decode = [drafted.tokens_per_second / without.tokens_per_second for without, drafted in pairs]
    runs = [drafted for _, drafted in pairs]
    return Compared(
        setting=setting,
        decode=statistics.median(decode),
        spread=(min(decode), max(decode)),
        whole=statistics.median(without.seconds / drafted.seconds for without, drafted in pairs),
        tokens_per_second=statistics.median(without.tokens_per_second for without, _ in pairs),
        drafted=sum(run.drafted for run in runs),
        accepted=sum(run.accepted for run in runs),
        tokens_per_step=sum(run.decode_tokens for run in runs) / sum(run.steps for run in runs) / setting.requests,
        differing=sum(
            answer != known for run in runs for answer, known in zip(run.answers, recorded.answers, strict=True)
        ),
    )


# ---------------------------------------------------------------- steps


def step_seconds(bench: Bench, requests: int, context: int, widths: Sequence[int], rounds: int) -> dict[int, float]:
    """{rows of each request: seconds of a step after `context` tokens}: the lower quartile of rounds, run in turns.

    Width 1 is a step without drafts. In wider steps half as many records as drafts are pending (see Span).
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
    num_pages = -(-(context + MAX_DRAFTS + 1) // PAGE_TOKENS)
    pages = everywhere(range(slot * num_pages, (slot + 1) * num_pages))
    sampled = {i: dict(GREEDY, position=context + i + 1) for i in range(len(ids))}
    num_drafts = len(ids) - 1
    return Span(ids, context, pages, slot, sampled, num_drafts=num_drafts, num_pending=num_drafts // 2)


def _timed(runner: Runner, spans: Sequence[Span]) -> float:
    began = time.perf_counter()
    runner.step(spans)
    return time.perf_counter() - began


def best_draft(acceptance: float, seconds: Mapping[int, float]) -> int:
    """The fixed number of drafts with the most tokens per second; 0: no drafts. seconds: {width: time of a step}."""
    if not acceptance:
        return 0
    tokens = {width: sum(acceptance**i for i in range(width)) for width in seconds}
    return max(seconds, key=lambda width: tokens[width] / seconds[width]) - 1


# ---------------------------------------------------------------- a layer that is read once for all rows


@dataclass(frozen=True)
class Grouped:
    """`grouped_linear` at the shape of DeepSeek-V4's attention output.

    one_row: seconds of one row; together: of `rows` rows, which share one read of the weights; per_token: of `rows`
    rows by the per-token kernel, which reads the weights for every row; per_token_gb: GB/s of the latter; linear_gb:
    GB/s of a `linear` with one row.
    """

    rows: int
    one_row: float
    together: float
    per_token: float
    per_token_gb: float
    linear_gb: float


def grouped(team: Team, rounds: int, rows: int = 8, format: str = "q8_0") -> Grouped:
    """Measures a Grouped: its layers run in turns."""
    cases = [
        Case(format, GROUPED_SHAPE, rows, team, linear_cpu.CPU),
        Case(format, GROUPED_SHAPE, rows, team, linear_cpu.PER_TOKEN),
        Case(format, LINEAR_SHAPE, 1, team, linear_cpu.CPU),
    ]
    for _ in range(rounds + 1):
        for case, num_rows in zip((cases[0], *cases), (1, rows, rows, 1), strict=True):
            case.run(num_rows)
    together, per_token, linear = cases
    return Grouped(
        rows,
        together.seconds(1),
        together.seconds(rows),
        per_token.seconds(rows),
        rows * per_token.weight_bytes / per_token.seconds(rows) / 1e9,
        linear.weight_bytes / linear.seconds(1) / 1e9,
    )
