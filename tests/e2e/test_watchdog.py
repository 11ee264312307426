"""WATCHDOG=1 in time, or an end by ABRT: with the real daemon, and with libsystemd on the other side."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from harness import Superd, eventually, toml, wait_gone
from notifying import Gate, details, service

Build = Callable[..., str]
PING = "while True: notify(b'WATCHDOG=1'); select.select([], [], [], 0.1)\n"
EXPIRED = re.compile(r"no WATCHDOG=1 within [0-9.]+ s; sending ABRT")


def test_what_it_is_told(superd: Superd, build: Build) -> None:
    """sd_watchdog_enabled(3) of the process itself says yes with the time, that of a child says no."""
    program = build("sd_notifier.c", "-lsystemd")
    command = [program, "notify", "READY=1", "watchdog", "child", "watchdog", "pause"]
    superd.write("s", toml(run="always-on", ready="notify", watchdog="1h30m", command=command, kill_mode="tree"))
    without = [program, "notify", "READY=1", "watchdog", "pause"]
    superd.write("none", toml(run="always-on", ready="notify", command=without))
    superd.start(environment={**os.environ, "WATCHDOG_USEC": "7", "WATCHDOG_PID": "1"})
    found = superd.wait_records(2, event="output", service="s")
    assert [record["message"] for record in found] == ["watchdog 1 5400000000", "watchdog 0 0"]
    assert superd.wait_record(event="output", service="none")["message"] == "watchdog 0 0"


def test_one_that_pings_lives(superd: Superd) -> None:
    """Through three periods, and a whole new one when there is a new manager."""
    gate = Gate(superd)
    pings = "def pings(n):\n    for _ in range(n): notify(b'WATCHDOG=1'); select.select([], [], [], 0.1)\n"
    code = pings + f"notify(b'READY=1'); pings(24); say('24'); gate({gate!r}); pings(4); say('28'); time.sleep(1000)"
    service(superd, code, watchdog="800ms", restart="no")
    superd.start()
    superd.wait_record(event="output", message="24")
    superd.kill_role("superd-manager")
    gate.open()
    superd.wait_record(event="output", message="28")
    assert not superd.find_records(message=EXPIRED)
    superd.wait_record(service="s", message=EXPIRED)
    assert superd.wait_record(event="exit", service="s")["signal"] == "ABRT"


@pytest.mark.parametrize(
    ("policy", "again"),
    [("no", False), ("on-success", False), ("on-abort", False), ("on-watchdog", True), ("on-abnormal", True),
     ("on-failure", True), ("always", True)],
)  # fmt: skip
def test_policy(superd: Superd, policy: str, again: bool) -> None:
    """One that hangs (it is stopped) gets ABRT, and `restart` decides, even if it makes that a clean end."""
    code = "signal.signal(signal.SIGABRT, lambda *_: os._exit(0)); notify(b'READY=1')\n"
    service(
        superd,
        code + "os.kill(os.getpid(), signal.SIGSTOP); time.sleep(1000)",
        watchdog="100ms",
        restart=policy,
        restart_delay="1ms",
    )
    superd.start()
    superd.wait_record(service="s", message="no WATCHDOG=1 within 0.1 s; sending ABRT")
    assert superd.wait_record(event="exit", service="s")["status"] == 0
    if again:
        superd.wait_records(2, event="ready", service="s")
    else:
        eventually(lambda: superd.status("s")["state"], "failed")
        assert "no WATCHDOG=1 within 0.1 s" in superd.status("s")["note"]


def test_one_that_does_not_end_is_killed(superd: Superd) -> None:
    code = "signal.signal(signal.SIGABRT, signal.SIG_IGN); notify(b'READY=1')\ntime.sleep(1000)"
    service(superd, code, watchdog="100ms", stop_timeout="200ms", restart="no")
    superd.start()
    superd.wait_record(service="s", message=re.compile("did not stop within 0.2 s; killing it"))
    assert superd.wait_record(event="exit", service="s")["signal"] == "KILL"


def test_only_the_main_process_gets_abrt(superd: Superd) -> None:
    code = (
        "if not os.fork():\n"
        "    signal.signal(signal.SIGABRT, lambda *_: say('child: ABRT'))\n"
        "    signal.signal(signal.SIGTERM, lambda *_: (say('child: TERM'), os._exit(0)))\n"
        "    notify(b'READY=1')\n"
        "    while True: signal.pause()\n"
        "signal.signal(signal.SIGABRT, lambda *_: os._exit(0))\n"
        "while True: signal.pause()\n"
    )
    service(superd, code, watchdog="200ms", restart="no", notify_access="all")
    superd.start()
    superd.wait_record(event="output", message="child: TERM")
    assert not superd.find_records(event="output", message="child: ABRT")


def test_trigger(superd: Superd) -> None:
    """WATCHDOG=trigger is the same at once, also without `watchdog`."""
    service(
        superd, "notify(b'READY=1\\nWATCHDOG=trigger'); time.sleep(1000)", restart="on-watchdog", restart_delay="1ms"
    )
    superd.start()
    superd.wait_record(service="s", message="it says WATCHDOG=trigger; sending ABRT")
    assert superd.wait_record(event="exit", service="s")["signal"] == "ABRT"
    superd.wait_records(2, event="start", service="s")


def test_the_time_changes_at_run_time(superd: Superd) -> None:
    """WATCHDOG_USEC= of the service counts from then on, 0 ends it, nonsense is passed over."""
    nonsense = "notify(*[b'WATCHDOG_USEC=' + v for v in (b'-1', b'', b'x', b'1' + b'0' * 30)]); "
    service(superd, nonsense + "notify(b'READY=1', b'WATCHDOG_USEC=150000'); time.sleep(1000)", name="sooner",
            watchdog="1h", restart="no")  # fmt: skip
    service(superd, "notify(b'WATCHDOG_USEC=150000', b'READY=1'); time.sleep(1000)", name="new", restart="no")
    off = "notify(b'READY=1\\nWATCHDOG_USEC=0'); notify(b'WATCHDOG=1'); "
    service(superd, off + "notify(b'WATCHDOG_USEC=18446744073709551615'); time.sleep(1000)", name="off",
            watchdog="200ms")  # fmt: skip
    superd.start()
    superd.wait_record(event="ready", service="off")
    for name in ("sooner", "new"):
        superd.wait_record(service=name, message="no WATCHDOG=1 within 0.15 s; sending ABRT")
    assert details(superd, "sooner")["ignored"] == 4
    assert superd.status("off")["state"] == "ready"


def test_a_superd_that_was_stopped_reads_before_it_judges(superd: Superd) -> None:  # X30 X8
    """The period is long over when superd has time again; the pings are in the socket."""
    service(superd, "notify(b'READY=1')\n" + PING, watchdog="400ms", restart="no")
    superd.start()
    superd.wait_record(event="ready", service="s")
    pid = superd.status("s")["pid"]
    manager = superd.manager
    os.kill(manager, signal.SIGSTOP)
    try:
        # Twelve pings later, 1.2 s, the socket is full and the service waits.
        eventually(lambda: Path(f"/proc/{pid}/wchan").read_text(), "unix_wait_for_peer")
    finally:
        os.kill(manager, signal.SIGCONT)
    superd.status("s")
    mark = superd.mark()
    superd.kill_role("superd-manager")
    superd.wait_record(after=mark, message=re.compile("took over"))
    assert superd.status("s")["pid"] == pid
    assert not superd.find_records(message=EXPIRED)


def test_a_manager_that_dies_meanwhile(superd: Superd) -> None:
    """The next one ends what hangs after a full new period, and knows why it is ending what the last one aborted."""
    code = "signal.signal(signal.SIGABRT, signal.SIG_IGN); notify(b'READY=1'); say('up'); time.sleep(1000)"
    service(superd, code, watchdog="500ms", stop_timeout="1s", restart="on-watchdog", restart_delay="1ms")
    superd.start()
    superd.wait_record(event="output", message="up")
    superd.kill_role("superd-manager")
    superd.wait_record(service="s", message=EXPIRED)
    superd.kill_role("superd-manager")
    assert superd.wait_record(event="exit", service="s")["signal"] == "KILL"
    superd.wait_records(2, event="start", service="s")


def test_a_main_process_that_was_named(superd: Superd) -> None:
    """ABRT goes to the process that MAINPID= names."""
    code = (
        "child = os.fork()\nif not child:\n    os.setsid(); time.sleep(1000)\nnotify(b'MAINPID=%d\\nREADY=1' % child)\n"
    )
    service(superd, code, watchdog="300ms", restart="no")
    superd.start()
    superd.wait_record(event="ready", service="s")
    pid = superd.status("s")["pid"]
    found = superd.wait_record(event="exit", service="s")
    assert (found["pid"], found["signal"]) == (pid, "ABRT")
    wait_gone(pid)
