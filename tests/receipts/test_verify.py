"""Receipts of honest answers are true; a receipt that claims anything else is false, or cannot be checked."""

import dataclasses

import pytest

from lockstep.engine.request import SamplingParams
from lockstep.llm import LLM
from lockstep.receipts.around.asked import Asked
from lockstep.receipts.envelope import Envelope
from lockstep.receipts.errors import ReceiptError
from lockstep.receipts.fields import ids_digest
from lockstep.receipts.merkle import root_of
from lockstep.receipts.parameters import seed_of
from lockstep.receipts.receipt import ReceiptOptions, statement_of
from lockstep.receipts.statement import commitment, from_bytes
from lockstep.receipts.verify import Given

PROMPT = "def add(a, b):\n    return"
SAMPLED = SamplingParams(max_tokens=24, temperature=0.9, top_p=0.95, seed=11, ignore_eos=True)
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}


@pytest.fixture(scope="module")
def llm():
    with LLM(threads=1, max_context=512, max_requests=4, progress=False) as made:
        yield made


@pytest.fixture(scope="module")
def answer(llm):
    [made] = llm.generate(PROMPT, SAMPLED, receipt=ReceiptOptions(tags=True, nonce="n"))
    return made


@pytest.fixture(scope="module")
def statement(answer):
    return from_bytes(answer.receipt.envelope.payload)


def verdict(llm, statement, **given):
    return llm.verify(Envelope(statement.to_bytes()), Given(**given) if given else None)


def test_honest_answers_are_true(llm):
    cases = [
        (SamplingParams(max_tokens=20), {}),
        (dataclasses.replace(SAMPLED, n=3), {}),
        (dataclasses.replace(SAMPLED, prompt_logprobs=2, logprobs=1), {}),
        (dataclasses.replace(SAMPLED, stop=("\n",), presence_penalty=0.5, min_tokens=3), {}),
        (SamplingParams(max_tokens=40, temperature=1.0, seed=3), dict(schema=SCHEMA)),
        (SamplingParams(max_tokens=40, temperature=1.0, n=2), dict(regex="[a-z]+ [a-z]+")),
    ]
    for params, form in cases:
        for options in (True, ReceiptOptions(tags=True, is_detached=True, hides_prompt=True)):
            made = llm.generate([PROMPT, "x"], params, receipt=options, **form)
            for sample in (sample for each in made for sample in each.samples):
                given = Given()
                if options is not True:
                    mask = llm.held_to([params], **form)[0].logits_mask if form else None
                    given = Given(sample.prompt_token_ids, sample.token_ids, sample.receipt.salt, mask)
                found = llm.verify(sample.receipt.to_bytes(), given)
                assert (found.code, found.reason, found.text) == (0, "", sample.text)


def test_chats_and_streams_have_receipts(llm):
    messages = [{"role": "user", "content": "Hello"}]
    assert llm.verify(llm.chat(messages, SAMPLED, receipt=True).receipt).is_true
    with llm.stream_chat(messages, SAMPLED, receipt=True) as stream:
        assert len(list(stream)) > 1
    assert llm.verify(stream.completion.receipt).is_true
    stream = llm.stream(PROMPT, SAMPLED, receipt=True)
    next(stream)
    stream.close()
    left = stream.completion.receipt
    assert from_bytes(left.envelope.payload).answer.finish_reason == "cancelled" and llm.verify(left).is_true
    assert llm.generate(PROMPT, SAMPLED)[0].receipt is None


def test_the_same_request_has_the_same_receipt(llm, answer):
    [again] = llm.generate(PROMPT, SAMPLED, receipt=ReceiptOptions(tags=True, nonce="n"))
    assert again.receipt.to_bytes() == answer.receipt.to_bytes()
    [resumed] = llm.generate(
        PROMPT, SAMPLED, output_ids=answer.token_ids[:9], receipt=ReceiptOptions(tags=True, nonce="n")
    )
    assert resumed.receipt.to_bytes() == answer.receipt.to_bytes()


def replaced(statement, part, **changes):
    return dataclasses.replace(statement, **{part: dataclasses.replace(getattr(statement, part), **changes)})


def test_a_wrong_token_is_named(llm, statement):
    ids = list(statement.answer.ids)
    ids[13] = (ids[13] + 1) % llm.vocab_size
    found = verdict(llm, replaced(statement, "answer", ids=tuple(ids)))
    right = statement.answer.ids[13]
    assert (found.code, found.what, found.position, found.claimed, found.found) == (1, "token", 13, ids[13], right)
    assert found.reason == f"token 13 of the answer is {ids[13]}, the model chooses {right}"


