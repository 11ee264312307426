"""The wall clock jumps: no interval of superd's goes by it."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from conftest import missing
from harness import PYTHON, Superd, ask, fetch, read_all, toml

LIBRARIES = "usr/lib/*/faketime/libfaketimeMT.so.1"
TAKES_ONE = "import os, socket; socket.socket(fileno=3).accept()[0].sendall(b'%d' % os.getpid())"


def start(superd: Superd, time: str) -> Path:
    """Start superd with a wall clock of its own; what is written to the file that is returned sets it."""
    found = sorted(Path("/").glob(LIBRARIES))
    if not found:
        missing("libfaketime is not installed")
    clock = superd.dir / "clock"
    clock.write_text(time)
    superd.start(environment={
        **os.environ, "LD_PRELOAD": str(found[0]), "FAKETIME_TIMESTAMP_FILE": str(clock), "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1", "FAKETIME_DONT_RESET": "1",
    })  # fmt: skip
    return clock


@pytest.mark.parametrize("offset", ["-10y", "+10y"])
def test_the_wall_clock_jumps(superd: Superd, offset: str) -> None:  # M1 M2 X12
    """During a delay, a stop, and in a rate's window; all of them take as long as they should."""
    superd.write("again", toml(run="always-on", command=["/bin/false"], restart="always", restart_delay="700ms"))
    deaf = "import signal, time; signal.signal(15, signal.SIG_IGN); print('deaf', flush=True); time.sleep(1000)"
    superd.write("deaf", toml(run="always-on", command=[PYTHON, "-I", "-c", deaf], stop_timeout="700ms"))
    superd.write("rate", toml(listen="tcp:127.0.0.1:0", run="on-demand", command=[PYTHON, "-I", "-c", TAKES_ONE],
                              limits={"rate": "2/1s"}))  # fmt: skip
    clock = start(superd, "+0")
    superd.wait_record(event="exit", service="again")
    superd.wait_record(event="output", message="deaf")
    assert fetch(superd.connect("rate")).isdigit()
    clock.write_text(offset)
    began = time.monotonic()
    clients = [superd.connect("rate") for _ in range(2)]
    superd.call("Stop", names=["deaf"])
    assert 0.6 < time.monotonic() - began < 5
    superd.wait_records(2, event="start", service="again")
    for client in clients:
        assert read_all(client).isdigit()
        client.close()
    assert 0.6 < time.monotonic() - began < 5
    years = {row["time"][:4] for row in superd.records}
    assert len(years) == 2, years  # it did jump


def test_a_machine_without_a_clock(superd: Superd) -> None:  # M4
    """It is 1970, and every file is from the future."""
    superd.write("cat", toml(listen="tcp:127.0.0.1:0", command=["/bin/cat"]))
    start(superd, "@1970-01-02 00:00:00")
    assert ask(superd.connect("cat"), b"x") == b"x"
    superd.write("cat", toml(listen="tcp:127.0.0.1:0", command=["/bin/cat"], description="x"))
    assert superd.call("Reload")["applied"]
    assert {row["time"][:4] for row in superd.records} == {"1970"}
