"""The commands around a main process: start_pre, start_post and stop_post, one after the other.

They are children of the keeper like the main process and run in the service's context and environment, with what superd
knows of the activation, and without its sockets (O2). The tag of each holds all that another manager needs to go on
where this one was killed, so that none is run twice.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from superd.core.lifecycle import Ending, State
from superd.manager import environment
from superd.manager.logs import OutputReader
from superd.manager.service import explain_start, make_ending

if TYPE_CHECKING:
    from superd.manager.process import ProcessService

Role = Literal["start_pre", "start_post", "stop_post"]


@dataclass(slots=True)
class Command:
    """One that runs. pid 0 until the keeper has said it."""

    id: int
    role: Role
    index: int
    program: str
    started: float
    reader: OutputReader | None = None
    pid: int = 0
    running: bool = False
    cause: str = ""  # why superd ends it
    result: str = ""


class Commands:
    """`run()` starts the first of a list; `done(role, failed)` is called when the list is through, or at the first that
    fails. Those of stop_post are all run, whatever becomes of one; `failed` is the first then.

    facts   environment beyond the service's own
    ending  for stop_post: how the main process ended, which is in the tag for the next manager
    """

    def __init__(self, service: ProcessService, done: Callable[[Role, Ending | None], None]) -> None:
        self.service, self._done = service, done
        self.current: Command | None = None
        self.facts: dict[str, str] = {}
        self.ending: Ending | None = None
        self._failed: Ending | None = None

    def run(self, role: Role, facts: dict[str, str], ending: Ending | None = None) -> None:
        self.facts, self.ending, self._failed = facts, ending, None
        self._start(role, 0)

    def _list(self, role: Role) -> tuple[tuple[str, ...], ...]:
        spec = self.service.spec
        return {"start_pre": spec.start_pre, "start_post": spec.start_post, "stop_post": spec.stop_post}[role]

    def _start(self, role: Role, index: int) -> None:
        service = self.service
        supervisor = service.supervisor
        commands = self._list(role)
        if index >= len(commands):
            return self._done(role, self._failed)
        log_fds: list[int] = []
        name = commands[index][0]
        number = supervisor.next_instance()
        tag = {
            "service": service.name, "id": number, "role": role, "index": index, "facts": self.facts,
            "ending": None if self.ending is None else self.ending._asdict(),
        }  # fmt: skip
        try:
            program = service.make_command(commands[index])
            program.environment.update(self.facts)
            if program.logs:
                log_fds = list(os.pipe2(os.O_CLOEXEC))
            reader = OutputReader(log_fds[0], service.log, service.name) if log_fds else None
            supervisor.keeper.send(
                "start", [*reversed(log_fds)], id=number, program=program.to_json(), log=bool(log_fds),
                context=environment.context_json(service.spec), tag=tag,
                cgroup=supervisor.processes.group(service), limited=bool(service.spec.cgroup.controllers()),
            )  # fmt: skip
        except (OSError, ValueError) as error:
            for fd in log_fds:
                os.close(fd)
            self._failed = Ending(failure=f"{role}: cannot start {name}: {error}", result="resources")
            return supervisor.later(lambda: self._done(role, self._failed))
        self.current = Command(number, role, index, name, time.monotonic(), reader)
        service.newest = number
        supervisor.instances[number] = self
        if log_fds:
            os.close(log_fds[1])
        service.settle()

    # -- what the keeper says

    def process_started(self, pid: int) -> None:
        command = self.current
        if command is None:
            return
        command.pid, command.running = pid, True
        if command.reader is not None:
            command.reader.pid = pid
            self._watch(command.reader)

    def _watch(self, reader: OutputReader) -> None:
        self.service.supervisor.watch.add(
            reader.fileno(), lambda _: None if reader.readable() else self.service.close_reader(reader)
        )

    def process_failed(self, number: int, stage: str, errno: int, detail: str) -> None:
        command = self.current
        if command is None or command.id != number:
            return
        reason = explain_start(self.service.spec, stage, errno, detail, program=command.program)
        self.service.unsettled.append(command.id)
        self._ended(command, Ending(failure=f"{command.role}: {reason}", result="exit-code"))

    def process_exited(self, number: int, status: int) -> None:
        command = self.current
        if command is None or command.id != number or not command.running:
            return  # its exec failed: that report decides, and this is the shell of it
        self.service.unsettled.append(command.id)
        ending = make_ending(status, time.monotonic() - command.started)
        if ending.status == 0 and not command.cause:
            return self._ended(command, None)
        result = command.result or ("exit-code" if ending.signal is None else "signal")
        text = str(ending._replace(cause=command.cause))
        self._ended(command, Ending(failure=f"{command.role}: {command.program} {text}", result=result))

    def _ended(self, command: Command, failed: Ending | None) -> None:
        self.current = None
        if command.reader is not None and command.reader.fileno() >= 0:
            self.service.finish_reader(command.reader)
        if command.role == "stop_post":
            if failed is not None:
                self.service.error(str(failed), level="warning")
            self._failed = self._failed or failed
            go_on = not command.cause
        else:
            self._failed = failed
            go_on = failed is None and self.service.state is State.STARTING
        if go_on:
            self._start(command.role, command.index + 1)
        else:
            self._done(command.role, self._failed)
        self.service.wake()

    # -- supervisor's questions

    def tell(self, signo: int, *, group: bool) -> None:
        if self.current is not None:
            self.service.supervisor.keeper.send("signal", id=self.current.id, signo=signo, group=group)

    def adopt(self, row: dict[str, Any], log: int | None) -> None:
        """Take over a command that an earlier manager had started."""
        tag = row["tag"]
        commands = self._list(tag["role"])
        name = commands[tag["index"]][0] if tag["index"] < len(commands) else "?"
        command = Command(row["id"], tag["role"], tag["index"], name, row["started"], None, row["pid"], row["running"])
        self.facts = tag["facts"]
        self.ending = None if tag["ending"] is None else Ending(**tag["ending"])
        self.current = command
        self.service.supervisor.instances[row["id"]] = self
        if log is not None:
            command.reader = OutputReader(log, self.service.log, self.service.name, row["pid"])
            if command.running:  # otherwise its start is still to be told
                self._watch(command.reader)
