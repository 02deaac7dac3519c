"""Which replica a new request goes to: one that knows much of its prompt, and has little else to compute.

Blocks of prefixes are named by the hash of all their tokens (`engine/cache/prefix.py`), and replicas tell which names
come and go, so that the front knows exactly what each of them has. No choice changes an answer.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Protocol, TypeVar

from lockstep.engine.request import Request
from lockstep.ops.attention.kv_cache import PAGE_TOKENS
from lockstep.replicas.messages import NameChanges

OPEN_TOKENS = 64  # as many tokens of a prompt weigh as much as one request that is being answered
KNOWN_WEIGHT = (
    3  # a token that is known weighs as much as so many that wait: to compute it elsewhere costs all replicas
)


class KnownBlocks:
    """The blocks of prefixes that a replica has in memory, or will have when the requests that it was given are
    computed."""

    def __init__(self) -> None:
        self._pages: set[bytes] = set()
        self._states: set[bytes] = set()
        self._expected: Counter[bytes] = Counter()

    def take(self, changes: NameChanges) -> None:
        """What came and went."""
        for known, changed in ((self._pages, changes.pages), (self._states, changes.states)):
            for name, is_there in changed:
                if is_there:
                    known.add(name)
                else:
                    known.discard(name)

    def expect(self, names: Iterable[bytes]) -> None:
        """Blocks that a request which was given to the replica will compute."""
        self._expected.update(names)

    def stop_expecting(self, names: Iterable[bytes]) -> None:
        """The request has ended, or is computed."""
        self._expected.subtract(names)
        for name in names:
            if self._expected[name] <= 0:
                del self._expected[name]

    def num_known(self, names: Sequence[bytes], has_states: bool) -> int:
        """Tokens of a prefix, whose blocks have these names, that need not be computed. has_states: whether a prefix
        can only go on where the state of its layers is kept."""
        count = 0
        while count < len(names) and (names[count] in self._pages or names[count] in self._expected):
            count += 1
        while has_states and count and names[count - 1] not in self._states and names[count - 1] not in self._expected:
            count -= 1
        return count * PAGE_TOKENS


class Place(Protocol):
    """What the router knows of a replica. number: its own; load: tokens of prompts that it has yet to compute, and
    OPEN_TOKENS for each request."""

    number: int
    load: int
    blocks: KnownBlocks


P = TypeVar("P", bound=Place)


def usable_names(request: Request) -> list[bytes]:
    """The names of the blocks that a cache can stand in for: whole blocks before the last token of the prompt."""
    return request.prefix.block_names[: (len(request.prompt_ids) - 1) // PAGE_TOKENS]


def choose(places: Sequence[P], names: Sequence[bytes], has_states: bool) -> P:
    """The place with the fewest tokens to compute until a request's first one; of equal places the lowest number."""
    return min(
        places, key=lambda place: (place.load - KNOWN_WEIGHT * place.blocks.num_known(names, has_states), place.number)
    )
