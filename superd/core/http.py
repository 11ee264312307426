"""HTTP/1.1 as far as a check needs it (RFC 9112): one request, and the status of its answer."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

HEAD_BYTES = 8192  # of an answer: who sends more before its status is known is no HTTP server

_STATUS = re.compile(rb"HTTP/1\.[0-9] ([1-9][0-9]{2})(?: [^\n]*)?\r?\n")
_HEAD_END = re.compile(rb"\r?\n\r?\n")


def parse_url(url: str) -> tuple[str, int, bytes]:
    """(host, port, request) of an `http:` URL that the loader has found good; the host without brackets."""
    parts = urlsplit(url)
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    fields = (f"Host: {parts.netloc}", "User-Agent: superd", "Accept: */*", "Connection: close")
    request = "\r\n".join((f"GET {path} HTTP/1.1", *fields, "", ""))
    return parts.hostname or "", parts.port or 80, request.encode("ascii")


def parse_status(data: bytes) -> int | None:
    """The status of what has come so far; None: more is needed. Interim answers (100, 103) are passed over.

    Raises ValueError for what is not, and will not become, the head of an answer. Whoever reads stops at HEAD_BYTES.
    """
    while True:
        status = _STATUS.match(data)
        if status is None:
            if b"\n" in data or not b"HTTP/1.".startswith(data[:7]):
                raise ValueError("the answer is not HTTP")
            return None
        if not 100 <= int(status[1]) < 200 or int(status[1]) == 101:
            return int(status[1])
        end = _HEAD_END.search(data, status.end() - 2)
        if end is None:
            return None
        data = data[end.end() :]
