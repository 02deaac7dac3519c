"""Who may write to the cache folder: only this user. Its files are machine code behind pickles, and weights."""

import errno
import functools
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from lockstep import user_cache
from lockstep.native import kernel

SHOW = "from lockstep.user_cache import user_cache; print(user_cache())"


def cache_of_process(**environment):
    """The cache folder that another process uses, and its error output."""
    names = {k: v for k, v in os.environ.items() if k not in ("LOCKSTEP_CACHE", "XDG_CACHE_HOME", "HOME", "TMPDIR")}
    done = subprocess.run([sys.executable, "-c", SHOW], capture_output=True, text=True, env={**names, **environment})
    return done.stdout.strip(), done.stderr


def mode(path):
    return stat.S_IMODE(os.stat(path).st_mode)


def test_the_usual_folder_is_made_for_its_owner_alone(tmp_path):
    folder, _ = cache_of_process(HOME=str(tmp_path))
    assert folder == str(tmp_path / ".cache" / "lockstep") and mode(folder) == 0o700
    assert cache_of_process(XDG_CACHE_HOME=str(tmp_path / "x"))[0] == str(tmp_path / "x" / "lockstep")


@pytest.mark.parametrize("home", ["no home", "a file", "open to others", "in a folder open to others"])
def test_a_private_temporary_folder_stands_in_for_an_unusable_home(home, tmp_path):
    where, temporary = tmp_path / "home", tmp_path / "tmp"
    temporary.mkdir()
    (where / ".cache").mkdir(parents=True)
    environment = dict(HOME=str(where), TMPDIR=str(temporary))
    if home == "no home":
        environment["HOME"] = "/nonexistent/of/nobody" if os.getuid() else "/proc/nobody"
    elif home == "a file":
        (where / ".cache" / "lockstep").write_text("")
    elif home == "open to others":
        (where / ".cache" / "lockstep").mkdir()
        (where / ".cache" / "lockstep").chmod(0o777)
    else:
        where.chmod(0o777)
    folder, error = cache_of_process(**environment)
    assert folder == str(temporary / f"lockstep-{os.getuid()}") and mode(folder) == 0o700, error
    assert error.startswith(
        f"{folder} takes the place of the cache folder, until the system clears it: {environment['HOME']}"
    )
    assert error.endswith(". LOCKSTEP_CACHE names another folder.\n") and error.count("\n") == 1, "said once"


def test_a_folder_that_somebody_else_made_in_the_temporary_directory_is_not_used(tmp_path):
    planted = tmp_path / f"lockstep-{os.getuid()}"
    planted.mkdir()
    planted.chmod(0o777)
    folder, error = cache_of_process(HOME="/proc/nobody", TMPDIR=str(tmp_path))
    assert Path(folder).parent == tmp_path and folder != str(planted)
    assert not Path(folder).exists(), "one for that process only"
    assert error.startswith("Compiled kernels and packed weights cannot be kept, so each start makes them again: ")
    assert "/proc/nobody" in error and f"{planted}: other users can write here" in error
    assert error.endswith("Set LOCKSTEP_CACHE to a folder that you can write.\n") and error.count("\n") == 1


def unwritable(folder):
    raise PermissionError(errno.EACCES, "Permission denied", str(folder))


def test_without_any_folder_there_is_one_warning_and_a_path_where_nothing_can_be_kept(monkeypatch, caplog):
    monkeypatch.setattr(user_cache, "make_private", unwritable)
    monkeypatch.setattr(user_cache, "temporary_folders", lambda: [])
    monkeypatch.setattr(user_cache, "_warned", functools.cache(list))
    found = user_cache.usual_folder.__wrapped__(None, "/home/somebody")
    assert not found.lasts and not user_cache.is_all_kept()
    with pytest.raises(NotADirectoryError):
        found.path.mkdir()
    [record] = caplog.records
    assert "/home/somebody/.cache/lockstep: Permission denied. Set LOCKSTEP_CACHE" in record.message


