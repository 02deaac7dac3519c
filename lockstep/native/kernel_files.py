"""Numba's files of compiled code, checked when they are read: what is damaged is compiled again.

A full disk, a crash or a cleaner of temporary files leaves files that are cut off, empty or missing; a backup may put
another kernel's file in their place. Numba itself would raise an error of unpickling, or run the wrong code.
"""

import contextlib
import hashlib
import os
import pickle
from pathlib import Path

from numba.core.caching import IndexDataCacheFile

from lockstep.new_files import new_file
from lockstep.user_cache import keeping, make_private

KERNELS = "Compiled kernels (about 10 MB for a model)"
DIGEST_BYTES = hashlib.sha256().digest_size


class CheckedFiles(IndexDataCacheFile):
    """A function's index and data files: pickles, each followed by a digest of its content, its name and its folder's
    name (which is a hash of all that the code is made from). is_kept: whether all that was saved is on disk."""

    is_kept = True

    def save(self, key, data):
        """Saves an entry. If it cannot be kept, there is a warning, and `is_kept` is False."""
        self.is_kept = False
        with keeping(KERNELS, folder := Path(self._cache_path)):
            make_private(folder)
            super().save(key, data)
            self.is_kept = True

    def load(self, key):
        """The entry of a key; None if there is none or a file is damaged."""
        try:
            return super().load(key)
        except Exception:  # a damaged pickle raises anything
            with contextlib.suppress(OSError):
                os.unlink(self._index_path)
            return None

    def _load_index(self):
        if not os.path.exists(self._index_path):
            return {}
        versions, names = self._load_data(self._index_name)
        return names if versions == (self._version, self._source_stamp) else {}

    def _save_index(self, overloads):
        self._save_data(self._index_name, ((self._version, self._source_stamp), overloads))

    def _save_data(self, name, data):
        pickled = self._dump(data)
        with new_file(Path(self._data_path(name))) as file:
            file.write(pickled + self._digest(name, pickled))

    def _load_data(self, name):
        with open(self._data_path(name), "rb") as file:
            content = file.read()
        pickled, digest = content[:-DIGEST_BYTES], content[-DIGEST_BYTES:]
        if self._digest(name, pickled) != digest:
            raise ValueError(f"{self._data_path(name)}: damaged, or the file of another kernel")
        return pickle.loads(pickled)

    def _digest(self, name, pickled):
        place = f"{os.path.basename(self._cache_path)}/{name}\0"
        return hashlib.sha256(place.encode() + pickled).digest()
