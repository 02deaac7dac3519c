"""The model of a study, and what plans do to it: how its program is taken apart, and the bytes of its weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lockstep.engine.model import Model, load_model
from lockstep.models.checkpoint import open_checkpoint
from lockstep.progress import OnProgress
from lockstep.ptq.plan import Plan
from lockstep.ptq.rewrite import Treatment
from lockstep.ptq.site import Site
from lockstep.ptq.spec import Spec
from lockstep.ptq.treatment import sites_for, treatment_of
from lockstep.ptq.weights import num_bytes
from lockstep.runtime.program import Program
from lockstep.text.tokenizer.tokenizer import Tokenizer, find_tokenizer
from lockstep.weights.hub import resolve_model
from lockstep.weights.store import PackedStore
from lockstep.weights.tensor import StoredTensor

HEAD = "head"  # the site of the logits
BUNDLED = "bundled"  # the name of the package's own model in files


@dataclass(frozen=True)
class Subject:
    """A loaded model. name: as the user gave it. content: the hash of the model's files."""

    name: str
    path: Path
    model: Model
    content: str

    @property
    def tokenizer(self) -> Tokenizer:
        """Its tokenizer. ValueError if it has none."""
        return find_tokenizer(self.path, self.model.checkpoint.metadata)


def load_subject(
    name: str | None, length: int, weights: str, kv_dtype: str | None = None, progress: OnProgress | None = None
) -> Subject:
    """Loads a model for windows of `length` tokens. name: as for `LLM`; None or "bundled": the package's own model.

    ValueError for a model that cannot be loaded, and for windows that are longer than its context.
    """
    path = resolve_model(None if name == BUNDLED else name, progress)
    checkpoint = open_checkpoint(path)
    model = load_model(checkpoint, PackedStore(checkpoint, progress), weights, kv_dtype, length)
    if model.max_context < length:
        raise ValueError(f"windows of {length} tokens: the model's context is {model.max_context}")
    if not model.can_generate:
        raise ValueError(f"{path}: the model has no head, so there is no next token to score")
    return Subject(name or BUNDLED, path, model, checkpoint.content.wait(progress))


# ------------------------------------------------------------ sites


def treatment_for(program: Program, plan: Plan, specs: Iterable[Mapping[str, Spec]], length: int) -> Treatment:
    """`treatment_of` for plans on windows of `length` tokens. ValueError for a grid on which logits cannot be
    scored."""
    specs = list(specs)
    if any(each[HEAD].per == "row" for each in specs if HEAD in each):
        raise ValueError(
            f"site {HEAD}: a grid /row needs a whole row of logits, which is never there; expected /tensor"
        )
    return treatment_of(plan, sites_for(program, plan), length, specs)


# ------------------------------------------------------------ bytes


def weight_bytes(parts: Mapping[str, Sequence[StoredTensor]], specs: Mapping[str, Spec]) -> tuple[int, int]:
    """(Bytes of all weights under a plan with their scales, number of weights).

    A weight that is not rounded counts as it is stored. A tensor with two sites (a head tied to the embedding) counts
    once if both have the same grid.
    """
    counted = {(part.name, str(specs.get(site, ""))): (part, specs.get(site)) for site in parts for part in parts[site]}
    total = sum(_bytes_of(part, spec) for part, spec in counted.values())
    return total, sum(_size(part) for part, _ in counted.values())


def _size(part: StoredTensor) -> int:
    size = 1
    for n in part.shape:
        size *= n
    return size


def _bytes_of(part: StoredTensor, spec: Spec | None) -> int:
    if spec is None or spec.is_off:
        return part.data.nbytes
    return num_bytes(spec, (_size(part) // part.shape[-1], part.shape[-1]))


def kv_bytes(sites: Iterable[Site], specs: Mapping[str, Spec]) -> int | None:
    """Bytes that a token takes in the KV cache if all keys and values (k.all, v.all) are rounded; else None.

    The scale of a `/row` grid is a float32 and its zero point as wide as a code; the scale of a block is a byte.
    """
    there = [site for site in sites if site.name.endswith((".k.all", ".v.all"))]
    if not there or any(specs.get(site.name, Spec("off")).is_off for site in there):
        return None
    return -(-sum(site.heads * _row_bits(specs[site.name], site.width) for site in there) // 8)


def _row_bits(spec: Spec, width: int) -> int:
    scales = -(-width // spec.what.block) * (32 if spec.grid == "q8_0" else 8) if spec.what.block else 0
    own = 32 + (0 if spec.symmetric else spec.bits) if spec.per == "row" else 0
    return width * spec.bits + scales + own
