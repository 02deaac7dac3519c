"""Merkle trees as RFC 9162 (section 2.1) has them: SHA-256, a prefix 0x00 before a leaf and 0x01 before two nodes; a
tree of n leaves is split at the largest power of two below n, and one of no leaves has the SHA-256 of nothing as root.

A root binds all leaves and their order. A path of O(log n) nodes shows that a leaf is in a tree, or that a tree is the
beginning of a longer one.
"""

from collections.abc import Sequence
from hashlib import sha256

HASH_BYTES = 32
EMPTY = sha256(b"").digest()


def leaf_hash(data: bytes | bytearray) -> bytes:
    """The node of one leaf."""
    return sha256(b"\x00" + data).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    """The node over two nodes."""
    return sha256(b"\x01" + left + right).digest()


def leaf_hashes(leaves: bytes | bytearray, size: int) -> list[bytes]:
    """The nodes of leaves of `size` bytes each, which lie one after the other."""
    return [sha256(b"\x00" + leaves[at : at + size]).digest() for at in range(0, len(leaves), size)]


def root(nodes: Sequence[bytes]) -> bytes:
    """The root over the nodes of leaves."""
    level = list(nodes)
    if not level:
        return EMPTY
    while len(level) > 1:  # an odd last node moves up as it is, which is the split of RFC 9162
        odd = level[-1:] if len(level) % 2 else []
        pairs = zip(level[::2], level[1::2], strict=False)
        level = [sha256(b"\x01" + left + right).digest() for left, right in pairs] + odd
    return level[0]


def root_of(leaves: bytes | bytearray, size: int) -> bytes:
    """The root over leaves of `size` bytes each, which lie one after the other."""
    return root(leaf_hashes(leaves, size))


class Tree:
    """A tree that only grows: it keeps the roots of its full subtrees, O(log n) of them."""

    def __init__(self) -> None:
        self.size = 0
        self._full: list[bytes] = []  # from the largest subtree to the smallest

    def append(self, data: bytes | bytearray) -> None:
        """Adds a leaf."""
        node, size = leaf_hash(data), self.size
        while size & 1:
            node, size = node_hash(self._full.pop(), node), size >> 1
        self._full.append(node)
        self.size += 1

    @property
    def root(self) -> bytes:
        """The root over all leaves so far."""
        if not self._full:
            return EMPTY
        node = self._full[-1]
        for left in self._full[-2::-1]:
            node = node_hash(left, node)
        return node


# ------------------------------------------------------------ proofs


def inclusion_path(nodes: Sequence[bytes], index: int) -> list[bytes]:
    """The nodes that lead from leaf `index` to the root, the lowest first. IndexError for a leaf that is not there."""
    if not 0 <= index < len(nodes):
        raise IndexError(f"leaf {index} of {len(nodes)}")
    if len(nodes) == 1:
        return []
    split = _split(len(nodes))
    if index < split:
        return [*inclusion_path(nodes[:split], index), root(nodes[split:])]
    return [*inclusion_path(nodes[split:], index - split), root(nodes[:split])]


def is_included(node: bytes, index: int, size: int, path: Sequence[bytes], expected: bytes) -> bool:
    """Whether a path shows that a leaf's node is leaf `index` of the tree of `size` leaves with this root."""
    if not 0 <= index < size:
        return False
    place, last = index, size - 1
    for sibling in path:
        if last == 0:
            return False
        if place & 1 or place == last:
            node = node_hash(sibling, node)
            while not place & 1 and place:
                place, last = place >> 1, last >> 1
        else:
            node = node_hash(node, sibling)
        place, last = place >> 1, last >> 1
    return last == 0 and node == expected


def consistency_path(nodes: Sequence[bytes], size: int) -> list[bytes]:
    """The nodes that show that the tree of the first `size` leaves is the beginning of the tree of all of them.
    IndexError for a size below 1 or above theirs."""
    if not 1 <= size <= len(nodes):
        raise IndexError(f"the first {size} of {len(nodes)} leaves")
    return _consistency(nodes, size, True)


def _consistency(nodes: Sequence[bytes], size: int, is_known: bool) -> list[bytes]:
    """is_known: whether the root of the first `size` leaves is that of the shorter tree, which the verifier has."""
    if size == len(nodes):
        return [] if is_known else [root(nodes)]
    split = _split(len(nodes))
    if size <= split:
        return [*_consistency(nodes[:split], size, is_known), root(nodes[split:])]
    return [*_consistency(nodes[split:], size - split, False), root(nodes[:split])]


def is_consistent(first: int, first_root: bytes, second: int, second_root: bytes, path: Sequence[bytes]) -> bool:
    """Whether a path shows that the tree of `first` leaves is the beginning of that of `second`, with these roots."""
    if not 1 <= first <= second:
        return False
    if first == second:
        return not path and first_root == second_root
    nodes = [first_root, *path] if first & (first - 1) == 0 else list(path)
    if not nodes:
        return False
    place, last = first - 1, second - 1
    while place & 1:
        place, last = place >> 1, last >> 1
    old = new = nodes[0]
    for sibling in nodes[1:]:
        if last == 0:
            return False
        if place & 1 or place == last:
            old, new = node_hash(sibling, old), node_hash(sibling, new)
            while not place & 1 and place:
                place, last = place >> 1, last >> 1
        else:
            new = node_hash(new, sibling)
        place, last = place >> 1, last >> 1
    return last == 0 and old == first_root and new == second_root


def _split(size: int) -> int:
    """The largest power of two below a size of at least 2."""
    return 1 << (size - 1).bit_length() - 1
