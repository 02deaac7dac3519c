"""Runs the rounds of a study in this process or in several, which share the windows; results come in one order."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, Self

from lockstep.ptq.observers import Stat
from lockstep.runtime.threads import Team
from lockstep.study.scoring.subject import Subject, load_subject
from lockstep.study.trial_bench import Bench, Outcome
from lockstep.study.trials import Study

SECONDS_TO_END = 5


class Workers:
    """A context: `jobs` processes, each with a rig of its own and its share of the threads.

    subject: the model in this process, which does all work if jobs is 1. Other processes are started with the first
    round.
    """

    def __init__(
        self, study: Study, subject: Subject, stats: Mapping[str, Stat], jobs: int, threads: int, team: Team
    ) -> None:
        self._study, self._subject, self._stats, self._team = study, subject, stats, team
        self._jobs, self._threads = jobs, max(1, threads // jobs)
        self._bench: Bench | None = None
        self._started: list[tuple[BaseProcess, Any]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for process, connection in self._started:
            connection.close()
            process.terminate()
        for process, _ in self._started:
            process.join(SECONDS_TO_END)

    def round(self, windows: Sequence[int], trials: Sequence[int]) -> Iterator[Outcome]:
        """The outcomes of `Bench.round`, each of all windows together."""
        if self._jobs == 1:
            self._bench = self._bench or Bench(self._study, self._subject, self._stats, self._team)
            return self._bench.round(windows, trials)
        return self._elsewhere(windows, trials)

    def _elsewhere(self, windows: Sequence[int], trials: Sequence[int]) -> Iterator[Outcome]:
        if not self._started:
            with interrupts_wait():
                for _ in range(self._jobs):
                    self._started.append(self._start())
        shares = [list(windows[i :: self._jobs]) for i in range(self._jobs)]
        busy = [worker for worker, share in zip(self._started, shares, strict=True) if share]
        for (process, connection), share in zip(self._started, shares, strict=True):
            if share:
                try:
                    connection.send((share, list(trials)))
                except OSError:
                    raise _lost(process) from None
        for _ in range(len(trials) + 1):
            yield _joined([_received(process, connection) for process, connection in busy])

    def _start(self) -> tuple[BaseProcess, Any]:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        args = self._study, self._stats, self._threads, theirs
        process = context.Process(target=_work, args=args, daemon=True)
        process.start()
        theirs.close()
        return process, ours


@contextlib.contextmanager
def interrupts_wait() -> Iterator[None]:
    """A context in which processes are started: Ctrl-C takes effect at its end, and never reaches those processes.

    A started process inherits the blocked signal. Otherwise Ctrl-C would end it with a traceback of its own until its
    interpreter has come as far as `_work`.
    """
    noted: list[int] = []
    is_main = threading.current_thread() is threading.main_thread()
    resource_tracker.ensure_running()  # a tracker that starts with the first process would unblock the signal
    before = signal.signal(signal.SIGINT, lambda number, frame: noted.append(number)) if is_main else None
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if is_main:
            signal.signal(signal.SIGINT, before)
    if noted:
        signal.raise_signal(signal.SIGINT)


def _joined(parts: Sequence[Outcome]) -> Outcome:
    """The parts of an outcome that several processes computed, as one; the failure of the earliest window counts."""
    made, failures = Outcome(parts[0].trial), [part.failure for part in parts if part.failure]
    made.weights = parts[0].weights
    made.windows = dict(sorted(item for part in parts for item in part.windows.items()))
    made.layers_run, made.layers_saved = (sum(getattr(p, f) for p in parts) for f in ("layers_run", "layers_saved"))
    made.failure = min(failures, default=None)
    return made


def _lost(process: BaseProcess) -> OSError:
    process.join(SECONDS_TO_END)
    return OSError(f"a process of the study ended before its work was done (exit code {process.exitcode})")


def _received(process: BaseProcess, connection: Connection) -> Outcome:
    try:
        found: Any = connection.recv()
    except (EOFError, OSError):
        raise _lost(process) from None
    if isinstance(found, Exception):
        raise found
    return found


def _work(study: Study, stats: Mapping[str, Stat], threads: int, connection: Connection) -> None:
    """Runs the rounds that a process is sent, until the other end of its connection is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the first process, which ends this one
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    with (
        contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError),
        contextlib.closing(Team(threads)) as team,
    ):
        try:
            subject = load_subject(study.model, study.length, study.weights, "f32")
            bench = Bench(study, subject, stats, team)
            while True:
                windows, trials = connection.recv()
                for outcome in bench.round(windows, trials):
                    connection.send(outcome)
        except (ValueError, MemoryError, OSError) as error:
            connection.send(error)
