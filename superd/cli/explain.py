"""`superctl explain`: what a word of superd's means, or who has a port or path."""

from __future__ import annotations

import os
import stat

from superd.cli.failure import OK, UNREACHABLE, USAGE, Failure
from superd.core import explanations
from superd.core.keys import ALIASES, CONN, KEYS, LONG, Key

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator
    from typing import Any

    from superd.core.spec import Address

    Row = dict[str, Any]

_CHANGES = {
    "in place": "takes effect at once, nothing is restarted",
    "rebind": "takes a new socket; the others stay open",
    "restart": "takes new processes: the service is restarted",
}
_WIDTH = 100


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--list", action="store_true", help="all words that can be explained")
    parser.add_argument(
        "words", nargs="*", metavar="KEY|STATE|ERROR|PORT|PATH", help='or "limits.rate", an exit status'
    )


def run(options: argparse.Namespace, connect: Callable[[], Any]) -> int:
    if options.list != (not options.words):
        raise Failure(USAGE, "name what is to be explained, or --list\nTry `superctl explain --help`.")
    if options.list:
        found = list(_everything())
        lines = [f"{row['what']:<12} {row['name']:<28} {_cut(row['text'])}" for row in found]
    else:
        found = [row for word in _words(options.words) for row in _explain(word, options, connect)]
        lines = [line for row in found for line in [*_lines(row), ""]][:-1]
    if options.quiet:
        return OK
    if options.json:
        import json

        print(json.dumps(found, indent=2))
    else:
        for line in lines:
            print(line)
    return OK


def _words(words: list[str]) -> list[str]:
    return ["bad config"] if [word.lower() for word in words] in (["bad", "config"], ["bad-config"]) else words


def _explain(word: str, options: argparse.Namespace, connect: Callable[[], Any]) -> list[Row]:
    found = list(_known(word))
    if addresses := _addresses(word, bool(found)):
        found += _holders(addresses, options, connect)
    elif word.startswith(("/", "./", "../")):
        found.append(_path(word, options, connect))
    if not found:
        raise Failure(USAGE, f"cannot explain '{word}': {_hint(word)}")
    return found


def _hint(word: str) -> str:
    from difflib import get_close_matches

    known = {str(row["name"]) for row in _everything()} | {key.name for key in KEYS}
    lower = word.lower().replace("-", "_")
    alias = ALIASES.get(lower)
    close = [alias] if alias else get_close_matches(word.lower()[:60], sorted(known), 1) or get_close_matches(
        lower[:60], sorted(known), 1
    )  # fmt: skip
    return f"did you mean `{close[0]}`?" if close else "it is no key, state, error, port or path; --list shows them"


# -- words


def _known(word: str) -> Iterator[Row]:
    name = word.strip("[]") if word.startswith("[") else word
    table, dot, last = name.rpartition(".")
    for key in KEYS:
        if key.name == (last if dot else name) and (not dot or key.table == table.strip("[]")):
            yield _key(key)
    lower = word.lower()
    if lower in explanations.STATES:
        yield {"what": "state", "name": lower, "text": explanations.STATES[lower]}
    code = lower.removeprefix("error[").removeprefix("warning[").rstrip("]")
    if code in explanations.PROBLEMS:
        yield {"what": "error", "name": code, "text": explanations.PROBLEMS[code]}
    if word.isascii() and word.isdigit() and int(word) in explanations.EXIT_STATUSES:
        yield {"what": "exit status", "name": word, "text": explanations.EXIT_STATUSES[int(word)]}


def _everything() -> Iterator[Row]:
    for key in KEYS:
        yield {"what": "key", "name": _full_name(key), "text": key.sentence}
    for what, table in (("state", explanations.STATES), ("error", explanations.PROBLEMS)):
        yield from ({"what": what, "name": name, "text": text} for name, text in table.items())
    for status, text in explanations.EXIT_STATUSES.items():
        yield {"what": "exit status", "name": str(status), "text": text}


def _full_name(key: Key) -> str:
    return key.name if key.table == "service" else f"{key.table}.{key.name}"


def _key(key: Key) -> Row:
    import json

    from superd.core.key_texts import example_of, forms_of, text_of

    row: Row = {"what": "key", "name": _full_name(key), "table": key.table}
    text = text_of(key)
    row["text"] = key.sentence if text == key.sentence or not text else f"{key.sentence}\n{text}"
    row["takes"] = forms_of(key)
    row["default"] = (
        '"off"' if key.default is None and key.off else None if key.default is None else json.dumps(key.default)
    )
    row["stands"] = _stands(key)
    row["applies"] = _applies(key)
    row["change"] = "needs superd to be restarted" if key.table == "superd" else _CHANGES[key.change]
    if key.kind not in ("table", "tables"):
        row["example"] = f"{key.name} = {example_of(key)}"
    return row


def _stands(key: Key) -> str:
    if key.table == "superd":
        return "superd.toml"
    if key.table == "service":
        return "a service's file, above its tables; [defaults] of superd.toml"
    header = {"socket": "[[socket]]", "keep_alive": "keep_alive", "tls": "tls"}.get(key.table, f"[{key.table}]")
    return f"{header} of a service's file"


