"""Shared by all kinds of fuzz: sending bytes to a server, and deciding which answers are faults."""

import re
import socket
import time
from collections.abc import Iterable
from typing import NamedTuple

# statuses that are right for some request
CLEAR = {200, 400, 401, 403, 404, 405, 408, 413, 415, 417, 429, 431}
# what is the server's and not the request's, but said by name
NAMED = {(503, "connections_full"), (503, "timeout"), (504, "timeout")}
STATUS = re.compile(rb"HTTP/1\.1 (\d{3}) [A-Z]")
CODE = re.compile(rb'"code":\s*"([a-z_]+)"')
ERROR_EVENT = re.compile(rb'^data: \{"error":.*"code":\s*"(internal_error|engine|not_finite)"', re.MULTILINE)
PATIENCE = 60.0


class Fault(Exception):
    """Behaviour that must not happen. content: the input that caused it; suffix: of a file with the input."""

    def __init__(self, message: str, content: bytes, suffix: str = ".bin"):
        super().__init__(message)
        self.content, self.suffix = content, suffix


class Answer(NamedTuple):
    """The statuses of all complete answers, all received bytes, and the seconds until the end."""

    statuses: list[int]
    raw: bytes
    seconds: float


def exchange(port: int, pieces: Iterable[bytes], pause: float = 0.0, half_closes: bool = True) -> Answer:
    """Sends pieces, `pause` seconds apart, closes its half of the connection and reads until the server closes."""
    began, got = time.monotonic(), bytearray()
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as connection:
        try:
            for number, piece in enumerate(pieces):
                time.sleep(pause if number else 0)
                connection.sendall(piece)
            if half_closes:
                connection.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # the server refused it before all of it was sent; the refusal can still be read
        read_all(connection, got)
    statuses = [int(each) for each in STATUS.findall(got) if each != b"100"]
    return Answer(statuses, bytes(got), time.monotonic() - began)


def read_all(connection: socket.socket, got: bytearray) -> None:
    """Adds received bytes to `got` until the server closes. TimeoutError where it takes too long."""
    try:
        while piece := connection.recv(1 << 16):
            got += piece
    except (ConnectionResetError, BrokenPipeError):
        pass


def outcome(answer: Answer, sent: bytes) -> str:
    """An Answer in a word, such as "200", "closed" or "503 connections_full". Raises Fault for a wrong answer."""
    if not answer.statuses:
        if answer.raw:
            raise Fault(f"no HTTP: {answer.raw[:200]!r}", sent)
        return "closed"
    if found := ERROR_EVENT.search(answer.raw):
        raise Fault(f"{found[1].decode()} within a stream: {found[0][:300]!r}", sent)
    for status in answer.statuses:
        if status in CLEAR:
            continue
        code = CODE.search(answer.raw)
        if (status, code and code[1].decode()) not in NAMED:
            raise Fault(f"{status}: {answer.raw[:1000]!r}", sent)
        return f"{status} {code[1].decode()}"
    return str(answer.statuses[0])


def ask(port: int, raw: bytes, **options) -> str:
    """Sends bytes; returns the outcome. Raises Fault, also for an answer that does not end."""
    try:
        return outcome(exchange(port, [raw], **options), raw)
    except TimeoutError:
        raise Fault(f"no end of the answer in {PATIENCE:g} s", raw) from None
