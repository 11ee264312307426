"""What the tests of importers share: other files and a machine that exist only here, and importing in one call."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from typing import Any

import tomli

from superd.core.machine import FileFacts
from superd.core.problems import Problem
from superd.core.schema import SourceFile, load
from superd.core.spec import ServiceSpec
from superd.importers import import_files

ELF = FileFacts("file", True, b"\x7fELF\0")
PORTS = {
    "amanda": 10080, "chargen": 19, "daytime": 13, "discard": 9, "echo": 7, "finger": 79, "ftp": 21, "ident": 113,
    "ntalk": 518, "rsync": 873, "sane-port": 6566, "talk": 517, "telnet": 23, "tftp": 69, "time": 37,
}  # fmt: skip


@dataclass
class Files:
    """importers.Files over a dict."""

    texts: Mapping[str, str] = field(default_factory=dict)

    def read(self, path: str) -> str:
        if path not in self.texts:
            raise FileNotFoundError(2, "No such file or directory")
        return self.texts[path]

    def glob(self, pattern: str) -> list[str]:
        return sorted(path for path in self.texts if fnmatch(path, pattern) and path.count("/") == pattern.count("/"))


@dataclass
class Anywhere:
    """A machine where every program and every user exists but those that are named."""

    absent: frozenset[str] = frozenset()
    uid: int = 0
    gid: int = 0

    def port_of(self, name: str, protocol: str) -> int | None:
        return PORTS.get(name)

    def user(self, user: str | int) -> tuple[int, int] | None:
        if user in self.absent:
            return None
        return (0, 0) if user in ("root", 0) else (1000, 1000)

    def group(self, group: str | int) -> int | None:
        return None if group in self.absent else 1000

    def absolute(self, path: str) -> str:
        return path if path.startswith("/") else f"/{path}"

    def file(self, path: str) -> FileFacts | None:
        return None if path in self.absent else ELF

    def lacks_controller(self, name: str) -> str | None:
        return None

    def unreadable(self, path: str) -> str | None:
        return None

    def exposed(self, path: str) -> str | None:
        return None

    def untrusted(self, path: str, owners: frozenset[int]) -> str | None:
        return None


@dataclass
class Result:
    texts: dict[str, str]
    notes: list[str]
    failures: list[str]

    @property
    def tables(self) -> dict[str, dict[str, Any]]:
        return {name: tomli.loads(text) for name, text in self.texts.items()}

    @property
    def table(self) -> dict[str, Any]:
        """Of the one service that there is."""
        assert len(self.texts) == 1, (self.texts, self.notes, self.failures)
        return next(iter(self.tables.values()))

    def said(self, text: str) -> bool:
        return any(text in note for note in self.notes)


def bring(
    files: Mapping[str, str], *, others: Mapping[str, str] | None = None, format: str | None = None,
    absent: frozenset[str] = frozenset(),
) -> Result:  # fmt: skip
    """Import `files` (by path), with `others` lying around."""
    around = Files({**files, **(others or {})})
    services, notes, failures = import_files(list(files.items()), around, Anywhere(absent), format)
    return Result({one.name: one.text for one in services}, [str(note) for note in notes], failures)


def specs(result: Result, *, absent: frozenset[str] = frozenset()) -> dict[str, ServiceSpec]:
    """What superd makes of the files; all of them must be right."""
    snapshot, problems = check(result.texts, absent)
    assert not [problem for problem in problems if problem.is_error], (problems, result.texts)
    return snapshot


def check(
    texts: Mapping[str, str], absent: frozenset[str] = frozenset()
) -> tuple[dict[str, ServiceSpec], list[Problem]]:
    sources = [SourceFile(f"/c/{name}.toml", text.encode(), "service", name) for name, text in texts.items()]
    snapshot, problems = load(sources, machine=Anywhere(absent), environ={"PATH": "/usr/bin"}, is_root=True)
    return snapshot.services, problems