def test_what_else_is_false(llm, statement, answer):
    ids = statement.answer.ids
    tags = bytearray(statement.answer.tags)
    tags[2 * 7] ^= 1
    prompt = (*statement.prompt.ids[:-1], statement.prompt.ids[-1] ^ 1)
    other_prompt = replaced(statement, "prompt", ids=prompt, digest=ids_digest(prompt))
    short = replaced(statement, "answer", tokens=20, ids=ids[:20], tags=statement.answer.tags[:40])
    cases = {
        "root": replaced(statement, "answer", root=bytes(32), tags=None),
        "leaf": replaced(statement, "answer", tags=bytes(tags)),
        "token": replaced(statement, "answer", ids=ids[::-1]),
        "token ": other_prompt,
        "token  ": replaced(statement, "params", seed=12),
        "finish_reason": short,
        "stop_reason": replaced(statement, "answer", stop_reason=5),
        "finish_reason ": replaced(statement, "answer", finish_reason="stop"),
        "tokens": replaced(statement, "params", stop_token_ids=(ids[3],)),
        "prompt": None,
    }
    for what, changed in cases.items():
        found = verdict(llm, changed) if changed else verdict(llm, statement, prompt_ids=[1, 2])
        assert (found.code, found.what) == (1, what.strip()), what
    found = verdict(llm, statement, output_ids=[*ids[:5], 0, *ids[6:]])
    assert (found.code, found.what, found.position) == (1, "token", 5)
    assert verdict(llm, statement, output_ids=ids[:5]).what == "tokens"
    assert verdict(llm, statement, output_ids=ids).is_true and verdict(llm, statement).text == answer.text


def test_a_log_probability_or_digest_that_is_off_by_one_bit_is_false(llm):
    params = dataclasses.replace(SAMPLED, prompt_logprobs=0)
    for name in ("answer", "prompt"):
        for byte in (4, 8, 39):
            request = llm.start(PROMPT, params, receipt=True).request
            while request.finish_reason is None:
                llm.engine.step()
            getattr(request.leaves, name)[3 * 40 + byte] ^= 1
            found = llm.verify(llm.new_receipt(params, True)(request, 0))
            assert (found.code, found.what) == (1, "root" if name == "answer" else "prompt.root")


def test_what_cannot_be_checked_here(llm, statement):
    other = dataclasses.replace(statement.model, content="0" * 64)
    hidden = dataclasses.replace(
        statement.prompt, ids=None, is_hidden=True, digest=commitment(b"s" * 32, statement.prompt.ids)
    )
    form = dict(grammar='{"grammars":[]}', library="llguidance 0.0.1")
    cases = {
        "model.content": dataclasses.replace(statement, model=other),
        "numerics": dataclasses.replace(statement, numerics=3),
        "prompt": statement.detached(),
        "prompt ": dataclasses.replace(statement, prompt=hidden),
        "form.library": dataclasses.replace(statement, form=form),
        "form": dataclasses.replace(statement, form=dict(form, library=own_library())),
        "tokens": long_statement(statement),
    }
    for what, changed in cases.items():
        found = verdict(llm, changed)
        assert (found.code, found.what) == (2, what.strip()), (what, found)
    given = dict(prompt_ids=statement.prompt.ids, salt=b"s" * 32)
    assert verdict(llm, dataclasses.replace(statement, prompt=hidden), **given).is_true
    wrong = given | dict(salt=b"t" * 32)
    assert verdict(llm, dataclasses.replace(statement, prompt=hidden), **wrong).what == "prompt"
    assert verdict(llm, statement.detached(), prompt_ids=statement.prompt.ids).what == "answer"


def own_library():
    from lockstep.receipts.form import LIBRARY

    return LIBRARY


def long_statement(statement):
    ids = statement.prompt.ids * 200
    model = dataclasses.replace(statement.model, context=1 << 20)
    return replaced(
        dataclasses.replace(statement, model=model), "prompt", ids=ids, digest=ids_digest(ids), tokens=len(ids)
    )


def test_tokens_that_the_model_does_not_have(llm, statement):
    size = llm.vocab_size
    for change in (dict(logit_bias={size: 1.0}), dict(suppress_tokens=(size,)), dict(stop_token_ids=((1 << 31) - 1,))):
        assert verdict(llm, replaced(statement, "params", **change)).what == "sampling"
    form = dict(grammar='{"grammars":[]}', trigger=size, library=own_library())
    assert verdict(llm, dataclasses.replace(statement, form=form)).what == "form"


