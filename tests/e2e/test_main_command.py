"""superd -c DIR -- COMMAND: services beside the main command."""

from __future__ import annotations

import os
import re
import signal
import socket
from pathlib import Path
from typing import Any

import pytest
from harness import PYTHON, Superd, ask, comm, eventually, read_all, toml, wait_gone

TOOK_OVER = re.compile("took over")
COMMAND_ENDED = re.compile("the main command has ended")


def launch(superd: Superd, script: str, *options: str, **more: Any) -> None:
    superd.garbage_expected = True  # what the command itself writes is no record
    superd.start(*options, "--", "/bin/bash", "-c", script, **more)


def stubborn(superd: Superd) -> str:
    """A command that runs until a file is there, and says what it gets."""
    return f"""
        for s in TERM INT HUP QUIT USR1 USR2; do trap "echo got-$s" $s; done
        echo begun; mkfifo {superd.dir}/end
        while :; do read status <{superd.dir}/end && exit $status; done
    """


def end(superd: Superd, status: int) -> None:
    Path(superd.dir, "end").write_text(f"{status}\n")


def written(superd: Superd, text: str) -> None:
    superd.wait_line(re.compile(f"^{text}$"))


@pytest.fixture
def cat(superd: Superd) -> Superd:
    superd.write("cat", toml(listen="tcp:127.0.0.1:0", command=["/bin/cat"]))
    return superd


def test_services_are_there_first(superd: Superd) -> None:
    """The command can use what superd listens on, and its status is superd's."""
    superd.write("hello", toml(listen=f"unix:{superd.dir}/s", command=["/bin/echo", "hello"]))
    code = f"import socket; s = socket.socket(socket.AF_UNIX); s.connect({str(superd.dir / 's')!r}); print(s.recv(9))"
    launch(superd, f'{PYTHON} -I -c "{code}"; pwd; exit 41')
    written(superd, r"b'hello\\n'")
    written(superd, str(superd.dir))
    assert superd.wait_exit() == 41


@pytest.mark.parametrize(("command", "status"), [("nonexistent-program", 127), ("/etc/passwd", 126)])
def test_a_command_that_cannot_be_executed(cat: Superd, command: str, status: int) -> None:  # H5
    cat.start("--", command)
    cat.wait_record(message=re.compile(f"cannot run '{command}'"))
    assert cat.wait_exit() == status
    assert cat.garbage == []


def test_superd_cannot_start(superd: Superd) -> None:
    """The command never runs."""
    superd.garbage_expected = True
    superd.write("bad", "comand = 1")
    superd.launch("--strict", "--", "/bin/touch", f"{superd.dir}/ran")
    assert superd.wait_exit() == 78
    assert not Path(superd.dir, "ran").exists()


def test_superd_cannot_bind(cat: Superd) -> None:
    """The same, found later, and at once."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        cat.write("taken", toml(listen=f"tcp:127.0.0.1:{other.getsockname()[1]}", command=["/bin/cat"]))
        cat.launch("--strict", "--", "/bin/touch", f"{cat.dir}/ran")
        assert cat.wait_exit(timeout=8) == 71
    assert not Path(cat.dir, "ran").exists()


@pytest.mark.parametrize("single", [False, True])
def test_signals_are_the_commands(cat: Superd, single: bool) -> None:  # (e)5
    """All of them, TERM too: superd ends when the command does, and not before."""
    launch(cat, stubborn(cat), *["--single-child"] * single)
    written(cat, "begun")
    for name in ("HUP", "USR1", "USR2", "QUIT", "INT", "TERM", "TERM"):
        mark = len(cat.lines)
        os.kill(cat.pid, getattr(signal, f"SIG{name}"))
        eventually(lambda name=name, mark=mark: f"got-{name}" in cat.lines[mark:], True)  # type: ignore[misc]
    assert ask(cat.connect("cat"), b"x") == b"x"
    end(cat, 17)
    assert cat.wait_exit() == 17


def test_a_command_that_ends_by_term(cat: Superd) -> None:
    launch(cat, "echo begun; exec sleep 1000")
    written(cat, "begun")
    cat.stop(status=143)


@pytest.mark.parametrize("how", ["client", "limit", "TERM"])
def test_drain(cat: Superd, how: str) -> None:
    """Live connections go on when the command has ended, new clients wait: until the last has gone, or the time has, or
    superd is told a second time."""
    launch(cat, stubborn(cat), "--drain-timeout", {"client": "1h", "limit": "300ms", "TERM": "1h"}[how])
    written(cat, "begun")
    with cat.connect("cat") as client:
        client.sendall(b"1")
        assert client.recv(1) == b"1"
        end(cat, 3)
        cat.wait_record(message=re.compile("draining: 1 connections"))
        with cat.connect("cat") as late:
            client.sendall(b"2")
            assert client.recv(1) == b"2"
            if how == "client":
                client.shutdown(socket.SHUT_WR)
                assert read_all(client) == b""
            elif how == "TERM":
                os.kill(cat.pid, signal.SIGTERM)
            assert cat.wait_exit() == 3
            try:
                assert late.recv(1) == b""
            except ConnectionResetError:
                pass  # it never was accepted


def test_drain_without_a_command(cat: Superd) -> None:
    cat.start("--drain-timeout", "1h")
    with cat.connect("cat") as client:
        client.sendall(b"1")
        assert client.recv(1) == b"1"
        os.kill(cat.pid, signal.SIGTERM)
        cat.wait_record(message=re.compile("draining: 1 connections"))
        client.shutdown(socket.SHUT_WR)
        assert read_all(client) == b""
        assert cat.wait_exit() == 0


def test_the_command_does_not_notice(cat: Superd) -> None:  # F7 H10 X7
    """Manager and spawner are killed; it keeps its parent, and its end counts with the next manager."""
    launch(cat, stubborn(cat))
    written(cat, "begun")
    assert ask(cat.connect("cat"), b"x") == b"x"
    cat.kill_role("superd-spawner")
    cat.kill_role("superd-manager")
    cat.wait_record(message=TOOK_OVER)
    assert ask(cat.connect("cat"), b"x") == b"x"
    manager = cat.manager
    os.kill(manager, signal.SIGSTOP)
    end(cat, 23)
    (command,) = [pid for pid in cat.services() if comm(pid) == "bash"] or [0]
    if command:
        wait_gone(command)
    os.kill(manager, signal.SIGKILL)
    assert cat.wait_exit() == 23


def test_shutdown_by_superctl(cat: Superd) -> None:
    """The command is told with everything else, and superd's status is still its own."""
    launch(cat, "echo begun; exec sleep 1000")
    written(cat, "begun")
    cat.call("Shutdown")
    assert cat.wait_exit() == 143


