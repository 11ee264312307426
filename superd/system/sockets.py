"""Listeners: open them, set their options, own their paths; and the facts about what arrives on them.

Nothing here sets O_NONBLOCK: it belongs to the open file description, which a service shares (fcntl(2)); who wants
it sets it. Every fd made here is close-on-exec. Numbers that the socket module lacks are those of asm-generic/socket.h.
"""

from __future__ import annotations

import errno
import fcntl
import math
import os
import select
import socket
import stat
import struct
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import Any

from superd.core.spec import Address, SocketSpec

Identity = tuple[int, int]  # st_dev, st_ino

# accept(2): errors of one connection that is gone already, or of the network below it. The listener is fine, take the
# next. systemd (src/basic/errno-util.h) and trio (_highlevel_socket.py) keep such lists; EPERM is a firewall's word.
IGNORABLE_ACCEPT_ERRNOS = frozenset({
    errno.EAGAIN, errno.EINTR, errno.EPERM, errno.EPROTO, errno.ENOPROTOOPT, errno.EOPNOTSUPP, errno.ECONNABORTED,
    errno.ECONNRESET, errno.ECONNREFUSED, errno.ETIMEDOUT, errno.ENETDOWN, errno.ENETUNREACH, errno.ENETRESET,
    errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENONET, errno.EPIPE, errno.ESHUTDOWN, errno.ENOTCONN,
})  # fmt: skip
# The machine or the process has none left: the connection stays queued, so pause before the next try.
RESOURCE_ERRNOS = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS})

# What time or an operator can change without a new configuration.
_RETRY = RESOURCE_ERRNOS | {
    errno.EADDRINUSE, errno.EADDRNOTAVAIL, errno.ENODEV, errno.ENXIO, errno.ENETDOWN, errno.ENOENT, errno.EACCES,
    errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ELOOP,
    errno.EBUSY, errno.EIO, errno.EMLINK, errno.ESTALE, errno.EAGAIN,
}  # fmt: skip
_RETRY_OPTION = RESOURCE_ERRNOS | {errno.ENODEV, errno.ENXIO, errno.ENETDOWN}

_SO_SNDBUFFORCE, _SO_RCVBUFFORCE, _SO_TIMESTAMPNS = 32, 33, 35
_IP_PKTINFO, _IP_FREEBIND = 8, 15
_IPV6_FREEBIND, _IPV6_TRANSPARENT = 78, 75
_SCTP_NODELAY = 3
_PROTOCOLS = {"mptcp": 262, "sctp": 132, "udplite": 136}
_TYPES = {"stream": socket.SOCK_STREAM, "datagram": socket.SOCK_DGRAM, "seqpacket": socket.SOCK_SEQPACKET}
_KINDS = {number: kind for kind, number in _TYPES.items()}
_SOCKADDR_BYTES = 128  # struct sockaddr_storage
_FAMILY = struct.Struct("=H")
_SOCKADDR_IN, _SOCKADDR_IN6, _SOCKADDR_VM = struct.Struct("!2xH4s"), struct.Struct("!2xH4x16s"), struct.Struct("=4xII")

# (level, option) -> the value that takes it back. What is not here comes back only with a new socket.
_OFF: dict[tuple[int, int], int | bytes] = {
    (socket.SOL_SOCKET, socket.SO_REUSEPORT): 0, (socket.SOL_SOCKET, socket.SO_BROADCAST): 0,
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE): 0, (socket.SOL_SOCKET, socket.SO_BINDTODEVICE): b"\0",
    (socket.SOL_SOCKET, socket.SO_MARK): 0, (socket.SOL_SOCKET, socket.SO_PRIORITY): 0,
    (socket.SOL_SOCKET, socket.SO_PASSCRED): 0, (socket.SOL_SOCKET, _SO_TIMESTAMPNS): 0,
    (socket.IPPROTO_IP, _IP_FREEBIND): 0, (socket.IPPROTO_IPV6, _IPV6_FREEBIND): 0,
    (socket.IPPROTO_IP, socket.IP_TRANSPARENT): 0, (socket.IPPROTO_IPV6, _IPV6_TRANSPARENT): 0,
    (socket.IPPROTO_IP, socket.IP_TOS): 0, (socket.IPPROTO_IPV6, socket.IPV6_TCLASS): 0,
    (socket.IPPROTO_IP, socket.IP_TTL): -1, (socket.IPPROTO_IPV6, socket.IPV6_UNICAST_HOPS): -1,
    (socket.IPPROTO_IP, _IP_PKTINFO): 0, (socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO): 0,
    (socket.IPPROTO_TCP, socket.TCP_NODELAY): 0, (socket.IPPROTO_SCTP, _SCTP_NODELAY): 0,
    (socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT): 0,
}  # fmt: skip


class BindError(OSError):
    """A listener could not be had. `str()` is the reason alone: "cannot bind ADDRESS: " is the caller's to write.

    stage    "bind", "listen", "directory", "path", "mode", "owner", "symlinks", "inherited", or "option KEY"
    retry    whether it may come right by itself: the port is released, the interface appears, a directory is mended
    held_by  who has the address, such as "pid 123 (nginx)"; "" when not known
    """

    def __init__(
        self, number: int, stage: str, address: Address, reason: str = "", *, retry: bool | None = None
    ) -> None:
        super().__init__(number, reason or _lower(os.strerror(number)))
        self.stage = stage
        self.address = address
        self.retry = number in (_RETRY_OPTION if stage.startswith("option ") else _RETRY) if retry is None else retry
        self.held_by = ""

    def __str__(self) -> str:
        by = f" by {self.held_by}" if self.held_by else ""
        return f"{'' if self.stage in ('bind', 'listen') else self.stage + ': '}{self.strerror}{by}"


@dataclass(frozen=True, slots=True)
class Bound:
    """An open listener. The caller owns fd.

    address   as it was asked for, with the real host and port (after port 0, for "localhost", for fd:NAME)
    identity  of the UNIX socket or FIFO in the file system, else None. The open fd pins the inode, so its number means
              this file, and no later one, for as long as fd is open
    """

    fd: int
    address: Address
    identity: Identity | None = None


