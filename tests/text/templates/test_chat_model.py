"""`ChatModel`: prompts, masks and parsers of conversations, for chat templates of different kinds."""

import numpy as np
import pytest
from tokenizers import AddedToken

from lockstep.serve.fields.chat import ChatFields, conversation
from lockstep.text.conversation import MAX_TRIES, ChatModel, Conversation
from lockstep.text.grammars import structured
from lockstep.text.tokenizer.tokenizer import Detokenizer, Tokenizer
from lockstep.text.tool_calls.events import Content, Reasoning
from lockstep.text.tool_calls.tools import Tool, ToolUse
from tests.text.calls import parse
from tests.text.vocabularies import byte_level

NOW = Tool("now", "The time.", dict(type="object", properties={}, additionalProperties=False))
USE = ToolUse((NOW,))
PLAIN = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<answer>{% endif %}"
)
KNOWS_TOOLS = "{{ tools | tojson }}" + PLAIN + "{# <tool_call> #}"
OPENS = KNOWS_TOOLS + "{% if add_generation_prompt %}<think>\n{% endif %}{# </think> #}"
MISTRAL = (
    "{{ tools | tojson }}{% for m in messages %}{% if m.tool_calls %}[TOOL_CALLS][{% for call in m.tool_calls %}"
    """{{ (call.function | tojson)[:-1] }}, "id": "{{ call.id }}"}{% endfor %}]"""
    "{% else %}{{ m | tojson }}{% endif %}{% endfor %}"
)
HELLO = [dict(role="user", content="hello")]
CALLED = [
    *HELLO,
    dict(
        role="assistant",
        content=None,
        tool_calls=[dict(id="call_123", type="function", function=dict(name="now", arguments={}))],
    ),
    dict(role="tool", tool_call_id="call_123", content="noon"),
]


def model(template, special=(), added=("<tool_call>", "</tool_call>", "</think>")):
    backend = byte_level()
    backend.add_special_tokens(list(special))
    backend.add_tokens([AddedToken(token, special=False, normalized=False) for token in added])
    tokenizer = Tokenizer(backend, frozenset({0}), None, {}, {"default": template})
    return tokenizer, ChatModel(tokenizer, {0}, tokenizer.vocab_size)


