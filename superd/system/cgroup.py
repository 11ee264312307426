"""Control groups, cgroups(7) v2: one for each service that is one process, so that no descendant of it is ever lost.

Only membership and cgroup.kill are used, which need no controller: what is there is used, and where there is nothing
(no cgroup v2, not writable) `base` is None and the callers do with sessions and the subreaper.

    OWN CGROUP/superd.KEEPER/SERVICE
"""

from __future__ import annotations

import contextlib
import os
import re

_STALE = re.compile(r"superd\.([0-9]+)")


def base(keeper: int) -> str | None:
    """The directory below which this superd's services get theirs, made if need be; None where that cannot be had.

    Groups that a superd which was killed has left are removed when nobody is in them any more.
    """
    own = _own()
    if own is None:
        return None
    path = os.path.join(own, f"superd.{keeper}")
    try:
        for name in os.listdir(own):
            found = _STALE.fullmatch(name)
            if found and int(found[1]) != keeper and not os.path.exists(f"/proc/{found[1]}"):
                remove(os.path.join(own, name))
        os.makedirs(path, mode=0o755, exist_ok=True)
    except OSError:
        return None
    if not os.access(os.path.join(path, "cgroup.procs"), os.W_OK):
        remove(path)
        return None
    return path


def _own() -> str | None:
    """The directory of this process's cgroup."""
    try:
        with open("/proc/self/cgroup") as file:
            inside = next((line[3:].rstrip("\n") for line in file if line.startswith("0::")), None)
        with open("/proc/self/mountinfo") as file:
            mounts = [line.split() for line in file]
    except OSError:
        return None
    for fields in mounts:
        if fields[fields.index("-") + 1] == "cgroup2" and inside is not None:
            root, point = fields[3], re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), fields[4])
            if root == "/":
                return os.path.normpath(point + inside)
            if inside == root or inside.startswith(root + "/"):
                return os.path.normpath(point + inside.removeprefix(root))
    return None


def make(parent: str, name: str) -> str | None:
    """The directory of the group `name`; None when it cannot be made (cgroup.max.descendants)."""
    path = os.path.join(parent, name)
    try:
        os.makedirs(path, mode=0o755, exist_ok=True)
    except OSError:
        return None
    return path


def join(path: str) -> None:
    """Move this process into the group. Raises OSError."""
    fd = os.open(os.path.join(path, "cgroup.procs"), os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, b"0")
    finally:
        os.close(fd)


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
