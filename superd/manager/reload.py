"""Live configuration: what changes on disk is carried out, and what runs is hurt by none of it.

    hint (inotify, HUP, superctl) -> read in a thread -> diff -> prepare: bind what is new -> commit

A reload is a transaction for each service: what a new version needs is bound before anything old is closed, and a
version that cannot be had leaves the old one as it is. One reload runs at a time; what is asked for meanwhile is one
more after it (FAILURES F9, K17). Sockets whose address and type stay are never closed, also when they go from one
service to another.
"""

from __future__ import annotations

import contextlib
import gc
import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import outcome
import trio

from superd.core.collision import collide
from superd.core.diff import Entry, Plan, diff, is_same_socket, match_sockets
from superd.core.kinds import NAME
from superd.core.lifecycle import State
from superd.core.spec import SocketSpec
from superd.manager import environment
from superd.manager.configuration import Configuration, Reading, describe, unit_of
from superd.manager.keeperlink import Inheritance
from superd.manager.listeners import Listener
from superd.manager.process import ProcessService
from superd.manager.proxy import ProxyService
from superd.manager.service import Service
from superd.manager.syslog import Syslog
from superd.manager.watch import Timer
from superd.system import holders, inotify, sockets
from superd.system.configdir import Hints, is_ignored
from superd.system.inotify import Inotify

if TYPE_CHECKING:
    from superd.manager.supervisor import Supervisor

_QUIET_S, _QUIET_MAX_S = 0.2, 1.0
_WRITING_S, _WRITING_MAX_S = 1.0, 10.0  # open for writing: CLOSE_WRITE is to come
_SCAN_S = 5.0  # without inotify
_SLOW_S = 10.0
_RETRY_FIRST_S, _RETRY_MAX_S = 1.0, 30.0
_ADDED_BYTES = 1 << 16
_LINES = 10  # of a plan in one record


@dataclass(slots=True)
class Outcome:
    """What came of a reload. refused: unit -> why it could not be carried out; applied: whether the rest was."""

    plan: Plan
    reading: Reading
    refused: dict[str, str] = field(default_factory=dict)
    applied: bool = False
    is_news: bool = False  # not only what could not be carried out before either


@dataclass(slots=True)
class _Move:
    """One entry with its sockets. found: by index of the new spec, listeners that stay or were open, or new ones."""

    entry: Entry
    service: Service | None
    found: dict[int, list[Listener] | list[sockets.Bound]] = field(default_factory=dict)

    @property
    def wanted(self) -> tuple[SocketSpec, ...]:
        new = self.entry.new
        if new is None:
            return ()
        by_hand = self.service is not None and self.service.state is not State.DISABLED and not self.entry.is_replaced
        return new.sockets if new.enabled or by_hand else ()


