"""Start, signal and reap children.

Two ways to start, and why (from trials: µs of CPU for one tiny program, child included):

    Launcher   posix_spawn, 620    vfork semantics, no copy of page tables; cannot put the pid into the
                                   environment nor change identity, so the spawner has done that before
    fork_exec  os.fork, 1260       for LISTEN_PID, and for the keeper's children, which enter a context

subprocess.Popen was left: 700 without and 1270-1560 with user=, and it wants to wait for its children itself.
`reap` is the only wait call of the process that uses it: a second waiter takes statuses away (F1).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import json
import os
import select
import signal
import stat
import struct
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from superd.core.messages import STAGES
from superd.core.plan import (
    CONNECTION_VARIABLES,
    LISTEN_FDS_START,
    TCP_VARIABLES,
    Program,
    listen_environment,
    watchdog_environment,
)

if TYPE_CHECKING:
    from typing import Any


class StartError(Exception):
    """A process that never ran its program. stage: one of messages.STAGES; errno 0 where there is none."""

    def __init__(self, stage: str, errno_: int, detail: str = "") -> None:
        super().__init__(stage, errno_, detail)
        self.stage, self.errno, self.detail = stage, errno_, detail


class Null:
    """/dev/null, or a substitute: reads give EOF; the one place where a machine without it is handled."""

    def __init__(self) -> None:
        try:
            self.fd = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            self.fd = 0  # superd's own, made valid at start (process.sanitize_inherited_fds)


_FILE_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NOCTTY


class Launcher:
    """Starts stdio processes of one program with posix_spawn(3); everything that can be prepared is.

    Through ctypes, not os.posix_spawn, because glibc's child sets its two internal signals to "ignored" unless they
    are named as signals to reset, and Python refuses to name them: the service would not see SigIgn 0 (E5). What can be
    prepared is made once, argv, attributes, most of the environment and the file actions, and still a start costs its
    parent 70 µs where os.posix_spawn takes 63: that is the price of a clean child.

    environment  what every process of the program gets
    null         /dev/null
    """

    def __init__(self, program: Program, environment: Mapping[str, str], null: Null) -> None:
        self._program, self._null = program, null
        self._path = os.fsencode(program.executable)
        self._argv = _strings([os.fsencode(word) for word in program.argv])
        # The first of a name counts for getenv(3), and the connection's come first: superd's word is the last one.
        self._environment = [
            os.fsencode(f"{name}={value}") for name, value in environment.items() if name not in CONNECTION_VARIABLES
        ]
        self._attributes = ctypes.create_string_buffer(_OPAQUE_BYTES)
        signals = ctypes.create_string_buffer(b"\xff" * _KERNEL_SIGSET_BYTES, _OPAQUE_BYTES)
        _call("posix_spawnattr_init", self._attributes)
        _call("posix_spawnattr_setsigdefault", self._attributes, signals)
        _call("posix_spawnattr_setsigmask", self._attributes, ctypes.create_string_buffer(_OPAQUE_BYTES))
        _call("posix_spawnattr_setflags", self._attributes, ctypes.c_short(_SETSIGDEF | _SETSIGMASK | _SETSID))
        self._actions: dict[tuple[int, int | None], ctypes.Array[ctypes.c_char]] = {}  # fd numbers recur
        self._pid = ctypes.c_int()
        self._pid_address = ctypes.byref(self._pid)
        # environ(7) of a TCP connection's process, of which only the values change: each variable has a place.
        self._places = ctypes.create_string_buffer(_PLACES.size)
        first = ctypes.addressof(self._places)
        tail = [ctypes.cast(word, ctypes.c_void_p).value for word in map(ctypes.c_char_p, self._environment)]
        places = range(first, first + _PLACES.size, _PLACE_BYTES)
        self._tcp_environment = (ctypes.c_void_p * (len(places) + len(tail) + 1))(*places, *tail)

    def start(self, variables: Mapping[str, str], connection: int, log: int | None) -> int:
        """The new process's pid. It is a session leader with an empty signal mask.

        The caller keeps and closes `connection` and `log`; every fd it has but 0, 1, 2 must be close-on-exec. Raises
        StartError with the errno of exec.
        """
        environment = [os.fsencode(f"{name}={value}") for name, value in variables.items()] + self._environment
        return self._spawn(_strings(environment), connection, log)

    def start_tcp(self, values: Sequence[bytes], connection: int, log: int | None) -> int:
        """start() with what most connections have: the values of plan.TCP_VARIABLES, each shorter than VALUE_BYTES."""
        _PLACES.pack_into(self._places, 0, *map(bytes.__add__, _TCP_NAMES, values))
        return self._spawn(self._tcp_environment, connection, log)

    def _spawn(self, environment: ctypes.Array[Any], connection: int, log: int | None) -> int:
        actions = self._actions.get((connection, log)) or self._make_actions(connection, log)
        error = _posix_spawn(self._pid_address, self._path, actions, self._attributes, self._argv, environment)
        if error:
            raise StartError(*_which_stage(self._program, error))
        return self._pid.value

    def _make_actions(self, connection: int, log: int | None) -> ctypes.Array[ctypes.c_char]:
        if len(self._actions) >= _ACTIONS_KEPT:
            self.close()
        made = self._actions[connection, log] = ctypes.create_string_buffer(_OPAQUE_BYTES)
        _call("posix_spawn_file_actions_init", made)
        _call("posix_spawn_file_actions_adddup2", made, connection, 0)
        _call("posix_spawn_file_actions_adddup2", made, connection, 1)
        stderr = self._program.stderr
        if stderr.kind == "log" and log is not None:
            _call("posix_spawn_file_actions_adddup2", made, log, 2)
        elif stderr.kind == "socket":
            _call("posix_spawn_file_actions_adddup2", made, connection, 2)
        elif stderr.kind == "file" and stderr.path:
            _call("posix_spawn_file_actions_addopen", made, 2, os.fsencode(stderr.path), _FILE_FLAGS, 0o640)
        elif stderr.kind != "inherit":
            _call("posix_spawn_file_actions_adddup2", made, self._null.fd, 2)
        return made

    def close(self) -> None:
        for made in self._actions.values():
            _call("posix_spawn_file_actions_destroy", made)
        self._actions.clear()


VALUE_BYTES = 80
_TCP_NAMES = [name.encode() + b"=" for name in TCP_VARIABLES]
_PLACE_BYTES = VALUE_BYTES + max(map(len, _TCP_NAMES))
_PLACES = struct.Struct(f"{_PLACE_BYTES}s" * len(_TCP_NAMES))  # which ends each value with zeros
_ACTIONS_KEPT = 256
_OPAQUE_BYTES = 1024  # posix_spawnattr_t, posix_spawn_file_actions_t, sigset_t: 336, 80, 128 in glibc and musl
_KERNEL_SIGSET_BYTES = 8
_SETSIGDEF, _SETSIGMASK, _SETSID = 0x04, 0x08, 0x80  # <spawn.h>
_libc = ctypes.PyDLL(None)  # one thread: nothing to release the GIL for
_posix_spawn = _libc.posix_spawn
_posix_spawn.argtypes = (ctypes.c_void_p, ctypes.c_char_p, *(ctypes.c_void_p,) * 4)


def _strings(words: list[bytes]) -> ctypes.Array[ctypes.c_char_p]:
    return (ctypes.c_char_p * (len(words) + 1))(*words)


def _call(function: str, *arguments: object) -> None:
    error = getattr(_libc, function)(*arguments)
    if error:
        raise OSError(error, os.strerror(error))


def _which_stage(program: Program, number: int) -> tuple[str, int]:
    """posix_spawn says only the errno: EAGAIN and ENOMEM come from fork(2), and a file that stderr cannot be
    opened at is told from a program that cannot be executed by opening it again."""
    if number in (errno.EAGAIN, errno.ENOMEM):
        return "fork", number
    if program.stderr.kind == "file" and program.stderr.path:
        try:
            os.close(os.open(program.stderr.path, _FILE_FLAGS | os.O_NONBLOCK | os.O_CLOEXEC, 0o640))
        except OSError as failed:
            return "output", failed.errno or 0
    return "exec", number


def fork_exec(
    program: Program,
    environment: Mapping[str, str],
    passed: Sequence[int],
    log: int | None,
    prepare: Callable[[], tuple[Mapping[str, str], int | None]],
    fork: Callable[[], int] | None = None,
) -> tuple[int, int]:
    """Fork a child that execs the program with `passed` from 3 on; with stdio the first of them is at 0 and 1, and
    where the program has a `ready_fd` the last stands there.

    `prepare` runs in the child when only its fds are left, so that a low file limit cannot hinder it: it resets
    signals and enters the context, raises StartError, and returns the user's variables and the child's pidfd inode.
    fork: os.fork, unless something is to be done about it.
    Returns (pid, fd): the fd becomes readable when the exec has succeeded or failed; give it to `start_failure`.
    Raises StartError when there can be no child at all.
    """
    try:
        report, ours = os.pipe2(os.O_CLOEXEC)
    except OSError as error:
        raise StartError("descriptors", error.errno or 0) from None
    try:
        pid = (fork or os.fork)()
    except OSError as error:
        os.close(report)
        os.close(ours)
        raise StartError("fork", error.errno or 0) from None
    if pid:
        os.close(ours)
        return pid, report
    status = 127
    try:
        # Nothing may get past here, whatever happens: this is a copy of a process with other duties.
        os.setsid()
        ours = _place(program, passed, log, ours)
        user, inode = prepare()
        open_outputs(program)
        merged = {**program.base_environment, **user, **program.environment, **environment}
        merged |= listen_environment(program, os.getpid(), inode)
        merged |= watchdog_environment(program, os.getpid())
        # upstart and UCSPI both have a PROTO: with a connection it is UCSPI's.
        merged |= {name: value for name, value in environment.items() if name in CONNECTION_VARIABLES}
        _exec(program, merged)
    except StartError as error:
        status = 126 if error.errno in (errno.EACCES, errno.ENOEXEC) else 127
        _tell(ours, error)
    except BaseException as error:  # boundary: the child reports and ends, always
        number = error.errno if isinstance(error, OSError) else 0
        _tell(ours, StartError("descriptors", number or 0, repr(error)))
    finally:
        os._exit(status)


def _place(program: Program, passed: Sequence[int], log: int | None, report: int) -> int:
    """Put every fd at its number and close all others but `report`; returns where that has gone.

    First everything is copied above the highest target, then down: a source may itself stand at a target (O5).
    """
    ready_fd = program.ready_fd
    numbered = 1 if program.stdio else 0  # the first of `passed` that stands at 3
    both_ways = program.stdio and not stat.S_ISFIFO(os.fstat(passed[0]).st_mode)  # a FIFO at 1 would feed itself
    end = len(passed) - (ready_fd is not None)
    first_free = LISTEN_FDS_START + end - numbered
    if ready_fd is not None and ready_fd < first_free:  # only now it is known how many there are
        raise StartError(
            "descriptors", 0, f"fd {ready_fd}, for readiness, is a socket's: the first free one is {first_free}"
        )
    last = first_free if ready_fd is None else max(first_free, ready_fd + 1)
    try:
        high = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, last + 1) for fd in passed]
        high_log = None if log is None else fcntl.fcntl(log, fcntl.F_DUPFD_CLOEXEC, last + 1)
        report = fcntl.fcntl(report, fcntl.F_DUPFD_CLOEXEC, last + 1)
        null = fcntl.fcntl(Null().fd, fcntl.F_DUPFD_CLOEXEC, last + 1)
        os.dup2(high[0] if program.stdio else null, 0)
        for number, output in ((1, program.stdout), (2, program.stderr)):
            if output.kind == "socket" or (number == 1 and both_ways):
                os.dup2(high[0], number)
            elif output.kind == "log" and high_log is not None:
                os.dup2(high_log, number)
            elif output.kind != "inherit":
                os.dup2(null, number)
        for number, fd in enumerate(high[numbered:end], LISTEN_FDS_START):
            os.dup2(fd, number)
        os.closerange(first_free, last)
        if ready_fd is not None:
            os.dup2(high[-1], ready_fd)
        os.dup2(report, last, inheritable=False)
        os.closerange(last + 1, 1 << 20)
    except OSError as error:
        raise StartError("descriptors", error.errno or 0) from None
    return last


def placing(
    program: Program, connection: int, log: int | None, null: Null
) -> list[tuple[Callable[..., object], tuple[object, ...]]]:
    """What a forked child calls that goes on without exec: then the connection is at 0 and 1, and at 2 what is open
    already; `open_outputs` does the rest."""
    calls: list[tuple[Callable[..., object], tuple[object, ...]]] = [
        (os.dup2, (connection, 0)),
        (os.dup2, (connection, 1)),
    ]
    if program.stderr.kind == "log" and log is not None:
        calls.append((os.dup2, (log, 2)))
    elif program.stderr.kind == "socket":
        calls.append((os.dup2, (connection, 2)))
    elif program.stderr.kind != "inherit":
        calls.append((os.dup2, (null.fd, 2)))
    return calls


def open_outputs(program: Program) -> None:
    """Files are opened as the service's user, so that no link of his leads anywhere he could not write (L10)."""
    for number, output in ((1, program.stdout), (2, program.stderr)):
        if output.kind != "file" or output.path is None or (number == 1 and program.stdio):
            continue
        try:
            fd = os.open(output.path, _FILE_FLAGS | os.O_CLOEXEC, 0o640)
        except OSError as error:
            raise StartError("output", error.errno or 0, output.path) from None
        os.dup2(fd, number)
        os.close(fd)


