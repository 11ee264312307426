"""Between accept and hand-over: clients whose proxy must say who they are, that must be known by name, must say
something first, or speak TLS; in this order.

A client in here takes no place and starts no process. It counts for its source as soon as that is known: while its
PROXY header is awaited it counts for nobody, or a proxy would soon be full of its own clients. Services without
proxy_protocol, [access], first_byte_timeout and tls have no gate, and their connections never come here.
"""

from __future__ import annotations

import functools
import os
import select
import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from superd.core import proxyheader
from superd.core.admission import Verdict
from superd.core.proxyheader import Header, NoHeaderError, WrongHeaderError
from superd.core.spec import Access, AccessRule, ServiceSpec
from superd.manager import access
from superd.manager.listeners import Listener
from superd.manager.watch import READ, Timer
from superd.system import sockets

if TYPE_CHECKING:
    from superd.manager.activation import ConnectionService
    from superd.manager.tls import Front, Session

_CLIENTS = 1024  # at once in one gate; the next ones wait in the kernel's queue
_HEADER_S = 5.0
# Edge-triggered: what has come of a header stays in the socket until the rest has come too.
_HEADER_EVENTS = READ | select.EPOLLET | select.EPOLLRDHUP
_ENDS = select.EPOLLRDHUP | select.EPOLLHUP | select.EPOLLERR


@dataclass(slots=True, eq=False)
class Held:
    """A client without a process. The gate owns the fd until it is handed over or closed."""

    listener: Listener
    fd: int
    raw: Any  # the address as accept(2) gave it, or (host, port) of a PROXY header
    host: str | int
    local: bytes  # as Listener has it
    source: str | None = None  # None: it does not count yet
    timer: Timer | None = None
    begun: bool = False  # its header
    session: Session | None = None  # of TLS, from the first byte on
    until: float = 0.0  # when its handshake must be done


def rules_of(spec: ServiceSpec) -> tuple[Any, ...]:
    """What a gate goes by; where nothing of it is there, there is none."""
    proxied = tuple((s.address, s.proxy_protocol, s.proxy_trusted) for s in spec.sockets if s.proxy_protocol)
    secured = tuple((s.address, s.tls) for s in spec.sockets if s.tls)
    return spec.access, spec.limits.first_byte_timeout_s, proxied, secured


NO_RULES: tuple[Any, ...] = (Access(), None, (), ())


