"""Qwen3.5: gated delta rule layers with a gated attention layer after every few; norms store w - 1; partial rope."""

from collections.abc import Mapping
from functools import partial

from lockstep.models.config import Config, check_keys, layer_types, need, optional
from lockstep.models.decoder import decoder
from lockstep.models.families.llama_like import (
    biases,
    feed_forward,
    heads_of,
    mlp_of,
    model_of,
    num_layers,
    pre_norm,
    self_attention,
)
from lockstep.models.family import Family
from lockstep.models.gated_delta import Projections, gated_delta, projections
from lockstep.models.model_config import Experts, Layer, LinearAttention, Mlp, ModelConfig
from lockstep.models.record import Norm, Recorder
from lockstep.models.rope_config import MROPE
from lockstep.models.tiny import BASE
from lockstep.runtime.program import Tensor
from lockstep.weights.gguf.architecture import Architecture, has_biases
from lockstep.weights.gguf.keys import Keys
from lockstep.weights.gguf.names import ATTENTION, HEAD_NORMS, MLP
from lockstep.weights.gguf.undo import (
    ConvChannels,
    DecayLog,
    GroupedColumns,
    GroupedRows,
    MinusOne,
    OneRow,
    Undo,
    ValueHeads,
)
from lockstep.weights.tensor import BLOCK_FORMATS, TensorInfo

OFFSET = 1.0  # of every norm except the norm of the delta rule's heads
DELTA = """linear_num_key_heads linear_num_value_heads linear_key_head_dim linear_value_head_dim
linear_conv_kernel_dim""".split()
IN_TURN = "linear_value_heads_in_turn"  # a key of configs that are made of GGUF files
KEYS = [IN_TURN, "attention_bias", "layer_types", "full_attention_interval", "mtp_num_hidden_layers", *DELTA]

# ------------------------------------------------------------ config.json


def read(config: Config) -> ModelConfig:
    """The ModelConfig."""
    check_keys(config, KEYS, free=["partial_rotary_factor"])
    layers, mtp_layers = layers_of(config, mlp_of(config))
    return model_of(config, layers, mtp_layers=mtp_layers)


def layers_of(config: Config, mlp: Mlp | Experts, mtp_layers: int = 0) -> tuple[list[Layer], tuple[Layer, ...]]:
    """The layers, and those of the MTP head; mtp_layers: how many it has if the config does not say."""
    check_output_gate(config)
    attention = Layer(heads_of(config, {"partial": 0.25, "ignored": MROPE}, **biases(config)), mlp)
    linear = Layer(delta_rule(config), mlp)
    interval = optional(config, "full_attention_interval", 4)
    types = layer_types(config, "full_attention", "linear_attention") or [
        "full_attention" if (i + 1) % interval == 0 else "linear_attention" for i in range(num_layers(config))
    ]
    layers = [attention if layer_type == "full_attention" else linear for layer_type in types]
    return layers, (attention,) * optional(config, "mtp_num_hidden_layers", mtp_layers, low=0)


def check_output_gate(config: Config) -> None:
    """ValueError for another activation of the gate in the norm of the delta rule's heads than silu."""
    gate = config.get("output_gate_type")
    if gate not in (None, "silu", "swish"):
        raise ValueError(f"config key 'output_gate_type': {gate!r} is not supported, only 'silu' or 'swish'")


def delta_rule(config: Config) -> LinearAttention:
    """The shape of gated delta rule layers; ValueError for one that the kernels cannot run."""
    sizes = [need(config, key) for key in DELTA]
    linear = LinearAttention(*sizes, has_heads_in_turn=bool(config.get(IN_TURN)))
    if linear.k_head_dim % 16 or linear.v_head_dim % 16 or linear.num_v_heads % linear.num_k_heads:
        raise ValueError(
            f"linear attention of {linear.num_v_heads} value heads of {linear.v_head_dim} and {linear.num_k_heads} "
            f"key heads of {linear.k_head_dim} is not supported: sizes must be multiples of 16, the value heads "
            f"a multiple of the key heads"
        )
    return linear


