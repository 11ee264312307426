"""The control socket from a client's side: real UNIX sockets, and just as much of a supervisor as it asks for."""

from __future__ import annotations

import functools
import json
import os
import socket
import stat
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from forked import in_child

from superd.core import varlink
from superd.core.interface import INTERFACE, INTERFACES
from superd.core.lifecycle import State
from superd.core.spec import DaemonSpec, Ready, ServiceSpec, Snapshot
from superd.manager import control, queries
from superd.manager.control import METHODS, ControlServer, control_address
from superd.manager.keeperlink import Inheritance
from superd.manager.logs import Log, Sink
from superd.manager.service import Statistics
from superd.manager.watch import Timers, Watch

TIMEOUT_S = 20.0  # of the whole of a test; reached only by a failure


class Keeper:
    """Remembers what it is told to hold; the fds are its own, as the real one's are."""

    def __init__(self) -> None:
        self.held: dict[str, list[int]] = {}

    def send(self, kind: str, fds: list[int] | tuple[int, ...] = (), **fields: Any) -> None:
        for fd in self.held.pop(fields["name"], []):
            os.close(fd)
        if kind == "store":
            self.held[fields["name"]] = [os.dup(fd) for fd in fds]


class Listeners:
    open: list[Any] = []
    waiting: dict[int, str] = {}

    def describe_waiting(self) -> str:
        return ""


class Service:
    """`then` says which states an order leads to; without it the state stays until `enter` is called."""

    def __init__(self, supervisor: Supervisor, name: str, state: State = State.STOPPED) -> None:
        self.supervisor, self.name, self.state = supervisor, name, state
        self.spec = ServiceSpec(name, f"/etc/{name}.toml", ("/bin/true",), "always-on", "listen-fds")
        self.since = time.monotonic()
        self.wish_up = state not in (State.STOPPED, State.DISABLED)
        self.note, self.endings, self.listeners = "", list[str](), Listeners()
        self.changed = trio.Event()
        self.acceptor: None = None
        self.orders: list[str] = []
        self.then: dict[str, State] = {}

    def enter(self, state: State, note: str = "") -> None:
        self.state, self.note, self.since = state, note, time.monotonic()
        self.changed.set()
        self.changed = trio.Event()

    def _order(self, verb: str) -> None:
        self.orders.append(verb)
        if verb in self.then:
            self.enter(self.then[verb])

    def ask_start(self) -> None:
        self.wish_up = True
        self._order("start")

    def ask_stop(self) -> None:
        self.wish_up = False
        self._order("stop")

    def ask_restart(self) -> None:
        self.wish_up = True
        self._order("restart")

    def mains(self) -> list[int]:
        return [4711] if self.state in (State.READY, State.STARTING, State.STOPPING) else []

    def tell_mains(self, signo: int) -> None:
        self.orders.append(f"signal {signo}")

    def is_stopped(self) -> bool:
        return self.state in (State.STOPPED, State.DONE, State.FAILED)

    def explain(self) -> str:
        return self.note

    def statistics(self) -> Statistics:
        mains = self.mains()
        return Statistics(
            self.name, self.state.value, self.since, mains[0] if mains else None, len(mains), 1, 0, (), self.note
        )


class Dependencies:
    """None: each order is one service's own."""

    def start(self, service: Service) -> None:
        service.ask_start()

    def stop(self, service: Service) -> None:
        service.ask_stop()

    def restart(self, service: Service) -> None:
        service.ask_restart()

    def is_under_way(self, service: Service) -> bool:
        return False

    def note(self, service: Service) -> str:
        return ""

    def required_by(self, name: str) -> list[str]:
        return []


