"""`prediction`: a predicted text makes an answer faster, and changes nothing else."""

import httpx
import pytest

from tests.serve.chatting import HELLO, THINKING, talking
from tests.serve.server import running
from tests.serve.test_status import metrics

PROMPT = dict(prompt="def add(a, b):\n    return", max_tokens=60, ignore_eos=True, temperature=0)


@pytest.fixture(scope="module")
def guessing():
    """A server that speculates."""
    with running(speculate="lookup", draft=7) as made:
        yield made


def post(server, path="completions", **body):
    got = httpx.post(f"{server.url}/v1/{path}", json=body).json()
    assert not got.get("error"), got
    return got


def without_ids(answer):
    """The choices of an answer with calls, whose ids are random."""
    for choice in answer["choices"]:
        for call in choice["message"].get("tool_calls") or ():
            del call["id"]
    return answer["choices"]


def details(answer):
    made = answer["usage"].get("completion_tokens_details", {})
    return made.get("accepted_prediction_tokens", 0), made.get("rejected_prediction_tokens", 0)


def test_a_prediction_that_is_right_is_accepted_and_counted(server, guessing):
    text = post(server, **PROMPT)["choices"][0]["text"]
    before = metrics(guessing)
    for content in (text, [dict(type="text", text=text[:20]), dict(type="text", text=text[20:])]):
        salt = str(len(content))  # so that drafts do not come from earlier answers
        answer = post(guessing, **PROMPT, prediction=dict(type="content", content=content), cache_salt=salt)
        assert answer["choices"][0]["text"] == text
        accepted, rejected = details(answer)
        assert accepted > 45 and rejected < 15
    moved = {name: count - before.get(name, 0) for name, count in metrics(guessing).items()}
    drafted, right = (moved[f"lockstep_{name}_total", "1", "prediction"] for name in ("drafts", "accepted_drafts"))
    assert drafted == right >= 12


def test_without_speculation_it_does_nothing(server):
    for body in (PROMPT, dict(PROMPT, stream=False, n=2)):
        answer, plain = (post(server, **body, **more) for more in (dict(prediction=SOME), {}))
        assert answer["choices"] == plain["choices"] and "completion_tokens_details" not in answer["usage"]


SOME = dict(type="content", content="return a + b")


def test_an_answer_to_the_same_salt_is_looked_in_and_no_other(guessing):
    asked = dict(PROMPT, prompt="class Queue:\n", seed=5, temperature=1.0)
    first = post(guessing, **asked, cache_salt="mine")
    others = post(guessing, **asked, cache_salt="another's")
    again = post(guessing, **asked, cache_salt="mine")
    assert first["choices"][0]["text"] == others["choices"][0]["text"] == again["choices"][0]["text"]
    assert details(first) == details(others) and details(again)[0] > details(first)[0] + 20


@pytest.mark.parametrize("path", ["chat/completions", "responses", "messages"])
def test_conversations_take_it_too(thinker, path):
    body = dict(input="hello") if path == "responses" else dict(messages=HELLO, max_tokens=4)
    assert post(thinker, path, **body, prediction=SOME)


PERSON = dict(
    type="object",
    required=["first_name", "favourite_colour"],
    additionalProperties=False,
    properties=dict(first_name=dict(type="string", maxLength=9), favourite_colour=dict(enum=["green", "blue"])),
)


@pytest.mark.parametrize("temperature", [0, 1])
def test_what_a_form_forces_is_drafted(server, guessing, temperature):
    form = dict(type="json_schema", json_schema=dict(name="person", schema=PERSON, strict=True))
    body = dict(prompt="x = ", n=3, seed=8, temperature=temperature, response_format=form, max_tokens=80)
    for more in (dict(), dict(bad_words=["green", "name is"], ignore_eos=True, min_tokens=3)):
        plain, answer = (post(each, **body, **more) for each in (server, guessing))
        assert answer["choices"] == plain["choices"]
        assert details(answer)[0] > 20


@pytest.fixture(scope="module")
def guessing_thinker():
    with talking(THINKING, speculate="lookup", draft=9) as made:
        yield made


TOOL = dict(type="function", function=dict(name="remember_a_person", parameters=PERSON, strict=True))


@pytest.mark.parametrize(
    "more",
    [
        dict(tool_choice="required"),
        dict(tool_choice="required", chat_template_kwargs=dict(enable_thinking=True), min_tokens=30),
        dict(tool_choice="auto", parallel_tool_calls=False),
    ],
    ids=["required", "thinking", "auto"],
)
def test_calls_and_thoughts_are_the_same_with_drafts(thinker, guessing_thinker, more):
    for temperature in (0, 1):
        body = dict(messages=HELLO, tools=[TOOL], seed=3, n=2, temperature=temperature, max_tokens=120, **more)
        plain, answer = (post(each, "chat/completions", **body) for each in (thinker, guessing_thinker))
        assert without_ids(answer) == without_ids(plain)
        if more["tool_choice"] == "required":
            assert details(answer)[0] > 20


@pytest.mark.parametrize(
    "prediction, param, says",
    [
        ("return", "prediction", 'got "return"'),
        (dict(content="x"), "prediction.type", "required"),
        (dict(type="content"), "prediction.content", "required"),
        (dict(type="image", content="x"), "prediction.type", "'content'"),
        (dict(type="content", content=5), "prediction.content", "expected a string or an array of text parts, got 5"),
        (dict(type="content", content=dict(text="x")), "prediction.content", "expected a string or an array of text"),
        (dict(type="content", content=[5]), "prediction.content[0]", "got 5"),
        (dict(type="content", content=[dict(type="image_url", text="x")]), "prediction.content[0].type", "'text'"),
        (dict(type="content", content=[dict(type="text")]), "prediction.content[0].text", "required"),
        (dict(type="content", content="x " * 1500), "prediction", "at most 1024 tokens, as many as the context, got"),
        (dict(type="content", content="x " * 200000), "prediction", "1024 tokens that it may have"),
    ],
    ids=lambda each: str(each)[:50],
)
def test_what_is_no_text_or_too_long_is_refused(server, prediction, param, says):
    got = httpx.post(f"{server.url}/v1/completions", json=dict(PROMPT, prediction=prediction))
    error = got.json()["error"]
    assert got.status_code == 400 and error["param"] == param and says in error["message"], error
