"""idle_timeout of on-demand services: stopped when nobody uses them, not before; the next client starts them again."""

from __future__ import annotations

import re
import select
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness import PYTHON, Superd, cpu_share, eventually, toml

# Serves its socket as a server does that stays; each answer is its pid. "deaf": ends by KILL only; "rude": with status
# 3; "slow": half a second after TERM, in which it accepts nobody.
SERVER = """
import os, signal, socket, sys, time
how = sys.argv[1:]
def end(*_):
    if 'slow' in how: time.sleep(0.5)
    os._exit(3 if 'rude' in how else 0)
signal.signal(signal.SIGTERM, signal.SIG_IGN if 'deaf' in how else end)
pid = b'%d\\n' % os.getpid()
with socket.socket(fileno=3) as sock:
    while True:
        if sock.type == socket.SOCK_DGRAM:
            data, peer = sock.recvfrom(100)
            sock.sendto(pid, peer)
        else:
            with sock.accept()[0] as conn:
                conn.sendall(pid)
                while conn.recv(100): conn.sendall(pid)
"""
STOPPED = re.compile("nobody has used it for .*; stopping it")


def serve(superd: Superd, *how: str, listen: str = "tcp:127.0.0.1:0", timeout: str = "500ms", **keys: Any) -> None:
    command = [PYTHON, "-c", SERVER, *how]
    superd.write("s", toml(listen=listen, command=command, run="on-demand", idle_timeout=timeout, **keys))
    superd.start()


def talk(client: socket.socket) -> int:
    client.sendall(b"x")
    answers = client.makefile("rb")
    first, again = answers.readline(), answers.readline()
    assert first == again
    return int(again)


def ask(superd: Superd) -> int:
    """The pid of the process that serves a short connection."""
    with superd.connect("s") as client:
        return int(client.makefile("rb").readline())


@pytest.mark.parametrize("scheme", ["tcp", "unix", "unix-seqpacket"])
def test_stopped_when_unused_and_started_again(superd: Superd, scheme: str) -> None:
    serve(superd, listen="tcp:127.0.0.1:0" if scheme == "tcp" else f"{scheme}:{superd.dir}/s.sock")
    first = ask(superd)
    assert superd.status("s")["state"] == "ready"
    superd.wait_record(service="s", message=STOPPED)
    superd.wait_record(event="exit", service="s", pid=first, status=0)
    row = superd.status("s")
    assert (row["state"], row["note"], row["restarts"]) == ("listening", "", 0)
    assert ask(superd) != first
    assert not superd.find_records(level="err")


@pytest.mark.parametrize("scheme", ["tcp", "unix"])
def test_an_open_connection_keeps_it(superd: Superd, scheme: str) -> None:
    serve(superd, listen="tcp:127.0.0.1:0" if scheme == "tcp" else f"{scheme}:{superd.dir}/s.sock")
    with superd.connect("s") as client:
        pid = talk(client)
        assert cpu_share(superd.manager, 1.2) < 0.05  # more than twice as long as it may be unused
        assert superd.status("s")["pid"] == pid and not superd.find_records(message=STOPPED)
    superd.wait_record(message=STOPPED)


@pytest.mark.parametrize("listen", ["tcp:127.0.0.1:0", "unix:s.sock", "udp:127.0.0.1:0", "unix-dgram:s.sock"])
def test_short_ones_keep_it(superd: Superd, listen: str) -> None:
    """Connections and datagrams that have come and gone between two looks count too."""
    scheme = listen.partition(":")[0]
    serve(superd, listen=listen.replace("s.sock", f"{superd.dir}/s.sock"), timeout="1s")

    def one() -> int:
        if scheme in ("tcp", "unix"):
            return ask(superd)
        with socket.socket(socket.AF_INET if scheme == "udp" else socket.AF_UNIX, socket.SOCK_DGRAM) as client:
            client.settimeout(20)
            if scheme == "udp":
                client.sendto(b"x", superd.address("s"))
            else:
                client.bind(f"{superd.dir}/client.sock")
                Path(f"{superd.dir}/client.sock").chmod(0o666)
                client.sendto(b"x", f"{superd.dir}/s.sock")
            try:
                return int(client.recv(100))
            finally:
                Path(f"{superd.dir}/client.sock").unlink(missing_ok=True)

    pids = {one()}
    for _ in range(4):
        select.select([], [], [], 0.4)  # that long without anybody, four times: more than what is allowed at once
        pids.add(one())
    assert len(pids) == 1 and not superd.find_records(message=STOPPED)
    superd.wait_record(message=STOPPED)


@pytest.mark.parametrize("how", ["rude", "deaf"])
def test_how_it_ends_is_no_failure(superd: Superd, how: str) -> None:
    serve(superd, how, stop_timeout="300ms", restart="always", restart_limit="1/1h")
    for number in (1, 2, 3):
        ask(superd)
        superd.wait_records(number, event="exit", service="s")
        eventually(lambda: superd.status("s")["state"], "listening")
    assert superd.status("s")["restarts"] == 0


def test_goes_on_after_the_manager(superd: Superd) -> None:
    """The next manager stops it, and a stop that the last one began is still no failure."""
    serve(superd, "deaf", stop_timeout="2s", restart="always")
    pid = ask(superd)
    superd.kill_role("superd-manager")
    superd.wait_record(message=STOPPED)
    eventually(lambda: superd.status("s")["state"], "stopping")
    superd.kill_role("superd-manager")
    superd.wait_record(event="exit", service="s", pid=pid, signal="KILL")
    assert ask(superd) != pid and superd.status("s")["restarts"] == 0


def test_who_comes_during_the_stop_waits(superd: Superd) -> None:
    serve(superd, "slow")
    pid = ask(superd)
    eventually(lambda: superd.status("s")["state"], "stopping")
    with superd.connect("s") as client:
        assert talk(client) != pid
    assert [row["pid"] for row in superd.find_records(event="exit", service="s")] == [pid]


def test_a_start_is_not_idle(superd: Superd) -> None:
    command = ["/bin/sh", "-c", f"exec {PYTHON} -c 'import time; time.sleep(1000)'"]
    keys = {"run": "on-demand", "ready": "notify", "idle_timeout": "250ms", "ready_timeout": "1s"}
    superd.write("s", toml(listen="tcp:127.0.0.1:0", command=command, **keys))
    superd.start()
    superd.connect("s").close()
    superd.wait_record(service="s", message=re.compile("no READY=1 within 1 s"))
    assert not superd.find_records(message=STOPPED)


@pytest.mark.parametrize("scheme", ["tcp", "unix"])
def test_nbdkit(superd: Superd, require: Callable[[str], str], scheme: str) -> None:
    """A real server with threads, which accepts by itself and would stay for ever."""
    command = [require("nbdkit"), "-f", "memory", "1M"]
    listen = "tcp:127.0.0.1:0" if scheme == "tcp" else f"unix:{superd.dir}/s.sock"
    superd.write("s", toml(listen=listen, command=command, run="on-demand", idle_timeout="500ms"))
    superd.start()
    for number in (1, 2):
        with superd.connect("s") as client:
            assert client.recv(8, socket.MSG_WAITALL) == b"NBDMAGIC"
            select.select([], [], [], 0.8)  # longer than it may be unused
            assert len(superd.find_records(event="start")) == number and superd.status("s")["state"] == "ready"
        superd.wait_records(number, message=STOPPED)
        superd.wait_records(number, event="exit", service="s")
    assert superd.status("s")["state"] == "listening"
