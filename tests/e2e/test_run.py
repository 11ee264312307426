"""`superd run`: one service without a file."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness import PYTHON, TIMEOUT_S, descendants, open_pidfds, survivors

NOBODY = 65534
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="changes the user")


class Run:
    """`superd run --print-address ARGUMENTS`, its addresses, its log."""

    def __init__(self, *arguments: str, uid: int | None = None, cwd: str = "/", count: int = 1) -> None:
        environment = {
            key: value for key, value in os.environ.items() if key not in ("XDG_RUNTIME_DIR", "SUPERD_SOCKET")
        }
        # It may read everything, so that it finds its own code below /root; that is all it has of root.
        capability = ["--inh-caps", "+dac_read_search", "--ambient-caps", "+dac_read_search"]
        identity = [f"--reuid={uid}", f"--regid={uid}", "--clear-groups", *capability]
        wrapper = [] if uid is None else ["setpriv", *identity]
        self.process = subprocess.Popen(
            [*wrapper, sys.executable, "-I", "-m", "superd", "run", "--print-address", *arguments],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=cwd,
            start_new_session=True, env=environment,
        )  # fmt: skip
        assert self.process.stdout is not None
        self._lines: list[str] = []
        self._news = threading.Condition()
        self._ended = False
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.addresses = [self.process.stdout.readline().strip() for _ in range(count)]

    @property
    def address(self) -> str:
        return self.addresses[0]

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            with self._news:
                self._lines.append(line.rstrip("\n"))
                self._news.notify_all()
        with self._news:
            self._ended = True
            self._news.notify_all()

    def wait_line(self, pattern: str) -> str:
        deadline = time.monotonic() + TIMEOUT_S
        with self._news:
            while True:
                for line in self._lines:
                    if re.search(pattern, line):
                        return line
                left = deadline - time.monotonic()
                assert left > 0 and not self._ended, f"no {pattern!r} in\n" + "\n".join(
                    line[:200] for line in self._lines[:99]
                )
                self._news.wait(left)

    def text(self) -> str:
        """The whole log, after the end."""
        self._reader.join(TIMEOUT_S)
        return "\n".join(self._lines)

    def connect(self, kind: int = socket.SOCK_STREAM) -> socket.socket:
        if self.address.startswith("unix"):
            client = socket.socket(socket.AF_UNIX, kind)
            client.settimeout(TIMEOUT_S)
            client.connect(self.address.partition(":")[2])
            return client
        return socket.create_connection(("127.0.0.1", self.port), TIMEOUT_S)

    def ask(self, request: bytes) -> bytes:
        with self.connect() as client:
            with contextlib.suppress(OSError):  # a service that does not listen may be gone
                client.sendall(request)
                client.shutdown(socket.SHUT_WR)
            with client.makefile("rb") as answer:
                return answer.read()

    def wait(self) -> int:
        return self.process.wait(TIMEOUT_S)

    def stop(self, signo: int = signal.SIGTERM) -> int:
        """Its exit status; whatever it has started must be gone."""
        family = open_pidfds(descendants(self.process.pid))
        try:
            self.process.send_signal(signo)
            status = self.wait()
            assert not survivors(family)
            return status
        finally:
            for fd in family.values():
                os.close(fd)

    def close(self) -> None:
        if self.process.poll() is None:
            self.stop()
        self._reader.join(TIMEOUT_S)
        for stream in (self.process.stdout, self.process.stderr):
            assert stream is not None
            stream.close()


@contextlib.contextmanager
def superd_run(*arguments: str, uid: int | None = None, cwd: str = "/", count: int = 1) -> Iterator[Run]:
    run = Run(*arguments, uid=uid, cwd=cwd, count=count)
    try:
        yield run
    finally:
        run.close()


@pytest.fixture
def room() -> Iterator[Path]:
    """A directory that every user may read."""
    path = Path(tempfile.mkdtemp(prefix="superd-run-"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


def fails(*arguments: str, cwd: str = "/") -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-I", "-m", "superd", "run", *arguments],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=TIMEOUT_S, cwd=cwd,
    )  # fmt: skip
    assert done.stdout == ""
    return done.returncode, done.stderr


def test_cat() -> None:
    with superd_run("tcp:127.0.0.1:0", "--", "/bin/cat") as run:
        assert re.fullmatch(r"tcp:127\.0\.0\.1:[1-9]\d+", run.address)
        assert run.ask(b"hello") == b"hello" and run.ask(b"again") == b"again"
        start = run.wait_line(r"cat\[\d+\]: start #\S+ 127\.0\.0\.1:\d+$")
        pid = re.findall(r"\[(\d+)\]", start)[0]
        run.wait_line(rf"cat\[{pid}\]: exit #\S+ 127\.0\.0\.1:\d+, status 0 after \d")
        assert run.stop() == 0
        assert run.process.stdout is not None and run.process.stdout.read() == ""  # the address was all
    if os.geteuid() == 0:
        assert "runs this as the user nobody" in run.text()


def test_stderr_is_shown_as_it_comes() -> None:
    script = "echo one >&2; read answer; echo two >&2; exit 3"
    with superd_run("tcp:127.0.0.1:0", "--", "/bin/sh", "-c", script) as run, run.connect() as client:
        run.wait_line(r"sh\[\d+\] \| one$")  # it still runs
        client.sendall(b"\n")
        run.wait_line(r"sh\[\d+\] \| two$")
        run.wait_line(r"exit .*, status 3 after ")


@pytest.mark.parametrize("status", [0, 1, 2, 42, 126, 127, 128, 255])
def test_once_exits_with_the_status(status: int) -> None:
    with superd_run("tcp:127.0.0.1:0", "--once", "--", "/bin/sh", "-c", f"cat; exit {status}") as run:
        assert run.ask(b"x") == b"x"
        assert run.wait() == status


@pytest.mark.parametrize(("name", "status"), [("TERM", 143), ("KILL", 137), ("SEGV", 139)])
def test_once_of_a_signal(name: str, status: int) -> None:
    with superd_run("tcp:127.0.0.1:0", "--once", "--", "/bin/sh", "-c", f"kill -{name} $$") as run:
        assert run.ask(b"") == b""
        assert run.wait() == status


def test_once_is_one_connection() -> None:
    with superd_run("tcp:127.0.0.1:0", "--once", "--", "/bin/cat") as run, run.connect() as first:
        first.sendall(b"a")
        assert first.recv(1) == b"a"
        with run.connect() as second:
            second.sendall(b"b")
            first.shutdown(socket.SHUT_WR)
            assert run.wait() == 0
            with contextlib.suppress(ConnectionResetError):
                assert second.recv(1) == b""
    assert run.text().count(": start #") == 1


def test_once_of_what_is_refused_is_not_one() -> None:
    arguments = ("tcp:127.0.0.1:0", "--once", "--allow", "127.0.0.1", "--first-byte-timeout", "200ms")
    with superd_run(*arguments, "--", "/bin/cat") as run:
        with run.connect() as silent:
            assert silent.recv(1) == b""
        run.wait_line("refused")
        assert run.ask(b"x") == b"x"
        assert run.wait() == 0


def test_once_and_told_to_stop_before() -> None:
    with superd_run("tcp:127.0.0.1:0", "--once", "--", "/bin/cat") as run:
        assert run.stop(signal.SIGTERM) == 143


def test_once_of_a_builtin() -> None:
    with superd_run("tcp:127.0.0.1:0", "--once", "--builtin", "echo") as run:
        assert run.ask(b"x") == b"x"
        assert run.wait() == 0


@pytest.mark.parametrize("extra", [(), ("--once",)])
def test_trace(extra: tuple[str, ...]) -> None:
    with superd_run("tcp:127.0.0.1:0", "--trace", *extra, "--", "/bin/sh", "-c", "tr a-z A-Z; exit 5") as run:
        data = b"hello\r\nx\x01\\y\xff" + b"z" * 100_000
        assert run.ask(data) == data.upper().replace(b"\xff".upper(), b"\xff")
        if extra:
            assert run.wait() == 5
        run.wait_line(r"sh\[\d+\]: trace #\S+: > hello\\r\\n$")
        run.wait_line(r"> x\\x01\\\\y\\xff")
        run.wait_line(r"sh\[\d+\]: trace #\S+: < HELLO\\r\\n$")
        run.wait_line(r"< X\\x01\\\\Y\\xff")


def test_once_and_trace_end_when_the_client_has_it_all() -> None:
    """The process has ended long before: what it wrote was in the socket."""
    script = "head -c 150000 /dev/zero | tr '\\0' x"
    with superd_run(
        "tcp:127.0.0.1:0", "--send-buffer", "4K", "--once", "--trace", "--", "/bin/sh", "-c", script
    ) as run:
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.settimeout(TIMEOUT_S)
            client.connect(("127.0.0.1", run.port))
            run.wait_line("exit .*status 0")
            with client.makefile("rb") as answer:
                assert len(answer.read()) == 150_000
        assert run.wait() == 0


def test_trace_knows_the_client() -> None:
    """The process sees a socket pair; the variables are those of the connection all the same."""
    script = "echo $REMOTE_ADDR $TCPLOCALIP $TCPLOCALPORT $PROTO"
    for address in ("tcp:127.0.0.1:0", "tcp:0"):
        with superd_run(address, "--trace", "--", "/bin/sh", "-c", script) as run:
            assert run.ask(b"") == b"127.0.0.1 127.0.0.1 %d TCP\n" % run.port
    header = b"PROXY TCP4 192.0.2.1 198.51.100.2 5000 80\r\n"
    proxied = ("--proxy-protocol", "true", "--proxy-trusted", "127.0.0.1")
    for address in ("tcp:127.0.0.1:0", "tcp:0"):
        with superd_run(address, "--trace", *proxied, "--once", "--", "/bin/sh", "-c", script) as run:
            with run.connect() as client:
                client.sendall(b"no header")
                with contextlib.suppress(ConnectionResetError):
                    assert client.recv(1) == b""
            assert run.ask(header) == b"192.0.2.1 198.51.100.2 80 TCP\n"
            assert run.wait() == 0


def test_trace_of_a_conversation() -> None:
    """A service that ends closes the connection, whatever the client does; one that waits is not ended."""
    with superd_run("tcp:127.0.0.1:0", "--trace", "--", "/bin/sh", "-c", "read a; echo $a; read b; echo $b") as run:
        with run.connect() as client, client.makefile("rb") as lines:
            client.sendall(b"1\n")
            assert lines.readline() == b"1\n"
            client.sendall(b"2\n")
            assert lines.read() == b"2\n"
        run.wait_line("exit .* status 0")


def test_unix_seqpacket(room: Path) -> None:
    room.chmod(0o777 if os.geteuid() else 0o755)
    script = "import socket; s = socket.socket(fileno=0); s.send(s.recv(9)[::-1]); s.send(b'end')"
    for extra in ((), ("--trace",)):
        with superd_run(f"unix-seqpacket:{room}/s", *extra, "--once", "--", PYTHON, "-c", script) as run:
            with run.connect(socket.SOCK_SEQPACKET) as client:
                client.send(b"abc")
                assert client.recv(99) == b"cba"
                assert client.recv(99) == b"end"
            assert run.wait() == 0
        assert os.listdir(room) == []


def test_relative_paths_count_from_here(room: Path) -> None:
    program = room / "hello"
    program.write_text("#!/bin/sh\necho hello from $PWD\n")
    program.chmod(0o755)
    with superd_run("unix:./sock", "--cwd", ".", "--", "./hello", cwd=str(room)) as run:
        assert run.address == f"unix:{room}/sock"
        assert run.ask(b"") == f"hello from {room}\n".encode()
    assert os.listdir(room) == ["hello"]


def test_datagrams_on_demand() -> None:
    """One process takes what comes, as inetd's dgram wait does."""
    script = (
        "import socket; s = socket.socket(fileno=0); d, a = s.recvfrom(99); s.sendto(d.upper(), a); raise SystemExit(7)"
    )
    with superd_run("udp:127.0.0.1:0", "--pass", "stdio", "--once", "--", PYTHON, "-c", script) as run:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            client.settimeout(TIMEOUT_S)
            client.sendto(b"hello", ("127.0.0.1", run.port))
            assert client.recv(99) == b"HELLO"
        assert run.wait() == 7


