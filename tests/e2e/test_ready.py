"""When a service counts as ready, in every form of `ready`, with real programs."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from harness import PYTHON, TIMEOUT_S, Superd, eventually, toml, wait_gone

Require = Callable[[str], str]
TOOK_OVER = re.compile("took over")
FORMS = ["notify", "fd", "connect", "http", "log", "exec"]

# Becomes ready, in the way that its first argument names, when somebody writes into the FIFO `gate`.
PROGRAM = """
import http.server, os, socket, socketserver, sys, time
form, directory, host = sys.argv[1:]
def answer(text):
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(204 if self.path == "/up?x=1" and self.headers["Host"] == host + ":8080" else 404)
            self.end_headers()
        def log_message(self, *arguments): pass
    socketserver.TCPServer.allow_reuse_address = True
    with socketserver.TCPServer((host, 8080), Handler) as server: server.serve_forever()
def greet():
    with open(directory + "/gate") as gate: return gate.read()
greet()
if form == "notify":
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock: sock.sendto(b"READY=1", os.environ["NOTIFY_SOCKET"])
elif form == "fd": os.write(5, b"rea"); os.write(5, b"dy\\n"); os.close(5)
elif form == "connect":
    sock = socket.socket(socket.AF_UNIX); sock.bind(directory + "/own.sock"); sock.listen()
