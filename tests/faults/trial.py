"""A superd under steady load while something goes wrong, and the line that every fault has to pass.

The load: a witness (20 echoes a second, each a connection of its own), a session that lives all the time, `superctl
status` twice a second. The pass line: the keeper is the same process, every echo came back, 99 of 100 within 100 ms
outside the fault and a second around it, the session is intact, superctl answered within a second; afterwards
descriptors, zombies and children are as before, the roles' memory has grown by less than 5 MB, and superd's own
messages are less than 100 kB.
"""

from __future__ import annotations

import asyncio
import os
import select
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from harness import TIMEOUT_S, Superd, comm, descendants, open_fds, toml

SUPERCTL = [sys.executable, "-I", "-m", "superd.cli.superctl"]
EVERY_S = 0.05
AROUND_S = 1.0  # how long before and after a fault an echo may be slow

# Records that say what clients and services did; the rest is what superd has to say.
TRAFFIC = frozenset({"connection", "start", "exit", "output", "refused"})

Figures = dict[str, Any]


@dataclass(frozen=True)
class Allowed:
    """Where a fault excuses what the common line asks for."""

    witness_fails: int = 0  # echoes that may get lost
    superctl: bool = True  # superctl answers within a second, also during the fault
    slow_s: float = 0.1  # 99 of 100 echoes outside the fault
    slow_inside_s: float | None = None  # and inside it
    grown_bytes: float = 5e6  # of keeper and manager
    log_bytes: int = 100_000  # of superd's own messages
    session: bool = True
    keeper: bool = True


@dataclass
class Echo:
    began: float
    took: float = 0.0
    error: str = "no answer"


