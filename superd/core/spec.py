"""What a service is: frozen values, already valid.

core/schema.py makes them from TOML, runtime code reads them and never edits one. Every duration
is in seconds (`_s`), every size in bytes, every mode a plain int (0o660). A spec holds no path that
is relative, no `${NAME}` that is not expanded (except those that only run time knows, see Command)
and no default that is missing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Scheme = Literal[
    "tcp", "tcp4", "tcp6", "udp", "udp4", "udp6", "unix", "unix-dgram", "unix-seqpacket", "vsock", "fifo", "fd"
]
Run = Literal["per-connection", "on-demand", "always-on", "once"]
Pass = Literal["stdio", "listen-fds"]
KillMode = Literal["tree", "group", "process"]
Restart = Literal["no", "on-success", "on-failure", "on-abnormal", "on-abort", "on-watchdog", "always"]


@dataclass(frozen=True, slots=True)
class Address:
    """Where a socket listens. `str(address)` is the canonical form that all output uses.

    host  numeric address without brackets, scope included ("fe80::1%eth0"), or "localhost"; None: every address
    port  0-65535 for IP, any 32 bit number for vsock; 0 lets the kernel choose
    path  absolute path of a UNIX socket or FIFO, "@name" for an abstract one; the NAME of fd:NAME
    cid   vsock context id, None for any
    """

    scheme: Scheme
    host: str | None = None
    port: int | None = None
    path: str | None = None
    cid: int | None = None

    @property
    def is_ip(self) -> bool:
        return self.scheme[:3] in ("tcp", "udp")

    @property
    def is_unix(self) -> bool:
        return self.scheme.startswith("unix")

    @property
    def is_abstract(self) -> bool:
        return self.is_unix and (self.path or "").startswith("@")

    @property
    def kind(self) -> Literal["stream", "datagram", "seqpacket", "fifo", "unknown"]:
        """Socket type. "unknown" for fd:NAME, whose type only the kernel knows."""
        return _KINDS[self.scheme]

    @property
    def accepts(self) -> bool:
        """Whether connections are accepted from it (also true where only the kernel knows)."""
        return self.kind in ("stream", "seqpacket", "unknown")

    def __str__(self) -> str:
        if self.scheme == "vsock":
            return f"vsock:{'*' if self.cid is None else self.cid}:{self.port}"
        if not self.is_ip:
            return f"{self.scheme}:{self.path}"
        if self.host is None:
            return f"{self.scheme}:{self.port}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}:{host}:{self.port}"


_KINDS: dict[str, Literal["stream", "datagram", "seqpacket", "fifo", "unknown"]] = {
    "tcp": "stream", "tcp4": "stream", "tcp6": "stream", "udp": "datagram", "udp4": "datagram", "udp6": "datagram",
    "unix": "stream", "unix-dgram": "datagram", "unix-seqpacket": "seqpacket", "vsock": "stream", "fifo": "fifo",
    "fd": "unknown",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class KeepAlive:
    """TCP keep-alive, tcp(7). None: the kernel's own value."""

    idle_s: float | None = None
    interval_s: float | None = None
    count: int | None = None


@dataclass(frozen=True, slots=True)
class SocketSpec:
    """One `[[socket]]` table, or one entry of `listen`. None means: leave the kernel's default."""

    address: Address
    name: str  # for LISTEN_FDNAMES
    backlog: int = 4096
    mode: int = 0o666
    user: str | int | None = None
    group: str | int | None = None
    directory_mode: int = 0o755
    remove_on_stop: bool = True
    symlinks: tuple[str, ...] = ()
    reuse_port: bool = False
    free_bind: bool = False
    transparent: bool = False
    broadcast: bool = False
    device: str | None = None
    no_delay: bool = False
    keep_alive: KeepAlive | None = None
    defer_accept_s: float | None = None
    receive_buffer: int | None = None
    send_buffer: int | None = None
    mark: int | None = None
    tos: int | None = None
    ttl: int | None = None
    priority: int | None = None
    congestion: str | None = None
    protocol: Literal["mptcp", "sctp", "udplite"] | None = None
    pass_credentials: bool = False
    pass_packet_info: bool = False
    timestamping: bool = False
    multicast: tuple[str, ...] = ()  # "GROUP" or "GROUP%INTERFACE"
    nonblocking: bool = False


