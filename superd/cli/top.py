"""`superctl top`: which services use CPU and memory, again each second; one table where there is no terminal.

A service's figures are those of all its processes. Where psutil is installed it reads them, elsewhere /proc does.
"""

from __future__ import annotations

import contextlib
import os
import select
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from typing import Any, NamedTuple, Protocol

    Row = dict[str, Any]
    Reader = Callable[[int], "tuple[int, float] | None"]

    class Control(Protocol):
        def call(self, method: str, **parameters: Any) -> Row: ...

    class Style(NamedTuple):
        """How superctl makes tables, shows what others wrote, and whether in colour."""

        table: Callable[..., Iterator[str]]
        clean: Callable[[object], str]
        colours: bool
else:
    from collections import namedtuple

    Style = namedtuple("Style", ("table", "clean", "colours"))

_EVERY_S = 1.0
_ENTER, _LEAVE = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"  # alternate screen, cursor off; and back
_OWN = "superd itself"


def run(control: Control, *, once: bool, style: Style, show: Callable[[list[Row]], bool], quiet: bool) -> int:
    """show: prints rows as JSON if that is wanted, and says whether it was."""
    if not once:
        return _watch(control, style)
    before = sample(control)
    select.select([], [], [], _EVERY_S)  # a share of the CPU needs an interval
    found = rows(before, sample(control))
    if not show(found) and not quiet:
        for line in _table(found, style):
            print(line)
    return 0


# --- figures


class Sample:
    """processes: pid -> (service, memory, CPU seconds); service "": superd's own."""

    def __init__(self, at: float, services: list[Row], processes: dict[int, tuple[str, int, float]]) -> None:
        self.at, self.services, self.processes = at, services, processes


def reader() -> Reader:
    """What tells (resident bytes, CPU seconds) of a pid; None for one that has gone."""
    try:
        import psutil
    except ImportError:
        from superd.system import resources

        return resources.of

    def read(pid: int) -> tuple[int, float] | None:
        try:
            process = psutil.Process(pid)
            with process.oneshot():
                times = process.cpu_times()
                return process.memory_info().rss, times.user + times.system
        except psutil.Error:
            return None

    return read


def sample(control: Control, read: Reader | None = None) -> Sample:
    read = read or reader()
    services = control.call("List")["services"]
    processes = {}
    for row in control.call("Processes")["processes"]:
        if (found := read(row["pid"])) is not None:
            processes[row["pid"]] = (row["service"] or "", *found)
    return Sample(time.monotonic(), services, processes)


def rows(before: Sample, now: Sample) -> list[Row]:
    """A row a service, what uses most CPU first. cpu: percent of one CPU since `before`; cpu_time: seconds, of the
    processes that live now; name None: superd itself."""
    passed_s = max(now.at - before.at, 0.001)
    sums: dict[str, list[float]] = {}
    for pid, (service, memory, cpu_s) in now.processes.items():
        known = before.processes.get(pid)
        # One that is new has used all of it since then.
        used_s = max(cpu_s - (known[2] if known is not None and known[0] == service else 0.0), 0.0)
        found = sums.setdefault(service, [0.0, 0.0, 0.0, 0.0])
        for at, value in enumerate((1, memory, cpu_s, used_s)):
            found[at] += value
    states: dict[str, Row] = {row["name"]: row for row in now.services}
    found_rows = []
    for name in [*states, ""]:
        count, resident, cpu_s, used_s = sums.get(name, (0.0, 0.0, 0.0, 0.0))
        row = states.get(name)
        found_rows.append(
            {
                "name": name or None, "state": row["state"] if row else "ready",
                "cpu": round(100 * used_s / passed_s, 1), "memory": int(resident), "cpu_time": round(cpu_s, 2),
                "processes": int(count),
                "connections": row["now"] if row else 0, "total": row["total"] if row else 0,
                "note": row["note"] if row else "",
            }
        )  # fmt: skip
    return sorted(found_rows, key=lambda row: (-row["cpu"], -row["memory"], row["name"] or ""))


