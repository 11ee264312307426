"""Enter an execution context, once and for good: limits, scheduling, identity, privileges, directory.

Done by a spawner before it serves, and by the keeper's forked child before it execs. Standard library only; pwd,
grp and resource cost nearly nothing, ctypes comes with the first capability.
"""

from __future__ import annotations

import contextlib
import errno
import grp
import os
import pwd
import resource
import select
import signal
import socket
import struct
from collections.abc import Callable, Iterable, Iterator

from superd.core.capabilities import CAPABILITIES

TYPE_CHECKING = False  # typing itself would cost the keeper memory; type checkers know the name
if TYPE_CHECKING:
    import ctypes
    from typing import NoReturn

    from superd.core.spec import Context

_PR_SET_NO_NEW_PRIVS, _PR_CAPBSET_DROP, _PR_SET_KEEPCAPS, _PR_CAP_AMBIENT = 38, 24, 8, 47  # linux/prctl.h
_PR_SET_DUMPABLE, _PR_SET_NAME = 4, 15
_RLIMIT_LOCKS = 10  # asm-generic/resource.h; the module lacks the name
_PR_CAP_AMBIENT_RAISE = 2
_CLONE_NEWNS, _CLONE_NEWPID, _CLONE_NEWNET = 0x00020000, 0x20000000, 0x40000000  # linux/sched.h
_MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_BIND, _MS_REC, _MS_PRIVATE = 2, 4, 8, 4096, 16384, 1 << 18  # linux/mount.h
_SYS_MOUNT_SETATTR = 442  # the same everywhere but on alpha
_AT_FDCWD, _AT_RECURSIVE, _MOUNT_ATTR_RDONLY = -100, 0x8000, 1
_SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8913, 0x8914, 1
_IFREQ = struct.Struct("16sh22x")

_IOPRIO_CLASSES = {"realtime": 1, "best-effort": 2, "idle": 3}
_IOPRIO_WHO_PROCESS = 1
# The number of ioprio_set(2), which no C library wraps. What is not listed uses the table of asm-generic.
_SYS_IOPRIO_SET = {"x86_64": 251, "i686": 289, "i386": 289, "armv6l": 314, "armv7l": 314, "ppc64le": 273, "s390x": 282}


class ContextError(Exception):
    """The context could not be entered: the process is in between two identities and must exit.

    stage   one of core.messages.STAGES, from "limits" to "directory"
    errno   of the system call, None when the reason stands in detail
    detail  "cannot …", naming what
    """

    def __init__(self, stage: str, errno: int | None, detail: str) -> None:
        super().__init__(stage, errno, detail)
        self.stage = stage
        self.errno = errno
        self.detail = detail

    def __str__(self) -> str:
        if self.errno is None:
            return f"{self.stage}: {self.detail}"
        reason = os.strerror(self.errno)
        return f"{self.stage}: {self.detail}: {reason[:1].lower()}{reason[1:]}"


class Entered:
    """Who this process is now.

    user_name and shell are None, and home is "/", when the uid has no passwd entry. init: process 1 of the pid
    namespace that children of this process are born in; its `life` must stay open as long as any may be.
    """

    __slots__ = ("gid", "home", "init", "shell", "uid", "user_name")

    def __init__(
        self, uid: int, gid: int, user_name: str | None, home: str, shell: str | None, init: Init | None
    ) -> None:
        self.init = init
        self.uid = uid
        self.gid = gid
        self.user_name = user_name
        self.home = home
        self.shell = shell


