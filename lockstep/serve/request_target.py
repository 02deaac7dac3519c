"""Checks of a request's method, target, Host and Expect headers."""

import ipaddress
import re

import httptools

HOST = re.compile(r"[a-z0-9_]([a-z0-9._-]*[a-z0-9_])?")
ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/\s?#@*]+")
HOST_AND_PORT = re.compile(r"(\[[^]]*\]|[^:]*)(?::\d*)?")  # a name or an address in brackets, and a port


def head_problem(method, version, target, headers):
    """What is wrong with a request's method, target and Host, in one sentence, or None.

    method, target: bytes; version: such as "1.1"; headers: [(name in lower case, value), ...].
    """
    hosts = [value for name, value in headers if name == b"host"]
    if len(hosts) > 1 or (version == "1.1" and not hosts):
        return f"expected one Host header, got {len(hosts)}"
    if method == b"CONNECT":
        return "CONNECT: this server is no proxy"
    try:
        parsed = httptools.parse_url(target)
    except httptools.HttpParserInvalidURLError:
        return f"the request's target is neither a path nor a URL: {quoted(target)}"
    if not parsed.path or not parsed.path.isascii():
        return f"the request's target has no path of ASCII characters: {quoted(target)}"
    if parsed.host is not None and hosts and name_of(parsed.host) != name_of(hosts[0]):
        return f"the request's target and its Host name different hosts: {quoted(target)} and {quoted(hosts[0])}"
    return None


def unknown_expectation(version, headers):
    """The first expectation in a request's Expect headers that is not 100-continue, or None. HTTP/1.0 has none.

    version, headers: as for `head_problem`.
    """
    values = [value for name, value in headers if name == b"expect"] if version == "1.1" else []
    parts = [part.strip() for value in values for part in value.split(b",")]
    return next((part for part in parts if part.lower() not in (b"", b"100-continue")), None)


def quoted(raw):
    """A client's bytes in quotes, cut to a length that fits a sentence."""
    return repr(raw[:80].decode("latin-1"))


def name_of(host):
    """The name or address in a Host header, bytes: in lower case, without port, brackets and the dot of a full name."""
    text = host.decode("latin-1").strip().lower()
    found = HOST_AND_PORT.fullmatch(text)
    return (found[1] if found else text).strip("[]").removesuffix(".")


def is_local_name(name):
    """Whether a name (from `name_of`) is an address, or a name of this machine that nobody else can own."""
    try:
        return name == "localhost" or name.endswith(".localhost") or bool(ipaddress.ip_address(name))
    except ValueError:
        return False


def host_name(text: str) -> str:
    """A name or address that a Host header may have, normalized by `name_of`. ValueError for anything else."""
    name = name_of(text.encode("latin-1", "replace"))
    if not (HOST.fullmatch(name) or is_local_name(name)):
        raise ValueError(f"expected a name such as ai.example.org, an address, or *, got {text!r}")
    return name


def origin(text: str) -> str:
    """An origin as browsers write it. ValueError for anything else, such as a URL with a path."""
    found = text.lower().removesuffix("/")
    if not (ORIGIN.fullmatch(found) or found == "null"):
        raise ValueError(f"expected an origin such as https://example.org or chrome-extension://ID, or *, got {text!r}")
    return found
