"""Which model, in which formats and arithmetic, an answer came from; and whether it is the one at hand."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from lockstep.engine.engine import Engine
from lockstep.engine.model import Model
from lockstep.engine.selfcheck.check import NUMERICS
from lockstep.receipts.fields import Fields, is_token, without_none
from lockstep.receipts.text_sizes import MAX_NAME_CHARS, MAX_TOKENS
from lockstep.runtime.program import Weight
from lockstep.text.tokenizer.tokenizer import Tokenizer
from lockstep.weights.content import ContentHash

MAX_EOS = 64
KV_DTYPES = ("f32", "bf16", "q8")


class ModelSource(Protocol):
    """What an `LLM` has that a receipt names."""

    @property
    def path(self) -> Path:
        """The model's folder or file."""
        ...

    @property
    def content(self) -> ContentHash:
        """The hash of its files."""
        ...

    @property
    def model(self) -> Model:
        """The loaded model."""
        ...

    @property
    def engine(self) -> Engine:
        """Its engine."""
        ...

    @property
    def has_tokenizer(self) -> bool:
        """Whether there is a tokenizer."""
        ...

    @property
    def tokenizer(self) -> Any:
        """Its Tokenizer, if there is one."""
        ...


@dataclass(frozen=True)
class ModelPart:
    """The model of a statement. Hashes are 64 hexadecimal digits.

    name: for people only, nothing is loaded by it. content: of the weight files and the config. formats: of the names
    and formats of all weights as they are multiplied; weights: how they were asked for, for people only. kv_dtype: of
    the KV cache. plan: of the quantization plan, or None. tokenizer, chat_template: None without one. eos: the tokens
    that end an answer. context: the most tokens of a prompt and its answer, where it was made. rope: "short" for a rope
    with other factors than its config calls for, or None.
    """

    name: str
    content: str
    formats: str
    weights: str
    kv_dtype: str
    eos: tuple[int, ...]
    context: int
    plan: str | None = None
    tokenizer: str | None = None
    chat_template: str | None = None
    rope: str | None = None

    def to_object(self) -> dict[str, Any]:
        """The part as an object of JSON."""
        return without_none({**vars(self), "eos": list(self.eos)})


def read_model(value: Any) -> ModelPart:
    """The ModelPart of an object of JSON. ReceiptError for anything else."""
    fields = Fields(value, "model.")
    digests = {
        name: fields.hex(name, 32).hex()
        for name in ("content", "formats", "plan", "tokenizer", "chat_template")
        if name in fields or name in ("content", "formats")
    }
    names = {name: fields.text(name, MAX_NAME_CHARS) for name in ("name", "weights")}
    kv_dtype = fields.text("kv_dtype", 8)
    if kv_dtype not in KV_DTYPES:
        fields.refuse("kv_dtype", f"expected one of {', '.join(KV_DTYPES)}, got {kv_dtype!r}")
    rope = fields.text("rope", 8) if "rope" in fields else None
    if rope not in (None, "short"):
        fields.refuse("rope", f"expected 'short', got {rope!r}")
    eos = tuple(fields.items("eos", MAX_EOS, is_token, "token ids"))
    context = fields.integer("context", 1, MAX_TOKENS)
    made = ModelPart(**names, **digests, kv_dtype=kv_dtype, eos=eos, context=context, rope=rope)
    fields.finish()
    return made


def model_part(llm: ModelSource, name: str | None = None) -> ModelPart:
    """The ModelPart of a loaded model. Waits until all of its files are hashed. ValueError for files that changed."""
    model = llm.model
    tokenizer: Tokenizer | None = llm.tokenizer if llm.has_tokenizer else None
    templates = dict(tokenizer.chat_templates) if tokenizer is not None else {}
    weights = {v for op in model.recorded.ops for v in op.inputs if isinstance(v, Weight)}
    return ModelPart(
        name=(llm.path.name if name is None else name)[:MAX_NAME_CHARS],
        content=llm.content.wait(),
        formats=digest_of(sorted((weight.name, weight.format) for weight in weights)),
        weights=model.weights,
        kv_dtype=model.kv_dtype,
        eos=tuple(sorted(llm.engine.eos_ids)),
        context=llm.engine.model.max_context,
        plan=model.plan or None,
        rope=model.rope or None,
        tokenizer=None if tokenizer is None else digest_of([tokenizer.serialized, dict(tokenizer.special_tokens)]),
        chat_template=digest_of(templates) if templates else None,
    )


def digest_of(value: Any) -> str:
    """SHA-256 of a value's JSON, 64 hexadecimal digits."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


WORDS = {
    "content": "the content of its files",
    "formats": "the formats of its weights",
    "kv_dtype": "the format of the KV cache",
    "plan": "the quantization plan",
    "rope": "the choice of rope factors",
    "tokenizer": "the tokenizer",
    "chat_template": "the chat template",
    "eos": "the tokens that end an answer",
}


def difference(numerics: int, claimed: ModelPart, own: ModelPart) -> tuple[str, Any, Any, str] | None:
    """The first of a statement's fields that says that another model, or another arithmetic, made the answer: (name,
    claimed, found, sentence); None where all are the same here. numerics: of the statement."""
    if numerics != NUMERICS:
        sentence = f"the arithmetic is version {numerics}, here it is version {NUMERICS}"
        return "numerics", numerics, NUMERICS, sentence
    for name, words in WORDS.items():
        ours, theirs = getattr(own, name), getattr(claimed, name)
        if ours != theirs:
            sentence = f"another model: {words} is {_short(theirs)}, here it is {_short(ours)}"
            return f"model.{name}", theirs, ours, sentence
    return None


def _short(value: Any) -> str:
    return f"{value[:12]}..." if isinstance(value, str) and len(value) == 64 else str(value or "none")
