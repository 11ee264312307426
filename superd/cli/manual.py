"""The key sections of superd.toml(5), from the table of keys: `python -m superd.cli.manual man/superd.toml.5`.

Rewrites what stands between the two marks of the file; `make man` calls it, and a test fails when they differ.
"""

from __future__ import annotations

import json
import re
import sys
from textwrap import wrap

from superd.core.key_texts import HEADINGS, TEXTS
from superd.core.keys import BY_TABLE, KEYS, Key

BEGIN = '.\\" Generated from superd/core/keys.py and key_texts.py by `make man`, down to the next such line.\n'
END = '.\\" Not generated from here on.\n'

_NAMES = {key.name for key in KEYS}
_PUNCTUATION = ".,;:)"
# What is marked, with the punctuation that touches it; a page of the manual is what looks like one.
_MARKED = re.compile(
    r"(?P<open>\(?)(?:`(?P<literal>[^`]+)`|(?P<value>\"[^\"]*\")|(?P<page>\b[a-z_][a-z0-9_.-]*\([1-8]\)))"
    r"(?P<close>[.,;:)]*)"
)
_SENTENCE = re.compile(r"(?<=[.;:]) +(?=[A-Z`\"0-9])|(?<=\.) +(?=[a-z])")


def key_sections() -> str:
    """The part between the marks."""
    lines = [".Sh SERVICE"]
    for table, (heading, intro) in HEADINGS.items():
        if table == "superd":
            lines.append(".Sh DAEMON")
        lines += [f".Ss {heading}", *mdoc(intro), ".Bl -tag -width Ds"]
        for names, text in TEXTS[table]:
            items = (_item(BY_TABLE[table][name]) for name in names.split())
            lines += [f".It {' , '.join(items)}", *mdoc(text)]
        lines.append(".El")
    lines += [".Ss The [defaults] table", *mdoc(
        "Any key or table of a service, for all services that do not say otherwise. A key that means nothing to a kind "
        "of service is passed over there."
    )]  # fmt: skip
    return "\n".join(lines) + "\n"


def rewritten(page: str) -> str:
    """The page with the part between the marks made anew. Raises ValueError if they are not there."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError("the two marks are not in the page")
    return before + BEGIN + key_sections() + END + after


def _item(key: Key) -> str:
    if key.default is None:
        default = '"off"' if key.off else ""
    else:
        default = "" if key.default == {} or key.name == "listen" else json.dumps(key.default)
    return f"Ic {key.name}" + (f" No = {_escape(default)}" if default else "")


def mdoc(text: str) -> list[str]:
    """Lines of mdoc(7)."""
    lines: list[str] = []
    in_list = False
    for number, paragraph in enumerate(text.split("\n")):
        if item := re.fullmatch(r'\* ("[^"]*"): (.*)', paragraph):
            lines += [] if in_list else [".Bl -tag -width Ds"]
            lines += [f".It Li {_escape(item[1])}", *_paragraph(item[2])]
        else:
            lines += [".El"] if in_list else []
            lines += [".Pp"] if number else []
            lines += _paragraph(paragraph)
        in_list = item is not None
    return [*lines, ".El"] if in_list else lines


def _paragraph(text: str) -> list[str]:
    """Each sentence on lines of its own."""
    lines: list[str] = []
    for sentence in _SENTENCE.split(text):
        at = 0
        for match in _MARKED.finditer(sentence):
            lines += _plain(sentence[at : match.start()])
            lines.append(_macro(match))
            at = match.end()
        lines += _plain(sentence[at:])
    return lines


def _plain(text: str) -> list[str]:
    return ["\\&" + line if line[0] in ".'" else line for line in wrap(text.strip().replace("\\", "\\e"), 78)]


def _macro(match: re.Match[str]) -> str:
    literal, value, page = match["literal"], match["value"], match["page"]
    if page is not None:
        words = f"Xr {page[:-3]} {page[-2]}"
    elif value is not None:
        words = f"Li {_escape(value)}"
    else:
        words = f"{_kind(literal)} {_escape(literal)}"
    close = match["close"]
    if match["open"] and close.startswith(")"):
        words, close = f"Pq {words}", close[1:]
    elif match["open"]:
        words = f"Pq {words}"
    return "." + " ".join([words, *close])


def _kind(literal: str) -> str:
    """The macro for what stands in backquotes."""
    if literal in _NAMES or literal.startswith(("[[", "superctl ")) or literal.strip("[]") in _NAMES:
        return "Ic"
    if literal.startswith(("/", "~")) or literal.endswith((".toml", ".d")):
        return "Pa"
    if re.fullmatch(r"(SO|TCP|IP|IPV6|RLIMIT)_[A-Z0-9_]+|SIG[A-Z]+", literal):
        return "Dv"
    return "Ev" if re.fullmatch(r"PATH|[A-Z][A-Z0-9]*(_[A-Z0-9]*)+\*?|[A-Z]+\*", literal) else "Li"


def _escape(text: str) -> str:
    """As arguments of a macro."""
    text = text.replace("\\", "\\e").replace('"', "\\(dq")
    return " ".join(f"\\&{word}" if word in tuple(_PUNCTUATION) else word for word in text.split(" "))


def main(paths: list[str]) -> int:
    for path in paths:
        with open(path, encoding="utf-8") as file:
            page = file.read()
        if (fresh := rewritten(page)) != page:
            with open(path, "w", encoding="utf-8") as file:
                file.write(fresh)
            print(f"{path}: key sections made anew")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
