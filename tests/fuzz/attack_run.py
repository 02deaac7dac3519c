"""Plays the attacks of attacks.py one after the other against a server. Those that once kept a server from ending are
played against new servers, which get a SIGTERM."""

import shutil
import signal
import subprocess
import threading
import time
from collections import Counter
from pathlib import Path

import lockstep
from lockstep.new_files import scratch_folder
from tests.fuzz.attacks import ATTACKS, CHAT, Attack, post, template
from tests.fuzz.liveness import MOST_GROWTH_MB, Liveness
from tests.serve.chatting import HELLO
from tests.serve.program import Program, program

OPTIONS = ("--name", "lockstep", "--max-requests", 8, "--max-context", 2048, "--kv-tokens", 16384)
DRAIN = 3  # seconds: --drain-timeout
GRACE = DRAIN + 5 + 2  # seconds: interrupted answers have 5 s to reach their clients, then the process ends
SETTLE_SECONDS = 1.0


class Table:
    """Prints a line for each attack. faults: the problems of all attacks."""

    def __init__(self) -> None:
        self.faults: list[str] = []

    def line(self, name: str, *columns: str, problems: list[str]) -> None:
        """Prints a line. problems: the faults of this attack."""
        print(f"{name:44} {' '.join(columns)}{''.join(f'  FAULT: {each}' for each in problems)}", flush=True)
        self.faults += [f"{name}: {each}" for each in problems]


def play_all() -> int:
    """Plays all attacks; returns 1 if there was a fault."""
    table = Table()
    with scratch_folder() as folder:
        path = folder / "model"
        shutil.copytree(Path(lockstep.__file__).parent / "bundled", path)
        (path / "chat_template.jinja").write_text(template())
        with program(path, *OPTIONS) as made:
            _play_http(made, table)
        print(f"\nSIGTERM in the middle, with --drain-timeout {DRAIN}: the process has to end within {GRACE} s")
        for attack in ATTACKS:
            if attack.stops:
                _play_signal(path, attack, table)
    print(f"\n{len(table.faults)} faults" + "".join(f"\n  {each}" for each in table.faults))
    return 1 if table.faults else 0


def _play_http(made: Program, table: Table) -> None:
    usual = dict(messages=HELLO, max_tokens=2)
    assert post(CHAT, usual)(made.port) == [200], "the template has to work, so that its triggers are reached"
    for attack in ATTACKS[-5:]:
        attack.play(made.port)  # so that memory that is taken once is taken before it is measured
    alive = Liveness(made)
    try:
        print(f"{'attack':44} {'answers':22} {'seconds':>7} {'gap':>6} {'slowdown':>8} {'MB':>6}")
        for attack in ATTACKS:
            _play_one(made, alive, attack, table)
        print(f"in all: {alive.words()}; {alive.grown_mb:+.0f} MB")
    finally:
        alive.close()
    said = "".join(made.said)
    if "Traceback" in said:
        table.line("the log", problems=[f"a traceback: {said[said.index('Traceback') :][:2000]}"])


def _play_one(made: Program, alive: Liveness, attack: Attack, table: Table) -> None:
    began, problems = time.monotonic(), []
    try:
        found = Counter(attack.play(made.port))
    except Exception as error:
        found, problems = Counter(), [f"{type(error).__name__}: {error}"]
    seconds = time.monotonic() - began
    time.sleep(SETTLE_SECONDS)
    made.check_alive()
    problems += [str(stall) for stall in alive.new_stalls() if stall.is_fault]
    problems += [f"answered with {status}" for status in found if status not in attack.allowed]
    if alive.grown_mb > MOST_GROWTH_MB:
        problems.append(f"{alive.grown_mb:.0f} MB more than before")
    slowdown = alive.machine.slowdown(began, time.monotonic())
    answers = ", ".join(f"{status}: {count}" if count > 1 else str(status) for status, count in sorted(found.items()))
    columns = f"{answers:22}", f"{seconds:7.2f}", f"{alive.health.longest(began):6.3f}", f"{slowdown:8.1f}"
    table.line(attack.name, *columns, f"{alive.grown_mb:+6.0f}", problems=problems)


def _play_signal(path: Path, attack: Attack, table: Table) -> None:
    """Sends SIGTERM to a server while an attack, which is repeated, keeps it busy."""
    with program(path, *OPTIONS, "--drain-timeout", DRAIN) as made:
        for _ in range(3):
            threading.Thread(target=_quietly, args=(attack, made.port), daemon=True).start()
        time.sleep(0.5)
        began = time.monotonic()
        made.signal(signal.SIGTERM)
        problems = []
        try:
            code = made.process.wait(6 * GRACE)
            problems += [f"exit code {code}"] if code else []
        except subprocess.TimeoutExpired:
            problems.append("it goes on")
        seconds = time.monotonic() - began
    problems += [f"{seconds:.1f} s"] if seconds > GRACE else []
    table.line(attack.name, f"ended {seconds:5.2f} s after SIGTERM", problems=problems)


def _quietly(attack: Attack, port: int) -> None:
    """Plays an attack, without an error where the server ends meanwhile."""
    try:
        attack.play(port)
    except OSError:
        pass
