"""A conversation: edited, answered anew, kept over a reload, followed as it grows, and begun behind a key."""

import json

import pytest

from lockstep import LLM
from tests.serve.chatting import THINKING, with_template
from tests.serve.page import browser as driver
from tests.serve.page.visitor import ANSWER, LAST, SET, VERDICT, ask, ended, fact, held_at, play, send, setting, visit
from tests.serve.server import SIZES, running

pytestmark = pytest.mark.skipif(driver.missing() is not None, reason=f"{driver.missing()}: the page is not tested")
RUN_AGAIN = f"{LAST}.actions button:nth-last-of-type(2)"
SEEN = """const send = fetch;
    window.fetch = (path, options) => {
      if (options?.body) window.sent = JSON.parse(options.body);
      return send(path, options);
    };"""


def roles(page):
    """The messages of the last request, as a text each."""
    return [f"{message['role']}: {message['content']}" for message in page.run("return sent")["messages"]]


def said(page):
    return page.texts(".said p")


def test_an_edited_message_is_where_the_conversation_goes_on(page):
    page.run(SEEN)
    for number, text in enumerate(("One.", "Two.", "Three."), 1):
        ask(page, text, number)
    first = page.texts(".answer > .text")[0]
    page.run("document.querySelectorAll('.said .edit')[1].click()")
    assert page.run("return document.activeElement.value") == "Two."
    page.press("Escape")
    assert said(page) == ["One.", "Two.", "Three."]
    assert page.run("return document.activeElement.className") == "edit"
    page.press("Enter")
    page.run("document.activeElement.value = 'Zwei.'")
    page.press("Enter")
    page.until(lambda: said(page) == ["One.", "Zwei."])
    ended(page, 2)
    assert roles(page) == ["user: One.", f"assistant: {first}", "user: Zwei."]


def test_another_answer_has_another_seed_and_the_shown_one_goes_on(page):
    page.run(SEEN)
    ask(page, "Write a class.")
    first = page.text(ANSWER)
    page.click(f"{LAST}.another")
    page.until(lambda: page.shown(".choice") == 1 and page.shown("#send"))
    assert page.text(".choice span") == "2 of 2" and fact(page, "seed") != f"seed {SET['seed']}"
    assert page.text(ANSWER) != first and roles(page) == ["user: Write a class."]
    page.click(".choice button:first-child")
    assert page.text(ANSWER) == first and page.text(".choice span") == "1 of 2"
    ask(page, "Go on.", 2)
    assert roles(page)[1] == f"assistant: {first}" and not page.shown(".choice")
    setting(page, "temperature", 0)
    page.click(f"{LAST}.another")
    page.until(lambda: page.shown(".choice") == 1 and page.shown("#send"))
    setting(page, "max_tokens", 100)
    page.click(f"{LAST}.another")
    page.until(lambda: page.texts(".choice span") == ["3 of 3"] and page.shown("#send"))
    page.click(f"{LAST}.another")  # temperature 0, and the same settings
    assert "every seed gives the same" in page.text("#notice") and page.text(".choice span") == "3 of 3"


def test_a_reload_keeps_the_conversation(page, server, hold):
    setting(page, "system", "Be brief.")
    send(page, "One.")
    page.until(lambda: len(page.texts(f"{LAST}.token")) > 3)
    page.run("document.getElementById('prompt').value = 'not sent yet'")
    page.reload()
    page.until(lambda: page.texts("#running") == ["0"] and server.service.num_open == 0)
    assert fact(page, "end") == "interrupted" and said(page) == ["One."]
    assert page.run("return document.getElementById('prompt').value") == "not sent yet"
    assert page.run("return document.getElementById('system').value") == "Be brief."
    page.hover(f"{LAST}.token:nth-child(2)")
    page.until(lambda: page.shown("#card tr") > 1)
    hold.num_tokens = None
    page.click(RUN_AGAIN)
    page.until(lambda: "✓ The same" in page.text(VERDICT))
    page.run(SEEN)
    before = page.text(ANSWER)
    ask(page, "Two.", 2)
    assert roles(page) == ["system: Be brief.", "user: One.", f"assistant: {before}", "user: Two."]
    page.click("#clear")
    assert page.shown("#welcome") and not page.shown(".turn")
    page.click("#back")
    assert said(page) == ["One.", "Two."] and not page.shown("#welcome")
    page.click("#clear")
    page.reload()
    page.until(lambda: page.texts("#running") == ["0"])
    assert not page.shown(".turn") and not page.shown("#back")


