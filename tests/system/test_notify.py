"""system/notify.py: datagrams of services, good and bad, over a real socket."""

from __future__ import annotations

import array
import contextlib
import os
import select
import socket
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from forked import in_child
from hypothesis import given
from hypothesis import strategies as st

from superd.system.notify import (
    Message,
    address_of,
    close_socket,
    is_fd_name,
    is_same_file,
    number,
    open_socket,
    parse,
    pid_of,
    receive,
)


@pytest.fixture
def directory() -> Iterator[str]:
    """Short enough for a socket's path, whatever pytest calls the test; and others may enter."""
    with tempfile.TemporaryDirectory(prefix="superd-") as path:
        os.chmod(path, 0o755)
        yield path


@pytest.fixture
def sock(directory: str) -> Iterator[socket.socket]:
    sock = open_socket(directory, "web", os.geteuid(), os.getpid())
    yield sock
    close_socket(sock)


@contextlib.contextmanager
def sender(sock: socket.socket) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as client:
        client.connect(address_of(sock))
        yield client


def send(sock: socket.socket, data: bytes, fds: list[int] | None = None) -> None:
    with sender(sock) as client:
        if fds:
            client.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))])
        else:
            client.send(data)


def received(sock: socket.socket) -> Message:
    message = receive(sock)
    assert message is not None
    return message


# --- text

GOOD: list[tuple[bytes, dict[str, str]]] = [
    (b"READY=1", {"READY": "1"}),
    (b"READY=1\n", {"READY": "1"}),
    (b"READY=1\0", {"READY": "1"}),  # one trailing NUL is tolerated
    (b"READY=1\nSTATUS=a = b\nX_SUPERD_Y=z", {"READY": "1", "STATUS": "a = b", "X_SUPERD_Y": "z"}),
    (b"STATUS=first\nSTATUS=second", {"STATUS": "first"}),  # I9: the first counts
    (b"STATUS=\xc3\xbc\x1b[31m", {"STATUS": "ü\x1b[31m"}),  # what is shown is escaped there (I8)
    (b"STATUS=", {"STATUS": ""}),
    (b"READY=1\nSTATUS=\xc3(\xff", {"READY": "1", "STATUS": "\ufffd(\ufffd"}),
    (b"READY=2", {"READY": "2"}),
    (b"MAINPID=-1\nWATCHDOG_USEC=1" + b"0" * 30, {"MAINPID": "-1", "WATCHDOG_USEC": "1" + "0" * 30}),
    (b"nonsense\n\nREADY=1", {"READY": "1"}),
    (b"\n" * 4000 + b"READY=1", {"READY": "1"}),
    (b"X=" + b"y" * 4094, {"X": "y" * 4094}),  # 4096 bytes
]
BAD = [
    b"", b"\0", b"READY", b"=1", b"=", b"\n", b"READY=1\0\0", b"\0READY=1", b"READY=1\nX=\0\n", b"\xff\xfe",
]  # fmt: skip


@pytest.mark.parametrize(("data", "fields"), GOOD, ids=lambda value: repr(value)[:30])
def test_good_messages(sock: socket.socket, data: bytes, fields: dict[str, str]) -> None:
    assert parse(data) == fields
    send(sock, data)
    message = received(sock)
    assert (message.pid, message.uid, message.fields, message.fds) == (os.getpid(), os.geteuid(), fields, [])
    assert receive(sock) is None


@pytest.mark.parametrize("data", BAD, ids=repr)
def test_bad_messages_are_datagrams_that_say_nothing(sock: socket.socket, data: bytes) -> None:  # I1, I9
    assert parse(data) == {}
    send(sock, data)
    send(sock, b"READY=1")
    assert received(sock).fields == {}
    assert received(sock).fields == {"READY": "1"}
    assert receive(sock) is None


@pytest.mark.parametrize("size", [4097, 5000, 100_000, 200_000])
def test_oversized_messages_are_dropped_whole(sock: socket.socket, size: int) -> None:  # I9
    data = b"READY=1\nX=" + b"y" * size
    send(sock, data[:size])
    send(sock, b"READY=1")
    assert received(sock).fields == {}
    assert received(sock).fields == {"READY": "1"}


@given(st.binary(max_size=300))
def test_any_bytes_parse(data: bytes) -> None:
    for name, value in parse(data).items():
        assert name
        assert "\n" not in name + value
        assert "\0" not in name + value


def test_empty_datagrams_do_not_end_it(sock: socket.socket) -> None:  # I1
    for _ in range(10_000):
        send(sock, b"")
        assert received(sock).fields == {}
    assert receive(sock) is None
    send(sock, b"READY=1")
    assert received(sock).fields == {"READY": "1"}


