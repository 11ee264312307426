"""superctl restart --overlap: somebody serves all the time."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import PYTHON, TIMEOUT_S, Superd, comm, eventually, read_all, toml, wait_gone

# Says its pid to each client; told to stop, it takes nobody more and finishes what it has. The file `gate`, if there is
# one, is a FIFO that says how it goes on before it is ready: a word for its exit, or nothing.
SERVER = """
import os, select, signal, socket, sys
listener = socket.socket(fileno=3)
listener.setblocking(False)
if os.path.exists(sys.argv[1]):
    print("starting", os.getpid(), flush=True)
    word = open(sys.argv[1]).read().strip()
    if word:
        print("cannot read the new file", flush=True)
        sys.exit(int(word))
r, w = os.pipe()
signal.signal(signal.SIGTERM, lambda *_: os.write(w, b"x"))
with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
    notify.connect(os.environ["NOTIFY_SOCKET"])
    notify.send(b"READY=1\\nSTATUS=pid %d" % os.getpid())
while True:
    ready = select.select([listener, r], [], [])[0]
    if r in ready:
        break
    try:
        conn = listener.accept()[0]
    except BlockingIOError:  # the other one was quicker
        continue
    conn.setblocking(True)
    conn.sendall(b"%d\\n" % os.getpid())
    conn.recv(1)
    conn.close()
