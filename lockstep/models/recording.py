"""Recording a whole model: its program, from its ModelConfig and its checkpoint's tensors (`Recorder`: `record.py`)."""

from lockstep.models.model_config import ModelConfig
from lockstep.models.record import Recorder
from lockstep.models.registry import family_of
from lockstep.ops.linear.output_rows import output_rows_only
from lockstep.runtime.program import Program, Tensor
from lockstep.weights.brief import brief_errors
from lockstep.weights.tensor import TensorMap

PREFIXES = ("model.language_model.", "language_model.model.", "model.text_model.", "model.", "")


@brief_errors()
def record(
    config: ModelConfig, tensors: TensorMap, weights: str = "auto", kv_dtype: str = "bf16", max_context: int = 4096
) -> tuple[Program, Tensor]:
    """The program of a model: (Program, logits tensor [R, V padded]).

    tensors: by Hugging Face name. weights, kv_dtype: see Recorder.
    """
    tensors = family_of(config.model_type).tensors(tensors)
    ops = Recorder(tensors, text_prefix(tensors), weights, kv_dtype, max_context)
    program, logits = record_on(ops, config)
    ops.check_all_used()
    return program, logits


def record_on(ops: Recorder, config: ModelConfig) -> tuple[Program, Tensor]:
    """`record`, on a Recorder that the caller made."""
    logits = family_of(config.model_type).record(ops, config)
    return output_rows_only(ops.program), logits


def text_prefix(tensors: TensorMap) -> str:
    """The prefix of the text model's tensor names. ValueError for a checkpoint without an embedding."""
    prefix = next((p for p in PREFIXES if f"{p}embed_tokens.weight" in tensors), None)
    if prefix is None:
        raise ValueError("tensor 'model.embed_tokens.weight' is missing from the checkpoint")
    return prefix
