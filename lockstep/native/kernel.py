"""How functions become machine code: compiled on first use, cached on disk under everything that can change a bit.

Numba's own cache does not see that a function in another module has changed, so a module's kernels are cached in a
folder named by a hash of the module's source, of the sources of all modules of this package that it imports, of the
versions of Python, Numba and llvmlite, and of the target CPU with its features.
"""

import contextlib
import functools
import hashlib
import os
import pathlib
import re
import sys
from collections.abc import Callable
from types import FunctionType
from typing import Any

import llvmlite
import numba
from numba import config as numba_config
from numba import types
from numba.core import caching, codegen
from numba.core.ccallback import CFunc
from numba.core.registry import cpu_target

from lockstep.native.host import unlisted_features
from lockstep.native.kernel_files import KERNELS, CheckedFiles
from lockstep.user_cache import cache_subfolder, keeping, user_cache

config: Any = numba_config  # its attributes are made when it is imported
OnCompile = Callable[[str], object]
PACKAGE = pathlib.Path(__file__).parents[1]
SIGNATURE = types.void(types.int64, types.int64, types.int64, types.int64)
STRICT: dict[str, Any] = dict(error_model="numpy", fastmath=False, boundscheck=False, nogil=True)

IMPORTS = re.compile(rf"^\s*from ({PACKAGE.name}[.\w]*) import (\([^)]*\)|.*)", re.MULTILINE)
SEPARATE: dict[str, Any] = dict(no_cpython_wrapper=True, no_cfunc_wrapper=True, **STRICT)
# Rooms that say where files are kept: no machine code depends on them.
APART = frozenset({"lockstep.user_cache", "lockstep.new_files"})
INLINED: dict[str, Any] = dict(forceinline=True, **SEPARATE)


def _list_all_features() -> None:
    """Has Numba know what LLVM does not list, unless Numba's variables say what to compile for."""
    if (unlisted := unlisted_features()) and config.CPU_NAME is None and config.CPU_FEATURES is None:
        config.CPU_FEATURES = ",".join(filter(None, [codegen.get_host_cpu_features(), *unlisted]))


_list_all_features()


def target() -> tuple[str, str, str]:
    """(triple, cpu, features) that kernels are compiled for."""
    context: Any = cpu_target.target_context
    return context.codegen().magic_tuple()


@functools.cache
def _source_and_imports(module: str) -> tuple[pathlib.Path | None, frozenset[str]]:
    """The source file of a module, or of a package itself, and the names that it imports from this package.

    The file of a script, or of a module outside this package, is looked up in the loaded module.
    """
    place = PACKAGE.parent / module.replace(".", "/")
    path = next((p for p in (place.with_suffix(".py"), place / "__init__.py") if p.exists()), None)
    if path is None:
        loaded = None if module.split(".")[0] == PACKAGE.name else getattr(sys.modules.get(module), "__file__", None)
        if loaded is None:
            return None, frozenset()
        path = pathlib.Path(loaded)
    names = set()
    for package, imported in IMPORTS.findall(path.read_text()):  # a word too many only makes the hash depend on more
        if package not in APART:
            names |= {package, *(f"{package}.{name}" for name in re.findall(r"\w+", imported))}
    return path, frozenset(names)


@functools.cache
def imported_sources(module: str) -> frozenset[pathlib.Path]:
    """The source files of a module and of all modules of this package that it imports, directly or indirectly."""
    sources, seen, left = set(), {module}, [module]
    while left:
        path, names = _source_and_imports(left.pop())
        sources |= {path} if path else set()
        left += names - seen
        seen |= names
    return frozenset(sources)


def fingerprint(module: str) -> str:
    """Hash of everything that determines the machine code of a module's kernels; of the sources as they were when a
    process first asked, which are those that it has imported."""
    return _fingerprint(module, target(), config.OPT)


@functools.cache
def _fingerprint(module: str, target: tuple[str, str, str], level: object) -> str:
    digest = hashlib.sha256()
    for path in sorted(imported_sources(module)):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    digest.update(repr((numba.__version__, llvmlite.__version__, sys.version_info[:2], target, level)).encode())
    return digest.hexdigest()[:16]


@functools.cache
def kernel_cache(module: str) -> pathlib.Path:
    """The folder of a module's compiled kernels, named by the module's `fingerprint`."""
    folder = user_cache() / "kernels" / fingerprint(module)
    with contextlib.suppress(OSError):  # where nothing can be written, kernels are compiled and not kept
        folder = cache_subfolder("kernels", folder.name)
        os.utime(folder)  # `lockstep cache prune` removes the folders that have not been used for long
    return folder


class ContentLocator(caching._CacheLocator):  # noqa: SLF001 Numba has no other name for it
    """Tells Numba where to cache a function: in a folder named by content, not by a file's path and time."""

    def __init__(self, function):
        self._folder, self._line = str(kernel_cache(function.__module__)), function.__code__.co_firstlineno

    def get_cache_path(self):
        return self._folder

    def ensure_cache_path(self):
        """Does nothing: saving makes the folder, and says whether it can be written."""

    def get_source_stamp(self):
        return "the folder is named by the content of all sources"

    def get_disambiguator(self):
        return str(self._line)

    @classmethod
    def from_function(cls, py_func, py_file):
        return cls(py_func)


