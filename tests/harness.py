"""The real daemon, started by a test: `Superd` writes its conf.d, runs it, reads its log, stops it.

Nothing here waits for time to pass: every wait ends with a log record, an end of file or the end of a process.
"""

from __future__ import annotations

import json
import os
import re
import resource
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from superd.testing import connect_unix

TIMEOUT_S = 20.0  # a generous upper bound of any single wait; reached only by a failure

# The interpreter below a virtual environment: a service user may read it wherever the environment lies.
PYTHON = SYSTEM_PYTHON if os.access(SYSTEM_PYTHON := "/usr/bin/python3", os.X_OK) else sys.executable

ROLES = ("superd-keeper", "superd-manager", "superd-spawner")

Record = dict[str, Any]


class Superd:
    """One daemon on a directory of its own (`dir`, readable by everybody: services run as other users).

        with Superd() as superd:
            superd.write("cat", 'listen = "tcp:127.0.0.1:0"\ncommand = "/bin/cat"')
            superd.start()
            with superd.connect("cat") as client: ...

    Leaving the block stops it in order and fails if that does not work; `stop()` before that is the same.
    """

    def __init__(self) -> None:
        self.dir = Path(tempfile.mkdtemp(prefix="superd-test-"))
        self.dir.chmod(0o755)
        self.conf = self.dir / "etc"
        (self.conf / "conf.d").mkdir(parents=True)
        self.control = f"unix:{self.dir}/control.sock"
        self.lines: list[str] = []  # the whole log as it came, stdout and stderr in one
        self.records: list[Record] = []
        self.garbage: list[str] = []  # lines that are no JSON object: a traceback, a print
        self.garbage_expected = False  # files with errors are reported in caret form before there is a log
        self._news = threading.Condition()
        self._eof = False
        self._process: subprocess.Popen[bytes] | None = None
        self._wrapped = False
        self.program = [sys.executable, "-I", "-m", "superd"]
        self._reader: threading.Thread | None = None

    # -- configuration

    def write(self, name: str, text: str) -> Path:
        """conf.d/NAME.toml; `name` may have a directory in it ("git.toml.d/10") for drop-ins."""
        path = self.conf / "conf.d" / f"{name}.toml"
        path.parent.mkdir(exist_ok=True)
        fresh = path.with_name(f".{path.name}")
        fresh.write_text(text if text.endswith("\n") else text + "\n")
        fresh.replace(path)
        return path

    def write_daemon(self, text: str) -> Path:
        """superd.toml."""
        path = self.conf / "superd.toml"
        path.write_text(text if text.endswith("\n") else text + "\n")
        return path

    def room(self, name: str, *, user: str | int | None = None, mode: int = 0o755) -> Path:
        """A new directory for a service's data, owned by `user` (only root can give it away)."""
        path = self.dir / name
        path.mkdir()
        path.chmod(mode)
        if user is not None and os.geteuid() == 0:
            shutil.chown(path, user)
        return path

    # -- life

    @property
    def pid(self) -> int:
        """The keeper's."""
        assert self._process is not None, "superd was not started"
        if not self._wrapped or comm(self._process.pid) == "superd-keeper":
            return self._process.pid
        found = [pid for pid in descendants(self._process.pid) if comm(pid) == "superd-keeper"]
        assert found, f"no keeper below {tree(self._process.pid)}"
        return found[0]

    def launch(
        self,
        *arguments: str,
        environment: dict[str, str] | None = None,
        preexec: Callable[[], None] | None = None,
        pass_fds: Sequence[int] = (),
        umask: int = -1,
        extra_groups: Sequence[int] | None = None,
        wrapper: Sequence[str] = (),
        cwd: Path | None = None,
    ) -> None:
        """Start without waiting for anything; the parameters are those of the process that superd finds itself in.

        wrapper: a program and arguments that become superd, or start it as their child and wait for it (unshare(1)).
        """
        assert self._process is None, "superd runs already"
        argv = [*self.program, "-c", str(self.conf), "--control", self.control, "--log", "json"]
        self._wrapped = bool(wrapper)
        self._process = subprocess.Popen(
            [*wrapper, *argv, *arguments],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            cwd=cwd or self.dir, env=environment if environment is not None else dict(os.environ),
            preexec_fn=preexec, pass_fds=pass_fds, umask=umask, extra_groups=extra_groups, start_new_session=True,
        )  # fmt: skip
        self._eof = False
        self._reader = threading.Thread(target=self._read, name="superd-log", daemon=True)
        self._reader.start()

    def start(self, *arguments: str, **options: Any) -> Record:
        """Start and wait until all is bound: the record `ready: N services, M sockets`."""
        mark = self.mark()
        self.launch(*arguments, **options)
        return self.wait_record(after=mark, message=re.compile(r"ready: \d+ services?, \d+ sockets?"))

    def stop(self, *, timeout: float = TIMEOUT_S, status: int = 0) -> None:
        """TERM to the keeper; it has to end with `status` and to leave nobody behind."""
        if self._process is None:
            return
        family = open_pidfds(descendants(self._process.pid))
        try:
            if self._process.poll() is None:
                os.kill(self.pid, signal.SIGTERM)
            try:
                code = self._process.wait(timeout)
            except subprocess.TimeoutExpired:
                raise AssertionError(f"superd still runs {timeout} s after SIGTERM: {tree(self.pid)}") from None
            left = survivors(family)
            assert not left, f"superd has ended and left {left}"
            assert code == status, f"superd ended with {code}, not {status}"
            assert self.garbage_expected or not self.garbage, f"not a JSON object in superd's log: {self.garbage}"
        finally:
            for fd in family.values():
                os.close(fd)
            self.kill()

    def kill(self) -> None:
        """End everything at once, by pid, without asking; never fails."""
        process, self._process = self._process, None
        if process is None:
            return
        family = open_pidfds([*descendants(process.pid), process.pid])
        for fd in family.values():
            try:
                signal.pidfd_send_signal(fd, signal.SIGKILL)
            except ProcessLookupError:
                pass
            finally:
                os.close(fd)
        process.wait()
        if self._reader is not None:
            self._reader.join(TIMEOUT_S)
        if process.stdout is not None and self._reader is not None and not self._reader.is_alive():
            process.stdout.close()

    def close(self) -> None:
        """Kill what is left and remove the directory."""
        self.kill()
        shutil.rmtree(self.dir, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if kind is None:
                self.stop()
        finally:
            self.close()

    # -- log

    def _read(self) -> None:
        assert self._process is not None and self._process.stdout is not None
        for raw in self._process.stdout:
            line = raw.decode("utf-8", "backslashreplace").rstrip("\n")
            try:
                record = json.loads(line)
            except ValueError:
                record = None
            with self._news:
                self.lines.append(line)
                if isinstance(record, dict):
                    self.records.append(record)
                else:
                    self.garbage.append(line)
                self._news.notify_all()
        with self._news:
            self._eof = True
            self._news.notify_all()

    def mark(self) -> int:
        """The place in the log reached so far, for `wait_record(after=…)`."""
        with self._news:
            return len(self.records)

    def find_records(self, *, after: int = 0, **fields: Any) -> list[Record]:
        """Records that match so far: a value by equality, a compiled pattern by search, a function by its result.

        A record may come after the answer to what it tells of: the log is quiet for a moment first, if it ever is.
        """
        deadline = time.monotonic() + 1
        with self._news:
            while not self._eof and time.monotonic() < deadline and self._news.wait(0.05):
                pass
            return [record for record in self.records[after:] if matches(record, fields)]

    def wait_records(self, count: int, *, after: int = 0, timeout: float = TIMEOUT_S, **fields: Any) -> list[Record]:
        """The first `count` records that match, in order."""
        deadline = time.monotonic() + timeout
        with self._news:
            while True:
                found = [record for record in self.records[after:] if matches(record, fields)]
                if len(found) >= count:
                    return found[:count]
                left = deadline - time.monotonic()
                if self._eof or left <= 0:
                    why = "superd's log has ended" if self._eof else f"not within {timeout} s"
                    raise AssertionError(f"{len(found)} of {count} records with {fields}: {why}\n{self.log()}")
                self._news.wait(left)

    def wait_record(self, *, after: int = 0, timeout: float = TIMEOUT_S, **fields: Any) -> Record:
        """The first record that matches (see find_records), waiting for it."""
        return self.wait_records(1, after=after, timeout=timeout, **fields)[0]

    def wait_line(self, pattern: re.Pattern[str], *, timeout: float = TIMEOUT_S) -> str:
        """The first line of the log, of whatever form, in which the pattern is found."""
        deadline = time.monotonic() + timeout
        with self._news:
            while True:
                for line in self.lines:
                    if pattern.search(line):
                        return line
                left = deadline - time.monotonic()
                assert left > 0 and not self._eof, f"no line with {pattern.pattern!r}\n{self.log()}"
                self._news.wait(left)

    def log(self) -> str:
        """The last 200 lines, as they came."""
        with self._news:
            return "\n".join(self.lines[-200:])

    # -- clients

    def listening(self, service: str, socket_index: int = 0) -> str:
        """The canonical address of the n-th socket of a service, as superd bound it (port 0 resolved)."""
        addresses: list[str] = []
        for record in self.wait_records(socket_index + 1, event="listening", service=service):
            addresses.append(record["address"])
        return addresses[socket_index]

    def address(self, service: str, socket_index: int = 0) -> tuple[str, int]:
        """(host, port) for a client; the loopback address where superd listens on every address."""
        scheme, _, rest = self.listening(service, socket_index).partition(":")
        host, _, port = rest.rpartition(":")
        return host.strip("[]") or ("::1" if scheme.endswith("6") else "127.0.0.1"), int(port)

    def connect(self, service: str, socket_index: int = 0, *, host: str | None = None) -> socket.socket:
        """A client of a stream or seqpacket socket, with a timeout. `host` for a socket on every address."""
        text = self.listening(service, socket_index)
        scheme, _, path = text.partition(":")
        if scheme.startswith("unix"):
            return connect_unix(scheme, path, TIMEOUT_S)
        where = self.address(service, socket_index)
        return socket.create_connection((host or where[0], where[1]), timeout=TIMEOUT_S)

    # -- control

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The reply of a method of io.superd.Control. Waits for the control socket, which comes after `ready`."""
        deadline = time.monotonic() + TIMEOUT_S
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(TIMEOUT_S)
            while True:
                try:
                    client.connect(self.control.removeprefix("unix:"))
                    break
                except (FileNotFoundError, NotADirectoryError, ConnectionRefusedError):
                    assert time.monotonic() < deadline, f"no control socket\n{self.log()}"
                    select.select([], [], [], 0.01)  # nothing announces it
            client.sendall(
                json.dumps({"method": f"io.superd.Control.{method}", "parameters": parameters}).encode() + b"\0"
            )
            data = b""
            while not data.endswith(b"\0"):
                part = client.recv(65536)
                assert part, f"the control socket was closed after {data!r}"
                data += part
            client.shutdown(socket.SHUT_WR)
            assert client.recv(1) == b""  # it has let go of us
        reply: dict[str, Any] = json.loads(data[:-1])
        assert "error" not in reply, reply
        return reply["parameters"]  # type: ignore[no-any-return]

    def status(self, service: str) -> dict[str, Any]:
        """Its row of `superctl list`."""
        return self.call("List", names=[service])["services"][0]  # type: ignore[no-any-return]

    def wait_for(self, service: str, condition: str) -> None:
        """Until the service is "ready", "active", "stopped" or "idle"."""
        result = self.call("Wait", names=[service], **{"for": condition})["results"][0]
        assert result["ok"], result

    # -- processes

    @property
    def manager(self) -> int:
        (pid,) = self.pids()["superd-manager"]
        return pid

    def kill_role(self, role: str, signo: int = signal.SIGKILL) -> int:
        """Signal the only process of a role; its pid."""
        (pid,) = self.pids()[role]
        os.kill(pid, signo)
        if signo == signal.SIGKILL:
            wait_gone(pid)
        return pid

    def wait_exit(self, *, timeout: float = TIMEOUT_S) -> int:
        """Its exit status, when it ends by itself or by a signal that was sent."""
        assert self._process is not None
        code = self._process.wait(timeout)
        self.kill()
        return code

    def descriptors(self) -> dict[str, set[tuple[str, ...]]]:
        """What each role has open, channels to spawners not counted: they come and go."""
        found: dict[str, set[tuple[str, ...]]] = {}
        pids = self.pids()
        for role, channels in zip(ROLES, (2, 1, 0), strict=True):
            for pid in pids[role]:
                names = open_fds(pid)
                for _ in range(channels * len(pids["superd-spawner"])):
                    names.remove("socket")
                found.setdefault(role, set()).add(tuple(names))
        return found

    def roles(self) -> list[int]:
        """Pids of the keeper, the manager and the spawners."""
        return [pid for pids in self.pids().values() for pid in pids]

    def pids(self) -> dict[str, list[int]]:
        """Role name -> pids, of the keeper and what is below it."""
        found: dict[str, list[int]] = {role: [] for role in ROLES}
        for pid in [self.pid, *descendants(self.pid)]:
            if (name := comm(pid)) in found:
                found[name].append(pid)
        return found

    def services(self) -> list[int]:
        """Processes below the keeper that are none of superd's roles."""
        return [pid for pid in descendants(self.pid) if comm(pid) not in ROLES]


def toml(**keys: Any) -> str:
    """A service file: `pass_="stdio"` is the key `pass`, a dict an inline table."""
    return "".join(f"{name.rstrip('_')} = {_value(value)}\n" for name, value in keys.items())


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name} = {_value(one)}" for name, one in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_value, value)) + "]"
    return json.dumps(str(value) if isinstance(value, Path) else value)


