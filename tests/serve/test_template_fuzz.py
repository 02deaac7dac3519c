"""Random programs as chat templates: each gives a text or a ValueError, and takes nothing from the process.

LOCKSTEP_SOAK=minutes goes on with fresh seeds for so long (`make soak`).
"""

import os
import random
import resource
import threading
import time
from collections import Counter

import pytest

from lockstep.serve.chat_template import ChatTemplate, TemplateProcess, TooMuch

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


def expression(rng, depth=0):
    """A random expression of jinja2's language, which mostly fails or grows."""
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


def program(rng, depth=0):
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


def outcome(process, template):
    """What became of a template: "text", or the kind of error. Whatever is no ValueError is raised."""
    began = time.monotonic()
    try:
        assert isinstance(ChatTemplate(template, process).render(MESSAGES, n=len(MESSAGES)), str)
        return "text"
    except ValueError as error:
        assert str(error).startswith("chat template") and len(str(error)) < 2100, template
        return "too much" if isinstance(error, TooMuch) or "MB of memory" in str(error) else "mistake"
    finally:
        assert time.monotonic() - began < 30, template


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


@pytest.mark.parametrize("seed", range(2))
def test_random_templates(seed):
    process, rng, before = TemplateProcess(seconds=0.1), random.Random(seed), peak()
    seen = Counter(outcome(process, program(rng)) for _ in range(100))
    assert seen["text"] > 10 and seen["mistake"] > 10, seen
    assert peak() - before < 128 << 20


@pytest.mark.skipif(not os.environ.get("LOCKSTEP_SOAK"), reason="LOCKSTEP_SOAK=minutes runs it")
def test_soak_random_templates():
    deadline, seed, seen = time.monotonic() + 60 * float(os.environ["LOCKSTEP_SOAK"]), time.time_ns(), Counter()
    process, rng, ended, gaps, before = TemplateProcess(), random.Random(seed), threading.Event(), [0.0], peak()

    def watch():
        while not ended.is_set():
            began = time.monotonic()
            time.sleep(0.01)
            gaps.append(time.monotonic() - began)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        while time.monotonic() < deadline:
            seen[outcome(process, program(rng))] += 1
    finally:
        ended.set()
        watcher.join()
    print(f"seed {seed}: {dict(seen)}, longest stall {max(gaps):.3f} s")
    assert seen["too much"] and max(gaps) < 0.5 and peak() - before < 256 << 20
