"""A model of how steps scale: the seconds of each op on more threads than this machine has cores, and what limits it.

An op takes as long as the longest share of a thread, and no less than memory takes to bring what it reads; activations
come from the cores that have written them; then threads meet. Cores count as equal and independent: the model knows
neither lower clocks of many busy cores nor two threads on one core, and nothing of a second socket but what one says of
its memory.
"""

from dataclasses import dataclass

from lockstep.lab.shares import Like, Machine, Measured
from lockstep.runtime.threads import GROUP

UNEVEN = 1.25  # longest share against an even one, from which on an op is said to have too few tasks
IN_CACHE = 1.5  # times the speed of memory, from which on an op reads from a cache

LIMITS = ("arithmetic", "memory", "tasks", "passing", "barrier")
PARTS = ("even", "tasks", "memory", "passing", "barrier")


@dataclass(frozen=True)
class OpTime:
    """Seconds of one of like ops on some threads, in PARTS: an even share, what too few tasks, memory and activations
    of other cores add to it, and the barrier behind it. limit: one of LIMITS."""

    like: Like
    even: float
    tasks: float
    memory: float
    passing: float
    barrier: float
    limit: str

    @property
    def seconds(self) -> float:
        """All of it."""
        return sum(getattr(self, part) for part in PARTS)


def bandwidth(here: Machine, num_threads: int, most: float | None) -> float:
    """Bytes that so many threads read in a second. most: of the machine that is asked about; None: of this one."""
    return min(num_threads * here.alone.bytes_per_second, most or here.together.bytes_per_second)


def arrivals(num_threads: int) -> int:
    """How many threads one after the other change a word before all have met."""
    return num_threads if num_threads <= GROUP else GROUP + -(-num_threads // GROUP)


def barrier(here: Machine, num_threads: int) -> float:
    """Seconds that so many threads take to meet."""
    return 0.0 if num_threads == 1 else here.barrier * arrivals(num_threads) / arrivals(max(2, here.num_threads))


def op_time(like: Like, num_threads: int, here: Machine, most: float | None = None) -> OpTime:
    """The time of an op. most: see `bandwidth`."""
    even, longest = like.alone / num_threads, like.longest[num_threads]
    from_cache = like.num_bytes > IN_CACHE * here.alone.bytes_per_second * like.alone
    memory = 0.0 if from_cache else like.num_bytes / bandwidth(here, num_threads, most)
    meeting = barrier(here, num_threads) * like.meets / like.count
    tasks, busy = max(0.0, longest - even), max(1, min(num_threads, like.tasks[num_threads]))
    passing = like.passed * here.passing * (1 - 1 / num_threads) / busy
    if max(meeting, passing) > max(longest, memory):
        limit = "barrier" if meeting > passing else "passing"
    elif memory >= longest:
        limit = "memory"
    else:
        limit = "tasks" if longest > UNEVEN * even else "arithmetic"
    return OpTime(like, even, tasks, max(0.0, memory - max(longest, even)), passing, meeting, limit)


def step_times(measured: Measured, num_threads: int, here: Machine, most: float | None = None) -> list[OpTime]:
    """The times of all ops of a step."""
    return [op_time(like, num_threads, here, most) for like in measured.ops]


def total(times: list[OpTime], part: str = "seconds") -> float:
    """Seconds of a step; part: or of one part of its ops' times."""
    return sum(time.like.count * getattr(time, part) for time in times)
