"""inetd.conf -> services: the dialects of OpenBSD (Debian's openbsd-inetd), FreeBSD, NetBSD and GNU inetutils.

They differ in what the number behind `wait` means (starts a minute, or children at once), in what plain `tcp` means
(both IP versions, or IPv4), and in quoting. What makes a dialect certain is looked for in the whole file; a file
without any such thing means the same in all but plain `tcp`, and is read as Debian's.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

from superd.core.address import parse_address
from superd.core.keys import BY_TABLE
from superd.importers.draft import (
    A_NAME,
    Draft,
    Job,
    Place,
    as_user,
    identity,
    ip_listen,
    is_address,
    listen,
    literal,
    octal,
    service_name,
    words,
)

Dialect = Literal["openbsd", "freebsd", "netbsd", "gnu"]
TCPD = ("/usr/sbin/tcpd", "/usr/libexec/tcpd", "/usr/local/sbin/tcpd")
_ALIASES = {"sink": "discard", "null": "discard", "ttytst": "chargen", "source": "chargen", "timserver": "time"}
_INCLUDES = 16  # files, one in another

_DEFAULT = re.compile(r"(\S+):\s*")
_KEY_VALUE = re.compile(r"\s*(\S+)\s+(on|off)\b\s*(.*)", re.S)
_PROTO = re.compile(r"(rpc/|faith/)?(tcp|udp|unix|[a-z0-9]+?)(6only|46|4|6)?(/ttcp|/faith)?", re.A)
_BUFFER = re.compile(r"(sndbuf|rcvbuf|recvbuf)=([0-9]{1,9})([kKmM]?)", re.A)


@dataclass(slots=True)
class Entry:
    """One service, whichever way it was written. `hosts`: where it listens, [""] for everywhere."""

    place: Place
    service: str = ""
    hosts: list[str] = field(default_factory=list)
    kind: str = "stream"
    proto: str = "tcp"
    wait: bool = False
    user: str = ""
    group: str = ""
    login_class: str = ""
    program: str = ""
    argv: list[str] = field(default_factory=list)
    rate: str = ""  # starts a minute
    children: str = ""
    source_rate: str = ""  # starts a minute of one address
    source_children: str = ""
    buffers: dict[str, str] = field(default_factory=dict)
    accept_filter: str = ""
    enabled: bool = True
    unix: tuple[str, str, str] = ("", "", "")  # user, group, mode of FreeBSD


def read(path: str, text: str, job: Job, dialect: Dialect | None = None) -> list[Draft]:
    """The services of one file. A line that is wrong is said and passed over, as every inetd does it."""
    chosen = dialect or guess_dialect(text)
    drafts = []
    for entry in _entries(path, text, job, chosen, frozenset()):
        if (draft := _draft(entry, job, chosen)) is not None:
            drafts.append(draft)
    _part_dual(drafts)
    return drafts


def looks_like(text: str) -> bool:
    """Whether some line could be no other format's: seven words, or NetBSD's `service on`."""
    for line in text.split("\n"):
        parts = line.split()
        if line[:1] not in ("#", "") and len(parts) >= 6:
            kind = parts[1].partition(",")[0]
            if kind in ("stream", "dgram", "raw", "rdm", "seqpacket") and re.match(r"(no)?wait\b", parts[3]):
                return True
        if re.match(r"\S+\s+(on|off)\b.*(=|;)", line) or (len(parts) == 2 and parts[1] == "on"):
            return True
    return False


def guess_dialect(text: str) -> Dialect:
    for line in text.split("\n"):
        if line.startswith(("#@", ".include")):
            return "netbsd"
        if line[:1] in ("#", ""):
            continue
        parts = line.split()
        if _KEY_VALUE.match(line) and len(parts) > 1 and parts[1] in ("on", "off"):
            return "netbsd"
        if len(parts) < 6:
            continue
        if re.match(r"(no)?wait/", parts[3]) or "/" in parts[4]:
            return "freebsd"
        if re.match(r"(no)?wait:", parts[3]) or ("," in parts[1]):
            return "netbsd"
        if parts[2].endswith("6only"):
            return "gnu"
    return "openbsd"


# -- lines


def _entries(path: str, text: str, job: Job, dialect: Dialect, above: frozenset[str]) -> Iterator[Entry]:
    hosts: list[str] = []
    for place, line in _logical(path, text, dialect):
        if line.startswith("#@"):
            if line[2:].strip():
                job.say(place, "security", f"not carried over: the IPsec policy {line[2:].strip()!r}")
        elif line.startswith(".include"):
            yield from _include(place, line, job, dialect, above | {path})
        elif match := _DEFAULT.fullmatch(line):
            hosts = [] if match[1] == "*" else match[1].split(",")
        else:
            try:
                found = _key_value(place, line) if dialect == "netbsd" and _KEY_VALUE.match(line) else None
                entry = found or _positional(place, line, dialect)
            except ValueError as error:
                job.say(place, "warning", f"not carried over: {error}")
                continue
            yield replace(entry, hosts=entry.hosts or hosts or [""])


def _logical(path: str, text: str, dialect: Dialect) -> Iterator[tuple[Place, str]]:
    """Entries in one line each: one that begins with a blank goes on, NetBSD's `on` definitions end with `;`."""
    pending: list[str] = []
    start = 0
    definition = False

    def flush() -> Iterator[tuple[Place, str]]:
        whole = "\n".join(pending) if definition else " ".join(pending)
        pending.clear()
        if whole.strip():
            yield Place(path, start), whole.strip()

    for number, raw in enumerate(text.replace("\r\n", "\n").split("\n"), 1):
        line = raw
        if definition:
            parts = _split_definitions("\n".join([*pending, line]))
        else:
            if line.startswith("#@") and dialect == "netbsd":
                yield from flush()
                yield Place(path, number), line.strip()
                continue
            if line.startswith("#") or not line.strip():
                yield from flush()
                continue
            if line[0] in " \t" and pending:
                pending.append(line.strip())
                continue
            yield from flush()
            start = number
            words_ = line.split()
            if dialect != "netbsd" or len(words_) < 2 or not re.match(r"(on|off)(;|$)", words_[1]):
                pending.append(line.strip())
                continue
            parts = _split_definitions(line)
        pending.clear()
        for done in parts[:-1]:
            if done.strip():
                yield Place(path, start), done.strip()
            start = number
        definition = bool(parts[-1].strip())
        if definition:
            pending.append(parts[-1])
    yield from flush()


