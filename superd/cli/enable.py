"""`superctl enable` and `disable`: a drop-in that says whether a service is run.

The file of the service stays as somebody wrote it; conf.d/NAME.toml.d/50-enabled.toml is there to be read and removed.
"""

from __future__ import annotations

import os

from superd.cli.failure import CONFIG, FAILED, OK, Failure, running
from superd.cli.files import complain, config_paths, file_of, is_for_root, read_files, write_file
from superd.core import schema
from superd.core.document import Path
from superd.core.effective import place_of
from superd.core.problems import Problem
from superd.core.schema import SourceFile
from superd.system.configdir import RealMachine

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable
    from typing import Any

DROP_IN = "50-enabled.toml"
_KEY: Path = ("enabled",)


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("names", nargs="+", metavar="NAME")


def run(options: argparse.Namespace, connect: Callable[[], Any]) -> int:
    wanted = options.command == "enable"
    found = [(name, *_where(name, options, connect)) for name in dict.fromkeys(options.names)]
    rows = []
    for name, path, paths in found:
        written = _switch(name, path, paths, wanted)
        rows.append({"name": name, "enabled": wanted, "changed": written is not None, "file": written})
        if not options.quiet and not options.json:
            print(f"{name}: {options.command}d, wrote {written}" if written else f"{name}: already {options.command}d")
    if options.json and not options.quiet:
        import json

        print(json.dumps(rows, indent=2))
    return OK


def _where(name: str, options: argparse.Namespace, connect: Callable[[], Any]) -> tuple[str, list[str]]:
    """The file of a service, and the configuration that it belongs to: those of the superd that runs, if one does."""
    if "@" in name and not name.endswith("@"):
        template = name.partition("@")[0] + "@"
        raise Failure(
            FAILED, f"'{name}' is an instance: `instances` of the template says which there are, or {template}"
        )
    rows: list[dict[str, Any]] = []
    control, _ = running(options, connect)
    if control is not None:
        try:
            rows = control.call("Status")["services"]
        finally:
            control.close()
    for row in rows:
        if row["service"]["name"] == name and row["file"]:
            return row["file"], [_root_of(row["file"])]
    # New, a template, or its file is wrong: it stands beside the others, if there are any.
    paths = sorted({_root_of(row["file"]) for row in rows if row["file"]}) or config_paths(options)
    return file_of(name, *read_files(paths), paths), paths


def _root_of(file: str) -> str:
    """The configuration that a service's file is part of."""
    directory = os.path.dirname(file)
    return os.path.dirname(directory) if os.path.basename(directory) == "conf.d" else directory


def _switch(name: str, path: str, paths: list[str], wanted: bool) -> str | None:
    """The file that was written; None: it was so already."""
    files, problems = read_files(paths)
    if not any(source.path == path for source in files):  # it stands in a directory that conf_dirs names
        more, others = read_files([path])
        files, problems = files + more, problems + others
    is_now, _, _ = _state(name, files, problems, paths)
    if is_now == wanted:
        return None
    drop_in = f"{path}.d/{DROP_IN}"
    data = f"# Written by `superctl {'enable' if wanted else 'disable'} {name}`.\nenabled = {str(wanted).lower()}\n"
    mine = [source for source in files if source.role == "drop-in" and source.name == name and source.path != drop_in]
    mine.append(SourceFile(drop_in, data.encode(), "drop-in", name))
    rest = [source for source in files if source not in mine and source.path != drop_in]
    after, place, errors = _state(name, [*rest, *sorted(mine, key=lambda source: source.path)], problems, paths)
    if wanted and errors:
        complain(errors)
        raise Failure(CONFIG, f"cannot enable {name}: its configuration has errors; nothing was written")
    if after is not None and after != wanted:
        raise Failure(FAILED, f"{place} has the last word, and says otherwise; nothing was written")
    write_file(f"{path}.d", DROP_IN, data.encode(), replace=True)
    return drop_in


def _state(
    name: str, files: list[SourceFile], problems: list[Problem], paths: list[str]
) -> tuple[bool | None, str, list[Problem]]:
    """Whether it is enabled, None if that cannot be told; where that is said; what is wrong with the service."""
    machine, is_root = RealMachine(), is_for_root(paths)
    _, found = schema.load(files, machine=machine, environ=os.environ, is_root=is_root, problems=problems)
    own = [source for source in files if source.name == name or source.role == "daemon"]
    mine = {source.path for source in own if source.role != "daemon"}
    errors = [problem for problem in found if problem.is_error and (problem.service == name or problem.path in mine)]
    for _, reader, _, _ in schema.read_each(own, machine=machine, environ=os.environ, is_root=is_root):
        if reader is not None:
            said = reader.merged.tree.get("enabled", True)
            return (said if isinstance(said, bool) else None), place_of(reader, _KEY), errors
    return None, "", errors
