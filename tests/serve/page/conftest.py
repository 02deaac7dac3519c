"""One browser, and one server, for all tests of the page."""

import math
import time

import pytest

from tests.serve.page import browser as driver
from tests.serve.page.visitor import opened
from tests.serve.server import running


@pytest.fixture(scope="package")
def server():
    """A Running server of the bundled model."""
    with running() as made:
        yield made


@pytest.fixture(scope="package")
def chromium():
    """The Browser."""
    with driver.chromium() as made:
        yield made


@pytest.fixture
def page(chromium, server):
    """The browser on a fresh page, with few tokens to an answer; nothing may complain."""
    yield opened(chromium, server)
    assert chromium.complaints() == []


class Hold:
    """Keeps an engine's answers from ending: each waits once it has `num_tokens`; with None there it goes on."""

    def __init__(self, engine, num_tokens):
        self._engine, self._step, self.num_tokens = engine, engine.step, num_tokens

    def step(self):
        """As the engine's; without a token where an answer has enough, so that it can still be cancelled."""
        if any(len(request.output_ids) >= (self.num_tokens or math.inf) for request in self._engine.scheduler.running):
            time.sleep(0.01)
            return []
        return self._step()


@pytest.fixture
def hold(server, monkeypatch):
    """A Hold of answers with eight tokens, so that there is one to interrupt; no token ends them either."""
    engine = server.service.llm.engine
    made = Hold(engine, 8)
    monkeypatch.setattr(engine, "step", made.step)
    monkeypatch.setattr(engine, "eos_ids", frozenset())
    return made
