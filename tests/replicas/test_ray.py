"""`make test-ray`: replicas as actors of a Ray cluster on this machine."""

import importlib.util
import os
import subprocess
import sys

import pytest

from lockstep import LLM
from lockstep.engine.async_engine import AsyncEngine
from lockstep.replicas.front import FrontModel
from lockstep.replicas.limits import FleetLimits
from tests.replicas.proof import (
    answer_all,
    asked,
    differences,
    gaps,
    go_on,
    kill,
    read_all,
    ready_links,
    stop,
    subject,
    wait_until,
)

if importlib.util.find_spec("ray") is None:
    pytest.skip("Ray is not installed: make test-ray", allow_module_level=True)


@pytest.fixture(scope="module")
def fleet():
    from lockstep.replicas.ray_carrier import RayCarrier

    limits = FleetLimits(max_moves=5, silent_seconds=2.0)
    with FrontModel(num_replicas=2, carrier=RayCarrier("local"), fleet_limits=limits, progress=False) as front:
        yield front.fleet
        pids = [link.ready.pid for link in ready_links(front.fleet)]
    wait_until(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in pids))


@pytest.fixture(scope="module")
def menu():
    made = asked(subject(), 2, 24)
    with LLM(threads=1, max_requests=8, progress=False) as llm:
        alone = AsyncEngine(llm.engine)
        answer_all(made, alone)
    return made


def check(menu, streams):
    read = [read_all(samples) for samples in streams]
    assert [what for each in zip(menu, streams, read, strict=True) for what in differences(*each)] == []


@pytest.mark.parametrize("fault", ["none", "kill", "two kills", "hang", "replacement"])
def test_streams_of_actors_survive(fleet, menu, fault, capfd):
    wait_until(lambda: len(ready_links(fleet)) == 2)
    streams = [each.submit(fleet) for each in menu]
    wait_until(lambda: any(stream.request.output_ids for samples in streams for stream in samples))
    link = max(ready_links(fleet), key=lambda link: len(link.streams))
    if fault == "replacement":
        fleet.restart()
    elif fault == "hang":
        stop(link)
        wait_until(lambda: link.state == "stuck")
        go_on(link)
    elif fault != "none":
        assert all(gap.seconds < 5.0 for gap in gaps(link, fleet))
        for other in ready_links(fleet) if fault == "two kills" else ():
            kill(other)
    check(menu, streams)
    assert capfd.readouterr() == ("", ""), "Ray's noise stays out of the terminal"


def test_a_cluster_that_is_not_there():
    command = [sys.executable, "-m", "lockstep", "serve", "--ray", "127.0.0.1:1", "--port", "0"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert found.returncode == 2 and found.stdout == ""
    assert found.stderr.startswith("lockstep: --ray 127.0.0.1:1: cannot reach a Ray cluster there")
    assert found.stderr.count("\n") == 1
