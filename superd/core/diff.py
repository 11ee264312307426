"""What becomes of each service when one Snapshot follows another: the plan of a reload.

An entry names the keys that have changed, and the least that carries them out, by the table of keys.py:

    add, remove  the file has come or gone
    in place     the running service takes the new value, and nobody notices
    rebind       sockets are opened or closed; those whose address and type stay are never closed
    restart      it takes a new process. Of a per-connection service the next connection gets it, and live ones go on;
                 another service is stopped and started while its clients wait at sockets that stay open
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from superd.core.keys import BY_TABLE, Change
from superd.core.spec import Context, DaemonSpec, ServiceSpec, Snapshot, SocketSpec

Action = Literal["add", "remove", "in place", "rebind", "restart"]

_WEIGHT: dict[Change, int] = {"in place": 0, "rebind": 1, "restart": 2}
# Field of a spec -> key, where they are not called the same. A unit at the end ("_s") is left out of keys anyway.
_NAMES = {"pass_": "pass", "delay": "restart_delay", "delay_max": "restart_delay_max", "limit": "restart_limit"}
_SCHEDULING = frozenset(BY_TABLE["scheduling"])


@dataclass(frozen=True, slots=True)
class Entry:
    """One service that changes. keys: which, as a file has them ("limits.rate"); old or new is None for add, remove."""

    name: str
    action: Action
    keys: tuple[str, ...] = ()
    old: ServiceSpec | None = None
    new: ServiceSpec | None = None

    @property
    def is_replaced(self) -> bool:
        """Whether one kind of service follows another: it is switched on or off, or begins to take connections itself.
        What it was ends as a removed service does, and sockets that stay are carried over."""
        if self.old is None or self.new is None:
            return False
        return self.old.enabled != self.new.enabled or _kind(self.old) != _kind(self.new)

    def __str__(self) -> str:
        return f"{self.name}: {self.action}" + (f" ({', '.join(self.keys)} changed)" if self.keys else "")


@dataclass(frozen=True, slots=True)
class Plan:
    """entries: what changes, in the order of the files; daemon: changed keys of superd.toml; target: what is wanted."""

    entries: tuple[Entry, ...]
    daemon: tuple[str, ...]
    target: Snapshot

    def __bool__(self) -> bool:
        return bool(self.entries or self.daemon)

    def without(self, names: frozenset[str]) -> Plan:
        """The same for all but some services, which stay as they were."""
        services = dict(self.target.services)
        for entry in self.entries:
            if entry.name in names:
                services.pop(entry.name, None)
                if entry.old is not None:
                    services[entry.name] = entry.old
        left = tuple(entry for entry in self.entries if entry.name not in names)
        return Plan(left, self.daemon, replace(self.target, services=services))


def diff(old: Snapshot, new: Snapshot) -> Plan:
    """What has to be done, so that apply(diff(old, new), old) == new."""
    entries = []
    for name, spec in new.services.items():
        was = old.services.get(name)
        if was is spec:
            continue
        if was is None:
            entries.append(Entry(name, "add", (), None, spec))
        elif was != spec:
            action, keys = compare(was, spec)
            entries.append(Entry(name, action, keys, was, spec))
    gone = [Entry(name, "remove", (), spec) for name, spec in old.services.items() if name not in new.services]
    return Plan((*gone, *entries), tuple(_daemon_keys(old.daemon, new.daemon)), new)


def apply(plan: Plan, old: Snapshot) -> Snapshot:
    """What is in force after every entry: the model that run time is compared with."""
    services = dict(old.services)
    for entry in plan.entries:
        if entry.new is None:
            del services[entry.name]
        else:
            services[entry.name] = entry.new
    return Snapshot(plan.target.daemon, {name: services[name] for name in plan.target.services}, plan.target.broken)


def compare(old: ServiceSpec, new: ServiceSpec) -> tuple[Action, tuple[str, ...]]:
    """The heaviest change among the keys that differ, and these keys."""
    changes = dict(_service_changes(old, new))
    heaviest = max(changes.values(), key=_WEIGHT.__getitem__, default="in place")
    if heaviest == "rebind" and new.gives_sockets:
        heaviest = "restart"  # the process has the sockets: only another one gets others
    return heaviest, tuple(changes)  # type: ignore[return-value]  # a Change is an Action


def _service_changes(old: ServiceSpec, new: ServiceSpec) -> Iterator[tuple[str, Change]]:
    for field in fields(ServiceSpec):
        was, now = getattr(old, field.name), getattr(new, field.name)
        if was == now or field.name in ("name", "user_assumed"):
            continue
        if field.name == "notify_asked":
            yield "notify_access", "restart"  # whether there is a NOTIFY_SOCKET at all
        elif field.name == "fdstore" and bool(was) != bool(now):
            yield "fdstore", "restart"  # whether there is a store: FDSTORE and NOTIFY_SOCKET
        elif field.name == "source":
            yield "file", "in place"
        elif field.name == "sockets":
            yield from _socket_changes(was, now, in_order=new.gives_sockets)
        elif field.name == "context":
            yield from _context_changes(was, now)
        elif field.name == "restart":
            yield from _fields("service", "", was, now)
        elif field.name in ("limits", "cgroup", "health", "proxy") and was is not None and now is not None:
            yield from _fields(field.name, f"{field.name}.", was, now)
        else:
            yield _keyed("service", "", field.name)


def _keyed(table: str, prefix: str, field: str) -> tuple[str, Change]:
    name = field.removesuffix("_s")
    name = _NAMES.get(name, "restart" if name == "policy" else name)
    return f"{prefix}{name}", BY_TABLE[table][name].change


def _fields(table: str, prefix: str, old: Any, new: Any) -> Iterator[tuple[str, Change]]:
    for field in fields(old):
        if getattr(old, field.name) != getattr(new, field.name):
            yield _keyed(table, prefix, field.name)


def _context_changes(old: Context, new: Context) -> Iterator[tuple[str, Change]]:
    for field in fields(Context):
        was, now = getattr(old, field.name), getattr(new, field.name)
        if was == now or field.name in ("owner", "grouped"):  # they come and go with others
            continue
        if field.name == "rlimits":
            for name in dict.fromkeys(name for name, *_ in {*was} ^ {*now}):
                yield f"rlimit.{name}", "restart"
        elif field.name in _SCHEDULING:
            yield f"scheduling.{field.name}", "restart"
        elif field.name in BY_TABLE["service"]:
            yield field.name, BY_TABLE["service"][field.name].change
        else:
            yield f"sandbox.{field.name}", "restart"


def _socket_changes(
    old: tuple[SocketSpec, ...], new: tuple[SocketSpec, ...], *, in_order: bool
) -> Iterator[tuple[str, Change]]:
    pairs = match_sockets(old, new)
    for index, was in enumerate(pairs):
        if was is not None and old[was] != new[index]:
            for key, change in _fields("socket", "socket.", old[was], new[index]):
                # The socket stays open: what is an option of it is set anew.
                yield key, "in place" if change == "rebind" else change
    if len(old) != len(new) or None in pairs:
        yield "listen", "rebind"
    elif in_order and pairs != sorted(pairs, key=lambda was: -1 if was is None else was):
        yield "listen", "restart"  # the order of fds is that of the file


def match_sockets(old: tuple[SocketSpec, ...], new: tuple[SocketSpec, ...]) -> list[int | None]:
    """For each new socket the old one that stays open for it: the same address and type. Each is used once."""
    free = list(range(len(old)))
    found: list[int | None] = []
    for spec in new:
        # Of several with port 0, one that is the same in all else comes first.
        same = [index for index in free if is_same_socket(old[index], spec)]
        best = next((index for index in same if old[index] == spec), same[0] if same else None)
        found.append(best)
        if best is not None:
            free.remove(best)
    return found


def is_same_socket(one: SocketSpec, other: SocketSpec) -> bool:
    return one.address == other.address and one.protocol == other.protocol


def _daemon_keys(old: DaemonSpec, new: DaemonSpec) -> Iterator[str]:
    for field in fields(DaemonSpec):
        if getattr(old, field.name) != getattr(new, field.name):
            yield field.name.removesuffix("_s")


def _kind(spec: ServiceSpec) -> tuple[bool, bool, bool, bool]:
    return spec.takes_connections, spec.builtin is not None, spec.builtin == "tcpmux", spec.proxy is not None
