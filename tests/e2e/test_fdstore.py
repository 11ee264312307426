"""FDSTORE=1: what a service stores comes back to its next process, whoever has died meanwhile."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
from collections.abc import Callable

import pytest
from harness import TIMEOUT_S, Superd, eventually, toml, wait_gone
from notifying import Gate, details, service

Build = Callable[..., str]

# Says what it has been given: "1 socket:stored", and FDSTORE.
LIST = (
    "names = os.environ.get('LISTEN_FDNAMES', '').split(':') if 'LISTEN_FDS' in os.environ else []\n"
    "assert 'LISTEN_FDS' not in os.environ or int(os.environ['LISTEN_FDS']) == len(names)\n"
    "assert 'LISTEN_PID' not in os.environ or int(os.environ['LISTEN_PID']) == os.getpid()\n"
    "say('given ' + ' '.join(names)); say('limit ' + os.environ.get('FDSTORE', 'none'))\n"
)
STAY = "\nnotify(b'READY=1'); say('up'); signal.signal(signal.SIGTERM, lambda *_: os._exit(0)); time.sleep(1000)"


def given(superd: Superd, start: int, name: str = "s") -> list[str]:
    """What the process of the n-th start says that it was given."""
    found = superd.wait_records(start, event="output", service=name, message=re.compile("^given "))[-1]
    return str(found["message"]).split()[1:]


def up(superd: Superd, start: int, name: str = "s") -> None:
    superd.wait_records(start, event="output", service=name, message="up")


# A server that stores its clients' connections as they come, and takes them back when it starts.
SERVER = """
fds = int(os.environ.get('LISTEN_FDS', 0))
names = os.environ.get('LISTEN_FDNAMES', '').split(':')
listener = socket.socket(fileno=3)
clients = {fd: socket.socket(fileno=fd) for fd, name in zip(range(3, 3 + fds), names) if name == 'client'}
say('has %d' % len(clients))
notify(b'READY=1')
while True:
    ready, _, _ = select.select([listener, *clients.values()], [], [])
    for sock in ready:
        if sock is listener:
            conn, _ = listener.accept()
            notify(b'FDSTORE=1\\nFDNAME=client', fds=[conn.fileno()])
            clients[conn.fileno()] = conn
        elif data := sock.recv(100):
            sock.send(b'%d: %s' % (os.getpid(), data))
        else:
            clients.pop(sock.fileno()).shutdown(socket.SHUT_RDWR)  # the store has it too: close() alone is no end
"""


@pytest.mark.parametrize("run", ["always-on", "on-demand"])
def test_clients_outlive_crashes(superd: Superd, run: str) -> None:
    """kill -9 of the server, of the manager, of both: the client's connection goes on and is answered."""
    service(superd, SERVER, listen="tcp:127.0.0.1:0", run=run, fdstore=8, restart="always", restart_delay="1ms")
    superd.start()
    seen = set()

    def ask(client: socket.socket, text: bytes) -> None:
        client.sendall(text)
        pid, _, echo = client.recv(100).partition(b": ")
        assert echo == text
        seen.add(int(pid))

    with superd.connect("s") as one, superd.connect("s") as two:
        for client in (one, two):
            ask(client, b"hello")
        (pid,) = seen
        eventually(lambda: details(superd)["stored"], 2)
        os.kill(pid, signal.SIGKILL)
        ask(one, b"again")
        ask(two, b"again")
        superd.wait_record(event="output", message="has 2")
        superd.kill_role("superd-manager")
        ask(one, b"third")
        superd.wait_record(message=re.compile("manager 2 took over"))
        os.kill(superd.status("s")["pid"], signal.SIGKILL)
        ask(two, b"fourth")
        assert len(seen) == 3
    said = superd.wait_records(3, event="output", service="s")
    assert [record["message"] for record in said] == ["has 0", "has 2", "has 2"]
    # Both have gone, and that is seen here too.
    eventually(lambda: details(superd)["stored"], 0)


@pytest.mark.parametrize("pass_", ["listen-fds", "stdio"])
def test_beside_the_sockets(superd: Superd, pass_: str) -> None:  # systemd#29670
    """Stored fds follow the sockets' own; with stdio they stand at 3 and are the only ones that LISTEN_FDS tells of."""
    code = LIST + (
        "if pass_ == 'stdio': assert os.fstat(0).st_ino == os.fstat(1).st_ino and os.fstat(0).st_mode >> 12 == 0o14\n"
        "if 'b' not in names:\n"
        "    r, w = os.pipe(); notify(b'FDSTORE=1\\nFDNAME=b\\nFDPOLL=0', fds=[r]); os.write(w, b'kept')\n"
        "else: say(os.read(3 + names.index('b'), 10).decode())\n"
    )
    service(superd, f"pass_ = {pass_!r}\n" + code + STAY, listen="udp:127.0.0.1:0", run="always-on", pass_=pass_,
            fdstore=1)  # fmt: skip
    superd.start()
    up(superd, 1)
    own = ["s"] if pass_ == "listen-fds" else []
    assert given(superd, 1) == own
    superd.wait_record(event="output", message="limit 1")
    superd.call("Restart", names=["s"])
    assert given(superd, 2) == [*own, "b"]
    superd.wait_record(event="output", message="kept")


