"""Valid requests of every route that takes a body, and random damage to them."""

import json
import random

from lockstep.engine.request import SamplingParams
from lockstep.engine.selfcheck.check import NUMERICS
from lockstep.receipts.envelope import Envelope, Signature
from lockstep.receipts.fields import ids_digest
from lockstep.receipts.identity import ModelPart
from lockstep.receipts.statement import AnswerPart, PromptPart, Statement
from tests.serve.raw import head

KINDS = "value", "body", "header", "anything"
MESSAGES = [dict(role="user", content="hello")]
SCHEMA = dict(
    type="object",
    required=["a"],
    properties=dict(
        a=dict(type="string", maxLength=3, pattern="^a", format="date"),
        c=dict(enum=["x", None]),
        b=dict(anyOf=[dict(type="null"), {"$ref": "#/$defs/x"}]),
    ),
    **{"$defs": dict(x=dict(type="array", items=dict(type="integer", maximum=3)))},
)
TOOL = dict(name="f", description="d", parameters=SCHEMA, strict=False)
CALL = dict(id="c", type="function", function=dict(name="f", arguments='{"a": 1}'))
TALK = [
    dict(role="system", content="s"),
    *MESSAGES,
    dict(role="assistant", content=None, tool_calls=[CALL]),
    dict(role="tool", tool_call_id="c", content=[dict(type="text", text="r")]),
]
# a receipt of another model: what it says is read, and nothing is computed
STATEMENT = Statement(
    numerics=NUMERICS,
    model=ModelPart("m", "c" * 64, "f" * 64, "auto", "bf16", (0,), 64),
    prompt=PromptPart(1, ids_digest([5]), ids=(5,)),
    params=SamplingParams(max_tokens=2, temperature=0.5, logit_bias={5: 1.0}, stop=("x",)),
    answer=AnswerPart(2, b"r" * 32, "length", None, (5, 6), b"tags"),
    form=dict(tokens=dict(allowed=[5, 6], banned=[[5, 6]], ends=[0])),
    nonce="n",
)
RECEIPT = Envelope(STATEMENT.to_bytes(), signatures=(Signature("key", b"s" * 64),)).to_object()
# a form, whose purpose is one that is refused: nothing is kept
FORM = (
    b'--x\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n--x\r\nContent-Disposition: form-data; '
    b'name="file"; filename="a.jsonl"\r\nContent-Type: application/jsonl\r\n\r\n{"custom_id": "a"}\r\n--x--\r\n'
)
BODIES = {
    "/v1/files": {},
    "/v1/batches": dict(
        input_file_id="file-0", endpoint="/v1/completions", completion_window="24h", metadata=dict(a="b")
    ),
    "/v1/batches/{name}/cancel": {},
    "/v1/completions": dict(
        prompt="x",
        max_tokens=2,
        temperature=0.5,
        top_p=0.9,
        n=2,
        stop=["a"],
        logprobs=1,
        echo=True,
        logit_bias={"5": 1},
        stream=True,
        stream_options=dict(include_usage=True),
        seed=1,
        continue_from=[[5], []],
    ),
    "/v1/chat/completions": dict(
        messages=MESSAGES,
        max_tokens=2,
        temperature=0.5,
        n=1,
        stop="a",
        logprobs=True,
        top_logprobs=1,
        stream=False,
        seed=1,
        tools=[],
        tool_choice="none",
        response_format=dict(type="text"),
    ),
    "/v1/messages": dict(
        model="lockstep",
        messages=MESSAGES,
        max_tokens=2,
        system="s",
        stop_sequences=["a"],
        tools=[dict(name="f", input_schema=SCHEMA)],
        tool_choice=dict(type="any"),
    ),
    "/v1/responses": dict(
        input="hello",
        max_output_tokens=2,
        instructions="s",
        stream=False,
        top_logprobs=1,
        tools=[dict(type="function", **TOOL)],
        include=["message.output_text.logprobs"],
    ),
    "/v1/responses/input_tokens": dict(
        input=[
            dict(role="user", content=[dict(type="input_text", text="x")]),
            dict(type="function_call", call_id="c", name="f", arguments="{}"),
            dict(type="function_call_output", call_id="c", output="r"),
        ]
    ),
    "/v1/embeddings": dict(input=["x", "y"], encoding_format="float"),
    "/tokenize": dict(messages=TALK, tools=[dict(type="function", function=TOOL)], add_generation_prompt=True),
    "/v1/messages/count_tokens": dict(messages=MESSAGES, system="s", tools=[dict(name="f", input_schema=SCHEMA)]),
    "/detokenize": dict(tokens=[5, 6]),
    "/v1/receipts/verify": dict(
        receipt=RECEIPT, request=dict(prompt="x", max_tokens=2), token_ids=[5, 6], prompt_token_ids=[5], salt="00" * 32
    ),
}
# values that have broken parsers
ODD = [
    None,
    True,
    False,
    0,
    -1,
    1,
    2,
    5.5,
    -0.0,
    1e308,
    1 << 31,
    1 << 63,
    -(1 << 63),
    1 << 200,
    "",
    "x",
    "\0",
    "\ud800",
    "\N{PILE OF POO}" * 9,
    "-1",
    "NaN",
    "x" * 3000,
    [],
    [None],
    [[]],
    [[[]]],
    {},
    {"a": {}},
    [1, "x"],
    [-1],
    [1 << 40],
    {"": ""},
    {"type": "x"},
    [{}],
    [{"role": 5}],
    ["", ""],
    {"5": "x"},
    {"$ref": "#"},
    [True, False],
]
HEADERS = [
    "Content-Length: 5",
    "Content-Length: -1",
    "Content-Length: 99999999999999999999",
    "Content-Length: 0x10",
    "Transfer-Encoding: chunked",
    "Transfer-Encoding: gzip",
    "Connection: upgrade\r\nUpgrade: websocket",
    "Connection: upgrade\r\nUpgrade: h2c",
    "Content-Type: text/xml",
    "Content-Encoding: gzip",
    "Expect: 100-continue",
    "Expect: x",
    "Host:",
    "Host: a\r\nHost: b",
    "Authorization: \xff\xfe",
    "X: \x00",
    "X" * 300 + ": y",
    ": y",
    "Accept-Encoding: br;q=nan",
    "Origin: null",
    "Cookie: " + "a" * 5000,
    "Range: bytes=0-",
    "X-HTTP-Method-Override: DELETE",
]


