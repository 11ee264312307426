"""[health]: regular checks of a process that is ready."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import trio

from superd.core import spec
from superd.core.lifecycle import State

if TYPE_CHECKING:
    from superd.manager.process import ProcessService

_THEN = {"restart": "; restarting it", "shutdown": "; stopping superd", "report": ""}


class Health:
    """`begin` when the process is ready, `cancel` when it is no more. unhealthy: `failures` checks in a row failed."""

    def __init__(self, service: ProcessService) -> None:
        self.service = service
        self.unhealthy = False
        self._failed = 0
        self._note = ""
        self._scope: trio.CancelScope | None = None

    def begin(self) -> None:
        health = self.service.spec.health
        if health is not None and self._scope is None:
            self._scope = self.service.supervisor.start_task(functools.partial(self._run, health))

    def cancel(self) -> None:
        if self._scope is not None:
            self._scope.cancel()
            self._scope = None
        self.unhealthy = False
        self._failed = 0

    def change(self) -> None:
        """Its table is another: what the old one has found is not said any more."""
        if self._failed and self.service.note == self._note:
            self.service.note = ""
        self.cancel()
        if self.service.state is State.READY:
            self.begin()

    async def _run(self, health: spec.Health) -> None:
        supervisor = self.service.supervisor
        while True:
            await trio.sleep(health.every_s)
            reason: str | None = f"no answer within {health.timeout_s:g} s"
            with trio.move_on_after(health.timeout_s):
                reason = await self.service.checks.attempt(health.check)
            supervisor.guard(lambda _, reason=reason: self._judge(health, reason), 0)  # type: ignore[misc]
            supervisor.end_of_turn()

    def _judge(self, health: spec.Health, reason: str | None) -> None:
        if reason is None:
            if self.unhealthy:
                self._record("healthy again", "notice")
            if self._failed and self.service.note == self._note:
                self.service.note = ""
                self.service.announce()
            self._failed, self.unhealthy = 0, False
            return
        self._failed = min(self._failed + 1, health.failures)
        what = f"{self._failed} of {health.failures} checks failed: {health.check}: {reason}"
        self.service.note = self._note = f"unhealthy: {what}"
        self.service.announce()
        if self._failed < health.failures:
            self._record(what, "info")
        elif not self.unhealthy:
            self.unhealthy = True
            self._record(self._note + _THEN[health.then], "err")
            if health.then == "restart":
                self.service.restart_unhealthy(self._note)
            elif health.then == "shutdown":
                self.service.supervisor.shut_down(1)

    def _record(self, text: str, level: str) -> None:
        pid = self.service.instance.pid if self.service.instance is not None else None
        self.service.log.record("health", text, level=level, service=self.service.name, pid=pid)
