"""What a model family says of its GGUF files: the name of its architecture, its tensors' names, and what conversion did
to them."""

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field

from lockstep.weights.gguf.keys import Keys
from lockstep.weights.gguf.undo import Undo


def _as_it_is(config: dict, keys: Keys, names: Container[str]) -> dict:
    """The config of an architecture that has nothing of its own."""
    return config


def _nothing(name: str, config: Mapping) -> Undo:
    """What is undone where conversion changed nothing."""
    return Undo()


@dataclass(frozen=True)
class Architecture:
    """A GGUF architecture.

    name: its `general.architecture`. model_type, class_name: of the Hugging Face model it was made from. names: of
    tensors within a block, GGUF's and Hugging Face's; see `gguf_names`. config: (config.json as far as all have it,
    metadata, names of the file's tensors) -> config.json. undo: (Hugging Face name, config.json) -> what was done to
    the tensor. mtp_names: as names, of blocks that are multi-token-prediction layers.
    """

    name: str
    model_type: str
    class_name: str
    names: Mapping[str, str]
    config: Callable[[dict, Keys, Container[str]], dict] = _as_it_is
    undo: Callable[[str, Mapping], Undo] = _nothing
    mtp_names: Mapping[str, str] = field(default_factory=dict)


Architectures = Mapping[str, Architecture]  # by name


def has_biases(names: Container[str], *keys: str) -> dict[str, bool]:
    """For keys of config.json, attention_bias and mlp_bias, whether a file has such tensors."""
    signs = {"attention_bias": "blk.0.attn_q.bias", "mlp_bias": "blk.0.ffn_gate.bias"}
    return {key: signs[key] in names for key in keys}


def architecture_of(metadata: Mapping[str, object], architectures: Architectures, where: str) -> Architecture:
    """The file's architecture. Raises ValueError unless it is one of those."""
    name = metadata.get("general.architecture")
    if not isinstance(name, str) or name not in architectures:
        raise ValueError(f"{where}: architecture {name!r} is not supported, only {', '.join(architectures)}")
    return architectures[name]
