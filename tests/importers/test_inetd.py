"""superd.importers.inetd: lines of each dialect in, tables out."""

from __future__ import annotations

from typing import Any

import pytest
from importers.material import bring, specs

CAT = "/bin/cat cat"


def one(line: str, **options: Any) -> dict[str, Any]:
    result = bring({"/etc/inetd.conf": line + "\n"}, **options)
    specs(result)
    return result.table


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (f"ident stream tcp nowait nobody {CAT}", {"listen": "tcp:ident", "command": ["/bin/cat"], "argv0": "cat",
                                                  "stderr": "socket", "user": "nobody"}),
        (f"ident stream tcp nowait nobody:games {CAT} -w x", {"user": "nobody", "group": "games",
                                                              "command": ["/bin/cat", "-w", "x"]}),
        ("ident stream tcp nowait nobody /bin/cat /bin/cat", {"argv0": None}),
        (f"ident stream tcp nowait.30 root {CAT}", {"limits": {"rate": "30/1m"}, "user": "root"}),
        (f"ident stream tcp6 nowait root {CAT}", {"listen": "tcp6:ident"}),
        (f"ident stream tcp4 nowait root {CAT}", {"listen": "tcp4:ident"}),
        (f"ident stream tcp46 nowait root {CAT}", {"listen": "tcp:ident"}),
        (f"tftp dgram udp wait root {CAT}", {"run": "on-demand", "pass": "stdio", "listen": "udp:tftp"}),
        (f"ftp stream tcp wait root {CAT}", {"run": "on-demand", "pass": "stdio", "listen": "tcp:ftp"}),
        (f"7010 stream tcp nowait 65534 {CAT}", {"listen": "tcp:7010", "user": 65534}),
        (f"127.0.0.1:ident stream tcp nowait root {CAT}", {"listen": "tcp:127.0.0.1:ident"}),
        (f"localhost:ident stream tcp nowait root {CAT}", {"listen": "tcp:localhost:ident"}),
        (f"localhost:ident stream tcp wait root {CAT}", {"listen": "tcp:127.0.0.1:ident"}),
        (f"localhost:tftp dgram udp6 wait root {CAT}", {"listen": "udp:[::1]:tftp"}),
        (f"127.0.0.1,::1:ident stream tcp4 nowait root {CAT}",
         {"listen": ["tcp:127.0.0.1:ident", "tcp:[::1]:ident"]}),
        (f"127.0.0.1,10.0.0.1:ident stream tcp nowait root {CAT}",
         {"listen": ["tcp:127.0.0.1:ident", "tcp:10.0.0.1:ident"]}),
        (f"[::1]:ident stream tcp6 nowait root {CAT}", {"listen": "tcp:[::1]:ident"}),
        (f"ident stream tcp,sndbuf=16k,rcvbuf=1m nowait root {CAT}",
         {"socket": [{"listen": "tcp:ident", "send_buffer": "16K", "receive_buffer": "1M"}]}),
        (f"tcpmux/+ident stream tcp nowait root {CAT}", {"listen": "tcpmux:+ident"}),
        (f"tcpmux/ident stream tcp nowait root {CAT}", {"listen": "tcpmux:ident"}),
        ("1 stream tcp nowait root internal", {"listen": "tcp:1", "builtin": "tcpmux"}),
        (f"/run/x.sock stream unix nowait root {CAT}", {"listen": "unix:/run/x.sock"}),
        (f"/run/x.sock dgram unix wait root {CAT}", {"listen": "unix-dgram:/run/x.sock", "run": "on-demand"}),
        ("daytime stream tcp nowait.9 root internal",
         {"listen": "tcp:daytime", "builtin": "daytime", "limits": {"rate": "9/1m"}, "user": None, "stderr": None}),
        ("echo dgram udp wait root internal", {"listen": "udp:echo", "builtin": "echo", "run": None, "pass": None}),
        # FreeBSD: the numbers behind a slash are children at once, starts a minute of one address, children of one
        (f"ident stream tcp nowait/9/8/7 root {CAT}", {"listen": "tcp4:ident", "limits":
            {"max_connections": 9, "rate_per_source": "8/1m", "max_per_source": 7}}),
        (f"ident stream tcp nowait//5 root {CAT}", {"limits": {"rate_per_source": "5/1m"}}),
        (f"ident stream tcp nowait/0 root {CAT}", {"limits": None}),
        ("ident stream tcp nowait/1 root /bin/cat cat \"two words\" 'a b'",
         {"command": ["/bin/cat", "two words", "a b"]}),
        (f":www:games:0660:/run/f.sock stream unix nowait/1 root {CAT}",
         {"socket": [{"listen": "unix:/run/f.sock", "mode": "0660", "user": "www", "group": "games"}]}),
        # NetBSD
        (f"ident stream,9:dataready tcp nowait:70 root {CAT}",
         {"listen": "tcp4:ident", "limits": {"max_connections": 9, "rate": "70/1m"}}),
        # GNU
        (f"ident stream tcp6only nowait root {CAT}", {"listen": "tcp6:ident"}),
    ],
)  # fmt: skip
def test_lines(line: str, expected: dict[str, Any]) -> None:
    table = one(line)
    assert {key: table.get(key) for key in expected} == expected


