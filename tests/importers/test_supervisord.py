"""superd.importers.supervisord."""

from __future__ import annotations

from typing import Any

import pytest
from importers.material import Result, bring, specs


def program(text: str, *, before: str = "", kind: str = "program") -> Result:
    main = "" if "command" in text else "command=/bin/cat\n"
    user = "" if "user" in text or before else "user=www\n"
    return bring({"/etc/supervisord.conf": f"[supervisord]\n{before}[{kind}:web]\n{main}{user}{text}\n"})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", {"command": ["/bin/cat"], "user": "www", "run": None, "restart": None}),
        ("command=/bin/cat -a 'b c' \"d\" ; a comment", {"command": ["/bin/cat", "-a", "b c", "d"]}),
        ("command=/bin/cat\n  --more\n  words", {"command": ["/bin/cat", "--more", "words"]}),
        ("command=/bin/cat %(program_name)s %(ENV_HOME)s %% ${X}",
         {"command": ["/bin/cat", "web", "${HOME}", "%", "$${X}"]}),
        ("autostart=false\nautorestart=true", {"enabled": False, "restart": "always"}),
        ("autorestart=false\nexitcodes=0,2", {"restart": "no", "success_status": [0, 2]}),
        ("stopsignal=INT\nstopwaitsecs=7\nstopasgroup=true",
         {"stop_signal": "INT", "stop_timeout": "7s", "kill_mode": "group"}),
        ("directory=/srv\numask=022\nenvironment=A=\"1,2\",B='x y',C=z",
         {"cwd": "/srv", "umask": None, "environment": {"A": "1,2", "B": "x y", "C": "z"}}),
        ("stdout_logfile=/var/log/x\nredirect_stderr=true", {"stdout": "file:/var/log/x", "stderr": "file:/var/log/x"}),
        ("stdout_logfile=/dev/stdout\nstderr_logfile=NONE", {"stdout": "inherit", "stderr": "null"}),
    ],
)  # fmt: skip
def test_programs(text: str, expected: dict[str, Any]) -> None:
    result = program(text)
    assert {key: result.table.get(key) for key in expected} == expected
    if "ENV_" not in text:
        specs(result)


def test_numprocs() -> None:
    result = program(
        "command=/bin/cat %(process_num)02d\nprocess_name=%(program_name)s-%(process_num)02d\n"
        "numprocs=2\nnumprocs_start=8"
    )
    assert result.tables["web@"]["instances"] == ["08", "09"]
    assert [spec.command for spec in specs(result).values()] == [("/bin/cat", "08"), ("/bin/cat", "09")]
    # A template has one form of its instance's name: with two there are two files.
    result = program("command=/bin/cat %(process_num)d\nprocess_name=%(process_num)02d\nnumprocs=2")
    assert {name: spec.command[1] for name, spec in specs(result).items()} == {"web-0": "0", "web-1": "1"}


@pytest.mark.parametrize(
    ("socket", "listen"),
    [
        ("tcp://127.0.0.1:9000", "tcp:127.0.0.1:9000"), ("tcp://localhost:9000", "tcp:127.0.0.1:9000"),
        ("tcp://:9000", "tcp4:9000"), ("unix:///run/%(program_name)s.sock", "unix:/run/web.sock"),
    ],
)  # fmt: skip
def test_fcgi(socket: str, listen: str) -> None:
    result = program(f"socket={socket}\nsocket_owner=www:games\nsocket_mode=0770", kind="fcgi-program")
    specs(result)
    table = result.table
    assert (table["run"], table["pass"]) == ("always-on", "stdio")
    if "socket" in table:
        assert table["socket"] == [{"listen": listen, "mode": "0770", "user": "www", "group": "games"}]
    else:
        assert table["listen"] == listen


def test_the_daemons_own_keys_and_includes() -> None:
    text = "[supervisord]\nuser=daemon\nenvironment=A=1,B=2\n[include]\nfiles = conf.d/*.ini\n"
    text += "[program:a]\ncommand=/bin/a\nenvironment=B=3\n"
    result = bring(
        {"/etc/supervisord.conf": text}, others={"/etc/conf.d/b.ini": "[program:b]\ncommand=/bin/b\nuser=x\n"}
    )
    specs(result)
    assert result.tables["a"]["environment"] == {"A": "1", "B": "3"}
    assert [result.tables[name]["user"] for name in "ab"] == ["daemon", "x"]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("priority=1", "note: priority"), ("stdout_logfile_maxbytes=1MB", "note: stdout_logfile_maxbytes"),
        ("frobnicate=1", "warning: not carried over: frobnicate=1"), ("stopsignal=FOO", "stopsignal=FOO"),
        ("directory=relative", "directory=relative"), ("environment=LISTEN_FDS=1", "environment=LISTEN_FDS"),
        ("command=", "there is no command"),
    ],
)  # fmt: skip
def test_what_is_not_carried_over_is_said(text: str, why: str) -> None:
    assert program(text).said(why)


def test_no_user_is_root_and_said() -> None:
    result = bring({"/x": "[program:a]\ncommand=/bin/a\n[eventlistener:b]\ncommand=/bin/b\n[group:c]\nprograms=a\n"})
    assert result.table["user"] == "root"
    assert result.said("security: there is no user")
    assert result.said("/x:3: warning: not carried over: [eventlistener:b]")
    assert result.said("/x:5: note: [group:c]")


def test_errors_name_the_line() -> None:
    result = bring({"/x": "[program:a]\nnonsense\n"})
    assert result.failures[0].startswith("/x:2: error: ")
