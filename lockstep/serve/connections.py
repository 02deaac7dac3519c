"""The open connections, and the spare ones that may only ask whether the server is alive."""

import ipaddress
from collections import Counter

SUBNET_BITS = 64  # the part of an IPv6 address that is a network, which a single host may have to itself


class Connections:
    """The connections of a server, each with its client's address.

    Up to `max_connections` in all and `max_address_connections` from one address may ask for anything. Beyond them
    there are `spare_connections`, which may only ask for /health and /ready: the oldest spare one makes room for the
    next, so that nobody can occupy all of them.
    """

    def __init__(self, limits) -> None:
        self._limits, self._addresses, self._count_of, self._spare = limits, {}, Counter(), {}

    def __len__(self):
        return len(self._addresses) + len(self._spare)

    def enter(self, connection, host) -> bool:
        """Takes in a connection from a host; False for a spare one. Calls `crowded_out` of the one that makes room."""
        address = client_group(host)
        within = len(self._addresses) < self._limits.max_connections
        if within and self._count_of[address] < self._limits.max_address_connections:
            self._addresses[connection] = address
            self._count_of[address] += 1
            return True
        self._spare[connection] = None
        if len(self._spare) > self._limits.spare_connections:
            oldest = next(iter(self._spare))
            del self._spare[oldest]
            oldest.crowded_out()
        return False

    def leave(self, connection) -> None:
        """A connection is gone."""
        self._spare.pop(connection, None)
        address = self._addresses.pop(connection, None)
        if address is not None:
            self._count_of[address] -= 1
            if not self._count_of[address]:
                del self._count_of[address]


def client_group(host):
    """The unit that connections are counted by: an IPv4 address, the network of an IPv6 address, or else the host."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host
    if address.version == 4:
        return str(address)
    return str(address.ipv4_mapped) if address.ipv4_mapped else int(address) >> 128 - SUBNET_BITS