@dataclass
class Trial:
    """with Trial() as trial: trial.superd.write(…); trial.begin(); with trial.fault(): …; trial.end(figures)"""

    allowed: Allowed = field(default_factory=Allowed)
    superd: Superd = field(default_factory=Superd)
    echoes: list[Echo] = field(default_factory=list)
    answers: list[tuple[float, float, bool]] = field(default_factory=list)  # of superctl: when, how long, good
    windows: list[tuple[float, float]] = field(default_factory=list)
    settle_s: float = 1.5  # before the fault and after it

    def __enter__(self) -> Self:
        superd = self.superd
        superd.garbage_expected = True
        superd.write("witness", toml(listen="tcp:127.0.0.1:0", command=["/bin/cat"], limits={"max_connections": 512}))
        superd.write("session", toml(listen="tcp:127.0.0.1:0", command=["/bin/cat"]))
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []
        self._session: socket.socket | None = None
        self._session_error = ""
        return self

    def __exit__(self, *_: object) -> None:
        self._halt()
        self.superd.close()

    def begin(self, **options: Any) -> None:
        """Start superd and the load, and remember how it was when all had run once."""
        superd = self.superd
        superd.start(**options)
        self._address = superd.address("witness")
        self._session = superd.connect("session")
        self._talk()
        self._superctl()
        for _ in range(5):  # imports and pools of the first connections are no growth
            with superd.connect("witness") as client:
                client.sendall(b"x")
                assert client.recv(1) == b"x"
        superd.wait_for("witness", "idle")
        self._keeper = superd.pid
        self._before = self._state()
        for work in (self._witness, self._look):
            thread = threading.Thread(target=work, daemon=True)
            thread.start()
            self._threads.append(thread)
        self.pause(self.settle_s)

    @contextmanager
    def fault(self) -> Iterator[None]:
        """What happens inside may make echoes slow, a second before and after it too."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.windows.append((began, time.monotonic()))

    def pause(self, seconds: float) -> None:
        """Let the load run; ends early when the daemon's output does."""
        select.select([], [], [], seconds)

    def end(self, figures: Figures) -> Figures:
        """Stop the load, compare with the line; figures, with "failed" if something is not as it should be."""
        self.pause(self.settle_s)
        self._talk()
        self._halt()
        problems: list[str] = list(figures.pop("failed", []))
        allowed, superd = self.allowed, self.superd
        lost = [echo for echo in self.echoes if echo.error]
        outside = [echo.took for echo in self.echoes if not echo.error and not self._inside(echo)]
        inside = [echo.took for echo in self.echoes if not echo.error and self._inside(echo)]
        figures |= {"echoes": len(self.echoes), "p99_ms": ms(p99(outside)), "p99_inside_ms": ms(p99(inside))}
        if lost:
            figures["lost"] = len(lost)
        if len(lost) > allowed.witness_fails:
            problems.append(f"{len(lost)} of {len(self.echoes)} echoes lost: {Counter(echo.error for echo in lost)}")
        if p99(outside) > allowed.slow_s:
            problems.append(f"p99 {ms(p99(outside))} ms outside the fault")
        if allowed.slow_inside_s is not None and p99(inside) > allowed.slow_inside_s:
            problems.append(f"p99 {ms(p99(inside))} ms inside the fault")
        slow = [took for when, took, good in self.answers if (took > 1.0 or not good) and self._asked(when)]
        figures["superctl_ms"] = ms(max((took for when, took, good in self.answers if self._asked(when)), default=0.0))
        if slow:
            problems.append(f"superctl slow or wrong {len(slow)} times of {len(self.answers)}")
        if self._session_error and allowed.session:
            problems.append(f"the session: {self._session_error}")
        if allowed.keeper and (superd.pid != self._keeper or comm(self._keeper) != "superd-keeper"):
            problems.append("the keeper is another process")
        problems += self._compare(figures)
        said = sum(len(repr(record)) for record in superd.records if record.get("event") not in TRAFFIC)
        said += sum(map(len, superd.garbage))
        figures["log_kB"] = round(said / 1000, 1)
        if said > allowed.log_bytes:
            problems.append(f"{said // 1000} kB of own log")
        own = [str(one.get("message")) for one in superd.records if one.get("event") != "output"]
        if traces := [line for line in [*superd.garbage, *own] if "Traceback" in line]:
            problems.append(f"{len(traces)} tracebacks: {traces[0][-300:]}")
        if problems:
            figures["failed"] = problems
        return figures

    # -- the load

    def _witness(self) -> None:
        asyncio.run(self._echoes())

    async def _echoes(self) -> None:
        loop = asyncio.get_running_loop()
        running: set[asyncio.Task[None]] = set()
        due = loop.time()
        while not self._stop.is_set():
            echo = Echo(time.monotonic())
            self.echoes.append(echo)
            task = loop.create_task(self._echo(echo))
            running.add(task)
            task.add_done_callback(running.discard)
            due += EVERY_S
            await asyncio.sleep(max(0.0, due - loop.time()))
        if running:
            await asyncio.wait(running, timeout=TIMEOUT_S)

    async def _echo(self, echo: Echo) -> None:
        try:
            async with asyncio.timeout(TIMEOUT_S * 3):
                reader, writer = await asyncio.open_connection(*self._address)
                try:
                    writer.write(b"echo")
                    writer.write_eof()
                    answer = await reader.read(-1)
                finally:
                    writer.close()
            echo.error = "" if answer == b"echo" else f"answer {answer!r}"
        except (OSError, TimeoutError) as error:
            echo.error = type(error).__name__
        echo.took = time.monotonic() - echo.began

    def _look(self) -> None:
        while not self._stop.wait(0.5):
            self.answers.append(self._superctl())
            self._talk()

    def _superctl(self) -> tuple[float, float, bool]:
        began = time.monotonic()
        argv = [*SUPERCTL, "-s", self.superd.control, "--timeout", "10s", "status", "session"]
        done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, check=False)
        return began, time.monotonic() - began, done.returncode == 0

    def _talk(self) -> None:
        assert self._session is not None
        try:
            self._session.sendall(b"s")
            if self._session.recv(1) != b"s":
                self._session_error = "closed"
        except OSError as error:
            self._session_error = str(error)

    def _halt(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(TIMEOUT_S * 4)
        self._threads.clear()

    # -- before and after

    def _inside(self, echo: Echo) -> bool:
        return any(a - AROUND_S <= echo.began + echo.took and echo.began <= b + AROUND_S for a, b in self.windows)

    def _asked(self, when: float) -> bool:
        return self.allowed.superctl or not any(a - AROUND_S <= when <= b + AROUND_S for a, b in self.windows)

    def _state(self) -> dict[str, Any]:
        superd = self.superd
        everybody = [superd.pid, *descendants(superd.pid)]
        memory = {comm(pid): rss(pid) for pid in everybody if comm(pid) in ("superd-keeper", "superd-manager")}
        return {
            "descriptors": own_fds(superd),
            "zombies": zombies(superd.pid),
            "children": Counter(map(comm, superd.services())),
            "memory": memory,
        }

    def _compare(self, figures: Figures) -> list[str]:
        """Idle again, what there is is what there was; spawners come and go, their descriptors do not count."""
        wanted = ("zombies", "children")
        deadline = time.monotonic() + 5.0
        while True:
            now = self._state()
            different = [name for name in wanted if now[name] != self._before[name]]
            different += [
                f"fds of {role}"
                for role in ("superd-keeper", "superd-manager")
                if now["descriptors"][role] - self._before["descriptors"][role]
            ]
            if not different or time.monotonic() > deadline:
                break
            self.pause(0.1)
        grown = sum(now["memory"].values()) - sum(self._before["memory"].values())
        figures["rss_MB"] = round(grown / 1e6, 1)
        if self._session is not None:
            self._session.close()
        problems = [f"{name}: {now[name]} was {self._before[name]}" for name in different if name in wanted]
        for role in ("superd-keeper", "superd-manager"):
            if f"fds of {role}" in different:
                both = self._before["descriptors"][role], now["descriptors"][role]
                problems.append(f"{role}: {difference(*both)}")
        if grown > self.allowed.grown_bytes:
            problems.append(f"memory grew by {grown / 1e6:.1f} MB")
        return problems


def own_fds(superd: Superd) -> dict[str, Counter[str]]:
    """What keeper and manager have open, but for the channels of the spawners, which come and go."""
    pids = superd.pids()
    found = {}
    for role, channels in (("superd-keeper", 2), ("superd-manager", 1)):
        counted = Counter(name for pid in pids[role] for name in open_fds(pid))
        counted["socket"] -= channels * len(pids["superd-spawner"])
        found[role] = counted
    return found


def difference(a: Counter[str], b: Counter[str]) -> str:
    return f"more {dict(b - a)}, fewer {dict(a - b)}"


def rss(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def zombies(root: int) -> int:
    """Children of a role that have ended and were not reaped."""
    found = 0
    for pid in [root, *descendants(root)]:
        try:
            children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
            found += sum(is_zombie(int(child)) for child in children)
        except OSError:
            continue
    return found


def is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return False


def p99(values: list[float]) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * 0.99))] if values else 0.0


def ms(seconds: float) -> float:
    return round(seconds * 1000, 1)


def within(seconds: float, condition: Callable[[], bool]) -> float | None:
    """How long it took until it was so; None when it was not in that time."""
    began = time.monotonic()
    while not condition():
        if time.monotonic() - began > seconds:
            return None
        select.select([], [], [], 0.02)
    return time.monotonic() - began
