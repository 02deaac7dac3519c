"""The prefix cache: what other requests computed for the same first tokens is found again, and gives the same bits.

Tokens are named in blocks of one page (64): a block's name is the SHA-256 of the name before it and of its token
ids, and the first name is made of the model's identity and the request's salt. So a name stands for all tokens from
the first one on, for one model and one salt, and a page of keys and values can be shared under it, in each group of
layers. Layers with a window need the pages that the next token sees, and none before them: a prefix is known where all
pages of the other layers are, and the last ones of these. What a request leaves behind its window is the first to be
forgotten, but for two places from which others go on: the end of its prompt, and of what was known of it.

Layers with recurrent state need more: the state after the last shared token. States are kept (`StateStore`) where it
pays: every `state_every` tokens, at the last whole block of a prompt of at least `prompt_state_from` tokens, where two
requests were seen to part, and at the newest quarter of `state_every` of an answer. A prompt's steps are cut there, so
that the state can be copied. A prefix of such a model is as long as its pages are known and its state is kept.

At least the last known token is always computed: its logits are needed.
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

LAYOUT = 1  # of pages and states as bytes; a change of their layout raises it


def model_identity(model: Model, numerics: int) -> bytes:
    """Names all that a block's bytes depend on besides its tokens and the weights: formats, arithmetic and layout.

    It is enough where there are no other weights: in one process. What outlives it is named by the content, too.
    """
    caches = [(c.name, c.kind, c.dtype, c.shape, *([c.window] if c.window else [])) for c in model.recorded.caches]
    known = LAYOUT, numerics, model.weights, model.kv_dtype, PAGE_TOKENS, caches, *([model.plan] if model.plan else ())
    return hashlib.sha256(repr(known).encode()).digest()


def first_name(identity: bytes, salt: str) -> bytes:
    """The name that the first block's name is made from."""
    return hashlib.sha256(identity + salt.encode("utf-8", "surrogatepass")).digest()


def block_name(before: bytes, token_ids: Sequence[int]) -> bytes:
    """The name of a block of tokens that follows the block named `before`."""
    return hashlib.sha256(before + array("i", token_ids).tobytes()).digest()


@dataclass(frozen=True)
class Found:
    """What is known of a request's prefix: names of its blocks; of each group, how many of the pages that are needed of
    them are held by others."""

    names: list[bytes]
    num_held: list[int]


@dataclass
class Counts:
    """Tokens asked for and found, over first admissions; states kept."""

    query_tokens: int = 0
    hit_tokens: int = 0
    recovered_tokens: int = 0  # found by requests that had been preempted
    kept_states: int = 0


def _write(data: np.ndarray, out: np.ndarray) -> None:
    np.copyto(out, data)


def _copy(states: StateStore, name: bytes, out: np.ndarray) -> None:
    """Copies a state that is there."""
    data = states.get(name)
    assert data is not None, name
    np.copyto(out, data)


def page_kind(group: int) -> str:
    """What a group's pages are called on disk."""
    return f"page{group}" if group else "page"


