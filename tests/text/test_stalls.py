"""What is a stall: a call that holds Python's global lock, not a machine that runs something else."""

import os
import signal
import subprocess
import sys
import time
from itertools import repeat
from pathlib import Path

from tests.text.stalls import BRIEF, longest_stall

ROOT = Path(__file__).resolve().parents[2]
WAITS = """
from tests.text.stalls import longest_stall
with longest_stall() as longest:
    print("begun", flush=True)
    input()
print(longest[0])
"""


def test_a_call_that_holds_the_lock_is_a_stall_as_long_as_it_takes():
    with longest_stall() as longest:
        began = time.thread_time()
        sum(repeat(1, 60_000_000))  # one call, in which the interpreter never lets another thread run
        held = time.thread_time() - began
    assert held > 0.05 and longest[0] > 0.9 * held - 0.02


def test_a_process_that_may_not_run_has_no_stall():
    child = subprocess.Popen(
        [sys.executable, "-c", WAITS], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with child:
        assert child.stdout.readline() == "begun\n"
        child.send_signal(signal.SIGSTOP)
        assert os.WIFSTOPPED(os.waitpid(child.pid, os.WUNTRACED)[1])
        time.sleep(2 * BRIEF)
        child.send_signal(signal.SIGCONT)
        said, _ = child.communicate("\n")
    assert child.returncode == 0 and float(said) < BRIEF / 4
