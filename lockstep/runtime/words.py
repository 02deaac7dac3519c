"""Blocks of named 64-bit words: what op rows and step blocks have in common."""

import functools
from typing import Any, NamedTuple


class Word(NamedTuple):
    """A field, its kind ("int", "float", "address", or "weight" for several addresses) and where its words begin."""

    name: str
    kind: str
    index: int


class Readable(type):
    """The class of classes whose `words()` say where each field lies; kernels use their `read`, see `runtime.step`."""

    def words(cls) -> tuple[Word, ...]:
        """Where each field is found, in order."""
        raise NotImplementedError(cls.__name__)

    def read(cls, address: Any) -> Any:
        """Only in kernels and definitions: the fields at an address, by name."""
        raise TypeError(f"{cls.__name__}.read is for kernels")


@functools.cache
def _compiled(shape: str) -> Any:
    return compile(f"({shape},)", "<declaration>", "eval")


def evaluated(shape: str, numbers: dict[str, Any]) -> tuple[int, ...]:
    """The numbers of a declared shape: those of "2 * width" with {"width": 8} are (16,)."""
    try:
        return eval(_compiled(shape), {"__builtins__": {}}, numbers)
    except NameError as error:
        raise ValueError(f"{shape}: {error.name} is not given") from None
