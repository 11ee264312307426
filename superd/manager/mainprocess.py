"""A main process that superd did not start itself: the service has named it with MAINPID=, sd_notify(3).

Mostly it is an orphan, and so the keeper's child, which tells how it ends. One that still has another parent is that
one's to reap: then its pidfd says that it has ended, and the kernel perhaps how.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable

from superd.core.messages import UNKNOWN_STATUS
from superd.manager.watch import Timers, Watch
from superd.system import process, tree

_ANSWERED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGABRT)
_HEARSAY_S = 1.0  # for the keeper to tell the end of one that it has reaped


class MainProcess:
    """Owns the pidfd. `ended(status)` is called at most once, for an end that the keeper cannot tell."""

    def __init__(
        self, pid: int, pidfd: int, started: int, watch: Watch, timers: Timers, ended: Callable[[int], None]
    ) -> None:
        self.pid, self.started = pid, started
        self._pidfd, self._watch, self._timers, self._ended = pidfd, watch, timers, ended
        watch.add(pidfd, self._has_ended)

    @classmethod
    def find(cls, pid: int, started: int) -> int | None:
        """A pidfd of the process that had this pid at that time; None: it has gone."""
        fd = process.open_pidfd(pid)
        if fd is not None and tree.started(pid) != started:
            os.close(fd)
            return None
        return fd

    def signal(self, signo: int, *, group: bool) -> None:
        """To it, or its group. CONT goes along where a stopped process would not act on the signal (G10)."""
        row = tree.look(self.pid)
        if self._pidfd < 0 or row is None or row.started != self.started:
            return
        for number in (signo, signal.SIGCONT) if signo in _ANSWERED else (signo,):
            if group and row.group not in (0, os.getpgrp(), os.getpgid(os.getppid())):
                with contextlib.suppress(OSError):
                    os.killpg(row.group, number)
            else:
                process.signal_by_pidfd(self._pidfd, number)

    def leads_group(self) -> bool:
        row = tree.look(self.pid)
        return row is not None and row.started == self.started and row.group == self.pid

    def _has_ended(self, _: int) -> None:
        self._watch.remove(self._pidfd)
        row = tree.look(self.pid)
        if row is not None and row.started == self.started and row.parent == os.getppid():
            return  # the keeper is about to reap it
        status = tree.exit_status(self.pid, self._pidfd)
        if status is not None:
            self._ended(status)
        else:
            self._timers.after(_HEARSAY_S, self._unheard)

    def _unheard(self) -> None:
        if self._pidfd >= 0:
            self._ended(UNKNOWN_STATUS)

    def close(self) -> None:
        if self._pidfd >= 0:
            self._watch.remove(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1