def matches(record: Record, fields: dict[str, Any]) -> bool:
    for name, wanted in fields.items():
        if name not in record:
            return False
        value = record[name]
        if isinstance(wanted, re.Pattern):
            if not wanted.search(str(value)):
                return False
        elif callable(wanted):
            if not wanted(value):
                return False
        elif value != wanted:
            return False
    return True


def read_all(client: socket.socket) -> bytes:
    """Everything up to end of file."""
    parts = []
    while part := client.recv(65536):
        parts.append(part)
    return b"".join(parts)


def fetch(client: socket.socket) -> bytes:
    """Say nothing, take everything, close."""
    with client:
        return read_all(client)


def ask(client: socket.socket, request: bytes) -> bytes:
    """Send, say that that was all, take the whole answer, close."""
    with client:
        client.sendall(request)
        client.shutdown(socket.SHUT_WR)
        return read_all(client)


def comm(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().rstrip("\n")
    except OSError:
        return ""


def descendants(root: int) -> list[int]:
    """Pids below `root`, zombies not counted; a subreaper keeps what has daemonised among them."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                fields = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()
            except OSError:  # it ended meanwhile
                continue
            if fields[0] != "Z":
                children.setdefault(int(fields[1]), []).append(int(entry))
    found, todo = [], [root]
    while todo:
        below = children.get(todo.pop(), [])
        found += below
        todo += below
    return found


def open_pidfds(pids: Sequence[int]) -> dict[int, int]:
    """pid -> pidfd of those that still are; the caller closes them."""
    found = {}
    for pid in pids:
        try:
            found[pid] = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
    return found


def survivors(family: dict[int, int]) -> list[str]:
    """Those of `family` that have not ended (a pidfd is readable when its process has, pidfd_open(2))."""
    poll = select.poll()
    for fd in family.values():
        poll.register(fd, select.POLLIN)
    gone = {fd for fd, _ in poll.poll(0)}
    return [f"{pid} ({comm(pid)})" for pid, fd in family.items() if fd not in gone]


def wait_gone(pid: int, timeout: float = TIMEOUT_S) -> None:
    """Return when the process has ended (at once if it is no more)."""
    for fd in open_pidfds([pid]).values():
        try:
            if not select.select([fd], [], [], timeout)[0]:
                raise AssertionError(f"{pid} ({comm(pid)}) still runs after {timeout} s")
        finally:
            os.close(fd)


def tree(root: int) -> list[str]:
    return [f"{pid} ({comm(pid)})" for pid in [root, *descendants(root)]]


def open_fds(pid: int) -> list[str]:
    """What a process has open, sorted: `socket:[…]` and the like without their numbers."""
    found = []
    for fd in os.listdir(f"/proc/{pid}/fd"):
        try:
            found.append(re.sub(r":\[\d+\]", "", os.readlink(f"/proc/{pid}/fd/{fd}")))
        except OSError:
            continue  # closed meanwhile
    return sorted(found)


def cpu_s(pid: int) -> float:
    """CPU time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def eventually(find: Callable[[], Any], wanted: Any) -> None:
    """Wait until `find()` gives `wanted`: for what announces itself to nobody, like a closed fd of another process."""
    deadline = time.monotonic() + TIMEOUT_S
    while (found := find()) != wanted:
        assert time.monotonic() < deadline, f"still {found}, not {wanted}"
        select.select([], [], [], 0.01)


def cpu_share(pid: int, interval_s: float = 1.0) -> float:
    """CPU time over real time. The one place that lets time pass: a rate needs an interval."""
    before = cpu_s(pid)
    select.select([], [], [], interval_s)
    return (cpu_s(pid) - before) / interval_s


@contextmanager
def no_free_fd(pid: int, spare: int = 0) -> Iterator[None]:
    """Take all fds but `spare` from a process: its RLIMIT_NOFILE becomes the lowest free number."""
    taken = {int(name) for name in os.listdir(f"/proc/{pid}/fd")}
    free = [number for number in range(max(taken) + spare + 2) if number not in taken]
    soft, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (free[spare], hard))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (soft, hard))


@contextmanager
def injected(strace: str, pid: int, *expressions: str) -> Iterator[None]:
    """System calls of a process fail as strace(1), `-e inject=`, says; the calls are those of the expressions."""
    calls = ",".join(expression.partition(":")[0] for expression in expressions)
    argv = [strace, "-f", "-p", str(pid), "-o", "/dev/null", "-e", f"trace={calls}"]
    for expression in expressions:
        argv += ["-e", f"inject={expression}"]
    tracer = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert tracer.stderr is not None
    try:
        line = tracer.stderr.readline()
        assert "attached" in line, line
        yield
    finally:
        tracer.terminate()
        tracer.communicate(timeout=TIMEOUT_S)
