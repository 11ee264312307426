"""Who may connect: the rules of one service and what is known of a client -> a Decision. No I/O, no clock.

The longest match decides, a tie is a deny. An address in full is longer than a host name, a name longer than a
network; of two names or networks the longer one counts, and a user more than a group. Where nothing matches, an
`allow` list means no and its absence yes. Outside of `hours` nobody may connect.

Host names come from outside and late: a Decision may say that it needs them. Only names that lead back to the client's
address may be given (forward-confirmed); what cannot be found out is no reason to let anybody in (A9).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from superd.core.spec import Access, AccessRule

MAPPED = bytes(10) + b"\xff\xff"
_NOBODY = "no rule lets it in"


class Client(NamedTuple):
    """What is known of a client.

    address  packed, 4 or 16 bytes; None: it has none
    uid      of a UNIX client, and its groups
    names    confirmed host names in lower case; None: not asked for yet
    unknown  they were asked for, and it cannot be found out
    """

    address: bytes | None = None
    uid: int | None = None
    groups: frozenset[int] = frozenset()
    names: tuple[str, ...] | None = None
    unknown: bool = False


class Decision(NamedTuple):
    """reason: the rule that decided, as it is written, or why there is none."""

    allowed: bool
    reason: str
    needs_names: bool = False


def normalised(address: bytes) -> bytes:
    """An IPv4-mapped address is IPv4 (A8)."""
    return address[12:] if len(address) == 16 and address.startswith(MAPPED) else address


class Rules:
    """The `[access]` table of a service, made for many questions: a dict for each length of a network."""

    def __init__(self, access: Access) -> None:
        self.access = access
        self._networks: dict[tuple[int, int], dict[int, tuple[AccessRule, bool]]] = {}  # by (bytes, bits)
        self._others: list[tuple[AccessRule, bool]] = []
        # deny comes last and replaces an equal allow: a tie is a deny.
        for rules, allowed in ((access.allow, True), (access.deny, False)):
            for rule in rules:
                if isinstance(rule.value, bytes):
                    place = self._networks.setdefault((len(rule.value), rule.length), {})
                    place[_prefix(rule.value, rule.length)] = rule, allowed
                else:
                    self._others.append((rule, allowed))
        self._lengths = sorted(self._networks, reverse=True)
        self._asks_names = any(rule.kind == "host" for rule, _ in self._others)
        self._denies_names = any(rule.kind == "host" and not allowed for rule, allowed in self._others)

    def judge(self, client: Client, weekday: int, minute: int) -> Decision:
        """weekday: 0 is Monday; minute: since midnight; both local."""
        if self.access.hours and not any(
            _is_inside(span.days, span.start, span.end, weekday, minute) for span in self.access.hours
        ):
            return Decision(False, f"hours {', '.join(span.text for span in self.access.hours)}")
        found = list(self._matches(client))
        exact = any(rank == _FULL for rank, _, _, _ in found)
        if self._asks_names and client.address is not None and not exact:
            if client.unknown and self._denies_names:
                return Decision(False, "its name cannot be found out")
            if client.names is None and not client.unknown:
                return Decision(False, "its name must be known", needs_names=True)
        if not found:
            return Decision(not self.access.allow, _NOBODY if self.access.allow else "no rule keeps it out")
        _, _, allowed, rule = max(found, key=lambda match: (match[0], match[1], not match[2]))
        return Decision(allowed, f"{'allow' if allowed else 'deny'} {rule.text}")

    def _matches(self, client: Client) -> Iterator[tuple[int, int, bool, AccessRule]]:
        """(rank, length, allowed, rule)"""
        if client.address is not None:
            size = len(client.address)
            for of, length in self._lengths:
                if of == size:
                    match = self._networks[of, length].get(_prefix(client.address, length))
                    if match is not None:
                        yield (_FULL if length == size * 8 else _NETWORK), length, match[1], match[0]
                        break  # the rest is shorter
        for rule, allowed in self._others:
            if rule.kind == "user" and rule.value == client.uid:
                yield _FULL, 0, allowed, rule
            elif rule.kind == "group" and rule.value in client.groups:
                yield _NETWORK, 0, allowed, rule
            elif rule.kind == "host" and any(f".{name}".endswith(str(rule.value)) for name in client.names or ()):
                yield _NAME, len(str(rule.value)), allowed, rule


_NETWORK, _NAME, _FULL = range(3)


def _prefix(address: bytes, length: int) -> int:
    return int.from_bytes(address, "big") >> (len(address) * 8 - length)


def _is_inside(days: tuple[int, ...], start: int, end: int, weekday: int, minute: int) -> bool:
    if start < end:
        return weekday in days and start <= minute < end
    return (weekday in days and minute >= start) or ((weekday - 1) % 7 in days and minute < end)
