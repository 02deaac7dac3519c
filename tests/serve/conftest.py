"""One server for all tests that need no limits of their own, and its model without HTTP."""

import functools

import httpx
import openai
import pytest

from lockstep import LLM
from tests.serve.chatting import THINKING, talking
from tests.serve.server import SIZES, running


@pytest.fixture(scope="session", autouse=True)
def patience():
    """Raises httpx's timeout of five seconds, so that a slow machine fails no test."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("get", "post", "options", "stream"):
            patch.setattr(httpx, name, functools.partial(getattr(httpx, name), timeout=300))
        yield


@pytest.fixture(scope="session")
def server():
    """A Running server of the bundled model."""
    with running() as made:
        yield made


@pytest.fixture(scope="session")
def thinker():
    """A Running server of the bundled model, with a chat template for tools and thoughts."""
    with talking(THINKING) as made:
        yield made


@pytest.fixture(scope="session")
def llm():
    """The bundled model without a server, to compare answers with."""
    made = LLM(**SIZES)
    yield made
    made.close()


@pytest.fixture(scope="session")
def client(server):
    """The openai client of the server."""
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as made:
        yield made
