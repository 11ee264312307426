"""[proxy]: superd accepts for a program that can only listen by itself, and carries the bytes."""

from __future__ import annotations

import hashlib
import os
import re
import select
import signal
import socket
import struct
import threading
from pathlib import Path
from typing import Any

import pytest
from harness import PYTHON, TIMEOUT_S, Superd, ask, eventually, fetch, read_all, toml

# Listens by itself, at a port of 127.0.0.1 or at a path. What it does with a connection: "echo"; "pid", the same behind
# a line with its pid; "digest", of all that comes, then as much of its own; "bye", it ends its own direction first;
# "flood", it sends until nobody takes more, and says how much that was. "await PATH": it listens when somebody has
# written to that FIFO. "never": it does not. "dies": nor that for long.
SERVER = """
import hashlib, os, select, signal, socket, sys, threading
where, what, *rest = sys.argv[1:]

def serve(conn):
    with conn:
        if what == 'pid': conn.sendall(b'%d\\n' % os.getpid())
        if what in ('echo', 'pid'):
            while data := conn.recv(65536): conn.sendall(data)
        if what == 'digest':
            found, size = hashlib.sha256(), 0
            while data := conn.recv(65536):
                found.update(data)
                size += len(data)
            conn.sendall(found.hexdigest().encode() + b'z' * size)
        if what == 'bye':
            conn.sendall(b'bye')
            conn.shutdown(socket.SHUT_WR)
            size = 0
            while data := conn.recv(65536): size += len(data)
            print('got', size, flush=True)
        if what == 'flood':
            conn.setblocking(False)
            sent = 0
            while select.select([], [conn], [], 0.5)[1]: sent += conn.send(bytes(65536))
            print('stalled at', sent, flush=True)
            conn.setblocking(True)
            conn.sendall(b'end')

if what == 'never': signal.pause()
if what == 'dies': sys.exit(3)
if rest: open(rest[0]).read()
print('stdin', os.readlink('/proc/self/fd/0'), os.environ.get('LISTEN_FDS'), os.environ.get('AT'), flush=True)
if where.startswith('/'):
    server = socket.socket(socket.AF_UNIX)
    server.bind(where)
    server.listen(4)
else:
    server = socket.create_server(('127.0.0.1', int(where)))
while True:
    threading.Thread(target=serve, args=(server.accept()[0],), daemon=True).start()
"""
TO = "tcp:127.0.0.1:${port}"
SIZE = 10_000_000


def program(*what: str) -> list[str]:
    return [PYTHON, "-u", "-c", SERVER, "${port}", *what]


def write(superd: Superd, *what: str, proxy: dict[str, Any] | None = None, **keys: Any) -> None:
    keys = {"listen": "tcp:127.0.0.1:0", "command": program(*what), **keys}
    keys = {name: value for name, value in keys.items() if value is not None}
    superd.write("p", toml(**keys, proxy={"to": TO, **(proxy or {})}))


def serve(superd: Superd, *what: str, proxy: dict[str, Any] | None = None, **keys: Any) -> None:
    write(superd, *what, proxy=proxy, **keys)
    superd.start()


def line(client: socket.socket) -> int:
    """The first line, byte by byte: nothing behind it is taken."""
    found = b""
    while not found.endswith(b"\n"):
        part = client.recv(1)
        assert part, found
        found += part
    return int(found)


def is_silent(client: socket.socket, wait_s: float = 0.0) -> bool:
    return not select.select([client], [], [], wait_s)[0]


def test_a_real_server(superd: Superd) -> None:
    room = superd.room("www")
    (room / "x.txt").write_text("hello from a file\n")
    command = ["python3", "-m", "http.server", "--bind", "127.0.0.1", "--directory", str(room), "${port}"]
    superd.write("web", toml(listen="tcp:127.0.0.1:0", command=command, proxy={"to": TO}))
    superd.start()
    assert superd.status("web")["state"] == "listening" and not superd.find_records(event="start")
    for _ in range(3):
        assert ask(superd.connect("web"), b"GET /x.txt HTTP/1.0\r\n\r\n").endswith(b"\r\n\r\nhello from a file\n")
    assert len(superd.find_records(event="start", pid=re.compile("."))) == 1