def bind_listener(
    spec: SocketSpec,
    *,
    inherited: Mapping[str, list[int]],
    trusted_uid: int,
    allow_sticky: bool = True,
    find_holder: Callable[[Address], object | None] | None = None,
    connections: bool = False,
) -> list[Bound]:
    """The listeners of one socket table: one, but two for tcp:localhost, and all of a name for fd:NAME.

    inherited     what inherited_sockets() gave. The fds of a name go to the caller with Bound, and its list is emptied
    trusted_uid   the service's user: besides root the only one who may be able to replace a path
    allow_sticky  accept a UNIX socket directly inside a sticky directory such as /tmp
    find_holder   asked for the holder (holders.find_holder) when an address is in use; it reads all of /proc
    connections   the caller will accept, so an inherited datagram socket is an error

    All or nothing: after an error no fd and no new path is left. Raises BindError.
    """
    address = spec.address
    with ExitStack() as scratch, ExitStack() as undo, _stage("bind", address):
        try:
            if address.scheme == "fd":
                return _take_inherited(spec, inherited, connections)
            if address.scheme == "tcpmux":
                return [Bound(open_inbox(), address)]
            if not (address.is_unix or address.scheme == "fifo") or address.is_abstract:
                _refuse_path_keys(spec)
            if address.is_abstract:
                bound = [_bind_one(spec, address, socket.AF_UNIX, "\0" + _path_text(address)[1:], undo)]
            elif address.is_unix:
                bound = [_bind_path(spec, trusted_uid, allow_sticky, undo, scratch)]
            elif address.scheme == "fifo":
                bound = [_open_fifo(spec, trusted_uid, allow_sticky, undo, scratch)]
            elif address.scheme == "vsock":
                where = (socket.VMADDR_CID_ANY if address.cid is None else address.cid, address.port or 0)
                # Port 0 is a real port there; the number that asks the kernel for one is VMADDR_PORT_ANY.
                where = (where[0], where[1] or socket.VMADDR_PORT_ANY)
                bound = [_bind_one(spec, address, socket.AF_VSOCK, where, undo)]
            else:
                bound = _bind_ip(spec, undo)
        except BindError as error:
            if error.errno == errno.EADDRINUSE and not error.held_by and find_holder is not None:
                error.held_by = str(find_holder(error.address) or "")
            raise
        undo.pop_all()
    return bound


def _bind_ip(spec: SocketSpec, undo: ExitStack) -> list[Bound]:
    """All IP schemes. Several families with port 0: the first gets a port, the others ask for the same one."""
    targets = _ip_targets(spec.address)
    # A port that the kernel chose in one family may be taken in the other, and (tcp) SO_REUSEADDR lets bind(2) share
    # a port that only listen(2) then refuses. Another choice is all that helps.
    for tries_left in reversed(range(32)):
        bound: list[Bound] = []
        with ExitStack() as mine:
            try:
                for address, family, host in targets:
                    port = bound[0].address.port if bound else address.port
                    try:
                        where = _sockaddr(address, family, host, port or 0)
                        bound.append(_bind_one(spec, replace(address, port=port), family, where, mine))
                    except BindError as error:
                        no_family = error.errno in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL)
                        if not (no_family and family == socket.AF_INET6 and len(targets) > 1):
                            raise
                    if bound and spec.address.host is None:
                        break  # dual stack has it all; the IPv4 target is for machines without IPv6
            except BindError as error:
                if error.errno == errno.EADDRINUSE and spec.address.port == 0 and tries_left:
                    continue
                raise
            undo.push(mine.pop_all())
            return bound
    raise AssertionError("unreachable")


def _ip_targets(address: Address) -> list[tuple[Address, socket.AddressFamily, str]]:
    four, six = socket.AF_INET, socket.AF_INET6
    base, only = address.scheme[:3], address.scheme[3:]
    if address.host is None:
        if only == "4":
            return [(address, four, "0.0.0.0")]
        if only == "6":
            return [(address, six, "::")]
        return [(address, six, "::"), (replace(address, scheme="tcp4" if base == "tcp" else "udp4"), four, "0.0.0.0")]
    if address.host == "localhost":
        both = [(replace(address, host="127.0.0.1"), four, "127.0.0.1"), (replace(address, host="::1"), six, "::1")]
        return both[:1] if only == "4" else both[1:] if only == "6" else both
    return [(address, six if ":" in address.host else four, address.host)]


def _sockaddr(address: Address, family: int, host: str, port: int) -> tuple[str, int] | tuple[str, int, int, int]:
    if family == socket.AF_INET:
        return host, port
    host, _, scope = host.partition("%")
    return host, port, 0, _interface(scope, "bind", address) if scope else 0


def _interface(name: str, stage: str, address: Address) -> int:
    if name.isascii() and name.isdigit():
        return int(name)
    try:
        return socket.if_nametoindex(name)
    except OSError:  # has no errno
        raise BindError(errno.ENODEV, stage, address, f"there is no interface '{name}'") from None


def _bind_one(
    spec: SocketSpec,
    address: Address,
    family: socket.AddressFamily,
    where: str | tuple[int, int] | tuple[str, int] | tuple[str, int, int, int],
    undo: ExitStack,
    born: int | None = None,
    ready: Callable[[], None] = lambda: None,
) -> Bound:
    """A socket with its options, bound to `where` and listening. `ready` runs between bind(2) and listen(2)."""
    protocol = _PROTOCOLS[spec.protocol] if spec.protocol else 0
    with _stage("option protocol" if protocol else "bind", address):
        listener = socket.socket(family, _TYPES[address.kind], protocol)
    fd = listener.detach()
    with ExitStack() as own, _borrow(fd) as listener:
        own.callback(os.close, fd)
        if address.scheme.startswith("tcp"):
            # For TCP it only means not waiting for TIME-WAIT. For UDP it would let any local user share the port.
            with _stage("bind", address):
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            with _stage("bind", address):
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, address.scheme.endswith("6"))
        apply_options(fd, spec if spec.address is address else replace(spec, address=address))
        if born is not None:
            with _stage("mode", address):
                os.fchmod(fd, born)
        with _stage("bind", address):
            listener.bind(where)
        ready()
        if address.kind != "datagram":
            with _stage("listen", address):
                listener.listen(spec.backlog)
        if address.is_ip or family == socket.AF_VSOCK:
            address = replace(address, port=listener.getsockname()[1])
        undo.push(own.pop_all())
        return Bound(fd, address)


# Options


