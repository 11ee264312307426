"""When a service's process counts as ready, in each form of `ready`.

"start" is decided as soon as the program runs, "notify" by notification.py; here is the rest: a line end on an fd of
the process's own (s6), a line of its output, and checks that are repeated until one succeeds. The end of waiting, for
whatever reason, is `cancel`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import trio

if TYPE_CHECKING:
    from superd.core.spec import ServiceSpec
    from superd.manager.checks import Checks
    from superd.manager.logs import OutputReader
    from superd.manager.process import Instance
    from superd.manager.supervisor import Supervisor
    from superd.manager.watch import Timer

_FIRST_DELAY_S, _LAST_DELAY_S = 0.1, 1.0
_ANSWER_S = 10.0  # for one connect or http: a server that has not begun to answer may never do so
_END_S = 0.2  # between the end of file and the report that the process has ended, which says more
_LINE_CHARACTERS = 2048  # of a line, for the time that a bad pattern can take
_READ_BYTES, _READS = 4096, 16  # 64 KiB, all that an ordinary pipe holds


class Starting(Protocol):
    """What becomes ready: a service, or the process that is to follow the one it has."""

    @property
    def spec(self) -> ServiceSpec: ...
    @property
    def name(self) -> str: ...
    @property
    def supervisor(self) -> Supervisor: ...
    @property
    def checks(self) -> Checks: ...
    @property
    def instance(self) -> Instance | None: ...


class Readiness:
    """`became()` is called when the process is ready, `failed(why)` when it cannot become so any more."""

    def __init__(self, service: Starting, became: Callable[[], None], failed: Callable[[str], None]) -> None:
        self.service = service
        self._became, self._failed = became, failed
        self._reason = ""  # why the last check failed
        self._scope: trio.CancelScope | None = None
        self._timer: Timer | None = None
        self._pattern: re.Pattern[str] | None = None
        self._reader: OutputReader | None = None
        # The read end of fd:N's pipe; the keeper has one too, for the next manager, until the line end was seen.
        held = service.supervisor.inheritance.held.pop(f"ready:{service.name}", None)
        self._pipe = held[0] if held else None
        self._watched = False

    def prepare(self) -> list[int]:
        """Before the process is started: the fds it is to get, which are the caller's to close."""
        self.cancel()
        if self.service.spec.ready.kind != "fd":
            return []
        self._pipe, theirs = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self._pipe, False)
        self.service.supervisor.keeper.send("store", [self._pipe], name=f"ready:{self.service.name}")
        return [theirs]

    def begin(self) -> None:
        """The process runs."""
        ready = self.service.spec.ready
        self._reason = ""
        match ready.kind:
            case "start":
                self._became()
            case "fd":
                if self._pipe is None:  # an earlier manager has seen the line end, and given the pipe back
                    return self._became()
                self._watched = True
                self.service.supervisor.watch.add(self._pipe, lambda _: self.read())
            case "log" if self.service.instance is not None and self.service.instance.reader is not None:
                self._pattern = re.compile(ready.pattern or "")
                self._reader = self.service.instance.reader
                self._reader.heard = self.output
            case "connect" | "http" | "exec":
                self._scope = self.service.supervisor.start_task(self._check)

    def cancel(self) -> None:
        """Nobody waits any more."""
        self._pattern = None
        if self._reader is not None:
            self._reader.heard = None
            self._reader = None
        if self._scope is not None:
            self._scope.cancel()
            self._scope = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._pipe is not None:
            self._unwatch()
            os.close(self._pipe)
            self._pipe = None
            self.service.supervisor.keeper.send("drop", name=f"ready:{self.service.name}")

    def _done(self) -> None:
        self.cancel()
        self._became()

    def describe(self) -> str:
        """What has not come, for a message."""
        ready = self.service.spec.ready
        match ready.kind:
            case "notify":
                return "no READY=1"
            case "fd":
                why = "no line end on it"
            case "log":
                why = "no such line in its output"
            case _:
                why = self._reason or "no answer"
        return f"{ready}: {why}"

    # -- fd:N

    def read(self) -> None:
        """What the process has written to its fd; also once more when it has ended."""
        if self._pipe is None or not self._watched:
            return
        for _ in range(_READS):
            try:
                data = os.read(self._pipe, _READ_BYTES)
            except BlockingIOError:
                return
            if b"\n" in data:
                return self._done()
            if not data:
                self._unwatch()
                self._timer = self.service.supervisor.timers.after(_END_S, self._closed)
                return

    def _unwatch(self) -> None:
        if self._watched and self._pipe is not None:
            self._watched = False
            self.service.supervisor.watch.remove(self._pipe)

    def _closed(self) -> None:
        self._failed(f"not ready: {self.service.spec.ready}: closed without a line end")

    # -- log:REGEX

    def output(self, line: str) -> None:
        """A line of the process's output."""
        if self._pattern is not None and self._pattern.search(line[:_LINE_CHARACTERS]):
            self._done()

    # -- connect, http, exec

    async def _check(self) -> None:
        ready = self.service.spec.ready
        delay_s = _FIRST_DELAY_S
        while True:
            reason: str | None = f"no answer within {_ANSWER_S:g} s"
            with trio.move_on_after(float("inf") if ready.kind == "exec" else _ANSWER_S):
                reason = await self.service.checks.attempt(ready)
            if reason is None:
                return self._done()
            self._reason = reason
            await trio.sleep(delay_s)
            delay_s = min(delay_s * 2, _LAST_DELAY_S)
