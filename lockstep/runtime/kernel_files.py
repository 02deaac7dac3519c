"""Numba's files of compiled code, checked when they are read: a damaged one is compiled again.

A full disk, a crash or a cleaner of temporary files leaves files that are cut off, empty or gone. Numba raises whatever
its unpickling raises, or would run what is left of the machine code.
"""

import contextlib
import hashlib
import os
import pickle

from numba.core.caching import IndexDataCacheFile

DIGEST_BYTES = hashlib.sha256().digest_size


class CheckedFiles(IndexDataCacheFile):
    """A function's index and data files; every pickle is followed by its digest (of which unpickling takes no note)."""

    def load(self, key):
        """The entry of a key; None if there is none, or none that is whole."""
        try:
            return super().load(key)
        except Exception:  # a damaged pickle raises anything
            with contextlib.suppress(OSError):
                os.unlink(self._index_path)
            return None

    def _dump(self, obj):
        pickled = super()._dump(obj)
        return pickled + hashlib.sha256(pickled).digest()

    def _load_data(self, name):
        with open(self._data_path(name), "rb") as file:
            content = file.read()
        pickled, digest = content[:-DIGEST_BYTES], content[-DIGEST_BYTES:]
        if hashlib.sha256(pickled).digest() != digest:
            raise ValueError(f"{self._data_path(name)}: damaged")
        return pickle.loads(pickled)
