"""From a readable listener to a running process, on one page: per-connection services.

    readable -> a free place? -> a spawner? -> accept -> hand over -> (reports) started -> exited

accept, admission and hand-over are one synchronous stretch. A connection that is accepted and not yet handed over
dies with the manager, so everything that can be done before accept or after the hand-over is done there. A connection
is a row in a table; only a report from its spawner touches it again.
"""

from __future__ import annotations

import contextlib
import functools
import os
import random
import select
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from errno import ENOENT
from typing import TYPE_CHECKING, Any

from superd.core import messages
from superd.core.admission import Admission, Verdict
from superd.core.lifecycle import Ending, State
from superd.core.plan import Program
from superd.core.spec import ServiceSpec
from superd.core.values import format_duration
from superd.manager.gate import NO_RULES, Gate, Held, rules_of
from superd.manager.listeners import Listener
from superd.manager.logs import OutputReader
from superd.manager.service import Service, explain_start
from superd.manager.spawners import Pool, Spawner
from superd.manager.watch import Timer
from superd.system import peers, sockets, tree

if TYPE_CHECKING:
    import trio

    from superd.manager.supervisor import Supervisor

Start = tuple[Spawner | None, int, tuple[int, int] | None, bytes]  # spawner, connection, log pipe, head of the order

NOT_EXECUTABLE, NOT_FOUND = 126, 127  # exit statuses, as shells have them
_PAUSE_S, _PAUSE_MAX_S = 0.1, 1.0
_SECOND_LOOK_S, _SECOND_LOOKS = 0.05, 64  # and how many clients of a service wait for one
_TOLD_S = 2.0  # after a take-over spawners have told of their connections by then
_REFUSED_DELAY_S, _REFUSED_DELAY_MAX_S = 0.1, 30.0


@dataclass(slots=True, eq=False)
class Connection:
    """One connection and its process. `peer` is for people, `source` is what is counted."""

    id: int
    name: str  # the id as people see it
    peer: str
    source: str
    spawner: Spawner | None  # None: it is the keeper's child now
    started: float
    log_fd: int | None
    pid: int = 0
    reader: OutputReader | None = None
    overdue: bool = False  # max_runtime has passed


