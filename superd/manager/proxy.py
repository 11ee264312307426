"""[proxy]: superd accepts, and carries the bytes to one process that can only listen by itself.

The process lives as that of any service that is started once, but it gets no sockets. What accepts is a front: clients
come in by the admission of per-connection services, and each is a task, which waits until the process is ready,
connects to it and carries. Carried connections end with the manager; the process and the listeners do not.
"""

from __future__ import annotations

import errno
import os
import socket
import time
from collections.abc import Awaitable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

import trio

from superd.core.lifecycle import Effect, Event, State
from superd.core.proxyheader import Endpoint, format_header
from superd.core.spec import Address, Ready, ServiceSpec
from superd.core.values import format_duration
from superd.manager.activation import Connection, Start, host_of
from superd.manager.builtins import TaskService
from superd.manager.checks import Checks, dial
from superd.manager.idle import Idleness
from superd.manager.listeners import Listener
from superd.manager.process import Instance, ProcessService
from superd.manager.readiness import Readiness
from superd.manager.service import Statistics
from superd.manager.traffic import Traffic

if TYPE_CHECKING:
    from superd.manager.supervisor import Supervisor

_CHUNK_BYTES = 1 << 16
_REST_S = 1.0  # for a client to see the end, when there is nobody any more who reads what it sends
_NEWS_S = 1.0
_CROWDED_S, _CROWDED_MAX_S = 0.01, 0.5
_TAKING = (State.LISTENING, State.STARTING, State.READY)


