"""TOML values -> Python values, for each kind of key in keys.py."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from posixpath import dirname, isabs, join, normpath
from typing import Any

from superd.core.address import parse_address
from superd.core.capabilities import CAPABILITIES
from superd.core.document import Merged, Path, key_text
from superd.core.keys import ALIASES, BY_TABLE, Key
from superd.core.machine import Machine
from superd.core.problems import Problem, Severity
from superd.core.spec import AccessRule, Address, CpuTime, Hours, KeepAlive, Output, RateSpec, Ready, Sni, Tls
from superd.core.values import (
    expand,
    format_duration,
    format_mode,
    format_signal,
    parse_cpu_time,
    parse_duration,
    parse_mode,
    parse_rate,
    parse_signal,
    parse_size,
    quote,
    split_command,
)

NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,62}", re.A)
MAX_ARGUMENTS = 4096
MAX_STRING = 131071  # MAX_ARG_STRLEN without its NUL: the longest argument, or NAME=VALUE, of execve(2)
MAPPED = bytes(10) + b"\xff\xff"  # ::ffff:0:0/96
DAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
_FREE_PORT = ":${port}"  # at the end of an address
_READY_KINDS = ("start", "notify", "fd", "connect", "http", "log", "exec")
_NO_LIMIT = ("max", "infinity")  # the kernel's and systemd's word for "off" in a control group
_HOST = re.compile(r"(\*\.)?[A-Za-z0-9_-]{1,63}(\.[A-Za-z0-9_-]{1,63})*", re.A)
_TLS_FIELDS = {"handshake_timeout": "handshake_timeout_s"}
_RESERVED = ("LISTEN_", "NOTIFY_", "WATCHDOG_")  # superd's own words; the service would believe them


class WrongError(Exception):
    """A value that cannot be taken; `path` is below the key's own."""

    def __init__(self, code: str, message: str, label: str = "", path: Path = ()) -> None:
        self.problem = code, message, label
        self.path = path


