"""Verifies the statement of a receipt with the model at hand: one prefill of prompt and answer, over whose rows the
head and the sampler run once more.

What takes no computing is checked first. Then `Verification.request` is to be run by whoever has the engine, in the
same steps as other requests; after its end `Verification.finish` says what was found.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from lockstep.engine.engine import Engine
from lockstep.engine.leaves import LEAF_BYTES
from lockstep.engine.request import Request, SamplingParams
from lockstep.receipts import form as forms
from lockstep.receipts.ending import Ending, ending
from lockstep.receipts.errors import ReceiptError
from lockstep.receipts.fields import is_token
from lockstep.receipts.head_blocks import HeadBlocks
from lockstep.receipts.identity import ModelPart, difference
from lockstep.receipts.masks import MAX_SECONDS, TooMuch, known_masks
from lockstep.receipts.merkle import root_of
from lockstep.receipts.replay import Mismatch, Replay, Replayed
from lockstep.receipts.statement import Statement
from lockstep.receipts.verdict import TRUE, Verdict, false, unchecked
from lockstep.text.grammars.structured import Grammars


class Given(NamedTuple):
    """What a verifier has beside the receipt. None: as the receipt has it.

    prompt_ids, output_ids: tokens of the prompt and the answer; salt: of a hidden prompt; logits_mask: what held the
    answer to its form, for a receipt that leaves out the texts of grammars.
    """

    prompt_ids: Sequence[int] | None = None
    output_ids: Sequence[int] | None = None
    salt: bytes | None = None
    logits_mask: Any = None


NOTHING = Given()
LEAF = np.dtype([("token", "<u4"), ("logprob", "<f4"), ("state", "V32")])  # see `engine.leaves`


def check_given(given: Any) -> Given:
    """The Given that a caller passes, or NOTHING for None. ReceiptError for anything else."""
    if given is None:
        return NOTHING
    if not isinstance(given, Given):
        raise ReceiptError(f"given: expected a Given (lockstep/receipts/verify.py) or None, got {given!r:.80}")
    for name in ("prompt_ids", "output_ids"):
        ids = getattr(given, name)
        if ids is not None and (isinstance(ids, (str, bytes)) or not all(map(is_token, ids))):
            raise ReceiptError(f"given.{name}: expected token ids or None, got {ids!r:.80}")
    if given.salt is not None and not isinstance(given.salt, bytes):
        raise ReceiptError(f"given.salt: expected bytes or None, got {given.salt!r:.80}")
    return given


class Verifier:
    """Verifies receipts of one loaded model. model: what receipts say of it. grammars: returns what compiles grammars
    for it, or None where it has no tokenizer. mask_seconds: that the masks of an answer's form may take."""

    mask_seconds = MAX_SECONDS

    def __init__(self, model: ModelPart, engine: Engine, grammars: Callable[[], Grammars | None]) -> None:
        self.model, self._engine, self._grammars = model, engine, grammars
        self._head = HeadBlocks(engine.model, engine.runner)

    def begin(self, statement: Statement, given: Given = NOTHING, cache_salt: str = "") -> "Verification":
        """Checks all that takes no computing. cache_salt: see `Engine.make`."""
        prompt_ids = list((statement.prompt.ids or ()) if given.prompt_ids is None else given.prompt_ids)
        output_ids = list((statement.answer.ids or ()) if given.output_ids is None else given.output_ids)
        wrong = self._check_model(statement) or _check_tokens(statement, prompt_ids, given)
        if wrong is None:
            wrong = self._check_vocabulary(statement) or self._check_sizes(prompt_ids, output_ids)
        if wrong is not None:
            return Verification(wrong)
        params, wrong = self._with_mask(statement, given)
        if wrong is not None:
            return Verification(wrong)
        found = ending(prompt_ids, output_ids, params, self._engine.eos_ids, self._engine.new_detokenizer)
        if (wrong := _check_ending(statement, found)) is not None:
            return Verification(wrong)
        if params.logits_mask is not None:
            try:
                params = replace(params, logits_mask=known_masks(params.logits_mask, output_ids, self.mask_seconds))
            except TooMuch as error:
                return Verification(unchecked("form", f"it cannot be checked here: {error}"))
        replayed = Replayed(
            prompt_ids=prompt_ids,
            output_ids=output_ids,
            params=params,
            sample=statement.sample,
            eos_ids=self._engine.eos_ids,
            vocab_size=self._engine.model.config.vocab_size,
            tags=statement.answer.tags or b"",
        )
        return self._replaying(statement, replayed, found, cache_salt)

    def _replaying(self, statement: Statement, of: Replayed, found: Ending, cache_salt: str) -> "Verification":
        replay = Replay(of, self._head)
        request = self._engine.make_reading(of.token_ids, replay, cache_salt) if of.num_rows else None
        return Verification(None, request, replay, statement, found.text)

    def is_of_model(self, statement: Statement) -> bool:
        """Whether a statement is of this model, in these formats and this arithmetic."""
        return self._check_model(statement) is None

    def _check_model(self, statement: Statement) -> Verdict | None:
        found = difference(statement.numerics, statement.model, self.model)
        return found and unchecked(found[0], found[3], found[1], found[2])

    def _check_vocabulary(self, statement: Statement) -> Verdict | None:
        """A Verdict where the parameters or the form name tokens that the model does not have: no engine takes them."""
        vocab_size, highest = self._engine.model.config.vocab_size, max(forms.tokens_of(statement.form), default=0)
        try:
            statement.params.check_vocabulary(vocab_size)
        except ValueError as error:
            return false("sampling", None, None, str(error))
        if highest < vocab_size:
            return None
        return false("form", highest, None, f"form: token ids must be 0 to {vocab_size - 1}, got {highest}")

    def _check_sizes(self, prompt_ids: list[int], output_ids: list[int]) -> Verdict | None:
        """A Verdict where the tokens do not fit into this engine, or are none of the vocabulary."""
        vocab_size, limit = self._engine.model.config.vocab_size, self._engine.model.max_context
        for what, ids in (("prompt", prompt_ids), ("token", output_ids)):
            wrong = next((i for i, token in enumerate(ids) if token >= vocab_size), None)
            if wrong is not None:
                return false(what, ids[wrong], None, f"{ids[wrong]} is no token of the model", wrong)
        most = min(limit, self._engine.scheduler.most_tokens)
        num_tokens = len(prompt_ids) + max(0, len(output_ids) - 1)
        if num_tokens > most:
            return unchecked("tokens", f"{num_tokens} tokens are more than fit into the context of {most} tokens here")
        return None

    def _with_mask(self, statement: Statement, given: Given) -> tuple[SamplingParams, Verdict | None]:
        """The parameters with the mask of the statement's form, or a Verdict where it cannot be made."""
        form, mask = statement.form, given.logits_mask
        if mask is not None:
            own = forms.form_of(mask)
            own = own if forms.has_texts(form) else forms.without_texts(own)
            if own != form:
                wrong = false("form", None, None, "what held the answer to its form is not what was asked for")
                return statement.params, wrong
        elif not forms.has_texts(form):
            wrong = unchecked("form", "the receipt leaves out its grammar: the request is needed, too")
            return statement.params, wrong
        others = forms.libraries(form) - {forms.LIBRARY}
        if others:
            reason = f"its form was read by {', '.join(sorted(others))}, here it is {forms.LIBRARY}"
            return statement.params, unchecked("form.library", reason)
        try:
            if mask is None:
                vocab_size = self._engine.model.config.vocab_size
                mask = forms.mask_of(form, self._grammars(), vocab_size, self._engine.eos_ids)
        except ValueError as error:
            return statement.params, unchecked("form", f"its form cannot be made here: {error}")
        return replace(statement.params, logits_mask=mask), None


