"""builtin = "tcpmux", RFC 1078, and the services behind it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest
from harness import Superd, ask, eventually, fetch, toml


def start(superd: Superd, **more: dict[str, object]) -> None:
    superd.write("mux", toml(listen="tcp:127.0.0.1:0", builtin="tcpmux"))
    superd.write("upper", toml(listen="tcpmux:+upper", command=["/usr/bin/tr", "a-z", "A-Z"], **more.get("upper", {})))
    script = "echo +my own $REMOTE_ADDR $TCPLOCALPORT; exec cat"
    superd.write("own", toml(listen="tcpmux:Own", command=["/bin/sh", "-c", script], **more.get("own", {})))
    superd.start()


def test_names(superd: Superd) -> None:
    """What has come after the name's line is the service's; \\n alone is taken, and case makes no difference."""
    start(superd)
    port = superd.address("mux")[1]
    assert ask(superd.connect("mux"), b"upper\r\nhello") == b"+Go\r\nHELLO"
    assert ask(superd.connect("mux"), b"UPPER\nhello") == b"+Go\r\nHELLO"
    assert ask(superd.connect("mux"), b"own\r\nhello") == b"+my own 127.0.0.1 %d\nhello" % port
    assert ask(superd.connect("mux"), b"HELP\r\n") == b"own\r\nupper\r\n"
    assert ask(superd.connect("mux"), b"nothing\r\n") == b"-there is no such service\r\n"
    assert ask(superd.connect("mux"), b"mux\r\n") == b"-there is no such service\r\n"
    superd.wait_record(event="refused", service="mux", message=lambda text: "nothing" in text)
    record = superd.wait_record(event="exit", service="upper")
    assert record["status"] == 0 and record["peer"].startswith("127.0.0.1:")
    assert superd.status("upper")["total"] == 2
    eventually(lambda: superd.status("mux")["now"], 0)


def test_byte_by_byte_and_too_long(superd: Superd) -> None:
    start(superd)
    with superd.connect("mux") as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in b"upper\r":
            client.sendall(bytes([byte]))
        client.sendall(b"\nx")
        client.shutdown(socket.SHUT_WR)
        assert fetch(client) == b"+Go\r\nX"
    with superd.connect("mux") as client:
        client.sendall(b"u" * 256)
        assert client.recv(100) == b""
    assert ask(superd.connect("mux"), b"") == b""


def test_limits_and_access_are_those_of_the_service(superd: Superd) -> None:
    start(
        superd, upper={"access": {"deny": ["127.0.0.0/8"]}},
        own={"limits": {"max_connections": 1, "on_full": "refuse", "refuse_message": "-busy\r\n"}},
    )  # fmt: skip
    assert ask(superd.connect("mux"), b"upper\r\n") == b"+Go\r\n"
    superd.wait_record(event="refused", service="upper", message=lambda text: "access" in text)
    with superd.connect("mux") as first, first.makefile("rb") as lines:
        first.sendall(b"own\r\n")
        assert lines.readline().startswith(b"+my own")
        assert ask(superd.connect("mux"), b"own\r\n") == b"-busy\r\n"
    superd.call("Stop", names=["own"])
    assert ask(superd.connect("mux"), b"own\r\n") == b"-own is not running\r\n"


def test_clients_wait_for_a_place(superd: Superd) -> None:
    start(superd, own={"limits": {"max_connections": 1}})
    with superd.connect("mux") as first, first.makefile("rb") as lines, superd.connect("mux") as second:
        first.sendall(b"own\r\n")
        assert lines.readline().startswith(b"+my own")
        second.sendall(b"own\r\nx")
        second.shutdown(socket.SHUT_WR)
        eventually(lambda: superd.status("mux")["now"], 0)  # it was handed on
        first.close()
        lines.close()
        assert fetch(second).endswith(b"\nx")


def test_a_new_manager(superd: Superd) -> None:
    """Who waits behind tcpmux loses nothing (the inbox is the keeper's as listeners are)."""
    start(superd, own={"limits": {"max_connections": 1}})
    with superd.connect("mux") as first, first.makefile("rb") as lines, superd.connect("mux") as second:
        first.sendall(b"own\r\n")
        assert lines.readline().startswith(b"+my own")
        second.sendall(b"own\r\nx")
        second.shutdown(socket.SHUT_WR)
        eventually(lambda: superd.status("mux")["now"], 0)
        mark = superd.mark()
        superd.kill_role("superd-manager")
        superd.wait_record(after=mark, message=lambda text: "took over" in text)
        first.shutdown(socket.SHUT_RDWR)
        assert fetch(second).endswith(b"\nx")
    assert ask(superd.connect("mux"), b"upper\r\nhello") == b"+Go\r\nHELLO"


def test_reload(superd: Superd) -> None:
    start(superd)
    mark = superd.mark()
    superd.write("late", toml(listen=["tcpmux:late", "tcp:127.0.0.1:0"], command="/bin/cat"))
    superd.wait_record(after=mark, event="listening", service="late", address="tcpmux:late")
    assert ask(superd.connect("mux"), b"late\r\nx") == b"x"
    (superd.conf / "conf.d/own.toml").unlink()
    superd.wait_record(after=mark, event="reload", message=lambda text: "own" in text)
    assert ask(superd.connect("mux"), b"own\r\n") == b"-there is no such service\r\n"


def test_nobody_else_can_put_connections_in(superd: Superd) -> None:
    start(superd)
    with open("/proc/net/unix") as table, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as stranger:
        names = [line.split()[-1] for line in table if " 0002 " in line and "@" in line]
        for name in names:
            try:
                stranger.sendto(b"\0", "\0" + name[1:])
            except PermissionError:
                break
            except OSError:
                continue
        else:
            pytest.fail("no inbox is found")
    assert ask(superd.connect("mux"), b"upper\r\nx") == b"+Go\r\nX"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('listen = "tcpmux:x"\nrun = "on-demand"\ncommand = "/bin/cat"', "has connections only"),
        ('listen = "udp:0"\nbuiltin = "tcpmux"', "tcpmux is for connections"),
        ('command = "/bin/cat"\n[[socket]]\nlisten = "tcpmux:x"\nmode = "0600"', "`mode` means nothing for tcpmux:x"),
        ('listen = ["tcpmux:x", "tcpmux:+X"]\ncommand = "/bin/cat"', "tcpmux:+x and tcpmux:x collide"),
    ],
)
def test_mistakes(superd: Superd, text: str, said: str) -> None:
    path = superd.write("x", text)
    command = [sys.executable, "-I", "-m", "superd.cli.superctl", "check", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, env={**os.environ, "NO_COLOR": "1"})
    assert done.returncode == 78 and said in done.stdout + done.stderr
