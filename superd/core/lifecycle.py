"""The life of a service that is started once (on-demand, always-on, once), as one table.

A service has a wish (what the operator wants: up or down) and a state (what is so). Facts become events before
they reach the table: an exit is judged first (`judge_exit`), because whether it is a failure depends on the
restart policy, on history and on why superd itself had sent a signal. The table gives the next state and effects;
manager/process.py carries the effects out and writes the state nowhere else. The drawing in superd(8) is made
from the table (`make man`).

An on-demand service rests in LISTENING: superd polls its sockets and starts it at the first traffic. While a
process has the sockets nobody polls them. The others rest in STOPPED, DONE or FAILED.

    STARTING  from the first command of start_pre to the end of start_post
    STOPPING  from the stop signal, or the end of the main process, to the end of stop_post
    BACKOFF   waiting to try again: a restart, sockets whose traffic the last process did not take (B7), or sockets and
              services that it needs and that are not there yet
    DONE      ended by itself, and that was all it had to do
    FAILED    gave up; its sockets stay open, an operator or a changed file starts it again

Per-connection services do not come here: they are LISTENING, and every connection is its own process.
"""

from __future__ import annotations

import enum
from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

from superd.core.spec import RateSpec, RestartPolicy
from superd.core.values import parse_signal


class State(enum.Enum):
    DISABLED = "disabled"
    STOPPED = "stopped"
    LISTENING = "listening"
    STARTING = "starting"
    READY = "ready"
    STOPPING = "stopping"
    BACKOFF = "backoff"
    DONE = "done"
    FAILED = "failed"
    BAD_CONFIG = "bad config"


class Event(enum.Enum):
    LISTEN = "wait for traffic"
    TRAFFIC = "traffic"
    START = "start it"
    WAIT = "start it later"
    STOP = "stop it"
    READY = "is ready"
    TIMEOUT = "takes too long"
    FAIL = "must not go on"
    WATCHDOG = "does not answer"
    LEAVING = "says that it stops"
    ENDED = "ended; stop_post"
    DELAY_OVER = "delay is over"
    EXIT_LISTEN = "over; wait for traffic"
    EXIT_RETRY = "over; try again later"
    EXIT_DONE = "over; that was all"
    EXIT_GIVE_UP = "over; give up"
    EXIT_STOPPED = "over; as wished"
    EXIT_AGAIN = "over; start at once"


class Effect(enum.Enum):
    WATCH = "poll the sockets"
    UNWATCH = "leave the sockets to the process"
    SPAWN = "run start_pre and the process"
    POST = "run stop_post"
    TERM = "send the stop signal"
    ABORT = "send ABRT"
    KILL = "send KILL"
    ARM_START = "time limit for getting ready"
    ARM_STOP = "time limit for stopping"
    ARM_DELAY = "delay before the next try"
    DISARM = "no time limit"


class IllegalTransition(Exception):
    def __init__(self, state: State, event: Event) -> None:
        super().__init__(f"{event.name} in state {state.name}")
        self.state, self.event = state, event


S, E, F = State, Event, Effect

_ENDS = {
    E.EXIT_LISTEN: (S.LISTENING, (F.DISARM, F.WATCH)),
    E.EXIT_RETRY: (S.BACKOFF, (F.DISARM, F.ARM_DELAY)),
    E.EXIT_DONE: (S.DONE, (F.DISARM,)),
    E.EXIT_GIVE_UP: (S.FAILED, (F.DISARM,)),
    E.EXIT_STOPPED: (S.STOPPED, (F.DISARM,)),
    E.EXIT_AGAIN: (S.STARTING, (F.DISARM, F.SPAWN, F.ARM_START)),
}

