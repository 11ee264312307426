"""superd and the superservers it is measured beside: how each is found, configured, started and stopped.

All of them serve the same program on 127.0.0.1, as nobody, with limits out of the way and a backlog that holds every
client. superd logs each connection to a file; the others log nothing, as their packages come.
"""

from __future__ import annotations

import os
import pwd
import random
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import procfs

GREETING = b"hello from the service\n"  # as in hello.c
NOBODY = pwd.getpwnam("nobody")
SBIN = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/local/sbin", "/usr/sbin", "/sbin"])


class Missing(Exception):
    """A daemon that cannot take part; the text says why."""


@dataclass
class Daemon:
    """A running daemon. Whoever started it calls stop()."""

    name: str
    process: subprocess.Popen[bytes]
    ports: list[int]
    log: Path
    undo: Callable[[], None] = field(default=lambda: None)

    @property
    def port(self) -> int:
        return self.ports[0]

    @property
    def pid(self) -> int:
        return self.process.pid

    def tail(self) -> str:
        """The last lines it wrote, for an error message."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-5:])

    def stop(self) -> None:
        """TERM, up to 15 s of patience, then KILL to each of its processes that is left."""
        family = procfs.tree(self.pid) if self.process.poll() is None else []
        if family:
            self.process.terminate()
        try:
            self.process.wait(15)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        for each in family[1:]:
            left = procfs.process(each.pid)
            if left is not None and left.start == each.start:
                os.kill(each.pid, signal.SIGKILL)
        self.undo()


@dataclass(frozen=True)
class Bench:
    """What every daemon is started with. `work` belongs to root, mode 0755; `packages` holds unpacked packages."""

    work: Path
    hello: Path
    superd: tuple[str, ...]
    packages: tuple[Path, ...]

    def find(self, program: str, package: str) -> str:
        """The path of `program`: out of an unpacked package, else the installed one."""
        for packages in self.packages:
            for directory in ("usr/sbin", "usr/bin"):
                if os.access(path := packages / package / directory / program, os.X_OK):
                    return str(path)
        if (found := shutil.which(program, path=SBIN)) is None:
            raise Missing(f"no {program} (package {package})")
        return found


def free_ports(count: int) -> list[int]:
    """Ports that are free now, because none of the others can say which port the kernel chose for it.

    They lie below those that the kernel gives to clients (ip(7), ip_local_port_range): there, one of the many clients
    could take the port before its daemon has, or, asking whether that is up, get connected to itself (RFC 9293, 3.5).
    """
    found: list[int] = []
    for port in random.sample(range(10_000, 32_000), 1000):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        found.append(port)
        if len(found) == count:
            return found
    raise Missing("no free port between 10000 and 32000")


def answers(port: int) -> bool:
    """Whether the service behind `port` gives its greeting."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=5) as client, client.makefile("rb") as stream:
            return stream.read() == GREETING
    except OSError:
        return False


def listens(port: int) -> bool:
    """Whether anybody listens there, found out without a connection, which would be the first one."""
    wanted = f"0100007F:{port:04X}"
    rows = (line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:])
    return any(row[1] == wanted and row[3] == "0A" for row in rows)


def launch(
    bench: Bench,
    name: str,
    command: Sequence[str],
    ports: list[int],
    user: int | None = None,
    is_up: Callable[[int], bool] = answers,
) -> Daemon:
    """Start `command`, its output in a file, and wait until every port answers, or whatever `is_up` asks.

    Raises Missing when it ends or does not answer within 15 s.
    """
    log = bench.work / f"{name}.{ports[0]}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=bench.work, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
            user=user, group=user and NOBODY.pw_gid, extra_groups=None if user is None else [],
        )  # fmt: skip
    daemon = Daemon(name, process, ports, log)
    waiting = list(ports)
    for _ in procfs.until(time.monotonic() + 15):
        if process.poll() is not None:
            break
        while waiting and is_up(waiting[0]):
            del waiting[0]
        if not waiting:
            return daemon
    status = process.poll()
    daemon.stop()
    how = "does not answer" if status is None else f"ended with status {status}"
    raise Missing(f"{name} {how}: {daemon.tail() or 'it said nothing'}")


MANY = "[limits]\nmax_connections = 1000\n"


