"""The fds that a service has stored (FDSTORE=1): they come back to its next process, whoever has died meanwhile.

The keeper holds them, under names, and gives them to the process that it starts. Here are copies: to see that one has
hung up, and that it is not stored twice.
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from superd.manager.keeperlink import Inheritance, KeeperLink
from superd.system import notify

if TYPE_CHECKING:
    from superd.manager.process import ProcessService

_PREFIX = "fdstore"
DEFAULT_NAME = "stored"


@dataclass(frozen=True, slots=True)
class Stored:
    """One fd. `polled`: it goes when its other end does."""

    fd: int
    number: int  # tells fds of one name apart
    name: str
    polled: bool


Inherited = dict[str, list[Stored]]


def inherit(inheritance: Inheritance) -> Inherited:
    """What the keeper holds from earlier managers, by service, in the order in which it was stored."""
    found: Inherited = {}
    for held in [name for name in inheritance.held if name.startswith(f"{_PREFIX}:")]:
        _, service, number, polled, name = held.split(":", 4)
        (fd,) = inheritance.held.pop(held)
        found.setdefault(service, []).append(Stored(fd, int(number), name, polled == "1"))
    return found


def discard(inherited: Inherited, keeper: KeeperLink) -> None:
    """What is left is of services that there are no more."""
    while inherited:
        service, rows = inherited.popitem()
        for row in rows:
            os.close(row.fd)
            keeper.send("drop", name=_held_as(service, row))


def _held_as(service: str, row: Stored) -> str:
    return f"{_PREFIX}:{service}:{row.number}:{int(row.polled)}:{row.name}"


class FdStore:
    """Of one service; `fdstore` of its spec says how many there may be."""

    def __init__(self, service: ProcessService) -> None:
        self.service = service
        self._rows: dict[int, Stored] = {}  # by number: those of one name in the order in which they came
        self._said_full = False

    def __len__(self) -> int:
        return len(self._rows)

    def take_over(self, rows: list[Stored]) -> None:
        for row in sorted(rows, key=lambda row: row.number):
            self._keep(row)

    @property
    def held(self) -> list[tuple[str, str]]:
        """(the keeper's name, FDNAME) of each, in order: the start order's `stored`."""
        return [(_held_as(self.service.name, row), row.name) for row in self._rows.values()]

    def add(self, fds: list[int], name: str, *, polled: bool) -> None:
        """Takes the fds. Those of an open file that is stored already, and those beyond the limit, are closed."""
        limit = self.service.spec.fdstore
        while fds:
            fd = fds.pop(0)
            if any(notify.is_same_file(fd, row.fd) for row in self._rows.values()):
                os.close(fd)
            elif len(self._rows) >= limit:
                os.close(fd)
                if not self._said_full:
                    self._said_full = True
                    self.service.error(
                        f'cannot store more fds: fdstore = {limit}; closing it ("{name}")', level="warning"
                    )
            else:
                row = Stored(fd, max(self._rows, default=0) + 1, name, polled)
                try:
                    self.service.supervisor.keeper.send("store", [fd], name=_held_as(self.service.name, row))
                except OSError as error:
                    os.close(fd)
                    self.service.error(f'cannot store an fd ("{name}"): {error.strerror}; closing it')
                else:
                    self._keep(row)

    def remove(self, name: str) -> None:
        """All of that name."""
        for row in [row for row in self._rows.values() if row.name == name]:
            self._drop(row)

    def clear(self) -> None:
        for row in list(self._rows.values()):
            self._drop(row)
        self._said_full = False

    def _keep(self, row: Stored) -> None:
        self._rows[row.number] = row
        if row.polled:
            try:
                self.service.supervisor.watch.add(row.fd, functools.partial(self._hung_up, row), 0)
            except OSError:
                pass  # a file, or an epoll fd in a circle: it cannot hang up

    def _hung_up(self, row: Stored, events: int) -> None:
        self._drop(row)
        self.service.log.message(f'a stored fd ("{row.name}") has hung up; closing it', service=self.service.name)

    def _drop(self, row: Stored) -> None:
        del self._rows[row.number]
        self.service.supervisor.watch.remove(row.fd)
        os.close(row.fd)
        self.service.supervisor.keeper.send("drop", name=_held_as(self.service.name, row))
