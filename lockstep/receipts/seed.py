"""The seed of a request that sends a nonce and no seed: nobody can choose it to get an answer of their liking."""

import hashlib
from collections.abc import Sequence

from lockstep.receipts.statement import ids_digest


def seed_of(nonce: str, prompt_ids: Sequence[int]) -> int:
    """The first 8 bytes, as a little-endian integer without its highest bit, of SHA-256("lockstep seed", SHA-256 of the
    prompt's ids as little-endian uint32, nonce)."""
    digest = hashlib.sha256(b"lockstep seed" + ids_digest(prompt_ids) + nonce.encode()).digest()
    return int.from_bytes(digest[:8], "little") & ((1 << 63) - 1)
