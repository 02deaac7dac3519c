"""Parity of speculation: an answer with drafts, of every source and number, equals the answer without, bit for bit.

Compared are the tokens, their log-probabilities and likeliest alternatives, and the blocks of prompt and answer in the
prefix cache: their keys and values, and the recurrent states that are kept.
"""

import contextlib
import hashlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lockstep.engine.engine import Engine, EngineOptions
from lockstep.engine.model import Model
from lockstep.engine.request import Request, SamplingParams
from lockstep.engine.speculation.drafts import Drafter, Source
from lockstep.engine.speculation.lookup import Guess
from lockstep.ops.attention.kv_cache import PAGE_TOKENS

KNOWN = "known answer"  # the name of a source of drafts, see `partly_wrong`
NUM_DRAFTS = (1, 2, 4, 7, 15)
TEMPERATURES = (0.0, 0.8)
ALTERNATIVES = 3
SPARE_PAGES = 2
MOST_STATES = 8  # recurrent states that are kept for one answer and compared


@dataclass(frozen=True)
class DraftPath:
    """A way to get an answer. source: one of `sources`; num_drafts: drafts in a step."""

    source: str
    num_drafts: int
    temperature: float
    threads: int

    @property
    def name(self) -> str:
        """The path in words."""
        return f"{self.source}, {self.num_drafts} in a step" if self.num_drafts else "no drafts, one token at a time"


@dataclass(frozen=True)
class Answer:
    """The results of a path: token ids, log-probabilities, and digests of all that is compared; num_drafted and
    num_accepted: computed and right drafts."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    digests: dict[str, str]
    num_drafted: int
    num_accepted: int

    @property
    def digest(self) -> str:
        """One digest of everything."""
        return hashlib.sha256("".join(self.digests.values()).encode()).hexdigest()


@dataclass(frozen=True)
class DraftComparison:
    """A path against the one without drafts. differing: "tokens", "logprobs", "alternatives", "pages", "states"."""

    path: DraftPath
    max_abs_diff: float
    num_drafted: int
    num_accepted: int
    digest: str
    differing: tuple[str, ...]

    @property
    def identical(self) -> bool:
        return not self.differing


def answer_tokens(length: int, least: int) -> int:
    """Tokens of an answer to a prompt of `length` tokens: at least `least`, and so many that prompt and answer, without
    the answer's last token (which is never computed), fill whole blocks of the cache."""
    return least + -(length + least - 1) % PAGE_TOKENS


def run_draft_parity(
    model: Model, ids: list[int], num_tokens: int, max_threads: int, swaps: Mapping[str, str] | None = None
) -> Iterator[DraftComparison]:
    """Yields a DraftComparison for every path; the first of each temperature is the reference with itself.

    swaps: changes of the op table, which the references do not use.
    """
    references: dict[float, Answer] = {}
    with _opened(model, len(ids) + num_tokens, threads=1, max_step_tokens=1) as engine:
        for temperature in TEMPERATURES:
            path = DraftPath("off", 0, temperature, 1)
            references[temperature] = run_draft_path(engine, ids, num_tokens, path, None)
            yield compare(references[temperature], path, references[temperature])
    for num_drafts, name in itertools.product(NUM_DRAFTS, sources(model)):
        drafts = dict(speculate="lookup" if name == KNOWN else name, draft=num_drafts, threads=max_threads)
        with _opened(model, len(ids) + num_tokens, swaps, **drafts) as engine:
            for temperature, reference in references.items():
                known = partly_wrong(reference.token_ids, num_drafts, model.config.vocab_size)
                path, source = DraftPath(name, num_drafts, temperature, max_threads), known if name == KNOWN else None
                yield compare(reference, path, run_draft_path(engine, ids, num_tokens, path, source))


def sources(model: Model) -> list[str]:
    """The sources of drafts to compare: those of the model that need no other model, and KNOWN."""
    return ["lookup", *(["mtp"] if model.drafts_by_mtp("auto") else []), KNOWN]


