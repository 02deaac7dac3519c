"""Tiny configs, one for every feature of a model type, for the golden vectors and the live comparison."""

from tests.models.vision import PIXTRAL, QWEN2_5_VISION, QWEN2_VISION, QWEN3_VISION, SIGLIP, SMOLVLM, VISION

BASE = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 256,
    "rms_norm_eps": 0.01,
    "tie_word_embeddings": False,
    "rope_theta": 500.0,
    "eos_token_id": 2,
    "bos_token_id": 1,
    "pad_token_id": 0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 8.0}
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0, 1.5, 2.5, 4.0, 7.0, 9.0]}
LONGROPE["long_factor"] = [1.25, 2.0, 5.0, 12.0, 30.0, 60.5]
MULTIPLIERS = {
    "embedding_multiplier": 3.5,
    "attention_multiplier": 0.17,
    "residual_multiplier": 0.6,
    "logits_scaling": 0.3,
}
MROPE = {"type": "mrope", "mrope_section": [4, 2, 2]}
INTERLEAVED_MROPE = {"mrope_interleaved": True, "mrope_section": [8, 4, 4], "rope_type": "default"}
HYBRID = ["linear_attention"] * 3 + ["full_attention"]


def case(model_type, **changes):
    return {**BASE, "model_type": model_type, **changes}


def hybrid(**changes):
    """qwen3_5: three gated delta rule layers per gated attention layer, two value heads per key head."""
    made = case(
        "qwen3_5_text",
        head_dim=32,
        num_hidden_layers=4,
        layer_types=HYBRID,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=16,
        linear_value_head_dim=32,
        linear_conv_kernel_dim=4,
        attn_output_gate=True,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5},
    )
    del made["rope_theta"]
    return {**made, **changes}


def hybrid_experts(**changes):
    """qwen3_5_moe: qwen3_5 with experts in place of MLPs, one of which all tokens share."""
    made = hybrid(
        model_type="qwen3_5_moe_text",
        num_experts=16,
        num_experts_per_tok=3,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=48,
    )
    del made["intermediate_size"]
    return {**made, **changes}


def next_hybrid(**changes):
    """qwen3_next: qwen3_5_moe with two fused projections of the delta rule, and some layers without experts."""
    return hybrid_experts(**{"model_type": "qwen3_next", "intermediate_size": 80, "mlp_only_layers": [1], **changes})


def nested(config, model_type="qwen3_5", vision=VISION):
    """The config as the text_config of a vision-language model."""
    outer = {k: config[k] for k in ("tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")}
    return {"model_type": model_type, "text_config": config, "vision_config": vision, **outer}


# queries grow four times within 40 tokens
GROWING = {
    "rope_type": "yarn",
    "type": "yarn",
    "rope_theta": 500.0,
    "factor": 4.0,
    "original_max_position_embeddings": 9,
    "max_position_embeddings": 256,
    "beta_fast": 4.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.4,
}


def windowed(**changes):
    """gemma3_text: scores not scaled by the head size, two ropes, and one full layer per two layers with a window."""
    made = case(
        "gemma3_text",
        head_dim=32,
        hidden_activation="gelu_pytorch_tanh",
        query_pre_attn_scalar=24,
        sliding_window=9,
        sliding_window_pattern=3,
        rope_scaling={"rope_type": "linear", "factor": 2.5},
        rope_local_base_freq=50.0,
        tie_word_embeddings=True,
    )
    del made["hidden_act"]
    return {**made, **changes}


def capped(**changes):
    """gemma2: caps low enough that they matter, and every second layer with a window."""
    made = case(
        "gemma2",
        head_dim=32,
        hidden_activation="gelu_pytorch_tanh",
        query_pre_attn_scalar=24,
        sliding_window=9,
        attn_logit_softcapping=2.5,
        final_logit_softcapping=4.0,
        tie_word_embeddings=True,
    )
    del made["hidden_act"]
    return {**made, **changes}


