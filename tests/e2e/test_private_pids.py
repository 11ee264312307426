"""sandbox.private_pids, as the service itself sees it, and as superd does: pids, statuses and signals are as always."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from harness import PYTHON, Superd, ask, comm, descendants, eventually, fetch, toml

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

PRIVATE = {"private_pids": True}
LOOK = "echo $$; echo $LISTEN_PID; cat /proc/self/comm; ls /proc | grep '^[0-9]' | xargs; ps -o comm= -p 1"


def inits(superd: Superd) -> list[int]:
    return [pid for pid in descendants(superd.pid) if comm(pid) == "superd-init"]


def listener(script: str) -> list[str]:
    """Answers the first client of a listening socket at fd 3 with what the script prints."""
    accept = (
        "import os, socket, subprocess, sys; c, _ = socket.socket(fileno=3).accept(); "
        "subprocess.run(['/bin/sh', '-c', sys.argv[1]], stdin=c, stdout=c, stderr=c)"
    )
    return [PYTHON, "-c", accept, script]


def test_connections_see_their_own_processes(superd: Superd) -> None:
    superd.write("s", toml(listen="tcp:127.0.0.1:0", command=["/bin/sh", "-c", LOOK], sandbox=PRIVATE))
    superd.write("t", toml(listen="tcp:127.0.0.1:0", command=["/bin/sh", "-c", "ls /proc | grep -c '^[0-9]'"]))
    superd.start()
    for count in (1, 2):
        pid, _, name, seen, first = fetch(superd.connect("s")).decode().splitlines()
        record = superd.wait_records(count, event="exit", service="s")[-1]
        assert (name, first, record["status"]) == ("cat", "superd-init", 0)
        # 1, the shell, and ls, grep and xargs as far as they live at that moment
        assert {"1", pid} <= set(seen.split()) and len(seen.split()) <= 5 and record["pid"] != int(pid)
    assert int(fetch(superd.connect("t"))) > 5  # another's context is another one


@pytest.mark.parametrize("pass_", ["stdio", "listen-fds"])
def test_a_connection_of_many(superd: Superd, pass_: str) -> None:
    """However it is started: its LISTEN_PID is what it calls itself; the log has what the machine calls it."""
    fd = 0 if pass_ == "stdio" else 3
    script = f"echo $$ $LISTEN_PID >&{fd}; read line <&{fd}"
    superd.write("s", toml(listen="tcp:127.0.0.1:0", command=["/bin/sh", "-c", script], pass_=pass_, sandbox=PRIVATE))
    superd.start()
    with superd.connect("s") as client:
        words = client.makefile().readline().split()
        pid = superd.wait_record(event="start", service="s")["pid"]
        names = re.search(r"^NSpid:\t(\d+)\t(\d+)$", Path(f"/proc/{pid}/status").read_text(), re.M)
        assert names is not None and names.groups() == (str(pid), words[0])
        assert words[1:] == ([] if pass_ == "stdio" else [words[0]])  # O1
        client.sendall(b"\n")
        assert superd.wait_record(event="exit", service="s", pid=pid)["status"] == 0


@pytest.mark.parametrize("run", ["on-demand", "always-on"])
def test_one_process(superd: Superd, run: str) -> None:
    superd.write("s", toml(listen="tcp:127.0.0.1:0", run=run, command=listener(f"{LOOK}; exit"), sandbox=PRIVATE))
    superd.start()
    pid, listen_pid, _, seen, first = fetch(superd.connect("s")).decode().splitlines()
    assert (listen_pid, first) == ("2", "superd-init") and {"1", "2", pid} <= set(seen.split())
    assert superd.wait_record(event="exit", service="s")["status"] == 0


def test_how_it_ends(superd: Superd) -> None:  # F1 G12 H1
    """A plain program is ended by the stop signal, as if it were no namespace's first; statuses are exact."""
    superd.write("sleep", toml(command="/bin/sleep 1000", sandbox=PRIVATE))
    superd.write("seven", toml(command=["/bin/sh", "-c", "exit 7"], run="once", sandbox=PRIVATE))
    superd.write("usr1", toml(command=["/bin/sh", "-c", "kill -USR1 $$"], run="once", sandbox=PRIVATE))
    superd.start()
    assert superd.wait_record(event="exit", service="seven")["status"] == 7
    assert superd.wait_record(event="exit", service="usr1")["signal"] == "USR1"
    superd.wait_record(event="start", service="sleep")
    assert superd.call("Stop", names=["sleep"])["results"][0]["ok"]
    assert superd.wait_record(event="exit", service="sleep")["signal"] == "TERM"
    eventually(lambda: inits(superd), [])
    # The keeper's own children are born where they always were.
    spaces = [os.readlink(f"/proc/{superd.pid}/ns/{name}") for name in ("pid", "pid_for_children")]
    assert spaces[0] == spaces[1]


