"""What is counted, and its text for Prometheus (https://prometheus.io/docs/instrumenting/exposition_formats/).

Counting is adding to a number. Nothing here is made before there is something to count, so that ten thousand services
that nobody uses cost nothing.
"""

from __future__ import annotations

import math
from array import array
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from superd.core.admission import Verdict

START_BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)  # seconds
LIFE_BOUNDS = (0.01, 0.1, 1.0, 10.0, 60.0, 600.0, 3600.0, 86400.0)

SLOT_S, SLOTS = 10.0, 60  # of a History
_SLOT_MAX = 0xFFFF

# Words of lifecycle.Ending.outcome(), systemd's, that have a shorter name here; the others stand as they are.
_RESULTS = {"exit-code": "status", "core-dump": "signal"}

# How the texts begin that clients' refusals are logged with -> the limit.
_REASONS = {
    "full": "full", "access": "access", "nothing came": "first_byte_timeout",
    "proxy_protocol": "proxy_protocol", "tls": "tls",
    Verdict.SOURCE_FULL.value: "max_per_source", Verdict.SOURCE_RATE.value: "rate_per_source",
}  # fmt: skip


class Histogram:
    """How many values were at most each bound; the last count is of those above all of them."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def add(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value


_NONE: Mapping[str, int] = {}  # shared: each count makes another


@dataclass(slots=True)
class Counts:
    """Of one service, from the start of superd; deposited, so that a new manager goes on from there.

    refused  by reason;  exits  by result;  starts, lives  seconds until it ran, seconds that a connection lasted
    """

    refused: Mapping[str, int] = field(default_factory=lambda: _NONE)
    exits: Mapping[str, int] = field(default_factory=lambda: _NONE)
    starts: Histogram | None = None
    lives: Histogram | None = None

    def add_start(self, seconds: float) -> None:
        if self.starts is None:
            self.starts = Histogram(START_BOUNDS)
        self.starts.add(seconds)

    def add_life(self, seconds: float) -> None:
        if self.lives is None:
            self.lives = Histogram(LIFE_BOUNDS)
        self.lives.add(seconds)

    def add_exit(self, result: str) -> None:
        result = _RESULTS.get(result, result)
        self.exits = {**self.exits, result: self.exits.get(result, 0) + 1}

    def add_refusal(self, why: str) -> None:
        reason = refusal_reason(why)
        self.refused = {**self.refused, reason: self.refused.get(reason, 0) + 1}

    def deposit(self) -> dict[str, Any]:
        """As JSON takes it; {} if nothing was counted."""
        found: dict[str, Any] = {name: value for name in ("refused", "exits") if (value := getattr(self, name))}
        for name in ("starts", "lives"):
            histogram: Histogram | None = getattr(self, name)
            if histogram is not None:
                found[name] = [histogram.sum, *histogram.counts]
        return found

    def restore(self, was: dict[str, Any]) -> None:
        """`was`: what deposit() gave. Histograms of a version with other bounds begin anew."""
        self.refused, self.exits = dict(was.get("refused", {})), dict(was.get("exits", {}))
        for name, bounds in (("starts", START_BOUNDS), ("lives", LIFE_BOUNDS)):
            row = was.get(name, ())
            if len(row) == len(bounds) + 2:
                histogram = Histogram(bounds)
                histogram.sum, histogram.counts = row[0], list(row[1:])
                setattr(self, name, histogram)


def refusal_reason(why: str) -> str:
    """One of a few words for a text that may name clients and rules: those are for the log."""
    for start, reason in _REASONS.items():
        if why.startswith(start):
            return reason
    return "other"


class History:
    """How many there were in each of the last SLOTS slots of time. A slot: time divided by SLOT_S, whole."""

    __slots__ = ("_counts", "_newest")

    def __init__(self, slot: int) -> None:
        self._counts = array("H", bytes(2 * SLOTS))
        self._newest = slot

    def add(self, slot: int, count: int) -> None:
        self._move(slot)
        at = slot % SLOTS
        self._counts[at] = min(self._counts[at] + count, _SLOT_MAX)

    def values(self, slot: int) -> list[int]:
        """The oldest first; the last is that of `slot`, which is not over yet."""
        self._move(slot)
        first = (slot + 1) % SLOTS
        return [*self._counts[first:], *self._counts[:first]]

    def _move(self, slot: int) -> None:
        for passed in range(max(self._newest, slot - SLOTS) + 1, slot + 1):
            self._counts[passed % SLOTS] = 0
        self._newest = max(self._newest, slot)


class Sample(NamedTuple):
    labels: Mapping[str, str]
    value: float | Histogram


@dataclass(frozen=True)
class Family:
    """Everything with one name. kind "counter": the name ends in _total; "histogram": the values are Histograms."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    samples: Sequence[Sample]


def format_families(families: Iterable[Family]) -> str:
    """The text format 0.0.4. A family without samples is left out."""
    return "".join(line + "\n" for family in families if family.samples for line in _lines(family))


def _lines(family: Family) -> Iterator[str]:
    yield f"# HELP {family.name} {_escape(family.help)}"
    yield f"# TYPE {family.name} {family.kind}"
    for labels, value in family.samples:
        if not isinstance(value, Histogram):
            yield f"{family.name}{_labels(labels)} {_number(value)}"
            continue
        total = 0
        for bound, count in zip((*value.bounds, float("inf")), value.counts, strict=True):
            total += count
            yield f"{family.name}_bucket{_labels({**labels, 'le': _number(bound)})} {total}"
        yield f"{family.name}_sum{_labels(labels)} {_number(value.sum)}"
        yield f"{family.name}_count{_labels(labels)} {total}"


def _labels(labels: Mapping[str, str]) -> str:
    if not labels:
        return ""
    return "{" + ",".join(f'{name}="{_escape(value, quote=True)}"' for name, value in labels.items()) + "}"


def _escape(text: str, *, quote: bool = False) -> str:
    text = text.encode("utf-8", "backslashreplace").decode().replace("\\", r"\\").replace("\n", r"\n")
    return text.replace('"', r"\"") if quote else text


def _number(value: float) -> str:
    if math.isinf(value):
        return "+Inf" if value > 0 else "-Inf"
    return str(int(value)) if value == int(value) and abs(value) < 1e15 else repr(float(value))
