"""Answers and streams from anybody around a receipt: each is read, compared or refused, and none is a crash."""

import json
import random

import pytest

from lockstep.engine.request import SamplingParams
from lockstep.llm import LLM
from lockstep.receipts.around.files import Answered, found_in
from lockstep.receipts.around.shown import Comparison
from lockstep.receipts.errors import ReceiptError
from lockstep.receipts.statement import from_bytes

KEYS = (
    "choices receipt text message delta token_ids prompt_token_ids finish_reason stop_sequence stop_reason logprobs "
    "index prompt_logprobs output content type status object usage response body batch path receipt_salt content_block"
).split()
INNER = ["text", "content", "type", "logprob", "top_logprobs", "token_logprobs", "delta"]
KINDS = ["message", "message_delta", "content_block_delta", "content_block_start", "response.completed", "error"]


@pytest.fixture(scope="module")
def proven():
    """(a receipt's envelope, its Statement, its true Verdict)."""
    with LLM(threads=1, progress=False, max_context=128, max_requests=1) as llm:
        [made] = llm.generate("import os", SamplingParams(max_tokens=4, prompt_logprobs=0), receipt=True)
        assert made.receipt is not None
        envelope = made.receipt.envelope
        return envelope, from_bytes(envelope.payload), llm.verify(made.receipt)


class Anything:
    """Makes objects of JSON at random, of the names that answers have."""

    def __init__(self, seed, receipt):
        self._random, self._receipt = random.Random(seed), receipt

    def value(self, depth=0):
        kind = self._random.randrange(9 if depth < 4 else 7)
        if kind < 7:
            return [None, True, 1, -1.5, "x", "length", self._receipt][kind]
        number = self._random.randrange(3)
        if kind == 7:
            return [self.value(depth + 1) for _ in range(number)]
        return {self._random.choice(INNER): self.value(depth + 1) for _ in range(number)}

    def answer(self):
        made = {self._random.choice(KEYS): self.value() for _ in range(self._random.randrange(1, 7))}
        if self._random.random() < 0.5:
            made["receipt"] = self._receipt
        if self._random.random() < 0.3:
            made = dict(choices=[made, made][: self._random.randrange(3)])
        return made | (dict(type=self._random.choice(KINDS)) if self._random.random() < 0.3 else {})

    def text(self):
        events = [json.dumps(self.answer()) for _ in range(self._random.randrange(1, 4))]
        if self._random.random() < 0.4:
            return "".join(f"data: {event}\n\n" for event in events)
        return "\n".join(events)


def test_any_answer_is_read_compared_or_refused(proven):
    envelope, statement, verdict = proven
    anything, num_compared, num_refused = Anything(5, envelope.to_object()), 0, 0
    for _ in range(6000):
        try:
            found = found_in(anything.text())
        except ReceiptError:
            num_refused += 1
            continue
        for each in found:
            if isinstance(each, Answered) and each.shown is not None:
                each.shown.output_ids(statement)
                Comparison(each.shown, statement, verdict, statement.prompt.ids, lambda text: False).verdict()
                num_compared += 1
    assert num_compared > 500 and num_refused > 500
