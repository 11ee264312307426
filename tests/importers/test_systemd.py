"""superd.importers.systemd: units in, tables out."""

from __future__ import annotations

from typing import Any

import pytest
from importers.material import Result, bring, specs

U = "/etc/systemd/system"


def pair(socket: str, service: str, **options: Any) -> Result:
    """foo.socket and foo.service, or foo@.service where Accept=yes; User= is given so that nothing is said of root."""
    name = "foo@.service" if "Accept=yes" in socket else "foo.service"
    lines = service if "User=" in service else f"{service}\nUser=www"
    if "ExecStart=" not in lines:
        lines = f"ExecStart=/bin/cat\n{lines}"
    return bring({f"{U}/foo.socket": f"[Socket]\n{socket}\n", f"{U}/{name}": f"[Service]\n{lines}\n"}, **options)


def service(text: str, **options: Any) -> Result:
    lines = text if "ExecStart=" in text else f"ExecStart=/bin/cat\n{text}"
    return bring({f"{U}/foo.service": f"[Service]\nUser=www\n{lines}\n"}, **options)


@pytest.mark.parametrize(
    ("socket", "unit", "expected"),
    [
        ("ListenStream=7\nAccept=yes", "StandardInput=socket", {"listen": "tcp:7", "run": None, "pass": None,
                                                               "stderr": "socket", "command": ["/bin/cat"]}),
        ("ListenStream=7\nAccept=yes", "StandardInput=socket\nStandardError=journal", {"stderr": None}),
        ("ListenStream=7\nAccept=yes", "", {"pass": "listen-fds", "run": None, "stderr": None}),
        ("ListenStream=7", "", {"run": "on-demand", "pass": None,
                                "socket": [{"listen": "tcp:7", "name": "foo.socket"}]}),
        ("ListenStream=7", "StandardInput=socket", {"run": "on-demand", "pass": "stdio", "listen": "tcp:7"}),
        ("ListenDatagram=127.0.0.1:7", "StandardInput=socket",
         {"run": None, "pass": "stdio", "listen": "udp:127.0.0.1:7"}),
        ("ListenStream=7\nAccept=yes\nMaxConnections=9\nMaxConnectionsPerSource=2", "",
         {"limits": {"max_connections": 9, "max_per_source": 2}}),
        ("ListenStream=/run/x.sock\nSocketMode=0660\nSocketUser=www\nSocketGroup=www\nDirectoryMode=700\n"
         "RemoveOnStop=no\nSymlinks=/run/y /run/z\nFileDescriptorName=main", "",
         {"socket": [{"listen": "unix:/run/x.sock", "name": "main", "mode": "0660", "user": "www", "group": "www",
                      "directory_mode": "0700", "remove_on_stop": False, "symlinks": ["/run/y", "/run/z"]}]}),
        ("ListenStream=7\nAccept=yes\nBacklog=5\nNoDelay=yes\nKeepAlive=yes\nKeepAliveTimeSec=60\nKeepAliveProbes=3\n"
         "DeferAcceptSec=2\nReceiveBuffer=64K\nIPTOS=low-delay\nIPTTL=9\nMark=1\nPriority=6\nFreeBind=yes\n"
         "ReusePort=yes\nBindToDevice=lo\nTCPCongestion=reno\nTransparent=yes", "",
         {"socket": [{"listen": "tcp:7", "backlog": 5, "no_delay": True, "keep_alive": {"idle": "1m", "count": 3},
                      "defer_accept": "2s", "receive_buffer": "64K", "tos": 16, "ttl": 9, "mark": 1, "priority": 6,
                      "free_bind": True, "reuse_port": True, "device": "lo", "congestion": "reno",
                      "transparent": True}]}),
        ("ListenDatagram=7\nBroadcast=yes\nPassPacketInfo=yes\nTimestamping=us", "StandardInput=socket",
         {"socket": [{"listen": "udp:7", "broadcast": True, "pass_packet_info": True, "timestamping": True}]}),
        ("ListenStream=7", "NonBlocking=yes",
         {"socket": [{"listen": "tcp:7", "name": "foo.socket", "nonblocking": True}]}),
    ],
)  # fmt: skip
def test_pairs(socket: str, unit: str, expected: dict[str, Any]) -> None:
    result = pair(socket, unit)
    specs(result)
    assert {key: result.table.get(key) for key in expected} == expected
    assert result.notes == []


