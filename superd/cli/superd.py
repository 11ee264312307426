"""superd(8): the command line of the daemon."""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING, NoReturn

from superd import __version__

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

EX_USAGE = 2


class Parser(argparse.ArgumentParser):
    """What `superd` and `superd run` have in common."""

    def __init__(self, **options: Any) -> None:
        # With a width it does not import shutil, only to find one; the keeper would have that, and three compression
        # libraries, for good, and so would all that it forks.
        def formatter(prog: str) -> argparse.HelpFormatter:
            return argparse.HelpFormatter(prog, width=_columns() - 2)

        super().__init__(allow_abbrev=False, formatter_class=formatter, **options)

    def error(self, message: str) -> NoReturn:
        self.exit(EX_USAGE, f"superd: {message}\nTry `{self.prog} --help`.\n")


def _columns() -> int:
    """As shutil.get_terminal_size() tells."""
    told = os.environ.get("COLUMNS", "")
    if told.isdecimal() and int(told):
        return int(told)
    try:
        return os.get_terminal_size(1).columns or 80
    except OSError:
        return 80


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="superd",
        usage="superd [-c DIR|FILE]... [options] [-- COMMAND...]\n"
        "       superd run ADDRESS... [--KEY VALUE]... [options] -- PROGRAM [ARG...]",
        description="The superserver: starts services when there is traffic for them, and looks after them.",
        epilog="Everything else is superctl's: `superctl check` reads the files without starting anything.",
    )
    parser.add_argument(
        "-c", dest="config", action="append", default=[], metavar="DIR|FILE",
        help="a directory with conf.d inside, a conf.d itself, or a .toml file; may be given more than once "
        "(default: /etc/superd, for an ordinary user ~/.config/superd, or $SUPERD_CONFIG)",
    )  # fmt: skip
    parser.add_argument(
        "--strict", action="store_true", help="do not start when a file is wrong or an address is taken"
    )
    parser.add_argument("--log", choices=("text", "logfmt", "json"), help="form of the log on stderr (default: text)")
    parser.add_argument(
        "--control", type=control_address, metavar="ADDRESS|off", help="where superctl reaches this superd"
    )
    parser.add_argument(
        "--drain-timeout", type=_value("parse_duration"), metavar="TIME",
        help="how long live connections may go on when superd stops (default: 10s after the end of COMMAND, else 0s)",
    )  # fmt: skip
    parser.add_argument("--single-child", action="store_true", help="signals go to COMMAND alone, not to its group")
    parser.add_argument(
        "--rewrite", action="append", default=[], type=_rewrite, metavar="S:R",
        help="pass signal S on as R; R = 0 drops it; may be given more than once",
    )  # fmt: skip
    parser.add_argument("--no-watch", action="store_true", help="do not follow changes of the files")
    parser.add_argument("--version", action="version", version=f"superd {__version__}")
    return parser


def _value(parser: str) -> Callable[[str], float]:
    """A parser of core.values, loaded when it is needed: a plain init starts in half the time without."""

    def parse(text: str) -> float:
        from superd.core import values

        try:
            return float(getattr(values, parser)(text))
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return parse


def control_address(text: str) -> str:
    """Of argparse. The manager says what else is wrong with a path, and goes on without."""
    if text != "off" and not text.startswith(("unix:", "/", "@")):
        raise argparse.ArgumentTypeError(f"{text!r} is neither unix:/PATH nor off; there is no control by network")
    return text


def _rewrite(text: str) -> tuple[int, int]:
    """(signal, the one sent instead) of "TERM:QUIT" or "15:3"; 0 is none."""
    from superd import init

    got, colon, sent = text.partition(":")
    if not colon:
        raise argparse.ArgumentTypeError(f"{text!r} has no colon: write SIGNAL:SIGNAL, as in TERM:QUIT")
    before, after = _signal(got), 0 if sent == "0" else _signal(sent)
    if before in (9, 19):
        raise argparse.ArgumentTypeError(f"superd never gets {got}: no process can catch it")
    if before in init.FAULTS:
        raise argparse.ArgumentTypeError(f"{got} is a fault of superd's own, and is not passed on")
    return before, after


def _signal(text: str) -> int:
    if text.isdecimal() and 0 < int(text) < 65 and int(text) not in (32, 33):
        return int(text)
    return int(_value("parse_signal")(text))


def main() -> NoReturn:
    """Parse, then become the keeper, or a plain init. Never returns."""
    if not sys.flags.isolated:
        from superd.system import process

        # A trio.py in the current directory, PYTHONPATH or PYTHONSTARTUP must not run as superd (F18).
        command_line = [sys.executable, "-I", "-m", "superd", *sys.argv[1:]]
        os.execve(sys.executable, command_line, process.environment_as_found())
    arguments = sys.argv[1:]
    resumed: str | None = None
    if arguments[:1] == ["--check-upgrade"]:
        from superd import keeper

        sys.exit(keeper.try_out(*arguments[1:2]))
    if arguments[:1] == ["--resume-fd"]:
        resumed, arguments = arguments[1], arguments[2:]
    if arguments[:1] == ["run"]:
        from superd.cli import run

        run.main(arguments[1:], resumed)
    command: list[str] = []
    if "--" in arguments:
        # Not left to argparse, which takes options of the command for its own.
        command = arguments[arguments.index("--") + 1 :]
        arguments = arguments[: arguments.index("--")]
        if not command:
            _fail("cannot run the main command: nothing stands after --")
    options = _parser().parse_args(arguments)
    if not command and (options.single_child or options.rewrite):
        _fail("--single-child and --rewrite are about a main command: give one after --")
    for path in options.config if resumed is None else ():
        if not os.path.exists(path):
            _fail(f"cannot read {path}: no such file or directory")
    if command and not options.config and resumed is None:
        if options.strict or options.control:
            _fail("--strict and --control are about services: without -c there are none beside the main command")
        from superd import init

        main_command = init.Command(command, single=options.single_child, rewrite=dict(options.rewrite))
        if options.log:
            from superd import keeper

            main_command.complain = lambda text: keeper.complain(text, options.log)
        sys.exit(init.run(main_command, init.DRAIN_S if options.drain_timeout is None else options.drain_timeout))
    from superd import keeper

    settled = keeper.Options(
        config=tuple(os.path.abspath(path) for path in options.config),
        strict=options.strict,
        log=options.log,
        control=options.control,
        command=tuple(command),
        single_child=options.single_child,
        rewrite=dict(options.rewrite),
        drain_timeout_s=options.drain_timeout,
        watch=not options.no_watch,
    )
    sys.exit(keeper.run(settled) if resumed is None else keeper.resume(int(resumed), settled))


def _fail(text: str) -> NoReturn:
    sys.stderr.write(f"superd: {text}\n")
    sys.exit(EX_USAGE)
