"""/v1/files and /v1/batches with the openai client."""

import contextlib
import io
import json
import socket
import time

import httpx
import openai
import pytest

from lockstep import LLM
from lockstep.serve.app import make_app
from lockstep.serve.limits import Limits
from lockstep.serve.service import Service
from tests.serve.server import SIZES, Running, listening, running, wait_until


def line(custom_id, url="/v1/completions", **body):
    """A line of an input."""
    return dict(custom_id=custom_id, method="POST", url=url, body=dict(prompt="def f(", max_tokens=4) | body)


def uploaded(client, *lines):
    """The id of a file with these lines."""
    content = "\n".join(each if isinstance(each, str) else json.dumps(each) for each in lines)
    return client.files.create(file=("in.jsonl", content.encode()), purpose="batch").id


def begun(client, *lines, endpoint="/v1/completions", **options):
    """A batch of these lines."""
    file = uploaded(client, *lines)
    return client.batches.create(input_file_id=file, endpoint=endpoint, completion_window="24h", **options)


def ended(client, batch):
    """A batch when it has ended."""
    wait_until(lambda: client.batches.retrieve(batch.id).status in ("completed", "failed", "cancelled", "expired"))
    return client.batches.retrieve(batch.id)


def lines_of(client, file):
    """The lines of a file, JSON values."""
    return [json.loads(each) for each in client.files.content(file).text.splitlines()]


def client_of(server, key="any"):
    """An openai client of a Running server."""
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0)


@contextlib.contextmanager
def keeping(folder, llm=None, **options):
    """A context with a client of a server that keeps its files in a folder."""
    service = Service("lockstep", **options)
    service.open(llm or LLM(**SIZES))
    with listening(service, make_app(service, files_dir=str(folder))) as (server, port):
        with client_of(Running(service, server, port)) as client:
            yield client


def test_answers_and_errors_come_in_two_files_in_order(client):
    lines = [line("b"), line("bad", temperature="hot"), line("a", temperature=1.0), "{", line("u", "/v1/embeddings")]
    batch = begun(client, *lines, metadata=dict(name="first"))
    assert batch.status == "validating" and batch.metadata == dict(name="first") and batch.object == "batch"
    done = ended(client, batch)
    assert done.status == "completed" and done.in_progress_at and done.finalizing_at and done.completed_at
    assert (done.request_counts.total, done.request_counts.completed, done.request_counts.failed) == (5, 2, 3)
    answers, errors = lines_of(client, done.output_file_id), lines_of(client, done.error_file_id)
    assert [each["custom_id"] for each in answers] == ["b", "a"]
    assert [(each["custom_id"], each["response"]["status_code"]) for each in errors] == [
        ("bad", 400),
        (None, 400),
        ("u", 404),
    ]
    direct = client.completions.create(model="", prompt="def f(", max_tokens=4)
    assert answers[0]["response"]["body"]["choices"][0]["text"] == direct.choices[0].text
    assert batch.id in [each.id for each in client.batches.list(limit=1)]
    assert {each.purpose for each in client.files.list()} == {"batch", "batch_output"}
    assert client.files.retrieve(done.output_file_id).filename == f"{batch.id}_output.jsonl"


def test_files_come_and_go(client):
    before = [each.id for each in client.files.list()]
    made = client.files.create(file=("my lines.jsonl", b"{}\n"), purpose="batch")
    assert (made.bytes, made.filename, made.purpose, made.status) == (3, "my lines.jsonl", "batch", "processed")
    assert client.files.retrieve(made.id) == made and client.files.content(made.id).content == b"{}\n"
    assert [each.id for each in client.files.list(limit=1)] == [made.id, *before]  # it asks for all pages
    assert client.files.delete(made.id).deleted and [each.id for each in client.files.list()] == before
    with pytest.raises(openai.NotFoundError, match=f"there is no file '{made.id}'"):
        client.files.content(made.id)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        (dict(purpose="fine-tune"), 'purpose: expected \\"batch\\", got'),
        (dict(purpose="batch", more="1"), "more: this field of a file is not known here"),
        (dict(purpose="batch", file="text"), "file: expected a file with a name"),
    ],
)
def test_forms_that_are_refused(server, fields, reason):
    files = None if "file" in fields else dict(file=("a", b"{}"))
    parts = {name: (None, value) for name, value in fields.items()} | (files or {})
    answer = httpx.post(f"{server.url}/v1/files", files=parts)
    assert answer.status_code == 400 and reason in answer.text


@pytest.mark.parametrize(
    ("content_type", "status"),
    [("application/json", 415), ("multipart/form-data", 400), ("multipart/form-data; boundary=x", 400)],
)
def test_bodies_that_are_no_form(server, content_type, status):
    answer = httpx.post(f"{server.url}/v1/files", content=b"--x\r\nno form", headers={"content-type": content_type})
    assert answer.status_code == status and "error" in answer.json()


@pytest.mark.parametrize(
    ("change", "status", "param"),
    [
        (dict(input_file_id="file-none"), 404, None),
        (dict(endpoint="/v1/models"), 400, "endpoint"),
        (dict(completion_window="1h"), 400, "completion_window"),
        (dict(metadata={"a": 5}), 400, "metadata.a"),
        (dict(output_expires_after={}), 400, "output_expires_after"),
    ],
)
def test_batches_that_are_refused(client, server, change, status, param):
    body = dict(input_file_id=uploaded(client, line("a")), endpoint="/v1/completions", completion_window="24h")
    answer = httpx.post(f"{server.url}/v1/batches", json=body | change)
    assert (answer.status_code, answer.json()["error"]["param"]) == (status, param)


