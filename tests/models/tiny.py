"""Tiny random checkpoints, the same on every machine: config and seed in, a Hugging Face folder out.

Names and shapes are written down here from the checkpoints' own conventions, not taken from the code under test; the
script that records golden vectors and the live comparison load the same folder into transformers, which refuses a wrong
one. Norm weights, biases, decays and taps are far from their defaults, which would hide mistakes.
"""

import json
import zlib

import ml_dtypes
import numpy as np

HYBRID = ("qwen3_5", "qwen3_next")  # beginnings of model types with delta rule layers
DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}


def text_part(config):
    """The part of a config that describes the text model."""
    return config.get("text_config", config)


def is_gemma(config):
    """Whether the model has norms after the token mixer and after the MLP, too."""
    return config["model_type"].startswith("gemma")


def is_olmo(config):
    """Whether the model has norms after the token mixer and after the MLP only."""
    return config["model_type"].startswith("olmo")


def prefix(config):
    """The prefix of all tensor names except the head's."""
    if "text_config" not in config:
        return "model."
    return "model.text_model." if config["model_type"] == "smolvlm" else "model.language_model."


def shapes(config):
    """Every tensor of a checkpoint: {name: shape}."""
    c = text_part(config)
    width = c["hidden_size"]
    made = {"embed_tokens.weight": (c["vocab_size"], width), "norm.weight": (width,)}
    for i in range(c["num_hidden_layers"]):
        linear = c.get("layer_types", [""] * (i + 1))[i] == "linear_attention"
        mixer = (
            {f"linear_attn.{k}": v for k, v in _delta(c).items()}
            if linear
            else {f"self_attn.{k}": v for k, v in _attention(of_layer(c, i)).items()}
        )
        layer = {
            **({} if is_olmo(c) else {"input_layernorm.weight": (width,)}),
            "post_attention_layernorm.weight": (width,),
            **({"post_feedforward_layernorm.weight": (width,)} if is_olmo(c) else {}),
            **({f"{p}_feedforward_layernorm.weight": (width,) for p in ("pre", "post")} if is_gemma(c) else {}),
            **mixer,
            **(
                _granite_experts(c)
                if c["model_type"] == "granitemoe"
                else {f"mlp.{k}": v for k, v in _mlp(of_layer(c, i), i).items()}
            ),
            **(_gemma4_layer(c) if is_gemma4(c) else {}),
            **(_gemma3n_layer(c) if is_gemma3n(c) else {}),
        }
        made.update({f"layers.{i}.{k}": v for k, v in layer.items()})
    if inputs := c.get("hidden_size_per_layer_input"):
        total = c["num_hidden_layers"] * inputs
        made["embed_tokens_per_layer.weight"] = (c["vocab_size_per_layer_input"], total)
        made["per_layer_model_projection.weight"] = (total, width)
        made["per_layer_projection_norm.weight"] = (inputs,)
    if is_gemma3n(c):
        kinds = "altup_projections", "altup_unembed_projections"
        made.update({f"{kind}.{i}.weight": (width, width) for kind in kinds for i in range(3)})
    made.update({f"mtp.{k}": v for i in range(c.get("mtp_num_hidden_layers", 0)) for k, v in _mtp(c, i).items()})
    head = {} if config["tie_word_embeddings"] else {"lm_head.weight": (c["vocab_size"], width)}
    return {**{k if k.startswith("mtp.") else prefix(config) + k: v for k, v in made.items()}, **head}


def is_gemma4(config):
    return config["model_type"].startswith("gemma4")


def is_gemma3n(config):
    return config["model_type"].startswith("gemma3n")


def of_layer(c, i):
    """The config with the sizes of layer i, where layers differ."""
    if is_gemma3n(c):
        shared = i >= c["num_hidden_layers"] - c["num_kv_shared_layers"]
        return {**c, "kv_shared": shared, "intermediate_size": c["intermediate_size"][i]}
    if not is_gemma4(c):
        return c
    is_full, last = c["layer_types"][i] == "full_attention", c["num_hidden_layers"] - c.get("num_kv_shared_layers", 0)
    changed = dict(kv_shared=i >= last)
    if changed["kv_shared"] and c.get("use_double_wide_mlp"):
        changed["intermediate_size"] = 2 * c["intermediate_size"]
    if is_full:
        changed |= dict(head_dim=c["global_head_dim"], no_values=c["attention_k_eq_v"])
        if c["attention_k_eq_v"] and c["num_global_key_value_heads"]:
            changed["num_key_value_heads"] = c["num_global_key_value_heads"]
    return {**c, **changed}


