"""The configuration files that a command of superctl is about."""

from __future__ import annotations

import os
import sys

from superd.cli.failure import CONFIG, FAILED, NO_SUCH_SERVICE, NOT_PERMITTED, Failure
from superd.core.problems import Problem, format_problems
from superd.core.schema import SourceFile
from superd.system import configdir

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse


def config_paths(options: argparse.Namespace) -> list[str]:
    """What -c says, or else what superd would read."""
    return [options.config] if options.config else configdir.default_config_paths(os.environ, os.geteuid())


def is_for_root(paths: list[str]) -> bool:
    """Whether the superd that will read these is root: files of root are written for root's."""
    if os.geteuid() == 0:
        return True
    try:
        return all(os.stat(path).st_uid == 0 for path in paths)
    except (OSError, ValueError):
        return False


def read_files(paths: list[str]) -> tuple[list[SourceFile], list[Problem]]:
    return configdir.read(paths, is_root=is_for_root(paths))


def file_of(name: str, files: list[SourceFile], problems: list[Problem], paths: list[str]) -> str:
    """The file of a service, the template's for an instance. Raises Failure if there is none."""
    stem = name.partition("@")[0] + "@" if "@" in name else name
    for source in files:
        if source.role == "service" and source.name == stem:
            return source.path
    for problem in problems:
        if problem.is_error and problem.service in (None, stem):
            raise Failure(CONFIG, problem.message)
    from difflib import get_close_matches

    similar = get_close_matches(name, [source.name for source in files if source.role == "service"], 1)
    hint = f"; did you mean '{similar[0]}'?" if similar else ""
    raise Failure(NO_SUCH_SERVICE, f"there is no service '{name}' in {', '.join(paths)}{hint}")


def complain(problems: list[Problem]) -> int:
    """Print what is wrong, in caret form; the exit status."""
    sys.stderr.write(format_problems(problems, "full"))
    return CONFIG


def write_file(directory: str, name: str, data: bytes, *, replace: bool) -> None:
    """put_file(), and its failure as one of superctl."""
    from superd.system.newfile import put_file

    path = os.path.join(directory, name)
    above = os.path.realpath(os.path.dirname(os.path.abspath(directory)))
    if os.geteuid() == 0 and (why := configdir.Trust(frozenset({0})).directory(above)):
        raise Failure(NOT_PERMITTED, f"will not write {path}: {why}, so superd would not read it")
    try:
        put_file(os.path.join(above, os.path.basename(os.path.abspath(directory))), name, data, replace=replace)
    except FileExistsError:
        raise Failure(FAILED, f"cannot write {path}: it is there already") from None
    except OSError as error:
        code = NOT_PERMITTED if isinstance(error, PermissionError) else FAILED
        reason = "it is a symbolic link" if os.path.islink(directory) else (error.strerror or str(error)).lower()
        raise Failure(code, f"cannot write {path}: {reason}") from None