TRANSITIONS: dict[tuple[State, Event], tuple[State, tuple[Effect, ...]]] = {
    (S.STOPPED, E.LISTEN): (S.LISTENING, (F.WATCH,)),
    (S.STOPPED, E.START): (S.STARTING, (F.SPAWN, F.ARM_START)),
    (S.LISTENING, E.TRAFFIC): (S.STARTING, (F.UNWATCH, F.SPAWN, F.ARM_START)),
    (S.LISTENING, E.START): (S.STARTING, (F.UNWATCH, F.SPAWN, F.ARM_START)),
    (S.LISTENING, E.STOP): (S.STOPPED, (F.UNWATCH,)),
    # What it requires is not there yet; START follows when it is, or LISTEN.
    (S.STOPPED, E.WAIT): (S.BACKOFF, ()),
    (S.LISTENING, E.WAIT): (S.BACKOFF, (F.UNWATCH,)),
    (S.BACKOFF, E.WAIT): (S.BACKOFF, (F.DISARM,)),
    (S.DONE, E.WAIT): (S.BACKOFF, ()),
    (S.FAILED, E.WAIT): (S.BACKOFF, ()),
    (S.STARTING, E.READY): (S.READY, (F.DISARM,)),
    (S.STARTING, E.TIMEOUT): (S.STOPPING, (F.TERM, F.ARM_STOP)),
    (S.STARTING, E.STOP): (S.STOPPING, (F.DISARM, F.TERM, F.ARM_STOP)),
    # start_post failed, max_runtime has passed: stopped by superd, judged as a failure.
    (S.STARTING, E.FAIL): (S.STOPPING, (F.DISARM, F.TERM, F.ARM_STOP)),
    (S.READY, E.STOP): (S.STOPPING, (F.TERM, F.ARM_STOP)),
    (S.READY, E.FAIL): (S.STOPPING, (F.TERM, F.ARM_STOP)),
    (S.STARTING, E.WATCHDOG): (S.STOPPING, (F.ABORT, F.ARM_STOP)),
    (S.READY, E.WATCHDOG): (S.STOPPING, (F.ABORT, F.ARM_STOP)),
    (S.STARTING, E.LEAVING): (S.STOPPING, (F.ARM_STOP,)),
    (S.READY, E.LEAVING): (S.STOPPING, (F.ARM_STOP,)),
    (S.STOPPING, E.TIMEOUT): (S.STOPPING, (F.KILL, F.ARM_STOP)),
    # DISARM: sockets that were bound anew end a delay that still runs.
    (S.BACKOFF, E.DELAY_OVER): (S.STARTING, (F.DISARM, F.SPAWN, F.ARM_START)),
    (S.BACKOFF, E.LISTEN): (S.LISTENING, (F.DISARM, F.WATCH)),
    (S.BACKOFF, E.START): (S.STARTING, (F.DISARM, F.SPAWN, F.ARM_START)),
    (S.BACKOFF, E.STOP): (S.STOPPED, (F.DISARM,)),
    (S.DONE, E.START): (S.STARTING, (F.SPAWN, F.ARM_START)),
    (S.DONE, E.LISTEN): (S.LISTENING, (F.WATCH,)),
    (S.DONE, E.STOP): (S.STOPPED, ()),
    (S.FAILED, E.START): (S.STARTING, (F.SPAWN, F.ARM_START)),
    (S.FAILED, E.LISTEN): (S.LISTENING, (F.WATCH,)),
    (S.FAILED, E.STOP): (S.STOPPED, ()),
    **{(state, E.ENDED): (S.STOPPING, (F.ARM_STOP, F.POST)) for state in (S.STARTING, S.READY, S.STOPPING)},
    **{(state, event): end for state in (S.STARTING, S.READY, S.STOPPING) for event, end in _ENDS.items()},
}

IGNORED: dict[tuple[State, Event], str] = {
    (S.STOPPED, E.STOP): "it is",
    (S.LISTENING, E.LISTEN): "it does",
    (S.STARTING, E.START): "it is being started",
    (S.STARTING, E.LISTEN): "it has its sockets",
    (S.READY, E.START): "it runs",
    (S.READY, E.LISTEN): "it has its sockets",
    (S.READY, E.READY): "a process may say so twice",
    (S.STOPPING, E.READY): "too late",
    (S.STOPPING, E.STOP): "it is being stopped",
    (S.STOPPING, E.FAIL): "it is being stopped",
    (S.STOPPING, E.START): "the wish is remembered and decides at the exit (EXIT_AGAIN)",
    (S.STOPPING, E.LISTEN): "the wish is remembered and decides at the exit",
}


def transition(state: State, event: Event) -> tuple[State, tuple[Effect, ...]]:
    """Raises IllegalTransition for a pair that nobody has thought of."""
    found = TRANSITIONS.get((state, event))
    if found is not None:
        return found
    if (state, event) in IGNORED:
        return state, ()
    raise IllegalTransition(state, event)


def has_process(state: State) -> bool:
    """Whether a process of the service runs, or a command around it."""
    return state in (State.STARTING, State.READY, State.STOPPING)


def describe() -> list[tuple[str, str, str]]:
    """The table for people: (state, what happens, next state). What leads to the same state is one row."""
    rows: dict[tuple[State, State], list[str]] = {}
    for (state, event), (then, _) in TRANSITIONS.items():
        rows.setdefault((state, then), []).append(event.value)
    order = list(State)
    return [
        (state.value, ", ".join(words), then.value)
        for (state, then), words in sorted(rows.items(), key=lambda row: tuple(map(order.index, row[0])))
    ]