class Supervisor:
    def __init__(self) -> None:
        self.dependencies = Dependencies()
        self.snapshot = Snapshot(DaemonSpec())
        self.keeper = Keeper()
        self.inheritance = Inheritance()
        self.null = os.open(os.devnull, os.O_WRONLY)
        self.log = Log(Sink(self.null))
        self.timers = Timers(self.guard, self.end_of_turn)
        self.watch = Watch(self.guard, self.timers, self.end_of_turn)
        self.services: dict[str, Service] = {}
        self.stopping = False
        self.leaving: list[Service] = []
        self.reloader = None
        self.caught: list[Exception] = []

    def guard(self, callback: Callable[[int], None], events: int) -> bool:
        try:
            callback(events)
        except Exception as error:
            self.caught.append(error)
            return False
        return True

    def end_of_turn(self) -> None:
        self.log.flush()

    def statistics(self) -> list[Statistics]:
        found = [service.statistics() for service in self.services.values()]
        for name, why in self.snapshot.broken.items():
            found.append(Statistics(name, "bad config", 0.0, None, 0, 0, 0, (), why))
        return sorted(found, key=lambda row: row.name)

    def shut_down(self) -> None:
        self.stopping = True

    def add(self, name: str, state: State = State.STOPPED) -> Service:
        self.services[name] = Service(self, name, state)
        return self.services[name]

    def messages(self) -> list[str]:
        return [record.message for name in (None, *self.services) for record in self.log.tail(name)]


class World:
    """A supervisor, a server that serves, and clients of it."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.supervisor = Supervisor()
        self.server = ControlServer(self.supervisor, f"unix:{path}")  # type: ignore[arg-type]
        self.scope = trio.CancelScope()

    async def serve(self) -> None:
        with self.scope:
            await self.server.serve()

    async def connect(self) -> Client:
        return Client(await trio.open_unix_socket(self.path))

    async def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The parameters of the reply, or {"error": its name, …}."""
        async with await self.connect() as client:
            return await client.call(method, **parameters)

    async def settle(self) -> None:
        """Until every connection that there was is answered and forgotten."""
        while self.server.clients.total():
            await trio.lowlevel.checkpoint()


class Client:
    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream
        self.splitter = varlink.Splitter(1 << 24)
        self.replies: list[bytes] = []

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *_: object) -> None:
        with trio.CancelScope(shield=True):
            await self.stream.aclose()

    async def send(self, method: str, *, more: bool = False, **parameters: Any) -> None:
        full = method if "." in method else f"{INTERFACE.name}.{method}"
        try:
            await self.stream.send_all(varlink.pack_call(full, parameters, more=more))
        except trio.BrokenResourceError:
            pass  # refused before it asked; why is there to be read

    async def receive(self) -> varlink.Reply | None:
        """None: the server has closed the connection."""
        while not self.replies:
            try:
                data = await self.stream.receive_some()
            except trio.BrokenResourceError:
                return None
            if not data:
                return None
            self.replies += self.splitter.feed(bytes(data))
        return varlink.parse_reply(self.replies.pop(0))

    async def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        await self.send(method, **parameters)
        reply = await self.receive()
        assert reply is not None, "no answer"
        if reply.error is not None:
            return {"error": reply.error.rpartition(".")[2], **reply.parameters}
        shape = INTERFACE.methods.get(method)
        if shape is not None:  # every answer is what the interface says
            assert INTERFACE.check(reply.parameters, shape[1]) is None, reply.parameters
        return reply.parameters


@asynccontextmanager
async def serving(path: Path | str) -> AsyncIterator[World]:
    world = World(str(path))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(world.supervisor.watch.run)
        nursery.start_soon(world.serve)
        while world.server._listener is None:
            await trio.lowlevel.checkpoint()
        try:
            yield world
        finally:
            nursery.cancel_scope.cancel()
    release(world)
    assert world.supervisor.caught == []


def release(world: World) -> None:
    for fds in world.supervisor.keeper.held.values():
        for fd in fds:
            os.close(fd)
    world.supervisor.log.sink.close()
    os.close(world.supervisor.null)
    world.supervisor.watch._epoll.close()


def in_trio(test: Callable[[World], Awaitable[None]]) -> Callable[[Path], None]:
    """Run the test with a server that serves."""

    def run(tmp_path: Path) -> None:
        async def main() -> None:
            with trio.fail_after(TIMEOUT_S):
                async with serving(tmp_path / "control.sock") as world:
                    await test(world)

        trio.run(main)

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    return run


# --- the interface


def test_every_method_has_a_function_and_no_function_is_hidden() -> None:  # J1
    shown = {f"{interface.name}.{name}" for interface in INTERFACES.values() for name in interface.methods}
    assert set(METHODS) == shown


