"""Trees against RFC 9162's own recursion, and proofs that hold for nothing else."""

import pytest

from lockstep.receipts import merkle
from lockstep.receipts.merkle import EMPTY, leaf_hash, node_hash, root

# the leaves and the root that implementations of Certificate Transparency are tested with
KNOWN = [b"", b"\0", b"\x10", b" !", b"01", b"@ABC", b"PQRSTUVW", bytes(range(0x60, 0x70))]
KNOWN_ROOT = "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328"
SIZES = range(34)


def recursive(leaves):
    """The root as the RFC defines it."""
    if len(leaves) < 2:
        return leaf_hash(leaves[0]) if leaves else EMPTY
    split = max(2**i for i in range(8) if 2**i < len(leaves))
    return node_hash(recursive(leaves[:split]), recursive(leaves[split:]))


def leaves_of(size):
    return [bytes([number]) * 3 for number in range(size)]


def nodes_of(size):
    return [leaf_hash(leaf) for leaf in leaves_of(size)]


def broken(path):
    """Paths that differ from a path in one place."""
    for place in range(len(path)):
        yield [*path[:place], bytes([path[place][0] ^ 1]) + path[place][1:], *path[place + 1 :]]
        yield path[:place] + path[place + 1 :]
    yield [*path, EMPTY]


def test_known_roots():
    assert root([leaf_hash(leaf) for leaf in KNOWN]).hex() == KNOWN_ROOT
    assert EMPTY.hex() == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855" == root([]).hex()


def test_roots_are_those_of_the_recursion():
    for size in SIZES:
        leaves = leaves_of(size)
        assert recursive(leaves) == root(nodes_of(size)) == merkle.root_of(b"".join(leaves), 3)


def test_a_path_shows_one_leaf_at_one_place():
    for size in SIZES:
        nodes, whole = nodes_of(size), root(nodes_of(size))
        for index, node in enumerate(nodes):
            path = merkle.inclusion_path(nodes, index)
            places = [at for at in range(-1, size + 1) if merkle.is_included(node, at, size, path, whole)]
            assert places == [index]
            assert not any(merkle.is_included(node, index, size, wrong, whole) for wrong in broken(path))
            assert not merkle.is_included(leaf_hash(b"other"), index, size, path, whole)


@pytest.mark.parametrize("index", [-1, 3])
def test_leaves_that_are_not_there(index):
    with pytest.raises(IndexError, match=f"leaf {index} of 3"):
        merkle.inclusion_path(nodes_of(3), index)
