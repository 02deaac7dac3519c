"""Seed-OSS: Llama with biases on q, k and v if attention_bias, on the attention's output if attention_out_bias, and in
the MLP if mlp_bias."""

from collections.abc import Container
from functools import partial

from lockstep.models.config import Config, check_keys, flag
from lockstep.models.decoder import decoder
from lockstep.models.families.llama_like import heads_of, layer, mlp_of, model_of, num_layers
from lockstep.models.family import Family
from lockstep.models.model_config import Layer, ModelConfig
from lockstep.weights.gguf.architecture import Architecture, has_biases
from lockstep.weights.gguf.keys import Keys
from lockstep.weights.gguf.names import ATTENTION, MLP


def read(config: Config) -> ModelConfig:
    """The ModelConfig."""
    check_keys(config, ["attention_bias", "attention_out_bias", "mlp_bias"], free=["mlp_bias"])
    config = {"head_dim": 128, **config}
    qkv_bias, o_bias = flag(config, "attention_bias", True), flag(config, "attention_out_bias")
    heads = heads_of(config, qkv_bias=qkv_bias, o_bias=o_bias)
    return model_of(config, [Layer(heads, mlp_of(config, bias=flag(config, "mlp_bias")))] * num_layers(config))


def gguf_config(config: dict, keys: Keys, names: Container[str]) -> dict:
    """Adds biases."""
    out = {"attention_out_bias": "blk.0.attn_output.bias" in names}
    return config | has_biases(names, "attention_bias", "mlp_bias") | out


NAMES = {**ATTENTION, **MLP, "post_attention_norm": "post_attention_layernorm"}
SEED_OSS = Family(
    model_types=("seed_oss",),
    read=read,
    record=partial(decoder, layer=layer),
    gguf=Architecture("seed_oss", "seed_oss", "SeedOssForCausalLM", NAMES, gguf_config),
)