@in_trio
async def test_introspection(world: World) -> None:
    info = await world.call("org.varlink.service.GetInfo")
    assert info["interfaces"] == ["io.superd.Control", "org.varlink.service"] and info["product"] == "superd"
    text = await world.call("org.varlink.service.GetInterfaceDescription", interface="io.superd.Control")
    assert varlink.Interface(text["description"]).methods == INTERFACE.methods
    answer = await world.call("org.varlink.service.GetInterfaceDescription", interface="x.y")
    assert answer == {"error": "InterfaceNotFound", "interface": "x.y"}


@pytest.mark.parametrize(
    ("method", "error"),
    [
        ("__class__", "InterfaceNotFound"),
        ("os.system", "InterfaceNotFound"),
        ("a.b", "InterfaceNotFound"),
        ("../x", "InterfaceNotFound"),
        ("io.superd.Control.", "MethodNotFound"),
        ("io.superd.Control.__init__", "MethodNotFound"),
        ("io.superd.Control.list", "MethodNotFound"),
        ("io.superd.Control.List\n", "MethodNotFound"),
        ("org.varlink.service.Upgrade", "MethodNotFound"),
    ],
)
def test_unknown_methods(tmp_path: Path, method: str, error: str) -> None:  # J1
    async def test(world: World) -> None:
        async with await world.connect() as client:
            await client.stream.send_all(varlink.pack_call(method, {}))
            reply = await client.receive()
            assert reply is not None and reply.error == f"org.varlink.service.{error}"
            assert "services" in await client.call("List")  # and the connection is still good

    in_trio(test)(tmp_path)


@in_trio
async def test_wrong_parameters(world: World) -> None:
    world.supervisor.add("web", State.READY)
    for method, parameters, wrong in (
        ("Stop", {}, "names"), ("Stop", {"names": "web"}, "names"), ("Stop", {"names": [1]}, "names"),
        ("Stop", {"names": ["web"], "force": True}, "force"), ("Wait", {"names": ["web"], "for": "ever"}, "for"),
        ("Logs", {"count": -1}, "count"), ("Kill", {"names": ["web"], "signal": "9"}, "signal"),
        ("Kill", {"names": ["web"], "signal": "_DFL"}, "signal"),
    ):  # fmt: skip
        assert await world.call(method, **parameters) == {"error": "InvalidParameter", "parameter": wrong}
    assert world.supervisor.services["web"].orders == []


# --- what arrives


@pytest.mark.parametrize("data", [b"x\0", b"\0", b"{}\0", b"[" * 60000 + b"\0", b"x" * ((64 << 10) + 1), b"\xff\0"])
def test_bad_calls_end_the_connection_with_a_reason(tmp_path: Path, data: bytes) -> None:  # J4, J8
    async def test(world: World) -> None:
        async with await world.connect() as client:
            await client.stream.send_all(data)
            reply = await client.receive()
            assert reply is not None and reply.error == "io.superd.Control.BadCall" and reply.parameters["reason"]
            assert await client.receive() is None
        assert "services" in await world.call("List")

    in_trio(test)(tmp_path)


@in_trio
async def test_half_a_close_after_the_call_still_gets_the_answer(world: World) -> None:
    web = world.supervisor.add("web", State.READY)
    async with await world.connect() as client:
        await client.send("Stop", names=["web"])
        await client.stream.send_eof()
        while not web.orders:
            await trio.lowlevel.checkpoint()
        web.enter(State.STOPPED)
        reply = await client.receive()
        assert reply is not None and reply.parameters["results"][0]["ok"]
        assert await client.receive() is None


@in_trio
async def test_many_calls_in_one_write(world: World) -> None:
    one = varlink.pack_call("io.superd.Control.Health", {})
    quiet = one[:-2] + b',"oneway":true}\0'
    async with await world.connect() as client:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.stream.send_all, (quiet * 3 + one) * 200)
            for _ in range(200):  # one answer for four calls
                assert await client.receive() is not None
        await client.stream.send_eof()
        assert await client.receive() is None


