"""systemd units -> services: .socket with .service or @.service, drop-ins, services without a socket.

A socket unit whose service is not among the files given takes it from its own directory. What a unit leaves out
means here what it means to systemd: no User= is root, no Restart= is "no", 90 seconds to stop.
"""

from __future__ import annotations

import os
import posixpath
import re
import shlex
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from superd.core.keys import BY_TABLE
from superd.core.values import format_duration, format_signal, format_size, parse_signal
from superd.importers.draft import (
    Draft,
    Job,
    Place,
    as_user,
    identity,
    ip_listen,
    listen,
    literal,
    octal,
    runs_as_root,
    service_name,
)
from superd.importers.unitfile import Unit, is_yes, parse, seconds, size, split, split_commands

INSTANCE = "\ue000"  # stands for ${instance} until everything else is escaped

_SECURITY = re.compile(
    r"(Protect|Private|Restrict|SystemCall|Capabilit|Ambient|SecureBits|ReadOnly|ReadWrite|Inaccessible|Exec(Paths)|"
    r"NoExec|TemporaryFile|Bind(ReadOnly)?Paths|Root|Mount|MemoryDeny|LockPers|RemoveIPC|DynamicUser|AppArmor|SELinux|"
    r"Smack|IP(Address|Ingress|Egress)|Device|PAMName|Keyring|LoadCred|SetCred|SocketBind|ProcSubset|NoNewPriv|UMask|"
    r"Supplementary|User|Group|Pass(Security|PIDFD)|Sandbox|NetworkNamespace|IPCNamespace)"
)
_SILENT = {
    "Documentation", "SourcePath", "DefaultDependencies", "CollectMode", "Also", "WantedBy", "RequiredBy", "UpheldBy",
    "Alias", "DefaultInstance", "Accept", "Service", "RemainAfterExit", "GuessMainPID", "PIDFile", "Sockets",
    "IgnoreSIGPIPE", "RefuseManualStart", "RefuseManualStop", "JobTimeoutSec",
}  # fmt: skip
_OTHERS = {
    "Requires": "requires", "Requisite": "requires", "BindsTo": "requires", "Wants": "wants", "Upholds": "wants",
    "After": "after", "PartOf": "part_of", "Conflicts": "conflicts",
}  # fmt: skip
_VARIABLES = re.compile(r"(\$\$|\$\{[A-Za-z_]\w*\})", re.A)
_RUNTIME_VARIABLES = {
    "LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES", "USER", "LOGNAME", "HOME", "SHELL", "PATH", "LANG", "INVOCATION_ID",
    "REMOTE_ADDR", "REMOTE_PORT", "NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID",
}  # fmt: skip


def looks_like(name: str, text: str) -> bool:
    return name.endswith((".socket", ".service")) or bool(
        re.search(r"^\[(Socket|Service|Unit)\]\s*$", text, re.M) and re.search(r"^[A-Z]\w+\s*=", text, re.M)
    )


def read(sources: Iterable[tuple[str, str]], job: Job) -> list[Draft]:
    """All units of one call together: they name each other."""
    units: dict[str, Unit] = {}
    for path, text in sources:
        name = posixpath.basename(path)
        if not name.endswith((".socket", ".service")):
            name += ".socket" if re.search(r"^\[Socket\]", text, re.M) else ".service"
        if name in units:
            job.say(Place(path, 0), "warning", f"not carried over: {name} is {units[name].path} already")
            continue
        units[name] = _load(name, path, text, job)
    return _Importer(units, job).drafts()


def _load(name: str, path: str, text: str, job: Job) -> Unit:
    unit = Unit(name, path, parse(path, text))
    dirs = [f"{path}.d"]
    stem, at, rest = name.partition("@")
    if at and not rest.startswith("."):  # foo@bar.service: the changes to foo@.service as well
        dirs.insert(0, posixpath.join(posixpath.dirname(path), f"{stem}@.{name.rpartition('.')[2]}.d"))
    for directory in dirs:
        for change in job.files.glob(posixpath.join(directory, "*.conf")):
            try:
                unit.pairs += parse(change, job.files.read(change))
            except OSError as error:
                job.say(Place(change, 0), "warning", f"not carried over: cannot read it: {error.strerror}")
    return unit


class _Importer:
    def __init__(self, units: dict[str, Unit], job: Job) -> None:
        self.units = units
        self.job = job
        self.names: dict[str, str] = {}  # unit -> service of superd

    def drafts(self) -> list[Draft]:
        pairs: dict[str, list[Unit]] = {name: [] for name, unit in self.units.items() if not unit.is_socket}
        for unit in [unit for unit in self.units.values() if unit.is_socket]:
            accept = unit.yes("Socket", "Accept")
            at = "@" if accept and "@" not in unit.stem else ""
            wanted = unit.last("Socket", "Service") or f"{unit.stem}{at}.service"
            if wanted in self.units or self._find(unit, wanted):
                pairs.setdefault(wanted, []).append(unit)
        made = []
        for owner, sockets in pairs.items():
            service = self.units[owner]
            if not sockets and self._has_socket_file(service):
                path = service.path.removesuffix(".service").removesuffix("@") + ".socket"
                self.job.say(Place(service.path, 0), "note", f"there is {path}, too: import both together")
            made.append(_Service(service, sockets, self.job))
            for unit in (service, *sockets):
                self.names[unit.name] = made[-1].draft.name
        for one in made:
            one.relations(self.names, {other.draft.name: other.draft for other in made})
        done = []
        for one in made:
            if one.fill():
                done.append(one.draft)
            else:
                self.job.notes += one.draft.notes
        return done

    def _find(self, socket: Unit, service: str) -> bool:
        """The service of a socket unit, from the same directory."""
        stem, at, rest = service.partition("@")
        names = [service, f"{stem}@.service"] if at and rest != ".service" else [service]
        for name in names:
            path = posixpath.join(posixpath.dirname(socket.path), name)
            try:
                text = self.job.files.read(path)
            except (OSError, ValueError):
                continue
            self.units[service] = _load(service, path, text, self.job)
            return True
        place = socket.place("Socket", "Service")
        self.job.say(
            place, "warning", f"not carried over: {socket.name}: its service {service} is not there; name it, too"
        )
        return False

    def _has_socket_file(self, service: Unit) -> bool:
        stem = service.path.removesuffix(".service").removesuffix("@")
        return bool(self.job.files.glob(stem + ".socket"))


