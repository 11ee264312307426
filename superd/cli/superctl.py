"""superctl(1): asks a running superd, and checks files without one.

Scripts and probes call it often, so it has to answer in 20-30 ms: no trio, and what only some commands need is
imported by them.
"""

from __future__ import annotations

import os
import socket
import struct
import sys
import time

from superd import __version__
from superd.cli.failure import (
    CONFIG,
    FAILED,
    NO_SUCH_SERVICE,
    NOT_PERMITTED,
    NOT_RUNNING,
    OK,
    TIMED_OUT,
    UNREACHABLE,
    USAGE,
    Failure,
)
from superd.core import varlink

TYPE_CHECKING = False
if TYPE_CHECKING:  # importing typing takes 3 ms
    import argparse
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from typing import Any, NoReturn

    from superd.core.records import Record

    Row = dict[str, Any]

_PREFIX = "io.superd.Control."
_ANSWER_S = 10.0  # for what superd answers at once, when no --timeout is given
_TEXT_MIN = 12  # a column of text is not made narrower than this
_PROGRESS_S = 0.2
_TAKE_OVER_S = 60.0  # for another version to come up
_NOTE_MIN = 24  # a note that would get less room than this gets a line of its own


# --- talking to superd


class Control:
    """A connection to superd. address: what -s says, None for the default; timeout_s: for everything together."""

    def __init__(self, address: str | None, timeout_s: float | None) -> None:
        self._deadline = None if timeout_s is None else time.monotonic() + timeout_s
        self._timeout_s = timeout_s
        self._splitter = varlink.Splitter(varlink.MAX_REPLY_BYTES)
        self._replies: list[bytes] = []
        chosen = address or os.environ.get("SUPERD_SOCKET")
        self._by_default = not chosen
        self.waiting: Callable[[], None] | None = None  # called now and then while an answer is waited for
        try:
            self.path = varlink.socket_path(chosen or varlink.default_socket(os.environ, os.geteuid()))
        except ValueError as error:
            raise Failure(USAGE, f"cannot use the control socket {chosen!r}: {error}") from None
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._connect()
            if address is None:
                self._check_owner()
        except Failure:
            self.close()
            raise

    def close(self) -> None:
        self._socket.close()

    def _connect(self) -> None:
        if self._timeout_s is not None:
            # Of a UNIX socket, connect(2) waits for room in the queue; non-blocking it would fail at once.
            whole = int(self._timeout_s)
            timeval = struct.pack("@ll", whole, int((self._timeout_s - whole) * 1e6) or 1)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeval)
        try:
            self._socket.connect("\0" + self.path[1:] if self.path.startswith("@") else self.path)
        except BlockingIOError:
            raise self._too_slow() from None
        except PermissionError:
            raise Failure(
                NOT_PERMITTED,
                f"cannot reach superd at {self.path}: permission denied; root and the user that superd runs as may "
                "use it, and whom control_group and control_admins name, superd.toml(5)",
            ) from None
        except OSError as error:
            raise Failure(UNREACHABLE, f"cannot reach superd at {self.path}: {self._why(error)}") from None

    def _why(self, error: OSError) -> str:
        if isinstance(error, ConnectionRefusedError):
            return "nobody listens there: superd is not running"
        if not isinstance(error, FileNotFoundError):
            return (error.strerror or str(error)).lower()
        roots = varlink.default_socket({}, 0)
        if self._by_default and self.path != roots and os.path.exists(roots):
            return f"no such file; there is {roots}, which is root's superd (`superctl -s {roots}`, as root)"
        return "no such file; superd is not running, or has another socket (-s SOCKET, $SUPERD_SOCKET)"

    def _check_owner(self) -> None:
        """Whoever listens at a path that nobody named could be anybody (unix(7), SO_PEERCRED)."""
        raw = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        uid = int.from_bytes(raw[4:8], sys.byteorder)
        if uid not in (0, os.geteuid()):
            raise Failure(
                NOT_PERMITTED, f"will not talk to {self.path}: uid {uid} listens there (-s names it if it is meant)"
            )

    def call(self, method: str, **parameters: Any) -> Row:
        """The reply. Raises Failure for an error."""
        self._send(varlink.pack_call(_PREFIX + method, _given(parameters)))
        return self._receive()[0]

    def version(self) -> str:
        """Of the superd that answers."""
        self._send(varlink.pack_call(f"{varlink.SERVICE}.GetInfo", {}))
        return str(self._receive()[0].get("version"))

    def stream(self, method: str, **parameters: Any) -> Iterator[Row]:
        self._send(varlink.pack_call(_PREFIX + method, _given(parameters), more=True))
        more = True
        while more:
            reply, more = self._receive()
            yield reply

    def wait_closed(self) -> None:
        """Until superd closes the connection."""
        while self._read():
            pass

    def _send(self, data: bytes) -> None:
        try:
            while data:
                data = data[self._socket.send(data, socket.MSG_NOSIGNAL) :]
        except BlockingIOError:
            raise self._too_slow() from None
        except (BrokenPipeError, ConnectionResetError):
            pass  # refused; why is there to be read

    def _receive(self) -> tuple[Row, bool]:
        try:
            while not self._replies:
                data = self._read()
                if not data:
                    raise Failure(UNREACHABLE, "superd closed the connection without an answer; its log may say why")
                self._replies += self._splitter.feed(data)
            reply = varlink.parse_reply(self._replies.pop(0))
        except varlink.ProtocolError as error:
            raise Failure(UNREACHABLE, f"cannot understand what answers at {self.path}: {error}") from None
        if reply.error is not None:
            raise _explain(reply.error, reply.parameters)
        return reply.parameters, reply.continues

    def _read(self) -> bytes:
        while self.waiting is not None and not self._is_readable(_PROGRESS_S):
            self.waiting()
        if self._deadline is not None:
            left = self._deadline - time.monotonic()
            if left <= 0:
                raise self._too_slow()
            self._socket.settimeout(left)
        try:
            return self._socket.recv(1 << 16)
        except TimeoutError:
            raise self._too_slow() from None
        except ConnectionResetError:
            return b""

    def _is_readable(self, wait_s: float) -> bool:
        """Also when the time for everything is over."""
        import select

        if self._deadline is not None:
            left = self._deadline - time.monotonic()
            if left <= 0:
                return True
            wait_s = min(wait_s, left)
        return bool(select.select([self._socket], [], [], wait_s)[0])

    def _too_slow(self) -> Failure:
        return Failure(TIMED_OUT, f"no answer within {self._timeout_s:g} s; superd goes on with what it was asked for")


