"""JSON of receipts: what two readers could read differently is refused, by nothing else than ReceiptError."""

import json
import random
import subprocess
import sys
import time

import pytest

from lockstep.receipts.errors import ReceiptError
from lockstep.receipts.fields import Fields, from_base64, reading, to_base64
from lockstep.receipts.strict_json import MAX_DEPTH, dumps, loads

GOOD = {"a": [1, -5, True, None, 'ü\u2028 "[{'], "b": {"c": {}}, "big": (1 << 63) - 1}


def test_what_is_written_is_read():
    assert loads(dumps(GOOD)) == GOOD
    assert dumps(GOOD).isascii() and b" " not in dumps([1, {"a": 2}])


@pytest.mark.parametrize("text, said", [
    ('{"a":1,"a":1}', "each key of a JSON object once"),
    ('{"b":{"a":1,"a":2}}', "each key"),
    ("[NaN]", "integers as numbers of JSON, got NaN"),
    ("[-Infinity]", "got -Infinity"),
    ("[1.0]", "got 1.0"),
    ("[1e3]", "got 1e3"),
    (f"[{1 << 63}]", "from -2..63 to"),
    (f"[{'9' * 5000}]", "from -2..63 to"),
    ('{"a":"\\ud800"}', "lone surrogate"),
    ('{"\\ud800":1}', "lone surrogate"),
    ('{"a":[["x","\\udc00y"]]}', "lone surrogate"),
    ("[1] 2", "Extra data"),
    ("", "expected JSON"),
    ("{'a': 1}", "expected JSON"),
    ("[" * 100_000, "depth"),
    ('{"a":' * 40 + "1" + "}" * 40, "depth"),
    (b"\xff\xfe", "UTF-8"),
])  # fmt: skip
def test_what_is_refused(text, said):
    with pytest.raises(ReceiptError, match=said):
        loads(text)


@pytest.mark.parametrize("text", [
    "lockstep: " + "[" * 40, "[INFO] began\n" + "[" * 40, "2026-11-30 {" + "[" * 40, "}" * 3 + "[" * 40, "",
])  # fmt: skip
def test_a_text_that_is_no_json_is_not_said_to_be_deep(text):
    with pytest.raises(ReceiptError, match=r"^expected JSON: "):
        loads(text)


def test_a_deep_value_is_refused_wherever_it_is_deep():
    for text in ("[" * 33 + "]" * 33, " \n[[], " + "[" * 32 + "]" * 33, '{"a": {}, "b": ' + "[" * 32 + "]" * 32 + "}"):
        with pytest.raises(ReceiptError, match="depth"):
            loads(text)
    assert loads("[" * 32 + "]" * 32)


def test_brackets_in_texts_are_no_depth():
    assert loads(json.dumps(["[" * 1000 + '\\"' + "{" * 50])) == ["[" * 1000 + '\\"' + "{" * 50]
    assert loads("[" * MAX_DEPTH + "]" * MAX_DEPTH)


def test_a_text_that_does_not_end_is_refused_at_once():
    for text in ('"' + '\\"' * 20_000, '["' + '[\\"' * 20_000):
        start = time.process_time()
        with pytest.raises(ReceiptError, match="expected JSON"):
            loads(text)
        assert time.process_time() - start < 1  # several if each quote is a new start


def test_a_long_text_takes_little_memory():
    # in a process of its own, whose peak is this text's
    code = """
import resource
from lockstep.receipts.strict_json import loads
text = '["%s"]' % ("[" * 2**21 + r"\\n" * 2**20)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
loads(text)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert int(found.stdout) < 64 << 10  # KiB, for 4 MiB of text


def test_a_size_is_checked_first():
    with pytest.raises(ReceiptError, match="at most 3 bytes of JSON, got 4"):
        loads("[12]", 3)


def test_any_bytes_are_read_or_refused():
    draw, text = random.Random(1), bytearray(dumps(GOOD))
    for _ in range(3000):
        changed = bytearray(text)
        for _ in range(draw.randint(1, 4)):
            at = draw.randrange(len(changed))
            changed[at : at + draw.randint(0, 3)] = bytes(draw.randrange(256) for _ in range(draw.randint(0, 3)))
        try:
            loads(bytes(changed))
        except ReceiptError:
            continue


def test_fields_have_types_and_bounds():
    good = dict(n=5, t="abc", b=True, h="0aff", d=to_base64(b"abcd"), i=[1, 2])
    with reading(good, "x.") as fields:
        assert fields.integer("n", 0, 5) == 5 and fields.text("t", 3) == "abc" and fields.boolean("b")
        assert fields.hex("h", 2) == b"\x0a\xff" and fields.base64("d", 4) == b"abcd"
        assert fields.items("i", 2, lambda each: each < 3, "small numbers") == [1, 2]
    wrong = [
        (dict(n=True), lambda f: f.integer("n", 0, 5), r"x.n: expected an integer from 0 to 5, got True"),
        (dict(n=6), lambda f: f.integer("n", 0, 5), "got 6"),
        ({}, lambda f: f.integer("n", 0, 5), "x.n: expected, but missing"),
        (dict(t="abcd"), lambda f: f.text("t", 3), "at most 3 characters"),
        (dict(b=1), lambda f: f.boolean("b"), "true or false"),
        (dict(h="0AFF"), lambda f: f.hex("h", 2), "4 hexadecimal digits"),
        (dict(h="0aff0"), lambda f: f.hex("h", 2), "4 hexadecimal digits"),
        (dict(d="YWJjZB=="), lambda f: f.base64("d", 4), "base64 of 4 bytes"),
        (dict(d="YWJj"), lambda f: f.base64("d", 4), "base64 of 4 bytes, 8 characters"),
        (dict(i=[1, 2, 3]), lambda f: f.items("i", 2, bool, "numbers"), "at most 2 numbers"),
        (dict(u=1), lambda f: None, "x.u: expected no such field"),
    ]
    for value, read, said in wrong:
        with pytest.raises(ReceiptError, match=said), reading(value, "x.") as fields:
            read(fields)
    with pytest.raises(ReceiptError, match="receipt: expected an object, got 3"):
        Fields(3)


def test_base64_has_one_form():
    assert from_base64(to_base64(b"\x00\xff")) == b"\x00\xff"
    for text in ("AP8", "AP8==", "AP9=", "AP 8=", "AP8=\n", "A-8=", "ü==="):  # the third has bits that are not used
        assert from_base64(text) is None
