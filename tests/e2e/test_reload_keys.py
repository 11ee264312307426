"""Every key of the table changes on running services, of each run mode, in one reload.

What the plan says of a key is compared with the table, what the kernel says of processes and sockets with a superd
that was started with the new files; and what is to stay has to be the same process, socket and connection. What works
in place has tests here and in test_reload.py.
"""

from __future__ import annotations

import ctypes
import os
import re
import select
import socket
import struct
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from harness import PYTHON, Superd, ask, eventually, read_all

from superd.core.keys import BY_TABLE

CONN, DEMAND, ALWAYS, ONCE = "per-connection", "on-demand", "always-on", "once"
_SYS_PIDFD_GETFD = 438


@dataclass(frozen=True)
class Change:
    """key: as in the plan. old, new: lines of the file, `{dir}` is the test's directory. shown: the kernel tells the
    difference. socket: it stands in a [[socket]] of that address;
    "-": it says itself what it listens on. table: as `[limits]`. plan: what the plan calls it."""

    key: str
    old: str
    new: str
    modes: tuple[str, ...] = (CONN, ALWAYS)
    shown: bool = True
    socket: str = ""
    table: str = ""
    root: bool = False
    plan: str = ""


def keyed(key: str, old: str, new: str, **more: Any) -> Change:
    """A key of a service: "" leaves the line out."""
    name = key.rpartition(".")[2]
    return Change(key, *(f"{name} = {value}" if value else "" for value in (old, new)), **more)


TCP, UDP, UNIX = "tcp:127.0.0.1:0", "udp:127.0.0.1:0", "unix:{dir}/{name}.sock"
FDS = {"modes": (ALWAYS,)}
IDLE = {"modes": (ALWAYS, DEMAND)}