# --- who


def test_the_kernel_says_who(sock: socket.socket) -> None:  # I5
    """A sender that has exited is still told by its pid; an honest claim needs no SO_PASSCRED of its own."""

    def child() -> int:
        send(sock, b"READY=1")
        return os.getpid()

    pid = in_child(child)
    message = received(sock)
    assert (message.pid, message.fields) == (pid, {"READY": "1"})


@pytest.mark.parametrize("uid", [0, 65534])
def test_only_the_user_of_the_service_may_send(directory: str, uid: int, root: None) -> None:  # I14, I3
    sock = open_socket(directory, "web", uid, os.getpid())
    try:
        found = os.stat(address_of(sock))
        assert (stat.S_IMODE(found.st_mode), found.st_uid) == (0o600, uid)
        assert stat.S_IMODE(os.stat(os.path.dirname(address_of(sock))).st_mode) == 0o711

        def as_user(other: int) -> str:
            def child() -> str:
                os.setgroups([])
                os.setresgid(65534, 65534, 65534)
                os.setresuid(other, other, other)
                try:
                    send(sock, b"READY=1")
                except PermissionError:
                    return "refused"
                return "sent"

            result: str = in_child(child)
            return result

        assert as_user(1) == "refused"
        assert receive(sock) is None
        assert as_user(uid) == "sent"
        assert received(sock).uid == uid
    finally:
        close_socket(sock)


# --- fds


def test_fds_are_ours_and_close_on_exec(sock: socket.socket) -> None:  # I7
    with open("/dev/null", "rb") as file:
        send(sock, b"FDSTORE=1\nFDNAME=x", [file.fileno()] * 3)
        message = received(sock)
        assert message.fields == {"FDSTORE": "1", "FDNAME": "x"}
        assert len(message.fds) == 3
        assert not any(map(os.get_inheritable, message.fds))
        assert all(os.path.sameopenfile(fd, file.fileno()) for fd in message.fds)
    message.close()
    assert message.fds == []


def test_closing_answers_a_barrier(sock: socket.socket) -> None:  # I4
    reader, writer = os.pipe()
    send(sock, b"BARRIER=1", [writer])
    os.close(writer)
    hung_up = select.poll()
    hung_up.register(reader, select.POLLHUP)
    message = received(sock)
    assert hung_up.poll(0) == []
    message.close()
    assert hung_up.poll(10_000) == [(reader, select.POLLHUP)]
    os.close(reader)


@pytest.mark.parametrize("data", [b"FDSTORE=1", b"", b"STATUS=x", b"X=\0\0", b"y" * 5000, b"BARRIER=1"])
@pytest.mark.parametrize("count", [1, 2, 16, 253])
def test_fd_stuffing(sock: socket.socket, data: bytes, count: int) -> None:  # I7, X24: fds flat (ends_as_it_began)
    with open("/dev/null", "rb") as file:
        for _ in range(5):
            send(sock, data, [file.fileno()] * count)
            message = received(sock)
            assert len(message.fds) == count
            message.close()


@pytest.mark.parametrize("kind", ["memfd", "closed peer", "epoll", "socket itself"])
def test_odd_fds(sock: socket.socket, kind: str) -> None:
    a, b = socket.socketpair()
    with a, b, select.epoll() as epoll:
        memfd = os.memfd_create("x", os.MFD_CLOEXEC)
        if kind == "closed peer":
            b.close()
        fd = {"memfd": memfd, "closed peer": a.fileno(), "epoll": epoll.fileno(), "socket itself": sock.fileno()}[kind]
        send(sock, b"FDSTORE=1", [fd])
        message = received(sock)
        assert len(message.fds) == 1
        message.close()
        os.close(memfd)


def test_truncated_control_data_drops_the_message(sock: socket.socket) -> None:  # I7: EMFILE cuts what is received
    with open("/dev/null", "rb") as file:
        send(sock, b"READY=1", [file.fileno()] * 5)
        send(sock, b"STATUS=whole")

    def child() -> list[object]:
        import resource

        highest = max(map(int, os.listdir("/proc/self/fd")))
        while (last := os.dup(0)) < highest:
            pass
        resource.setrlimit(resource.RLIMIT_NOFILE, (last + 3, last + 3))
        message = received(sock)
        fields = message.fields
        message.close()
        again = [os.dup(0), os.dup(0)]
        return [fields, len(again), received(sock).fields]

    assert in_child(child) == [{}, 2, {"STATUS": "whole"}]


