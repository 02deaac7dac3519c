#!/usr/bin/env python3
"""Random-weight checkpoints, identical tensors in every form.

  make_models.py [--out DIR] [--models a,b] [--forms hf,bf16,q8_0,q4_0,q4_0-pure,q4_k_m,w8a8] [--seed 0]

Forms (all derived from the same bf16-rounded values):
  hf         DIR/<name>-hf/          config.json + model.safetensors (bf16)
  bf16       DIR/<name>-BF16.gguf    written with gguf-py
  q8_0       DIR/<name>-Q8_0.gguf    llama_model_quantize of the BF16 GGUF
  q4_0       DIR/<name>-Q4_0.gguf    same, llama-quantize defaults (tied embedding becomes Q6_K)
  q4_0-pure  DIR/<name>-Q4_0-pure.gguf   same, every matrix Q4_0
  q4_k_m     DIR/<name>-Q4_K_M.gguf  same, llama-quantize's mixture of Q4_K and Q6_K
  w8a8       DIR/<name>-w8a8/        compressed-tensors int8: per-channel weights, dynamic per-token
                                     activations, embeddings/lm_head left in bf16
Needs numpy, gguf and (for q8_0/q4_0) llama-cpp-python; no torch, no network, no tokenizer.
"""

import ctypes
import json
import os
import sys

import numpy as np

