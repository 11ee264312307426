"""The control socket: varlink calls from superctl(1), one task for each client.

What can be asked is the text of INTERFACE, and METHODS says which function answers: nothing is looked up by a name
that a client sends (J1). Who may ask, and whether for more than a look, is decided once per connection, by SO_PEERCRED
(J3). The socket lives on when the manager dies: the keeper holds it, and clients wait in its queue.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import grp
import math
import os
import select
import signal
import socket
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import outcome
import trio

from superd import __version__
from superd.core import varlink
from superd.core.lifecycle import State
from superd.core.messages import format_connection
from superd.core.metrics import SLOT_S, SLOTS
from superd.core.records import Record, format_utc
from superd.core.spec import Address, SocketSpec
from superd.core.values import format_cpu_time, format_size
from superd.core.varlink import Call, VarlinkError
from superd.manager import access, environment, metrics, upgrade
from superd.manager.activation import ConnectionService
from superd.manager.process import ProcessService
from superd.manager.reload import outcome_parameters
from superd.manager.service import Service, Statistics
from superd.system import holders, sockets

if TYPE_CHECKING:
    from superd.manager.supervisor import Supervisor

CLIENTS, CLIENTS_PER_UID = 64, 16
REQUEST_S = 10.0  # to send a whole call
REPLY_S = 30.0  # to take a reply
_RETRY_FIRST_S, _RETRY_MAX_S = 1.0, 30.0
_CHECK_PATH_S = 10.0
_BACKLOG = 1024
_FEED_RECORDS, _FEED_BYTES = 1000, 1 << 20  # that wait for a client that reads slowly
_REPLY_BYTES = 1 << 17  # of records in one reply
_LAST_LINES = 10
_SETTLE_S = 0.3

INTERFACE = varlink.Interface("""\
# A superd: its services, and what an operator may ask of them.
interface io.superd.Control

# since: RFC 3339; for: seconds in this state; now: live processes; total: starts; listen: canonical addresses
type Service (
  name: string, state: string, since: string, for: float, pid: ?int, now: int, total: int, restarts: int,
  listen: []string, note: string
)

# queue and room: connections that wait to be accepted, and how many may; only TCP can tell. why: not bound, because
# paused: superd takes nothing from it
type Socket (
  service: string, name: string, address: string, kind: string, queue: ?int, room: ?int, why: ?string, paused: bool
)

# connection and peer: of a per-connection service. for: age in seconds
type Process (service: string, pid: int, connection: ?string, peer: ?string, since: string, for: float)

# time: seconds since the epoch; the rest as in the log, superd(8)
type Record (
  number: int, time: float, level: string, service: ?string, event: string, connection: ?string, pid: ?int,
  peer: ?string, message: string, fields: object
)

# ready: what tells that it is; took: seconds from its start until it was; health: what is checked, "" for nothing
# said: STATUS= of the service itself, and errors as in sd_notify(3); stored: fds; ignored: messages that did not count;
# endings: how the last processes ended; limits: of its control group, and what it has of them
type Details (
  service: Service, description: string, file: string, run: string, pass: string, command: []string, ready: string,
  took: ?float, health: string, restart: string, requires: []string, wants: []string, required_by: []string,
  said: string, errors: []string, stored: int, ignored: int, refused: int, limits: []string, sockets: []Socket,
  processes: []Process, endings: []string, records: []Record
)

# took: seconds; records: what the service wrote meanwhile, if it did not work
type Result (
  name: string, ok: bool, changed: bool, state: string, pid: ?int, note: string, took: float, records: []Record
)

# All of them, or those that are named.
method List(names: ?[]string) -> (services: []Service)
method Sockets(names: ?[]string) -> (sockets: []Socket)
method Status(names: ?[]string) -> (services: []Details)
method Connections(names: ?[]string) -> (connections: []Process)

# The configuration in force. toml: a whole file; with origin: the place of each value after it. Values of variables
# are hidden from those who may only look. problems: why it is not in force
method Show(name: string, origin: ?bool) -> (
  toml: string, config: object, origins: object, file: string, problems: string
)

# The last `count` lines of services and superd's words about them; with `more` several replies, and with `follow`
# no end. lost: records that were dropped because they were not read fast enough.
method Logs(names: ?[]string, count: ?int, follow: ?bool) -> (records: []Record, lost: int)
method Events(names: ?[]string, count: ?int, follow: ?bool) -> (records: []Record, lost: int)

# The reply comes when it is so or has failed; with wait: false at once.
method Start(names: []string, wait: ?bool) -> (results: []Result)
method Stop(names: []string, wait: ?bool) -> (results: []Result)

# overlap: the new process is ready before the one before it is told to stop; if it never is, that one goes on.
method Restart(names: []string, wait: ?bool, overlap: ?bool) -> (results: []Result)

# Take no clients, who wait in the kernel's queue meanwhile; what runs goes on. It stays so until Resume.
method Pause(names: []string) -> (results: []Result)
method Resume(names: []string) -> (results: []Result)

# As Stop, but nothing is killed: connections, and processes that were told to stop, have all the time that they need.
method Drain(names: []string, wait: ?bool) -> (results: []Result)

# Send each service's reload_signal; the reply tells whether its processes lived through it, and comes, where one says
# RELOADING=1, after its READY=1.
method ReloadService(names: []string, wait: ?bool) -> (results: []Result)

# signal: a name without SIG; default TERM
method Kill(names: []string, signal: ?string) -> (results: []Result)

# Replies when all are so, or when one of them cannot become so by itself.
method Wait(names: []string, for: (ready, active, stopped, idle)) -> (results: []Result)

# Whether it is so now. active: it serves or runs; a per-connection service is ready when it listens.
method Is(names: []string, what: (active, failed, ready)) -> (yes: []string, no: []string)

# live: it answers. ready: every enabled service can serve; problems says which cannot.
method Health() -> (live: bool, ready: bool, problems: []string)

# Read the files and carry out what has changed. action: add, remove, in place, rebind or restart; why: not carried out,
# because; daemon: changed keys of superd.toml; problems: all that is wrong in the files; strict: all or nothing
type Change (name: string, action: string, keys: []string, why: ?string)
method Reload(dry_run: ?bool, strict: ?bool) -> (
  entries: []Change, daemon: []string, problems: []string, applied: bool
)

# What Reload would do.
method Diff() -> (entries: []Change, daemon: []string, problems: []string, applied: bool)

# Stop everything in order and exit. The connection ends when that is done; pid: of the process that then exits.
method Shutdown() -> (services: int, pid: int)

