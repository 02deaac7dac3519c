"""Gemma 3n, text only. As Gemma 4 without its larger heads (values are normed, scores are not scaled, the last layers
read the keys and values of earlier ones, each layer has an input of its own for each token), with these additions: four
streams of hidden rows, of which a layer computes the first and predicts the others (AltUp); a low-rank product beside
attention (Laurel); in some layers most gates of the MLP are zero.

The embedding's factor is that of `gemma3.py`. A vocabulary may be larger than the second embedding: tokens beyond it,
which stand for images and sound, have its row 0, as in transformers.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lockstep.models.config import Config, cap_of, check_keys, layer_types, need
from lockstep.models.decoder import ended
from lockstep.models.families.gemma.gemma3 import SANDWICH_NAMES, THETAS, completed, embed_scale, gguf_base
from lockstep.models.families.gemma.gemma4 import FULL, SLIDING, with_shared_keys
from lockstep.models.families.llama_like import biases, feed_forward, model_of, num_layers, self_attention, with_windows
from lockstep.models.family import Family
from lockstep.models.model_config import Heads, Layer, Mlp, ModelConfig, checked_head_dim
from lockstep.models.per_layer import gated_input, per_layer_inputs
from lockstep.models.record import Norm, Recorder
from lockstep.models.rope_config import ropes_by_type
from lockstep.models.tiny import BASE
from lockstep.ops.attention.rope import natural_exp
from lockstep.ops.elementwise.add import Add, AddScaled
from lockstep.ops.linear.altup import STREAMS, AltupCorrect, AltupPredict, MatchRms
from lockstep.runtime.program import Tensor, Weight
from lockstep.weights.gguf.architecture import Architecture
from lockstep.weights.gguf.keys import Keys
from lockstep.weights.gguf.names import HEAD_NORMS
from lockstep.weights.tensor import StoredTensor, TensorInfo

FLOOR = 1e-5  # of the mean square of a row that gets another's size
DEFAULTS = dict(
    vocab_size=262_400, hidden_size=2048, intermediate_size=16_384, num_hidden_layers=35, num_attention_heads=8,
    num_key_value_heads=2, head_dim=256, rms_norm_eps=1e-6, max_position_embeddings=32_768, sliding_window=512,
    hidden_activation="gelu_pytorch_tanh", final_logit_softcapping=30.0, vocab_size_per_layer_input=262_144,
    hidden_size_per_layer_input=256, num_kv_shared_layers=15, laurel_rank=64, altup_num_inputs=STREAMS,
    altup_active_idx=0, altup_correct_scale=True,
)  # fmt: skip
FIXED = {"altup_num_inputs": STREAMS, "altup_active_idx": 0, "altup_correct_scale": True}
DEVIATIONS = "activation_sparsity_scale"  # of GGUF files: what activation_sparsity_pattern stands for
KEYS = f"""hidden_activation sliding_window layer_types attention_bias final_logit_softcapping num_kv_shared_layers
hidden_size_per_layer_input vocab_size_per_layer_input laurel_rank altup_num_inputs altup_active_idx altup_correct_scale
altup_coef_clip activation_sparsity_pattern rope_local_base_freq {DEVIATIONS}""".split()

# ------------------------------------------------------------ config.json


def read(config: Config) -> ModelConfig:
    """The ModelConfig; keys that a text_config leaves out have the values of `DEFAULTS`. hidden_act is ignored."""
    check_keys(config, KEYS, free=["hidden_act"])
    config = completed(config, DEFAULTS)
    for key, value in FIXED.items():
        if config[key] != value:
            raise ValueError(f"config key {key!r}: {config[key]!r} is not supported, only {value!r}")
    count, rank = num_layers(config), need(config, "laurel_rank")
    types = layer_types(config, SLIDING, FULL) or [FULL if (i + 1) % 5 == 0 else SLIDING for i in range(count)]
    heads = heads_by_type(config)
    width, input_width = widths_of(config, count), need(config, "hidden_size_per_layer_input")
    layers = [
        Layer(heads[layer_type], Mlp(width[i], "gelu_tanh", deviations=deviations), None, input_width, rank)
        for i, (layer_type, deviations) in enumerate(zip(types, deviations_of(config, count), strict=True))
    ]
    layers = with_shared_keys(with_windows(layers, config, types), types, config)
    cap = cap_of(config, "final_logit_softcapping")
    rows = need(config, "vocab_size_per_layer_input", high=need(config, "vocab_size"))
    return model_of(config, layers, tied=True, logit_cap=cap, input_rows=rows)


def heads_by_type(config: Config) -> dict[str, Heads]:
    """The heads of a layer of each type, still without their windows."""
    head_dim = checked_head_dim(need(config, "head_dim"))
    counts = need(config, "num_attention_heads"), need(config, "num_key_value_heads")
    ropes = ropes_by_type(config, head_dim, THETAS)
    return {
        layer_type: Heads(*counts, head_dim, scale=1.0, rope=rope, norms_values=True, **biases(config))
        for layer_type, rope in ropes.items()
    }


def widths_of(config: Config, count: int) -> list[int]:
    """The width of each layer's MLP: a number for all, or one for each."""
    given = config["intermediate_size"]
    if not isinstance(given, list):
        return [need(config, "intermediate_size")] * count
    if len(given) != count:
        raise ValueError(f"config key 'intermediate_size': expected {count} numbers, got {len(given)}")
    return [need({"intermediate_size": width}, "intermediate_size") for width in given]


