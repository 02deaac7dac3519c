"""Recording the token mixer of a gated delta rule layer."""

from collections.abc import Callable

from lockstep.formats.parts.panels import padded_width
from lockstep.models.model_config import LinearAttention
from lockstep.models.record import Recorder
from lockstep.ops.recurrent.gated_delta import DeltaInputs, GatedDelta
from lockstep.ops.recurrent.gated_norm import GatedNorm
from lockstep.runtime.program import Tensor, Weight
from lockstep.weights.tensor import StoredTensor

Projections = Callable[[Recorder, LinearAttention, str, int], list[StoredTensor]]


def projections(ops: Recorder, shape: LinearAttention, label: str, width: int) -> list[StoredTensor]:
    """The projections of queries, keys and values, of the gate z, of b and of a: four tensors of the checkpoint."""
    rows = dict(qkv=shape.conv_channels, z=shape.v_width, b=shape.num_v_heads, a=shape.num_v_heads)
    return [ops.stored(f"{label}.in_proj_{part}.weight", n, width) for part, n in rows.items()]


def gated_delta(
    ops: Recorder, x: Tensor, shape: LinearAttention, label: str, eps: float, projected: Projections = projections
) -> Tensor:
    """The gated delta rule, from hidden rows x to normed and gated value heads [T, H V]. eps: of the norm of heads.

    projected: gives the four projections. C: channels of the convolution, J: its taps, H: value heads, V: the size of a
    value head.
    """
    C, H, V, J = shape.conv_channels, shape.num_v_heads, shape.v_head_dim, shape.conv_width
    proj = ops.projected(x, projected(ops, shape, label, x.width), label)
    state = ops.program.cache(f"{label}.state", "state", "f32", (H, V // 16, shape.k_head_dim, 16))
    history = ops.program.cache(f"{label}.conv_state", "state", "f32", (J - 1, C))
    taps = ops.stored(f"{label}.conv1d.weight", C, 1, J)
    z, b = C, padded_width(C + shape.v_width)
    heads = dict(num_k_heads=shape.num_k_heads, k_head_dim=shape.k_head_dim, num_v_heads=H)
    inputs = DeltaInputs(
        out=ops.program.tensor(f"{label}.conv", "T", C),
        gates=ops.program.tensor(f"{label}.gates", "T", 2 * H),
        x=proj,
        weight=Weight(f"{label}.conv1d.weight", "f32", (C, J), (taps,)),
        a_log=ops.constant(f"{label}.A_log", H),
        dt_bias=ops.constant(f"{label}.dt_bias", H),
        state=history,
        row_width=proj.width,
        offset=0,
        channels=C,
        conv_width=J,
        a_offset=b + padded_width(H),
        b_offset=b,
        **heads,
    )
    qkv = ops.program.emit(inputs)
    rule = GatedDelta(
        out=ops.program.tensor(f"{label}.heads", "T", H * V),
        qk=qkv,
        v=qkv,
        gates=inputs.gates,
        state=state,
        qk_width=C,
        v_width=C,
        v_offset=shape.qk_width,
        v_head_dim=V,
        **heads,
    )
    out = ops.program.tensor(f"{label}.norm", "T", H * V)
    weight = ops.constant(f"{label}.norm.weight", V)
    in_turn = shape.num_k_heads if shape.has_heads_in_turn else 1
    where = dict(row_width=proj.width, z_offset=z, num_heads=H, head_dim=V, num_in_turn=in_turn)
    return ops.program.emit(GatedNorm(out=out, o=ops.program.emit(rule), z=proj, weight=weight, eps=eps, **where))
