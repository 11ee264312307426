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
    from collections.abc import Callable
    from typing import IO, Any, NoReturn


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

    input: io.BufferedReader
    output: io.BufferedWriter

    def __init__(self, sock: socket.socket, variables: dict[str, str], service: str) -> None:
        self.socket = sock
        self.remote_addr = variables.get("REMOTE_ADDR")
        self.remote_port = _number(variables.get("REMOTE_PORT"))
        self.local_addr = variables.get("TCPLOCALIP")
        self.local_port = _number(variables.get("TCPLOCALPORT"))
        self.id = variables["SUPERD_CONNECTION"]
        self.service = service

    def __getattr__(self, name: str) -> Any:
        """`input` and `output` are made when they are first asked for: many handlers need only one of them."""
        if name not in ("input", "output"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        made = self.socket.makefile("rb" if name == "input" else "wb")
        setattr(self, name, made)
        return made


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
        gc.collect()
        gc.freeze()

    def prepare(self, sock: socket.socket, variables: dict[str, str], service: str) -> Callable[[], NoReturn]:
        """What serves the connection in a child that is forked now. variables: of this connection."""
        if self.is_request_handler:
            arguments = (sock, _client_address(sock), _Server(sock, self.target))
            return lambda: self._serve(lambda: self.target(*arguments), sock)
        connection = Connection(sock, variables, service)
        return lambda: self._serve(lambda: self.target(connection), sock, connection)

    def _serve(self, call: Callable[[], object], sock: socket.socket, connection: Connection | None = None) -> NoReturn:
        """In the forked child, whose fds 0 and 1 are the connection too: until the handler returns, then its end."""
        status = 0
        try:
            with sock:
                call()
                if connection is not None and (output := vars(connection).get("output")):
                    output.flush()
            sys.stdout.flush()
        except SystemExit as error:
            status = _exit_status(error)
        except BaseException:  # boundary: the process ends here, and says why
            sys.excepthook(*sys.exc_info())
            status = 1
        finally:
            made = None if connection is None else vars(connection).get("output")
            _flush(sys.stderr, *([made] if made else []), sys.stdout)
            os._exit(status)


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


def _client_address(sock: socket.socket) -> Any:
    try:
        return sock.getpeername()
    except OSError:
        return ("", 0)  # it has gone


def _exit_status(error: SystemExit) -> int:
    if error.code is None or isinstance(error.code, int):
        return (error.code or 0) & 255
    sys.stderr.write(f"{error.code}\n")
    return 1