def apply_options(fd: int, spec: SocketSpec, was: SocketSpec | None = None) -> None:
    """Set every option of spec that a socket has, before bind or on a live listener, whose backlog is set too.

    was: what the fd had before; options that spec no longer asks for go back to the kernel's default. BindError (stage
    "option KEY", ENOTSUP) for those that cannot: the socket has to be bound again. Connections already accepted keep
    what they have. A buffer beyond net.core.rmem_max needs CAP_NET_ADMIN, without it the kernel clamps (socket(7)).
    """
    address = spec.address
    if stat.S_ISFIFO(os.fstat(fd).st_mode):
        return _apply_to_fifo(fd, spec, was)
    with _borrow(fd) as sock:
        wanted = list(_settings(sock, spec))
        kept = {(level, option, value if key == "multicast" else None) for key, level, option, value in wanted}
        for key, level, option, value in _settings(sock, was) if was is not None else ():
            if (level, option, value if key == "multicast" else None) in kept:
                continue
            with _stage(f"option {key}", address):
                if key == "multicast":  # the option after JOIN is LEAVE, in both families
                    sock.setsockopt(level, option + 1, value)
                elif (level, option) in _OFF:
                    sock.setsockopt(level, option, _OFF[level, option])
                elif key != "keep_alive" or spec.keep_alive is not None:  # its times mean nothing once it is off
                    reason = "only a new socket has the kernel's default"
                    raise BindError(errno.ENOTSUP, f"option {key}", address, reason)
        for key, level, option, value in wanted:
            with _stage(f"option {key}", address):
                _set(sock, key, level, option, value)
        if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            with _stage("listen", address):
                sock.listen(spec.backlog)


def _set(sock: socket.socket, key: str, level: int, option: int, value: int | bytes) -> None:
    if isinstance(value, int) and not -(1 << 31) <= value < 1 << 31:
        raise OverflowError("the number does not fit into 32 bits")
    try:
        sock.setsockopt(level, option, value)
    except PermissionError:
        if option not in (_SO_RCVBUFFORCE, _SO_SNDBUFFORCE):
            raise
        sock.setsockopt(level, socket.SO_RCVBUF if option == _SO_RCVBUFFORCE else socket.SO_SNDBUF, value)
    except OSError as error:
        if key != "multicast" or error.errno != errno.EADDRINUSE:  # that means joined already
            raise


def _apply_to_fifo(fd: int, spec: SocketSpec, was: SocketSpec | None) -> None:
    keys = (*_TCP_KEYS, *_IP_KEYS, *_UNIX_KEYS, "protocol", "timestamping", "send_buffer")
    asked = [key for key in keys if getattr(spec, key) not in (None, False, ())]
    if asked:
        key = asked[0].removesuffix("_s")
        raise BindError(errno.ENOTSOCK, f"option {key}", spec.address, "a FIFO has no such option")
    if spec.receive_buffer is not None or (was is not None and was.receive_buffer is not None):
        with _stage("option receive_buffer", spec.address):
            fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, spec.receive_buffer or 16 * 4096)  # pipe(7)


_TCP_KEYS = ("no_delay", "keep_alive", "defer_accept_s", "congestion")
_IP_KEYS = (
    "reuse_port", "free_bind", "transparent", "broadcast", "device", "mark", "tos", "ttl", "priority",
    "pass_packet_info", "multicast",
)  # fmt: skip
_UNIX_KEYS = ("pass_credentials",)


def _settings(sock: socket.socket, spec: SocketSpec) -> Iterator[tuple[str, int, int, int | bytes]]:
    """(key, level, option, value) for each thing that spec asks of this socket; tos before priority, which it changes.

    A key that means nothing to the socket's family or type is an error: the kernel takes SO_MARK on a UNIX socket
    without a word, and an option that does nothing must not pass for one that is set.
    """
    family, ip, tcp, base = sock.family, socket.IPPROTO_IP, socket.IPPROTO_TCP, socket.SOL_SOCKET
    four, six = family == socket.AF_INET, family == socket.AF_INET6
    if six and not sock.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY):
        four = True  # dual stack: IPv4 packets go by the IPv4 options
    stream = (four or six) and sock.type == socket.SOCK_STREAM
    sctp = sock.proto == socket.IPPROTO_SCTP
    for keys, apply in ((_TCP_KEYS, stream), (_IP_KEYS, four or six), (_UNIX_KEYS, family == socket.AF_UNIX)):
        for key in keys:
            if getattr(spec, key) not in (None, False, ()) and not apply:
                raise BindError(errno.EOPNOTSUPP, f"option {key.removesuffix('_s')}", spec.address)
    if spec.reuse_port:
        yield "reuse_port", base, socket.SO_REUSEPORT, 1
    if spec.device is not None:
        yield "device", base, socket.SO_BINDTODEVICE, os.fsencode(spec.device) + b"\0"
    if spec.broadcast:
        yield "broadcast", base, socket.SO_BROADCAST, 1
    for key, option4, option6, wanted in (
        ("free_bind", _IP_FREEBIND, _IPV6_FREEBIND, spec.free_bind or None),
        ("transparent", socket.IP_TRANSPARENT, _IPV6_TRANSPARENT, spec.transparent or None),
        ("tos", socket.IP_TOS, socket.IPV6_TCLASS, spec.tos),
        ("ttl", socket.IP_TTL, socket.IPV6_UNICAST_HOPS, spec.ttl),
        ("pass_packet_info", _IP_PKTINFO, socket.IPV6_RECVPKTINFO, spec.pass_packet_info or None),
    ):
        if four and wanted is not None:
            yield key, ip, option4, int(wanted)
        if six and wanted is not None:
            yield key, socket.IPPROTO_IPV6, option6, int(wanted)
    if spec.mark is not None:
        yield "mark", base, socket.SO_MARK, spec.mark - (1 << 32 if spec.mark >> 31 == 1 else 0)  # unsigned
    if spec.priority is not None:
        yield "priority", base, socket.SO_PRIORITY, spec.priority
    if spec.no_delay:
        yield "no_delay", *((socket.IPPROTO_SCTP, _SCTP_NODELAY) if sctp else (tcp, socket.TCP_NODELAY)), 1
    if spec.keep_alive is not None:
        alive = spec.keep_alive
        yield "keep_alive", base, socket.SO_KEEPALIVE, 1
        if alive.idle_s is not None:
            yield "keep_alive", tcp, socket.TCP_KEEPIDLE, math.ceil(alive.idle_s)
        if alive.interval_s is not None:
            yield "keep_alive", tcp, socket.TCP_KEEPINTVL, math.ceil(alive.interval_s)
        if alive.count is not None:
            yield "keep_alive", tcp, socket.TCP_KEEPCNT, alive.count
    if spec.defer_accept_s is not None:
        yield "defer_accept", tcp, socket.TCP_DEFER_ACCEPT, math.ceil(spec.defer_accept_s)
    if spec.congestion is not None:
        yield "congestion", tcp, socket.TCP_CONGESTION, spec.congestion.encode()
    if spec.receive_buffer is not None:
        yield "receive_buffer", base, _SO_RCVBUFFORCE, spec.receive_buffer
    if spec.send_buffer is not None:
        yield "send_buffer", base, _SO_SNDBUFFORCE, spec.send_buffer
    if spec.pass_credentials:
        yield "pass_credentials", base, socket.SO_PASSCRED, 1
    if spec.timestamping:
        yield "timestamping", base, _SO_TIMESTAMPNS, 1
    for entry in spec.multicast:
        group, _, name = entry.partition("%")
        index = _interface(name, "option multicast", spec.address) if name else 0
        try:
            if ":" in group:
                packed = socket.inet_pton(socket.AF_INET6, group) + struct.pack("@I", index)
                yield "multicast", socket.IPPROTO_IPV6, socket.IPV6_JOIN_GROUP, packed
            else:  # struct ip_mreqn, ip(7)
                packed = socket.inet_pton(socket.AF_INET, group) + struct.pack("@4si", b"", index)
                yield "multicast", ip, socket.IP_ADD_MEMBERSHIP, packed
        except OSError:
            raise BindError(errno.EINVAL, "option multicast", spec.address, f"'{group}' is not an address") from None


