"""The two ends of a connection: who a UNIX client is, and the address that a TCP client has reached."""

from __future__ import annotations

import contextlib
import os
import socket
import struct

_CREDENTIALS = struct.Struct("iII")  # struct ucred


class Borrowed(socket.socket):
    """A socket object around an fd that stays its owner's: `with Borrowed(fileno=fd) as sock`."""

    def __exit__(self, *_: object) -> None:
        self.detach()


def credentials(fd: int) -> tuple[int, int, int]:
    """pid, uid and gid of a UNIX client at the time of its connect(2) (SO_PEERCRED, unix(7)). pid 0: not in our
    namespace."""
    with Borrowed(fileno=fd) as sock:
        return _credentials(sock)


def _credentials(sock: socket.socket) -> tuple[int, int, int]:
    data = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, gid = _CREDENTIALS.unpack(data)
    return pid, uid, gid


def unix_facts(sock: socket.socket) -> dict[str, str]:
    """For plan.connection_environment: `uid`, `gid`, `pid`, where it has a printable one `path`, the client's own name;
    and `text`, for people. Raises OSError when nobody can tell."""
    pid, uid, gid = _credentials(sock)
    facts = {"uid": str(uid), "gid": str(gid), "pid": str(pid), "text": f"pid {pid} uid {uid}"}
    with contextlib.suppress(OSError):
        name = sock.getpeername()
        path = "@" + os.fsdecode(name[1:]) if isinstance(name, bytes) and name else name
        if isinstance(path, str) and path and path.isprintable():
            facts["path"] = path
    return facts


def local_address(sock: socket.socket) -> tuple[str, str]:
    """IP and port of our end of a TCP connection; plain IPv4 for a client of a dual-stack listener (A8)."""
    host, port = sock.getsockname()[:2]
    return host.removeprefix("::ffff:") if "." in host else host, str(port)
