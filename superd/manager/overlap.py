"""restart --overlap: another process beside the one that serves, with the same sockets; when it is ready it takes over.

While both live both count, and the service stays READY: what lifecycle.py calls its process is the one that serves. The
other never is: before it is ready it is the `successor`, and the one that has been followed is among the `retired`.
The fd store is the service's; each new process gets what is in it, and both may store.
"""

from __future__ import annotations

import functools
import secrets
import signal
import time
from typing import TYPE_CHECKING, Any

import trio

from superd.core.lifecycle import State
from superd.manager.readiness import Readiness
from superd.manager.service import explain_start
from superd.manager.stopping import FINAL_WAIT_S, send
from superd.system import tree

if TYPE_CHECKING:
    from superd.core.spec import ServiceSpec
    from superd.manager.checks import Checks
    from superd.manager.process import Instance, ProcessService
    from superd.manager.supervisor import Supervisor
    from superd.manager.watch import Timer
    from superd.system.notify import Message

_SETTLE_S = 1.0  # that it has to live where nothing that it alone says tells that it is ready
_ITS_OWN_WORD = ("notify", "fd", "log")


class Overlap:
    """Of one service. outcome: why the last try failed, "" if it did not, None while it is under way."""

    def __init__(self, service: ProcessService) -> None:
        self.service = service
        self.outcome: str | None = ""
        self.successor: Successor | None = None
        self.retired: dict[int, Instance] = {}  # by id

    def obstacle(self) -> str:
        """Why not; "": nothing is in the way."""
        service = self.service
        spec, instance = service.spec, service.instance
        if spec.proxy is not None:
            return "one program at a time is carried to; with `superctl restart` new clients wait until it is ready"
        if spec.start_pre or spec.start_post or spec.stop_post:
            return "start_pre, start_post and stop_post are for one process at a time; `superctl restart` runs them"
        if instance is None or instance.main is not None:
            return "its main process is one that superd has not started; `superctl restart` ends that first"
        return ""

    def begin(self) -> None:
        if self.successor is not None:
            return  # whoever asks now waits for that
        self.outcome = self.obstacle() or None
        if self.outcome is not None:
            return
        try:
            self.successor = Successor(self)
        except (OSError, ValueError) as error:
            self.outcome = f"cannot start: {error}"
        self.service.announce()

    def take(self, successor: Successor) -> None:
        """It is ready: it serves from now on, and the one before is stopped."""
        service, before = self.service, self.service.instance
        assert before is not None
        self.successor, self.outcome = None, ""
        service.succeed(successor.instance, successor.invocation, successor.status_text)
        self._retire(before)

    def give_up(self, why: str) -> None:
        """The successor has not become ready: the one before goes on."""
        successor, self.successor = self.successor, None
        if successor is None:
            return
        successor.cancel()
        self.outcome = why
        self.service.error(f"the new process {why}; the one before goes on")
        if successor.instance.id in self.service.supervisor.instances:
            self._retire(successor.instance)
        self.service.announce()

    def cancel(self) -> None:
        """The service is not what it was when it began."""
        self.give_up("was stopped, as the service has not stayed ready meanwhile")

    def instances(self) -> list[Instance]:
        """All but the one that serves."""
        return [*self.retired.values(), *([] if self.successor is None else [self.successor.instance])]

    def mains(self) -> list[int]:
        return [one.pid for one in self.instances() if one.pid]

    def busy(self) -> bool:
        return self.successor is not None or bool(self.retired)

    # -- what the keeper says

    def process_started(self, number: int, pid: int) -> None:
        if self.successor is not None and self.successor.instance.id == number:
            self.successor.started(pid)
        elif number in self.retired:
            self.retired[number].pid = pid

    def process_failed(self, number: int, stage: str, errno: int, detail: str) -> None:
        if self.successor is not None and self.successor.instance.id == number:
            self.service.notifications.resume()
            self.give_up(explain_start(self.service.spec, stage, errno, detail))
        self._gone(number)

    def process_exited(self, number: int, pid: int, status: int) -> None:
        service, successor = self.service, self.successor
        found = self.retired.get(number) or (successor.instance if successor is not None else None)
        assert found is not None
        service.notifications.drain()
        if found.reader is not None and found.reader.fileno() >= 0:
            service.finish_reader(found.reader)
        ending = service.record_exit(pid, status, time.monotonic() - found.started)
        service.ended(ending)
        service.supervisor.forget(number)
        if successor is not None and found is successor.instance:
            self.give_up(f"{ending}, before it was ready")
        self._gone(number)

    def _gone(self, number: int) -> None:
        self.retired.pop(number, None)
        self.service.announce()

    # -- the end of one

    def _retire(self, instance: Instance) -> None:
        self.retired[instance.id] = instance
        self.service.supervisor.instances[instance.id] = self
        self.service.supervisor.start_task(functools.partial(self._end, instance))

    async def _end(self, instance: Instance) -> None:
        """As a stop of the service, for the one and what is below it."""
        service, spec = self.service, self.service.spec
        keeper = service.supervisor.keeper
        below = tree.below(instance.pid) if spec.kill_mode == "tree" and instance.pid else []
        for signo, limit_s in ((spec.stop_signal, spec.stop_timeout_s), (signal.SIGKILL, FINAL_WAIT_S)):
            keeper.send("signal", id=instance.id, signo=signo, group=spec.kill_mode != "process")
            for row in below:
                if row.group != instance.pid:
                    send(row, signo)
            with trio.move_on_after(float("inf") if limit_s is None else limit_s):
                while instance.id in self.retired:
                    await service.changed.wait()
                await service.supervisor.processes.end(lambda: [row for row in below if _lives(row)], signo)
                return
            text = f"the process before did not stop within {limit_s:g} s; killing it"
            service.error(text, level="warning", pid=instance.pid)

    # -- another manager

    def deposit(self) -> dict[str, Any]:
        current = self.service.instance
        return {"current": current.id if current is not None else 0, "retired": [*self.retired]}

    def adopt(self, rows: list[dict[str, Any]], logs: dict[int, int], was: dict[str, Any]) -> list[dict[str, Any]]:
        """The rows of the keeper's table that are not of this: a successor that has not taken over, and those that were
        being stopped, end."""
        told = was.get("overlap") or {}
        left = []
        for row in rows:
            is_early = row["tag"].get("beside", False) and row["id"] > told.get("current", 0)
            if not is_early and row["id"] not in told.get("retired", ()):
                left.append(row)
                continue
            instance = self.service.adopt_instance(row, logs.pop(row["id"], None))
            self.retired[instance.id] = instance
            self.service.supervisor.instances[instance.id] = self
            if row["status"] is None:
                self.service.supervisor.later(functools.partial(self._retire, instance))
        return left


