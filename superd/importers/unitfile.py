"""The syntax of systemd's unit files, systemd.syntax(7): sections, lists that an empty value resets, quoting."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from superd.importers.draft import FormatError, Place


@dataclass(slots=True)
class Unit:
    """A unit with its drop-ins. name: "foo.socket", "foo@.service", "foo@bar.service"."""

    name: str
    path: str
    pairs: list[tuple[str, str, str, Place]] = field(default_factory=list)  # section, key, value, where
    asked: set[tuple[str, str]] = field(default_factory=set)

    @property
    def stem(self) -> str:
        return self.name.rpartition(".")[0]

    @property
    def is_socket(self) -> bool:
        return self.name.endswith(".socket")

    def all(self, section: str, key: str) -> list[tuple[str, Place]]:
        """Every value of a list, what an empty value has reset left out."""
        self.asked.add((section, key))
        found: list[tuple[str, Place]] = []
        for where, name, value, place in self.pairs:
            if (where, name) == (section, key):
                found = [*found, (value, place)] if value else []
        return found

    def last(self, section: str, key: str, default: str = "") -> str:
        found = self.all(section, key)
        return found[-1][0] if found else default

    def place(self, section: str, key: str) -> Place:
        found = [place for where, name, _, place in self.pairs if (where, name) == (section, key)]
        return found[-1] if found else Place(self.path, 0)

    def has(self, section: str, key: str) -> bool:
        return bool(self.all(section, key))

    def words(self, section: str, key: str) -> list[str]:
        """A list of words over all lines."""
        return [word for value, place in self.all(section, key) for word in split(value, place)]

    def yes(self, section: str, key: str, default: bool = False) -> bool:
        return is_yes(self.last(section, key), default)

    def left(self) -> list[tuple[str, str, str, Place]]:
        """Pairs that nobody has asked for."""
        return [pair for pair in self.pairs if (pair[0], pair[1]) not in self.asked and pair[2]]


def is_yes(text: str, default: bool = False) -> bool:
    lower = text.lower()
    if lower in ("1", "yes", "y", "true", "t", "on"):
        return True
    return default if lower not in ("0", "no", "n", "false", "f", "off") else False


def parse(path: str, text: str) -> list[tuple[str, str, str, Place]]:
    """(section, key, value, place) of each pair, continuation lines joined. FormatError for what is none."""
    found = []
    section = ""
    pending, start = "", 0
    for number, raw in enumerate(text.replace("\r\n", "\n").split("\n"), 1):
        line = raw.strip() if not pending else raw.rstrip()
        if line.lstrip()[:1] in ("#", ";"):
            continue  # also between the lines of one value
        if not pending:
            start = number
        if line.endswith("\\"):
            pending += line[:-1] + " "
            continue
        line = (pending + line).strip()
        pending = ""
        if not line:
            continue
        if line.startswith("[") and line.endswith("]"):
            section = line[1:-1]
            continue
        key, equals, value = line.partition("=")
        if not equals or not section:
            raise FormatError(Place(path, start), f"{line[:60]!r} is neither [SECTION] nor KEY=VALUE")
        found.append((section, key.strip(), value.strip(), Place(path, start)))
    if pending.strip():
        key, equals, value = pending.partition("=")
        if not equals or not section:
            raise FormatError(Place(path, start), f"{pending[:60]!r} is neither [SECTION] nor KEY=VALUE")
        found.append((section, key.strip(), value.strip(), Place(path, start)))
    return found


_CONTROL = {"a": "\a", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "v": "\v", "s": " "}
_ESCAPE = re.compile(
    r"\\(?:(x[0-9A-Fa-f]{2})|([0-3][0-7]{2})|u([0-9A-Fa-f]{4})|U([0-9A-Fa-f]{8})|([abfnrtvs\\\"';]))", re.S
)


def unescape(text: str) -> str:
    """C escapes; a backslash before anything else stays."""

    def one(match: re.Match[str]) -> str:
        hexadecimal, octal, short, long, char = match.groups()
        if char is not None:
            return _CONTROL.get(char, char)
        if octal is not None:
            return chr(int(octal, 8))
        number = int(hexadecimal[1:] if hexadecimal else short or long, 16)
        return chr(number) if 0 < number < 0x110000 and not 0xD800 <= number < 0xE000 else match[0]

    return _ESCAPE.sub(one, text)


_WORD = re.compile(
    r"""(?P<blank>\s+) | "(?P<double>(?:[^"\\]|\\.)*)" | '(?P<single>(?:[^'\\]|\\.)*)'
        | (?P<plain>(?:[^\s"'\\]|\\.?)+)""",
    re.X | re.S,
)


def split(text: str, place: Place) -> list[str]:
    """The words of a value: blanks part them, quotes hold them together, C escapes are replaced."""
    found: list[str] = []
    inside = False
    at = 0
    while at < len(text):
        match = _WORD.match(text, at)
        if match is None:
            raise FormatError(place, f"no closing quotation mark in {text[:60]!r}")
        at = match.end()
        if match.lastgroup == "blank":
            inside = False
            continue
        part = unescape(match[str(match.lastgroup)])
        if inside:
            found[-1] += part
        else:
            found.append(part)
        inside = True
    return found


def split_commands(text: str, place: Place) -> list[str]:
    """Several commands in one line are parted by a `;` that is a word of its own."""
    parts, start, at = [], 0, 0
    while at < len(text):
        match = _WORD.match(text, at)
        if match is None:
            raise FormatError(place, f"no closing quotation mark in {text[:60]!r}")
        if (
            match[0] == ";"
            and (at == 0 or text[at - 1].isspace())
            and (not text[match.end() :] or text[match.end()].isspace())
        ):
            parts.append(text[start:at])
            start = match.end()
        at = match.end()
    return [part for part in [*parts, text[start:]] if part.strip()]


_UNITS = {
    "usec": 1e-6, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "msec": 1e-3, "ms": 1e-3, "seconds": 1, "second": 1, "sec": 1,
    "s": 1, "minutes": 60, "minute": 60, "min": 60, "m": 60, "hours": 3600, "hour": 3600, "hr": 3600, "h": 3600,
    "days": 86400, "day": 86400, "d": 86400, "weeks": 604800, "week": 604800, "w": 604800, "": 1,
}  # fmt: skip


def seconds(text: str) -> float | None:
    """ "5min 20s" -> 320.0; None for "infinity". ValueError for what is no time span, systemd.time(7)."""
    if text.strip().lower() == "infinity":
        return None
    total, at = 0.0, 0
    pattern = re.compile(r"\s*([0-9]{1,12}(?:\.[0-9]{1,6})?)\s*([a-zµμ]*)", re.I)
    while text[at:].strip():
        match = pattern.match(text, at)
        if match is None or match[2].lower() not in _UNITS:
            raise ValueError(f"{text!r} is no time span")
        total += float(match[1]) * _UNITS[match[2].lower()]
        at = match.end()
    if not text.strip() or total > 10 * 365 * 86400:
        raise ValueError(f"{text!r} is no time span")
    return total


def size(text: str) -> int | None:
    """Bytes of "64M"; None for "infinity". ValueError for anything else."""
    if text.strip().lower() == "infinity":
        return None
    match = re.fullmatch(r"\s*([0-9]{1,18})\s*([KMGTPE]?)B?\s*", text, re.A)
    if match is None:
        raise ValueError(f"{text!r} is no size")
    number = int(match[1]) << (10 * " KMGTPE".index(match[2] or " "))
    if number >= 1 << 63:
        raise ValueError(f"{text!r} is too large")
    return number


def quote(text: str) -> str:
    """One word as split() reads it back, specifiers and variables kept literal."""
    safe = text.replace("%", "%%")
    if re.fullmatch(r"[A-Za-z0-9_@%+=:,./-]+", safe, re.A):
        return safe
    escaped = safe.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("\t", "\\t")
    escaped = "".join(
        c if c.isprintable() else f"\\x{ord(c):02x}" if ord(c) < 128 else f"\\U{ord(c):08x}" for c in escaped
    )
    return f'"{escaped}"'
