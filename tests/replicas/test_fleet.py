"""Streams whose replica is killed, stopped or replaced are the streams of an engine that nothing interrupts."""

import errno
import json
import os
import re
import signal
import threading
from dataclasses import replace

import httpx
import pytest

from lockstep import SamplingParams
from lockstep.commands.serve import ENGINE_FAILED, serve
from lockstep.engine.token_stream import EngineStopped
from lockstep.replicas import carrier, messages
from lockstep.replicas.front import FrontModel
from lockstep.replicas.limits import FleetLimits
from lockstep.replicas.verifying import ReplicasLost
from lockstep.serve.app import make_app
from lockstep.serve.service import Service
from tests.replicas.proof import differences, go_on, kill, read_all, ready_links, stop, wait_until

LONG = SamplingParams(max_tokens=400, ignore_eos=True, temperature=0.8, seed=5, repetition_penalty=1.1)
PROMPT = "class Queue:\n    def put(self, item):\n"


def check(menu, streams):
    """All answers are those of the menu."""
    read = [read_all(samples) for samples in streams]
    assert [what for each in zip(menu, streams, read, strict=True) for what in differences(*each)] == []


def busy(fleet):
    """A replica that runs streams, once one has some tokens."""
    wait_until(lambda: any(len(each.request.output_ids) > 2 for link in ready_links(fleet) for each in running(link)))
    return max(ready_links(fleet), key=lambda link: len(link.streams))


def running(link):
    return list(link.streams.values())


def test_nothing_differs_without_a_fault(fleet, menu):
    check(menu, [each.submit(fleet) for each in menu])


def test_a_replica_is_killed_and_then_the_one_that_took_its_streams(fleet, menu):
    moved = fleet.num_moved
    streams = [each.submit(fleet) for each in menu]
    first = busy(fleet)
    kill(first)
    wait_until(lambda: fleet.num_moved > moved)
    for link in ready_links(fleet):
        kill(link)
    check(menu, streams)
    wait_until(lambda: len(ready_links(fleet)) == 2)
    assert first not in ready_links(fleet)
    wait_until(lambda: fleet.counts()["running"] == fleet.counts()["waiting"] == 0)


def test_streams_of_a_full_replica_go_on_at_once_in_another_full_one(fleet, front):
    streams = [fleet.submit(front.encode(PROMPT), replace(LONG, max_tokens=1000, seed=seed)) for seed in range(16)]
    wait_until(lambda: all(len(stream.request.output_ids) > 2 for stream in streams))
    lost, other = ready_links(fleet)
    known = {each.request: len(each.request.output_ids) for each in running(lost)}
    own = [each.request for each in running(other)]
    assert len(known) == len(own) == 8
    kill(lost)
    wait_until(lambda: all(len(request.output_ids) > count for request, count in known.items()))
    assert [request.finish_reason for request in own] == [None] * 8
    for stream in streams:
        stream.cancel()


def test_a_replica_that_hangs_loses_its_streams_and_works_again(fleet, menu):
    streams = [each.submit(fleet) for each in menu]
    hung = busy(fleet)
    stop(hung)
    try:
        wait_until(lambda: hung.state == "stuck")
        check(menu, streams)
    finally:
        go_on(hung)
    wait_until(lambda: hung in ready_links(fleet))
    check(menu, [each.submit(fleet) for each in menu])


def test_a_replica_that_hung_gets_its_own_streams_back(fleet, menu):
    streams = [each.submit(fleet) for each in menu]
    hung = busy(fleet)
    stop(hung)
    try:
        wait_until(lambda: hung.state == "stuck")
        for other in ready_links(fleet):
            kill(other)
        wait_until(lambda: not ready_links(fleet))
    finally:
        go_on(hung)
    check(menu, streams)


def test_all_replicas_are_replaced_while_streams_go_on(fleet, menu):
    before = [link.ready.pid for link in ready_links(fleet)]
    streams = [each.submit(fleet) for each in menu]
    busy(fleet)
    fleet.restart()
    check(menu, streams)
    assert not {*before} & {link.ready.pid for link in ready_links(fleet)}
    assert all(not os.path.exists(f"/proc/{pid}") for pid in before)


