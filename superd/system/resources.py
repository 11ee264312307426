"""Memory and CPU time of processes, from /proc; nothing where there is no /proc."""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:  # superctl imports this, and typing takes 3 ms
    from collections.abc import Iterable

_TICKS_S = os.sysconf("SC_CLK_TCK")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


def of(pid: int) -> tuple[int, float] | None:
    """(resident bytes, CPU seconds) of one process; None: it has gone."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            text = file.read()
    except OSError:
        return None
    # The name stands in parentheses and may hold anything, parentheses too.
    fields = text[text.rindex(b")") + 2 :].split()
    return int(fields[21]) * _PAGE_BYTES, (int(fields[11]) + int(fields[12])) / _TICKS_S


def total(pids: Iterable[int]) -> tuple[int, float]:
    """The same of all of them together."""
    memory, cpu_s = 0, 0.0
    for pid in pids:
        if (found := of(pid)) is not None:
            memory += found[0]
            cpu_s += found[1]
    return memory, cpu_s
