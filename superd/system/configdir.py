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
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from superd.core import schema
from superd.core.document import MAX_BYTES
from superd.core.kinds import NAME
from superd.core.machine import FileFacts
from superd.core.problems import Problem
from superd.core.schema import Role, SourceFile
from superd.core.spec import Snapshot

_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*@?\.toml", re.A)
_TICK_NS = 50_000_000  # more than the grain of a file's times, 4 ms at CONFIG_HZ=250
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
    found = Scanner(paths, is_root=is_root).scan()
    return found.files, found.problems


Hints = frozenset[str]  # paths of files that may be other ones now; "" is any


@dataclass(frozen=True, slots=True)
class Scan:
    """What is on disk.

    unreadable  directories, as they were named, of which it cannot be told what is in them now
    watch       directory -> name in it, None for every one -> what may be another then, for hints; a hint that ends
                in "/" wants the name added
    """

    files: list[SourceFile]
    problems: list[Problem]
    unreadable: frozenset[str]
    watch: dict[str, dict[str | None, set[str]]]


@dataclass(slots=True)
class _Entry:
    """A service's file and the changes to it, or superd.toml. places: (directory, name) that symbolic links go by."""

    files: tuple[SourceFile, ...] = ()
    problems: tuple[Problem, ...] = ()
    places: frozenset[tuple[str, str]] = frozenset()
    changes: str = ""  # the directory of changes, if there is one


class Given:
    """A service that stands in no file; looks like a Scanner."""

    def __init__(self, source: SourceFile) -> None:
        self.source = source

    def scan(self, hints: Hints | None = None) -> Scan:
        return Scan([self.source], [], frozenset(), {})