def test_what_the_command_leaves(cat: Superd) -> None:  # G6 (e)6
    left_behind = 'trap "echo told; exit" TERM; echo begun; while :; do sleep 0.1; done'
    script = f"mkfifo {cat.dir}/end; setsid bash -c '{left_behind}' & read x <{cat.dir}/end; exit 2"
    launch(cat, script)
    written(cat, "begun")
    left = [pid for pid in cat.services() if comm(pid) == "bash"]
    end(cat, 0)
    written(cat, "told")
    assert cat.wait_exit() == 2
    assert [comm(pid) for pid in left] == [""] * len(left)


def test_environment(cat: Superd) -> None:
    """superd's own, and a service gets nothing of it."""
    cat.write("env", toml(listen="tcp:127.0.0.1:0", command=["/usr/bin/env"]))
    environment = {**os.environ, "OWN": "x y", "NOTIFY_SOCKET": f"{cat.dir}/nobody"}
    script = 'echo "[$OWN] $NOTIFY_SOCKET"; ' + stubborn(cat)
    launch(cat, script, environment=environment)
    written(cat, rf"\[x y\] {cat.dir}/nobody")
    with cat.connect("env") as client:
        assert b"OWN=" not in read_all(client)
    end(cat, 0)
    assert cat.wait_exit() == 0


def test_sockets_that_superd_was_given(superd: Superd) -> None:  # (e)14
    """Services refer to them as fd:NAME, and the command has them as it would without superd."""
    superd.write("s", toml(listen="fd:web", run="per-connection", command=["/bin/echo", "served"]))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        source = listener.fileno()
        code = (
            f"import os, sys; os.dup2({source}, 3); os.environ['LISTEN_PID'] = str(os.getpid())\n"
            "os.execv(sys.argv[1], sys.argv[1:])"
        )
        script = "test $LISTEN_PID = $$ && test -S /dev/fd/3 && echo has-it; " + stubborn(superd)
        environment = {**os.environ, "LISTEN_FDS": "1", "LISTEN_FDNAMES": "web"}
        launch(superd, script, wrapper=[PYTHON, "-I", "-c", code], pass_fds=[source], environment=environment)
        written(superd, "has-it")
        with socket.create_connection(listener.getsockname(), timeout=20) as client:
            assert read_all(client) == b"served\n"
    end(superd, 0)
    assert superd.wait_exit() == 0


def test_a_manager_that_stands_still_misses_no_end(superd: Superd) -> None:  # X8
    """40 processes end while the manager is stopped, for longer than anything waits for it: each end is told."""
    for number in range(40):
        superd.write(
            f"s{number}",
            toml(run="always-on", restart="no", command=["/bin/sh", "-c", f"sleep 1000; exit {number}"]),
        )
    superd.start()
    superd.wait_records(40, event="start")
    pids = {superd.status(f"s{number}")["pid"]: number for number in range(40)}
    manager = superd.manager
    os.kill(manager, signal.SIGSTOP)
    for pid in pids:
        os.killpg(pid, signal.SIGKILL)
    for pid in pids:
        wait_gone(pid)
    os.kill(manager, signal.SIGCONT)
    assert {row["service"] for row in superd.wait_records(40, event="exit", signal="KILL")} == {
        f"s{number}" for number in range(40)
    }