def test_once_and_always_on() -> None:
    with superd_run(
        "--run", "always-on", "--once", "--restart", "always", "--", "/bin/sh", "-c", "exit 9", count=0
    ) as run:
        assert run.wait() == 9


def test_keys_are_options() -> None:
    script = "echo $COLOUR $1; ulimit -n"
    with superd_run(
        "tcp:127.0.0.1:0", "tcp:127.0.0.1:0", "--max-connections", "1", "--limits.on-full=refuse",
        "--environment", "COLOUR=red", "--rlimit.nofile", "64", "--", "/bin/sh", "-c", script, "sh", "--once", count=2,
    ) as run:  # fmt: skip
        assert run.ask(b"") == b"red --once\n64\n"
        assert len(set(run.addresses)) == 2


def test_git_daemon(room: Path) -> None:
    if not shutil.which("git"):
        pytest.skip("git is not installed")
    repository = room / "r.git"
    author = ["-c", "user.name=n", "-c", "user.email=e"]
    subprocess.run(["git", "init", "-q", "--bare", "-b", "main", str(repository)], check=True)

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(repository), *author, *arguments]
        return subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True
        ).stdout.strip()

    commit = git("commit-tree", "-m", "x", git("mktree"))
    git("update-ref", "refs/heads/main", commit)
    subprocess.run(["chmod", "-R", "a+rX", str(repository)], check=True)
    command = ["git", "-c", "safe.directory=*", "daemon", "--inetd", "--export-all", f"--base-path={room}"]
    for extra in ((), ("--trace",)):
        with superd_run("tcp:127.0.0.1:0", *extra, "--environment", "HOME=/nonexistent", "--", *command) as run:
            client = ["git", "ls-remote", f"git://127.0.0.1:{run.port}/r.git"]
            found = subprocess.run(client, capture_output=True, text=True, timeout=TIMEOUT_S)
            assert commit in found.stdout, found.stderr
            if extra:
                run.wait_line(r"> [0-9a-f]{4}git-upload-pack /r.git\\x00host=127.0.0.1")


