"""[health]: regular checks, what follows when they fail, and what they must never do."""

from __future__ import annotations

import itertools
import os
import re
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from harness import PYTHON, TIMEOUT_S, Superd, eventually, fetch, open_fds, toml, wait_gone

TOOK_OVER = re.compile("took over")
UNHEALTHY = re.compile("^unhealthy: ")


def ctl(superd: Superd, *arguments: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-I", "-m", "superd.cli.superctl", "-s", superd.control, *arguments]
    return subprocess.run(argv, capture_output=True, text=True, timeout=TIMEOUT_S)


class Checked:
    """A service that sleeps, checked by a program that succeeds while the file `well` is there."""

    def __init__(self, superd: Superd, health: dict[str, Any] | None = None, **keys: Any) -> None:
        self.superd = superd
        self.room = superd.room("room", user="nobody", mode=0o777)
        self.well = self.room / "well"
        self.well.touch()
        table = {"check": f"exec:/bin/sh -c 'echo x >>{self.room}/count; test -e {self.well}'"} | {
            "every": "50ms", "failures": 3, **(health or {}),
        }  # fmt: skip
        command = ["/bin/sleep", "1000"]
        superd.write("s", toml(**{"run": "always-on", "command": command, **keys}) + "[health]\n" + toml(**table))

    def ill(self) -> None:
        self.well.unlink()

    def heal(self) -> None:
        self.well.touch()

    def checks(self) -> int:
        count = self.room / "count"
        return len(count.read_text().splitlines()) if count.exists() else 0

    def wait_checks(self, more: int) -> None:
        """Until so many more were made."""
        wanted = self.checks() + more
        eventually(lambda: self.checks() >= wanted, True)


def problems(superd: Superd) -> list[str]:
    return superd.call("Health")["problems"]  # type: ignore[no-any-return]


def test_report(superd: Superd) -> None:
    """Once when it begins, once when it is over; in between the note, and `superctl health`, say it."""
    service = Checked(superd, {"then": "report"})
    superd.start()
    service.wait_checks(2)
    assert not superd.find_records(event="health") and superd.status("s")["note"] == ""
    for episode in range(2):
        service.ill()
        said = superd.wait_records(episode + 1, event="health", level="err", service="s")[episode]
        assert re.search(r"^unhealthy: 3 of 3 checks failed: exec:/bin/sh .*: exited with status 1$", said["message"])
        service.wait_checks(4)
        assert superd.status("s")["note"] == said["message"] and superd.status("s")["state"] == "ready"
        assert problems(superd) == [f"s: ready: {said['message']}"]
        assert ctl(superd, "health").returncode == 1
        assert "unhealthy: 3 of 3" in ctl(superd, "status", "s").stdout
        service.heal()
        well = superd.wait_records(episode + 1, event="health", level="notice", message="healthy again")[episode]
        assert well["pid"] == said["pid"]
        assert superd.status("s")["note"] == "" and problems(superd) == []
    assert len(superd.find_records(event="health", level="err")) == 2
    assert len(superd.find_records(event="start")) == 1


def test_a_success_clears_what_was_counted(superd: Superd) -> None:
    """Two of three, well, two of three: nothing follows; the note tells how many."""
    service = Checked(superd, {"every": "200ms"})
    superd.start()
    superd.wait_record(event="start", service="s")
    for round_ in range(2):
        service.ill()
        superd.wait_records(round_ + 1, event="health", level="info", message=re.compile("^2 of 3 checks failed"))
        service.heal()
        eventually(lambda: superd.status("s")["note"], "")
    assert not superd.find_records(event="health", level="err")
    assert len(superd.find_records(event="start")) == 1


def test_note_before_it_is_too_many(superd: Superd) -> None:
    service = Checked(superd, {"failures": 1000})
    superd.start()
    service.ill()
    superd.wait_record(event="health", message=re.compile("^2 of 1000 checks failed: exec:.*: exited with status 1$"))
    assert UNHEALTHY.search(superd.status("s")["note"])
    assert problems(superd) == []  # not yet


@pytest.mark.parametrize("restart", ["no", "always"])
def test_restart(superd: Superd, restart: str) -> None:
    """Stopped, and started at once whatever `restart` says; counted, and its last end says why."""
    service = Checked(superd, {"then": "restart"}, restart=restart, restart_delay="10s")
    superd.start()
    first = superd.wait_record(event="start", service="s")["pid"]
    service.ill()
    text = superd.wait_record(event="health", level="err", service="s")["message"]
    assert re.search(r"^unhealthy: 3 of 3 checks failed: .*; restarting it$", text)
    second = superd.wait_records(2, event="start", service="s")[1]["pid"]
    service.heal()
    wait_gone(first)
    assert second != first
    row = superd.status("s")
    assert (row["state"], row["pid"], row["restarts"]) == ("ready", second, 1)
    (ending,) = superd.call("Status", names=["s"])["services"][0]["endings"]
    assert re.search(r"^was killed by TERM after .* s \(unhealthy: 3 of 3 checks failed: ", ending)
    service.wait_checks(3)
    assert superd.status("s")["note"] == ""


def test_restart_on_demand(superd: Superd) -> None:
    """No check while it waits for traffic; it is started again at once, not at the next client."""
    code = "import socket\ns = socket.socket(fileno=3)\nwhile True: s.accept()[0].sendall(b'served')"
    service = Checked(superd, run="on-demand", listen="tcp:127.0.0.1:0", command=[PYTHON, "-I", "-c", code])
    superd.write("other", toml(run="always-on", command=["/bin/sleep", "0.5"], restart="no"))
    superd.start()
    superd.wait_record(event="exit", service="other")  # ten times `every`
    assert service.checks() == 0
    assert fetch(superd.connect("s")) == b"served"
    service.wait_checks(1)
    service.ill()
    superd.wait_records(2, event="start", service="s")
    service.heal()
    assert fetch(superd.connect("s")) == b"served"


def test_restart_limit(superd: Superd) -> None:
    """One that is never well is not restarted for ever."""
    service = Checked(superd, {"then": "restart", "failures": 1, "every": "10ms"}, restart_limit="3/1m")
    service.ill()
    superd.start()
    superd.wait_record(service="s", message=re.compile("giving up, `superctl start s`"))
    assert len(superd.find_records(event="start", service="s")) == 4
    row = superd.status("s")
    assert (row["state"], row["restarts"]) == ("failed", 3)
    assert UNHEALTHY.search(row["note"].partition("(")[2])
    before = service.checks()
    service.heal()
    assert ctl(superd, "start", "s").returncode == 0
    service.wait_checks(2)
    assert service.checks() > before


def test_restart_of_one_that_does_not_stop(superd: Superd) -> None:
    """KILL after stop_timeout, then started; no check while it is stopping."""
    code = "import signal, time; signal.signal(15, signal.SIG_IGN); print('on', flush=True); time.sleep(1000)"
    service = Checked(
        superd, {"failures": 1}, command=[PYTHON, "-I", "-c", code], stop_timeout="500ms", ready="log:^on$"
    )
    superd.start()
    superd.wait_record(event="ready", service="s")
    service.ill()
    superd.wait_record(event="health", level="err")
    before = service.checks()
    superd.wait_record(event="exit", signal="KILL", service="s")
    assert service.checks() == before
    service.heal()
    superd.wait_records(2, event="ready", service="s")


def test_shutdown(superd: Superd) -> None:
    """Everything is stopped, in order, and superd's exit status says that it was not asked to."""
    service = Checked(superd, {"then": "shutdown"})
    superd.write("other", toml(run="always-on", command=["/bin/sleep", "1000"]))
    superd.start()
    other = superd.wait_record(event="start", service="other")["pid"]
    service.ill()
    said = superd.wait_record(event="health", level="err")
    assert said["message"].endswith("; stopping superd")
    assert superd.wait_exit() == 1
    wait_gone(other)


def test_not_while_starting_or_stopped(superd: Superd) -> None:
    """Ready is what begins it."""
    gate = superd.dir / "gate"
    os.mkfifo(gate)
    gate.chmod(0o644)
    command = ["/bin/sh", "-c", f"cat {gate}; echo up; exec sleep 1000"]
    service = Checked(superd, ready="log:up", command=command)
    superd.write("other", toml(run="always-on", command=["/bin/sleep", "0.4"], restart="no"))
    superd.start()
    superd.wait_record(event="exit", service="other")
    assert service.checks() == 0
    gate.write_text("")
    superd.wait_record(event="ready", service="s")
    service.wait_checks(1)
    assert superd.call("Stop", names=["s"])["results"][0]["ok"]
    before = service.checks()
    superd.call("Start", names=["other"])
    superd.wait_records(2, event="exit", service="other")
    assert service.checks() == before


def test_manager_killed(superd: Superd) -> None:  # X7
    """Checks go on; the episode is reported once more by the new manager, and its end."""
    superd.garbage_expected = True
    service = Checked(superd, {"then": "report"})
    superd.start()
    service.wait_checks(1)
    superd.kill_role("superd-manager")
    superd.wait_record(message=TOOK_OVER)
    service.wait_checks(2)
    service.ill()
    superd.wait_record(event="health", level="err")
    superd.kill_role("superd-manager")
    superd.wait_records(2, message=TOOK_OVER)
    superd.wait_records(2, event="health", level="err")
    service.heal()
    superd.wait_record(event="health", message="healthy again")


def test_manager_killed_while_it_restarts(superd: Superd) -> None:  # X7
    """What the stop was for is known to the next manager: it starts the service again."""
    superd.garbage_expected = True
    code = "import signal, time; signal.signal(15, signal.SIG_IGN); print('on', flush=True); time.sleep(1000)"
    command = [PYTHON, "-I", "-c", code]
    service = Checked(superd, {"failures": 1}, command=command, stop_timeout="1s", restart="no", ready="log:on")
    superd.start()
    superd.wait_record(event="ready", service="s")
    service.ill()
    superd.wait_record(event="health", level="err")
    assert superd.status("s")["state"] == "stopping"
    service.heal()
    superd.kill_role("superd-manager")
    superd.wait_record(event="exit", signal="KILL", service="s")
    superd.wait_records(2, event="ready", service="s")
    assert superd.status("s")["restarts"] == 1


def test_a_check_that_hangs(superd: Superd) -> None:
    """It is killed at its timeout, with its group; there are never two."""
    room = superd.room("pids", user="nobody", mode=0o777)
    check = f"exec:/bin/sh -c 'echo $$ >>{room}/pids; trap \"\" TERM; sleep 1000 & sleep 1000; :'"
    service = Checked(superd, {"check": check, "timeout": "200ms", "every": "20ms", "then": "report", "failures": 2})
    assert service.well.exists()
    superd.start()
    said = superd.wait_record(event="health", level="err")["message"]
    assert said.endswith(": no answer within 0.2 s")
    eventually(lambda: len((room / "pids").read_text().split()) > 4, True)
    live = [pid for pid in (room / "pids").read_text().split()[:-2] if Path(f"/proc/{pid}").exists()]
    assert live == []
    assert len(superd.services()) <= 4  # the service, and one check: a shell and two sleeps
    superd.call("Stop", names=["s"])
    eventually(superd.services, [])


def test_a_check_that_shouts(superd: Superd) -> None:
    """What it writes is neither kept nor logged, and others are served meanwhile."""
    check = "exec:/usr/bin/yes this is fine"
    Checked(superd, {"check": check, "timeout": "500ms", "then": "report", "failures": 1})
    superd.write("cat", toml(listen="tcp:127.0.0.1:0", command=["/bin/echo", "hello"]))
    superd.start()
    for _ in range(20):
        assert fetch(superd.connect("cat")) == b"hello\n"
    assert superd.wait_record(event="health", level="err")["message"].endswith(": no answer within 0.5 s")
    assert not superd.find_records(event="output")


def test_http_by_a_real_server(superd: Superd) -> None:
    """One that stands still (SIGSTOP) is still connected to, but does not answer: killed, it is followed by another."""
    host = f"127.{os.getpid() >> 8 & 0x7F | 0x40}.{os.getpid() & 0xFF}.9"
    command = [PYTHON, "-m", "http.server", "--bind", host, "8000", "--directory", "/usr/share"]
    url = f"http://{host}:8000/"
    health = toml(check=url, every="30ms", timeout="300ms", failures=2, then="restart")
    superd.write("s", toml(run="always-on", ready=url, command=command) + "[health]\n" + health)
    superd.start()
    pid = superd.wait_record(event="ready", service="s")["pid"]
    os.kill(pid, signal.SIGSTOP)
    superd.wait_record(
        event="health",
        level="err",
        message=f"unhealthy: 2 of 2 checks failed: {url}: no answer within 0.3 s; restarting it",
    )
    assert superd.wait_records(2, event="ready", service="s")[1]["pid"] != pid


def test_a_thousand_checks(superd: Superd) -> None:
    """Not an fd, a process or a row in a table more than before."""
    path = str(superd.dir / "own.sock")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen(100)
        for name in ("a", "b", "c"):
            text = toml(run="always-on", command=["/bin/sleep", "1000"])
            health = toml(check=f"connect:unix:{path}", every="1ms")
            superd.write(name, f"{text}[health]\n{health}")
        service = Checked(superd, {"every": "1ms"})
        with ThreadPoolExecutor(1) as pool:
            accepted = pool.submit(accept_until_closed, server)
            superd.start()
            service.wait_checks(10)
            before = sizes(superd)
            service.wait_checks(200)
            assert sizes(superd) <= before + 8  # each service's check may be under way
            assert not superd.find_records(event="health")
            superd.call("Stop", names=["a", "b", "c", "s"])
            server.shutdown(socket.SHUT_RDWR)
            assert accepted.result(TIMEOUT_S) >= 1000


def accept_until_closed(server: socket.socket) -> int:
    for number in itertools.count():
        try:
            server.accept()[0].close()
        except OSError:
            return number
    raise AssertionError


def sizes(superd: Superd) -> int:
    """How many fds keeper and manager have."""
    pids = superd.pids()
    return sum(len(open_fds(pid)) for role in ("superd-keeper", "superd-manager") for pid in pids[role])


def test_the_end_of_superd(superd: Superd) -> None:
    """While a check hangs: stopped in order, at once, and nothing left."""
    Checked(
        superd, {"check": "exec:/bin/sh -c 'trap \"\" TERM; echo $$; sleep 1000; :'", "timeout": "1h", "every": "1ms"}
    )
    superd.start()
    eventually(lambda: len(superd.services()), 3)
    superd.stop(timeout=5)
