"""Opening checkpoints of the model families that can be run, and checkpoints that have only a config.json."""

import logging
from collections.abc import Iterable
from pathlib import Path

from lockstep.models.config import end_ids, text_config
from lockstep.models.recording import record_on
from lockstep.models.registry import ARCHITECTURES, model_config
from lockstep.models.shapes import AnyTensor, only_shape
from lockstep.weights import checkpoint
from lockstep.weights.checkpoint import Checkpoint, refuse_adapter
from lockstep.weights.folders import mistral
from lockstep.weights.mapped import read_json_object
from lockstep.weights.tensor import TensorInfo, TensorMap

log = logging.getLogger("lockstep.model")


def open_checkpoint(path: str | Path, *, verify: bool = False) -> Checkpoint:
    """Open a Hugging Face folder, a .safetensors file beside its config.json, or a .gguf file.

    verify: hash all weights, even if their hash is remembered.

    Raises ValueError that names the file (and the tensor, if a tensor is wrong), what was expected and what was found.
    """
    return checkpoint.open_checkpoint(path, ARCHITECTURES, verify=verify)


def open_config(folder: Path, matrix_format: str = "bf16") -> Checkpoint:
    """A checkpoint from a config.json, or Mistral's params.json, without weights: every tensor that the model reads, as
    zeros of its shape.

    matrix_format: the format that matrices claim to have; all other tensors are float32.
    """
    refuse_adapter(folder)
    config = mistral.config_of(folder) if mistral.is_native(folder) else read_json_object(folder / "config.json")
    ops = AnyTensor()
    record_on(ops, model_config(config))
    tensors = {name: only_shape(name, shape, matrix_format) for name, shape in ops.shapes.items()}
    infos = {name: TensorInfo(name, t.format, t.shape, t.data.nbytes) for name, t in tensors.items()}
    return Checkpoint(folder, config, {}, TensorMap(infos, tensors.__getitem__), {}, ())


def end_of_sequence_ids(opened: Checkpoint, of_tokenizer: Iterable[int] = ()) -> frozenset[int]:
    """Every end-of-sequence id that the config, the generation config or the tokenizer names; those that the model has
    no token for are ignored, with a warning."""
    config, vocab_size = opened.config, model_config(opened.config).vocab_size
    ids = {
        *end_ids(config),
        *end_ids(text_config(config)),
        *end_ids(opened.generation_config, "generation_config.json"),
        *of_tokenizer,
    }
    if strange := sorted(i for i in ids if not 0 <= i < vocab_size):
        log.warning("%s: end tokens %s are ignored: the model has %d tokens", opened.path, strange, vocab_size)
    return frozenset(ids.difference(strange))