class Kinds:
    """Converts the tables of one merged tree, key by key, and keeps the problems.

    `_kind` methods take what TOML gave, and raise ValueError (or WrongError) with the right form in the message.
    """

    def __init__(
        self, machine: Machine, environ: Mapping[str, str], is_root: bool, merged: Merged, name: str | None
    ) -> None:
        self.machine = machine
        self.environ = environ
        self.is_root = is_root
        self.merged = merged
        self.name = name
        self.problems: list[Problem] = []
        self.failed: set[Path] = set()
        self.own = {} if name is None else {"name": name}
        if name is not None and "@" in name:
            self.own["instance"] = name.partition("@")[2]
        self.directory = dirname(self.machine.absolute(merged.main.path))
        self.runtime: list[tuple[Path, str]] = []
        self.at: Path = ()

    def wrong(
        self, path: Path, code: str, message: str, label: str = "", *, key: bool = False, severity: Severity = "error"
    ) -> None:
        origin = self.merged.origin(path)
        self.failed.add(path[:1])
        service = None if self.name is None else self.name
        self.problems.append(
            origin.document.problem(origin.path, code, message, label, key=key, severity=severity, service=service)
        )

    # -- tables

    def table(self, table: str, tree: dict[str, Any], path: Path) -> dict[str, Any]:
        """The converted values of the keys that are there and right."""
        keys = BY_TABLE[table]
        found = {}
        for name, value in tree.items():
            here = (*path, name)
            key = keys.get(name)
            if key is None:
                self.unknown(table, name, here)
            else:
                self.at = here
                try:
                    found[name] = self.convert(key, value)
                except WrongError as error:
                    self.wrong(here + error.path, *error.problem)
                except ValueError as error:
                    self.wrong(here, "bad-value", str(error))
        return found

    def unknown(self, table: str, name: str, path: Path) -> None:
        where = "" if table in ("service", "superd") else f" in [{key_text(path[:-1])}]"
        said = name if re.fullmatch(r"[A-Za-z0-9_-]{1,60}", name, re.A) else quote(name)
        top = "superd" if table == "superd" else "service"
        if where and name in BY_TABLE[top]:
            why = f"`{said}` stands below a table header it does not belong to"
            self.wrong(path, "misplaced-key", why, "move it above the first [table] of the file", key=True)
            return
        others = [home for home in BY_TABLE if home not in ("superd", "service", table)]
        homes = [home for home in others if name in BY_TABLE[home]]
        if homes and table == "service":
            header = _header_of(homes[0])
            self.wrong(path, "misplaced-key", f"`{said}` is a key of {header}", f"write it below {header}", key=True)
            return
        if table == "superd" and name in BY_TABLE["service"]:
            self.wrong(path, "misplaced-key", f"`{said}` is a key of a service", "write it below [defaults]", key=True)
            return
        from difflib import get_close_matches  # late: only a mistake needs it

        lower = name.lower().replace("-", "_")
        close = [alias] if (alias := ALIASES.get(lower)) in BY_TABLE[table] else []
        # What is nearly a key of a table is meant, before what is somewhat like one that may stand here.
        places = {one: home for home in (*others, table) for one in BY_TABLE[home]} if table == "service" else {}
        close = close or [one for one in get_close_matches(lower[:100], places, 1, 0.85) if places[one] != table]
        close = close or get_close_matches(lower[:100], BY_TABLE[table], 1, 0.6)
        home = places.get(close[0], table) if close else table
        label = f"did you mean `{close[0]}`{'' if home == table else f' of {_header_of(home)}'}?" if close else ""
        self.wrong(path, "unknown-key", f"unknown key `{said}`{where}", label, key=True)

    def convert(self, key: Key, value: Any) -> Any:
        if key.off and (value is False or value == "off"):
            return None
        converted = getattr(self, f"_{key.kind}")(value, key)
        if isinstance(converted, int | float) and not isinstance(converted, bool):
            self.in_range(converted, value, key)
        return converted

    def in_range(self, number: float, value: Any, key: Key) -> None:
        show: Callable[[float], str] = str
        if key.kind in ("duration", "mode"):
            show = format_duration if key.kind == "duration" else lambda number: format_mode(int(number))
        low = key.low if key.low is not None else (None if key.kind != "duration" else 0.001)
        if low is not None and number < low:
            hint = ' ("off" for no limit)' if key.off else ""
            limit = f"{show(low)} to {show(key.high)}" if key.high is not None else f"at least {show(low)}"
            raise ValueError(f"{quote(value)} is too small: {key.name} is {limit}{hint}")
        if key.high is not None and number > key.high:
            limit = f"{show(low)} to {show(key.high)}" if low is not None else f"at most {show(key.high)}"
            raise ValueError(f"{quote(value)} is too large: {key.name} is {limit}")

    def _bool(self, value: Any, key: Key) -> bool:
        if not isinstance(value, bool):
            word = {"yes": "true", "on": "true", "true": "true", "no": "false", "off": "false", "false": "false"}
            guess = word.get(value.lower()) if isinstance(value, str) else None
            raise ValueError(f"{quote(value)} is not a bool: write {guess or 'true or false'}")
        return value

    def _proxy_protocol(self, value: Any, key: Key) -> bool | str:
        if not isinstance(value, bool) and value != "optional":
            raise ValueError(f'{quote(value)} is not a value of `{key.name}`: it is false, true or "optional"')
        return value  # type: ignore[no-any-return]  # one of the three

    def _int(self, value: Any, key: Key) -> int:
        if not isinstance(value, int) or isinstance(value, bool):
            span = f" of {key.low} to {key.high}" if key.low is not None and key.high is not None else ""
            raise ValueError(f"{quote(value)} is not an integer: {key.name} is an integer{span}")
        return value

    def _limit(self, value: Any, key: Key) -> int:
        off = ', or "off"' if key.off else ""
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= (key.high or 0):
            raise ValueError(f"{quote(value)} is not a limit: {key.name} is 1 to {key.high}{off}")
        return value

    def _memory(self, value: Any, key: Key) -> int | None:
        return None if value in _NO_LIMIT else parse_size(value)

    def _pids(self, value: Any, key: Key) -> int | None:
        return None if value in _NO_LIMIT else self._limit(value, key)

    def _cpu_time(self, value: Any, key: Key) -> CpuTime | None:
        return None if value in _NO_LIMIT else parse_cpu_time(value)

    def _duration(self, value: Any, key: Key) -> float:
        return parse_duration(value)

    def _size(self, value: Any, key: Key) -> int:
        return parse_size(value)

    def _mode(self, value: Any, key: Key) -> int:
        return parse_mode(value)

    def _rate(self, value: Any, key: Key) -> RateSpec:
        return parse_rate(value)

    def _signal(self, value: Any, key: Key) -> int:
        return parse_signal(value)

    def _string(self, value: Any, key: Key) -> str:
        if not isinstance(value, str):
            raise WrongError("bad-type", f"{quote(value)} is not a string: write \"{quote(value)}\" in quotes"
                              if isinstance(value, int | float) else f"{quote(value)} is not a string")  # fmt: skip
        if "\0" in value:
            raise ValueError("the string contains a NUL, which no argument, path or variable can")
        return value

    def _line(self, value: Any, key: Key) -> str:
        text = self._string(value, key)
        if any(ord(char) < 32 or 127 <= ord(char) < 160 for char in text):
            raise ValueError(f"{quote(value)} contains a control character or a line end")
        return text

    def _word(self, value: Any, key: Key) -> str:
        text = self._line(value, key)
        if not re.fullmatch(r"[A-Za-z0-9_.-]{1,15}", text, re.A):
            raise ValueError(f"{quote(value)} is not a {key.name}: 1 to 15 of A-Z a-z 0-9 _ . -")
        return text

    _device = _word

    def _bytes(self, value: Any, key: Key) -> bytes:
        if not isinstance(value, str):
            raise WrongError("bad-type", f"{quote(value)} is not a string")
        return value.encode()

    def _choice(self, value: Any, key: Key) -> str:
        words = ", ".join(f'"{word}"' for word in key.choices)
        if not isinstance(value, str) or value not in key.choices:
            from difflib import get_close_matches

            close = get_close_matches(value.lower(), key.choices, 1, 0.6) if isinstance(value, str) else []
            guess = f'did you mean "{close[0]}"?' if close else ""
            why = f"{quote(value)} is not a value of `{key.name}`: it is one of {words}"
            raise WrongError("bad-value", why, guess)
        return value

    def _choices(self, value: Any, key: Key) -> tuple[str, ...]:
        return tuple(self.each(value, key, self._choice))

    def each(self, value: Any, key: Key, convert: Any) -> list[Any]:
        """Each element converted; problems say which one."""
        if not isinstance(value, list):
            shown = f'["{value}"]' if isinstance(value, str) and len(value) < 60 else "[…]"
            raise WrongError("bad-type", f"{quote(value)} is not a list: write {shown}")
        found = []
        for number, item in enumerate(value):
            try:
                found.append(convert(item, key))
            except WrongError as error:
                error.path = (number, *error.path)
                raise
            except ValueError as error:
                raise WrongError("bad-value", str(error), "", (number,)) from None
        return found

    def _path(self, value: Any, key: Key) -> str:
        text = self._line(value, key)
        if not text:
            raise ValueError("the path is empty")
        return normpath(join(self.directory, text))

    def _paths(self, value: Any, key: Key) -> tuple[str, ...]:
        return tuple(self.each(value, key, self._path))

    def _directory(self, value: Any, key: Key) -> str:
        text = self.expanded(self._line(value, key))
        if not isabs(text):
            raise ValueError(f"{quote(text)} is not an absolute path: write {quote(join(self.directory, text))}")
        return text

    def expanded(self, text: str) -> str:
        return expand(text, self.own, self.environ) if "${" in text else text

    def expanded_later(self, text: str, path: Path) -> str:
        """With `${port}` and its kin left in; they are noted, to be checked when the sockets are known."""
        if "${" not in text:
            return text
        return expand(text, self.own, self.environ, runtime=lambda what: self.runtime.append((path, what)))

    def _user(self, value: Any, key: Key) -> str | int:
        return self.identity(value, key, "user", self.machine.user)

    def _group(self, value: Any, key: Key) -> str | int:
        return self.identity(value, key, "group", self.machine.group)

    def _groups(self, value: Any, key: Key) -> tuple[str | int, ...]:
        return tuple(self.each(value, key, self._group))

    def identity(self, value: Any, key: Key, what: str, lookup: Any) -> str | int:
        """A name or an integer id that exists on this machine. "1000" is neither: TOML can tell them apart (E10)."""
        if isinstance(value, str) and "${" in value:
            value = self.expanded(value)
            value = int(value) if re.fullmatch(r"[0-9]{1,10}", value, re.A) else value
        if isinstance(value, bool) or not isinstance(value, str | int):
            raise WrongError("bad-type", f"{quote(value)} is not a {what}: write a name in quotes, or an integer id")
        if isinstance(value, str) and re.fullmatch(r"[0-9]{1,10}", value, re.A):
            raise ValueError(f"{quote(value)} is not the name of a {what}: write the id {value} without quotes")
        valid = 0 <= value < 2**32 - 1 if isinstance(value, int) else bool(value) and value.isprintable()
        if not valid or lookup(value) is None:
            raise WrongError(f"unknown-{what}", f"there is no {what} {quote(value)} on this machine")
        return value

    def _output(self, value: Any, key: Key) -> Output:
        words = "log", "socket", "null", "inherit"
        if isinstance(value, str) and value.startswith("file:"):
            path = self._line(value, key)[5:]
            if not isabs(path) or path.endswith("/"):
                raise ValueError(f'{quote(value)} is not the absolute path of a file: write "file:/var/log/NAME.log"')
            return Output("file", normpath(path))
        for word in words:
            if value == word:
                return Output(word)  # type: ignore[arg-type]  # one of the literals, by the loop
        guess = f'; write "file:{value}"' if isinstance(value, str) and value.startswith("/") else ""
        said = ", ".join(f'"{word}"' for word in words)
        raise ValueError(f'{quote(value)} is not a value of `{key.name}`: it is {said} or "file:/PATH"{guess}')

    def _ready(self, value: Any, key: Key) -> Ready:
        forms = '"connect:ADDRESS", "http://HOST:PORT/PATH" or "exec:COMMAND"'
        any_form = key.table in ("service", "proxy")
        if any_form:
            forms = '"start", "notify", "fd:N", "log:REGEX", ' + forms
        text = self._line(value, key)
        kind, _, rest = text.partition(":")
        if kind not in _READY_KINDS or (not any_form and kind in ("start", "notify", "fd", "log")):
            raise ValueError(f"{quote(value)} is not a value of `{key.name}`: it is {forms}")
        if kind in ("start", "notify") and text == kind:
            return Ready(kind)  # type: ignore[arg-type]  # one of the literals
        if kind == "fd" and re.fullmatch(r"[0-9]{1,4}", rest, re.A) and int(rest) not in (0, 1, 2):
            return Ready("fd", fd=int(rest))
        if kind == "fd":
            raise ValueError(f'{quote(value)} is not a file descriptor for readiness: write "fd:3" or higher')
        if kind == "connect" and key.table == "proxy" and rest.endswith(_FREE_PORT):
            return Ready("connect", address=self._target(rest, key))
        if kind == "connect":
            address = self._address(rest, key)
            if not address.accepts or address.scheme == "fd" or address.port == 0:
                raise ValueError(f"{quote(value)}: nobody can connect to {address}")
            return Ready("connect", address=address)
        if kind == "http":
            if key.table == "proxy" and "${port}" in text:
                self.runtime.append((self.at, "port"))
                self.http_url(text.replace("${port}", "1"))
                return Ready("http", url=text)
            return Ready("http", url=self.http_url(text))
        if kind == "log":
            try:
                re.compile(rest)
            except (re.error, OverflowError, RecursionError) as error:
                raise ValueError(f"{quote(value)}: not a regular expression: {error}") from None
            return Ready("log", pattern=rest)
        if kind == "exec":
            return Ready("exec", command=self._command(rest, key))
        raise ValueError(f"{quote(value)} is not a value of `{key.name}`: it is {forms}")

    def http_url(self, text: str) -> str:
        from urllib.parse import urlsplit  # late: few services need it

        try:
            parts = urlsplit(text)
            good = bool(parts.hostname) and parts.port != 0 and not parts.username and parts.fragment == ""
        except ValueError:
            good = False
        if not good or not text.isascii() or " " in text:
            raise ValueError(f'{quote(text)} is not a URL: write "http://127.0.0.1:8080/healthz"')
        return text

    def _services(self, value: Any, key: Key) -> tuple[str, ...]:
        def service(item: Any, key: Key) -> str:
            text = self.expanded(self._string(item, key))
            name, _, instance = text.partition("@")
            if not NAME.fullmatch(name) or ("@" in text and not NAME.fullmatch(instance)):
                raise ValueError(f"{quote(item)} is not a name of a service")
            if text == self.name:
                raise ValueError(f"a service cannot name itself in `{key.name}`")
            return text

        return tuple(dict.fromkeys(self.each(value, key, service)))

    def _commands(self, value: Any, key: Key) -> tuple[tuple[str, ...], ...]:
        """One command as a string, or a list of commands, each a string or a list of words."""
        if isinstance(value, str):
            return (self._command(value, key),)
        at, found = self.at, []
        for number, item in enumerate(value if isinstance(value, list) else self.each(value, key, None)):
            self.at = (*at, number)
            try:
                found.append(self._command(item, key))
            except WrongError as error:
                error.path = (number, *error.path)
                raise
            except ValueError as error:
                raise WrongError("bad-value", str(error), "", (number,)) from None
            finally:
                self.at = at
        return tuple(found)

    def _addresses(self, value: Any, key: Key) -> tuple[Address, ...]:
        if isinstance(value, list):
            return tuple(self.each(value, key, self._address))
        return (self._address(value, key),)

    def _address(self, value: Any, key: Key) -> Address:
        if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 65535:
            raise WrongError("bad-type", f'{value} is not an address: write "tcp:{value}" or "udp:{value}"')
        text = self._string(value, key)
        return parse_address(self.expanded(text), directory=self.directory, port_of=self.machine.port_of)

    def _target(self, value: Any, key: Key) -> Address:
        """Where superd is to connect to. Port 0 is `${port}`, a free one."""
        text = self._string(value, key)
        is_free = text.endswith(_FREE_PORT)
        address = self._address(text.removesuffix("${port}") + "0" if is_free else value, key)
        if address.scheme not in ("tcp", "tcp4", "tcp6", "unix"):
            raise ValueError(f'{quote(value)}: superd carries bytes to "tcp:HOST:PORT" and "unix:/PATH"')
        if address.port == 0 and not is_free:
            right = address.with_port("${port}")
            raise WrongError("bad-value", f"{quote(value)}: nobody can connect to port 0", f'write "{right}"')
        if is_free:
            self.runtime.append((self.at, "port"))
        return address

    def _header(self, value: Any, key: Key) -> int:
        if value is False or (type(value) is int and value in (1, 2)):
            return int(value)
        raise ValueError(f"{quote(value)} is not a version of the PROXY header: write 1, 2 or false")

    def _control(self, value: Any, key: Key) -> str:
        if value == "off":
            return "off"
        address = self._address(value, key)
        if address.scheme != "unix":
            raise ValueError(f'{quote(value)} cannot be the control socket: write "unix:/PATH" or "off"')
        return str(address)

    def _command(self, value: Any, key: Key) -> tuple[str, ...]:
        """Words, `${port}` and its kin left in. The program is looked for by program(), when the user is known."""
        if isinstance(value, str):
            words = split_command(self._string(value, key))
        else:
            words = self.each(value, key, self._string)
        if not words or not words[0]:
            raise ValueError('the command is empty: write ["/path/of/program", "argument", …]')
        if len(words) > MAX_ARGUMENTS:
            raise ValueError(f"the command has {len(words)} arguments, and {MAX_ARGUMENTS} are allowed")
        found = []
        for number, word in enumerate(words):
            where: Path = (number,) if isinstance(value, list) else ()
            try:
                word = self.expanded_later(word, self.at + where)
            except ValueError as error:
                raise WrongError("bad-value", str(error), "", where) from None
            if (size := len(word.encode())) > MAX_STRING:
                why = f"argument {number} has {size} bytes, and execve(2) takes {MAX_STRING}"
                raise WrongError("bad-value", why, "", where)
            found.append(word)
        return tuple(found)

    def _environment(self, value: Any, key: Key) -> tuple[tuple[str, str], ...]:
        if not isinstance(value, dict):
            why = f'{quote(value)} is not a table: write [environment] and NAME = "value" below it'
            raise WrongError("bad-type", why)
        found = []
        for name, item in value.items():
            path = (*self.at, name)
            try:
                self.variable(name)
                text = self.expanded_later(self._string(item, key), path)
                self.loader_variable(name, text)
                if (size := len(f"{name}={text}".encode())) > MAX_STRING:
                    raise ValueError(f"variable {quote(name)} has {size} bytes, and execve(2) takes {MAX_STRING}")
                found.append((name, text))
            except WrongError as error:
                self.wrong(path, *error.problem)
            except ValueError as error:
                self.wrong(path, "bad-value", str(error))
        return tuple(found)

    def variable(self, name: str) -> None:
        if not name or "=" in name or not name.isprintable():
            raise ValueError(f"{quote(name)} cannot name a variable: it is empty, or has = or a control character")
        if name.startswith(_RESERVED):
            raise WrongError("reserved-variable", f"{name} is set by superd itself, where it applies", "remove it")

    def loader_variable(self, name: str, value: str) -> None:
        """LD_* and PYTHON* make a program load code. Where superd is root only root's code will do.

        A name without a slash is looked up by ld.so in the system's directories; every path must be trusted. What
        is not a path (PYTHONUNBUFFERED = "1") loads nothing.
        """
        if not self.is_root or not name.startswith(("LD_", "PYTHON")):
            return
        searched = name in ("LD_LIBRARY_PATH", "PYTHONPATH", "PYTHONHOME", "LD_DEBUG_OUTPUT", "PYTHONPYCACHEPREFIX")
        for part in re.split(r"[: ]" if name.startswith("LD_") else ":", value):
            if (searched or "/" in part) and not isabs(part):
                raise WrongError("not-trusted", f"{name} as root: {quote(part)} is not an absolute path")
            if isabs(part) and (why := self.machine.untrusted(part, frozenset({0}))):
                raise WrongError("not-trusted", f"{name} as root loads code: {why}")

    def _variables(self, value: Any, key: Key) -> tuple[str, ...]:
        found = self.each(value, key, self._string)
        for number, name in enumerate(found):
            try:
                self.variable(name)
            except WrongError as error:
                error.path = (number,)
                raise
            except ValueError as error:
                raise WrongError("bad-value", str(error), "", (number,)) from None
        return tuple(found)

    def _statuses(self, value: Any, key: Key) -> tuple[int | str, ...]:
        def status(item: Any, key: Key) -> int | str:
            if isinstance(item, str):
                return format_signal(parse_signal(item))
            if not isinstance(item, int) or isinstance(item, bool) or not 0 <= item <= 255:
                raise ValueError(f"{quote(item)} is not an exit status (0 to 255) or the name of a signal")
            return item

        return tuple(self.each(value, key, status))

    def _fd_name(self, value: Any, key: Key) -> str:
        text = self._string(value, key)
        if not text or ":" in text or "}" in text or not text.isprintable() or len(text.encode()) > 255:
            raise ValueError(f"{quote(value)} cannot be a name in LISTEN_FDNAMES: 1 to 255 bytes without `:` or `}}`")
        return text

    def _instances(self, value: Any, key: Key) -> tuple[str, ...]:
        def instance(item: Any, key: Key) -> str:
            if not isinstance(item, str) or not NAME.fullmatch(item):
                raise ValueError(f"{quote(item)} is not a name of an instance: a-z 0-9 _ . -, at most 63")
            return item

        found = self.each(value, key, instance)
        for number, item in enumerate(found):
            if item in found[:number]:
                raise WrongError("bad-value", f"{quote(item)} is there twice", "", (number,))
        return tuple(found)

    def _multicast(self, value: Any, key: Key) -> tuple[str, ...]:
        def group(item: Any, key: Key) -> str:
            from ipaddress import ip_address

            text, percent, interface = self._line(item, key).partition("%")
            try:
                good = ip_address(text).is_multicast and (not percent or 0 < len(interface) <= 15)
            except ValueError:
                good = False
            if not good:
                raise ValueError(f'{quote(item)} is not a multicast group: write "239.1.2.3" or "ff02::1:3%eth0"')
            return text + percent + interface

        return tuple(self.each(value, key, group))

    def _builtin(self, value: Any, key: Key) -> str:
        return self._choice(value, key)

    def _handler(self, value: Any, key: Key) -> str:
        text = self._string(value, key)
        module, _, name = text.partition(":")
        parts = [*module.split("."), *name.split(".")]
        if not all(part.isascii() and part.isidentifier() for part in parts):
            raise ValueError(f'{quote(value)} is not a handler: write "package.module:function"')
        return text

    def _capabilities(self, value: Any, key: Key) -> tuple[str, ...]:
        def capability(item: Any, key: Key) -> str:
            name = self._string(item, key).upper().removeprefix("CAP_")
            if name not in CAPABILITIES:
                from difflib import get_close_matches

                close = get_close_matches(name, CAPABILITIES, 1)
                raise WrongError("bad-value", f"there is no capability {quote(item)}",
                                 f'did you mean "{close[0]}"?' if close else "see capabilities(7)")  # fmt: skip
            return name

        return tuple(sorted(set(self.each(value, key, capability))))

    def _number(self, value: Any, key: Key) -> float:
        if not isinstance(value, int | float) or isinstance(value, bool) or value != value:
            raise ValueError(f"{quote(value)} is not a number: write 4.0")
        return float(value)

    def _networks(self, value: Any, key: Key) -> tuple[AccessRule, ...]:
        return tuple(self.each(value, key, self.access_rule))

    def access_rule(self, value: Any, key: Key) -> AccessRule:
        text = self._line(value, key)
        kind, colon, name = text.partition(":")
        if colon and kind in ("user", "group"):
            member: str | int = int(name) if re.fullmatch(r"[0-9]{1,10}", name, re.A) else name
            found = self.machine.user(member) if kind == "user" else self.machine.group(member)
            if found is None or not name:
                raise WrongError(f"unknown-{kind}", f"there is no {kind} {quote(name)} on this machine")
            return AccessRule(text, kind, found[0] if isinstance(found, tuple) else found)  # type: ignore[arg-type]
        if text.startswith("."):
            if not re.fullmatch(r"(\.[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9])?){1,20}", text.lower(), re.A):
                raise ValueError(f'{quote(value)} is not the end of a host name: write ".example.org"')
            return AccessRule(text.lower(), "host", text.lower())
        return _network(text)

    def _admins(self, value: Any, key: Key) -> tuple[AccessRule, ...]:
        """As users and groups of `allow`; a plain name is a group, as it is for `control_group`."""

        def admin(item: Any, key: Key) -> AccessRule:
            text = self._line(item, key)
            if text.startswith(("user:", "group:")):
                return self.access_rule(text, key)
            if self.machine.group(text) is None and self.machine.user(text) is not None:
                raise WrongError("unknown-group", f"there is no group {quote(text)}", f'write "user:{text}"')
            return self.access_rule(f"group:{text}", key)

        return tuple(self.each(value, key, admin))

    def _hours(self, value: Any, key: Key) -> tuple[Hours, ...]:
        return tuple(self.each(value, key, lambda item, key: _hours(self._line(item, key))))

    def _keep_alive(self, value: Any, key: Key) -> KeepAlive | None:
        if isinstance(value, bool):
            return KeepAlive() if value else None
        if not isinstance(value, dict):
            raise WrongError("bad-type", f"{quote(value)} is neither a bool nor a table of idle, interval, count")
        found = self.table("keep_alive", value, self.at)
        return KeepAlive(found.get("idle"), found.get("interval"), found.get("count"))

    def _tls(self, value: Any, key: Key) -> Tls | None:
        right = 'write tls = { certificate = "/PATH", key = "/PATH" }'
        if not isinstance(value, dict):
            raise WrongError("bad-type", f"{quote(value)} is not a table: {right}")
        path = self.at
        found = self.table("tls", value, path)
        if "certificate" not in value:
            raise WrongError("missing-key", "`tls` has no `certificate`", right)
        if "client_certificate" in found and "client_ca" not in value:
            why = "`client_certificate` goes with `client_ca`: whose certificates count must be said"
            self.wrong((*path, "client_certificate"), "missing-key", why, 'client_ca = "/PATH"', key=True)
        if found.keys() < value.keys():
            return None  # it is wrong, which is reported
        found.setdefault("key", found["certificate"])
        return Tls(**{_TLS_FIELDS.get(name, name): item for name, item in found.items()})

    def _names(self, value: Any, key: Key) -> tuple[Sni, ...]:
        path = self.at
        found: list[Sni] = []
        if not isinstance(value, dict):
            raise WrongError(
                "bad-type", f'{quote(value)} is not a table: write sni = {{ "NAME" = {{ certificate = … }} }}'
            )
        for name, item in value.items():
            here = (*path, name)
            if not _HOST.fullmatch(name) or len(name) > 253:
                self.wrong(
                    here, "bad-value", f"{quote(name)} is no name of a host, and not one with *. before it", key=True
                )
                continue
            if any(name.lower() == one.name for one in found):
                self.wrong(
                    here, "duplicate-name", f"{quote(name.lower())} is there already: names have no case", key=True
                )
                continue
            if not isinstance(item, dict) or "certificate" not in item:
                self.wrong(
                    here, "missing-key", f"{quote(name)} has no `certificate`", 'write { certificate = "/PATH" }'
                )
                continue
            for other in item.keys() & BY_TABLE["tls"].keys() - {"certificate", "key"}:
                self.wrong(
                    (*here, other), "other-mode", f"`{other}` is that of all names: it stands in `tls`", key=True
                )
            files = self.table("tls", {k: v for k, v in item.items() if k in ("certificate", "key")}, here)
            for other in item.keys() - BY_TABLE["tls"].keys():
                self.unknown("tls", other, (*here, other))
            if "certificate" in files:
                found.append(Sni(name.lower(), files["certificate"], files.get("key", files["certificate"])))
        return tuple(found)

    def _protocols(self, value: Any, key: Key) -> tuple[str, ...]:
        def protocol(item: Any, key: Key) -> str:
            text = self._string(item, key)
            if not re.fullmatch(r"[!-~]{1,255}", text, re.A):
                raise ValueError(f"{quote(text)} is not the name of a protocol: 1 to 255 visible characters of ASCII")
            return text

        found = tuple(self.each(value, key, protocol))
        if sum(len(name) + 1 for name in found) > 0xFFFF:
            raise ValueError("the names of the protocols are more than TLS can carry, 64 KiB")
        return found

    def _rlimit(self, value: Any, key: Key) -> tuple[int, int]:
        def one(item: Any, key: Key) -> int:
            if item in ("off", "infinity", "unlimited") or item is False:
                return -1
            if isinstance(item, int) and not isinstance(item, bool) and 0 <= item < 2**63:
                return item
            if isinstance(item, str) and key.name not in ("nofile", "nproc", "locks", "sigpending", "nice", "rtprio"):
                return parse_size(item)
            raise ValueError(f'{quote(item)} is not a limit: write a number from 0 on, a size such as "64M", or "off"')

        if not isinstance(value, list):
            return (both := one(value, key)), both
        if len(value) != 2:
            raise ValueError(f"a list of {len(value)} is not a limit: write a value or [soft, hard]")
        soft, hard = self.each(value, key, one)
        if hard != -1 and not 0 <= soft <= hard:
            raise ValueError(f"the soft limit {quote(value[0])} is above the hard limit {quote(value[1])}")
        return soft, hard

    def _ioprio(self, value: Any, key: Key) -> str:
        text = self._string(value, key)
        if not re.fullmatch(r"idle|(best-effort|realtime):[0-7]", text, re.A):
            right = 'write "idle", "best-effort:0" to "best-effort:7", or "realtime:0" to "realtime:7"'
            raise ValueError(f"{quote(value)} is not a priority: {right}")
        return text

    def _cpus(self, value: Any, key: Key) -> tuple[int, ...]:
        def cpu(item: Any, key: Key) -> int:
            if not isinstance(item, int) or isinstance(item, bool) or not 0 <= item < 4096:
                raise ValueError(f"{quote(item)} is not the number of a CPU: write [0, 1]")
            return item

        found = sorted(set(self.each(value, key, cpu)))
        if not found:
            raise ValueError("no CPU is left to run on: write [0, 1]")
        return tuple(found)

    def _table(self, value: Any, key: Key) -> Any:
        if not isinstance(value, dict):
            raise WrongError("bad-type", f"{quote(value)} is not a table: write [{key.name}] and its keys below it")
        return None if key.name == "defaults" else self.table(key.name, value, self.at)

    def _tables(self, value: Any, key: Key) -> list[tuple[Path, dict[str, Any]]]:
        if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
            raise WrongError("bad-type", f"`{key.name}` is not a list of tables: write [[{key.name}]]")
        path = self.at
        found = []
        for number, item in enumerate(value):
            here = (*path, number)
            converted = self.table("socket", item, here)
            if "listen" not in item:
                self.wrong(here, "missing-key", "this [[socket]] has no `listen`", 'listen = "tcp:PORT"', key=True)
            found.append((here, converted))
        return found


