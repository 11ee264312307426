"""One service at run time: what all run modes share.

activation.py has the one that starts a process for each connection, process.py those that are one process.
"""

from __future__ import annotations

import os
import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from errno import EAGAIN
from typing import TYPE_CHECKING, Any

import trio

from superd.core import messages, plan
from superd.core.admission import Window
from superd.core.lifecycle import Ending, State
from superd.core.metrics import Counts
from superd.core.plan import Program
from superd.core.spec import Address, ServiceSpec
from superd.core.values import expand_runtime, format_rate, format_size
from superd.manager import environment
from superd.manager.keeperlink import Inheritance
from superd.manager.listeners import Listeners
from superd.manager.logs import OutputReader
from superd.system import load

if TYPE_CHECKING:
    from superd.manager.activation import ConnectionService
    from superd.manager.supervisor import Supervisor

_ENDINGS_KEPT = 5
_LOOK_AGAIN_S = 1.0  # at load and memory
_LAST_WORDS_S = 1.0  # a descendant may hold the log pipe this long after the exit (L6)


@dataclass(frozen=True, slots=True)
class Statistics:
    """A service as superctl shows it. `since`: CLOCK_MONOTONIC; now: live processes or connections."""

    name: str
    state: str
    since: float
    pid: int | None
    now: int
    total: int
    restarts: int
    listen: tuple[str, ...]
    note: str