def test_descendants(superd: Superd) -> None:  # G6 G1
    """They go on when the service's own process has ended, are reaped in their namespace, and end with a stop."""
    script = "for i in 1 2 3; do (setsid sleep 0 &); done; (setsid sleep 1000 &); sleep 1000 & echo up; wait"
    superd.write("s", toml(command=["/bin/sh", "-c", script], sandbox=PRIVATE))
    superd.write("o", toml(command=["/bin/sh", "-c", "(setsid sleep 1000 &); exit 3"], run="once", sandbox=PRIVATE))
    superd.start()
    superd.wait_record(event="output", service="s", message="up")
    superd.wait_record(event="exit", service="o", status=3)
    eventually(lambda: [comm(pid) for pid in descendants(superd.pid)].count("sleep"), 3)
    for name in ("s", "o"):
        assert superd.call("Stop", names=[name])["results"][0]["ok"]
    superd.call("Start", names=["o"])
    superd.wait_record(event="exit", service="o", status=3)
    superd.stop()  # takes along what is left


def test_a_killed_spawner(superd: Superd) -> None:  # F17
    """Its connections go on in their namespace, whose first process lives as long as they do, and no longer."""
    superd.write("s", toml(listen="tcp:127.0.0.1:0", command="/bin/cat", sandbox=PRIVATE))
    superd.start()
    with superd.connect("s") as client:
        client.sendall(b"one")
        assert client.recv(10) == b"one"
        pid = superd.wait_record(event="start", service="s")["pid"]
        (init,) = inits(superd)
        superd.kill_role("superd-spawner")
        superd.wait_record(message=re.compile("a spawner .* was killed"))
        with superd.connect("s") as other:
            other.sendall(b"two")
            assert other.recv(10) == b"two"
            assert init in inits(superd)
        assert ask(client, b"three") == b"three"
    superd.wait_record(event="exit", service="s", pid=pid)
    eventually(lambda: init in inits(superd), False)


@contextmanager
def served(superd: Superd) -> Iterator[tuple[socket.socket, int]]:
    """A client that `s` serves, and the process of `a`."""
    superd.write("s", toml(listen="tcp:127.0.0.1:0", command="/bin/cat", sandbox=PRIVATE))
    superd.write("a", toml(command="/bin/sleep 1000", sandbox=PRIVATE))
    superd.start()
    with superd.connect("s") as client:
        client.sendall(b"one")
        assert client.recv(10) == b"one"
        pid = superd.wait_record(event="start", service="a")["pid"]
        yield client, pid


def test_a_killed_manager(superd: Superd) -> None:
    with served(superd) as (client, pid):
        superd.kill_role("superd-manager")
        assert ask(client, b"two") == b"two"
        assert superd.call("Stop", names=["a"])["results"][0]["ok"]
        assert superd.wait_record(event="exit", service="a", pid=pid)["signal"] == "TERM"
        superd.stop()


def test_commands_around_it(superd: Superd) -> None:
    script = "echo $0 $$ ${MAINPID:-none}"
    commands = {name: [["/bin/sh", "-c", script, name]] for name in ("start_pre", "start_post", "stop_post")}
    superd.write("s", toml(command="/bin/sleep 1000", sandbox=PRIVATE, **commands))
    superd.start()
    superd.wait_record(event="output", service="s", message="start_pre 2 none")
    superd.wait_record(event="output", service="s", message="start_post 2 none")
    assert superd.call("Stop", names=["s"])["results"][0]["ok"]
    superd.wait_record(event="output", service="s", message="stop_post 2 none")


