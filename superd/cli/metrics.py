"""`superctl metrics --http`: one HTTP exchange on stdin and stdout, so that superd serves its own metrics, probes and
status page like any other service.

/metrics for Prometheus; /livez and /readyz as kube-apiserver has them; / is page.py. Who asks is not trusted: the head
is bounded in bytes and time, nothing of it is ever written to a log or a page, and nothing here changes anything.
"""

from __future__ import annotations

import os
import re
import select
import socket
import time
from http import HTTPStatus

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any, NamedTuple, Protocol

    class Control(Protocol):
        def call(self, method: str, **parameters: Any) -> dict[str, Any]: ...

        def close(self) -> None: ...

    class Answer(NamedTuple):
        status: int
        body: bytes
        headers: Mapping[str, str] = {}
else:
    from collections import namedtuple

    Answer = namedtuple("Answer", ("status", "body", "headers"), defaults=({},))

_HEAD_BYTES = 16 << 10
_HEAD_S, _WRITE_S, _LINGER_S = 10.0, 30.0, 1.0
_LINGER_BYTES = 1 << 20
_REQUEST_LINE = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+) ([!-~]+) HTTP/(\d)\.(\d)")
_HEADER = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):([^\0\r\n]*)")
_PROMETHEUS = "text/plain; version=0.0.4; charset=utf-8"
_PLAIN = "text/plain; charset=utf-8"


class RefusedError(Exception):
    """A request that is not answered with what it asks for. args: the status."""


def serve(connect: Callable[[], Control], failure: type[Exception], version: str) -> int:
    """Read a request from fd 0, answer on fd 1; returns the exit status. connect raises `failure` if superd cannot be
    reached, and so do its calls."""
    is_head = False
    try:
        head = _read_head(0)
        if head is None:
            return 0  # a client that only looked whether somebody listens
        method, target = parse(head)
        is_head = method == "HEAD"
        answer = respond(method, target, connect, failure, version)
    except RefusedError as refused:
        answer = _say(refused.args[0])
    except OSError:
        return 0  # the client has gone
    try:
        _write(1, pack(answer, is_head))
        _linger()
    except OSError:
        pass
    return 0


def parse(head: bytes) -> tuple[str, str]:
    """(method, path with query) of a request's head without the empty line. Raises RefusedError."""
    lines = head.replace(b"\r\n", b"\n").split(b"\n")
    match = _REQUEST_LINE.fullmatch(lines[0])
    if match is None:
        raise RefusedError(HTTPStatus.BAD_REQUEST)
    method, target, major, minor = (part.decode("ascii") for part in match.groups())
    if major != "1":
        raise RefusedError(HTTPStatus.HTTP_VERSION_NOT_SUPPORTED)
    hosts = 0
    for line in lines[1:]:
        header = _HEADER.fullmatch(line)
        if header is None:
            raise RefusedError(HTTPStatus.BAD_REQUEST)
        hosts += header[1].lower() == b"host"
    if hosts > 1 or (minor != "0" and not hosts):
        raise RefusedError(HTTPStatus.BAD_REQUEST)  # RFC 9112, 3.2
    return method, re.sub(r"\A[Hh][Tt][Tt][Pp]s?://[^/?]*", "", target) or "/"


def respond(method: str, target: str, connect: Callable[[], Control], failure: type[Exception], version: str) -> Answer:
    path, _, query = target.partition("?")
    make = _PAGES.get(path)
    if make is None:
        return _say(HTTPStatus.NOT_FOUND)
    if method not in ("GET", "HEAD"):
        return _say(HTTPStatus.METHOD_NOT_ALLOWED, {"Allow": "GET, HEAD"})
    verbose = any(word.partition("=")[0] == "verbose" for word in query.split("&"))
    try:
        control = connect()
        try:
            return make(control, verbose, version)
        finally:
            control.close()
    except failure as error:
        # What the client learns is that superd does not answer; why is for the operator, in the log.
        os.write(2, f"<4>superctl metrics: {error}\n".encode(errors="backslashreplace"))
        if path in ("/livez", "/readyz"):
            return _checks(path[1:], [("superd", False)], True)
        return _say(HTTPStatus.SERVICE_UNAVAILABLE)


def _metrics(control: Control, verbose: bool, version: str) -> Answer:
    return Answer(HTTPStatus.OK, control.call("Metrics")["text"].encode(), {"Content-Type": _PROMETHEUS})


