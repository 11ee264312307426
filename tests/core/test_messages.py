"""core/messages.py: what goes out comes back, and what is no message is a ValueError."""

from __future__ import annotations

import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from superd.core import messages
from superd.core.messages import (
    EXITED,
    FAILED,
    GO,
    SIGNAL,
    STAGES,
    STARTED,
    Record,
    context_from_json,
    context_to_json,
    format_connection,
    pack,
    pack_go,
    pack_record,
    pack_signal,
    records,
    unpack,
    unpack_go,
    unpack_signal,
)
from superd.core.spec import Context

u64, u32 = st.integers(0, 2**64 - 1), st.integers(0, 2**32 - 1)
i32 = st.integers(-(2**31), 2**31 - 1)
plain = st.none() | st.booleans() | st.integers() | st.text() | st.lists(st.integers() | st.text(), max_size=3)


@given(st.text(), st.dictionaries(st.sampled_from(["id", "names", "ü"]), plain))
def test_text(kind: str, fields: dict[str, object]) -> None:
    data = pack(kind, **fields)
    assert data.isascii()
    assert data[0] == messages.JSON  # which no binary message begins with
    assert unpack(data) == {"kind": kind, **fields}


def test_file_names_survive() -> None:
    name = os.fsdecode(b"/x\xff")
    assert unpack(pack("a", name=name))["name"] == name


BAD = [
    b"", b"\0", b"{", b"[]", b"null", b"1", b'"kind"', b"{}", b'{"kind":1}', b'{"kind":null}', b"\xff\xfe", b"G" * 25,
    b'{"kind":"a"}x', b"\xef\xbb\xbf{}",
]  # fmt: skip


@pytest.mark.parametrize("data", BAD)
def test_no_message(data: bytes) -> None:
    with pytest.raises(ValueError):
        unpack(data)


@given(st.binary())
def test_any_bytes_are_a_message_or_a_value_error(data: bytes) -> None:
    try:
        assert isinstance(unpack(data)["kind"], str)
    except ValueError:
        pass


@given(u64, u32, u32, st.binary())
def test_go(connection: int, program: int, flags: int, peer: bytes) -> None:
    data = pack_go(connection, program, flags) + peer
    assert data[:1] == GO
    assert unpack_go(data) == (connection, program, flags, peer)


@given(u64, st.integers(1, 64), st.booleans())
def test_signal(connection: int, signo: int, group: bool) -> None:
    data = pack_signal(connection, signo, group=group)
    assert data[:1] == SIGNAL
    assert unpack_signal(data) == (connection, signo, group)


rows = st.builds(Record, st.sampled_from([STARTED, FAILED, EXITED]), u64, i32, i32, u32)


@given(st.lists(rows, max_size=64))
def test_records_travel_together(found: list[Record]) -> None:
    data = b"".join(record.pack() for record in found)
    assert list(records(data)) == found
    assert len(data) <= 4000  # inline in a packet


def test_records() -> None:
    data = pack_record(FAILED, 7, 0, 2, STAGES.index("exec")) + pack_record(EXITED, 8, 42, 7 << 8)
    failed, exited = records(data)
    assert (failed.type, failed.connection, failed.status, STAGES[failed.stage]) == (FAILED, 7, 2, "exec")
    assert (exited.pid, os.waitstatus_to_exitcode(exited.status)) == (42, 7)
    with pytest.raises(Exception, match="multiple"):
        list(records(data[:-1]))


def test_nothing_binary_begins_like_text() -> None:
    kinds = {GO, SIGNAL, STARTED, FAILED, EXITED}
    assert len(kinds) == 5
    assert bytes([messages.JSON]) not in kinds


def test_connection_ids() -> None:
    assert format_connection((3 << 40) + 17) == "3-17"
    assert format_connection((1 << 40) + (1 << 40) - 1) == f"1-{(1 << 40) - 1}"


@pytest.mark.parametrize(
    "context",
    [
        Context(),
        Context(user="nobody", group=0, groups=("adm", 4), rlimits=(("nofile", 10, None), ("cpu", 1, 2)), nice=5,
                ioprio="idle", oom_score_adjust=1, cpu_affinity=(0, 1), no_new_privileges=False, umask=0, cwd="/x"),
        Context(groups=()),
    ],
)  # fmt: skip
def test_contexts(context: Context) -> None:
    found = context_from_json(json.loads(json.dumps(context_to_json(context))))
    assert found == context
    assert hash(found) == hash(context)  # a pool is found by it


def test_an_unknown_status_is_none_that_wait_gives() -> None:
    assert messages.UNKNOWN_STATUS < 0
    assert next(records(pack_record(EXITED, 1, 1, messages.UNKNOWN_STATUS))).status == messages.UNKNOWN_STATUS