# What a process or a socket shows.
SHOWN = (
    keyed("command", '["/bin/cat"]', '["/bin/cat", "-"]', modes=(CONN,)),
    keyed("command", '["/bin/sleep", "98"]', '["/bin/sleep", "97"]', modes=(ALWAYS, DEMAND, ONCE)),
    keyed("argv0", "", '"kitten"', modes=(CONN, ALWAYS, DEMAND)),
    keyed("pass", '"stdio"', '"listen-fds"', modes=(CONN, ALWAYS)),
    keyed("fd_protocols", "", '["systemd", "upstart"]', **FDS),
    keyed("stderr", "", '"null"'),
    keyed("stdout", "", '"null"', modes=(ALWAYS, ONCE)),
    keyed("user", "1", "2", root=True, modes=(CONN, ALWAYS, DEMAND, ONCE)),
    keyed("group", "", "5", root=True),
    keyed("groups", "[]", "[5, 6]", root=True),
    keyed("cwd", '"/"', '"/usr"', modes=(CONN, ALWAYS, DEMAND, ONCE)),
    keyed("umask", "", '"0077"', modes=(CONN, ALWAYS, DEMAND)),
    keyed("environment", "{ A = \"1\" }", '{ A = "2", B = "3" }', modes=(CONN, ALWAYS, DEMAND)),
    keyed("environment_file", '"{dir}/one"', '"{dir}/two"'),
    keyed("pass_environment", "", '["SUPERD_TEST_KEYS"]'),
    keyed("watchdog", "", '"1h"', **FDS),
    *(keyed(f"rlimit.{name}", '"4G"', '"3G"', table="rlimit") for name in ("as", "data", "stack", "rss", "fsize")),
    *(keyed(f"rlimit.{name}", "500", "400", table="rlimit") for name in (
        "core", "cpu", "locks", "msgqueue", "nofile", "sigpending")),
    *(keyed(f"rlimit.{name}", "40000", "30000", table="rlimit") for name in ("memlock", "nproc")),
    keyed("rlimit.rttime", "50000000", "40000000", table="rlimit"),
    keyed("rlimit.rtprio", "0", "1", table="rlimit", modes=()),
    keyed("rlimit.nice", "0", "1", table="rlimit", modes=()),
    keyed("scheduling.nice", "1", "2", table="scheduling"),
    keyed("scheduling.ioprio", '"best-effort:5"', '"idle"', table="scheduling"),
    keyed("scheduling.oom_score_adjust", "500", "600", table="scheduling"),
    keyed("scheduling.cpu_affinity", "", "[0]", table="scheduling"),
    keyed("sandbox.no_new_privileges", "false", "true", table="sandbox"),
    keyed("sandbox.capabilities", "", '["chown"]', table="sandbox", root=True),
    keyed("sandbox.ambient_capabilities", "", '["chown"]', table="sandbox", root=True),
    keyed("sandbox.private_tmp", "false", "true", table="sandbox", root=True),
    keyed("sandbox.private_network", "false", "true", table="sandbox", root=True),
    keyed("sandbox.private_pids", "false", "true", table="sandbox", root=True),
    keyed("sandbox.read_only", "", '["/usr"]', table="sandbox", root=True),
    keyed("sandbox.read_write", "", '["/usr/lib"]', table="sandbox", root=True, shown=False),
    # sockets: the same one before and after
    keyed("socket.name", '"one"', '"two"', socket=TCP, **FDS),
    keyed("socket.backlog", "100", "50", socket=TCP),
    keyed("socket.mode", '"0600"', '"0660"', socket=UNIX),
    keyed("socket.user", "", "1", socket=UNIX, root=True),
    keyed("socket.group", "", "1", socket=UNIX, root=True),
    keyed("socket.directory_mode", "", '"0700"', socket=UNIX, shown=False),
    keyed("socket.symlinks", "", '["{dir}/{name}.link"]', socket=UNIX),
    keyed("socket.free_bind", "", "true", socket=TCP),
    keyed("socket.transparent", "", "true", socket=TCP, root=True),
    keyed("socket.broadcast", "", "true", socket=UDP, **IDLE),
    keyed("socket.device", "", '"lo"', socket=TCP, root=True),
    keyed("socket.no_delay", "", "true", socket=TCP),
    keyed("socket.keep_alive", "true", "{ idle = \"20s\", interval = \"5s\", count = 3 }", socket=TCP),
    keyed("socket.defer_accept", "", '"7s"', socket=TCP, **IDLE),
    keyed("socket.receive_buffer", "", "20000", socket=TCP),
    keyed("socket.send_buffer", "30000", "40000", socket=TCP),
    keyed("socket.mark", "", "7", socket=TCP, root=True),
    keyed("socket.tos", "", "16", socket=TCP),
    keyed("socket.ttl", "9", "", socket=TCP),
    keyed("socket.priority", "3", "4", socket=TCP),
    keyed("socket.congestion", "", '"reno"', socket=TCP, shown=False),
    keyed("socket.pass_credentials", "", "true", socket=UNIX),
    keyed("socket.pass_packet_info", "", "true", socket=UDP, **IDLE),
    keyed("socket.timestamping", "", "true", socket=UDP, **IDLE),
    keyed("socket.multicast", "", '["239.1.2.3"]', socket="udp4:0", **IDLE),
    keyed("socket.nonblocking", "", "true", socket=TCP, **FDS),
    # and another one
    Change("listen", 'listen = "unix:{dir}/{name}.1"', 'listen = "unix:{dir}/{name}.2"', (CONN, ALWAYS, DEMAND),
           socket="-"),
    Change("socket", '[[socket]]\nlisten = "unix:{dir}/{name}.1"',
           '[[socket]]\nlisten = "unix:{dir}/{name}.1"\n[[socket]]\nlisten = "unix:{dir}/{name}.2"', (CONN, ALWAYS),
           socket="-", plan="listen"),
)  # fmt: skip


