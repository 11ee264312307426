"""Log records as values: levels, the three formats, escaping, and lines out of a service's bytes.

A record is one event at one time. Every format makes exactly one line of it, without the newline, whatever a
service or a client put into its strings: control characters, escape sequences, bidirectional overrides and bytes that
are not UTF-8 come out as text. The formatters run twice per connection (start, exit): they are written flat, with one
C-level test per string on the usual way, and they remember the last second that they formatted.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import NamedTuple

# systemd's names; the number is what syslog(3) and the prefix of sd-daemon(3) call it.
LEVELS: dict[str, int] = {
    "emerg": 0, "alert": 1, "crit": 2, "err": 3, "warning": 4, "notice": 5, "info": 6, "debug": 7,
}  # fmt: skip
_LEVEL_OF_DIGIT = tuple(LEVELS)

LINE_LIMIT_BYTES = 8192

_NO_FIELDS: Mapping[str, object] = {}


class Record(NamedTuple):
    """One event, as the rings keep it and `superctl logs` and `superctl events` get it.

    number   counts up by one per record of a manager's life
    time_s   seconds since the epoch
    service  None: superd itself
    event    "start", "exit", "refused", …; "output" for a line from a service, "message" for superd's own words
    message  a whole sentence, or "" where the event says it all
    fields   more facts, such as `status` or `signal` and `duration` (seconds) of an exit; None: left out
    """

    number: int
    time_s: float
    level: str
    service: str | None
    event: str
    connection: int | str | None
    pid: int | None
    peer: str | None
    message: str
    fields: Mapping[str, object] = _NO_FIELDS


# --- escaping

# C0, DEL and C1; line and paragraph separators, which some readers take for the end of the line; overrides that make a
# terminal show other text than there is; surrogates, which stand for bytes that were not UTF-8 (os.fsdecode).
_UNSAFE = re.compile("[\x00-\x08\x0a-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_SURROGATE = re.compile("[\ud800-\udfff]")
_SHORT = {"\n": "\\n", "\r": "\\r"}
_PLAIN_VALUE = re.compile(r"[!#-<>-\[\]-~]+").fullmatch  # printable ASCII without space, '"', "=" and "\"


def escape(text: str) -> str:
    r"""The text without anything that could end a line or steer a terminal: `\n`, `\x1b`, `\u202e`.

    A tab stays: it can do neither, and stack traces are indented with it. Backslashes stay too, so this is for
    people; the logfmt and JSON forms can be read back.
    """
    return text if text.isprintable() else _UNSAFE.sub(_escape_one, text)


def _escape_one(match: re.Match[str]) -> str:
    char = match[0]
    code = ord(char)
    if 0xDC80 <= code <= 0xDCFF:  # a byte that was not UTF-8
        return f"\\x{code - 0xDC00:02x}"
    return _SHORT.get(char) or (f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}")


def _quote(text: str) -> str:
    """A JSON string. Non-ASCII letters stay as they are unless the string holds something unprintable as well."""
    if text.isprintable():
        if '"' not in text and "\\" not in text:
            return f'"{text}"'
        return json.dumps(text, ensure_ascii=False)
    return json.dumps(_SURROGATE.sub(_escape_one, text))  # a lone surrogate is not JSON (RFC 8259, 8.2)


def _json_value(value: object) -> str:
    kind = type(value)
    if kind is int:
        return str(value)
    if isinstance(value, str):
        return _quote(value)
    if kind is float:
        # Six decimals: microseconds are all that a duration is worth. Neither NaN nor an infinity is JSON.
        return repr(round(value, 6)) if -math.inf < value < math.inf else "null"  # type: ignore[operator, call-overload]
    if value is None or kind is bool:
        return {None: "null", True: "true", False: "false"}[value]  # type: ignore[index]
    if isinstance(value, int):  # an IntEnum, such as signal.Signals
        return str(int(value))
    if isinstance(value, (list, tuple)):
        return f"[{','.join(map(_json_value, value))}]"
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{_quote(str(key))}:{_json_value(item)}" for key, item in value.items()) + "}"
    return _quote(str(value))


def _logfmt_value(value: object) -> str:
    if type(value) is int or type(value) is float:
        return _json_value(value)
    text = value if isinstance(value, str) else _json_value(value)
    return text if _PLAIN_VALUE(text) else _quote(text)


_logfmt_name = lru_cache(1024)(_logfmt_value)  # of services: few, and the same ones again and again


# --- times

_utc_second, _utc_text = -1, ""
_local_second, _local_text = -1, ""


def format_utc(time_s: float) -> str:
    """RFC 3339 in UTC with milliseconds: `2026-03-01T11:20:31.123Z`."""
    global _utc_second, _utc_text
    second = int(time_s)
    if second != _utc_second:
        _utc_text, _utc_second = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second)), second
    return f"{_utc_text}.{int((time_s - second) * 1000):03d}Z"


def _format_local(time_s: float) -> str:
    global _local_second, _local_text
    second = int(time_s)
    if second != _local_second:
        _local_text, _local_second = time.strftime("%H:%M:%S", time.localtime(second)), second
    return f"{_local_text}.{int((time_s - second) * 1000):03d}"


def format_duration(seconds: float) -> str:
    """For people: `3 ms`, `1.25 s`, `4m07s`, `2h05m`, `3d04h`."""
    if seconds < 0.9995:
        return f"{seconds * 1000:.1f} ms" if seconds < 0.00995 else f"{seconds * 1000:.0f} ms"
    if seconds < 59.995:
        return f"{seconds:.2f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"


# --- the formats

# The word is there for every level but plain "info": colour only repeats it.
_WORD = {level: "error" if level == "err" else level for level in LEVELS}
_COLOUR = {
    "emerg": "\x1b[1;31m", "alert": "\x1b[1;31m", "crit": "\x1b[1;31m", "err": "\x1b[31m",
    "warning": "\x1b[33m", "notice": "\x1b[1m", "info": "", "debug": "\x1b[2m",
}  # fmt: skip


def format_text(
    time_s: float,
    level: str,
    service: str | None,
    event: str,
    connection: int | str | None,
    pid: int | None,
    peer: str | None,
    message: str,
    fields: Mapping[str, object] = _NO_FIELDS,
) -> str:
    """A line for people, in local time:

        11:20:31.123 superd: ready: 7 services, 9 sockets
        11:20:31.123 git[4242]: start #17 127.0.0.1:5123
        11:20:31.150 git[4242] | a line that the service wrote
        11:20:31.151 git[4242] error | another, with the prefix <3>
        11:20:31.151 git[4242] |… the rest of a line of more than 8 kB
        11:20:31.163 git[4242]: exit #17 127.0.0.1:5123, status 0 after 40 ms
        11:20:32.001 git: warning: refused 192.0.2.7:99: 8 connections from this source

    What a service wrote stands behind a bar, so it cannot be taken for what superd says.
    """
    who = "superd" if service is None else escape(service)
    if pid is not None:
        who = f"{who}[{pid}]"
    if level != "info":
        who = f"{who} {_WORD[level]}" if event == "output" else f"{who}: {_WORD[level]}"
    if event == "output":
        head = f"{who} |\u2026" if fields.get("continued") else f"{who} |"
        body = escape(message)
    else:
        head = who + ":"
        about = "" if peer is None else escape(peer)
        if connection is not None:
            number = connection if type(connection) is int else escape(str(connection))
            about = f"#{number} {about}" if about else f"#{number}"
        if event == "message" or message.startswith(event):
            body = f"{escape(message)} ({about})" if about else escape(message)
        else:
            body = f"{event} {about}" if about else event
            if message:
                body = f"{body}: {escape(message)}"
        if fields:
            body += _describe(fields)
    return f"{_format_local(time_s)} {head} {body}"


def format_text_colour(
    time_s: float,
    level: str,
    service: str | None,
    event: str,
    connection: int | str | None,
    pid: int | None,
    peer: str | None,
    message: str,
    fields: Mapping[str, object] = _NO_FIELDS,
) -> str:
    """format_text() for a terminal; the words are the same."""
    line = format_text(time_s, level, service, event, connection, pid, peer, message, fields)
    clock, _, rest = line.partition(" ")
    colour = _COLOUR[level]
    return f"\x1b[2m{clock}\x1b[0m {colour}{rest}\x1b[0m" if colour else f"\x1b[2m{clock}\x1b[0m {rest}"


def _describe(fields: Mapping[str, object]) -> str:
    how = took = rest = ""
    for key, value in fields.items():
        if value is None:
            continue
        if key == "status" or key == "signal":
            how += f", {key} {value if type(value) is int else escape(str(value))}"
        elif key == "duration" and isinstance(value, float) and math.isfinite(value):
            took = format_duration(value)
        else:
            rest += f" {key}={_logfmt_value(value)}"
    if took:
        how = f"{how} after {took}" if how else f", {took}"
    return how + rest


def format_logfmt(
    time_s: float,
    level: str,
    service: str | None,
    event: str,
    connection: int | str | None,
    pid: int | None,
    peer: str | None,
    message: str,
    fields: Mapping[str, object] = _NO_FIELDS,
) -> str:
    """`key=value` pairs with the keys of the JSON form; a value with a space, `"`, `=` or the like is a JSON string."""
    line = f"time={format_utc(time_s)} level={level}"
    if service is not None:
        line += f" service={_logfmt_name(service)}"
    line += f" event={event}"
    if connection is not None:
        line += f" connection={connection if type(connection) is int else _logfmt_value(connection)}"
    if pid is not None:
        line += f" pid={pid}"
    if peer is not None:
        line += f" peer={_logfmt_value(peer)}"
    if message or event == "output":
        line += f" message={_logfmt_value(message)}"
    for key, value in fields.items():
        if value is not None:
            line += f" {key}={value if type(value) is int else _logfmt_value(value)}"
    return line


def format_json(
    time_s: float,
    level: str,
    service: str | None,
    event: str,
    connection: int | str | None,
    pid: int | None,
    peer: str | None,
    message: str,
    fields: Mapping[str, object] = _NO_FIELDS,
) -> str:
    """One JSON object. `time`, `level`, `event` and `message` are always there; what is None is left out."""
    line = f'{{"time":"{format_utc(time_s)}","level":"{level}"'
    if service is not None:
        line += f',"service":{_quote(service)}'
    line += f',"event":"{event}"'
    if connection is not None:
        line += f',"connection":{connection if type(connection) is int else _json_value(connection)}'
    if pid is not None:
        line += f',"pid":{pid}'
    if peer is not None:
        line += f',"peer":{_quote(peer)}'
    line += f',"message":{_quote(message)}' if message else ',"message":""'
    for key, value in fields.items():
        if value is not None:
            line += f',"{key}":{value if type(value) is int else _json_value(value)}'
    return line + "}"


Formatter = Callable[
    [float, str, str | None, str, int | str | None, int | None, str | None, str, Mapping[str, object]], str
]
FORMATTERS: dict[str, Formatter] = {"text": format_text, "logfmt": format_logfmt, "json": format_json}


# --- lines from a service


class Line(NamedTuple):
    """level from the prefix; continued: the rest of the line before it, which was longer than the limit."""

    level: str
    text: str
    continued: bool


class LineSplitter:
    """Bytes as they come in, complete lines out.

    A line that is longer than `limit_bytes` comes in pieces, cut between characters; all but the first are marked as
    continued and keep its level. So never more than that, plus what was fed last, is held. A prefix `<0>` … `<7>` at
    the start of a line gives the level (sd-daemon(3)) and is removed. Bytes that are not UTF-8 become `\\xNN`.
    limit_bytes must be at least 4, the longest character.
    """

    def __init__(self, limit_bytes: int = LINE_LIMIT_BYTES) -> None:
        self._limit = limit_bytes
        self._rest = b""
        self._level = "info"
        self._continued = False

    def feed(self, data: bytes) -> list[Line]:
        *complete, rest = (self._rest + data).split(b"\n")
        lines: list[Line] = []
        for raw in complete:
            self._end_line(raw, lines)
        self._rest = self._cut(rest, lines) if len(rest) > self._limit else rest
        return lines

    def finish(self) -> list[Line]:
        """The last line, if it had no newline."""
        lines: list[Line] = []
        if self._rest:
            self._end_line(self._rest, lines)
            self._rest = b""
        return lines

    def _end_line(self, raw: bytes, lines: list[Line]) -> None:
        if raw.endswith(b"\r"):
            raw = raw[:-1]
        if len(raw) > self._limit:
            raw = self._cut(raw, lines)
        lines.append(self._piece(raw))
        self._level, self._continued = "info", False

    def _cut(self, raw: bytes, lines: list[Line]) -> bytes:
        start = 0
        while len(raw) - start > self._limit:
            end = start + self._limit
            for _ in range(3):  # not inside a UTF-8 sequence: at most three of its bytes are before the cut
                if raw[end] & 0xC0 != 0x80:
                    break
                end -= 1
            if raw[end] & 0xC0 == 0x80:
                end = start + self._limit  # not UTF-8 at all
            lines.append(self._piece(raw[start:end]))
            self._continued = True
            start = end
        return raw[start:]

    def _piece(self, raw: bytes) -> Line:
        if not self._continued and raw[:1] == b"<" and raw[2:3] == b">" and 0x30 <= raw[1] <= 0x37:
            self._level = _LEVEL_OF_DIGIT[raw[1] - 0x30]
            raw = raw[3:]
        return Line(self._level, raw.decode("utf-8", "backslashreplace"), self._continued)
