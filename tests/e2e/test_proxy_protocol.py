"""PROXY headers on real sockets: who a client is, for whom that is believed, and what is left in the socket."""

from __future__ import annotations

import errno
import os
import re
import resource
import select
import signal
import socket
import struct
import subprocess
from collections.abc import Callable
from contextlib import ExitStack
from ipaddress import ip_address
from typing import Any

import pytest
from harness import PYTHON, TIMEOUT_S, Superd, ask, cpu_share, eventually, open_fds, toml

SAY = "echo $PROTO $REMOTE_ADDR $REMOTE_PORT $TCPREMOTEIP $TCPREMOTEPORT $TCPLOCALIP $TCPLOCALPORT; exec cat"
TELL = ["/bin/sh", "-c", SAY]
SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"
V1 = b"PROXY TCP4 192.0.2.1 198.51.100.2 5000 80\r\n"
NAMED = b"TCP 192.0.2.1 5000 192.0.2.1 5000 198.51.100.2 80\n"
PROXY, OTHER = "127.0.0.1", "127.0.0.2"


def v2(source: str, local: str, ports: tuple[int, int], more: bytes = b"", command: int = 1) -> bytes:
    one, other = ip_address(source), ip_address(local)
    block = one.packed + other.packed + struct.pack("!HH", *ports) + more
    return SIGNATURE + struct.pack("!BBH", 0x20 | command, 0x11 if one.version == 4 else 0x21, len(block)) + block


def proxied(
    superd: Superd, name: str = "s", mode: bool | str = True, *, listen: str = "tcp:127.0.0.1:0",
    trusted: list[str] | None = None, **keys: Any,
) -> None:  # fmt: skip
    """A service that tells who its client is and then says what it has read."""
    if not {"handler", "builtin", "command"} & keys.keys():
        keys["command"] = TELL
    table = {"listen": listen, "proxy_protocol": mode, "proxy_trusted": [PROXY, "::1"] if trusted is None else trusted}
    if listen.startswith("unix:") and trusted is None:
        del table["proxy_trusted"]
    superd.write(name, toml(**keys, socket=[table]))


def connect(superd: Superd, host: str = PROXY, name: str = "s") -> socket.socket:
    """From that address."""
    return socket.create_connection(superd.address(name), timeout=TIMEOUT_S, source_address=(host, 0))


def own(client: socket.socket) -> bytes:
    """What the service says of a client that no header speaks for."""
    (host, port), (local, local_port) = client.getsockname()[:2], client.getpeername()[:2]
    return f"TCP {host} {port} {host} {port} {local} {local_port}\n".encode()


def check(client: socket.socket, sent: bytes, expected: bytes, said: bytes = b"") -> None:
    """What the service says of the client, said or its own address, and what it has read."""
    wanted = (said or own(client)) + expected
    assert ask(client, sent) == wanted


def refused(client: socket.socket, sent: bytes = b"", *, ends: bool = False) -> bool:
    """The end, or a reset, without a byte."""
    try:
        client.sendall(sent)
        if ends:
            client.shutdown(socket.SHUT_WR)
        return client.recv(100) == b""
    except (ConnectionError, OSError) as error:
        return isinstance(error, ConnectionError) or error.errno == errno.ENOTCONN


def why(superd: Superd, service: str = "s", after: int = 0) -> str:
    return str(superd.wait_record(after=after, event="refused", service=service)["message"])


HEADERS = {
    "v1": (V1, NAMED),
    "v1-6": (b"PROXY TCP6 2001:db8::1 ::1 5 80\r\n", b"TCP 2001:db8::1 5 2001:db8::1 5 ::1 80\n"),
    "v2": (v2("192.0.2.1", "198.51.100.2", (5000, 80)), NAMED),
    "v2-more": (v2("192.0.2.1", "198.51.100.2", (5000, 80), b"\4\x0b\xb8" + bytes(3000)), NAMED),
    "v2-6": (v2("2001:db8::1", "2001:db8::2", (5, 80)), b"TCP 2001:db8::1 5 2001:db8::1 5 2001:db8::2 80\n"),
    "v2-mapped": (v2("::ffff:192.0.2.1", "::ffff:198.51.100.2", (5000, 80)), NAMED),
    "unknown": (b"PROXY UNKNOWN\r\n", b""),
    "unknown-more": (b"PROXY UNKNOWN what ever\r\n", b""),
    "local": (SIGNATURE + b"\x20\0\0\0", b""),
    "local-more": (v2("192.0.2.1", "198.51.100.2", (5000, 80), command=0), b""),
    "unspecified": (SIGNATURE + b"\x21\0\0\3\4\0\0", b""),
    "unix": (SIGNATURE + b"\x21\x31\0\xd8" + b"/run/x".ljust(108, b"\0") * 2, b""),
}


