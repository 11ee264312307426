"""system/queues.py with real listeners: who waits, by name."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from superd.system.queues import waiting


@pytest.fixture(params=["tcp", "tcp6", "dual", "unix", "abstract"])
def listener(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[socket.socket]:
    kind: str = request.param
    if kind in ("unix", "abstract"):
        sock = socket.socket(socket.AF_UNIX)
        sock.bind(str(tmp_path / "s") if kind == "unix" else f"\0superd-queues-{os.getpid()}")
    elif kind == "dual":
        sock = socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    else:
        sock = socket.socket(socket.AF_INET if kind == "tcp" else socket.AF_INET6)
        sock.bind(("127.0.0.1" if kind == "tcp" else "::1", 0))
    with sock:
        sock.listen(16)
        yield sock


def connect(listener: socket.socket) -> socket.socket:
    if listener.family == socket.AF_UNIX:
        client = socket.socket(socket.AF_UNIX)
        client.connect(listener.getsockname())
        return client
    host, port = listener.getsockname()[:2]
    return socket.create_connection(("127.0.0.1" if host == "::" else host, port))


def test_names_stay_and_go_with_their_connections(listener: socket.socket) -> None:  # B7
    with ExitStack() as stack:
        assert waiting(listener.fileno()) == frozenset()
        stack.enter_context(connect(listener))
        stack.enter_context(connect(listener))
        two = waiting(listener.fileno())
        assert two is not None and len(two) == 2
        stack.enter_context(connect(listener))
        three = waiting(listener.fileno())
        assert three is not None and two < three and len(three) == 3
        # One is taken and another comes: as many as before, but not the same.
        stack.enter_context(listener.accept()[0])
        stack.enter_context(connect(listener))
        again = waiting(listener.fileno())
        assert again is not None and len(again) == 3 and not two <= again


def test_who_has_said_all_waits_too(listener: socket.socket) -> None:
    with connect(listener) as client:
        client.shutdown(socket.SHUT_WR)
        found = waiting(listener.fileno())
        assert found is not None and len(found) == 1


def test_more_than_a_packet_holds() -> None:
    with ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=600))
        for _ in range(500):  # each is 72 bytes and a header
            stack.enter_context(socket.create_connection(listener.getsockname()))
        found = waiting(listener.fileno())
        assert found is not None and len(found) == 500


def test_the_same_port_elsewhere_is_somebody_else() -> None:
    with socket.create_server(("127.0.0.1", 0)) as ours:
        with socket.create_server(("127.0.0.2", ours.getsockname()[1])) as other:
            with socket.create_connection(other.getsockname()):
                assert waiting(ours.fileno()) == frozenset() != waiting(other.fileno())


def test_what_has_no_accept_queue() -> None:
    with socket.socket(socket.AF_VSOCK) as sock:
        assert waiting(sock.fileno()) is None
