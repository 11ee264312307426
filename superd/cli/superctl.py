"""superctl(1): asks a running superd, and checks files without one.

Scripts and probes call it often, so it has to answer in 20-30 ms: no trio, and what only some commands need is
imported by them.
"""

from __future__ import annotations

import os
import sys
import time

from superd import __version__
from superd.cli.client import Control
from superd.cli.failure import (
    CONFIG,
    FAILED,
    NOT_RUNNING,
    OK,
    UNREACHABLE,
    USAGE,
    Failure,
)
from superd.cli.output import (
    STATE_COLOURS,
    age,
    clean,
    colours,
    complain,
    cut,
    is_terminal,
    paint,
    print_json,
    print_records,
    say,
    table,
    terminal_columns,
    to_record,
)

TYPE_CHECKING = False
if TYPE_CHECKING:  # importing typing takes 3 ms
    import argparse
    from collections.abc import Callable, Iterator, Sequence
    from typing import Any, NoReturn

    Row = dict[str, Any]

_ANSWER_S = 10.0  # for what superd answers at once, when no --timeout is given
_TAKE_OVER_S = 60.0  # for another version to come up


# --- commands. Each returns the exit status.


def _list(options: argparse.Namespace, control: Control) -> int:
    if options.sockets:
        rows = control.call("Sockets")["sockets"]
        if not print_json(options, rows):
            cells = [
                [
                    row["service"], row["address"], row["kind"], row["name"], "-" if row["queue"] is None else
                    f"{row['queue']}/{row['room']}",
                    "not bound" if row["why"] else "paused" if row["paused"] else "open", row["why"] or "",
                ]
                for row in rows
            ]  # fmt: skip
            sockets_head = ("service", "listen", "kind", "name", "queue", "is", "note")
            say(options, table(sockets_head, cells, right=("queue",)))
        return OK
    rows = control.call("List")["services"]
    if options.names:
        names = [row["name"] for row in rows]
        if not print_json(options, names):
            say(options, names)
        return OK
    if print_json(options, rows):
        return OK
    if not rows:
        say(options, ["no services; put files into conf.d, see superd.toml(5)"])
        return OK
    narrow = (terminal_columns() or 999) < 120
    cells = []
    for row in rows:
        listen = row["listen"]
        text = f"{listen[0]} +{len(listen) - 1}" if narrow and len(listen) > 1 else " ".join(listen)
        cells.append(
            [
                row["name"], row["state"], age(row["for"]), str(row["pid"] or "-"), str(row["now"]), str(row["total"]),
                str(row["restarts"]), text, row["note"],
            ]
        )  # fmt: skip
    head = ("service", "state", "for", "pid", "now", "total", "restarts", "listen", "note")
    say(options, table(head, cells, right=("for", "pid", "now", "total", "restarts")))
    return OK


def _status(options: argparse.Namespace, control: Control) -> int:
    found = control.call("Status", names=options.names or None)["services"]
    processes = [one for details in found for one in details["processes"]]
    if processes:
        from superd.cli import top

        read = top.reader()
        for one in processes:
            one["memory"], one["cpu"] = read(one["pid"]) or (None, None)
    if not print_json(options, found):
        for at, details in enumerate(found):
            say(options, [*([""] if at else []), *_describe(details)])
    return OK


def _describe(details: Row) -> Iterator[str]:
    import shlex

    from superd.cli.top import seconds, size
    from superd.core import records

    row = details["service"]
    columns = terminal_columns()
    state = paint(row["state"], STATE_COLOURS.get(row["state"]))
    counts = f"{row['now']} now, {row['total']} in all, {row['restarts']} restarts"
    refused = f", {details['refused']} refused" if details["refused"] else ""
    yield f"{clean(row['name'])}: {state} for {age(row['for'])}, {counts}{refused}"

    took = "" if details["took"] is None else f", after {records.format_duration(details['took'])}"

    def line(title: str, text: str) -> str:
        return cut(f"  {title:<9} {clean(text)}", columns)

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
        yield f"  {'' if at else 'note':<9} {clean(text)}"
    for one in details["sockets"]:
        queue = "" if one["queue"] is None else f", {one['queue']} of {one['room']} waiting"
        yield line("listen", f"{one['address']} ({one['name']}{queue})" + (": paused" if one["paused"] else "") +
                   (f": {one['why']}" if one["why"] else ""))  # fmt: skip
    for one in details["processes"]:
        peer = "" if one["connection"] is None else f", {one['peer']} (#{one['connection']})"
        used = "" if one["memory"] is None else f", {size(one['memory'])} of memory, {seconds(one['cpu'])} of CPU"
        yield line("process", f"{one['pid']}{peer}, for {age(one['for'])}{used}")
    for text in details["endings"]:
        yield line("ended", text)
    if details["records"]:
        yield "  log"
        for record in details["records"]:
            yield cut(f"    {records.format_text(*to_record(record)[1:])}", columns)


