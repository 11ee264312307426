"""system/tree.py: processes below one, as /proc has them."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest
from forked import in_child

from superd.system import tree
from superd.system.tree import Process, below, environment_value

# Says its pids, then waits for stdin to end: a child in its own session, below it a grandchild, below that a zombie.
FAMILY = """
import os, sys, signal
r, w = os.pipe()
def say(): os.write(w, b"%d %d\\n" % (os.getpid(), os.getppid()))
if os.fork() == 0:
    os.setsid()
    say()
    if os.fork() == 0:
        say()
        if os.fork() == 0:
            say()
            os._exit(0)
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT)
        say()
    signal.pause()
text = b""
while text.count(b"\\n") < 4: text += os.read(r, 4096)
sys.stdout.write(text.decode()); sys.stdout.flush()
sys.stdin.read()
"""


@pytest.fixture
def family() -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    with subprocess.Popen(
        [sys.executable, "-c", FAMILY], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        pids = [int(process.stdout.readline().split()[0]) for _ in range(4)][:3]
        yield process, pids
        for pid in pids[:2]:
            os.kill(pid, signal.SIGKILL)


def test_all_descendants_parents_first(family: tuple[subprocess.Popen[str], list[int]]) -> None:
    process, (child, grandchild, zombie) = family
    found = below(process.pid)
    assert [row.pid for row in found] == [child, grandchild, zombie]
    assert [row.parent for row in found] == [process.pid, child, grandchild]
    assert [row.zombie for row in found] == [False, False, True]
    assert [row.session for row in found] == [child] * 3  # setsid does not hide it (G6)
    assert [row.group for row in found] == [child] * 3
    assert found[0].started <= found[1].started <= found[2].started
    assert [row.pid for row in below(child)] == [grandchild, zombie]
    assert below(zombie) == []
    assert set(found) <= set(below(os.getpid()))


def test_a_name_may_hold_anything() -> None:
    def child() -> list[int]:
        with open("/proc/self/comm", "w") as file:
            file.write(") R 1 1 (")
        row = tree.look(os.getpid())
        assert row is not None
        return [row.pid, row.parent, row.session, os.getpid(), os.getppid(), os.getsid(0)]

    pid, parent, session, *real = in_child(child)
    assert [pid, parent, session] == real


def test_a_process_that_has_gone() -> None:
    pid = in_child(os.getpid)
    assert below(pid) == []
    assert tree.look(pid) is None
    assert environment_value(pid, "PATH") is None


def test_no_proc(monkeypatch: pytest.MonkeyPatch) -> None:  # H12
    def missing(path: str) -> list[str]:
        raise FileNotFoundError(path)

    monkeypatch.setattr(os, "listdir", missing)
    assert below(1) == []


def test_a_pid_reused_during_the_look_makes_no_circle(monkeypatch: pytest.MonkeyPatch) -> None:  # F15, X29
    rows = {1: Process(1, 3, 1, 1, 0, False), 2: Process(2, 1, 1, 1, 0, False), 3: Process(3, 2, 1, 1, 0, False)}
    monkeypatch.setattr(os, "listdir", lambda _: [str(pid) for pid in rows])
    monkeypatch.setattr(tree, "look", rows.get)
    assert {row.pid for row in below(1)} == {1, 2, 3}


def test_environment_as_started() -> None:
    env = {"A": "first", "AB": "x=y", "EMPTY": "", "ODD": os.fsdecode(b"\xff")}
    with subprocess.Popen(["/bin/cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(b"x\n")
        process.stdin.flush()
        assert process.stdout.readline() == b"x\n"  # now it is what it was started as
        found = {name: environment_value(process.pid, name) for name in (*env, "B", "FIRST")}
        process.stdin.close()
    assert found == {**env, "B": None, "FIRST": None}


@pytest.mark.parametrize("end", [3 << 8, signal.SIGKILL])
def test_exit_status_of_one_that_somebody_else_waits_for(end: int) -> None:
    """Before it is reaped from /proc, afterwards from the pidfd where the kernel keeps it (Linux 6.15)."""
    child = os.fork()
    if child == 0:
        if end == signal.SIGKILL:
            os.kill(os.getpid(), end)
        os._exit(end >> 8)
    pidfd = os.pidfd_open(child)
    select.select([pidfd], [], [])
    assert tree.exit_status(child, pidfd) == end
    assert os.waitpid(child, 0)[1] == end
    known = tuple(map(int, os.uname().release.split(".")[:2])) >= (6, 15)
    assert tree.exit_status(child, pidfd) == (end if known else None)
    os.close(pidfd)


def test_a_living_process_has_no_exit_status() -> None:
    pidfd = os.pidfd_open(os.getpid())
    assert tree.exit_status(os.getpid(), pidfd) is None
    os.close(pidfd)