def _split_definitions(text: str) -> list[str]:
    """At each `;` that stands neither in quotes nor in a comment; comments are left out."""
    parts, current, quote, at = [], "", "", 0
    while at < len(text):
        char = text[at]
        if quote:
            if char == "\\":
                current += char
                at += 1
                char = text[at : at + 1]
            elif char == quote:
                quote = ""
        elif char in "\"'":
            quote = char
        elif char == "#":
            end = text.find("\n", at)
            at = len(text) if end < 0 else end
            continue
        elif char == ";":
            parts.append(current)
            current, at = "", at + 1
            continue
        current += char
        at += 1
    return [*parts, current]


def _include(place: Place, line: str, job: Job, dialect: Dialect, above: frozenset[str]) -> Iterator[Entry]:
    pattern = line.removeprefix(".include").strip().strip("\"'")
    here = posixpath.join(posixpath.dirname(place.path), pattern)
    found = job.files.glob(here) if pattern else []
    if not found:
        job.say(place, "warning", f"not carried over: there is no file {here}")
    for path in found:
        text = job.read_included(place, path, above, _INCLUDES)
        if text is not None:
            yield from _entries(path, text, job, dialect, above)


def _split(line: str, dialect: Dialect) -> list[str]:
    if dialect not in ("freebsd", "netbsd"):
        return line.split()
    found = []
    for match in re.finditer(r"(\"[^\"]*\"|'[^']*')|\S+", line):
        found.append(match[0][1:-1] if match[1] else match[0])
    return found


# -- one entry


def _positional(place: Place, line: str, dialect: Dialect) -> Entry:
    parts = _split(line, dialect)
    if len(parts) < 6:
        raise ValueError(f"a line has service, type, protocol, wait, user, program, arguments; this has {len(parts)}")
    entry = Entry(place)
    _service(entry, parts[0], dialect)
    entry.kind, _, more = parts[1].partition(",")
    if more:
        entry.children, _, entry.accept_filter = more.partition(":")
    _proto(entry, parts[2])
    at = 3
    if parts[at] == "faith":
        at += 1
    if len(parts) < at + 3:
        raise ValueError("the line ends before the program")
    _wait(entry, parts[at], dialect)
    _user(entry, parts[at + 1], dialect)
    entry.program, entry.argv = parts[at + 2], parts[at + 3 :]
    return entry


