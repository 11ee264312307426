"""The table of all keys: what the loader accepts, with which default, and what a change of it takes.

It is the one source of the validator, the defaults, the reload plan, `superctl explain` and the key sections of
superd.toml(5). A kind names a converter of schema.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

# What a change of the key takes: nothing that anybody notices, a new socket, a new process.
Change = Literal["in place", "rebind", "restart"]
Table = Literal[
    "service", "socket", "limits", "access", "rlimit", "scheduling", "cgroup", "sandbox", "health", "proxy",
    "keep_alive", "tls", "superd",
]  # fmt: skip

CONN, DEMAND, ALWAYS, ONCE = "per-connection", "on-demand", "always-on", "once"
LONG = (DEMAND, ALWAYS, ONCE)  # one process for long, not one for each connection
PATHS, TCP, UDP, IP, LISTEN = (
    ("unix", "unix-dgram", "unix-seqpacket", "fifo"),
    ("tcp", "tcp4", "tcp6"),
    ("udp", "udp4", "udp6"),
    ("tcp", "tcp4", "tcp6", "udp", "udp4", "udp6"),
    ("tcp", "tcp4", "tcp6", "unix", "unix-seqpacket", "vsock"),
)
UNIX = ("unix", "unix-dgram", "unix-seqpacket")
BUFFERED = (*IP, *UNIX, "vsock", "fd")


@dataclass(frozen=True, slots=True)
class Key:
    """One key.

    table    the table it stands in; "service" and "superd" are the top level of their files
    kind     which values it takes: the name of a converter in schema.py
    default  as it would be written in TOML; None: nothing, or what `sentence` says
    modes    where it means something, () for everywhere: values of `run`, for a [[socket]] key schemes of `listen`
    choices  the words of kinds "choice" and "choices"
    low, high  bounds of numbers, durations (seconds), sizes and modes, both included
    off      whether "off" (or false) is a value: None in the spec
    """

    name: str
    table: Table
    kind: str
    default: Any
    sentence: str
    change: Change = "restart"
    modes: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    low: float | None = None
    high: float | None = None
    off: bool = False


def _keys(table: Table, *rows: tuple[Any, ...], **common: Any) -> list[Key]:
    """Rows are (name, kind, default, sentence) and, where something else is needed, a dict of the other fields."""
    return [Key(r[0], table, r[1], r[2], r[3], **{**common, **(r[4] if len(r) > 4 else {})}) for r in rows]


_PLACE = {"change": "in place"}
_POLICIES = ("no", "on-success", "on-failure", "on-abnormal", "on-abort", "on-watchdog", "always")
_FD_PROTOCOLS = ("systemd", "upstart", "einhorn", "server-starter", "catflap")

KEYS: tuple[Key, ...] = (
    *_keys(
        "service",
        ("description", "line", "", "One line for people.", _PLACE),
        ("enabled", "bool", True, "false: the file is read and checked, the service is not run.", _PLACE),
        ("instances", "instances", [], "Instances of a template (NAME@.toml) that exist from the start.", _PLACE),
        ("listen", "addresses", [], "An address or a list of addresses; instead of [[socket]].", {"change": "rebind"}),
        ("command", "command", None, "Program and arguments; a string is split as a POSIX shell splits it."),
        ("argv0", "string", None, "argv[0] where it must differ from the program as written."),
        ("handler", "handler", None, 'Instead of command: "package.module:function".', {"modes": (CONN,)}),
        ("workers", "int", 1, "Processes that hold the handler's module ready.",
         {"change": "in place", "modes": (CONN,), "low": 1, "high": 256}),
        ("builtin", "builtin", None, "Instead of command: a service inside superd.",
         {"choices": ("echo", "discard", "chargen", "daytime", "time", "tcpmux")}),
        ("run", "choice", None, "When processes are started; default by the kind of the sockets.",
         {"choices": (CONN, DEMAND, ALWAYS, ONCE)}),
        ("pass", "choice", None, "How sockets are handed over; default \"stdio\" per-connection, else \"listen-fds\".",
         {"choices": ("stdio", "listen-fds")}),
        ("fd_protocols", "choices", ["systemd"], "Whose variables announce the sockets of listen-fds.",
         {"choices": _FD_PROTOCOLS}),
        ("stderr", "output", "log", "Where standard error goes."),
        ("stdout", "output", "log", "Where standard output goes, where it is not the socket."),
        ("user", "user", None, "Who the service runs as; default superd's own user, nobody if superd is root."),
        ("group", "group", None, "Its group; default the user's own."),
        ("groups", "groups", None, "Its supplementary groups; default the user's own."),
        ("cwd", "directory", "/", "Working directory."),
        ("umask", "mode", "0022", "File mode creation mask.", {"high": 0o777}),
        ("environment", "environment", {}, "Variables for the service."),
        ("environment_file", "path", None, "File of NAME=VALUE lines, read below `environment`."),
        ("pass_environment", "variables", [], "Names from superd's own environment to pass on; [\"*\"] for all."),
        ("ready", "ready", "start", "What tells that the service is ready.", {"modes": LONG}),
        ("ready_timeout", "duration", "90s", "How long it may take to be ready.",
         {"change": "in place", "off": True, "modes": LONG}),
        ("notify_access", "choice", "main", "Whose notify messages count.",
         {"change": "in place", "choices": ("none", "main", "all"), "modes": LONG}),
        ("watchdog", "duration", None, "WATCHDOG=1 must come this often.", {"off": True, "modes": LONG}),
        ("fdstore", "int", 0, "How many fds the service may store.",
         {"change": "in place", "low": 0, "high": 4096, "modes": LONG}),
        ("restart", "choice", None, 'Which ends start it again; default "on-failure" always-on, else "no".',
         {"change": "in place", "choices": _POLICIES, "modes": LONG}),
        ("restart_delay", "duration", "100ms", "First delay before a restart; doubles with jitter.",
         {"change": "in place", "low": 0, "modes": LONG}),
        ("restart_delay_max", "duration", "30s", "Longest delay; forgotten after as long without an exit.",
         {"change": "in place", "low": 0, "modes": LONG}),
        ("restart_limit", "rate", None, "Beyond it the service is failed until it is started by hand.",
         {"change": "in place", "off": True, "modes": LONG}),
        ("success_status", "statuses", [0], "Exit statuses and signal names that count as success.",
         {"modes": LONG, **_PLACE}),
        ("essential", "bool", False, "When it has ended for good superd stops everything and exits.",
         {"change": "in place", "modes": LONG}),
        ("requires", "services", [], "Services started first, waited for, and stopped after this one.", _PLACE),
        ("wants", "services", [], "Services started along with this one.", _PLACE),
        ("after", "services", [], "Services that start before this one, if they do.", _PLACE),
        ("part_of", "services", [], "Services whose stop and restart this one follows.", _PLACE),
        ("conflicts", "services", [], "Services that do not run together with this one.", _PLACE),
        ("stop_signal", "signal", "TERM", "The signal that asks it to end; CONT goes with TERM.", _PLACE),
        ("stop_timeout", "duration", "10s", "How long it may take to end; then KILL.",
         {"change": "in place", "off": True}),
        ("kill_mode", "choice", "tree", "Who gets the signals: every descendant, the process group, the process.",
         {"change": "in place", "choices": ("tree", "group", "process")}),
        ("reload_signal", "signal", "HUP", "The signal of `superctl reload-service`.", _PLACE),
        ("idle_timeout", "duration", None, "Stop it after this long without a connection.",
         {"change": "in place", "off": True, "modes": (DEMAND,)}),
        ("start_pre", "commands", [], "Commands before the main one.", {"change": "in place", "modes": LONG}),
        ("start_post", "commands", [], "Commands after the main one has started.",
         {"change": "in place", "modes": LONG}),
        ("stop_post", "commands", [], "Commands after the main one has ended.", {"change": "in place", "modes": LONG}),
        ("socket", "tables", [], "One table for each socket; instead of listen.", {"change": "rebind"}),
        ("limits", "table", {}, "Limits: they slow or refuse, and heal by themselves.", _PLACE),
        ("access", "table", {}, "Who may connect.", {"modes": (CONN, DEMAND), **_PLACE}),
        ("rlimit", "table", {}, "Resource limits, getrlimit(2)."),
        ("scheduling", "table", {}, "CPU, I/O and OOM priorities."),
        ("cgroup", "table", {}, "Limits of a control group.", _PLACE),
        ("sandbox", "table", {}, "What the service cannot do."),
        ("health", "table", {}, "Regular checks of a running service.", {"change": "in place", "modes": LONG}),
        ("proxy", "table", {}, "For a program that can only listen by itself.", {"modes": (DEMAND, ALWAYS)}),
    ),
    *_keys(
        "socket",
        ("listen", "address", None, "The address."),
        ("name", "fd_name", None, "Its name in LISTEN_FDNAMES; default the service's name.", {"change": "restart"}),
        ("backlog", "int", 4096, "Clients the kernel queues, listen(2).",
         {"change": "in place", "modes": LISTEN, "low": 1, "high": 2**31 - 1}),
        ("mode", "mode", "0666", "Mode of a UNIX socket or FIFO.", {"modes": PATHS, "high": 0o777}),
        ("user", "user", None, "Its owner.", {"modes": PATHS}),
        ("group", "group", None, "Its group.", {"modes": PATHS}),
        ("directory_mode", "mode", "0755", "Mode of missing parents that are made.", {"modes": PATHS, "high": 0o7777}),
        ("remove_on_stop", "bool", True, "Remove the path when the service is removed.", {"modes": PATHS, **_PLACE}),
        ("symlinks", "paths", [], "Symbolic links to the path.", {"modes": PATHS}),
        ("reuse_port", "bool", False, "SO_REUSEPORT, socket(7).", {"modes": IP}),
        ("free_bind", "bool", False, "IP_FREEBIND, ip(7): bind an address that is not there yet.", {"modes": IP}),
        ("transparent", "bool", False, "IP_TRANSPARENT, ip(7).", {"modes": IP}),
        ("broadcast", "bool", False, "SO_BROADCAST, socket(7).", {"modes": UDP}),
        ("device", "device", None, "SO_BINDTODEVICE, socket(7): one network interface.", {"modes": IP}),
        ("no_delay", "bool", False, "TCP_NODELAY, tcp(7).", {"modes": (*TCP, "fd")}),
        ("keep_alive", "keep_alive", False, "A bool or {idle, interval, count}, tcp(7).", {"modes": (*TCP, "fd")}),
        ("defer_accept", "duration", None, "TCP_DEFER_ACCEPT, tcp(7).",
         {"modes": (*TCP, "fd"), "off": True, "low": 1, "high": 3600}),
        ("receive_buffer", "size", None, "SO_RCVBUF, socket(7).", {"modes": BUFFERED, "low": 256, "high": 2**30}),
        ("send_buffer", "size", None, "SO_SNDBUF, socket(7).", {"modes": BUFFERED, "low": 2048, "high": 2**30}),
        ("mark", "int", None, "SO_MARK, socket(7).", {"modes": BUFFERED, "low": 0, "high": 2**32 - 1}),
        ("tos", "int", None, "IP_TOS and IPV6_TCLASS, ip(7).", {"modes": (*IP, "fd"), "low": 0, "high": 255}),
        ("ttl", "int", None, "IP_TTL and IPV6_UNICAST_HOPS, ip(7).", {"modes": (*IP, "fd"), "low": 1, "high": 255}),
        ("priority", "int", None, "SO_PRIORITY, socket(7).", {"modes": BUFFERED, "low": 0, "high": 255}),
        ("congestion", "word", None, "TCP_CONGESTION, tcp(7).", {"modes": (*TCP, "fd")}),
        ("protocol", "choice", None, "Instead of TCP or UDP.", {"modes": IP, "choices": ("mptcp", "sctp", "udplite")}),
        ("pass_credentials", "bool", False, "SO_PASSCRED, unix(7).", {"modes": (*UNIX, "fd")}),
        ("pass_packet_info", "bool", False, "IP_PKTINFO and IPV6_RECVPKTINFO, ip(7).", {"modes": (*UDP, "fd")}),
        ("timestamping", "bool", False, "SO_TIMESTAMPNS, socket(7).", {"modes": (*UDP, "unix-dgram", "fd")}),
        ("multicast", "multicast", [], '"GROUP" or "GROUP%INTERFACE": groups to join.', {"modes": UDP}),
        ("nonblocking", "bool", False, "Hand the sockets over with O_NONBLOCK.", {"change": "restart"}),
        ("proxy_protocol", "proxy_protocol", False, "Expect a PROXY header, which says who the client is.",
         {"modes": (*TCP, "unix", "fd"), **_PLACE}),
        ("proxy_trusted", "networks", [], "Who may send a PROXY header.", {"modes": (*TCP, "unix", "fd"), **_PLACE}),
        ("tls", "tls", None, "TLS in front of the service.", {"modes": (*TCP, "unix", "fd"), **_PLACE}),
        change="rebind",
    ),
    *_keys(
        "keep_alive",
        ("idle", "duration", None, "TCP_KEEPIDLE, tcp(7).", {"low": 1, "high": 32767}),
        ("interval", "duration", None, "TCP_KEEPINTVL, tcp(7).", {"low": 1, "high": 32767}),
        ("count", "int", None, "TCP_KEEPCNT, tcp(7).", {"low": 1, "high": 127}),
        change="rebind",
    ),
    *_keys(
        "tls",
        ("certificate", "path", None, "PEM file: the certificate, then those that lead to its root."),
        ("key", "path", None, "PEM file of its private key; default the certificate's file."),
        ("sni", "names", {}, "Other certificates, by the name that a client asks for."),
        ("client_ca", "path", None, "PEM file: who signs the certificates of clients."),
        ("client_certificate", "choice", "required", "Whether a client must have one, where there is a `client_ca`.",
         {"choices": ("required", "optional")}),
        ("min_version", "choice", "1.2", "The oldest version of TLS that is spoken.", {"choices": ("1.2", "1.3")}),
        ("alpn", "protocols", [], "Names of protocols, the preferred one first; RFC 7301."),
        ("handshake_timeout", "duration", "10s", "A client whose handshake takes longer starts no process.",
         {"high": 3600}),
        change="in place",
    ),
    *_keys(
        "limits",
        ("max_connections", "limit", 64, "Processes of a per-connection service at once.",
         {"off": True, "high": 10**6}),
        ("on_full", "choice", "wait", '"wait": clients queue in the kernel; "refuse": they are told and closed.',
         {"choices": ("wait", "refuse")}),
        ("max_per_source", "limit", None, "Connections at once from one source; the excess is refused.",
         {"off": True, "high": 10**6}),
        ("rate", "rate", None, "Activations; beyond it superd stops accepting until there is room.",
         {"off": True, "modes": (CONN, DEMAND)}),
        ("rate_per_source", "rate", None, "Activations from one source; the excess is refused.", {"off": True}),
        ("refuse_message", "bytes", "", "What the refused are told."),
        ("max_runtime", "duration", None, "Longest life of one process.", {"off": True, "modes": ()}),
        ("first_byte_timeout", "duration", None, "A client silent for that long starts no process.", {"off": True}),
        ("max_load", "number", None, "No new process above this load average.",
         {"off": True, "modes": (CONN, DEMAND), "low": 0.01, "high": 10**6}),
        ("min_memory", "size", None, "No new process below this MemAvailable.",
         {"off": True, "modes": (CONN, DEMAND), "low": 1}),
        change="in place", modes=(CONN,),
    ),
    *_keys(
        "access",
        ("allow", "networks", [], "Who may connect; alone it denies the rest."),
        ("deny", "networks", [], "Who may not connect."),
        ("hours", "hours", [], "When they may connect."),
        change="in place", modes=(CONN, DEMAND),
    ),
    *_keys(
        "rlimit",
        *((name, "rlimit", None, f"RLIMIT_{name.upper()}, getrlimit(2): a value or [soft, hard].") for name in (
            "as", "core", "cpu", "data", "fsize", "locks", "memlock", "msgqueue", "nice", "nofile", "nproc", "rss",
            "rtprio", "rttime", "sigpending", "stack",
        )),
    ),
    *_keys(
        "scheduling",
        ("nice", "int", None, "CPU priority, nice(2).", {"low": -20, "high": 19}),
        ("ioprio", "ioprio", None, '"idle", "best-effort:N" or "realtime:N", ioprio_set(2).'),
        ("oom_score_adjust", "int", None, "oom_score_adj, proc(5).", {"low": -1000, "high": 1000}),
        ("cpu_affinity", "cpus", None, "CPUs it may run on, sched_setaffinity(2)."),
    ),
    *_keys(
        "cgroup",
        ("memory_max", "memory", None, "memory.max of cgroup v2.", {"low": 65536}),
        ("pids_max", "pids", None, "pids.max of cgroup v2.", {"high": 2**22}),
        ("cpu_max", "cpu_time", None, "cpu.max of cgroup v2."),
        change="in place", off=True,
    ),
    *_keys(
        "sandbox",
        ("no_new_privileges", "bool", None, "PR_SET_NO_NEW_PRIVS, prctl(2); default true unless user is root."),
        ("chroot", "directory", None, "Root directory; the program and cwd are inside."),
        ("capabilities", "capabilities", None, "The only capabilities it can ever have; default all, none for a user."),
        ("ambient_capabilities", "capabilities", [], "Capabilities that it has although it is not root."),
        ("private_tmp", "bool", False, "An empty /tmp and /var/tmp of its own."),
        ("private_network", "bool", False, "A network of its own with nothing but a loopback interface."),
        ("private_pids", "bool", False, "Sees only its own processes."),
        ("read_only", "paths", [], "Paths below which it cannot write; the longest path decides."),
        ("read_write", "paths", [], "Paths below which it can write all the same."),
    ),
    *_keys(
        "health",
        ("check", "ready", None, "What to check, as `ready`."),
        ("every", "duration", "10s", "How often."),
        ("timeout", "duration", "3s", "How long one check may take."),
        ("failures", "int", 3, "How many in a row count.", {"low": 1, "high": 1000}),
        ("then", "choice", "restart", "What follows.", {"choices": ("restart", "shutdown", "report")}),
        change="in place",
    ),
    *_keys(
        "proxy",
        ("to", "target", None, "Where the program listens."),
        ("ready", "ready", None, "What tells that it listens; default that `to` can be connected to."),
        ("send_proxy_header", "header", False, "Send a PROXY header of this version.", _PLACE),
    ),
    *_keys(
        "superd",
        ("defaults", "table", {}, "Service keys that hold where a service does not say otherwise."),
        ("conf_dirs", "paths", [], "More directories of service files, read after conf.d."),
        ("watch", "bool", True, "Follow changes of the files."),
        ("control", "control", None, "Address of the control socket.", {"change": "rebind"}),
        ("control_mode", "mode", "0600", "Mode of the control socket.", {"change": "rebind", "high": 0o777}),
        ("control_group", "group", None, "Its members may look.", {"change": "rebind"}),
        ("control_admins", "admins", [], "Who may do everything besides root and superd's own user.",
         {"change": "rebind"}),
        ("log", "choice", "text", "Form of the log.", {"choices": ("text", "logfmt", "json")}),
        ("log_level", "choice", "info", "The least level that is logged.",
         {"choices": ("debug", "info", "warning", "error")}),
        ("syslog", "path", None, "Receive what programs send to syslog(3).", {"change": "rebind"}),
        ("stop_timeout", "duration", "30s", "For everything together."),
        change="in place",
    ),
)  # fmt: skip

BY_TABLE: dict[str, dict[str, Key]] = {}
for _key in KEYS:
    BY_TABLE.setdefault(_key.table, {})[_key.name] = _key

# What the same thing is called elsewhere: inetd, xinetd, systemd, supervisord, s6, docker compose.
ALIASES = {
    "port": "listen", "bind": "listen", "listen_stream": "listen", "address": "listen", "sockets": "socket",
    "cmd": "command", "exec": "command", "exec_start": "command", "execstart": "command", "server": "command",
    "program": "command", "args": "command", "server_args": "command", "entrypoint": "command",
    "wait": "run", "accept": "run", "type": "run", "autostart": "enabled", "disable": "enabled", "disabled": "enabled",
    "env": "environment", "env_file": "environment_file", "passenv": "pass_environment",
    "directory": "cwd", "chdir": "cwd", "working_directory": "cwd", "workdir": "cwd", "usr": "user", "uid": "user",
    "gid": "group", "autorestart": "restart", "restart_sec": "restart_delay", "stopsignal": "stop_signal",
    "kill_signal": "stop_signal", "stopwaitsecs": "stop_timeout", "exitcodes": "success_status",
    "timeout": "stop_timeout", "per_source": "max_per_source", "max_clients": "max_connections",
    "cps": "rate", "limit": "limits", "rlimits": "rlimit", "ulimits": "rlimit",
}  # fmt: skip
