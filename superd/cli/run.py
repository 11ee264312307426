"""`superd run`: one service without a file, in the foreground, for as long as it is wanted."""

from __future__ import annotations

import argparse
import os
import re
import sys
from typing import TYPE_CHECKING, NoReturn

from superd.cli import new
from superd.cli.failure import USAGE, Failure
from superd.cli.superd import Parser, control_address
from superd.core import schema
from superd.core.problems import Problem, printable
from superd.core.schema import SourceFile
from superd.system import configdir

if TYPE_CHECKING:
    from superd.core.spec import ServiceSpec

NOT_EXECUTABLE, NOT_FOUND = 126, 127
_OF_PROGRAM = {"missing-program": NOT_FOUND, "not-executable": NOT_EXECUTABLE, "not-trusted": NOT_EXECUTABLE}
_PATHS = ("path", "paths", "directory")
_SCHEMES_WITH_PATH = ("unix", "unix-dgram", "unix-seqpacket", "fifo")
_NO_FILE = "(superd run)"
_PROGRAM_LESS = ("handler", "builtin")


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="superd run",
        usage="superd run ADDRESS... [--KEY VALUE]... [options] -- PROGRAM [ARG...]",
        description="One service without a file: listens at ADDRESS and starts PROGRAM when there is traffic.",
        epilog="Every key of superd.toml(5) is an option: --run on-demand --max-connections 4 --rlimit.nofile 64.",
    )
    parser.add_argument("listen", nargs="*", metavar="ADDRESS", help="tcp:7007, tcp:127.0.0.1:0, udp:69, unix:./sock")
    new.add_keys(parser)
    parser.add_argument("--once", action="store_true", help="serve one connection, then exit with its status")
    parser.add_argument("--print-address", action="store_true", help="write each bound address to stdout")
    parser.add_argument("--trace", action="store_true", help="show the bytes of each connection, in both directions")
    parser.add_argument("--save", metavar="NAME", help="write conf.d/NAME.toml as well, as `superctl new` does")
    parser.add_argument("--log", choices=("text", "logfmt", "json"), help="form of the log on stderr (default: text)")
    parser.add_argument(
        "--control", type=control_address, metavar="ADDRESS", default="off",
        help="where superctl reaches it (default: off)",
    )  # fmt: skip
    return parser


def main(arguments: list[str], resumed: str | None = None) -> NoReturn:
    """arguments: what stands after `run`; resumed: the fd of what a keeper of another version has left. Becomes the
    keeper; never returns."""
    try:
        sys.exit(_run(arguments, resumed))
    except Failure as failure:
        sys.stderr.write(f"superd: {failure}\n")
        sys.exit(failure.code)


def _run(arguments: list[str], resumed: str | None) -> int:
    program: list[str] = []
    if "--" in arguments:
        # Not left to argparse, which takes options of the program for its own.
        at = arguments.index("--")
        arguments, program = arguments[:at], arguments[at + 1 :]
    options = _parse(arguments)
    options.program = program
    if not program and not any(getattr(options, f"service.{name}") for name in _PROGRAM_LESS):
        raise Failure(USAGE, "the program stands after --: superd run tcp:127.0.0.1:7007 -- /bin/cat")
    if not options.listen and getattr(options, "service.run") is None:
        raise Failure(USAGE, "there is no address: superd run tcp:127.0.0.1:7007 -- /bin/cat")
    options.name = _name(options)
    try:
        directory = os.getcwd()
    except OSError:  # it has been removed
        directory = "/"
    _make_absolute(options, directory)
    text = new.file_text(options)
    source = SourceFile(os.path.join(directory, _NO_FILE), text.encode(), "service", options.name)
    spec = _check(source)
    if options.trace and not (spec.takes_connections and spec.pass_ == "stdio" and spec.builtin is None):
        raise Failure(
            USAGE,
            "--trace shows the bytes of per-connection services with the connection on stdin and stdout; of this one "
            "superd sees none",
        )
    if options.save is not None:
        paths = configdir.default_config_paths(os.environ, os.geteuid())
        path, _ = new.save(options.save, text, paths)
        sys.stderr.write(f"wrote {path}\n")
        sys.stderr.flush()
    from superd import keeper

    settled = keeper.Options(
        strict=True, log=options.log, control=options.control, watch=False,
        trial=keeper.Trial(source, options.once, options.print_address, options.trace),
    )  # fmt: skip
    return keeper.run(settled) if resumed is None else keeper.resume(int(resumed), settled)


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = _parser()
    options, rest = parser.parse_known_intermixed_args(arguments)
    for word in rest:
        if word.startswith("-"):
            parser.error(_unknown(word))
    if rest:
        parser.error(f"{rest[0]!r} is left over: the program and its arguments stand after --")
    return options


