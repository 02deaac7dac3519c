"""How many tokens a context may have and a KV cache holds, by this machine's memory. It changes no bit of an answer."""

import os
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lockstep.engine.cache.pages import PageGroup, most_pages, pages_for
from lockstep.engine.speculation.draft_model import SLOTS
from lockstep.ops.attention.kv_cache import PAGE_TOKENS
from lockstep.ops.attention.rope import MAX_POSITIONS
from lockstep.ops.elementwise.embed import Embed
from lockstep.ops.integer.code_weights import FORMAT as CODES
from lockstep.ops.rewrite import verifying
from lockstep.runtime.program import Program, Weight
from lockstep.weights.tensor import stored_shape

if TYPE_CHECKING:
    from lockstep.engine.engine import EngineOptions
    from lockstep.engine.model import Model

SHARE = 2  # one half of the memory that is free beside the weights may become KV cache
CACHE_BYTES = 2 << 30  # what serves many requests and keeps prefixes; a single long context may take more
LEAST_CONTEXT = 4096  # whatever is free: what nobody uses takes no memory
CGROUPS = Path("/sys/fs/cgroup")
# a limit on memory and what counts against it, in the folder of a control group, of its second and first version
CGROUP_FILES = (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes"))


@dataclass(frozen=True)
class ContextSize:
    """A context, and what keeps it below the model's own: "memory", "kv_tokens", "max_context", "positions" (more than
    MAX_POSITIONS must be asked for) or None."""

    num_tokens: int
    limit: str | None = None


@dataclass(frozen=True)
class Needs:
    """Bytes that a model takes, and a smaller one that drafts for it, which has as many pages: weights; {window: a page
    of KV cache over all layers that see so many keys}, 0: that see all; what a request has beside pages; whether there
    are recurrent states to be kept."""

    weights: int
    pages: Mapping[int, int]
    request: int
    has_states: bool


def needs(model: "Model", options: "EngineOptions", draft: "Model | None" = None) -> Needs:
    """The Needs of a model with EngineOptions, and of the model that drafts for it."""
    programs = [model.recorded, *([model.recorded_mtp] if model.drafts_by_mtp(options.speculate) else [])]
    of_page = Counter[int]()
    for program in programs:
        of_page.update(page_bytes(program))
    made = Needs(
        weight_bytes(*programs),
        of_page,
        request_bytes(model.recorded, options.num_drafts),
        request_bytes(model.recorded, 0) > 0,
    )
    if draft is None:
        return made
    own = needs(draft, replace(options, speculate="off"))
    request = made.request + SLOTS * own.request
    return Needs(made.weights + own.weights, Counter(made.pages) + Counter(own.pages), request, made.has_states)


def page_bytes(program: Program) -> Mapping[int, int]:
    """{window: bytes of a page over all layers that see so many keys}."""
    made = Counter[int]()
    for cache in program.caches:
        if cache.kind == "pages":
            made[cache.window] += cache.bytes_each
    return made


def page_groups(program: Program, num_pages: int, options: "EngineOptions") -> tuple[PageGroup, ...]:
    """The pages of each group of a program, where layers that see all keys have num_pages."""
    return tuple(PageGroup(_group_pages(w, num_pages, options), w) for w in program.windows() or [0])


def _group_pages(window: int, num_pages: int, options: "EngineOptions") -> int:
    """How many pages the layers of a window have: what as many requests as may run hold while they decode, drafts
    included, and what a step of one prompt takes beside that; never more than the layers that see all keys."""
    if not window:
        return num_pages
    decoding = options.max_requests * most_pages(window + options.num_drafts)
    return min(num_pages, decoding + pages_for(options.max_step_tokens - 1))


def cache_bytes(needed: Needs, num_pages: int, options: "EngineOptions") -> int:
    """Bytes of the pages of all groups, where layers that see all keys have num_pages."""
    return sum(each * _group_pages(window, num_pages, options) for window, each in needed.pages.items())


def context_size(
    model: "Model", options: "EngineOptions", max_context: int | None = None, draft: "Model | None" = None
) -> ContextSize:
    """The ContextSize of a model with EngineOptions: the model's own, as far as max_context and kv_tokens allow; where
    neither is given, as far as memory holds its KV cache.

    max_context: what the model was loaded with. None: for all its positions, up to MAX_POSITIONS. draft: a smaller
    model that drafts for it.
    """
    bounds = [ContextSize(model.config.max_positions)]
    bounds.append(
        ContextSize(MAX_POSITIONS, "positions") if max_context is None else ContextSize(max_context, "max_context")
    )
    if options.kv_tokens is not None:
        bounds.append(ContextSize(-(-options.kv_tokens // PAGE_TOKENS) * PAGE_TOKENS, "kv_tokens"))
    elif max_context is None:
        needed = needs(model, options, draft)
        held = _pages_in(needed, _free_for_pages(needed, options), options) * PAGE_TOKENS
        bounds.append(ContextSize(max(LEAST_CONTEXT, held), "memory"))
    return min(bounds, key=lambda bound: bound.num_tokens)  # the first of equal ones: more of the others gives no more


def num_pages(model: "Model", options: "EngineOptions", draft: "Model | None" = None) -> int:
    """Pages of KV cache, of layers that see all keys, for these options: what max_requests full contexts need, up to
    CACHE_BYTES and to what memory holds, and those of one context in any case. ValueError for kv_tokens that are more
    than this machine's memory.

    draft: a smaller model that drafts for this one.
    """
    a_request, needed = -(-model.max_context // PAGE_TOKENS), needs(model, options, draft)
    if options.kv_tokens is None:
        most = min(CACHE_BYTES, _free_for_pages(needed, options))
        return max(a_request, min(a_request * options.max_requests, _pages_in(needed, most, options)))
    asked, memory = -(-options.kv_tokens // PAGE_TOKENS), _physical_bytes()
    taken, others = cache_bytes(needed, asked, options), options.max_requests * needed.request
    if taken + others > memory:
        beside = f", of which {options.max_requests} requests take {others / 2**30:.1f}" if others else ""
        enough = _pages_in(needed, max(0, memory - others), options) * PAGE_TOKENS
        raise ValueError(
            f"kv_tokens: {options.kv_tokens} tokens take {taken / 2**30:.1f} GiB; this machine has "
            f"{memory / 2**30:.1f}{beside}, enough for {enough}"
        )
    return asked


def _pages_in(needed: Needs, num_bytes: int, options: "EngineOptions") -> int:
    """How many pages layers that see all keys have where all groups together take so many bytes."""
    counts = range(num_bytes + 1)  # that many, where there are no such layers
    return bisect_right(counts, num_bytes, key=lambda count: cache_bytes(needed, count, options)) - 1


def request_bytes(program: Program, num_drafts: int) -> int:
    """Bytes that a request has beside its pages, over all layers: its recurrent state, and what lets up to num_drafts
    drafts of a step be forgotten."""
    run = verifying(program, num_drafts) if num_drafts else program
    return sum(c.bytes_each for c in run.caches if c.kind != "pages")


def _free_for_pages(needed: Needs, options: "EngineOptions") -> int:
    """Bytes that KV pages may take beside weights, what requests have beside them, and kept states."""
    kept = options.state_bytes if needed.has_states and options.prefix_cache else 0
    return max(0, (available_bytes() - needed.weights) // SHARE - options.max_requests * needed.request - kept)


def weight_bytes(*programs: Program) -> int:
    """Bytes of the weights of programs in memory, of those that they share once. A table of embeddings is there beside
    the head that is made of it."""
    ops = [op for program in programs for op in program.ops]
    weights = {(isinstance(op, Embed), w.name): w for op in reversed(ops) for w in op.inputs if isinstance(w, Weight)}
    return sum(map(_stored_bytes, weights.values()))


def _stored_bytes(weight: Weight) -> int:
    """Bytes of a weight in its format; of codes those of the codes, beside which scales are few."""
    if weight.format == CODES:
        return int(np.prod(weight.shape))
    shape, dtype = stored_shape(weight.format, tuple(weight.shape))
    return int(np.prod(shape)) * dtype.itemsize


# ---------------------------------------------------------------- the machine


def available_bytes() -> int:
    """Memory that this process may still take without others being pushed out: free, or holding files."""
    return max(0, min([_free_bytes(), *_cgroup_bytes(), *_address_bytes()]))


def _physical_bytes() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _free_bytes() -> int:
    """The system's own estimate; half of the memory where it gives none."""
    found = _numbers("/proc/meminfo")
    free = found.get("MemAvailable", _physical_bytes() // 2048) << 10
    if file_text("/proc/sys/vm/overcommit_memory") == "2":  # memory is refused even where nobody touches it
        free = min(free, (found["CommitLimit"] - found["Committed_AS"]) << 10)
    return free


def _cgroup_bytes() -> Iterator[int]:
    """What the control groups of this process leave, one number for each limit. Pages that only hold files count as
    free."""
    for line in file_text("/proc/self/cgroup").splitlines():
        _, names, path = line.split(":", 2)
        root = CGROUPS / "memory" if "memory" in names.split(",") else CGROUPS
        here = root / path.lstrip("/")
        for folder in (here, *here.parents):
            if not folder.is_relative_to(root):
                break
            for limit, used in CGROUP_FILES:
                most, taken = file_text(folder / limit), file_text(folder / used)
                if most.isdigit() and taken.isdigit():
                    known = _numbers(folder / "memory.stat")
                    yield int(most) - int(taken) + known.get("total_inactive_file", known.get("inactive_file", 0))


def _address_bytes() -> Iterator[int]:
    """What `ulimit -v` leaves, if there is such a limit."""
    try:
        import resource
    except ImportError:
        return
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    taken = file_text("/proc/self/statm").split()[:1]
    if limit != resource.RLIM_INFINITY and taken:
        yield limit - int(taken[0]) * os.sysconf("SC_PAGE_SIZE")


def file_text(path: str | Path) -> str:
    """The text of one of the system's files; "" where there is none."""
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def _numbers(path: str | Path) -> dict[str, int]:
    """A file of lines such as "name: 12 kB" as {name: 12}."""
    rows = [line.replace(":", " ").split() for line in file_text(path).splitlines()]
    return {row[0]: int(row[1]) for row in rows if len(row) > 1 and row[1].isdigit()}
