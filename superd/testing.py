"""A superd of one's own, for tests of inetd programs and of anything else that it starts.

    def test_upper(superd):
        upper = superd.run("tcp:127.0.0.1:0", ["/usr/bin/tr", "a-z", "A-Z"])
        assert upper.ask(b"hello") == b"HELLO"
        (process,) = upper.exits(1)
        assert process.status == 0 and process.stderr == ""

The fixture is superd.pytest_plugin's, which pytest finds by itself. Everything here waits for what it needs, at most
`timeout` seconds (20), and raises AssertionError with superd's log when it does not come.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from superd.core.toml import format_pair

TIMEOUT_S = 20.0
_STOP_S = 40.0  # superd's own limit for stopping everything is 30 s


def connect_unix(scheme: str, path: str, timeout: float) -> socket.socket:
    """A client of a stream or seqpacket socket; "@NAME" is an abstract name. timeout: seconds. The caller closes it."""
    client = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET if scheme == "unix-seqpacket" else socket.SOCK_STREAM)
    client.settimeout(timeout)
    try:
        client.connect("\0" + path[1:] if path.startswith("@") else path)
    except OSError:
        client.close()
        raise
    return client


@dataclass(frozen=True)
class Process:
    """How a process of a service ended. Exactly one of `status` and `signal` (without SIG) is set."""

    pid: int
    connection: str | None
    peer: str | None
    status: int | None
    signal: str | None
    duration_s: float
    stderr: str


class Service:
    """A service of a running Daemon."""

    def __init__(self, daemon: Daemon, name: str) -> None:
        self.daemon, self.name = daemon, name

    @property
    def address(self) -> str:
        """Where it listens, as superd writes addresses, with the port that it really has."""
        return str(self.daemon.wait_records(1, event="listening", service=self.name)[0]["address"])

    def connect(self, timeout: float = TIMEOUT_S) -> socket.socket:
        """A connected client of a TCP or UNIX stream socket, with this timeout. The caller closes it."""
        scheme, _, rest = self.address.partition(":")
        if scheme.startswith("unix"):
            return connect_unix(scheme, rest, timeout)
        host, _, port = rest.rpartition(":")
        return socket.create_connection((host.strip("[]") or "127.0.0.1", int(port)), timeout)

    def ask(self, request: bytes, timeout: float = TIMEOUT_S) -> bytes:
        """Connect, send, say that that was all, and take the whole answer: also of a service that does not listen."""
        with self.connect(timeout) as client:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                client.sendall(request)
                client.shutdown(socket.SHUT_WR)
            with client.makefile("rb") as answer:
                return answer.read()

    def exits(self, count: int, timeout: float = TIMEOUT_S) -> list[Process]:
        """The first `count` processes that have ended, in the order of their ends."""
        found = self.daemon.wait_records(count, timeout=timeout, event="exit", service=self.name)
        return [self._process(record) for record in found]

    def _process(self, record: dict[str, Any]) -> Process:
        lines = self.daemon.records(event="output", service=self.name, pid=record["pid"])
        return Process(
            record["pid"], record.get("connection"), record.get("peer"), record.get("status"), record.get("signal"),
            record["duration"], "".join(f"{line['message']}\n" for line in lines),
        )  # fmt: skip

    def wait_ready(self, timeout: float = TIMEOUT_S) -> None:
        """Until it is ready, as its `ready` says; a per-connection service is when it listens."""
        self.daemon.superctl("wait", "--for", "ready", self.name, timeout=timeout)


class Daemon:
    """`run` adds services one by one, `start` takes a directory of them. Leaving the block ends everything."""

    def __init__(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="superd-pytest-"))
        self.directory.chmod(0o755)
        self._conf = self.directory / "conf.d"
        self._conf.mkdir()
        self._process: subprocess.Popen[bytes] | None = None
        self._news = threading.Condition()
        self._records: list[dict[str, Any]] = []
        self._lines: list[str] = []
        self._ended = False
        self._reader: threading.Thread | None = None
        self._names = 0

    def run(
        self, address: str | Sequence[str], command: str | Sequence[str], *, name: str = "", **keys: Any
    ) -> Service:
        """A service at `address` (port 0: the kernel chooses), listening when this returns.

        keys: as in a service's file; tables are dicts, and `pass_` is `pass`.
        """
        self._names += 1
        name = name or f"s{self._names}"
        given = {"listen": address, "command": command, **keys}
        text = "".join(format_pair(key.rstrip("_"), _plain(value)) + "\n" for key, value in given.items())
        (self._conf / f".{name}").write_text(text)
        (self._conf / f".{name}").rename(self._conf / f"{name}.toml")
        if self._process is None:
            self.start(self._conf)
        else:
            self.superctl("reload")
        self._wait_listening(name)
        return Service(self, name)

    def _wait_listening(self, name: str) -> None:
        """Or until it is said why it does not."""
        with self._news:
            self._news.wait_for(
                lambda: self._ended or self.records(event="listening", service=name)
                or self.records(level="err", service=name), TIMEOUT_S,
            )  # fmt: skip
            assert self.records(event="listening", service=name), f"{name} does not listen\n{self.log()}"

    def start(self, conf_dir: str | os.PathLike[str], env: Mapping[str, str] | None = None) -> Self:
        """superd on a directory of services, ready when this returns; `env` is its whole environment."""
        assert self._process is None, "superd runs already"
        argv = [sys.executable, "-I", "-m", "superd", "-c", os.fspath(conf_dir), "--control", self._control]
        self._process = subprocess.Popen(
            [*argv, "--log", "json"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            start_new_session=True, env=None if env is None else dict(env),
        )  # fmt: skip
        self._reader = threading.Thread(target=self._read, args=(self._process,), name="superd-log", daemon=True)
        self._reader.start()
        self.wait_records(1, event="ready", service=None)
        return self

    def service(self, name: str) -> Service:
        return Service(self, name)

    @property
    def _control(self) -> str:
        return f"unix:{self.directory}/control.sock"

    def superctl(self, *arguments: str, timeout: float = TIMEOUT_S) -> str:
        """What `superctl ARGUMENTS` prints. Raises AssertionError when it fails."""
        done = subprocess.run(
            [sys.executable, "-I", "-m", "superd.cli.superctl", "-s", self._control, *arguments],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout,
        )  # fmt: skip
        assert done.returncode == 0, f"superctl {' '.join(arguments)}: {done.stderr or done.stdout}\n{self.log()}"
        return done.stdout

    # -- log

    def _read(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        for raw in process.stdout:
            line = raw.decode("utf-8", "backslashreplace").rstrip("\n")
            try:
                record = json.loads(line)
            except ValueError:
                record = {"message": line}
            with self._news:
                self._lines.append(line)
                self._records.append(record)
                self._news.notify_all()
        with self._news:
            self._ended = True
            self._news.notify_all()

    def records(self, **fields: Any) -> list[dict[str, Any]]:
        """Log records so far that have these values; None: the field is not there. superd(8) has their keys."""
        with self._news:
            return [row for row in self._records if all(row.get(key) == value for key, value in fields.items())]

    def wait_records(self, count: int, *, timeout: float = TIMEOUT_S, **fields: Any) -> list[dict[str, Any]]:
        """The first `count` of them."""
        deadline = time.monotonic() + timeout
        with self._news:
            while len(found := self.records(**fields)) < count:
                left = deadline - time.monotonic()
                if self._ended or left <= 0:
                    why = "superd has ended" if self._ended else f"not within {timeout:g} s"
                    raise AssertionError(f"{len(found)} of {count} records with {fields}: {why}\n{self.log()}")
                self._news.wait(left)
        return found[:count]

    def log(self) -> str:
        with self._news:
            return "\n".join(self._lines[-500:])

    # -- the end

    def close(self) -> None:
        """Stop everything, by force if need be. Raises AssertionError when superd did not end as it should."""
        process, self._process = self._process, None
        try:
            if process is not None:
                self._stop(process)
        finally:
            shutil.rmtree(self.directory, ignore_errors=True)

    def _stop(self, process: subprocess.Popen[bytes]) -> None:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        try:
            status = process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()  # its manager ends the services
            status = process.wait()
        assert self._reader is not None and process.stdout is not None
        self._reader.join(TIMEOUT_S)
        if not self._reader.is_alive():
            process.stdout.close()
        assert status == 0, f"superd ended with {status}\n{self.log()}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _plain(value: Any) -> Any:
    """Paths as strings."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else value
