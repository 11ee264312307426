"""supervisord.conf -> services: [program:x] is always on, [fcgi-program:x] has its socket at fd 0."""

from __future__ import annotations

import os
import posixpath
import re
from dataclasses import dataclass, field

from superd.core.values import format_duration, parse_signal, split_command
from superd.importers.draft import (
    A_NAME,
    Draft,
    FormatError,
    Job,
    Place,
    as_user,
    identity,
    ip_listen,
    is_address,
    listen,
    literal,
    octal,
    runs_as_root,
    service_name,
)

_OWN = ("unix_http_server", "inet_http_server", "supervisorctl", "rpcinterface:", "ctlplugin:")
_SILENT = {
    "command", "process_name", "numprocs", "numprocs_start", "autostart", "startretries", "startsecs",
    "redirect_stderr",
    "serverurl", "socket", "socket_owner", "socket_mode", "socket_backlog", "user", "environment", "priority",
    "stdout_capture_maxbytes", "stderr_capture_maxbytes", "autorestart", "exitcodes", "stopsignal", "stopwaitsecs",
    "stopasgroup", "killasgroup", "directory", "umask", "stdout_logfile", "stderr_logfile",
}  # fmt: skip
_NUMBER = re.compile(r"%\(process_num\)(0?[0-9]*)d")
INSTANCE = "\ue000"  # stands for ${instance} until everything else is escaped
MARK = "\ue001"  # begins a ${NAME} of superd's environment; another one ends it


@dataclass(slots=True)
class Section:
    name: str
    place: Place
    values: dict[str, str] = field(default_factory=dict)
    places: dict[str, Place] = field(default_factory=dict)

    def place_of(self, key: str) -> Place:
        return self.places.get(key, self.place)

    def yes(self, key: str, default: bool = False) -> bool:
        return self.values.get(key, str(default)).lower() in ("true", "yes", "on", "1")


def looks_like(text: str) -> bool:
    return bool(re.search(r"^\[(supervisord|program:.+|fcgi-program:.+|supervisorctl|include)\]", text, re.M))


def read(path: str, text: str, job: Job) -> list[Draft]:
    sections = _sections(path, text)
    for include in [section for section in sections if section.name == "include"]:
        for pattern in include.values.get("files", "").split():
            pattern = pattern.replace("%(here)s", posixpath.dirname(path) or ".")
            where = posixpath.join(posixpath.dirname(path), pattern)
            found = job.files.glob(where)
            if not found:
                job.say(include.place_of("files"), "note", f"there is no file {where}")
            for name in found:
                try:
                    sections += _sections(name, job.files.read(name))
                except OSError as error:
                    job.say(Place(name, 0), "warning", f"not carried over: cannot read it: {error.strerror}")
    daemon = next((section for section in sections if section.name == "supervisord"), None)
    drafts: list[Draft] = []
    for section in sections:
        kind, colon, name = section.name.partition(":")
        if kind in ("program", "fcgi-program") and colon:
            drafts += _programs(section, daemon, name.strip(), kind == "fcgi-program", job)
        elif kind == "group":
            job.say(section.place, "note", f"[{section.name}]: superd has no groups; `part_of` ties services together")
        elif section.name not in ("supervisord", "include") and not section.name.startswith(_OWN):
            job.say(section.place, "warning", f"not carried over: [{section.name}]")
    return drafts


def _sections(path: str, text: str) -> list[Section]:
    """As Python's configparser reads it for supervisord: ` ;` begins a comment, an indented line goes on."""
    found: list[Section] = []
    key = ""
    for number, raw in enumerate(text.replace("\r\n", "\n").split("\n"), 1):
        place = Place(path, number)
        if raw[:1] in ("#", ";"):
            continue
        line = re.split(r"(?:^|\s);", raw, maxsplit=1)[0].rstrip()
        if not line.strip():
            continue
        if line[0] in " \t" and key and found:
            found[-1].values[key] = f"{found[-1].values[key]}\n{line.strip()}".strip("\n")
            continue
        line = line.strip()
        if match := re.fullmatch(r"\[([^]]+)\]", line):
            found.append(Section(match[1].strip(), place))
            key = ""
            continue
        match = re.match(r"([^:=\s][^:=]*?)\s*[:=]\s*(.*)", line, re.S)
        if match is None or not found:
            raise FormatError(place, f"{line[:60]!r} is neither [SECTION] nor KEY=VALUE")
        key = match[1].lower()
        found[-1].values[key] = match[2]
        found[-1].places[key] = place
    return found


