"""The state that all routes share: the model and its engine, limits, running generations, and metrics."""

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

from lockstep.engine.async_engine import StreamEngine
from lockstep.engine.cache.prefix import model_identity
from lockstep.engine.selfcheck.check import NUMERICS
from lockstep.engine.speculation.drafts import DraftCounts
from lockstep.engine.token_stream import EngineStopped, Frames
from lockstep.ops.attention.kv_cache import PAGE_TOKENS
from lockstep.replicas.verifying import ReplicasLost
from lockstep.serve.errors import ApiError, not_allowed
from lockstep.serve.generation import Generation, frame_seconds
from lockstep.serve.limits import Limits
from lockstep.serve.metrics import Metrics
from lockstep.serve.receipts.desk import ReceiptDesk
from lockstep.serve.request_log import RequestLog
from lockstep.text.conversation import ChatModel
from lockstep.text.job_process import Busy
from lockstep.text.tokenizer.tokenizer import Tokenizer

if TYPE_CHECKING:
    from lockstep.loading import LoadedModel

T = TypeVar("T")
WORKERS = 2  # threads for tokenizers, templates and grammars
REFUSED = {"loading": "the model is still loading", "draining": "the server is shutting down"}
LOADING_RETRY, LONGEST_RETRY = 1, 60  # seconds
CLOSE_SECONDS = 20  # for the engine to write its prefix cache to disk
log = logging.getLogger("lockstep.http")


