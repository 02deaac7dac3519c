"""Planted faults: each makes an honest receipt false, or a forged one true, which the tests of both kinds then show."""

import random
import struct
from dataclasses import replace

import pytest

from lockstep.engine import leaves as leaf_module
from lockstep.engine.leaves import LEAF_BYTES, Leaves
from lockstep.engine.request import SamplingParams
from lockstep.llm import LLM
from lockstep.receipts import merkle, parameters, replay, verify
from lockstep.receipts.envelope import Envelope
from lockstep.receipts.replay import InTurn, Records, Replay
from lockstep.receipts.statement import from_bytes
from tests.receipts.forgeries import FORGERIES, Honest, answered, with_leaves

PROMPT = "def add(a, b):\n    return"
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
PARAMS = SamplingParams(
    max_tokens=20, temperature=0.9, top_k=30, seed=5, n=2, repetition_penalty=1.3, min_tokens=4, prompt_logprobs=0
)


@pytest.fixture(scope="module")
def llm():
    with LLM(threads=1, max_context=512, max_requests=4, progress=False) as made:
        yield made


def are_honest_true(llm):
    """Whether receipts of honest answers are true: of two samples, and of one held to a schema."""
    made = llm.generate(PROMPT, PARAMS, receipt=True)[0].samples
    made += llm.generate(PROMPT, replace(PARAMS, n=1, prompt_logprobs=None), receipt=True, schema=SCHEMA)
    try:
        return all(llm.verify(each.receipt).is_true for each in made)
    except KeyError:  # a row whose hidden state nobody asked for
        return False


def wrong_row(patch):
    """The digest is that of the row before."""
    take = Leaves.take

    def shifted(self, request, span, hidden_ED):
        take(self, request, span, hidden_ED if len(hidden_ED) < 2 else hidden_ED[[0, *range(len(hidden_ED) - 1)]])

    patch.setattr(Leaves, "take", shifted)


def other_logprob(patch):
    """The log-probability is the float32 beside the right one."""
    made = leaf_module.leaf

    def beside(token, logprob, hidden_D):
        [bits] = struct.unpack("<I", struct.pack("<f", logprob))
        return made(token, struct.unpack("<f", struct.pack("<I", bits + 1))[0], hidden_D)

    patch.setattr(leaf_module, "leaf", beside)


def last_leaf_missing(patch):
    """The prover's tree lacks the last leaf."""
    hashes = merkle.leaf_hashes
    from lockstep.receipts import receipt

    patch.setattr(receipt, "leaf_hashes", lambda leaves, size: hashes(leaves[:-size], size))


def parameter_left_out(patch):
    """A parameter is not in the statement."""
    to_json = parameters.to_json

    def without(params):
        return {name: value for name, value in to_json(params).items() if name != "repetition_penalty"}

    patch.setattr(parameters, "to_json", without)


def mask_not_replayed(patch):
    """The verifier forgets the form."""
    patch.setattr(InTurn, "__call__", lambda self, output_ids: None)


def samples_share_a_seed(patch):
    """The verifier takes the request's seed for every sample."""
    patch.setattr(replay, "sample_seed", lambda seed, index: seed)


def position_off_by_one(patch):
    """The verifier's noise is that of the next position."""
    of = Records.of

    def moved(self, at, num_rows):
        return [r | dict(position=r["position"] + 1) if "position" in r else r for r in of(self, at, num_rows)]

    patch.setattr(Records, "of", moved)


HONEST = (
    wrong_row,
    other_logprob,
    last_leaf_missing,
    parameter_left_out,
    mask_not_replayed,
    samples_share_a_seed,
    position_off_by_one,
)


@pytest.mark.parametrize("fault", HONEST, ids=lambda fault: fault.__name__)
def test_honest_receipts_show_a_fault(fault, llm, monkeypatch):
    assert are_honest_true(llm)
    fault(monkeypatch)
    assert not are_honest_true(llm)


# ------------------------------------------------------------ faults that let forgeries pass


def last_token(honest, draw, vocab_size):
    """The last token is another one, in the tree, too: no later hidden state shows it."""
    ids = list(honest.statement.answer.ids)
    ids[-1] = (ids[-1] + 1) % vocab_size
    leaves = bytearray(honest.leaves)
    leaves[-LEAF_BYTES : -LEAF_BYTES + 4] = struct.pack("<I", ids[-1])
    return answered(with_leaves(honest.statement, leaves), ids=tuple(ids))


def tokens_not_compared(patch):
    compare = Replay._take_row  # noqa: SLF001

    def as_claimed(self, at, row, hidden_D, token, logprob):
        number = at - len(self._of.prompt_ids) + 1
        compare(self, at, row, hidden_D, self._of.output_ids[number] if number >= 0 else token, logprob)

    patch.setattr(Replay, "_take_row", as_claimed)


def end_not_compared(patch):
    patch.setattr(verify, "_check_ending", lambda statement, found: None)


def root_not_compared(patch):
    patch.setattr(verify, "root_of", lambda leaves, size: AnyRoot())


class AnyRoot(bytes):
    """Equal to every root."""

    __hash__ = bytes.__hash__

    def __eq__(self, other):
        return True

    def __ne__(self, other):
        return False


def model_not_compared(patch):
    patch.setattr(verify, "difference", lambda *_: None)


FORGED = {
    tokens_not_compared: [last_token],
    end_not_compared: [FORGERIES["finish reason"], FORGERIES["cut answer"]],
    root_not_compared: [FORGERIES["root bit"], FORGERIES["logprob ulp"], FORGERIES["digest bit"]],
    model_not_compared: [FORGERIES["other template"], FORGERIES["other content"], FORGERIES["other KV format"]],
}


@pytest.mark.parametrize("fault", FORGED, ids=lambda fault: fault.__name__)
def test_forged_receipts_show_a_fault(fault, llm, monkeypatch):
    params = replace(PARAMS, n=1, ignore_eos=True, prompt_logprobs=None)
    [request] = llm.engine.make(llm.encode(PROMPT), params, receipt=True)
    llm.engine.queue(request)
    while llm.engine.has_work:
        llm.engine.step()
    made = llm.new_receipt(params, True)(request, 0)
    honest, draw = Honest(from_bytes(made.envelope.payload), bytes(request.leaves.answer)), random.Random(1)
    forged = [Envelope(forge(honest, draw, llm.vocab_size).to_bytes()) for forge in FORGED[fault]]
    assert not any(llm.verify(each).is_true for each in forged)
    fault(monkeypatch)
    assert all(llm.verify(each).is_true for each in forged)