class ProxyService(ProcessService):
    """run = "on-demand" or "always-on", with [proxy]."""

    def __init__(self, supervisor: Supervisor, spec: ServiceSpec) -> None:
        super().__init__(supervisor, spec)
        self.port = 0  # `${port}`
        self.was_ready = True  # the process that runs, or ran last
        self.start = _Start()
        self.over = trio.Event()  # the process that runs has ended
        self.checks = _Checks(self)
        self.traffic = _Unserved(self)
        self.idleness = _Idleness(self)
        self.front = Front(self)

    @property
    def acceptor(self) -> Front:
        return self.front

    @property
    def handed(self) -> list[Listener]:
        return []

    @property
    def target(self) -> Address:
        """Where the process listens."""
        assert self.spec.proxy is not None
        return self.located(self.spec.proxy.to)

    def located(self, address: Address) -> Address:
        return replace(address, port=self.port) if address.port == 0 else address

    def _ports(self, bound: Sequence[tuple[str, Address]]) -> dict[str, int]:
        return {"": self.port, **super()._ports(bound)} if self.port else super()._ports(bound)

    # -- the process

    def begin(self) -> None:
        super().begin()
        if self.state is State.READY:  # an earlier manager's
            self.start.settle("")
        assert self.spec.proxy is not None
        if self.instance is not None and self.spec.proxy.to.port == 0 and not self.port:
            self.supervisor.later(self.ask_restart)  # its port died with the manager that had chosen it
        if self.draining:
            self.client_left()
        self.front.follow()

    def apply(self, spec: ServiceSpec) -> None:
        super().apply(spec)
        self.front.apply(spec)

    def enter(self, state: State) -> None:
        super().enter(state)
        if state is State.READY:
            self.was_ready = True
            self.start.settle("")
        elif state not in (State.STARTING, State.STOPPING) or (state is State.STOPPING and not self.again):
            cause = self.instance.cause if self.instance is not None else ""
            self.start.settle(cause or self.note or "it is being stopped")
        if state is not State.READY and self.start.settled.is_set():
            self.start = _Start()
        self.front.follow()

    def _listeners_changed(self) -> None:
        super()._listeners_changed()
        self.front.follow()

    def may_start(self) -> bool:
        """Whether what it requires is there; otherwise clients wait in the kernel's queue until it is."""
        if self.supervisor.dependencies.ready_for(self):
            return True
        self._watch_again = True
        self.dispatch(Event.WAIT)
        return False

    def client_came(self) -> None:
        if self.state is State.LISTENING:
            self.dispatch(Event.TRAFFIC)
        self.idleness.follow()

    def client_left(self) -> None:
        """The last one has gone."""
        self.idleness.follow()
        if self.draining and self.state is State.STOPPING and not self.front.connections:
            self.draining = False  # it serves nobody any more: it has as long as for any stop
            self._term()
            self._arm_stop()

    def may_not_listen_yet(self) -> bool:
        instance, limit_s = self.instance, self.spec.ready_timeout_s
        if instance is None or self.spec.ready.kind != "start":
            return False
        return limit_s is None or time.monotonic() < instance.started + limit_s

    def _term(self) -> None:
        if not (self.draining and self.front.connections):
            super()._term()

    def _watch(self) -> None:
        self.front.follow()

    def unwatch(self) -> None:
        """Its sockets are polled while it runs, too; who wants an end of that says so to the front."""
        if self.listeners.paused or self.listeners.draining or self.state not in _TAKING:
            super().unwatch()

    def _choose_port(self) -> None:
        """Bind, and close: a port that stays reserved could be taken by programs with SO_REUSEADDR alone."""
        assert self.spec.proxy is not None
        to = self.spec.proxy.to
        self.port = to.port or 0
        if to.port == 0:
            host = to.host if to.host not in (None, "localhost") else "::1" if to.scheme == "tcp6" else "127.0.0.1"
            with socket.socket(socket.AF_INET6 if ":" in str(host) else socket.AF_INET) as probe:
                probe.bind((host, 0))
                self.port = probe.getsockname()[1]

    def _spawn(self) -> None:
        try:
            self._choose_port()
        except OSError as error:
            reason = f"cannot start: no free port: {(error.strerror or str(error)).lower()}"
            self.supervisor.later(lambda: self._not_started(reason))
            return
        super()._spawn()

    def launch(self, invocation: str, readiness: Readiness, *, beside: bool = False) -> Instance:
        self.was_ready = False
        self.over = trio.Event()
        return super().launch(invocation, readiness, beside=beside)

    def process_exited(self, pid: int, status: int) -> None:
        before, over = self.instance, self.over
        super().process_exited(pid, status)  # which may have started another
        if before is not None and self.instance is not before:
            over.set()
            self.front.process_over()

    _effects = {  # noqa: RUF012 - a table, never changed
        **ProcessService._effects,
        Effect.WATCH: _watch,
        Effect.UNWATCH: unwatch,
        Effect.SPAWN: _spawn,
        Effect.TERM: _term,
    }

    # -- supervisor's questions

    def count(self) -> int:
        return self.front.count()

    def statistics(self) -> Statistics:
        return replace(super().statistics(), total=self.front.total)

    def deposit(self) -> dict[str, Any]:
        front = self.front
        return {**super().deposit(), "port": self.port, "clients": front.total, "refused": front.refused}

    def restore(self, was: dict[str, Any]) -> None:
        super().restore(was)
        self.port = was.get("port", 0)
        self.front.total, self.front.refused = was.get("clients", 0), was.get("refused", 0)

    def close(self, *, remove_paths: bool = True) -> None:
        self.front.let_go()
        super().close(remove_paths=remove_paths)