class Successor:
    """The process that is to take over. It is what readiness.py asks about, in place of the service."""

    def __init__(self, overlap: Overlap) -> None:
        """Orders it. Raises OSError or ValueError."""
        self.overlap, self.service = overlap, overlap.service
        self.invocation = secrets.token_hex(16)
        self.status_text = ""
        self._timer: Timer | None = None
        self.readiness = Readiness(self, self._is_ready, overlap.give_up)
        self.instance = self.service.launch(self.invocation, self.readiness, beside=True)
        self.supervisor.instances[self.instance.id] = overlap
        limit_s = self.spec.ready_timeout_s
        if limit_s is not None:
            self._timer = self.supervisor.timers.after(limit_s, self._too_late)

    @property
    def spec(self) -> ServiceSpec:
        return self.service.spec

    @property
    def name(self) -> str:
        return self.service.name

    @property
    def supervisor(self) -> Supervisor:
        return self.service.supervisor

    @property
    def checks(self) -> Checks:
        return self.service.checks

    def started(self, pid: int) -> None:
        self.service.runs(self.instance, pid)
        self.readiness.begin()

    def said(self, message: Message) -> None:
        """A notify message of its own."""
        fields = message.fields
        self.status_text = fields.get("STATUS", self.status_text)
        if fields.get("READY") == "1" and self.spec.ready.kind == "notify":
            self._is_ready()

    def _is_ready(self) -> None:
        if self.instance.ready_after_s is not None:
            return
        self.instance.ready_after_s = round(time.monotonic() - self.instance.started, 4)
        self._disarm()
        if self.spec.ready.kind in _ITS_OWN_WORD:
            self._take_over()
        else:  # who answers may be the one before, and who was executed may end at once
            self._timer = self.supervisor.timers.after(_SETTLE_S, self._take_over)

    def _take_over(self) -> None:
        if self.service.state is State.READY and self.overlap.successor is self:
            self.cancel()
            self.overlap.take(self)

    def _too_late(self) -> None:
        self.overlap.give_up(f"was not ready within {self.spec.ready_timeout_s:g} s: {self.readiness.describe()}")

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def cancel(self) -> None:
        self._disarm()
        self.readiness.cancel()


def _lives(row: tree.Process) -> bool:
    found = tree.look(row.pid)
    return found is not None and found.started == row.started and not found.zombie
