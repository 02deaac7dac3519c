"""The cost of HTTP: streams over HTTP against the same requests through the AsyncEngine, in turns, on one engine.

    python bench/bench_http.py [MODEL] [--streams 8 32] [--tokens 128] [--rounds 5]

The server is a process of its own; this process sends the requests over plain sockets and reads the answers as cheaply
as Python can, but on the same cores: time that it takes is lost to the engine, and is in the ratio. It is also printed
by itself, in CPU time of this process as a share of what all cores have in that time.
"""

import asyncio
import json
import logging
import multiprocessing
import os
import selectors
import socket
import statistics
import sys
import threading
import time

from options import Parser, whole_number

from lockstep import LLM, SamplingParams
from lockstep.engine.async_engine import keep_loaded
from lockstep.engine.token_stream import batches, until_the_end
from lockstep.native.host import num_cores
from lockstep.serve.app import make_app
from lockstep.serve.log import start_logging
from lockstep.serve.server import Server, bind
from lockstep.serve.service import Service

PROMPT_TOKENS, CONTEXT = 16, 512
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n"
END = b"0\r\n\r\n"


def prompts(count, round_number, vocab_size):
    """Prompts, as token ids, that differ from those of all earlier rounds."""
    return [
        [(7 * i + 31 * stream + 1013 * round_number) % (vocab_size - 8) + 4 for i in range(PROMPT_TOKENS)]
        for stream in range(count)
    ]


# ---------------------------------------------------------------- the server's process


def serve(pipe, args):
    """The server's process: sends its address, then runs rounds without HTTP on request, until it is told to end."""
    parser = Parser(__doc__)
    with parser.refusing():
        llm = LLM(args.model, weights=args.weights, threads=args.threads, max_requests=32, max_context=CONTEXT)
    if (most := llm.max_context - PROMPT_TOKENS) < args.tokens:
        parser.error(f"--tokens {args.tokens}: expected at most {most} for this model")
    service, [listening] = Service("model"), bind("127.0.0.1", 0)
    service.open(llm)
    start_logging(logging.INFO, open(os.devnull, "w"))  # lines are made and written, as lockstep serve does
    server = Server(make_app(service), service)
    threading.Thread(target=server.run, args=([listening],), daemon=True).start()
    keep_loaded()
    pipe.send((listening.getsockname()[1], llm.model.config.vocab_size))
    while (asked := pipe.recv()) is not None:
        pipe.send(asyncio.run(direct(service.engine, *asked)))


async def direct(engine, each, num_tokens):
    """Seconds that the AsyncEngine takes for a reader who only waits for the end, so that nothing takes its time."""
    began = time.perf_counter()
    params = SamplingParams(max_tokens=num_tokens, ignore_eos=True)
    streams = engine.submit_all([(ids, params) for ids in each])
    async for _ in batches(streams, until_the_end):
        pass
    assert all(len(stream.request.output_ids) == num_tokens for stream in streams)
    return time.perf_counter() - began


# ---------------------------------------------------------------- the clients' process


def over_http(port, each, num_tokens):
    """Seconds until every stream has ended, from the moment before the first request is sent."""
    began, open_sockets = time.perf_counter(), selectors.DefaultSelector()
    for ids in each:
        body = json.dumps(dict(prompt=ids, max_tokens=num_tokens, stream=True, ignore_eos=True, temperature=0)).encode()
        made = socket.create_connection(("127.0.0.1", port))
        made.sendall(HEAD % len(body) + body)
        made.setblocking(False)
        open_sockets.register(made, selectors.EVENT_READ, bytearray())
    while open_sockets.get_map():
        for key, _ in open_sockets.select():
            key.data.extend(key.fileobj.recv(1 << 16))
            if key.data.endswith(END):
                assert key.data.startswith(b"HTTP/1.1 200") and b'"finish_reason":"length"' in key.data
                open_sockets.unregister(key.fileobj)
                key.fileobj.close()
    return time.perf_counter() - began


def compare(pipe, port, vocab_size, num_streams, args):
    """Prints tokens per second of both, medians of all rounds, their ratio, and what the client took."""
    times, clients = {"engine": [], "http": []}, []
    for number in range(args.rounds + 1):
        num_tokens = args.tokens if number else 8  # the first round warms both up
        for name in ("engine", "http") if number % 2 else ("http", "engine"):
            each = prompts(num_streams, 2 * number + (name == "http"), vocab_size)
            before = time.process_time()
            if name == "http":
                seconds = over_http(port, each, num_tokens)
                clients.append((time.process_time() - before) / seconds / num_cores())
            else:
                pipe.send((each, num_tokens))
                seconds = pipe.recv()
            if number:
                times[name].append(seconds)
    rate = {name: num_streams * args.tokens / statistics.median(each) for name, each in times.items()}
    ratios = [a / b for a, b in zip(times["engine"], times["http"], strict=True)]
    print(
        f"{num_streams:3d} streams: engine {rate['engine']:8.1f} tok/s   HTTP {rate['http']:8.1f} tok/s   "
        f"HTTP / engine {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})   "
        f"client {statistics.median(clients):.1%} of the cores' time",
        flush=True,
    )


def main():
    parser = Parser(__doc__)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--streams", type=whole_number(), nargs="+", default=[8, 32])
    parser.add_argument("--tokens", type=whole_number(1, CONTEXT - PROMPT_TOKENS), default=128)
    parser.add_counts(rounds=5)
    parser.add_threads(usual=None)
    parser.add_argument("--weights", default="auto")
    args = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    server = context.Process(target=serve, args=(theirs, args), daemon=True)
    server.start()
    theirs.close()
    try:
        port, vocab_size = pipe.recv()
    except EOFError:  # it has said why
        server.join()
        sys.exit(server.exitcode)
    for num_streams in args.streams:
        compare(pipe, port, vocab_size, num_streams, args)
    pipe.send(None)
    server.join()


if __name__ == "__main__":
    main()
