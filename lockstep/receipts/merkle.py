"""Merkle trees as RFC 9162 (section 2.1) has them: SHA-256, a prefix 0x00 before a leaf and 0x01 before two nodes; a
tree of n leaves is split at the largest power of two below n, and one of no leaves has the SHA-256 of nothing as root.

A root binds all leaves and their order. A path of O(log n) nodes shows that a leaf is in a tree.
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


def _split(size: int) -> int:
    """The largest power of two below a size of at least 2."""
    return 1 << (size - 1).bit_length() - 1
