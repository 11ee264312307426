"""Role one: the process that is started. PID 1 in a container, else a child subreaper.

It forks the other two roles and the services that are started once, reaps everything, forwards signals, and
holds what must outlive a manager: fds under names, the table of its children, one snapshot it does not read.
It parses no configuration and reads no network. Before the manager says "up" a failure ends superd with a message;
afterwards nothing does (STYLE.md, two phases): a manager that dies is followed by another, which is handed all of it.

The roles are forked without exec. They share the interpreter's pages with the keeper (PSS of a spawner: 7.3 MB,
9.2 MB when executed) and a manager is back in the time that importing trio takes. The keeper is single-threaded, so a
forked copy is whole; each role closes what is not its own first (`_only`). The spawner's code is read when superd
starts, so that none of a version that is installed meanwhile gets beside what runs.
"""

from __future__ import annotations

import contextlib
import gc
import os
import resource
import select
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from dataclasses import fields as dataclass_fields
from importlib import import_module
from typing import Any, Literal, NoReturn

from superd import __version__, init, spawner
from superd.core import messages, records
from superd.core.plan import Program
from superd.system import cgroup, children, context, fdpass, process, succession

# What a manager is told of. Everything else that can be caught is, and means nothing without a main command.
_FORWARDED = ("TERM", "INT", "HUP", "QUIT", "USR1", "USR2", "WINCH", "CONT", "TSTP", "ALRM")
_MANAGERS = tuple(getattr(signal, f"SIG{name}") for name in _FORWARDED)
_RESTART_DELAY_MAX_S = 5.0
_STOPS_BY_MANAGERS = 3  # that end before superd has stopped
_MANAGER_STABLE_S = 0.2  # a manager that served this long is followed at once: clients wait
_STABLE_S = 1.0  # so is a spawner
_QUICK_ENDS = 5
_LEAVE_S = 5.0  # for a manager that ends so that superd can become another version
_LAST_WAIT_S = 1.0
_FILE_SIZE_MIN = 1 << 20
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
    cgroup: str | None = None  # that it is in
    environment: list[dict[str, str]] | None = None  # that a handler is imported with: below and above its user's


@dataclass(frozen=True, slots=True)
class Trial:
    """`superd run`. source: what its file would be, if there were one (a core.schema.SourceFile)."""

    source: Any
    once: bool = False
    print_address: bool = False
    trace: bool = False


@dataclass(slots=True)
class Options:
    """The command line, as far as roles need it (superd(8))."""

    config: tuple[str, ...] = ()
    strict: bool = False
    log: Literal["text", "logfmt", "json"] | None = None
    control: str | None = None
    command: tuple[str, ...] = ()
    single_child: bool = False
    rewrite: Mapping[int, int] = field(default_factory=dict)
    drain_timeout_s: float | None = None
    watch: bool = True
    trial: Trial | None = None

    @property
    def drain_s(self) -> float:
        """How long live connections may go on when superd stops."""
        if self.drain_timeout_s is not None:
            return self.drain_timeout_s
        return init.DRAIN_S if self.command else 0.0