class Verification:
    """One verification. request: to be run to its end by the caller; None where nothing is to be computed."""

    def __init__(
        self,
        verdict: Verdict | None,
        request: Request | None = None,
        replay: Replay | None = None,
        statement: Statement | None = None,
        text: str = "",
    ) -> None:
        self._verdict, self.request = verdict, request
        self._replay, self._statement, self._text = replay, statement, text

    def finish(self) -> Verdict:
        """What was found, after the end of `request`."""
        if self._verdict is None:
            self._verdict = self._compared()
        return self._verdict

    def _compared(self) -> Verdict:
        replay, statement = self._replay, self._statement
        assert replay is not None and statement is not None, "it has a verdict or something to compare"
        if self.request is not None and self.request.finish_reason != "embedded":
            return unchecked("engine", f"the prefill did not end: {self.request.error or self.request.finish_reason}")
        if replay.mismatch is not None:
            return _of_mismatch(replay.mismatch)
        trees = ("prompt.root", statement.prompt, replay.prompt), ("root", statement.answer, replay.answer)
        for what, part, leaves in trees:
            found = root_of(leaves, LEAF_BYTES)
            if part.root is not None and part.root != found:
                hint = "" if statement.answer.tags else "; a receipt with tags would tell where"
                reason = f"the tokens are the model's, but a log-probability or hidden state is not{hint}"
                return false(what, part.root.hex(), found.hex(), reason)
        answer, prompt = _logprobs(replay.answer), _logprobs(replay.prompt)
        return Verdict(TRUE, text=self._text, logprobs=answer, prompt_logprobs=prompt)


