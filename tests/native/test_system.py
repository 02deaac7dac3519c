"""What is asked of macOS, by a library that stands for its own; and systems on which nothing runs."""

import ast
import ctypes
import os
import pathlib
import runpy
import subprocess
import sys
import threading
import time

import llvmlite.binding as llvm
import numpy as np
import pytest
from llvmlite import ir
from numba import types

import lockstep
from lockstep.native import host, system
from lockstep.native.kernel import native
from lockstep.native.simd import I64, emitted
from lockstep.native.system import darwin, linux, other
from tests.native.assembly import assembled, initialize

PACKAGE = pathlib.Path(lockstep.__file__).parent
asleep = emitted(types.void(types.int64, types.int64))(darwin.sleep_while_equal)
awake = emitted(types.void(types.int64, types.int64))(darwin.wake)


@native
def sleep(address, value):
    asleep(address, value)


@native
def wake(address):
    awake(address, 1)


class Waits:
    """__ulock_wait and __ulock_wake as macOS has them, for 32 bits."""

    def __init__(self):
        self.changed, self.asleep, self.operations = threading.Condition(), 0, []
        waits = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_uint32, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32)
        wakes = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_uint32, ctypes.c_void_p, ctypes.c_uint64)
        self.kept = waits(self.wait), wakes(self.wake)
        for name, function in zip(("__ulock_wait", "__ulock_wake"), self.kept, strict=True):
            llvm.add_symbol(name, ctypes.cast(function, ctypes.c_void_p).value)

    def wait(self, operation, address, value, timeout):
        self.operations.append(operation)
        assert timeout == 0, "microseconds; 0: for ever"
        with self.changed:
            while ctypes.c_uint32.from_address(address).value == value:
                self.asleep += 1
                self.changed.wait()
                self.asleep -= 1
        return 0

    def wake(self, operation, address, value):
        self.operations.append(operation)
        with self.changed:
            self.changed.notify_all()
        return 0


def test_a_thread_sleeps_on_macos_until_it_is_woken():
    waits, word = Waits(), np.zeros(1, np.int64)
    sleep(word.ctypes.data, 7)  # another value: it does not sleep
    thread = threading.Thread(target=sleep, args=(word.ctypes.data, 0))
    thread.start()
    while not waits.asleep:
        time.sleep(0.001)
    wake(word.ctypes.data)
    assert thread.is_alive()
    word[0] = 1
    while thread.is_alive():
        wake(word.ctypes.data)
    # UL_COMPARE_AND_WAIT, ULF_WAKE_ALL, ULF_NO_ERRNO of XNU's ulock.h
    assert set(waits.operations) == {1 | 0x01000000, 1 | 0x100 | 0x01000000}


class Library:
    """Functions of macOS's libSystem. cores: the performance cores; None: a Mac whose cores are all alike."""

    def __init__(self, cores):
        self.cores, self.asked = cores, []

    def sysctlbyname(self, name, value, size, new, new_size):
        number, num_bytes = (ctypes.cast(place, ctypes.POINTER(ctypes.c_int32)) for place in (value, size))
        assert (name, num_bytes[0], new, new_size) == (b"hw.perflevel0.logicalcpu", 4, None, 0)
        number[0] = self.cores or 0
        return -1 if self.cores is None else 0

    def pthread_set_qos_class_self_np(self, quality, priority):
        self.asked.append((quality, priority))


@pytest.mark.parametrize("cores, expected", [(4, 4), (None, 10)])
def test_threads_on_macos_are_performance_cores(cores, expected, monkeypatch):
    library = Library(cores)
    monkeypatch.setattr(darwin.ctypes, "CDLL", lambda name: library)
    monkeypatch.setattr(darwin.os, "cpu_count", lambda: 10)
    monkeypatch.setattr(system, "SYSTEM", darwin)
    assert host.num_cores() == expected
    darwin.prefer_fast_cores()
    assert library.asked == [(0x19, 0)]  # QOS_CLASS_USER_INITIATED