# Let the code that is installed now take over; everything else goes on. ok: it does come up, and the connection ends as
# soon as this manager has; version: of that code; was: of this one; why: it does not come up
method Upgrade() -> (ok: bool, version: string, was: string, why: string)

# Whether a client would be let in now, and the rule that says so. address: of an IP client, or user:NAME.
method Access(name: string, address: string) -> (allowed: bool, reason: string)

# For Prometheus, in its text format.
method Metrics() -> (text: string)

# New connections in slots of so many seconds, the oldest first, the last one not over yet; of services that had some.
method History() -> (slot: float, span: float, services: [](name: string, connections: []int))

# Every process below superd by service; service null: superd's own.
method Processes(names: ?[]string) -> (processes: [](service: ?string, pid: int))

error NoSuchService (name: string, similar: []string)
error BadCall (reason: string)
error TooManyClients (limit: int)
""")

_PREFIX = f"{INTERFACE.name}."
_SERVICE_INTERFACE = varlink.Interface("""\
# The Varlink Service Interface is provided by every varlink service. It
# describes the service and the interfaces it implements.
interface org.varlink.service

# Get a list of all the interfaces a service provides and information
# about the implementation.
method GetInfo() -> (vendor: string, product: string, version: string, url: string, interfaces: []string)

# Get the description of an interface that is implemented by this service.
method GetInterfaceDescription(interface: string) -> (description: string)

# The requested interface was not found.
error InterfaceNotFound (interface: string)

# The requested method was not found
error MethodNotFound (method: string)

# The interface defines the requested method, but the service does not
# implement it.
error MethodNotImplemented (method: string)

# One of the passed parameters is invalid.
error InvalidParameter (parameter: string)

# Client is denied access
error PermissionDenied ()

