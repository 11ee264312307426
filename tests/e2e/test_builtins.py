"""builtin = "…": RFC 862, 863, 864, 867 and 868 by superd itself."""

from __future__ import annotations

import re
import socket
import struct
import time

import pytest
from harness import Superd, ask, eventually, fetch, toml


def write(superd: Superd, name: str, **keys: object) -> None:
    superd.write(name, toml(listen=["tcp:127.0.0.1:0"], builtin=name, **keys))


def test_streams(superd: Superd) -> None:
    for name in ("echo", "discard", "chargen", "daytime", "time"):
        write(superd, name)
    superd.start()
    assert ask(superd.connect("echo"), b"hello") == b"hello"
    assert ask(superd.connect("discard"), b"hello") == b""
    with superd.connect("chargen") as client, client.makefile("rb") as lines:
        first, second = lines.readline(), lines.readline()
        assert len(first) == 74 and first.endswith(b"\r\n") and first[1:72] == second[:71]
    assert time.mktime(time.strptime(fetch(superd.connect("daytime")).decode().rstrip())) == pytest.approx(
        time.time(), abs=5
    )
    (since_1900,) = struct.unpack("!I", fetch(superd.connect("time")))
    assert since_1900 - 2208988800 == pytest.approx(time.time(), abs=5)
    record = superd.wait_record(event="exit", service="echo")
    assert record["status"] == 0 and "pid" not in record
    eventually(lambda: superd.status("chargen")["now"], 0)


def test_limits_access_and_stop(superd: Superd) -> None:
    """Those of any service; what runs ends at once."""
    write(superd, "echo", limits={"max_connections": 1, "on_full": "refuse"})
    superd.write("discard", toml(listen="tcp:127.0.0.1:0", builtin="discard", access={"deny": ["127.0.0.0/8"]}))
    superd.start()
    with superd.connect("echo") as client:
        client.sendall(b"x")
        assert client.recv(10) == b"x"
        assert fetch(superd.connect("echo")) == b""
        assert superd.status("echo")["now"] == 1
        assert fetch(superd.connect("discard")) == b""
        assert superd.call("Stop", names=["echo"])["results"][0]["ok"]
        assert client.recv(10) == b""
    assert superd.wait_record(event="exit", service="echo")["signal"] == "TERM"
    assert superd.call("Start", names=["echo"])["results"][0]["ok"]
    assert ask(superd.connect("echo"), b"again") == b"again"


def datagram(superd: Superd, service: str, data: bytes, source: int = 0) -> bytes:
    """The answer; b"-" if there is none before that to a second, proper one."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(20)
        sock.bind(("127.0.0.2", source))
        sock.sendto(data, superd.address(service))
        if source and source < 1024:
            superd.wait_record(event="refused", service=service, peer=f"127.0.0.2:{source}")
            sock.setblocking(False)
            try:
                return sock.recv(100)
            except BlockingIOError:
                return b"-"
        return sock.recv(1000)


def test_datagrams(superd: Superd) -> None:  # C3
    """One for one, and never more than came."""
    for name in ("echo", "discard", "daytime", "time"):
        superd.write(name, toml(listen="udp:127.0.0.1:0", builtin=name))
    superd.start()
    assert datagram(superd, "echo", b"hello") == b"hello"
    assert len(datagram(superd, "daytime", b"." * 100)) == 26
    assert len(datagram(superd, "time", b"....")) == 4
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(20)
        sock.sendto(b"?", superd.address("daytime"))  # an answer would be 26 times as large
        sock.sendto(b"." * 30, superd.address("daytime"))
        sock.sendto(b"x", superd.address("discard"))
        sock.sendto(b"", superd.address("echo"))
        assert len(sock.recv(100)) == 26
        eventually(lambda: superd.status("discard")["total"], 1)
        assert superd.status("daytime")["total"] == 3


def test_no_answer_to_another_such_service(superd: Superd, root: None) -> None:  # C3
    """Whose port is below 1024, so that only root can send from there."""
    superd.write("echo", toml(listen="udp:127.0.0.1:0", builtin="echo"))
    superd.start()
    for source in (7, 13, 19, 37):
        assert datagram(superd, "echo", b"loop", source) == b"-"


def test_two_of_them_do_not_talk_for_ever(superd: Superd) -> None:  # C3
    """A forged datagram from one echo service to the other."""
    superd.write("echo", toml(listen="udp:127.0.0.1:0", builtin="echo"))
    superd.start()
    host, port = superd.address("echo")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.2", port))
        sock.sendto(b"ping", (host, port))
        superd.wait_record(event="refused", service="echo", message=re.compile("two would never stop"))
    assert superd.status("echo")["total"] == 0


def test_what_is_wrong(superd: Superd) -> None:
    superd.garbage_expected = True
    superd.write("a", toml(listen="udp:127.0.0.1:0", builtin="chargen"))
    superd.write("b", toml(listen="tcp:127.0.0.1:0", builtin="echo", command="/bin/cat"))
    superd.write("c", toml(listen="tcp:127.0.0.1:0", builtin="eccho"))
    superd.write("d", toml(builtin="echo"))
    superd.write("e", toml(listen="tcp:127.0.0.1:0", builtin="echo", user="root"))
    superd.start()
    for text in (
        "more than it was sent",
        "`command` means nothing",
        "'eccho' is not a value of `builtin`",
        "needs a socket",
        "`user` means",
    ):
        assert superd.find_records(message=re.compile(text)), text


def test_survival(superd: Superd) -> None:
    """Its connections end with a killed manager; the next client is served."""
    write(superd, "echo")
    superd.start()
    with superd.connect("echo") as client:
        client.sendall(b"x")
        assert client.recv(10) == b"x"
        superd.kill_role("superd-manager")
        assert client.recv(10) == b""
    assert ask(superd.connect("echo"), b"again") == b"again"
