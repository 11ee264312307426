"""Listening and accepting: what goes wrong at accept(2), bind(2) and in the sockets that services hold."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import socket
import struct
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
from harness import (
    PYTHON,
    TIMEOUT_S,
    Superd,
    ask,
    cpu_share,
    descendants,
    eventually,
    fetch,
    injected,
    no_free_fd,
    read_all,
    toml,
)

Require = Callable[[str], str]

RESET = struct.pack("ii", 1, 0)  # SO_LINGER: close sends RST


def reset(superd: Superd, service: str) -> None:
    """Connect and leave with RST."""
    with superd.connect(service) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)


def cat(superd: Superd, **keys: object) -> None:
    superd.write("cat", toml(**{"listen": "tcp:127.0.0.1:0", "command": ["/bin/cat"], **keys}))


@pytest.mark.parametrize("stderr", ["log", "null"])  # the first fd it misses: a pipe, or the connection
@pytest.mark.parametrize("spawner", ["there", "needed"])
def test_out_of_descriptors(superd: Superd, stderr: str, spawner: str) -> None:  # A1 A2 A3 X1
    cat(superd, stderr=stderr)
    superd.start()
    manager = superd.manager
    if spawner == "there":
        assert ask(superd.connect("cat"), b"before") == b"before"
        superd.wait_record(event="exit", service="cat")
    with no_free_fd(manager):
        mark = superd.mark()
        clients = [superd.connect("cat") for _ in range(3)]
        superd.wait_record(after=mark, level=re.compile("warning|err"))
        assert cpu_share(manager) < 0.05
        said = superd.find_records(after=mark)
        assert len(said) == 1, said  # once per episode
    for client in clients:  # nobody was reset; served in the order they came
        assert ask(client, b"after") == b"after"
    assert superd.manager == manager
    assert ask(superd.connect("cat"), b"still") == b"still"


@pytest.mark.parametrize("error", ["ECONNABORTED", "EPROTO", "EPERM", "ENETDOWN", "EINVAL", "ENFILE", "ENOBUFS"])
def test_accept_fails(superd: Superd, require: Require, error: str) -> None:  # A4 X3
    strace = require("strace")
    cat(superd)
    superd.start()
    assert ask(superd.connect("cat"), b"0") == b"0"
    with injected(strace, superd.manager, f"accept4:error={error}:when=1..3"):
        for number in b"1234":
            assert ask(superd.connect("cat"), bytes([number])) == bytes([number])
    assert superd.status("cat")["state"] == "listening"


def test_reset_storm(superd: Superd) -> None:  # A5
    """500 clients that are gone before anybody looks: no failure, and the next one is served."""
    cat(superd, limits={"max_connections": 8})
    superd.start()
    for _ in range(500):
        reset(superd, "cat")
    assert ask(superd.connect("cat"), b"good") == b"good"
    superd.wait_for("cat", "idle")
    assert not superd.find_records(level=re.compile("err"))
    assert superd.status("cat")["now"] == 0


def test_places_are_freed_whatever_the_exit(superd: Superd) -> None:  # A6 B6
    cat(superd, command=["/bin/false"], limits={"max_per_source": 2})
    superd.start()
    for number in range(300):
        with superd.connect("cat") as client:
            assert read_all(client) == b""
        superd.wait_records(number + 1, event="exit", service="cat", status=1)
    assert not superd.find_records(event="refused")
    row = superd.status("cat")
    assert (row["now"], row["total"]) == (0, 300)


@pytest.mark.parametrize("gate", [False, True])
def test_a_client_that_is_back_before_the_news(superd: Superd, gate: bool) -> None:  # A6
    """One after the other from one source: nobody waits for superd to have heard of the last end."""
    more = {"access": {"allow": ["127.0.0.1"]}} if gate else {}
    cat(superd, command=["/bin/false"], limits={"max_per_source": 1}, **more)
    superd.start()
    for _ in range(300):
        with superd.connect("cat") as client:
            assert read_all(client) == b""
    superd.wait_for("cat", "idle")
    assert not superd.find_records(event="refused")
    assert superd.status("cat")["total"] == 300


def test_grandchild_keeps_the_connection(superd: Superd) -> None:  # A7
    """The place is the main process's: a second client comes in while a grandchild holds the first connection."""
    cat(superd, command=["/bin/sh", "-c", "sleep 1000 & echo $!"], limits={"max_connections": 1})
    superd.start()
    with superd.connect("cat") as first, superd.connect("cat") as second:
        pids = [int(client.recv(100)) for client in (first, second)]
        assert set(pids) <= set(descendants(superd.pid))  # orphans, but superd's
        superd.wait_records(2, event="exit", service="cat")
    superd.stop()  # they leave no group and no session behind