def deviations_of(config: Config, count: int) -> list[float | None]:
    """The cutoff of each layer's gates, in standard deviations above their mean; None for layers without one."""
    if (given := config.get(DEVIATIONS)) is not None:
        return [cutoff if -100 < cutoff < 100 else None for cutoff in _numbers(given, DEVIATIONS, count)]
    key = "activation_sparsity_pattern"
    usual = [0.95] * 10 + [0.0] * (count - 10) if count > 10 else [0.0] * count
    shares = _numbers(config.get(key, usual), key, count)
    if wrong := [share for share in shares if not 0 <= share < 1]:
        raise ValueError(f"config key {key!r}: expected numbers from 0, below 1, got {wrong[0]}")
    return [quantile(share) if share else None for share in shares]


def _numbers(given: Any, key: str, count: int) -> list[float]:
    """A list of numbers, one for each layer."""
    is_list = isinstance(given, list) and all(isinstance(n, (int, float)) and not isinstance(n, bool) for n in given)
    if not is_list or len(given) != count:
        raise ValueError(f"config key {key!r}: expected {count} numbers, got {given!r:.80}")
    return [float(n) for n in given]


def quantile(share: float) -> float:
    """How many standard deviations above its mean a normal number is larger than this share of others.

    Error: 1e-12. Order: bisection of -9 to 9 on the series of the normal distribution; libm is not called.
    """
    low, high = -9.0, 9.0
    while high - low > 1e-13:
        middle = (low + high) / 2
        low, high = (middle, high) if _share_below(middle) < share else (low, middle)
    return (low + high) / 2


def _share_below(x: float) -> float:
    """The standard normal distribution: 0.5 + density(x) * (x + x^3 / 3 + x^5 / 15 + ...)."""
    total, term, n = 0.0, x, 1
    while abs(term) > 1e-18 * abs(total) and n < 1000:
        total += term
        n += 2
        term *= x * x / n
    return 0.5 + natural_exp(-x * x / 2) * 0.3989422804014327 * total


# ------------------------------------------------------------ the model


def record(ops: Recorder, config: ModelConfig) -> Tensor:
    """Records the model; returns its logits. The mean of four streams is their sum, in a norm with 16 times the eps."""
    prefix, D = ops.prefix, config.hidden_size
    x = ops.embed(f"{prefix}embed_tokens.weight", config.vocab_size, D, embed_scale(config))
    inputs = per_layer_inputs(ops, x, config)
    streams = [x, *(matched(ops, x, x, f"{prefix}altup_projections.{i}") for i in range(STREAMS - 1))]
    for i, shape in enumerate(config.layers):
        streams = layer(ops, streams, config, shape, i, inputs)
    total, *others = streams
    for i, stream in enumerate(others):
        y = matched(ops, stream, streams[0], f"{prefix}altup_unembed_projections.{i}")
        total = ops.add(total, y)
    return ended(ops, total, config, config.rms_eps * STREAMS**2)


def matched(ops: Recorder, x: Tensor, like: Tensor, name: str) -> Tensor:
    """A projection of x, with the root mean square of `like`."""
    projected = ops.linear(x, [(name, x.width)])
    out = ops.program.tensor(f"{name}.matched", x.rows, x.width)
    return ops.program.emit(MatchRms(out=out, x=projected, like=like, width=x.width, floor=FLOOR))


