"""How long and how often a fleet waits for its replicas."""

from typing import NamedTuple


class FleetLimits(NamedTuple):
    """max_moves: how many lost replicas a request survives: one that kills its replicas must not kill all of them.
    silent_seconds: without a sign of life, after which a replica counts as stuck; kill_seconds: after which it is
    killed. start_seconds: the same for one that starts, which tells its progress. wait_seconds: how long a stream waits
    for a replica. max_starts: failed starts in a row after which a replica is given up."""

    max_moves: int = 2
    silent_seconds: float = 5.0
    kill_seconds: float = 30.0
    start_seconds: float = 120.0
    wait_seconds: float = 60.0
    max_starts: int = 3


DEFAULTS = FleetLimits()
