"""The PROXY header that a connection may begin with: who the client of the proxy in front of us is.

HAProxy's doc/proxy-protocol.txt, versions 1 (one line of text) and 2 (binary). Bytes in, a Header out, and for a server
behind us the other way round; nothing is known here of who may send one.
"""

from __future__ import annotations

import re
import struct
from ipaddress import IPv4Address, IPv6Address
from typing import NamedTuple

MOST_BYTES = 4096  # of a header of version 2 with all that it carries besides; 64 kB would be possible

_V1, _V1_BYTES = b"PROXY ", 107
_V2 = b"\r\n\r\n\0\r\nQUIT\n"
_V2_HEAD = struct.Struct("!12sBBH")  # signature, version and command, family and transport, bytes that follow
_PORT = re.compile(rb"0|[1-9][0-9]{0,4}")
_LOCAL, _PROXY = 0x20, 0x21
# Family and transport -> bytes of both addresses and ports. Others must not be sent, and are to be refused.
_BLOCKS = {0x00: 0, 0x11: 12, 0x12: 12, 0x21: 36, 0x22: 36, 0x31: 216, 0x32: 216}

Endpoint = tuple[str, int]  # numeric address, port


class NoHeaderError(ValueError):
    """The connection begins with something else."""


class WrongHeaderError(ValueError):
    """It begins as a header does, and is none. The text has nothing of what was sent in it."""


class Header(NamedTuple):
    """length: in bytes. source, local: the ends of the client's own connection; None: it has no IP addresses, or the
    proxy speaks for itself."""

    length: int
    source: Endpoint | None = None
    local: Endpoint | None = None


def parse(data: bytes) -> Header | None:
    """The header that `data` begins with; None: more of it has to come. Raises NoHeaderError, WrongHeaderError."""
    for signature, parse_version in ((_V1, _parse_text), (_V2, _parse_binary)):
        if data.startswith(signature):
            return parse_version(data)
        if signature.startswith(data):
            return None
    raise NoHeaderError


def is_begun(data: bytes) -> bool:
    """Whether it has the whole signature of a header: it was meant to be one."""
    return data.startswith((_V1, _V2))


def format_header(version: int, client: Endpoint | None, local: Endpoint | None) -> bytes:
    """What a server is told first. client None: one without an IP address; it then takes the connection as it is."""
    if client is None or local is None or (":" in client[0]) != (":" in local[0]):
        return b"PROXY UNKNOWN\r\n" if version == 1 else _V2_HEAD.pack(_V2, _LOCAL, 0, 0)
    is_ipv6 = ":" in client[0]
    if version == 1:
        family = "TCP6" if is_ipv6 else "TCP4"
        return f"PROXY {family} {client[0]} {local[0]} {client[1]} {local[1]}\r\n".encode("ascii")
    kind = IPv6Address if is_ipv6 else IPv4Address
    body = kind(client[0]).packed + kind(local[0]).packed + struct.pack("!HH", client[1], local[1])
    return _V2_HEAD.pack(_V2, _PROXY, 0x21 if is_ipv6 else 0x11, len(body)) + body


def _parse_text(data: bytes) -> Header | None:
    line, end, _ = data[:_V1_BYTES].partition(b"\r\n")
    if not end:
        if len(data) >= _V1_BYTES:
            raise WrongHeaderError(f"version 1 has at most {_V1_BYTES} bytes")
        return None
    length = len(line) + len(end)
    words = line.split(b" ")
    if words[1] == b"UNKNOWN":
        return Header(length)
    if len(words) != 6 or words[1] not in (b"TCP4", b"TCP6"):
        raise WrongHeaderError("not PROXY TCP4|TCP6|UNKNOWN and two addresses and ports")
    kind = IPv4Address if words[1] == b"TCP4" else IPv6Address
    try:
        source, local = (kind(word.decode("ascii")) for word in words[2:4])
    except ValueError:
        raise WrongHeaderError("not an address of its family") from None
    if b"%" in words[2] + words[3]:
        raise WrongHeaderError("an address with an interface")
    ports = [int(word) if _PORT.fullmatch(word) else -1 for word in words[4:]]
    if not all(0 <= port <= 65535 for port in ports):
        raise WrongHeaderError("not a port")
    return Header(length, (_text(source), ports[0]), (_text(local), ports[1]))


def _parse_binary(data: bytes) -> Header | None:
    if len(data) < _V2_HEAD.size:
        return None
    _, command, family, following = _V2_HEAD.unpack_from(data)
    length = _V2_HEAD.size + following
    if command not in (_LOCAL, _PROXY):
        raise WrongHeaderError("unknown version or command")
    if length > MOST_BYTES:
        raise WrongHeaderError(f"more than {MOST_BYTES} bytes")
    if command == _PROXY:
        if family not in _BLOCKS:
            raise WrongHeaderError("unknown family or transport")
        if following < _BLOCKS[family]:
            raise WrongHeaderError("too short for its addresses")
    if len(data) < length:
        return None
    if command == _LOCAL or family >> 4 not in (1, 2):
        return Header(length)
    size, kind = (4, IPv4Address) if family >> 4 == 1 else (16, IPv6Address)
    source, local, source_port, local_port = struct.unpack_from(f"!{size}s{size}sHH", data, _V2_HEAD.size)
    return Header(length, (_text(kind(source)), source_port), (_text(kind(local)), local_port))


def _text(address: IPv4Address | IPv6Address) -> str:
    """An IPv4-mapped address is IPv4 (A8)."""
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return str(mapped or address)
