"""superd.core.proxyheader: what comes out of each header, of any part of one, and of anything else."""

from __future__ import annotations

import struct
from ipaddress import IPv4Address, IPv6Address

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from superd.core.proxyheader import MOST_BYTES, Header, NoHeaderError, WrongHeaderError, is_begun, parse

SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"


def v2(command: int, family: int, block: bytes, length: int | None = None) -> bytes:
    return SIGNATURE + struct.pack("!BBH", command, family, len(block) if length is None else length) + block


def ip4(source: str, local: str, ports: tuple[int, int]) -> bytes:
    return IPv4Address(source).packed + IPv4Address(local).packed + struct.pack("!HH", *ports)


def ip6(source: str, local: str, ports: tuple[int, int]) -> bytes:
    return IPv6Address(source).packed + IPv6Address(local).packed + struct.pack("!HH", *ports)


FOUR = ip4("192.0.2.1", "198.51.100.2", (5, 80))
SIX = ip6("2001:db8::1", "2001:db8::2", (65535, 0))
LONGEST = b"PROXY UNKNOWN ffff:f...f:ffff ffff:f...f:ffff 65535 65535\r\n".replace(
    b"...", b"fff:ffff:ffff:ffff:ffff:fff"
)

RIGHT = [
    (b"PROXY TCP4 192.0.2.1 198.51.100.2 5 80\r\n", ("192.0.2.1", 5), ("198.51.100.2", 80)),
    (b"PROXY TCP6 2001:DB8:0::1 ::1 0 65535\r\n", ("2001:db8::1", 0), ("::1", 65535)),
    (b"PROXY TCP6 ::ffff:192.0.2.1 ::ffff:c633:6402 5 80\r\n", ("192.0.2.1", 5), ("198.51.100.2", 80)),
    (b"PROXY UNKNOWN\r\n", None, None),
    (LONGEST, None, None),
    (v2(0x21, 0x11, FOUR), ("192.0.2.1", 5), ("198.51.100.2", 80)),
    (v2(0x21, 0x12, FOUR), ("192.0.2.1", 5), ("198.51.100.2", 80)),
    (v2(0x21, 0x21, SIX), ("2001:db8::1", 65535), ("2001:db8::2", 0)),
    (v2(0x21, 0x21, ip6("::ffff:1.2.3.4", "::ffff:5.6.7.8", (1, 2))), ("1.2.3.4", 1), ("5.6.7.8", 2)),
    (v2(0x21, 0x11, FOUR + b"\x03\0\x04abcd"), ("192.0.2.1", 5), ("198.51.100.2", 80)),
    (v2(0x21, 0x31, b"/run/x".ljust(108, b"\0") * 2), None, None),
    (v2(0x21, 0x00, b""), None, None),
    (v2(0x21, 0x00, b"\x04\0\0"), None, None),
    (v2(0x20, 0x00, b""), None, None),
    (v2(0x20, 0x11, FOUR), None, None),
    (v2(0x20, 0xFF, b"anything"), None, None),
    (v2(0x21, 0x11, FOUR.ljust(MOST_BYTES - 16, b"\4")), ("192.0.2.1", 5), ("198.51.100.2", 80)),
]


@pytest.mark.parametrize(("data", "source", "local"), RIGHT)
def test_right(data: bytes, source: tuple[str, int] | None, local: tuple[str, int] | None) -> None:
    """The same with anything behind it; and each part of it is the beginning of one."""
    for rest in (b"", b"x", b"\r\n", data):
        assert parse(data + rest) == Header(len(data), source, local)
    for length in range(len(data)):
        assert parse(data[:length]) is None
        assert is_begun(data[:length]) == (length >= (12 if data[:1] == b"\r" else 6))