# UNIX paths and FIFOs


def _bind_path(spec: SocketSpec, trusted_uid: int, allow_sticky: bool, undo: ExitStack, scratch: ExitStack) -> Bound:
    address, path = spec.address, _path_text(spec.address)
    uid, gid = _owner(spec)
    directory = _open_directory(spec, path, trusted_uid, allow_sticky, scratch)
    name = os.path.basename(path)
    _clear_stale(address, path, name, directory)
    identity: list[Identity] = []

    def finish() -> None:
        with _stage("path", address):
            held = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
        scratch.callback(os.close, held)
        status = os.fstat(held)
        if not stat.S_ISSOCK(status.st_mode) or status.st_nlink != 1:
            raise BindError(errno.EEXIST, "path", address, "was replaced while it was being made")
        identity.append((status.st_dev, status.st_ino))
        undo.callback(remove_unix_path, path, identity[0], spec.symlinks)
        _set_owner(spec, uid, gid, held, name, directory)

    # bind(2) makes the file with the mode of the socket, less the umask, and with our owner. With another owner to come
    # it is born for its owner alone: at no time is it open to more than the final owner and mode say.
    born = spec.mode if (uid, gid) == (-1, -1) else spec.mode & 0o700
    bound = _bind_one(spec, address, socket.AF_UNIX, path, undo, born, finish)
    _make_symlinks(spec, path, trusted_uid, allow_sticky, scratch)
    return Bound(bound.fd, bound.address, identity[0])


def _open_fifo(spec: SocketSpec, trusted_uid: int, allow_sticky: bool, undo: ExitStack, scratch: ExitStack) -> Bound:
    """Read-write, so that there is always a writer and the last real one to leave causes no EOF (fifo(7)).

    A FIFO that is there already is used again if root or the service's user owns it: nothing tells a stale one.
    """
    address, path = spec.address, _path_text(spec.address)
    uid, gid = _owner(spec)
    directory = _open_directory(spec, path, trusted_uid, allow_sticky, scratch)
    name = os.path.basename(path)
    made = False
    with _stage("bind", address):
        with suppress(FileExistsError):
            os.mkfifo(name, 0o600, dir_fd=directory)
            made = True
        status = os.lstat(name, dir_fd=directory)
        if not stat.S_ISFIFO(status.st_mode):
            raise BindError(errno.EEXIST, "bind", address, f"{_file_type(status.st_mode)} is in the way")
        flags = os.O_RDWR | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_NOCTTY | os.O_CLOEXEC
        fd = os.open(name, flags, dir_fd=directory)
    undo.callback(os.close, fd)
    status = os.fstat(fd)
    if not stat.S_ISFIFO(status.st_mode) or status.st_nlink != 1 or status.st_uid not in {*_trusted(trusted_uid), uid}:
        raise BindError(errno.EEXIST, "bind", address, f"a FIFO of uid {status.st_uid} is in the way")
    identity = status.st_dev, status.st_ino
    if made:
        undo.callback(remove_unix_path, path, identity, spec.symlinks)
    os.set_blocking(fd, True)  # O_NONBLOCK was for the open alone, should the FIFO have been swapped
    if (uid, gid) != (-1, -1):
        with _stage("owner", address):
            os.fchown(fd, uid, gid)
    with _stage("mode", address):
        os.fchmod(fd, spec.mode)
    apply_options(fd, spec)
    _make_symlinks(spec, path, trusted_uid, allow_sticky, scratch)
    return Bound(fd, address, identity)


def apply_path(
    spec: SocketSpec,
    identity: Identity,
    *,
    trusted_uid: int,
    allow_sticky: bool = True,
    was: SocketSpec | None = None,
) -> None:
    """Give the path of an open listener the owner, mode and symlinks of spec, and take away the symlinks of `was`.

    Raises BindError: stage "path" when the path is not the file with this identity any more, so nothing was changed.
    """
    path = _path_text(spec.address)
    uid, gid = _owner(spec)
    if was is not None and (uid, gid) == (-1, -1) != _owner(was):
        uid, gid = os.geteuid(), os.getegid()
    with ExitStack() as scratch:
        directory = _open_directory(spec, path, trusted_uid, allow_sticky, scratch)
        name = os.path.basename(path)
        with _stage("path", spec.address):
            held = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
        scratch.callback(os.close, held)
        status = os.fstat(held)
        if (status.st_dev, status.st_ino) != identity or status.st_nlink != 1:
            raise BindError(errno.ESTALE, "path", spec.address, "is not the socket that was bound any more")
        _set_owner(spec, uid, gid, held, name, directory)
        _make_symlinks(spec, path, trusted_uid, allow_sticky, scratch)
    _remove_symlinks(path, set(was.symlinks if was is not None else ()) - set(spec.symlinks))


