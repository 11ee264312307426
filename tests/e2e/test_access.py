"""[access], first_byte_timeout, max_load and min_memory on real sockets."""

from __future__ import annotations

import os
import re
import select
import socket
import subprocess
import sys
import time

import pytest
from harness import PYTHON, Superd, ask, eventually, toml

CAT = {"listen": "tcp:127.0.0.1:0", "command": "/bin/cat"}


def refused(client: socket.socket) -> bool:
    """The end, or a reset, without a byte."""
    try:
        return client.recv(100) == b""
    except ConnectionResetError:
        return True


def superctl(superd: Superd, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "superd.cli.superctl", "-s", superd.control, *words],
        capture_output=True, text=True, timeout=20,
    )  # fmt: skip


def test_networks(superd: Superd) -> None:  # A8
    """An IPv4 client of a dual-stack listener is an IPv4 client; the refused cost no process."""
    superd.write("s", toml(listen="tcp:0", command="/bin/cat", access={"deny": ["127.0.0.1"]}))
    superd.write("t", toml(**CAT, access={"allow": ["127.0.0.0/8"], "deny": ["127.0.0.0/9"]}))
    superd.write("u", toml(**CAT, access={"allow": ["10.0.0.0/8"]}, limits={"refuse_message": "go away\n"}))
    superd.start()
    with superd.connect("s", host="127.0.0.1") as client:
        assert refused(client)
    assert superd.wait_record(event="refused", service="s")["message"] == "access: deny 127.0.0.1"
    with superd.connect("s", host="::1") as client:
        assert ask(client, b"x") == b"x"
    with superd.connect("t") as client:
        assert refused(client)
    with superd.connect("u") as client:
        assert client.recv(100) == b"go away\n"
    assert superd.status("s")["total"] == 1 and superd.status("t")["total"] == 0
    done = superctl(superd, "access", "t", "127.200.0.1")
    assert (done.returncode, done.stdout) == (0, "yes: allow 127.0.0.0/8\n")
    assert superctl(superd, "access", "t", "::ffff:127.0.0.1").returncode == 1
    assert superctl(superd, "access", "t", "elsewhere").returncode == 2
    assert superctl(superd, "access", "nothing", "10.0.0.1").returncode == 4


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: another user connects")
def test_users(superd: Superd) -> None:  # D10
    """An abstract socket has no mode; SO_PEERCRED says who may."""
    name = f"@superd-test-{os.getpid()}"
    superd.write("s", toml(listen=f"unix:{name}", command="/bin/cat", access={"allow": ["user:root", "group:nogroup"]}))
    superd.write("t", toml(listen=f"unix:{name}2", command="/bin/cat", access={"deny": ["user:nobody"]}))
    superd.start()
    script = (
        "import socket, sys; s = socket.socket(socket.AF_UNIX); s.connect('\\0' + sys.argv[1][1:])\n"
        "try: s.sendall(b'x'); print(s.recv(1))\nexcept (ConnectionResetError, BrokenPipeError): print(b'')"
    )

    def connect(path: str, uid: int, gid: int) -> str:
        argv = [PYTHON, "-c", script, path]
        return subprocess.run(argv, user=uid, group=gid, extra_groups=[], capture_output=True, text=True).stdout.strip()

    assert connect(name, 0, 0) == "b'x'" and connect(name, 65534, 65534) == "b'x'" and connect(name, 1, 1) == "b''"
    assert connect(f"{name}2", 1, 1) == "b'x'" and connect(f"{name}2", 65534, 65534) == "b''"
    assert superctl(superd, "access", "t", "user:nobody").returncode == 1


def test_refused_datagrams_are_dropped(superd: Superd) -> None:  # C4
    """No process, no loop; an allowed one behind them is served."""
    echo = "import socket; s = socket.socket(fileno=3); d, a = s.recvfrom(99); s.sendto(d, a)"
    superd.write("s", toml(listen="udp:127.0.0.1:0", command=[PYTHON, "-c", echo], access={"deny": ["127.0.0.2"]}))
    superd.start()
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as bad,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as good,
    ):
        bad.bind(("127.0.0.2", 0))
        for _ in range(3):
            bad.sendto(b"no", superd.address("s"))
        superd.wait_record(event="refused", service="s", peer="127.0.0.2")
        eventually(lambda: superd.call("Status", names=["s"])["services"][0]["refused"], 3)
        assert superd.status("s")["total"] == 0
        good.settimeout(20)
        good.sendto(b"yes", superd.address("s"))
        assert good.recv(99) == b"yes"


