"""All services: what they share, signals, shutdown, and the one error boundary.

An exception inside one service is caught here, once, and logged with its traceback; the others do not notice (F7).
There is no other `except Exception` in the manager.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import time
import traceback
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import trio

from superd import __version__
from superd.core.lifecycle import Ending, State
from superd.core.spec import DaemonSpec, ServiceSpec, Snapshot
from superd.manager import fdstore
from superd.manager.access import Names
from superd.manager.activation import ConnectionService
from superd.manager.builtins import BuiltinService
from superd.manager.checks import Probe
from superd.manager.commands import Commands
from superd.manager.dependencies import Dependencies
from superd.manager.keeperlink import Inheritance, KeeperLink
from superd.manager.logs import Format, Log, wants_colour
from superd.manager.metrics import Meter
from superd.manager.overlap import Overlap
from superd.manager.process import ProcessService
from superd.manager.proxy import ProxyService
from superd.manager.service import Service, Statistics
from superd.manager.spawners import Spawners
from superd.manager.stopping import FINAL_WAIT_S, Processes
from superd.manager.syslog import Syslog
from superd.manager.tcpmux import MuxService
from superd.manager.trial import TracedService, print_addresses
from superd.manager.watch import Callback, Timer, Timers, Watch
from superd.system import children, notify, process

if TYPE_CHECKING:
    from superd.core.machine import Machine
    from superd.core.problems import Problem
    from superd.core.schema import SourceFile
    from superd.keeper import Trial
    from superd.manager.control import ControlServer
    from superd.manager.reload import Reloader

EX_CANNOT_BIND = 71
_TRY_LATER_S = 0.1
_CHECK_PATHS_S = 10.0
_PATHS_AT_ONCE = 1000  # some ms
_RECORDS_AT_ONCE = 1000
_STATUS_S = 1.0
_PING_LEAST_S = 0.01  # a period that nobody can keep must not keep this loop busy
_STATUS_CHARS = 1000
_STRAYS_S = 1.0  # after a take-over; the spawners have told what they have by then
_TURN_TO_STOP = 0.75  # of the time for everything; who has not had his turn by then is told, rather than only killed
_END_S = 5  # for a manager to end when everything has stopped
_ORPHANED_S = 1.0  # for services whose keeper was killed: the next superd wants their ports
_NAMELESS_S = 10.0  # for processes that belong to no service, from TERM to KILL


class Supervisor:
    """Made once per manager; `run()` is its life. `inheritance` is what an earlier manager left."""

    def __init__(
        self,
        snapshot: Snapshot,
        keeper: KeeperLink,
        log: Log,
        inheritance: Inheritance,
        *,
        nofile_soft: int,
        runtime_directory: str,
    ) -> None:
        self.snapshot, self.keeper, self.log, self.inheritance = snapshot, keeper, log, inheritance
        self.runtime_directory = runtime_directory
        self.own_environment = dict(os.environ)
        self.timers = Timers(self.guard, self.end_of_turn)
        self.watch = Watch(self.guard, self.timers, self.end_of_turn)
        generation = inheritance.generation
        self.spawners = Spawners(
            keeper, self.watch, self.timers, nofile_soft, generation << 16,
            lambda text: log.message(text, level="warning"),
        )  # fmt: skip
        self.spawners.stranger = self._leaving
        self.strict = False
        self.trial: Trial | None = None
        # Name of a service -> the files in force, the problems of reading them, and the machine as it was then.
        self.sources: Callable[[str], tuple[list[SourceFile], list[Problem], Machine]] | None = None
        self.drain_s = 0.0  # how long live connections may go on when superd stops
        self.form: Format = "text"  # of the log, for what the keeper has to say
        self.log_option: Format | None = None
        self.control: ControlServer | None = None
        self.processes = Processes(self)
        self.spawners.group_of = self.processes.group_of
        self.names = Names()
        self.dependencies = Dependencies(self, snapshot)
        self.meter = Meter(self)
        self.syslog = Syslog(self, snapshot.daemon.syslog)
        self.services: dict[str, Service] = {}
        self.leaving: list[Service] = []  # that are no more in the configuration, and still have something to do
        self.inherited: dict[str, list[int]] = {}  # superd's own sockets, for fd:NAME
        self.reloader: Reloader | None = None
        self.instances: dict[int, Service | Commands | Probe | Overlap] = {}  # the keeper's children by id
        self.stored = fdstore.inherit(inheritance)
        self.snapshot_wanted = False
        self.drained = 0
        self.stopping = False
        self.exit_status = 0
        self.hurry = trio.Event()
        self._generation = generation
        self._version_before = ""  # that of the manager before this one, if it was another
        self._connection = generation << 40
        self._instance = generation << 20
        self._forgotten: list[int] = []  # children whose end is dealt with; the keeper is told after the next deposit
        self._resumed = False  # an earlier manager was stopping superd; the keeper repeats the signal, if there was one
        self._later: list[Callable[[], None]] = []
        self._turned: trio.Event | None = None  # somebody waits for the end of a turn
        self._log_timer: Timer | None = None
        self._log_blocked = False
        self._nursery: trio.Nursery | None = None
        self._done = trio.Event()
        self._broken_since = dict.fromkeys(snapshot.broken, time.monotonic())  # name -> when it was found to be wrong
        self._status_timer: Timer | None = None
        self.deposit_s = 0.0  # that the last deposit took
        keeper.handlers |= {
            "started": self._started, "failed": self._failed, "exited": self._exited, "signal": self._signal,
            "command-ended": self._command_ended,
        }  # fmt: skip
        keeper.gone = self._keeper_gone

    @property
    def once(self) -> bool:
        """The first connection, or process, is the last one."""
        return self.trial is not None and self.trial.once

    # -- numbers

    def next_connection(self) -> int:
        self._connection += 1
        return self._connection

    def next_instance(self) -> int:
        self._instance += 1
        return self._instance

    # -- the boundary

    def guard(self, callback: Callback, events: int) -> bool:
        """Run a callback; whatever it raises ends here (F7, F19). False: it raised."""
        try:
            callback(events)
            return True
        except Exception as error:
            self._caught(error)
            return False

    def _caught(self, error: Exception) -> None:
        if (refused := process.refusal(error)) is not None:
            self.log.error_limited(("refused", refused), f"the system refuses: {refused}; superd goes on")
            error.__traceback__ = None
            return
        text = "".join(traceback.format_exception(error)).strip()
        where = traceback.extract_tb(error.__traceback__)[-1]
        self.log.error_limited(
            ("internal", where.filename, where.lineno), f"internal error: {error!r}; superd goes on", traceback=text
        )
        error.__traceback__ = None

    def start_task(self, task: Callable[[], Awaitable[None]]) -> trio.CancelScope:
        """Run a task in the background, inside the boundary, until it ends or its scope is cancelled."""
        scope = trio.CancelScope()

        async def run() -> None:
            with scope:
                try:
                    await task()
                except Exception as error:
                    self._caught(error)
            self.end_of_turn()

        assert self._nursery is not None, "not running yet"
        self._nursery.start_soon(run)
        return scope

    def later(self, callback: Callable[[], None]) -> None:
        """At the end of this turn, before anything else happens."""
        self._later.append(callback)

    def end_of_turn(self) -> None:
        while self._later:
            callbacks, self._later = self._later, []
            for callback in callbacks:
                self.guard(lambda _, callback=callback: callback(), 0)  # type: ignore[misc]
        self.processes.forget()
        if self._turned is not None:
            self._turned.set()
            self._turned = None
        if self.snapshot_wanted:
            self.deposit()
        self.log.flush()
        # Records that must be written later although nothing happens: a reader that catches up, a disk that has room
        # again, a summary that is due.
        blocked = self.log.sink.wants_writable()
        if blocked is not None and self._nursery is not None and not self._log_blocked:
            self._log_blocked = True
            self._nursery.start_soon(self._wait_for_log, blocked)
        when = self.log.wake_at()
        if when is not None and self._log_timer is None:
            self._log_timer = self.timers.after(max(when - time.monotonic(), 0.05), self._wake_log)

    async def next_turn(self) -> None:
        """Until something has happened."""
        self._turned = self._turned or trio.Event()
        await self._turned.wait()

    async def _wait_for_log(self, fd: int) -> None:
        try:
            await trio.lowlevel.wait_writable(fd)
        except OSError:
            await trio.sleep(1)  # not pollable
        self._log_blocked = False
        self.end_of_turn()

    # -- life

    def add(self, spec: ServiceSpec) -> Service:
        if spec.builtin is not None:
            kind: type[Service] = MuxService if spec.builtin == "tcpmux" else BuiltinService
        else:
            one_process = ProcessService if spec.proxy is None else ProxyService
            kind = ConnectionService if spec.takes_connections else one_process
            if self.trial is not None and self.trial.trace:
                kind = TracedService
        service = self.services[spec.name] = kind(self, spec)
        return service

    async def run(self) -> int:
        """Bind, adopt, start, serve; returns superd's exit status when everything has stopped."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            if self.reloader is not None:
                self.reloader.begin()
            self._begin()
            nursery.start_soon(self.watch.run)
            nursery.start_soon(self.timers.run)
            if self.control is not None:
                nursery.start_soon(self.control.serve)
            if self.reloader is not None:
                nursery.start_soon(self.reloader.run)
            await self._done.wait()
            signal.alarm(_END_S)  # whatever hangs from here on: the next manager sees that nothing is left, and ends
            nursery.cancel_scope.cancel()
        return self.exit_status

    def _begin(self) -> None:
        inheritance = self.inheritance
        self.keeper.try_later = self._try_later
        self.keeper.watch_with(lambda events: self.watch.change(self.keeper.channel.fileno(), events))
        self.watch.add(self.keeper.channel.fileno(), self.keeper.ready)
        for number, pid, context in inheritance.spawners:
            for fd in inheritance.held.pop(f"spawner:{number}", []):
                self.spawners.take_over(number, pid, fd, context)
        self.inherited = inherited = {
            name.partition(":")[2]: inheritance.held.pop(name)
            for name in list(inheritance.held)
            if name.startswith("inherited:")
        }
        left = self._read_deposit(inheritance.snapshot)
        deposited: dict[str, Any] = left["services"]
        if left["version"] != __version__:
            self._version_before = left["version"]
        self.guard(lambda _: self.syslog.bind(inheritance), 0)
        self.guard(lambda _: self.meter.restore(left["meter"]), 0)
        for number, spec in enumerate(self.snapshot.services.values()):
            if number % _RECORDS_AT_ONCE == 0:
                self.log.flush()  # what thousands of services say at once is more than a log keeps for a slow reader
            service = self.add(spec)
            self.guard(lambda _, service=service: self._restore(service, deposited.get(service.name, {})), 0)  # type: ignore[misc]
            self.guard(lambda _, service=service: service.bind(inheritance, inherited), 0)  # type: ignore[misc]
        self.timers.after(_CHECK_PATHS_S, functools.partial(self._check_paths, 0))
        self._drop_unclaimed()
        self._adopt_children(deposited, left["forgotten"])
        self.meter.begin()
        if self.strict and not inheritance.up and any(not s.listeners.complete for s in self.services.values()):
            why = "" if self.trial else ", and --strict was given"
            self.log.message(f"cannot start: an address cannot be had{why}", level="err")
            self.shut_down(EX_CANNOT_BIND)
            return
        if self.control is not None:
            self.control.open()
        self._say_ready()
        if self.trial is not None and self.trial.print_address and not inheritance.up:
            for service in self.services.values():
                print_addresses(service)
        if (status := left["stopping"]) is not None:
            self._resumed = True
            self.shut_down(status)
        else:
            self.dependencies.begin()
        fdstore.discard(self.stored, self.keeper)
        if inheritance.up:
            self.timers.after(_STRAYS_S, self._adopt_strays)
        if self._version_before:
            self.timers.after(_STRAYS_S, self.spawners.renew)
        self.snapshot_wanted = True
        self.end_of_turn()

    def _read_deposit(self, snapshot: bytes) -> dict[str, Any]:
        """What the last manager deposited. One that makes no sense (P1) is no reason to end, again and again: what
        listens and what runs is known without it."""
        empty: dict[str, Any] = {"services": {}, "forgotten": [], "stopping": None, "meter": {}, "version": __version__}
        if not snapshot:
            return empty
        try:
            found = {**empty, **json.loads(snapshot)}
        except (ValueError, TypeError, RecursionError) as error:
            self.log.message(f"cannot read what the last manager has left: {error}; going on without it", level="err")
            return empty
        services = found["services"] if isinstance(found["services"], dict) else {}
        forgotten = found["forgotten"] if isinstance(found["forgotten"], list) else []
        stopping = found["stopping"] if isinstance(found["stopping"], int) else None
        rows = {name: row for name, row in services.items() if isinstance(row, dict) and _makes_sense(row)}
        meter = found["meter"] if isinstance(found["meter"], dict) else {}
        return {
            "services": rows, "forgotten": forgotten, "stopping": stopping, "meter": meter,
            "version": str(found["version"]),
        }  # fmt: skip

    def _drop_unclaimed(self) -> None:
        """Listeners of services that were being removed when the last manager died."""
        for name in [name for name in self.inheritance.held if name.startswith("listener:")]:
            for fd in self.inheritance.held.pop(name):
                os.close(fd)
            self.keeper.send("drop", name=name)

    def _leaving(self, name: str) -> ConnectionService:
        """For live connections of a service that was leaving when the last manager died: of it only they are known."""
        for service in self.leaving:
            if service.name == name and isinstance(service, ConnectionService):
                return service
        found = ConnectionService(self, ServiceSpec(name, "", ("",), "per-connection", "stdio"))
        found.leave()
        self.leaving.append(found)
        if self.reloader is not None and self._nursery is not None:
            self._nursery.start_soon(self.reloader.wait_for_end, found)
        return found

    def everything(self) -> list[Service]:
        """The services, and those that are leaving."""
        return [*self.services.values(), *self.leaving]

    def _adopt_strays(self) -> None:
        """Connections that nobody has told of: manager and spawner were killed together. Their processes are the
        keeper's children now, and their environment says whose they are."""
        for name, rows in self.processes.by_service().items():
            service = self.services.get(name)
            if isinstance(service, ConnectionService):
                for row in rows:
                    if row.parent == os.getppid():
                        service.adopt_stray(row.pid)

    def _restore(self, service: Service, was: dict[str, Any]) -> None:
        if not was:
            return
        service.wish_up = was["wish"]
        service.listeners.paused, service.draining = was.get("paused", False), was.get("draining", False)
        service.total, service.restarts = was["total"], was["restarts"]
        service.endings = was["endings"]
        service.counts.restore(was.get("counts", {}))
        state = was["state"]
        if service.state is State.DISABLED and state != "disabled":
            service.state = State.STOPPED  # it had been started by hand
        if state in ("done", "failed", "stopped", "disabled"):
            service.state = State(state)
            service.note = was["note"]
        if isinstance(service, ProcessService):
            service.restore(was)
        if was.get("order") in ("stop", "drain", "restart"):
            self.dependencies.orders[service.name] = was["order"]

    def _adopt_children(self, deposited: dict[str, Any], forgotten: list[int]) -> None:
        """Processes that the keeper holds from earlier managers; those that ended meanwhile are told now."""
        logs = self.inheritance.log_fds
        rows = sorted(self.inheritance.children, key=lambda row: row["id"])
        for row in rows:
            if row["id"] in forgotten and row["status"] is not None:
                self.keeper.send("forget", id=row["id"])
        rows = [row for row in rows if row["id"] not in forgotten]
        of_services: dict[str, list[dict[str, Any]]] = {}
        for row in rows:
            if row["tag"].get("check"):
                self._adopt_check(row, logs.pop(row["id"], None))
                continue
            of_services.setdefault(row["tag"]["service"], []).append(row)
        for name, found in of_services.items():
            service = self.services.get(name)
            if isinstance(service, ProcessService):
                was = deposited.get(name, {})
                if not self.guard(lambda _, service=service, found=found, was=was: service.adopt(found, logs, was), 0):  # type: ignore[misc]
                    service.adopt(found, logs, {})
            elif isinstance(service, ConnectionService):
                for row in found:
                    tag, log = row["tag"], logs.pop(row["id"], None)
                    service.adopt(None, [tag["id"], row["pid"], name, tag["peer"], row["started"], True], log)
                    self.instances[row["id"]] = service
        for log in logs.values():
            os.close(log)
        for row in rows:
            if row["failure"] is not None:
                stage, errno, detail = row["failure"]
                self.later(
                    functools.partial(self._failed, {**row, "stage": stage, "errno": errno, "detail": detail}, [])
                )
            if row["status"] is not None:
                self.later(functools.partial(self._exited, dict(row), []))

    def _adopt_check(self, row: dict[str, Any], log: int | None) -> None:
        service = self.services.get(row["tag"]["service"])
        if isinstance(service, ProcessService):
            service.checks.take_over(row["id"], log)
        elif log is not None:
            os.close(log)

    def _say_ready(self) -> None:
        ready = self._describe()
        if self.inheritance.up:
            upgraded = f" (superd {__version__}, was {self._version_before})" if self._version_before else ""
            text = f"manager {self._generation} took over{upgraded}: {ready.removeprefix('ready: ')}"
            self.log.message(text, level="notice")
        else:
            self.log.record("ready", ready)
        self.keeper.send("up", form=self.form)
        self.tell_manager(f"READY=1\nSTATUS={ready}")
        self._start_pings()

    def tell_manager(self, text: str | Callable[[], str]) -> None:
        """sd_notify(3) to the manager above superd, if there is one."""
        address = self.own_environment.get("NOTIFY_SOCKET", "")
        if address.startswith(("/", "@")) and len(address) < 108:
            self.keeper.send("notify", address=address, text=text if isinstance(text, str) else text())

    def tell_reloading(self) -> None:
        """A reload of the configuration begins; `tell_reloaded` ends it, however it went."""
        self.tell_manager(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def tell_reloaded(self) -> None:
        self.tell_manager(lambda: f"READY=1\nSTATUS={self._describe()}")

    def tell_failures(self) -> None:
        """A service has failed, or has recovered: the STATUS= says so, once a second at most."""
        if self._status_timer is None:
            self._status_timer = self.timers.after(_STATUS_S, self._tell_status)

    def _tell_status(self) -> None:
        self._status_timer = None
        if not self.stopping:
            self.tell_manager(f"STATUS={self._describe()}")

    def _describe(self) -> str:
        services = [service for service in self.services.values() if service.spec.enabled]
        bound = sum(len(service.listeners.open) for service in services)
        failed = sorted(service.name for service in services if service.state is State.FAILED)
        text = f"ready: {len(services)} services, {bound} sockets"
        return f"{text}; failed: {', '.join(failed)}"[:_STATUS_CHARS] if failed else text

    def _start_pings(self) -> None:
        """WATCHDOG=1 twice in each period that the manager above has set. From this loop, so that a superd that hangs
        is found out; the keeper, whose pid WATCHDOG_PID may name, sends what it is told."""
        usec = notify.number(self.own_environment.get("WATCHDOG_USEC"))
        if usec and self.own_environment.get("WATCHDOG_PID", "") in ("", str(os.getppid())):
            self._ping(max(usec / 2_000_000, _PING_LEAST_S))

    def _ping(self, every_s: float) -> None:
        self.tell_manager("WATCHDOG=1")
        self.timers.after(every_s, functools.partial(self._ping, every_s))

    def take_snapshot(self, snapshot: Snapshot) -> None:
        """That is in force now; what has to be done for it is the reloader's to do, right after."""
        self.snapshot = snapshot
        now = time.monotonic()
        self._broken_since = {name: self._broken_since.get(name, now) for name in snapshot.broken}
        self.dependencies.replace(snapshot)

    def configure_log(self, daemon: DaemonSpec) -> None:
        """As superd.toml has it now; what the command line says counts more."""
        self.form = self.log_option or daemon.log
        self.log.configure(self.form, daemon.log_level, wants_colour(2, os.environ))

    def note_of_file(self, name: str) -> str:
        """Where what runs is not what the file says: why."""
        return "" if self.reloader is None else self.reloader.note_of(name)

    def _wake_log(self) -> None:
        self._log_timer = None
        self.end_of_turn()

    def deposit(self) -> None:
        """For the next manager: what no file, no fd and no process can tell."""
        began = time.monotonic()
        self.snapshot_wanted = False
        services = {
            service.name: {
                "wish": service.wish_up, "state": service.state.value, "note": service.note, "total": service.total,
                "restarts": service.restarts, "endings": service.endings,
                "order": self.dependencies.orders.get(service.name, ""), "paused": service.listeners.paused,
                "draining": service.draining, **({"counts": counts} if (counts := service.counts.deposit()) else {}),
                **(service.deposit() if isinstance(service, ProcessService) else {}),
            }
            for service in self.services.values() if service.has_history()
        }  # fmt: skip
        stopping = self.exit_status if self.stopping else None
        snapshot = {
            "services": services, "forgotten": self._forgotten, "stopping": stopping, "meter": self.meter.deposit(),
            "version": __version__,
        }  # fmt: skip
        try:
            self.keeper.deposit(json.dumps(snapshot).encode())
        except OSError:
            self.snapshot_wanted = True  # no fd or memory for it (A1): at the end of the next turn
            return
        for number in self._forgotten:
            self.keeper.send("forget", id=number)
        self._forgotten = []
        self.deposit_s = time.monotonic() - began

    def forget(self, number: int) -> None:
        """The end of a child of the keeper's is dealt with; a next manager is to know that before the row goes."""
        self._forgotten.append(number)
        self.snapshot_wanted = True

    def _check_paths(self, turn: int) -> None:
        """Each service every ten seconds; of thousands some at a time, so that no client waits for all of them."""
        services = [self.syslog, *self.services.values()]
        turns = 1 + len(services) // _PATHS_AT_ONCE
        for service in services[turn % turns :: turns]:
            self.guard(lambda _, service=service: service.listeners.check_paths(), 0)  # type: ignore[misc]
        self.timers.after(_CHECK_PATHS_S / turns, functools.partial(self._check_paths, turn + 1))

    def _try_later(self, again: Callable[[], None]) -> None:
        self.timers.after(_TRY_LATER_S, again)

    # -- the keeper's reports

    def _started(self, message: dict[str, Any], fds: list[int]) -> None:
        service = self.instances.get(message["id"])
        if isinstance(service, Overlap):
            return service.process_started(message["id"], message["pid"])
        if isinstance(service, ProcessService | Commands | Probe):
            service.process_started(message["pid"])

    def _failed(self, message: dict[str, Any], fds: list[int]) -> None:
        service = self.instances.pop(message["id"], None)
        stage, errno, detail = message["stage"], message["errno"], message["detail"]
        if isinstance(service, ProcessService | Probe):
            service.process_failed(stage, errno, detail)
        elif isinstance(service, Commands | Overlap):
            service.process_failed(message["id"], stage, errno, detail)

    def _exited(self, message: dict[str, Any], fds: list[int] | None = None) -> None:
        self.exited(message["id"], message["pid"], message["status"])

    def exited(self, number: int, pid: int, status: int) -> None:
        """A child of the keeper's, or a process that counts as one, has ended."""
        service = self.instances.pop(number, None)
        if isinstance(service, ProcessService):
            return service.process_exited(pid, status)  # which says when it may be forgotten
        if isinstance(service, Commands):
            return service.process_exited(number, status)
        if isinstance(service, Overlap):
            return service.process_exited(number, pid, status)
        self.keeper.send("forget", id=number)
        if isinstance(service, ConnectionService):
            service.process_exited(pid, status, number)
        elif isinstance(service, Probe):
            service.process_exited(pid, status)

    def _keeper_gone(self) -> None:
        """The keeper was killed: nobody can hold on to anything. End what would block the next superd's ports."""
        mains = [pid for one in self.services.values() if isinstance(one, ProcessService) for pid in one.mains()]
        children.end_strays(mains, _ORPHANED_S)
        os._exit(1)

    def _signal(self, message: dict[str, Any], fds: list[int]) -> None:
        signo = message["signo"]
        if signo in (signal.SIGTERM, signal.SIGINT):
            if self._resumed:
                self._resumed = False
            elif self.stopping:
                self.hurry.set()
            else:
                self.shut_down(self._status_of(signo))
        elif signo == signal.SIGQUIT:
            self.hurry.set()
            self.shut_down(self._status_of(signo))
        elif signo == signal.SIGUSR1:
            for row in self.statistics():
                self.log.message(
                    f"{row.name}: {row.state}, {row.now} now, {row.total} in all"
                    + (f", pid {row.pid}" if row.pid else "") + (f" ({row.note})" if row.note else ""),
                    service=row.name,
                )  # fmt: skip
        elif signo == signal.SIGHUP and self.trial is not None:
            self.shut_down(self._status_of(signo))  # there is no file to be read again, and the terminal has gone
        elif signo == signal.SIGHUP:
            if self.reloader is not None and not self.stopping:
                self.reloader.request(by_order=True)

    def _status_of(self, signo: int) -> int:
        """With --once the status is that of what was served, and nothing was."""
        return 128 + signo if self.once else 0

    # -- stopping

    def served(self, status: int) -> None:
        """That was the one of --once."""
        if not self.stopping:
            self.shut_down(status)

    def _command_ended(self, message: dict[str, Any], fds: list[int]) -> None:
        self.log.message(f"the main command has ended with status {message['status']}")
        self.shut_down(message["status"])

    def shut_down(self, status: int = 0) -> None:
        """Stop everything in order, then exit. Final: nothing undoes it (G13)."""
        if self.stopping:
            return
        self.stopping = True
        self.exit_status = status
        self.snapshot_wanted = True
        self.log.message("stopping")
        self.tell_manager("STOPPING=1")
        if self._nursery is not None:
            self._nursery.start_soon(self._shut_down)

    def essential_ended(self, service: Service, ending: Ending) -> None:
        """superd is there for this one's sake, as a container is for its main process."""
        if not self.stopping:
            status = ending.exit_status(service.spec.restart.success_status)
            self.log.message(
                f"is essential and has ended: {ending}; stopping everything, exit status {status}",
                service=service.name, level="notice" if status == 0 else "err",
            )  # fmt: skip
            self.shut_down(status)

    async def _drain(self) -> None:
        """Live connections get time to end; who comes now waits in the backlog."""
        if not self.drain_s:
            return
        for service in self.services.values():
            service.hold_clients()
        live = [acceptor for service in self.services.values() if (acceptor := service.acceptor) is not None]
        if any(service.busy() for service in live):
            self.log.message(f"draining: {sum(service.count() for service in live)} connections, {self.drain_s:g} s")
            self.log.flush()
        with trio.move_on_after(self.drain_s):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._cancel_when, self.hurry, nursery.cancel_scope)
                for service in live:
                    while service.busy():
                        await service.changed.wait()
                nursery.cancel_scope.cancel()

    async def _shut_down(self) -> None:
        await self._drain()
        limit_s = self.snapshot.daemon.stop_timeout_s
        with trio.move_on_after(limit_s):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._cancel_when, self.hurry, nursery.cancel_scope)
                self.dependencies.stop_all()
                for service in self.leaving:
                    self.guard(lambda _, service=service: service.ask_stop(), 0)  # type: ignore[misc]
                self.timers.after(limit_s * _TURN_TO_STOP, self.dependencies.hurry)
                self.end_of_turn()
                for service in self.everything():
                    while not service.is_stopped():
                        await service.changed.wait()
                with trio.move_on_after(_NAMELESS_S):
                    await self.processes.end(self.processes.all, signal.SIGTERM)
                nursery.cancel_scope.cancel()
        with trio.move_on_after(FINAL_WAIT_S):
            await self.processes.end(self.processes.all, signal.SIGKILL)
        left = self.processes.all()
        if left:
            self.log.message(f"unkillable, left behind: {', '.join(str(row.pid) for row in left)}", level="err")
        for closes in (*self.everything(), self.syslog, self.processes):
            self.guard(lambda _, closes=closes: closes.close(), 0)  # type: ignore[misc]
        self.log.message("stopped")
        self.tell_manager(f"EXIT_STATUS={self.exit_status}")
        self.end_of_turn()
        self._done.set()

    @staticmethod
    async def _cancel_when(event: trio.Event, scope: trio.CancelScope) -> None:
        await event.wait()
        scope.cancel()

    def end_service(self, service: Service, then: Callable[[], None]) -> None:
        """End every process of a service in the background, then call `then`."""

        async def end() -> None:
            await self.processes.end_all(service)
            self.guard(lambda _: then(), 0)
            self.end_of_turn()

        if self._nursery is not None:
            self._nursery.start_soon(end)

    # -- questions and orders (control.py, signals)

    def statistics(self) -> list[Statistics]:
        found = [service.statistics() for service in self.services.values()]
        found += [service.statistics() for service in self.leaving if service.name not in self.services]
        found += [
            Statistics(
                name, State.BAD_CONFIG.value, self._broken_since[name], None, 0, 0, 0, (), reason.splitlines()[0]
            )
            for name, reason in self.snapshot.broken.items()
        ]
        # One of each name: those that leave may have been several of one.
        found = list({row.name: row for row in reversed(found)}.values())
        return sorted(found, key=lambda row: row.name)


def _makes_sense(row: dict[str, Any]) -> bool:
    """Whether what was deposited about a service is what every service deposits."""
    kinds = {"wish": bool, "state": str, "note": str, "total": int, "restarts": int, "endings": list}
    well = all(isinstance(row.get(name), kind) for name, kind in kinds.items())
    return well and row["state"] in [state.value for state in State]
