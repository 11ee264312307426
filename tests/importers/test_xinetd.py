"""superd.importers.xinetd."""

from __future__ import annotations

from typing import Any

import pytest
from importers.material import bring, specs

from superd.importers.xinetd import access_networks


def block(
    *lines: str, name: str = "rsync", usual: str = "socket_type = stream\nwait = no\nuser = root\nserver = /bin/cat"
) -> str:
    return "\n".join([f"service {name}", "{", *usual.split("\n"), *lines, "}"]) + "\n"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("", {"listen": "tcp:rsync", "command": ["/bin/cat"], "user": "root", "stderr": "socket", "groups": None}),
        ("server_args = --daemon  --x", {"command": ["/bin/cat", "--daemon", "--x"], "argv0": None}),
        ("flags = NAMEINARGS\nserver_args = kitty -u", {"command": ["/bin/cat", "-u"], "argv0": "kitty"}),
        ("disable = yes", {"enabled": False}),
        ("port = 7010\ntype = UNLISTED", {"listen": "tcp:7010"}),
        ("bind = 127.0.0.1", {"listen": "tcp:127.0.0.1:rsync"}),
        ("interface = ::1\nflags = IPv6", {"listen": "tcp:[::1]:rsync"}),
        ("flags = IPv4", {"listen": "tcp4:rsync"}),
        ("flags = IPv6\nv6only = yes", {"listen": "tcp6:rsync"}),
        ("flags = NODELAY KEEPALIVE REUSE",
         {"socket": [{"listen": "tcp:rsync", "no_delay": True, "keep_alive": True}]}),
        ("instances = 10\nper_source = 3\ncps = 25 30",
         {"limits": {"max_connections": 10, "on_full": "refuse", "max_per_source": 3, "rate": "25/1s"}}),
        ("instances = UNLIMITED", {"limits": None}),
        ("nice = 10\numask = 077", {"scheduling": {"nice": 10}, "umask": "0077"}),
        ("rlimit_as = 32M\nrlimit_files = 100\nrlimit_cpu = UNLIMITED",
         {"rlimit": {"as": 33554432, "nofile": 100, "cpu": "off"}}),
        ("env = A=1 B=x=y\nenv += C=3", {"environment": {"A": "1", "B": "x=y", "C": "3"}}),
        ("passenv = TZ LANG", {"pass_environment": ["TZ", "LANG"]}),
        ("group = games", {"group": "games"}),
        ("id = rsync-inside", {"listen": "tcp:rsync"}),
    ],
)  # fmt: skip
def test_attributes(line: str, expected: dict[str, Any]) -> None:
    result = bring({"/etc/xinetd.d/rsync": block(line)})
    specs(result)
    assert {key: result.table.get(key) for key in expected} == expected
    assert not [note for note in result.notes if "warning" in note]


def test_groups_of_another_user() -> None:
    """Without groups = yes xinetd gives a server none but its own."""
    usual = "socket_type = stream\nwait = no\nuser = games\nserver = /bin/cat"
    assert bring({"/x": block(usual=usual)}).table["groups"] == []
    assert "groups" not in bring({"/x": block("groups = yes", usual=usual)}).table


def test_wait() -> None:
    text = "service tftp\n{\nsocket_type = dgram\nprotocol = udp\nwait = yes\nuser = root\nserver = /bin/cat\n}\n"
    table = bring({"/x": text}).table
    assert (table["listen"], table["run"], table["pass"]) == ("udp:tftp", "on-demand", "stdio")


CONF = """
# a comment
defaults
{
    instances = 60
    only_from = 10.0.0.0
    env = A=1
    log_type = SYSLOG daemon info
    log_on_success = HOST PID USERID
    disabled = ftp
}
includedir /etc/xinetd.d
service finger
{
    socket_type = stream
    wait = no
    user = nobody
    server = /bin/cat
    instances = 5
    env += B=2
    only_from -= 10.0.0.0
    only_from += 192.168.1.{7,9}
}
"""


