"""What an op is made of, declared once, and used by whoever records, checks, rewrites, runs, describes or tests it.

    class RmsNorm(Operands):
        out: Tensor = output("width")
        x: Tensor = rows("width")
        weight: Weight = constant("width")
        width: int
        eps: float

    program.emit(RmsNorm(out=out, x=x, weight=weight, width=64, eps=1e-6))      # recorded; names and shapes are checked
    a = RmsNorm.read(op)                                                        # in a kernel: a.x, a.width, a.eps

An instance is an op of a program. A field is an operand (an output, an activation, a weight, a table, a cache: a kernel
reads its address, 0 for one that is left out) or a parameter: an int, a bool or a float (float32 in kernels). A field
of type str is neither: it chooses among implementations. Nothing here knows addresses or compilers.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Any, ClassVar, NamedTuple, cast, dataclass_transform, get_type_hints

import numpy as np

from lockstep.runtime.program import DTYPES, CacheArray, Setting, Table, Tensor, Weight
from lockstep.runtime.words import Readable, Word, evaluated

NUMBERS = {int: (int, np.integer), float: (float, np.floating), bool: (bool, np.bool_)}
IN_WORDS = {int: "an integer", float: "a float", bool: "True or False"}
GROUPS = ("linear", "attention", "elementwise", "grouped_linear", "embed")  # what `--op GROUP=...` may name
MAX_WORDS = 43  # of an op row, see `runtime.step`
FITTING = {int: "an integer from 0 to 2**63 - 1", float: "a finite float of 32 bits"}


class WeightArrays(NamedTuple):
    """Addresses of a packed weight's arrays, as far as its layout has them: see `backend.Layout`."""

    codes: int
    d: int
    dmin: int
    sc: int
    m: int


@dataclasses.dataclass(frozen=True)
class Operand:
    """How a field of a declaration is used.

    role: "output", "rows", "constant", "packed", "table", "setting" or "cache". shape: expressions over the parameters,
    one for each number of a shape, of rows only the width; None: any. dtype: of a tensor (None: any) or of a setting.
    scratch: only the op's own kernel reads the output. on_request: the output is written only in rows that ask for it.
    optional: the operand may be left out. other_rows: its rows are counted by another letter than those of the op's
    first output. kind: of a cache; None: any.
    """

    role: str
    shape: str | None = None
    dtype: str | None = None
    scratch: bool = False
    on_request: bool = False
    optional: bool = False
    other_rows: bool = False
    kind: str | None = None


TYPES = {
    "output": Tensor,
    "rows": Tensor,
    "constant": Weight,
    "packed": Weight,
    "table": Table,
    "setting": Setting,
    "cache": CacheArray,
}


def _field(operand: Operand) -> Any:
    default: dict[str, Any] = {"default": None} if operand.optional else {}
    return dataclasses.field(metadata={"operand": operand}, **default)


def output(width: str | None = None, dtype: str | None = "f32", scratch: bool = False, on_request: bool = False) -> Any:
    """An activation [rows, width] that the op writes; see `Operand`."""
    return _field(Operand("output", width, dtype, scratch, on_request))


def rows(width: str | None = None, dtype: str | None = "f32", optional: bool = False, other_rows: bool = False) -> Any:
    """An activation [rows, width] that the op reads; see `Operand`."""
    return _field(Operand("rows", width, dtype, optional=optional, other_rows=other_rows))


def constant(shape: str | None = None, optional: bool = False) -> Any:
    """A small weight, one array. shape: as "channels, conv_width"."""
    return _field(Operand("constant", shape, optional=optional))


def packed(shape: str | None = None, optional: bool = False) -> Any:
    """A weight in the layout of the op's implementation, up to five arrays: see WeightArrays."""
    return _field(Operand("packed", shape, optional=optional))


def table(width: str | None = None, optional: bool = False) -> Any:
    """Constants with a row for each position, [positions, width]."""
    return _field(Operand("table", width, optional=optional))


def setting(shape: str | None = None, dtype: str = "f32", optional: bool = False) -> Any:
    """Numbers that may change between steps, [rows, columns]; see `program.Setting`."""
    return _field(Operand("setting", shape, dtype, optional=optional))


