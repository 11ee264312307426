"""superd, xinetd and openbsd-inetd in one run, each with the limits that it has, when clients mean no good.

    python tests/faults/run.py --beside

Five figures that superd is held to; what the others do stands beside them. A daemon that has no word for a limit
(openbsd-inetd knows no source) is shown as it is, and "-" says that there is nothing to measure.
"""

from __future__ import annotations

import os
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from harness import PYTHON, comm, cpu_s, descendants, no_free_fd

BENCH = Path(__file__).resolve().parent.parent / "bench"
sys.path[:0] = [str(BENCH)]

import peers  # noqa: E402
import procfs  # noqa: E402
from peers import Bench, Daemon, Missing  # noqa: E402

PER_SOURCE = 16
RUDE, POLITE = "127.0.0.2", "127.0.0.3"
FLOOD = """
import socket, sys, time
port, count, length = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
began = time.monotonic()
for number in range(count):
    with socket.socket() as s:
        s.settimeout(1); s.bind(("127.0.0.2", 0))
        try: s.connect(("127.0.0.1", port))
        except OSError: pass
    time.sleep(max(0, began + length * number / count - time.monotonic()))
"""


@dataclass
class Victim:
    """One daemon with four services: `hello` and `held` (cat) by TCP, `refused` to everybody, `deaf` by UDP."""

    daemon: Daemon
    held: int
    refused: int | None
    deaf: int
    starts: Path  # a byte for each start of `deaf`
    figures: dict[str, str] = field(default_factory=dict)
    missed: list[str] = field(default_factory=list)

    def accepts(self) -> int:
        """The process that accepts."""
        pids = [self.daemon.pid, *descendants(self.daemon.pid)]
        named = [pid for pid in pids if comm(pid) == "superd-manager"]
        return (named or pids)[0]

    def check(self, good: bool, what: str) -> None:
        if not good:
            self.missed.append(what)


def start_superd(bench: Bench, work: Path, ports: list[int], deaf: str) -> list[str]:
    conf = work / "conf.d"
    conf.mkdir()
    limits = f"[limits]\nmax_connections = 512\nmax_per_source = {PER_SOURCE}\n"
    hello, held, refused, udp = ports
    user = 'user = "nobody"\n'
    (conf / "hello.toml").write_text(
        f'listen = "tcp:127.0.0.1:{hello}"\ncommand = ["{bench.hello}"]\n{user}{limits}rate_per_source = "100/1s"\n'
    )
    (conf / "held.toml").write_text(f'listen = "tcp:127.0.0.1:{held}"\ncommand = ["/bin/cat"]\n{user}{limits}')
    (conf / "refused.toml").write_text(
        f'listen = "tcp:127.0.0.1:{refused}"\ncommand = ["/bin/cat"]\n{user}[access]\nallow = ["192.0.2.1"]\n'
    )
    (conf / "deaf.toml").write_text(
        f'listen = "udp:127.0.0.1:{udp}"\nrun = "on-demand"\npass = "stdio"\ncommand = ["{deaf}"]\nuser = "root"\n'
    )
    return [*bench.superd, "-c", str(work), "--control", f"unix:{work}/control.sock", "--log", "text"]


def start_xinetd(bench: Bench, work: Path, ports: list[int], deaf: str) -> list[str]:
    program = bench.find("xinetd", "xinetd")
    common = "type = UNLISTED\n flags = IPv4 NOLIBWRAP\n bind = 127.0.0.1\n"
    tcp = "socket_type = stream\n protocol = tcp\n wait = no\n user = nobody\n instances = 512\n"
    tcp += f" per_source = {PER_SOURCE}\n"
    hello, held, refused, udp = ports
    rows = [
        ("hello", f"port = {hello}\n {tcp} server = {bench.hello}\n"),  # cps as it comes: 50 10
        ("held", f"port = {held}\n {tcp} cps = 10000 1\n server = /bin/cat\n"),
        ("refused", f"port = {refused}\n {tcp} cps = 100000 1\n only_from = 192.0.2.1\n server = /bin/cat\n"),
        ("deaf", f"port = {udp}\n socket_type = dgram\n protocol = udp\n wait = yes\n user = root\n server = {deaf}\n"),
    ]
    text = "".join(f"service {name}\n{{\n {common} {keys}}}\n" for name, keys in rows)
    (work / "xinetd.conf").write_text(text)
    files = ["-f", str(work / "xinetd.conf"), "-pidfile", str(work / "pid"), "-filelog", str(work / "file.log")]
    return [program, "-dontfork", *files]