def layer(
    ops: Recorder, streams: Sequence[Tensor], config: ModelConfig, shape: Layer, index: int, inputs: Tensor
) -> list[Tensor]:
    """The streams after a layer: what it does to the first one corrects the predictions of all.

    a = prediction of the first; n = norm(a); y = (a + norm(attention(n)) + n + norm(laurel(n))) / sqrt(2);
    y += norm(mlp(norm(y))); to all corrected streams but the first is added norm(gated input).
    """
    label = f"{ops.prefix}layers.{index}"

    def norm(h: Tensor, name: str) -> Tensor:
        return ops.rms_norm(h, f"{label}.{name}.weight", config.rms_eps)

    predicted = predictions(ops, streams, config, f"{label}.altup")
    n = norm(predicted[0], "input_layernorm")
    h = self_attention(ops, n, shape.mixer, f"{label}.self_attn", head_norms=Norm(config.rms_eps))
    low = ops.linear(n, [(f"{label}.laurel.linear_left", shape.side_rank)])
    low = ops.linear(low, [(f"{label}.laurel.linear_right", n.width)])
    laurel = ops.add(n, norm(low, "laurel.post_laurel_norm"))
    y = ops.add(predicted[0], norm(h, "post_attention_layernorm"))
    y = halved(ops, y, laurel, f"{label}.laurel.added")
    h = feed_forward(ops, norm(y, "pre_feedforward_layernorm"), shape.mlp, f"{label}.mlp")
    y = ops.add(y, norm(h, "post_feedforward_layernorm"))
    *corrected, first = corrections(ops, predicted, y, config, f"{label}.altup")
    h = norm(gated_input(ops, first, inputs, index, shape.input_width, label), "post_per_layer_input_norm")
    if isinstance(shape.mixer, Heads) and shape.mixer.keys_of is not None:  # transformers ignores them, too
        ops.ignore(*(f"{label}.self_attn.{name}.weight" for name in ("k_proj", "v_proj", "k_norm")))
    return [corrected[0], *(added(ops, x, h, f"{label}.stream{j}") for j, x in enumerate(corrected[1:], 1))]


def halved(ops: Recorder, x: Tensor, y: Tensor, label: str) -> Tensor:
    """(x + y) / sqrt(2)."""
    half = StoredTensor("half_root", "f32", (1,), np.array([math.sqrt(0.5)], np.float32))
    factor = Weight("half_root", "f32", (1,), (half,))
    out = ops.program.tensor(label, x.rows, x.width)
    return ops.program.emit(AddScaled(out=out, x=x, y=y, factor=factor, width=x.width))


def added(ops: Recorder, x: Tensor, y: Tensor, label: str) -> Tensor:
    """x + y, under a name of its own."""
    return ops.program.emit(Add(out=ops.program.tensor(label, x.rows, x.width), x=x, y=y, width=x.width))


def modalities(ops: Recorder, x: Tensor, config: ModelConfig, label: str, name: str) -> Tensor:
    """The router's logits [rows, 16], of which the first four count: of x / rms(x) * weight / D."""
    weight = ops.scaled_constant(f"{label}.router_norm.weight", 1 / x.width, x.width)
    seen = ops.rms_norm_by(x, weight, f"{label}.{name}.router_norm", config.rms_eps)
    return ops.linear(seen, [(f"{label}.modality_router", STREAMS)], f"{label}.{name}.modality_router")


def predictions(ops: Recorder, streams: Sequence[Tensor], config: ModelConfig, label: str) -> Sequence[Tensor]:
    """What the layer is expected to make of each stream."""
    logits = modalities(ops, streams[0], config, label, "predict")
    op = AltupPredict(
        **{f"out{j}": ops.program.tensor(f"{label}.predicted{j}", x.rows, x.width) for j, x in enumerate(streams)},
        **{f"x{j}": x for j, x in enumerate(streams)},
        logits=logits,
        coefs=ops.constant(f"{label}.prediction_coefs.weight", STREAMS**2, STREAMS),
        width=streams[0].width,
        logits_width=logits.width,
    )
    ops.program.emit(op)
    return op.outputs


