"""Stopping: services, what they left behind, and superd itself."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from pathlib import Path

import pytest
from harness import PYTHON, Superd, ask, descendants, open_pidfds, survivors, toml, tree, wait_gone

IGNORES = "trap '' TERM; echo ready >&2; while :; do sleep 1000 & wait; done"
# Double fork, sessions of their own, one without the environment: no group, no session and no parent leads to them.
ESCAPES = (
    "setsid sh -c 'setsid sleep 1001 & setsid env -i sleep 1002 & exit' & wait; setsid sh -c 'exec sleep 1003' & "
    "sleep 0.1; echo ready >&2; exec sleep 1004"
)


def shell(superd: Superd, name: str, script: str, **keys: object) -> None:
    superd.write(name, toml(**{"run": "always-on", "command": ["/bin/sh", "-c", script], **keys}))


def stop(superd: Superd, name: str) -> dict[str, object]:
    return superd.call("Stop", names=[name])["results"][0]  # type: ignore[no-any-return]


def test_stubborn(superd: Superd) -> None:  # G5 G9
    """TERM is ignored: KILL after stop_timeout, said and shown; the children of the process go too."""
    shell(superd, "s", IGNORES, stop_timeout="300ms")
    superd.start()
    superd.wait_record(event="output", message="ready")
    family = open_pidfds(superd.services())
    assert len(family) == 2
    assert stop(superd, "s")["ok"]
    superd.wait_record(service="s", message=re.compile(r"did not stop within 0.3 s; killing it"))
    assert superd.wait_record(event="exit", service="s")["signal"] == "KILL"
    assert not survivors(family)
    for fd in family.values():
        os.close(fd)


# What superd does where it cannot have cgroups, seen where it could.
NO_CGROUPS = ("unshare", "--mount", "/bin/sh", "-c", 'mount -t tmpfs none /sys/fs/cgroup && exec "$@"', "sh")


@pytest.mark.parametrize(
    ("mode", "wrapper"), [("always-on", ()), ("always-on", NO_CGROUPS), ("per-connection", ())],
    ids=["cgroup", "no cgroup", "per-connection"],
)  # fmt: skip
def test_escaped(superd: Superd, mode: str, wrapper: tuple[str, ...]) -> None:  # G6
    """kill_mode "tree": what has left group, session and parent is found and ended; in a cgroup nothing can hide."""
    if wrapper and os.geteuid() != 0:
        pytest.skip("needs root: a mount namespace")
    keys = {"listen": "tcp:127.0.0.1:0", "pass_": "stdio"} if mode == "per-connection" else {}
    shell(superd, "s", ESCAPES, run=mode, stop_timeout="2s", **keys)
    superd.start(wrapper=wrapper)
    client = superd.connect("s") if keys else None
    superd.wait_record(event="output", message="ready")
    assert len(superd.services()) >= 3
    group = own_group() / f"superd.{superd.pid}" / "s"
    grouped = group.exists() and not wrapper
    assert grouped == (mode == "always-on" and not wrapper and os.access(own_group(), os.W_OK))
    family = open_pidfds([pid for pid in superd.services() if grouped or b"1002" not in cmdline(pid)])
    assert stop(superd, "s")["ok"]
    assert not survivors(family)
    for fd in family.values():
        os.close(fd)
    if client is not None:
        client.close()
    superd.stop()
    assert not group.parent.exists()


def own_group() -> Path:
    """The directory of this process's cgroup v2; one that is not there if there is none."""
    inside = re.search(r"^0::/(.*)$", Path("/proc/self/cgroup").read_text(), re.M)
    mount = re.search(r"^(?:\S+ ){4}(\S+) .* - cgroup2 ", Path("/proc/self/mountinfo").read_text(), re.M)
    return Path(mount[1], inside[1]) if inside and mount else Path("/nonexistent")