def services(root: bool) -> dict[str, tuple[Change, str]]:
    found: dict[str, tuple[Change, str]] = {}
    for number, change in enumerate(SHOWN):
        for mode in change.modes if root or not change.root else ():
            key = re.sub("[^a-z]", "", change.key.lower())
            found[f"{key}-{number}-{mode}"] = change, mode
    return found


def file_of(superd: Superd, name: str, change: Change, mode: str, line: str) -> None:
    lines = [f'run = "{mode}"']
    if change.key != "command":
        lines.append('command = ["/bin/sleep", "99"]')
    if not change.socket and mode != ONCE:
        lines.append(f'listen = "{TCP}"')
    if change.socket.count(":"):
        lines += ["[[socket]]", f'listen = "{change.socket}"']
    if change.table:
        lines.append(f"[{change.table}]")
    text = "\n".join([*lines, line])
    superd.write(name, text.replace("{dir}", str(superd.dir)).replace("{name}", name))


def expected(change: Change, mode: str) -> str:
    """The class of the key; a socket that stays takes its options while it is open."""
    table, _, name = change.key.rpartition(".")
    found = BY_TABLE[table or "service"][name].change
    if found == "rebind" and table == "socket":
        return "in place"
    return "restart" if found == "rebind" and mode != CONN else found


def reload(superd: Superd) -> dict[str, dict[str, Any]]:
    reply = superd.call("Reload")
    assert reply["applied"] and not reply["problems"], reply
    assert not any(row["why"] for row in reply["entries"]), reply
    return {row["name"]: row for row in reply["entries"]}


def pid_of(superd: Superd, name: str) -> int:
    found: int = superd.status(name)["pid"] or 0
    return found


_OWN = re.compile(rb"(REMOTE_PORT|TCPREMOTEPORT|TCPLOCALPORT|TCPCONNNUM|SUPERD_CONNECTION|INVOCATION_ID|LISTEN_PID|"
                  rb"WATCHDOG_PID|LISTEN_PIDFDID|IPCCONNNUM|PORT|NOTIFY_SOCKET|IPCREMOTEPID)=.*", re.S)  # fmt: skip


def process(pid: int, directory: str) -> dict[str, Any]:
    """What the kernel shows of a process; the same for two that were started alike."""
    proc = Path(f"/proc/{pid}")
    found: dict[str, Any] = {
        line.partition(":")[0]: line.split()[1:] for line in (proc / "status").read_text().splitlines()
        if line.startswith(("Uid", "Gid", "Groups", "Umask", "NoNewPrivs", "CapBnd", "CapAmb"))
    }  # fmt: skip
    found["argv"] = (proc / "cmdline").read_bytes().split(b"\0")
    words = (proc / "environ").read_bytes().replace(directory.encode(), b"DIR").split(b"\0")
    found["environment"] = sorted(word for word in words if not _OWN.fullmatch(word))
    found["limits"] = (proc / "limits").read_text()
    found["cwd"] = os.readlink(proc / "cwd")
    found["nice"] = (proc / "stat").read_text().rpartition(")")[2].split()[16]
    found["oom"] = (proc / "oom_score_adj").read_text()
    found["cpus"] = os.sched_getaffinity(pid)
    found["ioprio"] = ctypes.CDLL(None).syscall(252, 1, pid) if os.uname().machine == "x86_64" else 0
    found["network"] = os.readlink(proc / "ns" / "net") == os.readlink("/proc/self/ns/net")
    # Of the file system's options only ours: the machine's are not what is looked at.
    mounts = [line.split() for line in (proc / "mountinfo").read_text().splitlines()]
    found["mounts"] = sorted((words[4], words[5].split(",")[0]) for words in mounts if "superd" not in words[4])
    for fd in range(5):
        try:
            target = os.readlink(proc / "fd" / str(fd))
        except OSError:
            continue
        flags = int(re.search(r"flags:\s+(\d+)", (proc / "fdinfo" / str(fd)).read_text())[1], 8)  # type: ignore[index]
        found[f"fd {fd}"] = re.sub(r"\d+", "", target), flags & os.O_NONBLOCK
    return found


