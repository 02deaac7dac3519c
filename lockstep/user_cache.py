"""The user's cache folder, and who may write to it.

Compiled kernels are machine code behind pickles, packed weights decide answers: whoever can write to their folder can
run code or change answers. So a cache folder is used only if it belongs to this user (or to root), nobody else may
write to it, and nobody else can put another folder in its place.
"""

import contextlib
import errno
import functools
import logging
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Hashable, Iterator
from pathlib import Path
from typing import NamedTuple

from lockstep.new_files import process_folder

VARIABLE = "LOCKSTEP_CACHE"
PRIVATE = 0o700
FULL = (errno.ENOSPC, errno.EDQUOT)
UNWRITABLE = (*FULL, errno.EROFS, errno.EACCES, errno.EPERM)
ONLY_READ = (*FULL, errno.EROFS)  # what is on such a disk can be used, although nothing is added
USUAL_TEMPORARY = ("/tmp", "/var/tmp", "/usr/tmp")
NOWHERE = Path(os.devnull) / "lockstep"  # a folder that nobody can make
log = logging.getLogger("lockstep.cache")


class NotPrivate(ValueError):
    """A folder to which somebody else can write."""


def make_private(folder: Path) -> Path:
    """Makes a folder (mode 0700) where there is none, and checks that nobody else can write to it.

    Returns its real path, of which all parts were checked. Raises NotPrivate, naming the folder or parent that others
    can write to, its owner and its mode; OSError if the folder cannot be made.
    """
    _make(folder)
    resolved = folder.resolve()
    if folder.is_symlink() and os.lstat(folder).st_uid not in (os.getuid(), 0):
        raise _not_private(folder, os.lstat(folder))  # its owner may let it lead elsewhere at any time
    check_private(resolved)
    for parent in resolved.parents:
        check_parent(parent)
    return resolved


def _make(folder: Path) -> None:
    """Makes a folder and its missing parents, each for this user alone, whatever the umask."""
    for missing in reversed([path for path in (folder, *folder.parents) if not os.path.lexists(path)]):
        missing.mkdir(mode=PRIVATE, exist_ok=True)


def cache_subfolder(*names: str) -> Path:
    """A folder in the user's cache, made and checked like the cache itself. Raises as `make_private` does."""
    folder = user_cache()
    for name in names:
        folder = make_private(folder / name)
    return folder


def check_private(folder: Path) -> None:
    """NotPrivate unless a folder belongs to this user or root and nobody else may write to it."""
    status = folder.stat()
    if not stat.S_ISDIR(status.st_mode):
        raise NotADirectoryError(f"{folder} is no folder")
    if status.st_uid not in (os.getuid(), 0) or _others_may_write(status):
        raise _not_private(folder, status)


def check_parent(folder: Path) -> None:
    """NotPrivate if somebody else could rename what lies in a folder; a sticky one, such as /tmp, forbids that."""
    status = folder.stat()
    is_trusted = status.st_uid in (os.getuid(), 0)
    if not (is_trusted and (status.st_mode & stat.S_ISVTX or not _others_may_write(status))):
        raise _not_private(folder, status)


def _others_may_write(status: os.stat_result) -> bool:
    if status.st_mode & stat.S_IWOTH:
        return True
    return bool(status.st_mode & stat.S_IWGRP) and not _is_own_group(status.st_gid)


def _is_own_group(gid: int) -> bool:
    """Whether a group has this user as its only member, as where every user has a group of their own name."""
    import grp
    import pwd

    try:
        user, group = pwd.getpwuid(os.getuid()), grp.getgrgid(gid)
    except KeyError:
        return False
    return gid == user.pw_gid and group.gr_name == user.pw_name and set(group.gr_mem) <= {user.pw_name}


def _not_private(folder: Path, status: os.stat_result) -> NotPrivate:
    mode, user = stat.S_IMODE(status.st_mode), os.getuid()
    return NotPrivate(
        f"{folder}: other users can write here (owner {status.st_uid}, mode {mode:o}, this is user "
        f"{user}); expected {_better(folder, status)}"
    )


def _better(folder: Path, status: os.stat_result) -> str:
    """What to use instead of a folder that others can write to. A shared one, such as /tmp, must stay open."""
    if status.st_mode & stat.S_ISVTX:
        return f"a folder of one's own, such as {folder / f'lockstep-{os.getuid()}'}"
    if status.st_uid not in (os.getuid(), 0):
        return "a folder of one's own"
    own = f", such as this one after `chmod go-w {folder}`" if status.st_uid == os.getuid() else ""
    return f"a folder that only its owner can write to{own}"


class CacheFolder(NamedTuple):
    """The cache folder of a process. lasts: whether later processes will find what is kept there."""

    path: Path
    lasts: bool = True


def user_cache() -> Path:
    """The user's cache folder for Lockstep, private to this user; LOCKSTEP_CACHE names another.

    Where the usual folder cannot be written or is not private, one in the folder for temporary files takes its place,
    and a warning says so; where neither can be used, one for this process only, or a path where nothing can be made. A
    folder that is there and cannot be written, such as one on a full disk, is read. Raises ValueError if LOCKSTEP_CACHE
    names a folder that cannot be made or is not private.
    """
    return _cache_folder().path


def cache_lasts() -> bool:
    """Whether later processes find what this one keeps in `user_cache`."""
    return _cache_folder().lasts


def _cache_folder() -> CacheFolder:
    named = os.environ.get(VARIABLE)
    return _named_folder(named) if named else usual_folder(os.environ.get("XDG_CACHE_HOME"), _home())