def test_clients_are_held_until_it_is_ready(superd: Superd) -> None:
    fifo = superd.dir / "go"
    os.mkfifo(fifo)
    fifo.chmod(0o644)
    serve(superd, "pid", str(fifo))
    with superd.connect("p") as first, superd.connect("p") as second:
        second.sendall(b"early")
        superd.wait_records(3, event="start", service="p")  # two clients, and one process
        assert superd.status("p")["state"] == "starting" and is_silent(first) and is_silent(second)
        with fifo.open("w"):
            pass
        assert line(first) == line(second)
        assert second.recv(5, socket.MSG_WAITALL) == b"early"
        row = superd.status("p")
        assert (row["state"], row["now"], row["total"]) == ("ready", 2, 2)
        (status,) = superd.call("Status", names=["p"])["services"]
        assert len(status["processes"]) == 3
        assert len(superd.call("Connections", names=["p"])["connections"]) == 2
    eventually(lambda: superd.status("p")["now"], 0)


def test_the_process_gets_no_socket_and_one_port(superd: Superd) -> None:
    note = superd.room("notes", user="nobody") / "port"
    pre = ["/bin/sh", "-c", f"echo -n $0 >{note}", "${port}"]
    serve(superd, "pid", environment={"AT": "${port}"}, start_pre=[pre])
    with superd.connect("p") as client:
        line(client)
    said = superd.wait_record(event="output", service="p", message=re.compile("stdin"))["message"]
    assert re.fullmatch(r"stdin /dev/null None \d+", said)
    assert note.read_text() == said.split()[-1] != str(superd.address("p")[1])


@pytest.mark.parametrize("listen", ["tcp:127.0.0.1:0", "unix:DIR/front.sock"])
@pytest.mark.parametrize("to", [TO, "unix:DIR/room/own.sock"])
def test_many_clients_and_much_data(superd: Superd, listen: str, to: str) -> None:
    superd.room("room", user="nobody")
    command = program("digest")
    if to != TO:
        command[4] = f"{superd.dir}/room/own.sock"
    text = toml(listen=listen, command=command, proxy={"to": to})
    superd.write("p", text.replace("DIR", str(superd.dir)))
    superd.start()
    data = os.urandom(SIZE)
    wanted = hashlib.sha256(data).hexdigest().encode()
    with superd.connect("p") as client:
        client.sendall(data)
        client.shutdown(socket.SHUT_WR)  # the other direction goes on
        answer = read_all(client)
    assert answer[:64] == wanted and len(answer) == 64 + SIZE
    clients = [superd.connect("p") for _ in range(40)]
    for client in clients:
        client.sendall(data[:100_000])
        client.shutdown(socket.SHUT_WR)
    wanted = hashlib.sha256(data[:100_000]).hexdigest().encode()
    assert {fetch(client)[:64] for client in clients} == {wanted}
    assert not superd.find_records(level="err")


def test_both_directions_at_once(superd: Superd) -> None:
    serve(superd, "echo")
    data = os.urandom(SIZE)
    with superd.connect("p") as client:

        def send() -> None:
            client.sendall(data)
            client.shutdown(socket.SHUT_WR)

        sender = threading.Thread(target=send)
        sender.start()
        assert read_all(client) == data
        sender.join()


def test_the_server_may_end_its_direction_first(superd: Superd) -> None:
    serve(superd, "bye")
    with superd.connect("p") as client:
        assert read_all(client) == b"bye"
        client.sendall(bytes(100_000))
        client.sendall(bytes(100_000))
    superd.wait_record(event="output", service="p", message="got 200000")
    superd.wait_record(event="exit", service="p", connection=re.compile("."))


