"""`superctl import` and `superctl export`: to service files, and back to systemd. No daemon, no effect but files."""

from __future__ import annotations

import argparse
import glob
import os
import sys
from collections.abc import Mapping

from superd.cli.files import is_for_root, read_files
from superd.core.document import MAX_BYTES
from superd.core.problems import format_problems, printable
from superd.core.schema import SourceFile, load
from superd.core.toml import format_comment
from superd.importers import FORMATS, Imported, import_files
from superd.importers.export import export
from superd.system.configdir import RealMachine, default_config_paths

OK, FAILED, USAGE, NO_SUCH_SERVICE, CONFIG = 0, 1, 2, 4, 78  # exit codes, CLI.md


def _complain(text: str) -> None:
    print(printable(text), file=sys.stderr)


class RealFiles:
    """importers.Files by this machine's files."""

    def read(self, path: str) -> str:
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise OSError(0, f"it has more than {MAX_BYTES} bytes")
        return data.decode(errors="replace")

    def glob(self, pattern: str) -> list[str]:
        return sorted(path for path in glob.glob(pattern) if os.path.isfile(path))


def _arguments(argv: list[str], parser: argparse.ArgumentParser) -> argparse.Namespace | int:
    try:
        return parser.parse_args(argv)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else USAGE


def import_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="superctl import",
        description="Translate files of inetd, xinetd, systemd, supervisord and upstart into service files.",
        epilog="What is not carried over is said on stderr with file and line, and is a comment in the result.",
        allow_abbrev=False,
    )
    parser.add_argument("file", nargs="+", metavar="FILE", help="for systemd .socket and .service together")
    parser.add_argument(
        "-o", "--output", metavar="DIR", help="write DIR/NAME.toml for each service; nothing is overwritten"
    )
    parser.add_argument("--strict", action="store_true", help="exit status 1 if anything is not carried over")
    parser.add_argument("--format", choices=FORMATS, metavar="FORMAT", help=f"instead of a guess: {', '.join(FORMATS)}")
    return parser


def main_import(argv: list[str]) -> int:
    """The exit status: 0 done, 1 if a file could not be read or written, or by --strict, 2 for wrong usage."""
    options = _arguments(argv, import_parser())
    if isinstance(options, int):
        return options
    files, sources, failed = RealFiles(), [], False
    for path in options.file:
        try:
            if os.path.isdir(path):
                sources += [(each, files.read(each)) for each in _directory(path)]
            else:
                sources.append((path, files.read(path)))
        except OSError as error:
            _complain(f"superctl: cannot read {path}: {(error.strerror or str(error)).lower()}")
            failed = True
    services, notes, wrong = import_files(sources, files, RealMachine(), options.format)
    for line in (*wrong, *notes):
        _complain(str(line))
    failed |= bool(wrong) or (options.strict and any(note.level != "note" for note in notes))
    if not services and sources and not wrong:
        _complain(f"superctl: there is no service in {', '.join(options.file)}")
        failed = True
    texts = {f"{service.name}.toml": service.text for service in services}
    if options.output is None:
        told = {note for service in services for note in service.notes}
        homeless = [note for note in notes if note not in told and note.level != "note"]
        sys.stdout.write("".join(f"{format_comment(f'{note.place}: {note.text}')}\n" for note in homeless))
        _print(texts)
    elif not _write(texts, options.output):
        return FAILED
    _check(services, options.output)
    return FAILED if failed else OK


def _directory(path: str) -> list[str]:
    """The files of an xinetd.d or of a directory of units; as xinetd passes them over, what is hidden or a backup."""
    found = sorted(
        os.path.join(path, name) for name in os.listdir(path) if not name.startswith(".") and name[-1] != "~"
    )
    return [each for each in found if os.path.isfile(each)]


def _print(texts: Mapping[str, str]) -> None:
    for number, (name, text) in enumerate(texts.items()):
        if len(texts) > 1:
            print(f"{chr(10) if number else ''}# --- {name}")
        print(text, end="")


def _write(texts: Mapping[str, str], directory: str) -> bool:
    """Every file, whole or not at all; none if one of them is there already."""
    try:
        os.makedirs(directory, exist_ok=True)
    except OSError as error:
        _complain(f"superctl: cannot make {directory}: {(error.strerror or str(error)).lower()}")
        return False
    paths = {os.path.join(directory, name): text for name, text in texts.items()}
    if there := [path for path in paths if os.path.lexists(path)]:
        _complain(f"superctl: nothing was written, because these files are there already: {', '.join(there)}")
        return False
    for path, text in paths.items():
        fresh = os.path.join(directory, f".{os.path.basename(path)}.{os.getpid()}")
        try:
            with open(fresh, "x", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.link(fresh, path)  # unlike rename(2) it does not replace what has come meanwhile
        except OSError as error:
            _complain(f"superctl: cannot write {path}: {(error.strerror or str(error)).lower()}")
            return False
        finally:
            if os.path.lexists(fresh):
                os.unlink(fresh)
        _complain(f"wrote {path}")
    return True


def _check(services: list[Imported], directory: str | None) -> None:
    """What `superctl check` will say on this machine: programs and users that it does not have."""
    where = directory or "."
    files = [
        SourceFile(os.path.join(where, f"{one.name}.toml"), one.text.encode(), "service", one.name) for one in services
    ]
    _, problems = load(files, machine=RealMachine(), environ=os.environ, is_root=True)
    if problems:
        _complain("`superctl check` will say on this machine:")
        sys.stderr.write(format_problems(problems, "short"))


def export_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="superctl export",
        description="Write a service as units of systemd.",
        epilog="What systemd has no word for is said on stderr.",
        allow_abbrev=False,
    )
    parser.add_argument("format", choices=("systemd",))
    parser.add_argument("name", metavar="NAME", help="the service")
    parser.add_argument(
        "-c", "--config", metavar="DIR", action="append", help="as for superd; default: what superd reads"
    )
    parser.add_argument("-o", "--output", metavar="DIR", help="write the units to DIR; nothing is overwritten")
    parser.add_argument("--strict", action="store_true", help="exit status 1 if anything is not carried over")
    return parser


def main_export(argv: list[str]) -> int:
    options = _arguments(argv, export_parser())
    if isinstance(options, int):
        return options
    paths = options.config or default_config_paths(os.environ, os.geteuid())
    files, unread = read_files(paths)
    for is_root in (is_for_root(paths), True):
        snapshot, problems = load(files, machine=RealMachine(), environ=os.environ, is_root=is_root, problems=unread)
        problems = [problem for problem in problems if problem.service == options.name]
        if not any(problem.code == "not-permitted" for problem in problems):
            break  # what only this superd may not do, systemd may
    spec = snapshot.services.get(options.name)
    if spec is None:
        if options.name in snapshot.broken:
            sys.stderr.write(format_problems(problems, "short"))
            return CONFIG
        _complain(f"superctl: there is no service '{options.name}' in {', '.join(paths)}")
        return NO_SUCH_SERVICE
    units, lost = export(spec)
    if not units:
        _complain(f"superctl: cannot export '{spec.name}': {lost[0]}")
        return FAILED
    for line in lost:
        _complain(f"{spec.source}: warning: not carried over: {line}")
    if options.output is None:
        _print(units)
    elif not _write(units, options.output):
        return FAILED
    return FAILED if lost and options.strict else OK
