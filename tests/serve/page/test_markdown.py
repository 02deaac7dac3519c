"""How answers are shown: Markdown as elements, a stranger's text that can do nothing, each token where it stands."""

import pytest

from tests.serve.page import browser as driver
from tests.serve.page.visitor import ANSWER, LAST, TOKENS, ask, chunk, ended, held_at, play, send, setting, thought

pytestmark = pytest.mark.skipif(driver.missing() is not None, reason=f"{driver.missing()}: the page is not tested")
SHOWN = """const [texts] = arguments;
    return (async () => {
      const {ShownText} = await import("/page/text/shown_text.js");
      const {Source} = await import("/page/text/source.js");
      const outer = element => element.outerHTML.replaceAll(/<.?span[^>]*>/g, "")
        .replaceAll(/ (tabindex|rel|target|referrerpolicy|title)="[^"]*"/g, "");
      return texts.map(text => {
        const source = new Source(), shown = new ShownText(source);
        source.add([{text, tokens: []}]);
        shown.show(true, true);
        return [...shown.root.children].map(outer).join("");
      });
    })();"""
CODE = (
    '<figure><figcaption>{}<button type="button" class="copy" aria-label="Copy the code">Copy</button></figcaption>'
    "<pre><code>{}</code></pre></figure>"
)
CASES = {
    "# A\n\n###### B": "<h3>A</h3><h6>B</h6>",
    "one **two** *three*\nfour `5`": "<p>one <strong>two</strong> <em>three</em><br>four <code>5</code></p>",
    "~~gone~~ ~5 to ~6": "<p><del>gone</del> ~5 to ~6</p>",
    "3. a\n4. b\n   - c": '<ol start="3"><li>a</li><li>b<ul><li>c</li></ul></li></ol>',
    "- [x] a\n- [ ] b": '<ul><li class="task">☑ a</li><li class="task">☐ b</li></ul>',
    "> a\n> - b": "<blockquote><p>a</p><ul><li>b</li></ul></blockquote>",
    "```py\na = 1\n\n\nb\n```": CODE.format("py", "a = 1\n\n\nb"),
    "~~~\nopen": CODE.format("code", "open"),
    "- a\n\n  ```\n  b\n    c\n  ```": "<ul><li><p>a</p>" + CODE.format("code", "b\n  c") + "</li></ul>",
    "|a|b|\n|-|-:|\n|1|2|": '<div class="wide" role="region" aria-label="Table"><table>'
    '<thead><tr><th>a</th><th class="at-right">b</th></tr></thead>'
    '<tbody><tr><td>1</td><td class="at-right">2</td></tr></tbody></table></div>',
    "&lt;b&gt; &#64; &copy; &nothing;": "<p>&lt;b&gt; @ © &amp;nothing;</p>",
    "\\*a\\* \\(x\\)": "<p>*a* \\(x\\)</p>",
    "a<br>b\n\n---": "<p>a<br>b</p><hr>",
    "[l](https://a.b/c?d) [r]\n\n[r]: http://e.f": '<p><a href="https://a.b/c?d">l</a> <a href="http://e.f/">r</a></p>',
    "see https://a.b, c@d.ef": '<p>see <a href="https://a.b/">https://a.b</a>, <a href="mailto:c@d.ef">c@d.ef</a></p>',
    # nothing of these does anything, and nothing of them is lost
    "<script>alert(1)</script>": '<p class="written">&lt;script&gt;alert(1)&lt;/script&gt;</p>',
    "a <img src=x onerror=alert(1)> b": "<p>a &lt;img src=x onerror=alert(1)&gt; b</p>",
    "[x](javascript:alert(1))": "<p>[x](javascript:alert(1))</p>",
    "[x](JaVaScRiPt&colon;alert(1))": "<p>[x](JaVaScRiPt&amp;colon;alert(1))</p>",
    "[x](data:text/html,a) [y](/v1/models) [z](//a.b)": "<p>[x](data:text/html,a) [y](/v1/models) [z](//a.b)</p>",
    '![i](http://a.b/c "t\\"><script>")': '<p><a href="http://a.b/c" class="image">i</a></p>',
    "![i](javascript:alert(1))": "<p>![i](javascript:alert(1))</p>",
    '```"><script>\nx\n```': CODE.format('"&gt;&lt;script&gt;', "x"),
    "> " * 3000 + "deep": '<p class="written">' + ("&gt; " * 3000) + "deep</p>",
    "": "",
}


def test_markdown_becomes_elements_and_nothing_else_does(page):
    found = page.run(SHOWN, list(CASES))
    assert dict(zip(CASES, found, strict=True)) == CASES


