"""What a service is: frozen values, already valid.

core/schema.py makes them from TOML, runtime code reads them and never edits one. Every duration
is in seconds (`_s`), every size in bytes, every mode a plain int (0o660). A spec holds no path that
is relative, no `${NAME}` that is not expanded (except those that only run time knows, see Command)
and no default that is missing.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from typing import Literal

Scheme = Literal[
    "tcp",
    "tcp4",
    "tcp6",
    "udp",
    "udp4",
    "udp6",
    "unix",
    "unix-dgram",
    "unix-seqpacket",
    "vsock",
    "fifo",
    "fd",
    "tcpmux",
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
    path  absolute path of a UNIX socket or FIFO, "@name" for an abstract one; the NAME of fd:NAME; the name of a
          service behind tcpmux, "+name" where superd says that it is there
    cid   vsock context id, None for any
    """

    scheme: Scheme
    host: str | None = None
    port: int | None = None
    path: str | None = None
    cid: int | None = None

    @property
    def is_ip(self) -> bool:
        return self.scheme[:3] in ("tcp", "udp") and self.scheme != "tcpmux"

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
        return self.with_port(str(self.port))

    def with_port(self, port: str) -> str:
        """The canonical form of an IP address with these words for its port."""
        if self.host is None:
            return f"{self.scheme}:{port}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}:{host}:{port}"


