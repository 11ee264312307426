"""Whether anybody uses the sockets of a service that has them itself.

superd does not see what such a service accepts or receives, and the kernel counts neither. What it does tell:

    TCP       open connections (sock_diag(7)), and, to who subscribes, each one that ends (SKNLGRP_INET_TCP_DESTROY)
    UDP       when the last datagram was received (SIOCGSTAMPNS, socket(7)), and connected sockets of the same port
    UNIX      open connections, and the time of the last connect(2) or sendto(2) to the path: its access time
    FIFO      the time of the last write
    anything  what is in the queue now

So a short connection is noticed even if it came and went between two looks; abstract UNIX sockets, and paths on a file
system that is mounted noatime, have only what is there at the moment.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import select
import socket
import stat
import struct
import time
from collections.abc import Iterator

_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY = 20
_NLMSG_DONE, _NLMSG_ERROR = 3, 2
_NLM_F_REQUEST, _NLM_F_DUMP = 1, 0x300
_HEADER = struct.Struct("=LHHLL")  # struct nlmsghdr
_INET_REQUEST = struct.Struct("=BBBxL")  # struct inet_diag_req_v2 before its inet_diag_sockid
_SOCKID = struct.Struct("!HH16s16s4s8s")
_UNIX_REQUEST = struct.Struct("=BBHLLL8s")  # struct unix_diag_req
_UNIX_ANSWER_BYTES = 16  # struct unix_diag_msg
_ATTRIBUTE = struct.Struct("=HH")  # struct nlattr
_INET_ANSWER = struct.Struct("=BBBB")  # struct inet_diag_msg before its inet_diag_sockid
_INODE_AT = _INET_ANSWER.size + _SOCKID.size + 16
_ESTABLISHED, _SYN_RECEIVED, _LISTEN = 1, 3, 10
_OPEN_STATES = 0xFFF & ~(1 << _LISTEN | 1 << _SYN_RECEIVED | 1 << 6 | 1 << 7)  # neither TIME_WAIT nor CLOSE
_UDIAG_SHOW_NAME, _UNIX_DIAG_NAME = 1, 0
_NO_COOKIE = b"\xff" * 8
_SIOCGSTAMPNS = 0x8907
_DESTROY_GROUPS = 1 << 0 | 1 << 2  # SKNLGRP_INET_TCP_DESTROY and _INET6_TCP_DESTROY, each less one
_SO_ATTACH_FILTER = 26
_PORT_AT = _HEADER.size + _INET_ANSWER.size  # idiag_sport of a message


class Usage:
    """Of one listening or datagram socket, from now on. `path`: where a UNIX socket stands, if it is not abstract.

    Raises OSError where this kernel, or a sandbox around us, does not tell.
    """

    def __init__(self, fd: int, path: str | None) -> None:
        self._fd, self._path = fd, path
        self._is_fifo = stat.S_ISFIFO(os.fstat(fd).st_mode)
        self._ends: socket.socket | None = None
        self._family = self._kind = 0
        self._name: bytes | tuple[str, int] = b""
        if not self._is_fifo:
            with socket.socket(fileno=os.dup(fd)) as sock:
                self._family, self._kind = sock.family, sock.type
                name = sock.getsockname()
                self._name = name[:2] if isinstance(name, tuple) else os.fsencode(name)
            if self._family not in (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX):
                raise OSError(f"nothing tells of the connections of {socket.AddressFamily(self._family).name}")
            if self._family != socket.AF_UNIX and self._kind == socket.SOCK_STREAM:
                self._ends = _subscribe(int(self._name[1]))
        self._last = self._stamp()
        try:
            self._open()  # an error shows now, and not when nobody expects it
        except OSError:
            self.close()
            raise

    def used(self) -> bool:
        """Whether there is a connection, or was one, or anything else came, since the last time this was asked."""
        before, self._last = self._last, self._stamp()
        ended = self._ends is not None and _drain(self._ends)
        return ended or before != self._last or self._waiting() or self._open()

    def close(self) -> None:
        if self._ends is not None:
            self._ends.close()
            self._ends = None

    def _waiting(self) -> bool:
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        return any(events & select.POLLIN for _, events in poll.poll(0))

    def _stamp(self) -> object:
        if self._is_fifo:
            return os.fstat(self._fd).st_mtime_ns
        if self._family == socket.AF_UNIX:
            return _touched(self._path) if self._path else None
        if self._kind == socket.SOCK_DGRAM:
            try:
                return fcntl.ioctl(self._fd, _SIOCGSTAMPNS, bytes(16))
            except OSError:
                return None  # none has come since this was asked for the first time, which switches it on
        return None

    def _open(self) -> bool:
        if self._is_fifo:
            return False
        if self._family == socket.AF_UNIX:
            return self._kind != socket.SOCK_DGRAM and _unix_is_open(self._name)  # type: ignore[arg-type]
        protocol = socket.IPPROTO_UDP if self._kind == socket.SOCK_DGRAM else socket.IPPROTO_TCP
        host, port = self._name
        packed = socket.inet_pton(self._family, str(host).partition("%")[0])
        return any(
            not any(packed) or address[: len(packed)] == packed
            for address in _inet_open(self._family, protocol, int(port))
        )


def _dump(request: bytes) -> Iterator[bytes]:
    """The answers of sock_diag(7) to a question about all sockets."""
    header = _HEADER.pack(_HEADER.size + len(request), _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST | _NLM_F_DUMP, 1, 0)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_SOCK_DIAG) as netlink:
        netlink.settimeout(1)
        netlink.send(header + request)
        while True:
            data = netlink.recv(1 << 16)
            at = 0
            while at < len(data):
                length, kind, *_ = _HEADER.unpack_from(data, at)
                if kind == _NLMSG_DONE:
                    return
                if kind == _NLMSG_ERROR:
                    (code,) = struct.unpack_from("=i", data, at + _HEADER.size)
                    raise OSError(-code, os.strerror(-code))
                yield data[at + _HEADER.size : at + length]
                at += (length + 3) & ~3


def _inet_open(family: int, protocol: int, port: int) -> Iterator[bytes]:
    """The local address of each socket with that port that is connected, and either somebody's or not accepted yet."""
    states = 1 << _ESTABLISHED if protocol == socket.IPPROTO_UDP else _OPEN_STATES
    request = _INET_REQUEST.pack(family, protocol, 0, states)
    for answer in _dump(request + _SOCKID.pack(port, 0, b"", b"", b"", _NO_COOKIE)):
        _, state, *_ = _INET_ANSWER.unpack_from(answer)
        local, _, address, *_ = _SOCKID.unpack_from(answer, _INET_ANSWER.size)
        (inode,) = struct.unpack_from("=L", answer, _INODE_AT)
        if local == port and (inode or state == _ESTABLISHED):
            yield address


