"""What programs send to syslog(3) becomes lines of the services that they belong to.

The socket is the keeper's too: while there is no manager senders wait, and nothing is lost. Whose a datagram is the
kernel says (SCM_CREDENTIALS), never its text.
"""

from __future__ import annotations

import functools
import os
from typing import TYPE_CHECKING

from superd.core import syslog as form
from superd.core.spec import Address, SocketSpec
from superd.manager import environment
from superd.manager.keeperlink import Inheritance
from superd.manager.listeners import Listener, Listeners
from superd.system import syslog, tree

if TYPE_CHECKING:
    from superd.manager.supervisor import Supervisor

_DATAGRAMS_PER_TURN = 64
_SENDERS_KEPT = 4096
_START_S = 0.1
_LAST_EVENTS = 64  # further back a pid may have been another's
_DEEPEST = 64  # process trees that are looked up


class Syslog:
    """`bind()`, and lines come. path: None for none."""

    def __init__(self, supervisor: Supervisor, path: str | None) -> None:
        self.supervisor = supervisor
        specs = () if path is None else (
            SocketSpec(Address("unix-dgram", path=path), "syslog", mode=0o666, pass_credentials=True),
        )  # fmt: skip
        self.listeners = Listeners(
            None, specs, os.geteuid(), supervisor.keeper, supervisor.watch, supervisor.timers, supervisor.log,
            self._watch,
        )  # fmt: skip
        # pid -> when it was started, its uid, and the service: a process that has ended since can still be told.
        self._senders: dict[int, tuple[int, int, str | None]] = {}
        self._looked_again = False  # in this turn
        self._mains: dict[int, str] | None = None  # of this turn
        self._early: list[syslog.Datagram] = []

    def bind(self, inheritance: Inheritance) -> None:
        self.listeners.bind(inheritance, {})
        self._watch()

    def close(self) -> None:
        for listener in self.listeners.open:
            self._readable(listener, 0)  # last words
        self._log_early()
        self.listeners.close()

    def _watch(self) -> None:
        for listener in self.listeners.open:
            self.listeners.watch_one(listener, functools.partial(self._readable_later, listener))

    def _readable_later(self, listener: Listener, events: int) -> None:
        """When the keeper has been heard: a process may say something in the turn in which its start is told."""
        self.supervisor.later(functools.partial(self._readable, listener, events))

    def _readable(self, listener: Listener, events: int) -> None:
        self._looked_again, self._mains = False, None
        for _ in range(_DATAGRAMS_PER_TURN):
            found = syslog.receive(listener.socket) if listener.fd >= 0 else None
            if found is None:
                return
            self._log(found)

    def _log(self, found: syslog.Datagram) -> None:
        service = self._service_of(found.pid, found.uid)
        row = tree.look(found.pid) if service is None and found.pid else None
        if service is None and found.pid and (row is None or row.parent == os.getppid()):
            if not self._early:
                self.supervisor.timers.after(_START_S, self._log_early)
            self._early.append(found)  # the keeper may not have told of its start, nor of its end
        else:
            self._record(found, service)

    def _log_early(self) -> None:
        early, self._early = self._early, []
        self._mains = None
        for found in early:
            self._record(found, self._service_of(found.pid, found.uid))

    def _record(self, found: syslog.Datagram, service: str | None) -> None:
        entry = form.parse(found.data)
        text = entry.text
        if service is None and entry.tag:
            text = f"{entry.tag}: {text}"
        self.supervisor.log.record(
            "output", text, level=entry.level, service=service, pid=found.pid or None, source="syslog",
            tag=entry.tag or None, uid=found.uid if service is None else None,
        )  # fmt: skip

    def _service_of(self, pid: int, uid: int) -> str | None:
        """By the process; by the user where it has ended already and only one service runs as that user."""
        row = tree.look(pid) if pid else None
        known = self._senders.get(pid)
        if known is not None and known[1] == uid and (row is None or known[0] == row.started):
            return known[2]
        if row is None:
            return self._service_that_had(pid) or self._service_of_user(uid)
        service = self._service_above(row) or (
            self._service_of_user(uid) if row.zombie else self._service_by_any_sign(pid)
        )
        if service is None and row.parent == os.getppid():
            return None  # its start may not be told yet
        if len(self._senders) >= _SENDERS_KEPT:
            self._senders.clear()
        self._senders[pid] = row.started, uid, service
        return service

    def _service_above(self, row: tree.Process) -> str | None:
        """The service whose main process this is, or that of its session or of a process above it."""
        mains = self._main_processes()
        for _ in range(_DEEPEST):
            owner = mains.get(row.pid) or mains.get(row.session)
            above = tree.look(row.parent) if owner is None and row.parent > 1 else None
            if above is None:
                return owner
            row = above
        return None

    def _main_processes(self) -> dict[int, str]:
        if self._mains is None:
            services = self.supervisor.services.values()
            self._mains = {pid: service.name for service in services for pid in service.mains()}
        return self._mains

    def _service_that_had(self, pid: int) -> str | None:
        """Of a process that is no more: last words are read after the end, and often the manager knows that already."""
        if pid in (mains := self._main_processes()):
            return mains[pid]
        for record in reversed(self.supervisor.log.events()[-_LAST_EVENTS:]):
            if record.event == "exit" and record.pid == pid:
                return record.service
        return None

    def _service_by_any_sign(self, pid: int) -> str | None:
        """For what has left its parents: a look at all processes."""
        processes = self.supervisor.processes
        while True:
            for name, rows in processes.by_service().items():
                if any(row.pid == pid for row in rows):
                    return name or None
            if self._looked_again:
                return None
            self._looked_again = True  # it may be younger than the last look; once a turn
            processes.forget()

    def _service_of_user(self, uid: int) -> str | None:
        if uid in (0, os.geteuid()):
            return None
        services = self.supervisor.services.values()
        found = [service.name for service in services if environment.trusted_uid(service.spec) == uid]
        return found[0] if len(found) == 1 else None
