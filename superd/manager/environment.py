"""Facts about a service's surroundings that need a look at this machine: its uid, its environment file."""

from __future__ import annotations

import grp
import os
import pwd
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
    """NAME=VALUE lines as systemd.exec(5), EnvironmentFile=, has them: `#` and `;` comments, optional quotes.

    Raises OSError, or ValueError that names the line.
    """
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        data = file.read(_FILE_BYTES + 1)
    if len(data) > _FILE_BYTES:
        raise ValueError(f"environment file {path} is larger than 1 MiB")
    found: dict[str, str] = {}
    for number, line in enumerate(data.decode(errors="surrogateescape").split("\n"), 1):
        line = line.strip()
        if not line or line[0] in "#;":
            continue
        name, equals, value = line.partition("=")
        name, value = name.strip(), value.strip()
        if not equals or not (name.isascii() and name.isidentifier()) or "\0" in value:
            raise ValueError(f"{path}:{number}: not NAME=VALUE")
        if name.startswith(_RESERVED):
            raise ValueError(f"{path}:{number}: {name} is set by superd itself, where it applies")
        if len(value) >= 2 and value[0] == value[-1] and value[0] in "'\"":
            value = value[1:-1]
        found[name] = value
    return found