def _unix_is_open(name: bytes) -> bool:
    """Whether a connected socket has the name of the listener: each one that was accepted from it has."""
    request = _UNIX_REQUEST.pack(socket.AF_UNIX, 0, 0, 1 << _ESTABLISHED, 0, _UDIAG_SHOW_NAME, _NO_COOKIE)
    for answer in _dump(request):
        at = _UNIX_ANSWER_BYTES
        while at + _ATTRIBUTE.size <= len(answer):
            size, attribute = _ATTRIBUTE.unpack_from(answer, at)
            value = answer[at + _ATTRIBUTE.size : at + size]
            if attribute == _UNIX_DIAG_NAME and (value == name or value.rstrip(b"\0") == name):
                return True
            at += (size + 3) & ~3
    return False


def _touched(path: str) -> int | None:
    """When somebody last connected or sent to it. Relatime writes that down once, and again only if the file was
    changed since; so it is."""
    with contextlib.suppress(OSError):
        found = os.lstat(path)
        if not stat.S_ISSOCK(found.st_mode):
            return None
        if found.st_atime_ns >= min(found.st_mtime_ns, found.st_ctime_ns):
            os.utime(path, ns=(found.st_atime_ns, time.time_ns()), follow_symlinks=False)
        return found.st_atime_ns
    return None


def _subscribe(port: int) -> socket.socket:
    """A socket that gets a message for each TCP connection of that local port that ends, in every state. Others are
    filtered out in the kernel: nobody is woken up for them, and they take no room."""
    netlink = socket.socket(
        socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK, _NETLINK_SOCK_DIAG
    )
    try:
        # ldh [_PORT_AT]; jeq #port, 0, 1; ret #-1; ret #0
        code = b"".join(
            struct.pack("=HBBL", *line)
            for line in ((0x28, 0, 0, _PORT_AT), (0x15, 0, 1, port), (0x06, 0, 0, 0xFFFFFFFF), (0x06, 0, 0, 0))
        )
        buffer = ctypes.create_string_buffer(code)
        program = struct.pack("HL", 4, ctypes.addressof(buffer))
        netlink.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, program)
        netlink.bind((0, _DESTROY_GROUPS))
    except OSError:
        netlink.close()
        raise
    return netlink


def _drain(netlink: socket.socket) -> bool:
    """Whether there was a message, or were more than there is room for."""
    found = False
    while True:
        try:
            netlink.recv(1)
            found = True
        except BlockingIOError:
            return found
        except OSError:  # ENOBUFS
            found = True
