"""Frames, after which the readers of many streams are woken together, and how long they are."""

import asyncio

import pytest

from lockstep.engine.token_stream import Frames
from lockstep.serve.generation import frame_seconds


def test_all_that_wait_for_a_frame_are_woken_together():
    told, lengths = [], iter([0.05, 0.0, 0.01])

    def seconds(num_tokens):
        told.append(num_tokens)
        return next(lengths)

    async def wait():
        loop, frames = asyncio.get_running_loop(), Frames(seconds)
        first, second, third, fourth = (loop.create_future() for _ in range(4))
        began = loop.time()
        assert frames(first, [(0, [None], None), (1, [None] * 3, None)])
        await asyncio.sleep(0.02)
        assert frames(second, [(0, [None] * 9, None)])  # joins the frame that has begun
        await first
        assert second.done() and loop.time() - began >= 0.05
        assert not frames(third, [(0, [], "stop")])  # a frame without a length
        assert frames(fourth, [(0, [None] * 2, None)])
        await fourth
        assert not third.done() and told == [3, 0, 2]

    asyncio.run(wait())


@pytest.mark.parametrize(("num_open", "num_tokens", "seconds"), [
    (1, 1, 1 / 60), (1, 100, 1 / 60), (11, 11, 1 / 60), (12, 11, 0.018), (12, 12, 0.036), (32, 11, 0.048),
    (32, 12, 0.096), (40, 12, 0.1), (100, 1, 0.15), (100, 100, 0.15),
])  # fmt: skip
def test_frames_are_longer_for_many_streams_and_for_many_tokens(num_open, num_tokens, seconds):
    assert frame_seconds(num_open, num_tokens) == pytest.approx(seconds)
