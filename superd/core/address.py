"""The grammar of `listen`: text -> Address. str(Address) is the canonical form, and parses to the same value."""

from __future__ import annotations

import re
from collections.abc import Callable
from ipaddress import IPv4Address, IPv6Address
from posixpath import join, normpath
from typing import get_args

from superd.core.spec import Address, Scheme
from superd.core.values import quote

PortOf = Callable[[str, str], "int | None"]

MAX_PATH = 107  # bytes of sun_path without its NUL, unix(7)
_SCHEMES: tuple[Scheme, ...] = get_args(Scheme)
_PORT = "a port is 0-65535 or a name from /etc/services"
_SERVICE = re.compile(r"(?=.*[A-Za-z])[A-Za-z0-9][A-Za-z0-9+._-]*", re.A)
_SCOPE = re.compile(r"[A-Za-z0-9_.@-]{1,15}", re.A)
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_NUMBER = re.compile(r"[0-9]{1,10}", re.A)


def parse_address(text: str, *, directory: str, port_of: PortOf) -> Address:
    """The address that `text` names.

    directory  absolute; what a relative path counts from
    port_of    (name, "tcp" or "udp") -> port, as in /etc/services; None: no such name

    Raises ValueError whose message includes the right form.
    """
    try:
        return _parse(text, directory, port_of)
    except ValueError as error:
        raise ValueError(f"cannot parse address {quote(text)}: {error}") from None


def _parse(text: str, directory: str, port_of: PortOf) -> Address:
    scheme, colon, rest = text.partition(":")
    known = next((s for s in _SCHEMES if s == scheme), None)
    if _CONTROL.search(text):
        raise ValueError("it contains a control character")
    if known is None or not colon:
        raise ValueError(_suggest(text, scheme))
    rest = rest.removeprefix("//")
    if known in ("unix", "unix-dgram", "unix-seqpacket", "fifo"):
        return Address(known, path=_path(known, rest, directory))
    if known == "fd":
        if not rest or ":" in rest or rest.startswith("//") or len(rest.encode(errors="replace")) > 255:
            raise ValueError("write fd:NAME, the name of a socket that superd was given (no `:`, at most 255 bytes)")
        return Address(known, path=rest)
    if known == "vsock":
        return _vsock(rest)
    if known == "tcpmux":
        return Address(known, path=_tcpmux(rest))
    host, port = _host_and_port(rest, known)
    return Address(known, host=_host(host, known, port), port=_port(port, known, port_of))


def _suggest(text: str, scheme: str) -> str:
    """What may have been meant by an address without a scheme that we know."""
    forms = "write tcp:PORT, tcp:127.0.0.1:PORT, udp:PORT, unix:/PATH, …"
    if not text:
        return f"it is empty; {forms}"
    if scheme.lower() in _SCHEMES and scheme != scheme.lower():
        return f"write {scheme.lower()}:{text.partition(':')[2]}"
    if text.startswith(("/", "@", "./")):
        return f"write unix:{text}"
    if _NUMBER.fullmatch(text):
        return f"write tcp:{text} or udp:{text}"
    if re.fullmatch(r"([0-9.]+|\*|\[[0-9A-Fa-f:.%\w]+\]|localhost):\w+", text, re.A):
        return f"write tcp:{text}"
    return f"{quote(scheme)} is none of {', '.join(_SCHEMES)}; {forms}"


def _path(scheme: Scheme, path: str, directory: str) -> str:
    if not path:
        raise ValueError(f"the path is empty; write {scheme}:/run/NAME.sock")
    if path.startswith("@") and scheme != "fifo":
        if path == "@":
            raise ValueError(f"the name is empty; write {scheme}:@NAME")
        size, limit = len(path[1:].encode(errors="surrogatepass")), MAX_PATH
    else:
        if path.endswith("/"):
            raise ValueError(f"a path names a socket, not a directory; write {scheme}:{path.rstrip('/')}/NAME.sock")
        path = normpath(join(directory, path))
        path = "/" + path.lstrip("/")  # POSIX keeps two leading slashes apart from one, Linux does not
        if path == "/":
            raise ValueError(f"a path names a socket, not a directory; write {scheme}:/run/NAME.sock")
        size, limit = len(path.encode(errors="surrogatepass")), 4095 if scheme == "fifo" else MAX_PATH
    if size > limit:
        raise ValueError(f"the path has {size} bytes, and the kernel takes {limit} (unix(7)); write a shorter one")
    return path