def _home() -> str:
    """The user's home folder; empty if neither HOME nor the user database names one."""
    import pwd

    with contextlib.suppress(KeyError):
        return os.environ.get("HOME") or pwd.getpwuid(os.getuid()).pw_dir
    return ""


@functools.cache
def _named_folder(named: str) -> CacheFolder:
    expanded = os.path.expanduser(named)
    if expanded.startswith("~"):
        raise ValueError(f"{VARIABLE} {named!r}: no such user, or a user without a home; expected a folder")
    try:
        return CacheFolder(make_private(Path(os.path.abspath(expanded))))
    except NotPrivate as error:
        raise ValueError(f"{VARIABLE}: {error}") from None
    except OSError as error:
        raise ValueError(
            f"{VARIABLE} {named!r}: cannot be made ({reason_of(error, Path(expanded))}); expected a folder that can "
            "hold compiled kernels and packed weights"
        ) from None


@functools.cache
def usual_folder(xdg: str | None, home: str) -> CacheFolder:
    """The cache folder where LOCKSTEP_CACHE names none. xdg: XDG_CACHE_HOME. home: the home folder; empty if none."""
    of_system = "Library/Caches" if sys.platform == "darwin" else ".cache"
    usual = [Path(xdg)] if xdg and os.path.isabs(xdg) else [Path(home) / of_system] if home else []
    temporary, unfit = temporary_folders(), dict[Path, str]()
    folders = [base.absolute() / "lockstep" for base in usual] + [t / f"lockstep-{os.getuid()}" for t in temporary]
    for folder in folders:
        try:
            private = make_private(folder)
            if (error := writing_error(private)) is None or error.errno in ONLY_READ:
                _say_stand_in(private, unfit)
                return CacheFolder(private)
        except (OSError, NotPrivate) as raised:
            error = raised
        unfit[folder] = reason_of(error, folder)
    return _folder_of_this_process(temporary, unfit)


def temporary_folders() -> list[Path]:
    """The system's folder for temporary files; none if it cannot be written. Python's last choice, the current folder,
    is not taken."""
    named = [os.environ[name] for name in ("TMPDIR", "TEMP", "TMP") if os.environ.get(name)]
    with contextlib.suppress(FileNotFoundError):
        found = tempfile.gettempdir()
        return [Path(found)] if found in map(os.path.abspath, (*named, *USUAL_TEMPORARY)) else []
    return []


def _folder_of_this_process(temporary: list[Path], unfit: dict[Path, str]) -> CacheFolder:
    warn_not_kept(
        "no folder",
        "Compiled kernels and packed weights cannot be kept, so each start makes them again: "
        f"{_listed(unfit) or 'there is no home folder'}. Set {VARIABLE} to a folder that you can write.",
    )
    for folder in temporary:
        with contextlib.suppress(OSError):
            return CacheFolder(process_folder(folder), lasts=False)
    return CacheFolder(NOWHERE, lasts=False)


def writing_error(folder: Path) -> OSError | None:
    """Why a folder cannot be written; None if it can."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as error:
        return error


def _say_stand_in(folder: Path, unfit: dict[Path, str]) -> None:
    if unfit:
        log.warning(
            f"{folder} takes the place of the cache folder, until the system clears it: {_listed(unfit)}. "
            f"{VARIABLE} names another folder."
        )


def _listed(unfit: dict[Path, str]) -> str:
    return "; ".join(why if why.startswith(str(folder)) else f"{folder}: {why}" for folder, why in unfit.items())


# ---------------------------------------------------------------- what cannot be kept


def obstacle_of(error: OSError, folder: Path, setting: str = VARIABLE) -> str:
    """In words: why a folder could not be written, and what helps. setting: what names the folder."""
    if error.errno in FULL:
        return f"{reason_of(error, folder)}. Free some space there, or set {setting} to a folder elsewhere."
    return f"{reason_of(error, folder)}. Set {setting} to a folder that can be written."


def reason_of(error: Exception, path: Path) -> str:
    """In words: why a file or folder could not be written, with the bytes that are free on a full disk."""
    if not isinstance(error, OSError) or not error.strerror:
        return str(error)
    free = free_bytes(path) if error.errno in FULL else None
    return error.strerror + ("" if free is None else f", {free / 1e6:,.1f} MB are free")


def free_bytes(folder: Path) -> int | None:
    """The bytes that are free on a folder's disk; None if the system does not say so. The folder need not exist."""
    with contextlib.suppress(OSError, StopIteration):
        return shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free
    return None


def has_room(folder: Path, num_bytes: int) -> bool:
    """Whether a folder can be written and so many bytes are free on its disk, as far as the system says."""
    free = free_bytes(folder)
    return (free is None or free >= num_bytes) and writing_error(folder) is None


@contextlib.contextmanager
def keeping(what: str, folder: Path) -> Iterator[None]:
    """A context that writes to a folder of the cache. An OSError becomes a warning, which comes once for each reason.

    what: begins the warning, and says how large it is, such as "compiled kernels (some MB)".
    """
    try:
        yield
    except OSError as error:
        if cache_lasts():  # otherwise this was said before
            warn_not_kept(
                (user_cache(), error.errno),
                f"{what} cannot be kept in {folder}, so each start makes them again: {obstacle_of(error, folder)}",
            )


def warn_not_kept(key: Hashable, text: str) -> None:
    """Warns that something cannot be kept, unless this process has warned with an equal key."""
    if key not in _warned():
        _warned().append(key)
        log.warning(text)


def is_all_kept() -> bool:
    """Whether no warning said so far that something cannot be kept."""
    return not _warned()


@functools.cache
def _warned() -> list[Hashable]:
    return []
