"""What systemd's own test suite holds against its socket units and restarts, as cases of ours; and random orders."""

from __future__ import annotations

import os
import random
import re
import socket
from datetime import datetime

import pytest
from harness import PYTHON, Superd, ask, cpu_s, eventually, fetch, read_all, toml

TAKES_ONE = "import os, socket; socket.socket(fileno=3).accept()[0].sendall(b'%d' % os.getpid())"
TAKES_ALL = (
    "import os, socket; s = socket.socket(fileno=3)\n"
    "while True: s.accept()[0].sendall(b'%d' % os.getpid())"
)  # fmt: skip

STEPS = int(os.environ.get("SUPERD_STEPS", "120"))


def write(superd: Superd, name: str, code: str, **keys: object) -> None:
    defaults = {"listen": "tcp:127.0.0.1:0", "run": "on-demand", "command": [PYTHON, "-I", "-c", code]}
    superd.write(name, toml(**{**defaults, **keys}))


def starts(superd: Superd, name: str) -> list[float]:
    """When its processes were started."""
    found = superd.find_records(event="start", service=name)
    return [datetime.fromisoformat(record["time"]).timestamp() for record in found]


@pytest.mark.parametrize("again", [["Stop", "Start"], ["Restart"]], ids=["stop", "restart"])
def test_start_limit(superd: Superd, again: list[str]) -> None:  # G15, TEST-07-PID1.start-limit, SD#39247
    """What an operator asks for is no restart: it never uses up the limit, not while the stop still runs either."""
    write(superd, "s", TAKES_ALL, restart_limit="2/60s", restart="on-failure")
    superd.start()
    pids = [fetch(superd.connect("s"))]
    for number in range(2, 8):
        for order in again:
            superd.call(order, names=["s"], wait=False)
        superd.wait_records(number, event="start", service="s")
        pids.append(fetch(superd.connect("s")))
    assert len(set(pids)) == 7
    assert superd.status("s")["state"] == "ready"


@pytest.mark.quiet  # each stop looks at all processes of the machine
@pytest.mark.parametrize("run", ["always-on", "on-demand"])
@pytest.mark.parametrize("status", [0, 1])
def test_restart_storm(superd: Superd, run: str, status: int) -> None:  # G14, TEST-07-PID1.issue-3166
    """Ever more slowly: five starts take more than a second, and cost next to nothing."""
    superd.write(
        "s", toml(listen="tcp:127.0.0.1:0", run=run, restart="always", command=["/bin/sh", "-c", f"exit {status}"])
    )
    superd.start()
    before = cpu_s(superd.manager)
    with superd.connect("s"):
        superd.wait_records(5, event="start", service="s")
    times = starts(superd, "s")[:5]
    assert times[4] - times[0] >= 0.9 * (0.1 + 0.2 + 0.4 + 0.8)
    assert cpu_s(superd.manager) - before < 0.3


def test_restart_storm_with_a_limit(superd: Superd) -> None:  # G14, TEST-07-PID1.issue-3166
    """It reaches `failed`, after as many restarts as it is allowed, and its socket stays."""
    write(
        superd,
        "s",
        "raise SystemExit(1)",
        run="always-on",
        restart="on-failure",
        restart_delay="1ms",
        restart_limit="3/60s",
    )
    superd.start()
    superd.wait_record(service="s", message=re.compile("giving up"))
    assert len(starts(superd, "s")) == 4
    with superd.connect("s"):
        row = superd.status("s")
        assert row["state"] == "failed"
        assert re.fullmatch(r"exited with status 1 after .* s; gave up \(restart_limit = 3/1m\)", row["note"])
        assert len(starts(superd, "s")) == 4


def test_start_pre_fails_while_a_client_waits(superd: Superd) -> None:  # B7, TEST-07-PID1.issue-2467
    """No storm and no failed socket: the same client is served when it can be."""
    missing = superd.dir / "missing"
    write(superd, "s", TAKES_ONE, start_pre=[["/usr/bin/test", "-e", str(missing)]])
    superd.start()
    with superd.connect("s") as client:
        tries = superd.wait_records(3, service="s", message=re.compile("start_pre: /usr/bin/test exited with status 1"))
        assert [re.findall(r"in ([\d.]+) s", row["message"])[-1] for row in tries] == ["0.1", "0.2", "0.4"]
        assert superd.status("s")["state"] == "backoff"
        missing.touch()
        assert read_all(client).isdigit()
    superd.wait_for("s", "active")


