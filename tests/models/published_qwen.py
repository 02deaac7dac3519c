"""config.json of published Qwen checkpoints with experts or vision, without keys that are the same in all."""

from tests.models.published import QWEN3_5_0_8B

_TEXT = {k: v for k, v in QWEN3_5_0_8B["text_config"].items() if k not in ("intermediate_size", "mlp_only_layers")}
QWEN3_5_35B_A3B = {
    **QWEN3_5_0_8B,
    "architectures": ["Qwen3_5MoeForConditionalGeneration"],
    "model_type": "qwen3_5_moe",
    "text_config": {
        **_TEXT,
        "hidden_size": 2048,
        "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 10,
        "linear_num_value_heads": 32,
        "model_type": "qwen3_5_moe_text",
        "moe_intermediate_size": 512,
        "num_attention_heads": 16,
        "num_experts": 256,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 40,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.001,
        "shared_expert_intermediate_size": 512,
        "tie_word_embeddings": False,
    },
    "tie_word_embeddings": False,
    "vision_config": {"depth": 27, "hidden_act": "gelu_pytorch_tanh", "model_type": "qwen3_5_moe"},
}