class _Identity:
    """What names and numbers of a Context mean on this machine, now (E11). groups None: left as they are."""

    __slots__ = ("entry", "gid", "groups", "label", "uid")

    def __init__(self, context: Context) -> None:
        user, group, groups = context.user, context.group, context.groups
        self.entry: pwd.struct_passwd | None
        if isinstance(user, str):
            self.entry = _look_up_user(user)
            self.uid = _checked_id("user", self.entry.pw_uid)
        else:
            self.uid = os.geteuid() if user is None else _checked_id("user", user)
            try:
                self.entry = pwd.getpwuid(self.uid)
            except KeyError:
                self.entry = None
        self.label = repr(user) if isinstance(user, str) else f"uid {self.uid}"
        # Who already is that user, and may not change groups, goes on with the ones he has, as any program would.
        stays = self.uid == os.geteuid()
        powerless = stays and not _may_set_groups()

        if group is not None:
            self.gid = _look_up_group("group", group)
        elif user is None or powerless:
            self.gid = os.getegid()
        elif self.entry is not None:
            self.gid = _checked_id("group", self.entry.pw_gid)
        elif stays:
            self.gid = os.getegid()
        else:
            detail = f"cannot tell the group of {self.label}, which has no passwd entry: `group` must say"
            raise ContextError("group", None, detail)

        self.groups: set[int] | None
        if groups is not None:
            self.groups = {_look_up_group("groups", name) for name in groups}
        elif user is None or powerless:
            self.groups = None
        elif self.entry is not None:
            self.groups = set(os.getgrouplist(self.entry.pw_name, self.gid))
        else:
            self.groups = set()


def enter(context: Context, *, nofile: tuple[int, int] | None, in_namespace: bool = False) -> Entered:
    """Become what `context` says, irrevocably, and verify it. nofile: RLIMIT_NOFILE for services that set none (E20).

    in_namespace: this process was forked in a `pid_namespace`. Otherwise the children of this one are born in one, if
    the context has private_pids. Then the caller does `init.prepare()` when it has imported its handler, which
    may have to look below /proc/self.

    For a single-threaded process. The order: what needs privilege (score, namespaces, limits, priorities), then
    identity, then what is left of privilege goes, then the directory, which perhaps only the new user may enter. No fd
    is opened once the limits are set: a child of the keeper may have more open than they allow.

    A uid other than 0 ends with no capability but ambient ones, uid 0 with no others that are inheritable (E22). The
    oom score is left as it is unless it is negative: a service must not be spared because superd is (E21).

    Raises ContextError. Then nothing may be executed any more: the caller reports and exits (E9).
    """
    try:
        # NSS first: it reads files and perhaps talks to a daemon, which the limits below could forbid.
        identity = _Identity(context)
        _libc()  # and what is imported later would be imported with the user's rights, under his limits
        _set_oom_score_adjust(context.oom_score_adjust)  # opens a file: the limit below may forbid that
        init = _unshare(context, in_namespace)
        _set_limits(context, nofile)
        _set_scheduling(context)
        os.umask(context.umask)
        if context.chroot is not None:
            try:
                os.chroot(context.chroot)
            except OSError as error:
                hint = _hint(error, "CAP_SYS_CHROOT")
                raise _failed("sandbox", f"cannot make {context.chroot!r} the root directory{hint}", error) from None
        kept_groups = os.getgroups()
        ambient = _bits(context.ambient_capabilities)
        _limit_capabilities(context, ambient)
        _set_identity(identity)
        _drop_privileges(identity.uid, ambient, context.no_new_privileges)
        _verify(identity, kept_groups, ambient)
        try:
            os.chdir(context.cwd)
        except (OSError, ValueError) as error:
            raise _failed("directory", f"cannot enter {context.cwd!r}", error) from None
    except MemoryError:
        raise ContextError("limits", errno.ENOMEM, "cannot go on under these limits") from None
    entry = identity.entry
    if entry is None:
        return Entered(identity.uid, identity.gid, None, "/", None, init)
    return Entered(identity.uid, identity.gid, entry.pw_name, entry.pw_dir or "/", entry.pw_shell or "/bin/sh", init)


def user_environment(entered: Entered) -> dict[str, str]:
    """HOME, and for a user with a passwd entry USER, LOGNAME and SHELL."""
    if entered.user_name is None:
        return {"HOME": entered.home}
    name = entered.user_name
    return {"HOME": entered.home, "USER": name, "LOGNAME": name, "SHELL": entered.shell or "/bin/sh"}


def _failed(stage: str, detail: str, error: Exception) -> ContextError:
    """`error` as a ContextError; one without errno (F13) gives its text."""
    number = error.errno if isinstance(error, OSError) else None
    return ContextError(stage, number, detail if number is not None else f"{detail}: {error}")


# Names