_OPTIONS = {
    "SOL_SOCKET": (socket.SOL_SOCKET, (2, 6, 7, 8, 9, 12, 16, 35, 36)),
    "IP": (socket.IPPROTO_IP, (1, 2, 8, 15, 19)),
    "TCP": (socket.IPPROTO_TCP, (1, 4, 5, 6, 9)),
}


def options(one: socket.socket) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for level, (number, names) in _OPTIONS.items():
        for name in names:
            try:
                found[f"{level} {name}"] = one.getsockopt(number, name)
            except OSError:
                continue
    if one.family == socket.AF_INET:
        found["device"] = one.getsockopt(socket.SOL_SOCKET, 25, 16)
        if one.type == socket.SOCK_DGRAM:
            found["groups"] = "030201EF" in Path("/proc/net/igmp").read_text()
        if one.type == socket.SOCK_STREAM:
            found["backlog"] = struct.unpack_from("I", one.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104), 28)
    else:
        path = one.getsockname()
        facts = os.lstat(path)
        found["path"] = (
            os.path.basename(path),
            facts.st_mode,
            facts.st_uid,
            facts.st_gid,
            os.path.islink(path.replace(".sock", ".link")),
        )
    return found


def inodes() -> dict[str, str]:
    """Address -> inode of each listening TCP socket, UDP socket and UNIX socket with a path."""
    found = {}
    for name, state in (("tcp", "0A"), ("udp", "07")):
        for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == state:
                host, _, port = words[1].partition(":")
                found[f"{name} {socket.inet_ntoa(bytes.fromhex(host)[::-1])}:{int(port, 16)}"] = words[9]
    for line in Path("/proc/net/unix").read_text().splitlines()[1:]:
        words = line.split()
        if len(words) == 8 and words[3] == "00010000":
            found[f"unix {words[7]}"] = words[6]
    return found


def key_of(address: str) -> str:
    """A canonical address as inodes() has it."""
    scheme, _, rest = address.partition(":")
    return f"{scheme[:3] if scheme != 'unix' else scheme} {f'0.0.0.0:{rest}' if rest.isdigit() else rest}"


def look_at(superd: Superd, wanted: set[str]) -> dict[str, dict[str, Any]]:
    """Inode -> options of sockets of the manager's."""
    found = {}
    libc = ctypes.CDLL(None, use_errno=True)
    pidfd = os.pidfd_open(superd.manager)
    try:
        for fd in os.listdir(f"/proc/{superd.manager}/fd"):
            try:
                inode = os.readlink(f"/proc/{superd.manager}/fd/{fd}").removeprefix("socket:[").rstrip("]")
            except FileNotFoundError:  # closed meanwhile
                continue
            if inode in wanted:
                copy = libc.syscall(_SYS_PIDFD_GETFD, pidfd, int(fd), 0)
                assert copy >= 0, os.strerror(ctypes.get_errno())
                with socket.socket(fileno=copy) as one:
                    found[inode] = options(one)
    finally:
        os.close(pidfd)
    return found


