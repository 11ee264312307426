"""system/sockets.py and system/holders.py against the kernel: real sockets, loopback only."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import resource
import select
import signal
import socket
import stat
import struct
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from forked import in_child

from superd.core.spec import Address, KeepAlive, SocketSpec
from superd.manager.activation import host_of
from superd.system import holders, peers, sockets
from superd.system.sockets import BindError, Bound

root_only = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
NOBODY = 65534
ANY = Address("tcp", port=0)
LOOP = Address("tcp", "127.0.0.1", 0)
UDP = Address("udp", "127.0.0.1", 0)


def spec(address: Address, **options: Any) -> SocketSpec:
    return SocketSpec(address, "test", **options)


def unix(path: object, **options: Any) -> SocketSpec:
    return spec(Address("unix", path=str(path)), **options)


def bind(wanted: SocketSpec, **keywords: Any) -> list[Bound]:
    return sockets.bind_listener(wanted, **{"inherited": {}, "trusted_uid": os.geteuid(), **keywords})


@contextmanager
def opened(wanted: SocketSpec, **keywords: Any) -> Iterator[tuple[socket.socket, Bound]]:
    """The only listener of a table, and a socket object that owns it."""
    (bound,) = bind(wanted, **keywords)
    with socket.socket(fileno=bound.fd) as sock:
        yield sock, bound


def refused(wanted: SocketSpec, **keywords: Any) -> BindError:
    with pytest.raises(BindError) as caught:
        for bound in bind(wanted, **keywords):
            os.close(bound.fd)
    return caught.value


def connect(bound: Bound) -> socket.socket:
    host = bound.address.host
    six = host is not None and ":" in host
    client = socket.socket(socket.AF_INET6 if six else socket.AF_INET)
    client.connect((host or "127.0.0.1", bound.address.port))
    return client


def port_of(bound: Bound) -> int:
    assert bound.address.port
    return bound.address.port


def socket_modes(path: Path) -> tuple[int, int, int]:
    status = path.lstat()
    assert stat.S_ISSOCK(status.st_mode)
    return stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid


def stale_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
        dead.listen()


@contextmanager
def public_directory(mode: int, uid: int = 0) -> Iterator[Path]:
    """Below /tmp, where an unprivileged child can go too, unlike tmp_path."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, mode)
        os.chown(name, uid, -1)
        yield Path(name)


def become_nobody() -> None:
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)