@in_trio
async def test_fds_are_dropped_by_the_kernel(world: World) -> None:  # J12
    read, write = os.pipe()
    conn = socket.socket(socket.AF_UNIX)
    conn.connect(world.path)
    client = Client(trio.SocketStream(trio.socket.from_stdlib_socket(conn)))
    async with client:
        socket.send_fds(conn, [varlink.pack_call("io.superd.Control.List", {})], [write] * 100)
        os.close(write)
        assert await client.receive() is not None
        os.set_blocking(read, False)
        assert os.read(read, 1) == b""  # nobody has the other end any more
    os.close(read)


@in_trio
async def test_a_client_that_leaves_while_it_waits_is_forgotten(world: World) -> None:  # J6
    web = world.supervisor.add("web", State.STOPPED)
    questions: list[tuple[str, dict[str, Any]]] = [
        ("Start", {"names": ["web"]}), ("Logs", {"follow": True}), ("Wait", {"names": ["web"], "for": "ready"}),
    ]  # fmt: skip
    for method, parameters in questions:
        web.enter(State.STARTING)
        async with await world.connect() as client:
            await client.send(method, more=True, **parameters)
            while not world.supervisor.watch._callbacks:
                await trio.lowlevel.checkpoint()
        await world.settle()
        assert not world.supervisor.watch._callbacks and not world.supervisor.log._subscribers


@in_trio
async def test_a_reset_in_the_middle_of_an_answer(world: World) -> None:  # J6
    for number in range(500):
        world.supervisor.log.message(f"{number} " + "x" * 500)
    for size in (0, 1, 100, 5000):
        async with await world.connect() as client:
            await client.send("Logs", more=True)
            if size:
                await client.stream.receive_some(size)
    await world.settle()
    assert "services" in await world.call("List")


def test_slow_and_silent_clients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # J4
    """They are let go after a time, and until then they do not keep anybody else out."""
    monkeypatch.setattr(control, "REQUEST_S", 0.3)

    async def test(world: World) -> None:
        async with await world.connect() as silent, await world.connect() as slow:
            await slow.stream.send_all(b"{")
            assert "services" in await world.call("List")
            assert await slow.receive() is None
            assert await silent.receive() is None

    in_trio(test)(tmp_path)


def test_a_client_that_never_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # J5
    monkeypatch.setattr(control, "REPLY_S", 0.05)

    async def test(world: World) -> None:
        async with await world.connect() as deaf:
            await deaf.send("Logs", more=True, follow=True)
            while not world.supervisor.log._subscribers:
                await trio.lowlevel.checkpoint()
            for _ in range(3000):
                world.supervisor.log.message("x" * 1000)
            await world.settle()
        assert not world.supervisor.log._subscribers

    in_trio(test)(tmp_path)


@in_trio
async def test_sixteen_of_one_user(world: World) -> None:  # J4
    clients = [await world.connect() for _ in range(control.CLIENTS_PER_UID)]
    for client in clients:
        await client.send("Events", more=True, follow=True)
    while sum(not one.idle for one in world.server._connected) < control.CLIENTS_PER_UID:
        await trio.lowlevel.checkpoint()
    assert await world.call("List") == {"error": "TooManyClients", "limit": control.CLIENTS_PER_UID}
    for client in clients:
        await client.stream.aclose()
    await world.settle()
    assert "services" in await world.call("List")


@in_trio
async def test_who_asks_for_nothing_makes_room(world: World) -> None:  # J4, X23
    clients = [await world.connect() for _ in range(control.CLIENTS_PER_UID)]
    for client in clients:
        await client.call("Health")
    assert "services" in await world.call("List")
    assert await clients[0].receive() is None, "the one that has been silent for longest was to go"
    assert "live" in await clients[-1].call("Health")
    for client in clients:
        await client.stream.aclose()
    await world.settle()
    assert not world.server._connected


def test_what_members_of_the_group_may_ask() -> None:  # J3
    acting = {"Start", "Stop", "Restart", "ReloadService", "Kill", "Shutdown"}
    may_not = {name.rpartition(".")[2] for name in METHODS.keys() - control.LOOKING}
    assert acting <= may_not
    assert not control.LOOKING - METHODS.keys()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be somebody else")
