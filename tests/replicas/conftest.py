"""One fleet of two replicas for all tests of this folder, and the answers of an engine beside it. They end with the
folder: a fleet hears its replicas all the time, and other tests count what their process does."""

import pytest

from lockstep import LLM
from lockstep.engine.async_engine import AsyncEngine
from lockstep.replicas.front import FrontModel
from lockstep.replicas.limits import FleetLimits
from lockstep.serve.app import make_app
from lockstep.serve.service import Service
from tests.replicas.proof import answer_all, asked, subject, wait_until
from tests.serve.server import listening

LIMITS = FleetLimits(max_moves=5, silent_seconds=1.5)


@pytest.fixture(scope="package")
def front():
    """A FrontModel with two replicas."""
    with FrontModel(num_replicas=2, max_requests=8, speculate="auto", fleet_limits=LIMITS, progress=False) as made:
        yield made


@pytest.fixture
def fleet(front):
    """Its Fleet, when both replicas are ready."""
    made = front.fleet
    wait_until(lambda: all(report.is_ready for report in made.replica_reports()))
    yield made
    wait_until(lambda: not any(link.streams for link in made.links.values()))


@pytest.fixture(scope="package")
def alone():
    """An engine in this process that nothing interrupts."""
    with LLM(threads=1, max_requests=8, progress=False) as llm:
        yield AsyncEngine(llm.engine)


@pytest.fixture(scope="package")
def menu(alone):
    """Requests with their answers."""
    made = asked(subject(), 1, 24)
    answer_all(made, alone)
    return made


@pytest.fixture(scope="package")
def server(front):
    """A server of the fleet, which it does not close."""
    service = Service("lockstep")
    service.open(front)
    vars(service)["close"] = lambda: None
    with listening(service, make_app(service)) as (_, port):
        yield f"http://127.0.0.1:{port}"
