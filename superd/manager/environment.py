"""Facts about a service's surroundings that need a look at this machine: its uid, its environment file."""

from __future__ import annotations

import grp
import os
import pwd
import re
from typing import Any

from superd.core import messages
from superd.core.spec import ServiceSpec

_FILE_BYTES = 1 << 20
_RESERVED = ("LISTEN_", "NOTIFY_", "WATCHDOG_")  # as in a table: the service would believe them (E13, O2)


def trusted_uid(spec: ServiceSpec) -> int:
    """The uid that the service's own paths belong to; superd's own where it is not another."""
    user = spec.context.user
    if isinstance(user, int):
        return user
    try:
        return os.geteuid() if user is None else pwd.getpwnam(user).pw_uid
    except KeyError:
        return os.geteuid()


def gid_of(group: str | int) -> int:
    """Raises KeyError."""
    return group if isinstance(group, int) else grp.getgrnam(group).gr_gid


def context_json(spec: ServiceSpec) -> dict[str, Any]:
    return messages.context_to_json(spec.context)


def read_file(path: str) -> dict[str, str]:
    """NAME=VALUE lines as systemd.exec(5), EnvironmentFile=, has them: `#` and `;` comments, quotes that may reach over
    lines, and a backslash at the end of a line that goes on.

    Raises OSError, or ValueError that names the line.
    """
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        data = file.read(_FILE_BYTES + 1)
    if len(data) > _FILE_BYTES:
        raise ValueError(f"environment file {path} is larger than 1 MiB")
    text = data.decode(errors="surrogateescape")
    found: dict[str, str] = {}
    at = 0
    while begin := _LINE.match(text, at):
        name, equals = begin["name"].strip(), begin["equals"]
        if not name and not equals:
            break
        value, at = _value(text, begin.end())
        problem = ""
        if not equals or not (name.isascii() and name.isidentifier()) or "\0" in value:
            problem = "not NAME=VALUE"
        elif name.startswith(_RESERVED):
            problem = f"{name} is set by superd itself, where it applies"
        if problem:
            raise ValueError(f"{path}:{text.count(chr(10), 0, begin.start('name')) + 1}: {problem}")
        found[name] = value
    return found


_LINE = re.compile(r"(?:\s|[#;][^\n]*)*(?P<name>[^=\n]*)(?P<equals>=?)")
_QUOTED = re.compile(r"""[^\S\n]*(?:'([^']*)'|"((?:[^"\\]|\\.)*)")""", re.S)
_PLAIN = re.compile(r"[^\S\n]*((?:[^\\\n]|\\(?:.|\Z))*)", re.S)


def _value(text: str, at: int) -> tuple[str, int]:
    """The value that begins at `at`, and where it ends: quoted pieces, then what is not quoted."""
    pieces = []
    while quoted := _QUOTED.match(text, at):
        single, double = quoted.groups()
        pieces.append(re.sub(r'\\(["\\`$])|\\\n', r"\1", double) if single is None else single)
        at = quoted.end()
    plain = _PLAIN.match(text, at)
    assert plain is not None  # it may be empty
    pieces.append(re.sub(r"\\(?:\n|(.)|\Z)", r"\1", plain[1].rstrip(), flags=re.S))
    return "".join(pieces), plain.end()
