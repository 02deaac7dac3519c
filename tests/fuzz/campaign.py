"""Sends random inputs of all kinds to one `lockstep serve`, while another process checks that it is alive."""

import contextlib
import itertools
import random
import shutil
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import lockstep
from lockstep.new_files import scratch_folder
from lockstep.text.templates.chat_template import TemplateProcess
from tests.fuzz.bodies import BODIES, damaged_request
from tests.fuzz.client import Fault, ask
from tests.fuzz.files import Files
from tests.fuzz.grammars import Grammars
from tests.fuzz.liveness import MOST_GROWTH_MB, Liveness
from tests.fuzz.sockets import Sockets
from tests.fuzz.templates import Templates, programs, served
from tests.serve.program import Program, program
from tests.serve.server import wait_until

THREADS = dict(bodies=2, sockets=3, grammars=2)  # threads of a kind; other kinds have one
KINDS = "bodies", "sockets", "templates", "grammars", "files"
TOLD_EVERY = 10.0
MOST_FAULTS = 20  # after so many faults a kind is no longer played
# prefix cache and pages take memory as they are used, up to a bound: these options take all of it at the start
OPTIONS = ("--name", "lockstep", "--max-requests", 8, "--max-context", 1024, "--kv-tokens", 16384, "--max-queued", 64)


class Bodies:
    """The fuzz of requests: damaged requests of every route. port: of the server."""

    def __init__(self, port: int):
        self._port = port

    def play(self, rng: random.Random) -> str:
        """Sends a damaged request; returns the outcome. Raises Fault."""
        return ask(self._port, damaged_request(rng, rng.choice(list(BODIES))))

    def close(self) -> None:
        """Does nothing: there is nothing to close."""


class Played(NamedTuple):
    """One input: its kind and number, and the times of time.monotonic between which it was played."""

    kind: str
    number: int
    began: float
    ended: float


