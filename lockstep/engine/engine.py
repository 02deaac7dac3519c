"""The engine: requests in, tokens out, one step at a time.

A step has four parts, in this order. Plan (`_prepare`): the Scheduler says how many tokens of which requests run, the
Drafter adds drafts to requests that decode, and each request becomes a Span: its token ids, their positions and pages,
and which rows sample. Compute: the Runner runs all spans in one native call. Take in: the Scheduler notes what is
computed, the sampled token is appended to its request, then the drafts that equal what the model chose; an end token, a
stop string or max_tokens ends the request. Clean up (`_settle_drafts`): pages that were lent to wrong drafts are taken
back, and hidden states go to the MTP head. `async_engine` runs all this in a thread of its own.
"""

import functools
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, SupportsIndex

from lockstep.engine.answer_text import Detokenizer
from lockstep.engine.answer_tokens import append_token
from lockstep.engine.cache.prefix_options import prefix_cache_maker
from lockstep.engine.cache.size import num_pages, page_groups
from lockstep.engine.embedding import Reader
from lockstep.engine.making import RequestMaker
from lockstep.engine.model import Model
from lockstep.engine.options import DEFAULTS, EngineOptions
from lockstep.engine.preparation import prepare
from lockstep.engine.request import Request, SamplingParams, check_single
from lockstep.engine.runner import Limits, Runner, Span
from lockstep.engine.sampling import (
    NothingAllowed,
    Refused,
    are_given_finite,
    is_finite,
    sampled_rows,
    take_given_rows,
    within_rows,
)
from lockstep.engine.scheduler import Scheduler
from lockstep.engine.selfcheck import check as selfcheck
from lockstep.engine.speculation.drafts import DraftCounts, Drafter, Drafts
from lockstep.engine.speculation.heads import made_drafter
from lockstep.native.host import num_cores
from lockstep.ops.attention.kv_cache import PAGE_TOKENS
from lockstep.progress import OnProgress
from lockstep.runtime.threads import Team

PROMPT_ROWS = 64  # rows of a step that may report log-probabilities of prompts; their memory is touched when used


class Planned(NamedTuple):
    """What a request does in a step: how many of its known tokens are computed, and which drafts after them. Its hidden
    states are wanted where the span embeds rows: for its Pool, for its leaves, or (is_observed) for the Drafter."""

    request: Request
    num_tokens: int
    drafts: Drafts
    span: Span
    is_observed: bool