def test_names_limits_and_removal(superd: Superd) -> None:
    """The rules of sd_pid_notify_with_fds(3), one after the other."""
    code = LIST + (
        "pairs = [os.pipe() for _ in range(9)]\n"
        "def store(words, *which): notify(b'FDSTORE=1\\n' + words, fds=[pairs[i][0] for i in which])\n"
        "if not names:\n"
        "    store(b'')\n"  # no fd: nothing
        "    store(b'FDNAME=two', 0, 1)\n"
        "    store(b'FDNAME=two', 1)\n"  # it is there
        "    store(b'', 2)\n"
        "    store(b'FDNAME=' + b'x' * 256, 3)\n"  # no name: "stored"
        "    store(b'FDNAME=a:b', 4)\n"
        "    store(b'FDNAME=gone', 5)\n"
        "    notify(b'FDSTOREREMOVE=1\\nFDSTORE=1\\nFDNAME=gone', fds=[pairs[6][0]])\n"
        "    notify(b'FDSTOREREMOVE=1')\n"  # it must have a name
        "    notify(b'FDNAME=x', fds=[pairs[6][0]])\n"  # nobody asked for it
        "    store(b'FDNAME=last\\nFDPOLL=1', 6, 7)\n"  # one of them is too much
        "    store(b'FDNAME=last', 8)\n"
    )
    service(superd, code + STAY, fdstore=6)
    superd.start()
    up(superd, 1)
    eventually(lambda: details(superd)["stored"], 6)
    full = superd.find_records(service="s", message=re.compile("cannot store more fds: fdstore = 6"))
    assert len(full) == 1  # said once
    superd.call("Restart", names=["s"])
    # Except for those whose other end has gone with the process.
    assert given(superd, 2) == []


def test_fds_are_polled_unless_they_said_no(superd: Superd) -> None:
    """A pipe whose writer has gone leaves the store; FDPOLL=0 stays, and a file cannot hang up."""
    code = LIST + (
        "if not names:\n"
        "    for words in (b'FDNAME=polled', b'FDNAME=kept\\nFDPOLL=0'):\n"
        "        r, w = os.pipe(); notify(b'FDSTORE=1\\n' + words, fds=[r]); os.close(r); os.close(w)\n"
        "    a, b = socket.socketpair(); a.setblocking(False); notify(b'FDSTORE=1\\nFDNAME=half', fds=[a.fileno()])\n"
        "    b.shutdown(socket.SHUT_WR); pid = os.fork() or (os.setsid(), time.sleep(1000))\n"
        "    notify(b'FDSTORE=1\\nFDNAME=file', fds=[os.open('/etc/passwd', os.O_RDONLY)])\n"
        "    notify(b'FDSTORE=1\\nFDNAME=epoll\\nFDPOLL=0', fds=[select.epoll().fileno()])\n"
        "    notify(b'FDSTORE=1\\nFDNAME=memfd', fds=[os.memfd_create('x')])\n"
        "else: say('half blocks: %s' % os.get_blocking(3 + names.index('half')))\n"
    )
    service(superd, code + STAY, fdstore=10, kill_mode="process")
    superd.start()
    up(superd, 1)
    superd.wait_record(service="s", message='a stored fd ("polled") has hung up; closing it')
    superd.call("Restart", names=["s"])
    assert given(superd, 2) == ["kept", "half", "file", "epoll", "memfd"]
    superd.wait_record(event="output", message="half blocks: False")


def test_two_opens_of_one_file_are_two(superd: Superd) -> None:
    code = LIST + (
        "if not names:\n"
        "    one, two = os.open('/etc/passwd', os.O_RDONLY), os.open('/etc/passwd', os.O_RDONLY)\n"
        "    notify(b'FDSTORE=1', fds=[one, two, os.dup(one), two])\n"
    )
    service(superd, code + STAY, fdstore=10)
    superd.start()
    up(superd, 1)
    superd.call("Restart", names=["s"])
    assert given(superd, 2) == ["stored", "stored"]


