"""varlink (varlink.org): messages, their framing, and what an interface's text says about them.

A message is one JSON object and a NUL byte. Calls carry "method", "parameters", "more", "oneway"; replies carry
"parameters" and "continues", or "error" and "parameters". What comes in is somebody else's: `parse_call` takes an
object of bounded size and depth with each key once, and an Interface checks parameters by the same text that
introspection shows, so the two cannot differ.

superctl imports this at each start: nothing here that is slow to import.
"""

from __future__ import annotations

import json
import re

TYPE_CHECKING = False
if TYPE_CHECKING:  # importing typing takes 3 ms
    from collections.abc import Iterator, Mapping
    from typing import Any, NoReturn

MAX_CALL_BYTES = 64 << 10
MAX_REPLY_BYTES = 64 << 20
_MAX_DEPTH = 16
_MAX_INT = (1 << 63) - 1

SERVICE = "org.varlink.service"


class ProtocolError(ValueError):
    """Not a message: the connection is of no more use."""


class VarlinkError(Exception):
    """An error reply: `name` with its interface, `parameters` as that declares them."""

    def __init__(self, name: str, /, **parameters: Any) -> None:
        super().__init__(name, parameters)
        self.name, self.parameters = name, parameters


def invalid_parameter(name: str) -> VarlinkError:
    """One of a call's parameters has a value that it cannot have."""
    return VarlinkError(f"{SERVICE}.InvalidParameter", parameter=name)


class Call:
    __slots__ = ("method", "more", "oneway", "parameters")

    def __init__(self, method: str, parameters: dict[str, Any], more: bool = False, oneway: bool = False) -> None:
        self.method, self.parameters, self.more, self.oneway = method, parameters, more, oneway


class Reply:
    """error None: done, or one of several if `continues`."""

    __slots__ = ("continues", "error", "parameters")

    def __init__(self, parameters: dict[str, Any], continues: bool = False, error: str | None = None) -> None:
        self.parameters, self.continues, self.error = parameters, continues, error


# --- framing


class Splitter:
    """Bytes as they come in, messages out (without their NUL). Raises ProtocolError for one that is too long."""

    def __init__(self, limit_bytes: int = MAX_CALL_BYTES) -> None:
        self._limit = limit_bytes
        self._parts: list[bytes] = []
        self._size = 0

    @property
    def pending(self) -> int:
        """Bytes of a message that is not complete."""
        return self._size

    def feed(self, data: bytes) -> list[bytes]:
        *complete, rest = data.split(b"\0")
        found = []
        for part in complete:
            self._keep(part)
            found.append(b"".join(self._parts))
            self._parts, self._size = [], 0
        self._keep(rest)
        return found

    def _keep(self, part: bytes) -> None:
        self._size += len(part)
        if self._size > self._limit:
            raise ProtocolError(f"a message of more than {self._limit} bytes")
        if part:
            self._parts.append(part)


def _pack(message: Mapping[str, Any]) -> bytes:
    return json.dumps(message, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode() + b"\0"


def pack_call(method: str, parameters: Mapping[str, Any], *, more: bool = False) -> bytes:
    message: dict[str, Any] = {"method": method, "parameters": parameters}
    return _pack({**message, "more": True} if more else message)


def pack_reply(parameters: Mapping[str, Any], *, continues: bool = False) -> bytes:
    message: dict[str, Any] = {"parameters": parameters}
    return _pack({**message, "continues": True} if continues else message)


def pack_error(error: VarlinkError) -> bytes:
    return _pack({"error": error.name, "parameters": error.parameters})


def parse_call(data: bytes) -> Call:
    """Raises ProtocolError."""
    _check_depth(data)
    message = _parse(data)
    if message.keys() - {"method", "parameters", "more", "oneway", "upgrade"}:
        raise ProtocolError("a call with unknown members")
    method, parameters = message.get("method"), message.get("parameters")
    flags = [message.get(name, False) for name in ("more", "oneway", "upgrade")]
    if (
        not isinstance(method, str)
        or not isinstance(parameters, dict | None)
        or not all(type(f) is bool for f in flags)
    ):
        raise ProtocolError("a call with members of the wrong type")
    if flags[2]:
        raise ProtocolError("upgrade is not supported")
    return Call(method, parameters or {}, flags[0], flags[1])


def parse_reply(data: bytes) -> Reply:
    """Raises ProtocolError."""
    message = _parse(data)
    parameters, error = message.get("parameters"), message.get("error")
    if not isinstance(parameters, dict | None) or not isinstance(error, str | None):
        raise ProtocolError("a reply with members of the wrong type")
    return Reply(parameters or {}, message.get("continues") is True, error)


def _check_depth(data: bytes) -> None:
    """Before json: its recursion is bounded by the interpreter's stack, not by us."""
    depth = 0
    for match in re.finditer(rb'"(?:[^"\\]|\\.)*"|[\[\]{}]', data, re.DOTALL):
        token = match[0]
        if token in b"[{":
            depth += 1
            if depth > _MAX_DEPTH:
                raise ProtocolError(f"nested deeper than {_MAX_DEPTH}")
        elif token in b"]}":
            depth -= 1


def _parse(data: bytes) -> dict[str, Any]:
    try:
        text = data.decode()
        message = json.loads(
            text, object_pairs_hook=_object, parse_constant=_refuse, parse_int=_integer, parse_float=_float
        )
        if "\\u" in text:
            json.dumps(message, ensure_ascii=False).encode()  # half of a surrogate pair is not text
    except ProtocolError:
        raise
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"not JSON: {error}") from None
    if not isinstance(message, dict):
        raise ProtocolError("not a JSON object")
    return message


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ProtocolError("a key that is there twice")
    return found