class Gate:
    """`accept` takes one client of a readable listener; those that pass are started, at once or when there is room."""

    def __init__(self, service: ConnectionService) -> None:
        self.service = service
        self.clients: set[Held] = set()
        self._passed: deque[Held] = deque()
        spec = service.spec
        self.door = None if spec.access == Access() else access.Door(spec.access, service.supervisor.names)
        self.first_byte_s = spec.limits.first_byte_timeout_s
        self.header_s = min(_HEADER_S, self.first_byte_s or _HEADER_S)
        self._proxies: dict[tuple[AccessRule, ...], access.Door] = {}
        self.front: Front | None = None
        if any(one.tls for one in spec.sockets):
            from superd.manager.tls import Front  # late: for those who have it

            self.front = Front(self)

    def has_room(self) -> bool:
        return len(self.clients) + self.service.lingering < _CLIENTS

    def accept(self, listener: Listener) -> None:
        from superd.manager.activation import host_of  # it imports this module

        service = self.service
        if not self.has_room():
            return service.unwatch()
        try:
            fd, raw = listener.accept()
        except OSError as error:
            return service.not_accepted(listener, error)
        self._begin(Held(listener, fd, raw, host_of(raw), listener.local))

    def _begin(self, held: Held) -> None:
        """A client of whom only the peer of its socket is known."""
        spec = held.listener.spec
        if not spec.proxy_protocol:
            self._arrive(held)
        elif self._is_proxy(held):
            self.clients.add(held)
            self._look_for_header(held, 0)  # most come with the connection
        elif spec.proxy_protocol == "optional":
            self._arrive(held)
        else:
            self.service.refuse(held.fd, held.raw, "proxy_protocol: not in proxy_trusted")

    def _arrive(self, held: Held) -> None:
        """A client that is known, and not counted yet."""
        service = self.service
        source = service.source_of(held.fd, held.host)
        decision = None if self.door is None else self.door.judge(self.door.client_of(held.fd, held.host))
        if decision is not None and not decision.allowed and not decision.needs_names:
            return service.refuse(held.fd, held.raw, f"access: {decision.reason}")
        needs_names = decision is not None and decision.needs_names

        def admit() -> Verdict:
            verdict = service.admission.admit_source(source, time.monotonic())
            if verdict is Verdict.ADMITTED:
                held.source = source
                self._hold(held, needs_names=needs_names)
            return verdict

        verdict = admit()
        if verdict is not Verdict.ADMITTED:
            service.look_again(verdict, held.fd, held.raw, lambda: service.gate is self and admit() is Verdict.ADMITTED)

    # -- PROXY headers

    def _is_proxy(self, held: Held) -> bool:
        """Whether it may say that it is somebody else. Asked of the peer of its socket alone."""
        rules = held.listener.spec.proxy_trusted
        if not rules:  # the loader has seen to it that this is a UNIX socket
            return held.host == ""
        door = self._proxies.get(rules)
        if door is None:
            door = self._proxies[rules] = access.Door(Access(allow=rules), self.service.supervisor.names)
        return door.judge(door.client_of(held.fd, held.host)).allowed

    def _look_for_header(self, held: Held, events: int, too_late: str = "") -> None:
        """too_late: this is the last look, because of that. What is there by then counts, also where superd was held
        up: a client that has said who it is must not be taken for its proxy."""
        is_whole = bool(too_late or events & _ENDS)  # nothing more will come
        try:
            data = sockets.peek(held.fd, proxyheader.MOST_BYTES)
            is_whole = is_whole or not data
        except BlockingIOError:
            data = b""
        except OSError:
            return self._not_proxied(held, "the client has gone")
        try:
            header = proxyheader.parse(data)
        except WrongHeaderError as error:
            return self._not_proxied(held, f"wrong header: {error}")
        except NoHeaderError:
            return self._without_header(held, "what the client says is no header")
        held.begun = proxyheader.is_begun(data)
        if header is not None:
            self._proxied(held, header)
        elif is_whole:
            self._without_header(held, too_late or "the client ended before its header")
        elif held.timer is None:
            supervisor = self.service.supervisor
            supervisor.watch.add(held.fd, lambda events: self._look_for_header(held, events), _HEADER_EVENTS)
            late = f"no header came within {self.header_s:g} s"
            held.timer = supervisor.timers.after(self.header_s, lambda: self._look_for_header(held, 0, late))

    def _proxied(self, held: Held, header: Header) -> None:
        try:
            taken = sockets.take(held.fd, header.length)
        except OSError:
            return self._not_proxied(held, "the client has gone")
        if len(taken) != header.length:  # urgent data in the midst of it
            return self._not_proxied(held, "wrong header: not in one piece")
        if header.source is not None and header.local is not None:
            held.raw, held.host = header.source, header.source[0]
            held.local = "\0{}\0{}".format(*header.local).encode()
        self._go_on(held)

    def _without_header(self, held: Held, why: str) -> None:
        if held.listener.spec.proxy_protocol == "optional" and not held.begun:
            self._go_on(held)
        else:
            self._not_proxied(held, why)

    def _not_proxied(self, held: Held, why: str) -> None:
        self.stop_waiting(held)
        self.refuse(held, f"proxy_protocol: {why}")

    def _go_on(self, held: Held) -> None:
        self.stop_waiting(held)
        self.clients.remove(held)
        self._arrive(held)
        self._has_left()

    # -- names and first bytes

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
            self.refuse(held, f"access: {decision.reason}")

    def _wait_for_first_byte(self, held: Held) -> None:
        if held.session is not None or held.listener.spec.tls is not None:
            return self._shake_hands(held)
        if self.first_byte_s is None:
            return self.let_pass(held)
        supervisor = self.service.supervisor
        supervisor.watch.add(held.fd, lambda _: self._first_byte(held))

        def too_late() -> None:
            self.stop_waiting(held)
            self.refuse(held, f"nothing came within first_byte_timeout = {self.first_byte_s:g} s")

        held.timer = supervisor.timers.after(self.first_byte_s, too_late)

    def _shake_hands(self, held: Held) -> None:
        if self.front is None:  # there was one until a reload
            return self.refuse(held, "tls: it is switched off")
        self.front.take(held)

    def _first_byte(self, held: Held) -> None:
        """Something to read: a byte, or the end. The process gets either."""
        self.stop_waiting(held)
        self.let_pass(held)

    def let_pass(self, held: Held) -> None:
        service = self.service
        if service.admission.full and service.spec.limits.on_full == "refuse":
            return self.refuse(held, "full")
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

    def refuse(self, held: Held, why: str) -> None:
        self.clients.remove(held)
        if held.source is not None:
            self.service.admission.leave(held.source)
        self.service.refuse(held.fd, held.raw, why)
        self._has_left()

    def stop_waiting(self, held: Held) -> None:
        if held.timer is not None:
            held.timer.cancel()
            held.timer = None
            self.service.supervisor.watch.remove(held.fd)

    def _has_left(self) -> None:
        if len(self.clients) + self.service.lingering == _CLIENTS - 1:
            self.service.gate_has_room()
        self.service.look_whether_drained()

    def follow(self, was: Gate) -> None:
        """Take over the clients of the gate before a reload: they wait anew, or pass. Those that have passed stay so,
        and names are asked for by the new rules."""
        passed, clients = list(was._passed), list(was.clients)
        if self.front is not None and was.front is not None:
            self.front.follow(was.front)
        was.clients.clear()
        was._passed.clear()
        self.clients.update(clients)
        self._passed.extend(passed)
        for held in clients:
            if held in passed:
                continue
            self.stop_waiting(held)
            if held.source is None:
                self.clients.remove(held)
                self._begin(held)
            else:
                self._judge(held)

    def _judge(self, held: Held) -> None:
        decision = None if self.door is None else self.door.judge(self.door.client_of(held.fd, held.host))
        if decision is None or decision.allowed:
            self._wait_for_first_byte(held)
        elif decision.needs_names:
            self.service.supervisor.start_task(functools.partial(self._ask_for_names, held))
        else:
            self.refuse(held, f"access: {decision.reason}")

    def close(self) -> None:
        """Let everybody go."""
        for held in self.clients:
            self.stop_waiting(held)
            if held.source is not None:
                self.service.admission.leave(held.source)
            os.close(held.fd)
        self.clients.clear()
        self._passed.clear()
