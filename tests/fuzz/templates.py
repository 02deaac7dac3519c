"""Fuzz of chat templates: a random program must give a text or a ValueError, and must not harm its process."""

import json
import random
import time
from collections.abc import Sequence

from lockstep.text.job_process import Busy
from lockstep.text.templates.chat_template import ChatTemplate, TemplateProcess, TooMuch
from tests.fuzz.client import Fault, ask
from tests.fuzz.sockets import head
from tests.serve.chatting import THINKING

MESSAGES = [dict(role="user", content="hi %s {0}"), dict(role="assistant", content="x" * 5000)]
NUMBERS = ["0", "1", "3", "-1", "1000", "65536", "16777216", "99999999", "-6000000", "2.5", "1e308", "9" * 30, "n"]
TEXTS = ["'a'", "'%s'", "'{0:99999}'", "'\\t'", "''", "messages[0].content", "'<b>'", "'f' * 1600000", "'x' * n"]
OPERATORS = "+ - * / // % ** ~ == < in and or".split()
FILTERS = """abs attr('a') batch(N) capitalize center(N) count dictsort e escape filesizeformat first float forceescape
    format groupby('role') indent(N) int int(base=16) items join join(S) last length list lower map('upper') max min
    pprint replace('a',S) replace('',S) reverse round(N) round(N,'floor') safe slice(N) sort string striptags sum title
    tojson tojson(indent=N) trim truncate(N) unique upper urlencode urlize wordcount wordwrap(N) xmlattr""".split()
METHODS = """format join ljust rjust zfill expandtabs replace split splitlines encode translate count strip bit_length
    to_bytes hex index partition casefold append update""".split()


def expression(rng: random.Random, depth: int = 0) -> str:
    """A random jinja2 expression, which mostly fails or grows."""
    kind, inner = rng.random(), lambda: expression(rng, depth + 1)
    number, text = rng.choice(NUMBERS), rng.choice(TEXTS)
    if depth > 4 or kind < 0.3:
        return rng.choice([number, text, "messages", f"range({number})"])
    if kind < 0.4:
        return f"[{inner()}]"
    if kind < 0.65:
        return f"({inner()} {rng.choice(OPERATORS)} {inner()})"
    if kind < 0.9:
        return f"({inner()} | {rng.choice(FILTERS).replace('N', number).replace('S', text)})"
    return f"({inner()}).{rng.choice(METHODS)}({rng.choice(['', number, text, f'{number}, {text}', inner()])})"


def program(rng: random.Random, depth: int = 0) -> str:
    """A random template."""
    kind = rng.random()
    if depth > 3 or kind < 0.5:
        return f"{{{{ {expression(rng)} }}}}"
    inner = program(rng, depth + 1)
    if kind < 0.65:
        return f"{{% for i in {expression(rng)} %}}{inner}{{% endfor %}}"
    if kind < 0.8:
        return f"{{% set n = {expression(rng)} %}}{inner}"
    if kind < 0.9:
        return f"{{% macro f(x) %}}{inner}{{{{ f(x) if x }}}}{{% endmacro %}}{{{{ f({expression(rng)}) }}}}"
    return inner * rng.choice([1, 5, 30])


def outcome(process: TemplateProcess, template: str) -> str:
    """The outcome of a template: "text", or the kind of ValueError. Raises any other exception."""
    began = time.monotonic()
    try:
        assert isinstance(ChatTemplate(template, process).render(MESSAGES, n=len(MESSAGES)), str)
        return "text"
    except ValueError as error:
        assert str(error).startswith("chat template") and len(str(error)) < 2100, template
        return "too much" if isinstance(error, TooMuch) or "MB of memory" in str(error) else "mistake"
    finally:
        assert time.monotonic() - began < 30, template


NUM_SERVED = 40  # programs of the served template
ROUTES = {
    "/v1/chat/completions": dict(max_tokens=1),
    "/v1/messages": dict(max_tokens=1),
    "/v1/messages/count_tokens": {},
    "/tokenize": {},
}


def programs(seed: int, process: TemplateProcess, count: int = NUM_SERVED) -> list[str]:
    """Random programs that compile."""
    rng, found = random.Random(f"programs {seed}"), []
    while len(found) < count:
        made = program(rng)
        try:
            ChatTemplate(made, process)
        except ValueError:
            continue
        found.append(made)
    return found


def served(many: Sequence[str]) -> str:
    """A usual chat template, which for the message "program i" runs the i-th of these programs."""
    parts = [f"{{% elif asked == 'program {i}' %}}{each}" for i, each in enumerate(many)]
    return (
        "{%- set asked = messages[-1].content -%}{%- if asked is not string -%}" + THINKING
        + "".join(parts) + "{%- else -%}" + THINKING + "{%- endif -%}"
    )  # fmt: skip


class Templates:
    """The kind of fuzz: a program of the template that the server has, or one of its own in this process.

    port: of a server whose template is `served(programs(...))`.
    """

    def __init__(self, port: int):
        self._port, self._process = port, TemplateProcess(seconds=0.3)

    def play(self, rng: random.Random) -> str:
        """Runs one program; returns the outcome. Raises Fault."""
        return self._serve(rng) if rng.random() < 0.5 else self._run(program(rng))

    def _serve(self, rng: random.Random) -> str:
        path = rng.choice(list(ROUTES))
        asked = dict(role="user", content=f"program {rng.randrange(NUM_SERVED)}")
        raw = json.dumps(dict(messages=[*MESSAGES, asked], **ROUTES[path])).encode()
        return ask(self._port, head(b"Content-Length: %d" % len(raw), first=b"POST %s HTTP/1.1" % path.encode()) + raw)

    def _run(self, template: str) -> str:
        try:
            return f"alone: {outcome(self._process, template)}"
        except Busy:
            return "alone: busy"
        except Exception as error:
            raise Fault(f"{type(error).__name__}: {error!s:.500}", template.encode(), ".jinja") from error

    def close(self) -> None:
        """Ends the process."""
        self._process.jobs.close()
