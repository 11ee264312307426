"""Who waits in the accept queue of a listener, by name: whether a process took what it was started for.

A queue's length does not tell: while one client is taken another may come. sock_diag(7) names connections that nobody
has accepted yet: they have inode 0. /proc/net/tcp says the same, but has a line for each connection of the machine, in
TIME_WAIT too: 30 µs for each of them, and for thousands a manager that stands still.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator

_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY = 20
_NLM_F_REQUEST, _NLM_F_DUMP = 0x001, 0x300
_NLMSG_DONE = 3
_UDIAG_SHOW_ICONS = 0x08
_UNIX_DIAG_ICONS = 3
_ANY_STATE = 0xFFFFFFFF
_UNACCEPTED = 1 << 1 | 1 << 8  # established, and closed by a client that has said all it had to say
_NO_COOKIE = b"\xff" * 8
_HEADER = struct.Struct("=LHHLL")  # struct nlmsghdr
_UNIX_REQUEST = struct.Struct("=BBHLLL8s")  # struct unix_diag_req
_UNIX_ANSWER_BYTES = 16  # struct unix_diag_msg
_ATTRIBUTE = struct.Struct("=HH")  # struct nlattr
_TCP_REQUEST = struct.Struct("=BBHL2s38s8s")  # struct inet_diag_req_v2: by the local port
_TCP_ANSWER = struct.Struct("=4s48sLLLLL")  # struct inet_diag_msg
_TCP_NAME = slice(4, 52)  # its struct inet_diag_sockid: ports, addresses and a cookie
_SOURCE = slice(4, 20)


def waiting(fd: int) -> frozenset[bytes] | None:
    """A name for each connection that waits to be accepted; None where this kernel does not tell."""
    family = _family(fd)
    try:
        if family == socket.AF_UNIX:
            return _waiting_unix(os.fstat(fd).st_ino)
        if family in (socket.AF_INET, socket.AF_INET6):
            return _waiting_tcp(fd, family)
    except (OSError, ValueError, struct.error):
        pass  # no netlink in this sandbox, or another format
    return None


def _family(fd: int) -> int:
    with socket.socket(fileno=os.dup(fd)) as sock:
        return sock.family


def _waiting_tcp(fd: int, family: int) -> frozenset[bytes]:
    with socket.socket(fileno=os.dup(fd)) as sock:
        host, port = sock.getsockname()[:2]
        ours = socket.inet_pton(family, host.partition("%")[0])
    # A dual-stack listener's IPv4 clients are among those of IPv6.
    request = _TCP_REQUEST.pack(family, socket.IPPROTO_TCP, 0, _UNACCEPTED, port.to_bytes(2, "big"), b"", _NO_COOKIE)
    found = set()
    for answer in _ask(request, _NLM_F_DUMP):
        *_, inode = _TCP_ANSWER.unpack_from(answer)
        name = answer[_TCP_NAME]
        if inode == 0 and (not any(ours) or name[_SOURCE].startswith(ours)):
            found.add(name)
    return frozenset(found)


def _ask(request: bytes, flags: int) -> Iterator[bytes]:
    """What the kernel answers: one struct after the other. Raises OSError."""
    header = _HEADER.pack(_HEADER.size + len(request), _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST | flags, 1, 0)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_SOCK_DIAG) as netlink:
        netlink.settimeout(1)
        netlink.send(header + request)
        while True:
            packet, at = netlink.recv(1 << 16), 0
            while at < len(packet):
                length, kind, *_ = _HEADER.unpack_from(packet, at)
                if kind == _NLMSG_DONE:
                    return
                if kind != _SOCK_DIAG_BY_FAMILY:
                    raise OSError("sock_diag refused")
                yield packet[at + _HEADER.size : at + length]
                at += (length + 3) & ~3
            if not flags & _NLM_F_DUMP:
                return


def _waiting_unix(inode: int) -> frozenset[bytes]:
    request = _UNIX_REQUEST.pack(socket.AF_UNIX, 0, 0, _ANY_STATE, inode, _UDIAG_SHOW_ICONS, _NO_COOKIE)
    (answer,) = _ask(request, 0)
    at = _UNIX_ANSWER_BYTES
    while at + _ATTRIBUTE.size <= len(answer):
        size, attribute = _ATTRIBUTE.unpack_from(answer, at)
        if attribute == _UNIX_DIAG_ICONS:
            payload = answer[at + _ATTRIBUTE.size : at + size]
            return frozenset(payload[i : i + 4] for i in range(0, len(payload), 4))
        at += (size + 3) & ~3
    return frozenset()
