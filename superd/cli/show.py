"""`superctl show`: what is in force for a service, and where it was written."""

from __future__ import annotations

import os
import sys

from superd.cli.failure import CONFIG, OK, Failure, running

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable
    from typing import Any


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--origin", action="store_true", help="after each value, the file and line it comes from")
    parser.add_argument("name", metavar="NAME")


def run(options: argparse.Namespace, connect: Callable[[], Any]) -> int:
    found, source = _ask(options, connect)
    if found["problems"]:
        sys.stderr.write(found["problems"])
        raise Failure(CONFIG, f"'{options.name}' is not in force: its configuration has errors")
    if options.quiet:
        return OK
    if options.json:
        import json

        print(
            json.dumps({"name": options.name, "from": source, **{k: found[k] for k in ("file", "config", "origins")}})
        )
    else:
        said = "in force" if source == "superd" else "from the files"
        print(f"# {options.name}, {said}: {found['file']}")
        print(found["toml"], end="")
    return OK


def _ask(options: argparse.Namespace, connect: Callable[[], Any]) -> tuple[dict[str, Any], str]:
    """The answer of superd, or one like it made from the files: with -c, or when no superd can be reached."""
    control, failure = running(options, connect)
    if control is not None:
        try:
            return control.call("Show", name=options.name, origin=options.origin), "superd"
        finally:
            control.close()
    if failure is not None and not options.quiet:
        print(f"superctl: {failure}; showing what the files say", file=sys.stderr)
    return _read(options), "files"


def _read(options: argparse.Namespace) -> dict[str, Any]:
    from superd.cli.files import config_paths, file_of, is_for_root, read_files
    from superd.core import effective
    from superd.core.problems import format_problems
    from superd.system.configdir import RealMachine

    paths = config_paths(options)
    files, problems = read_files(paths)
    path = file_of(options.name, files, problems, paths)
    spec, entries, found = effective.load_one(
        options.name, files, machine=RealMachine(), environ=os.environ, is_root=is_for_root(paths), problems=problems
    )
    if spec is None:
        errors = [problem for problem in found if problem.is_error]
        said = format_problems(errors, "full") or f"{path} has no instance '{options.name}'\n"
        return {"problems": said}
    # Whoever can read the files can read what is in them.
    return {
        "toml": effective.format_entries(entries, origin=options.origin, secrets=True),
        "config": effective.tree_of(entries, secrets=True), "origins": effective.origins_of(entries),
        "file": spec.source, "problems": "",
    }  # fmt: skip
