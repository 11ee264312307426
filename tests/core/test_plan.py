"""core/plan.py: the environment and the fds of a process, exactly as the protocols have them."""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from superd.core.plan import (
    PATH,
    Program,
    base_environment,
    connection_environment,
    listen_environment,
    plan_program,
    watchdog_environment,
)
from superd.core.spec import Address, Output, ServiceSpec, SocketSpec


def service(*sockets: SocketSpec, **fields: Any) -> ServiceSpec:
    return ServiceSpec(
        **{"name": "web", "source": "web.toml", "command": ("/bin/web", "-x"), "run": "on-demand",
           "pass_": "listen-fds", "sockets": sockets, **fields}
    )  # fmt: skip


def sock(name: str, address: Address | None = None) -> SocketSpec:
    return SocketSpec(address or Address("tcp", None, 80), name)


def plan(spec: ServiceSpec, environment: dict[str, str] | None = None, own: dict[str, str] | None = None) -> Program:
    sockets = [(socket.name, socket.address) for socket in spec.sockets]
    return plan_program(spec, spec.command, environment or {}, own or {}, sockets)


def program(*names: str, protocols: tuple[str, ...] = ("systemd",), addresses: tuple[str, ...] = ()) -> Program:
    return Program("web@a", "/x", ("/x",), {}, {}, False, Output(), Output(), names, addresses, protocols)


# --- what is inherited


OWN = {
    "PATH": "/evil", "LANG": "C.UTF-8", "LC_ALL": "C", "LC_TIME": "de", "TZ": "UTC", "HOME": "/root", "SECRET": "1",
    "LISTEN_FDS": "3", "LISTEN_PID": "1", "LISTEN_FDNAMES": "a", "LISTEN_PIDFDID": "7", "NOTIFY_SOCKET": "/n",
    "WATCHDOG_USEC": "5", "WATCHDOG_PID": "1", "LD_PRELOAD": "x.so", "LD_LIBRARY_PATH": "/x", "PYTHONPATH": "/p",
    "PYTHONSTARTUP": "/s", "A": "1", "B": "2",
}  # fmt: skip


@pytest.mark.parametrize(
    ("passed", "names"),
    [
        ((), "PATH LANG LC_ALL LC_TIME TZ"),
        (("A", "NOT_SET"), "PATH LANG LC_ALL LC_TIME TZ A"),
        (("*",), "PATH LANG LC_ALL LC_TIME TZ A B HOME SECRET"),
        (tuple(OWN), "PATH LANG LC_ALL LC_TIME TZ A B HOME SECRET"),
    ],
)
def test_inherited_environment_is_an_allow_list(passed: tuple[str, ...], names: str) -> None:  # E13
    found = base_environment(OWN, passed)
    assert set(found) == set(names.split())
    assert {name: value for name, value in found.items() if name != "PATH"}.items() <= OWN.items()


def test_path_is_ours_unless_asked_for() -> None:  # E13
    assert base_environment(OWN, ())["PATH"] == PATH
    assert base_environment({}, ())["PATH"] == PATH
    assert base_environment(OWN, ("PATH",))["PATH"] == "/evil"


def test_order_of_what_a_service_gets() -> None:
    """CONFIG.md: passed on, then the user's own (between the two dicts), then file and table, then superd's words."""
    spec = service(pass_environment=("*",))
    found = plan(spec, {"A": "table", "HOME": "/table", "SUPERD_SERVICE": "forged"}, OWN)
    assert found.base_environment["HOME"] == "/root"
    assert found.environment == {"A": "table", "HOME": "/table", "SUPERD_SERVICE": "web"}


# --- argv and fds


def test_argv0() -> None:
    assert plan(service()).argv == ("/bin/web", "-x")
    busybox = plan(service(argv0="httpd"))
    assert (busybox.executable, busybox.argv) == ("/bin/web", ("httpd", "-x"))


@pytest.mark.parametrize(
    ("run", "pass_", "sockets", "stdio", "names"),
    [
        ("per-connection", "stdio", 1, True, ()),
        ("per-connection", "stdio", 3, True, ()),
        ("per-connection", "listen-fds", 3, False, ("connection",)),  # PROTOCOLS.md 2.2
        ("on-demand", "stdio", 1, True, ()),
        ("on-demand", "listen-fds", 3, False, ("s0", "s1", "s2")),  # O4: the order of the file
        ("always-on", "listen-fds", 0, False, ()),
        ("always-on", "stdio", 0, False, ()),  # no socket: stdin is /dev/null
    ],
)
def test_where_the_sockets_stand(run: str, pass_: str, sockets: int, stdio: bool, names: tuple[str, ...]) -> None:
    found = plan(service(*[sock(f"s{i}") for i in range(sockets)], run=run, pass_=pass_))
    assert (found.stdio, found.names) == (stdio, names)