"""


@pytest.fixture
def superd() -> Iterator[Superd]:
    with Superd() as one:
        yield one


def write(superd: Superd, **keys: Any) -> Path:
    """The gate."""
    gate = superd.dir / "gate"
    keys = {"run": "always-on", "ready": "notify", **keys}
    superd.write(
        "s",
        toml(
            listen="tcp:127.0.0.1:0", pass_="listen-fds", command=[PYTHON, "-c", SERVER, str(gate)], **keys,
        ),
    )  # fmt: skip
    return gate


def ctl(superd: Superd, *arguments: str, code: int = 0) -> str:
    argv = [sys.executable, "-I", "-m", "superd.cli.superctl", "-s", superd.control, *arguments]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == code, (arguments, done.returncode, done.stdout, done.stderr, superd.log())
    return done.stdout + done.stderr


def overlap(superd: Superd, name: str = "s") -> tuple[threading.Thread, list[dict[str, Any]]]:
    found: list[dict[str, Any]] = []
    thread = threading.Thread(
        target=lambda: found.extend(superd.call("Restart", names=[name], overlap=True)["results"])
    )
    thread.start()
    return thread, found


def who(superd: Superd) -> int:
    with superd.connect("s") as client:
        client.sendall(b"x")
        return int(read_all(client))


def pid_of(superd: Superd) -> int:
    pid = superd.status("s")["pid"]
    assert isinstance(pid, int)
    return pid


class Load(threading.Thread):
    """50 connections a second, each with something to lose."""

    def __init__(self, superd: Superd) -> None:
        super().__init__()
        self.address = superd.address("s")
        self.done = threading.Event()
        self.failed: list[str] = []
        self.pids: list[int] = []

    def run(self) -> None:
        while not self.done.wait(0.02):
            try:
                with socket.create_connection(self.address, TIMEOUT_S) as client:
                    client.sendall(b"x")
                    self.pids.append(int(read_all(client)))
            except (OSError, ValueError) as error:
                self.failed.append(repr(error))


@pytest.mark.parametrize("keys", [{}, {"ready": "start", "notify_access": "main"}, {"run": "on-demand"}], ids=str)
def test_nothing_is_refused_or_cut(superd: Superd, keys: dict[str, Any]) -> None:
    write(superd, **keys)
    superd.start()
    before = who(superd)
    load = Load(superd)
    load.start()
    pids = [before]
    for _ in range(3):
        said = ctl(superd, "restart", "--overlap", "s")
        pids.append(pid_of(superd))
        assert f"pid {pids[-1]}" in said
        wait_gone(pids[-2])
    count = len(load.pids)
    eventually(lambda: len(load.pids) > count + 5, True)
    load.done.set()
    load.join(TIMEOUT_S)
    assert not load.failed
    assert len(set(pids)) == 4 and {*load.pids} == {*pids}
    assert superd.status("s")["state"] == "ready" and superd.status("s")["total"] == 4
    assert not superd.find_records(event="state", service="s", state="stopping")
    if superd.call("Status", names=["s"])["services"][0]["said"]:
        assert superd.call("Status", names=["s"])["services"][0]["said"] == f"pid {pids[-1]}"


def test_one_that_never_becomes_ready(superd: Superd) -> None:
    gate = write(superd)
    superd.start()
    before = who(superd)
    os.mkfifo(gate)
    gate.chmod(0o644)
    thread, results = overlap(superd)
    superd.wait_record(event="output", message=re.compile("starting"))
    eventually(lambda: superd.status("s")["now"], 2)
    assert who(superd) == before
    gate.write_text("3")
    thread.join(TIMEOUT_S)
    (result,) = results
    assert not result["ok"] and "exited with status 3" in result["note"]
    assert "cannot read the new file" in [row["message"] for row in result["records"]]
    assert pid_of(superd) == before == who(superd)
    assert superd.status("s")["state"] == "ready"
    gate.unlink()
    superd.write("s.toml.d/ready", 'ready_timeout = "200ms"')
    superd.call("Reload")
    assert pid_of(superd) == before
    os.mkfifo(gate)
    gate.chmod(0o644)
    assert "was not ready within 0.2 s" in ctl(superd, "restart", "--overlap", "s", code=1)
    eventually(lambda: superd.status("s")["now"], 1)
    assert who(superd) == before
    gate.unlink()


def test_a_program_that_is_gone(superd: Superd) -> None:
    program = superd.dir / "server"
    program.write_text(f"#!{PYTHON}\n{SERVER}")
    program.chmod(0o755)
    superd.write("s", toml(listen="tcp:127.0.0.1:0", pass_="listen-fds", run="always-on",
                           ready="notify", command=[program, "/nowhere"]))  # fmt: skip
    superd.start()
    before = who(superd)
    program.unlink()
    assert "exec: no such file" in ctl(superd, "restart", "--overlap", "s", code=1)
    assert who(superd) == before and superd.status("s")["now"] == 1


@pytest.mark.parametrize("order", ["Stop", "Restart", "Drain"])
def test_an_order_meanwhile(superd: Superd, order: str) -> None:
    gate = write(superd)
    superd.start()
    before = who(superd)
    os.mkfifo(gate)
    gate.chmod(0o644)
    thread, results = overlap(superd)
    superd.wait_record(event="output", message=re.compile("starting"))
    second, joined = overlap(superd)  # the same again is the same one
    superd.wait_records(2, message=re.compile("restart asked for"))
    if order == "Restart":
        superd.call(order, names=["s"], wait=False)
        eventually(lambda: len(superd.find_records(event="output", message=re.compile("starting"))), 2)
        gate.write_text("")
        superd.wait_for("s", "ready")
        assert pid_of(superd) != before
    else:
        assert superd.call(order, names=["s"])["results"][0]["ok"]
        assert superd.status("s")["state"] == "stopped" and superd.status("s")["now"] == 0
    for one in (thread, second):
        one.join(TIMEOUT_S)
    assert not results[0]["ok"] and not joined[0]["ok"]
    assert "was stopped" in results[0]["note"]
    wait_gone(before)


@pytest.mark.parametrize("when", ["starting", "retiring"])
def test_the_manager_dies_meanwhile(superd: Superd, when: str) -> None:
    gate = write(superd, stop_timeout="1h")
    superd.start()
    before = who(superd)
    if when == "starting":
        os.mkfifo(gate)
        gate.chmod(0o644)
        argv = ["restart", "--overlap", "--no-wait", "s"]
        ctl(superd, *argv)
        record = superd.wait_record(event="output", message=re.compile("starting"))
        superd.kill_role("superd-manager")
        superd.wait_record(message=re.compile("took over"))
        gate.unlink()
        os.mkfifo(gate)
        wait_gone(record["pid"])
        serves = before
    else:
        client = superd.connect("s")
        assert int(client.recv(100)) == before  # it cannot end before this one
        ctl(superd, "restart", "--overlap", "s")
        serves = pid_of(superd)
        assert serves != before and superd.status("s")["now"] == 2
        superd.kill_role("superd-manager")
        superd.wait_record(message=re.compile("took over"))
        assert pid_of(superd) == serves and superd.status("s")["now"] == 2
        client.sendall(b"x")
        client.close()
        wait_gone(before)
    eventually(lambda: superd.status("s")["now"], 1)
    assert pid_of(superd) == serves == who(superd)
    assert superd.status("s")["state"] == "ready"
    if gate.exists():
        gate.unlink()
    ctl(superd, "restart", "--overlap", "s")
    wait_gone(serves)
    assert who(superd) == pid_of(superd)


def test_connections_go_on(superd: Superd) -> None:
    """Of a per-connection service: who comes gets a process in a context that was entered anew."""
    superd.write("s", toml(listen="tcp:127.0.0.1:0", command=["/bin/sh", "-c", "echo $PPID; exec cat"]))
    superd.start()
    ctl(superd, "restart", "--overlap", "s")  # there is nothing yet
    with superd.connect("s") as old:
        spawner = int(old.recv(100))
        assert comm(spawner) == "superd-spawner"
        ctl(superd, "restart", "--overlap", "s")
        with superd.connect("s") as new:
            assert int(new.recv(100)) != spawner
        old.sendall(b"still here")
        assert old.recv(100) == b"still here"
    wait_gone(spawner)


def test_what_has_no_process_is_started(superd: Superd) -> None:
    write(superd, run="on-demand")
    superd.write("pre", toml(run="always-on", command=["/bin/sleep", "1000"], start_pre=["/bin/true"]))
    superd.start()
    ctl(superd, "restart", "--overlap", "s")
    assert superd.status("s")["state"] == "ready"
    superd.wait_for("pre", "ready")
    assert "start_pre" in ctl(superd, "restart", "--overlap", "pre", code=1)
    assert superd.status("pre")["state"] == "ready"


def test_stored_fds_are_both_processes(superd: Superd) -> None:
    text = """
