"""A plain llama model in torch: rotary attention and a SwiGLU FFN in every layer, nothing else.

Module names are the checkpoint's tensor names. Shapes: B sequences, T tokens, D width.
"""

from dataclasses import asdict, dataclass
from typing import ClassVar

from fused import Steps
from model import Mlp, initialise, linear, rotary_tables, rotate
from torch import nn


@dataclass(frozen=True)
class LlamaConfig:
    vocab_size: int = 4096
    hidden_size: int = 256
    # like every other width a multiple of 256, which llama.cpp's K-quants need
    intermediate_size: int = 256
    num_hidden_layers: int = 6
    num_attention_heads: int = 8
    num_key_value_heads: int = 2
    head_dim: int = 32
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5
    partial_rotary_factor: ClassVar[float] = 1.0

    def to_dict(self):
        return asdict(self)

    def hugging_face(self):
        """What config.json says of this architecture alone."""
        values = self.to_dict()
        rope = {"rope_type": "default", "rope_theta": values.pop("rope_theta")}
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            **values,
            "rope_parameters": rope,
            "mlp_bias": False,
        }


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c = c
        self.q_proj = linear(c.hidden_size, c.num_attention_heads * c.head_dim)
        self.k_proj = linear(c.hidden_size, c.num_key_value_heads * c.head_dim)
        self.v_proj = linear(c.hidden_size, c.num_key_value_heads * c.head_dim)
        self.o_proj = linear(c.num_attention_heads * c.head_dim, c.hidden_size)

    def forward(self, x, rope, steps):
        projections = self.q_proj, self.k_proj, self.v_proj
        q, k, v = (project(x).unflatten(-1, (-1, self.c.head_dim)) for project in projections)
        return self.o_proj(steps.attention(rotate(q, rope), rotate(k, rope), v).flatten(2))


class Layer(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = nn.RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = Mlp(c)

    def forward(self, x, rope, steps):
        x = x + self.self_attn(self.input_layernorm(x), rope, steps)
        return x + self.mlp(self.post_attention_layernorm(x), steps)


class Trunk(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c = c
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Layer(c) for _ in range(c.num_hidden_layers))
        self.norm = nn.RMSNorm(c.hidden_size, c.rms_norm_eps)

    def forward(self, ids_BT, steps):
        rope = rotary_tables(self.c, ids_BT.shape[1], ids_BT.device)
        x_BTD = self.embed_tokens(ids_BT)
        for layer in self.layers:
            x_BTD = layer(x_BTD, rope, steps)
        return self.norm(x_BTD)


class Llama(nn.Module):
    # no multi-token prediction
    mtp = None

    def __init__(self, c):
        super().__init__()
        self.c = c
        self.model = Trunk(c)
        # what computes the steps between the matrix products
        self.steps = Steps()
        self.apply(initialise)

    def logits(self, hidden):
        """The head is the embedding (tied)."""
        return hidden @ self.model.embed_tokens.weight.T

    def forward(self, ids_BT):
        """Hidden states: feed them to logits."""
        return self.model(ids_BT, self.steps)
