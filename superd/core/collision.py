"""Which sockets cannot be open at the same time, as far as their addresses tell."""

from __future__ import annotations

from typing import Any

from superd.core.spec import Address, SocketSpec


def collide(one: SocketSpec, other: SocketSpec) -> bool:
    """Whether two sockets cannot be open at once."""
    shared = set(places_of(one)) & set(places_of(other))
    return bool(shared) and _overlap(one, other) and not (one.reuse_port and other.reuse_port)


def places_of(socket: SocketSpec) -> list[tuple[Any, ...]]:
    """Where a socket stands: two that share none cannot collide."""
    address = socket.address
    if address.is_ip:
        transport = socket.protocol if socket.protocol in ("sctp", "udplite") else address.scheme[:3]
        return [(transport, address.port)] if address.port else []
    if address.scheme == "vsock":
        return [("vsock", address.port)]
    if address.scheme == "tcpmux":
        return [("tcpmux", (address.path or "").removeprefix("+"))]
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
