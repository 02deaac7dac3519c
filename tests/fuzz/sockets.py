"""Fuzz of connections: ambiguous lengths, partial requests, slow writers, other protocols."""

import json
import random
import socket
import struct
import time

from tests.fuzz.bodies import BODIES, damaged_bytes
from tests.fuzz.client import Fault, ask, exchange, outcome

RESET = struct.pack("ii", 1, 0)  # SO_LINGER: close with a reset
BODY = json.dumps(dict(prompt="x", max_tokens=2)).encode()
HIDDEN = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n"
CHUNKS = b"%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY)


def head(*lines: bytes, first: bytes = b"POST /v1/completions HTTP/1.1") -> bytes:
    """A request's first line and headers, with a Host header."""
    return b"\r\n".join([first, b"Host: localhost", *lines, b"", b""])


# Two HTTP parsers could find different ends of these bodies: each is refused, and no byte after it becomes a request.
SMUGGLING = [
    head(b"Content-Length: %d" % len(CHUNKS), b"Transfer-Encoding: chunked") + CHUNKS,
    head(b"Transfer-Encoding: chunked", b"Content-Length: 3") + CHUNKS,
    head(b"Content-Length: 4", b"Content-Length: 5") + BODY,
    head(b"Content-Length: 4, 5") + BODY,
    head(b"Content-Length: +5") + BODY,
    head(b"Content-Length: -1") + BODY,
    head(b"Content-Length: 0x10") + BODY,
    head(b"Content-Length: 18446744073709551617") + BODY,
    head(b"Content-Length: 1 2") + BODY,
    head(b"Transfer-Encoding: xchunked") + CHUNKS,
    head(b"Transfer-Encoding: identity") + CHUNKS,
    head(b"Transfer-Encoding: chunked, gzip") + CHUNKS,
    head(b"Transfer-Encoding : chunked") + CHUNKS,
    head(b"Transfer-Encoding:\x0bchunked") + CHUNKS,
    head(b"Content-Length: 5\r\n 6") + BODY,
    head(b"X: y\nContent-Length: 5") + BODY,
    head(b"X: y\rContent-Length: 5") + BODY,
    head(b"X: \x00", b"Content-Length: %d" % len(BODY)) + BODY,
    head(b"Transfer-Encoding: chunked") + b"5;\x00\r\nhello\r\n0\r\n\r\n",
    head(b"Transfer-Encoding: chunked") + b"-1\r\n" + BODY,
    head(b"Transfer-Encoding: chunked") + b"ffffffffffffffffff\r\n" + BODY,
    head(b"Transfer-Encoding: chunked") + b"5\nhello\n0\n\n",
    head(b"Transfer-Encoding: chunked") + b"5\r\nhelloX\r\n0\r\n\r\n",
    head(b"Host: evil.example", b"Content-Length: %d" % len(BODY)) + BODY,
]
OTHERS = [
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(64)),
    b"GET /health\r\n",
    b"CONNECT evil.example:443 HTTP/1.1\r\nHost: evil.example:443\r\n\r\n",
    b"GET http://[::1/ HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET http://localhost HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"OPTIONS * HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET /health HTTP/1.1\r\n\r\n",
    b"GET /health HTTP/9.9\r\nHost: localhost\r\n\r\n",
    b"TRACE /health HTTP/1.1\r\nHost: localhost\r\n\r\n",
    head(b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: h2c", b"HTTP2-Settings: AAMAAABk", first=b"GET / HTTP/1.1"),
    head(b"Connection: upgrade", b"Upgrade: websocket", b"Sec-WebSocket-Key: eA==", first=b"GET /v1/x HTTP/1.1"),
    head(*[b"X%d: y" % i for i in range(3000)], first=b"GET /health HTTP/1.1"),
    head(b"X: " + b"y" * 40_000, first=b"GET /health HTTP/1.1"),
    b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
    head(b"Transfer-Encoding: chunked") + b"0\r\n" + b"X: y\r\n" * 10_000 + b"\r\n",
    head(b"Transfer-Encoding: chunked") + b"1\r\na\r\n" * 3000,
    b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n" * 500,
    b"\r\n" * 5000,
    b"GET /%00%0d%0aX:y/../../etc/passwd HTTP/1.1\r\nHost: localhost\r\n\r\n",
]


def whole(rng: random.Random, *lines: bytes) -> bytes:
    """A valid request with these headers."""
    path = rng.choice(list(BODIES))
    raw = json.dumps(BODIES[path]).encode()
    return head(b"Content-Length: %d" % len(raw), *lines, first=b"POST %s HTTP/1.1" % path.encode()) + raw


class Sockets:
    """The fuzz of connections. port: of the server."""

    def __init__(self, port: int):
        self._port = port
        self._forms = [self._ambiguous, self._other, self._damaged, self._half, self._slow, self._unread, self._noise]

    def play(self, rng: random.Random) -> str:
        """Plays one random misuse of a connection; returns the outcome. Raises Fault."""
        return rng.choice(self._forms)(rng)

    def close(self) -> None:
        """Does nothing: there is nothing to close."""

    def _ambiguous(self, rng: random.Random) -> str:
        raw = rng.choice(SMUGGLING) + HIDDEN * rng.randrange(3)
        answer = exchange(self._port, [raw])
        found = outcome(answer, raw)
        if any(status < 400 for status in answer.statuses) or len(answer.statuses) > 1:
            raise Fault(f"an ambiguous request was answered with {answer.statuses}", raw)
        return f"ambiguous {found}"

    def _other(self, rng: random.Random) -> str:
        return ask(self._port, rng.choice(OTHERS))

    def _damaged(self, rng: random.Random) -> str:
        return ask(self._port, damaged_bytes(rng, rng.choice([*SMUGGLING, *OTHERS, whole(rng) * 2])))

    def _noise(self, rng: random.Random) -> str:
        return ask(self._port, rng.randbytes(rng.choice([1, 10, 1000, 100_000])))

    def _half(self, rng: random.Random) -> str:
        """Sends a part of a request; then the client disconnects in one of several ways, or closes its half."""
        raw = whole(rng)
        raw = raw[: rng.randrange(len(raw))]
        if rng.random() < 0.5:
            return f"half {ask(self._port, raw)}"
        with socket.create_connection(("127.0.0.1", self._port), timeout=60) as connection:
            connection.sendall(raw)
            time.sleep(rng.choice([0, 0.001, 0.05]))
            if rng.random() < 0.5:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        return "half left"

    def _slow(self, rng: random.Random) -> str:
        """Sends a valid request in small pieces over a second or two; it must be answered."""
        raw = whole(rng, b"Connection: close")
        size = max(1, len(raw) // rng.randrange(2, 12))
        pieces = [raw[i : i + size] for i in range(0, len(raw), size)]
        found = outcome(exchange(self._port, pieces, rng.choice([0.0, 0.05, 0.2]), rng.random() < 0.5), raw)
        if found not in ("200", "400", "429"):
            raise Fault(f"a slow writer was answered with {found}", raw)
        return f"slow {found}"

    def _unread(self, rng: random.Random) -> str:
        """Asks for a long answer, and reads little of it."""
        asked = dict(prompt="x", max_tokens=rng.choice([50, 800]), ignore_eos=True, stream=rng.random() < 0.7, n=4)
        raw = json.dumps(asked).encode()
        with socket.create_connection(("127.0.0.1", self._port), timeout=60) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.sendall(head(b"Content-Length: %d" % len(raw)) + raw)
            time.sleep(rng.choice([0, 0.02, 0.5]))
            connection.recv(rng.choice([1, 3000]))
            if rng.random() < 0.5:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        return "unread left"