def _tcpmux(rest: str) -> str:
    """Lower case: RFC 1078 makes no difference."""
    name = rest.removeprefix("+")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", name, re.A) or name.lower() == "help":
        raise ValueError("write tcpmux:NAME or tcpmux:+NAME: a-z 0-9 . _ -, at most 63 characters, and not help")
    return rest.lower()


def _vsock(rest: str) -> Address:
    cid, colon, port = rest.rpartition(":")
    if not _NUMBER.fullmatch(port) or int(port) > 0xFFFFFFFF or (colon and cid != "*" and not _NUMBER.fullmatch(cid)):
        raise ValueError("write vsock:CID:PORT with two numbers, or vsock:*:PORT for every CID (vsock(7))")
    any_cid = cid in ("", "*") or int(cid) == 0xFFFFFFFF
    if not any_cid and int(cid) > 0xFFFFFFFF:
        raise ValueError("a CID is a number of 32 bits; write vsock:CID:PORT")
    return Address("vsock", port=int(port), cid=None if any_cid else int(cid))


def _host_and_port(rest: str, scheme: Scheme) -> tuple[str | None, str]:
    """ "[::1]:7" -> ("::1", "7"); "7" -> (None, "7")."""
    if rest.startswith("["):
        host, bracket, port = rest[1:].partition("]")
        if not bracket or not port.startswith(":"):
            raise ValueError(f"write {scheme}:[ADDRESS]:PORT")
        return host, port[1:]
    host, colon, port = rest.rpartition(":")
    if not colon:
        return None, port
    if not host:
        raise ValueError(f"the address is empty; write {scheme}:{port or 'PORT'} for every address")
    if ":" in host:
        whole = f"write {scheme}:[{rest}]:PORT or " if _is_ipv6(rest) else ""
        raise ValueError(f"an IPv6 address stands in brackets; {whole}write {scheme}:[{host}]:{port}")
    return (None if host == "*" else host), port


def _is_ipv6(text: str) -> bool:
    try:
        IPv6Address(text)
    except ValueError:
        return False
    return True


def _host(host: str | None, scheme: Scheme, port: str) -> str | None:
    if host is None or host == "localhost":
        return host
    if ":" in host:
        return _ipv6(host, scheme, port)
    if not re.fullmatch(r"[0-9.]+", host, re.A):
        raise ValueError(f"{quote(host)} is a name, and names are not looked up; write {scheme}:192.0.2.1:{port}")
    try:
        address = str(IPv4Address(host))
    except ValueError:
        raise ValueError(f"{quote(host)} is not an IPv4 address; write {scheme}:192.0.2.1:{port}") from None
    if scheme.endswith("6"):
        raise ValueError(f"{host} is an IPv4 address; write {scheme[:3]}:{host}:{port}")
    return address


def _ipv6(host: str, scheme: Scheme, port: str) -> str:
    plain, percent, scope = host.partition("%")
    try:
        address = IPv6Address(plain)
    except ValueError:
        raise ValueError(f"{quote(host)} is not an IPv6 address; write {scheme}:[2001:db8::1]:{port}") from None
    if scheme.endswith("4"):
        raise ValueError(f"{host} is an IPv6 address; write {scheme[:3]}:[{host}]:{port}")
    if address.ipv4_mapped:
        raise ValueError(f"an IPv4-mapped address is an IPv4 address; write {scheme[:3]}:{address.ipv4_mapped}:{port}")
    local = address.is_link_local or plain.lower().startswith("ff02:")
    if local and not _SCOPE.fullmatch(scope):
        raise ValueError(f"a link-local address needs its interface; write {scheme}:[{address}%eth0]:{port}")
    if percent and not local:
        raise ValueError(f"only a link-local address has an interface; write {scheme}:[{address}]:{port}")
    return f"{address}%{scope}" if percent else str(address)


def _port(port: str, scheme: Scheme, port_of: PortOf) -> int:
    if re.fullmatch(r"[0-9]{1,5}", port, re.A) and int(port) <= 65535:
        return int(port)
    if _SERVICE.fullmatch(port) and (found := port_of(port, scheme[:3])) is not None:
        return found
    raise ValueError(_PORT if port else f"the port is missing; {_PORT}")
