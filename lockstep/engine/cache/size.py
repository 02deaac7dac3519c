"""How many tokens a context may have, and how many pages the KV cache gets, by this machine's memory. Neither changes a
bit of an answer."""

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
from lockstep.ops.elementwise.embed import Embed, MappedEmbed
from lockstep.ops.integer.code_weights import FORMAT as CODES
from lockstep.ops.rewrite import verifying
from lockstep.runtime.program import Program, Weight
from lockstep.weights.tensor import stored_shape

if TYPE_CHECKING:
    from lockstep.engine.engine import EngineOptions
    from lockstep.engine.model import Model

SHARE = 2  # one half of the memory that is free beside the weights may become KV cache
CACHE_BYTES = 2 << 30  # of KV cache for many requests and prefixes; a single long context may take more
LEAST_CONTEXT = 4096  # tokens, however little memory is free: pages that are never used take none
CGROUPS = Path("/sys/fs/cgroup")
# a limit on memory and what counts against it, in the folder of a control group, of its second and first version
CGROUP_FILES = (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes"))


@dataclass(frozen=True)
class ContextSize:
    """The length of a context, and the limit that keeps it below the model's own: "memory", "kv_tokens", "max_context",
    "positions" (MAX_POSITIONS, unless max_context asks for more) or None."""

    num_tokens: int
    limit: str | None = None


@dataclass(frozen=True)
class Needs:
    """Bytes that a model and its draft model (if any; it has as many pages) take. weights: of both. pages: {window: one
    page of KV cache over all layers of this window}, 0: layers without a window. request: of one request, beside its
    pages. has_states: whether the model has recurrent states, which the prefix cache keeps."""

    weights: int
    pages: Mapping[int, int]
    request: int
    has_states: bool


def needs(model: "Model", options: "EngineOptions", draft: "Model | None" = None) -> Needs:
    """The Needs of a model with EngineOptions, and of its draft model."""
    programs = [model.recorded, *([model.recorded_mtp] if model.drafts_by_mtp(options.speculate) else [])]
    of_page = Counter[int]()
    for program in programs:
        of_page.update(page_bytes(program))
    of_model = Needs(
        weight_bytes(*programs),
        of_page,
        request_bytes(model.recorded, options.num_drafts),
        request_bytes(model.recorded, 0) > 0,
    )
    if draft is None:
        return of_model
    of_draft = needs(draft, replace(options, speculate="off"))
    return Needs(
        of_model.weights + of_draft.weights,
        Counter(of_model.pages) + Counter(of_draft.pages),
        of_model.request + SLOTS * of_draft.request,
        of_model.has_states,
    )


def page_bytes(program: Program) -> Mapping[int, int]:
    """{window: bytes of one page over all layers of this window}."""
    num_bytes = Counter[int]()
    for cache in program.caches:
        if cache.kind == "pages":
            num_bytes[cache.window] += cache.bytes_each
    return num_bytes


def page_groups(program: Program, num_pages: int, options: "EngineOptions") -> tuple[PageGroup, ...]:
    """The groups of pages of a program, where the layers without a window have num_pages pages."""
    return tuple(PageGroup(_group_pages(w, num_pages, options), w) for w in program.windows() or [0])


def _group_pages(window: int, num_pages: int, options: "EngineOptions") -> int:
    """How many pages the layers of a window have: as many as max_requests requests hold while they decode, drafts
    included, and a step of one prompt beside them; never more than the layers without a window."""
    if not window:
        return num_pages
    decoding = options.num_slots * most_pages(window + options.num_drafts)
    return min(num_pages, decoding + pages_for(options.max_step_tokens - 1))


def cache_bytes(needed: Needs, num_pages: int, options: "EngineOptions") -> int:
    """Bytes of the pages of all groups, where the layers without a window have num_pages pages."""
    return sum(each * _group_pages(window, num_pages, options) for window, each in needed.pages.items())


def context_size(
    model: "Model", options: "EngineOptions", max_context: int | None = None, draft: "Model | None" = None
) -> ContextSize:
    """The ContextSize of a model with EngineOptions: the model's own, as far as max_context and kv_tokens allow; where
    neither is given, as far as its KV cache fits in memory.

    max_context: with which the model was loaded; None: with all its positions, up to MAX_POSITIONS. draft: its draft
    model.
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
    return min(bounds, key=lambda bound: bound.num_tokens)  # the first of equal bounds: raising a later one helps not


def num_pages(model: "Model", options: "EngineOptions", draft: "Model | None" = None) -> int:
    """How many pages of KV cache layers without a window get: for kv_tokens, or by default for max_requests full
    contexts, up to CACHE_BYTES and to what fits in memory, but at least for one full context. ValueError for kv_tokens
    that take more than this machine's memory.

    draft: the model's draft model.
    """
    per_context, needed = pages_for(model.max_context), needs(model, options, draft)
    if options.kv_tokens is None:
        most = min(CACHE_BYTES, _free_for_pages(needed, options))
        return max(per_context, min(per_context * options.num_slots, _pages_in(needed, most, options)))
    count, memory = pages_for(options.kv_tokens), _physical_bytes()
    of_cache, of_requests = cache_bytes(needed, count, options), options.num_slots * needed.request
    if of_cache + of_requests > memory:
        beside = f", of which {options.num_slots} requests take {of_requests / 2**30:.1f}" if of_requests else ""
        enough = _pages_in(needed, max(0, memory - of_requests), options) * PAGE_TOKENS
        raise ValueError(
            f"kv_tokens: {options.kv_tokens} tokens take {of_cache / 2**30:.1f} GiB; this machine has "
            f"{memory / 2**30:.1f}{beside}, enough for {enough}"
        )
    return count


def _pages_in(needed: Needs, num_bytes: int, options: "EngineOptions") -> int:
    """How many pages layers without a window get where the pages of all groups together take num_bytes."""
    counts = range(num_bytes + 1)  # num_bytes pages where no page takes any byte
    return bisect_right(counts, num_bytes, key=lambda count: cache_bytes(needed, count, options)) - 1


def request_bytes(program: Program, num_drafts: int) -> int:
    """Bytes of one request beside its pages, over all layers: its recurrent state, and the records from which up to
    num_drafts drafts of a step are absorbed or dropped."""
    run = verifying(program, num_drafts) if num_drafts else program
    return sum(c.bytes_each for c in run.caches if c.kind != "pages")


def _free_for_pages(needed: Needs, options: "EngineOptions") -> int:
    """Bytes that KV pages may take beside the weights, the requests' states and the kept states."""
    of_states = options.state_bytes if needed.has_states and options.prefix_cache else 0
    of_engine = (available_bytes() - needed.weights) // SHARE // options.num_engines  # which share their weights
    return max(0, of_engine - options.num_slots * needed.request - of_states)


def weight_bytes(*programs: Program) -> int:
    """Bytes of the weights of programs in memory; a weight that programs share counts once. A table of embeddings and
    the head that is made from the same tensor count as two; a table that stays in its file does not count."""
    ops = [op for program in programs for op in program.ops if not isinstance(op, MappedEmbed)]
    weights = {(isinstance(op, Embed), w.name): w for op in reversed(ops) for w in op.inputs if isinstance(w, Weight)}
    return sum(map(_stored_bytes, weights.values()))


def _stored_bytes(weight: Weight) -> int:
    """Bytes of a weight in its format; of integer codes without their scales, which take little."""
    if weight.format == CODES:
        return int(np.prod(weight.shape))
    shape, dtype = stored_shape(weight.format, tuple(weight.shape))
    return int(np.prod(shape)) * dtype.itemsize


# ---------------------------------------------------------------- the machine


def available_bytes() -> int:
    """Memory that this process may still take without pushing others' out: free, or a cache of files."""
    return max(0, min([_free_bytes(), *_cgroup_bytes(), *_address_bytes()]))


def _physical_bytes() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGESIZE")


def _free_bytes() -> int:
    """The system's own estimate of available memory; half of the physical memory where it gives none."""
    meminfo = _numbers("/proc/meminfo")
    free = meminfo.get("MemAvailable", _physical_bytes() // 2048) << 10
    if file_text("/proc/sys/vm/overcommit_memory") == "2":  # the system refuses memory even before it is touched
        free = min(free, (meminfo["CommitLimit"] - meminfo["Committed_AS"]) << 10)
    return free


def _cgroup_bytes() -> Iterator[int]:
    """Bytes that the control groups of this process leave, one number for each limit. Memory that caches files counts
    as free."""
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
                    stat = _numbers(folder / "memory.stat")
                    yield int(most) - int(taken) + stat.get("total_inactive_file", stat.get("inactive_file", 0))


def _address_bytes() -> Iterator[int]:
    """Bytes that `ulimit -v` leaves, if there is such a limit."""
    try:
        import resource
    except ImportError:
        return
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    taken = file_text("/proc/self/statm").split()[:1]
    if limit != resource.RLIM_INFINITY and taken:
        yield limit - int(taken[0]) * os.sysconf("SC_PAGESIZE")


def file_text(path: str | Path) -> str:
    """The text of one of the system's files; "" where the file cannot be read."""
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def _numbers(path: str | Path) -> dict[str, int]:
    """A file of lines such as "name: 12 kB" as {name: 12}."""
    rows = [line.replace(":", " ").split() for line in file_text(path).splitlines()]
    return {row[0]: int(row[1]) for row in rows if len(row) > 1 and row[1].isdigit()}