def _exec(program: Program, environment: Mapping[str, str]) -> None:
    try:
        os.execve(program.executable, program.argv, environment)
    except OSError as error:
        raise StartError("exec", error.errno or 0) from None


def _tell(fd: int, error: StartError) -> None:
    with contextlib.suppress(OSError):
        os.write(fd, json.dumps([error.stage, error.errno, error.detail[:500]]).encode())


def start_failure(report: int) -> StartError | None:
    """What fork_exec's fd says, which is closed: None when the program runs. Waits until it is known."""
    with open(report, "rb") as file:
        text = file.read()
    if not text:
        return None
    stage, number, detail = json.loads(text)
    return StartError(stage if stage in STAGES else "descriptors", number, detail)


END_BYTES = 128  # struct signalfd_siginfo: one is enough, signals of a kind coalesce


def watch_for_ends() -> int:
    """A signalfd(2) that is readable when children have ended: read END_BYTES, then `reap` until there is none.

    Blocks SIGCHLD: no handler runs and no system call is interrupted, as with signal.set_wakeup_fd.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
    mask = ctypes.create_string_buffer((1 << (signal.SIGCHLD - 1)).to_bytes(8, "little"), _OPAQUE_BYTES)
    fd: int = _libc.signalfd(-1, mask, os.O_NONBLOCK | os.O_CLOEXEC)
    if fd < 0:
        raise OSError(errno.EMFILE, "cannot open a signalfd")
    return fd


def reap(expected: Collection[object] | None = None) -> Iterator[tuple[int, int]]:
    """(pid, status) of every child that has ended, until there is none (G2: signals coalesce).

    `expected`: what is to be empty when no child is left, which saves asking once more.
    """
    while expected is None or expected:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        yield pid, status


def signal_child(pid: int, signo: int, *, group: bool) -> bool:
    """Signal a child that is not reaped yet (so the pid is its own), or its group. False: it has gone.

    CONT goes with TERM and KILL's kin, for a stopped process does not act on them (G10).
    """
    send = os.killpg if group else os.kill
    try:
        send(pid, signo)
        if signo in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGABRT):
            send(pid, signal.SIGCONT)
    except ProcessLookupError:
        return False
    return True


def end_strays(leaders: Collection[int], within_s: float) -> None:
    """End process groups that nobody looks after any more: TERM, and KILL when that time has passed. Blocks.

    They need not be our children. Closes every descriptor from 3 on: who comes next may have the ports at once.
    """
    os.closerange(3, 1 << 20)
    poll, left = select.poll(), {}
    for pid in leaders:
        with contextlib.suppress(ProcessLookupError):
            left[os.pidfd_open(pid)] = pid
            signal_child(pid, signal.SIGTERM, group=os.getpgid(pid) == pid)
    for fd in left:
        poll.register(fd, select.POLLIN)
    deadline = time.monotonic() + within_s
    while left and (rest_s := deadline - time.monotonic()) > 0:
        for fd, _ in poll.poll(rest_s * 1000):
            poll.unregister(fd)
            del left[fd]
    for pid in left.values():  # not ended, so the pid is still its own
        with contextlib.suppress(ProcessLookupError):
            signal_child(pid, signal.SIGKILL, group=os.getpgid(pid) == pid)
