from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import random
import re
import select
import signal
import socket
import subprocess
import sys
import termios
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from superd.core.records import Record
from superd.manager.logs import RING_BYTES, RINGS_BYTES, Log, OutputReader, Sink, wants_colour

ROOT = Path(__file__).resolve().parents[2]


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Lines:
    """A sink that keeps what it gets."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.retry_at: float | None = None

    def write(self, line: str, *, may_go: bool = False) -> None:
        self.lines.append(line)

    def flush(self) -> None:
        pass


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def files() -> Iterator[contextlib.ExitStack]:
    """Close what a test opens, in reverse order, also when it fails."""
    with contextlib.ExitStack() as stack:
        yield stack


def keep(files: contextlib.ExitStack, *fds: int) -> tuple[int, ...]:
    for fd in fds:
        files.callback(_close, fd)
    return fds


def _close(fd: int) -> None:
    with contextlib.suppress(OSError):  # the test has closed it
        os.close(fd)


def pipe(files: contextlib.ExitStack) -> tuple[int, ...]:
    return keep(files, *os.pipe())


def make_sink(files: contextlib.ExitStack, fd: int, **options: object) -> Sink:
    sink = Sink(fd, **options)  # type: ignore[arg-type]
    files.callback(sink.close)
    return sink


def make_log(**options: object) -> tuple[Log, list[str]]:
    sink = Lines()
    return Log(sink, **{"format": "json", **options}), sink.lines  # type: ignore[arg-type]


def fill(fd: int) -> int:
    """Fill a pipe, terminal or socket through its inherited description; the number of bytes."""
    count = 0
    os.set_blocking(fd, False)
    for size in (65536, 4096, 1):
        with contextlib.suppress(BlockingIOError):
            while True:
                count += os.write(fd, b"-" * size)
    os.set_blocking(fd, True)
    return count


def read_now(fd: int) -> bytes:
    """Everything that is there, without waiting for more."""
    data = b""
    while select.select([fd], [], [], 0)[0]:
        try:
            chunk = os.read(fd, 65536)
        except OSError:
            break
        if not chunk:
            break
        data += chunk
    return data


def lines_of(data: bytes) -> list[str]:
    return data.decode().replace("\r\n", "\n").splitlines()


@contextlib.contextmanager
def must_not_block() -> Iterator[None]:
    """An alarm that breaks a blocking write, so that the test fails and does not hang."""

    def fail(signum: int, frame: object) -> None:
        raise TimeoutError("blocked")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(20)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


# --- the sink


def test_lines_arrive_in_order_and_in_few_writes(files):
    r, w = pipe(files)
    sink = make_sink(files, w)
    for number in range(100):
        sink.write(f"line {number}")
    assert read_now(r) == b""  # queued until flush()
    sink.flush()
    assert lines_of(read_now(r)) == [f"line {number}" for number in range(100)]
    assert sink.wants_writable() is None
    assert sink.retry_at is None


def open_pipe(files):
    return pipe(files)


def open_terminal(files):
    return keep(files, *pty.openpty())


def open_unix(files):
    pair = [files.enter_context(end) for end in socket.socketpair()]
    return tuple(end.fileno() for end in pair)


def open_fifo(files):
    """A FIFO without a reader but itself, as `superd 2<>fifo` has it."""
    path = files.enter_context(temporary_fifo())
    (w,) = keep(files, os.open(path, os.O_RDWR))
    return w, w


@contextlib.contextmanager
def temporary_fifo() -> Iterator[str]:
    path = f"/tmp/superd-test-{os.getpid()}-{random.getrandbits(32):08x}"
    os.mkfifo(path)
    try:
        yield path
    finally:
        os.unlink(path)


blocking_kinds = pytest.mark.parametrize("open_pair", [open_pipe, open_terminal, open_unix, open_fifo])


@blocking_kinds
def test_a_reader_that_stops_blocks_nothing(files, open_pair: Callable[..., tuple[int, ...]]):  # L2, F17, X19
    r, w = open_pair(files)
    sink = make_sink(files, w, limit_bytes=200_000)
    with must_not_block():
        for number in range(20_000):  # 400 kB
            sink.write(f"line {number:014}")
            if number % 100 == 0:
                sink.flush()
        waits = sink.wants_writable()
        assert waits is not None
        got = b""
        while sink.wants_writable() is not None:  # the reader is back
            got += read_now(r)
            sink.flush()
        got += read_now(r)
    lines = lines_of(got)
    reports = [line for line in lines if line.startswith("dropped")]
    assert reports == [f"dropped {sink.dropped} records: the log is not read fast enough"]
    assert lines[-1] == reports[0]
    numbers = [int(line.split()[1]) for line in lines[:-1]]  # every line is whole
    assert numbers == sorted(numbers)
    assert numbers[0] == 0
    assert numbers[-1] == 19_999  # the oldest go first
    assert len(numbers) + sink.dropped == 20_000
    sink.flush()
    assert read_now(r) == b""


@blocking_kinds
def test_the_shared_description_stays_blocking(files, open_pair):  # L13
    _, w = open_pair(files)
    flags = fcntl.fcntl(w, fcntl.F_GETFL)
    sink = make_sink(files, w)
    sink.write("x" * 3000)
    sink.flush()
    assert fcntl.fcntl(w, fcntl.F_GETFL) == flags
    assert os.get_blocking(w)


@blocking_kinds
def test_another_process_may_set_nonblocking_on_it(files, open_pair):  # L13
    r, w = open_pair(files)
    sink = make_sink(files, w)
    os.set_blocking(w, False)
    with must_not_block():
        for number in range(5_000):
            sink.write(f"line {number:014}")
        got = b""
        sink.flush()
        while sink.wants_writable() is not None:
            got += read_now(r)
            sink.flush()
        got += read_now(r)
    assert lines_of(got) == [f"line {number:014}" for number in range(5_000)]


def test_a_pipe_that_cannot_be_opened_again_is_polled_first(files, monkeypatch):  # L2, L13
    r, w = pipe(files)

    def refuse(path: str, flags: int) -> int:
        raise PermissionError(13, "Permission denied", path)

    with monkeypatch.context() as patch:
        patch.setattr("superd.manager.logs.os.open", refuse)
        sink = make_sink(files, w)
    assert os.get_blocking(w)
    with must_not_block():
        for number in range(10_000):
            sink.write(f"line {number:014}")
        sink.flush()
        assert sink.wants_writable() == w
        got = b""
        while sink.wants_writable() is not None:
            got += read_now(r)
            sink.flush()
    assert lines_of(got + read_now(r)) == [f"line {number:014}" for number in range(10_000)]


def test_wants_writable_is_an_fd_that_poll_understands(files):
    r, w = pipe(files)
    sink = make_sink(files, w)
    fill(w)
    sink.write("after")
    sink.flush()
    fd = sink.wants_writable()
    assert fd is not None
    assert select.select([], [fd], [], 0)[1] == []
    read_now(r)
    assert select.select([], [fd], [], 0)[1] == [fd]
    sink.flush()
    assert sink.wants_writable() is None
    assert read_now(r) == b"after\n"


def test_a_stopped_terminal_blocks_nothing(files):  # L2: Ctrl-S
    master, slave = open_terminal(files)
    sink = make_sink(files, slave)
    termios.tcflow(slave, termios.TCOOFF)
    with must_not_block():
        sink.write("held")
        sink.flush()
    assert sink.wants_writable() is not None
    termios.tcflow(slave, termios.TCOON)
    sink.flush()
    assert lines_of(read_now(master)) == ["held"]


def test_one_message_a_line_on_a_datagram_socket(files):
    ours, theirs = (files.enter_context(end) for end in socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM))
    theirs.settimeout(20)
    sink = make_sink(files, ours.fileno())
    for line in ("a", "b" * 400_000, "c"):  # b: larger than a datagram may be
        sink.write(line)
    sink.flush()
    assert [theirs.recv(1000), theirs.recv(1000)] == [b"a\n", b"c\n"]
    assert b"dropped 1 records: " in theirs.recv(1000)


@pytest.mark.parametrize("open_pair", [open_pipe, open_unix])
def test_a_reader_that_has_gone_is_no_error(files, open_pair):  # F22
    r, w = open_pair(files)
    sink = make_sink(files, w)
    sink.write("1")
    sink.flush()
    if open_pair is open_unix:
        with socket.socket(fileno=os.dup(r)) as other:
            other.shutdown(socket.SHUT_RDWR)
    else:
        os.close(r)
    for _ in range(3):
        sink.write("2")
        sink.flush()
    assert sink.wants_writable() is None
    assert sink.retry_at is None
    assert sink.dropped == 0  # nobody to tell


def test_a_terminal_that_hangs_up_is_no_error(files, clock):  # F22
    master, slave = open_terminal(files)
    sink = make_sink(files, slave, clock=clock)
    os.close(master)
    for _ in range(3):
        sink.write("2")
        sink.flush()
    assert sink.wants_writable() is None


def test_an_fd_that_is_closed_is_no_error(files):  # F22
    _, w = pipe(files)
    os.close(w)
    sink = make_sink(files, w)
    sink.write("x")
    sink.flush()
    assert sink.wants_writable() is None
    (readonly,) = keep(files, os.open("/dev/null", os.O_RDONLY))
    sink = make_sink(files, readonly)
    sink.write("x")
    sink.flush()
    assert (sink.wants_writable(), sink.retry_at) == (None, None)


def test_a_full_device_is_tried_once_a_second(files, clock, monkeypatch):  # L4, X10
    (fd,) = keep(files, os.open("/dev/full", os.O_WRONLY))
    sink = make_sink(files, fd, clock=clock)
    tries = []
    real = os.write
    monkeypatch.setattr("superd.manager.logs.os.write", lambda fd, data: (tries.append(data), real(fd, data))[1])
    for number in range(1000):
        sink.write(f"line {number}")
        sink.flush()
    assert len(tries) == 1
    assert sink.retry_at == clock.now + 1
    clock.now += 1
    sink.flush()
    assert len(tries) == 2
    assert sink.wants_writable() is None
    assert sink.dropped == 1000
    for _ in range(10):  # a report that cannot be written is not a loss of its own
        clock.now += 1
        sink.flush()
    assert sink.dropped == 1000


@pytest.mark.parametrize("error", [5, 28, 30, 122])  # EIO, ENOSPC, EROFS, EDQUOT
def test_errors_that_pass_are_forgotten_when_they_have(files, clock, monkeypatch, error, tmp_path):  # L4, X10, X11
    path = tmp_path / "log"
    (fd,) = keep(files, os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND))
    sink = make_sink(files, fd, clock=clock)
    with monkeypatch.context() as patch:
        patch.setattr("superd.manager.logs.os.write", lambda fd, data: fail(error))
        sink.write("lost")
        sink.flush()
        sink.write("kept until the next try")
        sink.flush()
    assert path.read_bytes() == b""
    clock.now += 1
    sink.flush()
    reason = os.strerror(error).lower()
    assert path.read_text() == f"kept until the next try\ndropped 1 records: {reason}\n"


def fail(error: int) -> int:
    raise OSError(error, os.strerror(error))


def test_losses_are_reported_once_a_minute(files, clock, monkeypatch, tmp_path):  # L4
    path = tmp_path / "log"
    (fd,) = keep(files, os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND))
    sink = make_sink(files, fd, clock=clock)
    for _ in range(100):  # a disk that is full every other second
        with monkeypatch.context() as patch:
            patch.setattr("superd.manager.logs.os.write", lambda fd, data: fail(28))
            sink.write("lost")
            sink.flush()
        clock.now += 1
        sink.flush()
    assert path.read_text().count("dropped") == 2
    assert sink.retry_at is not None
    clock.now = sink.retry_at
    sink.flush()
    assert sum(int(number) for number in re.findall(r"dropped (\d+)", path.read_text())) == 100 == sink.dropped
    assert sink.retry_at is None


def test_losses_during_a_report_are_in_the_next_one(files, clock, monkeypatch):  # L2
    r, w = pipe(files)
    sink = make_sink(files, w, limit_bytes=4, clock=clock)
    for line in ("1", "2", "3"):
        sink.write(line)
    real = os.write
    answers: list[Callable[[int, bytes], int]] = [real, lambda fd, data: fail(11)]
    with monkeypatch.context() as patch:
        patch.setattr("superd.manager.logs.os.write", lambda fd, data: answers.pop(0)(fd, data))
        sink.flush()
    for line in ("4", "5", "6", "7"):
        sink.write(line)
    sink.flush()
    assert sink.retry_at == clock.now + 60
    clock.now += 60
    sink.flush()
    reason = "records: the log is not read fast enough"
    assert lines_of(read_now(r)) == ["2", "3", f"dropped 1 {reason}", "6", "7", f"dropped 2 {reason}"]


FULL_DISK = """
import os, sys
from superd.manager.logs import Sink
now = 0.0
fd = os.open("/mnt/log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
sink = Sink(fd, clock=lambda: now)
for number in range(2000):
    sink.write(f"line {number:095}")
    sink.flush()
size = os.stat("/mnt/log").st_size
assert 0 < size <= 65536, size
now += 1
sink.flush()  # still full
os.truncate("/mnt/log", 0)
now += 1
sink.write("again")
sink.flush()
sys.stdout.write(open("/mnt/log").read())
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a tmpfs, which needs root")
def test_a_disk_that_was_full(require):  # L4, L11, X10
    unshare = require("unshare")
    script = f'mount -t tmpfs -o size=64k none /mnt && exec {sys.executable} -c "$0"'
    done = subprocess.run(
        [unshare, "--mount", "sh", "-c", script, FULL_DISK],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    if done.returncode and "mount" in done.stderr.lower() and "Traceback" not in done.stderr:
        pytest.skip(f"cannot mount here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    written = 65536 // 101
    lines = done.stdout.splitlines()
    assert [line for line in lines if line] == ["again", f"dropped {2000 - written} records: no space left on device"]


@pytest.mark.parametrize(
    ("cut", "lines"),
    [
        (6, ["one", "tw", "four", "dropped 2 records: no space left on device"]),
        (7, ["one", "two", "four", "dropped 1 records: no space left on device"]),  # only its newline was missing
        (8, ["one", "two", "four", "dropped 1 records: no space left on device"]),
    ],
)
def test_a_line_that_was_cut_is_ended_first(files, clock, monkeypatch, cut, lines):  # L4, L1
    r, w = pipe(files)
    sink = make_sink(files, w, clock=clock)
    real = os.write
    answers: list[Callable[[int, bytes], int]] = [lambda fd, data: real(fd, data[:cut]), lambda fd, data: fail(28)]
    with monkeypatch.context() as patch:
        patch.setattr("superd.manager.logs.os.write", lambda fd, data: answers.pop(0)(fd, data))
        for line in ("one", "two", "three"):
            sink.write(line)
        sink.flush()
    clock.now += 1
    sink.write("four")
    sink.flush()
    assert lines_of(read_now(r)) == lines


def test_removed_and_truncated_files(files, tmp_path):  # L11
    path = tmp_path / "log"
    (fd,) = keep(files, os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND))
    sink = make_sink(files, fd)
    sink.write("before")
    sink.flush()
    os.truncate(path, 0)
    sink.write("after")
    sink.flush()
    assert path.read_text() == "after\n"
    path.unlink()
    sink.write("nowhere")
    sink.flush()
    assert sink.dropped == 0


def test_close_leaves_the_fd_of_the_caller(files):
    for open_pair in (open_pipe, open_terminal, open_unix):
        _, w = open_pair(files)
        before = set(os.listdir("/proc/self/fd"))
        sink = Sink(w)
        sink.close()
        sink.write("x")
        sink.flush()
        assert set(os.listdir("/proc/self/fd")) == before
        os.fstat(w)


def test_colour_only_for_terminals(files):
    _, slave = open_terminal(files)
    _, w = pipe(files)
    assert wants_colour(slave, {"TERM": "xterm"})
    assert not wants_colour(slave, {"TERM": "xterm", "NO_COLOR": "1"})
    assert not wants_colour(slave, {"TERM": "dumb"})
    assert not wants_colour(slave, {})
    assert not wants_colour(w, {"TERM": "xterm"})


# --- the log


def test_record_and_formats():
    for form, want in (
        ("json", '"event":"exit","connection":7,"pid":42,"peer":"p","message":"","status":0,"duration":0.5}'),
        ("logfmt", "event=exit connection=7 pid=42 peer=p status=0 duration=0.5"),
        ("text", "git[42]: exit #7 p, status 0 after 500 ms"),
    ):
        log, lines = make_log(format=form, now=lambda: 1.0)
        log.record("exit", service="git", connection=7, pid=42, peer="p", status=0, duration=0.5)
        assert lines[0].endswith(want)
    log, lines = make_log(format="text", colour=True)
    log.message("m", level="err")
    assert "\x1b[31m" in lines[0]
    log.configure("logfmt", "warning")
    log.message("m")
    log.message("n", level="warning")
    assert len(lines) == 2
    assert "\x1b" not in lines[1]


def test_threshold_is_for_the_sink_alone():
    log, lines = make_log(level="warning")
    seen: list[Record] = []
    log.subscribe(seen.append)
    for level in ("debug", "info", "notice", "warning", "err", "emerg"):
        log.message(level, level=level)
    assert [json.loads(line)["message"] for line in lines] == ["warning", "err", "emerg"]
    assert len(seen) == len(log.tail(None)) == 6


def test_events_and_tails():
    log, _ = make_log()
    log.record("start", service="a")
    log.record("output", "1", service="a")
    log.record("output", "2", service="b")
    log.message("3", service="a")
    log.message("4")
    log.record("exit", service="a", status=0)
    assert [record.event for record in log.events()] == ["start", "exit"]
    first = log.events()[0].number
    assert [record.event for record in log.events(first)] == ["exit"]
    assert [record.message for record in log.tail("a")] == ["1", "3"]
    assert [record.message for record in log.tail("a", 1)] == ["3"]
    assert [record.message for record in log.tail(None)] == ["4"]
    assert log.tail("a", 0) == log.tail("none") == []
    log.forget("a")
    log.forget("a")
    assert log.tail("a") == []


def test_subscribers():
    log, _ = make_log()
    seen: list[Record] = []
    unsubscribe = log.subscribe(seen.append)
    other = log.subscribe(lambda record: None)
    log.record("start", service="a")
    unsubscribe()
    unsubscribe()
    log.record("exit", service="a")
    other()
    assert [record.event for record in seen] == ["start"]


def test_rings_are_bounded_each_and_together():  # L3
    log, _ = make_log()
    for number in range(3000):
        log.record("output", str(number), service="many")
        log.record("start", service="many")
    assert [record.message for record in log.tail("many")] == [str(number) for number in range(2000, 3000)]
    assert len(log.events()) == 1000

    def kept(name: str) -> int:
        return sum(len(record.message) for record in log.tail(name))

    for service in range(12):
        for _ in range(300):
            log.record("output", "x" * 8192, service=f"s{service}")
        assert kept(f"s{service}") <= RING_BYTES
    assert sum(kept(f"s{service}") for service in range(12)) <= RINGS_BYTES
    assert all(log.tail(f"s{service}") for service in range(12))
    assert log.tail("many")  # the largest pay


def test_output_is_dropped_before_what_superd_says(files):  # L2, X18
    """A flood from one service does not hide that another has ended; what is left comes in its order."""
    r, w = pipe(files)
    sink = make_sink(files, w, limit_bytes=2000)
    log = Log(sink, "json")
    fill(w)
    log.record("exit", service="first")
    for number in range(100):
        log.record("output", str(number), service="noise")
        if number == 97:
            log.record("exit", service="second")
    log.flush()
    read_now(r)
    log.flush()
    *records, last = map(json.loads, lines_of(read_now(r)))
    ends = [(one["event"], one["service"], one["message"]) for one in records]
    assert ends[0] == ("exit", "first", "")
    assert ends[-3:] == [("exit", "second", ""), ("output", "noise", "98"), ("output", "noise", "99")]
    assert last["dropped"] == sink.dropped == 102 - len(records) > 50
    for number in range(100):  # bounded without any output, too
        log.record("exit", service=str(number))
    assert sink.dropped > last["dropped"]


def test_a_dropped_record_is_reported_in_the_format_of_the_log(files):  # L2
    r, w = pipe(files)
    sink = make_sink(files, w, limit_bytes=200)
    log = Log(sink, "json")
    fill(w)
    for number in range(10):
        log.message(str(number))
    log.flush()
    read_now(r)
    log.flush()
    *_, last = map(json.loads, lines_of(read_now(r)))
    assert last["level"] == "warning"
    assert last["dropped"] == sink.dropped > 0
    assert last["message"] == f"dropped {sink.dropped} records: the log is not read fast enough"


def test_repeated_errors_are_limited_by_kind(clock):  # L12
    log, lines = make_log(clock=clock)
    assert log.wake_at() is None
    for number in range(1000):
        log.error_limited("full", f"cannot fork: try {number}", service="a", peer="p")
    log.error_limited("other", "something else")
    log.flush()
    assert [json.loads(line)["message"] for line in lines] == [
        *(f"cannot fork: try {number}" for number in range(10)), "something else"
    ]  # fmt: skip
    wake = log.wake_at()
    assert wake == clock.now + 60
    clock.now = wake
    log.flush()
    summary = json.loads(lines[-1])
    assert len(lines) == 12
    assert summary["message"] == "990 more like this in 60 s, the last: cannot fork: try 999"
    assert (summary["service"], summary["level"], summary["suppressed"]) == ("a", "err", 990)
    assert log.wake_at() is None  # and nothing is kept of either
    for _ in range(20):
        log.error_limited("full", "again")
    assert len(lines) == 22
    clock.now += 60  # without a flush in between
    log.error_limited("full", "later")
    assert [json.loads(line)["message"] for line in lines[-2:]] == [
        "10 more like this in 60 s, the last: again",
        "later",
    ]


# --- output of services


def read_all(reader: OutputReader) -> None:
    while reader.readable():
        pass


def messages(lines: list[str]) -> list[str]:
    return [json.loads(line)["message"] for line in lines]


def test_output_has_levels_and_facts(files):
    r, w = pipe(files)
    log, lines = make_log()
    reader = OutputReader(r, log, "git", 42, 7, "stderr")
    files.callback(reader.close)
    os.write(w, b"hello\n<3>bad\n\nrest")
    with must_not_block():
        assert reader.readable()
        assert reader.readable()  # nothing there: not the end
    os.close(w)
    assert not reader.readable()
    records = [json.loads(line) for line in lines]
    assert [(record["level"], record["message"]) for record in records] == [
        ("info", "hello"), ("err", "bad"), ("info", ""), ("info", "rest")
    ]  # fmt: skip
    assert {key: records[0][key] for key in ("service", "event", "connection", "pid", "stream")} == {
        "service": "git", "event": "output", "connection": 7, "pid": 42, "stream": "stderr"
    }  # fmt: skip
    assert "continued" not in records[0]
    fd = reader.fd
    reader.close()
    reader.close()
    assert (reader.fileno(), reader.readable(), len(lines)) == (-1, False, 4)
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(fd)


def test_end_is_told_once_when_the_service_closes_its_output(files):  # L5
    r, w = pipe(files)
    child = subprocess.Popen(["sh", "-c", "exec >&- 2>&-; read line"], stdin=subprocess.PIPE, stdout=w, stderr=w)
    os.close(w)
    log, _ = make_log()
    reader = OutputReader(r, log, "a")
    select.select([r], [], [])
    assert not reader.readable()  # though the child lives
    assert child.poll() is None
    reader.close()
    child.communicate(b"\n")


def test_a_grandchild_may_keep_the_pipe(files):  # L6, L9
    r, w = pipe(files)
    child = subprocess.Popen(
        ["sh", "-c", "sleep 1000 & echo $! >&2; printf 'last words'"], stdout=w, stderr=subprocess.PIPE, text=True
    )
    os.close(w)
    assert child.stderr is not None
    grandchild = int(child.stderr.readline())
    try:
        child.wait()
        log, lines = make_log()
        reader = OutputReader(r, log, "a")
        with must_not_block():
            assert not reader.drain()  # somebody still has it
        assert lines == []
        reader.close()
        assert messages(lines) == ["last words"]
    finally:
        os.kill(grandchild, signal.SIGKILL)
        child.stderr.close()


def test_last_words_are_read_to_the_end(files):  # L9
    r, w = pipe(files)
    size = fcntl.fcntl(w, fcntl.F_SETPIPE_SZ, 1 << 18)
    code = f"import sys; sys.stdout.write('0123456\\n' * {size // 8})"
    subprocess.run([sys.executable, "-c", code], stdout=w, check=True)
    os.close(w)
    log, lines = make_log()
    reader = OutputReader(r, log, "a")
    files.callback(reader.close)
    assert reader.drain()
    assert len(lines) == size // 8
    assert set(messages(lines)) == {"0123456"}


def test_drain_is_bounded(files):  # L9: a grandchild that floods
    r, w = pipe(files)
    os.write(w, b"a\n" * 4096)
    log, lines = make_log()
    reader = OutputReader(r, log, "a")
    files.callback(reader.close)
    assert not reader.drain(1000)
    assert len(lines) == 500


def test_random_bytes_and_an_endless_line(files):  # L7, L8, L1
    data = random.Random(1).randbytes(300_000) + b"\n" + b"x" * 300_000
    r, w = pipe(files)
    log, lines = make_log()
    reader = OutputReader(r, log, "a")
    files.callback(reader.close)
    with open(w, "wb", buffering=0, closefd=False) as file:
        for start in range(0, len(data), 4096):
            file.write(data[start : start + 4096])
            assert reader.readable()
    os.close(w)
    read_all(reader)
    assert all("\n" not in line and line.isprintable() for line in lines)
    records = [json.loads(line) for line in lines]
    tail = [record for record in records if set(record["message"]) == {"x"} and len(record["message"]) > 1000]
    assert sum(len(record["message"]) for record in tail) == 300_000
    assert [record.get("continued") for record in tail] == [None] + [True] * (len(tail) - 1)


def test_one_call_does_a_bounded_amount_of_work(files):  # X18: a flood of empty lines starves nobody
    r, w = pipe(files)
    log, lines = make_log()
    reader = OutputReader(r, log, "a")
    files.callback(reader.close)

    def lines_of_one_call(text: bytes) -> int:
        read_now(r)
        os.set_blocking(w, False)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(w, text * (4096 // len(text)))
        before = len(lines)
        assert reader.readable()
        return len(lines) - before

    def settle(text: bytes) -> int:
        return [lines_of_one_call(text) for _ in range(12)][-1]

    assert lines_of_one_call(b"\n") == 4096
    assert settle(b"\n") == 1024
    assert settle(b"y" * 1023 + b"\n") == 16
    assert lines_of_one_call(b"\n") == 16384  # once, after which it knows better
    assert lines_of_one_call(b"\n") == 1024


def test_the_end_of_a_terminal_is_an_end(files):
    master, slave = open_terminal(files)
    os.write(slave, b"bye\n")
    os.close(slave)
    log, lines = make_log()
    reader = OutputReader(master, log, "a")
    files.callback(reader.close)
    read_all(reader)  # EIO, where a pipe has an end of file
    assert messages(lines) == ["bye"]


def test_a_flood_does_not_grow_the_process(files):  # L3, X18
    r, w = pipe(files)
    blocked_r, blocked_w = pipe(files)
    fill(blocked_w)
    log = Log(make_sink(files, blocked_w), "json")
    reader = OutputReader(r, log, "a")
    files.callback(reader.close)
    line = b"z" * 99 + b"\n"

    def flood(count: int) -> None:
        for _ in range(count):
            os.write(w, line * 600)
            while select.select([r], [], [], 0)[0]:
                reader.readable()
            log.flush()

    flood(60)  # buffers and rings are full now
    before = resident_bytes()
    flood(150)  # 9 MB
    assert resident_bytes() - before < 4 << 20
    assert log.sink.dropped > 0
    assert read_now(blocked_r)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_the_end_waits_for_a_slow_reader_but_not_for_ever() -> None:  # L2, L9
    reader, writer = os.pipe()
    sink = Sink(writer)
    for number in range(5000):
        sink.write(f"{number:0100}")
    sink.flush()
    assert sink.wants_writable() is not None
    sink.finish(0.01)  # nobody reads
    found = bytearray()

    def read() -> None:
        while chunk := os.read(reader, 4096):
            found.extend(chunk)

    thread = threading.Thread(target=read)
    thread.start()
    sink.finish(30)
    sink.close()
    os.close(writer)
    thread.join()
    os.close(reader)
    assert found.count(b"\n") == 5000 and found.endswith(b"4999\n")
