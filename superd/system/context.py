"""Enter an execution context, once and for good: limits, scheduling, identity, privileges, directory.

Done by a spawner before it serves, and by the keeper's forked child before it execs. Standard library only; pwd,
grp and resource cost nearly nothing, ctypes comes with the first capability.
"""

from __future__ import annotations

import errno
import grp
import os
import pwd
import resource

TYPE_CHECKING = False  # typing itself would cost the keeper memory; type checkers know the name
if TYPE_CHECKING:
    import ctypes

    from superd.core.spec import Context

_PR_SET_NO_NEW_PRIVS = 38  # linux/prctl.h

# By number, linux/capability.h.
_CAPABILITIES = (
    "CHOWN", "DAC_OVERRIDE", "DAC_READ_SEARCH", "FOWNER", "FSETID", "KILL", "SETGID", "SETUID", "SETPCAP",
    "LINUX_IMMUTABLE", "NET_BIND_SERVICE", "NET_BROADCAST", "NET_ADMIN", "NET_RAW", "IPC_LOCK", "IPC_OWNER",
    "SYS_MODULE", "SYS_RAWIO", "SYS_CHROOT", "SYS_PTRACE", "SYS_PACCT", "SYS_ADMIN", "SYS_BOOT", "SYS_NICE",
    "SYS_RESOURCE", "SYS_TIME", "SYS_TTY_CONFIG", "MKNOD", "LEASE", "AUDIT_WRITE", "AUDIT_CONTROL", "SETFCAP",
    "MAC_OVERRIDE", "MAC_ADMIN", "SYSLOG", "WAKE_ALARM", "BLOCK_SUSPEND", "AUDIT_READ", "PERFMON", "BPF",
    "CHECKPOINT_RESTORE",
)  # fmt: skip

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

    def to_tuple(self) -> tuple[str, int | None, str]:
        """What travels from the process that failed to the one that reports it."""
        return self.stage, self.errno, self.detail

    @classmethod
    def from_tuple(cls, fields: tuple[str, int | None, str] | list[str | int | None]) -> ContextError:
        stage, number, detail = fields
        return cls(str(stage), None if number is None else int(number), str(detail))


class Entered:
    """Who this process is now.

    user_name and shell are None, and home is "/", when the uid has no passwd entry.
    """

    __slots__ = ("gid", "home", "shell", "uid", "user_name")

    def __init__(self, uid: int, gid: int, user_name: str | None, home: str, shell: str | None) -> None:
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


def enter(context: Context, *, nofile: tuple[int, int] | None) -> Entered:
    """Become what `context` says, irrevocably, and verify it. nofile: RLIMIT_NOFILE for services that set none (E20).

    For a single-threaded process. The order: what needs privilege (score, limits, priorities), then identity,
    then what is left of privilege goes, then the directory, which perhaps only the new user may enter. No fd is
    opened once the limits are set: a child of the keeper may have more open than they allow.

    A uid other than 0 ends with no capability at all, uid 0 with no inheritable or ambient one (E22). The oom
    score is left as it is unless it is negative: a service must not be spared because superd is (E21).

    Raises ContextError. Then nothing may be executed any more: the caller reports and exits (E9).
    """
    try:
        # NSS first: it reads files and perhaps talks to a daemon, which the limits below could forbid.
        identity = _Identity(context)
        _libc()  # and what is imported later would be imported with the user's rights, under his limits
        _set_oom_score_adjust(context.oom_score_adjust)  # opens a file: the limit below may forbid that
        _set_limits(context, nofile)
        _set_scheduling(context)
        os.umask(context.umask)
        kept_groups = os.getgroups()
        _set_identity(identity)
        _drop_privileges(identity.uid, context.no_new_privileges)
        _verify(identity, kept_groups)
        try:
            os.chdir(context.cwd)
        except (OSError, ValueError) as error:
            raise _failed("directory", f"cannot enter {context.cwd!r}", error) from None
    except MemoryError:
        raise ContextError("limits", errno.ENOMEM, "cannot go on under these limits") from None
    entry = identity.entry
    if entry is None:
        return Entered(identity.uid, identity.gid, None, "/", None)
    return Entered(identity.uid, identity.gid, entry.pw_name, entry.pw_dir or "/", entry.pw_shell or "/bin/sh")


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
    wanted: dict[str, tuple[int, int | None]] = {} if nofile is None else {"nofile": nofile}
    wanted.update({name.lower(): (soft, hard) for name, soft, hard in context.rlimits})
    for name, (soft, hard) in wanted.items():
        set_limit(name, soft, hard)


