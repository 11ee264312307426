"""keeper.py as a process: the test is its manager.

A Keeper runs in a forked child whose `run_manager` gives the manager's end of the channel to the test and then waits.
So a test speaks for one manager after another, and kills each by its pid like any other process.
"""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import select
import signal
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest

from superd import keeper as module
from superd.core import messages
from superd.core.messages import UNKNOWN_STATUS, context_to_json
from superd.core.plan import Program
from superd.core.spec import Context, Output
from superd.keeper import Keeper, Options
from superd.system import fdpass, process, tree

PATIENCE_S = 10  # for what always comes; a test that works never waits for it


class Manager:
    """One generation's end of the channel, and what it was handed."""

    def __init__(self, control: socket.socket, passes_over: int) -> None:
        control.settimeout(PATIENCE_S)
        self.passes_over = passes_over
        text, fds = fdpass.receive(control)
        self.control, self.pid = control, int(text)
        self.channel = socket.socket(fileno=fds[0])
        self.channel.settimeout(PATIENCE_S)
        self.held: dict[str, list[int]] = {}
        self.rows: dict[int, dict[str, Any]] = {}
        self.logs: list[int] = []
        while True:
            message, fds = self.take()
            if message["kind"] == "restore":
                for name, fd in zip(message["names"], fds, strict=True):
                    self.held.setdefault(name, []).append(fd)
            elif message["kind"] == "children":
                self.rows |= {row["id"]: row for row in message["rows"]}
                self.logs += fds
            else:
                self.go = message
                assert message["kind"] == "go"
                self.snapshot = fds
                return

    def order(self, kind: str, fds: list[int] | None = None, **fields: Any) -> None:
        fdpass.send(self.channel, messages.pack(kind, **fields), fds or [])

    def take(self) -> tuple[dict[str, Any], list[int]]:
        data, fds = fdpass.receive(self.channel)
        assert data, "the keeper has gone"
        message = messages.unpack(data)
        if self.passes_over == message.get("signo"):
            return self.take()
        return message, fds

    def said(self, kind: str, **fields: Any) -> dict[str, Any]:
        """The next report, which must be this one."""
        message, fds = self.take()
        fdpass.close_all(fds)
        assert {name: message.get(name) for name in ("kind", *fields)} == {"kind": kind, **fields}
        return message

    def start(
        self, number: int, *command: str, fds: list[int] | None = None, stored: list[list[str]] | None = None,
        **fields: Any,
    ) -> None:  # fmt: skip
        program = Program(
            **{"service": "web", "executable": command[0], "argv": command, "base_environment": {"PATH": os.defpath},
               "environment": {}, "stdio": bool(fds), "stdout": Output("null"), "stderr": Output("inherit"),
               "fd_protocols": ("systemd",), **fields}
        )  # fmt: skip
        context = context_to_json(Context())
        self.order("start", fds, id=number, program=program.to_json(), log=False, context=context, tag=["web", number],
                   stored=stored or [])  # fmt: skip

    def ping(self) -> None:
        """Everything ordered before is done, and nothing is said that was not taken: adopt a process that has gone."""
        self.order("adopt", id=999_999, pid=2**22 + 1, tag="ping", started=0.0)
        self.said("exited", id=999_999, status=UNKNOWN_STATUS)
        self.order("forget", id=999_999)

    def close(self) -> None:
        self.channel.close()
        self.control.close()
        for fds in (*self.held.values(), self.logs, self.snapshot):
            fdpass.close_all(fds)

    def kill(self, signo: int = signal.SIGKILL) -> None:
        os.kill(self.pid, signo)
        wait_gone(self.pid)
        self.close()


