"""Methods of the control socket that change something: start, stop and the like, reload, upgrade, shutdown; and wait.

Each returns the parameters of the last reply, or raises VarlinkError. An order is given to all services that it names
at once, and then each is waited for, as long as the client is there.
"""

from __future__ import annotations

import errno
import math
import os
import signal
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import trio

from superd import __version__
from superd.core import varlink
from superd.core.interface import PREFIX
from superd.core.lifecycle import State
from superd.core.varlink import Call, VarlinkError, invalid_parameter
from superd.manager import upgrade, views
from superd.manager.activation import ConnectionService
from superd.manager.process import ProcessService
from superd.manager.reload import outcome_parameters
from superd.manager.service import Service
from superd.manager.views import ACTIVE, LAST_LINES, is_ready

if TYPE_CHECKING:
    from superd.manager.control import Client, ControlServer

_SETTLE_S = 0.3


# A question about a service: True: it is so; False: it cannot become so by itself; None: not yet.
Question = Callable[[Service], "bool | None"]
Order = Callable[[Service], None]


def _is_up(service: Service) -> bool | None:
    """After a start: a process runs, or ended well; a per-connection service listens."""
    if not service.wish_up:
        return False  # somebody else stopped it
    if service.supervisor.dependencies.is_under_way(service):
        return None
    if service.state in (State.STARTING, State.STOPPING):
        return None
    return service.state in (State.READY, State.LISTENING, State.DONE)


def _may_yet_fail(service: Service) -> bool:
    """Whether a process counts as ready only because it was executed, a moment ago: a wrong option or a taken port
    shows right after that, and who says `start` wants to know."""
    said_so = service.spec.ready.kind != "start"
    return service.state is State.READY and not said_so and time.monotonic() - service.since < _SETTLE_S


def _is_down(service: Service) -> bool | None:
    if service.is_stopped():
        return True
    return False if service.wish_up else None


def _is_idle(service: Service) -> bool:
    at_rest = service.state not in (State.STARTING, State.STOPPING, State.BACKOFF)
    return at_rest and not service.statistics().now


def _waits_for(condition: str) -> Question:
    if condition == "stopped":
        return lambda service: service.is_stopped() or None
    if condition == "idle":
        return lambda service: _is_idle(service) or None

    def question(service: Service) -> bool | None:
        if is_ready(service) if condition == "ready" else service.state.value in ACTIVE:
            return True
        return False if service.state in (State.FAILED, State.DONE) else None

    return question


async def _carry_out(
    server: ControlServer, client: Client, call: Call, verb: str, order: Order | None, is_so: Question
) -> dict[str, Any]:
    """Give an order to each service, all at once, and wait for each."""
    names = views.known(server, call.parameters["names"])
    supervisor = server.supervisor
    began = time.monotonic()
    results = {name: _result(server, name, began, ok=False) for name in names}
    waiting: dict[str, tuple[Service, int]] = {}
    for name in names:
        service = supervisor.services.get(name)
        if service is None:
            results[name]["note"] = supervisor.snapshot.broken[name].splitlines()[0]
        elif order is not None and supervisor.stopping:
            results[name]["note"] = "superd is stopping"
        elif (verb == "start" and is_ready(service) and not supervisor.dependencies.note(service)) or (
            verb in ("stop", "drain") and service.state is State.STOPPED
        ):
            results[name]["ok"] = True
        else:
            if order is not None:
                supervisor.log.message(f"{verb} asked for by pid {client.pid} uid {client.uid}", service=name)
            waiting[name] = service, _newest(server, name)
            if order is not None:
                order(service)
    supervisor.end_of_turn()
    if call.parameters.get("wait") is False:
        for name in waiting:
            results[name] = _result(server, name, began, ok=True, changed=True)
        return {"results": list(results.values())}
    with server.while_connected(client):
        for name, (service, mark) in waiting.items():
            while (so := is_so(service)) is None or (so and is_so is _is_up and _may_yet_fail(service)):
                with trio.move_on_after(math.inf if so is None else _SETTLE_S):
                    await service.changed.wait()
                if order is None:  # who only waits, waits for the name: its file may make another service of it
                    service = supervisor.services.get(name, service)
                    if name not in supervisor.services and service not in supervisor.leaving:
                        so = bool(is_so(service))  # its file has gone, and it has ended
                        break
            results[name] = _result(server, name, began, ok=so, changed=order is not None, mark=None if so else mark)
            if name not in supervisor.services:
                results[name] |= {"state": service.state.value, "note": "its file has gone"}
    return {"results": list(results.values())}


