"""Spawners as the manager sees them: one pool per execution context, grown when it is busy, gone when idle.

vfork holds a spawner until the exec, so one spawner starts one process at a time; a second one uses the other CPU.
A pool grows when every member has two starts before it, up to the number of CPUs, and also when a member nears its
file limit: it holds one log pipe per live child. A member without children goes after a minute.
"""

from __future__ import annotations

import os
import resource
import select
import socket
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from superd.core import messages
from superd.core.plan import Program
from superd.core.spec import Context
from superd.manager.keeperlink import KeeperLink
from superd.manager.watch import Timer, Timers, Watch
from superd.system import cgroup, fdpass

IDLE_S = 60.0
_HEADROOM_FDS = 32
_NO_ROOM_S = 0.5
_CROWDED_MAX_S = 1.0
_CROWDED_TOLD_S = 0.1  # what is over sooner is nobody's business
_BUSY = 2
_FULL = 6  # starts before a spawner; clients for whom there is no room wait in the kernel's queue, in their order
_LOOK_S = 1.0
_CLOCK_NS = 20_000_000  # how far a file's time may be behind the clock: file systems take it from the last tick


class Owner(Protocol):
    """A service that has processes under spawners."""

    program: Program
    program_id: int

    def started(self, connection: int, pid: int) -> None: ...
    def failed(self, connection: int, stage: str, errno: int) -> None: ...
    def exited(self, connection: int, pid: int, status: int) -> None: ...
    def spawner_available(self) -> None: ...
    def context_refused(self, reason: str) -> None: ...
    def renewed(self, failure: str) -> None: ...
    def imported(self, printed: int, pid: int) -> None: ...
    def orphaned(self, connection: int) -> None: ...
    def unanswered(self, connection: int) -> None: ...
    def adopt(self, spawner: Spawner, row: list[Any], log: int | None) -> None: ...


@dataclass(slots=True, eq=False)
class Spawner:
    """One spawner process. pending: starts it has been sent and not answered; live: its children."""

    id: int
    pid: int
    channel: socket.socket
    pool: Pool
    entered: bool = False
    init: int = 0  # pid of process 1 of its children's pid namespace
    pending: int = 0
    live: set[int] = field(default_factory=set)
    programs: set[int] = field(default_factory=set)
    queue: deque[tuple[bytes, Sequence[int], list[int]]] = field(default_factory=deque)  # to send, and then to close
    unsure: set[int] = field(default_factory=set)  # sent to a predecessor that was killed
    idle: Timer | None = None
    crowded_s: float = 0.0  # how long until the queue is tried again; 0: the channel tells when there is room
    leaving: bool = False  # its end is expected: it was told to go, or has said why it cannot stay
    lost: bool = False

    def send(self, data: bytes, fds: list[int] | tuple[int, ...] = ()) -> None:
        """At once, or queued with fds of its own when the spawner does not keep up.

        Raises OSError when there are no fds or no memory for that; nothing has been sent then.
        """
        if self._sent(data, fds):
            return
        copies: list[int] = []
        try:
            for fd in fds:
                copies.append(os.dup(fd))
        except OSError:
            fdpass.close_all(copies)
            raise
        self.queue.append((data, copies, copies))

    def hand_over(self, data: bytes, fds: Sequence[int], given: Sequence[int]) -> bool:
        """send() that does not fail for want of an fd. True: it has been sent, and all fds are still the caller's.
        False: it is queued; those `given` are closed when it has been sent, and the others stay open until then."""
        if self._sent(data, fds):
            return True
        self.queue.append((data, fds, list(given)))
        return False

    def _sent(self, data: bytes, fds: Sequence[int]) -> bool:
        """False: it has to be queued, and is tried again."""
        if self.queue:
            return False
        try:
            fdpass.send(self.channel, data, fds, fdpass.DONTWAIT)
        except fdpass.CrowdedError:
            self._try_later()
            return False
        except BlockingIOError:
            self.pool.spawners.watch.change(self.channel.fileno(), select.EPOLLIN | select.EPOLLOUT)
            return False
        except ConnectionError:
            pass  # it has gone; the keeper tells, and the pool closes what it had
        return True

    def flush(self) -> None:
        change, fd = self.pool.spawners.watch.change, self.channel.fileno()
        while self.queue:
            data, fds, done = self.queue[0]
            try:
                fdpass.send(self.channel, data, fds, fdpass.DONTWAIT)
            except fdpass.CrowdedError:
                change(fd, select.EPOLLIN)
                return self._try_later()
            except BlockingIOError:
                self.crowded_s = 0.0
                return change(fd, select.EPOLLIN | select.EPOLLOUT)
            except OSError:
                pass
            self.queue.popleft()
            fdpass.close_all(done)
        self.crowded_s = 0.0
        change(fd, select.EPOLLIN)
        self.pool.go_on()

    def _try_later(self) -> None:
        spawners = self.pool.spawners
        self.crowded_s = min(self.crowded_s * 2, _CROWDED_MAX_S) or fdpass.CROWDED_S
        if self.crowded_s / 2 < _CROWDED_TOLD_S <= self.crowded_s:
            spawners.complain(
                "cannot hand connections to a spawner: this user has more descriptors on their way to other processes"
                f" than RLIMIT_NOFILE = {resource.getrlimit(resource.RLIMIT_NOFILE)[0]}; clients wait, trying again"
            )
        spawners.timers.after(self.crowded_s, lambda: None if self.lost else self.flush())


