"""superctl(1): the command line by itself, and against the real superd."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from argparse import SUPPRESS
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from forked import in_child
from harness import PYTHON, TIMEOUT_S, Superd, read_all, toml, wait_gone

from superd.cli import output, superctl
from superd.cli.client import Control
from superd.cli.output import table
from superd.core import varlink

OFFLINE = [row[0] for row in superctl._OFFLINE]
ARGV = [sys.executable, "-I", "-m", "superd.cli.superctl"]


def ctl(superd: Superd, *arguments: str, code: int = 0, **options: Any) -> str:
    """stdout, with stderr after it; the exit status has to be `code`."""
    done = subprocess.run(
        [*ARGV, "-s", superd.control, *arguments], capture_output=True, text=True, timeout=TIMEOUT_S, **options
    )
    assert done.returncode == code, (arguments, done.returncode, done.stdout, done.stderr)
    return done.stdout + done.stderr


def ctl_json(superd: Superd, *arguments: str, code: int = 0) -> Any:
    return json.loads(ctl(superd, *arguments, "--json", code=code))


# --- without superd


def check(capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, *said: str) -> None:
    try:
        got = superctl.main(arguments)
    except SystemExit as end:
        got = int(end.code or 0)
    out = capsys.readouterr()
    assert got == code, out
    for text in said:
        assert text in out.out + out.err


@pytest.fixture(autouse=True)
def no_superd(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SUPERD_SOCKET", str(tmp_path / "nothing.sock"))


def test_wrong_usage_is_2(capsys: pytest.CaptureFixture[str]) -> None:  # J9
    check(capsys, ["lst"], 2, "there is no command 'lst'", "did you mean `list`?", "superctl --help")
    check(capsys, ["__class__"], 2, "there is no command")
    check(capsys, ["list", "--wrong"], 2, "--wrong", "superctl list --help")
    check(capsys, ["start"], 2, "NAME")
    check(capsys, ["list", "--timeout", "30"], 2, 'write "30s"')
    check(capsys, ["wait", "--for", "ever", "x"], 2, "ever")
    check(capsys, ["logs", "-n", "-1"], 2)
    check(capsys, ["-s", "tcp:127.0.0.1:1", "list"], 2, "unix:/PATH")  # J2
    check(capsys, ["start", "--overlap", "x"], 2, "--overlap")


def test_options_for_all_commands(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A script may say -s and --timeout once, for whatever it calls."""
    (tmp_path / "cat.toml").write_text(toml(listen="tcp:127.0.0.1:0", command=["/bin/cat"]))
    inetd = tmp_path / "inetd.conf"
    inetd.write_text("7777 stream tcp nowait nobody /bin/cat cat\n")
    always = ["-s", f"unix:{tmp_path}/nothing.sock", "--timeout", "5s"]
    path = str(tmp_path / "cat.toml")
    check(capsys, [*always, "check", path], 0, "ok: 1 service")
    check(capsys, [*always, "-c", path, "check", "-q"], 0)
    check(capsys, [*always, "import", str(inetd)], 0, "/bin/cat")
    check(capsys, [*always, "export", "-c", path, "systemd", "cat"], 0, "ExecStart=/bin/cat")
    check(capsys, [*always, "-c", path, "show", "cat"], 0, "/bin/cat")
    check(capsys, [*always, "explain", "rate"], 0, "limits.rate")
    check(capsys, [*always, "schema"], 0)
    check(capsys, ["--timeout", "5", "check", path], 2, 'write "5s"')


def test_the_files_say_where_superd_is(capsys: pytest.CaptureFixture[str], superd: Superd) -> None:
    superd.write("cat", toml(listen="tcp:127.0.0.1:0", command=["/bin/cat"]))
    superd.start()
    superd.call("List")
    wanted = superd.write_daemon(toml(control=superd.control))
    check(capsys, ["-c", str(superd.conf), "list"], 0, "cat")
    check(capsys, ["list", "--names", "--json", "-c", str(superd.conf)], 0, '"cat"')
    check(capsys, ["-c", str(superd.conf), "-s", f"{superd.control}.no", "list"], 69, "no such file")
    wanted.write_text('control = "off"')
    check(capsys, ["-c", str(superd.conf), "list"], 69, "no control socket")
    wanted.write_text("control = 5")
    check(capsys, ["-c", str(superd.conf), "list"], 78, "superd.toml:1:11", "-s SOCKET")
    check(capsys, ["-c", f"{superd.dir}/no", "list"], 78, "no such file")
    wanted.unlink()
    check(capsys, ["-c", str(superd.conf), "list"], 69)


