"""Who may use the control socket, and for what: real users, real superctl."""

from __future__ import annotations

import grp
import json
import os
import pwd
import random
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing

import pytest
from forked import in_child
from harness import PYTHON, TIMEOUT_S, Superd, toml

from superd.cli import superctl

ARGV = [sys.executable, "-I", "-m", "superd.cli.superctl"]
USER, GROUP = "games", "staff"  # that every Debian has, and that are nothing to superd

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be somebody else")

# Says what the control socket answers, as another user: `NAME`, or the error's name. Standard library only.
ASK = """
import json, os, socket, sys
path, uid, groups, calls = json.loads(sys.argv[1])
os.setgroups(groups[1:]); os.setgid(groups[0]); os.setuid(uid)
for method in calls:
    with socket.socket(socket.AF_UNIX) as sock:
        try:
            sock.connect(path)
        except OSError as error:
            print(type(error).__name__)
            continue
        parameters = {} if method in ("List", "Metrics", "Health", "Shutdown") else {"names": ["cat"]}
        call = {"method": "io.superd.Control." + method, "parameters": parameters}
        try:
            sock.sendall(json.dumps(call).encode() + b"\\0")
        except BrokenPipeError:
            pass  # refused; why is there to be read
        data = b""
        while not data.endswith(b"\\0") and (part := sock.recv(1 << 16)):
            data += part
        print(json.loads(data[:-1]).get("error", "answers").rpartition(".")[2])
"""