@dataclass(frozen=True, slots=True)
class RateSpec:
    """`count` events in any window of `per_s` seconds."""

    count: int
    per_s: float


@dataclass(frozen=True, slots=True)
class Limits:
    """The `[limits]` table. None: off."""

    max_connections: int = 64
    on_full: Literal["wait", "refuse"] = "wait"
    max_per_source: int | None = None
    rate: RateSpec | None = None
    rate_per_source: RateSpec | None = None
    refuse_message: bytes = b""


@dataclass(frozen=True, slots=True)
class Context:
    """An execution context: what a spawner enters once, for good (system/context.py).

    Services whose contexts are equal share spawners. user None: superd's own identity is kept (never so as
    root, where the loader writes "nobody" or what the file says). groups None: the user's own (initgroups).
    rlimits: (name without RLIMIT_, soft, hard), -1 for infinity; hard None keeps the hard limit.
    """

    user: str | int | None = None
    group: str | int | None = None
    groups: tuple[str | int, ...] | None = None
    umask: int = 0o022
    cwd: str = "/"
    rlimits: tuple[tuple[str, int, int | None], ...] = ()
    nice: int | None = None
    ioprio: str | None = None  # "idle", "best-effort:N", "realtime:N"
    oom_score_adjust: int | None = None
    cpu_affinity: tuple[int, ...] | None = None
    no_new_privileges: bool = True


@dataclass(frozen=True, slots=True)
class Output:
    """Where stdout or stderr goes. path only for kind "file"."""

    kind: Literal["log", "socket", "null", "inherit", "file"] = "log"
    path: str | None = None


@dataclass(frozen=True, slots=True)
class Ready:
    """When a service counts as ready: at once ("start") or when it says so ("notify": READY=1)."""

    kind: Literal["start", "notify"] = "start"


@dataclass(frozen=True, slots=True)
class RestartPolicy:
    policy: Restart = "no"
    delay_s: float = 0.1
    delay_max_s: float = 30.0
    limit: RateSpec | None = None
    success_status: tuple[int | str, ...] = (0,)  # exit statuses, signal names without SIG


@dataclass(frozen=True, slots=True)
class ServiceSpec:
    """One service.

    name          stem of its file, with "@instance" for an instance of a template
    source        the file that defines it, as it was named
    command       program and arguments; `${port}`, `${port:S}`, `${fd:S}` are still in it, because only a bound
                  socket or a plan knows them (core/plan.py fills them in; `$${` stays escaped until then)
    environment   what superd adds for the service alone, in order: file, then table. The same four are still in it
    """

    name: str
    source: str
    command: tuple[str, ...]
    run: Run
    pass_: Pass
    sockets: tuple[SocketSpec, ...] = ()
    description: str = ""
    enabled: bool = True
    argv0: str | None = None
    fd_protocols: tuple[str, ...] = ("systemd",)
    stderr: Output = Output()
    stdout: Output = Output()
    context: Context = Context()
    user_assumed: bool = False  # superd is root and the file names no user: it is nobody, and superd says so
    environment: tuple[tuple[str, str], ...] = ()
    environment_file: str | None = None
    pass_environment: tuple[str, ...] = ()
    ready: Ready = Ready()
    ready_timeout_s: float | None = 90.0
    notify_access: Literal["none", "main", "all"] = "main"
    restart: RestartPolicy = RestartPolicy()
    stop_signal: int = 15
    stop_timeout_s: float | None = 10.0
    kill_mode: KillMode = "tree"
    limits: Limits = Limits()

    @property
    def takes_connections(self) -> bool:
        return self.run == "per-connection"


@dataclass(frozen=True, slots=True)
class DaemonSpec:
    """superd.toml without [defaults], which the loader has merged into each service."""

    watch: bool = True
    control: str | None = None  # address; None: where superd(8) says
    control_mode: int = 0o600
    control_group: str | int | None = None
    control_admins: tuple[str | int, ...] = ()
    log: Literal["text", "logfmt", "json"] = "text"
    log_level: str = "info"
    stop_timeout_s: float = 30.0


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Everything that was read, in the order of the files' names: the unit of a reload.

    services  by name, in order
    broken    name -> text of its problems, for files that could not become a service
    """

    daemon: DaemonSpec = DaemonSpec()
    services: dict[str, ServiceSpec] = field(default_factory=dict)
    broken: dict[str, str] = field(default_factory=dict)
