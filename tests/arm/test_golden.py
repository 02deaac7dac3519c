"""What tests.arm.golden says of digests that are equal, that differ, and that are not reached."""

import pytest

from lockstep.engine.selfcheck import golden as recorded
from tests.arm.__main__ import differences
from tests.arm.golden import Tried, compare, in_order

NAME = "concat"  # of a probe with few tensors


def no_model():
    raise AssertionError("probes with names need no model")


def told(capsys, digests):
    """Whether a probe with digests that a function makes from the recorded ones is right, and what is said of it."""
    known = recorded.read()[NAME]
    tried = Tried(lambda: [(None, tensor, digests(digest)) for tensor, digest in known.items()], no_model)
    right = compare({NAME: tried}, [NAME])
    return right, capsys.readouterr().out, list(known)


def test_equal_digests_are_right(capsys):
    right, said, tensors = told(capsys, str)
    assert right
    assert f"{len(tensors)} of {len(tensors)} digests and 1 of 1 probes are equal" in said


def test_a_digest_that_differs_is_named(capsys):
    right, said, tensors = told(capsys, lambda digest: digest[::-1])
    assert not right
    assert f"DIFFERING: {', '.join(tensors)}\n0 of {len(tensors)} digests and 0 of 1 probes" in said


def test_an_interruption_ends_with_what_was_compared(capsys):
    def interrupted(digest):
        raise KeyboardInterrupt

    right, said, _ = told(capsys, interrupted)
    assert not right
    assert "0 of 0 digests and 0 of 0 probes are equal, of 1" in said


def test_probes_with_new_kernels_come_first_and_a_seed_orders_the_others():
    kinds = {f"few {i}": {"rms_norm"} for i in range(20)} | {"many": {"rms_norm", "add", "sample"}}
    one, other = in_order(kinds, 1), in_order(kinds, 2)
    assert one[0] == other[0] == "many"
    assert one != other == in_order(kinds, 2)
    assert sorted(one) == sorted(kinds)


@pytest.mark.parametrize("found", [["a", "c"], ["a"], ["a", "b", "b"]])
def test_words_that_differ_or_are_missing_are_told(found):
    assert differences(["a", "b"], found)
    assert not differences(found, found)
