"""Which processes there are below one, from /proc; nothing where there is no /proc."""

from __future__ import annotations

import os
from typing import NamedTuple


class Process(NamedTuple):
    """started: in clock ticks since boot, which with the pid names a process for good."""

    pid: int
    parent: int
    group: int
    session: int
    started: int
    zombie: bool


def below(root: int) -> list[Process]:
    """All descendants of `root`, parents before their children. As proc(5) has them at this moment."""
    children: dict[int, list[Process]] = {}
    try:
        names = os.listdir("/proc")
    except OSError:
        return []
    for name in names:
        if name.isdigit() and (row := _read(int(name))) is not None:
            children.setdefault(row.parent, []).append(row)
    found: list[Process] = []
    waiting = [root]
    while waiting:
        rows = children.pop(waiting.pop(), [])  # pop: a pid reused meanwhile could make a circle
        found += rows
        waiting += [row.pid for row in rows]
    return found


def _read(pid: int) -> Process | None:
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            text = file.read()
    except OSError:
        return None  # it has gone
    # The name stands in parentheses and may hold anything, parentheses too.
    fields = text[text.rindex(b")") + 2 :].split()
    return Process(pid, int(fields[1]), int(fields[2]), int(fields[3]), int(fields[19]), fields[0] in (b"Z", b"X"))


def started(pid: int) -> int | None:
    """When the process that has this pid now was started; None: there is none."""
    row = _read(pid)
    return None if row is None else row.started


def environment_value(pid: int, name: str) -> str | None:
    """A variable as the process was started with; None: not there, or not ours to read."""
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            text = file.read()
    except OSError:
        return None
    prefix = name.encode() + b"="
    for line in text.split(b"\0"):
        if line.startswith(prefix):
            return os.fsdecode(line[len(prefix) :])
    return None