def cmdline(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


@pytest.mark.parametrize("kill_mode", ["group", "process"])
def test_kill_modes(superd: Superd, kill_mode: str) -> None:
    """group: the process group and no more; process: it alone. superd itself leaves nobody, whatever they say."""
    script = "sleep 1001 & setsid sleep 1002 & sleep 0.1; echo ready >&2; exec sleep 1000"
    shell(superd, "s", script, kill_mode=kill_mode)
    superd.start()
    superd.wait_record(event="output", message="ready")
    assert stop(superd, "s")["ok"]
    superd.wait_record(event="exit", service="s")
    left = {b"1002"} if kill_mode == "group" else {b"1001", b"1002"}
    found = {cmdline(pid).split(b"\0")[1] for pid in superd.services()}
    assert left <= found if kill_mode == "process" else found == left
    superd.stop()


def test_exit_just_before_the_signal(superd: Superd) -> None:  # G8
    """Stops and restarts around the exit of a process that lives for some milliseconds."""
    shell(superd, "s", "sleep 0.02", restart="always", restart_delay="1ms", restart_delay_max="5ms")
    superd.start()
    for _ in range(40):
        assert stop(superd, "s")["ok"]
        assert superd.status("s")["state"] == "stopped"
        superd.call("Start", names=["s"], wait=False)
    assert not superd.find_records(message=re.compile("internal error"))


def test_stopped_process(superd: Superd) -> None:  # G10
    """SIGSTOP: it is continued, so that its own way to end runs."""
    shell(superd, "s", "trap 'echo goodbye >&2; exit 3' TERM; echo ready >&2; while :; do sleep 0.05; done")
    superd.start()
    superd.wait_record(event="output", message="ready")
    os.kill(superd.status("s")["pid"], signal.SIGSTOP)
    assert stop(superd, "s")["ok"]
    superd.wait_record(event="output", message="goodbye")
    assert superd.wait_record(event="exit", service="s")["status"] == 3


@pytest.mark.parametrize("mode", ["per-connection", "always-on"])
def test_exit_statuses(superd: Superd, mode: str) -> None:  # G12
    """Exit code and signal are kept apart: 9 is not KILL, 137 is 137."""
    if mode == "always-on":
        for number in (0, 1, 9, 137, 255):
            shell(superd, f"s{number}", f"exit {number}", run="once")
        for name in ("KILL", "TERM", "SEGV", "PIPE"):
            shell(superd, f"k{name.lower()}", f"kill -{name} $$", run="once")
        superd.start()
        for number in (0, 1, 9, 137, 255):
            record = superd.wait_record(event="exit", service=f"s{number}")
            assert (record["status"], record.get("signal")) == (number, None)
        for name in ("KILL", "TERM", "SEGV", "PIPE"):
            record = superd.wait_record(event="exit", service=f"k{name.lower()}")
            assert (record.get("status"), record["signal"]) == (None, name)
    else:
        command = ["/bin/sh", "-c", "read how; eval $how"]
        superd.write("s", toml(listen="tcp:127.0.0.1:0", command=command))
        superd.start()
        for index, (how, wanted) in enumerate(
            {"exit 0": (0, None), "exit 9": (9, None), "exit 255": (255, None), "kill -9 $$": (None, "KILL"),
             "kill -SEGV $$": (None, "SEGV")}.items()
        ):  # fmt: skip
            assert ask(superd.connect("s"), how.encode() + b"\n") == b""
            record = superd.wait_records(index + 1, event="exit", service="s")[index]
            assert (record.get("status"), record.get("signal")) == wanted


def test_service_dies_with_clients_waiting(superd: Superd) -> None:  # G18
    """kill -9 of an on-demand service with 20 clients in the queue: the next process serves all 20."""
    gate = superd.dir / "gate"
    code = (
        "import os, socket, sys; s = socket.socket(fileno=3)\n"
        f"c = s.accept()[0]; c.sendall(b'%d' % os.getpid()) if os.path.exists({str(gate)!r}) else c.recv(1)\n"
        "while True: c.close(); c = s.accept()[0]; c.sendall(b'%d' % os.getpid())"
    )
    superd.write("s", toml(listen="tcp:127.0.0.1:0", run="on-demand", command=[PYTHON, "-I", "-c", code]))
    superd.start()
    with superd.connect("s"):
        pid = superd.wait_record(event="start", service="s")["pid"]
        clients = [superd.connect("s") for _ in range(20)]
        gate.touch()
        os.kill(pid, signal.SIGKILL)
    for client in clients:
        with client:
            assert client.recv(10) not in (b"", str(pid).encode())
    assert superd.wait_record(event="exit", service="s")["signal"] == "KILL"


@pytest.mark.parametrize("signo", [signal.SIGTERM, signal.SIGINT])
def test_superd_stops_in_order(superd: Superd, signo: int) -> None:  # G5 P6
    """Willing, unwilling and stopped services, an open connection: exit 0 within the time limits, nobody left."""
    shell(superd, "willing", "echo ready >&2; exec sleep 1000")
    shell(superd, "unwilling", IGNORES, stop_timeout="500ms")
    shell(superd, "stopped", "echo ready >&2; kill -STOP $$; exec sleep 1000")
    superd.write("cat", toml(listen=f"unix:{superd.dir}/cat.sock", command=["/bin/cat"]))
    superd.start()
    superd.wait_records(3, event="output", message="ready")
    with superd.connect("cat") as client:
        client.sendall(b"x")
        assert client.recv(1) == b"x"
        family = open_pidfds(descendants(superd.pid))
        os.kill(superd.pid, signo)
        assert superd.wait_exit() == 0
        assert not survivors(family)
        for fd in family.values():
            os.close(fd)
        assert client.recv(1) == b""
    assert [path.name for path in superd.dir.iterdir()] == ["etc"]
    assert superd.records[-1]["message"] == "stopped"


def test_stop_timeout_of_everything(superd: Superd) -> None:
    """superd.toml's stop_timeout holds for all together, whatever the services say."""
    superd.write_daemon('stop_timeout = "300ms"')
    shell(superd, "s", IGNORES, stop_timeout="1h")
    superd.start()
    superd.wait_record(event="output", message="ready")
    superd.stop()


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT, signal.SIGQUIT])
def test_second_signal_is_quicker(superd: Superd, second: int) -> None:
    shell(superd, "s", IGNORES, stop_timeout="1h")
    superd.write_daemon('stop_timeout = "1h"')
    superd.start()
    superd.wait_record(event="output", message="ready")
    family = open_pidfds(superd.services())
    os.kill(superd.pid, signal.SIGTERM)
    superd.wait_record(message="stopping")
    os.kill(superd.pid, second)
    assert superd.wait_exit() == 0
    assert not survivors(family)
    for fd in family.values():
        os.close(fd)


