"""A service -> units of systemd: NAME.socket and NAME.service, or NAME@.service where there is one process each.

What importers/systemd.py makes of them is the same service again. `[X-Superd]`, which systemd ignores, says what its
own words leave open.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from itertools import groupby
from typing import Any

from superd.core.spec import Access, Cgroup, Context, Limits, Output, RestartPolicy, ServiceSpec, SocketSpec
from superd.core.values import expand_runtime, format_mode, format_signal
from superd.importers.unitfile import quote

_LISTEN = {
    "tcp": "ListenStream", "unix": "ListenStream", "vsock": "ListenStream", "udp": "ListenDatagram",
    "unix-dgram": "ListenDatagram", "unix-seqpacket": "ListenSequentialPacket", "fifo": "ListenFIFO",
}  # fmt: skip
_BOOLS = {
    "reuse_port": "ReusePort", "free_bind": "FreeBind", "transparent": "Transparent", "broadcast": "Broadcast",
    "no_delay": "NoDelay", "pass_credentials": "PassCredentials", "pass_packet_info": "PassPacketInfo",
}  # fmt: skip
_VALUES = {
    "user": "SocketUser", "group": "SocketGroup", "device": "BindToDevice", "receive_buffer": "ReceiveBuffer",
    "send_buffer": "SendBuffer", "mark": "Mark", "tos": "IPTOS", "ttl": "IPTTL", "priority": "Priority",
    "congestion": "TCPCongestion", "protocol": "SocketProtocol",
}  # fmt: skip


def export(spec: ServiceSpec) -> tuple[dict[str, str], list[str]]:
    """(text by name of the unit, what systemd has no word for); no unit for a service that runs no program."""
    if not spec.command:
        return {}, ["a service without `command`: systemd starts programs"]
    return _Export(spec).units()


def _span(seconds: float | None) -> str:
    """systemd.time(7); microseconds are the smallest unit of both."""
    if seconds is None:
        return "infinity"
    whole, rest = divmod(round(seconds * 1_000_000), 1_000_000)
    return " ".join(filter(None, [f"{whole}s" if whole or not rest else "", f"{rest}us" if rest else ""]))


def _plain(text: str) -> str:
    """A value that is not split: specifiers are escaped, nothing else can be."""
    return text.replace("%", "%%").strip().rstrip("\\")


class _Export:
    def __init__(self, spec: ServiceSpec) -> None:
        self.spec = spec
        self.stem = spec.name.replace("@", "-")
        self.lost: list[str] = []
        self.listens = spec.pass_ == "listen-fds"

    def units(self) -> tuple[dict[str, str], list[str]]:
        spec = self.spec
        known = [socket for socket in spec.sockets if socket.address.scheme not in ("fd", "tcpmux")]
        for socket in spec.sockets:
            if socket not in known:
                what = "has no tcpmux" if socket.address.scheme == "tcpmux" else "passes on no socket that it was given"
                self.lost.append(f"{socket.address}: systemd {what}")
        groups = [list(group) for _, group in groupby(known, self._shared)]
        found: dict[str, str] = {}
        accept = spec.takes_connections
        if accept and len(groups) > 1:
            self.lost.append("sockets with different options are units with a count of connections each")
        names = []
        for number, group in enumerate(groups, 1):
            stem = self.stem if number == 1 else f"{self.stem}-{number}"
            names.append(f"{stem}.socket")
            found[names[-1]] = self._socket_unit(stem, group, accept)
            if accept:
                found[f"{stem}@.service"] = self._service_unit([])
        if not accept:
            found[f"{self.stem}.service"] = self._service_unit(names)
        return found, self.lost

    # -- sockets

    def _shared(self, socket: SocketSpec) -> tuple[Any, ...]:
        """What all sockets of one unit have in common."""
        only6 = _only6(socket)
        own = {"address", "name"} if self.spec.takes_connections or not self.listens else {"address"}
        return only6, *(getattr(socket, f.name) for f in fields(socket) if f.name not in own)

    def _socket_unit(self, stem: str, sockets: Sequence[SocketSpec], accept: bool) -> str:
        spec, first = self.spec, sockets[0]
        lines = ["[Unit]"]
        if spec.description:
            lines.append(f"Description={_plain(spec.description)}")
        lines += ["", "[Socket]"]
        for socket in sockets:
            lines += self._addresses(socket)
        if any(socket.address.is_ip for socket in sockets):
            lines.append(f"BindIPv6Only={'ipv6-only' if _only6(first) else 'both'}")
        if accept:
            lines += ["Accept=yes", f"MaxConnections={spec.limits.max_connections or 10**6}"]
            if spec.limits.max_per_source is not None:
                lines.append(f"MaxConnectionsPerSource={spec.limits.max_per_source}")
        else:
            if stem != self.stem:
                lines.append(f"Service={self.stem}.service")
            if self.listens:
                lines.append(f"FileDescriptorName={_plain(first.name)}")
        lines += self._options(first)
        if spec.enabled:
            lines += ["", "[Install]", "WantedBy=sockets.target"]
        return "\n".join(lines) + "\n"

    def _addresses(self, socket: SocketSpec) -> Iterator[str]:
        address = socket.address
        key = _LISTEN[address.scheme.rstrip("46") if address.is_ip else address.scheme]
        if address.is_ip:
            if address.port == 0:
                self.lost.append(f"{address}: a port that the kernel chooses")
            version = address.scheme[3:]
            if address.host == "localhost":
                hosts = {"4": ["127.0.0.1"], "6": ["[::1]"]}.get(version, ["127.0.0.1", "[::1]"])
                yield from (f"{key}={host}:{address.port}" for host in hosts)
            elif address.host is None:
                yield f"{key}={ {'4': '0.0.0.0:', '6': '[::]:'}.get(version, '') }{address.port}"
            elif ":" in address.host:
                host, _, scope = address.host.partition("%")
                yield f"{key}=[{host}]:{address.port}{f'%%{scope}' if scope else ''}"
            else:
                yield f"{key}={address.host}:{address.port}"
        elif address.scheme == "vsock":
            yield f"{key}=vsock:{'' if address.cid is None else address.cid}:{address.port}"
        else:
            yield f"{key}={_plain(address.path or '')}"

    def _options(self, socket: SocketSpec) -> Iterator[str]:
        address = socket.address
        if address.is_unix or address.scheme == "fifo":
            yield f"SocketMode={format_mode(socket.mode)}"
            yield f"DirectoryMode={format_mode(socket.directory_mode)}"
            yield f"RemoveOnStop={'yes' if socket.remove_on_stop else 'no'}"
            if socket.symlinks:
                yield f"Symlinks={' '.join(map(quote, socket.symlinks))}"
        if address.accepts:
            yield f"Backlog={socket.backlog}"
        for name, key in _BOOLS.items():
            if getattr(socket, name):
                yield f"{key}=yes"
        for name, key in _VALUES.items():
            if (value := getattr(socket, name)) is not None:
                yield f"{key}={_plain(str(value))}"
        if socket.timestamping:
            yield "Timestamping=ns"
        if socket.keep_alive is not None:
            yield "KeepAlive=yes"
            for value, key in (
                (socket.keep_alive.idle_s, "KeepAliveTimeSec"), (socket.keep_alive.interval_s, "KeepAliveIntervalSec"),
            ):  # fmt: skip
                if value is not None:
                    yield f"{key}={_span(value)}"
            if socket.keep_alive.count is not None:
                yield f"KeepAliveProbes={socket.keep_alive.count}"
        if socket.defer_accept_s is not None:
            yield f"DeferAcceptSec={_span(socket.defer_accept_s)}"
        if socket.multicast:
            self.lost.append(f"multicast of {address}")
        if socket.proxy_protocol:
            self.lost.append(f"proxy_protocol of {address}")
        if socket.tls:
            self.lost.append(f"tls of {address}")

    # -- the service

    def _service_unit(self, sockets: Sequence[str]) -> str:
        spec = self.spec
        unit, install, own = ["[Unit]"], [], []
        if spec.description:
            unit.append(f"Description={_plain(spec.description)}")
        for key, names in (
            ("Requires", spec.requires), ("Wants", spec.wants), ("After", spec.requires + spec.after),
            ("PartOf", spec.part_of), ("Conflicts", spec.conflicts),
        ):  # fmt: skip
            if names:
                unit.append(f"{key}={' '.join(f'{name}.service' for name in dict.fromkeys(names))}")
        if sockets and spec.run != "on-demand":
            unit += [f"Requires={' '.join(sockets)}", f"After={' '.join(sockets)}"]
        if not spec.takes_connections:
            told = "on-demand" if sockets else "once" if self._type() == "oneshot" else "always-on"
            own += [f"Run={spec.run}"] if spec.run != told else []
            limit = spec.restart.limit
            unit.append(f"StartLimitIntervalSec={_span(limit.per_s) if limit else 0}")
            if limit:
                unit.append(f"StartLimitBurst={limit.count}")
        if len(sockets) > 1:
            install.append(f"Also={' '.join(sockets)}")
        if spec.enabled and spec.run in ("always-on", "once"):
            install.append("WantedBy=multi-user.target")
        if spec.kill_mode == "group":
            own.append("KillMode=group")
            self.lost.append('kill_mode = "group": systemd has the control group, or the process alone')
        self._not_in_systemd()
        service = [*self._program(), *self._context(spec.context), *self._life()]
        if len(sockets) > 1:
            service.append(f"Sockets={' '.join(sockets)}")
        parts = [unit, ["[Service]", *service]]
        parts += [["[Install]", *install]] if install else []
        parts += [["[X-Superd]", *own]] if own else []
        return "\n\n".join("\n".join(part) for part in parts) + "\n"

    def _type(self) -> str:
        if self.spec.ready.kind == "notify":
            return "notify"
        return "oneshot" if self.spec.run == "once" else "exec"

    def _program(self) -> Iterator[str]:
        spec = self.spec
        if spec.proxy is not None:
            self.lost.append(f"[proxy] to {spec.proxy.to}: systemd-socket-proxyd(8) is a service of its own")
        elif spec.ready.kind not in ("notify", "start"):
            self.lost.append(f'ready = "{spec.ready}"')
        yield f"Type={self._type()}"
        for words in spec.start_pre:
            yield f"ExecStartPre={self._command(words)}"
        yield f"ExecStart={self._command(spec.command, spec.argv0)}"
        for words in spec.start_post:
            yield f"ExecStartPost={self._command(words)}"
        yield f"ExecReload=/bin/kill -{format_signal(spec.reload_signal)} $MAINPID"
        for words in spec.stop_post:
            yield f"ExecStopPost={self._command(words)}"
        if spec.sockets and not self.listens:
            yield "StandardInput=socket"
            yield "StandardOutput=socket"
        else:
            yield f"StandardOutput={self._output(spec.stdout, 'stdout')}"
        yield f"StandardError={self._output(spec.stderr, 'stderr')}"
        if any(socket.nonblocking for socket in spec.sockets):
            yield "NonBlocking=yes"

    def _command(self, words: Sequence[str], argv0: str | None = None) -> str:
        """Variables are looked for in all words but the program."""
        program, *rest = words
        found = [quote(program) if argv0 is None else f"@{quote(program)}"]
        words = [*([] if argv0 is None else [argv0]), *map(self._filled, rest)]
        return " ".join([*found, *(quote(word).replace("$", "$$") for word in words)])

    def _filled(self, text: str) -> str:
        """`${port}` and its kin as they are in systemd: a port is the one that is written, fds count from 3."""
        if "${" not in text:
            return text
        sockets = self.spec.sockets
        ports = {socket.name: socket.address.port for socket in reversed(sockets) if socket.address.port}
        fds = {socket.name: number for number, socket in reversed(list(enumerate(sockets, 3)))}
        try:
            return expand_runtime(text, dict(reversed(ports.items())), {**fds, "connection": 3})
        except KeyError as error:
            self.lost.append(f"{text}: {error.args[0]} is known only when superd has bound it")
            return text

    def _output(self, output: Output, what: str) -> str:
        if output.kind == "file":
            return f"append:{_plain(str(output.path))}"
        if output.kind == "inherit":
            self.lost.append(f'{what} = "inherit"')
        return {"null": "null", "socket": "socket"}.get(output.kind, "journal")

    def _context(self, context: Context) -> Iterator[str]:
        spec = self.spec
        if context.user is None:
            self.lost.append("no user: it runs as superd's own; without User= systemd runs it as root")
        else:
            yield f"User={_plain(str(context.user))}"
        if context.group is not None:
            yield f"Group={_plain(str(context.group))}"
        if context.groups:
            yield f"SupplementaryGroups={' '.join(map(str, context.groups))}"
        elif context.groups is not None:
            self.lost.append("groups = []: systemd gives it the groups of its user")
        if context.cwd != "/":
            yield f"WorkingDirectory={_plain(context.cwd)}"
        yield f"UMask={format_mode(context.umask)}"
        for name, value in spec.environment:
            yield f"Environment={quote(f'{name}={self._filled(value)}')}"
        if spec.environment_file:
            yield f"EnvironmentFile={_plain(spec.environment_file)}"
            if spec.environment:
                self.lost.append("the table [environment] wins over the file; in systemd the file wins")
        if "*" in spec.pass_environment:
            self.lost.append('pass_environment = ["*"]')
        elif spec.pass_environment:
            yield f"PassEnvironment={' '.join(spec.pass_environment)}"
        yield f"NoNewPrivileges={'yes' if context.no_new_privileges else 'no'}"
        if context.chroot is not None:
            yield f"RootDirectory={_plain(context.chroot)}"
        for names, key in (
            (context.capabilities, "CapabilityBoundingSet"),
            (context.ambient_capabilities or None, "AmbientCapabilities"),
        ):  # fmt: skip
            if names is not None:
                yield f"{key}={' '.join(f'CAP_{name}' for name in names)}"
        for wanted, key in (
            (context.private_tmp, "PrivateTmp"), (context.private_network, "PrivateNetwork"),
            (context.private_pids, "PrivatePIDs"),
        ):  # fmt: skip
            if wanted:
                yield f"{key}=yes"
        for paths, key in ((context.read_only, "ReadOnlyPaths"), (context.read_write, "ReadWritePaths")):
            if paths:
                yield f"{key}={' '.join(map(quote, paths))}"
        for name, soft, hard in context.rlimits:
            yield f"Limit{name.upper()}={_limit(soft)}:{_limit(hard)}"
        if context.nice is not None:
            yield f"Nice={context.nice}"
        if context.ioprio is not None:
            kind, _, number = context.ioprio.partition(":")
            yield f"IOSchedulingClass={kind}"
            if number:
                yield f"IOSchedulingPriority={number}"
        if context.oom_score_adjust is not None:
            yield f"OOMScoreAdjust={context.oom_score_adjust}"
        if context.cpu_affinity is not None:
            yield f"CPUAffinity={' '.join(map(str, context.cpu_affinity))}"
        yield from self._cgroup(spec.cgroup)

    def _cgroup(self, limits: Cgroup) -> Iterator[str]:
        if not limits.controllers():
            return
        if self.spec.takes_connections:
            self.lost.append("[cgroup]: what holds for all connections together would be a slice's, systemd.slice(5)")
            return
        if limits.memory_max is not None:
            yield f"MemoryMax={limits.memory_max}"
        if limits.pids_max is not None:
            yield f"TasksMax={limits.pids_max}"
        if (time := limits.cpu_max) is not None:
            percent, rest = divmod(time.quota * 100, time.period)
            if rest:
                self.lost.append("cgroup.cpu_max: systemd has whole percents")
            yield f"CPUQuota={max(percent, 1)}%"
            if time.period != 100_000:
                yield f"CPUQuotaPeriodSec={time.period}us"

    def _life(self) -> Iterator[str]:
        spec, long = self.spec, not self.spec.takes_connections
        if long:
            yield f"Restart={spec.restart.policy}"
            yield f"RestartSec={_span(spec.restart.delay_s)}"
            yield f"TimeoutStartSec={_span(spec.ready_timeout_s)}"
            good = [str(s) if isinstance(s, int) else f"SIG{s}" for s in spec.restart.success_status if s != 0]
            if good:
                yield f"SuccessExitStatus={' '.join(good)}"
            if 0 not in spec.restart.success_status:
                self.lost.append("success_status without 0")
            if spec.ready.kind == "notify" or spec.notify_asked:
                yield f"NotifyAccess={spec.notify_access}"
            if spec.watchdog_s is not None:
                yield f"WatchdogSec={_span(spec.watchdog_s)}"
            if spec.fdstore:
                yield f"FileDescriptorStoreMax={spec.fdstore}"
        yield f"TimeoutStopSec={_span(spec.stop_timeout_s)}"
        yield f"KillSignal=SIG{format_signal(spec.stop_signal)}"
        yield f"KillMode={'process' if spec.kill_mode == 'process' else 'control-group'}"
        if spec.limits.max_runtime_s is not None:
            yield f"RuntimeMaxSec={_span(spec.limits.max_runtime_s)}"

    def _not_in_systemd(self) -> None:
        """Said once for each key that has a value of its own."""
        spec = self.spec
        carried = replace(spec.limits, max_connections=64, max_per_source=None, max_runtime_s=None)
        for field in fields(carried):
            if getattr(carried, field.name) != getattr(Limits(), field.name):
                self._say(f"limits.{field.name}")
        if spec.restart.delay_max_s != RestartPolicy().delay_max_s:
            self._say("restart_delay_max")
        if spec.fd_protocols != ("systemd",):
            self._say(f"fd_protocols = {', '.join(spec.fd_protocols)}")
        for name in ("essential", "idle_timeout_s", "health"):
            if getattr(spec, name):
                self._say(name.removesuffix("_s"))
        if spec.access != Access():
            self._say("[access]: IPAddressAllow= of systemd is about every packet, the program's own too")
        if not spec.enabled:
            self._say("enabled = false: `systemctl enable` is not called")

    def _say(self, text: str) -> None:
        if text not in self.lost:
            self.lost.append(text)


def _only6(socket: SocketSpec) -> bool:
    """Whether BindIPv6Only= matters, and is ipv6-only."""
    address = socket.address
    return address.is_ip and (address.scheme.endswith("6") or address.host == "::")


def _limit(value: int) -> str:
    return "infinity" if value == -1 else str(value)
