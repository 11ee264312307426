"""READY=1 and its kin, as services send them."""

from __future__ import annotations

import os
import re
import select
import signal
import socket
import stat
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from harness import Superd, descendants, eventually, injected, toml, wait_gone
from notifying import Gate, details, service, shell

Require = Callable[[str], str]


def test_ready(superd: Superd) -> None:
    """It is starting until it says so; what else it says is shown."""
    gate = superd.dir / "gate"
    os.mkfifo(gate)
    gate.chmod(0o644)
    service(superd, f"open({str(gate)!r}).read(); notify(b'STATUS=warm\\nREADY=1'); time.sleep(1000)")
    superd.start()
    superd.wait_record(event="start", service="s")
    assert superd.status("s")["state"] == "starting"
    gate.write_text("go")
    superd.wait_record(event="ready", service="s")
    assert superd.status("s")["state"] == "ready"
    assert superd.call("Status", names=["s"])["services"][0]["said"] == "warm"


def test_odd_messages(superd: Superd) -> None:  # I1 I9 I8
    """10,000 empty ones and all kinds of nonsense change nothing: READY=1 after them works."""
    nonsense = [b"\0", b"READY", b"READY=2", b"READY=1\0READY=1", b"x" * 4097, b"\xff=\xfe", b"\n" * 4000, b"=1"]
    service(superd, f"notify(*[b''] * 10000, *{nonsense!r}); notify(b'READY=1'); time.sleep(1000)")
    superd.start()
    superd.wait_record(event="ready", service="s")
    assert not superd.find_records(level=re.compile("err"))


@pytest.mark.parametrize("no_block", [False, True])
def test_sender_is_gone(superd: Superd, require: Require, no_block: bool) -> None:  # I3 I4 I5
    """systemd-notify as a child that ends at once: ready each time, with the barrier answered and without one."""
    notify = require("systemd-notify")
    option = " --no-block" if no_block else ""
    shell(
        superd, f"{notify} --ready{option}; echo status $? >&2; exec sleep 1000", notify_access="all", stop_timeout="1s"
    )
    superd.start()
    for number in range(20):
        superd.wait_records(number + 1, event="ready", service="s")
        superd.wait_records(number + 1, event="output", message="status 0")
        superd.call("Restart", names=["s"], wait=False)
    assert not superd.find_records(message=re.compile("no READY"))


@pytest.mark.parametrize("access", ["main", "all", "none"])
def test_access(superd: Superd, access: str) -> None:  # I12
    """READY=1 of a helper counts with "all" only, that of the main process with "main" too."""
    helper = "pid = os.fork()\nif pid == 0: notify(b'READY=1'); os._exit(0)\nos.waitpid(pid, 0)\n"
    code = helper + "os.write(2, b'helper has\\n'); input_ = open(GATE).read(); notify(b'READY=1'); time.sleep(1000)"
    gate = superd.dir / "gate"
    os.mkfifo(gate)
    gate.chmod(0o644)
    service(superd, code.replace("GATE", repr(str(gate))), notify_access=access, ready_timeout="1s", stop_timeout="1s")
    superd.start()
    superd.wait_record(event="output", message="helper has")
    if access == "all":
        superd.wait_record(event="ready", service="s")
    else:
        superd.status("s")  # it has read what was there by now
        assert not superd.find_records(event="ready", service="s")
    gate.write_text("go")
    if access == "none":
        superd.wait_record(service="s", message=re.compile(r"no READY=1 within 1 s; stopping it"))
    else:
        superd.wait_record(event="ready", service="s")


def test_last_words(superd: Superd) -> None:  # I13
    """READY=1 and exit at once: "ready", then "exit", each time."""
    superd.write_daemon('log_level = "debug"')
    service(superd, "notify(b'READY=1')", restart="always", restart_delay="1ms", restart_delay_max="2ms")
    superd.start()
    superd.wait_records(20, event="exit", service="s", status=0)
    found = [record["event"] for record in superd.find_records(service="s", event=re.compile("^(ready|exit|start)$"))]
    assert found[:60] == ["start", "ready", "exit"] * 20