def _applies(key: Key) -> str | None:
    if not key.modes:
        return None
    if key.modes == LONG:
        return f'services that are started once: every `run` but "{CONN}"'
    if key.table in ("service", "limits"):
        return "run = " + " or ".join(f'"{mode}"' for mode in key.modes)
    return "listen = " + ", ".join(f'"{scheme}:…"' for scheme in key.modes)


def _lines(row: Row) -> list[str]:
    from textwrap import wrap

    lines = [f"{row['name']} ({row['what']})"]
    for paragraph in row["text"].split("\n"):
        hanging = "      " if paragraph.startswith("* ") else "    "
        lines += wrap(paragraph.replace("`", ""), _WIDTH, initial_indent="    ", subsequent_indent=hanging)
    titles = ("takes", "default", "stands", "applies", "change", "example")
    for title in titles:
        if row.get(title):
            shown = {"stands": "stands in", "applies": "applies to", "change": "a change"}.get(title, title)
            lines += wrap(
                row[title].replace("`", ""), _WIDTH, initial_indent=f"    {shown + ':':<12}", subsequent_indent=" " * 16
            )
    return lines


def _cut(text: str) -> str:
    first = text.replace("`", "").partition(". ")[0].rstrip(".")
    return first if len(first) <= 70 else f"{first[:69]}…"


# -- ports and paths


def _addresses(word: str, is_word: bool) -> list[Address]:
    """What the word can mean as an address: one that is written out, or a port of TCP and UDP."""
    from superd.core.address import parse_address
    from superd.system.configdir import RealMachine

    if word.startswith(("/", "./", "../")) or (is_word and not word.isdigit()):
        return []
    machine = RealMachine()
    found = []
    for text in (
        (word,) if ":" in word else (f"tcp:{word}", f"udp:{word}") if not word.startswith("@") else (f"unix:{word}",)
    ):
        try:
            found.append(parse_address(text, directory=os.getcwd(), port_of=machine.port_of))
        except ValueError as error:
            if ":" in word:
                raise Failure(USAGE, str(error)) from None
    return found


def _path(word: str, options: argparse.Namespace, connect: Callable[[], Any]) -> Row:
    from superd.core.spec import Address

    path = os.path.abspath(word)
    try:
        mode = os.stat(path).st_mode
    except OSError:
        mode = 0
    kind = "fifo" if stat.S_ISFIFO(mode) else "unix"
    rows = _holders([Address(kind, path=path)], options, connect)  # type: ignore[arg-type]  # one of the schemes
    if mode and not stat.S_ISFIFO(mode) and not stat.S_ISSOCK(mode):
        what = "a directory" if stat.S_ISDIR(mode) else "a file"
        rows[0]["text"] = f"{path} is {what}, not a socket. {rows[0]['text']}"
    elif not mode:
        rows[0]["text"] = f"There is nothing at {path}. {rows[0]['text']}"
    return rows[0]


def _holders(addresses: list[Address], options: argparse.Namespace, connect: Callable[[], Any]) -> list[Row]:
    from superd.system.holders import find_holder

    services = _of_files(options)
    if options.config is None:
        services += [row for row in _of_superd(connect) if row[:2] not in [known[:2] for known in services]]
    rows = []
    for address in addresses:
        mine = [row for row in services if _is_same(row[1], address)]
        holder = find_holder(address)
        said = [f"It belongs to service '{name}': {place}." for name, _, place in mine]
        if holder is not None:
            program = " (superd)" if holder.program.startswith("superd-") else ""
            said.append(f"It is held by {holder}{program}.")
        elif mine:
            said.append("At the moment nobody holds it.")
        if not said:
            said = [f"Nobody that can be seen from here has {address}."]
        row: Row = {"what": "address", "name": str(address), "text": "\n".join(said)}
        row["services"] = [{"name": name, "listen": str(listen), "place": place} for name, listen, place in mine]
        row["pid"], row["program"] = (None, None) if holder is None else (holder.pid, holder.program)
        rows.append(row)
    taken = [row for row in rows if row["services"] or row["pid"]]
    return taken or rows[:1]


def _is_same(listen: Address, address: Address) -> bool:
    from superd.core.collision import collide
    from superd.core.spec import SocketSpec

    return collide(SocketSpec(listen, ""), SocketSpec(address, ""))


def _of_files(options: argparse.Namespace) -> list[tuple[str, Address, str]]:
    """(service, address, file and line) of every service in the files that superd would read."""
    from superd.cli.files import config_paths, is_for_root, read_files
    from superd.core.effective import load_places
    from superd.system.configdir import RealMachine

    paths = config_paths(options)
    files, _ = read_files(paths)
    return load_places(files, machine=RealMachine(), environ=os.environ, is_root=is_for_root(paths))


def _of_superd(connect: Callable[[], Any]) -> list[tuple[str, Address, str]]:
    """The same of what a running superd has bound, if one can be asked: it knows ports that the kernel chose."""
    from superd.core.address import parse_address
    from superd.system.configdir import RealMachine

    try:
        control = connect()
    except Failure as failure:
        if failure.code != UNREACHABLE:
            raise
        return []
    try:
        rows = control.call("Sockets")["sockets"]
        files = {one["service"]["name"]: one["file"] for one in control.call("Status")["services"]}
    finally:
        control.close()
    port_of = RealMachine().port_of
    return [
        (row["service"], parse_address(row["address"], directory="/", port_of=port_of), files.get(row["service"], "?"))
        for row in rows
    ]
