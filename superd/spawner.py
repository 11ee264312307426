"""Role two: starts the processes of connections, in one execution context that it entered once, for good.

A connection costs one vfork and exec here and nothing else: identity, limits and directories were settled before
the first order. A user that the context runs as can kill this process and nothing more; the manager then asks
the keeper for another.

The spawner outlives managers. It keeps the read end of each child's log pipe so that a child never gets SIGPIPE
because a manager died, and hands them to the next one, which asks for them with "list".

Order of the loop: take orders, reap, report. Reports of starts wait two milliseconds for company: a service that
is done by then costs the manager one wake-up instead of two.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]
import contextlib
import dataclasses
import errno
import gc
import json
import os
import resource
import select
import signal
import socket
import sys
import time
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from superd import handler
from superd.core import messages, plan
from superd.core.messages import EXITED, FAILED, STAGES, STARTED, pack_record
from superd.core.plan import Program
from superd.core.spec import Context
from superd.system import cgroup, children, context, fdpass, peers, process

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from superd.handler import Environment, Handler, Served

_LINGER_MS = 2
_REPORTS_AT_ONCE, _REPORTS_PER_PACKET = 6, 64
_FORKS_AT_ONCE = 16
_TCP_FACTS = 5  # in an order whose listener has one address
_OF_EACH_CHILD = ("cpu", "as", "data", "stack", "fsize", "nofile")

Limit = tuple[str, int, int]


class _Child(NamedTuple):
    connection: int
    service: str
    peer: str | bytes  # for people; bytes: as the order had it
    started: float  # CLOCK_MONOTONIC
    log: int | None  # our copy of the read end

    def peer_text(self) -> str:
        return self.peer if isinstance(self.peer, str) else _ip_text(*self.peer.decode().split("\0")[:2])


@dataclasses.dataclass(slots=True)
class _Fork:
    """A handler's child that is not forked yet. fds: its connection, and the write end of its log pipe."""

    child: _Child
    fds: list[int]
    environment: tuple[dict[bytes, bytes], Any]
    steps: list[tuple[Callable[..., object], tuple[Any, ...]]]
    served: Served