def test_plain_tcp_is_ipv4_where_the_dialect_says_so() -> None:
    line = f"ident stream tcp nowait root {CAT}"
    assert one(line, format="inetd-freebsd")["listen"] == "tcp4:ident"
    assert one(line, format="inetd-gnu")["listen"] == "tcp4:ident"
    assert one(line.replace("tcp", "tcp6"), format="inetd-gnu")["listen"] == "tcp:ident"
    assert one(line, format="inetd-openbsd")["listen"] == "tcp:ident"


def test_both_versions_in_two_lines_do_not_collide() -> None:
    result = bring({"/e": f"ident stream tcp nowait root {CAT}\nident stream tcp6 nowait root {CAT}\n"}, format="inetd")
    assert {name: table["listen"] for name, table in result.tables.items()} == {
        "ident": "tcp4:ident", "ident-tcp6": "tcp6:ident",
    }  # fmt: skip
    specs(result)


def test_the_dot_of_user_dot_group() -> None:
    """The whole word first: newer systems have users with a dot in their name."""
    line = f"ident stream tcp nowait first.last {CAT}"
    assert one(line)["user"] == "first.last"
    table = bring({"/etc/inetd.conf": line}, absent=frozenset({"first.last"})).table
    assert (table["user"], table["group"]) == ("first", "last")


def test_address_for_the_lines_below() -> None:
    text = f"127.0.0.1:\nident stream tcp nowait root {CAT}\n*:\nftp stream tcp nowait root {CAT}\n"
    tables = bring({"/etc/inetd.conf": text}).tables
    assert (tables["ident"]["listen"], tables["ftp"]["listen"]) == ("tcp:127.0.0.1:ident", "tcp:ftp")


def test_a_line_that_goes_on() -> None:
    table = one("ident stream tcp nowait root \\\n".replace(" \\\n", "\n\t/bin/cat cat\n\t-u"))
    assert table["command"] == ["/bin/cat", "-u"]