@contextlib.contextmanager
def cached_by_content():
    """Functions that are decorated meanwhile are cached by ContentLocator and CheckedFiles; other packages' are not."""
    places = (config, "CACHE_LOCATOR_CLASSES"), (caching.CacheImpl, "_locator_classes"), (caching, "IndexDataCacheFile")
    before = [getattr(*place) for place in places]
    for place, value in zip(places, ("", [ContentLocator], CheckedFiles), strict=True):
        setattr(*place, value)
    try:
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            setattr(*place, value)


def interpreted(function, _copies=None):
    """A definition (or a helper of one) as plain Python, its own helpers included: no compiler takes part.

    Compiled functions that the source refers to are replaced in a copy of its globals. _copies: those made already.
    """
    copies = {} if _copies is None else _copies
    source = function.py_func
    if source not in copies:
        names = dict(source.__globals__)
        copies[source] = type(source)(source.__code__, names, source.__name__, source.__defaults__, source.__closure__)
        for name in source.__code__.co_names:
            if hasattr(names.get(name), "py_func"):
                names[name] = interpreted(names[name], copies)
    return copies[source]


def native(function):
    """Decorator: strict native code of a plain function, compiled when first called and cached on disk."""
    with cached_by_content():
        return numba.njit(cache=True, **STRICT)(function)


def definition(function):
    """Decorator for an op's definition: strict scalar float32. See `interpreted` for the uncompiled form."""
    return native(function)


def inlined(function):
    """Decorator for a helper of kernels and definitions, always inlined by LLVM; it cannot be called from Python."""
    return numba.njit(**INLINED)(function)


def merged(function):
    """Decorator for a helper that Numba copies into its caller before it infers types, so that LLVM sees its code once;
    it cannot be called from Python."""
    return numba.njit(inline="always", **STRICT)(function)


def separate(function):
    """Decorator for a helper of kernels that calls `machine.kept_apart`; it cannot be called from Python."""
    return numba.njit(**SEPARATE)(function)


class Kernel:
    """A native function (op, step, thread, num_threads) -> None over addresses, compiled when first asked for."""

    def __init__(self, function: FunctionType) -> None:
        self.name, self.function, self._compiled = function.__qualname__, function, None
        self.__doc__ = function.__doc__

    @property
    def address(self) -> int:
        """Address of the machine code; compiles or loads it on first use."""
        address = self.compile().address
        assert address is not None
        return address

    def compile(self, on_compile: OnCompile | None = None) -> CFunc:
        """The machine code, compiled or loaded once. on_compile: called with the kernel's name before a compilation."""
        if self._compiled is None:
            if getattr(sys.modules[self.function.__module__], self.name, None) is not self:
                raise ValueError(f"kernel {self.path}: it is cached under this name, but is not the object that has it")
            if on_compile is not None and not self.is_cached:
                on_compile(self.name)
            options = {k: v for k, v in STRICT.items() if k != "nogil"}
            with cached_by_content():
                self._compiled = numba.cfunc(SIGNATURE, cache=True, **options)(self.function)
            self._set_mark(self._compiled)
        return self._compiled

    def _set_mark(self, compiled: Any) -> None:
        """Marks the kernel as compiled, if its machine code is on disk."""
        files: CheckedFiles = compiled._cache._cache_file  # noqa: SLF001 Numba has no other name for it
        if files.is_kept and not os.path.exists(self._mark):
            with keeping(KERNELS, self._mark.parent):
                self._mark.touch()

    @property
    def path(self) -> str:
        """Where the kernel is found: "module:name"."""
        return f"{self.function.__module__}:{self.name}"

    @property
    def is_cached(self) -> bool:
        """Whether machine code is loaded or, as its mark says, on disk."""
        return self._compiled is not None or os.path.exists(self._mark)

    @property
    def _mark(self) -> pathlib.Path:
        """The file that is made when the kernel has been compiled."""
        return kernel_cache(self.function.__module__) / f"{self.name}.done"


def kernel(function: FunctionType) -> Kernel:
    """Decorator: a function of four int64 (op, step, thread, num_threads) becomes a `Kernel`."""
    return Kernel(function)


def variant(body: FunctionType, name: str, **constants: Any) -> Kernel:
    """The kernel `body`, a plain function, with some of its global names bound to constants of this variant.

    The kernel is cached under its name, and the module of `body` must hold it under this name, where processes that
    compile it look for it. Make a variant after all that `body` uses: later changes of the module's names are not seen.
    ValueError for a name that is taken and for constants that `body` does not use.
    """
    if name in body.__globals__:
        raise ValueError(f"variant {name!r} of {body.__name__}: {body.__module__} has this name already")
    unused = sorted(constants.keys() - set(body.__code__.co_names))
    if unused:
        used = ", ".join(sorted(set(body.__code__.co_names) & body.__globals__.keys()))
        raise ValueError(f"variant {name!r}: {body.__name__} does not use {unused[0]!r}; its global names are {used}")
    code = body.__code__.replace(co_name=name, co_qualname=name)
    return Kernel(FunctionType(code, {**body.__globals__, **constants}, name))
