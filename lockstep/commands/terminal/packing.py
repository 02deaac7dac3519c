"""Experts that no answer has needed: they are packed after an answer, or beside a conversation, for later starts."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from lockstep.commands.terminal.conversation import tell
from lockstep.commands.terminal.errors import is_told, sentence
from lockstep.progress import Progress

if TYPE_CHECKING:
    from lockstep.llm import LLM


def finish_packing(llm: "LLM") -> None:
    """Packs the experts that are left, and shows how far that is. Ctrl-C may end it: what is whole is kept."""
    if not llm.is_all_packed:
        with Progress() as progress, llm.reports_packing(progress):
            llm.finish_packing()


@contextmanager
def packing_beside(llm: "LLM") -> Iterator[Callable[[], None]]:
    """A context with a function that begins to pack the experts that are left, in a thread that ends with the
    context."""
    ends, thread = threading.Event(), threading.Thread(target=lambda: _pack(llm, ends), name="lockstep packing")

    def begin() -> None:
        if thread.ident is None and not llm.is_all_packed:
            thread.start()

    try:
        yield begin
    finally:
        ends.set()
        if thread.ident is not None:
            thread.join()


def _pack(llm: "LLM", ends: threading.Event) -> None:
    try:
        llm.finish_packing(ends.is_set)
    except Exception as error:  # of a damaged file, as of an answer: the conversation goes on
        if not is_told(error):
            raise
        tell(sentence(error))
