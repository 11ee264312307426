"""system/fdpass.py: packets with fds, over real sockets."""

from __future__ import annotations

import array
import contextlib
import errno
import os
import resource
import socket
from collections.abc import Callable, Iterator

import pytest
from forked import in_child

from superd.system import fdpass
from superd.system.fdpass import MAX_FDS, CutMessage, close_all, receive, send

Ends = tuple[socket.socket, socket.socket]


@pytest.fixture
def ends() -> Iterator[Ends]:
    a, b = fdpass.channel()
    with a, b:
        yield a, b


@contextlib.contextmanager
def pipes(count: int) -> Iterator[list[int]]:
    """`count` fds of one pipe's reading end."""
    reader, writer = os.pipe()
    fds = [reader, *(os.dup(reader) for _ in range(count - 1))]
    try:
        yield fds
    finally:
        close_all([*fds, writer])


def same_file(a: int, b: int) -> bool:
    return os.path.sameopenfile(a, b)


@pytest.mark.parametrize("size", [1, 3999, 4000, 4001, 100_000, 2_000_000])
@pytest.mark.parametrize("count", [0, 1, 3, MAX_FDS])
def test_text_and_fds_arrive(ends: Ends, size: int, count: int) -> None:
    data = os.urandom(size - 1) + b"x"
    with pipes(max(count, 1)) as fds:
        send(ends[0], data, fds[:count])
        found, received = receive(ends[1])
        try:
            assert found == data
            assert len(received) == count
            assert all(same_file(fds[0], fd) for fd in received)
            assert not any(map(os.get_inheritable, received))  # E1
            for fd in fds:
                os.fstat(fd)  # the sender's stay the sender's
        finally:
            close_all(received)


def test_order_of_fds_and_packets(ends: Ends) -> None:
    files = [os.memfd_create(str(i), os.MFD_CLOEXEC) for i in range(5)]
    send(ends[0], b"first", files)
    send(ends[0], b"second")
    data, received = receive(ends[1])
    assert data == b"first"
    assert [os.fstat(fd).st_ino for fd in received] == [os.fstat(fd).st_ino for fd in files]
    assert receive(ends[1]) == (b"second", [])
    close_all(files)
    close_all(received)
    assert files == received == []


def test_a_zero_byte_of_text_is_text(ends: Ends) -> None:
    """The mark of a text in a memfd needs its fd: without one it is a message like another."""
    send(ends[0], b"\0")
    assert receive(ends[1]) == (b"\0", [])


def test_nothing_there(ends: Ends) -> None:
    with pytest.raises(BlockingIOError):
        receive(ends[0], socket.MSG_DONTWAIT)
    ends[0].setblocking(False)
    with pytest.raises(BlockingIOError):
        receive(ends[0])


def test_a_peer_that_has_gone(ends: Ends) -> None:
    send(ends[1], b"last words")
    ends[1].close()
    assert receive(ends[0]) == (b"last words", [])
    assert receive(ends[0]) == (b"", [])
    with pytest.raises((BrokenPipeError, ConnectionResetError)):  # and no SIGPIPE
        send(ends[0], b"x")


def test_a_peer_that_went_with_unread_packets(ends: Ends) -> None:
    send(ends[0], b"unread")
    ends[1].close()
    with pytest.raises(ConnectionError):
        receive(ends[0])
    assert receive(ends[0]) == (b"", [])


def test_a_peer_that_does_not_read(ends: Ends) -> None:
    """Some hundred packets fit; then BlockingIOError, and nothing leaks of what could not be sent."""
    with pipes(1) as fds:
        sent = 0
        with pytest.raises(BlockingIOError):
            while True:
                send(ends[0], b"x" * 5000, fds, socket.MSG_DONTWAIT)
                sent += 1
        assert sent >= 100
        for _ in range(sent):
            data, received = receive(ends[1])
            assert len(data) == 5000
            close_all(received)


def low_on_fds(free: int, action: Callable[[], object]) -> object:
    """Run `action` in a forked child that can open `free` more fds."""

    def child() -> object:
        highest = max(map(int, os.listdir("/proc/self/fd")))
        while (last := os.dup(0)) < highest:  # fill the holes
            pass
        resource.setrlimit(resource.RLIMIT_NOFILE, (last + 1 + free, last + 1 + free))
        return action()

    return in_child(child)


@pytest.mark.parametrize("free", range(6))
def test_cut_message(ends: Ends, free: int) -> None:  # X2, I7
    """Half of the fds is worth nothing: none stays open, the text tells whom to answer, the next packet is whole."""
    with pipes(5) as fds:
        send(ends[0], b"go 7", fds)
        send(ends[0], b"next")

        def action() -> object:
            try:
                data, received = receive(ends[1])
            except CutMessage as error:
                cut = [error.data.decode(), error.errno]
            else:
                cut = [data.decode(), len(received)]
                close_all(received)
            opened = []
            with contextlib.suppress(OSError):
                while True:
                    opened.append(os.dup(0))
            still = len(opened)
            close_all(opened)
            return [cut, still, receive(ends[1])[0].decode()]

        cut, still, following = low_on_fds(free, action)  # type: ignore[misc]
        assert cut == (["go 7", 5] if free >= 5 else ["go 7", errno.EMFILE])
        assert still == free
        assert following == "next"


def test_foreign_ancillary_data(ends: Ends) -> None:
    """A packet of another's making: 253 fds, the most there can be, are more than fit, and none stays."""
    with pipes(1) as fds:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds * 253))]
        ends[0].sendmsg([b"x"], rights)
        with pytest.raises(CutMessage):
            receive(ends[1])
