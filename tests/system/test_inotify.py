"""superd.system.inotify: events of real directories, and what is left of lost ones."""

from __future__ import annotations

import errno
import os
import select
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from superd.system import inotify
from superd.system.inotify import Event, Inotify, parse


@pytest.fixture
def watcher() -> Iterator[Inotify]:
    found = Inotify()
    yield found
    found.close()


def happened(watcher: Inotify) -> list[Event]:
    found: list[Event] = []
    while select.select([watcher.fileno()], [], [], 0)[0]:  # the kernel queues them before the call returns
        found += watcher.read()
    return found


def test_what_happens_to_names(watcher: Inotify, tmp_path: Path) -> None:
    assert watcher.watch({str(tmp_path): False})
    (tmp_path / "ä").write_text("x")
    (tmp_path / "ä").rename(tmp_path / "b")
    (tmp_path / "b").unlink()
    (tmp_path / "d").mkdir()
    names = [(event.name, event.mask & 0xFFF) for event in happened(watcher)]
    assert names == [
        ("ä", inotify.CREATE), ("ä", inotify.CLOSE_WRITE), ("ä", inotify.MOVED_FROM), ("b", inotify.MOVED_TO),
        ("b", inotify.DELETE), ("d", inotify.CREATE),
    ]  # fmt: skip


def test_contents_only_where_they_are_asked_for(watcher: Inotify, tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "f").touch()
    assert watcher.watch({f"{tmp_path}/a": True, f"{tmp_path}/b": False})
    for name in "ab":
        (tmp_path / name / "f").chmod(0o600)
        with open(tmp_path / name / "f", "w") as file:
            file.write("x")
    found = [(os.path.basename(event.directory or ""), event.mask) for event in happened(watcher)]
    assert found == [("a", inotify.ATTRIB), ("a", inotify.MODIFY), ("a", inotify.CLOSE_WRITE),
                     ("b", inotify.CLOSE_WRITE)]  # fmt: skip


def test_directories_come_and_go(watcher: Inotify, tmp_path: Path) -> None:  # K5
    """One that is not there is passed over; one that was replaced is watched anew; a file is none."""
    a, gone = tmp_path / "a", tmp_path / "gone"
    a.mkdir()
    (tmp_path / "file").touch()
    wanted = {str(a): True, str(gone): True, str(tmp_path / "file"): True}
    assert watcher.watch(wanted) and not watcher.watch(wanted)
    a.rename(tmp_path / "old")
    a.mkdir()
    assert watcher.watch(wanted)
    happened(watcher)
    (tmp_path / "old" / "x").touch()
    (a / "y").touch()
    assert {event.name for event in happened(watcher)} == {"y"}
    assert not watcher.watch({})
    (a / "z").touch()
    assert not select.select([watcher.fileno()], [], [], 0)[0] or all(
        event.mask & inotify.IGNORED for event in happened(watcher)
    )


def test_the_queue_overflows(watcher: Inotify, tmp_path: Path) -> None:  # K4
    """Where events were lost, that is what comes last."""
    watcher.watch({str(tmp_path): False})
    most = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())
    if most > 100_000:
        pytest.skip(f"the queue holds {most}")
    x, y = tmp_path / "x", tmp_path / "y"
    x.touch()
    for _ in range(most // 4 + 10):
        x.rename(y)
        y.rename(x)
    found = happened(watcher)
    assert found[-1].directory is None and found[-1].mask & inotify.Q_OVERFLOW


def test_parsing_leaves_out_what_is_not_watched_any_more() -> None:
    def event(number: int, mask: int, name: bytes = b"") -> bytes:
        return struct.pack("@iIII", number, mask, 0, len(name)) + name

    data = event(1, 8, b"a\0\0\0") + event(2, 8, b"b\0") + event(-1, inotify.Q_OVERFLOW) + event(1, inotify.IGNORED)
    assert list(parse(data, {1: "/d"})) == [
        Event("/d", "a", 8), Event(None, "", inotify.Q_OVERFLOW), Event("/d", "", inotify.IGNORED),
    ]  # fmt: skip
    assert list(parse(data[:10], {1: "/d"})) == []


def test_none_to_be_had(monkeypatch: pytest.MonkeyPatch) -> None:  # K21
    class Libc:
        @staticmethod
        def inotify_init1(flags: int) -> int:
            return -1

    monkeypatch.setattr(inotify, "_libc", Libc)
    monkeypatch.setattr("superd.system.inotify.ctypes.get_errno", lambda: errno.EMFILE)
    with pytest.raises(OSError, match="too many open files") as caught:
        Inotify()
    assert caught.value.errno == errno.EMFILE
