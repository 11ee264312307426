"""What superd costs as it grows: with 10 to 10,000 services, with up to 5,000 live connections of one service, and with
50 to 2000 connections each second.

Times of wall clocks say little where others are at work; CPU time and memory do, and so do two measurements that take
turns. CPU time is that of keeper and manager, to the nanosecond (schedstat of each thread), memory their PSS. The
sockets lie in a file system in memory, as those in /run do: ext4 takes up to a millisecond for each name that was
there a moment ago.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import resource
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import peers
import procfs
from curves import chart
from peers import Bench, Missing
from tables import table

KINDS = ("unix", "tcp")
SIZES, LIVE = (10, 100, 1000, 10_000), (10, 100, 1000, 5000)
RATES = (50, 100, 200, 500, 1000, 2000)
RATE_S, RATE_AT_ONCE = 2.0, 500
SMALL = 10  # services of the superd that others are compared with
ROLES = ("superd-keeper", "superd-manager")
START_LIMIT_S = 120
FIRST_PORT = 7000


@dataclass(frozen=True, slots=True)
class Effort:
    """How often things are done that a median is taken of; the first of the rounds warms up."""

    changes: int = 11
    rounds: int = 8
    connections: int = 200  # in each of them
    rate_rounds: int = 3


QUICK = Effort(changes=3, rounds=4, connections=50, rate_rounds=1)


@dataclass(frozen=True, slots=True)
class Cost:
    """One superd. services: all of them; start: until the ready line; change: one file, from its rename to the record
    of the reload; accept: manager, one connection, and the same divided by that of a small superd beside it; list:
    `superctl list`, with its own CPU time."""

    kind: str
    services: int
    start_s: float
    start_cpu_s: float
    memory_kb: int
    change_ms: float
    change_cpu_ms: float
    accept_us: float
    accept_ratio: float
    list_s: float
    list_cpu_s: float


@dataclass(frozen=True, slots=True)
class Live:
    """One service with that many live connections: one more connection of another service (`accept`, as above), what
    keeper, manager and spawners take in memory, and `superctl list`."""

    connections: int
    accept_us: float
    accept_ratio: float
    memory_kb: int
    list_s: float


@dataclass(frozen=True, slots=True)
class Rate:
    """Connections that come at even distances. own_us: CPU time of keeper, manager and spawners for one of them."""

    per_s: int
    own_us: float
    p50_ms: float
    p99_ms: float


@dataclass(slots=True)
class Superd:
    """A running superd; `log` is its JSON records."""

    process: subprocess.Popen[bytes]
    directory: Path
    log: Path
    ports: list[int]
    began: float
    seen: int = 0  # bytes of the log

    def records(self) -> Iterator[dict[str, object]]:
        """Those that are new. A line that is not complete is left for the next time."""
        with self.log.open("rb") as log:
            log.seek(self.seen)
            for line in log:
                if line.endswith(b"\n"):
                    self.seen += len(line)
                    yield json.loads(line)

    def wait_for(self, event: str, seconds: float) -> dict[str, object]:
        for _ in procfs.until(time.monotonic() + seconds, 0.002):
            for record in self.records():
                if record["event"] == event:
                    return record
            if self.process.poll() is not None:
                break
        raise Missing(f"superd has not said {event!r} in {seconds:g} s: {self.log.read_bytes()[-500:]!r}")

    def roles(self, names: Sequence[str] = ROLES) -> list[procfs.Process]:
        return [each for each in procfs.tree(self.process.pid) if each.comm in names]

    def cpu_us(self, names: Sequence[str] = ROLES) -> float:
        return sum(map(procfs.exact_us, self.roles(names)))


def service_file(listen: str, command: Sequence[str], connections: int = 1000) -> str:
    words = ", ".join(f'"{word}"' for word in command)
    limits = f"[limits]\nmax_connections = {connections}\n"
    return f'listen  = "{listen}"\ncommand = [{words}]\nuser    = "nobody"\n{limits}'


@contextlib.contextmanager
def running(bench: Bench, services: int, kind: str) -> Iterator[Superd]:
    """superd with one service on a TCP port, another that holds its connections, and more of `kind`."""
    ports = peers.free_ports(2)
    directory = bench.work / f"scale.{ports[0]}"
    conf_d = directory / "conf.d"
    conf_d.mkdir(parents=True)
    run = Path(tempfile.mkdtemp(prefix="superd-bench-", dir="/dev/shm" if os.path.isdir("/dev/shm") else directory))
    hello = [str(bench.hello)]
    (conf_d / "hello.toml").write_text(service_file(f"tcp:127.0.0.1:{ports[0]}", hello))
    (conf_d / "held.toml").write_text(service_file(f"tcp:127.0.0.1:{ports[1]}", [*hello, "hold"], 100_000))
    for number in range(services - 2):
        # Not port 0: with thousands of them taken, the kernel's search for one that is free takes half a millisecond.
        tcp = f"tcp:127.1.{number // 200}.1:{FIRST_PORT + number % 200}"
        listen = f"unix:{run}/{number}.sock" if kind == "unix" else tcp
        (conf_d / f"service-{number}.toml").write_text(service_file(listen, hello))
    log = directory / "log"
    with log.open("wb") as output:
        command = [*bench.superd, "-c", str(directory), "--control", f"unix:{directory}/control.sock", "--log", "json"]
        began = time.monotonic()
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
    try:
        superd = Superd(process, directory, log, ports, began)
        superd.wait_for("ready", START_LIMIT_S)
        yield superd
    finally:
        peers.Daemon("superd", process, ports, log).stop()
        shutil.rmtree(run)


def accept_once(bench: Bench, superd: Superd, connections: int) -> float:
    """CPU time of the manager for one connection, in µs."""
    before = superd.cpu_us(["superd-manager"])
    command = [str(bench.work / "load"), str(superd.ports[0]), str(connections), "1", peers.GREETING.decode()]
    found = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    if found["failed"]:
        raise Missing(f"{found['failed']} of {connections} connections failed: {found['first_error']}")
    return (superd.cpu_us(["superd-manager"]) - before) / connections


def accept(bench: Bench, superd: Superd, small: Superd, effort: Effort) -> tuple[float, float]:
    """(µs for one connection, the same divided by that of `small`): medians of rounds that take turns, for the machine
    may be another one a second later."""
    rounds = [
        tuple(accept_once(bench, one, effort.connections) for one in (superd, small)) for _ in range(effort.rounds)
    ]
    del rounds[0]  # that warmed them up
    return statistics.median(mine for mine, _ in rounds), statistics.median(mine / other for mine, other in rounds)


def change_one(superd: Superd, number: int) -> tuple[float, float]:
    """Write the file of a service anew, as an editor does: (ms until that is in force, ms of CPU time)."""
    path = superd.directory / "conf.d" / "hello.toml"
    text = path.read_text().splitlines()
    text[-1] = f"max_connections = {1001 + number}"
    new = path.with_name(".new")
    new.write_text("\n".join(text) + "\n")
    before, begin = superd.cpu_us(), time.monotonic()
    new.rename(path)
    record = superd.wait_for("reload", 60)
    took = time.monotonic() - begin
    if record.get("changed") != 1:
        raise Missing(f"a reload of one file says {record}")
    time.sleep(0.05)  # what follows upon it counts, too
    return took * 1e3, (superd.cpu_us() - before) / 1e3


def ask(superd: Superd, *command: str) -> tuple[float, float]:
    """(seconds, seconds of CPU time) of superctl."""
    before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    control = f"unix:{superd.directory}/control.sock"
    superctl = [sys.executable, "-I", "-m", "superd.cli.superctl", "-s", control, *command]
    subprocess.run(superctl, stdout=subprocess.DEVNULL, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.monotonic() - begin, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def measure(bench: Bench, services: int, kind: str, small: Superd, effort: Effort) -> Cost:
    with running(bench, services, kind) as superd:
        start_s, start_cpu_us = time.monotonic() - superd.began, superd.cpu_us()
        time.sleep(0.2 + services / 5000)  # the first look at the files is still to come
        changes = [change_one(superd, number) for number in range(effort.changes)]
        change_ms, change_cpu_ms = (statistics.median(column) for column in zip(*changes, strict=True))
        memory = procfs.pss_kb(superd.roles())
        return Cost(
            kind, services, start_s, start_cpu_us / 1e6, memory, change_ms, change_cpu_ms,
            *accept(bench, superd, small, effort), *ask(superd, "list"),
        )  # fmt: skip


def measure_live(bench: Bench, sizes: Sequence[int], small: Superd, effort: Effort) -> Iterator[Live]:
    with running(bench, 2, "tcp") as superd, contextlib.ExitStack() as clients:
        count = 0
        for size in sizes:
            for _ in range(count, size):
                client = clients.enter_context(socket.create_connection(("127.0.0.1", superd.ports[1]), timeout=30))
                if client.recv(len(peers.GREETING), socket.MSG_WAITALL) != peers.GREETING:
                    raise Missing(f"connection {count + 1} has got no service")
                count += 1
            memory = procfs.pss_kb(superd.roles([*ROLES, "superd-spawner"]))
            yield Live(size, *accept(bench, superd, small, effort), memory, ask(superd, "list")[0])


def at_rate(bench: Bench, superd: Superd, per_s: int, rounds: int) -> Rate:
    """Medians of some rounds of two seconds."""
    count = round(per_s * RATE_S)
    found = []
    for _ in range(rounds):
        before = superd.cpu_us([*ROLES, "superd-spawner"])
        numbers = map(str, (superd.ports[0], count, RATE_AT_ONCE))
        command = [str(bench.work / "load"), *numbers, peers.GREETING.decode(), "0", "60", str(per_s)]
        row = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
        if row["failed"]:
            raise Missing(f"{row['failed']} of {count} connections failed: {row['first_error']}")
        own_us = (superd.cpu_us([*ROLES, "superd-spawner"]) - before) / count
        found.append((own_us, row["p50_ms"], row["p99_ms"]))
    return Rate(per_s, *(statistics.median(column) for column in zip(*found, strict=True)))


def run(
    bench: Bench,
    sizes: Sequence[int],
    live: Sequence[int],
    per_second: Sequence[int],
    curves: Path | None,
    effort: Effort,
) -> str:
    """Everything, as Markdown; what grows is drawn below `curves`."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with running(bench, SMALL, "unix") as small:
        costs = []
        for kind, size in itertools.product(KINDS, sizes):
            print(f"bench: {size} services, {kind}", file=sys.stderr, flush=True)
            costs.append(measure(bench, max(size, 2), kind, small, effort))
        lives = []
        for row in measure_live(bench, live, small, effort):
            print(f"bench: {row.connections} live connections", file=sys.stderr, flush=True)
            lives.append(row)
        rates = []
        for per_s in per_second:
            print(f"bench: {per_s} connections/s", file=sys.stderr, flush=True)
            rates.append(at_rate(bench, small, per_s, effort.rate_rounds))
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if curves is not None:
        draw(costs, lives, rates, curves)
    head = ["services", "start s", "start CPU s", "memory MB", "kB each", "change ms", "change CPU ms", "accept CPU µs",
            f": {SMALL}", "list s", "list CPU s"]  # fmt: skip
    rows = [
        [f"{c.services} {c.kind}", f"{c.start_s:.1f}", f"{c.start_cpu_s:.2f}", f"{c.memory_kb / 1024:.1f}",
         f"{more(c, costs):.1f}", f"{c.change_ms:.0f}", f"{c.change_cpu_ms:.1f}", f"{c.accept_us:.0f}",
         f"{c.accept_ratio:.2f}", f"{c.list_s:.2f}", f"{c.list_cpu_s:.2f}"]
        for c in costs
    ]  # fmt: skip
    live_rows = [
        [str(row.connections), f"{row.accept_us:.0f}", f"{row.accept_ratio:.2f}", f"{row.memory_kb / 1024:.1f}",
         f"{row.list_s:.2f}"]
        for row in lives
    ]  # fmt: skip
    rate_rows = [[str(r.per_s), f"{r.own_us:.0f}", f"{r.p50_ms:.2f}", f"{r.p99_ms:.2f}"] for r in rates]
    return "\n\n".join([
        "CPU time: keeper and manager together; accept: the manager, for one connection, and divided by that of a "
        f"superd with {SMALL} services, measured by turns. Memory: PSS of keeper and manager; for each service more "
        "than in the row of its kind that has the fewest. change: one file, until it is in force (200 ms of that "
        "superd waits for more).",
        table(head, rows),
        table(["live", "accept CPU µs", f": {SMALL}", "memory MB", "list s"], live_rows),
        "Connections at even distances; own CPU: keeper, manager and spawners, for one.",
        table(["conn/s", "own CPU µs", "p50 ms", "p99 ms"], rate_rows),
    ]) + "\n"  # fmt: skip


