"""core/lifecycle.py: all of the machine is walked, and the walk is shown to find mistakes; then judge_exit."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import pytest
import update_manual
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
    told: Effect | Event | None = None  # TERM, ABORT or KILL, to the process; LEAVING, by it
    post: bool = False  # the process is a command of stop_post
    waiting: bool = False  # for listeners that are not bound yet
    wish_up: bool = True
    again: bool = False


class Disagreement(AssertionError):
    """State and world do not agree."""


class World:
    """Carries out effects as manager/process.py does, without the time and the processes."""

    def __init__(self, table: Table, *, on_demand: bool, timed: bool, stop_post: bool) -> None:
        self.table, self.on_demand, self.timed, self.stop_post = table, on_demand, timed, stop_post
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
        if effect is F.POST:
            need(not now.process and self.stop_post)
            return dataclasses.replace(now, process=True, told=None, post=True)
        if effect in (F.TERM, F.ABORT, F.KILL):
            need(now.process)
            return dataclasses.replace(now, told=effect)
        if effect is F.DISARM:
            return dataclasses.replace(now, timer=None)
        if effect is F.ARM_START and not self.timed:
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
        if now.state is S.BACKOFF and now.waiting:
            yield "what it requires is there", False, do(E.START, waiting=False)
        if not now.process and now.state is not S.STOPPING:
            yield "start, not yet", True, do(E.WAIT, wish_up=True, waiting=True)
        if now.watched or now.timer is F.ARM_DELAY:
            yield "traffic or delay over, not yet", False, do(E.WAIT, waiting=True)
        if now.process and now.again and now.post == self.stop_post:
            stopped = do(E.EXIT_STOPPED, process=False, again=False, post=False, waiting=True)
            yield "again, not yet", False, lambda: self.dispatch(stopped(), E.WAIT)
        if now.timer is F.ARM_DELAY:
            yield "delay over", False, do(E.DELAY_OVER, timer=None)
            if self.on_demand:  # restart = "no"
                yield "delay over, listen", False, do(E.LISTEN, timer=None)
        elif now.timer is not None:
            yield "timeout", False, do(E.TIMEOUT, timer=None)
        if now.process and not now.post:
            if self.timed or now.state is S.STARTING:
                yield "ready", False, do(E.READY)
            yield "fail", False, do(E.FAIL)
            if now.state is not S.STOPPING:
                yield "watchdog", False, do(E.WATCHDOG)
                yield "leaving", False, do(E.LEAVING, told=E.LEAVING)
            if self.stop_post:
                yield "ended", False, do(E.ENDED, process=False)
        if now.process and now.post == self.stop_post:
            for event in self.ends(now):
                yield event.value, False, do(event, process=False, again=False, post=False)

    def ends(self, now: Now) -> tuple[Event, ...]:
        if now.again:
            return (E.EXIT_AGAIN,)
        if not now.wish_up:
            return (E.EXIT_STOPPED,)
        at_once = (E.EXIT_AGAIN,) if now.state is S.STOPPING else ()  # it was unhealthy
        return (E.EXIT_LISTEN if self.on_demand else E.EXIT_DONE, E.EXIT_RETRY, E.EXIT_GIVE_UP, *at_once)


def check(now: Now, *, timed: bool) -> None:
    """What must always be so."""
    rules = {
        "polled exactly while listening": now.watched == (now.state is S.LISTENING),
        "never polled while a process has the sockets": not (now.watched and now.process),
        "a process exactly in its three states": now.process == (now.state in WITH_PROCESS),
        "a start that waits is timed": not timed or (now.timer is F.ARM_START) == (now.state is S.STARTING),
        "a time limit for stopping exactly while stopping": (now.timer is F.ARM_STOP) == (now.state is S.STOPPING),
        "a delay only in backoff": now.timer is not F.ARM_DELAY or now.state is S.BACKOFF,
        "backoff ends": now.state is not S.BACKOFF or now.waiting or now.timer is F.ARM_DELAY,
        "who waits is in backoff": not now.waiting or now.state is S.BACKOFF,
        "told to end exactly while stopping": (
            not now.process or now.post or (now.told is not None) == (now.state is S.STOPPING)
        ),
        "stop_post only while stopping": not now.post or (now.process and now.state is S.STOPPING),
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
            check(now, timed=world.timed)
            for name, by_operator, move in world.moves(now):
                then = move()
                if name == "timeout" and now.state is S.STARTING and then.state is not S.STOPPING:
                    raise Disagreement(f"a start that takes too long goes on: {then}")
                if name == "timeout" and now.state is S.STOPPING and then.told is not F.KILL:
                    raise Disagreement(f"a process that does not stop is let go on: {then}")
                if name == "fail" and then.state is not S.STOPPING:
                    raise Disagreement(f"what must not go on does: {then}")
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


MODES = [
    dict(zip(("on_demand", "timed", "stop_post"), choice, strict=True))
    for choice in itertools.product((True, False), repeat=3)
]


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
    ((S.READY, E.FAIL), (S.STOPPING, (F.ARM_STOP,))),
    ((S.READY, E.ENDED), (S.STOPPING, (F.POST,))),
    ((S.STOPPING, E.ENDED), (S.STOPPING, (F.ARM_STOP,))),
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
        if pair == (S.STOPPING, E.ENDED) and F.POST in mistake[1]:
            return True  # the time limit that runs already is not renewed
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

# PROTOCOLS.md 2.7, as it stands there: X restarts.
RESTART_TABLE = """
                     no  always on-success on-failure on-abnormal on-abort on-watchdog
    clean            -   X      X          -          -           -        -
    unclean-code     -   X      -          X          -           -        -
    unclean-signal   -   X      -          X          X           X        -
    timeout          -   X      -          X          X           -        -
    watchdog         -   X      -          X          X           -        X
    oom-kill         -   X      -          X          X           -        -