def _service(entry: Entry, text: str, dialect: Dialect) -> None:
    if dialect == "freebsd" and text.startswith(":"):
        parts = text[1:].split(":", 3)
        if len(parts) == 4 and parts[3].startswith("/"):
            entry.unix, entry.service = (parts[0], parts[1], parts[2]), parts[3]
            return
    if text.startswith("/"):
        entry.service = text
    elif match := re.fullmatch(r"\[([^]]*)\]:(.+)", text):
        entry.hosts, entry.service = [match[1]], match[2]
    elif ":" in text:
        hosts, _, entry.service = text.rpartition(":")
        entry.hosts = ["" if host == "*" else host for host in hosts.split(",")]
    else:
        entry.service = text
    if not entry.service:
        raise ValueError(f"{text!r} names no service")


def _proto(entry: Entry, text: str) -> None:
    entry.proto, *options = text.split(",")
    for option in options:
        match = _BUFFER.fullmatch(option)
        if match is None:
            raise ValueError(f"{option!r} is no option of a protocol: sndbuf=N or rcvbuf=N")
        entry.buffers["send_buffer" if match[1] == "sndbuf" else "receive_buffer"] = match[2] + match[3].upper()


def _wait(entry: Entry, text: str, dialect: Dialect) -> None:
    match = re.fullmatch(r"(wait|nowait)(?:([.:/])(.*))?", text)
    if match is None:
        raise ValueError(f"{text!r} is neither wait nor nowait")
    entry.wait = match[1] == "wait"
    if match[2] == "/":
        counts = [*(match[3] or "").split("/"), "", "", ""][:3]
    else:
        counts = [match[3] or ""]
    if any(count and not re.fullmatch(r"[0-9]{1,9}", count, re.A) for count in counts):
        raise ValueError(f"{text!r}: the limits are numbers")
    counts = [count if count.strip("0") else "" for count in counts]
    if match[2] == "/":
        entry.children, entry.source_rate, entry.source_children = (*counts,)
    else:
        entry.rate = counts[0]


def _user(entry: Entry, text: str, dialect: Dialect) -> None:
    text, _, entry.login_class = text.partition("/") if dialect == "freebsd" else (text, "", "")
    entry.user, colon, entry.group = text.partition(":")
    if not colon and "." in text:
        entry.group = "?"  # user.group, or a name with a dot: only the machine can tell


# -- NetBSD's definitions


def _key_value(place: Place, text: str) -> Entry | None:
    match = _KEY_VALUE.match(text)
    if match is None:
        return None
    entry = Entry(place, enabled=match[2] == "on")
    _service(entry, match[1], "netbsd")
    keys = _options(match[3])
    if "bind" in keys:
        entry.hosts = keys["bind"][:1]
    entry.kind = _one(keys, "socktype", "")
    _proto(entry, _one(keys, "protocol", "tcp"))
    if not entry.kind:
        entry.kind = "dgram" if entry.proto.startswith("udp") else "stream"
    entry.accept_filter = _one(keys, "acceptfilter", "")
    entry.children = _number(keys, "accept_max")
    entry.rate, entry.source_rate = _number(keys, "service_max"), _number(keys, "ip_max")
    for theirs, ours in (("sndbuf", "send_buffer"), ("recvbuf", "receive_buffer")):
        if size := _one(keys, theirs, "").upper():
            if not re.fullmatch(r"[0-9]{1,9}[KM]?", size, re.A):
                raise ValueError(f"{theirs} = {size!r} is no size")
            entry.buffers[ours] = size
    entry.wait = _one(keys, "wait", "no") == "yes"
    entry.user, entry.group = _one(keys, "user", ""), _one(keys, "group", "")
    entry.program = _one(keys, "exec", "internal")
    entry.argv = keys.get("args", [])
    known = {
        "bind", "socktype", "protocol", "acceptfilter", "accept_max", "service_max", "ip_max", "sndbuf", "recvbuf",
        "wait", "user", "group", "exec", "args",
    }  # fmt: skip
    if unknown := sorted(keys.keys() - known):
        entry.accept_filter = "; ".join(filter(None, [entry.accept_filter, *unknown]))
    return entry


def _options(text: str) -> dict[str, list[str]]:
    """`key = value value, key = value`; values may be quoted, with escapes."""
    found: dict[str, list[str]] = {}
    token = re.compile(
        r"\s*(?:(?P<string>\"(?:[^\"\\]|\\.)*\"|'(?:[^'\\]|\\.)*')|(?P<mark>[=,])|(?P<bare>[^\s=,\"']+)|(?P<bad>.))",
        re.S,
    )
    tokens = [(m.lastgroup, m[m.lastgroup]) for m in token.finditer(text) if m.lastgroup]
    at = 0
    while at < len(tokens):
        if tokens[at][0] != "bare" or at + 1 >= len(tokens) or tokens[at + 1] != ("mark", "="):
            raise ValueError(f"cannot understand {tokens[at][1]!r}: a definition is key = value, key = value;")
        key = tokens[at][1]
        at += 2
        values = []
        # A bare value may have `=` in it: the marks inside one that no blank sets apart were split off.
        while at < len(tokens) and tokens[at] != ("mark", ","):
            kind, value = tokens[at]
            if kind == "bad":
                raise ValueError(f"cannot understand {value!r} in the value of {key}")
            values.append(_unescape(value[1:-1]) if kind == "string" else value)
            at += 1
        at += 1
        found[key] = values
    return found