def test_streams_wait_for_a_replica_and_no_longer_than_they_may(fleet, front, monkeypatch):
    monkeypatch.setattr(fleet, "limits", fleet.limits._replace(wait_seconds=0.1))
    monkeypatch.setattr(fleet, "_working", list)
    stream = fleet.submit(front.encode(PROMPT), LONG)
    with pytest.raises(EngineStopped, match=r"no replica was ready for 0\.1 s") as caught:
        list(stream)
    assert isinstance(caught.value.__cause__, ReplicasLost)


def test_only_requests_that_a_replica_worked_on_are_given_up_with_it(fleet, front, monkeypatch):
    streams = [fleet.submit(front.encode(PROMPT), replace(LONG, max_tokens=200, seed=i)) for i in range(24)]
    lost = busy(fleet)
    held = list(lost.streams.values())
    # a machine that is busy with other tests may hold up the other replica for seconds: it does not count as stuck here
    monkeypatch.setattr(fleet, "limits", fleet.limits._replace(max_moves=0, silent_seconds=60))
    kill(lost)
    wait_until(lambda: all(stream.finish_reason or stream.error for stream in streams), 120)
    given_up = [each for each in held if each.stream.error is not None]
    assert sum(stream.error is not None for stream in streams) == len(given_up) < len(held)
    being_read = [each for each in given_up if messages.BEGUN not in each.stages]  # when it died: they came one by one
    assert len(being_read) <= 1 and len(given_up) - len(being_read) <= 8
    assert given_up and all(each.request.output_ids or each.request.admitted is None for each in given_up)


def test_a_cancelled_stream_ends_at_once_and_leaves_nothing(fleet, front):
    stream = fleet.submit(front.encode(PROMPT), LONG)
    link = busy(fleet)
    stream.cancel()
    assert stream.finish_reason == "cancelled" and not link.streams
    wait_until(lambda: fleet.counts()["running"] == 0)


def test_a_function_as_a_mask_is_refused(fleet, front):
    with pytest.raises(ValueError, match="logits_mask: expected a form that a replica can make, too"):
        fleet.submit(front.encode(PROMPT), replace(LONG, logits_mask=lambda ids: None))
    with pytest.raises(ValueError, match="context of"):
        fleet.submit(front.encode(PROMPT), replace(LONG, max_tokens=1 << 20))


class OtherModel(carrier.LocalCarrier):
    """Starts replicas with settings of its own."""

    def __init__(self, **settings):
        self._settings = settings

    def start(self, number, settings):
        return super().start(number, {**settings, **self._settings})


def test_a_replica_of_another_model_is_not_used(caplog):
    why = "replica 0: it must not answer beside the others: another model: the formats of its weights"
    with pytest.raises(ValueError, match=why):
        FrontModel(num_replicas=1, carrier=OtherModel(weights="q8_0"), progress=False)
    assert caplog.messages == []  # the error says why; nobody needs to be told twice


class Once(carrier.LocalCarrier):
    """Starts a replica only once, until it `may` again."""

    def __init__(self):
        self.may = True

    def start(self, number, settings):
        if not self.may:
            raise OSError(errno.EAGAIN, "Resource temporarily unavailable")
        self.may = False
        return super().start(number, settings)


