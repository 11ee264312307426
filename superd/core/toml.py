"""Values -> TOML that reads well and parses to the same values. Strings, numbers, bools, lists and tables of them;
a value, a key, a document."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

_WIDTH = 100  # columns of a list on one line
_ESCAPES = {"\b": "\\b", "\t": "\\t", "\n": "\\n", "\f": "\\f", "\r": "\\r", '"': '\\"', "\\": "\\\\"}


def format_value(value: Any) -> str:
    """`value` as it stands after the equals sign: on one line, but for long lists and strings of several lines."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str):
        return _string(value)
    if isinstance(value, Mapping):
        inner = ", ".join(f"{format_key(name)} = {_on_one_line(item)}" for name, item in value.items())
        return f"{{ {inner} }}" if inner else "{}"
    items = [format_value(item) for item in value]
    line = f"[{', '.join(items)}]"
    if len(line) <= _WIDTH or len(items) < 2 or any("\n" in item for item in items):
        return line
    return "[\n" + "".join(f"    {item},\n" for item in items) + "]"


def format_key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name, re.A) else _basic(name)


def _on_one_line(value: Any) -> str:
    """Inside an inline table, where TOML 1.0 allows no line end."""
    if isinstance(value, str):
        return _basic(value)
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_on_one_line, value))}]"
    return format_value(value)


def _string(text: str) -> str:
    several = "\n" in text.rstrip("\n") and "'''" not in text and not text.endswith("'")
    if several and all(char.isprintable() or char in "\n\t" for char in text):
        return f"'''\n{text}'''"
    return _basic(text)


def _basic(text: str) -> str:
    return '"' + "".join(map(_escape, text)) + '"'


def _escape(char: str) -> str:
    if char in _ESCAPES:
        return _ESCAPES[char]
    if "\ud800" <= char <= "\udfff":
        return "?"  # half a character, which TOML has no way to write
    if char.isprintable():
        return char
    return f"\\u{ord(char):04x}" if ord(char) < 0x10000 else f"\\U{ord(char):08x}"


def format_pair(key: str, value: Any) -> str:
    return f"{format_key(key)} = {format_value(value)}"


def format_comment(text: str) -> str:
    """`text` as lines that begin with `#`; what a comment may not contain is shown as its escape."""
    lines = []
    for line in text.split("\n"):
        safe = "".join(c if c.isprintable() or c == "\t" else c.encode("unicode_escape").decode() for c in line)
        lines.append(f"# {safe}".rstrip())
    return "\n".join(lines)


def format_document(table: Mapping[str, Any], *, header: Iterable[str] = ()) -> str:
    """A whole file: comments, the pairs of the top level, then its tables and lists of tables.

    A dict becomes a [table], a list of dicts [[tables]]; dicts below these are written in line.
    """
    plain = [(k, v) for k, v in table.items() if not isinstance(v, dict) and not _is_tables(v)]
    blocks = ["\n".join(map(format_comment, header)), "\n".join(format_pair(*pair) for pair in plain)]
    for key, value in table.items():
        for item in value if _is_tables(value) else [value] if isinstance(value, dict) else []:
            head = f"[[{format_key(key)}]]" if _is_tables(value) else f"[{format_key(key)}]"
            blocks.append("\n".join([head, *(format_pair(*pair) for pair in item.items())]))
    return "\n\n".join(filter(None, blocks)) + "\n"


def _is_tables(value: Any) -> bool:
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(item, dict) for item in value)
