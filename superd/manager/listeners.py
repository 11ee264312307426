"""Listeners of one service at run time: bound, waiting for their address, adopted from an earlier manager.

The keeper holds a copy of each under "listener:SERVICE:ADDRESS=REAL ADDRESS", so that a manager's death closes nothing.
An address that is busy or not there yet is tried again for ever, 1 s doubling to 30 s (A13, A14).
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import socket
import stat
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, cast

from superd.core.spec import Address, SocketSpec
from superd.manager.keeperlink import Inheritance, KeeperLink
from superd.manager.logs import Log
from superd.manager.watch import Timer, Timers, Watch
from superd.system import holders, sockets

_RETRY_FIRST_S, _RETRY_MAX_S = 1.0, 30.0


@dataclass(slots=True, eq=False)
class Listener:
    """An open listener. `socket` owns the fd; `family` as accept gives peers."""

    spec: SocketSpec
    address: Address
    socket: socket.socket
    identity: tuple[int, int] | None
    key: str
    watched: bool = False
    episode: bool = False  # out of fds or memory, and said so (A1)
    pause_s: float = 0.1
    local: bytes = b""  # "\0IP\0PORT" where every connection has the same local address

    def __post_init__(self) -> None:
        address = self.address
        if address.is_ip and address.host not in (None, "localhost", "::", "0.0.0.0"):
            self.local = f"\0{address.host}\0{address.port}".encode()

    @property
    def fd(self) -> int:
        return self.socket.fileno()

    def accept(self) -> tuple[int, Any]:
        """fd and peer, as sockets.accept(); OSError as accept(2)."""
        sock = self.socket
        fd, peer = sock.take() if isinstance(sock, sockets.Inbox) else sockets.accept(sock)
        if self.spec.priority is not None:
            sockets.set_priority(fd, self.spec.priority)
        return fd, peer


class Listeners:
    """All listeners of a service. `changed()` is called when one more is bound; `waiting` says what is not."""

    def __init__(
        self,
        service: str | None,  # None: superd's own
        specs: tuple[SocketSpec, ...],
        trusted_uid: int,
        keeper: KeeperLink,
        watch: Watch,
        timers: Timers,
        log: Log,
        changed: Callable[[], None],
    ) -> None:
        self.service, self.specs, self.trusted_uid = service, specs, trusted_uid
        self.keeper, self.watch, self.timers, self.log = keeper, watch, timers, log
        self.changed = changed
        self.exclusive = False  # no process has them but superd
        self.open: list[Listener] = []
        self.draining = False  # watch none of them any more
        self.paused = False  # nor now; an operator says when again
        self.waiting: dict[int, str] = {}  # index of spec -> why not
        self._delays: dict[int, float] = {}
        self._retries: dict[int, Timer] = {}
        self._inherited: dict[str, list[int]] = {}

    @property
    def complete(self) -> bool:
        return not self.waiting

    def bind(self, inheritance: Inheritance, inherited: dict[str, list[int]]) -> None:
        """Adopt what an earlier manager had, bind the rest. Never raises: what fails is waited for."""
        self._inherited = inherited
        for index, spec in enumerate(self.specs):
            if not self._adopt(spec, inheritance):
                self._try(index)

    # -- a reload

    def give_up(self, listener: Listener) -> None:
        """To another service, which stores it under a name of its own; the fd is not closed."""
        self.unwatch(listener)
        self.keeper.send("drop", name=listener.key)
        self.open.remove(listener)

    def keep_only(self, staying: Iterable[object]) -> None:
        """Close the others, so that their addresses are free."""
        kept = {id(one) for one in staying}
        for listener in list(self.open):
            if id(listener) not in kept:
                self._close(listener, remove_path=True)

    def replace(self, specs: tuple[SocketSpec, ...], found: dict[int, list[Listener] | list[sockets.Bound]]) -> None:
        """`found` has, by index of `specs`, listeners that stay or come from another service, or new sockets. What is
        open and not among them is closed; what is missing is bound, and waited for if that fails."""
        self._forget_waiting()
        self.keep_only([one for rows in found.values() for one in rows])
        mine, self.open, self.specs = self.open, [], specs
        for index, spec in enumerate(specs):
            for one in found.get(index, ()):
                if isinstance(one, sockets.Bound):
                    key = self._key(spec, str(one.address))
                    self.keeper.send("store", [one.fd], name=key)
                    self._add(spec, one, key)
                    self.log.record("listening", service=self.service, address=str(one.address), socket=spec.name)
                    continue
                was, one.spec = one.spec, spec
                key = self._key(spec, str(one.address))
                if one not in mine:
                    one.key = key
                    self.keeper.send("store", [one.fd], name=key)
                    self.log.record("listening", service=self.service, address=str(one.address), socket=spec.name)
                self._apply(one, was)
                self.open.append(one)
        for index in range(len(specs)):
            if index not in found:
                self._try(index)

    def _apply(self, listener: Listener, was: SocketSpec) -> None:
        """Set the options of an open socket as its file has them now."""
        spec = listener.spec
        if spec == was:
            return
        asked = replace(spec, address=listener.address)
        try:
            sockets.apply_options(listener.fd, asked, replace(was, address=listener.address))
            if listener.identity is not None:
                sockets.apply_path(asked, listener.identity, trusted_uid=self.trusted_uid, was=was)
        except sockets.BindError as error:
            self.log.message(
                f"cannot change {listener.address}: {error}; it stays open as it was", level="warning",
                service=self.service,
            )  # fmt: skip

    def _forget_waiting(self) -> None:
        for timer in self._retries.values():
            timer.cancel()
        self._retries.clear()
        self._delays.clear()
        self.waiting.clear()

    def _key(self, spec: SocketSpec, real: str) -> str:
        return f"listener:{self.service or ''}:{spec.address}={real}"

    def _adopt(self, spec: SocketSpec, inheritance: Inheritance) -> bool:
        prefix = self._key(spec, "")
        found = [name for name in inheritance.held if name.startswith(prefix)]
        for name in found:
            (fd,) = inheritance.held.pop(name)
            address = _with_text(spec.address, name.removeprefix(prefix))
            identity = _identity(address) if address.path and not address.is_abstract else None
            try:
                self._add(spec, sockets.Bound(fd, address, identity), name)
            except OSError:  # bound anew, for which the address has to be free
                self.keeper.send("drop", name=name)
                os.close(fd)
                return False
        return bool(found)

    def _try(self, index: int, instead: SocketSpec | None = None) -> None:
        self._retries.pop(index, None)
        spec = self.specs[index]
        try:
            bound = sockets.bind_listener(
                instead or spec,
                inherited=self._inherited,
                trusted_uid=self.trusted_uid,
                find_holder=None if index in self.waiting else holders.find_holder,  # it reads all of /proc
                connections=self.exclusive,
            )
        except sockets.BindError as error:
            self._failed(index, error)
            return
        added = []
        try:
            for one in bound:
                key = self._key(spec, str(one.address))
                self.keeper.send("store", [one.fd], name=key)
                added.append(self._add(spec, one, key))
        except OSError as error:  # nobody can hold on to it: no memory for a message, or for asking what it is
            for listener in added:
                self._close(listener, remove_path=True)
            for one in bound[len(added) :]:
                os.close(one.fd)
            self._failed(index, sockets.BindError(error.errno or 0, "bind", spec.address))
            return
        self.waiting.pop(index, None)
        self._delays.pop(index, None)
        for listener in added:
            self.log.record("listening", service=self.service, address=str(listener.address), socket=spec.name)

    def _failed(self, index: int, error: sockets.BindError) -> None:
        address = self.specs[index].address
        delay = min(self._delays.get(index, _RETRY_FIRST_S / 2) * 2, _RETRY_MAX_S)
        self._delays[index] = delay
        # The holder is looked for once: what is said later without his name is no news.
        known = self.waiting.get(index, "")
        reason = known if known.startswith(str(error)) else str(error)
        if known != reason:
            until = " until it is free" if error.errno == errno.EADDRINUSE else ""
            self.log.message(
                f"cannot bind {address}: {reason}; trying again{until}",
                level="err",
                service=self.service,
            )
        self.waiting[index] = reason

        def again() -> None:
            self._try(index)
            if index not in self.waiting:
                self.changed()

        self._retries[index] = self.timers.after(delay, again)

    def _add(self, spec: SocketSpec, bound: sockets.Bound, key: str) -> Listener:
        # Of a FIFO only fileno and close are used, which a file has too.
        is_fifo = stat.S_ISFIFO(os.fstat(bound.fd).st_mode)
        kind = sockets.Inbox if bound.address.scheme == "tcpmux" else socket.socket
        owner = cast(socket.socket, io.FileIO(bound.fd)) if is_fifo else kind(fileno=bound.fd)
        listener = Listener(spec, bound.address, owner, bound.identity, key)
        self.open.append(listener)
        self.open.sort(key=lambda item: self.specs.index(item.spec))
        return listener

    def pause(self, listener: Listener, delay_s: float, resume: Callable[[], None]) -> None:
        self.unwatch(listener)
        self.timers.after(delay_s, resume)

    def watch_one(self, listener: Listener, callback: Callable[[int], None]) -> None:
        if not listener.watched and listener.fd >= 0 and not self.draining and not self.paused:
            self.watch.add(listener.fd, callback)
            listener.watched = True

    def unwatch(self, listener: Listener) -> None:
        if listener.watched:
            self.watch.remove(listener.fd)
            listener.watched = False

    def rebind(self, listener: Listener, why: str) -> None:
        """Close a listener that is of no use any more and open it again."""
        self.log.message(f"{listener.address}: {why}; opening it again", level="warning", service=self.service)
        index = self.specs.index(listener.spec)
        self._close(listener, remove_path=False)
        self._try(index, replace(listener.spec, address=listener.address))  # port 0: the same port again
        self.changed()

    def check_paths(self) -> None:
        """A UNIX path that something removed or replaced: nobody can reach the listener (D13)."""
        for listener in list(self.open):
            if listener.identity and not sockets.path_is_ours(listener.address.path or "", listener.identity):
                self.rebind(listener, "its path has gone")

    def _close(self, listener: Listener, *, remove_path: bool) -> None:
        self.unwatch(listener)
        if remove_path and listener.identity and listener.spec.remove_on_stop:
            sockets.remove_unix_path(listener.address.path or "", listener.identity, listener.spec.symlinks)
        if self.exclusive and listener.address.is_ip and listener.spec.address.scheme != "fd":
            # The keeper closes its copy in its own time; until then clients would queue, and the address be taken.
            with contextlib.suppress(OSError):
                listener.socket.shutdown(socket.SHUT_RDWR)
        self.keeper.send("drop", name=listener.key)
        listener.socket.close()
        self.open.remove(listener)

    def close(self, *, remove_paths: bool = True) -> None:
        self._forget_waiting()
        for listener in list(self.open):
            self._close(listener, remove_path=remove_paths)

    def describe_waiting(self) -> str:
        return "; ".join(f"{self.specs[index].address}: {why}" for index, why in self.waiting.items())


def _with_text(asked: Address, text: str) -> Address:
    """The bound address from its canonical text."""
    scheme, _, rest = text.partition(":")
    if (not asked.is_ip and asked.scheme != "fd") or not scheme.startswith(("tcp", "udp")):
        return asked if scheme == asked.scheme else Address(scheme, path=rest)  # type: ignore[arg-type]
    host, _, port = rest.rpartition(":")
    return Address(scheme, host.strip("[]") or None, int(port))  # type: ignore[arg-type]


def _identity(address: Address) -> tuple[int, int] | None:
    try:
        found = os.lstat(address.path or "")
    except OSError:
        return None
    return (found.st_dev, found.st_ino) if stat.S_ISSOCK(found.st_mode) or stat.S_ISFIFO(found.st_mode) else None
