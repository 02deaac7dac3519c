"""`lockstep serve`: its options, its messages, and its refusals to start."""

import errno
import os
import socket
import subprocess
import sys
from types import SimpleNamespace

import httpx
import pytest

from lockstep import LLM
from lockstep.commands.serve import (
    allowed,
    keys,
    model_name,
    model_names,
    no_chat_words,
    ready_lines,
    serve,
    tell_no_chat,
)
from lockstep.serve.app import make_app
from lockstep.serve.request_target import host_name, origin
from lockstep.serve.server import bind
from lockstep.serve.service import Service
from lockstep.text.grammars.structured import Grammars
from tests.serve.program import ROOT, program
from tests.serve.server import SIZES


def refused(*options):
    """The message of a command that cannot start."""
    command = [sys.executable, "-m", "lockstep", "serve", *map(str, options)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 2 and not done.stdout, done
    return done.stderr


def test_options_reach_the_server():
    options = (
        "--name",
        "mine",
        "--name",
        "gpt-4",
        "--host",
        "localhost",
        "--api-key",
        "a",
        "--api-key",
        "b",
        "--max-requests",
        3,
        "--max-context",
        640,
        "--max-body-mb",
        1,
        "--cors-origin",
        "https://example.org",
    )
    with (
        program(*options) as made,
        httpx.Client(base_url=made.url, headers={"Authorization": "Bearer b"}, timeout=300) as client,
    ):
        model, other = client.get("/v1/models", headers={"Origin": "https://example.org"}).json()["data"]
        assert other == model | dict(id="gpt-4")
        assert (model["id"], model["max_model_len"]) == ("mine", 640)
        assert client.post("/v1/completions", content=b"x" * (1 << 20) + b"x").status_code == 413
        assert httpx.get(f"{made.url}/v1/models").status_code == 401


@pytest.mark.parametrize(
    "options, says",
    [
        (("no/such/model/here",), "no such folder or file"),
        (("--max-context", 0), "max-context"),
        (("--port", 70000), "port"),
        (("--api-key", ""), "--api-key: expected ASCII"),
        (("--cors-origin", "foo"), "--cors-origin: expected an origin such as https://example.org"),
        (("--name", ""), '--name: expected a name, got ""'),
        (("--host", "no.such.host.invalid"), "cannot listen on no.such.host.invalid"),
    ],
    ids=str,
)
def test_what_cannot_work_is_said_in_one_sentence(options, says):
    said = refused(*options)
    assert says in said and said.startswith("lockstep: ") and said.count("\n") == 1


def test_a_port_in_use_is_said_before_a_model_is_loaded():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert refused("--port", port) == f"lockstep: cannot listen on 127.0.0.1 port {port}: address already in use\n"


def test_a_server_listens_on_an_ipv6_address_too():
    try:
        [made] = bind("::1", 0)
    except ValueError as error:
        pytest.skip(str(error))
    assert made.getsockname()[1] > 0
    made.close()


@pytest.fixture
def has_ipv6():
    """Whether this machine has the address ::1."""
    try:
        [made] = bind("::1", 0)
    except ValueError:
        return False
    made.close()
    return True


def test_localhost_is_both_of_its_addresses_on_one_port(has_ipv6):
    made = bind("localhost", 0)
    assert [each.getsockname()[0] for each in made] == ["127.0.0.1", "::1"][: 1 + has_ipv6]
    port = {each.getsockname()[1] for each in made}
    assert len(port) == 1
    for each in made:
        socket.create_connection(each.getsockname()[:2], timeout=60).close()
        each.close()


def test_an_address_of_localhost_that_is_in_use_is_said(has_ipv6):
    if not has_ipv6:
        pytest.skip("no ::1 on this machine")
    [taken] = bind("::1", 0)
    port = taken.getsockname()[1]
    with pytest.raises(ValueError, match=f"cannot listen on localhost port {port}: address already in use"):
        bind("localhost", port)
    taken.close()


def test_while_it_loads_requests_are_told_to_come_back():
    service = Service("lockstep")
    from lockstep.serve.errors import ApiError

    with pytest.raises(ApiError) as caught:
        service.check_open()
    assert (caught.value.status, caught.value.code, caught.value.retry_after) == (503, "loading", 1)
    service.close()


class Panic(BaseException):
    """An error as libraries in Rust raise it where they panic."""


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("can't start new thread"), Panic()], ids=repr)
def test_whatever_goes_wrong_while_it_loads_ends_the_server(error):
    def fail():
        raise error

    service = Service("lockstep")
    with pytest.raises(type(error)):
        serve(fail, service, make_app(service), "127.0.0.1", 0)
    service.close()


