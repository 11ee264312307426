"""xinetd.conf, and the files of xinetd.d -> services.

A file of xinetd.d alone is read as if xinetd.conf had no defaults. Sets (only_from, env, …) begin with those of
`defaults`; `+=` adds, `-=` takes away, `=` replaces.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from ipaddress import IPv4Network, ip_network

from superd.importers.draft import (
    A_NAME,
    Draft,
    FormatError,
    Job,
    Place,
    as_user,
    ip_listen,
    is_address,
    listen,
    literal,
    octal,
    service_name,
    words,
)
from superd.importers.inetd import internal

SETS = ("only_from", "no_access", "log_on_success", "log_on_failure", "passenv", "env", "flags")
_LOGGED = {"PID", "HOST", "EXIT", "DURATION", "ATTEMPT"}  # superd's log has these of every connection
_RLIMITS = {
    "rlimit_as": "as", "rlimit_cpu": "cpu", "rlimit_data": "data", "rlimit_files": "nofile", "rlimit_rss": "rss",
    "rlimit_stack": "stack",
}  # fmt: skip
_FINE = {
    "REUSE": "", "NODELAY": "", "KEEPALIVE": "", "IPV4": "", "IPV6": "", "NAMEINARGS": "", "NOLIBWRAP": "",
    "NORETRY": "",
}  # fmt: skip
_DEPTH = 16


@dataclass(slots=True)
class Entry:
    """A service block, or defaults. `places`: where each attribute stands."""

    name: str
    place: Place
    values: dict[str, list[str]] = field(default_factory=dict)
    places: dict[str, Place] = field(default_factory=dict)
    changes: list[tuple[str, str, list[str], Place]] = field(default_factory=list)

    def one(self, key: str, default: str = "") -> str:
        return self.values[key][0] if self.values.get(key) else default

    def place_of(self, key: str) -> Place:
        return self.places.get(key, self.place)

    def is_yes(self, key: str) -> bool:
        return self.one(key).lower() == "yes"


def looks_like(text: str) -> bool:
    return bool(re.search(r"^\s*(service\s+\S+|defaults)\s*(\n\s*)*\{", text, re.M | re.A)) or bool(
        re.search(r"^\s*includedir\s+/", text, re.M)
    )


def read(path: str, text: str, job: Job) -> list[Draft]:
    defaults, entries = Entry("defaults", Place(path, 1)), []
    seen = False
    for entry in _blocks(path, text, job, frozenset([path])):
        if entry.name != "defaults":
            entries.append(entry)
        elif seen:
            job.say(entry.place, "warning", "not carried over: a second `defaults`; xinetd ignores it, too")
        else:
            defaults, seen = entry, True
    _resolve(defaults, None)
    drafts = []
    for entry in entries:
        _resolve(entry, defaults)
        if (draft := _draft(entry, job)) is not None:
            drafts.append(draft)
    only, off = defaults.values.get("enabled"), defaults.values.get("disabled", [])
    for draft, ident in ((d, d.name) for d in drafts):
        if (only is not None and ident not in only) or ident in off:
            draft.set("enabled", False)
    return drafts


# -- blocks and lines


def _blocks(path: str, text: str, job: Job, above: frozenset[str]) -> Iterator[Entry]:
    entry: Entry | None = None
    inside = False
    for number, raw in enumerate(text.replace("\r\n", "\n").split("\n"), 1):
        line, place = raw.strip(), Place(path, number)
        if not line or line.startswith("#"):
            continue
        parts = line.split()
        if inside and entry is not None:
            if line == "}":
                yield entry
                entry, inside = None, False
            else:
                _attribute(entry, line, place, job)
        elif entry is not None:
            if line != "{":
                raise FormatError(
                    place, f"`{{` must stand alone in the line after `{entry.name}`, and here is {line[:40]!r}"
                )
            inside = True
        elif parts[0] == "service" and len(parts) in (2, 3) and parts[1] != "{":
            entry = Entry(parts[1], place)
            inside = parts[2:] == ["{"]  # older versions took it
        elif parts[0] == "defaults":
            entry, inside = Entry("defaults", place), parts[1:] == ["{"]
        elif parts[0] in ("include", "includedir") and len(parts) == 2:
            yield from _include(parts[0], parts[1], place, job, above)
        else:
            raise FormatError(place, f"{line[:60]!r} is neither service, defaults, include nor includedir")
    if entry is not None:
        raise FormatError(entry.place, f"{entry.name!r} has no end: a line with `}}` alone is missing")


def _include(word: str, name: str, place: Place, job: Job, above: frozenset[str]) -> Iterator[Entry]:
    where = posixpath.join(posixpath.dirname(place.path), name)
    found = [where]
    if word == "includedir":
        found = job.files.glob(posixpath.join(where, "*"))
        found = [path for path in found if "." not in posixpath.basename(path) and not path.endswith("~")]
        if not found:
            job.say(place, "note", f"there is no file in {where}")
    for path in found:
        text = job.read_included(place, path, above, _DEPTH)
        if text is not None:
            yield from _blocks(path, text, job, above | {path})


def _attribute(entry: Entry, line: str, place: Place, job: Job) -> None:
    parts = line.split()
    match = re.fullmatch(r"([A-Za-z0-9_]+)\s*([+-]?=)\s*(.*)", line, re.A)
    if match is None:
        job.say(place, "warning", f"not carried over: {line[:60]!r} is no attribute: write KEY = VALUE")
        return
    key, operator, parts = match[1].lower(), match[2], match[3].split()
    key = {"interface": "bind"}.get(key, key)
    if operator != "=" and key not in SETS:
        job.say(place, "warning", f"not carried over: {key} takes only `=`")
        return
    entry.changes.append((key, operator, parts, place))


def _resolve(entry: Entry, defaults: Entry | None) -> None:
    """Fill in `values` from `changes` and the defaults."""
    if defaults is not None:
        entry.values = {
            key: list(value) for key, value in defaults.values.items() if key not in ("enabled", "disabled")
        }
        entry.places = dict(defaults.places)
    for key, operator, parts, place in entry.changes:
        entry.places[key] = place
        old = entry.values.get(key, [])
        if operator == "+=" or (defaults is None and key in SETS):
            entry.values[key] = [*old, *(part for part in parts if part not in old)]
        elif operator == "-=":
            entry.values[key] = [part for part in old if part not in parts]
        else:
            entry.values[key] = parts


# -- an entry becomes a service

_KNOWN = {
    "id", "type", "flags", "disable", "socket_type", "protocol", "wait", "user", "group", "groups", "instances",
    "per_source", "cps", "max_load", "nice", "umask", "server", "server_args", "libwrap", "only_from", "no_access",
    "access_times", "log_type", "log_on_success", "log_on_failure", "rpc_version", "rpc_number", "env", "passenv",
    "port", "redirect", "bind", "banner", "banner_success", "banner_fail", "v6only", "deny_time", "mdns", *_RLIMITS,
}  # fmt: skip


def _draft(entry: Entry, job: Job) -> Draft | None:
    place = entry.place
    types = {word.upper() for word in entry.values.get("type", [])}
    flags = {word.upper() for word in entry.values.get("flags", [])}
    ident = entry.one("id", entry.name)

    def no(why: str, key: str = "") -> Draft | None:
        job.say(entry.place_of(key), "warning", f"not carried over: {ident}: {why}")
        return None

    if "RPC" in types or "rpc_version" in entry.values:
        return no("superd registers nothing with a portmapper (RPC)", "type")
    kind = entry.one("socket_type", "dgram" if entry.one("protocol") == "udp" else "stream")
    transport = entry.one("protocol", "udp" if kind == "dgram" else "tcp").removesuffix("6")
    if kind not in ("stream", "dgram") or transport != ("udp" if kind == "dgram" else "tcp"):
        return no(f"a socket of type {kind} with protocol {transport}", "socket_type")
    draft = Draft(service_name(ident), place)
    if entry.is_yes("disable"):
        draft.set("enabled", False, entry.place_of("disable"))
    long = entry.is_yes("wait") or kind == "dgram"
    if types & {"TCPMUX", "TCPMUXPLUS"}:
        if long:
            return no("a service behind tcpmux is stream and does not wait", "type")
        plus = "+" if "TCPMUXPLUS" in types else ""
        listen(draft, f"tcpmux:{plus}{entry.name}", entry.place_of("type"))
    else:
        _socket(draft, entry, job, transport, flags, long)
    if not draft.sockets or not _program(draft, entry, types, flags):
        job.notes += draft.notes
        return None
    if long:
        draft.set("run", "on-demand", entry.place_of("wait"))
        draft.set("pass", "stdio")
        if kind == "dgram" and not entry.is_yes("wait"):
            draft.say("warning", "wait = no with datagrams: the next process starts only when this one has ended",
                      entry.place_of("wait"))  # fmt: skip
    draft.set("stderr", "socket")
    _identity(draft, entry)
    _limits(draft, entry, long)
    _access(draft, entry)
    _rest(draft, entry, flags, types)
    return draft


def _socket(draft: Draft, entry: Entry, job: Job, transport: str, flags: set[str], long: bool) -> None:
    port = entry.one("port") or draft.port(entry.name, transport, job.machine)
    version = "4" if "IPV4" in flags and "IPV6" not in flags else ""
    if entry.is_yes("v6only"):
        version = "6"
    host = entry.one("bind")
    if host == "localhost" and long and not version:  # one socket, and localhost is two
        version = "4"
    place = entry.place_of("bind" if host else "port")
    if not is_address(host):
        draft.unprotected(f"{host!r} {A_NAME}", place)
        draft.set("enabled", False, place)
        host = "127.0.0.1"
    options = {"no_delay": "NODELAY" in flags, "keep_alive": "KEEPALIVE" in flags}
    listen(draft, ip_listen(transport, host, port, version), place, **{k: v for k, v in options.items() if v})


def _program(draft: Draft, entry: Entry, types: set[str], flags: set[str]) -> bool:
    if "INTERNAL" in types:
        name = re.sub(r"-(dgram|udp|stream|tcp)$", "", entry.name)
        return internal(draft, name, entry.place_of("type"))
    if entry.values.get("redirect"):
        target = " ".join(entry.values["redirect"])
        draft.lost(f"redirect to {target}: superd has no service without a program", entry.place_of("redirect"))
        return False
    server = entry.one("server")
    if not server.startswith("/"):
        draft.lost(
            "there is no `server`" if not server else f"{server!r} is not an absolute path", entry.place_of("server")
        )
        return False
    arguments = entry.values.get("server_args", [])
    if "NAMEINARGS" in flags and arguments:
        draft.set("argv0", arguments[0], entry.place_of("server_args"))
        arguments = arguments[1:]
        if posixpath.basename(server) == "tcpd":
            draft.say("note", "tcpd stays between superd and the program: hosts.allow and hosts.deny go on working",
                      entry.place_of("server"))  # fmt: skip
    draft.set("command", words([server, *arguments]), entry.place_of("server"))
    return True


def _identity(draft: Draft, entry: Entry) -> None:
    if user := entry.one("user"):
        as_user(draft, user, entry.place_of("user"))
        if user not in ("root", "0") and not entry.is_yes("groups"):
            draft.set("groups", [], entry.place_of("groups"))
    elif "builtin" not in draft.values:
        draft.lost("there is no `user`, which xinetd demands: it runs as superd's default", entry.place)
    as_user(draft, entry.one("group"), entry.place_of("group"), key="group")
    if mask := entry.one("umask"):
        if (mode := octal(mask)) is not None:
            draft.set("umask", mode, entry.place_of("umask"))
        else:
            draft.unprotected(f"umask = {mask}", entry.place_of("umask"))
    for item in entry.values.get("env", []):
        name, equals, value = item.partition("=")
        if equals and name.isidentifier() and not name.startswith(("LISTEN_", "NOTIFY_", "WATCHDOG_")):
            environment = {**draft.values.get("environment", {}), name: literal(value)}
            draft.set("environment", environment, entry.place_of("env"))
        else:
            draft.lost(f"env = {item}", entry.place_of("env"))
    if names := [name for name in entry.values.get("passenv", []) if name.isidentifier()]:
        draft.set("pass_environment", names, entry.place_of("passenv"))


def _number(draft: Draft, entry: Entry, key: str, text: str, low: float = 1, high: float = 10**6) -> int | None:
    """A number in bounds, None for UNLIMITED or after a report."""
    if text.upper() == "UNLIMITED" or not text:
        return None
    if not re.fullmatch(r"-?[0-9]{1,18}", text, re.A) or not low <= int(text) <= high:
        draft.lost(f"{key} = {text}", entry.place_of(key))
        return None
    return int(text)


def _limits(draft: Draft, entry: Entry, long: bool) -> None:
    if not long:  # of `wait` there is one at a time anyway
        if (count := _number(draft, entry, "instances", entry.one("instances"))) is not None:
            draft.set("limits.max_connections", count, entry.place_of("instances"))
            draft.set("limits.on_full", "refuse", entry.place_of("instances"))
        if (count := _number(draft, entry, "per_source", entry.one("per_source"))) is not None:
            draft.set("limits.max_per_source", count, entry.place_of("per_source"))
    if "cps" in entry.values and (count := _number(draft, entry, "cps", entry.one("cps"), high=10**9)) is not None:
        draft.set("limits.rate", f"{count}/1s", entry.place_of("cps"))
        draft.say("note", "cps: beyond the rate clients wait; superd does not close the port for a while",
                  entry.place_of("cps"))  # fmt: skip
    if load := entry.one("max_load"):
        if re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,6})?", load, re.A):
            draft.set("limits.max_load", float(load), entry.place_of("max_load"))
        else:
            draft.lost(f"max_load = {load}", entry.place_of("max_load"))
    if (nice := _number(draft, entry, "nice", entry.one("nice"), -20, 19)) is not None:
        draft.set("scheduling.nice", nice, entry.place_of("nice"))
    for theirs, ours in _RLIMITS.items():
        if text := entry.one(theirs):
            match = re.fullmatch(r"([0-9]{1,15})([kKmM]?)", text, re.A)
            if text.upper() == "UNLIMITED":
                draft.set(f"rlimit.{ours}", "off", entry.place_of(theirs))
            elif match is None:
                draft.lost(f"{theirs} = {text}", entry.place_of(theirs))
            else:
                unit = {"": 1, "K": 1 << 10, "M": 1 << 20}[match[2].upper()]
                draft.set(f"rlimit.{ours}", int(match[1]) * unit, entry.place_of(theirs))


def _access(draft: Draft, entry: Entry) -> None:
    lists: dict[str, list[str]] = {}
    for key, ours in (("only_from", "allow"), ("no_access", "deny")):
        for text in entry.values.get(key, []):
            if networks := access_networks(text):
                lists.setdefault(ours, []).extend(networks)
            else:
                draft.unprotected(f"{key} = {text}: superd takes networks, addresses and .domain", entry.place_of(key))
    if "only_from" in entry.values and not lists.get("allow"):
        lists.setdefault("deny", []).extend(["0.0.0.0/0", "::/0"])  # nobody, or nobody that superd could tell
    for ours, networks in lists.items():
        key = "only_from" if ours == "allow" else "no_access"
        place = entry.place_of(key if key in entry.values else "only_from")
        draft.set(f"access.{ours}", list(dict.fromkeys(networks)), place)
    if times := entry.values.get("access_times"):
        ranges = [re.fullmatch(r"([0-9]{1,2}):([0-9]{1,2})-([0-9]{1,2}):([0-9]{1,2})", text, re.A) for text in times]
        hours = [f"Mon-Sun {int(m[1]):02}:{int(m[2]):02}-{int(m[3]):02}:{int(m[4]):02}" for m in ranges if m]
        if len(hours) == len(times):
            draft.set("access.hours", hours, entry.place_of("access_times"))
        else:
            draft.unprotected(f"access_times = {' '.join(times)}", entry.place_of("access_times"))


def access_networks(text: str) -> list[str]:
    """What superd calls an address of only_from; [] for what it has no word for.

    xinetd.conf(5): zeros on the right are wildcards, 1.2.3.{4,5} is two addresses, fewer than four numbers are a
    network, `.domain` a domain, anything else a name.
    """
    if text == "localhost":
        return ["127.0.0.1", "::1"]
    if text.startswith(".") and re.fullmatch(r"\.[A-Za-z0-9.-]+", text, re.A):
        return [text]
    if match := re.fullmatch(r"([0-9.]*)\{([0-9,]+)\}([0-9.]*)", text, re.A):
        found = [access_networks(f"{match[1]}{number}{match[3]}") for number in match[2].split(",")]
        return [network for part in found for network in part] if all(found) else []
    try:
        if "/" in text:
            return [str(ip_network(text, strict=False))]
        if re.fullmatch(r"[0-9]{1,3}(\.[0-9]{1,3}){0,3}\.?", text, re.A):
            numbers = [*text.rstrip(".").split("."), "0", "0", "0"][:4]
            kept = 4
            while kept and int(numbers[kept - 1]) == 0:
                kept -= 1
            network = IPv4Network((".".join(str(int(number)) for number in numbers), 8 * kept))
            return [str(network.network_address) if kept == 4 else str(network)]
        network6 = ip_network(text)
    except ValueError:
        return []
    return [str(network6.network_address)]


def _rest(draft: Draft, entry: Entry, flags: set[str], types: set[str]) -> None:
    """What superd has no key for."""
    for flag in sorted(flags - _FINE.keys()):
        place = entry.place_of("flags")
        if flag in ("SENSOR", "INTERCEPT", "IDONLY", "LABELED"):
            draft.unprotected(f"flags = {flag}", place)
        else:
            draft.lost(f"flags = {flag}", place)
    if "SPECIAL" in types:
        draft.lost("type = SPECIAL", entry.place_of("type"))
    for key in ("log_on_success", "log_on_failure"):
        if more := sorted({word.upper() for word in entry.values.get(key, [])} - _LOGGED):
            draft.lost(f"{key} = {' '.join(more)}", entry.place_of(key))
    for key in ("libwrap", "deny_time"):
        if value := entry.one(key):
            draft.unprotected(f"{key} = {value}", entry.place_of(key))
    for key in ("banner", "banner_success", "banner_fail"):
        if value := entry.one(key):
            draft.lost(f"{key} = {value}", entry.place_of(key))
    if entry.values.get("log_type"):
        draft.say("note", f"log_type = {' '.join(entry.values['log_type'])}: superd has one log for everything",
                  entry.place_of("log_type"))  # fmt: skip
    for key in sorted(entry.values.keys() - _KNOWN):
        draft.lost(f"unknown attribute {key}", entry.place_of(key))
