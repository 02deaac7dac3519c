"""The engine: requests in, tokens out, one step at a time."""
import os
from dataclasses import dataclass

from lockstep.engine import selfcheck
from lockstep.engine.request import Request
from lockstep.engine.runner import Limits, Runner, Span
from lockstep.engine.sampling import Refused, sampled_rows, take_prompt_rows, within_rows
from lockstep.engine.scheduler import Scheduler
from lockstep.ops.kv_cache import PAGE_TOKENS
from lockstep.runtime.threads import Team

PROMPT_ROWS = 64  # rows of a step that may report log-probabilities of prompts; their memory is touched when used
CACHE_BYTES = 2 << 30  # KV pages are reserved up to this by default; memory is only touched when used


def num_cores():
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class EngineOptions:
    """Sizes of an engine. kv_tokens: tokens of KV cache in all; None: what max_requests full contexts need, up to 2 GiB."""

    max_step_tokens: int = 512
    max_requests: int = 16
    kv_tokens: int | None = None
    threads: int | None = None

    def __post_init__(self):
        for name, low in (("max_step_tokens", 1), ("max_requests", 1), ("kv_tokens", PAGE_TOKENS), ("threads", 1)):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < low):
                raise ValueError(f"{name}: expected an integer of at least {low}, got {value!r}")


def num_pages(model, options):
    """Pages of KV cache for these options."""
    a_request = -(-model.max_context // PAGE_TOKENS)
    if options.kv_tokens is not None:
        return -(-options.kv_tokens // PAGE_TOKENS)
    per_page = sum(c.bytes_each for c in model.recorded.caches if c.kind == "pages") or 1
    return max(a_request, min(a_request * options.max_requests, CACHE_BYTES // per_page))


class Engine:
    """Runs requests of one model. Not thread-safe: one thread calls `add`, `cancel` and `step`.

    Raises RuntimeError if a kernel does not give the recorded bits on this CPU.
    """

    def __init__(self, model, options=EngineOptions(), swaps=None, eos_ids=None):
        self.eos_ids = frozenset(model.config.eos_ids) if eos_ids is None else eos_ids
        num_sampled = max(options.max_requests, min(options.max_step_tokens, PROMPT_ROWS))
        limits = Limits(options.max_step_tokens, options.max_requests, num_pages(model, options), num_sampled)
        self.model, self.team = model, Team(options.threads or num_cores())
        self.runner, self.scheduler = Runner(model, self.team, limits, swaps), Scheduler(limits)
        selfcheck.check(self.runner.program, self.runner.executor.backend)
        self._next_id = 0

    def add(self, prompt_ids, params):
        """Queues a prompt; returns its Request. ValueError if it cannot fit."""
        self._check(prompt_ids, params)
        request = Request(self._next_id, list(prompt_ids), params)
        self._next_id += 1
        self.scheduler.add(request)
        return request

    def _check(self, prompt_ids, params):
        limit, vocab = self.model.max_context, self.model.config.vocab_size
        if not prompt_ids:
            raise ValueError("prompt: expected at least one token, got none")
        if min(prompt_ids) < 0 or max(prompt_ids) >= vocab:
            raise ValueError(f"prompt: token ids must be 0 to {vocab - 1}, got {min(prompt_ids)} to {max(prompt_ids)}")
        params.check_vocabulary(vocab)
        if len(prompt_ids) + params.max_tokens > limit:
            raise ValueError(f"prompt of {len(prompt_ids)} tokens plus max_tokens {params.max_tokens} is more than the "
                             f"context of {limit} tokens")

    def cancel(self, request):
        """Ends a request now; its memory is free for the next step."""
        if request.finish_reason is None:
            request.finish_reason = "cancelled"
            self.scheduler.remove(request)

    @property
    def has_work(self):
        return bool(self.scheduler.running or self.scheduler.waiting)

    def step(self):
        """Runs one step; returns the requests that got a token or failed."""
        plan, spans, changed = [], [], []
        for request, count in within_rows(self.scheduler.schedule(), self.runner.limits.max_sampled):
            try:
                spans.append(self._span(request, count))
                plan.append((request, count))
            except Refused as error:
                changed.append(self.fail(request, error))
        if not spans:
            return changed
        tokens, logprobs, _ = self.runner.step(spans)
        row = 0
        for (request, count), span in zip(plan, spans):
            request.num_computed += count
            row = take_prompt_rows(request, span, row, self.runner, logprobs)
            if request.num_left == 0:
                self._take_token(request, int(tokens[row]), float(logprobs[row]), row)
                changed.append(request)
                row += 1
        return changed

    def _span(self, request, count):
        start, end = request.num_computed, request.num_computed + count
        sampled = sampled_rows(request, start, end, self.eos_ids, self.model.config.vocab_size)
        return Span(request.token_ids(start, end), start, request.pages, request.slot, sampled)

    def _take_token(self, request, token, logprob, row):
        p = request.params
        if request.adjustment and self.runner.is_forbidden(row, token):
            self.fail(request, "no token is allowed by logits_mask, logit_bias and min_tokens together")
            return
        request.output_ids.append(token)
        request.logprobs.append(logprob)
        if p.logprobs:
            request.top_logprobs.append(self.runner.alternatives(row, p.logprobs))
        if token in p.stop_token_ids or token in self.eos_ids and not p.ignore_eos:
            request.stop_reason = token
            self.finish(request, "stop")
        elif len(request.output_ids) >= p.max_tokens:
            self.finish(request, "length")

    def fail(self, request, error):
        """Ends a running request that cannot go on; its batch mates do not notice. Returns the request."""
        request.error = str(error)
        self.finish(request, "error")
        return request

    def finish(self, request, reason):
        """Ends a running request for a reason ("stop", "length" or "error")."""
        request.finish_reason = reason
        self.scheduler.remove(request)

    def close(self):
        """Ends the threads."""
        self.team.close()
