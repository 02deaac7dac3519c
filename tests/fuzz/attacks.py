"""Attacks over HTTP, found by a hostile review, each with the statuses that are right."""

import json
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from tests.fuzz.client import STATUS, exchange, read_all
from tests.fuzz.sockets import HIDDEN, OTHERS, SMUGGLING, head
from tests.serve.chatting import HELLO, THINKING

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
MB8 = (8 << 20) - 4096  # a body may have 8 MB
MANY = [float(f"1.{i:06d}1e300") for i in range(5000)]
MULTIPLES = dict(x=[dict(multipleOf=each) for each in MANY])
SLOW_SCHEMA = dict(type="integer", multipleOf=9973)
ENDLESS = dict(type="integer", multipleOf=99999989, examples=[dict(multipleOf=0)])
MIXED = "The quick brown fox, 12 äö!\n"
# what one message makes the template of the attacked model do; n, which is 1, is not known when it is compiled
TRIGGERS = {
    "round to 90 million places": "{{ n | round(90000000, 'floor') }}",
    "a quotient of long numbers": "{{ ('f' * (n * 1600000)) | int(base=16) // (('e' * (n * 800000)) | int(base=16)) }}",
    "sort 16 million numbers, 30 times": "{{ ([n] * 16777216) | sort | length }}" * 30,
    "wrap 4 million characters": "{{ ('a' * (n * 4000000)) | wordwrap(1) }}",
    "join 1.6 GB": "{% set s = 'x' * (n * 16777216) %}{{ ''.join([s] * 100) | length }}",
    "10,000 wide fields": "{{ ('{0:99999}' * (n * 10000)).format(1) }}",
    "1 GB of tabs": "{{ ('\t' * (n * 1000)).expandtabs(1048576) | length }}",
    "60 texts of 16 MB": "".join(f"{{% set b{i} = 'a' * (n * 16777216) ~ {i} %}}" for i in range(60))
    + "{{ b9 | length }}",
    "a loop without end": "{% for i in range(n * 1000000000) %}{% endfor %}",
}


class Attack(NamedTuple):
    """play: attacks the server at a port, returns the statuses of all answers, 0 for none. allowed: right statuses."""

    name: str
    play: Callable[[int], list[int]]
    allowed: set[int]
    stops: bool = False  # whether it used to keep SIGTERM from being heard


def template() -> str:
    """A usual chat template that runs the program of a TRIGGER when the last message names it."""
    parts = [f"{{% elif asked == '{name}' %}}{text}" for name, text in TRIGGERS.items()]
    return (
        "{%- set asked = messages[-1].content -%}{%- set n = messages | length -%}{%- if asked is not string -%}"
        + THINKING + "".join(parts) + "{%- else -%}" + THINKING + "{%- endif -%}"
    )  # fmt: skip


def raw(path: str, body: object, *lines: bytes) -> bytes:
    """A request, as bytes."""
    content = body if isinstance(body, bytes) else json.dumps(body, ensure_ascii=False).encode()
    return head(b"Content-Length: %d" % len(content), *lines, first=b"POST %s HTTP/1.1" % path.encode()) + content


def post(path: str, body: Callable[[], object] | dict, times: int = 1) -> Callable[[int], list[int]]:
    """Plays a request, `times` at once. body: its JSON value, or a function that makes it when it is played."""

    def play(port: int) -> list[int]:
        made = raw(path, body() if callable(body) else body)
        with ThreadPoolExecutor(times) as others:
            return [status for each in others.map(lambda _: sent(port, made), range(times)) for status in each]

    return play


def get(path: str, *lines: bytes, host: bytes = b"localhost", method: bytes = b"GET") -> Callable[[int], list[int]]:
    """Plays a request without a body."""
    first = b"%s %s HTTP/1.1\r\nHost: %s" % (method, path.encode(), host)
    return lambda port: sent(port, b"\r\n".join([first, *lines, b"", b""]))


def sent(port: int, *pieces: bytes) -> list[int]:
    """Sends bytes; returns the statuses of the answers, [0] where there is none."""
    return exchange(port, pieces).statuses or [0]


def each_of(many: list[bytes]) -> Callable[[int], list[int]]:
    """Plays each request, one after the other."""
    return lambda port: [status for one in many for status in sent(port, one)]


