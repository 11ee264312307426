"""The plan of faults: one function a row, `(trial, full) -> figures`; `full` has the plan's own lengths.

What is short also runs in `make test` (test_faults.py); the others only in `make faults` (run.py). Figures that miss
the row's own line stand in "failed", beside those that the trial finds.
"""

from __future__ import annotations

import os
import re
import resource
import select
import signal
import socket
import struct
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from faults.trial import SUPERCTL, Allowed, Figures, Trial, ms, within
from harness import (
    PYTHON,
    TIMEOUT_S,
    Superd,
    ask,
    cpu_s,
    descendants,
    fetch,
    injected,
    no_free_fd,
    read_all,
    toml,
    wait_gone,
)

RESET = struct.pack("ii", 1, 0)
LOOPBACK_TCP = "tcp:127.0.0.1:0"


@dataclass(frozen=True)
class Row:
    name: str
    title: str
    work: Callable[[Trial, bool], Figures]
    allowed: Allowed
    short: bool  # also a test of `make test`


ROWS: dict[str, Row] = {}


def row(name: str, title: str, *, short: bool = False, **allowed: object) -> Callable[[Callable], Callable]:  # type: ignore[type-arg]
    def add(work: Callable[[Trial, bool], Figures]) -> Callable[[Trial, bool], Figures]:
        ROWS[name] = Row(name, title, work, Allowed(**allowed), short)  # type: ignore[arg-type]
        return work

    return add


def check(figures: Figures, good: bool, problem: str) -> None:
    if not good:
        figures.setdefault("failed", []).append(problem)


def process_of(trial: Trial, service: str) -> int:
    """The pid of its newest process, as the log has it: the control socket says 0 until the spawner has answered."""
    pid: int = (
        trial.superd.wait_records(1, event="start", service=service)
        and [one["pid"] for one in trial.superd.find_records(event="start", service=service)][-1]
    )
    assert pid > 1
    return pid


def send(pid: int, signo: int) -> None:
    """A signal to one process: kill(2) with 0 or less would be one to many, ourselves among them."""
    assert pid > 1, pid
    os.kill(pid, signo)


def open_from(trial: Trial, service: str, source: str) -> socket.socket:
    host, port = trial.superd.address(service)
    return socket.create_connection((host, port), timeout=TIMEOUT_S, source_address=(source, 0))


@contextmanager
def meanwhile(work: Callable[[threading.Event], None]) -> Iterator[threading.Thread]:
    """`work` in a thread, which is told to stop at the end of the block."""
    stop = threading.Event()
    thread = threading.Thread(target=work, args=[stop], daemon=True)
    thread.start()
    try:
        yield thread
    finally:
        stop.set()
        thread.join(TIMEOUT_S)


@row("X1", "EMFILE at accept", superctl=False)
def x1(trial: Trial, full: bool) -> Figures:
    trial.begin()
    manager, length = trial.superd.manager, 10.0 if full else 2.0
    with trial.fault():
        with no_free_fd(manager):
            queued = [trial.superd.connect("session") for _ in range(3)]
            before = cpu_s(manager)
            trial.pause(length)
            share = (cpu_s(manager) - before) / length
        began = time.monotonic()
        served = [ask(client, b"x") for client in queued]
        took = time.monotonic() - began
        trial.pause(1.0)
    figures: Figures = {"cpu_%": round(share * 100, 1), "queue_ms": ms(took)}
    check(figures, share < 0.05, "more than 5 % of a core")
    check(figures, served == [b"x"] * 3 and took < 1.0, "the queue is not served within a second")
    return trial.end(figures)


@row("X2", "EMFILE at spawn, 1 to 8 fds left")
def x2(trial: Trial, full: bool) -> Figures:
    superd = trial.superd
    superd.write("poor", toml(listen=LOOPBACK_TCP, command=["/bin/cat"], user="root"))
    trial.begin()
    assert ask(superd.connect("poor"), b"x") == b"x"
    (spawner,) = [pid for pid in superd.pids()["superd-spawner"] if os.stat(f"/proc/{pid}").st_uid == 0]
    slowest, answered = 0.0, 0
    with trial.fault():
        for spare in range(9):
            with no_free_fd(spawner, spare):
                began = time.monotonic()
                try:
                    answered += ask(superd.connect("poor"), b"x") == b"x"
                except OSError:
                    pass  # closed: that is an answer too
                slowest = max(slowest, time.monotonic() - began)
    assert ask(superd.connect("poor"), b"x") == b"x"
    figures: Figures = {"served": f"{answered}/9", "slowest_ms": ms(slowest)}
    check(figures, slowest < 5.0, "a client waited more than 5 s")
    return trial.end(figures)


@row("X3", "ENFILE ENOBUFS ENOMEM EPERM EINVAL at accept", superctl=False)
def x3(trial: Trial, full: bool) -> Figures:
    trial.begin()
    figures: Figures = {}
    for error in ("ENFILE", "ENOBUFS", "ENOMEM", "EPERM", "EINVAL"):
        with trial.fault():
            with injected("strace", trial.superd.manager, f"accept4:error={error}:when=1..20"):
                client = trial.superd.connect("session")
                select.select([], [], [], 4.0 if full else 1.0)
            began = time.monotonic()
            good = ask(client, b"x") == b"x"
            took = time.monotonic() - began
        figures[error] = f"{ms(took):.0f} ms"
        check(figures, good and took < 2.0, f"{error}: {took:.1f} s to recover")
    return trial.end(figures)


