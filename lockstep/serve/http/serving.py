"""Listening: sockets, uvicorn and its bounds."""
import socket

import uvicorn

BACKLOG = 1024


def bind(host, port):
    """A socket that listens. ValueError, in one sentence, if that is not possible."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    made = socket.socket(family)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        made.bind((host, port))
        made.listen(BACKLOG)
    except OSError as error:
        made.close()
        raise ValueError(f"cannot listen on {host} port {port}: {error.strerror or error}") from None
    return made


def make_server(app, limits):
    """The uvicorn server of an application."""
    config = uvicorn.Config(app, loop="asyncio", http="httptools", ws="none", lifespan="on", log_config=None,
                            access_log=False, server_header=False, backlog=BACKLOG, timeout_keep_alive=75)
    return uvicorn.Server(config)
