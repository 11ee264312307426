"""A service's whole life: commands around it, time limits, what is essential, and orders that contradict each other."""

from __future__ import annotations

import itertools
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from harness import PYTHON, Superd, ask, eventually, injected, toml, wait_gone

TOOK_OVER = re.compile("took over")
# Tells its name and what it was told, one line for each run.
TELL = (
    'echo "$0 ${INVOCATION_ID:-none} main=${MAINPID:-none} ${SERVICE_RESULT:-none},${EXIT_CODE:-none},'
    '${EXIT_STATUS:-none} uid=$(id -u) fds=${LISTEN_FDS:-none} in=$(readlink /proc/self/fd/0)" >> told'
).replace("${", "$${")  # for the shell, not for superd


def sh(name: str, script: str = ":") -> list[str]:
    return ["/bin/sh", "-c", f"{TELL}; {script}", name]


@pytest.fixture
def room(superd: Superd) -> Path:
    return superd.room("room", user="nobody")


def told(room: Path) -> list[list[str]]:
    path = room / "told"
    return [line.split() for line in path.read_text().splitlines()] if path.exists() else []


def names(room: Path) -> list[str]:
    return [words[0] for words in told(room)]


def service(superd: Superd, room: Path, name: str = "s", **keys: object) -> None:
    superd.write(name, toml(**{"run": "always-on", "cwd": room, "restart": "no", **keys}))


def around(**changes: object) -> dict[str, object]:
    return {
        "start_pre": [sh("pre1"), sh("pre2")], "command": sh("main", "exec sleep 1000"),
        "start_post": [sh("post1"), sh("post2")], "stop_post": [sh("after1"), sh("after2")], **changes,
    }  # fmt: skip


LISTS = {"start_pre": ["pre1", "pre2"], "start_post": ["post1", "post2"], "stop_post": ["after1", "after2"]}
EVERYTHING = ["pre1", "pre2", "main", "post1", "post2", "after1", "after2"]


def test_commands_around(superd: Superd, room: Path) -> None:  # O2
    """In order, in the service's context, told what systemd tells, and without its sockets."""
    service(superd, room, listen="tcp:127.0.0.1:0", **around())
    superd.start()
    superd.wait_for("s", "ready")
    pid = superd.status("s")["pid"]
    assert names(room)[:2] == ["pre1", "pre2"] and sorted(names(room)[2:]) == ["main", "post1", "post2"]
    assert superd.call("Stop", names=["s"])["results"][0]["ok"]
    rows = {row[0]: row for row in told(room)}
    assert sorted(rows) == sorted(EVERYTHING) and names(room)[-2:] == ["after1", "after2"]
    assert len({row[1] for row in rows.values()}) == 1 and len(rows["main"][1]) == 32
    assert len({row[4] for row in rows.values()}) == 1
    assert rows["main"][5] == "fds=1"
    for name in EVERYTHING:
        if name != "main":
            assert rows[name][5:] == ["fds=none", "in=/dev/null"]
    assert {rows[name][2] for name in ("pre1", "pre2", "main")} == {"main=none"}
    assert {rows[name][2] for name in ("post1", "post2", "after1", "after2")} == {f"main={pid}"}
    assert {rows[name][3] for name in ("after1", "after2")} == {"success,killed,TERM"}
    assert superd.call("Start", names=["s"])["results"][0]["ok"]
    assert told(room)[-1][1] != rows["main"][1]


def test_output_of_commands(superd: Superd, room: Path) -> None:
    service(superd, room, **around(start_pre=[["/bin/sh", "-c", "echo before; echo '<3>broken' >&2"]]))
    superd.start()
    assert superd.wait_record(event="output", service="s", message="before")
    assert superd.wait_record(event="output", service="s", message="broken")["level"] == "err"