def allowed(words):
    return set(np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little")).tolist())


def ids_of(tokenizer, *tokens):
    return [tokenizer.backend.token_to_id(token) for token in tokens]


def test_a_plain_conversation():
    tokenizer, chat = model(PLAIN)
    made = chat.prepare(Conversation([dict(role="developer", content="Be brief."), *HELLO]))
    assert tokenizer.decode(made.ids) == "<system>Be brief.<user>hello<answer>"
    assert made.options == dict(logits_mask=None) and parse(made.new_parser(), ["a <tool_call>"]) == ["a <tool_call>"]


def test_developers_speak_where_the_template_knows_them():
    _, chat = model(PLAIN + "{# developer #}")
    assert chat.prompt(Conversation([dict(role="developer", content="x"), *HELLO])).startswith("<developer>x")


def test_tools_for_a_template_that_knows_none():
    _, chat = model(PLAIN)
    prompt = chat.prompt(Conversation([dict(role="system", content="Be brief."), *CALLED], USE))
    assert prompt.startswith("<system>Be brief.\n\nYou can call functions.") and '"name": "now"' in prompt
    assert '<assistant><tool_call>\n{"name": "now", "arguments": {}}\n</tool_call><user><tool_response>\nnoon' in prompt
    assert chat.prompt(Conversation(HELLO, USE)).startswith("<system>You can call")


def test_the_beginning_of_an_answer():
    _, chat = model(PLAIN)
    begun = Conversation([*HELLO, dict(role="assistant", content="Well, ")], continues=True)
    assert chat.prompt(begun) == "<user>hello<assistant>Well, "


def test_a_free_answer_is_held_to_the_tools_once_it_calls():
    tokenizer, chat = model(OPENS)
    begin, end, close = ids_of(tokenizer, "<tool_call>", "</tool_call>", "</think>")
    made = chat.prepare(Conversation(HELLO, USE))
    mask, text = made.options["logits_mask"], [*tokenizer.encode("hm "), begin]
    assert mask(text) is None, "thoughts are free"
    assert mask([*text, close]) is None
    call = [*text, close, begin]
    assert allowed(mask(call)) == {tokenizer.encode("\n")[0]}
    call += tokenizer.encode('\n{"name": "now", "arguments": {}}\n')
    assert allowed(mask(call)) == {end}
    assert mask([*call, end]) is None


ODD = dict(type="object", properties=dict(a={"type": "string", "pattern": "(?=a)"}), required=["a"])
OUTSIDE = dict(type="object", properties=dict(a={"$ref": "http://127.0.0.1/schema"}))


def is_allowed(tokenizer, mask, before, text):
    """Whether a mask allows the tokens of a text, one after the other, after the given tokens."""
    ids = list(before)
    for token in tokenizer.encode(text):
        if token not in allowed(mask(ids)):
            return False
        ids.append(token)
    return True


@pytest.mark.parametrize("schema, bad", [(ODD, '{"a": 1}'), (OUTSIDE, "[")])
@pytest.mark.parametrize("must_call", [False, True])
def test_a_schema_that_cannot_be_enforced_takes_nothing_from_the_others(schema, bad, must_call):
    tokenizer, chat = model(KNOWS_TOOLS)
    use = ToolUse((NOW, Tool("f", "", schema)), must_call)
    mask = chat.prepare(Conversation(HELLO, use)).options["logits_mask"]
    begin, call = ids_of(tokenizer, "<tool_call>"), '\n{{"name": "{}", "arguments": {}}}\n'
    assert is_allowed(tokenizer, mask, begin, call.format("f", '{"a": "bcd"}'))
    assert is_allowed(tokenizer, mask, begin, call.format("now", "{}"))
    wrong = [("now", '{"x": 1}'), ("then", "{}"), ("f", bad)]
    assert not any(is_allowed(tokenizer, mask, begin, call.format(*each)) for each in wrong)


XML = (
    "{{ tools | tojson }}{% for m in messages %}{{ m.content }}{% for call in m.tool_calls or [] %}<tool_call>\n"
    "<function={{ call.function.name }}>\n{% for k, v in call.function.arguments.items() %}<parameter={{ k }}>\n"
    "{{ v }}\n</parameter>\n{% endfor %}</function>\n</tool_call>{% endfor %}{% endfor %}"
)


@pytest.mark.parametrize(
    "more, message",
    [
        ({"not": {"required": ["b"]}}, "not"),
        ({"dependentRequired": {}}, "depend"),
        ({"oneOf": [{}, {"required": ["a"]}]}, "oneOf"),
        ({"anyOf": [{"properties": {"b": {"uniqueItems": True}}}]}, "uniqueItems"),
    ],
)
def test_a_strict_schema_is_enforced_or_refused_where_calls_are_written_apart(more, message):
    _, chat = model(XML)
    schema = dict(type="object", properties=dict(a=dict(type="string")), additionalProperties=False)
    use = ToolUse((Tool("f", "", schema, strict=True),), must_call=True)
    assert chat.prepare(Conversation(HELLO, use)).options["logits_mask"] is not None
    for strict in (False, True):
        use = ToolUse((Tool("f", "", schema | more, strict),), must_call=True)
        if strict:
            with pytest.raises(ValueError, match=message):
                chat.prepare(Conversation(HELLO, use))
        else:
            assert chat.prepare(Conversation(HELLO, use)).options["logits_mask"] is not None


def test_a_few_of_many_schemas_that_cannot_be_enforced_are_found():
    tokenizer, chat = model(KNOWS_TOOLS)
    tools = tuple(Tool(f"f{i}", "", OUTSIDE if i in (3, 17, 18) else NOW.parameters) for i in range(24))
    mask = chat.prepare(Conversation(HELLO, ToolUse(tools, must_call=True))).options["logits_mask"]
    begin, call = ids_of(tokenizer, "<tool_call>"), '\n{{"name": "f{}", "arguments": {{"a": 1}}}}\n'
    assert [i for i in range(24) if is_allowed(tokenizer, mask, begin, call.format(i))] == [3, 17, 18]


def test_schemas_that_cannot_be_enforced_are_looked_for_in_a_bounded_number_of_tries(monkeypatch):
    _, chat = model(KNOWS_TOOLS)
    tools = tuple(Tool(f"f{i}", "", OUTSIDE) for i in range(250))
    tried, check = [], chat.grammars.check
    monkeypatch.setattr(chat.grammars, "check", lambda grammar: (tried.append(grammar), check(grammar)))
    assert chat.prepare(Conversation(HELLO, ToolUse(tools, must_call=True))).options["logits_mask"] is not None
    assert len(tried) == MAX_TRIES


@pytest.mark.parametrize("must_call", [False, True])
def test_a_strict_schema_that_cannot_be_enforced_is_refused(must_call):
    _, chat = model(KNOWS_TOOLS)
    with pytest.raises(ValueError, match="look"):
        chat.prepare(Conversation(HELLO, ToolUse((NOW, Tool("f", "", ODD, strict=True)), must_call)))


def test_an_answer_in_a_form_may_still_be_a_call():
    tokenizer, chat = model(KNOWS_TOOLS)
    begin = ids_of(tokenizer, "<tool_call>")[0]
    made = chat.prepare(Conversation(HELLO, USE, structured.choice(["yes", "no"])))
    assert {begin, *tokenizer.encode("y"), *tokenizer.encode("n")} <= allowed(made.options["logits_mask"]([]))
    forced = chat.prepare(Conversation(HELLO, ToolUse((NOW,), must_call=True))).options["logits_mask"]
    assert begin in allowed(forced([])) and not set(tokenizer.encode("yn")) & allowed(forced([]))


def test_a_form_holds_after_a_thought():
    tokenizer, chat = model(OPENS)
    close = ids_of(tokenizer, "</think>")[0]
    made = chat.prepare(Conversation(HELLO, grammar=structured.choice(["yes"])))
    mask, thought = made.options["logits_mask"], tokenizer.encode("anything")
    assert len(allowed(mask(thought))) > 100
    after = allowed(mask([*thought, close]))
    assert set(tokenizer.encode("y")) <= after and not set(tokenizer.encode("n")) & after
    assert parse(made.new_parser(), ["any", "thing</thi", "nk>\n\nyes"]) == [Reasoning("anything"), "yes"]


def test_marks_that_are_special_tokens_are_seen():
    tokenizer, chat = model(MISTRAL, special=["[TOOL_CALLS]"])
    made = chat.prepare(Conversation(HELLO, ToolUse((NOW,), must_call=True, parallel=False)))
    assert made.options["skip_special_tokens"] is False
    mask, ids = made.options["logits_mask"], []
    begin = ids_of(tokenizer, "[TOOL_CALLS]")
    for token in [*begin, *tokenizer.encode('[{"name": "now", "arguments": {}}]')]:
        assert token in allowed(mask(ids))
        ids.append(token)
    detokenizer = Detokenizer(tokenizer, skip_special_tokens=False)
    assert parse(made.new_parser(), [detokenizer.push(token) for token in ids]) == [("now", "{}")]
    assert "skip_special_tokens" not in chat.prepare(Conversation(HELLO)).options


def test_ids_of_calls_that_mistrals_templates_accept():
    _, chat = model(MISTRAL)
    prompt = chat.prompt(Conversation(CALLED, USE))
    assert "call_123" not in prompt
    one, other = (piece[:9] for piece in (prompt.split('"id": "')[1], prompt.split('"tool_call_id": "')[1]))
    assert one == other and one.isalnum()


def test_no_template():
    tokenizer = Tokenizer(byte_level(), frozenset({0}), None, {}, {})
    with pytest.raises(ValueError, match="no chat template"):
        ChatModel(tokenizer, {0}, tokenizer.vocab_size).prepare(Conversation(HELLO))


def test_plain_text_is_one_event_a_piece():
    _, chat = model(PLAIN)
    parser = chat.prepare(Conversation(HELLO)).new_parser()
    assert [parser.push("a "), parser.push(""), parser.finish()] == [[Content("a ")], [], []]


def test_a_call_that_may_not_be_parallel_ends_the_answer():
    tokenizer, chat = model(KNOWS_TOOLS)
    begin, end = ids_of(tokenizer, "<tool_call>", "</tool_call>")
    mask = chat.prepare(Conversation(HELLO, ToolUse((NOW,), parallel=False))).options["logits_mask"]
    call = [begin, *tokenizer.encode('\n{"name": "now", "arguments": {}}\n'), end]
    assert mask([]) is None and allowed(mask(call)) == {0}


def asked(**fields):
    return conversation(ChatFields.model_validate(dict(messages=HELLO, **fields)))


def tool(name, schema, strict):
    return dict(type="function", function=dict(name=name, parameters=schema, strict=strict))


FORMED = dict(type="json_schema", json_schema=dict(schema={"$ref": "http://127.0.0.1/x"}))
TWO = [tool("good", NOW.parameters, True), tool("bad", dict(properties=dict(a=dict(uniqueItems=True))), True)]


@pytest.mark.parametrize("template", [KNOWS_TOOLS, XML], ids=["hermes", "xml"])
@pytest.mark.parametrize("fields, message", [
    (dict(response_format=FORMED), "response_format: "),
    (dict(guided_json=dict(items=dict(uniqueItems=True))), "guided_json: "),
    (dict(guided_regex="(?=a)"), "guided_regex: "),
    (dict(guided_choice=[""]), "guided_choice: choice: expected"),
    (dict(guided_grammar="start: ("), "guided_grammar: "),
    (dict(grammar="root ::= ("), "grammar: GBNF grammar: "),
    (dict(json_schema=dict(type="object", minProperties=2)), "json_schema: JSON schema: minProperties"),
    (dict(tools=TWO), "tools: parameters of bad: "),
    (dict(tools=TWO, tool_choice="required"), "tools: parameters of bad: "),
    (dict(tools=TWO[:1], response_format=FORMED), "response_format: "),
])  # fmt: skip
def test_errors_name_the_field_and_the_tool_that_they_are_about(fields, message, template):
    _, chat = model(template)
    with pytest.raises(ValueError) as caught:
        chat.prepare(asked(**fields))
    assert str(caught.value).startswith(message) and str(caught.value).count("grammar: ") == message.count("grammar: ")
