"""The lines of a batch: those of its input, read as a stream, and those of its output.

An answer's line begins with its id, which is made of the line that it answers and of all that the answer depends on
besides (`line_key`). So a file of answers tells which lines it answers, and a line that has changed, or is asked of
another model, has no answer yet.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from typing import IO, Any, NamedTuple

PIECE_BYTES = 1 << 16
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
KEY_BYTES = 16
ID_PREFIX = "batch_req_"
BEGINNING = re.compile(rb'\{"id":"%b([0-9a-f]{%d})","custom_id":' % (ID_PREFIX.encode(), 2 * KEY_BYTES))


class RawLine(NamedTuple):
    """A line of the input that is not blank. number: from 1; content: without white space around it, and empty where
    the line is too long; digest: the SHA-256 of its content; end: bytes of the file up to its end."""

    number: int
    content: bytes
    digest: bytes
    end: int
    is_too_long: bool = False


class Line(NamedTuple):
    """A line of the input as it is understood. key: names it and its answer; refusal: the line of the output where it
    is no request that can be asked, else None, and then the other fields are of the request."""

    key: bytes
    refusal: bytes | None = None
    custom_id: str | None = None
    url: str = ""
    body: bytes = b""


def raw_lines(file: IO[bytes], max_bytes: int) -> Iterator[RawLine]:
    """Yields the lines of a file that are not blank; of each at most `max_bytes` are held in memory."""
    number = end = 0
    while piece := file.readline(max_bytes + 1):
        number, end = number + 1, end + len(piece)
        if len(piece) > max_bytes and not piece.endswith(b"\n"):
            digest, size = _digest_of_rest(file, piece)
            end += size
            yield RawLine(number, b"", digest, end, is_too_long=True)
            continue
        content = (piece.removeprefix(BYTE_ORDER_MARK) if number == 1 else piece).strip()
        if content:
            yield RawLine(number, content, hashlib.sha256(content).digest(), end)


def _digest_of_rest(file: IO[bytes], begun: bytes) -> tuple[bytes, int]:
    """The SHA-256 of a line that has begun, and how many more bytes it has, which are read."""
    digest, size = hashlib.sha256(begun), 0
    while piece := file.readline(PIECE_BYTES):
        digest.update(piece)
        size += len(piece)
        if piece.endswith(b"\n"):
            break
    return digest.digest(), size


def line_key(identity: bytes, *parts: bytes) -> bytes:
    """The key of a line. identity: stands for all that its answer depends on besides it; parts: its digest, and what
    tells it from lines like it."""
    return hashlib.sha256(b"lockstep batch" + b"".join([identity, *parts])).digest()[:KEY_BYTES]


def response_line(key: bytes, custom_id: str | None, status: int, body: bytes) -> bytes:
    """The line of the output, without its end, with the answer to a line of the input. body: its JSON."""
    head = f'{{"status_code":{status},"request_id":"{key.hex()}","body":'.encode("ascii")
    return _output_line(key, custom_id, head + body + b"}", b"null")


def error_line(key: bytes, custom_id: str | None, error: dict[str, Any]) -> bytes:
    """The line of the output, without its end, of a line of the input that was not asked."""
    return _output_line(key, custom_id, b"null", json.dumps(error, separators=(",", ":")).encode("ascii"))


def _output_line(key: bytes, custom_id: str | None, response: bytes, error: bytes) -> bytes:
    beginning = f'{{"id":"{ID_PREFIX}{key.hex()}","custom_id":{json.dumps(custom_id)},"response":'
    return b'%b%b,"error":%b}' % (beginning.encode("ascii"), response, error)


def error_of(output_line: bytes) -> str:
    """The message of a line of the output that is an error."""
    line = json.loads(output_line)
    body = (line["response"] or {}).get("body")
    error = line["error"] or (body.get("error") if isinstance(body, dict) else None)
    return str(error["message"]) if isinstance(error, dict) and "message" in error else json.dumps(body)


def key_of(output_line: bytes) -> bytes | None:
    """The key of a line of the output; None for a line that is none."""
    found = BEGINNING.match(output_line)
    return None if found is None else bytes.fromhex(found[1].decode("ascii"))
