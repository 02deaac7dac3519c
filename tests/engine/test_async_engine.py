"""The engine in its own thread: many clients, cancel, errors, close; each request gets the tokens that it gets
alone."""

import asyncio
import math
import os
import threading
import time
from dataclasses import replace

import numpy as np
import pytest

from lockstep.engine.async_engine import AsyncEngine
from lockstep.engine.embedding import Pool
from lockstep.engine.engine import Engine, EngineOptions
from lockstep.engine.request import SamplingParams, samples
from lockstep.engine.token_stream import EngineStopped, Frames, batches, no_pause, until_the_end
from tests.promise.alone import answer
from tests.promise.models import Case, load

PROMPTS = [np.random.RandomState(i).randint(3, 96, n).tolist() for i, n in enumerate((1, 70, 3, 133, 16, 64))]
PARAMS = [
    SamplingParams(max_tokens=5 + 7 * i, temperature=(0, 0.9)[i % 2], seed=i, ignore_eos=True)
    for i in range(len(PROMPTS))
]
LONG = SamplingParams(max_tokens=2000, ignore_eos=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load(Case("qwen3_5", "f32", "bf16"), tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def alone(model):
    return [answer(model, p, s).known[len(p) :] for p, s in zip(PROMPTS, PARAMS, strict=True)]


@pytest.fixture
def running(model):
    made = AsyncEngine(Engine(model, EngineOptions(threads=1, max_requests=4, max_step_tokens=64)))
    yield made
    made.close()


def test_many_threads_get_their_own_tokens(running, alone):
    found, errors = {}, []

    def client(number):
        try:
            for i in range(number, number + 3):
                i %= len(PROMPTS)
                stream = running.submit(PROMPTS[i], PARAMS[i])
                tokens = list(stream)
                assert [t.index for t in tokens] == list(range(len(tokens))) and stream.finish_reason == "length"
                found.setdefault(i, []).append([t.id for t in tokens])
        except BaseException as error:
            errors.append(error)

    clients = [threading.Thread(target=client, args=(n,)) for n in range(8)]
    for one in clients:
        one.start()
    for one in clients:
        one.join(60)
    assert not errors
    assert sorted(found) == list(range(len(PROMPTS))) and sum(map(len, found.values())) == 24
    assert all(each == alone[i] for i, every in found.items() for each in every)


def test_event_loops_read_streams_too(running, alone):
    async def read(i):
        return [token.id async for token in running.submit(PROMPTS[i], PARAMS[i])]

    async def all_of_them():
        return await asyncio.gather(*(read(i) for i in range(len(PROMPTS))))

    assert asyncio.run(all_of_them()) == alone


def test_samples_of_a_prompt_are_streams_of_their_own(running, model):
    params = SamplingParams(max_tokens=6, temperature=1.0, seed=9, ignore_eos=True, n=3)
    found = [[t.id for t in stream] for stream in running.submit_all([(PROMPTS[1], params)])]
    assert found == [answer(model, PROMPTS[1], p).known[70:] for p in samples(params)]
    with pytest.raises(ValueError, match="n: expected 1"):
        running.submit(PROMPTS[1], params)


def wait_until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def hold_after(engine, num_tokens):
    """Makes the steps of an AsyncEngine wait once a request has num_tokens tokens, until the returned event is set."""
    go, step, seen = threading.Event(), engine.engine.step, []

    def step_or_wait():
        if any(len(request.output_ids) >= num_tokens for request in seen):
            go.wait(300)
        made = step()
        seen.extend(made)
        return made

    engine.engine.step = step_or_wait
    return go


def test_a_cancelled_stream_ends_and_its_memory_is_free(running):
    go = hold_after(running, 3)
    stream, never_read = running.submit(PROMPTS[0], LONG), running.submit(PROMPTS[1], LONG)
    first = next(stream)
    stream.cancel()
    never_read.cancel()
    go.set()
    rest = list(stream)
    assert first.index == 0 and len(rest) < 1999 and stream.finish_reason == "cancelled"
    wait_until(lambda: never_read.finish_reason)
    scheduler = running.engine.scheduler
    wait_until(lambda: scheduler.pages.num_free == scheduler.pages.num_pages)
    stream.cancel()
    assert [t.id for t in running.submit(PROMPTS[0], SamplingParams(max_tokens=1))] == [first.id], "it goes on"


def test_a_loop_that_is_left_cancels_its_stream(running):
    async def read_one(stream):
        async for _ in stream:
            break

    streams = [running.submit(PROMPTS[0], LONG) for _ in range(2)]
    for _ in streams[0]:
        break
    asyncio.run(read_one(streams[1]))
    for stream in streams:
        wait_until(lambda stream=stream: stream.finish_reason)
        assert stream.finish_reason == "cancelled" and repr(stream).startswith("TokenStream(cancelled, ")


def test_a_cancel_may_overtake_the_start(running):
    go = hold_after(running, 3)
    streams = [running.submit(PROMPTS[0], LONG) for _ in range(9)]
    for stream in streams:
        stream.cancel()
    go.set()
    for stream in streams:
        list(stream)
    assert {stream.finish_reason for stream in streams} == {"cancelled"}


def test_a_request_that_cannot_run_is_refused_where_it_is_submitted(running):
    with pytest.raises(ValueError, match="0 to 95"):
        running.submit([96], PARAMS[0])


@pytest.mark.parametrize(
    "prompt, params, options, message",
    [
        ([1, 2], LONG, dict(priority="high"), "priority: expected an integer, got 'high'"),
        ([1, 2], LONG, dict(priority=math.nan), "priority: expected an integer, got nan"),
        ([1, 2], LONG, dict(cache_salt=None), "cache_salt: expected a string, got None"),
        ([1.5], LONG, {}, r"prompt: expected text or a list of token ids, got \[1.5\]"),
        (["a"], LONG, {}, "prompt: expected text or a list of token ids"),
        (None, LONG, {}, "prompt: expected text or a list of token ids, got None"),
        ([1, 2], None, {}, "params: expected SamplingParams, got None"),
    ],
    ids=str,
)
def test_what_is_of_the_wrong_type_is_refused_there_and_the_engine_goes_on(running, prompt, params, options, message):
    beside = running.submit(PROMPTS[0], LONG)  # two that wait are compared by priority
    with pytest.raises(ValueError, match=message):
        running.submit(prompt, params, **options)
    beside.cancel()
    assert len(list(running.submit(np.array([1, 2]), PARAMS[0], cache_salt="\ud800"))) == PARAMS[0].max_tokens


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_process_is_told_that_no_engine_runs_in_it(running):
    child = os.fork()
    if child == 0:
        try:
            running.submit(PROMPTS[0], LONG)
        except EngineStopped:
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0


def test_an_error_in_a_step_reaches_every_reader_and_later_submitters(model):
    made = AsyncEngine(Engine(model, EngineOptions(threads=1)))
    step, broken, steps = made.engine.step, threading.Event(), []

    def fails():
        steps.append(1)
        if broken.is_set() or (len(steps) > 5 and broken.wait(300)):
            raise MemoryError("out of luck")
        return step()

    made.engine.step = fails
    streams, caught = [made.submit(PROMPTS[0], LONG) for _ in range(3)], []

    def reader(stream):
        try:
            list(stream)
        except EngineStopped as error:
            caught.append(error.__cause__)

    async def async_reader(stream):
        return [token async for token in stream]

    threads = [threading.Thread(target=reader, args=(s,)) for s in streams[:2]]
    for one in threads:
        one.start()
    broken.set()
    with pytest.raises(EngineStopped, match="out of luck"):
        asyncio.run(async_reader(streams[2]))
    for one in threads:
        one.join(60)
    assert [type(e) for e in caught] == [MemoryError] * 2
    with pytest.raises(EngineStopped, match="out of luck"):
        made.submit(PROMPTS[0], LONG)
    made.close()


def test_close_ends_the_thread_and_open_streams(model):
    made = AsyncEngine(Engine(model, EngineOptions(threads=1)))
    step, begun = made.engine.step, threading.Event()

    def step_or_wait():
        if begun.is_set():
            wait_until(lambda: made.is_closing)
        begun.set()
        return step()

    made.engine.step = step_or_wait
    stream = made.submit(PROMPTS[0], LONG)
    next(stream)
    made.close()
    assert not made.is_alive
    with pytest.raises(EngineStopped, match="closed"):
        list(stream)
    with pytest.raises(EngineStopped, match="closed"):
        made.submit(PROMPTS[0], LONG)
    made.close()


class Letters:
    """A detokenizer: each token is a letter, which comes with the next token."""

    held = ""

    def push(self, token):
        shown, self.held = self.held, chr(65 + token % 26)
        return shown

    def finish(self):
        return self.held


def test_tokens_bring_the_text_that_is_certain_and_stop_strings_end_a_stream(model, alone):
    made = AsyncEngine(Engine(model, EngineOptions(threads=1), new_detokenizer=lambda request: Letters()))
    try:
        whole = "".join(chr(65 + i % 26) for i in alone[5])
        pieces = [t.text for t in made.submit(PROMPTS[5], PARAMS[5])]
        assert "".join(pieces) == whole and pieces[0] == "" and len(pieces[-1]) == 2
        stopped = made.submit(PROMPTS[5], replace(PARAMS[5], stop=(whole[9:12],)))
        assert "".join(t.text for t in stopped) == whole[: whole.index(whole[9:12])]
        assert (stopped.finish_reason, stopped.request.stop_reason) == ("stop", whole[9:12])
    finally:
        made.close()


def test_batches_read_many_streams_at_once_and_each_ends_with_its_reason(running, alone):
    async def read(pause, read_so_far=None):
        streams = running.submit_all(list(zip(PROMPTS, PARAMS, strict=True)))
        ids, reasons, rounds = [[] for _ in streams], [[] for _ in streams], 0
        async for found in batches(streams, pause):
            rounds += 1
            for number, tokens, reason in found:
                if read_so_far is not None:
                    read_so_far.extend(tokens)
                ids[number] += [token.id for token in tokens]
                reasons[number].append(reason)
        assert all(each == [None] * (len(each) - 1) + ["length"] for each in reasons)
        return ids, rounds

    at_the_end, few = asyncio.run(read(until_the_end))
    step, brought, read_so_far = running.engine.step, [], []

    def step_once_all_is_read():
        wait_until(lambda: len(read_so_far) == len(brought))
        made = step()
        brought.extend(made)
        return made

    running.engine.step = step_once_all_is_read
    every, rounds = asyncio.run(read(no_pause, read_so_far))
    assert every == at_the_end == alone
    assert few <= 2 * len(PROMPTS) < rounds  # the first tokens and the ends


def test_a_pause_brings_tokens_together_and_ends_with_the_stream(running):
    async def read(pause, engine_waits_at=300):
        go = hold_after(running, engine_waits_at)
        [stream] = running.submit_all([(PROMPTS[0], replace(LONG, max_tokens=300))])

        def seconds(num_tokens):
            wait_until(lambda: len(stream.request.output_ids) >= engine_waits_at)
            return pause

        found = []
        async for [(_, tokens, _)] in batches([stream], Frames(seconds if pause else lambda num_tokens: 0.0)):
            found.append(len(tokens))
            if sum(found) == engine_waits_at:
                go.set()
        return found

    assert sum(asyncio.run(read(0.0))) == 300
    # the engine waits for what came in a pause to be read, so the pause ends before the stream does
    first, second, *_ = together = asyncio.run(read(0.05, engine_waits_at=100))
    assert first + second == 100 and sum(together) == 300
    assert len(asyncio.run(read(3600.0))) == 2


def test_a_reader_that_leaves_does_not_wait_for_the_step(running):
    hold, step = threading.Event(), running.engine.step
    running.engine.step = lambda: hold.wait(60) and step()

    async def read():
        [stream] = running.submit_all([(PROMPTS[0], LONG)])
        asyncio.get_running_loop().call_later(0.05, stream.leave)
        return [found async for found in batches([stream])]

    assert asyncio.run(read()) == []
    hold.set()
    scheduler = running.engine.scheduler
    wait_until(lambda: not running.engine.has_work and scheduler.pages.num_free == scheduler.pages.num_pages)


def test_all_prompts_are_queued_or_none(running):
    before = running.engine.num_generated
    with pytest.raises(ValueError, match="0 to 95"):
        running.submit_all([(PROMPTS[0], LONG), ([96], PARAMS[0])])
    assert len(list(running.submit(PROMPTS[0], PARAMS[0]))) == running.engine.num_generated - before


def test_readers_of_a_failed_engine_are_told(model):
    made = AsyncEngine(Engine(model, EngineOptions(threads=1)))

    def fails():
        assert made.seconds_in_step > 0
        raise MemoryError("out of luck")

    made.engine.step = fails

    async def read():
        return [found async for found in batches(made.submit_all([(PROMPTS[0], LONG)]))]

    with pytest.raises(EngineStopped, match="out of luck"):
        asyncio.run(read())
    assert isinstance(made.error, MemoryError)
    made.close()


class FirstStepOnly(Pool):
    """A Reader that has seen enough after its first step."""

    def __init__(self):
        super().__init__("mean", 133)

    @property
    def has_ended(self):
        return True


def test_a_reader_that_has_seen_enough_ends_its_stream(running):
    [stream] = running.submit_made([running.engine.make_reading(PROMPTS[3], FirstStepOnly())])
    assert list(stream) == [] and stream.finish_reason == "embedded" and stream.request.num_left
    wait_until(lambda: not running.engine.has_work)