def _given(parameters: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in parameters.items() if value is not None}


def _explain(error: str, parameters: Row) -> Failure:
    name = error.rpartition(".")[2]
    if name == "NoSuchService":
        similar = parameters.get("similar") or []
        hint = f"; did you mean '{similar[0]}'?" if similar else "; `superctl list` shows them"
        return Failure(NO_SUCH_SERVICE, f"there is no service '{parameters.get('name')}'{hint}")
    if name == "PermissionDenied":
        return Failure(
            NOT_PERMITTED, "not permitted; root, the user that superd runs as and control_admins may do that"
        )
    if name == "TooManyClients":
        return Failure(UNREACHABLE, f"superd has {parameters.get('limit')} superctl already; try again later")
    if name == "InvalidParameter":
        which = str(parameters.get("parameter"))
        right = {"signal": "a name, as TERM or SIGUSR1", "address": "an IP address, or user:NAME"}.get(which)
        return Failure(USAGE, f"superd does not take this value of '{which}'" + (f": write {right}" if right else ""))
    if name in ("MethodNotFound", "InterfaceNotFound", "MethodNotImplemented"):
        return Failure(UNREACHABLE, f"this superd is of another version than superctl {__version__}: {name}")
    return Failure(FAILED, f"superd answers {name}: {parameters.get('reason', '')}")


# --- output


def _is_terminal() -> bool:
    return sys.stdout.isatty()


def _colours() -> bool:
    return _is_terminal() and not os.environ.get("NO_COLOR") and os.environ.get("TERM", "dumb") != "dumb"


_GREEN, _YELLOW, _RED, _DIM = "32", "33", "31", "2"
_STATE_COLOURS = {
    "ready": _GREEN, "listening": _GREEN, "idle": _GREEN, "done": _GREEN, "failed": _RED, "bad config": _RED,
    "backoff": _YELLOW, "starting": _YELLOW, "stopping": _YELLOW, "stopped": _DIM, "disabled": _DIM,
}  # fmt: skip


def _paint(text: str, colour: str | None) -> str:
    return f"\x1b[{colour}m{text}\x1b[0m" if colour and _colours() else text


def _clean(text: object) -> str:
    """What others wrote, without anything that steers a terminal (J11). One line."""
    plain = str(text)
    if plain.isprintable():
        return plain
    from superd.core.records import escape

    return escape(plain).replace("\t", " ")


def _age(seconds: float) -> str:
    whole = int(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"


def _columns() -> int | None:
    """The width of the terminal; None: there is none, and nothing is cut."""
    if not _is_terminal():
        return None
    try:
        return max(os.get_terminal_size(sys.stdout.fileno()).columns, 40)
    except (OSError, ValueError):
        return 80


def _cut(text: str, width: int | None) -> str:
    return text if width is None or len(text) <= width else text[: max(width - 1, 0)] + "…"


def _shorten(text: str, width: int) -> str:
    """Without its middle: of names and addresses the end tells more than the middle."""
    return text if len(text) <= width else f"{text[: width - width // 2 - 1]}…{text[len(text) - width // 2 :]}"


def _squeeze(widths: list[int], numbers: set[int], cells: Sequence[Sequence[str]], room: int) -> None:
    """Make columns narrower until all have room: of numbers first what only their head needs, then the widest text."""
    for at in sorted(numbers, key=lambda at: -widths[at]):
        needed = max(4, *(len(row[at]) for row in cells))
        widths[at] -= min(max(sum(widths) - room, 0), max(widths[at] - needed, 0))
    texts = [at for at in range(len(widths)) if at not in numbers]
    while sum(widths) > room:
        at = max(texts, key=lambda at: widths[at])
        if widths[at] <= _TEXT_MIN:
            return
        widths[at] -= 1


def table(head: Sequence[str], rows: Iterable[Sequence[str]], right: Sequence[str] = ()) -> Iterator[str]:
    """Lines of columns. The last column is for prose: cut at the terminal's width, and below its row when there is
    little room beside it."""
    columns = _columns()
    cells = [[_clean(cell) for cell in row] for row in rows]
    if not any(row[-1] for row in cells):
        head, cells = head[:-1], [row[:-1] for row in cells]
        prose = False
    else:
        prose = True
    fixed = len(head) - prose
    widths = [max(len(head[at]), *(len(row[at]) for row in cells), 0) for at in range(fixed)]
    numbers = {at for at, name in enumerate(head) if name in right}
    if columns is not None:
        _squeeze(widths, numbers, cells, columns - 2 * (fixed - 1))
        cells = [[*map(_shorten, row, widths), *row[fixed:]] for row in cells]
        head = [*map(_cut, head, widths), *head[fixed:]]
    room = None if columns is None else columns - sum(widths) - 2 * fixed
    below = prose and room is not None and room < _NOTE_MIN and any(len(row[-1]) > room for row in cells)

    def line(row: Sequence[str], *, colour: bool) -> str:
        parts = [
            cell.rjust(width) if at in numbers else cell.ljust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=False))
        ]
        if prose and not below:
            parts.append(_cut(row[-1], room))
        text = _cut("  ".join(parts).rstrip(), columns)
        if colour and "state" in head:
            at = list(head).index("state")
            start = sum(widths[:at]) + 2 * at
            word = text[start : start + len(row[at])]
            text = text[:start] + _paint(word, _STATE_COLOURS.get(word)) + text[start + len(word) :]
        return text

    yield _paint(line([*head[:-1], ""] if below else head, colour=False), _DIM)
    for row in cells:
        yield line(row, colour=True)
        if below and row[-1]:
            yield _cut(f"    {row[-1]}", columns)


