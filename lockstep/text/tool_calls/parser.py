"""Finds tool calls in the text of an answer, which comes in pieces."""

from lockstep.text.tool_calls.events import Arguments, CallEnd, Content, Event, partial
from lockstep.text.tool_calls.readers import Calls, NotACall, Reader
from lockstep.text.tool_calls.styles import Style
from lockstep.text.tool_calls.tools import ToolUse

SPACE_AND_BRACKETS = " \t\r\n}]"
MAX_REST = 200  # characters between a call and its end


class CallParser:
    """Turns pieces of text into Content, CallStart and Arguments events; how the pieces are cut changes nothing.

    style: how this model writes calls, see styles.py. use: the ToolUse; of calls that may not be parallel only the
    first is told. What cannot be read as a call stays content. White space around
    calls is dropped.
    """

    def __init__(self, style: Style, use: ToolUse) -> None:
        self._style, self._calls = style, Calls(use.tools, None if use.parallel else 1, style.marks)
        self._held, self._raw, self._raw_count = "", [], 0
        self._reader: Reader | None = None
        self._at_start, self._after_call, self._lacks_end = True, False, False

    def push(self, text: str) -> list[Event]:
        """The events that a piece of text completes."""
        made = []
        while text:
            text = self._scan(text, made) if self._reader is None else self._read(self._reader, text, made)
        return made + self._calls.take()

    def finish(self, is_cut: bool = False) -> list[Event]:
        """What was held back, now that nothing follows. A first call that was cut off before its name stays text; of
        another one, and of a mark after a call, nothing is told. Arguments that are not complete are completed, so that
        they are JSON, unless is_cut: the answer was as long as it might be, and more of them would have followed."""
        made: list[Event] = [*self._calls.take()]
        if self._reader is not None and self._calls.count > self._raw_count and not is_cut:
            return made + self._closed(self._reader)
        cut = self._calls.count if self._reader is not None else self._is_cut_mark()
        rest = "" if cut else "".join(self._raw) if self._reader else self._held
        if rest.strip() or (rest and not self._calls.count):
            made.append(Content(rest))
        self._reader, self._held, self._raw = None, "", []
        return made

    def _closed(self, reader: Reader) -> list[Event]:
        """The events that are left where the answer ended within a call that is told."""
        rest = ""
        try:
            reader.throw(CallEnd())
        except CallEnd as end:
            rest = end.text
        except (NotACall, StopIteration):
            pass
        made: list[Event] = [*self._calls.take()]
        if not rest and made and isinstance(made[-1], Arguments):
            made[-1] = made[-1]._replace(is_cut=True)
        self._over()
        return made + self.push(rest) + self.finish()

    def _is_cut_mark(self) -> bool:
        marks, held = (self._style.begin, *self._style.after), self._held.strip()
        return self._after_call and any(mark.startswith(held) for mark in marks)

    # ------------------------------------------------------------ text between calls

    def _scan(self, text: str, made: list[Event]) -> str:
        """Passes text on up to the next call; returns what is left of it then."""
        text = self._held + text
        self._held = ""
        if self._after_call:
            text = self._after(text)
        first = self._style.first
        if first and self._at_start and text.lstrip().startswith(first):
            return self._enter("", text.lstrip(), text)
        at = text.find(self._style.begin)
        if at >= 0:
            self._content(text[:at].rstrip(), made)
            return self._enter(self._style.begin, text[at + len(self._style.begin) :], text[:at])
        keep = self._to_hold(text)
        self._content(text[:keep], made)
        self._held = text[keep:]
        return ""

    def _after(self, text: str) -> str:
        """Drops what ends or separates calls, and what stands between a call and its end."""
        marks, end = self._style.after, self._style.end
        while True:
            text = text.lstrip(SPACE_AND_BRACKETS if self._lacks_end else None)
            found = next((mark for mark in marks if text.startswith(mark)), None) or self._rest_of_call(text)
            if found is None:
                break
            text = text[len(found) :]
            self._lacks_end = self._lacks_end and end is not None and not found.endswith(end)
        may_end = self._lacks_end and end and len(text) < MAX_REST and self._style.begin not in text
        self._after_call = not text or bool(may_end) or any(m.startswith(text) for m in (self._style.begin, *marks))
        return text

    def _rest_of_call(self, text: str) -> str | None:
        """The beginning of a text up to a mark that belongs to the call before it; None if there is none."""
        if not self._lacks_end or self._style.end is None:
            return None
        before = text[:MAX_REST].partition(self._style.begin)[0]
        places = [(at, mark) for mark in self._style.after if (at := before.find(mark)) >= 0]
        return before[: min(places)[0] + len(min(places)[1])] if places else None

    def _to_hold(self, text: str) -> int:
        """From where on text may yet belong to a call: white space, or what could begin one."""
        if self._after_call:
            return 0
        end = len(text) - partial(text, self._style.begin)
        return len(text[:end].rstrip())

    def _content(self, text: str, made: list[Event]) -> None:
        if text:
            made += [*self._calls.take(), Content(text)]
            self._at_start = False

    # ------------------------------------------------------------ inside a call

    def _enter(self, begin: str, rest: str, before: str) -> str:
        """A call seems to begin; what it is read from is kept, in case that it is none."""
        space = before[len(before.rstrip()) :] if begin else before[: len(before) - len(before.lstrip())]
        self._raw, self._raw_count = [space + begin], self._calls.count
        reader = self._style.read(self._calls)
        next(reader)
        self._reader, self._after_call = reader, False
        return rest

    def _read(self, reader: Reader, text: str, made: list[Event]) -> str:
        """Gives text to the reader; returns what is left of it."""
        send = reader.send
        for at, character in enumerate(text):
            try:
                send(character)
            except StopIteration:
                self._over()
                return text[at + 1 :]
            except NotACall:
                self._give_up(text[:at], "", made)
                return text[at:]
            except CallEnd as end:
                self._give_up(text[: at + 1], end.text, made)
                return end.text + text[at + 1 :]
        if self._raw_count == self._calls.count:
            self._raw.append(text)
        return ""

    def _over(self) -> None:
        self._reader, self._after_call, self._lacks_end = None, True, True

    def _give_up(self, text: str, mark: str, made: list[Event]) -> None:
        """What was read is no call, or not all of one. mark: what ended it, which is read again."""
        if self._raw_count < self._calls.count:
            self._over()
            return
        self._reader = None
        self._content(("".join(self._raw) + text).removesuffix(mark), made)