# Method is expected to be called with 'more' set to true, but wasn't
error ExpectedMore ()
""")
_INTERFACES = {interface.name: interface for interface in (INTERFACE, _SERVICE_INTERFACE)}

_GONE = (OSError, trio.BrokenResourceError, trio.ClosedResourceError, trio.TooSlowError)
_ACTIVE = ("listening", "idle", "starting", "ready")
_HEALTHY = (*_ACTIVE, "stopping", "done", "stopped", "disabled")


def control_address(option: str | None, configured: str | None, environ: Mapping[str, str]) -> str | None:
    """Where the control socket is to be, as somebody wrote it: --control, $SUPERD_SOCKET, superd.toml, the default
    of superd(8), in that order. None: there is to be none ("off")."""
    chosen = option or environ.get("SUPERD_SOCKET") or configured or varlink.default_socket(environ, os.geteuid())
    return None if chosen == "off" else chosen


class ControlServer:
    """`open()`, then `serve()` as a task for the manager's life. `address` as from control_address()."""

    def __init__(self, supervisor: Supervisor, address: str | None) -> None:
        self.supervisor, self.address = supervisor, address
        self.path: str | None = None
        self.clients: Counter[int] = Counter()  # by uid
        self._connected: dict[_Client, None] = {}  # in order
        self._listener: socket.socket | None = None
        self._path_fd: int | None = None  # O_PATH, so that the path's inode stays ours
        self._delay_s = _RETRY_FIRST_S
        self._said = ""
        self._opened = False
        self.upgrading = False

    def open(self) -> None:
        """Take over or bind the socket, so that superctl can connect from now on. What fails, serve() tries again."""
        self._opened = True
        if self.address is None:
            return
        try:
            self.path = varlink.socket_path(self.address)
        except ValueError as error:
            self._warn(f"cannot bind the control socket {self.address}: {error}; superctl cannot reach this superd")
            return
        if not self._adopt(self.path):
            self._bind(self.path)

    async def serve(self) -> None:
        """Never raises for what a client, a full disk or a missing directory does (D14, F7)."""
        if not self._opened:
            self.open()
        if self.path is None:
            return
        try:
            async with trio.open_nursery() as nursery:
                while True:
                    while self._listener is None:
                        await trio.sleep(self._delay_s)
                        self._delay_s = min(self._delay_s * 2, _RETRY_MAX_S)
                        self._bind(self.path)
                    await self._accept(nursery)
        finally:
            self._close()

    # -- the socket

    def _adopt(self, path: str) -> bool:
        """What an earlier manager left with the keeper: the listener, and an O_PATH fd of its path."""
        fds = self.supervisor.inheritance.held.pop("control", [])
        if not fds:
            return False
        listener = socket.socket(fileno=fds[0])
        self._path_fd = fds[1] if len(fds) > 1 else None
        for fd in fds[2:]:
            os.close(fd)
        name = listener.getsockname()
        if (os.fsdecode(name).replace("\0", "@") if isinstance(name, bytes) else name) == path:
            listener.setblocking(False)
            self._listener = listener
            return True
        listener.close()
        self._drop_listener()
        return False

    def _bind(self, path: str) -> None:
        spec = SocketSpec(Address("unix", path=path), "control", backlog=_BACKLOG)
        if not path.startswith("@"):
            daemon = self.supervisor.snapshot.daemon
            spec = replace(spec, mode=daemon.control_socket_mode, group=daemon.control_group)
        try:
            (bound,) = sockets.bind_listener(
                spec, inherited={}, trusted_uid=os.geteuid(), find_holder=holders.find_holder
            )
        except sockets.BindError as error:
            if str(error) != self._said:
                self._said = str(error)
                self._warn(f"cannot bind the control socket {path}: {error}; services go on, trying again")
            return
        self._delay_s, self._said = _RETRY_FIRST_S, ""
        self._listener = socket.socket(
            socket.AF_UNIX, socket.SOCK_STREAM, 0, fileno=bound.fd
        )  # asks the kernel nothing
        self._listener.setblocking(False)
        self._path_fd = _hold(path, bound.identity)
        fds = [bound.fd] if self._path_fd is None else [bound.fd, self._path_fd]
        self.supervisor.keeper.send("store", fds, name="control")

    def set_mode(self) -> None:
        """Mode and group of the socket's path, if there is one, as superd.toml has them now."""
        daemon = self.supervisor.snapshot.daemon
        if self._path_fd is None:
            return
        path, group = f"/proc/self/fd/{self._path_fd}", daemon.control_group
        try:
            os.chmod(path, 0o600)  # nobody else while the group changes
            os.chown(path, -1, os.getegid() if group is None else environment.gid_of(group))
            os.chmod(path, daemon.control_socket_mode)
        except (OSError, KeyError) as error:
            self._warn(f"cannot set the mode of the control socket: {error}")

    def _path_is_ours(self) -> bool:
        if self.path is None or self.path.startswith("@"):
            return True
        return self._path_fd is not None and sockets.path_is_ours(self.path, _identity(os.fstat(self._path_fd)))

    async def _accept(self, nursery: trio.Nursery) -> None:
        """Until the listener is of no use any more."""
        assert self._listener is not None
        pause_s = 0.1
        while True:
            with trio.move_on_after(_CHECK_PATH_S):
                await trio.lowlevel.wait_readable(self._listener.fileno())
            if not self._path_is_ours() or sockets.listener_is_dead(self._listener.fileno()):
                self._warn(f"the control socket {self.path} has gone; opening it again")  # D13
                self._drop_listener()
                assert self.path is not None
                return self._bind(self.path)
            try:
                conn, _ = self._listener.accept()
            except BlockingIOError:
                continue
            except OSError as error:
                if error.errno in sockets.RESOURCE_ERRNOS:
                    await trio.sleep(pause_s)
                    pause_s = min(pause_s * 2, 1.0)
                continue
            pause_s = 0.1
            client = self._admit(conn)
            if client is not None:
                nursery.start_soon(self._contain, client)

    def _admit(self, conn: socket.socket) -> _Client | None:
        """The client, or None: refused and closed, without a task or a wait."""
        refusal: VarlinkError | None = None
        try:
            pid, uid, gid = sockets.peer_credentials(conn.fileno())
            rights = self._rights(conn.fileno(), uid, gid)
            if rights is None:
                refusal = VarlinkError(f"{varlink.SERVICE}.PermissionDenied")
                self.supervisor.log.error_limited(
                    ("control", uid), f"control socket: uid {uid} (pid {pid}) refused", level="warning"
                )
            elif limit := self._has_no_room(uid, rights):
                refusal = VarlinkError(f"{_PREFIX}TooManyClients", limit=limit)
            if refusal is not None:
                conn.send(varlink.pack_error(refusal), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except OSError:
            pass  # it has gone
        else:
            if refusal is None:
                client = _Client(conn, pid, uid, may_act=rights == "act")
                self.clients[uid] += 1
                self._connected[client] = None
                return client
        conn.close()
        return None

    def _rights(self, fd: int, uid: int, gid: int) -> Literal["act", "look"] | None:
        if uid in (0, os.geteuid()):
            return "act"
        daemon = self.supervisor.snapshot.daemon
        if daemon.control_group is None and not daemon.control_admins:
            return None
        groups = {gid, *access.peer_groups(fd)}
        for rule in daemon.control_admins:
            if rule.value == uid if rule.kind == "user" else rule.value in groups:
                return "act"
        group = daemon.control_group
        try:
            wanted = grp.getgrnam(group).gr_gid if isinstance(group, str) else group
        except KeyError:
            return None  # deleted since
        return "look" if wanted in groups else None

    def _has_no_room(self, uid: int, rights: str) -> int:
        """The limit that forbids another client, 0: none. Who is connected and asks for nothing makes room for who
        comes, so that silent clients cannot lock anybody out (J4); who may only look moves nobody who may act."""
        total = CLIENTS if rights == "act" else CLIENTS - CLIENTS_PER_UID
        if self.clients[uid] < CLIENTS_PER_UID and self.clients.total() < total:
            return 0
        idle = [client for client in self._connected if client.is_silent()]
        if self.clients[uid] >= CLIENTS_PER_UID:
            limit = CLIENTS_PER_UID
            idle = [client for client in idle if client.uid == uid]
        else:
            limit = total
            idle = [client for client in idle if not client.may_act] or (idle if rights == "act" else [])
        if not idle:
            return limit
        self._forget(idle[0])
        idle[0].dismiss()
        return 0

    def _forget(self, client: _Client) -> None:
        if client in self._connected:
            del self._connected[client]
            self.clients[client.uid] -= 1

    async def _contain(self, client: _Client) -> None:
        """The boundary around one client: what nobody expected is the supervisor's to log (F7)."""
        try:
            result = await outcome.acapture(self._serve_client, client)
        finally:
            client.close()
            self._forget(client)
        self.supervisor.guard(lambda _: result.unwrap(), 0)

    def _drop_listener(self) -> None:
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        if self._path_fd is not None:
            os.close(self._path_fd)
            self._path_fd = None
        self.supervisor.keeper.send("drop", name="control")

    def _close(self) -> None:
        """At the end of superd the path goes too; a manager that ends alone leaves all to the next one."""
        if self.supervisor.stopping and self._listener is not None:
            if self._path_fd is not None and self.path is not None:
                sockets.remove_unix_path(self.path, _identity(os.fstat(self._path_fd)))
            self._drop_listener()
        for fd in (self._listener, self._path_fd):
            if fd is not None:
                os.close(fd if isinstance(fd, int) else fd.detach())
        self._listener = self._path_fd = None

    def _warn(self, text: str) -> None:
        self.supervisor.log.message(text, level="warning")
        self.supervisor.log.flush()

    # -- one client

    async def _serve_client(self, client: _Client) -> None:
        try:
            while True:
                try:
                    data = await client.receive()
                    if data is None:
                        return
                    call = varlink.parse_call(data)
                except varlink.ProtocolError as error:
                    await client.send(varlink.pack_error(VarlinkError(f"{_PREFIX}BadCall", reason=str(error))))
                    return
                try:
                    answer = varlink.pack_reply(await self._answer(client, call))
                except VarlinkError as error:
                    answer = varlink.pack_error(error)
                self.supervisor.end_of_turn()
                if not call.oneway:
                    await client.send(answer)
                await trio.lowlevel.checkpoint()
        except _GONE:
            pass  # a client may leave at any time (J6)

    async def _answer(self, client: _Client, call: Call) -> dict[str, Any]:
        """Raises VarlinkError."""
        name, _, method = call.method.rpartition(".")
        interface = _INTERFACES.get(name)
        if interface is None:
            raise VarlinkError(f"{varlink.SERVICE}.InterfaceNotFound", interface=name[:200])
        handler = METHODS.get(call.method)
        if handler is None:
            raise VarlinkError(f"{varlink.SERVICE}.MethodNotFound", method=call.method[:200])
        if not client.may_act and call.method not in LOOKING:
            raise VarlinkError(f"{varlink.SERVICE}.PermissionDenied")
        wrong = interface.check(call.parameters, interface.methods[method][0])
        if wrong is not None:
            raise _invalid(wrong)
        return await handler(self, client, call)

    @contextlib.contextmanager
    def while_connected(self, client: _Client) -> Iterator[None]:
        """Give up on the body when the client has gone for good. Half a close is no reason: it still reads."""
        watch, fd = self.supervisor.watch, client.fileno()

        def gone(_: int) -> None:
            watch.remove(fd)
            scope.cancel()

        with trio.CancelScope() as scope:
            watch.add(fd, gone, 0)  # no events: only hang-up and errors
            try:
                yield
            finally:
                watch.remove(fd)
        if scope.cancelled_caught:
            raise ConnectionResetError(errno.ECONNRESET, "the client has gone")


class _Client:
    """One connection. `close()` is the server's to call. idle: it has asked for nothing that is not answered."""

    def __init__(self, conn: socket.socket, pid: int, uid: int, *, may_act: bool) -> None:
        conn.setblocking(False)
        self.pid, self.uid, self.may_act = pid, uid, may_act
        self.idle = False
        self._waiting = trio.CancelScope()
        self._fd = conn.fileno()
        self._stream = trio.SocketStream(trio.socket.from_stdlib_socket(conn))
        self._splitter = varlink.Splitter()
        self._calls: deque[bytes] = deque()

    def fileno(self) -> int:
        return self._fd

    async def receive(self) -> bytes | None:
        """The next call; None at the end, or when it takes too long (J4). fds that come along are never taken (J12)."""
        with trio.move_on_after(REQUEST_S) as self._waiting:
            while not self._calls:
                self.idle = True
                data = await self._stream.receive_some(varlink.MAX_CALL_BYTES)
                if not data:
                    return None
                self._calls.extend(self._splitter.feed(bytes(data)))
            self.idle = False
            return self._calls.popleft()
        return None

    def is_silent(self) -> bool:
        """It asks for nothing, and no call of it waits to be read."""
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        return self.idle and not poll.poll(0)

    def dismiss(self) -> None:
        """End the wait for a call."""
        self.idle = False
        self._waiting.cancel()

    async def send(self, data: bytes) -> None:
        """Raises trio.TooSlowError when the client does not take it (J5)."""
        with trio.fail_after(REPLY_S):
            await self._stream.send_all(data)

    def close(self) -> None:
        self._stream.socket.close()


def _hold(path: str, identity: tuple[int, int] | None) -> int | None:
    """An O_PATH fd of the file with this identity; None if something else is there by now."""
    if identity is None:
        return None
    try:
        fd = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    if _identity(os.fstat(fd)) != identity:
        os.close(fd)
        return None
    return fd


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _invalid(parameter: str) -> VarlinkError:
    return VarlinkError(f"{varlink.SERVICE}.InvalidParameter", parameter=parameter)


# --- what is shown


def _age(since: float) -> dict[str, Any]:
    """`since` and `for` of something that began at a time of CLOCK_MONOTONIC."""
    age = max(time.monotonic() - since, 0.0)
    return {"since": format_utc(time.time() - age), "for": round(age, 3)}


def _row(statistics: Statistics) -> dict[str, Any]:
    return {
        "name": statistics.name, "state": statistics.state, **_age(statistics.since), "pid": statistics.pid,
        "now": statistics.now, "total": statistics.total, "restarts": statistics.restarts,
        "listen": list(statistics.listen), "note": statistics.note,
    }  # fmt: skip


def _rows(server: ControlServer, names: list[str] | None) -> list[dict[str, Any]]:
    """In the order of `names`, each once; all by default."""
    found = {row.name: row for row in server.supervisor.statistics()}
    if not names:
        return [_row(row) for row in found.values()]
    return [_row(found[name]) for name in _known(server, names)]


def _known(server: ControlServer, names: list[str]) -> list[str]:
    """The names, each once. Raises VarlinkError NoSuchService for the first that is none."""
    known = {*server.supervisor.services, *server.supervisor.snapshot.broken}
    for name in names:
        if name not in known:
            similar = difflib.get_close_matches(name[:64], sorted(known), 3)
            raise VarlinkError(f"{_PREFIX}NoSuchService", name=name[:200], similar=similar)
    return list(dict.fromkeys(names))


def _services(server: ControlServer, names: list[str] | None) -> list[Service]:
    """Those that run time knows: not the ones whose file is broken."""
    services = server.supervisor.services
    wanted = _known(server, names) if names else sorted(services)
    return [services[name] for name in wanted if name in services]


def _sockets(service: Service) -> list[dict[str, Any]]:
    listeners = service.listeners
    found = []
    for listener in listeners.open:
        length = metrics.queue_length(listener)
        found.append(
            {
                "service": service.name, "name": listener.spec.name, "address": str(listener.address),
                "kind": listener.address.kind, "queue": length and length[0], "room": length and length[1], "why": None,
                "paused": listeners.paused,
            }
        )  # fmt: skip
    for index, why in listeners.waiting.items():
        spec = listeners.specs[index]
        found.append(
            {
                "service": service.name, "name": spec.name, "address": str(spec.address), "kind": spec.address.kind,
                "queue": None, "room": None, "why": why, "paused": listeners.paused,
            }
        )  # fmt: skip
    return found


def _limits(service: Service) -> list[str]:
    limits = service.spec.cgroup
    used = service.supervisor.processes.usage(service) if limits.controllers() else {}
    found = []
    if limits.memory_max is not None:
        now = f"{used['memory'] / (1 << 20):.1f} MiB of " if "memory" in used else ""
        found.append(f"memory {now}{format_size(limits.memory_max)}")
    if limits.pids_max is not None:
        found.append(f"pids {used['pids']} of {limits.pids_max}" if "pids" in used else f"pids {limits.pids_max}")
    if limits.cpu_max is not None:
        found.append(f"cpu {format_cpu_time(limits.cpu_max)}")
    return found


def _processes(service: Service) -> list[dict[str, Any]]:
    found = []
    if isinstance(service, ProcessService):
        found = [
            {"service": service.name, "pid": one.pid, "connection": None, "peer": None, **_age(one.started)}
            for one in service.instances() if one.pid
        ]  # fmt: skip
    return found + _connections_of(service)


def _connections_of(service: Service) -> list[dict[str, Any]]:
    acceptor = service.acceptor
    if acceptor is not None:
        return [
            {
                "service": service.name, "pid": row.pid, "connection": format_connection(row.id), "peer": row.peer,
                **_age(row.started),
            }
            for row in acceptor.connections.values()
        ]  # fmt: skip
    return []


def _record(record: Record) -> dict[str, Any]:
    connection = record.connection
    return {
        "number": record.number, "time": record.time_s, "level": record.level, "service": record.service,
        "event": record.event, "connection": None if connection is None else str(connection), "pid": record.pid,
        "peer": _text(record.peer), "message": _text(record.message),
        "fields": {key: _value(value) for key, value in record.fields.items() if value is not None},
    }  # fmt: skip


def _text(text: str | None) -> str | None:
    """Without the surrogates that stand for bytes that are no UTF-8: they are not JSON."""
    return text if text is None or text.isprintable() else text.encode("utf-8", "backslashreplace").decode()


def _value(value: object) -> object:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, int | float) else _text(str(value))