class KeeperProcess:
    def __init__(self, directory: str, *, subreaper: bool, stable_s: float) -> None:
        self.directory = directory
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.listener.settimeout(PATIENCE_S)
        self.listener.bind(f"{directory}/managers")
        self.listener.listen()
        self.managers: list[Manager] = []
        self.passes_over = 0
        self.pid = os.fork()
        if self.pid == 0:
            self._become_keeper(subreaper, stable_s)

    def _become_keeper(self, subreaper: bool, stable_s: float) -> NoReturn:
        status = 99
        try:
            os.dup2(os.open(f"{self.directory}/stderr", os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600), 2)
            os.closerange(3, 4096)
            process.reset_signals()
            if subreaper:
                process.become_subreaper()
            module.run_manager = self._run_manager
            module._STABLE_S = stable_s
            inherited = {"web": [os.memfd_create("inherited")]}
            status = Keeper(Options(), inherited, resource.getrlimit(resource.RLIMIT_NOFILE)).run()
        except BaseException:
            module.sys.excepthook(*module.sys.exc_info())
            module.sys.stderr.flush()
        finally:
            os._exit(status)

    def _run_manager(self, channel: socket.socket, *_: object) -> NoReturn:
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as control:
                control.connect(f"{self.directory}/managers")
                fdpass.send(control, str(os.getpid()).encode(), [channel.fileno()])
                channel.close()
                os._exit(int(control.recv(10) or b"0"))
        finally:
            os._exit(98)

    def manager(self, *, up: bool = True) -> Manager:
        """The next one."""
        manager = Manager(self.listener.accept()[0], self.passes_over)
        self.managers.append(manager)
        if up:
            manager.order("up")
        return manager

    def wait(self) -> int:
        pid, self.pid = self.pid, 0
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    def log(self) -> str:
        return Path(self.directory, "stderr").read_text()

    def fds(self) -> int:
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """What happens meanwhile the keeper finds all at once."""
        self.passes_over = signal.SIGCONT  # ours, which would be forwarded
        for manager in self.managers:
            manager.passes_over = signal.SIGCONT
        os.kill(self.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, self.pid, os.WSTOPPED)
        try:
            yield
        finally:
            os.kill(self.pid, signal.SIGCONT)

    def close(self) -> None:
        for manager in self.managers:
            manager.close()
        self.listener.close()
        if self.pid:
            for row in reversed(tree.below(self.pid)):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(row.pid, signal.SIGKILL)
            os.kill(self.pid, signal.SIGKILL)
            self.wait()


class Keepers:
    def __init__(self, directory: str) -> None:
        self.directory = directory
        self.started: list[KeeperProcess] = []

    def start(self, *, subreaper: bool = True, stable_s: float = -1.0) -> KeeperProcess:
        self.started.append(KeeperProcess(self.directory, subreaper=subreaper, stable_s=stable_s))
        return self.started[-1]


@pytest.fixture
def keepers() -> Iterator[Keepers]:
    with tempfile.TemporaryDirectory(prefix="superd-") as directory:
        found = Keepers(directory)
        yield found
        for keeper in found.started:
            keeper.close()


@pytest.fixture
def keeper(keepers: Keepers) -> KeeperProcess:
    return keepers.start()


