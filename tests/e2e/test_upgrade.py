"""superctl upgrade: the code that is installed now takes over, and nobody notices."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from harness import PYTHON, TIMEOUT_S, Superd, eventually, read_all, toml

import superd as package

SOURCE = Path(package.__file__).parent
ECHO = ["/bin/sh", "-c", "echo hello; exec cat"]
# Stores its counter's pipe with superd, and says its pid to each client.
TELLER = """
import os, socket
listener = socket.socket(fileno=3)
listener.setblocking(True)
print("ready", flush=True)
while True:
    conn = listener.accept()[0]
    conn.sendall(b"%d\\n" % os.getpid())
    conn.close()
"""


class Installed(Superd):
    """A superd that is installed on its own, below `dir`, so that another version can take its place."""

    def __init__(self) -> None:
        super().__init__()
        home = self.dir / "venv"
        site = home / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
        site.mkdir(parents=True)
        (home / "bin").mkdir()
        base = Path(sys.base_prefix) / "bin" / f"python{sys.version_info[0]}.{sys.version_info[1]}"
        (home / "bin" / "python").symlink_to(base)
        (home / "pyvenv.cfg").write_text(f"home = {base.parent}\ninclude-system-site-packages = false\n")
        paths = [one for one in sys.path if one.endswith(("site-packages", "dist-packages"))]
        (site / "rest.pth").write_text("\n".join(paths) + "\n")
        self.site = site
        self.install(package.__version__)
        self.python = str(home / "bin" / "python")
        self.program = [self.python, "-I", "-m", "superd"]

    def install(self, version: str, **changed: str) -> None:
        """changed: module, "/" as "__" -> its text."""
        fresh = self.dir / f"new-{version}"
        shutil.copytree(SOURCE, fresh, ignore=shutil.ignore_patterns("__pycache__"))
        init = fresh / "__init__.py"
        init.write_text(
            init.read_text().replace(f'__version__ = "{package.__version__}"', f'__version__ = "{version}"')
        )
        for name, text in changed.items():
            (fresh / f"{name.replace('__', '/')}.py").write_text(text)
        shutil.rmtree(self.site / "superd", ignore_errors=True)
        fresh.rename(self.site / "superd")

    def ctl(self, *arguments: str, code: int = 0) -> str:
        argv = [self.python, "-I", "-m", "superd.cli.superctl", "-s", self.control, *arguments]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
        assert done.returncode == code, (arguments, done.returncode, done.stdout, done.stderr, self.log())
        return done.stdout + done.stderr


@pytest.fixture
def superd() -> Iterator[Installed]:
    with Installed() as one:
        yield one


class Load(threading.Thread):
    """50 connections a second; `failed` says what went wrong."""

    def __init__(self, superd: Superd, name: str) -> None:
        super().__init__()
        self.address = superd.address(name)
        self.done = threading.Event()
        self.failed: list[str] = []
        self.count = 0
        self.pids: set[bytes] = set()

    def run(self) -> None:
        while not self.done.wait(0.02):
            try:
                with socket.create_connection(self.address, TIMEOUT_S) as client:
                    client.shutdown(socket.SHUT_WR)
                    said = read_all(client)
                if not said:
                    self.failed.append("nothing said")
                self.pids.add(said)
            except OSError as error:
                self.failed.append(str(error))
            self.count += 1

    def finish(self) -> None:
        self.done.set()
        self.join(TIMEOUT_S)
        assert not self.failed


def test_upgrade_under_load(superd: Installed) -> None:
    superd.write("echo", toml(listen="tcp:127.0.0.1:0", command=ECHO))
    superd.write(
        "teller",
        toml(listen="tcp:127.0.0.1:0", run="on-demand", pass_="listen-fds", command=[PYTHON, "-c", TELLER]),
    )
    superd.write("quiet", toml(listen="tcp:127.0.0.1:0", run="on-demand", pass_="listen-fds",
                               command=[PYTHON, "-c", TELLER]))  # fmt: skip
    superd.start()
    keeper, manager = superd.pid, superd.manager
    sessions = [superd.connect("echo") for _ in range(20)]
    assert all(one.recv(100) == b"hello\n" for one in sessions)
    loads = [Load(superd, "echo"), Load(superd, "teller")]
    for load in loads:
        load.start()
    eventually(lambda: loads[1].count > 5, True)
    superd.ctl("pause", "quiet")
    pids = {row["pid"] for row in superd.call("Connections", names=["echo"])["connections"]}
    superd.install("99.1")
    assert "superd 99.1 has taken over" in superd.ctl("upgrade")
    superd.wait_record(message=re.compile(r"took over \(superd 99\.1, was "))
    counts = [load.count for load in loads]
    eventually(lambda: all(load.count > count + 5 for load, count in zip(loads, counts, strict=True)), True)
    for load in loads:
        load.finish()
    assert superd.pid == keeper and superd.manager != manager
    for one in sessions:
        one.sendall(b"still here")
        assert one.recv(100) == b"still here"
    assert superd.status("echo")["now"] == 20
    assert superd.status("echo")["total"] == 20 + loads[0].count
    assert pids.intersection(row["pid"] for row in superd.call("Connections", names=["echo"])["connections"])
    assert len(loads[1].pids) == 1 and superd.status("teller")["total"] == 1
    assert (
        "quiet" in superd.ctl("list", "--sockets") and superd.call("Sockets", names=["quiet"])["sockets"][0]["paused"]
    )
    for one in sessions:
        one.close()
    eventually(lambda: superd.status("echo")["now"], 0)
    superd.install("99.2")
    assert "superd 99.2 has taken over from 99.1" in superd.ctl("upgrade")
    os.kill(superd.status("teller")["pid"], signal.SIGKILL)  # the keeper that has become another still reaps
    superd.wait_record(event="exit", service="teller", signal="KILL")
    names = sorted(os.readlink(f"/proc/{keeper}/fd/{fd}") for fd in os.listdir(f"/proc/{keeper}/fd"))
    assert not [name for name in names if "superd-state" in name]


@pytest.mark.parametrize("module", ["keeper", "manager__supervisor", "spawner", "core__effective"])
def test_new_code_that_does_not_come_up(superd: Installed, module: str) -> None:
    superd.write("echo", toml(listen="tcp:127.0.0.1:0", command=ECHO))
    superd.start()
    manager = superd.manager
    superd.install("99.1", **{module: "raise RuntimeError('half written')\n"})
    with superd.connect("echo") as client:  # whose spawner is the first, and of the version that runs
        argv = [sys.executable, "-I", "-m", "superd.cli.superctl", "-s", superd.control, "upgrade"]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
        assert done.returncode == 1 and "half written" in done.stderr and "goes on as it is" in done.stderr
        assert superd.manager == manager
        assert client.recv(100) == b"hello\n"
    with superd.connect("echo") as client:
        assert client.recv(100) == b"hello\n"


def test_another_generation(superd: Installed) -> None:
    superd.start()
    text = (SOURCE / "core" / "messages.py").read_text()
    superd.install("99.1", core__messages=text.replace("\nGENERATION = 1\n", "\nGENERATION = 2\n"))
    assert "stop superd and start it again" in superd.ctl("upgrade", code=1)


def test_main_command_stays(superd: Installed) -> None:
    superd.write("echo", toml(listen="tcp:127.0.0.1:0", command=ECHO))
    superd.start("--", "/bin/sh", "-c", "trap 'exit 7' USR1; while :; do sleep 0.1; done")
    superd.install("99.1")
    superd.ctl("upgrade")
    superd.wait_record(message=re.compile("took over"))
    os.kill(superd.pid, signal.SIGUSR1)
    assert superd.wait_exit() == 7


@pytest.mark.parametrize("how", ["garbage", "another version", "listeners only", "wrong fd"])
def test_state_that_cannot_be_understood(how: str) -> None:  # P1
    """superd begins anew, with the listeners that are certain; what is not is closed."""
    with Superd() as superd, socket.create_server(("127.0.0.1", 0)) as listener, socket.socket() as other:
        port = listener.getsockname()[1]
        address = f"tcp:127.0.0.1:{port}"
        superd.write("echo", toml(listen=address, command=ECHO))
        found = os.fstat(listener.fileno())
        known = [listener.fileno(), found.st_mode >> 12, found.st_dev, found.st_ino]
        held = {f"listener:echo:{address}={address}": [listener.fileno()]}
        state = {
            "garbage": "{",
            "another version": {"version": 0, "fds": [known], "state": {"held": held}},
            "listeners only": {"version": 1, "fds": [known], "state": {"held": held, "options": None}},
            "wrong fd": {"version": 1, "fds": [[other.fileno(), *known[1:]]], "state": {"held": held}},
        }[how]
        left = os.memfd_create("state")
        try:
            os.write(left, state.encode() if isinstance(state, str) else json.dumps(state).encode())
            superd.program += ["--resume-fd", str(left)]
            waiting = socket.create_connection(("127.0.0.1", port))
            fds = [left, listener.fileno(), other.fileno()]
            superd.launch(pass_fds=fds)
            superd.wait_record(message=re.compile("cannot take over what superd was: .*; starting anew"))
            if how != "listeners only":
                listener.close()  # the last that has it
            superd.wait_record(message=re.compile("ready: 1 services"))
            if how == "listeners only":
                with waiting:
                    assert waiting.recv(100) == b"hello\n"
            waiting.close()
            eventually(lambda: len(superd.call("Sockets")["sockets"]), 1)
            superd.wait_record(event="listening") if how != "listeners only" else None
            with socket.create_connection(("127.0.0.1", port)) as client:
                assert client.recv(100) == b"hello\n"
            assert not [one for one in os.listdir(f"/proc/{superd.pid}/fd") if "state" in link(superd.pid, one)]
        finally:
            os.close(left)


def link(pid: int, fd: str) -> str:
    try:
        return os.readlink(f"/proc/{pid}/fd/{fd}")
    except OSError:
        return ""


def test_as_pid_1(superd: Installed, root: None) -> None:
    """Orphans are reaped all the same, signals reach it, and nothing is left of the mask in which it changed."""
    superd.write("echo", toml(listen="tcp:127.0.0.1:0", command=["/bin/sh", "-c", "sleep 0.2 & exec cat"]))
    superd.write("once", toml(run="always-on", command=["/bin/sleep", "1000"]))
    superd.start(wrapper=["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"])
    with superd.connect("echo") as client:
        superd.install("99.1")
        superd.ctl("upgrade")
        superd.wait_record(message=re.compile("took over"))
        client.sendall(b"still here")
        assert client.recv(100) == b"still here"
    eventually(lambda: superd.status("echo")["now"], 0)
    superd.call("Restart", names=["once"])
    eventually(lambda: len(superd.services()), 1)  # the orphan sleeps a little longer than its connection lives
    for pid in (superd.pid, superd.manager, *superd.services()):
        masks = dict(re.findall(r"^(Sig\w+):\s*(\w+)", Path(f"/proc/{pid}/status").read_text(), re.M))
        assert int(masks["SigBlk"], 16) == 0
    mark = superd.mark()
    os.kill(superd.pid, signal.SIGUSR1)
    superd.wait_record(after=mark, message=re.compile("once: ready"))


def without_keys(text: str) -> str:
    return text.replace('"services": services,', '"services": {name: {} for name in services},')


def with_keys(text: str) -> str:
    new = '"services": {name: {**row, "new": [1], "notify": {"new": 2}} for name, row in services.items()}, "new": {},'
    return text.replace('"services": services,', new)


def with_nonsense(text: str) -> str:
    return text.replace(
        '"services": services,', '"services": {name: {**row, "starts": 5} for name, row in services.items()},'
    )


@pytest.mark.parametrize("left", [without_keys, with_keys, with_nonsense])
def test_what_another_version_deposits(superd: Installed, left: Callable[[str], str]) -> None:  # P1
    """Less or more than this one does, or what it cannot read: services go on."""
    text = (SOURCE / "manager" / "supervisor.py").read_text()
    assert left(text) != text
    superd.install("0.0.1", manager__supervisor=left(text))
    superd.write("echo", toml(listen="tcp:127.0.0.1:0", command=ECHO))
    keys = {"pass_": "listen-fds", "command": [PYTHON, "-c", TELLER]}
    superd.write("teller", toml(listen="tcp:127.0.0.1:0", run="always-on", **keys))
    superd.write("demand", toml(listen="tcp:127.0.0.1:0", run="on-demand", **keys))
    superd.start()
    pids = []
    for name in ("teller", "demand"):
        with superd.connect(name) as client:
            pids.append(read_all(client))
    with superd.connect("echo") as client:
        assert client.recv(100) == b"hello\n"
        superd.install("99.1")
        assert "99.1 has taken over from 0.0.1" in superd.ctl("upgrade")
        client.sendall(b"still here")
        assert client.recv(100) == b"still here"
    for name, pid in zip(("teller", "demand"), pids, strict=True):
        with superd.connect(name) as client:
            assert read_all(client) == pid
        assert superd.status(name)["state"] == "ready"
    complaints = [row["message"] for row in superd.find_records(message=re.compile("internal error"))]
    assert bool(complaints) == (left is with_nonsense)
