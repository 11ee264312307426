"""superd.core.address: every form of `listen`, its canonical form, and the right form in every refusal."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from superd.core.address import MAX_PATH, parse_address
from superd.core.spec import Address

SERVICES = {("http", "tcp"): 80, ("domain", "udp"): 53}


def parse(text: str, directory: str = "/etc/superd/conf.d") -> Address:
    return parse_address(text, directory=directory, port_of=lambda name, protocol: SERVICES.get((name, protocol)))


@pytest.mark.parametrize(
    ("text", "address", "canonical"),
    [
        ("tcp:7", Address("tcp", None, 7), "tcp:7"),
        ("tcp://7", Address("tcp", None, 7), "tcp:7"),
        ("tcp:*:7", Address("tcp", None, 7), "tcp:7"),
        ("tcp:127.0.0.1:7", Address("tcp", "127.0.0.1", 7), "tcp:127.0.0.1:7"),
        ("tcp:[::1]:7", Address("tcp", "::1", 7), "tcp:[::1]:7"),
        ("tcp:[0:0::0001]:7", Address("tcp", "::1", 7), "tcp:[::1]:7"),
        ("tcp:[fe80::1%eth0]:7", Address("tcp", "fe80::1%eth0", 7), "tcp:[fe80::1%eth0]:7"),
        ("tcp:localhost:http", Address("tcp", "localhost", 80), "tcp:localhost:80"),
        ("tcp4:0", Address("tcp4", None, 0), "tcp4:0"),
        ("tcp6:[::]:65535", Address("tcp6", "::", 65535), "tcp6:[::]:65535"),
        ("udp:domain", Address("udp", None, 53), "udp:53"),
        ("udp6:[ff02::1%lo]:5", Address("udp6", "ff02::1%lo", 5), "udp6:[ff02::1%lo]:5"),
        ("unix:/run/x.sock", Address("unix", path="/run/x.sock"), "unix:/run/x.sock"),
        ("unix:///run/x.sock", Address("unix", path="/run/x.sock"), "unix:/run/x.sock"),
        ("unix:x.sock", Address("unix", path="/etc/superd/conf.d/x.sock"), "unix:/etc/superd/conf.d/x.sock"),
        ("unix:/a/../b", Address("unix", path="/b"), "unix:/b"),
        ("unix:@name", Address("unix", path="@name"), "unix:@name"),
        ("unix-dgram:/dev/log", Address("unix-dgram", path="/dev/log"), "unix-dgram:/dev/log"),
        ("unix-seqpacket:/s", Address("unix-seqpacket", path="/s"), "unix-seqpacket:/s"),
        ("vsock:3:5000", Address("vsock", port=5000, cid=3), "vsock:3:5000"),
        ("vsock:*:5000", Address("vsock", port=5000), "vsock:*:5000"),
        ("fifo:/run/x", Address("fifo", path="/run/x"), "fifo:/run/x"),
        ("fd:web", Address("fd", path="web"), "fd:web"),
        ("tcpmux:Shout", Address("tcpmux", path="shout"), "tcpmux:shout"),
        ("tcpmux:+shout", Address("tcpmux", path="+shout"), "tcpmux:+shout"),
    ],
)
def test_good(text: str, address: Address, canonical: str) -> None:
    assert parse(text) == address
    assert str(parse(text)) == canonical
    assert parse(canonical) == address


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "it is empty; write tcp:PORT"),
        ("7007", "write tcp:7007 or udp:7007"),
        ("tcpmux:help", "write tcpmux:NAME"),
        ("tcpmux:a b", "write tcpmux:NAME"),
        ("tcpmux:", "write tcpmux:NAME"),
        ("/run/x", "write unix:/run/x"),
        ("127.0.0.1:80", "write tcp:127.0.0.1:80"),
        ("[::1]:80", "write tcp:[::1]:80"),
        ("TCP:80", "write tcp:80"),
        ("http:80", "is none of tcp"),
        ("tcp:", "the port is missing"),
        ("tcp::0", "write tcp:0 for every address"),
        ("tcp:79x", "a port is 0-65535 or a name from /etc/services"),
        ("tcp:70000", "a port is 0-65535"),
        ("tcp:-1", "a port is 0-65535"),
        ("tcp:domain", "a port is 0-65535"),
        ("tcp: 80", "a port is 0-65535"),
        ("tcp:٣", "a port is 0-65535"),
        ("tcp:999.1.1.1:80", "not an IPv4 address"),
        ("tcp:010.0.0.1:80", "not an IPv4 address"),
        ("tcp:example.org:80", "names are not looked up"),
        ("tcp:::1:80", "write tcp:[::1]:80"),
        ("tcp:[::1]", "write tcp:[ADDRESS]:PORT"),
        ("tcp:[::g]:80", "not an IPv6 address"),
        ("tcp:[fe80::1]:80", "%eth0"),
        ("tcp:[::1%eth0]:80", "write tcp:[::1]:80"),
        ("tcp:[::ffff:192.0.2.1]:80", "write tcp:192.0.2.1:80"),
        ("tcp4:[::1]:80", "write tcp:[::1]:80"),
        ("tcp6:127.0.0.1:80", "write tcp:127.0.0.1:80"),
        ("unix:", "the path is empty"),  # D9
        ("unix:@", "the name is empty"),  # D9
        ("unix:/", "not a directory"),
        ("unix:/run/", "write unix:/run/NAME.sock"),
        ("unix:/run/a\nb", "control character"),
        ("unix:/run/a\0b", "control character"),
        ("unix:/" + "a" * 107, f"108 bytes, and the kernel takes {MAX_PATH}"),  # D8
        ("unix:/" + "a" * 299, "300 bytes"),  # D8
        ("unix:/" + "ä" * 60, "121 bytes"),  # D8
        ("unix:@" + "a" * 108, "108 bytes"),  # D8
        ("vsock:x:1", "write vsock:CID:PORT"),
        ("fd:", "write fd:NAME"),
        ("fd:a:b", "no `:`"),
    ],
)
def test_refused_with_the_right_form(text: str, said: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse(text)
    assert said in str(caught.value)
    assert str(caught.value).startswith("cannot parse address ")


def test_longest_paths() -> None:
    # D8: what bind(2) takes is taken
    assert parse("unix:/" + "a" * 106).path == "/" + "a" * 106
    assert parse("unix:@" + "a" * 107).path == "@" + "a" * 107


PORTS = st.integers(0, 65535)
V4 = st.ip_addresses(v=4).map(str)
V6 = st.ip_addresses(v=6).filter(lambda a: not a.ipv4_mapped and not a.is_link_local and not a.is_multicast).map(str)
NAMES = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), min_size=1, max_size=20)
PATHS = NAMES.filter(lambda name: name.strip("/") not in ("", ".", "..")).map(
    lambda name: str(parse(f"unix:/run/x{name.rstrip('/')}"))[5:]
)
ADDRESSES = st.one_of(
    st.builds(Address, st.sampled_from(["tcp", "tcp4", "tcp6", "udp", "udp4", "udp6"]), st.none(), PORTS),
    st.builds(Address, st.sampled_from(["tcp", "tcp4", "udp", "udp4"]), V4 | st.just("localhost"), PORTS),
    st.builds(Address, st.sampled_from(["tcp", "tcp6", "udp", "udp6"]), V6 | st.just("fe80::1%eth0"), PORTS),
    st.builds(Address, st.sampled_from(["unix", "unix-dgram", "unix-seqpacket", "fifo"]), path=PATHS),
    st.builds(Address, st.sampled_from(["unix", "unix-dgram"]), path=NAMES.map(lambda name: f"@{name}")),
    st.builds(Address, st.just("vsock"), port=st.integers(0, 2**32 - 1), cid=st.none() | st.integers(0, 2**32 - 2)),
    st.builds(Address, st.just("fd"), path=st.from_regex(r"[A-Za-z0-9_.-]{1,255}", fullmatch=True)),
)


@given(ADDRESSES)
def test_round_trip(address: Address) -> None:
    assert parse(str(address), "/elsewhere") == address


SCHEMES = st.sampled_from(["tcp:", "tcp6:", "udp:", "unix:", "fifo:", "vsock:", "fd:", "tcp:[", ""])


@given(SCHEMES, st.text(alphabet="[]:%@/.*0123456789abf\n") | st.text())
def test_never_crashes_and_is_stable(scheme: str, text: str) -> None:
    try:
        address = parse(scheme + text)
    except ValueError:
        return
    assert parse(str(address)) == address
