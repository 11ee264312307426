"""manager/watch.py: callbacks for ready fds, over real sockets; calls at times, on a clock that jumps."""

from __future__ import annotations

import errno
import os
import select
import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import trio
import trio.testing

from superd.manager.watch import _REST_S, READ, WRITE, Timers, Watch

PATIENCE_S = 10


class Boundary:
    """An error boundary that remembers."""

    def __init__(self) -> None:
        self.errors: list[Exception] = []
        self.turns = 0
        self.on_turn: Callable[[], None] = lambda: None

    def guard(self, callback: Callable[[int], None], events: int) -> bool:
        try:
            callback(events)
        except Exception as error:
            self.errors.append(error)
            return False
        return True

    def after(self) -> None:
        self.turns += 1
        self.on_turn()


@pytest.fixture
def pairs() -> Iterator[list[tuple[socket.socket, socket.socket]]]:
    found = [socket.socketpair() for _ in range(3)]
    yield found
    for pair in found:
        for end in pair:
            end.close()


def run_watch(prepare: Callable[[Watch, Callable[[], None]], None]) -> Boundary:
    """Run a Watch until what `prepare` was given to call is called."""
    boundary = Boundary()

    async def main() -> None:
        timers = Timers(boundary.guard, lambda: None)
        watch = Watch(boundary.guard, timers, boundary.after)
        try:
            with trio.fail_after(PATIENCE_S):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(timers.run)
                    prepare(watch, nursery.cancel_scope.cancel)
                    nursery.start_soon(watch.run)
        finally:
            watch._epoll.close()

    trio.run(main)
    return boundary


def test_level_triggered_until_taken(pairs: list[tuple[socket.socket, socket.socket]]) -> None:
    (a, b), *_ = pairs
    seen: list[bytes] = []

    def prepare(watch: Watch, done: Callable[[], None]) -> None:
        def readable(events: int) -> None:
            assert events & READ
            seen.append(a.recv(1))
            if len(seen) == 3:
                done()

        watch.add(a.fileno(), readable)
        b.send(b"xyz")

    boundary = run_watch(prepare)
    assert seen == [b"x", b"y", b"z"]
    assert boundary.turns >= 1
    assert not boundary.errors


def test_one_that_is_always_ready_starves_nobody(pairs: list[tuple[socket.socket, socket.socket]]) -> None:  # B8
    (busy, peer), (quiet, other), _ = pairs
    peer.send(b"never read")
    other.send(b"x")
    calls: list[str] = []

    def prepare(watch: Watch, done: Callable[[], None]) -> None:
        def on_quiet(_: int) -> None:
            calls.append("quiet")
            if calls.count("quiet") == 10:
                done()

        watch.add(busy.fileno(), lambda _: calls.append("busy"))
        watch.add(quiet.fileno(), on_quiet)

    run_watch(prepare)
    assert abs(calls.count("busy") - calls.count("quiet")) <= 16 * 2


def test_removed_by_an_earlier_one_of_the_same_turn(pairs: list[tuple[socket.socket, socket.socket]]) -> None:
    ends = [a for a, _ in pairs]
    for _, b in pairs:
        b.send(b"x")
    called: list[int] = []

    def prepare(watch: Watch, done: Callable[[], None]) -> None:
        def callback(me: socket.socket) -> Callable[[int], None]:
            def readable(_: int) -> None:
                called.append(me.fileno())
                for end in ends:
                    watch.remove(end.fileno())  # itself too, and twice
                    watch.remove(end.fileno())
                done()

            return readable

        for end in ends:
            watch.add(end.fileno(), callback(end))

    run_watch(prepare)
    assert len(called) == 1


