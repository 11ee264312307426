"""One service's merged tree -> its ServiceSpec: what its keys say together, and what is wrong with that."""

from __future__ import annotations

import sys
from collections.abc import Hashable, Mapping
from dataclasses import replace
from functools import lru_cache
from posixpath import dirname, isabs, join, normpath
from typing import Any, TypeVar

from superd.core.collision import collide
from superd.core.document import Path
from superd.core.keys import BY_TABLE
from superd.core.kinds import Kinds, WrongError
from superd.core.plan import PATH
from superd.core.spec import (
    CGROUP_FILES,
    Access,
    Address,
    Cgroup,
    Context,
    Health,
    Limits,
    Output,
    Proxy,
    Ready,
    RestartPolicy,
    ServiceSpec,
    SocketSpec,
)
from superd.core.values import quote

_Value = TypeVar("_Value", bound=Hashable)

OF_PROCESSES = (
    "argv0", "run", "pass", "fd_protocols", "stderr", "stdout", "user", "group", "groups", "cwd", "umask",
    "environment", "environment_file", "pass_environment", "rlimit", "scheduling", "cgroup", "sandbox",
)  # fmt: skip
_SOCKET_FIELDS = {"listen": "address", "defer_accept": "defer_accept_s"}
_RESTART_FIELDS = {
    "restart": "policy", "restart_delay": "delay_s", "restart_delay_max": "delay_max_s", "restart_limit": "limit",
    "success_status": "success_status",
}  # fmt: skip
_PLAIN_FIELDS = {
    "description": "description", "enabled": "enabled", "fd_protocols": "fd_protocols", "stderr": "stderr",
    "stdout": "stdout", "environment": "environment", "environment_file": "environment_file",
    "pass_environment": "pass_environment", "ready": "ready", "ready_timeout": "ready_timeout_s",
    "notify_access": "notify_access", "stop_signal": "stop_signal", "stop_timeout": "stop_timeout_s",
    "kill_mode": "kill_mode", "watchdog": "watchdog_s", "fdstore": "fdstore", "essential": "essential",
    "requires": "requires", "wants": "wants", "after": "after", "part_of": "part_of", "conflicts": "conflicts",
    "builtin": "builtin",
    "workers": "workers", "reload_signal": "reload_signal", "idle_timeout": "idle_timeout_s", "start_pre": "start_pre",
    "start_post": "start_post", "stop_post": "stop_post",
}  # fmt: skip
_LIMITS_FIELDS = {"max_runtime": "max_runtime_s", "first_byte_timeout": "first_byte_timeout_s"}
_HEALTH_FIELDS = {"every": "every_s", "timeout": "timeout_s"}


