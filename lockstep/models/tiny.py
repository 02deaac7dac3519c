"""The config.json that all families' tiny configs start from: a small model, on which the self-check runs kernels."""

from typing import Any

WIDTH, VOCABULARY, CONTEXT = 256, 64, 128
BASE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": WIDTH,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-3,
    "max_position_embeddings": CONTEXT,
    "tie_word_embeddings": False,
    "rope_theta": 500.0,
    "eos_token_id": 2,
}
