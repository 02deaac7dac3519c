"""Checkpoints of the model families that can be run."""

from pathlib import Path

from lockstep.models.recording import record_on
from lockstep.models.registry import ARCHITECTURES, model_config
from lockstep.models.shapes import AnyTensor, only_shape
from lockstep.weights import checkpoint
from lockstep.weights.checkpoint import Checkpoint
from lockstep.weights.mapped import read_json_object
from lockstep.weights.tensor import TensorInfo, TensorMap


def open_checkpoint(path: str | Path, *, verify: bool = False) -> Checkpoint:
    """Open a Hugging Face folder, a .safetensors file beside its config.json, or a .gguf file.

    verify: hash all of the weights, although their hash may be known.

    Raises ValueError that names the file, and the tensor if it is one, what was expected and what was found.
    """
    return checkpoint.open_checkpoint(path, ARCHITECTURES, verify=verify)


def open_config(folder: Path, matrices: str = "bf16") -> Checkpoint:
    """A folder that holds a config.json and no weights: every tensor that the model asks for, as a shape.

    matrices: the format that those are said to have; all else is float32.
    """
    config, ops = read_json_object(folder / "config.json"), AnyTensor()
    record_on(ops, model_config(config))
    made = {name: only_shape(name, shape, matrices) for name, shape in ops.shapes.items()}
    infos = {name: TensorInfo(name, t.format, t.shape, t.data.nbytes) for name, t in made.items()}
    return Checkpoint(folder, config, {}, TensorMap(infos, made.__getitem__), {}, ())
