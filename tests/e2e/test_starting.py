"""Processes that cannot be started, end at once, or find the machine short of everything."""

from __future__ import annotations

import os
import re
import resource
from collections.abc import Callable
from pathlib import Path

import pytest
from harness import PYTHON, Superd, ask, cpu_share, eventually, fetch, injected, no_free_fd, read_all, toml

from superd.system.context import has_capability

Require = Callable[[str], str]

BROKEN: dict[str, Callable[[Path], object]] = {
    "missing": lambda path: path.unlink(),
    "not executable": lambda path: path.chmod(0o644),
    "a directory": lambda path: (path.unlink(), path.mkdir()),
    "no interpreter": lambda path: path.write_text("#!/nonexistent/interpreter\n"),
    "no format": lambda path: path.write_bytes(b"\x7fnothing that runs"),
}
REASONS = {
    "missing": "no such file", "not executable": "permission denied", "a directory": "permission denied",
    "no interpreter": "no such file", "no format": "exec format error.*no interpreter line",
}  # fmt: skip


def good(program: Path, fd: int = 3) -> None:
    """A program that takes one connection from a listener."""
    fresh = program.with_name("fresh")
    code = f"import os, socket; os.write(2, b'up\\n'); socket.socket(fileno={fd}).accept()[0].sendall(b'served')"
    fresh.write_text(f'#!/bin/sh\nexec {PYTHON} -I -c "{code}"\n')
    fresh.chmod(0o755)
    if program.is_dir():
        program.rmdir()
    fresh.replace(program)


@pytest.mark.parametrize("how", BROKEN)
def test_on_demand(superd: Superd, how: str) -> None:  # E12 B7 O6
    """The client waits, the log says what and why, the delay grows, and repaired it serves the same client."""
    program = superd.room("bin") / "program"
    good(program)
    superd.write("s", toml(listen="tcp:127.0.0.1:0", run="on-demand", command=[program]))
    superd.start()
    assert fetch(superd.connect("s")) == b"served"
    superd.wait_record(event="exit", service="s")
    superd.wait_for("s", "active")
    BROKEN[how](program)
    with superd.connect("s") as client:
        said = superd.wait_records(2, service="s", message=re.compile(REASONS[how], re.IGNORECASE))
        assert all(str(program) in record["message"] and "exec" in record["message"] for record in said)
        good(program)
        assert read_all(client) == b"served"
    superd.wait_for("s", "active")


@pytest.mark.parametrize("how", BROKEN)
def test_always_on(superd: Superd, how: str) -> None:  # E12 G14
    program = superd.room("bin") / "program"
    good(program)
    text = toml(listen="tcp:127.0.0.1:0", run="always-on", restart="always", restart_delay="10ms", command=[program])
    superd.write("s", text)
    superd.start()
    superd.wait_record(event="start", service="s")
    superd.wait_record(event="output", message="up")
    BROKEN[how](program)
    assert fetch(superd.connect("s")) == b"served"  # by the one that runs already, which ends
    superd.wait_record(service="s", message=re.compile(REASONS[how], re.IGNORECASE))
    with superd.connect("s") as client:
        good(program)
        assert read_all(client) == b"served"


@pytest.mark.parametrize("mode", ["per-connection", "on-demand"])
def test_working_directory_is_gone(superd: Superd, mode: str) -> None:  # E12 E9
    """Nothing is started outside the context; clients wait, and are served when it can be entered again."""
    room = superd.room("room")
    code = "import os, socket; s = socket.socket(fileno=3); s = s if os.environ.get('REMOTE_ADDR') else s.accept()[0]"
    superd.write(
        "s",
        toml(
            listen="tcp:127.0.0.1:0", run=mode, pass_="listen-fds", cwd=room,
            command=[PYTHON, "-I", "-c", f"{code}; s.sendall(os.getcwd().encode())"],
        ),
    )  # fmt: skip
    superd.start()
    room.rename(superd.dir / "elsewhere")
    with superd.connect("s") as client:
        said = superd.wait_record(service="s", message=re.compile(str(room)))
        assert "no such file" in said["message"].lower()
        (superd.dir / "elsewhere").rename(room)
        assert read_all(client) == str(room).encode()


