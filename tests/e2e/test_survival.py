"""Superd's own roles die or stand still; clients and services do not notice more than a moment."""

from __future__ import annotations

import os
import re
import resource
import signal
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from harness import PYTHON, Superd, ask, comm, cpu_share, descendants, eventually, fetch, read_all, toml, wait_gone

Require = Callable[[str], str]
TOOK_OVER = re.compile("took over")

TAKES_ONE = "import socket; socket.socket(fileno=3).accept()[0].sendall(b'served')"


@pytest.fixture
def survivor(superd: Superd) -> Superd:
    """With services of every mode. The keeper says in plain text that a role has died."""
    superd.garbage_expected = True
    superd.write("cat", toml(listen="tcp:127.0.0.1:0", command=["/bin/cat"]))
    superd.write("own", toml(listen="tcp:127.0.0.1:0", run="on-demand", command=[PYTHON, "-I", "-c", TAKES_ONE]))
    code = "import socket\ns = socket.socket(fileno=3)\nwhile True: s.accept()[0].sendall(b'always')"
    command = [PYTHON, "-I", "-c", code]
    superd.write("always", toml(listen=f"unix:{superd.dir}/a.sock", run="always-on", command=command))
    superd.write("late", toml(run="always-on", command=["/bin/sh", "-c", "while :; do echo tick; sleep 0.05; done"]))
    superd.start()
    return superd


def session(superd: Superd) -> socket.socket:
    client = superd.connect("cat")
    client.sendall(b"1")
    assert client.recv(1) == b"1"
    return client


def all_serve(superd: Superd) -> None:
    assert ask(superd.connect("cat"), b"x") == b"x"
    assert fetch(superd.connect("own")) == b"served"
    assert fetch(superd.connect("always")) == b"always"


def test_manager_killed(survivor: Superd) -> None:  # F7 H10 X7
    """Open connections and services stay, and are known to the next manager; what it reads in their pipes too."""
    superd = survivor
    before = {name: superd.wait_record(event="start", service=name) for name in ("always", "late")}
    with session(superd) as client:
        superd.wait_record(event="start", service="cat")
        for generation in range(2, 5):
            mark = superd.mark()
            superd.kill_role("superd-manager")
            all_serve(superd)
            superd.wait_record(after=mark, message=TOOK_OVER)
            superd.wait_record(after=mark, event="output", service="late")
            client.sendall(b"2")
            assert client.recv(1) == b"2"
            assert [row["connection"] for row in superd.call("Connections", names=["cat"])["connections"]] == ["1-1"]
            assert {name: superd.status(name)["pid"] for name in before} == {
                name: row["pid"] for name, row in before.items()
            }, generation
        mark = superd.mark()
        client.shutdown(socket.SHUT_WR)
        assert read_all(client) == b""
    record = superd.wait_record(after=mark, event="exit", service="cat", connection="1-1")
    assert record["status"] == 0
    superd.wait_for("cat", "idle")
    assert superd.call("Stop", names=["always"])["results"][0]["ok"]  # it is ours, however it was started
    wait_gone(before["always"]["pid"])


def test_manager_killed_under_load(survivor: Superd) -> None:  # X7
    """300 connections, 8 at a time, and the manager killed five times meanwhile: none fails."""
    superd = survivor

    def client(number: int) -> bool:
        return ask(superd.connect("cat"), b"%d" % number) == b"%d" % number

    with ThreadPoolExecutor(8) as pool:
        results = []
        for _ in range(5):
            results += [pool.submit(client, number) for number in range(60)]
            mark = superd.mark()
            results[-50].result()
            superd.kill_role("superd-manager")
            superd.wait_record(after=mark, message=TOOK_OVER)
        failed = [result for result in results if result.exception() or not result.result()]
    # A connection is lost if the kill falls between accept and the hand-over: some microseconds.
    assert len(results) == 300 and len(failed) <= 1, [result.exception() for result in failed]
    superd.wait_for("cat", "idle")


def test_manager_killed_with_clients_queued(superd: Superd) -> None:  # X8
    superd.garbage_expected = True
    superd.write("cat", toml(listen="tcp:127.0.0.1:0", command=["/bin/cat"], limits={"max_connections": 2}))
    superd.start()
    with session(superd) as first, session(superd) as second:
        clients = [superd.connect("cat") for _ in range(20)]
        superd.kill_role("superd-manager")
        superd.wait_record(message=TOOK_OVER)
        assert superd.status("cat")["now"] == 2  # those that it adopted have their places
        for client in (first, second):
            client.shutdown(socket.SHUT_WR)
            assert read_all(client) == b""
        for client in clients:
            assert ask(client, b"x") == b"x"


