"""Numbers for others: the text that Prometheus reads, and what the status page draws. Made when they are asked for.

Services count for themselves (core/metrics.py); Meter sees to it that the numbers reach the next manager, and notes how
many connections there were when.
"""

from __future__ import annotations

import os
import platform
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import trio

from superd import __version__
from superd.core.lifecycle import State
from superd.core.metrics import SLOT_S, Family, History, Sample, format_families
from superd.manager.activation import ConnectionService
from superd.system import resources, sockets

if TYPE_CHECKING:
    from superd.manager.service import Service
    from superd.manager.supervisor import Supervisor

_TICK_S = 1.0
_DEPOSIT_SHARE = 0.02  # of the time, at most, goes into deposits that only numbers cause
_PROCESSES_PER_TURN = 100  # each costs a look into /proc


class Meter:
    """While there is something to count it ticks once a second; otherwise it sleeps and costs nothing."""

    def __init__(self, supervisor: Supervisor) -> None:
        self.supervisor = supervisor
        self.began = time.time()  # of superd, not of this manager
        self.lines_dropped = 0  # by earlier managers
        self.histories: dict[str, History] = {}
        self._seen: dict[str, int] = {}  # totals at the last tick
        self._ticking = False

    def note(self) -> None:
        """Something was counted."""
        if not self._ticking:
            self._ticking = True
            self.supervisor.timers.after(_TICK_S, self._tick)

    def dropped(self) -> int:
        return self.lines_dropped + self.supervisor.log.sink.dropped

    def deposit(self) -> dict[str, Any]:
        return {"began": self.began, "lines_dropped": self.dropped()}

    def restore(self, was: dict[str, Any]) -> None:
        self.began = was.get("began", self.began)
        self.lines_dropped = was.get("lines_dropped", 0)

    def begin(self) -> None:
        """Every total is what it was when this manager began."""
        self._seen = {name: service.total for name, service in self.supervisor.services.items() if service.total}

    def _tick(self) -> None:
        self._ticking = False
        slot = int(time.monotonic() / SLOT_S)
        for service in self.supervisor.services.values():
            seen = self._seen.get(service.name, 0)
            if isinstance(service, ConnectionService) and service.total != seen:
                history = self.histories.get(service.name)
                if history is None:
                    history = self.histories[service.name] = History(slot)
                # A service of the same name that began anew counts from 0.
                history.add(slot, service.total - (seen if seen < service.total else 0))
                self._seen[service.name] = service.total
        for name in self.histories.keys() - self.supervisor.services.keys():
            del self.histories[name]
            self._seen.pop(name, None)
        self.supervisor.snapshot_wanted = True
        rest_s = self.supervisor.deposit_s / _DEPOSIT_SHARE - _TICK_S
        if rest_s > 0:  # so many services that a deposit takes long: less often
            self._ticking = True
            self.supervisor.timers.after(rest_s, self._rested)

    def _rested(self) -> None:
        self._ticking = False
        self.note()

    def plots(self) -> list[tuple[str, list[int]]]:
        """By service: new connections in each of the last slots, the oldest first. Only those that had any."""
        if self._ticking:
            self._ticking = False
            self._tick()
            self.note()
        slot = int(time.monotonic() / SLOT_S)
        return [(name, history.values(slot)) for name, history in sorted(self.histories.items())]


async def render(supervisor: Supervisor) -> str:
    """The text for Prometheus. What takes long with many services lets others go on meanwhile."""
    return format_families([*_of_superd(supervisor), *_of_services(supervisor), *await _of_processes(supervisor)])


def _of_superd(supervisor: Supervisor) -> Iterator[Family]:
    meter = supervisor.meter
    version = {"version": __version__, "python": platform.python_version()}
    yield Family("superd_build_info", "gauge", "What runs; always 1.", [Sample(version, 1)])
    yield Family(
        "superd_start_time_seconds", "gauge", "When superd was started, in seconds since the epoch.",
        [Sample({}, round(meter.began, 3))],
    )  # fmt: skip
    yield Family(
        "superd_manager_generation", "gauge", "Number of the manager that runs; the first is 1.",
        [Sample({}, supervisor.inheritance.generation)],
    )  # fmt: skip
    yield Family(
        "superd_log_lines_dropped_total", "counter", "Lines of the log that nobody took.", [Sample({}, meter.dropped())]
    )


