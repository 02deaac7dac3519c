"""The qwen3_5 text model with its multi-token-prediction (MTP) head, in plain torch, made to train on a CPU.

Module names are the checkpoint's tensor names. Shapes: B sequences, T tokens, D width, V vocabulary.
"""

from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from fused import Steps
from torch import nn


@dataclass(frozen=True)
class ModelConfig:
    vocab_size: int = 4096
    hidden_size: int = 256
    intermediate_size: int = 768
    layer_types: tuple = ("linear_attention", "linear_attention", "linear_attention", "full_attention")
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 64
    partial_rotary_factor: float = 0.25
    rope_theta: float = 10000.0
    linear_num_key_heads: int = 2
    linear_num_value_heads: int = 4
    linear_key_head_dim: int = 64
    linear_value_head_dim: int = 64
    linear_conv_kernel_dim: int = 4
    rms_norm_eps: float = 1e-6

    def to_dict(self):
        return asdict(self)

    def hugging_face(self):
        """What config.json says of this architecture alone; the rope sections only matter for images."""
        values = self.to_dict()
        half = int(self.head_dim * self.partial_rotary_factor) // 2
        rope = {
            "rope_type": "default",
            "rope_theta": values.pop("rope_theta"),
            "partial_rotary_factor": self.partial_rotary_factor,
            "mrope_interleaved": True,
            "mrope_section": [half - 2 * (half // 3), half // 3, half // 3],
        }
        return {
            "architectures": ["Qwen3_5ForCausalLM"],
            "model_type": "qwen3_5_text",
            **values,
            "num_hidden_layers": len(self.layer_types),
            "full_attention_interval": 4,
            "rope_parameters": rope,
            "attn_output_gate": True,
            "mamba_ssm_dtype": "float32",
            "mtp_num_hidden_layers": 1,
            "mtp_use_dedicated_embeddings": False,
        }


class OffsetNorm(nn.Module):
    """RMS norm multiplied by one plus the weight."""

    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))
        self.eps = eps

    def forward(self, x, steps):
        return self.add(x, None, steps)[1]

    def add(self, x, delta, steps):
        """x + delta, and its norm."""
        return steps.add_norm(x, delta, self.weight, self.eps)


class GatedNorm(nn.Module):
    """RMS norm with a plain weight, then multiplied by silu(gate)."""

    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x, gate, steps):
        return steps.gated_norm(x, gate, self.weight, self.eps)


class CausalConv(nn.Module):
    """Depthwise causal convolution over time, then silu."""

    def __init__(self, channels, kernel):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, kernel).uniform_(-(kernel**-0.5), kernel**-0.5))

    def forward(self, x, steps):
        return steps.conv_silu(x, self.weight)


def linear(inputs, outputs):
    return nn.Linear(inputs, outputs, bias=False)


class GatedDeltaNet(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c = c
        key_size = c.linear_num_key_heads * c.linear_key_head_dim
        value_size = c.linear_num_value_heads * c.linear_value_head_dim
        self.in_proj_qkv = linear(c.hidden_size, 2 * key_size + value_size)
        self.in_proj_z = linear(c.hidden_size, value_size)
        self.in_proj_b = linear(c.hidden_size, c.linear_num_value_heads)
        self.in_proj_a = linear(c.hidden_size, c.linear_num_value_heads)
        self.conv1d = CausalConv(2 * key_size + value_size, c.linear_conv_kernel_dim)
        self.A_log = nn.Parameter(torch.empty(c.linear_num_value_heads).uniform_(1, 16).log())
        # softplus(dt_bias) is spread over 0.001 to 0.1: slow and fast forgetting heads
        dt = torch.exp(torch.empty(c.linear_num_value_heads).uniform_(-6.9, -2.3))
        self.dt_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))
        self.norm = GatedNorm(c.linear_value_head_dim, c.rms_norm_eps)
        self.out_proj = linear(value_size, c.hidden_size)

    def forward(self, x, steps):
        c = self.c
        y = self.conv1d(self.in_proj_qkv(x), steps)
        g = -self.A_log.exp() * F.softplus(self.in_proj_a(x).float() + self.dt_bias)
        beta = self.in_proj_b(x).float().sigmoid()
        shape = c.linear_num_key_heads, c.linear_key_head_dim, c.linear_value_head_dim
        out = steps.delta_rule(y, g, beta, *shape)
        return self.out_proj(self.norm(out, self.in_proj_z(x).unflatten(-1, out.shape[2:]), steps).flatten(2))