def test_a_growing_answer_is_shown_as_the_whole_one(page):
    """At every length, though only its last blocks are parsed again; the elements of the others stay."""
    text = (
        "# Title\n\nSome *words*\nand more\n\n1. one\n\n2. two\n\n   ```py\n   x\n   ```\n\n10) a\n> quote\n\n| a |"
        "\n|---|\n| b |\n\n```js\n# no title\n\n- no list\n```\n\nSetext\n---\n\n- a\n- b\n\n- c\n\nend\r\n\r\n<b>\n"
    )
    script = """const [text] = arguments;
        return (async () => {
          const {ShownText} = await import("/page/text/shown_text.js");
          const {Source} = await import("/page/text/source.js");
          const source = new Source(), shown = new ShownText(source), differences = [];
          let kept = 0, first = null;
          for (let at = 0; at < text.length; at += 3) {
            source.add([{text: text.slice(at, at + 3), tokens: []}]);
            shown.show(true, false);
            kept += first !== null && first === shown.root.firstChild;
            first = shown.root.firstChild;
            const whole = new ShownText(source);
            whole.show(true, false);
            if (whole.root.innerHTML !== shown.root.innerHTML) differences.push(text.slice(0, at + 3));
          }
          return [differences, kept];
        })();"""
    differences, kept = page.run(script, text)
    assert differences == [] and kept > len(text) // 3 - 5


HOSTILE = """# Hi <b>there</b>

<img src="http://127.0.0.1:9/a.png" onerror="document.title='hit'"> ![pixel](http://127.0.0.1:9/b.png)

<script>document.title = 'hit'</script><iframe src="http://127.0.0.1:9/"></iframe>
<style>body { background: url(http://127.0.0.1:9/c.png) }</style><link rel=stylesheet href=http://127.0.0.1:9/d.css>

[a](javascript:document.title='hit') <a href="javascript:1">b</a> <svg/onload=document.title='hit'>
"""


def test_an_answer_can_do_nothing(page):
    setting(page, "markdown", True)
    play(page, thought(HOSTILE), HOSTILE)
    setting(page, "prompt", HOSTILE)
    page.click("#send")
    ended(page)
    assert page.run("return document.title") == "Lockstep"
    made = "return [...document.querySelectorAll('#log *')].map(e => e.localName)"
    assert not {"img", "script", "iframe", "style", "link", "svg", "form"} & set(page.run(made))
    targets = page.run("return [...document.links].map(a => [a.protocol, a.target, a.rel, a.referrerPolicy])")
    assert targets == [["http:", "_blank", "noopener noreferrer nofollow", "no-referrer"]] * 2
    loaded = page.run("return performance.getEntriesByType('resource').map(e => new URL(e.name).port)")
    assert set(loaded) == {page.run("return location.port")}
    markup = "try { document.createElement('p').innerHTML = 'a'; return 'made' } catch (error) { return error.name }"
    assert page.run(markup) == "TypeError"  # Trusted Types forbid it
    page.complaints()


def test_tokens_stand_where_they_were_written(page):
    setting(page, "markdown", True)
    texts = ["A", " **", "bold", "** word", "\n\n", "```", "py\n", "x =", " 1\n", "```", "\n\n- i", "tem\n- ", "end"]
    tokens = [dict(content=[dict(token=text, logprob=-1.0, top_logprobs=[])]) for text in texts]
    events = [chunk(dict(content=text), token) for text, token in zip(texts, tokens, strict=True)]
    play(page, *events)
    ask(page, "Go.")
    shown = ["A", " ", "bold", " word", "x =", " 1", "i", "tem", "end"]
    assert page.texts(TOKENS) == shown
    page.hover(f"{LAST}pre .token:nth-child(2)")
    page.until(lambda: page.shown("#card"))
    assert page.text("#card td:first-child") == "␣1⏎"
    setting(page, "markdown", False)
    assert page.texts(TOKENS) == texts and page.text(ANSWER) == "".join(texts)


def test_code_and_answers_can_be_copied(page):
    setting(page, "markdown", True)
    page.protocol("Browser.grantPermissions", permissions=["clipboardReadWrite", "clipboardSanitizedWrite"])
    text = "Run:\n\n```sh\nmake  test\n\ttab\n```\n"
    play(page, text)
    ask(page, "How?")
    pasted = "return navigator.clipboard.readText()"
    page.click(f"{LAST}.copy")
    page.until(lambda: page.text(f"{LAST}.copy") == "Copied")
    assert page.run(pasted) == "make  test\n\ttab"
    page.click(f"{LAST}.actions button:first-child")
    page.until(lambda: page.run(pasted) == text)
    page.run("Object.defineProperty(navigator, 'clipboard', {value: undefined})")  # as without HTTPS
    page.click(f"{LAST}.copy")
    page.until(lambda: page.text("#said") == "Copied")


def test_a_thought_is_folded_when_the_answer_begins(page):
    play(page, thought("Hm."), "Yes")
    held_at(page, 1)
    send(page, "Well?")
    page.until(lambda: page.shown(f"{LAST}.thought .text") == 1)
    assert page.text(f"{LAST}summary") == "Thinking …"
    held_at(page, 0)
    ended(page)
    assert not page.run("return document.querySelector('.thought').open")
    assert page.text(f"{LAST}summary").startswith("Thought") and page.text(ANSWER) == "Yes"
