"""Parity: runs one prompt along every path, and compares each path bit for bit with one token at a time.

A path is a way of cutting the prompt into steps, a number of threads, and a number of other requests in the same steps.
Compared are the logits and hidden states of the last positions, the tokens sampled from them, and the prompt's content
of the cache: keys, values, states.
"""

import contextlib
import hashlib
import itertools
from dataclasses import dataclass

import numpy as np

from lockstep.engine.cache.pages import everywhere
from lockstep.engine.runner import Limits, Runner, Span
from lockstep.ops.attention.kv_cache import PAGE_TOKENS, by_position
from lockstep.runtime.operands import Operands
from lockstep.runtime.program import DTYPES, CacheArray, Tensor
from lockstep.runtime.threads import Team

AWKWARD = (1, 2, 3, 7, 15, 16, 17, 31, 33, 63, 64, 65, 127, 128, 129, 511, 512, 513, 1023, 1024, 1025, 2047, 2048, 2049)
CHUNKS = (1, 7, 64, 512)
LOGIT_BYTES = 64 << 20  # bytes of logits that are kept for comparison, per path
GREEDY = dict(temperature=0.0, top_p=1.0, min_p=0.0, top_k=0, seed=0, position=0)


@dataclass(frozen=True)
class Path:
    """A way to run a prompt. ends: positions at which its steps end; strangers: other requests in the same steps."""

    name: str
    ends: tuple[int, ...]
    threads: int
    strangers: int = 0


@dataclass(frozen=True)
class Outcome:
    """The results of a path: logits [rows, V] of the last positions, and digests of the logits, the tokens, the hidden
    states and each cache array."""

    logits: np.ndarray
    digests: dict[str, str]

    @property
    def digest(self):
        """One digest of everything."""
        return hashlib.sha256("".join(self.digests.values()).encode()).hexdigest()


@dataclass(frozen=True)
class Comparison:
    """A path against the reference. differing: names of results that differ ("logits", "tokens", "hidden", cache
    arrays)."""

    path: Path
    max_abs_diff: float
    argmax_agree: float
    digest: str
    differing: tuple[str, ...]

    @property
    def identical(self):
        return not self.differing


def chunked(length, size):
    """Ends of steps of at most `size` tokens."""
    return (*range(size, length, size), length)


def paths(length, max_threads):
    """Every path that parity runs for a prompt, the reference first."""
    made = [Path("one token at a time", chunked(length, 1), 1)]
    made += [Path(f"chunks of {c}", chunked(length, c), max_threads) for c in CHUNKS if c < length]
    made += [Path("whole", (length,), n) for n in sorted({1, 2, max_threads, 2 * max_threads})]
    made += [Path(f"cut after {p}", (p, length), max_threads) for p in AWKWARD if p < length]
    return [*made, Path("with 3 strangers", chunked(length, 17), max_threads, 3)]


