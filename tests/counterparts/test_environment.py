"""What a service's process is given, and what it is not: seen by the process itself (services/probe.c)."""

from __future__ import annotations

import contextlib
import fcntl
import grp
import os
import pwd
import re
import resource
import select
import signal
import socket
import termios
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from harness import TIMEOUT_S, Superd, ask, comm, descendants, read_all, wait_gone

Build = Callable[..., str]

# Set for a process where they apply, whatever the connection.
OPTIONAL = {"INVOCATION_ID"}
OF_THE_USER = {"HOME", "USER", "LOGNAME", "SHELL"}
OF_TCP = {
    "PROTO", "REMOTE_ADDR", "REMOTE_PORT", "TCPREMOTEIP", "TCPREMOTEPORT", "TCPLOCALIP", "TCPLOCALPORT", "TCPCONNNUM",
    "SUPERD_SERVICE", "SUPERD_CONNECTION",
}  # fmt: skip


@dataclass
class Probe:
    """The probe's report. fds: number -> (target, flags of F_GETFL); id: name -> numbers."""

    fds: dict[int, tuple[str, int]] = field(default_factory=dict)
    status: dict[str, str] = field(default_factory=dict)
    env: dict[str, str] = field(default_factory=dict)
    argv: list[str] = field(default_factory=list)
    id: dict[str, list[int]] = field(default_factory=dict)
    other: dict[str, str] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> Probe:
        probe = cls()
        for line in text.splitlines():
            kind, _, rest = line.partition(" ")
            if kind == "fd":
                number, _, rest = rest.partition(" ")
                target, _, flags = rest.rpartition(" ")
                probe.fds[int(number)] = target, int(flags, 8)
            elif kind == "status":
                name, _, value = rest.partition(":")
                probe.status[name] = value.strip()
            elif kind == "env":
                name, _, value = rest.partition("=")
                assert name not in probe.env, f"{name} stands twice in the environment"
                probe.env[name] = value
            elif kind == "arg":
                probe.argv.append(rest)
            elif kind == "id":
                name, *numbers = rest.split()
                probe.id[name] = [int(number) for number in numbers]
            else:
                probe.other[kind] = rest
        assert "tty" in probe.other, f"the report is cut off: {text!r}"
        return probe

    @property
    def pid(self) -> int:
        return self.id["pid"][0]


def logged(superd: Superd, service: str) -> Probe:
    """The report of a probe whose standard output or error is the log."""
    superd.wait_record(event="output", service=service, message=re.compile("^tty "))
    return Probe.parse("\n".join(r["message"] for r in superd.find_records(event="output", service=service)))


# 32 and 33 are the C library's own: glibc's posix_spawn(3) itself sets them to "ignored" in every child (spawni.c),
# and no program can ask for anything else.
LIBC_SIGNALS = 1 << 31 | 1 << 32


def check_clean(probe: Probe) -> None:
    """What holds for every process of every service unless the file says otherwise."""
    assert int(probe.status["SigIgn"], 16) & ~LIBC_SIGNALS == 0  # E5
    assert int(probe.status["SigBlk"], 16) == 0  # E6
    assert probe.other["umask"] == "0022"  # E19
    assert probe.other["cwd"] == "/"  # E18
    assert probe.id["sid"] == probe.id["pid"] == probe.id["pgid"]  # E17
    assert probe.other["tty"] == "no"  # E17
    assert probe.other["oom"] == "0"  # E21
    for target, flags in probe.fds.values():
        if target.startswith("socket:"):
            assert not flags & os.O_NONBLOCK, f"{target} is not blocking"
    if os.geteuid() == 0 and probe.id["uid"][0] != 0:
        for name in ("CapInh", "CapPrm", "CapEff", "CapAmb"):
            assert int(probe.status[name], 16) == 0, name  # E22
        assert probe.status["NoNewPrivs"] == "1"  # E23


