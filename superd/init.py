"""The main command, `superd -- COMMAND`: a process that lives as if superd were not there, and superd with it.

Command is that process, in whichever loop looks after it: the keeper's when there are services, or `run` below, which
is superd as a plain init. Then there is no configuration, no control socket and no manager; one process, standard
library only, and little of that, since every container would wait for it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import time

from superd.system import process, terminal, tree

TYPE_CHECKING = False  # typing itself would cost a millisecond; type checkers know the name
if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
    from typing import NoReturn

NEVER_RAN = 127
NOT_EXECUTABLE = 126
DRAIN_S = 10.0
_UNKILLABLE_S = 5.0  # after KILL (G11)
_SWEEP_S = 10.0  # reap at least this often, whatever became of SIGCHLD (G2)

# Of a process's own making: passed on they would confuse (H8), and a handler in Python that returns from a real one
# of the first four repeats it for ever.
FAULTS = (signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL)
_ABORTS = (signal.SIGABRT, signal.SIGTRAP, signal.SIGSYS)
_SUSPEND = (signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU)
FINAL = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)
# Everything that can be caught, real-time signals too (32 and 33 are the C library's own).
CATCHABLE = tuple(
    signo for signo in sorted(signal.valid_signals())
    if signo not in (*FAULTS, *_ABORTS, signal.SIGKILL, signal.SIGSTOP, 32, 33)
)  # fmt: skip


class Command:
    """rewrite   signal -> the one that is sent instead, 0 for none
    single    send to the command alone, not to its group
    complain  writes a message where superd's own go
    """

    def __init__(
        self, argv: Sequence[str], *, single: bool = False, rewrite: Mapping[int, int] | None = None,
        complain: Callable[[str], None] = lambda text: say(f"superd: {text}"),
    ) -> None:  # fmt: skip
        self.argv, self.single, self.complain = argv, single, complain
        # A group is stopped by STOP, which none of its members can miss: dumb-init does the same.
        suspending: dict[int, int] = {} if single else dict.fromkeys(_SUSPEND, signal.SIGSTOP)
        self.rewrite = suspending | dict(rewrite or {})
        self.signals = {*CATCHABLE, *self.rewrite}
        self.pid = 0
        self.released = False
        self.status: int | None = None  # as a shell has it: 128+N for signal N
        self.terminal: int | None = None
        self._gate = -1
        self._may_not_signal = False

    # -- life

    def fork(self) -> None:
        """Before superd changes anything of itself: the child keeps directory, umask, limits, fds, dispositions and
        mask as they were found (E7), and waits with them until `release`. All signals are blocked from now on.

        Raises OSError.
        """
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        process.fill_standard_fds()
        environment = process.environment_as_found()
        self.terminal = terminal.find()
        gate, self._gate = os.pipe2(os.O_CLOEXEC)
        parent = os.getpid(), os.getpgrp()
        self.pid = os.fork()
        if self.pid == 0:
            self._become(gate, mask, environment, *parent)
        os.close(gate)
        with contextlib.suppress(OSError):
            os.setpgid(self.pid, self.pid)  # both sides do: who comes first cannot be told

    def fds(self) -> list[int]:
        """What superd has to keep open for the command."""
        return [fd for fd in (self._gate, self.terminal) if fd is not None]

    def fds_when_released(self) -> list[int]:
        return [] if self.terminal is None else [self.terminal]

    def resume(self, pid: int, status: int | None, terminal: int | None) -> None:
        """Go on with a command that another program in this process has started and released."""
        self.pid, self.status, self.terminal, self.released = pid, status, terminal, True

    def release(self) -> None:
        """Let it execute its program. If superd ends instead, it never does."""
        self.released = True
        with contextlib.suppress(OSError):  # it was killed meanwhile
            os.write(self._gate, b"x")
        os.close(self._gate)

    def cancel(self) -> None:
        """superd could not start: the command never will."""
        os.close(self._gate)

    @property
    def running(self) -> bool:
        return self.released and self.status is None

    def _become(
        self, gate: int, mask: Collection[int], environment: dict[str, str], parent: int, group: int
    ) -> NoReturn:
        status = NEVER_RAN
        try:
            os.close(self._gate)
            os.setpgid(0, 0)
            if signal.SIGTERM not in mask:  # a manager that cannot start ends what is there
                signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
            if not os.read(gate, 1):
                os._exit(NEVER_RAN)  # superd has ended instead
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
            if self.terminal is not None and terminal.foreground(self.terminal) == group:
                terminal.give(self.terminal, os.getpid())
            if environment.get("LISTEN_PID") == str(parent):
                environment["LISTEN_PID"] = str(os.getpid())
                if environment.pop("LISTEN_PIDFDID", None) and (inode := process.pidfd_inode()) is not None:
                    environment["LISTEN_PIDFDID"] = str(inode)
            # The interpreter's own: how superd found PIPE and XFSZ nobody can know, and every program expects this.
            for signo in (signal.SIGPIPE, signal.SIGXFSZ):
                signal.signal(signo, signal.SIG_DFL)
            if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
                signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            if not self.argv[0]:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
            os.execvpe(self.argv[0], list(self.argv), environment)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR):
                status = NOT_EXECUTABLE
            self.complain(f"cannot run {self.argv[0]!r}: {reason(error)}")
        finally:
            os._exit(status)

    def look(self) -> None:
        """Before children are reaped: has it stopped, has it ended? Where there is no /proc to find the rest by, its
        group is told now: while the command is not reaped the group cannot be somebody else's (G7)."""
        if self.status is not None:
            return
        with contextlib.suppress(ChildProcessError):
            if self.terminal is not None:
                stopped = os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WNOHANG)
                if stopped is not None and stopped.si_status in _SUSPEND:
                    self._stopped_by_terminal(stopped.si_status)
            if self.single or os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
                return
            if not os.path.exists("/proc/self/stat"):
                with contextlib.suppress(OSError):  # nobody is left
                    os.killpg(self.pid, signal.SIGTERM)

    def ended(self, status: int) -> None:
        """It was reaped; `status` from waitpid(2)."""
        code = os.waitstatus_to_exitcode(status)
        self.status = code if code >= 0 else 128 - code
        if self.terminal is not None and terminal.foreground(self.terminal) == self.pid:
            terminal.give(self.terminal, os.getpgrp())

    # -- signals

    def forward(self, signo: int) -> None:
        """Pass on what superd got."""
        if signo == signal.SIGCONT:
            self._take_terminal()
        wanted = self.rewrite.get(signo, signo)
        if wanted:
            self._send(wanted)
        if signo in _SUSPEND:
            os.kill(os.getpid(), signal.SIGSTOP)  # so that a shell sees its job stop; PID 1 cannot be stopped

    def _send(self, signo: int) -> None:
        send = os.kill if self.single else os.killpg
        try:
            send(self.pid, signo)
        except ProcessLookupError:
            pass  # it has just ended
        except PermissionError:
            if not self._may_not_signal:
                self._may_not_signal = True
                self.complain(f"cannot signal {self.argv[0]!r}: it is another user's now, and CAP_KILL is missing")

    def _take_terminal(self) -> bool:
        """Pass the foreground on if a shell has given it to superd."""
        if self.terminal is None or terminal.foreground(self.terminal) != os.getpgrp():
            return False
        terminal.give(self.terminal, self.pid)
        return True

    def _stopped_by_terminal(self, signo: int) -> None:
        """^Z, or a read from the background, reached the command and not superd: stop too, so that the shell that
        started superd has its turn (H3). TSTP at its default does nothing where nobody could continue superd, because
        it is PID 1 or its group is orphaned (setpgid(2)): then go on at once, nobody can have meant it to stay so."""
        assert self.terminal is not None
        if terminal.foreground(self.terminal) == self.pid:
            terminal.give(self.terminal, os.getpgrp())
        before = signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTSTP)
        signal.signal(signal.SIGTSTP, before)
        if self._take_terminal() or signo == signal.SIGTSTP:
            self._send(signal.SIGCONT)


