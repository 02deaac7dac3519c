"""Log-probabilities in the shapes of OpenAI's two routes, and prompt_logprobs in vLLM's."""

from collections.abc import Sequence
from typing import Any

from lockstep.engine.request import Request
from lockstep.serve.answers.json_response import Parts, in_parts
from lockstep.serve.errors import wrong_field
from lockstep.text.tokenizer.tokenizer import Detokenizer, Tokenizer, answer_detokenizer


def token_text(tokenizer: Tokenizer | None, token_id):
    """A token's text; "bytes:..." where its bytes alone are not text; "token_id:..." without a tokenizer."""
    if tokenizer is None:
        return f"token_id:{token_id}"
    raw = tokenizer.token_bytes(token_id)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


class LegacyLogprobs:
    """Log-probabilities of one sequence in the shape of /v1/completions: parallel lists, alternatives by their text.

    with_prompt: whether the prompt's tokens come before those of the answer. Tokens must be asked for once, in order.
    text_offset counts characters from the first token.
    """

    def __init__(self, tokenizer: Tokenizer | None, request: Request, with_prompt: bool) -> None:
        self._tokenizer, self._request, self._with_prompt, self._offset = tokenizer, request, with_prompt, 0
        self._reader = None
        if tokenizer is not None:
            self._reader = Detokenizer(tokenizer) if with_prompt else answer_detokenizer(tokenizer, request)

    def part(self, start: int, end: int) -> dict[str, list]:
        """The columns for output tokens start .. end, and with start 0 for the prompt's tokens before them."""
        return self._columns(*self._token_values(start, end))

    def skip(self, num_output: int) -> None:
        """Leaves out the first output tokens, if any, and the prompt's before them."""
        if num_output:
            before = self._request.prompt_ids if self._with_prompt else []
            for token_id in [*before, *self._request.output_ids[:num_output]]:
                self._advance(token_id)

    def whole(self, num_output: int) -> dict[str, Parts]:
        """The columns for the first `num_output` output tokens of a finished request, as Parts.

        top_logprobs is the largest column and comes first: making its parts fills the other columns.
        """
        ids, logprobs, tops = self._token_values(0, num_output)
        columns: dict[str, list] = dict(tokens=[], token_logprobs=[], text_offset=[])

        def alternatives(start: int, end: int) -> list:
            part = self._columns(ids[start:end], logprobs[start:end], tops[start:end])
            for name, column in columns.items():
                column += part[name]
            return part["top_logprobs"]

        filled = {
            name: in_parts(len(ids), lambda start, end, column=column: column[start:end])
            for name, column in columns.items()
        }
        return dict(top_logprobs=in_parts(len(ids), alternatives), **filled)

    def _token_values(self, start: int, end: int) -> tuple[list[int], list[float | None], list[dict | None]]:
        """Ids, log-probabilities and alternatives of tokens; None for a prompt's first token, which has neither."""
        request = self._request
        ids, logprobs = request.output_ids[start:end], request.logprobs[start:end]
        tops = _filled(request.top_logprobs[start:end], len(ids))
        if start or not self._with_prompt:
            return ids, [*logprobs], tops
        prompt_tops = _filled([None, *request.prompt_top_logprobs], len(request.prompt_ids))
        return request.prompt_ids + ids, [None, *request.prompt_logprobs, *logprobs], prompt_tops + tops

    def _columns(self, ids: list[int], logprobs: list[float | None], tops: list[dict | None]) -> dict[str, list]:
        top_logprobs = [self._alternatives(*each) for each in zip(ids, logprobs, tops, strict=True)]
        offsets, texts = zip(*map(self._advance, ids), strict=True) if ids else ((), ())
        return dict(tokens=list(texts), token_logprobs=logprobs, top_logprobs=top_logprobs, text_offset=list(offsets))

    def _alternatives(self, token_id: int, logprob: float | None, top: dict | None) -> dict[str, float] | None:
        """{text: log-probability} of the alternatives, best first, and of the token itself. Where several ids have the
        same text, the best one counts."""
        if logprob is None:
            return None
        by_text: dict[str, float] = {}
        for other, value in top.items() if top else ():
            by_text.setdefault(token_text(self._tokenizer, other), value)
        by_text.setdefault(token_text(self._tokenizer, token_id), logprob)
        return by_text

    def _advance(self, token_id):
        """(text_offset, text) of the next token. The first token of a text loses the space that detokenizing drops."""
        offset, text = self._offset, token_text(self._tokenizer, token_id)
        if self._reader is None:
            return offset, text
        begins_text, shown = self._reader.at_start, self._reader.push(token_id)
        self._offset += len(shown)
        return offset, shown if begins_text and text == " " + shown else text


