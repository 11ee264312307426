"""builtin = "tcpmux", RFC 1078: a client names a service, and its connection is handed on to it.

The service that listens on tcpmux:NAME finds it in its Inbox as it would find one in the kernel's queue, so its limits,
its access rules and everything else hold as ever. What has come after the name's line stays in the socket for it.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import trio

from superd.core.lifecycle import State
from superd.manager.activation import Connection
from superd.manager.builtins import BuiltinService
from superd.manager.listeners import Listener
from superd.manager.service import Service
from superd.system.sockets import Inbox

_LINE_BYTES, _LINE_S = 256, 10.0


class MuxService(BuiltinService):
    async def _serve(self, row: Connection, conn: trio.socket.SocketType) -> None:
        name = None
        with trio.move_on_after(_LINE_S):
            name = await _read_line(conn)
        if name is None:
            return
        if name == "help":
            names = sorted({_name_of(listener) for _, listener in self._behind()})
            await conn.send("".join(f"{name}\r\n" for name in names).encode())
            return
        found = next((row for row in self._behind() if _name_of(row[1]) == name), None)
        why = "there is no such service" if found is None else _why_not(found[0])
        if found is None or why:
            said = f"{why}: {name!r}"
            self.log.error_limited((self.name, "refused"), said, level="notice", event="refused", service=self.name)
            await conn.send(f"-{why}\r\n".encode())
            return
        inbox, path = found[1].socket, found[1].address.path or ""
        assert isinstance(inbox, Inbox)
        if path.startswith("+"):
            await conn.send(b"+Go\r\n")
        os.set_blocking(conn.fileno(), True)  # it belongs to the open file, which is the service's now
        inbox.put(conn.fileno())

    def _behind(self) -> Iterator[tuple[Service, Listener]]:
        for service in self.supervisor.services.values():
            for listener in service.listeners.open:
                if listener.address.scheme == "tcpmux":
                    yield service, listener


def _name_of(listener: Listener) -> str:
    return (listener.address.path or "").removeprefix("+")


def _why_not(service: Service) -> str:
    return "" if service.state is State.LISTENING else f"{service.name} is not running"


async def _read_line(conn: trio.socket.SocketType) -> str | None:
    """In lower case, without its end and what stands behind it; None: there is none. What follows is not read."""
    line = b""
    while True:
        data = await conn.recv(_LINE_BYTES - len(line), socket.MSG_PEEK)
        head, end, _ = data.partition(b"\n")
        line += await conn.recv(len(head) + len(end))
        if end:
            return line.strip().decode("ascii", "replace").lower()
        if not data or len(line) == _LINE_BYTES:
            return None
