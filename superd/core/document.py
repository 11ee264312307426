"""One TOML file: its bytes -> a tree of plain values, and where in the text each of them stands.

tomli gives positions of syntax errors only. For values the text, already known to be good, is walked once, and only
when there is a problem to report. The hard limits are checked before parsing, on the text alone: tomli recurses for
each bracket, and dotted keys cost it quadratic time (FAILURES F14).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from superd.core.problems import Problem, Severity
from superd.core.values import quote

MAX_BYTES = 1 << 20
MAX_DEPTH = 16
MAX_KEYS = 1000
MAX_PLACES = 1 << 18  # characters; in a longer file problems have no line, because to find it would take seconds

Path = tuple["str | int", ...]
Loads = Callable[[str], dict[str, Any]]  # tomli.loads

# Every quote begins a match, closed or not: to try each anew where none closes would take quadratic time. No possessive
# groups with alternatives: Python before 3.11.5 matches those wrongly (CPython gh-106052).
_STRING = (
    r'"""(?:[^"\\]++|\\.?|"{1,2}(?!"))*(?:"{3,5}|\Z)' r"|'''(?:[^']++|'{1,2}(?!'))*(?:'{3,5}|\Z)"
    r'|"(?:[^"\\\n]++|\\.?)*(?:"|\Z|(?=\n))' r"|'[^'\n]*+(?:'|\Z|(?=\n))"
)  # fmt: skip
_STRUCTURE = re.compile(rf"(?P<string>{_STRING})|#[^\n]*|(?P<mark>[][{{}}=.\n])", re.S)
_TOKEN = re.compile(
    rf"(?P<string>{_STRING})|(?P<skip>[ \t]+|#[^\n]*)|(?P<mark>[][{{}}=.,\n])|(?P<bare>[^][{{}}=.,\n\s#]+)", re.S
)
_WHERE = re.compile(r" \(at (?:line ([0-9]+), column ([0-9]+)|end of document)\)$")
_KEY_OF_LINE = re.compile(r"\s*(?:\[+\s*([^]\n]*?)\s*\]|([^=\n]*?)\s*=)")


class Document:
    """A parsed file. `tree` is None when `problems` says why there is none."""

    def __init__(self, path: str, data: bytes, loads: Loads, *, service: str | None = None) -> None:
        self.path = path
        self.service = service
        self._loads = loads
        self.text = ""
        self.tree: dict[str, Any] | None = None
        self.problems: list[Problem] = []
        self._places: dict[Path, tuple[int, int, int, int]] | None = None
        if (text := self._decode(data)) is not None:
            self.text = text
            if too_much := _too_much(text):
                offset, why = too_much
                self._fail("limit", f"{why}: refused before parsing", offset, offset + 1)
            else:
                self._parse(text)

    def _decode(self, data: bytes) -> str | None:
        """The text, its line ends as \\n; None after adding a problem that names the byte."""
        why = ""
        if len(data) > MAX_BYTES:
            why = f"file has {len(data)} bytes, and {MAX_BYTES} are allowed"
        elif data.startswith(b"\xef\xbb\xbf"):
            why = "file has a byte order mark at byte 0: save it as UTF-8 without BOM"
        elif data.startswith((b"\xff\xfe", b"\xfe\xff")):
            why = "file is UTF-16 (byte order mark at byte 0): save it as UTF-8"
        elif (at := data.find(b"\0")) >= 0:
            why = f"file has a NUL at byte {at}: TOML is text in UTF-8"
        elif match := re.search(rb"\r(?!\n)", data):
            why = f"file has a bare carriage return at byte {match.start()}: end lines with LF or CRLF"
        else:
            try:
                return data.decode().replace("\r\n", "\n")
            except UnicodeDecodeError as error:
                why = f"file is not UTF-8 at byte {error.start} (0x{data[error.start]:02x})"
        code = "encoding" if len(data) <= MAX_BYTES else "limit"
        self.problems.append(Problem(code, why, self.path, service=self.service))
        return None

    def _parse(self, text: str) -> None:
        try:
            self.tree = self._loads(text)
        except (ValueError, RecursionError, OverflowError) as error:  # digits, dates: not all is a TOMLDecodeError
            self._syntax(str(error))

    def _syntax(self, message: str) -> None:
        match = _WHERE.search(message)
        what = message[: match.start()] if match else message
        what = what[:1].lower() + what[1:]
        if match and match[1]:
            lines = self.text.split("\n")
            line, column = int(match[1]), int(match[2])
            start = sum(len(text) + 1 for text in lines[: line - 1]) + column - 1
        else:
            start = len(self.text.rstrip()) if match else 0
        if "overwrite" in what or "twice" in what or "immutable" in what:
            return self._twice(self.text.rfind("\n", 0, start) + 1)
        if what == r"illegal character '\n'":
            what = "unterminated string"
        self._fail("syntax", f"cannot parse: {what}", start, start + 1)

    def _twice(self, line_start: int) -> None:
        """A key or table that is there already. tomli tells where its value ends; the key is what counts."""
        match = _KEY_OF_LINE.match(self.text, line_start)
        key, start, end = "key", line_start, line_start + 1
        if match:
            group = 1 if match[1] is not None else 2
            key, start, end = match[group], *match.span(group)
        self._fail("duplicate-key", f"`{key}` is there twice, or is a value already", start, end)

    def _fail(self, code: str, message: str, start: int, end: int) -> None:
        self.problems.append(self._problem(code, message, start, end, "", "error", self.service))

    def problem(
        self, path: Path, code: str, message: str, label: str = "", *, key: bool = False,
        severity: Severity = "error", service: str | None = None,
    ) -> Problem:  # fmt: skip
        """A problem of the value at `path`, or of its key; of what is nearest above it if it is not in this file."""
        if self._places is None:
            self._places = dict(_places(self.text, self._loads)) if len(self.text) < MAX_PLACES else {}
        while path and path not in self._places:
            path = path[:-1]
        if not path:
            return Problem(code, message, self.path, label=label, severity=severity, service=service)
        place = self._places[path]
        start, end = place[:2] if key else place[2:]
        return self._problem(code, message, start, end, label, severity, service)

    def _problem(
        self, code: str, message: str, start: int, end: int, label: str, severity: Severity, service: str | None
    ) -> Problem:
        line_start = self.text.rfind("\n", 0, start) + 1
        line_end = self.text.find("\n", start)
        line_end = len(self.text) if line_end < 0 else line_end
        line = self.text.count("\n", 0, start) + 1
        width = max(1, min(end, line_end) - start)
        source = self.text[line_start:line_end]
        return Problem(code, message, self.path, line, start - line_start + 1, width, source, label, severity, service)


@dataclass(slots=True)
class Origin:
    """Which file a merged value comes from, and where it stands there."""

    document: Document
    path: Path
    is_default: bool


class Merged:
    """Trees laid over each other: tables deeply, everything else replaced."""

    def __init__(self, document: Document) -> None:
        self.main = document
        self.tree: dict[str, Any] = {}
        self.origins: dict[Path, Origin] = {}

    def lay(self, document: Document, tree: dict[str, Any], below: Path = (), *, is_default: bool = False) -> None:
        self._lay(document, tree, self.tree, (), below, is_default)

    def _lay(
        self, document: Document, over: dict[str, Any], under: dict[str, Any], path: Path, below: Path, default: bool
    ) -> None:
        for key, value in over.items():
            here = (*path, key)
            if not isinstance(value, dict):
                under[key] = value
                self.origins[here] = Origin(document, below + here, default)
                continue
            if not isinstance(under.get(key), dict):
                under[key] = {}
                self.origins[here] = Origin(document, below + here, default)
            self._lay(document, value, under[key], here, below, default)

    def origin(self, path: Path) -> Origin:
        """Of the value at `path`, an element of a list too; the main file's if it is in none."""
        for length in range(len(path), 0, -1):
            if found := self.origins.get(path[:length]):
                return replace(found, path=found.path + path[length:])
        return Origin(self.main, path, False)


def _too_much(text: str) -> tuple[int, str] | None:
    """(offset, what) where the text exceeds a limit. It may be no TOML at all: this only counts marks."""
    keys = opened = dots = table = last = 0
    begins = True  # a line of its own begins here
    header = False
    for match in _STRUCTURE.finditer(text):
        mark = match["mark"]
        if mark in ("[", "{"):
            header = header or (mark == "[" and begins and opened == 0)
            table = 0 if header else table
            opened += 1
        elif mark in ("]", "}"):
            opened = max(0, opened - 1)
            if header and opened == 0:
                header, table, dots = False, dots + 1, 0
        elif mark == ".":
            # The points of floats in a list are not those of one key.
            dots = 1 if "," in text[last : match.start()] else dots + 1
            last = match.start()
        elif mark == "=":
            keys += 1
            dots = 0 if opened else dots
        elif mark == "\n":
            dots = 0
            if header:  # a header ends with its line; this is no TOML
                header, opened = False, 0
        begins = mark == "\n" and opened == 0
        if table + opened + dots > MAX_DEPTH:
            return match.start(), f"more than {MAX_DEPTH} levels of nesting"
        if keys > MAX_KEYS:
            return match.start(), f"more than {MAX_KEYS} keys"
    return None


def _places(text: str, loads: Loads) -> Iterator[tuple[Path, tuple[int, int, int, int]]]:
    """(path, (key start, key end, value start, value end)) of everything in a text that tomli has parsed.

    A table has the span of its header or first dotted key for both. Depth is at most MAX_DEPTH.
    """
    tokens = [m for m in _TOKEN.finditer(text) if m.lastgroup != "skip"]
    table: Path = ()
    counts: dict[Path, int] = {}
    arrays: set[Path] = set()
    at = 0

    def keys() -> tuple[list[str], int, int]:
        """A dotted key from `at` on; leaves `at` after it."""
        nonlocal at
        parts = []
        start = tokens[at].start()
        end = start
        while tokens[at].lastgroup in ("string", "bare"):
            parts.append(_unquote(tokens[at][0], loads))
            end = tokens[at].end()
            at += 1
            if tokens[at][0] != ".":
                break
            at += 1
        return parts, start, end

    def inner(path: Path) -> Path:
        """`path` with the number of the last element after each array of tables."""
        found: Path = ()
        for part in path:
            found += (part,)
            if found in arrays:
                found += (counts[found] - 1,)
        return found

    def value(path: Path) -> Iterator[tuple[Path, tuple[int, int, int, int]]]:
        """What stands at `at`; leaves `at` after it. The key's own span is the caller's business."""
        nonlocal at
        start = tokens[at].start()
        if tokens[at][0] == "[":
            at += 1
            number = 0
            while tokens[at][0] != "]":
                if tokens[at][0] in ("\n", ","):
                    at += 1
                    continue
                begin = tokens[at].start()
                yield from value((*path, number))
                yield (*path, number), (begin, tokens[at - 1].end()) * 2
                number += 1
            at += 1
        elif tokens[at][0] == "{":
            at += 1
            while tokens[at][0] != "}":
                if tokens[at][0] in ("\n", ","):
                    at += 1
                    continue
                yield from pair(path)
            at += 1
        else:  # a scalar: dates and floats are several tokens
            while at < len(tokens) and tokens[at][0] not in (",", "]", "}", "\n"):
                at += 1
        yield path, (start, tokens[at - 1].end()) * 2

    def pair(below: Path) -> Iterator[tuple[Path, tuple[int, int, int, int]]]:
        nonlocal at
        parts, start, end = keys()
        at += 1  # =
        begin = tokens[at].start()
        path = (*below, *parts)
        for length in range(len(below) + 1, len(path)):
            yield path[:length], (start, end, start, end)
        yield from value(path)
        yield path, (start, end, begin, tokens[at - 1].end())

    try:
        while at < len(tokens):
            if tokens[at][0] == "\n":
                at += 1
            elif tokens[at][0] == "[":
                double = tokens[at + 1][0] == "[" and tokens[at + 1].start() == tokens[at].end()
                at += 2 if double else 1
                parts, start, end = keys()
                at += 2 if double else 1
                table = (*inner(tuple(parts[:-1])), parts[-1])
                if double:
                    arrays.add(table)
                    counts[table] = counts.get(table, 0) + 1
                    table += (counts[table] - 1,)
                for length in range(1, len(table) + 1):
                    if table[:length] not in arrays or counts[table[:length]] == 1:
                        yield table[:length], (start, end, start, end)
            else:
                yield from pair(table)
    except IndexError:  # the walk and tomli disagree: the rest has no positions, and that is all the harm
        return


def _unquote(token: str, loads: Loads) -> str:
    if token[0] not in "'\"":
        return token
    return str(loads(f"k = {token}")["k"]) if "\\" in token else token[1:-1]


def key_text(path: Path) -> str:
    """ "limits.rate", "socket[1].mode" of a path: how a message names a key."""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        elif re.fullmatch(r"[A-Za-z0-9_-]+", part, re.A):
            text += f".{part}" if text else part
        else:
            text += f".{quote(part)}" if text else quote(part)
    return text
