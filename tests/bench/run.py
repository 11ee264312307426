"""superd beside other superservers, in one run, with the same tiny C service: how fast, how big, how hard to kill.

    python tests/bench/run.py [--quick] [--only NAME,...] [--parts rates,kill,leak,idle] [--install] ...
    python tests/bench/run.py --scale [--sizes 10,10000] [--live 10,5000] [--rates 50,2000] [--curves DIR]

Needs root (the services run as nobody) and gcc. What is printed is Markdown. The exit status is 0 whatever the figures
are, 1 when something could not be measured, and with --assert also when a figure misses its mark.

PSS divides a page by the processes that have it: other programs on the same Python interpreter, this one included, make
superd's look smaller, by less than 1 MB as far as this one is concerned.
"""

from __future__ import annotations

import argparse
import datetime
import json
import operator
import os
import platform
import select
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import peers
import procfs
import scale
from peers import Bench, Daemon, Missing
from tables import table

HERE = Path(__file__).resolve().parent
CONCURRENCIES = (1, 16, 64)
PARTS = ("rates", "kill", "leak", "idle", "first")
MANAGER, SPAWNER = "superd-manager", "superd-spawner"
SERVICE = "hello"
BUSY = " (others are at work here: do not rely on rates and latencies)"

# What superd is held to at every concurrency: its rate as a share of the other's, and whose CPU time it stays below.
RATE_AT_LEAST = {"xinetd": 1.05, "openbsd-inetd": 1.3, "tcpserver": 0.85}
HANDLER_RATE_AT_LEAST = {"xinetd": 2.5, "xinetd-python": 20}  # a Python function in superd: the C program in xinetd
CPU_BELOW = ("xinetd", "openbsd-inetd")


@dataclass(frozen=True)
class Size:
    """How much of everything."""

    connections: int = 2000  # in one round
    rounds: int = 5
    kills: int = 10
    killed_connections: int = 20_000
    leak_warm_up: int = 2000
    leak_connections: int = 20_000
    idle_s: float = 20.0
    starts: int = 9


QUICK = Size(connections=200, rounds=1, kills=2, killed_connections=1500, leak_warm_up=500, leak_connections=1500,
             idle_s=5.0, starts=3)  # fmt: skip


@dataclass(frozen=True)
class Round:
    """One peer, one concurrency, once. CPU time is µs for one connection; `own_us`: that of its processes, by name."""

    peer: str
    concurrency: int
    rate: float
    p50_ms: float
    p99_ms: float
    max_ms: float
    failed: int
    first_error: str
    cpu_us: float
    own_us: dict[str, float]


@dataclass(frozen=True)
class Verdict:
    """One figure that superd is held to."""

    figure: str
    wanted: str
    measured: str
    met: bool


@dataclass
class Report:
    """All that was found out."""

    machine: list[str]
    left_out: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)  # what could not be measured: exit status 1
    rounds: list[Round] = field(default_factory=list)
    kill: dict[str, Any] | None = None
    leak: dict[str, Any] | None = None
    idle: dict[str, Any] | None = None
    first: dict[str, list[float]] | None = None
    verdicts: list[Verdict] = field(default_factory=list)

    def median(self, peer: str, concurrency: int, figure: Callable[[Round], float]) -> float:
        return statistics.median(
            figure(each) for each in self.rounds if (each.peer, each.concurrency) == (peer, concurrency)
        )

    def ratio(self, peer: str, concurrency: int, figure: Callable[[Round], float], our: str = "superd") -> float:
        """Our figure divided by the peer's: the median over the rounds, each compared within itself."""
        ours, theirs = (
            [figure(each) for each in self.rounds if (each.peer, each.concurrency) == (name, concurrency)]
            for name in (our, peer)
        )
        return statistics.median(a / b if b else float("inf") for a, b in zip(ours, theirs, strict=True))

    def peers(self) -> list[str]:
        return list(dict.fromkeys(each.peer for each in self.rounds))

    def concurrencies(self) -> list[int]:
        return list(dict.fromkeys(each.concurrency for each in self.rounds))


