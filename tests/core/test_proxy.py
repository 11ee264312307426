"""The table [proxy]: what it means, what is wrong with it and where; and the PROXY header."""

from __future__ import annotations

import pytest
from loading import FakeMachine, load_all, sources

from superd.core import diff, effective
from superd.core.problems import format_problems
from superd.core.proxyheader import format_header
from superd.core.spec import Address, Proxy, Ready, ServiceSpec

HEAD = 'listen = "tcp:80"\ncommand = ["/bin/cat", "${port}"]\n'
TABLE = '[proxy]\nto = "tcp:127.0.0.1:${port}"\n'
FREE = Address("tcp", "127.0.0.1", 0)


def service(text: str) -> ServiceSpec:
    snapshot, problems = load_all({"s.toml": text})
    assert not problems, problems
    return snapshot.services["s"]


def test_what_follows_from_it() -> None:
    spec = service(HEAD + TABLE)
    assert (spec.run, spec.pass_, spec.proxy) == ("on-demand", "listen-fds", Proxy(FREE))
    assert spec.ready == Ready("connect", address=FREE) and str(spec.ready) == "connect:tcp:127.0.0.1:${port}"
    assert not spec.gives_sockets and not spec.takes_connections
    spec = service('run = "always-on"\n' + HEAD + TABLE + 'ready = "http://127.0.0.1:${port}/"\nsend_proxy_header = 2')
    assert (spec.run, spec.proxy) == ("always-on", Proxy(FREE, 2))
    assert spec.ready == Ready("http", url="http://127.0.0.1:${port}/")
    spec = service(HEAD + '[proxy]\nto = "tcp:8080"\n[limits]\nmax_connections = 3\n[access]\nallow = ["10.0.0.0/8"]')
    assert spec.proxy == Proxy(Address("tcp", None, 8080)) and spec.limits.max_connections == 3
    spec = service(HEAD.replace("${port}", "") + '[proxy]\nto = "unix:own.sock"\nready = "notify"')
    assert spec.proxy == Proxy(Address("unix", path="/work/conf.d/own.sock")) and spec.ready == Ready("notify")


@pytest.mark.parametrize(
    ("text", "place", "said"),
    [
        (HEAD + "[proxy]", "3:2", "no `to`"),
        (HEAD + "[proxy]\nsend_proxy_header = 1", "3:2", "no `to`"),
        (HEAD + "proxy = 1", "3:9", "is not a table"),
        (HEAD + '[proxy]\nto = "udp:127.0.0.1:1"', "4:6", "superd carries bytes to"),
        (HEAD + '[proxy]\nto = "tcp:127.0.0.1:0"', "4:6", "port 0"),
        (HEAD + '[proxy]\nto = "tcp:127.0.0.1:${port:s}"', "4:6", "known only at run time"),
        (HEAD + '[proxy]\nto = "tcp:127.0.0.1:80"', "4:6", "superd itself listens on tcp:80"),
        (HEAD + '[proxy]\nto = "unix:/run/x"', "2:24", "${port} is that of `to`"),
        (HEAD + TABLE + "send_proxy_header = 3", "5:21", "not a version"),
        (HEAD + TABLE + "send_proxy_header = true", "5:21", "not a version"),
        (HEAD + TABLE + 'ready = "connect:tcp:127.0.0.1:0"', "5:9", "nobody can connect"),
        (HEAD + TABLE + 'reday = "notify"', "5:1", "unknown key `reday` in [proxy]"),
        ('run = "per-connection"\n' + HEAD + TABLE, "1:7", "exclude each other"),
        ('run = "once"\n' + HEAD + TABLE, "1:7", "exclude each other"),
        ('pass = "stdio"\n' + HEAD + TABLE, "1:1", "gets no sockets"),
        ('ready = "notify"\n' + HEAD + TABLE, "1:1", "stands in [proxy]"),
        (HEAD.replace("${port}", "${fd:s}") + TABLE, "2:24", "gets no sockets"),
        (HEAD.replace("tcp:80", "udp:80") + TABLE, "1:10", "carries streams"),
        (HEAD.partition("\n")[2] + TABLE, "2:2", "needs a socket"),
        ('builtin = "echo"\nlisten = "tcp:80"\n' + TABLE, "1:1", "listens by itself"),
        (HEAD + TABLE + "[sandbox]\nprivate_network = true", "4:6", "cannot connect to"),
    ],
)  # fmt: skip
def test_what_is_wrong_and_where(text: str, place: str, said: str) -> None:
    _, problems = load_all({"s.toml": text})
    shown = format_problems(problems, "short").splitlines()
    assert any(f".toml:{place}: error:" in line and said in line for line in shown), shown


def test_shown_as_it_is_read() -> None:
    text = (
        'user = "www"\n'
        + HEAD
        + TABLE
        + 'ready = "connect:tcp:127.0.0.1:${port}"\nsend_proxy_header = 1\n[limits]\nmax_connections = 3\n'
    )
    spec, entries, problems = effective.load_one(
        "s", sources({"s.toml": text}), machine=FakeMachine(), environ={}, is_root=True
    )
    assert not problems
    shown = effective.format_entries(entries, origin=False, secrets=True)
    assert service(shown) == spec and "max_connections = 3" in shown and "pass =" not in shown


def test_a_change() -> None:
    was = service(HEAD + TABLE)
    assert diff.compare(was, service(HEAD + TABLE + "send_proxy_header = 1"))[0] == "in place"
    assert diff.compare(was, service(HEAD + '[proxy]\nto = "tcp:8080"'))[0] == "restart"
    other = service(HEAD.replace('"tcp:80"', '["tcp:80", "tcp:81"]') + TABLE)
    assert diff.compare(was, other)[0] == "rebind"  # the process has no part in it


def test_header() -> None:
    assert format_header(1, ("192.0.2.1", 5), ("192.0.2.9", 80)) == b"PROXY TCP4 192.0.2.1 192.0.2.9 5 80\r\n"
    assert format_header(1, ("::1", 5), ("::2", 80)) == b"PROXY TCP6 ::1 ::2 5 80\r\n"
    assert format_header(1, None, None) == b"PROXY UNKNOWN\r\n"
    signature = bytes.fromhex("0d0a0d0a000d0a515549540a")
    body = bytes.fromhex("c0000201c000020900050050")
    assert format_header(2, ("192.0.2.1", 5), ("192.0.2.9", 80)) == signature + b"\x21\x11\0\x0c" + body
    assert format_header(2, None, None) == signature + b"\x20\0\0\0"
