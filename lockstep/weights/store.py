"""Packed weights: made once, kept on disk, memory-mapped from then on."""

import contextlib
import hashlib
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np

from lockstep.runtime.executor import WeightStore
from lockstep.runtime.kernel import user_cache
from lockstep.runtime.targets import name as target_name

# Layouts whose names end like this are kept on disk; the others are small. A kept table was checked when it was made,
# and no step reads the checkpoint's file, which somebody might truncate.
KEPT = ("panels", "stored bytes")
FORMAT = 4  # of the packed files; a change of any layout raises it


class PackedStore(WeightStore):
    """The packed weights of a checkpoint, kept in the user's cache folder.

    progress: called with ("packing", bytes done, None) as weights are packed. A folder that cannot be written, or a
    full disk, only means that nothing is kept.
    """

    def __init__(self, checkpoint, progress=None):
        super().__init__()
        self.folder = user_cache() / "packed" / f"{checkpoint.fingerprint()[:32]}-{FORMAT}-{target_name()}"
        self._progress, self._done = progress, 0

    def make(self, weight, layout):
        name, pack = layout
        if not name.endswith(KEPT):
            return super().make(weight, layout)
        key = hashlib.sha256(f"{weight.name}\0{name}".encode()).hexdigest()[:24]
        kept = self._load(key)
        if kept is None:
            kept = super().make(weight, layout)
            self._keep(key, kept)
            self._report(kept)
        return kept

    def _report(self, arrays):
        self._done += sum(a.nbytes for a in arrays)
        if self._progress:
            self._progress("packing", self._done, None)

    def _load(self, key):
        """The arrays of a packed weight, memory-mapped; None where they are not there or not whole."""
        try:
            names = file_names(len(os.listdir(self.folder / key)))
            return tuple(np.load(self.folder / key / name, mmap_mode="r") for name in names) or None
        except (OSError, ValueError, EOFError):
            return None

    def _keep(self, key, arrays):
        """Writes arrays into a folder that appears whole or not at all, whatever other processes do."""
        with contextlib.suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            if shutil.disk_usage(self.folder).free < 4 * sum(a.nbytes for a in arrays):
                return
            made = Path(tempfile.mkdtemp(dir=self.folder, prefix=".making-"))
            try:
                for name, array in zip(file_names(len(arrays)), arrays):
                    np.save(made / name, array)
                if self._load(key) is None:
                    shutil.rmtree(self.folder / key, ignore_errors=True)  # a damaged one
                os.replace(made, self.folder / key)
            except OSError:
                shutil.rmtree(made, ignore_errors=True)


def file_names(count):
    """Files of so many arrays; the count is in each name, so that a missing one is noticed."""
    return [f"{i}-of-{count}.npy" for i in range(count)]
