"""Where weights lie in machines whose memory has several nodes (NUMA), each near some of the cores.

Memory belongs to the node whose core touched it first: weights that one thread has packed or read lie on one node, and
all other nodes' threads wait for that one's memory. Threads claim panels of weights as they come, so no node knows
beforehand which it will read: pages of weights are dealt to all nodes in turn, and all memories work at once.
"""

import logging
from collections.abc import Iterable

import numpy as np

from lockstep.native.system import SYSTEM

log = logging.getLogger("lockstep.numa")
OFF, INTERLEAVE = "off", "interleave"
CHOICES = (OFF, INTERLEAVE)


def nodes_for(choice: str) -> list[int]:
    """The nodes over which memory is to be spread; none if it is to stay where it is, as on a machine of one node,
    which is logged. ValueError for another choice, or where the system cannot place memory."""
    if choice not in CHOICES:
        raise ValueError(f"numa: expected {' or '.join(CHOICES)}, got {choice!r:.80}")
    if choice == OFF:
        return []
    nodes = SYSTEM.memory_nodes()
    if not nodes:
        raise ValueError(f"numa: {choice} needs Linux with NUMA: this system does not tell of nodes of memory")
    if len(nodes) == 1:
        log.warning("numa: this machine's memory has one node: there is nothing to interleave")
        return []
    return nodes


def begin(choice: str) -> list[int]:
    """From now on, what the calling thread and threads that it starts touch first is spread over nodes: what is packed,
    the KV cache, activations. Returns `nodes_for(choice)`. ValueError where the system refuses."""
    if nodes := nodes_for(choice):
        _placed(SYSTEM.interleave_thread, nodes)
    return nodes


def spread(arrays: Iterable[np.ndarray], nodes: list[int]) -> None:
    """Spreads arrays over nodes, even pages of files that an earlier process has read; those that another process uses,
    too, stay where they are. ValueError where the system refuses."""
    for array in arrays if nodes else ():
        _placed(SYSTEM.interleave_pages, array.ctypes.data, array.nbytes, nodes)


def _placed(place, *arguments) -> None:
    try:
        place(*arguments)
    except OSError as error:
        raise ValueError(f"numa: the system does not let this process place its memory: {error}") from None
