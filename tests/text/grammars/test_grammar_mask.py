"""Masks for drafts: one for each row, equal to the masks of final tokens, and rejected drafts leave no trace."""

import ctypes
import threading

import numpy as np
import pytest

from lockstep.engine.request import SamplingParams
from lockstep.engine.sampling import Adjustment, Refused
from lockstep.text.grammars import matchers, structured
from lockstep.text.grammars.mask import GrammarMask
from lockstep.text.token_masks import TokenMask, UntilComplete
from tests.text.grammar_cases import GRAMMARS, PERSON, SPARE, TOKENIZERS, allowed

TEXTS = dict(
    person=structured.json_schema(PERSON),
    words=structured.regex("[ab]{1,9}(, [ab]{1,9})*"),
    sides=structured.choice(["left", "leftmost", "right"]),
    words_in_lark=structured.lark('start: ("self." WORD "\\n")+\nWORD: /[a-z]{1,9}/'),
)
KIND = "byte_level"
TOKENIZER, NEW = TOKENIZERS[KIND], GRAMMARS[KIND].mask
VOCABULARY = TOKENIZER.vocab_size + SPARE
END = min(TOKENIZER.eos_ids)


def ids_of(text):
    return TOKENIZER.encode(text, add_special_tokens=False)


def alone(make, output_ids):
    """The tokens allowed after each part of an output by a mask without drafts: lists of ids, None for all tokens."""
    mask, ids, made = make(), [], []
    for token in [*output_ids, None]:
        words = mask(ids)
        made.append(None if words is None else allowed(words).tolist())
        ids.append(token)
    return made


def rows(mask, output_ids, drafts):
    return [None if words is None else allowed(words).tolist() for words in mask.masks(output_ids, drafts)]


def answer(make, rng, most=60):
    """Random tokens that a mask allows, one after another, up to an end token or until none is allowed."""
    mask, ids = make(), []
    while len(ids) < most:
        options = allowed(mask(ids))
        if not options.size or (token := int(rng.choice(options))) == END:
            break
        ids.append(token)
    return ids


def check_drafts(make, rng):
    """Follows an answer with drafts whose first tokens are right and whose later ones are wrong."""
    right = answer(make, rng)
    expected, mask, ids = alone(make, right), make(), []
    for at in range(len(right) + 1):
        count = int(rng.integers(0, 7))
        drafts = right[at : at + count] + rng.integers(0, 300, int(rng.integers(0, 3))).tolist()
        drafts = [token for token in drafts if token != END]
        num_allowed = mask.num_allowed(ids, drafts)
        made = alone(make, right[:at] + drafts[:num_allowed])
        assert num_allowed >= min(count, len(right) - at)
        if num_allowed < len(drafts):
            assert drafts[num_allowed] not in made[-1]
        assert rows(mask, ids, drafts[:num_allowed]) == made[at:]
        assert rows(mask, ids, drafts) == made[at:]
        for known in range(min(3, num_allowed + 1)):
            check_forced(make, right[:at] + drafts[:known], mask.forced(ids, drafts[:known]))
        if rng.random() < 0.5:  # with drafts only, or without them, too
            words = mask(ids)
            assert (words if words is None else allowed(words).tolist()) == expected[at]
        ids += right[at : at + 1]


def check_forced(make, output_ids, forced):
    """Nothing else is allowed where a token is forced."""
    found = alone(make, output_ids + forced)[len(output_ids) :]
    assert all(options == [token] for options, token in zip(found, forced, strict=False))


@pytest.mark.parametrize("name", TEXTS)
def test_each_draft_has_the_mask_that_it_has_when_it_is_final(name):
    for seed in range(4):
        check_drafts(lambda: NEW(TEXTS[name]), np.random.default_rng(seed))


@pytest.mark.parametrize("once", [True, False])
@pytest.mark.parametrize("before, after", [(None, None), (None, "!"), ("?", "!")])
def test_grammars_that_begin_and_end_within_drafts(before, after, once):
    trigger = TOKENIZER.backend.token_to_id("<tool call>")
    opened, place = (None if mark is None else ids_of(mark)[0] for mark in (before, after))
    make = lambda: NEW(structured.choice(["12", "345"]), 1, trigger, place, once, opened)
    one, two, three, four, five = (ids_of(digit)[0] for digit in "12345")
    first, second = [four, trigger, one, two], [trigger, three, four, five]
    text = [*([opened] if before else []), *first, place, *second] if after else first if once else first + second
    text += [] if once else [four, four, trigger, one]
    expected = alone(make, text)
    for count in (1, 2, 5, len(text)):
        mask, ids = make(), []
        for at in range(len(text) + 1):
            drafts = text[at : at + count]
            assert mask.num_allowed(ids, drafts) == len(drafts)
            assert rows(mask, ids, drafts) == expected[at : at + len(drafts) + 1]
            ids += text[at : at + 1]


def test_what_has_to_come_is_said():
    mask = NEW(structured.json_schema(dict(PERSON, properties=PERSON["properties"])))
    begun = mask.forced([], [])
    assert begun and TOKENIZER.decode(begun).startswith("{")
    assert mask.forced([], ids_of('{"name": "x", ')) and not mask.forced([], ids_of('{"name": "'))
    assert mask.forced([], [END - 1 if END else 5]) == []  # after what is not allowed


def test_samples_read_drafts_of_their_own():
    make = lambda count=1: NEW(TEXTS["sides"], count)
    mask, first, second = make(2), ids_of("le"), ids_of("r")
    assert rows(mask, first, ids_of("ft"))[-1] == alone(make, ids_of("left"))[-1]
    assert rows(mask, second, ids_of("ight"))[-1] == alone(make, ids_of("right"))[-1]
    assert rows(mask, first, ids_of("ftmost"))[-1] == [END]