def _logprobs(leaves: bytearray) -> tuple[float, ...]:
    return tuple(np.frombuffer(leaves, LEAF)["logprob"].tolist())


def _check_tokens(statement: Statement, prompt_ids: list[int], given: Given) -> Verdict | None:
    """A Verdict where tokens are missing, or are not those of the statement."""
    prompt, answer = statement.prompt, statement.answer
    if not prompt_ids:
        needed = "it and the salt of its commitment are" if prompt.is_hidden else "it is"
        return unchecked("prompt", f"the receipt leaves out the prompt: {needed} needed, too")
    if prompt.is_hidden and given.salt is None:
        return unchecked("prompt", "the receipt hides the prompt: the salt of its commitment is needed, too")
    if not prompt.is_of(prompt_ids, given.salt):
        salted = ", or the salt is" if prompt.is_hidden else ""
        return false("prompt", prompt.digest.hex(), None, f"the prompt is another one than the receipt's{salted}")
    if answer.ids is None and given.output_ids is None:
        return unchecked(
            "answer", "the receipt leaves out the answer's tokens: the token ids of the answer are needed, too"
        )
    if given.output_ids is None:
        return None
    if len(given.output_ids) != answer.tokens:
        reason = f"the receipt is of {answer.tokens} tokens, the answer has {len(given.output_ids)}"
        return false("tokens", answer.tokens, len(given.output_ids), reason)
    for place, (claimed, found) in enumerate(zip(answer.ids or (), given.output_ids, strict=False)):
        if claimed != found:
            return false("token", claimed, found, f"token {place} of the answer is not the receipt's", place)
    return None


def _check_ending(statement: Statement, found: Ending) -> Verdict | None:
    """A Verdict where the tokens end the answer elsewhere, or for another reason, than is claimed."""
    answer = statement.answer
    if found.num_tokens != answer.tokens:
        reason = f"the answer ends ({found.reason}) after {found.num_tokens} of its {answer.tokens} tokens"
        return false("tokens", answer.tokens, found.num_tokens, reason)
    claimed = None if answer.finish_reason == "cancelled" else answer.finish_reason
    if claimed != found.reason:
        ended = "that nothing ends it" if found.reason is None else repr(found.reason)
        reason = f"the receipt says that the answer ended by {answer.finish_reason!r}, its tokens say {ended}"
        return false("finish_reason", answer.finish_reason, found.reason, reason)
    if claimed is not None and answer.stop_reason != found.stop_reason:
        stops = ["an end token" if each is None else repr(each) for each in (found.stop_reason, answer.stop_reason)]
        reason = f"the answer was stopped by {stops[0]}, not by {stops[1]}"
        return false("stop_reason", answer.stop_reason, found.stop_reason, reason)
    return None


def _of_mismatch(found: Mismatch) -> Verdict:
    reasons = {
        "token": f"token {found.position} of the answer is {found.claimed}, the model chooses {found.found}",
        "leaf": f"token {found.position} of the answer is the model's, its log-probability or hidden state is not",
        "form": f"token {found.position} of the answer cannot be chosen: {found.reason}",
        "logits": f"the model's logits at token {found.position} of the answer are not finite",
        "prompt logits": f"the model's logits at token {found.position} of the prompt are not finite",
    }
    return false(found.what, found.claimed, found.found, reasons[found.what], found.position)
