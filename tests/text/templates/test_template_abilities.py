"""Conversations for templates that drop or refuse messages that their authors did not think of, as real ones do."""

import functools
import re
from dataclasses import replace

import pytest

from lockstep.text.conversation import ChatModel, Conversation
from lockstep.text.templates.abilities import abilities_of
from lockstep.text.templates.beside_calls import prompts_without_tools
from lockstep.text.templates.chat_template import TemplateProcess
from lockstep.text.tool_calls.styles import HERMES, LLAMA, MISTRAL, MISTRAL_NAMED, XML
from lockstep.text.tool_calls.tools import Tool, ToolUse
from tests.text.calls import parse
from tests.text.templates.test_chat_model import allowed, model

PLACE = Tool("find", "Finds a place.", dict(type="object", properties=dict(name=dict(type="string"))))
USE = ToolUse((PLACE,))
END = "{% if add_generation_prompt %}<answer>{% endif %}"
# as Qwen's: the tools, then each message; one system message, at the beginning
FIRST_SYSTEM = (
    """{{ tools | tojson }}{% for m in messages %}
{%- if m.role == 'system' and not loop.first %}{{ raise_exception('not at the beginning') }}{% endif %}
{%- if m.tool_calls %}{% for c in m.tool_calls %}<tool_call>
<function={{ c.function.name }}>
{% for name, value in c.function.arguments | items %}<parameter={{ name }}>
{{ value }}
</parameter>
{% endfor %}</function>
</tool_call>
{% endfor %}{% else %}<{{ m.role }}>{{ m.content }}{% endif %}{% endfor %}"""
    + END
)
# as SmolLM3's: tools by another name, no calls, only the first system message, which may be missing
OTHER_NAME = (
    """<system>{{ messages[0].content if messages[0].role == 'system' }}
{%- if xml_tools %}{{ xml_tools }}<tool_call>{% endif %}{% for m in messages if m.role != 'system' %}
{{- '<' + m.role + '>' + m.content }}{% endfor %}"""
    + END
)
# as Llama 3's: one call at once, and no text beside it
ONE_CALL = (
    """{% if tools %}Environment: ipython{{ tools | tojson }}{% endif %}{% for m in messages %}
{%- if m.tool_calls %}{% if m.tool_calls | length > 1 %}{{ raise_exception('single tool-calls') }}{% endif %}
{%- set call = m.tool_calls[0].function %}<assistant>
{{- '{"name": "' + call.name + '", "parameters": ' }}{{ call.arguments | tojson }}{{ "}" }}
{%- else %}<{{ m.role }}>{{ m.content }}{% endif %}{% endfor %}"""
    + END
)
# as Mistral's: the user and the assistant take turns, tools aside; ids of nine characters; one system message
TURNS = (
    """{% set ns = namespace(n=0) %}{{ tools | tojson }}{% for m in messages %}
{%- if m.tool_calls %}[TOOL_CALLS][{% for c in m.tool_calls %}{{ (c.function | tojson)[:-1] }}, "id": "{{ c.id }}"}
{%- if not loop.last %}, {% endif %}{% if c.id | length != 9 %}{{ raise_exception('ids') }}{% endif %}{% endfor %}]
{%- else %}{% if m.role != 'tool' and not (loop.first and m.role == 'system') %}{% set ns.n = ns.n + 1 %}
{%- if m.role != ('user' if ns.n % 2 else 'assistant') %}{{ raise_exception('no turns') }}{% endif %}{% endif %}
{%- if m.role == 'assistant' and not m.content %}{{ raise_exception('no content') }}{% endif %}
{%- if m.role == 'tool' %}<tool {{ m.tool_call_id }}>{{ m.content }}{% else %}<{{ m.role }}>{{ m.content }}{% endif %}
{%- endif %}{% endfor %}"""
    + END
)
ARRAY = """[TOOL_CALLS][{% for c in m.tool_calls %}{{ (c.function | tojson)[:-1] }}, "id": "{{ c.id }}"}
{%- if not loop.last %}, {% endif %}{% if c.id | length != 9 %}{{ raise_exception('ids') }}{% endif %}{% endfor %}]"""
NAMES = """{% for c in m.tool_calls %}[TOOL_CALLS]{{ c.function.name }}[CALL_ID]{{ c.id }}[ARGS]
{{- c.function.arguments | tojson }}{% endfor %}"""
NAMED = TURNS.replace(ARRAY, NAMES)
# a way to write calls that nobody here reads
UNREADABLE = (
    """{{ tools | tojson }}{% for m in messages %}<{{ m.role }}>{{ m.content }}
{%- for c in m.tool_calls or [] %}<invoke name="{{ c.function.name }}">{{ c.function.arguments | tojson }}</invoke>
{%- endfor %}{% endfor %}"""
    + END
)
NO_SYSTEM = (
    """{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('no turns') }}{% endif %}<{{ m.role }}>{{ m.content }}{% endfor %}"""
    + END
)
LAST_SYSTEM = (
    """{% set ns = namespace(s='') %}{% for m in messages if m.role == 'system' %}{% set ns.s = m.content %}
{%- endfor %}{{ ns.s }}{% for m in messages if m.role != 'system' %}<{{ m.role }}>{{ m.content }}{% endfor %}"""
    + END
)
# as Llama 2's: what the system says is a part of the first message, which has to be the user's and cannot be empty
IN_FIRST_USER = (
    """{% if messages[0].role == 'system' %}{% set rest, system = messages[1:], messages[0].content %}
{%- else %}{% set rest, system = messages, '' %}{% endif %}{% for m in rest %}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) or m.role == 'user' and not m.content %}
{{- raise_exception('no turns') }}{% endif %}
{{- '<' + m.role + '>' + (system if loop.first else '') + m.content }}{% endfor %}"""
    + END
)
# as Mistral Nemo's: what the system says stands in the last message, but only if that is the user's
IN_LAST_USER = TURNS.replace(
    "{% else %}<{{ m.role }}>{{ m.content }}",
    """{% elif m.role == 'system' %}{% else %}
{{- '<' + m.role + '>' }}{% if loop.last and m.role == 'user' and messages[0].role == 'system' %}
{{- messages[0].content }}{% endif %}{{ m.content }}""",
)
# as Command R7B's: it mentions developers, and drops what they say
NO_DEVELOPER = "{% for m in messages if m.role != 'developer' %}<{{ m.role }}>{{ m.content }}{% endfor %}" + END
ALL = dict(
    FIRST_SYSTEM=FIRST_SYSTEM,
    OTHER_NAME=OTHER_NAME,
    ONE_CALL=ONE_CALL,
    TURNS=TURNS,
    NAMED=NAMED,
    UNREADABLE=UNREADABLE,
    NO_SYSTEM=NO_SYSTEM,
    LAST_SYSTEM=LAST_SYSTEM,
    IN_FIRST_USER=IN_FIRST_USER,
    IN_LAST_USER=IN_LAST_USER,
    NO_DEVELOPER=NO_DEVELOPER,
)


