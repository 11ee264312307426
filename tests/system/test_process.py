"""system/process.py: each function in a child of its own, seen from inside or through /proc."""

from __future__ import annotations

import errno
import os
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from forked import in_child

from superd.system import process

ROOT = Path(__file__).resolve().parents[2]
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


def status_field(name: str) -> str:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return line.split(None, 1)[1]
    raise KeyError(name)


@contextmanager
def family() -> Iterator[tuple[int, list[int]]]:
    """(child, [child of the child in a session of its own, and its child]): all wait until the test ends."""
    told, tell = os.pipe()
    lives, hold = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(hold)
            if os.fork() == 0:
                os.setsid()
                process.set_name(") R 1 1 (")  # a name that a careless parser takes for fields
                os.fork()
                os.write(tell, b"%d\n" % os.getpid())
            os.read(lives, 1)
        finally:
            os._exit(0)
    os.close(tell)
    os.close(lives)
    with open(told, "rb") as file:
        pids = [int(file.readline()), int(file.readline())]
    try:
        yield pid, pids
    finally:
        os.close(hold)
        os.waitpid(pid, 0)


def test_name() -> None:
    def child() -> str:
        process.set_name("superd-keeper-and-more")
        return Path("/proc/self/comm").read_text()

    assert in_child(child) == "superd-keeper-a\n"


def test_subreaper_adopts_orphans() -> None:  # (e) 13
    def child() -> bool:
        reader, writer = os.pipe()
        adopted = process.become_subreaper()
        middle = os.fork()
        if middle == 0:
            if os.fork() == 0:
                os.close(writer)
                os.read(reader, 1)
            os._exit(0)
        os.waitpid(middle, 0)
        os.close(writer)
        # Without the adoption this raises ChildProcessError.
        return adopted and os.waitpid(-1, 0)[0] != middle

    assert in_child(child) is True


def test_pidfd_inode_is_what_others_see() -> None:  # PROTOCOLS.md 2.1
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(writer, str(process.pidfd_inode()).encode())
        signal.pause()
    told = os.read(reader, 100)
    fds = [reader, writer, os.pidfd_open(pid), os.pidfd_open(os.getpid())]
    theirs, ours = os.fstat(fds[2]).st_ino, os.fstat(fds[3]).st_ino
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    for fd in fds:
        os.close(fd)
    # Where all pidfds share one inode the number says nothing, and None it must be.
    assert told == (str(theirs).encode() if theirs != ours else b"None")
    assert process.pidfd_inode() == (ours if theirs != ours else None)


# Inherited fds


def open_numbers() -> list[int]:
    found = []
    for fd in range(300):
        try:
            os.fstat(fd)
        except OSError:
            continue
        found.append(fd)
    return found


def test_sanitize_closes_what_leaked_and_keeps_what_is_asked_for() -> None:  # E2
    def child() -> list[object]:
        for fd in (3, 7, 8, 60, 251):
            os.dup2(0, fd)
        kept = process.sanitize_inherited_fds([8, 3, 100, 99, 1])
        return [kept, open_numbers(), [os.get_inheritable(fd) for fd in kept]]

    # 99 was not open, and 1 is no concern of `keep`.
    assert in_child(child, report_fd=100) == [[3, 8, 100], [0, 1, 2, 3, 8, 100], [False, False, False]]


@pytest.mark.parametrize("closed", [[0], [1], [2], [0, 2], [0, 1, 2]])
def test_sanitize_makes_the_standard_fds_valid(closed: list[int]) -> None:  # E25
    def child() -> list[object]:
        for fd in closed:
            os.close(fd)
        process.sanitize_inherited_fds([100])
        null = os.stat("/dev/null").st_rdev
        return [open_numbers(), [fd for fd in (0, 1, 2) if fd in closed and os.fstat(fd).st_rdev != null],
                [os.get_inheritable(fd) for fd in (0, 1, 2)]]  # fmt: skip

    assert in_child(child, report_fd=100) == [[0, 1, 2, 100], [], [True, True, True]]


@needs_root
def test_sanitize_without_dev_null(tmp_path: Path) -> None:  # E25
    def child() -> list[object]:
        os.chroot(tmp_path)
        os.closerange(0, 3)
        process.sanitize_inherited_fds([100])
        try:
            os.write(2, b"x")
        except OSError as error:
            return [open_numbers(), os.read(0, 1) == b"", error.strerror, [os.get_inheritable(fd) for fd in (0, 1, 2)]]
        return []

    result = in_child(child, report_fd=100)
    assert result == [[0, 1, 2, 100], True, "Bad file descriptor", [True, True, True]]


