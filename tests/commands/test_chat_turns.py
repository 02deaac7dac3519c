"""Turns of `lockstep chat`: thoughts, other answers to a question, taking back, figures; and one question with -p."""

import os
import signal
import sys
from types import SimpleNamespace

import pytest

from lockstep import LLM, SamplingParams
from lockstep.cli import main
from lockstep.commands.chat import converse, most_tokens, with_piped
from lockstep.commands.terminal import answer
from lockstep.commands.terminal.answer import Timing
from lockstep.commands.terminal.conversation import Conversation
from lockstep.commands.terminal.printer import BEGIN, DIM, END, PLAIN, AnswerPrinter
from lockstep.commands.terminal.totals import Totals
from lockstep.progress import Progress
from lockstep.text.reasoning import PlainParser, ThoughtParser, switch_of
from tests.commands.test_cli import Output
from tests.serve.chatting import THINKING, saying, with_template

SETTINGS = dict(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, seed=0, max_tokens=8)
THOUGHT = "<think>\nIt is two.\n</think>\n\n"


@pytest.fixture(scope="module")
def plain():
    made = LLM(max_requests=1, threads=1)
    yield made
    made.close()


@pytest.fixture(scope="module")
def thinker():
    made = with_template(LLM(max_requests=1, threads=1), THINKING)
    yield made
    made.close()


def says(llm, text):
    """A context in which every answer of a conversation is this text."""
    return saying(SimpleNamespace(service=SimpleNamespace(llm=llm)), text)


# ------------------------------------------------------------ thoughts


def test_thoughts_are_shown_and_not_kept(thinker, capsys):
    talk = Conversation(thinker, SETTINGS | dict(max_tokens=100))
    with says(thinker, THOUGHT + "Two."):
        talk.hear("1 + 1?")
    out, err = capsys.readouterr()
    assert out == "Two.\n" and err.startswith(f"{BEGIN}It is two.{END}(prompt ")
    assert talk.messages == [dict(role="user", content="1 + 1?"), dict(role="assistant", content="Two.")]


def test_thinking_is_switched_by_the_template_s_variable(thinker, capsys):
    settings = SETTINGS | dict(temperature=1.0, seed=6)  # says none of the tags that its prompt has
    talk = Conversation(thinker, settings)
    asked = [dict(role="user", content="hello")]
    for command, is_on in (("/think", True), ("/nothink", False), ("/no_think", False)):
        talk.hear(command)
        assert f"thinking {'on' if is_on else 'off'}" in capsys.readouterr().err
        talk.hear("/set")
        assert capsys.readouterr().out.endswith(f", max_tokens 8, thinking {'on' if is_on else 'off'}\n")
        expected = thinker.generate(
            [thinker.chat_prompt(asked, enable_thinking=is_on)], SamplingParams(**settings, skip_special_tokens=False)
        )[0]
        talk.hear("hello")
        out, err = capsys.readouterr()
        assert (BEGIN in err) == is_on and expected.text.strip() in (out if not is_on else err)
        talk.hear("/reset")


def test_an_answer_that_is_cut_within_its_thoughts_says_so_and_loses_nothing(thinker, capsys):
    talk = Conversation(thinker, SETTINGS)
    with says(thinker, THOUGHT + "Two."):
        talk.hear("1 + 1?")
        err = capsys.readouterr().err
        assert "(no answer came, the thoughts were cut: max_tokens is 8; the question is not kept, /regenerate" in err
        assert not talk.messages
        talk.settings["max_tokens"] = 100
        talk.hear("/regenerate")
    assert [m["content"] for m in talk.messages] == ["1 + 1?", "Two."]


@pytest.mark.parametrize("name", ["enable_thinking", "thinking", "reasoning", None])
def test_the_switch_is_the_variable_that_changes_the_prompt(name):
    def prompt_with(**variables):
        return f"prompt {variables.get(name, '')}"

    assert switch_of(prompt_with) == name


def test_thoughts_have_the_whole_context(plain, thinker):
    assert (most_tokens(plain), most_tokens(thinker)) == (1024, thinker.max_context)


def printed(monkeypatch, capsys, text, **variables):
    """What an AnswerPrinter writes on a terminal for an answer that comes character by character."""
    for name in ("NO_COLOR", "TERM"):
        monkeypatch.setenv(name, variables.get(name, ""))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    printer = AnswerPrinter(ThoughtParser(PlainParser()))
    for character in text:
        printer.push(character)
    printer.finish()
    return capsys.readouterr(), printer