def start_inetd(bench: Bench, work: Path, ports: list[int], deaf: str) -> list[str]:
    hello, held, _, udp = ports
    (work / "inetd.conf").write_text(
        f"127.0.0.1:{hello} stream tcp nowait nobody {bench.hello} hello\n"
        f"127.0.0.1:{held} stream tcp nowait nobody /bin/cat cat\n"
        f"127.0.0.1:{udp} dgram udp wait root {deaf} deaf\n"
    )
    return [*peers.files_only(bench), bench.find("inetd", "openbsd-inetd"), "-i", str(work / "inetd.conf")]


STARTERS = {"superd": start_superd, "xinetd": start_xinetd, "openbsd-inetd": start_inetd}


@contextmanager
def running(bench: Bench, name: str) -> Iterator[Victim]:
    work = bench.work / name
    work.mkdir()
    starts = work / "starts"
    starts.touch()
    deaf = work / "deaf.sh"
    deaf.write_text(f"#!/bin/sh\nprintf x >>{starts}\n")
    deaf.chmod(0o755)
    ports = peers.free_ports(4)
    command = STARTERS[name](bench, work, ports, str(deaf))
    pid_file = Path("/run/inetd.pid")
    before = pid_file.read_bytes() if pid_file.exists() else None
    daemon = peers.launch(bench, name, command, ports[:1])
    try:
        yield Victim(daemon, ports[1], None if name == "openbsd-inetd" else ports[2], ports[3], starts)
    finally:
        daemon.stop()
        if name == "openbsd-inetd":
            pid_file.unlink(missing_ok=True)
            if before is not None:
                pid_file.write_bytes(before)


def connect(port: int, source: str, timeout: float = 3.0) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=timeout, source_address=(source, 0))


def greeted(port: int, source: str) -> bool:
    try:
        with connect(port, source) as client, client.makefile("rb") as stream:
            return stream.read() == peers.GREETING
    except OSError:
        return False


def echoed(client: socket.socket) -> bool:
    with suppress(OSError):
        client.sendall(b"x")
        return client.recv(1) == b"x"
    return False


def measure(seconds: float, ask: Callable[[], bool]) -> tuple[int, int, float]:
    """(asked, answered, p99 s) of a client that asks 20 times a second."""
    took, good = [], 0
    for _ in procfs.until(time.monotonic() + seconds, pause_s=0.05):
        began = time.monotonic()
        good += ask()
        took.append(time.monotonic() - began)
    return len(took), good, sorted(took)[int(len(took) * 0.99)]


def flood(victim: Victim) -> None:
    """B2 X14: 1,000 connections a second from one source for 5 s; another one is measured, then and afterwards."""
    port = victim.daemon.port
    rude = subprocess.Popen([PYTHON, "-I", "-c", FLOOD, str(port), "5000", "5"])
    try:
        during = measure(5.0, lambda: greeted(port, POLITE))
    finally:
        rude.wait()
    after = measure(2.0, lambda: greeted(port, POLITE))
    text = "; ".join(f"{good} of {asked}, p99 {p99 * 1000:.0f} ms" for asked, good, p99 in (during, after))
    victim.figures["flood from one source: another one, during; after"] = text
    for asked, good, p99 in (during, after):
        victim.check(good >= 0.99 * asked and p99 < 1.0, "flood: less than 99 % served, or p99 of a second and more")


def no_descriptor(victim: Victim) -> None:
    """A1 X1: EMFILE for 10 s, three clients in the queue."""
    pid, log = victim.accepts(), victim.daemon.log
    logs = [path for path in (log, victim.starts.with_name("file.log")) if path.exists()]
    before_kb = sum(path.stat().st_size for path in logs)
    with no_free_fd(pid):
        clients = []
        for _ in range(3):
            with suppress(OSError):
                clients.append(connect(victim.held, POLITE, 15.0))
        before = cpu_s(pid)
        time.sleep(10)
        share = (cpu_s(pid) - before) / 10
    began = time.monotonic()
    served = 0
    for client in clients:
        client.settimeout(5.0)
        served += echoed(client)
        client.close()
    took = time.monotonic() - began
    kb = (sum(path.stat().st_size for path in logs) - before_kb) / 1000
    victim.figures["EMFILE for 10 s: CPU, log, the queue"] = (
        f"{share * 100:.1f} %, {kb:.1f} kB, {served} of 3 after {took * 1000:.0f} ms"
    )
    victim.check(share < 0.05 and kb < 10, "EMFILE: 5 % of a core or more, or 10 kB of log")
    victim.check(served == 3 and took < 1.0, "EMFILE: the queue is not served within a second")


