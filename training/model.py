"""The qwen3_5 text model with its multi-token-prediction (MTP) head, in plain torch, made to train on a CPU.

Module names are the checkpoint's tensor names. Shapes: B sequences, T tokens, D width, V vocabulary.
"""

from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from delta_rule import delta_rule_chunked
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

    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, 1 + self.weight, self.eps)


class GatedNorm(nn.Module):
    """RMS norm with a plain weight, then multiplied by silu(gate)."""

    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x, gate):
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps) * F.silu(gate)


class CausalConv(nn.Module):
    """Depthwise causal convolution over time: as sums of shifted rows, which a CPU does faster than conv1d."""

    def __init__(self, channels, kernel):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, kernel).uniform_(-(kernel**-0.5), kernel**-0.5))

    def forward(self, x):
        num_tokens, kernel = x.shape[1], self.weight.shape[-1]
        padded = F.pad(x, (0, 0, kernel - 1, 0))
        return sum(padded[:, j : j + num_tokens] * self.weight[:, 0, j] for j in range(kernel))


def linear(inputs, outputs):
    return nn.Linear(inputs, outputs, bias=False)


class GatedDeltaNet(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c = c
        key_size = c.linear_num_key_heads * c.linear_key_head_dim
        value_size = c.linear_num_value_heads * c.linear_value_head_dim
        self.split = [key_size, key_size, value_size]
        self.in_proj_qkv = linear(c.hidden_size, sum(self.split))
        self.in_proj_z = linear(c.hidden_size, value_size)
        self.in_proj_b = linear(c.hidden_size, c.linear_num_value_heads)
        self.in_proj_a = linear(c.hidden_size, c.linear_num_value_heads)
        self.conv1d = CausalConv(sum(self.split), c.linear_conv_kernel_dim)
        self.A_log = nn.Parameter(torch.empty(c.linear_num_value_heads).uniform_(1, 16).log())
        # softplus(dt_bias) is spread over 0.001 to 0.1: slow and fast forgetting heads
        dt = torch.exp(torch.empty(c.linear_num_value_heads).uniform_(-6.9, -2.3))
        self.dt_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))
        self.norm = GatedNorm(c.linear_value_head_dim, c.rms_norm_eps)
        self.out_proj = linear(value_size, c.hidden_size)

    def heads(self, x, num_heads):
        """[B, T, C] to [B, value heads, T, C per head], key heads repeated over their value heads."""
        x = x.unflatten(-1, (num_heads, -1))
        return x.repeat_interleave(self.c.linear_num_value_heads // num_heads, dim=2).transpose(1, 2)

    def forward(self, x):
        c = self.c
        q, k, v = F.silu(self.conv1d(self.in_proj_qkv(x))).split(self.split, dim=-1)
        q, k = self.heads(q, c.linear_num_key_heads), self.heads(k, c.linear_num_key_heads)
        q = q * torch.rsqrt(q.square().sum(-1, keepdim=True) + 1e-6) * c.linear_key_head_dim**-0.5
        k = k * torch.rsqrt(k.square().sum(-1, keepdim=True) + 1e-6)
        g = -self.A_log.exp() * F.softplus(self.in_proj_a(x) + self.dt_bias)
        beta = self.in_proj_b(x).sigmoid()
        v = self.heads(v, c.linear_num_value_heads)
        out = delta_rule_chunked(q, k, v, g.transpose(1, 2), beta.transpose(1, 2)).transpose(1, 2)
        return self.out_proj(self.norm(out, self.in_proj_z(x).unflatten(-1, out.shape[2:])).flatten(2))


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

    def forward(self, x, rope):
        c = self.c
        # each head's rows hold its query, then its gate
        q, gate = self.q_proj(x).unflatten(-1, (c.num_attention_heads, -1)).chunk(2, dim=-1)
        k = self.k_norm(self.k_proj(x).unflatten(-1, (c.num_key_value_heads, -1))).transpose(1, 2)
        v = self.v_proj(x).unflatten(-1, (c.num_key_value_heads, -1)).transpose(1, 2)
        q, k = rotate(self.q_norm(q).transpose(1, 2), rope), rotate(k, rope)
        group = c.num_attention_heads // c.num_key_value_heads
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
        return self.o_proj((out * gate.sigmoid()).flatten(2))


def rotary_tables(c, num_tokens, device):
    size = int(c.head_dim * c.partial_rotary_factor)
    frequency = c.rope_theta ** (-torch.arange(0, size, 2, device=device).float() / size)
    angle = torch.arange(num_tokens, device=device).float()[:, None] * frequency
    return angle.cos(), angle.sin()


def rotate(x, rope):
    """Rotate channels (i, i + half) of the first 2 half channels; the rest carries no position."""
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

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


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

    def forward(self, x, rope):
        h = self.input_layernorm(x)
        x = x + (self.self_attn(h, rope) if hasattr(self, "self_attn") else self.linear_attn(h))
        return x + self.mlp(self.post_attention_layernorm(x))


class Trunk(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c = c
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Layer(c, layer_type) for layer_type in c.layer_types)
        self.norm = OffsetNorm(c.hidden_size, c.rms_norm_eps)

    def forward(self, ids_BT):
        rope = rotary_tables(self.c, ids_BT.shape[1], ids_BT.device)
        x_BTD = self.embed_tokens(ids_BT)
        for layer in self.layers:
            x_BTD = layer(x_BTD, rope)
        return self.norm(x_BTD)


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

    def forward(self, hidden_BTD, next_embedding_BTD):
        rope = rotary_tables(self.c, hidden_BTD.shape[1], hidden_BTD.device)
        parts = [self.pre_fc_norm_embedding(next_embedding_BTD), self.pre_fc_norm_hidden(hidden_BTD)]
        return self.norm(self.layers[0](self.fc(torch.cat(parts, dim=-1)), rope))


class Model(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c = c
        self.model = Trunk(c)
        self.mtp = MtpHead(c)
        self.apply(initialise)

    def logits(self, hidden):
        """The head is the embedding (tied); the MTP head uses it too."""
        return hidden @ self.model.embed_tokens.weight.T

    def forward(self, ids_BT):
        """Hidden states of the main model: feed them to logits and to mtp_hidden."""
        return self.model(ids_BT)

    def mtp_hidden(self, hidden_BTD, next_ids_BT):
        return self.mtp(hidden_BTD, self.model.embed_tokens(next_ids_BT))


def initialise(module):
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.5 * module.in_features**-0.5)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