def said(role, text):
    return dict(role=role, content=text)


def calling(*names):
    calls = [
        dict(id=f"call_{name}", type="function", function=dict(name="find", arguments=dict(name=name)))
        for name in names
    ]
    return dict(role="assistant", content="", tool_calls=calls)


def result(name, text):
    return dict(role="tool", tool_call_id=f"call_{name}", content=text)


CONVERSATIONS = dict(
    two_systems=[said("system", "One."), said("developer", "Two."), said("user", "Three.")],
    late_system=[said("user", "One."), said("assistant", "Two."), said("system", "Three.")],
    users_in_a_row=[said("system", "One."), said("user", "Two."), said("user", "Three.")],
    a_call=[said("system", "One."), said("user", "Two."), calling("Rome"), result("Rome", "Three.")],
    two_calls=[said("user", "One."), calling("Rome", "Oslo"), result("Oslo", "Two."), result("Rome", "Three.")],
    after_a_result=[said("user", "One."), calling("Rome"), result("Rome", "Two."), said("user", "Three.")],
    assistant_first=[said("assistant", "One."), said("user", "Two.")],
    assistant_after_the_system=[said("system", "One."), said("assistant", "Two."), said("user", "Three.")],
    only_the_assistant=[said("assistant", "One.")],
    assistants_in_a_row=[
        said("user", "One."),
        said("assistant", "Two."),
        said("assistant", "Three."),
        said("user", "Four."),
    ],
    text_beside_calls=[
        said("user", "One."),
        calling("Rome", "Oslo") | dict(content="Two {x}."),
        result("Rome", "Three."),
        result("Oslo", "Four."),
        calling("Bonn") | dict(content="Five."),
        result("Bonn", "Six."),
        said("assistant", "Seven."),
        said("user", "Eight."),
    ],
    text_before_a_call=[said("user", "One."), said("assistant", "Two."), calling("Rome"), result("Rome", "Three.")],
    unanswered_call=[said("user", "One."), calling("Rome") | dict(content="Two."), said("user", "Three.")],
    unanswered_call_and_text=[said("user", "One."), calling("Rome"), said("assistant", "Two."), said("user", "Three.")],
)