sys.path.append(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from model_tensors import MODELS, from_bf16, tensors, to_bf16
from options import Parser, one_of, several, whole_number


# ------------------------------------------------------------------ HF forms
def write_safetensors(path, items):
    """items: list of (name, array, dtype string)"""
    head, off = {"__metadata__": {"format": "pt"}}, 0
    for name, arr, dt in items:
        head[name] = dict(dtype=dt, shape=list(arr.shape), data_offsets=[off, off + arr.nbytes])
        off += arr.nbytes
    raw = json.dumps(head, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    with open(path, "wb") as f:
        f.write(len(raw).to_bytes(8, "little"))
        f.write(raw)
        for _, arr, _ in items:
            np.ascontiguousarray(arr).tofile(f)


def write_config(d, cfg, **extra):
    cfg = dict(cfg, dtype="bfloat16", torch_dtype="bfloat16", use_cache=True, **extra)
    with open(os.path.join(d, "config.json"), "w") as f:
        json.dump(cfg, f, indent=1)
    with open(os.path.join(d, "generation_config.json"), "w") as f:
        json.dump(dict(eos_token_id=cfg["eos_token_id"], do_sample=False), f)


def write_hf(d, cfg, T):
    os.makedirs(d, exist_ok=True)
    write_config(d, cfg)
    write_safetensors(os.path.join(d, "model.safetensors"), [(n, a, "BF16") for n, a in T.items()])


def write_w8a8(d, cfg, T):
    os.makedirs(d, exist_ok=True)
    # the two tiny per-head gates of a DeltaNet layer stay bf16 as well
    skip = lambda n: n.endswith(("embed_tokens.weight", "in_proj_a.weight", "in_proj_b.weight")) or "conv1d" in n
    items, ignore = [], ["lm_head"]
    for n, a in T.items():
        if a.ndim != 2 or skip(n):
            items.append((n, a, "BF16"))
            if n.endswith(("in_proj_a.weight", "in_proj_b.weight")):
                ignore.append(n[: -len(".weight")])
            continue
        w = from_bf16(a)
        s = from_bf16(to_bf16(np.abs(w).max(1, keepdims=True) / 127.0))
        items.append((n, np.clip(np.rint(w / s), -127, 127).astype(np.int8), "I8"))
        items.append((n + "_scale", to_bf16(s), "BF16"))
    common = dict(num_bits=8, type="int", symmetric=True, group_size=None, block_structure=None, actorder=None)
    q = dict(
        config_groups=dict(
            group_0=dict(
                targets=["Linear"],
                output_activations=None,
                weights=dict(common, strategy="channel", dynamic=False, observer="minmax", observer_kwargs={}),
                input_activations=dict(common, strategy="token", dynamic=True, observer=None, observer_kwargs={}),
            )
        ),
        format="int-quantized",
        ignore=ignore,
        kv_cache_scheme=None,
        quant_method="compressed-tensors",
        quantization_status="compressed",
    )
    write_config(d, cfg, quantization_config=q)
    write_safetensors(os.path.join(d, "model.safetensors"), items)


# ------------------------------------------------------------------ GGUF
def gguf_name(n, q35):
    if n == "model.embed_tokens.weight":
        return "token_embd.weight"
    if n == "model.norm.weight":
        return "output_norm.weight"
    _, _, i, rest = n.split(".", 3)
    return (
        f"blk.{i}."
        + {
            "input_layernorm.weight": "attn_norm.weight",
            "post_attention_layernorm.weight": "post_attention_norm.weight" if q35 else "ffn_norm.weight",
            "self_attn.q_proj.weight": "attn_q.weight",
            "self_attn.k_proj.weight": "attn_k.weight",
            "self_attn.v_proj.weight": "attn_v.weight",
            "self_attn.o_proj.weight": "attn_output.weight",
            "self_attn.q_norm.weight": "attn_q_norm.weight",
            "self_attn.k_norm.weight": "attn_k_norm.weight",
            "mlp.gate_proj.weight": "ffn_gate.weight",
            "mlp.up_proj.weight": "ffn_up.weight",
            "mlp.down_proj.weight": "ffn_down.weight",
            "linear_attn.in_proj_qkv.weight": "attn_qkv.weight",
            "linear_attn.in_proj_z.weight": "attn_gate.weight",
            "linear_attn.in_proj_a.weight": "ssm_alpha.weight",
            "linear_attn.in_proj_b.weight": "ssm_beta.weight",
            "linear_attn.out_proj.weight": "ssm_out.weight",
            "linear_attn.conv1d.weight": "ssm_conv1d.weight",
            "linear_attn.A_log": "ssm_a",
            "linear_attn.dt_bias": "ssm_dt.bias",
            "linear_attn.norm.weight": "ssm_norm.weight",
        }[rest]
    )


def llama3_rope_factors(cfg):
    s, dim = cfg["rope_scaling"], cfg["head_dim"]
    inv = 1.0 / (cfg["rope_theta"] ** (np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)))
    lo, hi = (s["original_max_position_embeddings"] / s[k] for k in ("low_freq_factor", "high_freq_factor"))
    out = []
    for f in inv:
        wl = 2 * np.pi / f
        if wl < hi:
            out.append(1.0)
        elif wl > lo:
            out.append(s["factor"])
        else:
            sm = (s["original_max_position_embeddings"] / wl - s["low_freq_factor"]) / (
                s["high_freq_factor"] - s["low_freq_factor"]
            )
            out.append(1.0 / ((1 - sm) / s["factor"] + sm))
    return np.array(out, np.float32)


def write_gguf(path, name, cfg, T):
    import gguf

    mt = cfg["model_type"]
    arch = {"qwen3": "qwen3", "qwen3_5_text": "qwen35", "llama": "llama"}[mt]
    w = gguf.GGUFWriter(path, arch)
    BF16 = gguf.GGMLQuantizationType.BF16
    w.add_name(name + " random")
    w.add_file_type(32)
    w.add_block_count(cfg["num_hidden_layers"])
    w.add_context_length(cfg["max_position_embeddings"])
    w.add_embedding_length(cfg["hidden_size"])
    w.add_feed_forward_length(cfg["intermediate_size"])
    w.add_head_count(cfg["num_attention_heads"])
    w.add_head_count_kv(cfg["num_key_value_heads"])
    w.add_key_length(cfg["head_dim"])
    w.add_value_length(cfg["head_dim"])
    w.add_layer_norm_rms_eps(cfg["rms_norm_eps"])
    w.add_vocab_size(cfg["vocab_size"])
    w.add_tokenizer_model("no_vocab")
    if mt == "qwen3_5_text":
        rp = cfg["rope_parameters"]
        w.add_rope_freq_base(rp["rope_theta"])
        w.add_rope_dimension_count(int(cfg["head_dim"] * rp["partial_rotary_factor"]))
        w.add_rope_dimension_sections(rp["mrope_section"] + [0])
        w.add_ssm_conv_kernel(cfg["linear_conv_kernel_dim"])
        w.add_ssm_state_size(cfg["linear_key_head_dim"])
        w.add_ssm_group_count(cfg["linear_num_key_heads"])
        w.add_ssm_time_step_rank(cfg["linear_num_value_heads"])
        w.add_ssm_inner_size(cfg["linear_value_head_dim"] * cfg["linear_num_value_heads"])
        w.add_uint32(f"{arch}.full_attention_interval", cfg["full_attention_interval"])
        # with fewer K than V heads llama.cpp wants V heads in tiled order; here they are equal
        assert cfg["linear_num_key_heads"] == cfg["linear_num_value_heads"]
    else:
        w.add_rope_freq_base(cfg["rope_theta"])
        w.add_rope_dimension_count(cfg["head_dim"])
    if mt == "llama":
        w.add_tensor("rope_freqs.weight", llama3_rope_factors(cfg))
    for n, bits in T.items():
        g = gguf_name(n, mt == "qwen3_5_text")
        if bits.ndim == 2 and not n.endswith(".A_log"):
            if mt == "llama" and n.endswith(("q_proj.weight", "k_proj.weight")):  # HF half-split -> interleaved rope
                h = cfg["num_attention_heads"] if n.endswith("q_proj.weight") else cfg["num_key_value_heads"]
                bits = np.ascontiguousarray(
                    bits.reshape(h, 2, bits.shape[0] // h // 2, bits.shape[1]).swapaxes(1, 2).reshape(bits.shape)
                )
            w.add_tensor(g, np.ascontiguousarray(bits).view(np.uint8), raw_dtype=BF16)
            continue
        f = from_bf16(bits)
        if n.endswith(".A_log"):
            f = -np.exp(f)
        elif "conv1d" in n:
            f = np.ascontiguousarray(f[:, 0, :])
        elif mt == "qwen3_5_text" and n.endswith("norm.weight") and not n.endswith("linear_attn.norm.weight"):
            f = f + np.float32(1)  # HF stores these norms zero-centred
        w.add_tensor(g, f.astype(np.float32))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def quantize(src, dst, ftype, pure=False, threads=2):
    import llama_cpp as lc

    p = lc.llama_model_quantize_default_params()
    p.ftype, p.nthread, p.pure = ftype, threads, pure
    if lc.llama_model_quantize(src.encode(), dst.encode(), ctypes.byref(p)) != 0:
        sys.exit(f"quantize failed: {dst}")


# (form, llama.cpp's number of the file type, whether all matrices get the same format)
QUANTIZED = (("q8_0", 7, False), ("q4_0", 2, False), ("q4_0-pure", 2, True), ("q4_k_m", 15, False))

FORMS = ("hf", "bf16", *(form for form, _, _ in QUANTIZED), "w8a8")


def main():
    ap = Parser(__doc__)
    root = os.environ.get("PEERS_DIR", "./_peers")
    ap.add_argument("--out", default=os.path.join(root, "models"))
    ap.add_argument("--models", type=several(one_of(MODELS)), default=",".join(MODELS))
    ap.add_argument("--forms", type=several(one_of(FORMS)), default=",".join(FORMS))
    ap.add_argument("--seed", type=whole_number(0), default=0)
    a = ap.parse_args()
    os.makedirs(a.out, exist_ok=True)
    forms = a.forms
    for name in a.models:
        cfg = MODELS[name]
        T = dict(tensors(cfg, a.seed))
        print(name, f"{sum(t.size for t in T.values()) / 1e6:.1f}M parameters", flush=True)
        at = lambda s, name=name: os.path.join(a.out, name + s)
        if "hf" in forms:
            write_hf(at("-hf"), cfg, T)
        if "w8a8" in forms:
            write_w8a8(at("-w8a8"), cfg, T)
        if any(f in forms for f in ("bf16", *(form for form, _, _ in QUANTIZED))):
            write_gguf(at("-BF16.gguf"), name, cfg, T)
        del T
        for form, ft, pure in QUANTIZED:
            if form in forms:
                dst = at("-" + form.upper().replace("-PURE", "-pure") + ".gguf")
                quantize(at("-BF16.gguf"), dst, ft, pure)
                print(" wrote", os.path.basename(dst), f"{os.path.getsize(dst) / 1e6:.0f} MB", flush=True)


if __name__ == "__main__":
    main()
