"""Parity: one prompt along every path, each compared bit for bit with the one-token-at-a-time reference.

A path is a way of cutting the prompt into steps, a number of threads and, if it has company, other requests in the same
steps. Compared are the logits of the last positions, and what the prompt leaves in the cache: keys, values, states.
"""
import hashlib
from dataclasses import dataclass

import numpy as np

from lockstep.engine.runner import Limits, Runner, Span
from lockstep.ops import BACKENDS
from lockstep.ops.kv_cache import PAGE_TOKENS, by_position
from lockstep.runtime.program import Tensor
from lockstep.runtime.threads import Team

AWKWARD = (1, 2, 3, 7, 15, 16, 17, 31, 33, 63, 64, 65, 127, 128, 129, 511, 512, 513, 1023, 1024, 1025, 2047, 2048, 2049)
CHUNKS = (1, 7, 64, 512)
LOGIT_BYTES = 64 << 20  # logits that are kept for comparison, per path
GREEDY = dict(temperature=0.0, top_p=1.0, min_p=0.0, top_k=0, seed=0, position=0)


@dataclass(frozen=True)
class Path:
    """A way to run a prompt: where it is cut (ends of steps), on how many threads, next to how many strangers."""

    name: str
    ends: tuple[int, ...]
    threads: int
    strangers: int = 0


@dataclass(frozen=True)
class Outcome:
    """What a path gave: logits [rows, V] of the last positions, and a digest of everything."""

    logits: np.ndarray
    digest: str


@dataclass(frozen=True)
class Comparison:
    """A path against the reference."""

    path: Path
    max_abs_diff: float
    argmax_agree: float
    digest: str
    identical: bool


def chunked(length, size):
    """Ends of steps of at most `size` tokens."""
    return tuple(range(size, length, size)) + (length,)


def paths(length, max_threads):
    """Every path that parity runs for a prompt, the reference first."""
    made = [Path("one token at a time", chunked(length, 1), 1)]
    made += [Path(f"chunks of {c}", chunked(length, c), max_threads) for c in CHUNKS if c < length]
    made += [Path("whole", (length,), n) for n in sorted({1, 2, max_threads, 2 * max_threads})]
    made += [Path(f"cut after {p}", (p, length), max_threads) for p in AWKWARD if p < length]
    return made + [Path("with 3 strangers", chunked(length, 17), max_threads, 3)]


def run_path(model, ids, path, swaps=None, num_rows=None):
    """Runs a path on fresh memory: an Outcome."""
    others = [list(np.random.default_rng(i).integers(0, model.config.vocab_size, len(ids))) for i in range(path.strangers)]
    largest = max(b - a for a, b in zip((0, *path.ends), path.ends))
    pages = -(-len(ids) // PAGE_TOKENS)
    wanted = range(len(ids) - (num_rows or comparable_rows(model, len(ids))), len(ids))
    requests = 1 + path.strangers
    limits = Limits(largest * requests, requests, pages * requests, min(largest, len(wanted)) + requests)
    team = Team(path.threads)
    try:
        runner, rows = Runner(model, team, limits, swaps), []
        for start, end in zip((0, *path.ends), path.ends):
            spans = [_span(o, i + 1, pages, start, end, ()) for i, o in enumerate(others)]
            spans.insert(len(spans) // 2, _span(ids, 0, pages, start, end, wanted))
            logits = runner.step(spans)[2]
            rows += [row.copy() for row in logits]
        logits = np.stack(rows)
        return Outcome(logits, digest(logits, runner, list(range(pages)), len(ids)))
    finally:
        team.close()


def comparable_rows(model, length):
    """How many of the last positions' logits are kept for comparison."""
    return max(1, min(length, LOGIT_BYTES // (4 * model.config.vocab_size)))


def _span(ids, slot, pages, start, end, wanted):
    sampled = {i - start: GREEDY for i in wanted if start <= i < end}
    return Span(ids[start:end], start, list(range(slot * pages, (slot + 1) * pages)), slot, sampled)


def digest(logits, runner, pages, num_tokens):
    """SHA-256 of logits and of request 0's part of every cache array; unused slots of pages do not count."""
    made = hashlib.sha256(np.ascontiguousarray(logits).tobytes())
    for cache in runner.program.caches:
        memory = runner.caches[cache.name].reshape(-1, cache.bytes_each)
        if cache.kind == "state":
            made.update(memory[0].tobytes())
        else:
            made.update(_used(memory[pages], cache, num_tokens).tobytes())
    return made.hexdigest()


def _used(memory, cache, num_tokens):
    """The bytes of positions 0 .. num_tokens of pages [p, ...], position first."""
    return by_position(memory.reshape(len(memory), *cache.shape, -1), cache.name.endswith("k_pages"))[:num_tokens]


def compare(reference, path, outcome):
    """A path's outcome against the reference's."""
    diff = np.abs(outcome.logits.astype(np.float64) - reference.logits)
    agree = float((outcome.logits.argmax(-1) == reference.logits.argmax(-1)).mean())
    return Comparison(path, float(diff.max()), agree, outcome.digest, outcome.digest == reference.digest)


def run_parity(model, ids, max_threads, swaps=None):
    """Yields a Comparison for every path; the first is the reference with itself."""
    all_paths = paths(len(ids), max_threads)
    reference = run_path(model, ids, all_paths[0])
    yield compare(reference, all_paths[0], reference)
    for path in all_paths[1:]:
        yield compare(reference, path, run_path(model, ids, path, swaps))


@dataclass(frozen=True)
class Difference:
    """The first op whose output differs between two op tables."""

    index: int
    op: object
    tensor: Tensor
    row: int
    column: int
    values: tuple[float, float]
    num_different: int


def first_difference(model, ids, tables, threads):
    """Runs a prompt whole on two op tables, each (base backend, swaps), without fusion; the first Difference, or None.

    Scratch tensors are not compared: what they hold is the kernel's own affair.
    """
    limits = Limits(len(ids), 1, -(-len(ids) // PAGE_TOKENS), 1)
    span = _span(ids, 0, limits.num_pages, 0, len(ids), range(len(ids) - 1, len(ids)))
    team = Team(threads)
    try:
        runners = [Runner(model, team, limits, swaps, base, keep=True, fused=False) for base, swaps in tables]
        for runner in runners:
            runner.step([span])
        return _first_difference(*runners, len(ids))
    finally:
        team.close()


def _first_difference(one, two, num_tokens):
    for index, (op, other) in enumerate(zip(one.program.ops, two.program.ops)):
        for tensor, twin in zip(op.outputs, other.outputs):
            if tensor.name.endswith(("scratch", "softmax")):
                continue
            rows = {"T": num_tokens, "R": 1, "S": 1}[tensor.rows]
            a, b = one.executor.view(tensor, rows), two.executor.view(twin, rows)
            different = a.view(np.uint8).reshape(*a.shape, -1) != b.view(np.uint8).reshape(*b.shape, -1)
            if different.any():
                row, column = (int(i) for i in np.argwhere(different.any(-1))[0])
                values = float(a[row, column]), float(b[row, column])
                return Difference(index, op, tensor, row, column, values, int(different.any(-1).sum()))
    return None
