"""What every service can rely on, in each `run` and `pass`, and on each kind of socket."""

from __future__ import annotations

import json
import os
import re
import socket
import stat
from pathlib import Path
from typing import Any

import pytest
from harness import PYTHON, TIMEOUT_S, Superd, ask, fetch, read_all, toml

# Reports on itself to the first client, at fd 0 or 3, connection or listener; then ends.
REPORT = """
import json, os, socket, stat, sys
fd, takes_connections = int(sys.argv[1]), sys.argv[2] == "True"
listing = os.listdir("/proc/self/fd")
fds = sorted(int(n) for n in listing if os.path.exists(f"/proc/self/fd/{n}"))
status = dict(line.split(":\\t", 1) for line in open("/proc/self/status").read().splitlines())
facts = {
    "fds": fds, "pid": os.getpid(), "sid": os.getsid(0), "environment": dict(os.environ), "cwd": os.getcwd(),
    "ignored": int(status["SigIgn"], 16) & ~(1 << 12 | 1 << 24), "blocked": int(status["SigBlk"], 16),
    "umask": status["Umask"], "privileges": status["NoNewPrivs"], "uid": os.getuid(),
    "outputs": [stat.S_ISFIFO(os.fstat(n).st_mode) for n in (1, 2)],
}
os.write(2, b"reporting\\n")
sock = socket.socket(fileno=fd)
conn = sock if takes_connections else sock.accept()[0]
conn.sendall(json.dumps(facts).encode())
conn.shutdown(socket.SHUT_WR)
while conn.recv(100): pass
"""


def start_reporter(superd: Superd, run: str, pass_: str, **keys: Any) -> None:
    fd = "0" if pass_ == "stdio" else "3"
    command = [PYTHON, "-I", "-c", REPORT, fd, str(run == "per-connection")]
    superd.write("s", toml(listen="tcp:127.0.0.1:0", run=run, pass_=pass_, command=command, **keys))
    superd.start()


def check_service_contract(superd: Superd, run: str, pass_: str) -> None:
    facts = json.loads(fetch(superd.connect("s")))
    pid, environment = facts["pid"], facts["environment"]
    expected = [0, 1, 2] if pass_ == "stdio" else [0, 1, 2, 3]
    assert facts["fds"] == expected  # E1 E2
    assert facts["sid"] == pid  # E17
    assert (facts["ignored"], facts["blocked"]) == (0, 0)  # E5 E6
    assert (facts["cwd"], facts["umask"], facts["privileges"]) == ("/", "0022", "1")  # E18 E19 E23
    assert facts["uid"] == (os.geteuid() or 65534)  # E10
    assert environment["SUPERD_SERVICE"] == "s"
    assert re.fullmatch("[0-9a-f]{32}", environment["INVOCATION_ID"])
    listen = {name: value for name, value in environment.items() if name.startswith("LISTEN_")}
    listen.pop("LISTEN_PIDFDID", None)
    if pass_ == "stdio":
        assert not listen  # O2
    else:
        name = "connection" if run == "per-connection" else "s"
        assert listen == {"LISTEN_PID": str(pid), "LISTEN_FDS": "1", "LISTEN_FDNAMES": name}  # O1 O3
    if run == "per-connection":
        assert re.fullmatch(r"[0-9a-fA-F:.%]+", environment["REMOTE_ADDR"])  # E14
        assert environment["SUPERD_CONNECTION"] == superd.wait_record(event="start", service="s")["connection"]
    else:
        assert "REMOTE_ADDR" not in environment and "SUPERD_CONNECTION" not in environment
    assert superd.wait_record(event="start", service="s")["pid"] == pid
    assert superd.wait_record(event="output", service="s")["message"] == "reporting"  # E24
    record = superd.wait_record(event="exit", service="s")
    assert (record["pid"], record["status"]) == (pid, 0)
    if run in ("per-connection", "on-demand"):
        assert json.loads(fetch(superd.connect("s")))["pid"] != pid
    else:
        state = superd.call("Wait", names=["s"], **{"for": "idle"})["results"][0]["state"]
        assert state == "done"
        assert superd.call("Start", names=["s"])["results"][0]["ok"]
        assert json.loads(fetch(superd.connect("s")))["pid"] != pid