def _look_up_user(name: str) -> pwd.struct_passwd:
    try:
        return pwd.getpwnam(name)
    except (KeyError, ValueError):  # ValueError: NUL, lone surrogates
        raise ContextError("user", None, f"cannot become {name!r}: no such user") from None


def _look_up_group(stage: str, group: str | int) -> int:
    if not isinstance(group, str):
        return _checked_id(stage, group)
    try:
        return _checked_id(stage, grp.getgrnam(group).gr_gid)
    except (KeyError, ValueError):
        raise ContextError(stage, None, f"cannot join {group!r}: no such group") from None


def _checked_id(stage: str, number: int) -> int:
    """4294967295 is -1 to setresuid(2): "leave as it is", and as it is may be root."""
    if isinstance(number, bool) or not 0 <= number <= 2**32 - 2:
        raise ContextError(stage, None, f"cannot use id {number!r}: ids are 0 to {2**32 - 2}")
    return number


# The stages, in order


def _set_oom_score_adjust(wanted: int | None) -> None:
    path = "/proc/self/oom_score_adj"
    try:
        fd = os.open(path, os.O_RDWR if wanted is not None else os.O_RDONLY)
        try:
            if wanted is None:
                inherited = int(os.read(fd, 16))
                if inherited == 0:
                    return
                os.close(fd)
                fd = os.open(path, os.O_WRONLY)
                if inherited > 0:
                    # Easier to kill than need be: better at 0, but only CAP_SYS_RESOURCE may go down (proc(5)).
                    try:
                        os.write(fd, b"0")
                    except PermissionError:
                        pass
                    return
            os.write(fd, b"%d" % (wanted or 0))
        finally:
            os.close(fd)
    except FileNotFoundError:
        if wanted is not None:
            raise ContextError("oom", errno.ENOENT, f"cannot open {path}") from None
    except OSError as error:
        detail = f"cannot set oom_score_adjust to {wanted or 0}"
        if error.errno == errno.EACCES and not has_capability("CAP_SYS_RESOURCE"):
            detail += " without CAP_SYS_RESOURCE"
        raise _failed("oom", detail, error) from None


def _set_limits(context: Context, nofile: tuple[int, int] | None) -> None:
    wanted: dict[str, tuple[int, int]] = {} if nofile is None else {"nofile": nofile}
    wanted.update({name.lower(): (soft, hard) for name, soft, hard in context.rlimits})
    for name, (soft, hard) in wanted.items():
        set_limit(name, soft, hard)


def set_limit(name: str, soft: int, hard: int) -> None:
    """setrlimit(2) by the name without RLIMIT_; -1 is no limit. Raises ContextError."""
    which, _, current_hard = _limits(name, soft, hard)
    try:
        resource.setrlimit(which, (soft, hard))
    except ValueError:  # so the module reports EPERM; setrlimit(2): beyond the hard limit, or fs.nr_open
        lacking = "" if has_capability("CAP_SYS_RESOURCE") else " without CAP_SYS_RESOURCE"
        detail = f"cannot raise the hard limit of {name} from {current_hard} to {hard}{lacking}"
        raise ContextError("limits", errno.EPERM, detail) from None
    except OSError as error:
        raise _failed("limits", f"cannot set {name} to {soft}:{hard}", error) from None


def _limits(name: str, soft: int, hard: int) -> tuple[int, int, int]:
    """(number, soft and hard limit that there are)."""
    which = _RLIMIT_LOCKS if name == "locks" else getattr(resource, "RLIMIT_" + name.upper(), None)
    if which is None:
        raise ContextError("limits", None, f"cannot set {name!r}: no such limit here")
    current_soft, current_hard = resource.getrlimit(which)
    if soft != hard and hard != -1 and not 0 <= soft <= hard:
        raise ContextError("limits", None, f"cannot set {name} to {soft}: the hard limit is {hard}")
    return which, current_soft, current_hard


def raise_hard_limits(wanted: Iterable[tuple[str, int, int]]) -> None:
    """As set_limit() needs it in a child, who may not raise one any more. Soft limits stay. Raises ContextError."""
    for name, soft, hard in wanted:
        _, current_soft, current_hard = _limits(name, soft, hard)
        if current_hard != -1 and not 0 <= hard <= current_hard:
            set_limit(name, current_soft, hard)