class Spawner:
    """The loop. `channel` is the spawner's end; blocking, because a report must not be lost."""

    def __init__(
        self,
        channel: socket.socket,
        user_environment: dict[str, str],
        limits: list[Limit],
        served: Handler | None = None,
        environment: Environment | None = None,
        kept: list[int] | None = None,
        init: int = 0,
    ) -> None:
        """environment: the handler's. kept: fds that its children have as well. init: process 1 of its children's
        pid namespace."""
        self.init = init
        self.channel = channel
        self.handler = served
        self.kept = kept or []
        self.user_environment = user_environment
        self.limits = limits
        self.programs: dict[int, tuple[Program, dict[str, str], children.Launcher | None]] = {}
        self.children: dict[int, _Child] = {}
        self.pids: dict[int, int] = {}  # connection -> pid
        # Of the handler, whose context one service has alone.
        self.set_name: tuple[Callable[..., object], tuple[Any, ...]] = (int, ())  # gives a child its service's name
        self.environment = environment
        self.forks: list[_Fork] = []
        self.null = children.Null()
        self.reports: list[bytes] = []
        self.waiting: dict[int, list[tuple[bytes, list[int]]]] = {}  # orders for programs not known yet
        self.urgent = False  # something that is not to wait for company

    def run(self) -> NoReturn:
        # Blocked, not ignored: exec would pass on what is ignored, and each child gets an empty mask (E5, E6).
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGPIPE, signal.SIGXFSZ])
        ended = children.watch_for_ends()
        poll = select.poll()
        poll.register(self.channel, select.POLLIN)
        poll.register(ended, select.POLLIN)
        while True:
            # What is there already comes first: while there are orders, reports gather.
            ready = poll.poll(None if not self.reports else 0 if self.urgent else _LINGER_MS)
            for fd, _ in ready:
                if fd == ended:
                    os.read(ended, children.END_BYTES)
                    self._reap()
                else:
                    self._take_orders()
            if self.reports and (not ready or len(self.reports) >= _REPORTS_AT_ONCE):
                self._report()

    def _report(self) -> None:
        for i in range(0, len(self.reports), _REPORTS_PER_PACKET):
            self.channel.send(b"".join(self.reports[i : i + _REPORTS_PER_PACKET]), socket.MSG_NOSIGNAL)
        self.reports.clear()
        self.urgent = False

    def _reap(self) -> None:
        for pid, status in children.reap(self.children):
            child = self.children.pop(pid, None)
            if child is None:
                continue
            connection, _, _, _, log = child
            del self.pids[connection]
            if log is not None:
                os.close(log)
            self.reports.append(pack_record(EXITED, connection, pid, status))
            self.urgent = True

    def _take_orders(self) -> None:
        """What is there, but no more than some at once: children that have ended come soon as well."""
        self._take_order(0)
        if self.handler is not None:
            with contextlib.suppress(BlockingIOError):
                while len(self.forks) < _FORKS_AT_ONCE:
                    self._take_order(fdpass.DONTWAIT)
            self._fork_all()

    def _take_order(self, flags: int) -> None:
        """Raises BlockingIOError."""
        try:
            data, fds = fdpass.receive(self.channel, flags)
        except fdpass.CutMessage as error:
            if error.data[:1] == messages.GO:
                self._failed(messages.unpack_go(error.data)[0], "descriptors", error.errno or 0)
            return
        kind = data[:1]
        if kind == messages.GO:
            return self._go(data, fds)
        self._fork_all()
        if kind == messages.SIGNAL:
            connection, signo, group = messages.unpack_signal(data)
            pid = self.pids.get(connection)
            if pid is not None:
                with contextlib.suppress(PermissionError):  # it changed its uid: the manager sees to it
                    children.signal_child(pid, signo, group=group)
        elif not data:
            os._exit(0)  # keeper and manager are gone; the children go on by themselves
        else:
            self._take_text(messages.unpack(data))

    def _take_text(self, order: dict[str, Any]) -> None:
        if order["kind"] == "program":
            program = Program.from_json(order["program"])
            base = {**program.base_environment, **self.user_environment, **program.environment}
            self._forget(order["id"])
            # posix_spawn(3) can neither tell its child its pid nor limit it.
            plain = not (program.is_handler or program.names or self.limits)
            launcher = children.Launcher(program, base, self.null) if plain else None
            self.programs[order["id"]] = (program, base, launcher)
            if program.is_handler:
                self.set_name = process.name_setting(program.service)
                if self.environment is not None:
                    self.environment.change(base)
            for data, fds in self.waiting.pop(order["id"], []):
                self._go(data, fds)
        elif order["kind"] == "forget":
            self._forget(order["id"])
        elif order["kind"] == "list":
            self._list()
        elif order["kind"] == "sync":
            self._report()
            fdpass.send_waiting(self.channel, messages.pack("synced"))
        elif order["kind"] == "quit" and not self.children:
            os._exit(0)

    def _forget(self, number: int) -> None:
        known = self.programs.pop(number, None)
        if known is not None and known[2] is not None:
            known[2].close()

    def _list(self) -> None:
        """Every live child, as many to a packet as fds fit; then "listed"."""
        self._report()
        rows = list(self.children.items())
        for i in range(0, len(rows), fdpass.MAX_FDS):
            part = rows[i : i + fdpass.MAX_FDS]
            listed = [
                [child.connection, pid, child.service, child.peer_text(), child.started, child.log is not None]
                for pid, child in part
            ]  # fmt: skip
            fds = [child.log for _, child in part if child.log is not None]
            fdpass.send_waiting(self.channel, messages.pack("children", rows=listed), fds)
        facts = _facts(self.init, self.handler)
        fdpass.send_waiting(self.channel, messages.pack("listed", programs=list(self.programs), **facts))

    def _go(self, data: bytes, fds: list[int]) -> None:
        """Start one connection's process. fds: the connection, then write and read end of its log pipe."""
        connection, number, flags, peer = messages.unpack_go(data)
        if number not in self.programs:  # the spawner before us was killed; the manager is about to tell
            self.waiting.setdefault(number, []).append((data, fds))
            return
        log = log_reader = None
        if flags & messages.HAS_LOG:
            log_reader = fds.pop()
            log = fds.pop()
        stage, error, pid = "", 0, 0
        program, base, launcher = self.programs[number]
        text: str | bytes = peer
        began = time.monotonic()
        try:
            facts = peer.split(b"\0")
            if len(facts) == _TCP_FACTS and launcher is not None and len(peer) < children.VALUE_BYTES:
                ids = b"%d-%d" % messages.split_connection(connection), os.urandom(16).hex().encode()
                values = plan.tcp_values(facts, *ids)
                pid = launcher.start_tcp(values, fds[0], log)
            else:
                variables, text = connection_facts(fds[0], peer)
                variables["SUPERD_CONNECTION"] = messages.format_connection(connection)
                variables["INVOCATION_ID"] = os.urandom(16).hex()
                if launcher is not None:
                    pid = launcher.start(variables, fds[0], log)
                elif self.handler is not None:
                    child = _Child(connection, program.service, text, began, log_reader)
                    return self._fork_later(child, program, variables, fds, log)
                else:
                    pid, report = children.fork_exec(program, {**base, **variables}, fds, log, self._prepare)
                    failure = children.start_failure(report)
                    if failure is not None:
                        stage, error = failure.stage, failure.errno
        except children.StartError as failure:
            stage, error = failure.stage, failure.errno
        # Our copies: the client must see EOF as soon as the process has closed its own (E3).
        for fd in fds:
            os.close(fd)
        if log is not None:
            os.close(log)
        self._answer(_Child(connection, program.service, text, began, log_reader), pid, stage, error)

    def _answer(self, child: _Child, pid: int, stage: str, error: int) -> None:
        if pid and not stage:
            self.children[pid] = child
            self.pids[child.connection] = pid
            self.reports.append(pack_record(STARTED, child.connection, pid))
        else:
            self._failed(child.connection, stage, error)
            if child.log is not None:
                os.close(child.log)

    def _fork_later(
        self, child: _Child, program: Program, variables: dict[str, str], fds: list[int], log: int | None
    ) -> None:
        assert self.handler is not None and self.environment is not None
        try:
            served = self.handler.prepare(fds[0], variables, program.service)
        except OSError as error:
            raise children.StartError("descriptors", error.errno or 0) from None
        environment = self.environment.prepare(variables)
        steps = self._steps(program, fds[0], log)
        if log is not None:
            fds.append(log)
        self.forks.append(_Fork(child, fds, environment, steps, served))

    def _steps(
        self, program: Program, connection: int, log: int | None
    ) -> list[tuple[Callable[..., object], tuple[Any, ...]]]:
        """What a handler's child calls first, one after the other. To look something up costs it a page or two, so
        there is nothing left to look up."""
        steps: list[tuple[Callable[..., object], tuple[Any, ...]]] = [(os.setsid, ())]
        steps += children.placing(program, connection, log, self.null)
        first = 3
        for fd in sorted([*self.kept, connection]):
            steps.append((os.closerange, (first, fd)))
            first = fd + 1
        steps += [(os.closerange, (first, 1 << 20)), self.set_name]
        if program.stderr.kind == "file":  # which may be a FIFO, and wait: by now this has no fd of others any more
            steps.append((children.open_outputs, (program,)))
        steps += [(context.set_limit, limit) for limit in self.limits]
        # All else is as it was when the spawner began, or as the handler's module wants it. The signal module's own
        # function makes enumerations of the answer, which costs 35 pages.
        steps += [(_signal.pthread_sigmask, (signal.SIG_SETMASK, ())), (gc.enable, ())]
        return steps

    def _fork_all(self) -> None:
        """A child for each connection that is ready for one.

        All that can wait waits until the last has been forked: after each fork, a page that we are the first to write
        to costs a fault (190 pages until the next one, when each was forked, noted and reported by itself).
        """
        if not self.forks:
            return
        assert self.environment is not None
        pids = []
        for fork in self.forks:
            self.environment.enter(fork.environment)
            try:
                pid = os.fork()
            except OSError as error:
                pid = -(error.errno or errno.EAGAIN)
            if pid == 0:
                _become(fork.steps, fork.served)
            pids.append(pid)
            fdpass.close_all(fork.fds)  # the client must see EOF as soon as the process has ended (E3)
        for fork, pid in zip(self.forks, pids, strict=True):
            fork.served[0].detach()
            if pid > 0:
                self._answer(fork.child, pid, "", 0)
            else:
                self._answer(fork.child, 0, "fork", -pid)
        self.forks.clear()

    def _failed(self, connection: int, stage: str, error: int) -> None:
        self.reports.append(pack_record(FAILED, connection, 0, error, STAGES.index(stage)))
        self.urgent = True

    def _prepare(self) -> tuple[dict[str, str], int | None]:
        """In a forked child."""
        inode = process.pidfd_inode()
        process.reset_signals()
        try:
            for name, soft, hard in self.limits:
                context.set_limit(name, soft, hard)
        except context.ContextError as error:
            raise children.StartError(error.stage, error.errno or 0, error.detail) from None
        return {}, inode