class Keeper:
    def __init__(
        self, options: Options, inherited: dict[str, list[int]], nofile: tuple[int, int],
        command: init.Command | None = None,
    ) -> None:  # fmt: skip
        """command: the main command, forked and not released."""
        self.options = options
        self.command = command
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
        self.ends_while_stopping = 0  # of managers
        self.orphans = 0
        self.unsent: deque[tuple[bytes, list[int]]] = deque()  # reports for a manager that does not read
        self.unsent_at: float | None = None  # when to try that again, where nothing tells that there is room
        self.leave_by: float | None = None  # for an upgrade: when the manager that asked for it has to have ended
        self.poll = select.poll()

    # -- life

    def _ready(self) -> list[tuple[int, int]]:
        """(fd, events) of what is; nothing, after a moment, when poll(2) has no memory: the keeper must not end."""
        try:
            return self.poll.poll(self._timeout_ms())
        except OSError:
            time.sleep(0.1)
            return []

    def run(self) -> int:
        """Until the manager says exit; returns the exit status."""
        pipe = init.SignalPipe(init.CATCHABLE if self.command is None else self.command.signals)
        self.poll.register(pipe.reader, select.POLLIN)
        gc.freeze()  # what is here now stays: a collection in a forked role must not copy its pages
        self._start_manager()
        self._reap()  # after an upgrade: whose SIGCHLD came before
        while self.exit_status is None:
            for fd, events in self._ready():
                if fd == pipe.reader:
                    for signo in pipe.read():
                        self._noted(signo)
                elif self.channel is not None and fd == self.channel.fileno():
                    if events & select.POLLOUT:
                        self._send_rest()
                    if events & ~select.POLLOUT:
                        self._take()
                else:
                    self._decided(fd)
            if self.command is not None:
                self.command.look()
            self._reap()
            self._forward()
            if self.leave_by is not None:
                self._upgrade_when_alone(pipe)
            if self.unsent_at is not None and time.monotonic() >= self.unsent_at:
                self._send_rest()
            if self.restart_at is not None and time.monotonic() >= self.restart_at:
                self._start_manager()
        for pid in self.spawners:
            children.signal_child(pid, signal.SIGTERM, group=False)
        self._bury(pipe)
        if self.exit_status == 0 and self.command is not None and self.command.status is not None:
            return self.command.status
        return self.exit_status

    def _bury(self, pipe: init.SignalPipe) -> None:
        """Whoever sees superd end finds nothing of it left."""
        left = {self.manager, *self.spawners} - {0}
        if self.command is not None and not self.command.released:
            self.command.cancel()
            left.add(self.command.pid)
        deadline = time.monotonic() + _LAST_WAIT_S
        while True:
            left -= {pid for pid, _ in children.reap()}
            rest = deadline - time.monotonic()
            if not left or rest <= 0:
                return
            if select.select([pipe.reader], [], [], rest)[0]:
                pipe.read()

    def _noted(self, signo: int) -> None:
        if self.command is not None and self.command.running:
            if signo != signal.SIGCHLD:
                self.command.forward(signo)
        elif signo in _MANAGERS and signo not in self.signals:
            self.signals.append(signo)

    def _timeout_ms(self) -> float:
        due = self.leave_by if self.restart_at is None else self.restart_at
        if self.unsent_at is not None:
            due = self.unsent_at if due is None else min(due, self.unsent_at)
        if due is not None:
            return max(0.0, due - time.monotonic()) * 1000
        return _SWEEP_S * 1000

    def _start_manager(self) -> None:
        self.restart_at = None
        self.manager_up_at = None
        try:
            ours, theirs = fdpass.channel()
        except OSError as error:
            return self._manager_gone(f"cannot make a channel to a manager: {init.reason(error)}")
        self.generation += 1
        try:
            pid = os.fork()
        except OSError as error:
            ours.close()
            theirs.close()
            self._manager_gone(f"cannot fork a manager: {init.reason(error)}")
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
        if self.command is not None and self.command.status is not None:
            self._send("command-ended", status=self.command.status)

    def _send(self, kind: str, fds: list[int] | None = None, **fields: Any) -> None:
        """At once, or when the manager reads again; a dead one is noticed when it is reaped.

        What a manager that stands still is owed waits here, however long (X8). It is bounded by what there is to tell:
        while it stands still it orders nothing, so each child has its start and its end, and that is all.
        """
        if self.channel is None:
            return
        data = messages.pack(kind, **fields)
        if not self.unsent:
            try:
                return fdpass.send(self.channel, data, fds or [])
            except fdpass.CrowdedError:
                self.unsent_at = time.monotonic() + fdpass.CROWDED_S
            except BlockingIOError:
                self.poll.modify(self.channel, select.POLLIN | select.POLLOUT)
            except ConnectionError:
                return
            except OSError as error:
                return self._give_up_manager(error)
        held: list[int] = []
        try:
            for fd in fds or ():
                held.append(os.dup(fd))  # the one in the table may be closed before
        except OSError:
            fdpass.close_all(held)  # EMFILE: it is told without, as if they had not arrived
        self.unsent.append((data, held))

    def _give_up_manager(self, error: OSError) -> None:
        """One that misses a message (ENOBUFS, ENOMEM) waits for it, or believes what is not so: another is told all."""
        complain(f"cannot tell the manager: {init.reason(error)}; ending it", self.form)
        children.signal_child(self.manager, signal.SIGKILL, group=False)

    def _send_rest(self) -> None:
        self.unsent_at = None
        if self.channel is None:
            return  # it has gone, as the reaper will tell
        while self.unsent:
            data, fds = self.unsent[0]
            try:
                fdpass.send(self.channel, data, fds)
            except fdpass.CrowdedError:
                self.unsent_at = time.monotonic() + fdpass.CROWDED_S
                break
            except BlockingIOError:
                self.poll.modify(self.channel, select.POLLIN | select.POLLOUT)
                return
            except ConnectionError:
                pass  # it has gone, as the reaper will tell
            except OSError as error:
                return self._give_up_manager(error)
            self.unsent.popleft()
            fdpass.close_all(fds)
        self.poll.modify(self.channel, select.POLLIN)

    def _manager_gone(self, reason: str) -> None:
        self._part_from_manager()
        if self.exit_status is not None or self.leave_by is not None:
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
        if self.stop_signal:
            self.ends_while_stopping += 1
            if self.ends_while_stopping >= _STOPS_BY_MANAGERS:
                self._stop_alone(reason)
        if self.stop_signal and self.stop_signal not in self.signals:
            self.signals.append(self.stop_signal)  # the next one is to go on with what it was about
        self.restart_at = now + self.delay_s
        complain(f"{reason}; starting another in {self.delay_s:.1f} s, connections wait", self.form)

    def _stop_alone(self, reason: str) -> NoReturn:
        """No manager lives long enough to stop the services in order, and superd has been told to end."""
        complain(f"{reason}; superd ends without one", self.form)
        left = [child.pid for child in self.children.values() if child.status is None]
        if self.command is not None and self.command.running:
            left.append(self.command.pid)
        children.end_strays([*left, *self.spawners], _LAST_WAIT_S)
        os._exit(1)

    def _part_from_manager(self) -> None:
        if self.channel is not None:
            self.poll.unregister(self.channel)
            self.channel.close()
            self.channel = None
        self.manager = 0
        self.unsent_at = None
        while self.unsent:
            fdpass.close_all(self.unsent.popleft()[1])

    # -- upgrade

    def _upgrade_when_alone(self, pipe: init.SignalPipe) -> None:
        """Once the manager has ended, go on as the code that is installed now. Returns if that cannot be executed, with
        a manager of the old code."""
        if self.manager:
            if self.leave_by is not None and time.monotonic() >= self.leave_by:
                children.signal_child(self.manager, signal.SIGKILL, group=False)
            return
        self.leave_by = None
        mask = succession.block_signals()
        for signo in pipe.read():
            self._noted(signo)
        # As it was called, but for what an earlier upgrade has put in.
        words = sys.argv[3:] if sys.argv[1:2] == ["--resume-fd"] else sys.argv[1:]
        argv = [sys.executable, "-I", "-m", "superd", *words]
        try:
            state, fds = self._to_state()
            succession.become(argv, process.environment_as_found(), state, fds, messages.GENERATION)
        except OSError as error:
            complain(f"cannot execute {sys.executable}: {init.reason(error)}; superd goes on as it was", self.form)
        succession.unblock_signals(mask)
        self._start_manager()

    def _to_state(self) -> tuple[dict[str, Any], list[int]]:
        """All that a keeper knows while it has no manager, and the fds in it."""
        command = self.command
        state = {
            "options": asdict(self.options), "nofile": self.nofile, "held": self.held, "snapshot": self.snapshot,
            "children": [[number, asdict(child)] for number, child in self.children.items()],
            "spawners": [
                [pid, {"id": one.id, "context": one.context, "channel": one.channel.fileno(), "born": one.born,
                       "quick_ends": one.quick_ends, "cgroup": one.cgroup, "environment": one.environment}]
                for pid, one in self.spawners.items()
            ],
            "recent": list(self.recent), "generation": self.generation, "form": self.form, "orphans": self.orphans,
            "signals": self.signals, "stop_signal": self.stop_signal,
            "command": command and {"pid": command.pid, "status": command.status, "terminal": command.terminal},
        }  # fmt: skip
        fds = [fd for held in self.held.values() for fd in held]
        for child in self.children.values():
            fds += child.log if child.report is None else [*child.log, child.report]
        fds += [one.channel.fileno() for one in self.spawners.values()]
        fds += [*self.snapshot, *(command.fds_when_released() if command is not None else [])]
        return state, fds

    @classmethod
    def from_state(cls, state: dict[str, Any], fds: set[int]) -> Keeper:
        """What `_to_state` gave; a later version may have added to it, and this one may expect more. `fds`: those that
        are what they were. Raises ValueError, KeyError, TypeError, AttributeError or IndexError where it is none."""
        options = _options_of(state)
        keeper = cls(options, {}, (int(state["nofile"][0]), int(state["nofile"][1])))

        def known(fd: int) -> int:
            if fd not in fds:
                raise ValueError(f"fd {fd} is another now")
            return fd

        keeper.held = {str(name): [known(fd) for fd in held] for name, held in state["held"].items()}
        keeper.snapshot = [known(fd) for fd in state["snapshot"]]
        expected = [one.name for one in dataclass_fields(_Child)]
        for number, row in state["children"]:
            child = _Child(**{name: row[name] for name in expected if name in row})
            child.early = [(int(signo), bool(group)) for signo, group in child.early]
            for fd in child.log:
                known(fd)
            keeper.children[int(number)] = child
            if child.status is None:
                keeper.ids[int(child.pid)] = int(number)
            if child.report is not None:
                keeper.poll.register(known(child.report), select.POLLIN)
        for pid, row in state["spawners"]:
            messages.context_from_json(row["context"])
            channel = socket.socket(fileno=known(row["channel"]))
            keeper.spawners[int(pid)] = _Spawner(
                int(row["id"]),
                row["context"],
                channel,
                float(row["born"]),
                int(row["quick_ends"]),
                row.get("cgroup"),
                row.get("environment"),
            )
        keeper.recent.extend((int(pid), int(status)) for pid, status in state["recent"])
        keeper.generation, keeper.orphans = int(state["generation"]), int(state["orphans"])
        keeper.form = state["form"] if state["form"] in records.FORMATTERS else "text"
        keeper.signals, keeper.stop_signal = [int(one) for one in state["signals"]], int(state["stop_signal"])
        if (told := state["command"]) is not None:
            keeper.command = make_command(options)
            terminal = told["terminal"]
            keeper.command.resume(int(told["pid"]), told["status"], terminal and known(terminal))
        keeper.up = True
        return keeper

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
            elif self.command is not None and pid == self.command.pid:
                self.command.ended(status)
                self._send("command-ended", status=self.command.status)
            else:
                self.orphans += 1
                self.recent.append((pid, status))

    def _drain_channel(self) -> None:
        """What a manager said before it died still counts: it may have been its exit, or fds to keep."""
        while self.channel is not None and self._take():
            pass

    def _forward(self) -> None:
        if self.channel is not None and self.signals and not self.unsent:
            taken, self.signals = self.signals, []
            for signo in taken:
                self._send("signal", signo=signo)
                if signo in init.FINAL:
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
                cut = messages.unpack(error.data)
                if cut["kind"] == "start":
                    self._send("failed", id=cut["id"], stage="descriptors", errno=error.errno, detail="")
            return True
        except ConnectionError:
            return True  # it has gone: what is left to read, and its end, come next
        except OSError as error:
            complain(f"cannot hear the manager: {init.reason(error)}; trying again", self.form)
            return True
        if not data:
            self.poll.unregister(self.channel)  # the reaper will tell
            self.channel.close()
            self.channel = None
            return False
        order: dict[str, Any] = {}
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
            number = order.get("id")
            if order.get("kind") == "start" and isinstance(number, int) and number not in self.children:
                self._send("failed", id=number, stage="order", errno=0, detail=repr(error))
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
        """Start a service's process. fds: what it gets, then the one for its ready_fd and write and read end of its
        log pipe if it has them.
        stored: held fds that it gets as well, [[name here, name there], …].
        cgroup: where it goes; limited: that has limits, so it must not run elsewhere."""
        number = order["id"]
        kept = [(fd, name) for held, name in order.get("stored", ()) for fd in self.held.get(held, ())]
        program = replace(Program.from_json(order["program"]), stored=tuple(name for _, name in kept))
        wanted = messages.context_from_json(order["context"])
        log = [fds.pop(), fds.pop()] if order["log"] else []  # read end, write end
        ready = [] if program.ready_fd is None else [fds.pop()]
        is_there = False  # in its cgroup, in the child

        def fork() -> int:
            nonlocal is_there
            pid, is_there = cgroup.fork(order.get("cgroup"))
            return pid

        def settle() -> None:
            signal.set_wakeup_fd(-1)
            process.reset_signals()
            if order.get("cgroup") and not is_there:
                try:
                    cgroup.join(order["cgroup"])
                except OSError as error:  # without it sessions and the subreaper have to do
                    if order.get("limited"):
                        detail = f"cannot join {order['cgroup']}"
                        raise children.StartError("cgroup", error.errno or 0, detail) from None

        def prepare() -> tuple[dict[str, str], int | None]:
            inode = process.pidfd_inode()
            settle()
            try:
                entered = context.enter(wanted, nofile=self.nofile, in_namespace=wanted.private_pids)
            except context.ContextError as error:
                raise children.StartError(error.stage, error.errno or 0, error.detail) from None
            return context.user_environment(entered), inode

        try:
            passed = [*fds, *(fd for fd, _ in kept), *ready]
            with context.pid_namespace(settle) if wanted.private_pids else contextlib.nullcontext():
                pid, report = children.fork_exec(program, {}, passed, log[1] if log else None, prepare, fork)
        except context.ContextError as error:
            fdpass.close_all(log)
            self._send("failed", id=number, stage=error.stage, errno=error.errno or 0, detail=error.detail)
        except children.StartError as failure:
            fdpass.close_all(log)
            self._send("failed", id=number, stage=failure.stage, errno=failure.errno, detail=failure.detail)
        else:
            self.children[number] = _Child(pid, order["tag"], log[:1], time.monotonic(), report=report)
            self.ids[pid] = number
            self.poll.register(report, select.POLLIN)
            fdpass.close_all(log[1:])
        fdpass.close_all([*fds, *ready])

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

    def _disown(self, order: dict[str, Any], fds: list[int]) -> None:
        """Of an adopted process whose parent is another one: its end will be told by nobody here."""
        child = self.children.pop(order["id"], None)
        if child is not None:
            if self.ids.get(child.pid) == order["id"]:
                del self.ids[child.pid]
            fdpass.close_all(child.log)

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
        wanted = _Spawner(number, order["context"], theirs, 0.0, 0, order.get("cgroup"), order.get("environment"))
        pid = self._fork_spawner(wanted)
        if pid is None:
            ours.close()
            theirs.close()
            return
        self.held[f"spawner:{number}"] = [ours.detach()]
        self._send("spawner", self.held[f"spawner:{number}"], id=number, pid=pid)

    def _fork_spawner(self, wanted: _Spawner) -> int | None:
        try:
            pid, is_there = cgroup.fork(wanted.cgroup)
        except OSError as error:
            self._send("spawner-gone", id=wanted.id, pid=0, status=0, errno=error.errno)
            return None
        if pid == 0:
            self._only(wanted.channel.fileno())
            run_spawner(wanted, self.nofile, None if is_there else wanted.cgroup)
        self.spawners[pid] = replace(wanted, born=time.monotonic())
        return pid

    def _spawner_ended(self, ended: _Spawner, pid: int, status: int) -> None:
        """One that was killed is followed by another on the same channel: connections that were queued for it are
        started all the same. One that went by itself is not, nor the sixth in a row that was killed at once."""
        by_itself = os.WIFEXITED(status) and os.WEXITSTATUS(status) in (0, 1)
        quick_ends = ended.quick_ends + 1 if time.monotonic() - ended.born < _STABLE_S else 0
        if not by_itself and quick_ends <= _QUICK_ENDS and self.exit_status is None:
            again = self._fork_spawner(replace(ended, quick_ends=quick_ends))
            if again is not None:
                return self._send("spawner-replaced", id=ended.id, pid=again, was=pid)
        ended.channel.close()
        for fd in self.held.pop(f"spawner:{ended.id}", []):
            os.close(fd)
        self._send("spawner-gone", id=ended.id, pid=pid, status=status)

    def _is_up(self, order: dict[str, Any], fds: list[int]) -> None:
        if self.command is not None and not self.up:
            self.command.release()  # now its services can be reached
        self.up = True
        self.manager_up_at = time.monotonic()
        self.form = str(order.get("form", self.form))

    def _upgrade(self, order: dict[str, Any], fds: list[int]) -> None:
        """The manager has told everything and ends now."""
        self.leave_by = time.monotonic() + _LEAVE_S

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
    "forget": "_forget", "disown": "_disown",
    "signal": "_signal", "spawner": "_spawner", "up": "_is_up", "exit": "_exit", "notify": "_notify",
    "upgrade": "_upgrade",
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
    """One line on stderr in the log's form."""
    init.say(records.FORMATTERS[form](time.time(), "warning", None, "message", None, None, None, text, {}))