def test_another_user_is_refused_even_if_the_path_lets_him_in(tmp_path: Path) -> None:  # J3
    async def main() -> None:
        with trio.fail_after(TIMEOUT_S):
            async with serving(f"@superd-test-{os.getpid()}") as world:
                name = "\0" + world.path[1:]

                def ask() -> str:
                    os.setuid(65534)
                    with socket.socket(socket.AF_UNIX) as sock:
                        sock.connect(name)
                        return json.loads(sock.recv(4096)[:-1])["error"]

                said = await trio.to_thread.run_sync(functools.partial(in_child, ask))
                assert said == "org.varlink.service.PermissionDenied"
                assert "uid 65534" in world.supervisor.messages()[-1]

    trio.run(main)


def test_a_mistake_of_ours_ends_one_client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # F7
    async def broken(*_: object) -> dict[str, Any]:
        raise ZeroDivisionError("nobody expected this")

    monkeypatch.setitem(METHODS, "io.superd.Control.Health", broken)

    async def test(world: World) -> None:
        async with await world.connect() as client:
            await client.send("Health")
            assert await client.receive() is None
        assert "services" in await world.call("List")
        (error,) = world.supervisor.caught
        assert isinstance(error, ZeroDivisionError)
        world.supervisor.caught.clear()

    in_trio(test)(tmp_path)


# --- the socket


@in_trio
async def test_the_path(world: World) -> None:  # FAILURES.md (f) 4
    assert stat.S_IMODE(os.lstat(world.path).st_mode) == 0o600
    assert len(world.supervisor.keeper.held["control"]) == 2


def test_the_path_goes_when_superd_stops_and_only_then(tmp_path: Path) -> None:
    path = tmp_path / "new" / "control.sock"

    async def main(stopping: bool) -> None:
        async with serving(path) as world:
            assert stat.S_IMODE(path.parent.stat().st_mode) == 0o755
            world.supervisor.stopping = stopping

    trio.run(main, False)
    assert path.is_socket()
    trio.run(main, True)  # what the first one left is stale, and replaced
    assert not path.exists()


def test_a_path_that_somebody_else_has_put_there_stays(tmp_path: Path) -> None:
    path = tmp_path / "control.sock"

    async def main() -> None:
        async with serving(path) as world:
            world.supervisor.stopping = True
            path.unlink()
            path.write_text("mine")

    trio.run(main)
    assert path.read_text() == "mine"


def test_a_new_manager_adopts_the_listener(tmp_path: Path) -> None:
    path = tmp_path / "control.sock"

    async def main() -> None:
        with trio.fail_after(TIMEOUT_S):
            async with serving(path) as first:
                held = first.supervisor.keeper.held.pop("control")
            before = os.lstat(path).st_ino
            with socket.socket(socket.AF_UNIX) as waiting:
                waiting.connect(str(path))  # nobody accepts now; the kernel keeps it
                waiting.sendall(varlink.pack_call("io.superd.Control.List", {}))
                second = World(str(path))
                second.supervisor.inheritance.held["control"] = held
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(second.supervisor.watch.run)
                    nursery.start_soon(second.serve)
                    stream = trio.SocketStream(trio.socket.from_stdlib_socket(waiting.dup()))
                    async with Client(stream) as client:
                        assert await client.receive() is not None
                    assert os.lstat(path).st_ino == before
                    second.supervisor.stopping = True
                    nursery.cancel_scope.cancel()
                release(second)
            assert not path.exists()

    trio.run(main)


def test_another_path_is_not_adopted(tmp_path: Path) -> None:
    async def main() -> None:
        with trio.fail_after(TIMEOUT_S):
            async with serving(tmp_path / "old.sock") as first:
                held = first.supervisor.keeper.held.pop("control")
            second = World(str(tmp_path / "new.sock"))
            second.supervisor.inheritance.held["control"] = held
            async with trio.open_nursery() as nursery:
                nursery.start_soon(second.supervisor.watch.run)
                nursery.start_soon(second.serve)
                while second.server._listener is None:
                    await trio.lowlevel.checkpoint()
                assert "services" in await second.call("List")
                nursery.cancel_scope.cancel()
            release(second)

    trio.run(main)


