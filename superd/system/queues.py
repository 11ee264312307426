"""Who waits in the accept queue of a listener, by name: whether a process took what it was started for.

A queue's length does not tell: while one client is taken another may come. /proc/net/tcp lists connections that
nobody has accepted yet with inode 0; for UNIX sockets sock_diag(7) names them (UNIX_DIAG_ICONS).
"""

from __future__ import annotations

import os
import socket
import struct

_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY = 20
_NLM_F_REQUEST = 1
_UDIAG_SHOW_ICONS = 0x08
_UNIX_DIAG_ICONS = 3
_ANY_STATE = 0xFFFFFFFF
_NO_COOKIE = b"\xff" * 8
_HEADER = struct.Struct("=LHHLL")  # struct nlmsghdr
_REQUEST = struct.Struct("=BBHLLL8s")  # struct unix_diag_req
_ANSWER_BYTES = 16  # struct unix_diag_msg
_ATTRIBUTE = struct.Struct("=HH")  # struct nlattr
_ESTABLISHED = b"01"


def waiting(fd: int) -> frozenset[bytes] | None:
    """A name for each connection that waits to be accepted; None where this kernel does not tell."""
    family = _family(fd)
    try:
        if family == socket.AF_UNIX:
            return _waiting_unix(os.fstat(fd).st_ino)
        if family in (socket.AF_INET, socket.AF_INET6):
            return _waiting_tcp(fd, family)
    except (OSError, ValueError, struct.error):
        pass  # no /proc, no netlink in this sandbox, or another format
    return None


def _family(fd: int) -> int:
    with socket.socket(fileno=os.dup(fd)) as sock:
        return sock.family


def _waiting_tcp(fd: int, family: int) -> frozenset[bytes]:
    with socket.socket(fileno=os.dup(fd)) as sock:
        port = b":%04X" % sock.getsockname()[1]
    found = set()
    # A dual-stack listener has its IPv4 clients in the table of IPv6.
    with open("/proc/net/tcp" if family == socket.AF_INET else "/proc/net/tcp6", "rb") as file:
        for line in file:
            fields = line.split(None, 10)
            if fields[1].endswith(port) and fields[3] == _ESTABLISHED and fields[9] == b"0":
                found.add(fields[1] + fields[2])
    return frozenset(found)


def _waiting_unix(inode: int) -> frozenset[bytes]:
    request = _REQUEST.pack(socket.AF_UNIX, 0, 0, _ANY_STATE, inode, _UDIAG_SHOW_ICONS, _NO_COOKIE)
    header = _HEADER.pack(_HEADER.size + len(request), _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST, 1, 0)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_SOCK_DIAG) as netlink:
        netlink.settimeout(1)
        netlink.send(header + request)
        answer = netlink.recv(1 << 16)
    length, kind, *_ = _HEADER.unpack_from(answer)
    if kind != _SOCK_DIAG_BY_FAMILY:
        raise OSError("sock_diag refused")
    at = _HEADER.size + _ANSWER_BYTES
    while at + _ATTRIBUTE.size <= length:
        size, attribute = _ATTRIBUTE.unpack_from(answer, at)
        if attribute == _UNIX_DIAG_ICONS:
            payload = answer[at + _ATTRIBUTE.size : at + size]
            return frozenset(payload[i : i + 4] for i in range(0, len(payload), 4))
        at += (size + 3) & ~3
    return frozenset()