class Service(ABC):
    """What every service has: a spec, a wish, a state, listeners, counters, and its last endings."""

    # A dict for thirty attributes takes 1.6 kB, and there may be thousands of services.
    __slots__ = (
        "_changed", "_killed", "counts", "draining", "endings", "leaving", "listeners", "log", "name", "note",
        "restarts", "since", "spec", "state", "supervisor", "total", "wish_up",
    )  # fmt: skip

    def __init__(self, supervisor: Supervisor, spec: ServiceSpec) -> None:
        self.supervisor, self.spec, self.name = supervisor, spec, spec.name
        self.log = supervisor.log
        self.state = State.STOPPED if spec.enabled else State.DISABLED
        self.since = time.monotonic()
        self.wish_up = spec.enabled
        self.note = ""
        self.total = self.restarts = 0
        self.counts = Counts()
        self.endings: list[str] = []
        self._changed: trio.Event | None = None  # while somebody waits for a change
        self._killed = 0  # processes, by the kernel, for memory_max
        self.draining = False  # being stopped, and what runs has all the time that it needs
        self.leaving = False  # its file has gone, or makes another service of it: it ends with what it still has
        self.listeners = Listeners(
            spec.name, spec.sockets, environment.trusted_uid(spec), supervisor.keeper, supervisor.watch,
            supervisor.timers, supervisor.log, self._listeners_changed,
        )  # fmt: skip
        self.listeners.exclusive = not spec.gives_sockets

    def enter(self, state: State) -> None:
        if state is self.state:
            return
        self.log.record("state", service=self.name, level="debug", was=self.state.value, state=state.value)
        if State.FAILED in (state, self.state):
            self.supervisor.tell_failures()
        self.state = state
        self.since = time.monotonic()
        self.announce()

    def announce(self) -> None:
        """Wake who waits for a change, and let the keeper know what a next manager must."""
        self.wake()
        self.supervisor.snapshot_wanted = True

    @property
    def changed(self) -> trio.Event:
        """Set at the next change of state."""
        if self._changed is None:
            self._changed = trio.Event()
        return self._changed

    def nudge(self) -> None:
        """Wake who waits for a change of this service, because another has changed that it depends on."""
        if self._changed is not None:
            self._changed.set()
            self._changed = None

    def wake(self) -> None:
        """Wake who waits for a change."""
        self.nudge()
        self.supervisor.dependencies.changed(self)

    def error(self, text: str, **fields: Any) -> None:
        """One line, ten a minute for each kind (L12)."""
        self.log.error_limited((self.name, text[:40]), text, service=self.name, **fields)

    def count_exit(self, ending: Ending) -> None:
        success_status = self.spec.restart.success_status
        self.supervisor.meter.note()
        self.counts.add_exit("start" if ending.failure is not None else ending.outcome(success_status))

    def ended(self, ending: Ending) -> None:
        self.endings.append(str(ending))
        del self.endings[:-_ENDINGS_KEPT]

    def record_exit(self, pid: int, status: int, lived_s: float, **fields: Any) -> Ending:
        """Log how a process ended (`status` as from waitpid(2)) and say it as an Ending."""
        ending = make_ending(status, lived_s)
        if status and self.spec.cgroup.memory_max is not None:
            self._tell_memory(self.spec.cgroup.memory_max)
        self.log.record(
            "exit", "status unknown" if status == messages.UNKNOWN_STATUS else "", service=self.name, pid=pid,
            status=ending.status, signal=ending.signal, duration=round(lived_s, 4), **fields,
        )  # fmt: skip
        return ending

    def bind(self, inheritance: Inheritance, inherited: dict[str, list[int]]) -> None:
        if self.spec.cgroup.memory_max is not None:
            self._killed = self.supervisor.processes.killed_for_memory(self)  # before an earlier manager ended
        if self.state is not State.DISABLED:
            self.listeners.bind(inheritance, inherited)

    def enable(self) -> None:
        """A service whose file says enabled = false is started by hand: now it gets its sockets."""
        if self.state is State.DISABLED:
            self.listeners.bind(self.supervisor.inheritance, {})
            self.enter(State.STOPPED)

    def apply(self, spec: ServiceSpec) -> None:
        """Its file says something else now. The listeners are right already; what runs is not touched."""
        self.spec = spec

    def change_limits(self) -> None:
        """Its [cgroup] says something else now: so it is for what runs."""
        try:
            self.supervisor.processes.change_limits(self)
        except OSError as error:
            self.error(f"cannot limit what runs: cgroup: {error}")

    def _tell_memory(self, limit: int) -> None:
        """Whether the kernel has killed a process for memory_max since it was asked last (N5)."""
        killed = self.supervisor.processes.killed_for_memory(self)
        if killed > self._killed:
            what = "a process" if killed == self._killed + 1 else f"{killed - self._killed} processes"
            self.error(f"the kernel has killed {what} of it: memory_max = {format_size(limit)} is used up")
        self._killed = killed

    def has_history(self) -> bool:
        """Whether a next manager could not tell from the configuration how it is."""
        if self.total or self.note or self.restarts or self.endings or self.listeners.paused:
            return True
        state = self.state  # of many thousands nearly all listen
        return (state is not State.LISTENING and state is not State.DISABLED) or self.wish_up != self.spec.enabled

    def ask_pause(self) -> None:
        """Take no client and start nothing for one, until ask_resume; what runs goes on."""
        self.listeners.paused = True
        self.unwatch()
        self.announce()

    def ask_resume(self) -> None:
        self.listeners.paused = False
        self._watch()
        self.announce()

    def hold_clients(self) -> None:
        """As a pause, for reasons of superd's own."""
        self.listeners.draining = True
        self.unwatch()

    def release_clients(self) -> None:
        self.listeners.draining = False
        self._watch()

    def why_not_pausable(self) -> str:
        """Why a pause would mean nothing; "": it would not."""
        if not self.spec.sockets:
            return "it has no sockets"
        if self.spec.run in ("always-on", "once") and self.spec.gives_sockets:
            return f'run = "{self.spec.run}": its process accepts, not superd; `superctl stop` or `drain` ends that'
        return ""

    def leave(self) -> None:
        """No client reaches it any more; what it has still to do, it does."""
        self.leaving = True
        self.listeners.close()

    def make_program(self, own_environment: dict[str, str]) -> Program:
        """Raises OSError or ValueError for what can only be known now: an environment file, too many sockets."""
        bound = self._bound()
        if self.spec.pass_ == "stdio" and not self.spec.takes_connections and len(bound) > 1:
            raise ValueError(f"{len(bound)} sockets ({', '.join(str(address) for _, address in bound)}) for one stdin")
        return self._expand(self.spec.command, own_environment)

    def make_command(self, command: Sequence[str]) -> Program:
        """What runs before or after the main process: the same environment and outputs, and no socket (O2). Raises as
        make_program does."""
        program = self._expand(command, self.supervisor.own_environment)
        return plan.without_sockets(program)

    def _bound(self) -> list[tuple[str, Address]]:
        return [(listener.spec.name, listener.address) for listener in self.listeners.open]

    def _expand(self, command: Sequence[str], own_environment: dict[str, str]) -> Program:
        spec, bound = self.spec, self._bound()
        ports = self._ports(bound)
        first = plan.LISTEN_FDS_START if spec.pass_ == "listen-fds" else 0
        names = ["connection"] if spec.takes_connections else [name for name, _ in bound]
        fds = {name: first + index for index, name in reversed(list(enumerate(names)))}  # the first of a name
        variables = {} if spec.environment_file is None else environment.read_file(spec.environment_file)
        if command and os.path.basename(command[0]) == "superctl" and (control := self.supervisor.control) is not None:
            variables = {"SUPERD_SOCKET": control.address or "", **variables}  # it asks the superd that started it
        try:
            argv = [expand_runtime(word, ports, fds) for word in command]
            variables |= {name: expand_runtime(value, ports, fds) for name, value in spec.environment}
        except KeyError as error:
            raise ValueError(f"socket {error} is not open") from None
        return plan.plan_program(spec, argv, variables, own_environment, bound)

    def _ports(self, bound: Sequence[tuple[str, Address]]) -> dict[str, int]:
        """For `${port:S}`, and first the one that is `${port}`."""
        return {name: address.port or 0 for name, address in bound}

    def wanted_wait(self, rate: Window | None, now: float) -> tuple[float, str]:
        """How long limits of the whole service forbid a start, in seconds, and why; "" where nothing does."""
        if rate is not None and (wait_s := rate.wait_s(now)):
            return wait_s, f"waiting: rate {format_rate(rate.rate)}, room in {wait_s:.1f} s"
        limits = self.spec.limits
        if limits.max_load is not None and (found := load.load_average() or 0.0) > limits.max_load:
            return _LOOK_AGAIN_S, f"waiting: load {found:g}, and max_load is {limits.max_load:g}"
        if limits.min_memory is not None and (free := load.available_memory()) is not None:
            if free < limits.min_memory:
                there = f"{free >> 20} MiB of memory, and min_memory is {limits.min_memory >> 20} MiB"
                return _LOOK_AGAIN_S, f"waiting: {there}"
        return 0.0, ""

    def wait(self, wait_s: float, why: str) -> None:
        """Watch the sockets again after `wait_s`, and show the reason until then (B1: it heals by itself)."""
        if not self.note:
            self.error(why, level="warning")
        self.note = why

        def resume() -> None:
            if self.note == why:
                self.note = ""
            self._watch()

        self.supervisor.timers.after(wait_s, resume)

    @abstractmethod
    def _watch(self) -> None:
        """Poll the sockets, if it is time for traffic."""

    def unwatch(self) -> None:
        for listener in self.listeners.open:
            self.listeners.unwatch(listener)

    def close_reader(self, reader: OutputReader) -> None:
        if reader.fileno() >= 0:
            self.supervisor.watch.remove(reader.fileno())
            reader.close()

    def finish_reader(self, reader: OutputReader) -> None:
        """Its process has ended: last words first (L9); a descendant that holds the pipe gets a second (L6)."""
        if reader.drain():
            self.close_reader(reader)
        else:
            self.supervisor.timers.after(_LAST_WORDS_S, lambda: self.close_reader(reader))

    # -- what the modes do differently

    @property
    def acceptor(self) -> ConnectionService | None:
        """What accepts its clients, where superd does."""
        return None

    @abstractmethod
    def begin(self) -> None:
        """The daemon is up: wait for traffic, or start."""

    @abstractmethod
    def _listeners_changed(self) -> None:
        """A listener has been bound, or bound anew."""

    @abstractmethod
    def go_on(self) -> None:
        """What a start had to wait for is there (dependencies.py)."""

    @abstractmethod
    def ask_start(self) -> None:
        """The operator's wish; `state` follows."""

    @abstractmethod
    def ask_stop(self) -> None:
        """Wish it down and end what runs; clients who come now wait in the backlog."""

    @abstractmethod
    def ask_drain(self) -> None:
        """As ask_stop, but nothing is killed: what runs is waited for, however long it takes."""

    @abstractmethod
    def ask_restart(self) -> None:
        """End what runs and begin again; the listeners stay."""

    @abstractmethod
    def ask_overlap(self) -> None:
        """Restart, so that somebody serves all the time; what becomes of it `overlapped` tells."""

    @abstractmethod
    def overlapped(self) -> str | None:
        """ "": as ask_overlap was to have it; None: not yet; else why the process before goes on."""

    @abstractmethod
    def ask_reload(self) -> bool:
        """Send `reload_signal` to the processes themselves, not to their groups. False: there is none."""

    @abstractmethod
    def mains(self) -> list[int]:
        """Pids of the processes that superd itself started and that live."""

    def count(self) -> int:
        """Live processes, or connections."""
        return len(self.mains())

    @abstractmethod
    def tell_mains(self, signo: int) -> None:
        """Signal them, or their groups, through their parent: only that knows that the pid is still theirs."""

    @abstractmethod
    def busy(self) -> bool:
        """Whether there is a process, or one on its way."""

    def has_guests(self) -> bool:
        """Whether clients have been accepted that have no process yet."""
        return False

    def is_stopped(self) -> bool:
        return self.state in (State.STOPPED, State.DISABLED, State.DONE, State.FAILED) and not self.busy()

    def explain(self) -> str:
        """Why it is not what it should be; "": it is."""
        note = self.supervisor.dependencies.note(self) or self.note or self.listeners.describe_waiting()
        paused = "paused: clients wait" if self.listeners.paused else ""
        return "; ".join(filter(None, (paused, note)))

    def statistics(self) -> Statistics:
        mains = self.mains()
        listen = tuple(str(listener.address) for listener in self.listeners.open)
        waiting = tuple(str(self.spec.sockets[index].address) for index in self.listeners.waiting)
        note = self.explain()
        state = State.STOPPING if self.leaving else self.state
        if self.leaving:
            note = (
                f"its file has gone; {self.count()} still live" if self.spec.takes_connections else "its file has gone"
            )
        else:
            note = self.supervisor.note_of_file(self.name) or note
        return Statistics(
            self.name, state.value, self.since, mains[0] if mains else None, self.count(), self.total,
            self.restarts, listen + waiting, note,
        )  # fmt: skip

    def close(self, *, remove_paths: bool = True) -> None:
        self.listeners.close(remove_paths=remove_paths)


