"""JSON Schemas of a service's file and of superd.toml, for editors: draft-04, which taplo and tombi read.

Made from the table of keys. A schema sees one file and one value at a time, so it accepts more than the loader: what
it rejects the loader rejects too, never the other way round. Patterns are what all dialects of regular expressions
have in common.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from superd.core.key_texts import example_of, forms_of, text_of
from superd.core.keys import BY_TABLE, Key

Schema = dict[str, Any]

_DRAFT = "http://json-schema.org/draft-04/schema#"
_NUMBER = r"[0-9]{1,12}(\.[0-9]{1,6})?"
_DURATION = "".join(f"({_NUMBER}{unit})?" for unit in ("d", "h", "m", "s", "ms", "us"))
_EXPANSION = r".*\$\{"  # what a variable expands to is not known here
_SCHEMES = "(tcp|udp)[46]?|unix|unix-dgram|unix-seqpacket|vsock|fifo|fd"
_NAME = "[a-z0-9][a-z0-9_.-]{0,62}"
_CLOCK = "([01][0-9]|2[0-4]):[0-5][0-9]"
_RESERVED = "^(LISTEN_|NOTIFY_|WATCHDOG_)"
_STRING: Schema = {"type": "string"}
_FILLED: Schema = {"type": "string", "minLength": 1}
_INTEGER: Schema = {"type": "integer", "minimum": 0}
_OFF: Schema = {"enum": ["off", False]}


def service_schema() -> Schema:
    """Of conf.d/NAME.toml and of the changes to it."""
    return {"$schema": _DRAFT, "title": "A service of superd", **_table("service")}


def daemon_schema() -> Schema:
    """Of superd.toml."""
    schema = {"$schema": _DRAFT, "title": "superd", **_table("superd")}
    defaults = schema["properties"].get("defaults")
    if defaults is not None:
        schema["properties"]["defaults"] = {**_table("service"), "description": defaults["description"]}
    return schema


def _table(table: str) -> Schema:
    keys = {name: _key(key) for name, key in BY_TABLE[table].items()}
    found: Schema = {"type": "object", "properties": keys, "additionalProperties": False}
    if table == "service":
        found["not"] = {"required": ["listen", "socket"]}
    if table == "socket":
        found["required"] = ["listen"]
    return found


def _key(key: Key) -> Schema:
    schema = dict(_KINDS[key.kind](key))
    if key.off:
        schema = {"anyOf": [schema, _OFF]}
    if key.default is not None and key.default not in ({}, []):
        schema["default"] = key.default
    text = text_of(key).replace("`", "")
    if key.kind not in ("table", "tables", "bool"):
        text += f"\n\n{forms_of(key)[:1].upper()}{forms_of(key)[1:]}. Example: {key.name} = {example_of(key)}"
    return {"description": text, **schema}


def _text(pattern: str) -> Callable[[Key], Schema]:
    return lambda key: {"type": "string", "pattern": f"^({pattern})$"}


def _expanded(pattern: str) -> Schema:
    """Strings that match, or have a variable in them."""
    return {"type": "string", "pattern": f"^({pattern}|{_EXPANSION})"}


def _always(schema: Schema) -> Callable[[Key], Schema]:
    return lambda key: schema


def _list(schema: Schema, **more: Any) -> Callable[[Key], Schema]:
    return lambda key: {"type": "array", "items": schema, **more}


def _bounds(key: Key) -> Schema:
    bounds = {"minimum": key.low, "maximum": key.high}
    return {"type": "integer", **{name: int(value) for name, value in bounds.items() if value is not None}}


def _either(*schemas: Schema) -> Schema:
    return {"anyOf": list(schemas)}


def _ready(key: Key) -> Schema:
    forms = "connect:.+|https?:.+|exec:.+"
    if key.table in ("service", "proxy"):
        forms += "|start|notify|fd:0*([3-9]|[1-9][0-9]+)|log:.*"
    return {"type": "string", "pattern": f"^({forms})$"}


def _rlimit(key: Key) -> Schema:
    value = _either(_INTEGER, {"enum": ["off", "infinity", "unlimited", False]}, _SIZE_TEXT)
    return _either(value, {"type": "array", "items": value, "minItems": 2, "maxItems": 2})


_SIZE_TEXT: Schema = {"type": "string", "pattern": "^[0-9]{1,16}[KMGT](iB)?$"}
_NO_LIMIT: Schema = {"enum": ["max", "infinity"]}
_IDENTITY = _either({"type": "string", "pattern": rf"[^0-9]|{_EXPANSION}|^[0-9]{{11}}"}, _INTEGER)
_ADDRESS = _expanded(f"({_SCHEMES}):")
_WORDS: Schema = {"type": "array", "items": _STRING, "minItems": 1}
_COMMAND = _either(_FILLED, _WORDS)
_SIGNAL = r"(SIG)?(RT(MIN|MAX)([+-][0-9]{1,2})?|[A-Z][A-Z0-9]+)"
_STATUS = _either({"type": "integer", "minimum": 0, "maximum": 255}, {"type": "string", "pattern": f"^({_SIGNAL})$"})
_VARIABLES: Schema = {
    "type": "object", "patternProperties": {_RESERVED: {"not": {}}}, "additionalProperties": _STRING,
}  # fmt: skip
_ONE_LINE: Schema = {"type": "string", "pattern": r"^[^\u0000-\u001f\u007f-\u009f]*$"}

_KINDS: dict[str, Callable[[Key], Schema]] = {
    "line": _always(_ONE_LINE),
    "handler": _text(r"[A-Za-z0-9_.]+:[A-Za-z0-9_.]+"),
    "string": _always(_STRING),
    "bytes": _always(_STRING),
    "word": _text("[A-Za-z0-9_.-]{1,15}"),
    "device": _text("[A-Za-z0-9_.-]{1,15}"),
    "bool": _always({"type": "boolean"}),
    "proxy_protocol": _always({"enum": [False, True, "optional"]}),
    "int": _bounds,
    "number": _always({"type": "number"}),
    "limit": lambda key: {**_bounds(key), "minimum": 1},
    "duration": lambda key: {"type": "string", "minLength": 2, "pattern": f"^{_DURATION}$"},
    "size": _always(_either(_INTEGER, _SIZE_TEXT)),
    "memory": lambda key: _either(_bounds(key), _SIZE_TEXT, _NO_LIMIT),
    "pids": lambda key: _either({**_bounds(key), "minimum": 1}, _NO_LIMIT),
    "cpu_time": _text(r"[0-9]{1,7}(\.[0-9]{1,3})?%|[0-9]{4,12} [0-9]{4,7}|max|infinity"),
    "mode": _text("0?[0-7]{3}|[0-7]{4}"),
    "rate": _text(f"[0-9]*[1-9][0-9]*/{_DURATION}"),
    "signal": _text(_SIGNAL),
    "statuses": _list(_STATUS),
    "choice": lambda key: {"enum": list(key.choices)},
    "builtin": lambda key: {"enum": [word for word in key.choices if word != "tcpmux"]},
    "choices": lambda key: {"type": "array", "items": {"enum": list(key.choices)}},
    "address": _always(_ADDRESS),
    "addresses": _always(_either(_ADDRESS, {"type": "array", "items": _ADDRESS})),
    "control": _always(_expanded("off$|unix:")),
    "target": _always(_expanded("(tcp[46]?|unix):")),
    "header": _always({"enum": [False, 1, 2]}),
    "command": _always(_COMMAND),
    "commands": _always(_either(_FILLED, {"type": "array", "items": _COMMAND})),
    "output": _text("log|socket|null|inherit|file:/.*[^/]"),
    "ready": _ready,
    "user": _always(_IDENTITY),
    "group": _always(_IDENTITY),
    "groups": _list(_IDENTITY),
    "admins": _list({"type": "string", "minLength": 1}),
    "directory": _always(_expanded("/")),
    "path": _always(_FILLED),
    "paths": _list(_FILLED),
    "strings": _list(_STRING),
    "environment": _always(_VARIABLES),
    "variables": _list({"type": "string", "minLength": 1, "not": {"pattern": _RESERVED}}),
    "instances": _list({"type": "string", "pattern": f"^{_NAME}$"}, uniqueItems=True),
    "services": _list(_expanded(f"{_NAME}(@{_NAME})?$")),
    "networks": _list({"type": "string", "pattern": r"^((user|group):.+|\..+|[0-9A-Fa-f:.]+(%[^/]+)?(/.+)?)$"}),
    "hours": _list({"type": "string", "pattern": f"^([^ ]+ +)?{_CLOCK}-{_CLOCK}$"}),
    "capabilities": _list({"type": "string", "pattern": "^[A-Za-z_0-9]+$"}),
    "fd_name": _always({"type": "string", "minLength": 1, "maxLength": 255, "pattern": "^[^:}]*$"}),
    "multicast": _list({"type": "string", "pattern": "^[0-9A-Fa-f.:]+(%.{1,15})?$"}),
    "tls": lambda key: {**_table("tls"), "required": ["certificate"]},
    "names": _always(
        {
            "type": "object",
            "additionalProperties": {
                "type": "object", "properties": {"certificate": _FILLED, "key": _FILLED}, "required": ["certificate"],
                "additionalProperties": False,
            },
        }
    ),
    "protocols": _list({"type": "string", "pattern": "^[!-~]{1,255}$"}),
    "keep_alive": lambda key: _either({"type": "boolean"}, _table("keep_alive")),
    "rlimit": _rlimit,
    "ioprio": _text("idle|(best-effort|realtime):[0-7]"),
    "cpus": _list({"type": "integer", "minimum": 0, "maximum": 4095}, minItems=1),
    "table": lambda key: {} if key.name == "defaults" else _table(key.name),
    "tables": lambda key: {"type": "array", "items": _table("socket")},
}  # fmt: skip
