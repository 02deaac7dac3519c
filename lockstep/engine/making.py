"""Requests of a model: made from what a user asks for, or from what is known of one that ran elsewhere."""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, SupportsIndex

from lockstep.engine.admission import check
from lockstep.engine.answer_tokens import NewDetokenizer, resume, resume_all
from lockstep.engine.embedding import Pool, Reader
from lockstep.engine.leaves import Leaves
from lockstep.engine.model import Model
from lockstep.engine.request import Request, SamplingParams, samples, token_list
from lockstep.engine.speculation.lookup import Prediction


@dataclass(frozen=True)
class KnownAnswer:
    """What is known of a Request's answer: the values of its fields of the same names, and the bytes of its leaves, or
    None where no receipt is wanted."""

    output_ids: list[int]
    logprobs: list[float]
    top_logprobs: list[dict[int, float]]
    prompt_logprobs: list[float]
    prompt_top_logprobs: list[dict[int, float]]
    leaves: tuple[bytes, bytes] | None
    computes_given: bool


class RequestMaker(ABC):
    """Makes the requests of one model, and refuses those that cannot run.

    eos_ids: the tokens that end an answer. new_detokenizer: given a Request, makes the Detokenizer of its answer; None:
    answers have no text.
    """

    def __init__(self, model: Model, eos_ids: frozenset[int], new_detokenizer: NewDetokenizer) -> None:
        self.model, self.eos_ids, self.new_detokenizer = model, eos_ids, new_detokenizer
        self._ids = itertools.count()

    @property
    @abstractmethod
    def reads_predictions(self) -> bool:
        """Whether a prediction is of use."""

    @abstractmethod
    def check_size(self, request: Request) -> None:
        """ValueError for a request that could never run."""

    @abstractmethod
    def name_blocks(self, request: Request) -> list[bytes]:
        """The names of a new request's whole blocks of prompt tokens; none where no prefix cache needs them."""

    def make(
        self,
        prompt_ids: Iterable[SupportsIndex],
        params: SamplingParams,
        priority: int = 0,
        cache_salt: str = "",
        prediction: Iterable[SupportsIndex] = (),
        output_ids: Iterable[Any] = (),
        *,
        recompute_logprobs: bool = True,
        receipt: bool = False,
    ) -> list[Request]:
        """The Requests of a prompt's samples, not queued yet. Any thread may call this. ValueError if they cannot run.

        priority: the lowest number goes first. cache_salt: only requests with the same salt share cached prefixes and
        draft from one another's answers. prediction: token ids of a text that the answers may resemble, for drafts.

        output_ids: the first tokens of the answer, from which it goes on as after a preemption, and as the answer that
        began with them would have gone on; for n samples a list for each. They count for max_tokens. A request whose
        answer they end has ended, or ends when their log-probabilities are computed; NotItsAnswer (a ValueError) for
        tokens that cannot be the beginning of its answer. A logits_mask is called for each of them here.
        recompute_logprobs: whether their log-probabilities are computed anew; else they are NaN, and need no rows.
        receipt: whether to keep what a receipt of each answer binds, in `Request.leaves`; then they are computed, too.
        """
        prompt_ids, predicted = token_list(prompt_ids), token_list(prediction, "prediction")
        check(self.model, self.new_detokenizer is not None, prompt_ids, params, priority, cache_salt, predicted)
        shared = Prediction(predicted) if self.reads_predictions and predicted else None
        requests = [
            Request(next(self._ids), list(prompt_ids), p, priority=priority, cache_salt=cache_salt, prediction=shared)
            for p in samples(params)
        ]
        vocab_size = self.model.config.vocab_size
        recomputes = recompute_logprobs or receipt
        resume_all(requests, output_ids, self.eos_ids, self.new_detokenizer, vocab_size, recomputes)
        if receipt and params.pooling is None:
            for each in requests:
                each.leaves = Leaves()
        if params.pooling is not None:
            requests[0].pool = Pool(params.pooling, len(prompt_ids))
        return self._checked(requests)

    def make_reading(self, token_ids: list[int], reader: Reader, cache_salt: str = "") -> Request:
        """A request that computes the hidden states of known tokens for a Reader, and chooses none; not queued yet. It
        ends as an embedding does. ValueError if it cannot run."""
        params = SamplingParams(pooling="last")
        check(self.model, True, token_ids, params, priority=0, cache_salt=cache_salt, prediction=())
        request = Request(next(self._ids), token_ids, params, pool=reader, cache_salt=cache_salt)
        return self._checked([request])[0]

    def make_known(
        self,
        prompt_ids: list[int],
        params: SamplingParams,
        known: KnownAnswer,
        prediction: list[int],
        **fields: Any,
    ) -> Request:
        """The Request of one sample whose answer another engine of the same model began; not queued yet. It goes on
        from there with all that is known of the answer, of which nothing is computed again but keys and values.

        params: of this one sample, with its own seed. fields: of Request.
        """
        predicted = Prediction(prediction) if self.reads_predictions and prediction else None
        request = Request(next(self._ids), prompt_ids, params, prediction=predicted, **fields)
        if params.pooling is not None:
            request.pool = Pool(params.pooling, len(prompt_ids))
        if known.output_ids:
            vocab_size = self.model.config.vocab_size
            resume(request, known.output_ids, self.eos_ids, self.new_detokenizer, vocab_size, known.computes_given)
        request.logprobs, request.top_logprobs = list(known.logprobs), list(known.top_logprobs)
        request.prompt_logprobs, request.prompt_top_logprobs = (
            list(known.prompt_logprobs),
            list(known.prompt_top_logprobs),
        )
        if known.leaves is not None:
            request.leaves = Leaves(*known.leaves)
        return self._checked([request])[0]

    def _checked(self, requests: list[Request]) -> list[Request]:
        """The samples of a prompt, with the names of its blocks. ValueError if they can never run."""
        self.check_size(requests[0])
        names = self.name_blocks(requests[0])  # here, so that a long prompt is hashed in the thread of its client
        for request in requests:
            request.prefix.block_names = list(names)
        return requests
