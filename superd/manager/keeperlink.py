"""The manager's end of the channel to the keeper."""

from __future__ import annotations

import os
import select
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from superd.core import messages
from superd.core.spec import Context
from superd.system import fdpass


@dataclass(slots=True)
class Inheritance:
    """What the keeper hands to a new manager: everything an earlier one left, or nothing but superd's own sockets.

    held       name -> fds; whoever takes one pops it, and owns it
    children   rows of the keeper's table: id, pid, tag, started, status, running; log_fds by id
    generation 1 for the first manager
    """

    held: dict[str, list[int]] = field(default_factory=dict)
    children: list[dict[str, Any]] = field(default_factory=list)
    log_fds: dict[int, int] = field(default_factory=dict)
    snapshot: bytes = b""
    generation: int = 1
    up: bool = False
    spawners: list[tuple[int, int, Context]] = field(default_factory=list)  # id, pid, context


class KeeperLink:
    """Orders go out in order, at once if the keeper keeps up. `handlers` maps a report's kind to a function."""

    def __init__(self, channel: socket.socket) -> None:
        self.channel = channel
        self.handlers: dict[str, Callable[[dict[str, Any], list[int]], None]] = {}
        self.gone: Callable[[], None] = lambda: os._exit(1)
        self.try_later: Callable[[Callable[[], None]], None] = lambda _: None
        self._queue: deque[tuple[bytes, list[int]]] = deque()
        self._wants_write: Callable[[bool], None] = lambda _: None

    def receive_inheritance(self) -> Inheritance:
        """Blocks until the keeper has said everything; called once, first."""
        found = Inheritance()
        self.channel.setblocking(True)
        while True:
            data, fds = fdpass.receive(self.channel)
            if not data:
                os._exit(1)  # there is no keeper any more
            message = messages.unpack(data)
            if message["kind"] == "restore":
                for name, fd in zip(message["names"], fds, strict=True):
                    found.held.setdefault(name, []).append(fd)
            elif message["kind"] == "children":
                logs = iter(fds)
                for row in message["rows"]:
                    if row["log"]:
                        found.log_fds[row["id"]] = next(logs)
                    found.children.append(row)
            elif message["kind"] == "go":
                found.generation, found.up = message["generation"], message["up"]
                found.spawners = [
                    (number, pid, messages.context_from_json(wanted)) for number, pid, wanted in message["spawners"]
                ]
                if message["snapshot"]:
                    with open(fds[0], "rb") as file:
                        # Every manager shares the file's offset.
                        found.snapshot = os.pread(file.fileno(), os.fstat(file.fileno()).st_size, 0)
                self.channel.setblocking(False)
                return found

    def send(self, kind: str, fds: list[int] | tuple[int, ...] = (), **fields: Any) -> None:
        """Queue or send an order; the fds stay the caller's (they are duplicated if they must wait).

        Raises OSError when there is no fd or memory for it (EMFILE, ENOBUFS …): it was not sent.
        """
        data = messages.pack(kind, **fields)
        if not self._queue:
            try:
                return fdpass.send(self.channel, data, fds)
            except fdpass.CrowdedError:
                self.try_later(self._flush)
            except BlockingIOError:
                self._wants_write(True)
            except ConnectionError:
                return self.gone()
        self._queue.append((data, [os.dup(fd) for fd in fds]))

    def deposit(self, snapshot: bytes) -> None:
        """Give the keeper what the next manager is to know."""
        memfd = os.memfd_create("superd-snapshot", os.MFD_CLOEXEC)
        try:
            view = memoryview(snapshot)
            while view:
                view = view[os.write(memfd, view) :]
            self.send("snapshot", [memfd])
        finally:
            os.close(memfd)

    def watch_with(self, change: Callable[[int], None]) -> None:
        """`change(events)` sets what this channel is polled for."""
        self._wants_write = lambda on: change(select.EPOLLIN | (select.EPOLLOUT if on else 0))

    def ready(self, events: int) -> None:
        if events & select.EPOLLOUT:
            self._flush()
        if events & (select.EPOLLIN | select.EPOLLHUP | select.EPOLLERR):
            for message, fds in self._received():
                handler = self.handlers.get(message["kind"])
                if handler is None:
                    fdpass.close_all(fds)
                else:
                    handler(message, fds)

    def _received(self) -> Iterator[tuple[dict[str, Any], list[int]]]:
        for _ in range(64):
            try:
                data, fds = fdpass.receive(self.channel)
            except BlockingIOError:
                return
            except fdpass.CutMessage as error:
                data, fds = error.data, []  # no fd was free: whose it was must know
            except ConnectionError:
                return self.gone()
            if not data:
                return self.gone()
            yield messages.unpack(data), fds

    def _flush(self) -> None:
        while self._queue:
            data, fds = self._queue[0]
            try:
                fdpass.send(self.channel, data, fds)
            except ConnectionError:
                return self.gone()
            except OSError as error:
                waits_for_room = isinstance(error, BlockingIOError) and not isinstance(error, fdpass.CrowdedError)
                self._wants_write(waits_for_room)
                return None if waits_for_room else self.try_later(self._flush)
            self._queue.popleft()
            fdpass.close_all(fds)
        self._wants_write(False)

    def finish(self, order: str, **fields: Any) -> None:
        """The last order. Waits until everything before it is taken."""
        self._wants_write = lambda _: None  # nobody polls any more
        self.channel.setblocking(True)
        self._flush()
        while self._queue:
            time.sleep(fdpass.CROWDED_S)
            self._flush()
        self.send(order, **fields)