def test_a_server_that_has_no_replica_left_refuses_requests_and_ends_with_a_status(capsys):
    def lose_all():
        wait_until(lambda: said.extend(re.findall(r":(\d+)/v1", capsys.readouterr().out)) or said)
        for _ in range(2):
            kill(ready_links(service.engine)[0])
            wait_until(lambda: service.engine.error)
            found.append(ask())
            once.may = True
            service.engine.restart()  # replicas that were given up get another chance
            found.append(ask())
        kill(ready_links(service.engine)[0])
        wait_until(lambda: service.engine.error)
        os.kill(os.getpid(), signal.SIGTERM)

    def ask():
        return httpx.post(
            f"http://127.0.0.1:{said[0]}/v1/completions", json={"prompt": "x", "max_tokens": 1}, timeout=60
        )

    def load():
        return FrontModel(num_replicas=1, carrier=once, fleet_limits=FleetLimits(max_starts=1), progress=False)

    service, found, said, once = Service("lockstep"), [], [], Once()
    other = threading.Thread(target=lose_all)
    other.start()
    assert serve(load, service, make_app(service), "127.0.0.1", 0) == ENGINE_FAILED
    other.join()
    assert [each.status_code for each in found] == [503, 200, 503, 200]
    assert found[0].json()["error"]["code"] == found[2].json()["error"]["code"] == "replicas_lost"


def test_a_replica_ends_with_its_front():
    process = carrier.LocalProcess({})
    pid = int(process.place.split()[-1])
    process.connection.close()
    assert process.why() == "ended with status 0" and not os.path.exists(f"/proc/{pid}")


# ------------------------------------------------------------ over HTTP

BODY = dict(prompt=PROMPT, max_tokens=300, temperature=0.8, ignore_eos=True, logprobs=1, receipt=True)


def streamed(server, **body):
    """The seed of a streamed answer, and its events, as they come."""
    with httpx.stream("POST", f"{server}/v1/completions", json=dict(body, stream=True), timeout=60) as response:
        yield response.headers["x-lockstep-seed"]
        for line in response.iter_lines():
            if line.startswith("data: {"):
                yield json.loads(line[6:])


def joined(events):
    choices = [event["choices"][0] for event in events if event["choices"]]
    tokens = [pair for each in choices if each["logprobs"] for pair in zip(*each["logprobs"].values(), strict=False)]
    return "".join(each["text"] for each in choices), tokens, choices[-1]["finish_reason"], choices[-1]["receipt"]


def test_a_stream_over_http_goes_on_and_can_be_repeated_and_verified(fleet, server):
    events = streamed(server, **BODY)
    seed, found = next(events), [next(events)]
    kill(busy(fleet))
    found += events
    again = streamed(server, seed=int(seed), **BODY)
    next(again)
    assert joined(list(again)) == joined(found)
    text, _, reason, receipt = joined(found)
    verdict = httpx.post(f"{server}/v1/receipts/verify", json=dict(receipt=receipt), timeout=60).json()
    assert reason == "length" and verdict["verdict"] == "true" and verdict["text"] == text
    body = dict(receipt=receipt, request=dict(BODY, seed=int(seed) + 1))
    verdict = httpx.post(f"{server}/v1/receipts/verify", json=body, timeout=60).json()
    assert verdict["verdict"] == "false" and verdict["what"] == "sampling.seed"


def test_a_stream_that_is_given_up_says_so(fleet, server, monkeypatch):
    monkeypatch.setattr(fleet, "limits", fleet.limits._replace(max_moves=0))
    events = streamed(server, **BODY)
    next(events), next(events)
    kill(busy(fleet))
    [*_, last] = events
    assert last["error"]["code"] == "replicas_lost" and "1 replicas were lost" in last["error"]["message"]


def test_metrics_and_embeddings_of_several_replicas(fleet, server, alone):
    lines = httpx.get(f"{server}/metrics").text.splitlines()
    assert 'lockstep_replica_up{replica="0"} 1.0' in lines and 'lockstep_replica_up{replica="1"} 1.0' in lines
    assert any(re.fullmatch(r"lockstep_replicas_lost_total [1-9].*", line) for line in lines)
    asked = dict(input=PROMPT, encoding_format="float")
    found = httpx.post(f"{server}/v1/embeddings", json=asked, timeout=60).json()["data"][0]["embedding"]
    ids = httpx.post(f"{server}/tokenize", json=dict(prompt=PROMPT)).json()["tokens"]
    stream = alone.submit(ids, SamplingParams(pooling="last"))
    list(stream)
    assert found == stream.request.pool.embedding().tolist()