def check_identity(probe: Probe, user: str) -> None:
    entry = pwd.getpwnam(user)
    assert probe.id["uid"] == [entry.pw_uid] * 3
    assert probe.id["gid"] == [entry.pw_gid] * 3
    wanted = os.getgrouplist(user, entry.pw_gid) if os.geteuid() == 0 else os.getgroups()
    assert set(probe.id["groups"]) | {entry.pw_gid} == set(wanted) | {entry.pw_gid}  # E8
    assert probe.env["HOME"] == entry.pw_dir and probe.env["SHELL"] == entry.pw_shell
    assert probe.env["USER"] == probe.env["LOGNAME"] == user


def kinds(probe: Probe) -> dict[int, str]:
    """fd -> "socket", "pipe" or the path."""
    return {fd: target.partition(":")[0] for fd, (target, _) in probe.fds.items()}


@pytest.fixture
def hostile() -> dict[str, Any]:
    """Options of `start` that put superd in a place where everything that could be passed on is there."""

    def preexec() -> None:
        os.dup2(0, 60, inheritable=True)
        os.dup2(0, 251, inheritable=True)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGUSR1, signal.SIGCHLD})
        for number in (signal.SIGPIPE, signal.SIGHUP, signal.SIGINT, signal.SIGUSR2):
            signal.signal(number, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_NOFILE, (777, 1777))
        with contextlib.suppress(PermissionError):  # without CAP_SYS_RESOURCE nobody could have done this to superd
            Path("/proc/self/oom_score_adj").write_text("-500")

    environment = {
        "PATH": os.environ["PATH"], "SECRET": "x", "LD_LIBRARY_PATH": "/nonexistent", "PYTHONPATH": "/nonexistent",
        "LISTEN_FDS": "1", "LISTEN_PID": "1", "LISTEN_FDNAMES": "x", "NOTIFY_SOCKET": "/nonexistent/notify",
        "WATCHDOG_USEC": "1000000", "WATCHDOG_PID": "1", "LANG": "C.UTF-8", "LC_TIME": "C", "TZ": "UTC",
        "HOME": "/root", "TMPDIR": "/nonexistent", "PROTO": "X", "TCPREMOTEHOST": "forged", "INVOCATION_ID": "forged",
    }  # fmt: skip
    options: dict[str, Any] = {"preexec": preexec, "umask": 0, "environment": environment}
    if os.geteuid() == 0:
        options["extra_groups"] = [0, 4, 42]
    return options


MODES = {
    # run, pass, fd that the probe writes to, what its fds are
    "connection": ("per-connection", "stdio", 1, {0: "socket", 1: "socket", 2: "pipe"}),
    "connection-fds": ("per-connection", "listen-fds", 3, {0: "/dev/null", 1: "pipe", 2: "pipe", 3: "socket"}),
    "wait": ("on-demand", "stdio", 2, {0: "socket", 1: "socket", 2: "pipe"}),
    "listeners": ("on-demand", "listen-fds", 2, {0: "/dev/null", 1: "pipe", 2: "pipe", 3: "socket", 4: "socket"}),
    "always": ("always-on", "listen-fds", 2, {0: "/dev/null", 1: "pipe", 2: "pipe", 3: "socket", 4: "socket"}),
    "always-stdio": ("always-on", "stdio", 2, {0: "socket", 1: "socket", 2: "pipe"}),
    "socketless": ("always-on", None, 1, {0: "/dev/null", 1: "pipe", 2: "pipe"}),
    "once": ("once", None, 1, {0: "/dev/null", 1: "pipe", 2: "pipe"}),
}


