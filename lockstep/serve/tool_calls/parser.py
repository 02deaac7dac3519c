"""Finds tool calls in the text of an answer, which comes in pieces."""
import re

from lockstep.serve.tool_calls.events import Content, partial
from lockstep.serve.tool_calls.readers import Calls, NotACall


class CallParser:
    """Turns pieces of text into Content, CallStart and Arguments events; how the pieces are cut changes nothing.

    style: how this model writes calls, see styles.py. use: the ToolUse; of calls that may not be parallel only the
    first is told. What cannot be read as a call stays content. White space around
    calls is dropped.
    """

    def __init__(self, style, use):
        self._style, self._calls = style, Calls(use.tools, None if use.parallel else 1)
        self._held, self._reader, self._raw, self._raw_count = "", None, [], 0
        self._at_start, self._after_call = True, False

    def push(self, text):
        """The events that a piece of text completes."""
        made = []
        while text:
            text = self._scan(text, made) if self._reader is None else self._read(text, made)
        return made + self._calls.take()

    def finish(self):
        """What was held back, now that nothing follows. A first call that was cut off before its name stays text; of
        another one, and of a mark after a call, nothing is told."""
        made = self._calls.take()
        cut = self._calls.count if self._reader is not None else self._is_cut_mark()
        rest = "" if cut else "".join(self._raw) if self._reader else self._held
        if rest.strip() or rest and not self._calls.count:
            made.append(Content(rest))
        self._reader, self._held, self._raw = None, "", []
        return made

    def _is_cut_mark(self):
        marks, held = (self._style.begin, *self._style.after), self._held.strip()
        return self._after_call and any(mark.startswith(held) for mark in marks)

    # ------------------------------------------------------------ text between calls

    def _scan(self, text, made):
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
            return self._enter(self._style.begin, text[at + len(self._style.begin):], text[:at])
        keep = self._to_hold(text)
        self._content(text[:keep], made)
        self._held = text[keep:]
        return ""

    def _after(self, text):
        """Drops what ends or separates calls."""
        dropped = self._style.after
        while True:
            text = text.lstrip()
            found = next((mark for mark in dropped if text.startswith(mark)), None)
            if found is None:
                break
            text = text[len(found):]
        self._after_call = not text or any(mark.startswith(text) for mark in (self._style.begin, *dropped))
        return text

    def _to_hold(self, text):
        """From where on text may yet belong to a call: white space, or what could begin one."""
        if self._after_call:
            return 0
        end = len(text) - partial(text, self._style.begin)
        return len(text[:end].rstrip())

    def _content(self, text, made):
        if text:
            made += [*self._calls.take(), Content(text)]
            self._at_start = False

    # ------------------------------------------------------------ inside a call

    def _enter(self, begin, rest, before):
        """A call seems to begin; what it is read from is kept, in case that it is none."""
        space = re.match(r"\s*", before) if not begin else re.search(r"\s*\Z", before)
        self._raw, self._raw_count = [space[0] + begin], self._calls.count
        self._reader, self._after_call = self._style.read(self._calls), False
        next(self._reader)
        return rest

    def _read(self, text, made):
        """Gives text to the reader; returns what is left of it."""
        send = self._reader.send
        for at, character in enumerate(text):
            try:
                send(character)
            except StopIteration:
                self._reader, self._after_call = None, True
                return text[at + 1:]
            except NotACall:
                self._give_up(text[:at], made)
                return text[at:]
        if self._raw_count == self._calls.count:
            self._raw.append(text)
        return ""

    def _give_up(self, text, made):
        """What was read is no call, or the end of one is missing."""
        self._reader = None
        if self._raw_count == self._calls.count:
            self._content("".join(self._raw) + text, made)
        else:
            self._after_call = True