def test_of_what_no_receipt_is_made(llm):
    own = dataclasses.replace(SAMPLED, logits_mask=lambda output_ids: None)
    with pytest.raises(ReceiptError, match="got a logits_mask of your own"):
        llm.generate(PROMPT, own, receipt=True)
    with pytest.raises(ReceiptError, match="nonce: expected up to 128 printable"):
        ReceiptOptions(nonce="\n")
    stream = llm.start(PROMPT, SAMPLED)
    while stream.request.finish_reason is None:
        llm.engine.step()
    with pytest.raises(ReceiptError, match="not made with receipt=True"):
        llm.new_receipt(SAMPLED, True)(stream.request, 0)
    with pytest.raises(ReceiptError, match="expected a receipt or its JSON text, got 5"):
        llm.verify(5)


def test_a_receipt_of_no_tokens(llm, statement):
    empty = replaced(statement, "answer", tokens=0, ids=(), tags=b"", root=root_of(b"", 40), finish_reason="cancelled")
    assert verdict(llm, empty).is_true
    assert verdict(llm, replaced(empty, "answer", root=bytes(32))).what == "root"


@pytest.mark.parametrize("receipt", [{"nonce": "a"}, "yes", 1, 0, None, "", {}])
def test_what_asks_for_no_receipt_is_refused(llm, receipt):
    with pytest.raises(ReceiptError, match="receipt: expected True, False or ReceiptOptions"):
        llm.generate("x", SamplingParams(max_tokens=1), receipt=receipt)
    with pytest.raises(ReceiptError, match="receipt: expected True, False or ReceiptOptions"):
        llm.stream("x", SamplingParams(max_tokens=1), receipt=receipt)


def test_options_of_other_types_are_refused(llm, answer):
    for name, value in dict(tags="yes", is_detached=1, hides_prompt=None, key="file").items():
        with pytest.raises(ReceiptError, match=f"{name}: expected"):
            ReceiptOptions(**{name: value})
    for given in ({"salt": b""}, 5, Given(prompt_ids="text"), Given(output_ids=[0.5]), Given(salt="00" * 32)):
        with pytest.raises(ReceiptError, match="given"):
            llm.verify(answer.receipt, given)


def test_no_receipt_is_made_that_nobody_could_read(llm):
    for params in (
        SamplingParams(stop=tuple(f"stop {i}" for i in range(100))),
        SamplingParams(stop=("s" * 5000,)),
        SamplingParams(stop=("\ud800",)),
    ):
        with pytest.raises(ReceiptError):
            llm.generate("x", params, receipt=True)


def test_reasons_name_no_options_of_the_command_line(llm, statement):
    hidden = dataclasses.replace(
        statement.prompt, digest=commitment(b"1" * 32, statement.prompt.ids), is_hidden=True, ids=None
    )
    cases = [
        (statement.detached(), {}),
        (dataclasses.replace(statement, prompt=hidden), {}),
        (dataclasses.replace(statement, prompt=hidden), dict(prompt_ids=statement.prompt.ids)),
        (statement.detached(), dict(prompt_ids=statement.prompt.ids)),
    ]
    for each, given in cases:
        found = verdict(llm, each, **given)
        assert found.code == 2 and "--" not in found.reason
    wrong = verdict(llm, cases[1][0], prompt_ids=statement.prompt.ids, salt=b"2" * 32)
    assert wrong.code == 1 and "or the salt is" in wrong.reason


def test_a_true_verdict_has_the_log_probabilities(llm, answer):
    found = llm.verify(answer.receipt)
    assert list(found.logprobs) == answer.logprobs and found.prompt_logprobs == ()
    [scored] = llm.generate("import os", SamplingParams(max_tokens=1, prompt_logprobs=0), receipt=True)
    assert list(llm.verify(scored.receipt).prompt_logprobs) == scored.prompt_logprobs


def test_what_was_asked_for_from_python(llm):
    params, ids = SamplingParams(max_tokens=6, temperature=0.8, seed=3), llm.encode("import os")
    [made] = llm.generate("import os", params, receipt=ReceiptOptions(nonce="mine"))
    of = statement_of(made.receipt)
    assert Asked([(ids, params)], nonce="mine").difference(of) is None
    for asked, what in (
        (Asked([(ids, params)]), "nonce"),
        (Asked([(ids[1:], params)], nonce="mine"), "prompt"),
        (Asked([(ids, dataclasses.replace(params, temperature=0.81))], nonce="mine"), "sampling.temperature"),
        (Asked([(ids, params)], nonce="mine", begun=[[[5]]]), "continue_from"),
    ):
        assert asked.difference(of).what == what
    seeded = Asked([(ids, params)], has_seed=False, nonce="mine").difference(of)
    assert seeded.reason == f"the request has seed {seed_of('mine', ids)}, the receipt 3"
