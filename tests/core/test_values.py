"""superd.core.values: what each small language takes, and the right form in every refusal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from superd.core.spec import CpuTime, RateSpec
from superd.core.values import (
    LONGEST_S,
    expand,
    expand_runtime,
    format_cpu_time,
    format_duration,
    format_mode,
    format_rate,
    format_signal,
    format_size,
    parse_cpu_time,
    parse_duration,
    parse_mode,
    parse_rate,
    parse_signal,
    parse_size,
    quote,
    split_command,
)

GOOD: list[tuple[Callable[[Any], Any], Any, Any]] = [
    (parse_duration, "500ms", 0.5),
    (parse_duration, "30s", 30.0),
    (parse_duration, "1h30m", 5400.0),
    (parse_duration, "2d", 172800.0),
    (parse_duration, "1.5s", 1.5),
    (parse_duration, "0s", 0.0),
    (parse_size, "64M", 64 << 20),
    (parse_size, "2G", 2 << 30),
    (parse_size, "64MiB", 64 << 20),
    (parse_size, 65536, 65536),
    (parse_cpu_time, "50%", CpuTime(50_000, 100_000)),
    (parse_cpu_time, "200%", CpuTime(200_000, 100_000)),
    (parse_cpu_time, "12.5%", CpuTime(12_500, 100_000)),
    (parse_cpu_time, "0.5%", CpuTime(5000, 1_000_000)),
    (parse_cpu_time, "50000 100000", CpuTime(50_000, 100_000)),
    (parse_cpu_time, "20000 50000", CpuTime(20_000, 50_000)),
    (parse_mode, "0660", 0o660),
    (parse_mode, "660", 0o660),
    (parse_rate, "50/1s", RateSpec(50, 1.0)),
    (parse_rate, "10/1m", RateSpec(10, 60.0)),
    (parse_signal, "TERM", 15),
    (parse_signal, "SIGTERM", 15),
    (parse_signal, "RTMIN+3", 37),
    (split_command, "git daemon  --inetd", ["git", "daemon", "--inetd"]),
    (split_command, r"""a 'b c' "d \" e" f\ g h''i """, ["a", "b c", 'd " e', "f g", "hi"]),
    (split_command, "a '' \"\"", ["a", "", ""]),
    (split_command, "sh -c 'a | b; $(c) `d` > e & (f)'", ["sh", "-c", "a | b; $(c) `d` > e & (f)"]),
    (split_command, "a ${HOME:-b c}/d", ["a", "${HOME:-b c}/d"]),
    (split_command, "", []),
]

BAD: list[tuple[Callable[[Any], Any], Any, str]] = [
    (parse_duration, 30, '"30s"'),
    (parse_duration, "30", 'write "30s"'),
    (parse_duration, "30 sec", 'write "30s"'),
    (parse_duration, "5 parsecs", '"1h30m"'),
    (parse_duration, -1, '"500ms"'),
    (parse_duration, float("nan"), '"500ms"'),
    (parse_duration, 1e308, '"500ms"'),
    (parse_duration, "99999d", "3650d"),
    (parse_duration, "30m1h", '"1h30m"'),
    (parse_duration, True, '"30s"'),
    (parse_duration, "", '"30s"'),
    (parse_duration, "٣s", '"30s"'),
    (parse_cpu_time, 50, '50 is no CPU time: write "50%" of one CPU'),
    (parse_cpu_time, "50", '"50000 100000"'),
    (parse_cpu_time, "0%", "is too small"),
    (parse_cpu_time, "0.05%", "is too small"),
    (parse_cpu_time, "999 100000", "is too small"),
    (parse_cpu_time, "50000 999", "1000 to 1000000 microseconds"),
    (parse_cpu_time, "50000 1000001", "1000 to 1000000 microseconds"),
    (parse_size, "64MB", 'write "64M"'),
    (parse_size, "64k", 'write "64K"'),
    (parse_size, "65536", "write 65536"),
    (parse_size, -1, "powers of 1024"),
    (parse_size, True, "powers of 1024"),
    (parse_size, 1 << 63, "powers of 1024"),
    (parse_size, "9999999999T", "8388608T"),
    (parse_mode, 660, '"0660"'),
    (parse_mode, 0o660, '"0660"'),
    (parse_mode, "0888", '"0660"'),
    (parse_rate, "50", 'write "50/1s"'),
    (parse_rate, 50, 'write "50/1s"'),
    (parse_rate, "50/s", 'write "50/1s"'),
    (parse_rate, "0/1s", '"off"'),
    (parse_rate, "5/1x", '"30s"'),
    (parse_signal, 15, '"TERM"'),
    (parse_signal, "term", 'write "TERM"'),
    (parse_signal, "RTMIN+99", '"TERM"'),
    (split_command, "a | b", '["/bin/sh", "-c", "a | b"]'),
    (split_command, 'a > "b"', r'["/bin/sh", "-c", "a > \"b\""]'),
    (split_command, "a && b", '["/bin/sh", "-c"'),
    (split_command, "a; b", '["/bin/sh", "-c"'),
    (split_command, "a $(b)", "substitution"),
    (split_command, 'a "$(b)"', "substitution"),
    (split_command, "a `b`", "substitution"),
    (split_command, "a 'b", "quotation mark (')"),
    (split_command, 'a "b', 'quotation mark (")'),
    (split_command, "a \\", "backslash"),
]


@pytest.mark.parametrize(("parse", "text", "value"), GOOD)
def test_good(parse: Callable[[Any], Any], text: Any, value: Any) -> None:
    assert parse(text) == value


@pytest.mark.parametrize(("parse", "text", "right"), BAD)
def test_refused_with_the_right_form(parse: Callable[[Any], Any], text: Any, right: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse(text)
    assert right in str(caught.value)


MICROS = st.integers(0, LONGEST_S * 1_000_000).map(lambda micros: micros / 1_000_000)


@given(MICROS)
def test_duration_round_trip(seconds: float) -> None:
    assert parse_duration(format_duration(seconds)) == seconds


@given(st.integers(0, 2**63 - 1))
def test_size_round_trip(size: int) -> None:
    text = format_size(size)
    assert parse_size(int(text) if text.isdigit() else text) == size


@given(st.integers(1000, 10**9), st.integers(1000, 10**6))
@example(50_000, 100_000)
@example(5000, 1_000_000)
def test_cpu_time_round_trip(quota: int, period: int) -> None:
    time = CpuTime(quota, period)
    assert parse_cpu_time(format_cpu_time(time)) == time
    assert format_cpu_time(CpuTime(50_000, 100_000)) == "50%" and format_cpu_time(CpuTime(33_333, 100_000)) == "33.333%"


@given(st.integers(1, 10**9 - 1), MICROS.filter(bool))
def test_rate_round_trip(count: int, per_s: float) -> None:
    assert parse_rate(format_rate(RateSpec(count, per_s))) == RateSpec(count, per_s)


@given(st.integers(0, 0o7777))
def test_mode_round_trip(mode: int) -> None:
    assert parse_mode(format_mode(mode)) == mode


@pytest.mark.parametrize("number", range(1, 65))
def test_signal_round_trip(number: int) -> None:
    if format_signal(number) != str(number):  # 32 and 33 are the C library's own
        assert parse_signal(format_signal(number)) == number


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.lists(st.text()) | st.just(10**5000)


@given(SCALARS)
def test_nothing_but_value_error(value: Any) -> None:
    for parse in (parse_duration, parse_size, parse_mode, parse_rate, parse_signal):
        try:
            parse(value)
        except ValueError as error:
            assert len(str(error)) < 400
    quote(value)


@given(st.text(alphabet="ab \"'\\$`{}()|\n-:") | st.text())
def test_split_command_never_crashes(text: str) -> None:
    try:
        words = split_command(text)
    except ValueError:
        return
    assert sum(map(len, words)) <= len(text)


@given(st.lists(st.text(alphabet=st.characters(exclude_characters="'\0"))))
def test_split_command_undoes_quoting(words: list[str]) -> None:
    assert split_command(" ".join(f"'{word}'" for word in words)) == words


OWN = {"name": "web", "instance": "a"}
ENVIRON = {"HOME": "/root", "EMPTY": "", "DOLLAR": "a$${port}$", "BYTE": "\udcff"}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("${HOME}/x", "/root/x"),
        ("${name}-${instance}", "web-a"),
        ("${NONE:-a b}", "a b"),
        ("${EMPTY:-d}", "d"),
        ("${EMPTY}", ""),
        ("$${HOME}", "${HOME}"),
        ("$HOME $$ $", "$HOME $$ $"),
        ("${DOLLAR}", "a$${port}$"),
    ],
)
def test_expand(text: str, value: str) -> None:
    assert expand(text, OWN, ENVIRON) == value
    later = expand(text, OWN, ENVIRON, runtime=lambda what: None)
    assert expand_runtime(later, {"web": 80}, {}) == value


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("${NONE}", "${NONE:-default}"),
        ("${port}", "run time"),
        ("${fd:x}", "run time"),
        ("${1}", "$${"),
        ("${}", "$${"),
        ("${open", "without }"),
        ("${BYTE}", "UTF-8"),
    ],
)
def test_expand_refuses(text: str, said: str) -> None:
    with pytest.raises(ValueError) as caught:
        expand(text, OWN, ENVIRON)
    assert said in str(caught.value)


def test_expand_runtime() -> None:
    seen: list[str] = []
    later = expand("-p ${port} ${port:b} ${fd:c} $${x} ${DOLLAR}${port}", OWN, ENVIRON, runtime=seen.append)
    assert seen == ["port", "port:b", "fd:c", "port"]
    assert expand_runtime(later, {"a": 1, "b": 2}, {"c": 3}) == "-p 1 2 3 ${x} a$${port}$1"


@given(st.text(alphabet="${}:-aport") | st.text())
def test_expand_never_crashes(text: str) -> None:
    try:
        later = expand(text, OWN, ENVIRON, runtime=lambda what: None)
    except ValueError:
        return
    try:
        expand_runtime(later, {"a": 1}, {"a": 3})
    except KeyError:  # a name that the loader would have refused
        pass


@given(st.text(st.characters(exclude_categories=["Cs"])), st.text(alphabet="${}p"), st.text(alphabet="${} "))
def test_what_a_variable_holds_stays_as_it_is(value: str, before: str, after: str) -> None:
    try:
        around = [expand(part, {}, {}) for part in (before.rstrip("$"), after)]
        later = expand(f"{before.rstrip('$')}${{V}}{after}", {}, {"V": value}, runtime=lambda what: None)
    except ValueError:
        return
    assert expand_runtime(later, {}, {}) == around[0] + value + around[1]