def _say(options: argparse.Namespace, lines: Iterable[str]) -> None:
    if not options.quiet:
        for line in lines:
            print(line)


def _json(options: argparse.Namespace, value: Any) -> bool:
    """Print it as JSON if that is wanted."""
    if options.json and not options.quiet:
        import json

        print(json.dumps(value, indent=2))
    return bool(options.json)


def _complain(text: str) -> None:
    print(f"superctl: {_clean(text)}", file=sys.stderr)


def _record(row: Row) -> Record:
    from superd.core.records import Record

    return Record(
        row["number"], row["time"], row["level"], row["service"], row["event"], row["connection"], row["pid"],
        row["peer"], row["message"], row["fields"],
    )  # fmt: skip


def _print_records(options: argparse.Namespace, rows: Iterable[Row]) -> None:
    from superd.core import records

    style = records.format_json if options.json else records.format_text_colour if _colours() else records.format_text
    for row in rows:
        print(style(*_record(row)[1:]))
    sys.stdout.flush()  # a line that happened is a line that can be read


# --- commands. Each returns the exit status.


def _list(options: argparse.Namespace, control: Control) -> int:
    if options.sockets:
        rows = control.call("Sockets")["sockets"]
        if not _json(options, rows):
            cells = [
                [
                    row["service"], row["address"], row["kind"], row["name"], "-" if row["queue"] is None else
                    f"{row['queue']}/{row['room']}",
                    "not bound" if row["why"] else "paused" if row["paused"] else "open", row["why"] or "",
                ]
                for row in rows
            ]  # fmt: skip
            sockets_head = ("service", "listen", "kind", "name", "queue", "is", "note")
            _say(options, table(sockets_head, cells, right=("queue",)))
        return OK
    rows = control.call("List")["services"]
    if options.names:
        names = [row["name"] for row in rows]
        if not _json(options, names):
            _say(options, names)
        return OK
    if _json(options, rows):
        return OK
    if not rows:
        _say(options, ["no services; put files into conf.d, see superd.toml(5)"])
        return OK
    narrow = (_columns() or 999) < 120
    cells = []
    for row in rows:
        listen = row["listen"]
        text = f"{listen[0]} +{len(listen) - 1}" if narrow and len(listen) > 1 else " ".join(listen)
        cells.append(
            [
                row["name"], row["state"], _age(row["for"]), str(row["pid"] or "-"), str(row["now"]), str(row["total"]),
                str(row["restarts"]), text, row["note"],
            ]
        )  # fmt: skip
    head = ("service", "state", "for", "pid", "now", "total", "restarts", "listen", "note")
    _say(options, table(head, cells, right=("for", "pid", "now", "total", "restarts")))
    return OK


def _status(options: argparse.Namespace, control: Control) -> int:
    found = control.call("Status", names=options.names or None)["services"]
    processes = [one for details in found for one in details["processes"]]
    if processes:
        from superd.cli import top

        read = top.reader()
        for one in processes:
            one["memory"], one["cpu"] = read(one["pid"]) or (None, None)
    if not _json(options, found):
        for at, details in enumerate(found):
            _say(options, [*([""] if at else []), *_describe(details)])
    return OK


