"""Methods of the control socket that look and change nothing: lists, details, logs and events, health, metrics.

Each returns the parameters of the last reply, or raises VarlinkError.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import trio

from superd.core import varlink
from superd.core.lifecycle import State
from superd.core.metrics import SLOT_S, SLOTS
from superd.core.records import Record
from superd.core.varlink import Call, VarlinkError, invalid_parameter
from superd.manager import access, metrics, views
from superd.manager.process import ProcessService
from superd.manager.views import ACTIVE, is_ready

if TYPE_CHECKING:
    from superd.manager.control import Client, ControlServer

_FEED_RECORDS, _FEED_BYTES = 1000, 1 << 20  # that wait for a client that reads slowly
_REPLY_BYTES = 1 << 17  # of records in one reply
_HEALTHY = (*ACTIVE, "stopping", "done", "stopped", "disabled")


async def _look_at_files(server: ControlServer) -> None:
    if server.supervisor.reloader is not None:
        await server.supervisor.reloader.look()


async def list_services(server: ControlServer, client: Client, call: Call) -> dict[str, Any]:
    await _look_at_files(server)
    return {"services": views.rows(server, call.parameters.get("names"))}


async def sockets(server: ControlServer, client: Client, call: Call) -> dict[str, Any]:
    return {
        "sockets": [row for s in views.services_of(server, call.parameters.get("names")) for row in views.sockets_of(s)]
    }


async def status(server: ControlServer, client: Client, call: Call) -> dict[str, Any]:
    await _look_at_files(server)
    return {"services": [views.details(server, row) for row in views.rows(server, call.parameters.get("names"))]}


async def connections(server: ControlServer, client: Client, call: Call) -> dict[str, Any]:
    supervisor = server.supervisor
    every = {*supervisor.services, *(one.name for one in supervisor.leaving)}
    names = views.known(server, call.parameters.get("names") or sorted(every), leaving=True)
    services = [service for name in names for service in views.named(server, name)]
    return {"connections": [row for service in services for row in views.connections_of(service)]}


async def show(server: ControlServer, client: Client, call: Call) -> dict[str, Any]:
    from superd.core import effective  # late: an operator asks now and then, and it is no part of the daemon's work
    from superd.core.problems import format_problems

    supervisor = server.supervisor
    (name,) = views.known(server, [call.parameters["name"]])
    assert supervisor.sources is not None
    files, problems, machine = supervisor.sources(name)
    spec, entries, found = effective.load_one(
        name, files, machine=machine, environ=os.environ, is_root=os.geteuid() == 0, problems=problems
    )
    secrets = client.may_act  # K18
    if spec is None or name in supervisor.snapshot.broken:  # by itself, or by what another file says
        said = format_problems([problem for problem in found if problem.is_error], "full")
        said = said or f"{supervisor.snapshot.broken.get(name)}\n"
        return {"toml": "", "config": {}, "origins": {}, "file": "", "problems": said}
    return {
        "toml": effective.format_entries(entries, origin=bool(call.parameters.get("origin")), secrets=secrets),
        "config": effective.tree_of(entries, secrets=secrets), "origins": effective.origins_of(entries),
        "file": spec.source, "problems": "",
    }  # fmt: skip


async def logs(server: ControlServer, client: Client, call: Call) -> dict[str, Any]:
    names = call.parameters.get("names")
    log = server.supervisor.log
    if names:
        wanted: set[str | None] = set(views.known(server, names))
    else:
        wanted = {None, *server.supervisor.services, *server.supervisor.snapshot.broken}
    found = sorted(record for name in wanted for record in log.tail(name))
    everything = not names
    return await _records(
        server, client, call, found,
        lambda record: record.event in ("output", "message") and (everything or record.service in wanted),
    )  # fmt: skip


async def events(server: ControlServer, client: Client, call: Call) -> dict[str, Any]:
    names = call.parameters.get("names")
    wanted = set(views.known(server, names)) if names else None

    def is_wanted(record: Record) -> bool:
        return (
            record.event not in ("output", "message") and record.level != "debug"
            and (wanted is None or record.service in wanted)
        )  # fmt: skip

    found = [record for record in server.supervisor.log.events() if is_wanted(record)]
    return await _records(server, client, call, found, is_wanted)


async def _records(
    server: ControlServer, client: Client, call: Call, found: list[Record], is_wanted: Callable[[Record], bool]
) -> dict[str, Any]:
    """The last `count` of what was found, then, with `follow`, what comes."""
    count, follow = call.parameters.get("count"), bool(call.parameters.get("follow"))
    if count is not None and count < 0:
        raise invalid_parameter("count")
    if follow and not call.more:
        raise VarlinkError(f"{varlink.SERVICE}.ExpectedMore")
    feed = _Feed(found if count is None else found[len(found) - count :] if count < len(found) else found)
    if not call.more:
        return feed.take(None)
    unsubscribe = server.supervisor.log.subscribe(lambda record: feed.add(record) if is_wanted(record) else None)
    try:
        with server.while_connected(client):
            while follow or feed.has_more():
                reply = feed.take(_REPLY_BYTES)
                if not follow and not feed.has_more():
                    return reply
                if not call.oneway:
                    await client.send(varlink.pack_reply(reply, continues=True))
                if not feed.has_more():
                    await feed.news.wait()
    finally:
        unsubscribe()
    return {"records": [], "lost": 0}


class _Feed:
    """Records on their way to a client: bounded, the oldest are lost first, and counted (J5)."""

    def __init__(self, first: list[Record]) -> None:
        self._first = deque(first)  # bounded by the rings they come from
        self._queue: deque[Record] = deque()
        self._bytes = 0
        self._lost = 0
        self.news = trio.Event()

    def add(self, record: Record) -> None:
        self._queue.append(record)
        self._bytes += len(record.message)
        while len(self._queue) > _FEED_RECORDS or self._bytes > _FEED_BYTES:
            self._bytes -= len(self._queue.popleft().message)
            self._lost += 1
        self.news.set()

    def has_more(self) -> bool:
        return bool(self._first or self._queue)

    def take(self, limit_bytes: int | None) -> dict[str, Any]:
        """A reply's worth."""
        found: list[dict[str, Any]] = []
        size = 0
        while self._first and (limit_bytes is None or size < limit_bytes):
            record = self._first.popleft()
            size += len(record.message) + 200
            found.append(views.record_row(record))
        while not self._first and self._queue and (limit_bytes is None or size < limit_bytes):
            record = self._queue.popleft()
            self._bytes -= len(record.message)
            size += len(record.message) + 200
            found.append(views.record_row(record))
        lost, self._lost = (self._lost, 0) if not self._first else (0, self._lost)
        if not self.has_more():
            self.news = trio.Event()
        return {"records": found, "lost": lost}


