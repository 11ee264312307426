"""WATCHDOG=1 must come in time, sd_notify(3).

A ping only moves a date: one timer runs to the date that was known when it was armed and goes on if there is a later
one, so that a service that pings all the time costs no more than one that does not.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from superd.manager.process import ProcessService
    from superd.manager.watch import Timer

LEAST_S = 0.001
MOST_S = 10 * 365 * 86400.0  # beyond that WATCHDOG_USEC= means never


class Watchdog:
    """Of one process. It begins with its readiness, or its first ping."""

    def __init__(self, service: ProcessService) -> None:
        self.service = service
        self.said_s: float | None = None  # WATCHDOG_USEC= of the process; 0: none
        self._timer: Timer | None = None
        self._until = 0.0

    @property
    def limit_s(self) -> float | None:
        limit_s = self.service.spec.watchdog_s if self.said_s is None else self.said_s
        return None if limit_s is None or not 0 < limit_s < MOST_S else max(limit_s, LEAST_S)

    def ping(self) -> None:
        """A full period begins."""
        limit_s = self.limit_s
        if limit_s is None:
            return self.stop()
        self._until = time.monotonic() + limit_s
        if self._timer is None:
            self._arm(limit_s)

    def change(self, usec: int) -> None:
        """WATCHDOG_USEC=: counts from now on."""
        self.stop()
        self.said_s = usec / 1_000_000
        self.ping()

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def reset(self) -> None:
        """For another process."""
        self.stop()
        self.said_s = None

    def _is_armed(self) -> bool:
        return self._timer is not None

    def _arm(self, delay_s: float) -> None:
        self._timer = self.service.supervisor.timers.after(delay_s, self._due)

    def _due(self) -> None:
        self._timer = None
        # A superd that had no time itself finds the ping in the socket: read what has come before it is judged (X30).
        self.service.notifications.drain()
        if self._is_armed() or not self.service.can_change:
            return
        rest_s = max(self._until, self.service.extended_until) - time.monotonic()
        if rest_s > 0:
            self._arm(rest_s)
        elif (limit_s := self.limit_s) is not None:
            self.service.bite(f"no WATCHDOG=1 within {limit_s:g} s")