@functools.cache
def chat_of(template):
    return model(ALL[template])[1]


@pytest.mark.parametrize("with_tools", [True, False])
@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("template", ALL)
def test_nothing_that_was_said_is_dropped_or_refused(template, conversation, with_tools):
    messages = CONVERSATIONS[conversation]
    prompt = chat_of(template).prompt(Conversation(messages, USE if with_tools else ToolUse()))
    assert (prompt.endswith("<answer>") and "find" in prompt) or not with_tools
    for message in messages:
        assert message["content"] in prompt
        assert all(call["function"]["arguments"]["name"] in prompt for call in message.get("tool_calls", ()))


@pytest.mark.parametrize("template", ALL)
def test_what_was_said_stays_in_its_order(template):
    prompt = chat_of(template).prompt(Conversation(CONVERSATIONS["text_beside_calls"], USE))
    places = [prompt.index(text) for text in ("One.", "Two {x}.", "Three.", "Five.", "Six.", "Seven.", "Eight.")]
    assert places == sorted(places)


@pytest.mark.parametrize(
    "template, expected",
    [
        (ONE_CALL, '<assistant>Well.\n{"name": "find", "parameters": {"name": "Rome"}}<tool>'),
        (TURNS, 'Well.\n[TOOL_CALLS][{"name": "find", "arguments": {"name": "Rome"}, "id": "'),
        (NAMED, "Well.\n[TOOL_CALLS]find[CALL_ID]"),
        (FIRST_SYSTEM, "Well.\n<tool_call>\n<function=find>\n<parameter=name>\nRome\n"),
        (
            ONE_CALL.replace('"{" + ', "").replace('\'{"name"', '\'<|python_tag|> {"name"'),
            '<assistant>Well.\n<|python_tag|> {"name": "find", ',
        ),
    ],
)
def test_text_beside_a_call_stands_before_it(template, expected):
    messages = [said("user", "call0of"), calling("Rome") | dict(content="Well."), result("Rome", "Two.")]
    prompt = model(template)[1].prompt(Conversation(messages, USE))
    assert expected in prompt and prompt.count("Well.") == 1 and prompt.count("call0of") == 1


def test_a_begun_answer_goes_on_after_what_was_said_before_it():
    messages = [said("user", "One."), said("assistant", "Two."), said("assistant", "Three")]
    prompt = model(NO_SYSTEM)[1].prompt(Conversation(messages, continues=True))
    assert prompt == "<user>One.<assistant>Two.\n\nThree"


def test_turns_are_only_mended_where_they_have_to_be():
    messages = [said("assistant", "a"), said("assistant", "b"), said("user", "c")]
    assert model(LAST_SYSTEM)[1].prompt(Conversation(messages)) == "<assistant>a<assistant>b<user>c<answer>"
    for template, expected in (
        (NO_SYSTEM, "<user><assistant>a\n\nb<user>c<answer>"),
        (IN_FIRST_USER, "<user>Hello.<assistant>a\n\nb<user>c<answer>"),
    ):
        assert model(template)[1].prompt(Conversation(messages)) == expected


