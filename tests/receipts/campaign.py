"""Honest receipts from engines of every kind, and the verifier that judges them; see `python -m tests.receipts`."""

import itertools
import random
from dataclasses import dataclass, replace
from unittest import mock

import numpy as np

from lockstep.engine.request import SamplingParams
from lockstep.llm import LLM
from lockstep.receipts.envelope import Envelope
from lockstep.receipts.receipt import ReceiptOptions
from lockstep.receipts.statement import from_bytes
from lockstep.runtime.executor import aligned
from lockstep.weights.store import PackedStore
from tests.receipts.forgeries import Honest
from tests.receipts.replays import run

BEGINNINGS = ["import os\n", "def add(a, b):\n", "class Queue:\n    def __init__", "x = [", "try:\n", "# sort a list\n"]
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"enum": ["x", "yz"]}}, "required": ["a"]}
FORMS = [{}, {}, {}, {}, dict(regex="[a-z]+ [a-z]+"), dict(schema=SCHEMA)]
SIZE = 24  # requests of a crowd
IMPOSTORS = (dict(weights="q8_0"), dict(weights="q4_0"), dict(kv_dtype="q8"), dict(kv_dtype="f32"))
ENGINES = {
    "usual": {},
    "one thread": dict(threads=1),
    "small chunks": dict(max_step_tokens=24),
    "no cache": dict(prefix_cache=False),
    "preempted": dict(kv_tokens=640, max_context=512),
    "lookup": dict(speculate="lookup"),
    "mtp": dict(speculate="mtp", draft=3),
    "auto": dict(speculate="auto"),
    "alone": dict(max_requests=1),
    "resumed": {},
}


@dataclass(frozen=True)
class Crowd:
    """Requests that run together. name: of their engine. seed: of all that is drawn."""

    name: str
    llm: LLM
    seed: int

    @staticmethod
    def all(seed):
        """Crowds without an end, each on the next engine. An engine is made when it is first needed, and stays."""
        made = {}
        for number in itertools.count():
            name = list(ENGINES)[number % len(ENGINES)]
            if name not in made:
                options = dict(max_context=512, max_requests=8, threads=2, progress=False) | ENGINES[name]
                made[name] = LLM(**options)
            yield Crowd(name, made[name], seed * 1_000_003 + number)


def random_params(draw):
    """SamplingParams of a short answer."""
    kinds = (
        dict(),
        dict(temperature=0.8, top_p=0.9),
        dict(temperature=1.1, top_k=40, min_p=0.02),
        dict(temperature=0.7, repetition_penalty=1.2, presence_penalty=0.3, logit_bias={7: 1.5}, min_tokens=3),
        dict(temperature=1.0, frequency_penalty=0.2, stop=("\n", "self"), suppress_tokens=(11, 12)),
    )
    return SamplingParams(
        max_tokens=draw.randint(3, 48),
        seed=draw.getrandbits(63),
        ignore_eos=draw.random() < 0.3,
        n=draw.choice((1, 1, 1, 3)),
        prompt_logprobs=draw.choice((None, None, None, 1)),
        logprobs=draw.choice((None, None, 2)),
        **draw.choice(kinds),
    )


def honest_receipts(crowd):
    """The Honest receipts of a crowd's answers."""
    draw, llm = random.Random(crowd.seed), crowd.llm
    started = []
    for _ in range(SIZE):
        prompt = llm.encode(draw.choice(BEGINNINGS) * draw.randint(1, 12))
        [params] = llm.held_to([random_params(draw)], **draw.choice(FORMS))
        started.append((prompt, params, llm.engine.make(prompt, params, receipt=True)))
    run_all(llm, started)
    if crowd.name == "resumed":
        started = [(prompt, params, resumed(llm, prompt, params, samples, draw)) for prompt, params, samples in started]
        run_all(llm, started)
    for _, params, samples in started:
        options = ReceiptOptions(tags=draw.random() < 0.5)
        make = llm.new_receipt(params, options)
        for number, request in enumerate(samples):
            payload = make(request, number).envelope.payload
            yield Honest(from_bytes(payload), bytes(request.leaves.answer))


def resumed(llm, prompt, params, samples, draw):
    """The same answers, going on from a random place of each."""
    known = [request.output_ids[: draw.randrange(len(request.output_ids))] for request in samples]
    if params.logits_mask is not None:
        params = replace(params, logits_mask=llm.chat_model.grammars.mask(params.logits_mask.grammar, params.n))
    return llm.engine.make(prompt, params, output_ids=known if any(known) else (), receipt=True)


