"""From a readable listener to a running process, on one page: per-connection services.

    readable -> a free place? -> a spawner? -> accept -> hand over -> (reports) started -> exited

accept, admission and hand-over are one synchronous stretch. A connection that is accepted and not yet handed over
dies with the manager, so everything that can be done before accept or after the hand-over is done there. A connection
is a row in a table; only a report from its spawner touches it again.
"""

from __future__ import annotations

import functools
import os
import random
import select
import socket
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from superd.core import messages
from superd.core.admission import Admission, Verdict, Window
from superd.core.lifecycle import Ending, State
from superd.core.plan import Program
from superd.core.spec import ServiceSpec
from superd.core.values import format_rate
from superd.manager.listeners import Listener
from superd.manager.logs import OutputReader
from superd.manager.service import Service, explain_start
from superd.manager.spawners import Pool, Spawner
from superd.system import sockets, tree

if TYPE_CHECKING:
    from superd.manager.supervisor import Supervisor

_PAUSE_S, _PAUSE_MAX_S = 0.1, 1.0
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


class ConnectionService(Service):
    """run = "per-connection"."""

    program: Program
    program_id: int

    def __init__(self, supervisor: Supervisor, spec: ServiceSpec) -> None:
        super().__init__(supervisor, spec)
        self.connections: dict[int, Connection] = {}
        self.admission = Admission(spec.limits)
        self.pool: Pool | None = None
        self.refused = 0
        self._spare: tuple[int, int] | None = None  # a log pipe that its connection did not need
        self._refused_delay_s = _REFUSED_DELAY_S
        self._held_back = False
        self._unread: list[Connection] = []  # started in this turn

    # -- wish and state

    def begin(self) -> None:
        if self.state is State.DISABLED or not self.wish_up:
            return
        if not self.listeners.open:
            return self.enter(State.BACKOFF)
        try:
            self.program = self.make_program(self.supervisor.own_environment)
        except (OSError, ValueError) as error:
            self.note = f"cannot start: {error}"
            self.error(self.note)
            self.enter(State.FAILED)
            return
        if self.pool is None:
            self.pool = self.supervisor.spawners.join(self, self.spec.context)
        self.pool.changed(self)
        self.enter(State.LISTENING)
        self._watch()

    def _listeners_changed(self) -> None:
        if self.wish_up and self.state in (State.LISTENING, State.BACKOFF):
            self.begin()

    def ask_start(self) -> None:
        self.enable()
        self.wish_up = True
        self.note = ""
        self.begin()

    def ask_stop(self) -> None:
        """Stop accepting and end what runs; clients who come now wait in the backlog (O8)."""
        self.wish_up = False
        self.unwatch()
        if self.state is not State.DISABLED:
            self._end()

    def ask_restart(self) -> None:
        """End what runs, and read the environment file anew; the listeners stay."""
        self.enable()
        self.wish_up = True
        self.unwatch()
        self._end()

    def _end(self) -> None:
        """End what is left of the service, then be what the wish says."""
        if self.state is State.STOPPING:
            return  # the wish decides when it has ended
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
        if self.admission.full and self.spec.limits.on_full == "wait":
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
            return self._refuse_one(listener, "full")
        if admission.rate is not None and (wait_s := admission.rate.wait_s(now)):
            return self._wait_for_rate(admission.rate, wait_s)
        pool = self.pool
        assert pool is not None
        spawner = pool.pick()
        if spawner is None:
            return self.unwatch()  # until spawner_available
        if self.program_id not in spawner.programs:
            pool.register(spawner, self)
        number = self.supervisor.next_connection()
        try:
            pipe = self._spare or (os.pipe2(os.O_CLOEXEC) if self.program.logs else None)
            self._spare = pipe
        except OSError as error:
            return self._out_of(listener, error)
        head = messages.pack_go(number, self.program_id, 0 if pipe is None else messages.HAS_LOG)
        try:
            fd, raw = listener.socket._accept()  # type: ignore[attr-defined]  # without a socket object
        except OSError as error:
            return self._not_accepted(listener, error)
        # From here to the hand-over a killed manager loses this connection: nothing that can wait.
        host = _host(raw)
        peer, source = ("\0\0", "") if host == "" else (f"{host}\0{raw[1]}\0", str(host))
        if admission.limits_sources:
            source = _source(fd, source)
        verdict = admission.admit(source, now)
        if verdict is not Verdict.ADMITTED:
            return self._refuse(fd, raw, verdict.value)
        order = head + f"{peer}{admission.sources[source]}".encode() + listener.local
        try:
            spawner.send(order, (fd,) if pipe is None else (fd, pipe[1], pipe[0]))
        except OSError as error:  # no fds or no memory to queue it: this client is lost, the next ones wait
            admission.release(source)
            os.close(fd)
            return self._out_of(listener, error)
        # Handed over.
        spawner.pending += 1
        self.supervisor.spawners.connections[number] = (self, spawner)
        if spawner.idle is not None:
            spawner.idle.cancel()
            spawner.idle = None
        text = _unix_peer_text(fd) if host == "" else _peer_text(host, raw)
        log_fd = None
        if pipe is not None:
            self._spare = None
            os.close(pipe[1])
            log_fd = pipe[0]
        os.close(fd)  # ours: the client sees EOF when the process closes its own (E3)
        self.connections[number] = Connection(
            number, messages.format_connection(number), text, source, spawner, now, log_fd
        )
        listener.episode = False
        listener.pause_s = _PAUSE_S

    def _wait_for_rate(self, window: Window, wait_s: float) -> None:
        """Stop accepting until the window has room; clients wait in the backlog, and nobody has to do anything."""
        self.unwatch()
        if not self.note:
            self.note = f"waiting: rate {format_rate(window.rate)}, room in {wait_s:.1f} s"
            self.error(self.note, level="warning")

        def resume() -> None:
            self.note = ""
            self._watch()

        self.supervisor.timers.after(wait_s, resume)

    def _not_accepted(self, listener: Listener, error: OSError) -> None:
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

    def _refuse_one(self, listener: Listener, why: str) -> None:
        try:
            fd, raw = listener.socket._accept()  # type: ignore[attr-defined]
        except OSError as error:
            return self._not_accepted(listener, error)
        self._refuse(fd, raw, why)

    def _refuse(self, fd: int, raw: Any, why: str) -> None:
        """Tell the client, if there is something to tell, and close. Nothing of it stays (B6)."""
        self.refused += 1
        host = _host(raw)
        text = _unix_peer_text(fd) if host == "" else _peer_text(host, raw)
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

    # -- what spawners say

    def spawner_available(self) -> None:
        if self.state is State.LISTENING and not self._held_back:
            self.note = ""
            self._watch()

    def context_refused(self, reason: str) -> None:
        """The execution context cannot be entered: nothing is started, and least of all outside of it (E9)."""
        self.unwatch()
        self._held_back = True
        self.note = f"cannot enter its context: {reason}"
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
        self._refused_delay_s = _REFUSED_DELAY_S
        self.log.record("start", service=self.name, connection=row.name, pid=pid, peer=row.peer)
        if self.state is State.STOPPING:  # it was on its way when the others were told
            self._tell(row, self.spec.stop_signal)
        # The pipe is read from the next turn on: a process that is done by then never costs an epoll entry.
        if row.log_fd is not None:
            if not self._unread:
                self.supervisor.later(self._read_logs)
            self._unread.append(row)

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
        self.ended(Ending(failure=reason))
        if row.log_fd is not None:
            os.close(row.log_fd)
            row.log_fd = None
        self._release(row)

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
        if status:
            self.ended(ending)
        self._release(row)

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
            if self.admission.taken == self.spec.limits.max_connections - 1:
                self._watch()
        if not self.connections:
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

    def _tell(self, row: Connection, signo: int) -> None:
        group = self.spec.kill_mode != "process"
        if row.spawner is not None:
            row.spawner.send(messages.pack_signal(row.id, signo, group=group))
        else:
            self.supervisor.keeper.send("signal", id=row.id, signo=signo, group=group)

    def busy(self) -> bool:
        return bool(self.connections)

    def close(self, *, remove_paths: bool = True) -> None:
        if self.pool is not None:
            self.pool.leave(self)
            self.pool = None
        if self._spare is not None:
            os.close(self._spare[0])
            os.close(self._spare[1])
            self._spare = None
        super().close(remove_paths=remove_paths)


def _reason(error: OSError) -> str:
    return (error.strerror or str(error)).lower()


def _host(raw: Any) -> str | int:
    """The peer's address from accept(2): a vsock CID is a number, a UNIX client has "". An IPv4 client of a dual-stack
    listener is an IPv4 client (A8)."""
    host: str | int = raw[0] if type(raw) is tuple and raw else ""
    if type(host) is str and host.startswith("::ffff:") and "." in host:
        return host[7:]
    return host


def _peer_text(host: str | int, raw: Any) -> str:
    if isinstance(host, int):
        return f"vsock:{host}:{raw[1]}"
    return f"[{host}]:{raw[1]}" if ":" in host else f"{host}:{raw[1]}"


def _unix_peer_text(fd: int) -> str:
    try:
        pid, uid, _ = sockets.peer_credentials(fd)
    except OSError:
        return "unix"
    return f"pid {pid} uid {uid}"


def _source(fd: int, host: str) -> str:
    """What is counted as one source: an IPv4 address, an IPv6 /64, a UNIX uid (B3)."""
    return _source_of(host, "" if host else _unix_peer_text(fd))


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
