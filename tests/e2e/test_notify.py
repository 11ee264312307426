"""READY=1 and its kin, as services send them."""

from __future__ import annotations

import os
import re
import socket
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from harness import PYTHON, Superd, toml

Require = Callable[[str], str]

SEND = """
import os, socket, sys, time
def notify(*messages):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.connect(os.environ["NOTIFY_SOCKET"])
        for message in messages:
            sock.send(message)
"""


def service(superd: Superd, code: str, **keys: object) -> None:
    """A service that runs `code`, in which notify(*messages) is defined."""
    source = SEND + code
    superd.write("s", toml(**{"run": "always-on", "ready": "notify", "command": [PYTHON, "-I", "-c", source], **keys}))


def shell(superd: Superd, script: str, **keys: object) -> None:
    keys = {"run": "always-on", "ready": "notify", "command": ["/bin/sh", "-c", script], **keys}
    superd.write("s", toml(**keys))


def test_ready(superd: Superd) -> None:
    """It is starting until it says so; what else it says is shown."""
    gate = superd.dir / "gate"
    os.mkfifo(gate)
    gate.chmod(0o644)
    service(superd, f"open({str(gate)!r}).read(); notify(b'STATUS=warm\\nREADY=1'); time.sleep(1000)")
    superd.start()
    superd.wait_record(event="start", service="s")
    assert superd.status("s")["state"] == "starting"
    gate.write_text("go")
    superd.wait_record(event="ready", service="s")
    assert superd.status("s")["state"] == "ready"
    assert superd.call("Status", names=["s"])["services"][0]["said"] == "warm"


def test_odd_messages(superd: Superd) -> None:  # I1 I9 I8
    """10,000 empty ones and all kinds of nonsense change nothing: READY=1 after them works."""
    nonsense = [b"\0", b"READY", b"READY=2", b"READY=1\0READY=1", b"x" * 4097, b"\xff=\xfe", b"\n" * 4000, b"=1"]
    service(superd, f"notify(*[b''] * 10000, *{nonsense!r}); notify(b'READY=1'); time.sleep(1000)")
    superd.start()
    superd.wait_record(event="ready", service="s")
    assert not superd.find_records(level=re.compile("err"))


@pytest.mark.parametrize("no_block", [False, True])
def test_sender_is_gone(superd: Superd, require: Require, no_block: bool) -> None:  # I3 I4 I5
    """systemd-notify as a child that ends at once: ready each time, with the barrier answered and without one."""
    notify = require("systemd-notify")
    option = " --no-block" if no_block else ""
    shell(
        superd, f"{notify} --ready{option}; echo status $? >&2; exec sleep 1000", notify_access="all", stop_timeout="1s"
    )
    superd.start()
    for number in range(20):
        superd.wait_records(number + 1, event="ready", service="s")
        superd.wait_records(number + 1, event="output", message="status 0")
        superd.call("Restart", names=["s"], wait=False)
    assert not superd.find_records(message=re.compile("no READY"))


@pytest.mark.parametrize("access", ["main", "all", "none"])
def test_access(superd: Superd, access: str) -> None:  # I12
    """READY=1 of a helper counts with "all" only, that of the main process with "main" too."""
    helper = "pid = os.fork()\nif pid == 0: notify(b'READY=1'); os._exit(0)\nos.waitpid(pid, 0)\n"
    code = helper + "os.write(2, b'helper has\\n'); input_ = open(GATE).read(); notify(b'READY=1'); time.sleep(1000)"
    gate = superd.dir / "gate"
    os.mkfifo(gate)
    gate.chmod(0o644)
    service(superd, code.replace("GATE", repr(str(gate))), notify_access=access, ready_timeout="1s", stop_timeout="1s")
    superd.start()
    superd.wait_record(event="output", message="helper has")
    if access == "all":
        superd.wait_record(event="ready", service="s")
    else:
        superd.status("s")  # it has read what was there by now
        assert not superd.find_records(event="ready", service="s")
    gate.write_text("go")
    if access == "none":
        superd.wait_record(service="s", message=re.compile(r"no READY=1 within 1 s; stopping it"))
    else:
        superd.wait_record(event="ready", service="s")


def test_last_words(superd: Superd) -> None:  # I13
    """READY=1 and exit at once: "ready", then "exit", each time."""
    superd.write_daemon('log_level = "debug"')
    service(superd, "notify(b'READY=1')", restart="always", restart_delay="1ms", restart_delay_max="2ms")
    superd.start()
    superd.wait_records(20, event="exit", service="s", status=0)
    found = [record["event"] for record in superd.find_records(service="s", event=re.compile("^(ready|exit|start)$"))]
    assert found[:60] == ["start", "ready", "exit"] * 20


def test_socket_is_the_service_users(superd: Superd, root: None) -> None:  # I14
    shell(superd, "echo $NOTIFY_SOCKET; exec sleep 1000", user="nobody")
    superd.start()
    path = Path(superd.wait_record(event="output", service="s")["message"])
    found = path.stat()
    assert stat.S_ISSOCK(found.st_mode) and found.st_mode & 0o777 == 0o600 and found.st_uid == 65534
    assert path.parent.stat().st_mode & 0o777 == 0o711 and path.parent.stat().st_uid == 0
    pid = os.fork()
    if pid == 0:
        try:
            os.setgroups([])
            os.setgid(1)
            os.setuid(1)
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
                sock.connect(str(path))
        except PermissionError:
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_descriptors_are_closed(superd: Superd) -> None:  # I7 I4
    """What comes along with messages is not kept: not one fd more, however many were sent."""
    code = (
        "with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:\n"
        "    sock.connect(os.environ['NOTIFY_SOCKET'])\n"
        "    for _ in range(100): socket.send_fds(sock, [b'FDSTORE=1'], [0] * 250)\n"
        "notify(b'READY=1'); time.sleep(1000)"
    )
    service(superd, code)
    superd.start()
    superd.wait_record(event="ready", service="s")
    assert sum(len(names) for names in superd.descriptors()["superd-manager"]) < 40


def test_no_ready_in_time(superd: Superd) -> None:
    shell(superd, "exec sleep 1000", ready_timeout="200ms", restart_limit="1/1m", restart_delay="1ms")
    superd.start()
    superd.wait_record(service="s", message=re.compile("no READY=1 within 0.2 s; stopping it"))
    superd.wait_record(service="s", message=re.compile("giving up"))
    assert superd.status("s")["state"] == "failed"


def test_superd_tells_its_own_manager(superd: Superd) -> None:  # P5
    """READY=1 when all is bound, STOPPING=1 at the end; the variable does not get to services."""
    superd.write("s", toml(listen="tcp:127.0.0.1:0", command=["/usr/bin/env"]))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.settimeout(20)
        sock.bind(str(superd.dir / "notify.sock"))
        superd.start(environment={**os.environ, "NOTIFY_SOCKET": str(superd.dir / "notify.sock")})
        assert b"READY=1" in sock.recv(4096).split(b"\n")
        with superd.connect("s") as client:
            text = b""
            while part := client.recv(4096):
                text += part
        assert b"NOTIFY_SOCKET" not in text and b"PATH=" in text
        superd.stop()
        assert b"STOPPING=1" in sock.recv(4096).split(b"\n")