class GatedAttention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c = c
        size = c.num_attention_heads * c.head_dim
        self.q_proj = linear(c.hidden_size, 2 * size)
        self.k_proj = linear(c.hidden_size, c.num_key_value_heads * c.head_dim)
        self.v_proj = linear(c.hidden_size, c.num_key_value_heads * c.head_dim)
        self.o_proj = linear(size, c.hidden_size)
        self.q_norm = OffsetNorm(c.head_dim, c.rms_norm_eps)
        self.k_norm = OffsetNorm(c.head_dim, c.rms_norm_eps)

    def forward(self, x, rope, steps):
        c = self.c
        # each head's rows hold its query, then its gate
        q, gate = self.q_proj(x).unflatten(-1, (c.num_attention_heads, -1)).chunk(2, dim=-1)
        k = self.k_norm(self.k_proj(x).unflatten(-1, (c.num_key_value_heads, -1)), steps)
        v = self.v_proj(x).unflatten(-1, (c.num_key_value_heads, -1))
        out = steps.attention(rotate(self.q_norm(q, steps), rope), rotate(k, rope), v)
        return self.o_proj((out * gate.sigmoid()).flatten(2))


def rotary_tables(c, num_tokens, device, start=0):
    """Cosines and sines of the positions from start on, [T, 1, channels / 2]."""
    size = int(c.head_dim * c.partial_rotary_factor)
    frequency = c.rope_theta ** (-torch.arange(0, size, 2, device=device).float() / size)
    angle = (start + torch.arange(num_tokens, device=device)).float()[:, None, None] * frequency
    return angle.cos(), angle.sin()


def rotate(x, rope):
    """Rotate channels (i, i + half) of the first 2 half channels of [B, T, H, C]; the rest carries no position."""
    cos, sin = rope
    half = cos.shape[-1]
    a, b, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)


class Mlp(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.gate_proj = linear(c.hidden_size, c.intermediate_size)
        self.up_proj = linear(c.hidden_size, c.intermediate_size)
        self.down_proj = linear(c.intermediate_size, c.hidden_size)

    def forward(self, x, steps):
        return self.down_proj(steps.silu_mul(self.gate_proj(x), self.up_proj(x)))


class Layer(nn.Module):
    def __init__(self, c, layer_type):
        super().__init__()
        self.input_layernorm = OffsetNorm(c.hidden_size, c.rms_norm_eps)
        self.post_attention_layernorm = OffsetNorm(c.hidden_size, c.rms_norm_eps)
        if layer_type == "full_attention":
            self.self_attn = GatedAttention(c)
        else:
            self.linear_attn = GatedDeltaNet(c)
        self.mlp = Mlp(c)

    def forward(self, x, delta, rope, steps):
        """The residual stream as its value so far and what is still to be added to it, and so returned."""
        x, h = self.input_layernorm.add(x, delta, steps)
        delta = self.self_attn(h, rope, steps) if hasattr(self, "self_attn") else self.linear_attn(h, steps)
        x, h = self.post_attention_layernorm.add(x, delta, steps)
        return x, self.mlp(h, steps)


class Trunk(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c = c
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Layer(c, layer_type) for layer_type in c.layer_types)
        self.norm = OffsetNorm(c.hidden_size, c.rms_norm_eps)

    def forward(self, ids_BT, steps):
        rope = rotary_tables(self.c, ids_BT.shape[1], ids_BT.device)
        x_BTD, delta_BTD = self.embed_tokens(ids_BT), None
        for layer in self.layers:
            x_BTD, delta_BTD = layer(x_BTD, delta_BTD, rope, steps)
        return self.norm.add(x_BTD, delta_BTD, steps)[1]


class MtpHead(nn.Module):
    """From the final hidden state at t and the token at t + 1, the hidden state whose logits predict the token at t +
    2."""

    def __init__(self, c):
        super().__init__()
        self.c = c
        self.fc = linear(2 * c.hidden_size, c.hidden_size)
        self.pre_fc_norm_embedding = OffsetNorm(c.hidden_size, c.rms_norm_eps)
        self.pre_fc_norm_hidden = OffsetNorm(c.hidden_size, c.rms_norm_eps)
        self.layers = nn.ModuleList([Layer(c, "full_attention")])
        self.norm = OffsetNorm(c.hidden_size, c.rms_norm_eps)

    def forward(self, hidden_BTD, next_embedding_BTD, steps, start=0):
        rope = rotary_tables(self.c, hidden_BTD.shape[1], hidden_BTD.device, start)
        parts = [self.pre_fc_norm_embedding(next_embedding_BTD, steps), self.pre_fc_norm_hidden(hidden_BTD, steps)]
        return self.norm.add(*self.layers[0](self.fc(torch.cat(parts, dim=-1)), None, rope, steps), steps)[1]


class Model(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c = c
        self.model = Trunk(c)
        self.mtp = MtpHead(c)
        # what computes the steps between the matrix products
        self.steps = Steps()
        self.apply(initialise)

    def logits(self, hidden):
        """The head is the embedding (tied); the MTP head uses it too."""
        return hidden @ self.model.embed_tokens.weight.T

    def forward(self, ids_BT):
        """Hidden states of the main model: feed them to logits and to mtp_hidden."""
        return self.model(ids_BT, self.steps)

    def mtp_hidden(self, hidden_BTD, next_ids_BT):
        return self.mtp(hidden_BTD, self.model.embed_tokens(next_ids_BT), self.steps)


def initialise(module):
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.5 * module.in_features**-0.5)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
