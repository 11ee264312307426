"""superd.manager.configuration: last good versions, what is in force, and what the next manager gets."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from superd.core import schema
from superd.core.diff import diff
from superd.core.spec import Snapshot
from superd.manager.configuration import Configuration
from superd.system.configdir import load_config

ENVIRON = {"PATH": "/usr/bin:/bin"}


def cat(port: int, more: str = "") -> str:
    return f'listen = "tcp:127.0.0.1:{port}"\ncommand = "/bin/cat"\n{more}'


class World:
    def __init__(self, path: Path) -> None:
        self.path = path
        (path / "conf.d").mkdir(parents=True)
        self.configuration = self.fresh()

    def fresh(self) -> Configuration:
        return Configuration([str(self.path)], ENVIRON, is_root=os.geteuid() == 0)

    def write(self, name: str, text: str | None) -> None:
        path = self.path / "conf.d" / f"{name}.toml"
        if text is None:
            path.unlink(missing_ok=True)
        else:
            path.write_text(text)

    def start(self) -> Configuration:
        assert not self.configuration.read_first()
        return self.configuration


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    umask = os.umask(0o022)
    yield World(tmp_path / "etc")
    os.umask(umask)


def ports(snapshot: Snapshot) -> dict[str, int | None]:
    return {name: spec.sockets[0].address.port for name, spec in snapshot.services.items()}


@pytest.mark.parametrize("bad", ["", "x", cat(1, "comand = 1"), 'listen = "tcp:7"\n', cat(70000)])
def test_last_good_version(world: World, bad: str) -> None:  # K3 K10
    world.write("a", cat(7))
    world.write("b", cat(8))
    now = world.start()
    world.write("a", bad)
    world.write("b", cat(9))
    world.write("new", bad)
    reading = now.read()
    assert ports(reading.snapshot) == {"a": 7, "b": 9} and set(reading.snapshot.broken) == {"new"}
    assert reading.has_errors and set(reading.kept) == {"a"} and "a.toml" in reading.kept["a"]
    assert [str(entry) for entry in diff(now.snapshot, reading.snapshot).entries] == ["b: rebind (listen changed)"]
    assert now.accept(reading) and "running the last good version" in now.notes["a"]
    world.write("a", None)
    assert ports(now.read().snapshot) == {"b": 9}
    world.write("a", cat(10))
    reading = now.read()
    assert ports(reading.snapshot) == {"a": 10, "b": 9} and not reading.kept
    now.accept(reading)
    assert now.notes == {}


def test_kept_before_new(world: World) -> None:  # A12
    """What is in force keeps its address, also from a file that comes first; then that one is kept as it was, too."""
    for name, port in (("a", 1), ("b", 2), ("c", 3)):
        world.write(name, cat(port))
    now = world.start()
    world.write("a", cat(2))
    world.write("b", "")
    world.write("c", cat(1))
    reading = now.read()
    assert ports(reading.snapshot) == {"a": 1, "b": 2, "c": 3} and set(reading.kept) == {"a", "b", "c"}
    assert not diff(now.snapshot, reading.snapshot)


def test_who_is_in_force_has_the_address(world: World) -> None:  # A12
    """The file that comes first and late is the one that is wrong."""
    world.write("b", cat(2))
    now = world.start()
    world.write("a", cat(2))
    reading = now.read()
    assert ports(reading.snapshot) == {"b": 2} and set(reading.snapshot.broken) == {"a"} and not reading.kept
    assert [problem.service for problem in reading.problems] == ["a"]
    now.accept(reading)
    assert not now.read().kept
    following = world.fresh()
    following.restore(now.pack())
    assert following.snapshot == now.snapshot and not following.read().kept
    world.write("b", None)
    assert ports(now.read().snapshot) == {"a": 2}


def test_program_is_deleted(world: World, tmp_path: Path) -> None:
    """A running service is not lost by what becomes of the machine; whoever looks again is told."""
    program = tmp_path / "etc" / "program"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    world.write("a", f'command = "{program}"\n')
    now = world.start()
    program.unlink()
    assert not now.read(look_again=False).problems
    reading = now.read()
    assert set(reading.snapshot.services) == {"a"} and set(reading.kept) == {"a"}
    now.accept(reading)
    assert set(now.read().snapshot.services) == {"a"}
    following = world.fresh()
    following.restore(now.pack())
    assert following.snapshot == now.snapshot
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    assert not now.read().problems


def test_program_is_installed_later(world: World, tmp_path: Path) -> None:
    program = tmp_path / "etc" / "program"
    world.write("a", f'command = "{program}"\n')
    now = world.configuration
    assert now.read_first()
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    assert set(now.read().snapshot.services) == {"a"}


def test_templates_as_a_whole(world: World) -> None:
    text = 'listen = "unix:/run/${name}"\ncommand = "/bin/cat"\n'
    world.write("w@", f'instances = ["a", "b"]\n{text}')
    now = world.start()
    world.write("w@", f'instances = ["b", "c"]\ncomand = 1\n{text}')
    assert set(now.read().snapshot.services) == {"w@a", "w@b"}
    world.write("w@", f'instances = ["b", "c"]\n{text}')
    now.accept(now.read())
    now.extra = {"w@": ("x",)}
    reading = now.read_in_force()
    assert list(reading.snapshot.services) == ["w@b", "w@c", "w@x"]
    now.accept(reading)
    assert list(now.read().snapshot.services) == ["w@b", "w@c", "w@x"]
    now.extra = {"w@": ()}
    assert list(now.read_in_force().snapshot.services) == ["w@b", "w@c"]


def test_refused(world: World) -> None:  # K11
    """What could not be carried out is not in force, and not what the next manager gets."""
    world.write("a", cat(1))
    world.write("b", cat(2))
    now = world.start()
    world.write("a", cat(3))
    world.write("b", cat(4))
    now.accept(now.read(), {"a": "cannot bind"})
    assert ports(now.snapshot) == {"a": 1, "b": 4} and now.notes == {"a": "changed on disk: cannot bind"}
    following = world.fresh()
    following.restore(now.pack())
    assert following.snapshot == now.snapshot
    assert ports(now.read().snapshot) == {"a": 3, "b": 4}


def test_changed_on_disk(world: World) -> None:
    world.write("a", cat(1))
    world.write("b", cat(2))
    now = world.start()
    assert now.changed_on_disk() == set()
    world.write("a", cat(1, "# a comment\n"))
    world.write("b", None)
    world.write("c", cat(3))
    assert now.changed_on_disk() == {"a", "b", "c"}


def test_packed_in_pieces(world: World) -> None:
    """Changes are added; one that was cut off when its manager was killed never was."""
    world.write("a", cat(1))
    world.write("z", cat(2))
    now = world.start()
    data = now.pack()
    for name, text in (("b", cat(3)), ("z", None), ("a", cat(4)), ("c", "bad")):
        world.write(name, text)
        reading = now.read()
        now.accept(reading)
        following = world.fresh()
        following.restore(data)
        before = following.snapshot
        more = now.pack(changes=True)
        for length in (1, len(more) // 2, len(more) - 1):
            following = world.fresh()
            following.restore(data + more[:length])
            assert following.snapshot == before
        data += more
        following = world.fresh()
        following.restore(data)
        assert following.snapshot == now.snapshot and list(following.snapshot.services) == list(now.snapshot.services)
    for wrong in (b"", b"x", b"\0" * 100, data[:50]):
        with pytest.raises(ValueError):
            world.fresh().restore(wrong)


def test_one_of_many(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of thousands of files the one that has changed is read and parsed, and the others are what they were."""
    for number in range(1500):
        world.write(f"s{number:04}", cat(number + 1))
    now = world.start()
    parsed: list[str] = []
    read: list[str] = []
    document, opened = schema._document, os.open
    monkeypatch.setattr(schema, "_document", lambda source: parsed.append(source.name) or document(source))
    monkeypatch.setattr(os, "open", lambda path, *rest: read.append(str(path)) or opened(path, *rest))
    path = world.path / "conf.d" / "s0700.toml"
    path.write_text(cat(5000))
    for hints in (frozenset({str(path)}), None):
        reading = now.read(hints, look_again=hints is None)
        assert [entry.name for entry in diff(now.snapshot, reading.snapshot).entries] == ["s0700"]
    assert parsed == ["s0700"] and read.count(str(path)) >= 1 and len(read) < 1500
    path.write_text(cat(900))  # an address that another one has
    reading = now.read(frozenset({str(path)}))
    assert set(reading.kept) == {"s0700"} and "'s0899'" in reading.kept["s0700"]
    now.accept(now.read())
    assert len(now.pack(changes=True)) > len(now.pack(changes=True))


