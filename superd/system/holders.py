"""Who has an address that cannot be bound: the process behind a row of /proc/net (proc(5))."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

from superd.core.spec import Address

_LISTEN = "0A"
_ANY4, _ANY6, _MAPPED = bytes(4), bytes(16), bytes(10) + b"\xff\xff"


@dataclass(frozen=True, slots=True)
class Holder:
    """A process that has the socket open, the one with the lowest pid. `str()` is for messages: "pid 123 (nginx)"."""

    pid: int
    program: str

    def __str__(self) -> str:
        return f"pid {self.pid} ({self.program})"


def find_holder(address: Address) -> Holder | None:
    """The process whose socket keeps address from being bound, wildcard addresses of either family included.

    It reads the links of all open files of all processes: milliseconds on a small machine, a second on a very large
    one.
    None without /proc, without the right to look into the process, and for vsock and FIFOs, which no table lists.
    """
    with suppress(OSError, ValueError, IndexError):
        inodes = set(_unix_inodes(address)) if address.is_unix else set(_ip_inodes(address))
        if inodes:
            return _open_in({f"socket:[{inode}]" for inode in inodes})
    return None


def _open_in(links: set[str]) -> Holder | None:
    for pid in sorted(int(name) for name in os.listdir("/proc") if name.isdigit()):
        with suppress(OSError):  # it ended, or is not ours to see
            for fd in os.listdir(f"/proc/{pid}/fd"):
                with suppress(OSError):
                    if os.readlink(f"/proc/{pid}/fd/{fd}") in links:
                        return Holder(pid, _program(pid))
    return None


def _program(pid: int) -> str:
    """Its name in ps(1), which the process chooses itself: nothing unprintable gets through."""
    with suppress(OSError), open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as file:
        return "".join(letter if letter.isprintable() else "?" for letter in file.read().removesuffix("\n"))
    return "?"


def _unix_inodes(address: Address) -> Iterator[int]:
    needle = os.fsencode(address.path or "")
    with open("/proc/net/unix", "rb") as table:
        for row in table:  # Num RefCount Protocol Flags Type St Inode Path
            fields = row.rstrip(b"\n").split(None, 7)
            # An accepted connection carries the path too, but is not in the way. What is unconnected (St 01) is, and so
            # are datagram sockets (Type 2), whose state changes when a client connects to them.
            if fields[7:] == [needle] and (fields[5] == b"01" or fields[4] == b"0002"):
                yield int(fields[6])


def _ip_inodes(address: Address) -> Iterator[int]:
    protocol = address.scheme[:3]
    if protocol not in ("tcp", "udp"):
        return
    wanted = _hosts(address)
    for table in (protocol, f"{protocol}6"):
        with suppress(FileNotFoundError), open(f"/proc/net/{table}", encoding="ascii") as rows:
            for row in list(rows)[1:]:  # sl local_address rem_address st tx:rx tr:when retrnsmt uid timeout inode
                fields = row.split()
                host, port = fields[1].split(":")
                if int(port, 16) == address.port and (protocol == "udp" or fields[3] == _LISTEN):
                    if any(_clash(_decode(host), mine) for mine in wanted):
                        yield int(fields[9])


def _hosts(address: Address) -> list[bytes]:
    if address.host is None:
        return [_ANY4] if address.scheme[3:] == "4" else [_ANY6]
    if address.host == "localhost":
        return [socket.inet_aton("127.0.0.1"), socket.inet_pton(socket.AF_INET6, "::1")]
    host = address.host.partition("%")[0]
    return [socket.inet_pton(socket.AF_INET6 if ":" in host else socket.AF_INET, host)]


def _clash(theirs: bytes, mine: bytes) -> bool:
    """Whether two addresses exclude each other on one port. /proc does not tell IPV6_V6ONLY: [::] counts as both."""
    if _ANY6 in (theirs, mine):
        return True
    theirs, mine = theirs.removeprefix(_MAPPED), mine.removeprefix(_MAPPED)
    return len(theirs) == len(mine) and (theirs == mine or _ANY4 in (theirs, mine))


def _decode(text: str) -> bytes:
    """Network order from the hexadecimal words of /proc/net, which are printed in the machine's."""
    return b"".join(int(text[at : at + 8], 16).to_bytes(4, sys.byteorder) for at in range(0, len(text), 8))
