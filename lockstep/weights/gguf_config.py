"""A Hugging Face config from GGUF metadata.

Every architecture key must be understood: one that is neither used here nor known to be harmless is an
error, because it might change the arithmetic. Source: src/llama-arch.cpp, src/llama-model.cpp and
conversion/*.py of llama.cpp.
"""

from collections.abc import Mapping

import numpy as np

from lockstep.weights.gguf_rope import LLAMA3_CONTEXT, llama3_scaling
from lockstep.weights.tensor import TensorInfo

MODEL_TYPES: Mapping[str, tuple[str, str]] = {
    "llama": ("llama", "LlamaForCausalLM"),
    "smollm3": ("smollm3", "SmolLM3ForCausalLM"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
    "qwen3moe": ("qwen3_moe", "Qwen3MoeForCausalLM"),
    "qwen35": ("qwen3_5_text", "Qwen3_5ForCausalLM"),
}
MAX_FLOAT32 = 3.4e38
HARMLESS = {"vocab_size", "tensor_data_layout", "rope.scaling.finetuned", "expert_feed_forward_length"}
# Values that mean "as usual" wherever these keys appear.
USUAL = {"expert_count": 0, "expert_used_count": 0, "attention.causal": True, "nextn_predict_layers": 0}
# By llama.cpp's numbers.
POOLINGS: Mapping[int, str] = {0: "none", 1: "mean", 2: "cls", 3: "last", 4: "rank"}


class Keys:
    """Metadata of one architecture; remembers which keys were used."""

    def __init__(self, metadata: Mapping[str, object], architecture: str, where: str):
        self._metadata, self._where = metadata, where
        self._prefix = f"{architecture}."
        self._used: set[str] = set()

    def __contains__(self, key: str) -> bool:
        return self._prefix + key in self._metadata

    def integer(self, key: str, default: int | None = None) -> int:
        """An integer of at least 0; for a per-layer array, the value all layers share."""
        value = self._get(key, default)
        if isinstance(value, np.ndarray):
            value = self._shared(key, value)
        if type(value) is not int or value < 0 or value > 1 << 40:
            raise ValueError(f"{self._where}: {self._prefix}{key} must be a whole number, found {value!r}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number; a float32 comes as the shortest decimal that means it, as config.json would have it."""
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < MAX_FLOAT32:
            raise ValueError(f"{self._where}: {self._prefix}{key} must be a finite number, found {value!r}")
        return float(str(np.float32(value)))

    def values(self, key: str) -> list | None:
        """An array of numbers as a list, or None if the key is absent."""
        if key not in self:
            return None
        value = self._get(key, None)
        if not isinstance(value, np.ndarray):
            raise ValueError(f"{self._where}: {self._prefix}{key} must be an array of numbers, found {value!r:.80}")
        return value.tolist()

    def text(self, key: str, default: str) -> str:
        """A string."""
        value = self._get(key, default)
        if not isinstance(value, str):
            raise ValueError(f"{self._where}: {self._prefix}{key} must be a string, found {value!r}")
        return value

    def check_all_used(self) -> None:
        """Raise ValueError naming the keys that nobody understood."""
        known = self._used | HARMLESS
        keys = [key.removeprefix(self._prefix) for key in self._metadata if key.startswith(self._prefix)]
        unknown = [key for key in keys if key not in known and not self._is_usual(key)]
        if unknown:
            named = ", ".join(f"{self._prefix}{key}" for key in unknown)
            raise ValueError(f"{self._where}: metadata not supported: {named}")

    def _is_usual(self, key: str) -> bool:
        value = self._metadata[self._prefix + key]
        return key in USUAL and not isinstance(value, np.ndarray) and value == USUAL[key]

    def _get(self, key: str, default: object) -> object:
        self._used.add(key)
        value = self._metadata.get(self._prefix + key, default)
        if value is None:
            raise ValueError(f"{self._where}: metadata {self._prefix}{key} is missing")
        return value

    def _shared(self, key: str, values: np.ndarray) -> int:
        if len(values) == 0 or (values != values[0]).any():
            raise ValueError(f"{self._where}: {self._prefix}{key} differs between layers, which is not supported")
        return values[0].item()


def architecture_of(metadata: Mapping[str, object], where: str) -> str:
    """The file's architecture. Raises ValueError unless it is one of MODEL_TYPES."""
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in MODEL_TYPES:
        supported = ", ".join(MODEL_TYPES)
        raise ValueError(f"{where}: architecture {architecture!r} is not supported, only {supported}")
    return architecture


def hf_config(
    metadata: Mapping[str, object], infos: Mapping[str, TensorInfo], rope_factors: np.ndarray | None, where: str
) -> dict:
    """The equivalent of config.json.

    `infos` are GGUF's tensors by GGUF name and shape, `rope_factors` float32 [K / 2] the content of
    rope_freqs.weight if there is one. Raises ValueError for what is missing, inconsistent or not supported.
    """
    architecture = architecture_of(metadata, where)
    keys = Keys(metadata, architecture, where)
    config = _common(keys, metadata, infos, architecture, where)
    extra = {"qwen35": _qwen35, "qwen3moe": _qwen3moe, "smollm3": _smollm3}.get(architecture)
    if extra:
        config |= extra(keys, config)
    config |= _rope(keys, config, rope_factors, where)
    if architecture == "llama" and "attention.sliding_window" in keys:
        window = keys.integer("attention.sliding_window")
        config |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": window}
    keys.check_all_used()
    return config


def _common(
    keys: Keys, metadata: Mapping[str, object], infos: Mapping[str, TensorInfo], architecture: str, where: str
) -> dict:
    if "token_embd.weight" not in infos or len(infos["token_embd.weight"].shape) != 2:
        raise ValueError(f"{where}: tensor 'token_embd.weight' [vocabulary, width] is missing")
    hidden_size, num_heads = keys.integer("embedding_length"), keys.integer("attention.head_count")
    if num_heads == 0 or hidden_size == 0:
        raise ValueError(f"{where}: {hidden_size} embedding_length and {num_heads} heads, expected more than 0")
    head_dim = keys.integer("attention.key_length", hidden_size // num_heads)
    if keys.integer("attention.value_length", head_dim) != head_dim:
        raise ValueError(f"{where}: value heads of another size than key heads ({head_dim}) are not supported")
    num_layers = keys.integer("block_count") - keys.integer("nextn_predict_layers", 0)
    if not 0 < num_layers < len(infos):
        raise ValueError(f"{where}: {num_layers} layers do not fit a file of {len(infos)} tensors")
    model_type, class_name = MODEL_TYPES[architecture]
    return {
        "model_type": model_type,
        "architectures": [class_name],
        "vocab_size": infos["token_embd.weight"].shape[0],
        "hidden_size": hidden_size,
        "intermediate_size": keys.integer("feed_forward_length", 0),
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": keys.integer("attention.head_count_kv", num_heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": keys.integer("context_length"),
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "output.weight" not in infos,
        **_biases(architecture, infos),
        **_pooling(keys, where),
        **_token_ids(metadata, infos["token_embd.weight"].shape[0]),
    }


def _biases(architecture: str, infos: Mapping[str, TensorInfo]) -> dict[str, bool]:
    if architecture == "qwen2":
        return {}
    biases = {"attention_bias": "blk.0.attn_q.bias" in infos}
    return biases | ({"mlp_bias": "blk.0.ffn_gate.bias" in infos} if architecture in ("llama", "smollm3") else {})


def _pooling(keys: Keys, where: str) -> dict[str, str]:
    """How the hidden states of a text become its embedding, as `pooling_type`, which config.json does not know."""
    number = keys.integer("pooling_type", 0)
    pooling = POOLINGS.get(number, str(number))
    if pooling not in ("none", "mean", "last"):
        raise ValueError(f"{where}: pooling_type {pooling} is not supported, only none, mean and last")
    return {} if pooling == "none" else {"pooling_type": pooling}


def _token_ids(metadata: Mapping[str, object], vocab_size: int) -> dict[str, object]:
    """Without ids that no token has: some conversions write 2^32 - 1 for none, see serve/gguf_tokenizer.py."""
    given = {name: metadata.get(f"tokenizer.ggml.{name}") for name in ("bos_token_id", "eos_token_id")}
    is_there = lambda value: type(value) is not int or 0 <= value < vocab_size
    return {name: value for name, value in given.items() if value is not None and is_there(value)}


def _smollm3(keys: Keys, config: dict) -> dict:
    # llama.cpp fixes the interval; GGUF does not record it.
    layers = [int((layer + 1) % 4 != 0) for layer in range(config["num_hidden_layers"])]
    return {"no_rope_layer_interval": 4, "no_rope_layers": layers}


def _qwen3moe(keys: Keys, config: dict) -> dict:
    return {
        "num_experts": keys.integer("expert_count"),
        "num_experts_per_tok": keys.integer("expert_used_count"),
        "moe_intermediate_size": keys.integer("expert_feed_forward_length", config["intermediate_size"]),
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def _qwen35(keys: Keys, config: dict) -> dict:
    num_value_heads = keys.integer("ssm.time_step_rank")
    inner_size = keys.integer("ssm.inner_size")
    if num_value_heads == 0 or inner_size % num_value_heads:
        raise ValueError(f"qwen35.ssm.inner_size {inner_size} is not {num_value_heads} heads of one size")
    return {
        "layer_types": _layer_types(keys, config["num_hidden_layers"]),
        "full_attention_interval": keys.integer("full_attention_interval", 4),
        "linear_num_key_heads": keys.integer("ssm.group_count"),
        "linear_num_value_heads": num_value_heads,
        "linear_key_head_dim": keys.integer("ssm.state_size"),
        "linear_value_head_dim": inner_size // num_value_heads,
        "linear_conv_kernel_dim": keys.integer("ssm.conv_kernel"),
        "attn_output_gate": True,
        "mamba_ssm_dtype": "float32",
        "mtp_num_hidden_layers": keys.integer("nextn_predict_layers", 0),
    }


def _layer_types(keys: Keys, num_layers: int) -> list[str]:
    recurrent = keys.values("attention.recurrent_layers")
    interval = keys.integer("full_attention_interval", 4)
    if recurrent is None and interval > 0:
        recurrent = [(layer + 1) % interval != 0 for layer in range(num_layers)]
    if not isinstance(recurrent, list) or len(recurrent) < num_layers:
        raise ValueError(f"qwen35.attention.recurrent_layers must tell {num_layers} layers, found {recurrent!r}")
    return ["linear_attention" if flag else "full_attention" for flag in recurrent[:num_layers]]


def _rope(keys: Keys, config: dict, factors: np.ndarray | None, where: str) -> dict:
    theta = keys.number("rope.freq_base", 10000.0)
    head_dim = config["head_dim"]
    rope_dim = keys.integer("rope.dimension_count", head_dim)
    if rope_dim % 2 or not 0 < rope_dim <= head_dim or theta < 1:
        raise ValueError(f"{where}: rope.dimension_count {rope_dim}, base {theta} do not fit heads of {head_dim}")
    scaling = _scaling(keys, theta, rope_dim, factors, where)
    partial = {"partial_rotary_factor": rope_dim / head_dim}
    if config["model_type"] != "qwen3_5_text":
        return {"rope_theta": theta, "rope_scaling": scaling, **(partial if rope_dim != head_dim else {})}
    sections = (keys.values("rope.dimension_sections") or [11, 11, 10])[:3]
    mrope = {"mrope_section": sections, "mrope_interleaved": True}
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta, **partial, **(scaling or {}), **mrope}}


def _scaling(keys: Keys, theta: float, rope_dim: int, factors: np.ndarray | None, where: str) -> dict | None:
    kind = keys.text("rope.scaling.type", "none")
    if factors is not None and kind in ("none", "llama3"):
        original = keys.integer("rope.scaling.original_context_length", LLAMA3_CONTEXT)
        return llama3_scaling(theta, rope_dim, factors, original, where)
    if kind == "none":
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": keys.number("rope.scaling.factor")}
    if kind != "yarn":
        raise ValueError(f"{where}: rope.scaling.type {kind!r} is not supported, only none, linear and yarn")
    return _yarn_scaling(keys)


def _yarn_scaling(keys: Keys) -> dict:
    scaling = {
        "rope_type": "yarn",
        "factor": keys.number("rope.scaling.factor"),
        "original_max_position_embeddings": keys.integer("rope.scaling.original_context_length"),
    }
    renamed = {"yarn_beta_fast": "beta_fast", "yarn_beta_slow": "beta_slow", "yarn_attn_factor": "attention_factor"}
    present = {name: key for key, name in renamed.items() if f"rope.scaling.{key}" in keys}
    return scaling | {name: keys.number(f"rope.scaling.{key}") for name, key in present.items()}
