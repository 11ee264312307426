"""Where records go: superd's own stderr, rings for superctl, subscribers; and where service output comes from.

Nothing here awaits, blocks or raises because of its output: a log that cannot be written must not stop a service. The
manager drives it: after each batch of events it calls `Log.flush()`, then waits for `Sink.wants_writable()` to become
writable, if that is an fd, and calls `flush()` again at `Log.wake_at()`, if that is a time.
"""

from __future__ import annotations

import errno
import math
import os
import select
import socket
import stat
import sys
import time
from collections import deque
from collections.abc import Callable, Hashable, Mapping
from typing import Literal

from superd.core.records import FORMATTERS, LEVELS, Formatter, Line, LineSplitter, Record, format_text_colour

Format = Literal["text", "logfmt", "json"]

BUFFER_BYTES = 1 << 20  # records that the output has not taken yet
RING_BYTES, RING_RECORDS = 1 << 20, 1000  # what is kept of one service
RINGS_BYTES = 8 << 20  # and of all together
RETRY_S = 1.0  # after a write error that may go away
REPORT_S = 60.0  # between two lines that say how many were dropped
LIMITED_COUNT, LIMITED_WINDOW_S = 10, 60.0

_RECORD_BYTES = 320  # of memory for a record besides its message: the tuple, number and time, a small dict of fields
_CHUNK_BYTES = 1 << 16
_READ_MIN, _READ_MAX = 1 << 10, 1 << 14
_LINES_PER_READ = 512  # at some 10 us each, one call stays within a few ms

_WOULD_BLOCK = (errno.EAGAIN, errno.EWOULDBLOCK)
# Nobody will ever read this again. Every other error (disk full, quota, I/O error, read-only) may pass.
_GONE = (errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN, errno.ESHUTDOWN, errno.EBADF, errno.EINVAL)


def wants_colour(fd: int, environ: Mapping[str, str]) -> bool:
    """Whether to colour what is written to the fd: a terminal that can, and no NO_COLOR (https://no-color.org)."""
    try:
        return os.isatty(fd) and not environ.get("NO_COLOR") and environ.get("TERM", "dumb") != "dumb"
    except OSError:
        return False