def test_thoughts_are_dimmed_where_there_are_colours(monkeypatch, capsys):
    (out, err), printer = printed(monkeypatch, capsys, "<think>a\x1b[1mb\n</think>\n\nc d\n", TERM="xterm")
    assert out == "c d\n\n" and err.replace(PLAIN + DIM, "") == f"{DIM}a\\x1b[1mb{PLAIN}\n\n"
    assert (printer.thoughts, printer.content) == ("a\x1b[1mb", "c d\n")


@pytest.mark.parametrize("variables", [dict(TERM="xterm", NO_COLOR="1"), dict(TERM="dumb")])
def test_thoughts_are_marked_where_there_are_no_colours(variables, monkeypatch, capsys):
    (out, err), _ = printed(monkeypatch, capsys, "<think>a</think>b", **variables)
    assert (out, err) == ("b\n", f"{BEGIN}a{END}")


# ------------------------------------------------------------ questions again and taken back


def test_an_answer_again_has_another_seed(plain, capsys):
    settings = SETTINGS | dict(temperature=1.5, seed=3)
    talk = Conversation(plain, settings, "Be brief.")
    talk.hear("hello")
    talk.hear("and now?")
    asked = talk.messages[:-1]
    for tries in (1, 2):
        talk.hear("/regenerate")
        again = plain.generate([plain.chat_prompt(asked)], SamplingParams(**settings | dict(seed=3 + tries)))[0]
        assert talk.messages == [*asked, dict(role="assistant", content=again.text)]
    assert talk.settings == settings and "every seed" not in capsys.readouterr().err
    talk.hear("/set temperature 0")
    talk.hear("/regenerate")
    assert "at temperature 0 every seed gives the same answer" in capsys.readouterr().err


def test_undo_takes_back_a_question_and_its_answer(plain, capsys):
    talk = Conversation(plain, SETTINGS, "Be brief.")
    talk.hear("hello")
    first = list(talk.messages)
    talk.hear("and\nnow?")
    talk.hear("/undo")
    assert talk.messages == first
    assert "(forgotten: 'and now?' and its answer; 3 messages left)" in capsys.readouterr().err
    talk.hear("/regenerate")
    assert talk.messages == first  # greedy: the same answer, to the question that is the last now
    talk.hear("/undo")
    talk.hear("/undo")
    assert talk.messages == first[:1] and "nothing to undo" in capsys.readouterr().err


def test_settings_without_effect_say_so(plain, capsys):
    talk = Conversation(plain, SETTINGS)
    talk.hear("/set seed 5")
    assert "seed has no effect at temperature 0" in capsys.readouterr().err
    for line in ("/set temperature 0.5", "/set top_k 5"):
        talk.hear(line)
    assert "effect" not in capsys.readouterr().err


def test_stats_count_computed_and_cached_tokens_apart(plain, capsys):
    talk = Conversation(plain, SETTINGS)
    talk.hear("/stats")
    assert capsys.readouterr().out == f"messages  0\ncontext   0 of {plain.max_context} tokens\n"
    talk.hear("x = 1\n" * 60)
    talk.hear("again")
    prompt = plain.chat_prompt(talk.messages[:-1])
    assert f"(prompt {len(prompt)} tokens (" in (said := capsys.readouterr().err.splitlines()[-1])
    talk.hear("/stats")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["messages", "context", "last answer", "all"]
    assert lines[2].split(maxsplit=2)[2] == said[1:-1] and "2 answers" in lines[3]


def test_a_long_prompt_shows_how_far_it_is(plain, monkeypatch):
    reports = []

    class Recorded(Progress):
        def step(self, part, where, done, total, ends=False):
            reports.append((part, where, done, total))

        def __exit__(self, *error):
            reports.append("closed")

    monkeypatch.setattr(answer, "Progress", Recorded)
    params = SamplingParams(max_tokens=3, seed=1)
    answer.answer(plain, [5] * 1200, params, lambda _: reports.append("text"))
    steps = [("computing the prompt", f"token {n} of 1200", n, 1200) for n in (0, 512, 1024)]
    assert reports[: len(steps) + 1] == [*steps, "closed"] and set(reports[len(steps) + 1 :]) <= {"text"}


