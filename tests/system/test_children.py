"""system/children.py: real processes, which tell what they were given."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import socket
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from forked import in_child

from superd.core.plan import Program
from superd.core.spec import Output
from superd.system import children, process
from superd.system.children import Launcher, Null, StartError, fork_exec, reap, signal_child, start_failure

PROBE = """
import fcntl, json, os
def link(n):
    try:
        found = os.fstat(int(n))
        return [os.readlink('/proc/self/fd/' + n), found.st_dev, found.st_ino]
    except OSError:
        return None  # what listdir had open
fds = {n: link(n) for n in sorted(os.listdir('/proc/self/fd'), key=int)}
environ = open('/proc/self/environ', 'rb').read().decode(errors='surrogateescape').split('\\0')[:-1]
told = {'fds': {n: found for n, found in fds.items() if found}, 'env': dict(line.split('=', 1) for line in environ),
        'names': [line.partition('=')[0] for line in environ],
        'pid': os.getpid(), 'sid': os.getsid(0), 'flags': [fcntl.fcntl(n, 1) for n in (0, 1, 2)]}
os.write(%d, json.dumps(told).encode())
"""


def program(*command: str, **fields: Any) -> Program:
    return Program(
        **{"service": "web", "executable": command[0], "argv": command, "base_environment": {}, "environment": {},
           "stdio": True, "stdout": Output(), "stderr": Output(), "fd_protocols": ("systemd",), **fields}
    )  # fmt: skip


def probe(out: int = 1, **fields: Any) -> Program:
    return program(sys.executable, "-ISc", PROBE % out, **fields)


def prepare() -> tuple[Mapping[str, str], int | None]:
    inode = process.pidfd_inode()
    process.reset_signals()
    return {}, inode


def run(
    start: str, what: Program, connection: int, log: int | None = None, environment: Mapping[str, str] | None = None
) -> int:
    """Start it in one of the two ways; its pid. Raises StartError."""
    if start == "spawn":
        null = Null()
        launcher = Launcher(what, what.environment, null)
        try:
            return launcher.start(environment or {}, connection, log)
        finally:
            launcher.close()
            os.close(null.fd)
    pid, report = fork_exec(what, environment or {}, [connection], log, prepare)
    failure = start_failure(report)
    if failure is not None:
        os.waitpid(pid, 0)
        raise failure
    return pid


def wait(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def read(fd: int) -> bytes:
    """All until EOF; closes fd."""
    with open(fd, "rb") as file:
        return file.read()


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """(the client's end, what is handed over)."""
    a, b = socket.socketpair()
    with a, b:
        yield a, b


def answer(client: socket.socket) -> Any:
    with client.makefile("rb") as file:
        return json.loads(file.read())


def inode(fd: int | str) -> list[int]:
    found = os.fstat(fd) if isinstance(fd, int) else os.stat(fd)
    return [found.st_dev, found.st_ino]


def place(name: str, number: int) -> None:
    """A file of that name at fd `number`."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC)
    if fd != number:
        os.dup2(fd, number, inheritable=False)
        os.close(fd)


@pytest.fixture(autouse=True, scope="module")
def everything_is_close_on_exec() -> None:
    """As superd makes it at start (process.sanitize_inherited_fds), whatever the test runner was started with."""
    for fd in map(int, os.listdir("/proc/self/fd")):
        if fd > 2 and os.path.exists(f"/proc/self/fd/{fd}"):
            os.set_inheritable(fd, False)


START = pytest.mark.parametrize("start", ["spawn", "fork"])


# --- fds


@START
def test_a_connection_gets_three_fds(start: str, pair: tuple[socket.socket, socket.socket]) -> None:  # E1, E24
    client, given = pair
    log, writer = os.pipe()
    pid = run(start, probe(), given.fileno(), writer)
    mine = [inode(given.fileno()), inode(given.fileno()), inode(writer)]
    os.close(writer)
    given.close()  # E3: with ours closed the client sees EOF when the process has ended
    told = answer(client)
    assert wait(pid) == 0
    assert sorted(told["fds"]) == ["0", "1", "2"]
    assert [told["fds"][n][1:] for n in "012"] == mine
    assert told["flags"] == [0, 0, 0]
    assert told["sid"] == told["pid"] == pid  # E17
    assert read(log) == b""


@pytest.mark.parametrize("least", [10, 60, 251])
def test_a_forked_child_gets_no_inheritable_fd_either(least: int, pair: tuple[socket.socket, socket.socket]) -> None:
    client, given = pair  # E2
    leaked = fcntl.fcntl(0, fcntl.F_DUPFD, least)  # a free one: any number may be open already, for pytest too
    pid = run("fork", probe(), given.fileno())
    os.close(leaked)
    given.close()
    assert sorted(answer(client)["fds"]) == ["0", "1", "2"]
    assert wait(pid) == 0


@START
@pytest.mark.parametrize("kind", ["log", "socket", "null", "inherit", "file"])
def test_stderr(start: str, kind: Any, pair: tuple[socket.socket, socket.socket], tmp_path: Path) -> None:
    client, given = pair
    log, writer = os.pipe()
    path = str(tmp_path / "err")
    pid = run(start, probe(stderr=Output(kind, path if kind == "file" else None)), given.fileno(), writer)
    expected = {"log": writer, "socket": given.fileno(), "null": "/dev/null", "inherit": 2}
    expected_inode = inode(expected.get(kind, path))
    os.close(writer)
    given.close()
    assert answer(client)["fds"]["2"][1:] == expected_inode
    assert wait(pid) == 0
    os.close(log)


@pytest.mark.parametrize("kind", ["log", "socket", "null", "inherit", "file"])
def test_stdout_where_it_is_not_the_socket(
    kind: Any, pair: tuple[socket.socket, socket.socket], tmp_path: Path
) -> None:
    client, given = pair
    log, writer = os.pipe()
    path = str(tmp_path / "out")
    what = probe(3, stdio=False, names=("a",), stdout=Output(kind, path if kind == "file" else None))
    pid = run("fork", what, given.fileno(), writer)
    expected = {"log": writer, "socket": given.fileno(), "null": "/dev/null", "inherit": 1}
    expected_inode = inode(expected.get(kind, path))
    os.close(writer)
    given.close()
    told = answer(client)
    assert told["fds"]["1"][1:] == expected_inode
    assert told["fds"]["0"][1:] == inode("/dev/null")
    assert sorted(told["fds"]) == ["0", "1", "2", "3"]
    assert wait(pid) == 0
    os.close(log)


@pytest.mark.parametrize("start", ["spawn", "fork"])
def test_a_file_is_appended_to_and_not_for_all(start: str, tmp_path: Path) -> None:
    path = tmp_path / "err"
    for word in "first", "second":
        client, given = socket.socketpair()
        with client, given:
            what = program("/bin/sh", "-c", f"echo {word} >&2", stderr=Output("file", str(path)))
            assert wait(run(start, what, given.fileno())) == 0
    assert path.read_text() == "first\nsecond\n"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


@START
def test_a_link_at_the_place_of_a_file_is_refused(
    start: str, tmp_path: Path, pair: tuple[socket.socket, socket.socket]
) -> None:  # D2, L10
    target = tmp_path / "target"
    target.write_text("precious")
    (tmp_path / "err").symlink_to(target)
    with pytest.raises(StartError) as caught:
        run(start, program("/bin/true", stderr=Output("file", str(tmp_path / "err"))), pair[1].fileno())
    assert (caught.value.stage, caught.value.errno) == ("output", errno.ELOOP)
    assert target.read_text() == "precious"


def test_files_are_opened_as_the_user(tmp_path: Path, pair: tuple[socket.socket, socket.socket], root: None) -> None:
    def as_nobody() -> tuple[Mapping[str, str], int | None]:
        os.setresuid(65534, 65534, 65534)
        return {}, None

    tmp_path.chmod(0o755)
    what = program("/bin/true", stderr=Output("file", str(tmp_path / "err")))
    pid, report = fork_exec(what, {}, [pair[1].fileno()], None, as_nobody)  # L10
    failure = start_failure(report)
    assert failure is not None
    assert (failure.stage, failure.errno, failure.detail) == ("output", errno.EACCES, str(tmp_path / "err"))
    assert wait(pid) == 126
    assert not (tmp_path / "err").exists()


@pytest.mark.parametrize(
    "order",
    [[7, 6, 5, 4, 3], [4, 3], [4, 5, 6, 7, 3], [3, 4, 5], [5, 3, 3]],
    ids=str,
)
@pytest.mark.parametrize("log", [None, 3, 8, 9])
@pytest.mark.parametrize("gaps", [False, True])
def test_sources_that_stand_at_targets(order: list[int], log: int | None, gaps: bool) -> None:  # O5
    """Names match sockets, whatever number each had: reversed, rotated, twice, under the report's or the log's."""

    def child() -> list[Any]:
        os.closerange(3, 90)
        if not gaps:
            for fd in range(3, 12):
                os.dup2(0, fd, inheritable=False)
        with tempfile.TemporaryFile(buffering=0) as told:
            out = fcntl.fcntl(told.fileno(), fcntl.F_DUPFD_CLOEXEC, 60)
            for fd in set(order):
                place(f"source-{fd}", fd)
            numbers = list(order)
            writer = None
            if log is not None:
                writer = log if log not in order else 30
                place("log", writer)
            names = tuple(f"source-{fd}" for fd in order)
            what = probe(len(order) + 3, stdio=False, names=(*names, "told"), stdout=Output("null"))
            pid, report = fork_exec(what, {}, [*numbers, out], writer, prepare)
            failure = start_failure(report)
            assert failure is None, failure
            assert wait(pid) == 0
            found = json.loads(os.pread(out, 1 << 20, 0))
            return [found["fds"], found["env"]]

    fds, env = in_child(child, report_fd=200)
    names = [f"source-{fd}" for fd in order]
    assert env["LISTEN_FDNAMES"] == ":".join([*names, "told"])
    for number, name in enumerate(names, 3):
        assert fds[str(number)][0] == f"/memfd:{name} (deleted)"
    assert sorted(map(int, fds)) == list(range(len(order) + 4))
    assert fds["2"][0] == ("/memfd:log (deleted)" if log is not None else "/dev/null")


def test_nothing_stays_open_in_the_parent(pair: tuple[socket.socket, socket.socket]) -> None:  # E3
    def count() -> int:
        return len(os.listdir("/proc/self/fd"))

    before = count()
    for what in (program("/bin/true"), program("/nonexistent")):
        for start in ("spawn", "fork"):
            try:
                wait(run(start, what, pair[1].fileno()))
            except StartError:
                pass
            assert count() == before


def test_limits_set_in_the_child_do_not_hinder_it(pair: tuple[socket.socket, socket.socket]) -> None:
    def limited() -> tuple[Mapping[str, str], int | None]:
        import resource

        resource.setrlimit(resource.RLIMIT_NOFILE, (5, 5))
        return {}, None

    high = fcntl.fcntl(pair[1].fileno(), fcntl.F_DUPFD_CLOEXEC, 500)
    pid, report = fork_exec(program("/bin/true"), {}, [high], None, limited)
    os.close(high)
    assert start_failure(report) is None
    assert wait(pid) == 0


# --- signals


@START
def test_signals_are_as_in_a_new_process(start: str) -> None:  # E5, E6
    def child() -> str:
        for name in (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGUSR1):
            signal.signal(name, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGCHLD, signal.SIGRTMIN + 3})
        client, given = socket.socketpair()
        pid = run(start, program("/bin/cat", "/proc/self/status"), given.fileno())
        given.close()
        with client.makefile() as file:
            text = file.read()
        wait(pid)
        return text

    status = dict(line.split(":\t", 1) for line in in_child(child).splitlines() if ":\t" in line)
    assert [int(status[name], 16) for name in ("SigIgn", "SigBlk", "SigCgt")] == [0, 0, 0]


# --- environment


@START
def test_environment_is_exactly_what_was_given(start: str, pair: tuple[socket.socket, socket.socket]) -> None:  # E13
    client, given = pair
    pid = run(start, probe(), given.fileno(), environment={"A": "1", "REMOTE_ADDR": "::1"})
    given.close()
    assert answer(client)["env"] == {"A": "1", "REMOTE_ADDR": "::1"}  # O2: and no LISTEN_*
    assert wait(pid) == 0


def test_listen_pid_is_that_of_the_process(pair: tuple[socket.socket, socket.socket]) -> None:  # O1, PROTOCOLS.md 2.1
    what = program(
        "/bin/sh", "-c", "read line <&3; cat /proc/$$/environ", stdio=False, names=("a", "b"), stdout=Output("log")
    )  # fmt: skip
    given_pipe, release = os.pipe()
    out, writer = os.pipe()
    pid, report = fork_exec(what, {}, [given_pipe, pair[1].fileno()], writer, prepare)
    os.close(given_pipe)
    os.close(writer)
    assert start_failure(report) is None
    pidfd = os.pidfd_open(pid)
    expected = str(os.fstat(pidfd).st_ino)
    os.close(pidfd)
    os.write(release, b"\n")
    os.close(release)
    env = dict(line.split("=", 1) for line in read(out).decode().split("\0")[:-1])
    assert wait(pid) == 0
    assert env["LISTEN_PID"] == str(pid)
    assert (env["LISTEN_FDS"], env["LISTEN_FDNAMES"]) == ("2", "a:b")
    if process.pidfd_inode() is None:
        assert "LISTEN_PIDFDID" not in env
    else:
        assert env["LISTEN_PIDFDID"] == expected


def test_what_wins_over_what(pair: tuple[socket.socket, socket.socket]) -> None:  # CONFIG.md, `environment`
    def user() -> tuple[Mapping[str, str], int | None]:
        return {"B": "user", "C": "user", "D": "user", "LISTEN_FDS": "user"}, None

    client, given = pair
    what = probe(
        3, stdio=False, names=("a",), base_environment=dict.fromkeys("ABCD", "base"),
        environment={"C": "table", "D": "table", "LISTEN_FDS": "table"},
    )  # fmt: skip
    pid, report = fork_exec(what, {"D": "moment", "LISTEN_FDS": "moment"}, [given.fileno()], None, user)
    assert start_failure(report) is None
    given.close()
    env = answer(client)["env"]
    assert wait(pid) == 0
    assert [env[name] for name in "ABCD"] == ["base", "user", "table", "moment"]
    assert env["LISTEN_FDS"] == "1"


def test_one_launcher_many_connections() -> None:
    """The words of each connection are its own, and win; no name comes twice, so that no shell can choose."""
    null = Null()
    environment = {"A": "1", "REMOTE_ADDR": "forged", "SUPERD_CONNECTION": "forged"}
    launcher = Launcher(probe(), environment, null)
    for number in range(5):
        client, given = socket.socketpair()
        with client:
            pid = launcher.start({"REMOTE_ADDR": f"192.0.2.{number}", "SUPERD_CONNECTION": "1-2"}, given.fileno(), None)
            given.close()
            with client.makefile("rb") as file:
                told = json.loads(file.read())
        assert wait(pid) == 0
        assert told["env"] == {"A": "1", "REMOTE_ADDR": f"192.0.2.{number}", "SUPERD_CONNECTION": "1-2"}
        assert len(told["names"]) == 3
    launcher.close()
    launcher.close()
    os.close(null.fd)


# --- what never ran


@pytest.fixture
def broken(tmp_path: Path) -> dict[str, str]:
    paths = {name: tmp_path / name for name in ("missing", "plain", "directory", "garbage", "script")}
    paths["plain"].write_text("#!/bin/sh\n")
    paths["plain"].chmod(0o644)
    paths["directory"].mkdir()
    paths["garbage"].write_bytes(b"\0\1\2")
    paths["garbage"].chmod(0o755)
    paths["script"].write_text("#!/nonexistent/interpreter\n")
    paths["script"].chmod(0o755)
    return {name: str(path) for name, path in paths.items()}


@START
@pytest.mark.parametrize("stderr", ["log", "file"])
@pytest.mark.parametrize(
    ("name", "error", "status"),
    [
        ("missing", errno.ENOENT, 127), ("plain", errno.EACCES, 126), ("directory", errno.EACCES, 126),
        ("garbage", errno.ENOEXEC, 126), ("script", errno.ENOENT, 127),
    ],
)  # fmt: skip
def test_exec_failure(
    start: str, name: str, error: int, status: int, broken: dict[str, str], tmp_path: Path, stderr: Any,
    pair: tuple[socket.socket, socket.socket],
) -> None:  # fmt: skip  # E12
    what = program(broken[name], stderr=Output(stderr, str(tmp_path / "err") if stderr == "file" else None))
    if start == "fork":
        pid, report = fork_exec(what, {}, [pair[1].fileno()], None, prepare)
        failure = start_failure(report)
        assert wait(pid) == status
    else:
        with pytest.raises(StartError) as caught:
            run(start, what, pair[1].fileno())
        failure = caught.value
    assert failure is not None
    assert (failure.stage, failure.errno) == ("exec", error)


@START
def test_too_long_a_command(start: str, pair: tuple[socket.socket, socket.socket]) -> None:  # E16
    with pytest.raises(StartError) as caught:
        run(start, program("/bin/true", "x" * 200_000), pair[1].fileno())
    assert (caught.value.stage, caught.value.errno) == ("exec", errno.E2BIG)


@pytest.mark.parametrize(
    ("raised", "stage", "number", "detail"),
    [
        (StartError("user", errno.EPERM, "cannot become 'x'"), "user", errno.EPERM, "cannot become 'x'"),
        (StartError("limits", 0, "y" * 10_000), "limits", 0, "y" * 500),
        (OSError(errno.EIO, "injected"), "descriptors", errno.EIO, "injected"),
        (RuntimeError("boom"), "descriptors", 0, "RuntimeError('boom')"),
        (KeyboardInterrupt(), "descriptors", 0, "KeyboardInterrupt"),
        (SystemExit(0), "descriptors", 0, "SystemExit"),
    ],
)
def test_a_stage_that_fails_means_no_exec(
    raised: BaseException, stage: str, number: int, detail: str, pair: tuple[socket.socket, socket.socket]
) -> None:  # E9, H6
    def fails() -> tuple[Mapping[str, str], int | None]:
        raise raised

    client, given = pair
    pid, report = fork_exec(program("/bin/echo", "ran"), {}, [given.fileno()], None, fails)
    failure = start_failure(report)
    assert failure is not None
    assert (failure.stage, failure.errno) == (stage, number)
    assert detail in failure.detail
    assert wait(pid) in (126, 127)
    given.close()
    assert client.recv(10) == b""


@pytest.mark.parametrize(
    ("call", "stage", "number"),
    [
        ("fork", "fork", errno.EAGAIN),
        ("fork", "fork", errno.ENOMEM),
        ("pipe2", "descriptors", errno.EMFILE),
    ],
)
def test_no_child_at_all(
    call: str, stage: str, number: int, monkeypatch: pytest.MonkeyPatch, pair: tuple[socket.socket, socket.socket]
) -> None:  # F12, X2, X4
    def fails(*_: object) -> None:
        raise OSError(number, "injected")

    monkeypatch.setattr(os, call, fails)
    with pytest.raises(StartError) as caught:
        fork_exec(program("/bin/true"), {}, [pair[1].fileno()], None, prepare)
    assert (caught.value.stage, caught.value.errno) == (stage, number)


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.ENOMEM])
def test_no_spawn_at_all(
    number: int, monkeypatch: pytest.MonkeyPatch, pair: tuple[socket.socket, socket.socket]
) -> None:  # F12
    monkeypatch.setattr(children, "_posix_spawn", lambda *_: number)
    with pytest.raises(StartError) as caught:
        run("spawn", program("/bin/true"), pair[1].fileno())
    assert (caught.value.stage, caught.value.errno) == ("fork", number)


# --- reap and signal


def in_a_process_of_its_own(function: Callable[[], Any]) -> Any:
    """`reap` takes every child of its process: not one where a test runner has others."""
    return in_child(function)


def test_reap_takes_all_there_are() -> None:  # G2, G3
    def child() -> Any:
        assert list(reap()) == []  # no child at all
        gate, opener = os.pipe()
        pids = {}
        for status in range(100):
            pid = os.fork()
            if pid == 0:
                os.close(opener)
                os.read(gate, 1)  # all end together
                os._exit(status)
            pids[pid] = status
        assert list(reap()) == []  # none has ended
        os.close(opener)
        found: dict[int, int] = {}
        while len(found) < 100:
            os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT)
            found.update(reap())
        return [found.keys() == pids.keys(), [os.waitstatus_to_exitcode(found[pid]) == pids[pid] for pid in pids]]

    assert in_a_process_of_its_own(child) == [True, [True] * 100]


def test_signal_wakes_what_is_stopped(pair: tuple[socket.socket, socket.socket]) -> None:  # G10
    client, given = pair
    what = program("/bin/sh", "-c", "trap 'exit 5' TERM; echo ready; while :; do read x; done")
    pid = run("spawn", what, given.fileno())
    assert client.recv(100) == b"ready\n"
    os.kill(pid, signal.SIGSTOP)
    os.waitid(os.P_PID, pid, os.WSTOPPED)
    assert signal_child(pid, signal.SIGTERM, group=False)
    assert wait(pid) == 5


def test_signal_a_group(pair: tuple[socket.socket, socket.socket]) -> None:  # H7
    client, given = pair
    pid = run("spawn", program("/bin/sh", "-c", "sleep 99 & echo ready; wait"), given.fileno())
    given.close()
    assert client.recv(100) == b"ready\n"
    assert signal_child(pid, signal.SIGKILL, group=True)
    assert client.recv(100) == b""  # sleep had it too
    assert wait(pid) == -signal.SIGKILL


@pytest.mark.parametrize("group", [True, False])
def test_signal_what_has_gone(group: bool) -> None:  # G8 G7
    pid = in_child(os.getpid)
    assert signal_child(pid, signal.SIGTERM, group=group) is False


def test_a_zombie_can_be_signalled_in_vain(pair: tuple[socket.socket, socket.socket]) -> None:  # G8
    pid = run("spawn", program("/bin/true"), pair[1].fileno())
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert signal_child(pid, signal.SIGTERM, group=True) in (True, False)
    assert wait(pid) == 0


def test_no_dev_null(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> int:
        raise FileNotFoundError

    monkeypatch.setattr(os, "open", missing)
    assert children.Null().fd == 0