def say(line: str) -> None:
    """Write a line to stderr, which may be gone or full: then nobody hears it."""
    # A terminal may stop background writers, a closed pipe sends PIPE: neither is for the main command.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTTOU, signal.SIGPIPE])
    try:
        os.write(2, line.encode(errors="replace") + b"\n")
    except BrokenPipeError:
        signal.sigtimedwait([signal.SIGPIPE], 0)
    except OSError:
        pass
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


class SignalPipe:
    """Signals as bytes to read, real-time signals as often as they came."""

    def __init__(self, signals: Iterable[int]) -> None:
        self.reader, self.writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.set_wakeup_fd(self.writer, warn_on_full_buffer=False)
        for signo in signals:
            signal.signal(signo, _noted)
        if os.getpid() == 1:
            process.exit_on((*FAULTS, *_ABORTS))  # the kernel drops what PID 1 does not handle: it would not be seen
        signal.pthread_sigmask(signal.SIG_SETMASK, [])

    def read(self) -> bytes:
        try:
            return os.read(self.reader, 4096)
        except BlockingIOError:
            return b""


def _noted(signo: int, _: object) -> None:
    """The C handler has written its byte by now."""


def reason(error: OSError) -> str:
    """Lowercase, as all messages are."""
    return (error.strerror or str(error)).lower()