def cache(shape: str | None = None, kind: str | None = None, dtype: str | None = None) -> Any:
    """Memory that outlives a step, read and written. shape: that of a page or of a slot. kind: see CacheArray."""
    return _field(Operand("cache", shape, dtype, kind=kind))


class Declaration(Readable):
    """The class of declarations: checks the names of the arguments before it makes an op."""

    def __call__(cls, *args: Any, **operands: Any) -> Any:
        fields = dataclasses.fields(cast(Any, cls))
        names = [f.name for f in fields]
        needed = [f.name for f in fields if f.default is dataclasses.MISSING]
        unknown = next((n for n in operands if n not in names), None)
        missing = next((n for n in needed if n not in operands), None)
        if args or unknown is not None:
            problem = "operands are given by name" if args else f"there is no operand {unknown!r}"
            raise ValueError(f"{cls.__name__}: {problem}; it has {', '.join(names)}")
        if missing is not None:
            raise ValueError(f"{cls.__name__}: operand {missing!r} is missing; it has {', '.join(names)}")
        return super().__call__(**operands)


@dataclass_transform(
    kw_only_default=True, frozen_default=True, field_specifiers=(output, rows, constant, packed, table, setting, cache)
)
class Operands(metaclass=Declaration):
    """An op of a program; a subclass declares the operands and parameters of its ops.

    group: the op's group in `--op GROUP=...`, one of GROUPS. in_place: an output may be an input, too.
    rules: expressions over the parameters that must hold.
    Raises ValueError, with a sentence, for operands that are not what is declared.
    """

    group: ClassVar[str | None] = None
    in_place: ClassVar[bool] = False
    rules: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls) -> None:
        dataclasses.dataclass(frozen=True, eq=False, kw_only=True, repr=False)(cls)
        _check_declaration(cls)

    def __post_init__(self) -> None:
        for name, operand in self.declared():
            self._check_operand(name, operand, getattr(self, name))
        for name, kind in self.parameters().items():
            value = getattr(self, name)
            if not isinstance(value, NUMBERS[kind]) or (kind is int and isinstance(value, bool)):
                raise ValueError(f"{type(self).__name__}: {name} is {value!r}, expected {IN_WORDS[kind]}")
            if not _fits(value, kind):
                raise ValueError(f"{type(self).__name__}: {name} is {value!r}, expected {FITTING[kind]}")
        for rule in self.rules:
            self._check_rule(rule)
        for name, operand in self.declared():
            self._check_shape(name, operand, getattr(self, name))
            self._check_rows(name, operand, getattr(self, name))
        self.check()

    def check(self) -> None:
        """Checks what else must hold among the operands; raises ValueError."""

    # ------------------------------------------------------------ of a declaration

    @classmethod
    @functools.cache
    def declared(cls) -> tuple[tuple[str, Operand], ...]:
        """(name, Operand) of all fields that are operands, in order."""
        fields = dataclasses.fields(cls)  # pyright: ignore[reportArgumentType]
        return tuple((f.name, f.metadata["operand"]) for f in fields if "operand" in f.metadata)

    @classmethod
    @functools.cache
    def parameters(cls) -> dict[str, type]:
        """{name: int, float or bool} of all parameters, in order."""
        hints = get_type_hints(cls)
        fields = dataclasses.fields(cls)  # pyright: ignore[reportArgumentType]
        return {f.name: hints[f.name] for f in fields if "operand" not in f.metadata and hints[f.name] in NUMBERS}

    @classmethod
    @functools.cache
    def words(cls) -> tuple[Word, ...]:
        """Where a kernel finds each field in an op row."""
        words, index = [], 0
        for name, operand in cls.declared():
            kind = "weight" if operand.role == "packed" else "address"
            words.append(Word(name, kind, index))
            index += len(WeightArrays._fields) if kind == "weight" else 1
        for name, kind in cls.parameters().items():
            words.append(Word(name, "float" if kind is float else "int", index))
            index += 1
        return tuple(words)

    @classmethod
    @functools.cache
    def name(cls) -> str:
        """The op's name as users know it: "rms_norm" of RmsNorm."""
        return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", cls.__name__).lower()

    # ------------------------------------------------------------ of an op

    @property
    def kind(self) -> str:
        """The key of the op in a table of implementations."""
        return self.name()

    def flops(self, context: int) -> int:
        """Additions and multiplications for one row; exp and the like count as one.

        context: how many tokens a row of attention looks back on.
        """
        return 0

    def _of_role(self, *roles: str) -> tuple[Any, ...]:
        found = (getattr(self, name) for name, operand in self.declared() if operand.role in roles)
        return tuple(value for value in found if value is not None)

    @functools.cached_property
    def outputs(self) -> tuple[Tensor, ...]:
        """The tensors that the op writes."""
        return self._of_role("output")

    @functools.cached_property
    def inputs(self) -> tuple[Any, ...]:
        """All that the op reads, with its caches (which it may write, too)."""
        return self._of_role("rows", "constant", "packed", "table", "setting", "cache")

    @property
    def caches(self) -> tuple[CacheArray, ...]:
        """The memory that outlives a step, which the op reads or writes."""
        return self._of_role("cache")

    @property
    def packed(self) -> tuple[Weight, ...]:
        """The weights in the layout of the op's implementation."""
        return self._of_role("packed")

    @property
    def shared(self) -> tuple[Tensor, ...]:
        """The outputs that are not scratch: another op or a user may read them."""
        return tuple(getattr(self, n) for n, o in self.declared() if o.role == "output" and not o.scratch)

    @property
    def kept(self) -> tuple[Tensor, ...]:
        """The outputs that hold values in every row, not only in rows that ask for them."""
        return tuple(
            getattr(self, n) for n, o in self.declared() if o.role == "output" and not (o.scratch or o.on_request)
        )

    @functools.cached_property
    def params(self) -> dict[str, Any]:
        """The parameters by name."""
        return {name: getattr(self, name) for name in self.parameters()}

    @property
    def part_start(self) -> Tensor | None:
        """Of an op whose weight is made of equal parts, below one another, of which a step reads those that it has rows
        for: the tensor whose first row says where each part's rows begin, and the last ones end. None: a step reads all
        of the weight."""
        return None

    @property
    def rows(self) -> str:
        """The letter that counts the op's rows."""
        return self.outputs[0].rows if self.outputs else "T"

    def columns(self, tensor: Tensor) -> range | None:
        """The columns of a tensor that the op reads or writes, whole cache lines; None: of any column."""
        return None

    def changed(self, **operands: Any) -> Any:
        """A copy of the op with some operands replaced."""
        return dataclasses.replace(self, **operands)  # pyright: ignore[reportArgumentType]

    def __str__(self) -> str:
        write = ", ".join(str(t) for t in self.outputs) or "cache"
        return f"{write} = {self.kind}({', '.join(i.name for i in self.inputs)})"

    # ------------------------------------------------------------ checks

    def _check_operand(self, name: str, operand: Operand, value: Any) -> None:
        if value is None and operand.optional:
            return
        expected: Any = TYPES[operand.role]
        if value is None or not isinstance(value, expected):
            found = f"a {type(value).__name__}" if not isinstance(value, (int, float, str)) else repr(value)
            raise ValueError(f"{type(self).__name__}: {name} is {found}, expected a {expected.__name__}")
        if operand.role == "table" and value.rows.dtype != np.float32:
            raise ValueError(f"{type(self).__name__}: {name} is a table of {value.rows.dtype}, expected float32")
        if operand.role == "setting":
            self._check_setting(name, DTYPES[operand.dtype or "f32"], value.values)
            return
        if operand.kind and value.kind != operand.kind:
            raise ValueError(f"{type(self).__name__}: {name} is a cache of {value.kind}, expected {operand.kind}")
        if operand.dtype and value.dtype != operand.dtype:
            raise ValueError(f"{type(self).__name__}: {name} is {value}, expected {operand.dtype}")

    def _check_setting(self, name: str, dtype: np.dtype, values: np.ndarray) -> None:
        if values.dtype != dtype or not values.flags.c_contiguous:
            raise ValueError(f"{type(self).__name__}: {name} is a setting of {values.dtype}, expected rows of {dtype}")

    def _check_rule(self, rule: str) -> None:
        try:
            [holds] = evaluated(rule, self.params)
        except ZeroDivisionError:
            holds = False
        if not holds:
            names = [name for name in self.parameters() if re.search(rf"\b{name}\b", rule)]
            found = ", ".join(f"{name} {getattr(self, name)}" for name in names)
            raise ValueError(f"{type(self).__name__}: expected {rule}, got {found}")

    def _check_rows(self, name: str, operand: Operand, value: Any) -> None:
        if not isinstance(value, Tensor):
            return
        if not operand.other_rows and value.rows != self.rows:
            raise ValueError(
                f"{type(self).__name__}: {name} is {value}, expected rows {self.rows} as of {self.outputs[0]}"
            )
        if operand.role == "rows" and value in self.outputs and not self.in_place:
            raise ValueError(f"{type(self).__name__}: {name} is {value}, which the op writes; it cannot work in place")

    def _check_shape(self, name: str, operand: Operand, value: Any) -> None:
        if value is None or operand.shape is None:
            return
        expected = evaluated(operand.shape, self.params)
        found = tuple(value.shape) if operand.role in ("constant", "packed", "setting", "cache") else (_width(value),)
        if found != expected:
            raise ValueError(
                f"{type(self).__name__}: {name} ({value.name}) is {_spelt(found)} wide, expected {_spelt(expected)} "
                f"({operand.shape})"
            )