def one_datagram(victim: Victim) -> None:
    """C1: a program that never reads it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.sendto(b"x", ("127.0.0.1", victim.deaf))
    before = cpu_s(victim.accepts())
    time.sleep(10)
    starts, share = victim.starts.stat().st_size, (cpu_s(victim.accepts()) - before) / 10
    victim.figures["one datagram nobody reads: starts in 10 s, CPU"] = f"{starts}, {share * 100:.1f} %"
    victim.check(1 <= starts <= 10, f"one datagram: {starts} starts")


def slow_clients(victim: Victim) -> None:
    """A18 X13: 500 clients from one source that say nothing."""
    idle = []
    for _ in range(500):
        with suppress(OSError):
            idle.append(connect(victim.held, RUDE))
    began = time.monotonic()
    good = False
    with suppress(OSError), connect(victim.held, POLITE) as client:
        good = echoed(client)
    took = time.monotonic() - began
    text = f"{'served' if good else 'not served'} after {took * 1000:.0f} ms"
    victim.figures["500 silent clients from one source: another one"] = text
    victim.check(good and took < 1.0, "500 silent clients: another source is not served at once")
    for client in idle:
        client.close()


def refusals(victim: Victim) -> None:
    """B6: 20,000 that an access rule refuses."""
    name = "20,000 refused: memory, fds"
    if victim.refused is None:
        victim.figures[name] = "-"
        return

    def refuse(count: int) -> None:
        for _ in range(count):
            with suppress(OSError), connect(victim.refused or 0, RUDE) as client:
                client.recv(1)

    refuse(500)
    pid = victim.accepts()
    memory, fds = resident(pid), len(os.listdir(f"/proc/{pid}/fd"))
    refuse(20_000)
    grown, more = resident(pid) - memory, len(os.listdir(f"/proc/{pid}/fd")) - fds
    victim.figures[name] = f"{grown / 1e6:+.2f} MB, {more:+d}"
    victim.check(grown < 2e6 and more == 0, f"refusals: {grown} bytes and {more} fds more")


def resident(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize()


PARTS = (flood, slow_clients, refusals, one_datagram, no_descriptor)  # the last may end what it is done to


def run_beside() -> int:
    """Print the table; 1 if superd misses a figure."""
    if shutil.which("gcc") is None:
        print("no gcc: the service is a C program", file=sys.stderr)
        return 1
    rows: dict[str, dict[str, str]] = {}
    missed: list[str] = []
    with tempfile.TemporaryDirectory(prefix="superd-beside-") as directory:
        work = Path(directory)
        work.chmod(0o755)
        subprocess.run(["gcc", "-O2", "-o", str(work / "hello"), str(BENCH / "hello.c")], check=True)
        (work / "hello").chmod(0o755)
        packages = Path(os.environ.get("INTEROP_PKGS", "/tmp/superd-interop-pkgs"))
        superd = (sys.executable, "-I", "-m", "superd")
        bench = Bench(work, work / "hello", superd, (packages,) if peers.trusted(packages) else ())
        for name in STARTERS:
            try:
                with running(bench, name) as victim:
                    for part in PARTS:
                        part(victim)
            except Missing as error:
                print(f"{name} is left out: {error}", file=sys.stderr)
                missed += [str(error)] if name == "superd" else []
                continue
            for figure, text in victim.figures.items():
                rows.setdefault(figure, {})[name] = text
            missed += victim.missed if name == "superd" else []
    names = [name for name in STARTERS if any(name in row for row in rows.values())]
    print(f"| {' | '.join(['', *names])} |\n|{'---|' * (len(names) + 1)}")
    for figure, row in rows.items():
        print(f"| {' | '.join([figure, *(row.get(name, '-') for name in names)])} |")
    for what in missed:
        print(f"superd misses: {what}")
    return 1 if missed else 0
