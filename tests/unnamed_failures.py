"""Ids of FAILURES.md that no test names, one a line with the first words of their row.

    python tests/unnamed_failures.py [PATH OF FAILURES.md]

A test names an id in a comment, `# A11`. Not every row applies to superd: that is for people to judge.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parent
DEFAULT = TESTS.parent.parent / "shared" / "FAILURES.md"


def rows(text: str) -> dict[str, str]:
    """id -> what happened, of every table whose first column is an id."""
    return dict(re.findall(r"^\| ([A-P]\d+|X\d+) \| ([^|]*)", text, re.M))


def named() -> set[str]:
    comments = (line.partition("#")[2] for path in TESTS.rglob("*.py") for line in path.read_text().splitlines())
    return {name for comment in comments for name in re.findall(r"\b([A-P]\d+|X\d+)\b", comment)}


def main() -> int:
    source = Path(sys.argv[1]) if len(sys.argv) > 1 else DEFAULT
    known, seen = rows(source.read_text()), named()
    missing = [name for name in known if name not in seen]
    for name in missing:
        print(f"{name:4} {known[name].strip()[:110]}")
    print(f"{len(known) - len(missing)} of {len(known)} are named", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