def _describe(details: Row) -> Iterator[str]:
    import shlex

    from superd.cli.top import seconds, size
    from superd.core import records

    row = details["service"]
    columns = _columns()
    state = _paint(row["state"], _STATE_COLOURS.get(row["state"]))
    counts = f"{row['now']} now, {row['total']} in all, {row['restarts']} restarts"
    refused = f", {details['refused']} refused" if details["refused"] else ""
    yield f"{_clean(row['name'])}: {state} for {_age(row['for'])}, {counts}{refused}"

    took = "" if details["took"] is None else f", after {records.format_duration(details['took'])}"

    def line(title: str, text: str) -> str:
        return _cut(f"  {title:<9} {_clean(text)}", columns)

    for title, text in (
        ("", details["description"]), ("file", details["file"]),
        ("run", details["run"] and f"{details['run']}, pass {details['pass']}, restart {details['restart']}"),
        ("command", shlex.join(details["command"])),
        ("ready", "" if details["ready"] == "start" else details["ready"] + took), ("health", details["health"]),
        ("requires", ", ".join(details["requires"])), ("wants", ", ".join(details["wants"])),
        ("needed by", ", ".join(details["required_by"])), ("limits", ", ".join(details["limits"])),
        ("says", details["said"]), ("errors", ", ".join(details["errors"])), ("fdstore", str(details["stored"] or "")),
        ("ignored", details["ignored"] and f"notify messages: {details['ignored']}"),
    ):  # fmt: skip
        if text:
            yield line(title, text)
    for at, text in enumerate(row["note"].splitlines()):
        yield f"  {'' if at else 'note':<9} {_clean(text)}"
    for one in details["sockets"]:
        queue = "" if one["queue"] is None else f", {one['queue']} of {one['room']} waiting"
        yield line("listen", f"{one['address']} ({one['name']}{queue})" + (": paused" if one["paused"] else "") +
                   (f": {one['why']}" if one["why"] else ""))  # fmt: skip
    for one in details["processes"]:
        peer = "" if one["connection"] is None else f", {one['peer']} (#{one['connection']})"
        used = "" if one["memory"] is None else f", {size(one['memory'])} of memory, {seconds(one['cpu'])} of CPU"
        yield line("process", f"{one['pid']}{peer}, for {_age(one['for'])}{used}")
    for text in details["endings"]:
        yield line("ended", text)
    if details["records"]:
        yield "  log"
        for record in details["records"]:
            yield _cut(f"    {records.format_text(*_record(record)[1:])}", columns)


def _logs(options: argparse.Namespace, control: Control) -> int:
    return _follow(options, control, "Logs")


def _events(options: argparse.Namespace, control: Control) -> int:
    return _follow(options, control, "Events")


def _follow(options: argparse.Namespace, control: Control, method: str) -> int:
    for reply in control.stream(method, names=options.names or None, count=options.count, follow=options.follow):
        if reply["lost"]:
            _complain(f"{reply['lost']} lines lost: they were not read fast enough")
        if not options.quiet:
            _print_records(options, reply["records"])
    return OK


def _connections(options: argparse.Namespace, control: Control) -> int:
    rows = control.call("Connections", names=options.names or None)["connections"]
    if not _json(options, rows):
        cells = [
            [row["connection"], row["service"], str(row["pid"] or "-"), _age(row["for"]), row["peer"]] for row in rows
        ]
        _say(options, table(("id", "service", "pid", "age", "peer"), cells, right=("pid", "age")))
    return OK


def _start(options: argparse.Namespace, control: Control) -> int:
    return _order(options, control, "start")


def _stop(options: argparse.Namespace, control: Control) -> int:
    return _order(options, control, "stop")


def _restart(options: argparse.Namespace, control: Control) -> int:
    return _order(options, control, "restart", overlap=options.overlap or None)


def _drain(options: argparse.Namespace, control: Control) -> int:
    return _order(options, control, "drain")


def _pause(options: argparse.Namespace, control: Control) -> int:
    return _pausing(options, control.call("Pause", names=options.names)["results"], "pause", "paused")


def _resume(options: argparse.Namespace, control: Control) -> int:
    return _pausing(options, control.call("Resume", names=options.names)["results"], "resume", "not paused")


def _pausing(options: argparse.Namespace, results: list[Row], verb: str, what: str) -> int:
    _json(options, results)
    for row in results:
        if not row["ok"]:
            _complain(f"cannot {verb} {row['name']}: {row['note']}")
        elif not options.json:
            goes_on = f"; pid {row['pid']} has its sockets and goes on" if verb == "pause" and row["pid"] else ""
            already = "" if row["changed"] else "already "
            _say(options, [f"{_clean(row['name'])}: {already}{what}, {row['state']}{goes_on}"])
    return OK if all(row["ok"] for row in results) else FAILED


def _order(options: argparse.Namespace, control: Control, verb: str, **more: Any) -> int:
    with _Progress(options, control):
        wait = False if options.no_wait else None
        reply = control.call(verb.capitalize(), names=options.names, wait=wait, **more)
    return _show_results(options, reply["results"], f"cannot {verb}")


class _Progress:
    """One line on a terminal that rewrites itself while an order is carried out, and is gone afterwards."""

    def __init__(self, options: argparse.Namespace, control: Control) -> None:
        self.options, self.control = options, control
        self._began = time.monotonic()
        self._asked: Control | None = None

    def __enter__(self) -> None:
        dumb = os.environ.get("TERM", "dumb") == "dumb"
        if sys.stderr.isatty() and not dumb and not self.options.quiet and not self.options.json:
            self.control.waiting = self._show

    def _show(self) -> None:
        try:
            if self._asked is None:
                self._asked = Control(self.options.socket, _ANSWER_S)
            rows = self._asked.call("List", names=self.options.names)["services"]
        except Failure:
            return  # the order itself will tell
        words = [f"{row['name']}: {row['state']}" + (f", {row['now']} now" if row["now"] else "") for row in rows]
        text = _clean(f"{_age(time.monotonic() - self._began)}  {'; '.join(words)}")
        sys.stderr.write(f"\r{_cut(text, (_columns() or 80) - 1)}\x1b[K")
        sys.stderr.flush()

    def __exit__(self, *_: object) -> None:
        self.control.waiting = None
        if self._asked is not None:
            self._asked.close()
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()