def test_busybox_httpd(room: Path) -> None:
    if not shutil.which("busybox"):
        pytest.skip("busybox is not installed")
    (room / "index.html").write_text("it works")
    with superd_run("tcp:127.0.0.1:0", "--", "busybox", "httpd", "-i", "-h", str(room)) as run:
        answer = run.ask(b"GET / HTTP/1.0\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 200 OK") and answer.endswith(b"it works")


def test_nbdkit() -> None:
    """On demand, the listener itself, as systemd hands it over."""
    if not shutil.which("nbdkit"):
        pytest.skip("nbdkit is not installed")
    with (
        superd_run("tcp:127.0.0.1:0", "--run", "on-demand", "--", "nbdkit", "-f", "null", "1M") as run,
        run.connect() as nbd,
    ):
        assert nbd.recv(8) == b"NBDMAGIC"


def test_tftpd(room: Path) -> None:
    if not os.access("/usr/sbin/in.tftpd", os.X_OK):
        pytest.skip("in.tftpd is not installed")
    if os.geteuid() != 0:
        pytest.skip("in.tftpd needs root")
    (room / "file").write_text("contents")
    arguments = ("udp:127.0.0.1:0", "--pass", "stdio", "--user", "root")
    with superd_run(*arguments, "--", "/usr/sbin/in.tftpd", "--secure", str(room)) as run:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            client.settimeout(TIMEOUT_S)
            client.sendto(b"\0\1file\0octet\0", ("127.0.0.1", run.port))
            assert client.recv(600) == b"\0\3\0\1contents"