def test_every_command_is_in_the_help() -> None:
    groups = [name for names in superctl._GROUPS.values() for name in names]
    assert sorted(groups) == sorted(superctl.COMMANDS)


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    check(capsys, ["--version"], 0, "superctl ")
    check(capsys, ["--help"], 0, *superctl.COMMANDS, "check", "--timeout", "75 time limit")
    for name in superctl.COMMANDS:
        check(capsys, [name, "--help"], 0, f"usage: superctl {name}")
    check(capsys, ["check", "--help"], 0, "--format")
    superctl.main(["--help"])
    assert max(len(line) for line in capsys.readouterr().out.splitlines()) <= 120


def test_the_manual_has_every_command_and_option() -> None:
    page = (Path(__file__).parents[2] / "man" / "superctl.1").read_text()
    assert sorted(re.findall(r"^\.It Cm (\S+)", page, re.M)) == sorted([*superctl.COMMANDS, *OFFLINE])
    for name, command in superctl.COMMANDS.items():
        parser = superctl._parser(name)
        shown_by_help = [action for action in parser._actions if action.help != SUPPRESS]
        own = {flag for action in shown_by_help for flag in action.option_strings}
        short = {"-s", "-c", "-q", "-h", "--socket", "--config", "--json", "--timeout", "--quiet", "--help"}
        line = re.search(rf"^\.It Cm {name}\b(.*)$", page, re.M)
        assert line is not None
        shown = {f"-{flag}" for flag in re.findall(r"Fl (\S+)", line[1])}
        shown |= {"--ready"} if name == "health" else set()  # `Fl -live | -ready` is one flag to mdoc(7)
        wanted = own - short | ({"-s"} if name == "kill" else set())
        assert shown == wanted - ({"--follow"} & wanted), name
        assert all(flag in command.usage for flag in shown - {"--no-wait"}), name
    codes = re.search(r"^\.Sh EXIT STATUS\n(.*?)^\.Sh", page, re.M | re.S)
    assert codes is not None
    assert [int(code) for code in re.findall(r"^\.It (\d+)$", codes[1], re.M)] == [0, 1, 2, 3, 4, 69, 75, 77, 78]


def test_unreachable_is_69(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:  # D14, J9
    check(capsys, ["list"], 69, f"cannot reach superd at {tmp_path}/nothing.sock", "superd is not running")
    check(capsys, ["-s", f"unix:{tmp_path}/x", "is-ready", "a"], 69, f"{tmp_path}/x")
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(tmp_path / "stale"))
    check(capsys, ["health", f"-s{tmp_path}/stale"], 69, "nobody listens there")