def test_last_words_behind_other_news(superd: Superd) -> None:  # I13
    """The keeper's word of the exit is read first, and still READY=1 comes before it."""
    first, second = Gate(superd, "first"), Gate(superd, "second")
    service(superd, f"say('up'); gate({first!r})", name="other", ready="start", restart="no")
    service(superd, f"say('up'); gate({second!r}); notify(b'READY=1')", restart="no")
    superd.start()
    superd.wait_records(2, event="output", message="up")
    pids = {name: superd.status(name)["pid"] for name in ("other", "s")}
    manager = superd.manager
    os.kill(manager, signal.SIGSTOP)
    try:
        for gate, name in ((first, "other"), (second, "s")):
            gate.open()
            wait_gone(pids[name])
            eventually(lambda name=name: Path(f"/proc/{pids[name]}").exists(), False)  # type: ignore[misc]
    finally:
        os.kill(manager, signal.SIGCONT)
    superd.wait_record(event="exit", service="s", status=0)
    found = [record["event"] for record in superd.find_records(service="s", event=re.compile("^(ready|exit)$"))]
    assert found == ["ready", "exit"]


def test_socket_is_the_service_users(superd: Superd, root: None) -> None:  # I14
    shell(superd, "echo $NOTIFY_SOCKET; exec sleep 1000", user="nobody")
    superd.start()
    path = Path(superd.wait_record(event="output", service="s")["message"])
    found = path.stat()
    assert stat.S_ISSOCK(found.st_mode) and found.st_mode & 0o777 == 0o600 and found.st_uid == 65534
    assert path.parent.stat().st_mode & 0o777 == 0o711 and path.parent.stat().st_uid == 0
    pid = os.fork()
    if pid == 0:
        try:
            os.setgroups([])
            os.setgid(1)
            os.setuid(1)
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
                sock.connect(str(path))
        except PermissionError:
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


@pytest.mark.quiet  # other tests' programs may send no fd meanwhile
def test_descriptors_are_closed(superd: Superd) -> None:  # I7 I4
    """What comes along with messages is not kept: not one fd more, however many were sent."""
    code = (
        "with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:\n"
        "    sock.connect(os.environ['NOTIFY_SOCKET'])\n"
        "    for _ in range(100):\n"
        "        while True:\n"
        "            try: socket.send_fds(sock, [b'FDSTORE=1'], [0] * 250); break\n"
        "            except OSError as error: assert error.errno == 109\n"  # ETOOMANYREFS, as below
        "notify(b'READY=1'); time.sleep(1000)"
    )
    service(superd, code)
    superd.start()
    superd.wait_record(event="ready", service="s")
    assert sum(len(names) for names in superd.descriptors()["superd-manager"]) < 40


def test_no_ready_in_time(superd: Superd) -> None:
    shell(superd, "exec sleep 1000", ready_timeout="200ms", restart_limit="1/1m", restart_delay="1ms")
    superd.start()
    superd.wait_record(service="s", message=re.compile("no READY=1 within 0.2 s; stopping it"))
    superd.wait_record(service="s", message=re.compile("giving up"))
    assert superd.status("s")["state"] == "failed"


def test_superd_tells_its_own_manager(superd: Superd) -> None:  # P5
    """READY=1 when all is bound, STOPPING=1 at the end; the variable does not get to services."""
    superd.write("s", toml(listen="tcp:127.0.0.1:0", command=["/usr/bin/env"]))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.settimeout(20)
        sock.bind(str(superd.dir / "notify.sock"))
        superd.start(environment={**os.environ, "NOTIFY_SOCKET": str(superd.dir / "notify.sock")})
        assert b"READY=1" in sock.recv(4096).split(b"\n")
        with superd.connect("s") as client:
            text = b""
            while part := client.recv(4096):
                text += part
        assert b"NOTIFY_SOCKET" not in text and b"PATH=" in text
        superd.stop()
        assert b"STOPPING=1" in sock.recv(4096).split(b"\n")


# --- whose and how many


