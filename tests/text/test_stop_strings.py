"""Stop strings compared with a plain search, on random text cut into random pieces."""

import random

import pytest

from lockstep.text.stop_strings import StopStrings, borders


def naive(text, strings, include, first=0):
    """(text up to the stop, the stop): the first end of a match at or after `first` characters; the longest there."""
    for end in range(first + 1, len(text) + 1):
        ended = [s for s in strings if text[:end].endswith(s)]
        if ended:
            found = max(ended, key=len)
            return text[: end if include else end - len(found)], found
    return text, None


def cut(text, rng):
    places = sorted(rng.sample(range(len(text) + 1), rng.randint(0, min(6, len(text)))))
    return [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]


def stream(pieces, strings, include, first=0):
    """(the text that was shown, the stop string found). Checks that no shown text can be part of a stop string."""
    stops, shown, seen = StopStrings(strings, include), "", ""
    for piece in pieces:
        inside = max(0, min(len(piece), first - len(seen)))
        for part, may_stop in ((piece[:inside], False), (piece[inside:], True)):
            if stops.found is None:
                seen += part
                shown += stops.push(part, may_stop)
                assert seen.startswith(shown)
                if stops.found is None:
                    held = seen[len(shown) :]
                    assert not held or any(s.startswith(held) and s != held for s in strings)
                    longer = [s[:n] for s in strings for n in range(len(held) + 1, len(s))]
                    assert include or not seen.endswith(tuple(longer))
    return (shown + stops.finish() if stops.found is None else shown), stops.found


@pytest.mark.parametrize("include", [False, True])
def test_any_cut_of_any_text_gives_what_the_plain_search_gives(include):
    rng = random.Random(1)
    found = 0
    for _ in range(4000):
        text = "".join(rng.choices("ab", k=rng.randint(0, 14)) + rng.choices("abc", k=rng.randint(0, 6)))
        strings = tuple({"".join(rng.choices("abc", k=rng.randint(1, 5))) for _ in range(rng.randint(0, 3))})
        first = rng.choice([0, 0, 3, 9])
        expected = naive(text, strings, include, first)
        assert stream(cut(text, rng), strings, include, first) == expected, (text, strings, first)
        found += expected[1] is not None
    assert 1000 < found < 3900


def test_text_is_held_back_while_it_could_begin_a_stop_string():
    stops = StopStrings(("<end>", "</p>"))
    shown = [stops.push(p) for p in ("a <", "b> ", "<e", "n", "t <", "/p", "> tail")]
    assert shown == ["a ", "<b> ", "", "", "<ent ", "", ""]
    assert stops.found == "</p>"


def test_held_back_text_is_shown_at_the_end():
    stops = StopStrings(("aab",))
    assert (stops.push("xaa"), stops.push("a"), stops.finish(), stops.finish()) == ("x", "a", "aa", "")


def test_the_match_that_is_complete_first_wins_and_then_the_longest():
    assert stream(["abcdef"], ("abcdef", "cd"), False) == ("ab", "cd")
    assert stream(["xabc"], ("bc", "abc", "c"), False) == ("x", "abc")
    assert stream(["xabc"], ("bc", "abc", "c"), True) == ("xabc", "abc")


def test_a_long_stop_string_costs_little():
    string = "a" * 100_000 + "b"
    stops = StopStrings((string,))
    assert all(stops.push("a" * 100) == "" for _ in range(1000))
    assert stops.push("a") == "a" and stops.push("b") == "" and stops.found == string


def test_borders():
    assert borders("abacabab") == [0, 0, 0, 1, 0, 1, 2, 3, 2]
