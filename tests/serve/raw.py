"""HTTP over sockets, for requests that no client library would send."""

import json
import socket


def connect(server):
    """A socket to a Running server."""
    return socket.create_connection(("127.0.0.1", server.port), timeout=60)


def head(path="/v1/completions", method="POST", **headers):
    """A request's first line and headers, as bytes."""
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


def request(body, **headers):
    """A complete request, as bytes. body: bytes, or a value that is sent as JSON."""
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return head(Content_Length=len(raw), **headers) + raw


def read_all(connection):
    """All bytes until the server closes the connection."""
    made = bytearray()
    try:
        while piece := connection.recv(1 << 16):
            made += piece
    except ConnectionResetError:
        pass
    return bytes(made)


def exchange(server, raw):
    """Sends bytes, which should ask to close the connection; returns (status, rest of the answer after its headers)."""
    with connect(server) as connection:
        try:
            connection.sendall(raw)
        except (BrokenPipeError, ConnectionResetError):
            pass
        answer = read_all(connection)
    first, _, rest = answer.partition(b"\r\n\r\n")
    return (int(first.split()[1]) if first else None), rest
