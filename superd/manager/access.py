"""The `[access]` rules of a service at run time: facts of a client in, a Decision out; names off the accept path."""

from __future__ import annotations

import os
import pwd
import socket
import struct
import time
from collections.abc import Iterable

import trio

from superd.core.access import Client, Decision, Rules, normalised
from superd.core.spec import Access
from superd.system import peers

_LOOKUP_S = 5.0
_KEPT_S, _UNKNOWN_S = 60.0, 10.0  # how long what the name servers said is believed
_NAMES_KEPT = 4096
_SO_PEERGROUPS = 59
_MOST_GROUPS = 256  # Python's getsockopt takes no more than 1024 bytes; who has more groups is in none of them


class Names:
    """Forward-confirmed host names by address, asked for in threads of their own: nobody waits for a name server."""

    def __init__(self) -> None:
        self._known: dict[bytes, tuple[float, tuple[str, ...] | None]] = {}
        self._limiter: trio.CapacityLimiter | None = None

    def known(self, address: bytes) -> tuple[tuple[str, ...] | None, bool]:
        """(names, unknown) as Client has them."""
        until, names = self._known.get(address, (0.0, None))
        if time.monotonic() >= until:
            return None, False
        return names, names is None

    async def find(self, address: bytes) -> None:
        """Ask, at most five seconds; then `known` has an answer."""
        self._limiter = self._limiter or trio.CapacityLimiter(8)
        names: tuple[str, ...] | None = None
        with trio.move_on_after(_LOOKUP_S):
            names = await trio.to_thread.run_sync(
                _confirmed_names, address, limiter=self._limiter, abandon_on_cancel=True
            )
        if len(self._known) >= _NAMES_KEPT:
            now = time.monotonic()
            self._known = {key: row for key, row in self._known.items() if row[0] > now}
            if len(self._known) >= _NAMES_KEPT:
                self._known.clear()
        self._known[address] = time.monotonic() + (_UNKNOWN_S if names is None else _KEPT_S), names


def _confirmed_names(address: bytes) -> tuple[str, ...] | None:
    """Names that the address has and that lead back to it; None: the name servers do not say."""
    family = socket.AF_INET if len(address) == 4 else socket.AF_INET6
    text = socket.inet_ntop(family, address)
    try:
        name, aliases, _ = socket.gethostbyaddr(text)
    except socket.herror as error:
        return () if error.args[0] in (1, 4) else None  # HOST_NOT_FOUND, NO_DATA (netdb.h)
    except OSError:
        return None
    confirmed = []
    for candidate in (name, *aliases):
        try:
            found = {info[4][0] for info in socket.getaddrinfo(candidate, None, family, socket.SOCK_STREAM)}
        except (OSError, UnicodeError):
            continue
        if text in found:
            confirmed.append(candidate.lower().rstrip("."))
    return tuple(confirmed)


class Door:
    """Who may connect to one service. `names` is shared by all services."""

    def __init__(self, access: Access, names: Names) -> None:
        self.rules = Rules(access)
        self.names = names

    def judge(self, client: Client) -> Decision:
        now = time.localtime() if self.rules.access.hours else None
        return self.rules.judge(client, now.tm_wday if now else 0, now.tm_hour * 60 + now.tm_min if now else 0)

    def client_of(self, fd: int, host: str | int) -> Client:
        """host: as accept(2) gave it; "" for a UNIX client."""
        if isinstance(host, int):
            return Client()
        if host:
            return self.client_at(host)
        try:
            _, uid, gid = peers.credentials(fd)
        except OSError:
            return Client()
        return Client(uid=uid, groups=frozenset({gid, *peer_groups(fd)}))

    def client_at(self, host: str) -> Client:
        """Raises ValueError for what is no numeric address."""
        address = packed(host)
        names, unknown = self.names.known(address)
        return Client(address, names=names, unknown=unknown)


def client_named(user: str) -> Client:
    """A UNIX client that runs as this user, by name or number. Raises KeyError."""
    entry = pwd.getpwuid(int(user)) if user.isdecimal() else pwd.getpwnam(user)
    return Client(uid=entry.pw_uid, groups=frozenset(os.getgrouplist(entry.pw_name, entry.pw_gid)))


def packed(host: str) -> bytes:
    """Raises ValueError."""
    host = host.partition("%")[0]
    try:
        return normalised(socket.inet_pton(socket.AF_INET6 if ":" in host else socket.AF_INET, host))
    except OSError:
        raise ValueError(f"{host!r} is not an address") from None


def peer_groups(fd: int) -> Iterable[int]:
    """The supplementary groups of a UNIX client, as they were when it connected (unix(7))."""
    try:
        with socket.socket(fileno=os.dup(fd)) as sock:
            data = sock.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, 4 * _MOST_GROUPS)
    except OSError:
        return ()
    return (group for (group,) in struct.iter_unpack("I", data))