def _details(server: ControlServer, row: dict[str, Any]) -> dict[str, Any]:
    name = row["name"]
    service = server.supervisor.services.get(name)
    records = [_record(record) for record in server.supervisor.log.tail(name, _LAST_LINES)]
    if service is None:
        row["note"] = server.supervisor.snapshot.broken.get(name, row["note"])
        return {
            "service": row, "description": "", "file": "", "run": "", "pass": "", "command": [], "ready": "",
            "took": None, "health": "", "restart": "", "requires": [], "wants": [], "required_by": [], "said": "",
            "errors": [], "stored": 0, "ignored": 0, "refused": 0, "limits": [], "sockets": [], "processes": [],
            "endings": [], "records": records,
        }  # fmt: skip
    spec = service.spec
    told = service.notifications if isinstance(service, ProcessService) else None
    instance = service.instance if isinstance(service, ProcessService) else None
    return {
        "service": row, "description": spec.description, "file": spec.source, "run": spec.run, "pass": spec.pass_,
        "command": [text] if (text := spec.context.handler or spec.builtin) else list(spec.command),
        "ready": _text(str(spec.ready)), "took": instance and instance.ready_after_s,
        "health": "" if spec.health is None else _text(str(spec.health.check)), "restart": spec.restart.policy,
        "requires": list(spec.requires), "wants": list(spec.wants),
        "required_by": server.supervisor.dependencies.required_by(name),
        "said": _text(service.status_text) if isinstance(service, ProcessService) else "",
        "errors": [f"{name}={text}" for name, text in told.problems.items()] if told else [],
        "stored": len(told.store) if told else 0, "ignored": told.ignored if told else 0,
        "refused": _refused(service),
        "limits": _limits(service), "sockets": _sockets(service), "processes": _processes(service),
        "endings": list(service.endings),
        "records": records,
    }  # fmt: skip


