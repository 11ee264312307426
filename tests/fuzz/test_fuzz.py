"""Bytes of anybody's making against each parser: a value or the error that it promises, and nothing else.

Each runs a second; SUPERD_FUZZ_S=60 makes that a minute (`make fuzz`). What breaks a parser is kept by its smallest
form in crashers/TARGET-HASH, and from then on is tried in every run.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from loading import load_all

from superd.core import varlink
from superd.core.address import parse_address
from superd.core.lifecycle import TRANSITIONS, Ending, Event, History, State, judge_exit
from superd.core.messages import Record, records, unpack
from superd.core.problems import format_problems
from superd.core.spec import RateSpec, RestartPolicy
from superd.core.values import (
    format_duration,
    format_rate,
    format_size,
    parse_duration,
    parse_rate,
    parse_size,
    split_command,
)
from superd.system import notify

SECONDS = float(os.environ.get("SUPERD_FUZZ_S", "1"))
CRASHERS = Path(__file__).parent / "crashers"


def text_of(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


def address(data: bytes) -> None:
    def port_of(name: str, _: str) -> int | None:
        return {"http": 80}.get(name)

    try:
        found = parse_address(text_of(data), directory="/d", port_of=port_of)
    except ValueError as error:
        assert str(error)
        return
    assert parse_address(str(found), directory="/elsewhere", port_of=port_of) == found


def duration(data: bytes) -> None:
    try:
        found = parse_duration(text_of(data))
    except ValueError as error:
        assert str(error)
        return
    assert found >= 0.0
    if found:
        assert abs(parse_duration(format_duration(found)) - found) <= 1e-6 * max(1.0, found)


def rate(data: bytes) -> None:
    try:
        found = parse_rate(text_of(data))
    except ValueError as error:
        assert str(error)
        return
    assert found.count > 0 and found.per_s > 0
    assert parse_rate(format_rate(found)) == found


def size(data: bytes) -> None:
    try:
        found = parse_size(text_of(data))
    except ValueError as error:
        assert str(error)
        return
    text = format_size(found)  # bytes alone, such as those of "0K", are written as a number
    assert parse_size(int(text) if text.isdecimal() else text) == found


def command(data: bytes) -> None:
    try:
        found = split_command(text_of(data))
    except ValueError as error:
        assert str(error)
        return
    assert all(isinstance(word, str) for word in found)


def schema(data: bytes) -> None:
    snapshot, problems = load_all({"git.toml": data, "superd.toml": data})
    assert ("git" in snapshot.services) != ("git" in snapshot.broken)
    for style in ("full", "short", "json", "github"):
        format_problems(problems, style)


def notification(data: bytes) -> None:
    """Parsed as it is, and read from a socket: the text stays below its limit, and no fd is left."""
    fields = notify.parse(data)
    assert all(isinstance(name, str) and isinstance(value, str) for name, value in fields.items())
    for value in fields.values():
        found = notify.number(value)
        assert found is None or 0 <= found < 1 << 64
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with ours, theirs:
        ours.setblocking(False)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        theirs.send(data)
        message = notify.receive(ours)
        assert message is not None and not message.fds
        assert notify.receive(ours) is None


def control(data: bytes) -> None:
    splitter = varlink.Splitter()
    try:
        for message in splitter.feed(data):
            call = varlink.parse_call(message)
            assert isinstance(call.method, str)
            json.dumps(call.parameters)
    except varlink.ProtocolError as error:
        assert str(error)


def message(data: bytes) -> None:
    try:
        unpack(data)
    except ValueError:
        pass
    size = len(Record(b"x", 0, 0, 0, 0).pack())
    assert all(isinstance(one, Record) for one in records(data[: len(data) // size * size]))


def restart(data: bytes) -> None:
    """A life for each two bytes: its end is judged, and the state machine knows what that makes of the service."""
    history = History()
    limit = RateSpec(3, 5.0) if data[:1] > b"\x80" else None
    policies = ("no", "on-success", "on-failure", "on-abnormal", "on-abort", "on-watchdog", "always")
    now = 0.0
    for flags, how in zip(data[::2], data[1::2], strict=False):
        ending = Ending(
            status=how % 4 if how < 128 else None,
            signal="SEGV" if how >= 192 else "KILL" if how >= 160 else None,
            failure="cannot start" if 128 <= how < 160 else None,
            lived_s=float(how),
            left_traffic=bool(flags & 1),
        )
        now += how / 16
        event, delay_s = judge_exit(
            ending,
            on_demand=bool(flags & 2),
            wish_up=bool(flags & 4),
            again=bool(flags & 8),
            policy=RestartPolicy(policy=policies[flags % 7], limit=limit),  # type: ignore[arg-type]
            history=history,
            now=now,
        )
        assert 0.0 <= delay_s <= 30.0 and (delay_s > 0.0) == (event is Event.EXIT_RETRY)
        assert len(history.starts) <= 3
        state = State.STOPPING if event in (Event.EXIT_STOPPED, Event.EXIT_AGAIN) else State.READY
        assert (state, event) in TRANSITIONS


PIECES: dict[str, list[bytes]] = {
    name: pieces.encode().split()
    for name, pieces in {
        "address": "tcp: tcp4: tcp6: udp: unix: unix-dgram: fifo: vsock: fd: // [ ] :: % * @ / 0 80 65536 http ..",
        "duration": "1 1.5 ms s m h d us off 9999999999999999999 - + . e ² ١",
        "rate": "50 / 1s 1m 0 off 0.1 s 1e9 - 99999999999999999999",
        "size": "64 M MiB MB K G T 1.5 -1 99999999999999999999",
        "command": "/bin/cat \" ' \\ $( | > && ; ${ } a # ` ~ *",
        "schema": """listen="tcp:7" command="/bin/cat" [limits] [[socket]] [access] [defaults] a.b = [ ] { } , " '''
            true 1 nan 1e999 user "root" allow run "per-connection" #""",
        "notification": """READY=1 STATUS= MAINPID= = WATCHDOG=1 WATCHDOG_USEC= 99999999999999999999 0 -1 FDNAME= a:b
            FDSTORE=1 BARRIER=1""",
        "control": """{ } "method" : "a.B" "parameters" , [ ] 1e999 NaN true "more" null "\\ud800" -""",
        "message": """{ } "kind" : "x" , [ ]""",
        "restart": "",
    }.items()
}
NOISE = [b"\0", b"\n", b"\xff", b"\x1b", b"\xef\xbb\xbf", b"[" * 3000, b"9" * 5000]
for name in ("schema", "notification", "control", "message"):
    PIECES[name] += NOISE