def test_mapped_addresses_count_as_ipv4(superd: Superd) -> None:  # A8
    """One source, whichever family the listener has: 127.0.0.1 is not ::ffff:127.0.0.1."""
    cat(superd, listen="tcp:0", limits={"max_per_source": 1})
    superd.start()
    with superd.connect("cat", host="127.0.0.1") as first:
        first.sendall(b"1")
        assert first.recv(1) == b"1"
        peer = superd.wait_record(event="start", service="cat")["peer"]
        assert re.fullmatch(r"127\.0\.0\.1:\d+", peer)
        with superd.connect("cat", host="127.0.0.1") as second:
            assert second.recv(1) == b""
        assert superd.wait_record(event="refused", service="cat")["peer"].startswith("127.0.0.1:")
        if socket.has_ipv6:
            assert ask(superd.connect("cat", host="::1"), b"6") == b"6"


def test_same_address_in_two_files(superd: Superd) -> None:  # A12
    path = superd.dir / "x.sock"
    for name in ("a", "b"):
        superd.write(name, toml(listen=f"unix:{path}", command=["/bin/echo", name]))
    superd.garbage_expected = True
    superd.start()
    assert fetch(superd.connect("a")) == b"a\n"  # the first, by name, keeps it
    row = superd.status("b")
    assert row["state"] == "bad config" and str(path) in superd.log()
    assert "a.toml" in superd.log() and "b.toml" in superd.log()


def test_address_that_is_not_there_yet(superd: Superd, require: Require, root: None) -> None:  # A13
    """In a network namespace of its own: bound without a command when the address comes."""
    unshare, ip, nsenter = require("unshare"), require("ip"), require("nsenter")
    cat(superd, listen="tcp:10.9.9.9:7007")
    superd.write("free", 'command = "/bin/cat"\n[[socket]]\nlisten = "tcp:10.9.9.8:7008"\nfree_bind = true')
    superd.launch(wrapper=[unshare, "--net", "/bin/sh", "-c", f'{ip} link set lo up && exec "$@"', "sh"])
    superd.wait_record(message=re.compile("cannot bind tcp:10.9.9.9:7007.*trying again"), service="cat")
    superd.wait_record(event="listening", service="free")
    superd.wait_record(event="ready")
    assert superd.status("cat")["state"] == "backoff"
    inside = [nsenter, "-t", str(superd.pid), "-n"]
    assert os.spawnv(os.P_WAIT, nsenter, [*inside, ip, "address", "add", "10.9.9.9/32", "dev", "lo"]) == 0
    superd.wait_record(event="listening", service="cat")
    assert superd.status("cat")["state"] == "listening"


def test_busy_port(superd: Superd) -> None:  # A14 G17
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        cat(superd, listen=f"tcp:127.0.0.1:{port}")
        superd.write("other", toml(listen="tcp:127.0.0.1:0", command=["/bin/cat"]))
        superd.start()
        said = superd.wait_record(service="cat", level="err")["message"]
        assert f"tcp:127.0.0.1:{port}" in said and f"pid {os.getpid()} " in said
        assert f"pid {os.getpid()} " in superd.status("cat")["note"]
        assert ask(superd.connect("other"), b"x") == b"x"  # the others run
    superd.wait_record(event="listening", service="cat")
    assert ask(superd.connect("cat"), b"x") == b"x"


SHUTS_DOWN = """
import socket, sys
listener = socket.socket(fileno=3)
conn, _ = listener.accept()
conn.sendall(b"bye")
listener.shutdown(socket.SHUT_RDWR)
"""


def test_service_shuts_the_listener_down(superd: Superd) -> None:  # A15
    cat(superd, run="on-demand", command=[PYTHON, "-I", "-c", SHUTS_DOWN])
    superd.start()
    for number in range(3):  # the address, port 0 resolved, is the same again
        assert fetch(superd.connect("cat")) == b"bye"
        superd.wait_records(number + 1, event="listening", service="cat")
        superd.wait_records(number + 1, message=re.compile("shut it down; opening it again"), service="cat")
    assert len({record["address"] for record in superd.find_records(event="listening")}) == 1
    assert cpu_share(superd.manager, 0.5) < 0.1


def test_service_makes_the_listener_blocking(superd: Superd) -> None:  # A16
    code = "import os, socket; os.set_blocking(3, True); socket.socket(fileno=3).accept()[0].sendall(b'x')"
    cat(superd, run="on-demand", command=[PYTHON, "-I", "-c", code])
    superd.start()
    assert fetch(superd.connect("cat")) == b"x"
    superd.wait_record(event="exit", service="cat")
    superd.wait_for("cat", "active")
    reset(superd, "cat")
    assert superd.call("Health")["live"]  # the loop does not hang in accept