@pytest.mark.parametrize("how", ["exit 3", "kill -9 $$", "missing"])
def test_start_pre_fails(superd: Superd, room: Path, how: str) -> None:
    """The main command is not run, stop_post is, and the log names command and phase; `restart` judges it."""
    bad = room / "bad"
    bad.write_text(f"#!/bin/sh\n{how}\n")
    bad.chmod(0o755)
    service(superd, room, **around(start_pre=[sh("pre1"), [bad], sh("pre2")]))
    service(superd, room, "again", restart="on-failure", **around(start_pre=[[bad]], stop_post=[]))
    if how == "missing":
        superd.start()
        bad.unlink()
        mark = superd.mark()
        superd.call("Start", names=["s", "again"], wait=False)
    else:
        mark = 0
        superd.start()
    said = {"exit 3": "exited with status 3", "kill -9 $$": "was killed by KILL", "missing": "no such file"}[how]
    superd.wait_record(after=mark, service="s", message=re.compile(f"start_pre: .*{bad}.*{said}.*giving up"))
    superd.wait_record(after=mark, service="again", message=re.compile(f"start_pre: .*{bad}.*trying again in"))
    eventually(lambda: superd.status("s")["state"], "failed")
    assert names(room)[-3:] == ["pre1", "after1", "after2"] and "main" not in names(room)
    result = {"exit 3": "exit-code", "kill -9 $$": "signal", "missing": "exit-code"}[how]
    assert told(room)[-1][3] == f"{result},none,none"
    assert not superd.find_records(event="start", service="s")


def test_start_post_fails(superd: Superd, room: Path) -> None:
    """The service is stopped, never ready, and that is a failure."""
    service(superd, room, **around(start_post=[sh("post1", "exit 4"), sh("post2")]))
    superd.start()
    superd.wait_record(service="s", message=re.compile("start_post: /bin/sh exited with status 4.*giving up"))
    assert superd.status("s")["state"] == "failed"
    assert "post2" not in names(room) and names(room)[-2:] == ["after1", "after2"]
    assert told(room)[-1][3] == "exit-code,killed,TERM"


def test_ready_only_after_start_post(superd: Superd, room: Path) -> None:
    code = (
        "import os, socket, time\n"
        "s = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM); s.sendto(b'READY=1', os.environ['NOTIFY_SOCKET'])\n"
        "time.sleep(1000)"
    )
    gate = room / "gate"
    os.mkfifo(gate, 0o666)
    gate.chmod(0o666)
    keys = around(command=[PYTHON, "-I", "-c", code], start_post=[["/bin/sh", "-c", "cat gate"]], ready="notify")
    service(superd, room, **keys)
    superd.start()
    superd.wait_record(event="ready", service="s")
    assert superd.status("s")["state"] == "starting"
    gate.write_text("go\n")
    superd.wait_for("s", "ready")


@pytest.mark.parametrize("kill", ["kill -9", "exit"])
def test_stop_post_after_a_crash_and_before_a_restart(superd: Superd, room: Path, kill: str) -> None:
    script = "kill -SEGV $$" if kill == "kill -9" else "exit 7"
    service(
        superd, room, restart="always", restart_limit="1/60s",
        start_pre=[sh("pre")], command=sh("main", script), stop_post=[sh("after", "sleep 0.1; echo done >> told")],
    )  # fmt: skip
    superd.start()
    superd.wait_record(service="s", message=re.compile("giving up"))
    assert names(room) == ["pre", "main", "after", "done"] * 2
    result = told(room)[2][3]
    assert result in (("signal,killed,SEGV", "core-dump,dumped,SEGV") if kill == "kill -9" else ("exit-code,exited,7",))


def test_stop_post_waits_for_the_tree(superd: Superd, room: Path) -> None:  # G6
    leaves = "setsid sh -c 'exec sleep 1001' & sleep 0.1; exit 1"
    probe = ["/bin/sh", "-c", "pgrep -f 'sleep 100[1]' -u $(id -u) > left; exit 0"]
    service(superd, room, command=sh("main", leaves), stop_post=[probe])
    superd.start()
    superd.wait_record(service="s", message=re.compile("giving up"))
    assert (room / "left").read_text() == ""


def test_stop_post_fails(superd: Superd, room: Path) -> None:
    """All of them run; a failure makes a good end a bad one, as in systemd."""
    service(superd, room, run="once", command=sh("main"), stop_post=[sh("after1", "exit 5"), sh("after2")])
    superd.start()
    superd.wait_record(service="s", message=re.compile("stop_post: /bin/sh exited with status 5.*giving up"))
    assert names(room) == ["main", "after1", "after2"]


