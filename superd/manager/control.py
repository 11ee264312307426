"""The control socket: varlink calls from superctl(1), one task for each client.

What can be asked is the text of core/interface.py, and METHODS says which function of queries.py or orders.py answers:
nothing is looked up by a name that a client sends (J1). Who may ask, and whether for more than a look, is decided once
per connection, by SO_PEERCRED (J3). The socket lives on when the manager dies: the keeper holds it, and clients wait in
its queue.
"""

from __future__ import annotations

import contextlib
import errno
import grp
import os
import select
import socket
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import outcome
import trio

from superd import __version__
from superd.core import varlink
from superd.core.interface import INTERFACES, PREFIX
from superd.core.spec import Address, SocketSpec
from superd.core.varlink import Call, VarlinkError, invalid_parameter
from superd.manager import access, environment, orders, queries
from superd.system import holders, peers, sockets

if TYPE_CHECKING:
    from superd.manager.supervisor import Supervisor

CLIENTS, CLIENTS_PER_UID = 64, 16
REQUEST_S = 10.0  # to send a whole call
REPLY_S = 30.0  # to take a reply
_RETRY_FIRST_S, _RETRY_MAX_S = 1.0, 30.0
_CHECK_PATH_S = 10.0
_BACKLOG = 1024

_GONE = (OSError, trio.BrokenResourceError, trio.ClosedResourceError, trio.TooSlowError)


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
        self._connected: dict[Client, None] = {}  # in order
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

    def _admit(self, conn: socket.socket) -> Client | None:
        """The client, or None: refused and closed, without a task or a wait."""
        refusal: VarlinkError | None = None
        try:
            pid, uid, gid = peers.credentials(conn.fileno())
            rights = self._rights(conn.fileno(), uid, gid)
            if rights is None:
                refusal = VarlinkError(f"{varlink.SERVICE}.PermissionDenied")
                self.supervisor.log.error_limited(
                    ("control", uid), f"control socket: uid {uid} (pid {pid}) refused", level="warning"
                )
            elif limit := self._has_no_room(uid, rights):
                refusal = VarlinkError(f"{PREFIX}TooManyClients", limit=limit)
            if refusal is not None:
                conn.send(varlink.pack_error(refusal), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except OSError:
            pass  # it has gone
        else:
            if refusal is None:
                client = Client(conn, pid, uid, may_act=rights == "act")
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

    def _forget(self, client: Client) -> None:
        if client in self._connected:
            del self._connected[client]
            self.clients[client.uid] -= 1

    async def _contain(self, client: Client) -> None:
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

    async def _serve_client(self, client: Client) -> None:
        try:
            while True:
                try:
                    data = await client.receive()
                    if data is None:
                        return
                    call = varlink.parse_call(data)
                except varlink.ProtocolError as error:
                    await client.send(varlink.pack_error(VarlinkError(f"{PREFIX}BadCall", reason=str(error))))
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

    async def _answer(self, client: Client, call: Call) -> dict[str, Any]:
        """Raises VarlinkError."""
        name, _, method = call.method.rpartition(".")
        interface = INTERFACES.get(name)
        if interface is None:
            raise VarlinkError(f"{varlink.SERVICE}.InterfaceNotFound", interface=name[:200])
        handler = METHODS.get(call.method)
        if handler is None:
            raise VarlinkError(f"{varlink.SERVICE}.MethodNotFound", method=call.method[:200])
        if not client.may_act and call.method not in LOOKING:
            raise VarlinkError(f"{varlink.SERVICE}.PermissionDenied")
        wrong = interface.check(call.parameters, interface.methods[method][0])
        if wrong is not None:
            raise invalid_parameter(wrong)
        return await handler(self, client, call)

    @contextlib.contextmanager
    def while_connected(self, client: Client) -> Iterator[None]:
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


class Client:
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

    async def tell(self, data: bytes) -> None:
        """send(), to one who may have gone."""
        with contextlib.suppress(*_GONE):
            await self.send(data)

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


async def _get_info(server: ControlServer, client: Client, call: Call) -> dict[str, Any]:
    return {
        "vendor": "superd", "product": "superd", "version": __version__, "url": "", "interfaces": sorted(INTERFACES),
    }  # fmt: skip


async def _get_interface_description(server: ControlServer, client: Client, call: Call) -> dict[str, Any]:
    name = call.parameters["interface"]
    interface = INTERFACES.get(name)
    if interface is None:
        raise VarlinkError(f"{varlink.SERVICE}.InterfaceNotFound", interface=name[:200])
    return {"description": interface.text}


METHODS: dict[str, Callable[[ControlServer, Client, Call], Awaitable[dict[str, Any]]]] = {
    f"{PREFIX}List": queries.list_services,
    f"{PREFIX}Sockets": queries.sockets,
    f"{PREFIX}Status": queries.status,
    f"{PREFIX}Connections": queries.connections,
    f"{PREFIX}Show": queries.show,
    f"{PREFIX}Logs": queries.logs,
    f"{PREFIX}Events": queries.events,
    f"{PREFIX}Start": orders.start,
    f"{PREFIX}Stop": orders.stop,
    f"{PREFIX}Restart": orders.restart,
    f"{PREFIX}Pause": orders.pause,
    f"{PREFIX}Resume": orders.resume,
    f"{PREFIX}Drain": orders.drain,
    f"{PREFIX}Kill": orders.kill,
    f"{PREFIX}ReloadService": orders.reload_service,
    f"{PREFIX}Wait": orders.wait,
    f"{PREFIX}Is": queries.is_so,
    f"{PREFIX}Health": queries.health,
    f"{PREFIX}Access": queries.may_connect,
    f"{PREFIX}Reload": orders.reload_files,
    f"{PREFIX}Diff": orders.diff,
    f"{PREFIX}Metrics": queries.metrics_text,
    f"{PREFIX}History": queries.history,
    f"{PREFIX}Processes": queries.processes,
    f"{PREFIX}Shutdown": orders.shutdown,
    f"{PREFIX}Upgrade": orders.upgrade_superd,
    f"{varlink.SERVICE}.GetInfo": _get_info,
    f"{varlink.SERVICE}.GetInterfaceDescription": _get_interface_description,
}

# What members of control_group may ask. Whatever is not here is for those who may do everything.
LOOKING = frozenset(
    [f"{PREFIX}{name}" for name in (
        "List", "Sockets", "Status", "Connections", "Logs", "Events", "Is", "Health", "Wait", "Access", "Show", "Diff",
        "Metrics", "History", "Processes",
    )]
    + [f"{varlink.SERVICE}.GetInfo", f"{varlink.SERVICE}.GetInterfaceDescription"]
)  # fmt: skip
