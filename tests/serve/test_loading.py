"""What the server answers and does while a model is loaded."""

import gc
import io
import signal
import subprocess
import sys

import httpx
import pytest

from lockstep import __version__
from lockstep.engine.async_engine import keep_loaded
from lockstep.engine.selfcheck.check import NUMERICS
from lockstep.serve import loading
from lockstep.serve.loading import Loading, restore_terminal
from lockstep.serve.service import Service
from tests.serve.server import ROOT, unloaded

# a server whose model takes for ever; it tells on standard output how far it is
PROGRAM = """
import ctypes
import time
from lockstep.commands.serve import serve
from lockstep.serve.app import make_app
from lockstep.serve.service import Service

def spin():
    print("loads", flush=True)  # the signal may come as soon as this is read
    while True:
        time.sleep(0.01)

def load():
    try:
        while True:
            {spin}()
    finally:
        print("unwound", flush=True)

service = Service("m")
serve(load, service, make_app(service), "127.0.0.1", 0)
"""


@pytest.mark.parametrize(
    "spin, number, said",
    [("spin", signal.SIGINT, "loads\nunwound\n"), ("ctypes.CFUNCTYPE(None)(spin)", signal.SIGTERM, "loads\nloads\n")],
    ids=["in Python", "in a callback of native code, which swallows exceptions"],
)
def test_a_signal_ends_the_process_at_once_and_without_a_traceback(spin, number, said):
    command = [sys.executable, "-c", PROGRAM.format(spin=spin)]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with subprocess.Popen(command, cwd=ROOT, **pipes) as process:
        first = process.stdout.readline()
        process.send_signal(number)
        out, err = process.communicate(timeout=300)
    assert (first + out, err, process.returncode) == (said, "", -number)


def test_until_the_model_is_loaded_requests_are_told_why_and_when_to_come_back():
    with unloaded() as url, httpx.Client(base_url=url, timeout=300) as http:
        ready = http.get("/ready")
        assert (ready.status_code, ready.headers["retry-after"]) == (503, "1")
        assert ready.json() == dict(status="loading", reason="the model is still loading")
        posted = "/v1/completions", "/v1/chat/completions", "/v1/messages", "/v1/responses", "/v1/embeddings"
        sent = [http.post(path, json={}) for path in (*posted, "/tokenize", "/detokenize")]
        for answer in [*sent, http.get("/v1/models"), http.get("/tokenizer_info")]:
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "1"), answer.url
            assert answer.json()["error"]["message"] == "the model is still loading"
        assert http.get("/version").json() == dict(version=__version__, numerics=NUMERICS)
        assert [http.get(path).status_code for path in ("/health", "/metrics", "/")] == [200, 200, 200]


def test_bars_that_are_cut_off_leave_the_cursor_on_a_line_of_its_own(monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "__stderr__", terminal)
    monkeypatch.setenv("TERM", "xterm")
    restore_terminal()
    assert terminal.getvalue() == "\x1b[?25h\n"


def test_what_is_loaded_is_left_out_of_garbage_collection_once_the_server_is_ready(monkeypatch):
    done = []
    monkeypatch.setattr(loading, "keep_loaded", lambda: done.append("kept"))
    monkeypatch.setattr(Service, "open", lambda service, llm: done.append(llm))
    begun = Loading(lambda: "llm", Service("m"), lambda: done.append("ready"))
    begun.start()
    vars(begun)["_thread"].join(60)
    assert begun.error is None and done == ["llm", "ready", "kept"]


def test_a_collection_no_longer_looks_at_what_was_there(monkeypatch):
    frozen = []
    monkeypatch.setattr(gc, "freeze", lambda: frozen.append(gc.get_count()))
    keep_loaded()
    assert [counts[1:] for counts in frozen] == [(0, 0)]  # after a collection of everything
