"""What is wrong in the configuration, and how it is shown.

Four styles: "full" is rustc's, for people; "short" is one `FILE:LINE:COL: error: …` a line, for editors; "json" is
one object a line with the fields of Problem; "github" is GitHub's workflow commands, which annotate a change.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Literal

Style = Literal["full", "short", "json", "github"]
Severity = Literal["error", "warning"]

SHOWN = 120  # columns of a source line; a longer one is cut around the place


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong.

    code         stable word for `superctl explain`, "unknown-key"
    message      what is wrong, complete without the rest
    path         the file, as it was named
    line, column from 1, in characters; 0: the file as a whole
    width        characters that are meant, from column on
    source_line  the line's text, "" when line is 0
    label        the fix, or what is there instead; stands beside the carets, "" if message says all
    severity     only errors make a service "bad config"
    service      whose problem it is; None: superd's own
    """

    code: str
    message: str
    path: str
    line: int = 0
    column: int = 0
    width: int = 0
    source_line: str = ""
    label: str = ""
    severity: Severity = "error"
    service: str | None = None

    @property
    def is_error(self) -> bool:
        return self.severity == "error"

    def __str__(self) -> str:
        return _short(self)


def format_problems(problems: Iterable[Problem], style: Style = "full") -> str:
    """All of them in that style, each ended by a newline; "" for none."""
    render = {"full": _full, "short": _short, "json": _json, "github": _github}[style]
    return "".join(f"{render(problem)}\n" for problem in problems)


def printable(text: str) -> str:
    """`text` in one line that a terminal shows as it is: no control characters, no lone surrogates."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def _full(problem: Problem) -> str:
    lines = [f"{problem.severity}[{problem.code}]: {printable(problem.message)}"]
    if not problem.line:
        lines.append(f" --> {printable(problem.path)}")
        if problem.label:
            lines.append(f"  = {printable(problem.label)}")
        return "\n".join(lines) + "\n"
    source, start, width = _window(problem)
    margin = " " * len(str(problem.line))
    carets = " " * start + "^" * width + (f" {printable(problem.label)}" if problem.label else "")
    lines.append(f"{margin}--> {printable(problem.path)}:{problem.line}:{problem.column}")
    lines += [f"{margin} |", f"{problem.line} | {source}", f"{margin} | {carets}"]
    return "\n".join(lines) + "\n"


def _window(problem: Problem) -> tuple[str, int, int]:
    """The source line as shown, where the carets begin in it, and how many there are."""
    before = problem.source_line[: problem.column - 1]
    meant = problem.source_line[problem.column - 1 : problem.column - 1 + problem.width]
    after = problem.source_line[problem.column - 1 + problem.width :]
    if len(problem.source_line) > SHOWN:
        before = f"…{before[-39:]}" if len(before) > 40 else before
        meant = f"{meant[:59]}…" if len(meant) > 60 else meant
        after = f"{after[:19]}…" if len(after) > 20 else after
    before, meant, after = (printable(part.replace("\t", "    ")) for part in (before, meant, after))
    return before + meant + after, _columns(before), max(1, _columns(meant))


def _columns(text: str) -> int:
    """Terminal columns: two for East Asian wide characters, none for combining ones."""
    if text.isascii():
        return len(text)
    from unicodedata import combining, east_asian_width

    return sum(0 if combining(char) else 2 if east_asian_width(char) in "WF" else 1 for char in text)


def _where(problem: Problem) -> str:
    return f"{problem.path}:{problem.line}:{problem.column}" if problem.line else problem.path


def _said(problem: Problem) -> str:
    return f"{problem.message}: {problem.label}" if problem.label else problem.message


def _short(problem: Problem) -> str:
    return printable(f"{_where(problem)}: {problem.severity}: {_said(problem)}")


def _json(problem: Problem) -> str:
    return json.dumps(asdict(problem))


def _github(problem: Problem) -> str:
    """https://docs.github.com/actions/reference/workflow-commands-for-github-actions, setting an error message."""

    def escape(text: str) -> str:
        return printable(text).replace("%", "%25").replace(":", "%3A").replace(",", "%2C")

    place = f"file={escape(problem.path)}"
    if problem.line:
        place += f",line={problem.line},col={problem.column},endColumn={problem.column + max(1, problem.width)}"
    text = printable(_said(problem)).replace("%", "%25")
    return f"::{problem.severity} {place},title={escape(problem.code)}::{text}"
