"""Grammars in GBNF, llama.cpp's notation: the texts that they allow, and texts that are no GBNF."""

import re
import time

import pytest

from lockstep.text.grammars import structured
from lockstep.text.grammars.gbnf import is_gbnf, to_lark
from tests.slowness import is_within
from tests.text.grammar_cases import GRAMMARS, allows

JSON = r"""
root   ::= object
value  ::= object | array | string | number | ("true" | "false" | "null") ws

object ::=
  "{" ws (
            string ":" ws value   # a comment with "quotes"
    ("," ws string ":" ws value)*
  )? "}" ws

array  ::= "[" ws ( value ("," ws value)* )? "]" ws
string ::= "\"" ( [^"\\\x7F\x00-\x1F] | "\\" (["\\bfnrt] | "u" [0-9a-fA-F]{4}) )* "\"" ws
number ::= ("-"? ([0-9] | [1-9] [0-9]{0,15})) ("." [0-9]+)? ([eE] [-+]? [0-9]{1,3})? ws
ws ::= | " " | "\n" [ \t]{0,20}
"""


@pytest.mark.parametrize(
    "grammar, right, wrong",
    [
        (
            JSON,
            ["{}", '{"a": [1, -2.5e+3, true, null], "b": {"c": "x\\u00e9\\n\N{SNOWMAN}"}}'],
            ["[]", '{"a": }', '{"a": tru}'],
        ),
        ('root ::= word " " word\nword ::= [a-z ]+', ["ab cd", "a b c"], ["ab", " a"]),  # no longest match
        ('root ::= ("a" | "ab") "b" "c"', ["abc", "abbc"], ["ac"]),
        ('root ::= (x | y)\nx ::= "a" |\ny ::= "b"\n', ["a", "", "b"], ["c"]),
        ('root::="a"{2}"b"{1,}"c"{0,2}"d"*"e"+"f"?', ["aabe", "aabbccddeef"], ["abe", "aabccce"]),
        (
            r'root ::= "\x41\u00e9\U0001F600\t\\\"\[" [\]\\^-] [^\n]',
            ['A\xe9\U0001f600\t\\"[]x', 'A\xe9\U0001f600\t\\"[-^'],
            ['A\xe9\U0001f600\t\\"[]\n'],
        ),
        ("# first\nroot ::= Some-Name_1 # last\nSome-Name_1 ::= . .", ["\n\N{SNOWMAN}"], ["a", "abc"]),
        ('root ::= "(" root ")" | ""', ["", "(())"], ["(", "())"]),
        ('root ::= "/" [/]', ["//"], ["/"]),
        ('root ::= "a"\n  "b"', ["ab"], ["a"]),
        ('root ::= "" "a" ""', ["a"], [""]),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_grammar_allows_its_texts_and_no_others(grammar, right, wrong):
    lark = structured.lark(to_lark(grammar))
    assert [text for text in right + wrong if allows("byte_level", lark, text)] == right


@pytest.mark.parametrize(
    "grammar, says",
    [
        ("", "a rule root, got none"),
        ('x ::= "a"', "a rule root, got none"),
        ("root ::= x", "rule x, which is nowhere"),
        ('root ::= ("a"', "brackets"),
        ('root ::= "a")', "brackets"),
        ('root ::= * "a"', "repetition of nothing"),
        ('root ::= "a', "no part of GBNF"),
        ("root ::= [a", "no part of GBNF"),
        ("root ::= []", "without characters"),
        ("root ::= [z-a]", "ends before it begins"),
        (r'root ::= "\q"', "an escape that is none"),
        (r'root ::= "\ud800"', "an escape that is none"),
        ("root ::= <think>", "no part of GBNF"),
        ('"a"', "a rule root"),
        ('root ::= "a"\nroot ::= "b"', "root is given more than once"),
        ('root ::= ::= "a"', "no rule"),
        ('"a" root ::= "b"', "no rule"),
        ("x" * 33_000, "at most 32768 bytes"),
        ('root ::= "a"{2', "no part of GBNF"),
        ('root ::= "a"\n\n  x ::= ! "b"', "line 3 has"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_what_is_no_grammar_is_refused_by_its_place(grammar, says):
    with pytest.raises(ValueError, match=r"^GBNF grammar: ") as caught:
        to_lark(grammar)
    assert re.search(re.escape(says), str(caught.value)) and len(str(caught.value)) < 200


def test_gbnf_is_told_from_lark():
    assert is_gbnf(JSON) and is_gbnf("# x\n  a-b::=[a]")
    assert not is_gbnf('start: "::=" x\nx: /[a-z]+ ::=/') and not is_gbnf("%llguidance {}\nstart: x")


ODD = [
    "{1," + " " * 32_000,
    "a" * 16_000 + " " * 16_000,
    "(" * 32_000,
    '"' + r"\\" * 16_000,
    "[" * 32_000,
    "|" * 30_000,
    "{" * 32_000,
    "a ::= " * 5000,
    "(" * 7500 + '"a"' + ")" * 7500,
]


@pytest.mark.parametrize("text", ODD, ids=lambda text: text[:9])
def test_odd_grammars_are_refused_soon(text):
    began = time.process_time()
    with pytest.raises(ValueError):
        GRAMMARS["byte_level"].mask(structured.lark(to_lark(f'root ::= "b" {text}')))
    assert is_within(time.process_time() - began, 0.5)