class Campaign:
    """One run. at: the number of the only input that is played; None: from 0 on, until the time is up.

    Input `number` of a kind depends on the seed, the kind and the number alone.
    """

    def __init__(self, seed: int, kinds: Sequence[str], folder: Path, at: int | None = None):
        self.seed, self.kinds, self.folder, self.at = seed, kinds, folder, at
        self.seen: dict[str, Counter[str]] = {kind: Counter() for kind in kinds}
        self.numbers = {kind: itertools.count(at or 0) for kind in kinds}
        self.faults: list[str] = []
        self.played: deque[Played] = deque(maxlen=100_000)
        self.slowest: dict[str, Played] = {}
        self.running: dict[int, Played] = {}
        self._made: dict[str, object] = {}

    def run(self, seconds: float) -> int:
        """Plays for some seconds and prints a report; returns 1 if there was a fault."""
        print(f"seed {self.seed}: {', '.join(self.kinds)} for {seconds / 60:g} minutes", flush=True)
        with self._all() as made, contextlib.ExitStack() as stack:
            self._warm(made)
            self.alive = Liveness(made)
            stack.callback(self.alive.close)
            most = self._play(made, time.monotonic() + seconds)
            self._settle(made)
            self._report(made, most)
        return 1 if self.faults else 0

    @contextlib.contextmanager
    def _all(self) -> Iterator[Program]:
        """A context with the server and all kinds of fuzz."""
        with scratch_folder() as folder, contextlib.ExitStack() as stack:
            if "files" in self.kinds:
                (folder / "files").mkdir(mode=0o700)
                self._made["files"] = Files(folder / "files")
            made = stack.enter_context(program(model_folder(folder / "model", self.seed), *OPTIONS))
            over_http = dict(bodies=Bodies, sockets=Sockets, templates=Templates, grammars=Grammars)
            self._made |= {kind: over_http[kind](made.port) for kind in self.kinds if kind in over_http}
            for each in self._made.values():
                stack.callback(each.close)
            yield made

    def _warm(self, made: Program) -> None:
        """Plays a few inputs of another seed, so that memory that is taken once is taken before it is measured."""
        for kind in set(self.kinds) & {"bodies", "grammars", "templates"}:
            for number in range(20):
                with contextlib.suppress(Fault):
                    self._made[kind].play(random.Random(f"warm {kind} {number}"))
        made.check_alive()

    def _play(self, made: Program, until: float) -> float:
        """Plays all kinds, each in threads of its own; returns the largest memory of the server."""
        many = [kind for kind in self.kinds for _ in range(1 if self.at is not None else THREADS.get(kind, 1))]
        threads = [threading.Thread(target=self._walk, args=(kind, until)) for kind in many]
        for thread in threads:
            thread.start()
        most, told = made.rss_mb, time.monotonic()
        while any(thread.is_alive() for thread in threads):
            time.sleep(0.2)
            if made.process.poll() is not None:
                self._fault("server", f"it ended with {made.process.returncode}: {''.join(made.said)[-3000:]}")
                break
            most = max(most, made.rss_mb)
            self._tell_stalls()
            if time.monotonic() - told > TOLD_EVERY:
                told = time.monotonic()
                self._tell(until - told, made.rss_mb)
        for thread in threads:
            thread.join()
        return most

    def _walk(self, kind: str, until: float) -> None:
        """Plays one kind until a time of time.monotonic."""
        while time.monotonic() < until and self.seen[kind]["FAULT"] < MOST_FAULTS:
            number, began = next(self.numbers[kind]), time.monotonic()
            self.running[threading.get_ident()] = Played(kind, number, began, float("inf"))
            try:
                outcome = self._made[kind].play(random.Random(f"{self.seed} {kind} {number}"))
            except Fault as fault:
                outcome = "FAULT"
                self._fault(f"{kind} {number}", str(fault), fault)
            except Exception as error:
                outcome = "FAULT"
                self._fault(f"{kind} {number}", f"{type(error).__name__}: {error}")
            self.seen[kind][outcome] += 1
            one = Played(kind, number, began, time.monotonic())
            self.played.append(one)
            self.slowest[kind] = max(self.slowest.get(kind, one), one, key=lambda each: each.ended - each.began)
            if self.at is not None:
                break

    def _fault(self, where: str, what: str, fault: Fault | None = None) -> None:
        kept = ""
        if fault is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            path = self.folder / f"{self.seed}-{where.replace(' ', '-')}{fault.suffix}"
            path.write_bytes(fault.content)
            kept = f" (kept in {path})"
        self.faults.append(f"{where}: {what}{kept}")
        print(f"FAULT {self.faults[-1]}", flush=True)

    def _tell(self, rest: float, rss: float) -> None:
        counts = ", ".join(f"{kind} {self.seen[kind].total()}" for kind in self.kinds)
        since = time.monotonic() - TOLD_EVERY
        print(f"{max(0, rest):5.0f} s left: {counts}; {rss:.0f} MB; {self.alive.words(since)}", flush=True)

    def _settle(self, made: Program) -> None:
        """Waits until the server is as idle as before."""
        try:
            wait_until(made.is_idle, 60)
        except Exception as error:
            self._fault("server", f"it is not idle a minute later: {error!r}")
        said = "".join(made.said)
        if "Traceback" in said:
            self._fault("server", f"it printed a traceback: {said[said.index('Traceback') :][:3000]}")

    def _tell_stalls(self) -> None:
        """Prints what was played while /health had no answer: a fault, unless the machine was slow."""
        for stall in self.alive.new_stalls():
            began, ended = stall.look.began, stall.look.began + stall.look.seconds
            many = [*self.played, *self.running.values()]
            beside = [f"{p.kind} {p.number}" for p in many if p.began <= ended and p.ended >= began]
            what = f"{stall}, beside {', '.join(dict.fromkeys(beside))[:500]}"
            if stall.is_fault:
                self._fault("health", what)
            else:
                print(f"the machine is busy: {what}", flush=True)

    def _report(self, made: Program, most: float) -> None:
        self._tell_stalls()
        if self.alive.grown_mb > MOST_GROWTH_MB:
            self._fault("memory", f"{self.alive.grown_mb:.0f} MB more than before")
        print(f"\nseed {self.seed}")
        for kind in self.kinds:
            slow = self.slowest[kind]
            print(f"{kind:10} {self.seen[kind].total():7}  {classes(self.seen[kind])}")
            print(f"{'':18}  the slowest: number {slow.number}, {slow.ended - slow.began:.1f} s")
        print(f"5xx by name: {dict(self._named()) or 'none'}")
        print(
            f"{self.alive.words()}; memory {self.alive.before_mb:.0f} MB before, {most:.0f} at most, "
            f"{made.rss_mb:.0f} after"
        )
        print(f"{len(self.faults)} faults" + "".join(f"\n  {each[:300]}" for each in self.faults), flush=True)

    def _named(self) -> Counter[str]:
        words = Counter()
        for seen in self.seen.values():
            for outcome, count in seen.items():
                for status in ("500 ", "503 ", "504 "):
                    if status in outcome:
                        words[outcome[outcome.index(status) :]] += count
        return words


def model_folder(path: Path, seed: int) -> Path:
    """Writes the bundled model with a chat template of random programs."""
    process = TemplateProcess(seconds=0.3)
    shutil.copytree(Path(lockstep.__file__).parent / "bundled", path)
    (path / "chat_template.jinja").write_text(served(programs(seed, process)))
    process.jobs.close()
    return path


def classes(seen: Counter[str]) -> str:
    """Outcomes with their counts, the commonest first."""
    return ", ".join(f"{outcome}: {count}" for outcome, count in seen.most_common())
