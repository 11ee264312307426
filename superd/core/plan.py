"""(spec, facts) -> what to execute: argv, environment, fd numbers.

A Program is all that is known of a service's process before there is a reason to start it; it is what a
spawner keeps for its services and what the keeper is sent with each start. `connection_environment` and
`listen_environment` add what only the moment knows.

fds of the process: 0 is the connection (or the one socket) when `stdio`, else /dev/null; with listen-fds the
sockets stand at 3, 4, … in the order of the file. What the service has stored follows, also with `stdio`. 1 and 2 as
the Outputs say.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any

from superd.core.spec import Address, Output, ServiceSpec

LISTEN_FDS_START = 3
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

# What superd says itself and never passes on from its own environment (E13).
_NEVER_PASSED = ("LISTEN_", "NOTIFY_", "WATCHDOG_", "LD_", "PYTHON")


@dataclass(frozen=True, slots=True)
class Program:
    """One service's process.

    base_environment  below the user's HOME USER LOGNAME SHELL, which only the context knows
    environment       above them: file, table, what superd sets
    names             LISTEN_FDNAMES; empty: no socket stands at 3
    addresses         canonical address of each, for protocols that tell it
    is_handler        there is nothing to execute: the context's handler serves
    stored            names of the fds that the service has stored; they stand behind the sockets
    watchdog_usec     how often WATCHDOG=1 must come
    ready_fd          where the last of the fds that go with it stands: the service writes a line end there
    """

    service: str
    executable: str
    argv: tuple[str, ...]
    base_environment: dict[str, str]
    environment: dict[str, str]
    stdio: bool
    stdout: Output
    stderr: Output
    names: tuple[str, ...] = ()
    addresses: tuple[str, ...] = ()
    fd_protocols: tuple[str, ...] = ()
    is_handler: bool = False
    stored: tuple[str, ...] = ()
    watchdog_usec: int | None = None
    ready_fd: int | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Program:
        tuples = {key: tuple(value[key]) for key in ("argv", "names", "addresses", "fd_protocols", "stored")}
        outputs = {key: Output(**value[key]) for key in ("stdout", "stderr")}
        return cls(**{**value, **tuples, **outputs})

    @property
    def logs(self) -> bool:
        """Whether a log pipe goes with each process."""
        return "log" in (self.stdout.kind, self.stderr.kind)


def base_environment(own: Mapping[str, str], passed: Sequence[str]) -> dict[str, str]:
    """PATH, LANG, LC_*, TZ, and from superd's own environment what `pass_environment` names."""
    found = {"PATH": PATH}
    for name, value in own.items():
        if name in ("LANG", "TZ") or name.startswith("LC_"):
            found[name] = value
        elif (name in passed or "*" in passed) and not name.startswith(_NEVER_PASSED):
            found[name] = value
    return _base(tuple(found.items()))


@lru_cache(maxsize=64)
def _base(items: tuple[tuple[str, str], ...]) -> dict[str, str]:
    """Thousands of services have the same; nobody changes it."""
    return dict(items)


def plan_program(
    spec: ServiceSpec,
    argv: Sequence[str],
    environment: Mapping[str, str],
    own_environment: Mapping[str, str],
    sockets: Sequence[tuple[str, Address]],
) -> Program:
    """What to execute.

    argv, environment  the spec's, with what only run time knows filled in (values.expand_runtime)
    sockets            name and address of each open listener; "localhost" and fd:NAME may be several of one name
    """
    listens = spec.pass_ == "listen-fds"
    if spec.takes_connections:
        names: tuple[str, ...] = ("connection",) if listens else ()
    else:
        names = tuple(name for name, _ in sockets) if listens and spec.gives_sockets else ()
    return Program(
        service=spec.name,
        executable=argv[0] if argv else "",
        argv=(spec.argv0 or argv[0], *argv[1:]) if argv else (),
        base_environment=base_environment(own_environment, spec.pass_environment),
        environment={**environment, "SUPERD_SERVICE": spec.name},
        stdio=not listens and bool(spec.sockets),
        stdout=spec.stdout,
        stderr=spec.stderr,
        names=names,
        addresses=tuple(str(address) for _, address in sockets),
        fd_protocols=spec.fd_protocols,
        is_handler=spec.context.handler is not None,
        ready_fd=spec.ready.fd,
    )


def without_sockets(program: Program) -> Program:
    """For a command beside the main process: what would be the socket is /dev/null for input, the log for output, and
    it is not asked to say that it is ready."""
    outputs = [Output() if output.kind == "socket" else output for output in (program.stdout, program.stderr)]
    return replace(
        program, argv=(program.executable, *program.argv[1:]), stdio=False, stdout=outputs[0], stderr=outputs[1],
        names=(), addresses=(), ready_fd=None,
    )  # fmt: skip


