"""Linux. See `lockstep.native.system`."""

import contextlib
import ctypes
import math
import mmap
import os
import platform
from pathlib import Path, PurePath

from llvmlite import ir
from numba.core import cgutils

from lockstep.native.simd import I64
from lockstep.native.system.other import sleep_while_equal as look_again
from lockstep.native.targets import ISA

CLOCK = 1
WAIT, WAKE = 128, 129  # operations of a futex, of threads of one process


def sleep_while_equal(b, address, value):
    if ISA.FUTEX is None:
        look_again(b, address, value)
    else:
        _futex(b, address, WAIT, value)


def wake(b, address, num_threads):
    if ISA.FUTEX is not None:
        _futex(b, address, WAKE, num_threads)


def _futex(b, address, operation, value):
    zero, operation = ir.Constant(I64, 0), ir.Constant(I64, operation)
    syscall = cgutils.get_or_insert_function(b.module, ir.FunctionType(I64, [I64], var_arg=True), "syscall")
    b.call(syscall, [ir.Constant(I64, ISA.FUTEX), address, operation, value, zero, zero, zero])


CGROUPS, OWN_GROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def num_cores() -> int:
    """Those that the process may run on, but no more than it gets time of (docker's --cpus): a thread without time
    would be waited for at each barrier."""
    return max(1, int(min(len(os.sched_getaffinity(0)), *_quotas())))


def _quotas() -> list[float]:
    """Of how many cores the process's control groups get the time; infinity is among them."""
    found = [math.inf]
    for folder in _control_groups():
        with contextlib.suppress(OSError, ValueError):  # ValueError: "max" is no number
            quota, period = map(int, (folder / "cpu.max").read_text().split())
            found.append(quota / max(period, 1))
        with contextlib.suppress(OSError, ValueError):  # version 1, where -1 is no limit
            quota, period = (int((folder / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
            found += [quota / max(period, 1)] if quota > 0 else []
    return found


def _control_groups() -> list[Path]:
    """Folders of the control groups that share out cores, of version 2 and 1: the process's own and those around it."""
    folders = []
    with contextlib.suppress(OSError):
        for line in OWN_GROUPS.read_text(errors="surrogateescape").split("\n"):
            _, controllers, path = line.split(":", 2) if line.count(":") > 1 else ("", "none", "")
            if not controllers or "cpu" in controllers.split(","):
                inner = PurePath(path.lstrip("/"))
                folders += [CGROUPS / ("cpu" if controllers else "") / part for part in (inner, *inner.parents)]
    return folders


def prefer_fast_cores() -> None:
    """Linux moves threads that compute to fast cores by itself."""


# ------------------------------------------------------------ NUMA, see mbind(2) and set_mempolicy(2)

NODES = Path("/sys/devices/system/node/has_memory")
INTERLEAVE, MOVE = 3, 2  # the policy MPOL_INTERLEAVE, the flag MPOL_MF_MOVE
NUMBERS = {"x86_64": {"mbind": 237, "set_mempolicy": 238}, "aarch64": {"mbind": 235, "set_mempolicy": 237}}
WORD_BITS = 64  # of a mask of nodes


def memory_nodes() -> list[int]:
    try:
        ranges = [part.split("-") for part in NODES.read_text().strip().split(",")]
        return [node for first, *last in ranges for node in range(int(first), int((last or [first])[0]) + 1)]
    except (OSError, ValueError):  # a kernel without NUMA
        return []


def interleave_thread(nodes: list[int]) -> None:
    _call("set_mempolicy", INTERLEAVE, *_mask(nodes))


def interleave_pages(address: int, num_bytes: int, nodes: list[int]) -> None:
    """Whole pages only: those at both ends belong to others, too."""
    start = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
    size = (address + num_bytes) // mmap.PAGESIZE * mmap.PAGESIZE - start
    if size > 0:
        _call("mbind", start, size, INTERLEAVE, *_mask(nodes), MOVE)


def _mask(nodes: list[int]) -> tuple[ctypes.Array, int]:
    """A mask of nodes, and one more than its bits, as the kernel counts them."""
    mask = (ctypes.c_uint64 * (max(nodes) // WORD_BITS + 1))()
    for node in nodes:
        mask[node // WORD_BITS] |= 1 << node % WORD_BITS
    return mask, WORD_BITS * len(mask) + 1


def _call(name: str, *arguments: int | ctypes.Array) -> None:
    """A system call. OSError if it fails, as where a container forbids it."""
    number = NUMBERS.get(platform.machine(), {}).get(name)
    if number is None:
        raise OSError(f"{name} has no known number on {platform.machine()}")
    system = ctypes.CDLL(None, use_errno=True)
    # integers as long: ctypes would pass 32 bits of each
    if system.syscall(number, *(ctypes.c_long(a) if isinstance(a, int) else a for a in arguments)):
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")
