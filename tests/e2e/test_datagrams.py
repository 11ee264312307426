"""Datagram services get the bound socket itself, with the first datagram still in it."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from harness import PYTHON, TIMEOUT_S, Superd, cpu_s, toml

SCHEMES = ["udp", "unix-dgram"]

# Answers `count` datagrams from the socket it finds at fd 0 or 3, then ends.
ANSWER = """
import socket, sys
fd, count = map(int, sys.argv[1:])
sock = socket.socket(fileno=fd)
for _ in range(count):
    data, peer = sock.recvfrom(100)
    sock.sendto(b"%d bytes" % len(data), peer)
"""


def listen(superd: Superd, scheme: str) -> str:
    return "udp:127.0.0.1:0" if scheme == "udp" else f"unix-dgram:{superd.dir}/d.sock"


@contextmanager
def client(superd: Superd) -> Iterator[socket.socket]:
    address = superd.listening("d")
    family = socket.AF_INET if address.startswith("udp") else socket.AF_UNIX
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        sock.settimeout(TIMEOUT_S)
        if family == socket.AF_INET:
            sock.connect(superd.address("d"))
        else:
            own = superd.dir / f"own{os.urandom(4).hex()}.sock"
            sock.bind(str(own))
            own.chmod(0o777)
            sock.connect(address.partition(":")[2])
        yield sock


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("pass_", ["stdio", "listen-fds"])
def test_answers(superd: Superd, scheme: str, pass_: str) -> None:  # C6
    """The first datagram is there for the process, an empty one too, and after its end the next starts another."""
    fd = "0" if pass_ == "stdio" else "3"
    superd.write("d", toml(listen=listen(superd, scheme), pass_=pass_, command=[PYTHON, "-I", "-c", ANSWER, fd, "2"]))
    superd.start()
    with client(superd) as sock:
        for number in range(4):
            sock.send(b"x" * number)
            assert sock.recv(100) == b"%d bytes" % number
    exits = superd.wait_records(2, event="exit", service="d")
    assert [record["status"] for record in exits] == [0, 0]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_datagram_that_nobody_reads(superd: Superd, scheme: str) -> None:  # C1 B7 C6
    """A few tries, ever more slowly; then it is dropped, and a good program works without a restart."""
    program = superd.dir / "program"
    program.symlink_to("/bin/true")
    superd.write("d", toml(listen=listen(superd, scheme), command=[program, "-I", "-c", ANSWER, "3", "1"]))
    superd.start()
    with client(superd) as sock:
        began = cpu_s(superd.manager)
        sock.send(b"lost")
        superd.wait_record(service="d", message=re.compile("left unread 5 times; dropped it"))
        assert len(superd.find_records(event="start", service="d")) == 5
        assert cpu_s(superd.manager) - began < 0.3
        fixed = superd.dir / "fixed"
        fixed.symlink_to(PYTHON)
        fixed.replace(program)
        sock.send(b"new")
        assert sock.recv(100) == b"3 bytes"
    assert len(superd.find_records(event="start", service="d")) <= 7


def test_one_datagram_of_many_is_read(superd: Superd) -> None:  # C1
    """A process that reads one of several is healthy: the next follows at once, for each of them."""
    superd.write("d", toml(listen="udp:127.0.0.1:0", command=[PYTHON, "-I", "-c", ANSWER, "3", "1"]))
    superd.start()
    with client(superd) as sock:
        for number in range(5):
            sock.send(b"x" * number)
        assert sorted(sock.recv(100) for _ in range(5)) == [b"%d bytes" % number for number in range(5)]
    superd.wait_records(5, event="exit", service="d", status=0)
    assert not superd.find_records(message=re.compile("trying again"))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_per_connection_is_refused(superd: Superd, scheme: str) -> None:  # C2
    superd.write("d", toml(listen=listen(superd, scheme), run="per-connection", command=["/bin/cat"]))
    superd.garbage_expected = True
    superd.start()
    assert superd.status("d")["state"] == "bad config"
    assert re.search("datagram", superd.log())


def test_nobody_can_share_the_port(superd: Superd, root: None) -> None:  # A11
    superd.write("d", toml(listen="udp:127.0.0.1:0", command=["/bin/true"]))
    superd.start()
    address = superd.address("d")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as thief:
        thief.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with pytest.raises(OSError, match="Address already in use"):
            thief.bind(address)