@pytest.mark.parametrize("how", ["stop", "done", "failed", "no store"])
def test_what_is_stopped_for_good_has_no_store(superd: Superd, how: str) -> None:
    """As FileDescriptorStorePreserve=restart: not one fd is left in the manager or the keeper."""
    gate = Gate(superd)
    end = {"done": f"gate({gate!r}); sys.exit(0)", "failed": f"gate({gate!r}); sys.exit(1)"}
    store = (
        "notify(b'FDSTORE=1\\nREADY=1', fds=[os.open('/etc/passwd', os.O_RDONLY), os.memfd_create('x')]); say('up')\n"
    )
    keys = {} if how == "no store" else {"fdstore": 5}
    service(superd, LIST + store + end.get(how, "time.sleep(1000)"), restart="no", **keys)
    superd.start()
    up(superd, 1)
    superd.wait_record(event="ready", service="s")
    assert details(superd)["stored"] == (0 if how == "no store" else 2)

    def files() -> int:
        found = [name for role in superd.descriptors().values() for names in role for name in names]
        return sum(name == "/etc/passwd" for name in found)

    assert files() == (0 if how == "no store" else 2)
    if how in end:
        gate.open()
    else:
        superd.call("Stop", names=["s"])
    eventually(lambda: superd.status("s")["state"], how if how in end else "stopped")
    eventually(files, 0)
    assert details(superd)["stored"] == 0


def test_an_on_demand_service_that_has_ended_has_no_store(superd: Superd) -> None:
    code = LIST + "socket.socket(fileno=3).recv(10)\nnotify(b'FDSTORE=1', fds=[os.memfd_create('x')])"
    service(superd, code, listen="udp:127.0.0.1:0", run="on-demand", fdstore=5, ready="start")
    superd.start()
    for start in (1, 2):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.sendto(b"x", superd.address("s"))
        assert given(superd, start) == ["s"]
        superd.wait_records(start, event="exit", service="s", status=0)


def test_more_than_a_message_carries(superd: Superd) -> None:
    """600 of them: a packet has room for 253 (unix(7))."""
    code = LIST + (
        "if not names:\n"
        "    for i in range(6): notify(b'FDSTORE=1\\nFDNAME=n%d' % i, fds=[os.memfd_create('x') for _ in range(100)])\n"
    )
    service(superd, code + STAY, fdstore=600, stop_timeout="5s", rlimit={"nofile": 2000})
    superd.start()
    up(superd, 1)
    eventually(lambda: details(superd)["stored"], 600)
    superd.kill_role("superd-manager")
    superd.wait_record(message=re.compile("manager 2 took over"))
    assert details(superd)["stored"] == 600
    superd.call("Restart", names=["s"])
    assert given(superd, 2) == [f"n{i}" for i in range(6) for _ in range(100)]


def test_libsystemd(superd: Superd, build: Build) -> None:
    """sd_pid_notify_with_fds(3), sd_listen_fds_with_names(3) and sd_notify_barrier(3)."""
    program = build("sd_notifier.c", "-lsystemd")
    store = ["store", "FDSTORE=1\nFDNAME=words", "/etc/passwd"]
    command = [program, "fds", *store, "barrier", "notify", "READY=1", "pause"]
    superd.write("s", toml(run="always-on", ready="notify", fdstore=3, command=command))
    superd.start()
    superd.wait_record(event="ready", service="s")
    superd.call("Restart", names=["s"])
    superd.wait_records(2, event="ready", service="s")
    said = [record["message"] for record in superd.wait_records(6, event="output", service="s")]
    assert said == ["fds 0", "store 1", "barrier 1", "fds 1 words", "store 1", "barrier 1"]


def test_systemd_notify(superd: Superd, require: Callable[[str], str]) -> None:
    program = require("systemd-notify")
    version = subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout.split()[1]
    if int(re.findall(r"\d+", version)[0]) < 254:
        pytest.skip(f"systemd-notify {version} has no --fd")
    script = f"echo given $LISTEN_FDNAMES; {program} --ready --fd=3 --fdname=words 3</etc/passwd; exec sleep 1000"
    command = ["/bin/sh", "-c", script]
    superd.write("s", toml(run="always-on", ready="notify", fdstore=1, notify_access="all", command=command))
    superd.start()
    superd.wait_record(event="ready", service="s")
    superd.call("Restart", names=["s"])
    assert given(superd, 2) == ["words"]


def test_a_stored_listener_is_served(superd: Superd) -> None:
    """A socket that the service has bound itself: clients who come while it is down wait in the backlog."""
    code = LIST + (
        "if names: sock = socket.socket(fileno=3)\n"
        "else:\n"
        "    sock = socket.create_server(('127.0.0.1', 0)); notify(b'FDSTORE=1\\nFDNAME=l', fds=[sock.fileno()])\n"
        "notify(b'READY=1\\nSTATUS=%d' % sock.getsockname()[1])\n"
        "while True:\n"
        "    conn, _ = sock.accept(); conn.send(b'%d' % os.getpid()); conn.close()\n"
    )
    service(superd, code, fdstore=1, restart="always", restart_delay="1ms")
    superd.start()
    superd.wait_record(event="ready", service="s")
    port = int(str(details(superd)["said"]))

    def ask() -> int:
        with socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT_S) as client:
            return int(client.recv(100))

    first = ask()
    os.kill(first, signal.SIGKILL)
    wait_gone(first)  # until then it may still accept
    assert ask() != first