class Reloader:
    """`run()` is a task for the manager's life. watch: whether to follow the files, if superd.toml says so too."""

    def __init__(self, supervisor: Supervisor, configuration: Configuration, *, watch: bool) -> None:
        self.supervisor, self.configuration, self.may_watch = supervisor, configuration, watch
        self._lock = trio.Lock()
        self._limiter = trio.CapacityLimiter(1)
        self._wanted = trio.Event()
        self._hints: set[str] = set()  # to be looked at now
        self._by_order = False
        self._inotify: Inotify | None = None
        self._places: dict[str, dict[str | None, set[str]]] = {}
        self._quiet: dict[str, tuple[float, float]] = {}  # hint -> when it came first, when it is due
        self._timer: Timer | None = None
        self._scan: Timer | None = None
        self._slow: Timer | None = None
        self._reading_since: float | None = None
        self._complained = False
        self._retry: Timer | None = None
        self._retry_s = _RETRY_FIRST_S
        self._said: set[str] = set()
        self._refused: dict[str, str] = {}  # the last time
        self._on_disk: set[str] = set()  # units that are others on disk, where nobody follows them
        self._nursery: trio.Nursery | None = None
        self._stored = -1  # fd of what the keeper has
        self._stored_whole = self._stored_bytes = 0  # without changes, and with them

    # -- wishes

    def request(self, hints: Iterable[str] = ("",), *, by_order: bool = False) -> None:
        """One more reload, after the one that runs. by_order: somebody asked, and the machine is looked at too."""
        self._hints.update(hints)
        self._by_order = self._by_order or by_order
        self._wanted.set()

    def begin(self) -> None:
        """Have the fd of the watch before superd is ready: it may be the last one that there is."""
        if self.watching:
            with contextlib.suppress(OSError):  # the first look at the files says so
                self._open()

    def _open(self) -> None:
        if self._inotify is None and self._scan is None:
            self._inotify = Inotify()
            self.supervisor.watch.add(self._inotify.fileno(), self._happened)

    async def run(self) -> None:
        gc.freeze()  # thousands of services are not looked through at each collection; a reload makes some of those
        gc.enable()
        async with trio.open_nursery() as self._nursery:
            for template, instances in self.configuration.extra.items():
                for instance in instances:
                    self._nursery.start_soon(self._until_stopped, template + instance)
            if self.watching:
                self.request()  # what has changed since it was read; the directories are watched from then on
            while True:
                await self._wanted.wait()
                self._wanted = trio.Event()
                result = await outcome.acapture(self._reload_wanted)
                self.supervisor.guard(lambda _, result=result: result.unwrap(), 0)  # type: ignore[misc]
                self.supervisor.end_of_turn()

    async def _reload_wanted(self) -> None:
        async with self._lock:
            hints, self._hints = frozenset(self._hints), set()
            by_order, self._by_order = self._by_order, False
            try:
                reading = await self._read(None if "" in hints else hints, look_again=by_order)
            except OSError:  # out of fds or memory: whoever misses them most has said so
                self._hints |= hints
                self._by_order = by_order
                self.supervisor.timers.after(_RETRY_FIRST_S, self._wanted.set)
                return
            found = self._settle(reading, strict=False)
            if by_order or found.is_news:
                self._record(found)

    async def reload(self, *, strict: bool, dry_run: bool, by: str = "") -> Outcome:
        """By order: everything is looked at. strict: all or nothing; by: who wants it, for the log."""
        async with self._lock:
            reading = await self._read(None, look_again=True)
            if dry_run:
                return Outcome(diff(self.configuration.snapshot, reading.snapshot), reading)
            found = self._settle(reading, strict=strict)
            self._record(found, by)
            self.supervisor.end_of_turn()
            return found

    async def look_again(self) -> None:
        """Not at the files but at the machine: what was wrong with them may be right by now."""
        async with self._lock:
            found = self._settle(await self._read(frozenset(), look_again=True), strict=False)
            if found.is_news:
                self._record(found)

    async def _read(self, hints: Hints | None, *, look_again: bool) -> Reading:
        self._reading_since = trio.current_time()
        if self._slow is None:  # one timer for many reloads
            self._slow = self.supervisor.timers.after(_SLOW_S, self._look_whether_slow)
        try:
            return await trio.to_thread.run_sync(
                partial(self.configuration.read, hints, look_again=look_again),
                limiter=self._limiter, abandon_on_cancel=True,
            )  # fmt: skip
        finally:
            self._reading_since = None

    def _look_whether_slow(self) -> None:
        """A disk that does not answer holds up the reload, and nothing else (F17)."""
        self._slow = None
        if self._reading_since is not None:
            left_s = self._reading_since + _SLOW_S - trio.current_time()
            if left_s > 0:
                self._slow = self.supervisor.timers.after(left_s, self._look_whether_slow)
            else:
                text = "the files still cannot be read; services go on as they are"
                self.supervisor.log.message(text, level="warning")

    # -- one reload

    def _settle(self, reading: Reading, *, strict: bool) -> Outcome:
        supervisor, configuration = self.supervisor, self.configuration
        plan = diff(configuration.snapshot, reading.snapshot)
        found = Outcome(plan, reading)
        self._complain(reading)
        if supervisor.stopping or (strict and reading.has_errors):
            return found  # G13
        if plan.entries:
            supervisor.tell_reloading()
            moves, refused = self._prepare(plan, strict=strict)
            while refused:
                found.refused |= refused
                if strict:
                    supervisor.tell_reloaded()
                    return found
                names = {entry.name for entry in plan.entries if unit_of(entry.name) in found.refused}
                plan = plan.without(frozenset(names))
                moves, refused = self._prepare(plan)
            news = {name: why for name, why in found.refused.items() if self._refused.get(name) != why}
            found.is_news = bool(plan or news)
            self._refused = found.refused
            for name, why in news.items():
                supervisor.log.message(f"{why}; what ran before goes on", level="err", service=name)
            changed = configuration.accept(reading, found.refused)
            # Before anything is done: a manager that follows this one finishes it.
            if changed:
                self.store()
            supervisor.take_snapshot(configuration.snapshot)
            self._commit(moves)
            supervisor.tell_reloaded()
        else:
            found.is_news = bool(plan)
            self._refused = {}
            if configuration.accept(reading):
                self.store()
            supervisor.take_snapshot(configuration.snapshot)
        self._daemon_changed(plan.daemon)
        self._on_disk.clear()
        found.applied = True
        self._follow(reading)
        self._try_again(bool(found.refused))
        return found

    def store(self) -> None:
        """Let the keeper have what is in force. It holds the same file: a change is only added to it, until there are
        more changes than there was in the beginning. Where there is no memory for it a next manager reads the disk."""
        changes = self._stored >= 0
        data = self.configuration.pack(changes=changes)
        try:
            if changes and self._stored_bytes + len(data) > 2 * self._stored_whole + _ADDED_BYTES:
                os.close(self._stored)
                self._stored, changes = -1, False
                data = self.configuration.pack()
            if not changes:
                self._stored = os.memfd_create("superd-sources", os.MFD_CLOEXEC)
                self._stored_whole, self._stored_bytes = len(data), 0
            view = memoryview(data)
            while view:
                written = os.pwrite(self._stored, view, self._stored_bytes)
                self._stored_bytes += written
                view = view[written:]
            if not changes:  # whole: a manager that is killed meanwhile leaves the one before
                self.supervisor.keeper.send("store", [self._stored], name="sources")
        except OSError as error:
            self.supervisor.log.message(f"cannot store what is in force: {error}", level="err")
            self.supervisor.keeper.send("drop", name="sources")

    def _prepare(self, plan: Plan, *, strict: bool = False) -> tuple[list[_Move], dict[str, str]]:
        """Everything that can fail. Nothing that runs notices. The second: unit -> why it cannot be carried out; then
        the first is empty, and nothing that was opened is left."""
        moves = [_Move(entry, self.supervisor.services.get(entry.name)) for entry in plan.entries]
        freed: list[Listener] = []
        waiting: set[tuple[str, int]] = set()  # the old version waits for this address as well
        for move in moves:
            if move.service is None:
                continue
            listeners = move.service.listeners
            pairs = match_sockets(listeners.specs, move.wanted)
            staying = {was: index for index, was in enumerate(pairs) if was is not None}
            waiting |= {(move.entry.name, index) for was, index in staying.items() if was in listeners.waiting}
            for listener in listeners.open:
                index = staying.get(listeners.specs.index(listener.spec))
                if index is None:
                    freed.append(listener)
                else:
                    move.found.setdefault(index, []).append(listener)  # type: ignore[arg-type]
        refused: dict[str, str] = {}
        for move in moves:
            why = self._find_sockets(move, freed, waiting, strict=strict) or self._obstacle(move.entry)
            if why:
                refused.setdefault(unit_of(move.entry.name), why)
        if not refused:
            return moves, {}
        for move in moves:
            for index, rows in move.found.items():
                for one in rows:
                    if isinstance(one, sockets.Bound):
                        if one.identity is not None:
                            links = move.wanted[index].symlinks
                            sockets.remove_unix_path(one.address.path or "", one.identity, links)
                        os.close(one.fd)
        return [], refused

    def _find_sockets(self, move: _Move, freed: list[Listener], waiting: set[tuple[str, int]], *, strict: bool) -> str:
        """Listeners of services that give theirs up, else new ones; why not, if the service cannot wait for one."""
        known = self._refused.get(unit_of(move.entry.name), "")
        for index, spec in enumerate(move.wanted):
            if index in move.found:
                continue
            # Port 0 is nobody's address: who asks for any port does not want the one that others know.
            carried = [one for one in freed if is_same_socket(one.spec, spec) and spec.address.port != 0]
            carried = [one for one in carried if one.spec is carried[0].spec]  # localhost is two
            if carried:
                move.found[index] = carried
                freed[:] = [one for one in freed if one not in carried]
                continue
            try:
                move.found[index] = sockets.bind_listener(
                    spec, inherited=self.supervisor.inherited, trusted_uid=_trusted_uid(move),
                    find_holder=None if known else holders.find_holder,  # it reads all of /proc
                )  # fmt: skip
            except sockets.BindError as error:
                follows = any(collide(one.spec, spec) for one in freed)  # it is free when that has closed
                added = move.entry.old is None or not move.entry.old.enabled
                if not (follows or (added and not strict) or (move.entry.name, index) in waiting):
                    why = f"cannot bind {spec.address}: {error}"
                    return known if known.startswith(why) else why
        return ""

    @staticmethod
    def _obstacle(entry: Entry) -> str:
        """What the old version is better than (K11)."""
        if entry.new is None or entry.old is None or entry.new.environment_file is None:
            return ""
        try:
            environment.read_file(entry.new.environment_file)
        except (OSError, ValueError) as error:
            return f"cannot start: {error}"
        return ""

    def _commit(self, moves: list[_Move]) -> None:
        owners = {id(one): move.service.listeners for move in moves if move.service is not None
                  for one in move.service.listeners.open}  # fmt: skip
        for move in moves:
            listeners = move.service.listeners if move.service is not None and not move.entry.is_replaced else None
            for rows in move.found.values():
                for one in rows:
                    if isinstance(one, Listener) and owners[id(one)] is not listeners:
                        owners[id(one)].give_up(one)
        for move in moves:
            if move.service is not None and (move.entry.new is None or move.entry.is_replaced):
                self._see_off(move.service, replaced=move.entry.is_replaced)
            elif move.service is not None:
                move.service.listeners.keep_only([one for rows in move.found.values() for one in rows])
        for move in moves:
            self.supervisor.guard(lambda _, move=move: self._carry_out(move), 0)  # type: ignore[misc]
        self.supervisor.snapshot_wanted = True

    def _carry_out(self, move: _Move) -> None:
        entry, service = move.entry, move.service
        if entry.new is None:
            return
        if service is None or entry.is_replaced:
            paused = service is not None and service.listeners.paused
            service = self.supervisor.add(entry.new)
            service.listeners.paused = paused and not service.why_not_pausable()
            if entry.new.enabled:
                service.listeners.replace(entry.new.sockets, move.found)
            predecessors = self._predecessors(entry.name)
            for one in predecessors:
                if one.draining:
                    one.ask_stop()
            if not predecessors:
                service.begin()
            return
        if service.state is State.DISABLED:
            service.listeners.specs = entry.new.sockets
            return service.apply(entry.new)
        service.listeners.trusted_uid = _trusted_uid(move)
        service.listeners.replace(entry.new.sockets, move.found)
        service.apply(entry.new)
        if isinstance(service, ProcessService) and (entry.action == "restart" or service.state is State.FAILED):
            service.renew()
        service.announce()

    # -- services that leave

    def _predecessors(self, name: str) -> list[Service]:
        """Processes of an earlier service of this name, which must have ended before it begins: they share its notify
        socket, and what one of them is told all processes of the name are."""
        return [one for one in self.supervisor.leaving if one.name == name and isinstance(one, ProcessService)]

    def _see_off(self, service: Service, *, replaced: bool) -> None:
        """Its clients go on until they leave, its process is stopped in order; then it is gone. replaced: another
        service of the name cannot begin before that."""
        supervisor = self.supervisor
        del supervisor.services[service.name]
        supervisor.leaving.append(service)
        service.leave()
        service.nudge()  # who waits for the name has another service to wait for
        if isinstance(service, ProxyService) and not replaced:
            service.ask_drain()
        elif isinstance(service, ProcessService):
            service.ask_stop()
        if self._has_ended(service) or self._nursery is None:
            self._gone(service)
        else:
            self._nursery.start_soon(self.wait_for_end, service)

    @staticmethod
    def _has_ended(service: Service) -> bool:
        return service.is_stopped() if isinstance(service, ProcessService) else not service.busy()

    async def wait_for_end(self, service: Service) -> None:
        while not self._has_ended(service):
            await service.changed.wait()
        self.supervisor.guard(lambda _: self._gone(service), 0)
        self.supervisor.end_of_turn()

    def _gone(self, service: Service) -> None:
        supervisor = self.supervisor
        supervisor.leaving.remove(service)
        service.close()
        service.enter(State.STOPPED)
        service.wake()  # whoever waits for it
        successor = supervisor.services.get(service.name)
        if successor is not None and not self._predecessors(service.name) and not supervisor.stopping:
            if isinstance(service, ProcessService):
                successor.begin()
        elif successor is None:
            supervisor.log.forget(service.name)

    # -- superd.toml

    def _daemon_changed(self, keys: tuple[str, ...]) -> None:
        supervisor, daemon = self.supervisor, self.configuration.snapshot.daemon
        if {"log", "log_level"} & set(keys):
            supervisor.configure_log(daemon)
        if {"control_mode", "control_group", "control_admins"} & set(keys) and supervisor.control is not None:
            supervisor.control.set_mode()
        if "syslog" in keys:
            supervisor.syslog.close()
            supervisor.syslog = Syslog(supervisor, daemon.syslog)
            supervisor.syslog.bind(Inheritance())
        if "control" in keys:
            supervisor.log.message("superd.toml: `control` needs a restart of superd", level="warning")

    # -- templates

    async def instantiate(self, name: str) -> str | None:
        """Let there be an instance of a template in force that its file does not name, if there is such a template and
        not such an instance. Returns what is wrong with it then."""
        template = unit_of(name)
        instance = name.removeprefix(template)
        configuration = self.configuration
        async with self._lock:
            if name in self.supervisor.services or self.supervisor.stopping:
                return None
            if not NAME.fullmatch(instance) or not configuration.has(template):
                return None
            before = configuration.extra
            configuration.extra = {**before, template: (*before.get(template, ()), instance)}
            reading = configuration.read_in_force()
            if name not in reading.snapshot.services:
                configuration.extra = before
                wrong = reading.snapshot.broken.get(name)
                configuration.read_in_force()
                return wrong or "it is not a service"
            self._settle_in_force(reading)
        if self._nursery is not None:
            self._nursery.start_soon(self._until_stopped, name)
        return None

    async def _until_stopped(self, name: str) -> None:
        """An instance that was started by hand is there until it is stopped by hand."""
        template = unit_of(name)
        while (service := self.supervisor.services.get(name)) is not None:
            if not service.wish_up and service.is_stopped():
                break
            await service.changed.wait()
        async with self._lock:
            left = tuple(one for one in self.configuration.extra.get(template, ()) if template + one != name)
            self.configuration.extra = {**self.configuration.extra, template: left}
            self._settle_in_force(self.configuration.read_in_force())

    def _settle_in_force(self, reading: Reading) -> None:
        """A change of what is in force that did not come from a file."""
        plan = diff(self.configuration.snapshot, reading.snapshot)
        moves, _ = self._prepare(plan)  # services come and go; none is changed, so none is refused
        self.configuration.accept(reading)
        self.supervisor.take_snapshot(self.configuration.snapshot)
        self.store()
        self._commit(moves)
        self.supervisor.end_of_turn()

    # -- following the files

    @property
    def watching(self) -> bool:
        return self.may_watch and self.configuration.snapshot.daemon.watch

    async def look(self) -> None:
        """Where nobody follows the files: which are others now, for whoever wants to be told."""
        if not self.watching and not self._lock.locked():
            async with self._lock:
                with contextlib.suppress(OSError):  # out of fds: what was known last
                    self._on_disk = await trio.to_thread.run_sync(
                        self.configuration.changed_on_disk, limiter=self._limiter, abandon_on_cancel=True
                    )

    def note_of(self, name: str) -> str:
        unit = unit_of(name)
        if found := self.configuration.notes.get(unit):
            return found
        return "changed on disk; `superctl reload` takes it over" if unit in self._on_disk else ""

    def _follow(self, reading: Reading) -> None:
        if not self.watching:
            return self._stop_following()
        self._places = reading.watch
        try:
            self._open()
            wanted = {path: None in names for path, names in reading.watch.items()}
            if self._inotify is not None and self._inotify.watch(wanted):
                self.request()  # what happened there before it was watched
        except OSError as error:
            self._stop_following()
            if not self._complained:
                self._complained = True
                self.supervisor.log.message(
                    f"cannot watch the files: {error.strerror}; looking every {_SCAN_S:g} s instead", level="warning"
                )
        if self._inotify is None and self._scan is None:
            self._scan = self.supervisor.timers.after(_SCAN_S, self._scan_again)

    def _scan_again(self) -> None:
        self._scan = None
        self.request()

    def _stop_following(self) -> None:
        if self._inotify is not None:
            self.supervisor.watch.remove(self._inotify.fileno())
            self._inotify.close()
            self._inotify = None
        for timer in (self._timer, self._scan):
            if timer is not None:
                timer.cancel()
        self._timer = self._scan = None
        self._quiet.clear()

    def _happened(self, _: int) -> None:
        assert self._inotify is not None
        now = trio.current_time()
        for event in self._inotify.read():
            delay_s, limit_s = _QUIET_S, _QUIET_MAX_S
            if event.directory is None or not event.name:
                self._hint("", now, delay_s, limit_s)
                continue
            if event.mask & (inotify.CREATE | inotify.MODIFY) and _is_being_written(event):
                delay_s, limit_s = _WRITING_S, _WRITING_MAX_S
            names = self._places.get(event.directory, {})
            for hint in names.get(event.name, ()):
                self._hint(hint, now, delay_s, limit_s)
            for hint in names.get(None, ()):
                if not hint.endswith("/"):
                    self._hint(hint, now, delay_s, limit_s)
                elif not is_ignored(event.name):
                    self._hint(f"{hint}{event.name.removesuffix('.d')}", now, delay_s, limit_s)
        self._arm()

    def _hint(self, hint: str, now: float, delay_s: float, limit_s: float) -> None:
        first = self._quiet.get(hint, (now, 0.0))[0]
        self._quiet[hint] = first, min(now + delay_s, max(first + limit_s, now))

    def _arm(self) -> None:
        due = min((when for _, when in self._quiet.values()), default=None)
        if due is not None and (self._timer is None or self._timer.when > due):
            if self._timer is not None:
                self._timer.cancel()
            self._timer = self.supervisor.timers.after(max(due - trio.current_time(), 0.0), self._quiet_is_over)

    def _quiet_is_over(self) -> None:
        self._timer = None
        now = trio.current_time()
        due = [hint for hint, (_, when) in self._quiet.items() if when <= now]
        for hint in due:
            del self._quiet[hint]
        if due:
            self.request(due)
        self._arm()

    def _try_again(self, wanted: bool) -> None:
        """A version that could not be carried out is tried again, as an address is that is not free."""
        if self._retry is not None:
            self._retry.cancel()
            self._retry = None
        if wanted:
            self._retry = self.supervisor.timers.after(self._retry_s, self.request)
            self._retry_s = min(self._retry_s * 2, _RETRY_MAX_S)
        else:
            self._retry_s = _RETRY_FIRST_S

    # -- what is said

    def _complain(self, reading: Reading) -> None:
        """Each thing that is wrong once, for as long as it is."""
        said, self._said = self._said, set()
        for problem in reading.problems:
            text = str(problem)
            self._said.add(text)
            if text not in said and problem.is_error:
                self.supervisor.log.message(text, level="err", service=problem.service)

    def remember(self, texts: Iterable[str]) -> None:
        """What has been said already, when the files were read first."""
        self._said.update(texts)

    def _record(self, found: Outcome, by: str = "") -> None:
        errors = len(describe(found.reading.problems))
        lines = [str(entry) for entry in found.plan.entries]
        lines += [f"superd.toml: {key}" for key in found.plan.daemon]
        if self.supervisor.stopping:
            text = "nothing was changed: superd is stopping"
        elif not found.applied:
            text = "nothing was changed, because all or nothing was asked for"
        elif lines:
            more = f"; and {len(lines) - _LINES} more" if len(lines) > _LINES else ""
            text = "; ".join(lines[:_LINES]) + more
        else:
            text = "nothing has changed"
        if errors:
            text += f"; {errors} error{'' if errors == 1 else 's'} in the files"
        self.supervisor.log.record(
            "reload",
            text,
            level="warning" if errors or found.refused else "notice",
            changed=len(lines),
            errors=errors,
            by=by or None,
        )


def _is_being_written(event: inotify.Event) -> bool:
    """A new name: CLOSE_WRITE follows, unless it is a directory, a link, or a file that was complete before."""
    if event.mask & inotify.ISDIR:
        return False
    if event.mask & inotify.MODIFY:
        return True
    try:
        facts = os.lstat(os.path.join(event.directory or "", event.name))
    except OSError:
        return False
    return stat.S_ISREG(facts.st_mode) and facts.st_nlink == 1


def _trusted_uid(move: _Move) -> int:
    assert move.entry.new is not None
    return environment.trusted_uid(move.entry.new)


def outcome_parameters(found: Outcome) -> dict[str, Any]:
    """Of Reload and Diff, varlink."""
    entries = [
        {
            "name": entry.name, "action": entry.action, "keys": list(entry.keys),
            "why": found.refused.get(unit_of(entry.name)),
        }
        for entry in found.plan.entries
    ]  # fmt: skip
    return {
        "entries": entries, "daemon": list(found.plan.daemon), "problems": describe(found.reading.problems),
        "applied": found.applied,
    }  # fmt: skip
