"""Runs the rounds of a study in this process or in several, which share the windows; results come in one order."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing import resource_tracker
from multiprocessing.process import BaseProcess
from typing import Any, Protocol, Self

from lockstep.ptq.observers import Stat
from lockstep.runtime.threads import Team
from lockstep.study.scoring.subject import Subject, load_subject
from lockstep.study.trial_bench import Bench, Outcome
from lockstep.study.trials import Study

SECONDS_TO_END = 5


class Started(Protocol):
    """A process that runs rounds. connection: to it."""

    connection: Any

    def kill(self) -> object:
        """Ends it at once."""
        ...

    def why(self) -> str:
        """Why it ended, after its connection has: a few words."""
        ...


class Elsewhere(Protocol):
    """What starts processes on other machines (`replicas.ray_carrier.RayCluster`)."""

    def start(self, function: Callable[..., object], *args: Any, cores: int) -> Started:
        """Runs function(connection, *args)."""
        ...


class LocalProcess:
    """A process of this machine."""

    def __init__(self, *args: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection: Any
        self.connection, theirs = context.Pipe()
        self._process: BaseProcess = context.Process(target=work, args=(theirs, *args), daemon=True)
        self._process.start()
        theirs.close()

    def kill(self) -> None:
        """Ends it."""
        self._process.terminate()
        self._process.join(SECONDS_TO_END)

    def why(self) -> str:
        """Its exit code."""
        self._process.join(SECONDS_TO_END)
        return f"exit code {self._process.exitcode}"


class Workers:
    """A context: `jobs` processes, each with a rig of its own and its share of the threads.

    subject: the model in this process, which does all work if jobs is 1. Other processes are started with the first
    round: on this machine, or elsewhere, where each has all the threads.
    """

    def __init__(
        self,
        study: Study,
        subject: Subject,
        stats: Mapping[str, Stat],
        jobs: int,
        threads: int,
        team: Team,
        elsewhere: Elsewhere | None = None,
    ) -> None:
        self._study, self._subject, self._stats, self._team = study, subject, stats, team
        self._jobs, self._threads = jobs, threads if elsewhere else max(1, threads // jobs)
        self._cluster, self._bench = elsewhere, None
        self._started: list[Started] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for each in self._started:
            each.connection.close()
        for each in self._started:
            each.kill()

    def round(self, windows: Sequence[int], trials: Sequence[int]) -> Iterator[Outcome]:
        """The outcomes of `Bench.round`, each of all windows together."""
        if self._jobs == 1 and self._cluster is None:
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
        for worker, share in zip(self._started, shares, strict=True):
            if share:
                try:
                    worker.connection.send((share, list(trials)))
                except OSError:
                    raise _lost(worker) from None
        for _ in range(len(trials) + 1):
            yield _joined([_received(worker) for worker in busy])

    def _start(self) -> Started:
        args = self._study, self._stats, self._threads
        return LocalProcess(*args) if self._cluster is None else self._cluster.start(work, *args, cores=self._threads)


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


def _lost(worker: Started) -> OSError:
    return OSError(f"a process of the study ended before its work was done ({worker.why()})")


def _received(worker: Started) -> Outcome:
    try:
        found: Any = worker.connection.recv()
    except (EOFError, OSError):
        raise _lost(worker) from None
    if isinstance(found, Exception):
        raise found
    return found


def work(connection: Any, study: Study, stats: Mapping[str, Stat], threads: int) -> None:
    """Runs the rounds that a process is sent, until the other end of its connection is closed."""
    if threading.current_thread() is threading.main_thread():
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