def _result(
    server: ControlServer, name: str, began: float, *, ok: bool, changed: bool = False, mark: int | None = None
) -> dict[str, Any]:
    """mark: number of the record after which to tell what the service wrote; None: do not."""
    service = next(iter(views.named(server, name)), None)
    mains = service.mains() if service is not None else []
    note = "" if service is None else service.explain()
    if service is not None and not ok and not note and service.endings:
        note = service.endings[-1]
    records = [] if mark is None else [r for r in server.supervisor.log.tail(name) if r.number > mark][-LAST_LINES:]
    return {
        "name": name, "ok": ok, "changed": changed,
        "state": State.BAD_CONFIG.value if service is None else service.statistics().state,
        "pid": mains[0] if mains else None, "note": note, "took": round(time.monotonic() - began, 3),
        "records": [views.record_row(record) for record in records],
    }  # fmt: skip


def _newest(server: ControlServer, name: str) -> int:
    return max((record.number for record in server.supervisor.log.tail(name, 1)), default=0)


async def start(server: ControlServer, client: Client, call: Call) -> dict[str, Any]:
    for name in call.parameters["names"]:
        if "@" in name and server.supervisor.reloader is not None:
            wrong = await server.supervisor.reloader.instantiate(name)
            if wrong is not None:
                raise VarlinkError(f"{PREFIX}BadCall", reason=wrong)
    await _look_again(server, call)
    return await _carry_out(server, client, call, "start", server.supervisor.dependencies.start, _is_up)


async def _look_again(server: ControlServer, call: Call) -> None:
    """A file that was wrong may be right by now: its program or its user has been installed since."""
    reloader, broken = server.supervisor.reloader, server.supervisor.snapshot.broken
    if reloader is not None and not broken.keys().isdisjoint(views.known(server, call.parameters["names"])):
        await reloader.look_again()


async def stop(server: ControlServer, client: Client, call: Call) -> dict[str, Any]:
    return await _carry_out(server, client, call, "stop", server.supervisor.dependencies.stop, _is_down)


async def restart(server: ControlServer, client: Client, call: Call) -> dict[str, Any]:
    await _look_again(server, call)
    if not call.parameters.get("overlap"):
        return await _carry_out(server, client, call, "restart", server.supervisor.dependencies.restart, _is_up)
    reply = await _carry_out(server, client, call, "restart", lambda one: one.ask_overlap(), _has_overlapped)
    for row in reply["results"]:
        service = server.supervisor.services.get(row["name"])
        if service is not None and not row["ok"] and (why := service.overlapped()):
            row["note"] = why
    return reply


def _has_overlapped(service: Service) -> bool | None:
    why = service.overlapped()
    return None if why is None else not why and _is_up(service)


async def drain(server: ControlServer, client: Client, call: Call) -> dict[str, Any]:
    return await _carry_out(server, client, call, "drain", server.supervisor.dependencies.drain, _is_down)


async def pause(server: ControlServer, client: Client, call: Call) -> dict[str, Any]:
    return _set_paused(server, client, call, paused=True)


async def resume(server: ControlServer, client: Client, call: Call) -> dict[str, Any]:
    return _set_paused(server, client, call, paused=False)


def _set_paused(server: ControlServer, client: Client, call: Call, *, paused: bool) -> dict[str, Any]:
    results, began = [], time.monotonic()
    for name in views.known(server, call.parameters["names"]):
        service = server.supervisor.services.get(name)
        if service is None:
            why = server.supervisor.snapshot.broken[name].splitlines()[0]
        else:
            why = service.why_not_pausable() if paused else ""
        changed = service is not None and not why and service.listeners.paused is not paused
        if service is not None and changed:
            verb = "pause" if paused else "resume"
            server.supervisor.log.message(f"{verb} asked for by pid {client.pid} uid {client.uid}", service=name)
            (service.ask_pause if paused else service.ask_resume)()
        result = _result(server, name, began, ok=not why, changed=changed)
        results.append({**result, "note": why or result["note"]})
    return {"results": results}


async def wait(server: ControlServer, client: Client, call: Call) -> dict[str, Any]:
    return await _carry_out(server, client, call, "wait", None, _waits_for(call.parameters["for"]))


async def kill(server: ControlServer, client: Client, call: Call) -> dict[str, Any]:
    names = views.known(server, call.parameters["names"], leaving=True)
    text = call.parameters.get("signal") or "TERM"
    signo = signal.Signals.__members__.get(f"SIG{text.upper().removeprefix('SIG')}")
    if signo is None:
        raise invalid_parameter("signal")
    began = time.monotonic()
    results = []
    for name in names:
        found = [service for service in views.named(server, name) if service.mains()]
        result = _result(server, name, began, ok=bool(found), changed=bool(found))
        if found:
            server.supervisor.log.message(
                f"kill -s {signo.name.removeprefix('SIG')} asked for by pid {client.pid} uid {client.uid}", service=name
            )
            for service in found:
                service.tell_mains(signo)
        else:
            result["note"] = "does not run"
        results.append(result)
    return {"results": results}