def listen_environment(program: Program, pid: int, pidfd_inode: int | None, *, generation: int = 1) -> dict[str, str]:
    """The variables of each fd protocol (PROTOCOLS.md 2.1, 2.11, 2.13), for the process `pid` that will exec."""
    names = program.names + program.stored
    found: dict[str, str] = {}
    # Stored fds have no other protocol to be told by, whatever the file says of the sockets.
    if names and ("systemd" in program.fd_protocols or program.stored):
        found |= {"LISTEN_FDS": str(len(names)), "LISTEN_PID": str(pid), "LISTEN_FDNAMES": ":".join(names)}
        if pidfd_inode is not None:
            found["LISTEN_PIDFDID"] = str(pidfd_inode)
    fds = [str(LISTEN_FDS_START + i) for i in range(len(program.names))]
    if not fds:
        return found
    if "upstart" in program.fd_protocols:
        found["UPSTART_FDS"] = " ".join(fds)
        found |= {"UPSTART_EVENTS": "socket", "UPSTART_JOB": program.service.partition("@")[0]}
        found["UPSTART_INSTANCE"] = program.service.partition("@")[2]
        found |= _upstart_address(program.addresses[0]) if program.addresses else {}
    if "einhorn" in program.fd_protocols:
        found |= {"EINHORN_FD_COUNT": str(len(fds)), "EINHORN_FDS": " ".join(fds)}
        found |= {f"EINHORN_FD_{i}": fd for i, fd in enumerate(fds)}
    if "server-starter" in program.fd_protocols:
        pairs = zip(map(_server_starter_address, program.addresses), fds, strict=False)
        found["SERVER_STARTER_PORT"] = ";".join(f"{address}={fd}" for address, fd in pairs)
        found["SERVER_STARTER_GENERATION"] = str(generation)
    if "catflap" in program.fd_protocols:
        found["LISTEN_FD"] = fds[0]
    return found


def watchdog_environment(program: Program, pid: int) -> dict[str, str]:
    """sd_watchdog_enabled(3), for the process `pid` that will exec: another one must not think that it is meant."""
    if program.watchdog_usec is None:
        return {}
    return {"WATCHDOG_USEC": str(program.watchdog_usec), "WATCHDOG_PID": str(pid)}


def _upstart_address(address: str) -> dict[str, str]:
    """upstart-socket-bridge(8): PROTO with PORT and ADDR, or SOCKET_PATH."""
    scheme, _, rest = address.partition(":")
    if not scheme.startswith(("tcp", "udp")):
        return {"PROTO": "unix", "SOCKET_PATH": rest} if scheme.startswith("unix") else {}
    host, _, port = rest.rpartition(":")
    host = host.strip("[]")
    if not host:
        host = "0.0.0.0" if scheme.endswith("4") else "::"
    return {"PROTO": "inet6" if ":" in host else "inet", "PORT": port, "ADDR": host}


def _server_starter_address(address: str) -> str:
    """Server::Starter writes HOST:PORT, a bare PORT for every address, or a path."""
    return address.partition(":")[2]


def connection_environment(family: str, facts: Mapping[str, str]) -> dict[str, str]:
    """UCSPI and systemd's variables for one connection, numeric only (E14).

    family  "tcp", "unix" or "vsock"
    facts   of remote, remote_port, local, local_port, number, uid, gid, pid, path those that are known: a client
            that has already gone leaves some out, and the service starts all the same (A5)
    """
    pairs = _CONNECTION_VARIABLES[family]
    found = {variable: facts[fact] for variable, fact in pairs if fact in facts}
    if family != "vsock":
        found["PROTO"] = "TCP" if family == "tcp" else "IPC"
    if family == "unix":
        found.setdefault("IPCREMOTEPATH", "")  # as s6-ipcserverd(8) has it; REMOTE_ADDR is left out, as systemd has it
    return found


_CONNECTION_VARIABLES: dict[str, tuple[tuple[str, str], ...]] = {
    "tcp": (
        ("REMOTE_ADDR", "remote"), ("REMOTE_PORT", "remote_port"),
        ("TCPREMOTEIP", "remote"), ("TCPREMOTEPORT", "remote_port"),
        ("TCPLOCALIP", "local"), ("TCPLOCALPORT", "local_port"), ("TCPCONNNUM", "number"),
    ),
    "unix": (
        ("REMOTE_ADDR", "path"), ("IPCREMOTEEUID", "uid"), ("IPCREMOTEEGID", "gid"), ("IPCREMOTEPATH", "path"),
        ("IPCCONNNUM", "number"),
        # ucspi-unix's names; PROTO can be only one of both, and a program that asks it to be UNIX is started by env(1).
        ("UNIXREMOTEEUID", "uid"), ("UNIXREMOTEEGID", "gid"), ("UNIXREMOTEPID", "pid"),
    ),
    "vsock": (("REMOTE_ADDR", "remote"), ("REMOTE_PORT", "remote_port")),
}  # fmt: skip
ID_VARIABLES = ("SUPERD_CONNECTION", "INVOCATION_ID")
# Of a TCP connection all of whose facts are known, in the order of `tcp_values`.
TCP_VARIABLES = (*(variable for variable, _ in _CONNECTION_VARIABLES["tcp"]), "PROTO", *ID_VARIABLES)


def tcp_values(facts: Sequence[bytes], *ids: bytes) -> tuple[bytes, ...]:
    """What `connection_environment` has for "tcp", and ID_VARIABLES, without the names: there are many connections.

    facts: remote, remote_port, number, local, local_port.
    """
    remote, remote_port, number, local, local_port = facts
    return remote, remote_port, remote, remote_port, local, local_port, number, b"TCP", *ids


CONNECTION_VARIABLES = frozenset(
    {"PROTO", *ID_VARIABLES} | {variable for pairs in _CONNECTION_VARIABLES.values() for variable, _ in pairs}
)