def test_what_does_not_count_is_counted(superd: Superd) -> None:
    gate = Gate(superd)
    service(superd, f"notify(b'', b'nonsense', b'BARRIER=1', b'READY=1'); gate({gate!r})")
    superd.start()
    superd.wait_record(event="ready", service="s")
    assert details(superd)["ignored"] == 3
    assert superd.find_records(level="warning", message=re.compile("ignored a notify message: no VARIABLE=VALUE"))


def test_an_error_of_the_socket_does_not_end_it(superd: Superd, require: Require, root: None) -> None:  # I2
    gate = Gate(superd)
    service(superd, f"say('up'); gate({gate!r}); notify(b'READY=1'); time.sleep(1000)")
    superd.start()
    superd.wait_record(event="output", message="up")
    pid = superd.manager
    with injected(require("strace"), pid, "recvmsg:error=EIO:when=1..3"):
        gate.open()
        superd.wait_record(event="ready", service="s")
    assert superd.manager == pid


@pytest.mark.quiet
def test_fd_stuffing(superd: Superd) -> None:  # I7 X24
    """1,000 messages with 250 fds each, wanted by nobody: not one more afterwards, in the manager or the keeper."""
    gate = Gate(superd)
    stuff = (
        "\nfor _ in range(1000):\n"
        "    while True:\n"
        "        try: notify(b'FDSTORE=1', fds=[0] * 250); break\n"
        "        except OSError as error: assert error.errno == 109\n"  # ETOOMANYREFS: its RLIMIT_NOFILE are in flight
    )
    service(superd, f"notify(b'READY=1'); gate({gate!r}); {stuff}say('done'); notify(b'STATUS=read'); time.sleep(1000)")
    superd.start()
    superd.wait_record(event="ready", service="s")
    before = superd.descriptors()
    gate.open()
    superd.wait_record(event="output", message="done")
    eventually(lambda: details(superd)["said"], "read")
    eventually(superd.descriptors, before)


def test_one_clean_line(superd: Superd) -> None:  # I8
    gate = Gate(superd)
    messages = [b"READY=1", b"STATUS=a\x1b[31m\xff\r" + b"x" * 4000]
    service(superd, f"notify(*{messages!r}); notify(b'STATUS=' + b'y' * 4096); gate({gate!r})")
    superd.start()
    superd.wait_record(event="ready", service="s")
    eventually(lambda: str(details(superd)["said"])[:18], "a\\x1b[31m\ufffd\\r" + "x" * 6)
    said = str(details(superd)["said"])
    assert said.isprintable() and len(said) < 1100


def test_a_stalled_manager(superd: Superd, build: Callable[..., str]) -> None:  # I10
    """30 services that say more than their sockets hold while the manager is stopped: all are ready when it goes on."""
    program = build("sd_notifier.c", "-lsystemd")
    gate = Gate(superd)
    for i in range(30):
        command = [program, "print", "up", "read", gate, "print", "go", "many", "30", "STATUS=x", "notify", "READY=1"]
        superd.write(f"s{i}", toml(run="always-on", ready="notify", command=[*map(str, command), "pause"]))
    superd.start()
    superd.wait_records(30, event="output", message="up")
    manager = superd.manager
    running = superd.services()
    os.kill(manager, signal.SIGSTOP)
    try:
        gate.open()
        # The eleventh message waits for a reader: all of them stand in sendmsg(2).
        eventually(lambda: {Path(f"/proc/{pid}/wchan").read_text() for pid in running}, {"unix_wait_for_peer"})
    finally:
        os.kill(manager, signal.SIGCONT)
    superd.wait_records(30, event="ready")
    assert superd.manager == manager


def test_a_flooder_does_not_starve_others(superd: Superd, build: Callable[..., str]) -> None:  # I11
    program = build("sd_notifier.c", "-lsystemd")
    flood = [program, "notify", "READY=1", "flood", "STATUS=again"]
    superd.write("flood", toml(run="always-on", ready="notify", command=flood, stop_timeout="1s"))
    gate = Gate(superd)
    quiet = [program, "print", "up", "read", str(gate), "notify", "READY=1", "pause"]
    superd.write("quiet", toml(run="always-on", ready="notify", command=quiet))
    superd.start()
    superd.wait_record(event="ready", service="flood")
    superd.wait_record(event="output", message="up")
    began = time.monotonic()
    gate.open()
    superd.wait_record(event="ready", service="quiet")
    assert time.monotonic() - began < 1.0
    assert superd.status("flood")["state"] == "ready"


