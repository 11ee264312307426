"""A hostile world around the real daemon: a lying handler, a resolver that is a black hole, sockets without memory."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from harness import PYTHON, TIMEOUT_S, Superd, ask, eventually, fetch, injected, toml, wait_gone

Require = Callable[[str], str]

LIES = r"""
import os, socket, stat, struct

def channel():
    for name in os.listdir("/proc/self/fd"):
        try:
            sock = socket.socket(fileno=os.dup(int(name)))
        except OSError:
            continue
        if sock.type == socket.SOCK_SEQPACKET:
            return sock
        sock.close()

there = channel()
for kind, pid in ((b"S", os.getpid()), (b"X", os.getpid()), (b"F", 0)):
    there.send(struct.pack("<cQiiI", kind, 1 << 40 | 1, pid, 0, 0))

def serve(conn):
    conn.output.write(b"lied")
"""


def test_a_handler_speaks_for_its_own_connections_only(superd: Superd) -> None:
    """Its code runs in the spawner that reports to the manager: what that says of another service's is passed over."""
    superd.write("cat", toml(listen="tcp:127.0.0.1:0", command=["/bin/cat"]))
    room = superd.room("code")
    (room / "liar.py").write_text(LIES)
    superd.write("liar", toml(listen="tcp:127.0.0.1:0", handler="liar:serve", cwd=room))
    superd.start()
    with superd.connect("cat") as client:
        client.sendall(b"x")
        assert client.recv(1) == b"x"
        record = superd.wait_record(event="start", service="cat")
        assert record["connection"] == "1-1"
        assert fetch(superd.connect("liar")) == b"lied"
        assert superd.status("cat")["now"] == 1
        assert superd.call("Connections", names=["cat"])["connections"][0]["pid"] == record["pid"]
    superd.wait_for("cat", "idle")
    assert not superd.garbage


@pytest.mark.parametrize("call", ["sendmsg", "recvmsg", "sendto", "recvfrom"])
@pytest.mark.parametrize("error", ["ENOBUFS", "ENOMEM"])
def test_no_memory_for_sockets(superd: Superd, require: Require, call: str, error: str) -> None:  # N8
    """A client may be closed for it; superd and the session stay, and when it is over all is as before."""
    superd.garbage_expected = True
    superd.write("cat", toml(listen="tcp:127.0.0.1:0", command=["/bin/cat"]))
    superd.start()
    manager = superd.manager
    with superd.connect("cat") as session:
        session.sendall(b"1")
        assert session.recv(1) == b"1"
        with injected(require("strace"), manager, f"{call}:error={error}:when=1..3"):
            for _ in range(6):
                try:
                    with superd.connect("cat") as client:
                        client.settimeout(1)
                        client.sendall(b"x")
                        client.shutdown(socket.SHUT_WR)
                        client.recv(1)
                except OSError:
                    pass  # it was closed, or waits for the next answer of the spawner
        assert ask(superd.connect("cat"), b"x") == b"x"
        session.sendall(b"2")
        assert session.recv(1) == b"2"
    superd.wait_for("cat", "idle")
    # Who reads what wakes trio up is trio, and it takes no such error: the next manager has lost nothing.
    assert superd.manager == manager or any("_entry_queue.py" in each["message"] for each in superd.records)


def test_no_memory_to_wait(superd: Superd, require: Require) -> None:  # N8 H10
    """The keeper's poll fails: it waits a moment, and goes on to do its work."""
    superd.write("own", toml(listen="tcp:127.0.0.1:0", run="on-demand", command=[PYTHON, "-I", "-c", TAKES_ONE]))
    superd.start()
    keeper = superd.pid
    with injected(require("strace"), keeper, "poll:error=ENOMEM:when=1..3"):
        for _ in range(2):
            assert fetch(superd.connect("own")) == b"served"
    assert superd.pid == keeper


TAKES_ONE = "import socket; socket.socket(fileno=3).accept()[0].sendall(b'served')"

BLACK_HOLE = """
mount -t tmpfs none /run || exit 99
echo 'nameserver 192.0.2.1' >/run/resolv.conf
mount --bind /run/resolv.conf /etc/resolv.conf || exit 99
exec "$@"
"""


def test_resolver_is_a_black_hole(superd: Superd, require: Require, root: None) -> None:  # P3 A9
    """Addresses that are numbers are served at once, whoever waits for a host rule's names."""
    unshare = require("unshare")
    superd.write("cat", toml(listen="tcp:127.0.0.1:0", command=["/bin/cat"]))
    path = superd.dir / "x.sock"
    superd.write("local", toml(listen=f"unix:{path}", command=["/bin/cat"]))
    superd.write("named", toml(listen="tcp:127.0.0.1:0", command=["/bin/cat"], access={"allow": [".example.org"]}))
    began = time.monotonic()
    superd.start(wrapper=[unshare, "--mount", "/bin/sh", "-c", BLACK_HOLE, "sh"])
    for name in ("named", "cat", "local"):
        with superd.connect(name):
            pass
    assert ask(superd.connect("cat"), b"x") == b"x"
    assert ask(superd.connect("local"), b"x") == b"x"
    assert superd.call("Health")["live"]
    assert time.monotonic() - began < 5.0  # a resolver's own patience is 10 s and more