@row("X4", "fork EAGAIN, ENOMEM")
def x4(trial: Trial, full: bool) -> Figures:
    superd = trial.superd
    superd.write("poor", toml(listen=LOOPBACK_TCP, command=["/bin/cat"], user="root"))
    superd.write("other", toml(listen=LOOPBACK_TCP, command=["/bin/cat"], user="daemon"))
    trial.begin()
    assert ask(superd.connect("poor"), b"x") == b"x"
    (spawner,) = [pid for pid in superd.pids()["superd-spawner"] if os.stat(f"/proc/{pid}").st_uid == 0]
    mark, clients, slowest = superd.mark(), 1000 if full else 20, 0.0
    with trial.fault():
        for error in ("EAGAIN", "ENOMEM"):
            with injected("strace", spawner, *(f"{call}:error={error}" for call in ("vfork", "clone", "clone3"))):
                for _ in range(clients):
                    began = time.monotonic()
                    try:
                        ask(superd.connect("poor"), b"x")
                    except OSError:
                        pass
                    slowest = max(slowest, time.monotonic() - began)
                assert ask(superd.connect("other"), b"x") == b"x"
    assert ask(superd.connect("poor"), b"x") == b"x"
    lines = len(superd.find_records(after=mark, service="poor", event="message"))
    figures: Figures = {"clients": 2 * clients, "lines": lines, "slowest_ms": ms(slowest)}
    check(figures, lines <= 20, f"{lines} lines for two errors")
    check(figures, slowest < 5.0, "a client waited more than 5 s")
    return trial.end(figures)


@row("X5", "RLIMIT_AS of the manager +20 MB, then +0", short=True, superctl=False, witness_fails=20)
def x5(trial: Trial, full: bool) -> Figures:  # X5 F20
    superd = trial.superd
    trial.begin()
    manager = superd.manager
    figures: Figures = {}
    for spare in (20 << 20, 0):
        size = int(Path(f"/proc/{manager}/statm").read_text().split()[0]) * resource.getpagesize()
        limits = resource.prlimit(manager, resource.RLIMIT_AS)
        with trial.fault():
            resource.prlimit(manager, resource.RLIMIT_AS, (size + spare, limits[1]))
            try:
                for number in range(200):
                    superd.write(f"more{number}", toml(run="once", enabled=False, command=["/bin/true"]))
                clients = [superd.connect("session") for _ in range(60)]
                for client in clients:
                    client.close()
                send(superd.pid, signal.SIGHUP)
                trial.pause(3.0 if full else 0.5)
            finally:
                if manager == superd.manager:
                    resource.prlimit(manager, resource.RLIMIT_AS, limits)
            took = within(5.0, lambda: ask(superd.connect("witness"), b"x") == b"x")
        figures[f"+{spare >> 20}MB_back_ms"] = ms(took or 5.0)
        check(figures, took is not None and took < 2.0, "does not recover")
        check(figures, superd.manager == manager, "the manager has ended")
        manager = superd.manager
    for number in range(200):
        (superd.conf / "conf.d" / f"more{number}.toml").unlink()
    superd.call("Reload")
    trial.pause(0.5)
    return trial.end(figures)


TAKES_ALL = """
import os, socket
s = socket.socket(fileno=3)
while True:
    s.accept()[0].sendall(b"%d" % os.getpid())
"""


@row("X6", "kill -9 of children, ten a second", short=True)
def x6(trial: Trial, full: bool) -> Figures:  # X6 E3 G18
    superd, length = trial.superd, 60.0 if full else 1.5
    superd.write("victim", toml(listen=LOOPBACK_TCP, command=["/bin/cat"]))
    waiting = [PYTHON, "-I", "-c", TAKES_ALL]
    superd.write("wait", toml(listen=LOOPBACK_TCP, run="on-demand", command=waiting))
    trial.begin()
    ends: list[float] = []
    backs: list[float] = []
    until, number = time.monotonic() + length, 0
    with trial.fault():
        while time.monotonic() < until:
            with superd.connect("victim") as client:
                client.sendall(b"x")
                assert client.recv(1) == b"x"
                record = superd.wait_records(number + 1, event="start", service="victim")[-1]
                began = time.monotonic()
                send(record["pid"], signal.SIGKILL)
                assert client.recv(1) == b""
                ends.append(time.monotonic() - began)
            if number % 10 == 0:
                pid = int(fetch(superd.connect("wait")))
                began = time.monotonic()
                send(pid, signal.SIGKILL)
                wait_gone(pid)
                assert int(fetch(superd.connect("wait"))) != pid
                backs.append(time.monotonic() - began)
            number += 1
            trial.pause(max(0.0, 0.1 - (time.monotonic() - began)))
    figures: Figures = {"killed": len(ends), "eof_ms": ms(max(ends)), "back_ms": ms(max(backs))}
    limit = 0.1 if full else 1.0  # a test shares its machine with others
    check(figures, max(ends) < limit, "a client saw the end late")
    check(figures, max(backs) < 31.0, "the service that waits came back later than its delay")
    superd.call("Stop", names=["wait"])
    return trial.end(figures)


@row("X7", "kill -9 of the manager, under load", superctl=False, witness_fails=1)
def x7(trial: Trial, full: bool) -> Figures:
    superd = trial.superd
    superd.write("wait", toml(listen=LOOPBACK_TCP, run="on-demand", command=[PYTHON, "-I", "-c", TAKES_ALL]))
    trial.begin()
    pid = fetch(superd.connect("wait"))
    slowest = 0.0
    with trial.fault():
        for _ in range(20 if full else 3):
            mark = superd.mark()
            superd.kill_role("superd-manager")
            began = time.monotonic()
            assert ask(superd.connect("witness"), b"x") == b"x"
            slowest = max(slowest, time.monotonic() - began)
            superd.wait_record(after=mark, message=re.compile("took over"))
            assert fetch(superd.connect("wait")) == pid  # the same, and only one
            trial.pause(0.5)  # one that ends at once is followed with a growing delay
    superd.call("Stop", names=["wait"])
    figures: Figures = {"slowest_ms": ms(slowest)}
    check(figures, slowest < 2.0, "serves later than after 2 s")
    return trial.end(figures)


