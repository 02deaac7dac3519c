"""What depends on the operating system, and on nothing else: one module for each, with the same names.

    CLOCK                                number of the monotonic clock
    sleep_while_equal(b, address, value) sleeps while the int32 at an address has this value; may return early
    wake(b, address, num_threads)        wakes up to so many threads that sleep on an address
    num_cores()                          cores that this process may compute on; of cores that differ, the fast ones
    prefer_fast_cores()                  asks the system to run the calling thread on those
    memory_nodes()                       numbers of the NUMA nodes that have memory; none where the system does not tell
    interleave_thread(nodes)             spreads what the calling thread, and those it starts, touch first over nodes
    interleave_pages(address, n, nodes)  spreads the pages of n bytes over nodes, moving those that are elsewhere

`b` is the LLVM builder. Windows has none: `lockstep/__init__.py` says so.
"""

import sys

from lockstep.native.system import darwin, linux, other

SYSTEMS = {"darwin": darwin, "linux": linux}
SYSTEM = SYSTEMS.get(sys.platform, other)
