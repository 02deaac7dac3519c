"""Models to try drafts on, each with what its requests may ask for."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lockstep.engine.answer_text import Detokenizer
from lockstep.engine.model import Model
from lockstep.engine.request import Request
from lockstep.serve.hub import resolve_model
from lockstep.serve.structured import Grammars, json_schema, lark, regex
from lockstep.serve.tokenizer import Tokenizer, answer_reader, find_tokenizer
from tests.promise.models import Case, load

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
    json_schema({"type": "object", "properties": {"name": {"type": "string"}, "size": {"type": "integer"}}}),
    lark('start: ("self." WORD "\\n")+\nWORD: /[a-z]{1,9}/'),
)
LINE = regex(r"[ a-z]{2,8};")  # that is held to from a line break on


@dataclass(frozen=True)
class Subject:
    """texts: token ids that prompts are cut from. new_masks: functions of a number of samples, each of which makes the
    logits_mask of one request. stops: stop strings, of which there are none without a tokenizer. draft_model: one of
    the same vocabulary that often chooses what the model does."""

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
        """Of one recurrent state, 0 if there is none."""
        return sum(cache.bytes_each for cache in self.model.recorded.caches if cache.kind == "state")


def phrases(vocab_size: int, seed: int, length: int) -> list[int]:
    """Random tokens that repeat a few phrases, so that there is something to look up."""
    rng = np.random.default_rng(seed)
    made = [rng.integers(0, vocab_size, size).tolist() for size in (2, 5, 9)]
    return [token for i in rng.integers(0, len(made), length) for token in made[i]][:length]


class ModuloMask:
    """A mask of a user's own: two thirds of the tokens; which, depends on the last one. calls: after how many tokens it
    was asked, whatever the sample."""

    def __init__(self, vocab_size: int, num_samples: int) -> None:
        self.calls: list[int] = []
        self._tokens = np.arange(-(-vocab_size // 32) * 32)

    def __call__(self, output_ids: list[int]) -> np.ndarray:
        self.calls.append(len(output_ids))
        last = output_ids[-1] if output_ids else 0
        return np.packbits((self._tokens + last) % 3 != 0, bitorder="little").view(np.uint32)


def tiny(config: str, folder: Path, weights: str = "f32", kv_dtype: str = "bf16") -> Subject:
    """A tiny random model of one of `tests.promise.models.CONFIGS`, without a tokenizer."""
    model = load(Case(config, weights, kv_dtype), folder)
    size = model.config.vocab_size
    texts = [phrases(size, seed, 400) for seed in range(4)]
    draft = load(Case(config, "q8_0", "bf16"), folder)
    return Subject(model, draft, frozenset(model.config.eos_ids), texts, [functools.partial(ModuloMask, size)])


def bundled(weights: str = "auto", kv_dtype: str = "bf16") -> Subject:
    """The model that comes with the package, with all of its context. `close` ends what compiles its grammars."""
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
        [*masks, functools.partial(ModuloMask, size)],
        functools.partial(answer_reader, tokenizer),
        ("\n", " = ", "self", "return", "):", "e"),
        grammars.close,
    )


def _texts(tokenizer: Tokenizer, vocab_size: int) -> list[list[int]]:
    code, words = tokenizer.encode(TEXT), tokenizer.encode(" ".join(TEXT.split()) * 2)
    return [code, words, code[60:] + code, phrases(vocab_size, 0, 400)]