elif form == "http": answer(form)
elif form == "log": os.write(2, b"it is now  ready (7)\\n")
elif form == "exec": open(directory + "/is-up", "w").close()
time.sleep(1000)
"""


def loopback() -> str:
    """An address of this machine that no other test has, so that any port of it is free."""
    return f"127.{os.getpid() >> 16 & 0x7F | 0x80}.{os.getpid() >> 8 & 0xFF}.{os.getpid() & 0xFF}"


class Gated:
    """A service that is starting until `open()`. Everything it makes is in a directory of its own."""

    def __init__(self, superd: Superd, form: str, **keys: Any) -> None:
        self.superd = superd
        self.room = superd.room("room", user="nobody")
        self.gate = self.room / "gate"
        os.mkfifo(self.gate)
        self.gate.chmod(0o644)
        ready = {
            "notify": "notify", "fd": "fd:5", "connect": f"connect:unix:{self.room}/own.sock",
            "http": f"http://{loopback()}:8080/up?x=1", "log": r"log:now\s+ready \(\d\)$",
            "exec": f"exec:/usr/bin/test -e {self.room}/is-up",
        }[form]  # fmt: skip
        command = [PYTHON, "-I", "-c", PROGRAM, form, str(self.room), loopback()]
        superd.write(
            "s", toml(**{"run": "always-on", "ready": ready, "command": command, "stop_timeout": "2s", **keys})
        )

    def open(self) -> None:
        self.gate.write_text("go")


def ctl(superd: Superd, *arguments: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-I", "-m", "superd.cli.superctl", "-s", superd.control, *arguments]
    return subprocess.run(argv, capture_output=True, text=True, timeout=TIMEOUT_S)


def shell(superd: Superd, script: str, **keys: Any) -> None:
    superd.write("s", toml(**{"run": "always-on", "command": ["/bin/bash", "-c", script], **keys}))


@pytest.mark.parametrize("form", FORMS)
def test_becomes_ready(superd: Superd, form: str) -> None:
    """Starting until it says so; `superctl start` waits that long, and status tells how, and how long it took."""
    service = Gated(superd, form, enabled=False)
    superd.start()
    answers: list[subprocess.CompletedProcess[str]] = []
    asking = threading.Thread(target=lambda: answers.append(ctl(superd, "start", "s")))
    asking.start()
    pid = superd.wait_record(event="start", service="s")["pid"]
    assert superd.status("s")["state"] == "starting"
    assert ctl(superd, "health").returncode == 1
    assert not answers
    service.open()
    ready = superd.wait_record(event="ready", service="s")
    asking.join()
    assert answers[0].returncode == 0, answers
    assert (ready["pid"], superd.status("s")["state"]) == (pid, "ready")
    details = superd.call("Status", names=["s"])["services"][0]
    assert details["took"] == ready["took"] > 0
    assert re.search(rf"ready +{form}:?.*, after [0-9.]+ m?s\n", ctl(superd, "status", "s").stdout)
    assert ctl(superd, "health").returncode == 0


@pytest.mark.parametrize("form", FORMS)
def test_never_ready(superd: Superd, form: str) -> None:
    """It is stopped when the time is over, as a failure that `restart` decides about; the message says what lacked."""
    Gated(superd, form, ready_timeout="500ms", restart_limit="1/1m", restart_delay="1ms")
    superd.start()
    what = {
        "notify": r"no READY=1 within 0.5 s", "fd": r"not ready within 0.5 s: fd:5: no line end on it",
        "connect": r"not ready within 0.5 s: connect:unix:/.*/own.sock: no such file or directory",
        "http": r"not ready within 0.5 s: http://.*/up\?x=1: connection refused",
        "log": r"not ready within 0.5 s: log:.*: no such line in its output",
        "exec": r"not ready within 0.5 s: exec:/usr/bin/test .*: exited with status 1",
    }[form]  # fmt: skip
    superd.wait_record(service="s", level="err", message=re.compile(rf"^{what}; stopping it$"))
    superd.wait_record(service="s", message=re.compile(rf"^was killed by TERM after .* s \({what}\); giving up"))
    assert superd.status("s")["state"] == "failed" and superd.status("s")["restarts"] == 1
    started = ctl(superd, "start", "s")
    assert started.returncode == 1 and re.search(what, started.stderr + started.stdout), started
    assert not superd.find_records(event="ready", service="s")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("status", [0, 3])
def test_ends_before(superd: Superd, form: str, status: int) -> None:
    """Its exit says so; exit status 0 is no success then. Who started it sees its last lines."""
    service = Gated(superd, form, enabled=False, restart="on-failure", restart_limit="1/1m", restart_delay="1ms")
    path = superd.conf / "conf.d/s.toml"
    script = f"echo wrong option >&2; exit {status}"
    path.write_text(re.sub("(?m)^command = .*", toml(command=["/bin/sh", "-c", script]).strip(), path.read_text()))
    assert service.gate.exists()
    superd.start()
    started = ctl(superd, "start", "s")
    assert started.returncode == 1 and "wrong option" in started.stdout + started.stderr, started
    text = rf"exited with status {status} after [0-9.]+ s, before it was ready"
    superd.wait_record(service="s", message=re.compile(rf"^{text}; trying again"))
    superd.wait_record(service="s", message=re.compile(rf"^{text}; giving up"))
    assert not superd.find_records(event="ready", service="s")


@pytest.mark.parametrize("form", FORMS)
def test_manager_killed_meanwhile(superd: Superd, form: str) -> None:  # X7
    """The next manager goes on waiting, for the same process."""
    superd.garbage_expected = True
    service = Gated(superd, form)
    superd.start()
    start = superd.wait_record(event="start", service="s")
    superd.status("s")  # what it knows is deposited
    for generation in range(2):
        superd.kill_role("superd-manager")
        superd.wait_records(generation + 1, message=TOOK_OVER)
        assert superd.status("s")["state"] == "starting"
    service.open()
    ready = superd.wait_record(event="ready", service="s")
    assert ready["pid"] == start["pid"]
    assert superd.status("s")["state"] == "ready"
    superd.kill_role("superd-manager")
    superd.wait_records(3, message=TOOK_OVER)
    assert superd.status("s")["state"] == "ready"
    assert superd.call("Status", names=["s"])["services"][0]["took"] == ready["took"]
    assert len(superd.find_records(event="ready", service="s")) == 1


@pytest.mark.parametrize("form", ["fd", "log", "exec"])
def test_manager_killed_and_never_ready(superd: Superd, form: str) -> None:
    """The time goes on where it was."""
    superd.garbage_expected = True
    Gated(superd, form, ready_timeout="1s", restart="no")
    superd.start()
    superd.wait_record(event="start", service="s")
    superd.status("s")
    superd.kill_role("superd-manager")
    superd.wait_record(message=TOOK_OVER)
    superd.wait_record(service="s", message=re.compile("within 1 s.*; stopping it"))
    ending = superd.wait_record(event="exit", service="s")
    assert 0.9 < ending["duration"] < 10
    assert superd.status("s")["state"] == "failed"


@pytest.mark.parametrize("form", FORMS)
def test_stopped_meanwhile(superd: Superd, form: str) -> None:
    """A stop is no failure, and nothing is left of the waiting; a start after it waits anew."""
    service = Gated(superd, form)
    superd.start()
    first = superd.wait_record(event="start", service="s")["pid"]

    def open_files() -> list[Counter[str]]:
        found = superd.descriptors()
        return [
            Counter(name for names in found[role] for name in names) for role in ("superd-keeper", "superd-manager")
        ]

    before: list[Counter[str]] = []
    for number in range(4):
        superd.wait_records(number + 1, event="start", service="s")
        before = before if number > 1 else open_files()  # at first the control socket may not be there yet
        assert superd.call("Stop", names=["s"])["results"][0]["ok"]
        superd.call("Start", names=["s"], wait=False)
    wait_gone(first)
    superd.wait_records(5, event="start", service="s")
    # Not more: a check may have been under way at first, and none now.
    eventually(lambda: all(now <= then for now, then in zip(open_files(), before, strict=True)), True)
    assert not superd.find_records(service="s", level="err")
    service.open()
    superd.wait_record(event="ready", service="s")


# --- fd:N


@pytest.mark.parametrize(
    ("number", "keys"),
    [
        (3, {}),
        (10, {}),
        (200, {}),
        (4, {"listen": "tcp:127.0.0.1:0"}),
        (12, {"listen": ["tcp:127.0.0.1:0", "udp:127.0.0.1:0"]}),
        (3, {"listen": "tcp:127.0.0.1:0", "pass_": "stdio"}),
        (9, {"listen": "tcp:127.0.0.1:0", "pass_": "stdio", "stderr": "null"}),
    ],
    ids=str,
)
def test_fd_number(superd: Superd, number: int, keys: dict[str, Any]) -> None:
    """The pipe stands exactly there, is kept by exec, and nothing else is open; the sockets are where they were."""
    code = (
        "import os, sys, time\n"
        "found = {int(fd): os.readlink('/proc/self/fd/' + fd).partition(':')[0] for fd in os.listdir('/proc/self/fd')"
        " if os.path.exists('/proc/self/fd/' + fd)}\n"
        "os.write(1 if os.readlink('/proc/self/fd/2') == '/dev/null' else 2, (repr(found) + '\\n').encode())\n"
        f"os.write({number}, b'\\n'); time.sleep(1000)"
    )
    outside = superd.dir / "found"
    if keys.get("stderr") == "null":
        outside.touch()
        outside.chmod(0o666)
        code = code.replace(
            "os.write(1 if os.readlink('/proc/self/fd/2') == '/dev/null' else 2, ",
            f"open({str(outside)!r}, 'wb').write(",
        )
    superd.write("s", toml(run="always-on", ready=f"fd:{number}", command=[PYTHON, "-I", "-c", code], **keys))
    superd.start()
    superd.wait_record(event="ready", service="s")
    if keys.get("stderr") == "null":
        text = outside.read_text()
    else:
        text = superd.wait_record(event="output", service="s")["message"]
    found: dict[int, str] = eval(text)
    listens = keys.get("listen", [])
    sockets = 0 if "pass_" in keys else 1 if isinstance(listens, str) else len(listens)
    assert found.pop(number) == "pipe"
    assert [found.pop(fd) for fd in range(3, 3 + sockets)] == ["socket"] * sockets
    assert sorted(found) == [0, 1, 2]
    assert (found[0] == "socket") == ("pass_" in keys)


def test_fd_is_closed_without_a_line_end(superd: Superd) -> None:
    """End of file before a line end: it will never be ready, so nobody waits for the time limit."""
    shell(superd, "printf almost >&4; exec 4>&-; sleep 1000", ready="fd:4", restart="no", kill_mode="group")
    superd.start()
    superd.wait_record(service="s", message="not ready: fd:4: closed without a line end; stopping it")
    superd.wait_for("s", "stopped")
    assert superd.status("s")["state"] == "failed"


def test_fd_says_it_and_ends(superd: Superd) -> None:  # I13
    """A line end and exit at once: ready, then exit, each time."""
    shell(superd, "echo >&3", ready="fd:3", restart="always", restart_delay="1ms", restart_delay_max="2ms")
    superd.start()
    superd.wait_records(20, event="exit", service="s", status=0)
    found = [record["event"] for record in superd.find_records(service="s", event=re.compile("^(ready|exit|start)$"))]
    assert found[:60] == ["start", "ready", "exit"] * 20


def test_fd_after_the_line_end(superd: Superd) -> None:
    """Nobody reads on, neither manager nor keeper: who writes more is told so, instead of being held up one day."""
    gate = superd.dir / "gate"
    os.mkfifo(gate)
    gate.chmod(0o644)
    shell(superd, f"echo >&5; cat {gate}; trap '' PIPE; echo more >&5 || echo told; sleep 1000", ready="fd:5")
    superd.start()
    superd.wait_record(event="ready", service="s")
    superd.status("s")
    gate.write_text("")
    superd.wait_record(event="output", message="told")


def test_fd_a_flood_before_the_line_end(superd: Superd) -> None:
    """10 MB without a line end are read and forgotten."""
    shell(superd, "head -c 10000000 /dev/zero >&7; echo >&7; sleep 1000", ready="fd:7", kill_mode="group")
    superd.start()
    superd.wait_record(event="ready", service="s")


def test_fd_a_file_limit_below_it(superd: Superd) -> None:
    """The limit is the service's, and does not keep its fd from it."""
    command = [PYTHON, "-I", "-c", "import os, time; os.write(40, b'\\n'); time.sleep(1000)"]
    superd.write("s", toml(run="always-on", ready="fd:40", rlimit={"nofile": 20}, command=command))
    superd.start()
    superd.wait_record(event="ready", service="s")


