"""Python handlers: imported once in the service's context, a forked child for each connection."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
import urllib.request
from contextlib import ExitStack
from pathlib import Path

import pytest
from harness import Superd, ask, fetch, toml

ROOT = os.geteuid() == 0

SHOUT = r"""
import os, signal, sys

imported_by = os.getpid()
print("printed while it is imported")

def serve(conn):
    for line in conn.input:
        conn.output.write(line.upper())

def facts(conn):
    mine = os.fstat(0).st_ino == os.fstat(1).st_ino == os.fstat(conn.socket.fileno()).st_ino
    status = dict(line.split(":\t", 1) for line in open("/proc/self/status").read().splitlines())
    print(conn.remote_addr, conn.remote_port, conn.local_port, conn.id, conn.service, mine)
    print(os.getpid() == os.getsid(0), imported_by == os.getppid(), os.getuid(), os.getcwd(), *sys.argv[:0])
    print(status["SigBlk"].strip("0") or "0", status["SigIgn"].strip("0") or "0", status["NoNewPrivs"])
    print(os.environ["SUPERD_CONNECTION"] == conn.id, os.environ["COLOUR"], "NOTIFY_SOCKET" in os.environ)
    print(sorted(map(int, os.listdir("/proc/self/fd")))[:4])

def fail(conn):
    conn.output.write(b"so far\n")
    conn.output.flush()
    print("to the log", file=sys.stderr)
    conn.output.write(b"and this\n")
    raise RuntimeError("no more")

def leave(conn):
    sys.exit(7)

def killed(conn):
    os.kill(os.getpid(), signal.SIGKILL)

def wait(conn):
    conn.output.write(b"waiting\n")
    conn.output.flush()
    conn.input.read()
    conn.output.write(b"old")
"""


def write(superd: Superd, function: str, *, code: str = SHOUT, name: str = "s", **keys: object) -> Path:
    room = superd.dir / f"code-{name}"
    room.mkdir(exist_ok=True)
    (room / "shout.py").write_text(code)
    superd.write(name, toml(listen="tcp:127.0.0.1:0", handler=f"shout:{function}", cwd=str(room), **keys))
    return room / "shout.py"


def test_lines(superd: Superd) -> None:
    write(superd, "serve")
    superd.start()
    superd.wait_record(event="output", service="s", message="printed while it is imported")
    for text in (b"hello\n", b"again\nand again\n"):
        with superd.connect("s") as client:
            assert ask(client, text) == text.upper()
    assert superd.wait_records(2, event="exit", service="s")[1]["status"] == 0


def test_what_it_sees(superd: Superd) -> None:  # E5 E6 E13 E17 E23
    room = write(superd, "facts", environment={"COLOUR": "red"}).parent
    superd.start()
    with superd.connect("s") as client:
        port, answer = client.getsockname()[1], fetch(client).decode().splitlines()
    record = superd.wait_record(event="start", service="s")
    assert answer[0] == f"127.0.0.1 {port} {superd.address('s')[1]} {record['connection']} s True"
    assert answer[1] == f"True True {65534 if ROOT else os.getuid()} {room}"
    assert answer[2] == f"0 0 {int(ROOT or True)}"
    assert answer[3] == "True red False"
    assert answer[4].startswith("[0, 1, 2, 3")  # 3: its own socket object


@pytest.mark.parametrize(
    ("function", "answer", "end"),
    [
        ("fail", b"so far\nand this\n", {"status": 1}),
        ("leave", b"", {"status": 7}),
        ("killed", b"", {"signal": "KILL"}),
    ],
)
def test_ends(superd: Superd, function: str, answer: bytes, end: dict[str, object]) -> None:
    """An exception is logged with its traceback and the connection's id; statuses are as for any service."""
    write(superd, function)
    superd.start()
    with superd.connect("s") as client:
        assert fetch(client) == answer
    record = superd.wait_record(event="exit", service="s", **end)
    if function == "fail":
        lines = superd.find_records(event="output", service="s", connection=record["connection"])
        text = [line["message"] for line in lines]
        assert text[0] == "to the log" and text[-1] == "RuntimeError: no more"
        assert any(re.search(r'code-s/shout.py", line \d+, in fail', line) for line in text)


def test_socketserver_and_http(superd: Superd) -> None:
    """Handlers that were written for socketserver and http.server, unchanged."""
    code = r"""
import http.server, socketserver

class Upper(socketserver.StreamRequestHandler):
    def handle(self):
        self.wfile.write(self.rfile.readline().upper() + str(self.client_address[1]).encode())

class Page(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = f"{self.path} {self.server.server_port}".encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
"""
    write(superd, "Upper", code=code)
    write(superd, "Page", code=code, name="web")
    superd.start()
    with superd.connect("s") as client:
        port = client.getsockname()[1]
        assert ask(client, b"x\n") == f"X\n{port}".encode()
    host, port = superd.address("web")
    with urllib.request.urlopen(f"http://{host}:{port}/a", timeout=20) as reply:
        assert reply.read() == f"/a {port}".encode()
    superd.wait_record(event="output", service="web", message=re.compile('"GET /a HTTP/1.1" 200'))