@dataclass(slots=True)
class Command:
    """A command line: `words` as in a file, escaped. `may_fail`: it began with `-`."""

    words: list[str]
    argv0: str | None = None
    may_fail: bool = False
    shell: str = ""  # the same as a line for sh


@dataclass(slots=True)
class _Service:
    service: Unit
    sockets: list[Unit]
    job: Job
    draft: Draft = field(init=False)
    accept: bool = field(init=False)
    template: bool = field(init=False)
    instance: str = ""
    static: dict[str, str] = field(default_factory=dict)  # variables that are known now
    dynamic: bool = False  # a file has others
    passed: set[str] = field(default_factory=set)  # variables that only run time knows

    def __post_init__(self) -> None:
        stem, at, instance = self.service.stem.partition("@")
        self.accept = bool(self.sockets) and all(unit.yes("Socket", "Accept") for unit in self.sockets)
        self.template = bool(at) and not self.accept
        self.instance = instance if self.template else ""
        name = self.sockets[0].stem.partition("@")[0] if self.accept else stem
        place = Place((self.sockets or [self.service])[0].path, 0)
        self.draft = Draft(service_name(name) + ("@" if self.template else ""), place)

    # -- values

    def specifiers(self, text: str, place: Place, unit: Unit | None = None) -> str:
        """`text` with %n and the others filled in, escaped for superd."""
        unit = unit or self.service
        stem, _, instance = unit.stem.partition("@")

        def one(match: re.Match[str]) -> str:
            char = match[1]
            if char in "iI":
                if self.template:
                    return INSTANCE
                self.draft.lost(
                    f"%{char}: a connection has no instance name (SUPERD_CONNECTION is in its environment)", place
                )
                return "connection"
            inside = INSTANCE if self.template else instance
            known = {
                "%": "%", "p": stem, "P": stem, "j": stem.rpartition("-")[2], "J": stem.rpartition("-")[2],
                "n": f"{stem}@{inside}.{unit.name.rpartition('.')[2]}" if "@" in unit.stem else unit.name,
                "N": f"{stem}@{inside}" if "@" in unit.stem else stem,
                "t": "/run", "S": "/var/lib", "C": "/var/cache", "L": "/var/log", "E": "/etc", "T": "/tmp",
                "V": "/var/tmp", "h": "/root", "u": "root", "U": "0", "g": "root", "G": "0", "s": "/bin/sh",
                "H": os.uname().nodename, "l": os.uname().nodename.partition(".")[0], "q": os.uname().nodename,
                "v": os.uname().release, "a": os.uname().machine.replace("_", "-"),
                "f": "/" + (inside or stem), "Y": posixpath.dirname(unit.path), "y": unit.path,
            }  # fmt: skip
            if char in known:
                return known[char]
            self.draft.lost(f"the specifier %{char}", place)
            return match[0]

        return re.sub(r"%(.)", one, text)

    def done(self, text: str) -> str:
        return literal(text).replace(INSTANCE, "${instance}")

    def text(self, text: str, place: Place, unit: Unit | None = None) -> str:
        """For a key in which superd expands `${NAME}`."""
        return self.done(self.specifiers(text, place, unit))

    def plain(self, text: str, place: Place, unit: Unit | None = None) -> str:
        """For a key in which superd expands nothing, not even an instance."""
        found = self.specifiers(text, place, unit)
        if INSTANCE in found:
            self.draft.lost(f"%i in {text}: superd has no ${{instance}} there", place)
        return found.replace(INSTANCE, self.instance or "instance")

    def convert(
        self, section: str, key: str, into: str, convert: Callable[[str], Any], unit: Unit | None = None
    ) -> None:
        """One plain key. None from `convert` means that there is nothing to say."""
        unit = unit or self.service
        if not unit.has(section, key):
            return
        place = unit.place(section, key)
        try:
            value = convert(unit.last(section, key))
        except ValueError:
            self.draft.lost(f"{key}={unit.last(section, key)}", place)
            return
        if value is not None:
            self.draft.set(into, value, place)

    # -- the service

    def fill(self) -> bool:
        """Everything; false if there is nothing that could be run."""
        service, draft = self.service, self.draft
        self._sockets()
        if self.sockets and not draft.sockets:
            draft.lost("it has no socket that superd knows", Place(self.sockets[0].path, 0))
            return False
        kind = service.last("Service", "Type", "simple")
        self._run(kind)
        self._environment()
        if not self._commands(kind):
            return False
        for unit in self.sockets:
            unit.asked.add(("Unit", "Description"))
        if description := service.last("Unit", "Description") or (
            self.sockets[0].last("Unit", "Description") if self.sockets else ""
        ):
            shown = self.specifiers(description, service.place("Unit", "Description")).replace(INSTANCE, "instance")
            draft.set("description", "".join(char for char in shown if char.isprintable()))
        self._outputs()
        self._identity()
        self._sandbox()
        self._resources()
        self._life(kind)
        self._rest()
        return True

    def _run(self, kind: str) -> None:
        draft, service = self.draft, self.service
        place = service.place("Service", "Type")
        run = "per-connection" if self.accept else "on-demand" if self.sockets else "always-on"
        if kind == "oneshot" and not self.sockets:
            run = "once"
        if (said := service.last("X-Superd", "Run")) in ("always-on", "once", "on-demand") and not self.accept:
            run = said
        elif self.sockets and not self.accept and service.has("Install", "WantedBy"):
            draft.say("note", 'it has WantedBy=, too: if it shall run from the start write run = "always-on"',
                      service.place("Install", "WantedBy"))  # fmt: skip
        if run != draft.run:
            draft.set("run", run, place)
        stdin = service.last("Service", "StandardInput", "null")
        passed = "stdio" if stdin == "socket" and self.sockets else "listen-fds"
        if stdin not in ("null", "socket"):
            draft.lost(f"StandardInput={stdin}", service.place("Service", "StandardInput"))
        if self.sockets:
            draft.set("pass", passed)
        if kind in ("notify", "notify-reload"):
            draft.set("ready", "notify", place)
        elif kind == "forking":
            draft.lost(
                "Type=forking: superd runs programs in the foreground; look for an option that keeps it there", place
            )
        elif kind == "dbus":
            draft.lost("Type=dbus: it counts as ready as soon as it runs", place)
        elif kind not in ("simple", "exec", "oneshot", "idle"):
            draft.lost(f"Type={kind}", place)
        if self.template:
            found = [self.instance] if self.instance else [service.last("Install", "DefaultInstance")]
            instances = [name for name in found if re.fullmatch(r"[a-z0-9][a-z0-9_.-]{0,62}", name, re.A)]
            draft.values["instances"], draft.where["instances"] = instances, draft.place
            if not instances:
                draft.say("warning", 'a template without an instance: write instances = ["…"]')

    def _environment(self) -> None:
        service, draft = self.service, self.draft
        found: dict[str, str] = {}
        for value, place in service.all("Service", "Environment"):
            for word in split(value, place):
                name, equals, content = self.specifiers(word, place).partition("=")
                if not equals or not name.isidentifier() or name.startswith(("LISTEN_", "NOTIFY_", "WATCHDOG_")):
                    draft.lost(f"Environment={word}", place)
                else:
                    found[name] = content
        for name in service.words("Service", "UnsetEnvironment"):
            found.pop(name.partition("=")[0], None)
        files = service.all("Service", "EnvironmentFile")
        used = ""
        for value, place in files:
            optional, path = value.startswith("-"), self.plain(value.removeprefix("-"), place)
            if optional and self.job.machine.file(path) is None:
                draft.say("note", f"EnvironmentFile={value} is not there, and need not be: left out", place)
            elif used or not path.startswith("/"):
                draft.lost(f"EnvironmentFile={value}: superd reads one file", place)
            else:
                used = path
                draft.set("environment_file", path, place)
        if used and found:
            try:
                inside = set(re.findall(r"^\s*([A-Za-z_]\w*)\s*=", self.job.files.read(used), re.M | re.A))
            except (OSError, ValueError):
                inside = set()
            for name in sorted(inside & found.keys()):  # in systemd the file wins, in superd the table does
                del found[name]
        if found:
            draft.set("environment", {name: self.done(value) for name, value in found.items()},
                      service.place("Service", "Environment"))  # fmt: skip
        if names := service.words("Service", "PassEnvironment"):
            draft.set("pass_environment", names, service.place("Service", "PassEnvironment"))
        self.static = found
        self.dynamic = bool(used)
        self.passed = set(names) | _RUNTIME_VARIABLES

    def _commands(self, kind: str) -> bool:
        service, draft = self.service, self.draft
        lines = service.all("Service", "ExecStart")
        commands = [self.command(text, place) for value, place in lines for text in split_commands(value, place)]
        commands = [command for command in commands if command.words]
        if not commands:
            draft.lost("there is no ExecStart=", Place(service.path, 0))
            return False
        main, place = commands[-1], lines[-1][1]
        pre = [self.command(value, place) for value, place in service.all("Service", "ExecStartPre")]
        pre += commands[:-1]
        draft.set("command", main.words, place)
        if main.argv0 is not None:
            draft.set("argv0", main.argv0, place)
        if main.may_fail:
            draft.lost("the `-` before the program: a failure is a failure to superd", place)
        around = {"ExecStartPre": pre}
        for theirs in ("ExecStartPost", "ExecStopPost"):
            around[theirs] = [self.command(value, where) for value, where in service.all("Service", theirs)]
        for theirs, ours in (
            ("ExecStartPre", "start_pre"),
            ("ExecStartPost", "start_post"),
            ("ExecStopPost", "stop_post"),
        ):
            if found := [_tolerant(command) for command in around[theirs] if command.words]:
                draft.set(ours, found, service.place("Service", theirs))
        for theirs, ours in (("ExecReload", "reload_signal"), ("ExecStop", "stop_signal")):
            for value, where in service.all("Service", theirs):
                match = re.fullmatch(r"-?(?:/usr)?(?:/bin/)?kill\s+-(?:s\s*)?(\w+)\s+\$\{?MAINPID\}?", value)
                number = _signal(match[1]) if match else None
                if number is None:
                    draft.lost(f"{theirs}={value}: superd sends `{ours}`", where)
                else:
                    draft.set(ours, number, where)
        return True

    def command(self, text: str, place: Place) -> Command:
        """ExecStart= and its kin, systemd.service(5), COMMAND LINES."""
        words = split(text, place)
        if not words:
            return Command([])
        program = words[0].lstrip("@-:+!|")
        prefixes = words[0][: len(words[0]) - len(program)]
        if set(prefixes) & set("+!"):
            self.draft.say(
                "security", f"{prefixes}: it ran with more rights than User=; here it has those of `user`", place
            )
        if "|" in prefixes:
            self.draft.lost("`|` before the program: no login shell is started", place)
        parts = [self.specifiers(word, place) for word in [program, *words[1:]]]
        if not program:
            return Command([])
        command = Command([], may_fail="-" in prefixes)
        if "@" in prefixes and len(parts) > 1:
            argv0 = parts.pop(1)
            pieces = [argv0] if ":" in prefixes else re.split(_VARIABLES, argv0)
            command.argv0 = "".join(map(self.piece, pieces)).replace(INSTANCE, self.instance or "instance")
        if ":" in prefixes:
            command.words = [self.done(part) for part in parts]
            command.shell = " ".join(map(shlex.quote, parts))
            return command
        found, shell = parts[:1], [shlex.quote(parts[0])]
        needs_shell = False
        for part in parts[1:]:
            if match := re.fullmatch(r"\$([A-Za-z_]\w*)|\$\{([A-Za-z_]\w*)\}", part, re.A):
                name = match[1] or match[2]
                if self.at_run_time(name):
                    needs_shell = True
                    shell.append(f"${name}" if match[1] else f'"${name}"')
                    continue
                value = self.static.get(name, "")
                new = split(value, place) if match[1] else [value]
            else:
                pieces = re.split(_VARIABLES, part)
                dynamic = [p for p in pieces if p.startswith("${") and self.at_run_time(p[2:-1])]
                if dynamic:
                    needs_shell = True
                    shell.append("".join(self.shell_piece(piece) for piece in pieces if piece))
                    continue
                new = ["".join(self.piece(piece) for piece in pieces)]
            found += new
            shell += map(shlex.quote, new)
        command.shell = " ".join(shell)
        if needs_shell:
            if command.argv0 is not None:
                self.draft.lost("`@`, argv[0], together with variables that only run time knows", place)
                command.argv0 = None
            command.words = ["/bin/sh", "-c", self.done(f"set -f; exec {command.shell}")]
        else:
            command.words = [self.done(word) for word in found]
        return command

    def at_run_time(self, name: str) -> bool:
        return name not in self.static and (self.dynamic or name in self.passed)

    def piece(self, piece: str) -> str:
        if piece == "$$":
            return "$"
        return self.static.get(piece[2:-1], "") if re.fullmatch(r"\$\{\w+\}", piece, re.A) else piece

    def shell_piece(self, piece: str) -> str:
        if piece.startswith("${") and self.at_run_time(piece[2:-1]):
            return f'"{piece}"'
        return shlex.quote(self.piece(piece))

    def _outputs(self) -> None:
        service, draft = self.service, self.draft
        stdio = draft.values.get("pass", "stdio" if self.accept else "listen-fds") == "stdio" and bool(self.sockets)
        usual = "socket" if stdio else "log"
        stdout = self._output("StandardOutput", usual, usual)
        stderr = self._output("StandardError", stdout, stdout)
        if stdio and stdout != "socket":
            said = f"StandardOutput={service.last('Service', 'StandardOutput')}"
            draft.lost(f'{said}: with pass = "stdio" fd 1 is the socket', service.place("Service", "StandardOutput"))
        elif not stdio and stdout == "socket" and not self.accept:
            draft.lost("StandardOutput=socket without StandardInput=socket", service.place("Service", "StandardOutput"))
            stdout = "log"
        if not stdio:
            draft.set("stdout", stdout, service.place("Service", "StandardOutput"))
        if stderr == "socket" and not stdio and not self.accept:
            stderr = "log"
        draft.set("stderr", stderr, service.place("Service", "StandardError"))

    def _output(self, key: str, inherited: str, usual: str) -> str:
        place = self.service.place("Service", key)
        kind, colon, path = self.service.last("Service", key).partition(":")
        if not kind:
            return usual
        if kind == "inherit":
            return inherited
        if kind in ("journal", "syslog", "kmsg", "journal+console", "syslog+console", "kmsg+console"):
            return "log"
        if kind in ("null", "socket") and not colon:
            return kind
        if kind in ("file", "append", "truncate") and path.startswith("/"):
            if kind != "append":
                self.draft.say("note", f"{key}={kind}: superd appends to the file", place)
            return f"file:{self.plain(path, place)}"
        self.draft.lost(f"{key}={kind}{colon}{path}", place)
        return usual

    def _identity(self) -> None:
        service, draft = self.service, self.draft
        place = service.place("Service", "User")
        user = self.specifiers(service.last("Service", "User"), place)
        if service.yes("Service", "DynamicUser"):
            draft.say("security", "not carried over: DynamicUser=: it shares the user `nobody`; give it one of its own",
                      service.place("Service", "DynamicUser"))  # fmt: skip
            user = "nobody"
        if user and INSTANCE in user:
            draft.set("user", self.done(user), place)
        elif user:
            as_user(draft, user, place)
        elif "/systemd/user/" not in service.path:
            runs_as_root(draft, Place(service.path, 0), "there is no User=")
        group = self.specifiers(service.last("Service", "Group"), service.place("Service", "Group"))
        as_user(draft, group, service.place("Service", "Group"), key="group")
        if service.has("Service", "SupplementaryGroups") or _is_reset(service, "SupplementaryGroups"):
            names = service.words("Service", "SupplementaryGroups")
            draft.set("groups", [identity(name) for name in names],
                      service.place("Service", "SupplementaryGroups"))  # fmt: skip

        def directory(text: str) -> str | None:
            path = self.text(text.removeprefix("-"), service.place("Service", "WorkingDirectory"))
            if not path.startswith("/"):
                raise ValueError(path)
            return path

        self.convert("Service", "WorkingDirectory", "cwd", directory)
        self.convert("Service", "UMask", "umask", _mode)

    @property
    def is_root(self) -> bool:
        return self.draft.values.get("user") in ("root", 0)

    def _sandbox(self) -> None:
        service, draft = self.service, self.draft
        if service.has("Service", "NoNewPrivileges"):
            wanted = service.yes("Service", "NoNewPrivileges")
            if wanted == self.is_root:  # otherwise it is superd's default
                draft.set("sandbox.no_new_privileges", wanted, service.place("Service", "NoNewPrivileges"))
        for theirs, ours in (
            ("PrivateTmp", "private_tmp"), ("PrivateNetwork", "private_network"), ("PrivatePIDs", "private_pids"),
        ):  # fmt: skip
            if service.yes("Service", theirs):
                draft.set(f"sandbox.{ours}", True, service.place("Service", theirs))
        self.convert("Service", "RootDirectory", "sandbox.chroot", lambda text: self.text(text, draft.place))
        for theirs, ours in (
            ("CapabilityBoundingSet", "capabilities"), ("AmbientCapabilities", "ambient_capabilities"),
        ):  # fmt: skip
            names = service.words("Service", theirs)
            if (names and not names[0].startswith("~")) or (not names and _is_reset(service, theirs)):
                draft.set(f"sandbox.{ours}", names, service.place("Service", theirs))
            elif names:
                draft.unprotected(
                    f"{theirs}={' '.join(names)}: superd lists what is kept", service.place("Service", theirs)
                )
        read_only = [name.lstrip("-+") for name in service.words("Service", "ReadOnlyPaths")]
        system = service.last("Service", "ProtectSystem").lower()
        usr = {"strict": ["/"], "full": ["/usr", "/boot", "/etc"]}.get(
            system, ["/usr", "/boot"] if is_yes(system) else []
        )
        place = service.place("Service", "ProtectSystem" if usr else "ReadOnlyPaths")
        if read_only or usr:
            draft.set("sandbox.read_only", [self.plain(path, place) for path in [*usr, *read_only]], place)
        if writable := [name.lstrip("-+") for name in service.words("Service", "ReadWritePaths")]:
            place = service.place("Service", "ReadWritePaths")
            draft.set("sandbox.read_write", [self.plain(path, place) for path in writable], place)

    def _resources(self) -> None:
        service, draft = self.service, self.draft
        for name in BY_TABLE["rlimit"]:
            self.convert("Service", f"Limit{name.upper()}", f"rlimit.{name}", partial(_limit, name))
        self.convert("Service", "Nice", "scheduling.nice", lambda text: _number(text, -20, 19))
        self.convert(
            "Service", "OOMScoreAdjust", "scheduling.oom_score_adjust", lambda text: _number(text, -1000, 1000)
        )
        self.convert("Service", "CPUAffinity", "scheduling.cpu_affinity", _cpus)
        if service.has("Service", "IOSchedulingClass") or service.has("Service", "IOSchedulingPriority"):
            place = service.place("Service", "IOSchedulingClass")
            kind = service.last("Service", "IOSchedulingClass", "best-effort")
            kind = {"1": "realtime", "2": "best-effort", "3": "idle"}.get(kind, kind)
            number = service.last("Service", "IOSchedulingPriority", "4")
            if kind == "idle" or (kind in ("realtime", "best-effort") and re.fullmatch("[0-7]", number)):
                draft.set("scheduling.ioprio", kind if kind == "idle" else f"{kind}:{number}", place)
            elif kind not in ("none", "0"):
                draft.lost(f"IOSchedulingClass={kind}", place)
        self.convert("Service", "MemoryMax", "cgroup.memory_max", lambda text: _size_value(size(text)))
        self.convert("Service", "TasksMax", "cgroup.pids_max", lambda text: _unless_infinity(text, 1, 2**22))
        self.convert("Service", "CPUQuota", "cgroup.cpu_max", _quota)
        self.convert("Service", "RuntimeMaxSec", "limits.max_runtime", _span)

    def _life(self, kind: str) -> None:
        service, draft = self.service, self.draft
        if service.has("Service", "TimeoutSec"):
            for key in ("ready_timeout", "stop_timeout"):
                self.convert("Service", "TimeoutSec", key, _timeout)
        self.convert("Service", "TimeoutStartSec", "ready_timeout", _timeout)
        self.convert("Service", "TimeoutStopSec", "stop_timeout", _timeout)
        if "stop_timeout" not in draft.values and not self.accept:
            draft.set("stop_timeout", "1m30s", Place(service.path, 0))
        self.convert("Service", "KillSignal", "stop_signal", _signal)
        self.convert("Service", "NotifyAccess", "notify_access", _notify_access)
        self.convert("Service", "WatchdogSec", "watchdog", lambda text: None if seconds(text) == 0 else _span(text))
        self.convert("Service", "FileDescriptorStoreMax", "fdstore", lambda text: _number(text, 0, 4096))
        mode = service.last("Service", "KillMode", "control-group")
        place = service.place("Service", "KillMode")
        if mode == "process":
            draft.set("kill_mode", "process", place)
        elif mode == "mixed":
            draft.say("note", "KillMode=mixed: superd's `tree` sends the first signal to all", place)
        elif mode == "none":
            draft.lost("KillMode=none: superd leaves no process behind", place)
        if service.last("X-Superd", "KillMode") == "group":
            draft.set("kill_mode", "group", place)
        self._restart(kind)

    def _restart(self, kind: str) -> None:
        service, draft = self.service, self.draft
        policy = service.last("Service", "Restart", "no")
        place = service.place("Service", "Restart")
        choices = BY_TABLE["service"]["restart"].choices
        if policy not in choices:
            draft.lost(f"Restart={policy}", place)
            policy = "no"
        draft.set("restart", policy, place)
        for key in ("RestartSec", "RestartMaxDelaySec"):
            into = "restart_delay" if key == "RestartSec" else "restart_delay_max"
            self.convert("Service", key, into, lambda text: format_duration(seconds(text) or 0))
        if "restart_delay" in draft.values and "restart_delay_max" not in draft.values:
            delay = seconds(service.last("Service", "RestartSec")) or 0
            if delay > 30:
                draft.set("restart_delay_max", format_duration(delay), service.place("Service", "RestartSec"))
        for section in ("Unit", "Service"):
            if service.has(section, "StartLimitBurst") or any(
                service.has(section, key) for key in ("StartLimitIntervalSec", "StartLimitInterval")
            ):
                burst = service.last(section, "StartLimitBurst", "5")
                window = service.last(section, "StartLimitIntervalSec") or service.last(
                    section, "StartLimitInterval", "10s"
                )
                place = service.place(section, "StartLimitBurst")
                try:
                    per_s = seconds(window)
                    if per_s and _number(burst, 0, 10**9):
                        draft.set("restart_limit", f"{int(burst)}/{format_duration(per_s)}", place)
                except ValueError:
                    draft.lost(f"StartLimitBurst={burst} in {window}", place)
        if service.has("Service", "SuccessExitStatus"):
            place = service.place("Service", "SuccessExitStatus")
            found: list[int | str] = [0]
            for word in service.words("Service", "SuccessExitStatus"):
                status = int(word) if re.fullmatch("[0-9]{1,3}", word, re.A) and int(word) < 256 else _signal(word)
                if status is None:
                    draft.lost(f"SuccessExitStatus={word}", place)
                elif status not in found:
                    found.append(status)
            draft.set("success_status", found, place)

    # -- sockets

    def _sockets(self) -> None:
        for unit in self.sockets:
            options = self._socket_options(unit)
            for key, value, place in _listening(unit):
                text = self.specifiers(value, place, unit)
                address = _address(text, _LISTEN[key], unit.last("Socket", "BindIPv6Only", "default"))
                if address is None:
                    self.draft.lost(f"{key}={value}: superd has no such socket", place)
                else:
                    listen(self.draft, self.done(address), place, **options)
            if self.accept:
                self._connections(unit)
        if self.draft.sockets and not self.accept and self.service.last("Service", "StandardInput") == "socket":
            for _ in self.draft.sockets[1:]:
                self.draft.lost(f"StandardInput=socket takes one socket, and there are {len(self.draft.sockets)}")
            del self.draft.sockets[1:]

    def _connections(self, unit: Unit) -> None:
        for theirs, ours in (("MaxConnections", "max_connections"), ("MaxConnectionsPerSource", "max_per_source")):
            high = lambda text: _number(text, 0, 10**6) or None  # noqa: E731
            self.convert("Socket", theirs, f"limits.{ours}", high, unit)

    def _socket_options(self, unit: Unit) -> dict[str, Any]:
        """Keys of [[socket]] for each socket of the unit."""
        found: dict[str, Any] = {}
        stdio = self.service.last("Service", "StandardInput") == "socket"
        name = unit.last("Socket", "FileDescriptorName")
        if not self.accept and not stdio:
            found["name"] = self.plain(name, unit.place("Socket", "FileDescriptorName"), unit) if name else unit.name
        for key, (into, convert) in _SOCKET_KEYS.items():
            if not unit.has("Socket", key):
                continue
            value, place = unit.last("Socket", key), unit.place("Socket", key)
            try:
                known = self.text if into in ("user", "group") else self.plain
                if (converted := convert(known(value, place, unit))) is not None:
                    found[into] = converted
            except ValueError:
                self.draft.lost(f"{key}={value}", place)
        if symlinks := unit.words("Socket", "Symlinks"):
            found["symlinks"] = [self.plain(path, unit.place("Socket", "Symlinks"), unit) for path in symlinks]
        if self.service.yes("Service", "NonBlocking"):
            found["nonblocking"] = True
        tuned = {}
        for key, into in (
            ("KeepAliveTimeSec", "idle"),
            ("KeepAliveIntervalSec", "interval"),
            ("KeepAliveProbes", "count"),
        ):
            if unit.has("Socket", key):
                text = unit.last("Socket", key)
                try:
                    tuned[into] = _number(text, 1, 127) if into == "count" else format_duration(seconds(text) or 7200)
                except ValueError:
                    self.draft.lost(f"{key}={text}", unit.place("Socket", key))
        if tuned and found.get("keep_alive"):
            found["keep_alive"] = tuned
        return found

    # -- the rest

    def relations(self, names: dict[str, str], drafts: dict[str, Draft]) -> None:
        """Requires= and the others, where they name what is imported here."""
        for unit in (self.service, *self.sockets):
            for key, into in {**_OTHERS, "Before": ""}.items():
                strangers = []
                place = unit.place("Unit", key)
                for name in unit.words("Unit", key):
                    ours = names.get(name)
                    stem, at, rest = name.partition("@")
                    if ours is None and at and (template := names.get(f"{stem}@.{rest.rpartition('.')[2]}")):
                        instance = re.sub(r"^%[iI]$", "${instance}", rest.rpartition(".")[0])
                        ours = f"{template.partition('@')[0]}@{instance}"
                        if template == self.draft.name and instance == "${instance}":
                            continue
                    if ours is None:
                        if not name.endswith((".target", ".slice")):
                            strangers.append(name)
                    elif ours == self.draft.name or ours.endswith("@"):
                        continue
                    elif not into:
                        drafts[ours].add("after", [self.draft.name], place) if ours in drafts else None
                    else:
                        self.draft.add(into, [ours] if ours not in self.draft.values.get(into, []) else [], place)
                        if key == "BindsTo" and ours not in self.draft.values.get("part_of", []):
                            self.draft.add("part_of", [ours], place)
                started = unit is self.service and self.sockets
                sockets = [name for name in strangers if started and name.endswith(".socket")]
                if sockets:
                    text = (
                        f"{key}={' '.join(sockets)}: give these files to the same import, if they are its sockets too"
                    )
                    self.draft.say("warning", text, place)
                if others := [name for name in strangers if name not in sockets]:
                    self.draft.say("note", f"{key}={' '.join(others)}: not among what is imported here", place)

    def _rest(self) -> None:
        """What nobody has asked for."""
        draft = self.draft
        if "after" in draft.values:  # `requires` says as much
            draft.values["after"] = [n for n in draft.values["after"] if n not in draft.values.get("requires", [])]
        for unit in (self.service, *self.sockets):
            for section, key, value, place in unit.left():
                if section.startswith("X-") or key.startswith("X-") or section == "Install" or key in _SILENT:
                    continue
                said = f"{key}={value}"
                if section == "Unit" and key.startswith(("Before", *_OTHERS)):
                    continue
                if key.startswith(("TriggerLimit", "PollLimit")):
                    draft.say(
                        "note", f"{said}: superd does not close a socket; it starts again with growing delay", place
                    )
                elif key.startswith(("Syslog", "LogLevel", "LogRateLimit")):
                    draft.say("note", f"{said}: superd's log names the service", place)
                elif _SECURITY.match(key) and value.lower() not in ("no", "false", "off", "0"):
                    draft.unprotected(said, place)
                elif key in _MADE_BELOW and value:
                    paths = " and ".join(f"{_MADE_BELOW[key]}/{name.partition(':')[0]}" for name in value.split())
                    draft.lost(f"{said}: superd makes no directory, {paths} must be there", place)
                elif value.lower() not in ("no", "false", "off", "0"):
                    draft.lost(said, place)


