"""Made-up weights and rows for the self-check's probes: the same numbers on every machine."""

import hashlib

import ml_dtypes
import numpy as np

from lockstep.formats import q4_0, q8_0
from lockstep.ops.embed import Embed, format_code
from lockstep.runtime.program import Program, Tensor, Weight
from lockstep.weights.finite import SCALES
from lockstep.weights.tensor import BLOCK_FORMATS, StoredTensor

# the float16 scales of made-up blocks, in formats that nothing is quantized to
BLOCK_SCALES = {"q4_1": 2.0**-8, "q5_0": 2.0**-8, "q5_1": 2.0**-9, "q4_k": 2.0**-14, "q5_k": 2.0**-15, "q6_k": 2.0**-18}


def stored(name, shape, format):
    """A tensor of numbers that follow from its name. Matrices have the format; everything else is float32.

    Rows that blocks of 256 do not fill are bf16, as a linear layer would multiply them anyway.
    """
    generator = np.random.RandomState(int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little"))
    unit = np.float32(2.0**-10 if len(shape) == 2 else 2.0**-7)
    values = (generator.randint(-127, 128, shape) * unit).astype(np.float32)
    if len(shape) != 2:
        return StoredTensor(name, "f32", shape, values)
    if format.endswith("_k") and shape[1] % 256:
        format = "bf16"
    makers = {
        "f32": lambda: values,
        "f16": lambda: values.astype(np.float16),
        "bf16": lambda: values.astype(ml_dtypes.bfloat16),
        "q8_0": lambda: q8_0.quantize(values),
        "q4_0": lambda: q4_0.quantize(values),
    }
    make = makers.get(format, lambda: blocks(generator, shape, format))
    return StoredTensor(name, format, shape, make())


def blocks(generator, shape, format):
    """Blocks of a format: any bytes, but the float16 scales."""
    block = BLOCK_FORMATS[format]
    made = generator.randint(0, 256, (shape[0], shape[1] // block.BLOCK_SIZE, block.BLOCK_BYTES)).astype(np.uint8)
    for at in SCALES[format]:
        made[..., at : at + 2] = np.array([BLOCK_SCALES[format]], np.float16).view(np.uint8)
    return made.reshape(shape[0], -1)


def constant(name: str, *shape: int) -> Weight:
    """A small float32 weight of numbers that follow from its name."""
    return Weight(name, "f32", shape, (stored(name, shape, "f32"),))


def rows_of(program: Program, name: str, values: np.ndarray) -> Tensor:
    """Begins a program: a step's token i is row i of values, float32 [rows, width]."""
    table = Weight(name, "f32", values.shape, (StoredTensor(name, "f32", values.shape, values),))
    out, width = program.tensor("rows", "T", values.shape[1]), values.shape[1]
    program.emit(Embed(out=out, table=table, width=width, format=format_code("f32"), scale=1.0))
    return out