def _set_scheduling(context: Context) -> None:
    if context.nice is not None:
        try:
            os.setpriority(os.PRIO_PROCESS, 0, context.nice)
        except OSError as error:
            lacking = "" if has_capability("CAP_SYS_NICE") else " without CAP_SYS_NICE"
            raise _failed("scheduling", f"cannot set nice to {context.nice}{lacking}", error) from None
    if context.ioprio is not None:
        name, _, level = context.ioprio.partition(":")
        value = _IOPRIO_CLASSES[name] << 13 | int(level or 0)
        number = _SYS_IOPRIO_SET.get(os.uname().machine, 30)
        try:
            _check(_libc().syscall(_long(number), _long(_IOPRIO_WHO_PROCESS), _long(0), _long(value)))
        except OSError as error:
            raise _failed("scheduling", f"cannot set ioprio to {context.ioprio!r}", error) from None
    if context.cpu_affinity is not None:
        cpus = ", ".join(map(str, context.cpu_affinity))
        try:
            os.sched_setaffinity(0, context.cpu_affinity)
        except (OSError, ValueError, OverflowError) as error:
            raise _failed("scheduling", f"cannot run on cpus {cpus}", error) from None
        # The kernel takes what it can of the set and says nothing of the rest.
        if os.sched_getaffinity(0) != set(context.cpu_affinity):
            raise ContextError("scheduling", None, f"cannot run on cpus {cpus}: not all of them are available here")


def _set_identity(identity: _Identity) -> None:
    # Each step needs the privilege that the next may take: groups, gid, uid.
    if identity.groups is not None and identity.groups != set(os.getgroups()):
        try:
            os.setgroups(sorted(identity.groups))
        except (OSError, ValueError) as error:
            hint = _hint(error, "CAP_SETGID") or _denied_hint()
            raise _failed("groups", f"cannot set the groups of {identity.label}{hint}", error) from None
    try:
        os.setresgid(identity.gid, identity.gid, identity.gid)
    except OSError as error:
        detail = f"cannot change to gid {identity.gid}{_hint(error, 'CAP_SETGID')}"
        raise _failed("group", detail, error) from None
    try:
        os.setresuid(identity.uid, identity.uid, identity.uid)
    except OSError as error:
        raise _failed("user", f"cannot become {identity.label}{_hint(error, 'CAP_SETUID')}", error) from None


def _hint(error: Exception, capability: str) -> str:
    """What the bare errno of a set*id call does not say."""
    number = error.errno if isinstance(error, OSError) else None
    if number == errno.EPERM and not has_capability(capability):
        return f" without {capability}"
    if number == errno.EINVAL:  # the only reason for an id in range, user_namespaces(7)
        return ", which this user namespace does not map"
    return ""


def _denied_hint() -> str:
    return "" if _may_set_groups() else " in a user namespace that denies setgroups"


def _may_set_groups() -> bool:
    if not has_capability("CAP_SETGID"):
        return False
    try:
        with open("/proc/self/setgroups", "rb") as file:  # user_namespaces(7)
            return file.read().strip() != b"deny"
    except OSError:
        return True