@pytest.mark.parametrize("mode", MODES)
def test_inherit(superd: Superd, build: Build, hostile: dict[str, Any], service_user: str, mode: str) -> None:
    """Exactly the fds, signals, identity, limits and environment that were meant, from the worst possible start."""
    run, pass_, fd, wanted_fds = MODES[mode]
    sockets = ["tcp4:127.0.0.1:0"] * (2 if 4 in wanted_fds else 1 if pass_ else 0)
    lines = [f'run = "{run}"', f'command = ["{build("probe.c")}", "{fd}", "two words"]']
    lines += [f'pass = "{pass_}"'] if pass_ else []
    lines += [f'[[socket]]\nlisten = "{address}"\nname = "s{i}"' for i, address in enumerate(sockets)]
    superd.write("probe", "\n".join(lines))
    superd.start(**hostile)

    connected: socket.socket | None = superd.connect("probe") if run in ("per-connection", "on-demand") else None
    if connected is not None and run == "per-connection":
        with connected:
            probe = Probe.parse(read_all(connected).decode())
    else:
        try:
            probe = logged(superd, "probe")
        finally:
            if connected is not None:
                connected.close()

    assert kinds(probe) == wanted_fds  # E1, E2
    check_clean(probe)
    check_identity(probe, service_user)
    assert probe.argv[1:] == [str(fd), "two words"]
    assert probe.other["nofile"] == "777 1777"  # E20

    # E13: the allow-list and what superd sets itself, nothing else.
    expected = {"PATH", "LANG", "LC_TIME", "TZ", "SUPERD_SERVICE", *OF_THE_USER}
    expected |= OF_TCP if run == "per-connection" else set()
    expected |= {"LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES"} if pass_ == "listen-fds" else set()
    assert set(probe.env) - OPTIONAL - {"LISTEN_PIDFDID"} == expected
    assert probe.env["SUPERD_SERVICE"] == "probe"
    assert probe.env.get("INVOCATION_ID") != "forged"
    if pass_ == "listen-fds":
        count = len(wanted_fds) - 3
        names = "connection" if run == "per-connection" else ":".join(f"s{i}" for i in range(count))
        assert (probe.env["LISTEN_FDS"], probe.env["LISTEN_FDNAMES"]) == (str(count), names)
        assert int(probe.env["LISTEN_PID"]) == probe.pid
        if tuple(map(int, os.uname().release.split("-")[0].split(".")[:2])) >= (6, 9):  # pidfs
            assert int(probe.env["LISTEN_PIDFDID"]) == probe.id["pidfd"][0]
        else:
            assert "LISTEN_PIDFDID" not in probe.env
    record = superd.wait_record(event="exit", service="probe")
    assert (record["pid"], record["status"]) == (probe.pid, 0)


def test_roles(superd: Superd, hostile: dict[str, Any]) -> None:
    """superd itself: names, directory, no fd of the starter's."""
    superd.write("cat", 'listen = "tcp:127.0.0.1:0"\ncommand = "/bin/cat"')
    superd.start(**hostile)
    assert ask(superd.connect("cat"), b"x") == b"x"
    pids = superd.pids()
    assert (len(pids["superd-keeper"]), len(pids["superd-manager"])) == (1, 1)
    assert len(pids["superd-spawner"]) >= 1
    for pid in superd.roles():
        assert os.readlink(f"/proc/{pid}/cwd") == "/"  # E18
        assert {"60", "251"}.isdisjoint(os.listdir(f"/proc/{pid}/fd")), comm(pid)  # E2


def test_terminal(superd: Superd, build: Build) -> None:
    """Started on a terminal: superd may have it, its services do not.  # E17"""
    master, slave = os.openpty()
    try:
        superd.write("probe", f'listen = "tcp:127.0.0.1:0"\ncommand = ["{build("probe.c")}", "1"]')
        superd.start(preexec=lambda: fcntl.ioctl(slave, termios.TIOCSCTTY, 0), pass_fds=[slave])
        with superd.connect("probe") as client:
            probe = Probe.parse(read_all(client).decode())
        check_clean(probe)
        assert kinds(probe) == {0: "socket", 1: "socket", 2: "pipe"}
        superd.stop()
    finally:
        os.close(master)
        os.close(slave)


