"""TOML files -> (Snapshot, problems), by the table of keys.py. Every problem of every file is found at once.

A file that is wrong affects its own service alone: that name is in Snapshot.broken, and the others are there. What
could make a service run with more rights than was meant (a misspelt `user`, a [defaults] that cannot be read) breaks
every service it concerns. There is no I/O here: facts of the machine come from a Machine.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from posixpath import dirname, isabs, join, normpath
from typing import Any, Literal

from superd.core.document import Document, Merged, Path
from superd.core.keys import BY_TABLE
from superd.core.kinds import NAME, Kinds, WrongError
from superd.core.machine import Machine
from superd.core.plan import PATH
from superd.core.problems import Problem, format_problems
from superd.core.spec import Address, Context, DaemonSpec, Limits, RestartPolicy, ServiceSpec, Snapshot, SocketSpec
from superd.core.values import quote

Role = Literal["service", "drop-in", "daemon"]


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file as it was read.

    path  as it was named; a relative one counts from superd's working directory
    name  of the service ("worker@" for a template), also for a drop-in; "superd" for superd.toml
    """

    path: str
    data: bytes
    role: Role
    name: str


def load(
    files: Sequence[SourceFile],
    *,
    machine: Machine,
    environ: Mapping[str, str],
    is_root: bool,
    problems: Sequence[Problem] = (),
) -> tuple[Snapshot, list[Problem]]:
    """The services that `files` describe, in their order, and all that is wrong with them.

    environ   superd's own, for `${NAME}` and PATH
    is_root   whether superd is, or will be, root
    problems  those of reading the files; they break their services, too, and come back with the others
    """
    loader = _Loader(machine, environ, is_root, list(problems))
    return loader.load(files)


def conf_dirs(source: SourceFile) -> tuple[str, ...]:
    """`conf_dirs` of a superd.toml, relative ones from its directory; () if it is wrong, which load() reports."""
    tree = _document(source).tree or {}
    found = tree.get("conf_dirs", [])
    if not isinstance(found, list) or not all(isinstance(item, str) and item and "\0" not in item for item in found):
        return ()
    return tuple(normpath(join(dirname(source.path), item)) for item in found)


def _document(source: SourceFile) -> Document:
    import tomli  # late: 15 ms that a command line without files does not need

    service = None if source.role == "daemon" else source.name
    return Document(source.path, source.data, tomli.loads, service=service)