class Sink:
    """Lines to an fd, without ever blocking or raising.

    The fd stays the caller's. It is usually shared with other processes, so O_NONBLOCK, which belongs to the open file
    description, is not set on it: a FIFO or terminal is opened again through /proc (a description of our own), a socket
    is sent to with MSG_DONTWAIT, and where opening is not permitted poll(2) is asked first. Regular files have no
    non-blocking mode; they are written as they are.

    At most `limit_bytes` wait; beyond that the oldest whole lines are dropped and counted, those that may go before all
    others: a service that writes a lot does not hide that another has ended. When the rest is out one line, made by
    `describe_loss(count, reason)`, says so, once a minute at most. An error that may pass (disk full) drops what waits,
    and after a second writing is tried again. When the reader is gone for good everything is dropped without a word.

    clock  of `retry_at`; must be the one that the caller sleeps by
    """

    def __init__(
        self, fd: int, *, limit_bytes: int = BUFFER_BYTES, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.dropped = 0  # lines, ever
        self.describe_loss: Callable[[int, str], str] = lambda count, reason: f"dropped {count} records: {reason}"
        self._clock = clock
        self._limit = limit_bytes
        self._number = 0  # of the next line
        self._kept: deque[tuple[int, bytes]] = deque()
        self._may_go: deque[tuple[int, bytes]] = deque()
        self._queued_bytes = 0
        self._rest = b""  # taken from the queue, not yet taken by the kernel
        self._mid_line = False  # the last byte written was not a newline
        self._blocked = False
        self._retry_at: float | None = None
        self._lost, self._reason = 0, ""  # not yet reported
        self._reporting = 0  # how many of them the report in _rest speaks of
        self._next_report_at = -math.inf
        self._fd: int | None = fd
        self._own_fd: int | None = None
        self._socket: socket.socket | None = None
        self._write_bytes = _CHUNK_BYTES
        self._ask_first = False
        try:
            self._prepare(fd)
        except OSError:
            self._fd = None  # closed before we started

    def _prepare(self, fd: int) -> None:
        mode = os.fstat(fd).st_mode
        if stat.S_ISSOCK(mode):
            self._socket = socket.socket(fileno=os.dup(fd))
            if self._socket.type != socket.SOCK_STREAM:
                self._write_bytes = 1  # one line a message
        elif stat.S_ISFIFO(mode) or (stat.S_ISCHR(mode) and os.isatty(fd)):
            try:
                self._own_fd = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
            except OSError:  # made by another user, or no /proc, or no reader at the moment
                # A pipe that polls writable takes PIPE_BUF bytes without blocking (pipe(7)).
                self._ask_first, self._write_bytes = True, select.PIPE_BUF
            else:
                self._fd = self._own_fd

    def write(self, line: str, *, may_go: bool = False) -> None:
        """Queue a line (without newline). Never fails; `flush()` writes. may_go: dropped before lines that may not."""
        if self._fd is None:
            return
        data = (line + "\n").encode("utf-8", "backslashreplace")
        (self._may_go if may_go else self._kept).append((self._number, data))
        self._number += 1
        self._queued_bytes += len(data)
        while self._queued_bytes > self._limit:
            self._queued_bytes -= len((self._may_go or self._kept).popleft()[1])
            self._lose(1, "the log is not read fast enough")

    def flush(self) -> None:
        """Write what the kernel takes now."""
        if self._retry_at is not None:
            if self._clock() < self._retry_at:
                return
            self._retry_at = None
        self._blocked = False
        while self._fd is not None and (self._rest or self._take()):
            try:
                count = self._write(self._fd, self._rest)
            except OSError as error:
                if error.errno in _WOULD_BLOCK:
                    self._blocked = True
                elif error.errno in _GONE:
                    self._give_up()
                elif error.errno == errno.EMSGSIZE:
                    self._drop_rest(os.strerror(errno.EMSGSIZE))
                    continue
                else:
                    self._drop_all(os.strerror(error.errno or 0).lower())
                return
            self._mid_line = not self._rest.endswith(b"\n", 0, count)
            self._rest = self._rest[count:]
            if self._reporting and not self._rest:
                self._lost -= self._reporting
                self._reporting = 0
                self._next_report_at = self._clock() + REPORT_S

    def wants_writable(self) -> int | None:
        """The fd to wait for, when the last flush could not write everything; poll(2) it for writing."""
        return self._fd if self._blocked else None

    @property
    def retry_at(self) -> float | None:
        """When to flush again although nothing was queued and no fd became writable; None: no need."""
        if self._retry_at is not None or not self._lost or self._blocked or self._fd is None:
            return self._retry_at
        return self._next_report_at

    def finish(self, limit_s: float) -> None:
        """superd is ending, and nothing else can be held up: wait for a slow reader, but not for ever."""
        deadline = self._clock() + limit_s
        while (fd := self.wants_writable()) is not None and (rest_s := deadline - self._clock()) > 0:
            poll = select.poll()
            poll.register(fd, select.POLLOUT)
            poll.poll(rest_s * 1000)
            self.flush()

    def close(self) -> None:
        """Drop what waits and close the descriptors of our own."""
        self._give_up()

    def _write(self, fd: int, data: bytes) -> int:
        if self._socket is not None:
            return self._socket.send(data, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        if self._ask_first:
            poll = select.poll()
            poll.register(fd, select.POLLOUT)
            if not poll.poll(0):
                raise BlockingIOError(errno.EAGAIN, "not writable")
        return os.write(fd, data)

    def _take(self) -> bool:
        """Move the next whole lines, if there are any, to `_rest`."""
        parts = [b"\n"] if self._mid_line else []  # after a line that an error cut short
        size = 0
        kept, may_go = self._kept, self._may_go
        while kept or may_go:
            first = kept if not may_go or (kept and kept[0][0] < may_go[0][0]) else may_go
            part = first[0][1]
            if size and size + len(part) > self._write_bytes:
                break
            first.popleft()
            size += len(part)
            parts.append(part)
        self._queued_bytes -= size
        if not size:  # everything is out: now it is known how many were lost
            if not self._lost or self._clock() < self._next_report_at:
                return False
            self._reporting = self._lost
            parts.append((self.describe_loss(self._lost, self._reason) + "\n").encode("utf-8", "backslashreplace"))
        self._rest = b"".join(parts)
        return True

    def _lose(self, count: int, reason: str) -> None:
        self.dropped += count
        self._lost += count
        self._reason = reason

    def _drop_rest(self, reason: str) -> None:
        if not self._reporting:
            self._lose(self._rest.count(b"\n") - self._rest.startswith(b"\n"), reason)
        self._reporting = 0
        self._rest = b""

    def _drop_all(self, reason: str) -> None:
        self._drop_rest(reason)
        self._lose(len(self._kept) + len(self._may_go), reason)
        self._forget()
        self._retry_at = self._clock() + RETRY_S

    def _forget(self) -> None:
        self._kept.clear()
        self._may_go.clear()
        self._queued_bytes = 0

    def _give_up(self) -> None:
        self._forget()
        self._rest = b""
        self._blocked = False
        self._retry_at = self._fd = None
        if self._own_fd is not None:
            os.close(self._own_fd)
            self._own_fd = None
        if self._socket is not None:
            self._socket.close()
            self._socket = None


class _Ring:
    """The last records of one kind, bounded in number and bytes."""

    __slots__ = ("bytes", "records")

    def __init__(self) -> None:
        self.records: deque[Record] = deque()
        self.bytes = 0

    def append(self, record: Record) -> int:
        """Returns by how many bytes the ring grew; negative when it shrank."""
        before = self.bytes
        self.records.append(record)
        self.bytes += _RECORD_BYTES + sys.getsizeof(record.message)
        while len(self.records) > RING_RECORDS or self.bytes > RING_BYTES:
            self.drop_oldest()
        return self.bytes - before

    def drop_oldest(self) -> None:
        self.bytes -= _RECORD_BYTES + sys.getsizeof(self.records.popleft().message)


class _Limited:
    """One kind of repeated error in its current window. last: event, message, level and service."""

    __slots__ = ("count", "ends_at", "last")

    def __init__(self, ends_at: float) -> None:
        self.ends_at = ends_at
        self.count = 0
        self.last: tuple[str, str, str, str | None] = ("", "", "", None)


class Log:
    """Makes records, writes them to the sink, keeps the last ones for superctl and passes them to subscribers.

    level   the sink gets records of this level and more urgent ones; rings and subscribers get all
    now     wall clock, for the times in records
    colour  only for the text format, see wants_colour()
    """

    def __init__(
        self,
        sink: Sink,
        format: Format = "text",
        level: str = "info",
        now: Callable[[], float] = time.time,
        colour: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.sink = sink
        self._now = now
        self._clock = clock
        self._number = 0
        self._rings: dict[str | None, _Ring] = {}
        self._rings_bytes = 0
        self._events: deque[Record] = deque(maxlen=RING_RECORDS)  # small ones: counted, not weighed
        self._subscribers: tuple[Callable[[Record], None], ...] = ()
        self._limited: dict[Hashable, _Limited] = {}
        self.configure(format, level, colour)
        sink.describe_loss = self._describe_loss

    def configure(self, format: Format, level: str, colour: bool = False) -> None:
        """Change the form of what is written from now on, as a reload does."""
        self._format: Formatter = FORMATTERS[format]
        if colour and format == "text":
            self._format = format_text_colour
        self._threshold = LEVELS["err" if level == "error" else level]
        self.debugs = level == "debug"  # for records that would cost each connection something

    def record(
        self,
        event: str,
        message: str = "",
        *,
        level: str = "info",
        service: str | None = None,
        connection: int | str | None = None,
        pid: int | None = None,
        peer: str | None = None,
        **fields: object,
    ) -> None:
        """One record. Fields that are None are left out; their names must be plain words."""
        now = self._now()
        self._number += 1
        record = Record(self._number, now, level, service, event, connection, pid, peer, message, fields)
        if event == "output" or event == "message":
            self._keep(service, record)
        else:
            self._events.append(record)
        for callback in self._subscribers:
            callback(record)
        if LEVELS[level] <= self._threshold:
            line = self._format(now, level, service, event, connection, pid, peer, message, fields)
            self.sink.write(line, may_go=event == "output")

    def message(self, text: str, *, level: str = "info", service: str | None = None) -> None:
        """superd's own words, about a service or about itself."""
        self.record("message", text, level=level, service=service)

    def error_limited(
        self,
        key: Hashable,
        message: str,
        *,
        level: str = "err",
        event: str = "message",
        service: str | None = None,
        connection: int | str | None = None,
        pid: int | None = None,
        peer: str | None = None,
        **fields: object,
    ) -> None:
        """A record that an outsider or a full disk can cause again and again: ten a minute for each key.

        The rest of the minute is counted; when it is over, one record says how many more there were, and the last.
        """
        limited = self._limited.get(key)
        if limited is not None and limited.ends_at <= self._clock():
            self._end_window(key, limited)
            limited = None
        if limited is None:
            limited = self._limited[key] = _Limited(self._clock() + LIMITED_WINDOW_S)
        limited.count += 1
        if limited.count <= LIMITED_COUNT:
            self.record(
                event, message, level=level, service=service, connection=connection, pid=pid, peer=peer, **fields
            )
        else:
            limited.last = (event, message, level, service)

    def flush(self) -> None:
        """Write what can be written now, and the summaries that are due."""
        if self._limited:
            now = self._clock()
            # A dict keeps its order and all windows are equally long, so the first one ends first.
            for key, limited in list(self._limited.items()):
                if limited.ends_at > now:
                    break
                self._end_window(key, limited)
        self.sink.flush()

    def wake_at(self) -> float | None:
        """When to call flush() again, by `clock`, though nothing has happened; None: no need."""
        times = [limited.ends_at for limited in self._limited.values()][:1]
        if self.sink.retry_at is not None:
            times.append(self.sink.retry_at)
        return min(times, default=None)

    # --- what is kept

    def events(self, since: int = 0) -> list[Record]:
        """The last starts, exits, refusals, reloads … with numbers above `since`, oldest first."""
        return [record for record in self._events if record.number > since]

    def tail(self, service: str | None, count: int = RING_RECORDS) -> list[Record]:
        """The last lines of a service and superd's words about it, oldest first; None: superd's own."""
        ring = self._rings.get(service)
        return list(ring.records)[-count:] if ring is not None and count > 0 else []

    def forget(self, service: str) -> None:
        """Drop the lines of a service that is no more."""
        ring = self._rings.pop(service, None)
        if ring is not None:
            self._rings_bytes -= ring.bytes

    def subscribe(self, callback: Callable[[Record], None]) -> Callable[[], None]:
        """Call back with each new record, until the function that is returned is called.

        The callback runs inside record(): it must not raise, block or log.
        """
        self._subscribers += (callback,)

        def unsubscribe() -> None:
            self._subscribers = tuple(other for other in self._subscribers if other is not callback)

        return unsubscribe

    def _keep(self, service: str | None, record: Record) -> None:
        ring = self._rings.get(service)
        if ring is None:
            ring = self._rings[service] = _Ring()
        self._rings_bytes += ring.append(record)
        if self._rings_bytes > RINGS_BYTES:
            # The largest gives up its older half: rare enough to look at all of them.
            largest = max(self._rings.values(), key=lambda ring: ring.bytes)
            goal = largest.bytes // 2
            before = largest.bytes
            while largest.bytes > goal:
                largest.drop_oldest()
            self._rings_bytes -= before - largest.bytes

    # --- records about records

    def _end_window(self, key: Hashable, limited: _Limited) -> None:
        del self._limited[key]
        more = limited.count - LIMITED_COUNT
        if more > 0:
            event, message, level, service = limited.last
            text = f"{more} more like this in {LIMITED_WINDOW_S:.0f} s, the last: {message}"
            self.record(event, text, level=level, service=service, suppressed=more)

    def _describe_loss(self, count: int, reason: str) -> str:
        text = f"dropped {count} record{'s' if count != 1 else ''}: {reason}"
        return self._format(self._now(), "warning", None, "message", None, None, None, text, {"dropped": count})


class OutputReader:
    """The read end of a pipe that a service process writes its stdout or stderr to.

    Takes the fd over and sets O_NONBLOCK on it; `close()` closes it. The fd must be a read end of superd's own: for
    each process its own pipe, so that what one process does to it harms no other.

    stream  "stdout", "stderr" or None (both); a field of each record
    """

    def __init__(
        self,
        fd: int,
        log: Log,
        service: str,
        pid: int | None = None,
        connection: int | str | None = None,
        stream: str | None = None,
    ) -> None:
        os.set_blocking(fd, False)
        self.fd: int | None = fd
        self.service, self.pid, self.connection, self.stream = service, pid, connection, stream
        self.heard: Callable[[str], None] | None = None  # told each line, too
        self._log = log
        self._splitter = LineSplitter()
        self._read_bytes = 4 * _READ_MIN

    def fileno(self) -> int:
        return -1 if self.fd is None else self.fd

    def readable(self) -> bool:
        """Read once, 16 kB at most, and record the lines; False at the end: stop watching and close().

        How much is read follows the length of the lines, so that a process that writes a million empty lines takes no
        more of a turn than one that writes a few long ones.
        """
        data = self._read(self._read_bytes)
        if data is None:
            return True
        if not data:
            self._emit(self._splitter.finish())
            return False
        lines = self._splitter.feed(data)
        if len(lines) > _LINES_PER_READ:
            self._read_bytes = max(self._read_bytes * _LINES_PER_READ // len(lines), _READ_MIN)
        elif len(data) == self._read_bytes and 2 * len(lines) < _LINES_PER_READ:
            self._read_bytes = min(self._read_bytes * 2, _READ_MAX)
        self._emit(lines)
        return True

    def drain(self, limit_bytes: int = 1 << 20) -> bool:
        """Record what is in the pipe now, its writer having exited; True if that was all there will ever be.

        False: a descendant still holds the other end. The default limit is the largest pipe that an ordinary user can
        make (pipe(7)).
        """
        while limit_bytes > 0:
            data = self._read(min(_CHUNK_BYTES, limit_bytes))
            if data is None:
                return False
            if not data:
                self._emit(self._splitter.finish())
                return True
            limit_bytes -= len(data)
            self._emit(self._splitter.feed(data))
        return False

    def close(self) -> None:
        """Record an unfinished last line and close the fd. Unregister it first."""
        if self.fd is not None:
            self._emit(self._splitter.finish())
            os.close(self.fd)
            self.fd = None

    def _read(self, count: int) -> bytes | None:
        """None: nothing there now; b"": the end."""
        if self.fd is None:
            return b""
        try:
            return os.read(self.fd, count)
        except BlockingIOError:
            return None
        except OSError:  # EIO from a terminal whose other side is closed
            return b""

    def _emit(self, lines: list[Line]) -> None:
        record = self._log.record
        for level, text, continued in lines:
            record(
                "output",
                text,
                level=level,
                service=self.service,
                connection=self.connection,
                pid=self.pid,
                stream=self.stream,
                continued=continued or None,
            )
            if self.heard is not None:
                self.heard(text)
