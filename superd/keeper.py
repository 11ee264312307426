"""Role one: the process that is started. PID 1 in a container, else a child subreaper.

It forks the other two roles and the services that are started once, reaps everything, forwards signals, and
holds what must outlive a manager: fds under names, the table of its children, one snapshot it does not read.
It parses no configuration and reads no network. Before the manager says "up" a failure ends superd with a message;
afterwards nothing does (STYLE.md, two phases): a manager that dies is followed by another, which is handed all of it.

The roles are forked without exec. They share the interpreter's pages with the keeper (PSS of a spawner: 7.3 MB,
9.2 MB when executed) and a manager is back in the time that importing trio takes. The keeper is single-threaded, so a
forked copy is whole; each role closes what is not its own first (`_only`).
"""

from __future__ import annotations

import contextlib
import gc
import os
import select
import signal
import socket
import sys
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any, Literal, NoReturn

from superd.core import messages, records
from superd.core.plan import Program
from superd.system import children, context, fdpass, process

# Everything but what the kernel sends for the process's own faults (H8), STOP and KILL, and CHLD.
_FORWARDED = ("TERM", "INT", "HUP", "QUIT", "USR1", "USR2", "WINCH", "CONT", "TSTP", "ALRM")
_FINAL = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)
_RESTART_DELAY_MAX_S = 5.0
_MANAGER_STABLE_S = 0.2  # a manager that served this long is followed at once: clients wait
_STABLE_S = 1.0  # so is a spawner
_QUICK_ENDS = 5
_LAST_WORD_S = 5.0
_LAST_WAIT_S = 1.0
_SWEEP_S = 10.0  # reap at least this often, whatever became of SIGCHLD (G2)
_BATCH = 200  # rows or fds to a message


@dataclass(slots=True)
class _Child:
    """A service process the keeper forked; kept until the manager forgets it, ended or not."""

    pid: int
    tag: Any  # the manager's own words
    log: list[int]  # read end of its log pipe, or empty
    started: float
    status: int | None = None
    failure: list[Any] | None = None  # stage, errno, detail, if it never ran its program
    report: int | None = None  # until its exec is decided
    early: list[tuple[int, bool]] = field(default_factory=list)  # signals until then: it may have no group yet


@dataclass(slots=True)
class _Spawner:
    """channel: the spawner's own end, kept so that what is queued for it survives it."""

    id: int
    context: Any
    channel: socket.socket
    born: float
    quick_ends: int = 0  # in a row, of those before it


@dataclass(slots=True)
class Options:
    """The command line, as far as roles need it (superd(8))."""

    config: tuple[str, ...] = ()
    strict: bool = False
    log: Literal["text", "logfmt", "json"] | None = None
    control: str | None = None


