"""Python handlers in a spawner: a function or class that serves connections in forked children, without exec.

The module is imported once, in the service's own context; a connection costs a fork. Everything that a handler sees
of its connection is a Connection, or what socketserver and http.server have it see.
"""

from __future__ import annotations

import gc
import importlib
import os
import socket
import sys
import time
import traceback

TYPE_CHECKING = False  # typing itself would cost the spawner memory; type checkers know the name
if TYPE_CHECKING:
    import io
    from collections.abc import Callable, Mapping, Set
    from typing import IO, Any, NoReturn

    Served = tuple[socket.socket, Callable[..., object], tuple[Any, ...], IO[Any] | None]


_WARM_RUNS = 16


class HandlerError(Exception):
    """The handler cannot be imported; the text says why and where, in one line."""


class Library:
    """The directories that Python imports from, held open by who may read them.

    Python may be installed where a service's user cannot go (below root's home); its modules are no secret. A
    directory that is open can be reached as /proc/self/fd/N, whatever its parents say (proc(5)).
    """

    def __init__(self) -> None:
        self._held: list[tuple[str, int]] = []
        for path in sys.path:
            try:
                self._held.append((path, os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)))
            except OSError:
                continue  # a .zip that is not there

    def keep(self) -> None:
        """As the service's user: go through the open directory where the path is barred."""
        moved = {}
        for path, fd in self._held:
            if os.access(path, os.R_OK | os.X_OK):
                os.close(fd)
            else:
                moved[path] = f"/proc/self/fd/{fd}"
        if not moved:
            return
        sys.path[:] = [moved.get(path, path) for path in sys.path]
        # Packages that are imported already look for their other modules where they came from.
        for module in list(sys.modules.values()):
            places = getattr(module, "__path__", None)
            if isinstance(places, list):
                places[:] = [_moved(place, moved) for place in places]


def _moved(place: str, moved: dict[str, str]) -> str:
    inside = [path for path in moved if place.startswith(path + "/")]
    if not inside:
        return place
    longest = max(inside, key=len)
    return moved[longest] + place[len(longest) :]


class Connection:
    """What a handler function gets.

    socket       blocking; fd 0 and 1 are the same connection, so print() and input() reach the client too
    input        buffered binary file to read from
    output       buffered binary file to write to; flushed when the handler is over, however
    remote_addr  numeric address, path of a UNIX client, or None; remote_port: None but for IP and vsock
    local_addr, local_port
    id           as in the log and SUPERD_CONNECTION; service: its name
    """

    def __init__(self, sock: socket.socket, variables: Mapping[str, str], service: str) -> None:
        self.socket = sock
        # Before the fork, as all that can be: what a child writes to first costs it a fault and a copy of a page.
        self.input: io.BufferedReader = sock.makefile("rb")
        self.output: io.BufferedWriter = sock.makefile("wb")
        self.remote_addr = variables.get("REMOTE_ADDR")
        self.remote_port = _number(variables.get("REMOTE_PORT"))
        self.local_addr = variables.get("TCPLOCALIP")
        self.local_port = _number(variables.get("TCPLOCALPORT"))
        self.id = variables["SUPERD_CONNECTION"]
        self.service = service


class _Server:
    """What a handler of socketserver may ask of its server."""

    def __init__(self, sock: socket.socket, handler: Any) -> None:
        address = sock.getsockname()
        self.server_address = address
        self.server_name: str = address[0] if type(address) is tuple else ""
        self.server_port: int = address[1] if type(address) is tuple else 0
        self.address_family = sock.family
        self.socket_type = sock.type
        self.timeout = None
        self.RequestHandlerClass = handler


def _number(text: str | None) -> int | None:
    return None if text is None else int(text)


class Handler:
    """An imported handler.

    files     where its code came from, as far as that is below the working directory
    began_ns  when the import began, of the real-time clock: a file that is younger may be another than what was read
    """

    def __init__(self, reference: str) -> None:
        """Raises HandlerError."""
        module_name, _, name = reference.partition(":")
        directory = os.getcwd()
        self.began_ns = time.time_ns()
        sys.path.insert(0, directory)
        try:
            target: Any = importlib.import_module(module_name)
            for part in name.split("."):
                target = getattr(target, part)
            if not callable(target):
                raise TypeError(f"{reference} is no function and no class")
        except BaseException as error:  # boundary: whatever somebody's module does when it is imported
            raise HandlerError(f"cannot import {reference}: {_describe(error, directory)}") from None
        finally:
            _flush(sys.stdout, sys.stderr)  # what the module has printed, or each client would get it
        base = getattr(sys.modules.get("socketserver"), "BaseRequestHandler", None)
        self.is_request_handler = base is not None and isinstance(target, type) and issubclass(target, base)
        self.target: Callable[..., Any] = target
        files = {getattr(module, "__file__", None) or "" for module in list(sys.modules.values())}
        self.files = sorted(path for path in files if path.startswith(directory.rstrip("/") + "/"))
        _warm_up()
        gc.collect()
        gc.freeze()

    def prepare(self, fd: int, variables: Mapping[str, str], service: str) -> Served:
        """What serves the connection in a child that is forked next. variables: of this connection. The fd stays the
        caller's: detach() the socket when that child has been forked. Raises OSError."""
        sock = socket.socket(fileno=fd)
        try:
            if self.is_request_handler:
                return sock, self.target, (sock, _client_address(sock, variables), _Server(sock, self.target)), None
            connection = Connection(sock, variables, service)
            return sock, self.target, (connection,), connection.output
        except OSError:
            sock.detach()
            raise