def test_started_with_closed_fds(superd: Superd) -> None:
    """superd <&- >&- 2>&-: its first sockets do not become 0, 1 or 2, and it serves.  # E25"""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.settimeout(TIMEOUT_S)
        notify.bind(str(superd.dir / "notify"))
        superd.write("cat", f'listen = "unix:{superd.dir}/cat.sock"\ncommand = "/bin/cat"')

        def preexec() -> None:
            for fd in (0, 1, 2):
                os.close(fd)

        superd.launch(preexec=preexec, environment={**os.environ, "NOTIFY_SOCKET": str(superd.dir / "notify")})
        while "READY=1" not in notify.recv(4096).decode().splitlines():
            pass
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(TIMEOUT_S)
            client.connect(str(superd.dir / "cat.sock"))
            client.sendall(b"x")
            assert client.recv(10) == b"x"
            for pid in superd.roles():
                for fd in (0, 1, 2):
                    assert os.readlink(f"/proc/{pid}/fd/{fd}") == "/dev/null", (comm(pid), fd)
        superd.stop()


def test_term_was_blocked(superd: Superd) -> None:
    """Superd started with SIGTERM blocked: its services die of TERM, and so does it.  # E6"""
    superd.write("sleeper", 'listen = "tcp:127.0.0.1:0"\ncommand = ["/bin/sleep", "1000"]\nstop_timeout = "60s"')
    superd.start(preexec=lambda: signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM}) and None)
    with superd.connect("sleeper") as client:
        pid = superd.wait_record(event="start", service="sleeper")["pid"]
        superd.stop()
        assert client.recv(10) == b""
    wait_gone(pid)
    record = superd.wait_record(event="exit", service="sleeper")
    assert record["signal"] in ("TERM", "SIGTERM") and record["duration"] < 60


@pytest.mark.parametrize("family", ["v4", "v6", "mapped"])
def test_tcp_variables(superd: Superd, build: Build, family: str) -> None:
    """UCSPI's and systemd's variables; a v4-mapped client is an IPv4 one."""
    listen, host = {"v4": ("tcp4:127.0.0.1:0", None), "v6": ("tcp6:[::1]:0", None), "mapped": ("tcp:0", "127.0.0.1")}[
        family
    ]
    if family != "v4" and not socket.has_dualstack_ipv6():
        pytest.skip("no IPv6 here")
    superd.write("probe", f'listen = "{listen}"\ncommand = ["{build("probe.c")}", "1"]')
    superd.start()
    with superd.connect("probe", host=host) as client:
        own, peer = client.getsockname(), client.getpeername()
        probe = Probe.parse(read_all(client).decode())
    wanted = {
        "PROTO": "TCP", "REMOTE_ADDR": own[0], "REMOTE_PORT": str(own[1]),
        "TCPREMOTEIP": own[0], "TCPREMOTEPORT": str(own[1]),
        "TCPLOCALIP": peer[0], "TCPLOCALPORT": str(peer[1]), "TCPCONNNUM": "1",
    }  # fmt: skip
    assert {name: probe.env.get(name) for name in wanted} == wanted
    for name in OF_TCP - {"PROTO", "SUPERD_SERVICE", "SUPERD_CONNECTION"}:
        assert re.fullmatch("[0-9a-fA-F:.%]+", probe.env[name]), name  # E14
    records = [superd.wait_record(event=event, service="probe") for event in ("start", "exit")]
    assert {str(record["connection"]) for record in records} == {probe.env["SUPERD_CONNECTION"]}
    assert all(own[0] in record["peer"] and str(own[1]) in record["peer"] for record in records)


