"""Which service needs which: the graph over all services, the order it gives, and what is wrong with it.

    requires   the other first, and waited for; also the other way round: stopped before it
    after      the same order, where both happen to be started, or stopped
    wants      started along; says nothing about order
    part_of    a stop or restart of the other is one of this service too
    conflicts  only one of the two at a time, whichever of them says so

Nothing here recurses: a chain may be as long as there are services.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from heapq import heapify, heappop, heappush

from superd.core.problems import Severity
from superd.core.spec import ServiceSpec
from superd.core.values import quote

KEYS = ("requires", "wants", "after", "part_of", "conflicts")
_NEEDED = ("requires", "part_of")  # the others may name a service that is installed later, or never, as in systemd
_CYCLES_SHOWN = 20  # of services that all depend on each other; the rest of them are told the first
_CYCLE_IN_FULL = 30  # names; a longer one is printed in full once, and the others refer to that


@dataclass(frozen=True, slots=True)
class Fault:
    """What is wrong with `name` as the value of `key` of `service`."""

    service: str
    key: str
    name: str
    code: str
    message: str
    label: str = ""
    severity: Severity = "error"


class Graph:
    """What the services of a snapshot say about each other. Names that are none of its services have no edges.

    rank        name -> place in an order in which every service comes after what it requires and is after; where
                that leaves a choice, as in the snapshot
    followers   name -> those that require it or are after it
    dependents  name -> those that are stopped and restarted along with it
    rivals      name -> those that must not run beside it
    """

    def __init__(self, services: Mapping[str, ServiceSpec]) -> None:
        self.services = services
        self.followers: dict[str, list[str]] = {}
        self.dependents: dict[str, list[str]] = {}
        self.rivals: dict[str, list[str]] = {}
        for name, spec in services.items():
            if not names_others(spec):
                continue  # nearly all of many thousands
            for other in _before(spec):
                self.followers.setdefault(other, []).append(name)
            for other in dict.fromkeys(spec.requires + spec.part_of):
                self.dependents.setdefault(other, []).append(name)
            for other in spec.conflicts:
                for one, two in ((name, other), (other, name)):
                    if two not in self.rivals.setdefault(one, []):
                        self.rivals[one].append(two)

    @cached_property
    def rank(self) -> dict[str, int]:
        place = {name: number for number, name in enumerate(self.services)}
        names = list(self.services)
        missing = {name: sum(other in place for other in _before(spec)) for name, spec in self.services.items()}
        ready = [place[name] for name in names if not missing[name]]
        heapify(ready)
        rank: dict[str, int] = {}
        while ready:
            name = names[heappop(ready)]
            rank[name] = len(rank)
            for follower in self.followers.get(name, ()):
                missing[follower] -= 1
                if not missing[follower]:
                    heappush(ready, place[follower])
        for name in names:  # in a cycle, which check() reports: any order will do
            rank.setdefault(name, len(rank))
        return rank

    def linked(self) -> set[str]:
        """Services whose changes can matter to another, or to which those of another matter."""
        followers = {name for names in self.followers.values() for name in names}
        return followers.union(self.followers, self.rivals) & self.services.keys()

    def in_order(self, names: Iterable[str], *, reverse: bool = False) -> list[str]:
        names = list(names)
        if len(names) < 2:
            return names
        last = len(self.rank)
        return sorted(names, key=lambda name: self.rank.get(name, last), reverse=reverse)

    def pulled_in(self, name: str, *, wants: bool = True) -> set[str]:
        """What is started along with a service, itself included. wants: not only what it requires."""
        known = self.services
        if wants:
            return _closure(name, lambda one: [*known[one].requires, *known[one].wants], known.keys())
        return _closure(name, lambda one: known[one].requires, known.keys())

    def torn_down(self, name: str) -> set[str]:
        """What is stopped along with a service, itself included."""
        return _closure(name, lambda one: self.dependents.get(one, ()), self.services.keys())


def _closure(name: str, next_of: Callable[[str], Iterable[str]], known: Collection[str]) -> set[str]:
    found, todo = {name}, [name]
    while todo:
        for other in next_of(todo.pop()):
            if other in known and other not in found:
                found.add(other)
                todo.append(other)
    return found


def names_others(spec: ServiceSpec) -> bool:
    """Whether it has one of KEYS."""
    return bool(spec.requires or spec.wants or spec.after or spec.part_of or spec.conflicts)


def _before(spec: ServiceSpec) -> tuple[str, ...]:
    """What comes before a service, each once. `wants` is not among it: systemd's users write `wants` of something that
    is `after` themselves, and nothing is wrong with that."""
    if not spec.after:
        return spec.requires
    return tuple(dict.fromkeys(spec.requires + spec.after))


def check(services: Mapping[str, ServiceSpec], broken: Collection[str]) -> list[Fault]:
    """All that is wrong between services. broken: names of those that cannot run because of their own file."""
    faults = [*_missing(services, broken), *_contradictions(services), *_cycles(services)]
    wrong = {fault.service for fault in faults if fault.severity == "error"}
    for name, spec in services.items():
        for other in spec.requires:
            # Its own file is right, so it is not "bad config": it waits, and runs as soon as the other's is right too.
            if (_is_broken(other, broken) or other in wrong) and name not in wrong:
                why = f"requires {other!r}, which has bad config: it waits until that is repaired"
                faults.append(Fault(name, "requires", other, "requires-broken", why, severity="warning"))
    return faults


def _is_broken(name: str, broken: Collection[str]) -> bool:
    """A template that cannot be read has no instances that we know of."""
    return name in broken or ("@" in name and f"{name.partition('@')[0]}@" in broken)


def _missing(services: Mapping[str, ServiceSpec], broken: Collection[str]) -> Iterator[Fault]:
    known: list[str] | None = None
    for name, spec in services.items():
        for key in KEYS:
            for other in getattr(spec, key):
                if other in services or _is_broken(other, broken):
                    continue
                from difflib import get_close_matches  # late: only a mistake needs it

                known = known or [*services, *broken]
                near = [one for one in known[:_NAMES_COMPARED] if one != name]
                close = get_close_matches(other, near, 1, 0.6)
                label = f"did you mean {quote(close[0])}?" if close else ""
                severity: Severity = "error" if key in _NEEDED else "warning"
                yield Fault(name, key, other, "no-such-service", f"there is no service {quote(other)}", label, severity)


_NAMES_COMPARED = 1000  # 10,000 misspelt names among 10,000 services would be compared for minutes


def _contradictions(services: Mapping[str, ServiceSpec]) -> Iterator[Fault]:
    place = {name: number for number, name in enumerate(services)}
    said: set[frozenset[str]] = set()
    for name, spec in services.items():
        for other in spec.requires:
            if spec.enabled and other in services and not services[other].enabled:
                why = f"requires {other!r}, which is disabled in {services[other].source}"
                yield Fault(name, "requires", other, "requires-disabled", why, f"enable {other!r}, or disable this too")
            if other in spec.conflicts:
                why = f"requires {other!r} and conflicts with it"
                yield Fault(name, "conflicts", other, "requires-rival", why)
        for other in spec.conflicts:
            pair = frozenset((name, other))
            if pair in said or other not in services or not (spec.enabled and services[other].enabled):
                continue
            said.add(pair)
            first = min(name, other, key=place.__getitem__)
            why = f"conflicts with {other!r}, and both are enabled: at start-up only {first!r} runs"
            yield Fault(name, "conflicts", other, "both-enabled", why, severity="warning")


def _cycles(services: Mapping[str, ServiceSpec]) -> Iterator[Fault]:
    """One fault for each service that comes, in the end, before itself."""
    edges = {
        name: [other for other in _before(spec) if other in services and other != name]
        for name, spec in services.items()
    }
    for knot in _knots(edges):
        told: set[str] = set()
        shown = 0
        first: list[str] = []
        for name in knot:
            if name in told:
                continue
            cycle = _cycle_through(name, edges, set(knot)) if shown < _CYCLES_SHOWN else []
            shown += 1
            first = first or cycle
            told.update(cycle)
            text = f"dependency cycle: {_describe(cycle or first, services)}"
            for number, one in enumerate(cycle or [name]):
                said = text
                if len(cycle or first) > _CYCLE_IN_FULL and one is not first[0]:
                    said = f"dependency cycle of {len(cycle or first)} services, printed at {first[0]!r}"
                other = cycle[(number + 1) % len(cycle)] if cycle else edges[one][0]
                key = "requires" if other in services[one].requires else "after"
                yield Fault(one, key, other, "dependency-cycle", said)


def _describe(cycle: list[str], services: Mapping[str, ServiceSpec]) -> str:
    return ", ".join(
        f"{one} requires {other}" if other in services[one].requires else f"{one} is after {other}"
        for one, other in zip(cycle, [*cycle[1:], cycle[0]], strict=True)
    )


def _cycle_through(start: str, edges: Mapping[str, list[str]], inside: set[str]) -> list[str]:
    """The shortest one, by breadth first search."""
    came_from = {start: ""}
    todo = deque([start])
    while todo:
        name = todo.popleft()
        for other in edges[name]:
            if other == start:
                found = [name]
                while found[-1] != start:
                    found.append(came_from[found[-1]])
                return found[::-1]
            if other in inside and other not in came_from:
                came_from[other] = name
                todo.append(other)
    return []


def _knots(edges: Mapping[str, list[str]]) -> Iterator[list[str]]:
    """Groups of nodes that all reach each other (strongly connected components, Tarjan), those of one node left out;
    each in the order of `edges`."""
    place = {name: number for number, name in enumerate(edges)}
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    on_stack: set[str] = set()
    for root in edges:
        if root in index:
            continue
        work = [(root, iter(edges[root]))]
        index[root] = low[root] = len(index)
        stack.append(root)
        on_stack.add(root)
        while work:
            name, rest = work[-1]
            for other in rest:
                if other not in index:
                    index[other] = low[other] = len(index)
                    stack.append(other)
                    on_stack.add(other)
                    work.append((other, iter(edges[other])))
                    break
                if other in on_stack:
                    low[name] = min(low[name], index[other])
            else:
                work.pop()
                if work:
                    low[work[-1][0]] = min(low[work[-1][0]], low[name])
                if low[name] == index[name]:
                    group: list[str] = []
                    while not group or group[-1] != name:
                        group.append(stack.pop())
                        on_stack.discard(group[-1])
                    if len(group) > 1:
                        yield sorted(group, key=place.__getitem__)
