"""A process that becomes another program keeps its pid, its children and those of its fds that it names (execve(2)).

What it knows goes along as JSON in a memfd; each fd is told by number and by what it is, so that the other side can see
whether that is still what it finds there.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NoReturn

_MAX_BYTES = 1 << 28


def become(
    argv: Sequence[str], environment: Mapping[str, str], state: Mapping[str, Any], fds: Collection[int], version: int
) -> NoReturn:
    """Execute argv[0] with `--resume-fd N` put in after the words up to the module's name, argv[:4].

    All signals are blocked by then, and pending ones stay so; the other side unblocks them when it can take them.
    Raises OSError; then the fds are close-on-exec again.
    """
    passed = [*fds]
    try:
        rows = [[fd, *_identity(fd)] for fd in fds]
        left = os.memfd_create("superd-state", 0)
        passed.append(left)
        data = memoryview(json.dumps({"version": version, "fds": rows, "state": state}).encode())
        while data:
            data = data[os.write(left, data) :]
        for fd in fds:
            os.set_inheritable(fd, True)
        os.execve(argv[0], [*argv[:4], "--resume-fd", str(left), *argv[4:]], environment)
    finally:
        for fd in fds:
            with contextlib.suppress(OSError):
                os.set_inheritable(fd, False)
        if len(passed) > len(fds):
            os.close(passed[-1])


def take(fd: int, version: int) -> tuple[dict[str, Any] | None, set[int]]:
    """(the state, which of its fds are what they were). None: it is not one, or of a version that is not understood;
    what is known of fds counts all the same. Closes `fd`."""
    try:
        with open(fd, "rb") as file:
            found = json.loads(os.pread(file.fileno(), min(os.fstat(fd).st_size, _MAX_BYTES), 0))
        rows, state = found["fds"], found["state"] if found["version"] == version else None
        same = {number for number, *identity in rows if type(number) is int and number > 2 and _is(number, identity)}
    except (OSError, ValueError, LookupError, TypeError, OverflowError, RecursionError):
        return None, set()
    return state if isinstance(state, dict) else None, same


def block_signals() -> set[int]:
    """The mask as it was."""
    return set(signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals()))


def unblock_signals(mask: set[int]) -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _identity(fd: int) -> list[int]:
    found = os.fstat(fd)
    return [found.st_mode >> 12, found.st_dev, found.st_ino]


def _is(fd: int, identity: list[Any]) -> bool:
    try:
        return _identity(fd) == identity
    except OSError:
        return False
