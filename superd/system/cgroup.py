"""Control groups, cgroups(7) v2: one for each service that is one process, so that no descendant of it is ever lost,
and one for each service that has limits.

    OWN CGROUP/superd.KEEPER/SERVICE
    OWN CGROUP/superd.KEEPER/_superd    superd itself, once limits are wanted

Membership and cgroup.kill need no controller: what is there is used, and where there is nothing (no cgroup v2, not
writable) the callers do with sessions and the subreaper. Limits need controllers, which a group gets from the one above
(cgroup.subtree_control), and which no group can give while processes are in it, except the root of the machine ("no
internal processes"). So superd leaves its own group then, if nobody else is in it, and comes back at its end.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import select
import signal
import struct
from collections.abc import Callable, Collection, Mapping

_SYS_CLONE3 = 435  # on every architecture
_BORN_MS = 50
_CLONE_INTO_CGROUP = 1 << 33  # linux/sched.h
_STALE = re.compile(r"superd\.([0-9]+)")
_LEAF = "_superd"  # what no service can be called
_ROUNDS = 10  # to move everybody, while some fork


class GroupError(OSError):
    """What a group or its limits need and do not find, with the file that it is about."""

    def __init__(self, number: int, why: str, path: str) -> None:
        super().__init__(number, why, path)

    def __str__(self) -> str:
        return f"{self.filename}: {self.strerror}"


def base(keeper: int) -> str:
    """The directory below which this superd's services get theirs, made if need be. Raises GroupError.

    Groups that a superd which was killed has left are removed when nobody is in them any more.
    """
    own = _own(keeper)
    if own is None:
        raise GroupError(errno.ENOENT, "no cgroup of version 2 is mounted that this process is in", "/proc/self/cgroup")
    path = os.path.join(own, f"superd.{keeper}")
    try:
        for name in os.listdir(own):
            found = _STALE.fullmatch(name)
            if found and int(found[1]) != keeper and not os.path.exists(f"/proc/{found[1]}"):
                remove(os.path.join(own, name))
        os.makedirs(path, mode=0o755, exist_ok=True)
    except OSError as error:
        raise _failed(path, error) from None
    procs = os.path.join(path, "cgroup.procs")
    if not os.access(procs, os.W_OK):
        remove(path)
        raise GroupError(errno.EACCES, "it cannot be written", procs)
    return path


def _failed(path: str, error: OSError) -> GroupError:
    reason = os.strerror(error.errno or 0)
    return GroupError(error.errno or 0, f"{reason[:1].lower()}{reason[1:]}", path)


def _own(keeper: int) -> str | None:
    """The directory of the cgroup that this superd was started in."""
    try:
        with open("/proc/self/cgroup") as file:
            inside = next((line[3:].rstrip("\n") for line in file if line.startswith("0::")), None)
        with open("/proc/self/mountinfo") as file:
            mounts = [line.split() for line in file]
    except OSError:
        return None
    inside = None if inside is None else inside.removesuffix(f"/superd.{keeper}/{_LEAF}") or "/"
    for fields in mounts:
        if fields[fields.index("-") + 1] == "cgroup2" and inside is not None:
            root, point = fields[3], re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), fields[4])
            if root == "/":
                return os.path.normpath(point + inside)
            if inside == root or inside.startswith(root + "/"):
                return os.path.normpath(point + inside.removeprefix(root))
    return None


def make(parent: str, name: str) -> str:
    """The directory of the group `name`. Raises GroupError (cgroup.max.descendants)."""
    path = os.path.join(parent, name)
    try:
        os.makedirs(path, mode=0o755, exist_ok=True)
    except OSError as error:
        raise _failed(path, error) from None
    return path


def join(path: str, pid: int = 0) -> None:
    """Move a process, or this one, into the group. Raises OSError."""
    _write(os.path.join(path, "cgroup.procs"), str(pid))


def fork(path: str | None) -> tuple[int, bool]:
    """os.fork(), and whether the child begins its life in the group: one that goes there waits 6 to 20 ms for the
    kernel. False, also in the child: no group is asked for, or it has to join. Raises OSError.

    clone3(2) with CLONE_INTO_CGROUP, Linux 5.7. What os.fork() does besides CPython has for whoever forks by himself
    (PyOS_BeforeFork); the C library does not hear of it, and takes the child for the thread it was until it calls exec.

    All signals are blocked in the child: who signals everybody in the group would else have the parent's handlers run
    there. process.reset_signals() undoes it.
    """
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    number = -1
    try:
        number = -1 if path is None else _fork_into(path)
        is_there = number >= 0
        if not is_there:
            number = os.fork()
        return number, is_there
    finally:
        if number != 0:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _fork_into(path: str) -> int:
    """As fork(2); -1: it cannot be done here."""
    import ctypes

    system_call = ctypes.PyDLL(None, use_errno=True).syscall
    system_call.restype = ctypes.c_long
    fds: list[int] = []
    try:
        fds.append(os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
        fds += os.pipe2(os.O_CLOEXEC)
        group, reader, writer = fds
        # struct clone_args: flags, pidfd, child_tid, parent_tid, exit_signal, stack, stack_size, tls, set_tid,
        # set_tid_size, cgroup.
        arguments = struct.pack("11Q", _CLONE_INTO_CGROUP, 0, 0, 0, signal.SIGCHLD, 0, 0, 0, 0, 0, group)
        python = ctypes.pythonapi
        python.PyOS_BeforeFork()
        number: int = system_call(_SYS_CLONE3, arguments, ctypes.c_size_t(len(arguments)))
        if number == 0:
            python.PyOS_AfterFork_Child()
            os.write(writer, b".")
            return 0
        python.PyOS_AfterFork_Parent()
        if number < 0:
            return -1  # no such call, or refused: os.fork() says if it is more than that
        os.close(fds.pop())
        poll = select.poll()
        poll.register(reader)
        if not poll.poll(_BORN_MS) or os.read(reader, 1):  # nothing by then: a group that is frozen, cgroup.freeze
            return number
        # Linux 6.18, for one, kills whoever is born into a group that cgroup.kill was ever written to.
        os.waitpid(number, 0)
        return -1
    except OSError:
        return -1
    finally:
        for fd in fds:
            os.close(fd)


def _write(path: str, text: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)


def _words(directory: str, name: str) -> list[str]:
    path = os.path.join(directory, name)
    try:
        with open(path) as file:
            return file.read().split()
    except OSError as error:
        raise _failed(path, error) from None


def limit(path: str, files: Mapping[str, str], ours: Callable[[], Collection[int]]) -> None:
    """Give the group these limits: name of a file -> what it is to say, "max" for none. Raises GroupError.

    ours: pids of superd and of all below it, which may have to move.
    """
    for name, text in files.items():
        file = os.path.join(path, name)
        if not os.path.exists(file):
            if text == "max":
                continue  # nobody limits anything
            _enable(name.partition(".")[0], os.path.dirname(path), ours)
        try:
            _write(file, text)
        except OSError as error:
            raise _failed(file, error) from None


def _enable(controller: str, base: str, ours: Callable[[], Collection[int]]) -> None:
    """Let the groups of services have the controller."""
    own = os.path.dirname(base)
    for directory in (own, base):
        found = _words(directory, "cgroup.controllers")
        if controller not in found:
            there = f"it lists {' '.join(found)}" if found else "it lists nothing"
            path = os.path.join(directory, "cgroup.controllers")
            raise GroupError(errno.ENOENT, f"there is no {controller} controller, {there}", path)
        if controller in _words(directory, "cgroup.subtree_control"):
            continue
        # The kernel takes pids and cpu also from a group with processes in it, and then allows no other groups below
        # but for threads. Only the root of the machine, which has no type, is free of all this.
        if directory == own and os.path.exists(os.path.join(own, "cgroup.type")):
            _make_room(own, base, ours)
        path = os.path.join(directory, "cgroup.subtree_control")
        try:
            _write(path, f"+{controller}")
        except OSError as error:
            raise _failed(path, error) from None


def _make_room(own: str, base: str, ours: Callable[[], Collection[int]]) -> None:
    """Move superd and its processes out of the group that it was started in. Not a stranger's: it is not ours to say
    where he belongs."""
    leaf = make(base, _LEAF)
    procs = os.path.join(own, "cgroup.procs")
    for _ in range(_ROUNDS):
        pids = [int(word) for word in _words(own, "cgroup.procs")]
        if not pids:
            return
        known = ours()
        if strangers := [pid for pid in pids if pid not in known]:
            who = ", ".join(map(str, strangers[:5])) + (", …" if len(strangers) > 5 else "")
            why = f"processes that are not superd's ({who}) are in the group that superd was started in"
            raise GroupError(errno.EBUSY, why, procs)
        for pid in pids:
            try:
                join(leaf, pid)
            except ProcessLookupError:
                pass  # it has ended
            except OSError as error:
                raise _failed(os.path.join(leaf, "cgroup.procs"), error) from None


def leave(base: str) -> None:
    """Remove this superd's groups; who is in them goes back to where superd was started."""
    own = os.path.dirname(base)
    if os.path.isdir(os.path.join(base, _LEAF)):
        # All that is given there was given by us: it could not be while we were in it.
        for directory in (base, own):
            with contextlib.suppress(OSError):
                for controller in _words(directory, "cgroup.subtree_control"):
                    _write(os.path.join(directory, "cgroup.subtree_control"), f"-{controller}")
    for pid in members(base):
        with contextlib.suppress(OSError):
            join(own, pid)
    remove(base)


