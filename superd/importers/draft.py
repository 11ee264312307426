"""What all importers make: a Draft of each service, and Notes of what is not in it.

A Draft takes values as they would be written in a file of superd. Whether this superd supports a key is asked of
core/keys.py, so that what is a comment today is a key as soon as superd has it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from ipaddress import IPv6Address, ip_address
from typing import Any, Literal, NamedTuple, Protocol

from superd.core.address import parse_address
from superd.core.keys import BY_TABLE
from superd.core.kinds import NAME
from superd.core.machine import Machine
from superd.core.toml import format_document

# "note": superd does it in a way of its own; "warning": it is not carried over; "security": and it was a protection.
Level = Literal["note", "warning", "security"]

A_NAME = "is a name, and superd does not look names up: it is off until `listen` is right"


class Place(NamedTuple):
    path: str
    line: int  # from 1; 0: the file as a whole

    def __str__(self) -> str:
        return f"{self.path}:{self.line}" if self.line else self.path


@dataclass(frozen=True, slots=True)
class Note:
    """One thing that somebody who migrates has to know."""

    place: Place
    level: Level
    text: str

    def __str__(self) -> str:
        return f"{self.place}: {self.level}: {self.text}"


class FormatError(ValueError):
    """A file that cannot be understood. str() is complete, `FILE:LINE: error: …`."""

    def __init__(self, place: Place, why: str) -> None:
        super().__init__(f"{place}: error: {why}")


class Files(Protocol):
    """Other files that the one at hand names. Paths are absolute or as they were given."""

    def read(self, path: str) -> str:
        """Raises OSError."""

    def glob(self, pattern: str) -> list[str]:
        """What matches, sorted; [] where nothing does."""


@dataclass(slots=True)
class Job:
    """One run of an importer: what it may ask, and the notes it leaves that belong to no service."""

    files: Files
    machine: Machine
    notes: list[Note] = field(default_factory=list)

    def say(self, place: Place, level: Level, text: str) -> None:
        self.notes.append(Note(place, level, text))

    def read_included(self, place: Place, path: str, above: frozenset[str], deepest: int) -> str | None:
        """The text of a file that the line at `place` includes; None, and a note: it cannot be read, or not again."""
        if path in above or len(above) >= deepest:
            self.say(place, "warning", f"not carried over: {path} includes itself")
            return None
        try:
            return self.files.read(path)
        except (OSError, ValueError) as error:
            self.say(place, "warning", f"not carried over: cannot read {path}: {error}")
            return None


_OF_BUILTINS = ("builtin", "description", "enabled", "limits.", "access.")


class Draft:
    """One service in the making.

    Key names are "limits.rate" for tables; `sockets` are tables of [[socket]]. Values are as a file has them: where
    superd would expand `${NAME}` they have been through literal().
    """

    def __init__(self, name: str, place: Place) -> None:
        self.name = name
        self.place = place
        self.values: dict[str, Any] = {}
        self.where: dict[str, Place] = {}
        self.sockets: list[dict[str, Any]] = []
        self.notes: list[Note] = []

    def say(self, level: Level, text: str, place: Place | None = None) -> None:
        note = Note(place or self.place, level, text)
        if note not in self.notes:
            self.notes.append(note)

    def lost(self, text: str, place: Place | None = None) -> None:
        self.say("warning", f"not carried over: {text}", place)

    def unprotected(self, text: str, place: Place | None = None) -> None:
        self.say("security", f"not carried over: {text}", place)

    def port(self, name: str, transport: str, machine: Machine) -> str:
        """`name` for an address; it is said if this machine does not know it."""
        if not (name.isascii() and name.isdigit()) and machine.port_of(name, transport) is None:
            self.say("warning", f"{name}/{transport} is not in this machine's /etc/services")
        return name

    def set(self, key: str, value: Any, place: Place | None = None) -> None:
        self.values[key] = value
        self.where[key] = place or self.place

    def add(self, key: str, values: Iterable[Any], place: Place | None = None) -> None:
        """To a list."""
        self.set(key, [*self.values.get(key, []), *values], place)

    # -- the end

    @property
    def schemes(self) -> list[str]:
        return [str(socket["listen"]).partition(":")[0] for socket in self.sockets]

    @property
    def run(self) -> str:
        """The run mode; as core/schema.py has it where none is written, "" where one must be."""
        if "run" in self.values:
            return str(self.values["run"])
        if not self.sockets:
            return "always-on"
        if "builtin" in self.values:
            return "per-connection"
        accepts = {
            scheme in ("tcp", "tcp4", "tcp6", "unix", "unix-seqpacket", "vsock", "tcpmux") for scheme in self.schemes
        }
        return "per-connection" if accepts == {True} else "on-demand" if len(set(self.schemes)) == 1 else ""

    def table(self) -> dict[str, Any]:
        """What the file says; keys that cannot be there have become notes. Call it once, when all is set."""
        if "builtin" in self.values:  # there is no process that the rest could be about
            self.values = {name: value for name, value in self.values.items() if name.startswith(_OF_BUILTINS)}
        run = self.run
        found: dict[str, Any] = {}
        for name, key in BY_TABLE["service"].items():
            if key.kind == "table":
                inner = {
                    k: self._take(f"{name}.{k}", run) for k in BY_TABLE.get(name, {}) if f"{name}.{k}" in self.values
                }
                if inner := {k: v for k, v in inner.items() if v is not None}:
                    found[name] = inner
            elif name in self.values and (value := self._take(name, run)) is not None:
                found[name] = value
        if self.sockets:
            sockets = [self._socket(socket) for socket in self.sockets]
            if any(len(socket) > 1 for socket in sockets):
                found["socket"] = sockets
            else:
                addresses = [socket["listen"] for socket in sockets]
                found = {"listen": addresses[0] if len(addresses) == 1 else addresses, **found}
        return {name: found[name] for name in BY_TABLE["service"] if name in found}

    def _take(self, name: str, run: str) -> Any:
        """The value; None if it has no effect, or cannot be there."""
        table, _, inner = name.rpartition(".")
        key = BY_TABLE[table or "service"][inner]
        value, place = self.values[name], self.where[name]
        level: Level = "security" if table in ("access", "sandbox") else "warning"
        if table == "access" and run == "on-demand" and (why := self._unguarded(value)):
            self.say(level, f"not carried over: `{name}`: {why}", place)
            return None
        if key.modes and run not in key.modes:
            if value != key.default and not (key.off and value == "off") and value != "no":
                self.say(level, f'not carried over: `{name}` means nothing for run = "{run}"', place)
            return None
        if value == key.default and name not in ("instances", "notify_access"):
            return None
        usual = {"restart": "on-failure" if run == "always-on" else "no",
                 "pass": "stdio" if run == "per-connection" else "listen-fds"}  # fmt: skip
        if name in usual and value == usual[name]:
            return None
        return value

    def _unguarded(self, value: list[str]) -> str:
        """Why superd cannot look at who sends to an on-demand service; "" if it can."""
        if any(not scheme.startswith("udp") for scheme in self.schemes):
            return "a service that accepts by itself accepts from everybody"
        return "names of hosts come too late for datagrams" if any(item.startswith(".") for item in value) else ""

    def _socket(self, socket: dict[str, Any]) -> dict[str, Any]:
        scheme = str(socket["listen"]).partition(":")[0]
        found = {}
        for name, key in BY_TABLE["socket"].items():
            if name not in socket or (key.modes and scheme not in key.modes):
                continue  # elsewhere, too, it had no effect on such a socket
            if socket[name] != key.default and (name, socket[name]) != ("name", self.name):
                found[name] = socket[name]
        return found


@dataclass(frozen=True, slots=True)
class Imported:
    """A service file, and what was said about it."""

    name: str
    text: str
    notes: tuple[Note, ...]


def finish(drafts: list[Draft]) -> list[Imported]:
    """What is not carried over stands above the keys."""
    unique_names(drafts)
    done = []
    for draft in drafts:
        table = draft.table()
        header = [f"From {draft.place}."]
        header += [f"{note.place}: {note.text}" for note in draft.notes if note.level != "note"]
        text = format_document(table, header=header)
        done.append(Imported(draft.name, text, tuple(draft.notes)))
    return done


def unique_names(drafts: list[Draft]) -> None:
    """A second draft of a name gets that of its first socket's scheme, or a number."""
    taken: set[str] = set()
    for draft in drafts:
        stem, at, rest = service_name(draft.name).partition("@")
        name = f"{stem}{at}{rest}"
        if name in taken:
            scheme = draft.schemes[0] if draft.sockets else "2"
            tries = [f"{stem[:50]}-{scheme}", *(f"{stem[:50]}-{number}" for number in range(2, len(drafts) + 2))]
            name = next(each + at + rest for each in tries if each + at + rest not in taken)
        taken.add(name)
        if name != draft.name:
            for socket in draft.sockets:
                socket.setdefault("name", name)
        draft.name = name


