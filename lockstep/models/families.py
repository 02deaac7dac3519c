"""Model types: how each one's config.json becomes a ModelConfig. A new Llama-like model type is a function here."""

from dataclasses import replace
from typing import Any

from lockstep.models.config import (
    MROPE,
    Config,
    Experts,
    Layer,
    LinearAttention,
    ModelConfig,
    check_keys,
    checked,
    common,
    flag,
    layer_types,
    need,
    optional,
    text_config,
    with_each,
    with_windows,
)

WINDOW_TYPES = ("full_attention", "sliding_attention")
WINDOW = ("use_sliding_window", "sliding_window", "max_window_layers", "layer_types")
EXPERTS = """num_experts num_local_experts num_experts_per_tok moe_intermediate_size norm_topk_prob decoder_sparse_step
mlp_only_layers""".split()
DELTA = """linear_num_key_heads linear_num_value_heads linear_key_head_dim linear_value_head_dim
linear_conv_kernel_dim""".split()


def llama(config: Config) -> ModelConfig:
    """Llama 1 to 3; biases on all attention projections if attention_bias, on the MLP's if mlp_bias."""
    check_keys(config, ["attention_bias", "mlp_bias"], free=["mlp_bias"])
    return common(config, mlp_bias=flag(config, "mlp_bias"), **biases(config))


def mistral(config: Config) -> ModelConfig:
    """Llama with a sliding window on every layer, or none."""
    check_keys(config, ["sliding_window"])
    config = {"sliding_window": 4096, **config}
    kind = "full_attention" if config["sliding_window"] is None else "sliding_attention"
    made = common(config)
    return with_windows(made, config, [kind] * made.num_layers)


def qwen2(config: Config) -> ModelConfig:
    """Llama with biases on q, k and v; a sliding window on some layers if use_sliding_window."""
    check_keys(config, WINDOW)
    return qwen_windows(common(config, qkv_bias=True), config)


def qwen3(config: Config) -> ModelConfig:
    """Llama with a norm on each query and key head; windows as in qwen2."""
    check_keys(config, ["attention_bias", *WINDOW])
    return qwen_windows(common(config, qk_norm=True, **biases(config)), config)


def qwen3_moe(config: Config) -> ModelConfig:
    """qwen3 with experts in place of most MLPs; a sliding window on every layer if use_sliding_window."""
    check_keys(config, ["attention_bias", *WINDOW, *EXPERTS], free=["decoder_sparse_step", "mlp_only_layers"])
    total = "num_experts" if config.get("num_experts") is not None else "num_local_experts"
    experts = Experts(
        need(config, total, high=4096),
        need(config, "num_experts_per_tok", high=256),
        need(config, "moe_intermediate_size"),
        flag(config, "norm_topk_prob"),
    )
    if experts.num_per_token > experts.num_experts:
        raise ValueError(
            f"config key 'num_experts_per_tok': expected at most {experts.num_experts}, got {experts.num_per_token}"
        )
    made = with_dense_layers(common(config, qk_norm=True, experts=experts, **biases(config)), config)
    config = {"sliding_window": 4096, **config}
    slides = flag(config, "use_sliding_window") and config["sliding_window"] is not None
    return with_windows(made, config, ["sliding_attention" if slides else "full_attention"] * made.num_layers)


def with_dense_layers(made: ModelConfig, config: Config) -> ModelConfig:
    """A ModelConfig with experts only in every decoder_sparse_step-th layer, and in none of mlp_only_layers."""
    step, listed = optional(config, "decoder_sparse_step", 1), config.get("mlp_only_layers") or []
    if not isinstance(listed, list) or not all(type(i) is int and 0 <= i < made.num_layers for i in listed):
        raise ValueError(f"config key 'mlp_only_layers': expected layers below {made.num_layers}, got {listed!r}")
    dense = [i in listed or (i + 1) % step != 0 for i in range(made.num_layers)]
    made = with_each(made, "dense", dense)
    return checked(replace(made, ffn_width=need(config, "intermediate_size") if any(dense) else 0))


