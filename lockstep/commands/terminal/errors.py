"""Errors by a user's mistake, or by a lack of memory or threads, as one sentence."""

import errno
from pathlib import Path

from lockstep.native.host import UnfitMachine

NO_THREAD = "can't start new thread"  # the beginning of Python's RuntimeError, which has no class of its own
NOT_MAPPED = "failed to map segment"  # in an ImportError or OSError: there is no memory to load a library


def is_told(error: Exception) -> bool:
    """Whether an error is told as a sentence: it is no fault of the program, which would need a traceback."""
    return isinstance(error, (ValueError, OSError, UnfitMachine)) or _lack(error) is not None


def sentence(error: Exception) -> str:
    """The sentence of an error that `is_told`, without codes and class names."""
    lack = None if isinstance(error, ValueError) else _lack(error)
    if lack is not None:
        return lack
    if isinstance(error, OSError) and error.filename:
        from lockstep.user_cache import reason_of  # it takes a while to import

        return f"{error.filename}: {reason_of(error, Path(str(error.filename)))}"
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def _lack(error: BaseException | None) -> str | None:
    """In words: the memory or thread that an error, or one of its causes, could not get; None for other errors."""
    while error is not None:
        if isinstance(error, MemoryError):
            return f"not enough memory{f': {error}' if str(error) else ''}"
        if isinstance(error, OSError) and error.errno == errno.ENOMEM:
            return f"not enough memory{f': {error.filename}' if error.filename else ''}"
        if isinstance(error, (ImportError, OSError)) and NOT_MAPPED in str(error):
            return f"not enough memory: {error}"
        if isinstance(error, RuntimeError) and str(error).startswith(NO_THREAD):
            return "no thread can be started: there is no memory for it, or there are too many (ulimit -v, ulimit -u)"
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return None
