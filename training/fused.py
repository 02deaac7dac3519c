"""The steps of the model between its matrix products, in torch, and as fused C++ for training on a CPU.

Steps computes them in torch: the definition. FusedSteps has the same methods, several times faster on one core, with
gradients of its own; products of matrices stay torch's, in bf16. It needs Linux on x86 and g++, and gives bf16 where
the next thing is such a product. Shapes: B sequences, T tokens, H heads, D width.
"""

import ctypes
import hashlib
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from delta_rule import delta_rule_chunked

HEAD_SIZE, CHUNK = 64, 32
FLAGS = "-O3 -march=native -ffast-math -mprefer-vector-width=512 -shared -fPIC -std=c++17 -Wno-psabi".split()


class Steps:
    def conv_silu(self, x_BTC, weight_C1K):
        """Causal depthwise convolution over time: sums of shifted rows, which a CPU does faster than conv1d."""
        num_tokens, kernel = x_BTC.shape[1], weight_C1K.shape[-1]
        padded = F.pad(x_BTC, (0, 0, kernel - 1, 0))
        return F.silu(sum(padded[:, j : j + num_tokens] * weight_C1K[:, 0, j] for j in range(kernel)))

    def delta_rule(self, y_BTC, g_BTH, beta_BTH, num_key_heads, key_size, value_size):
        """[B, T, H, value size] from q, k and v side by side."""
        num_heads = g_BTH.shape[-1]
        sizes = [num_key_heads * key_size, num_key_heads * key_size, num_heads * value_size]
        q, k, v = y_BTC.split(sizes, dim=-1)
        q, k, v = heads(q, num_key_heads, num_heads), heads(k, num_key_heads, num_heads), heads(v, num_heads, num_heads)
        q = q * torch.rsqrt(q.square().sum(-1, keepdim=True) + 1e-6) * key_size**-0.5
        k = k * torch.rsqrt(k.square().sum(-1, keepdim=True) + 1e-6)
        return delta_rule_chunked(q, k, v, g_BTH.transpose(1, 2), beta_BTH.transpose(1, 2)).transpose(1, 2)

    def attention(self, q_BTHD, k_BTGD, v_BTGD):
        """Causal attention of the heads, of which several share a key head: [B, T, H, D]."""
        group = q_BTHD.shape[2] // k_BTGD.shape[2]
        k, v = (x.transpose(1, 2).repeat_interleave(group, dim=1) for x in (k_BTGD, v_BTGD))
        return F.scaled_dot_product_attention(q_BTHD.transpose(1, 2), k, v, is_causal=True).transpose(1, 2)

    def add_norm(self, x, delta, weight, eps):
        """x + delta, and its RMS norm times one plus the weight; delta may be None."""
        x = x if delta is None else x + delta
        return x, F.rms_norm(x, weight.shape, 1 + weight, eps)

    def gated_norm(self, x, z, weight, eps):
        """RMS norm times the weight and silu(z)."""
        return F.rms_norm(x, weight.shape, weight, eps) * F.silu(z)

    def silu_mul(self, gate, up):
        return F.silu(gate) * up

    def cross_entropy(self, logits_NV, targets_N, weights_N):
        """The sum of weight * -log softmax(logits)[target], and the gradient of the logits."""
        p, targets, weights = logits_NV.softmax(-1, dtype=torch.float32), targets_N[:, None], weights_N[:, None]
        # the floor keeps the logarithm finite for a target that a wild early step ruled out
        total = -(p.gather(1, targets).clamp_min(1e-30).log() * weights).sum()
        # softmax - onehot, times the weight
        return total, p.scatter_add_(1, targets, torch.full_like(weights, -1.0)).mul_(weights).to(logits_NV.dtype)


def heads(x, num_heads, num_value_heads):
    """[B, T, C] to [B, value heads, T, C per head], key heads repeated over their value heads."""
    x = x.unflatten(-1, (num_heads, -1))
    return x.repeat_interleave(num_value_heads // num_heads, dim=2).transpose(1, 2)


@cache
def library(name):
    """A C++ file of native/, compiled for this machine once, and loaded."""
    source = Path(__file__).parent / "native" / name
    key = hashlib.sha256(source.read_bytes() + Path("/proc/cpuinfo").read_bytes()[:1500]).hexdigest()[:16]
    path = source.parent / "__pycache__" / f"{source.stem}-{key}.so"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            made = Path(folder) / "made.so"
            subprocess.run(["g++", *FLAGS, str(source), "-o", str(made), "-lmvec", "-lm"], check=True)
            made.rename(path)
    loaded = ctypes.CDLL(str(path))
    if name == "fused.cpp":
        loaded.cross_entropy.restype = ctypes.c_double
    return loaded


def call(function, *values):
    """Call a C function: tensors as their addresses, floats as float."""
    kinds = {float: ctypes.c_float, int: ctypes.c_long}
    arguments = []
    for value in values:
        if value is None:
            arguments.append(ctypes.c_void_p(0))
        elif isinstance(value, torch.Tensor):
            if not value.is_contiguous():
                raise ValueError(f"a tensor of shape {tuple(value.shape)} is not contiguous")
            arguments.append(ctypes.c_void_p(value.data_ptr()))
        else:
            arguments.append(kinds[type(value)](value))
    return function(*arguments)


def bf16(x):
    return x.to(torch.bfloat16).contiguous()


def float32(x):
    return x.to(torch.float32).contiguous()


class ConvSilu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        taps = weight[:, 0].T.contiguous()
        ctx.save_for_backward(x, taps)
        y = torch.empty(x.shape)
        call(library("fused.cpp").conv_silu, *x.shape, x, taps, y)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, taps = ctx.saved_tensors
        dx, dtaps = torch.empty_like(x), torch.empty_like(taps)
        call(library("fused.cpp").conv_silu_backward, *x.shape, x, taps, dy.contiguous(), dx, dtaps)
        return dx, dtaps.T[:, None]


class DeltaRule(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, g, beta, num_key_heads):
        ctx.save_for_backward(y, g, beta)
        ctx.num_key_heads = num_key_heads
        out = torch.empty(*g.shape, HEAD_SIZE)
        call(library("sequence.cpp").delta_rule, *y.shape[:2], num_key_heads, g.shape[-1], y, g, beta, out)
        return out

    @staticmethod
    def backward(ctx, dout):
        y, g, beta = ctx.saved_tensors
        gradients = torch.zeros_like(y), torch.empty_like(g), torch.empty_like(beta)
        shape = *y.shape[:2], ctx.num_key_heads, g.shape[-1]
        call(library("sequence.cpp").delta_rule_backward, *shape, y, g, beta, dout.contiguous(), *gradients)
        return *gradients, None


class Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v):
        out, (batch, tokens, num_heads, _) = torch.empty_like(q), q.shape
        lse = torch.empty(batch, num_heads, tokens)
        call(library("sequence.cpp").attention, batch, tokens, k.shape[2], num_heads, q, k, v, out, lse)
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    def backward(ctx, dout):
        q, k, v, out, lse = ctx.saved_tensors
        gradients = [torch.empty_like(x) for x in (q, k, v)]
        shape = *q.shape[:2], k.shape[2], q.shape[2]
        call(library("sequence.cpp").attention_backward, *shape, q, k, v, out, lse, dout.contiguous(), *gradients)
        return tuple(gradients)


class AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, delta, weight, eps):
        out, y = torch.empty_like(x), torch.empty(x.shape, dtype=torch.bfloat16)
        rms, rows = torch.empty(x.shape[:-1]), x.numel() // x.shape[-1]
        call(library("fused.cpp").add_norm, rows, x.shape[-1], x, delta, weight, eps, out, y, rms)
        ctx.save_for_backward(out, weight, rms)
        ctx.has_delta = delta is not None
        return out, y

    @staticmethod
    def backward(ctx, dout, dy):
        out, weight, rms = ctx.saved_tensors
        dx, dweight, rows = torch.empty_like(out), torch.empty_like(weight), rms.numel()
        ddelta = torch.empty(out.shape, dtype=torch.bfloat16) if ctx.has_delta else None
        arguments = out, weight, rms, dout.contiguous(), dy.contiguous(), dx, ddelta, dweight
        call(library("fused.cpp").add_norm_backward, rows, out.shape[-1], *arguments)
        return dx, ddelta, dweight, None


class GatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, z, weight, eps):
        ctx.save_for_backward(x, z, weight)
        ctx.eps = eps
        y = torch.empty_like(z)
        call(library("fused.cpp").gated_norm, x.numel() // x.shape[-1], x.shape[-1], x, z, weight, eps, y)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, z, weight = ctx.saved_tensors
        gradients = torch.empty_like(x), torch.empty_like(z), torch.empty_like(weight)
        arguments = x.numel() // x.shape[-1], x.shape[-1], x, z, weight, ctx.eps, dy.contiguous()
        call(library("fused.cpp").gated_norm_backward, *arguments, *gradients)
        return *gradients, None


class SiluMul(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        y = torch.empty_like(gate)
        call(library("fused.cpp").silu_mul, y.numel(), gate, up, y)
        return y

    @staticmethod
    def backward(ctx, dy):
        gate, up = ctx.saved_tensors
        gradients = torch.empty_like(gate), torch.empty_like(up)
        call(library("fused.cpp").silu_mul_backward, dy.numel(), gate, up, dy.contiguous(), *gradients)
        return gradients


def check_shape(num_tokens, *head_sizes):
    if num_tokens % CHUNK or set(head_sizes) != {HEAD_SIZE}:
        raise ValueError(
            f"{num_tokens} tokens, head sizes {head_sizes}: the fused steps take heads of {HEAD_SIZE} and a multiple"
            f" of {CHUNK} tokens"
        )


class FusedSteps:
    def conv_silu(self, x_BTC, weight_C1K):
        return ConvSilu.apply(bf16(x_BTC), weight_C1K)

    def delta_rule(self, y_BTC, g_BTH, beta_BTH, num_key_heads, key_size, value_size):
        check_shape(y_BTC.shape[1], key_size, value_size)
        return DeltaRule.apply(float32(y_BTC), float32(g_BTH), float32(beta_BTH), num_key_heads)

    def attention(self, q_BTHD, k_BTGD, v_BTGD):
        check_shape(q_BTHD.shape[1], q_BTHD.shape[3])
        return Attention.apply(float32(q_BTHD), float32(k_BTGD), float32(v_BTGD))

    def add_norm(self, x, delta, weight, eps):
        return AddNorm.apply(float32(x), None if delta is None else bf16(delta), weight, eps)

    def gated_norm(self, x, z, weight, eps):
        return GatedNorm.apply(float32(x), bf16(z), weight, eps)

    def silu_mul(self, gate, up):
        return SiluMul.apply(bf16(gate), bf16(up))

    def cross_entropy(self, logits_NV, targets_N, weights_N):
        logits_NV = bf16(logits_NV)
        arguments = *logits_NV.shape, logits_NV, targets_N.contiguous(), weights_N.contiguous()
        return call(library("fused.cpp").cross_entropy, *arguments), logits_NV