# ------------------------------------------------------------ a layer


def layer(
    ops: Recorder,
    x: Tensor,
    config: ModelConfig,
    shape: Layer,
    label: str,
    projected: Projections = projections,
) -> Tensor:
    """One layer, with either token mixer. projected: gives the projections of the delta rule."""
    norm = Norm(config.rms_eps, OFFSET)

    def mixer(h: Tensor) -> Tensor:
        if not isinstance(shape.mixer, LinearAttention):
            return self_attention(ops, h, shape.mixer, f"{label}.self_attn", head_norms=norm, gated=True)
        heads = gated_delta(ops, h, shape.mixer, f"{label}.linear_attn", config.rms_eps, projected)
        return ops.linear(heads, [(f"{label}.linear_attn.out_proj", h.width)])

    return pre_norm(ops, x, label, norm, mixer, mlp=lambda h: feed_forward(ops, h, shape.mlp, f"{label}.mlp"))


# ------------------------------------------------------------ GGUF

NAMES = {
    **ATTENTION,
    **HEAD_NORMS,
    **MLP,
    "post_attention_norm": "post_attention_layernorm",
    "attn_qkv": "linear_attn.in_proj_qkv",
    "attn_gate": "linear_attn.in_proj_z",
    "ssm_alpha": "linear_attn.in_proj_a",
    "ssm_beta": "linear_attn.in_proj_b",
    "ssm_out": "linear_attn.out_proj",
    "ssm_conv1d": "linear_attn.conv1d",
    "ssm_norm": "linear_attn.norm",
    "ssm_a": "linear_attn.A_log",
    "ssm_dt.bias": "linear_attn.dt_bias",
    "ssm_dt": "linear_attn.dt_bias",  # as Ollama names it
}
MTP_NAMES = {
    "nextn.eh_proj": "mtp.fc",
    "nextn.enorm": "mtp.pre_fc_norm_embedding",
    "nextn.hnorm": "mtp.pre_fc_norm_hidden",
    "nextn.shared_head_norm": "mtp.norm",
}


def gguf_config(config: dict, keys: Keys, infos: Mapping[str, TensorInfo], reordered: bool = True) -> dict:
    """Adds biases, layer types and the numbers of the gated delta rule. reordered: whether conversion reorders value
    heads, as it does for this architecture. The norm before the output projections puts them in that order, too, if
    blocks of one of these matrices span heads, as blocks of 256 do."""
    if keys.flag("ssm.v_head_reordered", reordered) != reordered:
        raise ValueError(f"ssm.v_head_reordered is {not reordered}, which is not supported in this architecture")
    num_value_heads, inner_size = keys.integer("ssm.time_step_rank"), keys.integer("ssm.inner_size")
    if num_value_heads == 0 or inner_size % num_value_heads:
        raise ValueError(f"ssm.inner_size {inner_size} is not {num_value_heads} heads of one size")
    head_size = inner_size // num_value_heads
    outputs = [info for name, info in infos.items() if name.endswith("ssm_out.weight") and info.format in BLOCK_FORMATS]
    spans = any(head_size % BLOCK_FORMATS[info.format].block_size for info in outputs)
    return gguf_rope(config, keys) | {
        **has_biases(infos, "attention_bias"),
        **({IN_TURN: True} if reordered and spans and keys.integer("ssm.group_count") != num_value_heads else {}),
        "layer_types": gguf_layer_types(keys, config["num_hidden_layers"]),
        "full_attention_interval": keys.integer("full_attention_interval", 4),
        "linear_num_key_heads": keys.integer("ssm.group_count"),
        "linear_num_value_heads": num_value_heads,
        "linear_key_head_dim": keys.integer("ssm.state_size"),
        "linear_value_head_dim": head_size,
        "linear_conv_kernel_dim": keys.integer("ssm.conv_kernel"),
        "attn_output_gate": True,
        "mamba_ssm_dtype": "float32",
        "mtp_num_hidden_layers": keys.integer("nextn_predict_layers", 0),
    }