def test_write_interest_and_hang_up(pairs: list[tuple[socket.socket, socket.socket]]) -> None:
    (a, b), *_ = pairs
    seen: list[int] = []

    def prepare(watch: Watch, done: Callable[[], None]) -> None:
        def ready(events: int) -> None:
            seen.append(events)
            if events & WRITE and not events & select.EPOLLHUP:
                watch.change(a.fileno(), READ)
                b.close()
            elif events & select.EPOLLHUP:
                watch.remove(a.fileno())
                done()

        watch.add(a.fileno(), ready, READ | WRITE)

    run_watch(prepare)
    assert seen[0] == WRITE
    assert seen[-1] & select.EPOLLHUP


def test_a_duplicate_elsewhere_does_not_keep_it_polled(pairs: list[tuple[socket.socket, socket.socket]]) -> None:  # J7
    (a, b), (c, d), _ = pairs
    calls: list[str] = []

    def prepare(watch: Watch, done: Callable[[], None]) -> None:
        watch.add(a.fileno(), lambda _: calls.append("a"))
        watch.add(c.fileno(), lambda _: (calls.append("c"), done()))  # type: ignore[arg-type, return-value]
        copy = os.dup(a.fileno())  # as a child has it
        watch.remove(a.fileno())
        a.close()
        b.send(b"x")
        d.send(b"x")
        os.close(copy)

    run_watch(prepare)
    assert set(calls) == {"c"}


def test_one_that_fails_rests_and_comes_back(pairs: list[tuple[socket.socket, socket.socket]]) -> None:
    """No hot loop out of an error that stays; and the interest is what it was."""
    (a, b), (c, d), _ = pairs
    b.send(b"x")
    seen: list[int] = []
    failed_at: list[float] = []
    served: list[bool] = []

    def prepare(watch: Watch, done: Callable[[], None]) -> None:
        def fails(events: int) -> None:
            seen.append(events)
            if len(seen) == 1:
                d.send(b"x")
                failed_at.append(trio.current_time())
                raise RuntimeError("boom")
            watch.remove(a.fileno())
            if served:
                done()

        def other(events: int) -> None:
            served.append(len(seen) == 1 or trio.current_time() - failed_at[0] > 1)
            c.recv(1)
            if len(seen) == 2:
                done()

        watch.add(a.fileno(), fails, READ | WRITE)
        watch.add(c.fileno(), other)

    boundary = run_watch(prepare)
    assert [str(error) for error in boundary.errors] == ["boom"]
    assert seen == [READ | WRITE, READ | WRITE]
    assert served == [True]  # meanwhile, if this process was not held up for longer than the rest


@pytest.mark.parametrize("during", ["nothing", "change", "remove"])
def test_a_hang_up_that_fails_rests_too(pairs: list[tuple[socket.socket, socket.socket]], during: str) -> None:
    """A hang-up is told whatever is asked for: as long as it is polled at all, it would be a hot loop."""
    (a, b), *_ = pairs
    b.close()

    def prepare(watch: Watch, done: Callable[[], None]) -> None:
        def fails(_: int) -> None:
            raise RuntimeError("boom")

        def half_way() -> None:
            if during == "change":
                watch.change(a.fileno(), WRITE)
            elif during == "remove":
                watch.remove(a.fileno())
            done()

        watch.add(a.fileno(), fails)
        watch._timers.after(_REST_S / 2, half_way)

    assert len(run_watch(prepare).errors) == 1


# --- timers


def run_timers(scenario: Callable[[Timers, Boundary], Any]) -> Boundary:
    boundary = Boundary()

    async def main() -> None:
        timers = Timers(boundary.guard, boundary.after)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(timers.run)
            await scenario(timers, boundary)
            nursery.cancel_scope.cancel()

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
    return boundary


def test_timers_come_in_order_and_in_time() -> None:
    seen: list[tuple[str, float]] = []

    async def scenario(timers: Timers, _: Boundary) -> None:
        start = trio.current_time()

        def note(name: str) -> Callable[[], None]:
            return lambda: seen.append((name, round(trio.current_time() - start, 6)))

        timers.after(5, note("five"))
        timers.after(1, note("one"))
        timers.after(1, note("one again"))
        timers.after(0, note("now"))
        await trio.sleep(2)
        timers.after(1, note("sooner than five"))  # while it waits for a later one
        await trio.sleep(1000)
        timers.after(1, note("after a rest"))
        await trio.sleep(10)

    run_timers(scenario)
    assert seen == [
        ("now", 0), ("one", 1), ("one again", 1), ("sooner than five", 3), ("five", 5), ("after a rest", 1003),
    ]  # fmt: skip


