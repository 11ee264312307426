"""The `tls` table of a socket: what it means, and that each wrong use is an error with its place."""

from __future__ import annotations

from dataclasses import replace

import pytest
from loading import load_all, only_problem

from superd.core.diff import compare
from superd.core.problems import format_problems
from superd.core.spec import ServiceSpec, Sni, Tls

CAT = 'command = "/bin/cat"\n'
FILES = 'tls = { certificate = "/c", key = "/k" }'
SOCKET = '[[socket]]\nlisten = "tcp:7"\n'


def service(text: str, *, is_root: bool = True) -> ServiceSpec:
    snapshot, problems = load_all({"git.toml": text}, is_root=is_root)
    assert not problems, format_problems(problems)
    return snapshot.services["git"]


def tls_of(text: str) -> Tls:
    found = service(CAT + SOCKET + text).sockets[0].tls
    assert found is not None
    return found


def test_what_it_means() -> None:
    assert tls_of(FILES) == Tls("/c", "/k")
    assert tls_of('[socket.tls]\ncertificate = "both.pem"\n') == Tls("/work/conf.d/both.pem", "/work/conf.d/both.pem")
    every = (
        'tls = { certificate = "/c", key = "/k", client_ca = "/ca", client_certificate = "optional", '
        'min_version = "1.3", alpn = ["h2", "http/1.1"], handshake_timeout = "500ms" }'
    )
    assert tls_of(every) == Tls("/c", "/k", (), "/ca", "optional", "1.3", ("h2", "http/1.1"), 0.5)
    assert tls_of(every).files == ("/c", "/k", "/ca")
    named = (
        '[socket.tls]\ncertificate = "/c"\n[socket.tls.sni]\n"Www.Example.org" = { certificate = "/w", key = "/v" }\n'
    )
    named += '"*.example.net" = { certificate = "/n" }'
    found = tls_of(named)
    assert found.sni == (Sni("www.example.org", "/w", "/v"), Sni("*.example.net", "/n", "/n"))
    assert found.files == ("/c", "/w", "/v", "/n")
    assert service(CAT + SOCKET).sockets[0].tls is None


@pytest.mark.parametrize(
    "text",
    [
        f'{CAT}[[socket]]\nlisten = "unix:/run/x.sock"\n{FILES}',
        f'{CAT}[[socket]]\nlisten = "fd:x"\n{FILES}',
        f'builtin = "echo"\n{SOCKET}{FILES}',
        f'handler = "shout:serve"\n{SOCKET}{FILES}',
        f'pass = "listen-fds"\n{CAT}{SOCKET}{FILES}',
        f'{CAT}{SOCKET}proxy_protocol = true\nproxy_trusted = ["::1"]\n{FILES}',
        f'{CAT}{SOCKET}{FILES}\n[proxy]\nto = "tcp:127.0.0.1:${{port}}"',
        f'{CAT}{SOCKET}{FILES}\n[[socket]]\nlisten = "tcp:8"',
    ],
)
def test_where_it_may_stand(text: str) -> None:
    assert service(text).sockets[0].tls == Tls("/c", "/k")