def wait_gone(pid: int) -> None:
    """Until the process has ended, whoever its parent is."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    assert poll.poll(PATIENCE_S * 1000)
    os.close(fd)


# --- what outlives a manager


def test_fds_and_snapshot_come_back(keeper: KeeperProcess) -> None:  # G17
    first = keeper.manager()
    assert (first.go["generation"], first.go["up"], first.go["snapshot"]) == (1, False, False)
    assert list(first.held) == ["inherited:web"]
    one, two = os.memfd_create("one"), os.memfd_create("two")
    inodes = [os.fstat(fd).st_ino for fd in (one, two)]
    first.order("store", [one, two], name="listener:tcp:80")
    first.order("store", [two], name="gone")
    first.order("drop", name="gone")
    first.order("drop", name="never stored")
    os.write(two, b"opaque \xff")
    first.order("snapshot", [one])
    first.order("snapshot", [two])
    first.ping()
    fdpass.close_all([one, two])
    first.kill()
    second = keeper.manager()
    assert (second.go["generation"], second.go["up"], second.go["snapshot"]) == (2, True, True)
    assert set(second.held) == {"inherited:web", "listener:tcp:80"}
    assert [os.fstat(fd).st_ino for fd in second.held["listener:tcp:80"]] == inodes
    assert os.pread(second.snapshot[0], 100, 0) == b"opaque \xff"


def test_a_name_stored_again_replaces_the_old_fds(keeper: KeeperProcess) -> None:
    manager = keeper.manager()
    manager.ping()
    before = keeper.fds()
    for _ in range(50):
        manager.order("store", [0, 0, 0], name="x")
    manager.ping()
    assert keeper.fds() == before + 3
    manager.order("drop", name="x")
    manager.ping()
    assert keeper.fds() == before


def test_more_fds_than_a_packet_carries(keeper: KeeperProcess) -> None:
    first = keeper.manager()
    for i in range(450):
        first.order("store", [0], name=f"listener:{i:04}:{'x' * 50}")
    first.ping()
    first.kill()
    second = keeper.manager()
    assert len(second.held) == 451
    assert all(len(fds) == 1 for fds in second.held.values())


def test_statuses_wait_for_the_next_manager(keeper: KeeperProcess) -> None:  # G17
    first = keeper.manager()
    ours, theirs = socket.socketpair()
    for number, status in ((1, 7), (2, 8), (3, 9)):
        first.start(number, "/bin/sh", "-c", f"echo $$; read x; exit {status}", fds=[theirs.fileno()])
    theirs.close()
    started = [first.take()[0] for _ in range(3)]
    assert {(row["kind"], row["id"]) for row in started} == {("started", 1), ("started", 2), ("started", 3)}
    pids = {row["id"]: row["pid"] for row in started}
    with keeper.stopped():
        first.kill()
        os.kill(pids[3], signal.SIGTERM)
        wait_gone(pids[3])
    second = keeper.manager()
    assert {number: row["pid"] for number, row in second.rows.items()} == pids
    assert second.rows[1]["tag"] == ["web", 1]
    assert all(row["running"] for row in second.rows.values())
    assert [second.rows[number]["status"] for number in (1, 2, 3)] == [None, None, signal.SIGTERM]
    ours.close()  # the others see EOF
    ended = {(row["id"], os.waitstatus_to_exitcode(row["status"])) for row in (second.take()[0], second.take()[0])}
    assert ended == {(1, 7), (2, 8)}
    for number in pids:
        second.order("forget", id=number)
    second.ping()
    second.kill()
    assert keeper.manager().rows == {}


def test_a_log_pipe_comes_back_with_its_process(keeper: KeeperProcess) -> None:
    first = keeper.manager()
    ours, theirs = socket.socketpair()
    reader, writer = os.pipe()
    program = Program("web", "/bin/sh", ("/bin/sh", "-c", "echo first; read x; echo second"), {}, {}, False,
                      Output("log"), Output("log"), ("a",), fd_protocols=())  # fmt: skip
    program = Program.from_json({**program.to_json(), "argv": ["/bin/sh", "-c", "echo 1; read x <&3; echo 2"]})
    first.order(
        "start", [theirs.fileno(), writer, reader], id=1, program=program.to_json(), log=True, tag=None,
        context=context_to_json(Context()),
    )  # fmt: skip
    fdpass.close_all([reader, writer])
    theirs.close()
    first.said("started", id=1)
    first.kill()
    second = keeper.manager()
    assert second.rows[1]["log"] is True
    ours.close()
    second.said("exited", id=1, status=0)
    with open(second.logs.pop(), "rb") as file:
        assert file.read() == b"1\n2\n"  # and EOF: nobody else holds the writing end


def test_a_manager_that_fails_at_once_is_tried_again_later(keepers: Keepers) -> None:  # G14 for ourselves
    keeper = keepers.start(stable_s=1000.0)
    keeper.manager().ping()
    for _ in range(3):
        keeper.managers[-1].kill()
        keeper.manager(up=False)
    told = [line for line in keeper.log().splitlines() if "starting another" in line]
    assert [line.partition("another in ")[2] for line in told] == [
        f"{delay} s, connections wait" for delay in ("0.1", "0.2", "0.4")
    ]


@pytest.mark.parametrize("signo", [signal.SIGKILL, signal.SIGSEGV, signal.SIGRTMIN + 3, signal.SIGRTMAX])
def test_any_signal_may_end_a_manager(keeper: KeeperProcess, signo: int) -> None:
    keeper.manager().ping()
    keeper.managers[0].kill(signo)
    keeper.manager().ping()
    assert f"(pid {keeper.managers[0].pid}) was killed by " in keeper.log()


def test_what_a_manager_said_before_it_died_counts(keeper: KeeperProcess) -> None:
    first = keeper.manager()
    first.ping()
    with keeper.stopped():
        for i in range(100):
            first.order("store", [0], name=str(i))
        first.kill()
    assert len(keeper.manager().held) == 101


# --- the end


def test_exit_status(keeper: KeeperProcess) -> None:
    keeper.manager().order("exit", status=3)
    assert keeper.wait() == 3


def test_exit_before_death(keeper: KeeperProcess) -> None:
    manager = keeper.manager()
    manager.ping()
    with keeper.stopped():
        manager.order("exit", status=0)
        manager.kill()
    assert keeper.wait() == 0


@pytest.mark.parametrize("status", [0, 1, 2])
def test_a_first_manager_that_never_comes_up_ends_it(keeper: KeeperProcess, status: int) -> None:
    keeper.manager(up=False).control.send(str(status).encode())
    assert keeper.wait() == 1
    pid = keeper.managers[0].pid
    assert f"cannot start: the manager (pid {pid}) exited with status {status}" in keeper.log()


# --- processes


def test_a_process_gets_its_fds_and_nothing_else(keeper: KeeperProcess) -> None:  # E1, E5, E6, E17
    manager = keeper.manager()
    manager.order("store", [0] * 20, name="others")
    ours, theirs = socket.socketpair()
    manager.start(1, "/bin/sh", "-c", "exec >&3; cd /proc/$$/fd; echo *; cat /proc/self/status", fds=[theirs.fileno()],
                  stdio=False, names=("a",))  # fmt: skip
    theirs.close()
    manager.said("started", id=1)
    with ours, ours.makefile() as file:
        fds, *status = file.read().splitlines()
    assert set(fds.split()) - {"4"} <= {"0", "1", "2", "3"}  # 4: what the shell opened to see
    sets = dict(line.split(":\t", 1) for line in status if ":\t" in line)
    assert [int(sets[name], 16) for name in ("SigIgn", "SigBlk", "SigCgt")] == [0, 0, 0]
    manager.said("exited", id=1, status=0)


def test_a_start_that_fails(keeper: KeeperProcess) -> None:  # E9, E12
    manager = keeper.manager()
    manager.start(1, "/nonexistent/program")
    manager.said("failed", id=1, stage="exec", errno=errno.ENOENT)
    manager.said("exited", id=1, status=127 << 8)
    manager.order("forget", id=1)
    program = Program("web", "/bin/true", ("/bin/true",), {}, {}, False, Output("null"), Output("null"))
    context = context_to_json(Context(cwd="/nonexistent"))
    manager.order("start", id=2, program=program.to_json(), log=False, context=context, tag=None)
    failed = manager.said("failed", id=2, stage="directory", errno=errno.ENOENT)
    assert "/nonexistent" in failed["detail"]
    manager.said("exited", id=2)
    # It has no fd to wait at: whoever waits for the process is told, whatever was wrong.
    ready = Program("web", "/bin/true", ("/bin/true",), {}, {}, False, Output("null"), Output("null"), ready_fd=5)
    manager.order("start", id=3, program=ready.to_json(), log=False, context=context_to_json(Context()), tag=None)
    assert "IndexError" in manager.said("failed", id=3, stage="order")["detail"]


def test_quick_processes_and_orphans(keeper: KeeperProcess) -> None:  # F1, F2, F3, G1, G2, G3
    """200 x status 7, each after "started", while twice as many orphans end."""
    manager = keeper.manager()
    reports: dict[int, list[tuple[str, int | None]]] = {number: [] for number in range(200)}
    for first in range(0, 200, 50):
        for number in range(first, first + 50):
            manager.start(number, "/bin/sh", "-c", "/bin/true & /bin/true & exit 7")
        for _ in range(100):
            report, _ = manager.take()
            reports[report["id"]].append((report["kind"], report.get("status")))
    assert {tuple(found) for found in reports.values()} == {(("started", None), ("exited", 7 << 8))}
    for number in reports:
        manager.order("forget", id=number)
    for row in tree.below(keeper.pid):
        if row.pid != manager.pid:
            wait_gone(row.pid)
    manager.ping()
    manager.kill()
    after = keeper.manager()
    after.ping()
    assert [row.pid for row in tree.below(keeper.pid)] == [after.pid]
    # Those that ended before their shell were the shell's; the others were adopted and counted.
    assert 0 < after.go["orphans"] <= 400


def orphan_of(keeper: KeeperProcess, manager: Manager) -> tuple[int, socket.socket]:
    """A process whose parent has ended: (pid, socket whose end ends it with status 5)."""
    ours, theirs = socket.socketpair()
    script = "exec 3<&0; (echo $(exec sh -c 'echo $PPID'); read x <&3; exit 5) & :"
    manager.start(1, "/bin/sh", "-c", script, fds=[theirs.fileno()])
    theirs.close()
    with ours.makefile() as file:
        pid = int(file.readline())
    manager.said("started", id=1)
    manager.said("exited", id=1, status=0)
    manager.order("forget", id=1)
    return pid, ours


def parent(pid: int) -> int:
    row = tree.look(pid)
    assert row is not None
    return row.parent


def test_orphans_are_the_keepers(keeper: KeeperProcess) -> None:  # G1, H4
    manager = keeper.manager()
    pid, hold = orphan_of(keeper, manager)
    assert parent(pid) == keeper.pid
    with keeper.stopped():
        hold.close()
        wait_gone(pid)
        manager.kill()
    again = keeper.manager()
    again.ping()
    assert pid not in {row.pid for row in tree.below(keeper.pid)}


def test_the_orphan_test_needs_the_subreaper(keepers: Keepers) -> None:
    keeper = keepers.start(subreaper=False)
    pid, hold = orphan_of(keeper, keeper.manager())
    assert parent(pid) != keeper.pid
    hold.close()


def test_adopt_a_living_orphan(keeper: KeeperProcess) -> None:
    """What a spawner that was killed leaves behind is waited for like one's own."""
    manager = keeper.manager()
    pid, hold = orphan_of(keeper, manager)
    manager.order("adopt", id=7, pid=pid, tag="mine", started=12.5)
    manager.ping()
    hold.close()
    manager.said("exited", id=7, pid=pid, status=5 << 8)
    manager.kill()
    row = keeper.manager().rows[7]
    assert (row["tag"], row["started"], row["status"], row["running"]) == ("mine", 12.5, 5 << 8, True)


