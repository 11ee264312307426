"""What waits on a service's sockets, and whether a process that ended had taken it (B7, C1)."""

from __future__ import annotations

import fcntl
import select
import socket
import struct
import termios
from collections.abc import Callable

from superd.manager.listeners import Listener
from superd.system import queues, sockets

_DRAIN_TRIES = 5
_QUICK_S = 0.25  # a process that lived less can hardly have served anybody
_UNKNOWN = "unknown"


class Traffic:
    """`look` when a process is started, `left` when it has ended. `dropped(listener, tries)` tells of a datagram that
    nobody wants."""

    def __init__(self, dropped: Callable[[Listener, int], None]) -> None:
        self._dropped = dropped
        self._looked: list[tuple[Listener, object]] = []
        self._tries = 0

    def look(self, listeners: list[Listener]) -> None:
        self._looked = [(listener, _head(listener)) for listener in listeners]

    def left(self, listeners: list[Listener], lived_s: float) -> bool:
        """Whether the sockets still hold all that the process was started for."""
        left = False
        for listener, before in self._looked:
            if before is None or listener not in listeners or (now := _head(listener)) is None:
                continue
            if isinstance(now, frozenset) and isinstance(before, frozenset):
                same = before <= now
            elif _UNKNOWN in (now, before):
                same = lived_s < _QUICK_S and _is_readable(listener.fd)
            else:
                same = now == before
            if same:
                left = True
                self._drain(listener)
        if not left:
            self._tries = 0
        return left

    def _drain(self, listener: Listener) -> None:
        if listener.address.kind != "datagram":
            return
        self._tries += 1
        if self._tries >= _DRAIN_TRIES:
            self._tries = 0
            if sockets.drain_datagram(listener.fd):
                self._dropped(listener, _DRAIN_TRIES)


def _head(listener: Listener) -> object:
    """What waits on a listener, to tell after the exit whether it was taken; None: nothing, _UNKNOWN: cannot be told.

    A datagram itself (with its sender), the connections that wait to be accepted, or how many bytes are in a FIFO.
    """
    if listener.address.kind == "datagram":
        try:
            return listener.socket.recvfrom(2048, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except OSError:
            return None
    if listener.address.kind == "fifo":
        return _fifo_bytes(listener.fd) or None
    return queues.waiting(listener.fd) or (_UNKNOWN if _is_readable(listener.fd) else None)


def _is_readable(fd: int) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(0))


def _fifo_bytes(fd: int) -> int:
    return struct.unpack("i", fcntl.ioctl(fd, termios.FIONREAD, bytes(4)))[0]  # type: ignore[no-any-return]