@contextmanager
def fake_superd(path: Path, *answers: bytes, backlog: int = 5) -> Iterator[None]:
    """Answers one client, call by call, with these bytes; then keeps the connection open until it closes."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(backlog)
        listener.settimeout(TIMEOUT_S)

        def serve() -> None:
            conn, _ = listener.accept()
            with conn:
                conn.settimeout(TIMEOUT_S)
                for answer in answers:
                    if not conn.recv(65536):
                        return
                    conn.sendall(answer)
                while answers and conn.recv(65536):
                    pass

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield
        finally:
            thread.join()


def test_what_answers_is_no_superd(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for at, (answers, code, said) in enumerate(
        [
            ([], 69, "closed the connection"),
            ([b"HTTP/1.1 400 Bad Request\r\n\r\n\0"], 69, "cannot understand what answers"),
            ([b'{"error":"org.varlink.service.PermissionDenied"}\0'], 77, "not permitted"),
            ([b'{"error":"org.varlink.service.MethodNotFound"}\0'], 69, "another version"),
            ([b'{"error":"io.superd.Control.TooManyClients","parameters":{"limit":16}}\0'], 69, "16 superctl"),
            ([b'{"error":"io.superd.Control.Strange\\u001b[2J"}\0'], 1, "Strange\\x1b[2J"),  # J11
        ]
    ):
        path = tmp_path / str(at)
        with fake_superd(path, *answers):
            check(capsys, ["-s", str(path), "list"], code, said)


def test_a_superd_that_does_not_answer_is_75(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:  # J9
    with fake_superd(tmp_path / "s", b""):
        check(capsys, ["-s", str(tmp_path / "s"), "--timeout", "50ms", "list"], 75, "within 0.05 s")


def test_a_superd_that_does_not_accept_is_75(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as first:
        listener.bind(path)
        listener.listen(0)
        first.connect(path)
        check(capsys, ["-s", path, "--timeout", "50ms", "list"], 75)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be somebody else")
def test_a_socket_of_somebody_else_is_not_trusted(tmp_path: Path) -> None:  # FAILURES.md (f) 4
    path = str(tmp_path / "s")
    program = (
        "import os, socket, sys\ns = socket.socket(socket.AF_UNIX)\ns.bind(sys.argv[1])\nos.setuid(65534)\ns.listen()\n"
        "print('ready', flush=True)\nsys.stdin.read()"
    )
    other = subprocess.Popen([PYTHON, "-c", program, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with other:
        assert other.stdout is not None and other.stdout.readline() == b"ready\n"
        done = subprocess.run([*ARGV, "list"], env={"SUPERD_SOCKET": path}, capture_output=True, text=True)
        assert (done.returncode, "uid 65534 listens there" in done.stderr) == (77, True), done.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become somebody else")
def test_a_socket_that_may_not_be_used_is_77() -> None:
    path = f"/tmp/superd-test-{os.getpid()}.sock"  # where another user can look for it
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        try:
            os.chmod(path, 0o600)
            listener.listen()

            def connect() -> list[Any]:
                os.setuid(65534)
                try:
                    Control(path, TIMEOUT_S).close()
                except superctl.Failure as failure:
                    return [failure.code, str(failure)]
                return []

            code, said = in_child(connect)
        finally:
            os.unlink(path)
    assert code == 77 and "permission denied" in said


def test_check_needs_no_superd(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_text('listn = "tcp:7"\n')
    (tmp_path / "x.toml").chmod(0o644)
    check(capsys, ["check", str(tmp_path / "x.toml")], 78, "did you mean `listen`?")
    check(capsys, ["-c", str(tmp_path / "x.toml"), "check", "--format", "short"], 78, "x.toml:1:1: error")
    check(capsys, ["--json", "check", str(tmp_path / "x.toml")], 78, '"code": "unknown-key"')


def test_it_starts_fast() -> None:
    """No trio, and nothing that only some commands need (measured: each would cost 2-100 ms)."""
    done = subprocess.run([sys.executable, "-I", "-X", "importtime", "-m", "superd.cli.superctl", "list"],
                          capture_output=True, text=True)  # fmt: skip
    after_site = done.stderr.partition("| site\n")[2]
    imported = set(re.findall(r"\| +([\w.]+)$", after_site, re.M))
    assert "superd.core.varlink" in imported
    slow = {"asyncio", "dataclasses", "difflib", "psutil", "shlex", "shutil", "subprocess", "tomli", "trio", "typing"}
    assert not imported & {*slow, "superd.core.records", "superd.core.schema", "superd.core.spec"}


def render(monkeypatch: pytest.MonkeyPatch, columns: int | None, rows: list[tuple[str, ...]]) -> list[str]:
    monkeypatch.setattr(output, "terminal_columns", lambda: columns)
    monkeypatch.setattr(output, "colours", lambda: False)
    return list(table(("service", "state", "pid", "note"), rows, right=("pid",)))


def test_table(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [("web", "ready", "7", ""), ("a-long-name", "failed", "-", "exited with status 1 after 0.1 s; " * 3)]
    wide = render(monkeypatch, None, rows)
    assert wide[0] == "service      state   pid  note" and wide[1] == "web          ready     7"
    assert wide[2].endswith("after 0.1 s;")  # not a terminal: nothing is cut
    fair = render(monkeypatch, 80, rows)
    assert len(fair[2]) == 80 and fair[2].endswith("…")
    narrow = render(monkeypatch, 40, rows)
    assert narrow[0] == "service      state   pid" and narrow[3].startswith("    exited")
    assert all(len(line) <= 40 for line in narrow) and narrow[3].endswith("…")
    assert render(monkeypatch, 80, rows[:1])[0] == "service  state  pid"  # nobody has a note
    assert render(monkeypatch, None, [("\x1b[2J", "x", "1", "a\nb\x9b")])[1].startswith("\\x1b[2J")  # J11


# --- with superd

STEADY = ["/bin/sh", "-c", "echo hello from $$; exec sleep 1000"]


@pytest.fixture
def running(superd: Superd) -> Superd:
    superd.write("cat", toml(listen="tcp:127.0.0.1:0", command="/bin/cat", description="Says it again"))
    superd.write("steady", toml(run="always-on", command=STEADY))
    superd.write("broken", toml(run="always-on", command=["/bin/sh", "-c", "echo oops >&2; exit 3"], restart="no"))
    superd.write("off", toml(run="always-on", command=STEADY, enabled=False))
    superd.start()
    superd.wait_record(event="output", service="steady")
    superd.wait_record(event="exit", service="broken")
    superd.call("List")  # the socket is there
    return superd


def test_list(running: Superd) -> None:
    rows = {row["name"]: row for row in ctl_json(running, "list")}
    assert list(rows) == ["broken", "cat", "off", "steady"]
    assert set(rows["cat"]) == {
        "name", "state", "since", "for", "pid", "now", "total", "restarts", "listen", "note"
    }  # fmt: skip
    assert rows["cat"]["listen"] == [running.listening("cat")]
    assert {name: row["state"] for name, row in rows.items()} == {
        "broken": "failed", "cat": "listening", "off": "disabled", "steady": "ready"
    }  # fmt: skip
    text = ctl(running).splitlines()
    assert text[0].split() == ["service", "state", "for", "pid", "now", "total", "restarts", "listen", "note"]
    assert "exited with status 3" in text[1] and running.listening("cat") in text[2]
    assert ctl(running, "-q") == ""
    (row,) = ctl_json(running, "list", "--sockets")
    assert (row["service"], row["queue"], row["why"]) == ("cat", 0, None)
    assert running.listening("cat") in ctl(running, "list", "--sockets")


def test_list_on_a_terminal(running: Superd) -> None:
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm"}
    environment.pop("NO_COLOR", None)
    with open(ours, "rb", buffering=0) as screen:
        for columns, colour in ((80, True), (200, True), (80, False)):
            environment |= {} if colour else {"NO_COLOR": "1"}
            os.set_blocking(ours, True)
            subprocess.run(["stty", "cols", str(columns), "rows", "24"], stdin=theirs, check=True)
            subprocess.run([*ARGV, "-s", running.control], stdout=theirs, env=environment, check=True)
            os.write(theirs, b"END")
            text = b""
            while b"END" not in text:
                text += screen.read(65536)
            assert (b"\x1b[31mfailed" in text) == colour and (b"\x1b" in text) == colour
            plain = re.sub(r"\x1b\[\d*m", "", text.decode()).replace("\r", "").splitlines()
            assert max(map(len, plain)) <= columns
    os.close(theirs)


def test_status(running: Superd) -> None:
    with running.connect("cat") as client:
        client.sendall(b"x")
        assert client.recv(1) == b"x"
        port = client.getsockname()[1]
        text = ctl(running, "status")
        assert "Says it again" in text and f"{running.conf}/conf.d/cat.toml" in text
        assert f"127.0.0.1:{port}" in text and "0 of 4096 waiting" in text
        (row,) = ctl_json(running, "connections", "cat")
        assert row["peer"] == f"127.0.0.1:{port}" and row["pid"] in running.services()
        assert str(row["pid"]) in ctl(running, "connections")
    (details,) = ctl_json(running, "status", "broken")
    assert details["endings"] and details["records"][0]["message"] == "oops"
    assert ctl(running, "status", "broken").count("\n") > 5
    assert "no service 'cta'; did you mean 'cat'?" in ctl(running, "status", "cta", code=4)


def test_logs_and_events(running: Superd) -> None:
    assert re.fullmatch(r"[\d:.]+ steady\[\d+\] \| hello from \d+\n", ctl(running, "logs", "steady"))
    line = json.loads(ctl(running, "logs", "-n", "1", "steady", "--json"))
    assert line["event"] == "output" and line["time"].endswith("Z") and line["service"] == "steady"
    assert "oops" in ctl(running, "logs")
    assert "exit, status 3" in ctl(running, "events", "broken")
    assert "no service" in ctl(running, "logs", "nobody", code=4)


@pytest.mark.parametrize("what", ["logs", "events"])
def test_follow_until_the_reader_has_enough(running: Superd, what: str) -> None:  # J6
    argv = [*ARGV, "-s", running.control, what, "-f", "-n", "0", "cat", "steady"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as follower:
        assert follower.stdout is not None and follower.stderr is not None
        try:
            # It says nothing before there is something, so ask until it has heard of one.
            deadline = time.monotonic() + TIMEOUT_S
            os.set_blocking(follower.stdout.fileno(), False)
            said = None
            while not said:
                ctl(running, "restart", "steady")
                said = follower.stdout.readline()
                assert time.monotonic() < deadline
            assert b"steady" in said
            follower.stdout.close()
            while follower.poll() is None:
                ctl(running, "restart", "steady")
                assert time.monotonic() < deadline
        finally:
            follower.kill()
        assert follower.returncode == -signal.SIGPIPE and follower.stderr.read() == b""  # no traceback


def test_logs_escape_what_services_write(superd: Superd) -> None:  # J11
    superd.write("rude", toml(run="once", command=["/usr/bin/printf", r"\033]0;x\007\n\302\233 \377\n"]))
    superd.start()
    superd.wait_records(2, event="output", service="rude")
    superd.call("List")
    for command in ("logs", "status"):
        text = ctl(superd, command)
        assert "\\x1b]0;x\\x07" in text and "\\x9b \\xff" in text
        assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f]", text)


def test_stop_and_start(running: Superd) -> None:
    (before,) = ctl_json(running, "list")[3:]
    assert ctl(running, "stop", "steady", "cat").startswith("steady: stopped")
    wait_gone(before["pid"])
    assert ctl(running, "stop", "steady") == "steady: already stopped\n"
    assert ctl(running, "is-active", "steady", code=3) == "steady: not active\n"
    with running.connect("cat") as waits:  # in the kernel's queue
        said = ctl(running, "start", "cat", "steady")
        assert "cat: listening" in said and "steady: ready, pid " in said
        waits.sendall(b"hello")
        waits.shutdown(socket.SHUT_WR)
        assert read_all(waits) == b"hello"
    (result,) = ctl_json(running, "restart", "steady")
    assert result["ok"] and result["pid"] not in (None, before["pid"])
    assert ctl(running, "-q", "restart", "--no-wait", "steady") == ""
    assert any("stop asked for by pid" in record["message"] for record in running.find_records(service="steady"))


def test_a_start_that_fails(running: Superd) -> None:  # J9
    said = ctl(running, "start", "broken", "steady", code=1)
    assert "cannot start broken: exited with status 3" in said and "| oops" in said
    assert "off: ready, pid" in ctl(running, "start", "off")  # by hand it may be
    assert "no service 'x'" in ctl(running, "start", "x", code=4)


def test_exit_statuses_of_questions(running: Superd) -> None:  # J9
    for command, name, code in (
        ("is-ready", "cat", 0), ("is-ready", "steady", 0), ("is-ready", "broken", 3), ("is-ready", "x", 4),
        ("is-active", "cat", 0), ("is-active", "off", 3), ("is-failed", "broken", 0), ("is-failed", "cat", 3),
    ):  # fmt: skip
        ctl(running, command, name, code=code)
    assert ctl(running, "-q", "is-ready", "broken", "cat", code=3) == ""
    assert "broken: failed: exited with status 3" in ctl(running, "health", code=1)
    assert ctl(running, "health", "--live") == "live\n"
    assert ctl(running, "wait", "cat", "steady").startswith("cat: listening")
    assert "will not become ready" in ctl(running, "wait", "broken", code=1)
    ctl(running, "wait", "--for", "stopped", "broken")
    assert "within 0.05 s" in ctl(running, "wait", "--for", "stopped", "--timeout", "50ms", "steady", code=75)
    assert "does not run" in ctl(running, "kill", "broken", code=3)


def test_a_wrong_value_and_the_right_form(running: Superd) -> None:
    assert "write a name" in ctl(running, "kill", "-s", "99", "cat", code=2)
    assert "write an IP address" in ctl(running, "access", "cat", "somewhere", code=2)


def test_kill(running: Superd) -> None:
    (row,) = [row for row in ctl_json(running, "list") if row["name"] == "steady"]
    mark = running.mark()
    assert f"sent KILL to pid {row['pid']}" in ctl(running, "kill", "-s", "KILL", "steady")
    assert running.wait_record(after=mark, event="exit", service="steady")["signal"] == "KILL"
    assert "signal" in ctl(running, "kill", "-s", "HUPP", "steady", code=2)


def test_reload_service(running: Superd) -> None:
    """sleep(1) does not handle HUP: that is a failure, and shown; what does not run is another exit status."""
    assert "cannot reload broken: does not run" in ctl(running, "reload-service", "broken", code=3)
    assert "killed by HUP" in ctl(running, "reload-service", "steady", "broken", code=1)
    ctl(running, "start", "steady")  # HUP is a clean end, so on-failure has not started it again
    assert ctl(running, "reload-service", "--no-wait", "steady").startswith("steady: ready, pid ")
    ctl(running, "reload-service", "nosuch", code=4)


def test_health_of_a_healthy_superd(superd: Superd) -> None:
    superd.write("cat", toml(listen="tcp:127.0.0.1:0", command="/bin/cat"))
    superd.start()
    superd.call("List")
    assert ctl(superd, "health") == "ready\n"
    assert ctl_json(superd, "health") == {"live": True, "ready": True, "problems": []}


def test_a_file_with_errors(superd: Superd) -> None:
    superd.garbage_expected = True
    superd.write("bad", 'listn = "tcp:7"')
    superd.start()
    superd.call("List")
    (row,) = ctl_json(superd, "list")
    assert row["state"] == "bad config" and "listn" in row["note"]
    assert "did you mean `listen`?" in ctl(superd, "status", "bad")
    assert "unknown key" in ctl(superd, "start", "bad", code=1)
    ctl(superd, "is-failed", "bad")
    ctl(superd, "health", code=1)


def test_shutdown(superd: Superd) -> None:
    superd.write("steady", toml(run="always-on", command=STEADY))
    superd.start()
    superd.wait_record(event="output", service="steady")
    superd.call("List")
    keeper, (service,) = superd.pid, superd.services()
    assert ctl(superd, "shutdown") == "superd has stopped\n"
    wait_gone(service)
    wait_gone(keeper)
    assert superd.wait_exit() == 0
    assert not Path(superd.control.removeprefix("unix:")).exists()
    ctl(superd, "list", code=69)


def test_a_new_manager_has_the_same_socket(running: Superd) -> None:
    running.garbage_expected = True  # the keeper says in plain words that the manager was killed
    path = running.control.removeprefix("unix:")
    before = os.lstat(path).st_ino
    (manager,) = running.pids()["superd-manager"]
    os.kill(manager, signal.SIGKILL)
    # Whoever connects now waits in the kernel's queue; whoever had connected already has to ask again.
    rows = {row["name"]: row for row in ctl_json(running, "list")}
    assert rows["steady"]["state"] == "ready" and rows["broken"]["state"] == "failed"
    assert os.lstat(path).st_ino == before
    assert running.pids()["superd-manager"] != [manager]


def test_two_superds_at_one_path(running: Superd) -> None:  # D14
    with Superd() as second:
        second.write("cat", toml(listen="tcp:127.0.0.1:0", command="/bin/cat"))
        second.control = running.control
        second.start()
        assert "services go on" in second.wait_record(message=re.compile("cannot bind the control socket"))["message"]
        with second.connect("cat") as client:
            client.sendall(b"x")
            assert client.recv(1) == b"x"
    assert len(ctl_json(running, "list")) == 4  # the first one's is where it was


def test_introspection(running: Superd) -> None:
    with closing(Control(running.control, TIMEOUT_S)) as control:
        control._send(varlink.pack_call("org.varlink.service.GetInfo", {}))
        assert "io.superd.Control" in control._receive()[0]["interfaces"]


def test_a_flood_of_clients_that_are_killed(running: Superd) -> None:  # J6, J7
    (manager,) = running.pids()["superd-manager"]
    before = len(os.listdir(f"/proc/{manager}/fd"))
    call = varlink.pack_call("io.superd.Control.Logs", {"follow": True}, more=True)
    path = running.control.removeprefix("unix:")
    for at in range(200):
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(path)
            try:
                client.sendall(call[: len(call) * (at % 11) // 10])
            except BrokenPipeError:
                pass  # one too many at a time
    assert len(ctl_json(running, "list")) == 4
    deadline = time.monotonic() + TIMEOUT_S
    while len(os.listdir(f"/proc/{manager}/fd")) > before and time.monotonic() < deadline:
        ctl(running, "-q", "list")
    assert len(os.listdir(f"/proc/{manager}/fd")) <= before
    assert running.pids()["superd-manager"] == [manager]


def test_a_long_name_hides_no_column(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output, "terminal_columns", lambda: 80)
    head = ("service", "state", "for", "pid", "now", "total", "restarts", "listen", "note")
    name = "a-service-with-a-rather-long-name-number-007"
    rows = [[name, "listening", "1s", "4711", "0", "0", "0", "tcp:127.0.0.1:39491", ""]]
    lines = list(table(head, rows, right=("for", "pid", "now", "total", "restarts")))
    assert max(map(len, lines)) <= 80
    assert re.fullmatch(r"a-serv\S+…\S+007  listening +1s  4711 +0 +0 +0  tcp:127.0.0.1:39491", lines[1]), lines
    monkeypatch.setattr(output, "terminal_columns", lambda: None)
    assert name in list(table(head, rows))[1]


def test_the_keys_of_json_are_those_of_the_manual(running: Superd) -> None:
    page = (Path(__file__).parents[2] / "man" / "superctl.1").read_text()
    section = page.partition("\n.Ss JSON\n")[2].partition("\n.Ss ")[0]
    found = re.findall(r"^\.It Li (.+)\n\.Li (.+) \.$", section, re.M)
    documented = {name: keys.split(" , ") for names, keys in found for name in names.split(" , ")}
    with running.connect("cat") as client:
        client.sendall(b"x")
        assert client.recv(1) == b"x"
        process = documented["connections"]
        (details,) = ctl_json(running, "status", "cat")
        assert list(details["service"]) == documented["list"]
        assert [list(one) for one in details["sockets"]] == [documented["list --sockets"]]
        assert [list(one) for one in details["processes"]] == [[*process, "memory", "cpu"]]
        assert {type(details["processes"][0][key]) for key in ("memory", "cpu")} == {int, float}
        for command, arguments in {
            "list": [], "list --sockets": [], "status": [], "connections": [], "wait": ["cat"], "start": ["cat"],
        }.items():  # fmt: skip
            rows = ctl_json(running, *command.split(), *arguments)
            assert rows and all(list(row) == documented[command] for row in rows), command
    assert list(ctl_json(running, "health", code=1)) == documented["health"]
    assert list(ctl_json(running, "access", "cat", "127.0.0.1")) == documented["access"]
