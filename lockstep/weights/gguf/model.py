"""A GGUF file as the Hugging Face checkpoint that it was converted from: config, names, and conversion undone."""

from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from lockstep.weights.gguf.architecture import Architecture, Architectures, architecture_of
from lockstep.weights.gguf.config import hf_config
from lockstep.weights.gguf.file import BYTES, open_parts
from lockstep.weights.gguf.names import ROPE_FACTORS, hf_name
from lockstep.weights.gguf.undo import Chain, EveryOther, Expert, FromPairs, Rows, Times, Undo
from lockstep.weights.tensor import (
    BLOCK_FORMATS,
    StoredTensor,
    TensorFile,
    TensorInfo,
    TensorMap,
    bounded,
    merge,
    numbers_of,
)


@dataclass(frozen=True)
class Recipe:
    """How to load a Hugging Face tensor: `file` holds it under the name `source`, and `undo` undoes conversion."""

    info: TensorInfo
    file: TensorFile
    source: str
    undo: Undo

    def load(self) -> StoredTensor:
        """The tensor under its Hugging Face name and in its Hugging Face form."""
        stored = replace(self.file.load(self.source), name=self.info.name)
        try:
            return self.undo.apply(stored)
        except ValueError as error:
            raise ValueError(f"{self.file.path}: tensor {self.source!r} {list(stored.shape)}: {error}") from None


def open_gguf(path: Path, architectures: Architectures) -> tuple[list[TensorFile], dict, TensorMap]:
    """Opens a GGUF file, or split file, of one of these architectures: (parts, Hugging Face config, tensors by Hugging
    Face name)."""
    parts = open_parts(path)
    metadata = parts[0].metadata
    stored = merge(parts)
    rope_factors = {name: stored[name].to_f32() for name in ROPE_FACTORS if name in stored}
    architecture = architecture_of(metadata, architectures, str(path))
    config = hf_config(architecture, metadata, stored.info, rope_factors, str(path))
    recipes = _recipes(parts, architecture, config)
    tensors = TensorMap({name: recipe.info for name, recipe in recipes.items()}, lambda name: recipes[name].load())
    return parts, config, tensors


def _recipes(parts: list[TensorFile], architecture: Architecture, config: Mapping) -> dict[str, Recipe]:
    recipes: dict[str, Recipe] = {}
    factors = _factors(parts, architecture)
    stored = ((part, info) for part in parts for name, info in part.infos.items() if name not in factors.beside)
    made = (_recipes_of(part, info, architecture, config, factors.of.get(info.name)) for part, info in stored)
    for recipe in bounded(recipe for several in made for recipe in several):
        name, source = recipe.info.name, recipe.source
        if name in recipes:
            other = recipes[name].source
            raise ValueError(f"{recipe.file.path}: tensors {source!r} and {other!r} are both {name!r}")
        recipes[name] = recipe
    return recipes


class Factors(NamedTuple):
    """of: the factor of a whole tensor, or of each expert, by the tensor's name. beside: the names of factors, and of
    those of activations, which are not used: they are rounded as for all integer formats."""

    of: Mapping[str, StoredTensor]
    beside: Set[str]


def _factors(parts: list[TensorFile], architecture: Architecture) -> Factors:
    """Those beside tensors of formats that have factors, unless the architecture has a tensor of that name itself."""
    homes = {name: part for part in parts for name in part.infos}
    stems = [name.removesuffix(".weight") for name, part in homes.items() if _has_factor(part.infos[name])]
    known = lambda name: name.split(".", 2)[-1] in architecture.names
    names = {f"{stem}.{end}" for stem in stems for end in ("scale", "input_scale")} & homes.keys()
    beside = {name for name in names if not known(name)}
    of = {f"{stem}.weight": f"{stem}.scale" for stem in stems if f"{stem}.scale" in beside}
    return Factors({name: homes[factor].load(factor) for name, factor in of.items()}, beside)


