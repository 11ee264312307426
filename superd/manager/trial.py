"""What `superd run` adds to a service: its address on stdout, and the bytes of its connections.

For --trace superd stands between the client and its process, which gets one end of a socket pair: it sees a UNIX socket
whose peer is superd, so what asks the kernel about the client (getpeername(2), TCP options) finds none.
"""

from __future__ import annotations

import contextlib
import functools
import os
import select
import socket
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import trio

from superd.core import messages
from superd.core.spec import ServiceSpec
from superd.manager.activation import ConnectionService, Start, local_of, peer_text
from superd.manager.listeners import Listener

if TYPE_CHECKING:
    from superd.manager.service import Service
    from superd.manager.supervisor import Supervisor

_CHUNK_BYTES = 1 << 16
_MESSAGE_BYTES = 1 << 18  # a seqpacket message that is longer would be cut
_LINE_BYTES = 1024
_REST_S = 5.0  # for what a process that has ended has left to be carried
_ESCAPES = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 256))} | {
    9: "\\t", 10: "\\n", 13: "\\r", 92: "\\\\",
}  # fmt: skip

Say = Callable[[str], None]


def print_addresses(service: Service) -> None:
    """On stdout, one a line. Whoever does not want to know has closed it."""
    with contextlib.suppress(OSError):
        os.write(1, "".join(f"{listener.address}\n" for listener in service.listeners.open).encode())


def printable(data: bytes) -> Iterator[str]:
    r"""The bytes as lines that anything can show: printable ASCII as it is, \n \r \t \\ \xNN. A line ends after a line
    end, or after 1024 bytes."""
    *whole, rest = data.split(b"\n")
    for line in [*(line + b"\n" for line in whole), rest]:
        for at in range(0, len(line), _LINE_BYTES):
            yield line[at : at + _LINE_BYTES].decode("latin-1").translate(_ESCAPES)


class TracedService(ConnectionService):
    """Per-connection, with superd in between."""

    def __init__(self, supervisor: Supervisor, spec: ServiceSpec) -> None:
        super().__init__(supervisor, spec)
        self.traces: dict[int, Trace] = {}

    def _hand_over(
        self, listener: Listener, start: Start, fd: int, raw: Any, host: str | int, source: str, now: float,
        local: bytes,
    ) -> None:  # fmt: skip
        number = start[1]
        text = peer_text(fd, host, raw)
        if listener.address.is_ip and local == listener.local:  # no PROXY header has said it
            local = local_of(fd)  # the spawner cannot ask the socket that it gets
        try:
            trace = Trace(self.supervisor, fd, listener.address.kind, functools.partial(self._say, number))
        except OSError as error:
            self.admission.release(source)
            os.close(fd)
            self.error(f"cannot trace a connection: {(error.strerror or str(error)).lower()}; client closed")
            return
        self.traces[number] = trace
        super()._hand_over(listener, start, trace.end, raw, host, source, now, local)
        if number in self.connections:
            self.connections[number].peer = text
        else:
            trace.exited()
        self.supervisor.start_task(functools.partial(self._run_trace, number, trace))

    async def _run_trace(self, number: int, trace: Trace) -> None:
        try:
            await trace.run()
        finally:
            del self.traces[number]

    def _say(self, number: int, text: str) -> None:
        name = messages.format_connection(number)
        self.log.record("trace", text, service=self.name, connection=name, pid=self.traces[number].pid)

    def started(self, connection: int, pid: int) -> None:
        super().started(connection, pid)
        if trace := self.traces.get(connection):
            trace.pid = pid
            trace.started.set()

    def exited(self, connection: int, pid: int, status: int) -> None:
        if trace := self.traces.get(connection):
            trace.exited()
        super().exited(connection, pid, status)

    def failed(self, connection: int, stage: str, errno: int) -> None:
        if trace := self.traces.get(connection):
            trace.exited()
        super().failed(connection, stage, errno)

    def served(self, connection: int, status: int) -> None:
        """Not before the client has what the process has written."""

        async def wait() -> None:
            if trace := self.traces.get(connection):
                with trio.move_on_after(_REST_S):
                    await trace.done.wait()
            super(TracedService, self).served(connection, status)

        self.supervisor.start_task(wait)


class Trace:
    """One connection that is carried by superd. `end` is the process's end of it, to be handed over and closed."""

    def __init__(self, supervisor: Supervisor, client: int, kind: str, say: Say) -> None:
        """Takes the client's fd. Raises OSError, and has not taken it, when there are no fds left."""
        type_ = socket.SOCK_SEQPACKET if kind == "seqpacket" else socket.SOCK_STREAM
        ours, theirs = socket.socketpair(socket.AF_UNIX, type_)
        self.end = theirs.detach()
        self._process = ours
        self._client = socket.socket(fileno=client)
        self._size = _MESSAGE_BYTES if kind == "seqpacket" else _CHUNK_BYTES
        self._supervisor, self._say = supervisor, say
        self.pid: int | None = None
        self.started = trio.Event()
        self._exited = trio.Event()
        self.done = trio.Event()

    def exited(self) -> None:
        """The process has ended, or never ran; its descendants may still have the connection."""
        self.started.set()
        self._exited.set()

    async def run(self) -> None:
        client, process = map(trio.socket.from_stdlib_socket, (self._client, self._process))
        try:
            with client, process:
                await self.started.wait()  # what is said of the process begins with its start
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._carry, client, process, ">", nursery.cancel_scope)
                    await self._carry(process, client, "<", nursery.cancel_scope)
                    # It will say no more. Does it still listen?
                    while not _hung_up(process.fileno()) and not self._exited.is_set():
                        await self._exited.wait()
                    nursery.cancel_scope.cancel()
        finally:
            self.done.set()

    async def _carry(
        self, source: trio.socket.SocketType, target: trio.socket.SocketType, mark: str, scope: trio.CancelScope
    ) -> None:
        try:
            while data := await source.recv(self._size):
                for line in printable(data):
                    self._say(f"{mark} {line}")
                self._supervisor.end_of_turn()
                view = memoryview(data)
                while view:
                    view = view[await target.send(view) :]
        except OSError:  # one of them has gone, and then there is nothing to be carried
            if mark == "<":
                scope.cancel()
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_WR)


def _hung_up(fd: int) -> bool:
    """Whether the other end of a UNIX socket is closed, and not only shut down for writing."""
    poll = select.poll()
    poll.register(fd, 0)
    return any(events & select.POLLHUP for _, events in poll.poll(0))