@dataclass(slots=True, eq=False)
class Pool:
    """All spawners of one context."""

    spawners: Spawners
    context: Context
    members: list[Spawner] = field(default_factory=list)
    owners: dict[int, Owner] = field(default_factory=dict)  # by program id
    asked: int = 0  # spawners the keeper has been asked for
    short: bool = False  # no fd was free for one, and said so
    workers: int = 0  # how many stay although they have nothing to do
    files: dict[str, tuple[int, ...]] = field(default_factory=dict)  # of the handler's code, as they were when read
    renewing: bool = False  # the next one that comes is to take the place of all others
    looked: float = 0.0
    held: dict[int, Owner] = field(default_factory=dict)  # by program id: who waits for room before a spawner

    def pick(self, owner: Owner) -> Spawner | None:
        """The first spawner that is not busy (its caches are warm), else the least busy one.

        None: there is none yet, or each has enough to do. `spawner_available` follows. So the next client goes to the
        spawner that comes to it first, and one service's thousand clients are not all before another's one (B8).
        """
        best = None
        for member in self.members:
            if member.entered and len(member.live) + member.pending < self.spawners.capacity:
                if member.pending < _BUSY:
                    best = member
                    break
                if best is None or member.pending < best.pending:
                    best = member
        else:
            if len(self.members) < self.spawners.most or best is None:
                self._ask()
        # What has been accepted and is queued here would die with us.
        if best is not None and (best.queue or best.pending >= _FULL):
            self.held[owner.program_id] = owner
            return None
        return best

    def go_on(self) -> None:
        """There is room before a spawner again."""
        held = list(self.held.values())
        self.held.clear()
        for owner in held:
            owner.spawner_available()

    def _ask(self) -> None:
        if self.asked:
            return
        self.asked += 1
        self.spawners.ask(self)

    def keep_ready(self) -> None:
        """Ask for workers that are missing, one after the other."""
        if len([member for member in self.members if not member.leaving]) < self.workers:
            self._ask()

    def code_changed(self, now: float) -> bool:
        """Whether a file of the handler is another than when it was imported; looked at once a second at most."""
        if now - self.looked < _LOOK_S:
            return False
        self.looked = now
        return any(_signature(path) != found for path, found in self.files.items())

    def renew(self) -> None:
        """A new spawner, which imports the handler as it is now; when it has, the others finish what they have and
        go. `renewed` follows."""
        self.renewing = True
        self.spawners.ask(self)

    def register(self, member: Spawner, owner: Owner) -> None:
        """Teach a spawner the owner's program."""
        member.programs.add(owner.program_id)
        member.send(messages.pack("program", id=owner.program_id, program=owner.program.to_json()))

    def changed(self, owner: Owner) -> None:
        """The owner's program is another now: teach it anew before the next start."""
        for member in self.members:
            member.programs.discard(owner.program_id)

    def leave(self, owner: Owner) -> None:
        del self.owners[owner.program_id]
        self.held.pop(owner.program_id, None)
        for member in self.members:
            if owner.program_id in member.programs:
                member.programs.discard(owner.program_id)
                member.send(messages.pack("forget", id=owner.program_id))