@pytest.mark.parametrize("pass_", ["stdio", "listen-fds"])
@pytest.mark.parametrize("run", ["per-connection", "on-demand", "always-on", "once"])
def test_contract(superd: Superd, run: str, pass_: str) -> None:
    start_reporter(superd, run, pass_)
    check_service_contract(superd, run, pass_)


@pytest.mark.parametrize("mode", ["per-connection", "on-demand"])
def test_contract_after_the_manager_died(superd: Superd, mode: str) -> None:
    superd.garbage_expected = True
    start_reporter(superd, mode, "listen-fds")
    superd.kill_role("superd-manager")
    superd.wait_record(message=re.compile("took over"))
    check_service_contract(superd, mode, "listen-fds")


# Takes what comes on each socket it was given, by kind, and answers with its place and name.
SOCKETS = """
import os, select, socket, stat
names = os.environ["LISTEN_FDNAMES"].split(":")
assert os.environ["LISTEN_PID"] == str(os.getpid()) and len(names) == int(os.environ["LISTEN_FDS"])
poll, held = select.poll(), {}
for number, name in enumerate(names):
    poll.register(3 + number, select.POLLIN)
    if stat.S_ISSOCK(os.fstat(3 + number).st_mode): held[3 + number] = socket.socket(fileno=3 + number)
while True:
    for fd, _ in poll.poll():
        text = f"{fd} {names[fd - 3]} ".encode()
        if fd not in held:
            os.write(1, text + os.read(fd, 100).strip() + b"\\n")
        elif held[fd].type == socket.SOCK_DGRAM:
            data, peer = held[fd].recvfrom(100)
            held[fd].sendto(text + data, peer)
        else:
            conn, _ = held[fd].accept()
            conn.sendall(text + conn.recv(100))
            conn.close()
"""

SCHEMES = [
    "tcp4:127.0.0.1:0", "tcp6:[::1]:0", "tcp:0", "tcp:localhost:0", "udp:127.0.0.1:0", "udp6:[::1]:0",
    "unix:DIR/a.sock", "unix:@superd-test-PID", "unix-dgram:DIR/d.sock", "unix-seqpacket:DIR/s.sock", "fifo:DIR/fifo",
]  # fmt: skip


@pytest.mark.parametrize("run", ["on-demand", "always-on"])
@pytest.mark.parametrize("listen", SCHEMES)
def test_schemes(superd: Superd, listen: str, run: str) -> None:
    """Each kind of address is bound, announced in canonical form, served, and served again by another manager."""
    superd.garbage_expected = True
    address = listen.replace("DIR", str(superd.dir)).replace("PID", str(os.getpid()))
    superd.write("s", toml(listen=address, run=run, command=[PYTHON, "-I", "-c", SOCKETS]))
    superd.start()
    for number in range(2):
        if number:
            superd.kill_role("superd-manager")
            superd.wait_record(message=re.compile("took over"))
        check_answers(superd, number)


def check_answers(superd: Superd, number: int) -> None:
    text = superd.listening("s")
    scheme, _, rest = text.partition(":")
    say = b"%d" % number
    if scheme == "fifo":
        assert stat.S_ISFIFO(os.stat(rest).st_mode)
        Path(rest).write_bytes(say + b"\n")
        superd.wait_record(event="output", message=f"3 s {number}")
    elif scheme in ("udp", "udp4", "udp6"):
        with socket.socket(socket.AF_INET6 if "[" in rest else socket.AF_INET, socket.SOCK_DGRAM) as client:
            client.settimeout(TIMEOUT_S)
            client.connect(superd.address("s"))
            client.send(say)
            assert client.recv(100) == b"3 s " + say
    elif scheme == "unix-dgram":
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as client:
            client.settimeout(TIMEOUT_S)
            own = superd.dir / f"own{number}"
            client.bind(str(own))
            own.chmod(0o777)
            client.connect(rest)
            client.send(say)
            assert client.recv(100) == b"3 s " + say
    else:
        hosts = ["127.0.0.1", "::1"] if text.startswith("tcp:") and "[" not in rest and ":" not in rest else [None]
        for host in hosts:
            with superd.connect("s", host=host) as client:
                client.sendall(say)
                assert client.recv(100) == b"3 s " + say