@pytest.mark.parametrize("phase", ["start_pre", "start_post", "stop_post"])
def test_time_limits_of_commands(superd: Superd, room: Path, phase: str) -> None:  # G9
    hang = ["/bin/sh", "-c", "trap '' TERM; while :; do sleep 1000; done"]
    limits = {"ready_timeout": "300ms", "stop_timeout": "200ms"}
    service(superd, room, **around(**{phase: [hang]}), **limits)
    superd.start()
    if phase == "stop_post":
        superd.wait_for("s", "ready")
        assert superd.call("Stop", names=["s"])["results"][0]["ok"]
        superd.wait_record(service="s", message=re.compile("stop_post: /bin/sh did not stop within 0.2 s; killing it"))
        assert superd.status("s")["state"] == "stopped"
    else:
        superd.wait_record(service="s", message=re.compile(f"{phase}: /bin/sh did not end within 0.3 s; stopping it"))
        superd.wait_record(service="s", message=re.compile("giving up"))
        assert told(room)[-1][0] == "after2" and told(room)[-1][3].startswith("timeout,")
    assert superd.services() == []


@pytest.mark.parametrize("phase", ["start_pre", "start_post", "stop_post"])
@pytest.mark.parametrize("how", ["stop", "restart", "TERM"])
def test_orders_during_commands(superd: Superd, room: Path, phase: str, how: str) -> None:  # G13
    """They are ended (those of stop_post run to their end), and the order is carried out."""
    gate = room / "gate"
    slow = sh(phase, "echo in >&2; while [ ! -e gate ]; do sleep 0.02; done")
    keys = around(**{phase: [slow]})
    service(superd, room, **keys, stop_timeout="5s")
    superd.start()
    if phase == "stop_post":
        superd.wait_for("s", "ready")
        superd.call("Stop", names=["s"], wait=False)
    superd.wait_record(event="output", service="s", message="in")
    assert superd.status("s")["state"] == ("stopping" if phase == "stop_post" else "starting")
    if how == "TERM":
        os.kill(superd.pid, signal.SIGTERM)
        superd.wait_record(message="stopping")
        gate.touch()
        assert superd.wait_exit() == 0
        return
    superd.call(how.capitalize(), names=["s"], wait=False)
    gate.touch()
    if how == "stop":
        superd.wait_for("s", "stopped")
        assert superd.status("s")["state"] == "stopped"
        assert names(room)[-1] == ("stop_post" if phase == "stop_post" else "after2")
    else:
        superd.wait_for("s", "ready")
        eventually(lambda: names(room).count("main"), 1 if phase == "start_pre" else 2)
    assert not superd.find_records(message=re.compile("internal error"))


KILLED_WHEN = [
    *itertools.product(["start_pre", "start_post", "stop_post"], ["before", "after", "1"]),
    *itertools.product(["start_pre"], ["2", "3"]),
]


@pytest.mark.parametrize(("phase", "when"), KILLED_WHEN)
def test_manager_killed_during_commands(
    superd: Superd, room: Path, require: Callable[[str], str], phase: str, when: str
) -> None:
    """The next one goes on where it was: nothing is run twice, and nothing is left out.

    when  a command ends before or after the manager, or the manager ends as it sends its n-th message after that
    """
    superd.garbage_expected = True
    gate = room / "gate"
    slow = sh("slow", "echo in >&2; while [ ! -e gate ]; do sleep 0.02; done")
    last_is_slow = when.isdigit()
    first = {"start_pre": "pre1", "start_post": "post1", "stop_post": "after1"}[phase]
    last = {"start_pre": "pre2", "start_post": "post2", "stop_post": "after2"}[phase]
    service(
        superd, room, **around(**{phase: [sh(first), sh(last), slow] if last_is_slow else [sh(first), slow, sh(last)]})
    )
    superd.start()
    if phase == "stop_post":
        superd.wait_for("s", "ready")
        os.kill(superd.status("s")["pid"], signal.SIGKILL)
    superd.wait_record(event="output", service="s", message="in")
    manager = superd.manager
    if when.isdigit():
        with injected(require("strace"), manager, f"sendmsg:signal=KILL:when={when}"):
            gate.touch()
            wait_gone(manager)
    else:
        if when == "before":  # it ends while there is no manager
            os.kill(manager, signal.SIGSTOP)
            gate.touch()
            eventually(lambda: len(superd.services()), 0 if phase != "start_post" else 1)
        superd.kill_role("superd-manager")
    superd.wait_record(message=TOOK_OVER)
    gate.touch()
    if phase != "stop_post":
        superd.wait_for("s", "ready")
        assert superd.call("Stop", names=["s"])["results"][0]["ok"]
    else:
        eventually(lambda: superd.status("s")["state"], "failed")
    wanted = sorted([*EVERYTHING, "slow"])
    assert sorted(names(room)) == wanted, names(room)
    assert len({row[1] for row in told(room)}) == 1
    assert told(room)[-1][3] == ("signal,killed,KILL" if phase == "stop_post" else "success,killed,TERM")