@pytest.mark.parametrize(
    ("stdout", "stderr", "logs"),
    [("log", "null", True), ("null", "log", True), ("null", "null", False), ("inherit", "file", False)],
)
def test_logs(stdout: Any, stderr: Any, logs: bool) -> None:
    assert plan(service(stdout=Output(stdout), stderr=Output(stderr, "/x"))).logs is logs


def test_a_program_survives_json() -> None:
    spec = service(sock("a"), sock("b"), stderr=Output("file", "/var/log/x"), fd_protocols=("systemd", "einhorn"))
    found = plan(spec, {"X": "ü\udcff"}, {"LANG": "C"})
    again = Program.from_json(json.loads(json.dumps(found.to_json())))
    assert again == found
    assert all(isinstance(getattr(again, key), tuple) for key in ("argv", "names", "addresses", "fd_protocols"))


# --- protocols that tell the fds


@pytest.mark.parametrize("names", [("a",), ("a", "b"), tuple(f"n{i}" for i in range(16)), ("x", "x", "")])
def test_systemd(names: tuple[str, ...]) -> None:  # PROTOCOLS.md 2.1, O3
    found = listen_environment(program(*names), 4711, 99)
    assert found == {
        "LISTEN_PID": "4711", "LISTEN_FDS": str(len(names)), "LISTEN_FDNAMES": ":".join(names), "LISTEN_PIDFDID": "99",
    }  # fmt: skip
    assert len(found["LISTEN_FDNAMES"].split(":")) == len(names)


def test_systemd_without_pidfs() -> None:
    assert "LISTEN_PIDFDID" not in listen_environment(program("a"), 1, None)


@pytest.mark.parametrize("pass_", ["stdio", "listen-fds"])
def test_no_socket_at_3_no_word_of_it(pass_: str) -> None:  # O2, PROTOCOLS.md 2.1 rule 2 and 2.4
    every = ("systemd", "upstart", "einhorn", "server-starter", "catflap")
    for run in ("per-connection", "on-demand") if pass_ == "stdio" else ("always-on", "once"):
        spec = service(*([sock("a")] if pass_ == "stdio" else []), run=run, pass_=pass_, fd_protocols=every)
        found = plan(spec, {}, OWN)
        assert listen_environment(found, 1, 2) == {}
        told = {**found.base_environment, **found.environment}
        assert not [name for name in told if name.startswith(("LISTEN_", "UPSTART_", "EINHORN_", "SERVER_STARTER"))]


def test_einhorn() -> None:  # PROTOCOLS.md 2.13
    assert listen_environment(program("a", "b", protocols=("einhorn",)), 1, 2) == {
        "EINHORN_FD_COUNT": "2", "EINHORN_FD_0": "3", "EINHORN_FD_1": "4", "EINHORN_FDS": "3 4",
    }  # fmt: skip


def test_catflap() -> None:
    assert listen_environment(program("a", "b", protocols=("catflap",)), 1, 2) == {"LISTEN_FD": "3"}


def test_server_starter() -> None:
    addresses = ("tcp4:0.0.0.0:8080", "tcp:[::1]:8080", "unix:/path.sock", "tcp:80")
    found = listen_environment(program(*"abcd", protocols=("server-starter",), addresses=addresses), 1, 2, generation=7)
    assert found == {
        "SERVER_STARTER_PORT": "0.0.0.0:8080=3;[::1]:8080=4;/path.sock=5;80=6",
        "SERVER_STARTER_GENERATION": "7",
    }


@pytest.mark.parametrize(
    ("address", "told"),
    [
        ("tcp:127.0.0.1:80", {"PROTO": "inet", "PORT": "80", "ADDR": "127.0.0.1"}),
        ("tcp4:80", {"PROTO": "inet", "PORT": "80", "ADDR": "0.0.0.0"}),
        ("tcp:80", {"PROTO": "inet6", "PORT": "80", "ADDR": "::"}),
        ("tcp:[::1]:80", {"PROTO": "inet6", "PORT": "80", "ADDR": "::1"}),
        ("unix:/run/x.sock", {"PROTO": "unix", "SOCKET_PATH": "/run/x.sock"}),
        ("unix:@abstract", {"PROTO": "unix", "SOCKET_PATH": "@abstract"}),
        ("vsock:*:7", {}),
    ],
)
def test_upstart(address: str, told: dict[str, str]) -> None:  # PROTOCOLS.md 2.11
    found = listen_environment(program("a", "b", protocols=("upstart",), addresses=(address, "tcp:1")), 1, 2)
    assert found == {
        "UPSTART_FDS": "3 4", "UPSTART_EVENTS": "socket", "UPSTART_JOB": "web", "UPSTART_INSTANCE": "a", **told,
    }  # fmt: skip