def test_sanitize_as_first_act_of_a_program() -> None:  # E2, E25
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from superd.system import process\n"
        "process.sanitize_inherited_fds()\n"
        "import socket\n"
        "print(socket.socket().fileno())"
    )
    shell = ["sh", "-c", 'exec "$@" <&- 2>&- 7</dev/null', "sh", sys.executable, "-I", "-c", code]
    assert subprocess.run(shell, stdout=subprocess.PIPE, text=True).stdout == "3\n"


def test_close_range_without_the_system_call(monkeypatch: pytest.MonkeyPatch) -> None:
    class OldKernel:
        def syscall(self, *_: object) -> int:
            return -1

    monkeypatch.setattr(process, "_libc_cached", OldKernel())

    def child() -> list[int]:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
        os.dup2(0, 60)
        process.sanitize_inherited_fds([100])
        return open_numbers()

    assert in_child(child, report_fd=100) == [0, 1, 2, 100]


def test_raise_nofile() -> None:  # E20
    def child() -> list[object]:
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
        before = process.raise_nofile()
        return [before == (64, hard), resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)]

    assert in_child(child) == [True, True]


# Signals


def spoil_signals() -> None:
    for signo in (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGCHLD, signal.SIGHUP, signal.SIGRTMAX):
        signal.signal(signo, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, lambda *_: None)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGHUP, signal.SIGTSTP])


def signal_sets() -> list[int]:
    """Ignored, caught, blocked, without 32 and 33: the C library catches those itself, and exec ends that."""
    return [int(status_field(name), 16) & ~(3 << 31) for name in ("SigIgn", "SigCgt", "SigBlk")]


def test_signals_are_as_in_a_new_process() -> None:  # E5, E6
    def child() -> list[int]:
        spoil_signals()
        process.reset_signals()
        return signal_sets()

    assert in_child(child) == [0, 0, 0]


def test_signals_that_are_kept() -> None:  # E7
    def child() -> list[int]:
        spoil_signals()
        process.reset_signals(keep=[signal.SIGHUP])
        return signal_sets()

    hup = 1 << signal.SIGHUP - 1
    assert in_child(child) == [hup, 0, hup]


def test_a_signal_that_was_blocked_works_at_once() -> None:  # E6
    pid = os.fork()
    if pid == 0:
        spoil_signals()
        os.kill(os.getpid(), signal.SIGTERM)
        process.reset_signals()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGTERM


def test_reset_does_not_wake_the_parent() -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def child() -> None:
        signal.set_wakeup_fd(writer)
        process.reset_signals()
        signal.signal(signal.SIGUSR1, lambda *_: None)
        os.kill(os.getpid(), signal.SIGUSR1)

    in_child(child)
    os.close(writer)
    assert os.read(reader, 1) == b""
    os.close(reader)


# Other processes


def test_signal_by_pidfd() -> None:  # F15, G8
    pid = os.fork()
    if pid == 0:
        signal.pause()
        os._exit(0)
    fd = process.open_pidfd(pid)
    assert fd is not None
    assert not os.get_inheritable(fd)
    assert process.signal_by_pidfd(fd, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    assert process.signal_by_pidfd(fd, signal.SIGKILL) is False
    assert process.open_pidfd(pid) is None
    os.close(fd)


def refused(error: BaseException) -> str | None:
    try:
        raise error
    except BaseException as caught:
        return process.refusal(caught)


def test_what_the_system_refuses_is_one_line() -> None:  # F8, F13, X26
    """However deep nurseries have wrapped it; what is a mistake of ours keeps its traceback."""
    full = OSError(errno.EMFILE, os.strerror(errno.EMFILE))
    for error in (full, ExceptionGroup("one", [full]), ExceptionGroup("", [ExceptionGroup("", [full, MemoryError()])])):
        text = refused(error)
        assert text is not None and text.startswith("too many open files")
    assert "out of memory" in (refused(MemoryError()) or "")
    assert "af_unix path too long" in (refused(OSError("AF_UNIX path too long")) or "")  # without errno
    assert refused(ValueError("x")) is None
    assert refused(ExceptionGroup("", [full, ValueError("x")])) is None

    class TrioInternalError(Exception):
        """Of trio's own loop, which trips over what follows too."""

    def broken(cause: BaseException) -> BaseException:
        error = TrioInternalError("internal error in Trio")
        error.__cause__ = cause
        return error

    assert (refused(broken(ExceptionGroup("", [full, AssertionError()]))) or "").startswith("too many")
    assert refused(broken(AssertionError())) is None


def test_where_it_was_refused() -> None:
    with pytest.raises(OSError) as caught:
        os.close(-1)
    assert re.search(r"\(.*test_process\.py:\d+\)$", process.refusal(caught.value) or "")