def _set_owner(spec: SocketSpec, uid: int, gid: int, held: int, name: str, directory: int) -> None:
    """Set owner and mode of the file that `held` holds. On the way no mode meets an owner that it was not meant for."""
    status = os.fstat(held)
    mode = stat.S_IMODE(status.st_mode)

    def change_mode(new: int) -> None:
        with _stage("mode", spec.address):
            _through(held, name, directory, lambda where, at: os.chmod(where, new, dir_fd=at))

    if uid not in (-1, status.st_uid) or gid not in (-1, status.st_gid):
        if mode & ~(spec.mode & 0o700):
            change_mode(mode := mode & spec.mode & 0o700)
        with _stage("owner", spec.address):
            _through(held, name, directory, lambda where, at: os.chown(where, uid, gid, dir_fd=at))
    if mode != spec.mode:
        change_mode(spec.mode)


def path_is_ours(path: str, identity: Identity) -> bool:
    """Whether the path still leads to the file that was bound; a cleaner of /tmp may have removed it."""
    try:
        status = os.lstat(path)
    except OSError:
        return False
    return (status.st_dev, status.st_ino) == identity


def remove_unix_path(path: str, identity: Identity, symlinks: tuple[str, ...] = ()) -> bool:
    """Unlink path if it is still ours, and those of symlinks that point to it. Whether path was removed.

    Call it before closing the listener: an open fd keeps the inode number from being given to another file. What cannot
    be removed, or is not there, stays as it is.
    """
    _remove_symlinks(path, symlinks)
    if not path_is_ours(path, identity):
        return False
    with suppress(OSError):
        os.unlink(path)
        return True
    return False


def _remove_symlinks(path: str, symlinks: Iterable[str]) -> None:
    for link in symlinks:
        with suppress(OSError):
            if os.readlink(link) == path:
                os.unlink(link)


def _path_text(address: Address) -> str:
    """The path, with what bind(2) would take in an unexpected way refused: too long, empty (an abstract name of the
    kernel's choice), cut at a NUL."""
    path = address.path or ""
    size = len(os.fsencode(path)) - address.is_abstract  # the NUL that stands for @ is one of 108, a path ends with one
    if not path.strip("@") or "\0" in path:
        raise BindError(errno.EINVAL, "path", address, "a path must not be empty or contain a NUL", retry=False)
    if address.is_unix and size > 107:
        reason = f"has {size} bytes, and a UNIX socket has room for 107"
        raise BindError(errno.ENAMETOOLONG, "path", address, reason, retry=False)
    return path


def _refuse_path_keys(spec: SocketSpec) -> None:
    """Only a file has an owner, a mode and links; who asks for them wants protection that would not be there."""
    default = SocketSpec(spec.address, spec.name)
    for key in ("mode", "user", "group", "symlinks"):
        if getattr(spec, key) != getattr(default, key):
            raise BindError(errno.EOPNOTSUPP, f"option {key}", spec.address, "there is no file that could have it")


def _owner(spec: SocketSpec) -> tuple[int, int]:
    """uid and gid for chown(2), -1: as it is. A user alone brings the user's own group, as with systemd."""
    import grp  # here, because few need them and they are not free
    import pwd

    uid = gid = -1
    try:
        if isinstance(spec.user, str):
            _, _, uid, gid, *_ = pwd.getpwnam(spec.user)
        elif spec.user is not None:
            uid = spec.user
            with suppress(KeyError):
                gid = pwd.getpwuid(uid).pw_gid
        if isinstance(spec.group, str):
            gid = grp.getgrnam(spec.group).gr_gid
        elif spec.group is not None:
            gid = spec.group
    except KeyError as error:
        raise BindError(errno.EINVAL, "owner", spec.address, _lower(str(error.args[0])), retry=True) from None
    return uid, gid


def _trusted(trusted_uid: int) -> set[int]:
    """Who may own a directory on the way to a socket. In a user namespace the real root is often not mapped and shows
    as the overflow uid, which then is nobody that lives in here (user_namespaces(7))."""
    return {0, os.geteuid(), trusted_uid} | _nobody_at_all()


@cache
def _nobody_at_all() -> frozenset[int]:
    """The overflow uid where no user here can have it; a process stays in its user namespace."""
    with suppress(OSError, ValueError):
        overflow = int(_read("/proc/sys/kernel/overflowuid"))
        ranges = [tuple(map(int, line.split())) for line in _read("/proc/self/uid_map").splitlines()]
        if not any(first <= overflow < first + count for first, _, count in ranges):
            return frozenset({overflow})
    return frozenset()