def superd_config(bench: Bench, ports: Sequence[int], runs: str | None = None, limits: str = MANY) -> list[str]:
    """Write a directory for superd, one service for each port, and return the command line. runs: what, as keys."""
    runs = runs or f'command = ["{bench.hello}"]'
    directory = bench.work / f"superd.{ports[0]}"
    (directory / "conf.d").mkdir(parents=True)
    for number, port in enumerate(ports):
        (directory / "conf.d" / f"hello{number}.toml").write_text(
            f'listen  = "tcp:127.0.0.1:{port}"\n{runs}\nuser    = "nobody"\n{limits}'
        )
    control = f"unix:{directory / 'control.sock'}"
    return [*bench.superd, "-c", str(directory), "--control", control, "--log", "logfmt"]


def start_superd(bench: Bench, services: int = 1) -> Daemon:
    ports = free_ports(services)
    return launch(bench, "superd", superd_config(bench, ports), ports)


def start_superd_handler(bench: Bench) -> Daemon:
    """The same service as a Python function."""
    (port,) = free_ports(1)
    code = bench.work / "greeting.py"
    code.write_text(f"def greet(connection):\n    connection.output.write({GREETING!r})\n")
    command = superd_config(bench, [port], f'handler = "greeting:greet"\ncwd = "{bench.work}"')
    return launch(bench, "superd-handler", command, [port])


def start_xinetd_python(bench: Bench) -> Daemon:
    """The same service as a Python script, in a Python that nobody can reach."""
    python = shutil.which("python3", path="/usr/local/bin:/usr/bin")
    if python is None:
        raise Missing("no python3 in /usr/bin")
    script = bench.work / "greeting-script.py"
    script.write_text(f"import sys\nsys.stdout.buffer.write({GREETING!r})\n")
    return start_xinetd(bench, "xinetd-python", f"{python}\n    server_args = -I {script}")


def start_xinetd(bench: Bench, name: str = "xinetd", server: str = "") -> Daemon:
    (port,) = free_ports(1)
    server = server or str(bench.hello)
    program, config = bench.find("xinetd", "xinetd"), bench.work / f"xinetd.{port}.conf"
    config.write_text(
        "service hello\n{\n"
        "    type = UNLISTED\n    flags = IPv4 NOLIBWRAP\n    bind = 127.0.0.1\n"
        f"    port = {port}\n    socket_type = stream\n    protocol = tcp\n    wait = no\n"
        f"    user = nobody\n    server = {server}\n"
        "    instances = UNLIMITED\n    per_source = UNLIMITED\n    cps = 1000000 1\n}\n"
    )
    command = [program, "-dontfork", "-f", str(config), "-pidfile", str(bench.work / f"xinetd.{port}.pid")]
    return launch(bench, name, command, [port])


