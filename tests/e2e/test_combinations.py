"""What one part of a service's life does to another: readiness, time limits, stored fds, dependencies, reloads."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from harness import TIMEOUT_S, Superd, eventually
from notifying import Gate, details, service

STAYS = "notify(b'READY=1')\nwhile True: time.sleep(1000)\n"


def test_more_time_to_stop_in_the_word_that_begins_it(superd: Superd) -> None:
    """STOPPING=1 and EXTEND_TIMEOUT_USEC= in one message: the time is the stop's."""
    code = (
        "notify(b'READY=1'); notify(b'STOPPING=1\\nEXTEND_TIMEOUT_USEC=20000000')\n"
        "select.select([], [], [], 1.0); say('ended well')"
    )
    service(superd, code, stop_timeout="300ms", restart="no")
    superd.start()
    superd.wait_record(event="exit", service="s", status=0)
    assert superd.find_records(event="output", message="ended well")


def test_more_time_to_run(superd: Superd) -> None:
    """EXTEND_TIMEOUT_USEC= of a service that is ready moves max_runtime, as systemd's RuntimeMaxSec=."""
    service(superd, "notify(b'READY=1\\nEXTEND_TIMEOUT_USEC=1500000')\nwhile True: time.sleep(1000)", restart="no",
            limits={"max_runtime": "300ms"})  # fmt: skip
    superd.start()
    row = superd.wait_record(event="exit", service="s")
    assert 1.5 <= row["duration"] < 10
    assert "max_runtime" in superd.status("s")["note"]


def test_more_time_outlives_the_manager(superd: Superd) -> None:  # X7
    """What a process was granted, the next manager grants it."""
    gate = Gate(superd)
    service(superd, f"notify(b'EXTEND_TIMEOUT_USEC=60000000'); say('asked'); gate({gate!r}); {STAYS}",
            ready_timeout="200ms", restart="no")  # fmt: skip
    superd.start()
    superd.wait_record(event="output", message="asked")
    pid = superd.status("s")["pid"]
    for number in (2, 3):
        superd.kill_role("superd-manager")
        superd.wait_record(message=re.compile(f"manager {number} took over"))
    assert (superd.status("s")["state"], superd.status("s")["pid"]) == ("starting", pid)
    gate.open()
    superd.wait_record(event="ready", service="s")
    assert superd.status("s")["pid"] == pid


def test_a_restart_that_waits_for_another_keeps_what_is_stored(superd: Superd) -> None:
    """The service's requirement restarts with it, and is ready later: what it has stored is given back all the same."""
    names = "print('given', os.environ.get('LISTEN_FDNAMES', '-'), flush=True)\n"
    store = "notify(b'FDSTORE=1\\nFDNAME=kept', fds=[os.memfd_create('x')])\n"
    service(superd, "select.select([], [], [], 0.3)\n" + STAYS, name="base")
    service(superd, names + store + STAYS, fdstore=5, requires=["base"])
    superd.start()
    superd.wait_for("s", "ready")
    eventually(lambda: details(superd)["stored"], 1)
    assert superd.call("Restart", names=["base"])["results"][0]["ok"]
    superd.wait_for("s", "ready")
    given = [row["message"] for row in superd.find_records(event="output", service="s")]
    assert given == ["given -", "given kept"]
    assert superd.call("Stop", names=["s"])["results"][0]["ok"]
    assert details(superd)["stored"] == 0


RELOADS = """
def again(*_):
    notify(b'RELOADING=1\\nMONOTONIC_USEC=%d' % (time.monotonic_ns() // 1000))
    gate({gate!r})
    {end}
signal.signal(signal.SIGHUP, again)
"""


def reload_service(superd: Superd) -> dict[str, Any]:
    result: dict[str, Any] = superd.call("ReloadService", names=["s"])["results"][0]
    return result


def test_reload_service_waits(superd: Superd) -> None:
    """For READY=1 after RELOADING=1, as long as that takes; the process that was there is there."""
    gate = Gate(superd)
    service(superd, RELOADS.format(gate=str(gate), end="notify(b'READY=1')") + STAYS)
    superd.start()
    superd.wait_for("s", "ready")
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(reload_service, superd)
        eventually(lambda: superd.status("s")["note"], "reloading")
        with pytest.raises(TimeoutError):
            answer.result(0.5)
        gate.open()
        result = answer.result(TIMEOUT_S)
    assert result["ok"] and result["took"] > 0.3, result
    assert superd.find_records(event="reload", service="s")
    assert len(superd.find_records(event="start", service="s")) == 1