@pytest.mark.parametrize("mode", [True, "optional"])
def test_every_header(superd: Superd, mode: bool | str) -> None:
    """Header and data in one packet; what follows the header is the service's, also where it looks like another one."""
    proxied(superd, mode=mode)
    proxied(superd, "both", mode, listen="tcp:0")
    superd.start()
    for header, said in HEADERS.values():
        for data in (b"", b"hello", V1, b"\0" * 20000):
            check(connect(superd), header + data, data, said)
        check(superd.connect("both", host="::1"), header + b"x", b"x", said)
        check(superd.connect("both", host=PROXY), header + b"x", b"x", said)
    assert superd.call("Status", names=["s"])["services"][0]["refused"] == 0
    start = superd.wait_record(event="start", service="s")
    assert start["peer"] == "192.0.2.1:5000"


@pytest.mark.parametrize("kind", ["v1", "v2-6", "local"])
def test_in_single_bytes(superd: Superd, kind: str) -> None:
    """Half a header waits for its rest, and superd does nothing meanwhile."""
    proxied(superd)
    proxied(superd, "unix", listen=f"unix:{superd.dir}/x")
    superd.start()
    header, said = HEADERS[kind]
    for name in ("s", "unix"):
        with superd.connect(name) as client:
            if name == "s":
                client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for place in range(len(header)):
                client.sendall(header[place : place + 1])
                if place == len(header) // 2:
                    assert cpu_share(superd.manager, 0.3) < 0.3
            expected = said or (own(client) if name == "s" else b"IPC\n")
            assert ask(client, b"data") == expected + b"data"


def test_who_may_not_say_it(superd: Superd) -> None:
    """True: refused. "optional": served as it is, and its header is so many bytes for the service."""
    proxied(superd)
    proxied(superd, "o", "optional")
    superd.start()
    for data in (V1, b"hello", HEADERS["v2"][0], HEADERS["local"][0], b""):
        with connect(superd, OTHER) as client:
            assert refused(client, data)
    assert why(superd) == "proxy_protocol: not in proxy_trusted"
    for data in (V1, b"hello", HEADERS["v2"][0], HEADERS["local"][0], b"PROXY ", b""):
        check(connect(superd, OTHER, "o"), data, data)
    assert superd.status("s")["total"] == 0
    assert superd.call("Status", names=["s"])["services"][0]["refused"] == 5
    assert re.search(r'refus.*service="s".*reason="proxy_protocol".* 5\n', superd.call("Metrics")["text"])


def test_wrong_headers(superd: Superd) -> None:
    proxied(superd)
    proxied(superd, "o", "optional")
    superd.start()
    wrong = [
        V1.replace(b"TCP4", b"TCP6"), V1.replace(b"5000", b"65536"), b"PROXY \r\n", b"PROXY UNKNOWN ".ljust(200),
        SIGNATURE + b"\x31\x11\0\0", SIGNATURE + b"\x21\x11\0\x0b" + bytes(11), SIGNATURE + b"\x20\0\xff\xff",
    ]  # fmt: skip
    for data in wrong:
        for name in ("s", "o"):
            with connect(superd, name=name) as client:
                assert refused(client, data)
    assert why(superd).startswith("proxy_protocol: wrong header: ")
    for name in ("s", "o"):
        superd.wait_records(len(wrong), event="refused", service=name)
    for data in (V1[:20], SIGNATURE + b"\x21"):  # and the end
        for name in ("s", "o"):
            mark = superd.mark()
            with connect(superd, name=name) as client:
                assert refused(client, data, ends=True)
            if data == V1[:20]:
                assert why(superd, name, mark) == "proxy_protocol: the client ended before its header"
    for data in (b"GET / HTTP/1.0\r\n\r\n", b"", b"PR", b"\r\n", b"\r\n\r\nx", b"\0" * 5000):
        with connect(superd) as client:
            assert refused(client, data, ends=True)
        check(connect(superd, name="o"), data, data)
    assert superd.status("s")["total"] == 0 and superd.status("o")["total"] == 6