class World:
    """All services of SHOWN, and a client of each."""

    def __init__(self, superd: Superd, names: dict[str, tuple[Change, str]]) -> None:
        self.superd, self.names = superd, names
        self.clients: list[socket.socket] = []

    def write(self, which: str) -> None:
        for name, (change, mode) in self.names.items():
            file_of(self.superd, name, change, mode, getattr(change, which))

    def use(self) -> dict[str, int]:
        """A process of each service, a new one where it can have one: its pid."""
        old = {row["pid"] for row in self.superd.call("Connections")["connections"]}
        rows = {row["name"]: row for row in self.superd.call("List")["services"]}
        for name, (_, mode) in self.names.items():
            if mode == CONN or (mode == DEMAND and not rows[name]["pid"]):
                self.clients.append(self.connect(rows[name]["listen"][0]))

        def connections() -> dict[str, int]:
            """The new ones last."""
            found = self.superd.call("Connections")["connections"]
            return {row["service"]: row["pid"] for row in sorted(found, key=lambda row: row["pid"] not in old)}

        def pids() -> dict[str, int]:
            found = connections()
            rows = {row["name"]: row["pid"] for row in self.superd.call("List")["services"]}
            return {name: found.get(name, 0) if mode == CONN else rows[name] or 0
                    for name, (_, mode) in self.names.items()}  # fmt: skip

        eventually(lambda: [name for name, pid in pids().items() if not pid], [])
        until = time.monotonic() + 3  # a client that waits for one before it to go gets no process
        while time.monotonic() < until and old & set(connections().values()):
            select.select([], [], [], 0.02)
        for name, (_, mode) in self.names.items():
            if mode in (ALWAYS, DEMAND):
                self.superd.wait_for(name, "ready")
        return pids()

    @staticmethod
    def connect(address: str) -> socket.socket:
        scheme, _, rest = address.partition(":")
        if scheme == "unix":
            client = socket.socket(socket.AF_UNIX)
            client.connect(rest)
            return client
        host, _, port = rest.rpartition(":")
        if scheme.startswith("udp"):
            client = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            client.sendto(b"x", (host or "127.0.0.1", int(port)))
            return client
        return socket.create_connection((host, int(port)), timeout=20)

    def close(self) -> None:
        for client in self.clients:
            client.close()

    def observe(self, pids: dict[str, int]) -> dict[str, Any]:
        found = {name: process(pids[name], str(self.superd.dir)) for name in self.names}
        mine = {name: rows for name, rows in self.inodes().items() if self.names[name][0].socket}
        looks = look_at(self.superd, {inode for rows in mine.values() for inode in rows})
        for name, rows in mine.items():
            found[name] |= {f"socket {number}": looks[inode] for number, inode in enumerate(rows)}
        return found

    def inodes(self) -> dict[str, list[str]]:
        known = inodes()
        rows = self.superd.call("List")["services"]
        return {row["name"]: [known[key_of(address)] for address in row["listen"]] for row in rows}


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    return [
        f"{key}: {one.get(key)!r} / {other.get(key)!r}" for key in {**one, **other} if one.get(key) != other.get(key)
    ]


def prepare(superd: Superd) -> None:
    (superd.dir / "one").write_text("FROM=one\n")
    (superd.dir / "two").write_text("FROM=two\n")


def test_what_processes_and_sockets_show() -> None:
    """After one reload of everything all is as if superd had been started so, and nothing else has happened."""
    names = services(os.geteuid() == 0)
    given = {**os.environ, "SUPERD_TEST_KEYS": "x"}
    wrong: list[str] = []
    with Superd() as superd, Superd() as fresh:
        for one in (superd, fresh):
            prepare(one)
        before, after = World(superd, names), World(fresh, names)
        try:
            before.write("old")
            superd.start("--no-watch", environment=given)
            pids = before.use()
            seen = before.observe(pids)
            sockets = before.inodes()
            before.write("new")
            plan = reload(superd)
            for name, (change, mode) in names.items():
                row = plan.get(name, {"action": "nothing", "keys": []})
                wanted = expected(change, mode)
                if (row["action"], row["keys"]) != (wanted, [change.plan or change.key]):
                    wrong.append(f"{name}: {row['action']} {row['keys']}, not {wanted}")
            renewed = [n for n, (_, mode) in names.items() if mode != CONN and plan[n]["action"] == "restart"]
            eventually(lambda: [n for n in renewed if pid_of(superd, n) in (0, pids[n])], [])
            now = before.use()
            for name, (_, mode) in names.items():
                restarted = plan[name]["action"] == "restart"
                if mode != CONN and (pids[name] != now[name]) is not restarted:
                    wrong.append(f"{name}: pid {pids[name]}, then {now[name]}")
            alive = {row["pid"] for row in superd.call("Connections")["connections"]}
            wrong += [f"{name}: its connection was cut" for name, (_, mode) in names.items()
                      if mode == CONN and pids[name] not in alive]  # fmt: skip
            for name, rows in before.inodes().items():
                stay = sockets[name][: len(rows)] if names[name][0].key != "listen" else []
                if rows[: len(stay)] != stay:
                    wrong.append(f"{name}: another socket")
            then = before.observe(now)
            after.write("new")
            fresh.start("--no-watch", environment=given)
            wanted_state = after.observe(after.use())
            for name, (change, _) in names.items():
                for text in differences(then[name], wanted_state[name]):
                    wrong.append(f"{name}: not as after a fresh start: {text}")
                if change.shown and not differences(seen[name], then[name]):
                    wrong.append(f"{name}: nothing shows the change")
        finally:
            before.close()
            after.close()
    assert not wrong, "\n".join(wrong)