def test_managers_killed_all_the_way(superd: Superd, room: Path) -> None:
    """A manager is killed at each step of a start and a stop, again and again: each command runs once."""
    superd.garbage_expected = True
    # Slow enough that each manager has served a while: the keeper follows one that has not with a delay.
    slow = {name: [sh(word, "sleep 0.06") for word in words] for name, words in LISTS.items()}
    service(superd, room, **around(**slow), enabled=False)
    superd.start()
    for step in range(1, 5):
        before = len(told(room))
        superd.call("Start", names=["s"], wait=False)
        eventually(lambda before=before, step=step: len(told(room)) >= before + min(step, 5), True)
        mark = superd.mark()
        superd.kill_role("superd-manager")
        superd.wait_record(after=mark, message=TOOK_OVER)
        superd.wait_for("s", "ready")
        superd.call("Stop", names=["s"], wait=False)
        eventually(lambda before=before, step=step: len(told(room)) >= before + 5 + step % 3, True)
        mark = superd.mark()
        superd.kill_role("superd-manager")
        superd.wait_record(after=mark, message=TOOK_OVER)
        superd.wait_for("s", "stopped")
        found = names(room)[before:]
        assert sorted(found) == sorted(EVERYTHING), (step, found)


# --- limits.max_runtime


def test_max_runtime(superd: Superd, room: Path) -> None:
    """TERM, then KILL, and a failure of kind timeout: on-abnormal restarts it, on-abort does not."""
    limits = {"max_runtime": "300ms"}
    service(superd, room, "abort", command=sh("abort", "exec sleep 1000"), restart="on-abort", limits=limits,
            stop_post=[sh("after")])  # fmt: skip
    stubborn = sh("stubborn", "trap '' TERM; while :; do sleep 1000; done")
    service(superd, room, "abnormal", command=stubborn, restart="on-abnormal", limits=limits, stop_timeout="100ms")
    service(superd, room, "quick", run="once", command=sh("quick"), limits=limits)
    superd.start()
    said = superd.wait_record(service="abort", message=re.compile("giving up"))
    assert "runs longer than max_runtime = 300ms" in said["message"]
    assert superd.wait_record(event="exit", service="abort")["duration"] >= 0.3
    assert [row[3] for row in told(room) if row[0] == "after"] == ["timeout,killed,TERM"]
    assert superd.wait_record(event="exit", service="abnormal")["signal"] == "KILL"
    superd.wait_records(2, event="start", service="abnormal")
    assert superd.status("quick")["state"] == "done"


def test_max_runtime_of_connections(superd: Superd) -> None:
    """Each for itself; one that ignores TERM is killed; one that ends in time is not noticed."""
    command = [
        "/bin/sh",
        "-c",
        "read how; [ $how = stubborn ] && trap '' TERM; echo $how; while :; do sleep 0.05; done",
    ]
    keys = {"listen": "tcp:127.0.0.1:0", "limits": {"max_runtime": "300ms"}, "stop_timeout": "200ms"}
    superd.write("s", toml(command=command, **keys))
    superd.write("cat", toml(command=["/bin/cat"], **keys))
    superd.start()
    for how, signo in (("willing", "TERM"), ("stubborn", "KILL")):
        mark = superd.mark()
        with superd.connect("s") as client:
            client.sendall(how.encode() + b"\n")
            assert b"".join(iter(lambda client=client: client.recv(100), b"")).strip() == how.encode()
        record = superd.wait_record(after=mark, event="exit", service="s")
        assert record["signal"] == signo and record["duration"] >= 0.3
        superd.wait_record(after=mark, service="s", message=re.compile("longer than max_runtime = 300ms; stopping it"))
    assert ask(superd.connect("cat"), b"x") == b"x"
    assert superd.wait_record(event="exit", service="cat")["status"] == 0


