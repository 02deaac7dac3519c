"""Reading single keys of config.json, and refusing keys that are not supported.

The numbers that come out of it, a `ModelConfig`, are declared in `model_config.py`.
"""

from collections.abc import Iterable, Mapping
from typing import Any

Config = Mapping[str, Any]  # the content of a config.json
# A key whose name contains one of these words probably changes the arithmetic.
MATHS = """scal softcap bias norm rope rotary window expert moe multiplier factor act clip attention attn residual logit
sink kv head layer mlp router quant position linear temperature_tuning mtp embedd""".split()

# Keys that every family reads; a family lists its own keys in its file.
READ = frozenset(
    """model_type vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads
num_key_value_heads head_dim hidden_act rms_norm_eps tie_word_embeddings max_position_embeddings
original_max_position_embeddings rope_theta rope_scaling rope_parameters partial_rotary_factor eos_token_id""".split()
)
# Keys that do not change inference on text.
NEUTRAL = frozenset(
    """architectures attention_dropout residual_dropout hidden_dropout classifier_dropout embd_pdrop
attn_pdrop resid_pdrop initializer_range use_cache cache_implementation output_router_logits router_aux_loss_coef
router_jitter_noise pretraining_tp mamba_ssm_dtype num_labels _attn_implementation attn_implementation
output_attentions output_hidden_states chunk_size_feed_forward vision_config image_token_id video_token_id
vision_start_token_id vision_end_token_id tie_encoder_decoder _attn_implementation_autoset _flash_attn_2_enabled
use_flash_attn text_config quantization_config compression_config quantization pixel_shuffle_factor""".split()
)
# Keys of a multimodal config, outside its text part, that say how images become rows.
OF_IMAGES = """image_token_index multimodal_projector_bias projector_hidden_act spatial_merge_size vision_feature_layer
scale_factor""".split()
ALLOWED_VALUES = {
    "hidden_act": ("silu", "swish"),
    "mlp_bias": (False,),
    "is_causal": (True,),
    "attn_output_gate": (True,),
    "partial_rotary_factor": (1,),
    "mtp_use_dedicated_embeddings": (False,),
    "decoder_sparse_step": (1,),
    "mlp_only_layers": ([],),
}


def need(config: Config, key: str, low: int = 1, high: int = 1 << 31) -> int:
    """A required integer of a config, within bounds."""
    return int(_within(config, key, int, low, high))


def need_float(config: Config, key: str, low: float, high: float) -> float:
    """A required number of a config, within bounds."""
    return float(_within(config, key, (int, float), low, high))


def _within(config: Config, key: str, types: type | tuple[type, ...], low: float, high: float) -> Any:
    value: Any = config.get(key)
    if not isinstance(value, types) or isinstance(value, bool):
        raise ValueError(f"config key {key!r}: expected a number, got {value!r}")
    if not low <= value <= high:
        raise ValueError(f"config key {key!r}: expected {low} to {high}, got {value}")
    return value


def cap_of(config: Config, key: str) -> float:
    """A soft cap, c of c tanh(x / c); 0 for one that is absent."""
    return optional_float(config, key, 0.0, 1e-3, 1e6)


def optional_float(config: Config, key: str, default: float, low: float, high: float) -> float:
    """A number of a config, within bounds, or the default where it is absent."""
    return default if config.get(key) is None else need_float(config, key, low, high)


def optional(config: Config, key: str, default: int, low: int = 1) -> int:
    """An integer of a config, or the default where it is absent."""
    return default if config.get(key) is None else need(config, key, low=low)


def flag(config: Config, key: str, default: bool = False) -> bool:
    """A boolean of a config, or the default where it is absent."""
    value: Any = config.get(key)
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"config key {key!r}: expected true or false, got {value!r}")
    return default if value is None else value


def end_ids(config: Config, where: str = "config") -> tuple[int, ...]:
    """The ids in eos_token_id: one, several or none. Some files name ids outside the vocabulary."""
    eos = config.get("eos_token_id")
    ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if not all(type(i) is int for i in ids):
        raise ValueError(f"{where} key 'eos_token_id': expected token ids, got {eos!r}")
    return tuple(ids)


def is_headless(config: Config) -> bool:
    """Whether the config's model class has no language-model head: Qwen3Model, not Qwen3ForCausalLM."""
    names = config.get("architectures")
    return isinstance(names, list) and bool(names) and all(isinstance(n, str) and n.endswith("Model") for n in names)


def layer_types(config: Config, *allowed: str) -> list[str] | None:
    """The type of each layer, one of `allowed`; None where the config has no layer_types."""
    types, num_layers = config.get("layer_types"), need(config, "num_hidden_layers", high=1000)
    if types is None:
        return None
    if not isinstance(types, list) or len(types) != num_layers or any(t not in allowed for t in types):
        raise ValueError(f"config key 'layer_types': expected {num_layers} of {' and '.join(allowed)}, got {types!r}")
    return types


def check_keys(config: Config, read: Iterable[str] = (), free: Iterable[str] = ()) -> None:
    """ValueError for an unsupported value, and for an unsupported key that seems to change the arithmetic.

    read: keys that the family reads besides READ. free: keys whose values the family checks itself.
    """
    for key, value in config.items():
        allowed = ALLOWED_VALUES.get(key) if key not in free else None
        if allowed and value is not None and value not in allowed:
            values = " or ".join(repr(v) for v in allowed)
            raise ValueError(f"config key {key!r}: {value!r} is not supported, only {values}")
        if allowed or key in READ or key in read or key in NEUTRAL or value in (None, False, [], {}):
            continue
        if any(word in key.lower() for word in MATHS):
            raise ValueError(f"config key {key!r} (value {value!r}) is not supported, and it may change the result")


def text_config(config: Config) -> Config:
    """The text_config of a multimodal config, with the keys that only the outer config has; else the config itself."""
    inner = config.get("text_config")
    if not isinstance(inner, dict):
        return config
    check_keys(config, OF_IMAGES, free=["hidden_act"])  # the text_config names the activation
    keys = ("tie_word_embeddings", "eos_token_id", "architectures")
    outside = {k: config[k] for k in keys if config.get(k) is not None}
    return {**outside, **inner, **{k: v for k, v in outside.items() if k == "tie_word_embeddings"}}
