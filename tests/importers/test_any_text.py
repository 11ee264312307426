"""Whatever a file contains: services that superd takes, or an error that names the line. Never a traceback."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from importers.material import Result, bring, check

from superd.importers import FORMATS, detect

CRASHERS = sorted((Path(__file__).parent / "crashers").iterdir())
# Pieces that lead deep into each grammar; hypothesis puts them together.
PIECES = {
    "inetd": """ident|stream|dgram|tcp|udp6|unix|tcp46|nowait|wait|nowait.5|nowait/1/2/3|root|a.b|/bin/cat|cat|internal
        |echo|/run/x|127.0.0.1:|:a:b:660:/x|tcp,sndbuf=4k|rpc/tcp|tcpmux/+x|on|off|=|,|;|"|'|bind|exec|args|#|.include
        |#@ x|\\|[::1]:7|host:7|*:""",
    "xinetd": """service x|{|}|defaults|socket_type = stream|wait = yes|user = a|server = /x|server_args = ${a} b
        |+=|-=|=
        |only_from = 1.2.3.{4,5} 10.0.0.0/8 ::1|no_access = 0.0.0.0|cps = 1 2|instances = 9|env = A=1 B
        |flags = IPv6 SENSOR
        |type = INTERNAL|port = 7|bind = 1.2.3.4|protocol = udp|includedir /d|id = Ü|access_times = 1:2-3:4|nice = -3
        |rlimit_as = 3M|umask = 22|redirect = a 1|disable = yes|per_source = 0|groups = yes|#""",
    "systemd": """[Socket]|[Service]|[Unit]|[Install]|ListenStream=80|ListenStream=/x|ListenDatagram=[::1]:7
        |ListenFIFO=/f
        |Accept=yes|ExecStart=/x $A ${B} %i|ExecStart=@/a b 'c|ExecStart=-+!|ExecStartPre=/y ; /z|Environment=A=1 "B=2
        |EnvironmentFile=-/e|User=|User=%i|Type=notify|Type=oneshot|Restart=always|RestartSec=99999999999999
        |LimitNOFILE=1:2:3
        |CPUAffinity=0-99999|TimeoutSec=infinity|KillSignal=99|SuccessExitStatus=1 FOO|StandardInput=socket
        |StandardOutput=file:x|WatchdogSec=-1|After=x.service|Requires=foo.socket|\\|;|#|KeepAliveTimeSec=0|Mark=-1
        |SocketMode=9|IPTOS=x|BindToDevice=aaaaaaaaaaaaaaaaaaa|FileDescriptorName=a:b|DeferAcceptSec=0|MaxConnections=0
        |SupplementaryGroups=|UMask=7777|CapabilityBoundingSet=CAP_X|Symlinks=/a b|Description=%i ü \\x""",
    "supervisord": """[program:x]|[fcgi-program:y]|[supervisord]|[include]|[group:z]|command=/x %(process_num)02d "a
        |numprocs=3|numprocs_start=999999|process_name=%(program_name)s_%(process_num)s|environment=A="1",B='2',C|user=u
        |socket=tcp://a:1|socket=unix:///x|socket_mode=9|directory=%(here)s|stopsignal=X|exitcodes=a,1|files=*.x|umask=9
        |stdout_logfile=%(ENV_X)s|%|%(x)|%%| ; c|\t more|autorestart=true|redirect_stderr=true""",
    "upstart": """start on socket PROTO=inet PORT=80 ADDR=1.2.3.4|start on (a and|or socket PROTO=unix PATH=/x)
        |exec /x $A
        |exec|script|end script|respawn|respawn limit 1 2|env A=1|env|setuid u|limit nofile 1 x|oom score -99|oom 3
        |kill timeout 5|kill signal X|normal exit 0 TERM|console none|expect fork|pre-start script|pre-start exec /y
        |umask 9|nice 99|chdir x|"|'|\\|instance $X|description|manual|task""",
}  # fmt: skip
# What a text begins with, so that there is a service for the rest to spoil.
BEGINNINGS = {
    "inetd": "ident stream tcp nowait root /bin/cat cat",
    "xinetd": "service ident\n{\nsocket_type = stream\nwait = no\nuser = root\nserver = /bin/cat",
    "systemd": "[Socket]\nListenStream=7\n[Service]\nExecStart=/bin/cat\nUser=u",
    "supervisord": "[program:x]\ncommand=/bin/cat\nuser=u",
    "upstart": "start on socket PROTO=inet PORT=80\nexec /bin/cat\nsetuid u",
}
# What a key means is superctl check's business, which import shows at once; the file itself has to be right.
FINE = {"bad-value", "unknown-user", "unknown-group", "relative-program", "missing-key", "address-taken"}


def soup(kind: str) -> st.SearchStrategy[str]:
    pieces = [piece.strip(" \n") for piece in PIECES[kind].split("|")]
    words = st.one_of(st.sampled_from(pieces), st.sampled_from(["\n", " ", "\t", "\n\n"]), st.text(max_size=4))
    lines = st.lists(st.sampled_from(pieces), max_size=12).map("\n".join)
    begun = lines.map(lambda text: f"{BEGINNINGS[kind]}\n{text}\n{'}' if kind == 'xinetd' else ''}\n")
    return begun | st.lists(words, max_size=30).map("\n".join) | st.lists(words, max_size=30).map(" ".join)


def bring_text(text: str, kind: str | None) -> Result:
    """As one file; as both units of a pair."""
    return bring(
        dict.fromkeys(["/d/foo.service", "/d/foo.socket"] if kind == "systemd" else ["/d/foo"], text), format=kind
    )


def holds(text: str, kind: str | None) -> None:
    result = bring_text(text, kind)
    for failure in result.failures:
        assert re.match(r"/d/foo[a-z.]*(:\d+)?: error: \S", failure), failure
    for note in result.notes:
        assert re.match(r"/\S*(:\d+)?: (note|warning|security): \S", note), note
    _, problems = check(result.texts)
    wrong = [problem for problem in problems if problem.is_error and problem.code not in FINE]
    assert wrong == [], result.texts


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=200), st.sampled_from([None, *FORMATS]))
def test_any_text(text: str, kind: str | None) -> None:
    holds(text, kind)
    assert detect("/x", text) in (None, *FORMATS)


@pytest.mark.parametrize("kind", PIECES)
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_pieces_in_any_order(kind: str, data: st.DataObject) -> None:
    holds(data.draw(soup(kind)), kind)


@pytest.mark.parametrize("path", CRASHERS, ids=lambda path: path.name)
def test_what_once_was_a_traceback(path: Path) -> None:
    """NAME.FORMAT: a text that broke an importer while it was written."""
    holds(path.read_text(), path.suffix[1:])