class Reader(Kinds):
    """Turns one merged tree into a ServiceSpec, and judges its keys together."""

    socket_paths: list[Path]  # where the address of each socket is written
    got: dict[str, Any]  # the converted values that count, by key; a table's in a dict of its own
    root = ""  # sandbox.chroot: where the service's own paths begin

    def tables(self) -> dict[str, Any]:
        return self.table("service", self.merged.tree, ())

    def instances(self) -> tuple[str, ...]:
        if "instances" not in self.merged.tree:
            return ()  # they come with `superctl start`
        found = self.table("service", {"instances": self.merged.tree["instances"]}, ())
        return tuple(found.get("instances", ()))

    def service(self) -> ServiceSpec | None:
        """The spec; None if there are problems."""
        assert self.name is not None
        self.got = got = self.tables()
        if "@" not in self.name and "instances" in got:
            self.irrelevant(got, ("instances",), "only a template has instances: rename the file to NAME@.toml")
        sockets = self.sockets(got)
        self.proxy(got, sockets)
        self.run_and_pass(got, sockets)
        self.access(got, sockets)
        self.modes(got, sockets)
        self.outputs(got)
        self.refusals(got, sockets)
        context = self.context(got)
        command = self.program(got, sockets, context)
        self.more_commands(got, context)
        self.readiness(got, sockets)
        self.runtime_names(got, sockets)
        if any(problem.is_error for problem in self.problems):
            return None
        assert command is not None and context is not None
        written = got["command"][0] if command else ""
        limits = Limits(**{_LIMITS_FIELDS.get(key, key): value for key, value in got.get("limits", {}).items()})
        health = None
        if "check" in (table := got.get("health", {})):
            health = Health(**{_HEALTH_FIELDS.get(key, key): value for key, value in table.items()})
        got.setdefault("restart", "on-failure" if got["run"] == "always-on" else "no")
        restart = RestartPolicy(**{field: got[key] for key, field in _RESTART_FIELDS.items() if key in got})
        plain = {field: got[key] for key, field in _PLAIN_FIELDS.items() if key in got}
        if "proxy" in got:
            table = dict(got["proxy"])
            plain["ready"] = table.pop("ready", Ready("connect", address=table["to"]))
            plain["proxy"] = Proxy(**table)
        argv0 = got.get("argv0", written if command and written != command[0] else None)
        return ServiceSpec(
            self.name, self.merged.main.path, _shared(command), got["run"], got["pass"], tuple(sockets), argv0=argv0,
            context=_shared(context), user_assumed=self.is_root and not {"user", "builtin"} & got.keys(),
            limits=_shared(limits), restart=_shared(restart), access=_shared(Access(**got.get("access", {}))),
            health=health, cgroup=_shared(Cgroup(**got.get("cgroup", {}))), notify_asked="notify_access" in got,
            **plain,
        )  # fmt: skip

    def refusals(self, got: dict[str, Any], sockets: list[SocketSpec]) -> None:
        """Whoever is refused has no TLS yet that could carry a message."""
        if got.get("limits", {}).get("refuse_message") and any(socket.tls for socket in sockets):
            why = "`refuse_message` cannot be said with `tls`: clients are refused before their handshake"
            self.irrelevant(got, ("limits", "refuse_message"), why, "remove it")

    def irrelevant(self, got: dict[str, Any], path: Path, why: str, label: str = "") -> None:
        """A key that means nothing for this service: an error in its own file, passed over in [defaults]."""
        if not self.merged.origin(path).is_default:
            self.wrong(path, "other-mode", why, label, key=True)
        for part in path[:-1]:
            got = got[str(part)]
        got.pop(str(path[-1]), None)

    @property
    def sockets_known(self) -> bool:
        return not self.failed & {("listen",), ("socket",)}

    def sockets(self, got: dict[str, Any]) -> list[SocketSpec]:
        """From `listen` or [[socket]]; what is wrong with one alone, or with two together, is reported."""
        if self.merged.tree.keys() >= {"listen", "socket"}:
            for less, more in (("listen", "socket"), ("socket", "listen")):
                if self.merged.origin((less,)).is_default and not self.merged.origin((more,)).is_default:
                    got.pop(less, None)
                    break
            else:
                why = "`listen` and [[socket]] are both there: sockets are written in one way"
                self.wrong(("listen",), "listen-and-socket", why, "move it into a [[socket]] table", key=True)
        assert self.name is not None
        found: list[tuple[Path, SocketSpec]] = []
        if "socket" in got:
            for path, table in got["socket"]:
                if isinstance(address := table.get("listen"), Address):
                    self.socket_keys(table, address, path)
                    fields = {_SOCKET_FIELDS.get(key, key): value for key, value in table.items()}
                    found.append((path, SocketSpec(**{"name": self.name, **fields})))
        elif "listen" in got:
            single = not isinstance(self.merged.tree["listen"], list)
            for number, address in enumerate(got["listen"]):
                found.append((("listen",) if single else ("listen", number), SocketSpec(address, self.name)))
        self.socket_paths = [(*path, "listen") if path[0] == "socket" else path for path, _ in found]
        for index, (_, spec) in enumerate(found):
            for _, other in found[:index]:
                if collide(spec, other):
                    self.wrong(self.socket_paths[index], "address-taken", f"{spec.address} and {other.address} collide")
        return [socket for _, socket in found]

    def socket_keys(self, table: dict[str, Any], address: Address, path: Path) -> None:
        for name in list(table):
            key = BY_TABLE["socket"][name]
            if address.scheme == "tcpmux" and name not in ("listen", "name"):
                why = f"`{name}` means nothing for {address}: the socket is that of the tcpmux service"
                self.wrong((*path, name), "other-mode", why, key=True)
                del table[name]
            elif key.modes and address.scheme not in key.modes:
                why = f"`{name}` means nothing for {address}: it is for {', '.join(key.modes)}"
                self.wrong((*path, name), "other-mode", why, key=True)
                del table[name]
        protocol = table.get("protocol")
        if protocol is not None and (protocol == "udplite") != (address.scheme[:3] == "udp"):
            scheme = "udp" if protocol == "udplite" else "tcp"
            self.wrong((*path, "protocol"), "bad-value", f'"{protocol}" goes with {scheme}:, not with {address}')
        if not self.is_root and (user := table.get("user")) is not None and self.uid_of(user) != self.machine.uid:
            self.wrong((*path, "user"), "not-permitted", f"only root can give a socket to {quote(user)}")
        self.proxy_keys(table, address, path)
        self.tls_keys(table, address, path)

    def tls_keys(self, table: dict[str, Any], address: Address, path: Path) -> None:
        """Whether superd can stand between this socket's clients and the service, with these files."""
        tls = table.get("tls")
        if tls is None:
            return
        here = (*path, "tls")
        if table.get("protocol") == "sctp":
            self.wrong(here, "other-mode", "`tls` means nothing for SCTP, which has no stream of bytes", key=True)
        if table.get("pass_credentials"):
            why = "`pass_credentials` means nothing with `tls`: the service gets no socket of its client"
            self.wrong((*path, "pass_credentials"), "other-mode", why, "remove it", key=True)
        if not self.merged.tree.get("enabled", True):
            return  # what is not there yet matters when it is started
        written = self.merged.tree["socket"][path[1]]["tls"]
        self.tls_files(here, written, tls.certificate, tls.key, tls.client_ca)
        tables = {name.lower(): (name, table) for name, table in written.get("sni", {}).items()}
        for one in tls.sni:
            name, table = tables[one.name]
            self.tls_files((*here, "sni", name), table, one.certificate, one.key)

    def tls_files(
        self, path: Path, written: Mapping[str, Any], certificate: str, key: str, client_ca: str | None = None
    ) -> None:
        """What superd reads as root must be root's alone to change, and a key nobody's business."""
        for name, file in (("certificate", certificate), ("key", key), ("client_ca", client_ca)):
            if file is None or (name == "key" and name not in written):
                continue
            if unreadable := self.machine.unreadable(file):
                self.wrong((*path, name), "unreadable", f"cannot read {unreadable}")
            elif self.is_root and (others := self.machine.untrusted(file, frozenset({0}))):
                self.wrong((*path, name), "not-trusted", f"superd is root and does not use {file}: {others}")
        if not self.machine.unreadable(key) and self.is_root and (others := self.machine.exposed(key)):
            place = (*path, "key" if "key" in written else "certificate")
            secret = f"superd is root and does not use the private key in {key}: {others}"
            self.wrong(place, "not-trusted", secret, f"chmod o= {key}")

    def proxy_keys(self, table: dict[str, Any], address: Address, path: Path) -> None:
        """Who may say who a client is must be said, in words that can be true there."""
        rules = table.get("proxy_trusted", ())
        written = self.merged.tree["socket"][path[1]]
        if "proxy_protocol" not in table:
            if rules and "proxy_protocol" not in written:
                why = "`proxy_trusted` goes with `proxy_protocol`"
                self.wrong((*path, "proxy_trusted"), "other-mode", why, "write proxy_protocol = true", key=True)
            return
        if not table["proxy_protocol"]:
            return
        if table.get("protocol") == "sctp":
            why = "`proxy_protocol` means nothing for SCTP, which has no stream of bytes"
            self.wrong((*path, "proxy_protocol"), "other-mode", why, key=True)
        unsaid = address.scheme != "unix" if "proxy_trusted" not in written else table.get("proxy_trusted") == ()
        if unsaid:
            why = "`proxy_protocol` needs `proxy_trusted`: anybody who connects could say to be anybody"
            self.wrong((*path, "proxy_protocol"), "missing-key", why, 'proxy_trusted = ["ADDRESS OF THE PROXY"]',
                       key=True)  # fmt: skip
        kinds = {"unix": ("user", "group"), "fd": ("network", "user", "group")}.get(address.scheme, ("network",))
        for number, rule in enumerate(rules):
            if rule.kind not in kinds:
                right = "users and groups" if address.scheme == "unix" else "networks"
                why = f"{quote(rule.text)} tells nobody apart who connects to {address}: write {right}"
                self.wrong((*path, "proxy_trusted", number), "bad-value", why)

    def proxy(self, got: dict[str, Any], sockets: list[SocketSpec]) -> None:
        """[proxy]: superd accepts, and the process has no socket of ours."""
        if "proxy" not in self.merged.tree:
            return
        table = got.get("proxy") or {}
        to = table.get("to")
        if "to" not in table and ("proxy",) not in self.failed:
            self.wrong(("proxy",), "missing-key", "[proxy] has no `to`", 'to = "tcp:127.0.0.1:${port}"', key=True)
        for key in ("builtin", "handler"):
            if key in got:
                why = f"[proxy] is for a program that listens by itself, and a {key} does not"
                self.wrong((key,), "other-mode", why, "remove it", key=True)
        if "run" in got and got["run"] not in ("on-demand", "always-on"):
            if not self.merged.origin(("run",)).is_default:
                why = f'run = "{got["run"]}" and [proxy] exclude each other: one process listens by itself for all'
                self.wrong(("run",), "other-mode", why, 'write "on-demand" or "always-on", or remove it')
            del got["run"]
        if "run" not in got and ("run",) not in self.failed:
            got["run"] = "on-demand"
        for key, why in (
            ("pass", "with [proxy] the process gets no sockets"),
            ("fd_protocols", "with [proxy] the process gets no sockets"),
            ("ready", "what tells that a program behind [proxy] is ready stands in [proxy]"),
        ):
            if key in got:
                self.irrelevant(got, (key,), f"`{key}`: {why}", "write it below [proxy]" if key == "ready" else "")
        if not sockets and self.sockets_known:
            self.wrong(("proxy",), "missing-key", "[proxy] needs a socket", 'write listen = "tcp:PORT"', key=True)
        for path, socket in zip(self.socket_paths, sockets, strict=True):
            if socket.address.scheme not in ("tcp", "tcp4", "tcp6", "unix", "vsock"):
                self.wrong(path, "other-mode", f"[proxy] carries streams, and {socket.address} is none")
            elif to is not None and to.port != 0 and collide(socket, SocketSpec(to, "")):
                self.wrong(("proxy", "to"), "address-taken", f"superd itself listens on {socket.address}")
        if to is not None and to.path is None and got.get("sandbox", {}).get("private_network"):
            why = f"with sandbox.private_network the program listens where superd cannot connect to: {to.scheme}"
            self.wrong(("proxy", "to"), "bad-value", why, 'write "unix:/PATH"')

    def uid_of(self, user: str | int) -> int | None:
        found = self.machine.user(user)
        return None if found is None else found[0]

    def run_and_pass(self, got: dict[str, Any], sockets: list[SocketSpec]) -> None:
        """Their defaults, and whether the sockets agree with them."""
        if not self.sockets_known:
            return
        kinds = {socket.address.kind for socket in sockets}
        if "builtin" in got:
            for path, socket in zip(self.socket_paths, sockets, strict=True):
                if socket.address.kind not in ("stream", "datagram") or socket.address.scheme == "unix-dgram":
                    self.wrong(path, "bad-value", f"a builtin service cannot listen on {socket.address}")
            got["run"], got["pass"] = "per-connection", "stdio"
            if not sockets and self.sockets_known:
                self.wrong((), "missing-key", "a builtin service needs a socket", 'write listen = "tcp:PORT"')
            return
        if "run" not in got and ("run",) not in self.failed:
            if not kinds:
                got["run"] = "always-on"
            elif kinds <= {"stream", "seqpacket", "unknown"}:  # of fd: it is seen when the socket is taken
                got["run"] = "per-connection"
            elif kinds in ({"datagram"}, {"fifo"}):
                got["run"] = "on-demand"
            else:
                said = "the kind of fd: is not known here" if "unknown" in kinds else "stream and datagram together"
                self.wrong(self.socket_paths[0][:1], "missing-run", f"{said}: `run` must say what is meant",
                           'write run = "on-demand" or "always-on"', key=True)  # fmt: skip
        run = got.get("run")
        if run is None:
            return
        if run in ("per-connection", "on-demand") and not sockets:
            self.wrong(("run",), "missing-key", f'run = "{run}" needs a socket', 'write listen = "tcp:PORT"')
        if run == "per-connection":
            self.no_connections(sockets)
        else:
            self.no_listener(run, sockets)
        if "pass" not in got and ("pass",) not in self.failed:
            got["pass"] = "stdio" if run == "per-connection" else "listen-fds"
        if got.get("pass") == "stdio" and run != "per-connection":
            count = sum(2 if socket.address.host == "localhost" else 1 for socket in sockets)
            if count == 0:
                self.irrelevant(got, ("pass",), 'pass = "stdio" needs a socket, and there is none', "remove it")
                got["pass"] = "listen-fds"
            elif count > 1:
                why = f'pass = "stdio" with run = "{run}" needs exactly one socket, and there are {count}'
                if any(socket.address.host == "localhost" for socket in sockets):
                    why += " (localhost is two: write 127.0.0.1 or [::1])"
                self.wrong(("pass",), "one-socket", why, 'write pass = "listen-fds"')

    def no_connections(self, sockets: list[SocketSpec]) -> None:
        """C2: a datagram that no process has read yet would start one after the other, without end."""
        for path, socket in zip(self.socket_paths, sockets, strict=True):
            if socket.address.kind not in ("datagram", "fifo"):
                continue
            what = "datagram socket" if socket.address.kind == "datagram" else "FIFO"
            why = f"a {what} has no connections, so {socket.address} cannot be per-connection: "
            why += "what is not read yet would start one process after the other, without end"
            self.wrong(path, "no-connections", why, 'write run = "on-demand"')

    def no_listener(self, run: str, sockets: list[SocketSpec]) -> None:
        for path, socket in zip(self.socket_paths, sockets, strict=True):
            if socket.proxy_protocol and "proxy" not in self.merged.tree:
                why = f'`proxy_protocol` means nothing with run = "{run}": the service accepts its clients itself'
                self.wrong((*path[:-1], "proxy_protocol"), "other-mode", why, 'write run = "per-connection"', key=True)
            if socket.tls and "proxy" not in self.merged.tree:
                why = f'`tls` means nothing with run = "{run}": the service accepts its clients itself'
                self.wrong((*path[:-1], "tls"), "other-mode", why, 'write run = "per-connection"', key=True)
            if socket.address.scheme == "tcpmux":
                why = f'{socket.address} is no socket that run = "{run}" could give away: it has connections only'
                self.wrong(path, "other-mode", why, 'write run = "per-connection"')

    def modes(self, got: dict[str, Any], sockets: list[SocketSpec]) -> None:
        """Keys that mean nothing with this `run` and `pass`."""
        run = got.get("run")
        tables = ("limits", "access")
        for table, values in (("service", got), *((name, got.get(name, {})) for name in tables)) if run else ():
            for name in list(values):
                key = BY_TABLE[table][name]
                if "proxy" in self.merged.tree and (table != "service" or name == "access"):
                    continue  # superd accepts
                if key.modes and run not in key.modes:
                    path = (name,) if table == "service" else (table, name)
                    modes = " or ".join(f'"{mode}"' for mode in key.modes)
                    self.irrelevant(got, path, f'`{name}` is a key of run = {modes}, and this service is "{run}"')
        if "fd_protocols" in got and "pass" in got and (got["pass"] == "stdio" or not sockets):
            self.irrelevant(got, ("fd_protocols",), '`fd_protocols` goes with pass = "listen-fds" and a socket')
        for socket in sockets if got.get("idle_timeout") is not None and "proxy" not in got else ():
            if socket.address.scheme == "vsock" or socket.protocol == "sctp":
                kind = socket.protocol or "vsock"
                self.irrelevant(
                    got, ("idle_timeout",), f"`idle_timeout`: nothing tells whether {kind} sockets are used"
                )
                break

    def access(self, got: dict[str, Any], sockets: list[SocketSpec]) -> None:
        """Rules that nobody could keep must not be there, not even from [defaults]: the service would be open (A10)."""
        rules, run = self.merged.tree.get("access"), got.get("run")
        if isinstance(rules, dict) and rules.get("allow") == []:  # "who may connect" names nobody: open it is not
            why = "`allow` is empty, and does not say whether that is nobody or all"
            self.wrong(("access", "allow"), "bad-value", why,
                       'write allow = ["0.0.0.0/0", "::/0"] or deny = ["0.0.0.0/0", "::/0"]')  # fmt: skip
        if not isinstance(rules, dict) or not any(rules.values()) or not self.sockets_known:
            return
        if run is None or run == "per-connection" or "proxy" in self.merged.tree:
            return
        path: Path = ("access",)
        if run == "on-demand" and all(socket.address.scheme[:3] == "udp" for socket in sockets):
            found = got.get("access", {})
            if any(rule.kind == "host" for name in ("allow", "deny") for rule in found.get(name, ())):
                self.wrong(path, "bad-value", "names of hosts come too late for datagrams: write networks")
        elif sockets and not self.merged.origin(path).is_default:
            self.wrong(path, "other-mode", f'[access] cannot be kept: run = "{run}" gives the sockets themselves away',
                       'write run = "per-connection"', key=True)  # fmt: skip
        elif sockets:
            where = self.socket_paths[0][:1]
            why = f'[access] of [defaults] cannot be kept: run = "{run}" gives the sockets themselves away'
            self.wrong(where, "other-mode", why, 'write run = "per-connection"', key=True)

    def outputs(self, got: dict[str, Any]) -> None:
        run, passed = got.get("run"), got.get("pass")
        if run is None or passed is None:
            return
        if passed == "stdio" and "stdout" in got:
            self.irrelevant(got, ("stdout",), '`stdout` is the socket with pass = "stdio"', "remove it")
        for key in ("stdout", "stderr"):
            if key in got and got[key].kind == "socket" and passed != "stdio" and run != "per-connection":
                self.irrelevant(got, (key,), f'{key} = "socket" needs pass = "stdio" or run = "per-connection"')

    def context(self, got: dict[str, Any]) -> Context | None:
        """Who it runs as and how. None if that cannot be told, which is then reported."""
        if self.failed & {("user",), ("group",), ("groups",), ("sandbox",), ("scheduling",), ("rlimit",)}:
            return None
        user, group, groups = got.get("user"), got.get("group"), got.get("groups")
        if self.is_root:
            user = "nobody" if user is None else user
            if (uid := self.uid_of(user)) is None:
                self.wrong((), "missing-key", 'there is no user "nobody" on this machine: `user` must say who it is')
                return None
        elif not got.get("enabled", True):
            uid = self.machine.uid  # who cannot be had here matters when it is started
        else:
            uid = self.machine.uid
            refused = "superd is not root and cannot become"
            if user is not None and self.uid_of(user) != uid:
                self.wrong(("user",), "not-permitted", f"{refused} {quote(user)}", "remove it")
            if group is not None and self.machine.group(group) != self.machine.gid:
                self.wrong(("group",), "not-permitted", f"{refused} group {quote(group)}", "remove it")
            if groups is not None:
                self.wrong(("groups",), "not-permitted", f"{refused} a member of other groups", "remove it")
            user = group = groups = None
        sandbox = dict(got.get("sandbox", {}))
        for name, value in sandbox.items():
            if value and not self.is_root and name != "no_new_privileges":
                self.wrong(
                    ("sandbox", name), "not-permitted", f"superd is not root and cannot have `{name}`", "remove it"
                )
        if (kept := sandbox.get("capabilities")) is not None:
            for name in set(sandbox.get("ambient_capabilities", ())) - set(kept):
                reason = f"{quote(name)} is not among `capabilities`, which are all that there can be"
                self.wrong(("sandbox", "ambient_capabilities"), "bad-value", reason)
        self.root = sandbox.get("chroot") or ""
        if self.root and self.is_root and (others := self.machine.untrusted(self.root, frozenset({0}))):
            self.wrong(
                ("sandbox", "chroot"), "not-trusted", f"superd is root and does not go into {self.root}: {others}"
            )
        sandbox.setdefault("no_new_privileges", uid != 0)
        grouped = self.cgroup(got) and got.get("run") == "per-connection"
        private = any(sandbox.get(name) for name in ("private_tmp", "private_network", "private_pids"))
        if private or grouped or "handler" in got:
            sandbox["owner"] = self.name
        scheduling = got.get("scheduling", {})
        more = {key: got[key] for key in ("umask", "cwd") if key in got}
        return Context(
            user=user, group=group, groups=groups,
            rlimits=tuple((name, soft, hard) for name, (soft, hard) in got.get("rlimit", {}).items()),
            handler=got.get("handler"), grouped=grouped, **sandbox, **scheduling, **more,
        )  # fmt: skip

    def cgroup(self, got: dict[str, Any]) -> bool:
        """Whether its group has limits. A controller that no group of this machine can have is found here; whether
        superd may use one only its start can tell."""
        wanted = Cgroup(**got.get("cgroup", {}))
        for name, key in zip(CGROUP_FILES, BY_TABLE["cgroup"], strict=True):
            controller = name.partition(".")[0]
            if controller in wanted.controllers() and got.get("enabled", True) and "builtin" not in got:
                if why := self.machine.lacks_controller(controller):
                    self.wrong(("cgroup", key), "not-available", f"cannot limit {controller} here: {why}", key=True)
        return bool(wanted.controllers())

    def builtin(self, got: dict[str, Any], sockets: list[SocketSpec]) -> tuple[str, ...]:
        """No command, and no process that anything could be said about."""
        for key in ("command", "handler", *OF_PROCESSES):
            if key in self.merged.tree and key in got:
                self.irrelevant(
                    got, (key,), f"`{key}` means nothing for a builtin service: it is no process", "remove it"
                )
        datagram = [socket for socket in sockets if socket.address.kind == "datagram"]
        if got["builtin"] == "tcpmux" and datagram:
            self.wrong(("builtin",), "bad-value", f"tcpmux is for connections, and {datagram[0].address} has none")
        for path, socket in zip(self.socket_paths, sockets, strict=True):
            if got["builtin"] == "tcpmux" and socket.tls:
                why = "`tls` means nothing for tcpmux: the services behind it would see superd as their client"
                self.wrong((*path[:-1], "tls"), "other-mode", why, "remove it", key=True)
            if got["builtin"] == "tcpmux" and socket.proxy_protocol:
                why = "`proxy_protocol` means nothing for tcpmux: the services behind it would see the proxy"
                self.wrong((*path[:-1], "proxy_protocol"), "other-mode", why, "remove it", key=True)
        if got["builtin"] == "chargen" and datagram:
            why = (
                f"chargen would answer {datagram[0].address} with more than it was sent, to whatever address was forged"
            )
            self.wrong(("builtin",), "bad-value", why)
        return ()

    def program(
        self, got: dict[str, Any], sockets: list[SocketSpec], context: Context | None
    ) -> tuple[str, ...] | None:
        """The command with the absolute path of its program (E26)."""
        if "builtin" in got:
            return self.builtin(got, sockets)
        if "handler" in got:
            return self.handler(got)
        if "workers" in got:
            self.irrelevant(got, ("workers",), "`workers` goes with `handler`")
        if "command" not in got:
            if not {"command", "handler", "builtin"} & self.merged.tree.keys():
                right = 'write command = ["/path/of/program", "argument", …]'
                self.wrong((), "missing-key", f"there is no `command`: {right}")
            return None
        where: Path = ("command", 0) if isinstance(self.merged.tree["command"], list) else ("command",)
        return self.resolved(got["command"], where, got, context)

    def handler(self, got: dict[str, Any]) -> tuple[str, ...] | None:
        """No command; what would go with one must not be there, and root imports nobody else's code (F18)."""
        for key in ("command", "argv0"):
            if key in self.merged.tree:
                self.irrelevant(got, (key,), f"`{key}` and `handler` are both there", "remove one of them")
        if got.get("pass") == "listen-fds":
            self.wrong(("pass",), "other-mode", "a handler has its connection as a socket and as files", "remove it")
        cwd = got.get("cwd", "/")
        if self.is_root:
            owners = frozenset({0, self.uid_of(got.get("user", "nobody")) or 0})
            if why := self.machine.untrusted(cwd, owners):
                self.wrong(("handler",), "not-trusted", f"superd is root and imports nothing from {cwd}: {why}")
        return ()

    def more_commands(self, got: dict[str, Any], context: Context | None) -> None:
        """The programs of the commands around the main one, and of checks, as `command` has its own."""
        for name in ("start_pre", "start_post", "stop_post"):
            if name in got:
                several = isinstance(self.merged.tree[name], list)
                found = []
                for number, words in enumerate(got[name]):
                    where: Path = (name, number) if several else (name,)
                    if words[0].startswith("-"):
                        right = f"write {name} = [[…]]"
                        self.wrong(where, "bad-value", f"`{name}` is a list of commands, and this is none", right)
                        continue
                    found.append(self.resolved(words, where, got, context) or words)
                got[name] = tuple(found)
        proxy, health = got.get("proxy") or {}, got.get("health", {})
        for path, table in ((("ready",), got), (("proxy", "ready"), proxy), (("health", "check"), health)):
            check = table.get(path[-1])
            if isinstance(check, Ready) and check.kind == "exec":
                table[path[-1]] = replace(check, command=self.resolved(check.command, path, got, context) or ())

    def readiness(self, got: dict[str, Any], sockets: list[SocketSpec]) -> None:
        """What `ready` and [health] need of the rest."""
        path: Path = ("ready",)
        ready = got.get("ready")
        if "proxy" in self.merged.tree:
            ready, path, sockets = (got.get("proxy") or {}).get("ready"), ("proxy", "ready"), []
        if ready is not None and ready.kind == "fd":
            stored = got.get("fdstore", 0)
            last = 3 + (len(sockets) if got.get("pass") == "listen-fds" else 0) + stored - 1
            if 3 <= ready.fd <= last:
                whose = "a socket's or a stored one's" if stored else "a socket's"
                self.wrong(path, "bad-value", f"fd {ready.fd} is {whose}: they stand at 3 to {last}",
                           f'write "fd:{last + 1}"')  # fmt: skip
        if (
            ready is not None
            and ready.kind == "log"
            and not {"log"} & {got.get(key, Output()).kind for key in ("stderr", "stdout")}
        ):
            self.wrong(path, "bad-value", 'nothing that it writes comes to the log: stdout or stderr = "log"')
        if "health" in got and "check" not in got["health"] and ("health",) not in self.failed:
            self.wrong(("health",), "missing-key", "[health] has no `check`", 'check = "connect:tcp:127.0.0.1:80"')

    def resolved(
        self, words: tuple[str, ...], where: Path, got: dict[str, Any], context: Context | None
    ) -> tuple[str, ...] | None:
        """The command with the absolute path of its program, or None after a report."""
        try:
            path = self.resolve(words[0])
            self.executable(path)
        except WrongError as error:
            if error.problem[0] == "missing-program" and not got.get("enabled", True):
                return words  # a disabled service may well be one whose program is not installed
            self.wrong(where, *error.problem)
            return None
        if self.is_root and context is not None and context.user is not None:
            # A program of the service's own user can do no more than that user can.
            owners = frozenset({0, self.uid_of(context.user) or 0})
            if why := self.machine.untrusted(self.root + path, owners):
                self.wrong(where, "not-trusted", f"superd is root and does not start {path}: {why}")
        return (path, *words[1:])

    def resolve(self, program: str) -> str:
        if "${" in program:
            raise WrongError("bad-value", f"the program of {quote(program)} must be known when the file is read")
        if isabs(program):
            return program
        if "/" in program:
            right = normpath(join(self.directory, program))
            raise WrongError("relative-program", f"{quote(program)} is a relative path", f"write {quote(right)}")
        # What a service finds itself comes first, then what only superd finds, and what is installed beside it, as
        # superctl is in a virtual environment.
        places = dict.fromkeys(f"{PATH}:{self.environ.get('PATH', '')}:{dirname(sys.executable)}".split(":"))
        for directory in places:
            candidate = join(directory, program)
            facts = self.machine.file(self.root + candidate) if isabs(directory) else None
            if facts is not None and facts.kind == "file" and facts.executable:
                return candidate
        raise WrongError(
            "missing-program", f"there is no program {quote(program)} in PATH ({':'.join(filter(None, places))})"
        )

    def executable(self, path: str) -> None:
        facts = self.machine.file(self.root + path)
        if facts is None:
            inside = f" below {self.root}" if self.root else ""
            raise WrongError("missing-program", f"there is no program {quote(path)}{inside}")
        if facts.kind != "file":
            kind = "a directory" if facts.kind == "directory" else "no regular file"
            raise WrongError("not-executable", f"{quote(path)} is {kind}")
        if not facts.executable:
            raise WrongError("not-executable", f"{quote(path)} is not executable", f"chmod +x {path}")
        head = facts.head
        if head is None or head.startswith(b"\x7fELF"):
            return
        if head.startswith(b"#!"):
            words = head[2:].split(b"\n")[0].split()
            interpreter = words[0].decode(errors="surrogateescape") if words else ""
            complete = b"\n" in head or len(words) > 1
            if complete and isabs(interpreter) and self.machine.file(self.root + interpreter) is None:
                why = f"{quote(path)} wants the interpreter {quote(interpreter)}, which does not exist"
                raise WrongError("missing-program", why)
        elif b"\0" not in head:  # a binary that is not ELF may have its handler in binfmt_misc; text has none
            why = f"{quote(path)} has no interpreter line, so the kernel does not start it (ENOEXEC)"
            raise WrongError("not-executable", why, f'begin it with #!/bin/sh, or write ["/bin/sh", "{path}"]')

    def runtime_names(self, got: dict[str, Any], sockets: list[SocketSpec]) -> None:
        """Whether there will be what `${port:S}` and `${fd:S}` name."""
        if not self.sockets_known or "run" not in got:
            return
        ports = [socket.name for socket in sockets if socket.address.port is not None]
        fds = ["connection"] if got["run"] == "per-connection" else [socket.name for socket in sockets]
        proxied, to = "proxy" in self.merged.tree, (got.get("proxy") or {}).get("to")
        for path, what in self.runtime:
            kind, colon, name = what.partition(":")
            if proxied and what == "port":
                if to is not None and to.port is None:
                    self.wrong(path, "bad-value", f"${{port}} is that of `to`, and {to} has none")
            elif proxied and kind == "fd":
                self.wrong(path, "bad-value", f"${{{what}}}: with [proxy] the process gets no sockets")
            elif kind == "fd" and got.get("pass") != "listen-fds":
                self.wrong(path, "bad-value", f'${{{what}}} goes with pass = "listen-fds"')
            elif not ports and kind == "port":
                self.wrong(path, "bad-value", f"${{{what}}} needs a socket that has a port")
            elif colon and name not in (names := ports if kind == "port" else fds):
                there = ", ".join(map(quote, dict.fromkeys(names))) or "none"
                self.wrong(path, "bad-value", f"${{{what}}}: no socket has the name {quote(name)} (there are: {there})")


@lru_cache(maxsize=256)
def _shared(value: _Value) -> _Value:
    """The same object for equal values: of many thousands of services nearly all have the same limits."""
    return value
