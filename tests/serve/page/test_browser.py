"""The page in a real browser, against a real server."""

import json
import shutil

import httpx
import pytest

from lockstep import LLM
from lockstep.serve.errors import ApiError
from lockstep.weights.hub import resolve_model
from tests.serve.page import browser as driver
from tests.serve.page.visitor import ANSWER, ENDED, TOKENS, VERDICT, ask, fact, opened, send, setting, visit
from tests.serve.server import SIZES, running

pytestmark = [
    pytest.mark.alone,
    pytest.mark.skipif(driver.missing() is not None, reason=f"{driver.missing()}: the page is not tested"),
]
VERIFY = ".actions button:nth-last-of-type(3)"
AGAIN, IN_A_CROWD = ".actions button:nth-last-of-type(2)", ".actions button:nth-last-of-type(1)"


def test_an_answer_is_what_the_api_gives_for_its_seed(page, server):
    setting(page, "seed", "")  # the page draws one
    ask(page, "Write a loop.")
    assert page.text(".said p") == "Write a loop." and not page.shown("#welcome")
    seed = int(fact(page, "seed").removeprefix("seed "))
    body = dict(
        messages=[dict(role="user", content="Write a loop.")], seed=seed, max_tokens=24, temperature=0.7, top_p=0.95
    )
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60).json()
    usage = answer["usage"]
    assert fact(page, "tokens") == f"{usage['completion_tokens']} tokens" and fact(page, "origin") is None
    assert fact(page, "prompt").startswith(f"{usage['prompt_tokens']} prompt tokens")
    assert page.text("#fingerprint") == server.service.fingerprint and fact(page, "first").endswith(" s to first word")
    assert page.text(ANSWER) == answer["choices"][0]["message"]["content"]
    assert 1 < len(page.texts(TOKENS)) <= 24


def controls(page):
    """What the controls of sampling show."""
    names = ["temperature", "top_p", "min_p", "top_k"]
    return page.run("return arguments[0].map(name => Number(document.getElementById(name).value))", names)


def test_controls_show_the_model_s_defaults_until_they_are_moved(chromium, server, monkeypatch):
    monkeypatch.setattr(server.service.llm, "sampling_defaults", dict(temperature=2.5, top_p=0.935, top_k=7))
    page = chromium
    visit(page, server)
    page.until(lambda: controls(page) == [2.5, 0.935, 0, 7])
    assert page.texts("#sampling output") == ["2.50", "0.935", "0.00"]
    setting(page, "max_tokens", 12)
    setting(page, "seed", 7)
    ask(page, "Write a loop.")
    body = dict(messages=[dict(role="user", content="Write a loop.")], max_tokens=12, seed=7)
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60).json()
    assert page.text(ANSWER) == answer["choices"][0]["message"]["content"]
    setting(page, "top_k", 3)
    page.reload()
    page.until(lambda: controls(page) == [2.5, 0.935, 0, 3])
    monkeypatch.setattr(server.service.llm, "sampling_defaults", dict(temperature=0.25))  # another model is served now
    page.until(lambda: controls(page) == [0.25, 1, 0, 3])
    assert page.complaints() == []


def test_a_conversation_goes_on_and_can_be_forgotten(page, server):
    setting(page, "system", "Be brief.")
    ask(page, "One.")
    ask(page, "Two.", answers=2)
    first = page.texts(".answer > .text")[0]
    messages = [
        dict(role="system", content="Be brief."),
        dict(role="user", content="One."),
        dict(role="assistant", content=first),
        dict(role="user", content="Two."),
    ]
    body = dict(messages=messages, seed=7, max_tokens=24, temperature=0.7, top_p=0.95)
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60).json()
    assert page.text(ANSWER) == answer["choices"][0]["message"]["content"]
    page.click("#clear")
    assert page.shown("#welcome") and not page.shown(".answer")


def test_a_conversation_that_is_forgotten_while_it_is_answered_stays_forgotten(page, server, hold):
    send(page, "One.")
    page.until(lambda: len(page.texts(TOKENS)) > 3)
    page.click("#clear")
    page.until(lambda: page.shown("#send") and server.service.num_open == 0)
    hold.num_tokens = None
    page.run("""const send = fetch;
        window.fetch = (path, options) => {
          if (options?.body) window.sent = JSON.parse(options.body).messages;
          return send(path, options);
        };""")
    ask(page, "Two.")
    assert page.run("return sent") == [dict(role="user", content="Two.")] and page.texts(".said p") == ["Two."]


def test_run_again_gives_the_same_alone_and_in_a_crowd(page):
    ask(page, "Write a class.")
    tokens = fact(page, "tokens")
    for button, words in (
        (AGAIN, f"✓ The same: all {tokens}"),
        (IN_A_CROWD, f"✓ The same beside 4 others: all {tokens}"),
    ):
        page.click(button)
        page.until(lambda words=words: words in page.text(VERDICT))
        assert page.shown(f"{VERDICT}.same")