@pytest.mark.parametrize("together", [False, True])
def test_spawner_killed(survivor: Superd, together: bool) -> None:  # F7
    """Live children stay known: superctl shows them, their end is recorded. With the manager: sessions go on."""
    superd = survivor
    with session(superd) as client, session(superd) as other:
        pids = {row["pid"] for row in superd.wait_records(2, event="start", service="cat")}
        mark = superd.mark()
        for spawner in superd.pids()["superd-spawner"]:
            os.kill(spawner, signal.SIGKILL)
        if together:
            superd.kill_role("superd-manager")
            superd.wait_record(after=mark, message=TOOK_OVER)
        assert ask(superd.connect("cat"), b"x") == b"x"
        if not together:
            eventually(
                lambda: {row["pid"] for row in superd.call("Connections", names=["cat"])["connections"]} >= pids, True
            )
        client.sendall(b"2")
        assert client.recv(1) == b"2"
        client.shutdown(socket.SHUT_WR)
        assert read_all(client) == b""
        if not together:
            record = superd.wait_record(after=mark, event="exit", service="cat", pid=lambda pid: pid in pids)
            assert record["status"] == 0
        other.sendall(b"3")
        assert other.recv(1) == b"3"
    superd.wait_for("cat", "idle")
    all_serve(superd)


def test_spawner_killed_with_connections_in_hand(survivor: Superd) -> None:
    """SIGSTOP, 10 clients, SIGKILL: those that it had not started are started by the next one."""
    superd = survivor
    assert ask(superd.connect("cat"), b"x") == b"x"
    (spawner,) = superd.pids()["superd-spawner"]
    os.kill(spawner, signal.SIGSTOP)
    clients = [superd.connect("cat") for _ in range(10)]
    os.kill(spawner, signal.SIGKILL)
    for number, client in enumerate(clients):
        assert ask(client, b"%d" % number) == b"%d" % number
    superd.wait_for("cat", "idle")


def test_manager_stopped_and_continued(survivor: Superd) -> None:  # X8 M5
    superd = survivor
    with session(superd) as client:
        manager = superd.manager
        os.kill(manager, signal.SIGSTOP)
        clients = [superd.connect("cat") for _ in range(30)]
        client.sendall(b"2")
        assert client.recv(1) == b"2"
        os.kill(manager, signal.SIGCONT)
        for number, waiting in enumerate(clients):
            assert ask(waiting, b"%d" % number) == b"%d" % number
    assert superd.manager == manager
    all_serve(superd)


def test_stop_while_a_manager_is_missing(survivor: Superd) -> None:  # F10 X25
    """TERM to the keeper right after the manager was killed: the next one hears of it."""
    with session(survivor):
        os.kill(survivor.manager, signal.SIGKILL)
        survivor.stop()


ORPHANS = "for i in 1 2 3 4 5 6 7 8 9 10; do (sleep 0.05 & exec true) & done; wait; sleep 0.01; echo done"


@pytest.mark.parametrize("first", [False, True])
def test_orphans_are_reaped(superd: Superd, require: Require, root: None, first: bool) -> None:  # G1 G2 H4 E2
    """As a subreaper, and as PID 1: no zombie stays, statuses are those of the right processes."""
    superd.write("s", toml(listen=f"unix:{superd.dir}/s.sock", command=["/bin/sh", "-c", ORPHANS]))
    superd.write("seven", toml(listen=f"unix:{superd.dir}/7.sock", command=["/bin/sh", "-c", "exit 7"]))
    wrapper = [require("unshare"), "--pid", "--fork", "--mount-proc", "--kill-child=KILL"] if first else []
    superd.start(wrapper=wrapper)
    for number in range(5):
        with superd.connect("s") as client, superd.connect("seven") as seven:
            assert read_all(client) == b"done\n"
            assert read_all(seven) == b""
        superd.wait_records(number + 1, event="exit", service="seven", status=7)  # F1
    superd.wait_records(5, event="exit", service="s", status=0)
    eventually(lambda: zombies(superd), [])
    assert [comm(pid) for pid in descendants(superd.pid) if comm(pid) == "sleep"] == []


def zombies(superd: Superd) -> list[str]:
    """Of all processes below the keeper; a sleep that still runs counts too."""
    found = []
    for pid in (int(name) for name in os.listdir("/proc") if name.isdigit()):
        try:
            with open(f"/proc/{pid}/stat") as file:
                name, _, rest = file.read().partition("(")[2].rpartition(")")
        except OSError:
            continue
        state, parent = rest.split()[:2]
        if int(parent) == superd.pid and (state == "Z" or name == "sleep"):
            found.append(f"{pid} {name} {state}")
    return found


