"""What every test gets: it ends as it began, and a missing program is a reason, not a surprise."""

from __future__ import annotations

import fcntl
import gc
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import hypothesis  # noqa: F401  # before trio: its plugin imports it at the end otherwise, and warns of our Random
import pytest

pytest_plugins = ["plugin_superd"]


def require(program: str) -> str:
    """The path of `program`; the test is skipped where it is not installed, and fails there when CI=true.

    CI installs everything (.ci/run), so a skip there would be a test that nobody runs. Looked for in PATH, where
    daemons live, which an ordinary user's PATH does not have, and beside the Python that runs the tests.
    """
    beside = os.path.dirname(sys.executable)
    search = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/local/sbin", "/usr/sbin", "/sbin", beside])
    if found := shutil.which(program, path=search):
        return found
    missing(f"{program} is not installed")


def missing(reason: str) -> NoReturn:
    """Skip for want of something that CI has; fail when CI=true."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"{reason}, and CI=true", pytrace=False)
    pytest.skip(reason)


@pytest.fixture(name="require")
def require_fixture() -> Callable[[str], str]:
    return require


def open_fds() -> set[str]:
    """What this process has open, as `fd -> target` lines."""
    found = set()
    for fd in os.listdir("/proc/self/fd"):
        try:
            found.add(f"{fd} -> {os.readlink(f'/proc/self/fd/{fd}')}")
        except FileNotFoundError:  # the one listdir had open
            continue
    return found


def children() -> set[int]:
    """Pids of the children of every thread of this process, zombies too (proc(5), task/[tid]/children)."""
    found: set[int] = set()
    for path in Path("/proc/self/task").glob("*/children"):
        try:
            found.update(map(int, path.read_text().split()))
        except FileNotFoundError:
            pass  # a thread that has just ended
    return found


def pytest_xdist_auto_num_workers() -> int:
    """Of `pytest -n auto`: most tests wait for a daemon or a clock, not for a processor."""
    return min(2 * len(os.sched_getaffinity(0)), 8)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[bool | None]:
    """With `pytest -n`: a test marked `quiet` waits for the end of those that run, and no other begins beside it.

    Two locks (flock(2)) that all workers share: who enters passes the gate, and a quiet one keeps it shut while it
    waits for the room to be empty, so it is not overtaken for ever.
    """
    if not hasattr(item.config, "workerinput"):
        return (yield)
    tests = Path(__file__).parent
    with open(tests / "conftest.py") as gate, open(tests / "harness.py") as room:
        fcntl.flock(gate, fcntl.LOCK_EX)
        quiet = item.get_closest_marker("quiet") is not None
        fcntl.flock(room, fcntl.LOCK_EX if quiet else fcntl.LOCK_SH)
        fcntl.flock(gate, fcntl.LOCK_UN)
        try:
            return (yield)
        finally:
            fcntl.flock(room, fcntl.LOCK_UN)  # said, because a child that still runs shares the lock


def pytest_collection_finish() -> None:
    """What was imported stays out of the collections at the end of each test, which then take about a millisecond."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def ends_as_it_began() -> Iterator[None]:
    """No fd more or less than before, no child left, the same directory, umask and environment.

    Reference cycles are collected here: a socket, process or coroutine that nobody closed is an error of the test that
    made it, and not of whichever runs when the collector next does, or of the end of the whole run.
    """
    before = open_fds(), children(), os.getcwd(), dict(os.environ)
    umask = os.umask(0o022)
    os.umask(umask)
    yield
    gc.collect()
    now_open = open_fds()
    leaked, closed, left = now_open - before[0], before[0] - now_open, children() - before[1]
    now = os.umask(umask)
    os.umask(umask)
    problems = [f"open fds: {', '.join(sorted(leaked))}"] if leaked else []
    problems += [f"fds closed that were not its own: {', '.join(sorted(closed))}"] if closed else []
    problems += [f"children: {', '.join(map(describe, sorted(left)))}"] if left else []
    problems += [f"umask {now:04o}, was {umask:04o}"] if now != umask else []
    problems += [f"working directory {os.getcwd()}, was {before[2]}"] if os.getcwd() != before[2] else []
    environment = {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"}
    changed = sorted({name for name, _ in environment.items() ^ before[3].items()} - {"PYTEST_CURRENT_TEST"})
    problems += [f"environment: {', '.join(changed)}"] if changed else []
    if problems:
        pytest.fail("the test left behind: " + "; ".join(problems), pytrace=False)


def describe(pid: int) -> str:
    """`pid (name, state)`, as far as it can still be told."""
    try:
        name, _, rest = Path(f"/proc/{pid}/stat").read_text().partition("(")[2].rpartition(")")
    except OSError:
        return str(pid)
    return f"{pid} ({name}, {rest.split()[0]})"
