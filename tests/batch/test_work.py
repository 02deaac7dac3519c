"""A batch's lines are asked once, however often it is killed, and its output is the same bytes."""

import io
import json
import random
import subprocess
import sys
import time
import tracemalloc

import pytest

from lockstep.batch.finished import Finished, is_success
from lockstep.batch.journal import Journal, journal_path
from lockstep.batch.lines import error_line, error_of, key_of, raw_lines, response_line
from lockstep.batch.work import Counts, InputChanged, Work, count_lines
from tests.batch.echo import MAX_BYTES, Echo, answer, read
from tests.serve.server import ROOT, wait_until


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "in"
    path.write_text("".join(f"line {number}\n" for number in range(200)))
    return path


def test_answers_are_in_the_order_of_the_lines(source, tmp_path):
    echo = Echo(0.003)
    counts = answer(source, tmp_path / "out", echo)
    lines = [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()]
    assert [line["response"]["body"] for line in lines] == [f"LINE {number}" for number in range(200)]
    assert [line["custom_id"] for line in lines] == [f"line {number}" for number in range(200)]
    assert (counts.total, counts.done, counts.failed, counts.known, echo.asked) == (200, 200, 0, 0, 200)
    assert not journal_path(tmp_path / "out").exists()


def test_killed_again_and_again(source, tmp_path):
    answer(source, tmp_path / "whole", Echo())
    out, sizes, draw = tmp_path / "out", [], random.Random(5)
    command = [sys.executable, "-m", "tests.batch.echo", source, out, "0.2"]
    journal = journal_path(out)
    for _ in range(3):
        with subprocess.Popen(command, cwd=ROOT) as process:
            before = journal.stat().st_size if journal.exists() else 0
            wait_until(lambda: journal.exists() and journal.stat().st_size > before + 2000)  # noqa: B023
            time.sleep(draw.random() / 20)
            process.kill()
        sizes.append(journal.stat().st_size)
        with open(journal, "ab") as file:
            file.write(journal.read_bytes()[: draw.randrange(20, 150)].rstrip(b"\n"))  # half a line
    assert sizes == sorted(set(sizes)) and not out.exists()
    echo = Echo()
    counts = answer(source, out, echo)
    assert out.read_bytes() == (tmp_path / "whole").read_bytes()
    assert echo.asked < 170 and counts.known == 200 - echo.asked


def test_a_changed_line_is_asked_anew(source, tmp_path):
    out = tmp_path / "out"
    answer(source, out, Echo())
    lines = source.read_text().splitlines()
    lines[5:7] = ["another", lines[6], lines[5], "more"]
    source.write_text("\n".join(lines))
    echo = Echo()
    counts = answer(source, out, echo)
    assert echo.asked == 2 and counts.known == 200
    answer(source, tmp_path / "whole", Echo())
    assert out.read_bytes() == (tmp_path / "whole").read_bytes()


def test_what_failed_is_asked_again_and_what_was_refused_is_not_asked(tmp_path):
    source, out = tmp_path / "in", tmp_path / "out"
    source.write_bytes(b"\xef\xbb\xbfgood\r\n\n!bad\n?fails\n   \n" + b"x" * (MAX_BYTES + 1) + b"\nlast")
    for asked in (3, 1):
        echo = Echo()
        counts = answer(source, out, echo)
        assert (counts.total, counts.failed, echo.asked) == (5, 3, asked)
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["response"]["body"] for line in lines] == ["GOOD", "refused", "?FAILS", "refused", "LAST"]


def test_the_first_error_of_an_output_is_kept_with_how_many_have_it():
    counts = Counts()
    key, wrong = b"k" * 16, dict(error=dict(message="wrong"))
    counts.add_written(response_line(key, None, 200, b"{}"), False)
    for body in (json.dumps(wrong).encode(), b'{"error": "no object"}', json.dumps(wrong).encode()):
        counts.add_written(response_line(key, "id", 400, body), True)
    assert (counts.total, counts.failed, counts.first_error, counts.num_like_first) == (4, 3, "wrong", 2)
    assert error_of(error_line(key, None, dict(code="x", message="not asked"))) == "not asked"
    assert error_of(response_line(key, "id", 400, b'"refused"')) == '"refused"'


def test_an_error_ends_the_run_and_keeps_the_answers(source, tmp_path):
    echo, out = Echo(0.001), tmp_path / "out"

    async def failing(line):
        if line.custom_id == "line 100":
            raise OSError(28, "No space left on device")
        return await echo(line)

    with pytest.raises(OSError, match="No space"):
        answer(source, out, failing)
    assert not out.exists() and echo.asked >= 100
    again = Echo()
    answer(source, out, again)
    assert again.asked <= 109


