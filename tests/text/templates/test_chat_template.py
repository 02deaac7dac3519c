"""Chat templates: the features of ordinary ones work, and no template can escape, hang or fill the memory."""

import resource
import threading
import time
from collections import OrderedDict
from datetime import datetime
from enum import StrEnum
from pathlib import Path

import pytest

from lockstep.text.templates.chat_template import ChatTemplate, TemplateProcess

HAS_LIMIT = Path("/proc/self/statm").exists()  # elsewhere memory is bounded by the time alone

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "<b>Hé & 🙂</b>"}]

CHATML = """
{%- if tools %}
    {{- '<|im_start|>system\\n# Tools\\n' }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""


@pytest.fixture(scope="module")
def process():
    made = TemplateProcess()
    yield made
    made.jobs.close()


@pytest.fixture(scope="module")
def small():
    """A worker process with low limits."""
    made = TemplateProcess(seconds=0.1, num_bytes=128 << 20)
    yield made
    made.jobs.close()


@pytest.fixture
def apply_chat_template(process):
    """Compiles a template and renders it."""
    return lambda template, *args, **kwargs: ChatTemplate(template, process).render(*args, **kwargs)


@pytest.fixture
def render(apply_chat_template):
    return lambda template, **variables: apply_chat_template(template, MESSAGES, **variables)


def test_a_usual_template(apply_chat_template):
    conversation = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n<b>Hé & 🙂</b><|im_end|>\n"
    assert apply_chat_template(CHATML, MESSAGES) == conversation + "<|im_start|>assistant\n"
    assert apply_chat_template(CHATML, MESSAGES, add_generation_prompt=False) == conversation
    thoughtless = apply_chat_template(CHATML, MESSAGES, enable_thinking=False)
    assert thoughtless.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    tools = [{"name": "weather", "description": "<é> & 'more'"}]
    assert '\n{"name": "weather", "description": "<é> & \'more\'"}<|im_end|>\n' in apply_chat_template(
        CHATML, MESSAGES, tools
    )


@pytest.mark.parametrize(
    "template, expected",
    [
        ("{% for m in messages %}\n  {% if true %}\nx\n  {% endif %}\n{% endfor %}", "x\nx\n"),
        (
            "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.role }}{% break %}{% endfor %}",
            "user",
        ),
        ("{% for i in range(3) %}{{ loop.index0 }}{% endfor %}", "012"),
        ("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}", "2"),
        (
            "{% macro f(function, y='d') %}[{{ function }}{{ y }}]{% endmacro %}{{ f(1) ~ f(function=2, y=3) }}",
            "[1d][23]",
        ),
        ("{% macro f(x) %}{{ caller() ~ x }}{% endmacro %}{% call f(1) %}c{% endcall %}", "c1"),
        ("{{ messages[::-1][0].role }}{{ messages[-1]['role'] }}", "useruser"),
        ("{{ ' a b '.strip().split(' ')[-1] }}{{ 'x' | upper }}{{ 'a,b'.replace(',', ';') }}", "bXa;b"),
        ("{{ {'b': 1, 'a': [true, none]} | tojson(indent=1) }}", '{\n "b": 1,\n "a": [\n  true,\n  null\n ]\n}'),
        ("{{ {'b': 1, 'a': 2} | tojson(sort_keys=true, separators=(',', ':')) }}", '{"a":2,"b":1}'),
        ("{{ 'é' | tojson }}{{ 'é' | tojson(ensure_ascii=true) }}", '"é""\\u00e9"'),
        ("{% generation %}kept {{ 1 + 1 }}{% endgeneration %}", "kept 2"),
        ("{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}", "21"),
        ("{{ '%s-%02d' % ('a', 5) }}{{ '{}!'.format('b') }}{{ 'ab' * 2 }}{{ 7 * 6 }}", "a-05b!abab42"),
        ("{{ messages | map(attribute='role') | join(', ') }}", "system, user"),
        ("{{ messages | selectattr('role', 'equalto', 'user') | list | length }}", "1"),
        ("{% for k, v in {'x': 1}.items() %}{{ k }}={{ v }}{% endfor %}", "x=1"),
        ("{{ 1700000000 | string }}{{ documents is none }}{{ tools is none }}", "1700000000TrueTrue"),
        ("{{ bos_token }}{{ missing }}", "<s>"),
        ("{{ 'text' | indent(2, true) }}{{ 'abc' | center(5) }}", "  text abc "),
    ],
)
def test_what_templates_use(render, template, expected):
    assert render(template, bos_token="<s>") == expected


def test_the_date(render):
    assert render("{{ strftime_now('%Y') }}") in {str(datetime.now().year), str(datetime.now().year - 1)}


def test_a_template_refuses_a_conversation(render):
    with pytest.raises(ValueError, match=r"^chat template: Roles must alternate$"):
        render("{{ raise_exception('Roles must alternate') }}")


@pytest.mark.parametrize(
    "template, message",
    [
        ("{% for m in messages", "not valid"),
        ("{% unknown %}", "not valid"),
        ("{{ x.y.z }}", "'x' is undefined"),
        ("{{ messages[9].content }}", "no element 9"),
        ("{{ 1 + 'a' }}", "unsupported operand"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{% include 'other' %}", "failed"),
        ("{{ messages | tojson(3, 4, 5, 6, 7, 8) }}", "argument"),
        ("{{ (" * 500 + ") }}" * 500, "not valid|deeply"),
        ("x" * 2_000_000, "at most 1048576"),
        ("{% for a in b %}" * 21 + "{% endfor %}" * 21, "not valid: too many statically nested blocks"),
        ("{% if a %}" + "{% elif b %}" * 20_000 + "{% endif %}", "not valid|deeply|to compile"),
        ("{{ " + "9" * 5000 + " }}", "not valid: Exceeds the limit"),
        ("{{ [1, 2] | random }}", "not valid: No filter named 'random'"),
        ("{{ lipsum() }}", "'lipsum' is undefined"),
    ],
)
def test_mistakes_are_value_errors(render, template, message):
    with pytest.raises(ValueError, match=message):
        render(template)


@pytest.mark.parametrize("messages", ["text", {"role": "user"}, None, [1], [{"content": "x"}], [{"role": 3}], ["x"]])
def test_messages_that_are_none(apply_chat_template, messages):
    with pytest.raises(ValueError, match="must be"):
        apply_chat_template("{{ messages }}", messages)


GROW = "{% set ns = namespace(s='0123456789') %}{% for i in range(64) %}{% set ns.s = GROWN %}{% endfor %}"
ATTACKS = [
    "{{ ''.__class__.__mro__ }}",
    "{{ messages.__class__ }}",
    "{{ cycler.__init__.__globals__ }}",
    "{{ ''['__class__'] }}",
    "{{ '' | attr('__class__') }}",
    "{{ '{0.__class__}'.format(1) }}",
    "{{ ('{0.__class__}' | format(1)) ~ self.__init__ }}",
    "{{ strftime_now.__globals__ }}",
    "{{ raise_exception.__globals__ }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update({'role': 'x'}) }}",
    "{{ messages | indent }}",  # which adds to the list that it is given
    "{% import 'os' as os %}",
    "{{ environment.step() }}",
    "{% for i in range(1000000000) %}{% endfor %}",
    "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
    "{% set r = range(999)|list %}{% for a in r %}{% for b in r %}{% for c in r %}{% endfor %}{% endfor %}{% endfor %}",
    "{% for i in range(9) recursive %}{{ loop(range(9)) }}{% endfor %}",
    "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    GROW.replace("GROWN", "ns.s ~ ns.s"),
    GROW.replace("GROWN", "ns.s + ns.s"),
    GROW.replace("GROWN", "ns.s * 2"),
    GROW.replace("GROWN", "[ns.s, ns.s]") + "{{ ns.s }}",
    GROW.replace("GROWN", "[ns.s, ns.s]") + "{{ ns.s | string }}",
    GROW.replace("GROWN", "[ns.s, ns.s]") + "{{ ns.s | tojson }}",
    GROW.replace("GROWN", "[ns.s, ns.s]") + "{{ ns.s ~ '' }}",
    GROW.replace("GROWN", "[ns.s, ns.s]") + "{{ ns.s | join }}",
    GROW.replace("GROWN", "[ns.s] + [ns.s]") + "{{ ns.s | pprint }}",
    GROW.replace("GROWN", "ns.s.replace('', ns.s)"),
    GROW.replace("GROWN", "ns.s | replace('', ns.s)"),
    GROW.replace("GROWN", "ns.s.join(ns.s | list)"),
    GROW.replace("GROWN", "ns.s | list | join(ns.s)"),
    "{{ 'x' * 1000000000000 }}",
    "{{ [0] * 1000000000000 }}",
    "{{ 9 ** 999999999 }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ '%*d' % (1000000000, 1) }}",
    "{{ '{:>1000000000}'.format('a') }}",
    "{{ '{:>{}}'.format('a', 1000000000) }}",
    "{{ '%1000000000d' | format(1) }}",
    "{{ 'a' | center(1000000000) }}",
    "{{ 'a\na' | indent(1000000000) }}",
    "{{ 'a\na' | indent('x' * 16000000) | indent('x' * 16000000) }}",
    "{{ 'a'.ljust(1000000000) }}",
    "{{ 'a'.zfill(1000000000) }}",
    "{{ '\t'.expandtabs(1000000000) }}",
    "{{ (1).to_bytes(1000000000, 'big') }}",
    "{{ lipsum(1000000) }}",
    "{{ strftime_now('%1000000000d') }}",
]


# What one expression can do in one call of C, in straight lines, or when it is compiled: constants are folded then.
ATTACKS += [
    "{{ 1 | round(30000000, 'floor') }}",
    "{{ 1 | round(-6000000) }}",
    "{{ messages | length | round(90000000, 'floor') }}",
    "{{ ('f' * 1600000) | int(base=16) // (('e' * 800000) | int(base=16)) }}",
    "{{ ('f' * 3200000) | int(base=16) % (('e' * 1600000) | int(base=16)) }}",
    "{{ (('f' * 1600000) | int(base=16)) | string }}",
    "{{ ([1] * 16777216) | sort | length }}" * 30,
    "{{ ([1] * 16777216) | sum }}" * 60,
    "{{ ([1] * 16777216) | unique | list }}",
    "{{ ('a' * 4000000) | wordwrap(1) }}",
    "{% set s = 'x' * 16777216 %}{{ ''.join([s] * 100) | length }}",
    "{{ [messages[0].content * 1000000] * 100 | join }}",
    "{{ ('{0:99999}' * 10000).format(1) }}",
    "{{ ('%99999d' * 10000) % ((1,) * 10000) }}",
    "{{ ('\t' * 1000).expandtabs(1048576) | length }}",
    "{% set b1 = 'a' * 16777216 %}" + "".join(f"{{% set b{i} = b1 ~ {i} %}}" for i in range(60)) + "{{ b9 | length }}",
    "{{ messages | tojson(indent=1000000000) }}",
    "{{ range(1000000000000) | list }}",
    "{{ raise_exception('x' * 100000000) }}",
    "{{ {}['x' * 60000000].y }}",
    "{% for i in range(20000000) %}x{% endfor %}",
]
HARMLESS = {"{{ strftime_now('%1000000000d') }}"}


@pytest.mark.parametrize("template", ATTACKS, ids=lambda template: template[:60])
def test_attacks_are_refused(small, template):
    if "'" in template and not HAS_LIMIT:
        pytest.skip("memory is not bounded here")
    messages, before, began = [dict(message) for message in MESSAGES], _peak(), time.monotonic()
    try:
        found = ChatTemplate(template, small).render(messages)
        assert template in HARMLESS and len(found) < 100
    except ValueError as error:
        assert "chat template" in str(error) and len(str(error)) < 2100
    assert time.monotonic() - began < 10 and _peak() - before < 64 << 20
    assert messages == MESSAGES
    assert ChatTemplate("{{ messages[1].role }}", small).render(MESSAGES) == "user"


def _peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def test_a_slow_template_delays_nobody():
    process = TemplateProcess(seconds=0.8)
    slow, quick = (
        ChatTemplate(text, process)
        for text in ("{% for i in range(1000000000) %}{% endfor %}", "{{ messages[1].content }}")
    )
    took = []

    def refused():
        began = time.monotonic()
        with pytest.raises(ValueError, match=r"more than 0\.8 s of the processor to render"):
            slow.render(MESSAGES)
        took.append(time.monotonic() - began)

    threads = [threading.Thread(target=refused) for _ in range(2)]
    for thread in threads:
        thread.start()
    gaps = []
    while any(thread.is_alive() for thread in threads):
        began = time.monotonic()
        assert quick.render(MESSAGES) == "<b>Hé & 🙂</b>"
        gaps.append(time.monotonic() - began)
        time.sleep(0.01)
    process.jobs.close()
    assert len(took) == 2 and len(gaps) > 20 and max(gaps) < 0.75 * max(took)


def test_what_the_limits_are(process):
    assert process.seconds == 2
    with pytest.raises(ValueError, match="more than 16777216 characters"):
        ChatTemplate("{% set s = 'x' * 9999999 %}{{ s }}{{ s }}", process).render(MESSAGES)
    if HAS_LIMIT:
        with pytest.raises(ValueError, match="takes more than 256 MB of memory"):
            ChatTemplate("{{ [0] * 99999999 }}", process).render(MESSAGES)


def test_one_rendering_leaves_nothing_to_the_next(process):
    template = ChatTemplate(
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}"
        "{{ ns.n }}{{ extra }}",
        process,
    )
    assert [template.render(MESSAGES, extra=i) for i in range(3)] == ["20", "21", "22"]
    assert template.render(MESSAGES) == "2"


class Role(StrEnum):
    USER = "user"


def test_values_of_other_types_are_given_as_plain_ones(apply_chat_template):
    message = OrderedDict(role=Role.USER, content="x", parts=({"n": 1.5}, True))
    assert apply_chat_template("{{ messages | tojson }}", (message,)) == (
        '[{"role": "user", "content": "x", "parts": [{"n": 1.5}, true]}]'
    )
    with pytest.raises(ValueError, match="a object is neither text"):
        apply_chat_template("{{ x }}", MESSAGES, x=object())
    deep = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(ValueError, match="nested too deeply"):
        apply_chat_template("{{ x }}", MESSAGES, x=deep)


def test_lone_surrogates_stay_what_they_are(render):
    assert render("{{ x }}", x="a\ud800b") == "a\ud800b"


def test_long_conversations_are_fine(apply_chat_template):
    messages = [{"role": "user", "content": "word " * 200}] * 2000
    assert len(apply_chat_template(CHATML, messages)) > 2_000_000


def test_a_conversation_of_very_many_messages(apply_chat_template):
    messages = [{"role": "user", "content": "x"}] * 300_000
    assert apply_chat_template(CHATML, messages).count("<|im_start|>") == 300_001