def test_cancelled_timers_do_not_come() -> None:
    seen: list[str] = []

    async def scenario(timers: Timers, _: Boundary) -> None:
        first = timers.after(1, lambda: seen.append("first"))
        second = timers.after(2, lambda: seen.append("second"))
        timers.after(1.5, second.cancel)
        timers.after(3, lambda: seen.append("third"))
        first.cancel()
        first.cancel()
        await trio.sleep(10)
        second.cancel()  # long after

    run_timers(scenario)
    assert seen == ["third"]


def test_a_timer_sets_the_next() -> None:
    seen: list[float] = []

    async def scenario(timers: Timers, _: Boundary) -> None:
        def tick() -> None:
            seen.append(trio.current_time())
            timers.after(0.5, tick)

        timers.after(0.5, tick)
        await trio.sleep(5.1)

    run_timers(scenario)
    assert len(seen) == 10
    assert seen == sorted(seen)


def test_missed_timers_come_once() -> None:  # M5
    seen: list[int] = []

    async def scenario(timers: Timers, _: Boundary) -> None:
        for i in range(5):
            timers.after(i, lambda i=i: seen.append(i))  # type: ignore[misc]
        clock = trio.lowlevel.current_clock()
        assert isinstance(clock, trio.testing.MockClock)
        clock.jump(100)
        await trio.testing.wait_all_tasks_blocked()

    run_timers(scenario)
    assert seen == [0, 1, 2, 3, 4]


def test_one_that_fails_does_not_stop_the_others() -> None:
    seen: list[str] = []

    async def scenario(timers: Timers, _: Boundary) -> None:
        def fails() -> None:
            raise RuntimeError("boom")

        timers.after(1, fails)
        timers.after(1, lambda: seen.append("same time"))
        timers.after(2, lambda: seen.append("later"))
        await trio.sleep(3)

    boundary = run_timers(scenario)
    assert seen == ["same time", "later"]
    assert [str(error) for error in boundary.errors] == ["boom"]
    assert boundary.turns >= 2


class Refusing:
    """An epoll that refuses some calls: the error numbers of the next ones, 0 for one that works."""

    def __init__(self, real: select.epoll, *numbers: int) -> None:
        self.real, self.numbers = real, list(numbers)

    def __getattr__(self, name: str) -> Any:
        if name in ("register", "modify", "unregister") and self.numbers and (number := self.numbers.pop(0)):
            raise OSError(number, os.strerror(number))
        return getattr(self.real, name)


@pytest.mark.parametrize("change", [False, True])
def test_an_fd_that_there_is_no_memory_to_watch(
    pairs: list[tuple[socket.socket, socket.socket]], change: bool
) -> None:  # X26
    """It is watched a second later; nobody has to know."""
    (a, b), *_ = pairs

    def prepare(watch: Watch, done: Callable[[], None]) -> None:
        errors = (0, errno.ENOMEM) if change else (errno.ENOMEM, errno.ENOSPC)
        watch._epoll = Refusing(watch._epoll, *errors)  # type: ignore[assignment]
        watch.add(a.fileno(), lambda _: done())
        if change:
            watch.change(a.fileno(), READ)
        b.send(b"x")

    boundary = run_watch(prepare)
    assert not boundary.errors


def test_a_mistake_is_told_at_once() -> None:
    def prepare(watch: Watch, done: Callable[[], None]) -> None:
        with pytest.raises(OSError, match="Bad file"):
            watch.add(10**6, lambda _: None)
        watch.remove(10**6)
        done()

    run_watch(prepare)