def _header_of(table: str) -> str:
    return {"socket": "[[socket]]", "keep_alive": "[socket.keep_alive]", "tls": "[socket.tls]"}.get(table, f"[{table}]")


def _network(text: str) -> AccessRule:
    """An address or network; an IPv4-mapped one is IPv4 (A8)."""
    from ipaddress import ip_network  # late: 3 ms that most files do not need

    try:
        network = ip_network(text, strict=False)
        address, length = network.network_address.packed, network.prefixlen
    except ValueError:
        right = 'write "10.0.0.0/8", "2001:db8::/32", "user:NAME", "group:NAME" or ".example.org"'
        raise ValueError(f"{quote(text)} is not a network: {right}") from None
    if "/" in text and _packed(text.partition("/")[0]) != address:
        raise ValueError(f'{quote(text)} has bits set below its mask: write "{network}"')
    if address.startswith(MAPPED) and length >= 96:
        address, length = address[12:], length - 96
    return AccessRule(text if "/" in text else str(network.network_address), "network", address, length)


def _packed(text: str) -> bytes:
    from ipaddress import ip_address

    return ip_address(text).packed


def _hours(text: str) -> Hours:
    right = 'write "Mon-Fri 08:00-18:00", "Sat,Sun 10:00-12:00" or "22:00-06:00" for every day'
    found = re.fullmatch(r"(?:(\S+) +)?(\d\d):(\d\d)-(\d\d):(\d\d)", text, re.A)
    if found is None:
        raise ValueError(f"{quote(text)} is not a span of hours: {right}")
    hours = [int(part) for part in found.groups()[1:]]
    start, end = hours[0] * 60 + hours[1], hours[2] * 60 + hours[3]
    if max(hours[1], hours[3]) > 59 or start >= 1440 or end > 1440 or start == end:
        raise ValueError(f"{quote(text)} is not a span of hours: a day goes from 00:00 to 24:00")
    days: list[int] = []
    for part in (found[1] or "Mon-Sun").split(","):
        first, dash, last = part.partition("-")
        names = [name.capitalize() for name in ((first, last) if dash else (first, first))]
        if not all(name in DAYS for name in names):
            raise ValueError(f"{quote(text)}: {quote(part)} is not a day, or two with a dash: {right}")
        one, other = map(DAYS.index, names)
        days += [day % 7 for day in range(one, (other if other >= one else other + 7) + 1)]
    return Hours(text, tuple(sorted(set(days))), start, end)
