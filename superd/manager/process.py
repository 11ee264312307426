"""Services that are one process: on-demand, always-on and once.

lifecycle.py decides; here its effects are carried out, facts become events, and nothing else writes the state. The
process is the keeper's child: it outlives managers, and a new manager adopts it by its tag.
"""

from __future__ import annotations

import functools
import os
import random
import secrets
import select
import signal
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from superd.core import lifecycle
from superd.core.admission import Window
from superd.core.lifecycle import Effect, Ending, Event, History, State
from superd.core.messages import UNKNOWN_STATUS
from superd.core.spec import Access, ServiceSpec
from superd.core.values import format_duration, format_rate
from superd.manager import environment
from superd.manager.access import Door
from superd.manager.checks import Checks
from superd.manager.commands import Commands, Role
from superd.manager.health import Health
from superd.manager.idle import Idleness
from superd.manager.listeners import Listener
from superd.manager.logs import OutputReader
from superd.manager.mainprocess import MainProcess
from superd.manager.notification import Notifications
from superd.manager.overlap import Overlap
from superd.manager.readiness import Readiness
from superd.manager.service import Service, explain_start
from superd.manager.traffic import Traffic
from superd.manager.watch import Timer
from superd.system import fdpass, sockets

if TYPE_CHECKING:
    from superd.manager.supervisor import Supervisor


# Not on its way to another process: what it has stored goes, as systemd's FileDescriptorStorePreserve=restart has it.
_AT_REST = (State.STOPPED, State.DISABLED, State.LISTENING, State.DONE, State.FAILED)


@dataclass(slots=True)
class Instance:
    """The main process of a ProcessService. pid 0 until the keeper has said it.

    cause, result  why superd ends it, if that is a failure of its own; as in lifecycle.Ending
    """

    id: int
    pid: int
    started: float
    reader: OutputReader | None
    running: bool = False
    cause: str = ""
    result: str = ""
    idle: bool = False  # superd ends it because nobody uses it
    at_once: bool = False  # superd ends it to start it again without delay
    ready_after_s: float | None = None  # from its start, where it had to become ready
    main: MainProcess | None = None  # it has named another process than the one that superd started (MAINPID)
    origin: tuple[int, int] | None = None  # then: id and pid of the one that superd started, while it lives