async def reload_service(server: ControlServer, client: Client, call: Call) -> dict[str, Any]:
    names = views.known(server, call.parameters["names"])
    supervisor = server.supervisor
    began = time.monotonic()
    results = {name: _result(server, name, began, ok=False) for name in names}
    told: dict[str, tuple[Service, list[int], int, int]] = {}
    for name in names:
        service = supervisor.services.get(name)
        mark = _newest(server, name)
        done = service.reloaded if isinstance(service, ProcessService) else 0
        if service is not None and service.ask_reload():
            supervisor.log.message(f"reload asked for by pid {client.pid} uid {client.uid}", service=name)
            told[name] = service, service.mains()[:1], mark, done
        else:
            results[name]["note"] = "does not run"
    supervisor.end_of_turn()
    if told and call.parameters.get("wait") is not False:
        # A program that does not handle the signal ends by it, and that shows at once.
        deadline = trio.current_time() + _SETTLE_S
        with server.while_connected(client):
            for service, pids, _, done in told.values():
                if isinstance(service, ProcessService):
                    await _until_reloaded(service, pids, done, deadline)
    for name, (service, pids, mark, done) in told.items():
        well = service.mains()[:1] == pids or isinstance(service, ConnectionService)
        if isinstance(service, ProcessService):
            well = not service.reload_failed and (service.reloaded != done or (well and service.can_change))
        results[name] = _result(server, name, began, ok=well, changed=True, mark=None if well else mark)
        if not well and isinstance(service, ProcessService) and service.reload_failed:
            results[name]["note"] = service.reload_failed
    return {"results": list(results.values())}


async def _until_reloaded(service: ProcessService, pids: list[int], done: int, deadline: float) -> None:
    with trio.move_on_at(deadline):
        while service.mains()[:1] == pids and not service.reloading and service.reloaded == done:
            await service.changed.wait()
    while service.reloading:  # until READY=1, the end of it, or its ready_timeout
        await service.changed.wait()


async def shutdown(server: ControlServer, client: Client, call: Call) -> dict[str, Any]:
    supervisor = server.supervisor
    supervisor.log.message(f"shutdown asked for by pid {client.pid} uid {client.uid}")
    supervisor.shut_down()
    return {"services": len(supervisor.services), "pid": os.getppid()}


async def upgrade_superd(server: ControlServer, client: Client, call: Call) -> dict[str, Any]:
    supervisor = server.supervisor
    if server.upgrading or supervisor.stopping:
        why = "superd is stopping" if supervisor.stopping else "somebody else has asked for it just now"
        return {"ok": False, "version": "", "was": __version__, "why": why}
    server.upgrading = True
    try:
        supervisor.log.message(f"upgrade asked for by pid {client.pid} uid {client.uid}", level="notice")
        version, why = await upgrade.try_out()
        reply = {"ok": not why, "version": version, "was": __version__, "why": why}
        if why:
            supervisor.log.message(f"cannot upgrade: {why}; superd goes on as it is", level="err")
            return reply
        supervisor.log.message(f"superd {version} takes over from {__version__}", level="notice")
        await client.tell(varlink.pack_reply(reply))
        await upgrade.hand_over(supervisor)
    finally:
        server.upgrading = False
    raise ConnectionResetError(errno.ECONNRESET, "superd stops")


async def reload_files(server: ControlServer, client: Client, call: Call) -> dict[str, Any]:
    strict, dry_run = bool(call.parameters.get("strict")), bool(call.parameters.get("dry_run"))
    return await _reloaded(server, strict=strict, dry_run=dry_run, by=f"pid {client.pid} uid {client.uid}")


async def diff(server: ControlServer, client: Client, call: Call) -> dict[str, Any]:
    return await _reloaded(server, strict=False, dry_run=True, by="")


async def _reloaded(server: ControlServer, *, strict: bool, dry_run: bool, by: str) -> dict[str, Any]:
    reloader = server.supervisor.reloader
    assert reloader is not None
    try:
        return outcome_parameters(await reloader.reload(strict=strict, dry_run=dry_run, by=by))
    except OSError as error:
        reason = f"cannot read the files: {(error.strerror or str(error)).lower()}"
        raise VarlinkError(f"{PREFIX}BadCall", reason=reason) from None