def private_network(up: bool = True) -> None:
    """This process into an empty network namespace (unshare(2)), its loopback up."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(0x40000000):
        raise OSError(ctypes.get_errno(), "unshare")
    if up:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
            fcntl.ioctl(any_socket, 0x8914, struct.pack("16sH14x", b"lo", 1 | 8 | 64))  # SIOCSIFFLAGS


# IP


@pytest.mark.parametrize(
    ("address", "family", "v6only", "canonical"),
    [
        (Address("tcp", port=0), socket.AF_INET6, 0, "tcp:{}"),
        (Address("tcp4", port=0), socket.AF_INET, None, "tcp4:{}"),
        (Address("tcp6", port=0), socket.AF_INET6, 1, "tcp6:{}"),
        (Address("tcp", "127.0.0.1", 0), socket.AF_INET, None, "tcp:127.0.0.1:{}"),
        (Address("tcp", "::1", 0), socket.AF_INET6, None, "tcp:[::1]:{}"),
        (Address("tcp", "::", 0), socket.AF_INET6, 0, "tcp:[::]:{}"),
        (Address("tcp", "::1%lo", 0), socket.AF_INET6, None, "tcp:[::1%lo]:{}"),
        (Address("udp", port=0), socket.AF_INET6, 0, "udp:{}"),
        (Address("udp4", "localhost", 0), socket.AF_INET, None, "udp4:127.0.0.1:{}"),
        (Address("udp6", "localhost", 0), socket.AF_INET6, 1, "udp6:[::1]:{}"),
    ],
    ids=str,
)
def test_ip_families(address: Address, family: int, v6only: int | None, canonical: str) -> None:
    with opened(spec(address)) as (sock, bound):
        assert sock.family == family
        if v6only is not None:
            assert sock.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY) == v6only
        assert port_of(bound) == sock.getsockname()[1]
        assert str(bound.address) == canonical.format(bound.address.port)
        assert bound.identity is None
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) == (address.kind == "stream")
        assert not os.get_inheritable(bound.fd)  # E4
        assert os.get_blocking(bound.fd)  # A16: the open file description is shared with the service


def test_dual_stack_peers_are_plain_ipv4() -> None:  # A8
    with opened(spec(ANY)) as (sock, bound), connect(bound) as client:
        fd, (host, port) = sockets.accept(sock)
        os.close(fd)
        assert host_of((host, port)) == "127.0.0.1" and port == client.getsockname()[1]


def test_localhost_has_both_families_on_one_port() -> None:
    schemes: tuple[Any, ...] = ("tcp", "udp")
    for scheme in schemes:
        with ExitStack() as stack:
            bound = bind(spec(Address(scheme, "localhost", 0)))
            for one in bound:
                stack.callback(os.close, one.fd)
            assert [one.address.host for one in bound] == ["127.0.0.1", "::1"]
            assert port_of(bound[0]) == port_of(bound[1])


def test_localhost_is_all_or_nothing() -> None:
    with opened(spec(Address("tcp", "::1", 0))) as (_, taken):
        error = refused(spec(Address("tcp", "localhost", port_of(taken))))  # no fd is left: see conftest.py
        assert (error.errno, str(error.address)) == (errno.EADDRINUSE, str(taken.address))


@root_only
def test_ipv4_alone_where_there_is_no_ipv6() -> None:
    def check() -> list[str]:
        # seccomp would be exact; an address family that refuses is what the code sees.
        original = socket.socket

        class NoIPv6(original):  # type: ignore[misc, valid-type]
            def __init__(self, family: int = -1, *rest: Any, **keywords: Any) -> None:
                if family == socket.AF_INET6:
                    raise OSError(errno.EAFNOSUPPORT, os.strerror(errno.EAFNOSUPPORT))
                super().__init__(family, *rest, **keywords)

        socket.socket = NoIPv6  # type: ignore[misc]
        return [one.address.scheme + "/" + str(one.address.host) for a in (ANY, replace(ANY, host="localhost"))
                for one in bind(spec(a))]  # fmt: skip

    assert in_child(check) == ["tcp4/None", "tcp/127.0.0.1"]


@root_only
def test_localhost_without_an_ipv6_loopback_address() -> None:
    def check() -> tuple[list[str | None], int]:
        private_network(up=False)  # ::1 comes with the interface, 127.0.0.1 can be bound without
        before = len(os.listdir("/proc/self/fd"))
        bound = bind(spec(Address("tcp", "localhost", 0)))
        return [one.address.host for one in bound], len(os.listdir("/proc/self/fd")) - before

    assert in_child(check) == [["127.0.0.1"], 1]


def test_udp_port_is_not_shared() -> None:  # A11
    with opened(spec(UDP)) as (_, bound):
        assert refused(spec(bound.address)).errno == errno.EADDRINUSE
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as thief:
            thief.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with pytest.raises(OSError) as caught:
                thief.bind(("127.0.0.1", port_of(bound)))
            assert caught.value.errno == errno.EADDRINUSE


def test_tcp_port_can_be_bound_again_at_once() -> None:  # P2: connections in TIME-WAIT do not matter
    with opened(spec(LOOP)) as (sock, bound):
        client = connect(bound)
        sock.accept()[0].close()  # the server closes first and keeps the TIME-WAIT
        client.close()
    with opened(spec(bound.address)) as (_, again):
        assert again.address == bound.address


def test_busy_port_says_who_holds_it() -> None:  # A14, A12: the address is in the error
    with opened(spec(LOOP)) as (_, bound):
        error = refused(spec(bound.address), find_holder=holders.find_holder)
        assert (error.errno, error.stage, error.retry) == (errno.EADDRINUSE, "bind", True)
        assert error.address == bound.address
        comm = Path("/proc/self/comm").read_text().strip()
        assert str(error) == f"address already in use by pid {os.getpid()} ({comm})"
        assert str(refused(spec(bound.address))) == "address already in use"
    with opened(spec(bound.address)):  # A14: free again
        pass


@root_only
def test_address_that_is_not_there_yet() -> None:  # A13
    def check() -> list[object]:
        private_network()
        there = Address("tcp", "10.9.9.9", 0)
        error = refused(spec(there))
        early = bind(spec(there, free_bind=True))[0].address.host
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
            packed = struct.pack("16sHH4s8x", b"lo:1", socket.AF_INET, 0, socket.inet_aton("10.9.9.9"))
            fcntl.ioctl(any_socket, 0x8916, packed)  # SIOCSIFADDR
        return [error.errno, error.stage, error.retry, str(error), early, bind(spec(there))[0].address.host]

    text = "cannot assign requested address"
    assert in_child(check) == [errno.EADDRNOTAVAIL, "bind", True, text, "10.9.9.9", "10.9.9.9"]


def test_missing_interface_is_waited_for() -> None:
    error = refused(spec(Address("tcp", "fe80::1%nope0", 0)))
    assert (error.errno, error.retry, str(error)) == (errno.ENODEV, True, "there is no interface 'nope0'")


@root_only
def test_port_without_privilege() -> None:
    def check() -> list[object]:
        private_network()  # where ip_unprivileged_port_start is 1024
        become_nobody()
        error = refused(spec(Address("tcp", "127.0.0.1", 80)))
        return [error.errno, error.retry, str(error)]

    assert in_child(check) == [errno.EACCES, True, "permission denied: a port below 1024 needs CAP_NET_BIND_SERVICE"]


# Options: what getsockopt says afterwards

SOL, IP, IP6, TCP = socket.SOL_SOCKET, socket.IPPROTO_IP, socket.IPPROTO_IPV6, socket.IPPROTO_TCP


@pytest.mark.parametrize(
    ("address", "options", "expected"),
    [
        (ANY, {"reuse_port": True}, {(SOL, socket.SO_REUSEPORT): 1}),
        (ANY, {"free_bind": True}, {(IP, 15): 1, (IP6, 78): 1}),
        (LOOP, {"no_delay": True}, {(TCP, socket.TCP_NODELAY): 1}),
        (LOOP, {"keep_alive": KeepAlive()}, {(SOL, socket.SO_KEEPALIVE): 1}),
        (
            LOOP,
            {"keep_alive": KeepAlive(61.5, 7, 3)},
            {(SOL, socket.SO_KEEPALIVE): 1, (TCP, socket.TCP_KEEPIDLE): 62, (TCP, socket.TCP_KEEPINTVL): 7,
             (TCP, socket.TCP_KEEPCNT): 3},
        ),
        (LOOP, {"tos": 0x10}, {(IP, socket.IP_TOS): 0x10}),
        (ANY, {"tos": 0x10, "ttl": 5}, {(IP, socket.IP_TOS): 0x10, (IP6, socket.IPV6_TCLASS): 0x10,
                                        (IP, socket.IP_TTL): 5, (IP6, socket.IPV6_UNICAST_HOPS): 5}),
        (LOOP, {"tos": 0x10, "priority": 3}, {(SOL, socket.SO_PRIORITY): 3}),
        (UDP, {"broadcast": True}, {(SOL, socket.SO_BROADCAST): 1}),
        (UDP, {"timestamping": True}, {(SOL, 35): 1}),
        (UDP, {"pass_packet_info": True}, {(IP, 8): 1}),
        (Address("udp", port=0), {"pass_packet_info": True}, {(IP, 8): 1, (IP6, socket.IPV6_RECVPKTINFO): 1}),
        (LOOP, {"protocol": "mptcp"}, {(SOL, socket.SO_PROTOCOL): 262}),
        (UDP, {"protocol": "udplite"}, {(SOL, socket.SO_PROTOCOL): 136}),
        (Address("unix", path="@superd-test-option"), {"pass_credentials": True}, {(SOL, socket.SO_PASSCRED): 1}),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) and isinstance(next(iter(value)), str) else "",
)  # fmt: skip
def test_options(address: Address, options: dict[str, Any], expected: dict[tuple[int, int], int]) -> None:
    def values(sock: socket.socket) -> dict[tuple[int, int], int]:
        return {key: sock.getsockopt(*key) for key in expected}

    try:
        with opened(spec(address)) as (plain, _):
            assert all(values(plain)[key] != value for key, value in expected.items()), "would prove nothing"
        with opened(spec(address, **options)) as (sock, _):
            assert values(sock) == expected
    except BindError as error:
        if error.errno == errno.EPROTONOSUPPORT and "protocol" in options:
            pytest.skip(f"this kernel has no {options['protocol']}")
        raise


@root_only
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"transparent": True}, {(IP, socket.IP_TRANSPARENT): 1, (IP6, 75): 1}),
        ({"mark": 7}, {(SOL, socket.SO_MARK): 7}),
        ({"mark": 0xFFFFFFFE}, {(SOL, socket.SO_MARK): -2}),  # getsockopt reads it as signed
        ({"receive_buffer": 16 << 20}, {(SOL, socket.SO_RCVBUF): 32 << 20}),  # beyond rmem_max; the kernel doubles it
        ({"send_buffer": 16 << 20}, {(SOL, socket.SO_SNDBUF): 32 << 20}),
    ],
    ids=lambda value: ",".join(map(str, value)),
)
def test_privileged_options(options: dict[str, Any], expected: dict[tuple[int, int], int]) -> None:
    with opened(spec(ANY, **options)) as (sock, _):
        assert {key: sock.getsockopt(*key) for key in expected} == expected


@root_only
def test_buffers_and_privileged_options_as_nobody() -> None:
    def check() -> list[object]:
        become_nobody()
        with opened(spec(LOOP, receive_buffer=50_000)) as (sock, _):
            size = sock.getsockopt(SOL, socket.SO_RCVBUF)
        error = refused(spec(LOOP, mark=7))
        return [size, error.stage, error.errno, error.retry]

    assert in_child(check) == [100_000, "option mark", errno.EPERM, False]


def test_text_options() -> None:
    with opened(spec(LOOP, congestion="reno", device="lo", defer_accept_s=1.5)) as (sock, bound):
        assert sock.getsockopt(TCP, socket.TCP_CONGESTION, 16).rstrip(b"\0") == b"reno"
        assert sock.getsockopt(SOL, socket.SO_BINDTODEVICE, 16).rstrip(b"\0") == b"lo"
        assert sock.getsockopt(TCP, socket.TCP_DEFER_ACCEPT) >= 2
        with connect(bound) as client:
            client.send(b"x")  # only now is there anything to accept
            conn, _ = sock.accept()
            conn.close()


@pytest.mark.parametrize("address", [UDP, Address("udp", port=0)], ids=str)
def test_multicast(address: Address) -> None:
    # To 127.0.0.1 no group datagram comes, so the kernel's list has to do for both.
    def groups() -> tuple[str, str]:
        return Path("/proc/net/igmp").read_text(), Path("/proc/net/igmp6").read_text()

    four = "{:08X}".format(struct.unpack("=I", socket.inet_aton("239.7.7.7"))[0])
    six = socket.inet_pton(socket.AF_INET6, "ff15::77").hex()
    dual = address.host is None
    wanted = spec(address, multicast=("239.7.7.7%lo", *(("ff15::77%lo",) if dual else ())))
    with opened(wanted) as (sock, bound):
        assert four in groups()[0] and (six in groups()[1]) == dual
        sockets.apply_options(bound.fd, wanted)  # joined already: no error
        sockets.apply_options(bound.fd, replace(wanted, multicast=()), was=wanted)
        assert four not in groups()[0] and six not in groups()[1]
        assert sock.fileno() == bound.fd


@pytest.mark.parametrize(
    ("address", "options", "number", "retry"),
    [
        (UDP, {"no_delay": True}, errno.EOPNOTSUPP, False),
        (UDP, {"keep_alive": KeepAlive()}, errno.EOPNOTSUPP, False),
        (UDP, {"congestion": "reno"}, errno.EOPNOTSUPP, False),
        (UDP, {"defer_accept_s": 1.0}, errno.EOPNOTSUPP, False),
        (LOOP, {"congestion": "nonsense"}, errno.ENOENT, False),
        (LOOP, {"device": "nope0"}, errno.ENODEV, True),
        (LOOP, {"ttl": 300}, errno.EINVAL, False),
        (LOOP, {"tos": 1 << 40}, errno.EINVAL, False),
        (LOOP, {"pass_credentials": True}, errno.EOPNOTSUPP, False),
        (UDP, {"multicast": ("239.7.7.7%nope0",)}, errno.ENODEV, True),
        (UDP, {"multicast": ("banana",)}, errno.EINVAL, False),
        (LOOP, {"protocol": "udplite"}, errno.EPROTONOSUPPORT, False),
        (LOOP, {"mode": 0o600}, errno.EOPNOTSUPP, False),
        (LOOP, {"symlinks": ("/tmp/x",)}, errno.EOPNOTSUPP, False),
        (Address("unix", path="@superd-test"), {"mark": 1}, errno.EOPNOTSUPP, False),
        (Address("unix", path="@superd-test"), {"protocol": "mptcp"}, errno.EPROTONOSUPPORT, False),
        # D10: a mode or an owner would be protection that is not there
        (Address("unix", path="@superd-test"), {"mode": 0o600}, errno.EOPNOTSUPP, False),
        (Address("unix", path="@superd-test"), {"user": 0}, errno.EOPNOTSUPP, False),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_option_that_cannot_be_set_names_its_key(
    address: Address, options: dict[str, Any], number: int, retry: bool
) -> None:
    error = refused(spec(address, **options))
    key = next(iter(options)).removesuffix("_s")
    assert (error.stage, error.errno, error.retry) == (f"option {key}", number, retry)
    assert str(error).startswith(f"option {key}: ")


def test_options_of_a_live_listener() -> None:
    before = spec(LOOP, no_delay=True, keep_alive=KeepAlive(60), tos=16, ttl=9, backlog=5, defer_accept_s=3)
    with opened(before) as (sock, bound):
        assert sockets.queue_length(bound.fd) == (0, 5)
        after = spec(LOOP, ttl=8, backlog=9)
        sockets.apply_options(bound.fd, after, was=before)
        assert [sock.getsockopt(TCP, socket.TCP_NODELAY), sock.getsockopt(SOL, socket.SO_KEEPALIVE)] == [0, 0]
        assert [sock.getsockopt(IP, socket.IP_TOS), sock.getsockopt(IP, socket.IP_TTL)] == [0, 8]
        assert sock.getsockopt(TCP, socket.TCP_DEFER_ACCEPT) == 0
        assert sockets.queue_length(bound.fd) == (0, 9)
        sockets.apply_options(bound.fd, spec(LOOP), was=after)
        assert sock.getsockopt(IP, socket.IP_TTL) not in (8, 9)
    with opened(spec(LOOP, congestion="reno")) as (_, bound), pytest.raises(BindError) as caught:
        sockets.apply_options(bound.fd, spec(LOOP), was=spec(LOOP, congestion="reno"))
    assert (caught.value.errno, caught.value.stage) == (errno.ENOTSUP, "option congestion")


def test_backlog_holds_a_burst() -> None:  # A17
    with opened(spec(LOOP)) as (_, bound), ExitStack() as stack:
        waiting, room = sockets.queue_length(bound.fd) or (0, 0)
        somaxconn = int(Path("/proc/sys/net/core/somaxconn").read_text())
        assert (waiting, room) == (0, min(4096, somaxconn))
        for _ in range(100):
            stack.enter_context(connect(bound))
        assert sockets.queue_length(bound.fd) == (100, room)
    with opened(spec(UDP)) as (_, bound):
        assert sockets.queue_length(bound.fd) is None
    with opened(unix("@superd-test-queue")) as (_, bound):
        assert sockets.queue_length(bound.fd) is None


# UNIX paths


@pytest.mark.parametrize("scheme", ["unix", "unix-dgram", "unix-seqpacket"])  # C6: datagrams as carefully as streams
@pytest.mark.parametrize("umask", [0o000, 0o022, 0o777])
def test_path_has_its_mode_whatever_the_umask(tmp_path: Path, scheme: Any, umask: int) -> None:  # D3
    path = tmp_path / "a.sock"
    for mode in (0o666, 0o640, 0o600):

        def check(mode: int = mode) -> bool:
            os.umask(umask)
            (bound,) = bind(spec(Address(scheme, path=str(path)), mode=mode))
            found = socket_modes(path)[0]
            same = sockets.path_is_ours(str(path), bound.identity) if bound.identity else False
            assert os.umask(umask) == umask
            return found == mode and same and sockets.remove_unix_path(str(path), bound.identity or (0, 0))

        assert in_child(check)
        assert not path.exists()


@root_only
def test_path_is_never_wider_than_it_ends(tmp_path: Path) -> None:  # D3, with an owner to be changed as well
    path = tmp_path / "a.sock"
    seen: set[tuple[int, int, int]] = set()
    stop = threading.Event()

    def watch() -> None:
        while not stop.is_set():
            try:
                seen.add(socket_modes(path))
            except FileNotFoundError:
                pass

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        for _ in range(150):
            with opened(unix(path, mode=0o060, user=NOBODY, group=NOBODY)) as (_, bound):
                assert socket_modes(path) == (0o060, NOBODY, NOBODY)
                assert bound.identity and sockets.remove_unix_path(str(path), bound.identity)
    finally:
        stop.set()
        watcher.join()
    assert {mode for mode, uid, gid in seen if (uid, gid) != (NOBODY, NOBODY)} <= {0}
    assert {mode for mode, *_ in seen} <= {0, 0o060}


@root_only
def test_owner_by_name_and_number(tmp_path: Path) -> None:
    for user, group, expected in (("nobody", None, 65534), (NOBODY, "root", 0), (None, "nogroup", 65534)):
        with opened(unix(tmp_path / f"{user}{group}", user=user, group=group)) as (_, bound):
            _, uid, gid = socket_modes(tmp_path / f"{user}{group}")
            assert (uid, gid) == (0 if user is None else NOBODY, expected)
            assert bound.identity is not None
    error = refused(unix(tmp_path / "x", user="no-such-user"))
    assert (error.stage, error.retry) == ("owner", True) and "no-such-user" in str(error)


def test_path_too_long_or_empty() -> None:  # D8, D9, F13
    for path, number in (("/tmp/" + "x" * 103, errno.ENAMETOOLONG), ("", errno.EINVAL), ("@", errno.EINVAL),
                         ("@" + "x" * 108, errno.ENAMETOOLONG), ("/tmp/a\0b", errno.EINVAL)):  # fmt: skip
        error = refused(unix(path))
        assert (error.errno, error.stage, error.retry) == (number, "path", False)
    assert refused(unix("relative/x")).stage == "directory"
    assert str(refused(unix("/tmp/" + "x" * 115))) == "path: has 120 bytes, and a UNIX socket has room for 107"


def test_longest_path(tmp_path: Path) -> None:
    path = f"{tmp_path}/".ljust(107, "x")
    with opened(unix(path)) as (sock, _):
        assert sock.getsockname() == path
    with opened(unix("@" + "superd".ljust(107, "x"))) as (sock, bound):
        assert sock.getsockname() == b"\0" + os.fsencode(bound.address.path or "")[1:]
        assert bound.identity is None


@pytest.mark.parametrize("scheme", ["unix", "unix-dgram", "unix-seqpacket"])
def test_stale_is_replaced_and_live_is_not(tmp_path: Path, scheme: Any) -> None:  # D4
    path = tmp_path / "a.sock"
    wanted = spec(Address(scheme, path=str(path)), backlog=0)
    with opened(wanted) as (_, first):
        error = refused(wanted, find_holder=holders.find_holder)
        assert (error.errno, error.retry) == (errno.EADDRINUSE, True)
        assert f"by pid {os.getpid()} (" in str(error)
        # alive whatever the type that is asked for, and with a full backlog
        other = spec(Address("unix" if scheme == "unix-dgram" else "unix-dgram", path=str(path)))
        assert refused(other).errno == errno.EADDRINUSE
        assert first.identity and sockets.path_is_ours(str(path), first.identity)
    assert path.is_socket()  # left behind, as after kill -9
    with opened(wanted) as (_, second):
        assert second.identity and sockets.path_is_ours(str(path), second.identity)


def test_full_backlog_is_alive(tmp_path: Path) -> None:  # D4: EAGAIN
    path = tmp_path / "a.sock"
    with opened(unix(path, backlog=0)), socket.socket(socket.AF_UNIX) as a, socket.socket(socket.AF_UNIX) as b:
        a.connect(str(path))
        b.setblocking(False)
        with pytest.raises(BlockingIOError):
            b.connect(str(path))
        assert refused(unix(path)).errno == errno.EADDRINUSE


def test_bound_but_not_yet_listening_is_alive(tmp_path: Path) -> None:  # D4: it refuses connections, too
    path = tmp_path / "a.sock"
    with socket.socket(socket.AF_UNIX) as slow:
        slow.bind(str(path))
        assert refused(unix(path)).errno == errno.EADDRINUSE
        slow.listen()


def test_a_look_at_all_sockets_serves_many_stale_ones_and_no_young_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # D4
    looks = 0

    def counting(file: object, *args: object) -> object:
        nonlocal looks
        looks += file == "/proc/net/unix"
        return open(file, *args)  # type: ignore[call-overload]

    monkeypatch.setattr("superd.system.sockets.open", counting, raising=False)
    paths = [tmp_path / f"{number}.sock" for number in range(20)]
    for path in paths:
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(str(path))
    monkeypatch.setattr(sockets, "_bound_only", [(0.0, 0.0, set())])
    with ExitStack() as stack:
        with monkeypatch.context() as patch:
            patch.setattr(sockets, "_LOOK_MARGIN_S", 0)  # as if they were old
            for path in paths:
                stack.enter_context(opened(unix(path)))
        assert looks == 1
        with socket.socket(socket.AF_UNIX) as slow:
            slow.bind(str(tmp_path / "young.sock"))
            assert refused(unix(tmp_path / "young.sock")).errno == errno.EADDRINUSE
        assert looks == 2


def test_what_is_no_socket_stays(tmp_path: Path) -> None:  # D2, D4, D12
    target = tmp_path / "target"
    target.write_text("precious")
    (tmp_path / "dead").symlink_to(tmp_path / "nowhere")
    (tmp_path / "link").symlink_to(target)
    (tmp_path / "dir").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name, text in (("target", "a file"), ("link", "a symbolic link"), ("dead", "a symbolic link"),
                       ("dir", "a directory"), ("pipe", "a FIFO")):  # fmt: skip
        error = refused(unix(tmp_path / name))
        assert (error.errno, error.retry, str(error)) == (errno.EEXIST, True, f"{text} is in the way")
    assert target.read_text() == "precious"
    assert sorted(os.listdir(tmp_path)) == ["dead", "dir", "link", "pipe", "target"]
    (tmp_path / "dir").rmdir()  # D12: and then it comes right
    with opened(unix(tmp_path / "dir")):
        pass


def test_missing_directories_are_made(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "c.sock"
    with opened(unix(path, directory_mode=0o711)):
        assert [stat.S_IMODE(p.stat().st_mode) for p in (path.parent, path.parent.parent)] == [0o711, 0o711]
    (tmp_path / "file").write_text("")
    error = refused(unix(tmp_path / "file" / "x"))
    assert (error.stage, error.errno, error.retry) == ("directory", errno.ENOTDIR, True)


def test_a_directory_that_cannot_be_made() -> None:
    error = refused(unix(Path("/proc/none/a.sock")))
    assert (str(error), error.retry) == ("directory: cannot make '/proc/none': no such file or directory", True)


@root_only
def test_directories_made_have_their_mode_whatever_the_umask(tmp_path: Path) -> None:
    def check() -> int:
        os.umask(0o077)
        bind(unix(tmp_path / "d" / "x", directory_mode=0o755))
        return stat.S_IMODE((tmp_path / "d").stat().st_mode)

    assert in_child(check) == 0o755


@root_only
@pytest.mark.parametrize(
    ("mode", "uid", "trusted", "reason"),
    [
        (0o755, 0, 0, ""),
        (0o755, NOBODY, NOBODY, ""),
        (0o755, NOBODY, 1, "belongs to uid 65534"),
        (0o777, 0, 0, "has mode 0777"),
        (0o775, 0, 0, "has mode 0775"),
        (0o1777, 0, 0, ""),
    ],
)
def test_who_else_could_replace_the_socket(mode: int, uid: int, trusted: int, reason: str) -> None:  # D1
    with public_directory(mode, uid) as parent:
        for wanted in (unix(parent / "a"), spec(Address("fifo", path=str(parent / "b"))), unix(parent / "new" / "c")):
            if reason:
                error = refused(wanted, trusted_uid=trusted)
                assert (error.stage, error.errno, error.retry) == ("directory", errno.EPERM, True)
                assert str(error) == f"directory: {parent} {reason}: other users could replace the socket"
                assert not os.listdir(parent)
            else:
                with opened_fd(wanted, trusted_uid=trusted) as bound:
                    assert bound.identity
        if mode & stat.S_ISVTX:
            assert refused(unix(parent / "x"), allow_sticky=False).stage == "directory"


@contextmanager
def opened_fd(wanted: SocketSpec, **keywords: Any) -> Iterator[Bound]:
    """As opened(), for FIFOs too."""
    (bound,) = bind(wanted, **keywords)
    try:
        yield bound
    finally:
        os.close(bound.fd)


@root_only
def test_a_link_on_the_way_counts_as_well() -> None:  # D1, D2
    with public_directory(0o755) as safe, public_directory(0o777) as open_to_all:
        (safe / "link").symlink_to(open_to_all)
        assert str(open_to_all) in str(refused(unix(safe / "link" / "x")))
        (open_to_all / "back").symlink_to(safe)
        assert refused(unix(open_to_all / "back" / "x")).stage == "directory"
        link = safe / "theirs"
        link.symlink_to(safe)
        os.lchown(link, NOBODY, NOBODY)
        assert str(link) in str(refused(unix(link / "x")))
        os.lchown(link, 0, 0)
        with opened(unix(link / "x")):
            pass


@root_only
def test_in_a_user_namespace_without_the_real_root() -> None:  # "/" belongs to nobody there
    def check() -> str:
        libc = ctypes.CDLL(None, use_errno=True)
        with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR", "/tmp")) as name:
            os.chown(name, 1234, 1234)
            os.setgroups([])
            os.setgid(1234)
            os.setuid(1234)
            ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)  # PR_SET_DUMPABLE: setuid has made /proc/self root's
            if libc.unshare(0x10000000):
                return "no user namespaces"
            Path("/proc/self/setgroups").write_text("deny")
            Path("/proc/self/uid_map").write_text("0 1234 1")
            assert os.geteuid() == 0 and os.stat("/").st_uid == NOBODY
            sockets._nobody_at_all.cache_clear()
            (bound,) = bind(unix(f"{name}/x"))
            os.close(bound.fd)
        return "bound"

    result = in_child(check)
    if result != "bound":
        pytest.skip(result)


@root_only
def test_unprivileged_superd(tmp_path: Path) -> None:
    with public_directory(0o755, NOBODY) as parent, public_directory(0o755) as foreign:

        def check() -> list[object]:
            become_nobody()
            os.umask(0o077)
            with opened(unix(parent / "a", mode=0o666)):
                mode = socket_modes(parent / "a")[0]
            with opened(unix(parent / "a")):  # its own stale one
                pass
            os.close(bind(spec(Address("fifo", path=str(parent / "f")), mode=0o622))[0].fd)
            error = refused(unix(foreign / "x"))
            owner = refused(unix(parent / "b", user="root"))
            return [mode, error.stage, error.errno, error.retry, owner.stage, owner.errno, sorted(os.listdir(parent))]

        assert in_child(check) == [0o666, "bind", errno.EACCES, True, "owner", errno.EPERM, ["a", "f"]]


@root_only
def test_without_proc() -> None:
    with public_directory(0o755) as ours, public_directory(0o755, NOBODY) as theirs:

        def check() -> list[object]:
            libc = ctypes.CDLL(None, use_errno=True)
            assert libc.unshare(0x20000) == 0  # CLONE_NEWNS
            assert libc.mount(b"none", b"/", None, 0x44000, None) == 0  # MS_REC | MS_PRIVATE
            assert libc.mount(b"none", b"/proc", b"tmpfs", 0, None) == 0
            assert not os.path.exists("/proc/self")
            stale_socket(ours / "a")
            with opened(unix(ours / "a", mode=0o660, user=NOBODY)) as (_, bound):
                found = socket_modes(ours / "a")
                again = refused(unix(ours / "a"), find_holder=holders.find_holder)
            with opened(unix(theirs / "a", mode=0o600), trusted_uid=NOBODY):  # nothing to change after bind
                pass
            # There its owner could have us change the mode of any file
            error = refused(unix(theirs / "b", mode=0o666), trusted_uid=NOBODY)
            with opened(spec(LOOP)) as (_, bound):
                str(refused(spec(bound.address), find_holder=holders.find_holder))
            return [*found, str(again), error.stage, error.errno]

        result = in_child(check)
        assert result == [0o660, NOBODY, NOBODY, "address already in use", "mode", errno.EPERM]


@root_only
def test_swapped_for_a_symlink_again_and_again() -> None:  # D6: the service's user owns the directory and plays tricks
    with public_directory(0o755, NOBODY) as parent, public_directory(0o755) as elsewhere:
        canary = elsewhere / "canary"
        canary.write_text("precious")
        canary.chmod(0o600)
        path = parent / "a.sock"
        pid = os.fork()
        if pid == 0:
            try:
                become_nobody()
                while True:
                    try:
                        os.symlink(canary, parent / "trick")
                        os.replace(parent / "trick", path)
                        os.unlink(path)
                    except OSError:
                        pass
            finally:
                os._exit(0)
        try:
            results = set()
            for _ in range(400):
                try:
                    (bound,) = bind(unix(path, mode=0o666, user=NOBODY), trusted_uid=NOBODY)
                    os.close(bound.fd)
                    results.add("bound")
                except BindError as error:
                    results.add(error.stage)
        finally:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        assert results <= {"bound", "bind", "path", "owner", "mode", "listen"}
        status = canary.stat()
        assert (stat.S_IMODE(status.st_mode), status.st_uid, canary.read_text()) == (0o600, 0, "precious")


def test_symlinks(tmp_path: Path) -> None:
    path, link, other = tmp_path / "a.sock", tmp_path / "links" / "one", tmp_path / "two"
    other.symlink_to("/nowhere")  # from an earlier configuration
    with opened(unix(path, symlinks=(str(link), str(other)))) as (_, bound):
        assert [os.readlink(link), os.readlink(other)] == [str(path)] * 2
        other.unlink()
        other.symlink_to("/elsewhere")  # somebody else's by now
        assert bound.identity
        assert sockets.remove_unix_path(str(path), bound.identity, (str(link), str(other)))
    assert not path.exists() and not os.path.lexists(link) and os.readlink(other) == "/elsewhere"
    other.unlink()
    other.write_text("precious")
    error = refused(unix(path, symlinks=(str(link), str(other))))
    assert (error.stage, error.errno) == ("symlinks", errno.EEXIST) and str(other) in str(error)
    assert other.read_text() == "precious" and sorted(os.listdir(tmp_path)) == ["links", "two"]
    assert not os.listdir(tmp_path / "links")


@root_only
@pytest.mark.parametrize("scheme", ["unix", "fifo"])
def test_owner_mode_and_symlinks_of_a_live_listener(tmp_path: Path, scheme: Any) -> None:  # D7
    path, one, two = tmp_path / "a", tmp_path / "one", tmp_path / "two"

    def facts() -> tuple[int, int, int]:
        status = path.lstat()
        return stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid

    plain = spec(Address(scheme, path=str(path)), mode=0o600)
    theirs = replace(plain, mode=0o660, user=NOBODY, symlinks=(str(one),))
    back = replace(plain, symlinks=(str(two),))
    with opened_fd(plain) as bound:
        assert bound.identity
        sockets.apply_path(theirs, bound.identity, trusted_uid=0, was=plain)
        assert facts() == (0o660, NOBODY, NOBODY) and os.readlink(one) == str(path)
        sockets.apply_path(back, bound.identity, trusted_uid=0, was=theirs)
        assert facts() == (0o600, 0, 0) and os.readlink(two) == str(path) and not os.path.lexists(one)
        path.rename(tmp_path / "moved")
        path.write_text("precious")
        with pytest.raises(BindError) as caught:
            sockets.apply_path(theirs, bound.identity, trusted_uid=0, was=back)
        assert (caught.value.stage, facts()[1]) == ("path", 0) and not os.path.lexists(one)


def test_only_our_own_path_is_removed(tmp_path: Path) -> None:  # D5, D13
    path = tmp_path / "a.sock"
    with opened(unix(path)) as (_, bound):
        assert bound.identity
        path.unlink()  # a cleaner of /tmp
        assert not sockets.path_is_ours(str(path), bound.identity)
        assert not sockets.remove_unix_path(str(path), bound.identity)
        with opened(unix(path)) as (_, second):  # D13: bound again, or another server's
            assert not sockets.remove_unix_path(str(path), bound.identity)
            assert second.identity and sockets.path_is_ours(str(path), second.identity)
            assert sockets.remove_unix_path(str(path), second.identity)
    assert not path.exists()


def test_second_start_leaves_the_first_alone(tmp_path: Path) -> None:  # D5
    path, link = tmp_path / "a.sock", tmp_path / "link"
    wanted = unix(path, symlinks=(str(link),))
    with opened(wanted) as (_, first):
        assert refused(wanted).errno == errno.EADDRINUSE
        assert first.identity and sockets.path_is_ours(str(path), first.identity) and os.readlink(link) == str(path)


# FIFO, vsock, sockets that were given


def test_fifo(tmp_path: Path) -> None:
    wanted = spec(Address("fifo", path=str(tmp_path / "f")), mode=0o622, receive_buffer=8192)
    with opened_fd(wanted) as bound:
        status = os.stat(tmp_path / "f")
        assert stat.S_ISFIFO(status.st_mode) and stat.S_IMODE(status.st_mode) == 0o622
        assert (status.st_dev, status.st_ino) == bound.identity
        assert fcntl.fcntl(bound.fd, fcntl.F_GETPIPE_SZ) == 8192
        assert os.get_blocking(bound.fd) and not os.get_inheritable(bound.fd)
        with open(tmp_path / "f", "wb", buffering=0) as writer:
            writer.write(b"line\n")
        assert os.read(bound.fd, 100) == b"line\n"
        poll = select.poll()
        poll.register(bound.fd, select.POLLIN)
        assert poll.poll(0) == []  # the last writer has left, and there is no EOF
        assert not sockets.drain_datagram(bound.fd)
        os.write(bound.fd, b"x" * 5000)
        assert [sockets.drain_datagram(bound.fd) for _ in range(3)] == [True, True, False]
        assert not sockets.listener_is_dead(bound.fd)
        with opened_fd(replace(wanted, mode=0o600)) as again:  # there already: used again
            assert again.identity == bound.identity
            assert stat.S_IMODE(os.stat(tmp_path / "f").st_mode) == 0o600
        assert sockets.remove_unix_path(str(tmp_path / "f"), bound.identity)
    (tmp_path / "file").write_text("precious")
    assert refused(spec(Address("fifo", path=str(tmp_path / "file")))).errno == errno.EEXIST
    error = refused(spec(Address("fifo", path=str(tmp_path / "g")), no_delay=True))
    assert error.stage == "option no_delay" and not (tmp_path / "g").exists()


@root_only
def test_fifo_of_somebody_else() -> None:  # D6
    with public_directory(0o1777) as parent:
        os.mkfifo(parent / "f")
        os.chown(parent / "f", 1234, 1234)
        error = refused(spec(Address("fifo", path=str(parent / "f"))))
        assert error.stage == "bind" and (parent / "f").stat().st_uid == 1234


def test_vsock() -> None:
    try:
        with opened(spec(Address("vsock", port=0))) as (sock, bound):
            assert bound.address == Address("vsock", port=sock.getsockname()[1])
            assert sockets.describe_listener(bound.fd) == bound.address
            assert not os.get_inheritable(bound.fd)
    except BindError as error:
        pytest.skip(f"no vsock here: {error}")


def with_listen_fds(check: Callable[[list[socket.socket]], Any]) -> Any:
    """check() in a child whose fds 3, 4, 5 are a TCP listener, a UDP socket and a UNIX listener."""

    def run() -> Any:
        tcp, udp, local = (
            socket.socket(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM), socket.socket(socket.AF_UNIX)
        )  # fmt: skip
        tcp.bind(("127.0.0.1", 0))
        tcp.listen()
        udp.bind(("127.0.0.1", 0))
        local.bind("\0superd-test-given")
        local.listen()
        high = [fcntl.fcntl(each, fcntl.F_DUPFD, 100) for each in (tcp, udp, local)]
        for number, fd in enumerate(high, 3):
            os.dup2(fd, number)
            os.close(fd)
        return check([tcp, udp, local])

    return in_child(run, report_fd=50)


def test_inherited_sockets() -> None:
    def check(given_sockets: list[socket.socket]) -> list[object]:
        pid = str(os.getpid())
        environ = {"LISTEN_FDS": "3", "LISTEN_PID": pid, "LISTEN_FDNAMES": "web:web:ctl"}
        given, reason = sockets.inherited_sockets(environ, os.getpid())
        flags = [os.get_inheritable(fd) for fd in (3, 4, 5)]
        web = bind(spec(Address("fd", path="web")), inherited=given)
        ctl = bind(spec(Address("fd", path="ctl")), inherited=given)
        again = refused(spec(Address("fd", path="web")), inherited=given)
        return [reason, flags, [one.fd for one in web + ctl],
                [one.address.scheme for one in web], web[0].address == sockets.describe_listener(3),
                web[0].address.port == given_sockets[0].getsockname()[1], str(ctl[0].address),
                given, again.stage, again.retry,
                sockets.inherited_sockets({"LISTEN_FDS": "2", "LISTEN_PID": pid}, os.getpid())]  # fmt: skip

    assert with_listen_fds(check) == [
        None, [False] * 3, [3, 4, 5], ["tcp", "udp"], True, True, "unix:@superd-test-given",
        {"web": [], "ctl": []}, "inherited", False, [{"unknown": [3, 4]}, None],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("environ", "reason"),
    [
        ({}, None),
        ({"LISTEN_FDS": "1"}, "must both be positive numbers"),
        ({"LISTEN_FDS": "0", "LISTEN_PID": "7"}, "must both be positive numbers"),
        ({"LISTEN_FDS": "-1", "LISTEN_PID": "7"}, "must both be positive numbers"),
        ({"LISTEN_FDS": "²", "LISTEN_PID": "7"}, "must both be positive numbers"),
        ({"LISTEN_FDS": "9" * 5000, "LISTEN_PID": "7"}, "must both be positive numbers"),
        ({"LISTEN_FDS": "1", "LISTEN_PID": "8"}, "for another process"),
        ({"LISTEN_FDS": "1", "LISTEN_PID": "7", "LISTEN_FDNAMES": "a:b"}, "2 names for 1 fds"),
        ({"LISTEN_FDS": "100000", "LISTEN_PID": "7"}, "bad file descriptor"),
    ],
)
def test_inherited_garbage(environ: dict[str, str], reason: str | None) -> None:  # O2, O3
    def check() -> list[object]:
        return list(sockets.inherited_sockets(environ, 7))

    found, why = in_child(check)
    assert found == {} and (why is None if reason is None else reason in why)


def test_pid_that_came_round_again() -> None:
    def check() -> str | None:
        environ = {"LISTEN_FDS": "1", "LISTEN_PID": str(os.getpid()), "LISTEN_PIDFDID": "1"}
        return sockets.inherited_sockets(environ, os.getpid())[1]

    assert in_child(check) == "LISTEN_PIDFDID is not this process: the sockets are for another"


def test_given_what_is_no_listener() -> None:
    left, right = socket.socketpair()
    reader, writer = os.pipe()
    with left, right, open(reader, "rb"), open(writer, "wb"):
        for fd, text in ((left.fileno(), "does not listen"), (reader, "is no socket")):
            given = {"x": [fd]}
            error = refused(spec(Address("fd", path="x")), inherited=given)
            assert error.stage == "inherited" and text in str(error)
            assert given == {"x": [fd]}  # still the caller's


def test_given_listeners_by_their_kind() -> None:
    for address in (ANY, Address("tcp4", port=0), Address("tcp6", port=0), Address("udp", port=0), UDP,
                    Address("tcp", "::1", 0), Address("unix-seqpacket", path="@superd-test-kind")):  # fmt: skip
        with opened(spec(address)) as (_, bound):
            (given,) = bind(spec(Address("fd", path="x"), ttl=None), inherited={"x": [bound.fd]})
            assert given == Bound(bound.fd, bound.address)


def test_given_listener_that_has_packets() -> None:
    """No PROXY header can be read from one without what stands behind it."""
    with opened(spec(Address("unix-seqpacket", path="@superd-test-kind"))) as (_, bound):
        error = refused(spec(Address("fd", path="x"), ttl=None, proxy_protocol=True), inherited={"x": [bound.fd]})
        assert error.stage == "option proxy_protocol" and "no stream socket" in str(error)


# What arrives


def test_peek_and_take() -> None:
    one, other = socket.socketpair()
    with one:
        with pytest.raises(BlockingIOError):
            sockets.peek(one.fileno(), 10)
        with other:
            other.sendall(b"hello")
            assert [sockets.peek(one.fileno(), most) for most in (2, 10)] == [b"he", b"hello"]
            assert sockets.take(one.fileno(), 2) == b"he" and sockets.take(one.fileno(), 10) == b"llo"
            with pytest.raises(BlockingIOError):
                sockets.take(one.fileno(), 1)
        assert sockets.peek(one.fileno(), 10) == b""


def test_unix_client(tmp_path: Path) -> None:
    with opened(unix(tmp_path / "a")) as (sock, _), socket.socket(socket.AF_UNIX) as client:
        client.connect(str(tmp_path / "a"))
        conn, _ = sock.accept()
        with conn:
            assert peers.credentials(conn.fileno()) == (os.getpid(), os.geteuid(), os.getegid())


def test_client_that_is_gone() -> None:  # A5
    with opened(spec(LOOP)) as (sock, bound):
        client = connect(bound)
        client.setsockopt(SOL, socket.SO_LINGER, struct.pack("ii", 1, 0))
        name = client.getsockname()
        client.close()
        fd, peer = sockets.accept(sock)  # the address of accept is good, getpeername would not be
        with socket.socket(fileno=fd) as conn:
            assert peer == name
            with pytest.raises(OSError) as caught:
                conn.getpeername()
            assert caught.value.errno in sockets.IGNORABLE_ACCEPT_ERRNOS


def test_accept_errnos() -> None:  # A4, A1
    for name in ("ECONNABORTED", "EPROTO", "EPERM", "ENETDOWN", "EHOSTUNREACH", "ETIMEDOUT", "EOPNOTSUPP", "EAGAIN"):
        assert getattr(errno, name) in sockets.IGNORABLE_ACCEPT_ERRNOS
    assert {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS} == sockets.RESOURCE_ERRNOS
    assert not sockets.RESOURCE_ERRNOS & sockets.IGNORABLE_ACCEPT_ERRNOS
    assert not {errno.EINVAL, errno.EBADF, errno.ENOTSOCK} & sockets.IGNORABLE_ACCEPT_ERRNOS


@pytest.mark.parametrize(
    ("address", "family"),
    [
        (LOOP, socket.AF_INET),
        (Address("tcp", "::1", 0), socket.AF_INET6),
        (Address("unix", path="@superd-test-accept"), 1),
    ],
    ids=str,
)
def test_accept(address: Address, family: int) -> None:
    with opened(spec(address)) as (sock, _), socket.socket(family) as client:
        sock.setblocking(False)
        with pytest.raises(BlockingIOError):
            sockets.accept(sock)
        client.connect(sock.getsockname())
        fd, peer = sockets.accept(sock)
        with socket.socket(fileno=fd) as conn:
            assert os.get_blocking(fd) and not os.get_inheritable(fd)
            assert peer == conn.getpeername()[:2]
            client.sendall(b"x")
            assert conn.recv(1) == b"x"


def test_accept_without_fds() -> None:  # A1
    def number() -> int | None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (sock.fileno() + 1, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
        kept = []
        with suppress(OSError):
            while True:
                kept.append(os.dup(sock.fileno()))
        try:
            sockets.accept(sock)
        except OSError as error:
            return error.errno
        return None

    with opened(spec(LOOP)) as (sock, bound), connect(bound):
        sock.setblocking(False)
        assert in_child(number, report_fd=0) == errno.EMFILE


def test_no_thread_runs_between_accept_and_what_follows() -> None:
    """A thread that computes would keep the interpreter for 5 ms, and a connection that was accepted dies with us."""
    turns, done = [0], threading.Event()

    def compute() -> None:
        while not done.is_set():
            turns[0] += 1

    thread = threading.Thread(target=compute)
    with opened(spec(LOOP)) as (sock, bound):
        sock.setblocking(False)
        thread.start()
        try:
            undisturbed = 0
            for _ in range(40):
                with connect(bound):
                    time.sleep(0.001)
                    before = turns[0]
                    fd, _ = sockets.accept(sock)
                    undisturbed += turns[0] == before
                    os.close(fd)
        finally:
            done.set()
            thread.join()
    assert turns[0] > 40
    assert undisturbed >= 36  # with socket.accept(): 5


@pytest.mark.parametrize("address", [UDP, Address("unix-dgram", path="@superd-test-drain")], ids=str)  # C6
def test_drain_datagram(address: Address) -> None:
    with opened(spec(address)) as (sock, _), socket.socket(sock.family, socket.SOCK_DGRAM) as client:
        for data in (b"x" * 1000, b"", b"last"):  # no bytes is a datagram as well
            client.sendto(data, sock.getsockname())
        assert [sockets.drain_datagram(sock.fileno()) for _ in range(4)] == [True, True, True, False]


def test_drained_datagram_leaves_no_fd() -> None:
    with opened(spec(Address("unix-dgram", path="@superd-test-fds"))) as (sock, _):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as client:
            client.connect(sock.getsockname())
            socket.send_fds(client, [b"x"], [0, 1, 2])
        assert sockets.drain_datagram(sock.fileno())  # conftest.py counts


@pytest.mark.parametrize(
    "address",
    [LOOP, ANY, UDP, *(Address(s, path="@superd-test-dead") for s in ("unix", "unix-dgram", "unix-seqpacket"))],
    ids=str,
)
def test_listener_that_a_service_has_shut_down(address: Address) -> None:  # A15
    with opened(spec(address)) as (sock, bound):
        with socket.socket(sock.family, sock.type) as client:
            if sock.type == socket.SOCK_DGRAM:
                client.sendto(b"x", sock.getsockname())
            else:
                where = ("::1", bound.address.port) if bound.address == ANY else sock.getsockname()
                client.connect(where)
            assert not sockets.listener_is_dead(bound.fd)  # traffic is not death
        try:
            sock.shutdown(socket.SHUT_RDWR)
        except OSError as error:
            assert error.errno == errno.ENOTCONN  # for UDP it works none the less
        assert sockets.listener_is_dead(bound.fd)


@pytest.mark.parametrize("scheme", ["tcp", "unix", "unix-seqpacket"])
def test_listener_that_was_shut_down_is_bound_again(tmp_path: Path, scheme: Any) -> None:  # A15, with the old fd open
    wanted = spec(LOOP if scheme == "tcp" else Address(scheme, path=str(tmp_path / "a")))
    with opened(wanted) as (sock, bound):
        sock.shutdown(socket.SHUT_RDWR)
        with opened(replace(wanted, address=bound.address)) as (second, _):
            with socket.socket(second.family, second.type) as client:
                client.connect(second.getsockname())


# Who holds it


@contextmanager
def held_by_a_child(wanted: SocketSpec) -> Iterator[tuple[int, Address]]:
    """(pid, address) of a listener that only a child has open."""
    (bound,) = bind(wanted)
    reader, writer = os.pipe()
    ready, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(writer)
            Path("/proc/self/comm").write_text("hol(d e)r\n\x1b")
            os.write(tell, b"x")
            os.read(reader, 1)
        finally:
            os._exit(0)
    for fd in (bound.fd, reader, tell):
        os.close(fd)
    try:
        assert os.read(ready, 1) == b"x"
        yield pid, bound.address
    finally:
        os.close(writer)
        os.close(ready)
        os.waitpid(pid, 0)


@pytest.mark.parametrize(
    ("held", "asked"),
    [
        (Address("tcp", "127.0.0.1", 0), Address("tcp", "127.0.0.1")),
        (Address("tcp", "127.0.0.1", 0), Address("tcp")),
        (Address("tcp", "127.0.0.1", 0), Address("tcp4")),
        (Address("tcp", port=0), Address("tcp", "127.0.0.1")),
        (Address("tcp", "::1", 0), Address("tcp", "localhost")),
        (Address("tcp", "::1", 0), Address("tcp6")),
        (Address("udp", "127.0.0.1", 0), Address("udp")),
        (Address("udp4", port=0), Address("udp", "127.0.0.1")),
        (Address("unix", path="@superd-test-held"), Address("unix", path="@superd-test-held")),
        (Address("unix-dgram", path="@superd-test-held"), Address("unix", path="@superd-test-held")),
    ],
    ids=str,
)
def test_find_holder(held: Address, asked: Address) -> None:
    with held_by_a_child(spec(held)) as (pid, address):
        holder = holders.find_holder(replace(asked, port=address.port))
        assert holder == holders.Holder(pid, "hol(d e)r??")
        assert str(holder) == f"pid {pid} (hol(d e)r??)"


def test_find_holder_of_a_path(tmp_path: Path) -> None:
    path = tmp_path / "with space.sock"
    with held_by_a_child(unix(path)) as (pid, address):
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))  # a connection carries the path as well
            holder = holders.find_holder(address)
            assert holder is not None and holder.pid == pid
    with opened(unix(path)) as (sock, bound), socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        conn, _ = sock.accept()
        with conn:
            sock.close()
            assert holders.find_holder(bound.address) is None  # an accepted connection is not in the way
    with held_by_a_child(unix(path)) as (pid, _):
        assert f"by pid {pid} (" in str(refused(unix(path), find_holder=holders.find_holder))
    assert holders.find_holder(unix(path).address) is None


def test_find_holder_of_nothing() -> None:
    with held_by_a_child(spec(Address("tcp", "127.0.0.1", 0))) as (_, address):
        for other in (Address("tcp", "127.0.0.2"), Address("tcp", "::1"), Address("udp", "127.0.0.1")):
            assert holders.find_holder(replace(other, port=address.port)) is None
    assert holders.find_holder(address) is None
    assert holders.find_holder(Address("vsock", port=1)) is None
    assert holders.find_holder(Address("fifo", path="/nowhere")) is None


@root_only
def test_find_holder_without_rights() -> None:
    with opened(spec(LOOP)) as (_, bound):

        def check() -> object:
            # Only our own process may be looked into as nobody, and it has the listener too: give it up first.
            os.close(bound.fd)
            become_nobody()
            return holders.find_holder(bound.address)

        assert in_child(check) is None


def test_import_is_cheap() -> None:
    names = {"asyncio", "subprocess", "logging", "trio", "pwd", "ssl"}

    def check() -> list[str]:
        reader, writer = os.pipe()
        code = "import sys, superd.system.sockets, superd.system.holders; print(*sys.modules)"
        pid = os.posix_spawn(sys.executable, [sys.executable, "-I", "-S", "-c", f"import sys; "
                             f"sys.path.insert(0, {str(Path(__file__).resolve().parents[2])!r}); {code}"],
                             os.environ, file_actions=[(os.POSIX_SPAWN_DUP2, writer, 1)])  # fmt: skip
        os.close(writer)
        with open(reader) as text:
            loaded = set(text.read().split())
        os.waitpid(pid, 0)
        assert "superd.system.sockets" in loaded
        return sorted(names & loaded)

    assert in_child(check) == []