def smollm3(config: Config) -> ModelConfig:
    """Llama without rope on every fourth layer, which has a sliding window if use_sliding_window; layer_types wins."""
    check_keys(
        config, ["attention_bias", "mlp_bias", "no_rope_layers", "no_rope_layer_interval", *WINDOW], free=["mlp_bias"]
    )
    made = common(config, rope_defaults={"theta": 2e6}, tied=True, mlp_bias=flag(config, "mlp_bias"), **biases(config))
    interval = optional(config, "no_rope_layer_interval", 4)
    ropes = config.get("no_rope_layers") or [int((i + 1) % interval != 0) for i in range(made.num_layers)]
    if not isinstance(ropes, list) or len(ropes) < made.num_layers or any(r not in (0, 1) for r in ropes):
        raise ValueError(f"config key 'no_rope_layers': expected {made.num_layers} of 0 and 1, got {ropes!r}")
    ropes = [bool(r) for r in ropes[: made.num_layers]]
    slides = flag(config, "use_sliding_window") and config.get("sliding_window") is not None
    silent = ["sliding_attention" if slides and not r else "full_attention" for r in ropes]
    return with_windows(with_each(made, "rope", ropes), config, layer_types(config, *WINDOW_TYPES) or silent)


def qwen3_5(config: Config) -> ModelConfig:
    """Gated delta rule layers with a gated attention layer among them; norms store w - 1; partial rope."""
    check_keys(
        config,
        ["attention_bias", "layer_types", "full_attention_interval", "mtp_num_hidden_layers", *DELTA],
        free=["partial_rotary_factor"],
    )
    made = common(
        config,
        rope_defaults={"partial": 0.25, "ignored": MROPE},
        qk_norm=True,
        output_gate=True,
        norm_offset=1.0,
        num_mtp_layers=optional(config, "mtp_num_hidden_layers", 0, low=0),
        **biases(config),
    )
    interval = optional(config, "full_attention_interval", 4)
    mixers = {"full_attention": "attention", "linear_attention": "linear_attention"}
    types = layer_types(config, *mixers) or [
        "full_attention" if (i + 1) % interval == 0 else "linear_attention" for i in range(made.num_layers)
    ]
    return replace(made, layers=tuple(Layer(mixers[t]) for t in types), linear_attention=delta_rule(config))


def biases(config: Config) -> dict[str, Any]:
    """Biases on all four attention projections if attention_bias."""
    bias = flag(config, "attention_bias")
    return {"qkv_bias": bias, "o_bias": bias}


def qwen_windows(made: ModelConfig, config: Config) -> ModelConfig:
    """The layers from max_window_layers on, or those that layer_types names, have a sliding window if
    use_sliding_window."""
    config = {"sliding_window": 4096, **config}
    slides = flag(config, "use_sliding_window") and config["sliding_window"] is not None
    first = optional(config, "max_window_layers", 28, low=0)
    types = layer_types(config, *WINDOW_TYPES) or [
        "sliding_attention" if slides and i >= first else "full_attention" for i in range(made.num_layers)
    ]
    if "sliding_attention" in types and not slides:
        raise ValueError("config key 'layer_types': sliding_attention needs use_sliding_window and a sliding_window")
    return with_windows(made, config, types)


def delta_rule(config: Config) -> LinearAttention:
    """The shape of the gated delta rule layers."""
    linear = LinearAttention(*(need(config, key) for key in DELTA))
    if linear.k_head_dim % 16 or linear.v_head_dim % 16 or linear.num_v_heads % linear.num_k_heads:
        raise ValueError(
            f"linear attention of {linear.num_v_heads} value heads of {linear.v_head_dim} and {linear.num_k_heads} "
            f"key heads of {linear.k_head_dim} is not supported: sizes must be multiples of 16, the value heads "
            f"a multiple of the key heads"
        )
    return linear


FAMILIES = {
    "llama": llama,
    "mistral": mistral,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "qwen3_moe": qwen3_moe,
    "smollm3": smollm3,
    "qwen3_5": qwen3_5,
    "qwen3_5_text": qwen3_5,
}


def model_config(config: Config) -> ModelConfig:
    """The ModelConfig of a config.json; a ValueError names the key that is missing or not supported."""
    inner = text_config(config)
    model_type = inner.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ValueError(f"model_type {model_type!r} is not supported; supported are {', '.join(sorted(FAMILIES))}")
    return FAMILIES[model_type](inner)
