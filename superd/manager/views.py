"""What of a service is shown over the control socket: rows as core/interface.py has them."""

from __future__ import annotations

import difflib
import math
import time
from typing import TYPE_CHECKING, Any

from superd.core.interface import PREFIX
from superd.core.lifecycle import State
from superd.core.messages import format_connection
from superd.core.records import Record, format_utc
from superd.core.values import format_cpu_time, format_size
from superd.core.varlink import VarlinkError
from superd.manager import metrics
from superd.manager.activation import ConnectionService
from superd.manager.process import ProcessService
from superd.manager.service import Service, Statistics

if TYPE_CHECKING:
    from superd.manager.control import ControlServer

ACTIVE = ("listening", "idle", "starting", "ready")
LAST_LINES = 10


def _age(since: float) -> dict[str, Any]:
    """`since` and `for` of something that began at a time of CLOCK_MONOTONIC."""
    age = max(time.monotonic() - since, 0.0)
    return {"since": format_utc(time.time() - age), "for": round(age, 3)}


def _row(statistics: Statistics) -> dict[str, Any]:
    return {
        "name": statistics.name, "state": statistics.state, **_age(statistics.since), "pid": statistics.pid,
        "now": statistics.now, "total": statistics.total, "restarts": statistics.restarts,
        "listen": list(statistics.listen), "note": statistics.note,
    }  # fmt: skip


def rows(server: ControlServer, names: list[str] | None) -> list[dict[str, Any]]:
    """In the order of `names`, each once; all by default."""
    found = {row.name: row for row in server.supervisor.statistics()}
    if not names:
        return [_row(row) for row in found.values()]
    return [_row(found[name]) for name in known(server, names, leaving=True)]


def known(server: ControlServer, names: list[str], *, leaving: bool = False) -> list[str]:
    """The names, each once. Raises VarlinkError NoSuchService for the first that is none. leaving: those whose file has
    gone count as well, while they live."""
    known = {*server.supervisor.services, *server.supervisor.snapshot.broken}
    if leaving:
        known |= {one.name for one in server.supervisor.leaving}
    for name in names:
        if name not in known:
            similar = difflib.get_close_matches(name[:64], sorted(known), 3)
            raise VarlinkError(f"{PREFIX}NoSuchService", name=name[:200], similar=similar)
    return list(dict.fromkeys(names))


def services_of(server: ControlServer, names: list[str] | None) -> list[Service]:
    """Those that run time knows: not the ones whose file is broken."""
    services = server.supervisor.services
    wanted = known(server, names) if names else sorted(services)
    return [services[name] for name in wanted if name in services]


def named(server: ControlServer, name: str) -> list[Service]:
    """The service, and those that have had its name and still live."""
    supervisor = server.supervisor
    found = [supervisor.services[name]] if name in supervisor.services else []
    return found + [one for one in supervisor.leaving if one.name == name]


def sockets_of(service: Service) -> list[dict[str, Any]]:
    listeners = service.listeners
    found = []
    for listener in listeners.open:
        length = metrics.queue_length(listener)
        found.append(
            {
                "service": service.name, "name": listener.spec.name, "address": str(listener.address),
                "kind": listener.address.kind, "queue": length and length[0], "room": length and length[1], "why": None,
                "paused": listeners.paused,
            }
        )  # fmt: skip
    for index, why in listeners.waiting.items():
        spec = listeners.specs[index]
        found.append(
            {
                "service": service.name, "name": spec.name, "address": str(spec.address), "kind": spec.address.kind,
                "queue": None, "room": None, "why": why, "paused": listeners.paused,
            }
        )  # fmt: skip
    return found


