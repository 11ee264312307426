"""The controlling terminal: which process group may read from it, tcsetpgrp(3)."""

from __future__ import annotations

import os
import signal


def find() -> int | None:
    """An fd of our controlling terminal: 0, 1 or 2 if it is one of them, else a new one; None: there is no terminal."""
    for fd in (0, 1, 2):
        if foreground(fd) >= 0:
            return fd
    try:
        return os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError:
        return None


def foreground(fd: int) -> int:
    """The process group in the foreground; -1 where fd is not our terminal, or no more.

    0 is a group of another pid namespace, and so is the 0 that os.getpgrp() gives in a process of that group.
    """
    try:
        return os.tcgetpgrp(fd)
    except OSError:
        return -1


def give(fd: int, group: int) -> None:
    """Put a group of our session into the foreground. Does nothing where that cannot be (a hung-up terminal)."""
    # From the background this raises SIGTTOU, which would stop the caller, but not while it is blocked.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTTOU])
    try:
        os.tcsetpgrp(fd, group)
    except OSError:
        pass
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
