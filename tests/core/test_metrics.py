"""core/metrics.py: counting, keeping, and the text, read by Prometheus' own parser."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from superd.core.admission import Verdict
from superd.core.metrics import (
    LIFE_BOUNDS,
    SLOTS,
    Counts,
    Family,
    Histogram,
    History,
    Sample,
    format_families,
    refusal_reason,
)


def parsed(*families: Family) -> dict[str, dict[tuple[tuple[str, str], ...], float]]:
    found: dict[str, dict[tuple[tuple[str, str], ...], float]] = {}
    for family in text_string_to_metric_families(format_families(families)):
        for sample in family.samples:
            found.setdefault(sample.name, {})[tuple(sorted(sample.labels.items()))] = sample.value
    return found


@given(st.text(st.characters(exclude_categories=["Cs"])), st.floats(allow_nan=False))
def test_any_label_and_value_come_back(label: str, value: float) -> None:
    found = parsed(Family("x_bytes", "gauge", "A line\nand \\ more.", [Sample({"a": label}, value)]))
    assert found == {"x_bytes": {(("a", label),): value}}


def test_a_histogram_is_cumulative() -> None:
    histogram = Histogram((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 99.0):
        histogram.add(value)
    found = parsed(Family("x_seconds", "histogram", "How long.", [Sample({"s": "a"}, histogram)]))
    bounds = {dict(labels)["le"]: value for labels, value in found["x_seconds_bucket"].items()}
    assert bounds == {"1": 2, "2": 3, "+Inf": 4}
    assert found["x_seconds_count"] == {(("s", "a"),): 4}
    assert found["x_seconds_sum"] == {(("s", "a"),): 102.0}


def test_nothing_for_nothing() -> None:
    assert format_families([Family("x", "gauge", "Nothing.", [])]) == ""
    assert Counts().deposit() == {}


def test_counts_survive_a_deposit() -> None:
    counts = Counts()
    counts.add_start(0.002)
    counts.add_life(5.0)
    counts.add_life(1e9)
    counts.add_exit("exit-code")
    counts.add_exit("success")
    counts.add_refusal("full")
    again = Counts()
    again.restore(counts.deposit())
    assert again.deposit() == counts.deposit()
    assert again.exits == {"status": 1, "success": 1}
    assert again.lives is not None and again.lives.counts[-1] == 1
    again.add_life(1.0)
    assert counts.lives is not None and sum(counts.lives.counts) == 2, "they share nothing"


def test_a_deposit_of_another_version_is_no_harm() -> None:
    counts = Counts()
    counts.restore({"lives": [1.0, *[0] * (len(LIFE_BOUNDS) + 5)], "something": 1})
    assert counts.deposit() == {}


def test_reasons_name_no_client() -> None:
    assert refusal_reason("access: deny 10.0.0.0/8") == "access"
    assert refusal_reason("nothing came within first_byte_timeout = 10 s") == "first_byte_timeout"
    assert [refusal_reason(one.value) for one in Verdict][1:] == ["max_per_source", "rate_per_source"]
    assert refusal_reason("port 7 may be a service of this kind") == "other"


@given(st.lists(st.tuples(st.integers(0, 3 * SLOTS), st.integers(0, 90_000)), max_size=80))
def test_a_history_is_what_a_dict_would_be(steps: list[tuple[int, int]]) -> None:
    history, model, slot = History(5), dict[int, int](), 5
    for pause, count in steps:
        slot += pause
        history.add(slot, count)
        model[slot] = min(model.get(slot, 0) + count, 0xFFFF)
    slot += 3
    assert history.values(slot) == [model.get(one, 0) for one in range(slot - SLOTS + 1, slot + 1)]