def _refused(service: Service) -> int:
    counting = service.acceptor or service
    return counting.refused if isinstance(counting, ConnectionService | ProcessService) else 0


# --- the methods. Each returns the parameters of the last reply, or raises VarlinkError.


async def _look_at_files(server: ControlServer) -> None:
    if server.supervisor.reloader is not None:
        await server.supervisor.reloader.look()


async def _list(server: ControlServer, client: _Client, call: Call) -> dict[str, Any]:
    await _look_at_files(server)
    return {"services": _rows(server, call.parameters.get("names"))}


async def _list_sockets(server: ControlServer, client: _Client, call: Call) -> dict[str, Any]:
    return {"sockets": [row for s in _services(server, call.parameters.get("names")) for row in _sockets(s)]}


async def _status(server: ControlServer, client: _Client, call: Call) -> dict[str, Any]:
    await _look_at_files(server)
    return {"services": [_details(server, row) for row in _rows(server, call.parameters.get("names"))]}


async def _connections(server: ControlServer, client: _Client, call: Call) -> dict[str, Any]:
    services = _services(server, call.parameters.get("names"))
    return {"connections": [row for service in services for row in _connections_of(service)]}


async def _show(server: ControlServer, client: _Client, call: Call) -> dict[str, Any]:
    from superd.core import effective  # late: an operator asks now and then, and it is no part of the daemon's work
    from superd.core.problems import format_problems

    supervisor = server.supervisor
    (name,) = _known(server, [call.parameters["name"]])
    assert supervisor.sources is not None
    files, problems, machine = supervisor.sources(name)
    spec, entries, found = effective.load_one(
        name, files, machine=machine, environ=os.environ, is_root=os.geteuid() == 0, problems=problems
    )
    secrets = client.may_act  # K18
    if spec is None or name in supervisor.snapshot.broken:  # by itself, or by what another file says
        said = format_problems([problem for problem in found if problem.is_error], "full")
        said = said or f"{supervisor.snapshot.broken.get(name)}\n"
        return {"toml": "", "config": {}, "origins": {}, "file": "", "problems": said}
    return {
        "toml": effective.format_entries(entries, origin=bool(call.parameters.get("origin")), secrets=secrets),
        "config": effective.tree_of(entries, secrets=secrets), "origins": effective.origins_of(entries),
        "file": spec.source, "problems": "",
    }  # fmt: skip


async def _logs(server: ControlServer, client: _Client, call: Call) -> dict[str, Any]:
    names = call.parameters.get("names")
    log = server.supervisor.log
    if names:
        wanted: set[str | None] = set(_known(server, names))
    else:
        wanted = {None, *server.supervisor.services, *server.supervisor.snapshot.broken}
    found = sorted(record for name in wanted for record in log.tail(name))
    everything = not names
    return await _records(
        server, client, call, found,
        lambda record: record.event in ("output", "message") and (everything or record.service in wanted),
    )  # fmt: skip


async def _events(server: ControlServer, client: _Client, call: Call) -> dict[str, Any]:
    names = call.parameters.get("names")
    wanted = set(_known(server, names)) if names else None

    def is_wanted(record: Record) -> bool:
        return (
            record.event not in ("output", "message") and record.level != "debug"
            and (wanted is None or record.service in wanted)
        )  # fmt: skip

    found = [record for record in server.supervisor.log.events() if is_wanted(record)]
    return await _records(server, client, call, found, is_wanted)


async def _records(
    server: ControlServer, client: _Client, call: Call, found: list[Record], is_wanted: Callable[[Record], bool]
) -> dict[str, Any]:
    """The last `count` of what was found, then, with `follow`, what comes."""
    count, follow = call.parameters.get("count"), bool(call.parameters.get("follow"))
    if count is not None and count < 0:
        raise _invalid("count")
    if follow and not call.more:
        raise VarlinkError(f"{varlink.SERVICE}.ExpectedMore")
    feed = _Feed(found if count is None else found[len(found) - count :] if count < len(found) else found)
    if not call.more:
        return feed.take(None)
    unsubscribe = server.supervisor.log.subscribe(lambda record: feed.add(record) if is_wanted(record) else None)
    try:
        with server.while_connected(client):
            while follow or feed.has_more():
                reply = feed.take(_REPLY_BYTES)
                if not follow and not feed.has_more():
                    return reply
                if not call.oneway:
                    await client.send(varlink.pack_reply(reply, continues=True))
                if not feed.has_more():
                    await feed.news.wait()
    finally:
        unsubscribe()
    return {"records": [], "lost": 0}