def _import_manager() -> Callable[[socket.socket, Options, tuple[int, int]], int]:
    # trio asks for libpthread, to give names to threads. To find it ctypes would start ldconfig and gcc, and raise
    # where no temporary file can be written, as in a read-only container.
    import ctypes.util

    def find_nothing(name: str) -> str | None:
        return None

    find_library, ctypes.util.find_library = ctypes.util.find_library, find_nothing
    from superd.manager import main

    ctypes.util.find_library = find_library
    return main.main


def try_out(generation: str) -> int:
    """What --check-upgrade does, in a process of its own: the version on stdout, if this code can be imported and
    understands what a superd of that generation leaves."""
    from pkgutil import iter_modules

    _import_manager()
    for package in ("superd.core", "superd.system", "superd.manager"):  # also what is imported late
        for module in iter_modules(import_module(package).__path__, f"{package}."):
            import_module(module.name)
    if generation != str(messages.GENERATION):
        what = f"generation {messages.GENERATION} of superd cannot follow {generation[:20]}"
        sys.stdout.write(f"{what}: stop superd and start it again\n")
        return 1
    sys.stdout.write(f"{__version__}\n")
    return 0


def resume(state_fd: int, options: Options) -> int:
    """Go on as the keeper that this process was until it executed this program; returns superd's exit status.

    Where what it left cannot be understood, this is a superd that has just been started by the same command line, with
    those listeners that are certain.
    """
    state, fds = succession.take(state_fd, messages.GENERATION)
    process.sanitize_inherited_fds(fds)
    process.set_name("superd-keeper")
    try:
        if state is None:
            raise ValueError("it is no state of this version")
        keeper = Keeper.from_state(state, fds)
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, OSError) as error:
        complain(f"cannot take over what superd was: {error!r}; starting anew", options.log or "text")
        with contextlib.suppress(ValueError, LookupError, TypeError, AttributeError):
            options = _options_of(state or {})
        keeper = _start_anew(state or {}, fds, options)
    init.adopt_orphans(lambda text: complain(text, keeper.form))
    return keeper.run()