def test_access_changes_at_run_time(superd: Superd) -> None:  # I12
    """systemd's TEST-80-NOTIFYACCESS: each word decides about what comes after it."""
    child = (
        "def other(*messages):\n    if not (pid := os.fork()): notify(*messages); os._exit(0)\n    os.waitpid(pid, 0)\n"
    )
    code = child + (
        "other(b'STATUS=all, a child'); say('1'); gate(A)\n"
        "notify(b'NOTIFYACCESS=main', b'STATUS=main'); other(b'STATUS=BOGUS'); say('2'); gate(B)\n"
        "notify(b'NOTIFYACCESS=nonsense', b'NOTIFYACCESS=exec', b'STATUS=exec'); other(b'STATUS=BOGUS'); say('3')\n"
        "gate(C); notify(b'NOTIFYACCESS=all'); other(b'STATUS=all again\\nREADY=1'); say('4'); gate(D)\n"
        "notify(b'NOTIFYACCESS=none', b'STATUS=BOGUS', b'NOTIFYACCESS=all', b'STATUS=BOGUS'); say('5'); gate(E)\n"
    )
    gates = [Gate(superd, name) for name in "ABCDE"]
    for gate in gates:
        code = code.replace(f"gate({gate.path.name})", f"gate({gate!r})")
    service(superd, code, notify_access="all")
    superd.start()
    said = []
    for number, gate in enumerate(gates, 1):
        superd.wait_record(event="output", message=str(number))
        said.append(details(superd)["said"])
        if number < 5:
            gate.open()
    assert said == ["all, a child", "main", "exec", "all again", "all again"]
    assert superd.status("s")["state"] == "ready"


@pytest.mark.parametrize(
    ("keys", "has"),
    [({}, False), ({"notify_access": "main"}, True), ({"notify_access": "none"}, False), ({"watchdog": "1h"}, True),
     ({"fdstore": 1}, True), ({"ready": "notify"}, True)],
    ids=str,
)  # fmt: skip
def test_who_has_a_socket(superd: Superd, keys: dict[str, object], has: bool) -> None:
    """Only who asks for one, in whatever way; FDSTORE and WATCHDOG_* where they apply."""
    superd.write("s", toml(run="always-on", restart="no", command=["/usr/bin/env"], **keys))
    superd.start(environment={**os.environ, "NOTIFY_SOCKET": "/nonexistent", "FDSTORE": "7", "WATCHDOG_USEC": "7"})
    superd.wait_record(event="exit", service="s")
    names = {record["message"].partition("=")[0] for record in superd.find_records(event="output", service="s")}
    wanted = {"NOTIFY_SOCKET": has, "FDSTORE": "fdstore" in keys, "WATCHDOG_USEC": "watchdog" in keys}
    assert {name: name in names for name in wanted} == wanted


def test_a_foreign_sender(superd: Superd, root: None) -> None:  # I5
    """Root may write to every socket; a process outside the service does not count, whatever it says."""
    service(superd, "notify(b'READY=1'); say(os.environ['NOTIFY_SOCKET']); time.sleep(1000)", notify_access="all")
    superd.start()
    path = superd.wait_record(event="output", service="s")["message"]
    superd.wait_record(event="ready", service="s")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.connect(path)
        sock.send(b"STATUS=foreign")
    eventually(lambda: (details(superd)["ignored"], details(superd)["said"]), (1, ""))


# --- the fields


def test_stopping(superd: Superd) -> None:
    """STOPPING=1 beats what comes along; there is no signal, but stop_timeout runs, and the policy decides."""
    code = "signal.signal(signal.SIGTERM, lambda *_: say('TERM'))\nnotify(b'READY=1'); gate(GATE)\n"
    code += "notify(b'READY=1\\nSTOPPING=1\\nRELOADING=1'); say('said'); time.sleep(1000)"
    gate = Gate(superd)
    service(superd, code.replace("GATE", repr(gate)), stop_timeout="300ms", restart_delay="1ms")
    superd.start()
    superd.wait_record(event="ready", service="s")
    gate.open()
    superd.wait_record(event="output", message="said")
    assert superd.status("s")["state"] == "stopping"
    superd.wait_record(service="s", message=re.compile("did not stop within 0.3 s; killing it"))
    superd.wait_records(2, event="ready", service="s")
    assert not superd.find_records(event="output", message="TERM")


