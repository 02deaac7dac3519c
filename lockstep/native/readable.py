"""Constants that kernels read through: `Declaration.read(address)` in a kernel becomes a function made for it."""

from collections.abc import Callable
from typing import Any

from numba import types
from numba.core.imputils import lower_constant
from numba.core.typing.templates import AttributeTemplate
from numba.extending import infer_getattr, lower_getattr, models, register_model, typeof_impl

Reader = Callable[[Any], Any]  # from a declaration to its inlined function


class ReadableType(types.Dummy):
    """What a declaration is to Numba: a constant whose `read` is a function."""

    def __init__(self, declared: Any, reader: Reader) -> None:
        self.declared, self.reader = declared, reader
        super().__init__(f"declaration {declared.__module__}.{declared.__qualname__}")


register_model(ReadableType)(models.OpaqueModel)


def readable(declaration_type: type, reader: Reader) -> None:
    """Lets kernels refer to declarations, values of a Python type, and call their `read`."""
    typeof_impl.register(declaration_type)(lambda declared, context: ReadableType(declared, reader))


@infer_getattr
class _ReadableAttributes(AttributeTemplate):
    key = ReadableType

    def resolve_read(self, readable_type):
        return types.Dispatcher(readable_type.reader(readable_type.declared))


@lower_constant(ReadableType)
def _no_value(context, builder, readable_type, value):
    return context.get_dummy_value()


@lower_getattr(ReadableType, "read")
def _no_attribute(context, builder, readable_type, value):
    return context.get_dummy_value()