INHERITS = "import json, os; print(json.dumps(sorted(int(n) for n in os.listdir('/proc/self/fd'))), flush=True)"


def test_parallel_mixed_starts_leak_nothing(superd: Superd) -> None:  # O7 E1 E2
    """200 starts at once, of three kinds: each has its own descriptors and listdir's, and no other's."""
    to_client = INHERITS.replace("print(", "os.dup2(3, 1); print(")
    limits = {"max_connections": 200}
    superd.write("stdio", toml(listen="tcp:127.0.0.1:0", command=[PYTHON, "-I", "-c", INHERITS], limits=limits))
    command = [PYTHON, "-I", "-c", to_client]
    superd.write("fds", toml(listen="tcp:127.0.0.1:0", pass_="listen-fds", command=command, limits=limits))
    superd.write("loops", toml(run="always-on", restart="always", restart_delay="10ms", command=["/bin/true"]))
    superd.start()

    def one(name: str) -> tuple[str, list[int]]:
        return name, json.loads(fetch(superd.connect(name)))

    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(one, ["stdio", "fds"] * 100))
    assert {tuple(numbers) for name, numbers in found if name == "stdio"} == {(0, 1, 2, 3)}
    assert {tuple(numbers) for name, numbers in found if name == "fds"} == {(0, 1, 2, 3, 4)}


def test_failing_connections_leave_no_memory(superd: Superd) -> None:  # F19
    """Each has an error that is logged; 1,500 of them cost the manager less than 1 MB."""
    superd.write("s", toml(listen="tcp:127.0.0.1:0", command=["/bin/true"], cwd=superd.room("room")))
    superd.start()
    (superd.dir / "room").rename(superd.dir / "gone")

    def storm(count: int) -> None:
        for _ in range(count):
            with superd.connect("s") as client:
                client.sendall(b"x")

    def memory() -> int:
        return int(Path(f"/proc/{superd.manager}/statm").read_text().split()[1]) * 4096

    storm(500)
    superd.wait_record(service="s", message=re.compile("room"))
    before = memory()
    storm(1500)
    eventually(lambda: memory() - before < 1 << 20, True)


@pytest.mark.parametrize("source", ["127.0.0.1", "127.0.0.7"])
def test_datagrams_are_answered_from_the_address_that_was_asked(superd: Superd, source: str) -> None:  # C5
    code = "import socket; s = socket.socket(fileno=0); d, a = s.recvfrom(100); s.sendto(d, a)"
    superd.write(
        "s", toml(listen=f"udp:{source}:0", run="on-demand", pass_="stdio", command=[PYTHON, "-I", "-c", code])
    )
    superd.start()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.settimeout(10)
        client.sendto(b"who", superd.address("s"))
        assert client.recvfrom(100) == (b"who", superd.address("s"))


FULL = """
mount -t tmpfs -o size=16k,nr_inodes=4 none "$ROOM" || exit 99
cat /dev/zero >"$ROOM/full" 2>/dev/null
: >"$ROOM/a"; : >"$ROOM/b"
exec "$@"
"""


def test_no_space_at_the_start(superd: Superd, require: Require, root: None) -> None:  # N6 D14
    """Neither the control socket nor notify sockets can be made: services run without, and it is said once each."""
    superd.garbage_expected = True
    room = superd.room("state")
    superd.write("cat", toml(listen="tcp:127.0.0.1:0", command=["/bin/cat"]))
    superd.write("stays", toml(run="always-on", command=["/bin/sleep", "1000"]))
    superd.control = f"unix:{room}/control.sock"
    wrapper = [require("unshare"), "--mount", "/bin/sh", "-c", FULL, "sh"]
    superd.start(wrapper=wrapper, environment=os.environ | {"ROOM": str(room)})
    assert ask(superd.connect("cat"), b"x") == b"x"
    superd.wait_record(event="start", service="stays")
    said = superd.wait_record(message=re.compile("control socket"))
    assert "no space left" in said["message"].lower()


FREEZER = Path("/sys/fs/cgroup/freezer")


def test_a_process_that_cannot_be_killed(superd: Superd, root: None) -> None:  # G11
    """Frozen in a cgroup of the first version it takes no KILL, like one in state D: superd says so and ends."""
    if not (FREEZER / "tasks").exists():
        pytest.skip("no freezer cgroup")
    superd.write_daemon('stop_timeout = "1s"\n')
    superd.write("ice", toml(run="always-on", stop_timeout="200ms", command=["/bin/sleep", "1000"]))
    superd.start()
    pid = superd.wait_record(event="start", service="ice")["pid"]
    group = FREEZER / f"superd-test-{pid}"
    group.mkdir()
    try:
        (group / "tasks").write_text(str(pid))
        (group / "freezer.state").write_text("FROZEN")
        os.kill(superd.pid, signal.SIGTERM)
        record = superd.wait_record(message=re.compile("unkillable"))
        assert str(pid) in record["message"]
        assert superd._process is not None
        assert superd._process.wait(TIMEOUT_S) == 0
    finally:
        (group / "freezer.state").write_text("THAWED")
        wait_gone(pid)
        eventually(lambda: (group / "tasks").read_text(), "")
        group.rmdir()