def test_tcpd_stays_where_it_is_installed() -> None:
    line = "finger stream tcp nowait nobody /usr/sbin/tcpd /usr/sbin/in.fingerd -w"
    result = bring({"/etc/inetd.conf": line})
    assert result.table["command"] == ["/usr/sbin/tcpd", "-w"]
    assert result.table["argv0"] == "/usr/sbin/in.fingerd"
    assert result.said("tcpd stays")
    result = bring({"/etc/inetd.conf": line}, absent=frozenset({"/usr/sbin/tcpd"}))
    assert result.table["command"] == ["/usr/sbin/in.fingerd", "-w"]
    assert result.said("/etc/inetd.conf:1: security: not carried over: tcpd")
    assert "# /etc/inetd.conf:1: not carried over: tcpd" in result.texts["finger"]


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("rstatd/1-3 dgram rpc/udp wait root /x x", "portmapper"),
        ("chargen dgram udp wait root internal", "forged"),
        ("frob stream tcp nowait root internal", "no such built-in"),
        ("tcpmux/+x dgram udp wait root /x x", "tcpmux"),
        ("x stream", "this has 2"),
        (f"ident stream tcp maybe root {CAT}", "neither wait nor nowait"),
        (f"ident stream tcp nowait.x root {CAT}", "numbers"),
        (f"ident raw tcp nowait root {CAT}", "type raw"),
        (f"ident dgram tcp nowait root {CAT}", "does not go with"),
        ("ident stream tcp nowait root cat cat", "absolute"),
        (f"ident stream sctp nowait root {CAT}", "sctp"),
        (f"ident stream tcp,x=1 nowait root {CAT}", "sndbuf"),
    ],
)
def test_what_cannot_be_had_is_said(line: str, why: str) -> None:
    result = bring({"/etc/inetd.conf": line + "\n"}, format="inetd")
    assert (result.texts, result.failures) == ({}, [])
    assert [note for note in result.notes if note.startswith("/etc/inetd.conf:1: warning: ") and why in note]


def test_a_name_is_not_looked_up() -> None:
    """What would listen more widely than was meant does not run at all."""
    result = bring({"/etc/inetd.conf": f"gateway.example.org:ident stream tcp nowait root {CAT}"})
    assert result.table["enabled"] is False
    assert result.said("security: not carried over: 'gateway.example.org' is a name")


def test_port_that_this_machine_does_not_know() -> None:
    result = bring({"/etc/inetd.conf": f"strange stream tcp nowait root {CAT}"})
    assert result.said("strange/tcp is not in this machine's /etc/services")


def test_nowait_datagrams() -> None:
    result = bring({"/etc/inetd.conf": f"talk dgram udp nowait root {CAT}"})
    assert result.table["run"] == "on-demand"
    assert result.said("warning: nowait with datagrams")


def test_dollar_brace_is_not_expanded() -> None:
    spec = specs(bring({"/etc/inetd.conf": "ident stream tcp nowait root /bin/cat cat ${HOME} $${x}"}))["ident"]
    assert spec.command == ("/bin/cat", "$${HOME}", "$$${x}")  # as the runtime gets them: still escaped


NETBSD = """
.include "more/*.conf"
#@ ipsec in/require
ident on wait = no, user = nobody:, exec = /bin/cat, args = cat "two words" 'x;y', # a comment; here
    service_max = 30, ip_max = 5, accept_max = 7, protocol = tcp6, sndbuf = 16k;
tftp off protocol = udp, wait = yes, user = root, exec = /usr/sbin/tftpd, args = tftpd; echo on
    bind = 127.0.0.1, socktype = stream, wait = no, user = root, exec = /bin/cat, args = "c\\x61t" ;
ftp stream tcp nowait root /bin/cat cat
"""


def test_netbsd() -> None:
    others = {"/etc/more/a.conf": "finger stream tcp nowait root /bin/cat cat\n"}
    result = bring({"/etc/inetd.conf": NETBSD}, others=others)
    specs(result)
    tables = result.tables
    assert set(tables) == {"finger", "ident", "tftp", "echo", "ftp"}
    assert tables["ident"]["command"] == ["/bin/cat", "two words", "x;y"]
    assert tables["ident"]["limits"] == {"max_connections": 7, "rate": "30/1m", "rate_per_source": "5/1m"}
    assert tables["ident"]["socket"] == [{"listen": "tcp6:ident", "send_buffer": "16K"}]
    assert tables["tftp"]["enabled"] is False
    assert tables["tftp"]["run"] == "on-demand"
    assert tables["echo"]["listen"] == "tcp:127.0.0.1:echo"
    assert tables["echo"]["argv0"] == "cat"
    assert result.said("/etc/inetd.conf:3: security: not carried over: the IPsec policy")
    assert result.texts["ftp"].startswith("# From /etc/inetd.conf:8.")


def test_an_include_of_itself_ends() -> None:
    result = bring({"/etc/inetd.conf": ".include inetd.conf\n"}, format="inetd")
    assert result.said("includes itself")