def test_a_path_that_was_removed_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # D13
    monkeypatch.setattr(control, "_CHECK_PATH_S", 0.02)

    async def test(world: World) -> None:
        os.unlink(world.path)
        while not os.path.exists(world.path):
            await trio.lowlevel.checkpoint()
        assert "services" in await world.call("List")

    in_trio(test)(tmp_path)


@contextmanager
def live_socket(path: Path) -> Iterator[None]:
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        other.listen()
        yield


def test_a_socket_that_is_in_use_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # D14
    monkeypatch.setattr(control, "_RETRY_FIRST_S", 0.02)
    path = tmp_path / "control.sock"

    async def main() -> None:
        with trio.fail_after(TIMEOUT_S):
            world = World(str(path))
            async with trio.open_nursery() as nursery:
                nursery.start_soon(world.supervisor.watch.run)
                with live_socket(path):
                    nursery.start_soon(world.serve)
                    while not world.supervisor.messages():
                        await trio.lowlevel.checkpoint()
                assert f"pid {os.getpid()}" in world.supervisor.messages()[0]
                assert "services go on" in world.supervisor.messages()[0]
                while world.server._listener is None:
                    await trio.lowlevel.checkpoint()
                assert "services" in await world.call("List")
                nursery.cancel_scope.cancel()
            release(world)

    trio.run(main)


def test_it_is_open_before_anybody_is_told_so(tmp_path: Path) -> None:
    world = World(str(tmp_path / "control.sock"))
    world.server.open()
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(world.path)
    world.server._close()
    release(world)


@pytest.mark.parametrize("address", ["tcp:127.0.0.1:0", "relative.sock", "unix:/" + "x" * 200])
def test_an_address_that_cannot_be_is_a_warning(address: str) -> None:  # J2, D14
    world = World("unused")
    world.server = ControlServer(world.supervisor, address)  # type: ignore[arg-type]
    trio.run(world.serve)
    assert "write unix:/PATH" in world.supervisor.messages()[0]
    release(world)


def test_control_address() -> None:
    assert control_address("off", "unix:/b", {"SUPERD_SOCKET": "/c"}) is None
    assert control_address("unix:/a", "unix:/b", {"SUPERD_SOCKET": "/c"}) == "unix:/a"
    assert control_address(None, "unix:/b", {"SUPERD_SOCKET": "/c"}) == "/c"
    assert control_address(None, "unix:/b", {}) == "unix:/b"
    assert control_address(None, "off", {}) is None
    assert control_address(None, None, {}) == varlink.default_socket({}, os.geteuid())


# --- orders and questions


@in_trio
async def test_list(world: World) -> None:
    world.supervisor.add("web", State.READY)
    world.supervisor.snapshot.broken["bad"] = "line one\nline two"
    bad, web = (await world.call("List"))["services"]
    assert (web["name"], web["state"], web["pid"], web["now"]) == ("web", "ready", 4711, 1)
    assert (bad["name"], bad["state"], bad["pid"]) == ("bad", "bad config", None)
    assert (await world.call("List", names=["web", "web"]))["services"][0]["name"] == "web"
    details = (await world.call("Status", names=["bad", "web"]))["services"]
    assert details[0]["service"]["note"] == "line one\nline two"
    assert details[1]["file"] == "/etc/web.toml" and details[1]["command"] == ["/bin/true"]


@in_trio
async def test_a_service_that_is_not(world: World) -> None:
    world.supervisor.add("web")
    for method in ("List", "Status", "Connections", "Sockets", "Logs", "Events", "Start", "Stop", "Restart", "Kill"):
        answer = await world.call(method, names=["web", "wev"])
        assert answer == {"error": "NoSuchService", "name": "wev", "similar": ["web"]}
    assert world.supervisor.services["web"].orders == []  # all or nothing


@in_trio
async def test_start_waits_until_it_is_ready(world: World) -> None:
    web = world.supervisor.add("web")
    web.then["start"] = State.STARTING
    web.spec = replace(web.spec, ready=Ready("notify"))
    async with await world.connect() as client, trio.open_nursery() as nursery:
        nursery.start_soon(enter_when_ordered, web, "start", State.READY)
        (result,) = (await client.call("Start", names=["web"]))["results"]
    assert (result["ok"], result["changed"], result["state"], result["pid"]) == (True, True, "ready", 4711)
    assert any("start asked for by pid" in text for text in world.supervisor.messages())
    (again,) = (await world.call("Start", names=["web"]))["results"]
    assert (again["ok"], again["changed"]) == (True, False) and web.orders == ["start"]


