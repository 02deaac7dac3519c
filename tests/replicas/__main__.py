"""`python -m tests.replicas --kills 1000`: replicas of the bundled model are killed, stopped and replaced at random
moments, while random requests run; every answer is compared with that of one engine that nothing interrupts."""

import argparse
import contextlib
import logging
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from lockstep import LLM
from lockstep.engine.async_engine import AsyncEngine
from lockstep.engine.token_stream import EngineStopped
from lockstep.replicas.carrier import Carrier, LocalCarrier, LocalProcess
from lockstep.replicas.fleet import Fleet
from lockstep.replicas.front import FrontModel
from lockstep.replicas.limits import FleetLimits
from tests.replicas.proof import (
    Asked,
    Gap,
    answer_all,
    asked,
    differences,
    gaps,
    go_on,
    kill,
    moments,
    prefill_speed,
    read_all,
    ready_links,
    stop,
    subject,
)

NUM_WISHES, PATIENCE_SECONDS = 120, 900.0
SOURCES = ("off", "auto", "lookup", "mtp")


class Clients:
    """Threads that submit requests one after another and compare their answers, until `end`."""

    def __init__(self, menu: list[Asked], fleet: Fleet, seed: int, count: int) -> None:
        self.differences: list[str] = []
        self.counts: Counter[str] = Counter()
        self._menu, self._fleet, self._ends = menu, fleet, threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(random.Random(seed + i),)) for i in range(count)]
        for each in self._threads:
            each.start()

    def _run(self, rng: random.Random) -> None:
        while not self._ends.is_set():
            each = rng.choice(self._menu)
            streams = each.submit(self._fleet)
            try:
                found = differences(each, streams, read_all(streams, PATIENCE_SECONDS))
            except EngineStopped as error:
                self.counts[f"given up: {error}"[:60]] += len(streams)
                continue
            except (TimeoutError, AssertionError) as error:
                found = [f"{error!r}: {each.wish}"[:1500]]
            self.differences += found
            self.counts["answers"] += len(streams)
            for request in (stream.request for stream in streams):
                self.counts["tokens"] += len(request.output_ids)
                for name, value in vars(request.params).items():
                    self.counts[name] += value not in (0, 1, None, (), {}, False) and name != "seed"
                self.counts["receipts"] += request.leaves is not None
                self.counts["drafts"] += request.num_drafted > 0

    def end(self) -> None:
        """Ends all clients after their present request."""
        self._ends.set()
        for each in self._threads:
            each.join()


def faults(fleet: Fleet, num_kills: int, rng: random.Random, made: Counter[str], seen: list[Gap]) -> None:
    """Kills replicas, sometimes two at once; stops some for a while, and has all replaced. Counts all that in `made`;
    seen: gaps of streams where another replica was ready."""
    while made["kills"] < num_kills:
        time.sleep(rng.expovariate(4.0))
        links = ready_links(fleet)
        if not links:
            continue
        link, drawn = rng.choice(links), rng.random()
        made.update(moments(fleet))
        if drawn < 0.03:
            stop(link)
            time.sleep(fleet.limits.silent_seconds * rng.choice((0.5, 2.0)))
            go_on(link)
            made["stops"] += 1
        elif drawn < 0.06:
            fleet.restart()
            made["rolling restarts"] += 1
        elif drawn < 0.12 and len(links) > 1:
            for each in links[:2]:
                kill(each)
            made["kills"] += 2
            made["two at once"] += 1
        else:
            spared = len(links) > 1
            found = gaps(link, fleet)
            if spared:
                seen += found
            made["kills"] += 1
        print(f"\r{made['kills']} kills, {fleet.num_moved} streams moved", end="", flush=True)