def _unshare(context: Context, in_namespace: bool) -> Init | None:
    """Namespaces of its own, and the mounts in them: unshare(2), mount(2), mount_setattr(2). Gives Entered.init."""
    mounts = context.private_tmp or context.read_only or context.read_write or context.private_pids
    kinds = {
        "mounts": _CLONE_NEWNS if mounts else 0,
        "network": _CLONE_NEWNET if context.private_network else 0,
        "processes": _CLONE_NEWPID if context.private_pids and not in_namespace else 0,
    }
    if not sum(kinds.values()):
        return None
    libc = _libc()
    try:
        _check(libc.unshare(sum(kinds.values())))
    except OSError as error:
        what = " and ".join(name for name, flag in kinds.items() if flag)
        raise _failed("sandbox", f"cannot have {what} of its own{_hint(error, 'CAP_SYS_ADMIN')}", error) from None
    if context.private_network:
        _raise_loopback()
    if not mounts:
        return None
    # Nothing that is done here may be seen outside.
    _mount("none", "/", None, _MS_REC | _MS_PRIVATE)
    init = None
    if kinds["processes"]:
        init = _fork_init(lambda: _mount_proc(context), _all_here)
        if context.handler is None:
            init.prepare()
    elif context.private_pids:
        _mount_proc(context)
    for path in ("/tmp", "/var/tmp") if context.private_tmp else ():
        if os.path.isdir(path) and not os.path.islink(path):
            _mount("tmpfs", path, "tmpfs", _MS_NOSUID | _MS_NODEV, "mode=1777")
    # The longest path decides. Each is a mount of its own first, so that it can have an attribute of its own.
    wanted = sorted([*((path, True) for path in context.read_only), *((path, False) for path in context.read_write)])
    for path, _ in wanted:
        if path != "/":
            _mount(path, path, None, _MS_BIND | _MS_REC)
    for path, read_only in wanted:
        attributes = struct.pack("=QQQQ", read_only, not read_only, 0, 0)
        try:
            _check(libc.syscall(
                _long(_SYS_MOUNT_SETATTR), _long(_AT_FDCWD), os.fsencode(path), _long(_AT_RECURSIVE), attributes,
                _long(len(attributes)),
            ))  # fmt: skip
        except OSError as error:
            mode = "read-only" if read_only else "writable"
            raise _failed("sandbox", f"cannot make {path!r} {mode}{_hint(error, 'CAP_SYS_ADMIN')}", error) from None
    return init


# Processes of its own: pid_namespaces(7)
#
# unshare(2) leaves a process where it is; its children are born in the namespace, the first of them as process 1, and
# when that one ends the kernel kills all others. So the first is one of superd's, and the service's processes are its
# siblings: children of the keeper or of a spawner, as they always are, with pids, statuses and signals as always. A
# service that were process 1 itself would not be ended by any signal that it does not handle, and one below an init
# that forwards would have two pids, two statuses and a go-between that can be killed.


@contextlib.contextmanager
def pid_namespace(prepare: Callable[[], None]) -> Iterator[None]:
    """Inside, what this process forks is in a pid namespace that is new; for one process, which then calls
    enter(in_namespace=True). `prepare` is called in process 1.

    Raises ContextError. The process must have one thread.
    """
    libc = _libc()
    own = -1
    try:
        own = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
        _check(libc.setns(own, _CLONE_NEWPID))  # there must be a way back: what cannot fork any more is lost
        _check(libc.unshare(_CLONE_NEWPID))
    except OSError as error:
        if own >= 0:
            os.close(own)
        detail = f"cannot have processes of its own{_hint(error, 'CAP_SYS_ADMIN')}"
        raise _failed("sandbox", detail, error) from None
    try:
        init = _fork_init(prepare, lambda: [2])
        try:
            init.prepare()
            yield
        finally:
            os.close(init.life)
    finally:
        try:
            _check(libc.setns(own, _CLONE_NEWPID))
        finally:
            os.close(own)


class Init:
    """Process 1 of a pid namespace. It lives until `life` is closed and nobody else is left there."""

    __slots__ = ("life", "pid")

    def __init__(self, pid: int, life: int) -> None:
        self.pid = pid
        self.life = life  # one end of a socket pair

    def prepare(self) -> None:
        """Let it do what it was given to do; until then it has all rights. Raises ContextError."""
        os.write(self.life, b"do")
        answer = os.read(self.life, _ANSWER_BYTES) or b"sandbox\0\0process 1 of its own has ended"
        if answer != b"done":
            stage, number, detail = os.fsdecode(answer).split("\0", 2)
            raise ContextError(stage, int(number) if number else None, detail)


_ANSWER_BYTES = 4096


def _fork_init(prepare: Callable[[], None], guests: Callable[[], list[int]]) -> Init:
    """guests: those that were born in the namespace and are none of its own children; asked for when there will be no
    more of them."""
    try:
        life, its = (sock.detach() for sock in socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET))
    except OSError as error:
        raise _failed("sandbox", "cannot start process 1 of its own", error) from None
    try:
        pid = os.fork()
    except OSError as error:
        os.close(life)
        os.close(its)
        raise _failed("sandbox", "cannot start process 1 of its own", error) from None
    if pid:
        os.close(its)
        return Init(pid, life)
    try:
        os.close(life)
        _be_init(its, prepare, guests)
    except BaseException as error:  # boundary: the child reports and ends, always
        if not isinstance(error, ContextError):
            error = ContextError("sandbox", None, f"cannot start process 1 of its own: {error!r}")
        number = "" if error.errno is None else error.errno
        os.write(its, os.fsencode(f"{error.stage}\0{number}\0{error.detail}")[:_ANSWER_BYTES])
    finally:
        os._exit(1)


