"""Ctrl-C between the steps of an engine, not within one: a step that ends in its middle leaves its state undefined."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def held_interrupts() -> Iterator[Callable[[], None]]:
    """A context in which Ctrl-C interrupts only where the given function is called, and at the end of the context.

    Pressed a second time it interrupts at once. In other threads than the main one, which no Ctrl-C interrupts, and
    where Python does not handle the signal, nothing is held.
    """
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield lambda: None
        return
    pressed = []

    def press(number: int, frame: object) -> None:
        pressed.append(frame)
        if len(pressed) > 1:
            interrupt()

    def interrupt() -> None:
        if pressed:
            frame = pressed.pop()
            pressed.clear()
            before(signal.SIGINT, frame)

    signal.signal(signal.SIGINT, press)
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, before)
        interrupt()