class _Loader:
    def __init__(self, machine: Machine, environ: Mapping[str, str], is_root: bool, problems: list[Problem]) -> None:
        self.machine = machine
        self.environ = environ
        self.is_root = is_root
        self.problems = problems
        self.broken: dict[str, list[Problem]] = {}
        for problem in problems:
            if problem.service is not None and problem.is_error:
                self.broken.setdefault(problem.service, []).append(problem)
        self.defaults: tuple[Document, dict[str, Any]] | None = None
        self.defaults_failed = ""

    def load(self, files: Sequence[SourceFile]) -> tuple[Snapshot, list[Problem]]:
        order = {source.path: number for number, source in enumerate(files)}
        daemon = self._daemon([source for source in files if source.role == "daemon"])
        drop_ins: dict[str, list[SourceFile]] = {}
        for source in files:
            if source.role == "drop-in":
                drop_ins.setdefault(source.name, []).append(source)
        services: dict[str, ServiceSpec] = {}
        first: dict[str, str] = {}
        taken: dict[tuple[Any, ...], list[tuple[SocketSpec, ServiceSpec]]] = {}
        for source in files:
            if source.role != "service":
                continue
            if (other := first.setdefault(source.name.lower(), source.path)) != source.path:
                self._report(Problem("duplicate-name", f"service {source.name!r} is {other} already: the first counts",
                                     source.path, service=source.name))  # fmt: skip
                continue
            for name, reader, found in self._services(source, drop_ins.get(source.name, ())):
                spec = reader.service() if reader else None
                if reader and spec and spec.enabled:
                    self._conflicts(reader, spec, taken)
                for problem in found:
                    self._report(problem)
                wrong = self.broken.get(source.name, []) + [p for p in found if p.is_error]
                if spec is None or wrong:
                    self.broken[name] = wrong
                    continue
                services[name] = spec
                for socket in spec.sockets if spec.enabled else ():
                    for place in _places(socket):
                        taken.setdefault(place, []).append((socket, spec))
        broken = {
            name: format_problems(dict.fromkeys(found), "short").rstrip("\n")
            for name, found in self.broken.items()
            if name not in services
        }
        unique = list(dict.fromkeys(replace(p, service=None) for p in self.problems))
        by_place = {replace(p, service=None): p for p in reversed(self.problems)}
        ordered = sorted((by_place[p] for p in unique), key=lambda p: (order.get(p.path, -1), p.line, p.column))
        return Snapshot(daemon, services, broken), ordered

    def _reader(self, merged: Merged, name: str | None) -> _Reader:
        return _Reader(self.machine, self.environ, self.is_root, merged, name)

    def _report(self, problem: Problem) -> None:
        self.problems.append(problem)

    def _daemon(self, sources: Sequence[SourceFile]) -> DaemonSpec:
        """superd.toml; its [defaults] are left in self.defaults."""
        for extra in sources[1:]:
            self._report(Problem("duplicate-name", f"{sources[0].path} is read already: the first counts", extra.path))
        if not sources:
            for problem in self.problems:
                if problem.service is None and problem.is_error and problem.path.endswith("superd.toml"):
                    self.defaults_failed = str(problem)
            return DaemonSpec()
        document = _document(sources[0])
        self.problems += document.problems
        if document.tree is None:
            self.defaults_failed = str(document.problems[0])
            return DaemonSpec()
        merged = Merged(document)
        merged.lay(document, document.tree)
        reader = self._reader(merged, None)
        top = reader.table("superd", merged.tree, ())
        if isinstance(defaults := merged.tree.get("defaults", {}), dict):
            self.defaults = document, defaults
            alone = Merged(document)
            alone.lay(document, defaults, ("defaults",), is_default=True)
            checker = self._reader(alone, None)
            checker.own = {"name": "name", "instance": "instance"}
            checker.tables()
            self.problems += checker.problems
        else:
            self.defaults_failed = str(reader.problems[0])
        self.problems += reader.problems
        known = {field: top[key] for key, field in _DAEMON_FIELDS.items() if key in top}
        return DaemonSpec(**known)

    def _services(
        self, source: SourceFile, drop_ins: Iterable[SourceFile]
    ) -> Iterator[tuple[str, _Reader | None, list[Problem]]]:
        """(name, reader, its problems) of the service, or of each instance of the template, that a file is.

        None for the reader: there is nothing to read, and the problems say why.
        """
        documents = [_document(source), *map(_document, drop_ins)]
        syntax = [problem for document in documents for problem in document.problems]
        if self.defaults_failed:
            why = f"[defaults] cannot be read, so no service can start: {self.defaults_failed}"
            syntax.append(Problem("no-defaults", why, source.path, service=source.name))
        if syntax:
            yield source.name, None, syntax
            return
        merged = Merged(documents[0])
        if self.defaults:
            merged.lay(*self.defaults, ("defaults",), is_default=True)
        for document in documents:
            merged.lay(document, document.tree or {})
        if not documents[0].tree:
            why = "file is empty: a service has at least `command`"
            yield source.name, None, [Problem("empty", why, source.path, service=source.name)]
            return
        name, at, instance = source.name.partition("@")
        if instance or not NAME.fullmatch(name):
            right = f"name {name}@.toml with instances = [{instance!r}]" if instance else "a-z 0-9 _ . -, at most 63"
            why = f"{source.name!r} is not a name of a service: {right}"
            yield source.name, None, [Problem("bad-name", why, source.path, service=source.name)]
            return
        if not at:
            single = self._reader(merged, source.name)
            yield source.name, single, single.problems
            return
        reader = self._reader(merged, source.name)
        instances = reader.instances()
        if reader.problems:
            yield source.name, None, reader.problems
        for instance in instances:
            each = self._reader(merged, f"{name}@{instance}")
            yield f"{name}@{instance}", each, each.problems

    def _conflicts(
        self, reader: _Reader, spec: ServiceSpec, taken: dict[tuple[Any, ...], list[tuple[SocketSpec, ServiceSpec]]]
    ) -> None:
        """A12: sockets that another enabled service has."""
        for path, socket in zip(reader.socket_paths, spec.sockets, strict=True):
            for place in _places(socket):
                for other, owner in taken.get(place, ()):
                    if _overlap(socket, other) and not (socket.reuse_port and other.reuse_port):
                        same = "" if socket.address == other.address else f" ({other.address})"
                        why = f"{socket.address} belongs to service {owner.name!r} already{same}, in {owner.source}"
                        reader.wrong(path, "address-taken", why)


def _places(socket: SocketSpec) -> list[tuple[Any, ...]]:
    """Where a socket stands: two that share none cannot collide."""
    address = socket.address
    if address.is_ip:
        transport = socket.protocol if socket.protocol in ("sctp", "udplite") else address.scheme[:3]
        return [(transport, address.port)] if address.port else []
    if address.scheme == "vsock":
        return [("vsock", address.port)]
    return [("path" if address.is_unix or address.scheme == "fifo" else address.scheme, address.path)]


