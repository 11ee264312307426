"""core/admission.py against the plainest model there is: a list of everything that happened."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from superd.core.admission import Admission, Verdict, Window
from superd.core.spec import Limits, RateSpec

ADMITTED, SOURCE_FULL, SOURCE_RATE = Verdict.ADMITTED, Verdict.SOURCE_FULL, Verdict.SOURCE_RATE
times = st.lists(st.integers(0, 40), max_size=60).map(sorted)


@given(count=st.integers(1, 5), per_s=st.integers(1, 10), moments=times)
def test_a_window_never_holds_more_than_its_count(count: int, per_s: int, moments: list[int]) -> None:  # B2
    window = Window(RateSpec(count, per_s))
    taken: list[int] = []
    for now in moments:
        inside = [moment for moment in taken if moment > now - per_s]
        wait_s = window.wait_s(now)
        assert (wait_s == 0) == (len(inside) < count)
        if wait_s:
            assert window.wait_s(now + wait_s) == 0  # it heals by itself, when it says (B1)
            assert window.wait_s(now + wait_s - 0.5) > 0
        else:
            window.take(now)
            taken.append(now)


steps = st.lists(st.tuples(st.sampled_from("abc"), st.booleans(), st.integers(0, 3)), max_size=80)


@given(
    per_source=st.none() | st.integers(1, 3),
    rate=st.none() | st.builds(RateSpec, st.integers(1, 4), st.integers(1, 5)),
    steps=steps,
)
def test_admission_against_a_list(
    per_source: int | None, rate: RateSpec | None, steps: list[tuple[str, bool, int]]
) -> None:  # B3, B5
    admission = Admission(Limits(max_connections=1000, max_per_source=per_source, rate_per_source=rate))
    live: list[str] = []
    log: list[tuple[str, int]] = []
    now = 0
    for source, ends, later in steps:
        now += later
        if ends and source in live:
            live.remove(source)
            admission.release(source)
            continue
        if per_source is not None and live.count(source) >= per_source:
            expected = SOURCE_FULL
        elif rate and sum(name == source and moment > now - rate.per_s for name, moment in log) >= rate.count:
            expected = SOURCE_RATE
        else:
            expected = ADMITTED
            live.append(source)
            log.append((source, now))
        assert admission.admit(source, now) is expected
        assert admission.taken == len(live)
        assert admission.sources == {name: live.count(name) for name in set(live)}


def test_full_is_about_places_not_sources() -> None:  # B4
    assert not Admission(Limits(max_connections=None)).full
    admission = Admission(Limits(max_connections=2))
    assert admission.admit("a", 0) is admission.admit("b", 0) is ADMITTED
    assert admission.full
    admission.release("a")
    assert not admission.full


def test_a_refusal_leaves_nothing_behind() -> None:  # B6
    admission = Admission(Limits(max_connections=10, max_per_source=1))
    admission.admit("a", 0)
    for _ in range(100):
        assert admission.admit("a", 0) is SOURCE_FULL
    assert (admission.taken, admission.sources) == (1, {"a": 1})


def test_quiet_sources_are_forgotten() -> None:  # B6
    admission = Admission(Limits(rate_per_source=RateSpec(1, 1.0)))
    for number in range(20_000):
        source = f"192.0.2.{number}"
        assert admission.admit(source, number) is ADMITTED
        admission.release(source)
    assert len(admission._source_rates) <= 4096


def test_a_place_that_nobody_took_cannot_be_given_back() -> None:
    with pytest.raises(KeyError):
        Admission(Limits()).release("a")
