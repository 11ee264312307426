"""system/usage.py, on real sockets: what is noticed although superd takes no part in it."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from harness import eventually

from superd.system.usage import Usage


@contextmanager
def usage(fd: int, path: str | None = None) -> Iterator[Usage]:
    with closing(Usage(fd, path)) as found:
        assert not found.used()
        yield found
        assert not found.used()


def noticed(found: Usage) -> None:
    """Once: the kernel tells of the end of a connection a moment later, from a work queue."""
    eventually(found.used, True)
    eventually(found.used, False)


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "::1", "::"])
def test_tcp(host: str) -> None:
    """A connection in the queue, one that is open, and one that has come and gone; also over a dual-stack socket."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, 0), family=family, dualstack_ipv6=host == "::") as listener:
        port = listener.getsockname()[1]
        with usage(listener.fileno()) as found, socket.create_server(("127.0.0.2", 0)) as other:
            for target in {"::": ["::1", "127.0.0.1"], "0.0.0.0": ["127.0.0.1"]}.get(host, [host]):
                with socket.create_connection((target, port)) as client:
                    assert found.used() and found.used()
                    server, _ = listener.accept()
                    with server:
                        assert found.used() and found.used()
                        client.shutdown(socket.SHUT_WR)
                        assert found.used() and found.used()
                noticed(found)
                with socket.create_connection((target, port)), listener.accept()[0]:
                    pass
                noticed(found)
            with socket.create_connection(other.getsockname()), other.accept()[0]:
                assert not found.used()


def test_udp() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock, socket.socket(type=socket.SOCK_DGRAM) as client:
        sock.bind(("127.0.0.1", 0))
        with usage(sock.fileno()) as found:
            for _ in range(2):
                client.sendto(b"x", sock.getsockname())
                assert found.used() and found.used()
                sock.recv(1)
                client.sendto(b"x", sock.getsockname())
                sock.recv(1)
                assert found.used() and not found.used()


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_SEQPACKET])
@pytest.mark.parametrize("abstract", [False, True])
def test_unix_connections(tmp_path: Path, kind: int, abstract: bool) -> None:
    path = f"{tmp_path}/s"
    with socket.socket(socket.AF_UNIX, kind) as listener:
        listener.bind(f"\0{path}" if abstract else path)
        listener.listen()
        with usage(listener.fileno(), None if abstract else path) as found:
            for _ in range(2):
                with socket.socket(socket.AF_UNIX, kind) as client:
                    client.connect(listener.getsockname())
                    assert found.used() and found.used()
                    server, _ = listener.accept()
                    with server:
                        assert found.used() and found.used()
                assert not found.used()
                with socket.socket(socket.AF_UNIX, kind) as client:
                    client.connect(listener.getsockname())
                    listener.accept()[0].close()
                assert found.used() is not abstract  # come and gone
                assert not found.used()


def test_unix_datagrams(tmp_path: Path) -> None:
    path = f"{tmp_path}/s"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock, socket.socket(socket.AF_UNIX, sock.type) as client:
        sock.bind(path)
        with usage(sock.fileno(), path) as found:
            for _ in range(2):
                client.sendto(b"x", path)
                assert found.used() and found.used()
                sock.recv(1)
                assert not found.used()
                client.sendto(b"x", path)
                sock.recv(1)
                assert found.used() and not found.used()


def test_fifo(tmp_path: Path) -> None:
    path = tmp_path / "fifo"
    os.mkfifo(path)
    fd = os.open(path, os.O_RDWR)
    try:
        with usage(fd) as found:
            os.write(fd, b"x")
            assert found.used() and found.used()
            os.read(fd, 1)
            assert not found.used()
    finally:
        os.close(fd)