_KINDS: dict[str, Literal["stream", "datagram", "seqpacket", "fifo", "unknown"]] = {
    "tcp": "stream", "tcp4": "stream", "tcp6": "stream", "udp": "datagram", "udp4": "datagram", "udp6": "datagram",
    "unix": "stream", "unix-dgram": "datagram", "unix-seqpacket": "seqpacket", "vsock": "stream", "fifo": "fifo",
    "fd": "unknown", "tcpmux": "stream",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class KeepAlive:
    """TCP keep-alive, tcp(7). None: the kernel's own value."""

    idle_s: float | None = None
    interval_s: float | None = None
    count: int | None = None


@dataclass(frozen=True, slots=True)
class Sni:
    """A certificate for one name, in lower case, or for "*.example.org": all with one label more."""

    name: str
    certificate: str
    key: str


@dataclass(frozen=True, slots=True)
class Tls:
    """The `tls` table of a socket. Paths of PEM files; client_ca None: clients are not asked who they are."""

    certificate: str
    key: str
    sni: tuple[Sni, ...] = ()
    client_ca: str | None = None
    client_certificate: Literal["required", "optional"] = "required"
    min_version: Literal["1.2", "1.3"] = "1.2"
    alpn: tuple[str, ...] = ()
    handshake_timeout_s: float = 10.0

    @property
    def files(self) -> tuple[str, ...]:
        """Each once."""
        named = [path for one in self.sni for path in (one.certificate, one.key)]
        return tuple(dict.fromkeys(filter(None, (self.certificate, self.key, self.client_ca, *named))))


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
    proxy_protocol: bool | Literal["optional"] = False
    proxy_trusted: tuple[AccessRule, ...] = ()  # (): whoever can connect
    tls: Tls | None = None


@dataclass(frozen=True, slots=True)
class RateSpec:
    """`count` events in any window of `per_s` seconds."""

    count: int
    per_s: float


@dataclass(frozen=True, slots=True)
class Limits:
    """The `[limits]` table. None: off."""

    max_connections: int | None = 64
    on_full: Literal["wait", "refuse"] = "wait"
    max_per_source: int | None = None
    rate: RateSpec | None = None
    rate_per_source: RateSpec | None = None
    refuse_message: bytes = b""
    max_runtime_s: float | None = None
    first_byte_timeout_s: float | None = None
    max_load: float | None = None
    min_memory: int | None = None


@dataclass(frozen=True, slots=True)
class CpuTime:
    """`quota` microseconds of CPU time in each `period`, as the kernel's cpu.max has them."""

    quota: int
    period: int

    def __str__(self) -> str:
        """As the kernel reads it."""
        return f"{self.quota} {self.period}"


@dataclass(frozen=True, slots=True)
class Cgroup:
    """The `[cgroup]` table: what all processes of a service have together. None: off."""

    memory_max: int | None = None
    pids_max: int | None = None
    cpu_max: CpuTime | None = None

    def files(self) -> dict[str, str]:
        """Name and text of each file of a group of cgroups(7) v2 that holds a limit; "max" where there is none."""
        limits = (self.memory_max, self.pids_max, self.cpu_max)
        return {name: "max" if limit is None else str(limit) for name, limit in zip(CGROUP_FILES, limits, strict=True)}

    def controllers(self) -> tuple[str, ...]:
        """Those that the limits need."""
        return tuple(name.partition(".")[0] for name, text in self.files().items() if text != "max")


CGROUP_FILES = ("memory.max", "pids.max", "cpu.max")


@dataclass(frozen=True, slots=True)
class AccessRule:
    """One entry of `allow` or `deny`.

    text   as it is shown
    value  network: the packed address, of which `length` bits count; user, group: the id; host: ".example.org"
    """

    text: str
    kind: Literal["network", "user", "group", "host"]
    value: bytes | int | str
    length: int = 0


@dataclass(frozen=True, slots=True)
class Hours:
    """A span of local time on some days; one that ends before it begins ends on the next day.

    days        0 is Monday
    start, end  minutes since midnight
    """

    text: str
    days: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Access:
    """The `[access]` table: who may connect, and when. Empty: everybody, always."""

    allow: tuple[AccessRule, ...] = ()
    deny: tuple[AccessRule, ...] = ()
    hours: tuple[Hours, ...] = ()


@dataclass(frozen=True, slots=True)
class Context:
    """An execution context: what a spawner enters once, for good (system/context.py).

    Services whose contexts are equal share spawners. user None: superd's own identity is kept (never so as
    root, where the loader writes "nobody" or what the file says). groups None: the user's own (initgroups).
    rlimits: (name without RLIMIT_, soft, hard), -1 for infinity.
    capabilities: what the bounding set keeps, without CAP_; None: all. cwd counts from chroot, read_only and
    read_write do not. owner: the service that has this context alone, where something in it is private. grouped: its
    spawners are in the owner's cgroup, because that has limits.
    handler: "package.module:function" that its spawners import.
    """

    user: str | int | None = None
    group: str | int | None = None
    groups: tuple[str | int, ...] | None = None
    umask: int = 0o022
    cwd: str = "/"
    rlimits: tuple[tuple[str, int, int], ...] = ()
    nice: int | None = None
    ioprio: str | None = None  # "idle", "best-effort:N", "realtime:N"
    oom_score_adjust: int | None = None
    cpu_affinity: tuple[int, ...] | None = None
    no_new_privileges: bool = True
    chroot: str | None = None
    capabilities: tuple[str, ...] | None = None
    ambient_capabilities: tuple[str, ...] = ()
    private_tmp: bool = False
    private_network: bool = False
    private_pids: bool = False
    read_only: tuple[str, ...] = ()
    read_write: tuple[str, ...] = ()
    owner: str | None = None
    grouped: bool = False
    handler: str | None = None


@dataclass(frozen=True, slots=True)
class Output:
    """Where stdout or stderr goes. path only for kind "file"."""

    kind: Literal["log", "socket", "null", "inherit", "file"] = "log"
    path: str | None = None


@dataclass(frozen=True, slots=True)
class Ready:
    """When a service counts as ready, or as healthy.

    start    as soon as its program runs
    notify   READY=1, sd_notify(3)
    fd       a line end on its file descriptor `fd`, as s6 has it
    connect  a connection to `address` is accepted
    http     `url` is answered with a status of 200 to 399
    log      a line of its output matches `pattern`
    exec     `command` ends with status 0; `${port}` and its kin are still in it
    """

    kind: Literal["start", "notify", "fd", "connect", "http", "log", "exec"] = "start"
    fd: int | None = None
    address: Address | None = None
    url: str | None = None
    pattern: str | None = None
    command: tuple[str, ...] = ()

    def __str__(self) -> str:
        """As it is written in a file."""
        if self.kind == "http":
            return str(self.url)
        what = {"fd": self.fd, "connect": self.address, "log": self.pattern, "exec": shlex.join(self.command)}
        if self.address is not None and self.address.port == 0:  # that of [proxy]
            return f"connect:{self.address.with_port('${port}')}"
        return f"{self.kind}:{what[self.kind]}" if self.kind in what else self.kind


@dataclass(frozen=True, slots=True)
class Health:
    """Regular checks of a running service; `failures` in a row lead to what `then` says."""

    check: Ready
    every_s: float = 10.0
    timeout_s: float = 3.0
    failures: int = 3
    then: Literal["restart", "shutdown", "report"] = "restart"


@dataclass(frozen=True, slots=True)
class Proxy:
    """The `[proxy]` table, without `ready`, which is the service's.

    to                 where the program listens; port 0 is a free one, chosen for each start
    send_proxy_header  version of the PROXY header that comes first, 0: none
    """

    to: Address
    send_proxy_header: int = 0


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
    command       program and arguments, none for a handler or a builtin; `${port}`, `${port:S}`, `${fd:S}` are
                  still in it, because only a bound socket or a plan knows them (core/plan.py fills them in; `$${`
                  stays escaped until then)
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
    builtin: str | None = None
    workers: int = 1
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
    notify_asked: bool = False  # notify_access is written: there is a socket even if nothing else needs one
    watchdog_s: float | None = None
    fdstore: int = 0
    restart: RestartPolicy = RestartPolicy()
    essential: bool = False
    requires: tuple[str, ...] = ()
    wants: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    part_of: tuple[str, ...] = ()
    conflicts: tuple[str, ...] = ()
    stop_signal: int = 15
    stop_timeout_s: float | None = 10.0
    kill_mode: KillMode = "tree"
    reload_signal: int = 1
    idle_timeout_s: float | None = None
    start_pre: tuple[tuple[str, ...], ...] = ()
    start_post: tuple[tuple[str, ...], ...] = ()
    stop_post: tuple[tuple[str, ...], ...] = ()
    limits: Limits = Limits()
    cgroup: Cgroup = Cgroup()
    access: Access = Access()
    health: Health | None = None
    proxy: Proxy | None = None

    @property
    def takes_connections(self) -> bool:
        return self.run == "per-connection"

    @property
    def gives_sockets(self) -> bool:
        """Whether its process gets the listening sockets themselves; otherwise superd accepts."""
        return self.run != "per-connection" and self.proxy is None

    @property
    def notifies(self) -> bool:
        """Whether it gets a NOTIFY_SOCKET."""
        asked = self.notify_asked and self.notify_access != "none"
        return asked or self.ready.kind == "notify" or self.watchdog_s is not None or self.fdstore > 0


@dataclass(frozen=True, slots=True)
class DaemonSpec:
    """superd.toml without [defaults], which the loader has merged into each service."""

    watch: bool = True
    control: str | None = None  # address; None: where superd(8) says
    control_mode: int | None = None  # None: as narrow as it can be, see control_socket_mode
    control_group: str | int | None = None
    control_admins: tuple[AccessRule, ...] = ()
    log: Literal["text", "logfmt", "json"] = "text"
    log_level: str = "info"
    syslog: str | None = None
    stop_timeout_s: float = 30.0

    @property
    def control_socket_mode(self) -> int:
        """Who is given rights can connect, too. superd asks the kernel who has connected, whatever the mode."""
        if self.control_mode is not None:
            return self.control_mode
        if self.control_admins:
            return 0o666
        return 0o600 if self.control_group is None else 0o660


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Everything that was read, in the order of the files' names: the unit of a reload.

    services  by name, in order
    broken    name -> text of its problems, for files that could not become a service
    """

    daemon: DaemonSpec = DaemonSpec()
    services: dict[str, ServiceSpec] = field(default_factory=dict)
    broken: dict[str, str] = field(default_factory=dict)
