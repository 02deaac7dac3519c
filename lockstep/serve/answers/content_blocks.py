"""Answers as a list of blocks (thoughts, texts, tool calls), as /v1/messages and /v1/responses report them."""

from dataclasses import dataclass, field

from lockstep.text.tool_calls.events import CallStart, Content, Reasoning

KINDS = {Content: "text", Reasoning: "thought", CallStart: "call"}


@dataclass
class Block:
    """One block. kind: "text", "thought" or "call"; index: its position in the answer; call: the CallStart of a call;
    pieces: its text, or the JSON text of a call's arguments; tokens: the Tokens of a text, where the parser gives them;
    is_cut: whether the answer ended within a call's arguments, which the parser then completed."""

    kind: str
    index: int
    call: CallStart | None = None
    pieces: list[str] = field(default_factory=list)
    tokens: list = field(default_factory=list)
    is_cut: bool = False

    @property
    def text(self) -> str:
        """All pieces, joined."""
        return "".join(self.pieces)


class Blocks:
    """Collects a parser's events in blocks. all: the blocks that have begun."""

    def __init__(self) -> None:
        self.all = []
        self._open = None

    def add(self, events):
        """Yields the changes of new events: ("open", block, None), ("piece", block, event), ("close", block, None)."""
        for event in events:
            kind = KINDS.get(type(event), "call")
            if self._open is None or kind != self._open.kind or isinstance(event, CallStart):
                yield from self.close()
                self._open = Block(kind, len(self.all), event if kind == "call" else None)
                self.all.append(self._open)
                yield "open", self._open, None
            if not isinstance(event, CallStart):
                self._open.pieces.append(event.text)
                self._open.tokens += getattr(event, "tokens", ())
                self._open.is_cut = getattr(event, "is_cut", False)
                yield "piece", self._open, event

    def close(self):
        """Yields the change ("close", block, None) if a block is open."""
        if self._open is not None:
            yield "close", self._open, None
            self._open = None


def collect(events):
    """The blocks of a complete answer's events."""
    blocks = Blocks()
    for _ in blocks.add(events):
        pass
    return blocks.all
