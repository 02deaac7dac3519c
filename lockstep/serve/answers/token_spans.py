"""Which tokens the pieces of an answer's text came from, where their log-probabilities are asked for."""

from lockstep.text.tool_calls.events import Content, Reasoning


class Placed:
    """A parser that takes Tokens and whose Content has those that it came from, each token once.

    Tokens of marks, of calls and of thoughts belong to no text.
    """

    def __init__(self, parser) -> None:
        self._parser = parser
        # what no event has told: its text, and (begin, end, Token, or None where that was told) of its tokens
        self._text, self._tokens = "", []

    def push(self, tokens):
        """The events that tokens complete."""
        return [event for token in tokens for event in self._push(token)]

    def finish(self, is_cut: bool = False):
        """What was held back, now that nothing follows. is_cut: the answer was as long as it might be."""
        return [self._placed(event, 0) for event in self._parser.finish(is_cut)]

    def _push(self, token):
        begin = len(self._text)
        self._text += token.text
        self._tokens.append((begin, len(self._text), token))
        left = len(token.text)
        return [self._placed(event, left) for event in (self._parser.push(token.text) if token.text else [])]

    def _placed(self, event, length):
        """length: of the newest token, of which alone something may be left after a part of a call."""
        if not isinstance(event, (Content, Reasoning)):
            self._forget(max(0, len(self._text) - length))
            return event
        begin = max(0, self._text.find(event.text))
        end = begin + len(event.text)
        found = [token for b, e, token in self._tokens if b < end and (e > begin or b == e == begin)]
        self._forget(end)
        return event._replace(tokens=tuple(filter(None, found))) if isinstance(event, Content) else event

    def _forget(self, end) -> None:
        self._text = self._text[end:]
        self._tokens = [
            (max(0, b - end), e - end, token if b >= end else None)
            for b, e, token in self._tokens
            if e > end or b == e == end
        ]
