"""A real server for tests: uvicorn in a thread, on a port that the system chooses."""

import contextlib
import threading
import time
from pathlib import Path

from lockstep import LLM
from lockstep.serve.app import make_app
from lockstep.serve.limits import Limits
from lockstep.serve.server import Server, bind
from lockstep.serve.service import Service

ROOT = Path(__file__).parents[2]
SIZES = dict(threads=1, max_requests=8, max_context=1024)


class Running:
    """A server that listens. port, url: its address; service: its Service."""

    def __init__(self, service, server, port):
        self.service, self.server, self.port, self.url = service, server, port, f"http://127.0.0.1:{port}"


@contextlib.contextmanager
def listening(service, app):
    """A context with (the uvicorn server, its port) of a Service and its application; both end with it."""
    [listener] = bind("127.0.0.1", 0)
    server = Server(app, service)
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    wait_until(lambda: server.started)
    try:
        yield server, listener.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(60)
        service.close()
        assert not thread.is_alive()


@contextlib.contextmanager
def unloaded():
    """A context with the URL of a server whose model is still loading."""
    service = Service("lockstep")
    with listening(service, make_app(service)) as (_, port):
        yield f"http://127.0.0.1:{port}"


@contextlib.contextmanager
def running(
    llm=None, limits=Limits(), api_keys=(), cors_origins=(), names=(), allowed_hosts=(), share_prefixes=False, **sizes
):
    """A context with a Running server of an LLM, by default the bundled one. The LLM is closed at the end."""
    service = Service("lockstep", limits, api_keys, names, share_prefixes)
    service.open(llm or LLM(**{**SIZES, **sizes}))
    with listening(service, make_app(service, cors_origins, allowed_hosts)) as (server, port):
        yield Running(service, server, port)


def wait_until(condition, seconds=120):
    """Waits until a condition is true; AssertionError after this number of seconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)