def _livez(control: Control, verbose: bool, version: str) -> Answer:
    return _checks("livez", [("superd", bool(control.call("Health")["live"]))], verbose)


def _readyz(control: Control, verbose: bool, version: str) -> Answer:
    health = control.call("Health")
    bad = {problem.partition(":")[0] for problem in health["problems"]}
    names = [row["name"] for row in control.call("List")["services"]]
    return _checks("readyz", [("superd", bad <= set(names)), *((name, name not in bad) for name in names)], verbose)


def _page(control: Control, verbose: bool, version: str) -> Answer:
    from superd.cli import page

    text = page.render(
        control.call("List")["services"], control.call("Health")["problems"], control.call("History"),
        socket.gethostname(), version,
    )  # fmt: skip
    headers = {
        "Content-Type": "text/html; charset=utf-8",
        "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'",
        "Referrer-Policy": "no-referrer",
    }
    return Answer(HTTPStatus.OK, text.encode("utf-8", "replace"), headers)


_PAGES: dict[str, Callable[[Control, bool, str], Answer]] = {
    "/": _page, "/metrics": _metrics, "/livez": _livez, "/readyz": _readyz,
}  # fmt: skip


def _checks(what: str, found: list[tuple[str, bool]], verbose: bool) -> Answer:
    """As kube-apiserver: "ok", or with ?verbose, and when something failed, a line for each check."""
    well = all(good for _, good in found)
    if well and not verbose:
        return Answer(HTTPStatus.OK, b"ok", {"Content-Type": _PLAIN})
    lines = [f"[+]{name} ok\n" if good else f"[-]{name} failed\n" for name, good in found]
    lines.append(f"{what} check {'passed' if well else 'failed'}\n")
    status = HTTPStatus.OK if well else HTTPStatus.SERVICE_UNAVAILABLE
    return Answer(status, "".join(lines).encode(errors="replace"), {"Content-Type": _PLAIN})


def _say(status: int, headers: Mapping[str, str] | None = None) -> Answer:
    text = f"{status} {HTTPStatus(status).phrase}\n"
    return Answer(status, text.encode(), {"Content-Type": _PLAIN, **(headers or {})})


def pack(answer: Answer, is_head: bool) -> bytes:
    headers = {
        **answer.headers, "Content-Length": str(len(answer.body)), "Cache-Control": "no-store",
        "X-Content-Type-Options": "nosniff", "Connection": "close",
    }  # fmt: skip
    lines = [f"HTTP/1.1 {int(answer.status)} {HTTPStatus(answer.status).phrase}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + (b"" if is_head else answer.body)


# --- the connection


def _read_head(fd: int) -> bytes | None:
    """Everything before the first empty line; None: the client left without a word. Raises RefusedError."""
    deadline = time.monotonic() + _HEAD_S
    data = b""
    while True:
        # An empty line or two before the request is passed over (RFC 9112, 2.2).
        text = data.lstrip(b"\r\n")
        end = re.search(rb"\r?\n\r?\n", text)
        if end is not None:
            return text[: end.start()]
        if len(data) > _HEAD_BYTES:
            raise RefusedError(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
        if not select.select([fd], [], [], max(deadline - time.monotonic(), 0))[0]:
            raise RefusedError(HTTPStatus.REQUEST_TIMEOUT)
        part = os.read(fd, 4096)
        if not part:
            if text:
                raise RefusedError(HTTPStatus.BAD_REQUEST)
            return None
        data += part


def _write(fd: int, data: bytes) -> None:
    """In pieces that a writable pipe or socket takes without a wait; a client that does not read is left."""
    deadline = time.monotonic() + _WRITE_S
    while data and select.select([], [fd], [], max(deadline - time.monotonic(), 0))[1]:
        data = data[os.write(fd, data[:4096]) :]


def _linger() -> None:
    """What the client still sends is read: a close with unread bytes would be a reset, and the answer lost with it."""
    try:
        with socket.socket(fileno=os.dup(0)) as sock:
            sock.shutdown(socket.SHUT_WR)
    except OSError:
        return  # no socket: run by hand
    deadline, left = time.monotonic() + _LINGER_S, _LINGER_BYTES
    while left > 0 and select.select([0], [], [], max(deadline - time.monotonic(), 0))[0]:
        part = os.read(0, 1 << 16)
        if not part:
            return
        left -= len(part)