# systemd.exec(5), "Directories", for the system's manager
_MADE_BELOW = {
    "RuntimeDirectory": "/run", "StateDirectory": "/var/lib", "CacheDirectory": "/var/cache",
    "LogsDirectory": "/var/log", "ConfigurationDirectory": "/etc",
}  # fmt: skip


def _is_reset(unit: Unit, key: str) -> bool:
    """Whether a list is there and empty, which is not the same as not there."""
    return any(name == key for _, name, _, _ in unit.pairs) and not unit.has("Service", key)


def _tolerant(command: Command) -> list[str]:
    """A command whose failure does not count."""
    if not command.may_fail:
        return command.words
    return ["/bin/sh", "-c", literal(f"{command.shell} || :").replace(INSTANCE, "${instance}")]


def _listening(unit: Unit) -> list[tuple[str, str, Place]]:
    """Every Listen…= in order, which is that of the fds; an empty one takes back all before it."""
    found: list[tuple[str, str, Place]] = []
    for section, key, value, place in unit.pairs:
        if section == "Socket" and key in _LISTEN:
            unit.asked.add((section, key))
            found = [*found, (key, value, place)] if value else []
    return found


_LISTEN = {
    "ListenStream": ("tcp", "unix", "vsock"),
    "ListenDatagram": ("udp", "unix-dgram", ""),
    "ListenSequentialPacket": ("", "unix-seqpacket", ""),
    "ListenFIFO": ("", "fifo", ""),
    "ListenSpecial": ("", "", ""),
    "ListenNetlink": ("", "", ""),
    "ListenMessageQueue": ("", "", ""),
    "ListenUSBFunction": ("", "", ""),
}