def test_conversations_from_python_are_put_so_too():
    tokenizer, _ = model(NO_SYSTEM)
    prompt = prompts_without_tools(tokenizer)
    messages = [said("system", "a"), said("user", "b")]
    assert prompt(messages) == "<user>a\n\nb<answer>"
    assert prompt(messages, add_generation_prompt=False) == "<user>a\n\nb"
    parts = [said("user", [dict(type="text", text="a")])]
    assert "'text': 'a'" in prompts_without_tools(model(LAST_SYSTEM)[0])(parts)
    for wrong, message in (("a", "must be a list"), ([dict(content="a")], "message 0 must be an object with a role")):
        with pytest.raises(ValueError, match=message):
            prompt(wrong)
    with pytest.raises(ValueError, match="no chat template"):
        prompts_without_tools(replace(tokenizer, chat_templates={}))(messages)


def test_each_of_two_named_templates_gets_what_it_can_say():
    tokenizer, _ = model(NO_SYSTEM)
    chat = ChatModel(replace(tokenizer, chat_templates=dict(default=NO_SYSTEM, tool_use=FIRST_SYSTEM)), {0}, 100)
    messages = [said("system", "a"), said("user", "b")]
    assert chat.prompt(Conversation(messages)) == "<user>a\n\nb<answer>"
    assert chat.prompt(Conversation(messages, USE)).endswith("<system>a<user>b<answer>")


def test_several_calls_become_pairs_of_a_call_and_its_result():
    prompt = model(ONE_CALL)[1].prompt(Conversation(CONVERSATIONS["two_calls"], USE))
    assert prompt.partition("<user>")[2] == (
        'One.<assistant>{"name": "find", "parameters": {"name": "Rome"}}<tool>Three.'
        '<assistant>{"name": "find", "parameters": {"name": "Oslo"}}<tool>Two.<answer>'
    )


def test_a_template_that_says_all_gets_messages_as_they_are():
    messages = [said("system", "a"), said("system", "b"), said("user", "c"), said("user", "d"), said("system", "e")]
    plain = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}" + END
    assert model(plain)[1].prompt(Conversation(messages)) == "<system>a<system>b<user>c<user>d<system>e<answer>"


def test_systems_that_would_be_lost_are_joined_or_said_by_the_user():
    messages = [said("system", "a"), said("system", "b"), said("user", "c"), said("system", "d")]
    for template, expected in [
        (FIRST_SYSTEM, "null<system>a\n\nb<user>c<user>d<answer>"),
        (NO_SYSTEM, "<user>a\n\nb\n\nc\n\nd<answer>"),
    ]:
        assert model(template)[1].prompt(Conversation(messages)) == expected


@pytest.mark.parametrize(
    "template, style",
    [
        (FIRST_SYSTEM, XML),
        (OTHER_NAME, HERMES),
        (ONE_CALL, LLAMA),
        (TURNS, MISTRAL),
        (NAMED, MISTRAL_NAMED),
        (UNREADABLE, HERMES),
        (NO_SYSTEM, HERMES),
    ],
)
def test_what_the_template_writes_is_read_and_allowed(template, style):
    """The call in a rendered prompt is a call that the grammar allows and the parser finds."""
    tokenizer, chat = model(template, special=["[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"])
    user = said("user", "One.")
    shown = chat.prompt(Conversation([user, calling("Rome"), result("Rome", "Two.")], USE))
    call = re.search(r"One\.(<assistant>)?(.*?)\s*<(tool|user)[> ]", shown, re.DOTALL)[2]
    made = chat.prepare(Conversation([user], ToolUse((PLACE,), must_call=True)))
    assert chat.style is style and parse(made.new_parser(), [call]) == [("find", '{"name": "Rome"}')]
    mask, ids = made.options["logits_mask"], tokenizer.encode(call, add_special_tokens=False)
    assert all(ids[n] in allowed(mask(ids[:n])) for n in range(len(ids))) and 0 in allowed(mask(ids))


