"""Ctrl-C is held until a step has ended, once."""

import os
import signal
import threading

import pytest

from lockstep.interrupts import held_interrupts


def press():
    os.kill(os.getpid(), signal.SIGINT)


def test_an_interrupt_waits_for_its_place():
    before, done = signal.getsignal(signal.SIGINT), []
    with pytest.raises(KeyboardInterrupt), held_interrupts() as interrupt:
        interrupt()
        press()
        done.append("the step")
        interrupt()
        done.append("never")
    assert done == ["the step"] and signal.getsignal(signal.SIGINT) is before


def test_the_end_of_the_context_is_a_place_and_the_second_press_does_not_wait():
    done = []
    with pytest.raises(KeyboardInterrupt), held_interrupts():
        press()
        done.append("all")
    with pytest.raises(KeyboardInterrupt), held_interrupts():
        press()
        press()
        done.append("never")
    assert done == ["all"]


def test_other_threads_and_other_handlers_are_left_alone():
    before, inside = signal.signal(signal.SIGINT, signal.SIG_IGN), []

    def thread():
        with held_interrupts() as interrupt:
            interrupt()
            inside.append(signal.getsignal(signal.SIGINT))

    try:
        with held_interrupts():
            inside.append(signal.getsignal(signal.SIGINT))
        signal.signal(signal.SIGINT, before)
        running = threading.Thread(target=thread)
        running.start()
        running.join()
    finally:
        signal.signal(signal.SIGINT, before)
    assert inside == [signal.SIG_IGN, before]
