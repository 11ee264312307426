"""spawner.py as a process: the test is its manager, at the other end of the channel."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import signal
import socket
import tempfile
from collections.abc import Iterator
from typing import Any, NoReturn

import pytest

from superd import spawner as module
from superd.core import messages
from superd.core.messages import EXITED, FAILED, HAS_LOG, STAGES, STARTED, Record, pack_go, pack_signal
from superd.core.plan import Program
from superd.core.spec import Context, Output
from superd.spawner import connection_facts
from superd.system import fdpass

PATIENCE_S = 10  # for what always comes
PEER = "192.0.2.9\x004242\x001\x00192.0.2.1\x0080"
ECHO_ENVIRONMENT = ("/bin/cat", "/proc/self/environ")


class SpawnerProcess:
    def __init__(self, context: Context) -> None:
        self.channel, theirs = fdpass.channel()
        self.channel.settimeout(PATIENCE_S)
        self.records: list[Record] = []
        self.pid = os.fork()
        if self.pid == 0:
            self._become(theirs, context)
        theirs.close()

    def _become(self, channel: socket.socket, context: Context) -> NoReturn:
        try:
            keep = channel.fileno()
            os.closerange(3, keep)
            os.closerange(keep + 1, 4096)
            module.main(channel, context, resource.getrlimit(resource.RLIMIT_NOFILE))
        finally:
            os._exit(99)

    def say(self, kind: str, **fields: Any) -> None:
        fdpass.send(self.channel, messages.pack(kind, **fields))

    def program(self, number: int, *command: str, **fields: Any) -> None:
        program = Program(
            **{"service": f"web{number}", "executable": command[0], "argv": command, "environment": {"TABLE": "1"},
               "base_environment": {"PATH": os.defpath, "HOME": "/base"}, "stdio": True, "stdout": Output(),
               "stderr": Output("null"), "fd_protocols": ("systemd",), **fields}
        )  # fmt: skip
        self.say("program", id=number, program=program.to_json())

    def go(self, connection: int, program: int, peer: str = PEER, *, log: bool = False) -> Any:
        """Hand over a connection: the client's end, and with `log` our copy of the pipe's reading end."""
        client, given = socket.socketpair()
        client.settimeout(PATIENCE_S)
        fds = [given.fileno()]
        reader = writer = -1
        if log:
            reader, writer = os.pipe()
            fds += [writer, reader]
        fdpass.send(self.channel, pack_go(connection, program, HAS_LOG if log else 0) + peer.encode(), fds)
        given.close()
        if not log:
            return client
        os.close(writer)
        return client, reader

    def text(self) -> tuple[dict[str, Any], list[int]]:
        data, fds = fdpass.receive(self.channel)
        return messages.unpack(data), fds

    def record(self) -> Record:
        while not self.records:
            data, _ = fdpass.receive(self.channel)
            assert data, "the spawner has gone"
            self.records += messages.records(data)
        return self.records.pop(0)

    def said(self, kind: bytes, connection: int, **fields: int) -> Record:
        record = self.record()
        found = {name: getattr(record, name) for name in ("type", "connection", *fields)}
        assert found == {"type": kind, "connection": connection, **fields}
        return record

    def fds(self) -> int:
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def settled_fds(self) -> int:
        """When everything ordered before is done."""
        self.say("sync")
        assert self.text()[0]["kind"] == "synced"
        return self.fds()

    def wait(self) -> int:
        pid, self.pid = self.pid, 0
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    def close(self) -> None:
        self.channel.close()
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            self.wait()


def serve(context: Context) -> Iterator[SpawnerProcess]:
    process = SpawnerProcess(context)
    try:
        message, _ = process.text()
        assert message == {"kind": "entered", "uid": os.geteuid(), "gid": os.getegid()}
        yield process
    finally:
        process.close()


@pytest.fixture
def spawner() -> Iterator[SpawnerProcess]:
    yield from serve(Context())


@pytest.fixture
def limited() -> Iterator[SpawnerProcess]:
    """Its children have a limit of their own, so they are forked."""
    yield from serve(Context(rlimits=(("nofile", 33, 33),)))


def read_all(client: socket.socket) -> bytes:
    with client, client.makefile("rb") as file:
        return file.read()


def environment(data: bytes) -> dict[str, str]:
    return dict(line.split("=", 1) for line in data.decode().split("\0")[:-1])


# --- one connection


@pytest.mark.parametrize("name", ["spawner", "limited"])
def test_a_connection(name: str, request: pytest.FixtureRequest) -> None:
    spawner: SpawnerProcess = request.getfixturevalue(name)
    spawner.program(1, *ECHO_ENVIRONMENT)
    client = spawner.go((3 << 40) + 7, 1, "192.0.2.9\x004242\x005\x00192.0.2.1\x0080")
    found = environment(read_all(client))  # E3: EOF, though the spawner lives
    home = found.pop("HOME")
    assert re.fullmatch("[0-9a-f]{32}", found.pop("INVOCATION_ID"))
    assert home != "/base"  # the user's own, above what the base says
    assert {key: found[key] for key in found if key not in ("USER", "LOGNAME", "SHELL")} == {
        "PATH": os.defpath, "TABLE": "1", "SUPERD_CONNECTION": "3-7", "REMOTE_ADDR": "192.0.2.9", "REMOTE_PORT": "4242",
        "PROTO": "TCP", "TCPREMOTEIP": "192.0.2.9", "TCPREMOTEPORT": "4242", "TCPLOCALIP": "192.0.2.1",
        "TCPLOCALPORT": "80", "TCPCONNNUM": "5",
    }  # fmt: skip
    started = spawner.said(STARTED, (3 << 40) + 7)
    assert started.pid > 0
    spawner.said(EXITED, (3 << 40) + 7, pid=started.pid, status=0)


@pytest.mark.parametrize("name", ["spawner", "limited"])
def test_signals_and_limits_of_a_process(name: str, request: pytest.FixtureRequest) -> None:  # E5, E6, E20
    spawner: SpawnerProcess = request.getfixturevalue(name)
    spawner.program(1, "/bin/sh", "-c", "cat /proc/self/status; ulimit -n")
    text = read_all(spawner.go(1, 1)).decode().splitlines()
    status = dict(line.split(":\t", 1) for line in text if ":\t" in line)
    assert [int(status[key], 16) for key in ("SigIgn", "SigBlk", "SigCgt")] == [0, 0, 0]
    assert int(text[-1]) == (33 if name == "limited" else resource.getrlimit(resource.RLIMIT_NOFILE)[0])


def test_listen_fds_per_connection(spawner: SpawnerProcess) -> None:  # PROTOCOLS.md 2.2, O1
    spawner.program(1, "/bin/sh", "-c", "exec cat /proc/self/environ >&3", stdio=False, names=("connection",))
    client = spawner.go(1, 1)
    found = environment(read_all(client))
    started = spawner.said(STARTED, 1)
    assert (found["LISTEN_FDS"], found["LISTEN_FDNAMES"]) == ("1", "connection")
    assert found["LISTEN_PID"] == str(started.pid)
    spawner.said(EXITED, 1, status=0)


def test_quick_processes(spawner: SpawnerProcess) -> None:  # F1, F2, E3
    """Each start is told before its end, each status is its own, and nothing stays open."""
    spawner.program(1, "/bin/sh", "-c", "exit $((TCPCONNNUM))")
    before = spawner.settled_fds()
    found: dict[int, list[tuple[bytes, int]]] = {}
    for first in range(0, 200, 20):
        clients = [spawner.go(i, 1, f"::1\x001\x00{i}\x00::1\x0080") for i in range(first, first + 20)]
        for _ in range(40):
            record = spawner.record()
            found.setdefault(record.connection, []).append((record.type, record.status))
        for client in clients:
            assert read_all(client) == b""
    assert found == {i: [(STARTED, 0), (EXITED, i << 8)] for i in range(200)}
    assert spawner.fds() == before


# --- what never ran


@pytest.mark.parametrize("name", ["spawner", "limited"])
@pytest.mark.parametrize("log", [False, True])
def test_an_exec_that_fails(name: str, log: bool, request: pytest.FixtureRequest) -> None:  # E12
    spawner: SpawnerProcess = request.getfixturevalue(name)
    spawner.program(1, "/nonexistent/program")
    spawner.program(2, "/bin/true")
    before = spawner.settled_fds()
    for number in range(20):
        given = spawner.go(number, 1, log=log)
        client = given[0] if log else given
        spawner.said(FAILED, number, pid=0, status=errno.ENOENT, stage=STAGES.index("exec"))
        assert read_all(client) == b""  # the client is let go
        if log:
            with open(given[1], "rb") as file:
                assert file.read() == b""
    assert spawner.fds() == before
    spawner.go(99, 2).close()
    spawner.said(STARTED, 99)
    spawner.said(EXITED, 99, status=0)


def test_a_message_that_was_cut(spawner: SpawnerProcess) -> None:  # X2: EMFILE while the fds are received
    spawner.program(1, "/bin/true")
    limits = resource.prlimit(spawner.pid, resource.RLIMIT_NOFILE)
    before = spawner.settled_fds()
    for free in range(3):
        used = max(map(int, os.listdir(f"/proc/{spawner.pid}/fd"))) + 1
        resource.prlimit(spawner.pid, resource.RLIMIT_NOFILE, (3 if free == 0 else used, limits[1]))
        client, reader = spawner.go(free, 1, log=True)
        record = spawner.record()
        if record.type == STARTED:  # there were holes enough below the limit
            spawner.said(EXITED, free)
        else:
            assert (record.type, record.connection, record.status) == (FAILED, free, errno.EMFILE)
            assert STAGES[record.stage] == "descriptors"
        assert free or record.type == FAILED
        assert read_all(client) == b""
        os.close(reader)
    resource.prlimit(spawner.pid, resource.RLIMIT_NOFILE, limits)
    assert spawner.fds() == before
    spawner.go(9, 1).close()
    spawner.said(STARTED, 9)
    spawner.said(EXITED, 9, status=0)


def test_a_context_that_cannot_be_entered() -> None:  # E9
    process = SpawnerProcess(Context(cwd="/nonexistent"))
    try:
        refused, _ = process.text()
        assert (refused["kind"], refused["stage"], refused["errno"]) == ("refused", "directory", errno.ENOENT)
        assert "/nonexistent" in refused["text"]
        assert process.wait() == 1
    finally:
        process.close()


# --- programs


def test_programs_are_replaced_and_forgotten(spawner: SpawnerProcess) -> None:
    spawner.program(1, "/bin/echo", "old")
    spawner.program(2, "/bin/echo", "other")
    spawner.program(1, "/bin/echo", "new")
    client = spawner.go(1, 1)
    assert read_all(client) == b"new\n"
    spawner.said(STARTED, 1)
    spawner.said(EXITED, 1)
    spawner.say("forget", id=2)
    spawner.say("forget", id=77)
    spawner.say("list")
    assert spawner.text()[0] == {"kind": "listed", "programs": [1]}


def test_an_order_that_comes_before_its_program_waits(spawner: SpawnerProcess) -> None:
    """As after a spawner that was killed: the connection is in the channel, the manager tells the program next."""
    client = spawner.go(1, 5)
    spawner.program(5, "/bin/echo", "late")
    assert read_all(client) == b"late\n"
    spawner.said(STARTED, 1)
    spawner.said(EXITED, 1)


# --- a second manager


@pytest.mark.parametrize("count", [1, 3, 260])
def test_list_hands_everything_back(spawner: SpawnerProcess, count: int) -> None:  # G17: also more than fit one packet
    spawner.program(1, "/bin/sh", "-c", "read x; echo last words >&2", stderr=Output("log"))
    clients = []
    pids = {}
    for number in range(count):
        client, reader = spawner.go(number, 1, f"192.0.2.9\x00{number}\x001\x00192.0.2.1\x0080", log=True)
        os.close(reader)  # as when the first manager was killed
        clients.append(client)
        pids[number] = spawner.said(STARTED, number).pid
    client = spawner.go(5000, 1)  # without a log
    pids[5000] = spawner.said(STARTED, 5000).pid
    spawner.say("list")
    rows: list[list[Any]] = []
    logs: list[int] = []
    while (answer := spawner.text())[0]["kind"] == "children":
        rows += answer[0]["rows"]
        logs += answer[1]
    assert answer[0] == {"kind": "listed", "programs": [1]}
    assert {row[0]: row[1] for row in rows} == pids
    assert all(row[2] == "web1" and row[4] > 0 for row in rows)
    assert [row[3] for row in rows[:count]] == [f"192.0.2.9:{number}" for number in range(count)]
    assert [row[5] for row in rows] == [True] * count + [False]
    assert len(logs) == count
    clients[0].close()  # its process ends, and has not had SIGPIPE meanwhile
    spawner.said(EXITED, 0, status=0)
    with open(logs.pop(0), "rb") as file:
        assert file.read() == b"last words\n"
    fdpass.close_all(logs)
    for one in (*clients[1:], client):
        one.close()
    assert {spawner.record().connection for _ in range(count)} == set(pids) - {0}


def test_nobody_is_there_any_more(spawner: SpawnerProcess) -> None:
    spawner.program(1, "/bin/cat")
    client = spawner.go(1, 1)
    spawner.said(STARTED, 1)
    spawner.channel.close()
    assert spawner.wait() == 0
    client.sendall(b"still here")  # the process goes on
    assert client.recv(100) == b"still here"
    client.close()


def test_nobody_reads_its_reports_any_more(spawner: SpawnerProcess) -> None:
    spawner.program(1, "/bin/true")
    clients = [spawner.go(i, 1) for i in range(5)]
    for client in clients:
        assert read_all(client) == b""
    spawner.channel.close()  # with unread reports: ECONNRESET on the other side
    assert spawner.wait() == 0


def test_quit_waits_for_no_child(spawner: SpawnerProcess) -> None:
    spawner.program(1, "/bin/cat")
    client = spawner.go(1, 1)
    spawner.said(STARTED, 1)
    spawner.say("quit")  # not while it has one
    client.sendall(b"x")
    assert client.recv(1) == b"x"
    client.close()
    spawner.said(EXITED, 1, status=0)
    spawner.say("quit")
    assert spawner.wait() == 0


# --- signals


@pytest.mark.parametrize("group", [True, False])
def test_signals(spawner: SpawnerProcess, group: bool) -> None:
    spawner.program(1, "/bin/sh", "-c", "trap 'exit 4' TERM; sh -c 'echo ready; exec cat <&1 >/dev/null' & wait")
    client = spawner.go(1, 1)
    spawner.said(STARTED, 1)
    assert client.recv(10) == b"ready\n"
    spawner.channel.send(pack_signal(77, signal.SIGTERM, group=group))  # no such connection
    spawner.channel.send(pack_signal(1, signal.SIGTERM, group=group))
    spawner.said(EXITED, 1, status=4 << 8)
    spawner.channel.send(pack_signal(1, signal.SIGTERM, group=group))  # it has gone (G8)
    if group:
        assert client.recv(10) == b""  # the process in the background has gone too (H7)
    client.close()
    spawner.say("sync")
    assert spawner.text()[0]["kind"] == "synced"


# --- the peer


def facts(fd: int, peer: str) -> tuple[dict[str, str], str]:
    return connection_facts(fd, peer.encode())


def test_facts_of_a_dual_stack_listener() -> None:  # A8
    with socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True) as listener:
        port = listener.getsockname()[1]
        for host, local in (("127.0.0.1", "127.0.0.1"), ("::1", "::1")):
            with socket.create_connection((host, port)) as client:
                connection, _ = listener.accept()
                with connection:
                    remote = str(client.getsockname()[1])
                    variables, text = facts(connection.fileno(), f"{host}\0{remote}\x001")
                    assert connection.fileno() >= 0  # still its owner's
                    assert (variables["TCPLOCALIP"], variables["TCPLOCALPORT"]) == (local, str(port))
                    assert (variables["REMOTE_ADDR"], variables["REMOTE_PORT"]) == (host, remote)
                    assert text == (f"[{host}]:{remote}" if ":" in host else f"{host}:{remote}")


@pytest.mark.parametrize("name", [None, "path", "\0abstract", "new\nline"])
def test_facts_of_a_unix_client(name: str | None) -> None:  # PROTOCOLS.md 2.2
    with tempfile.TemporaryDirectory() as directory, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{directory}/s")
        listener.listen()
        with socket.socket(socket.AF_UNIX) as client:
            path = f"{directory}/{name}" if name and name[0] != "\0" else name
            if name is not None:
                client.bind(f"{name}{directory}" if name[0] == "\0" else path)
            client.connect(f"{directory}/s")
            connection, _ = listener.accept()
            with connection:
                variables, text = facts(connection.fileno(), "\0\x003")
    told = {None: None, "path": path, "\0abstract": f"@abstract{directory}", "new\nline": None}[name]
    assert variables == {
        "PROTO": "IPC", "IPCREMOTEEUID": str(os.geteuid()), "IPCREMOTEEGID": str(os.getegid()), "IPCCONNNUM": "3",
        "UNIXREMOTEEUID": str(os.geteuid()), "UNIXREMOTEEGID": str(os.getegid()), "UNIXREMOTEPID": str(os.getpid()),
        "IPCREMOTEPATH": told or "", **({} if told is None else {"REMOTE_ADDR": told}),
    }  # fmt: skip
    assert text == f"pid {os.getpid()} uid {os.geteuid()}"


def test_facts_of_a_client_that_has_gone() -> None:  # A5
    variables, text = facts(os.stat("/").st_ino + 100_000, "192.0.2.9\x001\x001")
    assert variables["REMOTE_ADDR"] == "192.0.2.9"
    assert "TCPLOCALIP" not in variables
    assert text == "192.0.2.9:1"


def test_programs_travel_as_json() -> None:
    """What the manager sends is what the spawner reads: a Program of its own making."""
    program = Program("web", "/x", ("/x", "ü\udcff"), {}, {"A": "\udc80"}, True, Output(), Output())
    assert Program.from_json(json.loads(messages.pack("program", program=program.to_json()))["program"]) == program
