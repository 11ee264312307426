"""system/cgroup.py on the kernel's own files, where they can be written."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import eventually

from superd.system import cgroup


@pytest.fixture
def base() -> Iterator[str]:
    try:
        path = cgroup.base(os.getpid())
    except cgroup.GroupError:
        pytest.skip("no cgroup v2 that can be written")
    yield path
    cgroup.remove(path)
    assert not os.path.exists(path)


def test_members_and_kill(base: str) -> None:  # G6
    """A process that joins is a member, its children are born as members, and one order ends them all."""
    group = cgroup.make(base, "cat")
    assert cgroup.members(group) == []
    with subprocess.Popen(
        ["/bin/sh", "-c", 'echo 0 > "$1" && echo && sleep 1000 & wait', "sh", f"{group}/cgroup.procs"],
        stdout=subprocess.PIPE,
    ) as outer:
        assert outer.stdout is not None
        outer.stdout.readline()  # the kernel takes its time
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
    eventually(lambda: cgroup.members(group), [])  # its children end a moment after it


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
    with pytest.raises(cgroup.GroupError, match=r"/file: file exists$"):
        cgroup.make(str(tmp_path), "file")
    assert not cgroup.kill(str(tmp_path / "none"))
    assert cgroup.members(str(tmp_path / "none")) == []
    with pytest.raises(FileNotFoundError):
        cgroup.join(str(tmp_path / "none"))


class Kernel:
    """What the kernel does with a tree of plain files: a group that is made gets its files, from what the group above
    gives; a group with processes gives nothing, and takes nobody once it gives something."""

    def __init__(self, top: Path, monkeypatch: pytest.MonkeyPatch, *, controllers: str, pids: str) -> None:
        self.own, self.refuses = top / "unit", {}  # type: dict[str, int]
        self.own.mkdir()
        self._fill(self.own, controllers.split())
        (self.own / "cgroup.procs").write_text(pids)
        real_makedirs = os.makedirs

        def makedirs(path: str, **keys: Any) -> None:
            fresh = not os.path.exists(path)
            real_makedirs(path, **keys)
            if fresh:
                self._fill(Path(path), (Path(path).parent / "cgroup.subtree_control").read_text().split())

        monkeypatch.setattr(os, "makedirs", makedirs)
        monkeypatch.setattr(cgroup, "_write", self.write)

    def _fill(self, group: Path, controllers: list[str]) -> None:
        for name in ("procs", "subtree_control"):
            (group / f"cgroup.{name}").touch()
        (group / "cgroup.type").write_text("domain")
        (group / "cgroup.controllers").write_text(" ".join(controllers))
        for name in controllers:
            (group / f"{name}.max").write_text("max")

    def write(self, path: str, text: str) -> None:
        if path in self.refuses:
            raise OSError(self.refuses[path], "")
        group, name = Path(path).parent, Path(path).name
        if name == "cgroup.procs":
            if (group / "cgroup.subtree_control").read_text():
                raise OSError(errno.EBUSY, "")
            for procs in self.own.rglob("cgroup.procs"):
                procs.write_text(" ".join(word for word in procs.read_text().split() if word != text))
            text = f"{(group / name).read_text()} {text}"
        elif name == "cgroup.subtree_control":
            assert not (group / "cgroup.procs").read_text().split(), "no internal processes"
            given = set((group / name).read_text().split())
            given = given | {text[1:]} if text[0] == "+" else given - {text[1:]}
            text = " ".join(sorted(given))
            for below in [child for child in group.iterdir() if child.is_dir()]:
                (below / "cgroup.controllers").write_text(text)
                for controller in given:
                    (below / f"{controller}.max").touch()
        elif not os.path.exists(path):
            raise FileNotFoundError(errno.ENOENT, "")
        Path(path).write_text(text)


LIMITS = {"memory.max": "1000", "pids.max": "7", "cpu.max": "max"}


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kernel:
    return Kernel(tmp_path, monkeypatch, controllers="cpu memory pids", pids="11 12 13")


def service(kernel: Kernel) -> str:
    return cgroup.make(cgroup.make(str(kernel.own), "superd.11"), "web")


def test_limits_make_room(kernel: Kernel) -> None:
    """superd leaves the group that it was started in, and is back there in the end."""
    group = service(kernel)
    cgroup.limit(group, LIMITS, lambda: {11, 12, 13, 14})
    assert [Path(group, name).read_text() for name in ("memory.max", "pids.max")] == ["1000", "7"]
    assert not Path(group, "cpu.max").exists()  # nobody has asked
    assert sorted(cgroup.members(str(kernel.own / "superd.11" / "_superd"))) == [11, 12, 13]
    assert (kernel.own / "cgroup.subtree_control").read_text() == "memory pids"
    cgroup.limit(group, {"memory.max": "max", "pids.max": "9", "cpu.max": "5 10"}, lambda: {11, 12, 13})
    assert [Path(group, name).read_text() for name in ("memory.max", "pids.max", "cpu.max")] == ["max", "9", "5 10"]
    cgroup.leave(str(kernel.own / "superd.11"))
    assert (kernel.own / "cgroup.subtree_control").read_text() == ""
    assert sorted(map(int, (kernel.own / "cgroup.procs").read_text().split())) == [11, 12, 13]


def test_no_limits_need_nothing(kernel: Kernel) -> None:
    group = service(kernel)
    cgroup.limit(group, dict.fromkeys(LIMITS, "max"), lambda: set())
    assert (kernel.own / "cgroup.procs").read_text() == "11 12 13"


def test_strangers_stay(kernel: Kernel) -> None:
    with pytest.raises(cgroup.GroupError, match=r"unit/cgroup.procs: processes .* not superd's \(12\)") as error:
        cgroup.limit(service(kernel), LIMITS, lambda: {11, 13})
    assert error.value.errno == errno.EBUSY and (kernel.own / "cgroup.procs").read_text() == "11 12 13"


@pytest.mark.parametrize(
    ("file", "number", "why"),
    [
        ("cgroup.subtree_control", errno.EROFS, "cgroup.subtree_control: read-only file system"),
        ("superd.11/cgroup.subtree_control", errno.EACCES, "superd.11/cgroup.subtree_control: permission denied"),
        ("superd.11/_superd/cgroup.procs", errno.EPERM, "_superd/cgroup.procs: operation not permitted"),
        ("superd.11/web/memory.max", errno.EINVAL, "web/memory.max: invalid argument"),
    ],
)
def test_what_is_missing_is_named(kernel: Kernel, file: str, number: int, why: str) -> None:  # H12
    group = service(kernel)
    kernel.refuses[str(kernel.own / file)] = number
    with pytest.raises(cgroup.GroupError, match=f"{re.escape(why)}$"):
        cgroup.limit(group, LIMITS, lambda: {11, 12, 13})


def test_a_controller_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel(tmp_path, monkeypatch, controllers="pids", pids="11")
    with pytest.raises(
        cgroup.GroupError, match=r"unit/cgroup.controllers: there is no memory controller, it lists pids"
    ):
        cgroup.limit(service(kernel), LIMITS, lambda: {11})
    assert (kernel.own / "cgroup.procs").read_text() == "11"


def test_what_a_group_has(tmp_path: Path) -> None:
    (tmp_path / "memory.current").write_text("4096\n")
    (tmp_path / "memory.events").write_text("low 0\nhigh 0\nmax 9\noom 3\noom_kill 2\noom_group_kill 0\n")
    assert cgroup.usage(str(tmp_path)) == {"memory": 4096} and cgroup.killed_for_memory(str(tmp_path)) == 2
    assert cgroup.usage(str(tmp_path / "none")) == {} and cgroup.killed_for_memory(str(tmp_path / "none")) == 0


def born_there(group: str) -> bool:
    """Whether the kernel lets anybody be born into a group: not before 5.7, nor where a filter refuses clone3(2)."""
    pid, is_there = cgroup.fork(group)
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    return is_there


@pytest.mark.parametrize("refused", [False, True])
def test_fork(base: str, monkeypatch: pytest.MonkeyPatch, refused: bool) -> None:
    """The child is in the group when it begins; where the kernel has no such call, it is told to join."""
    group = cgroup.make(base, "s")
    if not refused and not born_there(group):
        pytest.skip("nobody can be born into a cgroup here")
    if refused:
        monkeypatch.setattr(cgroup, "_SYS_CLONE3", 1 << 20)
    reader, writer = os.pipe()
    mine = threading.get_native_id()
    pid, is_there = cgroup.fork(group)
    if pid == 0:
        try:
            with open("/proc/self/cgroup") as file:
                text = file.read().strip().rpartition("\n")[2]
            os.write(writer, f"{text} {is_there} {threading.get_native_id() != mine} {os.getppid()}".encode())
        finally:
            os._exit(7)
    os.close(writer)
    with open(reader) as file:
        where, said, other, parent = file.read().split()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    assert (where.endswith("/s"), said, other, int(parent)) == (not refused, str(not refused), "True", os.getpid())
    assert is_there is not refused


def test_fork_after_a_kill(base: str) -> None:  # G6
    """Some kernels kill whoever is born into a group to which cgroup.kill was ever written."""
    group = cgroup.make(base, "s")
    for _ in range(2):
        assert cgroup.kill(group)
        pid, is_there = cgroup.fork(group)
        if pid == 0:
            os._exit(3 + is_there)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 3 + is_there


def test_fork_into_a_frozen_group(base: str) -> None:
    """Whoever starts it does not stand still with it."""
    group = cgroup.make(base, "s")
    if not born_there(group):
        pytest.skip("nobody can be born into a cgroup here")
    freeze = Path(group, "cgroup.freeze")
    freeze.write_text("1")
    pid, is_there = cgroup.fork(group)
    if pid == 0:
        os._exit(5)
    assert is_there
    freeze.write_text("0")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 5


def test_fork_without_a_group(tmp_path: Path) -> None:
    for group in (None, str(tmp_path / "gone"), str(tmp_path)):  # not asked for, not there, no group
        pid, is_there = cgroup.fork(group)
        if pid == 0:
            os._exit(is_there)
        assert os.waitpid(pid, 0)[1] == 0 and not is_there
