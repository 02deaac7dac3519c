"""Statements: what is written is read again with the same bits, and everything else is refused."""

import dataclasses
import random
import struct

import numpy as np
import pytest

from lockstep.engine.request import BOUNDS, SamplingParams
from lockstep.engine.sampling import Adjustment
from lockstep.engine.selfcheck.check import NUMERICS
from lockstep.engine.step_arrays import SAMPLING_RECORD, records_view, write_record
from lockstep.receipts import parameters, strict_json
from lockstep.receipts.errors import ReceiptError
from lockstep.receipts.fields import ids_digest
from lockstep.receipts.identity import ModelPart, difference
from lockstep.receipts.statement import (
    AnswerPart,
    PromptPart,
    Statement,
    commitment,
    from_bytes,
    packed,
    unpacked,
)

MODEL = ModelPart("a model", "c" * 64, "f" * 64, "q8_0", "bf16", (0, 2), 4096, None, "d" * 64, "e" * 64)
IDS, OUTPUT = (1, 70_000, (1 << 24) - 1), (5, 6, 7, 8)
PARAMS = SamplingParams(max_tokens=9, temperature=0.8, seed=-(1 << 63), n=3, stop=("\n", "ü"), logit_bias={7: -0.3})
GRAMMAR = dict(grammar='{"grammars":[]}', trigger=5, once=True, library="llguidance 1.9.1")


def made(**changes):
    known = dict(
        numerics=NUMERICS,
        model=MODEL,
        prompt=PromptPart(3, ids_digest(IDS), ids=IDS),
        params=PARAMS,
        answer=AnswerPart(4, b"r" * 32, "stop", 2, OUTPUT, b"tagstags"),
        sample=2,
        form=dict(tokens=dict(allowed=[1, 2], banned=[[3, 4]], ends=[0]), inside=GRAMMAR),
        endpoint="/v1/completions",
        nonce="a nonce",
    )
    return Statement(**known | changes)


STATEMENTS = [
    made(),
    made(form=None, endpoint=None, nonce=None, sample=0, params=SamplingParams(max_tokens=4)),
    made(form=dict(until_complete=GRAMMAR)),
    made().detached(),
    made(prompt=PromptPart(3, commitment(b"s" * 32, IDS), is_hidden=True)),
    made(
        params=dataclasses.replace(PARAMS, prompt_logprobs=0),
        prompt=PromptPart(3, ids_digest(IDS), ids=IDS, root=b"p" * 32),
    ),
    made(answer=AnswerPart(0, b"e" * 32, "cancelled", None, ())),
    made(model=dataclasses.replace(MODEL, tokenizer=None, chat_template=None, plan="a" * 64)),
    made(model=dataclasses.replace(MODEL, rope="short")),
]


def test_statements_are_read_as_they_were_written():
    for statement in STATEMENTS:
        read = from_bytes(statement.to_bytes())
        assert read.to_bytes() == statement.to_bytes()
        assert dataclasses.replace(read, params=PARAMS) == dataclasses.replace(statement, params=PARAMS)


def test_a_detached_statement_has_no_tokens_and_no_grammar():
    detached = made().detached()
    assert detached.prompt.ids is detached.answer.ids is None and detached.prompt.is_of(IDS)
    assert b"grammars" not in detached.to_bytes() and b"grammar_sha256" in detached.to_bytes()


def test_token_ids_take_three_bytes_each():
    assert unpacked(bytes([1, 0, 0, 0x70, 0x11, 1, 255, 255, 255])) == (1, 70_000, (1 << 24) - 1) == IDS
    assert packed(IDS) == "AQAAcBEB////" and packed([]) == ""


def test_a_commitment_is_only_of_its_prompt_and_salt():
    hidden = PromptPart(3, commitment(b"s" * 32, IDS), is_hidden=True)
    assert hidden.is_of(IDS, b"s" * 32)
    assert not hidden.is_of(IDS, b"t" * 32) and not hidden.is_of(IDS) and not hidden.is_of(IDS[:2], b"s" * 32)
    assert not hidden.is_of((1, 70_001, IDS[2]), b"s" * 32) and not hidden.is_of((1, -1, 2), b"s" * 32)