@pytest.mark.parametrize(
    ("line", "listen"),
    [
        ("ListenStream=80", "tcp:80"), ("ListenStream=127.0.0.1:80", "tcp:127.0.0.1:80"),
        ("ListenStream=0.0.0.0:80", "tcp4:80"), ("ListenStream=[::1]:80", "tcp:[::1]:80"),
        ("ListenStream=[::]:80", "tcp:80"), ("ListenStream=[::]:80\nBindIPv6Only=ipv6-only", "tcp6:80"),
        ("ListenStream=80\nBindIPv6Only=ipv6-only", "tcp6:80"), ("ListenStream=80\nBindIPv6Only=both", "tcp:80"),
        ("ListenStream=[fe80::1]:80%%eth0", "tcp:[fe80::1%eth0]:80"), ("ListenStream=@x", "unix:@x"),
        ("ListenStream=/run/x", "unix:/run/x"), ("ListenStream=%t/x", "unix:/run/x"),
        ("ListenSequentialPacket=/run/x", "unix-seqpacket:/run/x"), ("ListenDatagram=/run/x", "unix-dgram:/run/x"),
        ("ListenFIFO=/run/x", "fifo:/run/x"), ("ListenStream=vsock:2:1234", "vsock:2:1234"),
        ("ListenStream=vsock::1234", "vsock:*:1234"),
        ("ListenDatagram=[ff02::1:3]:5355%%lo", "udp:[ff02::1:3%lo]:5355"),
    ],
)  # fmt: skip
def test_addresses(line: str, listen: str) -> None:
    result = pair(line, "")
    specs(result)
    assert result.table["socket"][0]["listen"] == listen


@pytest.mark.parametrize("line", ["ListenSpecial=/dev/x", "ListenNetlink=audit 1", "ListenMessageQueue=/x",
                                  "ListenStream=host:80", "ListenDatagram=vsock:2:3"])  # fmt: skip
def test_sockets_that_superd_does_not_have(line: str) -> None:
    result = pair(f"{line}\nListenStream=7", "")
    assert [socket["listen"] for socket in result.table["socket"]] == ["tcp:7"]
    assert result.said("foo.socket:2: warning: not carried over: ")
    assert pair(line, "").texts == {}