class Scanner:
    """Reads the same paths again and again: what is the same by inode, size, times, mode and owner is not read again.

    A file whose change is younger than the clock that stamps it can tell is read each time (FAILURES K19).
    """

    def __init__(self, paths: Sequence[str], *, is_root: bool | None = None) -> None:
        self.paths = [os.path.normpath(path) for path in paths]
        self.is_root = os.geteuid() == 0 if is_root is None else is_root
        self.trust: Trust | None = None
        self._parts: list[tuple[str, dict[str, _Entry]]] = []  # directory ("" for files that are named), its entries
        self._known: dict[str, tuple[int | None, SourceFile]] = {}
        self._used: dict[str, tuple[int | None, SourceFile]] = {}
        self._conf_dirs: dict[str, tuple[str, ...]] = {}  # the last that could be read
        self._has_conf_d: set[str] = set()
        self._unreadable: set[str] = set()
        self._problems: list[Problem] = []  # of whole directories
        self._seen: set[str] = set()
        self._entry = _Entry()
        self._names: dict[str, frozenset[str]] = {}  # in a directory, when its entries were put in order
        self._watched: dict[str, dict[str | None, set[str]]] | None = None

    def scan(self, hints: Hints | None = None) -> Scan:
        """Everything, or what `hints` name and the rest as it was.

        Raises OSError when there are no fds or no memory: that says nothing about the files.
        """
        try:
            return self._scan(hints)
        except OSError:
            self._parts = []  # half of it
            raise

    def _scan(self, hints: Hints | None) -> Scan:
        self.trust = Trust(frozenset({0})) if self.is_root else None
        if hints is None or not self._parts or not self._look_at(hints):
            self._used = {}
            self._parts, self._problems = [], []
            self._seen, self._unreadable = set(), set()
            for path in self.paths:
                self.path(path)
            self._known = self._used
            self._names = {directory: frozenset(part) for directory, part in self._parts}
            self._watched = None
        files: list[SourceFile] = []
        problems = list(self._problems)
        for _, part in self._parts:
            for entry in part.values():
                files += entry.files
                problems += entry.problems
        return Scan(files, problems, frozenset(self._unreadable), self._watch())

    def _look_at(self, hints: Hints) -> bool:
        """False: that needs a full scan."""
        parts = dict(self._parts)
        wanted: dict[str, set[str]] = {}
        for hint in hints:
            directory, name = os.path.split(hint)
            name = name.removesuffix(".d")
            if directory not in parts or name in ("superd.toml", "conf.d") or directory in self._unreadable:
                return False
            if not _is_ignored(name):
                wanted.setdefault(directory, set()).add(name)
        for directory, names in wanted.items():
            part = parts[directory]
            for name in names:
                path = os.path.join(directory, name)
                was = part.get(name, _Entry())
                for source in was.files:
                    self._known[source.path] = None, source  # to be read, whatever its times say
                if not os.path.lexists(path):
                    part.pop(name, None)
                    self._names[directory] -= {name}
                    now = _Entry()
                else:
                    now = part[name] = self.entry(directory, name)
                if (was.places, was.changes) != (now.places, now.changes):
                    self._watched = None
                for source in was.files:
                    if source.path not in {one.path for one in now.files}:
                        self._known.pop(source.path, None)
            if not names <= self._names.get(directory, frozenset()):
                ordered = sorted(part.items())
                part.clear()
                part.update(ordered)
                self._names[directory] = frozenset(part)
        return True

    def _watch(self) -> dict[str, dict[str | None, set[str]]]:
        if self._watched is None:
            self._watched = self._find_watched()
        return self._watched

    def _find_watched(self) -> dict[str, dict[str | None, set[str]]]:
        found: dict[str, dict[str | None, set[str]]] = {}

        def add(directory: str, name: str | None, hint: str) -> None:
            found.setdefault(directory, {}).setdefault(name, set()).add(hint)

        for path in self.paths:
            # Whoever replaces a directory tells nothing there: its name has to be watched where it stands (K5).
            for watched in (path, os.path.join(path, "conf.d"), os.path.join(path, "superd.toml")):
                for directory, name in _way(os.path.abspath(watched)):
                    add(directory, name, "")
            add(*os.path.split(os.path.dirname(os.path.abspath(path))), "")
        for directory, part in self._parts:
            if directory:
                for where, one in _way(os.path.abspath(directory)):
                    add(where, one, "")
                add(os.path.realpath(directory), None, f"{directory}/")
            for name, entry in part.items():
                path = os.path.join(directory, name)
                for where, one in entry.places:
                    add(where, one, path if directory else "")
                if entry.changes:
                    add(entry.changes, None, path if directory else "")
                if not directory:
                    for where, one in _way(os.path.abspath(path)):
                        add(where, one, "")
                    add(os.path.dirname(os.path.abspath(path)), f"{name}.d", "")
        return found

    def path(self, path: str) -> None:
        try:
            is_directory = stat.S_ISDIR(os.stat(path).st_mode)
        except (OSError, ValueError) as error:
            if not os.path.islink(path):
                self._unreadable |= {path, os.path.join(path, "conf.d"), *self._conf_dirs.get(path, ())}
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
            self._entry = _Entry()
            self.service(path, name.removesuffix(".toml"))
            self._parts.append(("", {path: self._entry}))

    def directory(self, path: str) -> None:
        main, conf_d = os.path.join(path, "superd.toml"), os.path.join(path, "conf.d")
        if os.path.lexists(conf_d):
            self._has_conf_d.add(path)
        if not os.path.lexists(main) and path not in self._has_conf_d:
            self.conf_d(path)
            return
        # A conf.d that was there and is not has not become an empty one: somebody is about to put another in its place.
        dirs = [conf_d] if path in self._has_conf_d else []
        if os.path.lexists(main):
            dirs += self.daemon(main)
        for found in dirs:
            self.conf_d(found)

    def daemon(self, path: str) -> tuple[str, ...]:
        """superd.toml; the directories that it names, or named when it could be read last."""
        self._entry = _Entry()
        source = self.file(path, "daemon", "superd", None)
        self._parts.append(("", {path: self._entry}))
        dirs = None if source is None else schema.conf_dirs(source)
        if dirs is not None:
            self._conf_dirs[path] = dirs
        return self._conf_dirs.get(path, ())

    def conf_d(self, path: str) -> None:
        real = os.path.realpath(path)
        if real in self._seen:
            return
        self._seen.add(real)
        part: dict[str, _Entry] = {}
        self._parts.append((path, part))
        try:
            if self.trust and (why := self.trust.directory(real)):
                self.problem("not-trusted", f"cannot trust {path}, nothing in it is read: {why}", path)
                self._unreadable.add(path)
                return
            names = sorted(os.listdir(path))
        except OSError as error:
            _raise_if_out_of_resources(error)
            self.problem("unreadable", f"cannot read {path}: {_reason(error)}", path)
            self._unreadable.add(path)
            return
        for name in names:
            if not _is_ignored(name) and (name != "superd.toml" or os.path.basename(path) == "conf.d"):
                part[name] = self.entry(path, name)

    def entry(self, directory: str, name: str) -> _Entry:
        """What a name in a conf.d is."""
        self._entry = found = _Entry()
        here = os.path.join(directory, name)
        stem = name.removesuffix(".toml")
        if _FILE.fullmatch(name) and NAME.fullmatch(stem.removesuffix("@")):
            self.service(here, stem)
        elif name != name.lower() and os.path.lexists(twin := os.path.join(directory, name.lower())):
            why = f"{here} differs from {twin} in case only: {twin} counts"
            found.problems += (Problem("duplicate-name", why, here),)
        else:
            why = f"{name!r} is passed over: the name of a service is of a-z 0-9 _ . -, at most 63 characters"
            found.problems += (Problem("bad-name", why, here, severity="warning"),)
        return found

    def service(self, path: str, name: str) -> None:
        """The file and the changes to it."""
        source = self.file(path, "service", name, name)
        changes = f"{path}.d"
        if source is None or not os.path.lexists(changes):
            return
        self._entry.changes = os.path.realpath(changes)
        try:
            if self.trust and (why := self.trust.directory(os.path.realpath(changes))):
                self.entry_problem("not-trusted", f"cannot trust {changes}: {why}", changes, name)
                return
            names = sorted(os.listdir(changes))
        except OSError as error:
            _raise_if_out_of_resources(error)
            self.entry_problem("unreadable", f"cannot read {changes}: {_reason(error)}", changes, name)
            return
        for change in names:
            if not _is_ignored(change):
                self.file(os.path.join(changes, change), "drop-in", name, name)

    def file(self, path: str, role: Role, name: str, service: str | None) -> SourceFile | None:
        try:
            source = self.source(path, role, name)
        except (OSError, ValueError) as error:
            _raise_if_out_of_resources(error)
            if isinstance(error, FileNotFoundError) and not os.path.lexists(path):
                return None  # gone since its directory was read
            untrusted = isinstance(error, _UntrustedError)
            code, verb = ("not-trusted", "trust") if untrusted else ("unreadable", "read")
            self.entry_problem(code, f"cannot {verb} {path}: {_reason(error)}", path, service)
            return None
        self._entry.files += (source,)
        return source

    def source(self, path: str, role: Role, name: str) -> SourceFile:
        """A regular file. Raises OSError; _UntrustedError where somebody else could have written it."""
        real = path
        if self.trust:
            self.trusted_directory(path)
        if os.path.islink(path):
            way = _way(os.path.abspath(path))
            self._entry.places |= way
            real = os.path.realpath(path)
            if self.trust:
                self.trusted_directory(real)
                for directory, one in way:
                    if why := self.trust.link(directory, one):
                        raise _UntrustedError(why)
        was, known = self._known.get(path, (None, None))
        if known is not None and was is not None and was == _signature(os.lstat(real)) and known.role == role:
            self._used[path] = was, known
            return known
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
            # Not MAX_BYTES at once: what is left of so large a piece of memory keeps a page of its own for ever.
            while chunk := os.read(fd, min(facts.st_size, MAX_BYTES - len(data)) + 1):
                data += chunk
        finally:
            os.close(fd)
        source = SourceFile(path, data, role, name)
        if known == source:
            source = known
        young = facts.st_ctime_ns > time.time_ns() - _TICK_NS
        self._used[path] = self._known[path] = None if young else _signature(facts), source
        return source

    def trusted_directory(self, path: str) -> None:
        assert self.trust is not None
        if why := self.trust.directory(os.path.dirname(os.path.abspath(path))):
            raise _UntrustedError(why)

    def entry_problem(self, code: str, message: str, path: str, service: str | None) -> None:
        self._entry.problems += (Problem(code, message, path, service=service),)

    def problem(self, code: str, message: str, path: str) -> None:
        self._problems.append(Problem(code, message, path))