@pytest.mark.parametrize("place, value, said", [
    ("version", 2, "version: expected 1, got 2"),
    ("version", True, "version: expected 1"),
    ("extra", 1, "extra: expected no such field"),
    ("numerics", 0, "numerics: expected an integer"),
    ("model.content", "C" * 64, "model.content: expected 64 hexadecimal digits"),
    ("model.kv_dtype", "f16", "model.kv_dtype: expected one of f32, bf16, q8"),
    ("model.more", 1, "model.more: expected no such field"),
    ("model.eos", [-1], "model.eos"),
    ("prompt.tokens", 4, "prompt.ids: expected base64 of 12 bytes, 16 characters"),
    ("prompt.tokens", 0, "prompt.tokens"),
    ("prompt.tokens", 1 << 23, "prompt.tokens: expected an integer from 1"),
    ("prompt.sha256", "0" * 64, "prompt.ids: their SHA-256 is another"),
    ("prompt.commitment", "0" * 64, "prompt.ids: expected none with a commitment|prompt.sha256"),
    ("prompt.root", "0" * 64, "prompt.root: expected exactly where"),
    ("sampling.temperature", "3f4cccc", "sampling.temperature: expected 8 hexadecimal digits"),
    ("sampling.temperature", 0.5, "integers as numbers"),
    ("sampling.temperature", "7fc00000", "sampling.temperature"),
    ("sampling.top_p", "00000000", "sampling.top_p"),
    ("sampling.seed", 5, "sampling.seed: expected a text"),
    ("sampling.seed", "05", "sampling.seed: expected decimal digits"),
    ("sampling.seed", str(1 << 63), "sampling.seed"),
    ("sampling.n", 0, "sampling.n"),
    ("sampling.logits_mask", 1, "sampling.logits_mask: expected no such field"),
    ("sampling.pooling", "mean", "sampling.pooling: expected no such field"),
    ("sampling.logit_bias", {"07": "3f800000"}, "sampling.logit_bias.07: expected a token id"),
    ("sampling.logit_bias", {"7": "ff800000"}, "sampling.logit_bias"),
    ("sampling.logit_bias", {"2147483648": "3f800000"}, "sampling.logit_bias.2147483648: expected a token id"),
    ("model.context", 11, "model.context: expected room for the prompt and sampling.max_tokens, got 3 [+] 9 in 11"),
    ("sampling.stop", [""], "sampling.stop"),
    ("sampling.stop", ["x"] * 65, "at most 64 texts"),
    ("sampling.max_tokens", 3, "answer.tokens: expected an integer from 0 to 3"),
    ("sample", 3, "sample: expected an integer from 0 to 2"),
    ("answer.tokens", 5, "answer.(tags|ids): expected base64"),
    ("answer.finish_reason", "error", "answer.finish_reason: expected one of stop, length, cancelled"),
    ("answer.stop_reason", [], "answer.stop_reason"),
    ("answer.root", "", "answer.root: expected 64"),
    ("nonce", "ü", "nonce: expected up to 128 printable ASCII"),
    ("nonce", "x" * 129, "nonce"),
    ("form", {}, "form.grammar: expected, but missing"),
    ("form", dict(GRAMMAR, once=False), "form.once: expected true or no such field"),
    ("form", dict(GRAMMAR, more=1), "form.more"),
    ("form", dict(GRAMMAR, trigger=-1), "form.trigger"),
    ("form", dict(until_complete=dict(until_complete=dict(until_complete=dict(until_complete=GRAMMAR)))), "at most 3"),
    ("form", dict(tokens=dict(allowed=[1.5], banned=[], ends=[])), "integers as numbers"),
    ("form", dict(tokens=dict(banned=[[]], ends=[])), "form.tokens.banned"),
    ("endpoint", "/" * 65, "endpoint"),
])  # fmt: skip
def test_statements_that_are_refused(place, value, said):
    changed = strict_json.loads(made().to_bytes())
    *path, name = place.split(".")
    part = changed[path[0]] if path else changed
    part[name] = value
    text = strict_json.json.dumps(changed).encode()
    with pytest.raises(ReceiptError, match=said):
        from_bytes(text)


def test_every_part_must_be_there():
    for name in ("version", "numerics", "model", "prompt", "sampling", "answer"):
        changed = strict_json.loads(made().to_bytes())
        del changed[name]
        with pytest.raises(ReceiptError, match=f"{name}: expected, but missing"):
            from_bytes(strict_json.dumps(changed))


def test_changed_bytes_are_refused_or_another_statement():
    draw, num_read = random.Random(2), 0
    for statement in STATEMENTS:
        text = statement.to_bytes()
        for _ in range(400):
            at, size = draw.randrange(len(text)), draw.randint(0, 2)
            changed = (
                text[:at] + bytes(draw.choice(b'0123456789abcdef",:{}[]-') for _ in range(size)) + text[at + size :]
            )
            try:
                read = from_bytes(changed)
            except ReceiptError:
                continue
            num_read += 1
            # a statement that is read is what its bytes say, up to the order and the spaces of JSON
            assert strict_json.loads(read.to_bytes()) == strict_json.loads(changed)
    assert num_read > 100


# ------------------------------------------------------------ parameters

WHERE = {"logits_mask", "pooling"}  # in the form; refused