def _unescape(text: str) -> str:
    simple = {"n": "\n", "t": "\t", "r": "\r"}
    return re.sub(
        r"\\(x[0-9A-Fa-f]{2}|.)",
        lambda m: chr(int(m[1][1:], 16)) if len(m[1]) == 3 else simple.get(m[1], m[1]), text, flags=re.S,
    )  # fmt: skip


def _one(keys: dict[str, list[str]], key: str, default: str) -> str:
    return keys[key][0] if keys.get(key) else default


def _number(keys: dict[str, list[str]], key: str) -> str:
    text = _one(keys, key, "")
    if text and not re.fullmatch(r"[0-9]{1,9}", text, re.A):
        raise ValueError(f"{key} = {text!r} is no number")
    return text if text.strip("0") else ""


# -- an entry becomes a service


def _draft(entry: Entry, job: Job, dialect: Dialect) -> Draft | None:
    place = entry.place

    def no(why: str) -> Draft | None:
        job.say(place, "warning", f"not carried over: {entry.service}: {why}")
        return None

    match = _PROTO.fullmatch(entry.proto)
    if match is None:
        return no(f"unknown protocol {entry.proto!r}")
    if match[1] == "rpc/" or (not entry.service.startswith(("/", "tcpmux/")) and "/" in entry.service):
        return no("superd registers nothing with a portmapper (RPC)")
    if match[1] or match[4]:
        return no(f"{entry.proto}: neither FAITH nor T/TCP is there any more")
    transport, version = match[2], match[3] or ""
    draft = Draft(_name(entry), place)
    if transport == "unix":
        _unix_socket(draft, entry)
    elif entry.service.startswith("tcpmux/"):
        if entry.wait or entry.kind != "stream":
            return no("a service behind tcpmux is stream and nowait")
        listen(draft, f"tcpmux:{entry.service.removeprefix('tcpmux/')}", place)
    elif transport in ("tcp", "udp"):
        _ip_sockets(draft, entry, job, dialect, transport, version)
    else:
        return no(f"protocol {entry.proto!r}: superd has tcp, udp and unix sockets")
    if not draft.sockets:
        job.notes += draft.notes
        return None
    if not entry.enabled:
        draft.set("enabled", False)
    datagrams = entry.kind == "dgram"
    if entry.kind not in ("stream", "dgram", "seqpacket"):
        return no(f"sockets of type {entry.kind} do not exist in superd")
    if datagrams != (draft.schemes[0] in ("udp", "udp4", "udp6", "unix-dgram")):
        return no(f"type {entry.kind} does not go with {entry.proto}")
    if not _program(draft, entry, job):
        job.notes += draft.notes
        return None
    _identity(draft, entry, job)
    _limits(draft, entry, datagrams)
    return draft


def _name(entry: Entry) -> str:
    """The service's; that of the program where there is only a number or a path."""
    name = re.sub(r"\.sock(et)?$", "", posixpath.basename(entry.service))
    if name.isdigit() and entry.program != "internal":
        behind_tcpd = entry.program in TCPD and entry.argv
        name = posixpath.basename(entry.argv[0] if behind_tcpd else entry.program)
    return service_name(name.removeprefix("in."))


def _unix_socket(draft: Draft, entry: Entry) -> None:
    scheme = {"dgram": "unix-dgram", "seqpacket": "unix-seqpacket"}.get(entry.kind, "unix")
    options: dict[str, object] = dict(entry.buffers)
    user, group, mode = entry.unix
    for key, value in (("user", user), ("group", group)):
        if value:
            options[key] = identity(value)
    if any(entry.unix):
        if (found := octal(mode or "200")) is None:
            draft.lost(f"mode {mode!r} of the socket")
        else:
            options["mode"] = found
    listen(draft, f"{scheme}:{literal(entry.service)}", entry.place, **options)


