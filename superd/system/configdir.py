"""Reads the configuration: which files there are, whether they can be trusted, and their bytes.

As root nothing is read that somebody else could have written (FAILURES K1). A file, and for a symbolic link both its
directory and its target, must belong to root and not be writable by group or others, and so must the directory it
is in and every directory above. One exception: a directory above may be writable by all if it is root's and sticky,
as /tmp is, because nobody can replace there what is not his. The file's own directory may not: whoever can add
files to it adds services. As an ordinary user nothing is checked but the kind and the size of a file.
"""

from __future__ import annotations

import errno
import grp
import os
import pwd
import re
import stat
from collections.abc import Mapping, Sequence

from superd.core import schema
from superd.core.document import MAX_BYTES
from superd.core.kinds import NAME
from superd.core.machine import FileFacts
from superd.core.problems import Problem, Severity
from superd.core.schema import Role, SourceFile
from superd.core.spec import Snapshot

_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*@?\.toml", re.A)
_HEAD = 256  # bytes of a program that tell how the kernel starts it: BINPRM_BUF_SIZE


def default_config_paths(environ: Mapping[str, str], uid: int) -> list[str]:
    """What is read without -c: $SUPERD_CONFIG, else /etc/superd for root, else ~/.config/superd."""
    if configured := environ.get("SUPERD_CONFIG"):
        return [configured]
    if uid == 0:
        return ["/etc/superd"]
    base = environ.get("XDG_CONFIG_HOME") or os.path.join(environ.get("HOME") or _home(uid), ".config")
    return [os.path.join(base, "superd")]


def load_config(
    paths: Sequence[str], *, environ: Mapping[str, str], is_root: bool | None = None
) -> tuple[Snapshot, list[Problem]]:
    """read(), then schema.load() with the facts of this machine. is_root None: whether this process is."""
    root = os.geteuid() == 0 if is_root is None else is_root
    files, problems = read(paths, is_root=root)
    return schema.load(files, machine=RealMachine(), environ=environ, is_root=root, problems=problems)


def read(paths: Sequence[str], *, is_root: bool | None = None) -> tuple[list[SourceFile], list[Problem]]:
    """The files below `paths`, in the order in which they count, and why others could not be read.

    A path is a directory with conf.d or superd.toml in it, a conf.d itself, or one .toml file. Names in a directory
    are sorted. Problems of a service's file, or of a change to it, name the service: it must not run.
    """
    reader = _Reader(os.geteuid() == 0 if is_root is None else is_root)
    for path in paths:
        reader.path(os.path.normpath(path))
    return reader.files, reader.problems