def test_adopt_what_has_just_ended(keeper: KeeperProcess) -> None:
    manager = keeper.manager()
    pid, hold = orphan_of(keeper, manager)
    with keeper.stopped():
        hold.close()
        wait_gone(pid)
    while pid in {row.pid for row in tree.below(keeper.pid)}:
        manager.ping()
    manager.order("adopt", id=7, pid=pid, tag="mine", started=12.5)
    manager.said("exited", id=7, pid=pid, status=5 << 8)


def test_disown_what_another_waits_for(keeper: KeeperProcess) -> None:
    """Nothing is told of it any more, and a later manager does not hear of it; a child of our own has no such row."""
    manager = keeper.manager()
    pid, hold = orphan_of(keeper, manager)
    manager.order("adopt", id=7, pid=pid, tag="mine", started=12.5)
    manager.order("disown", id=7)
    manager.order("disown", id=8)
    manager.ping()
    hold.close()
    wait_gone(pid)
    manager.kill()
    assert 7 not in keeper.manager().rows


def test_stored_fds_go_to_a_process_with_its_own(keeper: KeeperProcess) -> None:
    """By the names under which they are held; a name that is not, is none of them."""
    manager = keeper.manager()
    ours, theirs = socket.socketpair()
    reader, writer = os.pipe()
    manager.order("store", [reader], name="one")
    manager.start(1, "/bin/sh", "-c", "exec >&3; read word <&4; echo $word $LISTEN_FDS $LISTEN_FDNAMES",
                  fds=[theirs.fileno()], stdio=False, names=("a",), stored=[["gone", "x"], ["one", "b"]])  # fmt: skip
    os.write(writer, b"kept\n")
    for fd in (reader, writer, theirs.detach()):
        os.close(fd)
    manager.said("started", id=1)
    with ours, ours.makefile() as file:
        assert file.read() == "kept 2 a:b\n"
    manager.said("exited", id=1, status=0)


