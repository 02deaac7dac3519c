"""Records gated_delta.npz: one linear-attention layer of transformers, from projected rows to the gated heads.

    python tests/golden/record_gated_delta.py        (needs torch and transformers)

The projections are replaced by columns of the recorded rows and the chunked rule by the recurrent one.
"""

import pathlib

import numpy as np
import torch
from transformers import Qwen3_5TextConfig
from transformers.models.qwen3_5 import modeling_qwen3_5 as hf

T, G, H, K, V = 14, 2, 4, 16, 32
SIZES = {"in_proj_qkv": 2 * G * K + H * V, "in_proj_z": H * V, "in_proj_b": H, "in_proj_a": H}


class Columns(torch.nn.Module):
    """A projection that returns some columns of its input."""

    def __init__(self, start, size):
        super().__init__()
        self.columns = slice(start, start + size)

    def forward(self, x):
        return x[..., self.columns]


def layer():
    """A layer with random weights whose input is the projected row."""
    config = Qwen3_5TextConfig(
        hidden_size=64,
        num_hidden_layers=1,
        linear_num_key_heads=G,
        linear_num_value_heads=H,
        linear_key_head_dim=K,
        linear_value_head_dim=V,
        linear_conv_kernel_dim=4,
        layer_types=["linear_attention"],
    )
    delta_net, start = hf.Qwen3_5GatedDeltaNet(config, 0).float(), 0
    for name, size in SIZES.items():
        setattr(delta_net, name, Columns(start, size))
        start += size
    delta_net.out_proj = torch.nn.Identity()
    for weight in (delta_net.conv1d.weight, delta_net.A_log, delta_net.dt_bias, delta_net.norm.weight):
        torch.nn.init.normal_(weight, std=0.7)
    return delta_net


def main():
    torch.manual_seed(0)
    states = []

    def rule(*args, **kwargs):
        out, state = hf.torch_recurrent_gated_delta_rule(*args, **{**kwargs, "output_final_state": True})
        states.append(state)
        return out, state

    hf.torch_chunk_gated_delta_rule = rule
    delta_net, proj = layer(), torch.randn(T, sum(SIZES.values()))
    with torch.no_grad():
        out = delta_net(proj[None])[0]
    arrays = dict(
        proj=proj,
        conv=delta_net.conv1d.weight[:, 0],
        a_log=delta_net.A_log,
        dt_bias=delta_net.dt_bias,
        norm=delta_net.norm.weight,
        out=out,
        state=states[0][0],
    )
    sizes = dict(num_k_heads=G, num_v_heads=H, k_size=K, v_size=V)
    np.savez_compressed(
        pathlib.Path(__file__).with_name("gated_delta.npz"),
        **sizes,
        **{name: array.detach().numpy() for name, array in arrays.items()},
    )


if __name__ == "__main__":
    main()
