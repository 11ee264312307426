"""`superctl check`: is the configuration right? No daemon, no root, no effect."""

from __future__ import annotations

import argparse
import os
import sys

from superd.cli.files import is_for_root
from superd.core.problems import format_problems
from superd.system.configdir import default_config_paths, load_config

USAGE, CONFIG = 2, 78  # exit codes, CLI.md


def main(argv: list[str]) -> int:
    """The exit status: 0 without errors (warnings are shown), 78 with, 2 for wrong usage."""
    parser = argparse.ArgumentParser(
        prog="superctl check",
        description="Check configuration files without a daemon, without root, without any effect.",
        epilog="json is one object a line. Whether superd will be root is told by the owner of PATH.",
    )
    parser.add_argument("path", nargs="*", metavar="PATH", help="as for superd -c; default: what superd reads")
    parser.add_argument("--format", choices=("full", "short", "json", "github"), default="full")
    parser.add_argument("-q", "--quiet", action="store_true", help="nothing but the exit status")
    try:
        options = parser.parse_args(argv)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else USAGE
    paths = options.path or default_config_paths(os.environ, os.geteuid())
    snapshot, problems = load_config(paths, environ=os.environ, is_root=is_for_root(paths))
    errors = sum(problem.is_error for problem in problems)
    if options.quiet:
        return CONFIG if errors else 0
    sys.stdout.write(format_problems(problems, options.format))
    if errors:
        if options.format == "full":
            files = len({problem.path for problem in problems if problem.is_error})
            print(f"{_count(errors, 'error')} in {_count(files, 'file')}")
        return CONFIG
    if options.format in ("full", "short"):
        sockets = sum(len(service.sockets) for service in snapshot.services.values())
        print(f"ok: {_count(len(snapshot.services), 'service')}, {_count(sockets, 'socket')}")
    return 0


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