def _address(text: str, schemes: tuple[str, str, str], only6: str) -> str | None:
    """systemd.socket(5), ListenStream=, in superd's words. None: there is no such thing."""
    ip, path, vsock = schemes
    if text.startswith(("/", "@")):
        return f"{path}:{text}" if path and not (path == "fifo" and text[0] == "@") else None
    if match := re.fullmatch(r"vsock(?:-stream)?:([0-9]*):([0-9]+)", text, re.A):
        return f"vsock:{match[1] or '*'}:{match[2]}" if vsock else None
    if not ip:
        return None
    version = "6" if only6 == "ipv6-only" else ""
    if text.isascii() and text.isdigit():
        return f"{ip}{version}:{text}"
    if match := re.fullmatch(r"\[([^]%]+)\]:([0-9]+)(?:%(\S+))?", text, re.A):
        host = f"{match[1]}%{match[3]}" if match[3] else match[1]
        return ip_listen(ip, host, match[2], version)
    if match := re.fullmatch(r"([0-9.]+):([0-9]+)", text, re.A):
        return ip_listen(ip, match[1], match[2])
    return None


def _number(text: str, low: int, high: int) -> int:
    if not re.fullmatch(r"[+-]?[0-9]{1,18}", text, re.A) or not low <= int(text) <= high:
        raise ValueError(text)
    return int(text)