def _become(steps: list[tuple[Callable[..., object], tuple[Any, ...]]], served: Served) -> NoReturn:
    """In a forked child: what serves one connection and ends."""
    try:
        for function, arguments in steps:
            function(*arguments)
        _, call, of_connection, output = served
        handler.serve(call, of_connection, output)
    except BaseException:  # boundary: the child reports and ends, always
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(126)


def connection_facts(fd: int, peer: bytes) -> tuple[dict[str, str], str]:
    """(variables of this connection, peer for people). `peer` as messages.Go has it; no IP for a UNIX client."""
    remote, port, number, *local = peer.decode().split("\0")
    facts = {"number": number, "remote": remote, "remote_port": port}
    text = _ip_text(remote, port)
    if len(local) > 2:  # the fd is not the client's own, which the manager has
        more = json.loads(local.pop())
        if unix := more.get("unix"):
            return {**plan.connection_environment("unix", facts | unix), **more["variables"]}, unix["text"]
        facts["local"], facts["local_port"] = local
        return {**plan.connection_environment("tcp", facts), **more["variables"]}, text
    if local:
        facts["local"], facts["local_port"] = local
        return plan.connection_environment("tcp", facts), text
    try:
        with peers.Borrowed(fileno=fd) as sock:
            if sock.family == socket.AF_UNIX:
                facts |= peers.unix_facts(sock)
                return plan.connection_environment("unix", facts), facts["text"]
            if sock.family == socket.AF_VSOCK:
                return plan.connection_environment("vsock", facts), f"vsock:{text}"
            facts["local"], facts["local_port"] = peers.local_address(sock)
    except OSError:
        pass  # the client has gone: the service starts all the same, and sees EOF
    return plan.connection_environment("tcp", facts), text