class _Feed:
    """Records on their way to a client: bounded, the oldest are lost first, and counted (J5)."""

    def __init__(self, first: list[Record]) -> None:
        self._first = deque(first)  # bounded by the rings they come from
        self._queue: deque[Record] = deque()
        self._bytes = 0
        self._lost = 0
        self.news = trio.Event()

    def add(self, record: Record) -> None:
        self._queue.append(record)
        self._bytes += len(record.message)
        while len(self._queue) > _FEED_RECORDS or self._bytes > _FEED_BYTES:
            self._bytes -= len(self._queue.popleft().message)
            self._lost += 1
        self.news.set()

    def has_more(self) -> bool:
        return bool(self._first or self._queue)

    def take(self, limit_bytes: int | None) -> dict[str, Any]:
        """A reply's worth."""
        found: list[dict[str, Any]] = []
        size = 0
        while self._first and (limit_bytes is None or size < limit_bytes):
            record = self._first.popleft()
            size += len(record.message) + 200
            found.append(_record(record))
        while not self._first and self._queue and (limit_bytes is None or size < limit_bytes):
            record = self._queue.popleft()
            self._bytes -= len(record.message)
            size += len(record.message) + 200
            found.append(_record(record))
        lost, self._lost = (self._lost, 0) if not self._first else (0, self._lost)
        if not self.has_more():
            self.news = trio.Event()
        return {"records": found, "lost": lost}


# A question about a service: True: it is so; False: it cannot become so by itself; None: not yet.
Question = Callable[[Service], "bool | None"]
Order = Callable[[Service], None]


def _is_up(service: Service) -> bool | None:
    """After a start: a process runs, or ended well; a per-connection service listens."""
    if not service.wish_up:
        return False  # somebody else stopped it
    if service.supervisor.dependencies.is_under_way(service):
        return None
    if service.state in (State.STARTING, State.STOPPING):
        return None
    return service.state in (State.READY, State.LISTENING, State.DONE)


def _may_yet_fail(service: Service) -> bool:
    """Whether a process counts as ready only because it was executed, a moment ago: a wrong option or a taken port
    shows right after that, and who says `start` wants to know."""
    said_so = service.spec.ready.kind != "start"
    return service.state is State.READY and not said_so and time.monotonic() - service.since < _SETTLE_S


def _is_down(service: Service) -> bool | None:
    if service.is_stopped():
        return True
    return False if service.wish_up else None


def _is_ready(service: Service) -> bool:
    return service.state is State.READY or (isinstance(service, ConnectionService) and service.state is State.LISTENING)


def _is_idle(service: Service) -> bool:
    at_rest = service.state not in (State.STARTING, State.STOPPING, State.BACKOFF)
    return at_rest and not service.statistics().now


def _waits_for(condition: str) -> Question:
    if condition == "stopped":
        return lambda service: service.is_stopped() or None
    if condition == "idle":
        return lambda service: _is_idle(service) or None

    def question(service: Service) -> bool | None:
        if _is_ready(service) if condition == "ready" else service.state.value in _ACTIVE:
            return True
        return False if service.state in (State.FAILED, State.DONE) else None

    return question


async def _carry_out(
    server: ControlServer, client: _Client, call: Call, verb: str, order: Order | None, is_so: Question
) -> dict[str, Any]:
    """Give an order to each service, all at once, and wait for each."""
    names = _known(server, call.parameters["names"])
    supervisor = server.supervisor
    began = time.monotonic()
    results = {name: _result(server, name, began, ok=False) for name in names}
    waiting: dict[str, tuple[Service, int]] = {}
    for name in names:
        service = supervisor.services.get(name)
        if service is None:
            results[name]["note"] = supervisor.snapshot.broken[name].splitlines()[0]
        elif order is not None and supervisor.stopping:
            results[name]["note"] = "superd is stopping"
        elif (verb == "start" and _is_ready(service) and not supervisor.dependencies.note(service)) or (
            verb in ("stop", "drain") and service.state is State.STOPPED
        ):
            results[name]["ok"] = True
        else:
            if order is not None:
                supervisor.log.message(f"{verb} asked for by pid {client.pid} uid {client.uid}", service=name)
            waiting[name] = service, _newest(server, name)
            if order is not None:
                order(service)
    supervisor.end_of_turn()
    if call.parameters.get("wait") is False:
        for name in waiting:
            results[name] = _result(server, name, began, ok=True, changed=True)
        return {"results": list(results.values())}
    with server.while_connected(client):
        for name, (service, mark) in waiting.items():
            while (so := is_so(service)) is None or (so and is_so is _is_up and _may_yet_fail(service)):
                with trio.move_on_after(math.inf if so is None else _SETTLE_S):
                    await service.changed.wait()
                if order is None:  # who only waits, waits for the name: its file may make another service of it
                    service = supervisor.services.get(name, service)
                    if name not in supervisor.services and service not in supervisor.leaving:
                        so = bool(is_so(service))  # its file has gone, and it has ended
                        break
            results[name] = _result(server, name, began, ok=so, changed=order is not None, mark=None if so else mark)
            if name not in supervisor.services:
                results[name] |= {"state": service.state.value, "note": "its file has gone"}
    return {"results": list(results.values())}


def _result(
    server: ControlServer, name: str, began: float, *, ok: bool, changed: bool = False, mark: int | None = None
) -> dict[str, Any]:
    """mark: number of the record after which to tell what the service wrote; None: do not."""
    service = server.supervisor.services.get(name)
    mains = service.mains() if service is not None else []
    note = "" if service is None else service.explain()
    if service is not None and not ok and not note and service.endings:
        note = service.endings[-1]
    records = [] if mark is None else [r for r in server.supervisor.log.tail(name) if r.number > mark][-_LAST_LINES:]
    return {
        "name": name, "ok": ok, "changed": changed,
        "state": State.BAD_CONFIG.value if service is None else service.state.value,
        "pid": mains[0] if mains else None, "note": note, "took": round(time.monotonic() - began, 3),
        "records": [_record(record) for record in records],
    }  # fmt: skip


def _newest(server: ControlServer, name: str) -> int:
    return max((record.number for record in server.supervisor.log.tail(name, 1)), default=0)


