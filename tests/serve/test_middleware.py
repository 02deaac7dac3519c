"""Access: foreign web pages, foreign host names, and the separation of several API keys."""

import httpx
import pytest

from tests.serve.raw import exchange, head
from tests.serve.server import running

PATHS = ["/health", "/ready", "/", "/metrics", "/v1/models", "/tokenizer_info", "/nowhere", "/page/figures"]


@pytest.mark.parametrize(
    "origin, host, status",
    [
        ("http://evil.example", None, 403),
        ("null", None, 403),
        ("https://evil.example", "127.0.0.1", 403),
        ("http://127.0.0.1:9", None, 403),
        ("http://localhost:80", "localhost:80", 200),
        ("http://[::1]", "[::1]", 200),
        ("https://localhost", "localhost", 200),
        ("file://", None, 403),
        ("chrome-extension://abc", None, 403),
        ("chrome-extension://localhost:80", "localhost:80", 403),
        ("vscode-file://vscode-app", None, 403),
    ],
)
def test_pages_from_elsewhere_are_refused(server, origin, host, status):
    """Browsers send a text/plain body to any origin without a preflight request."""
    headers = {"Origin": origin, "Host": host or f"127.0.0.1:{server.port}", "Content-Type": "text/plain"}
    got = httpx.post(f"{server.url}/v1/completions", content='{"prompt": "x", "max_tokens": 1}', headers=headers)
    assert got.status_code == status and (status == 200 or got.json()["error"]["code"] == "origin_not_allowed")


@pytest.mark.parametrize(
    "host, allowed",
    [
        ("evil.example", False),
        ("evil.example:8000", False),
        ("localhost.evil.example", False),
        ("", False),
        ("127.0.0.1.nip.io", False),
        ("a:b:c", False),
        ("[evil]", False),
        ("localhost", True),
        ("LOCALHOST:80", True),
        ("localhost.", True),
        ("x.localhost:1", True),
        ("127.0.0.1", True),
        ("10.1.2.3:80", True),
        ("[::1]:80", True),
        ("[fe80::1]", True),
    ],
)
def test_without_keys_a_name_that_could_be_another_s_is_refused_on_every_route(server, host, allowed):
    """To a browser, a page whose own name points to this machine's address has the server's origin."""
    for path in PATHS:
        status, body = exchange(
            server, head(path, "GET", Connection="close").replace(b"Host: localhost", b"Host: " + host.encode())
        )
        assert (status == 403 and b"host_not_allowed" in body) != allowed, (path, status)


def test_names_and_origins_that_are_allowed():
    with running(allowed_hosts=["ai.example.org", "Other:80"], cors_origins=["chrome-extension://abc"]) as made:

        def status(**headers):
            return httpx.get(f"{made.url}/v1/models", headers=headers).status_code

        assert [status(Host=host) for host in ("ai.example.org", "AI.example.org:9", "other", "x.example.org")] == [
            200,
            200,
            200,
            403,
        ]
        assert status(Origin="chrome-extension://abc") == 200 and status(Origin="chrome-extension://abd") == 403
        assert status(Host="ai.example.org", Origin="https://ai.example.org") == 200
    with running(allowed_hosts=["*"]) as made:
        assert httpx.get(f"{made.url}/v1/models", headers={"Host": "any.example"}).status_code == 200


def test_no_redirect_goes_where_a_host_says(server):
    for path in ("/health/", "/v1/models/", "/v1/completions/", "//evil.example/health/"):
        got = httpx.get(server.url + path)
        assert got.status_code in (200, 404, 405) and "location" not in got.headers, path


# ---------------------------------------------------------------- several keys


def cached(made, key, prompt, **fields):
    """The number of a prompt's tokens that the prefix cache had."""
    got = httpx.post(
        f"{made.url}/v1/completions",
        headers={"Authorization": f"Bearer {key}"},
        timeout=60,
        json=dict(prompt=prompt, max_tokens=1, **fields),
    )
    return got.json()["usage"]["prompt_tokens_details"]["cached_tokens"]


SECRET = [5 + i % 1000 for i in range(200)]
NEARLY = SECRET[:150] + [7] * 50


def test_a_key_s_owner_learns_nothing_of_what_others_asked(tmp_path):
    keys = ["alice", "mallory", "oscar"]
    with running(api_keys=keys, cache_dir=tmp_path) as made:
        assert cached(made, "alice", SECRET) == 0
        assert [cached(made, key, guess) for key, guess in (("mallory", SECRET), ("oscar", NEARLY))] == [0, 0]
        assert cached(made, "alice", SECRET) == 192 and cached(made, "mallory", SECRET) == 192
        assert cached(made, "alice", SECRET, cache_salt="mine") == 0  # cache_salt separates requests of one key, too
        assert cached(made, "alice", SECRET, cache_salt="mine") == 192
    with running(api_keys=[*reversed(keys), "eve"], cache_dir=tmp_path) as made:  # and on disk
        assert [cached(made, key, SECRET) for key in ("eve", "alice")] == [0, 192]


@pytest.mark.parametrize(
    "options",
    [dict(api_keys=["alice", "mallory"], share_prefixes=True), dict(api_keys=["alice", "alice"])],
    ids=["--share-prefixes", "one key"],
)
def test_prefixes_are_shared_where_that_is_wished(options, tmp_path):
    with running(cache_dir=tmp_path, **options) as made:
        assert [cached(made, key, SECRET) for key in (options["api_keys"][0], options["api_keys"][1])] == [0, 192]