def _open_directory(spec: SocketSpec, path: str, trusted_uid: int, allow_sticky: bool, scratch: ExitStack) -> int:
    """O_PATH fd, closed by scratch, of the directory of path; missing ones are made. As root nobody but root, us and
    trusted_uid may be able to put something else in its place, or in that of one above it or of what it contains."""
    parent = os.path.dirname(path)
    missing = []
    if not parent.startswith("/"):
        raise BindError(errno.EINVAL, "directory", spec.address, f"'{path}' is not an absolute path", retry=False)
    with _stage("directory", spec.address):
        while not os.path.lexists(parent):
            missing.append(parent)
            parent = os.path.dirname(parent)
        _check_directory(spec.address, parent, trusted_uid, allow_sticky)
        for directory in reversed(missing):
            with suppress(FileExistsError):
                try:
                    os.mkdir(directory, 0o700)
                except (PermissionError, FileNotFoundError) as error:  # in /proc nothing can be made
                    number = error.errno or errno.EACCES
                    reason = f"cannot make '{directory}': {_lower(os.strerror(number))}"
                    raise BindError(number, "directory", spec.address, reason) from error
                fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
                try:
                    os.fchmod(fd, spec.directory_mode)  # mkdir would take the umask off
                finally:
                    os.close(fd)
        if missing:
            _check_directory(spec.address, missing[0], trusted_uid, allow_sticky)
        fd = os.open(os.path.dirname(path), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    scratch.callback(os.close, fd)
    return fd


def _check_directory(address: Address, directory: str, trusted_uid: int, allow_sticky: bool) -> None:
    if os.geteuid() != 0:
        return
    trusted = _trusted(trusted_uid)
    real = os.path.realpath(directory)
    for step in _steps(directory) if real == directory else sorted({*_steps(directory), *_steps(real)}):
        status = os.lstat(step)
        why = ""
        if status.st_uid not in trusted:
            why = f"belongs to uid {status.st_uid}"
        elif stat.S_ISLNK(status.st_mode):
            continue
        elif not stat.S_ISDIR(status.st_mode):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        elif status.st_mode & 0o022 and not (status.st_mode & stat.S_ISVTX and (allow_sticky or step != real)):
            why = f"has mode {stat.S_IMODE(status.st_mode):04o}"
        if why:
            raise BindError(errno.EPERM, "directory", address, f"{step} {why}: other users could replace the socket")


@lru_cache(maxsize=64)
def _steps(path: str) -> tuple[str, ...]:
    """From the root down to the path itself."""
    parent = os.path.dirname(path)
    return (path,) if parent == path else (*_steps(parent), path)


def _clear_stale(address: Address, path: str, name: str, directory: int) -> None:
    """Unlink a socket that no process listens on any more. Raises BindError when anything or anybody else is there."""
    with _stage("bind", address):
        try:
            held = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
        except FileNotFoundError:
            return
        try:
            status = os.fstat(held)
            if not stat.S_ISSOCK(status.st_mode):
                raise BindError(errno.EEXIST, "bind", address, f"{_file_type(status.st_mode)} is in the way")
            if _answers(address, held) or _between_bind_and_listen(path, status.st_ctime):
                raise BindError(errno.EADDRINUSE, "bind", address)
            now = os.lstat(name, dir_fd=directory)
            if (now.st_dev, now.st_ino) != (status.st_dev, status.st_ino):  # `held` keeps the number from being reused
                raise BindError(errno.EADDRINUSE, "bind", address)
            os.unlink(name, dir_fd=directory)
        finally:
            os.close(held)


def _answers(address: Address, held: int) -> bool:
    """Whether a process has the socket. Only ECONNREFUSED says no; EAGAIN is a full backlog, EPROTOTYPE another type,
    EACCES somebody else's."""
    with socket.socket(socket.AF_UNIX, _TYPES[address.kind]) as probe:
        probe.setblocking(False)
        where = f"/proc/self/fd/{held}"  # this very file, whatever becomes of its name
        try:
            probe.connect(where if os.path.exists(where) else address.path or "")
        except ConnectionRefusedError:
            return False
        except OSError:
            return True
        return True


def _between_bind_and_listen(path: str, changed: float) -> bool:
    """Whether a process has bound the path and does not listen yet: it refuses connections like a stale socket does.

    changed: the ctime of the file. One look at all sockets is enough for those that are older than it, and there may be
    thousands, of a superd that was killed.
    """
    needle = os.fsencode(path)
    looked, until, bound = _bound_only[0]
    if changed > looked - _LOOK_MARGIN_S or time.monotonic() > until or needle in bound:
        looked, bound = time.time(), set()
        with suppress(OSError), open("/proc/net/unix", "rb") as table:
            for row in table:  # Num RefCount Protocol Flags Type St Inode Path
                fields = row.rstrip(b"\n").split(None, 7)
                # not __SO_ACCEPTCON, SS_UNCONNECTED, and no datagram socket, which answers without listening
                if fields[3:4] + fields[5:6] == [b"00000000", b"01"] and fields[4] != b"0002":
                    bound.update(fields[7:])
        _bound_only[0] = looked, time.monotonic() + _LOOK_VALID_S, bound
    return needle in bound


# The last look: when (as files have it), until when it counts (monotonic: clocks are set), paths without a listener.
_bound_only: list[tuple[float, float, set[bytes]]] = [(0.0, 0.0, set())]
_LOOK_MARGIN_S = 0.05  # more than the grain of a file's times
_LOOK_VALID_S = 5.0


def _through(held: int, name: str, directory: int, act: Callable[[str, int | None], None]) -> None:
    """act() on the very file that an O_PATH fd holds: /proc/self/fd/N leads to it and to no other, whatever has become
    of the name. Without /proc by name, where nobody but root and us can put a symlink in its place."""
    where = f"/proc/self/fd/{held}"
    if os.path.exists(where):
        return act(where, None)
    status = os.fstat(directory)
    if status.st_uid not in (0, os.geteuid()) or status.st_mode & 0o022:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))
    act(name, directory)


def _make_symlinks(spec: SocketSpec, path: str, trusted_uid: int, allow_sticky: bool, scratch: ExitStack) -> None:
    for link in spec.symlinks:
        directory = _open_directory(spec, link, trusted_uid, allow_sticky, scratch)
        name = os.path.basename(link)
        with _stage("symlinks", spec.address):
            try:
                os.symlink(path, name, dir_fd=directory)
            except FileExistsError:
                status = os.lstat(name, dir_fd=directory)
                if not stat.S_ISLNK(status.st_mode) or status.st_uid not in _trusted(trusted_uid):
                    reason = f"{_file_type(status.st_mode)} of uid {status.st_uid} is in the way at {link}"
                    raise BindError(errno.EEXIST, "symlinks", spec.address, reason) from None
                spare = f".{name[:200]}.superd-{os.getpid()}"
                with suppress(FileNotFoundError):
                    os.unlink(spare, dir_fd=directory)
                os.symlink(path, spare, dir_fd=directory)
                os.replace(spare, name, src_dir_fd=directory, dst_dir_fd=directory)


# Sockets that superd was given