def _limits(service: Service) -> list[str]:
    limits = service.spec.cgroup
    used = service.supervisor.processes.usage(service) if limits.controllers() else {}
    found = []
    if limits.memory_max is not None:
        now = f"{used['memory'] / (1 << 20):.1f} MiB of " if "memory" in used else ""
        found.append(f"memory {now}{format_size(limits.memory_max)}")
    if limits.pids_max is not None:
        found.append(f"pids {used['pids']} of {limits.pids_max}" if "pids" in used else f"pids {limits.pids_max}")
    if limits.cpu_max is not None:
        found.append(f"cpu {format_cpu_time(limits.cpu_max)}")
    return found


def _processes(service: Service) -> list[dict[str, Any]]:
    found = []
    if isinstance(service, ProcessService):
        found = [
            {"service": service.name, "pid": one.pid, "connection": None, "peer": None, **_age(one.started)}
            for one in service.instances() if one.pid
        ]  # fmt: skip
    return found + connections_of(service)


def connections_of(service: Service) -> list[dict[str, Any]]:
    acceptor = service.acceptor
    if acceptor is not None:
        return [
            {
                "service": service.name, "pid": row.pid, "connection": format_connection(row.id), "peer": row.peer,
                **_age(row.started),
            }
            for row in acceptor.connections.values()
        ]  # fmt: skip
    return []


def record_row(record: Record) -> dict[str, Any]:
    connection = record.connection
    return {
        "number": record.number, "time": record.time_s, "level": record.level, "service": record.service,
        "event": record.event, "connection": None if connection is None else str(connection), "pid": record.pid,
        "peer": _text(record.peer), "message": _text(record.message),
        "fields": {key: _value(value) for key, value in record.fields.items() if value is not None},
    }  # fmt: skip


def _text(text: str | None) -> str | None:
    """Without the surrogates that stand for bytes that are no UTF-8: they are not JSON."""
    return text if text is None or text.isprintable() else text.encode("utf-8", "backslashreplace").decode()


def _value(value: object) -> object:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, int | float) else _text(str(value))


def details(server: ControlServer, row: dict[str, Any]) -> dict[str, Any]:
    name = row["name"]
    service = server.supervisor.services.get(name)
    records = [record_row(record) for record in server.supervisor.log.tail(name, LAST_LINES)]
    if service is None:
        row["note"] = server.supervisor.snapshot.broken.get(name, row["note"])
        return {
            "service": row, "description": "", "file": "", "run": "", "pass": "", "command": [], "ready": "",
            "took": None, "health": "", "restart": "", "requires": [], "wants": [], "required_by": [], "said": "",
            "errors": [], "stored": 0, "ignored": 0, "refused": 0, "limits": [], "sockets": [], "processes": [],
            "endings": [], "records": records,
        }  # fmt: skip
    spec = service.spec
    told = service.notifications if isinstance(service, ProcessService) else None
    instance = service.instance if isinstance(service, ProcessService) else None
    return {
        "service": row, "description": spec.description, "file": spec.source, "run": spec.run, "pass": spec.pass_,
        "command": [text] if (text := spec.context.handler or spec.builtin) else list(spec.command),
        "ready": _text(str(spec.ready)), "took": instance and instance.ready_after_s,
        "health": "" if spec.health is None else _text(str(spec.health.check)), "restart": spec.restart.policy,
        "requires": list(spec.requires), "wants": list(spec.wants),
        "required_by": server.supervisor.dependencies.required_by(name),
        "said": _text(service.status_text) if isinstance(service, ProcessService) else "",
        "errors": [f"{name}={text}" for name, text in told.problems.items()] if told else [],
        "stored": len(told.store) if told else 0, "ignored": told.ignored if told else 0,
        "refused": _refused(service),
        "limits": _limits(service), "sockets": sockets_of(service), "processes": _processes(service),
        "endings": list(service.endings),
        "records": records,
    }  # fmt: skip


def _refused(service: Service) -> int:
    counting = service.acceptor or service
    return counting.refused if isinstance(counting, ConnectionService | ProcessService) else 0


def is_ready(service: Service) -> bool:
    return service.state is State.READY or (isinstance(service, ConnectionService) and service.state is State.LISTENING)
