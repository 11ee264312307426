"""TOML files -> (Snapshot, problems), by the table of keys.py. Every problem of every file is found at once.

A file that is wrong affects its own service alone: that name is in Snapshot.broken, and the others are there. What
could make a service run with more rights than was meant (a misspelt `user`, a [defaults] that cannot be read) breaks
every service it concerns. There is no I/O here: facts of the machine come from a Machine.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from posixpath import dirname, join, normpath
from typing import Any, Literal

from superd.core import dependencies
from superd.core.collision import collide, places_of
from superd.core.document import Document, Merged
from superd.core.kinds import NAME
from superd.core.machine import Machine, Question, Remembered
from superd.core.problems import Problem, format_problems
from superd.core.reader import Reader
from superd.core.spec import (
    DaemonSpec,
    ServiceSpec,
    Snapshot,
)

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


def _document(source: SourceFile) -> Document:
    import tomli  # late: 15 ms that a command line without files does not need

    service = None if source.role == "daemon" else source.name
    return Document(source.path, source.data, tomli.loads, service=service)


_Place = tuple[Any, ...]


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
                places = tuple(place for socket in sockets for place in places_of(socket))
                links = spec is not None and dependencies.names_others(spec)
                found.append(_Found(name, spec, problems, places, links))
            asked = frozenset((question, self.machine.answers[question]) for question in self.machine.asked)
            unit = Unit(sources, extra, tuple(found), self.asked.setdefault(asked, asked))
        self.units[source.path] = unit
        return unit.found

    def _reader(self, merged: Merged, name: str | None) -> Reader:
        return Reader(self.machine, self.environ, self.is_root, merged, name)

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
    ) -> Iterator[tuple[str, Reader | None, list[Problem]]]:
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
            for owner in dict.fromkeys(owner for place in places_of(socket) for owner in taken.get(place, ())):
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
) -> Iterator[tuple[str, Reader | None, ServiceSpec | None, list[Problem]]]:
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


_DAEMON_FIELDS = {
    "control": "control", "control_mode": "control_mode", "control_group": "control_group",
    "control_admins": "control_admins", "log": "log", "log_level": "log_level",
    "syslog": "syslog", "stop_timeout": "stop_timeout_s", "watch": "watch",
}  # fmt: skip