def _unless_infinity(text: str, low: int, high: int) -> int | None:
    return None if text == "infinity" else _number(text, low, high)


def _mode(text: str) -> str:
    if (found := octal(text)) is None:
        raise ValueError(text)
    return found


def _bool(text: str) -> bool:
    if is_yes(text, True) != is_yes(text, False):
        raise ValueError(text)
    return is_yes(text)


def _span(text: str) -> str | None:
    found = seconds(text)
    return None if found is None else format_duration(found)


def _timeout(text: str) -> str:
    found = seconds(text)
    return format_duration(found) if found else "off"


def _size_value(number: int | None) -> str | int | None:
    if number is None:
        return None
    text = format_size(number)
    return number if text.isdigit() else text


def _quota(text: str) -> str:
    if not re.fullmatch(r"[0-9]{1,6}%", text, re.A):
        raise ValueError(text)
    return f"{int(text[:-1]) * 1000} 100000"


def _signal(text: str) -> Any:
    """The name without SIG; None for what is no signal."""
    try:
        name = format_signal(int(text)) if text.isdigit() else text.removeprefix("SIG")
        return format_signal(parse_signal(name))
    except (ValueError, OverflowError):
        return None


def _notify_access(text: str) -> str:
    if text not in ("none", "main", "exec", "all"):
        raise ValueError(text)
    return {"exec": "all"}.get(text, text)