def test_macos_keeps_caches_in_the_library(monkeypatch, tmp_path):
    monkeypatch.setattr(user_cache.sys, "platform", "darwin")
    found = user_cache.usual_folder.__wrapped__(None, str(tmp_path))
    named = user_cache.usual_folder.__wrapped__(str(tmp_path / "xdg"), str(tmp_path))
    assert (found.path, named.path) == (tmp_path / "Library/Caches/lockstep", tmp_path / "xdg/lockstep")


def test_pythons_last_choice_for_temporary_files_is_not_taken(monkeypatch, tmp_path):
    monkeypatch.setattr(user_cache.tempfile, "gettempdir", lambda: str(tmp_path))
    assert user_cache.temporary_folders() == []
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    assert user_cache.temporary_folders() == [tmp_path]
    monkeypatch.setattr(user_cache.tempfile, "gettempdir", functools.partial(open, "/nonexistent"))
    assert user_cache.temporary_folders() == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES])
def test_a_home_on_a_full_or_read_only_disk_is_still_read(code, monkeypatch, tmp_path):
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr(user_cache.tempfile, "gettempdir", lambda: str(tmp_path / "tmp"))
    home = tmp_path / "home" / ".cache" / "lockstep"
    monkeypatch.setattr(user_cache, "writing_error", lambda folder: OSError(code, "") if folder == home else None)
    found = user_cache.usual_folder.__wrapped__(None, str(tmp_path / "home"))
    elsewhere = tmp_path / "tmp" / f"lockstep-{os.getuid()}"
    assert found == (elsewhere if code == errno.EACCES else home, True)


def test_what_cannot_be_kept_is_said_once_for_each_reason(monkeypatch, caplog, tmp_path):
    monkeypatch.setattr(user_cache, "_warned", functools.cache(list))
    monkeypatch.setenv("LOCKSTEP_CACHE", str(tmp_path))
    monkeypatch.setattr(user_cache.shutil, "disk_usage", lambda path: SimpleNamespace(free=1_230_000))
    for what in ("Hashes", "Kernels"):
        with user_cache.keeping(what, tmp_path / "x" / "y"):
            assert user_cache.is_all_kept() == (what == "Hashes")
            raise OSError(errno.ENOSPC, "No space left on device")
    with user_cache.keeping("Kernels", tmp_path):
        raise OSError(errno.EROFS, "Read-only file system")
    assert [record.message for record in caplog.records] == [
        f"Hashes cannot be kept in {tmp_path}/x/y, so each start makes them again: No space left on device, 1.2 MB are "
        "free. Free some space there, or set LOCKSTEP_CACHE to a folder elsewhere.",
        f"Kernels cannot be kept in {tmp_path}, so each start makes them again: Read-only file system. Set "
        "LOCKSTEP_CACHE to a folder that can be written.",
    ]


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder away")
def test_a_folder_of_another_user_is_refused(tmp_path):
    folder = tmp_path / "cache"
    folder.mkdir(mode=0o700)
    os.chown(folder, 12345, 12345)
    with pytest.raises(user_cache.NotPrivate, match=r"owner 12345, mode 700.* a folder of one's own$"):
        user_cache.make_private(folder)
    with pytest.raises(user_cache.NotPrivate, match="owner 12345"):
        user_cache.make_private(folder / "below")


def test_a_folder_named_by_the_user_that_others_can_write_to_is_an_error(tmp_path):
    tmp_path.chmod(0o777)
    _, error = cache_of_process(LOCKSTEP_CACHE=str(tmp_path))
    assert f"ValueError: LOCKSTEP_CACHE: {tmp_path.resolve()}: other users can write here" in error
    _, error = cache_of_process(LOCKSTEP_CACHE="/proc/nowhere")
    assert "ValueError: LOCKSTEP_CACHE '/proc/nowhere': cannot be made (" in error
    _, error = cache_of_process(LOCKSTEP_CACHE="~nobody of that name/x")
    assert "ValueError: LOCKSTEP_CACHE '~nobody of that name/x': no such user" in error