def service_name(text: str) -> str:
    """A name that superd takes, as close to `text` as can be; a template keeps its `@`."""
    stem, at, instance = text.partition("@")
    stem = re.sub(r"[^a-z0-9_.-]+", "-", stem.lower()).lstrip("-_.")[:63].rstrip("-") or "service"
    instance = re.sub(r"[^a-z0-9_.-]+", "-", instance.lower())
    assert NAME.fullmatch(stem)
    return f"{stem}{at}{instance}"


def literal(text: str) -> str:
    """`text` so that superd does not expand anything in it."""
    return text.replace("${", "$${")


def words(items: Iterable[str]) -> list[str]:
    return [literal(item) for item in items]


def ip_listen(transport: str, host: str, port: str, version: str = "") -> str:
    """An address as it is written in `listen`.

    transport  "tcp" or "udp"
    host       "" or "*" for every one; a numeric address, without brackets
    version    "4", "6" or "" for both
    """
    plain = host.strip("[]")
    if plain in ("", "*", "0.0.0.0", "::"):
        version = {"0.0.0.0": "4"}.get(plain, version)
        return f"{transport}{version}:{port}"
    if plain == "localhost":
        return f"{transport}:{ {'4': '127.0.0.1', '6': '[::1]'}.get(version, 'localhost') }:{port}"
    return f"{transport}:[{plain}]:{port}" if ":" in plain else f"{transport}:{plain}:{port}"