def _check_declaration(cls: type[Operands]) -> None:
    """ValueError for a class whose fields are not operands and parameters of an op."""
    hints, parameters = get_type_hints(cls), set(cls.parameters())
    taken = {"read", *(name for name in dir(Operands) if not name.startswith("__"))}
    if cls.group not in (None, *GROUPS):
        raise ValueError(f"{cls.__name__}: group is {cls.group!r}, expected None or one of {', '.join(GROUPS)}")
    for field in dataclasses.fields(cls):  # pyright: ignore[reportArgumentType]
        operand, hint = field.metadata.get("operand"), hints[field.name]
        if field.name in taken:
            raise ValueError(f"{cls.__name__}: an operand cannot be named {field.name!r}, which every op has")
        if operand is None and hint not in (int, float, bool, str):
            raise ValueError(f"{cls.__name__}: {field.name} is declared as {hint}, expected int, float, bool or str")
        if operand is not None and hint not in (np.ndarray, np.ndarray | None):
            kind: Any = TYPES[operand.role]
            if hint not in (kind, kind | None):
                raise ValueError(f"{cls.__name__}: {field.name} is declared as {hint}, expected {kind.__name__}")
        if operand is not None and operand.shape is not None:
            _check_expression(cls, field.name, operand.shape, parameters)
    for rule in cls.rules:
        _check_expression(cls, "a rule", rule, parameters)
    last = cls.words()[-1] if cls.words() else None
    if last is not None and last.index >= MAX_WORDS:
        raise ValueError(f"{cls.__name__}: {last.index + 1} words, expected at most {MAX_WORDS}")


def _check_expression(cls: type[Operands], name: str, shape: str, parameters: set[str]) -> None:
    try:
        unknown = sorted(set(compile(f"({shape},)", "<declaration>", "eval").co_names) - parameters)
    except SyntaxError:
        raise ValueError(f"{cls.__name__}: {shape!r} of {name} cannot be read") from None
    if unknown:
        raise ValueError(f"{cls.__name__}: {shape!r} of {name} names {unknown[0]}, which is no parameter")


def _fits(value: Any, kind: type) -> bool:
    """Whether an op row holds the number: a size in int64, or a finite float32."""
    if kind is float:
        return abs(float(value)) <= float(np.finfo(np.float32).max)
    return kind is bool or 0 <= value < 2**63


def _width(value: Tensor | Table) -> int:
    return value.width if isinstance(value, Tensor) else value.rows.shape[1]


def _spelt(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
