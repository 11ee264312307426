"""Services that need each other, at run time: who waits for whom before a start, and before a stop.

Nobody walks a plan. A service that must not start yet is remembered, and tried again when one that it names has
changed; so what is independent starts together, and what was broken heals by itself. A stop goes the other way round:
it is ordered for all that it concerns at once (their wishes are down from that moment, whatever happens to this
manager), and carried out for each as soon as nobody who requires it, or is after it, is left to be stopped.

Services are known by name here, because a reload may put another object in a service's place.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from typing import TYPE_CHECKING

from superd.core.dependencies import Graph
from superd.core.lifecycle import State
from superd.core.spec import Snapshot

if TYPE_CHECKING:
    from superd.manager.service import Service
    from superd.manager.supervisor import Supervisor

_DOWN = (State.STOPPED, State.DISABLED, State.FAILED)


class Dependencies:
    """`begin()` starts everything; start, stop and restart are an operator's orders."""

    def __init__(self, supervisor: Supervisor, snapshot: Snapshot) -> None:
        self.supervisor = supervisor
        self.orders: dict[str, str] = {}  # "stop" or "restart", not carried out yet: for the next manager, too
        self._waiting: set[str] = set()  # they shall run, and may not yet
        self._reasons: dict[str, str] = {}  # why a service is being stopped, if nobody asked for that by its name
        self._changed: set[str] = set()
        self.replace(snapshot)

    def replace(self, snapshot: Snapshot) -> None:
        """Another configuration is in force. The services that wait are looked at again."""
        self.graph = Graph(snapshot.services)
        self._linked = self.graph.linked()
        for names in (self.orders, self._reasons):
            for name in names.keys() - snapshot.services.keys():
                del names[name]
        self._waiting &= snapshot.services.keys()
        for name in [*self._waiting, *self.orders]:
            self._note_change(name)

    # -- what services ask and tell

    def ready_for(self, service: Service) -> bool:
        """Whether it may start a process now. If not, its `go_on()` is called when it may."""
        name = service.name
        if name not in self._linked:
            return True
        self._pull_up(service)
        if next(self._blockers(service), None) is None:
            self._waiting.discard(name)
            return True
        if name not in self._waiting:
            self._waiting.add(name)
            self.supervisor.log.message(self._describe(service), service=name)
        return False

    def _pull_up(self, service: Service) -> None:
        """Start what it requires and nobody wants up, as far as that is at rest."""
        if any(self._is_down(other) for other in service.spec.requires):
            for other in self.graph.in_order(self.graph.pulled_in(service.name, wants=False) - {service.name}):
                if self._is_down(other) and not any(self._wants_up(rival) for rival in self._rivals(other)):
                    self.supervisor.services[other].ask_start()

    def changed(self, service: Service) -> None:
        """Its state is another, or its last process or connection has ended."""
        if service.name in self._linked or service.name in self._reasons:
            self._note_change(service.name)

    def note(self, service: Service) -> str:
        """What it waits for, for people; "": nothing."""
        name = service.name
        if name in self.orders:
            left = [one for one in self.graph.followers.get(name, ()) if self._holds_up(one)]
            return f"{self.orders[name]} asked for; waiting until {_names(left)} has stopped" if left else ""
        if name not in self._waiting or not self._still_waits(service):
            return ""
        return self._describe(service)

    def _describe(self, service: Service) -> str:
        by_reason: dict[str, list[str]] = {}
        for other, reason in self._blockers(service):
            by_reason.setdefault(reason, []).append(other)
        said = [f"{_names(others)}: {reason}" if reason else _names(others) for reason, others in by_reason.items()]
        return f"waiting for {'; '.join(said)}" if said else ""

    def is_under_way(self, service: Service) -> bool:
        """Whether it waits for nothing but what will come without anybody's help."""
        if service.name in self.orders:
            return True
        seen, todo = {service.name}, [service]
        while todo:
            one = todo.pop()
            if one.name not in self._waiting or not self._still_waits(one):
                if one is service:
                    return False
                continue
            for other, reason in self._blockers(one):
                if reason:
                    return False
                if other not in seen:
                    seen.add(other)
                    todo.append(self.supervisor.services[other])
        return True

    def required_by(self, name: str) -> list[str]:
        return [one for one in self.graph.dependents.get(name, ()) if name in self.graph.services[one].requires]

    # -- orders

    def begin(self) -> None:
        """Start what shall run, in order; after a take-over, go on with what the last manager had ordered."""
        services = self.supervisor.services
        taken_over = self.supervisor.inheritance.up
        seen: set[str] = set()
        for name, service in services.items() if not taken_over else ():
            seen.add(name)
            for rival in self._rivals(name):
                if service.wish_up and rival in seen and services[rival].wish_up:
                    service.wish_up = False
                    service.note = f"stopped: conflicts with {rival!r}"
                    self.supervisor.log.message(f"not started: conflicts with {rival!r}", level="warning", service=name)
        for name in self.graph.in_order(services):
            self._guarded(services[name].begin)
        if taken_over:
            left = [
                name for name, one in services.items() if one.busy() and not one.wish_up and not one.draining
            ]  # fmt: skip
            self.orders |= dict.fromkeys(left, "stop")
            for name in list(self.orders):
                if not services[name].busy():
                    del self.orders[name]
                    self._note_change(name)
            self._carry_out_all(self.orders)

    def start(self, service: Service) -> None:
        """With what it requires and wants, and instead of what it conflicts with."""
        services = self.supervisor.services
        pulled_in = self.graph.pulled_in(service.name)
        required = {service.name}.union(*(self.graph.services[name].requires for name in pulled_in))
        names = [name for name in pulled_in if name in required or services[name].state is not State.DISABLED]
        for name in names:
            for rival in self._rivals(name):
                if rival not in names and self._wants_up(rival):
                    self._stop(rival, f"conflicts with {name!r}")
        for name in self.graph.in_order(names):
            other = services[name]
            if self.orders.get(name) == "restart":
                continue  # so it will be started, after a stop that others have made room for
            ordered = self.orders.pop(name, "")
            if name == service.name or ordered or other.state in _DOWN or not other.wish_up or self._is_over(other):
                self._reasons.pop(name, None)
                other.ask_start()

    def stop(self, service: Service) -> None:
        """After those that require it, or are part of it."""
        self._stop(service.name, "")

    def drain(self, service: Service) -> None:
        """As stop, and nobody is killed."""
        self._stop(service.name, "", order="drain")

    def restart(self, service: Service) -> None:
        """With those that require it, or are part of it, and that run."""
        if service.is_stopped():
            return self.start(service)
        services = self.supervisor.services
        for name in self.graph.in_order(self.graph.pulled_in(service.name, wants=False) - {service.name}):
            if not self._wants_up(name):  # it may be on its way down
                self.start(services[name])
        names = [one for one in self.graph.torn_down(service.name) if one == service.name or services[one].busy()]
        for name in names:
            if services[name].wish_up or name == service.name:
                if name != service.name:
                    self.supervisor.log.message(f"restarting: {self._reason(name, names)}", service=name)
                self.orders[name] = "restart"
        self._carry_out_all(names)

    def stop_all(self) -> None:
        """For good: superd ends."""
        self._reasons.clear()
        self._order_stop(self.supervisor.services)

    def hurry(self) -> None:
        """Tell at once all that still wait for their turn to stop."""
        for name in self.graph.in_order(self.orders, reverse=True):
            self._carry_out(name)

    def _stop(self, name: str, reason: str, *, order: str = "stop") -> None:
        services = self.supervisor.services
        names = [
            one for one in self.graph.torn_down(name) if one == name or self._wants_up(one) or services[one].busy()
        ]
        for one in names:
            why = reason if one == name else self._reason(one, names) if self._wants_up(one) else ""
            if why:
                self._reasons[one] = f"stopped: {why}"
                self.supervisor.log.message(f"stopping: {why}", service=one)
        self._order_stop(names, order)

    def _order_stop(self, names: Iterable[str], order: str = "stop") -> None:
        services = self.supervisor.services
        names = list(names)
        for name in names:
            service = services[name]
            if service.state is not State.DISABLED:
                service.wish_up = False
                self._waiting.discard(name)
                self.orders[name] = order
        self._carry_out_all(names)

    def _reason(self, name: str, others: Collection[str]) -> str:
        """Why what happens to one of the others happens to this service."""
        spec = self.graph.services[name]
        for how, named in (("requires", spec.requires), ("is part of", spec.part_of)):
            for other in named:
                if other in others:
                    return f"{how} {other!r}"
        return ""

    # -- what moves it

    def _note_change(self, name: str) -> None:
        if not self._changed:
            self.supervisor.later(self._settle)
        self._changed.add(name)

    def _settle(self) -> None:
        """Let go on who waited for one of those that have changed."""
        services, graph = self.supervisor.services, self.graph
        changed, self._changed = self._changed & services.keys(), set()
        starts: set[str] = set()
        stops: set[str] = set()
        for name in changed:
            service = services[name]
            if name in self._reasons and service.state is State.STOPPED:
                service.note = self._reasons.pop(name)
            if name in self._waiting and not self._still_waits(service):
                self._waiting.discard(name)
            starts.update(one for one in graph.followers.get(name, ()) if one in self._waiting)
            starts.update(one for one in self._rivals(name) if one in self._waiting)
            starts.update({name} & self._waiting)
            spec = graph.services[name]
            stops.update(one for one in (name, *spec.requires, *spec.after) if one in self.orders)
        self._carry_out_all(stops)
        stuck: list[str] = []
        for name in graph.in_order(starts & self._waiting):
            self._pull_up(services[name])  # what was being stopped when that was asked for
            reasons = [reason for _, reason in self._blockers(services[name])]
            if not reasons:
                self._waiting.discard(name)
                self._guarded(services[name].go_on)
            elif any(reasons):
                stuck.append(name)
        told: set[str] = set()
        while stuck:  # whoever waits for one of these, directly or not, will wait for longer than he thought
            name = stuck.pop()
            if name not in told:
                told.add(name)
                services[name].nudge()
                stuck += self._waiting.intersection(graph.followers.get(name, ()))

    def _carry_out_all(self, names: Iterable[str]) -> None:
        for name in self.graph.in_order(names, reverse=True):
            if name in self.orders and not self._is_held_up(name):
                self._carry_out(name)

    def _carry_out(self, name: str) -> None:
        service = self.supervisor.services[name]
        order = self.orders.pop(name)
        ask = {"stop": service.ask_stop, "drain": service.ask_drain, "restart": service.ask_restart}[order]
        self._guarded(ask)
        self._note_change(name)

    def _guarded(self, call: Callable[[], None]) -> None:
        self.supervisor.guard(lambda _: call(), 0)

    # -- questions

    def _is_held_up(self, name: str) -> bool:
        """Whether a stop or restart has to wait. One that neither runs nor listens serves nobody."""
        service = self.supervisor.services[name]
        if not service.busy() and service.state is not State.LISTENING:
            return False
        rank = self.graph.rank
        later = (
            one for one in self.graph.followers.get(name, ()) if rank[one] > rank[name]
        )  # a cycle would hold for ever
        return any(map(self._holds_up, later))

    def _holds_up(self, name: str) -> bool:
        service = self.supervisor.services.get(name)
        if service is None:
            return False
        return name in self.orders or service.state is State.STOPPING or (service.busy() and not service.wish_up)

    def _blockers(self, service: Service) -> Iterator[tuple[str, str]]:
        """(name, reason) of what a start must wait for. Reason "": it will come by itself."""
        services, spec = self.supervisor.services, service.spec
        for name in spec.requires:
            other = services.get(name)
            if other is None:
                yield name, State.BAD_CONFIG.value
            elif not self._serves(other):
                yield name, "" if self._is_coming(other) else other.listeners.describe_waiting() or other.state.value
        for name in spec.after:
            other = services.get(name)
            if other is not None and name not in spec.requires and not self._serves(other) and self._is_coming(other):
                yield name, ""
        for name in self._rivals(service.name):
            if services[name].busy() or services[name].state is State.STOPPING:
                yield name, "they conflict" if self._wants_up(name) else ""

    def _serves(self, service: Service) -> bool:
        """Whether who requires it may start. What is started by its traffic can be reached as soon as it listens; what
        is there to do one thing and says nothing in between has to have done it."""
        spec = service.spec
        if service.name in self.orders:
            return False
        if spec.run in ("on-demand", "per-connection"):
            return service.wish_up and service.listeners.complete and service.state not in _DOWN
        if spec.run == "once" and spec.ready.kind == "start":
            return service.state is State.DONE
        return service.state in (State.READY, State.DONE)

    def _is_coming(self, service: Service) -> bool:
        """Whether it is being started, or will be, without anybody's help."""
        if service.name in self.orders:
            return self.orders[service.name] == "restart"
        if not service.wish_up:
            return False
        if service.state is State.BACKOFF:
            return service.name in self._waiting
        return service.state in (State.STARTING, State.STOPPING, State.STOPPED, State.READY)

    def _still_waits(self, service: Service) -> bool:
        at = State.LISTENING if service.spec.takes_connections else State.BACKOFF
        return service.wish_up and service.state is at

    def _is_over(self, service: Service) -> bool:
        """Ended, although it is there to run."""
        return service.state is State.DONE and service.spec.run == "always-on"

    def _is_down(self, name: str) -> bool:
        service = self.supervisor.services.get(name)
        return service is not None and not service.wish_up and service.is_stopped() and not self.supervisor.stopping

    def _wants_up(self, name: str) -> bool:
        return self.supervisor.services[name].wish_up

    def _rivals(self, name: str) -> list[str]:
        return [one for one in self.graph.rivals.get(name, ()) if one in self.supervisor.services]


def _names(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))
