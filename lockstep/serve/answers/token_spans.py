"""Finds the tokens of each piece of an answer's text, so that /v1/responses can report their log-probabilities."""

from lockstep.text.tool_calls.events import Content, Reasoning


class TokenSpanParser:
    """Wraps a parser: takes Tokens, and gives Content events the Tokens of their text, each Token once.

    Tokens of markers, tool calls and thoughts belong to no Content.
    """

    def __init__(self, parser) -> None:
        self._parser = parser
        # the text that no event has covered yet, and (begin, end, Token) of its tokens in that text; the Token is None
        # where an earlier event has it already
        self._text, self._tokens = "", []

    def push(self, tokens):
        """The events that tokens complete."""
        return [event for token in tokens for event in self._push(token)]

    def finish(self, is_cut: bool = False):
        """The last events, of text that the parser held back. is_cut: whether the answer reached its token limit."""
        return self._all_with_tokens(self._parser.finish(is_cut), 0)

    def _push(self, token):
        begin = len(self._text)
        self._text += token.text
        self._tokens.append((begin, len(self._text), token))
        events = self._parser.push(token.text) if token.text else []
        return self._all_with_tokens(events, len(token.text))

    def _all_with_tokens(self, events, newest_length):
        return [self._with_tokens(event, newest_length, at == len(events)) for at, event in enumerate(events, 1)]

    def _with_tokens(self, event, newest_length, is_last):
        """The event, a Content with its Tokens. newest_length: characters of the newest token, the only one whose text
        may continue after an event of a tool call. is_last: no event follows; it is the end of the text, if it can be,
        since marks before it may hold the same letters."""
        if not isinstance(event, (Content, Reasoning)):
            self._drop_text(max(0, len(self._text) - newest_length))
            return event
        find = self._text.rfind if is_last and self._text.endswith(event.text) else self._text.find
        begin = max(0, find(event.text))
        end = begin + len(event.text)
        tokens = [
            token
            for token_begin, token_end, token in self._tokens
            if token_begin < end and (token_end > begin or token_begin == token_end == begin)
        ]
        self._drop_text(end)
        return event._replace(tokens=tuple(filter(None, tokens))) if isinstance(event, Content) else event

    def _drop_text(self, end) -> None:
        """Drops the text before `end`, and the tokens that lie in it altogether."""
        self._text = self._text[end:]
        self._tokens = [
            (max(0, token_begin - end), token_end - end, token if token_begin >= end else None)
            for token_begin, token_end, token in self._tokens
            if token_end > end or token_begin == token_end == end
        ]