def _be_init(life: int, prepare: Callable[[], None], guests: Callable[[], list[int]]) -> NoReturn:
    """No signal from inside reaches it; once it has prepared all it has no right and no file."""
    import ctypes

    name = ctypes.create_string_buffer(b"superd-init")
    _libc().prctl(_PR_SET_NAME, ctypes.addressof(name), 0, 0, 0)
    _libc().prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
    os.setsid()
    os.chdir("/")
    os.closerange(0, life)
    os.closerange(life + 1, 1 << 20)
    if os.read(life, 2):
        prepare()
        _set_capabilities(0, 0, 0)
        os.write(life, b"done")
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps
    os.read(life, 1)
    poll = select.poll()
    left = 0
    for pid in guests():
        with contextlib.suppress(ProcessLookupError):
            poll.register(os.pidfd_open(pid), select.POLLIN)
            left += 1
    while left:
        for fd, _ in poll.poll():
            poll.unregister(fd)
            left -= 1
    # Whoever else there is lost his parent to this process.
    with contextlib.suppress(ChildProcessError):
        os.wait()
    os._exit(0)


def _all_here() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit() and name != "1"]


def _mount_proc(context: Context) -> None:
    """One that shows the namespace of the caller, over the one that shows all."""
    for root in ("", context.chroot):
        if root is not None and (not root or os.path.isdir(f"{root}/proc")):
            _mount("proc", f"{root}/proc", "proc", _MS_NOSUID | _MS_NODEV | _MS_NOEXEC)


def _mount(source: str, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    encoded = [None if text is None else os.fsencode(text) for text in (source, target, kind, data)]
    try:
        _check(_libc().mount(encoded[0], encoded[1], encoded[2], flags, encoded[3]))
    except OSError as error:
        raise _failed("sandbox", f"cannot mount at {target!r}{_hint(error, 'CAP_SYS_ADMIN')}", error) from None


def _raise_loopback() -> None:
    """A network namespace is born with its loopback interface down, netdevice(7)."""
    import fcntl

    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            _, flags = _IFREQ.unpack(fcntl.ioctl(sock, _SIOCGIFFLAGS, _IFREQ.pack(b"lo", 0)))
            fcntl.ioctl(sock, _SIOCSIFFLAGS, _IFREQ.pack(b"lo", flags | _IFF_UP))
    except OSError as error:
        raise _failed("sandbox", "cannot set up the loopback interface of its own network", error) from None


def _limit_capabilities(context: Context, ambient: int) -> None:
    """The bounding set, while we may; and that ambient ones survive the change of uid."""
    effective, permitted, _ = _get_capabilities()
    missing = [name for name in context.ambient_capabilities if not permitted & _bits((name,))]
    if missing:
        detail = f"cannot keep CAP_{', CAP_'.join(missing)}: superd does not have it"
        raise ContextError("capabilities", None, detail)
    try:
        if context.capabilities is not None:
            kept = _bits(context.capabilities) | ambient
            for number in range(64):
                if not kept >> number & 1 and _libc().prctl(_PR_CAPBSET_DROP, number, 0, 0, 0) == -1:
                    _check_capability_drop(number)
            if os.geteuid() == 0 and context.user in (None, 0, "root"):
                needed = _bits(("SETGID", "SETUID", "SETPCAP"))  # for what follows; exec leaves the bounding set
                _set_capabilities(effective & (kept | needed), permitted & (kept | needed), ambient)
        if ambient:
            _check(_libc().prctl(_PR_SET_KEEPCAPS, 1, 0, 0, 0))
    except OSError as error:
        raise _failed("capabilities", f"cannot limit capabilities{_hint(error, 'CAP_SETPCAP')}", error) from None


def _check_capability_drop(number: int) -> None:
    import ctypes

    error = ctypes.get_errno()
    if error != errno.EINVAL:  # EINVAL: this kernel has no such capability
        raise OSError(error, os.strerror(error))


def _drop_privileges(uid: int, ambient: int, no_new_privileges: bool) -> None:
    try:
        if uid == 0:
            effective, permitted, _ = _get_capabilities()
            _set_capabilities(effective, permitted, ambient)
        else:
            # setresuid(2) drops them only on the way from 0, not where superd lives on ambient or file capabilities.
            _set_capabilities(ambient, ambient, ambient)
        for number in range(ambient.bit_length()):
            if ambient >> number & 1:
                _check(_libc().prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_RAISE, number, 0, 0))
    except OSError as error:
        raise _failed("capabilities", "cannot drop capabilities", error) from None
    if no_new_privileges:
        try:
            set_no_new_privileges()
        except OSError as error:
            raise _failed("sandbox", "cannot set no_new_privileges", error) from None


