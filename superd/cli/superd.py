"""superd(8): the command line of the daemon."""

from __future__ import annotations

import argparse
import os
import sys
from typing import NoReturn

from superd import __version__

EX_USAGE = 2


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(EX_USAGE, f"superd: {message}\nTry `superd --help`.\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="superd",
        description="The superserver: starts services when there is traffic for them, and looks after them.",
        epilog="Everything else is superctl's: `superctl check` reads the files without starting anything.",
        allow_abbrev=False,
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
    parser.add_argument("--control", metavar="ADDRESS|off", help="where superctl reaches this superd")
    parser.add_argument("--version", action="version", version=f"superd {__version__}")
    return parser


def main() -> NoReturn:
    """Parse, then become the keeper. Never returns."""
    if not sys.flags.isolated:
        # A trio.py in the current directory, PYTHONPATH or PYTHONSTARTUP must not run as superd (F18).
        os.execv(sys.executable, [sys.executable, "-I", "-m", "superd", *sys.argv[1:]])
    options = _parser().parse_args()
    for path in options.config:
        if not os.path.exists(path):
            _fail(f"cannot read {path}: no such file or directory")
    from superd import keeper

    sys.exit(
        keeper.run(
            keeper.Options(
                config=tuple(os.path.abspath(path) for path in options.config),
                strict=options.strict,
                log=options.log,
                control=options.control,
            )
        )
    )


def _fail(text: str) -> NoReturn:
    sys.stderr.write(f"superd: {text}\n")
    sys.exit(EX_USAGE)