def test_names(superd: Superd) -> None:  # A9
    """127.0.0.1 is localhost both ways; nothing waits for the answer but its own client."""
    superd.write("s", toml(**CAT, access={"allow": [".localhost"]}))
    superd.write("t", toml(**CAT, access={"deny": [".localhost"]}))
    superd.start()
    with superd.connect("s") as client:
        assert ask(client, b"x") == b"x"
    with superd.connect("t") as client:
        assert refused(client)
    assert superctl(superd, "access", "s", "127.0.0.1").stdout == "yes: allow .localhost\n"
    assert superctl(superd, "access", "s", "192.0.2.1").returncode == 1


def test_hours(superd: Superd) -> None:
    today, tomorrow = time.strftime("%a"), time.strftime("%a", time.localtime(time.time() + 86400))
    superd.write("s", toml(**CAT, access={"hours": [f"{today} 00:00-24:00", f"{tomorrow} 00:00-24:00"]}))
    later = time.strftime("%a", time.localtime(time.time() + 3 * 86400))
    superd.write("t", toml(**CAT, access={"hours": [f"{later} 00:00-24:00"]}))
    superd.start()
    with superd.connect("s") as client:
        assert ask(client, b"x") == b"x"
    with superd.connect("t") as client:
        assert refused(client)


def test_first_byte(superd: Superd) -> None:  # A18
    """Who says nothing starts no process and is let go; who speaks, or has nothing to say, is served."""
    superd.write("s", toml(**CAT, limits={"first_byte_timeout": "300ms"}))
    superd.write("t", toml(**CAT, limits={"first_byte_timeout": "1m"}))
    superd.start()
    with superd.connect("s") as client:
        assert refused(client)
    assert "first_byte_timeout = 0.3 s" in superd.wait_record(event="refused", service="s")["message"]
    assert superd.status("s")["total"] == 0
    with superd.connect("t") as client:
        assert superd.status("t")["total"] == 0
        assert ask(client, b"hello") == b"hello"
    with superd.connect("t") as client:
        client.shutdown(socket.SHUT_WR)
        assert client.recv(1) == b""
    superd.wait_records(2, event="exit", service="t", status=0)
    with superd.connect("t") as client:  # it does not hold up the end
        eventually(lambda: superd.call("Stop", names=["t"])["results"][0]["ok"], True)
        assert refused(client)


def test_silent_clients_take_no_places(superd: Superd) -> None:  # A18, X13
    """300 silent clients at max_connections = 2: others are served at once; a limit for each source holds as well."""
    limits = {"first_byte_timeout": "1m", "max_connections": 2}
    superd.write("s", toml(**CAT, limits=limits))
    superd.write("t", toml(**CAT, limits={**limits, "max_per_source": 3}))
    superd.start()
    silent = [superd.connect("s") for _ in range(300)]
    try:
        for _ in range(5):
            with superd.connect("s") as client:
                assert ask(client, b"x") == b"x"
        with silent[0] as client:
            assert ask(client, b"late") == b"late"
    finally:
        for client in silent:
            client.close()
    three = [superd.connect("t") for _ in range(3)]
    try:
        with superd.connect("t") as client:
            assert refused(client)
    finally:
        for client in three:
            client.close()


def test_those_that_passed_wait_for_a_place(superd: Superd) -> None:  # B4
    superd.write("s", toml(**CAT, limits={"first_byte_timeout": "1m", "max_connections": 1}))
    superd.start()
    first, second = superd.connect("s"), superd.connect("s")
    with first, second:
        first.sendall(b"1")
        assert first.recv(1) == b"1"
        second.sendall(b"2")
        assert not select.select([second], [], [], 0.2)[0]
        first.close()
        assert second.recv(1) == b"2"


@pytest.mark.parametrize("run", ["per-connection", "on-demand"])
def test_memory(superd: Superd, run: str) -> None:
    """Below min_memory nothing is started, and the status says so; nobody is refused."""
    superd.write("s", toml(**{**CAT, "run": run, "pass_": "stdio"}, limits={"min_memory": "1000T"}))
    superd.start()
    with superd.connect("s"):
        superd.wait_record(service="s", message=re.compile("waiting: .* MiB of memory, and min_memory is"))
        status = superd.status("s")
        assert status["total"] == 0 and "min_memory" in status["note"] and status["state"] == "listening"