def asked(superd: Superd, uid: int, groups: list[int], *methods: str) -> list[str]:
    facts = json.dumps([superd.control.removeprefix("unix:"), uid, groups, methods])
    done = subprocess.run([PYTHON, "-I", "-c", ASK, facts], capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def mode_and_group(superd: Superd) -> tuple[int, int]:
    facts = os.stat(superd.control.removeprefix("unix:"))
    return stat.S_IMODE(facts.st_mode), facts.st_gid


@pytest.fixture
def superd() -> Iterator[Superd]:
    with Superd() as superd:
        superd.write("cat", toml(listen="tcp:127.0.0.1:0", command="/bin/cat"))
        yield superd


def test_a_group_may_look(superd: Superd) -> None:  # J3
    uid, gid = pwd.getpwnam(USER).pw_uid, grp.getgrnam(GROUP).gr_gid
    superd.write_daemon(toml(control_group=GROUP))
    superd.start()
    assert mode_and_group(superd) == (0o660, gid)
    looks, acts = ("List", "Status", "Logs", "Metrics", "Health"), ("Start", "Stop", "Restart", "Kill", "Shutdown")
    for groups in ([gid], [65534, gid]):
        assert asked(superd, uid, groups, *looks) == ["answers"] * len(looks)
        assert asked(superd, uid, groups, *acts) == ["PermissionDenied"] * len(acts)
    assert asked(superd, uid, [65534], "List") == ["PermissionError"]
    assert superd.status("cat")["state"] == "listening"

    def stop() -> tuple[int, str]:
        os.setgroups([gid])
        os.setuid(uid)
        try:
            superctl.run(["-s", superd.control, "stop", "cat"])
        except superctl.Failure as failure:
            return failure.code, str(failure)
        return 0, ""

    code, said = in_child(stop)
    assert code == 77 and said.startswith("not permitted")


def test_a_wider_mode_lets_nobody_in(superd: Superd) -> None:  # J3
    superd.write_daemon(toml(control_group=GROUP, control_mode="0666"))
    superd.start()
    assert mode_and_group(superd)[0] == 0o666
    assert asked(superd, 65534, [65534], "List", "Stop") == ["PermissionDenied"] * 2


@pytest.mark.parametrize("admin", [f"user:{USER}", GROUP, f"group:{GROUP}"])
def test_admins_may_do_everything(superd: Superd, admin: str) -> None:
    uid, gid = pwd.getpwnam(USER).pw_uid, grp.getgrnam(GROUP).gr_gid
    superd.write_daemon(toml(control_admins=[admin]))
    superd.start()
    assert asked(superd, uid, [65534, gid], "List", "Stop", "Start") == ["answers"] * 3
    assert asked(superd, 65534, [65534], "List") == ["PermissionDenied"]


def test_a_new_manager_lets_in_the_same(superd: Superd) -> None:
    uid, gid = pwd.getpwnam(USER).pw_uid, grp.getgrnam(GROUP).gr_gid
    superd.write_daemon(toml(control_group=GROUP))
    superd.start()
    superd.kill_role("superd-manager")
    assert asked(superd, uid, [gid], "List", "Stop") == ["answers", "PermissionDenied"]


def test_silent_and_babbling_clients_lock_nobody_out(superd: Superd) -> None:  # J4, X23
    """200 that say a byte, 200 that send rubbish; superctl is answered in less than a second all the same."""
    superd.start()
    path = superd.control.removeprefix("unix:")
    superd.call("List")
    with ExitStack() as stack:
        for number in range(400):
            client = stack.enter_context(closing(socket.socket(socket.AF_UNIX)))
            client.connect(path)
            client.settimeout(TIMEOUT_S)
            try:
                client.send(b"{" if number % 2 else random.Random(number).randbytes(200) + b"\0")
            except (BrokenPipeError, ConnectionResetError):
                pass  # shown the door already
        began = time.monotonic()
        done = subprocess.run([*ARGV, "-s", superd.control, "list"], capture_output=True, text=True, timeout=TIMEOUT_S)
        took_s = time.monotonic() - began
    assert (done.returncode, done.stderr) == (0, ""), done
    assert "cat" in done.stdout
    assert took_s < 1.0


def test_rubbish(superd: Superd) -> None:  # J1, J8, F14
    """Whatever is sent, it is answered or the connection ends, and superd goes on. SUPERD_FUZZ_S: for how long."""
    superd.start()
    path = superd.control.removeprefix("unix:")
    superd.call("List")
    seed = random.randrange(1 << 32)
    chance = random.Random(seed)
    methods = [
        "List",
        "Status",
        "Logs",
        "Start",
        "__class__",
        "os.system",
        "a.b",
        "Wait",
        "Health",
        "Metrics",
        "History",
    ]
    values = [None, True, -1, 2**63, 1e308, "cat", "\x00", "\ud800", ["cat"], [[]], {}, {"a": {"b": {}}}, "x" * 70_000]
    words = ["names", "count", "follow", "for", "what", "wait", "signal", "name", "address", "__init__", ""]
    until = time.monotonic() + float(os.environ.get("SUPERD_FUZZ_S", "3"))
    rounds = 0
    while time.monotonic() < until:
        rounds += 1
        call = {
            chance.choice(["method"] * 5 + ["x"]): f"io.superd.Control.{chance.choice(methods)}",
            "parameters": {chance.choice(words): chance.choice(values) for _ in range(chance.randrange(4))},
            chance.choice(["more", "oneway", "upgrade", "none"]): chance.choice([True, False, 1, "yes"]),
        }
        data = bytearray(json.dumps(call).encode() + b"\0")
        if chance.random() < 0.5:
            for _ in range(chance.randrange(1, 6)):
                data[chance.randrange(len(data))] = chance.randrange(256)
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(path)
            client.settimeout(TIMEOUT_S)
            try:
                client.sendall(data)
                client.shutdown(socket.SHUT_WR)
                if chance.random() < 0.7 and b"follow" not in data and b"Wait" not in data and b"Start" not in data:
                    while client.recv(1 << 16):
                        pass
            except (BrokenPipeError, ConnectionResetError):
                pass
    assert superd.call("Health")["ready"], f"seed {seed}, {rounds} rounds"
    assert not superd.find_records(level="err"), f"seed {seed}, {rounds} rounds"
