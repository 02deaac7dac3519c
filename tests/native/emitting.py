"""Which statements of the package emit LLVM, and which of them ran while kernels were compiled.

Code that emits has a builder, by the name `b`, or a site that has one (lockstep/native/emit.py).
"""

import ast
import pathlib
import sys
from collections.abc import Iterator
from types import FrameType

from numba.core import base

import lockstep

PACKAGE = pathlib.Path(lockstep.__file__).parent
ROOMS = ("formats", "native", "ops")  # in which code is emitted
COMPOUND = ast.If | ast.For | ast.While | ast.With | ast.Try | ast.Match
Line = tuple[str, int]  # of a file


class Ran:
    """The lines of the package that run while this context lasts and Numba has the call of a function emitted.

    Only then: tracing all that Numba does would double the time.
    """

    def __init__(self) -> None:
        self.lines: set[Line] = set()

    def __enter__(self) -> "Ran":
        self._emit = emit = base._wrap_impl.__call__  # noqa: SLF001 Numba has no other name

        def traced(*args, **options):
            before = sys.gettrace()
            sys.settrace(self._called)
            try:
                return emit(*args, **options)
            finally:
                sys.settrace(before)

        base._wrap_impl.__call__ = traced  # noqa: SLF001
        return self

    def __exit__(self, *_: object) -> None:
        base._wrap_impl.__call__ = self._emit  # noqa: SLF001

    def _called(self, frame: FrameType, event: str, _: object):
        return self._ran if frame.f_code.co_filename.startswith(str(PACKAGE)) else None

    def _ran(self, frame: FrameType, event: str, _: object):
        self.lines.add((frame.f_code.co_filename, frame.f_lineno))
        return self._ran


def missing(lines: set[Line]) -> list[tuple[str, str, int]]:
    """Statements that emit and that none of the lines belongs to: (file, function, first line)."""
    found = []
    for path in sorted(path for room in ROOMS for path in (PACKAGE / room).rglob("*.py")):
        ran = {line for file, line in lines if file == str(path)}
        file = path.relative_to(PACKAGE.parent).as_posix()
        found += [(file, name, first) for name, first in statements_of(path.read_text(), ran)]
    return found


def statements_of(source: str, ran: set[int]) -> list[tuple[str, int]]:
    """Those of a source, none of whose lines ran: (function, first line)."""
    found = []
    for name, function in emitting(ast.parse(source)):
        ends = sorted(own_lines(node) for node in ast.walk(function) if is_run(node))
        found += [(name, first) for first, last in ends if ran.isdisjoint(range(first, last + 1))]
    return found


def emitting(node: ast.AST, within: str = "") -> Iterator[tuple[str, ast.FunctionDef]]:
    """The functions that emit, with their dotted names; what one of them defines belongs to it."""
    for child in ast.iter_child_nodes(node):
        name = f"{within}{child.name}" if isinstance(child, ast.FunctionDef | ast.ClassDef) else ""
        if isinstance(child, ast.FunctionDef) and has_builder(child):
            yield name, child
        elif isinstance(child, ast.FunctionDef | ast.ClassDef):
            yield from emitting(child, f"{name}.")


def has_builder(function: ast.FunctionDef) -> bool:
    """Whether it is Python that emits; a function that Numba compiles may call anything `b`."""
    if any(isinstance(node, ast.Name) and node.id == "inlined" for node in function.decorator_list):
        return False
    attributes = (node.attr for node in ast.walk(function) if isinstance(node, ast.Attribute))
    return "b" in [argument.arg for argument in function.args.args] or "b" in attributes


def is_run(node: ast.AST) -> bool:
    """Whether it is a statement that does something: no text, no definition."""
    is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    return isinstance(node, ast.stmt) and not isinstance(node, ast.FunctionDef | ast.Pass) and not is_text


def own_lines(node: ast.stmt) -> tuple[int, int]:
    """The first and last line of a statement; of one that holds others, of its head."""
    assert node.end_lineno is not None
    return node.lineno, max(node.lineno, node.body[0].lineno - 1) if isinstance(node, COMPOUND) else node.end_lineno