@pytest.mark.parametrize("name", ["unnamed", "path", "abstract"])
def test_unix_variables(superd: Superd, build: Build, name: str) -> None:
    superd.write("probe", f'listen = "unix:{superd.dir}/probe.sock"\ncommand = ["{build("probe.c")}", "1"]')
    superd.start()
    own = {"unnamed": None, "path": f"{superd.dir}/own", "abstract": f"@superd-test-{os.getpid()}"}[name]
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(TIMEOUT_S)
        if own is not None:
            client.bind("\0" + own[1:] if own.startswith("@") else own)
        client.connect(f"{superd.dir}/probe.sock")
        probe = Probe.parse(read_all(client).decode())
    assert (probe.env["PROTO"], probe.env["IPCREMOTEEUID"], probe.env["IPCREMOTEEGID"]) == (
        "IPC", str(os.geteuid()), str(os.getegid()),
    )  # fmt: skip
    assert (probe.env.get("REMOTE_ADDR"), probe.env.get("IPCREMOTEPATH") or None) == (own, own)
    assert not {"REMOTE_PORT"} & set(probe.env) and not any(key.startswith("TCP") for key in probe.env)


def test_connection_number(superd: Superd) -> None:
    """TCPCONNNUM: live connections of this client, this one included; the number goes down again."""
    superd.write("count", 'listen = "tcp:127.0.0.1:0"\ncommand = ["/bin/sh", "-c", "echo $TCPCONNNUM; exec cat"]')
    superd.start()
    first = superd.connect("count")
    with first:
        assert first.recv(10) == b"1\n"
        assert ask(superd.connect("count"), b"") == b"2\n"
        superd.wait_record(event="exit", service="count")
        assert ask(superd.connect("count"), b"") == b"2\n"
    superd.wait_records(3, event="exit", service="count")
    assert ask(superd.connect("count"), b"") == b"1\n"


def test_environment_order(superd: Superd, build: Build) -> None:
    """superd's own by name, then the file, then the table, then what superd sets."""
    (superd.dir / "vars").write_text("A=file\nB=file\n# comment\nC='file c'\n")
    superd.write(
        "probe",
        f"""
        listen = "tcp:127.0.0.1:0"
        command = ["{build("probe.c")}", "1"]
        pass_environment = ["A", "SECRET"]
        environment_file = "{superd.dir}/vars"
        [environment]
        B = "table"
        HOME = "/table"
        """,
    )
    own = {"A": "own", "B": "own", "SECRET": "x", "OTHER": "x"}
    superd.start(environment={"PATH": os.environ["PATH"], **own})
    with superd.connect("probe") as client:
        env = Probe.parse(read_all(client).decode()).env
    assert {name: env.get(name) for name in ("A", "B", "C", "SECRET", "HOME", "OTHER")} == {
        "A": "file", "B": "table", "C": "file c", "SECRET": "x", "HOME": "/table", "OTHER": None,
    }  # fmt: skip


def test_environment_passed_whole(superd: Superd, build: Build) -> None:
    """pass_environment = ["*"] is everything but what is superd's to say or the loader's to obey.  # E13"""
    superd.write(
        "probe", f'listen = "tcp:127.0.0.1:0"\ncommand = ["{build("probe.c")}", "1"]\npass_environment = ["*"]'
    )
    kept = {"SECRET": "x", "TMPDIR": "/tmp"}
    dropped = {
        "LISTEN_FDS": "1",
        "NOTIFY_SOCKET": "/x",
        "WATCHDOG_USEC": "1",
        "LD_LIBRARY_PATH": "/x",
        "PYTHONPATH": "/x",
    }
    superd.start(environment={"PATH": os.environ["PATH"], **kept, **dropped})
    with superd.connect("probe") as client:
        env = Probe.parse(read_all(client).decode()).env
    assert kept.items() <= env.items()
    assert not dropped.keys() & env.keys()