def test_a_signal_right_after_the_start_arrives(keeper: KeeperProcess) -> None:
    """The process may not even have its own group yet; and before its exec it would run the keeper's handlers."""
    manager = keeper.manager()
    for number in range(20):
        manager.start(number, "/bin/sleep", "1000")
        manager.order("signal", id=number, signo=signal.SIGTERM, group=True)
        manager.said("started", id=number)
        manager.said("exited", id=number, status=signal.SIGTERM)


@pytest.mark.parametrize("group", [True, False])
def test_signals_for_a_process(keeper: KeeperProcess, group: bool) -> None:  # G8
    manager = keeper.manager()
    ours, theirs = socket.socketpair()
    manager.start(1, "/bin/sh", "-c", "trap 'exit 4' USR1; echo ready; while :; do read x; done", fds=[theirs.fileno()])
    theirs.close()
    assert ours.recv(10) == b"ready\n"
    manager.said("started", id=1)
    manager.order("signal", id=1, signo=signal.SIGUSR1, group=group)
    manager.said("exited", id=1, status=4 << 8)
    manager.order("signal", id=1, signo=signal.SIGUSR1, group=group)  # it has gone
    manager.order("signal", id=55, signo=signal.SIGUSR1, group=group)  # there never was one
    manager.ping()
    ours.close()