class Service:
    """The state behind a server's routes. All but `offload`ed functions run on the event loop's thread.

    model_name: the model's name in answers; names: further names that requests may use, or None for any name.
    share_prefixes: whether requests of one API key may use prefixes that another key's requests computed, whose timing
    tells that somebody asked the same. is_quiet: see RequestLog. state: "loading" until `open`, then "ready",
    "draining" after `drain`, and "closed". llm, engine (a StreamEngine), tokenizer and chat (a ChatModel) are None
    before `open`.
    """

    def __init__(
        self,
        model_name: str,
        limits: Limits = Limits(),
        api_keys: Iterable[str] = (),
        names: Sequence[str] | None = (),
        share_prefixes: bool = False,
        is_quiet: bool = False,
    ) -> None:
        self.model_name, self.limits = model_name, limits
        self.names = None if names is None else [model_name, *(name for name in names if name != model_name)]
        self.api_keys = list(dict.fromkeys(key.encode() for key in api_keys))
        self.shares_prefixes = share_prefixes or len(self.api_keys) < 2
        self.state, self.created = "loading", int(time.time())
        self.has_failed = False  # whether nothing could be answered any more when it was closed
        self.llm: LoadedModel | None = None
        self.engine: StreamEngine | None = None
        self.tokenizer: Tokenizer | None = None
        self.chat: ChatModel | None = None
        self._fingerprint: str | None = None
        self.generations: set[Generation] = set()
        self.frames = Frames(lambda num_tokens: frame_seconds(self.num_open, num_tokens))  # between events of streams
        self.num_sequences, self.num_queued_tokens, self.num_bytes = 0, 0, 0
        self.num_logprobs = 0  # the most log-probabilities that the running answers may have, together
        self.metrics, self.num_faults, self._has_logged_stop = Metrics(self), 0, False
        self.request_log = RequestLog(self.metrics, self.counts, is_quiet)
        self.receipts = ReceiptDesk(self)  # of a server with a key, or a file for receipts, another
        self._workers = concurrent.futures.ThreadPoolExecutor(WORKERS, "lockstep worker")
        self._num_offloaded, self._seconds_each = 0, 1.0

    # ------------------------------------------------------------ life

    def open(self, llm: "LoadedModel") -> None:
        """Begins to answer requests with an LLM, which `close` closes."""
        self.llm = llm
        self.tokenizer = llm.tokenizer if llm.has_tokenizer else None
        if llm.has_tokenizer:
            self.chat = ChatModel(llm.tokenizer, llm.engine.eos_ids, llm.vocab_size, self.max_context)
        self.engine = llm.stream_engine()
        self.state = "ready"

    @property
    def loaded(self) -> "LoadedModel":
        """The LLM, for code that runs after `open` only."""
        assert self.llm is not None, "requests are read from `open` on"
        return self.llm

    @property
    def vocab_size(self) -> int:
        """Token ids of the model are below it."""
        return self.loaded.vocab_size

    @property
    def hidden_size(self) -> int:
        """Numbers of an embedding."""
        return self.loaded.hidden_size

    @property
    def pooling(self) -> str:
        """The model's own pooling for embeddings. ValueError where it asks for one that is not supported."""
        return self.loaded.pooling

    @property
    def eos_ids(self) -> frozenset[int]:
        """Token ids that end an answer."""
        return self.loaded.engine.eos_ids

    @property
    def sampling_defaults(self) -> dict[str, Any]:
        """The model's defaults for sampling fields that a request leaves out."""
        return self.loaded.sampling_defaults

    @property
    def fingerprint(self) -> str | None:
        """The system_fingerprint of answers; None as long as the model's content hash is not known."""
        if self._fingerprint is None and self.llm is not None:
            with contextlib.suppress(OSError, ValueError):  # a file that changed while it was loaded is never named
                self._fingerprint = system_fingerprint(self.llm) if self.llm.content.known else None
        return self._fingerprint

    @property
    def fingerprint_field(self) -> dict[str, str]:
        """The fingerprint as a field of an answer, which is left out as long as it is not known."""
        return {} if self.fingerprint is None else {"system_fingerprint": self.fingerprint}

    def drain(self) -> None:
        """Refuses new requests from now on; running ones continue."""
        if self.state != "closed":
            self.state = "draining"

    def cut_off(self) -> None:
        """Ends all running answers with an error that says why."""
        for generation in list(self.generations):
            generation.end(ApiError(503, "the server shut down before this answer was complete", code="shutting_down"))

    def close(self) -> None:
        """Ends the engine and the workers. A step that does not end is not waited for."""
        self.has_failed |= self.state != "closed" and self.engine_trouble is not None  # closing is no failure
        self.state = "closed"
        self._workers.shutdown(wait=False, cancel_futures=True)
        self.receipts.close()
        if self.engine is not None:
            closing = threading.Thread(target=self.engine.close, daemon=True)
            closing.start()
            closing.join(CLOSE_SECONDS)

    @property
    def trouble(self) -> str | None:
        """Why only a restart of the server is likely to help, or None."""
        if self.num_faults >= self.limits.max_faults:
            return f"{self.num_faults} requests in a row failed, as the model's logits are not finite"
        return self.engine_trouble

    @property
    def engine_trouble(self) -> str | None:
        """Why the engine does not work, or None."""
        if self.engine is None:
            return None
        if self._is_lost:
            return str(self.engine.error)
        if self.engine.error is not None:
            return "the engine stopped, the log says why"
        if self.engine.seconds_in_step > self.limits.stuck_seconds:
            return f"the engine is stuck: one step has taken {self.engine.seconds_in_step:.0f} s"
        return None

    @property
    def _is_lost(self) -> bool:
        return self.engine is not None and isinstance(self.engine.error, ReplicasLost)

    @property
    def readiness(self) -> tuple[str, str | None, int | None]:
        """("ready", None, None), or else the state in which no request should come, why, and after how many seconds to
        ask again; None where waiting does not help."""
        if self.trouble is not None:
            return "failed", self.trouble, None
        if self.state != "ready":
            return self.state, REFUSED.get(self.state), LOADING_RETRY if self.state == "loading" else None
        if self.engine is not None and not self.engine.is_ready:
            return "starting", "no replica is ready, fresh ones are started", LOADING_RETRY
        if self.num_sequences >= self.max_open_sequences:
            return "full", f"{self.num_sequences} sequences are being answered or wait", self._retry_after()
        return "ready", None, None

    # ------------------------------------------------------------ admission

    @property
    def num_open(self) -> int:
        """The number of requests that are being answered."""
        return len(self.generations)

    def check_open(self) -> None:
        """ApiError 503 unless the service is ready, 429 if no more sequences may wait. Called before a body is read."""
        trouble = self.engine_trouble
        if self.state in REFUSED or self.state == "closed" or trouble:
            reason = self.state if self.state != "ready" else "replicas_lost" if self._is_lost else "engine"
            self.metrics.refused[reason] += 1
            words, retry = REFUSED.get(self.state, trouble or "the server is closed"), LOADING_RETRY
            raise ApiError(503, words, code=reason, retry_after=retry if reason == "loading" else None)
        if self.num_sequences >= self.max_open_sequences:
            raise self.too_busy("queue_full", f"{self.num_sequences} sequences are being answered or wait")

    @property
    def max_context(self) -> int:
        """The most tokens of a prompt and its answer: the model's context, or the KV cache where that is smaller."""
        return min(self.loaded.max_context, self.loaded.engine.limits.num_pages * PAGE_TOKENS)

    @property
    def max_counted(self) -> int:
        """The most tokens of a text that is only counted or is truncated, and may be longer than the context."""
        return max(self.max_context, self.limits.max_counted_tokens)

    @property
    def max_open_sequences(self) -> int:
        """The most sequences that may run and wait together."""
        return self.loaded.max_requests + self.limits.max_queued

    def check_loaded(self) -> None:
        """ApiError 503 while the model is loading."""
        if self.llm is None:
            raise ApiError(503, REFUSED["loading"], code="loading", retry_after=LOADING_RETRY)

    def check_content(self) -> None:
        """ApiError 503 as long as the model's content hash, which receipts name, is not known."""
        if self.loaded.content.known is None:
            why = "receipts name the model by the hash of its files, which are still being read"
            raise ApiError(503, why, code="loading", retry_after=LOADING_RETRY)

    def check_workers(self) -> None:
        """ApiError 429 if too many calls wait for a worker thread. For routes that generate no sequences."""
        if self._num_offloaded >= self.limits.max_offloaded:
            raise self.too_busy("workers_busy", f"{self._num_offloaded} requests wait to be prepared")

    def admit(self, generation: Generation, num_sequences: int, num_tokens: int, num_logprobs: int = 0) -> None:
        """Counts a request's sequences, prompt tokens and log-probabilities from now on. ApiError 429 if they are too
        many together with those of the other requests."""
        others = self.num_sequences - generation.num_sequences
        if others and others + num_sequences > self.max_open_sequences:
            raise self.too_busy(
                "queue_full", f"{others} sequences are being answered or wait, of {self.max_open_sequences}"
            )
        if self.num_queued_tokens and self.num_queued_tokens + num_tokens > self.limits.max_queued_tokens:
            raise self.too_busy(
                "queue_tokens_full", f"{self.num_queued_tokens} prompt tokens wait, of {self.limits.max_queued_tokens}"
            )
        if self.num_logprobs and num_logprobs and self.num_logprobs + num_logprobs > self.limits.max_pending_logprobs:
            raise self.too_busy(
                "answers_full",
                f"{self.num_logprobs} log-probabilities are asked for, of {self.limits.max_pending_logprobs}",
            )
        self.num_sequences += num_sequences - generation.num_sequences
        self.num_queued_tokens += num_tokens
        self.num_logprobs += num_logprobs
        generation.num_sequences, generation.num_queued_tokens, generation.num_logprobs = (
            num_sequences,
            num_tokens,
            num_logprobs,
        )

    def salt(self, tenant: str, cache_salt: str) -> str:
        """The salt of the engine's prefix cache, in memory and on disk: requests with equal salts share prefixes."""
        return cache_salt if self.shares_prefixes else f"{tenant}:{cache_salt}"

    def too_busy(self, reason: str, message: str) -> ApiError:
        """ApiError 429, counted in the metrics under its reason, which also is its code."""
        self.metrics.refused[reason] += 1
        return ApiError(429, f"the server is busy: {message}", code=reason, retry_after=self._retry_after())

    def _retry_after(self) -> int:
        """Seconds until the sequences that wait now will be answered, estimated from the duration of past answers."""
        slots = self.max_open_sequences - self.limits.max_queued
        return max(1, min(LONGEST_RETRY, math.ceil(self._seconds_each * self.num_sequences / slots)))

    def enter(self, generation: Generation) -> None:
        """A generation begins: it counts as one sequence until `admit` knows their number."""
        self.generations.add(generation)
        self.num_sequences += generation.num_sequences

    def leave(self, generation: Generation) -> None:
        """A generation ended, with success or without."""
        self.generations.discard(generation)
        self.num_sequences -= generation.num_sequences
        self.num_queued_tokens -= generation.num_queued_tokens
        self.num_logprobs -= generation.num_logprobs
        if generation.streams:
            self._seconds_each += 0.1 * (generation.exchange.seconds - self._seconds_each)

    def note_end(self, is_fault: bool) -> None:
        """A request's sequences ended. is_fault: the model's logits were not finite for one of them.

        `max_faults` in a row make `trouble`; requests are still answered, and a request that succeeds ends it.
        """
        self.num_faults = self.num_faults + 1 if is_fault else 0

    # ------------------------------------------------------------ work beside the event loop

    async def offload(
        self, function: Callable[..., T], *args: Any, workers: concurrent.futures.Executor | None = None
    ) -> T:
        """Runs a function in a worker thread; returns its result. workers: others than those that prepare requests.

        A ValueError becomes ApiError 400, Busy a 429. ApiError 503 if it takes too long: the function then runs on with
        nobody waiting for it, so it must also be bounded in itself.
        """
        is_own = workers is None
        self._num_offloaded += is_own
        running = asyncio.get_running_loop().run_in_executor(workers or self._workers, function, *args)
        running.add_done_callback(lambda ended: self._offloaded(ended, is_own))
        try:
            async with asyncio.timeout(self.limits.offload_seconds):
                return await asyncio.shield(running)
        except ValueError as error:
            raise not_allowed(error) from None
        except Busy as error:
            raise self.too_busy(error.code, str(error)) from None
        except TimeoutError:
            running.cancel()
            raise ApiError(
                503, f"preparing the request took more than {self.limits.offload_seconds:g} s", code="timeout"
            ) from None

    def _offloaded(self, running: asyncio.Future[Any], is_own: bool) -> None:
        self._num_offloaded -= is_own
        if not running.cancelled():
            running.exception()  # so that asyncio does not warn of an exception that nobody retrieved

    # ------------------------------------------------------------ reports

    def counts(self) -> dict[str, int]:
        """Counts of the engine: {name: number}."""
        return {} if self.llm is None else self.llm.engine.counts()

    def draft_counts(self) -> dict[str, DraftCounts]:
        """How many drafts the engine made, and how many were right, by source."""
        return {} if self.llm is None else self.llm.engine.draft_counts()

    def explain(self, error: BaseException) -> ApiError:
        """Any exception as the ApiError that a client may see; the server's own faults are logged."""
        if isinstance(error, ApiError):
            return error
        if isinstance(error, EngineStopped):
            if isinstance(error.__cause__, ReplicasLost):
                return ApiError(503, str(error.__cause__), code="replicas_lost")
            self._log_stop(error.__cause__)
            return ApiError(503, "the engine stopped before this answer was complete", code="engine")
        log.error("a request failed", exc_info=error)
        return ApiError(500, "the server failed to answer this request; its log says why", code="internal_error")

    def _log_stop(self, cause: BaseException | None) -> None:
        """Logs once why the engine stopped, unless the service was closed."""
        if cause is not None and not self._has_logged_stop:
            self._has_logged_stop = True
            log.error("the engine stopped", exc_info=cause)

    def name_in_answers(self, name: str | None) -> str:
        """The model's name in an answer to a request for `name`; None and "" mean the server's only model.

        ApiError 404 for a name that the model does not have.
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


def system_fingerprint(llm: "LoadedModel") -> str:
    """A hash of all that an answer depends on besides the request: arithmetic, weights, tokenizer, template and
    defaults. Waits for the model's content hash.
    """
    parts = [
        hashlib.sha256(model_identity(llm.model, NUMERICS)).hexdigest(),
        llm.content.wait(),
        sorted(llm.engine.eos_ids),
        sorted(llm.sampling_defaults.items()),
    ]
    if llm.has_tokenizer:
        tokenizer = llm.tokenizer
        parts += [tokenizer.serialized, dict(tokenizer.chat_templates), dict(tokenizer.special_tokens)]
    with contextlib.suppress(ValueError):  # without a supported pooling embeddings depend on the request's alone
        parts.append(llm.pooling)
    return "fp_" + hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