def test_order_of_sockets_is_that_of_their_fds() -> None:
    text = "ListenStream=1\nListenStream=\nListenDatagram=2\nListenStream=3\nListenDatagram=4"
    assert [s["listen"] for s in pair(text, "").table["socket"]] == ["udp:2", "tcp:3", "udp:4"]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("Type=notify\nNotifyAccess=all\nWatchdogSec=20\nFileDescriptorStoreMax=7",
         {"ready": "notify", "notify_access": "all", "watchdog": "20s", "fdstore": 7}),
        ("", {"restart": "no", "stop_timeout": "1m30s", "ready": None, "run": None}),
        ("Restart=always\nRestartSec=5", {"restart": "always", "restart_delay": "5s", "restart_delay_max": None}),
        ("Restart=on-failure\nRestartSec=1min 20s", {"restart": None, "restart_delay": "1m20s",
                                                     "restart_delay_max": "1m20s"}),
        ("StartLimitBurst=3\nStartLimitInterval=60", {"restart_limit": "3/1m"}),
        ("SuccessExitStatus=1 SIGUSR1 SIGKILL", {"success_status": [0, 1, "USR1", "KILL"]}),
        ("TimeoutStopSec=infinity\nTimeoutStartSec=1h", {"stop_timeout": "off", "ready_timeout": "1h"}),
        ("TimeoutSec=7", {"stop_timeout": "7s", "ready_timeout": "7s"}),
        ("KillSignal=SIGINT\nKillMode=process", {"stop_signal": "INT", "kill_mode": "process"}),
        ("ExecReload=/bin/kill -USR2 $MAINPID\nExecStop=/bin/kill -s QUIT $MAINPID",
         {"reload_signal": "USR2", "stop_signal": "QUIT"}),
        ("RuntimeMaxSec=1h", {"limits": {"max_runtime": "1h"}}),
        ("LimitNOFILE=1024:4096\nLimitCORE=infinity\nLimitCPU=1min\nLimitAS=4G\nLimitNPROC=9",
         {"rlimit": {"nofile": [1024, 4096], "core": ["off", "off"], "cpu": [60, 60], "as": [4294967296, 4294967296],
                     "nproc": [9, 9]}}),
        ("Nice=5\nOOMScoreAdjust=-100\nCPUAffinity=0-2,5\nIOSchedulingClass=idle",
         {"scheduling": {"nice": 5, "oom_score_adjust": -100, "cpu_affinity": [0, 1, 2, 5], "ioprio": "idle"}}),
        ("IOSchedulingClass=best-effort\nIOSchedulingPriority=7", {"scheduling": {"ioprio": "best-effort:7"}}),
        ("Environment=A=1 \"B=two words\" 'C=x'\nEnvironment=D=%n", {"environment":
            {"A": "1", "B": "two words", "C": "x", "D": "foo.service"}}),
        ("PassEnvironment=TZ LANG", {"pass_environment": ["TZ", "LANG"]}),
        ("WorkingDirectory=-/srv\nUMask=77\nGroup=games\nSupplementaryGroups=a 7",
         {"cwd": "/srv", "umask": "0077", "group": "games", "groups": ["a", 7]}),
        ("NoNewPrivileges=no", {"sandbox": {"no_new_privileges": False}}),
        ("NoNewPrivileges=yes", {"sandbox": None}),
        ("ProtectSystem=full\nPrivateTmp=yes\nReadWritePaths=-/srv /var/x\nCapabilityBoundingSet=CAP_KILL CAP_CHOWN",
         {"sandbox": {"capabilities": ["CAP_KILL", "CAP_CHOWN"], "private_tmp": True,
                      "read_only": ["/usr", "/boot", "/etc"], "read_write": ["/srv", "/var/x"]}}),
        ("CapabilityBoundingSet=", {"sandbox": {"capabilities": []}}),
        ("StandardOutput=null\nStandardError=append:/var/log/x", {"stdout": "null", "stderr": "file:/var/log/x"}),
        ("StandardOutput=null", {"stdout": "null", "stderr": "null"}),
        ("Type=oneshot", {"run": "once", "restart": None}),
        ("Type=oneshot\nExecStart=/bin/a\nExecStart=/bin/b", {"start_pre": [["/bin/a"]], "command": ["/bin/b"]}),
        ("ExecStartPre=-/bin/a 'b c'\nExecStartPost=/bin/p\nExecStopPost=/bin/q",
         {"start_pre": [["/bin/sh", "-c", "/bin/a 'b c' || :"]], "start_post": [["/bin/p"]],
          "stop_post": [["/bin/q"]]}),
    ],
)  # fmt: skip
def test_services(line: str, expected: dict[str, Any]) -> None:
    result = service(line)
    specs(result)
    assert {key: result.table.get(key) for key in expected} == expected


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("ExecStart=/bin/cat a 'b c' \"d\\te\" \\x41", ["/bin/cat", "a", "b c", "d\te", "A"]),
        ("ExecStart=cat %% %p %n %N $$x", ["cat", "%", "foo", "foo.service", "foo", "$x"]),
        ("Environment=A=1 \"B=x y\"\nExecStart=/bin/cat $A ${A}z $B ${B} $NONE $NONE/x",
         ["/bin/cat", "1", "1z", "x", "y", "x y", "$NONE/x"]),
        ("Environment=A=1\nExecStart=:/bin/cat $A", ["/bin/cat", "$A"]),
        ("EnvironmentFile=/etc/default/foo\nExecStart=/bin/cat -x $OPTS ${ONE} a${TWO}b 'c d'",
         ["/bin/sh", "-c", "set -f; exec /bin/cat -x $OPTS \"$ONE\" a\"$${TWO}\"b 'c d'"]),
        ("ExecStart=/bin/cat \\\n    -a \\\n# a comment\n    -b", ["/bin/cat", "-a", "-b"]),
        ("ExecStart=/bin/old\nExecStart=\nExecStart=/bin/new", ["/bin/new"]),
    ],
)  # fmt: skip
def test_command_lines(line: str, expected: list[str]) -> None:
    result = service(line)
    specs(result)
    assert result.table["command"] == expected


def test_argv0_of_at() -> None:
    assert service("ExecStart=@/bin/busybox nc -l").table | {"restart": ""} == {
        "command": ["/bin/busybox", "-l"], "argv0": "nc", "user": "www", "restart": "", "stop_timeout": "1m30s",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("ProtectHome=yes", "security: not carried over: ProtectHome=yes"),
        ("PrivateDevices=yes", "security: not carried over: PrivateDevices"),
        ("SystemCallFilter=@system-service", "security: not carried over: SystemCallFilter"),
        ("RestrictAddressFamilies=AF_UNIX", "security: not carried over"),
        ("CapabilityBoundingSet=~CAP_SYS_ADMIN", "security: not carried over"),
        ("DynamicUser=yes", "security: not carried over: DynamicUser"),
        ("IPAddressDeny=any", "security: not carried over: IPAddressDeny"),
        ("ExecStart=+/bin/cat", "security: +"),
        ("Type=forking\nPIDFile=/run/x", "Type=forking"),
        ("KillMode=none", "KillMode=none"),
        ("StateDirectory=foo", "StateDirectory=foo"),
        ("Slice=x.slice", "Slice=x.slice"),
        ("ExecStop=/bin/foo --stop", "ExecStop=/bin/foo --stop"),
        ("TimeoutStopSec=tomorrow", "TimeoutStopSec=tomorrow"),
        ("LimitNOFILE=many", "LimitNOFILE=many"),
        ("Frobnicate=yes", "Frobnicate=yes"),
    ],
)
def test_what_is_not_carried_over_is_said(line: str, why: str) -> None:
    result = service(line)
    assert [note for note in result.notes if why in note and "foo.service:" in note], result.notes
    assert "not carried over" in result.texts["foo"] or why.startswith("security: +")


