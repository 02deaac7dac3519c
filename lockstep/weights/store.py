"""Packed weights: made once for all executors of a model, and kept on disk under the checkpoint's content hash."""

import contextlib
import errno
import functools
import hashlib
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from lockstep import formats
from lockstep.native.targets import TARGET
from lockstep.new_files import MAKING
from lockstep.progress import OnProgress
from lockstep.runtime.backend import Layout
from lockstep.runtime.executor import ALIGNMENT, aligned
from lockstep.runtime.program import Weight
from lockstep.user_cache import (
    cache_lasts,
    cache_subfolder,
    free_bytes,
    make_private,
    obstacle_of,
    user_cache,
    warn_not_kept,
)
from lockstep.weights import packed_cache, packed_file
from lockstep.weights.checkpoint import Checkpoint
from lockstep.weights.finite import MAPPED_BYTES, STORED_BYTES, check_matrix
from lockstep.weights.leased_map import LeasedMaps
from lockstep.weights.mapped import own_descriptor, place_of
from lockstep.weights.parts import PackedParts

# Layouts with these suffixes are kept on disk; the others are small. Of a table (stored bytes) that is mapped where it
# lies in the checkpoint's file, what is kept is a note, in the layout of this name, that it was checked.
PANELS, CHECKED = "panels", "checked bytes"
KEPT = (PANELS, STORED_BYTES)


class WeightStore:
    """Weights in the layouts that kernels read, each made once and shared by all executors of a model."""

    def __init__(self):
        self._arrays = {}

    def arrays(self, weight, layout):
        """The arrays of a weight in a layout (`runtime.backend.Layout`)."""
        key = weight.name, layout.name
        if key not in self._arrays:
            self._arrays[key] = self.make(weight, layout)
        return self._arrays[key]

    def arrays_in_parts(
        self, weight: Weight, layout: Layout, num_parts: int
    ) -> tuple[tuple[np.ndarray, ...], PackedParts | None]:
        """The arrays of a weight that is made of equal parts, below one another, and those parts that have to be packed
        before they are read; None if all are packed, as this store packs them."""
        return self.arrays(weight, layout), None

    def expect(self, wanted: Iterable[tuple[Weight, Layout]]) -> None:
        """Says which weights will be asked for, some several times, and in which layouts."""

    @property
    def num_bytes(self) -> int:
        """Bytes of all arrays that were made."""
        return sum(array.nbytes for arrays in self._arrays.values() for array in arrays)

    def make(self, weight, layout):
        """The arrays of a weight in a layout, made anew."""
        return tuple(_line_aligned(a) for a in layout.make(weight))

    def warn_not_kept(self) -> None:
        """Warns, once all arrays were made, about those that could not be kept. This store keeps none and says none."""


def _line_aligned(array):
    """The array, aligned to a cache line. Read-only arrays are mapped files and stay where they lie."""
    if not array.flags.writeable or (array.ctypes.data % ALIGNMENT == 0 and array.flags.c_contiguous):
        return array
    copy = aligned(array.nbytes).view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