def _verify(identity: _Identity, kept_groups: list[int], ambient: int) -> None:
    """Trust no return value where the price of a mistake is root (E8, E9)."""
    uids, gids, groups = os.getresuid(), os.getresgid(), set(os.getgroups())
    if uids != (identity.uid,) * 3:
        raise ContextError("verify", None, f"cannot trust the uids: {uids}, not {identity.uid}")
    if gids != (identity.gid,) * 3:
        raise ContextError("verify", None, f"cannot trust the gids: {gids}, not {identity.gid}")
    if groups != (set(kept_groups) if identity.groups is None else identity.groups):
        raise ContextError("verify", None, f"cannot trust the groups: {sorted(groups)}")
    effective, permitted, inheritable = _get_capabilities()
    if inheritable != ambient or (identity.uid != 0 and (effective | permitted) != ambient):
        raise ContextError("verify", None, "cannot get rid of capabilities")


# Capabilities, capabilities(7)


def has_capability(name: str) -> bool:
    """Whether "CAP_SETUID" and the like is effective in this process. Needs no /proc.

    Raises ValueError for a name that linux/capability.h did not know when this was written.
    """
    return bool(_get_capabilities()[0] >> CAPABILITIES.index(name.removeprefix("CAP_")) & 1)


def _bits(names: tuple[str, ...]) -> int:
    return sum(1 << CAPABILITIES.index(name) for name in names)


def set_no_new_privileges() -> None:
    """From now on exec gives no privileges, set-uid bits mean nothing; for good (PR_SET_NO_NEW_PRIVS(2const), E23)."""
    _check(_libc().prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))


_libc_cached: ctypes.CDLL | None = None


def _libc() -> ctypes.CDLL:
    global _libc_cached
    if _libc_cached is None:
        import ctypes

        _libc_cached = ctypes.CDLL(None, use_errno=True)
        _libc_cached.prctl.argtypes = [ctypes.c_int] + [ctypes.c_ulong] * 4
        _libc_cached.mount.argtypes = [ctypes.c_char_p] * 3 + [ctypes.c_ulong, ctypes.c_char_p]
        _libc_cached.syscall.restype = ctypes.c_long
    return _libc_cached


def _long(number: int) -> ctypes.c_long:
    """An argument of syscall(2): without a type ctypes would pass 32 bits of the register."""
    import ctypes

    return ctypes.c_long(number)


def _check(result: int) -> None:
    import ctypes

    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _capability_header() -> ctypes.Array[ctypes.c_uint32]:
    import ctypes

    return (ctypes.c_uint32 * 2)(0x20080522, 0)  # capget(2): _LINUX_CAPABILITY_VERSION_3, this thread


def _get_capabilities() -> tuple[int, int, int]:
    """(effective, permitted, inheritable) as bit sets."""
    import ctypes

    data = (ctypes.c_uint32 * 6)()
    _check(_libc().capget(_capability_header(), data))
    return data[0] | data[3] << 32, data[1] | data[4] << 32, data[2] | data[5] << 32


def _set_capabilities(*sets: int) -> None:
    import ctypes

    data = (ctypes.c_uint32 * 6)(*(part & 0xFFFFFFFF for part in sets), *(part >> 32 for part in sets))
    _check(_libc().capset(_capability_header(), data))