PIECES["control"].append(b'{"method":"io.superd.Control.List","parameters":{}}\0')
TARGETS: dict[str, Callable[[bytes], None]] = {
    function.__name__: function
    for function in (address, duration, rate, size, command, schema, notification, control, message, restart)
}


def soup(target: str) -> st.SearchStrategy[bytes]:
    noise = st.binary(max_size=40)
    if not PIECES[target]:
        return st.binary(max_size=200)
    glue = b" " if target in ("schema", "command") else b""
    return noise | st.lists(st.sampled_from(PIECES[target]) | st.binary(max_size=4), max_size=25).map(glue.join)


@pytest.mark.parametrize("target", TARGETS)
def test_any_bytes(target: str) -> None:  # H9 K13 F14 I9 J8 P1
    tried = b""

    @settings(max_examples=50, deadline=None, database=None, derandomize=False, suppress_health_check=list(HealthCheck))
    @given(soup(target))
    def some(data: bytes) -> None:
        nonlocal tried
        tried = data
        TARGETS[target](data)

    until = time.monotonic() + SECONDS
    try:
        while time.monotonic() < until:
            some()
    except BaseException:
        (CRASHERS / f"{target}-{hashlib.sha256(tried).hexdigest()[:12]}").write_bytes(tried)
        raise


KEPT = sorted(path for path in CRASHERS.iterdir() if path.name.partition("-")[0] in TARGETS)


@pytest.mark.parametrize("path", KEPT, ids=lambda path: path.name)
def test_what_once_broke_one(path: Path) -> None:
    TARGETS[path.name.partition("-")[0]](path.read_bytes())
