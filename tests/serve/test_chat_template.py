"""Chat templates: what ordinary ones need works, and no template can escape, hang or fill the memory."""

import tracemalloc
from datetime import datetime

import pytest

from lockstep.serve import template_sandbox
from lockstep.serve.chat_template import ChatTemplate, apply_chat_template

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


def test_a_usual_template():
    conversation = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n<b>Hé & 🙂</b><|im_end|>\n"
    assert apply_chat_template(CHATML, MESSAGES) == conversation + "<|im_start|>assistant\n"
    assert apply_chat_template(CHATML, MESSAGES, add_generation_prompt=False) == conversation
    thoughtless = apply_chat_template(CHATML, MESSAGES, enable_thinking=False)
    assert thoughtless.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    tools = [{"name": "weather", "description": "<é> & 'more'"}]
    assert '\n{"name": "weather", "description": "<é> & \'more\'"}<|im_end|>\n' in apply_chat_template(
        CHATML, MESSAGES, tools
    )


def render(template, **variables):
    return apply_chat_template(template, MESSAGES, **variables)


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
        ("{{ '%s-%02d' % ('a', 5) }}{{ '{}!'.format('b') }}{{ 'ab' * 2 }}{{ 7 * 6 }}", "a-05b!abab42"),
        ("{{ messages | map(attribute='role') | join(', ') }}", "system, user"),
        ("{{ messages | selectattr('role', 'equalto', 'user') | list | length }}", "1"),
        ("{% for k, v in {'x': 1}.items() %}{{ k }}={{ v }}{% endfor %}", "x=1"),
        ("{{ 1700000000 | string }}{{ documents is none }}{{ tools is none }}", "1700000000TrueTrue"),
        ("{{ bos_token }}{{ missing }}", "<s>"),
        ("{{ 'text' | indent(2, true) }}{{ 'abc' | center(5) }}", "  text abc "),
    ],
)
def test_what_templates_use(template, expected):
    assert render(template, bos_token="<s>") == expected


def test_the_date():
    assert render("{{ strftime_now('%Y') }}") in {str(datetime.now().year), str(datetime.now().year - 1)}


def test_a_template_refuses_a_conversation():
    with pytest.raises(ValueError, match="^chat template: Roles must alternate$"):
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
        ("{{ {} | tojson(indent='x' * 99) }}", "indent"),
        ("{% include 'other' %}", "failed"),
        ("{{ messages | tojson(3, 4, 5, 6, 7, 8) }}", "argument"),
        ("{{ (" * 500 + ") }}" * 500, "not valid|deeply"),
        ("x" * 2_000_000, "at most 1048576"),
    ],
)
def test_mistakes_are_value_errors(template, message):
    with pytest.raises(ValueError, match=message):
        render(template)


@pytest.mark.parametrize("messages", ["text", {"role": "user"}, None, [1], [{"content": "x"}], [{"role": 3}], ["x"]])
def test_messages_that_are_none(messages):
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


@pytest.mark.parametrize("template", ATTACKS)
def test_attacks_are_refused(template, monkeypatch):
    monkeypatch.setattr(template_sandbox, "MAX_STEPS", 5_000)
    monkeypatch.setattr(template_sandbox, "MAX_ITEMS", 50_000)
    messages = [dict(message) for message in MESSAGES]
    tracemalloc.start()
    with pytest.raises(ValueError, match="chat template"):
        apply_chat_template(template, messages)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 200 << 20
    assert messages == MESSAGES


def test_time_is_bounded(monkeypatch):
    monkeypatch.setattr(template_sandbox, "MAX_SECONDS", 0.0)
    with pytest.raises(ValueError, match="seconds"):
        render("{% for i in range(10) %}{% endfor %}")


def test_output_is_bounded(monkeypatch):
    monkeypatch.setattr(template_sandbox, "MAX_CHARS", 100)
    with pytest.raises(ValueError, match="more than 100 characters"):
        render("{% for i in range(101) %}x{% endfor %}")


def test_renderings_do_not_share_a_budget(monkeypatch):
    monkeypatch.setattr(template_sandbox, "MAX_STEPS", 100)
    template = ChatTemplate("{% for i in range(60) %}x{% endfor %}")
    assert [template.render(MESSAGES) for _ in range(3)] == ["x" * 60] * 3
    with pytest.raises(ValueError, match="more than 100 steps"):
        render("{% for i in range(60) %}{% endfor %}{% macro f() %}{% endmacro %}" + "{{ f() }}" * 41)


def test_long_conversations_are_fine():
    messages = [{"role": "user", "content": "word " * 200}] * 2000
    assert len(apply_chat_template(CHATML, messages)) > 2_000_000