class Keeper:
    def __init__(self, options: Options, inherited: dict[str, list[int]], nofile: tuple[int, int]) -> None:
        self.options = options
        self.nofile = nofile
        self.held: dict[str, list[int]] = {f"inherited:{name}": fds for name, fds in inherited.items()}
        self.children: dict[int, _Child] = {}  # by id
        self.ids: dict[int, int] = {}  # pid -> id
        self.spawners: dict[int, _Spawner] = {}  # by pid
        self.recent: deque[tuple[int, int]] = deque(maxlen=256)  # orphans that have ended
        self.snapshot: list[int] = []
        self.manager = 0
        self.channel: socket.socket | None = None
        self.generation = 0
        self.up = False  # the first manager came up: from now on nothing ends superd but an order
        self.manager_up_at: float | None = None  # when this one did
        self.exit_status: int | None = None
        self.restart_at: float | None = None
        self.delay_s = 0.0
        self.signals: list[int] = []  # that no manager has taken yet
        self.form: str = options.log or "text"
        self.stop_signal = 0  # superd was told to stop
        self.orphans = 0
        self.poll = select.poll()
        self.wakeup = -1

    # -- life

    def run(self) -> int:
        """Until the manager says exit; returns the exit status."""
        self.wakeup, handler_end = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.set_wakeup_fd(handler_end, warn_on_full_buffer=False)
        for name in (*_FORWARDED, "CHLD", "PIPE"):
            signal.signal(getattr(signal, f"SIG{name}"), self._noted)
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
        self.poll.register(self.wakeup, select.POLLIN)
        gc.freeze()  # what is here now stays: a collection in a forked role must not copy its pages
        self._start_manager()
        while self.exit_status is None:
            for fd, _ in self.poll.poll(self._timeout_ms()):
                if fd == self.wakeup:
                    with contextlib.suppress(BlockingIOError):
                        os.read(self.wakeup, 4096)
                elif self.channel is not None and fd == self.channel.fileno():
                    self._take()
                else:
                    self._decided(fd)
            self._reap()
            self._forward()
            if self.restart_at is not None and time.monotonic() >= self.restart_at:
                self._start_manager()
        for pid in self.spawners:
            children.signal_child(pid, signal.SIGTERM, group=False)
        self._bury()
        return self.exit_status

    def _bury(self) -> None:
        """Whoever sees superd end finds nothing of it left."""
        left = {self.manager, *self.spawners} - {0}
        deadline = time.monotonic() + _LAST_WAIT_S
        while True:
            left -= {pid for pid, _ in children.reap()}
            rest = deadline - time.monotonic()
            if not left or rest <= 0:
                return
            if select.select([self.wakeup], [], [], rest)[0]:
                os.read(self.wakeup, 4096)

    def _noted(self, signo: int, _: object) -> None:
        if signo not in (signal.SIGCHLD, signal.SIGPIPE) and signo not in self.signals:
            self.signals.append(signo)

    def _timeout_ms(self) -> float:
        if self.restart_at is not None:
            return max(0.0, self.restart_at - time.monotonic()) * 1000
        return _SWEEP_S * 1000

    def _start_manager(self) -> None:
        self.restart_at = None
        self.manager_up_at = None
        try:
            ours, theirs = fdpass.channel()
        except OSError as error:
            return self._manager_gone(f"cannot make a channel to a manager: {error}")
        self.generation += 1
        try:
            pid = os.fork()
        except OSError as error:
            ours.close()
            theirs.close()
            self._manager_gone(f"cannot fork a manager: {error}")
            return
        if pid == 0:
            self._only(theirs.fileno())
            run_manager(theirs, self.options, self.nofile)
        theirs.close()
        ours.setblocking(False)
        self.manager, self.channel = pid, ours
        self.poll.register(ours, select.POLLIN)
        self._restore()

    def _only(self, *keep: int) -> None:
        """In a forked role: close everything but stdio and `keep`; signals as in a new process."""
        signal.set_wakeup_fd(-1)
        process.reset_signals()
        last = 2
        for fd in sorted(keep):
            os.closerange(last + 1, fd)
            last = fd
        os.closerange(last + 1, 1 << 20)

    def _restore(self) -> None:
        """Hand everything to a new manager. It reads until "go"."""
        rows = [(name, fd) for name, fds in self.held.items() for fd in fds]
        for i in range(0, len(rows), _BATCH):
            part = rows[i : i + _BATCH]
            self._send("restore", [fd for _, fd in part], names=[name for name, _ in part])
        table = list(self.children.items())
        for i in range(0, len(table), _BATCH):
            listed = [
                {"id": number, "pid": c.pid, "tag": c.tag, "started": c.started, "status": c.status,
                 "failure": c.failure, "log": bool(c.log),
                 "running": c.report is None}
                for number, c in table[i : i + _BATCH]
            ]  # fmt: skip
            self._send("children", [fd for _, c in table[i : i + _BATCH] for fd in c.log], rows=listed)
        self._send(
            "go", self.snapshot, generation=self.generation, snapshot=bool(self.snapshot), up=self.up,
            orphans=self.orphans, spawners=[[one.id, pid, one.context] for pid, one in self.spawners.items()],
        )  # fmt: skip

    def _send(self, kind: str, fds: list[int] | None = None, **fields: Any) -> None:
        """Blocking for as long as the manager needs to read; a dead one is noticed when it is reaped."""
        if self.channel is None:
            return
        data = messages.pack(kind, **fields)
        deadline = time.monotonic() + 5
        writable = select.poll()  # not select(2): its fd may be above 1023
        writable.register(self.channel, select.POLLOUT)
        while time.monotonic() < deadline:
            try:
                return fdpass.send(self.channel, data, fds or [])
            except BlockingIOError:
                writable.poll(1000)
            except OSError:
                return

    def _manager_gone(self, reason: str) -> None:
        if self.channel is not None:
            self.poll.unregister(self.channel)
            self.channel.close()
            self.channel = None
        self.manager = 0
        if self.exit_status is not None:
            return
        if not self.up:
            complain(f"cannot start: {reason}", self.form)
            self.exit_status = 1
            return
        now = time.monotonic()
        if self.manager_up_at is not None and now - self.manager_up_at > _MANAGER_STABLE_S:
            self.delay_s = 0.0  # it worked: clients wait in the backlog, so not a moment more than needed
        else:
            self.delay_s = min(max(0.1, self.delay_s * 2), _RESTART_DELAY_MAX_S)
        self.manager_up_at = None
        if self.stop_signal and self.stop_signal not in self.signals:
            self.signals.append(self.stop_signal)  # the next one is to go on with what it was about
        self.restart_at = now + self.delay_s
        complain(f"{reason}; starting another in {self.delay_s:.1f} s, connections wait", self.form)

    # -- what happened

    def _reap(self) -> None:
        for pid, status in children.reap():
            if pid == self.manager:
                self._drain_channel()
                self._manager_gone(f"the manager (pid {pid}) {describe(status)}")
            elif pid in self.spawners:
                self._spawner_ended(self.spawners.pop(pid), pid, status)
            elif pid in self.ids:
                number = self.ids.pop(pid)
                child = self.children[number]
                if child.report is not None:
                    self._decided(child.report)  # "started" or "failed" comes before "exited"
                child.status = status
                self._send("exited", id=number, pid=pid, status=status)
            else:
                self.orphans += 1
                self.recent.append((pid, status))

    def _drain_channel(self) -> None:
        """What a manager said before it died still counts: it may have been its exit, or fds to keep."""
        while self.channel is not None and self._take():
            pass

    def _forward(self) -> None:
        if self.channel is not None and self.signals:
            taken, self.signals = self.signals, []
            for signo in taken:
                self._send("signal", signo=signo)
                if signo in _FINAL:
                    self.stop_signal = signo

    def _decided(self, fd: int) -> None:
        """A child has executed its program, or could not."""
        self.poll.unregister(fd)
        for number, child in self.children.items():
            if child.report == fd:
                child.report = None
                failure = children.start_failure(fd)
                if failure is None:
                    self._send("started", id=number, pid=child.pid)
                    for signo, group in child.early if child.pid in self.ids else ():
                        with contextlib.suppress(PermissionError):  # it has changed its uid
                            children.signal_child(child.pid, signo, group=group)
                else:
                    child.failure = [failure.stage, failure.errno, failure.detail]
                    self._send("failed", id=number, stage=failure.stage, errno=failure.errno, detail=failure.detail)
                return
        os.close(fd)

    # -- what the manager wants

    def _take(self) -> bool:
        """One message of the manager's; False when there is none."""
        assert self.channel is not None
        try:
            data, fds = fdpass.receive(self.channel)
        except BlockingIOError:
            return False
        except fdpass.CutMessage as error:
            complain(f"keeper: {error}", self.form)
            with contextlib.suppress(ValueError, KeyError):  # whoever waits for a start must be told
                order = messages.unpack(error.data)
                if order["kind"] == "start":
                    self._send("failed", id=order["id"], stage="descriptors", errno=error.errno, detail="")
            return True
        except OSError as error:
            complain(f"keeper: {error}", self.form)
            return True
        if not data:
            self.poll.unregister(self.channel)  # the reaper will tell
            self.channel.close()
            self.channel = None
            return False
        try:
            order = messages.unpack(data)
            if order["kind"] not in _TAKE_FDS:
                fdpass.close_all(fds)
            getattr(self, _ORDERS[order["kind"]])(order, fds)
        except (
            LookupError, ValueError, TypeError, AttributeError, ArithmeticError, RecursionError, OSError,
            children.StartError,
        ) as error:  # fmt: skip
            complain(f"keeper: cannot do {data[:80]!r}: {error!r}", self.form)
            fdpass.close_all(fds)
        return True

    def _store(self, order: dict[str, Any], fds: list[int]) -> None:
        self._drop(order, [])
        self.held[order["name"]] = fds

    def _drop(self, order: dict[str, Any], fds: list[int]) -> None:
        fdpass.close_all(self.held.pop(order["name"], []))
        fdpass.close_all(fds)

    def _deposit(self, order: dict[str, Any], fds: list[int]) -> None:
        fdpass.close_all(self.snapshot)
        self.snapshot = fds

    def _start(self, order: dict[str, Any], fds: list[int]) -> None:
        """Start a service's process. fds: what it gets, then write and read end of its log pipe if it has one."""
        number = order["id"]
        program = Program.from_json(order["program"])
        wanted = messages.context_from_json(order["context"])
        log = [fds.pop(), fds.pop()] if order["log"] else []  # read end, write end

        def prepare() -> tuple[dict[str, str], int | None]:
            inode = process.pidfd_inode()
            signal.set_wakeup_fd(-1)
            process.reset_signals()
            try:
                entered = context.enter(wanted, nofile=self.nofile)
            except context.ContextError as error:
                raise children.StartError(error.stage, error.errno or 0, error.detail) from None
            return context.user_environment(entered), inode

        try:
            pid, report = children.fork_exec(program, {}, fds, log[1] if log else None, prepare)
        except children.StartError as failure:
            fdpass.close_all(log)
            self._send("failed", id=number, stage=failure.stage, errno=failure.errno, detail=failure.detail)
        else:
            self.children[number] = _Child(pid, order["tag"], log[:1], time.monotonic(), report=report)
            self.ids[pid] = number
            self.poll.register(report, select.POLLIN)
            fdpass.close_all(log[1:])
        fdpass.close_all(fds)

    def _adopt(self, order: dict[str, Any], fds: list[int]) -> None:
        """Own a process whose spawner was killed, like one that was started here. fds: its log's read end."""
        number, pid = order["id"], order["pid"]
        status = next((status for ended, status in self.recent if ended == pid), None)
        if status is None:
            try:
                os.kill(pid, 0)
            except ProcessLookupError:
                status = messages.UNKNOWN_STATUS
            except PermissionError:
                pass
        child = self.children[number] = _Child(pid, order["tag"], list(fds), order["started"])
        if status is None:
            self.ids[pid] = number
        else:
            child.status = status
            self._send("exited", id=number, pid=pid, status=status)

    def _forget(self, order: dict[str, Any], fds: list[int]) -> None:
        child = self.children.get(order["id"])
        if child is not None and child.status is not None:
            del self.children[order["id"]]
            fdpass.close_all(child.log)

    def _signal(self, order: dict[str, Any], fds: list[int]) -> None:
        child = self.children.get(order["id"])
        signo, group = int(order["signo"]), bool(order["group"])
        if child is None or child.status is not None or not 0 < signo < signal.NSIG:
            return
        if child.report is not None and signo != signal.SIGKILL:
            child.early.append((signo, group))
        else:
            children.signal_child(child.pid, signo, group=group and child.report is None)

    def _spawner(self, order: dict[str, Any], fds: list[int]) -> None:
        number = order["id"]
        messages.context_from_json(order["context"])  # what is wrong with it must not be found after the fork
        try:
            ours, theirs = fdpass.channel()
        except OSError as error:
            return self._send("spawner-gone", id=number, pid=0, status=0, errno=error.errno)
        pid = self._fork_spawner(number, order["context"], theirs)
        if pid is None:
            ours.close()
            theirs.close()
            return
        self.held[f"spawner:{number}"] = [ours.detach()]
        self._send("spawner", self.held[f"spawner:{number}"], id=number, pid=pid)

    def _fork_spawner(self, number: int, wanted: Any, channel: socket.socket) -> int | None:
        try:
            pid = os.fork()
        except OSError as error:
            self._send("spawner-gone", id=number, pid=0, status=0, errno=error.errno)
            return None
        if pid == 0:
            self._only(channel.fileno())
            run_spawner(channel, messages.context_from_json(wanted), self.nofile)
        self.spawners[pid] = _Spawner(number, wanted, channel, time.monotonic())
        return pid

    def _spawner_ended(self, ended: _Spawner, pid: int, status: int) -> None:
        """One that was killed is followed by another on the same channel: connections that were queued for it are
        started all the same. One that went by itself is not, nor the sixth in a row that was killed at once."""
        by_itself = os.WIFEXITED(status) and os.WEXITSTATUS(status) in (0, 1)
        quick_ends = ended.quick_ends + 1 if time.monotonic() - ended.born < _STABLE_S else 0
        if not by_itself and quick_ends <= _QUICK_ENDS and self.exit_status is None:
            again = self._fork_spawner(ended.id, ended.context, ended.channel)
            if again is not None:
                self.spawners[again].quick_ends = quick_ends
                return self._send("spawner-replaced", id=ended.id, pid=again, was=pid)
        ended.channel.close()
        for fd in self.held.pop(f"spawner:{ended.id}", []):
            os.close(fd)
        self._send("spawner-gone", id=ended.id, pid=pid, status=status)

    def _is_up(self, order: dict[str, Any], fds: list[int]) -> None:
        self.up = True
        self.manager_up_at = time.monotonic()
        self.form = str(order.get("form", self.form))

    def _exit(self, order: dict[str, Any], fds: list[int]) -> None:
        self.exit_status = int(order["status"])

    def _notify(self, order: dict[str, Any], fds: list[int]) -> None:
        """Tell our own manager, from the pid that it knows. The answer, if any, is not ours to wait for."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock, contextlib.suppress(OSError):
            address = order["address"]
            sock.setblocking(False)
            sock.sendto(order["text"].encode(), "\0" + address[1:] if address.startswith("@") else address)


# One static table: what is not in it cannot be asked for (J1).
_ORDERS = {
    "store": "_store", "drop": "_drop", "snapshot": "_deposit", "start": "_start", "adopt": "_adopt",
    "forget": "_forget",
    "signal": "_signal", "spawner": "_spawner", "up": "_is_up", "exit": "_exit", "notify": "_notify",
}  # fmt: skip
_TAKE_FDS = ("store", "snapshot", "start", "adopt")


def describe(status: int) -> str:
    code = os.waitstatus_to_exitcode(status)
    if code >= 0:
        return f"exited with status {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:  # a real-time signal has no name there
        return f"was killed by signal {-code}"


def complain(text: str, form: str = "text") -> None:
    """One line on stderr in the log's form; stderr may be gone or full, and then nobody hears it."""
    line = records.FORMATTERS[form](time.time(), "warning", None, "message", None, None, None, text, {})
    with contextlib.suppress(OSError):
        os.write(2, line.encode(errors="replace") + b"\n")


