"""TOML files -> (Snapshot, problems), by the table of keys.py. Every problem of every file is found at once.

A file that is wrong affects its own service alone: that name is in Snapshot.broken, and the others are there. What
could make a service run with more rights than was meant (a misspelt `user`, a [defaults] that cannot be read) breaks
every service it concerns. There is no I/O here: facts of the machine come from a Machine.
"""

from __future__ import annotations

import sys
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from posixpath import dirname, isabs, join, normpath
from typing import Any, Literal, TypeVar

from superd.core import dependencies
from superd.core.document import Document, Merged, Path
from superd.core.keys import BY_TABLE
from superd.core.kinds import NAME, Kinds, WrongError
from superd.core.machine import Machine, Question, Remembered
from superd.core.plan import PATH
from superd.core.problems import Problem, format_problems
from superd.core.spec import (
    CGROUP_FILES,
    Access,
    Address,
    Cgroup,
    Context,
    DaemonSpec,
    Health,
    Limits,
    Output,
    Proxy,
    Ready,
    RestartPolicy,
    ServiceSpec,
    Snapshot,
    SocketSpec,
)
from superd.core.values import quote

Role = Literal["service", "drop-in", "daemon"]


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file as it was read.

    path  as it was named; a relative one counts from superd's working directory
    name  of the service ("worker@" for a template), also for a drop-in; "superd" for superd.toml
    """

    path: str
    data: bytes
    role: Role
    name: str


def load(
    files: Sequence[SourceFile],
    *,
    machine: Machine,
    environ: Mapping[str, str],
    is_root: bool,
    problems: Sequence[Problem] = (),
) -> tuple[Snapshot, list[Problem]]:
    """The services that `files` describe, in their order, and all that is wrong with them.

    environ   superd's own, for `${NAME}` and PATH
    is_root   whether superd is, or will be, root
    problems  those of reading the files; they break their services, too, and come back with the others
    """
    return Loader(environ, is_root=is_root).load(files, Remembered(machine), problems)


def conf_dirs(source: SourceFile) -> tuple[str, ...] | None:
    """`conf_dirs` of a superd.toml, relative ones from its directory; None if it is wrong, which load() reports."""
    tree = _document(source).tree
    found = None if tree is None else tree.get("conf_dirs", [])
    if not isinstance(found, list) or not all(isinstance(item, str) and item and "\0" not in item for item in found):
        return None
    return tuple(normpath(join(dirname(source.path), item)) for item in found)


def collide(one: SocketSpec, other: SocketSpec) -> bool:
    """Whether two sockets cannot be open at once."""
    shared = set(_places(one)) & set(_places(other))
    return bool(shared) and _overlap(one, other) and not (one.reuse_port and other.reuse_port)


def _document(source: SourceFile) -> Document:
    import tomli  # late: 15 ms that a command line without files does not need

    service = None if source.role == "daemon" else source.name
    return Document(source.path, source.data, tomli.loads, service=service)


_Place = tuple[Any, ...]
_Value = TypeVar("_Value", bound=Hashable)


@dataclass(slots=True)
class _Found:
    """A service that a file describes: name, spec (None: `problems` say why), where its sockets stand, and whether it
    names others."""

    name: str
    spec: ServiceSpec | None
    problems: list[Problem]
    places: tuple[_Place, ...]
    links: bool


@dataclass(slots=True)
class Unit:
    """What a file and the changes to it came to, and the facts of the machine that this depends on.

    extra  instances of a template that its file does not name
    asked  (question, answer): of Remembered
    """

    sources: tuple[SourceFile, ...]
    extra: tuple[str, ...]
    found: tuple[_Found, ...]
    asked: frozenset[tuple[Question, Any]]

    @property
    def name(self) -> str:
        return self.sources[0].name


class Loader:
    """load(), again and again: a file that is the same as before is not parsed again.

    What a file says is kept by its content, the [defaults] and the facts of the machine that were asked for; what
    files mean together, such as two that want one address, is judged anew each time. `in_force` is for whoever can
    say so: what was loaded last when accept() was called, by path. Units of it can be loaded in place of bad files.
    """

    def __init__(self, environ: Mapping[str, str], *, is_root: bool) -> None:
        self.environ = environ
        self.is_root = is_root
        self.in_force: dict[str, Unit] = {}
        self.without: frozenset[str] = frozenset()  # paths in force that have not got the address that they want
        self._clashed: set[str] = set()
        self._units: dict[str, Unit] = {}
        self._daemon_source: tuple[SourceFile, ...] = ()
        self._last: tuple[Sequence[SourceFile], Snapshot] | None = None  # of a load() that found nothing to say

    def load(
        self,
        files: Sequence[SourceFile],
        machine: Remembered,
        problems: Sequence[Problem] = (),
        *,
        extra: Mapping[str, tuple[str, ...]] | None = None,
        look_again: bool = True,
        keep: frozenset[str] = frozenset(),
        remembered: Mapping[str, frozenset[tuple[Question, Any]]] | None = None,
        after: frozenset[str] = frozenset(),
    ) -> tuple[Snapshot, list[Problem]]:
        """As the function load().

        machine     a fresh one
        extra       template ("worker@") -> instances that exist besides those of its file
        look_again  whether files that are the same are judged anew where the machine is another now: a program has
                    been installed, a user is gone
        keep        names of units that are to stay as they are in force, whatever their files say
        remembered  path -> what was answered when the file was read, for files that an earlier superd has read
        after       `without` of that superd
        """
        daemon = tuple(source for source in files if source.role == "daemon")
        before = self._units if daemon == self._daemon_source else {}
        self._daemon_source = daemon
        changed: set[tuple[Question, Any]] = set()
        if look_again and before:
            pairs: set[tuple[Question, Any]] = set().union(*{unit.asked for unit in before.values()})
            changed = {(question, was) for question, was in pairs if machine.ask(question) != was}
        if not (problems or extra or look_again or keep or remembered or after):
            few = _Loader(machine, self.environ, self.is_root, [], {})
            if (snapshot := self._load_few(files, few)) is not None:
                return snapshot, []
            before = {**before, **few.units}  # parsed once is enough
        loader = _Loader(machine, self.environ, self.is_root, list(problems), extra or {})
        loader.before, loader.changed, loader.remembered = before, changed, remembered or {}
        loader.keep = {path: unit for path, unit in self.in_force.items() if unit.name in keep} if keep else {}
        result = loader.load(files)
        if loader.clashed and (after or self.in_force):
            # What is in force has its address, and what is new has not: whose file comes first decides at start only.
            first = {path for path, unit in loader.units.items() if after or self.in_force.get(path) is unit}
            again = _Loader(machine, self.environ, self.is_root, list(problems), extra or {})
            again.before, again.keep, again.first = loader.units, loader.keep, first - (after or self.without)
            result, loader = again.load(files), again
        self._clashed = loader.clashed
        self._units = loader.units
        said = result[1] or result[0].broken or loader.homes or extra or keep
        self._last = None if said else (files, result[0])
        return result

    def _load_few(self, files: Sequence[SourceFile], loader: _Loader) -> Snapshot | None:
        """What load() gives where nothing has changed but what some files say, and that is right and concerns no other
        service; else None. A look at each of 10,000 files takes 25 ms."""
        if self._last is None or len(files) != len(self._last[0]):
            return None
        daemon = [source for source in files if source.role == "daemon"]
        units = dict(self._units)
        services: dict[str, ServiceSpec] = {}
        for was, source in zip(self._last[0], files, strict=True):
            if was is source:
                continue
            old = units.get(source.path)
            if source.role != "service" or source.path != was.path or old is None or len(old.sources) > 1:
                return None
            if not services:
                loader.load(daemon)
            found = loader.found(source, ())
            if [(one.name, one.places) for one in found] != [(one.name, one.places) for one in old.found]:
                return None
            if any(one.spec is None or one.problems or one.links for one in found):
                return None
            units[source.path] = loader.units[source.path]
            services.update((one.name, one.spec) for one in found if one.spec is not None)
        snapshot = replace(self._last[1], services={**self._last[1].services, **services})
        self._units, self._last = units, (files, snapshot)
        return snapshot

    def accept(self, refused: frozenset[str] = frozenset()) -> None:
        """What load() gave last is in force now, but for the units of these names."""
        old, self.in_force = self.in_force, self._units  # each load() makes another
        self.without = frozenset(self._clashed)
        if refused:
            self.in_force = {path: unit for path, unit in self.in_force.items() if unit.name not in refused}
            self.in_force |= {path: unit for path, unit in old.items() if unit.name in refused}


class _Loader:
    def __init__(
        self,
        machine: Remembered,
        environ: Mapping[str, str],
        is_root: bool,
        problems: list[Problem],
        extra: Mapping[str, tuple[str, ...]],
    ) -> None:
        self.machine = machine
        self.environ = environ
        self.is_root = is_root
        self.problems = problems
        self.extra = extra
        self.before: dict[str, Unit] = {}
        self.units: dict[str, Unit] = {}
        self.clashed: set[str] = set()  # paths that cannot have an address
        self.first: set[str] = set()  # paths of those that get their addresses before others
        self.keep: dict[str, Unit] = {}
        self.changed: set[tuple[Question, Any]] = set()
        self.remembered: Mapping[str, frozenset[tuple[Question, Any]]] = {}
        self.asked: dict[frozenset[tuple[Question, Any]], frozenset[tuple[Question, Any]]] = {}
        self.broken: dict[str, list[Problem]] = {}
        for problem in problems:
            if problem.service is not None and problem.is_error:
                self.broken.setdefault(problem.service, []).append(problem)
        self.defaults: tuple[Document, dict[str, Any]] | None = None
        self.defaults_failed = ""
        self.homes: dict[str, tuple[SourceFile, Sequence[SourceFile]]] = {}  # of services that name others

    def load(self, files: Sequence[SourceFile]) -> tuple[Snapshot, list[Problem]]:
        daemon = self._daemon([source for source in files if source.role == "daemon"])
        drop_ins: dict[str, list[SourceFile]] = {}
        for source in files:
            if source.role == "drop-in":
                drop_ins.setdefault(source.name, []).append(source)
        services: dict[str, ServiceSpec] = {}
        first: dict[str, str] = {}
        taken: dict[_Place, tuple[ServiceSpec, ...]] = {}
        kept = {unit.name for unit in self.keep.values()}
        for path, unit in self.keep.items():  # first: what is in force has its addresses
            self.units[path] = unit
            for one in unit.found:
                if one.spec is not None:
                    services[one.name] = one.spec
                    taken |= {place: (*taken.get(place, ()), one.spec) for place in one.places}
        for source in sorted(files, key=lambda source: source.path not in self.first) if self.first else files:
            if source.role != "service" or source.name in kept:
                continue
            if (other := first.setdefault(source.name.lower(), source.path)) != source.path:
                self._report(Problem("duplicate-name", f"service {source.name!r} is {other} already: the first counts",
                                     source.path, service=source.name))  # fmt: skip
                continue
            for one in self.found(source, drop_ins.get(source.name, ())):
                name, spec, found = one.name, one.spec, one.problems
                alone = taken.keys().isdisjoint(one.places)
                if spec is None or found or not alone or source.name in self.broken:
                    if spec is not None and not alone:
                        found = found + self._conflicts(source, drop_ins.get(source.name, ()), spec, taken)
                    self.problems += found
                    wrong = self.broken.get(source.name, []) + [p for p in found if p.is_error]
                    if spec is None or wrong:
                        self.broken[name] = wrong
                        continue
                services[name] = spec
                if one.links:
                    self.homes[name] = source, drop_ins.get(source.name, ())
                for place in one.places:
                    taken[place] = (spec,) if alone else (*taken.get(place, ()), spec)
        self._dependencies(services, self.homes)
        broken = {
            name: format_problems(dict.fromkeys(found), "short").rstrip("\n")
            for name, found in self.broken.items()
            if name not in services and name not in kept
        }
        if kept or self.first:
            rank = {source.path: number for number, source in enumerate(files)}
            paths = {one.name: rank.get(path, -1) for path, unit in self.units.items() for one in unit.found}
            services = {name: services[name] for name in sorted(services, key=paths.__getitem__)}
        unique = list(dict.fromkeys(replace(p, service=None) for p in self.problems))
        by_place = {replace(p, service=None): p for p in reversed(self.problems)}
        order = {source.path: number for number, source in enumerate(files)} if unique else {}
        ordered = sorted((by_place[p] for p in unique), key=lambda p: (order.get(p.path, -1), p.line, p.column))
        return Snapshot(daemon, services, broken), ordered

    def _dependencies(
        self, services: dict[str, ServiceSpec], homes: Mapping[str, tuple[SourceFile, Sequence[SourceFile]]]
    ) -> None:
        """Report what is wrong between services; those with an error are none any more. Their files are parsed once
        more, to tell where it stands. A service that stays as it is in force is not judged again."""
        for fault in dependencies.check(services, self.broken) if homes else ():
            if fault.service not in homes:
                continue
            found = self._services(*homes[fault.service])
            reader = next(reader for name, reader, _ in found if name == fault.service and reader)
            reader.service()
            written = list(map(reader.expanded, reader.merged.tree[fault.key]))
            path = (fault.key, written.index(fault.name))
            reader.wrong(path, fault.code, fault.message, fault.label, severity=fault.severity)
            self._report(problem := reader.problems[-1])
            if problem.is_error:
                self.broken.setdefault(fault.service, []).append(problem)
                services.pop(fault.service, None)

    def found(self, source: SourceFile, drop_ins: Sequence[SourceFile]) -> tuple[_Found, ...]:
        """What the file came to before if nothing has changed, else what it does now."""
        unit = self.before.get(source.path)
        # Nearly all of many thousand files go this way.
        if unit is not None and unit.sources[0] is source and not (drop_ins or self.extra or self.changed):
            if len(unit.sources) == 1 and not unit.extra:
                self.units[source.path] = unit
                return unit.found
        sources = (source, *drop_ins)
        extra = self.extra.get(source.name, ()) if self.extra else ()
        if unit is None or unit.sources != sources or unit.extra != extra or not self.changed.isdisjoint(unit.asked):
            if source.path in self.remembered:
                self.machine.answers = dict(self.remembered[source.path])
            self.machine.asked = set()
            found = []
            for name, reader, problems in self._services(source, drop_ins):
                spec = reader.service() if reader else None
                sockets = spec.sockets if spec is not None and spec.enabled else ()
                places = tuple(place for socket in sockets for place in _places(socket))
                links = spec is not None and dependencies.names_others(spec)
                found.append(_Found(name, spec, problems, places, links))
            asked = frozenset((question, self.machine.answers[question]) for question in self.machine.asked)
            unit = Unit(sources, extra, tuple(found), self.asked.setdefault(asked, asked))
        self.units[source.path] = unit
        return unit.found

    def _reader(self, merged: Merged, name: str | None) -> _Reader:
        return _Reader(self.machine, self.environ, self.is_root, merged, name)

    def _report(self, problem: Problem) -> None:
        self.problems.append(problem)

    def _daemon(self, sources: Sequence[SourceFile]) -> DaemonSpec:
        """superd.toml; its [defaults] are left in self.defaults."""
        for extra in sources[1:]:
            self._report(Problem("duplicate-name", f"{sources[0].path} is read already: the first counts", extra.path))
        if not sources:
            for problem in self.problems:
                if problem.service is None and problem.is_error and problem.path.endswith("superd.toml"):
                    self.defaults_failed = str(problem)
            return DaemonSpec()
        document = _document(sources[0])
        self.problems += document.problems
        if document.tree is None:
            self.defaults_failed = str(document.problems[0])
            return DaemonSpec()
        merged = Merged(document)
        merged.lay(document, document.tree)
        reader = self._reader(merged, None)
        top = reader.table("superd", merged.tree, ())
        if isinstance(defaults := merged.tree.get("defaults", {}), dict):
            self.defaults = document, defaults
            alone = Merged(document)
            alone.lay(document, defaults, ("defaults",), is_default=True)
            checker = self._reader(alone, None)
            checker.own = {"name": "name", "instance": "instance"}
            checker.tables()
            self.problems += checker.problems
        else:
            self.defaults_failed = str(reader.problems[0])
        self.problems += reader.problems
        known = {field: top[key] for key, field in _DAEMON_FIELDS.items() if key in top}
        return DaemonSpec(**known)

    def _services(
        self, source: SourceFile, drop_ins: Iterable[SourceFile]
    ) -> Iterator[tuple[str, _Reader | None, list[Problem]]]:
        """(name, reader, its problems) of the service, or of each instance of the template, that a file is.

        None for the reader: there is nothing to read, and the problems say why.
        """
        documents = [_document(source), *map(_document, drop_ins)]
        syntax = [problem for document in documents for problem in document.problems]
        if self.defaults_failed:
            why = f"[defaults] cannot be read, so no service can start: {self.defaults_failed}"
            syntax.append(Problem("no-defaults", why, source.path, service=source.name))
        if syntax:
            yield source.name, None, syntax
            return
        merged = Merged(documents[0])
        if self.defaults:
            merged.lay(*self.defaults, ("defaults",), is_default=True)
        for document in documents:
            merged.lay(document, document.tree or {})
        if not documents[0].tree:
            why = "file is empty: a service has at least `command`"
            yield source.name, None, [Problem("empty", why, source.path, service=source.name)]
            return
        name, at, instance = source.name.partition("@")
        if instance or not NAME.fullmatch(name):
            right = f"name {name}@.toml with instances = [{instance!r}]" if instance else "a-z 0-9 _ . -, at most 63"
            why = f"{source.name!r} is not a name of a service: {right}"
            yield source.name, None, [Problem("bad-name", why, source.path, service=source.name)]
            return
        if not at:
            single = self._reader(merged, source.name)
            yield source.name, single, single.problems
            return
        reader = self._reader(merged, source.name)
        instances = reader.instances()
        if reader.problems:
            yield source.name, None, reader.problems
        names = dict.fromkeys((*instances, *self.extra.get(source.name, ())))
        if not names and not reader.problems:  # nothing runs, and what is wrong is told all the same
            probe = self._reader(merged, f"{name}@instance")
            probe.service()
            if probe.problems:
                yield source.name, None, [replace(problem, service=source.name) for problem in probe.problems]
        for instance in names:
            each = self._reader(merged, f"{name}@{instance}")
            yield f"{name}@{instance}", each, each.problems

    def _conflicts(
        self, source: SourceFile, drop_ins: Sequence[SourceFile], spec: ServiceSpec,
        taken: Mapping[_Place, Sequence[ServiceSpec]],
    ) -> list[Problem]:  # fmt: skip
        """A12: sockets that another enabled service has. The file is parsed once more, to tell where they stand."""
        clashes = []
        for number, socket in enumerate(spec.sockets):
            for owner in dict.fromkeys(owner for place in _places(socket) for owner in taken.get(place, ())):
                clashes += [(number, other, owner) for other in owner.sockets if collide(socket, other)]
        if not clashes:
            return []
        self.clashed.add(source.path)
        reader = next(reader for name, reader, _ in self._services(source, drop_ins) if name == spec.name and reader)
        reader.service()
        before = len(reader.problems)
        for number, other, owner in clashes:
            address = spec.sockets[number].address
            same = "" if address == other.address else f" ({other.address})"
            why = f"{address} belongs to service {owner.name!r} already{same}, in {owner.source}"
            reader.wrong(reader.socket_paths[number], "address-taken", why)
        return reader.problems[before:]


def read_each(
    files: Sequence[SourceFile], *, machine: Machine, environ: Mapping[str, str], is_root: bool
) -> Iterator[tuple[str, _Reader | None, ServiceSpec | None, list[Problem]]]:
    """(name, what has read it, the service, what is wrong with it) of each file by itself, whatever the others say.

    For effective.py, which asks where values come from. Without a reader the file could not be read at all.
    """
    loader = _Loader(Remembered(machine), environ, is_root, [], {})
    loader._daemon([source for source in files if source.role == "daemon"])
    drop_ins: dict[str, list[SourceFile]] = {}
    for source in files:
        if source.role == "drop-in":
            drop_ins.setdefault(source.name, []).append(source)
    for source in files:
        if source.role == "service":
            for name, reader, problems in loader._services(source, drop_ins.get(source.name, ())):
                yield name, reader, reader.service() if reader else None, problems


def _places(socket: SocketSpec) -> list[tuple[Any, ...]]:
    """Where a socket stands: two that share none cannot collide."""
    address = socket.address
    if address.is_ip:
        transport = socket.protocol if socket.protocol in ("sctp", "udplite") else address.scheme[:3]
        return [(transport, address.port)] if address.port else []
    if address.scheme == "vsock":
        return [("vsock", address.port)]
    if address.scheme == "tcpmux":
        return [("tcpmux", (address.path or "").removeprefix("+"))]
    return [("path" if address.is_unix or address.scheme == "fifo" else address.scheme, address.path)]


def _overlap(one: SocketSpec, other: SocketSpec) -> bool:
    """Whether the kernel would refuse the second of two sockets that share a place."""
    if one.address.is_ip and one.device and other.device and one.device != other.device:
        return False
    if one.address.is_ip:
        mine, theirs = _hosts(one.address), _hosts(other.address)
        return any(None in (mine[family], theirs[family]) or mine[family] == theirs[family]
                   for family in mine.keys() & theirs.keys())  # fmt: skip
    if one.address.scheme == "vsock":
        return None in (one.address.cid, other.address.cid) or one.address.cid == other.address.cid
    return True


@lru_cache(maxsize=256)
def _shared(value: _Value) -> _Value:
    """The same object for equal values: of many thousands of services nearly all have the same limits."""
    return value


def _hosts(address: Address) -> dict[int, str | None]:
    """Bound host by IP version, None for every one. "[::]" is IPv6 alone: every address of both has no host."""
    host = address.host
    if host == "localhost":
        both: dict[int, str | None] = {4: "127.0.0.1", 6: "::1"}
    elif host is None:
        both = {4: None, 6: None}
    elif ":" in host:
        both = {6: None if host == "::" else host}
    else:
        both = {4: None if host == "0.0.0.0" else host}
    version = address.scheme[3:]
    return {int(version): both[int(version)]} if version else both


_DAEMON_FIELDS = {
    "control": "control", "control_mode": "control_mode", "control_group": "control_group",
    "control_admins": "control_admins", "log": "log", "log_level": "log_level",
    "syslog": "syslog", "stop_timeout": "stop_timeout_s", "watch": "watch",
}  # fmt: skip
OF_PROCESSES = (
    "argv0", "run", "pass", "fd_protocols", "stderr", "stdout", "user", "group", "groups", "cwd", "umask",
    "environment", "environment_file", "pass_environment", "rlimit", "scheduling", "cgroup", "sandbox",
)  # fmt: skip
_SOCKET_FIELDS = {"listen": "address", "defer_accept": "defer_accept_s"}
_RESTART_FIELDS = {
    "restart": "policy", "restart_delay": "delay_s", "restart_delay_max": "delay_max_s", "restart_limit": "limit",
    "success_status": "success_status",
}  # fmt: skip
_PLAIN_FIELDS = {
    "description": "description", "enabled": "enabled", "fd_protocols": "fd_protocols", "stderr": "stderr",
    "stdout": "stdout", "environment": "environment", "environment_file": "environment_file",
    "pass_environment": "pass_environment", "ready": "ready", "ready_timeout": "ready_timeout_s",
    "notify_access": "notify_access", "stop_signal": "stop_signal", "stop_timeout": "stop_timeout_s",
    "kill_mode": "kill_mode", "watchdog": "watchdog_s", "fdstore": "fdstore", "essential": "essential",
    "requires": "requires", "wants": "wants", "after": "after", "part_of": "part_of", "conflicts": "conflicts",
    "builtin": "builtin",
    "workers": "workers", "reload_signal": "reload_signal", "idle_timeout": "idle_timeout_s", "start_pre": "start_pre",
    "start_post": "start_post", "stop_post": "stop_post",
}  # fmt: skip
_LIMITS_FIELDS = {"max_runtime": "max_runtime_s", "first_byte_timeout": "first_byte_timeout_s"}
_HEALTH_FIELDS = {"every": "every_s", "timeout": "timeout_s"}


class _Reader(Kinds):
    """Turns one merged tree into a ServiceSpec, and judges its keys together."""

    socket_paths: list[Path]  # where the address of each socket is written
    got: dict[str, Any]  # the converted values that count, by key; a table's in a dict of its own
    root = ""  # sandbox.chroot: where the service's own paths begin

    def tables(self) -> dict[str, Any]:
        return self.table("service", self.merged.tree, ())

    def instances(self) -> tuple[str, ...]:
        if "instances" not in self.merged.tree:
            return ()  # they come with `superctl start`
        found = self.table("service", {"instances": self.merged.tree["instances"]}, ())
        return tuple(found.get("instances", ()))

    def service(self) -> ServiceSpec | None:
        """The spec; None if there are problems."""
        assert self.name is not None
        self.got = got = self.tables()
        if "@" not in self.name and "instances" in got:
            self.irrelevant(got, ("instances",), "only a template has instances: rename the file to NAME@.toml")
        sockets = self.sockets(got)
        self.proxy(got, sockets)
        self.run_and_pass(got, sockets)
        self.access(got, sockets)
        self.modes(got, sockets)
        self.outputs(got)
        context = self.context(got)
        command = self.program(got, sockets, context)
        self.more_commands(got, context)
        self.readiness(got, sockets)
        self.runtime_names(got, sockets)
        if any(problem.is_error for problem in self.problems):
            return None
        assert command is not None and context is not None
        written = got["command"][0] if command else ""
        limits = Limits(**{_LIMITS_FIELDS.get(key, key): value for key, value in got.get("limits", {}).items()})
        health = None
        if "check" in (table := got.get("health", {})):
            health = Health(**{_HEALTH_FIELDS.get(key, key): value for key, value in table.items()})
        got.setdefault("restart", "on-failure" if got["run"] == "always-on" else "no")
        restart = RestartPolicy(**{field: got[key] for key, field in _RESTART_FIELDS.items() if key in got})
        plain = {field: got[key] for key, field in _PLAIN_FIELDS.items() if key in got}
        if "proxy" in got:
            table = dict(got["proxy"])
            plain["ready"] = table.pop("ready", Ready("connect", address=table["to"]))
            plain["proxy"] = Proxy(**table)
        argv0 = got.get("argv0", written if command and written != command[0] else None)
        return ServiceSpec(
            self.name, self.merged.main.path, _shared(command), got["run"], got["pass"], tuple(sockets), argv0=argv0,
            context=_shared(context), user_assumed=self.is_root and not {"user", "builtin"} & got.keys(),
            limits=_shared(limits), restart=_shared(restart), access=_shared(Access(**got.get("access", {}))),
            health=health, cgroup=_shared(Cgroup(**got.get("cgroup", {}))), notify_asked="notify_access" in got,
            **plain,
        )  # fmt: skip

    def irrelevant(self, got: dict[str, Any], path: Path, why: str, label: str = "") -> None:
        """A key that means nothing for this service: an error in its own file, passed over in [defaults]."""
        if not self.merged.origin(path).is_default:
            self.wrong(path, "other-mode", why, label, key=True)
        for part in path[:-1]:
            got = got[str(part)]
        got.pop(str(path[-1]), None)

    @property
    def sockets_known(self) -> bool:
        return not self.failed & {("listen",), ("socket",)}

    def sockets(self, got: dict[str, Any]) -> list[SocketSpec]:
        """From `listen` or [[socket]]; what is wrong with one alone, or with two together, is reported."""
        if self.merged.tree.keys() >= {"listen", "socket"}:
            for less, more in (("listen", "socket"), ("socket", "listen")):
                if self.merged.origin((less,)).is_default and not self.merged.origin((more,)).is_default:
                    got.pop(less, None)
                    break
            else:
                why = "`listen` and [[socket]] are both there: sockets are written in one way"
                self.wrong(("listen",), "listen-and-socket", why, "move it into a [[socket]] table", key=True)
        assert self.name is not None
        found: list[tuple[Path, SocketSpec]] = []
        if "socket" in got:
            for path, table in got["socket"]:
                if isinstance(address := table.get("listen"), Address):
                    self.socket_keys(table, address, path)
                    fields = {_SOCKET_FIELDS.get(key, key): value for key, value in table.items()}
                    found.append((path, SocketSpec(**{"name": self.name, **fields})))
        elif "listen" in got:
            single = not isinstance(self.merged.tree["listen"], list)
            for number, address in enumerate(got["listen"]):
                found.append((("listen",) if single else ("listen", number), SocketSpec(address, self.name)))
        self.socket_paths = [(*path, "listen") if path[0] == "socket" else path for path, _ in found]
        for index, (_, spec) in enumerate(found):
            for _, other in found[:index]:
                if collide(spec, other):
                    self.wrong(self.socket_paths[index], "address-taken", f"{spec.address} and {other.address} collide")
        return [socket for _, socket in found]

    def socket_keys(self, table: dict[str, Any], address: Address, path: Path) -> None:
        for name in list(table):
            key = BY_TABLE["socket"][name]
            if address.scheme == "tcpmux" and name not in ("listen", "name"):
                why = f"`{name}` means nothing for {address}: the socket is that of the tcpmux service"
                self.wrong((*path, name), "other-mode", why, key=True)
                del table[name]
            elif key.modes and address.scheme not in key.modes:
                why = f"`{name}` means nothing for {address}: it is for {', '.join(key.modes)}"
                self.wrong((*path, name), "other-mode", why, key=True)
                del table[name]
        protocol = table.get("protocol")
        if protocol is not None and (protocol == "udplite") != (address.scheme[:3] == "udp"):
            scheme = "udp" if protocol == "udplite" else "tcp"
            self.wrong((*path, "protocol"), "bad-value", f'"{protocol}" goes with {scheme}:, not with {address}')
        if not self.is_root and (user := table.get("user")) is not None and self.uid_of(user) != self.machine.uid:
            self.wrong((*path, "user"), "not-permitted", f"only root can give a socket to {quote(user)}")
        self.proxy_keys(table, address, path)

    def proxy_keys(self, table: dict[str, Any], address: Address, path: Path) -> None:
        """Who may say who a client is must be said, in words that can be true there."""
        rules = table.get("proxy_trusted", ())
        written = self.merged.tree["socket"][path[1]]
        if "proxy_protocol" not in table:
            if rules and "proxy_protocol" not in written:
                why = "`proxy_trusted` goes with `proxy_protocol`"
                self.wrong((*path, "proxy_trusted"), "other-mode", why, "write proxy_protocol = true", key=True)
            return
        if not table["proxy_protocol"]:
            return
        if table.get("protocol") == "sctp":
            why = "`proxy_protocol` means nothing for SCTP, which has no stream of bytes"
            self.wrong((*path, "proxy_protocol"), "other-mode", why, key=True)
        unsaid = address.scheme != "unix" if "proxy_trusted" not in written else table.get("proxy_trusted") == ()
        if unsaid:
            why = "`proxy_protocol` needs `proxy_trusted`: anybody who connects could say to be anybody"
            self.wrong((*path, "proxy_protocol"), "missing-key", why, 'proxy_trusted = ["ADDRESS OF THE PROXY"]',
                       key=True)  # fmt: skip
        kinds = {"unix": ("user", "group"), "fd": ("network", "user", "group")}.get(address.scheme, ("network",))
        for number, rule in enumerate(rules):
            if rule.kind not in kinds:
                right = "users and groups" if address.scheme == "unix" else "networks"
                why = f"{quote(rule.text)} tells nobody apart who connects to {address}: write {right}"
                self.wrong((*path, "proxy_trusted", number), "bad-value", why)

    def proxy(self, got: dict[str, Any], sockets: list[SocketSpec]) -> None:
        """[proxy]: superd accepts, and the process has no socket of ours."""
        if "proxy" not in self.merged.tree:
            return
        table = got.get("proxy") or {}
        to = table.get("to")
        if "to" not in table and ("proxy",) not in self.failed:
            self.wrong(("proxy",), "missing-key", "[proxy] has no `to`", 'to = "tcp:127.0.0.1:${port}"', key=True)
        for key in ("builtin", "handler"):
            if key in got:
                why = f"[proxy] is for a program that listens by itself, and a {key} does not"
                self.wrong((key,), "other-mode", why, "remove it", key=True)
        if "run" in got and got["run"] not in ("on-demand", "always-on"):
            if not self.merged.origin(("run",)).is_default:
                why = f'run = "{got["run"]}" and [proxy] exclude each other: one process listens by itself for all'
                self.wrong(("run",), "other-mode", why, 'write "on-demand" or "always-on", or remove it')
            del got["run"]
        if "run" not in got and ("run",) not in self.failed:
            got["run"] = "on-demand"
        for key, why in (
            ("pass", "with [proxy] the process gets no sockets"),
            ("fd_protocols", "with [proxy] the process gets no sockets"),
            ("ready", "what tells that a program behind [proxy] is ready stands in [proxy]"),
        ):
            if key in got:
                self.irrelevant(got, (key,), f"`{key}`: {why}", "write it below [proxy]" if key == "ready" else "")
        if not sockets and self.sockets_known:
            self.wrong(("proxy",), "missing-key", "[proxy] needs a socket", 'write listen = "tcp:PORT"', key=True)
        for path, socket in zip(self.socket_paths, sockets, strict=True):
            if socket.address.scheme not in ("tcp", "tcp4", "tcp6", "unix", "vsock"):
                self.wrong(path, "other-mode", f"[proxy] carries streams, and {socket.address} is none")
            elif to is not None and to.port != 0 and collide(socket, SocketSpec(to, "")):
                self.wrong(("proxy", "to"), "address-taken", f"superd itself listens on {socket.address}")
        if to is not None and to.path is None and got.get("sandbox", {}).get("private_network"):
            why = f"with sandbox.private_network the program listens where superd cannot connect to: {to.scheme}"
            self.wrong(("proxy", "to"), "bad-value", why, 'write "unix:/PATH"')

    def uid_of(self, user: str | int) -> int | None:
        found = self.machine.user(user)
        return None if found is None else found[0]

    def run_and_pass(self, got: dict[str, Any], sockets: list[SocketSpec]) -> None:
        """Their defaults, and whether the sockets agree with them."""
        if not self.sockets_known:
            return
        kinds = {socket.address.kind for socket in sockets}
        if "builtin" in got:
            for path, socket in zip(self.socket_paths, sockets, strict=True):
                if socket.address.kind not in ("stream", "datagram") or socket.address.scheme == "unix-dgram":
                    self.wrong(path, "bad-value", f"a builtin service cannot listen on {socket.address}")
            got["run"], got["pass"] = "per-connection", "stdio"
            if not sockets and self.sockets_known:
                self.wrong((), "missing-key", "a builtin service needs a socket", 'write listen = "tcp:PORT"')
            return
        if "run" not in got and ("run",) not in self.failed:
            if not kinds:
                got["run"] = "always-on"
            elif kinds <= {"stream", "seqpacket", "unknown"}:  # of fd: it is seen when the socket is taken
                got["run"] = "per-connection"
            elif kinds in ({"datagram"}, {"fifo"}):
                got["run"] = "on-demand"
            else:
                said = "the kind of fd: is not known here" if "unknown" in kinds else "stream and datagram together"
                self.wrong(self.socket_paths[0][:1], "missing-run", f"{said}: `run` must say what is meant",
                           'write run = "on-demand" or "always-on"', key=True)  # fmt: skip
        run = got.get("run")
        if run is None:
            return
        if run in ("per-connection", "on-demand") and not sockets:
            self.wrong(("run",), "missing-key", f'run = "{run}" needs a socket', 'write listen = "tcp:PORT"')
        if run == "per-connection":
            self.no_connections(sockets)
        else:
            self.no_listener(run, sockets)
        if "pass" not in got and ("pass",) not in self.failed:
            got["pass"] = "stdio" if run == "per-connection" else "listen-fds"
        if got.get("pass") == "stdio" and run != "per-connection":
            count = sum(2 if socket.address.host == "localhost" else 1 for socket in sockets)
            if count == 0:
                self.irrelevant(got, ("pass",), 'pass = "stdio" needs a socket, and there is none', "remove it")
                got["pass"] = "listen-fds"
            elif count > 1:
                why = f'pass = "stdio" with run = "{run}" needs exactly one socket, and there are {count}'
                if any(socket.address.host == "localhost" for socket in sockets):
                    why += " (localhost is two: write 127.0.0.1 or [::1])"
                self.wrong(("pass",), "one-socket", why, 'write pass = "listen-fds"')

    def no_connections(self, sockets: list[SocketSpec]) -> None:
        """C2: a datagram that no process has read yet would start one after the other, without end."""
        for path, socket in zip(self.socket_paths, sockets, strict=True):
            if socket.address.kind not in ("datagram", "fifo"):
                continue
            what = "datagram socket" if socket.address.kind == "datagram" else "FIFO"
            why = f"a {what} has no connections, so {socket.address} cannot be per-connection: "
            why += "what is not read yet would start one process after the other, without end"
            self.wrong(path, "no-connections", why, 'write run = "on-demand"')

    def no_listener(self, run: str, sockets: list[SocketSpec]) -> None:
        for path, socket in zip(self.socket_paths, sockets, strict=True):
            if socket.proxy_protocol and "proxy" not in self.merged.tree:
                why = f'`proxy_protocol` means nothing with run = "{run}": the service accepts its clients itself'
                self.wrong((*path[:-1], "proxy_protocol"), "other-mode", why, 'write run = "per-connection"', key=True)
            if socket.address.scheme == "tcpmux":
                why = f'{socket.address} is no socket that run = "{run}" could give away: it has connections only'
                self.wrong(path, "other-mode", why, 'write run = "per-connection"')

    def modes(self, got: dict[str, Any], sockets: list[SocketSpec]) -> None:
        """Keys that mean nothing with this `run` and `pass`."""
        run = got.get("run")
        tables = ("limits", "access")
        for table, values in (("service", got), *((name, got.get(name, {})) for name in tables)) if run else ():
            for name in list(values):
                key = BY_TABLE[table][name]
                if "proxy" in self.merged.tree and (table != "service" or name == "access"):
                    continue  # superd accepts
                if key.modes and run not in key.modes:
                    path = (name,) if table == "service" else (table, name)
                    modes = " or ".join(f'"{mode}"' for mode in key.modes)
                    self.irrelevant(got, path, f'`{name}` is a key of run = {modes}, and this service is "{run}"')
        if "fd_protocols" in got and "pass" in got and (got["pass"] == "stdio" or not sockets):
            self.irrelevant(got, ("fd_protocols",), '`fd_protocols` goes with pass = "listen-fds" and a socket')
        for socket in sockets if got.get("idle_timeout") is not None and "proxy" not in got else ():
            if socket.address.scheme == "vsock" or socket.protocol == "sctp":
                kind = socket.protocol or "vsock"
                self.irrelevant(
                    got, ("idle_timeout",), f"`idle_timeout`: nothing tells whether {kind} sockets are used"
                )
                break

    def access(self, got: dict[str, Any], sockets: list[SocketSpec]) -> None:
        """Rules that nobody could keep must not be there, not even from [defaults]: the service would be open (A10)."""
        rules, run = self.merged.tree.get("access"), got.get("run")
        if isinstance(rules, dict) and rules.get("allow") == []:  # "who may connect" names nobody: open it is not
            why = "`allow` is empty, and does not say whether that is nobody or all"
            self.wrong(("access", "allow"), "bad-value", why,
                       'write allow = ["0.0.0.0/0", "::/0"] or deny = ["0.0.0.0/0", "::/0"]')  # fmt: skip
        if not isinstance(rules, dict) or not any(rules.values()) or not self.sockets_known:
            return
        if run is None or run == "per-connection" or "proxy" in self.merged.tree:
            return
        path: Path = ("access",)
        if run == "on-demand" and all(socket.address.scheme[:3] == "udp" for socket in sockets):
            found = got.get("access", {})
            if any(rule.kind == "host" for name in ("allow", "deny") for rule in found.get(name, ())):
                self.wrong(path, "bad-value", "names of hosts come too late for datagrams: write networks")
        elif sockets and not self.merged.origin(path).is_default:
            self.wrong(path, "other-mode", f'[access] cannot be kept: run = "{run}" gives the sockets themselves away',
                       'write run = "per-connection"', key=True)  # fmt: skip
        elif sockets:
            where = self.socket_paths[0][:1]
            why = f'[access] of [defaults] cannot be kept: run = "{run}" gives the sockets themselves away'
            self.wrong(where, "other-mode", why, 'write run = "per-connection"', key=True)

    def outputs(self, got: dict[str, Any]) -> None:
        run, passed = got.get("run"), got.get("pass")
        if run is None or passed is None:
            return
        if passed == "stdio" and "stdout" in got:
            self.irrelevant(got, ("stdout",), '`stdout` is the socket with pass = "stdio"', "remove it")
        for key in ("stdout", "stderr"):
            if key in got and got[key].kind == "socket" and passed != "stdio" and run != "per-connection":
                self.irrelevant(got, (key,), f'{key} = "socket" needs pass = "stdio" or run = "per-connection"')

    def context(self, got: dict[str, Any]) -> Context | None:
        """Who it runs as and how. None if that cannot be told, which is then reported."""
        if self.failed & {("user",), ("group",), ("groups",), ("sandbox",), ("scheduling",), ("rlimit",)}:
            return None
        user, group, groups = got.get("user"), got.get("group"), got.get("groups")
        if self.is_root:
            user = "nobody" if user is None else user
            if (uid := self.uid_of(user)) is None:
                self.wrong((), "missing-key", 'there is no user "nobody" on this machine: `user` must say who it is')
                return None
        elif not got.get("enabled", True):
            uid = self.machine.uid  # who cannot be had here matters when it is started
        else:
            uid = self.machine.uid
            refused = "superd is not root and cannot become"
            if user is not None and self.uid_of(user) != uid:
                self.wrong(("user",), "not-permitted", f"{refused} {quote(user)}", "remove it")
            if group is not None and self.machine.group(group) != self.machine.gid:
                self.wrong(("group",), "not-permitted", f"{refused} group {quote(group)}", "remove it")
            if groups is not None:
                self.wrong(("groups",), "not-permitted", f"{refused} a member of other groups", "remove it")
            user = group = groups = None
        sandbox = dict(got.get("sandbox", {}))
        for name, value in sandbox.items():
            if value and not self.is_root and name != "no_new_privileges":
                self.wrong(
                    ("sandbox", name), "not-permitted", f"superd is not root and cannot have `{name}`", "remove it"
                )
        if (kept := sandbox.get("capabilities")) is not None:
            for name in set(sandbox.get("ambient_capabilities", ())) - set(kept):
                reason = f"{quote(name)} is not among `capabilities`, which are all that there can be"
                self.wrong(("sandbox", "ambient_capabilities"), "bad-value", reason)
        self.root = sandbox.get("chroot") or ""
        if self.root and self.is_root and (others := self.machine.untrusted(self.root, frozenset({0}))):
            self.wrong(
                ("sandbox", "chroot"), "not-trusted", f"superd is root and does not go into {self.root}: {others}"
            )
        sandbox.setdefault("no_new_privileges", uid != 0)
        grouped = self.cgroup(got) and got.get("run") == "per-connection"
        private = any(sandbox.get(name) for name in ("private_tmp", "private_network", "private_pids"))
        if private or grouped or "handler" in got:
            sandbox["owner"] = self.name
        scheduling = got.get("scheduling", {})
        more = {key: got[key] for key in ("umask", "cwd") if key in got}
        return Context(
            user=user, group=group, groups=groups,
            rlimits=tuple((name, soft, hard) for name, (soft, hard) in got.get("rlimit", {}).items()),
            handler=got.get("handler"), grouped=grouped, **sandbox, **scheduling, **more,
        )  # fmt: skip

    def cgroup(self, got: dict[str, Any]) -> bool:
        """Whether its group has limits. A controller that no group of this machine can have is found here; whether
        superd may use one only its start can tell."""
        wanted = Cgroup(**got.get("cgroup", {}))
        for name, key in zip(CGROUP_FILES, BY_TABLE["cgroup"], strict=True):
            controller = name.partition(".")[0]
            if controller in wanted.controllers() and got.get("enabled", True) and "builtin" not in got:
                if why := self.machine.lacks_controller(controller):
                    self.wrong(("cgroup", key), "not-available", f"cannot limit {controller} here: {why}", key=True)
        return bool(wanted.controllers())

    def builtin(self, got: dict[str, Any], sockets: list[SocketSpec]) -> tuple[str, ...]:
        """No command, and no process that anything could be said about."""
        for key in ("command", "handler", *OF_PROCESSES):
            if key in self.merged.tree and key in got:
                self.irrelevant(
                    got, (key,), f"`{key}` means nothing for a builtin service: it is no process", "remove it"
                )
        datagram = [socket for socket in sockets if socket.address.kind == "datagram"]
        if got["builtin"] == "tcpmux" and datagram:
            self.wrong(("builtin",), "bad-value", f"tcpmux is for connections, and {datagram[0].address} has none")
        for path, socket in zip(self.socket_paths, sockets, strict=True):
            if got["builtin"] == "tcpmux" and socket.proxy_protocol:
                why = "`proxy_protocol` means nothing for tcpmux: the services behind it would see the proxy"
                self.wrong((*path[:-1], "proxy_protocol"), "other-mode", why, "remove it", key=True)
        if got["builtin"] == "chargen" and datagram:
            why = (
                f"chargen would answer {datagram[0].address} with more than it was sent, to whatever address was forged"
            )
            self.wrong(("builtin",), "bad-value", why)
        return ()

    def program(
        self, got: dict[str, Any], sockets: list[SocketSpec], context: Context | None
    ) -> tuple[str, ...] | None:
        """The command with the absolute path of its program (E26)."""
        if "builtin" in got:
            return self.builtin(got, sockets)
        if "handler" in got:
            return self.handler(got)
        if "workers" in got:
            self.irrelevant(got, ("workers",), "`workers` goes with `handler`")
        if "command" not in got:
            if not {"command", "handler", "builtin"} & self.merged.tree.keys():
                right = 'write command = ["/path/of/program", "argument", …]'
                self.wrong((), "missing-key", f"there is no `command`: {right}")
            return None
        where: Path = ("command", 0) if isinstance(self.merged.tree["command"], list) else ("command",)
        return self.resolved(got["command"], where, got, context)

    def handler(self, got: dict[str, Any]) -> tuple[str, ...] | None:
        """No command; what would go with one must not be there, and root imports nobody else's code (F18)."""
        for key in ("command", "argv0"):
            if key in self.merged.tree:
                self.irrelevant(got, (key,), f"`{key}` and `handler` are both there", "remove one of them")
        if got.get("pass") == "listen-fds":
            self.wrong(("pass",), "other-mode", "a handler has its connection as a socket and as files", "remove it")
        cwd = got.get("cwd", "/")
        if self.is_root:
            owners = frozenset({0, self.uid_of(got.get("user", "nobody")) or 0})
            if why := self.machine.untrusted(cwd, owners):
                self.wrong(("handler",), "not-trusted", f"superd is root and imports nothing from {cwd}: {why}")
        return ()

    def more_commands(self, got: dict[str, Any], context: Context | None) -> None:
        """The programs of the commands around the main one, and of checks, as `command` has its own."""
        for name in ("start_pre", "start_post", "stop_post"):
            if name in got:
                several = isinstance(self.merged.tree[name], list)
                found = []
                for number, words in enumerate(got[name]):
                    where: Path = (name, number) if several else (name,)
                    if words[0].startswith("-"):
                        right = f"write {name} = [[…]]"
                        self.wrong(where, "bad-value", f"`{name}` is a list of commands, and this is none", right)
                        continue
                    found.append(self.resolved(words, where, got, context) or words)
                got[name] = tuple(found)
        proxy, health = got.get("proxy") or {}, got.get("health", {})
        for path, table in ((("ready",), got), (("proxy", "ready"), proxy), (("health", "check"), health)):
            check = table.get(path[-1])
            if isinstance(check, Ready) and check.kind == "exec":
                table[path[-1]] = replace(check, command=self.resolved(check.command, path, got, context) or ())

    def readiness(self, got: dict[str, Any], sockets: list[SocketSpec]) -> None:
        """What `ready` and [health] need of the rest."""
        path: Path = ("ready",)
        ready = got.get("ready")
        if "proxy" in self.merged.tree:
            ready, path, sockets = (got.get("proxy") or {}).get("ready"), ("proxy", "ready"), []
        if ready is not None and ready.kind == "fd":
            stored = got.get("fdstore", 0)
            last = 3 + (len(sockets) if got.get("pass") == "listen-fds" else 0) + stored - 1
            if 3 <= ready.fd <= last:
                whose = "a socket's or a stored one's" if stored else "a socket's"
                self.wrong(path, "bad-value", f"fd {ready.fd} is {whose}: they stand at 3 to {last}",
                           f'write "fd:{last + 1}"')  # fmt: skip
        if (
            ready is not None
            and ready.kind == "log"
            and not {"log"} & {got.get(key, Output()).kind for key in ("stderr", "stdout")}
        ):
            self.wrong(path, "bad-value", 'nothing that it writes comes to the log: stdout or stderr = "log"')
        if "health" in got and "check" not in got["health"] and ("health",) not in self.failed:
            self.wrong(("health",), "missing-key", "[health] has no `check`", 'check = "connect:tcp:127.0.0.1:80"')

    def resolved(
        self, words: tuple[str, ...], where: Path, got: dict[str, Any], context: Context | None
    ) -> tuple[str, ...] | None:
        """The command with the absolute path of its program, or None after a report."""
        try:
            path = self.resolve(words[0])
            self.executable(path)
        except WrongError as error:
            if error.problem[0] == "missing-program" and not got.get("enabled", True):
                return words  # a disabled service may well be one whose program is not installed
            self.wrong(where, *error.problem)
            return None
        if self.is_root and context is not None and context.user is not None:
            # A program of the service's own user can do no more than that user can.
            owners = frozenset({0, self.uid_of(context.user) or 0})
            if why := self.machine.untrusted(self.root + path, owners):
                self.wrong(where, "not-trusted", f"superd is root and does not start {path}: {why}")
        return (path, *words[1:])

    def resolve(self, program: str) -> str:
        if "${" in program:
            raise WrongError("bad-value", f"the program of {quote(program)} must be known when the file is read")
        if isabs(program):
            return program
        if "/" in program:
            right = normpath(join(self.directory, program))
            raise WrongError("relative-program", f"{quote(program)} is a relative path", f"write {quote(right)}")
        # What a service finds itself comes first, then what only superd finds, and what is installed beside it, as
        # superctl is in a virtual environment.
        places = dict.fromkeys(f"{PATH}:{self.environ.get('PATH', '')}:{dirname(sys.executable)}".split(":"))
        for directory in places:
            candidate = join(directory, program)
            facts = self.machine.file(self.root + candidate) if isabs(directory) else None
            if facts is not None and facts.kind == "file" and facts.executable:
                return candidate
        raise WrongError(
            "missing-program", f"there is no program {quote(program)} in PATH ({':'.join(filter(None, places))})"
        )

    def executable(self, path: str) -> None:
        facts = self.machine.file(self.root + path)
        if facts is None:
            inside = f" below {self.root}" if self.root else ""
            raise WrongError("missing-program", f"there is no program {quote(path)}{inside}")
        if facts.kind != "file":
            kind = "a directory" if facts.kind == "directory" else "no regular file"
            raise WrongError("not-executable", f"{quote(path)} is {kind}")
        if not facts.executable:
            raise WrongError("not-executable", f"{quote(path)} is not executable", f"chmod +x {path}")
        head = facts.head
        if head is None or head.startswith(b"\x7fELF"):
            return
        if head.startswith(b"#!"):
            words = head[2:].split(b"\n")[0].split()
            interpreter = words[0].decode(errors="surrogateescape") if words else ""
            complete = b"\n" in head or len(words) > 1
            if complete and isabs(interpreter) and self.machine.file(self.root + interpreter) is None:
                why = f"{quote(path)} wants the interpreter {quote(interpreter)}, which does not exist"
                raise WrongError("missing-program", why)
        elif b"\0" not in head:  # a binary that is not ELF may have its handler in binfmt_misc; text has none
            why = f"{quote(path)} has no interpreter line, so the kernel does not start it (ENOEXEC)"
            raise WrongError("not-executable", why, f'begin it with #!/bin/sh, or write ["/bin/sh", "{path}"]')

    def runtime_names(self, got: dict[str, Any], sockets: list[SocketSpec]) -> None:
        """Whether there will be what `${port:S}` and `${fd:S}` name."""
        if not self.sockets_known or "run" not in got:
            return
        ports = [socket.name for socket in sockets if socket.address.port is not None]
        fds = ["connection"] if got["run"] == "per-connection" else [socket.name for socket in sockets]
        proxied, to = "proxy" in self.merged.tree, (got.get("proxy") or {}).get("to")
        for path, what in self.runtime:
            kind, colon, name = what.partition(":")
            if proxied and what == "port":
                if to is not None and to.port is None:
                    self.wrong(path, "bad-value", f"${{port}} is that of `to`, and {to} has none")
            elif proxied and kind == "fd":
                self.wrong(path, "bad-value", f"${{{what}}}: with [proxy] the process gets no sockets")
            elif kind == "fd" and got.get("pass") != "listen-fds":
                self.wrong(path, "bad-value", f'${{{what}}} goes with pass = "listen-fds"')
            elif not ports and kind == "port":
                self.wrong(path, "bad-value", f"${{{what}}} needs a socket that has a port")
            elif colon and name not in (names := ports if kind == "port" else fds):
                there = ", ".join(map(quote, dict.fromkeys(names))) or "none"
                self.wrong(path, "bad-value", f"${{{what}}}: no socket has the name {quote(name)} (there are: {there})")
