"""Subjects: models with which drafts are tested, each with the texts, masks and stop sequences of its requests."""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lockstep.engine.answer_text import Detokenizer
from lockstep.engine.model import Model
from lockstep.engine.request import Request
from lockstep.text.grammars.structured import Grammars, json_schema, lark, regex
from lockstep.text.speculative_mask import SpeculativeMask
from lockstep.text.tokenizer.tokenizer import Tokenizer, answer_detokenizer, find_tokenizer
from lockstep.weights.hub import resolve_model
from tests.promise.models import Case, load
from tests.speculation.masks import FewAfterEach

TEXT = '''class Queue:
    """A first-in, first-out queue."""

    def __init__(self, maxsize=0):
        self.maxsize = maxsize
        self.items = []

    def put(self, item):
        if self.maxsize and len(self.items) >= self.maxsize:
            raise ValueError("the queue is full")
        self.items.append(item)

    def get(self):
        if not self.items:
            raise ValueError("the queue is empty")
        return self.items.pop(0)

    def __len__(self):
        return len(self.items)

    def __iter__(self):
        return iter(self.items)
'''
GRAMMARS = (
    regex(r"[a-z_]{1,12}( = [a-z0-9]{1,8}\n[a-z_]{1,12}){0,9}"),
    json_schema(
        {
            "type": "object",
            "properties": {"name": {"type": "string", "maxLength": 8}, "enabled": {"type": "boolean"}},
            "required": ["name", "enabled"],
            "additionalProperties": False,
        }
    ),
    lark('start: ("self." WORD "\\n")+\nWORD: /[a-z]{1,9}/'),
)
LINE = regex(r"[ a-z]{2,8};")  # a grammar that begins at a line break


@dataclass(frozen=True)
class Subject:
    """A model, and what its requests are made of. draft_model: of the same vocabulary; it often chooses the same token.
    texts: token ids that prompts are cut from. new_masks: functions of a number of samples, each of which makes the
    logits_mask of one request. stops: stop sequences; none without a tokenizer. close: ends its threads."""

    model: Model
    draft_model: Model
    eos_ids: frozenset[int]
    texts: list[list[int]]
    new_masks: list[Callable[[int], Callable[[list[int]], Any]]]
    new_detokenizer: Callable[[Request], Detokenizer] | None = None
    stops: tuple[str, ...] = ()
    close: Callable[[], None] = field(default=lambda: None)

    @property
    def vocab_size(self) -> int:
        return self.model.config.vocab_size

    @property
    def state_bytes(self) -> int:
        """Bytes of one recurrent state; 0 if the model has none."""
        return sum(cache.bytes_each for cache in self.model.recorded.caches if cache.kind == "state")


def phrases(vocab_size: int, seed: int, length: int) -> list[int]:
    """Random tokens that repeat a few phrases, so that there is something to look up."""
    rng = np.random.default_rng(seed)
    made = [rng.integers(0, vocab_size, size).tolist() for size in (2, 5, 9)]
    return [token for i in rng.integers(0, len(made), length) for token in made[i]][:length]


def two_thirds(vocab_size: int, last: int) -> np.ndarray:
    """A mask that allows two thirds of the tokens, which depend on the last token."""
    bits = (np.arange(-(-vocab_size // 32) * 32) + last) % 3 != 0
    return np.packbits(bits, bitorder="little").view(np.uint32)


class UsersMask:
    """A logits_mask that is a plain function. calls: the number of output tokens at each call, of all samples."""

    def __init__(self, vocab_size: int, num_samples: int) -> None:
        self.calls: list[int] = []
        self._vocab_size = vocab_size

    def __call__(self, output_ids: list[int]) -> np.ndarray:
        self.calls.append(len(output_ids))
        return two_thirds(self._vocab_size, output_ids[-1] if output_ids else 0)


class HesitantMask(SpeculativeMask):
    """The same as a SpeculativeMask, which does not know the mask after some drafts."""

    def __init__(self, vocab_size: int, num_samples: int) -> None:
        self._vocab_size = vocab_size

    def __call__(self, output_ids: list[int]) -> np.ndarray:
        return two_thirds(self._vocab_size, output_ids[-1] if output_ids else 0)

    def masks(self, output_ids: list[int], drafts: Sequence[int], first: int = 0) -> Iterator[np.ndarray]:
        tokens = [*output_ids, *drafts]
        for count in range(len(output_ids) + first, len(tokens) + 1):
            if count > len(output_ids) + first and count % 5 == 0:
                return
            yield self(tokens[:count])

    def forced(self, output_ids: list[int], drafts: Sequence[int]) -> list[int]:
        return []

    def num_allowed(self, output_ids: list[int], drafts: Sequence[int]) -> int:
        befores = [*output_ids[-1:], *drafts] if output_ids else [0, *drafts]
        return next((i for i, (a, b) in enumerate(zip(befores, drafts, strict=False)) if (a + b) % 3 == 0), len(drafts))


def _plain_masks(vocab_size: int) -> list[Callable[[int], Callable[[list[int]], Any]]]:
    """Those that need no tokenizer."""
    return [functools.partial(each, vocab_size) for each in (UsersMask, HesitantMask)]


def tiny(config: str, folder: Path, weights: str = "f32", kv_dtype: str = "bf16") -> Subject:
    """A tiny random model of one of `tests.promise.models.CONFIGS`, without a tokenizer."""
    model = load(Case(config, weights, kv_dtype), folder)
    size = model.config.vocab_size
    texts = [phrases(size, seed, 400) for seed in range(4)]
    draft = load(Case(config, "q8_0", "bf16"), folder)
    masks = [*_plain_masks(size), functools.partial(FewAfterEach, size)]
    return Subject(model, draft, frozenset(model.config.eos_ids), texts, masks)


def bundled(weights: str = "auto", kv_dtype: str = "bf16") -> Subject:
    """The model that comes with the package, with its full context. `close` ends the threads that compile grammars."""
    model = load(Case("bundled", weights, kv_dtype), Path(), 4096)
    tokenizer = find_tokenizer(resolve_model(None), model.checkpoint.metadata)
    size, eos_ids = model.config.vocab_size, frozenset(tokenizer.eos_ids) | frozenset(model.config.eos_ids)
    grammars = Grammars(tokenizer, eos_ids, size)
    masks = [functools.partial(grammars.mask, grammar) for grammar in GRAMMARS]
    [line_break] = tokenizer.encode("\n")
    masks.append(functools.partial(grammars.mask, LINE, trigger=line_break))
    return Subject(
        model,
        load(Case("bundled", "q4_0", "bf16"), Path(), 4096),
        eos_ids,
        _texts(tokenizer, size),
        masks + _plain_masks(size),
        functools.partial(answer_detokenizer, tokenizer),
        ("\n", " = ", "self", "return", "):", "e"),
        grammars.close,
    )


def _texts(tokenizer: Tokenizer, vocab_size: int) -> list[list[int]]:
    code, words = tokenizer.encode(TEXT), tokenizer.encode(" ".join(TEXT.split()) * 2)
    return [code, words, code[60:] + code, phrases(vocab_size, 0, 400)]