def damaged_value(rng: random.Random, value: object) -> object:
    """A JSON value with one place changed."""
    if rng.random() < 0.3 or not isinstance(value, (dict, list)) or not value:
        return rng.choice(ODD)
    if isinstance(value, list):
        at = rng.randrange(len(value))
        return [*value[:at], damaged_value(rng, value[at]), *value[at + 1 :]] * rng.choice([1, 1, 1, 40])
    name = rng.choice(list(value))
    return {**value, name: damaged_value(rng, value[name])}


def damaged_bytes(rng: random.Random, raw: bytes) -> bytes:
    """Bytes with a few changed, cut or doubled."""
    made = bytearray(raw)
    for _ in range(rng.randrange(1, 6)):
        at = rng.randrange(len(made) or 1)
        cut = slice(at, at + rng.randrange(1, 20))
        made[cut] = rng.choice([b"", bytes([rng.randrange(256)]), made[cut] * 2, b'"', b"}", b"[" * 50, b"\\u"])
    return bytes(made)


def damaged_request(rng: random.Random, path: str, kinds: tuple[str, ...] = KINDS) -> bytes:
    """A request with damage of one of these kinds: a value of the body, bytes of the body, a header, bytes anywhere."""
    body, kind = BODIES[path], rng.choice(kinds)
    sent = damaged_value(rng, body) if kind == "value" else body
    raw = FORM if path == "/v1/files" else json.dumps(sent).encode()
    raw = damaged_bytes(rng, raw) if kind == "body" else raw
    form = dict(Content_Type="multipart/form-data; boundary=x") if path == "/v1/files" else {}
    whole = head(path=path, Connection="close", Content_Length=len(raw), **form) + raw
    if kind == "header":
        line, rest = whole.split(b"\r\n", 1)
        whole = line + b"\r\n" + rng.choice(HEADERS).encode("latin-1") + b"\r\n" + rest
    return damaged_bytes(rng, whole) if kind == "anything" else whole
