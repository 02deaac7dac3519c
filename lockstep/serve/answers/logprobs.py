"""Log-probabilities as OpenAI's two routes and vLLM report them."""

from collections.abc import Sequence
from typing import Any

from lockstep.engine.request import Request
from lockstep.serve.answers.json_response import Parts, in_parts
from lockstep.serve.errors import wrong_field
from lockstep.text.tokenizer.tokenizer import Detokenizer, Tokenizer, answer_reader


def token_text(tokenizer: Tokenizer | None, token_id):
    """A token as text; its bytes, where they are no text by themselves; its id, where there is no tokenizer."""
    if tokenizer is None:
        return f"token_id:{token_id}"
    raw = tokenizer.token_bytes(token_id)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


class LegacyLogprobs:
    """Log-probabilities of one sequence in the shape of /v1/completions: parallel lists, alternatives by their text.

    with_prompt: those of the prompt come before those of the answer. They are asked for once, from the beginning to the
    end. text_offset counts characters from where the first begins.
    """

    def __init__(self, tokenizer: Tokenizer | None, request: Request, with_prompt: bool) -> None:
        self._tokenizer, self._request, self._with_prompt, self._offset = tokenizer, request, with_prompt, 0
        self._reader = None
        if tokenizer is not None:
            self._reader = Detokenizer(tokenizer) if with_prompt else answer_reader(tokenizer, request)

    def part(self, start: int, end: int) -> dict[str, list]:
        """Those of output tokens start .. end, and of the prompt before the first of them."""
        return self._described(*self._known(start, end))

    def whole(self, num_output: int) -> dict[str, Parts]:
        """Those of a finished request with so many output tokens.

        The alternatives, of which there are most, come first: the other lists are filled meanwhile.
        """
        ids, logprobs, tops = self._known(0, num_output)
        columns: dict[str, list] = dict(tokens=[], token_logprobs=[], text_offset=[])

        def alternatives(start: int, end: int) -> list:
            made = self._described(ids[start:end], logprobs[start:end], tops[start:end])
            for name, column in columns.items():
                column += made[name]
            return made["top_logprobs"]

        filled = {
            name: in_parts(len(ids), lambda start, end, column=column: column[start:end])
            for name, column in columns.items()
        }
        return dict(top_logprobs=in_parts(len(ids), alternatives), **filled)

    def _known(self, start: int, end: int) -> tuple[list[int], list[float | None], list[dict | None]]:
        """Ids, log-probabilities and alternatives; of a prompt's first token nothing is known."""
        request = self._request
        ids, logprobs = request.output_ids[start:end], request.logprobs[start:end]
        tops = _filled(request.top_logprobs[start:end], len(ids))
        if start or not self._with_prompt:
            return ids, [*logprobs], tops
        prompt_tops = _filled([None, *request.prompt_top_logprobs], len(request.prompt_ids))
        return request.prompt_ids + ids, [None, *request.prompt_logprobs, *logprobs], prompt_tops + tops

    def _described(self, ids: list[int], logprobs: list[float | None], tops: list[dict | None]) -> dict[str, list]:
        top_logprobs = [self._alternatives(*each) for each in zip(ids, logprobs, tops, strict=True)]
        offsets, texts = zip(*map(self._advance, ids), strict=True) if ids else ((), ())
        return dict(tokens=list(texts), token_logprobs=logprobs, top_logprobs=top_logprobs, text_offset=list(offsets))

    def _alternatives(self, token_id: int, logprob: float | None, top: dict | None) -> dict[str, float] | None:
        """{text: log-probability}, best first and with the token itself; of ids with the same text the best counts."""
        if logprob is None:
            return None
        made: dict[str, float] = {}
        for other, value in top.items() if top else ():
            made.setdefault(token_text(self._tokenizer, other), value)
        made.setdefault(token_text(self._tokenizer, token_id), logprob)
        return made

    def _advance(self, token_id):
        """Where a token's text begins, and the text: for the first of a text without the space that begins one."""
        at, text = self._offset, token_text(self._tokenizer, token_id)
        if self._reader is None:
            return at, text
        begins_text, shown = self._reader.at_start, self._reader.push(token_id)
        self._offset += len(shown)
        return at, shown if begins_text and text == " " + shown else text


def _filled(tops: Sequence[dict | None], count: int) -> list[dict | None]:
    """Alternatives of so many tokens: none were found where none were asked for."""
    return [*tops, *[{}] * (count - len(tops))]


def chat_logprobs(tokenizer: Tokenizer, request: Request, start: int, end: int) -> dict[str, Any]:
    """Those of output tokens start .. end in the shape of /v1/chat/completions: an object for each, with its bytes."""
    tops = request.top_logprobs or [{}] * end
    each = zip(request.output_ids[start:end], request.logprobs[start:end], tops[start:end], strict=True)
    return dict(content=[one_logprob(tokenizer, *of_token) for of_token in each], refusal=None)


def whole_logprobs(tokenizer: Tokenizer, request: Request) -> dict[str, Any]:
    """Those of a finished request, in parts."""
    return dict(
        refusal=None,
        content=in_parts(
            len(request.output_ids), lambda start, end: chat_logprobs(tokenizer, request, start, end)["content"]
        ),
    )


def one_logprob(tokenizer: Tokenizer, token_id: int, logprob: float, top: dict[int, float] | None) -> dict[str, Any]:
    """That of one token. top: {id: log-probability} of the likeliest in its place, or None."""
    made = _described(tokenizer, token_id, logprob)
    return made | dict(top_logprobs=[_described(tokenizer, other, value) for other, value in (top or {}).items()])


def _described(tokenizer: Tokenizer, token_id: int, logprob: float) -> dict[str, Any]:
    return dict(token=token_text(tokenizer, token_id), logprob=logprob, bytes=list(tokenizer.token_bytes(token_id)))


def check_prompt_logprobs(fields) -> None:
    """ApiError 400 where the prompt_logprobs of a completion or chat have no place in the answer."""
    if fields.prompt_logprobs is None:
        return
    if fields.stream:
        raise wrong_field("prompt_logprobs", "not in a stream, expected none or stream to be false", "unsupported")
    if getattr(fields, "echo", None) and fields.logprobs is not None:
        raise wrong_field(
            "prompt_logprobs", "expected none beside echo with logprobs, which reports the same", "unsupported"
        )


def prompt_logprobs(tokenizer: Tokenizer | None, request) -> Parts:
    """Those of a finished request's prompt as vLLM has them, an array: None for the first token, then
    {id: {"logprob", "rank", "decoded_token"}} of the likeliest tokens and of the prompt's own, whose rank is None where
    it is not among them."""
    tops = request.prompt_top_logprobs or [{}] * len(request.prompt_logprobs)
    known = list(zip(request.prompt_ids[1:], request.prompt_logprobs, tops, strict=True))

    def of_tokens(start: int, end: int) -> list[dict | None]:
        made: list[dict | None] = [_of_token(tokenizer, *each) for each in known[max(0, start - 1) : end - 1]]
        return made if start else [None, *made]

    return in_parts(1 + len(known), of_tokens)


def _of_token(tokenizer: Tokenizer | None, token_id: int, logprob: float, top: dict[int, float]) -> dict:
    ranked: dict[int, tuple[float, int | None]] = {}
    for rank, (other, value) in enumerate(top.items(), 1):
        ranked[other] = value, rank
    ranked.setdefault(token_id, (logprob, None))
    return {
        str(other): dict(logprob=value, rank=rank, decoded_token=token_text(tokenizer, other))
        for other, (value, rank) in ranked.items()
    }