def test_first_process(superd: Superd, require: Require, root: None) -> None:  # H1 H10
    """As PID 1: TERM ends it with status 0, the manager may be killed, and there is no zombie."""
    superd.garbage_expected = True
    superd.write("cat", toml(listen=f"unix:{superd.dir}/c.sock", command=["/bin/cat"]))
    superd.start(wrapper=[require("unshare"), "--pid", "--fork", "--mount-proc", "--kill-child=KILL"])
    assert ask(superd.connect("cat"), b"x") == b"x"
    superd.kill_role("superd-manager")
    assert ask(superd.connect("cat"), b"x") == b"x"
    superd.wait_record(message=TOOK_OVER)
    eventually(lambda: zombies(superd), [])
    superd.stop()


def test_no_descriptor_is_lost(survivor: Superd) -> None:  # E3 J7
    """500 connections, RST, half-closed and refused ones among them: all three roles have open what they had."""
    superd = survivor
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: ask(superd.connect("cat"), b"x"), range(50)))
    superd.wait_for("cat", "idle")
    before = superd.descriptors()
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: ask(superd.connect("cat"), b"x"), range(500)))
    assert answers == [b"x"] * 500
    for _ in range(5):
        assert fetch(superd.connect("own")) == b"served"
    superd.wait_for("cat", "idle")
    superd.wait_records(5, event="exit", service="own")
    eventually(superd.descriptors, before)


def test_the_machine_has_changed_meanwhile(superd: Superd) -> None:  # K11
    """The configuration in force is the one that was read: a program that has gone since does not take its service away
    when another manager comes."""
    program = superd.dir / "serve"
    program.write_text("#!/bin/sh\nexec cat\n")
    program.chmod(0o755)
    superd.write("cat", toml(listen="tcp:127.0.0.1:0", command=[str(program)]))
    superd.start()
    with superd.connect("cat") as client:
        client.sendall(b"1")
        assert client.recv(1) == b"1"
        program.unlink()
        mark = superd.mark()
        superd.kill_role("superd-manager")
        superd.wait_record(after=mark, message=TOOK_OVER)
        client.sendall(b"2")
        assert client.recv(1) == b"2"
        assert fetch(superd.connect("cat")) == b""
        superd.wait_record(after=mark, service="cat", message=re.compile("no such file or directory; client closed"))


def test_started_by_hand_stays_started(superd: Superd) -> None:
    superd.write("cat", toml(enabled=False, listen=f"unix:{superd.dir}/cat", command=["/bin/cat"]))
    superd.start()
    superd.call("Start", names=["cat"])
    mark = superd.mark()
    superd.kill_role("superd-manager")
    superd.wait_record(after=mark, message=TOOK_OVER)
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(f"{superd.dir}/cat")
        assert ask(client, b"x") == b"x"


def test_manager_and_spawner_killed(survivor: Superd) -> None:  # A6, G17
    """Nobody is left who knows of the connection; its process says whose it is, and it is counted again."""
    superd = survivor
    with session(superd):
        superd.wait_record(event="start", service="cat")
        (manager,), spawners = superd.pids()["superd-manager"], superd.pids()["superd-spawner"]
        os.kill(manager, signal.SIGSTOP)
        for spawner in spawners:
            os.kill(spawner, signal.SIGKILL)
        mark = superd.mark()
        os.kill(manager, signal.SIGKILL)
        superd.wait_record(after=mark, message=TOOK_OVER)
        eventually(lambda: superd.status("cat")["now"], 1)
    superd.wait_record(after=mark, event="exit", service="cat")


WRONG = [
    b"{", b"[" * 100_000,
    b'{"services": {"cat": 5, "own": [], "always": {"wish": true}}, "forgotten": {}, "stopping": []}',
    b'{"services": {"always": {"wish": true, "state": "ready", "note": "", "total": 1, "restarts": 0, "endings": []}}}',
]  # fmt: skip