def test_silent_clients(superd: Superd) -> None:  # A18
    """In first_byte_timeout, or in five seconds: refused, or with "optional" served, unless a header has begun."""
    limits = {"first_byte_timeout": "300ms"}
    proxied(superd, limits=limits)
    proxied(superd, "o", "optional")
    superd.start()
    with connect(superd, name="o") as half, connect(superd, name="o") as silent, connect(superd, name="o") as finger:
        half.sendall(V1[:30])
        finger.sendall(b"\r\n")  # which a header could begin with
        with connect(superd) as client:
            assert refused(client)
        assert why(superd) == "proxy_protocol: no header came within 0.3 s"
        mark = superd.mark()
        with connect(superd) as client:
            client.sendall(V1)
            assert refused(client)
        assert why(superd, after=mark) == "nothing came within first_byte_timeout = 0.3 s"
        assert superd.status("s")["total"] == superd.status("o")["total"] == 0
        assert silent.recv(len(own(silent)), socket.MSG_WAITALL) == own(silent)
        assert finger.recv(len(own(finger)), socket.MSG_WAITALL) == own(finger)
        assert finger.recv(200) == b"\r\n"
        assert refused(half)
    assert why(superd, "o") == "proxy_protocol: no header came within 5 s"


def test_header_that_superd_sees_too_late(superd: Superd) -> None:
    """superd was held up, and the header had come in time: with "optional" nobody is taken for the proxy."""
    proxied(superd, mode="optional", limits={"first_byte_timeout": "300ms"})
    superd.start()
    manager = superd.manager
    before = open_fds(manager).count("socket")
    clients = []
    for _ in range(5):
        clients.append(connect(superd))
    eventually(lambda: open_fds(manager).count("socket") >= before + 5, True)
    os.kill(manager, signal.SIGSTOP)
    try:
        for client in clients:
            client.sendall(V1 + b"x")
        assert not select.select(clients, [], [], 0.6)[0]
    finally:
        os.kill(manager, signal.SIGCONT)
    for client in clients:
        assert ask(client, b"y") == NAMED + b"xy"


def header(host: str, port: int = 5000) -> bytes:
    return f"PROXY TCP4 {host} 198.51.100.2 {port} 80\r\n".encode()


def test_limit_of_each_source(superd: Superd) -> None:
    """It is the true client's; those that wait for their headers are the proxy's and count for nobody."""
    proxied(superd, limits={"max_per_source": 1})
    superd.start()
    waiting = [connect(superd) for _ in range(40)]
    first, second, third = waiting[:3]
    first.sendall(header("192.0.2.1"))
    assert first.recv(100).startswith(b"TCP 192.0.2.1 ")
    second.sendall(header("192.0.2.1", 5001))
    assert refused(second)
    record = superd.wait_record(event="refused", service="s", peer="192.0.2.1:5001")
    assert record["message"] == "too many connections from this source"
    third.sendall(header("192.0.2.2"))
    assert third.recv(100).startswith(b"TCP 192.0.2.2 ")
    (row, _) = superd.call("Connections")["connections"]
    assert row["peer"] == "192.0.2.1:5000"
    first.close()
    superd.wait_record(event="exit", service="s", peer="192.0.2.1:5000")
    waiting[3].sendall(header("192.0.2.1", 5002))
    assert waiting[3].recv(100).startswith(b"TCP 192.0.2.1 5002 ")
    for client in waiting:
        client.close()


def test_access(superd: Superd) -> None:
    """Rules are asked of the true client, and of the proxy where it speaks for itself."""
    proxied(superd, access={"allow": ["192.0.2.0/24", "2001:db8::/32"], "deny": ["192.0.2.9"]})
    superd.start()
    for host in ("198.51.100.1", "192.0.2.9", PROXY):
        with connect(superd) as client:
            client.sendall(header(host))
            assert refused(client)
    record = superd.wait_record(event="refused", service="s", peer="192.0.2.9:5000")
    assert record["message"] == "access: deny 192.0.2.9"
    with connect(superd) as client:
        client.sendall(HEADERS["local"][0])
        assert refused(client)
    with connect(superd) as client:
        assert ask(client, V1 + b"x") == NAMED + b"x"
    with connect(superd) as client:
        assert ask(client, HEADERS["v2-6"][0]) == HEADERS["v2-6"][1]


