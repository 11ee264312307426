"""Messages with fds over SOCK_SEQPACKET, unix(7).

A packet carries at most SCM_MAX_FD (253) fds, and as many bytes as the send buffer allows, so a larger text
travels in a memfd behind the other fds. Every fd received is close-on-exec and belongs to the caller.
"""

from __future__ import annotations

import array
import errno
import os
import socket
import time
from collections.abc import Sequence


class CutMessage(OSError):
    """A packet whose fds could not all be installed (EMFILE). `data` is its text; no fd of it is open."""

    def __init__(self, data: bytes) -> None:
        super().__init__(errno.EMFILE, "message with fds was cut: too many open files")
        self.data = data


class CrowdedError(BlockingIOError):
    """More fds of this user are on their way, whoever sent them, than our RLIMIT_NOFILE (ETOOMANYREFS, unix(7)).

    Root with CAP_SYS_RESOURCE or CAP_SYS_ADMIN is exempt. Nothing tells when it is over: try again after a moment. To
    poll for room to write would be a hot loop, because there is some.
    """


CROWDED_S = 0.01  # that moment
MAX_FDS = 250
_INLINE_BYTES = 4000  # what is larger is rare; a larger buffer would cost each of the small ones
_IN_MEMFD = b"\0"  # first byte of a packet whose text is in its last fd
# Plain numbers: an operation on the module's IntFlags runs Python code, some µs of it for each connection.
_NOSIGNAL, _CLOEXEC, _CUT = (
    int(socket.MSG_NOSIGNAL),
    int(socket.MSG_CMSG_CLOEXEC),
    int(socket.MSG_CTRUNC | socket.MSG_TRUNC),
)
_SOCKET, _RIGHTS = int(socket.SOL_SOCKET), int(socket.SCM_RIGHTS)
DONTWAIT = int(socket.MSG_DONTWAIT)
_ANCILLARY = socket.CMSG_SPACE((MAX_FDS + 1) * 4)


def channel() -> tuple[socket.socket, socket.socket]:
    """Both ends, blocking and close-on-exec, with room for some hundred packets in flight."""
    ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in ends:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    return ends


def send(sock: socket.socket, data: bytes, fds: Sequence[int] = (), flags: int = 0) -> None:
    """Send one packet; our copies of the fds stay ours.

    Raises BlockingIOError when the peer does not keep up (non-blocking socket or MSG_DONTWAIT), CrowdedError,
    BrokenPipeError or ConnectionResetError when it has gone.
    """
    if len(data) > _INLINE_BYTES:
        memfd = os.memfd_create("superd-message", os.MFD_CLOEXEC)
        try:
            with open(memfd, "wb", closefd=False) as file:
                file.write(data)
            send_small(sock, _IN_MEMFD, [*fds, memfd], flags)
        finally:
            os.close(memfd)
    else:
        send_small(sock, data, fds, flags)


def send_small(sock: socket.socket, data: bytes, fds: Sequence[int], flags: int = 0) -> None:
    if fds:
        rights = [(_SOCKET, _RIGHTS, array.array("i", fds))]
        try:
            sock.sendmsg([data], rights, flags | _NOSIGNAL)
        except OSError as error:
            if error.errno == errno.ETOOMANYREFS:
                raise CrowdedError(error.errno, error.strerror) from None
            raise
    else:
        sock.send(data, flags | _NOSIGNAL)


def send_waiting(sock: socket.socket, data: bytes, fds: Sequence[int] = ()) -> None:
    """send() over a blocking channel, however long it takes."""
    while True:
        try:
            return send(sock, data, fds)
        except CrowdedError:
            time.sleep(CROWDED_S)


def receive(sock: socket.socket, flags: int = 0) -> tuple[bytes, list[int]]:
    """Take one packet: its bytes and fds. Empty bytes: the peer has gone (no message here is empty).

    Raises BlockingIOError when there is none and the socket or the flags say not to wait, CutMessage.
    """
    data, ancillary, message_flags, _ = sock.recvmsg(_INLINE_BYTES + 1, _ANCILLARY, flags | _CLOEXEC)
    fds: list[int] = []
    for level, kind, payload in ancillary:
        if level == _SOCKET and kind == _RIGHTS:
            fds += array.array("i", payload[: len(payload) & ~3])
    if message_flags & _CUT:
        # The kernel could not install every fd (EMFILE): half a message is worth nothing.
        close_all(fds)
        raise CutMessage(data)
    if fds and data == _IN_MEMFD:
        with open(fds.pop(), "rb") as file:
            file.seek(0)
            data = file.read()
    return data, fds


def close_all(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)
    fds.clear()
