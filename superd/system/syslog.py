"""Receiving from the socket that syslog(3) sends to, with who has sent it."""

from __future__ import annotations

import array
import os
import socket
import struct
from typing import NamedTuple

_CREDENTIALS = struct.Struct("iII")
_ANCILLARY = socket.CMSG_SPACE(_CREDENTIALS.size) + socket.CMSG_SPACE(253 * 4)
_MOST_BYTES = 1 << 16


class Datagram(NamedTuple):
    """pid: 0 if the sender is in no namespace that we see."""

    data: bytes
    pid: int
    uid: int


def receive(sock: socket.socket) -> Datagram | None:
    """The next datagram of a socket with SO_PASSCRED, None when there is none. fds that come with it are closed."""
    try:
        data, ancillary, _, _ = sock.recvmsg(_MOST_BYTES, _ANCILLARY, socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC)
    except OSError:
        return None
    pid, uid = 0, -1
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds = array.array("i")
            fds.frombytes(payload[: len(payload) - len(payload) % 4])
            for fd in fds:
                os.close(fd)
        elif level == socket.SOL_SOCKET and kind == socket.SCM_CREDENTIALS:
            pid, uid, _ = _CREDENTIALS.unpack(payload[: _CREDENTIALS.size])
    return Datagram(data, pid, uid)
