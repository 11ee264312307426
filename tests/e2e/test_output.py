"""What services write, and superd's own log, through real pipes."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from harness import PYTHON, TIMEOUT_S, Superd, ask, cpu_share, fetch, toml, wait_gone

Require = Callable[[str], str]
MODES = ["always-on", "per-connection"]


def service(superd: Superd, mode: str, command: list[str], **keys: object) -> None:
    """It runs from the start, or when `activate` connects; standard error goes to the log in both cases."""
    listen = {"listen": "tcp:127.0.0.1:0"} if mode == "per-connection" else {"restart": "no"}
    superd.write("s", toml(run=mode, command=command, **listen, **keys))


def activate(superd: Superd, mode: str) -> None:
    superd.start()
    if mode == "per-connection":
        superd.connect("s").close()


def output(superd: Superd) -> list[str]:
    return [record["message"] for record in superd.find_records(event="output", service="s")]


@pytest.mark.parametrize("mode", MODES)
def test_one_record_one_line(superd: Superd, mode: str) -> None:  # L1 L7
    """Control characters, forged records and bytes that are no UTF-8: each line is one record, escaped."""
    forged = rb'\n{"event":"ready"}\r\n2026 superd: \033]0;title\007\000 \377\376 end\n'.decode()
    service(superd, mode, ["/bin/sh", "-c", f"printf '{forged}' >&2"])
    activate(superd, mode)
    superd.wait_record(event="exit", service="s")
    lines = output(superd)
    assert '{"event":"ready"}' in lines and any("end" in line for line in lines)
    assert all(line.isprintable() for line in superd.lines), superd.lines
    assert len(superd.find_records(event="ready")) == 1


def test_random_bytes(superd: Superd) -> None:  # L7
    service(superd, "always-on", ["/bin/sh", "-c", "head -c 300000 /dev/urandom >&2; echo; echo done"])
    superd.start()
    superd.wait_record(event="output", message="done")
    superd.wait_record(event="exit", service="s", status=0)
    superd.stop()  # every line of the log was JSON


@pytest.mark.parametrize("mode", MODES)
def test_closed_output(superd: Superd, mode: str) -> None:  # L5
    """A process that closes its output and lives on costs nothing."""
    service(superd, mode, ["/bin/sh", "-c", "echo ready >&2; exec 2>&- >&-; exec sleep 1000"])
    activate(superd, mode)
    superd.wait_record(event="output", message="ready")
    assert cpu_share(superd.manager, 0.5) < 0.05


@pytest.mark.parametrize("mode", MODES)
def test_descendant_holds_the_pipe(superd: Superd, mode: str) -> None:  # L6
    """The end of the main process is told at once, what the descendant writes right after it is still logged."""
    service(superd, mode, ["/bin/sh", "-c", "(sleep 0.2; echo late >&2; exec sleep 1000) & echo $! >&2; exit 3"])
    activate(superd, mode)
    assert superd.wait_record(event="exit", service="s")["status"] == 3
    superd.wait_record(event="output", message="late")


@pytest.mark.parametrize("mode", MODES)
def test_last_words(superd: Superd, mode: str) -> None:  # L9
    """64 kB and exit: all of it is in the log, before the exit, each time."""
    code = "import os, sys; os.write(2, b'x' * 63 + b'\\n'); os.write(2, (b'y' * 63 + b'\\n') * 1023); os._exit(0)"
    rounds = 10
    if mode == "per-connection":
        service(superd, mode, [PYTHON, "-I", "-c", code])
    else:
        delays = {"restart_delay": "1ms", "restart_delay_max": "2ms"}
        superd.write("s", toml(run=mode, command=[PYTHON, "-I", "-c", code], restart="always", **delays))
    superd.start()
    for number in range(rounds):
        if mode == "per-connection":
            fetch(superd.connect("s"))
        record = superd.wait_records(number + 1, event="exit", service="s")[number]
        words = superd.find_records(event="output", pid=record["pid"])
        assert len(words) == 1024
        assert superd.records.index(words[-1]) < superd.records.index(record)


@pytest.mark.parametrize("mode", MODES)
def test_endless_line(superd: Superd, mode: str) -> None:  # L8
    """400 kB without a newline: pieces of bounded length, marked; an unfinished last line is there too."""
    script = "head -c 400000 /dev/zero | tr '\\0' x >&2; echo >&2; printf unfinished >&2"
    service(superd, mode, ["/bin/sh", "-c", script])
    activate(superd, mode)
    superd.wait_record(event="exit", service="s")
    superd.wait_record(event="output", message="unfinished")
    pieces = [record for record in superd.find_records(event="output") if record["message"].startswith("x")]
    assert sum(len(piece["message"]) for piece in pieces) == 400_000
    assert all(len(piece["message"]) <= 8192 for piece in pieces)
    assert sum(bool(piece.get("continued")) for piece in pieces) >= len(pieces) - 1


def test_flags_of_one_pipe(superd: Superd) -> None:  # L13 A16
    """O_NONBLOCK that a service sets on its output is its own affair."""
    code = "import os; os.set_blocking(2, False); os.write(2, b'set\\n'); import time; time.sleep(1000)"
    service(superd, "always-on", [PYTHON, "-I", "-c", code])
    command = ["/bin/sh", "-c", "echo other >&2; cat /proc/self/fdinfo/2 | grep flags >&2"]
    superd.write("t", toml(listen="tcp:127.0.0.1:0", command=command))
    superd.start()
    superd.wait_record(event="output", message="set")
    fetch(superd.connect("t"))
    superd.wait_record(event="output", message="other")
    flags = superd.wait_record(event="output", message=re.compile("flags"))["message"]
    assert not int(flags.split()[1], 8) & os.O_NONBLOCK
    superd.stop()


def run_superd(superd: Superd, command: str, **options: object) -> subprocess.Popen[bytes]:
    """superd as a person starts it in a shell: `command` has $SUPERD in it."""
    argv = f"{sys.executable} -I -m superd -c {superd.conf} --control {superd.control} --log json"
    return subprocess.Popen(
        ["/bin/sh", "-c", command.replace("$SUPERD", argv)], stdin=subprocess.DEVNULL, start_new_session=True, **options
    )  # type: ignore[call-overload,no-any-return]


def below(superd: Superd, shell: subprocess.Popen[bytes]) -> int:
    """The keeper's pid, when the control socket answers."""
    assert superd.call("Health")["live"]
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                name = Path(f"/proc/{entry}/comm").read_text()
                line = Path(f"/proc/{entry}/cmdline").read_bytes()
            except OSError:
                continue
            if name == "superd-keeper\n" and os.fsencode(superd.conf) in line:
                return int(entry)
    raise AssertionError("no keeper")