def _programs(section: Section, daemon: Section | None, name: str, is_fcgi: bool, job: Job) -> list[Draft]:
    """One service; one for each number where a template cannot say the same."""
    count, first = _integer(section, "numprocs", 1), _integer(section, "numprocs_start", 0)
    place = section.place_of("numprocs")
    forms = {match[1] for value in section.values.values() for match in _NUMBER.finditer(value)}
    jobs: list[_Program] = []
    if count <= 1 or is_fcgi:
        jobs.append(_Program(Draft(service_name(name), section.place), section, daemon, is_fcgi, str(first)))
        if count > 1:
            jobs[0].draft.lost(f"numprocs={count}: one process has the socket", place)
    elif len(forms) <= 1:
        form = next(iter(forms), "")
        jobs.append(_Program(Draft(service_name(name) + "@", section.place), section, daemon, is_fcgi, INSTANCE))
        names = [f"%{form}d" % number for number in range(first, first + min(count, 1000))]
        jobs[0].draft.set("instances", names, place)
    else:
        for number in range(first, first + min(count, 1000)):
            draft = Draft(service_name(f"{name}-{number}"), section.place)
            jobs.append(_Program(draft, section, daemon, is_fcgi, str(number)))
    done = []
    for one in jobs:
        if one.fill():
            done.append(one.draft)
        else:
            job.notes += one.draft.notes
    return done


def _integer(section: Section, key: str, default: int) -> int:
    text = section.values.get(key, "").strip()
    return int(text) if re.fullmatch(r"[0-9]{1,6}", text, re.A) else default