@pytest.mark.parametrize(
    "data",
    [
        b"PROXY TCP4 192.0.2.1 198.51.100.2 5 80\n".ljust(107),
        b"PROXY \r\n",
        b"PROXY  TCP4 1.2.3.4 1.2.3.4 5 6\r\n",
        b"PROXY TCP4 1.2.3.4  5 6\r\n",
        b"PROXY TCP4 1.2.3.4 1.2.3.4 5 6 \r\n",
        b"PROXY TCP4 1.2.3.4 1.2.3.4 5\r\n",
        b"PROXY tcp4 1.2.3.4 1.2.3.4 5 6\r\n",
        b"PROXY TCP 1.2.3.4 1.2.3.4 5 6\r\n",
        b"PROXY UDP4 1.2.3.4 1.2.3.4 5 6\r\n",
        b"PROXY UNKNOWNS\r\n",
        b"PROXY TCP4 ::1 ::1 5 6\r\n",
        b"PROXY TCP6 1.2.3.4 1.2.3.4 5 6\r\n",
        b"PROXY TCP6 fe80::1%eth0 ::1 5 6\r\n",
        b"PROXY TCP4 1.2.3 1.2.3.4 5 6\r\n",
        b"PROXY TCP4 01.2.3.4 1.2.3.4 5 6\r\n",
        b"PROXY TCP4 1.2.3.256 1.2.3.4 5 6\r\n",
        b"PROXY TCP4 localhost 1.2.3.4 5 6\r\n",
        b"PROXY TCP4 1.2.3.4\0 1.2.3.4 5 6\r\n",
        b"PROXY TCP4 \xd9\xa1.2.3.4 1.2.3.4 5 6\r\n",
        b"PROXY TCP4 1.2.3.4 1.2.3.4 65536 6\r\n",
        b"PROXY TCP4 1.2.3.4 1.2.3.4 5 -6\r\n",
        b"PROXY TCP4 1.2.3.4 1.2.3.4 05 6\r\n",
        b"PROXY TCP4 1.2.3.4 1.2.3.4 +5 6\r\n",
        b"PROXY TCP4 1.2.3.4 1.2.3.4 5 6\n\r\n",
        b"PROXY TCP4 1.2.3.4 1.2.3.4 5 \r\n",
        b"PROXY UNKNOWN ".ljust(106) + b"\r\n",
        v2(0x11, 0x11, FOUR),
        v2(0x22, 0x11, FOUR),
        v2(0x31, 0x11, FOUR),
        v2(0x21, 0x10, FOUR),
        v2(0x21, 0x01, b""),
        v2(0x21, 0x13, FOUR),
        v2(0x21, 0x41, SIX),
        v2(0x21, 0x11, FOUR[:-1]),
        v2(0x21, 0x21, FOUR),
        v2(0x21, 0x31, SIX),
        v2(0x21, 0x11, FOUR, MOST_BYTES - 15),
        v2(0x20, 0x00, b"", 65535),
    ],
)
def test_wrong(data: bytes) -> None:
    """For good, whatever follows; and no part of it was taken for a header."""
    for rest in (b"", b"\r\n", b"x" * 200):
        with pytest.raises(WrongHeaderError) as caught:
            parse(data + rest)
    assert str(caught.value).isprintable()
    for length in range(len(data)):
        try:
            assert parse(data[:length]) is None
        except WrongHeaderError:
            assert is_begun(data[:length])


@pytest.mark.parametrize("data", [b"GET / HTTP/1.0\r\n", b"\r\nPROXY ", b"\r\n\r\nx", b"proxy tcp4", b"PROXYx", b"\0"])
def test_something_else(data: bytes) -> None:
    with pytest.raises(NoHeaderError):
        parse(data)
    assert not is_begun(data)


PIECES = [
    b"PROXY ",
    b"TCP4",
    b"TCP6",
    b" ",
    b"1.2.3.4",
    b"::1",
    b"80",
    b"\r\n",
    b"UNKNOWN",
    SIGNATURE,
    b"\x21\x11\0\x0c",
    FOUR,
]
ANYTHING = st.one_of(
    st.binary(max_size=300),
    st.lists(st.sampled_from(PIECES) | st.binary(max_size=4), max_size=12).map(b"".join),
    st.binary(max_size=300).map(lambda data: SIGNATURE + data),
    st.binary(max_size=300).map(lambda data: b"PROXY TCP6 " + data),
)


@given(ANYTHING, st.integers(0, 300))
@example(b"PROXY TCP4 1.2.3.4 1.2.3.4 5 6\r\n", 3)
def test_anything(data: bytes, split: int) -> None:
    """A Header inside of what is there, None, or one of two errors; and more bytes never change an answer."""

    def answer(part: bytes) -> object:
        try:
            return parse(part)
        except (NoHeaderError, WrongHeaderError) as error:
            return type(error)

    whole, first = answer(data), answer(data[:split])
    assert first is None or first == whole
    if isinstance(whole, Header):
        assert 0 < whole.length <= len(data) and (whole.source is None) == (whole.local is None)
        assert answer(data[: whole.length]) == whole


ADDRESSES = st.tuples(st.ip_addresses(v=4), st.ip_addresses(v=4)) | st.tuples(
    st.ip_addresses(v=6), st.ip_addresses(v=6)
)


@given(ADDRESSES, st.integers(0, 65535), st.integers(0, 65535), st.binary(max_size=50))
def test_both_versions_say_the_same(
    addresses: tuple[IPv4Address | IPv6Address, ...], port: int, local_port: int, rest: bytes
) -> None:
    version = addresses[0].version
    line = f"PROXY TCP{version} {addresses[0]} {addresses[1]} {port} {local_port}\r\n".encode()
    block = addresses[0].packed + addresses[1].packed + struct.pack("!HH", port, local_port)
    one, other = parse(line + rest), parse(v2(0x21, 0x11 if version == 4 else 0x21, block) + rest)
    assert one is not None and other is not None and one[1:] == other[1:]
    assert one.source is not None and one.source[1] == port and one.length == len(line)