def is_address(host: str) -> bool:
    """Whether it is numeric, or needs no look-up."""
    plain = host.strip("[]").partition("%")[0]
    try:
        found = ip_address(plain)
    except ValueError:
        return plain in ("", "*", "localhost")
    return not (isinstance(found, IPv6Address) and found.ipv4_mapped)


def wrong_address(text: str) -> str | None:
    """Why superd would not take it, ports' names apart."""
    try:
        parse_address(text, directory="/", port_of=lambda name, protocol: 1)
    except ValueError as error:
        return str(error)
    return None


def listen(draft: Draft, address: str, place: Place, **options: Any) -> bool:
    """Add a socket. If superd has no such address it is said, and the answer is false."""
    shown = re.sub(r"\$\{instance\}", "x", address)
    if why := wrong_address(shown.replace("$${", "${")):
        draft.lost(why, place)
        return False
    draft.sockets.append({"listen": address, **options})
    return True


def octal(text: str, most: int = 0o777) -> str | None:
    """A mode or umask as superd writes it; None for what is none."""
    if not re.fullmatch(r"[0-7]{1,6}", text, re.A) or int(text, 8) > most:
        return None
    return f"{int(text, 8):04o}"


def identity(text: str) -> str | int:
    """A user or group as superd takes it: a number is an id."""
    return int(text) if re.fullmatch(r"[0-9]{1,10}", text, re.A) else literal(text)


def as_user(draft: Draft, user: str, place: Place, *, key: str = "user") -> None:
    """`user` or `group`: a name, or an id written in digits."""
    if not user:
        return
    draft.set(key, identity(user), place)


def runs_as_root(draft: Draft, place: Place, because: str) -> None:
    """Root has to be asked for, and that it was never said is worth a word."""
    draft.set("user", "root", place)
    draft.say("security", f'{because}: it ran as root and still does; write user = "…"', place)
