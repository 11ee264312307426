"""Text of files -> (Snapshot, problems), on a machine that is a fake: nothing depends on the host."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from superd.core.machine import FileFacts
from superd.core.problems import Problem, format_problems
from superd.core.schema import SourceFile, load
from superd.core.spec import Snapshot

ELF = FileFacts("file", True, b"\x7fELF\0")


@dataclass
class FakeMachine:
    uid: int = 0
    gid: int = 0
    users: dict[str, int] = field(default_factory=lambda: {"root": 0, "www": 33, "nobody": 65534, "0day": 7})
    files: dict[str, FileFacts] = field(
        default_factory=lambda: {
            "/bin/cat": ELF,
            "/usr/bin/env": ELF,
            "/bin": FileFacts("directory", False),
            "/bin/plain": FileFacts("file", False, b"\x7fELF\0"),
            "/bin/fifo": FileFacts("other", False),
            "/bin/script": FileFacts("file", True, b"echo hello\n"),
            "/bin/empty": FileFacts("file", True, b""),
            "/bin/good-script": FileFacts("file", True, b"#!/usr/bin/env python3\n"),
            "/bin/bad-script": FileFacts("file", True, b"#!/usr/bin/pyhton\n"),
            "/bin/unreadable": FileFacts("file", True, None),
            "/bin/foreign": FileFacts("file", True, b"MZ\0\0"),
            "/tmp/evil": ELF,
            "/home/www/app": ELF,
        }
    )

    def port_of(self, name: str, protocol: str) -> int | None:
        return {"http": 80, "domain": 53}.get(name)

    def user(self, user: str | int) -> tuple[int, int] | None:
        uid = self.users.get(user) if isinstance(user, str) else user
        return (uid, uid) if uid in self.users.values() and uid is not None else None

    def group(self, group: str | int) -> int | None:
        found = self.user(group)
        return found and found[0]

    def absolute(self, path: str) -> str:
        return path if path.startswith("/") else f"/work/{path}"

    def file(self, path: str) -> FileFacts | None:
        return self.files.get(path)

    def lacks_controller(self, name: str) -> str | None:
        return None

    def unreadable(self, path: str) -> str | None:
        return f"{path}: no such file or directory" if path.startswith("/missing") else None

    def exposed(self, path: str) -> str | None:
        return f"{path} is readable by everybody (mode 0644)" if path.startswith("/open") else None

    def untrusted(self, path: str, owners: frozenset[int]) -> str | None:
        if path.startswith("/home/www") and 33 not in owners:
            return f"{path} belongs to user www"
        return f"{path} is writable by everybody" if path.startswith("/tmp") else None


def sources(files: Mapping[str, str | bytes]) -> list[SourceFile]:
    """Relative names as configdir.read gives them: "git.toml", "git.toml.d/x.toml", "superd.toml"."""
    found = []
    for path, text in files.items():
        data = text if isinstance(text, bytes) else text.encode()
        stem = path.partition(".toml")[0]
        if path == "superd.toml":
            found.append(SourceFile(path, data, "daemon", "superd"))
        else:
            found.append(SourceFile(f"conf.d/{path}", data, "drop-in" if "/" in path else "service", stem))
    return found


def load_all(
    files: Mapping[str, str | bytes], *, is_root: bool = True, environ: Mapping[str, str] | None = None
) -> tuple[Snapshot, list[Problem]]:
    machine = FakeMachine() if is_root else FakeMachine(uid=33, gid=33)
    return load(sources(files), machine=machine, environ=environ or {"PATH": "/usr/bin:/bin"}, is_root=is_root)


def only_problem(text: str) -> str:
    """The line of the one thing that is wrong with a service's file, without the file's name.

    The command comes from a drop-in, so that the lines keep their numbers.
    """
    snapshot, problems = load_all({"git.toml": text, "git.toml.d/x.toml": 'command = "/bin/cat"\n'})
    assert snapshot.services == {} and set(snapshot.broken) == {"git"}
    found = format_problems(problems, "short").replace("conf.d/git.toml:", "").splitlines()
    assert len(found) == 1, found
    return found[0]