def test_quick_ends(superd: Superd) -> None:  # F2 G14
    """A process that has ended before anybody could say that it runs: each is told, in order, and none gets lost."""
    for number in range(4):
        delays = {"restart_delay": "1ms", "restart_delay_max": "2ms"}
        superd.write(f"quick{number}", toml(run="always-on", restart="always", command=["/bin/true"], **delays))
    superd.start()
    for number in range(4):
        superd.wait_records(80, event="exit", service=f"quick{number}", status=0)
        found = superd.find_records(service=f"quick{number}", event=re.compile("^(start|exit)$"))
        events = [record["event"] for record in found[:160]]
        assert events == ["start", "exit"] * 80


def test_restart_delay_grows(superd: Superd) -> None:  # G14
    superd.write("s", toml(run="always-on", command=["/bin/false"]))
    superd.start()
    said = superd.wait_records(4, service="s", message=re.compile("trying again in"))
    assert [re.findall(r"in ([\d.]+) s", record["message"])[-1] for record in said] == ["0.1", "0.2", "0.4", "0.8"]
    assert "exited with status 1" in said[0]["message"]
    assert superd.status("s")["state"] == "backoff"
    assert superd.status("s")["restarts"] >= 4


def test_restart_limit(superd: Superd) -> None:  # G14 G15
    """Beyond it the service has failed; a start by hand tries again."""
    superd.write("s", toml(run="always-on", restart_delay="1ms", restart_limit="3/60s", command=["/bin/false"]))
    superd.start()
    superd.wait_record(service="s", message=re.compile("giving up, `superctl start s` tries again"))
    assert superd.status("s")["state"] == "failed"
    assert len(superd.find_records(event="start", service="s")) == 4
    result = superd.call("Start", names=["s"])["results"][0]
    assert superd.wait_records(5, event="start", service="s") and result["name"] == "s"


@pytest.mark.parametrize("error", ["EAGAIN", "ENOMEM"])
def test_cannot_fork_in_the_spawner(superd: Superd, require: Require, error: str) -> None:  # N1 N2 X4
    """Those clients are closed with the reason in the log; other services and the next client are not touched."""
    strace = require("strace")
    superd.write("s", toml(listen="tcp:127.0.0.1:0", command=["/bin/cat"]))
    superd.start()
    assert ask(superd.connect("s"), b"x") == b"x"
    (spawner,) = superd.pids()["superd-spawner"]
    calls = [f"{call}:error={error}:when=1..4" for call in ("vfork", "clone", "clone3", "fork")]
    with injected(strace, spawner, *calls):
        answers = []
        for _ in range(10):
            try:
                answers.append(ask(superd.connect("s"), b"x"))
            except OSError:  # reset, or closed before we have said all
                answers.append(b"")
    assert answers[-1] == b"x" and set(answers) == {b"", b"x"}
    reason = "resource temporarily unavailable" if error == "EAGAIN" else "cannot allocate memory"
    superd.wait_record(service="s", message=re.compile(f"fork: {reason}; client closed"))
    assert spawner in superd.pids()["superd-spawner"]
    superd.wait_for("s", "idle")


def test_cannot_fork_in_the_keeper(superd: Superd, require: Require) -> None:  # N1
    """Neither a spawner nor a process that is started once: both wait, and come when they can."""
    strace = require("strace")
    code = "import socket; socket.socket(fileno=3).accept()[0].sendall(b'served')"
    superd.write("a", toml(listen="tcp:127.0.0.1:0", command=["/bin/cat"]))
    superd.write("b", toml(listen="tcp:127.0.0.1:0", run="on-demand", command=[PYTHON, "-I", "-c", code]))
    superd.start()
    calls = [f"{call}:error=EAGAIN" for call in ("vfork", "clone", "clone3", "fork")]
    with injected(strace, superd.pid, *calls):
        first, second = superd.connect("a"), superd.connect("b")
        for name in ("a", "b"):
            superd.wait_record(service=name, message=re.compile("resource temporarily unavailable"))
    assert ask(first, b"x") == b"x"
    assert fetch(second) == b"served"


@pytest.mark.parametrize("spare", [0, 1, 2, 3])
def test_no_descriptors_in_the_spawner(superd: Superd, spare: int) -> None:  # X2 F21
    """Each client is served or closed, nothing is half started, and nothing is lost of the descriptors."""
    own = {"user": "root"} if os.geteuid() == 0 else {}  # whose limits we may change
    superd.write("s", toml(listen="tcp:127.0.0.1:0", command=["/bin/cat"], **own))
    superd.start()
    assert ask(superd.connect("s"), b"x") == b"x"
    superd.wait_for("s", "idle")
    before = superd.descriptors()
    (spawner,) = superd.pids()["superd-spawner"]
    with no_free_fd(spawner, spare):
        for _ in range(5):
            try:
                assert ask(superd.connect("s"), b"x") in (b"", b"x")
            except OSError:  # reset, or closed before we have said all
                pass
    superd.wait_for("s", "idle")
    assert ask(superd.connect("s"), b"x") == b"x"
    eventually(superd.descriptors, before)


