"""requires, wants, after, part_of, conflicts, with real programs: who is started when, who waits, who stops first."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest
from harness import PYTHON, Superd, cpu_share, eventually, toml

# Says READY=1 when FILE is there ("-": at once), and ends at TERM; "deaf": not even then.
PROGRAM = """
import os, select, signal, socket, sys
name, gate, *how = sys.argv[1:]
read, write = os.pipe2(os.O_NONBLOCK)
signal.signal(signal.SIGTERM, signal.SIG_IGN if 'deaf' in how else lambda *_: os.write(write, b'.'))
print('begin', name, flush=True)
if gate != '-':
    os.close(os.open(gate, os.O_RDONLY))  # a FIFO: until somebody opens it for writing
if 'fail' in how:
    sys.exit(3)
with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
    address = os.environ['NOTIFY_SOCKET']
    sock.connect('\\0' + address[1:] if address[0] == '@' else address)
    sock.send(b'READY=1')
select.select([read], [], [])
print('end', name, flush=True)
"""


@pytest.fixture
def program(superd: Superd) -> str:
    path = superd.dir / "program.py"
    path.write_text(PROGRAM)
    return str(path)


def service(superd: Superd, program: str, name: str, *how: str, gate: str = "-", **keys: Any) -> None:
    keys = {"ready": "notify", "restart_delay": "20ms", **keys}
    superd.write(name, toml(command=[PYTHON, "-u", program, name, gate, *how], **keys))


def fifo(superd: Superd, name: str) -> str:
    path = superd.dir / name
    os.mkfifo(path)
    path.chmod(0o666)
    return str(path)


def open_gate(path: str) -> None:
    os.close(os.open(path, os.O_WRONLY))


def order(superd: Superd, event: str, *, after: int = 0) -> list[str]:
    return [record["service"] for record in superd.find_records(after=after, event=event)]


def both(superd: Superd, *events: str, after: int) -> list[tuple[str, str]]:
    return [(row["event"], row["service"]) for row in superd.find_records(after=after) if row["event"] in events]


def said(superd: Superd, what: str, *, after: int = 0) -> list[str]:
    found = superd.find_records(after=after, event="output", message=re.compile(f"^{what} "))
    return [record["message"].split()[1] for record in found]


def test_chain_of_three(superd: Superd, program: str) -> None:
    """Each starts when what it requires is ready, stops before it, and `status` says how they hang together."""
    gate = fifo(superd, "gate")
    service(superd, program, "a", requires=["b"])
    service(superd, program, "b", requires=["c"])
    service(superd, program, "c", gate=gate)
    service(superd, program, "free")
    superd.start()
    superd.wait_record(event="ready", service="free")
    assert superd.status("c")["state"] == "starting"
    assert [superd.status(name)["note"] for name in "ab"] == ["waiting for 'b'", "waiting for 'c'"]
    assert superd.status("a")["state"] == "backoff"
    details = superd.call("Status", names=["b"])["services"][0]
    assert details["requires"] == ["c"] and details["required_by"] == ["a"]
    open_gate(gate)
    superd.wait_for("a", "ready")
    rows = [row for row in superd.find_records() if row["event"] in ("start", "ready")]
    assert [(row["event"], row["service"]) for row in rows if row.get("service") in ("a", "b", "c")] == [
        ("start", "c"), ("ready", "c"), ("start", "b"), ("ready", "b"), ("start", "a"), ("ready", "a"),
    ]  # fmt: skip
    mark = superd.mark()
    superd.stop()
    assert [name for name in order(superd, "exit", after=mark) if name != "free"] == ["a", "b", "c"]


def test_wants_and_after(superd: Superd, program: str) -> None:
    """`wants` says nothing about order, and a failure does not matter; `after` waits for the end of a start."""
    gate = fifo(superd, "gate")
    service(superd, program, "a-wants", wants=["slow", "bad"])
    service(superd, program, "b-after", after=["slow", "bad"])
    service(superd, program, "slow", gate=gate)
    service(superd, program, "bad", "fail", restart="no")
    superd.start()
    superd.wait_record(event="ready", service="a-wants")
    superd.wait_record(event="exit", service="bad", status=3)
    eventually(lambda: superd.status("b-after")["note"], "waiting for 'slow'")
    open_gate(gate)
    superd.wait_record(event="ready", service="b-after")
    mark = superd.mark()
    superd.stop()
    ends = order(superd, "exit", after=mark)
    assert ends.index("b-after") < ends.index("slow")


def test_failed_requirement_heals(superd: Superd, program: str) -> None:
    """Nobody has to do anything about the one that waits."""
    cure = superd.dir / "cure"
    script = f"test -e {cure} || exit 3; exec {PYTHON} -u {program} db -"
    superd.write("db", toml(command=["/bin/sh", "-c", script], ready="notify", restart="no"))
    service(superd, program, "web", requires=["db"])
    superd.start()
    eventually(lambda: superd.status("web")["note"], "waiting for 'db': failed")
    result = superd.call("Start", names=["web"])["results"][0]
    assert not result["ok"] and result["note"] == "waiting for 'db': failed"  # started again, and failed again
    assert not superd.find_records(event="start", service="web")
    cure.touch()
    superd.call("Start", names=["db"])
    superd.wait_record(event="ready", service="web")
    assert superd.status("web")["note"] == ""


def test_backoff_of_the_required_one(superd: Superd, program: str) -> None:
    """A crash of what is required, later: who requires it stays up (as with systemd's Requires=)."""
    service(superd, program, "db", restart_delay="2s", restart_delay_max="2s")
    service(superd, program, "web", requires=["db"])
    superd.start()
    superd.wait_for("web", "ready")
    web = superd.status("web")["pid"]
    os.kill(superd.status("db")["pid"], signal.SIGKILL)
    eventually(lambda: superd.status("db")["state"], "backoff")
    assert superd.status("web")["pid"] == web
    superd.wait_records(2, event="ready", service="db")
    assert superd.status("web")["pid"] == web


def test_operators_orders(superd: Superd, program: str) -> None:
    """stop takes along who requires it, first; start brings what is required; restart is everybody's."""
    service(superd, program, "db")
    service(superd, program, "part", part_of=["db"])
    service(superd, program, "web", requires=["db"])
    superd.write("echo", toml(listen="tcp:127.0.0.1:0", command="/bin/cat", requires=["web"]))
    superd.start()
    for name in ("web", "part"):
        superd.wait_for(name, "ready")
    with superd.connect("echo") as client:
        client.sendall(b"x")
        assert client.recv(1) == b"x"
        mark = superd.mark()
        assert superd.call("Stop", names=["db"])["results"][0]["ok"]
        assert client.recv(1) == b""
    superd.wait_record(after=mark, event="exit", service="db")
    ends = order(superd, "exit", after=mark)
    assert sorted(ends) == ["db", "echo", "part", "web"]
    assert ends.index("echo") < ends.index("web") < ends.index("db")
    assert {name: superd.status(name)["note"] for name in ("db", "part", "web", "echo")} == {
        "db": "", "part": "stopped: is part of 'db'", "web": "stopped: requires 'db'",
        "echo": "stopped: requires 'web'",
    }  # fmt: skip
    assert all(superd.status(name)["state"] == "stopped" for name in ("db", "part", "web", "echo"))
    mark = superd.mark()
    results = superd.call("Start", names=["echo"])["results"]
    assert results[0]["ok"] and superd.status("part")["state"] == "stopped"
    superd.wait_record(after=mark, event="ready", service="web")
    assert order(superd, "ready", after=mark) == ["db", "web"]
    mark = superd.mark()
    assert superd.call("Restart", names=["db"])["results"][0]["ok"]
    superd.wait_record(after=mark, event="ready", service="web")
    done = [
        (row["event"], row["service"]) for row in superd.find_records(after=mark) if row["event"] in ("exit", "ready")
    ]
    assert done == [("exit", "web"), ("exit", "db"), ("ready", "db"), ("ready", "web")]


def test_start_brings_what_is_wanted(superd: Superd, program: str) -> None:
    """But nothing that is disabled, unless it is required; and nothing is stopped for what is not started."""
    service(superd, program, "soft")
    service(superd, program, "off", enabled=False, conflicts=["soft"])
    service(superd, program, "hard", enabled=False)
    service(superd, program, "web", enabled=False, wants=["soft", "off"], requires=["hard"])
    superd.start()
    superd.wait_for("soft", "ready")
    soft = superd.status("soft")["pid"]
    assert superd.call("Start", names=["web"])["results"][0]["ok"]
    states = {name: superd.status(name)["state"] for name in ("hard", "off", "soft", "web")}
    assert states == {"hard": "ready", "off": "disabled", "soft": "ready", "web": "ready"}
    assert superd.status("soft")["pid"] == soft
    assert superd.call("Stop", names=["soft", "hard"])["results"][0]["ok"]
    assert superd.status("web")["state"] == "stopped"
    assert superd.call("Start", names=["web"])["results"][0]["ok"]
    superd.wait_for("soft", "ready")


def test_conflicts(superd: Superd, program: str) -> None:
    """One of two; the first one at the beginning, whoever is asked for afterwards, and never both at a time."""
    service(superd, program, "one", conflicts=["two"])
    service(superd, program, "two")
    superd.garbage_expected = True  # the warning
    superd.start()
    superd.wait_for("one", "ready")
    row = superd.status("two")
    assert (row["state"], row["note"]) == ("stopped", "stopped: conflicts with 'one'")
    superd.wait_record(event="start", service="one")
    mark = superd.mark()
    assert superd.call("Start", names=["two"])["results"][0]["ok"]
    rows = [
        (row["event"], row["service"]) for row in superd.find_records(after=mark) if row["event"] in ("exit", "start")
    ]
    assert rows == [("exit", "one"), ("start", "two")]
    assert superd.status("one")["note"] == "stopped: conflicts with 'two'"


@pytest.mark.parametrize("run", ["per-connection", "on-demand"])
def test_clients_wait_for_what_is_required(superd: Superd, program: str, run: str) -> None:
    """The sockets are there from the beginning (P4); the process is not, until what it requires is ready."""
    gate = fifo(superd, "gate")
    code = "import socket; s = socket.socket(fileno=3)\nwhile True:\n c = s.accept()[0]; c.sendall(b'hello'); c.close()"
    keys: dict[str, Any] = {"command": [PYTHON, "-c", code], "run": run}
    if run == "per-connection":
        keys["command"] = ["/bin/echo", "-n", "hello"]
    superd.write("web", toml(listen="tcp:127.0.0.1:0", requires=["db"], **keys))
    service(superd, program, "db", gate=gate)
    superd.start()
    with superd.connect("web") as client:
        eventually(lambda: superd.status("web")["note"], "waiting for 'db'")
        assert superd.call("Sockets", names=["web"])["sockets"][0]["queue"] == 1
        assert cpu_share(superd.manager, 0.5) < 0.05
        assert not superd.find_records(event="start", service="web")
        open_gate(gate)
        assert client.recv(5, socket.MSG_WAITALL) == b"hello"
    ready = superd.find_records(event="ready", service="db")[0]
    start = superd.wait_record(event="start", service="web")
    assert superd.records.index(ready) < superd.records.index(start)


def test_on_demand_is_reached_when_it_listens(superd: Superd, program: str) -> None:
    """Who requires a service that is started by its traffic does not wait for a process of it."""
    superd.write("db", toml(listen="tcp:127.0.0.1:0", run="on-demand", command=["/bin/sleep", "1000"]))
    service(superd, program, "web", requires=["db"])
    superd.start()
    superd.wait_record(event="ready", service="web")
    assert superd.status("db")["state"] == "listening"


def test_once_is_reached_when_it_is_done(superd: Superd, program: str) -> None:
    gate = fifo(superd, "gate")
    superd.write("migrate", toml(run="once", command=["/bin/sh", "-c", f": <{gate}"]))
    service(superd, program, "web", requires=["migrate"])
    superd.start()
    superd.wait_record(event="start", service="migrate")
    assert superd.status("web")["note"] == "waiting for 'migrate'"
    open_gate(gate)
    superd.wait_record(event="ready", service="web")
    assert superd.status("migrate")["state"] == "done"


def test_manager_is_killed_while_one_waits(superd: Superd, program: str) -> None:
    gate = fifo(superd, "gate")
    service(superd, program, "db", gate=gate)
    service(superd, program, "web", requires=["db"])
    superd.start()
    superd.wait_record(event="output", message="begin db")
    db = superd.status("db")["pid"]
    superd.kill_role("superd-manager")
    eventually(lambda: superd.status("web")["note"], "waiting for 'db'")
    open_gate(gate)
    superd.wait_record(event="ready", service="web")
    assert superd.status("db")["pid"] == db and len(superd.find_records(event="start", service="web")) == 1


@pytest.mark.parametrize("verb", ["Stop", "Restart"])
def test_manager_is_killed_between_two_stops(superd: Superd, program: str, verb: str) -> None:
    """What an operator has ordered is carried out by the next manager: web first, which takes its time, then db."""
    service(superd, program, "db")
    service(superd, program, "web", "deaf", requires=["db"], stop_timeout="1s")
    superd.start()
    superd.wait_record(event="ready", service="web")
    mark = superd.mark()
    superd.call(verb, names=["db"], wait=False)
    eventually(lambda: superd.status("web")["state"], "stopping")
    assert superd.status("db")["note"] == f"{verb.lower()} asked for; waiting until 'web' has stopped"
    superd.kill_role("superd-manager")
    superd.wait_record(after=mark, event="exit", service="db")
    if verb == "Restart":
        superd.wait_record(after=mark, event="ready", service="web")
        assert order(superd, "ready", after=mark) == ["db", "web"]
    else:
        eventually(lambda: [superd.status(name)["state"] for name in ("db", "web")], ["stopped"] * 2)
    assert order(superd, "exit", after=mark) == ["web", "db"]


def test_shutdown_across_a_dependency(superd: Superd, program: str) -> None:
    """One that is willing, one that ignores TERM, one that is stopped: in order, within the time, nobody is left."""
    service(superd, program, "a-willing", requires=["b-deaf"])
    service(superd, program, "b-deaf", "deaf", requires=["c-stopped"], stop_timeout="1s")
    service(superd, program, "c-stopped")
    service(superd, program, "d-other")
    superd.start()
    superd.wait_for("a-willing", "ready")
    superd.wait_for("d-other", "ready")
    os.kill(superd.status("c-stopped")["pid"], signal.SIGSTOP)
    mark, began = superd.mark(), time.monotonic()
    superd.stop()
    assert 0.9 < time.monotonic() - began < 2
    ends = order(superd, "exit", after=mark)
    assert ends[-2:] == ["b-deaf", "c-stopped"] and set(ends[:2]) == {"a-willing", "d-other"}


def test_shutdown_is_never_longer_than_its_time(superd: Superd, program: str) -> None:
    """Whoever has not had his turn after three quarters of it is told to stop all the same, and can."""
    superd.write_daemon('stop_timeout = "2s"')
    service(superd, program, "db")
    service(superd, program, "web", "deaf", requires=["db"], stop_timeout="1m")
    superd.start()
    superd.wait_for("web", "ready")
    began = time.monotonic()
    superd.stop()
    assert 1.9 < time.monotonic() - began < 3
    assert said(superd, "end") == ["db"]


def test_shutdown_is_finished_by_the_next_manager(superd: Superd, program: str) -> None:  # G13
    service(superd, program, "db")
    service(superd, program, "web", "deaf", requires=["db"], stop_timeout="1s")
    superd.start()
    superd.wait_for("web", "ready")
    os.kill(superd.pid, signal.SIGTERM)
    eventually(lambda: superd.status("web")["state"], "stopping")
    superd.kill_role("superd-manager")
    assert superd.wait_exit() == 0
    assert order(superd, "exit") == ["web", "db"] and said(superd, "end") == ["db"]


def test_second_term_waits_for_nobody(superd: Superd, program: str) -> None:
    service(superd, program, "db")
    service(superd, program, "web", "deaf", requires=["db"], stop_timeout="1m")
    superd.start()
    superd.wait_for("web", "ready")
    os.kill(superd.pid, signal.SIGTERM)
    superd.wait_record(message="stopping")
    began = time.monotonic()
    superd.stop()
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("run", ["per-connection", "on-demand"])
def test_clients_of_a_failed_requirement(superd: Superd, run: str) -> None:
    """They stay in the queue, the note says why, nothing spins; and it heals."""
    cure = superd.dir / "cure"
    superd.write("db", toml(command=["/bin/sh", "-c", f"test -e {cure} && exec sleep 1000"], restart="no"))
    superd.write(
        "web", toml(listen="tcp:127.0.0.1:0", command="/bin/cat", run=run, requires=["db"], **{"pass": "stdio"})
    )
    superd.start()
    superd.wait_record(event="exit", service="db")
    with superd.connect("web") as client, superd.connect("web"):
        eventually(lambda: superd.status("web")["note"], "waiting for 'db': failed")
        assert superd.status("web")["state"] == ("backoff" if run == "on-demand" else "listening")
        assert cpu_share(superd.manager, 0.5) < 0.05
        cure.touch()
        assert superd.call("Start", names=["db"])["results"][0]["ok"]
        superd.wait_record(event="start", service="web")
        if run == "per-connection":
            client.sendall(b"x")
            assert client.recv(1) == b"x"


def test_redis(superd: Superd, require: Callable[[str], str]) -> None:
    """A real server that says when it is ready, and a client of it for each connection."""
    server, cli = require("redis-server"), require("redis-cli")
    room = superd.room("redis", user="nobody")
    sock = room / "redis.sock"
    superd.write("redis", toml(
        command=[server, "--port", "0", "--unixsocket", str(sock), "--save", "", "--supervised", "systemd"],
        cwd=str(room), ready="notify",
    ))  # fmt: skip
    superd.write(
        "count", toml(listen="tcp:127.0.0.1:0", command=[cli, "-s", str(sock), "INCR", "visitors"], requires=["redis"])
    )
    superd.start()
    for number in (1, 2, 3):
        with superd.connect("count") as client:
            assert client.makefile("rb").read() == b"%d\n" % number
    mark = superd.mark()
    assert superd.call("Stop", names=["redis"])["results"][0]["ok"]
    with superd.connect("count") as client:
        assert superd.status("count")["state"] == "stopped"
        assert superd.call("Start", names=["count"])["results"][0]["ok"]
        assert client.makefile("rb").read() == b"1\n"  # nothing was saved: it is another redis
    assert len(superd.find_records(after=mark, event="ready", service="redis")) == 1


def test_check_shows_a_cycle(superd: Superd) -> None:
    superd.write("a", toml(command="/bin/cat", requires=["b"]))
    superd.write("b", toml(command="/bin/cat", after=["a"]))
    superd.write("c", toml(command=["/bin/sleep", "1000"]))
    argv = [sys.executable, "-I", "-m", "superd.cli.superctl", "-c", str(superd.conf), "check", "--format", "json"]
    found = subprocess.run(argv, capture_output=True, text=True, timeout=20)
    assert found.returncode == 78, found
    rows = [json.loads(line) for line in found.stdout.splitlines()]
    text = "dependency cycle: a requires b, b is after a"
    assert [(row["service"], row["line"], row["message"]) for row in rows] == [("a", 2, text), ("b", 2, text)]
    superd.garbage_expected = True
    superd.start()
    superd.wait_for("c", "ready")
    assert superd.status("a")["state"] == superd.status("b")["state"] == "bad config"


def test_requirement_with_bad_config(superd: Superd, program: str) -> None:
    """Its own file is right, so it is not "bad config" itself."""
    superd.write("db", "nonsense = 1")
    service(superd, program, "web", requires=["db"])
    superd.garbage_expected = True
    superd.start()
    row = superd.status("web")
    assert (row["state"], row["note"]) == ("backoff", "waiting for 'db': bad config")
    result = superd.call("Start", names=["web"])["results"][0]
    assert not result["ok"] and result["note"] == "waiting for 'db': bad config"