@dataclass(slots=True)
class _Program:
    draft: Draft
    section: Section
    daemon: Section | None
    is_fcgi: bool
    number: str  # of the process, or INSTANCE

    def value(self, key: str) -> str | None:
        """With %(…)s filled in and escaped for superd; None if it is not there."""
        text = self.section.values.get(key)
        return None if text is None else self.expanded(text, self.section.place_of(key))

    def expanded(self, text: str, place: Place) -> str:
        return self.escaped(self.filled(text, place))

    def escaped(self, text: str) -> str:
        return re.sub(f"{MARK}(.*?){MARK}", r"${\1}", literal(text).replace(INSTANCE, "${instance}"))

    def filled(self, text: str, place: Place) -> str:
        name = self.section.name.partition(":")[2].strip()
        known = {
            "program_name": name, "group_name": name, "host_node_name": os.uname().nodename,
            "here": posixpath.dirname(self.section.place.path) or ".",
            "numprocs": self.section.values.get("numprocs", "1"),
        }  # fmt: skip

        def one(match: re.Match[str]) -> str:
            what, form, kind = match.groups()
            if what is None:
                return "%"
            if what == "process_num":
                return self.number if self.number == INSTANCE or kind == "s" else f"%{form}d" % int(self.number)
            if what.startswith("ENV_"):
                return f"{MARK}{what[4:]}{MARK}"
            if what in known:
                return known[what]
            self.draft.lost(f"%({what}){form}{kind}", place)
            return match[0]

        return re.sub(r"%(?:%|\((\w+)\)(0?[0-9]{0,2})([sd]))", one, text)

    def fill(self) -> bool:
        """Everything; false if there is nothing that could be run."""
        draft, section = self.draft, self.section
        command = section.values.get("command", "").replace("\n", " ")
        try:
            words = split_command(self.filled(command, section.place_of("command")))
        except ValueError:  # pipes and the like reach the program as they are, and so may quotes
            words = self.filled(command, section.place_of("command")).split()
        if not words:
            draft.lost("there is no command")
            return False
        draft.set("command", [self.escaped(word) for word in words], section.place_of("command"))
        if self.is_fcgi:
            self._socket()
            if not draft.sockets:
                return False
            draft.set("run", "always-on")
            draft.set("pass", "stdio")
        if not section.yes("autostart", True):
            draft.set("enabled", False, section.place_of("autostart"))
        self._identity()
        self._restart()
        self._stop()
        self._outputs()
        for key in sorted(section.values.keys() - _SILENT):
            if re.fullmatch(r"std(out|err)_(logfile_(maxbytes|backups)|events_enabled|syslog)", key):
                draft.say(
                    "note", f"{key}: superd does not rotate; its own log needs no rotation", section.place_of(key)
                )
            else:
                draft.lost(f"{key}={section.values[key]}", section.place_of(key))
        if "priority" in section.values:
            draft.say("note", "priority: superd starts services together; `after` and `requires` order them",
                      section.place_of("priority"))  # fmt: skip
        return True

    def _socket(self) -> None:
        draft, section, place = self.draft, self.section, self.section.place_of("socket")
        text = self.filled(section.values.get("socket", ""), place)
        options: dict[str, object] = {}
        owner, _, group = section.values.get("socket_owner", "").partition(":")
        for key, value in (("user", owner), ("group", group)):
            if value:
                options[key] = identity(value)
        mode = section.values.get("socket_mode", "0700")
        if (found := octal(mode)) is not None:
            options["mode"] = found
        if (backlog := _integer(section, "socket_backlog", 0)) > 0:
            options["backlog"] = backlog
        if text.startswith("unix://"):
            listen(draft, f"unix:{self.escaped(text[7:])}", place, **options)
        elif match := re.fullmatch(r"tcp://(.*):([0-9]{1,5})", text, re.A):
            host = match[1]
            if not is_address(host):
                draft.unprotected(f"{host!r} {A_NAME}", place)
                draft.set("enabled", False, place)
                host = "127.0.0.1"
            listen(draft, ip_listen("tcp", host, match[2], "" if ":" in host else "4"), place, **options)
        else:
            draft.lost(f"socket={text}: it is tcp://HOST:PORT or unix:///PATH", place)
        draft.say("note", 'fd 1 is the socket, too (pass = "stdio"); stderr goes to the log', place)

    def _identity(self) -> None:
        draft, section = self.draft, self.section
        own = self.daemon.values.get("user", "") if self.daemon else ""
        user = section.values.get("user") or own
        if user:
            as_user(draft, user, section.place_of("user"))
        else:
            runs_as_root(draft, section.place, "there is no user")
        if (cwd := self.value("directory")) is not None:
            if cwd.startswith(("/", "${")) and "\n" not in cwd:
                draft.set("cwd", cwd, section.place_of("directory"))
            else:
                draft.lost(f"directory={cwd}: no absolute path", section.place_of("directory"))
        mask = section.values.get("umask") or (self.daemon.values.get("umask") if self.daemon else None)
        if mask is not None and (mode := octal(mask)) is not None:
            draft.set("umask", mode, section.place_of("umask"))
        elif mask is not None:
            draft.lost(f"umask={mask}", section.place_of("umask"))
        environment: dict[str, str] = {}
        for source in filter(None, (self.daemon, section)):
            text = source.values.get("environment", "")
            place = source.place_of("environment")
            for match in re.finditer(r"\s*([^\s=,]+)\s*=\s*(?:\"([^\"]*)\"|'([^']*)'|([^,\n]*))\s*(?:,|\n|$)", text):
                name, value = match[1], next((part for part in match.groups()[1:] if part is not None), "")
                if name.isidentifier() and not name.startswith(("LISTEN_", "NOTIFY_", "WATCHDOG_")):
                    environment[name] = self.expanded(value.strip(), place)
                    draft.where["environment"] = place
                else:
                    draft.lost(f"environment={name}=…", place)
        if environment:
            draft.set("environment", environment, draft.where["environment"])

    def _restart(self) -> None:
        draft, section = self.draft, self.section
        wish = section.values.get("autorestart", "unexpected").lower()
        policy = {"unexpected": "on-failure", "true": "always", "yes": "always", "on": "always", "1": "always"}.get(
            wish, "no"
        )
        if policy != "on-failure":
            draft.set("restart", policy, section.place_of("autorestart"))
        codes = re.split(r"[,\s]+", section.values.get("exitcodes", "0").strip())
        good = [int(code) for code in codes if re.fullmatch("[0-9]{1,3}", code, re.A) and int(code) < 256]
        if good != [0]:
            draft.set("success_status", good, section.place_of("exitcodes"))
        for key in ("startsecs", "startretries"):
            if key in section.values:
                draft.say("note", f"{key}: superd tries again with growing delay; `restart_limit` ends that",
                          section.place_of(key))  # fmt: skip

    def _stop(self) -> None:
        draft, section = self.draft, self.section
        if signal := section.values.get("stopsignal", "").removeprefix("SIG"):
            try:
                parse_signal(signal)
                draft.set("stop_signal", signal, section.place_of("stopsignal"))
            except ValueError:
                draft.lost(f"stopsignal={signal}", section.place_of("stopsignal"))
        if (wait := _integer(section, "stopwaitsecs", 0)) > 0:
            draft.set("stop_timeout", format_duration(wait), section.place_of("stopwaitsecs"))
        if section.yes("stopasgroup") or section.yes("killasgroup"):
            draft.set("kill_mode", "group", section.place_of("stopasgroup"))

    def _outputs(self) -> None:
        draft, section = self.draft, self.section
        stdout = self._output("stdout_logfile")
        if not self.is_fcgi:
            draft.set("stdout", stdout, section.place_of("stdout_logfile"))
        stderr = stdout if section.yes("redirect_stderr") else self._output("stderr_logfile")
        draft.set("stderr", stderr, section.place_of("stderr_logfile"))

    def _output(self, key: str) -> str:
        path = self.value(key)
        if path is None or path.upper() == "AUTO" or path == "syslog":
            return "log"
        if path.upper() == "NONE" or path == "/dev/null":
            return "null"
        if path in ("/dev/stdout", "/dev/stderr", "/dev/fd/1", "/dev/fd/2", "/proc/self/fd/1", "/proc/self/fd/2"):
            return "inherit"
        if path.startswith("/") and "${" not in path and not path.endswith("/"):
            return f"file:{path}"
        self.draft.lost(f"{key}={path}: superd takes an absolute path", self.section.place_of(key))
        return "log"