NAMED = SOCKET + '[socket.tls]\ncertificate = "/c"\n[socket.tls.sni]\n'
WRONG = [
    (SOCKET + "tls = true", '3:7: error: true is not a table: write tls = { certificate = "/PATH"'),
    (SOCKET + 'tls = { key = "/k" }', "3:7: error: `tls` has no `certificate`: write tls ="),
    (SOCKET + 'tls = { certificate = 5 }', "3:23: error: 5 is not a string"),
    (SOCKET + 'tls = { certificate = "" }', "3:23: error: the path is empty"),
    (SOCKET + 'tls = { certificate = "/c", cert = "/c" }', "3:29: error: unknown key `cert` in [socket[0].tls]"),
    (SOCKET + '[socket.tls]\ncertificate = "/c"\nalpn = "h2"', '5:8: error: \'h2\' is not a list: write ["h2"]'),
    (SOCKET + '[socket.tls]\ncertificate = "/c"\nalpn = ["h2", ""]', "5:15: error: '' is not the name of a protocol"),
    (SOCKET + '[socket.tls]\ncertificate = "/c"\nmin_version = "1.1"', '5:15: error: \'1.1\' is not a value of'),
    (SOCKET + '[socket.tls]\ncertificate = "/c"\nmin_version = 1.2', '5:15: error: 1.2 is not a value of'),
    (SOCKET + '[socket.tls]\ncertificate = "/c"\nhandshake_timeout = "off"', "5:21: error: 'off' is not a duration"),
    (SOCKET + '[socket.tls]\ncertificate = "/c"\nhandshake_timeout = 10', "5:21: error: 10 has no unit"),
    (SOCKET + '[socket.tls]\ncertificate = "/c"\nhandshake_timeout = "0s"', "5:21: error: '0s' is too small"),
    (SOCKET + '[socket.tls]\ncertificate = "/c"\nclient_certificate = "optional"',
     "5:1: error: `client_certificate` goes with `client_ca`"),
    (SOCKET + '[socket.tls]\ncertificate = "/c"\nsni = "x"', "5:7: error: 'x' is not a table: write sni = "),
    (NAMED + '"a b" = { certificate = "/w" }', "6:1: error: 'a b' is no name of a host"),
    (NAMED + 'www = "/w"', "6:7: error: 'www' has no `certificate`"),
    (NAMED + 'www = { key = "/w" }', "6:7: error: 'www' has no `certificate`"),
    (NAMED + 'www = { certificate = "/w", alpn = [] }', "6:29: error: `alpn` is that of all names"),
    (NAMED + 'www = { certificate = "/w", kye = "/v" }', "6:29: error: unknown key `kye` in [socket[0].tls.sni.www]"),
    (NAMED + 'www = { certificate = "/missing/w" }', "6:23: error: cannot read /missing/w: no such file"),
    (NAMED + 'WWW = { certificate = "/w", key = "/open/v" }', "6:35: error: superd is root and does not use the"),
    (NAMED + 'www = { certificate = "/w" }\nWWW = { certificate = "/v" }', "7:1: error: 'www' is there already"),
    # The files.
    (SOCKET + '[socket.tls]\ncertificate = "/missing/c"\nkey = "/k"', "4:15: error: cannot read /missing/c: no such"),
    (SOCKET + '[socket.tls]\ncertificate = "/c"\nkey = "/missing/k"', "5:7: error: cannot read /missing/k: no such"),
    (SOCKET + '[socket.tls]\ncertificate = "/c"\nclient_ca = "/missing/a"', "5:13: error: cannot read /missing/a"),
    (SOCKET + '[socket.tls]\ncertificate = "/c"\nkey = "/open/k"',
     "5:7: error: superd is root and does not use the private key in /open/k: /open/k is readable by everybody"),
    (SOCKET + '[socket.tls]\ncertificate = "/open/both"', "4:15: error: superd is root and does not use the private"),
    (SOCKET + '[socket.tls]\ncertificate = "/c"\nkey = "/tmp/k"',
     "5:7: error: superd is root and does not use /tmp/k: /tmp/k is writable by everybody"),
    (SOCKET + '[socket.tls]\ncertificate = "/c"\nclient_ca = "/home/www/a"', "5:13: error: superd is root and"),
    # The service.
    ('run = "on-demand"\n' + SOCKET + FILES, '4:1: error: `tls` means nothing with run = "on-demand": the service'),
    ('run = "always-on"\n' + SOCKET + FILES, '4:1: error: `tls` means nothing with run = "always-on": the service'),
    ('[[socket]]\nlisten = "udp:7"\n' + FILES, "3:1: error: `tls` means nothing for udp:7: it is for tcp"),
    ('[[socket]]\nlisten = "unix-seqpacket:/x"\n' + FILES, "3:1: error: `tls` means nothing for unix-seqpacket:/x"),
    ('[[socket]]\nlisten = "vsock:7"\n' + FILES, "3:1: error: `tls` means nothing for vsock:"),
    ('[[socket]]\nlisten = "fifo:/x"\n' + FILES, "3:1: error: `tls` means nothing for fifo:/x"),
    (SOCKET + FILES + '\nprotocol = "sctp"', "3:1: error: `tls` means nothing for SCTP"),
    ('[[socket]]\nlisten = "unix:/x"\n' + FILES + "\npass_credentials = true", "4:1: error: `pass_credentials` means"),
    (SOCKET + FILES + '\n[limits]\nrefuse_message = "no"', "5:1: error: `refuse_message` cannot be said with `tls`"),
    ('listen = "tcp:7"\ntls = { certificate = "/c" }', "2:1: error: `tls` is a key of [[socket]]"),
    ('listen = "tcp:7"\ncertificate = "/c"', "2:1: error: `certificate` is a key of [socket.tls]"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "said"), WRONG)
def test_wrong(text: str, said: str) -> None:
    assert said in only_problem(text)


def test_tcpmux() -> None:
    """The services behind it would take superd, a user of this machine, for their client."""
    _, problems = load_all({"mux.toml": f'builtin = "tcpmux"\n{SOCKET}{FILES}'})
    assert [(p.code, p.line) for p in problems] == [("other-mode", 4)]


def test_whose_files() -> None:
    """Only root must be careful, and a service that is not run may be without."""
    assert service(f'{CAT}{SOCKET}tls = {{ certificate = "/open/both" }}', is_root=False).sockets[0].tls
    assert service(f'enabled = false\n{CAT}{SOCKET}tls = {{ certificate = "/missing/c" }}').sockets[0].tls


def test_a_change_is_for_the_next_connections() -> None:
    old = service(CAT + SOCKET + FILES)
    for now in (None, Tls("/c", "/other")):
        new = replace(old, sockets=(replace(old.sockets[0], tls=now),))
        assert compare(old, new) == ("in place", ("socket.tls",))
        assert compare(new, old) == ("in place", ("socket.tls",))
