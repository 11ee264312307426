"""What superctl prints: tables that fit the terminal, records, JSON; nothing of it steers a terminal."""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:  # importing typing takes 3 ms
    import argparse
    from collections.abc import Iterable, Iterator, Sequence
    from typing import Any

    from superd.core.records import Record

    Row = dict[str, Any]

_TEXT_MIN = 12  # a column of text is not made narrower than this
_NOTE_MIN = 24  # a note that would get less room than this gets a line of its own


def is_terminal() -> bool:
    return sys.stdout.isatty()


def colours() -> bool:
    return is_terminal() and not os.environ.get("NO_COLOR") and os.environ.get("TERM", "dumb") != "dumb"


_GREEN, _YELLOW, _RED, _DIM = "32", "33", "31", "2"
STATE_COLOURS = {
    "ready": _GREEN, "listening": _GREEN, "idle": _GREEN, "done": _GREEN, "failed": _RED, "bad config": _RED,
    "backoff": _YELLOW, "starting": _YELLOW, "stopping": _YELLOW, "stopped": _DIM, "disabled": _DIM,
}  # fmt: skip


def paint(text: str, colour: str | None) -> str:
    return f"\x1b[{colour}m{text}\x1b[0m" if colour and colours() else text


def clean(text: object) -> str:
    """What others wrote, without anything that steers a terminal (J11). One line."""
    plain = str(text)
    if plain.isprintable():
        return plain
    from superd.core.records import escape

    return escape(plain).replace("\t", " ")


def age(seconds: float) -> str:
    whole = int(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"


def terminal_columns() -> int | None:
    """The width of the terminal; None: there is none, and nothing is cut."""
    if not is_terminal():
        return None
    try:
        return max(os.get_terminal_size(sys.stdout.fileno()).columns, 40)
    except (OSError, ValueError):
        return 80


def cut(text: str, width: int | None) -> str:
    return text if width is None or len(text) <= width else text[: max(width - 1, 0)] + "…"


def _shorten(text: str, width: int) -> str:
    """Without its middle: of names and addresses the end tells more than the middle."""
    return text if len(text) <= width else f"{text[: width - width // 2 - 1]}…{text[len(text) - width // 2 :]}"


def _squeeze(widths: list[int], numbers: set[int], cells: Sequence[Sequence[str]], room: int) -> None:
    """Make columns narrower until all have room: of numbers first what only their head needs, then the widest text."""
    for at in sorted(numbers, key=lambda at: -widths[at]):
        needed = max(4, *(len(row[at]) for row in cells))
        widths[at] -= min(max(sum(widths) - room, 0), max(widths[at] - needed, 0))
    texts = [at for at in range(len(widths)) if at not in numbers]
    while sum(widths) > room:
        at = max(texts, key=lambda at: widths[at])
        if widths[at] <= _TEXT_MIN:
            return
        widths[at] -= 1


def table(head: Sequence[str], rows: Iterable[Sequence[str]], right: Sequence[str] = ()) -> Iterator[str]:
    """Lines of columns. The last column is for prose: cut at the terminal's width, and below its row when there is
    little room beside it."""
    columns = terminal_columns()
    cells = [[clean(cell) for cell in row] for row in rows]
    if not any(row[-1] for row in cells):
        head, cells = head[:-1], [row[:-1] for row in cells]
        prose = False
    else:
        prose = True
    fixed = len(head) - prose
    widths = [max(len(head[at]), *(len(row[at]) for row in cells), 0) for at in range(fixed)]
    numbers = {at for at, name in enumerate(head) if name in right}
    if columns is not None:
        _squeeze(widths, numbers, cells, columns - 2 * (fixed - 1))
        cells = [[*map(_shorten, row, widths), *row[fixed:]] for row in cells]
        head = [*map(cut, head, widths), *head[fixed:]]
    room = None if columns is None else columns - sum(widths) - 2 * fixed
    below = prose and room is not None and room < _NOTE_MIN and any(len(row[-1]) > room for row in cells)

    def line(row: Sequence[str], *, colour: bool) -> str:
        parts = [
            cell.rjust(width) if at in numbers else cell.ljust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=False))
        ]
        if prose and not below:
            parts.append(cut(row[-1], room))
        text = cut("  ".join(parts).rstrip(), columns)
        if colour and "state" in head:
            at = list(head).index("state")
            start = sum(widths[:at]) + 2 * at
            word = text[start : start + len(row[at])]
            text = text[:start] + paint(word, STATE_COLOURS.get(word)) + text[start + len(word) :]
        return text

    yield paint(line([*head[:-1], ""] if below else head, colour=False), _DIM)
    for row in cells:
        yield line(row, colour=True)
        if below and row[-1]:
            yield cut(f"    {row[-1]}", columns)


def say(options: argparse.Namespace, lines: Iterable[str]) -> None:
    if not options.quiet:
        for line in lines:
            print(line)


def print_json(options: argparse.Namespace, value: Any) -> bool:
    """Print it as JSON if that is wanted."""
    if options.json and not options.quiet:
        import json

        print(json.dumps(value, indent=2))
    return bool(options.json)


def complain(text: str) -> None:
    print(f"superctl: {clean(text)}", file=sys.stderr)


def to_record(row: Row) -> Record:
    from superd.core.records import Record

    return Record(
        row["number"], row["time"], row["level"], row["service"], row["event"], row["connection"], row["pid"],
        row["peer"], row["message"], row["fields"],
    )  # fmt: skip


def print_records(options: argparse.Namespace, rows: Iterable[Row]) -> None:
    from superd.core import records

    style = records.format_json if options.json else records.format_text_colour if colours() else records.format_text
    for row in rows:
        print(style(*to_record(row)[1:]))
    sys.stdout.flush()  # a line that happened is a line that can be read