@pytest.mark.parametrize("mode", ["per-connection", "always-on"])
def test_context_as_configured(superd: Superd, build: Build, root: None, mode: str) -> None:
    """user, group, groups, cwd, umask, limits, nice, oom: by a spawner and by the keeper alike."""
    room = superd.room("cwd", user="daemon", mode=0o700)
    superd.write(
        "probe",
        f"""
        listen = "tcp4:127.0.0.1:0"
        run = "{mode}"
        pass = "listen-fds"
        command = ["{build("probe.c")}", "{3 if mode == "per-connection" else 2}"]
        user = "daemon"
        group = "nogroup"
        groups = ["mail", "news"]
        cwd = "{room}"
        umask = "0077"
        [rlimit]
        nofile = [100, 200]
        nproc = [500, 600]
        [scheduling]
        nice = 7
        oom_score_adjust = 300
        """,
    )
    superd.start()
    if mode == "per-connection":
        with superd.connect("probe") as client:
            probe = Probe.parse(read_all(client).decode())
    else:
        probe = logged(superd, "probe")
    daemon, groups = pwd.getpwnam("daemon"), {grp.getgrnam(name).gr_gid for name in ("mail", "news")}
    nogroup = grp.getgrnam("nogroup").gr_gid
    assert (probe.id["uid"], probe.id["gid"]) == ([daemon.pw_uid] * 3, [nogroup] * 3)
    assert set(probe.id["groups"]) - {nogroup} == groups
    assert (probe.other["cwd"], probe.other["umask"], probe.other["oom"]) == (str(room), "0077", "300")
    assert probe.other["nofile"] == "100 200"
    assert probe.status["NoNewPrivs"] == "1"


def test_root_must_be_asked_for(superd: Superd, build: Build, root: None) -> None:
    superd.write("silent", f'listen = "tcp:127.0.0.1:0"\ncommand = ["{build("probe.c")}", "1"]')
    superd.write("asked", f'listen = "tcp:127.0.0.1:0"\nuser = "root"\ncommand = ["{build("probe.c")}", "1"]')
    superd.start()
    for name, uid in (("silent", pwd.getpwnam("nobody").pw_uid), ("asked", 0)):
        with superd.connect(name) as client:
            probe = Probe.parse(read_all(client).decode())
        assert probe.id["uid"] == [uid] * 3  # E10
        assert probe.status["NoNewPrivs"] == ("1" if uid else "0")


def test_stderr_is_not_the_clients(superd: Superd) -> None:
    """E24, and the classic way when it is asked for."""
    command = 'command = ["/bin/sh", "-c", "echo to the client; echo to the log >&2"]'
    superd.write("log", f'listen = "tcp:127.0.0.1:0"\n{command}')
    superd.write("classic", f'listen = "tcp:127.0.0.1:0"\nstderr = "socket"\n{command}')
    superd.start()
    assert ask(superd.connect("log"), b"") == b"to the client\n"
    assert superd.wait_record(event="output", service="log")["message"] == "to the log"
    assert ask(superd.connect("classic"), b"") == b"to the client\nto the log\n"


def test_no_copy_of_a_connection_stays(superd: Superd) -> None:
    """The client sees end of file when its service has ended, other services or not.  # E3, E4"""
    superd.write("cat", 'listen = "tcp:127.0.0.1:0"\ncommand = "/bin/cat"\n[limits]\nmax_connections = 200')
    superd.start()

    def fd_counts() -> dict[int, int]:
        found, pids = superd.descriptors(), superd.pids()
        return {pids[role][0]: len(next(iter(found[role]))) for role in ("superd-keeper", "superd-manager")}

    with superd.connect("cat") as first, superd.connect("cat") as second:
        for client in (first, second):
            client.sendall(b"x")
            assert client.recv(10) == b"x"
        started = superd.wait_records(2, event="start", service="cat")
        os.kill(started[0]["pid"], signal.SIGKILL)
        ends = select.select([first, second], [], [], TIMEOUT_S)[0]
        assert len(ends) == 1 and ends[0].recv(10) == b""  # E4
        superd.wait_record(event="exit", service="cat")
        before = fd_counts()
        for _ in range(100):
            assert ask(superd.connect("cat"), b"y") == b"y"
        superd.wait_records(101, event="exit", service="cat")
        after = fd_counts()
        assert after.keys() == before.keys()
        assert all(after[pid] <= before[pid] for pid in before), (before, after)