@pytest.mark.parametrize("pass_", ["stdio", "listen-fds"])
def test_connections_are_blocking(superd: Superd, pass_: str) -> None:  # A16
    code = f"import os; fd = {0 if pass_ == 'stdio' else 3}; os.write(fd, str(os.get_blocking(fd)).encode())"
    cat(superd, pass_=pass_, command=[PYTHON, "-I", "-c", code])
    superd.start()
    assert fetch(superd.connect("cat")) == b"True"


@pytest.mark.parametrize("wanted", [False, True])
def test_listeners_are_blocking_unless_asked(superd: Superd, wanted: bool) -> None:  # A16 O9
    """Each time: also after a process that left it otherwise."""
    code = (
        "import os, socket; was = os.get_blocking(3); os.set_blocking(3, not was); s = socket.socket(fileno=3)\n"
        "s.setblocking(True); c = s.accept()[0]; c.sendall(str(was).encode()); os.set_blocking(3, not was)"
    )
    superd.write(
        "cat",
        toml(run="on-demand", command=[PYTHON, "-I", "-c", code])
        + f'[[socket]]\nlisten = "tcp:127.0.0.1:0"\nnonblocking = {json.dumps(wanted)}',
    )
    superd.start()
    for _ in range(2):
        assert fetch(superd.connect("cat")) == str(not wanted).encode()


@pytest.mark.parametrize("role", ["superd-manager", "superd-keeper"])
def test_burst_while_stopped(superd: Superd, role: str) -> None:  # A17 X8 E3
    """300 clients while superd does not run are all served when it does; afterwards every role is as before."""
    cat(superd, command=["/bin/echo", "x"], limits={"max_connections": 16})
    superd.start()
    before: dict[str, set[tuple[str, ...]]] = {}
    for number in (100, 300):
        (stopped,) = superd.pids()[role]
        os.kill(stopped, signal.SIGSTOP)
        clients = [superd.connect("cat") for _ in range(number)]
        os.kill(stopped, signal.SIGCONT)
        assert [fetch(client) for client in clients] == [b"x\n"] * number
        superd.wait_for("cat", "idle")
        before = before or superd.descriptors()
    eventually(superd.descriptors, before)


def test_backlog_is_shown(superd: Superd) -> None:  # A17
    cat(superd)
    superd.start()
    limit = int(Path("/proc/sys/net/core/somaxconn").read_text())
    assert superd.call("Sockets", names=["cat"])["sockets"][0]["room"] == min(4096, limit)


def test_connection_refused_when_not_listening(superd: Superd) -> None:
    """A path that is no socket is never removed."""
    path = superd.dir / "file"
    path.write_text("precious")
    cat(superd, listen=f"unix:{path}")
    superd.start()
    assert str(path) in superd.wait_record(service="cat", level="err")["message"]
    superd.stop()
    assert path.read_text() == "precious"
    with pytest.raises(OSError) as caught, socket.socket(socket.AF_UNIX) as client:
        client.settimeout(TIMEOUT_S)
        client.connect(str(path))
    assert caught.value.errno == errno.ECONNREFUSED


def test_one_client_beside_a_crowd(superd: Superd) -> None:  # B8
    """Services that share spawners: whoever has one client does not wait for all of another's."""
    cat(superd, limits={"max_connections": 200})
    superd.write("other", toml(listen="tcp:127.0.0.1:0", command=["/bin/cat"]))
    superd.start()
    with ExitStack() as stack:

        def crowd(number: int) -> list[socket.socket]:
            return [stack.enter_context(superd.connect("cat")) for _ in range(number)]

        crowd(1)[0].close()
        superd.wait_record(event="exit", service="cat")
        most = max(1, min(os.cpu_count() or 1, 4))
        while len(stopped := superd.pids()["superd-spawner"]) < most:  # a busy pool grows
            for pid in stopped:
                os.kill(pid, signal.SIGSTOP)
            clients = crowd(3 * len(stopped))
            eventually(lambda: len(superd.pids()["superd-spawner"]) > len(stopped), True)
            for pid in stopped:
                os.kill(pid, signal.SIGCONT)
            for client in clients:
                assert ask(client, b"there") == b"there"
        superd.wait_for("cat", "idle")
        for pid in stopped:
            os.kill(pid, signal.SIGSTOP)
        mark = superd.mark()
        clients = crowd(120)
        eventually(lambda: superd.status("cat")["now"] >= 6 * most, True)
        assert superd.status("cat")["now"] < 40  # the others wait in the kernel's queue
        clients.append(stack.enter_context(superd.connect("other")))
        for pid in stopped:
            os.kill(pid, signal.SIGCONT)
        for client in clients:
            assert ask(client, b"x") == b"x"
        order = [record["service"] for record in superd.wait_records(121, after=mark, event="start")]
        assert order.index("other") <= 12 * most + 10
