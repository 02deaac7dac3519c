"""`Architecture`: what a model family declares about its GGUF files: name, config, tensor names, undoing conversion."""

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from lockstep.weights.gguf.keys import Keys
from lockstep.weights.gguf.undo import Undo
from lockstep.weights.tensor import TensorInfo


def _no_own_keys(config: dict, keys: Keys, names: Container[str]) -> dict:
    """The config of an architecture without keys of its own."""
    return config


def _unchanged(name: str, config: Mapping) -> Undo:
    """The Undo of an architecture whose conversion changes no tensor."""
    return Undo()


@dataclass(frozen=True)
class Architecture:
    """A GGUF architecture.

    name: the value of `general.architecture`. also: its other values, in files that differ in nothing else. model_type,
    class_name: of the Hugging Face model. names: tensor names within a block, GGUF's -> Hugging Face's; see `names.py`.
    config: completes a config.json, called with (the keys that all architectures have, the file's metadata, its
    tensors). undo: (Hugging Face name, config.json) -> how to undo what conversion did to the tensor. mtp_names:
    as names, in blocks that are multi-token-prediction layers. top_names: as names, outside blocks, besides those that
    all architectures have. varying: keys of the metadata that may differ between layers. rope_factors: reads the tensor
    rope_freqs.weight, float32, given the number of rotated channels and the file: the rope's parameters in config.json.
    None: those of llama3.
    """

    name: str
    model_type: str
    class_name: str
    names: Mapping[str, str]
    config: Callable[[dict, Keys, Mapping[str, TensorInfo]], dict] = _no_own_keys
    undo: Callable[[str, Mapping], Undo] = _unchanged
    mtp_names: Mapping[str, str] = field(default_factory=dict)
    also: tuple[str, ...] = ()
    top_names: Mapping[str, str] = field(default_factory=dict)
    varying: frozenset[str] = frozenset()
    rope_factors: Callable[[np.ndarray, int, str], dict] | None = None

    def by_name(self) -> Mapping[str, "Architecture"]:
        """The architecture under each of its names."""
        return {self.name: self, **{name: replace(self, name=name) for name in self.also}}


Architectures = Mapping[str, Architecture]  # by name
MODEL = "model"  # general.type of the files that are read, which older ones do not have
NO_MODELS = {  # by general.type
    "adapter": "adapters such as LoRA are not supported: merge it into its base model",
    "mmproj": "the vision or sound of a model, of which only the text part is read: name the file of that",
    "imatrix": "what a quantizer was told, it has no weights",
}


def has_biases(names: Container[str], *keys: str) -> dict[str, bool]:
    """attention_bias and mlp_bias of config.json, from whether the file has such tensors. keys: which of the two."""
    tensors = {"attention_bias": ("attn_q", "attn_qkv"), "mlp_bias": ("ffn_gate",)}
    return {key: any(f"blk.0.{tensor}.bias" in names for tensor in tensors[key]) for key in keys}


def architecture_of(metadata: Mapping[str, object], architectures: Architectures, where: str) -> Architecture:
    """The file's architecture. Raises ValueError if it is not one of `architectures`."""
    kind = metadata.get("general.type", MODEL)
    if kind != MODEL:
        what = NO_MODELS.get(kind) if isinstance(kind, str) else None
        raise ValueError(f"{where}: general.type is {kind!r}, expected {MODEL!r}: {what or 'nothing else is read'}")
    name = metadata.get("general.architecture")
    if not isinstance(name, str) or name not in architectures:
        raise ValueError(f"{where}: architecture {name!r} is not supported, only {', '.join(sorted(architectures))}")
    return architectures[name]