def test_no_user_is_root_and_said() -> None:
    result = bring({f"{U}/foo.service": "[Service]\nExecStart=/bin/cat\n"})
    assert result.table["user"] == "root"
    assert result.said("security: there is no User=")


def test_drop_ins() -> None:
    files = {
        f"{U}/foo.socket": "[Socket]\nListenStream=7\n",
        f"{U}/foo.service": "[Service]\nExecStart=/bin/a\nUser=x\n",
    }
    others = {
        f"{U}/foo.socket.d/10.conf": "[Socket]\nListenStream=\nListenStream=8\n",
        f"{U}/foo.service.d/override.conf": "[Service]\nExecStart=\nExecStart=/bin/b\n",
        f"{U}/foo.service.d/no.txt": "[Service]\nUser=y\n",
    }
    table = bring(files, others=others).table
    assert (table["socket"][0]["listen"], table["command"], table["user"]) == ("tcp:8", ["/bin/b"], "x")


def test_the_service_is_found_beside_its_socket() -> None:
    others = {f"{U}/bar.service": "[Service]\nExecStart=/bin/cat\nUser=x\n"}
    result = bring({f"{U}/foo.socket": "[Socket]\nListenStream=7\nService=bar.service\n"}, others=others)
    assert set(result.texts) == {"bar"}
    result = bring({f"{U}/foo.socket": "[Socket]\nListenStream=7\n"})
    assert result.said("its service foo.service is not there")


def test_several_sockets_units_of_one_service() -> None:
    result = bring({
        f"{U}/foo.socket": "[Socket]\nListenStream=7\n",
        f"{U}/foo-admin.socket": "[Socket]\nListenStream=/run/a\nService=foo.service\nSocketMode=0600\n",
        f"{U}/foo.service": "[Service]\nExecStart=/bin/cat\nUser=x\n",
    })  # fmt: skip
    specs(result)
    assert result.table["socket"] == [
        {"listen": "tcp:7", "name": "foo.socket"},
        {"listen": "unix:/run/a", "name": "foo-admin.socket", "mode": "0600"},
    ]


def test_templates() -> None:
    unit = "[Service]\nExecStart=/bin/cat %i %I %n\nUser=www\n"
    socket = "[Socket]\nListenStream=/run/%i.sock\n"
    result = bring({f"{U}/foo@.socket": socket, f"{U}/foo@.service": unit + "[Install]\nDefaultInstance=one\n"})
    table = result.table
    assert (set(result.texts), table["instances"]) == ({"foo@"}, ["one"])
    assert table["command"] == ["/bin/cat", "${instance}", "${instance}", "foo@${instance}.service"]
    spec = specs(result)["foo@one"]
    assert str(spec.sockets[0].address) == "unix:/run/one.sock"
    result = bring({f"{U}/foo@bar.service": unit})
    assert specs(result)["foo@bar"].command == ("/bin/cat", "bar", "bar", "foo@bar.service")
    result = bring({f"{U}/foo@.service": unit})
    assert result.table["instances"] == []
    assert result.said("a template without an instance")


def test_where_superd_has_no_instance() -> None:
    """Only some keys are expanded; in the others an instance is said to be missing, and `${` is what it is."""
    unit = "[Service]\nExecStart=@/bin/cat ${X}%i a\nUser=%i\nStandardOutput=append:/var/log/%i.log\n"
    result = bring({f"{U}/foo@one.service": unit})
    assert (result.table["user"], result.table["stdout"]) == ("${instance}", "file:/var/log/one.log")
    assert result.said("foo@one.service:4: warning: not carried over: %i in /var/log/%i.log")
    assert service("ExecStart=@/bin/cat $${X} a").table["argv0"] == "${X}"


