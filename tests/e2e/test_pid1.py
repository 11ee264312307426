"""superd as the first process of a pid namespace, in containers that lack this or that, and started in odd ways."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from harness import (
    PYTHON,
    TIMEOUT_S,
    Superd,
    ask,
    comm,
    cpu_s,
    descendants,
    eventually,
    read_all,
    toml,
)

Require = Callable[[str], str]
SUPERD = [sys.executable, "-I", "-m", "superd"]


@pytest.fixture
def namespace(require: Require, root: None) -> list[str]:
    """A wrapper: superd is PID 1 in it, with loopback of its own."""
    return [require("unshare"), "--pid", "--fork", "--mount-proc", "--kill-child=KILL"]


@pytest.fixture
def cat(superd: Superd) -> Superd:
    superd.garbage_expected = True
    superd.write("cat", toml(listen=f"unix:{superd.dir}/cat", command=["/bin/cat"]))
    return superd


def serves(superd: Superd) -> bool:
    return ask(superd.connect("cat"), b"x") == b"x"


def zombies(parent: int) -> int:
    found = 0
    for pid in (name for name in os.listdir("/proc") if name.isdigit()):
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            found += fields[0] == "Z" and int(fields[1]) == parent
    return found


# --- the duties of PID 1, FAILURES (e)


@pytest.mark.parametrize("name", ["TERM", "INT", "QUIT"])
def test_it_stops(cat: Superd, namespace: list[str], name: str) -> None:  # H1 F11 (e)1
    """A bare Python as PID 1 would not hear any of them but INT."""
    cat.write("service", toml(run="always-on", command=["/bin/sleep", "1000"]))
    cat.start(wrapper=namespace)
    assert serves(cat)
    began = time.monotonic()
    os.kill(cat.pid, getattr(signal, f"SIG{name}"))
    assert cat.wait_exit() == 0
    assert time.monotonic() - began < 5  # of which a bystander's load is most


def test_signals_that_do_not_end_it(cat: Superd, namespace: list[str]) -> None:  # H1 (e)8
    """Everything else that can be caught, three times, and CHLD that nobody's end has caused."""
    cat.start(wrapper=namespace)
    pid = cat.pid
    for _ in range(3):
        for signo in sorted(signal.valid_signals() - {*range(2, 4), 4, 5, 6, 7, 8, 9, 11, 15, 19, 31}):
            os.kill(pid, signo)
    assert serves(cat)
    assert cat.pid == pid
    cat.stop()


@pytest.mark.parametrize("signo", [signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS])
def test_a_crash_is_seen(cat: Superd, namespace: list[str], signo: int) -> None:  # (e)19
    """The kernel drops a fatal signal to a PID 1 that does not handle it: the container would hang, half dead."""
    cat.start(wrapper=namespace)
    os.kill(cat.pid, signo)
    assert cat.wait_exit() == signo


@pytest.mark.parametrize("count", [100, int(os.environ.get("SUPERD_ORPHANS", "1000"))])
def test_orphans_and_own_children(cat: Superd, namespace: list[str], count: int) -> None:  # F1 F2 G1-G4 X22 (e)2 (e)3
    """No zombie of so many orphans, each own child's status exact meanwhile, and little CPU for all of it.

    5,000: SUPERD_ORPHANS=5000 pytest -k test_orphans_and_own_children tests/e2e/test_pid1.py
    """
    script = f"for i in $(seq {count}); do (sleep 0.05 &); done; echo done"
    cat.write("orphans", toml(listen=f"unix:{cat.dir}/o", command=["/bin/bash", "-c", script]))
    cat.write("seven", toml(listen=f"unix:{cat.dir}/s", command=["/bin/sh", "-c", "exit 7"]))
    cat.start(wrapper=namespace)
    keeper = cat.pid
    before = cpu_s(keeper)
    with cat.connect("orphans") as client:
        for _ in range(50):
            with cat.connect("seven") as seven:
                assert read_all(seven) == b""
        assert read_all(client) == b"done\n"
    assert [row["status"] for row in cat.wait_records(50, event="exit", service="seven")] == [7] * 50
    cat.wait_record(event="exit", service="orphans", status=0)
    eventually(lambda: [pid for pid in descendants(keeper) if comm(pid) == "sleep"], [])
    since = time.monotonic()
    eventually(lambda: zombies(keeper), 0)
    assert time.monotonic() - since < 1
    assert cpu_s(keeper) - before < 1
    cat.stop()


