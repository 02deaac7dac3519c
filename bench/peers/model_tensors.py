"""The shapes of the compared models, and random tensors for them under their Hugging Face names."""

import zlib

import numpy as np

# ------------------------------------------------------------------ shapes
MODELS = {
    "qwen3-0.6b": dict(
        architectures=["Qwen3ForCausalLM"],
        model_type="qwen3",
        num_hidden_layers=28,
        hidden_size=1024,
        intermediate_size=3072,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=151936,
        tie_word_embeddings=True,
        hidden_act="silu",
        max_position_embeddings=40960,
        rms_norm_eps=1e-6,
        attention_bias=False,
        rope_theta=1000000.0,
        bos_token_id=151643,
        eos_token_id=151645,
    ),
    "qwen3.5-0.8b": dict(
        architectures=["Qwen3_5ForCausalLM"],
        model_type="qwen3_5_text",
        num_hidden_layers=24,
        hidden_size=1024,
        intermediate_size=3584,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=256,
        linear_num_key_heads=16,
        linear_num_value_heads=16,
        linear_key_head_dim=128,
        linear_value_head_dim=128,
        linear_conv_kernel_dim=4,
        full_attention_interval=4,
        layer_types=["full_attention" if i % 4 == 3 else "linear_attention" for i in range(24)],
        vocab_size=248320,
        tie_word_embeddings=True,
        hidden_act="silu",
        max_position_embeddings=262144,
        rms_norm_eps=1e-6,
        attention_bias=False,
        attn_output_gate=True,
        mamba_ssm_dtype="float32",
        partial_rotary_factor=0.25,
        rope_parameters=dict(
            rope_type="default",
            rope_theta=10000000.0,
            partial_rotary_factor=0.25,
            mrope_section=[11, 11, 10],
            mrope_interleaved=True,
        ),
        eos_token_id=248044,
    ),
    "llama-3.2-1b": dict(
        architectures=["LlamaForCausalLM"],
        model_type="llama",
        num_hidden_layers=16,
        hidden_size=2048,
        intermediate_size=8192,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        vocab_size=128256,
        tie_word_embeddings=True,
        hidden_act="silu",
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        attention_bias=False,
        mlp_bias=False,
        rope_theta=500000.0,
        rope_scaling=dict(
            rope_type="llama3",
            factor=32.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=8192,
        ),
        bos_token_id=128000,
        eos_token_id=128001,
    ),
}
# for long contexts: one prompt of 32768 tokens took llama.cpp six minutes in these 4 of 28 layers
MODELS["qwen3-0.6b-4-layers"] = {**MODELS["qwen3-0.6b"], "num_hidden_layers": 4}


# ------------------------------------------------------------------ bf16 helpers
def to_bf16(a):
    """float32 -> bf16 bits (uint16), round to nearest even"""
    u = np.ascontiguousarray(a, np.float32).view(np.uint32)
    return ((u + np.uint32(0x7FFF) + ((u >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)


def from_bf16(b):
    return (b.astype(np.uint32) << np.uint32(16)).view(np.float32)


# ------------------------------------------------------------------ tensors (HF names)
def tensors(cfg, seed):
    """yields (hf_name, bf16 bits); each tensor depends on (seed, name) only"""
    H, I, V, L = (cfg[k] for k in ("hidden_size", "intermediate_size", "vocab_size", "num_hidden_layers"))
    nh, nkv, hd = cfg["num_attention_heads"], cfg["num_key_value_heads"], cfg["head_dim"]
    q35 = cfg["model_type"] == "qwen3_5_text"

    def rng(name):
        return np.random.default_rng([seed, zlib.crc32(name.encode())])

    def mat(name, shape, std=0.02):
        return name, to_bf16(rng(name).standard_normal(shape, dtype=np.float32) * np.float32(std))

    out_std = 0.02 / (2 * L) ** 0.5  # GPT-2 style: keeps the random network from amplifying rounding noise

    def norm(name, n, centre=None):
        c = (0.0 if q35 else 1.0) if centre is None else centre
        return name, to_bf16(np.float32(c) + np.float32(0.1) * rng(name).standard_normal(n, dtype=np.float32))

    yield mat("model.embed_tokens.weight", (V, H))
    yield norm("model.norm.weight", H)
    for i in range(L):
        p = f"model.layers.{i}."
        yield norm(p + "input_layernorm.weight", H)
        yield norm(p + "post_attention_layernorm.weight", H)
        if q35 and cfg["layer_types"][i] == "linear_attention":
            a = p + "linear_attn."
            nk, nv = cfg["linear_num_key_heads"], cfg["linear_num_value_heads"]
            dk, dv = cfg["linear_key_head_dim"], cfg["linear_value_head_dim"]
            conv = 2 * nk * dk + nv * dv
            yield mat(a + "in_proj_qkv.weight", (conv, H))
            yield mat(a + "in_proj_z.weight", (nv * dv, H))
            yield mat(a + "in_proj_a.weight", (nv, H))
            yield mat(a + "in_proj_b.weight", (nv, H))
            yield mat(a + "out_proj.weight", (H, nv * dv), out_std)
            yield mat(
                a + "conv1d.weight", (conv, 1, cfg["linear_conv_kernel_dim"]), 2.0
            )  # silu then acts like relu: q.k stays away from 0
            yield a + "A_log", to_bf16(np.log(rng(a + "A_log").uniform(0.05, 4.0, nv)).astype(np.float32))
            yield mat(a + "dt_bias", (nv,), 1.0)
            yield norm(a + "norm.weight", dv, 1.0)
        else:
            a = p + "self_attn."
            yield mat(a + "q_proj.weight", (nh * hd * (2 if q35 else 1), H))
            yield mat(a + "k_proj.weight", (nkv * hd, H))
            yield mat(a + "v_proj.weight", (nkv * hd, H))
            yield mat(a + "o_proj.weight", (H, nh * hd), out_std)
            if cfg["model_type"] != "llama":
                yield norm(a + "q_norm.weight", hd)
                yield norm(a + "k_norm.weight", hd)
        yield mat(p + "mlp.gate_proj.weight", (I, H))
        yield mat(p + "mlp.up_proj.weight", (I, H))
        yield mat(p + "mlp.down_proj.weight", (H, I), out_std)