def test_poll_limit(superd: Superd) -> None:  # B1, TEST-07-PID1.poll-limit
    """Beyond the rate clients wait, all of them are served, and nobody has to do anything."""
    write(superd, "s", TAKES_ONE, limits={"rate": "3/500ms"})
    superd.start()
    clients = [superd.connect("s") for _ in range(8)]
    assert len({read_all(client) for client in clients}) == 8
    for client in clients:
        client.close()
    times = starts(superd, "s")
    assert all(later - earlier >= 0.45 for earlier, later in zip(times, times[3:], strict=False))
    assert fetch(superd.connect("s")).isdigit()


def test_socket_max_connection(superd: Superd) -> None:  # B3 B4, TEST-07-PID1.socket-max-connection
    """So many of one source and so many in all; the excess is refused and counted, and a place that is free is free."""
    echo = "import sys; sys.stdout.write(sys.stdin.readline()); sys.stdout.flush(); sys.stdin.read()"
    limits = {"max_connections": 3, "on_full": "refuse", "max_per_source": 2}
    listen = ["tcp4:127.0.0.1:0", f"unix:{superd.dir}/s"]
    superd.write("s", toml(listen=listen, command=[PYTHON, "-I", "-c", echo], limits=limits))
    superd.start()
    first, second = superd.connect("s"), superd.connect("s")
    assert ask_line(first) == ask_line(second) == b"x\n"
    with superd.connect("s") as refused:
        assert refused.recv(1) == b""
    local = superd.connect("s", 1)
    assert ask_line(local) == b"x\n"
    for index in (0, 1):
        with superd.connect("s", index) as refused:
            assert refused.recv(1) == b""
    (row,) = superd.call("Status", names=["s"])["services"]
    assert row["refused"] == 3 and row["service"]["now"] == 3
    first.close()
    superd.wait_record(event="exit", service="s")
    with superd.connect("s") as again:
        assert ask_line(again) == b"x\n"
    second.close()
    local.close()


def ask_line(client: socket.socket) -> bytes:
    """An echo whose client goes on to be connected."""
    client.sendall(b"x\n")
    return client.recv(10)


def test_the_socket_keeps_its_group(superd: Superd, root: None) -> None:  # TEST-07-PID1.issue-3171
    """Mode and group are the file's when the socket is made; a reload that does not name them leaves them alone."""
    path = superd.dir / "s.sock"
    text = toml(command=["/bin/cat"]) + f'\n[[socket]]\nlisten = "unix:{path}"\ngroup = "daemon"\nmode = "0660"\n'
    superd.write("s", text)
    superd.start()

    def facts() -> tuple[str, int]:
        return path.group(), path.stat().st_mode & 0o777

    assert facts() == ("daemon", 0o660)
    assert ask(superd.connect("s"), b"x") == b"x"
    path.chmod(0o777)
    superd.write("s", 'description = "another"\n' + text)
    assert superd.call("Reload")["applied"]
    assert facts() == ("daemon", 0o777)
    for verb in ("Restart", "Stop", "Start"):
        assert superd.call(verb, names=["s"])["results"][0]["ok"]
        assert ask(superd.connect("s"), b"x") == b"x" if verb != "Stop" else True