# --- signals to the keeper


@pytest.mark.parametrize("name", module._FORWARDED)
def test_signals_are_forwarded(keeper: KeeperProcess, name: str) -> None:
    manager = keeper.manager()
    manager.ping()  # it runs: its handlers stand
    os.kill(keeper.pid, getattr(signal, f"SIG{name}"))
    manager.said("signal", signo=getattr(signal, f"SIG{name}"))


@pytest.mark.parametrize("name", ["CHLD", "PIPE", "WINCH"])
def test_signals_that_mean_nothing(keeper: KeeperProcess, name: str) -> None:
    manager = keeper.manager()
    manager.ping()
    if name != "WINCH":
        os.kill(keeper.pid, getattr(signal, f"SIG{name}"))
    manager.ping()  # nothing was said in between


def test_a_signal_without_a_manager_waits_for_the_next(keeper: KeeperProcess) -> None:
    first = keeper.manager()
    first.ping()
    with keeper.stopped():
        first.kill()
        for _ in range(3):
            os.kill(keeper.pid, signal.SIGTERM)
        os.kill(keeper.pid, signal.SIGHUP)
    second = keeper.manager()
    assert {second.take()[0]["signo"], second.take()[0]["signo"]} == {signal.SIGTERM, signal.SIGHUP}
    second.ping()  # once each


# --- spawners


def spawner(manager: Manager, number: int, context: Context | None = None) -> tuple[int, socket.socket]:
    manager.order("spawner", id=number, context=context_to_json(context or Context()))
    message, fds = manager.take()
    assert (message["kind"], message["id"]) == ("spawner", number)
    channel = socket.socket(fileno=fds[0])
    channel.settimeout(PATIENCE_S)
    return message["pid"], channel


def test_a_spawner_outlives_the_manager(keeper: KeeperProcess) -> None:
    first = keeper.manager()
    wanted = Context(umask=0o077)
    pid, channel = spawner(first, 3, wanted)
    entered(channel)
    channel.close()
    first.kill()
    second = keeper.manager()
    assert [[number, pid_] for number, pid_, _ in second.go["spawners"]] == [[3, pid]]
    assert messages.context_from_json(second.go["spawners"][0][2]) == wanted
    with socket.socket(fileno=second.held["spawner:3"].pop()) as again:
        again.settimeout(PATIENCE_S)
        fdpass.send(again, messages.pack("list"))
        assert messages.unpack(fdpass.receive(again)[0]) == {"kind": "listed", "programs": []}


def entered(channel: socket.socket) -> None:
    assert messages.unpack(fdpass.receive(channel)[0])["kind"] == "entered"


def test_a_spawner_that_was_killed_is_followed_on_the_same_channel(keeper: KeeperProcess) -> None:
    manager = keeper.manager()
    pid, channel = spawner(manager, 1)
    with channel:
        entered(channel)
        with keeper.stopped():
            os.kill(pid, signal.SIGKILL)
            fdpass.send(channel, messages.pack("list"))  # nobody is there to read it
        replaced = manager.said("spawner-replaced", id=1, was=pid)
        assert replaced["pid"] != pid
        entered(channel)
        assert messages.unpack(fdpass.receive(channel)[0]) == {"kind": "listed", "programs": []}