def main(carrier: Carrier | None = None) -> int:
    """Runs what the command line asks for; returns 1 if anything differed."""
    parser = argparse.ArgumentParser(prog="python -m tests.replicas", description=__doc__)
    parser.add_argument("--kills", type=int, default=1000, help="how many, at least (%(default)s)")
    parser.add_argument("--replicas", type=int, default=3, help="how many at once (%(default)s)")
    parser.add_argument("--clients", type=int, default=12, help="how many ask one request after another (%(default)s)")
    parser.add_argument("--speculate", default="auto", choices=SOURCES, help="of the replicas (%(default)s)")
    parser.add_argument("--seed", type=int, default=time.time_ns() // 10**9, help="of requests and moments (the time)")
    parser.add_argument("--broken", action="store_true", help="instead: one replica has broken memory, and is found")
    given = parser.parse_args()
    if given.broken:
        return find_broken(given.seed)
    logging.disable(logging.WARNING)
    print(f"seed {given.seed}", flush=True)
    of = subject()
    menu = asked(of, given.seed, NUM_WISHES)
    alone = AsyncEngine(LLM(threads=1, max_requests=8, progress=False).engine)
    answer_all(menu, alone)
    speed = max(prefill_speed(alone) for _ in range(3))
    alone.close()
    limits = FleetLimits(max_moves=1000, silent_seconds=2.0)  # the campaign kills faster than any fault would
    front = FrontModel(
        num_replicas=given.replicas,
        carrier=carrier or LocalCarrier(),
        speculate=given.speculate,
        max_requests=8,
        fleet_limits=limits,
        progress=False,
    )
    clients = Clients(menu, front.fleet, given.seed, given.clients)
    made, seen = Counter[str](), list[Gap]()
    with contextlib.suppress(KeyboardInterrupt):  # what was seen so far is reported
        faults(front.fleet, given.kills, random.Random(given.seed), made, seen)
    clients.end()
    return report(front, clients, made, seen, speed)


class OneBroken(LocalCarrier):
    """Starts replica 1 with broken memory, the first time."""

    def __init__(self) -> None:
        self.num_broken = 0

    def start(self, number: int, settings: Mapping[str, Any]) -> LocalProcess:
        """Starts replica `number`."""
        if number != 1 or self.num_broken:
            return super().start(number, settings)
        self.num_broken += 1
        return LocalProcess(settings, "tests.replicas.faulty")


def find_broken(seed: int) -> int:
    """Has replicas verify one another's answers until the broken one is taken out; returns 1 if it is not, or a sound
    one is."""
    logging.basicConfig(level="INFO")
    menu = [each for each in asked(subject(), seed, NUM_WISHES) if each.wish.params.pooling is None]
    front = FrontModel(num_replicas=3, carrier=OneBroken(), max_requests=8, check_share=0.2, progress=False)
    fleet, broken, began, count = front.fleet, front.fleet.links[1], time.monotonic(), 0
    while broken.state != "lost" and time.monotonic() - began < 120:
        for each in menu[count % len(menu) :][:6]:
            read_all(each.submit(fleet))
            count += 1
        time.sleep(0.3)
    print(f"after {count} requests and {time.monotonic() - began:.1f} s: {fleet.event_counts()}, {broken.reason}")
    is_right = broken.state == "lost" and fleet.num_lost == 1
    front.close()
    return int(not is_right)


def report(front: FrontModel, clients: Clients, made: Counter[str], seen: list[Gap], speed: float) -> int:
    """Prints what was found; returns 1 if anything differed or was left over. speed: of prefill alone, in tokens a
    second."""
    fleet, found = front.fleet, list(clients.differences)
    time.sleep(1)
    left = [link for link in fleet.links.values() if link.streams]
    counts = fleet.counts()
    if left or counts["running"] or counts["waiting"]:
        found.append(f"left over: {left}, {counts}")
    front.close()
    print("\n" + ", ".join(f"{name}: {count}" for name, count in sorted((made + clients.counts).items())))
    print(f"{fleet.num_moved} streams moved, {fleet.num_lost} replicas lost")
    if seen:
        whole = np.array([gap.seconds for gap in seen]) * 1e3
        rest = whole - np.array([gap.num_tokens for gap in seen]) / speed * 1e3
        for what, values in ("", whole), (f" less {speed:.0f} tokens/s of prefill", rest):
            p50, p95, most = np.percentile(values, [50, 95, 100])
            print(f"from a kill to the next token{what}: p50 {p50:.0f} ms, p95 {p95:.0f}, most {most:.0f}")
    for difference in found[:20]:
        print("   ", difference)
    print(f"{len(found)} differences")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