class Engine(RequestMaker):
    """Runs requests of one model. Any thread may call `add`, `cancel` and `step`: a step waits for the one before.

    swaps: ops that another backend computes, see `Model.backend`. eos_ids: the tokens that end an answer; None: those
    of the model's config. new_detokenizer: given a Request, makes the Detokenizer of its answer; None: answers have no
    text. progress: called with ("compiling", kernels that are compiled, kernels that have to be) before the engine
    starts. draft_model: a smaller model of the same vocabulary, which drafts where options.speculate is "model". Raises
    UnfitMachine if a kernel does not give the recorded bits on this CPU.
    """

    def __init__(
        self,
        model: Model,
        options: EngineOptions = DEFAULTS,
        swaps: Mapping[str, str] | None = None,
        eos_ids: frozenset[int] | None = None,
        new_detokenizer: Callable[[Request], Detokenizer] | None = None,
        progress: OnProgress | None = None,
        draft_model: Model | None = None,
    ) -> None:
        if (draft_model is None) == (options.speculate == "model"):
            raise ValueError(f"draft_model: expected a model with speculate 'model' only, got {draft_model!r:.80}")
        super().__init__(model, frozenset(model.config.eos_ids) if eos_ids is None else eos_ids, new_detokenizer)
        num_drafts = options.num_drafts
        model.drafts_by_mtp(options.speculate)  # ValueError for "mtp" where the model has no MTP head
        rows = max(PROMPT_ROWS, options.num_slots * (1 + num_drafts) if num_drafts else 0)
        num_sampled = max(options.num_slots, min(options.max_step_tokens, rows))
        pages = num_pages(model, options, draft_model)
        groups = page_groups(model.recorded, pages, options)
        limits = Limits(options.max_step_tokens, options.num_slots, pages, num_sampled, groups, options.spare_requests)
        self.limits, self.team = limits, Team(options.threads or num_cores())
        self._lock = threading.RLock()  # a step may cancel requests: a logits_mask is a caller's function
        try:
            ready = functools.partial(
                prepare, model=model, draft=draft_model, speculate=options.speculate, progress=progress
            )
            self.runner = Runner(model, self.team, limits, swaps, num_drafts=num_drafts, prepare=ready)
            if options.kv_tokens is not None and options.claims_kv:
                for array in self.runner.caches.values():
                    array.fill(0)  # the system gives memory at the first touch: better now than within a request
            selfcheck.check(self.runner.program, self.runner.executor.backend)
            self.scheduler = Scheduler(limits, prefix_cache_maker(self.runner, model, options))
            drafter = made_drafter(options, self.runner, self.scheduler, model, self.eos_ids, draft_model)
        except MemoryError as error:
            sizes = "max_step_tokens, max_requests, max_context" + (", draft" if num_drafts else "")
            self.team.close()
            raise ValueError(f"{sizes} or kv_tokens: not enough memory ({error})") from None
        except BaseException:
            self.team.close()
            raise
        self.drafter = drafter
        self.num_generated = self.num_not_finite = self.num_drafted = self.num_accepted = 0

    def add(self, prompt_ids: Iterable[SupportsIndex], params: SamplingParams, **options: Any) -> Request:
        """Queues a prompt; returns its Request. options: see `RequestMaker.make`. ValueError if it cannot fit."""
        check_single(params)
        return self.add_samples(prompt_ids, params, **options)[0]

    def add_samples(self, prompt_ids: Iterable[SupportsIndex], params: SamplingParams, **options: Any) -> list[Request]:
        """Queues the `params.n` samples of a prompt, which share its pages; returns their Requests."""
        requests = self.make(prompt_ids, params, **options)
        self.queue(*requests)
        return requests

    def queue(self, *requests: Request) -> None:
        """Queues requests that were made here, but for those that have ended already."""
        with self._lock:
            for request in requests:
                if request.finish_reason is None:
                    self.scheduler.add(request)

    @property
    def reads_predictions(self) -> bool:
        """Whether a prediction is of use: for drafts."""
        return self.drafter is not None

    def check_size(self, request: Request) -> None:
        """ValueError for a request that the KV cache could never hold."""
        self.scheduler.check(request)

    def name_blocks(self, request: Request) -> list[bytes]:
        """The names of a request's whole blocks of prompt tokens; none without a prefix cache."""
        prefix = self.scheduler.prefix
        return prefix.names(request, len(request.prompt_ids) // PAGE_TOKENS) if prefix else []

    def cancel(self, request: Request) -> None:
        """Ends a request at once, unless it has ended; its memory is free for the next step."""
        with self._lock:
            if request.finish_reason is None:
                self._end(request, "cancelled")

    @property
    def has_work(self) -> bool:
        return bool(self.scheduler.running or self.scheduler.waiting)

    def step(self) -> list[Request]:
        """Runs one step; returns the requests that got tokens or their embedding, or failed."""
        with self._lock:
            return self._step()

    def _step(self) -> list[Request]:
        began = time.perf_counter()
        plan, changed = self._prepare()
        if not plan:
            return changed
        sampled = self.runner.step([planned.span for planned in plan])
        tokens, logprobs = sampled[0].tolist(), sampled[1].tolist()
        row = hidden_row = 0
        for planned in plan:
            request = planned.request
            request.num_pending = 0
            self.scheduler.computed(request, planned.num_tokens)
            is_changed = request.num_left == 0 or request.ends_as is not None
            if request.pool is None:
                row = self._take_sampled(planned, row, tokens, logprobs)
            else:
                self._take_hidden(request, request.pool, planned.span, hidden_row)
            if is_changed or request.finish_reason is not None:  # a Reader may end it before its last token
                changed.append(request)
            if request.leaves is not None:
                hidden = self.runner.hidden(hidden_row, len(planned.span.embedded))
                request.leaves.take(request, planned.span, hidden)
            is_unsettled = request.num_lent or planned.is_observed
            if is_unsettled and self.drafter and request.finish_reason is None:
                self._settle_drafts(self.drafter, planned, hidden_row)
            hidden_row += len(planned.span.embedded)
        if self.drafter and not self.drafter.is_untimed:
            num_drafts = sum(len(planned.drafts) for planned in plan)
            self.drafter.time([planned.num_tokens for planned in plan], num_drafts, time.perf_counter() - began)
        return changed

    def _settle_drafts(self, drafter: Drafter, planned: Planned, row: int) -> None:
        """Takes back the pages that were lent to wrong drafts, and gives the Drafter the hidden states of the span's
        tokens that are now known, the first of which is embedded row `row` of the step."""
        request, start = planned.request, planned.span.start
        self.scheduler.settle(request)
        if planned.is_observed:
            drafter.observe(request, start, self.runner.hidden(row, request.num_computed - start))

    def _prepare(self) -> tuple[list[Planned], list[Request]]:
        """The plan of the next step, and the requests that failed while it was made."""
        plan, failed = [], []
        scheduled = within_rows(self.scheduler.schedule(), self.runner.limits.max_sampled)
        drafts_of = self.drafter.draft(scheduled) if self.drafter else {}
        for request, num_tokens in scheduled:
            try:
                if request.finish_reason is None:
                    plan.append(self._planned(request, num_tokens, drafts_of.get(request, Drafts())))
            except Refused as error:
                failed.append(self.fail(request, error))
        # a logits_mask is a caller's function, which may have cancelled requests meanwhile
        return [each for each in plan if each.request.finish_reason is None], failed

    def _planned(self, request: Request, num_tokens: int, drafts: Drafts) -> Planned:
        """A request's next tokens and drafts after them, which are cut where its logits_mask ends."""
        start, end = request.num_computed, request.num_computed + num_tokens
        sampled = sampled_rows(request, start, end, self.eos_ids, self.model.config.vocab_size, drafts.tokens)
        if drafts and len(sampled) <= len(drafts):  # the logits_mask ends before the last draft
            drafts.cut(len(sampled) - 1)
            self.scheduler.settle(request, num_tokens + len(drafts))
        token_ids = request.token_ids(start, end) + drafts.tokens
        drafter, is_observed = self.drafter, False
        embedded: Sequence[int] = ()
        if drafter and drafter.may_need_hidden and drafter.wants_hidden(request):
            embedded, is_observed = range(len(token_ids)), True
        elif request.pool is not None:
            embedded = request.pool.rows(start, end)
        elif request.leaves is not None:
            embedded = tuple(sampled)
        for held in request.pages:
            assert start + len(token_ids) <= held.end * PAGE_TOKENS, (start, len(token_ids), request.pages)
        slot, num_pending = request.running_slot, request.num_pending
        span = Span(token_ids, start, request.pages, slot, sampled, embedded, len(drafts), num_pending)
        return Planned(request, num_tokens, drafts, span, is_observed)

    def _take_sampled(self, planned: Planned, row: int, tokens: list[int], logprobs: list[float]) -> int:
        """Takes in the sampled rows of a span, from row `row` of the step on; returns the row after them."""
        request = planned.request
        row = take_given_rows(request, planned.span, row, self.runner, logprobs)
        if request.num_left:
            if request.ends_as is not None and request.is_reported:
                self._end_as_given(request, request.ends_as)
            return row
        self._take_token(request, tokens[row], logprobs[row], row)
        if self.drafter and planned.drafts:
            self._take_drafts(request, self.drafter, planned.drafts, row, tokens, logprobs)
        return row + 1 + len(planned.drafts)

    def _end_as_given(self, request: Request, reason: str) -> None:
        """Ends a request whose given tokens end its answer, now that their log-probabilities are computed."""
        if are_given_finite(request):
            self._end(request, reason)
        else:
            self._fail_not_finite(request, "logits")

    def _take_drafts(
        self,
        request: Request,
        drafter: Drafter,
        drafts: Drafts,
        row: int,
        tokens: list[int],
        logprobs: list[float],
    ) -> None:
        """Takes in the rows after `row`: one for each draft that is the token that the model chose, up to the first
        that is not, since each row's logits follow from the draft before it."""
        before = request.num_accepted
        for i, draft in enumerate(drafts.tokens, row + 1):
            if request.finish_reason is not None or request.output_ids[-1] != draft:
                break
            request.num_accepted += 1
            request.num_pending += 1
            self.scheduler.computed(request, 1)
            self._take_token(request, tokens[i], logprobs[i], i)
        request.num_drafted += len(drafts)
        self.num_drafted += len(drafts)
        self.num_accepted += request.num_accepted - before
        drafter.note(request, drafts, request.num_accepted - before)

    def _take_hidden(self, request: Request, pool: Reader, span: Span, row: int) -> None:
        """Gives a Reader the hidden states of a span's embedded rows, from embedded row `row` of the step on; ends the
        request with its last token, or before it where the Reader has seen enough."""
        pool.take(self.runner.hidden(row, len(span.embedded)))
        if pool.is_finite and (request.num_left == 0 or pool.has_ended):
            self.finish(request, "embedded")
        elif request.num_left == 0:
            self._fail_not_finite(request, "hidden states")

    def _take_token(self, request: Request, token: int, logprob: float, row: int) -> None:
        """Appends the token that was sampled in row `row`, and ends the request if that is its last token. Fails the
        request if its logits are not finite or its mask allows no token."""
        p = request.params
        top = self.runner.alternatives(row, p.logprobs) if p.logprobs else {}
        if not is_finite(request, logprob, top):
            self._fail_not_finite(request, "logits")
            return
        if request.adjustment and self.runner.is_forbidden(row, token):
            self.fail(request, NothingAllowed())
            return
        self.num_generated += 1
        request.logprobs.append(logprob)
        if p.logprobs:
            request.top_logprobs.append(top)
        reason = append_token(request, token, self.eos_ids, self.new_detokenizer)
        if reason is not None:
            self.finish(request, reason)

    def fail(self, request: Request, error: Refused | str) -> Request:
        """Ends a running request that cannot go on; other requests of the step do not notice. Returns the request.

        error: a Refused, or a sentence that says what was wrong.
        """
        request.error, request.refused = str(error), error if isinstance(error, Refused) else None
        self.finish(request, "error")
        return request

    def _fail_not_finite(self, request: Request, what: str) -> None:
        """Ends a request for which the model computed a NaN or an infinity; the prefix cache forgets its blocks."""
        self.num_not_finite += 1
        request.is_fault = True
        if self.scheduler.prefix:
            self.scheduler.prefix.forget(request)
        self.fail(request, f"the model's {what} are not finite")

    def counts(self) -> dict[str, int]:
        """Counts of events so far, and of requests and pages now, for reports and metrics: {name: number}. Any thread
        may call this."""
        drafts = dict(drafts=self.num_drafted, accepted_drafts=self.num_accepted)
        tokens = dict(generated_tokens=self.num_generated, not_finite=self.num_not_finite)
        return self.scheduler.counts() | tokens | drafts

    def draft_counts(self) -> dict[str, DraftCounts]:
        """How many drafts were computed, and how many were right, by source. Any thread may call this."""
        return dict(self.drafter.counts) if self.drafter else {}

    def finish(self, request: Request, reason: str) -> None:
        """Ends a running request for a reason ("stop", "length", "embedded" or "error")."""
        if request.answer is not None:
            request.answer.finish()
        self._end(request, reason)

    def _end(self, request: Request, reason: str) -> None:
        request.finish_reason = reason
        self.scheduler.remove(request)
        if self.drafter:
            self.drafter.end(request)

    def close(self) -> None:
        """Ends the threads, after all prefixes that are to be kept on disk are written."""
        if self.scheduler.prefix and self.scheduler.prefix.disk is not None:
            self.scheduler.prefix.disk.close()
        self.team.close()
