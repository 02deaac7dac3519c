"""The prefix cache: keys, values and states that another request computed for the same first tokens are found again,
and give the same bits.

The Scheduler and the Engine call it in this order. `names` hashes the blocks of a new prompt. `find` looks for the
longest known prefix of a waiting request; `attach` gives the request its pages and state; `enter` notes which blocks
the request is the first to compute, and `is_being_computed` makes later requests wait for them. In each step, `cut`
ends a prompt's part where a state is to be kept, and `computed` names the pages that are full and keeps the state.
`leave` ends the request's part in all this, and `forget` removes the blocks of a request whose numbers are broken.

Tokens are named in blocks of one page (64): a block's name is the SHA-256 of the name of the block before and of its
own token ids, and the first block's is made from the model's identity and the request's salt. So a name stands for all
tokens from the first one on, for one model and one salt, and a page of keys and values can be shared under it, in each
group of layers. Layers with a window need only the pages that the next token sees: a prefix is known where all pages of
the layers without a window are known, and those last pages of the others. The pages that a request leaves behind its
window are evicted first, but for two positions from which other requests may go on: the end of its prompt, and the end
of its own known prefix.

Layers with recurrent state also need the state after the last shared token. States are kept (`StateStore`) where it
pays: every `state_every` tokens, at the last whole block of a prompt of at least `prompt_state_from` tokens, where two
requests were seen to part, and at the newest quarter of `state_every` of an answer. A prompt's steps end at these
positions, so that the state can be copied. The known prefix of such a model ends at a kept state.

At least the last known token is always computed, since its logits are needed.
"""

import functools
import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lockstep.engine.cache.memory import Memory
from lockstep.engine.cache.pages import Held, PagePool
from lockstep.engine.cache.prefix_disk import DiskStore
from lockstep.engine.cache.states import StateStore
from lockstep.engine.model import Model
from lockstep.engine.request import Request
from lockstep.ops.attention.kv_cache import PAGE_TOKENS

LAYOUT = 1  # the version of how pages and states lie in bytes: any change of it raises the number


def model_identity(model: Model, numerics: int) -> bytes:
    """A hash of all that a block's bytes depend on besides its tokens and the weights: formats, arithmetic and layout.

    A process has one model, so that this is enough in memory. Names on disk also depend on the model's content.
    """
    caches = [(c.name, c.kind, c.dtype, c.shape, *([c.window] if c.window else [])) for c in model.recorded.caches]
    chosen = [each for each in (model.plan, model.rope) if each]
    known = LAYOUT, numerics, model.weights, model.kv_dtype, PAGE_TOKENS, caches, *chosen
    return hashlib.sha256(repr(known).encode()).digest()


def first_name(identity: bytes, salt: str) -> bytes:
    """The name that stands before the first block."""
    return hashlib.sha256(identity + salt.encode("utf-8", "surrogatepass")).digest()


def block_name(before: bytes, token_ids: Sequence[int]) -> bytes:
    """The name of a block of tokens that follows the block named `before`."""
    return hashlib.sha256(before + array("i", token_ids).tobytes()).digest()


def name_blocks(identity: bytes, request: Request, num_names: int) -> list[bytes]:
    """Names of a request's first `num_names` blocks, whose tokens must all be known; they are kept in the request.
    identity: see `model_identity`."""
    names = request.prefix.block_names
    while len(names) < num_names:
        start = len(names) * PAGE_TOKENS
        before = names[-1] if names else first_name(identity, request.cache_salt)
        names.append(block_name(before, request.token_ids(start, start + PAGE_TOKENS)))
    return names[:num_names]


@dataclass(frozen=True)
class KnownPrefix:
    """The known prefix of a request: the names of its blocks; num_held: of each group, how many of the pages that the
    request needs of these blocks are held by other requests, and so take no free page."""

    names: list[bytes]
    num_held: list[int]


@dataclass
class Counts:
    """Known tokens looked up and found, at the first admission of each request; states kept."""

    query_tokens: int = 0
    hit_tokens: int = 0
    recovered_tokens: int = 0  # found at a later admission, by requests that had been preempted
    kept_states: int = 0


def _write(data: np.ndarray, out: np.ndarray) -> None:
    np.copyto(out, data)


def _copy(states: StateStore, name: bytes, out: np.ndarray) -> None:
    """Copies a state that is there."""
    data = states.get(name)
    assert data is not None, name
    np.copyto(out, data)


