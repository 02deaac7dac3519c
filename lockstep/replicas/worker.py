"""A replica: an engine in a process of its own, for a front at the other end of a connection.

The process ends when the connection does: a front that was killed leaves no replica behind.
"""

import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

from lockstep.engine.async_engine import EngineThread, keep_loaded
from lockstep.engine.engine import Engine
from lockstep.engine.request import Request
from lockstep.engine.selfcheck.check import NUMERICS
from lockstep.loading import LoadedModel
from lockstep.native.host import UnfitMachine
from lockstep.receipts.form import mask_of
from lockstep.receipts.masks import SERVER_SECONDS
from lockstep.receipts.verify import Verification, Verifier
from lockstep.replicas.messages import (
    BEGUN,
    READ,
    WAITS,
    Asked,
    Beat,
    Cancel,
    Close,
    Failed,
    Loading,
    Ready,
    Refusal,
    Stage,
    Step,
    Submit,
    Verified,
    Verify,
)
from lockstep.replicas.name_log import NameLog
from lockstep.replicas.updates import Sent
from lockstep.text.grammars.structured import Grammars

BEAT_SECONDS = 0.25
PROGRESS_SECONDS = 0.1
log = logging.getLogger("lockstep.replicas")


class Replica:
    """Runs what comes over a connection, and tells its front what each step gave. See `messages`."""

    def __init__(self, model: LoadedModel, connection: Any) -> None:
        self._model, self._connection = model, connection
        engine = model.engine
        assert isinstance(engine, Engine), "a replica has an engine of its own"
        self._engine: Engine = engine
        self._sending, self._ended = threading.Lock(), threading.Event()
        self._sent: dict[int, Sent] = {}  # by the id of the engine's request
        self._requests: dict[int, Request] = {}  # by the front's number
        self._verifications: dict[int, tuple[int, Verification]] = {}  # by the id of the engine's request
        self._names = NameLog(engine.scheduler)
        self._grammars: Grammars | None = None
        self._making, self._verifying = threading.Lock(), ThreadPoolExecutor(1, "lockstep verifier")
        self._verifier: Verifier | None = None
        engine.scheduler.on_admitted = self._admitted
        self._thread = EngineThread(engine, self._advanced, self._stopped)
        threading.Thread(target=self._beat, name="lockstep beat", daemon=True).start()

    def run(self) -> None:
        """Answers messages until the connection ends or a Close comes."""
        self.send(Ready(self._model.model_part, NUMERICS, os.getpid()))
        keep_loaded()
        while True:
            match self._connection.recv():
                case Submit(asked):
                    self.send(Stage(READ, [each.number for each in asked]))
                    for each in asked:
                        self._guarded(each.number, lambda each=each: self._submit(each))
                    self.send(Stage(WAITS, [each.number for each in asked]))
                case Cancel(numbers):
                    found = [self._requests[number] for number in numbers if number in self._requests]
                    self._thread.send("cancel", *found)
                case Verify() as asked:
                    begin = self._guarded, asked.number, lambda asked=asked: self._verify(asked)
                    self._verifying.submit(*begin)  # masks of forms may take long: requests go on meanwhile
                case Close():
                    break
        self._ended.set()
        self._verifying.shutdown(wait=False, cancel_futures=True)
        self._thread.close()

    def send(self, message: Any) -> None:
        """Sends a message; any thread may."""
        with self._sending:
            self._connection.send(message)

    def _guarded(self, number: int, begin: Callable[[], None]) -> None:
        """Begins something; tells the front where it cannot run here."""
        try:
            begin()
        except (ValueError, RuntimeError) as error:
            self.send(Refusal(number, str(error)))

    def _submit(self, asked: Asked) -> None:
        params = replace(asked.params, logits_mask=self._mask(asked.form))
        made = self._engine.make_known(
            asked.prompt_ids.tolist(),
            params,
            asked.known,
            asked.prediction.tolist(),
            priority=asked.priority,
            cache_salt=asked.cache_salt,
            is_moved=asked.is_moved,
        )
        self._sent[made.id], self._requests[asked.number] = Sent(asked.number, made), made
        self._thread.send("submit", made)

    def _mask(self, form: dict[str, Any] | None) -> Any:
        return mask_of(form, self._made_grammars(), self._model.vocab_size, self._engine.eos_ids)

    def _made_grammars(self) -> Grammars | None:
        with self._making:
            if self._grammars is None and self._model.has_tokenizer:
                self._grammars = Grammars(self._model.tokenizer, self._engine.eos_ids, self._model.vocab_size)
            return self._grammars

    def _verify(self, asked: Verify) -> None:
        if self._verifier is None:
            self._verifier = Verifier(self._model.model_part, self._engine, self._made_grammars)
            self._verifier.mask_seconds = SERVER_SECONDS
        given = asked.given._replace(logits_mask=self._mask(asked.form))
        begun = self._verifier.begin(asked.statement, given, asked.cache_salt)
        if begun.request is None:
            self.send(Verified(asked.number, begun.finish()))
            return
        self._verifications[begun.request.id] = asked.number, begun
        self._thread.send("submit", begun.request)

    # ------------------------------------------------------------ the engine's thread

    def _admitted(self, request: Request) -> None:
        if request.id in self._sent:
            self._tell(Stage(BEGUN, [self._sent[request.id].number]))

    def _advanced(self, requests: list[Request]) -> None:
        updates = []
        for request in requests:
            if request.id in self._sent:
                updates.append(self._sent[request.id].update())
                if request.finish_reason is not None:
                    del self._requests[self._sent.pop(request.id).number]
            elif request.finish_reason is not None and request.id in self._verifications:
                number, verification = self._verifications.pop(request.id)
                self._tell(Verified(number, verification.finish()))
        if updates:
            self._tell(Step(updates, self._names.changes()))

    def _stopped(self, error: BaseException, _: list[Request]) -> None:
        """Ends the process where a step failed: the front sees that at once, and starts a fresh one."""
        if not self._ended.is_set():
            log.error("the engine stopped", exc_info=error)
            self._tell(Failed(f"its engine stopped: {type(error).__name__}: {error}"))
            os._exit(1)

    def _tell(self, message: Any) -> None:
        try:
            self.send(message)
        except OSError:  # the front has ended: so does this process, by the thread that reads
            self._ended.set()

    def _beat(self) -> None:
        """Tells the front that the process is alive, also while a step takes long."""
        while not self._ended.wait(BEAT_SECONDS):
            engine = self._engine
            names = self._names.changes()
            self._tell(Beat(self._thread.seconds_in_step, engine.counts(), engine.draft_counts(), names))