async def is_so(server: ControlServer, client: Client, call: Call) -> dict[str, Any]:
    what = call.parameters["what"]
    yes: list[str] = []
    no: list[str] = []
    for name in views.known(server, call.parameters["names"]):
        service = server.supervisor.services.get(name)
        if what == "failed":
            so = service is None or service.state is State.FAILED
        elif service is None:
            so = False
        else:
            so = is_ready(service) if what == "ready" else service.state.value in ACTIVE
        (yes if so else no).append(name)
    return {"yes": yes, "no": no}


async def health(server: ControlServer, client: Client, call: Call) -> dict[str, Any]:
    problems = []
    for row in server.supervisor.statistics():
        service = server.supervisor.services.get(row.name)
        well = row.state in _HEALTHY
        if service is not None:
            # While an on-demand service starts its clients wait, as they do for every start of it.
            starts = service.state is State.STARTING and service.spec.run != "on-demand"
            well = well and not service.listeners.waiting and not starts
            well = well and not (isinstance(service, ProcessService) and service.health.unhealthy)
        if not well:
            problems.append(f"{row.name}: {row.state}" + (f": {row.note}" if row.note else ""))
    if server.supervisor.stopping:
        problems.append("superd is stopping")
    return {"live": True, "ready": not problems, "problems": problems}


async def may_connect(server: ControlServer, client: Client, call: Call) -> dict[str, Any]:
    (name,) = views.known(server, [call.parameters["name"]])
    service = server.supervisor.services.get(name)
    if service is None:
        return {"allowed": False, "reason": "its file has errors, so nobody is let in"}
    door = access.Door(service.spec.access, server.supervisor.names)
    asked = call.parameters["address"]
    try:
        if asked.startswith("user:"):
            facts = access.client_named(asked.removeprefix("user:"))
        else:
            facts = door.client_at(asked)
        decision = door.judge(facts)
        if decision.needs_names:
            await server.supervisor.names.find(access.packed(asked))
            decision = door.judge(door.client_at(asked))
    except (ValueError, KeyError, OverflowError):
        raise invalid_parameter("address") from None
    return {"allowed": decision.allowed, "reason": decision.reason}


async def metrics_text(server: ControlServer, client: Client, call: Call) -> dict[str, Any]:
    return {"text": await metrics.render(server.supervisor)}


async def history(server: ControlServer, client: Client, call: Call) -> dict[str, Any]:
    plots = [{"name": name, "connections": values} for name, values in server.supervisor.meter.plots()]
    return {"slot": SLOT_S, "span": SLOT_S * SLOTS, "services": plots}


async def processes(server: ControlServer, client: Client, call: Call) -> dict[str, Any]:
    services = views.services_of(server, call.parameters.get("names"))
    return {"processes": metrics.members(server.supervisor, services)}