def test_what_the_last_manager_left_makes_no_sense(survivor: Superd, root: None) -> None:  # P1
    """A manager takes over all the same, from what the keeper holds; every port serves and nothing runs twice."""

    def deposits() -> list[Path]:
        found = Path(f"/proc/{survivor.pid}/fd").iterdir()
        return [path for path in found if "superd-snapshot" in os.readlink(path)]

    always = survivor.wait_record(event="start", service="always")["pid"]
    for wrong in WRONG:
        eventually(lambda: len(deposits()), 1)
        manager = survivor.manager
        os.kill(manager, signal.SIGSTOP)  # it would deposit another
        with deposits()[0].open("r+b") as file:
            file.truncate(0)
            file.write(wrong)
        mark = survivor.mark()
        os.kill(manager, signal.SIGKILL)
        survivor.wait_record(after=mark, message=TOOK_OVER)
        all_serve(survivor)
        assert survivor.status("always")["pid"] == always


@contextmanager
def on_their_way(count: int) -> Iterator[None]:
    """So many fds of our user have been sent and not been received."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        for _ in range(0, count, 100):
            socket.send_fds(ours, [b"x"], [0] * 100)
        yield


@pytest.mark.quiet
def test_no_more_descriptors_may_be_sent(superd: Superd, require: Require) -> None:  # A1
    """ETOOMANYREFS, which programs of the same user can bring about, and which CAP_SYS_RESOURCE would spare root:
    clients wait, a new manager waits for what it is to have, and nothing is lost."""
    superd.garbage_expected = True
    superd.write("cat", toml(listen="tcp:127.0.0.1:0", command=["/bin/cat"], limits={"max_connections": 200}))
    drop = [require("setpriv"), "--bounding-set", "-sys_resource,-sys_admin"] if os.geteuid() == 0 else []
    superd.start(wrapper=drop, preexec=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (250, 250)))
    with session(superd) as first:
        with on_their_way(300):
            clients = [superd.connect("cat") for _ in range(50)]
            superd.wait_record(level="warning", message=re.compile("more descriptors on their way .*clients wait"))
        for client in clients:
            assert ask(client, b"x") == b"x"
        with on_their_way(300):
            mark = superd.mark()
            superd.kill_role("superd-manager")
            client = superd.connect("cat")
            eventually(lambda: len(superd.pids()["superd-manager"]), 1)
            pid = superd.manager
            assert cpu_share(superd.pid, 0.5) < 0.3
        assert ask(client, b"x") == b"x"
        superd.wait_record(after=mark, message=TOOK_OVER)
        assert superd.manager == pid
        first.sendall(b"y")
        assert first.recv(1) == b"y"


def test_a_stop_whose_managers_die(superd: Superd) -> None:  # G5, H10, X26
    """Three of them: superd ends all the same, says so, and leaves nobody."""
    code = "import signal, time; signal.signal(15, signal.SIG_IGN); print('ready', flush=True); time.sleep(1000)"
    superd.write("deaf", toml(run="always-on", stop_timeout="20s", command=[PYTHON, "-I", "-c", code]))
    superd.garbage_expected = True
    superd.start()
    pid = superd.wait_record(event="start", service="deaf")["pid"]
    superd.wait_record(event="output", service="deaf", message="ready")
    os.kill(superd.pid, signal.SIGTERM)
    for number in range(3):
        superd.wait_records(number + 1, message="stopping")
        superd.kill_role("superd-manager")
    wait_gone(pid)
    assert superd.wait_exit() == 1
    assert any("superd ends without one" in line for line in superd.lines)


def test_keeper_killed(superd: Superd) -> None:  # G17, H10, E (19)
    """The ports are free at once, and soon nobody is left of services that do not care for TERM; clients go on."""
    code = "import signal, time; signal.signal(15, signal.SIG_IGN); print('ready', flush=True); time.sleep(1000)"
    superd.write("deaf", toml(listen=f"unix:{superd.dir}/deaf", run="always-on", command=[PYTHON, "-I", "-c", code]))
    superd.write("stays", toml(run="always-on", command=["/bin/sleep", "1000"]))
    superd.write("cat", toml(listen="tcp:127.0.0.1:0", command=["/bin/cat"]))
    superd.garbage_expected = True
    superd.start()
    superd.wait_record(event="output", service="deaf", message="ready")
    pids = [superd.wait_record(event="start", service=name)["pid"] for name in ("deaf", "stays")]
    address = superd.address("cat")
    with superd.connect("cat") as client:
        client.sendall(b"1")
        assert client.recv(1) == b"1"
        superd.kill_role("superd-keeper")
        with socket.socket() as free:
            free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            eventually(lambda: bind(free, address), True)
        for pid in pids:
            wait_gone(pid)
        client.sendall(b"2")
        assert client.recv(1) == b"2"
    assert superd.wait_exit() == -signal.SIGKILL


def bind(sock: socket.socket, address: tuple[str, int]) -> bool:
    try:
        sock.bind(address)
    except OSError:
        return False
    return True
