"""Between accept and hand-over: clients that must be known by name first, or must say something first.

A client in here counts for its source but takes no place and starts no process. Services without [access] and
first_byte_timeout have no gate, and their connections never come here.
"""

from __future__ import annotations

import functools
import os
import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from superd.core.admission import Verdict
from superd.core.spec import Access
from superd.manager import access
from superd.manager.listeners import Listener
from superd.manager.watch import Timer

if TYPE_CHECKING:
    from superd.manager.activation import ConnectionService

_CLIENTS = 1024  # at once in one gate; the next ones wait in the kernel's queue


@dataclass(slots=True, eq=False)
class Held:
    """A client without a process. The gate owns the fd until it is handed over or closed."""

    listener: Listener
    fd: int
    raw: Any  # the address as accept(2) gave it
    host: str | int
    source: str
    timer: Timer | None = None


class Gate:
    """`accept` takes one client of a readable listener; those that pass are started, at once or when there is room."""

    def __init__(self, service: ConnectionService) -> None:
        self.service = service
        self.clients: set[Held] = set()
        self._passed: deque[Held] = deque()
        spec = service.spec
        self.door = None if spec.access == Access() else access.Door(spec.access, service.supervisor.names)
        self.first_byte_s = spec.limits.first_byte_timeout_s

    def has_room(self) -> bool:
        return len(self.clients) < _CLIENTS

    def accept(self, listener: Listener) -> None:
        from superd.manager.activation import host_of  # it imports this module

        service = self.service
        if not self.has_room():
            return service.unwatch()
        try:
            fd, raw = listener.accept()
        except OSError as error:
            return service.not_accepted(listener, error)
        host = host_of(raw)
        source = service.source_of(fd, host)
        decision = None if self.door is None else self.door.judge(self.door.client_of(fd, host))
        if decision is not None and not decision.allowed and not decision.needs_names:
            return service.refuse(fd, raw, f"access: {decision.reason}")
        held = Held(listener, fd, raw, host, source)
        needs_names = decision is not None and decision.needs_names

        def admit() -> Verdict:
            verdict = service.admission.admit_source(source, time.monotonic())
            if verdict is Verdict.ADMITTED:
                self._hold(held, needs_names=needs_names)
            return verdict

        verdict = admit()
        if verdict is not Verdict.ADMITTED:
            service.look_again(verdict, fd, raw, lambda: service.gate is self and admit() is Verdict.ADMITTED)

    def _hold(self, held: Held, *, needs_names: bool) -> None:
        service = self.service
        self.clients.add(held)
        if needs_names:
            service.supervisor.start_task(functools.partial(self._ask_for_names, held))
        else:
            self._wait_for_first_byte(held)

    async def _ask_for_names(self, held: Held) -> None:
        assert self.door is not None
        await self.service.supervisor.names.find(access.packed(str(held.host)))
        if held not in self.clients:
            return  # the service has gone meanwhile
        decision = self.door.judge(self.door.client_of(held.fd, held.host))
        if decision.allowed:
            self._wait_for_first_byte(held)
        else:
            self._refuse(held, f"access: {decision.reason}")

    def _wait_for_first_byte(self, held: Held) -> None:
        if self.first_byte_s is None:
            return self._pass(held)
        supervisor = self.service.supervisor
        supervisor.watch.add(held.fd, lambda _: self._first_byte(held))

        def too_late() -> None:
            supervisor.watch.remove(held.fd)
            self._refuse(held, f"nothing came within first_byte_timeout = {self.first_byte_s:g} s")

        held.timer = supervisor.timers.after(self.first_byte_s, too_late)

    def _first_byte(self, held: Held) -> None:
        """Something to read: a byte, or the end. The process gets either."""
        self.service.supervisor.watch.remove(held.fd)
        assert held.timer is not None
        held.timer.cancel()
        self._pass(held)

    def _pass(self, held: Held) -> None:
        service = self.service
        if service.admission.full and service.spec.limits.on_full == "refuse":
            return self._refuse(held, "full")
        self._passed.append(held)
        self.flush()

    def flush(self) -> None:
        """Start those that wait for a place, the first first."""
        was_full = not self.has_room()
        while self._passed and self.service.start_held(self._passed[0]):
            self.clients.remove(self._passed.popleft())
        if was_full and self.has_room():
            self.service.gate_has_room()
        self.service.look_whether_drained()

    def _refuse(self, held: Held, why: str) -> None:
        self.clients.remove(held)
        self.service.admission.leave(held.source)
        self.service.refuse(held.fd, held.raw, why)
        if len(self.clients) == _CLIENTS - 1:
            self.service.gate_has_room()
        self.service.look_whether_drained()

    def follow(self, was: Gate) -> None:
        """Take over the clients of the gate before a reload: they wait anew, or pass. Those that have passed stay so,
        and names are asked for by the new rules."""
        passed, clients = list(was._passed), list(was.clients)
        was.clients.clear()
        was._passed.clear()
        self.clients.update(clients)
        self._passed.extend(passed)
        for held in clients:
            if held in passed:
                continue
            if held.timer is not None:
                held.timer.cancel()
                held.timer = None
                self.service.supervisor.watch.remove(held.fd)
            self._judge(held)

    def _judge(self, held: Held) -> None:
        decision = None if self.door is None else self.door.judge(self.door.client_of(held.fd, held.host))
        if decision is None or decision.allowed:
            self._wait_for_first_byte(held)
        elif decision.needs_names:
            self.service.supervisor.start_task(functools.partial(self._ask_for_names, held))
        else:
            self._refuse(held, f"access: {decision.reason}")

    def close(self) -> None:
        """Let everybody go."""
        for held in self.clients:
            if held.timer is not None:
                held.timer.cancel()
            self.service.supervisor.watch.remove(held.fd)
            self.service.admission.leave(held.source)
            os.close(held.fd)
        self.clients.clear()
        self._passed.clear()
