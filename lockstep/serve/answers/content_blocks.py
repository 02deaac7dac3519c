"""Answers as blocks: thoughts, texts and tool calls, one after the other, in Anthropic's and OpenAI's newer API."""

from dataclasses import dataclass, field

from lockstep.text.tool_calls.events import CallStart, Content, Reasoning

KINDS = {Content: "text", Reasoning: "thought", CallStart: "call"}


@dataclass
class Block:
    """One block. kind: "text", "thought" or "call"; index: its place; call: the CallStart of a call; pieces: its text,
    or the JSON text of its arguments; tokens: those that the pieces of a text came from, as far as they are known;
    is_cut: the answer ended within its arguments, which were completed."""

    kind: str
    index: int
    call: CallStart | None = None
    pieces: list[str] = field(default_factory=list)
    tokens: list = field(default_factory=list)
    is_cut: bool = False

    @property
    def text(self) -> str:
        """All pieces."""
        return "".join(self.pieces)


class Blocks:
    """Collects a parser's events in blocks. all: those that have begun."""

    def __init__(self) -> None:
        self.all = []
        self._open = None

    def add(self, events):
        """Yields what events do, in order: ("open", block, None), ("piece", block, event), ("close", block, None)."""
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
        """Closes the block that is open, if there is one."""
        if self._open is not None:
            yield "close", self._open, None
            self._open = None


def collect(events):
    """The blocks of all events of an answer."""
    made = Blocks()
    for _ in made.add(events):
        pass
    return made.all