async def enter_when_ordered(service: Service, verb: str, state: State, note: str = "") -> None:
    while verb not in service.orders:
        await trio.lowlevel.checkpoint()
    await trio.testing.wait_all_tasks_blocked()
    service.enter(state, note)


@in_trio
async def test_a_start_that_fails_says_why(world: World) -> None:
    web = world.supervisor.add("web")
    web.then["start"] = State.READY  # executed, which is not much
    world.supervisor.log.record("output", "of long ago", service="web")

    async def fail() -> None:
        while not web.orders:
            await trio.lowlevel.checkpoint()
        world.supervisor.log.record("output", "cannot bind: port taken", service="web")
        web.enter(State.FAILED, "exited with status 1")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(fail)
        (result,) = (await world.call("Start", names=["web"]))["results"]
    assert (result["ok"], result["state"], result["note"]) == (False, "failed", "exited with status 1")
    assert [record["message"] for record in result["records"]] == ["cannot bind: port taken"]


@in_trio
async def test_two_orders_that_conflict(world: World) -> None:
    web = world.supervisor.add("web", State.READY)
    web.then["stop"] = State.STOPPING
    async with await world.connect() as stopper:
        await stopper.send("Stop", names=["web"])
        while not web.orders:
            await trio.lowlevel.checkpoint()
        async with await world.connect() as starter:
            await starter.send("Start", names=["web"])
            while web.orders != ["stop", "start"]:
                await trio.lowlevel.checkpoint()
            web.enter(State.STARTING)
            stopped = await stopper.receive()
            assert stopped is not None and not stopped.parameters["results"][0]["ok"]
            web.enter(State.READY)
            started = await starter.receive()
            assert started is not None and started.parameters["results"][0]["ok"]


@in_trio
async def test_no_wait_and_services_that_cannot_be_started(world: World) -> None:
    world.supervisor.add("web")
    world.supervisor.snapshot.broken["bad"] = "line one\nline two"
    results = (await world.call("Start", names=["web", "bad"], wait=False))["results"]
    assert [(row["name"], row["ok"], row["note"]) for row in results] == [
        ("web", True, ""), ("bad", False, "line one"),
    ]  # fmt: skip
    world.supervisor.stopping = True
    (result,) = (await world.call("Start", names=["web"]))["results"]
    assert not result["ok"] and "stopping" in result["note"]


@in_trio
async def test_wait(world: World) -> None:
    web = world.supervisor.add("web", State.READY)
    for condition in ("ready", "active"):
        assert (await world.call("Wait", names=["web"], **{"for": condition}))["results"][0]["ok"]
    async with await world.connect() as client:
        await client.send("Wait", names=["web"], **{"for": "stopped"})
        while not world.supervisor.watch._callbacks:
            await trio.lowlevel.checkpoint()
        web.enter(State.STOPPING)
        web.enter(State.FAILED, "killed")
        reply = await client.receive()
        assert reply is not None and reply.parameters["results"][0]["ok"]
    (result,) = (await world.call("Wait", names=["web"], **{"for": "ready"}))["results"]
    assert (result["ok"], result["note"]) == (False, "killed")  # by itself it will not
    assert (await world.call("Wait", names=["web"], **{"for": "idle"}))["results"][0]["ok"]
    assert web.orders == []


@in_trio
async def test_is(world: World) -> None:
    for state in State:
        world.supervisor.add(state.name.lower(), state)
    names = list(world.supervisor.services)
    for what, yes in (
        ("active", ["listening", "starting", "ready"]), ("ready", ["ready"]), ("failed", ["failed"]),
    ):  # fmt: skip
        assert (await world.call("Is", names=names, what=what))["yes"] == yes


@in_trio
async def test_kill(world: World) -> None:
    web, off = world.supervisor.add("web", State.READY), world.supervisor.add("off")
    results = (await world.call("Kill", names=["web", "off"], signal="SIGHUP"))["results"]
    assert [row["ok"] for row in results] == [True, False]
    assert (web.orders, off.orders) == (["signal 1"], [])


