"""May this activation start? Places, connections per source, rate windows: facts and `now` in, a Verdict out.

Per source comes before global, and a global limit never refuses: it says how long to wait (B1, B2). Nothing here
remembers a refusal, so refused clients cost no memory (B6); sources that have been quiet for a window are forgotten.
"""

from __future__ import annotations

import enum
from collections import deque

from superd.core.spec import Limits, RateSpec

_SOURCES_KEPT = 4096  # before those whose window is over are looked for


class Verdict(enum.Enum):
    ADMITTED = "admitted"
    SOURCE_FULL = "too many connections from this source"
    SOURCE_RATE = "too many activations from this source"


class Window:
    """`rate.count` events in any `rate.per_s` seconds."""

    __slots__ = ("_times", "rate")

    def __init__(self, rate: RateSpec) -> None:
        self.rate = rate
        self._times: deque[float] = deque(maxlen=rate.count)

    def wait_s(self, now: float) -> float:
        """How long until there is room for one more; 0: there is."""
        if len(self._times) < self.rate.count:
            return 0.0
        return max(0.0, self._times[0] + self.rate.per_s - now)

    def take(self, now: float) -> None:
        self._times.append(now)

    def following(self, rate: RateSpec) -> Window:
        """A window of another rate that remembers what this one does."""
        found = Window(rate)
        found._times.extend(self._times)
        return found

    def is_over(self, now: float) -> bool:
        """Whether it holds nothing that still counts."""
        return not self._times or self._times[-1] + self.rate.per_s <= now


class Admission:
    """The counters of one per-connection service. `admit` takes a place, `release` gives it back.

    `full` and `rate` are asked before accepting, for then clients wait; `admit` after it, when the source is known.
    """

    __slots__ = ("_source_rates", "limits", "rate", "sources", "taken")

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.taken = 0
        self.sources: dict[str, int] = {}  # source -> connections at once
        self.rate = None if limits.rate is None else Window(limits.rate)
        self._source_rates: dict[str, Window] = {}

    def change(self, limits: Limits) -> None:
        """Other limits from now on; what is there stays counted, also beyond them."""
        if limits.rate != self.limits.rate:
            was = self.rate
            self.rate = None if limits.rate is None else was.following(limits.rate) if was else Window(limits.rate)
        if limits.rate_per_source != self.limits.rate_per_source:
            rate = limits.rate_per_source
            sources = self._source_rates.items() if rate else ()
            self._source_rates = {name: window.following(rate) for name, window in sources if rate}
        self.limits = limits

    @property
    def full(self) -> bool:
        return self.limits.max_connections is not None and self.taken >= self.limits.max_connections

    @property
    def limits_sources(self) -> bool:
        """Whether it matters what exactly a source is (IPv6 /64, UNIX uid)."""
        return self.limits.max_per_source is not None or self.limits.rate_per_source is not None

    def admit(self, source: str, now: float) -> Verdict:
        verdict = self.admit_source(source, now)
        if verdict is Verdict.ADMITTED:
            self.take(now)
        return verdict

    def admit_source(self, source: str, now: float) -> Verdict:
        """The source's part alone: it counts from now on, and has no place yet."""
        limits = self.limits
        count = self.sources.get(source, 0)
        if limits.max_per_source is not None and count >= limits.max_per_source:
            return Verdict.SOURCE_FULL
        if limits.rate_per_source is not None:
            window = self._source_rates.get(source)
            if window is None:
                self._forget_quiet(now)
                window = self._source_rates[source] = Window(limits.rate_per_source)
            if window.wait_s(now):
                return Verdict.SOURCE_RATE
            window.take(now)
        self.sources[source] = self.sources.get(source, 0) + 1
        return Verdict.ADMITTED

    def take(self, now: float) -> None:
        """A place, and room in the rate, for one whose source is counted."""
        self.taken += 1
        if self.rate is not None:
            self.rate.take(now)

    def restore(self, source: str) -> None:
        """Count a connection that is there already (of an earlier manager)."""
        self.taken += 1
        self.sources[source] = self.sources.get(source, 0) + 1

    def release(self, source: str) -> None:
        self.taken -= 1
        self.leave(source)

    def leave(self, source: str) -> None:
        """One goes that never had a place."""
        left = self.sources[source] - 1
        if left:
            self.sources[source] = left
        else:
            del self.sources[source]

    def _forget_quiet(self, now: float) -> None:
        if len(self._source_rates) >= _SOURCES_KEPT:
            self._source_rates = {name: kept for name, kept in self._source_rates.items() if not kept.is_over(now)}