@pytest.mark.parametrize("count", [1, 2, 5, 16])
def test_order_of_sockets(superd: Superd, count: int) -> None:  # O3 O4 O5
    """fd 3 is the file's first socket, and so on, each under its name, also for the next manager."""
    superd.garbage_expected = True
    tables = "".join(
        f'[[socket]]\nlisten = "unix:{superd.dir}/{number}.sock"\nname = "n{number}"\n' for number in range(count)
    )
    superd.write("s", toml(run="on-demand", restart="no", command=[PYTHON, "-I", "-c", SOCKETS]) + tables)
    superd.start()
    for round_ in range(2):
        for number in reversed(range(count)):
            with superd.connect("s", number) as client:
                client.sendall(b"x")
                assert client.recv(100) == f"{3 + number} n{number} x".encode()
        if round_ == 0:
            superd.kill_role("superd-manager")
            superd.wait_record(message=re.compile("took over"))
            assert superd.call("Restart", names=["s"])["results"][0]["ok"]


def test_names_are_checked(superd: Superd) -> None:  # O3
    superd.garbage_expected = True
    superd.write("s", 'command = "/bin/cat"\nrun = "on-demand"\n[[socket]]\nlisten = "tcp:0"\nname = "a:b"')
    superd.start()
    assert superd.status("s")["state"] == "bad config"


@pytest.mark.parametrize("run", ["per-connection", "on-demand"])
def test_inherited_socket(superd: Superd, run: str) -> None:
    """fd:NAME is a listener that superd was itself given with LISTEN_FDS; superd's own name for it does not leak."""
    superd.garbage_expected = True
    code = (
        "import os, socket; s = socket.socket(fileno=3); s = s if os.environ.get('REMOTE_ADDR') else s.accept()[0]\n"
        "s.sendall(os.environ['LISTEN_FDNAMES'].encode())"
    )
    superd.write("s", toml(listen="fd:web", run=run, pass_="listen-fds", command=[PYTHON, "-I", "-c", code]))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = listener.getsockname()
        source = listener.fileno()

        def hand_over() -> None:
            os.environ["LISTEN_PID"] = str(os.getpid())
            if source == 3:
                os.set_inheritable(3, True)
            else:
                os.dup2(source, 3)

        command = [
            PYTHON, "-I", "-c",
            "import os, sys; os.environ['LISTEN_PID'] = str(os.getpid()); os.execv(sys.argv[1], sys.argv[1:])",
        ]  # fmt: skip
        environment = {**os.environ, "LISTEN_FDS": "1", "LISTEN_FDNAMES": "web"}
        superd.start(preexec=hand_over, pass_fds=[3], environment=environment, wrapper=command)
    for number in range(2):
        with socket.create_connection(address, timeout=TIMEOUT_S) as client:
            assert read_all(client) == (b"connection" if run == "per-connection" else b"s")
        if number == 0:
            superd.kill_role("superd-manager")
            superd.wait_record(message=re.compile("took over"))


def test_inherited_datagram_socket_has_no_connections(superd: Superd) -> None:
    """Said when it is taken, and the socket waits until the file is right."""
    superd.write("s", toml(listen="fd:in", command=["/bin/cat"]))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as inherited:
        inherited.bind(("127.0.0.1", 0))
        code = "import os, sys; os.dup2(int(sys.argv[1]), 3); os.environ['LISTEN_PID'] = str(os.getpid())\n"
        wrapper = [PYTHON, "-c", f"{code}os.execv(sys.argv[2], sys.argv[2:])", str(inherited.fileno())]
        environment = {**os.environ, "LISTEN_FDS": "1", "LISTEN_FDNAMES": "in"}
        superd.start(pass_fds=[inherited.fileno()], environment=environment, wrapper=wrapper)
        superd.wait_record(service="s", level="err", message=re.compile("is a datagram socket, which has no connec"))
        code = "import socket; s = socket.socket(fileno=3); s.sendto(b'taken', s.recvfrom(9)[1])"
        superd.write("s", toml(listen="fd:in", run="on-demand", command=[PYTHON, "-I", "-c", code]))
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            client.settimeout(TIMEOUT_S)
            client.connect(inherited.getsockname())
            client.send(b"x")
            assert client.recv(9) == b"taken"