@pytest.mark.parametrize("most_states", [60, 100, 180, 300])
def test_a_limit_that_only_drafts_reach_ends_no_answer(monkeypatch, most_states):
    """Whether an answer ends at a limit of the automaton, and where, does not depend on the drafts beside it."""
    monkeypatch.setitem(matchers.LIMITS, "max_lexer_states", most_states)
    letters, was_short, compiled = [ids_of(letter)[0] for letter in "abcdx"], 0, []
    compile_it = GRAMMARS[KIND]._compile  # noqa: SLF001
    threads = lambda grammar: compiled.append(threading.current_thread().name) or compile_it(grammar)
    monkeypatch.setattr(GRAMMARS[KIND], "_compile", threads)
    for seed in range(4):
        found = []
        for has_drafts in (False, True):
            mask, ids, rng = NEW(structured.regex("[abcd]*a[abcd]{40}x")), [], np.random.default_rng(seed)
            guesses, seen = np.random.default_rng(seed + 100), []
            for _ in range(60):
                try:
                    drafts = guesses.choice(letters, 6).tolist() if has_drafts else []
                    masks = rows(mask, ids, drafts)
                except ValueError as error:
                    seen.append(str(error))
                    break
                was_short += len(masks) <= len(drafts)
                seen.append(masks[0])
                ids.append(int(rng.choice(masks[0])))
                if ids[-1] == END:
                    break
            found.append(seen)
        assert found[0] == found[1]
    assert was_short >= 3
    assert 8 <= len(compiled) <= 12  # once more at most for each answer with drafts, where stacks are deep
    assert all(name.startswith("lockstep grammar") for name in compiled)


def test_a_grammar_that_takes_long_to_compile_has_no_drafts():
    drafts, ids = ids_of("left"), []
    matcher = NEW(TEXTS["sides"])._unused[0]  # noqa: SLF001
    slow = GrammarMask([matcher], lambda: None, -(-VOCABULARY // 32), may_draft=False)
    assert slow.forced(ids, []) == slow.forced(ids, drafts[:1]) == [] and slow.num_allowed(ids, drafts) == 0
    assert rows(slow, ids, drafts) == alone(lambda: NEW(TEXTS["sides"]), [])


# ---------------------------------------------------------------- masks around masks


def wrapped(name):
    """A grammar without some tokens, and words that are left out."""
    words = [ids_of("ab"), ids_of("b, "), [ids_of("t")[0]]]
    inner = TokenMask(VOCABULARY, None, words, NEW(TEXTS[name]), [END])
    return UntilComplete(inner, VOCABULARY, {END})


@pytest.mark.parametrize("name", ["words", "sides"])
def test_masks_around_a_grammar_say_the_same_of_drafts(name):
    for seed in range(6):
        rng = np.random.default_rng(seed)
        right = answer(lambda: wrapped(name), rng, 20)
        expected, mask = alone(lambda: wrapped(name), right), wrapped(name)
        for at in range(len(right) + 1):
            drafts = right[at : at + int(rng.integers(0, 5))]
            assert mask.num_allowed(right[:at], drafts) == len(drafts)
            assert rows(mask, right[:at], drafts) == expected[at : at + len(drafts) + 1]
            check_forced(lambda: wrapped(name), right[:at] + drafts, mask.forced(right[:at], drafts))


def test_words_that_are_left_out_end_drafts():
    a, b = ids_of("ab")
    for other in (None, NEW(TEXTS["words"])):
        mask = TokenMask(VOCABULARY, None, [[a, b]], other, [END])
        assert mask.num_allowed([], [a, a, b, a]) == 2 and mask.num_allowed([a], [b]) == 0
        assert b not in rows(mask, [], [a, a])[2]
    assert TokenMask(VOCABULARY, [a], []).forced([], [a]) == []


# ---------------------------------------------------------------- the rows of a request


def mask_of(fields, adjustment_words):
    """The tokens that a row's mask allows, read from the memory that the kernel reads."""
    if not fields.get("mask"):
        return None
    words = (ctypes.c_uint32 * adjustment_words).from_address(fields["mask"])
    return allowed(np.array(words, np.uint32)).tolist()


def adjustment(mask, **options):
    params = SamplingParams(logits_mask=mask, max_tokens=20, **options)
    return Adjustment([1, 2], params, frozenset({END}), VOCABULARY)


def test_each_row_has_a_mask_and_a_ban_of_its_own():
    number = -(-VOCABULARY // 32)
    made = adjustment(NEW(TEXTS["sides"]), min_tokens=5)
    left = ids_of("left")
    found = made.rows([], left)
    assert [mask_of(fields, number) for fields in found] == alone(lambda: NEW(TEXTS["sides"]), left)
    assert [fields["num_banned"] for fields in found] == [1, 1, 1, 1, 1]  # "leftmost" is possible
    right = made.rows([], ids_of("right"))
    assert [fields["num_banned"] for fields in right][-1] == 0  # but nothing after "right"
    assert len({fields["mask"] for fields in right}) == len(right)


def test_rows_end_where_a_mask_does_not_go_on():
    number = -(-VOCABULARY // 32)
    made = adjustment(NEW(TEXTS["sides"]))
    found = made.rows([], ids_of("leX"))
    assert len(found) == 3 and mask_of(found[2], number) == alone(lambda: NEW(TEXTS["sides"]), ids_of("le"))[-1]
    with pytest.raises(Refused, match="grammar"):
        made.rows(ids_of("X"), ids_of("l"))
    assert len(adjustment(lambda output_ids: None).rows([], [1, 2])) == 1  # a user's own is not asked about drafts