import array, os, signal, socket, sys
notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
notify.connect(os.environ["NOTIFY_SOCKET"])
names = os.environ.get("LISTEN_FDNAMES", "")
print("names", names, flush=True)
fd = os.memfd_create("x")
rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))]
notify.sendmsg([b"FDSTORE=1\\nFDNAME=n%d" % os.getpid()], rights)
notify.send(b"READY=1")
signal.pause()
"""
    superd.write("f", toml(run="always-on", ready="notify", fdstore=9, command=[PYTHON, "-c", text]))
    superd.start()
    superd.wait_for("f", "ready")
    first = superd.status("f")["pid"]
    ctl(superd, "restart", "--overlap", "f")
    second = superd.status("f")["pid"]
    ctl(superd, "restart", "--overlap", "f")
    said = [row["message"] for row in superd.wait_records(3, event="output", service="f")]
    assert said == ["names ", f"names n{first}", f"names n{first}:n{second}"]
    wait_gone(second)
    os.kill(superd.status("f")["pid"], signal.SIGKILL)


def test_a_builtin_goes_on(superd: Superd) -> None:
    superd.write("e", toml(listen="tcp:127.0.0.1:0", builtin="echo"))
    superd.start()
    with superd.connect("e") as client:
        ctl(superd, "restart", "--overlap", "e")
        client.sendall(b"x")
        assert client.recv(100) == b"x"


def test_two_at_once_of_a_per_connection_service(superd: Superd) -> None:
    superd.write("s", toml(listen="tcp:127.0.0.1:0", command=["/bin/sh", "-c", "echo $PPID; exec cat"]))
    superd.start()
    with superd.connect("s") as client:
        assert client.recv(100)
        tries = [overlap(superd) for _ in range(4)]
        for thread, results in tries:
            thread.join(TIMEOUT_S)
            assert results[0]["ok"], results
        client.sendall(b"x")
        assert client.recv(100) == b"x"
