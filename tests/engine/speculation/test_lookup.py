"""Guesses from a request's own text, its prediction and earlier answers."""

import numpy as np
import pytest

from lockstep.engine.speculation import lookup
from lockstep.engine.speculation.earlier_answers import EarlierAnswers
from lockstep.engine.speculation.lookup import SIZES, Lookup, Prediction


def guess(text, most=3):
    made = Lookup()
    made.extend(ids(text))
    return "".join(map(chr, made.guess(most).tokens))


def test_the_longest_tail_decides_and_the_latest_place_of_it():
    assert guess("abcd1 xbcd2 bcd3 abcd") == "1 x"
    assert guess("xab1 yab2 zab") == "2 z"


def test_what_was_never_there_gives_no_guess():
    assert guess("abcdef") == guess("a") == guess("") == guess("ab") == ""


def test_a_text_that_repeats_goes_on_repeating():
    assert guess("abcabcabc", 8) == "abcabcab"
    assert guess("aaaa", 5) == "aaaaa"


def test_taken_in_piece_by_piece_or_at_once_it_guesses_the_same():
    rng = np.random.default_rng(3)
    tokens = rng.integers(0, 4, 400).tolist()
    piecewise = Lookup()
    for i, token in enumerate(tokens):
        piecewise.extend([token])
        at_once = Lookup(int(rng.integers(0, i + 2)))  # tokens of it are the prompt
        at_once.extend(tokens[: i + 1])
        assert piecewise.guess(5).tokens == at_once.guess(5).tokens == plainly(tokens[: i + 1], 5)


def plainly(tokens, most):
    """The guess of a search through every place."""
    for size in SIZES:
        for at in range(len(tokens) - 1, size - 1, -1):
            if tokens[at - size : at] == tokens[-size:]:
                longer = list(tokens)
                for i in range(most):
                    longer.append(longer[at + i])
                return longer[len(tokens) :]
    return []


def ids(text):
    return list(map(ord, text))


def following(prompt, prediction, answer="", answers=None, salt=""):
    """The Lookup of a request with this answer so far."""
    made = Lookup(len(prompt), Prediction(ids(prediction)) if prediction else None, answers, salt)
    made.extend(ids(prompt))
    for token in ids(answer):
        made.guess(4)
        made.extend([token])
    return made


def read(guess):
    return "".join(map(chr, guess.tokens)), guess.source


LINES = "a = get(1)\nb = get(2)\nc = get(3)\nd = get(4)\n"


@pytest.mark.parametrize(
    "answer, next_four",
    [
        ("", "a = "),
        ("a = g", "et(1"),
        (LINES[:-2], ")\n"),  # there is no more
        ("a = set(1)\n", "b = "),  # other than predicted, and back
        ("a = get(1)\nb = set(2", ")\nc "),
        ("a = get(1)\nc = get(", "3)\nd"),  # a line is left out
        ("First: a = get(", "1)\nb"),
        (
            "b = get(2)\na = get(",
            "1)\nb",
        ),  # of the places that read alike: the first that was not passed, or an earlier
    ],
)
def test_the_answer_is_followed_through_its_prediction(answer, next_four):
    assert read(following("Write it!", LINES, answer).guess(4)) == (next_four, "prediction")


def test_of_places_that_read_alike_in_a_prediction_the_next_one_counts():
    text = "(begin) x; (end) 1 (end) 2 (end) 3"
    assert read(following("?", text, "(begin) y; (end) ").guess(1)) == ("1", "prediction")


@pytest.mark.parametrize("at_once", [1, 7, 16, 4096])
def test_a_long_prediction_is_read_in_parts(monkeypatch, at_once):
    monkeypatch.setattr(lookup, "READ_AT_ONCE", at_once)
    tokens = np.random.default_rng(1).integers(0, 5, 300).tolist()
    made, tails = Prediction(tokens), [tokens[at - 9 : at] for at in range(9, 300)]
    found = [made.find(tails[0], 0) for _ in range(-(-300 // at_once))]
    assert found[-1] is not None and (found[0] is None) == (at_once < 9)
    for at, tail in enumerate(tails, 9):
        place, size = made.find(tail, at), next(s for s in (8, 4, 3, 2) if occurs(tokens, tail[-s:]))
        assert place in occurs(tokens, tail[-size:])
        assert place == min([p for p in occurs(tokens, tail[-size:]) if p >= at] or [occurs(tokens, tail[-size:])[-1]])


def occurs(tokens, tail):
    """The indices of the tokens that follow a tail."""
    return [at for at in range(len(tail), len(tokens)) if tokens[at - len(tail) : at] == tail]


def test_a_prediction_comes_before_the_prompt_until_the_answer_is_another():
    prompt = "abcd X"
    assert read(following(prompt, "abcd Y").guess(1)) == ("a", "prediction")
    assert read(following(prompt, "abcd Y", "Zabcd").guess(2)) == (" X", "lookup")  # as long: the own text's
    assert read(following(prompt, "_Zabcd Y", "Zabcd").guess(2)) == (" Y", "prediction")  # longer


def test_drafts_are_followed_by_what_follows_them():
    assert read(following("?", LINES, "a = ").guess(3, ids("get"))) == ("(1)", "prediction")
    assert read(following("?", LINES, "a = get(").guess(3, ids("1)\nc = get("))) == ("3)\n", "prediction")
    assert read(following("abcdefgh ab", "").guess(3, ids("cd"))) == ("efg", "lookup")
    assert read(following("abcabc", "").guess(7, ids("abc"))) == ("abcabca", "lookup")
    assert read(following("xy", "").guess(3, ids("z"))) == ("", "lookup")


def test_earlier_answers_are_those_of_the_salt_and_the_longest_likeness_counts():
    answers = EarlierAnswers()
    answers.add("mine", ids("The question?"), ids("The answer is 42."))
    answers.add("other", ids("The question?"), ids("The answer is 43."))
    assert read(following("question?", "", "", answers, "mine").guess(4)) == ("The ", "earlier_answers")
    assert read(following("What?", "", "The answer is", answers, "mine").guess(4)) == (" 42.", "earlier_answers")
    assert read(following("What?", "", "The answer is", answers, "other").guess(4)) == (" 43.", "earlier_answers")
    assert read(following("What?", "", "The answer is", answers, "").guess(4)) == ("", "lookup")
    assert read(following("ver is 7?", "", "ver is", answers, "mine").guess(2)) == (" 7", "lookup")
    assert read(following("ver is 7?", "", "answer is", answers, "mine").guess(2)) == (" 4", "earlier_answers")


def test_guesses_stand_in_the_text_that_they_come_from():
    answers, rng, seen = EarlierAnswers(), np.random.default_rng(4), set()
    texts: dict[str, list[list[int]]] = dict(prediction=[], earlier_answers=[])
    for _ in range(100):
        earlier, text, answer = (rng.integers(0, 4, n).tolist() for n in (50, 40, 30))
        answers.add("", [], earlier)
        made = Lookup(2, Prediction(text), answers)
        texts["prediction"] = [text]
        texts["earlier_answers"].append(earlier)
        made.extend([0, 1])
        for token in answer:
            guess = made.guess(3)
            seen.add(guess.source)
            assert guess.source == "lookup" or stands(guess.tokens, 3, texts[guess.source])
            made.extend([token])
    assert seen == {"lookup", "prediction", "earlier_answers"}


def stands(tokens, most, texts):
    """Whether the tokens occur in one of these texts, and are fewer than `most` only at its end."""
    return any(text[i : i + most] == tokens for text in texts for i in range(len(text)))
