"""What is in force for a service, as TOML, and where each value was written: `superctl show`.

Every value is shown as it counts: expanded, with absolute paths, in its canonical form. Read again, as the only file
of that name, the text gives the same service.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from superd.core import schema
from superd.core.document import Path, key_text
from superd.core.keys import BY_TABLE, Key
from superd.core.machine import Machine
from superd.core.problems import Problem
from superd.core.reader import OF_PROCESSES
from superd.core.schema import SourceFile
from superd.core.spec import Address, KeepAlive, Output, Ready, ServiceSpec, Sni, Tls
from superd.core.toml import format_key, format_value
from superd.core.values import format_cpu_time, format_duration, format_mode, format_rate, format_signal, format_size

BUILT_IN = "built-in default"
HIDDEN = "(hidden)"


@dataclass(frozen=True, slots=True)
class Entry:
    """One value. place: "FILE:LINE", or BUILT_IN."""

    path: Path
    value: Any
    place: str


def load_one(
    name: str,
    files: Sequence[SourceFile],
    *,
    machine: Machine,
    environ: Mapping[str, str],
    is_root: bool,
    problems: Sequence[Problem] = (),
) -> tuple[ServiceSpec | None, list[Entry], list[Problem]]:
    """The service of that name by itself, its entries, and what is wrong with it; None if it is broken or not there."""
    stem = name.partition("@")[0] + "@" if "@" in name else name
    own = [source for source in files if source.role == "daemon" or source.name == stem]
    said = [problem for problem in problems if problem.service == stem]
    for known, reader, spec, found in schema.read_each(own, machine=machine, environ=environ, is_root=is_root):
        if known in (name, stem):
            said += found
        if known == name and spec is not None and not any(problem.is_error for problem in said):
            return spec, list(_entries(reader, spec)), said
    return None, [], said


def load_places(
    files: Sequence[SourceFile], *, machine: Machine, environ: Mapping[str, str], is_root: bool
) -> list[tuple[str, Address, str]]:
    """(service, address, place) of each socket of every service that is right by itself."""
    return [
        (name, socket.address, place_of(reader, path))
        for name, reader, spec, _ in schema.read_each(files, machine=machine, environ=environ, is_root=is_root)
        if reader is not None and spec is not None
        for path, socket in zip(reader.socket_paths, spec.sockets, strict=True)
    ]


def format_entries(entries: Sequence[Entry], *, origin: bool, secrets: bool) -> str:
    """Lines of TOML. origin: with the place after each value; secrets: with the values of variables (K18)."""
    plain: list[tuple[str, str]] = []
    tables: dict[tuple[Path, str], list[tuple[str, str]]] = {}
    for entry in entries:
        value = entry.value
        if entry.path[0] == "environment" and not secrets:
            value = HIDDEN
        name = format_key(str(entry.path[-1]))
        header = "" if len(entry.path) == 1 else _header(entry.path)
        line = f"{name} = {format_value(value)}"
        rows = tables.setdefault((entry.path[:-1], header), []) if header else plain
        rows.append((line, entry.place))
    width = max((len(line) for rows in (plain, *tables.values()) for line, _ in rows if len(line) <= 60), default=0)

    def lines(rows: list[tuple[str, str]]) -> str:
        return "".join(f"{line.ljust(width)}  # {place}\n" if origin else f"{line}\n" for line, place in rows)

    return lines(plain) + "".join(f"\n{header}\n{lines(rows)}" for (_, header), rows in tables.items())


def tree_of(entries: Sequence[Entry], *, secrets: bool) -> dict[str, Any]:
    """The same as one tree of plain values."""
    tree: dict[str, Any] = {}
    for path, value in ((entry.path, entry.value) for entry in entries):
        if path[0] == "socket":
            tables = tree.setdefault("socket", [])
            if len(tables) == path[1]:
                tables.append({})
            tables[path[1]][path[2]] = value
        elif len(path) == 1:
            tree[str(path[0])] = value
        else:
            hidden = path[0] == "environment" and not secrets
            tree.setdefault(str(path[0]), {})[str(path[1])] = HIDDEN if hidden else value
    return tree


def origins_of(entries: Sequence[Entry]) -> dict[str, str]:
    """ "limits.rate" -> place."""
    return {key_text(entry.path): entry.place for entry in entries}


def _header(path: Path) -> str:
    return "[[socket]]" if path[0] == "socket" else f"[{path[0]}]"


def place_of(reader: Any, path: Path) -> str:
    """ "FILE:LINE" of a value that is there."""
    origin = reader.merged.origin(path)
    problem = origin.document.problem(origin.path, "", "")
    return f"{problem.path}:{problem.line}" if problem.line else str(problem.path)


def _entries(reader: Any, spec: ServiceSpec) -> Iterator[Entry]:
    """In the order of the table of keys; tables last, as TOML wants it."""
    got = {**reader.got, "run": spec.run, "pass": spec.pass_}
    if spec.command:
        got["command"] = spec.command
    got.pop("instances", None)  # of the template; this is one of them
    if spec.proxy is not None:
        got.pop("pass")
    if spec.run == "per-connection":
        got.pop("restart", None)
    for name, value in (("user", spec.context.user), ("argv0", spec.argv0)):
        if value is not None:
            got[name] = value
    got.setdefault("limits", {})
    got["sandbox"] = {**got.get("sandbox", {}), "no_new_privileges": spec.context.no_new_privileges}
    if not (spec.sockets and spec.pass_ == "listen-fds"):
        got.pop("fd_protocols", None)
    applies = _applies(spec)
    if spec.builtin is not None:  # it is no process
        got = {name: value for name, value in got.items() if name not in OF_PROCESSES}
    yield from _table(reader, "service", (), got, applies)
    for name, value in got.get("environment", ()):
        yield _entry(reader, ("environment", name), _runtime(value))
    for path, table in got.get("socket", ()):
        scheme = table["listen"].scheme
        schemes = {key.name for key in BY_TABLE["socket"].values() if not key.modes or scheme in key.modes}
        schemes &= {"listen", "name"} if scheme == "tcpmux" else schemes
        yield from _table(reader, "socket", path, table, lambda key, known=schemes: key.name in known)  # type: ignore[misc]  # bound now
    for name, key in BY_TABLE["service"].items():
        if key.kind == "table" and name in got:
            yield from _table(reader, name, (name,), got[name], applies)


def _applies(spec: ServiceSpec) -> Callable[[Key], bool]:
    """Whether a key means something for this service, so that its default is worth a line."""
    without = set()
    if spec.pass_ == "stdio":
        without |= {"stdout", "fd_protocols"}
    if not spec.sockets:
        without |= {"fd_protocols"}
    if spec.context.handler is None:
        without |= {"workers"}
    if spec.proxy is not None:
        without |= {"fd_protocols", "ready"}
    if not spec.notify_asked:  # to write it is to ask for the socket
        without |= {"notify_access"}
    if spec.builtin is not None:
        without |= {*OF_PROCESSES}

    def applies(key: Key) -> bool:
        own = not key.modes or spec.run in key.modes or (key.table == "limits" and spec.proxy is not None)
        return own and key.name not in without

    return applies


def _table(
    reader: Any, table: str, path: Path, got: Mapping[str, Any], applies: Callable[[Key], bool]
) -> Iterator[Entry]:
    for name, key in BY_TABLE[table].items():
        if key.kind in ("table", "tables", "environment"):
            continue
        if name in got:
            yield _entry(reader, (*path, name), _written(reader, (*path, name), key, got[name]))
        elif key.default not in (None, "", [], {}, False) and applies(key):
            yield Entry((*path, name), key.default, BUILT_IN)


def _entry(reader: Any, path: Path, value: Any) -> Entry:
    return Entry(path, value, place_of(reader, path) if _is_there(reader.merged.tree, path) else BUILT_IN)


def _is_there(tree: Any, path: Path) -> bool:
    for part in path:
        try:
            tree = tree[part]
        except (KeyError, IndexError, TypeError):
            return False
    return True


def _written(reader: Any, path: Path, key: Key, value: Any) -> Any:
    """What would be written in a file for a converted value."""
    if value is None and key.off:
        return "off"
    writer = _WRITERS.get(key.kind)
    if writer is not None:
        return writer(value)
    tree = reader.merged.tree
    for part in path:  # a kind whose values are used as they are written
        tree = tree[part]
    return tree


def _literal(text: str) -> str:
    """Of text that is expanded when it is read."""
    return text.replace("${", "$${")


def _runtime(text: str) -> str:
    """The same where `${port}` and its kin are still in it, and `${$}` is a dollar that came from a variable."""
    return text.replace("${$}{", "$${").replace("${$}", "$")


def _words(words: Sequence[str]) -> list[str]:
    return [_runtime(word) for word in words]


def _ready(ready: Ready) -> str:
    if ready.kind == "exec":
        return _runtime(str(ready))
    return f"connect:{_target(ready.address)}" if ready.address is not None else str(ready)


def _target(address: Address) -> str:
    if address.port == 0:
        return address.with_port("${port}")
    return _literal(str(address))


def _keep_alive(value: KeepAlive | None) -> Any:
    if value is None or value == KeepAlive():
        return value is not None
    times = {"idle": value.idle_s, "interval": value.interval_s}
    found: dict[str, Any] = {name: format_duration(time) for name, time in times.items() if time is not None}
    return found if value.count is None else {**found, "count": value.count}


def _names(sni: Sequence[Sni]) -> dict[str, dict[str, str]]:
    return {one.name: {"certificate": one.certificate, "key": one.key} for one in sni}


def _tls(value: Tls) -> dict[str, Any]:
    """All of it: it has no lines of its own for what is not written."""
    found: dict[str, Any] = {"certificate": value.certificate, "key": value.key}
    if value.sni:
        found["sni"] = _names(value.sni)
    if value.client_ca is not None:
        found |= {"client_ca": value.client_ca, "client_certificate": value.client_certificate}
    found["min_version"] = value.min_version
    if value.alpn:
        found["alpn"] = list(value.alpn)
    return {**found, "handshake_timeout": format_duration(value.handshake_timeout_s)}


def _limit(value: int) -> Any:
    return "off" if value == -1 else value


def _size(value: int) -> Any:
    text = format_size(value)
    return int(text) if text.isdigit() else text


def _output(output: Output) -> str:
    return f"file:{output.path}" if output.kind == "file" else output.kind


def _same(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


_WRITERS: dict[str, Callable[[Any], Any]] = {
    "line": _same, "string": _same, "word": _same, "device": _same, "bool": _same, "int": _same, "number": _same,
    "limit": _same, "choice": _same, "choices": _same, "user": _same, "group": _same, "groups": _same, "path": _same,
    "paths": _same, "variables": _same, "instances": _same, "fd_name": _same, "multicast": _same, "ioprio": _same,
    "cpus": _same, "statuses": _same, "capabilities": _same, "handler": _same,
    "builtin": _same, "proxy_protocol": _same,
    "networks": lambda rules: [rule.text for rule in rules],
    "hours": lambda spans: [span.text for span in spans],
    "services": lambda names: [_literal(name) for name in names],
    "directory": _literal,
    "bytes": lambda value: value.decode(),
    "duration": format_duration,
    "size": _size,
    "memory": _size,
    "pids": _same,
    "cpu_time": format_cpu_time,
    "mode": format_mode,
    "rate": format_rate,
    "signal": format_signal,
    "output": _output,
    "ready": _ready,
    "target": _target,
    "header": lambda version: version or False,
    "address": lambda address: _literal(str(address)),
    "addresses": lambda found: _literal(str(found[0])) if len(found) == 1 else [_literal(str(one)) for one in found],
    "command": _words,
    "commands": lambda commands: [_words(words) for words in commands],
    "keep_alive": _keep_alive,
    "tls": _tls,
    "protocols": _same,
    "names": _names,
    "rlimit": lambda pair: _limit(pair[0]) if pair[0] == pair[1] else [_limit(pair[0]), _limit(pair[1])],
}  # fmt: skip
