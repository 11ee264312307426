"""The configuration in force, and what is on disk: whatever becomes of a file, its service has a last good version.

    read()    looks at the disk and says what should be in force; it may wait for a disk, so it has a thread to itself
    accept()  after it has been carried out: that is in force now
    pack()    for a manager that follows this one, which must not pick up a change that nobody has asked for

A file that cannot be read, is empty, half written or wrong keeps the version in force; a service goes only when
the name of its file has gone from a directory that can be read (FAILURES K3, K10).
"""

from __future__ import annotations

import io
import marshal
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from posixpath import dirname
from typing import Any

from superd.core import schema
from superd.core.machine import Machine, Remembered
from superd.core.problems import Problem, format_problems
from superd.core.schema import Loader, SourceFile, Unit
from superd.core.spec import Snapshot
from superd.system import configdir
from superd.system.configdir import Hints, Scan, Scanner

_FORMAT = 1


@dataclass(frozen=True, slots=True)
class Reading:
    """What is on disk, with bad files in their last good version.

    problems  all that is wrong on disk
    kept      unit -> the first thing that is wrong with it, for those whose last good version stays
    watch     as in configdir.Scan
    """

    snapshot: Snapshot
    problems: list[Problem]
    kept: dict[str, str]
    watch: dict[str, dict[str | None, set[str]]]
    daemon: SourceFile | None
    read_problems: list[Problem] = field(default_factory=list)

    @property
    def has_errors(self) -> bool:
        return any(problem.is_error for problem in self.problems)


