"""The probe of ops whose intermediates lie on the grids of a quantization plan: a program of few ops on made-up
rows."""

import numpy as np

from lockstep.engine.selfcheck.weights import constant, rows_of
from lockstep.ops.attention.kv_cache import page_shapes
from lockstep.ops.attention.rope import RopeScaling, RopeTables
from lockstep.ops.rounded.attention import RoundedAttention
from lockstep.ops.rounded.fake_quant import FakeQuant
from lockstep.ops.rounded.grids import (
    FLOAT,
    GRID_WORDS,
    INTEGER,
    MICROSCALED,
    NVFP4,
    Q8,
    ROW_ASYMMETRIC,
    ROW_SYMMETRIC,
    SMALL_FLOATS,
)
from lockstep.ops.rounded.inputs import K_SITES, Q_SITES, RoundedInputs
from lockstep.ops.rounded.silu_mul import RoundedSiluMul
from lockstep.runtime.program import Program, Setting, Table, Tensor

KINDS = (RoundedInputs, RoundedAttention, RoundedSiluMul, FakeQuant)


def rounded_rows(num_rows: int) -> tuple[Program, Tensor]:
    """A program of attention's inputs, attention, fake quantization and SwiGLU's product, with all intermediates on
    grids, and the tensor of its last rows. num_rows: of the made-up table that it reads."""
    H, G, K = 4, 2, 32
    width = (H + 2 * G) * K
    values = np.random.RandomState(10).randint(-4096, 4096, (num_rows, width)) * np.float32(2.0**-11)
    program, sizes = Program(), dict(num_heads=H, num_kv_heads=G, head_dim=K)
    x = rows_of(program, "rounded.rows", values.astype(np.float32))
    tables = RopeTables(num_rows, K // 2, 500.0, RopeScaling())
    shapes = dict(zip(("k_pages", "v_pages"), page_shapes(G, K, "f32"), strict=True))
    pages = {name: program.cache(name, "pages", "f32", shape) for name, shape in shapes.items()}
    counts = dict(q_grids=Q_SITES * H, k_grids=K_SITES * G, v_grids=G, rope_grids=2)
    inputs = RoundedInputs(
        q=program.tensor("q", "T", H * K),
        x=x,
        cos=Table("cos", tables.cos_PR, tables),
        sin=Table("sin", tables.sin_PR, tables),
        **{name: Setting(name, _some_grids(count)) for name, count in counts.items()},
        **{f"{p}_norm": constant(f"rounded.{p}_norm", K) for p in "qk"},
        **dict(rope_dim=K // 2, row_width=width, q_offset=0, q_stride=K, k_offset=H * K, v_offset=(H + G) * K),
        **dict(eps=1e-3, norm_offset=0.0, pre_negated=True),
        **pages,
        **sizes,
    )
    attention = RoundedAttention(
        out=program.tensor("heads", "T", H * K),
        q=program.emit(inputs),
        grids=Setting("grids", _some_grids(5 * H)),
        **dict(max_keys=num_rows, scale=0.25, additive=False, fill=0.0),
        **pages,
        **sizes,
    )
    heads = program.emit(attention)
    where = dict(width=H * K, column=0, stride=K, head_width=K, num_heads=H)
    program.emit(FakeQuant(out=heads, x=heads, grids=Setting("heads", _some_grids(H)), **where))
    out = program.tensor("act", "T", H * K // 2)
    grids = Setting("act", _some_grids(3))
    return program, program.emit(RoundedSiluMul(out=out, x=heads, grids=grids, width=out.width))


def _some_grids(count: int) -> np.ndarray:
    """Grids, one of each kind in turn: float32 [count, GRID_WORDS]."""
    grids = np.zeros((count, GRID_WORDS), np.float32)
    kinds = (
        (INTEGER, 2.0**-7, 2.0**7, 3, -128, 127),
        (ROW_SYMMETRIC, 0, 0, 0, -128, 127),
        (ROW_ASYMMETRIC, 0, 0, 0, 0, 255),
        (FLOAT, 2.0**-6, 2.0**6, *SMALL_FLOATS["e4m3"]),
        (MICROSCALED, 0, 0, *SMALL_FLOATS["int8"]),
        (NVFP4, 2.0**-9, 2.0**9),
        (Q8,),
    )
    for i, row in enumerate(grids):
        words = kinds[i % len(kinds)]
        row[: len(words)] = words
    return grids
