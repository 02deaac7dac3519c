"""The layers of models that people have, at their real widths: GGUF metadata and tensors of files with few layers.

A file has the vocabulary cut by as much as the layers, so that embedding and head keep their share of the work. Which
tensor has which format follows what llama.cpp's quantizer does without an importance matrix, and for gpt-oss the
published file.
"""

from dataclasses import dataclass, replace
from functools import partial


@dataclass(frozen=True)
class Shape:
    """What a file is made of.

    vocabulary, all_layers: those of the whole model. layers: of the file. keys: metadata, without the architecture's
    prefix. block: the tensors of layer i, {name without `blk.i.`: shape}. top: tensors outside of layers.
    """

    architecture: str
    vocabulary: int
    all_layers: int
    layers: int
    keys: dict
    block: object
    top: object = lambda layers, rows: {}
    tied: bool = False

    @property
    def rows(self):
        """Those of the embedding: the vocabulary's share of the layers, in whole panels."""
        return -(-self.vocabulary * self.layers // self.all_layers // 64) * 64

    def metadata(self):
        return {
            "block_count": self.layers,
            "context_length": 32768,
            "vocab_size": self.rows,
            "attention.layer_norm_rms_epsilon": 1e-6,
            **self.keys,
        }

    def tensors(self):
        """{name: shape}"""
        width = self.keys["embedding_length"]
        made = {"token_embd.weight": (self.rows, width), "output_norm.weight": (width,)}
        made |= {} if self.tied else {"output.weight": (self.rows, width)}
        made |= self.top(self.layers, self.rows)
        for i in range(self.layers):
            made |= {f"blk.{i}.{name}": shape for name, shape in self.block(i).items()}
        return made


def attention(width, heads, kv_heads, size, gated=False):
    return {
        "attn_q.weight": (heads * size * (1 + gated), width),
        "attn_k.weight": (kv_heads * size, width),
        "attn_v.weight": (kv_heads * size, width),
        "attn_output.weight": (width, heads * size),
    }


def head_norms(size):
    return {f"attn_{part}_norm.weight": (size,) for part in "qk"}


def mlp(width, inner, end=""):
    return {f"ffn_{part}{end}.weight": (inner, width) for part in ("gate", "up")} | {
        f"ffn_down{end}.weight": (width, inner)
    }


def stacks(width, inner, experts):
    return {name: (experts, *shape) for name, shape in mlp(width, inner, "_exps").items()}


# ------------------------------------------------------------ Qwen3-0.6B


def qwen3_block(i):
    norms = {"attn_norm.weight": (1024,), "ffn_norm.weight": (1024,)}
    return norms | attention(1024, 16, 8, 128) | head_norms(128) | mlp(1024, 3072)


QWEN3 = Shape(
    "qwen3",
    151936,
    28,
    28,
    {
        "embedding_length": 1024,
        "feed_forward_length": 3072,
        "attention.head_count": 16,
        "attention.head_count_kv": 8,
        "attention.key_length": 128,
        "attention.value_length": 128,
        "rope.freq_base": 1e6,
    },
    qwen3_block,
    tied=True,
)

# ------------------------------------------------------------ Qwen3.5-35B-A3B, Qwen3.6-35B-A3B


def qwen35moe_block(i, experts=256):
    width, keys, values = 2048, 16 * 128, 32 * 128
    linear = {
        "attn_qkv.weight": (2 * keys + values, width),
        "attn_gate.weight": (values, width),
        "ssm_conv1d.weight": (2 * keys + values, 4),
        "ssm_dt.bias": (32,),
        "ssm_a": (32,),
        "ssm_beta.weight": (32, width),
        "ssm_alpha.weight": (32, width),
        "ssm_norm.weight": (128,),
        "ssm_out.weight": (width, values),
    }
    full = attention(width, 16, 2, 256, gated=True) | head_norms(256)
    return {
        "attn_norm.weight": (width,),
        "post_attention_norm.weight": (width,),
        **(full if i % 4 == 3 else linear),
        "ffn_gate_inp.weight": (experts, width),
        **stacks(width, 512, experts),
        "ffn_gate_inp_shexp.weight": (width,),
        **mlp(width, 512, "_shexp"),
    }


QWEN35MOE = Shape(
    "qwen35moe",
    248320,
    40,
    4,
    {
        "embedding_length": 2048,
        "attention.head_count": 16,
        "attention.head_count_kv": 2,
        "attention.key_length": 256,
        "attention.value_length": 256,
        "rope.freq_base": 1e7,
        "rope.dimension_count": 64,
        "rope.dimension_sections": [11, 11, 10, 0],
        "ssm.conv_kernel": 4,
        "ssm.state_size": 128,
        "ssm.group_count": 16,
        "ssm.time_step_rank": 32,
        "ssm.inner_size": 4096,
        "full_attention_interval": 4,
        "expert_count": 256,
        "expert_used_count": 8,
        "expert_feed_forward_length": 512,
        "expert_shared_feed_forward_length": 512,
    },
    qwen35moe_block,
)

# ------------------------------------------------------------ gpt-oss-20b


def gpt_oss_block(i, experts=32):
    width = inner = 2880
    matrices = attention(width, 64, 8, 64)
    biases = {name.replace(".weight", ".bias"): shape[:1] for name, shape in matrices.items()}
    of_experts = stacks(width, inner, experts)
    return {
        "attn_norm.weight": (width,),
        "post_attention_norm.weight": (width,),
        "attn_sinks.weight": (64,),
        **matrices,
        **biases,
        "ffn_gate_inp.weight": (experts, width),
        "ffn_gate_inp.bias": (experts,),
        **of_experts,
        **{name.replace(".weight", ".bias"): shape[:2] for name, shape in of_experts.items()},
    }


GPT_OSS = Shape(
    "gpt-oss",
    201088,
    24,
    4,
    {
        "embedding_length": 2880,
        "feed_forward_length": 2880,
        "attention.head_count": 64,
        "attention.head_count_kv": 8,
        "attention.key_length": 64,
        "attention.value_length": 64,
        "attention.sliding_window": 128,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": 150000.0,
        "rope.dimension_count": 64,
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": 32.0,
        "rope.scaling.original_context_length": 4096,
        "expert_count": 32,
        "expert_used_count": 4,
        "expert_feed_forward_length": 2880,
    },
    gpt_oss_block,
)

# ------------------------------------------------------------ Gemma4-E4B

GEMMA_LAYERS, GEMMA_SHARED = 12, 6  # of 42 and 18; llama.cpp wants the last layer with keys of its own to see all keys


def gemma4_block(i):
    width, size = 2560, 512 if i % 6 == 5 else 256
    mixer = attention(width, 8, 2, size) | head_norms(size)
    if i >= GEMMA_LAYERS - GEMMA_SHARED:  # reads the keys and values of an earlier layer
        mixer = {n: s for n, s in mixer.items() if not n.startswith(("attn_k", "attn_v"))}
    norms = ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm", "post_norm")
    return {
        **{f"{name}.weight": (width,) for name in norms},
        **mixer,
        **mlp(width, 10240),
        "inp_gate.weight": (256, width),
        "proj.weight": (width, 256),
        "layer_output_scale.weight": (1,),
    }


def gemma4_top(layers, rows):
    return {
        "per_layer_token_embd.weight": (rows, 256 * layers),
        "per_layer_model_proj.weight": (256 * layers, 2560),
        "per_layer_proj_norm.weight": (256,),
        "rope_freqs.weight": (256,),
    }


GEMMA4 = Shape(
    "gemma4",
    262144,
    42,
    GEMMA_LAYERS,
    {
        "embedding_length": 2560,
        "feed_forward_length": 10240,
        "embedding_length_per_layer_input": 256,
        "attention.head_count": 8,
        "attention.head_count_kv": 2,
        "attention.key_length": 512,
        "attention.value_length": 512,
        "attention.key_length_swa": 256,
        "attention.value_length_swa": 256,
        "attention.sliding_window": 512,
        "attention.sliding_window_pattern": [i % 6 != 5 for i in range(GEMMA_LAYERS)],
        "attention.shared_kv_layers": GEMMA_SHARED,
        "rope.freq_base": 1e6,
        "rope.freq_base_swa": 1e4,
        "rope.dimension_count": 512,
        "rope.dimension_count_swa": 256,
        "final_logit_softcapping": 30.0,
    },
    gemma4_block,
    gemma4_top,
    tied=True,
)

# {model: (its shape, the mixtures of formats that people have)}
FILES = {
    "qwen3.5-35b-a3b-layers": (QWEN35MOE, ("Q4_K_M",)),
    "gpt-oss-20b-layers": (GPT_OSS, ("MXFP4",)),
    "gemma4-e4b-layers": (GEMMA4, ("Q4_0", "Q4_K_M")),
    "qwen3-0.6b-blocks": (QWEN3, ("Q2_K", "Q3_K_M", "MXFP4", "Q4_0")),
}


def with_experts(shape, count):
    """The same with so many experts in each layer."""
    return replace(shape, keys=shape.keys | {"expert_count": count}, block=partial(shape.block, experts=count))


# Files whose weights fit into memory in float32.
FEW_EXPERTS = {
    "qwen3.5-35b-a3b-32-experts": (with_experts(QWEN35MOE, 32), ("Q4_K_M",)),
    "gpt-oss-20b-8-experts": (with_experts(GPT_OSS, 8), ("MXFP4",)),
}

# ------------------------------------------------------------ which tensor has which format

BASE = {"Q2_K": "Q2_K", "Q3_K_M": "Q3_K", "Q4_K_M": "Q4_K", "Q4_0": "Q4_0", "MXFP4": "MXFP4"}
PLAIN = ("_norm", "ffn_gate_inp", "ssm_conv1d", "rope_freqs", "attn_sinks", "layer_output_scale")


def format_of(mixture, name, dims, shape):
    """The GGML format of a tensor. dims: how many dimensions it has. shape: the Shape of its file."""
    if dims < 2 or not name.endswith(".weight") or any(part in name for part in PLAIN):
        return "F32"
    if name == "per_layer_model_proj.weight":
        return "BF16"
    if "token_embd" in name or name == "output.weight":
        if mixture == "MXFP4":
            return "Q8_0"
        return "Q6_K" if shape.tied or name == "output.weight" else BASE[mixture]
    if mixture == "MXFP4" and shape.keys.get("expert_count"):
        return "MXFP4" if dims == 3 else "Q8_0"
    layer, _, rest = name.removeprefix("blk.").partition(".")
    return raised(mixture, rest, int(layer), shape) or BASE[mixture]


def raised(mixture, name, layer, shape):
    """The format of a layer's matrix that a mixture gives more bits; None for others."""
    down, values, num = name.startswith("ffn_down"), name == "attn_v.weight", shape.layers
    if mixture == "Q4_K_M":
        if (down or values) and gets_more_bits(rank(layer, shape) if values else layer, num_of(values, shape)):
            return "Q6_K"
        return "Q5_K" if name == "attn_qkv.weight" else None
    if mixture == "Q2_K":
        return "Q3_K" if down or values or name == "attn_output.weight" else None
    if mixture == "Q3_K_M":
        more = layer < num // 16 if down else values and layer < 2
        return "Q5_K" if more else "Q4_K" if down or values or name == "attn_output.weight" else None
    return None


def rank(layer, shape):
    """How many layers before this one have values of their own."""
    return sum("attn_v.weight" in shape.block(i) for i in range(layer))


def num_of(values, shape):
    return rank(shape.layers, shape) if values else shape.layers


def gets_more_bits(i, num):
    return i < num // 8 or i >= 7 * num // 8 or (i - num // 8) % 3 == 2