def _show_results(options: argparse.Namespace, results: list[Row], cannot: str) -> int:
    _json(options, results)
    for row in results:
        if not row["ok"]:
            note = row["note"] or f"is {row['state']}"
            _complain(f"{cannot} {row['name']}: {note}")
            if row["records"] and not options.json:
                from superd.core import records

                for record in row["records"]:
                    print(f"  {records.format_text(*_record(record)[1:])}", file=sys.stderr)
            if not options.json and not options.quiet:
                print(f"  `superctl status {_clean(row['name'])}` says more", file=sys.stderr)
        elif not options.json:
            pid = f", pid {row['pid']}" if row["pid"] else ""
            took = f" ({row['took']:.2f} s)" if row["changed"] and row["took"] >= 0.1 else ""
            already = "" if row["changed"] else "already "
            _say(options, [f"{_clean(row['name'])}: {already}{row['state']}{pid}{took}"])
    return OK if all(row["ok"] for row in results) else FAILED


def _kill(options: argparse.Namespace, control: Control) -> int:
    results = control.call("Kill", names=options.names, signal=options.signal)["results"]
    _json(options, results)
    for row in results:
        if not row["ok"]:
            _complain(f"cannot signal {row['name']}: {row['note']}")
        elif not options.json:
            _say(options, [f"{_clean(row['name'])}: sent {options.signal} to pid {row['pid']}"])
    return OK if all(row["ok"] for row in results) else NOT_RUNNING


def _reload_service(options: argparse.Namespace, control: Control) -> int:
    wait = False if options.no_wait else None
    results = control.call("ReloadService", names=options.names, wait=wait)["results"]
    code = _show_results(options, results, "cannot reload")
    # Not running, unless one of them ran, was told, and did not live through it.
    return NOT_RUNNING if code and all(row["ok"] or not row["changed"] for row in results) else code


def _wait(options: argparse.Namespace, control: Control) -> int:
    results = control.call("Wait", names=options.names, **{"for": options.condition})["results"]
    _json(options, results)
    for row in results:
        if not row["ok"]:
            note = f": {row['note']}" if row["note"] else ""
            _complain(f"{row['name']} will not become {options.condition} by itself: it is {row['state']}{note}")
        elif not options.json:
            _say(options, [f"{_clean(row['name'])}: {row['state']}"])
    return OK if all(row["ok"] for row in results) else FAILED


def _is(what: str) -> Callable[[argparse.Namespace, Control], int]:
    def run(options: argparse.Namespace, control: Control) -> int:
        reply = control.call("Is", names=options.names, what=what)
        yes = set(reply["yes"])
        names = list(dict.fromkeys(options.names))
        if not _json(options, [{"name": name, what: name in yes} for name in names]):
            _say(options, [f"{_clean(name)}: {'' if name in yes else 'not '}{what}" for name in names])
        return NOT_RUNNING if reply["no"] else OK

    return run


def _access(options: argparse.Namespace, control: Control) -> int:
    reply = control.call("Access", name=options.name, address=options.address)
    if not _json(options, {"name": options.name, "address": options.address, **reply}):
        _say(options, [_clean(f"{'yes' if reply['allowed'] else 'no'}: {reply['reason']}")])
    return OK if reply["allowed"] else FAILED


def _health(options: argparse.Namespace, control: Control) -> int:
    reply = control.call("Health")
    well = reply["live"] if options.live else reply["ready"]
    if not _json(options, reply):
        _say(options, ["live" if options.live else "ready"] if well else [_clean(text) for text in reply["problems"]])
    return OK if well else FAILED


def _reload(options: argparse.Namespace, control: Control) -> int:
    reply = control.call("Reload", dry_run=options.dry_run or None, strict=options.strict or None)
    if not _json(options, reply):
        _show_plan(options, reply)
    if reply["problems"]:
        return CONFIG
    return OK if options.dry_run or (reply["applied"] and not any(row["why"] for row in reply["entries"])) else FAILED


def _diff(options: argparse.Namespace, control: Control) -> int:
    reply = control.call("Diff")
    if not _json(options, reply):
        _show_plan(options, reply)
    if reply["problems"]:
        return CONFIG
    return FAILED if reply["entries"] or reply["daemon"] else OK


def _show_plan(options: argparse.Namespace, reply: Row) -> None:
    for text in reply["problems"]:
        print(_clean(text), file=sys.stderr)
    for row in reply["entries"]:
        keys = f" ({', '.join(row['keys'])} changed)" if row["keys"] else ""
        _say(options, [f"{_clean(row['name'])}: {row['action']}{_clean(keys)}"])
        if row["why"]:
            _complain(f"cannot reload {row['name']}: {row['why']}; what ran before goes on")
    if reply["daemon"]:
        _say(options, [f"superd.toml: in place ({', '.join(reply['daemon'])} changed)"])
    if not reply["entries"] and not reply["daemon"]:
        _say(options, ["nothing has changed"])


def _metrics(options: argparse.Namespace, control: Control) -> int:
    text = control.call("Metrics")["text"]
    if not _json(options, {"text": text}):
        _say(options, text.splitlines())
    return OK


def _top(options: argparse.Namespace, control: Control) -> int:
    from superd.cli import top

    return top.run(
        control, once=options.json or not _is_terminal(), style=top.Style(table, _clean, _colours()),
        show=lambda rows: _json(options, rows), quiet=options.quiet,
    )  # fmt: skip


def _shutdown(options: argparse.Namespace, control: Control) -> int:
    reply = control.call("Shutdown")
    if not options.no_wait:
        keeper = _open_keeper(reply["pid"])
        control.wait_closed()
        if keeper is not None:
            import select

            select.select([keeper], [], [], 5.0)  # it exits right after that
            os.close(keeper)
    if not _json(options, {"services": reply["services"], "stopped": not options.no_wait}):
        _say(options, ["superd is stopping" if options.no_wait else "superd has stopped"])
    return OK