# --- the socket


def test_an_error_is_told(sock: socket.socket) -> None:  # I2
    class Broken(socket.socket):
        def recvmsg(self, *_: object) -> tuple[bytes, list[tuple[int, int, bytes]], int, object]:  # type: ignore[override]
            raise OSError(5, "injected")

    with Broken(fileno=os.dup(sock.fileno())) as broken:
        with pytest.raises(OSError, match="injected"):
            receive(broken)
    send(sock, b"READY=1")
    assert received(sock).fields == {"READY": "1"}


def test_order_is_kept(sock: socket.socket) -> None:  # I13 needs it
    for i in range(5):
        send(sock, b"STATUS=%d" % i)
    assert [received(sock).fields["STATUS"] for _ in range(5)] == ["0", "1", "2", "3", "4"]


def test_an_old_socket_is_replaced_and_the_path_goes_with_it(directory: str) -> None:
    first = open_socket(directory, "web", os.geteuid(), os.getpid())
    first.close()  # as by kill -9: the path stays
    second = open_socket(directory, "web", os.geteuid(), os.getpid())
    path = Path(address_of(second))
    assert path == Path(directory, "notify", f"web.{os.getpid()}")
    assert not second.getblocking()
    send(second, b"READY=1")
    assert received(second).fields == {"READY": "1"}
    close_socket(second)
    assert not path.exists()


def test_what_a_killed_superd_left_is_removed(directory: str) -> None:
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    folder = Path(directory, "notify")
    folder.mkdir()
    left, alive, other = (folder / name for name in (f"web.{child}", f"web.{os.getppid()}", f"web2.{child}"))
    for path in (left, alive, other):
        path.touch()
    close_socket(open_socket(directory, "web", os.geteuid(), os.getpid()))
    assert (left.exists(), alive.exists(), other.exists()) == (False, True, True)


def test_it_is_never_wider_than_0600(directory: str) -> None:  # D3
    umask = os.umask(0)
    try:
        sock = open_socket(directory, "web", os.geteuid(), os.getpid())
        assert stat.S_IMODE(os.stat(address_of(sock)).st_mode) == 0o600
        close_socket(sock)
    finally:
        os.umask(umask)


def test_what_cannot_be_opened_leaks_nothing(directory: str) -> None:
    with pytest.raises(OSError):
        open_socket(directory, "x" * 200, os.geteuid(), os.getpid())
    Path(directory, "notify", f"sub.{os.getpid()}").mkdir()
    with pytest.raises(OSError):
        open_socket(directory, "sub", os.geteuid(), os.getpid())


# --- what stands in messages


@pytest.mark.parametrize(
    ("text", "value"),
    [("0", 0), ("7", 7), ("007", 7), ("18446744073709551615", (1 << 64) - 1), ("18446744073709551616", None),
     ("1" + "0" * 30, None), ("-1", None), ("+1", None), ("", None), (" 1", None), ("1.5", None), ("0x10", None),
     ("\u0661", None), (None, None)],
)  # fmt: skip
def test_numbers(text: str | None, value: int | None) -> None:
    assert number(text) == value


@pytest.mark.parametrize("name", ["a", "stored", "a b", "x" * 255, "/=%"])
def test_fd_names(name: str) -> None:
    assert is_fd_name(name)


@pytest.mark.parametrize("name", ["", "a:b", ":", "x" * 256, "a\x7f", "a\tb", "\ufffd", "\xfc"])
def test_no_fd_names(name: str) -> None:
    assert not is_fd_name(name)


def test_same_file() -> None:
    """A duplicate is; another open of the same path, or the other end, is not."""
    one, two = (os.open("/etc/passwd", os.O_RDONLY) for _ in range(2))
    copy = os.dup(one)
    a, b = socket.socketpair()
    with a, b, a.dup() as other:
        assert is_same_file(one, copy) and is_same_file(a.fileno(), other.fileno())
        assert not is_same_file(a.fileno(), b.fileno()) and not is_same_file(one, a.fileno())
        if tuple(map(int, os.uname().release.split(".")[:2])) >= (6, 10):
            assert not is_same_file(one, two)
    for fd in (one, two, copy):
        os.close(fd)


def test_pid_of_a_pidfd() -> None:
    child = os.fork()
    if child == 0:
        os._exit(0)
    pidfd = os.pidfd_open(child)
    assert pid_of(pidfd) == child
    os.waitpid(child, 0)
    assert pid_of(pidfd) is None
    assert pid_of(0) is None
    os.close(pidfd)