def test_a_shared_folder_is_not_to_be_closed_to_others(tmp_path):
    tmp_path.chmod(0o1777)
    with pytest.raises(user_cache.NotPrivate, match=f"a folder of one's own, such as .*lockstep-{os.getuid()}"):
        user_cache.make_private(tmp_path)
    tmp_path.chmod(0o777)
    with pytest.raises(user_cache.NotPrivate, match="such as this one after `chmod go-w"):
        user_cache.make_private(tmp_path)


def test_a_sticky_folder_of_roots_may_lie_above():
    user_cache.check_parent(Path("/tmp"))


def test_a_link_is_checked_as_its_target(tmp_path):
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    (tmp_path / "link").symlink_to(tmp_path / "open")
    with pytest.raises(user_cache.NotPrivate, match="open: other users can write"):
        user_cache.make_private(tmp_path / "link")


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a link away")
def test_a_link_of_another_user_is_refused(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path)
    os.chown(tmp_path / "link", 12345, 12345, follow_symlinks=False)
    with pytest.raises(user_cache.NotPrivate, match=r"link: other users can write here \(owner 12345"):
        user_cache.make_private(tmp_path / "link")


def test_the_folder_that_was_checked_is_the_one_that_is_used(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    assert user_cache.make_private(tmp_path / "link" / "new") == tmp_path / "folder" / "new"
    assert cache_of_process(LOCKSTEP_CACHE=str(tmp_path / "link"))[0] == str(tmp_path / "folder")


def test_folders_inside_are_made_private_whatever_the_umask_and_checked(tmp_path, monkeypatch):
    monkeypatch.setenv("LOCKSTEP_CACHE", str(tmp_path / "a" / "b"))
    before = os.umask(0)
    try:
        subfolder = user_cache.cache_subfolder("kernels", "x")
    finally:
        os.umask(before)
    assert [mode(folder) for folder in (subfolder, *subfolder.parents[:3])] == [0o700] * 4
    subfolder.parent.chmod(0o777)
    with pytest.raises(ValueError, match="kernels: other users can write here"):
        user_cache.cache_subfolder("kernels")


def test_odd_environments_never_put_the_cache_into_the_current_folder(tmp_path):
    assert cache_of_process(XDG_CACHE_HOME="relative", HOME=str(tmp_path))[0] == str(tmp_path / ".cache" / "lockstep")
    assert cache_of_process(LOCKSTEP_CACHE="~/x", HOME=str(tmp_path))[0] == str(tmp_path / "x")


# ---------------------------------------------------------------- another environment of the same sources

COMPILED = """
from lockstep.ops import BACKENDS
kernel = BACKENDS["cpu"]["add"].kernel
assert kernel.compile(lambda name: print("compiled", name)).address == kernel.address != 0
print(kernel.function.__code__.co_filename)
"""


def compiled(package, cache):
    done = subprocess.run(
        [sys.executable, "-c", COMPILED],
        capture_output=True,
        text=True,
        check=True,
        cwd=package,
        env={**os.environ, "PYTHONPATH": str(package), "LOCKSTEP_CACHE": str(cache)},
    )
    return done.stdout.splitlines()


def test_a_copy_of_the_sources_elsewhere_with_other_times_compiles_nothing_again(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    for package, when in ((first, 1_600_000_000), (second, 1_700_000_000)):
        shutil.copytree(kernel.PACKAGE, package / "lockstep", ignore=shutil.ignore_patterns("bundled", "__pycache__"))
        for path in (package / "lockstep").rglob("*.py"):
            os.utime(path, (when, when))
    assert compiled(first, tmp_path / "cache") == ["compiled add", str(first / "lockstep/ops/elementwise/add_cpu.py")]
    assert compiled(second, tmp_path / "cache") == [str(second / "lockstep/ops/elementwise/add_cpu.py")]
    changed = second / "lockstep" / "ops" / "elementwise" / "add_cpu.py"
    changed.write_text(changed.read_text() + "\n# another source\n")
    assert compiled(second, tmp_path / "cache")[0] == "compiled add"
