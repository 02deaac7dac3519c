"""`lockstep batch` on the command line, with the bundled model."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lockstep.batch.work import Counts
from lockstep.cli import main
from lockstep.commands.batch import failures
from tests.serve.server import ROOT, wait_until

OPTIONS = ["--threads", "1", "--max-requests", "4", "--max-context", "512"]
CALL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}


def line(custom_id, url, **body):
    """A line of an input."""
    return dict(custom_id=custom_id, method="POST", url=url, body=body)


def written(path, *lines):
    """The path of a file with lines, JSON values or texts."""
    path.write_text("".join((each if isinstance(each, str) else json.dumps(each)) + "\n" for each in lines))
    return str(path)


def read(path):
    """The lines of an output."""
    return [json.loads(each) for each in Path(path).read_text().splitlines()]


MESSAGES = [dict(role="user", content="Say hello.")]
GOOD = [
    line("text", "/v1/completions", prompt="def f(", max_tokens=8, temperature=1.0, n=2),
    line("chat", "/v1/chat/completions", messages=MESSAGES, max_tokens=6, logprobs=True, top_logprobs=2),
    line("vector", "/v1/embeddings", input="text"),
    line("response", "/v1/responses", input="Hello", max_output_tokens=6),
    line("message", "/v1/messages", messages=MESSAGES, max_tokens=6, seed=-1, temperature=1.0),
    line("call", "/v1/chat/completions", messages=MESSAGES, tools=[CALL], tool_choice="required", max_tokens=60),
    line("again", "/v1/completions", prompt="def f(", max_tokens=8, temperature=1.0, n=2),
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(the input, the output, what was said) of a run that nobody interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    source, out = written(folder / "in.jsonl", *GOOD), str(folder / "out.jsonl")
    assert main(["batch", source, out, *OPTIONS]) == 0
    return source, out


def test_every_url_is_answered_in_order(whole):
    _, out = whole
    lines = read(out)
    assert [each["custom_id"] for each in lines] == [each["custom_id"] for each in GOOD]
    assert [each["response"]["status_code"] for each in lines] == [200] * len(GOOD)
    assert {each["error"] for each in lines} == {None}
    text, chat, vector, response, message, call, again = [each["response"]["body"] for each in lines]
    assert text["object"] == "text_completion" and len(text["choices"]) == 2 and text["created"] == 0
    assert chat["id"].endswith(lines[1]["response"]["request_id"]) and lines[1]["id"].endswith(chat["id"][-32:])
    assert len(vector["data"][0]["embedding"]) > 8 and response["output"][0]["id"].startswith("msg_")
    assert message["content"][0]["text"] and len(call["choices"][0]["message"]["tool_calls"][0]["id"]) == 9
    assert [each["text"] for each in text["choices"]] != [each["text"] for each in again["choices"]]  # other seeds
    assert sorted(os.listdir(Path(out).parent)) == ["in.jsonl", "out.jsonl"]


def test_another_company_gives_the_same_file(whole, tmp_path, capfdbinary):
    source, out = whole
    assert main(["batch", source, "-", *OPTIONS[:2], "--max-requests", "1", *OPTIONS[4:], "--no-prefix-cache"]) == 0
    assert capfdbinary.readouterr().out == Path(out).read_bytes()
    backwards = written(tmp_path / "in.jsonl", *reversed(GOOD))
    assert main(["batch", backwards, str(tmp_path / "out.jsonl"), *OPTIONS, "--speculate", "lookup"]) == 0
    assert read(tmp_path / "out.jsonl") == read(out)[::-1]


def test_what_is_answered_is_not_computed_again(whole, tmp_path, capfd):
    _, out = whole
    before = Path(out).read_bytes()
    changed = [*GOOD[:2], "", GOOD[3] | dict(custom_id="new"), *GOOD[3:]]
    again, copy = written(tmp_path / "in.jsonl", *changed), tmp_path / "out.jsonl"
    copy.write_bytes(before)
    assert main(["batch", again, str(copy), *OPTIONS]) == 0
    assert "7 lines in" in (said := capfd.readouterr().err) and "6 answered before" in said
    made, old = copy.read_bytes().splitlines(), before.splitlines()
    assert [*made[:2], *made[3:]] == [*old[:2], *old[3:]] and b'"new"' in made[2]
    assert main(["batch", again, str(copy), *OPTIONS, "--max-context", "448"]) == 0  # another context
    assert "answered before" not in capfd.readouterr().err


def test_bad_lines(tmp_path, capfd):
    good = line("g", "/v1/completions", prompt="a", max_tokens=3)
    lines = [
        (good, 200, None),
        ("{bad", 400, "invalid_json_line"),
        ("[1]", 400, "invalid_json_line"),
        (good, 400, "duplicate_custom_id"),
        (good | dict(custom_id=5), 400, "invalid_value"),
        (good | dict(custom_id="m", method="GET"), 400, "invalid_method"),
        (good | dict(custom_id="u", url="/metrics"), 404, "invalid_url"),
        (good | dict(custom_id="b", body=None), 400, "invalid_value"),
        (line("s", "/v1/completions", prompt="a", stream=True), 400, "unsupported"),
        (line("t", "/v1/completions", prompt="a", temperature="hot"), 400, "invalid_value"),
        (line("n", "/v1/completions", prompt="a", model="gpt-9"), 404, "model_not_found"),
        (line("x", "/v1/completions", prompt=[9] * 600), 400, "context_length_exceeded"),
        (line("l", "/v1/completions", prompt="a" * (1 << 20)), 413, "body_too_large"),
        (line("l2", "/v1/completions", prompt="a" * (9 << 17)), 413, "line_too_long"),
        (line("a", "/v1/messages"), 400, None),
    ]
    source, out = written(tmp_path / "in.jsonl", *[each for each, _, _ in lines]), str(tmp_path / "out.jsonl")
    assert main(["batch", source, out, *OPTIONS, "--max-body-mb", "1"]) == 1
    assert "15 lines" in (said := capfd.readouterr().err) and "14 failed, 1 of them with the first error: " in said
    found = [each["response"] for each in read(out)]
    codes = [each["body"].get("error", {}).get("code") for each in found]
    assert [(each["status_code"], code) for each, code in zip(found, codes, strict=True)] == [
        (status, code) for _, status, code in lines
    ]
    assert found[-1]["body"]["type"] == "error"  # as Anthropic's API has it
    assert main(["batch", source, out, *OPTIONS, "--max-body-mb", "1", "--any-model"]) == 1  # errors are asked again
    assert [each["response"]["status_code"] for each in read(out)][10] == 200


@pytest.mark.parametrize(
    ("source", "out", "reason"),
    [
        ("none.jsonl", "out", "none.jsonl: No such file"),
        (".", "out", "expected a file, this is a folder"),
        ("in", ".", "expected a file, or a name for a new one"),
        ("in", "in", "this is the input"),
        ("in", "none/out", "there is no folder none"),
        ("in", "foreign", "its line 1 is none that lockstep batch writes"),
        ("in", "others", "none of its custom_ids is in in"),
    ],
)
def test_what_cannot_be_run(source, out, reason, whole, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "in", line("other", "/v1/completions", prompt="a"))
    (tmp_path / "foreign").write_text("hello\n")
    (tmp_path / "others").write_bytes(Path(whole[1]).read_bytes())
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert main(["batch", source, out]) == 2
    said = capsys.readouterr().err
    assert reason in said and said.count("\n") == 1
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_killed_interrupted_and_started_twice(tmp_path, capfd):
    long = [line(f"r{i}", "/v1/completions", prompt=f"def f{i}(", max_tokens=120, temperature=1.2) for i in range(28)]
    source, whole, out = written(tmp_path / "in.jsonl", *long), str(tmp_path / "whole"), tmp_path / "out"
    assert main(["batch", source, whole, *OPTIONS]) == 0
    command = [sys.executable, "-m", "lockstep", "batch", source, str(out), *OPTIONS]
    environment, journal = os.environ | {"PYTHONPATH": str(ROOT)}, tmp_path / "out.partial"
    for number in (signal.SIGKILL, signal.SIGINT):
        before = journal.stat().st_size if journal.exists() else 0
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
            wait_until(lambda: journal.exists() and journal.stat().st_size > before + 2000)  # noqa: B023
            capfd.readouterr()
            assert main(["batch", source, str(out), *OPTIONS]) == 2
            assert "another lockstep batch is writing this output" in capfd.readouterr().err
            process.send_signal(number)
            said = process.communicate(timeout=60)[1]
        assert process.returncode == (-signal.SIGKILL if number == signal.SIGKILL else 130)
    assert f"are done and kept in {journal}: the same command goes on from there" in said and "Traceback" not in said
    assert main(["batch", source, str(out), *OPTIONS]) == 0
    assert "answered before" in capfd.readouterr().err
    assert out.read_bytes() == Path(whole).read_bytes() and not journal.exists()


def test_a_summary_has_the_first_error_and_how_many_have_it():
    assert failures(Counts(3, 0, 3, 0)) == "0 failed"
    assert failures(Counts(3, 0, 3, 1, "n: wrong\nhere", 1)) == "1 failed: n: wrong here"
    long = failures(Counts(9, 0, 9, 3, "x" * 1000, 2))
    assert long == f"3 failed, 2 of them with the first error: {'x' * 300}..."