async def _start(server: ControlServer, client: _Client, call: Call) -> dict[str, Any]:
    for name in call.parameters["names"]:
        if "@" in name and server.supervisor.reloader is not None:
            wrong = await server.supervisor.reloader.instantiate(name)
            if wrong is not None:
                raise VarlinkError(f"{_PREFIX}BadCall", reason=wrong)
    return await _carry_out(server, client, call, "start", server.supervisor.dependencies.start, _is_up)


async def _stop(server: ControlServer, client: _Client, call: Call) -> dict[str, Any]:
    return await _carry_out(server, client, call, "stop", server.supervisor.dependencies.stop, _is_down)


async def _restart(server: ControlServer, client: _Client, call: Call) -> dict[str, Any]:
    if not call.parameters.get("overlap"):
        return await _carry_out(server, client, call, "restart", server.supervisor.dependencies.restart, _is_up)
    reply = await _carry_out(server, client, call, "restart", lambda one: one.ask_overlap(), _has_overlapped)
    for row in reply["results"]:
        service = server.supervisor.services.get(row["name"])
        if service is not None and not row["ok"] and (why := service.overlapped()):
            row["note"] = why
    return reply


def _has_overlapped(service: Service) -> bool | None:
    why = service.overlapped()
    return None if why is None else not why and _is_up(service)


async def _drain(server: ControlServer, client: _Client, call: Call) -> dict[str, Any]:
    return await _carry_out(server, client, call, "drain", server.supervisor.dependencies.drain, _is_down)


async def _pause(server: ControlServer, client: _Client, call: Call) -> dict[str, Any]:
    return _set_paused(server, client, call, paused=True)


async def _resume(server: ControlServer, client: _Client, call: Call) -> dict[str, Any]:
    return _set_paused(server, client, call, paused=False)


def _set_paused(server: ControlServer, client: _Client, call: Call, *, paused: bool) -> dict[str, Any]:
    results, began = [], time.monotonic()
    for name in _known(server, call.parameters["names"]):
        service = server.supervisor.services.get(name)
        if service is None:
            why = server.supervisor.snapshot.broken[name].splitlines()[0]
        else:
            why = service.why_not_pausable() if paused else ""
        changed = service is not None and not why and service.listeners.paused is not paused
        if service is not None and changed:
            verb = "pause" if paused else "resume"
            server.supervisor.log.message(f"{verb} asked for by pid {client.pid} uid {client.uid}", service=name)
            (service.ask_pause if paused else service.ask_resume)()
        result = _result(server, name, began, ok=not why, changed=changed)
        results.append({**result, "note": why or result["note"]})
    return {"results": results}


async def _wait(server: ControlServer, client: _Client, call: Call) -> dict[str, Any]:
    return await _carry_out(server, client, call, "wait", None, _waits_for(call.parameters["for"]))


async def _kill(server: ControlServer, client: _Client, call: Call) -> dict[str, Any]:
    names = _known(server, call.parameters["names"])
    text = call.parameters.get("signal") or "TERM"
    signo = signal.Signals.__members__.get(f"SIG{text.upper().removeprefix('SIG')}")
    if signo is None:
        raise _invalid("signal")
    began = time.monotonic()
    results = []
    for name in names:
        service = server.supervisor.services.get(name)
        pids = service.mains() if service is not None else []
        result = _result(server, name, began, ok=bool(pids), changed=bool(pids))
        if service is not None and pids:
            server.supervisor.log.message(
                f"kill -s {signo.name.removeprefix('SIG')} asked for by pid {client.pid} uid {client.uid}", service=name
            )
            service.tell_mains(signo)
        else:
            result["note"] = "does not run"
        results.append(result)
    return {"results": results}


async def _reload_service(server: ControlServer, client: _Client, call: Call) -> dict[str, Any]:
    names = _known(server, call.parameters["names"])
    supervisor = server.supervisor
    began = time.monotonic()
    results = {name: _result(server, name, began, ok=False) for name in names}
    told: dict[str, tuple[Service, list[int], int, int]] = {}
    for name in names:
        service = supervisor.services.get(name)
        mark = _newest(server, name)
        done = service.reloaded if isinstance(service, ProcessService) else 0
        if service is not None and service.ask_reload():
            supervisor.log.message(f"reload asked for by pid {client.pid} uid {client.uid}", service=name)
            told[name] = service, service.mains()[:1], mark, done
        else:
            results[name]["note"] = "does not run"
    supervisor.end_of_turn()
    if told and call.parameters.get("wait") is not False:
        # A program that does not handle the signal ends by it, and that shows at once.
        deadline = trio.current_time() + _SETTLE_S
        with server.while_connected(client):
            for service, pids, _, done in told.values():
                if isinstance(service, ProcessService):
                    await _until_reloaded(service, pids, done, deadline)
    for name, (service, pids, mark, done) in told.items():
        well = service.mains()[:1] == pids or isinstance(service, ConnectionService)
        if isinstance(service, ProcessService):
            well = not service.reload_failed and (service.reloaded != done or (well and service.can_change))
        results[name] = _result(server, name, began, ok=well, changed=True, mark=None if well else mark)
        if not well and isinstance(service, ProcessService) and service.reload_failed:
            results[name]["note"] = service.reload_failed
    return {"results": list(results.values())}


async def _until_reloaded(service: ProcessService, pids: list[int], done: int, deadline: float) -> None:
    with trio.move_on_at(deadline):
        while service.mains()[:1] == pids and not service.reloading and service.reloaded == done:
            await service.changed.wait()
    while service.reloading:  # until READY=1, the end of it, or its ready_timeout
        await service.changed.wait()


async def _is(server: ControlServer, client: _Client, call: Call) -> dict[str, Any]:
    what = call.parameters["what"]
    yes: list[str] = []
    no: list[str] = []
    for name in _known(server, call.parameters["names"]):
        service = server.supervisor.services.get(name)
        if what == "failed":
            so = service is None or service.state is State.FAILED
        elif service is None:
            so = False
        else:
            so = _is_ready(service) if what == "ready" else service.state.value in _ACTIVE
        (yes if so else no).append(name)
    return {"yes": yes, "no": no}


async def _health(server: ControlServer, client: _Client, call: Call) -> dict[str, Any]:
    problems = []
    for row in server.supervisor.statistics():
        service = server.supervisor.services.get(row.name)
        well = row.state in _HEALTHY
        if service is not None:
            # While an on-demand service starts its clients wait, as they do for every start of it.
            starts = service.state is State.STARTING and service.spec.run != "on-demand"
            well = well and not service.listeners.waiting and not starts
            well = well and not (isinstance(service, ProcessService) and service.health.unhealthy)
        if not well:
            problems.append(f"{row.name}: {row.state}" + (f": {row.note}" if row.note else ""))
    if server.supervisor.stopping:
        problems.append("superd is stopping")
    return {"live": True, "ready": not problems, "problems": problems}