def _unknown(option: str) -> str:
    from difflib import get_close_matches

    known = [flag for flags, _ in new.key_options() for flag in flags if "_" not in flag]
    known += ["--once", "--print-address", "--trace", "--save", "--log", "--control"]
    word = option.partition("=")[0]
    similar = get_close_matches(word, known, 1)
    return f"there is no option {word}" + (f"; did you mean {similar[0]}?" if similar else "")


def _name(options: argparse.Namespace) -> str:
    """Of the service, in the log: that of the program."""
    if options.save is not None:
        return str(options.save)
    word = options.program[0] if options.program else next(
        texts[0] for name in _PROGRAM_LESS if (texts := getattr(options, f"service.{name}"))
    )  # fmt: skip
    base = re.sub(r"[^a-z0-9_.-]", "-", os.path.basename(word).partition(":")[0].lower())
    return re.sub(r"^[^a-z0-9]+", "", base)[:63] or "service"


def _make_absolute(options: argparse.Namespace, directory: str) -> None:
    """Paths count from the working directory, and mean the same in a file that stands elsewhere."""
    if options.program and "/" in options.program[0] and "${" not in options.program[0]:
        options.program[0] = os.path.abspath(options.program[0])
    for index, address in enumerate(options.listen):
        scheme, colon, path = address.partition(":")
        if colon and scheme in _SCHEMES_WITH_PATH and path and not path.startswith(("/", "@", "${")):
            options.listen[index] = f"{scheme}:{os.path.join(directory, path)}"
    for _, key in new.key_options():
        name = f"{key.table}.{key.name}"
        texts = getattr(options, name)
        if texts is not None and key.kind in _PATHS:
            words = [word for text in texts for word in (text.split(",") if key.kind == "paths" else [text])]
            setattr(options, name, [os.path.normpath(os.path.join(directory, w)) if w else w for w in words])
        elif texts is not None and key.kind == "output":
            files = (text.removeprefix("file:") for text in texts)
            setattr(options, name, [
                f"file:{os.path.join(directory, file)}" if file != text else text
                for file, text in zip(files, texts, strict=True)
            ])  # fmt: skip


# -- what is wrong


def _check(source: SourceFile) -> ServiceSpec:
    """The service, or a Failure after a line for each thing that is wrong with it."""
    snapshot, problems = schema.load(
        [source], machine=configdir.RealMachine(), environ=os.environ, is_root=os.geteuid() == 0
    )
    where = _places(source.data.decode(errors="replace"))
    errors = [problem for problem in problems if problem.is_error]
    said = [(problem, where.get(problem.line, "")) for problem in problems]
    lines = [_describe(problem, place) for problem, place in said]
    if not errors:
        sys.stderr.write("".join(f"superd: warning: {line}\n" for line in lines))
        return snapshot.services[source.name]
    *first, last = [line for (problem, _), line in zip(said, lines, strict=True) if problem.is_error]
    sys.stderr.write("".join(f"superd: {line}\n" for line in first))
    of_program = [_OF_PROGRAM.get(problem.code, 0) for problem, place in said if place == "PROGRAM"]
    status = of_program[0] if len(errors) == 1 and of_program else USAGE
    raise Failure(status or USAGE, last)


def _places(text: str) -> dict[int, str]:
    """Line of the text -> the option that it comes from."""
    names: dict[tuple[str, str], str] = {(key.table, key.name): flags[0] for flags, key in new.key_options()}
    names |= {("service", "listen"): "ADDRESS", ("socket", "listen"): "ADDRESS", ("service", "command"): "PROGRAM"}
    table = "service"
    found = {}
    for number, line in enumerate(text.splitlines(), 1):
        if match := re.fullmatch(r"\[+(\w+)\]+", line):
            table = match[1]
        elif match := re.match(r"([\w-]+) = ", line):
            found[number] = "--environment" if table == "environment" else names.get((table, match[1]), "")
    return found


def _describe(problem: Problem, place: str) -> str:
    text = f"{problem.message}: {problem.label}" if problem.label else problem.message
    return printable(f"{place}: {text}" if place else text)
