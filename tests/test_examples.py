"""Each file of conf.d does what its comment says: the daemon runs on all of them, and each `# try:` is tried.

Only the ports and the directory for UNIX sockets are others than in `make run`, so that both can run at a time.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import tomli
from harness import Superd

CONF_D = Path(__file__).resolve().parent.parent / "conf.d"
PORT = re.compile(r"(?<=[:/])7\d{3}\b")
SOCKETS = '/tmp/superd-example-{os.getuid()}'  # as the comments write it, inside a Python f-string


@dataclass(frozen=True)
class Example:
    """One file. `tried`, `expect`, `log` and `needs` are the lines of its first comment."""

    name: str
    text: str

    def said(self, word: str) -> str | None:
        found = re.search(rf"^# {word}: +(.*)$", self.text, re.M)
        return found[1].strip() if found else None

    @property
    def enabled(self) -> bool:
        return bool(tomli.loads(self.text).get("enabled", True))


EXAMPLES = [Example(path.stem, path.read_text()) for path in sorted(CONF_D.glob("*.toml"))]
ENABLED = [example for example in EXAMPLES if example.enabled]


@pytest.fixture(scope="module")
def daemon() -> Iterator[Superd]:
    with Superd() as superd:
        for example in EXAMPLES:
            comment, _, keys = example.text.partition("\n\n")
            superd.write(example.name, comment + "\n\n" + PORT.sub("0", keys))
        superd.start(environment={**os.environ, "SUPERD_EXAMPLES": str(superd.room("sockets"))})
        yield superd


@pytest.mark.parametrize("example", ENABLED, ids=lambda example: example.name)
def test_what_the_comment_says(daemon: Superd, example: Example, require: Callable[[str], str]) -> None:
    expect, log = example.said("expect"), example.said("log")
    assert expect or log, f"{example.name}.toml does not say what happens"
    if tried := example.said("try"):
        tried = tried.replace(SOCKETS, f"{daemon.dir}/sockets")
        if PORT.search(tried):
            tried = PORT.sub(str(daemon.address(example.name)[1]), tried)
        done = subprocess.run([require("bash"), "-c", tried], capture_output=True, text=True, timeout=30)
        assert (done.returncode, done.stderr) == (0, "")
        assert fnmatchcase(done.stdout.strip(), expect or "")
    if log:
        level, _, message = log.partition(": ")
        daemon.wait_record(service=example.name, event="output", level=level, message=message)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.name)
def test_comments(example: Example) -> None:
    assert example.text.startswith("# ")
    assert example.enabled != bool(example.said("needs")), "what needs something is not enabled, and says what"
    if not example.enabled:
        assert "enabled = true" in str(example.said("needs"))
        assert example.said("try")


def test_all_of_them_are_in_order() -> None:
    """The ones that are not enabled too, though their programs may not be installed."""
    done = subprocess.run(
        [sys.executable, "-I", "-m", "superd.cli.check", str(CONF_D)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
