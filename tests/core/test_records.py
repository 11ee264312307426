from __future__ import annotations

import json
import re
import signal
import time
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from superd.core.records import (
    FORMATTERS,
    LEVELS,
    Line,
    LineSplitter,
    escape,
    format_duration,
    format_json,
    format_logfmt,
    format_text,
    format_text_colour,
    format_utc,
)

T = 1772364031.125  # 2026-03-01T11:20:31.125Z
FORGED = "x\n2026-03-01 superd: ok\r\x1b]0;owned\x07\x9b31m\u2028\u202e\x85\x00\x7f"
LINE_END = re.compile("[\n\r\x0b\x0c\x1c-\x1e\x85\u2028\u2029]")
UNSAFE = re.compile("[\x00-\x08\x0a-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


@pytest.fixture
def utc(monkeypatch):
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    format_text(0.0, "info", None, "message", None, None, None, "")  # the last second may be in another zone
    yield
    monkeypatch.undo()
    time.tzset()


def parse_logfmt(line: str) -> dict[str, str]:
    pairs = re.findall(r'(\w+)=("(?:[^"\\]|\\.)*"|[^ "]*)(?: |$)', line)
    assert " ".join(f"{key}={value}" for key, value in pairs) == line  # nothing but pairs
    return {key: json.loads(value) if value.startswith('"') else value for key, value in pairs}


# --- text


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (
            ("info", None, "message", None, None, None, "cannot bind tcp:79"),
            "superd: cannot bind tcp:79",
        ),
        (
            ("info", None, "ready", None, None, None, "ready: 7 services, 9 sockets"),
            "superd: ready: 7 services, 9 sockets",
        ),
        (("info", "git", "start", 17, 4242, "127.0.0.1:5123", ""), "git[4242]: start #17 127.0.0.1:5123"),
        (("info", "git", "output", 17, 4242, None, "hello\tworld"), "git[4242] | hello\tworld"),
        (("err", "git", "output", 17, 4242, None, "oops"), "git[4242] error | oops"),
        (("info", "git", "output", 17, 4242, None, "", {"continued": True}), "git[4242] |\u2026 "),
        (
            ("info", "git", "exit", 17, 4242, "[::1]:99", "", {"status": 0, "duration": 0.04}),
            "git[4242]: exit #17 [::1]:99, status 0 after 40 ms",
        ),
        (("info", "git", "exit", None, 4242, None, "", {"signal": "TERM"}), "git[4242]: exit, signal TERM"),
        (
            ("warning", "git", "refused", None, None, "192.0.2.7:99", "8 connections from this source"),
            "git: warning: refused 192.0.2.7:99: 8 connections from this source",
        ),
        (
            ("notice", None, "reload", None, None, None, "2 added", {"files": 9, "why": "a b", "none": None}),
            'superd: notice: reload: 2 added files=9 why="a b"',
        ),
    ],
)
def test_text(utc, args, line):
    assert format_text(T, *args) == f"11:20:31.125 {line}"


def test_text_of_every_level_but_info_has_a_word_without_colour():
    for level in LEVELS:
        line = format_text(T, level, "git", "message", None, None, None, "m")
        assert (re.search(r" git: (\w+): m$", line) is None) == (level == "info")


def test_colour_only_repeats_the_words():
    for level in LEVELS:
        args = (T, level, "git", "output", 17, 42, None, "a \x1b[31m b")
        assert re.sub(r"\x1b\[[\d;]*m", "", format_text_colour(*args)) == format_text(*args)
        assert "\x1b" in format_text_colour(*args)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0, "0.0 ms"), (0.0031, "3.1 ms"), (0.25, "250 ms"), (0.9999, "1.00 s"), (1.25, "1.25 s"), (59.999, "1m00s"),
     (247, "4m07s"), (7500, "2h05m"), (273600, "3d04h")],
)  # fmt: skip
def test_duration(seconds, text):
    assert format_duration(seconds) == text


# --- json and logfmt


