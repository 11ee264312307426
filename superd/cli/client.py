"""superctl's connection to superd: varlink calls over the control socket."""

from __future__ import annotations

import os
import socket
import struct
import sys
import time

from superd import __version__
from superd.cli.failure import (
    FAILED,
    NO_SUCH_SERVICE,
    NOT_PERMITTED,
    TIMED_OUT,
    UNREACHABLE,
    USAGE,
    Failure,
)
from superd.core import varlink

TYPE_CHECKING = False
if TYPE_CHECKING:  # importing typing takes 3 ms
    from collections.abc import Callable, Iterator
    from typing import Any

    Row = dict[str, Any]

_PREFIX = "io.superd.Control."
_PROGRESS_S = 0.2


class Control:
    """A connection to superd. address: what -s says, None for the default; timeout_s: for everything together."""

    def __init__(self, address: str | None, timeout_s: float | None) -> None:
        self._deadline = None if timeout_s is None else time.monotonic() + timeout_s
        self._timeout_s = timeout_s
        self._splitter = varlink.Splitter(varlink.MAX_REPLY_BYTES)
        self._replies: list[bytes] = []
        chosen = address or os.environ.get("SUPERD_SOCKET")
        self._by_default = not chosen
        self.waiting: Callable[[], None] | None = None  # called now and then while an answer is waited for
        try:
            self.path = varlink.socket_path(chosen or varlink.default_socket(os.environ, os.geteuid()))
        except ValueError as error:
            raise Failure(USAGE, f"cannot use the control socket {chosen!r}: {error}") from None
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._connect()
            if address is None:
                self._check_owner()
        except Failure:
            self.close()
            raise

    def close(self) -> None:
        self._socket.close()

    def _connect(self) -> None:
        if self._timeout_s is not None:
            # Of a UNIX socket, connect(2) waits for room in the queue; non-blocking it would fail at once.
            whole = int(self._timeout_s)
            timeval = struct.pack("@ll", whole, int((self._timeout_s - whole) * 1e6) or 1)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeval)
        try:
            self._socket.connect("\0" + self.path[1:] if self.path.startswith("@") else self.path)
        except BlockingIOError:
            raise self._too_slow() from None
        except PermissionError:
            raise Failure(
                NOT_PERMITTED,
                f"cannot reach superd at {self.path}: permission denied; root and the user that superd runs as may "
                "use it, and whom control_group and control_admins name, superd.toml(5)",
            ) from None
        except OSError as error:
            raise Failure(UNREACHABLE, f"cannot reach superd at {self.path}: {self._why(error)}") from None

    def _why(self, error: OSError) -> str:
        if isinstance(error, ConnectionRefusedError):
            return "nobody listens there: superd is not running"
        if not isinstance(error, FileNotFoundError):
            return (error.strerror or str(error)).lower()
        roots = varlink.default_socket({}, 0)
        if self._by_default and self.path != roots and os.path.exists(roots):
            return f"no such file; there is {roots}, which is root's superd (`superctl -s {roots}`, as root)"
        return "no such file; superd is not running, or has another socket (-s SOCKET, $SUPERD_SOCKET)"

    def _check_owner(self) -> None:
        """Whoever listens at a path that nobody named could be anybody (unix(7), SO_PEERCRED)."""
        raw = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        uid = int.from_bytes(raw[4:8], sys.byteorder)
        if uid not in (0, os.geteuid()):
            raise Failure(
                NOT_PERMITTED, f"will not talk to {self.path}: uid {uid} listens there (-s names it if it is meant)"
            )

    def call(self, method: str, **parameters: Any) -> Row:
        """The reply. Raises Failure for an error."""
        self._send(varlink.pack_call(_PREFIX + method, _given(parameters)))
        return self._receive()[0]

    def version(self) -> str:
        """Of the superd that answers."""
        self._send(varlink.pack_call(f"{varlink.SERVICE}.GetInfo", {}))
        return str(self._receive()[0].get("version"))

    def stream(self, method: str, **parameters: Any) -> Iterator[Row]:
        self._send(varlink.pack_call(_PREFIX + method, _given(parameters), more=True))
        more = True
        while more:
            reply, more = self._receive()
            yield reply

    def wait_closed(self) -> None:
        """Until superd closes the connection."""
        while self._read():
            pass

    def _send(self, data: bytes) -> None:
        try:
            while data:
                data = data[self._socket.send(data, socket.MSG_NOSIGNAL) :]
        except BlockingIOError:
            raise self._too_slow() from None
        except (BrokenPipeError, ConnectionResetError):
            pass  # refused; why is there to be read

    def _receive(self) -> tuple[Row, bool]:
        try:
            while not self._replies:
                data = self._read()
                if not data:
                    raise Failure(UNREACHABLE, "superd closed the connection without an answer; its log may say why")
                self._replies += self._splitter.feed(data)
            reply = varlink.parse_reply(self._replies.pop(0))
        except varlink.ProtocolError as error:
            raise Failure(UNREACHABLE, f"cannot understand what answers at {self.path}: {error}") from None
        if reply.error is not None:
            raise _explain(reply.error, reply.parameters)
        return reply.parameters, reply.continues

    def _read(self) -> bytes:
        while self.waiting is not None and not self._is_readable(_PROGRESS_S):
            self.waiting()
        if self._deadline is not None:
            left = self._deadline - time.monotonic()
            if left <= 0:
                raise self._too_slow()
            self._socket.settimeout(left)
        try:
            return self._socket.recv(1 << 16)
        except TimeoutError:
            raise self._too_slow() from None
        except ConnectionResetError:
            return b""

    def _is_readable(self, wait_s: float) -> bool:
        """Also when the time for everything is over."""
        import select

        if self._deadline is not None:
            left = self._deadline - time.monotonic()
            if left <= 0:
                return True
            wait_s = min(wait_s, left)
        return bool(select.select([self._socket], [], [], wait_s)[0])

    def _too_slow(self) -> Failure:
        return Failure(TIMED_OUT, f"no answer within {self._timeout_s:g} s; superd goes on with what it was asked for")


def _given(parameters: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in parameters.items() if value is not None}


def _explain(error: str, parameters: Row) -> Failure:
    name = error.rpartition(".")[2]
    if name == "NoSuchService":
        similar = parameters.get("similar") or []
        hint = f"; did you mean '{similar[0]}'?" if similar else "; `superctl list` shows them"
        return Failure(NO_SUCH_SERVICE, f"there is no service '{parameters.get('name')}'{hint}")
    if name == "PermissionDenied":
        return Failure(
            NOT_PERMITTED, "not permitted; root, the user that superd runs as and control_admins may do that"
        )
    if name == "TooManyClients":
        return Failure(UNREACHABLE, f"superd has {parameters.get('limit')} superctl already; try again later")
    if name == "InvalidParameter":
        which = str(parameters.get("parameter"))
        right = {"signal": "a name, as TERM or SIGUSR1", "address": "an IP address, or user:NAME"}.get(which)
        return Failure(USAGE, f"superd does not take this value of '{which}'" + (f": write {right}" if right else ""))
    if name in ("MethodNotFound", "InterfaceNotFound", "MethodNotImplemented"):
        return Failure(UNREACHABLE, f"this superd is of another version than superctl {__version__}: {name}")
    return Failure(FAILED, f"superd answers {name}: {parameters.get('reason', '')}")