NOTIFY = """
import os, socket, sys
with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
    address = os.environ["NOTIFY_SOCKET"]
    sock.connect("\\0" + address[1:] if address.startswith("@") else address)
    pid = os.fork()
    if pid == 0:
        os.setsid()
        os.execv("/bin/sleep", ["sleep", "1000"])
    sock.send(b"MAINPID=%d\\nREADY=1" % pid)
os.waitpid(pid, 0)
"""


def test_notifications(superd: Superd) -> None:  # I6
    """A pid in a message is the sender's own; superd knows which process that is."""
    superd.write("s", toml(command=[PYTHON, "-c", NOTIFY], ready="notify", sandbox=PRIVATE))
    superd.start()
    superd.wait_record(event="ready", service="s")
    (service,) = superd.call("List")["services"]
    assert service["pid"] != superd.wait_record(event="start", service="s")["pid"]
    assert comm(service["pid"]) == "sleep"


def test_handler(superd: Superd) -> None:
    """What its module has opened is there in each child, and nothing of superd's."""
    room = superd.room("room")
    (room / "look.py").write_text(
        "import os\nimport colorsys, tabnanny\nopened = open('/etc/hostname')\n"
        "def serve(conn):\n"
        "    fds = [n for n in os.listdir('/proc/self/fd') if os.path.exists(f'/proc/self/fd/{n}')]\n"
        "    links = [os.readlink(f'/proc/self/fd/{n}').partition(':')[0] for n in fds]\n"
        "    links = sorted(link for link in links if 'python' not in link)\n"
        "    assert links == ['/etc/hostname', 'pipe', 'socket', 'socket', 'socket'], links\n"
        "    import fileinput\n"
        "    seen = [n for n in os.listdir('/proc') if n.isdigit()]\n"
        "    conn.output.write(f'{os.getpid()} {sorted(map(int, seen))}'.encode())\n"
    )
    superd.write("s", toml(listen="tcp:127.0.0.1:0", handler="look:serve", cwd=str(room), sandbox=PRIVATE))
    superd.start()
    assert fetch(superd.connect("s")) == b"2 [1, 2]"


def test_chroot(superd: Superd, build: Callable[..., str]) -> None:
    """A /proc inside is theirs, too."""
    room = superd.room("root")
    for name in ("bin", "proc", "srv"):
        (room / name).mkdir()
    Path(build("root.c", "-static")).rename(room / "bin" / "look")
    sandbox = {"chroot": str(room), **PRIVATE}
    superd.write("s", toml(listen="tcp:127.0.0.1:0", command="/bin/look", cwd="/srv", sandbox=sandbox))
    superd.start()
    assert fetch(superd.connect("s")).startswith(b"cwd /srv")
    (init,) = inits(superd)
    mounts = Path(f"/proc/{init}/mounts").read_text().splitlines()
    assert len([line for line in mounts if line.startswith("proc ")]) >= 2
    assert any(line.split()[1] == f"{room}/proc" for line in mounts)


def test_what_cannot_be_had(superd: Superd, require: Callable[[str], str]) -> None:  # H12
    superd.write("s", toml(listen="tcp:127.0.0.1:0", command="/bin/cat", sandbox=PRIVATE))
    superd.write("a", toml(command="/bin/sleep 1000", restart="no", sandbox=PRIVATE))
    superd.write("v", toml(listen="tcp:127.0.0.1:0", command="/bin/cat"))
    superd.start(wrapper=(require("capsh"), "--drop=cap_sys_admin", "--", "-c", 'exec "$@"', "sh"))
    superd.wait_record(service="a", message=re.compile("cannot have processes of its own without CAP_SYS_ADMIN"))
    with superd.connect("s"), superd.connect("v") as client:
        superd.wait_record(service="s", message=re.compile("cannot have mounts and processes .*without CAP_SYS_ADMIN"))
        assert ask(client, b"x") == b"x"


def test_an_upgrade(superd: Superd) -> None:
    """superd is another program in the same process then, and its services' namespaces live on."""
    with served(superd) as (client, pid):
        before = len(superd.records)
        superd.call("Upgrade")
        superd.wait_record(after=before, message=re.compile("manager 2 took over"))
        assert ask(client, b"two") == b"two"
    assert superd.status("a")["pid"] == pid
    assert superd.call("Stop", names=["a"])["results"][0]["ok"]
    assert superd.wait_record(event="exit", service="a", pid=pid)["signal"] == "TERM"