def test_few_descriptors(superd: Superd) -> None:  # F21 N3
    """RLIMIT_NOFILE 64 for all roles, 100 clients: all are served in the end, none sees a reset."""
    limits = {"max_connections": 100}
    superd.write("s", toml(listen="tcp:127.0.0.1:0", command=["/bin/cat"], limits=limits))
    superd.start(preexec=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64)))
    clients = [superd.connect("s") for _ in range(100)]
    for client in clients:
        assert ask(client, b"x") == b"x"
    superd.wait_for("s", "idle")


def test_a_hard_limit_that_has_to_be_raised(superd: Superd) -> None:
    """A service may have more files than superd: whoever it runs as, if superd may; if not, that is said."""
    code = "import resource; print(*resource.getrlimit(resource.RLIMIT_NOFILE), flush=True)"
    superd.write("s", toml(listen="tcp:127.0.0.1:0", command=[PYTHON, "-I", "-c", code], rlimit={"nofile": [300, 400]}))
    superd.start(preexec=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256)))
    with superd.connect("s") as client:
        if has_capability("CAP_SYS_RESOURCE"):
            assert client.recv(100) == b"300 400\n"
        else:
            text = (
                "limits: cannot raise the hard limit of nofile from 256 to 400 without CAP_SYS_RESOURCE.*; clients wait"
            )
            superd.wait_record(service="s", message=re.compile(text))


def test_a_log_that_cannot_be_written(superd: Superd) -> None:
    superd.write("s", toml(listen="tcp:127.0.0.1:0", command=["/bin/cat"], stderr="file:/proc/nobody/log"))
    superd.start()
    with superd.connect("s") as client:
        assert client.recv(1) == b""
    text = "cannot start /bin/cat: output: /proc/nobody/log: no such file or directory; client closed"
    superd.wait_record(service="s", message=text)


def test_many_idle_sessions(superd: Superd) -> None:  # N3 X13
    """400 at once, more than a soft limit of 256 has room for: the limit of superd is not that of its services."""
    code = "import resource; print(resource.getrlimit(resource.RLIMIT_NOFILE)[0], flush=True)"
    superd.write("s", toml(listen="tcp:127.0.0.1:0", command=["/bin/cat"], limits={"max_connections": 400}))
    superd.write("limit", toml(listen="tcp:127.0.0.1:0", command=[PYTHON, "-I", "-c", code]))
    superd.start(preexec=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (256, 4096)))
    clients = [superd.connect("s") for _ in range(400)]
    try:
        for client in clients:
            client.sendall(b"x")
        for client in clients:
            assert client.recv(1) == b"x"
        assert fetch(superd.connect("limit")) == b"256\n"  # E20
        assert superd.status("s")["now"] == 400
        assert cpu_share(superd.manager, 0.5) < 0.2
    finally:
        for client in clients:
            client.close()


def test_terminal_and_oom_score(superd: Superd) -> None:  # E17 E21
    """Started on a terminal, with an adjusted OOM score: a service has neither."""
    code = (
        "import os; stat = open('/proc/self/stat').read().rpartition(')')[2].split()\n"
        "print(stat[4], os.getsid(0) == os.getpid(), open('/proc/self/oom_score_adj').read().strip(), flush=True)"
    )
    for mode, run in (("a", "per-connection"), ("b", "on-demand")):
        take = "import os, socket; c = socket.socket(fileno=0).accept()[0]; os.dup2(c.fileno(), 1)\n"
        source = code if mode == "a" else take + code
        superd.write(mode, toml(listen="tcp:127.0.0.1:0", run=run, pass_="stdio", command=[PYTHON, "-I", "-c", source]))

    def adjust() -> None:
        Path("/proc/self/oom_score_adj").write_text("300")
        os.setsid() if os.getsid(0) != os.getpid() else None

    superd.start(preexec=adjust)
    for name in ("a", "b"):
        assert fetch(superd.connect(name)).split() == [b"0", b"True", b"0"], name
