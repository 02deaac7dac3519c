"""Systems that nothing is known about: threads that sleep look again every 50 us. See `lockstep.native.system`."""

import os

from llvmlite import ir

from lockstep.native.simd import I32, call

CLOCK = 4  # of FreeBSD


def sleep_while_equal(b, address, value):
    call(b, "usleep", I32, [ir.Constant(I32, 50)])


def wake(b, address, num_threads):
    pass


def num_cores() -> int:
    return os.cpu_count() or 1


def prefer_fast_cores() -> None:
    pass


def memory_nodes() -> list[int]:
    return []


def interleave_thread(nodes: list[int]) -> None:
    raise OSError("this system does not say how memory is placed")


def interleave_pages(address: int, num_bytes: int, nodes: list[int]) -> None:
    interleave_thread(nodes)