def test_every_status_is_exact(superd: Superd, namespace: list[str]) -> None:  # F1 F2 G3 G12 (e)3
    """2,000 quick children of 2,000 connections: each one's status is what its client has asked for."""
    command = ["/bin/sh", "-c", "read n; exit $n"]
    superd.write("exit", toml(listen="tcp:127.0.0.1:0", command=command))
    superd.start(wrapper=namespace)
    wanted: dict[int, list[int]] = {}  # port of the client -> statuses, in order where it was used again
    for first in range(0, 2000, 50):
        clients = [superd.connect("exit") for _ in range(50)]
        for number, client in enumerate(clients, first):
            wanted.setdefault(client.getsockname()[1], []).append(number % 256)
            client.sendall(b"%d\n" % (number % 256))
        for client in clients:
            assert read_all(client) == b""
            client.close()
    for row in superd.wait_records(2000, event="exit", service="exit"):
        assert row["status"] == wanted[int(row["peer"].rpartition(":")[2])].pop(0), row
    superd.stop()


def test_quick_children_of_the_keeper(superd: Superd, namespace: list[str]) -> None:  # F2 (e)3
    """Each was started once, and its status is its own."""
    for number in range(60):
        superd.write(f"s{number}", toml(run="once", command=["/bin/sh", "-c", f"exit {number * 4}"]))
    superd.start(wrapper=namespace)
    found = {row["service"]: row["status"] for row in superd.wait_records(60, event="exit")}
    assert found == {f"s{number}": number * 4 for number in range(60)}
    superd.stop()