def replace_by_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


BROKEN: dict[str, Callable[[Path], object]] = {
    "missing": lambda path: path.unlink(),
    "not executable": lambda path: path.chmod(0o644),
    "a directory": replace_by_directory,
    "no interpreter": lambda path: path.write_text("#!/nonexistent/interpreter\n"),
    "no format": lambda path: path.write_bytes(b"\x7fnothing that runs"),
}
REASONS = {
    "missing": "no such file", "not executable": "permission denied", "a directory": "permission denied|is a directory",
    "no interpreter": "no such file", "no format": "exec format",
}  # fmt: skip


@pytest.mark.parametrize("how", BROKEN)
@pytest.mark.parametrize("pass_", ["stdio", "listen-fds"])
def test_exec_fails(superd: Superd, how: str, pass_: str) -> None:
    """The client is let go, the place is free again, the log says which program and why; repaired, it serves.  # E12"""
    program = superd.room("bin") / "program"

    def repair() -> None:
        program.write_text(f"#!/bin/sh\necho alive >&{1 if pass_ == 'stdio' else 3}\n")
        program.chmod(0o755)

    repair()
    superd.write(
        "broken",
        f'listen = "tcp:127.0.0.1:0"\nrun = "per-connection"\npass = "{pass_}"\n'
        f'command = "{program}"\n[limits]\nmax_connections = 1',
    )
    superd.start()
    assert ask(superd.connect("broken"), b"") == b"alive\n"
    BROKEN[how](program)
    mark = superd.mark()
    for _ in range(3):
        with superd.connect("broken") as client:
            try:
                assert read_all(client) == b""
            except ConnectionResetError:  # closed with our bytes unread
                pass
    record = superd.wait_record(after=mark, service="broken", message=re.compile(REASONS[how], re.IGNORECASE))
    assert str(program) in record["message"]
    if program.is_dir():
        program.rmdir()
    repair()
    assert ask(superd.connect("broken"), b"") == b"alive\n"


def test_writable_program_is_refused(superd: Superd, root: None) -> None:
    """As root, a program that anybody could replace is not started.  # E26"""
    room = superd.room("bin")
    program = room / "program"
    program.write_text("#!/bin/sh\necho alive\n")
    program.chmod(0o777)
    superd.write("open", f'listen = "tcp:127.0.0.1:0"\nuser = "root"\ncommand = "{program}"')
    superd.write("other", 'listen = "tcp:127.0.0.1:0"\ncommand = "/bin/cat"')
    superd.garbage_expected = True
    superd.start()
    assert ask(superd.connect("other"), b"x") == b"x"
    assert re.search(f"{re.escape(str(program))} is writable", superd.log())
    assert not superd.find_records(event="listening", service="open")
    assert not superd.find_records(event="start", service="open")


def test_nobody_is_left(superd: Superd) -> None:
    """Processes that left their session and parent end with superd all the same.  # G5, G6"""
    script = "trap '' TERM; (setsid /bin/sh -c 'trap \"\" TERM; echo $$ >&2; sleep 1000' &) ; echo $$ >&2; sleep 1000"
    superd.write(
        "stubborn", f'command = ["/bin/sh", "-c", \'\'\'{script}\'\'\']\nrun = "always-on"\nstop_timeout = "100ms"'
    )
    superd.start()
    pids = [int(record["message"]) for record in superd.wait_records(2, event="output", service="stubborn")]
    assert set(pids) <= set(descendants(superd.pid))
    superd.stop()
    for pid in pids:
        wait_gone(pid)
    assert superd.wait_record(event="exit", service="stubborn")["signal"] in ("KILL", "SIGKILL")
