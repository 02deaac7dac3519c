"""The worker process of jobs: it belongs to one process, inherits no secrets of that process, and ends with it."""

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from lockstep.text import job_process
from lockstep.text.job_process import Busy, JobProcess
from lockstep.text.job_server import COMPLETE, LENGTH, send
from lockstep.text.templates.chat_template import ChatTemplate, TemplateProcess

ROOT = Path(__file__).parents[2]
HELLO = [{"role": "user", "content": "hello"}]
ECHO = "{{ messages[0].content }}"
NEEDS_PROC = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="looks into /proc")


@pytest.fixture
def process():
    made = TemplateProcess()
    yield made
    made.jobs.close()


def says_hello(template):
    return template.render(HELLO) == "hello"


def test_nothing_is_started_before_it_is_needed(process):
    assert process.jobs.process_id is None
    ChatTemplate(ECHO, process)
    assert process.jobs.process_id is not None


def test_one_that_is_ended_is_started_again(process):
    template = ChatTemplate(ECHO, process)
    first = process.jobs.process_id
    os.killpg(first, signal.SIGKILL)  # with all copies that there are
    assert says_hello(template) and process.jobs.process_id != first


@NEEDS_PROC
def test_copies_that_are_ended_from_outside_are_asked_no_more(process):
    template = ChatTemplate(ECHO, process)
    for _ in range(3):
        for child in children(process.jobs.process_id):
            os.kill(child, signal.SIGKILL)
        assert says_hello(template)


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_who_waits_while_it_is_ended_gets_an_answer(process):
    template = ChatTemplate("{% for i in range(2000000) %}{% endfor %}" + ECHO, process)
    found = []
    threads = [threading.Thread(target=lambda: found.append(says_hello(template))) for _ in range(3)]
    for thread in threads:
        thread.start()
    time.sleep(0.02)
    os.killpg(process.jobs.process_id, signal.SIGKILL)
    for thread in threads:
        thread.join()
    assert found == [True] * 3


def test_one_that_is_kept_from_working_is_busy(process, monkeypatch):
    template = ChatTemplate(ECHO, process)
    monkeypatch.setattr(job_process, "WAIT_SECONDS", 0.2)
    slow = ChatTemplate("{% for i in range(1000000000) %}{% endfor %}", process)
    with pytest.raises(Busy, match=r"templates gave no answer in 0\.2 s") as error:
        slow.render(HELLO)
    assert error.value.code == "templates_busy"
    monkeypatch.undo()
    assert says_hello(template)


def test_one_that_cannot_be_started_is_an_error_that_says_so(monkeypatch, capfd):
    made = JobProcess("lockstep.serve.not_there", "nothing")
    with pytest.raises(RuntimeError, match="the process for nothing ended"):
        made.ask(b"")
    assert "not_there" in capfd.readouterr().err


def run(text, **options):
    """The output of a Python program that uses templates, with tests' path, and what it wrote to standard error."""
    program = textwrap.dedent(f"""
        import os, signal, socket, sys, time
        from lockstep.text.templates.chat_template import ChatTemplate, TemplateProcess
        process = TemplateProcess()
        def says(text="hello", template={ECHO!r}):
            return ChatTemplate(template, process).render([dict(role="user", content=text)])
        """) + textwrap.dedent(text)
    options = dict(env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=60, capture_output=True, text=True) | options
    return subprocess.run([sys.executable, "-P", "-c", program], **options)


def test_it_needs_no_standard_files_and_no_signals():
    done = run("""
        out = os.dup(1)
        for descriptor in (0, 1, 2):
            os.close(descriptor)
        for each in (signal.SIGCHLD, signal.SIGPROF, signal.SIGXCPU, signal.SIGINT, signal.SIGTERM, signal.SIGPIPE):
            signal.signal(each, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_SETMASK, signal.valid_signals())
        process.seconds, told = 0.2, says()
        try:
            says(template="{% for i in range(1000000000) %}{% endfor %}")
        except ValueError as error:
            told += str(error)
        os.write(out, (told + says("!")).encode())
        """)
    assert done.stdout == "hellochat template takes more than 0.2 s of the processor to render!", done.stderr


def test_a_forked_process_has_one_of_its_own():
    done = run("""
        print(says(), flush=True)
        first = process.jobs.process_id
        if os.fork() == 0:
            print(says("forked"), process.jobs.process_id != first, flush=True)
            sys.exit()
        print(os.wait()[1], says("again"), process.jobs.process_id == first)
        """)
    assert done.stdout.splitlines() == ["hello", "forked True", "0 again True"] and not done.stderr