def _upgrade(options: argparse.Namespace, control: Control) -> int:
    reply = control.call("Upgrade")
    if not reply["ok"]:
        if not _json(options, reply):
            _complain(f"cannot upgrade superd {reply['was']}: {reply['why']}; it goes on as it is")
        return FAILED
    control.wait_closed()
    anew = Control(options.socket, options.timeout if options.timeout is not None else _TAKE_OVER_S)
    try:
        version = anew.version()
    finally:
        anew.close()
    well = version == reply["version"]
    if not _json(options, {**reply, "ok": well, "version": version}):
        if well:
            _say(options, [f"superd {_clean(version)} has taken over from {_clean(reply['was'])}"])
        else:
            _complain(f"superd is still {version}; `superctl logs` may say why")
    return OK if well else FAILED


def _open_keeper(pid: int) -> int | None:
    """A pidfd of superd's first process, if that is visible from here and really is it."""
    try:
        with open(f"/proc/{pid}/comm") as file:
            return os.pidfd_open(pid) if file.read() == "superd-keeper\n" else None
    except OSError:
        return None


# --- the command line


def _no_arguments(parser: argparse.ArgumentParser) -> None:
    pass


def _list_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sockets", action="store_true", help="one line a socket, with its queue")
    parser.add_argument("--names", action="store_true", help="only names, as completion scripts want them")