def large_heads(**changes):
    """gemma4: larger heads, whose values are their keys, and another rope in layers that see all keys."""
    made = case(
        "gemma4_text",
        head_dim=16,
        global_head_dim=32,
        num_global_key_value_heads=1,
        attention_k_eq_v=True,
        hidden_activation="gelu_pytorch_tanh",
        num_hidden_layers=4,
        layer_types=["sliding_attention", "full_attention"] * 2,
        sliding_window=9,
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
            "full_attention": {"rope_type": "proportional", "rope_theta": 500.0, "partial_rotary_factor": 0.25},
        },
        final_logit_softcapping=4.0,
        hidden_size_per_layer_input=0,
        tie_word_embeddings=True,
    )
    return {key: value for key, value in made.items() if key not in ("hidden_act", "rope_theta")} | changes


# Inputs of their own for 6 layers, of which the last two read the keys of layers 3 and 2.
PER_LAYER = large_heads(
    attention_k_eq_v=False,
    num_hidden_layers=6,
    layer_types=[f"{sort}_attention" for sort in ("sliding", "full", "full", "sliding", "sliding", "full")],
    num_kv_shared_layers=2,
    use_double_wide_mlp=True,
    hidden_size_per_layer_input=16,
    vocab_size_per_layer_input=96,
)
EXPERTS = large_heads(enable_moe_block=True, num_experts=6, top_k_experts=2, moe_intermediate_size=32)
# Without the window pattern and the thetas: six layers, so that the default pattern has a layer that sees all keys.
WITH_DEFAULTS = {
    k: v
    for k, v in windowed(num_hidden_layers=6).items()
    if k not in ("sliding_window_pattern", "rope_theta", "rope_local_base_freq")
}


def streams(**changes):
    """gemma3n: two layers of six read the keys of earlier ones, in three most gates are zero; widths differ, and the
    last tokens have no input of their own."""
    made = case(
        "gemma3n_text",
        head_dim=16,
        hidden_activation="gelu_pytorch_tanh",
        num_hidden_layers=6,
        intermediate_size=[96, 128, 96, 96, 64, 96],
        activation_sparsity_pattern=[0.75, 0.95, 0.0, 0.0, 0.3, 0.0],
        layer_types=[f"{sort}_attention" for sort in ("sliding", "full", "sliding", "sliding", "full", "sliding")],
        sliding_window=9,
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
            "full_attention": {"rope_type": "default", "rope_theta": 500.0},
        },
        final_logit_softcapping=4.0,
        hidden_size_per_layer_input=16,
        vocab_size_per_layer_input=80,
        num_kv_shared_layers=2,
        laurel_rank=16,
        altup_num_inputs=4,
        altup_active_idx=0,
        altup_correct_scale=True,
        tie_word_embeddings=True,
    )
    return {key: value for key, value in made.items() if key not in ("hidden_act", "rope_theta")} | changes


