"""Limits: what waits, what is refused, and that all of it heals by itself."""

from __future__ import annotations

import re
import signal
import socket
import struct

import pytest
from harness import PYTHON, Superd, ask, cpu_s, fetch, read_all, toml


def hold(superd: Superd, **keys: object) -> None:
    """A service whose processes live as long as their client."""
    superd.write("cat", toml(**{"listen": "tcp:127.0.0.1:0", "command": ["/bin/cat"], **keys}))


def served(client: socket.socket) -> socket.socket:
    client.sendall(b"x")
    assert client.recv(1) == b"x"
    return client


def test_full_is_waiting(superd: Superd) -> None:  # B4
    hold(superd, limits={"max_connections": 2})
    superd.start()
    first, second, third = (superd.connect("cat") for _ in range(3))
    with first, second, third:
        served(first), served(second)
        superd.wait_records(2, event="start", service="cat")
        third.sendall(b"3")
        assert superd.status("cat")["now"] == 2
        assert superd.call("Sockets")["sockets"][0]["queue"] == 1  # in the kernel, not refused
        first.shutdown(socket.SHUT_WR)
        assert read_all(first) == b""
        assert third.recv(1) == b"3"
    assert not superd.find_records(event="refused")


@pytest.mark.parametrize("scheme", ["tcp", "unix"])
def test_full_is_refused(superd: Superd, scheme: str) -> None:
    listen = "tcp:127.0.0.1:0" if scheme == "tcp" else f"unix:{superd.dir}/x.sock"
    limits = {"max_connections": 1, "on_full": "refuse", "refuse_message": "busy\n"}
    hold(superd, listen=listen, limits=limits)
    superd.start()
    with served(superd.connect("cat")) as first:
        for _ in range(3):
            assert fetch(superd.connect("cat")) == b"busy\n"
        first.shutdown(socket.SHUT_WR)
        assert read_all(first) == b""
    superd.wait_for("cat", "idle")
    assert ask(superd.connect("cat"), b"again") == b"again"
    assert superd.call("Status", names=["cat"])["services"][0]["refused"] == 3


@pytest.mark.parametrize("scheme", ["tcp", "tcp6", "unix"])
def test_one_source_is_refused(superd: Superd, scheme: str) -> None:  # B3 A6
    """The excess of one source is refused, whatever it had before; another source is served."""
    listen = {"tcp": "tcp4:0", "tcp6": "tcp:[::1]:0", "unix": f"unix:{superd.dir}/x.sock"}[scheme]
    hold(superd, listen=listen, limits={"max_per_source": 2, "refuse_message": "no\n"})
    superd.start()
    with served(superd.connect("cat")) as first, served(superd.connect("cat")):
        assert fetch(superd.connect("cat")) == b"no\n"
        if scheme == "tcp":
            with socket.socket() as other:
                other.bind(("127.0.0.2", 0))
                other.connect(superd.address("cat"))
                served(other)
        first.shutdown(socket.SHUT_WR)
        assert read_all(first) == b""
        superd.wait_records(2 if scheme == "tcp" else 1, event="exit", service="cat")
        with served(superd.connect("cat")):
            pass
    superd.wait_record(event="refused", service="cat", message=re.compile("source"))


def test_max_connections_can_be_switched_off(superd: Superd) -> None:  # B5
    hold(superd, limits={"max_connections": 1})
    superd.start()
    with served(superd.connect("cat")), superd.connect("cat") as second:
        hold(superd, limits={"max_connections": "off"})
        with served(second), served(superd.connect("cat")):
            pass


def test_counts_survive_the_manager(superd: Superd) -> None:  # B3
    """A source's connections still count when another manager has taken over."""
    superd.garbage_expected = True
    hold(superd, listen="tcp:127.0.0.1:0", limits={"max_per_source": 2})
    superd.start()
    with served(superd.connect("cat")), served(superd.connect("cat")):
        superd.kill_role("superd-manager")
        superd.wait_record(message=re.compile("took over"))
        assert fetch(superd.connect("cat")) == b""
    superd.wait_record(event="refused", service="cat")


@pytest.mark.parametrize("command", [["/bin/false"], ["/bin/true"]])
def test_service_that_takes_nothing(superd: Superd, command: list[str]) -> None:  # B7 E12
    """It is started again ever more slowly; the client waits and is served when it can be."""
    program = superd.dir / "program"
    program.symlink_to(command[0])
    hold(superd, listen="tcp:127.0.0.1:0", run="on-demand", command=[program, "-I", "-c", SERVE])
    superd.start()
    with superd.connect("cat") as client:
        began = cpu_s(superd.manager)
        tries = superd.wait_records(4, service="cat", message=re.compile("trying again in"))
        delays = [float(re.search(r"in ([\d.]+) s", record["message"])[1]) for record in tries]  # type: ignore[index]
        assert delays == [0.1, 0.2, 0.4, 0.8]
        assert cpu_s(superd.manager) - began < 0.3
        assert superd.status("cat")["state"] == "backoff"
        fixed = superd.dir / "fixed"
        fixed.symlink_to(PYTHON)
        fixed.replace(program)
        assert read_all(client) == b"served"


@pytest.mark.parametrize("listen", ["tcp:127.0.0.1:0", "unix:socket"])
@pytest.mark.parametrize("how", ["closed", "reset"])
def test_client_that_has_gone_and_was_never_taken(superd: Superd, listen: str, how: str) -> None:  # B7
    """It waits in the queue like any other, so the service is started ever more slowly."""
    hold(superd, listen=listen, run="on-demand", command="/bin/false")
    superd.start()
    with superd.connect("cat") as client:
        if how == "reset":
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    superd.wait_record(service="cat", message=re.compile("trying again in 0.8 s"))


SERVE = "import socket; socket.socket(fileno=3).accept()[0].sendall(b'served')"


def test_busy_listener_starves_nobody(superd: Superd) -> None:  # B8
    """A service whose queue is never empty, and another one's clients: they are served before the queue is."""
    superd.write("busy", toml(listen="tcp:127.0.0.1:0", command=["/bin/true"]))
    superd.write("calm", toml(listen="tcp:127.0.0.1:0", command=["/bin/cat"]))
    superd.start()
    assert ask(superd.connect("calm"), b"x") == b"x"
    superd.kill_role("superd-manager", signal.SIGSTOP)
    flood = [superd.connect("busy") for _ in range(300)]
    try:
        clients = [superd.connect("calm") for _ in range(5)]
        superd.kill_role("superd-manager", signal.SIGCONT)
        for client in clients:
            assert ask(client, b"x") == b"x"
        superd.wait_records(300, event="start", service="busy")
        order = [record["service"] for record in superd.find_records(event="start")]
        assert "calm" not in order[-200:]
    finally:
        for client in flood:
            client.close()