def test_every_parameter_is_in_the_statement():
    known = {*parameters.FLOATS, *parameters.INTEGERS, *parameters.SWITCHES, *parameters.ID_LISTS}
    fields = {field.name for field in dataclasses.fields(SamplingParams)}
    assert fields == known | {"seed", "stop", "logit_bias"} | WHERE
    assert set(parameters.ELSEWHERE) == WHERE


def random_params(draw):
    """SamplingParams of which each has a chance to be unusual."""
    low = {name: low for name, _, low, _ in BOUNDS}
    some = lambda usual, *others: draw.choice((usual, *others))
    return SamplingParams(
        max_tokens=draw.randint(3, 50),
        temperature=some(0.0, 0.001, 0.7, 1 / 3, 1e4, draw.random() + 0.01),
        top_k=some(0, 1, (1 << 31) - 1),
        top_p=some(1.0, low["top_p"], 0.1, 0.001 + 0.9 * draw.random()),
        min_p=some(0.0, 1.0, draw.random()),
        seed=some(0, -1, (1 << 63) - 1, draw.getrandbits(63)),
        stop=some((), ("a",), ("\u2028", '"')),
        stop_token_ids=some((), (3, 4)),
        ignore_eos=some(False, True),
        logprobs=some(None, 0, 5),
        prompt_logprobs=some(None, 0, 20),
        min_tokens=some(0, 2),
        include_stop_str_in_output=some(False, True),
        skip_special_tokens=some(True, False),
        repetition_penalty=some(1.0, low["repetition_penalty"], 100, 1.1),
        presence_penalty=some(0.0, -2, 0.1),
        frequency_penalty=some(0.0, 2, -0.3),
        logit_bias=some({}, {5: 100, 7: -100.0, 9: 0.1}),
        suppress_tokens=some((), (8,)),
        n=some(1, 128),
    )


def record_of(params):
    """The bytes of the SAMPLING_RECORD and of the adjustment that the kernels read."""
    fields = dict(temperature=params.temperature, top_p=params.top_p, min_p=params.min_p, top_k=params.top_k)
    records = np.zeros(1, SAMPLING_RECORD)
    write_record(records_view(records), 0, fields | dict(seed=params.seed))
    adjustment = Adjustment([1, 2], params, frozenset({0}), 64)
    penalties = [adjustment._record[name] for name in adjustment._record.dtype.names[-3:]]  # noqa: SLF001
    return records.tobytes(), np.array(penalties).tobytes(), adjustment._bias.tobytes()  # noqa: SLF001


def test_parameters_keep_the_bits_that_kernels_read():
    draw = random.Random(3)
    for _ in range(500):
        params = random_params(draw)
        written = parameters.to_json(params)
        read = parameters.from_json(strict_json.loads(strict_json.dumps(written)))
        assert record_of(read) == record_of(params) and parameters.to_json(read) == written
        whole = [name for name in (*parameters.INTEGERS, *parameters.SWITCHES, "seed", "stop", *parameters.ID_LISTS)]
        assert [getattr(read, name) for name in whole] == [getattr(params, name) for name in whole]


def test_bits_of_a_number():
    assert parameters.float_bits(0.8) == "3f4ccccd" == struct.pack(">f", 0.8).hex()
    assert parameters.to_json(SamplingParams(temperature=0.8)) == dict(temperature="3f4ccccd")
    with pytest.raises(ReceiptError, match="one for an embedding"):
        parameters.to_json(SamplingParams(pooling="last"))


# ------------------------------------------------------------ models


@pytest.mark.parametrize("name, value, said", [
    ("content", "0" * 64, "another model: the content of its files is 000000000000..., here it is cccccccccccc..."),
    ("formats", "0" * 64, "the formats of its weights"),
    ("kv_dtype", "q8", "the format of the KV cache is q8, here it is bf16"),
    ("plan", "0" * 64, "the quantization plan is 000000000000..., here it is none"),
    ("rope", "short", "the choice of rope factors is short, here it is none"),
    ("tokenizer", None, "the tokenizer is none"),
    ("chat_template", "0" * 64, "the chat template"),
    ("eos", (0,), "the tokens that end an answer"),
])  # fmt: skip
def test_another_model_is_named(name, value, said):
    found = difference(NUMERICS, dataclasses.replace(MODEL, **{name: value}), MODEL)
    assert found is not None and found[0] == f"model.{name}" and said in found[3]


def test_the_same_model_may_have_another_name_and_context():
    assert difference(NUMERICS, dataclasses.replace(MODEL, name="x", weights="auto", context=5), MODEL) is None
    assert difference(3, MODEL, MODEL)[3] == f"the arithmetic is version 3, here it is version {NUMERICS}"
