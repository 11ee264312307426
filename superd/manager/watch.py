"""Readable fds and timers, for all services at once.

A trio task per listener costs a scheduling round for each event and 2.4 kB for each listener; here one task waits for
one epoll set, and what is ready is handled by plain functions, in turn: 0.2 kB, and 8 µs less for each event (a byte
through a socket pair: 11.6 µs of CPU by trio's wait_readable, 3.2 µs by epoll).

A callback never blocks and never awaits, so what it does is atomic. What takes time (a stop, a control
request, a front) is a trio task beside this one.
"""

from __future__ import annotations

import contextlib
import errno
import heapq
import itertools
import select
from collections.abc import Callable

import trio

Callback = Callable[[int], None]
Guard = Callable[[Callback, int], bool]  # False: it failed
READ, WRITE = select.EPOLLIN, select.EPOLLOUT
_EVENTS_PER_TURN = 64
_TURNS, _STAY_S = 16, 0.002
_REST_S = 1.0
_WRONG = (errno.EBADF, errno.EEXIST, errno.EPERM)  # the caller's mistake; what else is refused may be granted later


class Timer:
    """A call that is due at `when` (monotonic seconds)."""

    __slots__ = ("callback", "when")

    def __init__(self, when: float, callback: Callable[[], None]) -> None:
        self.when = when
        self.callback: Callable[[], None] | None = callback

    def cancel(self) -> None:
        self.callback = None


class Timers:
    """Calls at times. Missed ones come once, when there is time again (M5)."""

    def __init__(self, guard: Guard, after: Callable[[], None]) -> None:
        self._heap: list[tuple[float, int, Timer]] = []
        self._order = itertools.count()
        self._guard = guard
        self._after = after
        self._sooner = trio.Event()

    def after(self, delay_s: float, callback: Callable[[], None]) -> Timer:
        timer = Timer(trio.current_time() + delay_s, callback)
        if not self._heap or timer.when < self._heap[0][0]:
            self._sooner.set()
        heapq.heappush(self._heap, (timer.when, next(self._order), timer))
        return timer

    async def run(self) -> None:
        while True:
            while self._heap and self._heap[0][2].callback is None:
                heapq.heappop(self._heap)
            deadline = self._heap[0][0] if self._heap else float("inf")
            with trio.move_on_at(deadline):
                self._sooner = trio.Event()
                await self._sooner.wait()
            while self._heap and self._heap[0][0] <= trio.current_time():
                callback = heapq.heappop(self._heap)[2].callback
                if callback is not None:
                    self._guard(lambda _, callback=callback: callback(), 0)  # type: ignore[misc]
            self._after()


class Watch:
    """`guard(callback, events)` runs a callback inside the error boundary; `after` runs once per turn.

    An fd whose callback failed rests for a second: it is still ready, and would fail again at once. So does one that
    the kernel has no memory or room to watch (epoll_ctl(2), ENOMEM, ENOSPC).
    """

    def __init__(self, guard: Guard, timers: Timers, after: Callable[[], None]) -> None:
        self._epoll = select.epoll()
        self._callbacks: dict[int, Callback] = {}
        self._events: dict[int, int] = {}  # where they are not READ
        self._resting: set[int] = set()
        self._guard = guard
        self._timers = timers
        self._after = after

    def add(self, fd: int, callback: Callback, events: int = READ) -> None:
        """Call `callback(events)` while fd is ready (level-triggered). Error and hang-up always count."""
        self._callbacks[fd] = callback
        if events != READ:
            self._events[fd] = events
        self._register(fd, callback)

    def change(self, fd: int, events: int) -> None:
        self._events[fd] = events
        if fd not in self._resting:
            try:
                self._epoll.modify(fd, events)
            except OSError as error:
                if error.errno in _WRONG:
                    raise
                self._rest(fd, self._callbacks[fd])

    def remove(self, fd: int) -> None:
        """Before the fd is closed: while another process holds the same open file, epoll would go on."""
        if self._callbacks.pop(fd, None) is not None:
            self._events.pop(fd, None)
            if fd in self._resting:
                self._resting.remove(fd)
            else:
                with contextlib.suppress(OSError):
                    self._epoll.unregister(fd)

    def _register(self, fd: int, callback: Callback) -> None:
        try:
            self._epoll.register(fd, self._events.get(fd, READ))
        except OSError as error:
            if error.errno in _WRONG:
                del self._callbacks[fd]
                self._events.pop(fd, None)
                raise
            self._rest_unwatched(fd, callback)

    def _rest_unwatched(self, fd: int, callback: Callback) -> None:
        def resume() -> None:
            if self._callbacks.get(fd) is callback and fd in self._resting:
                self._resting.remove(fd)
                self._register(fd, callback)

        self._resting.add(fd)
        self._timers.after(_REST_S, resume)

    def _rest(self, fd: int, callback: Callback) -> None:
        if self._callbacks.get(fd) is callback and fd not in self._resting:
            with contextlib.suppress(OSError):
                self._epoll.unregister(fd)  # not modify(fd, 0): a hang-up would be told all the same
            self._rest_unwatched(fd, callback)

    async def run(self) -> None:
        poll, callbacks, guard = self._epoll.poll, self._callbacks, self._guard
        while True:
            await trio.lowlevel.wait_readable(self._epoll.fileno())
            # A round of trio's loop costs more than most events do, and more is usually about to come: stay here as
            # long as it comes within two milliseconds, some turns at most, for trio's other tasks wait meanwhile.
            for _ in range(_TURNS):
                ready = poll(_STAY_S, _EVENTS_PER_TURN)
                # A turn: what is ready now, each once, so that a busy listener does not starve the others (B8).
                for fd, events in ready:
                    callback = callbacks.get(fd)  # an earlier one of this turn may have removed it
                    if callback is not None and not guard(callback, events):
                        self._rest(fd, callback)
                if not ready:
                    break
            self._after()