@pytest.mark.parametrize("module", [darwin, linux, other])
def test_a_system_has_all_names(module):
    for name in "CLOCK sleep_while_equal wake num_cores prefer_fast_cores".split():
        assert hasattr(module, name)


@pytest.mark.parametrize(
    "name, release, reason",
    [
        ("linux", "", None),
        ("darwin", "12.0.1", None),
        ("darwin", "11.7.10", "Lockstep needs macOS 12 or newer, as Numba and LLVM do; this is macOS 11.7.10"),
        ("win32", "", "Lockstep runs on Linux and macOS; on Windows it runs in WSL 2, which is Linux: wsl --install"),
    ],
)
def test_systems_on_which_nothing_runs_are_told(name, release, reason):
    assert lockstep.unfit_system(name, release) == reason


def test_windows_is_told_before_anything_is_imported():
    code = "import sys; sys.platform = 'win32'; import lockstep"
    found = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, check=False)
    assert found.returncode == 1 and "ImportError: Lockstep runs on Linux and macOS;" in found.stderr


def test_a_team_has_at_most_one_thread_for_each_core(monkeypatch):
    monkeypatch.setattr(system.SYSTEM, "num_cores", lambda: 6)
    assert [host.team_size(asked) for asked in (None, 1, 6, 16)] == [6, 1, 6, 6]


V1 = "cpu/cpu.cfs_{}_us"


@pytest.mark.parametrize(
    "groups, files, expected",
    [
        ("0::/", {"cpu.max": "250000 100000"}, 2),
        ("0::/", {"cpu.max": "max 100000"}, 8),
        ("0::/a/b", {"a/b/cpu.max": "max 100000", "a/cpu.max": "50000 100000"}, 1),
        ("3:cpuset:/x\n2:cpu,cpuacct:/docker/1", {V1.format("quota"): "300000", V1.format("period"): "100000"}, 3),
        ("2:cpu:/", {V1.format("quota"): "-1", V1.format("period"): "100000"}, 8),
        ("0::/", {"cpu.max": "1600000 100000"}, 8),
        ("no group\n0::/a\u2028b", {"a\u2028b/cpu.max": "200000 100000", "cpu.max": "100000 0"}, 2),
        ("0::/", {}, 8),
    ],
)
def test_cores_that_a_control_group_gets_no_time_of_do_not_count(groups, files, expected, tmp_path, monkeypatch):
    for name, text in {"own": groups, **files}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    monkeypatch.setattr(linux, "CGROUPS", tmp_path)
    monkeypatch.setattr(linux, "OWN_GROUPS", tmp_path / "own")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert linux.num_cores() == expected


def test_pip_is_told_before_it_looks_for_numba(monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.delitem(sys.modules, "lockstep")
    monkeypatch.setattr(sys, "path", [*sys.path])
    with pytest.raises(ImportError, match="on Windows it runs in WSL 2"):
        runpy.run_path(str(PACKAGE.parent / "setup.py"))


def test_sleep_on_macos_is_assembled_for_arm():
    function = ir.Function(ir.Module(), ir.FunctionType(ir.VoidType(), [I64, I64]), "f")
    b = ir.IRBuilder(function.append_basic_block())
    darwin.sleep_while_equal(b, *function.args)
    darwin.wake(b, *function.args)
    b.ret_void()
    initialize()
    found = assembled(str(b.module), "apple-m1")[1]
    assert found["bl"] + found["b"] == 2  # the last call is a jump


def test_the_system_is_asked_only_what_macos_knows():
    """SC_PAGE_SIZE is Linux's other name for SC_PAGESIZE, and a ValueError on macOS."""
    calls = (node for path in PACKAGE.rglob("*.py") for node in ast.walk(ast.parse(path.read_text())))
    asked = {ast.unparse(n.args[0]) for n in calls if isinstance(n, ast.Call) and ast.unparse(n.func) == "os.sysconf"}
    assert asked == {"'SC_PHYS_PAGES'", "'SC_PAGESIZE'"} and "SC_PAGESIZE" in os.sysconf_names
