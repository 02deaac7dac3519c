"""Errors about a model's files name what was found in them, which may be megabytes: a list, a name, a number."""

import contextlib
from collections.abc import Iterator

MOST = 2000  # characters of an error
BEGIN, END = MOST - 600, 400


@contextlib.contextmanager
def brief_errors() -> Iterator[None]:
    """A ValueError of more than `MOST` characters loses its middle, in which a long value stands."""
    try:
        yield
    except ValueError as error:
        text = str(error)
        if len(text) <= MOST:
            raise
        raise ValueError(f"{text[:BEGIN]} ... ({len(text)} characters) ... {text[-END:]}") from None
