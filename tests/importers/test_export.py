"""superd.importers.export: units that systemd understands, and that import as the same service."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from importers.material import bring, check, specs

from superd.core.spec import Address, ServiceSpec
from superd.core.toml import format_document
from superd.importers.export import export


def spec_of(table: dict[str, Any], name: str = "web") -> ServiceSpec | None:
    """None: there is no such service, the table contradicts itself."""
    found, problems = check({name: format_document(table)})
    return None if any(problem.is_error for problem in problems) else found[name]


def again(spec: ServiceSpec) -> ServiceSpec:
    """import(export(spec))."""
    units, _ = export(spec)
    result = bring({f"/etc/systemd/system/{name}": text for name, text in units.items()})
    assert not [note for note in result.notes if "warning" in note], (result.notes, units)
    found = specs(result)
    assert set(found) == {spec.name}, (units, result.texts)
    return canonical(found[spec.name])


def canonical(spec: ServiceSpec) -> ServiceSpec:
    """One of the ways to write the same: the file's name, tcp4:127.0.0.1:7 for tcp:127.0.0.1:7, order of rlimits, a
    notify_access beside what implies it."""
    sockets = []
    for socket in spec.sockets:
        address = socket.address
        if address.is_ip and address.host == "::":
            address = Address(address.scheme[:3] + "6", None, address.port)  # type: ignore[arg-type]
        elif address.is_ip and address.host == "0.0.0.0":
            address = Address(address.scheme[:3] + "4", None, address.port)  # type: ignore[arg-type]
        elif address.is_ip and address.host is not None:
            address = replace(address, scheme=address.scheme[:3])  # type: ignore[arg-type]
        sockets.append(replace(socket, address=address))
    context = replace(spec.context, rlimits=tuple(sorted(spec.context.rlimits)))
    return replace(spec, source="", sockets=tuple(sockets), context=context, notify_asked=spec.notifies)


# -- random services: only what systemd has words for

NAMES = st.from_regex(r"[a-z][a-z0-9_.-]{0,9}", fullmatch=True)
WORDS = st.one_of(
    st.text(st.characters(codec="utf-8", exclude_characters="\0", exclude_categories=("Cs",)), max_size=12),
    st.sampled_from(["${A}", "$${A}", "$A", "$$", "%i", "%%", ";", "a b", "'", "@", "-", "\\x41", "\\"]),
)
LINES = st.text(st.characters(codec="ascii", min_codepoint=32, max_codepoint=126, exclude_characters="\\"), max_size=20)
ABSOLUTE = st.from_regex(r"/[a-zA-Z0-9_%$.-]{1,8}(/[a-zA-Z0-9_%-]{1,8})?", fullmatch=True).filter(
    lambda p: "/." not in p
)
SPANS = st.sampled_from(["100ms", "5s", "1m30s", "1h", "2d", "250us"])
BOOLS = st.booleans()


def literal(text: str) -> str:
    return text.replace("${", "$${")


COMMANDS = st.builds(
    lambda program, words: [literal(program), *map(literal, words)], ABSOLUTE, st.lists(WORDS, max_size=4)
)
PORTS = st.integers(1, 65535)
ADDRESSES = {
    "tcp": st.one_of(
        PORTS.map(lambda port: f"tcp:{port}"), PORTS.map(lambda port: f"tcp4:{port}"),
        PORTS.map(lambda port: f"tcp6:{port}"), PORTS.map(lambda port: f"tcp:127.0.0.1:{port}"),
        PORTS.map(lambda port: f"tcp:[::1]:{port}"), PORTS.map(lambda port: f"tcp:[fe80::1%eth0]:{port}"),
    ),
    "unix": st.one_of(ABSOLUTE.map(lambda path: f"unix:{literal(path)}"), NAMES.map(lambda name: f"unix:@{name}")),
    "udp": st.one_of(PORTS.map(lambda port: f"udp:{port}"), PORTS.map(lambda port: f"udp:127.0.0.1:{port}")),
    "unix-dgram": ABSOLUTE.map(lambda path: f"unix-dgram:{literal(path)}"),
    "unix-seqpacket": ABSOLUTE.map(lambda path: f"unix-seqpacket:{literal(path)}"),
    "fifo": ABSOLUTE.map(lambda path: f"fifo:{literal(path)}"),
    "vsock": PORTS.map(lambda port: f"vsock:2:{port}"),
}  # fmt: skip
IP_OPTIONS = {
    "reuse_port": BOOLS, "free_bind": BOOLS, "transparent": BOOLS, "device": NAMES, "tos": st.integers(0, 255),
    "ttl": st.integers(1, 255), "mark": st.integers(0, 2**32 - 1), "priority": st.integers(0, 255),
    "receive_buffer": st.integers(256, 2**20), "send_buffer": st.integers(2048, 2**20),
}  # fmt: skip
TCP_OPTIONS = {
    **IP_OPTIONS, "backlog": st.integers(1, 9999), "no_delay": BOOLS, "congestion": NAMES,
    "keep_alive": st.one_of(BOOLS, st.fixed_dictionaries({}, optional={
        "idle": st.just("1m"), "interval": st.just("7s"), "count": st.integers(1, 127)}).filter(bool)),
    "defer_accept": st.sampled_from(["1s", "1m"]), "protocol": st.just("sctp"),
}  # fmt: skip
UDP_OPTIONS = {**IP_OPTIONS, "broadcast": BOOLS, "pass_packet_info": BOOLS, "timestamping": BOOLS}
MODES = st.sampled_from(["0600", "0660", "0666"])
PATH_OPTIONS = {
    "mode": MODES, "user": st.sampled_from(["www", 7]), "group": st.just("games"), "directory_mode": st.just("0700"),
    "remove_on_stop": BOOLS, "symlinks": st.lists(ABSOLUTE, max_size=2, unique=True),
}  # fmt: skip
UNIX_OPTIONS = {**PATH_OPTIONS, "backlog": st.integers(1, 9999), "pass_credentials": BOOLS}
OPTIONS = {
    "tcp": TCP_OPTIONS, "udp": UDP_OPTIONS, "unix": UNIX_OPTIONS, "fifo": PATH_OPTIONS, "vsock": {},
    "unix-dgram": {**PATH_OPTIONS, "pass_credentials": BOOLS}, "unix-seqpacket": UNIX_OPTIONS,
}  # fmt: skip


@st.composite
def sockets(draw: st.DrawFn, schemes: tuple[str, ...], *, name: bool) -> dict[str, Any]:
    scheme = draw(st.sampled_from(schemes))
    table = {"listen": draw(ADDRESSES[scheme]), **draw(st.fixed_dictionaries({}, optional=OPTIONS[scheme]))}
    if name and draw(BOOLS):
        table["name"] = draw(st.sampled_from(["web", "admin", "a%b c"]))
    return table


COMMON = {
    "description": LINES.map(str.strip),
    "argv0": WORDS.filter(bool),
    "group": st.just("games"),
    "groups": st.lists(st.sampled_from(["a", "b", 7]), min_size=1, max_size=2, unique=True),
    "cwd": ABSOLUTE.map(literal),
    "umask": st.sampled_from(["0077", "0002"]),
    "environment": st.dictionaries(st.from_regex(r"[A-KM-Z]{1,5}", fullmatch=True), WORDS.map(literal), max_size=3),
    "environment_file": st.just("/etc/default/web"),
    "pass_environment": st.lists(st.sampled_from(["TZ", "LANG"]), unique=True),
    "stop_signal": st.sampled_from(["INT", "USR1", "RTMIN+3", "TERM"]),
    "reload_signal": st.sampled_from(["USR2", "HUP"]),
    "stop_timeout": st.one_of(SPANS, st.just("off")),
    "kill_mode": st.sampled_from(["tree", "process", "group"]),
    "rlimit": st.dictionaries(
        st.sampled_from(["nofile", "core", "as"]), st.sampled_from([[1, 2], [5, "off"]]), max_size=2
    ),
    "scheduling": st.fixed_dictionaries({}, optional={
        "nice": st.integers(-20, 19), "ioprio": st.sampled_from(["idle", "best-effort:0", "realtime:7"]),
        "oom_score_adjust": st.integers(-1000, 1000), "cpu_affinity": st.just([0, 2, 3])}),
    "sandbox": st.fixed_dictionaries({}, optional={
        "no_new_privileges": BOOLS, "chroot": ABSOLUTE.map(literal), "private_tmp": BOOLS, "private_network": BOOLS,
        "private_pids": BOOLS,
        "capabilities": st.lists(st.sampled_from(["NET_RAW", "KILL", "CHOWN"]), unique=True, max_size=2),
        "ambient_capabilities": st.just(["KILL"]),
        "read_only": st.just(["/", "/a b%c"]), "read_write": st.just(["/v"])}),
}  # fmt: skip
LONG = {
    "ready": st.sampled_from(["start", "notify"]),
    "ready_timeout": st.one_of(SPANS, st.just("off")),
    "notify_access": st.sampled_from(["none", "main", "all"]),
    "watchdog": SPANS,
    "fdstore": st.integers(0, 9),
    "restart": st.sampled_from(["no", "always", "on-failure", "on-abort"]),
    "restart_delay": st.sampled_from(["0s", "100ms", "5s"]),
    "restart_limit": st.sampled_from(["5/10s", "1/1h"]),
    "success_status": st.lists(st.sampled_from([1, 2, "USR1"]), max_size=2, unique=True).map(lambda more: [0, *more]),
    "cgroup": st.fixed_dictionaries(
        {},
        optional={
            "memory_max": st.sampled_from(["64M", 1_000_000, "off"]),
            "pids_max": st.integers(1, 9),
            "cpu_max": st.sampled_from(["50%", "200%"]),
        },
    ),
    "start_pre": st.lists(COMMANDS, max_size=2),
    "start_post": st.lists(COMMANDS, max_size=1),
    "stop_post": st.lists(COMMANDS, max_size=2),
}


@st.composite
def services(draw: st.DrawFn) -> dict[str, Any]:
    run = draw(st.sampled_from(["per-connection", "on-demand", "always-on", "once"]))
    table: dict[str, Any] = {"command": draw(COMMANDS), "run": run, "user": draw(st.sampled_from(["root", "www", 7]))}
    table |= draw(st.fixed_dictionaries({}, optional=COMMON | ({} if run == "per-connection" else LONG)))
    table["stderr"] = draw(st.sampled_from(["log", "null", "file:/var/log/x"]))
    if run == "per-connection":
        table["pass"] = draw(st.sampled_from(["stdio", "listen-fds"]))
        shared = draw(sockets(("tcp", "unix", "unix-seqpacket", "vsock"), name=False))
        table["socket"] = [shared]
        limits = {"max_connections": st.integers(1, 1000), "max_per_source": st.integers(1, 9), "max_runtime": SPANS}
        table["limits"] = draw(st.fixed_dictionaries({}, optional=limits))
    else:
        stdio = draw(BOOLS)
        count = st.integers(1 if stdio or run == "on-demand" else 0, 1 if stdio else 3)
        every = sockets(tuple(ADDRESSES), name=not stdio)
        table["socket"] = [draw(every) for _ in range(draw(count))]
        if table["socket"]:
            table["pass"] = "stdio" if stdio else "listen-fds"
            if draw(BOOLS):
                for socket in table["socket"]:
                    socket["nonblocking"] = True
    if not table["socket"]:
        del table["socket"]
    if table.get("pass") == "stdio" or (run == "per-connection" and "pass" not in table):
        table["stderr"] = draw(st.sampled_from(["log", "socket"]))
    else:
        table["stdout"] = draw(st.sampled_from(["log", "null", "file:/var/log/y"]))
    return table


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
@given(services())
@example(
    {"command": ["/x", ";", "", "a b", "$A", "${B}".replace("${", "$${"), "%n", "'\"\\", "\n\t\x01é"], "user": "www"}
)
@example({"command": ["/x"], "user": "root", "sandbox": {"no_new_privileges": True}, "description": "50% of $x; # y"})
def test_import_of_an_export_is_the_same(table: dict[str, Any]) -> None:
    if (spec := spec_of(table)) is not None:
        assert again(spec) == canonical(spec), export(spec)


def test_relations_come_back() -> None:
    tables = {
        "a": {"command": ["/x"], "user": "www", "requires": ["b"], "after": ["c"], "part_of": ["c"]},
        "b": {"command": ["/x"], "user": "www", "wants": ["c"], "conflicts": ["d"]},
        "c": {"command": ["/x"], "user": "www"}, "d": {"command": ["/x"], "user": "www"},
    }  # fmt: skip
    before, _ = check({name: format_document(table) for name, table in tables.items()})
    units = {f"/u/{unit}": text for spec in before.values() for unit, text in export(spec)[0].items()}
    after = specs(bring(units))
    assert {name: canonical(spec) for name, spec in after.items()} == {n: canonical(s) for n, s in before.items()}


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"limits": {"on_full": "refuse"}}, "limits.on_full"), ({"limits": {"rate": "5/1s"}}, "limits.rate"),
        ({"run": "on-demand", "idle_timeout": "5m"}, "idle_timeout"), ({"listen": "tcp:0"}, "kernel chooses"),
        ({"run": "always-on", "ready": "fd:9"}, 'ready = "fd:9"'), ({"stderr": "inherit"}, "inherit"),
        ({"run": "on-demand", "fd_protocols": ["systemd", "upstart"]}, "fd_protocols"),
        ({"groups": []}, "groups"), ({"access": {"allow": ["10.0.0.0/8"]}}, "[access]"),
        ({"kill_mode": "group"}, "kill_mode"),
        ({"run": "always-on", "restart_delay_max": "2m"}, "restart_delay_max"),
        ({"pass_environment": ["*"]}, "pass_environment"),
    ],
)  # fmt: skip
def test_what_systemd_has_no_word_for_is_said(more: dict[str, Any], said: str) -> None:
    spec = spec_of({"listen": "tcp:7", "command": ["/x"], "user": "www", **more})
    assert spec is not None
    assert [line for line in export(spec)[1] if said in line]


def test_proxy_protocol_is_said() -> None:
    socket = {"listen": "tcp:7", "proxy_protocol": True, "proxy_trusted": ["::1"]}
    spec = spec_of({"socket": [socket], "command": ["/x"], "user": "www"})
    assert spec is not None and "proxy_protocol of tcp:7" in export(spec)[1]


def test_ports_and_fds_are_filled_in() -> None:
    spec = spec_of({
        "command": ["/x", "--port=${port:b}", "--fd=${fd:b}", "$${HOME}"], "run": "always-on", "user": "www",
        "socket": [{"listen": "unix:/a", "name": "a"}, {"listen": "tcp:81", "name": "b"}],
    })  # fmt: skip
    assert spec is not None
    units, _ = export(spec)
    assert 'ExecStart=/x --port=81 --fd=4 "$${HOME}"' in units["web.service"]
    assert set(units) == {"web.socket", "web-2.socket", "web.service"}


SAMPLES: list[dict[str, Any]] = [
    {"listen": "tcp:7", "command": ["/bin/cat", "a b", "%n", "$x"], "user": "daemon", "stderr": "socket"},
    {"listen": "unix:/run/web.sock", "command": ["/bin/cat"], "user": "root", "run": "on-demand", "ready": "notify"},
    {"command": ["/bin/cat"], "argv0": "dog", "user": "daemon", "restart": "always", "restart_limit": "5/10s",
     "environment": {"A": "two words", "B": "\"q\""}, "rlimit": {"nofile": [64, "off"]}, "watchdog": "20s",
     "scheduling": {"nice": 5, "ioprio": "idle", "cpu_affinity": [0]}, "start_pre": [["/bin/true", ";"]]},
    {"command": ["/bin/cat"], "user": "daemon", "run": "once"},
    {"command": ["/bin/cat"], "user": "daemon", "run": "on-demand",
     "socket": [{"listen": "tcp:80", "keep_alive": {"idle": "1m"}, "no_delay": True, "backlog": 7},
                {"listen": "udp:127.0.0.1:81", "receive_buffer": "64K", "tos": 16},
                {"listen": "unix-seqpacket:/run/s", "mode": "0660", "symlinks": ["/run/t"]},
                {"listen": "fifo:/run/f"}]},
]  # fmt: skip


def test_systemd_understands_the_units(tmp_path: Path, require: Callable[[str], str]) -> None:
    analyze = require("systemd-analyze")
    for number, table in enumerate(SAMPLES):
        spec = spec_of(table, f"superd-test-{number}")
        assert spec is not None
        units, _ = export(spec)
        for name, text in units.items():
            (tmp_path / name).write_text(text)
    names = sorted(path.name for path in tmp_path.iterdir())
    # Of a template, what an instance of it is like.
    paths = [str(tmp_path / name.replace("@.service", "@1.service")) for name in names]
    done = subprocess.run(
        [analyze, "verify", "--man=no", "--generators=no", *paths], capture_output=True, text=True, timeout=60
    )
    ours = [line for line in (done.stdout + done.stderr).splitlines() if "superd-test" in line]
    assert (ours, done.returncode) == ([], 0), done.stderr
    # The test can fail: a key that systemd does not know is named.
    (tmp_path / "superd-test-bad.service").write_text("[Service]\nType=frob\nExecStart=relative/x\n")
    done = subprocess.run(
        [analyze, "verify", "--man=no", str(tmp_path / "superd-test-bad.service")],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "superd-test-bad.service" in done.stderr
    shutil.rmtree(tmp_path)