def page_kind(group: int) -> str:
    """The kind under which the disk store keeps a group's pages."""
    return f"page{group}" if group else "page"


class PrefixCache:
    """Finds and keeps computed prefixes. What it knows of one request is in `Request.prefix`.

    pages: the PagePool. memory: copies pages and states. identity: see `model_identity`. states: the StateStore; None
    where no layer has a recurrent state. disk: a DiskStore, where what is no longer in memory is looked for; or None.
    """

    def __init__(
        self,
        pages: PagePool,
        memory: Memory,
        identity: bytes,
        states: StateStore | None = None,
        disk: DiskStore | None = None,
        state_every: int = 512,
        prompt_state_from: int = 0,
    ) -> None:
        self.pages, self.memory, self.identity = pages, memory, identity
        self.states, self.disk, self.state_every, self.prompt_state_from = states, disk, state_every, prompt_state_from
        self.counts = Counts()
        self._awaited: dict[bytes, Request] = {}

    def report(self) -> dict[str, int]:
        """Counts of this cache, of its states and of its disk store: {name: number}."""
        counts = dict(vars(self.counts))
        if self.states is not None:
            counts |= dict(states=len(self.states), states_evicted=self.states.num_evicted)
        if self.disk is not None:
            counts |= {f"disk_{name}": count for name, count in vars(self.disk.counts).items()}
        return counts

    # ------------------------------------------------------------ names

    def names(self, request: Request, num_names: int) -> list[bytes]:
        """Names of a request's first `num_names` blocks, whose tokens must all be known."""
        return name_blocks(self.identity, request, num_names)

    def _usable(self, request: Request) -> list[bytes]:
        """Names of the blocks that a request may take from the cache: the whole blocks before its last token."""
        return self.names(request, request.num_reusable // PAGE_TOKENS)

    # ------------------------------------------------------------ finding

    def find(self, request: Request) -> KnownPrefix:
        """The longest known prefix of a request."""
        names = self._usable(request)
        whole = self._whole(names)
        count = num_pages = self._seen(names, whole)
        request.prefix.known_end = whole * PAGE_TOKENS
        if self.states is not None:
            while count and not self._has_state(self.states, names[count - 1]):
                count = self._seen(names, count - 1)
            request.prefix.branch = num_pages * PAGE_TOKENS if self._pays(num_pages * PAGE_TOKENS) else None
        return self._known_prefix(names[:count])

    def _known_prefix(self, names: list[bytes]) -> KnownPrefix:
        """The KnownPrefix of a request's first blocks, by their names."""
        num_held = []
        for group, allocator in enumerate(self.pages.allocators):
            pages = [allocator.find(name) for name in names[self._first(group, len(names)) :]]
            num_held.append(sum(page is not None and not allocator.is_idle(page) for page in pages))
        return KnownPrefix(names, num_held)

    def _first(self, group: int, num_names: int) -> int:
        """The first block whose page in a group the token after `num_names` blocks sees."""
        return self.pages.groups[group].first_seen(num_names * PAGE_TOKENS)

    def _whole(self, names: list[bytes]) -> int:
        """How many of the first blocks are known in all groups without a window."""
        count = len(names)
        for number, group in enumerate(self.pages.groups):
            if not group.window:
                count = next((i for i in range(count) if not self._has_page(number, names[i])), count)
        return count

    def _seen(self, names: list[bytes], num_names: int) -> int:
        """The most blocks, up to `num_names`, after which the next token sees only known pages in the groups with a
        window."""
        windows = [number for number, group in enumerate(self.pages.groups) if group.window]
        while num_names:
            seen = (
                (group, i) for group in windows for i in range(num_names - 1, self._first(group, num_names) - 1, -1)
            )
            gap = next((i for group, i in seen if not self._has_page(group, names[i])), None)
            if gap is None:
                return num_names
            num_names = gap  # a shorter prefix that ends after the gap needs the missing page, too
        return 0

    def stops(self, request: Request) -> tuple[int, int]:
        """Positions from which other requests may go on: the end of the last whole block of a prompt before its last
        token, and the end of the request's own known prefix."""
        return (len(request.prompt_ids) - 1) // PAGE_TOKENS * PAGE_TOKENS, request.prefix.known_end

    def _has_page(self, group: int, name: bytes) -> bool:
        if self.pages.allocators[group].find(name) is not None:
            return True
        return self.disk is not None and self.disk.has(page_kind(group), name)

    def _has_state(self, states: StateStore, name: bytes) -> bool:
        return name in states or (self.disk is not None and self.disk.has("state", name))

    def attach(self, request: Request, known: KnownPrefix) -> None:
        """Gives a request, which has a slot and no pages, the pages and the state of its known prefix."""
        while known.names and not self._load(request, known.names):
            again = self.find(request)  # an entry on disk was damaged, or another process removed it
            known = again if len(again.names) < len(known.names) else self._known_prefix([])
        request.prefix.num_named, request.num_computed = len(known.names), PAGE_TOKENS * len(known.names)
        if request.num_preemptions:
            self.counts.recovered_tokens += request.num_computed
        else:
            request.num_cached = min(request.num_computed, len(request.prompt_ids))
            self.counts.query_tokens += request.num_tokens
            self.counts.hit_tokens += request.num_computed

    def _load(self, request: Request, names: list[bytes]) -> bool:
        """Gives a request the state and the pages that the token after these blocks needs; False, and no page, if one
        of them cannot be loaded after all."""
        if self.states is not None and not self._load_state(self.states, request.running_slot, names):
            return False
        firsts = [self._first(group, len(names)) for group in range(len(self.pages.groups))]
        loaded = [self._load_pages(group, names[first:]) for group, first in enumerate(firsts)]
        for allocator, pages in zip(self.pages.allocators, loaded, strict=True):
            if None in loaded:
                allocator.give_back(pages or [])
        if None in loaded:
            return False
        request.pages = [Held(first, pages or []) for first, pages in zip(firsts, loaded, strict=True)]
        return True

    def _load_pages(self, group: int, names: list[bytes]) -> list[int] | None:
        """Holds a group's pages of these names and returns them; None, and no page held, if one cannot be loaded."""
        allocator = self.pages.allocators[group]
        # pages in memory are held first: taking pages for those on disk may evict a page that nobody holds
        held = [allocator.find(name) for name in names]
        for page in held:
            if page is not None:
                allocator.share(page)
        loaded = [page if page is not None else self._load_page(group, n) for page, n in zip(held, names, strict=True)]
        pages = [page for page in loaded if page is not None]
        if len(pages) == len(loaded):
            return pages
        allocator.give_back(pages)
        return None

    def _load_page(self, group: int, name: bytes) -> int | None:
        """A new page with the bytes that the disk store has under a name; None if they are damaged or missing."""
        allocator = self.pages.allocators[group]
        page = allocator.take(1)
        data = self.disk.load(page_kind(group), name) if page and self.disk is not None else None
        if page is None or data is None:
            allocator.give_back(page or [])
            return None
        self.memory.write_page(group, page[0], data)
        allocator.name(page[0], name)
        return page[0]

    def _load_state(self, states: StateStore, slot: int, names: list[bytes]) -> bool:
        """Writes the state after the blocks of these names into a slot; False if it is damaged or missing."""
        name = names[-1]
        data = states.get(name)
        if data is None:
            data = self.disk.load("state", name) if self.disk is not None else None
            if data is None:
                return False
            states.put(name, functools.partial(_write, data))
        self.memory.write_state(slot, PAGE_TOKENS * len(names), data)
        return True

    # ------------------------------------------------------------ which request computes a block first

    def enter(self, request: Request) -> None:
        """A request begins to compute: other requests with the same prefix wait for its blocks rather than compute them
        again."""
        names = self._usable(request)
        ends = range(request.num_computed + PAGE_TOKENS, len(names) * PAGE_TOKENS + 1, PAGE_TOKENS)
        ends = [end for end in ends if self.states is None or self._is_stop(request, end)]
        leads = [names[end // PAGE_TOKENS - 1] for end in ends]
        request.prefix.leads = [name for name in leads if self._awaited.setdefault(name, request) is request]

    def is_being_computed(self, request: Request) -> bool:
        """Whether a running request of the same or a more urgent priority is computing a part of a request's prefix."""
        if not self._awaited:
            return False
        state = request.prefix
        if self._is_led(request, state.awaits):  # mostly the block that was awaited in the step before
            return True
        # the last of the request's blocks that is being computed will be computed last
        state.awaits = next((name for name in reversed(self._usable(request)) if self._is_led(request, name)), None)
        return state.awaits is not None

    def _is_led(self, request: Request, name: bytes | None) -> bool:
        """Whether a running request of the same or a more urgent priority is computing a block."""
        leader = None if name is None else self._awaited.get(name)
        return leader is not None and leader.priority <= request.priority

    def leave(self, request: Request) -> None:
        """A request ends or is preempted: no other request waits for it any more, and its newest state goes to disk."""
        for name in request.prefix.leads:
            if self._awaited.get(name) is request:
                del self._awaited[name]
        newest = request.prefix.newest_state
        if self.disk is not None and self.states is not None and newest is not None and newest in self.states:
            self.disk.save("state", newest, functools.partial(_copy, self.states, newest))
        request.prefix.leads = []

    def forget(self, request: Request) -> None:
        """A request's blocks hold wrong numbers: no request finds them again, in memory or on disk."""
        for name in request.prefix.block_names:
            self.pages.forget(name)
            if self.states is not None:
                self.states.drop(name)
            if self.disk is not None:
                for kind in (*map(page_kind, range(len(self.pages.groups))), "state"):
                    self.disk.forget(kind, name)

    # ------------------------------------------------------------ keeping

    def cut(self, request: Request, num_tokens: int) -> int:
        """How many of a step's `num_tokens` tokens end at or before the next position where the state is to be kept."""
        if self.states is None or num_tokens < 2:
            return num_tokens
        start = request.num_computed
        stops = {(start // self.state_every + 1) * self.state_every, self._prompt_stop(request), request.prefix.branch}
        return min([num_tokens, *(stop - start for stop in stops if stop is not None and stop > start)])

    def _prompt_stop(self, request: Request) -> int | None:
        """The end of the last whole block of a prompt before its last token; None if its state is not worth the step
        that has to end there."""
        end = (len(request.prompt_ids) - 1) // PAGE_TOKENS * PAGE_TOKENS
        return end if request.params.n > 1 or (end >= self.prompt_state_from and self._pays(end)) else None

    def _pays(self, end: int) -> bool:
        """Whether a state after `end` tokens is far enough from the last multiple of state_every to be kept."""
        return end % self.state_every >= self.state_every // 4

    def _is_stop(self, request: Request, end: int) -> bool:
        """Whether the state after `end` tokens is worth keeping until room is needed."""
        num_prompt = len(request.prompt_ids)
        return end % self.state_every == 0 or end in (self._prompt_stop(request), request.prefix.branch, num_prompt)

    def computed(self, request: Request) -> None:
        """After a step: names the pages of the blocks that it filled, and keeps the state if the step ended a block at
        which states are kept."""
        count = request.num_computed // PAGE_TOKENS
        names = self.names(request, count)
        for number in range(request.prefix.num_named, count):
            name = names[number]
            self.pages.name(request.pages, number, name)
            if self._awaited.get(name) is request:
                del self._awaited[name]
            if self.disk is not None:
                self._save(self.disk, request.pages, number, name)
        request.prefix.num_named = count
        if self.states is not None and request.num_computed == count * PAGE_TOKENS:
            self._keep_state(self.states, request, names[-1])

    def _save(self, disk: DiskStore, pages: Sequence[Held], number: int, name: bytes) -> None:
        """Saves a request's page of a number to disk, in every group."""
        for group, held in enumerate(pages):
            read = functools.partial(self.memory.read_page, group, held.ids[number - held.first])
            disk.save(page_kind(group), name, read)

    def _keep_state(self, states: StateStore, request: Request, name: bytes) -> None:
        """Keeps a request's state after its computed tokens, if states are kept there: until room is needed, or within
        an answer until the next one."""
        end = request.num_computed
        is_lasting = self._is_stop(request, end)
        if not is_lasting and (end < len(request.prompt_ids) or end % (self.state_every // 4)):
            return
        self.counts.kept_states += 1
        states.put(name, functools.partial(self.memory.read_state, request.running_slot, end, request.num_pending))
        if is_lasting and self.disk is not None:
            self.disk.save("state", name, functools.partial(_copy, states, name))
        if end > len(request.prompt_ids):
            if request.prefix.newest_state is not None:
                states.drop(request.prefix.newest_state)
            request.prefix.newest_state = None if is_lasting else name