def child(other):
    """The worker process, started by hand: its first two copies are sent to the other end of the socket `other`."""
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "lockstep.text.templates.child"],
        stdin=other,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )


def ends_in_silence(process):
    _, said = process.communicate(timeout=60)
    return (process.returncode, said) == (0, b"")


@pytest.mark.parametrize(
    "said", [b"", LENGTH.pack(9) + b"a", LENGTH.pack(0) + COMPLETE], ids=["nothing", "half", "everything"]
)
def test_it_ends_in_silence_if_the_other_side_was_gone_before_it_began(said):
    control, other = socket.socketpair()
    control.sendall(said)
    control.close()
    with other, child(other) as process:
        assert ends_in_silence(process)


@pytest.mark.parametrize("num_taken, asks", [(0, b""), (1, b""), (2, b""), (2, b"c")])
def test_it_ends_in_silence_if_the_other_side_goes_later(num_taken, asks):
    """The other side goes away with copies not yet received, with all received, and while it asks for one more."""
    control, other = socket.socketpair()
    with other, child(other) as process:
        with control:
            send(control, b"")
            control.recv(1, socket.MSG_PEEK)  # the copies come
            for _ in range(num_taken):
                _, descriptors, *_ = socket.recv_fds(control, 1, 1)
                os.close(*descriptors)
            os.kill(process.pid, signal.SIGSTOP)  # it shall not see the wish before the end
            control.sendall(asks)
        os.kill(process.pid, signal.SIGCONT)
        assert ends_in_silence(process)


@NEEDS_PROC
def test_it_inherits_nothing(tmp_path):
    (tmp_path / "jinja2.py").write_text("raise SystemExit('the current folder')")
    done = run(
        """
        import json, pathlib
        server = socket.create_server(("127.0.0.1", 0))
        os.set_inheritable(server.fileno(), True)
        says()
        pid = process.jobs.process_id
        links = [os.readlink(each) for each in pathlib.Path(f"/proc/{pid}/fd").iterdir()]
        names = [each.partition("=")[0] for each in pathlib.Path(f"/proc/{pid}/environ").read_text().split("\\0")]
        print(json.dumps([os.readlink(f"/proc/self/fd/{server.fileno()}"), links, names, os.getsid(pid) == pid]))
        """,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "SECRET": "1", "LOCKSTEP_API_KEY": "1"},
    )
    server, links, names, leads = json.loads(done.stdout)
    assert server not in links and leads and not {"SECRET", "LOCKSTEP_API_KEY"} & set(names) and "PYTHONPATH" in names


@NEEDS_PROC
def test_it_imports_little():
    done = run("""
        import pathlib
        says()
        pid = process.jobs.process_id
        maps = pathlib.Path(f"/proc/{pid}/maps").read_text()
        status = pathlib.Path(f"/proc/{pid}/status").read_text()
        print([each for each in ("numpy", "numba", "llvmlite", "tokenizers", "llguidance") if each in maps])
        print(int(status.partition("VmRSS:")[2].split()[0]))
        """)
    assert done.stdout.splitlines()[0] == "[]", done.stderr
    assert int(done.stdout.splitlines()[1]) < 48 << 10, "KiB"


@NEEDS_PROC
@pytest.mark.parametrize("working", [False, True])
def test_it_ends_with_its_process_however_that_ends(working):
    program = textwrap.dedent(f"""
        import pathlib, threading, time
        from lockstep.text.templates.chat_template import ChatTemplate, TemplateProcess
        process = TemplateProcess(seconds=60)
        template = ChatTemplate("{{% for i in range(1000000000 * {int(working)}) %}}{{% endfor %}}", process)
        threading.Thread(target=template.render, args=([],), daemon=True).start()
        children = pathlib.Path(f"/proc/{{process.jobs.process_id}}/task/{{process.jobs.process_id}}/children")
        while not children.read_text().split():
            time.sleep(0.01)
        time.sleep(0.1)  # it has begun to work
        print(process.jobs.process_id, flush=True)
        time.sleep(60)
        """)
    with subprocess.Popen(
        [sys.executable, "-P", "-c", program],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    ) as parent:
        pid = int(parent.stdout.readline())
        pids = [pid, *children(pid)]
        assert len(pids) > 1
        parent.kill()
    until = time.monotonic() + 20
    while any(map(runs, pids)) and time.monotonic() < until:
        time.sleep(0.02)
    assert not any(map(runs, pids))


def runs(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_what_a_terminal_sends_is_not_for_it(process):
    template = ChatTemplate(ECHO, process)
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.killpg(process.jobs.process_id, each)
    first = process.jobs.process_id
    assert says_hello(template) and process.jobs.process_id == first