def adopt_orphans(complain: Callable[[str], None]) -> None:
    if not process.become_subreaper() and os.getpid() != 1:
        complain("cannot become a subreaper; orphans will go to init")


# superd without services


def run(command: Command, drain_s: float) -> int:
    """Run it, reap whatever comes, and return its exit status when nothing is left of it."""
    try:
        command.fork()
    except OSError as error:
        command.complain(f"cannot run {command.argv[0]!r}: fork: {reason(error)}")
        return NEVER_RAN
    signals = SignalPipe(command.signals)
    process.sanitize_inherited_fds([*command.fds(), signals.reader, signals.writer])
    process.set_name("superd-keeper")
    adopt_orphans(command.complain)
    os.chdir("/")
    command.release()
    poll = select.poll()
    poll.register(signals.reader, select.POLLIN)
    while command.status is None:
        poll.poll(_SWEEP_S * 1000)
        for signo in signals.read():
            if signo != signal.SIGCHLD:
                command.forward(signo)
        command.look()
        _reap(command)
    if not command.single:
        _end_rest(command, drain_s, signals, poll)
    return command.status


def _reap(command: Command) -> bool:
    """Collect whoever has ended; False when there is nobody left."""
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return False
        if pid == 0:
            return True
        if pid == command.pid:
            command.ended(status)


def _end_rest(command: Command, drain_s: float, signals: SignalPipe, poll: select.poll) -> None:
    """TERM to what the command has left, time, KILL. Another TERM, INT or QUIT cuts the time short."""
    for signo, limit_s in ((signal.SIGTERM, drain_s), (signal.SIGKILL, _UNKILLABLE_S)):
        deadline = time.monotonic() + limit_s
        told: set[tuple[int, int]] = set()
        while _reap(command):
            _tell_all(signo, told)
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                break
            poll.poll(left_s * 1000)
            if signo == signal.SIGTERM and any(one in FINAL for one in signals.read()):
                break
        else:
            return
        if signo == signal.SIGTERM:
            command.complain(f"what {command.argv[0]!r} has left did not stop within {limit_s:g} s; killing it")
    command.complain(f"what {command.argv[0]!r} has left is unkillable")


def _tell_all(signo: int, told: set[tuple[int, int]]) -> None:
    """Each process below superd once. kill(-1) only as PID 1: there it means this container, not the machine (H11)."""
    first = os.getpid() == 1
    if first and not told:
        told.add((0, 0))
        with contextlib.suppress(OSError):
            os.kill(-1, signo)
    for row in tree.below(os.getpid()):
        if (row.pid, row.started) in told or row.zombie or (first and not row.stopped):
            continue
        told.add((row.pid, row.started))
        pidfd = process.open_pidfd(row.pid)
        if pidfd is not None:
            with contextlib.suppress(PermissionError):
                if tree.started(row.pid) == row.started:  # not a stranger that has the pid now (F15)
                    process.signal_by_pidfd(pidfd, signo)
                    if row.stopped:  # who is stopped does not act on TERM (G10)
                        process.signal_by_pidfd(pidfd, signal.SIGCONT)
            os.close(pidfd)