def test_a_main_command(namespace: list[str]) -> None:  # H5 (e)4 (e)6
    """PID 1 with its status; what it leaves is told, and what does not listen is killed, which never takes long."""
    script = "trap '' TERM; sleep 1000 & setsid sleep 1000 & test $PPID = 1 && exit 43"
    done = subprocess.run(
        [*namespace, *SUPERD, "--drain-timeout", "100ms", "--", "/bin/sh", "-c", script],
        timeout=TIMEOUT_S, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 43
    assert "did not stop within 0.1 s; killing it" in done.stderr


def test_kill_all_is_for_pid_1(tmp_path: Path) -> None:  # H11 (e)17
    with subprocess.Popen(["/bin/sleep", "1000"]) as bystander:
        done = subprocess.run([*SUPERD, "--", "/bin/sh", "-c", "sleep 1000 & exit 3"], timeout=TIMEOUT_S)
        assert done.returncode == 3
        assert bystander.poll() is None
        bystander.kill()


def test_the_order_of_the_end(cat: Superd, namespace: list[str]) -> None:  # G9 G10 (e)16
    """A willing service, one that ignores TERM, one that is stopped: within the time limit and a little, status 0."""
    cat.write(
        "willing",
        toml(
            run="always-on",
            command=["/bin/sh", "-c", "trap 'echo bye; exit' TERM; echo up; while :; do sleep 0.1; done"],
        ),
    )
    cat.write(
        "deaf",
        toml(run="always-on", stop_timeout="1s", command=["/bin/sh", "-c", "trap '' TERM; echo up; exec sleep 1000"]),
    )
    cat.write("still", toml(run="always-on", command=["/bin/sh", "-c", "echo up; kill -STOP $$; exec sleep 1000"]))
    cat.start(wrapper=namespace)
    for name in ("willing", "deaf", "still"):
        cat.wait_record(event="output", service=name, message="up")
    began = time.monotonic()
    cat.stop()
    assert time.monotonic() - began < 4


@pytest.mark.parametrize("pair", [("TERM", "TERM"), ("INT", "INT"), ("TERM", "QUIT")], ids="-".join)
def test_twice(cat: Superd, namespace: list[str], pair: tuple[str, str]) -> None:  # F10 G13 (e)18
    """The second one within some ms does not wait for the service that ignores the first."""
    cat.garbage_expected = False
    cat.write(
        "deaf",
        toml(run="always-on", stop_timeout="1h", command=["/bin/sh", "-c", "trap '' TERM; echo up; exec sleep 1000"]),
    )
    cat.start(wrapper=namespace)
    cat.wait_record(event="output", service="deaf", message="up")
    (deaf,) = [pid for pid in cat.services() if comm(pid) == "sleep"]
    keeper = cat.pid
    os.kill(keeper, getattr(signal, f"SIG{pair[0]}"))
    cat.wait_record(message="stopping")
    os.kill(keeper, getattr(signal, f"SIG{pair[1]}"))
    os.kill(keeper, signal.SIGHUP)
    os.kill(keeper, signal.SIGUSR1)
    assert cat.wait_exit() == 0
    assert comm(deaf) == ""
    assert cat.garbage == []


@pytest.mark.quiet
def test_it_sleeps_when_idle(cat: Superd, namespace: list[str]) -> None:  # (e)20
    """Voluntary context switches of keeper and manager in a second without anything to do.

    What others make in the directories above the configuration wakes superd too: one quiet stretch is enough.
    """
    cat.start(wrapper=namespace)
    assert serves(cat)
    cat.wait_for("cat", "idle")

    def switches() -> int:
        text = "".join(Path(f"/proc/{pid}/status").read_text() for pid in (cat.pid, cat.manager))
        return sum(int(number) for number in re.findall(r"^voluntary_ctxt_switches:\t(\d+)", text, re.M))

    counts = []
    while len(counts) < 30 and 0 not in counts:
        before = switches()
        select.select([], [], [], 0.5)  # a rate needs an interval
        counts.append(switches() - before)
    assert 0 in counts, counts
    cat.stop()


# --- what a container may lack


def in_bare_container(cat: Superd, namespace: list[str], preparation: str, *options: str, extra: str = "") -> None:
    """Start after shell commands in a mount namespace of its own."""
    wrapper = [*namespace, "--mount", *extra.split(), "/bin/sh", "-ec", f'{preparation}\nexec "$@"', "sh"]
    cat.start(*options, wrapper=wrapper)


def test_no_proc(cat: Superd, namespace: list[str]) -> None:  # H12 (e)9
    in_bare_container(cat, namespace, "mount -t tmpfs none /proc")
    assert serves(cat)
    assert len(cat.find_records(message=re.compile("there is no /proc"))) == 1
    keeper = cat.pid
    os.kill(keeper, signal.SIGTERM)
    assert cat.wait_exit() == 0


def test_no_proc_main_command(namespace: list[str]) -> None:  # (e)9
    script = 'mount -t tmpfs none /proc; exec "$@"'
    argv = [*namespace, "--mount", "/bin/sh", "-c", script, "sh", *SUPERD, "--", "/bin/sh", "-c", "sleep 1000 & exit 6"]
    assert subprocess.run(argv, timeout=TIMEOUT_S).returncode == 6


def test_a_bare_root(cat: Superd, namespace: list[str]) -> None:  # H12 (e)10
    """Read-only, without /run, /dev, /etc/passwd and cgroups: it serves, and says what it has to do without."""
    cat.write("numeric", toml(listen="tcp:127.0.0.1:0", user=65534, command=["/bin/cat"]))
    hide = (
        "mount --bind /dev/null /etc/passwd; mount -t tmpfs -o ro none /run; mount -t tmpfs -o ro none /sys/fs/cgroup"
    )
    in_bare_container(cat, namespace, f"{hide}; mount -t tmpfs -o ro none /dev; mount -o remount,ro,bind / || :")
    assert ask(cat.connect("numeric"), b"x") == b"x"
    os.kill(cat.pid, signal.SIGTERM)
    assert cat.wait_exit() == 0


def test_a_user_namespace(superd: Superd, require: Require, root: None) -> None:  # E9 H12 (e)11
    """Only root is mapped: a service of another user does not start, and is never run as root; the others run."""
    superd.garbage_expected = True
    superd.write("own", toml(listen="tcp:127.0.0.1:0", user="root", command=["/usr/bin/id", "-u"]))
    superd.write("other", toml(listen="tcp:127.0.0.1:0", user="nobody", command=["/usr/bin/id", "-u"]))
    superd.start(
        wrapper=[
            require("unshare"),
            "--user",
            "--map-root-user",
            "--pid",
            "--fork",
            "--mount-proc",
            "--kill-child=KILL",
        ]
    )
    with superd.connect("own") as client:
        assert read_all(client) == b"0\n"
    client = superd.connect("other")
    superd.wait_record(service="other", level="err", message=re.compile("cannot enter its context: .*user namespace"))
    client.close()
    os.kill(superd.pid, signal.SIGTERM)
    assert superd.wait_exit() == 0
    assert not superd.find_records(event="start", service="other")


@pytest.mark.parametrize("capability", ["cap_setgid", "cap_setuid", "cap_net_bind_service"])
def test_without_a_capability(superd: Superd, namespace: list[str], require: Require, capability: str) -> None:  # (e)12
    """What needs it fails, and the message names it."""
    superd.garbage_expected = True
    port = "1" if capability == "cap_net_bind_service" else "0"
    superd.write("s", toml(listen=f"tcp:127.0.0.1:{port}", user="games", command=["/usr/bin/id", "-u"]))
    superd.write("own", toml(listen="tcp:127.0.0.1:0", user="root", command=["/usr/bin/id", "-u"]))
    drop = [require("capsh"), f"--drop={capability}", "--", "-c", 'exec "$@"', "x"]
    superd.start(wrapper=[*namespace, "--net", "/bin/sh", "-c", 'ip link set lo up; exec "$@"', "x", *drop])
    if port == "0":
        knock(superd)
    superd.wait_record(service="s", level="err", message=re.compile(capability.upper()))
    os.kill(superd.pid, signal.SIGTERM)
    assert superd.wait_exit() == 0


def knock(superd: Superd) -> None:
    """A connection in the namespace's own network."""
    host, port = superd.address("s")
    code = f"import socket; socket.create_connection(({host!r}, {port}))"
    subprocess.run(
        ["nsenter", f"--net=/proc/{superd.pid}/ns/net", PYTHON, "-I", "-c", code], timeout=TIMEOUT_S, check=True
    )


# --- how it is started


def odd(number: int) -> Callable[[], None]:
    """A preexec function."""

    def prepare() -> None:
        if number == 0:
            for fd in (0, 1):  # 2 is where the test reads the log
                os.close(fd)
        elif number == 1:
            signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        elif number == 2:
            for signo in (signal.SIGCHLD, signal.SIGPIPE, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                signal.signal(signo, signal.SIG_IGN)
        elif number == 3:
            os.umask(0)
        elif number == 4:
            os.umask(0o777)
        elif number == 5:
            gone = f"/tmp/superd-gone-{os.getpid()}"
            os.mkdir(gone)
            os.chdir(gone)
            os.rmdir(gone)
        elif number == 6:
            os.nice(19)

    return prepare


@pytest.mark.parametrize("number", range(7))
def test_odd_starts(superd: Superd, number: int) -> None:  # E5-E7 E19 E25, (c) environment
    """It serves all the same, and its services see nothing of it."""
    script = "umask; pwd; grep -c '^Sig[BI].*[1-9a-f]$' /proc/self/status"
    superd.write("cat", toml(listen="tcp:127.0.0.1:0", command=["/bin/cat"]))
    superd.write("state", toml(listen="tcp:127.0.0.1:0", command=["/bin/sh", "-c", script]))
    superd.start(preexec=odd(number))
    assert serves(superd)
    with superd.connect("state") as client:
        assert read_all(client) == b"0022\n/\n0\n"
    superd.stop()


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"NOTIFY_SOCKET": "garbage"},
        {"NOTIFY_SOCKET": "/nonexistent/" + "x" * 200},
        {"NOTIFY_SOCKET": "@nobody"},
        {"LISTEN_FDS": "garbage", "LISTEN_PID": "-1"},
        {"LISTEN_FDS": "99999999999999999999", "LISTEN_PID": "1"},
        {"LANG": "C", "LC_ALL": "nowhere", "TZ": "garbage/../..", "HOME": "", "PATH": "", "PYTHONUTF8": "0"},
        {"PYTHONWARNINGS": "error", "PYTHONPATH": "/nonexistent", "PYTHONSTARTUP": "/nonexistent", "PYTHONHOME": "/x"},
    ],
    ids=lambda found: " ".join(found) or "empty",
)
def test_odd_environments(superd: Superd, environment: dict[str, str]) -> None:
    superd.write("cat", toml(listen="tcp:127.0.0.1:0", command=["/bin/cat"]))
    superd.start(environment=environment)
    assert serves(superd)
    superd.stop()


