"""`Family`: what each file in `families` declares about its models."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lockstep.models.config import Config
from lockstep.models.model_config import ModelConfig
from lockstep.models.record import Recorder
from lockstep.runtime.program import Tensor
from lockstep.weights.gguf.architecture import Architecture
from lockstep.weights.tensor import TensorMap


def _as_they_are(tensors: TensorMap) -> TensorMap:
    """The tensors of a checkpoint that names them as the model is recorded."""
    return tensors


@dataclass(frozen=True)
class Family:
    """A model family.

    model_types: the values of model_type in config.json that it reads. read: turns config.json (its text part) into a
    ModelConfig; ValueError for a config that is not supported. record: records the model on a Recorder and returns its
    logits [R, V padded]. tensors: the checkpoint's, cut and named as `record` asks for them. gguf: its GGUF
    architecture, None if GGUF has none. other_gguf: those of its files that name their tensors in other ways. tiny: a
    config.json of a small model with all features of the family, on which the self-check runs kernels; None where other
    families have the same ops.
    """

    model_types: tuple[str, ...]
    read: Callable[[Config], ModelConfig]
    record: Callable[[Recorder, ModelConfig], Tensor]
    tensors: Callable[[TensorMap], TensorMap] = _as_they_are
    gguf: Architecture | None = None
    other_gguf: tuple[Architecture, ...] = ()
    tiny: Mapping[str, Any] | None = None
