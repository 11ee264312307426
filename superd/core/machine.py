"""What the loader must know of the machine: core has no I/O, so system/configdir.py looks."""

from __future__ import annotations

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

    def unreadable(self, path: str) -> str | None:
        """Why superd cannot read the file; None: it can. Nothing of what is in it becomes known."""

    def exposed(self, path: str) -> str | None:
        """Why somebody who is neither the file's owner nor of its group could read it; None: nobody can."""

    def lacks_controller(self, name: str) -> str | None:
        """Why no control group here can have this controller, cgroups(7) v2; None: some can."""


Question = tuple[Any, ...]  # name of a method of Machine, then what it is asked


class Remembered:
    """A Machine that keeps every answer: the same files mean the same again, whatever has become of the machine.

    A manager that follows another must not lose a running service because its program has been deleted.
    `answers` is plain data: pass it on, and give it to the next one. `asked` gathers the questions of whoever
    empties it before.
    """

    def __init__(self, machine: Machine, answers: dict[Question, Any] | None = None) -> None:
        self._machine = machine
        self.answers: dict[Question, Any] = {} if answers is None else answers
        self.asked: set[Question] = set()
        self.uid, self.gid = machine.uid, machine.gid

    def ask(self, question: Question) -> Any:
        self.asked.add(question)
        if question not in self.answers:
            self.answers[question] = self._look(*question)
        return self.answers[question]

    def _look(self, what: str, *about: Any) -> Any:
        if what == "file":
            facts = self._machine.file(about[0])
            return None if facts is None else (facts.kind, facts.executable, facts.head)
        if what == "untrusted":
            return self._machine.untrusted(about[0], frozenset(about[1]))
        return getattr(self._machine, what)(*about)

    def port_of(self, name: str, protocol: str) -> int | None:
        port: int | None = self.ask(("port_of", name, protocol))
        return port

    def user(self, user: str | int) -> tuple[int, int] | None:
        ids: tuple[int, int] | None = self.ask(("user", user))
        return ids

    def group(self, group: str | int) -> int | None:
        gid: int | None = self.ask(("group", group))
        return gid

    def absolute(self, path: str) -> str:
        if path.startswith("/"):
            return self._machine.absolute(path)  # that depends on nothing
        return str(self.ask(("absolute", path)))

    def file(self, path: str) -> FileFacts | None:
        found = self.ask(("file", path))
        return None if found is None else FileFacts(*found)

    def untrusted(self, path: str, owners: frozenset[int]) -> str | None:
        why: str | None = self.ask(("untrusted", path, tuple(sorted(owners))))
        return why

    def unreadable(self, path: str) -> str | None:
        why: str | None = self.ask(("unreadable", path))
        return why

    def exposed(self, path: str) -> str | None:
        why: str | None = self.ask(("exposed", path))
        return why

    def lacks_controller(self, name: str) -> str | None:
        why: str | None = self.ask(("lacks_controller", name))
        return why