def test_no_more_calls_are_asked_for_than_the_template_can_show():
    tokenizer, chat = model(ONE_CALL)
    mask = chat.prepare(Conversation([said("user", "One.")], ToolUse((PLACE,), must_call=True))).options["logits_mask"]
    ids = tokenizer.encode('{"name": "find", "parameters": {"name": "Rome"}}')
    assert allowed(mask(ids)) == {0}


@pytest.mark.parametrize(
    "template, num_renders",
    [("{% for i in range(1000000000) %}{% endfor %}", 1), ("{{ 1 | round(90000000, 'floor') }}", 0)],
)
def test_a_template_that_takes_too_much_is_tried_once(template, num_renders):
    process, rendered, compiled = TemplateProcess(seconds=0.1), [], []
    render, compile_it = process.render, process.compile
    process.render = lambda *args: rendered.append(args) or render(*args)
    process.compile = lambda *args: compiled.append(args) or compile_it(*args)
    tokenizer = replace(model(NO_SYSTEM)[0], chat_templates=dict(default=template), template_process=process)
    assert not abilities_of(tokenizer).system and len(rendered) == num_renders and len(compiled) == 1
    for _ in range(2):
        with pytest.raises(ValueError, match=r"chat template takes more than 0\.1 s of the processor"):
            tokenizer.render_chat([said("user", "hello")])
    assert len(compiled) == 1


# as Gemma 4's at first: results as a field of the message with the calls, whose text comes after both
INSIDE = """{{ tools | tojson if tools }}{% for m in messages %}<{{ m.role }}>
{%- for c in m.tool_calls or [] %}<|tool_call>call:{{ c.function.name }}{
{%- for k, v in c.function.arguments.items() %}{{ k }}:<|"|>{{ v }}<|"|>{% endfor %}}<tool_call|>{% endfor %}
{%- for r in m.tool_responses or [] %}{{ '<|tool_response>' + r.name + ':' + r.response + '<tool_response|>' }}
{%- endfor %}{% if m.content or not m.tool_responses %}{{ m.content }}<end>{% endif %}{% endfor %}"""


def test_results_that_are_a_field_of_the_message_with_the_calls():
    call = lambda number, name: dict(id=f"c{number}", function=dict(name="find", arguments=dict(name=name)))
    rome, oslo = (f'<|tool_call>call:find{{name:<|"|>{name}<|"|>}}<tool_call|>' for name in ("Rome", "Oslo"))
    result = lambda number, text: dict(role="tool", tool_call_id=f"c{number}", content=text)
    shown = "<|tool_response>find:{}<tool_response|>".format
    asked, done = dict(role="user", content="a"), dict(role="assistant", content="Done.")
    one, two = (
        dict(role="assistant", content=text, tool_calls=[call(1, "Rome"), call(2, "Oslo")]) for text in ("", "So:")
    )
    results = [result(1, "x"), result(2, "y")]
    _, chat = model(INSIDE)
    for messages, expected in (
        ([asked, one, *results], f"<assistant>{rome}{oslo}{shown('x')}{shown('y')}"),
        ([asked, two, *results, done], f"<assistant>So:\n{rome}{oslo}{shown('x')}{shown('y')}Done.<end>"),
        ([asked, one, done, result(1, "x")], f"<assistant>{rome}{oslo}<end><assistant>Done.<end><tool>x<end>"),
    ):
        assert chat.prompt(Conversation(messages, USE)).partition("<user>a<end>")[2] == expected
    again = dict(role="assistant", content="", tool_calls=[call(3, "Rome")])
    prompt = chat.prompt(Conversation([asked, one, *results, again, result(3, "z")], USE))
    assert prompt.endswith(f"{shown('y')}<assistant>{rome}{shown('z')}")
    plain = "{{ tools | tojson if tools }}<tool_call>{% for m in messages %}{{ m | tojson }}{% endfor %}"
    assert abilities_of(model(INSIDE)[0]).inside and not abilities_of(model(plain)[0]).inside