@pytest.mark.parametrize("how", ["head", "closed", "full", "all closed"])
def test_nobody_reads_the_log(superd: Superd, how: str) -> None:  # F22 L2 E25
    """`2>&1 | head -1`, closed, a full pipe that nobody reads: it serves, and services are not blocked."""
    superd.write("cat", toml(listen=f"unix:{superd.dir}/c.sock", command=["/bin/cat"]))
    loud = ["/bin/sh", "-c", "yes | head -c 1000000; echo end; sleep 1000"]
    superd.write("loud", toml(run="always-on", command=loud))
    command = {
        "head": "$SUPERD 2>&1 | head -1 >/dev/null", "closed": "exec $SUPERD >&- 2>&-", "full": "exec $SUPERD 2>&1",
        "all closed": "exec $SUPERD <&- >&- 2>&-",
    }[how]  # fmt: skip
    shell = run_superd(superd, command, **({"stdout": subprocess.PIPE} if how == "full" else {}))
    try:
        keeper = below(superd, shell)
        superd.wait_for("loud", "ready")
        for _ in range(20):
            with unix_client(superd.dir / "c.sock") as client:
                client.sendall(b"x")
                assert client.recv(1) == b"x"
        logs = superd.call("Logs", names=["loud"], count=1000)["records"]
        assert logs  # what stderr does not take superctl still has
        os.kill(keeper, signal.SIGHUP)
        assert superd.call("Health")["ready"]
        os.kill(keeper, signal.SIGTERM)
        wait_gone(keeper)
        assert shell.wait(TIMEOUT_S) == 0
    finally:
        shell.kill()
        shell.wait()
        if shell.stdout is not None:
            shell.stdout.close()


def unix_client(path: Path) -> socket.socket:
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(TIMEOUT_S)
    client.connect(str(path))
    return client


def test_modules_in_the_working_directory(superd: Superd) -> None:  # F18
    """trio.py, json.py and tomllib.py in the working directory, in conf.d and in $HOME: not executed."""
    room = superd.room("room")
    mark = superd.dir / "hijacked"
    for directory in (room, superd.conf, superd.conf / "conf.d"):
        for name in ("trio", "json", "tomllib", "tomli", "superd", "sitecustomize", "usercustomize"):
            (directory / f"{name}.py").write_text(f"open({str(mark)!r}, 'w').write(__name__)\nraise SystemExit(99)\n")
    superd.write("cat", toml(listen="tcp:127.0.0.1:0", command=["/bin/cat"]))
    environment = {**os.environ, "HOME": str(room), "PYTHONSTARTUP": f"{room}/json.py"}
    entry = Path(sys.executable).with_name("superd")
    if not entry.exists():
        pytest.skip("superd is not installed here")
    superd.program = [str(entry)]
    superd.start(environment=environment, cwd=room)
    assert ask(superd.connect("cat"), b"x") == b"x"
    superd.stop()
    assert not mark.exists(), mark.read_text()


@pytest.mark.parametrize("form", ["text", "logfmt"])
def test_other_forms_of_the_log(superd: Superd, form: str) -> None:
    superd.garbage_expected = True
    service(superd, "always-on", ["/bin/sh", "-c", "echo hello world; exit 3"])
    superd.launch("--log", form)
    superd.wait_line(re.compile("hello world"))
    superd.wait_line(re.compile("ready: 1 services, 0 sockets"))
    superd.wait_line(re.compile("status[= ]3"))
    superd.stop()
    assert not any(isinstance(value, dict) for value in map(parse, superd.lines))


def parse(line: str) -> object:
    try:
        return json.loads(line)
    except ValueError:
        return None
