"""Files that appear whole or not at all, and folders for one process: what a killed process leaves is removed.

A new file is written under another name beside its place, and then renamed. Until then its writer holds a lock (flock)
on it, as a process holds one on its scratch folder. The system gives a lock back when its process ends, however it
ends. So a new file or a scratch folder that nobody has locked is left over, and the next process that makes one in the
same place removes it.
"""

import atexit
import contextlib
import fcntl
import os
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from io import BufferedWriter
from pathlib import Path

MAKING, SCRATCH = ".making-", "lockstep-scratch-"  # prefixes of new files and of scratch folders
NEW_FILE, SCRATCH_FOLDER = re.compile(rf"{re.escape(MAKING)}\w{{8,16}}"), re.compile(rf"{SCRATCH}\w{{16}}")
FORGOTTEN_SECONDS = 3600  # where the file system has no locks, what is older than this is left over
PRIVATE_FILE, USUAL_FILE = 0o600, 0o666  # modes, before the umask


@contextlib.contextmanager
def new_file(path: Path, mode: int = PRIVATE_FILE) -> Iterator[BufferedWriter]:
    """A context with an empty file to write to, which takes the place of `path` when the context ends without an error.

    OSError, with the path, if the file cannot be written; what was at `path` is then still there.
    """
    remove_leftovers(path.parent, NEW_FILE)
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    try:
        beside, lock = _made_and_locked(path.parent, MAKING, lambda beside: os.open(beside, flags, mode))
        try:
            with os.fdopen(os.dup(lock), "wb") as file:
                yield file
            os.replace(beside, path)  # the file is closed, which may fail, and still locked
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(beside)
            raise
        finally:
            os.close(lock)
    except OSError as error:
        if error.errno is None:  # of a library: it has nothing but a text
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None


@contextlib.contextmanager
def scratch_folder(parent: Path | None = None) -> Iterator[Path]:
    """A context with a new folder of this process alone, which is removed at its end. parent: where it is made; None:
    in the system's folder for temporary files. OSError if it cannot be made."""
    parent, owner = Path(tempfile.gettempdir()) if parent is None else parent, os.getpid()
    remove_leftovers(parent, SCRATCH_FOLDER)
    folder, lock = _made_and_locked(parent, SCRATCH, make_folder)
    try:
        yield folder
    finally:
        if os.getpid() == owner:  # a forked process leaves the folder to its parent
            shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def process_folder(parent: Path | None = None) -> Path:
    """A scratch folder that is removed when this process ends."""
    context = contextlib.ExitStack()
    folder = context.enter_context(scratch_folder(parent))
    atexit.register(context.close)
    return folder


def make_folder(path: Path) -> int:
    """Makes a private folder; returns its open descriptor."""
    path.mkdir(mode=0o700)
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)


def _made_and_locked(parent: Path, prefix: str, make: Callable[[Path], int]) -> tuple[Path, int]:
    """The path and the open descriptor of what `make` makes under a name of its own, locked."""
    while True:
        path = parent / f"{prefix}{secrets.token_hex(8)}"
        handle = make(path)
        if take_lock(handle) is not False and _is_at(path, handle):
            return path, handle
        os.close(handle)  # between the two calls another process took it for left over


def take_lock(handle: int) -> bool | None:
    """Whether the lock of an open file or folder could be taken; None if its file system has no locks."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _is_at(path: Path, handle: int) -> bool:
    """Whether an open file or folder is still found at a path."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(handle), os.lstat(path))
    return False


def remove_leftovers(folder: Path, names: re.Pattern[str] = NEW_FILE) -> None:
    """Removes the new files (or what else has such names) that ended processes of this user left in a folder."""
    with contextlib.suppress(OSError):
        for entry in os.scandir(folder):
            if names.fullmatch(entry.name):
                with contextlib.suppress(OSError):
                    _remove_if_left_over(Path(entry.path))


def _remove_if_left_over(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        status, is_free = os.fstat(handle), take_lock(handle)
        if is_free is None:
            is_free = time.time() - status.st_mtime > FORGOTTEN_SECONDS
        if is_free and status.st_uid == os.getuid() and _is_at(path, handle):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink()
    finally:
        os.close(handle)