@pytest.mark.parametrize("limit", [16, 64])
def test_few_files(superd: Superd, limit: int) -> None:  # A1 F21
    """It serves, or says that it cannot and ends; nothing in between."""
    superd.garbage_expected = True
    superd.write("cat", toml(listen="tcp:127.0.0.1:0", command=["/bin/cat"]))
    superd.launch(preexec=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit)))
    superd.wait_record(message=re.compile("ready: 1"))
    with superd.connect("cat") as client:
        if limit > 16:
            client.sendall(b"x")
            assert client.recv(1) == b"x"
        else:
            superd.wait_record(service="cat", message=re.compile("cannot accept .*: too many open files; clients wait"))
    superd.stop()


def test_no_file_may_be_written(superd: Superd) -> None:
    """Not even in memory: it says so and ends."""
    superd.launch(preexec=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0)))
    superd.wait_record(message=re.compile("cannot start: the file size limit"))
    assert superd.wait_exit() == 1
    assert superd.garbage == []


def test_no_name(superd: Superd, require: Require) -> None:
    """argv[0] is empty."""
    superd.write("cat", toml(listen="tcp:127.0.0.1:0", command=["/bin/cat"]))
    superd.program = [require("superd")]  # with python -m the interpreter itself would not find its modules
    superd.start(wrapper=["/bin/bash", "-c", 'exec -a "" "$@"', "x"])
    assert serves(superd)
    superd.stop()
