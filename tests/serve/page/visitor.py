"""What a visitor does on the page, for the tests of it, and a stream that a test plays instead of the server."""

import json

SET = dict(max_tokens=24, temperature=0.7, top_p=0.95, seed=7)  # with a seed an answer is the same in every run
ENDED, TOKENS = ".actions", ".turn:last-child .text .token"
LAST = ".turn:last-child "
VERDICT = LAST + ".verdict"
ANSWER = LAST + ".answer > .text"


def visit(chromium, server, width=1100):
    """Opens the page as one who was never there before."""
    chromium.look(width, 800)
    chromium.open(server.url)
    chromium.complaints()  # of a page before, whose server is gone
    chromium.run("sessionStorage.clear(); document.getElementById('clear').click()")
    chromium.run("document.getElementById('prompt').value = ''")
    chromium.reload()


def opened(chromium, server, width=1100):
    """The browser on a fresh page, with few tokens to an answer."""
    visit(chromium, server, width)
    chromium.until(lambda: chromium.texts("#running") == ["0"])
    for name, value in SET.items():
        setting(chromium, name, value)
    return chromium


def setting(page, name, value):
    """Sets a control; true and false are for check boxes."""
    page.run(
        "const e = document.getElementById(arguments[0]), value = arguments[1];"
        "if (e.type === 'checkbox') e.checked = value; else e.value = String(value);"
        "e.dispatchEvent(new Event('input', {bubbles: true}))",
        name,
        value,
    )


def send(page, text):
    """Sends a message."""
    page.type("#prompt", text)
    page.press("Enter")


def ask(page, text, answers=1):
    """Sends a message; waits for the end of its answer."""
    send(page, text)
    ended(page, answers)


def ended(page, answers=1):
    """Waits until there are so many answers, all of them at their end."""
    page.until(lambda: page.shown(ENDED) == answers and page.shown("#send"))


def fact(page, name):
    """The words of a figure about the last answer; None if it is not shown."""
    found = page.texts(f"{LAST}.facts .{name}")
    return found[0] if found else None


def play(page, *events):
    """Makes all answers of the page from now on this stream: texts, or events as the server sends them."""
    all_events = [chunk(dict(content=event)) if isinstance(event, str) else event for event in events]
    all_events.append(dict(choices=[dict(index=0, finish_reason="stop", delta={})]))
    lines = [f"data: {json.dumps(event)}\n\n" for event in all_events]
    page.run(
        """const [lines] = arguments, send = window.send ??= fetch, encoder = new TextEncoder();
        window.fetch = (path, options) => {
          if (!path.startsWith("/v1")) return send(path, options);
          window.sent = JSON.parse(options.body);
          const body = new ReadableStream({
            async start(stream) {
              for (const [number, line] of [...lines, "data: [DONE]\\n\\n"].entries()) {
                while (window.held && number >= window.held) await new Promise(resolve => setTimeout(resolve, 10));
                stream.enqueue(encoder.encode(line));
              }
              stream.close();
            },
          });
          return Promise.resolve(new Response(body));
        };""",
        lines,
    )


def held_at(page, number):
    """Holds what `play` plays after so many events; 0 lets it go on."""
    page.run("window.held = arguments[0]", number)


def chunk(delta, logprobs=None):
    """An event with a piece of an answer, as the server sends it."""
    return dict(choices=[dict(index=0, finish_reason=None, delta=delta, logprobs=logprobs)])


def thought(text):
    """An event with a piece of a thought."""
    return chunk(dict(reasoning_content=text))