class Configuration:
    """paths as for superd -c. `notes`: unit -> why what runs is not what its file says."""

    def __init__(
        self, paths: Sequence[str], environ: Mapping[str, str], *, is_root: bool, given: SourceFile | None = None
    ) -> None:
        """given: the service that there is, instead of what is on disk."""
        self.is_root = is_root
        self.environ = environ
        self.snapshot = Snapshot()
        self.notes: dict[str, str] = {}
        self.extra: dict[str, tuple[str, ...]] = {}  # template -> instances started by hand
        self._scanner = Scanner(paths, is_root=is_root) if given is None else configdir.Given(given)
        self._loader = Loader(environ, is_root=is_root)
        self._daemon: SourceFile | None = None
        self._read_problems: list[Problem] = []
        self._packed: dict[str, Unit] = {}

    def read(self, hints: Hints | None = None, *, look_again: bool = True) -> Reading:
        """hints: what may have changed, None for anything. look_again: at the machine, too (Loader.load)."""
        scan = self._scanner.scan(hints)
        files, problems = scan.files, scan.problems
        daemon = next((source for source in files if source.role == "daemon"), None)
        wrong = self._wrong_daemon(daemon, scan)
        if wrong:
            daemon = self._daemon
            files = [*([] if daemon is None else [daemon]), *(file for file in files if file.role != "daemon")]
            problems = [problem for problem in problems if problem not in wrong]
        return self._load(scan, files, problems, daemon, wrong, look_again=look_again)

    def _load(
        self, scan: Scan, files: list[SourceFile], problems: list[Problem], daemon: SourceFile | None,
        wrong: list[Problem], *, look_again: bool,
    ) -> Reading:  # fmt: skip
        machine = Remembered(configdir.RealMachine())
        kept = self._out_of_sight(scan, files)
        found: list[Problem] = []
        while True:
            snapshot, more = self._loader.load(
                files, machine, problems, extra=self.extra, look_again=look_again, keep=frozenset(kept)
            )
            found = list(dict.fromkeys([*found, *more]))
            bad = self._lost(snapshot, kept)
            if not bad:
                break
            kept |= bad
            look_again = False
        return Reading(
            snapshot, [*wrong, *found], kept, scan.watch, daemon, [p for p in problems if p.service not in kept]
        )

    def _wrong_daemon(self, daemon: SourceFile | None, scan: Scan) -> list[Problem]:
        """What is wrong with superd.toml, if there is a good one in force."""
        if self._daemon is None or daemon == self._daemon:
            return []
        if daemon is None:
            return [p for p in scan.problems if p.path == self._daemon.path and p.is_error]
        machine = configdir.RealMachine()
        _, found = schema.load([daemon], machine=machine, environ=self.environ, is_root=self.is_root)
        return found if any(problem.is_error for problem in found) else []

    def _out_of_sight(self, scan: Scan, files: list[SourceFile]) -> dict[str, str]:
        """Units in force whose directory cannot be read: nobody has removed them."""
        if not scan.unreadable:
            return {}
        seen = {source.path for source in files}
        why = {problem.path: problem.message for problem in scan.problems}
        return {
            unit.name: why.get(dirname(path), f"cannot read {dirname(path)}")
            for path, unit in self._loader.in_force.items()
            if dirname(path) in scan.unreadable and path not in seen
        }

    def _lost(self, snapshot: Snapshot, kept: dict[str, str]) -> dict[str, str]:
        """Units that have services in force, and are broken now."""
        if not snapshot.broken:
            return {}
        alive = {unit_of(name) for name in self.snapshot.services}
        lost: dict[str, str] = {}
        for name, why in snapshot.broken.items():
            unit = unit_of(name)
            if unit in alive and unit not in kept:
                lost.setdefault(unit, why.splitlines()[0])
        return lost

    def has(self, unit: str) -> bool:
        return any(one.name == unit for one in self._loader.in_force.values())

    def sources(self, name: str) -> tuple[list[SourceFile], list[Problem], Machine]:
        """What a service was read from, what was wrong with reading it, and the machine as it was then."""
        unit = next((one for one in self._loader.in_force.values() if one.name == unit_of(name)), None)
        files = [] if self._daemon is None else [self._daemon]
        files += [] if unit is None else unit.sources
        problems = [problem for problem in self._read_problems if problem.service == unit_of(name)]
        return files, problems, Remembered(configdir.RealMachine(), {} if unit is None else dict(unit.asked))

    def read_in_force(self) -> Reading:
        """As read(), of what is in force and not of the disk: `extra` has changed."""
        mine = self._loader.in_force.values()
        files = [source for unit in mine if unit.name in self.extra for source in unit.sources]
        daemon = [] if self._daemon is None else [self._daemon]
        keep = frozenset(unit.name for unit in mine if unit.name not in self.extra)
        snapshot, _ = self._loader.load(
            [*daemon, *files], Remembered(configdir.RealMachine()), extra=self.extra, look_again=False, keep=keep
        )
        broken = {**self.snapshot.broken, **snapshot.broken}
        snapshot = Snapshot(self.snapshot.daemon, snapshot.services, broken)
        return Reading(snapshot, [], {}, {}, self._daemon, self._read_problems)

    def read_first(self) -> list[Problem]:
        """As read() and accept(), at start."""
        reading = self.read()
        self.accept(reading)
        return reading.problems

    def accept(self, reading: Reading, refused: Mapping[str, str] | None = None) -> bool:
        """`reading` is in force now, but for units that could not be carried out: name -> why. Returns whether a next
        manager has to know."""
        before = self._loader.in_force, self._daemon, self.notes, self._read_problems
        refused = refused or {}
        snapshot = reading.snapshot
        if refused:
            services = {name: spec for name, spec in snapshot.services.items() if unit_of(name) not in refused}
            services |= {name: spec for name, spec in self.snapshot.services.items() if unit_of(name) in refused}
            snapshot = Snapshot(snapshot.daemon, services, snapshot.broken)
        self.snapshot = snapshot
        self._daemon = reading.daemon
        self._read_problems = reading.read_problems
        self._loader.accept(frozenset(refused))
        self.notes = {
            unit: f"changed on disk: {why}; running the last good version" for unit, why in reading.kept.items()
        }
        self.notes |= {unit: f"changed on disk: {why}" for unit, why in refused.items()}
        return before != (self._loader.in_force, self._daemon, self.notes, self._read_problems)

    def changed_on_disk(self) -> set[str]:
        """Units whose files are others than those in force; units that are new or have gone count too."""
        scan = self._scanner.scan()
        now: dict[str, list[SourceFile]] = {}
        for source in scan.files:
            if source.role != "daemon":
                now.setdefault(source.name, []).append(source)
        was = {unit.name: list(unit.sources) for unit in self._loader.in_force.values()}
        return {name for name in now.keys() | was.keys() if now.get(name) != was.get(name)}

    # -- for the next manager

    def pack(self, *, changes: bool = False) -> bytes:
        """What is in force; or what has changed since pack() was called last, to be added to what it gave then.

        marshal: of 10,000 files a fourth of the time that JSON takes, and what is the same is there once.
        """
        now = self._loader.in_force
        was = self._packed if changes else {}
        units = {
            path: ([(s.path, s.data, s.role, s.name) for s in unit.sources], unit.extra, unit.asked)
            for path, unit in now.items() if was.get(path) is not unit
        }  # fmt: skip
        gone = list(was.keys() - now.keys())
        self._packed = now
        daemon = None if self._daemon is None else (self._daemon.path, self._daemon.data)
        problems = [asdict(problem) for problem in self._read_problems]
        after = list(self._loader.without)
        return marshal.dumps((_FORMAT, daemon, units, gone, after, problems, self.extra, self.notes))

    def restore(self, data: bytes) -> None:
        """What pack() gave is in force. Raises ValueError for what another Python or another superd has packed."""
        file = io.BytesIO(data)
        units: dict[str, Any] = {}
        daemon, after, problems = None, [], []
        if not data:
            raise ValueError("nothing is stored")
        while file.tell() < len(data):
            try:
                version, *packed = marshal.load(file)
                if version != _FORMAT:
                    raise ValueError(f"format {version}")
                daemon, changed, gone, after, problems, self.extra, self.notes = packed
            except (EOFError, TypeError, ValueError) as error:
                if units:
                    break  # the manager was killed while it wrote: that change was not carried out
                raise ValueError(str(error)) from None
            units |= changed
            units = {path: unit for path, unit in units.items() if path not in gone}
        directories = list(dict.fromkeys(map(dirname, units)))
        units = dict(sorted(units.items(), key=lambda item: (directories.index(dirname(item[0])), item[0])))
        files = [SourceFile(path, data, role, name) for rows, *_ in units.values() for path, data, role, name in rows]
        self._daemon = None
        if daemon is not None:
            self._daemon = SourceFile(daemon[0], daemon[1], "daemon", "superd")
            files.insert(0, self._daemon)
        self._read_problems = [Problem(**problem) for problem in problems]
        self.snapshot, _ = self._loader.load(
            files, Remembered(configdir.RealMachine()), self._read_problems, extra=self.extra, look_again=False,
            remembered={path: asked for path, (_, _, asked) in units.items()}, after=frozenset(after),
        )  # fmt: skip
        self._loader.accept()


def unit_of(name: str) -> str:
    """The file that a service comes from: "worker@" of "worker@a"."""
    base, at, _ = name.partition("@")
    return base + at


def describe(problems: list[Problem]) -> list[str]:
    """A line each, for errors only."""
    return format_problems([p for p in problems if p.is_error], "short").splitlines()