def test_json_has_the_documented_keys():
    line = format_json(
        T, "warning", "git", "exit", 17, 4242, "[::1]:99", "so", {"signal": "KILL", "duration": 1.25, "x": None}
    )
    assert json.loads(line) == {
        "time": "2026-03-01T11:20:31.125Z", "level": "warning", "service": "git", "event": "exit", "connection": 17,
        "pid": 4242, "peer": "[::1]:99", "message": "so", "signal": "KILL", "duration": 1.25,
    }  # fmt: skip
    assert json.loads(format_json(T, "info", None, "message", None, None, None, "m")) == {
        "time": "2026-03-01T11:20:31.125Z", "level": "info", "event": "message", "message": "m",
    }  # fmt: skip


def test_json_values_of_every_kind():
    fields = {
        "a": True, "b": False, "c": 0, "d": float("nan"), "e": ["x", 1, None], "f": {"k": ("v",)}, "g": 1e-9,
        "h": LineSplitter, "j": signal.SIGTERM, "i": "caf\u00e9",
    }  # fmt: skip
    got = json.loads(format_json(T, "info", None, "m", "id-1", None, None, "", fields))
    assert got["connection"] == "id-1"
    assert [got[key] for key in "abcdefgij"] == [
        True, False, 0, None, ["x", 1, None], {"k": ["v"]}, 0.0, "caf\u00e9", 15
    ]  # fmt: skip
    assert "LineSplitter" in got["h"]


def test_logfmt():
    fields = {"status": 0, "duration": 0.5, "empty": "", "eq": "a=b", "quote": 'a"b', "none": None, "ok": True}
    line = format_logfmt(T, "info", "git", "exit", 17, 42, "[::1]:99", "", fields)
    assert line == (
        "time=2026-03-01T11:20:31.125Z level=info service=git event=exit connection=17 pid=42 peer=[::1]:99"
        ' status=0 duration=0.5 empty="" eq="a=b" quote="a\\"b" ok=true'
    )


def test_time_across_the_second():
    assert format_utc(0.0) == "1970-01-01T00:00:00.000Z"
    assert format_utc(1.9999) == "1970-01-01T00:00:01.999Z"
    assert format_utc(0.5) == "1970-01-01T00:00:00.500Z"  # the clock may be set back


# --- escaping: L1, I8, J11


def test_no_string_can_forge_a_record_or_reach_the_terminal():  # L1, I8, J11
    for form in FORMATTERS.values():
        line = form(T, "info", FORGED, "output", FORGED, 1, FORGED, FORGED, {"status": FORGED, "user": FORGED})
        assert not UNSAFE.search(line)
        line = form(T, "info", FORGED, "refused", FORGED, 1, FORGED, FORGED, {"status": FORGED, "user": FORGED})
        assert not UNSAFE.search(line)


def test_json_and_logfmt_give_back_what_was_logged():  # L1
    assert json.loads(format_json(T, "info", "s", "output", 1, 1, FORGED, FORGED))["message"] == FORGED
    assert parse_logfmt(format_logfmt(T, "info", "s", "output", 1, 1, FORGED, FORGED))["peer"] == FORGED


def test_escape():
    assert escape("a\nb\r\x1b[0m\x85\u2028\udcff\ud800") == "a\\nb\\r\\x1b[0m\\x85\\u2028\\xff\\ud800"
    assert escape("tab\tand caf\u00e9 \U0001f600\u200d") == "tab\tand caf\u00e9 \U0001f600\u200d"


def test_lone_surrogates_do_not_reach_json():  # L7: a file name from os.fsdecode
    line = format_json(T, "info", None, "message", None, None, None, "a\udcffb")
    assert json.loads(line)["message"] == "a\\xffb"
    line.encode("utf-8")


texts = st.text() | st.text(alphabet=st.sampled_from('\n\r\t\x1b" =\\\x85\u2028\udcff\ud800{}a'))


@given(texts, texts, st.dictionaries(st.sampled_from(["status", "signal", "duration", "k"]), texts | st.floats()))
def test_any_text_makes_one_clean_line(peer: str, message: str, fields: Mapping[str, object]):  # L1, I8
    for form in FORMATTERS.values():
        for event in ("output", "message", "exit"):
            line = form(T, "err", "s", event, 1, 2, peer, message, fields)
            assert not UNSAFE.search(line)
            assert not LINE_END.search(line)
            line.encode("utf-8")
    assert json.loads(format_json(T, "err", "s", "x", 1, 2, peer, message, fields))["pid"] == 2
    assert parse_logfmt(format_logfmt(T, "err", "s", "x", 1, 2, peer, message, fields))["pid"] == "2"