class Spawners:
    """All pools, and the table of connections that tells whose a report is."""

    def __init__(
        self,
        keeper: KeeperLink,
        watch: Watch,
        timers: Timers,
        nofile_soft: int,
        first_program: int,
        complain: Callable[[str], None],
    ) -> None:
        self.keeper, self.watch, self.timers = keeper, watch, timers
        self.capacity = max(8, nofile_soft - _HEADROOM_FDS)
        self.most = max(1, min(os.cpu_count() or 1, 4))
        self.complain = complain
        self.pools: dict[Context, Pool] = {}
        self.by_id: dict[int, Spawner] = {}
        self.connections: dict[int, tuple[Owner, Spawner]] = {}
        self.group_of: Callable[[str], str | None] = lambda _: None  # the cgroup of a service that has limits
        self.stranger: Callable[[str], Owner | None] = lambda _: None  # whose connections of an unknown service are
        self._next_id = 0
        self._next_program = first_program
        self._asked: dict[int, Pool] = {}
        keeper.handlers["spawner"] = self._arrived
        keeper.handlers["spawner-gone"] = self._gone
        keeper.handlers["spawner-replaced"] = self._replaced

    def join(self, owner: Owner, context: Context) -> Pool:
        """The pool for a service's processes; gives the owner its program id."""
        pool = self.pools.get(context)
        if pool is None:
            pool = self.pools[context] = Pool(self, context)
        self._next_program += 1
        owner.program_id = self._next_program
        pool.owners[owner.program_id] = owner
        return pool

    def renew(self) -> None:
        """Those that an earlier version of superd has started go when they have ended what they have."""
        for pool in self.pools.values():
            if pool.members and pool.owners and not pool.renewing:
                pool.renew()

    def ask(self, pool: Pool) -> None:
        self._next_id += 1
        number, context = self._next_id, pool.context
        self._asked[number] = pool
        try:
            group = self.group_of(context.owner) if context.grouped and context.owner is not None else None
        except cgroup.GroupError as error:
            reason = f"cgroup: {error}"
            self.timers.after(0.0, lambda: self._not_asked(number, reason))
            return
        more: dict[str, Any] = {}
        if context.handler is not None:
            for owner in list(pool.owners.values())[:1]:  # whose the context is
                more["environment"] = [owner.program.base_environment, owner.program.environment]
        self.keeper.send("spawner", id=number, context=messages.context_to_json(context), cgroup=group, **more)

    def _not_asked(self, number: int, reason: str) -> None:
        pool = self._asked.pop(number)
        pool.asked = 0
        for owner in list(pool.owners.values()):
            owner.context_refused(reason)

    def _arrived(self, message: dict[str, Any], fds: list[int]) -> None:
        pool = self._asked.pop(message["id"], None)
        if pool is None:
            return fdpass.close_all(fds)
        if not fds:
            return self._no_room(pool, message["id"])
        pool.short = False
        self._attach(pool, message["id"], message["pid"], fds[0])

    def _no_room(self, pool: Pool, number: int) -> None:
        """We had no fd for its channel (EMFILE): let it go, clients wait in the backlog, ask again soon (A1)."""
        self.keeper.send("drop", name=f"spawner:{number}")
        if not pool.short:
            pool.short = True
            self.complain("cannot take a spawner: too many open files; clients wait, trying again")

        def again() -> None:
            pool.asked = 0
            for owner in list(pool.owners.values()):
                owner.spawner_available()  # whoever has clients asks

        self.timers.after(_NO_ROOM_S, again)

    def _attach(self, pool: Pool, number: int, pid: int, fd: int) -> Spawner:
        channel = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET, 0, fileno=fd)
        member = Spawner(number, pid, channel, pool)
        self.by_id[number] = member
        pool.members.append(member)
        self.watch.add(fd, lambda events: self._ready(member, events))
        return member

    def _ready(self, member: Spawner, events: int) -> None:
        if events & select.EPOLLOUT:
            member.flush()
        self._take(member)

    def _take(self, member: Spawner) -> bool:
        """One packet; False when there is none."""
        try:
            data, fds = fdpass.receive(member.channel, fdpass.DONTWAIT)
        except BlockingIOError:
            return False
        except ConnectionError:
            data, fds = b"", []
        if not data:
            self._lost(member)  # the keeper's word that it has gone may come later
            return False
        if data[0] == messages.JSON:
            self._text(member, messages.unpack(data), fds)
        else:
            self._records(member, data)
        return True

    def _records(self, member: Spawner, data: bytes) -> None:
        connections = self.connections
        for kind, connection, pid, status, stage in messages.records(data):
            found = connections.get(connection)
            if found is None or found[1] is not member:  # a handler's code may make its spawner say anything
                continue
            owner = found[0]
            if kind == messages.STARTED:
                member.pending -= 1
                member.live.add(connection)
                owner.started(connection, pid)
            elif kind == messages.EXITED:
                del connections[connection]
                member.live.discard(connection)
                owner.exited(connection, pid, status)
            else:
                member.pending -= 1
                del connections[connection]
                owner.failed(connection, messages.STAGES[stage], status)
        if member.pool.held and not member.queue and member.pending <= _FULL // 2:
            member.pool.go_on()
        if not member.live and not member.pending:
            self._rest(member)

    def _rest(self, member: Spawner) -> None:
        """Nothing to do: go after a while, unless work comes."""
        if member.leaving:
            member.send(messages.pack("quit"))
        elif member.idle is None and len(member.pool.members) > member.pool.workers:
            member.idle = self.timers.after(IDLE_S, lambda: self._idle_over(member))

    def _idle_over(self, member: Spawner) -> None:
        member.idle = None
        if not member.live and not member.pending and not member.lost:
            member.entered, member.leaving = False, True
            member.send(messages.pack("quit"))

    def _text(self, member: Spawner, message: dict[str, Any], fds: list[int]) -> None:
        pool = member.pool
        if message["kind"] in ("entered", "refused") and fds:
            for owner in list(pool.owners.values())[:1]:  # the module is imported once, whoever shares it
                owner.imported(fds.pop(), member.pid)
            fdpass.close_all(fds)
        if message["kind"] == "entered":
            self._entered(member, message)
        elif message["kind"] == "refused":
            pool.asked, member.leaving = 0, True
            # Not again until something changes.
            pool.files = _signatures(list(pool.files), message.get("began_ns"))
            for owner in list(pool.owners.values()):
                if pool.renewing and any(other.entered for other in pool.members):
                    owner.renewed(message["text"])
                else:
                    owner.context_refused(message["text"])
            pool.renewing = False
        elif message["kind"] == "children":
            self._adopt_children(member, message["rows"], fds)
        elif message["kind"] == "synced":
            self._synced(member)
        elif message["kind"] == "listed":
            self._listed(member, message)

    def _lost(self, member: Spawner) -> None:
        """A spawner has gone for good."""
        if member.lost:
            return
        member.lost = True
        self.watch.remove(member.channel.fileno())
        member.channel.close()
        self.keeper.send("drop", name=f"spawner:{member.id}")
        member.pool.members.remove(member)
        self.by_id.pop(member.id, None)
        for _, _, done in member.queue:
            fdpass.close_all(done)
        member.queue.clear()
        if member.live or member.pending:
            self.complain(f"a spawner (pid {member.pid}) was killed; its {len(member.live)} processes go on")
        self._orphan(member)
        for number, owner in self._of(member):
            del self.connections[number]
            owner.unanswered(number)
        for owner in list(member.pool.owners.values()):
            owner.spawner_available()

    def _of(self, member: Spawner) -> list[tuple[int, Owner]]:
        return [(number, owner) for number, (owner, spawner) in self.connections.items() if spawner is member]

    def _orphan(self, member: Spawner) -> None:
        """Its live children are the keeper's now, which reaps them and tells."""
        for number in member.live:
            owner, _ = self.connections.pop(number)
            owner.orphaned(number)
        member.live.clear()

    def _replaced(self, message: dict[str, Any], fds: list[int]) -> None:
        """A killed spawner's successor has its channel, and with it the orders that were queued. What the dead one had
        in hand is found out by a "sync" behind them: what has no answer then was lost."""
        member = self.by_id.get(message["id"])
        if member is None:
            return
        while self._take(member):
            pass  # what the dead one said
        self.complain(f"a spawner (pid {member.pid}) was killed; its {len(member.live)} processes go on")
        self._orphan(member)
        member.pid = message["pid"]
        member.entered = False
        member.unsure = {number for number, _ in self._of(member)}
        member.programs.clear()
        for owner in {id(owner): owner for _, owner in self._of(member)}.values():
            member.pool.register(member, owner)
        member.send(messages.pack("sync"))

    def _synced(self, member: Spawner) -> None:
        for number in member.unsure:
            if number in self.connections and number not in member.live:
                member.pending -= 1
                owner, _ = self.connections.pop(number)
                owner.unanswered(number)
        member.unsure.clear()

    def _gone(self, message: dict[str, Any], fds: list[int]) -> None:
        pool = self._asked.pop(message["id"], None)
        if pool is not None:  # it could not even be forked
            pool.asked = 0
            for owner in list(pool.owners.values()):
                owner.context_refused(f"cannot start a spawner: {os.strerror(message.get('errno') or 0).lower()}")
        member = self.by_id.get(message["id"])
        if member is not None:
            pool = member.pool
            self._drain(member)
            self._lost(member)
            pool.asked = 0
            if not member.leaving:  # the next one may fare no better: not at once
                for owner in list(pool.owners.values()):
                    owner.context_refused("its spawner died")

    def _drain(self, member: Spawner) -> None:
        """What it said before it died."""
        while not member.lost and self._take(member):
            pass

    # -- after a manager's death

    def take_over(self, number: int, pid: int, fd: int, context: Context) -> None:
        """Adopt an earlier manager's spawner: ask for its children; it takes work again when it has answered."""
        self._next_id = max(self._next_id, number)
        pool = self.pools.setdefault(context, Pool(self, context))
        member = self._attach(pool, number, pid, fd)
        pool.asked = 1
        member.send(messages.pack("list"))

    def _adopt_children(self, member: Spawner, rows: list[list[Any]], fds: list[int]) -> None:
        logs = iter(fds)
        for row in rows:
            log = next(logs) if row[5] else None
            owner = self._owner(row[2])
            if owner is None:
                if log is not None:
                    os.close(log)
                continue
            self.connections[row[0]] = (owner, member)
            member.live.add(row[0])
            owner.adopt(member, row, log)

    def _listed(self, member: Spawner, message: dict[str, Any]) -> None:
        for number in message["programs"]:
            member.send(messages.pack("forget", id=number))
        self._entered(member, message)

    def _entered(self, member: Spawner, message: dict[str, Any]) -> None:
        pool = member.pool
        pool.asked = 0
        member.init = message.get("init", 0)
        files = _signatures(message.get("files", []), message.get("began_ns"))
        # One that was asked for only because the others are busy may have found newer code than theirs.
        newer = files != pool.files and any(other.entered for other in pool.members)
        pool.files = files
        member.entered = True
        if pool.renewing or newer:
            pool.renewing = False
            for other in pool.members:
                if other is not member:
                    other.entered, other.leaving = False, True
                    if not other.live and not other.pending:
                        self._rest(other)
            for owner in list(pool.owners.values()):
                owner.renewed("")
        pool.keep_ready()
        for owner in list(pool.owners.values()):
            owner.spawner_available()
        if not member.live:
            self._rest(member)

    def _owner(self, service: str) -> Owner | None:
        for pool in self.pools.values():
            for owner in pool.owners.values():
                if owner.program.service == service:
                    return owner
        return self.stranger(service)


def _signatures(paths: list[str], began_ns: int | None) -> dict[str, tuple[int, ...]]:
    """What each file is, as far as that is what was imported.

    began_ns: of the import. A file that was written since may have been read before that, or half written; its
    signature is one that no file has. None: not known, of a spawner of an earlier version.
    """
    found = {path: _signature(path) for path in paths}
    if began_ns is not None:
        since, now = began_ns - _CLOCK_NS, time.time_ns()  # a time beyond that is a clock's, and no news
        for path, signature in found.items():
            if signature and since <= signature[-1] <= now:
                found[path] = (0,)
    return found


def _signature(path: str) -> tuple[int, ...]:
    try:
        found = os.stat(path)
    except OSError:
        return ()
    return found.st_ino, found.st_size, found.st_mtime_ns