async def _access(server: ControlServer, client: _Client, call: Call) -> dict[str, Any]:
    (name,) = _known(server, [call.parameters["name"]])
    service = server.supervisor.services.get(name)
    if service is None:
        return {"allowed": False, "reason": "its file has errors, so nobody is let in"}
    door = access.Door(service.spec.access, server.supervisor.names)
    asked = call.parameters["address"]
    try:
        if asked.startswith("user:"):
            facts = access.client_named(asked.removeprefix("user:"))
        else:
            facts = door.client_at(asked)
        decision = door.judge(facts)
        if decision.needs_names:
            await server.supervisor.names.find(access.packed(asked))
            decision = door.judge(door.client_at(asked))
    except (ValueError, KeyError, OverflowError):
        raise _invalid("address") from None
    return {"allowed": decision.allowed, "reason": decision.reason}


async def _metrics(server: ControlServer, client: _Client, call: Call) -> dict[str, Any]:
    return {"text": await metrics.render(server.supervisor)}


async def _history(server: ControlServer, client: _Client, call: Call) -> dict[str, Any]:
    plots = [{"name": name, "connections": values} for name, values in server.supervisor.meter.plots()]
    return {"slot": SLOT_S, "span": SLOT_S * SLOTS, "services": plots}


async def _processes_of(server: ControlServer, client: _Client, call: Call) -> dict[str, Any]:
    services = _services(server, call.parameters.get("names"))
    return {"processes": metrics.members(server.supervisor, services)}


async def _shutdown(server: ControlServer, client: _Client, call: Call) -> dict[str, Any]:
    supervisor = server.supervisor
    supervisor.log.message(f"shutdown asked for by pid {client.pid} uid {client.uid}")
    supervisor.shut_down()
    return {"services": len(supervisor.services), "pid": os.getppid()}


async def _upgrade(server: ControlServer, client: _Client, call: Call) -> dict[str, Any]:
    supervisor = server.supervisor
    if server.upgrading or supervisor.stopping:
        why = "superd is stopping" if supervisor.stopping else "somebody else has asked for it just now"
        return {"ok": False, "version": "", "was": __version__, "why": why}
    server.upgrading = True
    try:
        supervisor.log.message(f"upgrade asked for by pid {client.pid} uid {client.uid}", level="notice")
        version, why = await upgrade.try_out()
        reply = {"ok": not why, "version": version, "was": __version__, "why": why}
        if why:
            supervisor.log.message(f"cannot upgrade: {why}; superd goes on as it is", level="err")
            return reply
        supervisor.log.message(f"superd {version} takes over from {__version__}", level="notice")
        with contextlib.suppress(*_GONE):
            await client.send(varlink.pack_reply(reply))
        await upgrade.hand_over(supervisor)
    finally:
        server.upgrading = False
    raise ConnectionResetError(errno.ECONNRESET, "superd stops")


async def _reload(server: ControlServer, client: _Client, call: Call) -> dict[str, Any]:
    strict, dry_run = bool(call.parameters.get("strict")), bool(call.parameters.get("dry_run"))
    return await _reloaded(server, strict=strict, dry_run=dry_run, by=f"pid {client.pid} uid {client.uid}")


async def _diff(server: ControlServer, client: _Client, call: Call) -> dict[str, Any]:
    return await _reloaded(server, strict=False, dry_run=True, by="")


async def _reloaded(server: ControlServer, *, strict: bool, dry_run: bool, by: str) -> dict[str, Any]:
    reloader = server.supervisor.reloader
    assert reloader is not None
    try:
        return outcome_parameters(await reloader.reload(strict=strict, dry_run=dry_run, by=by))
    except OSError as error:
        reason = f"cannot read the files: {(error.strerror or str(error)).lower()}"
        raise VarlinkError(f"{_PREFIX}BadCall", reason=reason) from None


async def _get_info(server: ControlServer, client: _Client, call: Call) -> dict[str, Any]:
    return {
        "vendor": "superd", "product": "superd", "version": __version__, "url": "", "interfaces": sorted(_INTERFACES),
    }  # fmt: skip


async def _get_interface_description(server: ControlServer, client: _Client, call: Call) -> dict[str, Any]:
    name = call.parameters["interface"]
    interface = _INTERFACES.get(name)
    if interface is None:
        raise VarlinkError(f"{varlink.SERVICE}.InterfaceNotFound", interface=name[:200])
    return {"description": interface.text}


METHODS: dict[str, Callable[[ControlServer, _Client, Call], Awaitable[dict[str, Any]]]] = {
    f"{_PREFIX}List": _list,
    f"{_PREFIX}Sockets": _list_sockets,
    f"{_PREFIX}Status": _status,
    f"{_PREFIX}Connections": _connections,
    f"{_PREFIX}Show": _show,
    f"{_PREFIX}Logs": _logs,
    f"{_PREFIX}Events": _events,
    f"{_PREFIX}Start": _start,
    f"{_PREFIX}Stop": _stop,
    f"{_PREFIX}Restart": _restart,
    f"{_PREFIX}Pause": _pause,
    f"{_PREFIX}Resume": _resume,
    f"{_PREFIX}Drain": _drain,
    f"{_PREFIX}Kill": _kill,
    f"{_PREFIX}ReloadService": _reload_service,
    f"{_PREFIX}Wait": _wait,
    f"{_PREFIX}Is": _is,
    f"{_PREFIX}Health": _health,
    f"{_PREFIX}Access": _access,
    f"{_PREFIX}Reload": _reload,
    f"{_PREFIX}Diff": _diff,
    f"{_PREFIX}Metrics": _metrics,
    f"{_PREFIX}History": _history,
    f"{_PREFIX}Processes": _processes_of,
    f"{_PREFIX}Shutdown": _shutdown,
    f"{_PREFIX}Upgrade": _upgrade,
    f"{varlink.SERVICE}.GetInfo": _get_info,
    f"{varlink.SERVICE}.GetInterfaceDescription": _get_interface_description,
}

# What members of control_group may ask. Whatever is not here is for those who may do everything.
LOOKING = frozenset(
    [f"{_PREFIX}{name}" for name in (
        "List", "Sockets", "Status", "Connections", "Logs", "Events", "Is", "Health", "Wait", "Access", "Show", "Diff",
        "Metrics", "History", "Processes",
    )]
    + [f"{varlink.SERVICE}.GetInfo", f"{varlink.SERVICE}.GetInterfaceDescription"]
)  # fmt: skip
