"""Guesses from the text itself."""

import numpy as np

from lockstep.engine.lookup import SIZES, Lookup


def guess(text, most=3):
    made = Lookup()
    made.extend(map(ord, text))
    return "".join(map(chr, made.guess(most)))


def test_the_longest_tail_decides_and_the_latest_place_of_it():
    assert guess("abcd1 xbcd2 bcd3 abcd") == "1 x"
    assert guess("xab1 yab2 zab") == "2 z"


def test_what_was_never_there_gives_no_guess():
    assert guess("abcdef") == guess("a") == guess("") == guess("ab") == ""


def test_a_text_that_repeats_goes_on_repeating():
    assert guess("abcabcabc", 8) == "abcabcab"
    assert guess("aaaa", 5) == "aaaaa"


def test_taken_in_piece_by_piece_or_at_once_it_guesses_the_same():
    tokens = np.random.default_rng(3).integers(0, 4, 400).tolist()
    piecewise = Lookup()
    for i, token in enumerate(tokens):
        piecewise.extend([token])
        at_once = Lookup()
        at_once.extend(tokens[: i + 1])
        assert piecewise.guess(5) == at_once.guess(5) == plainly(tokens[: i + 1], 5)


def plainly(tokens, most):
    """The same by looking at every place."""
    for size in SIZES:
        for at in range(len(tokens) - 1, size - 1, -1):
            if tokens[at - size : at] == tokens[-size:]:
                longer = list(tokens)
                for i in range(most):
                    longer.append(longer[at + i])
                return longer[len(tokens) :]
    return []