def _names(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("names", nargs="+", metavar="NAME")


def _any_names(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("names", nargs="*", metavar="NAME", help="default: all")


def _record_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-f", "--follow", action="store_true", help="go on with what comes, until interrupted")
    parser.add_argument("-n", dest="count", type=_count, default=100, metavar="N", help="how many (default: 100)")
    _any_names(parser)


def _order_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--no-wait", action="store_true", help="ask for it, and do not wait until it is so")
    _names(parser)


def _restart_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--overlap", action="store_true", help="the new one is ready before the old one is stopped")
    _order_arguments(parser)


def _kill_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-s", dest="signal", default="TERM", metavar="SIG", help="its name (default: TERM)")
    _names(parser)


def _wait_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--for", dest="condition", choices=("ready", "active", "stopped", "idle"), default="ready")
    _names(parser)


def _access_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME")
    parser.add_argument("address", metavar="ADDRESS", help="of an IP client, or user:NAME for one of a UNIX socket")


def _health_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--live", action="store_true", help="only whether superd answers")
    group.add_argument("--ready", action="store_true", help="whether every service can serve (the default)")


def _metrics_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--http", action="store_true", help="one HTTP exchange on stdin and stdout")


def _shutdown_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--no-wait", action="store_true", help="do not wait until everything has stopped")


def _reload_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dry-run", action="store_true", help="show what would be done, and do nothing")
    parser.add_argument("--strict", action="store_true", help="all or nothing")


def _module(name: str) -> Any:
    """The module of a command that has one, imported only for it."""
    from importlib import import_module

    return import_module(f"superd.cli.{name}")


class Command:
    """run: the exit status; patient: waits as long as it takes unless --timeout says otherwise."""

    def __init__(
        self,
        usage: str,
        help: str,
        run: Callable[[argparse.Namespace, Control], int],
        arguments: Callable[[argparse.ArgumentParser], None],
        patient: bool = False,
    ) -> None:
        self.usage, self.help, self.run, self.arguments, self.patient = usage, help, run, arguments, patient


class FileCommand(Command):
    """A command that reads files, and asks a superd only if it likes to: a module of superd.cli with `arguments` and
    `run`. Its `run` gets the options and a function that connects. program: what stands after -- is one."""

    def __init__(self, usage: str, help: str, module: str, *, program: bool = False) -> None:
        super().__init__(usage, help, lambda *_: FAILED, lambda parser: _module(module).arguments(parser))
        self.module, self.program = module, program


COMMANDS: dict[str, Command] = {
    "list": Command("[--sockets] [--names]", "one line a service (also without a command)", _list, _list_arguments),
    "status": Command("[NAME...]", "everything about services", _status, _any_names),
    "logs": Command("[-f] [-n N] [NAME...]", "the last lines of services", _logs, _record_arguments, True),
    "start": Command("NAME...", "start, and wait until it is ready", _start, _order_arguments, True),
    "stop": Command("NAME...", "stop, and wait until nothing of it is left", _stop, _order_arguments, True),
    "restart": Command("[--overlap] NAME...", "stop and start", _restart, _restart_arguments, True),
    "pause": Command("NAME...", "accept nobody; what runs goes on, clients wait", _pause, _names),
    "resume": Command("NAME...", "accept again after a pause", _resume, _names),
    "drain": Command("NAME...", "stop, and give what runs all the time it needs", _drain, _order_arguments, True),
    "reload-service": Command(
        "NAME...", "tell it to read its files again (reload_signal)", _reload_service, _order_arguments
    ),
    "connections": Command("[NAME...]", "who is connected", _connections, _any_names),
    "events": Command("[-f] [-n N] [NAME...]", "starts, exits, refusals", _events, _record_arguments, True),
    "kill": Command("[-s SIG] NAME...", "send a signal to its processes", _kill, _kill_arguments),
    "wait": Command("[--for WHAT] NAME...", "until it is ready, active, stopped or idle", _wait, _wait_arguments, True),
    "is-active": Command("NAME...", "exit 0 if it serves or runs, else 3", _is("active"), _names),
    "is-failed": Command("NAME...", "exit 0 if it has failed, else 3", _is("failed"), _names),
    "is-ready": Command("NAME...", "exit 0 if it is ready, else 3", _is("ready"), _names),
    "access": Command("NAME ADDRESS", "would it be let in, by which rule; exit 0 or 1", _access, _access_arguments),
    "health": Command("[--live|--ready]", "for probes: exit 0 if all is well", _health, _health_arguments),
    "reload": Command(
        "[--dry-run] [--strict]", "carry out what has changed in the files", _reload, _reload_arguments, True
    ),
    "diff": Command("", "what reload would do; exit 1 if anything", _diff, _no_arguments, True),
    "top": Command("", "what uses CPU and memory, again each second", _top, _no_arguments, True),
    "metrics": Command(
        "[--http]", "numbers for Prometheus; --http: a page for a browser", _metrics, _metrics_arguments
    ),
    "upgrade": Command("", "let the superd that is installed now take over", _upgrade, _no_arguments, True),
    "shutdown": Command("", "stop everything, then superd", _shutdown, _shutdown_arguments, True),
    "explain": FileCommand("[--list] WORD...", "a key, state, error; who has a port or path", "explain"),
    "show": FileCommand("[--origin] NAME", "what is in force, and where it was written", "show"),
    "new": FileCommand("NAME --listen A -- PROGRAM...", "write a file for a service", "new", program=True),
    "enable": FileCommand("NAME...", "run it from now on, by a drop-in", "enable"),
    "disable": FileCommand("NAME...", "do not, by a drop-in", "enable"),
    "schema": FileCommand("[service|superd]", "JSON Schema for editors", "schema"),
}
_OFFLINE = (
    ("check", "[PATH...]", "is the configuration right?"),
    ("import", "FILE... [-o DIR]", "inetd, xinetd, systemd, supervisord, upstart: as TOML"),
    ("export", "systemd NAME [-o DIR]", "a service as units of systemd"),
    ("completion", "bash|zsh|fish", "a script for the shell: source <(superctl completion bash)"),
    ("help", "[COMMAND]", "this, or more about a command"),
)
_GROUPS = {
    "Every day": ("list", "status", "logs", "start", "stop", "restart"),
    "More": ("top", "reload", "diff", "reload-service", "connections", "events", "kill", "wait", "upgrade", "shutdown"),
    "Traffic": ("pause", "resume", "drain"),
    "For scripts": ("is-active", "is-failed", "is-ready", "access", "health", "metrics"),
    "Files, with or without superd": ("explain", "show", "new", "enable", "disable", "schema"),
}
_WITH_VALUE = ("-s", "--socket", "-c", "--config", "--timeout")


def _help() -> str:
    lines = [
        "usage: superctl [-s SOCKET] [-c DIR] [--json] [--timeout D] [-q] [COMMAND ...]",
        "",
        "Asks a running superd.",
    ]
    for title, names in _GROUPS.items():
        lines += ["", f"{title}:"]
        lines += [f"  {f'{name} {COMMANDS[name].usage}':<34} {COMMANDS[name].help}" for name in names]
    lines += ["", "Without superd:", *(f"  {f'{name} {usage}':<34} {text}" for name, usage, text in _OFFLINE)]
    lines += [
        "", "Options, before or after the command:",
        "  -s, --socket SOCKET                the control socket (default: $SUPERD_SOCKET, or superd's own default)",
        "  -c, --config DIR                   the files that are meant, or the superd whose files they are",
        "  --json                             JSON for programs; its keys stay",
        "  --timeout D                        give up after so long (500ms, 30s, 2m); exit status 75",
        "  -q, --quiet                        no results, only errors and the exit status",
        "  -h, --help, --version", "",
        "`superctl COMMAND --help` says more. Exit status: 0 done or yes, 1 it did not work, 2 wrong usage,",
        "3 not running, 4 no such service, 69 superd cannot be reached, 75 time limit, 77 not permitted, 78 bad files.",
    ]  # fmt: skip
    return "\n".join(lines)


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 9:
        raise ValueError(text)
    return int(text)


def _duration(text: str) -> float:
    import argparse

    from superd.core.values import parse_duration

    try:
        return parse_duration(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _usage_error(text: str, command: str = "") -> NoReturn:
    raise Failure(USAGE, f"{text}\nTry `superctl {command + ' ' if command else ''}--help`.")


def _find_command(argv: Sequence[str]) -> int | None:
    """Where the command is: the first word that is neither an option nor the value of one."""
    at = 0
    while at < len(argv):
        if argv[at] in _WITH_VALUE:
            at += 1
        elif not argv[at].startswith("-"):
            return at
        at += 1
    return None


def _parser(name: str) -> argparse.ArgumentParser:
    import argparse

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> NoReturn:
            _usage_error(message, name)

    parser = Parser(
        prog=f"superctl {name}", description=COMMANDS[name].help.capitalize() + ".", allow_abbrev=False,
        # With a width it does not import shutil, only to find one.
        formatter_class=lambda prog: argparse.HelpFormatter(prog, width=min((_columns() or 80) - 2, 120)),
    )  # fmt: skip
    COMMANDS[name].arguments(parser)
    _global_options(parser, short_socket=name != "kill")
    return parser


def _global_options(parser: argparse.ArgumentParser, *, short_socket: bool = True) -> None:
    flags = ("-s", "--socket") if short_socket else ("--socket",)
    parser.add_argument(*flags, dest="socket", metavar="SOCKET", help="the control socket")
    parser.add_argument(
        "-c", "--config", dest="config", metavar="DIR", help="its files: what is read, or the superd that is asked"
    )
    parser.add_argument("--json", action="store_true", help="JSON for programs")
    parser.add_argument("--timeout", type=_duration, metavar="D", help="give up after so long; exit status 75")
    parser.add_argument("-q", "--quiet", action="store_true", help="only errors and the exit status")


def _offline(name: str, argv: list[str]) -> int:
    """A command that asks no superd: which one it would ask, and how long, may be said all the same."""
    import argparse

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> NoReturn:
            _usage_error(message, name)

    parser = Parser(prog=f"superctl {name}", allow_abbrev=False, add_help=False)
    parser.add_argument("-s", "--socket")
    parser.add_argument("--timeout", type=_duration)
    if name == "check":
        parser.add_argument("-c", "--config", action="append", default=[])
        parser.add_argument("--json", action="store_true")
    options, rest = parser.parse_known_args(argv)
    if name == "check":
        from superd.cli import check

        return check.main([*(["--format", "json"] if options.json else []), *rest, *options.config])
    from superd.cli import importing

    return (importing.main_import if name == "import" else importing.main_export)(rest)


def _socket_of(options: argparse.Namespace) -> str | None:
    """The control socket that -s names, or else the `control` of the files that -c names; None: the default."""
    if options.socket is not None or options.config is None:
        return options.socket  # type: ignore[no-any-return]
    from superd.cli.files import complain, is_for_root, read_files
    from superd.core import schema
    from superd.system.configdir import RealMachine

    if not os.path.exists(options.config):
        raise Failure(CONFIG, f"cannot read {options.config}: no such file or directory")
    files, _ = read_files([options.config])
    own = [source for source in files if source.role == "daemon"]
    found, problems = schema.load(own, machine=RealMachine(), environ=os.environ, is_root=is_for_root([options.config]))
    if found.daemon.control is None and any(problem.is_error for problem in problems):
        complain(problems)
        raise Failure(CONFIG, f"cannot tell the control socket from {options.config}; -s SOCKET names it")
    if found.daemon.control == "off":
        raise Failure(UNREACHABLE, f"cannot reach superd: {options.config} says that it has no control socket")
    return found.daemon.control


def _run_module(name: str, command: FileCommand, before: list[str], after: list[str]) -> int:
    program: list[str] = []
    if command.program and "--" in after:
        at = after.index("--")
        after, program = after[:at], after[at + 1 :]
    options = _parser(name).parse_args([*before, *after])
    options.command, options.program = name, program
    timeout_s = _ANSWER_S if options.timeout is None else options.timeout
    code: int = _module(command.module).run(options, lambda: Control(options.socket, timeout_s))
    return code


def _completion(argv: list[str]) -> int:
    import argparse

    from superd.cli import completion

    parser = argparse.ArgumentParser(
        prog="superctl completion", description="A script that makes the shell complete superctl.", allow_abbrev=False
    )
    parser.add_argument("shell", choices=completion.SHELLS)
    shell = parser.parse_args(argv).shell
    commands = {name: completion.command_of(_parser(name), COMMANDS[name].help) for name in COMMANDS}
    for name, _, text in _OFFLINE:
        commands[name] = completion.Command(text, [], "paths")
    commands["completion"].takes = completion.SHELLS
    commands["help"].takes = tuple(commands)
    print(completion.script(shell, commands), end="")
    return OK


def run(argv: list[str]) -> int:
    """Raises Failure, or SystemExit from argparse."""
    at = _find_command(argv)
    if at is None:
        if "-h" in argv or "--help" in argv:
            print(_help())
            return OK
        if "--version" in argv:
            print(f"superctl {__version__}")
            return OK
    name = "list" if at is None else argv[at]
    before = argv if at is None else argv[:at]
    after = [] if at is None else argv[at + 1 :]
    if name in ("check", "import", "export"):
        return _offline(name, [*before, *after])
    if name == "help":
        return run([*after[:1], "--help"])
    if name == "completion":
        return _completion(after)
    if name not in COMMANDS:
        import difflib

        similar = difflib.get_close_matches(name, [*COMMANDS, *(row[0] for row in _OFFLINE)], 1)
        _usage_error(f"there is no command '{name}'" + (f"; did you mean `{similar[0]}`?" if similar else ""))
    if name == "kill":  # its own -s is a signal
        before = ["--socket" if word == "-s" else word for word in before]
    command = COMMANDS[name]
    if isinstance(command, FileCommand):
        return _run_module(name, command, before, after)
    options = _parser(name).parse_args([*before, *after])
    options.socket = _socket_of(options)
    if getattr(options, "http", False):
        from superd.cli import metrics

        wait_s = _ANSWER_S if options.timeout is None else options.timeout
        return metrics.serve(lambda: Control(options.socket, wait_s), Failure, __version__)
    timeout_s = options.timeout if options.timeout is not None or command.patient else _ANSWER_S
    control = Control(options.socket, timeout_s)
    try:
        return command.run(options, control)
    finally:
        control.close()


def main(argv: list[str] | None = None) -> int:
    if argv is None:
        import signal

        argv = sys.argv[1:]
        # As any filter: the end of the reader, or ^C, is the end, without a traceback (J6).
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # LANG=C must not stop us
    try:
        code = run(argv)
        sys.stdout.flush()
    except Failure as failure:
        for at, line in enumerate(str(failure).splitlines()):
            print(_clean(line) if at else f"superctl: {_clean(line)}", file=sys.stderr)
        return failure.code
    except OSError as error:  # of the output: a full disk, most likely
        print(f"superctl: cannot write the result: {error.strerror}", file=sys.stderr)
        return FAILED
    return code


if __name__ == "__main__":
    sys.exit(main())
