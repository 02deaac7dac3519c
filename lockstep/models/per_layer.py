"""Recording the inputs of their own that layers get from a second embedding and from a projection of the first one."""

import math

from lockstep.models.model_config import ModelConfig
from lockstep.models.record import Recorder
from lockstep.ops.linear.per_layer import PerLayerGate, PerLayerInputs
from lockstep.runtime.program import Tensor


def per_layer_inputs(ops: Recorder, x: Tensor, config: ModelConfig) -> Tensor:
    """The inputs of all layers side by side [T, layers * width], from the embedded tokens x:

        (rms_norm(projection(x) / sqrt(D)) + second embedding * sqrt(width)) / sqrt(2)

    The projection's factor is in the norm's eps, the last one in the norm's weight and in the embedding's factor. The
    second embedding, which may be larger than all other weights, stays in its file.
    """
    width, prefix = config.layers[0].input_width, ops.prefix
    total = width * config.num_layers
    half, name = math.sqrt(0.5), f"{prefix}embed_tokens_per_layer"
    num_rows = config.input_rows or config.vocab_size
    embedded = ops.embed_from_file(f"{name}.weight", num_rows, total, half * math.sqrt(width), name)
    projected = ops.linear(x, [(f"{prefix}per_layer_model_projection", total)])
    return ops.program.emit(
        PerLayerInputs(
            out=ops.program.tensor(f"{prefix}per_layer_inputs", x.rows, total),
            x=projected,
            embedded=embedded,
            weight=ops.scaled_constant(f"{prefix}per_layer_projection_norm.weight", half, width),
            num_layers=config.num_layers,
            width=width,
            eps=config.rms_eps * config.hidden_size,
        )
    )


def gated_input(ops: Recorder, x: Tensor, values: Tensor, index: int, width: int, label: str) -> Tensor:
    """projection(gelu(gate(x)) * the input of the layer number `index`), one of `values`."""
    gate = ops.linear(x, [(f"{label}.per_layer_input_gate", width)])
    h = ops.program.emit(
        PerLayerGate(
            out=ops.program.tensor(f"{label}.per_layer_gated", x.rows, width),
            gate=gate,
            values=values,
            width=width,
            values_width=values.width,
            column=index * width,
        )
    )
    return ops.linear(h, [(f"{label}.per_layer_projection", x.width)])