@pytest.mark.parametrize("how", ["restart", "file"])
def test_new_code(superd: Superd, how: str) -> None:
    """`superctl restart`, or a file that has changed: the next connection has it, the ones there are finish."""
    path = write(superd, "wait")
    superd.start()
    with superd.connect("s") as old:
        assert old.recv(100) == b"waiting\n"
        path.write_text(SHOUT.replace('b"old"', 'b"new, and longer"'))
        if how == "restart":
            assert superd.call("Restart", names=["s"])["results"][0]["ok"]
        else:
            superd.wait_for("s", "ready")
            wait_for_the_next_look(superd)
        with superd.connect("s") as new:
            assert ask(new, b"") == b"waiting\nnew, and longer"
        assert ask(old, b"") == b"old"
    path.write_text("this is no Python")
    result = superd.call("Restart", names=["s"])["results"][0]
    assert "the old code goes on: cannot import shout:wait: SyntaxError" in result["note"]
    with superd.connect("s") as new:
        assert ask(new, b"") == b"waiting\nnew, and longer"


HALF = {"empty": "", "error": "raise RuntimeError", "code": SHOUT.replace('b"old"', 'b"half"')}


@pytest.mark.parametrize("half", HALF.values(), ids=list(HALF))
def test_written_while_it_is_read(superd: Superd, half: str) -> None:
    """An editor that writes in place: a look may come before it has finished, and what follows is news again."""
    path = write(superd, "wait")
    superd.start()
    with superd.connect("s") as client:
        assert ask(client, b"") == b"waiting\nold"
    # The import itself finishes the file, so no look can come in between.
    path.with_name("rest").write_text(SHOUT.replace('b"old"', 'b"longer"'))
    finish = "import os, pathlib; pathlib.Path('shout.py').write_bytes(pathlib.Path('rest').read_bytes())\n"
    path.chmod(0o666)
    path.write_text(finish + half)
    wait_for_the_next_look(superd)


def wait_for_the_next_look(superd: Superd) -> None:
    """Files are looked at once a second, when a connection comes."""
    until = time.monotonic() + 20
    while time.monotonic() < until:
        with superd.connect("s") as client:
            if ask(client, b"").endswith(b"longer"):
                return
    pytest.fail("the new code was never served")


IMPORTED = r"""
import os

at_import = sorted(name for name in os.environ if name not in ("LANG", "TZ") and not name.startswith("LC_"))
colour = os.environ["COLOUR"]
os.environ["MINE"] = "kept"

def serve(conn):
    conn.output.write(f"{at_import} {colour} {os.environ['COLOUR']} {os.environ['MINE']}".encode())
"""


def test_environment_of_the_module(superd: Superd) -> None:  # E13
    """It is imported with what its connections have, and what it sets itself stays."""
    write(superd, "serve", code=IMPORTED, environment={"COLOUR": "red", "OTHER": "1"})
    superd.start(environment={**os.environ, "SECRET": "superd's own"})
    names = {"COLOUR", "OTHER", "HOME", "PATH", "SUPERD_SERVICE", "USER", "LOGNAME", "SHELL"}
    with superd.connect("s") as client:
        assert fetch(client).decode() == f"{sorted(names)} red red kept"
    write(superd, "serve", code=IMPORTED, environment={"COLOUR": "blue"})
    superd.call("Reload")
    with superd.connect("s") as client:
        assert fetch(client).decode() == f"{sorted(names - {'OTHER'})} blue blue kept"


TELL = r"""
import os, subprocess

def serve(conn):
    conn.input.readline()  # so that all are there
    child = subprocess.run(["/bin/sh", "-c", "echo $REMOTE_PORT $SUPERD_CONNECTION"], capture_output=True).stdout
    libc = os.popen("echo $REMOTE_PORT").read().strip()
    print(os.environ["REMOTE_PORT"], os.environ["SUPERD_CONNECTION"], os.environb[b"REMOTE_PORT"].decode(), libc)
    print(conn.remote_port, conn.id, child.decode(), end="")
"""


def test_many_at_once(superd: Superd) -> None:  # E1
    """Children that are forked together have each its own connection and its own variables, and no other's fds."""
    write(superd, "serve", code=TELL)
    superd.start()
    with ExitStack() as stack:
        clients = [stack.enter_context(superd.connect("s")) for _ in range(24)]
        for client in clients:
            client.sendall(b"\n")
        ids = set()
        for client in reversed(clients):
            port = str(client.getsockname()[1])
            first, second = fetch(client).decode().splitlines()
            number = first.split()[1]
            assert (first, second) == (f"{port} {number} {port} {port}", f"{port} {number} {port} {number}")
            ids.add(number)
        assert len(ids) == 24