def _ip_sockets(draft: Draft, entry: Entry, job: Job, dialect: Dialect, transport: str, version: str) -> None:
    if dialect == "gnu":
        version = {"6only": "6", "6": ""}.get(version, version or "4")
    elif dialect == "openbsd":
        version = {"46": ""}.get(version, version)
    else:
        version = {"46": "", "": "4"}.get(version, version)
    port = draft.port(entry.service, transport, job.machine)
    hosts = entry.hosts
    if entry.wait or entry.kind == "dgram":  # one socket, and localhost is two
        hosts = ["127.0.0.1" if host == "localhost" and not version else host for host in hosts]
    for host in hosts:
        if not is_address(host):
            draft.unprotected(f"{host!r} {A_NAME}")
            draft.set("enabled", False)
            host = "127.0.0.1"
        listen(draft, ip_listen(transport, host, port, version), entry.place, **entry.buffers)


def _program(draft: Draft, entry: Entry, job: Job) -> bool:
    """`command`, or `builtin`; false if there is nothing to run."""
    if entry.program == "internal":
        base = posixpath.basename(entry.service)
        name = _ALIASES.get(base, base)
        number = {"7": "echo", "9": "discard", "13": "daytime", "19": "chargen", "37": "time", "1": "tcpmux"}
        return internal(draft, number.get(name, name), entry.place)
    if not entry.program.startswith("/"):
        draft.lost(f"{entry.program!r} is not an absolute path")
        return False
    argv = entry.argv or [entry.program]
    program = entry.program
    if program in TCPD and argv[0].startswith("/"):
        if job.machine.file(program) is None:
            draft.unprotected(f"tcpd is not installed here: hosts.allow and hosts.deny do not protect {argv[0]}")
            program = argv[0]
        else:
            draft.say("note", "tcpd stays between superd and the program: hosts.allow and hosts.deny go on working")
    draft.set("command", words([program, *argv[1:]]))
    if argv[0] != program:
        draft.set("argv0", argv[0])
    return True


def internal(draft: Draft, name: str, place: Place) -> bool:
    """`builtin`, if superd has it: without one there is nothing that could run."""
    key = BY_TABLE["service"]["builtin"]
    if name == "chargen" and draft.schemes[0].startswith("udp"):
        draft.lost(
            "chargen (internal) over UDP: it would answer with more than it was sent, to any forged address", place
        )
        return False
    if name not in key.choices:
        has = "superd has no such built-in service"
        draft.lost(f"{name} (internal): {has}", place)
        return False
    draft.set("builtin", name, place)
    return True


def _identity(draft: Draft, entry: Entry, job: Job) -> None:
    user, group = entry.user, entry.group
    if group == "?":
        group = ""
        if job.machine.user(user) is None:
            user, _, group = user.rpartition(".")
    as_user(draft, user, entry.place)
    as_user(draft, group, entry.place, key="group")
    if entry.login_class:
        draft.lost(f"the login class {entry.login_class!r}; [rlimit] has its limits")


def _limits(draft: Draft, entry: Entry, datagrams: bool) -> None:
    """How it is started, and how often."""
    long = entry.wait or datagrams
    if long:
        draft.set("run", "on-demand")
        draft.set("pass", "stdio")
        if len(draft.sockets) > 1:
            draft.lost(f"`wait` has one socket on stdin: of {len(draft.sockets)} addresses the first")
            del draft.sockets[1:]
    if datagrams and not entry.wait:
        draft.say(
            "warning", "nowait with datagrams: the next process starts only when this one has ended, as with wait"
        )
    draft.set("stderr", "socket")
    if entry.rate:
        draft.set("limits.rate", f"{entry.rate}/1m")
    if entry.children and not long:
        draft.set("limits.max_connections", min(int(entry.children), 10**6))
    if entry.source_rate:
        draft.set("limits.rate_per_source", f"{entry.source_rate}/1m")
    if entry.source_children:
        draft.set("limits.max_per_source", min(int(entry.source_children), 10**6))
    if entry.accept_filter:
        draft.lost(f"{entry.accept_filter}")


def _part_dual(drafts: list[Draft]) -> None:
    """Where one line is for both IP versions and another for IPv6 alone, the first is for IPv4 alone."""
    only6 = {str(s["listen"]).replace("6:", ":", 1) for d in drafts for s in d.sockets if str(s["listen"])[3:5] == "6:"}
    for draft in drafts:
        for socket in draft.sockets:
            text = str(socket["listen"])
            if text in only6 and parse_address(text, directory="/", port_of=lambda *_: 1).host is None:
                socket["listen"] = text[:3] + "4" + text[3:]