def _logs(options: argparse.Namespace, control: Control) -> int:
    return _follow(options, control, "Logs")


def _events(options: argparse.Namespace, control: Control) -> int:
    return _follow(options, control, "Events")


def _follow(options: argparse.Namespace, control: Control, method: str) -> int:
    for reply in control.stream(method, names=options.names or None, count=options.count, follow=options.follow):
        if reply["lost"]:
            complain(f"{reply['lost']} lines lost: they were not read fast enough")
        if not options.quiet:
            print_records(options, reply["records"])
    return OK


def _connections(options: argparse.Namespace, control: Control) -> int:
    rows = control.call("Connections", names=options.names or None)["connections"]
    if not print_json(options, rows):
        cells = [
            [row["connection"], row["service"], str(row["pid"] or "-"), age(row["for"]), row["peer"]] for row in rows
        ]
        say(options, table(("id", "service", "pid", "age", "peer"), cells, right=("pid", "age")))
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
    print_json(options, results)
    for row in results:
        if not row["ok"]:
            complain(f"cannot {verb} {row['name']}: {row['note']}")
        elif not options.json:
            goes_on = f"; pid {row['pid']} has its sockets and goes on" if verb == "pause" and row["pid"] else ""
            already = "" if row["changed"] else "already "
            say(options, [f"{clean(row['name'])}: {already}{what}, {row['state']}{goes_on}"])
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
        text = clean(f"{age(time.monotonic() - self._began)}  {'; '.join(words)}")
        sys.stderr.write(f"\r{cut(text, (terminal_columns() or 80) - 1)}\x1b[K")
        sys.stderr.flush()

    def __exit__(self, *_: object) -> None:
        self.control.waiting = None
        if self._asked is not None:
            self._asked.close()
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()


def _show_results(options: argparse.Namespace, results: list[Row], cannot: str) -> int:
    print_json(options, results)
    for row in results:
        if not row["ok"]:
            note = row["note"] or f"is {row['state']}"
            complain(f"{cannot} {row['name']}: {note}")
            if row["records"] and not options.json:
                from superd.core import records

                for record in row["records"]:
                    print(f"  {records.format_text(*to_record(record)[1:])}", file=sys.stderr)
            if not options.json and not options.quiet:
                print(f"  `superctl status {clean(row['name'])}` says more", file=sys.stderr)
        elif not options.json:
            pid = f", pid {row['pid']}" if row["pid"] else ""
            took = f" ({row['took']:.2f} s)" if row["changed"] and row["took"] >= 0.1 else ""
            already = "" if row["changed"] else "already "
            say(options, [f"{clean(row['name'])}: {already}{row['state']}{pid}{took}"])
    return OK if all(row["ok"] for row in results) else FAILED


def _kill(options: argparse.Namespace, control: Control) -> int:
    results = control.call("Kill", names=options.names, signal=options.signal)["results"]
    print_json(options, results)
    for row in results:
        if not row["ok"]:
            complain(f"cannot signal {row['name']}: {row['note']}")
        elif not options.json:
            say(options, [f"{clean(row['name'])}: sent {options.signal} to pid {row['pid']}"])
    return OK if all(row["ok"] for row in results) else NOT_RUNNING


def _reload_service(options: argparse.Namespace, control: Control) -> int:
    wait = False if options.no_wait else None
    results = control.call("ReloadService", names=options.names, wait=wait)["results"]
    code = _show_results(options, results, "cannot reload")
    # Not running, unless one of them ran, was told, and did not live through it.
    return NOT_RUNNING if code and all(row["ok"] or not row["changed"] for row in results) else code


def _wait(options: argparse.Namespace, control: Control) -> int:
    results = control.call("Wait", names=options.names, **{"for": options.condition})["results"]
    print_json(options, results)
    for row in results:
        if not row["ok"]:
            note = f": {row['note']}" if row["note"] else ""
            complain(f"{row['name']} will not become {options.condition} by itself: it is {row['state']}{note}")
        elif not options.json:
            say(options, [f"{clean(row['name'])}: {row['state']}"])
    return OK if all(row["ok"] for row in results) else FAILED


