"""system/cgroup.py on the kernel's own files, where they can be written."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from superd.system import cgroup


@pytest.fixture
def base() -> Iterator[str]:
    path = cgroup.base(os.getpid())
    if path is None:
        pytest.skip("no cgroup v2 that can be written")
    yield path
    cgroup.remove(path)
    assert not os.path.exists(path)


def test_members_and_kill(base: str) -> None:  # G6
    """A process that joins is a member, its children are born as members, and one order ends them all."""
    group = cgroup.make(base, "cat")
    assert group is not None and cgroup.members(group) == []
    with subprocess.Popen(
        ["/bin/sh", "-c", 'echo 0 > "$1" && sleep 1000 & wait', "sh", f"{group}/cgroup.procs"]
    ) as outer:
        with subprocess.Popen(
            ["/bin/sh", "-c", 'echo 0 > "$1"; setsid sleep 1000 & echo; wait', "sh", f"{group}/cgroup.procs"],
            stdout=subprocess.PIPE,
        ) as inner:
            assert inner.stdout is not None
            inner.stdout.readline()
            assert inner.pid in cgroup.members(group) and len(cgroup.members(base)) >= 2
            assert cgroup.kill(group)
            assert inner.wait() == -signal.SIGKILL
        outer.wait()
    assert cgroup.members(group) == []


def test_stale_groups_are_removed(base: str) -> None:
    """A superd that was killed leaves its groups; the next one takes them away, and nobody else's."""
    own = Path(base).parent
    with subprocess.Popen(["true"]) as gone:
        pass
    left, others = own / f"superd.{gone.pid}", own / "superd.x"
    (left / "web").mkdir(parents=True)
    others.mkdir()
    try:
        assert cgroup.base(os.getpid()) == base
        assert not left.exists() and others.exists()
    finally:
        others.rmdir()


def test_what_cannot_be_had(tmp_path: Path) -> None:
    """A group that cannot be made, joined or killed."""
    (tmp_path / "file").touch()
    assert cgroup.make(str(tmp_path), "file") is None
    assert not cgroup.kill(str(tmp_path / "none"))
    assert cgroup.members(str(tmp_path / "none")) == []
    with pytest.raises(FileNotFoundError):
        cgroup.join(str(tmp_path / "none"))