def test_spawners_that_are_killed_at_once_are_given_up_and_leave_nothing(keepers: Keepers) -> None:
    keeper = keepers.start(stable_s=1000.0)
    manager = keeper.manager()
    manager.ping()
    before = keeper.fds()
    for number in (1, 2):
        pid, channel = spawner(manager, number)
        for _ in range(module._QUICK_ENDS):
            os.kill(pid, signal.SIGKILL)
            pid = manager.said("spawner-replaced", id=number, was=pid)["pid"]
        os.kill(pid, signal.SIGKILL)
        manager.said("spawner-gone", id=number, pid=pid, status=signal.SIGKILL)
        channel.close()
    manager.ping()
    assert keeper.fds() == before


def test_a_context_that_cannot_be_entered(keeper: KeeperProcess) -> None:
    manager = keeper.manager()
    pid, channel = spawner(manager, 1, Context(cwd="/nonexistent"))
    with channel:
        refused = messages.unpack(fdpass.receive(channel)[0])
        assert (refused["kind"], refused["stage"], refused["errno"]) == ("refused", "directory", errno.ENOENT)
        assert fdpass.receive(channel) == (b"", [])
    manager.said("spawner-gone", id=1, pid=pid, status=1 << 8)


def test_spawners_end_with_the_keeper(keeper: KeeperProcess) -> None:
    manager = keeper.manager()
    pid, channel = spawner(manager, 1)
    entered(channel)  # its signals are its own by now
    manager.order("exit", status=0)
    assert keeper.wait() == 0
    wait_gone(pid)
    channel.close()


# --- what must not end it

GARBAGE: list[bytes | dict[str, Any]] = [
    b"{", b"\xff", b"[]", b"G" * 30, b"\0", b"[" * 3000, b"[" * 200_000, b'{"kind": 1}', b'{"kind": "__class__"}',
    b'{"kind": "_take"}', b'{"kind": "run"}', b'{"kind": "' + b"x" * 10_000 + b'"}',
    {"kind": "store"}, {"kind": "store", "name": ["a"]}, {"kind": "drop"}, {"kind": "drop", "name": {}},
    {"kind": "start"}, {"kind": "start", "id": 1, "program": {}, "context": {}, "log": True},
    {"kind": "start", "id": 1, "program": None, "context": None, "log": False},
    {"kind": "spawner"}, {"kind": "spawner", "id": 1, "context": None},
    {"kind": "spawner", "id": 1, "context": {"x": 1}},
    {"kind": "signal"}, {"kind": "signal", "id": [], "signo": 1, "group": False}, {"kind": "forget"},
    {"kind": "forget", "id": None}, {"kind": "adopt"}, {"kind": "adopt", "id": 1, "pid": "x", "tag": 0, "started": 0},
    {"kind": "adopt", "id": 2, "pid": 10**30, "tag": 0, "started": 0},
    {"kind": "exit"}, {"kind": "exit", "status": "x"}, {"kind": "exit", "status": None},
    {"kind": "exit", "status": [1]}, {"kind": "notify"}, {"kind": "notify", "address": 1, "text": 2},
    {"kind": "notify", "address": "/nonexistent", "text": "x"}, {"kind": "notify", "address": "x" * 500, "text": "x"},
    {"kind": "notify", "address": "", "text": "\udcff"}, {"kind": "snapshot", "x": 1},
]  # fmt: skip


@pytest.mark.parametrize("fds", [0, 2])
def test_garbage_does_not_end_it_and_leaks_nothing(keeper: KeeperProcess, fds: int) -> None:
    manager = keeper.manager()
    manager.order("snapshot")
    manager.ping()
    before = keeper.fds()
    for order in GARBAGE:
        data = order if isinstance(order, bytes) else messages.pack(**order)
        # One zero byte with an fd announces a text in a memfd, which is not this.
        fdpass.send(manager.channel, data, [0] * (fds if data != b"\0" else 0))
        if isinstance(order, dict) and order["kind"] == "start" and "id" in order:
            manager.said("failed", id=1, stage="order")
        manager.ping()
    manager.order("snapshot")
    manager.ping()
    assert keeper.fds() == before


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_signal_that_is_none(keeper: KeeperProcess, number: int) -> None:
    manager = keeper.manager()
    manager.start(1, "/bin/sleep", "1000")
    manager.said("started", id=1)
    manager.order("signal", id=1, signo=[10**10, -1, "TERM"][number - 1], group=False)
    manager.ping()