def test_max_runtime_outlives_the_manager(superd: Superd, room: Path) -> None:
    superd.garbage_expected = True
    limits = {"max_runtime": "1500ms"}
    service(superd, room, command=sh("main", "exec sleep 1000"), limits=limits)
    superd.write("cat", toml(listen="tcp:127.0.0.1:0", command=["/bin/cat"], limits=limits))
    began = time.monotonic()
    superd.start()
    with superd.connect("cat") as client:
        client.sendall(b"x")
        assert client.recv(1) == b"x"
        superd.wait_record(event="start", service="s")
        superd.kill_role("superd-manager")
        superd.wait_record(message=TOOK_OVER)
        assert client.recv(1) == b""
    assert superd.wait_record(event="exit", service="cat")["signal"] == "TERM"
    superd.wait_record(service="s", message=re.compile("max_runtime.*giving up"))
    assert 1.5 <= time.monotonic() - began < 5


# --- essential


ENDS: dict[str, tuple[dict[str, object], int]] = {
    "status 3": ({"command": ["/bin/sh", "-c", "exit 3"]}, 3),
    "signal": ({"command": ["/bin/sh", "-c", "kill -KILL $$"]}, 137),
    "done": ({"command": ["/bin/true"]}, 0),
    "done with 42": ({"command": ["/bin/sh", "-c", "exit 42"], "success_status": [42]}, 42),
    "ends well, but not ready": (
        {"command": ["/bin/sh", "-c", "trap 'exit 0' TERM; while :; do sleep 0.05; done"], "ready": "notify",
         "ready_timeout": "200ms"}, 1,
    ),
    "start_pre fails": ({"command": ["/bin/true"], "start_pre": [["/bin/false"]]}, 1),
    "after restarts": (
        {"command": ["/bin/sh", "-c", "exit 9"], "restart": "always", "restart_delay": "1ms", "restart_limit": "3/60s"},
        9,
    ),
}  # fmt: skip


@pytest.mark.parametrize("how", ENDS)
def test_essential(superd: Superd, how: str) -> None:  # P6 H6
    """When it has ended for good everything is stopped, and superd's status is its own; never 0 for a failure."""
    keys, status = ENDS[how]
    superd.write("s", toml(**{"run": "always-on", "restart": "no", "essential": True, **keys}))
    superd.write("other", toml(run="always-on", command=["/bin/sleep", "1000"]))
    superd.start()
    assert superd.wait_exit() == status
    superd.wait_record(service="s", message=re.compile(f"is essential and has ended: .*exit status {status}$"))
    assert superd.find_records(event="exit", service="other", signal="TERM")


def test_essential_cannot_be_executed(superd: Superd) -> None:  # H6
    program = superd.room("bin", user="nobody") / "program"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    gone = [["/bin/rm", "-f", program]]
    superd.write("s", toml(run="always-on", restart="no", essential=True, start_pre=gone, command=[program]))
    superd.start()
    assert superd.wait_exit() == 1


def test_stopping_an_essential_service_is_a_wish(superd: Superd) -> None:
    """superctl stop does not end superd; and a new manager knows that it was a wish, and what is essential."""
    superd.garbage_expected = True
    superd.write("s", toml(run="always-on", essential=True, command=["/bin/sh", "-c", "sleep 1000; exit 5"]))
    superd.start()
    assert superd.call("Stop", names=["s"])["results"][0]["ok"]
    superd.kill_role("superd-manager")
    superd.wait_record(message=TOOK_OVER)
    assert superd.status("s")["state"] == "stopped"
    superd.call("Start", names=["s"])
    mark = superd.mark()
    superd.kill_role("superd-manager")
    superd.wait_record(after=mark, message=TOOK_OVER)
    superd.stop()