def _filled(tops: Sequence[dict | None], num_tokens: int) -> list[dict | None]:
    """Alternatives of `num_tokens` tokens: {} for tokens without any."""
    return [*tops, *[{}] * (num_tokens - len(tops))]


def chat_logprobs(tokenizer: Tokenizer, request: Request, start: int, end: int) -> dict[str, Any]:
    """Log-probabilities of output tokens start .. end in the shape of /v1/chat/completions: an object for each."""
    tops = request.top_logprobs or [{}] * end
    tokens = zip(request.output_ids[start:end], request.logprobs[start:end], tops[start:end], strict=True)
    return dict(content=[token_logprob(tokenizer, *token) for token in tokens], refusal=None)


def all_chat_logprobs(tokenizer: Tokenizer, request: Request) -> dict[str, Any]:
    """Log-probabilities of all output tokens of a finished request in the shape of /v1/chat/completions, as Parts."""
    return dict(
        refusal=None,
        content=in_parts(
            len(request.output_ids), lambda start, end: chat_logprobs(tokenizer, request, start, end)["content"]
        ),
    )


def token_logprob(tokenizer: Tokenizer, token_id: int, logprob: float, top: dict[int, float] | None) -> dict[str, Any]:
    """The object of one token and its alternatives. top: {id: log-probability} of the alternatives, or None."""
    alternatives = [_without_alternatives(tokenizer, other, value) for other, value in (top or {}).items()]
    return _without_alternatives(tokenizer, token_id, logprob) | dict(top_logprobs=alternatives)


def _without_alternatives(tokenizer: Tokenizer, token_id: int, logprob: float) -> dict[str, Any]:
    return dict(token=token_text(tokenizer, token_id), logprob=logprob, bytes=list(tokenizer.token_bytes(token_id)))


def check_prompt_logprobs(fields) -> None:
    """ApiError 400 for prompt_logprobs in a stream, or beside echo with logprobs, which reports the same."""
    if fields.prompt_logprobs is None:
        return
    if fields.stream:
        raise wrong_field("prompt_logprobs", "not in a stream, expected none or stream to be false", "unsupported")
    if getattr(fields, "echo", None) and fields.logprobs is not None:
        raise wrong_field(
            "prompt_logprobs", "expected none beside echo with logprobs, which reports the same", "unsupported"
        )


def prompt_logprobs(tokenizer: Tokenizer | None, request) -> Parts:
    """Log-probabilities of a finished request's prompt in vLLM's shape, an array: None for the first token, then
    {id: {"logprob", "rank", "decoded_token"}} of the alternatives and of the prompt's token, whose rank is None where
    it is not among the alternatives."""
    tops = request.prompt_top_logprobs or [{}] * len(request.prompt_logprobs)
    tokens = list(zip(request.prompt_ids[1:], request.prompt_logprobs, tops, strict=True))

    def elements(start: int, end: int) -> list[dict | None]:
        made: list[dict | None] = [_prompt_logprob(tokenizer, *each) for each in tokens[max(0, start - 1) : end - 1]]
        return made if start else [None, *made]

    return in_parts(1 + len(tokens), elements)


def _prompt_logprob(tokenizer: Tokenizer | None, token_id: int, logprob: float, top: dict[int, float]) -> dict:
    ranked: dict[int, tuple[float, int | None]] = {}
    for rank, (other, value) in enumerate(top.items(), 1):
        ranked[other] = value, rank
    ranked.setdefault(token_id, (logprob, None))
    return {
        str(other): dict(logprob=value, rank=rank, decoded_token=token_text(tokenizer, other))
        for other, (value, rank) in ranked.items()
    }