class Ending(NamedTuple):
    """How a process ended. Exactly one of status and signal is set, or neither: it never ran (`failure`).

    cause   why superd itself had to end it, or why it counts as a failure although it ended well
    result  what that was in one of systemd's words, systemd.exec(5), $SERVICE_RESULT: "timeout", "watchdog" …; ""
            where status and signal say it
    """

    status: int | None = None
    signal: str | None = None  # without SIG
    failure: str | None = None
    cause: str = ""
    lived_s: float = 0.0
    left_traffic: bool = False  # its sockets hold what it was started for
    result: str = ""
    dumped: bool = False  # it left a core file
    unready: bool = False  # it ended by itself, before it was ready
    at_once: bool = False  # superd ended it to start it again without delay, whatever the restart policy says

    def clean(self, success_status: tuple[int | str, ...]) -> bool:
        """As systemd has it: 0, HUP, INT, TERM, PIPE, and what `success_status` adds; but not before it was ready."""
        if self.failure is not None or self.cause or self.unready:
            return False
        if self.signal is not None:
            return self.signal in ("HUP", "INT", "TERM", "PIPE") or self.signal in success_status
        return self.status == 0 or self.status in success_status

    def outcome(self, success_status: tuple[int | str, ...]) -> str:
        """In systemd's words: "success", "exit-code", "signal", "core-dump", "timeout", "watchdog" …"""
        if self.result:
            return self.result
        if self.cause:
            return "timeout"
        if self.clean(success_status):
            return "success"
        if self.signal is not None:
            return "core-dump" if self.dumped else "signal"
        return "exit-code"

    def exit_status(self, success_status: tuple[int | str, ...]) -> int:
        """What superd exits with when that was an essential service: its status, 128 + N for a signal, 1 if it never
        ran; never 0 for a failure (P6)."""
        status = 128 + parse_signal(self.signal) if self.signal is not None else self.status or 0
        return status or int(not self.clean(success_status))

    def environment(self, success_status: tuple[int | str, ...]) -> dict[str, str]:
        """For stop_post, as systemd.exec(5) has it; EXIT_CODE and EXIT_STATUS only if it ran."""
        found = {"SERVICE_RESULT": self.outcome(success_status)}
        if self.signal is not None:
            found |= {"EXIT_CODE": "dumped" if self.dumped else "killed", "EXIT_STATUS": self.signal}
        elif self.status is not None:
            found |= {"EXIT_CODE": "exited", "EXIT_STATUS": str(self.status)}
        return found

    def __str__(self) -> str:
        if self.failure is not None:
            return self.failure
        how = f"was killed by {self.signal}" if self.signal else f"exited with status {self.status}"
        when = ", before it was ready" if self.unready else f" ({self.cause})" if self.cause else ""
        return f"{how} after {self.lived_s:.1f} s{when}"


# PROTOCOLS.md 2.7: the policies that start it again, by Ending.outcome(); others are as "timeout".
_ABNORMAL: tuple[str, ...] = ("always", "on-failure", "on-abnormal")
_RESTARTS: dict[str, tuple[str, ...]] = {
    "success": ("always", "on-success"),
    "exit-code": ("always", "on-failure"),
    "signal": (*_ABNORMAL, "on-abort"),
    "core-dump": (*_ABNORMAL, "on-abort"),
    "watchdog": (*_ABNORMAL, "on-watchdog"),
}


@dataclass(slots=True)
class History:
    """What restart judgement remembers of one service."""

    tries: int = 0  # ends in a row that call for a longer delay
    starts: deque[float] = field(default_factory=deque)  # inside restart_limit's window

    def may_start(self, limit: RateSpec | None, now: float) -> bool:
        """Whether `restart_limit` has room for one more start, which is then counted."""
        if limit is None:
            return True
        while self.starts and now - self.starts[0] > limit.per_s:
            self.starts.popleft()
        if len(self.starts) >= limit.count:
            return False
        self.starts.append(now)
        return True


def judge_exit(
    ending: Ending,
    *,
    on_demand: bool,
    wish_up: bool,
    again: bool,
    policy: RestartPolicy,
    history: History,
    now: float,
    idle: bool = False,
) -> tuple[Event, float]:
    """What an exit means, and the delay in seconds before the next try (without jitter).

    A wish to be down wins over everything; `again` (a restart was asked for) is at once; `idle` (superd has stopped it
    because nobody used it) is no failure, however it went. Otherwise the policy
    decides; an on-demand service whose policy says no restart goes back to listening. `restart_limit` counts
    starts, not requests (G15). The delay doubles from delay_s to delay_max_s and is forgotten after a life
    as long as delay_max_s, or, where only traffic starts it again, when a process took its traffic (G14).
    """
    if again:
        return Event.EXIT_AGAIN, 0.0
    if not wish_up:
        return Event.EXIT_STOPPED, 0.0
    if idle:
        history.tries = 0
        return Event.EXIT_LISTEN, 0.0
    if ending.at_once:
        return (Event.EXIT_AGAIN if history.may_start(policy.limit, now) else Event.EXIT_GIVE_UP), 0.0
    clean = ending.clean(policy.success_status)
    restarts = policy.policy in _RESTARTS.get(ending.outcome(policy.success_status), _ABNORMAL)
    if on_demand and not restarts:
        healthy = not ending.left_traffic and ending.failure is None
    else:
        healthy = ending.lived_s >= policy.delay_max_s
    history.tries = 0 if healthy else history.tries + 1
    if not restarts and not on_demand:
        return (Event.EXIT_DONE if clean else Event.EXIT_GIVE_UP), 0.0
    if (restarts or not healthy) and not history.may_start(policy.limit, now):
        return Event.EXIT_GIVE_UP, 0.0
    if on_demand and not restarts and healthy:
        return Event.EXIT_LISTEN, 0.0
    return Event.EXIT_RETRY, min(policy.delay_s * 2 ** min(max(history.tries - 1, 0), 30), policy.delay_max_s)