def gguf_rope(config: dict, keys: Keys) -> dict:
    """The config with its rope in rope_parameters, whose M-RoPE sections text does not need."""
    sections = (keys.values("rope.dimension_sections") or [11, 11, 10])[:3]
    rest = {key: value for key, value in config.items() if key not in ("rope_theta", "rope_scaling")}
    parameters = {
        "rope_type": "default",
        "rope_theta": config["rope_theta"],
        "partial_rotary_factor": rest.pop("partial_rotary_factor", 1.0),
        **(config["rope_scaling"] or {}),
        "mrope_section": sections,
        "mrope_interleaved": True,
    }
    return {**rest, "rope_parameters": parameters}


def gguf_layer_types(keys: Keys, num_layers: int) -> list[str]:
    """The type of each layer: from an array with a flag for each layer, or every n-th layer is full attention."""
    recurrent = keys.values("attention.recurrent_layers")
    interval = keys.integer("full_attention_interval", 4)
    if recurrent is None and interval > 0:
        recurrent = [(layer + 1) % interval != 0 for layer in range(num_layers)]
    if not isinstance(recurrent, list) or len(recurrent) < num_layers:
        raise ValueError(f"attention.recurrent_layers must tell {num_layers} layers, found {recurrent!r}")
    return ["linear_attention" if flag else "full_attention" for flag in recurrent[:num_layers]]


def undo(name: str, config: Mapping) -> Undo:
    """Conversion reordered value heads, stored norm weights as 1 + w, and A_log as decays -exp(A_log)."""
    heads = ValueHeads(config["linear_num_key_heads"], config["linear_num_value_heads"])
    if heads.num_key_heads == 0 or heads.num_value_heads % heads.num_key_heads:
        raise ValueError(f"{heads.num_value_heads} value heads do not divide over {heads.num_key_heads} key heads")
    num_query_key_rows = 2 * heads.num_key_heads * config["linear_key_head_dim"]
    if config.get(IN_TURN) and name.endswith(".out_proj.weight"):
        return Undo()
    return undo_of(name, heads, num_query_key_rows)


def undo_of(name: str, heads: ValueHeads, num_query_key_rows: int) -> Undo:
    """The Undo of a tensor. heads: how conversion ordered the value heads, whose rows come after queries' and keys'."""
    stem = name.removesuffix(".weight").rpartition(".")[2]
    if stem == "A_log":
        return DecayLog(heads)
    if stem == "conv1d":
        return ConvChannels(heads, num_query_key_rows)
    if stem.endswith("norm") or "_norm_" in stem:
        return Undo() if ".linear_attn." in name else MinusOne()
    if stem == "shared_expert_gate":
        return OneRow()
    if heads.num_key_heads == heads.num_value_heads:
        return Undo()
    return regrouping(stem, heads, num_query_key_rows)


def regrouping(stem: str, heads: ValueHeads, num_query_key_rows: int) -> Undo:
    """The Undo of a tensor that holds value heads, by the last part of its name."""
    if stem == "in_proj_qkv":
        return GroupedRows(heads, num_query_key_rows)
    if stem in ("in_proj_z", "in_proj_a", "in_proj_b", "dt_bias"):
        return GroupedRows(heads)
    return GroupedColumns(heads) if stem == "out_proj" else Undo()


QWEN3_5 = Family(
    model_types=("qwen3_5_text", "qwen3_5"),
    read=read,
    record=partial(decoder, layer=layer, norm_offset=OFFSET),
    gguf=Architecture("qwen35", "qwen3_5_text", "Qwen3_5ForCausalLM", NAMES, gguf_config, undo, MTP_NAMES),
    tiny={
        **BASE,
        "model_type": "qwen3_5_text",
        "layer_types": ["linear_attention", "full_attention"],
        "num_hidden_layers": 2,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 32,
        "linear_value_head_dim": 64,
        "linear_conv_kernel_dim": 4,
    },
)