def test_reloading(superd: Superd) -> None:
    """From RELOADING=1 to READY=1 it is reloading, and ready all the time."""
    gates = [Gate(superd, name) for name in "ABC"]
    code = (
        "now = b'MONOTONIC_USEC=%d' % (time.monotonic_ns() // 1000)\n"
        "notify(b'READY=1'); gate(A); notify(b'RELOADING=1\\n' + now, b'STATUS=at it'); say('1'); gate(B)\n"
        "notify(b'READY=1'); say('2'); gate(C)"
    )
    for gate in gates:
        code = code.replace(f"gate({gate.path.name})", f"gate({gate!r})")
    service(superd, code)
    superd.start()
    superd.wait_record(event="ready", service="s")
    gates[0].open()
    superd.wait_record(event="output", message="1")
    row = superd.status("s")
    assert (row["state"], row["note"]) == ("ready", "reloading")
    superd.kill_role("superd-manager")  # the next one knows it too
    superd.wait_record(message=re.compile("manager 2 took over"))
    assert superd.status("s")["note"] == "reloading"
    gates[1].open()
    superd.wait_record(event="reload", service="s")
    row = superd.status("s")
    assert (row["state"], row["note"]) == ("ready", "")


def test_errors(superd: Superd) -> None:
    words = b"READY=1\nERRNO=2\nBUSERROR=org.x.E\nVARLINKERROR=io.x\nEXIT_STATUS=3"
    service(superd, f"notify({words!r}); gate({Gate(superd)!r})")
    superd.start()
    superd.wait_record(service="s", message="says ERRNO=2: no such file or directory")
    assert details(superd)["errors"] == ["ERRNO=2", "BUSERROR=org.x.E", "VARLINKERROR=io.x"]
    assert superd.status("s")["state"] == "ready"


def test_extend_timeout(superd: Superd) -> None:
    """systemd's TEST-16-EXTEND-TIMEOUT: it lives as long as each word comes before the last one's time is over."""
    slow = "for _ in range(10): notify(b'EXTEND_TIMEOUT_USEC=900000'); select.select([], [], [], 0.1)\n"
    service(superd, slow + "notify(b'READY=1'); time.sleep(1000)", name="start", ready_timeout="700ms")
    service(superd, "notify(b'EXTEND_TIMEOUT_USEC=1200000'); time.sleep(1000)", name="late", ready_timeout="700ms",
            restart="no")  # fmt: skip
    stop = f"def end(*_):\n    {slow.replace(chr(10), '')}\n    say('ended well'); os._exit(0)\n"
    service(superd, stop + "signal.signal(15, end); notify(b'READY=1'); time.sleep(1000)", name="stop",
            stop_timeout="700ms")  # fmt: skip
    bad = "notify(*[b'EXTEND_TIMEOUT_USEC=' + v for v in (b'-1', b'x', b'1' + b'0' * 30, b'')]); time.sleep(1000)"
    service(superd, bad, name="bad", ready_timeout="200ms", restart="no")
    superd.start()
    superd.wait_record(event="ready", service="start")
    superd.wait_record(event="ready", service="stop")
    superd.call("Stop", names=["stop"])
    superd.wait_record(event="output", message="ended well")
    assert superd.wait_record(event="exit", service="late")["duration"] >= 1.2
    assert superd.wait_record(event="exit", service="bad")["duration"] < 10
    assert superd.status("start")["state"] == "ready"
    assert not superd.find_records(service="stop", message=re.compile("killing"))


def test_restart_reset(superd: Superd) -> None:
    """A service that says so begins with the first delay, and all its tries, each time."""
    service(superd, "notify(b'READY=1\\nRESTART_RESET=1'); sys.exit(1)", restart="always", restart_delay="10ms",
            restart_delay_max="1h", restart_limit="3/1h")  # fmt: skip
    superd.start()
    superd.wait_records(8, event="exit", service="s", status=1)
    assert superd.status("s")["state"] != "failed"