"""
ENDINGS = {
    "clean": [
        Ending(status=0), Ending(signal="HUP"), Ending(signal="INT"), Ending(signal="TERM"), Ending(signal="PIPE"),
        Ending(status=42), Ending(signal="USR1"),
    ],
    "unclean-code": [
        Ending(status=1), Ending(status=255), Ending(failure="cannot start /x: exec: …"),
        Ending(failure="start_pre: /x exited with status 1", result="exit-code"),
        Ending(signal="TERM", cause="start_post: /x exited with status 1", result="exit-code"),
        Ending(status=0, unready=True),
    ],
    "unclean-signal": [
        Ending(signal="SEGV"), Ending(signal="KILL"), Ending(signal="USR2"), Ending(signal="SEGV", dumped=True),
        Ending(failure="start_pre: /x was killed by KILL", result="signal"),
    ],
    "timeout": [
        Ending(signal="TERM", cause="no READY=1 within 90 s"), Ending(signal="KILL", cause="stop timeout"),
        Ending(status=0, cause="no READY=1 within 90 s"),
    ],
    "watchdog": [
        Ending(signal="ABRT", cause="no WATCHDOG=1 within 2 s", result="watchdog"),
        Ending(status=0, cause="no WATCHDOG=1 within 2 s", result="watchdog"),
    ],
    "oom-kill": [Ending(signal="KILL", cause="out of memory", result="oom-kill")],
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


def test_stopped_for_idleness_is_no_failure() -> None:
    """However it ended, and whatever the policy says; orders count all the same."""
    for ending in (Ending(status=0), Ending(status=3), Ending(signal="KILL")):
        for policy, limit in (("always", RateSpec(1, 60)), ("no", None)):
            rules = RestartPolicy(policy, limit=limit)  # type: ignore[arg-type]
            history = History(tries=3, starts=deque([0.0]))
            for wish_up, again, event in (
                (True, False, E.EXIT_LISTEN), (False, False, E.EXIT_STOPPED), (True, True, E.EXIT_AGAIN),
            ):  # fmt: skip
                found = judge_exit(
                    ending, on_demand=True, wish_up=wish_up, again=again, policy=rules, history=history, now=1.0,
                    idle=True,
                )  # fmt: skip
                assert found == (event, 0.0)
            assert history.tries == 0 and len(history.starts) == 1


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


OK = (0, 42, "USR1")


@pytest.mark.parametrize(
    ("ending", "told", "status"),
    [
        (Ending(status=0), {"SERVICE_RESULT": "success", "EXIT_CODE": "exited", "EXIT_STATUS": "0"}, 0),
        (Ending(status=42), {"SERVICE_RESULT": "success", "EXIT_CODE": "exited", "EXIT_STATUS": "42"}, 42),
        (Ending(status=3), {"SERVICE_RESULT": "exit-code", "EXIT_CODE": "exited", "EXIT_STATUS": "3"}, 3),
        (Ending(signal="TERM"), {"SERVICE_RESULT": "success", "EXIT_CODE": "killed", "EXIT_STATUS": "TERM"}, 143),
        (Ending(signal="KILL"), {"SERVICE_RESULT": "signal", "EXIT_CODE": "killed", "EXIT_STATUS": "KILL"}, 137),
        (Ending(signal="SEGV", dumped=True),
         {"SERVICE_RESULT": "core-dump", "EXIT_CODE": "dumped", "EXIT_STATUS": "SEGV"}, 139),
        (Ending(status=0, cause="too long", result="timeout"),
         {"SERVICE_RESULT": "timeout", "EXIT_CODE": "exited", "EXIT_STATUS": "0"}, 1),
        (Ending(failure="cannot start /x: exec: no such file"), {"SERVICE_RESULT": "exit-code"}, 1),
    ],
)  # fmt: skip
def test_what_stop_post_and_an_essential_service_tell(  # P6 H6
    ending: Ending, told: dict[str, str], status: int
) -> None:
    assert ending.environment(OK) == told
    assert ending.exit_status(OK) == status


names = st.sampled_from(["HUP", "INT", "TERM", "PIPE", "KILL", "SEGV", "USR1", "RTMIN+3"])
endings = st.one_of(
    st.builds(Ending, status=st.integers(0, 255), cause=st.sampled_from(["", "x"]), left_traffic=st.booleans(),
              lived_s=st.floats(0, 1e9), result=st.just("")),
    st.builds(Ending, signal=names, cause=st.sampled_from(["", "x"]), left_traffic=st.booleans(),
              result=st.sampled_from(["", "timeout", "watchdog", "something new"])),
    st.builds(Ending, failure=st.just("x"), result=st.sampled_from(["", "exit-code", "signal", "resources"])),
    st.builds(Ending, status=st.integers(0, 1), unready=st.booleans(), at_once=st.booleans()),
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
    world = World(TRANSITIONS, on_demand=on_demand, timed=True, stop_post=False)
    history = History()
    for i, ending in enumerate(lives):
        now = Now(S.STOPPING if ending.at_once else S.READY, process=True, wish_up=wish_up, again=again)
        event, delay_s = judge(
            ending, on_demand=on_demand, wish_up=wish_up, again=again, history=history, now=float(i),
            policy=cast(Restart, policy), limit=limit,
        )  # fmt: skip
        assert event in world.ends(now)
        assert 0.1 <= delay_s <= 30.0 if event is E.EXIT_RETRY else delay_s == 0.0
        assert limit is None or len(history.starts) <= limit.count


def test_unhealthy_is_started_at_once_as_far_as_the_limit_allows() -> None:
    history, ending = History(), Ending(signal="TERM", cause="unhealthy: 3 of 3 checks failed", at_once=True)
    policy: dict[str, Any] = {"policy": "no", "limit": RateSpec(2, 10.0), "history": history}
    assert [judge(ending, now=now, **policy) for now in (0.0, 1.0)] == [(E.EXIT_AGAIN, 0.0)] * 2
    assert judge(ending, now=2.0, **policy) == (E.EXIT_GIVE_UP, 0.0)
    assert judge(ending, now=2.0, wish_up=False, **policy)[0] is E.EXIT_STOPPED
    assert judge(ending, now=11.0, on_demand=True, **policy)[0] is E.EXIT_AGAIN


@pytest.mark.parametrize(
    ("ending", "text"),
    [
        (Ending(status=78, lived_s=0.2), "exited with status 78 after 0.2 s"),
        (Ending(signal="KILL", lived_s=12.34), "was killed by KILL after 12.3 s"),
        (Ending(signal="TERM", cause="start timeout"), "was killed by TERM after 0.0 s (start timeout)"),
        (Ending(status=0, lived_s=0.2, unready=True), "exited with status 0 after 0.2 s, before it was ready"),
        (Ending(failure="cannot start /x: exec: no such file"), "cannot start /x: exec: no such file"),
    ],
)
def test_endings_for_people(ending: Ending, text: str) -> None:
    assert str(ending) == text


# --- long walks against a plain model


@dataclass
class Model:
    """What an operator would say of a service, without table, effects or judgement: the four things that count."""

    on_demand: bool
    restarts: bool
    wish_up: bool = True
    runs: bool = False
    stopping: bool = False
    rests: str = "listening"  # where it is when nothing runs

    def state(self) -> str:
        if self.runs:
            return "stopping" if self.stopping else "up"
        return self.rests if self.wish_up else "stopped"


def random_walk(seed: int, steps: int) -> None:
    """Orders, traffic, exits and time in any order: table and judge_exit say what the model says."""
    chance = random.Random(seed)
    on_demand, stop_post = chance.random() < 0.5, chance.random() < 0.5
    policy = RestartPolicy(
        policy=chance.choice(["no", "on-success", "on-failure", "on-abnormal", "on-abort", "on-watchdog", "always"]),
        limit=chance.choice([None, RateSpec(3, 5.0)]),
    )
    world = World(TRANSITIONS, on_demand=on_demand, timed=chance.random() < 0.5, stop_post=stop_post)
    history, clock, again = History(), 0.0, False
    begin = E.LISTEN if on_demand else E.START
    now = world.dispatch(Now(S.STOPPED), begin)
    model = Model(on_demand, policy.policy != "no", runs=not on_demand)

    def end(now: Now) -> Now:
        nonlocal again
        ending = chance.choice([Ending(status=0), Ending(status=1), Ending(signal="KILL"), Ending(failure="x"),
                                Ending(status=0, left_traffic=True), Ending(status=1, lived_s=99.0)])  # fmt: skip
        if now.state is S.STOPPING and chance.random() < 0.3:
            ending = ending._replace(cause="x", result=chance.choice(["timeout", "watchdog"]))
        event, _ = judge_exit(ending, on_demand=on_demand, wish_up=now.wish_up, again=again, policy=policy,
                              history=history, now=clock)  # fmt: skip
        restarted, again = again, False
        model.runs = restarted
        model.stopping = False
        row = ending.outcome(policy.success_status)
        restarts = row in RESTARTED_BY[policy.policy]
        unhealthy = ending.left_traffic or ending.failure is not None
        if event is E.EXIT_GIVE_UP and policy.limit is not None and (restarts or (on_demand and unhealthy)):
            assert len(history.starts) == policy.limit.count
            model.rests = "failed"
        elif restarts or (on_demand and unhealthy):
            model.rests = "backoff"
        elif on_demand:
            model.rests = "listening"
        else:
            model.rests = "done" if ending.clean(policy.success_status) else "failed"
        return world.dispatch(dataclasses.replace(now, process=False, again=False, post=False), event)

    for _ in range(steps):
        clock += chance.choice([0.0, 0.01, 1.0, 60.0])
        step = chance.choice(["start", "stop", "restart", "exit", "kill", "traffic", "time", "ready"])
        if step == "start" or (step == "restart" and not now.process):
            again = again or now.state is S.STOPPING
            history = History()
            now = world.dispatch(dataclasses.replace(now, wish_up=True, again=again), E.START)
            model.wish_up = model.runs = True
        elif step == "stop":
            again = False
            now = world.dispatch(dataclasses.replace(now, wish_up=False, again=False), E.STOP)
            model.wish_up, model.stopping = False, model.runs
        elif step == "restart":
            again = True
            now = dataclasses.replace(now, wish_up=True, again=True)
            if now.state is not S.STOPPING:
                now = world.dispatch(now, E.STOP)
            model.wish_up = model.stopping = True
        elif step in ("exit", "kill") and now.process:
            if step == "kill" and now.state is not S.STOPPING:
                now = world.dispatch(now, E.FAIL)
                model.stopping = True
            elif stop_post and not now.post:
                now = world.dispatch(dataclasses.replace(now, process=False), E.ENDED)
                model.stopping = True
            else:
                now = end(now)
        elif step == "ready" and now.state is S.STARTING:
            now = world.dispatch(now, E.READY)
        elif step == "traffic" and now.watched:
            now = world.dispatch(now, E.TRAFFIC)
            model.runs = True
        elif step == "time" and now.timer is F.ARM_DELAY:
            listens = on_demand and not model.restarts
            now = world.dispatch(dataclasses.replace(now, timer=None), E.LISTEN if listens else E.DELAY_OVER)
            model.runs, model.rests = not listens, "listening"
        elif step == "time" and now.timer is not None:
            model.stopping = True
            now = world.dispatch(dataclasses.replace(now, timer=None), E.TIMEOUT)
        check(now, timed=world.timed)
        shown = "up" if now.state in (S.STARTING, S.READY) else now.state.value
        assert shown == model.state(), (seed, step, now, model)


ROWS = {"clean": "success", "unclean-code": "exit-code", "unclean-signal": "signal"}
RESTARTED_BY: dict[str, set[str]] = {}
for _row, _policy, _restarts in rows():
    RESTARTED_BY.setdefault(_policy, set())
    if _restarts:
        RESTARTED_BY[_policy].add(ROWS.get(_row, _row))


@pytest.mark.parametrize("seed", range(20))
def test_ten_thousand_steps(seed: int) -> None:  # G13
    random_walk(seed, 500)


# --- the manual


def test_the_manual_shows_the_table() -> None:
    page = update_manual.PAGE.read_text()
    assert update_manual.updated(page) == page, "run `make man`"
    assert max(map(len, update_manual.drawing().replace("\\-", "-").splitlines())) <= update_manual.COLUMNS
