"""One request and the status of its answer."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from superd.core.http import parse_status, parse_url


@pytest.mark.parametrize(
    ("url", "host", "port", "line", "named"),
    [
        ("http://127.0.0.1:8080/healthz", "127.0.0.1", 8080, "/healthz", "127.0.0.1:8080"),
        ("http://localhost", "localhost", 80, "/", "localhost"),
        ("http://[::1]:81/a?b=c&d", "::1", 81, "/a?b=c&d", "[::1]:81"),
        ("http://Example.org?x", "example.org", 80, "/?x", "Example.org"),
    ],
)
def test_request(url: str, host: str, port: int, line: str, named: str) -> None:
    found_host, found_port, request = parse_url(url)
    assert (found_host, found_port) == (host, port)
    head, *fields = request.decode().removesuffix("\r\n\r\n").split("\r\n")
    assert head == f"GET {line} HTTP/1.1"
    assert f"Host: {named}" in fields and "Connection: close" in fields


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"HTTP/1.1 200 OK\r\n", 200),
        (b"HTTP/1.0 404 Not Found\r\nServer: x\r\n\r\nbody", 404),
        (b"HTTP/1.1 204\r\n", 204),
        (b"HTTP/1.1 503 Later\n\n", 503),
        (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\n\r\n", 200),
        (b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\nHTTP/1.1 100 C\n\nHTTP/1.1 302 Found\r\n", 302),
        (b"HTTP/1.1 101 Switching Protocols\r\n\r\n", 101),
        (b"", None),
        (b"HTTP/1", None),
        (b"HTTP/1.1 200 OK", None),
        (b"HTTP/1.1 100 Continue\r\n", None),
        (b"HTTP/1.1 100 Continue\r\n\r\nHTT", None),
    ],
)
def test_status(data: bytes, status: int | None) -> None:
    assert parse_status(data) == status


@pytest.mark.parametrize(
    "data",
    [b"220 mail ESMTP\r\n", b"SSH-2.0-x", b"\x15\x03\x03\x00\x02\x02P", b"HTTP/1.1 2000 OK\r\n", b"HTTP/1.1 OK\r\n",
     b"HTTP/2 200\r\n", b"\r\nHTTP/1.1 200 OK\r\n", b"HTTP/1.1 100 C\r\n\r\nx"],
)  # fmt: skip
def test_what_is_no_answer(data: bytes) -> None:
    with pytest.raises(ValueError, match="the answer is not HTTP"):
        parse_status(data)


@given(st.binary(max_size=200) | st.binary(max_size=50).map(lambda rest: b"HTTP/1.1 1" + rest))
def test_any_bytes(data: bytes) -> None:
    """A status, "more", or ValueError; and what is decided stays so, whatever follows."""
    try:
        status = parse_status(data)
    except ValueError:
        with pytest.raises(ValueError, match="not HTTP"):
            parse_status(data + b"\r\n\r\n")
    else:
        assert status is None or parse_status(data + b"x") == status
