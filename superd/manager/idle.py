"""idle_timeout: a process that nobody uses is stopped, and superd listens in its place."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from superd.core.lifecycle import State
from superd.core.values import format_duration
from superd.manager.watch import Timer
from superd.system.usage import Usage

if TYPE_CHECKING:
    from superd.manager.process import ProcessService

_LEAST_S = 0.25


class Idleness:
    """Looks twice in each `idle_timeout`, while the service is READY and only then."""

    def __init__(self, service: ProcessService) -> None:
        self.service = service
        self._usages: list[Usage] = []
        self._timer: Timer | None = None
        self._since = 0.0

    def follow(self) -> None:
        """The state of the service may be another."""
        service = self.service
        due = service.on_demand and service.spec.idle_timeout_s is not None and service.state is State.READY
        if due and self._timer is None:
            self._begin()
        elif not due and self._timer is not None:
            self.end()

    def _begin(self) -> None:
        try:
            for listener in self.service.listeners.open:
                path = None if listener.address.is_abstract else listener.address.path
                self._usages.append(Usage(listener.fd, path))
        except OSError as error:
            self.service.error(f"cannot tell whether anybody uses it: {error}; idle_timeout has no effect")
            self.end()
            return
        self._since = time.monotonic()
        self._arm()

    def end(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for usage in self._usages:
            usage.close()
        self._usages.clear()

    def _arm(self) -> None:
        limit_s = self.service.spec.idle_timeout_s or 0.0
        left_s = self._since + limit_s - time.monotonic()
        self._timer = self.service.supervisor.timers.after(max(min(limit_s / 2, left_s), _LEAST_S), self._look)

    def _used(self) -> bool:
        try:
            found = [usage.used() for usage in self._usages]  # each of them, for each remembers
        except OSError:
            return True  # no memory or fd to find out: another time
        return any(found)

    def _look(self) -> None:
        service, limit_s = self.service, self.service.spec.idle_timeout_s
        if limit_s is None:
            return self.end()  # a reload has taken it away
        now = time.monotonic()
        if self._used():
            self._since = now
        elif now - self._since >= limit_s:
            return service.stop_idle(f"nobody has used it for {format_duration(limit_s)}; stopping it")
        self._arm()