def test_fd_that_is_a_sockets(superd: Superd) -> None:
    """localhost is two sockets where there is IPv6: what only the moment knows is said then."""
    shell(superd, "sleep 1000", ready="fd:4", listen="tcp:localhost:0", restart="no")
    with socket.socket(socket.AF_INET6) as sock:
        try:
            sock.bind(("::1", 0))
        except OSError:
            pytest.skip("no IPv6")
    superd.start()
    superd.wait_record(
        service="s", message=re.compile("descriptors: fd 4, for readiness, is a socket's: the first free one is 5")
    )


# --- connect and http


def test_connect_redis(superd: Superd, require: Require) -> None:
    """A server that knows nothing of superd, by its port; by what it logs; and by a UNIX socket."""
    room = superd.room("redis", user="nobody")
    options = ["--bind", loopback(), "--save", "", "--daemonize", "no", "--unixsocket", f"{room}/redis.sock"]
    server = [require("redis-server"), "--port", "6379", *options, "--dir", str(room)]
    forms = (f"connect:tcp:{loopback()}:6379", f"connect:unix:{room}/redis.sock", "log:Ready to accept connections")
    for ready in forms:
        superd.write("r", toml(run="always-on", ready=ready, command=server))
        superd.start()
        superd.wait_record(event="ready", service="r")
        with socket.create_connection((loopback(), 6379), TIMEOUT_S) as client:
            client.sendall(b"PING\r\n")
            assert client.recv(100) == b"+PONG\r\n"
        superd.stop()
        superd.records.clear()