def test_verify_computes_the_answer_anew(page, server):
    ask(page, "Write a class.")
    page.click(VERIFY)
    page.until(lambda: page.shown(f"{VERDICT}.same"))
    assert page.text(VERDICT).startswith("✓ True: the model gives this answer to this request, bit for bit, in ")
    page.reload()  # the receipt stays with the answer
    page.until(lambda: page.texts("#running") == ["0"])
    page.click(VERIFY)
    page.until(lambda: page.shown(f"{VERDICT}.same"))


def test_verify_notices_another_request(page):
    ask(page, "Write a class.")
    page.run("""const send = fetch;
        window.fetch = (path, options) => send(path, options?.body ? {...options, body: options.body.replaceAll(
            "Write a class", "Write a test")} : options);""")
    page.click(VERIFY)
    page.until(lambda: page.shown(f"{VERDICT}.differs"))
    assert page.text(VERDICT) == "✗ False: the receipt is of another prompt than the request"


def test_run_again_notices_a_difference(page):
    ask(page, "Write a class.")
    page.run("""const send = fetch;
        window.fetch = (path, options) => send(path, options?.body ? {...options, body: JSON.stringify(
            {...JSON.parse(options.body), seed: JSON.parse(options.body).seed + 1})} : options);""")
    page.click(AGAIN)
    page.until(lambda: page.shown(f"{VERDICT}.differs"))
    assert "✗ Not the same, from token" in page.text(VERDICT)


def test_alternatives_on_hover_and_by_keyboard(page):
    ask(page, "Write a test.")
    assert not page.shown("#card")
    page.hover(f"{TOKENS}:nth-child(3)")
    page.until(lambda: page.shown("#card"))
    rows = page.run("return [...document.querySelectorAll('#card tr')].map(r => [r.className, r.cells[2].textContent])")
    assert 5 <= len(rows) <= 6 and [kind for kind, _ in rows].count("chosen") == 1
    shares = [float(words.strip("< %")) for _, words in rows[:5]]
    assert shares == sorted(shares, reverse=True) and 0 < sum(shares) < 101
    page.hover("#greeting, h1")
    page.until(lambda: not page.shown("#card"))
    page.run(f"document.querySelector({json.dumps(TOKENS)}).focus()")
    page.press("ArrowRight", "ArrowRight")
    place = f"return [...document.querySelectorAll({json.dumps(TOKENS)})].indexOf(document.activeElement)"
    assert page.shown("#card") and page.run(place) == 2
    assert page.run("return document.activeElement.getAttribute('aria-describedby')") == "card"
    page.press("Escape")
    assert not page.shown("#card")


def test_stop_ends_the_answer_on_the_server_too(page, server, hold):
    send(page, "Go on and on.")
    page.until(lambda: len(page.texts(TOKENS)) > 3 and page.texts("#running") == ["1"])
    page.click("#stop")
    page.until(lambda: page.shown(ENDED))
    page.until(lambda: server.service.num_open == 0 and not server.service.counts()["running"])
    assert fact(page, "end") == "stopped" and page.shown("#send")
    hold.num_tokens = 16
    page.click(AGAIN)  # as far as it came, and no further: held, it would not end by itself
    page.until(lambda: "✓ The same" in page.text(VERDICT))
    page.until(lambda: server.service.num_open == 0)


def test_the_figures_are_the_server_s(page, server):
    page.run("""window.rates = [];
        const rate = document.getElementById("rate");
        new MutationObserver(() => rates.push(rate.textContent)).observe(rate, {childList: true});""")
    ask(page, "Count to ten. " * 130)
    ask(page, "And again.", answers=2)  # after the same 512 tokens, where the model's state was kept
    counts = server.service.counts()
    assert counts["hit_tokens"] > 0
    page.until(lambda: page.texts("#cached") == [f"{100 * counts['hit_tokens'] / counts['query_tokens']:.3g} %"])
    page.until(lambda: page.text("#memory") == "0 %" and page.text("#waiting") == "0")
    page.until(lambda: any(rate.endswith(" tokens/s") for rate in page.run("return rates")))
    cached = counts["hit_tokens"]
    assert fact(page, "prompt").endswith(f" prompt tokens ({cached} from cache)")


def test_tokens_find_their_text(page):
    """Each token has the text that is its own; what only several give together they share."""
    script = """const [text, tokens] = arguments;
        const {pieces} = await import("/page/text/tokens.js");
        const {made, left} = pieces(text, tokens.map(text => ({text, logprob: -1, top: []})));
        return [made.map(e => e.text), left.map(t => t.text)];"""

    def placed(text, *tokens):
        return page.run(f"return (async function() {{ {script} }})(...arguments)", text, tokens)

    assert placed("def f", "def", " f") == [["def", " f"], []]
    assert placed("def f", "def", " f", "<|end|>") == [["def", " f"], ["<|end|>"]]
    assert placed("", "bytes:\\xf0") == [[], ["bytes:\\xf0"]]
    assert placed("a🙂b", "a", "bytes:\\xf0", "bytes:\\x9f", "b") == [["a", "🙂", "b"], []]
    assert placed("word x", " word", " x") == [["word", " x"], []]
    assert placed("no log-probabilities") == [["no log-probabilities"], []]