def more(cost: Cost, costs: Sequence[Cost]) -> float:
    """kB for each service more than the fewest of its kind."""
    least = min((other for other in costs if other.kind == cost.kind), key=lambda other: other.services)
    return (cost.memory_kb - least.memory_kb) / max(1, cost.services - least.services)


def draw(costs: Sequence[Cost], lives: Sequence[Live], rates: Sequence[Rate], directory: Path) -> None:
    figures: list[tuple[str, str, str, Callable[[Cost], float]]] = [
        ("start", "CPU time of a start", "s", lambda cost: cost.start_cpu_s),
        ("memory", "Memory of keeper and manager", "MB", lambda cost: cost.memory_kb / 1024),
        ("change", "CPU time of one changed file", "ms", lambda cost: cost.change_cpu_ms),
        ("accept", "CPU time of the manager for one connection", "µs", lambda cost: cost.accept_us),
    ]
    directory.mkdir(parents=True, exist_ok=True)
    for name, title, unit, figure in figures:
        lines = {kind: [(c.services, figure(c)) for c in costs if c.kind == kind] for kind in KINDS}
        (directory / f"{name}.svg").write_text(chart(title, unit, "services", lines))
    both = {
        "live-accept": (
            "CPU time of the manager for one connection",
            "µs",
            [(r.connections, r.accept_us) for r in lives],
        ),
        "live-memory": ("Memory of all roles", "MB", [(r.connections, r.memory_kb / 1024) for r in lives]),
    }
    for name, (title, unit, points) in both.items():
        (directory / f"{name}.svg").write_text(chart(title, unit, "live connections", {"": points}))
    own = {"": [(r.per_s, r.own_us) for r in rates]}
    title = "CPU time of superd for one connection"
    (directory / "rate-cpu.svg").write_text(chart(title, "µs", "connections per second", own))
    latency = {"p50": [(r.per_s, r.p50_ms) for r in rates], "p99": [(r.per_s, r.p99_ms) for r in rates]}
    title = "From connect(2) to the end of the answer"
    (directory / "rate-latency.svg").write_text(chart(title, "ms", "connections per second", latency))