def _gemma4_layer(c):
    """What a layer of gemma4 has besides attention and MLP."""
    width, inputs = c["hidden_size"], c["hidden_size_per_layer_input"]
    made = {"layer_scalar": (1,)}
    if c.get("enable_moe_block"):
        E, inner = c["num_experts"], c["moe_intermediate_size"]
        made |= {"router.proj.weight": (E, width), "router.scale": (width,), "router.per_expert_scale": (E,)}
        made |= {"experts.gate_up_proj": (E, 2 * inner, width), "experts.down_proj": (E, width, inner)}
        norms = "post_feedforward_layernorm_1", "pre_feedforward_layernorm_2", "post_feedforward_layernorm_2"
        made |= {f"{name}.weight": (width,) for name in norms}
    if inputs:
        made["per_layer_input_gate.weight"] = (inputs, width)
        made["per_layer_projection.weight"] = (width, inputs)
        made["post_per_layer_input_norm.weight"] = (width,)
    return made


def _gemma3n_layer(c):
    """What a layer of gemma3n has besides attention and MLP."""
    width, inputs, rank = c["hidden_size"], c["hidden_size_per_layer_input"], c["laurel_rank"]
    return {
        "altup.modality_router.weight": (4, width),
        "altup.router_norm.weight": (width,),
        "altup.prediction_coefs.weight": (16, 4),
        "altup.correction_coefs.weight": (4, 4),
        "altup.correct_output_scale": (width,),
        "laurel.linear_left.weight": (rank, width),
        "laurel.linear_right.weight": (width, rank),
        "laurel.post_laurel_norm.weight": (width,),
        "per_layer_input_gate.weight": (inputs, width),
        "per_layer_projection.weight": (width, inputs),
        "post_per_layer_input_norm.weight": (width,),
    }