def _start_anew(state: dict[str, Any], fds: set[int], options: Options) -> Keeper:
    """What of the listeners is sure is kept; other fds are closed."""
    held: dict[str, list[int]] = {}
    rows = state.get("held")
    for name, found in rows.items() if isinstance(rows, dict) else ():
        if name.startswith(("listener:", "control", "inherited:")) and isinstance(found, list):
            if all(type(fd) is int and fd in fds for fd in found):
                held[name] = found
    process.sanitize_inherited_fds([fd for found in held.values() for fd in found])
    keeper = Keeper(options, {}, process.raise_nofile())
    keeper.held = held
    return keeper


def run_manager(channel: socket.socket, options: Options, nofile: tuple[int, int]) -> NoReturn:
    """In the forked child. Imported here: only this role needs trio, and the keeper never pays for it."""
    status = 1
    try:
        status = _import_manager()(channel, options, nofile)
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
    except BaseException as error:  # boundary: never return into the keeper's loop
        if (cause := process.refusal(error)) is None:
            sys.excepthook(*sys.exc_info())
        else:
            complain(f"the manager cannot go on: {cause}", options.log or "text")
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.flush()
        os._exit(status)


def run_spawner(wanted: _Spawner, nofile: tuple[int, int], group: str | None) -> NoReturn:
    try:
        context = messages.context_from_json(wanted.context)
        spawner.main(wanted.channel, context, nofile, group, wanted.environment)
    except BaseException:  # boundary: never return into the keeper's loop
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(1)