class ConnectionService(Service):
    """run = "per-connection"."""

    __slots__ = (
        "_held_back", "_overlapped", "_refused_delay_s", "_refused_note", "_runtime", "_second_looks", "_spare",
        "_unread", "admission", "carried", "connections", "gate", "lingering", "pool", "program", "program_id",
        "refused",
    )  # fmt: skip

    program: Program
    program_id: int

    def __init__(self, supervisor: Supervisor, spec: ServiceSpec) -> None:
        super().__init__(supervisor, spec)
        self.connections: dict[int, Connection] = {}
        self.admission = Admission(spec.limits)
        self.carried: dict[int, trio.Event] = {}  # connections with TLS, until all of their bytes have been carried
        self.lingering = 0  # of these, whose process has gone
        self.gate = self._make_gate()
        self.pool: Pool | None = None
        self.refused = 0
        self._spare: tuple[int, int] | None = None  # a log pipe that its connection did not need
        self._refused_delay_s = _REFUSED_DELAY_S
        self._held_back = False
        self._second_looks = 0
        self._refused_note = ""
        self._unread: list[Connection] = []  # started in this turn
        self._runtime: Timer | None = None
        self._overlapped: str | None = ""

    @property
    def acceptor(self) -> ConnectionService:
        return self

    # -- wish and state

    def begin(self) -> None:
        if self.draining and not self.wish_up:
            return self._go_on_draining()
        if self.state is State.DISABLED or not self.wish_up:
            return
        self.draining = False
        if not self.listeners.open:
            return self.enter(State.BACKOFF)
        try:
            program = self.make_program(self.supervisor.own_environment)
        except (OSError, ValueError) as error:
            self.note = f"cannot start: {error}"
            self.error(self.note)
            self.enter(State.FAILED)
            if self.spec.essential:
                self.supervisor.essential_ended(self, Ending(failure=self.note))
            return
        if self.pool is None:
            self.pool = self.supervisor.spawners.join(self, self.spec.context)
        elif program != self.program:
            self.pool.changed(self)
            if self.spec.context.handler is not None and any(member.entered for member in self.pool.members):
                return self._renew(self.pool)  # what a module sees while it is imported has changed
        self.program = program
        if self.spec.context.handler is not None:
            self.pool.workers = self.spec.workers
            self.pool.keep_ready()
        self.enter(State.LISTENING)
        self._watch()

    def apply(self, spec: ServiceSpec) -> None:
        """Live connections go on with what they were given; the next ones get what `spec` says."""
        was, self.spec = self.spec, spec
        self.admission.change(spec.limits)
        if rules_of(spec) != rules_of(was):
            gate, self.gate = self.gate, self._make_gate()
            if gate is not None and gate.clients:
                self.gate = self.gate or Gate(self)
            if gate is not None and self.gate is not None:
                self.gate.follow(gate)
        if spec.limits.max_runtime_s != was.limits.max_runtime_s:
            self._restart_runtime()
        if spec.cgroup != was.cgroup:
            self.change_limits()
        if self.pool is not None and spec.context != was.context:
            self.pool.leave(self)
            self.pool = None
        self._held_back = False
        renewing = self.state is State.STARTING and self.pool is None  # the pool that we have left will not tell
        if renewing or self.state in (State.LISTENING, State.BACKOFF, State.FAILED):
            self.note = ""
            self.unwatch()
            self.begin()

    def _listeners_changed(self) -> None:
        if self.wish_up and self.state in (State.LISTENING, State.BACKOFF):
            self.begin()
            self.wake()

    def go_on(self) -> None:
        self._watch()

    def ask_start(self) -> None:
        self.enable()
        self.wish_up = True
        self.note = ""
        self.begin()

    def ask_stop(self) -> None:
        """Stop accepting and end what runs; clients who come now wait in the backlog (O8)."""
        self.wish_up = False
        self.unwatch()
        if self.gate is not None:
            self.gate.close()  # they have no process that could be told
        if self.state is not State.DISABLED:
            self._end()

    def ask_drain(self) -> None:
        self.wish_up = False
        self.unwatch()
        if self.state is State.LISTENING:
            self.draining = True
            self.enter(State.STOPPING)
            self.look_whether_drained()
        elif not self.draining:
            self.ask_stop()

    def look_whether_drained(self) -> None:
        """The last client has gone, also of those that have been accepted and have no process yet."""
        if self.draining and not self.connections and not self.has_guests():
            self._end()

    def _go_on_draining(self) -> None:
        """As an earlier manager had begun; its spawners will tell who is left."""
        self.enter(State.STOPPING)
        try:
            self.program = self.make_program(self.supervisor.own_environment)
        except (OSError, ValueError):
            return self._end()  # nobody can tell whose its connections are
        self.pool = self.supervisor.spawners.join(self, self.spec.context)
        self.supervisor.timers.after(_TOLD_S, self.look_whether_drained)

    def ask_restart(self) -> None:
        """End what runs, and read the environment file anew; the listeners stay. A handler is imported anew, and its
        connections go on."""
        self.enable()
        self.wish_up = True
        self.unwatch()
        if self.spec.context.handler is not None and self.state is State.LISTENING and self.pool is not None:
            self._renew(self.pool)
        else:
            self._end()

    def ask_overlap(self) -> None:
        """Whoever comes gets a process of the program and of the context as they are now; live connections go on."""
        if self.state is State.STARTING:
            return  # it is at it
        self._overlapped = ""
        if self.state is not State.LISTENING:
            self.supervisor.dependencies.restart(self)
        elif self.pool is None:
            pass  # it is superd itself
        elif any(member.entered for member in self.pool.members):
            self._overlapped = None
            self._renew(self.pool)
        else:
            self.begin()

    def overlapped(self) -> str | None:
        return self._overlapped

    def _renew(self, pool: Pool) -> None:
        """Clients wait until the handler's code is there as it is now, with the environment as it is now."""
        self.unwatch()
        self.enter(State.STARTING)
        with contextlib.suppress(OSError, ValueError):  # begin() says why
            self.program = self.make_program(self.supervisor.own_environment)
        pool.renew()

    def renewed(self, failure: str) -> None:
        """failure: why the old code goes on."""
        self.note = f"the old code goes on: {failure}" if failure else ""
        self._overlapped = self.note
        if failure:
            self.error(self.note)
        if self.state is State.STARTING:
            self.begin()

    def imported(self, printed: int, pid: int) -> None:
        """printed: a file with what the handler's module has written meanwhile, which is ours now."""
        reader = OutputReader(printed, self.log, self.name, pid)
        reader.drain()
        reader.close()

    def ask_reload(self) -> bool:
        for row in self.connections.values():
            self._tell(row, self.spec.reload_signal, group=False)
        return bool(self.connections)

    def _end(self) -> None:
        """End what is left of the service, then be what the wish says."""
        if self.state is State.STOPPING and not self.draining:
            return  # the wish decides when it has ended
        self.draining = False
        if self.connections or (self.spec.kill_mode == "tree" and self.supervisor.processes.of(self)):
            self.enter(State.STOPPING)
            self.supervisor.end_service(self, self._ended_all)
        else:
            self._ended_all()

    def _ended_all(self) -> None:
        if self.wish_up:
            self.begin()
        else:
            self.enter(State.STOPPED)

    # -- the listeners

    def _watch(self) -> None:
        if self.state is not State.LISTENING or self._held_back:
            return
        if self.gate is not None:
            self.gate.flush()
        if self.admission.full and self.spec.limits.on_full == "wait":
            return
        if self.gate is not None and not self.gate.has_room():
            return
        for listener in self.listeners.open:
            if not listener.watched:
                listener.socket.setblocking(False)  # ours alone: a service gets connections, not this (A16)
                self.listeners.watch_one(listener, functools.partial(self._readable, listener))

    def _readable(self, listener: Listener, events: int) -> None:
        """Accept one connection and hand it to a spawner."""
        admission = self.admission
        now = time.monotonic()
        if admission.full:
            if admission.limits.on_full == "wait":
                return self.unwatch()  # clients wait in the kernel's queue until a place is free
            return self.refuse_one(listener, "full")
        if self._must_wait(now):
            return
        if self.gate is not None:
            return self.gate.accept(listener)
        start = self._prepare_start(listener)
        if start is None:
            return
        try:
            fd, raw = listener.accept()
        except OSError as error:
            return self.not_accepted(listener, error)
        # From here to the hand-over a killed manager loses this connection: nothing that can wait.
        host = host_of(raw)
        source = self.source_of(fd, host)
        verdict = admission.admit(source, now)
        if verdict is not Verdict.ADMITTED:
            return self.look_again(verdict, fd, raw, lambda: self._admit_after_all(listener, fd, raw, host, source))
        self._hand_over(listener, start, fd, raw, host, source, now, listener.local)
        if self.supervisor.once:
            self._hold_back()

    def look_again(self, verdict: Verdict, fd: int, raw: Any, admit: Callable[[], bool]) -> None:
        """Refuse a client, but not one whose source is full because the news of an end is still on its way: a client
        sees the end of a connection as soon as the process has gone, and may be back before its spawner has reaped it.
        """
        if verdict is not Verdict.SOURCE_FULL or self._second_looks >= _SECOND_LOOKS:
            return self.refuse(fd, raw, verdict.value)
        self._second_looks += 1

        def again() -> None:
            self._second_looks -= 1
            if self.state is not State.LISTENING or self._held_back or not admit():
                self.refuse(fd, raw, verdict.value)

        self.supervisor.timers.after(_SECOND_LOOK_S, again)

    def _admit_after_all(self, listener: Listener, fd: int, raw: Any, host: str | int, source: str) -> bool:
        now = time.monotonic()
        start = None if self.admission.full else self._prepare_start(listener)
        if start is None or self.admission.admit(source, now) is not Verdict.ADMITTED:
            return False
        self._hand_over(listener, start, fd, raw, host, source, now, listener.local)
        return True

    def start_held(self, held: Held) -> bool:
        """Start the process of a client that the gate has let through; False: there is no place for it yet.

        Its source is counted already; the fd is the service's from here on.
        """
        now = time.monotonic()
        if self.state is not State.LISTENING and not self.draining:
            return False
        if self._held_back or self.admission.full or self._must_wait(now):
            return False
        start = self._prepare_start(held.listener)
        if start is None:
            return False
        assert held.source is not None
        fd, local = held.fd, held.local
        if held.session is not None:
            try:
                fd, local = held.session.open(held)
            except OSError as error:
                self._out_of(held.listener, error)
                return False
        self.admission.take(now)
        self._hand_over(held.listener, start, fd, held.raw, held.host, held.source, now, local)
        if held.session is not None:
            held.session.begin(self, start[1])
        if self.supervisor.once:
            self._hold_back()
        return True

    def _hold_back(self) -> None:
        self._held_back = True
        self.unwatch()

    def served(self, connection: int, status: int) -> None:
        """A connection is done with, and this is how it went: for `superd run --once`."""
        carried = self.carried.get(connection)
        if carried is None:
            return self.supervisor.served(status)

        async def wait() -> None:
            await carried.wait()
            self.supervisor.served(status)

        self.supervisor.start_task(wait)

    def _prepare_start(self, listener: Listener) -> Start | None:
        """All that a start needs but the connection; None: not now, and then there is a reason to try again."""
        pool = self.pool
        assert pool is not None
        if pool.files and pool.code_changed(time.monotonic()):
            self._renew(pool)
            return None
        if not self.supervisor.dependencies.ready_for(self):
            self.unwatch()  # clients wait in the kernel's queue for what it requires
            return None
        spawner = pool.pick(self)
        if spawner is None:
            self.unwatch()  # until spawner_available
            return None
        if self.program_id not in spawner.programs:
            pool.register(spawner, self)
        number = self.supervisor.next_connection()
        try:
            pipe = self._spare or (os.pipe2(os.O_CLOEXEC) if self.program.logs else None)
            self._spare = pipe
        except OSError as error:
            self._out_of(listener, error)
            return None
        return spawner, number, pipe, messages.pack_go(number, self.program_id, 0 if pipe is None else messages.HAS_LOG)

    def _hand_over(
        self, listener: Listener, start: Start, fd: int, raw: Any, host: str | int, source: str, now: float,
        local: bytes,
    ) -> None:  # fmt: skip
        """local: our end of the connection, as Listener has it, and what TLS adds to that."""
        admission = self.admission
        spawner, number, pipe, head = start
        assert spawner is not None
        peer = "\0\0" if host == "" else f"{host}\0{raw[1]}\0"
        order = head + f"{peer}{admission.sources[source]}".encode() + local
        given = (fd,) if pipe is None else (fd, pipe[1])
        try:
            sent = spawner.hand_over(order, given if pipe is None else (*given, pipe[0]), given)
        except OSError as error:  # no memory: this client is lost, the next ones wait
            admission.release(source)
            os.close(fd)
            return self._out_of(listener, error)
        text = peer_text(fd, host, raw)
        if sent:  # and closed here: the client sees EOF when the process closes its own (E3)
            for one in given:
                os.close(one)
        name = messages.format_connection(number)
        if self.log.debugs:
            where = str(listener.address)
            self.log.record("connection", level="debug", service=self.name, connection=name, peer=text, address=where)
        spawner.pending += 1
        self.supervisor.spawners.connections[number] = (self, spawner)
        if spawner.idle is not None:
            spawner.idle.cancel()
            spawner.idle = None
        log_fd = None
        if pipe is not None:
            self._spare = None
            log_fd = pipe[0]
        self.connections[number] = Connection(number, name, text, source, spawner, now, log_fd)
        listener.episode = False
        listener.pause_s = _PAUSE_S

    def _must_wait(self, now: float) -> bool:
        """Stop accepting while a limit of the whole service holds; clients wait, and nobody has to do anything."""
        wait_s, why = self.wanted_wait(self.admission.rate, now)
        if not why:
            return False
        self.unwatch()
        most = max(self.admission.sources, key=self.admission.sources.__getitem__, default="")
        self.wait(wait_s, why + (f"; most from {most}" if most and len(self.admission.sources) > 1 else ""))
        return True

    def not_accepted(self, listener: Listener, error: OSError) -> None:
        if isinstance(error, BlockingIOError):
            return
        if error.errno in sockets.RESOURCE_ERRNOS:
            return self._out_of(listener, error)
        if sockets.listener_is_dead(listener.fd):
            return self.listeners.rebind(listener, "it was shut down")
        if error.errno not in sockets.IGNORABLE_ACCEPT_ERRNOS:
            self._out_of(listener, error)

    def _out_of(self, listener: Listener, error: OSError) -> None:
        """No fds or memory: leave the clients in the queue, say so once, try again soon (A1-A3)."""
        if not listener.episode:
            listener.episode = True
            self.error(
                f"cannot accept on {listener.address}: {_reason(error)}; clients wait, trying again", level="warning"
            )
        self.listeners.pause(listener, listener.pause_s, self._watch)
        listener.pause_s = min(listener.pause_s * 2, _PAUSE_MAX_S)

    def refuse_one(self, listener: Listener, why: str) -> None:
        try:
            fd, raw = listener.accept()
        except OSError as error:
            return self.not_accepted(listener, error)
        self.refuse(fd, raw, why)

    def refuse(self, fd: int, raw: Any, why: str) -> None:
        """Tell the client, if there is something to tell, and close. Nothing of it stays (B6)."""
        self.refused += 1
        self.counts.add_refusal(why)
        self.supervisor.meter.note()
        text = peer_text(fd, host_of(raw), raw)
        with socket.socket(fileno=fd) as conn:
            if self.spec.limits.refuse_message:
                try:
                    conn.send(self.spec.limits.refuse_message, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
                    conn.shutdown(socket.SHUT_WR)
                except OSError:
                    pass  # it has gone
        self.log.error_limited(
            (self.name, "refused", why), why, level="notice", event="refused", service=self.name, peer=text
        )

    def source_of(self, fd: int, host: str | int) -> str:
        """What is counted as one source: an IPv4 address, an IPv6 /64, a UNIX uid (B3). Exact where it matters."""
        source = str(host)
        if not self.admission.limits_sources:
            return source
        return _source_of(source, "" if source else _unix_peer_text(fd))

    def gate_has_room(self) -> None:
        self._watch()

    def _make_gate(self) -> Gate | None:
        return None if rules_of(self.spec) == NO_RULES else Gate(self)

    # -- what spawners say

    def spawner_available(self) -> None:
        if self.state is State.LISTENING and not self._held_back:
            if self.note == self._refused_note:
                self.note = ""
            self._watch()

    def context_refused(self, reason: str) -> None:
        """The execution context cannot be entered: nothing is started, and least of all outside of it (E9)."""
        if self.state is State.STARTING:  # it was to be renewed, and there is nothing old that could go on
            self.enter(State.LISTENING)
            self._overlapped = reason
        self._hold_back()
        self.note = reason if self.spec.context.handler else f"cannot enter its context: {reason}"
        self._refused_note = self.note
        self.error(f"{self.note}; clients wait, trying again in {self._refused_delay_s:.1f} s")
        self.supervisor.timers.after(self._refused_delay_s * random.uniform(0.9, 1.1), self._try_context)
        self._refused_delay_s = min(self._refused_delay_s * 2, _REFUSED_DELAY_MAX_S)
        self.announce()

    def _try_context(self) -> None:
        self._held_back = False
        self._watch()

    def started(self, connection: int, pid: int) -> None:
        row = self.connections[connection]
        row.pid = pid
        self.total += 1
        self.counts.add_start(time.monotonic() - row.started)
        self.supervisor.meter.note()
        self._refused_delay_s = _REFUSED_DELAY_S
        self.log.record("start", service=self.name, connection=row.name, pid=pid, peer=row.peer)
        if self.state is State.STOPPING and not self.draining:  # it was on its way when the others were told
            self._tell(row, self.spec.stop_signal)
        if self.spec.limits.max_runtime_s is not None and self._runtime is None:
            self._limit_runtime(self.spec.limits.max_runtime_s)
        # The pipe is read from the next turn on: a process that is done by then never costs an epoll entry.
        if row.log_fd is not None:
            if not self._unread:
                self.supervisor.later(self._read_logs)
            self._unread.append(row)

    def _restart_runtime(self) -> None:
        """Another limit holds, for those that live as well."""
        if self._runtime is not None:
            self._runtime.cancel()
            self._runtime = None
        limit_s = self.spec.limits.max_runtime_s
        if limit_s is not None and self.connections:
            self._runtime = self.supervisor.timers.after(0.0, functools.partial(self._limit_runtime, limit_s))

    def _limit_runtime(self, limit_s: float) -> None:
        """Stop what has had its time. One timer for all, due with the oldest: one for each connection would stay in the
        heap for as long as the limit is."""
        now = time.monotonic()
        self._runtime = None
        rest = []
        for row in self.connections.values():
            left_s = row.started + limit_s - now
            if left_s > 0:
                rest.append(left_s)
            elif row.pid and not row.overdue:
                row.overdue = True
                self.error(
                    f"runs longer than max_runtime = {format_duration(limit_s)}; stopping it",
                    level="warning", connection=row.name, peer=row.peer, pid=row.pid,
                )  # fmt: skip
                self._tell(row, self.spec.stop_signal)
                if self.spec.stop_timeout_s is not None:
                    self.supervisor.timers.after(self.spec.stop_timeout_s, functools.partial(self._kill_overdue, row))
        if rest:
            self._runtime = self.supervisor.timers.after(min(rest), lambda: self._limit_runtime(limit_s))

    def _kill_overdue(self, row: Connection) -> None:
        if self.connections.get(row.id) is row:
            text = f"did not stop within {self.spec.stop_timeout_s:g} s; killing it"
            self.error(text, level="warning", connection=row.name, peer=row.peer, pid=row.pid)
            self._tell(row, signal.SIGKILL)

    def _read_logs(self) -> None:
        rows, self._unread = self._unread, []
        for row in rows:
            if row.log_fd is not None:
                self._open_reader(row)

    def _open_reader(self, row: Connection) -> OutputReader:
        assert row.log_fd is not None
        reader = row.reader = OutputReader(row.log_fd, self.log, self.name, row.pid, row.name)
        row.log_fd = None
        self.supervisor.watch.add(reader.fileno(), lambda _: None if reader.readable() else self.close_reader(reader))
        return reader

    def failed(self, connection: int, stage: str, errno: int) -> None:
        row = self.connections[connection]
        reason = explain_start(self.spec, stage, errno)
        if stage == "spawner":
            reason = "the spawner that was to start it was killed"
        self.error(f"{reason}; client closed", connection=row.name, peer=row.peer)
        self.ended(ending := Ending(failure=reason))
        self.count_exit(ending)
        if row.log_fd is not None:
            os.close(row.log_fd)
            row.log_fd = None
        self._release(row)
        if self.supervisor.once:
            self.served(connection, NOT_FOUND if errno == ENOENT else NOT_EXECUTABLE if stage == "exec" else 1)

    def exited(self, connection: int, pid: int, status: int) -> None:
        row = self.connections[connection]
        if row.log_fd is not None:
            self._last_words(row)
        elif row.reader is not None and row.reader.fileno() >= 0:
            self.finish_reader(row.reader)
        ending = self.record_exit(
            pid or row.pid, status, time.monotonic() - row.started,
            connection=row.name, peer=row.peer,
        )  # fmt: skip
        if row.overdue:
            ending = ending._replace(cause="max_runtime", result="timeout")
        self.count_exit(ending)
        self.counts.add_life(ending.lived_s)
        if status or row.overdue:
            self.ended(ending)
        self._release(row)
        if self.supervisor.once:
            self.served(connection, ending.exit_status(()))

    def _last_words(self, row: Connection) -> None:
        """Of a process that ended before its pipe was watched: usually there are none, and that is one read."""
        assert row.log_fd is not None
        if _is_at_end(row.log_fd):
            os.close(row.log_fd)
            row.log_fd = None
            return
        self.finish_reader(self._open_reader(row))

    def _release(self, row: Connection) -> None:
        """The place is free, whatever became of the process (A6)."""
        del self.connections[row.id]
        self.admission.release(row.source)
        if self.state is State.LISTENING:
            if self.admission.taken + 1 == self.spec.limits.max_connections:
                self._watch()
        if self.draining and self.gate is not None:
            self.gate.flush()
        if not self.connections:
            self.look_whether_drained()
            self.wake()

    def orphaned(self, connection: int) -> None:
        """Its spawner was killed: the process is the keeper's child now, which will tell its end."""
        row = self.connections[connection]
        row.spawner = None
        tag = {"service": self.name, "id": row.id, "peer": row.peer, "source": row.source}
        fds = [row.log_fd] if row.log_fd is not None else [row.reader.fileno()] if row.reader and row.reader.fd else []
        self.supervisor.instances[row.id] = self
        self.supervisor.keeper.send("adopt", fds, id=row.id, pid=row.pid, tag=tag, started=row.started)

    def unanswered(self, connection: int) -> None:
        """Its spawner was killed with it in hand: either the process runs and nobody has said so, or it never will."""
        wanted = self.connections[connection].name
        for row in self.supervisor.processes.look_again(self):
            if tree.environment_value(row.pid, "SUPERD_CONNECTION") == wanted:
                self.started(connection, row.pid)
                return self.orphaned(connection)
        self.failed(connection, "spawner", 0)

    def process_exited(self, pid: int, status: int, number: int) -> None:
        if number in self.connections:
            self.exited(number, pid, status)

    # -- after a manager's death

    def adopt(self, spawner: Spawner | None, row: list[Any], log: int | None) -> None:
        """A connection of an earlier manager: [connection, pid, service, peer, started, has log]."""
        number, pid, _, peer, started, _ = row
        source = peer.rpartition(":")[0].strip("[]")
        if self.admission.limits_sources:
            source = _source_of(source, peer)
        self.admission.restore(source)
        adopted = Connection(number, messages.format_connection(number), peer, source, spawner, started, log, pid)
        self.connections[number] = adopted
        if self.spec.limits.max_runtime_s is not None and self._runtime is None:
            self._runtime = self.supervisor.timers.after(
                0.0, functools.partial(self._limit_runtime, self.spec.limits.max_runtime_s)
            )
        if log is not None:
            self._open_reader(adopted)

    def adopt_stray(self, pid: int) -> None:
        """A process that carries our name; ours if it is the first of a connection that we do not know."""
        if pid in self.mains():
            return
        number = messages.parse_connection(tree.environment_value(pid, "SUPERD_CONNECTION") or "")
        if number is None or number in self.connections:
            return  # a descendant that has left its session
        self.adopt(None, [number, pid, self.name, "unknown", time.monotonic(), False], None)
        self.orphaned(number)

    # -- supervisor's questions

    def mains(self) -> list[int]:
        return [row.pid for row in self.connections.values() if row.pid]

    def count(self) -> int:
        return len(self.connections)  # those that are being started too: they have a place

    def tell_mains(self, signo: int) -> None:
        for row in self.connections.values():
            self._tell(row, signo)

    def _tell(self, row: Connection, signo: int, *, group: bool = True) -> None:
        group = group and self.spec.kill_mode != "process"
        if row.spawner is not None:
            row.spawner.send(messages.pack_signal(row.id, signo, group=group))
        else:
            self.supervisor.keeper.send("signal", id=row.id, signo=signo, group=group)

    def busy(self) -> bool:
        return bool(self.connections)

    def has_guests(self) -> bool:
        return (self.gate is not None and bool(self.gate.clients)) or self.lingering > 0

    def close(self, *, remove_paths: bool = True) -> None:
        if self.pool is not None:
            self.pool.leave(self)
            self.pool = None
        if self.gate is not None:
            self.gate.close()
        if self._spare is not None:
            os.close(self._spare[0])
            os.close(self._spare[1])
            self._spare = None
        super().close(remove_paths=remove_paths)


def _reason(error: OSError) -> str:
    return (error.strerror or str(error)).lower()


def host_of(raw: Any) -> str | int:
    """The peer's address from accept(2): a vsock CID is a number, a UNIX client has "". An IPv4 client of a dual-stack
    listener is an IPv4 client (A8)."""
    host: str | int = raw[0] if type(raw) is tuple and raw else ""
    if type(host) is str and host.startswith("::ffff:") and "." in host:
        return host[7:]
    return host


def peer_text(fd: int, host: str | int, raw: Any) -> str:
    """The peer for people. host: as host_of() has it."""
    if host == "":
        return _unix_peer_text(fd)
    if isinstance(host, int):
        return f"vsock:{host}:{raw[1]}"
    return f"[{host}]:{raw[1]}" if ":" in host else f"{host}:{raw[1]}"


def local_of(fd: int) -> bytes:
    """As Listener.local; of a TCP connection."""
    with peers.Borrowed(fileno=fd) as client:
        host, port = peers.local_address(client)
    return f"\0{host}\0{port}".encode()


def _unix_peer_text(fd: int) -> str:
    try:
        pid, uid, _ = peers.credentials(fd)
    except OSError:
        return "unix"
    return f"pid {pid} uid {uid}"


def _source_of(host: str, peer: str) -> str:
    if not host:
        return peer.partition(" uid ")[2]
    if ":" not in host:
        return host
    network = socket.inet_pton(socket.AF_INET6, host.partition("%")[0])[:8]
    return socket.inet_ntop(socket.AF_INET6, network + bytes(8)) + "/64"


def _is_at_end(fd: int) -> bool:
    """Whether a pipe is empty and nobody can write to it any more."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    ready = poll.poll(0)
    return bool(ready) and ready[0][1] == select.POLLHUP