def test_an_input_that_changes_meanwhile(source, tmp_path):
    journal = Journal(tmp_path / "journal")
    work = Work(source, MAX_BYTES, lambda: read, journal, Finished(tmp_path / "none"))
    with pytest.raises(InputChanged, match="has changed since its lines were asked"):
        work.write(io.BytesIO())
    journal.close()
    assert not (tmp_path / "journal").exists()


# ------------------------------------------------------------ files


def kept(path, *names):
    """A journal with an answer for each name."""
    journal = Journal(path)
    journal.tell(size=1)
    for name in names:
        key = name.encode().ljust(16)
        journal.keep(key, response_line(key, name, 200, b"1"), True)
    journal.close()
    return path.read_bytes()


def test_every_cut_of_a_journal_is_read(tmp_path):
    path = tmp_path / "journal"
    whole = kept(path, "a", "b")
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        journal = Journal(path)
        end = whole.rfind(b"\n", 0, size) + 1
        assert len(journal) == max(0, whole[:size].count(b"\n") - 1) and path.read_bytes() == whole[:end]
        journal.tell(size=1)
        assert path.read_bytes() == whole[: max(end, whole.index(b"\n") + 1)]
        journal.close()


def test_damage_costs_one_line(tmp_path):
    path = tmp_path / "journal"
    whole = kept(path, "a", "b", "c")
    path.write_bytes(whole.replace(b'"custom_id":"b"', b'"custom_id":"x"'))
    journal = Journal(path)
    assert [json.loads(line)["custom_id"] for line in journal.output_lines()] == ["a", "c"]
    journal.close()


@pytest.mark.parametrize("content", [b"hello", b"hello\n", b"{}\n", b"0123 about x\n"])
def test_a_file_that_is_no_journal_is_left_alone(content, tmp_path):
    path = tmp_path / "journal"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="this is not what lockstep batch keeps"):
        Journal(path)
    assert path.read_bytes() == content


def test_two_processes_cannot_have_one_journal(tmp_path):
    first = Journal(tmp_path / "journal")
    with pytest.raises(ValueError, match="another lockstep batch is writing this output"):
        Journal(tmp_path / "journal")
    first.close()
    Journal(tmp_path / "journal").close()


def test_a_write_that_fails_leaves_the_journal_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "journal"
    whole = kept(path, "a")
    journal = Journal(path)

    class Full:
        """A file on a disk that becomes full within a line."""

        def __getattr__(self, name, file=journal._file):  # noqa: SLF001
            return getattr(file, name)

        def write(self, data, file=journal._file):  # noqa: SLF001
            if len(data) < 50:
                raise OSError(28, "No space left on device")
            return file.write(data[:50])

    monkeypatch.setattr(journal, "_file", Full())
    with pytest.raises(OSError, match="No space left") as caught:
        journal.keep(b"b" * 16, response_line(b"b" * 16, "b", 200, b"1"), True)
    assert caught.value.filename == str(path) and path.read_bytes() == whole and b"b" * 16 not in journal
    journal.close()


def test_an_output_of_others_is_refused(tmp_path):
    (tmp_path / "out").write_text('{"id": 5}\n')
    with pytest.raises(ValueError, match="its line 1 is none that lockstep batch writes"):
        Finished(tmp_path / "out")


def test_whether_answers_are_of_an_input(source):
    other, own = response_line(b"k" * 16, "else", 200, b"1"), response_line(b"k" * 16, "a", 200, b"1")
    source.write_text('{"custom_id": "b"}\n\n[]\n{"custom_id": "a"}\n')
    assert count_lines(source, 100, []) == (3, True)
    assert count_lines(source, 100, [other]) == (3, False)
    assert count_lines(source, 100, [other, own]) == (3, True)


def test_lines_of_the_output():
    line = response_line(b"k" * 16, 'a"\u20ac', 200, b'{"x":1}')
    assert key_of(line) == b"k" * 16 and is_success(line) and json.loads(line)["custom_id"] == 'a"\u20ac'
    assert not is_success(error_line(b"k" * 16, None, {"code": "x"})) and not is_success(b"5") and key_of(b"{}") is None


def test_a_long_line_is_not_held_in_memory(tmp_path):
    path = tmp_path / "in"
    path.write_bytes(b"x" * (16 << 20) + b"\nlast\n")
    tracemalloc.start()
    with open(path, "rb") as file:
        found = [(raw.number, raw.is_too_long, raw.content, raw.end) for raw in raw_lines(file, 1000)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found == [(1, True, b"", (16 << 20) + 1), (2, False, b"last", path.stat().st_size)] and peak < 1 << 20