CASES = {
    "gemma3n": streams(),
    "gemma3n_apart": streams(num_key_value_heads=1, num_kv_shared_layers=0, activation_sparsity_pattern=[0.0] * 6),
    "llama": case("llama"),
    "llama_tied_biased": case("llama", attention_bias=True, tie_word_embeddings=True, num_key_value_heads=1),
    "llama_mlp_biased": case("llama", mlp_bias=True, intermediate_size=112),
    "llama_nested": nested(case("llama", num_key_value_heads=1), "smolvlm", SMOLVLM),
    "llama_llama3": case("llama", rope_scaling=LLAMA3, head_dim=32),
    "llama_linear": case("llama", rope_scaling={"type": "linear", "factor": 2.5}, num_key_value_heads=4),
    "llama_wide_heads": case("llama", head_dim=512, num_attention_heads=2, num_key_value_heads=1, num_hidden_layers=2),
    "mistral": case("mistral", sliding_window=None, head_dim=32),
    "ministral3": case("ministral3", head_dim=32, rope_theta=None, rope_parameters=GROWING),
    "mistral3_nested": nested(
        case(
            "ministral3",
            head_dim=16,
            rope_theta=None,
            sliding_window=9,
            num_key_value_heads=1,
            rope_parameters={**GROWING, "mscale": 0.7, "mscale_all_dim": 1.2, "original_max_position_embeddings": 12},
        ),
        "mistral3",
        PIXTRAL,
    ),
    "mistral_window": case("mistral", sliding_window=9),
    "granite": case("granite", head_dim=16, attention_bias=True, **MULTIPLIERS),
    "granite_tied": case("granite", mlp_bias=True, tie_word_embeddings=True, num_key_value_heads=1, **MULTIPLIERS),
    "granitemoe": case(
        "granitemoe", head_dim=16, num_local_experts=6, num_experts_per_tok=3, intermediate_size=48, **MULTIPLIERS
    ),
    "granitemoe_biased": case(
        "granitemoe",
        attention_bias=True,
        tie_word_embeddings=True,
        num_local_experts=16,
        num_experts_per_tok=1,
        intermediate_size=32,
        num_key_value_heads=1,
        **{**MULTIPLIERS, "residual_multiplier": 0.9},
    ),
    "seed_oss": case("seed_oss", head_dim=32, attention_bias=True, num_key_value_heads=1),
    "seed_oss_all_biased": case("seed_oss", head_dim=16, attention_bias=True, attention_out_bias=True, mlp_bias=True),
    "olmo2": case("olmo2"),
    "olmo2_biased": case("olmo2", attention_bias=True, head_dim=32, num_key_value_heads=4, tie_word_embeddings=True),
    "olmo3": case(
        "olmo3",
        num_hidden_layers=4,
        num_key_value_heads=1,
        sliding_window=9,
        rope_theta=None,
        rope_parameters={"full_attention": {**YARN, "rope_theta": 500.0}, "sliding_attention": {"rope_theta": 50.0}},
    ),
    "phi3": case("phi3", sliding_window=9, num_key_value_heads=4),
    "phi3_long": case(  # 256 positions, first trained with 32
        "phi3",
        tie_word_embeddings=True,
        partial_rotary_factor=0.75,
        original_max_position_embeddings=32,
        rope_scaling=LONGROPE,
    ),
    "phi3_short": case(
        "phi3",
        num_key_value_heads=1,
        partial_rotary_factor=0.75,
        original_max_position_embeddings=256,
        rope_scaling={**LONGROPE, "attention_factor": 1.3},
    ),
    "qwen2": case("qwen2", tie_word_embeddings=True),
    "qwen2_window": case("qwen2", use_sliding_window=True, sliding_window=7, max_window_layers=1),
    "qwen3": case("qwen3", head_dim=32),
    "qwen3_yarn_biased": case("qwen3", head_dim=32, attention_bias=True, rope_scaling=YARN),
    "smollm3_window_by_type": case(
        "smollm3",
        no_rope_layers=[0, 1, 0],
        sliding_window=9,
        use_sliding_window=False,
        layer_types=["full_attention", "sliding_attention", "sliding_attention"],
    ),
    "smollm3_all_biased": case("smollm3", attention_bias=True, mlp_bias=True, no_rope_layers=[1, 0, 1]),
    "smollm3": case("smollm3", num_hidden_layers=4, tie_word_embeddings=True, no_rope_layers=[1, 0, 1, 0]),
    "qwen3_5": hybrid(),
    "qwen3_5_tied_equal_heads": hybrid(tie_word_embeddings=True, linear_num_value_heads=2, linear_value_head_dim=16),
    "qwen3_5_nested": nested(hybrid(num_hidden_layers=8, layer_types=HYBRID * 2, num_attention_heads=8)),
    "qwen3_5_moe": hybrid_experts(),
    "qwen3_5_moe_nested": nested(
        hybrid_experts(num_experts=6, num_experts_per_tok=2, tie_word_embeddings=True, num_key_value_heads=1),
        "qwen3_5_moe",
        {**VISION, "model_type": "qwen3_5_moe_vision"},
    ),
    "qwen3_next": next_hybrid(),
    "qwen3_next_not_renormalised": next_hybrid(
        norm_topk_prob=False, linear_num_value_heads=6, linear_value_head_dim=16, mlp_only_layers=[]
    ),
    "qwen3_moe": case(
        "qwen3_moe",
        head_dim=32,
        num_experts=16,
        num_experts_per_tok=3,
        moe_intermediate_size=32,
        norm_topk_prob=True,
        num_key_value_heads=1,
    ),
    "qwen3_moe_not_renormalised": case(
        "qwen3_moe", head_dim=16, num_experts=32, num_experts_per_tok=2, moe_intermediate_size=64, norm_topk_prob=False
    ),
    "qwen3_moe_some_dense": case(
        "qwen3_moe",
        head_dim=16,
        num_experts=6,
        num_experts_per_tok=2,
        num_hidden_layers=4,
        moe_intermediate_size=48,
        norm_topk_prob=True,
        decoder_sparse_step=2,
        mlp_only_layers=[1],
    ),
    "gpt_oss": case(
        "gpt_oss",
        head_dim=32,
        attention_bias=True,
        intermediate_size=48,
        num_local_experts=8,
        num_experts_per_tok=3,
        sliding_window=9,
        rope_scaling={**YARN, "truncate": False},
    ),
    "gpt_oss_by_type": case(
        "gpt_oss",
        head_dim=16,
        attention_bias=True,
        num_attention_heads=8,
        num_local_experts=5,
        num_experts_per_tok=2,
        num_hidden_layers=4,
        layer_types=["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
        sliding_window=12,
        rope_scaling={**YARN, "truncate": False, "factor": 32.0, "original_max_position_embeddings": 16},
    ),
    "qwen2_vl": case("qwen2_vl", rope_scaling=MROPE, use_sliding_window=False, vision_config=QWEN2_VISION),
    "qwen2_5_vl_window": nested(
        case(
            "qwen2_5_vl_text",
            rope_parameters={"rope_type": "default", "rope_theta": 500.0, "mrope_section": [4, 2, 2]},
            use_sliding_window=True,
            sliding_window=9,
            max_window_layers=1,
        ),
        "qwen2_5_vl",
        {**QWEN2_5_VISION, "model_type": "qwen2_5_vl"},
    ),
    "qwen3_vl": nested(
        case("qwen3_vl_text", head_dim=32, rope_scaling=INTERLEAVED_MROPE, tie_word_embeddings=True),
        "qwen3_vl",
        QWEN3_VISION,
    ),
    "qwen3_vl_moe": nested(
        case(
            "qwen3_vl_moe_text",
            head_dim=32,
            rope_scaling=INTERLEAVED_MROPE,
            num_experts=16,
            num_experts_per_tok=3,
            moe_intermediate_size=48,
            norm_topk_prob=True,
            num_key_value_heads=1,
            mlp_only_layers=[1],
        ),
        "qwen3_vl_moe",
        {**QWEN3_VISION, "model_type": "qwen3_vl_moe"},
    ),
    "gemma2": capped(),
    "gemma2_uncapped_by_type": capped(
        attn_logit_softcapping=None,
        final_logit_softcapping=None,
        layer_types=["full_attention", "sliding_attention", "sliding_attention"],
    ),
    "gemma4": large_heads(),
    "gemma4_per_layer": PER_LAYER,
    "gemma4_experts": EXPERTS,
    "gemma4_biased_nested": nested(
        large_heads(attention_bias=True, final_logit_softcapping=None, num_global_key_value_heads=None), "gemma4", None
    ),
    "gemma3": windowed(),
    "gemma3_nested": nested(WITH_DEFAULTS, "gemma3", SIGLIP),
    "gemma3_by_type": windowed(
        num_key_value_heads=1,
        num_hidden_layers=4,
        layer_types=["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
    ),
}
SEED = 7