def test_protocols_together() -> None:
    every = ("systemd", "upstart", "einhorn", "server-starter", "catflap")
    together = listen_environment(program("a", protocols=every, addresses=("tcp:1",)), 5, 6)
    alone = [listen_environment(program("a", protocols=(one,), addresses=("tcp:1",)), 5, 6) for one in every]
    assert together == {name: value for found in alone for name, value in found.items()}
    assert len(together) == sum(map(len, alone))


# --- what a connection adds


TCP = {"remote": "192.0.2.9", "remote_port": "4242", "local": "192.0.2.1", "local_port": "80", "number": "3"}


def test_tcp_connection() -> None:  # PROTOCOLS.md 2.2, 2.10
    assert connection_environment("tcp", TCP) == {
        "REMOTE_ADDR": "192.0.2.9", "REMOTE_PORT": "4242", "PROTO": "TCP", "TCPREMOTEIP": "192.0.2.9",
        "TCPREMOTEPORT": "4242", "TCPLOCALIP": "192.0.2.1", "TCPLOCALPORT": "80", "TCPCONNNUM": "3",
    }  # fmt: skip


def test_a_client_that_has_gone_leaves_variables_out() -> None:  # A5
    assert connection_environment("tcp", {"number": "1"}) == {"PROTO": "TCP", "TCPCONNNUM": "1"}
    assert connection_environment("unix", {}) == {"PROTO": "IPC", "IPCREMOTEPATH": ""}


@pytest.mark.parametrize("path", ["/run/client", "@abstract", None])
def test_unix_connection(path: str | None) -> None:  # PROTOCOLS.md 2.2: never REMOTE_PORT; no name, no REMOTE_ADDR
    facts = {"uid": "1000", "gid": "100", "pid": "5", "number": "2", "remote": "", "remote_port": ""}
    named = {} if path is None else {"path": path}
    assert connection_environment("unix", {**facts, **named}) == {
        "PROTO": "IPC", "IPCREMOTEEUID": "1000", "IPCREMOTEEGID": "100", "IPCCONNNUM": "2",
        "UNIXREMOTEEUID": "1000", "UNIXREMOTEEGID": "100", "UNIXREMOTEPID": "5", "IPCREMOTEPATH": path or "",
        **({} if path is None else {"REMOTE_ADDR": path}),
    }  # fmt: skip


def test_vsock_connection() -> None:
    facts = {"remote": "2", "remote_port": "77", "number": "1"}
    assert connection_environment("vsock", facts) == {"REMOTE_ADDR": "2", "REMOTE_PORT": "77"}


@given(st.ip_addresses(), st.ip_addresses(), st.integers(0, 65535))
def test_numbers_only(remote: object, local: object, port: int) -> None:  # E14
    facts = {"remote": str(remote), "remote_port": str(port), "local": str(local), "local_port": "1", "number": "1"}
    found = connection_environment("tcp", facts)
    assert found.pop("PROTO") == "TCP"
    assert all(re.fullmatch(r"[0-9a-fA-F:.%]+", value) for value in found.values())


def test_a_program_is_a_value() -> None:
    one, other = plan(service(sock("a"))), plan(service(sock("a")))
    assert one == other
    assert dataclasses.replace(one, argv=("/x",)) != other


# --- what sd_notify(3) adds


@pytest.mark.parametrize("protocols", [("systemd",), ("upstart", "einhorn", "catflap")])
def test_stored_fds_follow_the_sockets(protocols: tuple[str, ...]) -> None:
    """Only systemd's variables tell of them, and they do even where the file names other protocols."""
    stored = dataclasses.replace(program("a", "b", protocols=protocols), stored=("x", "stored"))
    found = listen_environment(stored, 5, None)
    assert (found["LISTEN_FDS"], found["LISTEN_FDNAMES"]) == ("4", "a:b:x:stored")
    assert found.get("UPSTART_FDS", "3 4") == "3 4"
    assert found.get("EINHORN_FD_COUNT", "2") == "2"


def test_stored_fds_alone() -> None:  # systemd#29670: the socket is at 0
    stored = dataclasses.replace(program(protocols=("systemd", "einhorn")), stdio=True, stored=("x",))
    assert listen_environment(stored, 5, 6) == {
        "LISTEN_FDS": "1", "LISTEN_PID": "5", "LISTEN_FDNAMES": "x", "LISTEN_PIDFDID": "6",
    }  # fmt: skip


def test_watchdog() -> None:  # PROTOCOLS.md 2.6
    assert watchdog_environment(program("a"), 5) == {}
    watched = dataclasses.replace(program("a"), watchdog_usec=30_000_000)
    assert watchdog_environment(watched, 5) == {"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "5"}
    assert Program.from_json(json.loads(json.dumps(watched.to_json()))) == watched