def serve(call: Callable[..., object], arguments: tuple[Any, ...], output: IO[Any] | None) -> NoReturn:
    """In a forked child, whose fds 0 and 1 are the connection too: until the handler returns, then its end."""
    status = 1
    try:
        call(*arguments)
        if output is not None:
            output.flush()
        sys.stdout.flush()
        _flush(sys.stderr)
        os._exit(0)
    except SystemExit as error:
        status = _exit_status(error)
    except BaseException:  # boundary: the process ends here, and says why
        sys.excepthook(*sys.exc_info())
    finally:
        _flush(sys.stderr, *([output] if output else []), sys.stdout)
        os._exit(status)


def _warm_up() -> None:
    """Do here what each child does. The interpreter writes to code that it runs for the first times, and to its caches
    (PEP 659); a child would do it to copies."""
    try:
        ends = socket.socketpair()
        with ends[0], ends[1]:
            for _ in range(_WARM_RUNS):
                connection = Connection(ends[0], {"SUPERD_CONNECTION": ""}, "")
                connection.output.write(b" ")
                connection.output.flush()
                ends[1].recv(1)
    except OSError:
        pass  # no fd for it: children do it themselves


class Environment:
    """os.environ and environ(7) of a handler and of its children.

    The variables of a connection get there without putenv(3), for glibc keeps each value that it was ever given, and
    some of them are new with each connection.
    """

    def __init__(self, variables: Mapping[str, str]) -> None:
        """variables: all that there is, while the module is imported."""
        import ctypes

        self._strings: Callable[[list[bytes]], Any] = lambda words: (ctypes.c_char_p * (len(words) + 1))(*words)
        self._environ = ctypes.c_void_p.in_dll(ctypes.PyDLL(None), "environ")
        self._address: Callable[[Any], int] = ctypes.addressof
        self._data: dict[bytes, bytes] = vars(os.environ)["_data"]  # which os.environb shares
        self._names: Set[bytes] = frozenset()  # of the last connection
        self._given: Mapping[str, str] = {}
        os.environ.clear()
        self.change(variables)

    def change(self, variables: Mapping[str, str]) -> None:
        """What is given from outside is this now; what the module has set itself stays."""
        for name in self._given.keys() - variables.keys():
            os.environ.pop(name, None)
        for name, value in variables.items():
            if self._given.get(name) != value:
                os.environ[name] = value
        self._given = dict(variables)

    def prepare(self, variables: Mapping[str, str]) -> tuple[dict[bytes, bytes], Any]:
        """What `enter` takes, with these variables besides what os.environ has."""
        found = {os.fsencode(name): os.fsencode(value) for name, value in variables.items()}
        rest = [b"%b=%b" % pair for pair in self._data.items() if pair[0] not in found and pair[0] not in self._names]
        return found, self._strings([*rest, *(b"%b=%b" % pair for pair in found.items())])

    def enter(self, prepared: tuple[dict[bytes, bytes], Any]) -> None:
        """`prepared` has to live as long as the next process, or until another is entered."""
        found, strings = prepared
        for name in self._names - found.keys():
            del self._data[name]
        self._data.update(found)
        self._names = found.keys()
        self._environ.value = self._address(strings)


def _flush(*streams: IO[Any]) -> None:
    for stream in streams:
        try:
            stream.flush()
        except (OSError, ValueError):
            pass  # the client has gone, or the module has closed it


def _describe(error: BaseException, directory: str) -> str:
    """As the last line of its traceback, with the innermost place in the service's own code."""
    text = "".join(traceback.format_exception_only(error)).strip().splitlines()[-1]
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if frame.filename.startswith(directory.rstrip("/") + "/")]
    if isinstance(error, SyntaxError) and error.filename:
        return f"{text} ({error.filename}:{error.lineno})"
    return f"{text} ({own[-1].filename}:{own[-1].lineno})" if own else text


def _client_address(sock: socket.socket, variables: Mapping[str, str]) -> Any:
    try:
        address = sock.getpeername()
    except OSError:
        return ("", 0)  # it has gone
    host = variables.get("TCPREMOTEIP")
    if host is None:
        return address
    named = host, int(variables["TCPREMOTEPORT"])
    if type(address) is tuple and (address[0].removeprefix("::ffff:"), address[1]) == named:
        return address
    return named  # a PROXY header has told


def _exit_status(error: SystemExit) -> int:
    if error.code is None or isinstance(error.code, int):
        return (error.code or 0) & 255
    sys.stderr.write(f"{error.code}\n")
    return 1