@row("X8", "SIGSTOP of the manager with 300 queued", superctl=False)
def x8(trial: Trial, full: bool) -> Figures:
    superd = trial.superd
    superd.write("queue", toml(listen=LOOPBACK_TCP, command=["/bin/cat"], limits={"max_connections": 32}))
    trial.begin()
    manager = superd.manager
    with trial.fault():
        send(manager, signal.SIGSTOP)
        clients = [superd.connect("queue") for _ in range(300)]
        trial.pause(30.0 if full else 2.0)
        send(manager, signal.SIGCONT)
        began = time.monotonic()
        served = sum(ask(client, b"x") == b"x" for client in clients)
        took = time.monotonic() - began
        trial.pause(1.0)
    figures: Figures = {"served": served, "took_ms": ms(took)}
    check(figures, served == 300 and took < 5.0, "not all served within 5 s")
    check(figures, superd.manager == manager, "the manager was replaced")
    return trial.end(figures)


@row("X9", "SIGSTOP of services", short=True)
def x9(trial: Trial, full: bool) -> Figures:  # X9
    superd = trial.superd
    talks = ["/bin/sh", "-c", "while :; do echo tick; sleep 0.1; done"]
    superd.write("talks", toml(run="always-on", command=talks))
    superd.write("other", toml(listen=LOOPBACK_TCP, command=["/bin/cat"]))
    trial.begin()
    pid = superd.status("talks")["pid"]
    with superd.connect("other") as client:
        client.sendall(b"x")
        assert client.recv(1) == b"x"
        held = process_of(trial, "other")
        for one in (pid, held):
            send(one, signal.SIGSTOP)
        trial.pause(30.0 if full else 1.0)  # not a fault that may make anybody slow
        assert ask(superd.connect("other"), b"y") == b"y"
        for one in (pid, held):
            send(one, signal.SIGCONT)
        client.sendall(b"z")
        assert client.recv(1) == b"z"
    figures: Figures = {}
    mark = superd.mark()
    superd.wait_record(after=mark, event="output", service="talks")
    check(figures, superd.status("talks")["pid"] == pid, "the service was restarted")
    return trial.end(figures)


FAKETIME = "/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1"
JUMPS = ("+3650d", "-3650d", "@1970-01-02 00:00:00", "+0d x100", "+0d")


@row("X12", "wall clock +10 y, -10 y, 1970, ×100", short=True)
def x12(trial: Trial, full: bool) -> Figures:  # X12 M1 M2 M4
    """The clock of all three roles and their services; the monotonic one stays as it is, as it does on a machine."""
    superd = trial.superd
    clock = superd.dir / "clock"
    clock.write_text("+0d\n")
    faked = {
        "LD_PRELOAD": FAKETIME,
        "FAKETIME_TIMESTAMP_FILE": str(clock),
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }
    ticks = "import time\nwhile True: time.sleep(1000)"
    superd.write("stays", toml(run="always-on", watchdog="off", command=[PYTHON, "-I", "-c", ticks]))
    health = {"check": "exec:/bin/true", "every": "300ms", "failures": 1}
    superd.write("healthy", toml(run="always-on", command=[PYTHON, "-I", "-c", ticks], health=health))
    superd.write("rated", toml(listen=LOOPBACK_TCP, command=["/bin/cat"], limits={"rate": "5/300ms"}))
    failing = toml(run="always-on", restart_delay="100ms", restart_delay_max="100ms", command=["/bin/false"])
    superd.write("fails", failing)
    superd.write("wait", toml(listen=LOOPBACK_TCP, run="on-demand", command=["/bin/sleep", "1000"]))
    trial.begin(environment=os.environ | faked)
    jumped = set()
    figures: Figures = {}
    mark = superd.mark()
    for jump in JUMPS if full else JUMPS[:2]:
        fresh = clock.with_name("fresh")
        fresh.write_text(f"{jump}\n")
        fresh.replace(clock)
        before, began = superd.mark(), time.monotonic()
        records = superd.wait_records(3, after=before, timeout=5.0, event="start", service="fails")
        took = time.monotonic() - began
        jumped.add(records[-1]["time"][:4])
        check(figures, 0.15 < took < 3.0, f"{jump}: three restarts 0.1 s apart took {took:.2f} s")
        if full:
            trial.pause(3.0)
        began = time.monotonic()
        for _ in range(6):  # more than a window has room for
            assert ask(superd.connect("rated"), b"x") == b"x"
        took = time.monotonic() - began
        check(figures, took < 3.0, f"{jump}: six clients at 5/300ms took {took:.2f} s")
    for name in ("stays", "healthy"):
        count = len(superd.find_records(after=mark, event=re.compile("^(start|exit)$"), service=name))
        check(figures, not count, f"{name}: {count} starts or exits")
    check(figures, len(jumped) >= (3 if full else 2), f"the clock was not faked: {jumped}")
    figures["years"] = " ".join(sorted(jumped))
    superd.call("Stop", names=["fails"])
    return trial.end(figures)