@in_trio
async def test_health(world: World) -> None:
    web = world.supervisor.add("web", State.READY)
    assert await world.call("Health") == {"live": True, "ready": True, "problems": []}
    web.enter(State.BACKOFF, "exited")
    assert await world.call("Health") == {"live": True, "ready": False, "problems": ["web: backoff: exited"]}
    web.enter(State.STARTING)
    assert (await world.call("Health"))["problems"] == ["web: starting"]
    web.spec = replace(web.spec, run="on-demand")
    assert (await world.call("Health"))["ready"]
    world.supervisor.snapshot.broken["bad"] = "unknown key"
    assert (await world.call("Health"))["problems"] == ["bad: bad config: unknown key"]


@in_trio
async def test_shutdown(world: World) -> None:
    answer = await world.call("Shutdown")
    assert answer["pid"] == os.getppid() and world.supervisor.stopping


# --- logs


@in_trio
async def test_logs_and_events(world: World) -> None:
    world.supervisor.add("web")
    world.supervisor.add("dns")
    log = world.supervisor.log
    log.message("of superd")
    log.record("output", "one", service="web")
    log.record("start", service="web", pid=7, connection="1-1", peer="127.0.0.1:5")
    log.record("exit", service="web", pid=7, status=0, duration=0.25)
    log.record("output", "two \udcff\x1b[31m", service="dns", level="err")

    async def said(method: str, **parameters: Any) -> list[str]:
        found = (await world.call(method, **parameters))["records"]
        return [record["message"] or record["event"] for record in found]

    assert await said("Logs") == ["of superd", "one", "two \\udcff\x1b[31m"]
    assert await said("Logs", names=["web"]) == ["one"]
    assert await said("Logs", count=1) == ["two \\udcff\x1b[31m"]
    assert await said("Logs", count=0) == []
    assert await said("Events") == ["start", "exit"]
    assert await said("Events", names=["dns"]) == []
    exit_ = (await world.call("Events", count=1))["records"][0]
    assert exit_["fields"] == {"status": 0, "duration": 0.25}
    assert (await world.call("Logs", follow=True))["error"] == "ExpectedMore"


@in_trio
async def test_follow(world: World) -> None:
    log = world.supervisor.log
    world.supervisor.add("web")
    log.record("output", "before", service="web")
    async with await world.connect() as client:
        await client.send("Logs", more=True, names=["web"], follow=True)
        first = await client.receive()
        assert first is not None and first.continues and first.parameters["records"][0]["message"] == "before"
        log.record("output", "of another", service="dns")
        log.record("start", service="web")
        log.record("output", "after", service="web")
        then = await client.receive()
        assert then is not None and [r["message"] for r in then.parameters["records"]] == ["after"]


@in_trio
async def test_a_long_log_comes_in_pieces(world: World) -> None:
    for number in range(900):
        world.supervisor.log.message(f"{number} " + "x" * 1000)
    async with await world.connect() as client:
        await client.send("Logs", more=True)
        found: list[int] = []
        replies = 0
        more = True
        while more:
            reply = await client.receive()
            assert reply is not None
            more, replies = reply.continues, replies + 1
            found += [int(record["message"].split()[0]) for record in reply.parameters["records"]]
    assert replies > 3 and found[-1] == 899 and found == list(range(found[0], 900))


def test_a_slow_reader_loses_the_oldest_lines_and_is_told() -> None:  # J5
    async def main() -> None:
        feed = queries._Feed([])
        log = Log(Sink(-1))
        log.subscribe(feed.add)
        for number in range(queries._FEED_RECORDS + 7):
            log.message(str(number))
        first = feed.take(1000)
        assert first["lost"] == 7 and first["records"][0]["message"] == "7"
        rest = feed.take(None)
        assert rest["lost"] == 0 and rest["records"][-1]["message"] == str(queries._FEED_RECORDS + 6)
        assert not feed.has_more()
        for _ in range(3):
            log.message("x" * queries._FEED_BYTES)
        assert feed.take(None)["lost"] >= 2

    trio.run(main)
