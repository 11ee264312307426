"""All services: what they share, signals, shutdown, and the one error boundary.

An exception inside one service is caught here, once, logged with its traceback, and that service is FAILED; the
others do not notice (F7). There is no other `except Exception` in the manager.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import time
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import trio

from superd.core.lifecycle import State
from superd.core.spec import ServiceSpec, Snapshot
from superd.manager.activation import ConnectionService
from superd.manager.keeperlink import Inheritance, KeeperLink
from superd.manager.logs import Log
from superd.manager.service import ProcessService, Service, Statistics
from superd.manager.spawners import Spawners
from superd.manager.stopping import FINAL_WAIT_S, Processes
from superd.manager.watch import Callback, Timer, Timers, Watch

if TYPE_CHECKING:
    from superd.manager.control import ControlServer

EX_CANNOT_BIND = 71
_TRY_LATER_S = 0.1
_STRAYS_S = 1.0  # after a take-over; the spawners have told what they have by then
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
        self.strict = False
        self.form = "text"  # of the log, for what the keeper has to say
        self.control: ControlServer | None = None
        self.processes = Processes(self)
        self.services: dict[str, Service] = {}
        self.instances: dict[int, Service] = {}  # the keeper's children by id
        self.snapshot_wanted = False
        self.drained = 0
        self.stopping = False
        self.exit_status = 0
        self.hurry = trio.Event()
        self._generation = generation
        self._connection = generation << 40
        self._instance = generation << 20
        self._later: list[Callable[[], None]] = []
        self._log_timer: Timer | None = None
        self._log_blocked = False
        self._nursery: trio.Nursery | None = None
        self._done = trio.Event()
        self._ready_at = 0.0
        keeper.handlers |= {
            "started": self._started, "failed": self._failed, "exited": self._exited, "signal": self._signal,
        }  # fmt: skip
        keeper.gone = self._keeper_gone

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
        text = "".join(traceback.format_exception(error)).strip()
        where = traceback.extract_tb(error.__traceback__)[-1]
        self.log.error_limited(
            ("internal", where.filename, where.lineno), f"internal error: {error!r}; superd goes on", traceback=text
        )
        error.__traceback__ = None

    def later(self, callback: Callable[[], None]) -> None:
        """At the end of this turn, before anything else happens."""
        self._later.append(callback)

    def end_of_turn(self) -> None:
        while self._later:
            callbacks, self._later = self._later, []
            for callback in callbacks:
                self.guard(lambda _, callback=callback: callback(), 0)  # type: ignore[misc]
        self.processes.forget()
        if self.snapshot_wanted:
            self.snapshot_wanted = False
            self._deposit()
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

    async def _wait_for_log(self, fd: int) -> None:
        try:
            await trio.lowlevel.wait_writable(fd)
        except OSError:
            await trio.sleep(1)  # not pollable
        self._log_blocked = False
        self.end_of_turn()

    # -- life

    def add(self, spec: ServiceSpec) -> Service:
        kind = ConnectionService if spec.takes_connections else ProcessService
        service = self.services[spec.name] = kind(self, spec)
        return service

    async def run(self) -> int:
        """Bind, adopt, start, serve; returns superd's exit status when everything has stopped."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            self._begin()
            nursery.start_soon(self.watch.run)
            nursery.start_soon(self.timers.run)
            if self.control is not None:
                nursery.start_soon(self.control.serve)
            await self._done.wait()
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
        inherited = {
            name.partition(":")[2]: inheritance.held.pop(name)
            for name in list(inheritance.held)
            if name.startswith("inherited:")
        }
        deposited: dict[str, Any] = json.loads(inheritance.snapshot)["services"] if inheritance.snapshot else {}
        for spec in self.snapshot.services.values():
            service = self.add(spec)
            self._restore(service, deposited.get(spec.name, {}))
            self.guard(lambda _, service=service: service.bind(inheritance, inherited), 0)  # type: ignore[misc]
        self._adopt_children(deposited)
        if self.strict and not inheritance.up and any(not s.listeners.complete for s in self.services.values()):
            self.log.message("cannot start: an address cannot be had, and --strict was given", level="err")
            self.shut_down(EX_CANNOT_BIND)
            return
        if self.control is not None:
            self.control.open()
        self._say_ready()
        for service in self.services.values():
            self.guard(lambda _, service=service: service.begin(), 0)  # type: ignore[misc]
        if inheritance.up:
            self.timers.after(_STRAYS_S, self._adopt_strays)
        self.snapshot_wanted = True
        self.end_of_turn()

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
        service.total, service.restarts = was["total"], was["restarts"]
        service.endings = was["endings"]
        if service.state is State.DISABLED and was["state"] != "disabled":
            service.state = State.STOPPED  # it had been started by hand
        if was["state"] in ("done", "failed", "stopped", "disabled"):
            service.state = State(was["state"])
            service.note = was["note"]
        if isinstance(service, ProcessService):
            service.history.tries = was["tries"]

    def _adopt_children(self, deposited: dict[str, Any]) -> None:
        """Processes that the keeper holds from earlier managers; those that ended meanwhile are told now."""
        for row in self.inheritance.children:
            service = self.services.get(row["tag"]["service"])
            log = self.inheritance.log_fds.get(row["id"])
            if isinstance(service, ProcessService) and service.instance is None:
                service.adopt(row, log, deposited.get(service.name, {}))
            elif isinstance(service, ConnectionService):
                tag = row["tag"]
                service.adopt(None, [tag["id"], row["pid"], service.name, tag["peer"], row["started"], True], log)
                self.instances[row["id"]] = service
            elif log is not None:
                os.close(log)
            if row["failure"] is not None:
                stage, errno, detail = row["failure"]
                self.later(
                    functools.partial(self._failed, {**row, "stage": stage, "errno": errno, "detail": detail}, [])
                )
            if row["status"] is not None:
                self.later(functools.partial(self._exited, dict(row), []))

    def _say_ready(self) -> None:
        services = [service for service in self.services.values() if service.spec.enabled]
        bound = sum(len(service.listeners.open) for service in services)
        ready = f"ready: {len(services)} services, {bound} sockets"
        if self.inheritance.up:
            self.log.message(f"manager {self._generation} took over: {ready.removeprefix('ready: ')}", level="notice")
        else:
            self.log.record("ready", ready)
        self._ready_at = time.monotonic()
        self.keeper.send("up", form=self.form)
        self.tell_manager(f"READY=1\nSTATUS={ready}")

    def tell_manager(self, text: str) -> None:
        """sd_notify(3) to the manager above superd, if there is one."""
        address = self.own_environment.get("NOTIFY_SOCKET", "")
        if address.startswith(("/", "@")) and len(address) < 108:
            self.keeper.send("notify", address=address, text=text)

    def _wake_log(self) -> None:
        self._log_timer = None
        self.end_of_turn()

    def _deposit(self) -> None:
        """For the next manager: what no file, no fd and no process can tell."""
        services = {
            service.name: {
                "wish": service.wish_up, "state": service.state.value, "note": service.note, "total": service.total,
                "restarts": service.restarts, "endings": service.endings,
                "tries": service.history.tries if isinstance(service, ProcessService) else 0,
            }
            for service in self.services.values()
        }  # fmt: skip
        try:
            self.keeper.deposit(json.dumps({"services": services}).encode())
        except OSError:
            self.snapshot_wanted = True  # no fd or memory for it (A1): at the end of the next turn

    def _try_later(self, again: Callable[[], None]) -> None:
        self.timers.after(_TRY_LATER_S, again)

    # -- the keeper's reports

    def _started(self, message: dict[str, Any], fds: list[int]) -> None:
        service = self.instances.get(message["id"])
        if isinstance(service, ProcessService):
            service.process_started(message["pid"])

    def _failed(self, message: dict[str, Any], fds: list[int]) -> None:
        service = self.instances.pop(message["id"], None)
        if isinstance(service, ProcessService):
            service.process_failed(message["stage"], message["errno"], message["detail"])

    def _exited(self, message: dict[str, Any], fds: list[int] | None = None) -> None:
        service = self.instances.pop(message["id"], None)
        self.keeper.send("forget", id=message["id"])
        if isinstance(service, ProcessService):
            service.process_exited(message["pid"], message["status"])
        elif isinstance(service, ConnectionService):
            service.process_exited(message["pid"], message["status"], message["id"])

    def _keeper_gone(self) -> None:
        """The keeper was killed: nobody can hold on to anything. End what would block the next superd's ports."""
        for service in self.services.values():
            if isinstance(service, ProcessService):
                for pid in service.mains():
                    try:
                        os.killpg(pid, signal.SIGTERM)
                    except OSError:
                        pass  # it has gone too
        os._exit(1)

    def _signal(self, message: dict[str, Any], fds: list[int]) -> None:
        signo = message["signo"]
        if signo in (signal.SIGTERM, signal.SIGINT):
            if self.stopping:
                self.hurry.set()
            else:
                self.shut_down()
        elif signo == signal.SIGQUIT:
            self.hurry.set()
            self.shut_down()
        elif signo == signal.SIGUSR1:
            for row in self.statistics():
                self.log.message(
                    f"{row.name}: {row.state}, {row.now} now, {row.total} in all"
                    + (f", pid {row.pid}" if row.pid else "") + (f" ({row.note})" if row.note else ""),
                    service=row.name,
                )  # fmt: skip
        elif signo == signal.SIGHUP:
            self.log.message("HUP: reloading while running is not supported yet; restart superd", level="warning")

    # -- stopping

    def shut_down(self, status: int = 0) -> None:
        """Stop everything in order, then exit. Final: nothing undoes it (G13)."""
        if self.stopping:
            return
        self.stopping = True
        self.exit_status = status
        self.log.message("stopping")
        self.tell_manager("STOPPING=1")
        if self._nursery is not None:
            self._nursery.start_soon(self._shut_down)

    async def _shut_down(self) -> None:
        limit_s = self.snapshot.daemon.stop_timeout_s
        with trio.move_on_after(limit_s):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._cancel_when, self.hurry, nursery.cancel_scope)
                for service in self.services.values():
                    self.guard(lambda _, service=service: service.ask_stop(), 0)  # type: ignore[misc]
                self.end_of_turn()
                for service in self.services.values():
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
        for service in self.services.values():
            service.close()
        self.log.message("stopped")
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
        found += [
            Statistics(name, State.BAD_CONFIG.value, self._ready_at, None, 0, 0, 0, (), reason.splitlines()[0])
            for name, reason in self.snapshot.broken.items()
        ]
        return sorted(found, key=lambda row: row.name)
