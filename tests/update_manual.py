"""What superd(8) shows of core/lifecycle.py, made from its table. `make man` writes it there."""

from __future__ import annotations

from pathlib import Path

from superd.core import lifecycle

PAGE = Path(__file__).resolve().parent.parent / "man" / "superd.8"
BEGIN = '.\\" What follows is made by `make man`.\n'
END = '.\\" End of what is made.\n'
COLUMNS = 78 - 6  # of a terminal, less the indentation


def drawing() -> str:
    """An mdoc display: rows `state  --what happens-->  next state`, grouped by state."""
    rows = lifecycle.describe()
    width = max(len(state) for state, _, _ in rows)
    lines = []
    last = ""
    for state, events, then in rows:
        if last and state != last:
            lines.append("")
        first = (state if state != last else "").ljust(width)
        last = state
        *before, end = wrap(events.split(", "), COLUMNS - width - len(f" ----> {then}"))
        for line in before:
            lines.append(f"{first} --{line},")
            first = " " * width
        lines.append(f"{first} --{end}--> {then}")
    text = "\n".join(lines).replace("-", "\\-")
    return f"{BEGIN}.Bd -literal -compact\n{text}\n.Ed\n{END}"


def wrap(words: list[str], width: int) -> list[str]:
    lines = [words[0]]
    for word in words[1:]:
        if len(lines[-1]) + 2 + len(word) <= width:
            lines[-1] += f", {word}"
        else:
            lines.append(word)
    return lines


def updated(page: str) -> str:
    before, rest = page.split(BEGIN)
    return before + drawing() + rest.split(END)[1]


if __name__ == "__main__":
    PAGE.write_text(updated(PAGE.read_text()))