def _mtp(c, layer):
    width = c["hidden_size"]
    norms = {f"{name}.weight": (width,) for name in ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm")}
    inner = {f"{name}.weight": (width,) for name in ("input_layernorm", "post_attention_layernorm")}
    inner |= {f"self_attn.{k}": v for k, v in _attention(c).items()} | {f"mlp.{k}": v for k, v in _mlp(c, 0).items()}
    return {"fc.weight": (width, 2 * width), **norms, **{f"layers.{layer}.{k}": v for k, v in inner.items()}}


def _attention(c):
    K = c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"]
    H, G, kind = c["num_attention_heads"], c["num_key_value_heads"], c["model_type"]
    rows = {"q": H * K * (2 if kind.startswith(HYBRID) else 1), "k": G * K, "v": G * K}
    rows = {p: n for p, n in rows.items() if p == "q" or not (c.get("kv_shared") or (p == "v" and c.get("no_values")))}
    if kind == "phi3":
        rows = {"qkv": sum(rows.values())}
    made = {f"{p}_proj.weight": (n, c["hidden_size"]) for p, n in rows.items()}
    made["o_proj.weight"] = (c["hidden_size"], H * K)
    if kind.startswith("qwen2") or c.get("attention_bias"):
        made.update({f"{p}_proj.bias": (n,) for p, n in rows.items()})
    if c.get("attention_out_bias", kind != "seed_oss" and c.get("attention_bias")):
        made["o_proj.bias"] = (c["hidden_size"],)
    if kind == "gpt_oss":
        made["sinks"] = (H,)
    if is_olmo(c):
        made.update({"q_norm.weight": (H * K,), "k_norm.weight": (G * K,)})
    if kind.startswith(("qwen3", "gemma3", "gemma4")):
        made.update({f"{p}_norm.weight": (K,) for p in "qk" if p in rows})
    return made


def _delta(c):
    H, V, width = c["linear_num_value_heads"], c["linear_value_head_dim"], c["hidden_size"]
    channels = 2 * c["linear_num_key_heads"] * c["linear_key_head_dim"] + H * V
    apart = {"in_proj_qkv": channels, "in_proj_z": H * V, "in_proj_b": H, "in_proj_a": H}
    fused = {"in_proj_qkvz": channels + H * V, "in_proj_ba": 2 * H}
    return {
        **{f"{n}.weight": (rows, width) for n, rows in (fused if c["model_type"] == "qwen3_next" else apart).items()},
        "conv1d.weight": (channels, 1, c["linear_conv_kernel_dim"]),
        "A_log": (H,),
        "dt_bias": (H,),
        "norm.weight": (V,),
        "out_proj.weight": (width, H * V),
    }


def _granite_experts(c):
    E, F, width = c["num_local_experts"], c["intermediate_size"], c["hidden_size"]
    shapes = {"router.layer": (E, width), "input_linear": (E, 2 * F, width), "output_linear": (E, width, F)}
    return {f"block_sparse_moe.{name}.weight": shape for name, shape in shapes.items()}


def _mlp(c, layer):
    def swiglu(ffn):
        if c["model_type"] == "phi3":
            return {"gate_up_proj.weight": (2 * ffn, c["hidden_size"]), "down_proj.weight": (c["hidden_size"], ffn)}
        return {
            "gate_proj.weight": (ffn, c["hidden_size"]),
            "up_proj.weight": (ffn, c["hidden_size"]),
            "down_proj.weight": (c["hidden_size"], ffn),
        }

    if c["model_type"] == "gpt_oss":
        return _stacked(c)
    dense = layer in c.get("mlp_only_layers", []) or (layer + 1) % c.get("decoder_sparse_step", 1)
    if "num_experts" not in c or is_gemma4(c) or dense:
        made = swiglu(c["intermediate_size"])
        rows = {name.replace(".weight", ".bias"): shape[:1] for name, shape in made.items()}
        return made | (rows if c.get("mlp_bias") else {})
    one = swiglu(c["moe_intermediate_size"])
    experts = {f"experts.{e}.{k}": v for e in range(c["num_experts"]) for k, v in one.items()}
    if c["model_type"].startswith("qwen3_vl_moe"):  # stacked, and transposed
        E, D, width = c["num_experts"], c["hidden_size"], c["moe_intermediate_size"]
        experts = {"experts.gate_up_proj": (E, D, 2 * width), "experts.down_proj": (E, width, D)}
    made = {"gate.weight": (c["num_experts"], c["hidden_size"]), **experts}
    if "shared_expert_intermediate_size" in c:
        shared = swiglu(c["shared_expert_intermediate_size"])
        made |= {f"shared_expert.{k}": v for k, v in shared.items()}
        made["shared_expert_gate.weight"] = (1, c["hidden_size"])
    return made


def _stacked(c):
    """Experts as gpt-oss has them: stacked, inputs before outputs, gate and up in one matrix."""
    E, width, ffn = c["num_local_experts"], c["hidden_size"], c["intermediate_size"]
    return {
        "router.weight": (E, width),
        "router.bias": (E,),
        "experts.gate_up_proj": (E, width, 2 * ffn),
        "experts.gate_up_proj_bias": (E, 2 * ffn),
        "experts.down_proj": (E, ffn, width),
        "experts.down_proj_bias": (E, width),
    }


def interval(name, shape, config):
    """The bounds between which a tensor's values are drawn."""
    kind, leaf = text_part(config)["model_type"], name.split(".")[-2]
    if leaf.rstrip("_12").endswith("norm"):
        is_offset = kind.startswith((*HYBRID, "gemma2", "gemma3_")) and "linear_attn" not in name
        return (-0.5, 0.5) if is_offset else (0.5, 1.5)
    fixed = {"A_log": (-1.5, 1.5), "dt_bias": (-2.0, 1.0), "bias": (-0.5, 0.5), "sinks": (-1.0, 3.0)}
    fixed |= {f"{matrix}_proj_bias": (-0.5, 0.5) for matrix in ("gate_up", "down")}
    fixed |= {"correct_output_scale": (0.5, 1.5)}
    fixed |= {"layer_scalar": (0.5, 1.5), "scale": (1.0, 3.0), "per_expert_scale": (0.5, 1.5)}
    stacked = {"gate_up_proj": 4.0, "down_proj": 0.25}  # so that gates and values pass the limits of 7
    if kind == "gpt_oss" and name.split(".")[-1] in stacked:
        bound = stacked[name.split(".")[-1]] * (3.0 / shape[-2]) ** 0.5
        return -bound, bound
    if name.split(".")[-1] in fixed:
        return fixed[name.split(".")[-1]]
    gain = {
        "q_proj": 1.6,
        "k_proj": 1.6,
        "qkv_proj": 1.2,
        "in_proj_a": 2.0,
        "in_proj_b": 2.0,
        "in_proj_ba": 2.0,
        "gate": 2.0,
        "shared_expert_gate": 2.0,
        "proj": 6.0,
        "layer": 2.0,
        "lm_head": 2.0,
        "conv1d": 1.0,
        "modality_router": 16.0,  # it sees rows divided by their width
    }
    bound = gain.get(leaf, 1.0) * (3.0 / (1 if leaf == "embed_tokens" else shape[-1])) ** 0.5
    return -bound, bound


def tensors(config, seed):
    """Every tensor of a checkpoint as float32, each drawn from its own seed of NumPy's frozen RandomState."""
    made = {}
    for name, shape in shapes(config).items():
        low, high = interval(name, shape, config)
        stream = np.random.RandomState(zlib.crc32(name.removeprefix(prefix(config)).encode()) ^ seed)
        made[name] = (low + (high - low) * stream.random_sample(shape)).astype(np.float32)
    return made


def write(folder, config, arrays, dtype="F32"):
    """Writes a checkpoint folder; returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    named = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}[dtype]
    (folder / "config.json").write_text(json.dumps({**config, "dtype": named}))
    header, at, blobs = {}, 0, []
    for name, array in arrays.items():
        blobs.append(array.astype(DTYPES[dtype]).tobytes())
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [at, at + len(blobs[-1])]}
        at += len(blobs[-1])
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    text += b" " * (-len(text) % 8)
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + b"".join(blobs))
    return folder


def prompt(config, length, seed=0):
    """Random token ids."""
    return np.random.RandomState(seed + 1).randint(0, text_part(config)["vocab_size"], length).tolist()
