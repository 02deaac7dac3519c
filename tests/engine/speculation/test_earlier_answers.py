"""Earlier answers: what is kept of them, which requests find them, and for how long."""

import numpy as np
import pytest

from lockstep.engine.speculation.earlier_answers import EarlierAnswers


def text(seed, length=30):
    return np.random.default_rng(seed).integers(0, 1000, length).tolist()


def found(answers, salt, of, at=20):
    """The tokens that are found after the first `at` tokens of an answer."""
    place = answers.find(salt, of[:at])
    return None if place is None else list(place.tokens[place.at :])


def test_answers_are_found_by_their_own_salt_only():
    answers = EarlierAnswers()
    answers.add("a", [1], text(0))
    assert found(answers, "a", text(0)) == text(0)[20:]
    assert found(answers, "b", text(0)) is None and found(answers, "", text(0)) is None


def test_the_newest_answer_that_reads_so_is_found():
    answers, begun = EarlierAnswers(), text(0)
    for seed in (1, 2):
        answers.add("", [], begun + text(seed))
    assert found(answers, "", begun, 30) == text(2)


@pytest.mark.parametrize("most", [100, 1000])
def test_no_more_is_kept_than_there_is_room_for_and_what_was_not_found_for_long_goes_first(most):
    answers = EarlierAnswers(most)
    answers.add("kept", [], text(0))
    for seed in range(1, 200):
        answers.add(f"salt {seed % 7}", text(seed, 5), text(seed))
        assert answers.num_tokens <= most
        assert found(answers, "kept", text(0)) == text(0)[20:]
    assert found(answers, f"salt {199 % 7}", text(199)) == text(199)[20:]
    assert found(answers, f"salt {100 % 7}", text(100)) is None


def test_nothing_is_left_of_what_was_dropped():
    answers = EarlierAnswers(64)
    for seed in range(50):
        answers.add(str(seed), [], text(seed % 3))
        assert found(answers, str(seed), text(seed % 3)) == text(seed % 3)[20:]
    salts = [str(seed) for seed in range(50) if found(answers, str(seed), text(seed % 3)) is not None]
    assert len(salts) == 2 and answers.num_tokens == 60


def test_the_same_answer_is_kept_once():
    answers = EarlierAnswers(100)
    for _ in range(9):
        answers.add("", [3], text(0))
    assert answers.num_tokens == 31


def test_an_answer_longer_than_all_room_is_kept_as_far_as_it_goes():
    answers = EarlierAnswers(50)
    answers.add("", [1] * 20, text(0, 500))
    assert answers.num_tokens == 50 and found(answers, "", text(0, 500)) == text(0, 500)[20:42]