def corrections(
    ops: Recorder, predicted: Sequence[Tensor], y: Tensor, config: ModelConfig, label: str
) -> Sequence[Tensor]:
    """The streams corrected by y, what the first one became; and the first one scaled."""
    logits = modalities(ops, y, config, label, "correct")
    op = AltupCorrect(
        **{f"out{j}": ops.program.tensor(f"{label}.corrected{j}", y.rows, y.width) for j in range(STREAMS)},
        first=ops.program.tensor(f"{label}.first", y.rows, y.width),
        **{f"p{j}": x for j, x in enumerate(predicted)},
        y=y,
        logits=logits,
        coefs=ops.constant(f"{label}.correction_coefs.weight", STREAMS, STREAMS),
        scale=ops.constant(f"{label}.correct_output_scale", y.width),
        width=y.width,
        logits_width=logits.width,
    )
    ops.program.emit(op)
    return op.outputs


# ------------------------------------------------------------ GGUF

NAMES = {
    **SANDWICH_NAMES,
    **HEAD_NORMS,
    "altup_router": "altup.modality_router",
    "altup_router_norm": "altup.router_norm",
    "altup_predict_coef": "altup.prediction_coefs",
    "altup_correct_coef": "altup.correction_coefs",
    "altup_correct_scale.weight": "altup.correct_output_scale",
    "laurel_l": "laurel.linear_left",
    "laurel_r": "laurel.linear_right",
    "laurel_post_norm": "laurel.post_laurel_norm",
    "inp_gate": "per_layer_input_gate",
    "proj": "per_layer_projection",
    "post_norm": "post_per_layer_input_norm",
}
TOP_NAMES = {
    "per_layer_token_embd": "model.embed_tokens_per_layer",
    "per_layer_model_proj": "model.per_layer_model_projection",
    "per_layer_proj_norm": "model.per_layer_projection_norm",
    "altup_proj": "model.altup_projections.{matrix}",
    "altup_unembd_proj": "model.altup_unembed_projections.{matrix}",
}


def gguf_config(config: dict, keys: Keys, tensors: Mapping[str, TensorInfo]) -> dict:
    """Adds what differs between layers, and what llama.cpp hard-codes: the soft cap."""
    count, first = config["num_hidden_layers"], tensors.get("blk.0.laurel_l.weight")
    slides, second = keys.values("attention.sliding_window_pattern"), tensors.get("per_layer_token_embd.weight")
    others = {key: value for key, value in gguf_base(config, 0).items() if key != "query_pre_attn_scalar"}
    return others | {
        "intermediate_size": keys.per_layer("feed_forward_length", count),
        "layer_types": None if slides is None else [SLIDING if here else FULL for here in slides],
        "sliding_window": keys.integer("attention.sliding_window"),
        "rope_local_base_freq": keys.number("rope.freq_base_swa", 10000.0),
        "num_kv_shared_layers": keys.integer("attention.shared_kv_layers", max(0, count - 20)),
        "final_logit_softcapping": keys.number("final_logit_softcapping", 30.0),
        DEVIATIONS: keys.values(DEVIATIONS),
        "altup_num_inputs": keys.integer("altup.num_inputs", STREAMS),
        "altup_active_idx": keys.integer("altup.active_idx", 0),
        "hidden_size_per_layer_input": keys.integer("embedding_length_per_layer_input"),
        "vocab_size_per_layer_input": second.shape[0] if second is not None else config["vocab_size"],
        "laurel_rank": first.shape[0] if first is not None else 64,
    }


GEMMA3N = Family(
    model_types=("gemma3n_text",),
    read=read,
    record=record,
    gguf=Architecture(
        "gemma3n",
        "gemma3n_text",
        "Gemma3nForCausalLM",
        NAMES,
        gguf_config,
        top_names=TOP_NAMES,
        varying=frozenset(("feed_forward_length",)),
    ),
    tiny={
        **{key: value for key, value in BASE.items() if key != "hidden_act"},
        "model_type": "gemma3n_text",
        "num_hidden_layers": 4,
        "layer_types": [SLIDING, FULL] * 2,
        "sliding_window": 40,
        "num_kv_shared_layers": 2,
        "hidden_size_per_layer_input": 64,
        "vocab_size_per_layer_input": BASE["vocab_size"],
        "laurel_rank": 32,
        "final_logit_softcapping": 3.0,
        "activation_sparsity_pattern": [0.75, 0.0, 0.0, 0.5],
    },
)