def run_all(llm, started):
    for _, _, samples in started:
        llm.engine.queue(*samples)
    run(llm.engine)
    assert all(request.finish_reason in ("stop", "length") for _, _, samples in started for request in samples)


class Judge:
    """A verifier on an engine of its own."""

    def __init__(self):
        self._llm = LLM(max_context=512, max_requests=4, threads=1, prefix_cache=False, progress=False)
        self.vocab_size = self._llm.vocab_size

    @property
    def model(self):
        """The true model, as statements name it."""
        return self._llm.verifier.model

    def answer(self, prompt, params):
        """The true model's own answer."""
        return answer_of(self._llm, prompt, params)

    def verdict(self, statement):
        """The Verdict on a statement, read from its bytes as anybody would."""
        return self.verdict_on(statement.to_bytes())

    def verdict_on(self, payload):
        """The Verdict on a payload. ReceiptError for what is none."""
        return self._llm.verify(Envelope(payload))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._llm.close()


def flipped_bits(judge, count, seed):
    """Flips bits of packed weights, one at a time, of a model that makes receipts; returns how many of its false
    answers are accepted. Prints how many bits changed nothing: such an answer is the true model's."""
    draw, same, false, accepted, copies = random.Random(seed), 0, 0, 0, {}
    options = dict(max_context=512, max_requests=4, threads=2, prefix_cache=False, progress=False)
    with copied_weights(copies), LLM(**options) as llm:
        params = SamplingParams(max_tokens=16, temperature=0.9, seed=5, ignore_eos=True)
        prompt = llm.encode(BEGINNINGS[1])
        right = answer_of(llm, prompt, params)
        arrays = [array.reshape(-1).view(np.uint8) for each in copies.values() for array in each]
        for _ in range(count):
            memory = draw.choices(arrays, [array.nbytes for array in arrays])[0]
            at, bit = draw.randrange(memory.nbytes), np.uint8(1 << draw.randrange(8))
            memory[at] ^= bit
            request = answer_of(llm, prompt, params)
            memory[at] ^= bit
            if request.finish_reason == "error":  # its logits are not finite: there is no answer, and no receipt
                false += 1
                continue
            verdict = judge.verdict(from_bytes(llm.new_receipt(params, True)(request, 0).envelope.payload))
            is_same = request.leaves.answer == right.leaves.answer
            same += is_same
            false += not is_same
            accepted += verdict.is_true and not is_same
            assert verdict.is_true or not is_same, "an answer like the true model's is refused"
    print(f"bits flipped in packed weights: {count}, of which {same} changed nothing; {false} answers differed, "
          f"{accepted} of them accepted", flush=True)  # fmt: skip
    return accepted


def impostors(judge, count, seed):
    """Answers in other formats than the receipt says, with an impostor's leaves; returns how many are accepted though
    the true model gives another answer."""
    accepted = 0
    for formats in IMPOSTORS:
        draw, same = random.Random(seed), 0
        with LLM(max_context=512, max_requests=8, threads=2, progress=False, **formats) as llm:
            for _ in range(count):
                params, prompt = replace(random_params(draw), n=1), llm.encode(draw.choice(BEGINNINGS))
                request = answer_of(llm, prompt, params)
                payload = llm.new_receipt(params, True)(request, 0).envelope.payload
                forged = replace(from_bytes(payload), model=judge.model)
                right = judge.answer(prompt, params)
                is_same = request.leaves.answer == right.leaves.answer and request.leaves.prompt == right.leaves.prompt
                same += is_same
                accepted += judge.verdict(forged).is_true and not is_same
        print(f"answers by {formats} under the true model's name: {count}, of which {same} are the true model's; "
              f"{accepted} others accepted", flush=True)  # fmt: skip
    return accepted


def answer_of(llm, prompt, params):
    [request] = llm.engine.make(prompt, params, receipt=True)
    llm.engine.queue(request)
    run(llm.engine)
    return request


def copied_weights(copies):
    """A context in which engines read copies of their packed weights, kept in `copies`: memory that can be written."""
    arrays = PackedStore.arrays

    def copied(store, weight, layout):
        key = weight.name, layout.name
        if key not in copies:
            copies[key] = tuple(map(copy_of, arrays(store, weight, layout)))
        return copies[key]

    return mock.patch.object(PackedStore, "arrays", copied)


def copy_of(array):
    made = aligned(array.nbytes).view(array.dtype).reshape(array.shape)
    made[...] = array
    return made
