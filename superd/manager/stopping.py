"""Which processes belong to which service, and how all of them are ended.

A service's processes are those superd started for it, their descendants and sessions, and those that left all of that
(setsid, double fork) but are in the service's cgroup, or still carry its name in their environment. What is in none of
these belongs to no service; the end of superd takes it along, because superd is its subreaper (G6).

A service that is one process has a cgroup where superd can make one. The processes of connections have none of their
own: they are started by spawners that services share, and posix_spawn cannot put a child into another group. Where
[cgroup] limits them, the service has spawners of its own, which are in its group themselves.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable
from typing import TYPE_CHECKING

import trio

from superd.system import cgroup, process, tree

if TYPE_CHECKING:
    from superd.core.spec import ServiceSpec
    from superd.manager.service import Service
    from superd.manager.supervisor import Supervisor

FINAL_WAIT_S = 5.0  # after KILL: what is left then is unkillable, and superd goes on (G11)


class Processes:
    """Everything below the keeper that is not superd itself."""

    def __init__(self, supervisor: Supervisor) -> None:
        self.supervisor = supervisor
        self._seen: dict[str, list[tree.Process]] | None = None
        self._groups: str | None = None
        try:
            self._groups = cgroup.base(os.getppid())
        except cgroup.GroupError as error:
            self._no_groups = error

    def group(self, service: Service) -> str | None:
        """Directory of the service's cgroup, with its limits, made if it is not there; None: it needs none, or there
        are none here. Raises GroupError where there should be limits and cannot be."""
        spec = service.spec
        limited = bool(spec.cgroup.controllers())
        if not limited and (spec.takes_connections or spec.kill_mode != "tree"):
            return None
        if self._groups is None:
            if limited:
                raise self._no_groups
            return None
        try:
            path = cgroup.make(self._groups, service.name)
            self._limit(path, spec)
        except cgroup.GroupError:
            if limited:
                raise
            return None
        return path

    def _limit(self, path: str, spec: ServiceSpec) -> None:
        keeper = os.getppid()
        cgroup.limit(path, spec.cgroup.files(), lambda: {keeper, *(row.pid for row in tree.below(keeper))})

    def group_of(self, name: str) -> str | None:
        """The same for spawners. Raises GroupError."""
        service = next((one for one in self.supervisor.everything() if one.name == name), None)
        return None if service is None else self.group(service)

    def change_limits(self, service: Service) -> None:
        """Its [cgroup] says something else now, also for what runs. Raises GroupError."""
        if self.group(service) is None:
            if self._groups is not None and os.path.isdir(path := os.path.join(self._groups, service.name)):
                self._limit(path, service.spec)  # for those that are there
            return
        path = self._path_of(service)
        inside = set(cgroup.members(path))
        for row in self.look_again(service):
            if row.pid not in inside:
                with contextlib.suppress(OSError):  # it has ended
                    cgroup.join(path, row.pid)

    def _path_of(self, service: Service) -> str:
        return os.path.join(self._groups or "", service.name)

    def usage(self, service: Service) -> dict[str, int]:
        """What the service has of what its group counts."""
        return {} if self._groups is None else cgroup.usage(self._path_of(service))

    def killed_for_memory(self, service: Service) -> int:
        """How many of its processes the kernel has killed for memory_max."""
        return 0 if self._groups is None else cgroup.killed_for_memory(self._path_of(service))

    def forget(self) -> None:
        """What was seen is of this turn; the next one looks again."""
        self._seen = None

    def all(self) -> list[tree.Process]:
        own = {os.getpid(), os.getppid()}
        for member in self.supervisor.spawners.by_id.values():
            own |= {member.pid, member.init}
        rows = tree.below(os.getppid())
        if self._groups is not None:  # where superd is no subreaper they may be below init by now
            known = {row.pid for row in rows}
            rows += filter(None, map(tree.look, set(cgroup.members(self._groups)) - known))
        return [row for row in rows if row.pid not in own and not row.zombie]

    def by_service(self) -> dict[str, list[tree.Process]]:
        """Live processes by service name, "" for those that nothing names. One look at /proc serves a whole turn."""
        if self._seen is None:
            known = self.supervisor.everything()
            services = {service.name for service in known}
            mains = {pid: service.name for service in known for pid in service.mains()}
            owners: dict[int, str] = {}
            self._seen = {}
            for row in self.all():  # parents come before their children
                owner = mains.get(row.pid) or owners.get(row.parent) or mains.get(row.session)
                if not owner:
                    owner = self._group_owner(row.pid) or tree.environment_value(row.pid, "SUPERD_SERVICE") or ""
                    owner = owner if owner in services else ""
                owners[row.pid] = owner
                self._seen.setdefault(owner, []).append(row)
        return self._seen

    def _group_owner(self, pid: int) -> str | None:
        if self._groups is None:
            return None
        _, found, rest = (tree.cgroup(pid) or "").partition(f"/{os.path.basename(self._groups)}/")
        return rest.partition("/")[0] if found else None

    def of(self, service: Service) -> list[tree.Process]:
        return self.by_service().get(service.name, [])

    def look_again(self, service: Service) -> list[tree.Process]:
        self.forget()
        return self.of(service)

    def tell_rest(self, service: Service, signo: int) -> None:
        """Signal what a service has besides its main processes' groups, which their parents signal."""
        if signo == signal.SIGKILL and self._groups is not None and not service.spec.takes_connections:
            cgroup.kill(self._path_of(service))  # no fork is quicker; of connections the spawners are in it, too
        mains = set(service.mains())
        for row in self.of(service):
            if row.group not in mains:
                send(row, signo)

    def close(self) -> None:
        """At the end of superd."""
        if self._groups is not None:
            cgroup.leave(self._groups)

    async def end_all(self, service: Service) -> None:
        """Stop signal, time, KILL, as `kill_mode` says; returns when nothing is left or nothing more can be done."""
        spec = service.spec
        for signo, limit_s in ((spec.stop_signal, spec.stop_timeout_s), (signal.SIGKILL, FINAL_WAIT_S)):
            told = {(row.pid, row.started) for row in self.look_again(service)}
            service.tell_mains(signo)
            if spec.kill_mode == "tree":
                self.tell_rest(service, signo)
            with trio.move_on_after(float("inf") if limit_s is None else limit_s):
                while service.busy():
                    await service.changed.wait()
                if spec.kill_mode == "tree":
                    await self.end(lambda: self.look_again(service), signo, told)
                return
            left = len(self.look_again(service))
            service.error(f"{left} processes did not stop within {limit_s:g} s; killing them", level="warning")

    async def end(
        self, find: Callable[[], list[tree.Process]], signo: int, told: set[tuple[int, int]] | None = None
    ) -> None:
        """Signal each process that `find` finds, once, until it finds no more. `told`: (pid, start) of who knows."""
        told = set() if told is None else told
        while found := find():
            for row in found:
                if (row.pid, row.started) not in told:
                    told.add((row.pid, row.started))
                    send(row, signo)
            for row in found:
                fd = process.open_pidfd(row.pid)
                if fd is not None:
                    try:
                        await trio.lowlevel.wait_readable(fd)
                    finally:
                        os.close(fd)
            await trio.sleep(0)


def send(row: tree.Process, signo: int) -> None:
    """A signal, through a pidfd, and only if the pid is still the process that was seen (F15)."""
    fd = process.open_pidfd(row.pid)
    if fd is None:
        return
    try:
        if tree.started(row.pid) == row.started:
            process.signal_by_pidfd(fd, signo)
            if signo == signal.SIGTERM:
                process.signal_by_pidfd(fd, signal.SIGCONT)  # a stopped process does not act on TERM (G10)
    finally:
        os.close(fd)
