"""core/syslog.py: lines as programs send them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from superd.core.records import LEVELS
from superd.core.syslog import Entry, parse


@pytest.mark.parametrize(
    ("data", "entry"),
    [
        (b"<13>Nov 21 15:00:00 root: hello", Entry("notice", "root", None, "hello")),
        (b"<27>Nov  1 05:00:00 sshd[4711]: error: no\n\0", Entry("err", "sshd", 4711, "error: no")),
        (b"<31>2026-11-21T15:00:00.123456+01:00 x[1]: late", Entry("debug", "x", 1, "late")),
        (b"<0>kernel: panic", Entry("emerg", "kernel", None, "panic")),
        (b"no priority", Entry("notice", "", None, "no priority")),
        (b"<192>x: out of range", Entry("notice", "<192>x", None, "out of range")),
        (b"<13>", Entry("notice", "", None, "")),
        (b"", Entry("notice", "", None, "")),
        (b"<13>a: \xff\x00b", Entry("notice", "a", None, "\\xff\\x00b")),
        (b"<13>prog:no space", Entry("notice", "prog", None, "no space")),
        (b"<13>one\ntwo: x", Entry("notice", "", None, "one\ntwo: x")),
    ],
)
def test_lines(data: bytes, entry: Entry) -> None:
    assert parse(data) == entry


@given(st.binary(max_size=400))
def test_anything(data: bytes) -> None:
    entry = parse(data)
    assert entry.level in LEVELS
    entry.text.encode()
    entry.tag.encode()


def test_a_long_one_is_cut() -> None:
    assert len(parse(b"<13>a: " + b"x" * 60_000).text) == 8192