# --- the main process


MAIN = (
    "child = os.fork()\n"
    "if not child:\n"
    "    os.setsid(); os.environ.clear(); time.sleep(1000)\n"
)  # fmt: skip


def test_main_pid_must_be_one_of_the_service(superd: Superd) -> None:  # I6
    """systemd's TEST-07-PID1.main-PID-change, the bad values: the main process stays what it was."""
    superd.write("other", toml(run="always-on", command=["/bin/sleep", "1000"]))
    gate = Gate(superd)
    gone = "gone = os.fork()\nif not gone: os._exit(0)\nos.waitpid(gone, 0)\n"
    send = (
        "notify(b'READY=1'); say('up')\nwith open(GATE) as file: pids = file.read().split()\n"
        "for pid in [*pids, '0', '1', '-1', '', 'x', str(gone), str(2**30), '1' + '0' * 30, str(os.getppid())]:\n"
        "    notify(b'MAINPID=' + pid.encode())\n"
        "say('sent'); time.sleep(1000)"
    )
    service(superd, gone + send.replace("GATE", repr(gate)))
    superd.start()
    superd.wait_record(event="output", message="up")
    other = superd.status("other")["pid"]
    before = superd.status("s")["pid"]
    gate.path.write_text(f"{os.getpid()} {other} {superd.manager}")
    superd.wait_record(event="output", message="sent")
    eventually(lambda: details(superd)["ignored"], 12)
    assert superd.status("s")["pid"] == before
    superd.call("Stop", names=["s"])
    assert superd.status("other")["pid"] == other


def test_the_named_main_process_decides(superd: Superd) -> None:
    """A daemon as they used to be: the first process goes, the one it has named lives on, and its end is the end."""
    code = MAIN + "notify(b'MAINPID=%d\\nREADY=1\\nSTATUS=%d' % (child, child))"
    service(superd, code, restart_delay="1ms")
    superd.start()
    superd.wait_record(event="ready", service="s")
    first = int(str(details(superd)["said"]))
    eventually(lambda: superd.services(), [first])
    assert (superd.status("s")["pid"], superd.status("s")["state"]) == (first, "ready")
    superd.kill_role("superd-manager")  # and it stays so
    superd.wait_record(message=re.compile("manager 2 took over"))
    assert (superd.status("s")["pid"], superd.status("s")["state"]) == (first, "ready")
    os.kill(first, signal.SIGKILL)
    assert superd.wait_record(event="exit", service="s")["pid"] == first
    assert superd.find_records(event="exit", service="s")[0]["signal"] == "KILL"
    superd.wait_records(2, event="ready", service="s")
    second = superd.status("s")["pid"]
    assert second != first
    superd.call("Stop", names=["s"])
    wait_gone(second)
    assert superd.status("s")["state"] == "stopped" and not superd.services()


@pytest.mark.parametrize("kill_mode", ["tree", "group", "process"])
def test_a_named_child_of_a_living_parent(superd: Superd, kill_mode: str) -> None:
    """Its parent reaps it, and superd knows all the same when it has ended, and how."""
    code = (
        MAIN.replace("os.setsid(); ", "")
        + "notify(b'READY=1\\nMAINPID=%d' % child); os.waitpid(child, 0); say('reaped')\n"
    )
    service(superd, code + "time.sleep(1000)", restart="no", kill_mode=kill_mode)
    superd.start()
    superd.wait_record(event="ready", service="s")
    child = superd.status("s")["pid"]
    parent = superd.wait_record(event="start", service="s")["pid"]
    assert child in descendants(parent)
    superd.call("Kill", names=["s"], signal="INT" if kill_mode == "process" else "USR1")
    exit_ = superd.wait_record(event="exit", service="s")
    assert (exit_["pid"], exit_["signal"]) == (child, "INT" if kill_mode == "process" else "USR1")
    if kill_mode == "tree":
        eventually(lambda: superd.services(), [])