TEXTS = st.sampled_from(
    [None, "", "x = ", cat(1), cat(2), cat(3, "[limits]\nmax_connections = 2\n"), cat(2, "enabled = false\n"),
     'command = "/bin/cat"\n', 'command = "/nonexistent"\n']
)  # fmt: skip


@given(st.lists(st.tuples(st.sampled_from(["a", "b", "c", "d"]), TEXTS, st.booleans()), max_size=8))
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_in_the_end_as_a_fresh_start(world: World, changes: list[tuple[str, str | None, bool]]) -> None:
    """With or without hints, over good and bad versions: what is good on disk in the end is in force, and what is not
    good is what was in force before, or nothing."""
    for path in (world.path / "conf.d").iterdir():
        path.unlink()
    now = world.fresh()
    now.read_first()
    packed = now.pack()
    for name, text, with_hint in changes:
        before = now.snapshot
        world.write(name, text)
        path = str(world.path / "conf.d" / f"{name}.toml")
        reading = now.read(frozenset({path}) if with_hint else None, look_again=not with_hint)
        now.accept(reading)
        packed += now.pack(changes=True)
        fresh, _ = load_config([str(world.path)], environ=ENVIRON)
        if not reading.kept and not fresh.broken:
            assert now.snapshot == fresh and list(now.snapshot.services) == list(fresh.services)
        for unit in reading.kept:
            assert now.snapshot.services[unit] == before.services[unit]
        assert fresh.services.keys() <= {*now.snapshot.services, *now.snapshot.broken}
        following = world.fresh()
        following.restore(packed)
        assert following.snapshot == now.snapshot
