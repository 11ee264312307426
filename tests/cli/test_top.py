"""superctl top: figures, and the terminal that it takes and gives back."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from typing import Any

import pytest
from harness import TIMEOUT_S, Superd, toml

from superd.cli import top

ARGV = [sys.executable, "-I", "-m", "superd.cli.superctl"]
BUSY = ["/bin/sh", "-c", "(while :; do :; done) & wait"]  # a descendant uses the CPU


@pytest.fixture
def superd() -> Iterator[Superd]:
    with Superd() as superd:
        superd.write("busy", toml(command=BUSY, stop_timeout="1s"))
        superd.write("idle", toml(command=["/bin/sleep", "1000"]))
        superd.write("cat", toml(listen="tcp:127.0.0.1:0", command="/bin/cat"))
        superd.start()
        superd.wait_for("busy", "ready")
        yield superd


def test_one_table_when_there_is_no_terminal(superd: Superd) -> None:
    done = subprocess.run([*ARGV, "-s", superd.control, "top"], capture_output=True, text=True, timeout=TIMEOUT_S)
    assert (done.returncode, done.stderr) == (0, "")
    head, first, *rest = done.stdout.splitlines()
    assert head.split() == ["service", "state", "cpu%", "memory", "time", "procs", "total"]
    assert re.fullmatch(r"busy +ready +\d+\.\d +\S+M +\S+s +2 +1", first), first
    assert {line.split()[0] for line in rest} == {"superd", "idle", "cat"}
    assert "\x1b" not in done.stdout


def test_json(superd: Superd) -> None:
    done = subprocess.run(
        [*ARGV, "-s", superd.control, "top", "--json"], capture_output=True, text=True, timeout=TIMEOUT_S
    )
    rows = json.loads(done.stdout)
    keys = ["name", "state", "cpu", "memory", "cpu_time", "processes", "connections", "total", "note"]
    assert [list(row) for row in rows] == [keys] * 4
    by_name = {row["name"]: row for row in rows}
    assert by_name["busy"]["cpu"] > by_name["idle"]["cpu"]
    assert by_name["idle"]["memory"] > 100_000
    assert by_name["cat"]["processes"] == 0
    assert by_name[None]["processes"] >= 2


def test_psutil_and_proc_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    by_psutil = top.reader()(os.getppid())
    monkeypatch.setitem(sys.modules, "psutil", None)
    by_proc = top.reader()
    assert by_proc(2**22 + 1) is None
    found = by_proc(os.getppid())
    assert found is not None and by_psutil is not None
    assert found[0] == pytest.approx(by_psutil[0], rel=0.2)
    assert found[1] == pytest.approx(by_psutil[1], abs=1.0)


def test_rows() -> None:
    def row(name: str) -> dict[str, Any]:
        return {"name": name, "state": "ready", "now": 1, "total": 7, "note": ""}

    services = [row("a"), row("b")]
    before = top.Sample(10.0, services, {1: ("a", 100, 5.0), 2: ("b", 100, 1.0), 9: ("", 50, 1.0)})
    now = top.Sample(12.0, services, {1: ("a", 100, 5.5), 2: ("b", 100, 3.0), 3: ("b", 10, 1.0), 9: ("", 50, 1.0)})
    found = top.rows(before, now)
    assert [(one["name"], one["cpu"], one["memory"], one["cpu_time"], one["processes"]) for one in found] == [
        ("b", 150.0, 110, 4.0, 2), ("a", 25.0, 100, 5.5, 1), (None, 0.0, 50, 1.0, 1),
    ]  # fmt: skip
    # A pid that has become somebody else's: what it used before is not this one's.
    again = top.Sample(12.0, services, {1: ("b", 100, 0.5)})
    assert top.rows(before, again)[0]["cpu"] == 25.0


def test_figures_for_people() -> None:
    assert [top.size(count) for count in (0, 999, 1000, 1536, 30 << 20, 5 << 30, 1 << 42)] == [
        "0", "999", "1.0K", "1.5K", "30M", "5.0G", "4.0T",
    ]  # fmt: skip
    assert [top.seconds(count) for count in (0.0, 99.99, 100, 3661, 360000)] == [
        "0.00s", "99.99s", "1m40s", "61m01s", "100h00m",
    ]  # fmt: skip


class Terminal:
    """superctl top on a terminal of so many columns and lines."""

    def __init__(self, superd: Superd, columns: int, lines: int) -> None:
        self.master, slave = pty.openpty()
        self.resize(columns, lines)
        self.before = termios.tcgetattr(slave)
        self.slave = slave
        self.text = ""
        environment = {**os.environ, "TERM": "xterm"}
        self.process = subprocess.Popen(
            [*ARGV, "-s", superd.control, "top"], stdin=slave, stdout=slave, stderr=slave, env=environment,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(slave, termios.TIOCSCTTY, 0),
        )  # fmt: skip

    def resize(self, columns: int, lines: int) -> None:
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def read_until(self, pattern: str) -> str:
        """What came since the last call, up to a match."""
        deadline = time.monotonic() + TIMEOUT_S
        while not (match := re.search(pattern, self.text, re.S)):
            assert select.select([self.master], [], [], max(deadline - time.monotonic(), 0))[0], self.text
            try:
                self.text += os.read(self.master, 65536).decode()
            except OSError:
                raise AssertionError(f"ended: {self.text}") from None
        found, self.text = self.text[: match.end()], self.text[match.end() :]
        return found

    def close(self) -> tuple[int, str]:
        """Exit status and the last it wrote."""
        code = self.process.wait(TIMEOUT_S)
        while select.select([self.master], [], [], 0)[0]:
            self.text += os.read(self.master, 65536).decode()
        now = termios.tcgetattr(self.slave)
        os.close(self.slave)
        os.close(self.master)
        assert now[:4] == self.before[:4], "the terminal is not as it was"
        return code, self.text


@pytest.mark.parametrize("how", ["q", "^C", "TERM"])
def test_the_screen(superd: Superd, how: str) -> None:
    terminal = Terminal(superd, 80, 24)
    first = terminal.read_until("superd itself.*\x1b\\[J")
    assert first.startswith("\x1b[?1049h"), "the alternate screen"
    frame = terminal.read_until("\x1b\\[H.*superd itself.*?\x1b\\[J")  # a second later
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", frame).splitlines()
    assert "q: quit" in shown[0] or shown[0].startswith("superd: 3 services")
    assert max(map(len, shown)) <= 80 and len(shown) <= 24
    assert any(line.startswith("busy") for line in shown[2:]), shown
    terminal.resize(40, 4)
    small = terminal.read_until("\x1b\\[H[^H]*\x1b\\[J")
    while "idle" in small:  # frames that were drawn before
        small = terminal.read_until("\x1b\\[H[^H]*\x1b\\[J")
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", small).splitlines()
    assert len(plain) <= 4 and max(map(len, plain)) <= 40
    if how == "q":
        os.write(terminal.master, b"q")
    elif how == "^C":
        os.write(terminal.master, b"\x03")
    else:
        os.kill(terminal.process.pid, signal.SIGTERM)
    code, last = terminal.close()
    assert code == 0
    assert last.endswith("\x1b[?25h\x1b[?1049l"), "cursor and screen are given back"


def test_superd_goes_away(superd: Superd) -> None:
    terminal = Terminal(superd, 80, 24)
    terminal.read_until("superd itself.*\x1b\\[J")
    superd.stop()
    code, last = terminal.close()
    assert code == 69
    assert "\x1b[?1049l" in last and last.rstrip().startswith("superctl: ", last.rindex("\x1b[?1049l") + 8)