def _limit(name: str, text: str) -> list[int | str]:
    """[soft, hard]; systemd.exec(5), LimitCPU=."""
    found: list[int | str] = []
    for part in (text.split(":") * 2)[:2] if ":" not in text else text.split(":"):
        if part == "infinity":
            found.append("off")
        elif name in ("cpu", "rttime") and not part.isdigit():
            span = seconds(part) or 0
            found.append(int(span * (1 if name == "cpu" else 1_000_000)))
        else:
            found.append(size(part) or 0)
    if len(found) != 2:
        raise ValueError(text)
    return found


def _cpus(text: str) -> list[int] | None:
    found: set[int] = set()
    for part in re.split(r"[\s,]+", text.strip()):
        low, _, high = part.partition("-")
        first, last = _number(low, 0, 4095), _number(high or low, 0, 4095)
        found |= set(range(first, last + 1))
    return sorted(found)


def _tos(text: str) -> int:
    names = {"low-delay": 0x10, "throughput": 0x08, "reliability": 0x04, "low-cost": 0x02}
    return names[text] if text in names else _number(text, 0, 255)


def _owner(text: str) -> str | int:
    """Like identity(), of a text that is escaped already."""
    return int(text) if re.fullmatch(r"[0-9]{1,10}", text, re.A) else text