def test_manager_killed_while_an_essential_end_stops_everything(superd: Superd, room: Path) -> None:
    """What was begun is finished by the next manager, with the same status."""
    superd.garbage_expected = True
    brief = ["/bin/sh", "-c", f"while [ ! -e {room}/up ]; do sleep 0.02; done; exit 6"]
    superd.write("s", toml(run="always-on", restart="no", essential=True, command=brief))
    code = "trap 'while [ ! -e gate ]; do sleep 0.02; done; exit' TERM; touch up; while :; do sleep 0.02; done"
    slow = sh("slow", code)
    service(superd, room, "slow", command=slow)
    superd.start()
    superd.wait_record(message="stopping")
    superd.kill_role("superd-manager")
    mark = superd.mark()
    superd.wait_record(after=mark, message=TOOK_OVER)
    (room / "gate").touch()
    assert superd.wait_exit() == 6
    assert len(superd.find_records(event="start", service="s")) == 1


# --- reload_signal


def test_reload_service(superd: Superd, room: Path) -> None:
    """To the main process alone, to each live connection; what does not run cannot be reloaded."""
    script = "trap 'echo again >&2' USR1; (trap 'echo child >&2' USR1; echo up >&2; while :; do sleep 0.02; done) & "
    script += "while :; do sleep 0.02; done"
    service(superd, room, reload_signal="USR1", command=["/bin/sh", "-c", script])
    serve = ["/bin/sh", "-c", "trap 'echo again' HUP; echo up; while :; do sleep 0.02; done"]
    superd.write("each", toml(listen="tcp:127.0.0.1:0", command=serve))
    service(superd, room, "dies", command=["/bin/sleep", "1000"])
    superd.start()
    superd.wait_record(event="output", service="s", message="up")
    with superd.connect("each") as one, superd.connect("each") as two:
        assert one.recv(3) == two.recv(3) == b"up\n"
        results = superd.call("ReloadService", names=["s", "each", "dies"])["results"]
        assert [(row["ok"], row["changed"]) for row in results] == [(True, True), (True, True), (False, True)]
        assert "was killed by HUP" in results[2]["note"]
        assert one.recv(6) == two.recv(6) == b"again\n"
    superd.wait_record(event="output", service="s", message="again")
    assert not superd.find_records(event="output", service="s", message="child")
    (result,) = superd.call("ReloadService", names=["dies"])["results"]
    assert (result["ok"], result["changed"], result["note"]) == (False, False, "does not run")


# --- orders that contradict each other


def test_conflicting_orders(superd: Superd, room: Path) -> None:  # G13
    """The last one counts, whatever the service is about."""
    slow = "trap 'sleep 0.1; exit 0' TERM; echo up >&2; while :; do sleep 0.02; done"
    service(superd, room, command=["/bin/sh", "-c", slow])
    superd.start()
    superd.wait_record(event="output", message="up")
    pid = superd.status("s")["pid"]
    for order in ("Stop", "Start", "Stop"):
        superd.call(order, names=["s"], wait=False)
    superd.wait_for("s", "stopped")
    wait_gone(pid)
    for order in ("Start", "Stop", "Restart", "Stop", "Start"):
        superd.call(order, names=["s"], wait=False)
    superd.wait_for("s", "ready")
    mark = superd.mark()
    superd.call("Restart", names=["s"], wait=False)
    superd.call("Kill", names=["s"], signal="KILL")
    superd.wait_record(after=mark, event="exit", service="s", signal="KILL")
    superd.wait_for("s", "ready")


def test_stop_during_backoff(superd: Superd, room: Path) -> None:  # G13
    service(superd, room, restart="always", restart_delay="30s", command=["/bin/false"])
    superd.start()
    superd.wait_record(service="s", message=re.compile("trying again in"))
    row = superd.status("s")
    assert row["state"] == "backoff" and "trying again in" in row["note"]
    assert superd.call("Stop", names=["s"])["results"][0]["state"] == "stopped"
    assert superd.status("s")["note"] == "", "it is not tried again"


def test_backoff_outlives_the_manager(superd: Superd, room: Path) -> None:  # G14
    superd.garbage_expected = True
    service(superd, room, restart="always", restart_delay="30s", command=["/bin/false"])
    superd.start()
    superd.wait_record(service="s", message=re.compile("trying again in"))
    for _ in range(3):
        mark = superd.mark()
        superd.kill_role("superd-manager")
        superd.wait_record(after=mark, message=TOOK_OVER)
    assert superd.status("s")["state"] == "backoff"
    assert len(superd.find_records(event="start", service="s")) == 1