def test_variables_of_connections_are_not_kept() -> None:
    """glibc's putenv(3) keeps each value that it was ever given; here it would be 100 bytes for each connection."""
    done = subprocess.run([sys.executable, "-c", """
import ctypes, os
from superd.handler import Environment

def anonymous_kb():
    return int(next(line.split()[1] for line in open("/proc/self/smaps_rollup") if line.startswith("Anonymous:")))

environment = Environment({"FIRST": "1", "PATH": "/bin:/usr/bin"})
getenv = ctypes.CDLL(None).getenv
getenv.restype = ctypes.c_char_p
for i in range(30_000):
    if i == 1000:
        before = anonymous_kb()
    prepared = environment.prepare({"REMOTE_PORT": f"number {i} {'x' * 50}", **({"ODD": "1"} if i % 2 else {})})
    environment.enter(prepared)
print(anonymous_kb() - before, os.environ["REMOTE_PORT"].split()[1], os.environb[b"FIRST"], "ODD" in os.environ)
print(getenv(b"REMOTE_PORT").split()[1], getenv(b"FIRST"), getenv(b"ODD"), flush=True)
os.environ["SECOND"] = "2"
environment.change({"FIRST": "3", "PATH": "/bin:/usr/bin"})
prepared = environment.prepare({"REMOTE_PORT": "7"})
environment.enter(prepared)
os.system("echo $FIRST $SECOND $REMOTE_PORT $ODD")
"""], capture_output=True, text=True, check=True)  # fmt: skip
    grown, *rest = done.stdout.split()
    assert rest == ["29999", "b'1'", "True", "b'29999'", "b'1'", "b'1'", "3", "2", "7"], done.stdout
    assert int(grown) < 500


def test_cannot_be_imported(superd: Superd) -> None:
    """It says why, nobody is served by anything else, and it heals."""
    path = write(superd, "serve", code="import nothing_like_it\n")
    superd.start()
    with superd.connect("s") as client:
        reason = superd.wait_record(service="s", message=re.compile("cannot import shout:serve"))["message"]
        assert "ModuleNotFoundError: No module named 'nothing_like_it'" in reason and "shout.py:1)" in reason
        path.write_text(SHOUT)
        assert ask(client, b"waited\n") == b"WAITED\n"


def test_workers(superd: Superd) -> None:
    """As many processes hold the module ready as it says."""
    write(superd, "serve", workers=3)
    superd.start()
    while len(superd.pids()["superd-spawner"]) < 3:
        superd.call("Health")
    with superd.connect("s") as client:
        assert ask(client, b"x") == b"X"


def test_files_of_the_module_stay_open(superd: Superd) -> None:
    """What it opened when it was imported is its children's too; superd's own fds are not."""
    code = r"""
import os
data = open(__file__)
def serve(conn):
    own = {data.fileno(), conn.socket.fileno(), 0, 1, 2}
    paths = [f"/proc/self/fd/{fd}" for fd in map(int, os.listdir("/proc/self/fd")) if fd not in own]
    others = [os.readlink(path) for path in paths if os.path.exists(path) and not os.path.isdir(path)]
    conn.output.write(f"{len(os.pread(data.fileno(), 10, 0))} {others}".encode())
"""
    write(superd, "serve", code=code)
    superd.start()
    with superd.connect("s") as first, superd.connect("s") as second:
        assert fetch(first) == b"10 []"
        assert fetch(second)[-2:] == b"[]"


def test_what_is_wrong(superd: Superd) -> None:
    """Found when the file is read."""
    superd.garbage_expected = True
    write(superd, "serve", name="a", command="/bin/cat")
    write(superd, "serve", name="b", run="on-demand")
    write(superd, "serve", name="c", pass_="listen-fds")
    superd.write("d", toml(listen="tcp:127.0.0.1:0", handler="shout"))
    if ROOT:
        superd.write("e", toml(listen="tcp:127.0.0.1:0", handler="shout:serve", cwd="/tmp"))  # F18
    superd.start()
    assert superd.find_records(message=re.compile("`command` and `handler` are both there"))
    assert superd.find_records(message=re.compile('`handler` is a key of run = "per-connection"'))
    assert superd.find_records(message=re.compile("a handler has its connection as a socket and as files"))
    assert superd.find_records(message=re.compile("'shout' is not a handler"))
    assert not ROOT or superd.find_records(message=re.compile("imports nothing from /tmp"))


def test_survival(superd: Superd) -> None:  # G17
    """A killed manager and a killed spawner: connections live, the next one is served."""
    write(superd, "wait")
    superd.start()
    with superd.connect("s") as client:
        assert client.recv(100) == b"waiting\n"
        superd.kill_role("superd-manager")
        with superd.connect("s") as other:
            assert ask(other, b"") == b"waiting\nold"
        superd.kill_role("superd-spawner")
        with superd.connect("s") as other:
            assert ask(other, b"") == b"waiting\nold"
        assert ask(client, b"") == b"old"