def _defer(text: str) -> str | None:
    found = seconds(text)
    return format_duration(max(1.0, found)) if found else None


def _timestamping(text: str) -> bool:
    if text not in ("off", "us", "usec", "µs", "ns", "nsec"):
        raise ValueError(text)
    return text != "off"


def _protocol(text: str) -> str | None:
    return (
        {"mptcp": "mptcp", "sctp": "sctp", "udplite": "udplite"}[text] if text in ("mptcp", "sctp", "udplite") else None
    )


_SOCKET_KEYS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "SocketUser": ("user", _owner),
    "SocketGroup": ("group", _owner),
    "SocketMode": ("mode", _mode),
    "DirectoryMode": ("directory_mode", lambda text: octal(text, 0o7777)),
    "RemoveOnStop": ("remove_on_stop", _bool),
    "Backlog": ("backlog", lambda text: min(_number(text, 1, 2**32 - 1), 2**31 - 1)),
    "BindToDevice": ("device", str),
    "FreeBind": ("free_bind", _bool),
    "Transparent": ("transparent", _bool),
    "ReusePort": ("reuse_port", _bool),
    "Broadcast": ("broadcast", _bool),
    "KeepAlive": ("keep_alive", _bool),
    "NoDelay": ("no_delay", _bool),
    "DeferAcceptSec": ("defer_accept", _defer),
    "ReceiveBuffer": ("receive_buffer", lambda text: _size_value(size(text))),
    "SendBuffer": ("send_buffer", lambda text: _size_value(size(text))),
    "IPTOS": ("tos", _tos),
    "IPTTL": ("ttl", lambda text: _number(text, 1, 255)),
    "Mark": ("mark", lambda text: _number(text, 0, 2**32 - 1)),
    "Priority": ("priority", lambda text: _number(text, 0, 255)),
    "TCPCongestion": ("congestion", str),
    "SocketProtocol": ("protocol", _protocol),
    "PassCredentials": ("pass_credentials", _bool),
    "PassPacketInfo": ("pass_packet_info", _bool),
    "Timestamping": ("timestamping", _timestamping),
}