def inherited_sockets(environ: Mapping[str, str], pid: int) -> tuple[dict[str, list[int]], str | None]:
    """The fds of LISTEN_FDS by name, in order, and why there are none although something was said (sd_listen_fds(3)).

    They become close-on-exec and are the caller's. The variables stay in environ: no child may see them.
    """
    if not environ.keys() & {"LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES"}:
        return {}, None
    count, owner = _decimal(environ.get("LISTEN_FDS")), _decimal(environ.get("LISTEN_PID"))
    if owner is None or count is None or not 0 < count < 1 << 20:
        return {}, "LISTEN_FDS and LISTEN_PID must both be positive numbers"
    if owner != pid:
        return {}, f"LISTEN_PID is {owner}, not {pid}: the sockets are for another process"
    if "LISTEN_PIDFDID" in environ:  # a pid can come round again, its pidfd's inode number cannot
        with suppress(OSError):
            pidfd = os.pidfd_open(pid)
            identity = os.fstat(pidfd).st_ino
            os.close(pidfd)
            if _decimal(environ["LISTEN_PIDFDID"]) != identity:
                return {}, "LISTEN_PIDFDID is not this process: the sockets are for another"
    names = environ["LISTEN_FDNAMES"].split(":") if "LISTEN_FDNAMES" in environ else ["unknown"] * count
    if len(names) != count:
        return {}, f"LISTEN_FDNAMES has {len(names)} names for {count} fds"
    found: dict[str, list[int]] = {}
    for fd, name in enumerate(names, 3):
        try:
            os.set_inheritable(fd, False)
        except OSError as error:
            return {}, f"fd {fd} of LISTEN_FDS={count}: {_lower(os.strerror(error.errno or errno.EBADF))}"
        found.setdefault(name, []).append(fd)
    return found, None


def _take_inherited(spec: SocketSpec, inherited: Mapping[str, list[int]], connections: bool) -> list[Bound]:
    _refuse_path_keys(spec)
    name = spec.address.path or ""
    fds = inherited.get(name)
    if not fds:
        reason = f"superd was given no socket named '{name}'"
        raise BindError(errno.ENOENT, "inherited", spec.address, reason, retry=False)
    bound = []
    for fd in fds:
        if not stat.S_ISSOCK(os.fstat(fd).st_mode):
            raise BindError(errno.ENOTSOCK, "inherited", spec.address, f"fd {fd} is no socket")
        with _borrow(fd) as sock:
            if sock.type != socket.SOCK_DGRAM and not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                raise BindError(errno.EINVAL, "inherited", spec.address, f"fd {fd} does not listen")
            if sock.type == socket.SOCK_DGRAM and connections:
                reason = f'fd {fd} is a datagram socket, which has no connections: write run = "on-demand"'
                raise BindError(errno.EOPNOTSUPP, "inherited", spec.address, reason)
            if sock.type != socket.SOCK_STREAM and spec.proxy_protocol:
                reason = f"fd {fd} is no stream socket"
                raise BindError(errno.EOPNOTSUPP, "option proxy_protocol", spec.address, reason)
            if spec.tls and (sock.type != socket.SOCK_STREAM or sock.family == socket.AF_VSOCK):
                reason = f"fd {fd} is no stream socket of TCP or UNIX"
                raise BindError(errno.EOPNOTSUPP, "option tls", spec.address, reason)
        if spec.protocol is not None:
            raise BindError(errno.EOPNOTSUPP, "option protocol", spec.address, "the socket is there already")
        apply_options(fd, spec)
        bound.append(Bound(fd, describe_listener(fd) or spec.address))
    fds.clear()
    return bound


def describe_listener(fd: int) -> Address | None:
    """The address of an open socket as superd writes it, None for one that has none or is of another family."""
    with _borrow(fd) as sock:
        kind, name = _KINDS.get(sock.type), sock.getsockname()
        if sock.family in (socket.AF_INET, socket.AF_INET6) and kind in ("stream", "datagram"):
            tcp = kind == "stream"
            host, port = name[:2]
            if host == "0.0.0.0":
                return Address("tcp4" if tcp else "udp4", None, port)
            if host == "::" and sock.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY):
                return Address("tcp6" if tcp else "udp6", None, port)
            return Address("tcp" if tcp else "udp", None if host == "::" else host, port)
        if sock.family == socket.AF_UNIX and name:
            path = "@" + os.fsdecode(name[1:]) if isinstance(name, bytes) else name
            scheme = "unix-dgram" if kind == "datagram" else "unix-seqpacket" if kind == "seqpacket" else "unix"
            return Address(scheme, path=path)  # type: ignore[arg-type]  # mypy joins the three literals to str
        if sock.family == socket.AF_VSOCK and kind == "stream":
            return Address("vsock", port=name[1], cid=None if name[0] == socket.VMADDR_CID_ANY else name[0])
    return None


# What arrives, and the state of a listener


def datagram_sender(fd: int) -> str | None:
    """Who sent the first datagram in the queue, an address as text; it stays there. None: there is none."""
    try:
        with socket.socket(fileno=os.dup(fd)) as sock:
            sender = sock.recvfrom(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)[1]
    except OSError:
        return None
    return str(sender[0]) if isinstance(sender, tuple) else None


def tell_destination(fd: int) -> None:
    """From now on datagrams say where they were sent to: `receive_datagram` wants to know."""
    with _borrow(fd) as sock:
        for level, option in ((socket.IPPROTO_IP, _IP_PKTINFO), (socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO)):
            with suppress(OSError):  # of the other family
                sock.setsockopt(level, option, 1)


def receive_datagram(fd: int) -> tuple[bytes, Any, bool] | None:
    """(data, sender, sent to many) of the next datagram, None when there is none: a broadcast or multicast address is
    told from the socket's own by IP_PKTINFO, ip(7). Errors that belong to earlier datagrams are passed over."""
    with _borrow(fd) as sock:
        try:
            data, ancillary, _, sender = sock.recvmsg(65536, 256, socket.MSG_DONTWAIT)
        except OSError:
            return None
    for level, kind, payload in ancillary:
        if level == socket.IPPROTO_IP and kind == _IP_PKTINFO:
            own, destination = payload[4:8], payload[8:12]
            return data, sender, own != destination
        if level == socket.IPPROTO_IPV6 and kind == socket.IPV6_PKTINFO and payload[0] == 0xFF:
            return data, sender, True
    return data, sender, False


