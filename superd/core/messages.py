"""Bytes <-> values: what keeper, manager and spawner say to each other.

Two dialects, both over SOCK_SEQPACKET, so that a message is a packet and fds travel with it:

- Orders and reports that are rare are JSON objects with a "kind": `pack` and `unpack`. fds that belong to one
  are counted in order; the text says what each is.
- What happens per connection is fixed in size: the manager sends a Go with the connection and its log pipe,
  the spawner answers in Records, several to a packet (`records`).

    manager -> keeper    store, drop, snapshot, start, adopt, disown, forget, spawner, signal, notify, up, exit,
                         upgrade
    keeper -> manager    restore (names, fds), children, go | started, failed, exited, spawner, signal,
                         command-ended
    manager -> spawner   JSON: program, forget, list, quit; binary: Go, Signal
    spawner -> manager   JSON: entered, refused, children; binary: Record
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any, NamedTuple

from superd.core.spec import Context

JSON = 0x7B  # "{": no binary message begins with it

# Go: connection id, program id, flags; the peer's address as text follows: "IP\0PORT\0CONNNUM", and
# "\0IP\0PORT" of our side where that is the same for every connection, or a PROXY header has said it. Where TLS ends
# in the manager that is always there, and behind it "\0" and JSON: {"variables": more for the environment, "unix":
# facts of a UNIX client}.
_GO = struct.Struct("<cQII")
_SIGNAL = struct.Struct("<cQII")
_RECORD = struct.Struct("<cQiiI")

GO = b"G"
SIGNAL = b"K"
STARTED, FAILED, EXITED = b"S", b"F", b"X"
GO_SIZE = _GO.size

# Of all that outlives an upgrade: what the keeper leaves to itself, and what is said to spawners, which go on as they
# are. Who changes one of these so that the other side of another version would not understand it changes this.
GENERATION = 1

UNKNOWN_STATUS = -1  # of a process that nobody of ours could wait for; wait(2) gives no such value
HAS_LOG = 1  # Go.flags: the second and third fd are the write and the read end of its log pipe

# Where a start can fail, in the order in which it is done. Sent by index, shown by name.
STAGES = ("descriptors", "session", "limits", "oom", "scheduling", "umask", "groups", "group", "user", "verify",
          "capabilities", "sandbox", "directory", "output", "environment", "exec", "fork", "spawner",
          "handler", "cgroup")  # fmt: skip


def pack(kind: str, **fields: Any) -> bytes:
    return json.dumps({"kind": kind, **fields}, separators=(",", ":"), ensure_ascii=True).encode()


def unpack(data: bytes) -> dict[str, Any]:
    """Raises ValueError for anything that is not an object with a kind."""
    try:
        message = json.loads(data)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(message, dict) or not isinstance(message.get("kind"), str):
        raise ValueError("not a message")
    return message


def pack_go(connection: int, program: int, flags: int) -> bytes:
    """The head of a Go; the caller appends the peer (see Peer)."""
    return _GO.pack(GO, connection, program, flags)


def unpack_go(data: bytes) -> tuple[int, int, int, bytes]:
    """(connection, program, flags, peer)."""
    _, connection, program, flags = _GO.unpack_from(data)
    return connection, program, flags, data[GO_SIZE:]


def pack_signal(connection: int, signo: int, *, group: bool) -> bytes:
    return _SIGNAL.pack(SIGNAL, connection, signo, group)


def unpack_signal(data: bytes) -> tuple[int, int, bool]:
    _, connection, signo, group = _SIGNAL.unpack(data)
    return connection, signo, bool(group)


def format_connection(number: int) -> str:
    """A connection's id as people and SUPERD_CONNECTION see it: the manager's generation and a running number."""
    return "{}-{}".format(*split_connection(number))


def split_connection(number: int) -> tuple[int, int]:
    """(the manager's generation, its running number)."""
    return number >> 40, number & 0xFFFFFFFFFF


def parse_connection(text: str) -> int | None:
    """The number of `format_connection`; None for anything else."""
    generation, dash, number = text.partition("-")
    if not dash or not generation.isdecimal() or not number.isdecimal():
        return None
    return int(generation) << 40 | int(number)


class Record(NamedTuple):
    """What became of a connection's process.

    type    STARTED; FAILED: it never ran; EXITED
    pid     0 when FAILED
    status  EXITED: as from waitpid(2), so os.waitstatus_to_exitcode() tells. FAILED: the errno
    stage   FAILED: index into STAGES
    """

    type: bytes
    connection: int
    pid: int
    status: int
    stage: int

    def pack(self) -> bytes:
        return _RECORD.pack(*self)


def pack_record(type_: bytes, connection: int, pid: int, status: int = 0, stage: int = 0) -> bytes:
    return _RECORD.pack(type_, connection, pid, status, stage)


def records(data: bytes) -> Iterator[Record]:
    return map(Record._make, _RECORD.iter_unpack(data))


def context_to_json(context: Context) -> dict[str, Any]:
    return asdict(context)


def context_from_json(value: dict[str, Any]) -> Context:
    def frozen(item: Any) -> Any:
        return tuple(map(frozen, item)) if isinstance(item, list) else item

    return Context(**{key: frozen(item) for key, item in value.items()})