@row("X13", "500 idle clients from 4 sources")
def x13(trial: Trial, full: bool) -> Figures:
    superd = trial.superd
    limits = {"max_connections": 600, "max_per_source": 100}
    superd.write("slow", toml(listen="tcp4:0", command=["/bin/cat"], limits=limits))
    trial.begin()
    before = superd.call("Health") and memory(superd.manager)
    with trial.fault():
        clients = [open_from(trial, "slow", f"127.0.0.{2 + number % 4}") for number in range(500)]
        within(20.0, lambda: superd.status("slow")["now"] >= 400)
        trial.pause(1.0)
    each = (memory(superd.manager) - before) / 400
    began = time.monotonic()
    with open_from(trial, "slow", "127.0.0.9") as client:
        client.sendall(b"x")
        good = client.recv(1) == b"x"
    took = time.monotonic() - began
    figures: Figures = {"now": superd.status("slow")["now"], "polite_ms": ms(took), "kB_each": round(each / 1000, 1)}
    trial.pause(5.0 if full else 0.0)
    with trial.fault():
        for client in clients:
            client.close()
        superd.wait_for("slow", "idle")
    check(figures, good and took < 1.0, "another source is not served within a second")
    check(figures, each < 20_000, f"{each / 1000:.0f} kB for each session")
    return trial.end(figures)


