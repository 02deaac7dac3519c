"""The seed with which a request's answers are made: its own, or else one that the server finds and tells."""

import hashlib
import re
from dataclasses import replace
from typing import NamedTuple

from starlette.types import Scope

from lockstep.engine.request import SamplingParams
from lockstep.receipts.parameters import seed_of
from lockstep.serve.answer_size import Prompts
from lockstep.serve.errors import wrong_field
from lockstep.serve.fields.body import shown
from lockstep.serve.fields.sampling import RANDOM, SEED_BITS

SEED_HEADER = "X-Lockstep-Seed"  # of answers
KEY_HEADER = "Idempotency-Key"  # of requests
KEY = re.compile(rb"[ -~]{1,255}")


class Seeds(NamedTuple):
    """How a request gets its seeds. is_given: whether its body has one; nonce: of its receipt; of_key: the seed that
    follows from its Idempotency-Key, where that is needed."""

    is_given: bool
    nonce: str | None = None
    of_key: int | None = None

    def put_into(self, prompts: Prompts) -> Prompts:
        """The prompts of a request with its seeds, where its body gives none: those of the nonce, one for each prompt;
        0 where nothing is drawn, so that the same request has the same receipt; that of the Idempotency-Key; else the
        random one of the first prompt. But for a nonce all prompts get the same, as from a body: one number repeats
        the request."""
        if self.is_given:
            return prompts
        found = [(ids, params, self._found(ids, params, prompts[0][1].seed)) for ids, params in prompts]
        return [(ids, params if seed == params.seed else replace(params, seed=seed)) for ids, params, seed in found]

    def _found(self, prompt_ids: list[int], params: SamplingParams, drawn: int) -> int:
        if self.nonce is not None:
            return seed_of(self.nonce, prompt_ids)
        if not params.temperature:
            return 0
        return drawn if self.of_key is None else self.of_key


def has_seed(seed: int | None) -> bool:
    """Whether the value of the field `seed` is one, and none is drawn."""
    return seed not in (None, RANDOM)


def common_seed(prompts: Prompts) -> int | None:
    """The seed with which the same request is answered the same; None where prompts have seeds of their own, which
    follow from a nonce: such a request repeats as it is."""
    [first, *others] = {params.seed for _, params in prompts}
    return None if others else first


def sent_key(scope: Scope) -> bytes | None:
    """The Idempotency-Key of a request, if it has one. ApiError 400 for several, and for what is no key."""
    keys = [value for name, value in scope["headers"] if name == KEY_HEADER.lower().encode()]
    if not keys:
        return None
    if len(keys) > 1:
        raise wrong_field(KEY_HEADER, f"expected one such header, got {len(keys)}")
    if not KEY.fullmatch(keys[0]):
        got = shown(keys[0].decode("latin-1"))
        raise wrong_field(KEY_HEADER, f"expected 1 to 255 printable ASCII characters, got {got}")
    return keys[0]


def seed_of_key(key: bytes, tenant: str, raw: bytes) -> int:
    """The seed of a request without one: of SHA-256("lockstep idempotency", SHA-256(the Idempotency-Key), SHA-256(the
    tenant), SHA-256(the body)) the first 8 bytes, as a little-endian integer, and of that the lowest 53 bits.

    tenant: of the API key, see ApiKeyMiddleware. raw: the body, unpacked.
    """
    parts = [hashlib.sha256(part).digest() for part in (key, tenant.encode(), raw)]
    digest = hashlib.sha256(b"lockstep idempotency" + b"".join(parts)).digest()
    return int.from_bytes(digest[:8], "little") % (1 << SEED_BITS)