def usage(path: str) -> dict[str, int]:
    """What the group has of each thing that is counted there: memory in bytes, pids."""
    found = {}
    for name in ("memory", "pids"):
        with contextlib.suppress(OSError, ValueError), open(os.path.join(path, f"{name}.current")) as file:
            found[name] = int(file.read())
    return found


def killed_for_memory(path: str) -> int:
    """How many processes of the group the kernel has killed because of memory.max, and in all."""
    with contextlib.suppress(GroupError, ValueError):
        words = _words(path, "memory.events")
        return int(dict(zip(words[::2], words[1::2], strict=False)).get("oom_kill", 0))
    return 0


def members(path: str) -> list[int]:
    """Pids of the processes in the group and in those below it."""
    found: list[int] = []
    for directory, _, files in os.walk(path):
        if "cgroup.procs" in files:
            with contextlib.suppress(OSError), open(os.path.join(directory, "cgroup.procs")) as file:
                found += map(int, file.read().split())
    return found


def kill(path: str) -> bool:
    """SIGKILL to everybody in the group at once, forks in flight included. False where the kernel (before 5.14) has no
    cgroup.kill."""
    try:
        fd = os.open(os.path.join(path, "cgroup.kill"), os.O_WRONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        os.write(fd, b"1")
    except OSError:
        return False
    finally:
        os.close(fd)
    return True


def remove(path: str) -> None:
    """Remove the group and those below it, as far as nobody is in them."""
    for directory, _, _ in os.walk(path, topdown=False):
        with contextlib.suppress(OSError):
            os.rmdir(directory)