def test_socket_on_failure(superd: Superd) -> None:  # TEST-07-PID1.socket-on-failure
    """A socket that cannot be had is everybody's to see (note, health, is-ready), and heals when it can be had."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        write(superd, "s", TAKES_ALL, listen=f"tcp:127.0.0.1:{port}")
        superd.start()
        row = superd.status("s")
        assert row["state"] == "backoff" and f"pid {os.getpid()}" in row["note"], row
        health = superd.call("Health")
        assert not health["ready"] and str(port) in health["problems"][0]
        assert superd.call("Is", names=["s"], what="active")["no"] == ["s"]
    superd.wait_for("s", "active")
    assert superd.call("Health")["ready"]
    assert fetch(superd.connect("s")).isdigit()


@pytest.mark.parametrize("run", ["per-connection", "on-demand"])
def test_what_cannot_be_executed(superd: Superd, run: str) -> None:  # O6, TEST-07-PID1.issue-30412
    """50 clients: nothing is lost of the descriptors, and the other listeners do not notice."""
    program = superd.room("bin") / "program"
    program.write_text("#!/bin/sh\nexit 0\n")
    program.chmod(0o755)
    delays = {} if run == "per-connection" else {"restart_delay": "1ms", "restart_delay_max": "5ms"}
    superd.write("s", toml(listen="tcp:127.0.0.1:0", run=run, command=[program], **delays))
    superd.write("cat", toml(listen="tcp:127.0.0.1:0", command=["/bin/cat"]))
    superd.start()
    assert ask(superd.connect("cat"), b"x") == b"x"
    if run == "per-connection":
        assert fetch(superd.connect("s")) == b""
    superd.wait_for("cat", "idle")
    before = superd.descriptors()
    program.unlink()
    for number in range(50):
        with superd.connect("s") as client:
            if run == "per-connection":
                assert read_all(client) == b""
        if number % 10 == 0:
            assert ask(superd.connect("cat"), b"x") == b"x"
    superd.wait_record(service="s", message=re.compile("no such file"))
    assert superd.call("Stop", names=["s"])["results"][0]["ok"]
    superd.wait_for("cat", "idle")
    eventually(superd.descriptors, before)


def served(superd: Superd) -> bool:
    try:
        return fetch(superd.connect("web")).isdigit()
    except ConnectionError:
        return False


@pytest.mark.parametrize("seed", [1, 2])
def test_random_orders(superd: Superd, seed: int, root: None) -> None:  # G13
    """Orders that do not wait for each other, kills, traffic, and files that change, go and come again: what was asked
    for last is so, and nothing is left.

    10,000 steps: SUPERD_STEPS=10000 pytest -k test_random_orders tests/e2e/test_systemd_cases.py
    """
    superd.garbage_expected = True
    quick = {"restart_delay": "1ms", "restart_delay_max": "5ms", "user": "nobody"}
    true = [["/bin/true"]]

    def put(name: str, step: int, **keys: object) -> None:
        """Its file, with something in it that is of this step."""
        if name == "web":
            write(superd, name, TAKES_ALL, **keys, **quick)
        elif name == "box":
            command = {"run": "always-on", "restart": "always", "command": ["/bin/sleep", "1000"]}
            superd.write(
                name,
                toml(**command, start_pre=true, start_post=true, stop_post=true, requires=["base"], **keys, **quick),
            )
        elif name == "job":
            command = {"run": "once", "restart": "on-failure", "command": ["/bin/sh", "-c", "sleep 1000"]}
            superd.write(name, toml(**command, **keys, **quick))
        else:
            superd.write(name, toml(run="always-on", command=["/bin/sleep", "1000"], restart="always", **keys, **quick))

    processes = {"web": 1, "box": 1, "job": 2, "base": 1}  # job: a shell and its sleep
    wish: dict[str, bool | None] = dict.fromkeys(processes, True)  # None: it has no file
    for name in wish:
        put(name, 0)
    superd.start("--no-watch")
    chance = random.Random(seed)
    for step in range(1, STEPS + 1):
        name = chance.choice(list(wish))
        order = chance.choice(["Start", "Stop", "Restart", "Kill", "traffic", "in place", "new process", "remove"])
        if wish[name] is None:
            put(name, step)
            superd.call("Reload")
            wish[name] = True
            wish["base"] = True if name == "box" else wish["base"]  # which that requires
        elif order == "traffic":
            if wish["web"] is not None:
                with superd.connect("web"):
                    pass
        elif order == "Kill":
            superd.call("Kill", names=[name], signal="KILL")
        elif order in ("in place", "new process"):
            keys = {"description": str(step)} if order == "in place" else {"environment": {"STEP": str(step)}}
            put(name, step, **keys)
            superd.call("Reload")
        elif order == "remove":
            if name not in ("web", "base"):  # the one's address would be another, the other is required
                (superd.conf / "conf.d" / f"{name}.toml").unlink()
                superd.call("Reload")
                wish[name] = None
        else:
            superd.call(order, names=[name], wait=False)
            wish[name] = order != "Stop"
            if name == "base":  # who requires it goes along
                wish["box"] = wish["box"] and wish["base"]
            elif name == "box" and wish["box"]:
                wish["base"] = True
        if step % 100 == chance.choice([0, 33, 66]):
            superd.kill_role("superd-manager")  # in the middle of whatever the last orders have begun
        if step % 20:
            continue
        for name, up in wish.items():
            if up is None:
                eventually(lambda name=name: name in [row["name"] for row in superd.call("List")["services"]], False)
            elif not up:
                superd.wait_for(name, "stopped")
                assert superd.status(name)["state"] == "stopped"
            elif name == "web":
                eventually(lambda: superd.status("web")["state"] in ("listening", "ready"), True)
                eventually(lambda: served(superd), True)  # the first may meet a process that is being killed
            else:
                eventually(lambda name=name: superd.status(name)["state"], "ready")
        eventually(lambda: len(superd.services()), sum(processes[name] for name, up in wish.items() if up))
    for name, up in wish.items():
        assert up is None or superd.call("Stop", names=[name])["results"][0]["ok"]
    assert superd.services() == []
    assert not superd.find_records(message=re.compile("internal error"))
