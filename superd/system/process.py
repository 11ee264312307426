"""What a process does to itself, and to others by pid: the few system calls that Python lacks.

Each role imports this first, so the imports are counted: 0.5 MB for ctypes, loaded at the first prctl.
"""

from __future__ import annotations

import errno
import os
import resource
import signal

TYPE_CHECKING = False  # typing itself would cost the keeper memory; type checkers know the name
if TYPE_CHECKING:
    import ctypes
    from collections.abc import Callable, Iterable, Iterator

_PR_SET_NAME = 15  # linux/prctl.h
_PR_SET_CHILD_SUBREAPER = 36
_M_TRIM_THRESHOLD, _TRIM_BYTES = -1, 64 << 10  # malloc.h
_SYS_CLOSE_RANGE = 436  # the same everywhere but on alpha
_SYS_RT_SIGACTION = {
    "x86_64": 13, "aarch64": 134, "riscv64": 134, "loongarch64": 134, "i686": 174, "armv7l": 174, "armv6l": 174,
    "s390x": 174, "ppc64le": 173,
}  # fmt: skip
_DEFAULT_ACTION = bytes(64)  # struct sigaction of the kernel: SIG_DFL, no flags, empty mask

_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep

_libc_cached: ctypes.CDLL | None = None
_pidfs: bool | None = None  # whether pidfds have inode numbers of their own; a property of the kernel


def _libc() -> ctypes.CDLL:
    global _libc_cached
    if _libc_cached is None:
        import ctypes

        _libc_cached = ctypes.CDLL(None, use_errno=True)
        _libc_cached.prctl.argtypes = [ctypes.c_int] + [ctypes.c_ulong] * 4
        _libc_cached.syscall.restype = ctypes.c_long
    return _libc_cached


def _prctl(option: int, argument: int) -> None:
    import ctypes

    if _libc().prctl(option, argument, 0, 0, 0) == -1:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def refusal(error: BaseException) -> str | None:
    """What the system refused, and where, if an exception is nothing but that: no traceback says more. Else None."""
    inside = error.__cause__ if type(error).__name__ == "TrioInternalError" else None
    leaves = list(_leaves(inside or error))
    refused = [leaf for leaf in leaves if isinstance(leaf, OSError | MemoryError)]
    if not refused or (inside is None and len(refused) < len(leaves)):  # trio, of its own, trips over what follows
        return None
    first, where, trace = refused[0], "", refused[0].__traceback__
    while trace is not None:
        path = trace.tb_frame.f_code.co_filename
        if path.startswith(_PACKAGE) or not where:  # the innermost place of our own
            where = f" ({path.removeprefix(_PACKAGE)}:{trace.tb_lineno})"
        trace = trace.tb_next
    what = (first.strerror or str(first)).lower() if isinstance(first, OSError) else "out of memory"
    return f"{what}{where}"


