"""Many clients at once, in a process of their own: `python -m tests.serve.visitors KIND PORT NUMBERS...`.

Prints JSON. overload: PORT SECONDS REQUESTS_PER_SECOND SEED. leave: PORT COUNT SEED.
"""

import asyncio
import json
import random
import socket
import struct
import subprocess
import sys
import time

HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: %d\r\n\r\n"
RESET = struct.pack("ii", 1, 0)  # SO_LINGER: close with a reset
PATIENCE = 300
ASKED = [
    dict(),
    dict(stream=True),
    dict(n=3),
    dict(stream=True, n=2),
    dict(prompt=["x", "import os\n", "def f("]),
    dict(echo=True, logprobs=2),
]


def visits(kind, port, *numbers):
    """Runs this file in another process; returns what it printed."""
    command = [sys.executable, "-m", __name__, kind, str(port), *map(str, numbers)]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True, timeout=3600).stdout)


def body(rng, max_tokens):
    """A request with a prompt that no earlier request had, in one of several forms."""
    prompt = [rng.randrange(4, 4000) for _ in range(rng.randrange(1, 120))]
    return dict(prompt=prompt, max_tokens=max_tokens, ignore_eos=True, temperature=0) | rng.choice(ASKED)


def encoded(sent):
    """The request as HTTP bytes."""
    raw = json.dumps(sent).encode()
    return HEAD % len(raw) + raw


# ---------------------------------------------------------------- overload


async def overload(port, seconds, rate, seed):
    """Sends requests at random moments, `rate` per second on average, without waiting for earlier answers."""
    rng, asking, found = random.Random(seed), set(), []
    began = time.monotonic()
    due = began
    while due < began + seconds:
        await asyncio.sleep(max(0, due - time.monotonic()))
        task = asyncio.create_task(ask(port, body(rng, 200), found))
        asking.add(task)
        task.add_done_callback(asking.discard)
        due += rng.expovariate(rate)
    await asyncio.gather(*asking)
    return found


async def ask(port, sent, found):
    """Notes [status, seconds until the whole answer, whether it was complete and, for a refusal, well formed]."""
    began = time.monotonic()
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(encoded(sent))
        answer = await reader.read()
        writer.close()
    except OSError as error:
        found.append([0, time.monotonic() - began, False, str(error)])
        return
    head, _, rest = answer.partition(b"\r\n\r\n")
    status = int(head.split()[1]) if head else 0
    found.append([status, time.monotonic() - began, whole(status, head, rest), head.decode()[:200]])


def whole(status, head, rest):
    """Whether the answer is complete."""
    if status == 429:
        return b"retry-after: " in head and json.loads(rest)["error"]["type"] == "rate_limit_error"
    if status == 503:
        return bool(json.loads(rest)["error"]["message"])
    return rest.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n") or (b"content-length" in head and bool(json.loads(rest)))


# ---------------------------------------------------------------- leaving


async def leave(port, count, seed):
    """Sends requests, 12 at a time, whose clients disconnect at random moments; counts the stages of those moments."""
    rng, seen, gate = random.Random(seed), {}, asyncio.Semaphore(12)

    async def one():
        async with gate:
            what = await visit(port, rng)
            seen[what] = seen.get(what, 0) + 1

    await asyncio.gather(*(one() for _ in range(count)))
    return seen


async def visit(port, rng):
    """Sends one request; returns the stage at which its client left: "sending", "waiting", "reading" or "answered"."""
    raw = encoded(body(rng, 900))
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    sent = raw if rng.random() < 0.9 else raw[: rng.randrange(len(raw))]
    writer.write(sent)
    # some clients wait for the first bytes, however long that takes
    seconds, patient = rng.choice([0, 0.002, 0.02, 0.1, 0.4]) * rng.random(), rng.random() < 0.3 and sent == raw
    deadline, got = time.monotonic() + (PATIENCE if patient else seconds), b""
    try:
        while len(got) < 10_000 and not (patient and got):
            async with asyncio.timeout(max(0, deadline - time.monotonic())):
                piece = await reader.read(4096)
            if not piece:
                break
            got += piece
    except TimeoutError:
        pass
    if rng.random() < 0.5:
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    writer.close()
    if len(sent) < len(raw):
        return "sending"
    return "waiting" if not got else "answered" if reader.at_eof() else "reading"


if __name__ == "__main__":
    print(json.dumps(asyncio.run(globals()[sys.argv[1]](*map(int, sys.argv[2:])))))
