"""What /proc says about the processes of one daemon (proc(5)).

CPU time of a connection: a service process that has been reaped adds its time to the cutime and cstime of whoever
reaped it, and so on upwards, so the four times of all living processes of a tree hold everything that was ever spent in
it, wherever it was spent. Only times of children that nobody waited for are lost.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

TICK_US = 1_000_000 / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Process:
    """One line of /proc/PID/stat. `start` (ticks since boot) with `pid` names a process for good."""

    pid: int
    parent: int
    comm: str
    state: str
    start: int
    own_us: float
    reaped_us: float


def process(pid: int) -> Process | None:
    """The process `pid`, zombies too; None when there is none."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    name, _, rest = text.partition("(")[2].rpartition(")")
    at = rest.split()  # at[0] is field 3 of proc(5)
    own, reaped = int(at[11]) + int(at[12]), int(at[13]) + int(at[14])
    return Process(pid, int(at[1]), name, at[0], int(at[19]), own * TICK_US, reaped * TICK_US)


def tree(root: int) -> list[Process]:
    """`root` and all its descendants, parents first."""
    children: dict[int, list[Process]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit() and (found := process(int(name))) is not None:
            children.setdefault(found.parent, []).append(found)
    top = process(root)
    found_all = [top] if top is not None else []
    for each in found_all:  # grows while it is walked
        found_all += children.get(each.pid, [])
    return found_all


def cpu_us(processes: Iterable[Process]) -> float:
    """All CPU time that was spent in these processes and in those they reaped, in µs."""
    return sum(each.own_us + each.reaped_us for each in processes)


def own_us(before: Iterable[Process], after: Iterable[Process]) -> dict[str, float]:
    """CPU time that the processes of `after` spent themselves since `before`, in µs by name."""
    earlier = {(each.pid, each.start): each.own_us for each in before}
    spent: dict[str, float] = {}
    for each in after:
        spent[each.comm] = spent.get(each.comm, 0.0) + each.own_us - earlier.get((each.pid, each.start), 0.0)
    return spent


def until(reached: float, pause_s: float = 0.01) -> Iterator[None]:
    """Yield at small distances until the monotonic time `reached`, at least once: for what /proc cannot announce."""
    yield
    while time.monotonic() < reached:
        time.sleep(pause_s)
        yield


def settled(root: int, service: str, limit_s: float = 5.0) -> list[Process]:
    """The tree once it holds no process called `service` and no zombie; after `limit_s` as it is then."""
    found: list[Process] = []
    for _ in until(time.monotonic() + limit_s):
        found = tree(root)
        if not any(each.state == "Z" or each.comm == service for each in found):
            break
    return found


def pss_kb(processes: Iterable[Process]) -> int:
    """Proportional set size of all of them, in kB."""
    total = 0
    for each in processes:
        lines = Path(f"/proc/{each.pid}/smaps_rollup").read_text().splitlines()
        total += next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total


def fds(each: Process) -> Counter[str]:
    """Open fds by kind: "socket", "pipe", "anon_inode:[eventpoll]", a path."""
    kinds: Counter[str] = Counter()
    for fd in os.listdir(f"/proc/{each.pid}/fd"):
        try:
            target = os.readlink(f"/proc/{each.pid}/fd/{fd}")
        except FileNotFoundError:  # closed meanwhile
            continue
        kinds[target if target.startswith(("/", "anon_inode:")) else target.partition(":")[0]] += 1
    return kinds


def wakeups(processes: Iterable[Process]) -> int:
    """How often all threads of all of them have gone to sleep so far, which is how often they woke up."""
    total = 0
    for each in processes:
        for status in Path(f"/proc/{each.pid}/task").glob("*/status"):
            lines = status.read_text().splitlines()
            total += next(int(line.split()[1]) for line in lines if line.startswith("voluntary_ctxt_switches:"))
    return total


def exact_us(each: Process) -> float:
    """CPU time of all threads that live now, in µs: `own_us` counts in ticks of 10 ms."""
    threads = Path(f"/proc/{each.pid}/task").glob("*/schedstat")
    return sum(int(path.read_text().split()[0]) for path in threads) / 1e3