@needs_root
def test_an_ordinary_user(room: Path) -> None:
    room.chmod(0o777)
    with superd_run(f"unix:{room}/s", "--", "/usr/bin/id", "-u", uid=NOBODY) as run:
        assert run.ask(b"") == b"%d\n" % NOBODY
    assert "nobody" not in run.text()
    script = "import os, socket, time; time.sleep(1000)"
    with superd_run(
        "--run", "always-on", "--notify-access", "main", "--", PYTHON, "-c", script, uid=NOBODY, count=0
    ) as run:
        run.wait_line(r"start$")
        assert run.stop(signal.SIGINT) == 0
        assert not os.path.exists(f"/tmp/superd-{NOBODY}-{run.process.pid}")


def test_interrupt_of_a_terminal() -> None:
    """Ctrl-C goes to the whole foreground group; nothing stays, and the live connection ends."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(
            sys.executable,
            [sys.executable, "-I", "-m", "superd", "run", "tcp:127.0.0.1:0", "--print-address", "--", "/bin/cat"],
        )
    said = b""
    client = None
    while not (client and b": start #" in said):
        said += os.read(terminal, 4096)
        if client is None and (found := re.search(rb"(?m)^tcp:127.0.0.1:(\d+)\r$", said)):
            client = socket.create_connection(("127.0.0.1", int(found[1])), TIMEOUT_S)
    family = open_pidfds(descendants(pid))
    assert len(family) >= 3  # manager, spawner, cat
    os.write(terminal, b"\x03")
    with client:
        assert client.recv(1) == b""
    with contextlib.suppress(OSError):  # EIO: the other side is closed
        while os.read(terminal, 4096):
            pass
    os.close(terminal)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert not survivors(family)
    for fd in family.values():
        os.close(fd)


def test_hangup_ends_it() -> None:
    with superd_run("tcp:127.0.0.1:0", "--", "/bin/cat") as run:
        assert run.stop(signal.SIGHUP) == 0


def test_no_control_socket_unless_asked_for(room: Path) -> None:
    arguments = [sys.executable, "-I", "-m", "superd.cli.superctl", "-s", f"unix:{room}/control", "--json", "list"]
    with superd_run("tcp:127.0.0.1:0", "--control", f"unix:{room}/control", "--", "/bin/cat") as run:
        assert run.ask(b"x") == b"x"
        done = subprocess.run(arguments, capture_output=True, text=True, timeout=TIMEOUT_S)
        assert [row["name"] for row in json.loads(done.stdout)] == ["cat"], done
    with superd_run("tcp:127.0.0.1:0", "--", "/bin/cat") as run:
        assert run.ask(b"x") == b"x"
        assert subprocess.run(arguments, capture_output=True, timeout=TIMEOUT_S).returncode == 69


def test_save(room: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUPERD_CONFIG", str(room / "etc"))
    script = room / "hello"
    script.write_text("#!/bin/sh\necho hello\n")
    script.chmod(0o755)
    arguments = ("tcp:127.0.0.1:0", "--save", "hi", "--max-connections", "3", "--once")
    with superd_run(*arguments, "--", "./hello", cwd=str(room)) as run:
        run.wait_line(f"^wrote {room}/etc/conf.d/hi.toml$")
        assert run.ask(b"") == b"hello\n"
        assert run.wait() == 0
    text = (room / "etc/conf.d/hi.toml").read_text()
    assert f'command = ["{room}/hello"]' in text or f'command = "{room}/hello"' in text
    assert "max_connections = 3" in text and "\nonce" not in text
    code, said = fails("tcp:127.0.0.1:0", "--save", "hi", "--", "cat")
    assert code == 1 and "it is there already" in said


def test_survives_its_manager() -> None:
    """There is no file that the next one could read."""
    with superd_run("tcp:127.0.0.1:0", "--once", "--", "/bin/cat") as run:
        (manager,) = [
            pid for pid in descendants(run.process.pid) if Path(f"/proc/{pid}/comm").read_text() == "superd-manager\n"
        ]
        os.kill(manager, signal.SIGKILL)
        run.wait_line("took over")
        assert run.ask(b"x") == b"x"
        assert run.wait() == 0


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["tcp:0", "--", "no-such-program"], 127, "PROGRAM: there is no program 'no-such-program' in PATH"),
        (["tcp:0", "--", "/no/such"], 127, "PROGRAM: there is no program '/no/such'"),
        (["tcp:0", "--", "/etc/passwd"], 126, "PROGRAM: '/etc/passwd' is not executable"),
        (["tcp:0", "--", "/etc"], 126, "PROGRAM: '/etc' is a directory"),
        (["tcp:0"], 2, "the program stands after --"),
        (["tcp:0", "cat"], 2, "the program stands after --"),
        (["--", "cat"], 2, "there is no address"),
        (["8080", "--", "cat"], 2, "ADDRESS: cannot parse address '8080': write tcp:8080"),
        (["tcp:0", "--max-conections", "4", "--", "cat"], 2, "did you mean --max-connections?"),
        (["tcp:0", "--max-connections", "0", "--", "cat"], 2, "--max-connections: 0 is not a limit"),
        (["tcp:0", "--rate", "50", "--", "cat"], 2, '--rate: \'50\' is not a rate: write "50/1s"'),
        (["tcp:0", "--cwd", "/", "--cwd", "/", "--", "cat"], 2, "--cwd was given 2 times"),
        (["tcp:0", "--once", "--trace", "--run", "on-demand", "--", "cat"], 2, "--trace shows the bytes of per-"),
        (["tcp:0", "--run", "sometimes", "--", "cat"], 2, "--run: "),
    ],
)  # fmt: skip
def test_mistakes(arguments: list[str], status: int, said: str) -> None:
    code, text = fails(*arguments)
    assert (code, text[:8]) == (status, "superd: ") and said in text
    assert "Traceback" not in text


def test_a_port_that_is_taken_is_said_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, text = fails(f"tcp:127.0.0.1:{port}", "--print-address", "--", "cat")
        assert code == 71 and f"cannot bind tcp:127.0.0.1:{port}: address already in use" in text


def test_a_main_command_of_that_name() -> None:
    """`superd -- run` is a main command, and not this."""
    done = subprocess.run(
        [sys.executable, "-I", "-m", "superd", "--", "run"], capture_output=True, text=True, timeout=TIMEOUT_S
    )
    assert done.returncode == 127 and "run" in done.stderr


@needs_root
@pytest.mark.parametrize("extra", [(), ("--trace",)])
def test_once_of_a_program_that_its_user_may_not_execute(room: Path, extra: tuple[str, ...]) -> None:
    program = room / "private" / "hello"
    program.parent.mkdir(mode=0o700)
    program.write_text("#!/bin/sh\necho hello\n")
    program.chmod(0o755)
    with superd_run("tcp:127.0.0.1:0", "--once", *extra, "--", str(program)) as run:
        with contextlib.suppress(ConnectionResetError):
            assert run.ask(b"") == b""
        assert run.wait() == 126
        run_text = run.text()
    assert "exec: permission denied; client closed" in run_text


def test_a_handler_and_a_trace() -> None:
    where = "/run" if os.geteuid() == 0 else None  # root imports nothing from below /tmp
    with tempfile.TemporaryDirectory(prefix="superd-run-", dir=where) as name:
        room = Path(name)
        room.chmod(0o755)
        (room / "shout.py").write_text("def serve(conn):\n    conn.output.write(conn.input.readline().upper())\n")
        arguments = ("tcp:127.0.0.1:0", "--once", "--trace", "--cwd", name, "--handler", "shout:serve")
        with superd_run(*arguments) as run:
            assert run.ask(b"hello\n") == b"HELLO\n"
            assert run.wait() == 0
            text = run.text()
    assert "> hello\\n" in text and "< HELLO\\n" in text
