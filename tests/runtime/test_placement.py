"""Memory of several nodes: which nodes there are, what the system is asked for, and what it says of this memory."""

import ctypes
import mmap
import re
import sys

import numpy as np
import pytest

from lockstep.native.system import darwin, linux, other
from lockstep.runtime import placement

IS_LINUX = sys.platform.startswith("linux")


@pytest.mark.parametrize(
    ("text", "nodes"), [("0\n", [0]), ("0-1,3\n", [0, 1, 3]), ("0-64\n", list(range(65))), ("\n", [])]
)
def test_nodes_are_read(tmp_path, monkeypatch, text, nodes):
    (tmp_path / "has_memory").write_text(text)
    monkeypatch.setattr(linux, "NODES", tmp_path / "has_memory")
    assert linux.memory_nodes() == nodes


def test_systems_without_nodes():
    assert other.memory_nodes() == darwin.memory_nodes() == []
    for call in (other.interleave_thread, darwin.interleave_thread):
        with pytest.raises(OSError, match="does not say"):
            call([0, 1])


@pytest.fixture
def asked(monkeypatch):
    """The system calls that are made, with masks as numbers; none is made."""
    calls = []
    number = lambda a: sum(word << 64 * i for i, word in enumerate(a)) if isinstance(a, ctypes.Array) else a
    monkeypatch.setattr(linux, "_call", lambda name, *arguments: calls.append((name, *map(number, arguments))))
    monkeypatch.setattr(placement, "SYSTEM", linux)
    return calls


def test_what_the_system_is_asked_for(asked, monkeypatch):
    monkeypatch.setattr(linux, "memory_nodes", lambda: [0, 1, 64])
    nodes = placement.begin("interleave")
    mask, page = 1 << 64 | 0b11, mmap.PAGESIZE
    assert asked == [("set_mempolicy", 3, mask, 129)]
    memory = np.zeros(4 * page, np.uint8)
    start = -memory.ctypes.data % page
    placement.spread([memory[start + 5 : start + 3 * page - 1], memory[:9]], nodes)
    assert asked[1:] == [("mbind", memory.ctypes.data + start + page, page, 3, mask, 129, 2)]


def test_one_node_is_said_and_nothing_is_done(asked, monkeypatch, caplog):
    monkeypatch.setattr(linux, "memory_nodes", lambda: [0])
    assert placement.begin("interleave") == [] and "one node" in caplog.text
    placement.spread([np.zeros(1 << 16, np.uint8)], [])
    assert placement.begin("off") == [] and asked == []


def test_what_cannot_be_done_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="expected off or interleave, got 'copy'"):
        placement.begin("copy")
    monkeypatch.setattr(placement, "SYSTEM", other)
    with pytest.raises(ValueError, match="needs Linux with NUMA"):
        placement.begin("interleave")
    monkeypatch.setattr(placement, "SYSTEM", linux)
    monkeypatch.setattr(linux, "memory_nodes", lambda: [0, 1])
    monkeypatch.setattr(linux, "NUMBERS", {})
    with pytest.raises(
        ValueError, match="does not let this process place its memory: set_mempolicy has no known number"
    ):
        placement.begin("interleave")


@pytest.mark.skipif(not IS_LINUX or len(linux.memory_nodes()) == 0, reason="needs Linux with NUMA")
def test_the_kernel_takes_the_policy():
    """One node is enough to see that the call is the right one: /proc says how a piece of memory is placed."""
    memory = np.ones(1 << 20, np.uint8)
    address, size = memory.ctypes.data + -memory.ctypes.data % mmap.PAGESIZE, 8 * mmap.PAGESIZE
    try:
        linux.interleave_pages(address, size, linux.memory_nodes()[:1])
    except PermissionError as error:
        pytest.skip(str(error))  # a container may forbid the call; any other error is the call's
    with open("/proc/self/numa_maps") as maps:
        [line] = [line for line in maps if int(line.split()[0], 16) == address]
    assert re.search(r"interleave.* anon=8 .*N\d+=8", line), line