def set_limit(name: str, soft: int, hard: int | None) -> None:
    """setrlimit(2) by the name without RLIMIT_; -1 is no limit, hard None the one there is. Raises ContextError."""
    which = getattr(resource, "RLIMIT_" + name.upper(), None)
    if which is None:
        raise ContextError("limits", None, f"cannot set {name!r}: no such limit here")
    current_hard = resource.getrlimit(which)[1]
    if hard is None:
        hard = current_hard
    if soft != hard and hard != -1 and not 0 <= soft <= hard:
        raise ContextError("limits", None, f"cannot set {name} to {soft}: the hard limit is {hard}")
    try:
        resource.setrlimit(which, (soft, hard))
    except ValueError:  # so the module reports EPERM; setrlimit(2): beyond the hard limit, or fs.nr_open
        lacking = "" if has_capability("CAP_SYS_RESOURCE") else " without CAP_SYS_RESOURCE"
        detail = f"cannot raise the hard limit of {name} from {current_hard} to {hard}{lacking}"
        raise ContextError("limits", errno.EPERM, detail) from None
    except OSError as error:
        raise _failed("limits", f"cannot set {name} to {soft}:{hard}", error) from None


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
            _check(_libc().syscall(number, _IOPRIO_WHO_PROCESS, 0, value))
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


def _drop_privileges(uid: int, no_new_privileges: bool) -> None:
    try:
        if uid == 0:
            drop_inheritable()
        else:
            # setresuid(2) drops them only on the way from 0, not where superd lives on ambient or file capabilities.
            _set_capabilities(0, 0, 0)
    except OSError as error:
        raise _failed("capabilities", "cannot drop capabilities", error) from None
    if no_new_privileges:
        try:
            set_no_new_privileges()
        except OSError as error:
            raise _failed("sandbox", "cannot set no_new_privileges", error) from None


def _verify(identity: _Identity, kept_groups: list[int]) -> None:
    """Trust no return value where the price of a mistake is root (E8, E9)."""
    uids, gids, groups = os.getresuid(), os.getresgid(), set(os.getgroups())
    if uids != (identity.uid,) * 3:
        raise ContextError("verify", None, f"cannot trust the uids: {uids}, not {identity.uid}")
    if gids != (identity.gid,) * 3:
        raise ContextError("verify", None, f"cannot trust the gids: {gids}, not {identity.gid}")
    if groups != (set(kept_groups) if identity.groups is None else identity.groups):
        raise ContextError("verify", None, f"cannot trust the groups: {sorted(groups)}")
    effective, permitted, inheritable = _get_capabilities()
    if inheritable or (identity.uid != 0 and (effective or permitted)):
        raise ContextError("verify", None, "cannot get rid of capabilities")


# Capabilities, capabilities(7)


def has_capability(name: str) -> bool:
    """Whether "CAP_SETUID" and the like is effective in this process. Needs no /proc.

    Raises ValueError for a name that linux/capability.h did not know when this was written.
    """
    return bool(_get_capabilities()[0] >> _CAPABILITIES.index(name.removeprefix("CAP_")) & 1)


def drop_inheritable() -> None:
    """Empty the inheritable set, and with it the ambient one, which the kernel keeps inside (capabilities(7))."""
    effective, permitted, _ = _get_capabilities()
    _set_capabilities(effective, permitted, 0)


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
        _libc_cached.syscall.argtypes = [ctypes.c_long] * 4
        _libc_cached.syscall.restype = ctypes.c_long
    return _libc_cached


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
