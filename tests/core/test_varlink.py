"""varlink: what a client may send, and what an interface's text means."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from superd.core import varlink
from superd.core.varlink import Interface, ProtocolError, Splitter, VarlinkError, pack_call, parse_call, parse_reply

# --- framing


def check_split(chunks: list[bytes], messages: list[bytes], pending: int = 0) -> None:
    splitter = Splitter(100)
    assert [message for chunk in chunks for message in splitter.feed(chunk)] == messages
    assert splitter.pending == pending


def test_split() -> None:
    check_split([], [])
    check_split([b"{}\0"], [b"{}"])
    check_split([b"{", b"}", b"\0"], [b"{}"])
    check_split([b"a\0b\0c"], [b"a", b"b"], pending=1)
    check_split([b"a\0b", b"\0"], [b"a", b"b"])
    check_split([b"\0\0"], [b"", b""])
    check_split([b"x" * 100 + b"\0"], [b"x" * 100])


@given(st.lists(st.binary(max_size=20).map(lambda data: data.replace(b"\0", b"-"))), st.integers(1, 7))
def test_split_anywhere(messages: list[bytes], size: int) -> None:
    stream = b"".join(message + b"\0" for message in messages)
    check_split([stream[at : at + size] for at in range(0, len(stream), size)], messages)


@pytest.mark.parametrize("chunks", [[b"x" * 101], [b"x" * 60, b"x" * 41], [b"a\0" + b"x" * 101 + b"\0"]])
def test_a_message_that_is_too_long(chunks: list[bytes]) -> None:  # J4
    splitter = Splitter(100)
    with pytest.raises(ProtocolError, match="100 bytes"):
        for chunk in chunks:
            splitter.feed(chunk)


# --- calls and replies


def test_a_call_and_its_reply() -> None:
    call = parse_call(pack_call("a.b.C", {"x": [1, None, "ü"]}, more=True)[:-1])
    assert (call.method, call.parameters, call.more, call.oneway) == ("a.b.C", {"x": [1, None, "ü"]}, True, False)
    plain = parse_call(b'{"method":"a.B"}')
    assert (plain.parameters, plain.more) == ({}, False)
    reply = parse_reply(varlink.pack_reply({"y": 1.5}, continues=True)[:-1])
    assert (reply.parameters, reply.continues, reply.error) == ({"y": 1.5}, True, None)
    failed = parse_reply(varlink.pack_error(VarlinkError("a.No", name="x"))[:-1])
    assert (failed.parameters, failed.continues, failed.error) == ({"name": "x"}, False, "a.No")


def test_what_goes_out_has_one_nul_and_is_ascii() -> None:
    data = varlink.pack_reply({"x": "a\0b ü \ud800"})
    assert data.count(b"\0") == 1 and data.endswith(b"\0") and data.isascii()


# FAILURES.md (c), "Control socket"; J8, F14
BAD_CALLS = {
    "nothing": b"",
    "binary": b"\xff\xfe\x00\x01",
    "no JSON": b"list",
    "no object": b'["method"]',
    "number": b"1",
    "no method": b'{"parameters":{}}',
    "method is no string": b'{"method":1}',
    "parameters are no object": b'{"method":"a.B","parameters":[]}',
    "a key twice": b'{"method":"a.Stop","method":"a.Start"}',
    "a key twice, deep": b'{"method":"a.B","parameters":{"x":{"y":1,"y":2}}}',
    "an unknown member": b'{"method":"a.B","cmd":"x"}',
    "more is no bool": b'{"method":"a.B","more":1}',
    "upgrade": b'{"method":"a.B","upgrade":true}',
    "NaN": b'{"method":"a.B","parameters":{"x":NaN}}',
    "Infinity": b'{"method":"a.B","parameters":{"x":-Infinity}}',
    "1e999": b'{"method":"a.B","parameters":{"x":1e999}}',
    "5,000 digits": b'{"method":"a.B","parameters":{"x":' + b"9" * 5000 + b"}}",
    "65 bits": b'{"method":"a.B","parameters":{"x":9223372036854775808}}',
    "half a surrogate pair": b'{"method":"a.B","parameters":{"x":"\\ud800"}}',
    "depth": b"[" * 60000,
    "depth in parameters": b'{"method":"a.B","parameters":' + b'{"x":' * 20 + b"1" + b"}" * 20 + b"}",
    "not UTF-8": b'{"method":"\xff"}',
    "two values": b'{"method":"a.B"} {"method":"a.B"}',
}


@pytest.mark.parametrize("data", BAD_CALLS.values(), ids=BAD_CALLS)
def test_bad_calls(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        parse_call(data)


def test_brackets_in_strings_are_no_depth() -> None:
    text = "[{" * 1000 + '"\\'
    assert parse_call(json.dumps({"method": "a.B", "parameters": {"x": text}}).encode()).parameters == {"x": text}


@given(st.binary() | st.recursive(st.none() | st.booleans() | st.floats() | st.text(), st.lists).map(
    lambda value: json.dumps(value).encode()
))  # fmt: skip
def test_anything_is_a_call_or_a_protocol_error(data: bytes) -> None:
    try:
        parse_call(data)
    except ProtocolError:
        pass


# --- interfaces

TEXT = """\
# A comment (with: brackets)
interface org.example.test
type Kind (one, two)
type Pair (left: int, right: ?Pair)
method Do(
  name: string,  # a comment
  many: ?[]string, kind: ?Kind
) -> (pairs: []Pair, table: [string]float, any: object)
method Nothing() -> ()
error Failed (why: string)
"""


def test_an_interface() -> None:
    interface = Interface(TEXT)
    assert interface.name == "org.example.test"
    assert interface.types == {"Kind": ("enum", ("one", "two")), "Pair": {"left": "int", "right": ("?", "Pair")}}
    assert interface.methods["Nothing"] == ({}, {})
    assert interface.methods["Do"][0] == {"name": "string", "many": ("?", ("[]", "string")), "kind": ("?", "Kind")}
    assert interface.errors == {"Failed": {"why": "string"}}


@pytest.mark.parametrize(
    ("value", "wrong"),
    [
        ({"name": "x"}, None),
        ({"name": "x", "many": [], "kind": "one"}, None),
        ({"name": "x", "many": None}, None),
        ({}, "name"),
        ({"name": None}, "name"),
        ({"name": ["x"]}, "name"),
        ({"name": "x", "many": "x"}, "many"),
        ({"name": "x", "many": ["x", 1]}, "many"),
        ({"name": "x", "kind": "three"}, "kind"),
        ({"name": "x", "kind": ["one"]}, "kind"),
        ({"name": "x", "other": 1}, "other"),
    ],
)
def test_parameters(value: dict[str, Any], wrong: str | None) -> None:
    interface = Interface(TEXT)
    assert interface.check(value, interface.methods["Do"][0]) == wrong


@pytest.mark.parametrize(
    ("value", "wrong"),
    [
        ({"pairs": [{"left": 1, "right": {"left": 2}}], "table": {"x": 1, "y": 0.5}, "any": {"z": []}}, None),
        ({"pairs": [{"left": True}], "table": {}, "any": {}}, "pairs"),  # a bool is no int
        ({"pairs": [{"left": 1, "right": {"left": "x"}}], "table": {}, "any": {}}, "pairs"),
        ({"pairs": [], "table": {"x": "1"}, "any": {}}, "table"),
        ({"pairs": [], "table": {}, "any": []}, "any"),
    ],
)
def test_types(value: dict[str, Any], wrong: str | None) -> None:
    interface = Interface(TEXT)
    assert interface.check(value, interface.methods["Do"][1]) == wrong


@pytest.mark.parametrize(
    "text", ["", "interface", "type T ()", "interface a\nmethod M(", "interface a\nmethod M() (x: int)",
             "interface a\n!", "interface a\nmethod M(one, two) -> ()", "interface a\nthing T ()"]
)  # fmt: skip
def test_mistakes_in_an_interface(text: str) -> None:
    with pytest.raises(ValueError):
        Interface(text)


# --- where the socket is


def test_default_socket() -> None:
    assert varlink.default_socket({"XDG_RUNTIME_DIR": "/run/user/0"}, 0) == "/run/superd/control.sock"
    assert varlink.default_socket({"XDG_RUNTIME_DIR": "/run/user/7"}, 7) == "/run/user/7/superd/control.sock"
    assert varlink.default_socket({}, 7) == "/tmp/superd-7/control.sock"
    assert varlink.default_socket({"XDG_RUNTIME_DIR": "relative"}, 7) == "/tmp/superd-7/control.sock"


def test_socket_path() -> None:
    assert varlink.socket_path("unix:/run/x") == varlink.socket_path("/run/x") == "/run/x"
    assert varlink.socket_path("unix:///run/x") == "/run/x"
    assert varlink.socket_path("unix:@x") == "@x"
    for bad in ("", "unix:", "x", "unix:x", "@", "tcp:127.0.0.1:7", "/" + "x" * 107, "/a\0b"):  # J2: no TCP
        with pytest.raises(ValueError, match="unix:/PATH"):
            varlink.socket_path(bad)