def say(text: str) -> None:
    """Progress, for whoever waits; the report has stdout to itself."""
    print(f"bench: {text}", file=sys.stderr, flush=True)


# How to measure ----------------------------------------------------------------------------------------------------


def load_command(bench: Bench, port: int, connections: int, concurrency: int, marks: int = 0) -> list[str]:
    seconds = 30 + connections // 50
    numbers = [str(n) for n in (port, connections, concurrency)]
    return [str(bench.work / "load"), *numbers, peers.GREETING.decode(), str(marks), str(seconds)]


def load(bench: Bench, port: int, connections: int, concurrency: int) -> dict[str, Any]:
    """One run of load.c: its JSON line."""
    command = load_command(bench, port, connections, concurrency)
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def one_round(bench: Bench, daemon: Daemon, connections: int, concurrency: int) -> Round:
    connections = max(1, connections // peers.SLOW.get(daemon.name, 1))
    before = procfs.settled(daemon.pid, SERVICE)
    found = load(bench, daemon.port, connections, concurrency)
    after = procfs.settled(daemon.pid, SERVICE)
    return Round(
        peer=daemon.name,
        concurrency=concurrency,
        **{key: found[key] for key in ("rate", "p50_ms", "p99_ms", "max_ms", "failed", "first_error")},
        cpu_us=(procfs.cpu_us(after) - procfs.cpu_us(before)) / connections,
        own_us={name: spent / connections for name, spent in procfs.own_us(before, after).items()},
    )


def measure_rates(bench: Bench, report: Report, daemons: Sequence[Daemon], size: Size) -> None:
    """Interleaved rounds: A B C D, A B C D, …, so that a slow minute of the machine hits all alike."""
    for daemon in daemons:
        load(bench, daemon.port, min(200, size.connections), max(CONCURRENCIES))
    for number in range(size.rounds):
        say(f"rates, round {number + 1} of {size.rounds}: {', '.join(daemon.name for daemon in daemons)}")
        for concurrency in CONCURRENCIES:
            report.rounds += [one_round(bench, daemon, size.connections, concurrency) for daemon in daemons]


def kill_manager(daemon: Daemon, killed: set[int]) -> bool:
    """SIGKILL to the manager of the moment, waiting up to 5 s for one that has not been killed yet."""
    for _ in procfs.until(time.monotonic() + 5, pause_s=0.002):
        for each in procfs.tree(daemon.pid):
            if each.comm == MANAGER and each.parent == daemon.pid and each.pid not in killed and each.state != "Z":
                os.kill(each.pid, signal.SIGKILL)
                killed.add(each.pid)
                return True
    return False


def measure_kill(bench: Bench, daemon: Daemon, size: Size) -> dict[str, Any]:
    """The manager is killed again and again, at even distances, while clients come 16 at a time."""
    say(f"kill: {size.kills} times SIGKILL to the manager during {size.killed_connections} connections")
    load(bench, daemon.port, 200, 16)
    killed: set[int] = set()
    command = load_command(bench, daemon.port, size.killed_connections, 16, size.kills)
    line = b""
    with subprocess.Popen(command, stdout=subprocess.PIPE) as generator:
        assert generator.stdout is not None
        for line in generator.stdout:
            if line.startswith(b"mark "):
                kill_manager(daemon, killed)
    if generator.returncode:
        raise Missing(f"load ended with status {generator.returncode}")
    found: dict[str, Any] = json.loads(line)
    return found | {"kills": len(killed)}


def quiet(daemon: Daemon) -> tuple[list[procfs.Process], dict[int, Counter[str]]]:
    """Its processes and their fds once everything is done: the same twice, 0.2 s apart; after 5 s as they are then.

    The last service is gone a little before the manager hears of it and closes what it had open on its behalf.
    """
    fds: dict[int, Counter[str]] = {}
    for _ in procfs.until(time.monotonic() + 5, pause_s=0.2):
        earlier, processes = fds, procfs.settled(daemon.pid, SERVICE)
        fds = {each.pid: procfs.fds(each) for each in processes if each.state != "Z"}
        if fds == earlier:
            break
    return processes, fds


def measure_leak(bench: Bench, daemon: Daemon, size: Size) -> dict[str, Any]:
    """What is left of many connections: fds, zombies, memory."""
    say(f"leak: {size.leak_connections} connections after {size.leak_warm_up} to warm up")
    load(bench, daemon.port, size.leak_warm_up, 16)
    before, fds_before = quiet(daemon)
    pss_before = procfs.pss_kb(before)
    found = load(bench, daemon.port, size.leak_connections, 16)
    after, fds_after = quiet(daemon)
    names = {each.pid: each.comm for each in [*before, *after]}
    changes = []
    for pid in sorted(fds_before.keys() | fds_after.keys()):
        was, now = fds_before.get(pid), fds_after.get(pid)
        if was is None or now is None:
            changes.append(f"{names[pid]} {'is new' if was is None else 'is gone'}")
        elif was != now:
            kinds = sorted(kind for kind in was | now if was[kind] != now[kind])
            changes.append(f"{names[pid]}: " + ", ".join(f"{kind} {was[kind]} -> {now[kind]}" for kind in kinds))
    return found | {
        "fds": sum(kinds.total() for kinds in fds_after.values()),
        "fd_changes": changes,
        "zombies": [each.comm for each in after if each.state == "Z"],
        "pss_before_kb": pss_before,
        "pss_growth_kb": procfs.pss_kb(each for each in after if each.state != "Z") - pss_before,
    }


def measure_start(bench: Bench) -> float:
    """Seconds from exec to the `ready: …` line with ten services, python's own start included."""
    command = peers.superd_config(bench, peers.free_ports(10))
    begin = time.monotonic()
    process = subprocess.Popen(
        command, cwd=bench.work, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    daemon = Daemon("superd", process, [0], Path(os.devnull))
    assert process.stdout is not None
    try:
        seen, ready = b"", 0.0
        while not ready:
            left_s = begin + 15 - time.monotonic()
            if left_s <= 0 or not select.select([process.stdout], [], [], left_s)[0]:
                raise Missing("superd printed no ready line in 15 s")
            now, text = time.monotonic(), os.read(process.stdout.fileno(), 65536)
            if not text:
                raise Missing(f"superd ended before its ready line: {seen.decode(errors='replace')[-500:]}")
            seen += text
            ready = now - begin if b"ready: " in seen else 0.0
        return ready
    finally:
        daemon.stop()  # what it says in the end fits into the pipe
        process.stdout.close()


def measure_first(bench: Bench, report: Report, size: Size) -> dict[str, list[float]]:
    """Milliseconds from connect to the whole greeting, of the client that starts an on-demand service."""
    say(f"first: {size.starts} first clients each")
    found: dict[str, list[float]] = {}
    starters = [peers.start_superd_on_demand, peers.start_socket_activate_on_demand]
    for _ in range(size.starts):
        for start in list(starters):
            try:
                daemon = start(bench)
            except Missing as error:
                report.left_out.append(f"first: {error}")
                starters.remove(start)
                continue
            try:
                begin = time.monotonic()
                served = peers.answers(daemon.port)
                found.setdefault(daemon.name, []).append(1000 * (time.monotonic() - begin))
                if not served:
                    report.broken.append(f"first: {daemon.name} did not serve its first client: {daemon.tail()}")
            finally:
                daemon.stop()
    return found


def measure_idle(bench: Bench, daemon: Daemon, size: Size) -> dict[str, Any]:
    """Ten services, each of which has had a client (launch() asks every one), and then nobody comes."""
    say(f"idle: ten services, {size.idle_s:g} s of nothing; then {size.starts} starts")
    before = procfs.settled(daemon.pid, SERVICE)
    time.sleep(min(2.0, size.idle_s / 5))  # what follows upon a connection is not idleness
    before = procfs.tree(daemon.pid)
    woken = procfs.wakeups(before)
    begin = time.monotonic()
    time.sleep(size.idle_s)
    after = [each for each in procfs.tree(daemon.pid) if each.pid in {earlier.pid for earlier in before}]
    seconds, woken = time.monotonic() - begin, procfs.wakeups(after) - woken
    everyone = procfs.tree(daemon.pid)
    return {
        "processes": [each.comm for each in everyone],
        "pss_kb": {f"{each.comm}[{each.pid}]": procfs.pss_kb([each]) for each in everyone},
        "wakeups_per_s": woken / seconds,
        "ready_s": statistics.median(measure_start(bench) for _ in range(size.starts)),
    }


# What is made of it ------------------------------------------------------------------------------------------------


def judge_rates(report: Report) -> list[Verdict]:
    at = report.concurrencies()
    where = "c = " + " / ".join(map(str, at))
    found = []

    def compare(figure: str, relation: str, limit: float, values: Sequence[float], form: str = ".2f") -> None:
        met = {"<": operator.lt, "<=": operator.le, ">=": operator.ge}[relation]
        measured = " / ".join(format(value, form) for value in values)
        found.append(Verdict(figure, f"{relation} {limit}", measured, all(met(value, limit) for value in values)))

    for peer in report.peers():
        if peer in RATE_AT_LEAST and "superd" in report.peers():
            rates = [report.ratio(peer, c, lambda r: r.rate) for c in at]
            compare(f"connections/s, superd : {peer}, {where}", ">=", RATE_AT_LEAST[peer], rates)
        if peer in CPU_BELOW and "superd" in report.peers():
            cpu = [report.ratio(peer, c, lambda r: r.cpu_us) for c in at]
            compare(f"CPU per connection, superd : {peer}, {where}", "<", 1, cpu)
    for peer, least in HANDLER_RATE_AT_LEAST.items():
        if {"superd-handler", peer} <= set(report.peers()):
            rates = [report.ratio(peer, c, lambda r: r.rate, "superd-handler") for c in at]
            compare(f"connections/s, superd-handler : {peer}, {where}", ">=", least, rates)
    if "superd" not in report.peers():
        return found
    own = [report.median("superd", c, lambda r: r.own_us.get(MANAGER, 0) + r.own_us.get(SPAWNER, 0)) for c in at]
    compare(f"manager + spawner, µs per connection, {where}", "<=", 130, own, ".0f")
    if "xinetd" in report.peers():
        compare("p99 latency, superd : xinetd, c = 16", "<=", 1, [report.ratio("xinetd", 16, lambda r: r.p99_ms)])
    failed = sum(each.failed for each in report.rounds if each.peer == "superd")
    found.append(Verdict("failed connections in all rounds", "0", str(failed), failed == 0))
    return found


def judge(report: Report, size: Size) -> list[Verdict]:
    found = judge_rates(report)
    if (kill := report.kill) is not None:
        what = f"SIGKILL to the manager {kill['kills']} times in {kill['connections']} connections"
        failed, error = kill["failed"], kill["first_error"]
        measured = f"{failed} ({error})" if failed else "0"
        found.append(Verdict(f"{what}: failed", "0", measured, failed == 0 and kill["kills"] == size.kills))
        slowest = kill["max_ms"]
        found.append(Verdict(f"{what}: slowest", "< 500 ms", f"{slowest:.0f} ms", failed == 0 and slowest < 500))
    if (leak := report.leak) is not None:
        what, changes, zombies = f"{leak['connections']} connections later", leak["fd_changes"], leak["zombies"]
        found.append(Verdict(f"{what}: fds", "the same", "; ".join(changes) or f"the same {leak['fds']}", not changes))
        found.append(Verdict(f"{what}: zombies", "0", str(len(zombies)), not zombies))
        growth_mb = leak["pss_growth_kb"] / 1024
        found.append(Verdict(f"{what}: growth of PSS", "< 2 MB", f"{growth_mb:+.2f} MB", growth_mb < 2))
    if (idle := report.idle) is not None:
        pss_mb, often, ready_s = sum(idle["pss_kb"].values()) / 1024, idle["wakeups_per_s"], idle["ready_s"]
        processes = f"{len(idle['processes'])} processes"
        found.append(Verdict("idle, 10 services: PSS in all", "< 45 MB", f"{pss_mb:.1f} MB, {processes}", pss_mb < 45))
        found.append(Verdict("idle, 10 services: wake-ups", "< 2 /s", f"{often:.2f} /s", often < 2))
        found.append(Verdict("10 services: exec to ready", "< 0.4 s", f"{ready_s:.3f} s", ready_s < 0.4))
    for name, times_ms in (report.first or {}).items():
        middle = f"{statistics.median(times_ms):.1f} ms"
        found.append(Verdict(f"on demand, first client, {name}", "-", middle, True))
    return found


def render(report: Report, size: Size) -> str:
    parts = [f"    {shlex.join(['python', *sys.argv])}", "\n".join(report.machine)]
    parts += ["Left out: " + "; ".join(report.left_out) + "."] if report.left_out else []
    if report.rounds:
        parts.append(
            f"Rounds: {size.rounds}, interleaved, {size.connections} connections each; medians. c: clients at once. "
            "CPU: for one connection, the service included. own: of that, what the daemon's own processes spent."
        )
    for concurrency in report.concurrencies():
        rows = []
        for peer in report.peers():

            def middle(figure: Callable[[Round], float], peer: str = peer, c: int = concurrency) -> float:
                return report.median(peer, c, figure)

            failed = sum(r.failed for r in report.rounds if (r.peer, r.concurrency) == (peer, concurrency))
            rows.append([
                peer, f"{middle(lambda r: r.rate):.0f}", f"{middle(lambda r: r.p50_ms):.2f}",
                f"{middle(lambda r: r.p99_ms):.2f}", f"{middle(lambda r: r.max_ms):.1f}",
                f"{middle(lambda r: r.cpu_us):.0f}", f"{middle(lambda r: sum(r.own_us.values())):.0f}", str(failed),
            ])  # fmt: skip
        head = [f"c = {concurrency}", "conn/s", "p50 ms", "p99 ms", "max ms", "CPU µs", "own µs", "failed"]
        parts.append(table(head, rows))
    others = [peer for peer in report.peers() if peer != "superd"]
    at = report.concurrencies()
    if "superd" in report.peers():
        if others:
            head = ["superd : peer", *(f"conn/s, c = {c}" for c in at), *(f"CPU, c = {c}" for c in at)]
            rows = [[peer, *(f"{report.ratio(peer, c, lambda r: r.rate):.2f}" for c in at),
                     *(f"{report.ratio(peer, c, lambda r: r.cpu_us):.2f}" for c in at)] for peer in others]  # fmt: skip
            parts.append(table(head, rows))
        roles = sorted({name for each in report.rounds if each.peer == "superd" for name in each.own_us})
        rows = []
        for role in roles:

            def spent(each: Round, role: str = role) -> float:
                return each.own_us.get(role, 0)

            rows.append([role, *(f"{report.median('superd', c, spent):.0f}" for c in at)])
        parts.append(table(["own µs per connection", *(f"c = {c}" for c in at)], rows))
    if report.verdicts:
        rows = [[v.figure, v.wanted, v.measured, "ok" if v.met else "MISSED"] for v in report.verdicts]
        parts.append(table(["figure", "wanted", "measured", ""], rows))
    parts += ["Could not be measured: " + each for each in report.broken]
    return "\n\n".join(parts) + "\n"


def machine() -> list[str]:
    """What the figures depend on."""

    def field_of(path: str, key: str, separator: str) -> str:
        for line in Path(path).read_text().splitlines():
            name, _, value = line.partition(separator)
            if name.strip() == key:
                return value.strip().strip('"')
        return "unknown"

    load_1m = os.getloadavg()[0]
    return [
        f"{field_of('/proc/cpuinfo', 'model name', ':')}, {len(os.sched_getaffinity(0))} cores; "
        f"Linux {platform.release()}; {field_of('/etc/os-release', 'PRETTY_NAME', '=')}; "
        f"Python {platform.python_version()}; {datetime.date.today().isoformat()}; "
        f"load average at the start {load_1m:.2f}{BUSY if load_1m > 0.5 else ''}"
    ]


# The run -----------------------------------------------------------------------------------------------------------


def run_all(bench: Bench, report: Report, names: Sequence[str], parts: Sequence[str], size: Size) -> None:
    """Measure everything that was asked for; what cannot take part is named in the report."""
    if "superd" in names:
        try:
            report.machine.append(peers.superd_version(bench.superd))
        except Missing as error:
            report.broken.append(f"superd: {error}")
            names = [name for name in names if name != "superd"]
    if "rates" in parts:
        daemons: list[Daemon] = []
        try:
            for name in names:
                try:
                    daemons.append(peers.STARTERS[name](bench))
                except Missing as error:
                    (report.broken if name == "superd" else report.left_out).append(f"{name}: {error}")
            measure_rates(bench, report, daemons, size)
            gone = [each for each in daemons if each.process.poll() is not None]
            report.broken += [f"{each.name} ended meanwhile: {each.tail()}" for each in gone]
            for daemon in daemons:
                if daemon.name == "superd":
                    check_log(report, daemon, size)
        finally:
            for daemon in daemons:
                daemon.stop()
    if "superd" not in names:
        return
    if "first" in parts:
        report.first = measure_first(bench, report, size)
    if "kill" in parts:
        report.kill = with_superd(bench, report, "kill", 1, lambda daemon: measure_kill(bench, daemon, size))
    if "leak" in parts:
        report.leak = with_superd(bench, report, "leak", 1, lambda daemon: measure_leak(bench, daemon, size))
    if "idle" in parts:
        report.idle = with_superd(bench, report, "idle", 10, lambda daemon: measure_idle(bench, daemon, size))


def check_log(report: Report, daemon: Daemon, size: Size) -> None:
    """The rates count only with connection logging on: superd's log must hold a line for each connection at least."""
    connections = size.rounds * size.connections * len(CONCURRENCIES)
    for _ in procfs.until(time.monotonic() + 5):
        with daemon.log.open("rb") as log:
            lines = sum(1 for _ in log)
        if lines >= connections:
            report.machine.append(f"superd logged {lines / connections:.1f} lines per connection, to a file.")
            return
    report.broken.append(f"superd's log has {lines} lines for {connections} connections: connection logging is off")


def with_superd(
    bench: Bench, report: Report, part: str, services: int, measure: Callable[[Daemon], dict[str, Any]]
) -> dict[str, Any] | None:
    """`measure` with a superd of its own; None, and a line in the report, when it would not start."""
    daemon = None
    try:
        daemon = peers.start_superd(bench, services)
        return measure(daemon)
    except (Missing, OSError) as error:  # OSError: a process of /proc that is gone, so one that died
        report.broken.append(f"{part}: {error}" + (f": {daemon.tail()}" if daemon is not None else ""))
        return None
    finally:
        if daemon is not None:
            daemon.stop()


def names_of(known: Sequence[str]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        wanted = [name for name in text.split(",") if name]
        if unknown := [name for name in wanted if name not in known]:
            raise argparse.ArgumentTypeError(f"no such name: {', '.join(unknown)} (there are {', '.join(known)})")
        return [name for name in known if name in wanted]

    return parse


def positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError("1 is the least")
    return number


def sizes(text: str) -> tuple[int, ...]:
    return tuple(sorted({positive(number) for number in text.split(",")}))


def main() -> int:
    known = list(peers.STARTERS)
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="everything small: seconds instead of minutes")
    parser.add_argument("--only", type=names_of(known), default=known, metavar="NAME,...", help=", ".join(known))
    parser.add_argument("--parts", type=names_of(PARTS), default=list(PARTS), metavar="PART,...", help=", ".join(PARTS))
    parser.add_argument("--rounds", type=positive, help="interleaved rounds of the rates (5)")
    parser.add_argument("--connections", type=positive, help="connections in each of them (2000)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="all figures, every round, as JSON")
    parser.add_argument("--install", action="store_true", help="get the peers from the Debian archive first")
    parser.add_argument("--packages", type=Path, metavar="DIR", help="where xinetd and openbsd-inetd lie unpacked")
    parser.add_argument("--superd", type=shlex.split, metavar="COMMAND", help="superd (this Python, -I -m superd)")
    parser.add_argument("--scale", action="store_true", help="instead: superd alone, with more and more services")
    parser.add_argument("--sizes", type=sizes, default=scale.SIZES, metavar="N,...", help="how many services")
    parser.add_argument("--live", type=sizes, default=scale.LIVE, metavar="N,...", help="how many live connections")
    parser.add_argument("--rates", type=sizes, default=scale.RATES, metavar="N,...", help="connections per second")
    parser.add_argument("--curves", type=Path, metavar="DIR", help="where --scale draws its curves, as SVG")
    parser.add_argument("--assert", dest="strict", action="store_true", help="exit 1 when a figure misses its mark")
    args = parser.parse_args()
    if os.geteuid() != 0:
        parser.error("this needs root: services run as nobody, /proc of other users is read")
    size = QUICK if args.quick else Size()
    size = Size(**(asdict(size) | {k: v for k in ("rounds", "connections") if (v := getattr(args, k)) is not None}))

    # SIGTERM ends it as Ctrl-C does: through the `finally`s that stop the daemons.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    report = Report(machine())
    with tempfile.TemporaryDirectory(prefix="superd-bench-") as name:
        work = Path(name)
        work.chmod(0o755)  # nobody has to reach the service
        if args.install:
            peers.install(work)
        if shutil.which("gcc") is None:
            parser.error("no gcc (package gcc): the service and the load generator are C programs")
        for program in ("hello", "listen", "load"):
            subprocess.run(["gcc", "-O2", "-o", str(work / program), str(HERE / f"{program}.c")], check=True)
        for program in ("hello", "listen"):
            (work / program).chmod(0o755)
        unpacked = [work, args.packages or Path(os.environ.get("INTEROP_PKGS", "/tmp/superd-interop-pkgs"))]
        superd = tuple(args.superd or [sys.executable, "-I", "-m", "superd"])
        bench = Bench(work, work / "hello", superd, tuple(each for each in unpacked if peers.trusted(each)))
        if args.scale:
            effort = scale.QUICK if args.quick else scale.Effort()
            found = scale.run(bench, args.sizes, args.live, args.rates, args.curves, effort)
            print(*report.machine, found, sep="\n\n", end="")
            return 0
        run_all(bench, report, args.only, args.parts, size)
    report.verdicts = judge(report, size)
    print(render(report, size), end="")
    if args.json is not None:
        args.json.write_text(json.dumps(asdict(report) | {"size": asdict(size)}, indent=1, ensure_ascii=False) + "\n")
    missed = not all(verdict.met for verdict in report.verdicts)
    return int(bool(report.broken) or (args.strict and missed))


if __name__ == "__main__":
    sys.exit(main())