def test_back_to_the_first_main_process(superd: Superd) -> None:
    code = MAIN + "notify(b'READY=1\\nMAINPID=%d' % child); gate(GATE); notify(b'MAINPID=%d' % os.getpid())\n"
    gate = Gate(superd)
    service(superd, code.replace("GATE", repr(gate)) + "time.sleep(1000)", notify_access="all")
    superd.start()
    superd.wait_record(event="ready", service="s")
    parent = superd.wait_record(event="start", service="s")["pid"]
    child = superd.status("s")["pid"]
    assert child != parent
    gate.open()
    eventually(lambda: superd.status("s")["pid"], parent)
    os.kill(child, signal.SIGKILL)
    wait_gone(child)
    assert superd.status("s")["state"] == "ready"
    superd.call("Stop", names=["s"])
    assert superd.wait_record(event="exit", service="s")["pid"] == parent


@pytest.mark.parametrize("right", [True, False])
def test_main_process_by_pidfd(superd: Superd, right: bool) -> None:
    """MAINPIDFD=1 with a pidfd; MAINPIDFDID= of another process than the one that has the pid by now."""
    code = MAIN + "fd = os.pidfd_open(child)\n"
    if right:
        code += "notify(b'READY=1\\nMAINPIDFD=1', fds=[fd])\n"
    else:
        code += "notify(b'READY=1\\nMAINPID=%d\\nMAINPIDFDID=%d' % (child, os.fstat(fd).st_ino + 1))\n"
    service(superd, code + "say(str(child)); time.sleep(1000)")
    superd.start()
    superd.wait_record(event="ready", service="s")
    child = int(superd.wait_record(event="output", service="s")["message"])
    assert (superd.status("s")["pid"] == child) is right


# --- towards superd's own manager


def test_what_superd_tells_its_own_manager(superd: Superd) -> None:  # P5
    """WATCHDOG=1 twice in a period, STATUS= when a service has failed, EXIT_STATUS= at the end."""
    superd.write("bad", toml(run="always-on", command=["/bin/false"], restart="no"))
    superd.write("env", toml(run="always-on", command=["/usr/bin/env"], restart="no"))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.settimeout(20)
        sock.bind(str(superd.dir / "notify.sock"))
        superd.start(
            environment={**os.environ, "NOTIFY_SOCKET": str(superd.dir / "notify.sock"), "WATCHDOG_USEC": "200000"}
        )
        lines: list[str] = []

        def until(line: str) -> None:
            while line not in lines:
                lines.extend(sock.recv(4096).decode().split("\n"))

        until("READY=1")
        until("STATUS=ready: 2 services, 0 sockets; failed: bad")
        superd.call("Stop", names=["bad"])
        lines.clear()
        until("STATUS=ready: 2 services, 0 sockets")
        lines.clear()
        manager = superd.manager
        os.kill(manager, signal.SIGSTOP)  # who hangs says nothing
        try:
            while select.select([sock], [], [], 0.5)[0]:
                sock.recv(4096)
        finally:
            os.kill(manager, signal.SIGCONT)
        until("WATCHDOG=1")
        superd.stop()
        until("EXIT_STATUS=0")
        assert "STOPPING=1" in lines
    assert not superd.find_records(event="output", message=re.compile("NOTIFY_SOCKET|WATCHDOG"))


def test_a_watchdog_that_cannot_be_satisfied(superd: Superd) -> None:
    """A microsecond is no reason to do nothing else."""
    superd.start(environment={**os.environ, "NOTIFY_SOCKET": "/nonexistent", "WATCHDOG_USEC": "1"})
    assert superd.call("List")["services"] == []


def test_a_watchdog_that_means_another_process(superd: Superd) -> None:
    """WATCHDOG_PID of somebody else: superd was not asked."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.settimeout(20)
        sock.bind(str(superd.dir / "notify.sock"))
        path = str(superd.dir / "notify.sock")
        superd.start(environment={**os.environ, "NOTIFY_SOCKET": path, "WATCHDOG_USEC": "1000", "WATCHDOG_PID": "1"})
        assert b"READY=1" in sock.recv(4096)
        superd.stop()
        assert sock.recv(4096) == b"STOPPING=1"