def size(count: float) -> str:
    """1536 -> "1.5K"."""
    for unit in ("", "K", "M", "G"):
        if count < 1000:
            return f"{count:.0f}{unit}" if count >= 10 or not unit else f"{count:.1f}{unit}"
        count /= 1024
    return f"{count:.1f}T"


def seconds(count: float) -> str:
    """CPU time as people write it."""
    if count < 100:
        return f"{count:.2f}s"
    whole = int(count)
    return f"{whole // 60}m{whole % 60:02d}s" if whole < 6000 else f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def _table(found: list[Row], style: Style) -> Iterator[str]:
    cells = [
        [
            row["name"] or _OWN, row["state"], f"{row['cpu']:.1f}", size(row["memory"]) if row["processes"] else "-",
            seconds(row["cpu_time"]) if row["processes"] else "-", str(row["processes"]), str(row["total"]),
        ]
        for row in found
    ]  # fmt: skip
    head = ("service", "state", "cpu%", "memory", "time", "procs", "total", "")
    right = ("cpu%", "memory", "time", "procs", "total")
    return style.table(head, [[*row, ""] for row in cells], right=right)


# --- the screen


def _watch(control: Control, style: Style) -> int:
    import signal
    import termios
    import tty

    keyboard = 0 if os.isatty(0) else None
    saved = termios.tcgetattr(0) if keyboard is not None else None
    woken, wakes = os.pipe()
    os.set_blocking(wakes, False)
    signal.set_wakeup_fd(wakes, warn_on_full_buffer=False)
    # A handler of ours, so that whatever ends this also gives the terminal back.
    for signo in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signo, _stop)
    signal.signal(signal.SIGWINCH, lambda *_: None)
    signal.signal(signal.SIGTSTP, signal.SIG_IGN)  # stopped, it would leave the terminal as it is
    try:
        sys.stdout.write(_ENTER)
        if keyboard is not None:
            tty.setcbreak(0)
        read = reader()
        before = now = sample(control, read)
        while True:
            _draw(rows(before, now), style)
            deadline = now.at + _EVERY_S
            while (left := deadline - time.monotonic()) > 0:
                watched = [woken] if keyboard is None else [woken, keyboard]
                ready = select.select(watched, [], [], left)[0]
                if keyboard in ready:
                    key = os.read(0, 64)
                    if not key or key[:1] in b"qQ\x03\x04":
                        return 0
                if woken in ready:
                    os.read(woken, 64)
                    _draw(rows(before, now), style)  # of another size
            before, now = now, sample(control, read)
    except KeyboardInterrupt:
        return 0
    finally:
        sys.stdout.write(_LEAVE)
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
        if saved is not None:
            with contextlib.suppress(termios.error):
                termios.tcsetattr(0, termios.TCSADRAIN, saved)
        signal.set_wakeup_fd(-1)
        os.close(woken)
        os.close(wakes)


def _stop(*_: object) -> None:
    raise KeyboardInterrupt


def _draw(found: list[Row], style: Style) -> None:
    """Over what was there, so that nothing flickers: each line and then the rest of the screen is cleared behind."""
    try:
        height = os.get_terminal_size(sys.stdout.fileno()).lines
    except OSError:
        height = 24
    running = [row for row in found if row["name"]]
    bad = sum(row["state"] in ("failed", "bad config", "backoff") for row in running)
    title = (
        f"superd: {len(running)} services, {sum(row['connections'] for row in running)} processes or connections, "
        f"CPU {sum(row['cpu'] for row in found):.1f}%, memory {size(sum(row['memory'] for row in found))}"
        + (f", {bad} in trouble" if bad else "") + "   (q: quit)"
    )  # fmt: skip
    lines = [*_fitted([title], style), "", *_table(found, style)]
    sys.stdout.write("\x1b[H" + "\x1b[K\n".join(lines[: max(height - 1, 1)]) + "\x1b[K\x1b[J")
    sys.stdout.flush()


def _fitted(lines: Iterable[str], style: Style) -> list[str]:
    try:
        width = os.get_terminal_size(sys.stdout.fileno()).columns
    except OSError:
        width = 80
    return [style.clean(line)[:width] for line in lines]