class ProcessService(Service):
    """on-demand, always-on and once."""

    def __init__(self, supervisor: Supervisor, spec: ServiceSpec) -> None:
        super().__init__(supervisor, spec)
        self.history = History()
        self.window = None if spec.limits.rate is None else Window(spec.limits.rate)
        self.instance: Instance | None = None
        self.commands = Commands(self, self._commands_done)
        self.ending: Ending | None = None  # of the main process, while a command still runs
        self.invocation = ""
        self.main_pid = 0  # of this activation, also after its end
        self.newest = 0  # id of the child that was started last
        self.unsettled: list[int] = []  # children that have ended, until what follows from it is under way
        self.timer: Timer | None = None
        self.runtime: Timer | None = None
        self.delay_s = 0.0
        self.due: float | None = None  # when the delay is over
        self.restored_due: float | None = None  # that of an earlier manager
        self.again = False  # a restart was asked for
        self._watch_again = False  # not before what it requires is there
        self.notifications = Notifications(self)
        self.overlap = Overlap(self)
        self.checks = Checks(self)
        self.readiness = Readiness(self, self.said_ready, self._not_ready)
        self.health = Health(self)
        self.traffic = Traffic(self._dropped)
        self.idleness = Idleness(self)
        self._ended_idle = False  # the last process was stopped because nobody used it
        self._left_origin = False  # it had named a main process, which has ended, and lives itself
        self.status_text = ""
        self.refused = 0
        self.door = None if spec.access == Access() else Door(spec.access, supervisor.names)
        self.extended_until = 0.0  # EXTEND_TIMEOUT_USEC: no limit of this state ends before (CLOCK_MONOTONIC)
        self.reloading = False  # between RELOADING=1 and READY=1; `changed` tells both
        self.reloaded = 0  # how often it has said that it has done so
        self.reload_failed = ""  # why the last one did not end
        self.reload_sent_usec = 0  # when it was told to: what it says of a moment before is about something else
        self._reload_timer: Timer | None = None

    @property
    def on_demand(self) -> bool:
        return self.spec.run == "on-demand"

    @property
    def handed(self) -> list[Listener]:
        """The listeners that its process gets."""
        return self.listeners.open

    # -- facts become events

    def begin(self) -> None:
        self.notifications.store.take_over(self.supervisor.stored.pop(self.name, []))
        if self.instance is None and not self.wish_up:
            self.notifications.store.clear()
        if self.state is State.DISABLED or not self.wish_up:
            return
        self.notifications.open()
        if self.state not in (State.STOPPED, State.BACKOFF):
            return  # adopted as it was
        due, self.restored_due = self.restored_due, None
        if not self.listeners.complete:
            self.enter(State.BACKOFF)
        elif self.state is State.BACKOFF and due is not None:
            self.due = due
            self._arm(max(due - time.monotonic(), 0.0), self._delay_over)
        else:
            self.dispatch(
                Event.LISTEN if self.on_demand else Event.DELAY_OVER if self.state is State.BACKOFF else Event.START
            )

    def apply(self, spec: ServiceSpec) -> None:
        """The process goes on; what superd does with it from now on is what `spec` says."""
        was, self.spec = self.spec, spec
        if spec.limits.rate != was.limits.rate:
            rate = spec.limits.rate
            self.window = None if rate is None else self.window.following(rate) if self.window else Window(rate)
        if spec.context.user != was.context.user:
            self.notifications.close()  # it belongs to the user
        if self.wish_up:
            self.notifications.open()
        if spec.access != was.access:
            self.door = None if spec.access == Access() else Door(spec.access, self.supervisor.names)
        if spec.health != was.health:
            self.health.change()
        if spec.limits.max_runtime_s != was.limits.max_runtime_s:
            self._disarm_runtime()
            self._arm_runtime()
        if spec.ready_timeout_s != was.ready_timeout_s:
            self._arm_start()
        if spec.stop_timeout_s != was.stop_timeout_s and self.state is State.STOPPING:
            self._arm_stop()
        if (spec.idle_timeout_s, spec.sockets) != (was.idle_timeout_s, was.sockets):
            self.idleness.end()
            self.idleness.follow()
        if spec.cgroup != was.cgroup:
            self.change_limits()
        if self.state is State.LISTENING:
            self.unwatch()
            self._watch()

    def renew(self) -> None:
        """Its file says what only another process can be: stop it and start that, or whatever comes next for it."""
        if not self.wish_up:
            return
        if self.instance is not None:
            self.ask_restart()
        elif self.state is not State.LISTENING or not self.on_demand:
            self.history = History()
            self.note = ""
            if not self.listeners.complete:
                self.enter(State.BACKOFF)
            elif self.on_demand:
                self.dispatch(Event.LISTEN)
            else:
                self.ask_start()

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
        elif not self.busy() and not self.listeners.complete:
            self.enter(State.BACKOFF)
        else:
            self.dispatch(Event.START)

    def ask_stop(self) -> None:
        self.wish_up = self.again = False
        if self.state is State.DISABLED:
            return
        drained, self.draining = self.draining, False
        if self.state is State.BACKOFF:
            self.note = ""  # that it is tried again; how it ended stands below, in its status
        self.dispatch(Event.STOP)
        if drained:
            self._term()
            self._arm_stop()

    def ask_drain(self) -> None:
        """superd cannot take the sockets from the process: it is told to stop, itself and nobody below it, and what it
        then does with its clients is its own affair."""
        self.wish_up = self.again = False
        if self.state is not State.DISABLED:
            self.draining = self.instance is not None and self.state in (State.STARTING, State.READY)
            self.dispatch(Event.STOP)

    def ask_restart(self) -> None:
        self.wish_up = True
        if not lifecycle.has_process(self.state):
            self.ask_start()
        else:
            self.again = True
            if self.state is not State.STOPPING:
                self.dispatch(Event.STOP)

    def ask_overlap(self) -> None:
        if self.state is State.READY:
            return self.overlap.begin()
        self.overlap.outcome = ""
        self.supervisor.dependencies.restart(self)

    def overlapped(self) -> str | None:
        return self.overlap.outcome

    def ask_reload(self) -> bool:
        instance = self.instance
        if instance is None or not instance.running:
            return False
        self.reload_sent_usec = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        self.reload_failed = ""
        self._tell_main(self.spec.reload_signal)
        return True

    def go_on(self) -> None:
        if self.state is State.BACKOFF:
            self.dispatch(Event.LISTEN if self._watch_again else Event.START)

    def restart_unhealthy(self, why: str) -> None:
        """Stop it and start it again at once, as far as `restart_limit` allows."""
        if self.instance is not None and not self.supervisor.stopping:
            self.instance.cause, self.instance.at_once = why, True
            self.dispatch(Event.STOP)

    def enter(self, state: State) -> None:
        if state is not State.STARTING:
            self.readiness.cancel()
        if state is State.READY:
            self.health.begin()
        else:
            self.health.cancel()
            self.overlap.cancel()
        if state is not self.state:
            if state is State.READY:
                self.notifications.watchdog.ping()
            else:
                self.notifications.watchdog.stop()
                if self.reloading:
                    self.reloading, self.note = False, ""
        super().enter(state)

    def dispatch(self, event: Event) -> None:
        if event in (Event.START, Event.DELAY_OVER, Event.EXIT_AGAIN):
            at_rest = not lifecycle.has_process(self.state)
            if (at_rest or event is Event.EXIT_AGAIN) and not self.supervisor.dependencies.ready_for(self):
                if event is Event.EXIT_AGAIN:
                    self._move(Event.EXIT_STOPPED)
                self._watch_again = False
                event = Event.WAIT
        self._move(event)
        if self.state in _AT_REST:
            self.notifications.store.clear()
        self.idleness.follow()
        self.announce()

    def _move(self, event: Event) -> None:
        state, effects = lifecycle.transition(self.state, event)
        self.enter(state)
        for effect in effects:
            self._effects[effect](self)

    def stop_idle(self, why: str) -> None:
        """It is wished up all the same: when it has ended, its sockets are watched again."""
        assert self.instance is not None
        self.instance.idle = True
        self.log.message(why, service=self.name)
        self.dispatch(Event.STOP)

    def _traffic(self, listener: Listener, events: int) -> None:
        if events & (select.EPOLLHUP | select.EPOLLERR) and sockets.listener_is_dead(listener.fd):
            return self.listeners.rebind(listener, "a process shut it down")
        if self.state is not State.LISTENING:
            return
        if self.door is not None and listener.address.kind == "datagram" and not self._may_send(listener, self.door):
            return
        if not self.supervisor.dependencies.ready_for(self):
            self._watch_again = True
            return self.dispatch(Event.WAIT)
        now = time.monotonic()
        wait_s, why = self.wanted_wait(self.window, now)
        if why:
            self.unwatch()
            return self.wait(wait_s, why)
        if self.window is not None:
            self.window.take(now)
        self.dispatch(Event.TRAFFIC)

    def _may_send(self, listener: Listener, door: Door) -> bool:
        """Whether the first datagram in the queue may start the service; one that may not is read and dropped (C4)."""
        sender = sockets.datagram_sender(listener.fd)
        if sender is None:
            return False
        decision = door.judge(door.client_at(sender))
        if not decision.allowed:
            sockets.drain_datagram(listener.fd)
            self.refused += 1
            self.counts.add_refusal("access")
            self.log.error_limited(
                (self.name, "refused", decision.reason), f"access: {decision.reason}", level="notice", event="refused",
                service=self.name, peer=sender,
            )  # fmt: skip
        return decision.allowed

    # -- effects

    def _watch(self) -> None:
        if self.state is not State.LISTENING:
            return
        for listener in self.listeners.open:
            self.listeners.watch_one(listener, functools.partial(self._traffic, listener))

    def _disarm(self) -> None:
        self.extended_until = 0.0
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None

    def _arm(self, delay_s: float | None, callback: Callable[[], None]) -> None:
        self._disarm()
        if delay_s is not None:
            self.timer = self.supervisor.timers.after(delay_s, lambda: self._due(callback))

    def _due(self, callback: Callable[[], None]) -> None:
        rest_s = self.extended_until - time.monotonic()
        if rest_s > 0:
            self.timer = self.supervisor.timers.after(rest_s, lambda: self._due(callback))
        else:
            callback()

    def _arm_start(self) -> None:
        waits = self.spec.ready.kind != "start" or self.spec.start_pre or self.spec.start_post
        if self.state is State.STARTING and waits:
            limit_s = self.spec.ready_timeout_s
            if limit_s is not None and self.instance is not None:  # it may be an earlier manager's
                limit_s = max(0.0, limit_s - (time.monotonic() - self.instance.started))
            self._arm(limit_s, self._start_timeout)

    def _start_timeout(self) -> None:
        limit = f"within {self.spec.ready_timeout_s:g} s"
        if self.commands.current is not None:
            return self._not_ready(f"{self.commands.current.role}: {self.commands.current.program} did not end {limit}")
        what = self.readiness.describe()
        self._not_ready(f"{what} {limit}" if self.spec.ready.kind == "notify" else f"not ready {limit}: {what}")

    def _not_ready(self, why: str) -> None:
        self._doom(why, "timeout")
        self.dispatch(Event.TIMEOUT)

    def fail(self, cause: str, result: str) -> None:
        """Stop what runs for a reason that is a failure; `result` as in lifecycle.Ending, and `restart` goes by it."""
        if self.state in (State.STARTING, State.READY):
            self._doom(cause, result)
            self.dispatch(Event.FAIL)

    def _doom(self, cause: str, result: str) -> None:
        doomed = self.instance or self.commands.current
        if doomed is not None:
            doomed.cause, doomed.result = cause, result
            self.error(f"{cause}; stopping it")

    def _arm_runtime(self) -> None:
        limit_s = self.spec.limits.max_runtime_s
        if limit_s is not None and self.instance is not None:
            left_s = max(self.instance.started + limit_s - time.monotonic(), 0.0)
            self.runtime = self.supervisor.timers.after(left_s, lambda: self._runtime_over(limit_s))

    def _runtime_over(self, limit_s: float) -> None:
        rest_s = self.extended_until - time.monotonic()
        if rest_s > 0:
            self.runtime = self.supervisor.timers.after(rest_s, lambda: self._runtime_over(limit_s))
        else:
            self.fail(f"runs longer than max_runtime = {format_duration(limit_s)}", "timeout")

    def _disarm_runtime(self) -> None:
        if self.runtime is not None:
            self.runtime.cancel()
            self.runtime = None

    def _arm_stop(self) -> None:
        self._arm(None if self.draining else self.spec.stop_timeout_s, lambda: self.dispatch(Event.TIMEOUT))

    def _arm_delay(self) -> None:
        # Jitter keeps services that failed together from coming back together (M5).
        delay_s = self.delay_s * random.uniform(0.9, 1.1)
        self.due = time.monotonic() + delay_s
        self._arm(delay_s, self._delay_over)

    def _delay_over(self) -> None:
        self.timer = self.due = None
        restarts = self.spec.restart.policy != "no"
        self.note = ""
        self.dispatch(Event.DELAY_OVER if restarts or not self.on_demand else Event.LISTEN)

    def _spawn(self) -> None:
        self.invocation = secrets.token_hex(16)
        self.main_pid = 0
        self.commands.run("start_pre", self._facts())

    def _facts(self) -> dict[str, str]:
        """What the commands around the main process are told."""
        # In another pid namespace the number would be somebody else's, or nobody's.
        pid = {"MAINPID": str(self.main_pid)} if self.main_pid and not self.spec.context.private_pids else {}
        return {"INVOCATION_ID": self.invocation, **pid}

    def _spawn_main(self) -> None:
        supervisor = self.supervisor
        for listener in list(self.listeners.open):
            if listener.address.accepts and sockets.listener_is_dead(listener.fd):
                self.listeners.rebind(listener, "a process shut it down")  # A15
        self.traffic.look(self.listeners.open if self.on_demand else [])
        try:
            self.instance = self.launch(self.invocation, self.readiness)
        except (OSError, ValueError) as error:
            reason = f"cannot start: {error}"
            supervisor.later(lambda: self._not_started(reason))
            return
        supervisor.instances[self.instance.id] = self
        self.newest = self.instance.id
        self.settle()

    def launch(self, invocation: str, readiness: Readiness, *, beside: bool = False) -> Instance:
        """Order a main process from the keeper. beside: there is one. Raises OSError or ValueError: it was not."""
        supervisor = self.supervisor
        number = supervisor.next_instance()
        log_fds: list[int] = []
        ready_fds: list[int] = []
        try:
            program = self.notifications.equip(self.make_program(supervisor.own_environment), beside=beside)
            extra = {"INVOCATION_ID": invocation}
            program.environment.update(extra)
            if program.logs:
                log_fds = list(os.pipe2(os.O_CLOEXEC))
            for listener in self.handed if not beside else ():
                # O_NONBLOCK as the file says, each time: the last process may have left it otherwise (A16). One that
                # still serves has it as it needs it, and the two share it.
                os.set_blocking(listener.fd, not listener.spec.nonblocking)
            reader = OutputReader(log_fds[0], self.log, self.name) if log_fds else None
            fds = [listener.fd for listener in self.handed]
            ready_fds = readiness.prepare()
            supervisor.keeper.send(
                "start", [*fds, *ready_fds, *reversed(log_fds)], id=number, program=program.to_json(),
                log=bool(log_fds), context=environment.context_json(self.spec),
                tag={"service": self.name, "id": number, "role": "main", "facts": extra, "beside": beside},
                cgroup=supervisor.processes.group(self), limited=bool(self.spec.cgroup.controllers()),
                stored=self.notifications.store.held,
            )  # fmt: skip
        except (OSError, ValueError):
            fdpass.close_all(log_fds)
            readiness.cancel()
            if beside:
                self.notifications.resume()
            raise
        finally:
            fdpass.close_all(ready_fds)
        if log_fds:
            os.close(log_fds[1])
        self.total += 1
        return Instance(number, 0, time.monotonic(), reader)

    def succeed(self, instance: Instance, invocation: str, status_text: str) -> None:
        """Another process serves from now on; the service is READY all the time."""
        self.instance = instance
        self.supervisor.instances[instance.id] = self
        self.newest, self.main_pid, self.invocation = instance.id, instance.pid, invocation
        if self.reloading:
            self.reload_ends()
        self.notifications.forget_process()
        self.status_text = status_text
        self.notifications.watchdog.ping()
        self.health.cancel()
        self.health.begin()
        self._disarm_runtime()
        self._arm_runtime()
        self.log.record("ready", service=self.name, pid=instance.pid, took=instance.ready_after_s)
        self.announce()

    def settle(self) -> None:
        """What follows from the end of those children is under way: no other manager is to judge it again."""
        for number in self.unsettled:
            self.supervisor.forget(number)
        self.unsettled.clear()

    def _post(self) -> None:
        self._clear(self._run_stop_post)

    def _run_stop_post(self) -> None:
        assert self.ending is not None
        self._arm_stop()
        facts = self._facts() | self.ending.environment(self.spec.restart.success_status)
        self.commands.run("stop_post", facts, self.ending)

    def _clear(self, then: Callable[[], None]) -> None:
        """Go on when what is left of the service's tree has ended, as far as that is due."""
        processes = self.supervisor.processes
        due = self.state is State.STOPPING or self._left_origin
        self._left_origin = False
        if due and self.spec.kill_mode == "tree" and processes.look_again(self):
            self.supervisor.end_service(self, then)
        else:
            then()

    def _signal(self, signo: int) -> None:
        """To every process of the service that `kill_mode` means."""
        self.tell_mains(signo)
        if self.spec.kill_mode == "tree":
            self.supervisor.processes.tell_rest(self, signo)

    def _term(self) -> None:
        if self.draining:
            self._tell_main(self.spec.stop_signal)
        else:
            self._signal(self.spec.stop_signal)

    def _abort(self) -> None:
        self._tell_main(signal.SIGABRT)

    def _kill(self) -> None:
        text = f"did not stop within {self.spec.stop_timeout_s:g} s"
        command = self.commands.current
        what = f"{command.role}: {command.program} " if command is not None else ""
        self.error(f"{what}{text}; killing it", level="warning")
        for child in (self.instance, command):
            if child is not None and not child.cause:
                child.cause, child.result = text, "timeout"
        self._signal(signal.SIGKILL)

    _effects: dict[Effect, Callable[[Any], None]] = {  # noqa: RUF012 - a table, never changed
        Effect.WATCH: _watch,
        Effect.UNWATCH: Service.unwatch,
        Effect.SPAWN: _spawn,
        Effect.POST: _post,
        Effect.TERM: _term,
        Effect.ABORT: _abort,
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
        self.main_pid = pid
        self.runs(instance, pid)
        self._arm_runtime()
        if self.state is State.STARTING:
            self.readiness.begin()

    def runs(self, instance: Instance, pid: int) -> None:
        """The keeper has started it."""
        instance.pid, instance.running = pid, True
        self.notifications.resume()
        self.counts.add_start(time.monotonic() - instance.started)
        reader = instance.reader
        if reader is not None:
            reader.pid = pid
            self.supervisor.watch.add(reader.fileno(), lambda _: self._output(reader))
        self.log.record("start", service=self.name, pid=pid)

    def became_ready(self) -> None:
        """The main process is ready; the service is when start_post has succeeded."""
        if self.state is State.STARTING and self.commands.current is None:
            self.commands.run("start_post", self._facts())

    def _commands_done(self, role: Role, failed: Ending | None) -> None:
        """The commands of start_pre, start_post or stop_post are through, or one of them failed."""
        ending = self.ending
        if role == "start_pre":
            if failed is None and self.state is State.STARTING:
                self._spawn_main()
            else:
                self._after_main(failed or Ending(failure="was stopped before it was started"))
        elif role == "stop_post":
            assert ending is not None
            if failed is not None and ending.clean(self.spec.restart.success_status):
                ending = ending._replace(cause=str(failed), result=failed.result)
            self._clear(functools.partial(self._judge, ending))
        elif ending is not None:
            self._after_main(ending)
        elif self.state is State.STARTING:
            if failed is not None:
                self.fail(str(failed), failed.result)
            else:
                self.dispatch(Event.READY)
            self.settle()

    def process_failed(self, stage: str, errno: int, detail: str) -> None:
        if self.instance is not None:
            self.unsettled.append(self.instance.id)
        self._not_started(explain_start(self.spec, stage, errno, detail))

    def _not_started(self, reason: str) -> None:
        self._end_output()
        self.instance = None
        self.draining = False
        self.notifications.resume()
        self._after_main(Ending(failure=reason))

    def process_exited(self, pid: int, status: int) -> None:
        instance = self.instance
        if instance is None:
            return
        if not instance.running:
            return  # its exec failed: that report decides, and this is the shell of it
        self.notifications.drain()  # what it said before it ended comes first (I13)
        if pid != instance.pid:
            if instance.origin is not None and instance.origin[1] == pid:
                self.unsettled.append(instance.origin[0])
                instance.origin = None  # it has left the work to the one that it has named
                self.announce()
            return
        self.unsettled.append(instance.id)
        if instance.main is not None:
            instance.main.close()
        self._disarm_runtime()
        self.readiness.read()
        self._end_output()
        ending = self.record_exit(pid, status, time.monotonic() - instance.started)
        ending = ending._replace(
            cause=instance.cause, result=instance.result, at_once=instance.at_once, unready=self._is_unready(instance),
            left_traffic=self.traffic.left(self.listeners.open, ending.lived_s),
        )  # fmt: skip
        self.instance = None
        self.draining = False
        self._ended_idle = instance.idle
        self._left_origin = instance.origin is not None
        if self.commands.current is not None:  # of start_post: there is nothing left for it to do
            self.ending = ending
            self.dispatch(Event.FAIL)
        else:
            self._after_main(ending)

    def _after_main(self, ending: Ending) -> None:
        """There is no main process any more, or there never was one."""
        self.ending = ending
        if self.spec.stop_post:
            self.dispatch(Event.ENDED)
        else:
            self._clear(functools.partial(self._judge, ending))

    def _judge(self, ending: Ending) -> None:
        self.ended(ending)
        self.count_exit(ending)
        self.ending = None
        event, self.delay_s = lifecycle.judge_exit(
            ending, on_demand=self.on_demand, wish_up=self.wish_up, again=self.again, policy=self.spec.restart,
            history=self.history, now=time.monotonic(), idle=self._ended_idle,
        )  # fmt: skip
        self.again = self._ended_idle = False
        self.note = ""
        clean = ending.clean(self.spec.restart.success_status)
        if event is Event.EXIT_AGAIN and ending.at_once:
            self.restarts += 1
        if event is Event.EXIT_RETRY:
            self.restarts += 1
            why = "left its traffic" if ending.left_traffic and clean else str(ending)
            self.note = f"{why}; trying again in {self.delay_s:.1f} s"
            self.error(self.note, level="warning" if clean else "err")
        elif event is Event.EXIT_GIVE_UP:
            limit = self.spec.restart.limit
            spent = limit is not None and len(self.history.starts) >= limit.count
            why = f" (restart_limit = {format_rate(limit)})" if limit is not None and spent else ""
            self.note = f"{ending}; gave up{why}" if why else str(ending)
            self.error(f"{ending}; giving up, `superctl start {self.name}` tries again{why}")
        self.dispatch(event)
        self.settle()
        if self.spec.essential and event in (Event.EXIT_DONE, Event.EXIT_GIVE_UP):
            self.supervisor.essential_ended(self, ending)
        if self.supervisor.once:
            self.supervisor.served(ending.exit_status(()))

    # -- output and readiness

    def _output(self, reader: OutputReader) -> None:
        if not reader.readable():
            self.close_reader(reader)

    def _end_output(self) -> None:
        reader = self.instance.reader if self.instance else None
        if reader is not None and reader.fileno() >= 0:
            self.finish_reader(reader)

    # -- what it says of itself (notification.py)

    @property
    def can_change(self) -> bool:
        """Whether there is a process that is not being ended."""
        return self.instance is not None and self.state in (State.STARTING, State.READY)

    def bite(self, cause: str) -> None:
        """The watchdog's end of it."""
        if self.instance is not None:
            self.instance.cause, self.instance.result = cause, "watchdog"
            self.error(f"{cause}; sending ABRT")
            self.dispatch(Event.WATCHDOG)

    def reload_begins(self) -> None:
        self.reloading = True
        self.note = "reloading"
        if self._reload_timer is not None:
            self._reload_timer.cancel()
        limit_s = self.spec.ready_timeout_s
        self._reload_timer = None if limit_s is None else self.supervisor.timers.after(limit_s, self._reload_timeout)
        self.announce()

    def reload_ends(self) -> None:
        self.reloading = False
        self.reloaded += 1
        self.note = ""
        if self._reload_timer is not None:
            self._reload_timer.cancel()
        self.log.record("reload", service=self.name)
        self.announce()

    def _reload_timeout(self) -> None:
        if self.reloading and self.state is State.READY:
            self.reloading = False
            self.note = ""
            self.reload_failed = f"no READY=1 within {self.spec.ready_timeout_s:g} s after RELOADING=1"
            self.error(self.reload_failed, level="warning")
            self.announce()

    def change_main(self, pid: int, pidfd: int, started: int) -> None:
        """Another process of the service is its main one from now on: its end is the service's. Takes the pidfd."""
        instance, supervisor = self.instance, self.supervisor
        assert instance is not None
        is_first = instance.origin is not None and instance.origin[1] == pid
        number = supervisor.next_instance()
        if not is_first:
            reader = instance.reader
            fds = [reader.fileno()] if reader is not None and reader.fileno() >= 0 else []
            facts = {"INVOCATION_ID": self.invocation}
            tag = {"service": self.name, "id": number, "role": "main", "facts": facts, "main": started}
            try:
                supervisor.keeper.send("adopt", fds, id=number, pid=pid, tag=tag, started=instance.started)
            except OSError:
                os.close(pidfd)
                raise
        if instance.main is not None:
            instance.main.close()
            supervisor.keeper.send("disown", id=instance.id)
            supervisor.instances.pop(instance.id, None)
            instance.main = None
        else:
            instance.origin = instance.id, instance.pid
        if is_first and instance.origin is not None:
            os.close(pidfd)
            (instance.id, instance.pid), instance.origin = instance.origin, None
        else:
            instance.id, instance.pid = number, pid
            self.newest = number
            self._take_main(pidfd, started)
        self.main_pid = pid
        self.log.message(f"pid {pid} is its main process now", service=self.name)
        self.announce()

    def _take_main(self, pidfd: int, started: int) -> None:
        instance, supervisor = self.instance, self.supervisor
        assert instance is not None
        number, pid = instance.id, instance.pid

        def ended(status: int) -> None:
            supervisor.keeper.send("disown", id=number)
            supervisor.exited(number, pid, status)

        supervisor.instances[number] = self
        instance.main = MainProcess(pid, pidfd, started, supervisor.watch, supervisor.timers, ended)

    def said_ready(self) -> None:
        """What `ready` names has come."""
        instance = self.instance
        if instance is None or self.state is not State.STARTING or instance.ready_after_s is not None:
            return
        if self.spec.ready.kind != "start":
            instance.ready_after_s = round(time.monotonic() - instance.started, 4)
            self.log.record("ready", service=self.name, pid=instance.pid, took=instance.ready_after_s)
        self.became_ready()

    def _is_unready(self, instance: Instance) -> bool:
        """Whether it had to become ready, and has not; in STARTING it may also wait for start_post."""
        waits = self.spec.ready.kind != "start" and instance.ready_after_s is None
        return self.state is State.STARTING and waits

    def _dropped(self, listener: Listener, tries: int) -> None:
        self.supervisor.drained += 1
        self.error(f"a datagram on {listener.address} was left unread {tries} times; dropped it")

    # -- supervisor's questions

    def instances(self) -> list[Instance]:
        """The one that serves first."""
        return [*filter(None, [self.instance]), *self.overlap.instances()]

    def mains(self) -> list[int]:
        pids = [self.instance.pid] if self.instance is not None else []
        if self.instance is not None and self.instance.origin is not None:
            pids.append(self.instance.origin[1])
        if self.commands.current is not None:
            pids.append(self.commands.current.pid)
        pids += self.overlap.mains()
        return [pid for pid in pids if pid]

    def tell_mains(self, signo: int) -> None:
        instance, group = self.instance, self.spec.kill_mode != "process"
        self.commands.tell(signo, group=group)
        if instance is None:
            return
        if instance.main is None:
            return self.supervisor.keeper.send("signal", id=instance.id, signo=signo, group=group)
        if group and instance.origin is not None:
            self.supervisor.keeper.send("signal", id=instance.origin[0], signo=signo, group=True)
        # Where it is in a group of others, those are told: the first process's just now, the rest as descendants.
        if self.spec.kill_mode != "tree" or instance.main.leads_group():
            instance.main.signal(signo, group=group)

    def _tell_main(self, signo: int) -> None:
        instance = self.instance
        if instance is not None and instance.main is not None:
            instance.main.signal(signo, group=False)
        elif instance is not None:
            self.supervisor.keeper.send("signal", id=instance.id, signo=signo, group=False)

    def busy(self) -> bool:
        return self.instance is not None or self.commands.current is not None or self.overlap.busy()

    def deposit(self) -> dict[str, Any]:
        """What `restore` takes from an earlier manager."""
        doomed = self.instance or self.commands.current
        return {
            "newest": self.newest, "tries": self.history.tries, "starts": list(self.history.starts),
            "again": self.again, "due": self.due, "idle": self.instance is not None and self.instance.idle,
            "doom": ["", ""] if doomed is None else [doomed.cause, doomed.result],
            "notify": self.notifications.to_json(), "at_once": self.instance is not None and self.instance.at_once,
            "took": None if self.instance is None else self.instance.ready_after_s, "extended": self.extended_until,
            "overlap": self.overlap.deposit(),
        }  # fmt: skip

    def restore(self, was: dict[str, Any]) -> None:
        self.history = History(was.get("tries", 0), deque(was.get("starts", ())))
        self.again = was.get("again", False)
        if was.get("state") == State.BACKOFF.value and was.get("due") is not None:
            self.state, self.restored_due, self.note = State.BACKOFF, was["due"], was.get("note", "")

    def adopt(self, rows: list[dict[str, Any]], logs: dict[int, int], was: dict[str, Any]) -> None:
        """Take over what an earlier manager had started; `was` is what it deposited about us.

        rows: of the keeper's table, oldest first. The newest says how far things are: a main process, a command before
        or after it, or one of start_post beside it.
        """
        rows = self.overlap.adopt(rows, logs, was)
        if not rows:
            return
        newest = rows[-1]
        role = newest["tag"].get("role", "main")
        state = State(was.get("state", "ready"))
        main = newest if role == "main" else None
        if role == "start_post":
            main = next((row for row in reversed(rows) if row["tag"].get("role") == "main"), None)
        if main is not None:
            if "main" in main["tag"]:  # the process before it has named it
                origin = next((row for row in reversed(rows) if row["id"] < main["id"]), None)
                if origin is not None and origin["tag"].get("role", "main") == "main":
                    self._adopt_main(origin, logs.pop(origin["id"], None))
            self._adopt_main(main, logs.pop(main["id"], None))
        if newest is not main:
            self.commands.adopt(newest, logs.pop(newest["id"], None))
            self.ending = self.commands.ending
        self.invocation = newest["tag"].get("facts", {}).get("INVOCATION_ID", "")
        self.newest, self.restored_due, self.note = newest["id"], None, ""
        if role != "stop_post" and newest["id"] > was.get("newest", 0) and "main" not in newest["tag"]:
            # Started after what was deposited: a start was under way, and it was wished.
            state, self.wish_up, self.again = State.STARTING, True, False
        if role == "stop_post":
            self.main_pid = int(newest["tag"]["facts"].get("MAINPID", 0))
            self.state = State.STOPPING
        elif role == "main":
            self.state = state if state in (State.STARTING, State.STOPPING) else State.READY
        else:
            self.state = State.STOPPING if state is State.STOPPING else State.STARTING
        doomed = self.instance or self.commands.current
        if doomed is not None:
            doomed.cause, doomed.result = was.get("doom", ("", ""))
        if self.instance is not None:
            self.instance.at_once, self.instance.ready_after_s = was.get("at_once", False), was.get("took")
        if self.state is State.STOPPING:
            if self.instance is not None:
                self.instance.idle = was.get("idle", False)
            self._arm_stop()
        else:
            self._arm_start()
        self.extended_until = was.get("extended", 0.0)  # which arming has forgotten
        lives = newest["running"] and newest["status"] is None
        if self.state is State.STARTING and role == "main" and lives and self.instance is not None:
            if self.instance.ready_after_s is None:
                self.readiness.begin()
            else:
                self.became_ready()
        elif self.state is not State.STARTING:
            self.readiness.cancel()
        if self.state is State.READY:
            self.health.begin()
        self.notifications.take_over(was.get("notify") or {})
        self.idleness.follow()

    def _adopt_main(self, row: dict[str, Any], log: int | None) -> None:
        """Of two the later one is the main process, which the first has named."""
        origin = self.instance
        if origin is not None and origin.reader is not None:
            self.close_reader(origin.reader)  # both have the same
        self.instance = self.adopt_instance(row, log)
        self.supervisor.instances[row["id"]] = self
        if origin is not None:
            self.instance.origin = origin.id, origin.pid
        if "main" in row["tag"] and row["status"] is None:
            started = row["tag"]["main"]
            pidfd = MainProcess.find(row["pid"], started)
            if pidfd is not None:
                self._take_main(pidfd, started)
            else:
                number, pid = row["id"], row["pid"]
                self.supervisor.keeper.send("disown", id=number)
                self.supervisor.later(lambda: self.supervisor.exited(number, pid, UNKNOWN_STATUS))
        self.main_pid = row["pid"]
        if row["running"]:
            self._arm_runtime()

    def adopt_instance(self, row: dict[str, Any], log: int | None) -> Instance:
        """A row of the keeper's table."""
        found = Instance(row["id"], row["pid"], row["started"], None, running=row["running"])
        if log is not None:
            found.reader = reader = OutputReader(log, self.log, self.name, row["pid"])
            if row["running"]:  # otherwise its start is still to be told
                self.supervisor.watch.add(reader.fileno(), lambda _: self._output(reader))
        return found

    def close(self, *, remove_paths: bool = True) -> None:
        self._disarm()
        self._disarm_runtime()
        self.idleness.end()
        self.readiness.cancel()
        self.health.cancel()
        self.notifications.close()
        super().close(remove_paths=remove_paths)