@pytest.mark.parametrize("how", ["never", "dies", "stops", "deaf"])
def test_reload_service_fails(superd: Superd, how: str) -> None:
    """No READY=1 in time, or an end meanwhile: that is the answer. One that says nothing at all only has to live."""
    end = {"never": "", "dies": "os._exit(3)", "stops": "notify(b'STOPPING=1')", "deaf": ""}[how]
    code = RELOADS.format(gate="/dev/null", end=end)
    service(superd, (code if how != "deaf" else "signal.signal(signal.SIGHUP, lambda *_: None)\n") + STAYS,
            ready_timeout="700ms", restart="no")  # fmt: skip
    superd.start()
    superd.wait_for("s", "ready")
    result = reload_service(superd)
    assert result["ok"] == (how == "deaf")
    if how == "never":
        assert result["note"] == "no READY=1 within 0.7 s after RELOADING=1" and result["state"] == "ready"
        assert result["took"] >= 0.7
    if how == "dies":
        assert "status 3" in result["note"]


@pytest.mark.parametrize("how", ["restart", "add"])
def test_asked_for_while_its_requirement_is_being_stopped(superd: Superd, how: str) -> None:  # G13
    """Who asks last is right: what it requires comes up again, and it does."""
    slow = "signal.signal(15, lambda *_: (select.select([], [], [], 0.5), os._exit(0)))\n"
    service(superd, slow + STAYS, name="base")
    service(superd, slow + STAYS, requires=["base"], enabled=how != "add")
    superd.start("--no-watch")
    superd.wait_for("s" if how != "add" else "base", "ready")
    superd.call("Stop", names=["base"], wait=False)
    if how == "restart":
        assert superd.call("Restart", names=["s"])["results"][0]["ok"]
    else:
        service(superd, slow + STAYS, requires=["base"])
        superd.call("Reload")
    superd.wait_for("s", "ready")
    assert superd.status("base")["state"] == "ready"


def test_a_start_during_start_pre_without_its_requirement(superd: Superd) -> None:
    """It is under way already: nothing waits, and nothing breaks."""
    gate = Gate(superd)
    service(superd, STAYS, name="base", restart_delay="30s")
    service(superd, STAYS, requires=["base"], start_pre=[["/bin/cat", str(gate)]])
    superd.start()
    superd.wait_for("base", "ready")
    eventually(lambda: superd.status("s")["pid"] is not None, True)
    superd.call("Kill", names=["base"], signal="KILL")
    superd.wait_record(service="base", message=re.compile("trying again in 30.0 s"))
    assert superd.call("Start", names=["s"], wait=False)["results"][0]["ok"]
    gate.open()
    superd.wait_for("s", "ready")


BIND = "path = '{room}/up'; os.path.exists(path) and os.unlink(path); s = socket.socket(socket.AF_UNIX); s.bind(path)"
UP = {
    "start": "", "notify": "notify(b'READY=1')", "fd:7": "os.write(7, b'up\\n')", "log:^up$": "print('up', flush=True)",
    "exec:/bin/true": "", "connect:unix:{room}/up": f"{BIND}; s.listen()",
}  # fmt: skip


@pytest.mark.parametrize("form", UP)
def test_commands_around_each_form_of_ready(superd: Superd, form: str) -> None:
    """The commands run, each once and in order, whatever the main process says that it is ready by."""
    room = superd.room("room", user="nobody")

    def command(text: str) -> list[list[str]]:
        return [["/bin/sh", "-c", f"echo {text}"]]

    code = UP[form].format(room=room) + "\nwhile True: time.sleep(1000)"
    around = {f"{role}": command(role) for role in ("start_pre", "start_post", "stop_post")}
    service(superd, code, ready=form.format(room=room), **around)
    superd.start()
    superd.wait_for("s", "ready")
    assert superd.call("Restart", names=["s"])["results"][0]["ok"]
    assert superd.call("Stop", names=["s"])["results"][0]["ok"]
    wanted = ["start_pre", "start_post", "stop_post"] * 2

    def said() -> list[str]:
        return [row["message"] for row in superd.find_records(event="output", service="s") if row["message"] != "up"]

    eventually(lambda: len(said()) >= len(wanted), True)
    assert said() == wanted