# --- lines


def split(*chunks: bytes, limit: int = 8192) -> list[tuple[str, str, bool]]:
    splitter = LineSplitter(limit)
    lines = [line for chunk in chunks for line in splitter.feed(chunk)]
    return [tuple(line) for line in lines + splitter.finish()]


def test_lines():
    assert split(b"a\nb", b"c\r\n\nlast") == [
        ("info", "a", False), ("info", "bc", False), ("info", "", False), ("info", "last", False)
    ]  # fmt: skip
    assert split(b"") == split() == []
    splitter = LineSplitter()
    assert splitter.feed(b"x") == []
    assert splitter.finish() == [Line("info", "x", False)]
    assert splitter.finish() == []


def test_level_prefix():
    assert [line[:2] for line in split(*[b"<%d>m\n" % digit for digit in range(8)])] == [
        (level, "m") for level in LEVELS
    ]
    assert split(b"<", b"3", b">split\n") == [("err", "split", False)]
    # Only at the start of a line, one digit, 0 to 7; and only once.
    for raw in (b" <3>m", b"m<3>", b"<8>m", b"<13>m", b"<>m", b"<a>m", b"<3", b"<", b"<3 >m"):
        assert split(raw + b"\n") == [("info", raw.decode(), False)]
    assert split(b"<3><4>m\n<5>\nm\n") == [("err", "<4>m", False), ("notice", "", False), ("info", "m", False)]


def test_bytes_that_are_not_utf8():  # L7
    assert split(b"\xff\xc3\xa9\xc3\n") == [("info", "\\xff\u00e9\\xc3", False)]
    assert [text for _, text, _ in split("caf\u00e9\n".encode()[:4], "caf\u00e9\n".encode()[4:])] == ["caf\u00e9"]


def test_long_lines_come_in_marked_pieces():  # L8
    assert split(b"<4>" + b"a" * 8 + b"\nb\n", limit=8) == [
        ("warning", "a" * 5, False), ("warning", "aaa", True), ("info", "b", False)
    ]  # fmt: skip
    assert split(b"x" * 8, b"\n", limit=8) == [("info", "x" * 8, False)]  # exactly the limit: nothing is cut
    # What looks like a prefix inside a long line is not one.
    assert split(b"x" * 8 + b"<0>y\n", limit=8) == [("info", "x" * 8, False), ("info", "<0>y", True)]


def test_pieces_are_cut_between_characters():  # L7, L8
    for shift in range(4):
        text = "a" * shift + "\U0001f600" * 40 + "\u00e9" * 40
        pieces = split(text.encode(), limit=16)
        assert "".join(piece for _, piece, _ in pieces) == text
        assert all(13 <= len(piece.encode()) <= 16 for _, piece, _ in pieces[:-1])
    assert [len(text) for _, text, _ in split(b"\x80" * 40, limit=16)] == [64, 64, 32]  # continuation bytes only


def test_an_endless_line_is_not_kept():  # L8
    splitter = LineSplitter()
    for _ in range(64):
        pieces = splitter.feed(b"z" * 65536)
        assert sum(len(piece.text) for piece in pieces) >= 65536 - 8192
    assert len(splitter.finish()[0].text) <= 8192


@given(
    st.binary(max_size=300) | st.text(max_size=200).map(lambda text: text.encode("utf-8", "surrogatepass")), st.data()
)
def test_chunks_do_not_matter_and_nothing_is_lost(data: bytes, draw):  # L7, L8, L9
    cuts = sorted(draw.draw(st.lists(st.integers(0, len(data)), max_size=6)))
    chunks = [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]
    whole = split(data)
    assert split(*chunks) == whole
    if b"<" not in data and b"\r" not in data:
        assert "\n".join(text for _, text, _ in whole) == data.removesuffix(b"\n").decode("utf-8", "backslashreplace")
    small = split(*chunks, limit=16)
    assert all(len(text) <= 16 * 4 for _, text, _ in small)
    joined = "".join(text if continued else "\n" + text for _, text, continued in small)
    if b"<" not in data and b"\r" not in data and data.isascii() and data:
        assert joined[1:] == data.removesuffix(b"\n").decode()
