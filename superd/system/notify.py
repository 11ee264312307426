"""Notify sockets, sd_notify(3): receiving from services.

One socket per service, owned by the service's user and mode 0600 in a 0711 directory, so that the path alone tells
whose a message is (I3, I14); the sender's pid from SCM_CREDENTIALS decides whether it counts.
"""

from __future__ import annotations

import array
import contextlib
import fcntl
import os
import socket
import struct
from dataclasses import dataclass, field

_CREDENTIALS = struct.Struct("iII")
_TEXT_BYTES = 4096
# Room for all that a packet can carry (unix(7): 253): with less the kernel would still install those that fit.
_ANCILLARY = socket.CMSG_SPACE(_CREDENTIALS.size) + socket.CMSG_SPACE(253 * 4)


@dataclass(slots=True)
class Message:
    """One datagram. `fields` is empty for one that breaks the rules: it counts, and that is all. The fds are ours."""

    pid: int
    uid: int
    fields: dict[str, str] = field(default_factory=dict)
    fds: list[int] = field(default_factory=list)

    def close(self) -> None:
        """Closing is also the answer to BARRIER=1: the sender waits for it (I4)."""
        for fd in self.fds:
            os.close(fd)
        self.fds.clear()


def parse(data: bytes) -> dict[str, str]:
    """VAR=VALUE lines; the first of a name counts. Empty for NUL inside, or nothing to say (I1, I9).

    What is no UTF-8 is replaced: it can only be text for people, and READY=1 beside it is meant all the same.
    """
    data = data.removesuffix(b"\0")
    if b"\0" in data:
        return {}
    found: dict[str, str] = {}
    for line in data.decode(errors="replace").split("\n"):
        name, equals, value = line.partition("=")
        if equals and name:
            found.setdefault(name, value)
    return found


def open_socket(directory: str, service: str, uid: int, keeper: int) -> socket.socket:
    """A bound socket at DIRECTORY/notify/SERVICE.KEEPER, which the user `uid` may write to. The caller owns it.

    `keeper` is the pid of the keeper: another superd may have a service of this name. What one that was killed
    has left is removed. Raises OSError.
    """
    folder = os.path.join(directory, "notify")
    os.makedirs(folder, mode=0o755, exist_ok=True)
    os.chmod(folder, 0o711)
    for name in os.listdir(folder):
        stem, _, owner = name.rpartition(".")
        if stem == service and owner.isdecimal() and (int(owner) == keeper or not _lives(int(owner))):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(os.path.join(folder, name))
    path = os.path.join(folder, f"{service}.{keeper}")
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        sock.setblocking(False)
        os.fchmod(sock.fileno(), 0o600)  # before bind: it is never wider (D3)
        sock.bind(path)
        if uid != os.geteuid():
            os.chown(path, uid, -1, follow_symlinks=False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
    except OSError:
        sock.close()
        raise
    return sock


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def address_of(sock: socket.socket) -> str:
    name = sock.getsockname()
    assert isinstance(name, str)
    return name


def close_socket(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        os.unlink(address_of(sock))
    sock.close()


def receive(sock: socket.socket) -> Message | None:
    """The next message, None when there is none. Raises OSError for whatever else happens: try again later (I2)."""
    try:
        data, ancillary, flags, _ = sock.recvmsg(_TEXT_BYTES + 1, _ANCILLARY, socket.MSG_CMSG_CLOEXEC)
    except BlockingIOError:
        return None
    message = Message(0, -1)
    for level, kind, payload in ancillary:
        if level != socket.SOL_SOCKET:
            continue
        if kind == socket.SCM_RIGHTS:
            numbers = array.array("i")
            numbers.frombytes(payload[: len(payload) - len(payload) % 4])
            message.fds.extend(numbers)
        elif kind == socket.SCM_CREDENTIALS:
            message.pid, message.uid, _ = _CREDENTIALS.unpack(payload[: _CREDENTIALS.size])
    if not flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC) and len(data) <= _TEXT_BYTES and message.pid:
        message.fields = parse(data)
    return message


# --- what stands in them

_F_DUPFD_QUERY = 1027  # Linux 6.10
_MAX_U64 = (1 << 64) - 1


def number(text: str | None) -> int | None:
    """A value that sd_notify(3) calls a decimal number: unsigned, 64 bits. None for anything else."""
    if text is None or not text.isascii() or not text.isdecimal() or len(text) > 20:
        return None
    value = int(text)
    return value if value <= _MAX_U64 else None


def is_fd_name(name: str) -> bool:
    """What sd_pid_notify_with_fds(3) takes as FDNAME: at most 255 printable ASCII characters, no colon."""
    return 0 < len(name) <= 255 and name.isascii() and name.isprintable() and ":" not in name


def is_same_file(fd: int, other: int) -> bool:
    """Whether two fds are one open file. Before Linux 6.10 a guess: the same inode, opened with the same flags."""
    with contextlib.suppress(OSError):
        return fcntl.fcntl(fd, _F_DUPFD_QUERY, other) == 1
    a, b = os.fstat(fd), os.fstat(other)
    flags = fcntl.fcntl(fd, fcntl.F_GETFL), fcntl.fcntl(other, fcntl.F_GETFL)
    return (a.st_dev, a.st_ino, a.st_mode) == (b.st_dev, b.st_ino, b.st_mode) and flags[0] == flags[1]


def pid_of(pidfd: int) -> int | None:
    """The process that a pidfd is of; None: it has gone, or the fd is none."""
    try:
        with open(f"/proc/self/fdinfo/{pidfd}", "rb") as file:
            found = [line for line in file if line.startswith(b"Pid:")]
    except OSError:
        return None
    pid = int(found[0].split()[1]) if found else -1
    return pid if pid > 0 else None
