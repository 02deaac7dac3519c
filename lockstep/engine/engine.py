"""The engine: requests in, tokens out, one step at a time."""
import os
from dataclasses import dataclass

import numpy as np

from lockstep.engine import selfcheck
from lockstep.engine.request import Request
from lockstep.engine.runner import Limits, Runner, Span
from lockstep.engine.scheduler import Scheduler
from lockstep.ops.kv_cache import PAGE_TOKENS
from lockstep.runtime.threads import Team

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
        limits = Limits(options.max_step_tokens, options.max_requests, num_pages(model, options), options.max_requests)
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
        """Runs one step; returns the requests that got a token."""
        plan = self.scheduler.schedule()
        spans = [self._span(request, count) for request, count in plan]
        tokens, logprobs, logits = self.runner.step(spans)
        sampled, row = [], 0
        for (request, count), span in zip(plan, spans):
            request.num_computed += count
            if span.sampled:
                self._take_token(request, int(tokens[row]), float(logprobs[row]), logits[row])
                sampled.append(request)
                row += 1
        return sampled

    def _span(self, request, count):
        start, end = request.num_computed, request.num_computed + count
        sampled = {}
        if end == request.num_tokens:
            p = request.params
            # fields by name: the record has reserved ones
            sampled[count - 1] = dict(temperature=p.temperature, top_p=p.top_p, min_p=p.min_p, top_k=p.top_k, seed=p.seed,
                                      position=end)
        return Span(request.token_ids(start, end), start, request.pages, request.slot, sampled)

    def _take_token(self, request, token, logprob, logits):
        request.output_ids.append(token)
        request.logprobs.append(logprob)
        if request.params.logprobs:
            request.top_logprobs.append(top_logprobs(logits, request.params.logprobs))
        ends = token in self.eos_ids and not request.params.ignore_eos
        if ends or token in request.params.stop_token_ids:
            self.finish(request, "stop")
        elif len(request.output_ids) >= request.params.max_tokens:
            self.finish(request, "length")

    def finish(self, request, reason):
        """Ends a running request for a reason ("stop" or "length")."""
        request.finish_reason = reason
        self.scheduler.remove(request)

    def close(self):
        """Ends the threads."""
        self.team.close()


def top_logprobs(logits, count):
    """The `count` most probable tokens and their log-probabilities, for display: {token id: logprob}, best first."""
    order = np.lexsort((np.arange(len(logits)), -logits))[:count]
    wide = logits.astype(np.float64)
    normal = wide.max() + np.log(np.exp(wide - wide.max()).sum())
    return {int(i): float(wide[i] - normal) for i in order}
