"""Made-up weights and rows for the self-check's probes: the same numbers on every machine."""

import hashlib

import numpy as np

from lockstep.formats import FORMATS
from lockstep.formats.choice import fitting
from lockstep.formats.format import Format
from lockstep.ops.elementwise.embed import Embed
from lockstep.runtime.program import Program, Tensor, Weight
from lockstep.weights.tensor import StoredTensor


def stored(name, shape, format):
    """A tensor whose numbers follow from its name. Matrices have the format; all other tensors are float32.

    A matrix whose rows are not whole blocks has the format's fallback, in which a linear layer would compute it anyway.
    """
    generator = np.random.RandomState(int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little"))
    unit = np.float32(2.0**-10 if len(shape) == 2 else 2.0**-7)
    values = (generator.randint(-127, 128, shape) * unit).astype(np.float32)
    if len(shape) != 2:
        return StoredTensor(name, "f32", shape, values)
    fitted = FORMATS[fitting(format, shape[1])]
    data = blocks(generator, shape, fitted) if fitted.stored.encode is None else fitted.data_of(values)
    return StoredTensor(name, fitted.name, shape, data)


def blocks(generator: np.random.RandomState, shape: tuple[int, ...], format: Format) -> np.ndarray:
    """Blocks of a format: random bytes, with the format's made-up scales."""
    data = generator.randint(0, 256, (shape[0], shape[1] // format.block_size, format.block_bytes)).astype(np.uint8)
    format.put_scales(data, format.made_up_scale)
    return data.reshape(shape[0], -1)


def constant(name: str, *shape: int) -> Weight:
    """A float32 weight whose numbers follow from its name."""
    return Weight(name, "f32", shape, (stored(name, shape, "f32"),))


def rows_of(program: Program, name: str, values: np.ndarray) -> Tensor:
    """Begins a program with an embedding: token id i becomes row i of values, float32 [rows, width]."""
    table = Weight(name, "f32", values.shape, (StoredTensor(name, "f32", values.shape, values),))
    out, width = program.tensor("rows", "T", values.shape[1]), values.shape[1]
    program.emit(Embed(out=out, table=table, width=width, scale=1.0))
    return out