class Front(TaskService):
    """What accepts for a ProxyService. It is no service of its own: state, name, note and counters are that one's."""

    def __init__(self, owner: ProxyService) -> None:
        self.owner = owner
        super().__init__(owner.supervisor, owner.spec)
        self.listeners, self.counts = owner.listeners, owner.counts
        self.state = State.STOPPED  # or LISTENING: it takes clients
        # Of a client that has just come: what it waits for, and its address and ours.
        self._starts: dict[int, tuple[_Start, Any, bytes]] = {}
        self._carried: set[int] = set()  # connections to the process that runs

    @property
    def note(self) -> str:
        return self.owner.note

    @note.setter
    def note(self, text: str) -> None:
        self.owner.note = text

    def follow(self) -> None:
        """The state of the process may be another. Not at once: whoever is let in may start it, and the change of its
        state must be through before."""
        if self.owner.state in _TAKING and self.owner.wish_up:
            self.state = State.LISTENING
            self.supervisor.later(self._watch)
        elif self.state is State.LISTENING:
            self.state = State.STOPPED
            self.unwatch()
        if not self.owner.wish_up:
            self.let_go()

    def begin(self) -> None:
        self.follow()

    def let_go(self) -> None:
        if self.gate is not None:
            self.gate.close()

    def wake(self) -> None:
        self.nudge()
        self.owner.wake()

    def change_limits(self) -> None:
        """The process has them, which is the owner's."""

    def _restart_runtime(self) -> None:
        """As max_runtime is."""

    def _count_end(self, result: str) -> None:
        """No process has ended."""

    def _prepare_start(self, listener: Listener) -> Start | None:
        if self.owner.state is State.LISTENING and not self.owner.may_start():
            return None
        return super()._prepare_start(listener)

    def _hand_over(
        self, listener: Listener, start: Start, fd: int, raw: Any, host: str | int, source: str, now: float,
        local: bytes,
    ) -> None:  # fmt: skip
        # Its task runs later, and the process may be another by then.
        self._starts[start[1]] = self.owner.start, raw, local
        super()._hand_over(listener, start, fd, raw, host, source, now, local)
        self.owner.client_came()

    def look_whether_drained(self) -> None:
        if not self.connections:
            self.owner.client_left()

    def process_over(self) -> None:
        """What it has left gets as long to its clients as the process had to stop."""
        limit_s, rows = self.spec.stop_timeout_s, tuple(self._carried)
        self._carried.clear()

        def end() -> None:
            for number in rows:
                if number in self._scopes:
                    self._scopes[number].cancel()

        if rows and limit_s is not None:
            self.supervisor.timers.after(limit_s, end)

    # -- one client

    async def _serve(self, row: Connection, conn: trio.socket.SocketType) -> None:
        owner, (start, raw, local) = self.owner, self._starts.pop(row.id)
        while True:
            await start.settled.wait()
            if start.why:
                return self._close(row, f"not served: {start.why}")
            over = owner.over
            try:
                server = await self._dial(over)
                break
            except OSError as error:
                reason = os.strerror(error.errno) if error.errno and error.errno > 0 else str(error)
            # A process that has ended refuses before the news of its end is here; the client is the next one's.
            with trio.move_on_after(_NEWS_S):
                await over.wait()
            if not over.is_set():
                return self._close(row, f"cannot connect to {owner.target}: {reason.lower()}")
            start = owner.start
        self._carried.add(row.id)
        try:
            with server:
                if self.spec.proxy is not None and (version := self.spec.proxy.send_proxy_header):
                    await _send(server, format_header(version, *_endpoints(conn, raw, local)))
                for sock in (conn, server):
                    if sock.family in (socket.AF_INET, socket.AF_INET6):
                        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
                await carry(conn, server, over)
        finally:
            self._carried.discard(row.id)

    async def _dial(self, over: trio.Event) -> trio.socket.SocketType:
        """A full queue of a UNIX socket says so at once, and nothing tells when there is room; TCP waits by itself. Nor
        does anything tell when a program listens whose `ready` is "start"."""
        delay_s = _CROWDED_S
        while True:
            try:
                return await dial(self.owner.target)
            except OSError as error:
                starts = error.errno in (errno.ECONNREFUSED, errno.ENOENT) and self.owner.may_not_listen_yet()
                if over.is_set() or not (starts or error.errno == errno.EAGAIN):
                    raise
            await trio.sleep(delay_s)
            delay_s = min(delay_s * 2, _CROWDED_MAX_S)

    def _close(self, row: Connection, why: str) -> None:
        self.error(f"{why}; client closed", connection=row.name, peer=row.peer)


class Sock(Protocol):
    """What is carried between: a socket of trio's, or what looks like one and may take a while to say its end."""

    def recv(self, size: int, /) -> Awaitable[bytes]: ...
    def send(self, data: bytes | memoryview, /) -> Awaitable[int]: ...
    def shutdown(self, how: int, /) -> Awaitable[None] | None: ...