def _has_factor(info: TensorInfo) -> bool:
    return info.format in BLOCK_FORMATS and BLOCK_FORMATS[info.format].times is not None


def _recipes_of(
    part: TensorFile, info: TensorInfo, architecture: Architecture, config: Mapping, factor: StoredTensor | None
) -> list[Recipe]:
    try:
        name = hf_name(architecture, info.name, config["num_hidden_layers"])
        undos = {} if name is None else _undos(name, info, architecture, config)
        if factor is not None:
            undos = {hf: Times(undo, factor) for hf, undo in undos.items()}
        return [Recipe(replace(undo.info(info), name=hf), part, info.name, undo) for hf, undo in undos.items()]
    except ValueError as error:
        raise ValueError(f"{part.path}: tensor {info.name!r} {list(info.shape)}: {error}") from None


def _undos(name: str, info: TensorInfo, architecture: Architecture, config: Mapping) -> dict[str, Undo]:
    """The Hugging Face tensors in one GGUF tensor (several in stacks and joined projections): {name: how to undo
    conversion}."""
    found: dict[str, tuple[Undo, ...]] = {name: ()}
    for mark, parts in MARKS.items():
        if mark in name:
            cuts = parts(name, info, config)
            found = {n.replace(mark, part): (*cut, own) for n, cut in found.items() for part, own in cuts.items()}
    whole = (FromPairs(),) if info.format == BYTES else ()
    return {name: Chain((*cut, *whole, architecture.undo(name, config))) for name, cut in found.items()}


def _matrices(name: str, info: TensorInfo, config: Mapping) -> dict[str, Undo]:
    """The matrices of a stack that is no stack of experts."""
    if len(info.shape) != 3 or info.shape[0] > MAX_MATRICES:
        raise ValueError(f"expected a stack of at most {MAX_MATRICES} matrices")
    return {str(index): Expert(index) for index in range(info.shape[0])}


def _experts(name: str, info: TensorInfo, config: Mapping) -> dict[str, Undo]:
    """The matrix of each expert of a stack."""
    if len(info.shape) != 3 or info.shape[0] != config["num_experts"]:
        raise ValueError(f"expected a stack of {config['num_experts']} experts' matrices")
    return {str(index): Expert(index) for index in numbers_of(info)}


def _alternating(name: str, info: TensorInfo, config: Mapping) -> dict[str, Undo]:
    """Gate and up of rows, or of columns of biases, that alternate: gate, up, gate, ..."""
    if len(info.shape) < 2 or info.shape[1] % 2:
        raise ValueError("expected as many outputs of gates as of what they gate")
    return {part: EveryOther(first, columns="{expert}" not in name) for first, part in enumerate(("gate", "up"))}


def _projections(name: str, info: TensorInfo, config: Mapping) -> dict[str, Undo]:
    """Queries, keys and values, one below the other; values may be missing where they are the keys."""
    layer = name.removeprefix("model.layers.").partition(".")[0]
    own = {**config, **config.get("per_layer_config", {}).get(layer, {})}
    q, k = (own[key] * own["head_dim"] for key in ("num_attention_heads", "num_key_value_heads"))
    parts = {"q": Rows(0, q), "k": Rows(q, q + k), "v": Rows(q + k, q + 2 * k)}
    if info.shape[0] not in (q + k, q + 2 * k):
        raise ValueError(f"expected {q + 2 * k} rows of queries, keys and values, or {q + k} without values")
    return {part: rows for part, rows in parts.items() if part != "v" or info.shape[0] == q + 2 * k}


MAX_MATRICES = 64
MARKS: Mapping[str, Callable[[str, TensorInfo, Mapping], dict[str, Undo]]] = {
    "{expert}": _experts,
    "{matrix}": _matrices,
    "{gate_up}": _alternating,
    "{qkv}": _projections,
}  # in names of tensors that are several
