"""core/lifecycle.py: all of the machine is walked, and the walk is shown to find mistakes; then judge_exit."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from superd.core.lifecycle import (
    IGNORED,
    TRANSITIONS,
    Effect,
    Ending,
    Event,
    History,
    IllegalTransition,
    State,
    judge_exit,
    transition,
)
from superd.core.spec import RateSpec, Restart, RestartPolicy

S, E, F = State, Event, Effect
Table = dict[tuple[State, Event], tuple[State, tuple[Effect, ...]]]

WITH_PROCESS = (S.STARTING, S.READY, S.STOPPING)
OUTSIDE = (S.DISABLED, S.BAD_CONFIG)  # no event moves these: a changed file does


# --- every pair is decided


@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize("event", Event)
def test_each_pair_is_a_transition_or_ignored_or_illegal(state: State, event: Event) -> None:
    pair = (state, event)
    assert not (pair in TRANSITIONS and pair in IGNORED)
    if pair in TRANSITIONS:
        assert transition(state, event) == TRANSITIONS[pair]
    elif pair in IGNORED:
        assert IGNORED[pair]
        assert transition(state, event) == (state, ())
    else:
        with pytest.raises(IllegalTransition, match=f"{event.name} in state {state.name}") as caught:
            transition(state, event)
        assert (caught.value.state, caught.value.event) == pair


@pytest.mark.parametrize("state", sorted(set(State) - set(OUTSIDE), key=lambda state: state.name))
@pytest.mark.parametrize("event", [E.START, E.STOP, E.LISTEN])
def test_an_operator_may_ask_at_any_time(state: State, event: Event) -> None:  # G13
    transition(state, event)


# --- the walk


@dataclass(frozen=True)
class Now:
    """What is so: the state, what the effects have made of the world, and what is wished."""

    state: State
    process: bool = False
    timer: Effect | None = None  # the effect that armed it
    watched: bool = False
    told: Effect | None = None  # TERM or KILL, to the process
    waiting: bool = False  # for listeners that are not bound yet
    wish_up: bool = True
    again: bool = False


class Disagreement(AssertionError):
    """State and world do not agree."""


class World:
    """Carries out effects as manager/service.py does, without the time and the processes."""

    def __init__(self, table: Table, *, on_demand: bool, notify: bool) -> None:
        self.table, self.on_demand, self.notify = table, on_demand, notify
        self.used: set[tuple[State, Event]] = set()

    def dispatch(self, now: Now, event: Event) -> Now:
        if (now.state, event) in self.table:
            self.used.add((now.state, event))
            state, effects = self.table[now.state, event]
        elif (now.state, event) in IGNORED:
            return now
        else:
            raise Disagreement(f"{event.name} can happen: {now}")
        then = dataclasses.replace(now, state=state)
        for effect in effects:
            then = self.carry_out(then, effect)
        return then

    def carry_out(self, now: Now, effect: Effect) -> Now:
        def need(truth: bool) -> None:
            if not truth:
                raise Disagreement(f"{effect.name}: {now}")

        if effect is F.WATCH:
            need(not now.watched and self.on_demand)
            return dataclasses.replace(now, watched=True)
        if effect is F.UNWATCH:
            need(now.watched)
            return dataclasses.replace(now, watched=False)
        if effect is F.SPAWN:
            need(not now.process)
            return dataclasses.replace(now, process=True, told=None)
        if effect in (F.TERM, F.KILL):
            need(now.process)
            return dataclasses.replace(now, told=effect)
        if effect is F.DISARM:
            return dataclasses.replace(now, timer=None)
        if effect is F.ARM_START and not self.notify:
            return now  # nothing to wait for: a timer that is armed stays armed
        return dataclasses.replace(now, timer=effect)

    def moves(self, now: Now) -> Iterator[tuple[str, bool, Callable[[], Now]]]:
        """(what happens, whether an operator does it, what is so afterwards)."""

        def do(event: Event, **changes: Any) -> Callable[[], Now]:
            return lambda: self.dispatch(dataclasses.replace(now, **changes), event)

        if not now.waiting:
            yield "start", True, do(E.START, wish_up=True, again=now.again or now.state is S.STOPPING)
        yield "stop", True, do(E.STOP, wish_up=False, again=False, waiting=False)
        if now.process:
            yield "restart", True, do(E.STOP, wish_up=True, again=True)
        if self.on_demand and now.wish_up and not now.waiting and now.state is not S.BACKOFF:
            yield "listen", True, do(E.LISTEN)
        if now.state is S.BACKOFF:  # listeners have come, or were bound anew while the delay runs (A13, A15)
            yield "listeners", False, do(E.LISTEN if self.on_demand else E.DELAY_OVER, waiting=False)
        if now.watched:
            yield "traffic", False, do(E.TRAFFIC)
        if now.timer is F.ARM_DELAY:
            yield "delay over", False, do(E.DELAY_OVER, timer=None)
            if self.on_demand:  # restart = "no"
                yield "delay over, listen", False, do(E.LISTEN, timer=None)
        elif now.timer is not None:
            yield "timeout", False, do(E.TIMEOUT, timer=None)
        if now.process:
            if self.notify or now.state is S.STARTING:
                yield "ready", False, do(E.READY)
            for event in self.ends(now):
                yield event.value, False, do(event, process=False, again=False)

    def ends(self, now: Now) -> tuple[Event, ...]:
        if now.again:
            return (E.EXIT_AGAIN,)
        if not now.wish_up:
            return (E.EXIT_STOPPED,)
        return (E.EXIT_LISTEN if self.on_demand else E.EXIT_DONE, E.EXIT_RETRY, E.EXIT_GIVE_UP)


def check(now: Now, *, notify: bool) -> None:
    """What must always be so."""
    rules = {
        "polled exactly while listening": now.watched == (now.state is S.LISTENING),
        "never polled while a process has the sockets": not (now.watched and now.process),
        "a process exactly in its three states": now.process == (now.state in WITH_PROCESS),
        "a start that waits is timed": not notify or (now.timer is F.ARM_START) == (now.state is S.STARTING),
        "a time limit for stopping exactly while stopping": (now.timer is F.ARM_STOP) == (now.state is S.STOPPING),
        "a delay only in backoff": now.timer is not F.ARM_DELAY or now.state is S.BACKOFF,
        "backoff ends": now.state is not S.BACKOFF or now.waiting or now.timer is F.ARM_DELAY,
        "told to end exactly while stopping": not now.process or (now.told is not None) == (now.state is S.STOPPING),
        "down as wished": now.wish_up or now.state in (S.STOPPED, S.STOPPING),
        "stopped only by a wish": now.state is not S.STOPPED or not now.wish_up,
    }
    broken = [rule for rule, holds in rules.items() if not holds]
    if broken:
        raise Disagreement(f"{', '.join(broken)}: {now}")


def walk(world: World) -> set[Now]:
    """Everything that can ever be so. Raises Disagreement, which tells the way there."""
    on_demand = world.on_demand
    begin = world.dispatch(Now(S.STOPPED), E.LISTEN if on_demand else E.START)
    ways: dict[Now, tuple[str, ...]] = {begin: ("begin",), Now(S.BACKOFF, waiting=True): ("begin without listeners",)}
    unseen = list(ways)
    while unseen:
        now = unseen.pop()
        alone = False
        try:
            check(now, notify=world.notify)
            for name, by_operator, move in world.moves(now):
                then = move()
                if name == "timeout" and now.state is S.STARTING and then.state is not S.STOPPING:
                    raise Disagreement(f"a start that takes too long goes on: {then}")
                if name == "timeout" and now.state is S.STOPPING and then.told is not F.KILL:
                    raise Disagreement(f"a process that does not stop is let go on: {then}")
                if name == "ready" and now.state is S.STARTING and then.state is not S.READY:
                    raise Disagreement(f"ready and not so: {then}")
                alone |= then != now and not by_operator
                if then not in ways:
                    ways[then] = (*ways[now], name)
                    unseen.append(then)
            if not alone and now.state not in (S.STOPPED, S.DONE, S.FAILED):
                raise Disagreement(f"only an operator gets it out of here: {now}")
        except Disagreement as error:
            raise Disagreement(f"{error}, after {' > '.join(ways[now])}") from None
    return set(ways)


MODES = [{"on_demand": on_demand, "notify": notify} for on_demand in (True, False) for notify in (True, False)]


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_state_and_world_agree_everywhere(mode: dict[str, bool]) -> None:  # G13, B1
    found = walk(World(TRANSITIONS, **mode))
    resting = {S.LISTENING} if mode["on_demand"] else {S.DONE}
    assert {now.state for now in found} == {*WITH_PROCESS, S.STOPPED, S.BACKOFF, S.FAILED, *resting}


# Rows for what the callers never do: a stop passes through STOPPING, and DONE is not for on-demand.
UNUSED = {
    (S.STARTING, E.EXIT_STOPPED), (S.STARTING, E.EXIT_AGAIN), (S.READY, E.EXIT_STOPPED), (S.READY, E.EXIT_AGAIN),
    (S.DONE, E.LISTEN),
}  # fmt: skip


def test_the_walk_uses_every_other_row() -> None:
    worlds = [World(TRANSITIONS, **mode) for mode in MODES]
    for world in worlds:
        walk(world)
    assert set(TRANSITIONS) - set().union(*(world.used for world in worlds)) == UNUSED


def found_in(table: Table) -> bool:
    try:
        for mode in MODES:
            walk(World(table, **mode))
    except Disagreement:
        return True
    return False


PLANTED: list[tuple[tuple[State, Event], tuple[State, tuple[Effect, ...]]]] = [
    ((S.LISTENING, E.TRAFFIC), (S.STARTING, (F.SPAWN, F.ARM_START))),
    ((S.STARTING, E.READY), (S.READY, ())),
    ((S.BACKOFF, E.STOP), (S.STOPPED, ())),
    ((S.BACKOFF, E.DELAY_OVER), (S.STARTING, (F.SPAWN, F.ARM_START))),
    ((S.BACKOFF, E.LISTEN), (S.LISTENING, (F.WATCH,))),
    ((S.READY, E.EXIT_RETRY), (S.BACKOFF, ())),
    ((S.STOPPING, E.TIMEOUT), (S.STOPPING, (F.KILL,))),
    ((S.STOPPING, E.EXIT_STOPPED), (S.STOPPED, ())),
    ((S.STOPPING, E.EXIT_AGAIN), (S.STARTING, (F.DISARM, F.ARM_START))),
    ((S.READY, E.STOP), (S.STOPPED, (F.TERM,))),
]


@pytest.mark.parametrize(("pair", "mistake"), PLANTED, ids=lambda value: f"{value[0]} {value[1]}")
def test_the_walk_finds(pair: tuple[State, Event], mistake: tuple[State, tuple[Effect, ...]]) -> None:
    assert TRANSITIONS[pair] != mistake
    assert found_in({**TRANSITIONS, pair: mistake})


def mutations() -> Iterator[tuple[tuple[State, Event], tuple[State, tuple[Effect, ...]] | None]]:
    """The table with one row missing, one effect missing, or one row leading somewhere else."""
    for pair, (state, effects) in TRANSITIONS.items():
        yield pair, None
        for i in range(len(effects)):
            yield pair, (state, effects[:i] + effects[i + 1 :])
        for other in set(State) - set(OUTSIDE) - {state}:
            yield pair, (other, effects)


def harmless(pair: tuple[State, Event], mistake: tuple[State, tuple[Effect, ...]] | None) -> bool:
    """What the walk need not find: the world stays in order."""
    state, effects = TRANSITIONS[pair]
    if mistake is None or pair in UNUSED:
        return pair in UNUSED
    if mistake[0] is state:  # no timer runs in READY, and arming one disarms the last
        replaced = {F.ARM_STOP, F.ARM_DELAY} & set(effects)
        return set(effects) - set(mistake[1]) == {F.DISARM} and (pair[0] is S.READY or bool(replaced))
    return {state, mistake[0]} == {S.DONE, S.FAILED}  # judge_exit's affair


def test_the_walk_finds_every_single_mistake() -> None:
    missed = []
    for pair, mistake in mutations():
        table = {key: value for key, value in TRANSITIONS.items() if key != pair}
        if mistake is not None:
            table[pair] = mistake
        if not found_in(table) and not harmless(pair, mistake):
            missed.append((pair, mistake))
    assert missed == []


# --- judge_exit

# PROTOCOLS.md 2.7, as it stands there: X restarts. A watchdog's row comes with watchdogs.
RESTART_TABLE = """
                     no  always on-success on-failure on-abnormal on-abort on-watchdog
    clean            -   X      X          -          -           -        -
    unclean-code     -   X      -          X          -           -        -
    unclean-signal   -   X      -          X          X           X        -
    timeout          -   X      -          X          X           -        -
    oom-kill         -   X      -          X          X           -        -
