"""Gemma 2: norms before and after attention and the MLP, a gated MLP with GELU, soft caps of scores and of logits.
Every second layer has a sliding window, the first one included.

The embedding's factor is that of `gemma3.py`.
"""

from collections.abc import Container
from functools import partial

from lockstep.models.config import Config, cap_of, check_keys, layer_types
from lockstep.models.decoder import decoder
from lockstep.models.families.gemma.gemma3 import (
    OFFSET,
    SANDWICH_NAMES,
    completed,
    embed_scale,
    gguf_base,
    layer,
    scale_of,
    undo,
)
from lockstep.models.families.llama_like import heads_of, mlp_of, model_of, num_layers, with_heads, with_windows
from lockstep.models.family import Family
from lockstep.models.model_config import Layer, ModelConfig
from lockstep.models.record import Recorder
from lockstep.models.tiny import BASE
from lockstep.runtime.program import Tensor
from lockstep.weights.gguf.architecture import Architecture
from lockstep.weights.gguf.keys import Keys

TYPES = "sliding_attention", "full_attention"  # in turn
KEYS = """hidden_activation query_pre_attn_scalar sliding_window layer_types attn_logit_softcapping
final_logit_softcapping sliding_window_size""".split()
CAPS = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}  # where the key is absent; null is no cap
DEFAULTS = dict(
    vocab_size=256_000, num_attention_heads=8, num_key_value_heads=4, head_dim=256, rms_norm_eps=1e-6,
    max_position_embeddings=8192, query_pre_attn_scalar=256, sliding_window=4096,
    hidden_activation="gelu_pytorch_tanh",
)  # fmt: skip

# ------------------------------------------------------------ config.json


def read(config: Config) -> ModelConfig:
    """The ModelConfig. hidden_act is ignored, as in transformers."""
    check_keys(config, KEYS, free=["hidden_act"])
    attention_cap, logit_cap = (cap_of({**CAPS, **config}, key) for key in CAPS)
    config = completed(config, DEFAULTS)
    one = Layer(heads_of(config), mlp_of(config, activation="gelu_tanh"))
    one = with_heads(one, scale=scale_of(config), soft_cap=attention_cap)
    types = layer_types(config, *TYPES) or [TYPES[i % 2] for i in range(num_layers(config))]
    return model_of(config, with_windows([one] * len(types), config, types), tied=True, logit_cap=logit_cap)


# ------------------------------------------------------------ the model


def record(ops: Recorder, config: ModelConfig) -> Tensor:
    """Records the model; returns its logits."""
    one = partial(layer, has_head_norms=False)
    return decoder(ops, config, one, norm_offset=OFFSET, embed_scale=embed_scale(config))


# ------------------------------------------------------------ GGUF


def gguf_config(config: dict, keys: Keys, names: Container[str]) -> dict:
    """Adds the caps and the window, and what llama.cpp hard-codes."""
    return gguf_base(config, num_largest=46) | {
        "attn_logit_softcapping": keys.number("attn_logit_softcapping", 50.0) or None,
        "final_logit_softcapping": keys.number("final_logit_softcapping", 30.0) or None,
        "sliding_window": keys.integer("attention.sliding_window", 4096),
    }


GEMMA2 = Family(
    model_types=("gemma2",),
    read=read,
    record=record,
    gguf=Architecture("gemma2", "gemma2", "Gemma2ForCausalLM", SANDWICH_NAMES, gguf_config, undo),
    tiny={
        **{key: value for key, value in BASE.items() if key != "hidden_act"},
        "model_type": "gemma2",
        "num_hidden_layers": 2,
        "query_pre_attn_scalar": 24,
        "sliding_window": 40,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 3.0,
    },
)