def run_manager(channel: socket.socket, options: Options, nofile: tuple[int, int]) -> NoReturn:
    """In the forked child. Imported here: only this role needs trio, and the keeper never pays for it."""
    status = 1
    try:
        from superd.manager import main

        status = main.main(channel, options, nofile)
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
    except BaseException:  # boundary: never return into the keeper's loop
        sys.excepthook(*sys.exc_info())
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.flush()
        os._exit(status)


def run_spawner(channel: socket.socket, wanted: Any, nofile: tuple[int, int]) -> NoReturn:
    try:
        from superd import spawner

        spawner.main(channel, wanted, nofile)
    except BaseException:  # boundary: never return into the keeper's loop
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(1)


def run(options: Options) -> int:
    """Become the keeper; returns superd's exit status. Called once, first thing, by the command line."""
    from superd.system import sockets

    inherited, _ = sockets.inherited_sockets(os.environ, os.getpid())
    process.sanitize_inherited_fds([fd for fds in inherited.values() for fd in fds])
    for name in ("LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES", "LISTEN_PIDFDID"):
        os.environ.pop(name, None)
    process.set_name("superd-keeper")
    if not process.become_subreaper() and os.getpid() != 1:
        complain("cannot become a subreaper; orphans of services will go to init", options.log or "text")
    nofile = process.raise_nofile()
    os.umask(0o022)
    with contextlib.suppress(OSError):
        os.chdir("/")
    return Keeper(options, inherited, nofile).run()