@pytest.mark.parametrize(
    "error, words",
    [
        (ApiError(429, "the server is busy: 9 wait", retry_after=7), "The server is busy: 9 wait. Try again in 7 s."),
        (ApiError(503, "the server is shutting down"), "The server is shutting down."),
    ],
)
def test_a_refusal_is_told_in_words(chromium, server, monkeypatch, error, words):
    def refuse():
        raise error

    page = opened(chromium, server)
    monkeypatch.setattr(server.service, "check_open", refuse)
    send(page, "Hello?")
    page.until(lambda: page.shown(".problem"))
    assert page.text(".problem") == words and page.shown("#send")
    assert len(page.complaints()) == 1  # the browser itself reports the status


def test_a_lost_connection_is_told_in_words(chromium, server, hold):
    page = opened(chromium, server)
    send(page, "Go on and on.")
    page.until(lambda: len(page.texts(TOKENS)) > 3)
    for connection in list(server.server.server_state.connections):
        connection.loop.call_soon_threadsafe(connection.transport.abort)
    page.until(lambda: page.shown(".problem"))
    assert page.text(".problem") == "The connection broke off before the answer was complete."
    page.until(lambda: server.service.num_open == 0)
    page.complaints()


FIGURES, NONE = 5, "\N{EN DASH}"


def test_a_server_that_is_gone_is_noticed_and_so_is_its_return(chromium, server):
    page, speed = opened(chromium, server), dict(latency=0, downloadThroughput=-1, uploadThroughput=-1)
    page.protocol("Network.enable")
    page.protocol("Network.emulateNetworkConditions", offline=True, **speed)
    try:
        page.until(lambda: "is not reachable" in page.text("#model"))
        assert page.texts("#figures dd > span, #figures dd:not(:has(span))") == [NONE] * FIGURES
        send(page, "Hello?")
        page.until(lambda: page.text("#notice") == "The server cannot be reached.")
        assert page.run("return document.getElementById('prompt').value") == "Hello?" and page.shown("#send")
    finally:
        page.protocol("Network.emulateNetworkConditions", offline=False, **speed)
    page.until(lambda: page.text("#model") == "lockstep")
    assert page.text("#running") == "0" and page.text("#rate") == NONE
    page.press("Enter")
    page.until(lambda: page.shown(ENDED) == 1)
    assert not page.shown("#notice")
    page.complaints()


@pytest.mark.parametrize("width", [360, 820, 1400])
def test_nothing_is_cut_off_at_any_width(chromium, server, width):
    page = opened(chromium, server, width)
    ask(page, "x" * 300)
    over = "return document.scrollingElement.scrollWidth - innerWidth"
    assert page.run(over) <= 0
    if page.shown("#toggle-settings"):
        assert not page.shown("#settings")
        page.click("#toggle-settings")
        assert page.shown("#settings") and page.run(over) <= 0
        page.click("#toggle-settings")
        setting(page, "seed", "seven")
        send(page, "Again.")
        assert page.shown("#settings") and page.shown(ENDED) == 0  # the settings show what is wrong with one of them
        assert page.run("return document.activeElement.id") == "seed"
    assert page.shown("#temperature") and page.complaints() == []


def test_a_base_model_behind_a_key_continues_text(chromium, tmp_path):
    shutil.copytree(resolve_model(None), tmp_path / "base")
    settings = tmp_path / "base" / "tokenizer_config.json"
    known = json.loads(settings.read_text())
    del known["chat_template"]
    settings.write_text(json.dumps(known))
    with running(LLM(str(tmp_path / "base"), **SIZES), api_keys=["s3cret"]) as server:
        chromium.look(1100, 800)
        chromium.open(server.url)
        chromium.until(lambda: chromium.shown("#key"))
        assert "wants an API key" in chromium.text("#model")
        chromium.type("#key", "s3cret")
        chromium.until(lambda: chromium.text("#greeting") == "Begin a text.")
        setting(chromium, "max_tokens", 12)
        setting(chromium, "temperature", 0.7)
        setting(chromium, "top_p", 0.95)
        setting(chromium, "seed", 7)
        chromium.complaints()
        ask(chromium, "def add(a, b):")
        body = dict(prompt="def add(a, b):", seed=7, max_tokens=12, temperature=0.7, top_p=0.95)
        answer = httpx.post(f"{server.url}/v1/completions", json=body, headers={"x-api-key": "s3cret"}, timeout=60)
        assert chromium.text(ANSWER) == "def add(a, b):" + answer.json()["choices"][0]["text"]
        chromium.click(AGAIN)
        chromium.until(lambda: chromium.shown(f"{VERDICT}.same"))
        chromium.click(".actions button:nth-of-type(2)")
        chromium.run("document.activeElement.value = 'def sub(a, b):'")
        chromium.press("Enter")
        chromium.until(lambda: chromium.texts(".given") == ["def sub(a, b):"] and chromium.shown(ENDED) == 1)
        assert chromium.complaints() == []
