"""One try of connect, http or exec: what readiness.py repeats until it works, and health.py while it works."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import trio

from superd.core import http, messages
from superd.core.spec import Address, Output, Ready
from superd.manager import environment
from superd.manager.service import explain_start, signal_name

if TYPE_CHECKING:
    from superd.manager.process import ProcessService

_READ_BYTES = 16384
_READS = 64  # 1 MiB, the largest pipe that an ordinary user can make (pipe(7))
_LAST_BYTES = 2048  # of what a command wrote: its last line is told
_LINE_CHARACTERS = 200

Target = tuple[int, int, Any]  # family, type, address, as socket(2) and connect(2) want them


class Checks:
    """The checks of one service. Never two commands at once, whoever asks: one that was killed must have ended."""

    def __init__(self, service: ProcessService) -> None:
        self.service = service
        self._probe: Probe | None = None

    async def attempt(self, check: Ready) -> str | None:
        """None: it is well. Otherwise why not, in a few words. Cancel it at will: it leaves nothing behind."""
        try:
            if check.address is not None:
                (await dial(check.address)).close()
                return None
            if check.url is not None:
                return await _get(check.url)
            return await self._run(check.command)
        except OSError as error:
            # trio says where to as well, which the caller does; a name that cannot be resolved has no errno of its own.
            has_errno = error.errno is not None and error.errno > 0
            return (os.strerror(error.errno or 0) if has_errno else error.strerror or str(error)).lower()
        except ValueError as error:
            return str(error)

    async def _run(self, words: tuple[str, ...]) -> str | None:
        while self._probe is not None and not self._probe.ended.is_set():
            await self._probe.ended.wait()
        self._probe = probe = Probe(self.service)
        try:
            probe.start(words)
            await probe.ended.wait()
        finally:
            probe.close()
        return probe.failure

    def take_over(self, number: int, log: int | None) -> None:
        """A command of an earlier manager: nobody waits for what it says any more."""
        if log is not None:
            os.close(log)
        self._probe = Probe(self.service, number)
        self._probe.close()


class Probe:
    """A program beside the service's own, in the same context, without sockets: a child of the keeper.

    It is the leader of a session, so its whole group can be killed. What it writes is read, and all but the end
    forgotten.
    """

    def __init__(self, service: ProcessService, number: int | None = None) -> None:
        """number: of one that has been started already."""
        self.service = service
        self.number = service.supervisor.next_instance() if number is None else number
        self.ended = trio.Event()
        self.failure: str | None = None
        self._program = ""
        self._pipe: int | None = None
        self._last = b""
        if number is not None:
            service.supervisor.instances[number] = self

    def start(self, words: tuple[str, ...]) -> None:
        """Raises OSError or ValueError if that cannot be asked for; then it has ended."""
        service, supervisor = self.service, self.service.supervisor
        limited = bool(service.spec.cgroup.controllers())
        self._program = words[0]
        pipe: tuple[int, ...] = ()
        try:
            program = replace(service.make_command(words), stdout=Output(), stderr=Output())
            pipe = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
            os.set_blocking(pipe[1], True)
            supervisor.keeper.send(
                "start", [*reversed(pipe)], id=self.number, program=program.to_json(), log=True,
                context=environment.context_json(service.spec),
                tag={"service": service.name, "id": self.number, "check": True},
                cgroup=supervisor.processes.group(service) if limited else None, limited=limited,
            )  # fmt: skip
        except (OSError, ValueError):
            self.ended.set()
            for fd in pipe:
                os.close(fd)
            raise
        os.close(pipe[1])
        self._pipe = pipe[0]
        supervisor.instances[self.number] = self
        supervisor.watch.add(self._pipe, self._readable)

    def close(self) -> None:
        """Kill it and its group if it still runs; `ended` tells when it has."""
        self._close_pipe()
        if not self.ended.is_set():
            self.service.supervisor.keeper.send("signal", id=self.number, signo=signal.SIGKILL, group=True)

    def _readable(self, _: int) -> None:
        self._read()

    def _read(self) -> bool:
        """Read once; False: there is no more now."""
        if self._pipe is None:
            return False
        try:
            data = os.read(self._pipe, _READ_BYTES)
        except BlockingIOError:
            return False
        if not data:
            self._close_pipe()
            return False
        self._last = (self._last + data)[-_LAST_BYTES:]
        return True

    def _close_pipe(self) -> None:
        if self._pipe is not None:
            self.service.supervisor.watch.remove(self._pipe)
            os.close(self._pipe)
            self._pipe = None

    # -- what the keeper says

    def process_started(self, pid: int) -> None:
        """That it runs is nothing to anybody; how it ends is."""

    def process_failed(self, stage: str, errno: int, detail: str) -> None:
        self.failure = explain_start(self.service.spec, stage, errno, detail, program=self._program)
        self.ended.set()

    def process_exited(self, pid: int, status: int) -> None:
        code = 255 if status == messages.UNKNOWN_STATUS else os.waitstatus_to_exitcode(status)
        if code:
            how = f"was killed by {signal_name(-code)}" if code < 0 else f"exited with status {code}"
            for _ in range(_READS):  # its last words
                if not self._read():
                    break
            said = self._last.decode(errors="backslashreplace").strip().rpartition("\n")[2].strip()
            self.failure = f"{how}: {said[:_LINE_CHARACTERS]}" if said else how
        self.ended.set()


async def _get(url: str) -> str | None:
    host, port, request = http.parse_url(url)
    sock = await _dial(await _resolve(host, port))
    with sock:
        while request:
            request = request[await sock.send(request) :]
        data = b""
        while (status := http.parse_status(data)) is None:
            if len(data) > http.HEAD_BYTES:
                return f"the head of its answer is longer than {http.HEAD_BYTES} bytes"
            part = await sock.recv(http.HEAD_BYTES)
            if not part:
                return "closed the connection without an answer"
            data += part
    return None if 200 <= status < 400 else f"answered with status {status}"


async def _resolve(host: str, port: int) -> list[Target]:
    if host == "localhost":
        return _targets(Address("tcp", host=host, port=port))
    found = await trio.socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [(family, kind, where) for family, kind, _, _, where in found]


def _targets(address: Address) -> list[Target]:
    """Where to connect to reach what listens there: for every address of the machine that is this host."""
    kind = socket.SOCK_SEQPACKET if address.kind == "seqpacket" else socket.SOCK_STREAM
    if address.scheme == "vsock":
        return [(socket.AF_VSOCK, kind, (_VMADDR_CID_LOCAL if address.cid is None else address.cid, address.port))]
    if address.path is not None:
        return [(socket.AF_UNIX, kind, "\0" + address.path[1:] if address.is_abstract else address.path)]
    hosts = [address.host] if address.host not in (None, "localhost") else _LOOPBACK[address.scheme]
    return [
        (family, kind, where)
        for host in hosts
        for family, _, _, _, where in socket.getaddrinfo(
            host, address.port, type=kind, flags=socket.AI_NUMERICHOST | socket.AI_NUMERICSERV
        )
    ]


_LOOPBACK = {"tcp": ["127.0.0.1", "::1"], "tcp4": ["127.0.0.1"], "tcp6": ["::1"]}
_VMADDR_CID_LOCAL = 1


async def dial(address: Address) -> trio.socket.SocketType:
    """A connection to what listens there, which the caller closes. Raises OSError."""
    return await _dial(_targets(address))


async def _dial(targets: list[Target]) -> trio.socket.SocketType:
    """A connection to the first that accepts one; the caller closes it. Raises the first one's OSError."""
    failed: OSError | None = None
    for family, kind, where in targets:
        try:
            with contextlib.ExitStack() as own:
                sock = own.enter_context(trio.socket.socket(family, kind))  # OSError: no IPv6 here
                await sock.connect(where)
                # Two ways to be connected to nobody: a TCP port in the range that the kernel chooses from may be its
                # own other end (simultaneous open), and a UNIX socket whose queue is full says EAGAIN, which trio
                # takes for EINPROGRESS.
                if sock.getpeername() == sock.getsockname():
                    raise OSError(errno.ECONNREFUSED, "")
                own.pop_all()
                return sock
        except OSError as error:
            failed = failed or (OSError(errno.EAGAIN, "") if error.errno == errno.ENOTCONN else error)
    assert failed is not None, "no target"
    raise failed
