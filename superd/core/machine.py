"""What the loader must know of the machine: core has no I/O, so system/configdir.py looks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol


@dataclass(frozen=True, slots=True)
class FileFacts:
    """What stands at a path, symlinks followed. head: its first bytes, None where they cannot be read."""

    kind: Literal["file", "directory", "other"]
    executable: bool
    head: bytes | None = None


class Machine(Protocol):
    """The facts that decide whether a value is right. Nothing here has an effect, or asks the network."""

    uid: int  # superd's own
    gid: int

    def port_of(self, name: str, protocol: str) -> int | None:
        """The port of a name in /etc/services."""

    def user(self, user: str | int) -> tuple[int, int] | None:
        """(uid, gid) of a user that exists."""

    def group(self, group: str | int) -> int | None:
        """The gid of a group that exists."""

    def absolute(self, path: str) -> str:
        """`path` from the working directory."""

    def file(self, path: str) -> FileFacts | None:
        """What stands at an absolute path; None: nothing."""

    def untrusted(self, path: str, owners: frozenset[int]) -> str | None:
        """Why somebody other than `owners` could change the file or put another in its place; None: nobody can."""


class Remembered:
    """A Machine that keeps every answer: the same files mean the same again, whatever has become of the machine.

    A manager that follows another must not lose a running service because its program has been deleted.
    `answers` is for JSON: pass it on, and give it to the next one.
    """

    def __init__(self, machine: Machine, answers: dict[str, Any] | None = None) -> None:
        self._machine = machine
        self.answers: dict[str, Any] = {} if answers is None else answers
        self.uid, self.gid = machine.uid, machine.gid

    def _ask(self, question: str, ask: Callable[[], Any]) -> Any:
        if question not in self.answers:
            self.answers[question] = ask()
        return self.answers[question]

    def port_of(self, name: str, protocol: str) -> int | None:
        port: int | None = self._ask(f"port {name} {protocol}", lambda: self._machine.port_of(name, protocol))
        return port

    def user(self, user: str | int) -> tuple[int, int] | None:
        ids = self._ask(f"user {user!r}", lambda: self._machine.user(user))
        return None if ids is None else (ids[0], ids[1])

    def group(self, group: str | int) -> int | None:
        gid: int | None = self._ask(f"group {group!r}", lambda: self._machine.group(group))
        return gid

    def absolute(self, path: str) -> str:
        return str(self._ask(f"absolute {path}", lambda: self._machine.absolute(path)))

    def file(self, path: str) -> FileFacts | None:
        def ask() -> list[Any] | None:
            facts = self._machine.file(path)
            if facts is None:
                return None
            return [facts.kind, facts.executable, None if facts.head is None else facts.head.decode("latin-1")]

        found = self._ask(f"file {path}", ask)
        if found is None:
            return None
        return FileFacts(found[0], found[1], None if found[2] is None else found[2].encode("latin-1"))

    def untrusted(self, path: str, owners: frozenset[int]) -> str | None:
        question = f"untrusted {path} {sorted(owners)}"
        why: str | None = self._ask(question, lambda: self._machine.untrusted(path, owners))
        return why