def _signature(facts: os.stat_result) -> int:
    """What tells a file from another, or from itself as it was. A hash of 61 bits: seven numbers of ten thousand files
    would take 3 MB."""
    return hash((
        facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns, facts.st_mode, facts.st_uid
    ))  # fmt: skip


def _way(path: str) -> set[tuple[str, str]]:
    """(directory, name) of what decides where an absolute path leads: itself, and each symbolic link on the way. Where
    the way ends before its end, the name that is missing."""
    found: set[tuple[str, str]] = set()
    todo, here = path.strip("/").split("/"), "/"
    links = 0
    while todo and links < 40:
        name = todo.pop(0)
        if name in ("", ".", ".."):
            here = os.path.dirname(here) if name == ".." else here
            continue
        full = os.path.join(here, name)
        try:
            target = os.readlink(full)
        except OSError:
            if not todo or not os.path.isdir(full):
                found.add((here, name))
                return found
            here = full
            continue
        links += 1
        found.add((here, name))
        here = "/" if target.startswith("/") else here
        todo = target.strip("/").split("/") + todo
    return found


class _UntrustedError(ValueError):
    pass


def _raise_if_out_of_resources(error: Exception) -> None:
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
        raise error


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror[:1].lower() + error.strerror[1:]
    return str(error)


