"""superctl pause, resume and drain."""

from __future__ import annotations

import os
import re
import select
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from harness import PYTHON, TIMEOUT_S, Superd, eventually, read_all, toml

CTL = [sys.executable, "-I", "-m", "superd.cli.superctl"]

# Prints who it is, and then echoes until the client has had enough.
TELLER = """
import os, signal, socket, sys, threading
listener = socket.socket(fileno=3)
listener.setblocking(True)
clients = []
def stop(*_):
    stopping.set()
    os.write(w, b"x")
r, w = os.pipe()
stopping = threading.Event()
signal.signal(signal.SIGTERM, stop)
print("ready", flush=True)
def serve(conn):
    conn.sendall(b"%d\\n" % os.getpid())
    while data := conn.recv(100):
        conn.sendall(data)
    conn.close()
import select
while not stopping.is_set():
    if listener in select.select([listener, r], [], [])[0] and not stopping.is_set():
        conn = listener.accept()[0]
        clients.append(threading.Thread(target=serve, args=(conn,)))
        clients[-1].start()
for one in clients:
    one.join()
"""


@pytest.fixture
def superd() -> Iterator[Superd]:
    with Superd() as one:
        yield one


def ctl(superd: Superd, *arguments: str, code: int = 0) -> str:
    done = subprocess.run([*CTL, "-s", superd.control, *arguments], capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == code, (arguments, done.returncode, done.stdout, done.stderr)
    return done.stdout + done.stderr


def in_background(superd: Superd, method: str, name: str) -> tuple[threading.Thread, list[dict[str, Any]]]:
    found: list[dict[str, Any]] = []
    thread = threading.Thread(target=lambda: found.extend(superd.call(method, names=[name])["results"]))
    thread.start()
    return thread, found


def is_quiet(client: socket.socket) -> bool:
    """Nothing has come. What could come would have been sent before the answer to a call that was made meanwhile."""
    return not select.select([client], [], [], 0)[0]


def write_cat(superd: Superd, name: str = "cat", **keys: Any) -> None:
    keys.setdefault("listen", "tcp:127.0.0.1:0")
    superd.write(name, toml(command=["/bin/sh", "-c", "echo hello; exec cat"], **keys))


def write_teller(superd: Superd, **keys: Any) -> None:
    keys = {"run": "on-demand", "ready": "log:ready", **keys}
    superd.write("teller", toml(listen="tcp:127.0.0.1:0", pass_="listen-fds", command=[PYTHON, "-c", TELLER], **keys))


def test_pause_and_resume(superd: Superd) -> None:
    write_cat(superd)
    superd.start()
    before = superd.connect("cat")
    assert before.recv(100) == b"hello\n"
    assert ctl(superd, "pause", "cat").startswith("cat: paused, listening")
    assert "already paused" in ctl(superd, "pause", "cat")
    waiting = superd.connect("cat")
    before.sendall(b"still there")
    assert before.recv(100) == b"still there"  # what runs goes on
    assert "paused" in ctl(superd, "list")
    assert re.search(r"cat +tcp:\S+ +stream +\S+ +1/\d+ +paused", ctl(superd, "list", "--sockets"))
    assert "paused" in ctl(superd, "status", "cat")
    assert superd.status("cat")["state"] == "listening"
    ctl(superd, "health")
    assert is_quiet(waiting)
    superd.kill_role("superd-manager")
    superd.wait_record(message=re.compile("took over"))
    assert superd.call("Sockets")["sockets"][0]["paused"]
    write_cat(superd, description="another")
    superd.call("Reload")
    write_cat(superd, limits={"max_connections": 7})
    superd.call("Reload")
    assert superd.call("Sockets")["sockets"][0]["paused"]
    assert is_quiet(waiting)
    assert ctl(superd, "resume", "cat").startswith("cat: not paused, listening")
    assert waiting.recv(100) == b"hello\n"
    assert "already not paused" in ctl(superd, "resume", "cat")
    before.close()
    waiting.close()


def test_pause_of_what_is_started_by_traffic(superd: Superd) -> None:
    write_teller(superd)
    superd.start()
    ctl(superd, "pause", "teller")
    client = superd.connect("teller")
    assert superd.status("teller")["state"] == "listening"
    assert is_quiet(client)
    ctl(superd, "resume", "teller")
    assert client.recv(100).strip().isdigit()
    pid = superd.status("teller")["pid"]
    assert f"pid {pid} has its sockets and goes on" in ctl(superd, "pause", "teller")
    with superd.connect("teller") as other:
        assert other.recv(100).strip().isdigit()
    client.close()


def test_what_cannot_be_paused(superd: Superd) -> None:
    write_teller(superd, run="always-on")
    superd.write("idle", toml(run="always-on", command=["/bin/sleep", "1000"]))
    superd.start()
    assert "its process accepts" in ctl(superd, "pause", "teller", code=1)
    assert "no sockets" in ctl(superd, "pause", "idle", code=1)
    ctl(superd, "pause", "nobody", code=4)


@pytest.mark.parametrize("killed", [False, True], ids=["", "manager-killed"])
def test_drain_waits_for_connections(superd: Superd, killed: bool) -> None:
    write_cat(superd)
    superd.start()
    with superd.connect("cat") as client:
        assert client.recv(100) == b"hello\n"
        assert "no answer within" in ctl(superd, "drain", "cat", "--timeout", "300ms", code=75)
        assert superd.status("cat")["state"] == "stopping"
        waiting = superd.connect("cat")
        if killed:
            superd.kill_role("superd-manager")
            superd.wait_record(message=re.compile("took over"))
            eventually(lambda: superd.status("cat")["now"], 1)
            assert superd.status("cat")["state"] == "stopping"
        thread, results = in_background(superd, "Drain", "cat")
        client.sendall(b"more")
        assert client.recv(100) == b"more"
        assert superd.status("cat")["state"] == "stopping"
    thread.join(TIMEOUT_S)
    assert results[0]["ok"] and results[0]["state"] == "stopped"
    assert is_quiet(waiting)
    superd.call("Start", names=["cat"])
    assert waiting.recv(100) == b"hello\n"
    waiting.close()


def test_orders_while_it_drains(superd: Superd) -> None:
    write_cat(superd)
    superd.start()
    client = superd.connect("cat")
    assert client.recv(100) == b"hello\n"
    thread, results = in_background(superd, "Drain", "cat")
    eventually(lambda: superd.status("cat")["state"], "stopping")
    assert superd.call("Start", names=["cat"])["results"][0]["ok"]  # it is wanted again
    thread.join(TIMEOUT_S)
    assert not results[0]["ok"] and superd.status("cat")["state"] == "listening"
    client.sendall(b"x")
    assert client.recv(100) == b"x"
    thread, results = in_background(superd, "Drain", "cat")
    eventually(lambda: superd.status("cat")["state"], "stopping")
    assert superd.call("Stop", names=["cat"])["results"][0]["ok"]  # that long nobody wants to wait
    thread.join(TIMEOUT_S)
    assert results[0]["ok"] and read_all(client) == b""
    client.close()


def test_drain_of_one_process(superd: Superd) -> None:
    """It is told, and has more time than stop_timeout."""
    write_teller(superd, stop_timeout="100ms")
    superd.start()
    with superd.connect("teller") as client:
        assert client.recv(100).strip().isdigit()
        ctl(superd, "drain", "teller", "--timeout", "300ms", code=75)
        waiting = superd.connect("teller")
        superd.kill_role("superd-manager")  # takes much longer than stop_timeout
        superd.wait_record(message=re.compile("took over"))
        assert superd.status("teller")["state"] == "stopping"
        client.sendall(b"still served")
        assert client.recv(100) == b"still served"
        thread, results = in_background(superd, "Drain", "teller")
    thread.join(TIMEOUT_S)
    assert results[0]["ok"], results
    assert superd.status("teller")["state"] == "stopped"
    assert not superd.find_records(message=re.compile("killing"))
    superd.call("Start", names=["teller"])
    assert waiting.recv(100).strip().isdigit()
    waiting.close()


def test_progress_is_one_line_on_a_terminal(superd: Superd) -> None:
    write_cat(superd)
    superd.start()
    ours, theirs = os.openpty()
    with superd.connect("cat") as client, os.fdopen(ours, "rb", buffering=0) as terminal:
        assert client.recv(100) == b"hello\n"
        environment = {**os.environ, "TERM": "xterm"}
        process = subprocess.Popen(
            [*CTL, "-s", superd.control, "drain", "cat"], stdout=subprocess.PIPE, stderr=theirs, env=environment
        )
        os.close(theirs)
        shown = b""
        while shown.count(b"\r") < 2:
            shown += terminal.read(1000)
        assert b"cat: stopping, 1 now" in shown and b"\n" not in shown
        client.close()
        with process:
            assert process.stdout is not None
            assert process.stdout.read().startswith(b"cat: stopped")
        assert terminal.read(1000).endswith(b"\r\x1b[K")  # nothing of it is left
    assert process.returncode == 0


# --- wait


def test_wait_follows_the_name(superd: Superd) -> None:
    """A file that enables its service makes another one of it, and one that has gone is waited for no longer."""
    text = toml(listen="tcp:127.0.0.1:0", command=["/bin/cat"])
    superd.write("s", text + "enabled = false\n")
    superd.write("gone", text)
    superd.start()
    assert superd.call("Stop", names=["gone"])["results"][0]["ok"]
    before = len(os.listdir(f"/proc/{superd.manager}/fd"))
    with ThreadPoolExecutor(2) as pool:
        waits = [pool.submit(superd.call, "Wait", names=[name], **{"for": "active"}) for name in ("s", "gone")]
        eventually(lambda: len(os.listdir(f"/proc/{superd.manager}/fd")), before + 2)
        superd.status("s")
        superd.write("s", text)
        (superd.conf / "conf.d/gone.toml").unlink()
        enabled, gone = (wait.result(TIMEOUT_S)["results"][0] for wait in waits)
    assert (enabled["ok"], enabled["state"]) == (True, "listening")
    assert (gone["ok"], gone["state"], gone["note"]) == (False, "stopped", "its file has gone")
