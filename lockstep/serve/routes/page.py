"""The web page at /: its files, and the figures that it shows."""

import dataclasses
import hashlib
import pathlib
from typing import Any

from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from lockstep.engine.generation_config import for_talking
from lockstep.serve.answers.json_response import to_json
from lockstep.serve.service import Service

FOLDER = pathlib.Path(__file__).resolve().parent.parent / "page"
BUNDLED = FOLDER.parents[1] / "bundled"  # the model whose answers are Python, not Markdown
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
# nothing from other hosts, no inline script or style, no frame around the page; no text becomes markup, except through
# the Trusted Types policy `entities`, which lets nothing pass but one character reference (markdown.js)
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types entities"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-cache",
}
COUNTS = ("running", "waiting", "pages", "query_tokens", "hit_tokens", "generated_tokens")
FILES = {
    ("/" if path.name == "index.html" else f"/page/{path.relative_to(FOLDER).as_posix()}"): path
    for path in sorted(FOLDER.rglob("*"))
    if path.suffix in TYPES
}


def routes(service: Service):
    async def figures(request):
        content = to_json(figures_of(service))
        return Response(content, headers={"cache-control": "no-store"}, media_type="application/json")

    files = [Route(where, File(path), methods=["GET"]) for where, path in FILES.items()]
    return [*files, Route("/page/figures", figures)]


def figures_of(service: Service):
    """The figures of /page/figures: {name: value}. Counts are 0 while the model is loading.

    What the page's controls show until the reader moves them: sampling; thinking, whose `variable` of the chat template
    switches thoughts on and off, None where none does; writes_markdown.
    """
    chat, llm = service.chat, service.llm
    figures: dict[str, Any] = dict(
        model=service.model_name,
        state=service.state,
        system_fingerprint=service.fingerprint,
        can_chat=service.tokenizer is not None and service.tokenizer.has_chat_template,
    )
    figures["sampling"] = None if llm is None else for_talking(llm.sampling_defaults)
    figures["thinking"] = dataclasses.asdict(chat.thinking) if chat and chat.thinking else None
    figures["writes_markdown"] = llm is not None and llm.path != BUNDLED
    counts = dict.fromkeys(COUNTS, 0) | service.counts()
    figures |= {name: counts[name] for name in COUNTS}
    return figures | dict(pages_used=counts["pages"] - counts.get("pages_free", 0) - counts.get("pages_idle", 0))


class File:
    """The ASGI endpoint of one file, which browsers cache and revalidate: 304 as long as it has not changed."""

    def __init__(self, path) -> None:
        self._content, self._type = path.read_bytes(), TYPES[path.suffix]
        self._tag = f'"{hashlib.sha256(self._content).hexdigest()[:32]}"'

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        cached_tags = dict(scope["headers"]).get(b"if-none-match", b"").decode("latin-1")
        headers = HEADERS | {"etag": self._tag}
        if self._tag in cached_tags:
            response = Response(status_code=304, headers=headers)
        else:
            response = Response(self._content, headers=headers, media_type=self._type)
        await response(scope, receive, send)