def beside_slow_grammars(port: int) -> list[int]:
    """Two clients send slow grammars; returns the status of a third client's small grammar."""
    with ThreadPoolExecutor(3) as others:
        for _ in range(2):
            others.submit(sent, port, raw(COMPLETIONS, dict(prompt="x", max_tokens=2, guided_json=ENDLESS)))
        time.sleep(0.3)
        small = dict(prompt="x", max_tokens=2, guided_json=dict(type="integer"))
        return others.submit(sent, port, raw(COMPLETIONS, small)).result()


def half_sent(port: int) -> list[int]:
    """Holds 1024 partial requests for 3 s; then a complete one must be answered, or refused for now."""
    held = []
    try:
        for _ in range(1024):
            held.append(socket.create_connection(("127.0.0.1", port), timeout=60))
            held[-1].sendall(b"GET /heal")
        time.sleep(3)
        found = sent(port, raw(COMPLETIONS, dict(prompt="x", max_tokens=1)))
    finally:
        for each in held:
            each.close()
    deadline = time.monotonic() + 30
    while sent(port, raw(COMPLETIONS, dict(prompt="x", max_tokens=1))) != [200]:
        assert time.monotonic() < deadline, "refused after the others have left"
        time.sleep(0.05)
    return found


def pipelined(port: int) -> list[int]:
    """Sends 2000 pipelined requests on one connection."""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n" * 2000)
        connection.shutdown(socket.SHUT_WR)
        got = bytearray()
        read_all(connection, got)
    found = [int(each) for each in STATUS.findall(got) if each != b"100"]
    return found if len(found) == 2000 else [0]


def message(text: str) -> list[dict]:
    """A conversation of one message."""
    return [dict(role="user", content=text)]


def called(arguments: str) -> list[dict]:
    """A conversation with a call of these arguments."""
    call = dict(id="call_1", type="function", function=dict(name="f", arguments=arguments))
    answered = dict(role="tool", tool_call_id="call_1", content="x")
    return [*HELLO, dict(role="assistant", content=None, tool_calls=[call]), answered, *HELLO]


def tool(parameters: object, name: str = "f", description: str = "") -> dict:
    """A tool."""
    return dict(type="function", function=dict(name=name, description=description, parameters=parameters))


def image(url: str) -> list[dict]:
    """A conversation with an image."""
    return [dict(role="user", content=[dict(type="image_url", image_url=dict(url=url))])]