def _ip_text(remote: str, port: str) -> str:
    return f"[{remote}]:{port}" if ":" in remote else f"{remote}:{port}"


def _open_fds() -> set[int]:
    """From 3 on; what cannot be told without /proc is closed in children."""
    try:
        return {int(name) for name in os.listdir("/proc/self/fd") if int(name) > 2 and _is_open(int(name))}
    except OSError:
        return set()


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def _facts(init: int, served: Handler | None) -> dict[str, Any]:
    """What the manager has to know of the context besides."""
    code = {"files": served.files, "began_ns": served.began_ns} if served else {}
    return {"init": init, **code} if init else code


@contextlib.contextmanager
def _printed(found: list[int]) -> Iterator[None]:
    """What is written to fds 1 and 2 inside goes to a memfd, which is then in `found` if there is anything in it: the
    log is the manager's to write."""
    memory = os.memfd_create("superd-printed", os.MFD_CLOEXEC)
    were = [os.dup(1), os.dup(2)]
    try:
        os.dup2(memory, 1)
        os.dup2(memory, 2)
        yield
    finally:
        for number, fd in enumerate(were, 1):
            os.dup2(fd, number)
            os.close(fd)
        if os.lseek(memory, 0, os.SEEK_CUR):
            os.lseek(memory, 0, os.SEEK_SET)
            found.append(memory)
        else:
            os.close(memory)


