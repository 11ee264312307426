"""Services that superd is itself: echo, discard, chargen, daytime, time (RFC 862, 863, 864, 867, 868).

Admission, access and listeners are those of any per-connection service; only what starts is a task here instead of a
process. Their connections end with the manager. Datagrams are answered at once, one for one, and never so that two such
services, or this one and a forged address, could keep each other busy (C3).
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import socket
import struct
import time
from abc import abstractmethod
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import trio

from superd.core import messages
from superd.core.lifecycle import State
from superd.core.spec import Access, ServiceSpec
from superd.manager.access import Door
from superd.manager.activation import Connection, ConnectionService, Start, peer_text
from superd.manager.listeners import Listener
from superd.system import sockets

if TYPE_CHECKING:
    from superd.manager.supervisor import Supervisor

_DATAGRAMS_PER_TURN = 64
_SINCE_1900_S = 2208988800  # RFC 868
_LOWEST_PORT = 1024  # nobody who asks has a lower one, but other such services do
_CHARS = bytes(range(33, 127))


class TaskService(ConnectionService):
    """A connection is a task here, and ends with the manager."""

    def __init__(self, supervisor: Supervisor, spec: ServiceSpec) -> None:
        super().__init__(supervisor, spec)
        self._scopes: dict[int, trio.CancelScope] = {}

    def _prepare_start(self, listener: Listener) -> Start | None:
        return None, self.supervisor.next_connection(), None, b""

    def _hand_over(
        self, listener: Listener, start: Start, fd: int, raw: Any, host: str | int, source: str, now: float,
        local: bytes,
    ) -> None:  # fmt: skip
        number = start[1]
        row = Connection(number, messages.format_connection(number), peer_text(fd, host, raw), source, None, now, None)
        self.connections[number] = row
        self.total += 1
        self.supervisor.meter.note()
        self.log.record("start", service=self.name, connection=row.name, peer=row.peer)
        listener.episode = False
        self._scopes[number] = self.supervisor.start_task(functools.partial(self._run, row, fd))

    async def _run(self, row: Connection, fd: int) -> None:
        end: dict[str, Any] = {"signal": "TERM"}  # if it is cancelled
        try:
            with trio.socket.from_stdlib_socket(socket.socket(fileno=fd)) as conn:
                await self._serve(row, conn)
            end = {"status": 0}
        except* (OSError, trio.BrokenResourceError, trio.ClosedResourceError):
            end = {"status": 0}  # the client has gone
        finally:
            del self._scopes[row.id]
            self._count_end("success" if end == {"status": 0} else "signal")
            self.counts.add_life(time.monotonic() - row.started)
            self.log.record(
                "exit", service=self.name, connection=row.name, peer=row.peer, **end,
                duration=round(time.monotonic() - row.started, 4),
            )  # fmt: skip
            self._release(row)
            if self.supervisor.once:
                self.served(row.id, end.get("status", 1))

    @abstractmethod
    async def _serve(self, row: Connection, conn: trio.socket.SocketType) -> None:
        """All that happens on a connection; OSError is its end as any other."""

    def _tell(self, row: Connection, signo: int, *, group: bool = True) -> None:
        """There is no process: any signal is the end."""
        if row.id in self._scopes:
            self._scopes[row.id].cancel()

    def _count_end(self, result: str) -> None:
        self.counts.add_exit(result)


class BuiltinService(TaskService):
    """builtin = "…". Stream and datagram sockets in one service."""

    def __init__(self, supervisor: Supervisor, spec: ServiceSpec) -> None:
        super().__init__(supervisor, spec)
        assert spec.builtin is not None
        self.answer = DATAGRAM.get(spec.builtin)
        self.door = None if spec.access == Access() else Door(spec.access, supervisor.names)

    def apply(self, spec: ServiceSpec) -> None:
        assert spec.builtin is not None
        self.answer = DATAGRAM.get(spec.builtin)
        self.door = None if spec.access == Access() else Door(spec.access, self.supervisor.names)
        super().apply(spec)

    def begin(self) -> None:
        self.draining = False
        if self.state is State.DISABLED or not self.wish_up:
            return
        if not self.listeners.open:
            return self.enter(State.BACKOFF)
        self.enter(State.LISTENING)
        for listener in self.listeners.open:
            if listener.address.kind == "datagram":
                sockets.tell_destination(listener.fd)
        self._watch()

    def _readable(self, listener: Listener, events: int) -> None:
        if listener.address.kind == "datagram":
            self._datagrams(listener)
        else:
            super()._readable(listener, events)

    async def _serve(self, row: Connection, conn: trio.socket.SocketType) -> None:
        assert self.spec.builtin is not None
        await STREAM[self.spec.builtin](trio.SocketStream(conn))

    # -- datagrams

    def _datagrams(self, listener: Listener) -> None:
        for _ in range(_DATAGRAMS_PER_TURN):
            if self._must_wait(time.monotonic()):
                return
            found = sockets.receive_datagram(listener.fd)
            if found is None:
                return
            data, sender, is_for_many = found
            if not isinstance(sender, tuple):
                continue
            why = self._why_not(listener, sender, is_for_many)
            if why:
                self.refused += 1
                self.counts.add_refusal(why)
                self.log.error_limited(
                    (self.name, "refused", why), why, level="notice", event="refused", service=self.name,
                    peer=f"{sender[0]}:{sender[1]}",
                )  # fmt: skip
                continue
            if self.admission.rate is not None:
                self.admission.rate.take(time.monotonic())
            self.total += 1
            self.supervisor.meter.note()
            reply = b"" if self.answer is None else self.answer(data)
            if reply and len(reply) <= len(data):
                with contextlib.suppress(OSError):
                    listener.socket.sendto(reply, socket.MSG_DONTWAIT, sender)
            if self.supervisor.once:
                return self.supervisor.served(0)

    def _why_not(self, listener: Listener, sender: tuple[Any, ...], is_for_many: bool) -> str:
        if is_for_many:
            return "sent to a broadcast or multicast address"
        if sender[1] < _LOWEST_PORT or sender[1] == listener.address.port:
            return f"port {sender[1]} may be a service of this kind: two would never stop"
        if self.door is not None and not (decision := self.door.judge(self.door.client_at(sender[0]))).allowed:
            return f"access: {decision.reason}"
        return ""


async def _echo(stream: trio.SocketStream) -> None:
    async for data in stream:
        await stream.send_all(data)


async def _discard(stream: trio.SocketStream) -> None:
    async for _ in stream:
        pass


async def _chargen(stream: trio.SocketStream) -> None:
    """72 characters of the pattern a line, each line one further; what the client sends is thrown away."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_discard, stream)
        for first in itertools.cycle(range(len(_CHARS))):
            await stream.send_all((_CHARS + _CHARS)[first : first + 72] + b"\r\n")


async def _daytime(stream: trio.SocketStream) -> None:
    await stream.send_all(_daytime_text(b""))


async def _time(stream: trio.SocketStream) -> None:
    await stream.send_all(_time_bytes(b""))


def _daytime_text(_: bytes) -> bytes:
    return time.ctime().encode() + b"\r\n"


def _time_bytes(_: bytes) -> bytes:
    return struct.pack("!I", (int(time.time()) + _SINCE_1900_S) & 0xFFFFFFFF)


STREAM: dict[str, Callable[[trio.SocketStream], Awaitable[None]]] = {
    "echo": _echo, "discard": _discard, "chargen": _chargen, "daytime": _daytime, "time": _time,
}  # fmt: skip
DATAGRAM: dict[str, Callable[[bytes], bytes]] = {
    "echo": lambda data: data, "daytime": _daytime_text, "time": _time_bytes,
}  # fmt: skip
