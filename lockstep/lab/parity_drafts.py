"""Parity of speculation: one answer with drafts of every kind and number, compared bit for bit with none.

Compared are the tokens, their log-probabilities and likeliest alternatives, and what prompt and answer leave in the
prefix cache: every block's keys and values, and the recurrent states that are kept.
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

KNOWN = "known answer"  # a source of drafts
NUM_DRAFTS = (1, 2, 4, 7, 15)
TEMPERATURES = (0.0, 0.8)
ALTERNATIVES = 3
SPARE_PAGES = 2
MOST_STATES = 8  # of recurrent layers, which are kept for one answer and compared


@dataclass(frozen=True)
class DraftPath:
    """A way to get an answer. source: a name of SOURCES, or "known answer": drafts of which most are right, and one is
    wrong, at every place in turn. num_drafts: of a step."""

    source: str
    num_drafts: int
    temperature: float
    threads: int

    @property
    def name(self) -> str:
        """What it is called."""
        return f"{self.source}, {self.num_drafts} in a step" if self.num_drafts else "no drafts, one token at a time"


@dataclass(frozen=True)
class Answer:
    """What a path gave: token ids and log-probabilities, and digests of whatever is compared; drafts and right ones."""

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
    """Tokens of an answer to a prompt: at least so many, and as many as fill the cache's last block.

    All but the last one are computed.
    """
    return least + -(length + least - 1) % PAGE_TOKENS


def run_draft_parity(
    model: Model, ids: list[int], num_tokens: int, max_threads: int, swaps: Mapping[str, str] | None = None
) -> Iterator[DraftComparison]:
    """Yields a DraftComparison for every path; the first of each temperature is the reference with itself.

    swaps: of the op table, but for the references'.
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
    """Where drafts of a model come from without another model, and a source that knows the answer."""
    return ["lookup", *(["mtp"] if model.drafts_by_mtp("auto") else []), KNOWN]


@contextlib.contextmanager
def _opened(model: Model, num_tokens: int, swaps: Mapping[str, str] | None = None, **options) -> Iterator[Engine]:
    """An engine for one request of so many tokens, which keeps its states and evicts none of its pages."""
    every = PAGE_TOKENS * max(1, num_tokens // PAGE_TOKENS // MOST_STATES)
    kept = dict(state_every=every, prompt_state_from=0, state_bytes=1 << 40)  # memory is taken for each state
    size = dict(max_requests=1, kv_tokens=num_tokens + SPARE_PAGES * PAGE_TOKENS)
    engine = Engine(model, EngineOptions(**size, **kept, **options), swaps)
    try:
        yield engine
    finally:
        engine.close()


def partly_wrong(answer: tuple[int, ...], num_drafts: int, vocab_size: int) -> Source:
    """A source that knows an answer, and puts a wrong token in a place of its drafts that moves from step to step."""
    places = itertools.cycle(range(num_drafts + 1))  # the last lies behind the drafts: then all are right

    def source(request: Request, most: int, drafts: Sequence[int]) -> Guess:
        if drafts:
            return Guess([], KNOWN)
        at, wrong = len(request.output_ids), next(places)
        made = list(answer[at : at + most])
        if wrong < len(made):
            made[wrong] = (made[wrong] + 1) % vocab_size
        return Guess(made, KNOWN)

    return source


def run_draft_path(engine: Engine, ids: list[int], num_tokens: int, path: DraftPath, source: Source | None) -> Answer:
    """Runs a path on an engine that computed nothing for its name before."""
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
    """Digests of the pages and of the kept states of all that was computed for a request."""
    prefix = engine.scheduler.prefix
    assert prefix is not None, "the engine was made with one"
    pages, states, names = (
        hashlib.sha256(),
        hashlib.sha256(),
        prefix.names(request, (request.num_tokens - 1) // PAGE_TOKENS),
    )
    for number, (group, allocator) in enumerate(zip(prefix.pages.groups, prefix.pages.allocators, strict=True)):
        out = np.zeros(prefix.memory.page_bytes[number], np.uint8)
        first = group.first_seen(len(names) * PAGE_TOKENS)  # those before it need not be there
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
    """A path's answer against that without drafts."""
    diffs = np.abs(np.array(reference.logprobs) - np.array(answer.logprobs))
    differing = tuple(name for name, digest in answer.digests.items() if digest != reference.digests[name])
    counts = answer.num_drafted, answer.num_accepted
    return DraftComparison(path, float(diffs.max()), *counts, answer.digest, differing)
