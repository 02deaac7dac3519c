"""Event streams, and the comments that keep them open."""

import asyncio
import gc
import time
from types import SimpleNamespace

import pytest

from lockstep.serve.answers.sse import DONE, KEEP_ALIVE, EventStream
from lockstep.serve.limits import Limits


class Client:
    """A client whose `send` refuses messages after the end, as uvicorn's. ends: when the client closes its half."""

    def __init__(self, ends):
        self.got, self.is_complete, self.ends, self.has_ended = b"", False, ends, asyncio.Event()

    async def send(self, message):
        if self.is_complete:
            raise RuntimeError("sent after the response was complete")
        self.got += message.get("body", b"")
        self.is_complete = message["type"] == "http.response.body" and not message["more_body"]
        if self.ends == ("with the answer" if self.is_complete else "at once"):
            self.has_ended.set()


async def stream(seconds, **options):
    """Reads a stream whose only event comes after these seconds: the received bytes, and errors of asyncio."""
    client, wrong = Client(options.get("ends")), []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: wrong.append(context["message"]))

    async def events():
        await asyncio.sleep(seconds)
        yield b"data: 1\n\n"

    limits = Limits(keep_alive_seconds=options.get("keep_alive", 15))
    generation = SimpleNamespace(service=SimpleNamespace(limits=limits))
    scope = {"path": "/v1/completions", "lockstep.has_ended": client.has_ended}
    await EventStream(generation, events())(scope, None, client.send)
    await asyncio.sleep(0.2)
    gc.collect()
    return client.got, wrong


@pytest.mark.parametrize("ends", [None, "with the answer"])
def test_nothing_follows_the_end_of_a_stream(ends):
    assert asyncio.run(stream(0.01, ends=ends)) == (b"data: 1\n\n" + DONE, [])


@pytest.mark.parametrize("options", [dict(keep_alive=0.01), dict(ends="at once")], ids=str)
def test_comments_keep_a_silent_stream_open(options):
    got, wrong = asyncio.run(stream(0.3, **options))
    assert got.count(KEEP_ALIVE) >= 2 and got.endswith(b"data: 1\n\n" + DONE) and not wrong


def test_a_comment_comes_as_soon_as_nothing_was_sent_for_that_long():
    """The silence is counted from the last event, not from the last comment or the beginning."""
    seconds, times = 1, []
    client = Client(None)

    async def events():
        await asyncio.sleep(0.1 * seconds)
        yield b"data: 1\n\n"
        times.append(time.monotonic())
        while KEEP_ALIVE not in client.got:
            await asyncio.sleep(0.01)
        times.append(time.monotonic())

    service = SimpleNamespace(limits=Limits(keep_alive_seconds=seconds))
    scope = {"path": "/v1/completions", "lockstep.has_ended": client.has_ended}
    asyncio.run(EventStream(SimpleNamespace(service=service), events())(scope, None, client.send))
    assert 0.99 * seconds <= times[1] - times[0] < 1.7 * seconds and client.got.endswith(DONE)