def test_names(superd: Superd) -> None:
    """Of the true client, too, whoever the proxy is."""
    proxied(superd, trusted=[OTHER], access={"allow": [".localhost"]})
    superd.start()
    with connect(superd, OTHER) as client:
        assert ask(client, header(PROXY)).startswith(b"TCP 127.0.0.1 5000 ")
    with connect(superd, OTHER) as client:
        client.sendall(header("192.0.2.1"))
        assert refused(client)


def test_unix(superd: Superd) -> None:
    """Whoever can connect may say it; the variables are those of TCP then, and else those of UNIX clients."""
    proxied(superd, listen=f"unix:{superd.dir}/x")
    proxied(superd, "t", listen=f"unix:{superd.dir}/y", trusted=[f"user:{os.geteuid()}"])
    proxied(superd, "u", "optional", listen=f"unix:{superd.dir}/z", trusted=["user:nobody"])
    superd.start()
    for name in "st":
        with superd.connect(name) as client:
            assert ask(client, V1 + b"x") == NAMED + b"x"
        with superd.connect(name) as client:
            assert ask(client, HEADERS["local"][0] + b"x") == b"IPC\nx"
        with superd.connect(name) as client:
            client.sendall(b"hello\n")
            assert refused(client)
    with superd.connect("u") as client:
        assert ask(client, V1) == b"IPC\n" + V1
    assert superd.wait_record(event="start", service="s")["peer"] == "192.0.2.1:5000"


def test_inherited(superd: Superd) -> None:
    """A listener that superd was given is of the kind that it is."""
    proxied(superd, listen="fd:web", trusted=[PROXY, "user:root"])
    with socket.create_server((PROXY, 0)) as given:
        code = "import os, sys; os.dup2(int(sys.argv[1]), 3); os.environ['LISTEN_PID'] = str(os.getpid())\n"
        wrapper = [PYTHON, "-c", f"{code}os.execv(sys.argv[2], sys.argv[2:])", str(given.fileno())]
        environment = {**os.environ, "LISTEN_FDS": "1", "LISTEN_FDNAMES": "web"}
        superd.start(pass_fds=[given.fileno()], environment=environment, wrapper=wrapper)
    check(connect(superd), V1 + b"x", b"x", NAMED)
    with connect(superd, OTHER) as client:
        assert refused(client, V1)


HANDLERS = """
import socketserver

def serve(conn):
    print(conn.remote_addr, conn.remote_port, conn.local_addr, conn.local_port)
    conn.output.write(conn.input.read())

class Request(socketserver.StreamRequestHandler):
    def handle(self):
        self.wfile.write(f"{self.client_address[:2]}".encode() + self.rfile.read())
"""


def test_handlers_and_builtins(superd: Superd) -> None:
    room = superd.dir / "code"
    room.mkdir()
    (room / "mine.py").write_text(HANDLERS)
    proxied(superd, handler="mine:serve", cwd=str(room))
    proxied(superd, "r", handler="mine:Request", cwd=str(room))
    proxied(superd, "u", handler="mine:Request", cwd=str(room), listen=f"unix:{superd.dir}/x")
    proxied(superd, "b", builtin="echo")
    superd.start()
    with connect(superd) as client:
        assert ask(client, V1 + b"x") == b"x192.0.2.1 5000 198.51.100.2 80\n"
    with connect(superd, name="r") as client:
        assert ask(client, V1 + b"x") == b"('192.0.2.1', 5000)x"
    with connect(superd, name="r") as client:
        port = client.getsockname()[1]
        assert ask(client, HEADERS["local"][0] + b"x") == f"('127.0.0.1', {port})x".encode()
    with superd.connect("u") as client:
        assert ask(client, V1 + b"x") == b"('192.0.2.1', 5000)x"
    with connect(superd, name="b") as client:
        assert ask(client, V1 + b"x") == b"x"
    assert superd.wait_record(event="start", service="b")["peer"] == "192.0.2.1:5000"


