"""One service at run time: what all run modes share, and ProcessService for the modes that start one process.

lifecycle.py decides; here its effects are carried out, facts become events, and nothing else writes the state.
A ProcessService's process is the keeper's child: it outlives managers, and a new manager adopts it by its tag.
"""

from __future__ import annotations

import fcntl
import functools
import os
import random
import secrets
import select
import signal
import socket
import struct
import termios
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import trio

from superd.core import lifecycle, messages, plan
from superd.core.admission import Window
from superd.core.lifecycle import Effect, Ending, Event, History, State
from superd.core.plan import Program
from superd.core.spec import ServiceSpec
from superd.core.values import expand_runtime, format_rate
from superd.manager import environment
from superd.manager.keeperlink import Inheritance
from superd.manager.listeners import Listener, Listeners
from superd.manager.logs import OutputReader
from superd.manager.watch import Timer
from superd.system import notify, queues, sockets

if TYPE_CHECKING:
    from superd.manager.supervisor import Supervisor

_ENDINGS_KEPT = 5
_LAST_WORDS_S = 1.0  # a descendant may hold the log pipe this long after the exit (L6)
_DRAIN_TRIES = 5
_QUICK_S = 0.25  # a process that lived less can hardly have served anybody
_UNKNOWN = "unknown"


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

    def __init__(self, supervisor: Supervisor, spec: ServiceSpec) -> None:
        self.supervisor, self.spec, self.name = supervisor, spec, spec.name
        self.log = supervisor.log
        self.state = State.STOPPED if spec.enabled else State.DISABLED
        self.since = time.monotonic()
        self.wish_up = spec.enabled
        self.note = ""
        self.total = self.restarts = 0
        self.endings: list[str] = []
        self.changed = trio.Event()  # set and replaced at each change of state
        self.listeners = Listeners(
            spec.name, spec.sockets, environment.trusted_uid(spec), supervisor.keeper, supervisor.watch,
            supervisor.timers, supervisor.log, self._listeners_changed,
        )  # fmt: skip

    def enter(self, state: State) -> None:
        if state is self.state:
            return
        self.log.record("state", service=self.name, level="debug", was=self.state.value, state=state.value)
        self.state = state
        self.since = time.monotonic()
        self.announce()

    def announce(self) -> None:
        """Wake who waits for a change, and let the keeper know what a next manager must."""
        self.wake()
        self.supervisor.snapshot_wanted = True

    def wake(self) -> None:
        """Wake who waits for a change."""
        self.changed.set()
        self.changed = trio.Event()

    def error(self, text: str, **fields: Any) -> None:
        """One line, ten a minute for each kind (L12)."""
        self.log.error_limited((self.name, text[:40]), text, service=self.name, **fields)

    def ended(self, ending: Ending) -> None:
        self.endings.append(str(ending))
        del self.endings[:-_ENDINGS_KEPT]

    def record_exit(self, pid: int, status: int, lived_s: float, **fields: Any) -> Ending:
        """Log how a process ended (`status` as from waitpid(2)) and say it as an Ending."""
        known = status != messages.UNKNOWN_STATUS
        code = os.waitstatus_to_exitcode(status) if known else 255
        ending = Ending(None if code < 0 else code, signal_name(-code) if code < 0 else None, lived_s=lived_s)
        self.log.record(
            "exit", "" if known else "status unknown", service=self.name, pid=pid,
            status=ending.status, signal=ending.signal, duration=round(lived_s, 4), **fields,
        )  # fmt: skip
        return ending

    def bind(self, inheritance: Inheritance, inherited: dict[str, list[int]]) -> None:
        if self.state is not State.DISABLED:
            self.listeners.bind(inheritance, inherited)

    def enable(self) -> None:
        """A service whose file says enabled = false is started by hand: now it gets its sockets."""
        if self.state is State.DISABLED:
            self.listeners.bind(self.supervisor.inheritance, {})
            self.enter(State.STOPPED)

    def make_program(self, own_environment: dict[str, str]) -> Program:
        """Raises OSError or ValueError for what can only be known now: an environment file, too many sockets."""
        spec = self.spec
        bound = [(listener.spec.name, listener.address) for listener in self.listeners.open]
        if spec.pass_ == "stdio" and not spec.takes_connections and len(bound) > 1:
            raise ValueError(f"{len(bound)} sockets ({', '.join(str(address) for _, address in bound)}) for one stdin")
        ports = {name: address.port or 0 for name, address in bound}
        first = plan.LISTEN_FDS_START if spec.pass_ == "listen-fds" else 0
        names = ["connection"] if spec.takes_connections else [name for name, _ in bound]
        fds = {name: first + index for index, name in reversed(list(enumerate(names)))}  # the first of a name
        variables = {} if spec.environment_file is None else environment.read_file(spec.environment_file)
        try:
            argv = [expand_runtime(word, ports, fds) for word in spec.command]
            variables |= {name: expand_runtime(value, ports, fds) for name, value in spec.environment}
        except KeyError as error:
            raise ValueError(f"socket {error} is not open") from None
        return plan.plan_program(spec, argv, variables, own_environment, bound)

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

    @abstractmethod
    def begin(self) -> None:
        """The daemon is up: wait for traffic, or start."""

    @abstractmethod
    def _listeners_changed(self) -> None:
        """A listener has been bound, or bound anew."""

    @abstractmethod
    def ask_start(self) -> None:
        """The operator's wish; `state` follows."""

    @abstractmethod
    def ask_stop(self) -> None:
        """Wish it down and end what runs; clients who come now wait in the backlog."""

    @abstractmethod
    def ask_restart(self) -> None:
        """End what runs and begin again; the listeners stay."""

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

    def is_stopped(self) -> bool:
        return self.state in (State.STOPPED, State.DISABLED, State.DONE, State.FAILED) and not self.busy()

    def statistics(self) -> Statistics:
        mains = self.mains()
        listen = tuple(str(listener.address) for listener in self.listeners.open)
        waiting = tuple(str(self.spec.sockets[index].address) for index in self.listeners.waiting)
        note = self.note or self.listeners.describe_waiting()
        return Statistics(
            self.name, self.state.value, self.since, mains[0] if mains else None, self.count(), self.total,
            self.restarts, listen + waiting, note,
        )  # fmt: skip

    def close(self, *, remove_paths: bool = True) -> None:
        self.listeners.close(remove_paths=remove_paths)