def test_defaults_and_includedir() -> None:
    others = {
        "/etc/xinetd.d/rsync": block(),
        "/etc/xinetd.d/ftp": block(name="ftp"),
        "/etc/xinetd.d/old.bak": block(name="old"),
        "/etc/xinetd.d/talk~": block(name="talk"),
    }
    result = bring({"/etc/xinetd.conf": CONF}, others=others)
    tables = result.tables
    assert set(tables) == {"finger", "rsync", "ftp"}
    assert [tables[name]["limits"]["max_connections"] for name in ("finger", "rsync")] == [5, 60]
    assert tables["finger"]["environment"] == {"A": "1", "B": "2"}
    assert tables["ftp"]["enabled"] is False
    assert result.said("log_on_success = USERID")
    assert tables["finger"]["access"] == {"allow": ["192.168.1.7", "192.168.1.9"]}
    assert tables["rsync"]["access"] == {"allow": ["10.0.0.0/8"]}


def test_access_that_superd_cannot_keep() -> None:
    """Who accepts by itself is asked by nobody: it is said."""
    result = bring(
        {"/x": block("only_from = 10.0.0.0", usual="socket_type = stream\nwait = yes\nuser = root\nserver = /x")}
    )
    specs(result)
    assert "access" not in result.table
    assert result.said("/x:7: security: not carried over: `access.allow`")


def test_nobody_and_hours() -> None:
    access = bring({"/x": block("only_from =\nno_access = 10.1.0.0\naccess_times = 8:00-18:00 20:30-21:00")}).table[
        "access"
    ]
    assert access == {
        "deny": ["10.1.0.0/16", "0.0.0.0/0", "::/0"],
        "hours": ["Mon-Sun 08:00-18:00", "Mon-Sun 20:30-21:00"],
    }


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("type = RPC\nrpc_version = 1", "portmapper"),
        ("type = TCPMUX\nwait = yes", "tcpmux"),
        ("redirect = 10.0.0.1 80", "redirect"),
        ("server = cat", "absolute"),
        ("socket_type = raw", "type raw"),
        ("banner = /etc/banner", "banner"),
        ("frobnicate = 3", "unknown attribute frobnicate"),
        ("libwrap = x", "security: not carried over: libwrap"),
        ("flags = SENSOR\ndeny_time = FOREVER", "security: not carried over: flags = SENSOR"),
        ("nice = 99", "nice = 99"),
        ("only_from = gateway", "security: not carried over: only_from = gateway"),
    ],
)
def test_what_is_not_carried_over_is_said(line: str, why: str) -> None:
    result = bring({"/etc/xinetd.d/rsync": block(line)})
    assert result.said(why), result.notes
    assert all(note.startswith("/etc/xinetd.d/rsync:") for note in result.notes)


@pytest.mark.parametrize(
    ("text", "line"),
    [("service x\n\n}\n", 3), ("service x\n{\n", 1), ("nonsense\n", 1), ("service x y z w\n", 1)],
)
def test_errors_name_the_line(text: str, line: int) -> None:
    result = bring({"/x": text}, format="xinetd")
    assert result.failures[0].startswith(f"/x:{line}: error: ")


@pytest.mark.parametrize(
    ("text", "networks"),
    [
        ("10.0.0.0", ["10.0.0.0/8"]), ("192.168.1.0", ["192.168.1.0/24"]), ("192.168.1.7", ["192.168.1.7"]),
        ("0.0.0.0", ["0.0.0.0/0"]), ("10.1", ["10.1.0.0/16"]), ("10.0.0.0/12", ["10.0.0.0/12"]),
        ("10.0.0.1/8", ["10.0.0.0/8"]), ("192.168.1.{4,5}", ["192.168.1.4", "192.168.1.5"]),
        ("2001:db8::/32", ["2001:db8::/32"]), ("::1", ["::1"]), (".example.org", [".example.org"]),
        ("localhost", ["127.0.0.1", "::1"]), ("gateway", []), ("300.1.1.1", []), ("1.2.3.{4,x}", []),
    ],
)  # fmt: skip
def test_networks(text: str, networks: list[str]) -> None:
    assert access_networks(text) == networks


@pytest.mark.parametrize(("kind", "listen"), [("TCPMUX", "tcpmux:rsync"), ("TCPMUXPLUS", "tcpmux:+rsync")])
def test_behind_tcpmux(kind: str, listen: str) -> None:
    result = bring({"/etc/xinetd.d/rsync": block(f"type = {kind} UNLISTED")})
    assert (result.table["listen"], result.notes) == (listen, [])