def _leaves(error: BaseException) -> Iterator[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        for one in error.exceptions:
            yield from _leaves(one)
    else:
        yield error


# What this process is


def give_memory_back() -> None:
    """Let the C library return what is freed. By itself it raises the threshold for that after each large block, and
    1,000 reloads then leave 0.5 MB more. A C library without mallopt(3) does as it likes."""
    mallopt = getattr(_libc(), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_TRIM_THRESHOLD, _TRIM_BYTES)


def set_name(name: str) -> None:
    """Give the calling thread the name that ps and pgrep show; the kernel keeps 15 bytes (PR_SET_NAME(2const)).

    Nothing depends on it, so a filter that refuses prctl(2) is nothing to fail for.
    """
    function, arguments = name_setting(name)
    function(*arguments)


def name_setting(name: str) -> tuple[Callable[..., object], tuple[object, ...]]:
    """What `set_name` calls, with what, for a child that pays for each page it touches."""
    import ctypes

    return ctypes.PyDLL(None).prctl, (_PR_SET_NAME, ctypes.create_string_buffer(name.encode()[:15]))


def become_subreaper() -> bool:
    """Adopt orphaned descendants as PID 1 would; False where the kernel refuses (PR_SET_CHILD_SUBREAPER(2const))."""
    try:
        _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    except OSError:
        return False
    return True


def pidfd_inode() -> int | None:
    """Inode number of a pidfd of this process, for LISTEN_PIDFDID; None before Linux 6.9, where all share one.

    Unique until the next boot. Four system calls, so a forked child can ask just before it execs.
    """
    global _pidfs
    try:
        fd = os.pidfd_open(os.getpid())
    except OSError:
        return None
    try:
        status = os.fstat(fd)
        if _pidfs is None:
            # Before pidfs a pidfd was an anonymous inode, like an eventfd. This needs no /proc and no statfs layout.
            other = os.eventfd(0)
            try:
                _pidfs = status.st_dev != os.fstat(other).st_dev
            finally:
                os.close(other)
    except OSError:  # EMFILE: the variable is optional
        return None
    finally:
        os.close(fd)
    return status.st_ino if _pidfs else None


# What it was started with


def sanitize_inherited_fds(keep: Iterable[int] = ()) -> list[int]:
    """Make fds 0, 1, 2 valid and close every other one, except those in `keep` (E2, E25). The first act of superd.

    A standard fd that was closed becomes /dev/null. Returns the fds of `keep` that are open, sorted; they are
    close-on-exec from now on.

    Raises OSError when fds 0, 1, 2 cannot be had (EMFILE).
    """
    fill_standard_fds()
    kept = sorted({fd for fd in keep if fd > 2 and _is_open(fd)})
    first = 3
    for fd in kept:
        os.set_inheritable(fd, False)
        _close_range(first, fd - 1)
        first = fd + 1
    _close_range(first, 2**32 - 1)
    return kept


def fill_standard_fds() -> None:
    """Make fds 0, 1, 2 valid: what is opened next must not become fd 2 by chance (E25). One that was closed becomes
    /dev/null.

    Raises OSError when they cannot be had (EMFILE).
    """
    for fd in (0, 1, 2):
        if not _is_open(fd):
            null = _open_null()  # the lowest free number, which is fd: the ones below are open
            if null != fd:
                os.dup2(null, fd)
                os.close(null)
            os.set_inheritable(fd, True)


def _is_open(fd: int) -> bool:
    try:
        os.get_inheritable(fd)
    except OSError:
        return False
    return True


def _open_null() -> int:
    try:
        return os.open("/dev/null", os.O_RDWR)
    except OSError:
        # A bare root directory. The reading end of a pipe that nobody writes: reads see the end of the file, writes
        # fail with EBADF and, unlike those to a closed socket, raise no SIGPIPE.
        reader, writer = os.pipe()
        os.close(writer)
        return reader


def _close_range(first: int, last: int) -> None:
    if first > last:
        return
    # Not os.closerange at once: where the kernel lacks close_range(2) it tries every number up to `last`.
    from ctypes import c_uint

    if _libc().syscall(_SYS_CLOSE_RANGE, c_uint(first), c_uint(last), c_uint(0)) != 0:
        os.closerange(first, min(last, os.sysconf("SC_OPEN_MAX")) + 1)


def raise_nofile() -> tuple[int, int]:
    """Raise the soft limit of open files to the hard one; returns the (soft, hard) of before, for children (E20)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (OSError, ValueError):  # fs.nr_open was lowered since: stay with what there is
        pass
    return soft, hard


def reset_signals(keep: Iterable[int] = ()) -> None:
    """Give every signal its default action and empty the mask, except for those in `keep` (E5, E6).

    For a forked child before exec. Block all signals before the fork: until this returns, a handler of the
    parent would run here, and tell the parent through the wakeup fd that both share.
    """
    kept = set(keep)
    signal.set_wakeup_fd(-1)
    for signo in range(1, signal.NSIG):
        # 32 and 33 are the C library's own.
        if signo in (signal.SIGKILL, signal.SIGSTOP, 32, 33) or signo in kept:
            continue
        try:
            signal.signal(signo, signal.SIG_DFL)
        except OSError as error:
            if error.errno != errno.EINVAL:  # EINVAL: another number that the C library keeps
                raise
    _reset_internal_signals()
    signal.pthread_sigmask(signal.SIG_SETMASK, kept & signal.pthread_sigmask(signal.SIG_BLOCK, ()))


def _reset_internal_signals() -> None:
    """The two signals that the C library keeps for itself can be ignored all the same, and are inherited: glibc's
    posix_spawn ignores them in its children, such as those of GNU make. Only the kernel's own call resets them."""
    number = _SYS_RT_SIGACTION.get(os.uname().machine)
    if number is not None:
        from ctypes import c_int, c_size_t

        for signo in (32, 33):
            _libc().syscall(number, c_int(signo), _DEFAULT_ACTION, None, c_size_t(8))


def exit_on(signals: Iterable[int]) -> None:
    """Make each of these end the process with the signal's number as status, from C: for faults of PID 1.

    A handler of Python's would only take a note and let the faulting instruction run again, and the default action is
    none at all for the first process of a pid namespace when somebody sends the signal (pid_namespaces(7)).
    """
    import ctypes

    libc = _libc()
    handler = ctypes.cast(libc._exit, ctypes.c_void_p)
    for signo in signals:
        libc.signal(ctypes.c_int(signo), handler)


def environment_as_found() -> dict[str, str]:
    """What this process was started with, without the LC_CTYPE that the interpreter sets in the C locale (PEP 538)."""
    found = dict(os.environ)
    if found.get("LC_CTYPE") in ("C.UTF-8", "C.utf8", "UTF-8"):
        try:
            with open("/proc/self/environ", "rb") as file:
                if not any(line.startswith(b"LC_CTYPE=") for line in file.read().split(b"\0")):
                    del found["LC_CTYPE"]
        except OSError:
            pass  # no /proc to tell: it does no harm
    return found


# Other processes


def open_pidfd(pid: int) -> int | None:
    """A close-on-exec pidfd that the caller owns; None when there is no such process (pidfd_open(2)).

    Only the parent can be sure that it names the right process, and only until it reaps it (F15).
    """
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        return None


def signal_by_pidfd(pidfd: int, signo: int) -> bool:
    """Send a signal; False when the process has been reaped, which is no error (G8). Never hits a stranger (F15)."""
    try:
        signal.pidfd_send_signal(pidfd, signo)
    except ProcessLookupError:
        return False
    return True
