"""What programs send to /dev/log with syslog(3): the form of RFC 3164, and what has grown around it.

Nobody keeps to it, so nothing is refused: what cannot be told apart is text.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from superd.core.records import LEVELS

_LEVEL_NAMES = tuple(LEVELS)
_DEFAULT = 13  # user.notice, RFC 3164, 4.3.3
_PRIORITY = re.compile(rb"<(\d{1,3})>")
_TIME = re.compile(
    rb"(?:(?:Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sep|Oct|Nov|Dec) [ \d]\d \d\d:\d\d:\d\d"
    rb"|\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(?:\.\d+)?(?:Z|[+-]\d\d:\d\d)) "
)
_TAG = re.compile(rb"([^\s:\[\]\0]{1,64})(?:\[(\d{1,10})\])?: ?")
_MOST_BYTES = 8192


class Entry(NamedTuple):
    """tag: what the program calls itself; pid: what it says its pid is, None if it does not."""

    level: str
    tag: str
    pid: int | None
    text: str


def parse(data: bytes) -> Entry:
    """One line, whatever comes: bytes that are no UTF-8 become `\\xNN`, what follows a newline stays on the line."""
    priority = _DEFAULT
    if (match := _PRIORITY.match(data)) and int(match[1]) < 192:
        priority, data = int(match[1]), data[match.end() :]
    if match := _TIME.match(data):
        data = data[match.end() :]
    tag, pid = "", None
    if match := _TAG.match(data):
        tag, pid = _text(match[1]), int(match[2]) if match[2] else None
        data = data[match.end() :]
    return Entry(_LEVEL_NAMES[priority & 7], tag, pid, _text(data.rstrip(b"\0\r\n")[:_MOST_BYTES]))


def _text(data: bytes) -> str:
    return data.decode("utf-8", "backslashreplace").replace("\0", "\\x00")
