"""What was asked for, and whether a receipt is of that: recomputing cannot tell parameters that lead to the same
tokens."""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from lockstep.engine.request import SamplingParams
from lockstep.receipts import form as forms
from lockstep.receipts import parameters
from lockstep.receipts.parameters import seed_of
from lockstep.receipts.statement import Statement
from lockstep.receipts.verdict import Verdict, false, unchecked

Prompts = Sequence[tuple[Sequence[int], SamplingParams]]


class Asked(NamedTuple):
    """A request, as far as a receipt can be compared with it.

    prompts: the token ids of each, with its parameters (and the mask of its form). has_seed: whether these have the
    seed that was asked for; else it follows from the nonce, or is any. uncut: the prompts as they were if the context
    were the model's own, by which a context that somebody made small is told; empty: the same. begun: for each prompt
    the token ids with which each of its samples was to begin; empty: with none.
    """

    prompts: Prompts
    has_seed: bool = True
    nonce: str | None = None
    uncut: Prompts = ()
    begun: Sequence[Sequence[Sequence[int]]] = ()

    def at(self, index: int) -> "Asked":
        """The part of the request that asks for choice number `index`; one without a prompt where there is none."""
        for i, (_, params) in enumerate(self.prompts):
            if index < params.n:
                one = slice(i, i + 1)
                return self._replace(prompts=self.prompts[one], uncut=self.uncut[one], begun=self.begun[one])
            index -= params.n
        return self._replace(prompts=[])

    def number_of(self, statement: Statement, salt: bytes | None) -> int | None:
        """The number of the prompt of which a statement is; None where it is of none."""
        return next((i for i, each in enumerate(self.prompts) if statement.prompt.is_of(each[0], salt)), None)

    def difference(
        self, statement: Statement, salt: bytes | None = None, output_ids: Sequence[int] | None = None
    ) -> Verdict | None:
        """The first thing in which a statement differs from the request; None where it is of this request. output_ids:
        of the answer, where the statement leaves them out."""
        if statement.prompt.is_hidden and salt is None:
            return unchecked("prompt", "the receipt hides the prompt: the salt of its commitment is needed, too")
        number = self.number_of(statement, salt)
        if number is None:
            salted = ", or the salt is that of another one" if statement.prompt.is_hidden else ""
            return false("prompt", None, None, f"the receipt is of another prompt than the request{salted}")
        if statement.nonce != self.nonce:
            reason = f"the request has {_nonce(self.nonce)}, the receipt {_nonce(statement.nonce)}"
            return false("nonce", statement.nonce, self.nonce, reason)
        ids = statement.answer.ids if output_ids is None else output_ids
        return (
            self._of_params(statement, *self.prompts[number])
            or self._of_context(statement, number)
            or _of_form(statement, self.prompts[number][1])
            or _of_beginning(self.begun[number][statement.sample] if self.begun else (), ids or ())
        )

    def _of_params(self, statement: Statement, prompt_ids: Sequence[int], params: SamplingParams) -> Verdict | None:
        asked, claimed = parameters.to_json(params), parameters.to_json(statement.params)
        if not self.has_seed:
            drawn = None if self.nonce is None else str(seed_of(self.nonce, prompt_ids))
            asked["seed"] = claimed.get("seed", "0") if drawn is None else drawn
            claimed.setdefault("seed", "0")
        shortened = _shortened(statement, len(prompt_ids), params)
        for name in [*asked, *claimed]:
            if asked.get(name) != claimed.get(name) and not (name == "max_tokens" and shortened is not None):
                known = [_shown(getattr(each, name)) for each in (params, statement.params)]
                if name == "seed":
                    known[0] = asked[name]
                reason = f"the request has {name} {known[0]}, the receipt {known[1]}"
                return false(f"sampling.{name}", claimed.get(name), asked.get(name), reason)
        return shortened if statement.answer.finish_reason == "length" else None

    def _of_context(self, statement: Statement, number: int) -> Verdict | None:
        """A Verdict where the context cut the prompt or ended the answer, and is smaller than the model's."""
        if not self.uncut:
            return None
        (ids, params), (whole_ids, whole) = self.prompts[number], self.uncut[number]
        is_cut = statement.answer.finish_reason == "length" and params.max_tokens < whole.max_tokens
        if not is_cut and list(ids) == list(whole_ids):
            return None
        what = "the answer ended at" if is_cut else "the prompt was cut to"
        reason = f"{what} a context of {statement.model.context} tokens, which is not the model's own"
        return unchecked("model.context", f"{reason}: who made it chose how many to use")


def _shortened(statement: Statement, num_prompt: int, params: SamplingParams) -> Verdict | None:
    """A Verdict where the request leaves the answer all of the context, and the receipt fewer tokens: a server may
    allow fewer, so that many answers with log-probabilities fit."""
    most, allowed = params.max_tokens, statement.params.max_tokens
    if num_prompt + most != statement.model.context or allowed >= most:
        return None
    reason = (
        f"the answer ended after {allowed} tokens, as the server allowed no more, and the request has no such limit"
    )
    return unchecked("sampling.max_tokens", reason, allowed, most)


def _of_beginning(begun: Sequence[int], output_ids: Sequence[int]) -> Verdict | None:
    """A Verdict where an answer does not begin with the tokens from which it was to go on."""
    for place, token in enumerate(begun):
        found = output_ids[place] if place < len(output_ids) else None
        if found != token:
            reason = f"token {place} of the answer is {_shown(found)}, the request goes on from {token}"
            return false("continue_from", found, token, reason, place)
    return None


def _of_form(statement: Statement, params: SamplingParams) -> Verdict | None:
    form = forms.form_of(params.logits_mask)
    if statement.form != (form if forms.has_texts(statement.form) else forms.without_texts(form)):
        return false("form", None, None, "what held the answer to its form is not what the request asks for")
    return None


def _nonce(nonce: str | None) -> str:
    return "no nonce" if nonce is None else f"the nonce {_shown(nonce)}"


def _shown(value: Any) -> str:
    """A value in a reason, as JSON has it; a real number with the digits of a float32."""
    if value is None:
        return "none"
    return json.dumps(float(f"{value:.7g}") if isinstance(value, float) else value)[:80]