class _Reader:
    def __init__(self, is_root: bool) -> None:
        self.trust = Trust(frozenset({0})) if is_root else None
        self.files: list[SourceFile] = []
        self.problems: list[Problem] = []
        self.seen: set[str] = set()

    def path(self, path: str) -> None:
        try:
            is_directory = stat.S_ISDIR(os.stat(path).st_mode)
        except (OSError, ValueError) as error:
            if not os.path.islink(path):
                self.problem("unreadable", f"cannot read {path}: {_reason(error)}", path)
                return
            is_directory = False
        if is_directory:
            self.directory(path)
            return
        name = os.path.basename(path)
        if name == "superd.toml":
            self.daemon(path)
        elif not name.endswith(".toml") or not NAME.fullmatch(name.removesuffix(".toml").removesuffix("@")):
            why = f"{name!r} is not the name of a service file: it is NAME.toml, NAME of a-z 0-9 _ . -, at most 63"
            self.problem("bad-name", why, path)
        else:
            self.service(path, name.removesuffix(".toml"))

    def directory(self, path: str) -> None:
        main, conf_d = os.path.join(path, "superd.toml"), os.path.join(path, "conf.d")
        if not os.path.lexists(main) and not os.path.lexists(conf_d):
            self.conf_d(path)
            return
        dirs = [conf_d] if os.path.lexists(conf_d) else []
        if os.path.lexists(main):
            dirs += self.daemon(main)
        for found in dirs:
            self.conf_d(found)

    def daemon(self, path: str) -> tuple[str, ...]:
        """superd.toml; the directories that it names."""
        source = self.file(path, "daemon", "superd", None)
        if source is None:
            return ()
        return schema.conf_dirs(source)

    def conf_d(self, path: str) -> None:
        real = os.path.realpath(path)
        if real in self.seen:
            return
        self.seen.add(real)
        if self.trust and (why := self.trust.directory(real)):
            self.problem("not-trusted", f"cannot trust {path}, nothing in it is read: {why}", path)
            return
        try:
            names = sorted(os.listdir(path))
        except OSError as error:
            self.problem("unreadable", f"cannot read {path}: {_reason(error)}", path)
            return
        lower = {name for name in names if name == name.lower()}
        for name in names:
            if _is_ignored(name) or (name == "superd.toml" and os.path.basename(path) != "conf.d"):
                continue
            here = os.path.join(path, name)
            stem = name.removesuffix(".toml")
            if _FILE.fullmatch(name) and NAME.fullmatch(stem.removesuffix("@")):
                self.service(here, stem)
            elif name != name.lower() and name.lower() in lower:
                twin = os.path.join(path, name.lower())
                self.problem("duplicate-name", f"{here} differs from {twin} in case only: {twin} counts", here)
            else:
                why = f"{name!r} is passed over: the name of a service is of a-z 0-9 _ . -, at most 63 characters"
                self.problem("bad-name", why, here, severity="warning")

    def service(self, path: str, name: str) -> None:
        """The file and the changes to it."""
        source = self.file(path, "service", name, name)
        changes = f"{path}.d"
        if source is None or not os.path.lexists(changes):
            return
        try:
            if self.trust and (why := self.trust.directory(os.path.realpath(changes))):
                self.problem("not-trusted", f"cannot trust {changes}: {why}", changes, service=name)
                return
            names = sorted(os.listdir(changes))
        except OSError as error:
            self.problem("unreadable", f"cannot read {changes}: {_reason(error)}", changes, service=name)
            return
        for change in names:
            if not _is_ignored(change):
                self.file(os.path.join(changes, change), "drop-in", name, name)

    def file(self, path: str, role: Role, name: str, service: str | None) -> SourceFile | None:
        try:
            data = self.data(path)
        except (OSError, ValueError) as error:
            untrusted = isinstance(error, _UntrustedError)
            code, verb = ("not-trusted", "trust") if untrusted else ("unreadable", "read")
            self.problem(code, f"cannot {verb} {path}: {_reason(error)}", path, service=service)
            return None
        source = SourceFile(path, data, role, name)
        self.files.append(source)
        return source

    def data(self, path: str) -> bytes:
        """The bytes of a regular file. Raises OSError; _UntrustedError where somebody else could have written it."""
        real = path
        if self.trust:
            self.trusted_directory(path)
        if os.path.islink(path):
            real = os.path.realpath(path)
            if self.trust:
                self.trusted_directory(real)
        # O_NONBLOCK: opening a FIFO must not wait for its writer. What is checked is what was opened, not its name.
        fd = os.open(real, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
        try:
            facts = os.fstat(fd)
            if not stat.S_ISREG(facts.st_mode):
                raise OSError(errno.EINVAL, "not a regular file")
            if self.trust and (why := self.trust.wrong(real, facts)):
                raise _UntrustedError(why)
            if facts.st_size > MAX_BYTES:
                raise OSError(errno.EFBIG, f"it has {facts.st_size} bytes, and {MAX_BYTES} are allowed")
            data = b""
            while chunk := os.read(fd, MAX_BYTES + 1 - len(data)):
                data += chunk
            return data
        finally:
            os.close(fd)

    def trusted_directory(self, path: str) -> None:
        assert self.trust is not None
        if why := self.trust.directory(os.path.dirname(os.path.abspath(path))):
            raise _UntrustedError(why)

    def problem(
        self, code: str, message: str, path: str, *, severity: Severity = "error", service: str | None = None
    ) -> None:
        self.problems.append(Problem(code, message, path, severity=severity, service=service))


class _UntrustedError(ValueError):
    pass


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror[:1].lower() + error.strerror[1:]
    return str(error)


def _is_ignored(name: str) -> bool:
    """K2: everything that is no .toml, and what editors and package managers leave behind, without a word."""
    return not name.endswith(".toml") or name.startswith((".", "#"))


class Trust:
    """Whether anybody but `owners` could change a file, or put another in its place. Directories are asked once."""

    def __init__(self, owners: frozenset[int]) -> None:
        self.owners = owners
        self._directories: dict[tuple[str, bool], str | None] = {}

    def wrong(self, path: str, facts: os.stat_result) -> str | None:
        mode = stat.S_IMODE(facts.st_mode)
        if facts.st_uid not in self.owners:
            return f"{path} belongs to {_user_name(facts.st_uid)}"
        if mode & 0o022:
            return f"{path} is writable by {'everybody' if mode & 0o002 else 'its group'} (mode {mode:04o})"
        return None

    def directory(self, path: str, *, above: bool = False) -> str | None:
        """Why a directory, an absolute path, or one above it is not safe. `above`: it holds only other directories."""
        key = path, above
        if key not in self._directories:
            self._directories[key] = self._directory(path, above)
        return self._directories[key]

    def _directory(self, path: str, above: bool) -> str | None:
        facts = os.stat(path)
        sticky = above and facts.st_uid == 0 and facts.st_mode & stat.S_ISVTX
        if not sticky and (why := self.wrong(path, facts)):
            return why
        parent = os.path.dirname(path)
        return None if parent == path else self.directory(parent, above=True)

    def file(self, path: str) -> str | None:
        """The same of a file, an absolute path, by the name given and by the one it resolves to."""
        try:
            for name in dict.fromkeys((path, os.path.realpath(path))):
                if why := self.wrong(name, os.stat(name)) or self.directory(os.path.dirname(name)):
                    return why
        except (OSError, ValueError) as error:
            return f"{path}: {_reason(error)}"
        return None


class RealMachine:
    """schema.Machine by this machine's files. Each fact is looked up once: make a new one for each load.

    /etc/services, /etc/passwd and /etc/group are read before the C library is asked, which may ask a daemon.
    """

    def __init__(self) -> None:
        self.uid = os.geteuid()
        self.gid = os.getegid()
        self._files: dict[str, FileFacts | None] = {}
        self._trust: dict[frozenset[int], Trust] = {}
        self._trusted: dict[tuple[str, frozenset[int]], str | None] = {}
        self._services: dict[tuple[str, str], int] | None = None
        self._users: dict[str | int, tuple[int, int] | None] = {}
        self._groups: dict[str | int, int | None] = {}

    def port_of(self, name: str, protocol: str) -> int | None:
        if self._services is None:
            self._services = {}
            for words in _lines("/etc/services", None):
                port, _, kind = words[1].partition("/") if len(words) > 1 else ("", "", "")
                if port.isascii() and port.isdigit() and int(port) <= 65535:
                    for alias in (words[0], *words[2:]):
                        self._services.setdefault((alias, kind), int(port))
        return self._services.get((name, protocol))

    def user(self, user: str | int) -> tuple[int, int] | None:
        if not self._users:
            for words in _lines("/etc/passwd", ":"):
                if len(words) >= 4 and words[2].isdigit() and words[3].isdigit():
                    found = int(words[2]), int(words[3])
                    self._users.setdefault(words[0], found)
                    self._users.setdefault(found[0], found)
            self._users.setdefault(self.uid, (self.uid, self.gid))
        if user not in self._users:
            try:
                entry = pwd.getpwnam(user) if isinstance(user, str) else pwd.getpwuid(user)
                self._users[user] = entry.pw_uid, entry.pw_gid
            except (KeyError, ValueError, OverflowError):
                self._users[user] = None
        return self._users[user]

    def group(self, group: str | int) -> int | None:
        if not self._groups:
            for words in _lines("/etc/group", ":"):
                if len(words) >= 3 and words[2].isdigit():
                    self._groups.setdefault(words[0], int(words[2]))
                    self._groups.setdefault(int(words[2]), int(words[2]))
            self._groups.setdefault(self.gid, self.gid)
        if group not in self._groups:
            try:
                entry = grp.getgrnam(group) if isinstance(group, str) else grp.getgrgid(group)
                self._groups[group] = entry.gr_gid
            except (KeyError, ValueError, OverflowError):
                self._groups[group] = None
        return self._groups[group]

    def absolute(self, path: str) -> str:
        return os.path.abspath(path)

    def file(self, path: str) -> FileFacts | None:
        if path not in self._files:
            self._files[path] = _file_facts(path)
        return self._files[path]

    def untrusted(self, path: str, owners: frozenset[int]) -> str | None:
        key = path, owners
        if key not in self._trusted:
            trust = self._trust.setdefault(owners, Trust(owners))
            self._trusted[key] = trust.file(path)
        return self._trusted[key]


def _file_facts(path: str) -> FileFacts | None:
    try:
        facts = os.stat(path)
    except (OSError, ValueError):
        return None
    if stat.S_ISDIR(facts.st_mode):
        return FileFacts("directory", False)
    if not stat.S_ISREG(facts.st_mode):
        return FileFacts("other", False)
    head = None
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
        try:
            head = os.read(fd, _HEAD)
        finally:
            os.close(fd)
    except OSError:
        pass  # a program may be executable and not readable
    return FileFacts("file", os.access(path, os.X_OK), head)


def _lines(path: str, separator: str | None) -> list[list[str]]:
    """The fields of each line that is not a comment; nothing where there is no such file."""
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            return [words for line in file if (words := line.partition("#")[0].strip().split(separator))]
    except OSError:
        return []


def _user_name(uid: int) -> str:
    try:
        return f"user {pwd.getpwuid(uid).pw_name}"
    except KeyError:
        return f"uid {uid}"


def _home(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_dir
    except KeyError:
        return "/"