def _refuse(constant: str) -> NoReturn:
    raise ProtocolError(f"{constant} is not JSON")


def _integer(text: str) -> int:
    number = int(text) if len(text) <= 20 else _MAX_INT + 1
    if abs(number) > _MAX_INT:
        raise ProtocolError("an integer of more than 64 bits")
    return number


def _float(text: str) -> float:
    number = float(text)
    if number in (float("inf"), float("-inf")):
        raise ProtocolError("a number out of range")
    return number


# --- interfaces

if TYPE_CHECKING:
    # "bool", "int", "float", "string", "object", the name of a type, ("?", T), ("[]", T), ("map", T), ("enum", words),
    # or a struct as a dict.
    Type = Any
    Struct = dict[str, Type]

_TOKEN = r"\s+|#[^\n]*|([A-Za-z][\w.-]*|->|\[string\]|\[\]|[?():,])"
_PLAIN: dict[str, tuple[type, ...]] = {
    "bool": (bool,), "int": (int,), "float": (int, float), "string": (str,), "object": (dict,),
}  # fmt: skip


class Interface:
    """The text of an interface, as GetInterfaceDescription gives it, taken apart.

    methods  name -> (parameters, what a reply has);  errors  name -> parameters;  types  name -> type

    Raises ValueError for a text with a mistake.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self.methods: dict[str, tuple[Struct, Struct]] = {}
        self.errors: dict[str, Struct] = {}
        self.types: dict[str, Type] = {}
        tokens = _Tokens(text)
        tokens.take("interface")
        self.name = tokens.next()
        while tokens.peek() is not None:
            kind, name = tokens.next(), tokens.next()
            if kind == "method":
                parameters = tokens.struct()
                tokens.take("->")
                self.methods[name] = parameters, tokens.struct()
            elif kind == "error":
                self.errors[name] = tokens.struct()
            elif kind == "type":
                self.types[name] = tokens.type()
            else:
                raise ValueError(f"{kind!r} is no member of an interface")

    def check(self, value: Mapping[str, Any], struct: Struct) -> str | None:
        """None if `value` has the members of `struct` and no others, or the name of the first one that is wrong."""
        for name in value.keys() - struct.keys():
            return str(name)[:80]
        for name, wanted in struct.items():
            if not self._fits(value.get(name), wanted):
                return name
        return None

    def _fits(self, value: Any, wanted: Type) -> bool:
        if isinstance(wanted, str):
            if wanted in _PLAIN:
                # bool is an int in Python, and not in JSON.
                return isinstance(value, _PLAIN[wanted]) and (wanted == "bool" or not isinstance(value, bool))
            return self._fits(value, self.types[wanted])
        if isinstance(wanted, dict):
            return isinstance(value, dict) and self.check(value, wanted) is None
        kind, inner = wanted
        if kind == "?":
            return value is None or self._fits(value, inner)
        if kind == "[]":
            return isinstance(value, list | tuple) and all(self._fits(item, inner) for item in value)
        if kind == "map":
            return isinstance(value, dict) and all(self._fits(item, inner) for item in value.values())
        return isinstance(value, str) and value in inner


class _Tokens:
    def __init__(self, text: str) -> None:
        self._tokens = self._split(text)
        self._next = next(self._tokens, None)

    @staticmethod
    def _split(text: str) -> Iterator[str]:
        at, token = 0, re.compile(_TOKEN)
        while at < len(text):
            match = token.match(text, at)
            if match is None:
                raise ValueError(f"line {text.count(chr(10), 0, at) + 1}: cannot read {text[at : at + 20]!r}")
            if match[1]:
                yield match[1]
            at = match.end()

    def peek(self) -> str | None:
        return self._next

    def next(self) -> str:
        token = self._next
        if token is None:
            raise ValueError("the text ends too early")
        self._next = next(self._tokens, None)
        return token

    def take(self, wanted: str) -> None:
        found = self.next()
        if found != wanted:
            raise ValueError(f"{found!r} where {wanted!r} should stand")

    def type(self) -> Type:
        token = self._next
        if token == "(":
            return self._body()
        self.next()
        prefixes = {"?": "?", "[]": "[]", "[string]": "map"}
        return (prefixes[token], self.type()) if token in prefixes else token

    def struct(self) -> Struct:
        found = self._body()
        if not isinstance(found, dict):
            raise ValueError("an enum where members should stand")
        return found

    def _body(self) -> Type:
        """(name: type, …), or (word, …)."""
        self.take("(")
        members: Struct = {}
        words: list[str] = []
        while self._next != ")":
            name = self.next()
            if self._next == ":":
                self.take(":")
                members[name] = self.type()
            else:
                words.append(name)
            if self._next != ")":
                self.take(",")
        self.take(")")
        return ("enum", tuple(words)) if words else members


# --- where superd's control socket is


def default_socket(environ: Mapping[str, str], uid: int) -> str:
    """The path of the control socket when nobody has said another (superd(8)).

    An ordinary user in a container has no XDG_RUNTIME_DIR; below /tmp both sides check whose the socket is.
    """
    if uid == 0:
        return "/run/superd/control.sock"
    own = environ.get("XDG_RUNTIME_DIR", "")
    return f"{own}/superd/control.sock" if own.startswith("/") else f"/tmp/superd-{uid}/control.sock"


def socket_path(address: str) -> str:
    """The path ("@name" if abstract) that "unix:/path" or a plain path means. Raises ValueError for anything else."""
    path = address.removeprefix("unix:").removeprefix("//") if address.startswith("unix:") else address
    if not path.startswith(("/", "@")) or path == "@" or "\0" in path or len(path.encode(errors="replace")) > 107:
        raise ValueError("write unix:/PATH, absolute and at most 107 bytes")
    return path
