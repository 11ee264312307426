"""What looking at superd costs it, and what it costs those who look."""

from __future__ import annotations

import os
import select
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import TIMEOUT_S, Superd, ask, eventually, toml

CTL = [sys.executable, "-I", "-m", "superd.cli.superctl"]


@pytest.fixture
def superd() -> Iterator[Superd]:
    with Superd() as superd:
        yield superd


def resident(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_a_reader_that_is_stuck(superd: Superd) -> None:  # J5
    """`superctl logs -f | sleep 60`, and a service that writes a lot: superd does not grow, others are served."""
    lines = 20_000
    write = ["/bin/sh", "-c", f"yes 'a line that is long enough to be one of a real program' | head -n {lines}"]
    superd.write("chatty", toml(run="once", command=write))
    superd.write("cat", toml(listen="tcp:127.0.0.1:0", command="/bin/cat"))
    superd.start()
    for run in (1, 2, 3):  # fills what is bounded, and whatever Python keeps
        superd.wait_records(run, service="chatty", event="exit")
        superd.call("Start", names=["chatty"], wait=False)
    superd.wait_records(4, service="chatty", event="exit")
    before = resident(superd.manager)
    stuck = subprocess.Popen([*CTL, "-s", superd.control, "logs", "-f"], stdout=subprocess.PIPE)
    try:
        assert stuck.stdout is not None and stuck.stdout.read(1)  # it follows; nobody reads on
        for run in (5, 6):
            superd.call("Start", names=["chatty"], wait=False)
            assert ask(superd.connect("cat"), b"hello") == b"hello"
            superd.wait_records(run, service="chatty", event="exit")
        assert resident(superd.manager) - before < 2 << 20
        assert superd.call("Health")["live"]
    finally:
        stuck.terminate()
        assert stuck.stdout is not None
        stuck.stdout.close()
        stuck.wait(TIMEOUT_S)


def cpu_of(argv: list[str]) -> float:
    """CPU seconds of a command."""
    child = subprocess.Popen(argv, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    assert child.returncode == 0
    return usage.ru_utime + usage.ru_stime


def test_a_list_of_a_hundred_services_is_fast(superd: Superd) -> None:
    """CPU time, the medians of interleaved runs: others are at work on the machine."""
    for number in range(100):
        superd.write(f"service-{number}", toml(listen=f"unix:{superd.dir}/{number}.sock", command="/bin/cat"))
    superd.start()
    superd.call("List")
    base = [sys.executable, "-I", "-c", "import argparse, json, socket"]
    pairs = [(cpu_of(base), cpu_of([*CTL, "-s", superd.control, "list"])) for _ in range(9)]
    python_s, list_s = (statistics.median(column) for column in zip(*pairs, strict=True))
    assert list_s < 1.5 * python_s + 0.010, (python_s, list_s)


def test_an_idle_superd_stays_idle(superd: Superd) -> None:
    """The meter sleeps when nothing is counted."""
    superd.write("hello", toml(listen="tcp:127.0.0.1:0", command=["/bin/echo", "hello"]))
    superd.start()
    assert ask(superd.connect("hello"), b"") == b"hello\n"
    superd.wait_record(service="hello", event="exit")

    def switches() -> int:
        text = Path(f"/proc/{superd.manager}/status").read_text()
        return int(text.partition("voluntary_ctxt_switches:")[2].split()[0])

    def sleeps() -> bool:
        before = switches()
        select.select([], [], [], 1.1)  # a rate needs an interval; a quiet one, for /tmp is watched and is others' too
        return switches() == before

    eventually(sleeps, True)
