"""`CallParser`: finds tool calls in the streamed text of an answer."""

from lockstep.text.tool_calls.events import Arguments, CallEnd, Content, Event, partial
from lockstep.text.tool_calls.readers import Calls, NotACall, Reader
from lockstep.text.tool_calls.styles import Style
from lockstep.text.tool_calls.tools import ToolUse

SPACE_AND_BRACKETS = " \t\r\n}]"
MAX_REST = 200  # characters that may stand between a call and its end mark


class CallParser:
    """Turns pieces of text into Content, CallStart and Arguments events, however the text is cut into pieces.

    style: how this model writes calls, see styles.py. use: the request's ToolUse; unless calls may be parallel, only
    the first one has events. Text that cannot be read as a call stays content. White space around calls is dropped.
    """

    def __init__(self, style: Style, use: ToolUse) -> None:
        self._style, self._calls = style, Calls(use.tools, None if use.parallel else 1, style.marks)
        # text that is held back; the text of the call that is being read, in pieces; the number of calls before it
        self._held, self._raw, self._num_before = "", [], 0
        self._reader: Reader | None = None
        self._at_start, self._after_call, self._lacks_end = True, False, False

    @property
    def is_in_call(self) -> bool:
        """Whether the text so far ends inside of a call."""
        return self._reader is not None

    def push(self, text: str) -> list[Event]:
        """The events that a piece of text completes."""
        events = []
        while text:
            text = self._scan(text, events) if self._reader is None else self._read(self._reader, text, events)
        return events + self._calls.take()

    def finish(self, is_cut: bool = False) -> list[Event]:
        """The remaining events, at the end of the answer. is_cut: the answer reached its maximum length.

        Incomplete arguments are completed to valid JSON, unless is_cut. If the answer ends before the name of its first
        call, the text of the call becomes Content; an incomplete later call or mark is dropped.
        """
        events: list[Event] = [*self._calls.take()]
        if self._reader is not None and self._calls.num_calls > self._num_before and not is_cut:
            return events + self._closed(self._reader)
        cut = self._calls.num_calls if self._reader is not None else self._is_cut_mark()
        rest = "" if cut else "".join(self._raw) if self._reader else self._held
        if rest.strip() or (rest and not self._calls.num_calls):
            events.append(Content(rest))
        self._reader, self._held, self._raw = None, "", []
        return events

    def _closed(self, reader: Reader) -> list[Event]:
        """The remaining events where the answer ended within a call whose CallStart has been returned."""
        rest = ""
        try:
            reader.throw(CallEnd())
        except CallEnd as end:
            rest = end.text
        except (NotACall, StopIteration):
            pass
        events: list[Event] = [*self._calls.take()]
        if not rest and events and isinstance(events[-1], Arguments):
            events[-1] = events[-1]._replace(is_cut=True)
        self._over()
        return events + self.push(rest) + self.finish()

    def _is_cut_mark(self) -> bool:
        marks, held = (self._style.begin, *self._style.after), self._held.strip()
        return self._after_call and any(mark.startswith(held) for mark in marks)

    # ------------------------------------------------------------ text between calls

    def _scan(self, text: str, events: list[Event]) -> str:
        """Adds Content up to the next call; returns the rest of the text."""
        text = self._held + text
        self._held = ""
        if self._after_call:
            text = self._after(text)
        first = self._style.first
        if first and self._at_start and text.lstrip().startswith(first):
            return self._enter("", text.lstrip(), text)
        at = text.find(self._style.begin)
        if at >= 0:
            self._content(text[:at].rstrip(), events)
            return self._enter(self._style.begin, text[at + len(self._style.begin) :], text[:at])
        keep = 0 if self._may_begin(text) else self._to_hold(text)
        self._content(text[:keep], events)
        self._held = text[keep:]
        return ""

    def _after(self, text: str) -> str:
        """The text without marks that end or separate calls, and without text between a call and its end mark."""
        marks, end = self._style.after, self._style.end
        while True:
            text = text.lstrip(SPACE_AND_BRACKETS if self._lacks_end else None)
            mark_text = next((mark for mark in marks if text.startswith(mark)), None) or self._rest_of_call(text)
            if mark_text is None:
                break
            text = text[len(mark_text) :]
            self._lacks_end = self._lacks_end and end is not None and not mark_text.endswith(end)
        may_end = self._lacks_end and end and len(text) < MAX_REST and self._style.begin not in text
        self._after_call = not text or bool(may_end) or any(m.startswith(text) for m in (self._style.begin, *marks))
        return text

    def _rest_of_call(self, text: str) -> str | None:
        """The beginning of the text up to and with the end mark of the call before it; None without such a mark."""
        if not self._lacks_end or self._style.end is None:
            return None
        before = text[:MAX_REST].partition(self._style.begin)[0]
        places = [(at, mark) for mark in self._style.after if (at := before.find(mark)) >= 0]
        return before[: min(places)[0] + len(min(places)[1])] if places else None

    def _to_hold(self, text: str) -> int:
        """The offset from which the text is held back: white space before a call, or the beginning of a mark."""
        if self._after_call:
            return 0
        end = len(text) - partial(text, self._style.begin)
        return len(text[:end].rstrip())

    def _may_begin(self, text: str) -> bool:
        """Whether the text is the beginning of a call at the start of an answer, without a mark."""
        first = self._style.first
        return first is not None and self._at_start and first.startswith(text.lstrip())

    def _content(self, text: str, events: list[Event]) -> None:
        if text:
            events += [*self._calls.take(), Content(text)]
            self._at_start = False

    # ------------------------------------------------------------ inside a call

    def _enter(self, begin: str, rest: str, before: str) -> str:
        """Starts the reader of a call. The call's text is kept in `_raw`, in case it turns out to be no call."""
        space = before[len(before.rstrip()) :] if begin else before[: len(before) - len(before.lstrip())]
        self._raw, self._num_before = [space + begin], self._calls.num_calls
        reader = self._style.read(self._calls)
        next(reader)
        self._reader, self._after_call = reader, False
        return rest

    def _read(self, reader: Reader, text: str, events: list[Event]) -> str:
        """Sends text to the reader; returns the rest after the end of the call."""
        send = reader.send
        for at, character in enumerate(text):
            try:
                send(character)
            except StopIteration:
                self._over()
                return text[at + 1 :]
            except NotACall:
                self._give_up(text[:at], "", events)
                return text[at:]
            except CallEnd as end:
                self._give_up(text[: at + 1], end.text, events)
                return end.text + text[at + 1 :]
        if self._num_before == self._calls.num_calls:
            self._raw.append(text)
        return ""

    def _over(self) -> None:
        self._reader, self._after_call, self._lacks_end = None, True, True

    def _give_up(self, text: str, mark: str, events: list[Event]) -> None:
        """Ends an incomplete call, or turns text that is no call into Content. mark: the text that ended the call, and
        is parsed again."""
        if self._num_before < self._calls.num_calls:
            self._over()
            return
        self._reader = None
        self._content(("".join(self._raw) + text).removesuffix(mark), events)
