"""`superctl new`: a file for a service, checked before it is written."""

from __future__ import annotations

import os
import re

from superd.cli.failure import CONFIG, FAILED, OK, USAGE, Failure
from superd.cli.files import complain, config_paths, is_for_root, read_files, write_file
from superd.core.keys import BY_TABLE, Key
from superd.core.toml import format_key, format_value

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable
    from typing import Any

    from superd.core.spec import ServiceSpec

# A key that stands in several tables is that of the first one; TABLE.KEY names any.
_TABLES = (
    "service", "limits", "socket", "scheduling", "sandbox", "health", "access", "cgroup", "proxy", "tls",
    "rlimit",
)  # fmt: skip
_TAKEN = ("listen", "command", "socket", "config", "json", "timeout", "quiet", "help")  # options of their own
_OFFERED = (
    ("service", "description"),
    ("service", "user"),
    ("limits", "max_connections"),
    ("limits", "max_per_source"),
)


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME")
    parser.add_argument("--listen", action="append", default=[], metavar="ADDRESS", help="may be given more than once")
    add_keys(parser)
    parser.epilog = "Every key of superd.toml(5) is an option; the program and its arguments stand after two dashes."


def add_keys(parser: argparse.ArgumentParser) -> None:
    """Every key of a file is an option too; the manual has them, and in the help they would be the whole screen."""
    import argparse

    for flags, key in key_options():
        parser.add_argument(*flags, action="append", dest=f"{key.table}.{key.name}", help=argparse.SUPPRESS)


def key_options() -> list[tuple[list[str], Key]]:
    found = []
    seen = set(_TAKEN)
    for table in _TABLES:
        for name, key in BY_TABLE[table].items():
            if key.kind in ("table", "tables", "tls", "names"):
                continue
            if (table, name) in (("service", "listen"), ("service", "command"), ("socket", "listen")):
                continue
            names = [] if name in seen else [name]
            if table != "service":
                names.append(f"{table}.{name}")
            seen.add(name)
            flags = [f"--{flag}" for text in names for flag in dict.fromkeys((text.replace("_", "-"), text))]
            found.append((flags, key))
    return found


def run(options: argparse.Namespace, connect: Callable[[], Any]) -> int:
    if not options.program and not any(getattr(options, f"service.{name}") for name in ("handler", "builtin")):
        raise Failure(USAGE, "the program stands after --: superctl new NAME --listen tcp:7007 -- /bin/cat")
    path, spec = save(options.name, file_text(options), config_paths(options))
    if options.json and not options.quiet:
        import json

        print(json.dumps({"name": options.name, "file": path}))
    elif not options.quiet:
        print(f"wrote {path}")
        print(f"Try it by itself:  superd -c {path}")
        for socket in spec.sockets[:1] if spec else ():
            if client := _client(str(socket.address), socket.address.port):
                print(f"As a client:       {client}")
    return OK


def save(name: str, text: str, paths: list[str]) -> tuple[str, ServiceSpec | None]:
    """Write conf.d/NAME.toml below the first of `paths`, if it is right together with what is there; path and spec."""
    from superd.core import schema
    from superd.core.kinds import NAME
    from superd.core.schema import SourceFile
    from superd.system.configdir import RealMachine

    if not NAME.fullmatch(name.removesuffix("@")):
        raise Failure(USAGE, f"'{name}' is not a name of a service: a-z 0-9 _ . -, at most 63 characters")
    directory = _conf_d(paths[0])
    path = os.path.join(directory, f"{name}.toml")
    if os.path.lexists(path):
        raise Failure(FAILED, f"cannot write {path}: it is there already")
    files, problems = read_files(paths) if os.path.isdir(paths[0]) else ([], [])
    snapshot, found = schema.load(
        [*files, SourceFile(path, text.encode(), "service", name)],
        machine=RealMachine(), environ=os.environ, is_root=is_for_root(paths), problems=problems,
    )  # fmt: skip
    if errors := [problem for problem in found if problem.is_error and problem.path == path]:
        complain(errors)
        raise Failure(CONFIG, f"{path} would have errors; nothing was written")
    try:
        os.makedirs(os.path.dirname(directory), mode=0o755, exist_ok=True)
    except OSError as error:
        raise Failure(FAILED, f"cannot write {path}: {(error.strerror or str(error)).lower()}") from None
    write_file(directory, f"{name}.toml", text.encode(), replace=False)
    return path, snapshot.services.get(name)


def _conf_d(path: str) -> str:
    """Where service files stand in what -c names."""
    if path.endswith(".toml"):
        raise Failure(USAGE, f"{path} is a file: -c names the directory that the new one is to stand in")
    inner = os.path.join(path, "conf.d")
    if os.path.basename(os.path.abspath(path)) == "conf.d" and not os.path.isdir(inner):
        return path
    if os.path.isdir(path) and not os.path.lexists(inner) and not os.path.lexists(os.path.join(path, "superd.toml")):
        if any(name.endswith(".toml") for name in os.listdir(path)):
            return path
    return inner