def test_totals_leave_cached_tokens_out_of_speeds():
    totals = Totals()
    for timing in (Timing(100, 11, 0.5, 1.5), Timing(200, 1, 0.5, 0.5, num_cached=192), Timing(9)):
        totals.add(timing)
    assert str(totals) == (
        "3 answers, 300 prompt tokens: 192 cached, 108 computed at 108.0 tok/s; 12 tokens generated at 10.0 tok/s"
    )


def test_options_without_effect_say_so(monkeypatch, capsys):
    """The bundled model's makers ask for temperature 0."""
    unused = ("--seed", "3", "--top-k", "5", "--draft", "3", "--max-context", "99999")
    monkeypatch.setattr(sys, "stdin", Output(b""))
    assert main(["chat", *unused]) == 0
    assert [line.partition(" has ")[0] for line in capsys.readouterr().err.splitlines()[:-1]] == [
        "lockstep: --max-context 99999",
        "lockstep: --seed",
        "lockstep: --top-k",
        "lockstep: --draft",
    ]
    monkeypatch.setattr(sys, "stdin", Output(b""))
    assert main(["chat", "--seed", "3", "--temperature", "0.5"]) == 0
    assert "effect" not in capsys.readouterr().err


class Pressed:
    """Standard output at which Ctrl-C is pressed with the first piece of an answer."""

    def __init__(self, stream):
        self._stream, self._is_new = stream, True

    def write(self, text):
        if self._is_new:
            self._is_new = False
            os.kill(os.getpid(), signal.SIGINT)
        return self._stream.write(text)

    def __getattr__(self, name):
        return getattr(self._stream, name)


@pytest.mark.parametrize(("args", "piped"), [(["-p", "hello"], b""), ([], b"hello\nand now?\n")])
def test_ctrl_c_ends_what_nobody_types_for(args, piped, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", Output(piped))
    monkeypatch.setattr(sys, "stdout", Pressed(sys.stdout))
    assert main(["chat", *args, "-n", "1000"]) == 130
    assert 0 < len(capsys.readouterr().out.split()) < 100


class Typed:
    """Entries of a user. An exception among them is raised."""

    is_typed = True

    def __init__(self, *entries):
        self._entries = iter(entries)

    def read(self):
        entry = next(self._entries, None)
        if isinstance(entry, BaseException):
            raise entry
        return entry


def test_ctrl_c_ends_no_conversation_of_a_user(plain, capsys):
    talk = Conversation(plain, SETTINGS)
    converse(talk, Typed("hello", KeyboardInterrupt(), "and now?", None, "never"))
    assert len(talk.messages) == 4 and "(interrupted)" in capsys.readouterr().err


# ------------------------------------------------------------ one question


def test_one_question(plain, monkeypatch, capsys):
    """The answer is all of standard output; what is piped stands below the question."""
    monkeypatch.setattr(sys, "stdin", Output(b"a = 1\nb = 2\n"))
    assert main(["chat", "-p", "Review this:", "-n", "8", "--temperature", "0", "--system", "Be brief."]) == 0
    out, err = capsys.readouterr()
    asked = dict(role="user", content="Review this:\n\na = 1\nb = 2")
    prompt = plain.chat_prompt([dict(role="system", content="Be brief."), asked])
    assert out == plain.generate([prompt], SamplingParams(max_tokens=8))[0].text + "\n"
    assert err.startswith("(the answer was cut: max_tokens is 8)\n(prompt ")


def test_a_question_that_gets_no_answer_is_an_error(monkeypatch, capsys, plain):
    for args, piped, said in (
        (["-p", " "], b"\n", "-p: expected a question, got an empty text"),
        (["-p", "x"], b"\xff", "standard input: not UTF-8 text"),
        (["-p", "x " * 9000], b"", "leave no room for an answer in the context"),
    ):
        monkeypatch.setattr(sys, "stdin", Output(piped))
        assert main(["chat", *args]) == 2
        out, err = capsys.readouterr()
        assert out == "" and said in err
    monkeypatch.setattr(sys, "stdin", Output(b""))
    with says(plain, ""):
        assert main(["chat", "-p", "x"]) == 2
    assert capsys.readouterr().err.endswith("lockstep: the answer is empty\n")


def test_without_standard_input_the_question_is_all(monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    assert with_piped("x") == "x"