async def carry(client: Sock, server: Sock, over: trio.Event) -> None:
    """The bytes of both, until both have ended or one of them has gone.

    What has been read is sent before more is read, so one chunk for each direction is all that is ever held, and the
    one who does not read slows down the one who sends. An end of one direction is passed on, and the other goes on; but
    when the server has ended its own and takes nothing any more, or its process has ended (over), that is all.
    """
    deaf = trio.Event()

    async def up() -> None:
        try:
            await _pass(client, server)
        except _SinkGoneError:
            # It may have said why before it went. Bytes that nobody has read would make of the close that follows a
            # reset, which may overtake that.
            deaf.set()
            while await client.recv(_CHUNK_BYTES):
                pass

    async def down() -> None:
        await _pass(server, client)
        for event in (deaf, over):
            pair.start_soon(end_after, event)

    async def end_after(event: trio.Event) -> None:
        await event.wait()
        await trio.sleep(_REST_S)
        pair.cancel_scope.cancel()

    try:
        async with trio.open_nursery() as pair:
            async with trio.open_nursery() as directions:
                directions.start_soon(up)
                directions.start_soon(down)
            pair.cancel_scope.cancel()
    except* (OSError, _SinkGoneError):
        pass  # the client has gone, or the server has without an end


class _SinkGoneError(Exception):
    """The one who is sent to takes nothing any more."""


async def _pass(source: Sock, sink: Sock) -> None:
    """Raises OSError for the source."""
    while data := await source.recv(_CHUNK_BYTES):  # an idle connection holds no buffer
        try:
            await _send(sink, data)
        except OSError:
            raise _SinkGoneError from None
    try:
        if (said := sink.shutdown(socket.SHUT_WR)) is not None:
            await said
    except OSError:
        raise _SinkGoneError from None


async def _send(sock: Sock, data: bytes) -> None:
    sent = await sock.send(data)
    if sent < len(data):
        with memoryview(data) as rest:
            while sent < len(data):
                sent += await sock.send(rest[sent:])


def _endpoints(conn: trio.socket.SocketType, raw: Any, local: bytes) -> tuple[Endpoint | None, Endpoint | None]:
    """Of the client's own connection. raw, local: as in Held; a PROXY header may have named them."""
    if type(raw) is not tuple or not isinstance(raw[0], str):
        return None, None
    if local:
        host, port = local.decode().split("\0")[1:3]
        return _endpoint(raw), _endpoint((host, int(port)))
    return _endpoint(raw), _endpoint(conn.getsockname())


def _endpoint(raw: Any) -> Endpoint:
    return str(host_of(raw)).partition("%")[0], raw[1]


class _Start:
    """Of one process. `why` is "" when it is ready, else why it will not be; known when `settled` is."""

    def __init__(self) -> None:
        self.settled = trio.Event()
        self.why = ""

    def settle(self, why: str) -> None:
        if not self.settled.is_set():
            self.why = why
            self.settled.set()


class _Checks(Checks):
    """Those of a process whose port is known when it is started."""

    def __init__(self, service: ProxyService) -> None:
        super().__init__(service)
        self._proxy = service

    async def attempt(self, check: Ready) -> str | None:
        if check.address is not None:
            check = replace(check, address=self._proxy.located(check.address))
        if check.url is not None:
            check = replace(check, url=check.url.replace("${port}", str(self._proxy.port)))
        return await super().attempt(check)


class _Unserved(Traffic):
    """A process that ended before it was ready has left those that it was started for."""

    def __init__(self, service: ProxyService) -> None:
        super().__init__(lambda *_: None)
        self._service = service

    def look(self, listeners: list[Listener]) -> None:
        """Nothing waits on a socket of its own."""

    def left(self, listeners: list[Listener], lived_s: float) -> bool:
        return not self._service.was_ready


class _Idleness(Idleness):
    """superd has the connections: there is nothing to look for."""

    def __init__(self, service: ProxyService) -> None:
        super().__init__(service)
        self._proxy = service

    def follow(self) -> None:
        service, limit_s = self._proxy, self._proxy.spec.idle_timeout_s
        if limit_s is None or not service.on_demand or service.state is not State.READY or service.front.connections:
            self.end()
        elif self._timer is None:
            self._timer = service.supervisor.timers.after(limit_s, self._over)

    def _over(self) -> None:
        self._timer = None
        limit_s = self._proxy.spec.idle_timeout_s
        if limit_s is not None:
            self._proxy.stop_idle(f"nobody has used it for {format_duration(limit_s)}; stopping it")