def test_a_client_that_does_not_read_costs_no_memory(superd: Superd) -> None:  # N1
    def rss() -> int:
        return int(Path(f"/proc/{superd.manager}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")

    serve(superd, "flood")
    fetched = superd.connect("p")
    before = rss()
    superd.wait_record(event="output", service="p", message=re.compile("stalled at"))
    assert rss() - before < 8 << 20
    with superd.connect("p") as other:
        assert other.recv(1)  # nobody else waits for that
    assert fetch(fetched).endswith(b"end")


@pytest.mark.parametrize("what", ["never", "dies"])
def test_not_ready_in_time(superd: Superd, what: str) -> None:
    serve(superd, what, ready_timeout="1s", restart_delay="200ms", restart_limit="1/1m")
    for count in (1, 2):
        assert fetch(superd.connect("p")) == b""
        superd.wait_records(count, service="p", level="err", message=re.compile("not served: .*; client closed"))
    eventually(lambda: superd.status("p")["state"], "failed")
    assert len(superd.find_records(event="exit", service="p", pid=re.compile("."))) == 2


def test_it_dies_while_clients_are_connected(superd: Superd) -> None:
    serve(superd, "pid", stop_timeout="off")
    with superd.connect("p") as one, superd.connect("p") as other:
        pid = line(one)
        assert line(other) == pid
        os.kill(pid, signal.SIGKILL)
        assert read_all(one) == read_all(other) == b""
        superd.wait_record(event="exit", service="p", pid=pid, signal="KILL")
        eventually(lambda: superd.status("p")["now"], 0)  # although they are silent, and have not closed
        with superd.connect("p") as again:
            assert line(again) != pid


def test_idle_timeout(superd: Superd) -> None:
    serve(superd, "pid", idle_timeout="500ms")
    with superd.connect("p") as client:
        pid = line(client)
        assert is_silent(client, 1.2)
        assert superd.status("p")["pid"] == pid
    superd.wait_record(event="exit", service="p", pid=pid, signal="TERM")
    eventually(lambda: superd.status("p")["state"], "listening")
    with superd.connect("p") as client:
        assert line(client) != pid


def test_limits(superd: Superd) -> None:
    serve(superd, "pid", limits={"max_connections": 1, "rate": "100/1s"})
    with superd.connect("p") as first:
        pid = line(first)
        with superd.connect("p") as second:
            assert is_silent(second, 0.3)
            first.close()
            assert line(second) == pid
    write(superd, "pid", limits={"max_per_source": 1})
    assert superd.call("Reload")
    with superd.connect("p") as first:
        assert line(first) == pid  # the limits of a process that goes on
        assert fetch(superd.connect("p")) == b""
    superd.wait_record(event="refused", service="p")
    (status,) = superd.call("Status", names=["p"])["services"]
    assert status["refused"] == 1


def test_access_and_first_byte(superd: Superd) -> None:
    serve(superd, "pid", access={"deny": ["127.0.0.2"]}, limits={"first_byte_timeout": "300ms"})
    denied = socket.create_connection(superd.address("p"), TIMEOUT_S, ("127.0.0.2", 0))
    assert fetch(denied) == b""
    assert fetch(superd.connect("p")) == b""  # it says nothing
    superd.wait_records(2, event="refused", service="p")
    assert not superd.find_records(event="start") and superd.status("p")["state"] == "listening"
    with superd.connect("p") as client:
        client.sendall(b"x")
        line(client)


def test_proxy_header(superd: Superd) -> None:
    keys = {"listen": ["tcp:127.0.0.1:0", f"unix:{superd.dir}/p.sock", "tcp6:[::1]:0"]}
    serve(superd, "echo", proxy={"send_proxy_header": 1}, **keys)
    with superd.connect("p") as client:
        mine, theirs = client.getsockname(), client.getpeername()
        client.sendall(b"hello")
        client.shutdown(socket.SHUT_WR)
        assert read_all(client) == f"PROXY TCP4 127.0.0.1 127.0.0.1 {mine[1]} {theirs[1]}\r\nhello".encode()
    assert ask(superd.connect("p", 1), b"hello") == b"PROXY UNKNOWN\r\nhello"
    pid = superd.status("p")["pid"]
    write(superd, "echo", proxy={"send_proxy_header": 2}, **keys)
    superd.call("Reload")
    head = b"\r\n\r\n\0\r\nQUIT\n"
    with superd.connect("p", 2) as client:
        mine, theirs = client.getsockname(), client.getpeername()
        client.shutdown(socket.SHUT_WR)
        loopback = bytes(15) + b"\1"
        assert read_all(client) == head + b"\x21\x21\0\x24" + loopback * 2 + struct.pack("!HH", mine[1], theirs[1])
    assert ask(superd.connect("p", 1), b"hello") == head + b"\x20\0\0\0hello"
    assert superd.status("p")["pid"] == pid  # only the next connections are told otherwise


def test_behind_another_proxy(superd: Superd) -> None:
    """Who the header of a proxy in front names is the client for the limits, and for the program behind."""
    socket_ = {"listen": "tcp:127.0.0.1:0", "proxy_protocol": True, "proxy_trusted": ["127.0.0.1"]}
    keys = {"listen": None, "socket": [socket_], "access": {"deny": ["192.0.2.66"]}}
    serve(superd, "echo", proxy={"send_proxy_header": 1}, **keys)
    header = b"PROXY TCP4 192.0.2.7 198.51.100.1 1234 80\r\n"
    assert ask(superd.connect("p"), header + b"hello") == header + b"hello"
    assert superd.wait_record(event="start", service="p", peer="192.0.2.7:1234")
    assert ask(superd.connect("p"), header.replace(b".7 ", b".66 ")) == b""
    assert superd.wait_record(event="refused", service="p", peer="192.0.2.66:1234")


def test_ready_as_proxy_says(superd: Superd) -> None:
    serve(superd, "pid", proxy={"ready": "connect:tcp:127.0.0.1:${port}"})
    with superd.connect("p") as client:
        line(client)
    (status,) = superd.call("Status", names=["p"])["services"]
    assert status["ready"] == "connect:tcp:127.0.0.1:${port}"
    for ready in ("log:^stdin", "start"):  # neither says that it listens
        write(superd, "pid", proxy={"ready": ready})
        superd.call("Reload")
        with superd.connect("p") as client:
            line(client)


def test_always_on(superd: Superd) -> None:
    serve(superd, "pid", run="always-on")
    superd.wait_for("p", "ready")
    pid = superd.status("p")["pid"]
    with superd.connect("p") as client:
        assert line(client) == pid
        os.kill(pid, signal.SIGKILL)
        assert read_all(client) == b""
    with superd.connect("p") as client:  # held meanwhile
        assert line(client) != pid


def test_stop_restart_pause(superd: Superd) -> None:
    serve(superd, "pid")
    with superd.connect("p") as client:
        pid = line(client)
        assert superd.call("Restart", names=["p"])["results"][0]["ok"]
        assert read_all(client) == b""
    with superd.connect("p") as client:
        assert line(client) != pid
        assert superd.call("Stop", names=["p"])["results"][0]["ok"]
        assert read_all(client) == b""
        with superd.connect("p") as waiting:
            assert is_silent(waiting, 0.2)
            assert superd.call("Start", names=["p"])["results"][0]["ok"]
            line(waiting)
    superd.call("Pause", names=["p"])
    with superd.connect("p") as waiting:
        assert is_silent(waiting, 0.2)
        superd.call("Resume", names=["p"])
        line(waiting)


def test_drain_and_removal_let_clients_finish(superd: Superd) -> None:
    serve(superd, "pid")
    with superd.connect("p") as client:
        pid = line(client)
        superd.call("Drain", names=["p"], wait=False)
        eventually(lambda: superd.status("p")["state"], "stopping")
        client.sendall(b"x")
        assert client.recv(1) == b"x"
    superd.wait_record(event="exit", service="p", pid=pid, signal="TERM")
    eventually(lambda: superd.status("p")["state"], "stopped")
    superd.call("Start", names=["p"])
    with superd.connect("p") as client:
        pid = line(client)
        (superd.conf / "conf.d" / "p.toml").unlink()
        superd.call("Reload")
        client.sendall(b"x")
        assert client.recv(1) == b"x"
    superd.wait_record(event="exit", service="p", pid=pid, signal="TERM")


def test_the_process_outlives_the_manager(superd: Superd) -> None:
    serve(superd, "pid", idle_timeout="1s")
    with superd.connect("p") as client:
        pid = line(client)
        eventually(lambda: superd.status("p")["state"], "ready")
        superd.kill_role("superd-manager")
        assert read_all(client) == b""  # what is carried ends with who carries it
        with superd.connect("p") as again:
            assert line(again) == pid
            assert superd.status("p")["now"] == 1
    superd.wait_record(event="exit", service="p", pid=pid, signal="TERM")


def test_a_manager_that_dies_while_it_starts(superd: Superd) -> None:
    fifo = superd.dir / "go"
    os.mkfifo(fifo)
    fifo.chmod(0o644)
    serve(superd, "pid", str(fifo))
    with superd.connect("p") as client:
        started = superd.wait_record(event="start", service="p", pid=re.compile("."))
        superd.kill_role("superd-manager")
        assert read_all(client) == b""
    with superd.connect("p") as client:
        with fifo.open("w"):
            pass
        assert line(client) == started["pid"]


def test_the_table_comes_and_goes(superd: Superd) -> None:
    serve(superd, "pid")
    with superd.connect("p") as client:
        line(client)
        superd.write("p", toml(listen="tcp:127.0.0.1:0", command=["/bin/echo", "plain"]))
        superd.call("Reload")
        assert read_all(client) == b""
    assert fetch(superd.connect("p")) == b"plain\n"
    write(superd, "pid")
    superd.call("Reload")
    with superd.connect("p") as client:
        line(client)
        path = superd.conf / "conf.d" / "p.toml"
        text = path.read_text()
        path.unlink()
        superd.call("Reload")
        path.write_text(text)  # the one that is still being drained makes room
        superd.call("Reload")
        assert read_all(client) == b""
    mark = superd.mark()
    superd.call("Restart", names=["p"])
    superd.wait_record(after=mark, event="ready", service="p")


def test_clients_that_go_at_once_and_one_that_stays_to_the_end(superd: Superd) -> None:
    serve(superd, "pid", limits={"max_connections": 8})
    for _ in range(50):
        client = superd.connect("p")
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.close()  # reset
    with superd.connect("p") as client:
        line(client)
        eventually(lambda: superd.status("p")["now"], 1)
        superd.stop()
        assert read_all(client) == b""
    assert not superd.garbage and not superd.find_records(level="err")


def test_what_is_left_at_a_stop_still_goes_out(superd: Superd) -> None:
    serve(superd, "digest")
    data = bytes(300_000)
    with superd.connect("p") as client:
        client.sendall(data)
        client.shutdown(socket.SHUT_WR)
        assert client.recv(64, socket.MSG_WAITALL) == hashlib.sha256(data).hexdigest().encode()
        superd.wait_record(event="start", service="p", connection=re.compile("."))
        assert superd.call("Stop", names=["p"])["results"][0]["ok"]
        assert set(read_all(client)) == {ord("z")}
    eventually(lambda: superd.status("p")["now"], 0)


def test_a_client_that_does_not_take_what_is_left_is_ended(superd: Superd) -> None:
    serve(superd, "flood", stop_timeout="1s")
    with superd.connect("p") as client:
        superd.wait_record(event="output", service="p", message=re.compile("stalled at"))
        assert superd.call("Stop", names=["p"])["results"][0]["ok"]
        assert superd.status("p")["now"] == 1
        eventually(lambda: superd.status("p")["now"], 0)
        assert client.recv(1)


def test_what_it_requires_comes_first(superd: Superd) -> None:
    there = superd.dir / "there"
    superd.write("base", toml(command=["/bin/sleep", "1000"], ready=f"exec:/usr/bin/test -e {there}"))
    serve(superd, "pid", requires=["base"])
    with superd.connect("p") as client:
        assert is_silent(client, 0.2) and not superd.find_records(event="start", service="p", pid=re.compile("."))
        there.touch()
        line(client)