@dataclass(slots=True)
class Instance:
    """The process of a ProcessService. pid 0 until the keeper has said it."""

    id: int
    pid: int
    started: float
    reader: OutputReader | None
    running: bool = False
    cause: str = ""  # why superd ends it, if that is a failure of its own


class ProcessService(Service):
    """on-demand, always-on and once."""

    def __init__(self, supervisor: Supervisor, spec: ServiceSpec) -> None:
        super().__init__(supervisor, spec)
        self.history = History()
        self.window = None if spec.limits.rate is None else Window(spec.limits.rate)
        self.instance: Instance | None = None
        self.timer: Timer | None = None
        self.delay_s = 0.0
        self.again = False  # a restart was asked for
        self.notify_socket: socket.socket | None = None
        self.status_text = ""
        self._head: list[object] = []  # what the sockets held when the process was started
        self._drain_tries = 0

    @property
    def on_demand(self) -> bool:
        return self.spec.run == "on-demand"

    # -- facts become events

    def begin(self) -> None:
        if self.state is State.DISABLED or not self.wish_up:
            return
        if self.spec.ready.kind == "notify":
            self._open_notify()
        if self.state not in (State.STOPPED, State.BACKOFF):
            return  # adopted as it was
        if not self.listeners.complete:
            self.enter(State.BACKOFF)
        else:
            self.dispatch(
                Event.LISTEN if self.on_demand else Event.DELAY_OVER if self.state is State.BACKOFF else Event.START
            )

    def _listeners_changed(self) -> None:
        if self.listeners.complete and self.wish_up and self.state in (State.STOPPED, State.BACKOFF):
            self.begin()
        elif self.state is State.LISTENING:
            self._watch()

    def ask_start(self) -> None:
        self.enable()
        self.wish_up = True
        self.history = History()
        self.note = ""
        if self.state is State.STOPPING:
            self.again = True
        elif self.instance is None and not self.listeners.complete:
            self.enter(State.BACKOFF)
        else:
            if self.spec.ready.kind == "notify":
                self._open_notify()
            self.dispatch(Event.START)

    def ask_stop(self) -> None:
        self.wish_up = self.again = False
        if self.state is not State.DISABLED:
            self.dispatch(Event.STOP)

    def ask_restart(self) -> None:
        self.wish_up = True
        if self.instance is None:
            self.ask_start()
        else:
            self.again = True
            if self.state is not State.STOPPING:
                self.dispatch(Event.STOP)

    def dispatch(self, event: Event) -> None:
        state, effects = lifecycle.transition(self.state, event)
        self.enter(state)
        for effect in effects:
            self._effects[effect](self)
        self.announce()

    def _traffic(self, listener: Listener, events: int) -> None:
        if events & (select.EPOLLHUP | select.EPOLLERR) and sockets.listener_is_dead(listener.fd):
            return self.listeners.rebind(listener, "a process shut it down")
        if self.state is not State.LISTENING:
            return
        now = time.monotonic()
        if self.window is not None:
            wait_s = self.window.wait_s(now)
            if wait_s:
                self.unwatch()
                self.note = f"waiting: rate {format_rate(self.window.rate)}, room in {wait_s:.1f} s"
                self.error(self.note, level="warning")
                self.supervisor.timers.after(wait_s, self._rate_has_room)
                return
            self.window.take(now)
        self.dispatch(Event.TRAFFIC)

    def _rate_has_room(self) -> None:
        if self.state is State.LISTENING:
            self.note = ""
            self._watch()

    # -- effects

    def _watch(self) -> None:
        for listener in self.listeners.open:
            self.listeners.watch_one(listener, functools.partial(self._traffic, listener))

    def _disarm(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None

    def _arm(self, delay_s: float | None, callback: Callable[[], None]) -> None:
        self._disarm()
        if delay_s is not None:
            self.timer = self.supervisor.timers.after(delay_s, callback)

    def _arm_start(self) -> None:
        if self.state is State.STARTING and self.spec.ready.kind == "notify":
            self._arm(self.spec.ready_timeout_s, self._start_timeout)

    def _start_timeout(self) -> None:
        if self.instance is not None:
            self.instance.cause = f"no READY=1 within {self.spec.ready_timeout_s:g} s"
            self.error(f"{self.instance.cause}; stopping it")
        self.dispatch(Event.TIMEOUT)

    def _arm_stop(self) -> None:
        self._arm(self.spec.stop_timeout_s, lambda: self.dispatch(Event.TIMEOUT))

    def _arm_delay(self) -> None:
        # Jitter keeps services that failed together from coming back together (M5).
        self._arm(self.delay_s * random.uniform(0.9, 1.1), self._delay_over)

    def _delay_over(self) -> None:
        self.timer = None
        restarts = self.spec.restart.policy != "no"
        self.note = ""
        self.dispatch(Event.DELAY_OVER if restarts or not self.on_demand else Event.LISTEN)

    def _spawn(self) -> None:
        supervisor = self.supervisor
        for listener in list(self.listeners.open):
            if listener.address.accepts and sockets.listener_is_dead(listener.fd):
                self.listeners.rebind(listener, "a process shut it down")  # A15
        number = supervisor.next_instance()
        reader = None
        log_fds: list[int] = []
        self._head = [_head(listener) for listener in self.listeners.open] if self.on_demand else []
        try:
            program = self.make_program(supervisor.own_environment)
            extra = {"INVOCATION_ID": secrets.token_hex(16)}
            if self.notify_socket is not None:
                extra["NOTIFY_SOCKET"] = notify.address_of(self.notify_socket)
            program.environment.update(extra)
            if program.logs:
                log_fds = list(os.pipe2(os.O_CLOEXEC))
            for listener in self.listeners.open:
                _set_blocking(listener)
            reader = OutputReader(log_fds[0], self.log, self.name) if log_fds else None
            fds = [listener.fd for listener in self.listeners.open]
            supervisor.keeper.send(
                "start", [*fds, *reversed(log_fds)], id=number, program=program.to_json(), log=bool(log_fds),
                context=environment.context_json(self.spec), tag={"service": self.name, "id": number},
            )  # fmt: skip
        except (OSError, ValueError) as error:
            for fd in log_fds:
                os.close(fd)
            reason = f"cannot start: {error}"
            supervisor.later(lambda: self._not_started(reason))
            return
        self.instance = Instance(number, 0, time.monotonic(), reader)
        self.total += 1
        supervisor.instances[number] = self
        if log_fds:
            os.close(log_fds[1])

    def _signal(self, signo: int) -> None:
        """To every process of the service that `kill_mode` means."""
        self.tell_mains(signo)
        if self.spec.kill_mode == "tree":
            self.supervisor.processes.tell_rest(self, signo)

    def _term(self) -> None:
        self._signal(self.spec.stop_signal)

    def _kill(self) -> None:
        self.error(f"did not stop within {self.spec.stop_timeout_s:g} s; killing it", level="warning")
        self._signal(signal.SIGKILL)

    _effects: dict[Effect, Callable[[ProcessService], None]] = {  # noqa: RUF012 - a table, never changed
        Effect.WATCH: _watch,
        Effect.UNWATCH: Service.unwatch,
        Effect.SPAWN: _spawn,
        Effect.TERM: _term,
        Effect.KILL: _kill,
        Effect.ARM_START: _arm_start,
        Effect.ARM_STOP: _arm_stop,
        Effect.ARM_DELAY: _arm_delay,
        Effect.DISARM: _disarm,
    }

    # -- what the keeper says

    def process_started(self, pid: int) -> None:
        instance = self.instance
        if instance is None:
            return
        instance.pid, instance.running = pid, True
        reader = instance.reader
        if reader is not None:
            reader.pid = pid
            self.supervisor.watch.add(reader.fileno(), lambda _: self._output(reader))
        self.log.record("start", service=self.name, pid=pid)
        if self.spec.ready.kind == "start" and self.state is State.STARTING:
            self.dispatch(Event.READY)

    def process_failed(self, stage: str, errno: int, detail: str) -> None:
        self._not_started(explain_start(self.spec, stage, errno, detail))

    def _not_started(self, reason: str) -> None:
        self._end_output()
        self.instance = None
        self._judge(Ending(failure=reason))

    def process_exited(self, pid: int, status: int) -> None:
        instance = self.instance
        if instance is None:
            return
        if not instance.running:
            return  # its exec failed: that report decides, and this is the shell of it
        self._read_notify()  # what it said before it ended comes first (I13)
        self._end_output()
        ending = self.record_exit(pid, status, time.monotonic() - instance.started)
        ending = ending._replace(cause=instance.cause, left_traffic=self._left_traffic(ending.lived_s))
        self.instance = None
        if (
            self.state is State.STOPPING
            and self.spec.kill_mode == "tree"
            and self.supervisor.processes.look_again(self)
        ):
            self.supervisor.end_service(self, lambda: self._judge(ending))
        else:
            self._judge(ending)

    def _judge(self, ending: Ending) -> None:
        self.ended(ending)
        event, self.delay_s = lifecycle.judge_exit(
            ending, on_demand=self.on_demand, wish_up=self.wish_up, again=self.again, policy=self.spec.restart,
            history=self.history, now=time.monotonic(),
        )  # fmt: skip
        self.again = False
        self.note = ""
        clean = ending.clean(self.spec.restart.success_status)
        if event is Event.EXIT_RETRY:
            self.restarts += 1
            why = "left its traffic" if ending.left_traffic and clean else str(ending)
            self.note = f"{why}; trying again in {self.delay_s:.1f} s"
            self.error(self.note, level="warning" if clean else "err")
        elif event is Event.EXIT_GIVE_UP:
            self.note = str(ending)
            self.error(f"{ending}; giving up, `superctl start {self.name}` tries again")
        elif ending.failure is not None:
            self.error(ending.failure)
        self.dispatch(event)

    def _left_traffic(self, lived_s: float) -> bool:
        """Whether the sockets still hold all that the process was started for (B7, C1)."""
        left = False
        for listener, before in zip(self.listeners.open, self._head, strict=False):
            now = None if before is None else _head(listener)
            if now is None or before is None:
                continue
            if isinstance(now, frozenset) and isinstance(before, frozenset):
                same = before <= now
            elif _UNKNOWN in (now, before):
                same = lived_s < _QUICK_S and listener_is_readable(listener.fd)
            else:
                same = now == before
            if same:
                left = True
                self._drain(listener)
        if not left:
            self._drain_tries = 0
        return left

    def _drain(self, listener: Listener) -> None:
        if listener.address.kind != "datagram":
            return
        self._drain_tries += 1
        if self._drain_tries >= _DRAIN_TRIES:
            self._drain_tries = 0
            if sockets.drain_datagram(listener.fd):
                self.supervisor.drained += 1
                self.error(f"a datagram on {listener.address} was left unread {_DRAIN_TRIES} times; dropped it")

    # -- output and readiness

    def _output(self, reader: OutputReader) -> None:
        if not reader.readable():
            self.close_reader(reader)

    def _end_output(self) -> None:
        reader = self.instance.reader if self.instance else None
        if reader is not None and reader.fileno() >= 0:
            self.finish_reader(reader)

    def _open_notify(self) -> None:
        if self.notify_socket is not None:
            return
        held = self.supervisor.inheritance.held.pop(f"notify:{self.name}", None)
        try:
            if held:
                self.notify_socket = socket.socket(fileno=held[0])
            else:
                directory, uid = self.supervisor.runtime_directory, environment.trusted_uid(self.spec)
                self.notify_socket = notify.open_socket(directory, self.name, uid, os.getppid())
                self.supervisor.keeper.send("store", [self.notify_socket.fileno()], name=f"notify:{self.name}")
        except OSError as error:
            self.error(f"cannot open its notify socket: {error}")
            return
        self.supervisor.watch.add(self.notify_socket.fileno(), lambda _: self._read_notify())

    def _read_notify(self) -> None:
        """At most 64 messages a turn: a flooder must not starve the others (I11)."""
        if self.notify_socket is None:
            return
        for _ in range(64):
            message = notify.receive(self.notify_socket)
            if message is None:
                return
            if self._may_notify(message.pid):
                self._notified(message.fields)
            message.close()

    def _may_notify(self, pid: int) -> bool:
        if self.instance is None or self.spec.notify_access == "none":
            return False
        if pid == self.instance.pid or self.instance.pid == 0:
            return True
        if self.spec.notify_access != "all":
            return False
        if any(row.pid == pid for row in self.supervisor.processes.look_again(self)):
            return True
        # One that has ended since was of the service too: nobody else can write to this socket (I3, I14).
        return not os.path.exists(f"/proc/{pid}/exe")

    def _notified(self, fields: dict[str, str]) -> None:
        if "STATUS" in fields:
            self.status_text = fields["STATUS"][:1000]
        if fields.get("READY") == "1" and self.state is State.STARTING:
            self.log.record("ready", service=self.name, pid=self.instance.pid if self.instance else None)
            self.dispatch(Event.READY)

    # -- supervisor's questions

    def mains(self) -> list[int]:
        return [self.instance.pid] if self.instance is not None and self.instance.pid else []

    def tell_mains(self, signo: int) -> None:
        if self.instance is not None:
            group = self.spec.kill_mode != "process"
            self.supervisor.keeper.send("signal", id=self.instance.id, signo=signo, group=group)

    def busy(self) -> bool:
        return self.instance is not None

    def adopt(self, row: dict[str, Any], log: int | None, was: dict[str, Any]) -> None:
        """Take over the process an earlier manager had; `was` is what it deposited about us."""
        self.instance = Instance(row["id"], row["pid"], row["started"], None, running=row["running"])
        self.supervisor.instances[row["id"]] = self
        if log is not None:
            self.instance.reader = reader = OutputReader(log, self.log, self.name, row["pid"])
            self.supervisor.watch.add(reader.fileno(), lambda _: self._output(reader))
        state = State(was.get("state", "ready"))
        self.state = state if state in (State.STARTING, State.STOPPING) else State.READY
        if self.state is State.STARTING and row["running"] and self.spec.ready.kind == "start":
            self.state = State.READY
        if self.state is State.STOPPING:
            self._arm_stop()
        else:
            self._arm_start()

    def close(self, *, remove_paths: bool = True) -> None:
        self._disarm()
        if self.notify_socket is not None:
            self.supervisor.watch.remove(self.notify_socket.fileno())
            self.supervisor.keeper.send("drop", name=f"notify:{self.name}")
            notify.close_socket(self.notify_socket)
            self.notify_socket = None
        super().close(remove_paths=remove_paths)


def signal_name(number: int) -> str:
    """Without SIG; real-time signals, which have no name of their own, as RTMIN+N."""
    try:
        return signal.Signals(number).name.removeprefix("SIG")
    except ValueError:
        return f"RTMIN+{number - signal.SIGRTMIN}"


def explain_start(spec: ServiceSpec, stage: str, errno: int, detail: str = "") -> str:
    """Why a process could not be started, with what and where (E12)."""
    reason = os.strerror(errno).lower() if errno else detail or "unknown reason"
    if detail and errno and detail != reason:
        reason = detail if reason in detail else f"{detail}: {reason}"
    if stage == "exec" and errno == 8:
        reason += " (no interpreter line `#!…`, or a program for another machine)"
    return f"cannot start {spec.command[0]}: {stage}: {reason}"


def _head(listener: Listener) -> object:
    """What waits on a listener, to tell after the exit whether it was taken; None: nothing, _UNKNOWN: cannot be told.

    A datagram itself (with its sender), the connections that wait to be accepted, or how many bytes are in a FIFO.
    """
    if listener.address.kind == "datagram":
        try:
            return listener.socket.recvfrom(2048, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except OSError:
            return None
    if listener.address.kind == "fifo":
        return _fifo_bytes(listener.fd) or None
    waiting = queues.waiting(listener.fd)
    return _UNKNOWN if waiting is None else waiting or None


def listener_is_readable(fd: int) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(0))


def _fifo_bytes(fd: int) -> int:
    return struct.unpack("i", fcntl.ioctl(fd, termios.FIONREAD, bytes(4)))[0]  # type: ignore[no-any-return]


def _set_blocking(listener: Listener) -> None:
    """O_NONBLOCK as the file says, each time: the last process may have left it otherwise (A16)."""
    os.set_blocking(listener.fd, not listener.spec.nonblocking)
