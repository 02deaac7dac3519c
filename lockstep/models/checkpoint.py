"""Checkpoints of the model families that can be run."""

from pathlib import Path

from lockstep.models.registry import ARCHITECTURES
from lockstep.weights import checkpoint
from lockstep.weights.checkpoint import Checkpoint


def open_checkpoint(path: str | Path, *, verify: bool = False) -> Checkpoint:
    """Open a Hugging Face folder, a .safetensors file beside its config.json, or a .gguf file.

    verify: hash all of the weights, although their hash may be known.

    Raises ValueError that names the file, and the tensor if it is one, what was expected and what was found.
    """
    return checkpoint.open_checkpoint(path, ARCHITECTURES, verify=verify)
