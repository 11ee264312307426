"""superd.importers.upstart: jobs as upstart-socket-bridge(8) and init(5) have them."""

from __future__ import annotations

from typing import Any

import pytest
from importers.material import Result, bring, specs


def job(text: str, *, socket: bool = True, **options: Any) -> Result:
    start = "start on socket PROTO=inet PORT=34567 ADDR=127.0.0.1\n" if socket else ""
    main = "" if "exec " in text or "script\n" in text else "exec /bin/cat\n"
    return bring({"/etc/init/foo.conf": f"{start}{main}{text}\n"}, format="upstart", **options)


def test_socket_job() -> None:
    """The bridge's own example, PROTOCOLS.md 2.11."""
    result = job('description "Web"\nsetuid www\nexec /usr/bin/server --from-upstart')
    specs(result)
    assert result.table == {
        "description": "Web", "listen": "tcp:127.0.0.1:34567", "command": ["/usr/bin/server", "--from-upstart"],
        "run": "on-demand", "fd_protocols": ["upstart"], "user": "www",
    }  # fmt: skip
    assert result.notes == []


@pytest.mark.parametrize(
    ("event", "listen"),
    [
        ("PROTO=inet PORT=80", "tcp4:80"), ("PROTO=inet PORT=80 ADDR=0.0.0.0", "tcp4:80"),
        ("PROTO=inet6 PORT=80 ADDR=::", "tcp6:80"), ("PROTO=inet6 PORT=80 ADDR=::1", "tcp:[::1]:80"),
        ("PROTO=unix SOCKET_PATH=/run/x", "unix:/run/x"), ("PROTO=unix PATH=/run/x", "unix:/run/x"),
        ('PROTO=unix SOCKET_PATH="@x"', "unix:@x"),
    ],
)  # fmt: skip
def test_events(event: str, listen: str) -> None:
    result = bring({"/foo.conf": f"start on socket {event}\nsetuid www\nexec /bin/cat\n"})
    specs(result)
    assert result.table["listen"] == listen


def test_several_events() -> None:
    text = "start on (socket PROTO=inet PORT=80\n  or socket PROTO=unix SOCKET_PATH=/x) or runlevel [2345]\n"
    result = bring({"/foo.conf": text + "setuid www\nexec /bin/cat\n"})
    assert result.table["listen"] == ["tcp4:80", "unix:/x"]
    assert result.said("start on runlevel [2345]")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("respawn", {"restart": "always"}),
        ("respawn\nrespawn limit 5 10", {"restart": "always", "restart_limit": "5/10s"}),
        ("respawn\nnormal exit 0 1 TERM", {"restart": None, "success_status": [0, 1, "TERM"]}),
        ("env A=1\nenv B=\"two words\"", {"environment": {"A": "1", "B": "two words"}}),
        ("setgid games\nchdir /srv\numask 077\nnice 5", {"group": "games", "cwd": "/srv", "umask": "0077",
                                                         "scheduling": {"nice": 5}}),
        ("oom score never", {"scheduling": {"oom_score_adjust": -1000}}),
        ("limit nofile 100 unlimited", {"rlimit": {"nofile": [100, "off"]}}),
        ("kill timeout 30\nkill signal INT\nreload signal USR1",
         {"stop_timeout": "30s", "stop_signal": "INT", "reload_signal": "USR1"}),
        ("console none", {"stdout": "null", "stderr": "null"}),
        ("console output", {"stdout": "inherit", "stderr": "inherit"}),
        ("exec /bin/cat $PORT | wc", {"command": ["/bin/sh", "-e", "-c", "exec /bin/cat $PORT | wc"]}),
        ("script\n  echo ${A}\nend script", {"command": ["/bin/sh", "-e", "-c", "  echo $${A}\n"]}),
        ("exec /bin/cat\npre-start exec /bin/mkdir -p /x\npost-stop script\nrm x\nend script",
         {"start_pre": [["/bin/mkdir", "-p", "/x"]], "stop_post": [["/bin/sh", "-e", "-c", "rm x\n"]]}),
    ],
)  # fmt: skip
def test_stanzas(text: str, expected: dict[str, Any]) -> None:
    main = "" if "exec " in text or "script" in text else "exec /bin/cat\n"
    result = bring({"/foo.conf": f"start on startup\nsetuid www\n{main}{text}\n"}, format="upstart")
    specs(result)
    assert {key: result.table.get(key) for key in expected} == expected


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("expect fork", "expect fork"), ("apparmor switch /x", "security: not carried over: apparmor"),
        ("instance $X", "instance $X"), ("pre-stop exec /bin/x", "pre-stop exec"), ("limit nofile x 3", "limit nofile"),
        ("env A", "env A"), ("cgroup cpu", "security"), ("frobnicate", "frobnicate"),
    ],
)  # fmt: skip
def test_what_is_not_carried_over_is_said(text: str, why: str) -> None:
    result = job(f"exec /bin/cat\n{text}\nsetuid www")
    assert result.said(why)
    assert "not carried over" in result.texts["foo"]


def test_nothing_starts_it_and_it_is_root() -> None:
    result = bring({"/etc/init/foo.conf": "exec /bin/cat\n"})
    assert (result.table["enabled"], result.table["user"]) == (False, "root")
    assert result.said("security: there is no setuid")


def test_override() -> None:
    result = job("setuid www", others={"/etc/init/foo.override": "setuid games\n"})
    assert result.table["user"] == "games"


def test_errors_name_the_line() -> None:
    assert job("script\nx").failures == ["/etc/init/foo.conf:2: error: `script` without `end script`"]
    assert job('exec x\nchdir "').failures[0].startswith("/etc/init/foo.conf:3: error: no closing quotation mark")