def _of_services(supervisor: Supervisor) -> Iterator[Family]:
    rows = supervisor.statistics()
    states = Counter(row.state for row in rows)
    yield Family(
        "superd_services", "gauge", "Services by state.",
        [Sample({"state": state.value}, states[state.value]) for state in State],
    )  # fmt: skip
    yield Family(
        "superd_service_state", "gauge", "The state that each service is in; always 1.",
        [Sample({"service": row.name, "state": row.state}, 1) for row in rows],
    )  # fmt: skip
    found = [supervisor.services[row.name] for row in rows if row.name in supervisor.services]
    connecting = [acceptor for service in found if (acceptor := service.acceptor) is not None]

    def each(services: list[Any], value: Any) -> list[Sample]:
        return [Sample({"service": service.name}, value(service)) for service in services]

    def by(label: str, counts: Callable[[Service], Mapping[str, int]]) -> list[Sample]:
        return [
            Sample({"service": service.name, label: key}, count)
            for service in found for key, count in sorted(counts(service).items())
        ]  # fmt: skip

    yield Family(
        "superd_connections", "gauge", "Connections that are served now.", each(connecting, lambda one: one.count())
    )
    yield Family(
        "superd_connections_accepted_total", "counter", "Connections that were given to a process or handler.",
        each(connecting, lambda one: one.total),
    )  # fmt: skip
    yield Family(
        "superd_connections_refused_total", "counter", "Clients that were refused, by the limit that did it.",
        by("reason", lambda one: one.counts.refused),
    )  # fmt: skip
    yield Family(
        "superd_service_starts_total", "counter", "Processes that were started.", each(found, lambda one: one.total)
    )
    yield Family(
        "superd_service_restarts_total", "counter", "How often a service was started again because it had ended.",
        each(found, lambda one: one.restarts),
    )  # fmt: skip
    yield Family(
        "superd_service_exits_total", "counter", "How processes ended: success, status, signal, timeout, watchdog …",
        by("result", lambda one: one.counts.exits),
    )  # fmt: skip
    yield Family(
        "superd_start_duration_seconds", "histogram", "From accept, or the decision to start, to the running process.",
        [Sample({"service": one.name}, one.counts.starts) for one in found if one.counts.starts is not None],
    )  # fmt: skip
    yield Family(
        "superd_connection_duration_seconds", "histogram", "How long connections lasted.",
        [Sample({"service": one.name}, one.counts.lives) for one in found if one.counts.lives is not None],
    )  # fmt: skip
    queues = [
        ({"service": service.name, "listen": str(listener.address)}, length)
        for service in found for listener in service.listeners.open
        if listener.fd >= 0 and (length := queue_length(listener)) is not None
    ]  # fmt: skip
    yield Family(
        "superd_listener_queue_length", "gauge", "Connections that wait to be accepted.",
        [Sample(labels, length) for labels, (length, _) in queues],
    )  # fmt: skip
    yield Family(
        "superd_listener_queue_limit", "gauge", "How many may wait.",
        [Sample(labels, limit) for labels, (_, limit) in queues],
    )  # fmt: skip


def queue_length(listener: Any) -> tuple[int, int] | None:
    """How many wait in the queue of a listener, and for how many there is room; None where the kernel does not tell."""
    return None if listener.fd < 0 or listener.address.kind == "fifo" else sockets.queue_length(listener.fd)


async def _of_processes(supervisor: Supervisor) -> list[Family]:
    roles = [
        ("keeper", [os.getppid()]), ("manager", [os.getpid()]),
        ("spawner", [spawner.pid for spawner in supervisor.spawners.by_id.values()]),
    ]  # fmt: skip
    services = [
        (name, [row.pid for row in rows]) for name, rows in sorted(supervisor.processes.by_service().items()) if name
    ]
    memory: dict[str, list[Sample]] = {"role": [], "service": []}
    cpu: dict[str, list[Sample]] = {"role": [], "service": []}
    looked = 0
    for label, groups in (("role", roles), ("service", services)):
        for name, pids in groups:
            resident, seconds = resources.total(pids)
            memory[label].append(Sample({label: name}, resident))
            cpu[label].append(Sample({label: name}, round(seconds, 2)))
            looked += len(pids)
            if looked >= _PROCESSES_PER_TURN:
                looked = 0
                await trio.lowlevel.checkpoint()
    return [
        Family("superd_role_memory_bytes", "gauge", "Resident memory of superd's own processes.", memory["role"]),
        Family("superd_role_cpu_seconds", "gauge", "CPU time of superd's own processes that live now.", cpu["role"]),
        Family(
            "superd_service_memory_bytes", "gauge", "Resident memory of the processes of a service.", memory["service"]
        ),
        Family(
            "superd_service_cpu_seconds", "gauge", "CPU time of the processes of a service that live now.",
            cpu["service"],
        ),
        Family(
            "superd_service_processes", "gauge", "Processes of a service that live now, with all their descendants.",
            [Sample({"service": name}, len(pids)) for name, pids in services],
        ),
    ]  # fmt: skip


def members(supervisor: Supervisor, services: list[Service]) -> list[dict[str, Any]]:
    """Every process of the services, and of superd itself as service None."""
    found: list[dict[str, Any]] = [
        {"service": None, "pid": pid}
        for pid in (os.getppid(), os.getpid(), *(one.pid for one in supervisor.spawners.by_id.values()))
    ]
    by_service = supervisor.processes.by_service()
    return found + [
        {"service": service.name, "pid": row.pid} for service in services for row in by_service.get(service.name, [])
    ]
