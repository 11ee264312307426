"""[sandbox], as the service itself sees it: each key in a spawner's context and in that of a single process."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from harness import Superd, ask, read_all, toml

from superd.core.capabilities import CAPABILITIES

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
modes = pytest.mark.parametrize("mode", ["per-connection", "on-demand"])


def shell(superd: Superd, name: str, mode: str, script: str, **keys: object) -> None:
    """Answers each client with what the script prints."""
    if mode == "per-connection":
        superd.write(name, toml(listen="tcp:127.0.0.1:0", command=["/bin/sh", "-c", script], stderr="socket", **keys))
    else:
        accept = (
            "import os, socket, subprocess, sys; c, _ = socket.socket(fileno=3).accept(); "
            "subprocess.run(['/bin/sh', '-c', sys.argv[1]], stdin=c, stdout=c, stderr=c)"
        )
        command = ["/usr/bin/python3", "-c", accept, script]
        superd.write(name, toml(listen="tcp:127.0.0.1:0", command=command, run="on-demand", **keys))


def answer(superd: Superd, name: str) -> str:
    with superd.connect(name) as client:
        return read_all(client).decode()


@modes
def test_private_tmp(superd: Superd, mode: str, tmp_path: Path) -> None:
    script = "ls -A /tmp; echo $$ >/tmp/mine; ls -A /tmp; ls -ld /tmp /var/tmp | cut -c1-10"
    shell(superd, "s", mode, script, sandbox={"private_tmp": True})
    shell(superd, "t", mode, "ls -A /tmp", sandbox={"private_tmp": True})
    superd.start()
    assert answer(superd, "s") == "mine\ndrwxrwxrwt\ndrwxrwxrwt\n"
    assert not Path("/tmp/mine").exists()
    assert answer(superd, "t") == ""  # nobody else's either


@modes
def test_private_network(superd: Superd, mode: str) -> None:
    """Nothing but a loopback interface; the socket it was given works all the same."""
    shell(superd, "s", mode, "cut -sd: -f1 /proc/net/dev; cat /proc/net/fib_trie | grep -c 127.0.0.1",
          sandbox={"private_network": True})  # fmt: skip
    superd.start()
    interfaces, loopback = answer(superd, "s").split()
    assert interfaces == "lo" and int(loopback) > 0


@modes
def test_read_only(superd: Superd, mode: str) -> None:
    """The longest path decides, whatever its order."""
    room = superd.room("room", user="nobody")
    (room / "inside").mkdir()
    (room / "inside").chmod(0o777)
    outside = superd.room("outside", user="nobody")
    script = f"cd {room}; for d in . inside {outside}; do echo x >$d/x && echo written || echo not; done 2>&1"
    shell(superd, "s", mode, script, sandbox={"read_only": ["/"], "read_write": [str(room / "inside")]})
    shell(superd, "t", mode, script, sandbox={"read_only": [str(room / "inside")]})
    superd.start()
    lines = [line for line in answer(superd, "s").splitlines() if "Read-only file system" not in line]
    assert lines == ["not", "written", "not"]
    assert [each.name for each in superd.dir.rglob("x")] == ["x"] and (room / "inside" / "x").exists()
    lines = answer(superd, "t").splitlines()
    assert [line for line in lines if line in ("written", "not")] == ["written", "not", "written"]
    assert (outside / "x").exists()


def test_chroot(superd: Superd, build: Callable[..., str]) -> None:
    """Program and cwd are inside; files outside are not there."""
    room = superd.room("root")
    (room / "bin").mkdir()
    (room / "srv").mkdir()
    Path(build("root.c", "-static")).rename(room / "bin" / "look")
    superd.write("s", toml(listen="tcp:127.0.0.1:0", command="/bin/look", cwd="/srv", sandbox={"chroot": str(room)}))
    superd.start()
    assert answer(superd, "s") == "cwd /srv, no /etc, uid 65534\n"


def capability_bits(text: str) -> dict[str, int]:
    return {name: int(value, 16) for name, value in re.findall(r"^Cap(\w+):\t(\w+)$", text, re.M)}


@modes
def test_capabilities(superd: Superd, mode: str) -> None:  # E22
    chown, bind = (1 << CAPABILITIES.index(name) for name in ("CHOWN", "NET_BIND_SERVICE"))
    script = "cat /proc/self/status"
    shell(superd, "root", mode, script, user="root", sandbox={"capabilities": ["CAP_CHOWN"]})
    shell(superd, "user", mode, script, sandbox={"ambient_capabilities": ["net_bind_service"]})
    shell(superd, "none", mode, script, sandbox={"capabilities": []})
    superd.start()
    found = capability_bits(answer(superd, "root"))
    assert found == {"Inh": 0, "Prm": chown, "Eff": chown, "Bnd": chown, "Amb": 0}
    found = capability_bits(answer(superd, "user"))
    assert (found["Prm"], found["Eff"], found["Amb"]) == (bind, bind, bind) and found["Bnd"] > bind
    assert set(capability_bits(answer(superd, "none")).values()) == {0}


def test_what_cannot_be_had(superd: Superd, require: Callable[[str], str]) -> None:  # H12
    """The service does not start, and says what is missing; the others run."""
    shell(superd, "s", "per-connection", "cat", sandbox={"private_tmp": True})
    shell(superd, "t", "on-demand", "cat", sandbox={"read_only": ["/nowhere"]})
    shell(superd, "u", "per-connection", "cat", sandbox={"ambient_capabilities": ["SYS_ADMIN"]})
    superd.write("v", toml(listen="tcp:127.0.0.1:0", command="/bin/cat"))
    superd.start(wrapper=(require("capsh"), "--drop=cap_sys_admin", "--", "-c", 'exec "$@"', "sh"))
    with superd.connect("s"), superd.connect("t"), superd.connect("u"):
        superd.wait_record(service="s", message=re.compile("cannot have mounts of its own without CAP_SYS_ADMIN"))
        superd.wait_record(service="t", message=re.compile("cannot have mounts of its own without CAP_SYS_ADMIN"))
        superd.wait_record(service="u", message=re.compile("cannot keep CAP_SYS_ADMIN: superd does not have it"))
        with superd.connect("v") as client:
            assert ask(client, b"x") == b"x"
