"""Which processes there are below one, from /proc; nothing where there is no /proc."""

from __future__ import annotations

import fcntl
import os
import struct
from typing import NamedTuple


class Process(NamedTuple):
    """started: in clock ticks since boot, which with the pid names a process for good."""

    pid: int
    parent: int
    group: int
    session: int
    started: int
    zombie: bool
    stopped: bool = False


def below(root: int) -> list[Process]:
    """All descendants of `root`, parents before their children. As proc(5) has them at this moment."""
    children: dict[int, list[Process]] = {}
    try:
        names = os.listdir("/proc")
    except OSError:
        return []
    for name in names:
        if name.isdigit() and (row := look(int(name))) is not None:
            children.setdefault(row.parent, []).append(row)
    found: list[Process] = []
    waiting = [root]
    while waiting:
        rows = children.pop(waiting.pop(), [])  # pop: a pid reused meanwhile could make a circle
        found += rows
        waiting += [row.pid for row in rows]
    return found


def look(pid: int) -> Process | None:
    """The process that has this pid now; None: there is none."""
    fields = _stat(pid)
    if fields is None:
        return None
    parent, group, session, started = (int(fields[index]) for index in (1, 2, 3, 19))
    return Process(pid, parent, group, session, started, fields[0] in (b"Z", b"X"), fields[0] == b"T")


def _stat(pid: int) -> list[bytes] | None:
    """proc_pid_stat(5) from `state` on, which is its third field."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            text = file.read()
    except OSError:
        return None  # it has gone
    # The name stands in parentheses and may hold anything, parentheses too.
    return text[text.rindex(b")") + 2 :].split()


def started(pid: int) -> int | None:
    """When the process that has this pid now was started; None: there is none."""
    row = look(pid)
    return None if row is None else row.started


def inner_pid(pid: int) -> int | None:
    """What the process is called in a pid namespace below ours; None: it is in none, or has gone."""
    try:
        with open(f"/proc/{pid}/status", "rb") as file:
            names = next((line.split()[1:] for line in file if line.startswith(b"NSpid:")), [])
    except OSError:
        return None
    return int(names[1]) if len(names) > 1 else None


def cgroup(pid: int) -> str | None:
    """Where the process stands in the cgroup v2 hierarchy, as seen from our cgroup namespace; None: not there."""
    try:
        with open(f"/proc/{pid}/cgroup", "rb") as file:
            return next((os.fsdecode(line[3:-1]) for line in file if line.startswith(b"0::")), None)
    except OSError:
        return None


_PIDFD_GET_INFO = 0xC040FF0B  # struct pidfd_info of 64 bytes: linux/pidfd.h
_PIDFD_INFO_EXIT = 1 << 3  # Linux 6.15
_INFO = struct.Struct("=QQ11Ii")


def exit_status(pid: int, pidfd: int) -> int | None:
    """How a process ended that is not our child, as from waitpid(2): of one that nobody has reaped yet, or where the
    kernel still knows. None: it cannot be told."""
    buffer = bytearray(_INFO.pack(_PIDFD_INFO_EXIT, *(0,) * 13))
    try:
        fcntl.ioctl(pidfd, _PIDFD_GET_INFO, buffer)
    except OSError:
        pass  # an old kernel
    else:
        mask, *_, status = _INFO.unpack(buffer)
        if mask & _PIDFD_INFO_EXIT:
            return int(status)
    fields = _stat(pid)
    return int(fields[49]) if fields is not None and fields[0] == b"Z" else None


def environment_value(pid: int, name: str) -> str | None:
    """A variable as the process was started with; None: not there, or not ours to read."""
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            text = file.read()
    except OSError:
        return None
    prefix = name.encode() + b"="
    for line in text.split(b"\0"):
        if line.startswith(prefix):
            return os.fsdecode(line[len(prefix) :])
    return None
