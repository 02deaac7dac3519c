"""What a model file says of its family: everything that the rest asks of a model type."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lockstep.models.config import Config
from lockstep.models.model_config import ModelConfig
from lockstep.models.record import Recorder
from lockstep.runtime.program import Tensor
from lockstep.weights.gguf.architecture import Architecture


@dataclass(frozen=True)
class Family:
    """A model family.

    model_types: of config.json. read: config.json (its text part) -> ModelConfig; ValueError for what is not supported.
    record: records the model on a Recorder and returns its logits [R, V padded]. gguf: what GGUF calls it, if it does.
    tiny: a config.json of a small model with all that the family can do, on which the self-check tries kernels; None
    for a family whose kinds of ops others have as well.
    """

    model_types: tuple[str, ...]
    read: Callable[[Config], ModelConfig]
    record: Callable[[Recorder, ModelConfig], Tensor]
    gguf: Architecture | None = None
    tiny: Mapping[str, Any] | None = None
