"""The examples of README.md and superd-migrate(7) are what superctl import says and writes."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

from importers.material import bring

ROOT = Path(__file__).resolve().parents[2]


def test_readme() -> None:
    text = (ROOT / "README.md").read_text().partition("## Coming from inetd")[2].partition("\n## ")[0]
    block = textwrap.dedent("\n".join(line for line in text.split("\n") if line.startswith("    ") or not line))
    parts = re.split(r"^\$ (.*)\n", block, flags=re.M)
    said = dict(zip(parts[1::2], (part.rstrip("\n") + "\n" for part in parts[2::2]), strict=True))
    result = bring({"inetd.conf": said["cat inetd.conf"]})
    assert said["cat conf.d/echo.toml"] == result.texts["echo"]
    notes = "".join(f"{note}\n" for note in result.notes)
    assert said["superctl import inetd.conf -o conf.d"] == notes + "wrote conf.d/echo.toml\n"


def test_manual() -> None:
    page = (ROOT / "man" / "superd-migrate.7").read_text().partition(".Sh EXAMPLES")[2]
    line, wanted = re.findall(r"^\.Bd -literal -offset indent\n(.*?)^\.Ed", page, re.M | re.S)
    assert bring({"/etc/inetd.conf": line}).texts["ident"] == wanted