def run_path(model, ids, path, swaps=None, num_rows=None):
    """Runs a path on fresh memory; returns its Outcome. num_rows: last positions to compare, by default as many as
    LOGIT_BYTES hold."""
    vocab_size = model.config.vocab_size
    others = [list(np.random.default_rng(i).integers(0, vocab_size, len(ids))) for i in range(path.strangers)]
    largest = max(b - a for a, b in itertools.pairwise((0, *path.ends)))
    pages = -(-len(ids) // PAGE_TOKENS)
    wanted = range(len(ids) - (num_rows or comparable_rows(model, len(ids))), len(ids))
    requests = 1 + path.strangers
    limits = Limits(largest * requests, requests, pages * requests, min(largest, len(wanted)) + requests)
    with contextlib.closing(Team(path.threads)) as team:
        runner, rows = Runner(model, team, limits, swaps), []
        choices, hidden = hashlib.sha256(), hashlib.sha256()
        for start, end in itertools.pairwise((0, *path.ends)):
            spans = [_span(o, i + 1, pages, start, end, ()) for i, o in enumerate(others)]
            spans.insert(len(spans) // 2, _span(ids, 0, pages, start, end, wanted))
            tokens, logprobs, logits = runner.step(spans)
            rows += [row.copy() for row in logits]
            for token, logprob in zip(tokens, logprobs, strict=True):
                choices.update(token.tobytes() + logprob.tobytes())
            hidden.update(runner.hidden(0, len(range(max(start, wanted.start), end))).tobytes())
        seen = dict(tokens=choices.hexdigest(), hidden=hidden.hexdigest())
        return _outcome(np.stack(rows), seen, runner, pages, len(ids))


def comparable_rows(model, length):
    """The number of last positions whose logits are kept for comparison."""
    return max(1, min(length, LOGIT_BYTES // (4 * model.config.vocab_size)))


def sampling(position):
    """Sampling of the token after a position: after odd positions it is sampled at random, after even ones greedily."""
    return {**GREEDY, **(dict(temperature=0.8, top_p=0.95) if position % 2 else {}), "position": position + 1}


def _span(ids, slot, pages, start, end, wanted):
    rows = [i - start for i in wanted if start <= i < end]
    sampled = {row: sampling(start + row) for row in rows}
    return Span(ids[start:end], start, everywhere(range(slot * pages, (slot + 1) * pages)), slot, sampled, rows)


def _outcome(logits, seen, runner, num_pages, num_tokens):
    caches = {
        c.name: hashlib.sha256(_cached(runner, c, num_pages, num_tokens).tobytes()).hexdigest()
        for c in runner.program.caches
    }
    return Outcome(logits, {"logits": hashlib.sha256(logits.tobytes()).hexdigest(), **seen, **caches})


def _cached(runner, cache, num_pages, num_tokens):
    """Request 0's part of a cache array, bf16 as uint16: [positions, width] of pages, [1, width] of a state."""
    memory = runner.caches[cache.name].view(DTYPES[cache.dtype]).reshape(-1, *cache.shape)
    if cache.kind == "state":
        return memory[:1].reshape(1, -1)
    # the unused slots of the last page do not count
    positions = by_position(memory[:num_pages, ..., None], cache.name.endswith("k_pages"))
    return np.ascontiguousarray(positions).reshape(num_pages * PAGE_TOKENS, -1)[:num_tokens]


def compare(reference, path, outcome):
    """The Comparison of a path's outcome with the reference's."""
    diff = np.abs(outcome.logits.astype(np.float64) - reference.logits)
    agree = float((outcome.logits.argmax(-1) == reference.logits.argmax(-1)).mean())
    differing = tuple(name for name, digest in outcome.digests.items() if digest != reference.digests[name])
    return Comparison(path, float(diff.max()), agree, outcome.digest, differing)


def run_parity(model, ids, max_threads, swaps=None):
    """Yields a Comparison for every path; the first is the reference with itself."""
    all_paths = paths(len(ids), max_threads)
    reference = run_path(model, ids, all_paths[0])
    yield compare(reference, all_paths[0], reference)
    for path in all_paths[1:]:
        yield compare(reference, path, run_path(model, ids, path, swaps))


@dataclass(frozen=True)
class Difference:
    """The first op whose output differs between two op tables. tensor: an activation, or a cache array that the op
    writes.

    row: of the step; in pages of the cache a position, in a state 0. column: the index within the row.
    """

    index: int
    op: Operands
    tensor: Tensor | CacheArray
    row: int
    column: int
    values: tuple[float, float]
    num_different: int


def first_difference(model, ids, tables, threads):
    """Runs a prompt in one step on two op tables, each (base backend, swaps), without fusion; returns the first
    Difference, or None.

    Scratch tensors are not compared: each kernel uses them in its own way.
    """
    limits = Limits(len(ids), 1, -(-len(ids) // PAGE_TOKENS), 1)
    span = _span(ids, 0, limits.num_pages, 0, len(ids), range(len(ids) - 1, len(ids)))
    with contextlib.closing(Team(threads)) as team:
        one, two = (Runner(model, team, limits, swaps, base, keep=True, fused=False) for base, swaps in tables)
        one.step([span])
        two.step([span])
        return _first_difference(one, two, len(ids))


def _first_difference(one, two, num_tokens):
    pairs = zip(_written(one, num_tokens), _written(two, num_tokens), strict=True)
    differences = (_difference(index, op, value, a, b) for (index, op, value, a), (*_, b) in pairs)
    return next((found for found in differences if found), None)


def _written(runner, num_tokens):
    """(index, op, value, array [rows, width]) of whatever each op writes, in order; the first to name a cache writes
    it."""
    rows, num_pages, seen = {"T": num_tokens, "O": 1, "R": 1, "E": 1, "S": 1}, runner.limits.num_pages, set()
    for index, op in enumerate(runner.program.ops):
        for tensor in op.shared:
            yield index, op, tensor, runner.executor.view(tensor, rows[tensor.rows])
        for cache in op.caches:
            if cache not in seen:
                seen.add(cache)
                yield index, op, cache, _cached(runner, cache, num_pages, num_tokens)


def _difference(index, op, value, a, b):
    """The Difference between two arrays [rows, width], compared by their bytes; None if there is none."""
    different = (a.view(np.uint8).reshape(*a.shape, -1) != b.view(np.uint8).reshape(*b.shape, -1)).any(-1)
    if not different.any():
        return None
    row, column = (int(i) for i in np.argwhere(different)[0])
    one, two = (_number(array[row, column], value.dtype) for array in (a, b))
    return Difference(index, op, value, row, column, (one, two), int(different.sum()))


def _number(stored, dtype):
    return float((np.uint32(stored) << np.uint32(16)).view(np.float32)) if dtype == "bf16" else float(stored)