def _client(address: str, port: int | None) -> str | None:
    scheme, _, rest = address.partition(":")
    if port == 0:
        return "superctl list tells the port that the kernel chose"
    if scheme.startswith(("tcp", "udp")):
        host, _, _ = rest.rpartition(":")
        flag = "-u " if scheme.startswith("udp") else ""
        return f"nc {flag}{host.strip('[]') or ('::1' if scheme.endswith('6') else '127.0.0.1')} {port}"
    return f"nc -U {rest}" if scheme == "unix" and not rest.startswith("@") else None


# -- the text


def file_text(options: argparse.Namespace) -> str:
    given: dict[tuple[str, str], Any] = {
        (key.table, key.name): _value(key, texts)
        for _, key in key_options()
        if (texts := getattr(options, f"{key.table}.{key.name}")) is not None
    }
    tables: dict[str, list[str]] = {}
    for (table, name), value in given.items():
        if table not in ("service", "socket", "tls"):
            tables.setdefault(table, []).append(_line(name, value))
    top = [_line(name, value) for (table, name), value in given.items() if table == "service" and name != "environment"]
    sockets = [_line(name, value) for (table, name), value in given.items() if table == "socket"]
    if tls := {name: value for (table, name), value in given.items() if table == "tls"}:
        sockets.append(_line("tls", tls))
    lines = [f"#:schema {_schema()}", *_comment(options), ""]
    lines += _offer("service", given)
    if options.listen and not sockets:
        lines.append(_line("listen", options.listen[0] if len(options.listen) == 1 else options.listen))
    lines += [*([_line("command", options.program)] if options.program else []), *top]
    if variables := given.get(("service", "environment")):
        lines += ["", "[environment]", *(_line(name, value) for name, value in variables.items())]
    for listen in options.listen if sockets else ():
        lines += ["", "[[socket]]", _line("listen", listen), *sockets]
    offered = _offer("limits", given)
    if offered and "limits" not in tables:
        lines += ["", "# [limits]", *offered]
    for table, rows in tables.items():
        lines += ["", f"[{table}]", *rows, *(offered if table == "limits" else ())]
    return "\n".join(lines) + "\n"


def _line(name: str, value: Any) -> str:
    return f"{format_key(name)} = {format_value(value)}"


def _comment(options: argparse.Namespace) -> list[str]:
    return [
        f"# The service {options.name}. `superctl check` says whether this is right, `superctl explain KEY` what a key",
        "# means; superd.toml(5) has all keys. Lines that begin with # are examples.",
    ]


def _offer(table: str, given: dict[tuple[str, str], Any]) -> list[str]:
    """Lines for keys that many want, as comments."""
    from superd.core.key_texts import example_of

    return [
        f"# {name} = {example_of(BY_TABLE[table][name])}    # {BY_TABLE[table][name].sentence}"
        for where, name in _OFFERED
        if where == table and (table, name) not in given
    ]


def _schema() -> str:
    from superd.cli.schema import installed_file

    return installed_file("service") or "../schema/service.json"


_LISTS = (
    "choices", "groups", "paths", "variables", "instances", "services", "multicast", "statuses", "cpus", "strings",
    "networks", "hours", "protocols",
)  # fmt: skip
_NUMBERS = ("int", "limit", "number", "size", "user", "group", "groups", "statuses", "cpus", "rlimit")


def _value(key: Key, texts: list[str]) -> Any:
    """What the words of a command line mean; what they cannot mean is for the loader to say."""
    if key.kind == "environment":
        pairs = [text.partition("=") for text in texts]
        for name, equals, _ in pairs:
            if not equals:
                raise Failure(USAGE, f"--environment takes NAME=VALUE, not '{name}'")
        return {name: value for name, _, value in pairs}
    if key.kind == "commands":
        return texts
    if key.kind in _LISTS:
        return [_word(key, word) for text in texts for word in text.split(",") if word]
    if len(texts) > 1:
        raise Failure(USAGE, f"--{key.name.replace('_', '-')} was given {len(texts)} times")
    if key.kind == "rlimit" and "," in texts[0]:
        return [_word(key, word) for word in texts[0].split(",")]
    return _word(key, texts[0])


def _word(key: Key, text: str) -> Any:
    if key.kind in ("bool", "keep_alive", "proxy_protocol") and text in ("true", "false"):
        return text == "true"
    if key.kind in _NUMBERS and re.fullmatch(r"-?[0-9]{1,18}", text, re.A):
        return int(text)
    if key.kind == "number" and re.fullmatch(r"[0-9]{1,9}\.[0-9]{1,9}", text, re.A):
        return float(text)
    return text
