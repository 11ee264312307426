"""The life of a service that is started once (on-demand, always-on, once), as one table.

A service has a wish (what the operator wants: up or down) and a state (what is so). Facts become events before
they reach the table: an exit is judged first (`judge_exit`), because whether it is a failure depends on the
restart policy, on history and on why superd itself had sent a signal. The table gives the next state and effects;
manager/service.py carries the effects out and writes the state nowhere else.

An on-demand service rests in LISTENING: superd polls its sockets and starts it at the first traffic. While a
process has the sockets nobody polls them. The others rest in STOPPED, DONE or FAILED.

    BACKOFF  waiting to try again: a restart, or sockets whose traffic the last process did not take (B7)
    DONE     ended by itself, and that was all it had to do
    FAILED   gave up; its sockets stay open, an operator or a changed file starts it again

Per-connection services do not come here: they are LISTENING, and every connection is its own process.
"""

from __future__ import annotations

import enum
from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

from superd.core.spec import RestartPolicy


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
    STOP = "stop it"
    READY = "is ready"
    TIMEOUT = "took too long"
    DELAY_OVER = "delay is over"
    EXIT_LISTEN = "ended; wait for traffic"
    EXIT_RETRY = "ended; try again later"
    EXIT_DONE = "ended; that was all"
    EXIT_GIVE_UP = "ended; give up"
    EXIT_STOPPED = "ended; as wished"
    EXIT_AGAIN = "ended; start it at once"


class Effect(enum.Enum):
    WATCH = "poll the sockets"
    UNWATCH = "leave the sockets to the process"
    SPAWN = "start the process"
    TERM = "send the stop signal"
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
    (S.STARTING, E.READY): (S.READY, (F.DISARM,)),
    (S.STARTING, E.TIMEOUT): (S.STOPPING, (F.TERM, F.ARM_STOP)),
    (S.STARTING, E.STOP): (S.STOPPING, (F.DISARM, F.TERM, F.ARM_STOP)),
    (S.READY, E.STOP): (S.STOPPING, (F.TERM, F.ARM_STOP)),
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


class Ending(NamedTuple):
    """How a process ended. Exactly one of status and signal is set, or neither: it never ran (`failure`)."""

    status: int | None = None
    signal: str | None = None  # without SIG
    failure: str | None = None
    cause: str = ""  # "start timeout" where superd itself had to end it
    lived_s: float = 0.0
    left_traffic: bool = False  # its sockets hold what it was started for

    def clean(self, success_status: tuple[int | str, ...]) -> bool:
        """As systemd has it: 0, HUP, INT, TERM, PIPE, and what `success_status` adds."""
        if self.failure is not None or self.cause:
            return False
        if self.signal is not None:
            return self.signal in ("HUP", "INT", "TERM", "PIPE") or self.signal in success_status
        return self.status == 0 or self.status in success_status

    def __str__(self) -> str:
        if self.failure is not None:
            return self.failure
        how = f"was killed by {self.signal}" if self.signal else f"exited with status {self.status}"
        return f"{how} after {self.lived_s:.1f} s" + (f" ({self.cause})" if self.cause else "")


# PROTOCOLS.md 2.7, one row for each way to end.
_RESTARTS = {
    "clean": ("always", "on-success"),
    "status": ("always", "on-failure"),
    "signal": ("always", "on-failure", "on-abnormal", "on-abort"),
    "timeout": ("always", "on-failure", "on-abnormal"),
}


@dataclass(slots=True)
class History:
    """What restart judgement remembers of one service."""

    tries: int = 0  # ends in a row that call for a longer delay
    starts: deque[float] = field(default_factory=deque)  # inside restart_limit's window


def judge_exit(
    ending: Ending, *, on_demand: bool, wish_up: bool, again: bool, policy: RestartPolicy, history: History, now: float
) -> tuple[Event, float]:
    """What an exit means, and the delay in seconds before the next try (without jitter).

    A wish to be down wins over everything; `again` (a restart was asked for) is at once. Otherwise the policy
    decides; an on-demand service whose policy says no restart goes back to listening. `restart_limit` counts
    starts, not requests (G15). The delay doubles from delay_s to delay_max_s and is forgotten after a life
    as long as delay_max_s, or, where only traffic starts it again, when a process took its traffic (G14).
    """
    if again:
        return Event.EXIT_AGAIN, 0.0
    if not wish_up:
        return Event.EXIT_STOPPED, 0.0
    clean = ending.clean(policy.success_status)
    if ending.cause:
        row = "timeout"
    elif clean:
        row = "clean"
    else:
        row = "signal" if ending.signal else "status"
    restarts = policy.policy in _RESTARTS[row]
    if on_demand and not restarts:
        healthy = not ending.left_traffic and ending.failure is None
    else:
        healthy = ending.lived_s >= policy.delay_max_s
    history.tries = 0 if healthy else history.tries + 1
    if not restarts and not on_demand:
        return (Event.EXIT_DONE if clean else Event.EXIT_GIVE_UP), 0.0
    if policy.limit is not None and (restarts or not healthy):
        while history.starts and now - history.starts[0] > policy.limit.per_s:
            history.starts.popleft()
        if len(history.starts) >= policy.limit.count:
            return Event.EXIT_GIVE_UP, 0.0
        history.starts.append(now)
    if on_demand and not restarts and healthy:
        return Event.EXIT_LISTEN, 0.0
    return Event.EXIT_RETRY, min(policy.delay_s * 2 ** min(max(history.tries - 1, 0), 30), policy.delay_max_s)