@contextlib.contextmanager
def _opened(model: Model, num_tokens: int, swaps: Mapping[str, str] | None = None, **options) -> Iterator[Engine]:
    """A context with an engine for one request of `num_tokens` tokens, which keeps states and evicts no pages."""
    every = PAGE_TOKENS * max(1, num_tokens // PAGE_TOKENS // MOST_STATES)
    kept = dict(state_every=every, prompt_state_from=0, state_bytes=1 << 40)  # memory is taken for each state
    size = dict(max_requests=1, kv_tokens=num_tokens + SPARE_PAGES * PAGE_TOKENS)
    engine = Engine(model, EngineOptions(**size, **kept, **options), swaps)
    try:
        yield engine
    finally:
        engine.close()


def partly_wrong(answer: tuple[int, ...], num_drafts: int, vocab_size: int) -> Source:
    """A source that drafts a known answer with one wrong token, whose place in the drafts moves from step to step."""
    places = itertools.cycle(range(num_drafts + 1))  # the last place is behind the drafts: then all are right

    def source(request: Request, most: int, drafts: Sequence[int]) -> Guess:
        if drafts:
            return Guess([], KNOWN)
        start, wrong = len(request.output_ids), next(places)
        guessed = list(answer[start : start + most])
        if wrong < len(guessed):
            guessed[wrong] = (guessed[wrong] + 1) % vocab_size
        return Guess(guessed, KNOWN)

    return source


def run_draft_path(engine: Engine, ids: list[int], num_tokens: int, path: DraftPath, source: Source | None) -> Answer:
    """Runs a path on an engine. The path's name is the salt, so that no other path's prefix is reused."""
    if source is not None:
        engine.drafter = Drafter(engine.scheduler, source, path.num_drafts, engine.eos_ids)
    params = SamplingParams(
        temperature=path.temperature, seed=1, logprobs=ALTERNATIVES, max_tokens=num_tokens, ignore_eos=True
    )
    request = engine.add(ids, params, cache_salt=f"{path.name} {path.temperature}")
    while engine.has_work:
        engine.step()
    if request.error is not None:
        raise ValueError(f"{path.name}, temperature {path.temperature}: {request.error}")
    return _answer(engine, request)


def _answer(engine: Engine, request: Request) -> Answer:
    digests = dict(
        tokens=_digest(np.array(request.output_ids)),
        logprobs=_digest(np.array(request.logprobs)),
        alternatives=_digest(np.array([[*top.items()] for top in request.top_logprobs])),
        **_cached(engine, request),
    )
    counts = request.num_drafted, request.num_accepted
    return Answer(tuple(request.output_ids), tuple(request.logprobs), digests, *counts)


def _cached(engine: Engine, request: Request) -> dict[str, str]:
    """Digests of a request's pages and kept recurrent states in the prefix cache."""
    prefix = engine.scheduler.prefix
    assert prefix is not None, "the engine was made with a prefix cache"
    pages, states = hashlib.sha256(), hashlib.sha256()
    names = prefix.names(request, (request.num_tokens - 1) // PAGE_TOKENS)
    for number, (group, allocator) in enumerate(zip(prefix.pages.groups, prefix.pages.allocators, strict=True)):
        out = np.zeros(prefix.memory.page_bytes[number], np.uint8)
        first = group.first_seen(len(names) * PAGE_TOKENS)  # earlier pages, outside of the window, may be gone
        for index, name in enumerate(names[first:], first):
            page = allocator.find(name)
            assert page is not None, f"block {index} is not in the cache"
            prefix.memory.read_page(number, page, out)
            pages.update(out.tobytes())
    for name in names:
        state = prefix.states.get(name) if prefix.states is not None else None
        states.update(b"none" if state is None else state.tobytes())
    return dict(pages=pages.hexdigest(), states=states.hexdigest())


def _digest(array: np.ndarray) -> str:
    return hashlib.sha256(array.tobytes()).hexdigest()


def compare(reference: Answer, path: DraftPath, answer: Answer) -> DraftComparison:
    """The DraftComparison of a path's answer with the answer without drafts."""
    diffs = np.abs(np.array(reference.logprobs) - np.array(answer.logprobs))
    differing = tuple(name for name, digest in answer.digests.items() if digest != reference.digests[name])
    counts = answer.num_drafted, answer.num_accepted
    return DraftComparison(path, float(diffs.max()), *counts, answer.digest, differing)