def test_killed_manager(superd: Superd) -> None:
    """Who waits for a header then is lost, as superd(8) says; a client that has its process is not, and is still who it
    was."""
    proxied(superd, limits={"max_per_source": 1})
    superd.start()
    with connect(superd) as served, connect(superd) as waiting:
        served.sendall(V1)
        assert served.recv(200) == NAMED
        waiting.sendall(V1[:10])
        superd.kill_role("superd-manager")
        assert refused(waiting)
        eventually(lambda: [row["peer"] for row in superd.call("Connections")["connections"]], ["192.0.2.1:5000"])
        with connect(superd) as client:
            client.sendall(V1)
            assert refused(client)  # the same source
        with connect(superd) as client:
            assert ask(client, header("192.0.2.2") + b"x").endswith(b"\nx")
        assert ask(served, b"still") == b"still"


def reload(superd: Superd) -> None:
    (row,) = superd.call("Reload")["entries"]
    assert row["action"] == "in place" and not row["why"], row


def test_changes(superd: Superd) -> None:
    """Taken up in place: the next clients, and those that wait for their header, go by the new file."""
    proxied(superd, trusted=[PROXY, OTHER])
    superd.start("--no-watch")
    with connect(superd) as one, connect(superd, OTHER) as other:
        one.sendall(V1[:10])
        one_more = connect(superd)
        assert ask(one_more, V1) == NAMED  # the two have been accepted before it
        proxied(superd, trusted=[PROXY])
        reload(superd)
        assert refused(other)
        assert ask(one, V1[10:] + b"x") == NAMED + b"x"
    with connect(superd) as one:
        one.sendall(b"PR")
        assert ask(connect(superd), V1) == NAMED
        superd.write("s", toml(listen="tcp:127.0.0.1:0", command=TELL))
        reload(superd)
        expected = own(one)
        assert ask(one, b"x") == expected + b"PRx"
    with connect(superd) as one:
        expected = own(one)
        assert ask(one, V1) == expected + V1


@pytest.mark.parametrize("rules", [{}, {"deny": ["192.0.2.1"]}], ids=["served", "refused"])
def test_drain(superd: Superd, rules: dict[str, Any]) -> None:
    """A client whose header is awaited is one of those that a drain waits for."""
    proxied(superd, access=rules)
    superd.start()
    with connect(superd) as one:
        one.sendall(V1[:10])
        assert ask(connect(superd), header("192.0.2.2"))  # the other has been accepted before it
        superd.wait_record(event="exit", service="s")
        superd.call("Drain", names=["s"], wait=False)
        assert superd.status("s")["state"] == "stopping"
        if rules:
            assert refused(one, V1[10:])
        else:
            assert ask(one, V1[10:] + b"x") == NAMED + b"x"
    superd.wait_for("s", "stopped")


def test_as_many_as_a_gate_holds(superd: Superd) -> None:
    """1024 wait for their headers; the next one in the kernel's queue, until one of them has gone."""
    proxied(superd, listen=f"unix:{superd.dir}/x")
    superd.start()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096), hard))
    try:
        with ExitStack() as stack:
            clients = [stack.enter_context(superd.connect("s")) for _ in range(1026)]
            eventually(lambda: len(open_fds(superd.manager)) > 1024, True)
            clients[1024].sendall(V1)
            clients[1024].settimeout(0.2)
            with pytest.raises(TimeoutError):
                clients[1024].recv(1)
            clients[1024].settimeout(TIMEOUT_S)
            assert ask(clients[0], V1) == NAMED
            assert clients[1024].recv(200) == NAMED
            assert ask(clients[1025], V1) == NAMED
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


ANSWER = r"""
while read -r line; do [ "$line" = "$(printf '\r')" ] && break; done
printf 'HTTP/1.0 200 OK\r\n\r\n%s %s\n' "$TCPREMOTEIP" "$TCPREMOTEPORT"
"""


def test_curl(superd: Superd, require: Callable[[str], str]) -> None:
    proxied(superd, command=["/bin/sh", "-c", ANSWER])
    superd.start()
    host, port = superd.address("s")
    argv = [
        require("curl"),
        "-sS",
        "--max-time",
        "20",
        "--haproxy-protocol",
        "-w",
        "%{local_port}",
        f"http://{host}:{port}/",
    ]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=30)
    found = re.fullmatch(r"127\.0\.0\.1 (\d+)\n(\d+)", done.stdout)
    assert done.returncode == 0 and found and found[1] == found[2], done
    without = [word for word in argv if word != "--haproxy-protocol"]
    assert subprocess.run(without, capture_output=True, timeout=30).returncode != 0
    assert why(superd) == "proxy_protocol: what the client says is no header"