def _options_of(state: dict[str, Any]) -> Options:
    given = state["options"]
    told = {one.name: given[one.name] for one in dataclass_fields(Options) if one.name in given}
    for name in ("config", "command"):
        told[name] = tuple(map(str, told[name]))
    told["rewrite"] = {int(got): int(sent) for got, sent in told["rewrite"].items()}
    return Options(**told)


def make_command(options: Options) -> init.Command:
    return init.Command(
        options.command, single=options.single_child, rewrite=options.rewrite,
        complain=lambda text: complain(text, options.log or "text"),
    )  # fmt: skip


def run(options: Options) -> int:
    """Become the keeper; returns superd's exit status. Called once, first thing, by the command line."""
    form = options.log or "text"
    try:
        return _run(options, form)
    except OSError as error:  # what the kernel refuses while there is nothing to hold on to yet
        complain(f"cannot go on: {process.refusal(error)}", form)
        return 1


def _run(options: Options, form: str) -> int:
    from superd.system import sockets

    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    if 0 <= limit < _FILE_SIZE_MIN:
        # It holds for memfds, so for messages between roles and for what a manager leaves to the next.
        complain(f"cannot start: the file size limit (ulimit -f) of {limit} bytes is too low, 1 MiB is needed", form)
        return 1
    command = None
    if options.command:
        command = make_command(options)
        try:
            command.fork()  # first of all, while everything is as superd found it
        except OSError as error:
            complain(f"cannot run {options.command[0]!r}: fork: {init.reason(error)}", form)
            return init.NEVER_RAN
    inherited, _ = sockets.inherited_sockets(os.environ, os.getpid())
    kept = [fd for fds in inherited.values() for fd in fds]
    process.sanitize_inherited_fds(kept if command is None else kept + command.fds())
    for name in ("LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES", "LISTEN_PIDFDID"):
        os.environ.pop(name, None)
    process.set_name("superd-keeper")
    init.adopt_orphans(lambda text: complain(text, form))
    if not os.path.exists("/proc/self/stat"):
        complain("there is no /proc: what has left its service's session will not be stopped with it", form)
    nofile = process.raise_nofile()
    os.umask(0o022)
    with contextlib.suppress(OSError):
        os.chdir("/")
    return Keeper(options, inherited, nofile, command).run()