def in_place(superd: Superd, name: str, text: str, *keys: str) -> None:
    superd.write(name, text)
    row = reload(superd)[name]
    assert (row["action"], tuple(row["keys"])) == ("in place", keys)


CAT = f'listen = "{TCP}"\ncommand = ["/bin/cat"]\n'
HELD = CAT + '[limits]\nfirst_byte_timeout = "1h"\n'


@pytest.mark.parametrize("access", ["", '[access]\nallow = ["127.0.0.0/8"]\n'])
def test_clients_that_wait_for_admission(superd: Superd, access: str) -> None:  # G16
    """A reload cuts none of them; they wait by the new rules, or are let in."""
    superd.write("a", HELD)
    superd.start("--no-watch")
    with superd.connect("a") as one, superd.connect("a") as two:
        eventually(lambda: superd.call("Connections")["connections"], [])
        if access:
            in_place(superd, "a", HELD + access, "access")
        in_place(superd, "a", CAT + access, "limits.first_byte_timeout")
        assert ask(one, b"x") == b"x"
        assert ask(two, b"y") == b"y"


def test_client_that_is_denied_now(superd: Superd) -> None:
    superd.write("a", HELD)
    superd.start("--no-watch")
    with superd.connect("a") as one, superd.connect("a") as two:
        two.sendall(b"y")
        assert two.recv(1) == b"y"  # `one` has been accepted before
        in_place(superd, "a", HELD + '[access]\ndeny = ["127.0.0.1"]\n', "access")
        assert read_all(one) == b""
        assert ask(two, b"y") == b"y"
    superd.wait_record(event="refused", message=re.compile("access: deny 127.0.0.1"))


STUBBORN = """
import signal
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("up", flush=True)
while True:
    signal.pause()
"""


def stubborn(**keys: str) -> str:
    lines = "".join(f"{key} = {value}\n" for key, value in keys.items())
    return f"command = [{PYTHON!r}, '-c', '''{STUBBORN}''']\n{lines}"


def test_limits_of_what_is_under_way(superd: Superd) -> None:
    """A start, a stop and checks that go on for ever are ended by a file that says when."""
    superd.write("start", stubborn(ready='"notify"', ready_timeout='"1h"', stop_timeout='"1s"'))
    superd.write("stop", stubborn(stop_timeout='"1h"'))
    superd.start("--no-watch")
    superd.wait_records(2, event="output", message="up")
    superd.call("Stop", names=["stop"], wait=False)
    eventually(lambda: superd.status("stop")["state"], "stopping")
    in_place(superd, "start", stubborn(ready='"notify"', ready_timeout='"1s"', stop_timeout='"1s"'), "ready_timeout")
    superd.wait_record(service="start", message=re.compile("READY=1 within 1 s"))
    in_place(superd, "stop", stubborn(stop_timeout='"100ms"'), "stop_timeout")
    superd.wait_record(event="exit", service="stop", signal="KILL")


