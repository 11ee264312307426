"""[cgroup]: limits as the kernel keeps them, where it can; and what superd says where it cannot."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import PYTHON, Superd, ask, eventually, fetch, read_all, toml

from superd.system.configdir import RealMachine

CONTROLLERS = ("memory", "pids", "cpu")
MISSING = next((name for name in CONTROLLERS if RealMachine().lacks_controller(name)), None)

needs_controllers = pytest.mark.skipif(
    MISSING is not None or os.geteuid() != 0, reason="needs root, and the controllers of cgroup version 2"
)
BOMB = """
import os, time
count = 0
while True:
    try:
        if os.fork() == 0:
            time.sleep(1000)
        count += 1
    except OSError as error:
        print(count, error.errno, flush=True)
        time.sleep(1000)
"""
LIMITS = {"memory_max": "64M", "pids_max": 20, "cpu_max": "50%"}


@pytest.fixture
def own(superd: Superd) -> Iterator[str]:
    """The group that superd is started in: one of its own, as a service manager gives it."""
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    here = next(words[1] for words in mounts if words[2] == "cgroup2")
    given = Path(here, "cgroup.subtree_control")
    for name in CONTROLLERS:
        if name not in given.read_text().split():
            given.write_text(f"+{name}")
    path = f"{here}/{superd.dir.name}"
    os.mkdir(path)
    superd.wrapper = ["/bin/sh", "-c", f'echo $$ >{path}/cgroup.procs && exec "$@"', "sh"]  # type: ignore[attr-defined]
    yield path
    superd.stop()
    os.rmdir(path)


def start(superd: Superd) -> None:
    superd.start(wrapper=superd.wrapper)  # type: ignore[attr-defined]


def files(group: str) -> list[str]:
    """What they say; "-" for one that is not there, because nobody has asked for its controller."""
    paths = [Path(group, name) for name in ("memory.max", "pids.max", "cpu.max")]
    return [path.read_text().strip() if path.exists() else "-" for path in paths]


def group_of(pid: int) -> str:
    return Path(f"/proc/{pid}/cgroup").read_text().strip().rpartition("\n")[2].removeprefix("0::")


@needs_controllers
def test_limits_are_there(superd: Superd, own: str) -> None:
    """Of one process and of connections; superd has made room, and comes back."""
    superd.write("a", toml(command="/bin/sleep 1000", cgroup=LIMITS))
    superd.write("c", toml(listen="tcp:127.0.0.1:0", command="/bin/cat /proc/self/cgroup", cgroup=LIMITS))
    superd.write("d", toml(listen="tcp:127.0.0.1:0", command="/bin/cat /proc/self/cgroup"))
    start(superd)
    base = f"{own}/superd.{superd.pid}"
    pid = superd.wait_record(event="start", service="a")["pid"]
    assert group_of(pid).endswith(f"/superd.{superd.pid}/a")
    assert fetch(superd.connect("c")).decode().strip().endswith(f"/superd.{superd.pid}/c")
    assert fetch(superd.connect("d")).decode().strip().endswith(f"/superd.{superd.pid}/_superd")
    for name in "ac":
        assert files(f"{base}/{name}") == [str(64 << 20), "20", "50000 100000"]
    memory, *rest = superd.call("Status", names=["a"])["services"][0]["limits"]
    assert re.fullmatch(r"memory \d+\.\d MiB of 64M", memory) and rest == ["pids 1 of 20", "cpu 50%"]
    assert all(group_of(role).rpartition("/")[2] in ("_superd", "c") for role in superd.roles())
    superd.stop()
    assert not os.path.exists(base) and Path(own, "cgroup.subtree_control").read_text().strip() == ""


@needs_controllers
def test_a_killed_manager(superd: Superd, own: str) -> None:
    """The next one finds the groups, and where superd belongs."""
    superd.write("a", toml(command="/bin/sleep 1000", cgroup=LIMITS))
    superd.write("c", toml(listen="tcp:127.0.0.1:0", command="/bin/cat", cgroup=LIMITS))
    start(superd)
    pid = superd.wait_record(event="start", service="a")["pid"]
    superd.kill_role("superd-manager")
    with superd.connect("c") as client:
        assert ask(client, b"x") == b"x"
    superd.write("a", toml(command="/bin/sleep 1000", cgroup={"pids_max": 30}))
    assert superd.call("Reload")["entries"]
    assert files(f"{own}/superd.{superd.pid}/a") == ["max", "30", "max 100000"]
    assert group_of(pid).endswith("/a")


@needs_controllers
@pytest.mark.parametrize("run", ["per-connection", "always-on"])
def test_a_reload_changes_what_runs(superd: Superd, own: str, run: str) -> None:
    """In place: more, less, none, and limits where there were none; the process is the same."""

    def write(**cgroup: object) -> None:
        more = {"cgroup": cgroup} if cgroup else {}
        if run == "always-on":
            superd.write("s", toml(command="/bin/sleep 1000", kill_mode="process", **more))
        else:
            superd.write("s", toml(listen="tcp:127.0.0.1:7999", command="/bin/cat", **more))

    write()
    superd.write_daemon("watch = false\n")
    start(superd)
    client = superd.connect("s") if run == "per-connection" else None
    if client is not None:
        client.sendall(b"x")
        assert client.recv(1) == b"x"
    pid = superd.wait_record(event="start", service="s")["pid"]
    group = f"{own}/superd.{superd.pid}/s"
    for limits, expected in (
        ({"pids_max": 20, "memory_max": "1G"}, [str(1 << 30), "20", "-"]),
        ({"pids_max": 10, "cpu_max": "20000 50000"}, ["max", "10", "20000 50000"]),
        ({}, ["max", "max", "max 50000"]),
    ):
        write(**limits)
        (entry,) = superd.call("Reload")["entries"]
        assert entry["action"] == "in place", entry
        assert files(group) == expected and group_of(pid).endswith("/s")
    if client is not None:
        assert ask(client, b"y") == b"y"


@needs_controllers
def test_processes(superd: Superd, own: str) -> None:  # N4 X16
    """A fork bomb ends at the limit, of all connections together; superd answers, and a stop ends it."""
    superd.write("s", toml(listen="tcp:127.0.0.1:0", command=[PYTHON, "-c", BOMB], cgroup={"pids_max": 30}))
    start(superd)
    with superd.connect("s") as client:
        count, errno = map(int, client.makefile().readline().split())
        assert 20 < count < 30 and errno == 11
        with superd.connect("s") as other:
            superd.wait_record(service="s", message=re.compile("fork: .*pids_max = 30"))
            assert read_all(other) == b""
        assert superd.call("Stop", names=["s"])["results"][0]["ok"]


@needs_controllers
def test_memory(superd: Superd, own: str) -> None:  # N5 X17
    """The kernel kills the hog, the log says for what, superd lives, and the next one is started."""
    hog = [PYTHON, "-c", "x = []\nwhile True: x.append(bytearray(1 << 20))"]
    superd.write("a", toml(command=hog, cgroup={"memory_max": "32M"}, restart="no"))
    superd.write("c", toml(listen="tcp:127.0.0.1:0", command=hog, cgroup={"memory_max": "48M"}))
    start(superd)
    superd.wait_record(service="a", message=re.compile("the kernel has killed a process of it: memory_max = 32M"))
    for count in (1, 2):
        with superd.connect("c") as client:
            assert read_all(client) == b""
        assert superd.wait_records(count, event="exit", service="c")[-1]["signal"] == "KILL"
    superd.wait_record(service="c", message=re.compile("the kernel has killed .* memory_max = 48M"))


@needs_controllers
def test_cpu_time(superd: Superd, own: str) -> None:
    superd.write("a", toml(command=["/bin/sh", "-c", "while :; do :; done"], cgroup={"cpu_max": "10%"}))
    start(superd)
    superd.wait_record(event="start", service="a")
    path = Path(own, f"superd.{superd.pid}", "a", "cpu.stat")

    def throttled() -> bool:
        return int(dict(line.split() for line in path.read_text().splitlines())["nr_throttled"]) > 0

    eventually(throttled, True)


@needs_controllers
def test_a_stranger_is_not_moved(superd: Superd, own: str) -> None:
    """Somebody else is in superd's group: what has limits does not start, and is told why; others do."""
    script = f'echo $$ >{own}/cgroup.procs; (setsid sleep 1000 & echo $! >{superd.dir}/pid); exec "$@"'
    superd.wrapper = ["/bin/sh", "-c", script, "sh"]  # type: ignore[attr-defined]
    superd.write("a", toml(command="/bin/sleep 1000", cgroup=LIMITS, restart="no"))
    superd.write("c", toml(listen="tcp:127.0.0.1:0", command="/bin/cat", cgroup=LIMITS))
    superd.write("d", toml(listen="tcp:127.0.0.1:0", command="/bin/cat"))
    start(superd)
    try:
        stranger = int((superd.dir / "pid").read_text())
        why = re.compile(rf"cgroup.procs: processes that are not superd's .*{stranger}.* are in the group")
        superd.wait_record(service="a", message=why)
        with superd.connect("c"), superd.connect("d") as client:
            superd.wait_record(service="c", message=why)
            assert ask(client, b"x") == b"x"
    finally:
        os.kill(int((superd.dir / "pid").read_text()), 9)


@pytest.mark.skipif(MISSING is None, reason="this machine has all controllers")
def test_what_the_machine_does_not_have(superd: Superd) -> None:  # H12
    """Found when the file is read, with the file that would have to list it; other services run."""
    key = {"memory": 'memory_max = "64M"', "pids": "pids_max = 9", "cpu": 'cpu_max = "50%"'}[MISSING or ""]
    superd.write("bad", f'command = "/bin/sleep 1000"\n[cgroup]\n{key}')
    superd.write("off", f'enabled = false\ncommand = "/bin/sleep 1000"\n[cgroup]\n{key}')
    superd.write("good", toml(listen="tcp:127.0.0.1:0", command="/bin/cat", cgroup={"memory_max": "off"}))
    superd.garbage_expected = True
    superd.start()
    rows = {row["name"]: row for row in superd.call("List")["services"]}
    assert (rows["bad"]["state"], rows["off"]["state"]) == ("bad config", "disabled")
    assert re.search(rf"bad.toml:3:1: error: cannot limit {MISSING} here: \S+.*", rows["bad"]["note"])
    with superd.connect("good") as client:
        assert ask(client, b"x") == b"x"