def test_http_server(superd: Superd) -> None:
    """python3 -m http.server: a page, and one that is not there."""
    room = superd.room("www", user="nobody")
    (room / "index.html").write_text("hello")
    command = [PYTHON, "-m", "http.server", "--bind", loopback(), "8000", "--directory", str(room)]
    superd.write("a", toml(run="always-on", ready=f"http://{loopback()}:8000", command=command))
    other = f"http://{loopback()}:8000/no/such/page"
    superd.write(
        "b", toml(run="always-on", ready=other, ready_timeout="1s", command=["/bin/sleep", "1000"], restart="no")
    )
    superd.start()
    superd.wait_record(event="ready", service="a")
    superd.wait_record(service="b", message=f"not ready within 1 s: {other}: answered with status 404; stopping it")


ANSWERS = {
    "nothing": (b"", "closed the connection without an answer"),
    "a greeting": (b"220 mail ESMTP\r\n", "the answer is not HTTP"),
    "500": (b"HTTP/1.1 500 No\r\n\r\n", "answered with status 500"),
    "endless": (
        b"HTTP/1.1 " + b"x" * 100_000,
        "the head of its answer is longer than 8192 bytes|the answer is not HTTP",
    ),
    "interim": (b"HTTP/1.1 100 Continue\r\n\r\n" * 10_000, "the head of its answer is longer than 8192 bytes"),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_http_that_is_none(superd: Superd, name: str) -> None:
    """superd itself serves the odd answers: what a check asks is an ordinary client of it."""
    data, why = ANSWERS[name]
    path = superd.dir / "answer"
    path.write_bytes(data)
    host = loopback()
    script = f"while read -r line && [ $(echo $line | wc -c) -gt 2 ]; do :; done; cat {path}"
    superd.write("answer", toml(listen=f"tcp:{host}:8081", command=["/bin/sh", "-c", script]))
    url = f"http://{host}:8081/"
    superd.write(
        "s", toml(run="always-on", ready=url, ready_timeout="1500ms", restart="no", command=["/bin/sleep", "1000"])
    )
    superd.start()
    superd.wait_record(service="s", message=re.compile(f"not ready within 1.5 s: {url}: ({why}); stopping it"))
    superd.wait_for("answer", "idle")


def test_http_that_never_answers(superd: Superd) -> None:
    """It accepts, and that is all: the time limit holds, and says so."""
    with socket.create_server((loopback(), 8082)) as silent:
        url = f"http://{loopback()}:8082/"
        command = ["/bin/sleep", "1000"]
        superd.write("s", toml(run="always-on", ready=url, ready_timeout="500ms", restart="no", command=command))
        superd.start()
        superd.wait_record(service="s", message=f"not ready within 0.5 s: {url}: no answer; stopping it")
        client, _ = silent.accept()
        with client:
            client.settimeout(TIMEOUT_S)
            request = b""
            while part := client.recv(1000):  # to its end: superd has let go
                request += part
        assert request.startswith(b"GET / HTTP/1.1\r\nHost: ") and request.endswith(b"\r\n\r\n")


def test_connect_unix_with_a_full_queue(superd: Superd) -> None:
    """connect(2) says EAGAIN then: that is no connection."""
    path = str(superd.dir / "full.sock")
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as first:
        server.bind(path)
        server.listen(0)
        first.connect(path)
        superd.write("s", toml(run="always-on", ready=f"connect:unix:{path}", command=["/bin/sleep", "1000"]))
        superd.start()
        superd.wait_record(event="start", service="s")
        assert superd.status("s")["state"] == "starting"
        server.accept()[0].close()
        superd.wait_record(event="ready", service="s")


def test_connect_to_itself(superd: Superd, root: None, require: Require) -> None:
    """A port nobody has, the only one that the kernel can take for superd's own end: nobody accepts, so not ready."""
    address = "connect:tcp:127.0.0.1:40000"
    shell(superd, "exec sleep 1000", ready=address, ready_timeout="300ms", restart="no")
    alone = 'ip link set lo up && echo 40000 40001 >/proc/sys/net/ipv4/ip_local_port_range && exec "$@"'
    require("ip")
    superd.start(wrapper=[require("unshare"), "--net", "/bin/sh", "-c", alone, "sh"])
    superd.wait_record(service="s", message=f"not ready within 0.3 s: {address}: connection refused; stopping it")


# --- log


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_log_of_either_stream(superd: Superd, stream: str) -> None:
    """Without a line end it is no line; the rest of the output goes on to the log."""
    number = 1 if stream == "stdout" else 2
    other = "stderr" if stream == "stdout" else "stdout"
    gate = superd.dir / "gate"
    os.mkfifo(gate)
    gate.chmod(0o644)
    script = f"printf now >&{number}; cat {gate}; echo here >&{number}; echo after >&{number}; exec sleep 1000"
    shell(superd, script, ready="log:^nowhere$", **{other: "null"})
    superd.start()
    superd.wait_record(event="start", service="s")
    assert superd.status("s")["state"] == "starting"
    gate.write_text("")
    superd.wait_record(event="ready", service="s")
    superd.wait_record(event="output", message="after")


def test_log_last_words(superd: Superd) -> None:
    """The line and exit at once: ready, then exit."""
    shell(superd, "echo ready", ready="log:ready", restart="no")
    superd.start()
    superd.wait_record(event="exit", service="s")
    found = [record["event"] for record in superd.find_records(service="s", event=re.compile("^(ready|exit|start)$"))]
    assert found == ["start", "ready", "exit"]
    superd.wait_for("s", "stopped")
    assert superd.status("s")["state"] == "done"


def test_log_of_the_process_before(superd: Superd) -> None:
    """What a descendant of the last process writes is not the new one's."""
    flag = superd.room("room", user="nobody") / "flag"
    script = f"test -e {flag} && exec sleep 1000; touch {flag}; (trap '' TERM; sleep 0.3; echo ready) & exit 1"
    shell(superd, script, ready="log:ready", kill_mode="process", restart_delay="1ms")
    superd.start()
    superd.wait_records(2, event="start", service="s")
    superd.wait_record(event="output", message="ready")
    assert superd.status("s")["state"] == "starting"
    assert not superd.find_records(event="ready", service="s")


# --- exec


def test_exec_has_the_services_context(superd: Superd, root: None) -> None:
    """User, directory, environment; no sockets, no fd but stdio, no stdin; and its output does not fill the log."""
    room = superd.room("room", user="nobody")
    script = superd.dir / "check"
    script.write_text(
        f"#!/bin/sh\nexec >{room}/out.tmp\n"
        "id -un; pwd; echo $COLOUR $SUPERD_SERVICE $LISTEN_FDS; ls -m /proc/self/fd\n"
        f"read line && echo $line; ulimit -n; mv {room}/out.tmp {room}/out; echo done >&2\n"
    )
    script.chmod(0o755)
    superd.write(
        "s",
        toml(
            run="always-on", listen="tcp:127.0.0.1:0", ready=f"exec:{script}", command=["/bin/sleep", "1000"],
            user="nobody", cwd=str(room), environment={"COLOUR": "blue"}, rlimit={"nofile": 77},
        ),
    )  # fmt: skip
    superd.start()
    superd.wait_record(event="ready", service="s")
    assert (room / "out").read_text() == f"nobody\n{room}\nblue s\n0, 1, 2, 3\n77\n"
    assert not superd.find_records(event="output", service="s")


def test_exec_with_the_port(superd: Superd) -> None:
    """`${port}` is that of the service's own socket; what is connected to here, superd's own queue answers."""
    command = [PYTHON, "-I", "-c", "import socket; s = socket.socket(fileno=3)\nwhile True: s.accept()[0].close()"]
    check = f"exec:{PYTHON} -I -c 'import socket; socket.create_connection((\"127.0.0.1\", ${{port}})).recv(1)'"
    superd.write("s", toml(run="always-on", listen="tcp:127.0.0.1:0", ready=check, command=command))
    superd.start()
    superd.wait_record(event="ready", service="s")


def test_exec_says_why(superd: Superd) -> None:
    """The last line that it wrote, however much that was, and with what it should not have written made harmless."""
    script = superd.dir / "check"
    script.write_text(
        "#!/bin/sh\nhead -c 3000000 /dev/zero | tr '\\0' x\nprintf '\\nno \\033[31mdatabase\\n' >&2\nexit 7\n"
    )
    script.chmod(0o755)
    shell(superd, "exec sleep 1000", ready=f"exec:{script}", ready_timeout="2s", restart="no")
    superd.start()
    text = superd.wait_record(service="s", message=re.compile("^not ready within 2 s: exec:"))["message"]
    assert text.endswith("exited with status 7: no \x1b[31mdatabase; stopping it")
    assert "no \x1b" not in ctl(superd, "status", "s").stdout
    assert superd.status("s")["state"] in ("stopping", "failed")


@pytest.mark.parametrize("way", ["hangs", "shouts"])
def test_exec_that_does_not_end(superd: Superd, way: str) -> None:
    """It is killed with its whole group when the time is over, and was never two."""
    pids = superd.room("pids", user="nobody", mode=0o777)
    what = "sleep 1000 & sleep 1000" if way == "hangs" else "yes & yes"
    check = f"exec:/bin/sh -c 'trap \"\" TERM; touch {pids}/$$; {what}; :'"
    shell(superd, "exec sleep 1000", ready=check, ready_timeout="700ms", restart="no")
    superd.start()
    superd.wait_record(service="s", message=re.compile("^not ready within 0.7 s: exec:.*: no answer; stopping it"))
    superd.wait_for("s", "stopped")
    assert len(list(pids.iterdir())) == 1
    eventually(superd.services, [])


def test_exec_never_twice_across_managers(superd: Superd) -> None:  # X7
    """A check that hangs when the manager is killed is killed by the next one, which then makes its own."""
    superd.garbage_expected = True
    pids = superd.room("pids", user="nobody", mode=0o777)
    script = superd.dir / "check"
    script.write_text(f"#!/bin/sh\ntouch {pids}/$$\nexec sleep 1000\n")
    script.chmod(0o755)
    shell(superd, "exec sleep 1000", ready=f"exec:{script}")
    superd.start()
    for number in range(1, 4):
        eventually(lambda number=number: len(list(pids.iterdir())), number)  # type: ignore[misc]
        superd.status("s")
        superd.kill_role("superd-manager")
        superd.wait_records(number, message=TOOK_OVER)
    eventually(lambda: len(list(pids.iterdir())), 4)
    eventually(lambda: len(superd.services()), 2)
    superd.call("Stop", names=["s"])
    eventually(superd.services, [])


def test_exec_of_nothing(superd: Superd) -> None:
    """A program that has gone since the file was read."""
    script = superd.dir / "check"
    script.write_text("#!/bin/sh\n")
    script.chmod(0o755)
    shell(superd, "exec sleep 1000", ready=f"exec:{script} -x", enabled=False, restart="no", ready_timeout="300ms")
    superd.start()
    script.unlink()
    superd.call("Start", names=["s"])
    text = (
        f"not ready within 0.3 s: exec:{script} -x: cannot start {script}: exec: no such file or directory; stopping it"
    )
    superd.wait_record(service="s", message=text)


def test_reload_signal_is_not_lost(superd: Superd) -> None:
    """Superd's own end while a service is starting, in each moment of it: it stops in order."""
    Gated(superd, "exec")
    superd.start()
    superd.wait_record(event="start", service="s")
    os.kill(superd.pid, signal.SIGTERM)
    assert superd.wait_exit() == 0
