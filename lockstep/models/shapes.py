"""The tensors that a model reads, by name and shape, found by recording its program without a checkpoint."""

from collections.abc import Callable
from typing import Any

import numpy as np

from lockstep.models.record import Recorder
from lockstep.weights.tensor import StoredTensor, stored_shape


def only_shape(name: str, shape: tuple[int, ...], matrix_format: str = "f32") -> StoredTensor:
    """A tensor of zeros that takes no memory. matrix_format: of a tensor with two dimensions; others are float32."""
    format = matrix_format if len(shape) == 2 else "f32"
    stored, dtype = stored_shape(format, shape)
    return StoredTensor(name, format, shape, np.broadcast_to(np.zeros(1, dtype), stored))


class AnyTensor(Recorder):
    """A Recorder without a checkpoint: `make(name, shape)` makes every tensor that the model reads.

    shapes: {name: shape} of the tensors read so far.
    """

    def __init__(
        self,
        make: Callable[[str, tuple[int, ...]], StoredTensor] = only_shape,
        kv_dtype: str = "bf16",
        max_context: int = 4096,
    ) -> None:
        super().__init__({}, "model.", "auto", kv_dtype, max_context)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._make = make

    def stored(self, name: str, *shape: int) -> Any:
        self.shapes[name] = shape
        return self._once(f"stored {name}", lambda: self._make(name, shape))