def files_only(bench: Bench) -> list[str]:
    """A command prefix: users and groups from /etc alone, in a mount namespace; empty where root may not have one.

    inetd looks its user up in each child, and with `group: files systemd` in nsswitch.conf(5) each child loads
    libnss_systemd, which nearly doubles what a connection costs. That says nothing about inetd, so it is spared.
    """
    switch = bench.work / "nsswitch.conf"
    switch.write_text("passwd: files\ngroup: files\nshadow: files\nhosts: files\nservices: files\nprotocols: files\n")
    script = 'mount --bind "$0" /etc/nsswitch.conf && exec "$@"'
    prefix = ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, str(switch)]
    try:
        works = subprocess.run([*prefix, "true"], capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        works = False
    return prefix if works else []


def start_openbsd_inetd(bench: Bench) -> Daemon:
    (port,) = free_ports(1)
    program, config = bench.find("inetd", "openbsd-inetd"), bench.work / f"inetd.{port}.conf"
    config.write_text(f"127.0.0.1:{port} stream tcp nowait nobody {bench.hello} hello\n")
    # It writes its pid where a system's inetd would: put back what was there.
    pid_file = Path("/run/inetd.pid")
    before = pid_file.read_bytes() if pid_file.exists() else None

    def undo() -> None:
        pid_file.unlink(missing_ok=True)
        if before is not None:
            pid_file.write_bytes(before)

    try:
        command = [*files_only(bench), program, "-i", "-R", "1000000000", str(config)]
        daemon = launch(bench, "openbsd-inetd", command, [port])
    except Missing:
        undo()
        raise
    daemon.undo = undo
    return daemon


def start_tcpserver(bench: Bench) -> Daemon:
    (port,) = free_ports(1)
    program = bench.find("tcpserver", "ucspi-tcp")
    nobody = ["-u", str(NOBODY.pw_uid), "-g", str(NOBODY.pw_gid)]
    options = ["-q", "-H", "-R", "-l0", "-c", "1000", "-b", "4096", *nobody]  # its own backlog of 20 drops clients
    return launch(bench, "tcpserver", [program, *options, "127.0.0.1", str(port), str(bench.hello)], [port])


def start_superd_on_demand(bench: Bench) -> Daemon:
    """Nobody has asked for the service yet."""
    (port,) = free_ports(1)
    runs = f'command = ["{bench.work / "listen"}"]\nrun = "on-demand"\npass = "listen-fds"'
    return launch(bench, "superd", superd_config(bench, [port], runs, ""), [port], is_up=listens)


def start_socket_activate_on_demand(bench: Bench) -> Daemon:
    (port,) = free_ports(1)
    command = [bench.find("systemd-socket-activate", "systemd"), "-l", f"127.0.0.1:{port}", str(bench.work / "listen")]
    return launch(bench, "systemd-socket-activate", command, [port], user=NOBODY.pw_uid, is_up=listens)


def start_socket_activate(bench: Bench) -> Daemon:
    (port,) = free_ports(1)
    program = bench.find("systemd-socket-activate", "systemd")
    command = [program, "--accept", "--inetd", "-l", f"127.0.0.1:{port}", str(bench.hello)]
    # It cannot change users: it runs as nobody altogether, which costs it nothing per connection.
    return launch(bench, "systemd-socket-activate", command, [port], user=NOBODY.pw_uid)


SLOW = {"xinetd-python": 10}  # this many times fewer connections, so that it takes no minutes
STARTERS: dict[str, Callable[[Bench], Daemon]] = {
    "superd": start_superd,
    "xinetd": start_xinetd,
    "openbsd-inetd": start_openbsd_inetd,
    "tcpserver": start_tcpserver,
    "systemd-socket-activate": start_socket_activate,
    "superd-handler": start_superd_handler,
    "xinetd-python": start_xinetd_python,
}


def install(into: Path) -> None:
    """Get the peers from the Debian archive. Those that exclude each other are unpacked in `into`, not installed.

    Of those, only the libraries that they need are installed. Raises CalledProcessError.
    """
    environment = dict(os.environ, DEBIAN_FRONTEND="noninteractive")

    def run(*command: str) -> None:
        subprocess.run(command, check=True, cwd=into, env=environment, stdout=sys.stderr)

    def installed(package: str) -> bool:
        query = ["dpkg-query", "-W", "-f", "${db:Status-Status}", package]
        return subprocess.run(query, capture_output=True, text=True, check=False).stdout.startswith("installed")

    run("apt-get", "-q", "update")
    wanted = ["gcc", "libc6-dev", "ucspi-tcp", "systemd", "util-linux"]
    for package in ("xinetd", "openbsd-inetd"):
        run("apt-get", "-q", "download", package)
        (archive,) = into.glob(f"{package}_*.deb")
        run("dpkg-deb", "-x", str(archive), str(into / package))
        depends = subprocess.check_output(["dpkg-deb", "-f", str(archive), "Depends"], text=True)
        wanted += [words.split()[0] for words in depends.split(",") if words.strip().startswith("lib")]
    if absent := [package for package in wanted if not installed(package)]:  # what is there is not upgraded
        run("apt-get", "-q", "install", "-y", "--no-install-recommends", "--no-remove", *absent)


def trusted(directory: Path) -> bool:
    """Whether root may run programs that lie in `directory`: it is root's and nobody else writes there."""
    try:
        facts = directory.lstat()
    except OSError:
        return False
    return facts.st_uid == 0 and not facts.st_mode & 0o022 and directory.is_dir()


def superd_version(command: Sequence[str]) -> str:
    """What `--version` prints. Raises Missing where superd is not installed for that interpreter."""
    try:
        done = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Missing(f"cannot run {shlex.join(command)}: {error}") from error
    if done.returncode:
        raise Missing(f"{shlex.join(command)} --version: {(done.stderr.strip().splitlines() or ['failed'])[-1]}")
    return done.stdout.strip()