def _is(what: str) -> Callable[[argparse.Namespace, Control], int]:
    def run(options: argparse.Namespace, control: Control) -> int:
        reply = control.call("Is", names=options.names, what=what)
        yes = set(reply["yes"])
        names = list(dict.fromkeys(options.names))
        if not print_json(options, [{"name": name, what: name in yes} for name in names]):
            say(options, [f"{clean(name)}: {'' if name in yes else 'not '}{what}" for name in names])
        return NOT_RUNNING if reply["no"] else OK

    return run


def _access(options: argparse.Namespace, control: Control) -> int:
    reply = control.call("Access", name=options.name, address=options.address)
    if not print_json(options, {"name": options.name, "address": options.address, **reply}):
        say(options, [clean(f"{'yes' if reply['allowed'] else 'no'}: {reply['reason']}")])
    return OK if reply["allowed"] else FAILED


def _health(options: argparse.Namespace, control: Control) -> int:
    reply = control.call("Health")
    well = reply["live"] if options.live else reply["ready"]
    if not print_json(options, reply):
        say(options, ["live" if options.live else "ready"] if well else [clean(text) for text in reply["problems"]])
    return OK if well else FAILED


def _reload(options: argparse.Namespace, control: Control) -> int:
    reply = control.call("Reload", dry_run=options.dry_run or None, strict=options.strict or None)
    if not print_json(options, reply):
        _show_plan(options, reply)
    if reply["problems"]:
        return CONFIG
    return OK if options.dry_run or (reply["applied"] and not any(row["why"] for row in reply["entries"])) else FAILED


def _diff(options: argparse.Namespace, control: Control) -> int:
    reply = control.call("Diff")
    if not print_json(options, reply):
        _show_plan(options, reply)
    if reply["problems"]:
        return CONFIG
    return FAILED if reply["entries"] or reply["daemon"] else OK


def _show_plan(options: argparse.Namespace, reply: Row) -> None:
    for text in reply["problems"]:
        print(clean(text), file=sys.stderr)
    for row in reply["entries"]:
        keys = f" ({', '.join(row['keys'])} changed)" if row["keys"] else ""
        say(options, [f"{clean(row['name'])}: {row['action']}{clean(keys)}"])
        if row["why"]:
            complain(f"cannot reload {row['name']}: {row['why']}; what ran before goes on")
    if reply["daemon"]:
        say(options, [f"superd.toml: in place ({', '.join(reply['daemon'])} changed)"])
    if not reply["entries"] and not reply["daemon"]:
        say(options, ["nothing has changed"])


def _metrics(options: argparse.Namespace, control: Control) -> int:
    text = control.call("Metrics")["text"]
    if not print_json(options, {"text": text}):
        say(options, text.splitlines())
    return OK


def _top(options: argparse.Namespace, control: Control) -> int:
    from superd.cli import top

    return top.run(
        control, once=options.json or not is_terminal(), style=top.Style(table, clean, colours()),
        show=lambda rows: print_json(options, rows), quiet=options.quiet,
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
    if not print_json(options, {"services": reply["services"], "stopped": not options.no_wait}):
        say(options, ["superd is stopping" if options.no_wait else "superd has stopped"])
    return OK


def _upgrade(options: argparse.Namespace, control: Control) -> int:
    reply = control.call("Upgrade")
    if not reply["ok"]:
        if not print_json(options, reply):
            complain(f"cannot upgrade superd {reply['was']}: {reply['why']}; it goes on as it is")
        return FAILED
    control.wait_closed()
    anew = Control(options.socket, options.timeout if options.timeout is not None else _TAKE_OVER_S)
    try:
        version = anew.version()
    finally:
        anew.close()
    well = version == reply["version"]
    if not print_json(options, {**reply, "ok": well, "version": version}):
        if well:
            say(options, [f"superd {clean(version)} has taken over from {clean(reply['was'])}"])
        else:
            complain(f"superd is still {version}; `superctl logs` may say why")
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
        formatter_class=lambda prog: argparse.HelpFormatter(prog, width=min((terminal_columns() or 80) - 2, 120)),
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
            print(clean(line) if at else f"superctl: {clean(line)}", file=sys.stderr)
        return failure.code
    except OSError as error:  # of the output: a full disk, most likely
        print(f"superctl: cannot write the result: {error.strerror}", file=sys.stderr)
        return FAILED
    return code


if __name__ == "__main__":
    sys.exit(main())