def is_ignored(name: str) -> bool:
    """Whether what happens to a name in a conf.d means nothing: neither a file of a service nor changes to one."""
    return _is_ignored(name.removesuffix(".d"))


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
            # A volume of Kubernetes is mode 0777; where nobody can write through the mount that is only a number.
            if facts.st_uid not in self.owners or not os.statvfs(path).f_flag & os.ST_RDONLY:
                return why
        parent = os.path.dirname(path)
        return None if parent == path else self.directory(parent, above=True)

    def link(self, directory: str, name: str) -> str | None:
        """Why somebody else could lead a symbolic link elsewhere. In a sticky directory that is its owner."""
        path = os.path.join(directory, name)
        facts = os.lstat(path)
        if stat.S_ISLNK(facts.st_mode) and facts.st_uid not in self.owners:
            return f"{path} belongs to {_user_name(facts.st_uid)}"
        return self.directory(directory, above=True)

    def file(self, path: str) -> str | None:
        """The same of a file, or a directory with what is in it: an absolute path, by the name given and by the one it
        resolves to."""
        try:
            for name in dict.fromkeys((path, os.path.realpath(path))):
                facts = os.stat(name)
                if stat.S_ISDIR(facts.st_mode):
                    why = self.directory(name)
                else:
                    why = self.wrong(name, facts) or self.directory(os.path.dirname(name))
                if why:
                    return why
        except (OSError, ValueError) as error:
            return f"{path}: {_reason(error)}"
        return None


def unreadable(path: str) -> str | None:
    """Why this process cannot read a file, of at most 1 MiB, to its end."""
    try:
        facts = os.stat(path)
        if not stat.S_ISREG(facts.st_mode):
            return f"{path}: not a regular file"
        if facts.st_size > MAX_BYTES:
            return f"{path}: larger than {MAX_BYTES >> 20} MiB"
        os.close(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY))
    except (OSError, ValueError) as error:
        return f"{path}: {_reason(error)}"
    return None


def exposed(path: str) -> str | None:
    """Why everybody could read a file that is meant for few. Its group may: that is how programs share a key."""
    try:
        mode = stat.S_IMODE(os.stat(path).st_mode)
    except (OSError, ValueError) as error:
        return f"{path}: {_reason(error)}"
    return f"{path} is readable by everybody (mode {mode:04o})" if mode & 0o004 else None


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

    def unreadable(self, path: str) -> str | None:
        return unreadable(path)

    def exposed(self, path: str) -> str | None:
        return exposed(path)

    def lacks_controller(self, name: str) -> str | None:
        mounts = [words for words in _lines("/proc/self/mountinfo", None) if "cgroup2" in words[words.index("-") :]]
        if not mounts:
            return "cgroups of version 2 are not mounted"
        path = os.path.join(mounts[0][4], "cgroup.controllers")
        found = next(iter(_lines(path, None)), [])
        if name in found:
            return None
        older = any(words[0] == name and words[1] != "0" for words in _lines("/proc/cgroups", None))
        why = "; it belongs to cgroups of version 1 on this machine" if older else ""
        return f"{path} lists {' '.join(found) or 'nothing'}, not {name}{why}"


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