def test_quit_stops_at_once(superd: Superd) -> None:
    shell(superd, "s", IGNORES, stop_timeout="1h")
    superd.write_daemon('stop_timeout = "1h"')
    superd.start()
    superd.wait_record(event="output", message="ready")
    os.kill(superd.pid, signal.SIGQUIT)
    assert superd.wait_exit() == 0


def test_signals_during_shutdown(superd: Superd) -> None:  # F9 F10 G13 K17
    """TERM, TERM, HUP, USR1 within some milliseconds, while everything stops: in order all the same, exit 0."""
    for number in range(5):
        shell(superd, f"s{number}", "trap 'echo bye >&2; exit 0' TERM; echo ready >&2; while :; do sleep 0.02; done")
    superd.start()
    superd.wait_records(5, event="output", message="ready")
    for signo in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGHUP, signal.SIGUSR1, signal.SIGWINCH):
        os.kill(superd.pid, signo)
    assert superd.wait_exit() == 0
    assert len(superd.find_records(event="output", message="bye")) == 5
    assert not superd.garbage


@pytest.mark.parametrize("signals", [("TERM", "TERM", "HUP", "USR1"), ("HUP", "TERM", "USR1", "TERM", "QUIT")])
def test_signals_all_at_once(superd: Superd, signals: tuple[str, ...]) -> None:  # F10
    shell(superd, "s", IGNORES, stop_timeout="300ms")
    superd.start()
    superd.wait_record(event="output", message="ready")
    for name in signals:
        os.kill(superd.pid, getattr(signal, f"SIG{name}"))
    assert superd.wait_exit() == 0
    assert not superd.garbage


def test_harmless_signals(superd: Superd) -> None:  # F9 F11
    """1,000 HUP and USR1 in a row, CHLD, PIPE, WINCH, ALRM: it serves; state goes to the log."""
    superd.write("cat", toml(listen="tcp:127.0.0.1:0", command=["/bin/cat"]))
    superd.start()
    for _ in range(500):
        os.kill(superd.pid, signal.SIGHUP)
        os.kill(superd.pid, signal.SIGUSR1)
    for signo in (signal.SIGCHLD, signal.SIGPIPE, signal.SIGWINCH, signal.SIGALRM, signal.SIGUSR2, signal.SIGCONT):
        os.kill(superd.pid, signo)
    superd.wait_record(message=re.compile("cat: listening, 0 now, 0 in all"), service="cat")
    assert ask(superd.connect("cat"), b"x") == b"x"


def test_terminated_while_starting(superd: Superd) -> None:  # F10
    """TERM as early as can be: before or after it is ready, exit 0 and nothing left."""
    superd.write("cat", toml(listen=f"unix:{superd.dir}/c.sock", command=["/bin/cat"]))
    superd.launch()
    while not descendants(superd.pid) and not superd.lines:
        pass
    superd.stop()
    assert not (superd.dir / "c.sock").exists()


def test_bystander_lives(superd: Superd) -> None:  # H11 F15
    with subprocess.Popen(["/bin/sleep", "1000"], start_new_session=True) as bystander:
        try:
            shell(superd, "s", ESCAPES)
            superd.start()
            superd.wait_record(event="output", message="ready")
            superd.stop()
            assert bystander.poll() is None, tree(bystander.pid)
        finally:
            bystander.kill()
    wait_gone(bystander.pid)


def test_stop_pauses_the_listener(superd: Superd) -> None:  # O8
    """Clients of a stopped service wait in the queue: no process until it is started again, then they are served."""
    superd.write("cat", toml(listen="tcp:127.0.0.1:0", command=["/bin/cat"]))
    code = "import socket; socket.socket(fileno=3).accept()[0].sendall(b'x')"
    superd.write("own", toml(listen="tcp:127.0.0.1:0", run="on-demand", command=[PYTHON, "-I", "-c", code]))
    superd.start()
    for name in ("cat", "own"):
        assert stop(superd, name)["ok"]
        with superd.connect(name) as client:
            client.sendall(b"x")
            assert superd.status(name)["state"] == "stopped"
            assert not superd.find_records(event="start", service=name)
            assert superd.call("Start", names=[name])["results"][0]["ok"]
            assert client.recv(1) == b"x"