def test_relations_between_what_is_imported() -> None:
    def unit(name: str, text: str) -> dict[str, str]:
        return {f"{U}/{name}.service": f"[Unit]\n{text}\n[Service]\nExecStart=/bin/cat\nUser=x\n"}

    result = bring({
        **unit("a", "Requires=b.service\nAfter=b.service network.target c.socket\nWants=x.service"),
        **unit("b", "PartOf=c.service\nBefore=c.service"),
        **unit("c", "Conflicts=d.service"), **unit("d", "BindsTo=b.service"),
        f"{U}/c.socket": "[Socket]\nListenStream=7\n",
    })  # fmt: skip
    specs(result)
    tables = result.tables
    names = ("requires", "wants", "after", "part_of", "conflicts")
    assert {name: {key: table[key] for key in names if key in table} for name, table in tables.items()} == {
        "a": {"requires": ["b"], "after": ["c"]}, "b": {"part_of": ["c"]},
        "c": {"after": ["b"], "conflicts": ["d"]}, "d": {"requires": ["b"], "part_of": ["b"]},
    }  # fmt: skip
    assert result.said("note: Wants=x.service")


# A D-Bus-like service with a seqpacket socket; what PROTOCOLS.md 2.13 says of thin-edge.io; nbdkit; datagrams.
def test_units_of_documents() -> None:
    tedge = bring({
        f"{U}/tedge-agent.socket": "[Socket]\nListenStream=/run/tedge/agent.sock\nSocketMode=0660\nSocketUser=tedge\n"
        "SocketGroup=tedge\nAccept=yes\n[Install]\nWantedBy=sockets.target\n",
        f"{U}/tedge-agent@.service": "[Unit]\nDescription=plugin\nCollectMode=inactive-or-failed\n"
        "[Service]\nExecStart=/usr/bin/tedge plugin\nStandardInput=socket\nUser=tedge\n",
        f"{U}/tedge-log.socket": "[Socket]\nListenStream=/run/tedge/log.sock\nBacklog=5\nPriority=6\n",
        f"{U}/tedge-log.service": "[Service]\nExecStart=/usr/bin/tedge log\nUser=tedge\n",
    })  # fmt: skip
    specs(tedge)
    assert tedge.tables["tedge-agent"] == {
        "description": "plugin", "command": ["/usr/bin/tedge", "plugin"], "stderr": "socket", "user": "tedge",
        "socket": [{"listen": "unix:/run/tedge/agent.sock", "mode": "0660", "user": "tedge", "group": "tedge"}],
    }  # fmt: skip
    assert tedge.tables["tedge-log"]["socket"] == [
        {"listen": "unix:/run/tedge/log.sock", "name": "tedge-log.socket", "backlog": 5, "priority": 6}
    ]
    nbdkit = bring({
        f"{U}/nbdkit.socket": "[Unit]\nDescription=NBDKit Network Block Device server\n[Socket]\nListenStream=10809\n"
        "[Install]\nWantedBy=sockets.target\n",
        f"{U}/nbdkit.service": "[Service]\nExecStart=/usr/sbin/nbdkit file /var/tmp/disk.img\nUser=nobody\n",
    })  # fmt: skip
    assert specs(nbdkit)["nbdkit"].pass_ == "listen-fds"
    assert nbdkit.notes == []
    foo = pair("ListenDatagram=0.0.0.0:3333\nListenDatagram=/run/foo.dgram", "ExecStart=/usr/bin/foo")
    assert [str(s.address) for s in specs(foo)["foo"].sockets] == ["udp4:3333", "unix-dgram:/run/foo.dgram"]


@pytest.mark.parametrize(
    ("text", "line"), [("ExecStart=/x\n", 1), ("[Service]\nnonsense\n", 2), ("[Service]\nExecStart=/x 'y\n", 2)]
)
def test_errors_name_the_line(text: str, line: int) -> None:
    result = bring({f"{U}/foo.service": text})
    assert result.failures[0].startswith(f"{U}/foo.service:{line}: error: ")


def test_directories_that_systemd_makes_are_named() -> None:
    result = bring({
        "/etc/systemd/system/x.socket": "[Socket]\nListenStream=1\n",
        "/etc/systemd/system/x.service":
            "[Unit]\nRequires=x.socket y.socket\n[Service]\nUser=w\nExecStart=/x\nRuntimeDirectory=a b/c\n",
    })  # fmt: skip
    assert result.said("/run/a and /run/b/c must be there"), result.notes
    assert result.said("Requires=y.socket: give these files to the same import"), result.notes