def make_ending(status: int, lived_s: float) -> Ending:
    """`status` as from waitpid(2), or UNKNOWN_STATUS."""
    if status == messages.UNKNOWN_STATUS:
        return Ending(255, lived_s=lived_s)
    code = os.waitstatus_to_exitcode(status)
    if code >= 0:
        return Ending(code, lived_s=lived_s)
    return Ending(signal=signal_name(-code), lived_s=lived_s, dumped=os.WCOREDUMP(status))


def signal_name(number: int) -> str:
    """Without SIG; real-time signals, which have no name of their own, as RTMIN+N."""
    try:
        return signal.Signals(number).name.removeprefix("SIG")
    except ValueError:
        return f"RTMIN+{number - signal.SIGRTMIN}"


def explain_start(spec: ServiceSpec, stage: str, errno: int, detail: str = "", *, program: str = "") -> str:
    """Why a process could not be started, with what and where (E12)."""
    if stage == "output" and not detail:
        detail = next((one.path for one in (spec.stderr, spec.stdout) if one.path), "")
    reason = os.strerror(errno).lower() if errno else detail or "unknown reason"
    if detail and errno and detail != reason:
        reason = detail if reason in detail else f"{detail}: {reason}"
    if stage == "exec" and errno == 8:
        reason += " (no interpreter line `#!…`, or a program for another machine)"
    if stage == "fork" and errno == EAGAIN and spec.cgroup.pids_max is not None:
        reason += f" (pids_max = {spec.cgroup.pids_max})"
    return f"cannot start {program or spec.context.handler or spec.command[0]}: {stage}: {reason}"