class PackedStore(WeightStore):
    """The packed weights of a checkpoint, kept in the user's cache folder.

    progress: called with ("packing", bytes done, bytes in all) as weights are packed, with ("loading", ...) as packed
    ones are read, and with ("reading", ...) while the store waits for the content hash. The bytes are the checkpoint's;
    in all there are those that `expect` was told of, or None if it was told of none. Until the hash is known, weights
    are kept under the checkpoint's provisional name. If the folder cannot be written or the disk is full, weights are
    packed again by the next process: num_bytes_not_kept counts their bytes, and `warn_not_kept` says so. packs_lazily:
    experts are packed when a step first needs them, and kept by `finish`; a process that ends before has kept whole
    weights, and no part of one; in_parts: the weights, by name and layout, whose parts are packed one by one.
    """

    def __init__(self, checkpoint: Checkpoint, progress: OnProgress | None = None, packs_lazily: bool = False):
        super().__init__()
        self.checkpoint, self.progress, self._packs_lazily = checkpoint, progress, packs_lazily
        self.in_parts: dict[tuple[str, str], PackedParts] = {}
        self._to_keep: list[PackedParts] = []  # those of them that no file has yet
        self._done: Counter[str] = Counter()
        self._total: Counter[str] = Counter()
        self._expected: set[tuple[str, str]] = set()  # (weight, layout)
        self._root, self._lock, self._maps = _packed_folder(), threading.Lock(), LeasedMaps()
        self._counting = threading.Lock()
        self._suffix, self.num_bytes_not_kept, self._obstacle = f"{packing_version()}-{TARGET.name}", 0, ""
        self._used: int | None = None  # bytes of all packed models; None until they are counted
        self.folder = self._root / f"{packed_cache.PROVISIONAL}{checkpoint.provisional_name}-{self._suffix}"
        packed_cache.tidy(self._root)
        packed_cache.allowed_bytes(self._root, 0)  # a limit that is no number is refused before long work
        if checkpoint.verify or (checkpoint.content.known is None and self._is_like_a_packed_one()):
            checkpoint.content.wait(progress)
        checkpoint.content.when_known(self._adopt)

    def _is_like_a_packed_one(self) -> bool:
        """Whether a model with the same headers was packed: it is probably this one, so its content is hashed first."""
        header = self.checkpoint.header_hash
        if self.folder.is_dir():  # an earlier process has packed this very file
            return False
        return any(
            model.about.get("header") == header
            for model in packed_cache.models(self._root)
            if model.folder.name.endswith(self._suffix)
        )

    def make(self, weight: Weight, layout: Layout) -> tuple[np.ndarray, ...]:
        name = layout.name
        if not name.endswith(KEPT):
            return super().make(weight, layout)
        if name.endswith(STORED_BYTES) and (mapped := self._mapped(weight)) is not None:
            if name == STORED_BYTES:
                self._check_once(weight)
            return (mapped,)
        what = described(weight, name)
        arrays, work = self._load(what), "loading"
        if arrays is None:
            arrays, work = super().make(weight, layout), "packing"
            self._keep(what, arrays)
        self._report(work, stored_bytes(weight))
        return arrays

    def _check_once(self, weight: Weight) -> None:
        """Checks a table for NaN and infinity, unless an earlier process did."""
        what, work = described(weight, CHECKED), "loading"
        if self._load(what) is None:
            check_matrix(*weight.parts)
            self._keep(what, ())
            work = "packing"
        self._report(work, stored_bytes(weight))

    def _mapped(self, weight: Weight) -> np.ndarray | None:
        """The bytes of a weight where they lie in the checkpoint's file, uint8 [rows, bytes per row]; None without a
        lease, or if the file has changed."""
        [part] = weight.parts
        if (place := place_of(part.data)) is None:
            return None
        with contextlib.suppress(OSError), own_descriptor(place.descriptor) as descriptor:
            mapped = self._maps.map(descriptor, place.start, part.data.nbytes)
            if mapped is not None and self._is_unchanged():
                return mapped.reshape(part.shape[0], -1)
        return None

    def expect(self, wanted: Iterable[tuple[Weight, Layout]]) -> None:
        """Counts the bytes of the weights that are to be packed, and of those that are packed already."""
        for weight, layout in wanted:
            key = weight.name, layout.name
            if layout.name == MAPPED_BYTES:
                continue  # nothing is read of it
            if layout.name.endswith(KEPT) and key not in self._arrays and key not in self._expected:
                self._expected.add(key)
                names = (layout.name, CHECKED) if layout.name == STORED_BYTES else (layout.name,)
                is_packed = any((self.folder / file_name(described(weight, name))).exists() for name in names)
                self._total["loading" if is_packed else "packing"] += stored_bytes(weight)

    def _report(self, work: str, num_bytes: int) -> None:
        with self._counting:
            self._done[work] += num_bytes
        if self.progress is not None:
            self.progress(work, self._done[work], self._total[work] or None)

    def arrays_in_parts(
        self, weight: Weight, layout: Layout, num_parts: int
    ) -> tuple[tuple[np.ndarray, ...], PackedParts | None]:
        key = weight.name, layout.name
        if key not in self._arrays and self._packs_lazily and layout.name.endswith(PANELS):
            loaded = self._load(described(weight, layout.name))
            if loaded is None:
                on_packed = functools.partial(self._packed, stored_bytes(weight) // num_parts)
                self.in_parts[key] = PackedParts(weight, layout, num_parts, on_packed)
                self._to_keep.append(self.in_parts[key])
                self._arrays[key] = self.in_parts[key].arrays
            else:
                self._arrays[key] = loaded
                self._report("loading", stored_bytes(weight))
        parts = self.in_parts.get(key)
        return self.arrays(weight, layout), None if parts is None or parts.is_whole else parts

    def _packed(self, num_bytes: int) -> None:
        """Takes note of a part that was packed. ValueError if the checkpoint's files have changed."""
        self.checkpoint.check_unchanged()
        self._report("packing", num_bytes)

    def finish(self, is_stopped: Callable[[], bool] = lambda: False) -> None:
        """Packs the parts that no step has needed yet, layer by layer, and keeps them for later starts; those that find
        no room are not packed.

        is_stopped: asked before each part; where it returns True, this ends. ValueError: see `PackedParts.pack`.
        """
        while self._to_keep:
            parts = self._to_keep[0]
            if self._finds_room(packed_file.num_bytes(parts.arrays)):
                parts.pack(part for part in range(parts.num_parts) if not is_stopped())
                if not parts.is_whole:
                    return
                self._keep(described(parts.weight, parts.layout.name), parts.arrays)
            self._to_keep.pop(0)
        self.warn_not_kept()

    @property
    def is_finished(self) -> bool:
        """Whether `finish` has nothing to do."""
        return not self._to_keep

    def _finds_room(self, size: int) -> bool:
        """Whether packed models may take `size` bytes more, if others make room; if not, the bytes count as not
        kept."""
        with self._lock:
            allowed = packed_cache.allowed_bytes(self._root, self._used or 0)
            finds = cache_lasts() and packed_cache.num_bytes(self.folder) + size <= allowed
        if not finds:
            self.num_bytes_not_kept += size
            self._obstacle = packed_cache.limit_words(self._root, allowed)
        return finds

    def _load(self, what: str) -> tuple[np.ndarray, ...] | None:
        """The arrays of a packed weight; None if its file is missing or damaged."""
        with self._lock, contextlib.suppress(OSError, packed_file.Damaged):
            return packed_file.read(self.folder / file_name(what), what, self._maps, self.checkpoint.verify)
        return None

    def _keep(self, what: str, arrays: tuple[np.ndarray, ...]) -> None:
        size = packed_file.num_bytes(arrays)
        with self._lock:
            try:
                if not (obstacle := self._prepare(size)):
                    packed_file.write(self.folder / file_name(what), what, arrays)
            except OSError as error:
                obstacle = obstacle_of(error, self._root)
        if obstacle:
            self.num_bytes_not_kept += size
            self._obstacle = obstacle

    def _prepare(self, size: int) -> str:
        """Makes the folder, and room for `size` bytes; returns in words why they cannot be kept, or "". OSError if the
        folder cannot be made."""
        if not cache_lasts() or not self._is_unchanged():  # of both there is a message of its own
            return "it will not be found again"
        self._open_folder()
        if not self._has_room(size):
            return packed_cache.limit_words(self._root, packed_cache.allowed_bytes(self._root, self._used or 0))
        if (free := free_bytes(self._root)) is not None and free < size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return ""

    def warn_not_kept(self) -> None:
        if not self.num_bytes_not_kept or not cache_lasts():
            return
        total = self.num_bytes_not_kept + packed_cache.num_bytes(self.folder)
        warn_not_kept(
            (self._root, self.checkpoint.path),
            f"{self.num_bytes_not_kept / 1e6:,.0f} of {total / 1e6:,.0f} MB of packed weights cannot be kept in "
            f"{self._root}, so the next start packs them again: {self._obstacle}",
        )

    def _open_folder(self) -> None:
        make_private(self.folder)
        if not (self.folder / packed_cache.ABOUT).exists():
            packed_cache.write_about(self.folder, self._about())

    def _about(self) -> dict:
        return dict(model=os.path.abspath(self.checkpoint.path), header=self.checkpoint.header_hash, target=TARGET.name)

    def _has_room(self, size: int) -> bool:
        """Whether `size` more bytes may be kept; makes room by removing the least recently used models."""
        if self._used is None:
            self._used = sum(model.num_bytes for model in packed_cache.models(self._root))
        allowed = packed_cache.allowed_bytes(self._root, self._used)
        if self._used + size > allowed:
            own = self.folder
            self._used = packed_cache.prune(self._root, allowed - size, lambda model: model.folder != own)
        self._used += size if self._used + size <= allowed else 0
        return self._used <= allowed

    def _is_unchanged(self) -> bool:
        """Whether the checkpoint's files are unchanged since they were opened."""
        with contextlib.suppress(ValueError):
            self.checkpoint.check_unchanged()
            return True
        return False

    def _adopt(self, content: str) -> None:
        """Moves the packed weights to the folder of the content hash, and keeps all others there."""
        provisional, final = self.folder, self._root / f"{content[:32]}-{self._suffix}"
        with self._lock, contextlib.suppress(OSError):
            self.folder = final
            if provisional.is_dir():
                make_private(final)
                for entry in os.scandir(provisional):
                    if not entry.name.startswith(MAKING):  # another process is at work on it
                        os.replace(entry.path, final / entry.name)
                packed_cache.remove(provisional)
            if final.is_dir():
                packed_cache.write_about(final, self._about())  # which also marks it as used now


def _packed_folder() -> Path:
    """Where packed weights are kept. NotPrivate if others can write there; nothing is kept if it cannot be made."""
    with contextlib.suppress(OSError):
        return cache_subfolder("packed")
    return user_cache() / "packed"


def stored_bytes(weight: Weight) -> int:
    """Bytes of a weight in its checkpoint."""
    return sum(part.data.nbytes for part in weight.parts)


def described(weight: Weight, layout: str) -> str:
    """A text that names a packed weight and everything in its checkpoint that it is made from."""
    parts = [(part.name, part.format, part.shape) for part in weight.parts]
    made_from = hashlib.sha256(repr((weight.format, weight.shape, parts)).encode()).hexdigest()[:16]
    return f"{weight.name[:500]} as {layout} from {made_from}"


def file_name(what: str) -> str:
    """The name of a packed weight's file, from its `described` text."""
    return hashlib.sha256(what.encode()).hexdigest()[:24] + ".packed"


@functools.cache
def packing_version() -> str:
    """A hash of the source of everything that turns a checkpoint's bytes into packed weights."""
    digest = hashlib.sha256()
    for folder in (Path(__file__).parent, Path(formats.__file__).parent):
        for path in sorted(folder.rglob("*.py")):
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:8]