GUIDED = dict(prompt="x", max_tokens=2)
TALK = dict(messages=HELLO, max_tokens=2)
FORMAT = dict(type="json_schema", json_schema=dict(name="x", schema=MULTIPLES))
DESCRIBED = [tool({}, f"f{i}", MIXED * 1000) for i in range(180)]
WIDE = dict(prompt=["a"] * 4, n=64, max_tokens=1500, logprobs=20, ignore_eos=True)
ATTACKS = [
    Attack("A1 5000 multiples, guided_json", post(COMPLETIONS, GUIDED | dict(guided_json=MULTIPLES)), {200, 400}, True),
    Attack("A1 5000 multiples, response_format", post(CHAT, TALK | dict(response_format=FORMAT)), {200, 400}),
    Attack(
        "A1 5000 multiples, a tool",
        post(CHAT, TALK | dict(tool_choice="required", tools=[tool(MULTIPLES)])),
        {400},
    ),
    Attack(
        "A1 900 multiples in a Lark grammar",
        post(COMPLETIONS, GUIDED | dict(guided_grammar="start: %json " + json.dumps(dict(anyOf=MULTIPLES["x"][:900])))),
        {400},
    ),
    Attack(
        "A1 8 MB of multiples",
        post(COMPLETIONS, lambda: GUIDED | dict(guided_json=dict(x=[dict(multipleOf=each) for each in MANY * 40]))),
        {400},
    ),
    Attack(
        "A1b a multiple of nine digits and a zero", post(COMPLETIONS, GUIDED | dict(guided_json=ENDLESS)), {400}, True
    ),
    Attack(
        "A1b twenty slow grammars at once",
        post(COMPLETIONS, GUIDED | dict(guided_json=SLOW_SCHEMA), 20),
        {200, 400, 429},
    ),
    Attack("A1b a small grammar beside slow ones", beside_slow_grammars, {200}),
    Attack("A2 8 MB of one letter", post(COMPLETIONS, lambda: dict(prompt="a" * MB8)), {400}, True),
    Attack("A2 8 MB of spaces", post(COMPLETIONS, lambda: dict(prompt=" " * MB8)), {400}),
    Attack("A2 8 MB of text, /tokenize", post("/tokenize", lambda: dict(prompt=MIXED * (MB8 // 32))), {200, 400}),
    Attack(
        "A2 the same with token strings",
        post("/tokenize", lambda: dict(prompt=MIXED * (MB8 // 32), return_token_strs=True)),
        {200, 400},
    ),
    Attack("A2 four of them at once", post("/tokenize", lambda: dict(prompt=MIXED * (MB8 // 32)), 4), {200, 400, 429}),
    Attack("A2 300,000 messages", post(CHAT, lambda: dict(messages=[dict(role="user")] * 300_000)), {400}),
    Attack("A2 30,000 messages", post(CHAT, lambda: dict(messages=[dict(role="user", content="x")] * 30_000)), {400}),
    Attack("A2 180 tools of 30 KB", post(CHAT, lambda: TALK | dict(tools=DESCRIBED)), {400}),
    Attack(
        "A2 a call with 7 MB of arguments",
        post(CHAT, lambda: dict(messages=called(json.dumps(dict(x=MIXED * 180_000))))),
        {400},
    ),
    *[Attack(f"A3 {name}", post(CHAT, dict(messages=message(name))), {400}, True) for name in TRIGGERS],
    Attack("B3 an answer of 8 million values", post(COMPLETIONS, WIDE), {400}),
    Attack("B5 200 CONNECTs", each_of(OTHERS[3:4] * 200), {400}),
    Attack("B5 200 URLs that are none", each_of(OTHERS[4:5] * 200), {400}),
    Attack("B6 1024 half-sent requests", half_sent, {200, 503}),
    Attack(
        "C 8 MB of empty lists", post(COMPLETIONS, lambda: b'{"prompt":[' + b"[]," * (MB8 // 3 - 8) + b"[]]}"), {400}
    ),
    Attack("C 8 MB of depth", post(COMPLETIONS, lambda: b"[" * MB8), {400}),
    Attack("C a number of 8 million digits", post(COMPLETIONS, lambda: b'{"seed":' + b"9" * (MB8 - 20) + b"}"), {400}),
    Attack("C a name twice", post(COMPLETIONS, lambda: b'{"prompt":"x","prompt":"y"}'), {400}),
    Attack("C another host, GET", get("/v1/models", host=b"evil.example:8000"), {403}),
    Attack("C another host, POST", get("/v1/completions", host=b"evil.example", method=b"POST"), {403}),
    Attack("C an extension's origin", get("/v1/models", b"Origin: chrome-extension://abc"), {403}),
    Attack("C a page of a file", get("/v1/models", b"Origin: null"), {403}),
    Attack("C a redirect to another host", get("/health/", host=b"evil.example"), {403, 404}),
    Attack("C no Host", lambda port: sent(port, b"GET /health HTTP/1.1\r\n\r\n"), {400}),
    Attack("C two Hosts", get("/health", b"Host: localhost"), {400}),
    Attack("C Expect: foo", get("/health", b"Expect: foo"), {417}),
    Attack("C a body in another encoding", get("/v1/completions", b"Content-Encoding: br", method=b"POST"), {415}),
    Attack("C a client that closes its half", post(COMPLETIONS, dict(prompt="x", max_tokens=400)), {200}),
    Attack("T 24 ambiguous requests", each_of([one + HIDDEN for one in SMUGGLING]), {400}),
    Attack("T other protocols and large heads", each_of([*OTHERS[:17], *OTHERS[18:]]), {0, 200, 400, 404, 405, 431}),
    Attack("T 2000 pipelined requests", pipelined, {200}),
    Attack("T a path out of the folder", get("/page/%2e%2e/%2e%2e/etc/passwd"), {404}),
    Attack("T an image to be fetched", post(CHAT, dict(messages=image("http://127.0.0.1:1/x"))), {400}),
    Attack("T a model that is a path", post(COMPLETIONS, dict(prompt="x", model="../../etc/passwd")), {404}),
    Attack("T a template of the client's", post(CHAT, TALK | dict(chat_template="{{ 1 }}")), {400}),
]