"""
ENDINGS = {
    "clean": [
        Ending(status=0), Ending(signal="HUP"), Ending(signal="INT"), Ending(signal="TERM"), Ending(signal="PIPE"),
        Ending(status=42), Ending(signal="USR1"),
    ],
    "unclean-code": [Ending(status=1), Ending(status=255), Ending(failure="cannot start /x: exec: …")],
    "unclean-signal": [Ending(signal="SEGV"), Ending(signal="KILL"), Ending(signal="USR2")],
    "timeout": [
        Ending(signal="TERM", cause="no READY=1 within 90 s"), Ending(signal="KILL", cause="stop timeout"),
        Ending(status=0, cause="no READY=1 within 90 s"),
    ],
    "oom-kill": [Ending(signal="KILL", cause="out of memory")],
}  # fmt: skip


def rows() -> Iterator[tuple[str, str, bool]]:
    header, *lines = RESTART_TABLE.strip().splitlines()
    for line in lines:
        row, *cells = line.split()
        for policy, cell in zip(header.split(), cells, strict=True):
            yield row, policy, cell == "X"


def judge(
    ending: Ending, *, on_demand: bool = False, wish_up: bool = True, again: bool = False,
    history: History | None = None, now: float = 0.0, **policy: Any,
) -> tuple[Event, float]:  # fmt: skip
    return judge_exit(
        ending, on_demand=on_demand, wish_up=wish_up, again=again, policy=RestartPolicy(**policy),
        history=History() if history is None else history, now=now,
    )  # fmt: skip


@pytest.mark.parametrize(("row", "policy", "restarts"), [*rows()])
def test_restart_table(row: str, policy: Restart, restarts: bool) -> None:
    for ending in ENDINGS[row]:
        event, delay_s = judge(ending, policy=policy, success_status=(0, 42, "USR1"))
        if restarts:
            assert (event, delay_s) == (E.EXIT_RETRY, 0.1), ending
        else:
            assert (event, delay_s) == (E.EXIT_DONE if row == "clean" else E.EXIT_GIVE_UP, 0.0), ending


@pytest.mark.parametrize(("row", "policy", "restarts"), [*rows()])
def test_restart_table_on_demand(row: str, policy: Restart, restarts: bool) -> None:
    """Where the policy says no restart, traffic starts it again: nothing ends in FAILED or DONE (B1)."""
    for ending in ENDINGS[row]:
        event, _ = judge(ending, on_demand=True, policy=policy, success_status=(0, 42, "USR1"))
        assert event is (E.EXIT_RETRY if restarts or ending.failure else E.EXIT_LISTEN), ending


@pytest.mark.parametrize("policy", ["no", "always", "on-failure"])
@pytest.mark.parametrize("ending", [ending for part in ENDINGS.values() for ending in part], ids=str)
@pytest.mark.parametrize("on_demand", [True, False])
def test_a_wish_wins_over_policy(ending: Ending, policy: Restart, on_demand: bool) -> None:
    limit = RateSpec(1, 1000.0)
    history = History(tries=3, starts=History().starts.__class__([0.0, 0.0]))
    fields: dict[str, Any] = {"on_demand": on_demand, "policy": policy, "limit": limit, "history": history}
    assert judge(ending, wish_up=False, **fields) == (E.EXIT_STOPPED, 0.0)
    assert judge(ending, wish_up=True, again=True, **fields) == (E.EXIT_AGAIN, 0.0)
    assert history.tries == 3  # a wish is no failure (G15)
    assert len(history.starts) == 2


def test_delay_doubles_up_to_its_greatest_and_is_forgotten() -> None:  # G14
    history = History()
    died = Ending(status=1, lived_s=0.01)
    policy: dict[str, Any] = {"policy": "on-failure", "delay_s": 0.1, "delay_max_s": 30.0, "history": history}
    delays = [judge(died, **policy)[1] for _ in range(2000)]
    assert delays[:10] == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 25.6, 30.0])
    assert set(delays[10:]) == {30.0}
    assert judge(Ending(status=1, lived_s=29.9), **policy)[1] == 30.0
    assert judge(Ending(status=1, lived_s=30.0), **policy)[1] == 0.1
    assert judge(died, **policy)[1] == 0.1
    assert judge(died, **policy)[1] == 0.2


@pytest.mark.parametrize("on_demand", [True, False])
@pytest.mark.parametrize("ending", [Ending(status=1), Ending(status=0)], ids=str)
def test_a_loop_starts_at_most_ten_times_in_ten_seconds(ending: Ending, on_demand: bool) -> None:  # G14
    history, now, starts = History(), 0.0, 0
    while now <= 10.0:
        event, delay_s = judge(ending, on_demand=on_demand, policy="always", history=history, now=now)
        assert event is E.EXIT_RETRY
        starts += 1
        now += delay_s
    assert starts <= 10


def test_restart_limit() -> None:  # G14, G15
    history = History()
    policy: dict[str, Any] = {"policy": "always", "limit": RateSpec(3, 10.0), "history": history}
    died = Ending(status=1)
    assert [judge(died, now=now, **policy)[0] for now in (0.0, 1.0, 2.0)] == [E.EXIT_RETRY] * 3
    assert judge(died, now=9.0, **policy) == (E.EXIT_GIVE_UP, 0.0)
    # What was given up is no start: only the three count, and they leave the window one by one.
    assert judge(died, now=10.5, **policy)[0] is E.EXIT_RETRY
    assert judge(died, now=10.6, **policy)[0] is E.EXIT_GIVE_UP
    assert judge(died, now=100.0, **policy)[0] is E.EXIT_RETRY
    assert len(history.starts) == 1


def test_no_limit_never_gives_up() -> None:
    history = History()
    for _ in range(1000):
        assert judge(Ending(status=1), policy="always", history=history)[0] is E.EXIT_RETRY
    assert len(history.starts) == 0


def test_on_demand_traffic_left_behind_delays_the_next_try() -> None:  # B7, C1
    history = History()
    left = Ending(status=0, left_traffic=True, lived_s=0.01)
    assert [judge(left, on_demand=True, history=history) for _ in range(3)] == [
        (E.EXIT_RETRY, 0.1),
        (E.EXIT_RETRY, 0.2),
        (E.EXIT_RETRY, 0.4),
    ]
    assert judge(Ending(status=0), on_demand=True, history=history) == (E.EXIT_LISTEN, 0.0)
    assert judge(left, on_demand=True, history=history) == (E.EXIT_RETRY, 0.1)


def test_on_demand_that_cannot_be_started_is_tried_again_with_growing_delay() -> None:  # B7
    history = History()
    broken = Ending(failure="cannot start /x: exec: no such file or directory")
    assert [judge(broken, on_demand=True, history=history)[1] for _ in range(3)] == [0.1, 0.2, 0.4]


def test_on_demand_limit_counts_only_what_is_not_healthy() -> None:
    history = History()
    limit = RateSpec(2, 10.0)
    for _ in range(10):  # traffic that is served is no restart
        assert judge(Ending(status=0), on_demand=True, history=history, limit=limit)[0] is E.EXIT_LISTEN
    left = Ending(status=0, left_traffic=True)
    ends = [judge(left, on_demand=True, history=history, limit=limit)[0] for _ in range(3)]
    assert ends == [E.EXIT_RETRY, E.EXIT_RETRY, E.EXIT_GIVE_UP]


names = st.sampled_from(["HUP", "INT", "TERM", "PIPE", "KILL", "SEGV", "USR1", "RTMIN+3"])
endings = st.one_of(
    st.builds(Ending, status=st.integers(0, 255), cause=st.sampled_from(["", "x"]), left_traffic=st.booleans(),
              lived_s=st.floats(0, 1e9)),
    st.builds(Ending, signal=names, cause=st.sampled_from(["", "x"]), left_traffic=st.booleans()),
    st.builds(Ending, failure=st.just("x")),
)  # fmt: skip


@given(
    st.lists(endings, max_size=20), st.booleans(), st.booleans(), st.booleans(),
    st.sampled_from(["no", "on-success", "on-failure", "on-abnormal", "on-abort", "on-watchdog", "always"]),
    st.none() | st.builds(RateSpec, st.integers(1, 5), st.floats(0.1, 100)),
)  # fmt: skip
def test_the_walk_knows_every_judgement(
    lives: list[Ending], on_demand: bool, wish_up: bool, again: bool, policy: str, limit: RateSpec | None
) -> None:
    """World.ends() says what an exit can become; judge_exit says nothing else, and its delay is in bounds."""
    world = World(TRANSITIONS, on_demand=on_demand, notify=True)
    now = Now(S.READY, process=True, wish_up=wish_up, again=again)
    history = History()
    for i, ending in enumerate(lives):
        event, delay_s = judge(
            ending, on_demand=on_demand, wish_up=wish_up, again=again, history=history, now=float(i),
            policy=cast(Restart, policy), limit=limit,
        )  # fmt: skip
        assert event in world.ends(now)
        assert 0.1 <= delay_s <= 30.0 if event is E.EXIT_RETRY else delay_s == 0.0
        assert limit is None or len(history.starts) <= limit.count


@pytest.mark.parametrize(
    ("ending", "text"),
    [
        (Ending(status=78, lived_s=0.2), "exited with status 78 after 0.2 s"),
        (Ending(signal="KILL", lived_s=12.34), "was killed by KILL after 12.3 s"),
        (Ending(signal="TERM", cause="start timeout"), "was killed by TERM after 0.0 s (start timeout)"),
        (Ending(failure="cannot start /x: exec: no such file"), "cannot start /x: exec: no such file"),
    ],
)
def test_endings_for_people(ending: Ending, text: str) -> None:
    assert str(ending) == text
