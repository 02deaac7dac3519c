"""Loading a model beside the event loop, which answers 503 meanwhile. A signal then ends the process at once."""

import ctypes
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, NoReturn

from lockstep.engine.async_engine import keep_loaded
from lockstep.serve.service import Service

if TYPE_CHECKING:
    from lockstep.loading import LoadedModel

UNWIND_SECONDS = 0.5  # for unfinished files and helper processes to be removed
log = logging.getLogger("lockstep.http")


class Loading:
    """A thread that loads an LLM into a Service.

    load: returns the LLM. ready: called when the service can answer. error: what went wrong; None so far.
    """

    def __init__(self, load: Callable[[], "LoadedModel"], service: Service, ready: Callable[[], None]) -> None:
        self._load, self._service, self._ready = load, service, ready
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="lockstep loading", daemon=True)

    def start(self) -> None:
        """Begins to load."""
        self._thread.start()

    def _run(self) -> None:
        try:
            self._service.open(self._load())
            if self._service.chat is not None:
                self._service.chat.grammars.warm()
            self._ready()
            keep_loaded()
        except BaseException as error:  # a library in Rust that panics raises no Exception
            self.error = error

    @property
    def is_under_way(self) -> bool:
        """Whether the model is not loaded yet."""
        return self._service.state == "loading" and self._thread.is_alive()

    def end_process(self, number: int) -> NoReturn:
        """Ends this process as a signal does that nobody handles.

        Before that the thread gets a KeyboardInterrupt and UNWIND_SECONDS: it may be deep in a compiler, in a download
        or in the disk, and nothing that it makes is found by others before it is complete. Code that is called from
        native code, such as the compiler's callbacks, swallows the interrupt and has Python print it.
        """
        signal.signal(number, signal.SIG_DFL)  # if the terminal is stopped, a second signal ends what waits for it
        sys.unraisablehook = lambda _: None
        interrupt = ctypes.py_object(KeyboardInterrupt)
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self._thread.ident or 0), interrupt)
        self._thread.join(UNWIND_SECONDS)
        log.info("ended by %s before the model was loaded", signal.Signals(number).name)
        for handler in logging.getLogger().handlers:
            handler.flush()
        if self._thread.is_alive():
            restore_terminal()
        os.kill(os.getpid(), number)
        os._exit(128 + number)  # the first process of a container ignores signals that it does not handle


def restore_terminal() -> None:
    """Shows the cursor, which bars of progress hide, and begins a line below them."""
    terminal = sys.__stderr__
    if terminal is not None and terminal.isatty():
        from rich.console import Console

        Console(file=terminal).show_cursor()
        print(file=terminal, flush=True)