class PrefixCache:
    """Finds and keeps computed prefixes.

    pages: the PagePool. memory: copies pages and states. states: the StateStore; None where no layer has a state.
    disk: a DiskStore behind memory, or None.
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
        """Counts of this cache, of its states and of its disk: {name: number}."""
        made = dict(vars(self.counts))
        if self.states is not None:
            made |= dict(states=len(self.states), states_evicted=self.states.num_evicted)
        if self.disk is not None:
            made |= {f"disk_{name}": count for name, count in vars(self.disk.counts).items()}
        return made

    # ------------------------------------------------------------ names

    def names(self, request: Request, count: int) -> list[bytes]:
        """Names of a request's first `count` blocks, which must be known."""
        made = request.block_names
        while len(made) < count:
            start = len(made) * PAGE_TOKENS
            before = made[-1] if made else first_name(self.identity, request.cache_salt)
            made.append(block_name(before, request.token_ids(start, start + PAGE_TOKENS)))
        return made[:count]

    def _usable(self, request: Request) -> list[bytes]:
        """Names of the blocks that may be taken from the cache: all whole ones before the last token."""
        return self.names(request, (request.num_tokens - 1) // PAGE_TOKENS if request.reuses_prefix else 0)

    # ------------------------------------------------------------ finding

    def find(self, request: Request) -> Found:
        """The longest known prefix of a request."""
        names = self._usable(request)
        whole = self._whole(names)
        count = num_pages = self._seen(names, whole)
        request.known = whole * PAGE_TOKENS
        if self.states is not None:
            while count and not self._has_state(self.states, names[count - 1]):
                count = self._seen(names, count - 1)
            request.branch = num_pages * PAGE_TOKENS if self._pays(num_pages * PAGE_TOKENS) else 0
        return self._found(names[:count])

    def _found(self, names: list[bytes]) -> Found:
        """The first blocks of a request that these are the names of."""
        num_held = []
        for group, allocator in enumerate(self.pages.allocators):
            pages = [allocator.find(name) for name in names[self._first(group, len(names)) :]]
            num_held.append(sum(page is not None and not allocator.is_idle(page) for page in pages))
        return Found(names, num_held)

    def _first(self, group: int, count: int) -> int:
        """The first block of which a group's page is seen by the token after so many blocks."""
        return self.pages.groups[group].first_seen(count * PAGE_TOKENS)

    def _whole(self, names: list[bytes]) -> int:
        """How many of the first blocks are known in the groups that keep all pages."""
        count = len(names)
        for number, group in enumerate(self.pages.groups):
            if not group.window:
                count = next((i for i in range(count) if not self._has_page(number, names[i])), count)
        return count

    def _seen(self, names: list[bytes], count: int) -> int:
        """The most blocks, up to `count`, after which all that a token sees is known in the groups with a window."""
        windows = [number for number, group in enumerate(self.pages.groups) if group.window]
        while count:
            seen = ((group, i) for group in windows for i in range(count - 1, self._first(group, count) - 1, -1))
            gap = next((i for group, i in seen if not self._has_page(group, names[i])), None)
            if gap is None:
                return count
            count = gap  # a prefix that ends after it, and is shorter, needs that block, too
        return 0

    def stops(self, request: Request) -> tuple[int, int]:
        """Positions from which others may go on: the end of the last whole block of a prompt before its last token, and
        of the last block that was known when the request came."""
        return (len(request.prompt_ids) - 1) // PAGE_TOKENS * PAGE_TOKENS, request.known

    def _has_page(self, group: int, name: bytes) -> bool:
        if self.pages.allocators[group].find(name) is not None:
            return True
        return self.disk is not None and self.disk.has(page_kind(group), name)

    def _has_state(self, states: StateStore, name: bytes) -> bool:
        return name in states or (self.disk is not None and self.disk.has("state", name))

    def attach(self, request: Request, found: Found) -> None:
        """Gives a request, which has a slot and no pages, the pages and the state of its known prefix."""
        while found.names and not self._load(request, found.names):
            again = self.find(request)  # an entry on disk was damaged, and is gone
            found = again if len(again.names) < len(found.names) else self._found([])
        request.num_named, request.num_computed = len(found.names), PAGE_TOKENS * len(found.names)
        if request.num_preemptions:
            self.counts.recovered_tokens += request.num_computed
        else:
            request.num_cached = request.num_computed
            self.counts.query_tokens += request.num_tokens
            self.counts.hit_tokens += request.num_computed

    def _load(self, request: Request, names: list[bytes]) -> bool:
        """Gives a request the state and the pages that the token after these blocks needs; False, and no page, if a
        part of them is not there after all."""
        if self.states is not None and not self._load_state(self.states, request.running_slot, names):
            return False
        firsts = [self._first(group, len(names)) for group in range(len(self.pages.groups))]
        made = [self._load_pages(group, names[first:]) for group, first in enumerate(firsts)]
        for allocator, pages in zip(self.pages.allocators, made, strict=True):
            if None in made:
                allocator.give_back(pages or [])
        if None in made:
            return False
        request.pages = [Held(first, pages or []) for first, pages in zip(firsts, made, strict=True)]
        return True

    def _load_pages(self, group: int, names: list[bytes]) -> list[int] | None:
        """A group's pages of these names, held; None, and none held, if one is not there after all."""
        allocator = self.pages.allocators[group]
        # those in memory are held before pages are taken for those on disk, which may evict what nobody holds
        held = [allocator.find(name) for name in names]
        for page in held:
            if page is not None:
                allocator.share(page)
        made = [self._load_page(group, name) if page is None else page for page, name in zip(held, names, strict=True)]
        pages = [page for page in made if page is not None]
        if len(pages) == len(made):
            return pages
        allocator.give_back(pages)
        return None

    def _load_page(self, group: int, name: bytes) -> int | None:
        """A page with what the disk has for a name; None if that is damaged."""
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
        """Gives a slot the state after the blocks of these names; False if what was kept of it is damaged."""
        name = names[-1]
        data = states.get(name)
        if data is None:
            data = self.disk.load("state", name) if self.disk is not None else None
            if data is None:
                return False
            states.put(name, functools.partial(_write, data))
        self.memory.write_state(slot, PAGE_TOKENS * len(names), data)
        return True

    # ------------------------------------------------------------ who computes what

    def enter(self, request: Request) -> None:
        """A request begins to compute; others with the same prefix wait for its blocks rather than compute them too."""
        names = self._usable(request)
        ends = range(request.num_computed + PAGE_TOKENS, len(names) * PAGE_TOKENS + 1, PAGE_TOKENS)
        ends = [end for end in ends if self.states is None or self._is_stop(request, end)]
        request.leads = [names[end // PAGE_TOKENS - 1] for end in ends]
        request.leads = [name for name in request.leads if self._awaited.setdefault(name, request) is request]

    def is_being_computed(self, request: Request) -> bool:
        """Whether a request that goes before this one is at work on a part of this one's prefix."""
        if not self._awaited:
            return False
        if self._is_led(request, request.awaits):  # the answer of the step before, mostly
            return True
        # the last such block: it will be computed last
        request.awaits = next((n for n in reversed(self._usable(request)) if self._is_led(request, n)), None)
        return request.awaits is not None

    def _is_led(self, request: Request, name: bytes | None) -> bool:
        leader = None if name is None else self._awaited.get(name)
        return leader is not None and leader.priority <= request.priority

    def leave(self, request: Request) -> None:
        """A request ends or is preempted: nobody waits for it any more."""
        for name in request.leads:
            if self._awaited.get(name) is request:
                del self._awaited[name]
        newest = request.newest_state
        if self.disk is not None and self.states is not None and newest is not None and newest in self.states:
            self.disk.save("state", newest, functools.partial(_copy, self.states, newest))
        request.leads = []

    def forget(self, request: Request) -> None:
        """What a request's blocks hold is wrong: nobody finds them again, in memory or on disk."""
        for name in request.block_names:
            self.pages.forget(name)
            if self.states is not None:
                self.states.drop(name)
            if self.disk is not None:
                for kind in (*map(page_kind, range(len(self.pages.groups))), "state"):
                    self.disk.forget(kind, name)

    # ------------------------------------------------------------ keeping

    def cut(self, request: Request, count: int) -> int:
        """The largest part of a step of `count` tokens that does not run over a place where the state is kept."""
        if self.states is None or count < 2:
            return count
        start = request.num_computed
        stops = {(start // self.state_every + 1) * self.state_every, self._prompt_stop(request), request.branch}
        return min([count, *(stop - start for stop in stops if stop > start)])

    def _prompt_stop(self, request: Request) -> int:
        """The last whole block of a prompt before its last token, if its state is worth a step's end, or 0."""
        end = (len(request.prompt_ids) - 1) // PAGE_TOKENS * PAGE_TOKENS
        return end if request.params.n > 1 or (end >= self.prompt_state_from and self._pays(end)) else 0

    def _pays(self, end: int) -> bool:
        """Whether a state after `end` tokens is far enough from the one before it."""
        return end % self.state_every >= self.state_every // 4

    def _is_stop(self, request: Request, end: int) -> bool:
        """Whether the state after `end` tokens is worth keeping for good."""
        prompt = len(request.prompt_ids)
        return end % self.state_every == 0 or end in (self._prompt_stop(request), request.branch, prompt)

    def computed(self, request: Request) -> None:
        """After a step: names the blocks that it filled, and keeps the state where it ended on such a place."""
        count = request.num_computed // PAGE_TOKENS
        names = self.names(request, count)
        for number in range(request.num_named, count):
            name = names[number]
            self.pages.name(request.pages, number, name)
            if self._awaited.get(name) is request:
                del self._awaited[name]
            if self.disk is not None:
                self._save(self.disk, request.pages, number, name)
        request.num_named = count
        if self.states is not None and request.num_computed == count * PAGE_TOKENS:
            self._keep_state(self.states, request, names[-1])

    def _save(self, disk: DiskStore, pages: Sequence[Held], number: int, name: bytes) -> None:
        """Keeps a request's page of a number, in every group."""
        for group, held in enumerate(pages):
            read = functools.partial(self.memory.read_page, group, held.ids[number - held.first])
            disk.save(page_kind(group), name, read)

    def _keep_state(self, states: StateStore, request: Request, name: bytes) -> None:
        end = request.num_computed
        lasting = self._is_stop(request, end)
        if not lasting and (end < len(request.prompt_ids) or end % (self.state_every // 4)):
            return
        self.counts.kept_states += 1
        states.put(name, functools.partial(self.memory.read_state, request.running_slot, end, request.num_pending))
        if lasting and self.disk is not None:
            self.disk.save("state", name, functools.partial(_copy, states, name))
        if end > len(request.prompt_ids):
            if request.newest_state is not None:
                states.drop(request.newest_state)
            request.newest_state = None if lasting else name