def test_vsock(superd: Superd) -> None:
    try:
        with socket.socket(socket.AF_VSOCK) as probe, socket.socket(socket.AF_VSOCK) as other:
            probe.bind((1, socket.VMADDR_PORT_ANY))
            probe.listen()
            other.settimeout(1)
            other.connect(probe.getsockname())
    except OSError as error:
        pytest.skip(f"no vsock loopback here: {error}")
    superd.write("s", toml(listen="vsock:1:40123", command=["/bin/echo", "vsock"]))
    superd.start()
    with socket.socket(socket.AF_VSOCK) as client:
        client.settimeout(TIMEOUT_S)
        client.connect((1, 40123))
        assert read_all(client) == b"vsock\n"


@pytest.mark.parametrize("scheme", ["unix", "unix-seqpacket", "tcp6", "tcp"])
def test_per_connection_on(superd: Superd, scheme: str) -> None:
    listen = {"tcp6": "tcp6:[::1]:0", "tcp": "tcp:0"}.get(scheme, f"{scheme}:{superd.dir}/x.sock")
    superd.write("s", toml(listen=listen, command=["/bin/sh", "-c", "echo $PROTO $REMOTE_ADDR"]))
    superd.start()
    with superd.connect("s") as client:
        answer = client.recv(100).decode().split()
    assert answer == {"tcp6": ["TCP", "::1"], "tcp": ["TCP", "127.0.0.1"]}.get(scheme, ["IPC"])


def test_a_fifo_has_one_direction(superd: Superd) -> None:
    """What cat(1) writes goes to the log, and not back into the FIFO that it reads."""
    superd.write("s", toml(listen=f"fifo:{superd.dir}/f", command=["/bin/cat"], **{"pass": "stdio"}))
    superd.start()
    for line in ("one", "two"):
        (superd.dir / "f").write_text(f"{line}\n")
        superd.wait_record(event="output", service="s", message=line)
    assert len(superd.find_records(event="output")) == 2


def test_priority_of_a_connection(superd: Superd) -> None:
    """Linux gives an accepted socket all options of the listener but this one."""
    code = "import socket; print(socket.socket(fileno=0).getsockopt(socket.SOL_SOCKET, socket.SO_PRIORITY))"
    for name, keys in {"now": {}, "later": {"first_byte_timeout": "20s"}}.items():
        sockets = [{"listen": "tcp:127.0.0.1:0", "priority": 5}]
        superd.write(name, toml(command=[PYTHON, "-I", "-c", code], socket=sockets, limits=keys))
    superd.start()
    assert fetch(superd.connect("now")) == ask(superd.connect("later"), b"") == b"5\n"


def test_everything_is_bound_when_ready(superd: Superd) -> None:  # P4
    """20 services: each takes a connection as soon as superd has said that it is ready."""
    for number in range(20):
        run = "per-connection" if number % 2 else "always-on"
        code = "import socket; socket.socket(fileno=3).accept()[0].sendall(b'x')"
        command = ["/bin/echo", "-n", "x"] if number % 2 else [PYTHON, "-I", "-c", code]
        superd.write(f"s{number}", toml(listen=f"unix:{superd.dir}/{number}.sock", run=run, command=command))
    superd.start()
    clients = []
    for number in range(20):
        client = socket.socket(socket.AF_UNIX)
        client.settimeout(TIMEOUT_S)
        client.connect(f"{superd.dir}/{number}.sock")
        clients.append(client)
    assert [fetch(client) for client in clients] == [b"x"] * 20


def test_connection_records(superd: Superd) -> None:
    """At level debug: who was accepted where, before its process is started."""
    superd.write("cat", toml(listen="tcp:127.0.0.1:0", command=["/bin/cat"]))
    superd.write_daemon('log_level = "debug"')
    superd.start()
    with superd.connect("cat") as client:
        peer = "{}:{}".format(*client.getsockname())
        record = superd.wait_record(event="connection", service="cat")
        address = "tcp:{}:{}".format(*superd.address("cat"))
        assert (record["peer"], record["address"], record["level"]) == (peer, address, "debug")
        started = superd.wait_record(event="start", service="cat")
        assert started["connection"] == record["connection"]