def test_keys_come_from_options_or_the_environment(monkeypatch):
    monkeypatch.setenv("LOCKSTEP_API_KEY", "secret")
    assert keys(None) == ["secret"] and keys(["a", "b"]) == ["a", "b"]
    monkeypatch.setenv("LOCKSTEP_API_KEY", "")
    with pytest.raises(ValueError, match="--api-key"):
        keys(None)


@pytest.mark.parametrize(
    "given, read",
    [
        ("https://Example.org", "https://example.org"),
        ("http://localhost:3000/", "http://localhost:3000"),
        ("http://[::1]:80", "http://[::1]:80"),
        ("chrome-extension://abc", "chrome-extension://abc"),
        ("null", "null"),
        ("*", "*"),
    ],
)
def test_origins_that_may_be_let_in(given, read):
    assert allowed("--cors-origin", [given], origin) == [read]


@pytest.mark.parametrize("given", ["foo", "", "example.org", "https://", "https://a/b", "https://*.a", "https://a b"])
def test_what_is_no_origin_is_told(given):
    with pytest.raises(ValueError, match=r"--cors-origin: expected an origin such as .*, got "):
        allowed("--cors-origin", ["*", given], origin)


@pytest.mark.parametrize(
    "given, read",
    [("A.example.org", "a.example.org"), ("other:80", "other"), ("[::1]", "::1"), ("x_1.", "x_1"), ("*", "*")],
)
def test_hosts_that_may_be_let_in(given, read):
    assert allowed("--allowed-host", [given], host_name) == [read]


@pytest.mark.parametrize("given", ["http://x/", "", "a/b", "*.example.org", "a b", "käse.example", "a:b:c", "-", "."])
def test_what_is_no_host_is_told(given):
    with pytest.raises(ValueError, match=r"--allowed-host: expected a name such as .*, got "):
        allowed("--allowed-host", ["*", given], host_name)


def test_the_lines_at_the_start_say_where_and_what(server):
    first, *lines = ready_lines(server.service, "0.0.0.0", 8000)
    assert first == "lockstep: lockstep is ready at http://0.0.0.0:8000/v1"
    assert {line[:12].strip(): line[12:] for line in lines} == {
        "page": f"http://127.0.0.1:8000/ and, from other machines, http://{socket.gethostname()}:8000/",
        "model": f"{server.service.llm.path} (qwen3_5_text, weights bf16, KV cache bf16)",
        "context": "1024 of the model's 4096 tokens, 8 sequences at once",
        "sampling": "temperature 0: as the model's makers ask (--generation-config none: as OpenAI's API has it)",
        "API key": "none needed",
    }
    assert ready_lines(server.service, "::1", 8000)[:2] == [
        "lockstep: lockstep is ready at http://[::1]:8000/v1",
        "  page      http://[::1]:8000/",
    ]


@pytest.mark.parametrize(
    "tokenizer, words",
    [
        (None, "only prompts of token ids (with return_token_ids in token ids): the model has no tokenizer"),
        (SimpleNamespace(only_decodes="why", has_chat_template=False), "only prompts of token ids: why"),
        (
            SimpleNamespace(only_decodes=None, has_chat_template=False),
            "only texts to be continued: the model has no chat template",
        ),
        (SimpleNamespace(only_decodes=None, has_chat_template=True), None),
    ],
    ids=["no tokenizer", "decodes only", "no template", "chats"],
)
def test_what_a_model_cannot_answer_is_told_before_it_is_packed(tokenizer, words, caplog):
    assert no_chat_words(tokenizer) == words
    if tokenizer is not None:
        tell_no_chat(tokenizer)
        assert caplog.messages == ([] if words is None else [f"this model answers {words}"])


def test_a_grammar_process_that_cannot_be_started_ends_the_server(monkeypatch):
    def fail(self):
        raise OSError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(Grammars, "warm", fail)
    service = Service("lockstep")
    with pytest.raises(OSError, match="temporarily"):
        serve(lambda: LLM(**SIZES), service, make_app(service), "127.0.0.1", 0)
    service.close()


def test_a_model_is_called_by_the_end_of_its_path():
    assert [model_name(m) for m in (None, "org/Model", "/a/b/", "x/Model-Q8_0.gguf")] == [
        "lockstep",
        "Model",
        "b",
        "Model-Q8_0",
    ]
    assert model_names(None, "/a/b/") == ["b"] and model_names(["x", "y"], "/a/b/") == ["x", "y"]