def test_no_free_fd_for_a_manager(keeper: KeeperProcess) -> None:  # X1, X2
    manager = keeper.manager()
    manager.ping()
    limits = resource.prlimit(keeper.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(keeper.pid, resource.RLIMIT_NOFILE, (3, limits[1]))
    manager.order("spawner", id=1, context=context_to_json(Context()))
    manager.said("spawner-gone", id=1, pid=0, errno=errno.EMFILE)
    manager.start(1, "/bin/true")
    manager.said("failed", id=1, stage="descriptors", errno=errno.EMFILE)
    manager.kill()
    while "cannot" not in keeper.log():
        os.sched_yield()
    resource.prlimit(keeper.pid, resource.RLIMIT_NOFILE, limits)
    keeper.manager().ping()


def test_fds_that_do_not_fit_are_answered(keeper: KeeperProcess) -> None:  # X2: a CutMessage
    manager = keeper.manager()
    manager.ping()
    limits = resource.prlimit(keeper.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(keeper.pid, resource.RLIMIT_NOFILE, (3, limits[1]))
    manager.start(4, "/bin/true", fds=[0])
    manager.said("failed", id=4, stage="descriptors", errno=errno.EMFILE)
    resource.prlimit(keeper.pid, resource.RLIMIT_NOFILE, limits)
    manager.ping()


@pytest.mark.parametrize("held", [0, 1100])
def test_a_manager_that_reads_slowly_misses_nothing(keeper: KeeperProcess, held: int) -> None:
    """With more than 1024 fds held too, where select(2) ends."""
    first = keeper.manager()
    for i in range(0, held, 220):
        first.order("store", [0] * 220, name=str(i))
    first.ping()
    first.kill()
    manager = keeper.manager()
    sent = 0
    manager.channel.setblocking(False)
    with contextlib.suppress(BlockingIOError):  # then it waits for us to read
        while sent < 5000:
            manager.order("adopt", id=sent, pid=2**22 + 1, tag="", started=0.0)
            sent += 1
    manager.channel.settimeout(PATIENCE_S)
    assert [manager.take()[0]["id"] for _ in range(sent)] == list(range(sent))


def test_a_manager_that_stands_still_misses_nothing(keeper: KeeperProcess) -> None:  # X8
    """More reports than its socket holds, and the keeper goes on with its work meanwhile. A process's end is among
    them, and the next manager is told nothing that was for this one."""
    manager = keeper.manager()
    manager.start(7_000, "/bin/sh", "-c", "exit 3")
    for number in range(5000):
        manager.order("adopt", id=number, pid=2**22 + 1, tag="", started=0.0)
        manager.order("forget", id=number)
    reports = [manager.take()[0] for _ in range(5002)]
    assert sorted(report["id"] for report in reports if report["kind"] == "exited") == [*range(5000), 7_000]
    for number in range(5000):
        manager.order("adopt", id=number, pid=2**22 + 1, tag="", started=0.0)
        manager.order("forget", id=number)
    manager.kill()
    after = keeper.manager()
    after.ping()
    assert [row["status"] for row in after.rows.values()] == [3 << 8]


# --- towards our own manager


@pytest.mark.parametrize("abstract", [False, True])
def test_notify(keeper: KeeperProcess, abstract: bool) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        name = f"{keeper.directory}/notify"
        receiver.settimeout(PATIENCE_S)
        receiver.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        receiver.bind("\0" + name if abstract else name)
        address = "@" + name if abstract else name
        keeper.manager().order("notify", address=address, text="READY=1\nSTATUS=ü")
        data, ancillary, _, _ = receiver.recvmsg(100, 100)
        assert data.decode() == "READY=1\nSTATUS=ü"
        assert int.from_bytes(ancillary[0][2][:4], "little") == keeper.pid  # the pid that it knows