def drain_datagram(fd: int) -> bool:
    """Read one datagram and drop it, fds that come with it too. False: there was none. From a FIFO: what fits a page.

    A pending error of the socket (an ICMP answer) makes it readable as well, and counts as one.
    """
    if stat.S_ISFIFO(os.fstat(fd).st_mode):
        # Its own open file description, as the listener must stay blocking and a service may be reading too.
        own = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            return bool(os.read(own, 4096))
        except BlockingIOError:
            return False
        finally:
            os.close(own)
    with _borrow(fd) as sock:
        try:
            sock.recv(1, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except (ConnectionError, TimeoutError):
            return True
        except OSError as error:
            if error.errno not in IGNORABLE_ACCEPT_ERRNOS:
                raise
    return True


def accept(listener: socket.socket) -> tuple[int, Any]:
    """A connection's fd, close-on-exec and blocking, and its peer: (IP, port), (CID, port), or "" for a UNIX client.

    The listener does not block. OSError as accept4(2).

    The interpreter lock is kept meanwhile. Python's own accept gives it up, and does not get it back for 5 ms while a
    thread computes (a reload reads files in one): in that time a killed manager would lose the connection.
    """
    call, errno_of, peer, size = _accept4()
    size[0] = _SOCKADDR_BYTES
    fd = call(listener.fileno(), peer, size, socket.SOCK_CLOEXEC)
    if fd < 0:
        number = errno_of()
        raise OSError(number, os.strerror(number))
    (family,) = _FAMILY.unpack_from(peer)
    if family == socket.AF_INET:
        port, host = _SOCKADDR_IN.unpack_from(peer)
        return fd, (socket.inet_ntoa(host), port)
    if family == socket.AF_INET6:
        port, host = _SOCKADDR_IN6.unpack_from(peer)
        return fd, (socket.inet_ntop(socket.AF_INET6, host), port)
    if family == socket.AF_VSOCK:
        port, cid = _SOCKADDR_VM.unpack_from(peer)
        return fd, (cid, port)
    return fd, ""


@cache
def _accept4() -> tuple[Callable[..., int], Callable[[], int], Any, Any]:
    """(the function, the errno it left, where it writes the peer, and the peer's size)."""
    import ctypes

    library = ctypes.PyDLL(None, use_errno=True)  # CDLL would give up the lock
    return library.accept4, ctypes.get_errno, (ctypes.c_char * _SOCKADDR_BYTES)(), (ctypes.c_uint32 * 1)()


def set_priority(fd: int, priority: int) -> None:
    """SO_PRIORITY of a connection: the one option that accept(2) does not take over from the listener."""
    with _borrow(fd) as sock, suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_PRIORITY, priority)


class Inbox(socket.socket):
    """Where connections come from the tcpmux service instead of the kernel; used like a listener.

    A UNIX datagram socket that is connected to itself: nobody else can send to it (EPERM, unix(7)), what waits in it
    outlives the manager, and it is one fd.
    """

    def take(self) -> tuple[int, Any]:
        """As accept(). Raises BlockingIOError when there is none, or it has gone."""
        _, fds, _, _ = socket.recv_fds(self, 1, 1, socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC)
        if not fds:
            raise BlockingIOError
        with _borrow(fds[0]) as client:
            try:
                return fds[0], client.getpeername()
            except OSError:
                os.close(fds[0])
        raise BlockingIOError

    def put(self, fd: int) -> None:
        """The caller still owns fd. Raises OSError when too many wait."""
        socket.send_fds(self, [b"\0"], [fd], socket.MSG_DONTWAIT)


def open_inbox() -> int:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind("")  # a name of the kernel's choice
        sock.connect(sock.getsockname())
        return sock.detach()


def listener_is_dead(fd: int) -> bool:
    """Whether somebody has called shutdown(2) on it: it stays open and readable, yet nothing comes. Bind it again."""
    poll = select.poll()
    poll.register(fd, select.POLLRDHUP)
    return any(events & (select.POLLHUP | select.POLLRDHUP | select.POLLNVAL) for _, events in poll.poll(0))


def peek(fd: int, most: int) -> bytes:
    """What there is to read, which stays there; b"": the end. Raises BlockingIOError when nothing has come yet."""
    with _borrow(fd) as sock:
        return sock.recv(most, socket.MSG_PEEK | socket.MSG_DONTWAIT)


def take(fd: int, count: int) -> bytes:
    """Read as many bytes at most. Raises BlockingIOError when there are none."""
    with _borrow(fd) as sock:
        return sock.recv(count, socket.MSG_DONTWAIT)


def queue_length(fd: int) -> tuple[int, int] | None:
    """How many connections wait for accept, and for how many there is room: TCP listeners only, else None (tcp(7))."""
    with _borrow(fd) as sock:
        try:
            info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 32)
        except OSError:
            return None
    if len(info) < 32 or info[0] != 10:  # TCP_LISTEN, where tcpi_unacked and tcpi_sacked mean the queue
        return None
    waiting, room = struct.unpack_from("@II", info, 24)
    return waiting, room


# Small things


@contextmanager
def _borrow(fd: int) -> Iterator[socket.socket]:
    """A socket object for an fd that stays its owner's."""
    sock = socket.socket(fileno=fd)
    try:
        yield sock
    finally:
        sock.detach()


class _stage:  # as a generator it was a third of what a bind costs
    """OSError to BindError. Some of Python's own have no errno (too long a path); they are the caller's mistake."""

    __slots__ = ("address", "stage")

    def __init__(self, stage: str, address: Address) -> None:
        self.stage, self.address = stage, address

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None or isinstance(error, BindError):
            return
        stage, address, reason = self.stage, self.address, ""
        if isinstance(error, OSError) and error.errno is not None:
            if error.errno == errno.EACCES and stage == "bind" and address.is_ip and (address.port or 0) < 1024:
                reason = "permission denied: a port below 1024 needs CAP_NET_BIND_SERVICE"
            raise BindError(error.errno, stage, address, reason) from error
        if isinstance(error, OSError | OverflowError | ValueError):  # a number that fits no C int, a NUL in a name
            raise BindError(errno.EINVAL, stage, address, _lower(str(error)), retry=False) from error


def _file_type(mode: int) -> str:
    for test, text in ((stat.S_ISDIR, "a directory"), (stat.S_ISLNK, "a symbolic link"), (stat.S_ISFIFO, "a FIFO"),
                       (stat.S_ISSOCK, "a socket"), (stat.S_ISREG, "a file")):  # fmt: skip
        if test(mode):
            return text
    return "a device"


def _decimal(text: str | None) -> int | None:
    return int(text) if text is not None and len(text) <= 20 and text.isascii() and text.isdigit() else None


def _read(path: str) -> str:
    with open(path) as file:
        return file.read()


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:]
