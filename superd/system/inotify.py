"""inotify(7), which Python's standard library does not have: what happens to the names in some directories.

Events are hints, and some are lost: who reads them looks at the directories themselves (FAILURES K4).
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

MODIFY, ATTRIB, CLOSE_WRITE, MOVED_FROM, MOVED_TO, CREATE, DELETE = 0x2, 0x4, 0x8, 0x40, 0x80, 0x100, 0x200
DELETE_SELF, MOVE_SELF, UNMOUNT, Q_OVERFLOW, IGNORED, ISDIR = 0x400, 0x800, 0x2000, 0x4000, 0x8000, 0x40000000
_ONLYDIR = 0x1000000
_NAMES = CLOSE_WRITE | MOVED_FROM | MOVED_TO | CREATE | DELETE | DELETE_SELF | MOVE_SELF | _ONLYDIR
_ALL = _NAMES | MODIFY | ATTRIB
_EVENT = struct.Struct("@iIII")
_READ_BYTES = 1 << 16

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Event:
    """directory: as it was named, None when events were lost; name: "" is the directory itself."""

    directory: str | None
    name: str
    mask: int


class Inotify:
    """Raises OSError where there is none to be had: EMFILE beyond fs.inotify.max_user_instances, ENOSYS."""

    def __init__(self) -> None:
        self._fd: int = _libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if self._fd < 0:
            raise _error("inotify_init1")
        self._paths: dict[int, str] = {}

    def fileno(self) -> int:
        return self._fd

    def watch(self, directories: dict[str, bool]) -> bool:
        """Watch these and no others; True: also what is written into their files and whose they are. Returns whether
        one of them was not watched before.

        A directory that is not there is passed over, for its parent tells when it comes. Each is looked up anew: what
        has taken its place is watched instead. Raises OSError, ENOSPC beyond fs.inotify.max_user_watches.
        """
        fresh: dict[int, str] = {}
        for path, everything in directories.items():
            number = _libc.inotify_add_watch(self._fd, os.fsencode(path), _ALL if everything else _NAMES)
            if number >= 0:
                fresh[number] = path
            elif ctypes.get_errno() in _NOT_RIGHT:
                raise _error("inotify_add_watch")
        for number in self._paths.keys() - fresh.keys():
            _libc.inotify_rm_watch(self._fd, number)
        added = fresh.keys() - self._paths.keys()
        self._paths = fresh
        return bool(added)

    def read(self) -> Iterator[Event]:
        """What has happened; at most a buffer of it."""
        try:
            data = os.read(self._fd, _READ_BYTES)
        except BlockingIOError:
            return
        yield from parse(data, self._paths)

    def close(self) -> None:
        os.close(self._fd)


def parse(data: bytes, paths: dict[int, str]) -> Iterable[Event]:
    """The events of one read(2). Those of a watch that is not any more are left out."""
    at = 0
    while at + _EVENT.size <= len(data):
        number, mask, _, length = _EVENT.unpack_from(data, at)
        at += _EVENT.size
        name = data[at : at + length].rstrip(b"\0")
        at += length
        if mask & Q_OVERFLOW:
            yield Event(None, "", mask)
        elif (path := paths.get(number)) is not None:
            yield Event(path, os.fsdecode(name), mask)


_NOT_RIGHT = {12, 24, 28}  # ENOMEM, EMFILE, ENOSPC: the others say that the directory is not there, or not ours


def _error(what: str) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, f"{what}: {os.strerror(number).lower()}")