def _overlap(one: SocketSpec, other: SocketSpec) -> bool:
    """Whether the kernel would refuse the second of two sockets that share a place."""
    if one.address.is_ip and one.device and other.device and one.device != other.device:
        return False
    if one.address.is_ip:
        mine, theirs = _hosts(one.address), _hosts(other.address)
        return any(None in (mine[family], theirs[family]) or mine[family] == theirs[family]
                   for family in mine.keys() & theirs.keys())  # fmt: skip
    if one.address.scheme == "vsock":
        return None in (one.address.cid, other.address.cid) or one.address.cid == other.address.cid
    return True


def _hosts(address: Address) -> dict[int, str | None]:
    """Bound host by IP version, None for every one. "[::]" is IPv6 alone: every address of both has no host."""
    host = address.host
    if host == "localhost":
        both: dict[int, str | None] = {4: "127.0.0.1", 6: "::1"}
    elif host is None:
        both = {4: None, 6: None}
    elif ":" in host:
        both = {6: None if host == "::" else host}
    else:
        both = {4: None if host == "0.0.0.0" else host}
    version = address.scheme[3:]
    return {int(version): both[int(version)]} if version else both


_DAEMON_FIELDS = {
    "control": "control", "control_mode": "control_mode", "log": "log", "log_level": "log_level",
    "stop_timeout": "stop_timeout_s",
}  # fmt: skip
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
    "kill_mode": "kill_mode",
}  # fmt: skip