def test_health_that_is_not_checked_any_more(superd: Superd) -> None:
    text = 'command = ["/bin/sleep", "99"]\n'
    health = '[health]\ncheck = "exec:/bin/false"\nevery = "50ms"\nfailures = 1\nthen = "report"\n'
    superd.write("a", text + health)
    superd.start("--no-watch")
    superd.wait_record(event="health", service="a")
    in_place(superd, "a", text, "health")
    assert superd.status("a")["note"] == ""
    in_place(superd, "a", text + health.replace("1", "2"), "health")
    superd.wait_records(2, event="health", service="a", level="err")


def test_fd_store_where_there_was_none(superd: Superd) -> None:
    """The process learns of it at its start only, so it takes another one."""
    text = 'command = ["/bin/sleep", "99"]\n'
    superd.write("a", text)
    superd.start("--no-watch")
    superd.wait_for("a", "ready")
    superd.write("a", text + "fdstore = 3\n")
    assert reload(superd)["a"]["action"] == "restart"
    superd.write("a", text + "fdstore = 4\n")
    assert reload(superd)["a"]["action"] == "in place"


BLOCKED = "open({!r}).close()\ndef serve(conn):\n    conn.output.write(b'{}')\n"


def test_context_changes_while_a_handler_is_imported(superd: Superd) -> None:
    room = superd.room("code")
    (room / "slow.py").write_text(BLOCKED.format("/dev/null", "old"))
    text = f'listen = "{TCP}"\nhandler = "slow:serve"\ncwd = "{room}"\n'
    superd.write("a", text)
    superd.start("--no-watch")
    with superd.connect("a") as client:
        assert read_all(client) == b"old"
    gate = room / "gate"
    os.mkfifo(gate)
    (room / "slow.py").write_text(BLOCKED.format(str(gate), "new"))
    superd.call("Restart", names=["a"], wait=False)
    eventually(lambda: superd.status("a")["state"], "starting")
    superd.write("a", text + 'umask = "0077"\n')
    assert reload(superd)["a"]["action"] == "restart"
    opened = os.open(gate, os.O_RDWR)  # whoever opens it from now on goes through as well
    try:
        with superd.connect("a") as client:
            assert read_all(client) == b"new"
    finally:
        os.close(opened)
    assert superd.status("a")["state"] == "listening"


def test_description_does_not_keep_it_busy(superd: Superd) -> None:
    """idle_timeout goes on where nothing of it has changed."""
    text = f'listen = "{TCP}"\nrun = "on-demand"\nidle_timeout = "2s"\ncommand = ["{PYTHON}", "-c", "{{}}"]\n'
    code = "import socket, time; c = socket.socket(fileno=3).accept()[0]; c.close(); time.sleep(99)"
    superd.write("a", text.format(code))
    superd.start("--no-watch")
    with superd.connect("a") as client:
        assert read_all(client) == b""
    number = 0

    def stopped() -> bool:
        nonlocal number
        number += 1
        superd.write("a", text.format(code) + f'description = "{number}"\n')
        reload(superd)
        return superd.status("a")["state"] == "listening"

    eventually(stopped, True)
    assert superd.find_records(service="a", message=re.compile("nobody has used it"))


# test_reload.py, test_handlers.py, test_proxy.py and test_builtins.py change these; chroot needs a directory with a
# program in it.
ELSEWHERE = {"handler", "builtin", "run", "ready", "sandbox.chroot", "socket.listen", "socket.reuse_port",
             "socket.protocol", "rlimit", "scheduling", "sandbox", "proxy"}  # fmt: skip


def test_every_key_of_a_process_or_socket_is_tried() -> None:
    tried = {change.key for change in SHOWN} | ELSEWHERE
    tables = {
        "service": "",
        "socket": "socket.",
        "rlimit": "rlimit.",
        "scheduling": "scheduling.",
        "sandbox": "sandbox.",
    }
    wanted = {
        prefix + key.name for table, prefix in tables.items() for key in BY_TABLE[table].values()
        if key.change != "in place"
    }  # fmt: skip
    assert wanted - tried == set()
