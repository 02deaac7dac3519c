"""Files of compiled code that were damaged are compiled again: no error, and no damaged code runs."""

import errno
import functools
import importlib
import os
import subprocess
import sys

import pytest

from lockstep import user_cache
from lockstep.native import kernel
from lockstep.native.kernel_files import CheckedFiles

DAMAGES = {
    "cut off": lambda raw: raw[: len(raw) // 2],
    "empty": lambda raw: b"",
    "another byte": lambda raw: raw[: len(raw) // 2] + bytes([raw[len(raw) // 2] ^ 1]) + raw[len(raw) // 2 + 1 :],
    "zeros": lambda raw: bytes(len(raw)),
}
COMPILED = """
from lockstep.ops import BACKENDS
assert BACKENDS["cpu"]["add"].kernel.address
"""


def damage(folder, endings, damage_name):
    paths = [path for path in folder.rglob("*") if path.name.endswith(endings)]
    assert paths
    for path in paths:
        path.write_bytes(DAMAGES[damage_name](path.read_bytes()))


@pytest.mark.parametrize("damage_name", DAMAGES)
@pytest.mark.parametrize("endings", [(".nbi",), (".nbc",), (".nbi", ".nbc")], ids="".join)
def test_a_damaged_entry_is_not_loaded_and_can_be_saved_again(endings, damage_name, tmp_path):
    files = CheckedFiles(str(tmp_path), "kernel", "stamp")
    files.save("key", {"code": bytes(range(256)) * 20})
    assert files.load("key") == {"code": bytes(range(256)) * 20} and files.load("other") is None
    damage(tmp_path, endings, damage_name)
    assert files.load("key") is None
    files.save("key", {"code": b"again"})
    assert files.load("key") == {"code": b"again"}


def saved(folder, name="kernel", **entries):
    files = CheckedFiles(str(folder), name, "stamp")
    folder.mkdir(exist_ok=True)
    for key, data in entries.items():
        files.save(key, data)
    return files


@pytest.mark.parametrize("ending", ["nbi", "1.nbc"])
def test_files_of_another_kernel_are_not_loaded(ending, tmp_path):
    files = saved(tmp_path / "sources", key="code")
    saved(tmp_path / "sources", "other", key="another's"), saved(tmp_path / "changed", key="of other sources")
    for other in ("sources/other", "changed/kernel"):
        files.save("key", "code")
        (tmp_path / f"sources/kernel.{ending}").write_bytes((tmp_path / f"{other}.{ending}").read_bytes())
        assert files.load("key") is None


def test_the_code_of_another_signature_is_not_loaded(tmp_path):
    files = saved(tmp_path, one=1, two=2)
    assert (files.load("one"), files.load("two")) == (1, 2)
    (tmp_path / "kernel.1.nbc").write_bytes((tmp_path / "kernel.2.nbc").read_bytes())
    assert files.load("one") is None


def test_no_bit_of_an_index_can_change(tmp_path):
    files = saved(tmp_path, one=1, two=2)
    whole = (tmp_path / "kernel.nbi").read_bytes()
    for at in range(len(whole)):
        (tmp_path / "kernel.nbi").write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        assert files.load("one") is None


def test_a_damaged_kernel_is_compiled_again(tmp_path):
    path = os.pathsep.join(p for p in sys.path if p)
    environment = {**os.environ, "LOCKSTEP_CACHE": str(tmp_path), "PYTHONPATH": path}
    for damage_name in (None, "cut off"):
        if damage_name:
            damage(tmp_path, (".nbi", ".nbc"), damage_name)
        done = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr[-2000:]


def test_a_kernel_that_cannot_be_kept_is_compiled_at_each_start_and_said_once(tmp_path):
    path = os.pathsep.join(p for p in sys.path if p)
    (tmp_path / "kernels").write_text("a file where the folder of kernels would be")
    environment = {**os.environ, "LOCKSTEP_CACHE": str(tmp_path), "PYTHONPATH": path}
    code = COMPILED + "print(BACKENDS['cpu']['add'].kernel._mark.exists())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and done.stdout == "False\n", done.stderr[-2000:]
    assert done.stderr.startswith("Compiled kernels (about 10 MB for a model) cannot be kept in ")
    assert "Not a directory. Set LOCKSTEP_CACHE" in done.stderr and done.stderr.count("\n") == 1


def test_an_entry_that_finds_no_room_is_no_error_and_can_be_saved_later(tmp_path, monkeypatch):
    monkeypatch.setattr(user_cache, "_warned", functools.cache(list))
    files = saved(tmp_path, one=1)
    with monkeypatch.context() as full:
        full.setattr(os, "replace", lambda *args: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
        files.save("two", 2)
        assert not files.is_kept and not user_cache.is_all_kept()
    assert files.load("one") == 1 and files.load("two") is None
    files.save("two", 2)
    assert files.is_kept and files.load("two") == 2 and len(os.listdir(tmp_path)) == 3


def test_where_files_are_kept_compiles_nothing_again():
    sources = {path.name for path in kernel.imported_sources("lockstep.native.kernel")}
    assert "kernel_files.py" in sources and not {"user_cache.py", "new_files.py"} & sources


def test_kernels_of_a_script_depend_on_what_it_imports(tmp_path, monkeypatch):
    path = tmp_path / "far_away_kernels.py"
    path.write_text("from lockstep.runtime.step import OPERANDS\n")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module("far_away_kernels")
    found = kernel.imported_sources("far_away_kernels")
    assert {path, kernel.PACKAGE / "runtime" / "step.py"} <= found
    assert not kernel.imported_sources("no_such_module")


def test_kernels_depend_on_packages_and_on_what_these_import(tmp_path, monkeypatch):
    path = tmp_path / "far_away_formats.py"
    path.write_text("from lockstep.formats import BLOCK_FORMATS\n")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module("far_away_formats")
    folder = kernel.PACKAGE / "formats"
    assert {folder / "__init__.py", folder / "q4_0.py", folder / "parts" / "blocks.py"} <= kernel.imported_sources(
        "far_away_formats"
    )