def memory(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize()


FLOOD = """
import random, socket, struct, sys, time
port, count, length = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
began, open_ = time.monotonic(), []
for number in range(count):
    s = socket.socket(); s.settimeout(5); s.bind(("127.0.0.2", 0))
    try:
        s.connect(("127.0.0.1", port))
        if number % 3 == 0: s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    except OSError: pass
    s.close()
    time.sleep(max(0, began + length * number / count - time.monotonic()))
"""


@row("X14", "connection flood from one source", short=True)
def x14(trial: Trial, full: bool) -> Figures:  # X14 B2
    superd = trial.superd
    limits = {"max_connections": 64, "max_per_source": 16, "rate_per_source": "100/1s"}
    superd.write("flooded", toml(listen="tcp4:127.0.0.1:0", command=["/bin/cat"], limits=limits))
    trial.begin()
    count, length = (5000, 5.0) if full else (1000, 1.5)
    port = superd.address("flooded")[1]
    took: list[float] = []
    lost = 0
    flood = subprocess.Popen([PYTHON, "-I", "-c", FLOOD, str(port), str(count), str(length)])
    with trial.fault():
        while flood.poll() is None:
            began = time.monotonic()
            try:
                lost += ask(open_from(trial, "flooded", "127.0.0.3"), b"polite") != b"polite"
            except OSError:
                lost += 1
            took.append(time.monotonic() - began)
            trial.pause(0.02)
        began = time.monotonic()
        assert ask(open_from(trial, "flooded", "127.0.0.3"), b"x") == b"x"
        after = time.monotonic() - began
    superd.wait_for("flooded", "idle")
    figures: Figures = {"polite": len(took), "lost": lost, "polite_p99_ms": ms(sorted(took)[int(len(took) * 0.99)])}
    check(figures, lost <= len(took) // 100, f"{lost} of {len(took)} polite clients lost")
    check(figures, sorted(took)[int(len(took) * 0.99)] < 1.0, "p99 of the polite source is a second or more")
    check(figures, after < 2.0, f"recovered after {after:.1f} s")
    return trial.end(figures)


@row("X15", "20,000 datagrams to a program that never reads", short=True)
def x15(trial: Trial, full: bool) -> Figures:  # X15 C1 B7
    superd = trial.superd
    superd.write("deaf", toml(listen="udp4:127.0.0.1:0", run="on-demand", command=["/bin/true"]))
    trial.begin()
    address = superd.address("deaf")
    count, length = (20_000, 2.0) if full else (5_000, 0.5)
    mark, manager = superd.mark(), superd.manager
    with trial.fault():
        began = time.monotonic()
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            for number in range(count):
                sender.sendto(b"x", address)
                if number % 100 == 0:
                    select.select([], [], [], max(0.0, began + length * number / count - time.monotonic()))
        trial.pause(8.0 if full else 1.0)
        seconds = time.monotonic() - began
        starts = len(superd.find_records(after=mark, event="start", service="deaf"))
        trial.pause(0.5)
        before = cpu_s(manager)
        trial.pause(1.0)
        share = cpu_s(manager) - before
    figures: Figures = {"starts": starts, "seconds": round(seconds, 1), "cpu_%": round(share * 100, 1)}
    check(figures, starts <= 12, f"{starts} starts in {seconds:.0f} s")
    # The witness's 20 connections a second and superctl's questions cost about a tenth of a core themselves.
    check(figures, share < 0.3, f"{share * 100:.0f} % of a core afterwards")
    superd.call("Stop", names=["deaf"])
    return trial.end(figures)


BOMB = """
import os, time
while True:
    try: os.fork()
    except OSError: time.sleep(0.05)
"""


@row("X16", "fork bomb, RLIMIT_NPROC 60", short=True, slow_inside_s=1.0)
def x16(trial: Trial, full: bool) -> Figures:  # X16 N4
    superd = trial.superd
    limits = {"rlimit": {"nproc": 200 if full else 60}, "scheduling": {"nice": 19}}
    bomb = toml(run="always-on", enabled=True, user="games", stop_timeout="1s", command=[PYTHON, "-I", "-c", BOMB])
    trial.begin()
    superd.write("bomb", bomb + toml(**limits))
    with trial.fault():
        superd.call("Reload")
        within(10.0, lambda: len(superd.services()) >= (150 if full else 50))
        most = len(superd.services())
        trial.pause(2.0 if full else 0.5)
        began = time.monotonic()
        superd.call("Stop", names=["bomb"])
        took = within(10.0, lambda: not owned_by("games", superd)) or 10.0
        took = max(took, time.monotonic() - began)
    figures: Figures = {"processes": most, "stop_ms": ms(took)}
    check(figures, took < 5.0, f"stopped after {took:.1f} s")
    return trial.end(figures)


def owned_by(user: str, superd: Superd) -> list[int]:
    import pwd

    uid, found = pwd.getpwnam(user).pw_uid, []
    for pid in superd.services():
        try:
            if os.stat(f"/proc/{pid}").st_uid == uid:
                found.append(pid)
        except OSError:
            continue
    return found


@row("X17", "memory hog, RLIMIT_AS 256 MB")
def x17(trial: Trial, full: bool) -> Figures:  # X17 N5
    """Without a memory cgroup: the hog hits its own limit, is reported and started again, superd is not touched."""
    superd = trial.superd
    code = "x = []\nwhile True: x.append(bytearray(1 << 24))"
    keys = {"restart_delay": "300ms", "command": [PYTHON, "-I", "-c", code], "rlimit": {"as": "256M"}}
    trial.begin()
    superd.write("hog", toml(run="always-on", **keys))
    with trial.fault():
        superd.call("Reload")
        record = superd.wait_record(event="exit", service="hog")
        superd.wait_records(2, event="start", service="hog")
        superd.call("Stop", names=["hog"])
    figures: Figures = {"status": record.get("status")}
    check(figures, record.get("status") == 1, f"{record}")
    scores = [Path(f"/proc/{pid}/oom_score_adj").read_text().strip() for pid in (superd.pid, superd.manager)]
    figures["oom_score_adj"] = " ".join(scores)
    return trial.end(figures)


NOISE = """
import os
line, left = b"x" * 999 + b"\\n", int(os.environ["MB"]) << 20
data = line * 60 if os.environ["LINES"] == "1" else b"y" * 60000
while left > 0: left -= os.write(1, data)
"""


@row("X18", "log flood, and a line without an end", slow_s=0.2, grown_bytes=8e6)
def x18(trial: Trial, full: bool) -> Figures:
    """The ring of each service that talks may grow to its 1 MiB."""
    superd, size = trial.superd, 50 if full else 5
    trial.begin()
    before = memory(superd.manager)
    for number in range(4):
        environment = {"MB": str(size), "LINES": "1" if number < 3 else "0"}
        keys = {"run": "once", "stdout": "log", "command": [PYTHON, "-I", "-c", NOISE], "environment": environment}
        superd.write(f"noise{number}", toml(**keys))
    with trial.fault():
        superd.call("Reload")
        for number in range(4):
            superd.wait_record(event="exit", service=f"noise{number}", timeout=300.0)
        peak = memory(superd.manager) - before
    superd.records = [one for one in superd.records if not str(one.get("service", "")).startswith("noise")]
    superd.lines = []
    figures: Figures = {"MB": 4 * size, "grown_MB": round(peak / 1e6, 1)}
    check(figures, peak < 8e6, f"the manager grew by {peak / 1e6:.1f} MB")
    return trial.end(figures)


@row("X19", "a stopped reader of logs", grown_bytes=8e6)
def x19(trial: Trial, full: bool) -> Figures:
    superd = trial.superd
    talks = ["/bin/sh", "-c", "while :; do echo tick tick tick tick tick tick; done | head -c 3000000; sleep 1000"]
    trial.begin()
    before = memory(superd.manager)
    reader = subprocess.Popen([*SUPERCTL, "-s", superd.control, "logs", "-f"], stdout=subprocess.PIPE)
    assert reader.stdout is not None
    try:
        superd.write("talks", toml(run="always-on", command=talks))
        superd.call("Reload")
        reader.stdout.read(1000)
        os.kill(reader.pid, signal.SIGSTOP)
        trial.pause(60.0 if full else 3.0)
        grown = memory(superd.manager) - before
    finally:
        reader.kill()
        reader.communicate()
    figures: Figures = {"grown_MB": round(grown / 1e6, 1)}
    check(figures, grown < 8e6, "the manager grew")
    superd.call("Stop", names=["talks"])
    superd.lines = []
    return trial.end(figures)


@row("X20", "churn in conf.d", short=True)
def x20(trial: Trial, full: bool) -> Figures:  # X20 K3 K4 K6
    superd = trial.superd
    path = superd.write("edited", toml(listen=LOOPBACK_TCP, command=["/bin/cat"], description="0"))
    other = superd.write("other", toml(run="always-on", command=["/bin/sleep", "1000"]))
    trial.begin()
    pid, mark = superd.status("other")["pid"], superd.mark()
    text = path.read_text()
    session = superd.connect("edited")
    session.sendall(b"x")
    assert session.recv(1) == b"x"
    figures: Figures = {}

    def settled(description: str) -> None:
        def found() -> bool:
            rows = superd.call("Status", names=["edited"])["services"]
            return rows[0].get("description") == description

        took = within(5.0, found)
        check(figures, took is not None and took < 2.0, f"{description}: in force after {took} s")
        figures[description] = f"{ms(took or 5.0):.0f} ms"

    with trial.fault():
        names = [path.with_name("edited~"), path.with_name(".edited.swp")]
        for number in range(10_000 if full else 1000):  # of a file nobody reads, and of one that is read
            path.with_name(f"churn{number % 2}.bak").write_text("x")
            os.replace(path.with_name(f"churn{number % 2}.bak"), names[number % 2])
        for name in names:
            name.unlink(missing_ok=True)
        for number in range(1000 if full else 20):  # atomic
            fresh = path.with_name("fresh")
            fresh.write_text(text.replace('"0"', f'"r{number}"'))
            fresh.replace(path)
        settled(f"r{number}")
        slow = text.replace('"0"', '"bytes"').encode()
        with path.open("wb", buffering=0) as file:  # an editor that writes in place, a byte at a time
            for byte in slow:
                file.write(bytes([byte]))
        settled("bytes")
        path.rename(path.with_name("edited.toml~"))  # vim: the old one aside, a new one in its place
        path.write_text(text.replace('"0"', '"vim"'))
        path.with_name("edited.toml~").unlink()
        settled("vim")
        subprocess.run(["sed", "-i", "s/vim/sed/", str(path)], check=True)
        settled("sed")
        path.with_name("#edited.toml#").write_text("half a li")  # emacs: autosave, and a lock that points nowhere
        os.symlink("user@host.1234", path.with_name(".#edited.toml"))
        path.write_text(text.replace('"0"', '"emacs"'))
        path.with_name(".#edited.toml").unlink()
        path.with_name("#edited.toml#").unlink()
        settled("emacs")
    session.sendall(b"y")
    check(figures, session.recv(1) == b"y", "a session was cut")
    session.close()
    stops = superd.find_records(after=mark, event="exit", service="other")
    check(figures, not stops and superd.status("other")["pid"] == pid, "another service was stopped")
    assert other.exists()
    return trial.end(figures)


@row("X21", "reload storm", short=True, log_bytes=300_000)  # each reload is asked for by somebody, and that is logged
def x21(trial: Trial, full: bool) -> Figures:  # X21 K7 K8 K9 G16
    superd = trial.superd
    path = superd.write("changing", toml(listen=LOOPBACK_TCP, command=["/bin/cat"], limits={"max_connections": 40}))
    trial.begin()
    text = path.read_text()
    sessions = [superd.connect("changing") for _ in range(20)]
    for client in sessions:
        client.sendall(b"x")
        assert client.recv(1) == b"x"
    refused = connects = 0

    def connect(stop: threading.Event) -> None:
        nonlocal refused, connects
        while not stop.wait(0.02):
            connects += 1
            try:
                refused += ask(superd.connect("changing"), b"x") != b"x"
            except OSError:
                refused += 1

    with trial.fault(), meanwhile(connect):
        for number in range(1000 if full else 60):
            superd.write("changing", text.replace("40", str(40 + number % 7)))
            superd.call("Reload")
    cut = 0
    for client in sessions:
        client.sendall(b"y")
        cut += client.recv(1) != b"y"
        client.close()
    figures: Figures = {"connects": connects, "refused": refused, "cut": cut}
    check(figures, not refused and not cut, "a reload was noticed")
    superd.wait_for("changing", "idle")
    return trial.end(figures)


@row("X23", "200 silent and 200 garbage control clients", short=True)
def x23(trial: Trial, full: bool) -> Figures:  # X23 J4
    """Of a user who may connect and may ask for nothing: root's superctl is not kept waiting by them."""
    superd = trial.superd
    superd.write_daemon('control_mode = "0666"\n')
    trial.begin()
    code = (
        "import os, socket, sys\nos.setgid(65534); os.setuid(65534)\nkept = []\n"
        "for number in range(400):\n"
        "    s = socket.socket(socket.AF_UNIX); s.settimeout(2)\n"
        "    try:\n"
        "        s.connect(sys.argv[1])\n"
        "        if number % 2: s.send(os.urandom(3000))\n"
        "    except OSError: pass\n"
        "    kept.append(s)\n"
        "print('all', flush=True)\nsys.stdin.read()\n"
    )
    argv = [PYTHON, "-I", "-c", code, superd.control.removeprefix("unix:")]
    with trial.fault():
        flood = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert flood.stdout is not None
        flood.stdout.readline()
        slowest = 0.0
        for _ in range(3):
            began = time.monotonic()
            superd.call("Health")
            slowest = max(slowest, time.monotonic() - began)
        trial.pause(10.0 if full else 0.7)
        flood.communicate(b"")
    figures: Figures = {"slowest_ms": ms(slowest)}
    check(figures, slowest < 1.0, "root's superctl waits")
    return trial.end(figures)


NOTIFIES = """
import os, socket, time
s = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM); s.connect(os.environ["NOTIFY_SOCKET"])
fds = [os.open("/dev/null", os.O_RDONLY) for _ in range(200)]
s.send(b"READY=1")
until, number = time.monotonic() + float(os.environ["SECONDS"]), 0
while time.monotonic() < until:
    if number % 50 == 0: socket.send_fds(s, [b"FDSTORE=1\\nFDNAME=x"], fds)
    else: s.send(b"STATUS=%d" % number)
    number += 1
time.sleep(1000)
"""


@row("X24", "notify flood with descriptors")
def x24(trial: Trial, full: bool) -> Figures:
    superd = trial.superd
    environment = {"SECONDS": "10" if full else "1.5"}
    command = [PYTHON, "-I", "-c", NOTIFIES]
    trial.begin()
    superd.write("flooder", toml(run="always-on", ready="notify", environment=environment, command=command))
    with trial.fault():
        superd.call("Reload")
        superd.wait_for("flooder", "ready")
        trial.pause(10.0 if full else 1.5)
        began = time.monotonic()
        quick = 'import os, socket; s = socket.socket(1, 2); s.connect(os.environ["NOTIFY_SOCKET"]); s.send(b"READY=1")'
        superd.write("quick", toml(run="once", ready="notify", command=[PYTHON, "-I", "-c", quick]))
        superd.call("Reload")
        superd.wait_record(event="ready", service="quick")
        took = time.monotonic() - began
    superd.call("Stop", names=["flooder"])
    for name in ("flooder", "quick"):
        (superd.conf / "conf.d" / f"{name}.toml").unlink()
    superd.call("Reload")
    figures: Figures = {"other_ready_ms": ms(took)}
    check(figures, took < 2.0, "another service was ready late")
    return trial.end(figures)


@row("X25", "TERM under fire", short=False)
def x25(trial: Trial, full: bool) -> Figures:
    """Its own daemons: the load that the others have ends with them."""
    figures: Figures = {}

    def serve(superd: Superd) -> None:
        superd.garbage_expected = True
        superd.write("cat", toml(listen="tcp4:127.0.0.1:0", command=["/bin/cat"], stop_timeout="2s"))
        superd.write("noise", toml(run="always-on", command=["/bin/sh", "-c", "while :; do echo noise; done"]))
        superd.write_daemon('stop_timeout = "5s"\n')
        superd.start()

    def kills(superd: Superd, stop: threading.Event) -> None:
        while not stop.wait(0.05):
            for pid in superd.services()[:3]:
                with_signal(pid)

    def connects(superd: Superd, stop: threading.Event) -> None:
        address = superd.address("cat")
        kept: list[socket.socket] = []
        while not stop.wait(0.005):
            try:
                kept.append(socket.create_connection(address, timeout=1))
            except OSError:
                continue
            if len(kept) > 30:
                kept.pop(0).close()
        for client in kept:
            client.close()

    def churns(superd: Superd, stop: threading.Event) -> None:
        number = 0
        while not stop.wait(0.02):
            superd.write(f"c{number % 5}", toml(run="always-on", command=["/bin/sleep", str(1000 + number)]))
            number += 1

    def nothing(superd: Superd, stop: threading.Event) -> None:
        stop.wait()

    for name, load in (("kills", kills), ("flood", connects), ("log", nothing), ("churn", churns)):
        with Superd() as superd:
            serve(superd)
            with meanwhile(lambda stop, load=load, superd=superd: load(superd, stop)):  # type: ignore[misc]
                trial.pause(1.0)
                began = time.monotonic()
                try:
                    superd.stop(timeout=20.0)
                except AssertionError as error:
                    check(figures, False, f"{name}: {str(error)[:200]}")
                took = time.monotonic() - began
            figures[name] = f"{took:.1f} s"
            check(figures, took < 7.0, f"{name}: {took:.1f} s")
    return figures


def with_signal(pid: int) -> None:
    try:
        if pid > 1:
            os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


# System calls that superd makes and an interpreter that starts does not; reads of the standard library are not ours.
OURS = (
    "socket,bind,listen,setsockopt,getsockopt,getsockname,sendmsg,recvmsg,sendto,recvfrom,connect,accept4,socketpair,"
    "epoll_create1,epoll_ctl,eventfd2,inotify_init1,inotify_add_watch,pipe2,prctl,pidfd_open,pidfd_send_signal,"
    "clone,clone3,fork,vfork,setsid,fchmod,fchmodat,chdir,setrlimit,mkdir,unlink,rename,umask,signalfd4,timerfd_create,"
    "setgroups,setgid,setuid,setresuid,setresgid,kill,flock,execve,poll,waitid"
)


@row("X26", "EIO, EMFILE, ENOMEM at the N-th call of each system call", short=True)
def x26(trial: Trial, full: bool) -> Figures:  # X26
    """Each start is clean, or ends with a message and a status; so does the stop. No hang, no traceback, nobody left.

    strace(1) counts for each process and each system call by itself: in one run the N-th of all of them fail, again in
    each manager that follows. From N = 24 on there is nothing left to fail.
    """
    figures: Figures = {}
    runs = [(error, number) for error in ("EIO", "EMFILE", "ENOMEM") for number in range(1, 24)]
    ended = Counter(_start_with_injection(figures, error, number) for error, number in (runs if full else SOME_OF_X26))
    figures |= {"runs": ended.total()} | dict(ended)
    return figures


SOME_OF_X26 = (("EIO", 3), ("EIO", 8), ("EIO", 13), ("EMFILE", 4))  # trio, its epoll, a listener; a wake-up pipe


def _start_with_injection(figures: Figures, error: str, number: int) -> str:
    """How it came out: "clean", "ended" by itself or "stopped" with a message and status 1."""
    with Superd() as superd:
        superd.garbage_expected = True
        superd.write("cat", toml(listen=f"unix:{superd.dir}/x.sock", command=["/bin/cat"]))
        superd.write("stays", toml(listen=LOOPBACK_TCP, run="always-on", command=["/bin/sleep", "1000"]))
        inject = f"inject={OURS}:error={error}:when={number}"
        superd.launch(wrapper=["strace", "-f", "-qq", "-o", "/dev/null", "-e", f"trace={OURS}", "-e", inject])
        result, problem = "clean", ""
        try:
            superd.wait_line(re.compile(r"ready: \d+ services?"))
        except AssertionError:
            result, code = "ended", status_of(superd)
            problem = "" if code == 1 and superd.lines else f"neither ready nor ended with 1: {code}"
        try:
            superd.stop(timeout=30.0)
        except AssertionError as error_:
            result = "stopped"
            problem = "" if "ended with 1," in str(error_) else str(error_)[:200]
        check(figures, not problem, f"{error} {number}: {problem}")
        # An interpreter that cannot read its library says so in its own way.
        if any("Traceback" in line for line in superd.lines) and "importlib._bootstrap" not in superd.log():
            check(figures, False, f"{error} {number}: a traceback: {superd.log()[-600:]}")
        return result


def status_of(superd: Superd) -> int | None:
    """Its exit status; None when it does not end."""
    try:
        return superd.wait_exit(timeout=30.0)
    except subprocess.TimeoutExpired:
        return None


@row("X27", "kill -9 of all roles at any point", short=True)
def x27(trial: Trial, full: bool) -> Figures:  # X27 G17 D4
    """Then a start on the same paths: it serves, and nobody has to clean up."""
    figures: Figures = {}
    points, slowest = (50, 0.0) if full else (3, 0.0)
    with Superd() as superd:
        superd.garbage_expected = True
        path = superd.dir / "x.sock"
        superd.write("cat", toml(listen=f"unix:{path}", command=["/bin/cat"]))
        superd.write("stays", toml(run="always-on", command=["/bin/sleep", "1000"]))
        for point in range(points):
            superd.launch()
            trial.pause(1.2 * point / points)
            if point % 3 == 1:
                send(superd._process.pid, signal.SIGHUP if point % 2 else signal.SIGTERM)  # type: ignore[union-attr]
                trial.pause(0.02 * (point % 7))
            assert superd._process is not None
            roles = [superd._process.pid, *descendants(superd._process.pid)]
            for pid in roles:
                with_signal(pid)
            superd.kill()
            superd.lines.clear()
            superd.records.clear()
            began = time.monotonic()
            superd.start()
            took = time.monotonic() - began
            slowest = max(slowest, took)
            assert ask(superd.connect("cat"), b"x") == b"x"
            superd.stop()
    figures |= {"points": points, "start_ms": ms(slowest)}
    check(figures, slowest < 5.0, "a start took more than 5 s")
    return figures


TINY = """
echo 400 >/proc/sys/kernel/pid_max || exit 99
exec "$@"
"""


@row("X29", "a pid space of 400, restart loops", short=True)
def x29(trial: Trial, full: bool) -> Figures:  # X29 F15 N9 G7
    """Pids come round many times: a bystander in the same space keeps running, statuses stay with their services."""
    figures: Figures = {}
    wanted = 5000 if full else 500
    with Superd() as superd:
        superd.garbage_expected = True
        keys = {"run": "always-on", "restart": "always", "restart_delay": "1ms", "restart_delay_max": "2ms"}
        for status in range(4):
            superd.write(f"quick{status}", toml(**keys, command=["/bin/sh", "-c", f"exit {status}"]))
        superd.write("stays", toml(run="always-on", command=["/bin/sleep", "1000"]))
        unshare = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child=KILL", "/bin/sh", "-c"]
        superd.launch(wrapper=[*unshare, f"sleep 1000 & {TINY}", "sh"])
        superd.wait_record(event="start", service="stays")
        bystanders = [
            pid for pid in superd.services() if Path(f"/proc/{pid}/cmdline").read_bytes() == b"sleep\x001000\x00"
        ]
        for status in range(4):
            exits = superd.wait_records(wanted // 4, timeout=300.0, event="exit", service=f"quick{status}")
            check(figures, {one.get("status") for one in exits} == {status}, f"quick{status}: other statuses")
        pids = [one["pid"] for one in superd.find_records(event="start")]
        figures |= {"starts": len(pids), "highest_pid": max(pids)}
        check(figures, max(pids) < 400, "the pid space is not small")
        check(figures, not superd.find_records(event="exit", service="stays"), "another service was ended")
        for pid in bystanders:
            check(figures, Path(f"/proc/{pid}").exists(), "the bystander was ended")
        superd.kill()
    return figures


@row("X30", "four hogs, superd at nice 10", slow_s=2.0, superctl=False)
def x30(trial: Trial, full: bool) -> Figures:
    superd = trial.superd
    code = (
        "import os, socket, time\ns = socket.socket(1, 2); s.connect(os.environ['NOTIFY_SOCKET']); s.send(b'READY=1')\n"
        "while True: s.send(b'WATCHDOG=1'); time.sleep(0.2)"
    )
    superd.write("alive", toml(run="always-on", ready="notify", watchdog="2s", command=[PYTHON, "-I", "-c", code]))
    trial.begin(preexec=lambda: os.nice(10))  # type: ignore[arg-type]
    mark = superd.mark()
    hogs = [subprocess.Popen([PYTHON, "-I", "-c", "while True: pass"]) for _ in range(4)]
    try:
        with trial.fault():
            trial.pause(10.0 if full else 2.0)
    finally:
        for hog in hogs:
            hog.kill()
            hog.wait()
    figures: Figures = {"exits": len(superd.find_records(after=mark, event="exit", service="alive"))}
    check(figures, not figures["exits"], "the watchdog ended a service that was well")
    return trial.end(figures)


def soak(trial: Trial, seconds: float) -> Figures:  # X28
    """Children killed, a reload every ten seconds, 20 connections a second: memory and descriptors stay."""
    superd = trial.superd
    path = superd.write("victim", toml(listen=LOOPBACK_TCP, command=["/bin/cat"], limits={"max_connections": 40}))
    text = path.read_text()
    trial.begin()
    began, samples, number = time.monotonic(), [], 0
    while time.monotonic() - began < seconds:
        for _ in range(20):
            with superd.connect("victim") as client:
                client.sendall(b"x")
                client.recv(1)
                for row_ in superd.call("Connections", names=["victim"])["connections"]:
                    with_signal(row_["pid"])
                with suppress(OSError):
                    client.shutdown(socket.SHUT_WR)  # the end of one whose pid is not known yet
                    read_all(client)
            trial.pause(0.4)
        superd.write("victim", text.replace("40", str(40 + number % 5)))
        superd.call("Reload")
        number += 1
        samples.append((time.monotonic() - began, memory(superd.manager)))
        superd.lines.clear()
    half = [one for one in samples if one[0] > seconds / 2]
    slope = (half[-1][1] - half[0][1]) / max(1.0, half[-1][0] - half[0][0]) * 3600 if len(half) > 1 else 0.0
    figures: Figures = {"seconds": round(seconds), "reloads": number, "MB_per_h": round(slope / 1e6, 2)}
    check(figures, slope < 6e6, f"{slope / 1e6:.1f} MB an hour in the second half")
    return trial.end(figures)