def test_a_conversation_without_room_keeps_what_fits(page):
    limit = """const set = Storage.prototype.setItem, [room] = arguments;
        Storage.prototype.setItem = function (name, value) {
          if (value.length > room) throw new DOMException("full", "QuotaExceededError");
          set.call(this, name, value);
        };"""
    ask(page, "One.")
    ask(page, "Two.", 2)
    page.run(limit, len(page.run("return sessionStorage.getItem('conversation')")) - 1000)
    texts = page.texts(".answer > .text")
    page.reload()
    page.until(lambda: page.texts("#running") == ["0"])
    assert page.texts(".answer > .text") == texts and not page.shown("#unkept")
    buttons = [len(page.texts(f".turn:nth-of-type({number}) .actions button")) for number in (1, 2)]
    assert buttons == [2, 5]  # the older one cannot be verified or run again
    page.run(limit, 100)
    ask(page, "Three.", 3)
    assert page.shown("#unkept") and page.run("return sessionStorage.getItem('conversation')") is None
    page.run('sessionStorage.conversation = \'{"version": 1, "turns": [{}]}\'; Storage.prototype.setItem = () => {}')
    page.reload()
    page.until(lambda: page.texts("#running") == ["0"])
    assert not page.shown(".turn") and page.shown("#welcome")


def test_an_answer_is_followed_unless_the_reader_scrolls_away(page):
    log = "const log = document.getElementById('log');"
    left = f"{log} return log.scrollHeight - log.scrollTop - log.clientHeight"
    seen = f"{log} return log.scrollHeight"
    play(page, *["word " * 400 + "\n\n"] * 9)  # each of them higher than the page
    held_at(page, 3)
    send(page, "Go.")
    page.until(lambda: page.run(seen) > 1500 and page.run(left) < 4)
    setting(page, "prompt", "\n" * 5)  # the field grows, and less of the conversation is seen
    before = page.run(seen)
    held_at(page, 6)
    page.until(lambda: page.run(seen) > before + 1000 and page.run(left) < 4)
    top = page.run(f"{log} return log.scrollTop -= 10")
    held_at(page, 0)
    ended(page)
    assert page.run(f"{log} return log.scrollTop") == top and page.run(left) > 1000
    page.click("#to-end")
    assert page.run(left) < 4 and not page.shown("#to-end")


def test_less_room_and_more_text_at_once_leave_the_end_in_sight(page):
    script = """return (async () => {
        const {Follow} = await import("/page/follow.js");
        const [box, text] = ["div", "div"].map(tag => document.createElement(tag));
        document.body.append(box);
        box.append(text);
        Object.assign(box.style, {height: "100px", overflowY: "auto"});
        text.style.height = "300px";
        const follow = new Follow(box, document.createElement("button"));
        follow.end();
        box.style.height = "50px";
        follow.grow(() => { text.style.height = "400px"; });
        return box.scrollTop;
    })();"""
    assert page.run(script) == 350


def test_a_message_waits_until_the_model_is_loaded(page, server, monkeypatch):
    monkeypatch.setattr(server.service, "state", "loading")
    page.reload()
    page.until(lambda: page.text("#model") == "is loading …")
    send(page, "Hello?")
    page.until(lambda: page.text("#notice") == "Waiting for the server …")
    page.press("Escape")
    assert page.run("return document.getElementById('prompt').value") == "Hello?" and not page.shown("#notice")
    page.press("Enter")
    page.until(lambda: page.shown("#stop"))
    monkeypatch.undo()
    ended(page)
    assert said(page) == ["Hello?"] and not page.shown("#notice")


def test_the_first_message_waits_for_the_model_s_abilities(chromium):
    """Behind a key, with a model whose thinking can be switched."""
    page = chromium
    with running(with_template(LLM(**SIZES), THINKING), api_keys=["s3cret"]) as server:
        visit(page, server)
        page.until(lambda: page.shown("#key"))
        setting(page, "max_tokens", 8)
        send(page, "Hello?")
        page.until(lambda: page.text("#notice") == "This server wants an API key.")
        assert page.run("return document.getElementById('prompt').value") == "Hello?" and not page.shown(".turn")
        page.run(SEEN)
        page.complaints()
        page.run("document.getElementById('key').value = 's3cret'; document.getElementById('composer').requestSubmit()")
        ended(page)
        assert roles(page) == ["user: Hello?"] and "chat_template_kwargs" not in page.run("return sent")
        assert page.run("return document.getElementById('think').getAttribute('aria-pressed')") == "true"
        for number, (pressed, is_on) in enumerate((("false", False), ("true", True)), 2):
            page.click("#think")
            assert page.run("return document.getElementById('think').getAttribute('aria-pressed')") == pressed
            ask(page, "Again.", number)
            assert page.run("return sent.chat_template_kwargs") == dict(enable_thinking=is_on)
        page.reload()
        page.until(lambda: page.shown("#key"))
        assert page.shown(".turn") == 3 and not page.shown("#think")
        page.type("#key", "s3cret")
        page.until(lambda: page.shown("#think"))
        stored = page.run("return JSON.stringify([sessionStorage, localStorage, document.cookie])")
        assert "s3cret" not in stored and json.loads(stored)[0]["settings"]
        page.complaints()