def _refuse(channel: socket.socket, error: context.ContextError) -> NoReturn:
    fdpass.send_waiting(channel, messages.pack("refused", stage=error.stage, errno=error.errno, text=str(error)))
    os._exit(1)


def main(
    channel: socket.socket,
    wanted: Context,
    nofile: tuple[int, int],
    group: str | None = None,
    environment: Sequence[Mapping[str, str]] | None = None,
) -> NoReturn:
    """Enter the context, say so, serve until told to go. The caller has forked and closed what is not ours.

    group        the cgroup that it is to join, or None
    environment  that a handler is imported with: what is below the user's variables, and above them
    """
    process.set_name("superd-spawner")
    process.reset_signals()
    os.setsid()
    # What counts against a process over its whole life, or would starve the spawner, is set in each child.
    late = [limit for limit in wanted.rlimits if limit[0] in _OF_EACH_CHILD]
    early = tuple(limit for limit in wanted.rlimits if limit[0] not in _OF_EACH_CHILD)
    library = None
    if wanted.handler is not None:
        library = handler.Library()
    try:
        if group is not None:
            try:
                cgroup.join(group)
            except OSError as error:
                raise context.ContextError("cgroup", error.errno, f"cannot join {group}") from None
        context.raise_hard_limits(late)
        nofile = nofile[0], resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        entered = context.enter(dataclasses.replace(wanted, rlimits=early), nofile=nofile)
    except context.ContextError as error:
        _refuse(channel, error)
    init, life = (0, -1) if entered.init is None else (entered.init.pid, entered.init.life)
    served, variables, kept = None, None, []
    printed: list[int] = []
    if library is not None and wanted.handler is not None:
        library.keep()
        below, above = environment or ({}, {})
        variables = handler.Environment({**below, **context.user_environment(entered), **above})
        began_ns = time.time_ns()
        try:
            with _printed(printed):
                served = handler.Handler(wanted.handler)
        except handler.HandlerError as error:
            refusal = messages.pack("refused", stage="handler", errno=None, text=str(error), began_ns=began_ns)
            fdpass.send_waiting(channel, refusal, printed)
            os._exit(1)
        # What the handler's module has opened is its own, and its children's.
        kept = sorted(_open_fds() - {channel.fileno(), life, *printed})
        if entered.init is not None:
            try:
                entered.init.prepare()
            except context.ContextError as error:
                _refuse(channel, error)
    gc.freeze()
    gc.disable()  # nothing here makes cycles; a collection would copy pages shared with the keeper
    try:
        ready = messages.pack("entered", uid=entered.uid, gid=entered.gid, **_facts(init, served))
        fdpass.send_waiting(channel, ready, printed)
        fdpass.close_all(printed)
        Spawner(channel, context.user_environment(entered), late, served, variables, kept, init).run()
    except ConnectionError:
        os._exit(0)  # keeper and manager are gone, or do not want us any more; the children go on by themselves