class _Progress:
    """Tells the front how far the start is, at most every PROGRESS_SECONDS for each kind."""

    def __init__(self, connection: Any) -> None:
        self._connection, self._told, self._lock = connection, dict[str, float](), threading.Lock()

    def __call__(self, kind: str, done: int, total: int | None) -> None:
        import time

        now = time.monotonic()
        with self._lock:
            if done == total or now - self._told.get(kind, 0.0) >= PROGRESS_SECONDS:
                self._told[kind] = now
                self._connection.send(Loading(kind, done, total))


def run_replica(connection: Any, settings: dict[str, Any]) -> None:
    """Loads a model and runs its replica until the front ends it. settings: arguments of LoadedModel."""
    logging.getLogger("lockstep.model").setLevel(logging.ERROR)  # the front warns of the same
    try:
        model = LoadedModel(**settings, progress=_Progress(connection))
    except (ValueError, OSError, MemoryError, UnfitMachine) as error:
        connection.send(Failed(str(error) or type(error).__name__))
        return
    Replica(model, connection).run()
    model.close()


def main() -> None:
    """A replica's process. Its argument is the file descriptor of the connection, over which its settings come."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal is for the front
    connection = Connection(int(sys.argv[1]))
    try:
        run_replica(connection, connection.recv())
    except (EOFError, OSError):  # the front has ended
        os._exit(0)
    os._exit(0)  # threads of libraries do not keep the process


if __name__ == "__main__":
    main()