def test_a_file_without_lines(client):
    done = ended(client, begun(client, "", " "))
    assert done.status == "failed" and done.errors.data[0].code == "empty_file" and done.failed_at


def test_what_is_cancelled_keeps_its_answers(client):
    lines = [line(f"r{i}", max_tokens=4 if i < 8 else 900, min_tokens=4 if i < 8 else 900) for i in range(400)]
    batch = begun(client, *lines)
    wait_until(lambda: client.batches.retrieve(batch.id).request_counts.completed >= 8)
    with pytest.raises(openai.ConflictError, match="needs this file"):
        client.files.delete(batch.input_file_id)
    assert client.batches.cancel(batch.id).status == "cancelling"
    done = ended(client, batch)
    answers, errors = lines_of(client, done.output_file_id), lines_of(client, done.error_file_id)
    assert done.status == "cancelled" and done.cancelled_at and 8 <= len(answers) < 400 == len(answers) + len(errors)
    assert errors[-1]["error"]["code"] == "batch_cancelled" and errors[-1]["response"] is None
    with pytest.raises(openai.ConflictError, match="is cancelled, and cannot be cancelled"):
        client.batches.cancel(batch.id)


def test_keys_see_their_own(tmp_path):
    limits = Limits(max_files=3, max_files_bytes=3000, max_file_bytes=2000, max_batches=1)
    with running(api_keys=["one", "two"], limits=limits) as server, client_of(server, "one") as one:
        done = ended(one, begun(one, line("a")))
        assert done.status == "completed"
        with client_of(server, "two") as two:
            assert not list(two.files.list()) and not list(two.batches.list())
            for ask, name in ((two.files.content, done.output_file_id), (two.batches.retrieve, done.id)):
                with pytest.raises(openai.NotFoundError):
                    ask(name)
            uploaded(two, line("b"))
        again = one.batches.create(
            input_file_id=done.input_file_id, endpoint="/v1/completions", completion_window="24h"
        )
        assert [each.id for each in one.batches.list()] == [again.id]  # at most one is kept
        ended(one, again)
        with pytest.raises(openai.APIStatusError, match="no more are kept: delete some") as caught:
            uploaded(one, line("c"))
        assert caught.value.status_code == 507
        one.files.delete(done.output_file_id)
        with pytest.raises(openai.APIStatusError, match="the file is larger than 2000 bytes") as caught:
            uploaded(one, "x" * 2001)
        assert caught.value.status_code == 413
        uploaded(one, "x" * 1500)


def test_what_is_larger_than_other_bodies_is_refused_or_kept(server, client):
    large = client.files.create(file=("a", io.BytesIO(b"x" * (9 << 20))), purpose="batch")
    assert large.bytes == 9 << 20 and server.service.num_bytes == 0
    client.files.delete(large.id)
    head = b"POST /v1/files HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % (300 << 20)
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(head)
        assert b" 413 " in connection.recv(1000)


def test_a_file_is_no_folder_for_files(tmp_path):
    (tmp_path / "taken").write_text("x")
    with pytest.raises(ValueError, match="taken: expected a folder to keep files in, this is a file"):
        make_app(Service("lockstep"), files_dir=str(tmp_path / "taken"))


def test_a_batch_goes_on_at_the_next_start(tmp_path):
    folder = tmp_path / "files"
    with keeping(folder) as client:
        lines = [line(f"r{i}", max_tokens=60, min_tokens=60, temperature=1.0) for i in range(60)]
        batch = begun(client, *lines)
        whole = lines_of(client, ended(client, batch).output_file_id)
        batch = begun(client, *lines)
        wait_until(lambda: client.batches.retrieve(batch.id).request_counts.completed >= 8)
        with pytest.raises(ValueError, match="another server keeps its files there"):
            make_app(Service("lockstep"), files_dir=str(folder))
    kept = (folder / f"{batch.id}.partial").read_bytes().count(b" answered ")
    (folder / f"file-{'0' * 24}.jsonl").write_text("left over")
    assert 8 <= kept < 60
    with keeping(folder) as client:
        assert client.batches.retrieve(batch.id).status == "in_progress"
        done = ended(client, batch)
        assert done.status == "completed" and lines_of(client, done.output_file_id) == whole
        assert not list(folder.glob("*.partial")) and not (folder / f"file-{'0' * 24}.jsonl").exists()


def test_a_batch_takes_only_what_others_leave(server, client):
    lines = [line(f"r{i}", max_tokens=900, min_tokens=900) for i in range(100)]
    batch = begun(client, *lines)
    wait_until(lambda: server.service.num_sequences == 6)  # of 8
    time.sleep(0.1)
    assert server.service.num_sequences == 6
    # a request that needs all of them gets them, whatever the lines of the batch have yet to do
    options = dict(max_tokens=100, n=8, extra_body=dict(min_tokens=100), temperature=1.0, seed=1)
    direct = client.completions.create(model="", prompt="x", **options)
    assert len(direct.choices) == 8
    wait_until(lambda: server.service.num_sequences <= 8)  # an answer has been read before its sequences are given back
    client.batches.cancel(batch.id)
    done = ended(client, batch)
    assert done.status == "cancelled" and done.request_counts.completed < 20


def test_a_batch_expires(client, server, monkeypatch):
    monkeypatch.setattr("lockstep.serve.batches.desk.WINDOW_SECONDS", -1)
    batch = begun(client, *[line(f"r{i}", max_tokens=900, min_tokens=900) for i in range(20)])
    done = ended(client, batch)
    assert done.status == "expired" and done.expired_at
    assert lines_of(client, done.error_file_id)[-1]["error"]["code"] == "batch_expired"
