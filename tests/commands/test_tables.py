"""Tables keep numbers and names on one line: in a pipe, on a terminal of 80 columns, and on one that is too narrow."""

import io

import pytest
from rich.console import Console

from lockstep.commands.bench import profile_table, show
from lockstep.commands.bench_scaling import total_table
from lockstep.commands.bench_speculate import answers_table
from lockstep.commands.terminal.tables import made_table, report_console, speed
from lockstep.lab.scaling import PARTS

STEP = dict(
    rows=512,
    alone=0.25,
    predicted=[dict(threads=256, seconds=0.004980544, parts=dict.fromkeys(PARTS, 0.000123))],
)
PAIRED = dict(a_seconds=12.345, b_seconds=0.125, ratio=98.76, spread=(97.5, 101.25))
FOUND = dict(
    threads=2,
    ceiling=dict(bytes_per_second=23.4e9, int8_per_second=1234e9, f32_per_second=234e9),
    prefill={64: 102799.8, 512: 12.34},
    decode={128: 999.94},
    per_token=dict(tokens=1000, max_abs_diff=0.0, ratios={"chunks of 512": PAIRED}),
    switches=dict(attention=PAIRED, recurrent=PAIRED),
    profiles={},
)
ANSWERS = dict(
    setting=dict(requests=32, acceptance=0.9, draft=None),
    differing=0,
    tokens_per_second=102799.8,
    decode=1.25,
    whole=1.125,
    tokens_per_step=3.5,
    accepted=123456,
    drafted=234567,
)


def printed(table, width):
    console = Console(file=io.StringIO(), width=width)
    console.print(table)
    return console.file.getvalue()


def of_bench(width):
    console = Console(file=io.StringIO(), width=width)
    show(FOUND, console)
    return console.file.getvalue()


def test_speeds_have_a_decimal_where_it_says_something():
    assert [speed(n) for n in (0.04, 12.34, 999.94, 1000.4, 102799.8)] == ["0.0", "12.3", "999.9", "1,000", "102,800"]


@pytest.mark.parametrize("width", [20, 40, 60, 80, 1000])
def test_no_number_and_no_name_is_broken(width):
    words = set(printed(total_table(STEP), width).split())
    assert {"threads", "256", "4.981", "102,800", "speedup", "50.2x", "barriers"} <= words
    assert {"102,800", "123456/234567", "requests"} <= set(printed(answers_table([ANSWERS]), width).split())
    assert {"attention=per_token", "recurrent=per_token", "12.345", "98.76x", "102,800"} <= set(of_bench(width).split())
    rows = [("grouped_linear_q8_0", 0.0123, 123456789, 10**12, True)]
    assert {"grouped_linear_q8_0", "12.30", "100.0%"} <= set(
        printed(profile_table("decode", rows, FOUND["ceiling"]), width).split()
    )


@pytest.mark.parametrize("width", [20, 40, 60, 80, 1000])
def test_no_line_is_longer_than_the_terminal(width):
    for table in (total_table(STEP), answers_table([ANSWERS])):
        assert max(len(line.rstrip()) for line in printed(table, width).splitlines()) <= width


def test_a_terminal_too_narrow_gets_a_line_for_each_cell():
    table = made_table("[a title]", "name", ">tok/s", "limit")
    table.add_row("decode", "102,800", "")
    assert printed(table, 18).split("\n") == ["[a title]", "  name   decode", "  tok/s  102,800", "", ""]
    assert printed(table, 40).split() == ["[a", "title]", "name", "tok/s", "limit", "─" * 26, "decode", "102,800"]


def test_text_is_wrapped_between_words_where_that_helps():
    table = made_table(None, "name", ">bytes", "what it is")
    table.add_row("a", "123,456", "several words about it")
    lines = printed(table, 34).splitlines()
    assert max(map(len, lines)) <= 34 and "123,456" in printed(table, 34)
    assert " ".join(printed(table, 34).split()).count("several words") == 1


def test_a_pipe_is_not_wrapped(capsys):
    table = made_table("a title that is longer than the table is, so that it would be two lines on a terminal", "x")
    table.add_row("many words " * 40)
    report_console().print(table)
    report_console().print("many words " * 40)
    title, _, _, _, row, _, line = capsys.readouterr().out.splitlines()
    assert title.endswith("on a terminal") and row.count("words") == line.count("words") == 40
