"""core/access.py: cases that people write, and any rules against the plainest model there is."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st
from loading import load_all

from superd.core.access import Client, Rules, normalised
from superd.core.spec import Access

MONDAY_NOON = (0, 12 * 60)


def access(text: str) -> Access:
    """The [access] table of a service that is otherwise right."""
    snapshot, problems = load_all({"a.toml": f'listen = "tcp:7"\ncommand = "/bin/cat"\n[access]\n{text}'})
    assert not problems, problems
    return snapshot.services["a"].access


def at(text: str, **more: object) -> Client:
    return Client(normalised(ipaddress.ip_address(text).packed), **more)  # type: ignore[arg-type]


def check(rules: str, client: Client, allowed: bool, reason: str = "") -> None:
    decision = Rules(access(rules)).judge(client, *MONDAY_NOON)
    assert decision.allowed == allowed, decision
    assert reason in decision.reason


def test_lists() -> None:
    check("", at("10.1.2.3"), True)
    check('allow = ["10.0.0.0/8"]', at("10.1.2.3"), True, "allow 10.0.0.0/8")
    check('allow = ["10.0.0.0/8"]', at("11.1.2.3"), False, "no rule lets it in")
    check('deny = ["10.0.0.0/8"]', at("10.1.2.3"), False, "deny 10.0.0.0/8")
    check('deny = ["10.0.0.0/8"]', at("11.1.2.3"), True)
    check('allow = ["10.0.0.0/8"]\ndeny = ["10.1.0.0/16"]', at("10.1.2.3"), False)
    check('allow = ["10.1.2.3"]\ndeny = ["10.1.0.0/16"]', at("10.1.2.3"), True)
    check('allow = ["10.0.0.0/8"]\ndeny = ["10.0.0.0/8"]', at("10.1.2.3"), False)  # a tie
    check('allow = ["0.0.0.0/0"]', at("::1"), False)
    check('allow = ["0.0.0.0/0", "::/0"]', at("::1"), True)


def test_mapped_addresses_are_ipv4() -> None:  # A8
    check('deny = ["127.0.0.1"]', at("::ffff:127.0.0.1"), False)
    check('deny = ["::ffff:127.0.0.0/104"]', at("127.0.0.1"), False)


def test_users() -> None:  # D10
    root, other = Client(uid=0, groups=frozenset({0})), Client(uid=65534, groups=frozenset({33, 65534}))
    check('allow = ["user:root"]', root, True)
    check('allow = ["user:root"]', other, False)
    check('allow = ["group:www"]', other, True)
    check('allow = ["group:www"]\ndeny = ["user:nobody"]', other, False)
    check('allow = ["user:nobody"]\ndeny = ["group:www"]', other, True)
    check('allow = ["user:0"]', at("127.0.0.1"), False)
    check('allow = ["10.0.0.0/8"]', root, False)


def test_names() -> None:  # A9
    rules = 'allow = [".example.org"]'
    assert Rules(access(rules)).judge(at("10.0.0.1"), 0, 0).needs_names
    check(rules, at("10.0.0.1", names=("a.example.org",)), True, "allow .example.org")
    check(rules, at("10.0.0.1", names=("example.org",)), True)
    check(rules, at("10.0.0.1", names=("badexample.org",)), False)
    check(rules, at("10.0.0.1", names=()), False)
    check(rules, at("10.0.0.1", unknown=True), False)
    check('deny = [".example.org"]', at("10.0.0.1", unknown=True), False, "cannot be found out")
    both = 'allow = [".a.example.org", "10.0.0.1"]\ndeny = [".example.org", "10.0.0.0/8"]'
    assert not Rules(access(both)).judge(at("10.0.0.1"), 0, 0).needs_names  # its address says enough
    check(both, at("10.0.0.1"), True)
    check(both, at("10.0.0.2", names=("x.a.example.org",)), True)
    check(both, at("10.0.0.2", names=("x.example.org",)), False)


@pytest.mark.parametrize(
    ("hours", "weekday", "time", "allowed"),
    [
        ("Mon-Fri 08:00-18:00", 0, "08:00", True), ("Mon-Fri 08:00-18:00", 0, "18:00", False),
        ("Mon-Fri 08:00-18:00", 5, "12:00", False), ("Sat,Sun 10:00-24:00", 6, "23:59", True),
        ("Fri-Mon 10:00-11:00", 6, "10:30", True), ("Fri-Mon 10:00-11:00", 2, "10:30", False),
        ("22:00-06:00", 3, "23:00", True), ("22:00-06:00", 3, "05:59", True), ("22:00-06:00", 3, "06:00", False),
        ("Fri 22:00-06:00", 5, "05:00", True), ("Fri 22:00-06:00", 4, "05:00", False),
    ],
)  # fmt: skip
def test_hours(hours: str, weekday: int, time: str, allowed: bool) -> None:
    minute = int(time[:2]) * 60 + int(time[3:])
    assert Rules(access(f'hours = ["{hours}"]')).judge(at("10.0.0.1"), weekday, minute).allowed == allowed


addresses = st.integers(0, 255).map(lambda last: ipaddress.IPv4Address(0x0A000000 + last))
networks = st.builds(
    lambda address, length: str(ipaddress.ip_network((int(address), length), strict=False)),
    addresses,
    st.integers(22, 32),
)


@given(allow=st.lists(networks, max_size=6), deny=st.lists(networks, max_size=6), client=addresses)
def test_networks_against_a_model(allow: list[str], deny: list[str], client: ipaddress.IPv4Address) -> None:
    matches = [
        (network.prefixlen, not allowed)
        for rules, allowed in ((allow, True), (deny, False))
        for network in map(ipaddress.ip_network, rules)
        if client in network
    ]
    expected = not max(matches)[1] if matches else not allow
    rules = (f"allow = {allow}\n" if allow else "") + f"deny = {deny}"  # an empty `allow` is an error
    found = Rules(access(rules)).judge(at(str(client)), *MONDAY_NOON)
    assert found.allowed == expected
