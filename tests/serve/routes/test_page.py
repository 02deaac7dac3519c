"""The page's files as a browser gets them, and the figures that it shows."""

import hashlib
import re

import httpx
import pytest

from lockstep.serve.routes import page
from tests.serve.server import running

KEY = "s3cret"
MARKED = page.FOLDER / "marked" / "marked.esm.js"


@pytest.fixture(scope="module")
def server():
    with running(api_keys=[KEY]) as made:
        yield made


def get(server, path, **headers):
    return httpx.get(f"{server.url}{path}", headers=headers, timeout=60)


def test_every_file_is_served_with_its_type_and_a_strict_policy(server):
    kinds = {"": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
    assert len(page.FILES) >= 7 and "/" in page.FILES
    for where, path in page.FILES.items():
        found = get(server, where)
        assert found.status_code == 200 and found.content == path.read_bytes()
        assert found.headers["content-type"].split(";")[0] == kinds[where.rpartition(".")[2].strip("/")]
        policy = found.headers["content-security-policy"]
        assert policy.startswith("default-src 'none';") and "unsafe" not in policy and "http" not in policy
        assert found.headers["x-content-type-options"] == "nosniff"


def test_a_browser_that_has_a_file_does_not_get_it_again(server):
    first = get(server, "/page/app.js")
    assert first.headers["cache-control"] == "no-cache"
    again = get(server, "/page/app.js", **{"if-none-match": first.headers["etag"]})
    assert again.status_code == 304 and again.content == b"" and again.headers["etag"] == first.headers["etag"]
    assert get(server, "/page/app.js", **{"if-none-match": '"other"'}).status_code == 200


@pytest.mark.parametrize(
    "path", ["/page/", "/page/nothing.js", "/page/../http/page.py", "/page/%2e%2e/llm.py", "/page/index.html/x"]
)
def test_nothing_else_can_be_had(server, path):
    with httpx.Client(base_url=server.url, headers={"authorization": f"Bearer {KEY}"}, timeout=300) as client:
        assert client.get(path).status_code == 404


def test_files_load_nothing_from_elsewhere_and_never_parse_markup():
    for path in page.FILES.values():
        text = path.read_text()
        assert path == MARKED or not re.search(r"https?://(?!www\.w3\.org/2000/svg)", text), path
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|Function\(", text), path
        assert not re.search(r"\sstyle=|\son\w+=", text), path


def test_the_parser_of_markdown_is_the_one_that_is_documented():
    words = (page.FOLDER.parents[2] / "docs" / "page.md").read_text("utf-8")
    version = re.match(r"/\*\*\n \* marked v([\d.]+) ", MARKED.read_text("utf-8"))[1]
    assert f"marked {version}" in words and hashlib.sha256(MARKED.read_bytes()).hexdigest() in words
    assert "MarkedJS" in (MARKED.parent / "LICENSE").read_text("utf-8")


def test_figures_want_the_key_and_the_page_does_not(server):
    assert get(server, "/").status_code == 200
    assert get(server, "/page/figures").status_code == 401
    found = get(server, "/page/figures", authorization=f"Bearer {KEY}")
    assert found.headers["cache-control"] == "no-store"
    assert {
        "model": "lockstep",
        "state": "ready",
        "can_chat": True,
        "thinking": None,
        "writes_markdown": False,
        "running": 0,
        "waiting": 0,
        "pages_used": 0,
        "system_fingerprint": server.service.fingerprint,
    }.items() <= found.json().items()


def test_figures_count_what_happens(server):
    key = {"authorization": f"Bearer {KEY}"}
    before = get(server, "/page/figures", **key).json()
    body = dict(prompt=[5] * 600, max_tokens=5, ignore_eos=True)
    for _ in range(2):
        assert httpx.post(f"{server.url}/v1/completions", json=body, headers=key, timeout=60).status_code == 200
    after = get(server, "/page/figures", **key).json()
    assert after["generated_tokens"] - before["generated_tokens"] == 10
    assert after["hit_tokens"] > before["hit_tokens"] and after["query_tokens"] > before["query_tokens"]
