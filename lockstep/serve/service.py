"""What the routes share: the model and its engine, what a client may ask for, who is being answered, and metrics."""

import asyncio
import concurrent.futures
import contextlib
import hashlib
import json
import logging
import math
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from lockstep.engine.async_engine import AsyncEngine, EngineStopped
from lockstep.engine.cache.prefix import model_identity
from lockstep.engine.selfcheck.check import NUMERICS
from lockstep.engine.speculation.drafts import DraftCounts
from lockstep.ops.attention.kv_cache import PAGE_TOKENS
from lockstep.serve.errors import ApiError, not_allowed
from lockstep.serve.generation import Job
from lockstep.serve.limits import Limits
from lockstep.serve.metrics import Metrics
from lockstep.text.conversation import ChatModel
from lockstep.text.job_process import Busy
from lockstep.text.tokenizer.tokenizer import Tokenizer

if TYPE_CHECKING:
    from lockstep.llm import LLM

T = TypeVar("T")
WORKERS = 2  # threads for tokenizers, templates and grammars
REFUSED = {"loading": "the model is still loading", "draining": "the server is shutting down"}
LONGEST_RETRY = 60
CLOSE_SECONDS = 20  # what is to be kept on disk is written in them
log = logging.getLogger("lockstep.http")


class Service:
    """The state behind a server's routes. All but `offload`ed functions run on the event loop's thread.

    model_name: what clients call the model; names: what else they may call it, or None for anything. share_prefixes:
    whether one key's requests may use what another's computed for the same first tokens, which tells whether somebody
    asked the same. state: "loading" until `open`, then "ready", "draining" after `drain`, and "closed". llm, engine (an
    AsyncEngine), tokenizer and chat (a ChatModel) are there from `open` on.
    """

    def __init__(
        self,
        model_name: str,
        limits: Limits = Limits(),
        api_keys: Iterable[str] = (),
        names: Sequence[str] | None = (),
        share_prefixes: bool = False,
    ) -> None:
        self.model_name, self.limits = model_name, limits
        self.names = None if names is None else [model_name, *(name for name in names if name != model_name)]
        self.api_keys = list(dict.fromkeys(key.encode() for key in api_keys))
        self.shares_prefixes = share_prefixes or len(self.api_keys) < 2
        self.state, self.created = "loading", int(time.time())
        self.llm: LLM | None = None
        self.engine: AsyncEngine | None = None
        self.tokenizer: Tokenizer | None = None
        self.chat: ChatModel | None = None
        self._fingerprint: str | None = None
        self.jobs: set[Job] = set()
        self.num_sequences, self.num_queued_tokens, self.num_bytes = 0, 0, 0
        self.num_logprobs = 0  # the most that the answers in work may have
        self.metrics, self.num_faults, self._has_logged_stop = Metrics(self), 0, False
        self._workers = concurrent.futures.ThreadPoolExecutor(WORKERS, "lockstep worker")
        self._num_offloaded, self._seconds_each = 0, 1.0

    # ------------------------------------------------------------ life

    def open(self, llm: "LLM") -> None:
        """Begins to answer with an LLM, which belongs to the service from then on."""
        self.llm = llm
        self.tokenizer = llm.tokenizer if llm.has_tokenizer else None
        if llm.has_tokenizer:
            self.chat = ChatModel(llm.tokenizer, llm.engine.eos_ids, llm.vocab_size, self.max_context)
        self.engine = AsyncEngine(llm.engine)
        self.state = "ready"

    @property
    def loaded(self) -> "LLM":
        """The LLM, where it is there: requests are read from `open` on."""
        assert self.llm is not None, "requests are read from `open` on"
        return self.llm

    @property
    def fingerprint(self) -> str | None:
        """The system_fingerprint of answers; None as long as the model's content hash is not known."""
        if self._fingerprint is None and self.llm is not None:
            with contextlib.suppress(OSError, ValueError):  # a file that changed while it was loaded is never named
                self._fingerprint = system_fingerprint(self.llm) if self.llm.content.known else None
        return self._fingerprint

    @property
    def fingerprint_field(self) -> dict[str, str]:
        """What an answer says of it: nothing, as long as it is not known."""
        return {} if self.fingerprint is None else {"system_fingerprint": self.fingerprint}

    def drain(self) -> None:
        """Refuses new requests from now on; those that run go on."""
        if self.state != "closed":
            self.state = "draining"

    def cut_off(self) -> None:
        """Ends what is still being answered, with an error that says why."""
        for job in list(self.jobs):
            job.end(ApiError(503, "the server shut down before this answer was complete", code="shutting_down"))

    def close(self) -> None:
        """Ends the engine and the workers. A step that does not end is not waited for."""
        self.state = "closed"
        self._workers.shutdown(wait=False, cancel_futures=True)
        if self.engine is not None:
            closing = threading.Thread(target=self.engine.close, daemon=True)
            closing.start()
            closing.join(CLOSE_SECONDS)

    @property
    def trouble(self) -> str | None:
        """Why only a restart is likely to help, or None."""
        if self.num_faults >= self.limits.max_faults:
            return f"{self.num_faults} requests in a row failed, as the model's logits are not finite"
        return self.engine_trouble

    @property
    def engine_trouble(self) -> str | None:
        """Why the engine does not work, or None."""
        if self.engine is None:
            return None
        if self.engine.error is not None:
            return "the engine stopped, the log says why"
        if self.engine.seconds_in_step > self.limits.stuck_seconds:
            return f"the engine is stuck: one step has taken {self.engine.seconds_in_step:.0f} s"
        return None

    # ------------------------------------------------------------ admission

    @property
    def num_open(self) -> int:
        """Requests that are being answered."""
        return len(self.jobs)

    def check_open(self) -> None:
        """ApiError 503 unless requests are answered, 429 if no sequence more may wait. Before anything is read."""
        trouble = self.engine_trouble
        if self.state in REFUSED or self.state == "closed" or trouble:
            reason = self.state if self.state != "ready" else "engine"
            self.metrics.refused[reason] += 1
            raise ApiError(
                503,
                REFUSED.get(self.state, trouble or "the server is closed"),
                code=reason,
                retry_after=1 if reason == "loading" else None,
            )
        if self.num_sequences >= self.most_sequences:
            raise self.full("queue_full", f"{self.num_sequences} sequences are being answered or wait")

    @property
    def max_context(self) -> int:
        """Tokens that a prompt and its answer may have: the model's context, or the KV cache where that is smaller."""
        return min(self.loaded.max_context, self.loaded.engine.limits.num_pages * PAGE_TOKENS)

    @property
    def max_counted(self) -> int:
        """Tokens of a text that is only counted, or of which a part is kept, and so may be longer than the context."""
        return max(self.max_context, self.limits.max_counted_tokens)

    @property
    def most_sequences(self) -> int:
        """Sequences that may run and wait together."""
        return self.loaded.max_requests + self.limits.max_queued

    def check_loaded(self) -> None:
        """ApiError 503 while the model is loading."""
        if self.llm is None:
            raise ApiError(503, REFUSED["loading"], code="loading", retry_after=1)

    def check_workers(self) -> None:
        """ApiError 429 if too much waits for a worker. For routes that are not admitted as sequences are."""
        if self._num_offloaded >= self.limits.max_offloaded:
            raise self.full("workers_busy", f"{self._num_offloaded} requests wait to be prepared")

    def admit(self, job: Job, num_sequences: int, num_tokens: int, num_logprobs: int = 0) -> None:
        """Counts a request's sequences, prompt tokens and log-probabilities from now on. ApiError 429 if they are too
        many beside those of others."""
        others = self.num_sequences - job.num_sequences
        if others and others + num_sequences > self.most_sequences:
            raise self.full("queue_full", f"{others} sequences are being answered or wait, of {self.most_sequences}")
        if self.num_queued_tokens and self.num_queued_tokens + num_tokens > self.limits.max_queued_tokens:
            raise self.full(
                "queue_tokens_full", f"{self.num_queued_tokens} prompt tokens wait, of {self.limits.max_queued_tokens}"
            )
        if self.num_logprobs and num_logprobs and self.num_logprobs + num_logprobs > self.limits.max_pending_logprobs:
            raise self.full(
                "answers_full",
                f"{self.num_logprobs} log-probabilities are asked for, of {self.limits.max_pending_logprobs}",
            )
        self.num_sequences += num_sequences - job.num_sequences
        self.num_queued_tokens += num_tokens
        self.num_logprobs += num_logprobs
        job.num_sequences, job.num_queued_tokens, job.num_logprobs = num_sequences, num_tokens, num_logprobs

    def salt(self, tenant: str, cache_salt: str) -> str:
        """What a request of a tenant's must have in common with another to share prefixes, in memory and on disk."""
        return cache_salt if self.shares_prefixes else f"{tenant}:{cache_salt}"

    def full(self, reason: str, message: str) -> ApiError:
        """ApiError 429, counted under its reason, which also is its code."""
        self.metrics.refused[reason] += 1
        return ApiError(429, f"the server is busy: {message}", code=reason, retry_after=self._retry_after())

    def _retry_after(self) -> int:
        """Seconds until what waits now will be answered, judged by how long answers took."""
        slots = self.most_sequences - self.limits.max_queued
        return max(1, min(LONGEST_RETRY, math.ceil(self._seconds_each * self.num_sequences / slots)))

    def enter(self, job: Job) -> None:
        """A request begins to be answered: it counts as one sequence until `admit` knows better."""
        self.jobs.add(job)
        self.num_sequences += job.num_sequences

    def leave(self, job: Job) -> None:
        """A request's answer ended, however it did."""
        self.jobs.discard(job)
        self.num_sequences -= job.num_sequences
        self.num_queued_tokens -= job.num_queued_tokens
        self.num_logprobs -= job.num_logprobs
        if job.streams:
            self._seconds_each += 0.1 * (job.seconds - self._seconds_each)

    def note_end(self, is_fault: bool) -> None:
        """A request's sequences ended. is_fault: the model gave no finite numbers for one of them.

        Faults in a row make `trouble`; requests are still answered, and one that goes well ends it.
        """
        self.num_faults = self.num_faults + 1 if is_fault else 0

    # ------------------------------------------------------------ work beside the event loop

    async def offload(self, function: Callable[..., T], *args: Any) -> T:
        """Runs a function in a worker thread; returns what it does.

        A ValueError becomes ApiError 400, Busy a 429. ApiError 503 if it takes too long: it then goes on without
        anybody waiting for it, so it must be bounded in itself, too.
        """
        self._num_offloaded += 1
        running = asyncio.get_running_loop().run_in_executor(self._workers, function, *args)
        running.add_done_callback(self._offloaded)
        try:
            async with asyncio.timeout(self.limits.offload_seconds):
                return await asyncio.shield(running)
        except ValueError as error:
            raise not_allowed(error) from None
        except Busy as error:
            raise self.full(error.code, str(error)) from None
        except TimeoutError:
            running.cancel()
            raise ApiError(
                503, f"preparing the request took more than {self.limits.offload_seconds:g} s", code="timeout"
            ) from None

    def _offloaded(self, running: asyncio.Future[Any]) -> None:
        self._num_offloaded -= 1
        if not running.cancelled():
            running.exception()  # marks it as seen, where nobody waited any more

    # ------------------------------------------------------------ reports

    def counts(self) -> dict[str, int]:
        """Counts of the engine: {name: number}."""
        return {} if self.llm is None else self.llm.engine.counts()

    def draft_counts(self) -> dict[str, DraftCounts]:
        """How many drafts the engine made, and how many were right, by source."""
        return {} if self.llm is None else self.llm.engine.draft_counts()

    def explain(self, error: BaseException) -> ApiError:
        """Any exception as the ApiError that a client may see; what is the server's own fault is logged."""
        if isinstance(error, ApiError):
            return error
        if isinstance(error, EngineStopped):
            self._log_stop(error.__cause__)
            return ApiError(503, "the engine stopped before this answer was complete", code="engine")
        log.error("a request failed", exc_info=error)
        return ApiError(500, "the server failed to answer this request; its log says why", code="internal_error")

    def _log_stop(self, cause: BaseException | None) -> None:
        """Says once why the engine stopped; a service that was closed is no news."""
        if cause is not None and not self._has_logged_stop:
            self._has_logged_stop = True
            log.error("the engine stopped", exc_info=cause)

    def name_in_answers(self, name: str | None) -> str:
        """The model's name in an answer to a request for `name`; None and "" ask for the one model that there is.

        ApiError 404 for a name that the model does not answer to.
        """
        if not name:
            return self.model_name
        if self.names is not None and name not in self.names:
            raise ApiError(
                404,
                f"model: there is no {name[:200]!r} here, only {', '.join(map(repr, self.names))}",
                "model",
                "model_not_found",
            )
        return name


def system_fingerprint(llm: "LLM") -> str:
    """Names all that an answer depends on besides the request: arithmetic, weights, tokenizer, template and defaults.

    Waits for the model's content hash.
    """
    known = [
        hashlib.sha256(model_identity(llm.model, NUMERICS)).hexdigest(),
        llm.content.wait(),
        sorted(llm.engine.eos_ids),
        sorted(llm.sampling_defaults.items()),
    ]
    if llm.has_tokenizer:
        tokenizer = llm.tokenizer
        known += [tokenizer.backend.to_str(), dict(tokenizer.chat_templates), dict(tokenizer.special_tokens)]
    with contextlib.suppress(ValueError):  # one that is not supported makes no embeddings unless they ask for another
        known.append(llm.pooling)
    return "fp_" + hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:16]
