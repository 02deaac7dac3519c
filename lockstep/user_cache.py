"""The user's cache folder, and who may write to it.

Compiled kernels are machine code behind pickles, packed weights decide answers: whoever can write to their folder can
run code or change answers. So a cache folder is used only if it belongs to this user (or to root), nobody else may
write to it, and nobody else can put another folder in its place.
"""

import atexit
import contextlib
import functools
import os
import shutil
import stat
import tempfile
from pathlib import Path

VARIABLE = "LOCKSTEP_CACHE"
PRIVATE = 0o700


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
    own = f", such as this one after `chmod go-w {folder}`" if status.st_uid == os.getuid() else ""
    return f"a folder that only its owner can write to{own}"


def user_cache() -> Path:
    """The user's cache folder for Lockstep, private to this user; LOCKSTEP_CACHE names another.

    Where the usual folder cannot be written or is not private, one in the temporary directory takes its place.
    Raises ValueError if LOCKSTEP_CACHE names a folder that cannot be written or is not private.
    """
    named = os.environ.get(VARIABLE)
    return _named_folder(named) if named else _usual_folder(os.environ.get("XDG_CACHE_HOME"), _home())


def _home() -> str:
    """The user's home folder; empty if neither HOME nor the user database names one."""
    import pwd

    with contextlib.suppress(KeyError):
        return os.environ.get("HOME") or pwd.getpwuid(os.getuid()).pw_dir
    return ""


@functools.cache
def _named_folder(named: str) -> Path:
    try:
        return _writable(Path(os.path.abspath(os.path.expanduser(named))))
    except NotPrivate as error:
        raise ValueError(f"{VARIABLE}: {error}") from None
    except OSError as error:
        raise ValueError(
            f"{VARIABLE} {named!r}: cannot be written ({error.strerror or error}); expected a folder that "
            "can hold compiled kernels"
        ) from None


@functools.cache
def _usual_folder(xdg: str | None, home: str) -> Path:
    usual = [Path(xdg)] if xdg and os.path.isabs(xdg) else [Path(home) / ".cache"] if home else []
    for folder in (*(base / "lockstep" for base in usual), Path(tempfile.gettempdir()) / f"lockstep-{os.getuid()}"):
        with contextlib.suppress(OSError, NotPrivate):
            return _writable(folder.absolute())
    folder = Path(tempfile.mkdtemp(prefix="lockstep-"))  # neither can be used: one for this process only
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _writable(folder: Path) -> Path:
    """`make_private`, and OSError if the folder cannot be written."""
    private = make_private(folder)
    with tempfile.TemporaryFile(dir=private):
        return private