class _Reader(Kinds):
    """Turns one merged tree into a ServiceSpec, and judges its keys together."""

    socket_paths: list[Path]  # where the address of each socket is written

    def tables(self) -> dict[str, Any]:
        return self.table("service", self.merged.tree, ())

    def instances(self) -> tuple[str, ...]:
        if "instances" not in self.merged.tree:
            self.wrong((), "missing-key", 'a template has `instances`: write instances = ["a", "b"]')
            return ()
        found = self.table("service", {"instances": self.merged.tree["instances"]}, ())
        return tuple(found.get("instances", ()))

    def service(self) -> ServiceSpec | None:
        """The spec; None if there are problems."""
        assert self.name is not None
        got = self.tables()
        if "@" not in self.name and "instances" in got:
            self.irrelevant(got, ("instances",), "only a template has instances: rename the file to NAME@.toml")
        sockets = self.sockets(got)
        self.run_and_pass(got, sockets)
        self.modes(got, sockets)
        self.outputs(got)
        context = self.context(got)
        command = self.program(got, context)
        self.runtime_names(got, sockets)
        if any(problem.is_error for problem in self.problems):
            return None
        assert command is not None and context is not None
        written = got["command"][0]
        limits = Limits(**got.get("limits", {}))
        got.setdefault("restart", "on-failure" if got["run"] == "always-on" else "no")
        restart = RestartPolicy(**{field: got[key] for key, field in _RESTART_FIELDS.items() if key in got})
        plain = {field: got[key] for key, field in _PLAIN_FIELDS.items() if key in got}
        argv0 = got.get("argv0", written if written != command[0] else None)
        return ServiceSpec(
            self.name, self.merged.main.path, command, got["run"], got["pass"], tuple(sockets), argv0=argv0,
            context=context, user_assumed=self.is_root and "user" not in got, limits=limits, restart=restart, **plain,
        )  # fmt: skip

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
                if set(_places(spec)) & set(_places(other)) and _overlap(spec, other):
                    if not (spec.reuse_port and other.reuse_port):
                        self.wrong(
                            self.socket_paths[index], "address-taken", f"{spec.address} and {other.address} collide"
                        )
        return [socket for _, socket in found]

    def socket_keys(self, table: dict[str, Any], address: Address, path: Path) -> None:
        for name in list(table):
            key = BY_TABLE["socket"][name]
            if key.modes and address.scheme not in key.modes:
                why = f"`{name}` means nothing for {address}: it is for {', '.join(key.modes)}"
                self.wrong((*path, name), "other-mode", why, key=True)
                del table[name]
        protocol = table.get("protocol")
        if protocol is not None and (protocol == "udplite") != (address.scheme[:3] == "udp"):
            scheme = "udp" if protocol == "udplite" else "tcp"
            self.wrong((*path, "protocol"), "bad-value", f'"{protocol}" goes with {scheme}:, not with {address}')
        if not self.is_root and (user := table.get("user")) is not None and self.uid_of(user) != self.machine.uid:
            self.wrong((*path, "user"), "not-permitted", f"only root can give a socket to {quote(user)}")

    def uid_of(self, user: str | int) -> int | None:
        found = self.machine.user(user)
        return None if found is None else found[0]

    def run_and_pass(self, got: dict[str, Any], sockets: list[SocketSpec]) -> None:
        """Their defaults, and whether the sockets agree with them."""
        if not self.sockets_known:
            return
        kinds = {socket.address.kind for socket in sockets}
        if "run" not in got and ("run",) not in self.failed:
            if not kinds:
                got["run"] = "always-on"
            elif kinds <= {"stream", "seqpacket"}:
                got["run"] = "per-connection"
            elif kinds in ({"datagram"}, {"fifo"}):
                got["run"] = "on-demand"
            else:
                said = "the kind of fd: is not known here" if "unknown" in kinds else "stream and datagram together"
                choices = '"on-demand" or "always-on"'
                choices = f'"per-connection", {choices}' if not kinds & {"datagram", "fifo"} else choices
                self.wrong(self.socket_paths[0][:1], "missing-run", f"{said}: `run` must say what is meant",
                           f"write run = {choices}", key=True)  # fmt: skip
        run = got.get("run")
        if run is None:
            return
        if run in ("per-connection", "on-demand") and not sockets:
            self.wrong(("run",), "missing-key", f'run = "{run}" needs a socket', 'write listen = "tcp:PORT"')
        if run == "per-connection":
            self.no_connections(sockets)
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

    def modes(self, got: dict[str, Any], sockets: list[SocketSpec]) -> None:
        """Keys that mean nothing with this `run` and `pass`."""
        run = got.get("run")
        for table, values in (("service", got), ("limits", got.get("limits", {}))) if run is not None else ():
            for name in list(values):
                key = BY_TABLE[table][name]
                if key.modes and run not in key.modes:
                    path = (name,) if table == "service" else (table, name)
                    modes = " or ".join(f'"{mode}"' for mode in key.modes)
                    self.irrelevant(got, path, f'`{name}` is a key of run = {modes}, and this service is "{run}"')
        if "fd_protocols" in got and "pass" in got and (got["pass"] == "stdio" or not sockets):
            self.irrelevant(got, ("fd_protocols",), '`fd_protocols` goes with pass = "listen-fds" and a socket')

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
        scheduling = got.get("scheduling", {})
        more = {key: got[key] for key in ("umask", "cwd") if key in got}
        return Context(
            user=user, group=group, groups=groups,
            rlimits=tuple((name, soft, hard) for name, (soft, hard) in got.get("rlimit", {}).items()),
            no_new_privileges=got.get("sandbox", {}).get("no_new_privileges", uid != 0),
            **scheduling, **more,
        )  # fmt: skip

    def program(self, got: dict[str, Any], context: Context | None) -> tuple[str, ...] | None:
        """The command with the absolute path of its program (E26)."""
        if "command" not in got:
            if not {"command", "handler", "builtin"} & self.merged.tree.keys():
                right = 'write command = ["/path/of/program", "argument", …]'
                self.wrong((), "missing-key", f"there is no `command`: {right}")
            return None
        words: tuple[str, ...] = got["command"]
        where: Path = ("command", 0) if isinstance(self.merged.tree["command"], list) else ("command",)
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
            if why := self.machine.untrusted(path, owners):
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
        # What a service finds itself comes first; what only superd finds (a virtual environment) after it.
        places = dict.fromkeys(f"{PATH}:{self.environ.get('PATH', '')}".split(":"))
        for directory in places:
            candidate = join(directory, program)
            facts = self.machine.file(candidate) if isabs(directory) else None
            if facts is not None and facts.kind == "file" and facts.executable:
                return candidate
        raise WrongError(
            "missing-program", f"there is no program {quote(program)} in PATH ({':'.join(filter(None, places))})"
        )

    def executable(self, path: str) -> None:
        facts = self.machine.file(path)
        if facts is None:
            raise WrongError("missing-program", f"there is no program {quote(path)}")
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
            if complete and isabs(interpreter) and self.machine.file(interpreter) is None:
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
        for path, what in self.runtime:
            kind, colon, name = what.partition(":")
            if kind == "fd" and got.get("pass") != "listen-fds":
                self.wrong(path, "bad-value", f'${{{what}}} goes with pass = "listen-fds"')
            elif not ports and kind == "port":
                self.wrong(path, "bad-value", f"${{{what}}} needs a socket that has a port")
            elif colon and name not in (names := ports if kind == "port" else fds):
                there = ", ".join(map(quote, dict.fromkeys(names))) or "none"
                self.wrong(path, "bad-value", f"${{{what}}}: no socket has the name {quote(name)} (there are: {there})")
