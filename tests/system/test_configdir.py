"""superd.system.configdir: which files are read, which are refused, and the facts of this machine."""

from __future__ import annotations

import os
import select
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from superd.core.problems import Problem
from superd.core.spec import Snapshot
from superd.system.configdir import RealMachine, Scan, Scanner, default_config_paths, load_config, read

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="gives files to other users")

TEXT = 'listen = "unix:{}.sock"\ncommand = "/bin/cat"\n'


@pytest.fixture
def conf(tmp_path: Path) -> Iterator[Path]:
    """conf.d with ten good services; every directory is safe (pytest's own are 0700)."""
    umask = os.umask(0o022)
    conf_d = tmp_path / "superd" / "conf.d"
    conf_d.mkdir(parents=True)
    for number in range(10):
        (conf_d / f"s{number}.toml").write_text(TEXT.format(number))
    yield conf_d
    os.umask(umask)


def load(conf: Path) -> tuple[Snapshot, list[Problem]]:
    return load_config([str(conf.parent)], environ={"PATH": "/usr/bin:/bin"})


def only(conf: Path, name: str | None = "bad") -> Problem:
    """The one problem there is; the ten run, and the service it names does not."""
    snapshot, problems = load(conf)
    assert len(snapshot.services) == 10 and len(problems) == 1, problems
    assert problems[0].service == name and set(snapshot.broken) == ({name} if name else set())
    return problems[0]


def test_one_that_goes_while_the_directory_is_read(conf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not there any more, and that is no error; a link that leads nowhere is one."""
    names = os.listdir

    def listdir(path: str) -> list[str]:
        found = names(path)
        (conf / "s3.toml").unlink(missing_ok=True)
        return found

    monkeypatch.setattr(os, "listdir", listdir)
    snapshot, problems = load(conf)
    assert problems == [] and len(snapshot.services) == 9
    (conf / "s4.toml").unlink()
    (conf / "s4.toml").symlink_to("/nonexistent/s4.toml")
    assert [problem.service for problem in load(conf)[1]] == ["s4"]


def test_read_in_order_with_changes(conf: Path) -> None:
    (conf.parent / "superd.toml").write_text('conf_dirs = ["more"]\n')
    (conf.parent / "more").mkdir()
    (conf.parent / "more" / "a.toml").write_text("")
    for name in ("b.toml", "a.toml", "a.toml~", ".x.toml"):
        (conf / "s1.toml.d").mkdir(exist_ok=True)
        (conf / "s1.toml.d" / name).write_text("")
    files, problems = read([str(conf.parent)])
    assert problems == []
    assert [(file.role, file.name, os.path.relpath(file.path, conf.parent)) for file in files[:5]] == [
        ("daemon", "superd", "superd.toml"),
        ("service", "s0", "conf.d/s0.toml"),
        ("service", "s1", "conf.d/s1.toml"),
        ("drop-in", "s1", "conf.d/s1.toml.d/a.toml"),
        ("drop-in", "s1", "conf.d/s1.toml.d/b.toml"),
    ]
    assert files[-1].path == str(conf.parent / "more" / "a.toml")


@pytest.mark.parametrize("which", ["conf.d", "conf.d/s1.toml", "conf.d/", "./conf.d/../conf.d"])
def test_what_a_path_may_be(conf: Path, which: str) -> None:
    files, problems = read([f"{conf.parent}/{which}"])
    assert problems == [] and len(files) == (1 if which.endswith(".toml") else 10)


def test_a_path_that_is_not_there(conf: Path) -> None:
    (problem,) = read([str(conf / "none")])[1]
    assert problem.message == f"cannot read {conf}/none: no such file or directory"
    (problem,) = read([str(conf / "s1.toml"), "/dev/null"])[1]
    assert problem.code == "bad-name"


def test_what_editors_leave_is_passed_over(conf: Path) -> None:
    # K2
    before = read([str(conf)])
    for name in (
        "a.toml~", "#a.toml#", "4913", ".a.toml.swp", "a.toml.swp", "a.toml.bak", "a.toml.dpkg-new", "a.toml.rpmnew",
        "a.toml.rpmsave", ".a.toml", "..toml", "README", "#a.toml",
    ):  # fmt: skip
        (conf / name).write_text("nonsense")
    (conf / ".#a.toml").symlink_to("nobody@host.1234")
    (conf / "a.toml.d").mkdir()
    assert read([str(conf)]) == before


def test_names_that_no_service_has(conf: Path) -> None:
    # J10, K15
    for name in (b"a b.toml", b"a" * 250 + b".toml", b"\xff.toml", b"Web.toml", b"_x.toml", b"w@c.toml"):
        (conf / os.fsdecode(name)).write_text("nonsense")
    snapshot, problems = load(conf)
    assert len(snapshot.services) == 10 and snapshot.broken == {}
    assert [(p.code, p.severity) for p in problems] == [("bad-name", "warning")] * 6
    (conf / "S1.toml").write_text("")
    duplicate = next(p for p in load(conf)[1] if p.code == "duplicate-name")
    assert duplicate.is_error and "/S1.toml" in duplicate.message and "/s1.toml" in duplicate.message


def test_only_regular_files(conf: Path) -> None:
    # K16: and nothing waits
    os.mkfifo(conf / "bad.toml")
    assert "not a regular file" in only(conf).message
    (conf / "bad.toml").unlink()
    (conf / "bad.toml").mkdir()
    assert "not a regular file" in only(conf).message
    (conf / "bad.toml").rmdir()
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(os.path.relpath(conf / "bad.toml"))
        assert only(conf).code == "unreadable"
    (conf / "bad.toml").unlink()
    (conf / "bad.toml").symlink_to("/dev/zero")
    assert only(conf).code in ("unreadable", "not-trusted")


def test_a_large_file(conf: Path) -> None:
    # K16
    with open(conf / "bad.toml", "wb") as file:
        file.truncate(10 << 30)
    assert "10737418240 bytes, and 1048576 are allowed" in only(conf).message


def test_symbolic_links(conf: Path) -> None:
    # K1
    (conf.parent / "elsewhere.toml").write_text(TEXT.format("x"))
    (conf / "good.toml").symlink_to(conf.parent / "elsewhere.toml")
    snapshot, problems = load(conf)
    assert problems == [] and "good" in snapshot.services
    (conf / "good.toml").unlink()
    (conf / "bad.toml").symlink_to("nowhere")
    assert "no such file" in only(conf).message


def test_a_change_that_cannot_be_read_breaks_its_service(conf: Path) -> None:
    (conf / "bad.toml").write_text(TEXT.format("x"))
    (conf / "bad.toml.d").mkdir()
    os.mkfifo(conf / "bad.toml.d" / "a.toml")
    assert only(conf).path == str(conf / "bad.toml.d" / "a.toml")


def test_a_superd_toml_that_cannot_be_read_breaks_all(conf: Path) -> None:
    # A10: its [defaults] may have said who they run as
    (conf.parent / "superd.toml").mkdir()
    snapshot, problems = load(conf)
    assert snapshot.services == {} and len(snapshot.broken) == 10
    assert problems[0].path == str(conf.parent / "superd.toml")


@needs_root
@pytest.mark.parametrize("mode", [0o666, 0o646, 0o664])
def test_a_file_that_others_can_write(conf: Path, mode: int) -> None:
    # K1
    (conf / "bad.toml").write_text(TEXT.format("x"))
    (conf / "bad.toml").chmod(mode)
    problem = only(conf)
    assert problem.code == "not-trusted" and f"mode {mode:04o}" in problem.message


@needs_root
def test_a_file_of_somebody_else(conf: Path) -> None:
    # K1
    (conf / "bad.toml").write_text(TEXT.format("x"))
    os.chown(conf / "bad.toml", 65534, 0)
    assert "belongs to" in only(conf).message


@needs_root
def test_a_link_to_where_others_can_write(conf: Path, tmp_path: Path) -> None:
    # K1
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o1777)
    (tmp_path / "open" / "x.toml").write_text(TEXT.format("x"))
    (conf / "bad.toml").symlink_to(tmp_path / "open" / "x.toml")
    assert "writable by everybody" in only(conf).message


@needs_root
@pytest.mark.parametrize(("depth", "mode"), [(0, 0o775), (0, 0o1777), (1, 0o777), (1, 0o2775)])
def test_a_directory_that_others_can_write(conf: Path, depth: int, mode: int) -> None:
    # K1
    (conf, conf.parent)[depth].chmod(mode)
    (problem,) = load(conf)[1]
    assert problem.code == "not-trusted" and f"mode {mode:04o}" in problem.message
    assert load(conf)[0].services == {}


@needs_root
def test_a_sticky_directory_of_root_may_be_above(conf: Path) -> None:
    # K1: as /tmp is
    conf.parent.parent.chmod(0o1777)
    assert load(conf)[1] == []


@needs_root
def test_programs_that_others_can_write(conf: Path, tmp_path: Path) -> None:
    # E26
    program = tmp_path / "program"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    (conf / "bad.toml").write_text(f'listen = "unix:x"\ncommand = "{program}"\n')
    snapshot, problems = load(conf)
    assert problems == [] and snapshot.services["bad"].command == (str(program),)
    program.chmod(0o777)
    assert "does not start" in only(conf).message
    (tmp_path / "link").symlink_to(program)
    (conf / "bad.toml").write_text(f'listen = "unix:x"\ncommand = "{tmp_path}/link"\n')
    assert "mode 0777" in only(conf).message


def test_facts_of_this_machine(tmp_path: Path) -> None:
    machine = RealMachine()
    assert machine.user("root") == (0, 0) == machine.user(0)
    assert machine.user("no-such-user") is None is machine.group("no-such-group")
    assert machine.user(4294967290) is None is machine.group(4294967290)
    assert machine.user(os.geteuid()) is not None  # also without an entry in /etc/passwd
    assert machine.group("root") == 0
    assert machine.port_of("no-such-service", "tcp") is None
    cat = machine.file("/bin/cat")
    assert cat is not None and cat.kind == "file" and cat.executable
    assert cat.head is not None and cat.head[1:4] == b"ELF"
    assert machine.file(str(tmp_path / "none")) is None is machine.file("/\0")
    directory = machine.file(str(tmp_path))
    assert directory is not None and directory.kind == "directory"
    assert machine.untrusted(str(tmp_path / "none"), frozenset({0})) is not None


def test_a_directory_and_its_files(tmp_path: Path, root: None) -> None:  # F18 K1
    """One directly in /tmp is as good as a deeper one; /tmp itself is not, for everybody may add files there. Only a
    sticky directory of root's counts as one."""
    sticky = tmp_path / "sticky"
    sticky.mkdir()
    sticky.chmod(0o1777)
    (sticky / "mine").mkdir(mode=0o755)
    (sticky / "mine" / "file").touch(mode=0o644)
    (sticky / "file").touch(mode=0o644)
    ours = frozenset({0, os.geteuid()})

    def refused(path: Path) -> bool:
        return RealMachine().untrusted(str(path), ours) is not None

    found = [refused(sticky / name) for name in ("mine", "mine/file", ".", "file")]
    assert found == [False, False, True, True]
    (sticky / "mine").chmod(0o775)
    assert refused(sticky / "mine")


def test_default_paths() -> None:
    assert default_config_paths({}, 0) == ["/etc/superd"]
    assert default_config_paths({"HOME": "/home/u"}, 1000) == ["/home/u/.config/superd"]
    assert default_config_paths({"SUPERD_CONFIG": "/x"}, 0) == ["/x"]


@needs_root
def test_a_link_that_others_could_turn(conf: Path) -> None:  # K1 K6
    """What it leads to now is root's own; on the way there is a directory, or a link, that is not."""
    (conf / "s0.toml").rename(conf.parent / "real.toml")
    between = conf.parent / "between"
    between.mkdir()
    (between / "link").symlink_to(conf.parent / "real.toml")
    (conf / "s0.toml").symlink_to(between / "link")
    assert not load(conf)[1]
    between.chmod(0o777)
    assert only_bad(conf, "s0").code == "not-trusted"
    between.chmod(0o1777)
    assert not load(conf)[1]
    os.lchown(between / "link", 65534, 65534)
    assert only_bad(conf, "s0").code == "not-trusted"


def only_bad(conf: Path, name: str) -> Problem:
    snapshot, (problem,) = load(conf)
    assert set(snapshot.broken) == {name}
    return problem


# -- reading again


def same(one: Scan, other: Scan) -> None:
    assert one.files == other.files and one.unreadable == other.unreadable and one.watch == other.watch
    assert sorted(map(str, one.problems)) == sorted(map(str, other.problems))


@given(st.lists(st.tuples(st.sampled_from(["s1", "s2", "new", "s1.toml.d/x", "../superd", "Bad"]),
                          st.sampled_from(["", "x = 1", "y = 2", None, "link", "fifo"])), max_size=6))  # fmt: skip
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_hints_are_enough(conf: Path, changes: list[tuple[str, str | None]]) -> None:
    """To look at what has changed alone finds what a first look finds."""
    scanner = Scanner([str(conf.parent)])
    scanner.scan()
    for name, what in changes:
        path = Path(os.path.normpath(conf / f"{name}.toml"))
        path.parent.mkdir(exist_ok=True)
        path.unlink(missing_ok=True)
        if what == "link":
            path.symlink_to(conf.parent / "elsewhere")
        elif what == "fifo":
            os.mkfifo(path)
        elif what is not None:
            path.write_text(what)
        entry = str(path) if ".toml.d" not in str(path) else str(path.parent).removesuffix(".d")
        same(scanner.scan(frozenset({entry})), Scanner([str(conf.parent)]).scan())
        same(scanner.scan(), Scanner([str(conf.parent)]).scan())


def test_what_is_the_same_is_not_read_again(conf: Path) -> None:  # K19
    """The same by its facts is the same value; a change that leaves size and times alone is seen all the same."""
    time_to_settle(conf / "s9.toml")
    scanner = Scanner([str(conf.parent)])
    first = scanner.scan().files
    assert all(one is other for one, other in zip(first, scanner.scan().files, strict=True))
    path = conf / "s3.toml"
    was, text = os.stat(path), path.read_text()
    path.write_text(text.replace("cat", "dog"))
    os.utime(path, ns=(was.st_atime_ns, was.st_mtime_ns))
    second = scanner.scan().files
    assert [one is other for one, other in zip(first, second, strict=True)].count(False) == 1
    assert b"dog" in second[3].data
    path.write_text(text)
    assert scanner.scan().files[3].data == first[3].data


def time_to_settle(path: Path) -> None:
    """Until a file is old enough for its times to tell whether it has changed."""
    while os.stat(path).st_ctime_ns > time.time_ns() - 60_000_000:
        select.select([], [], [], 0.01)


def test_a_directory_that_cannot_be_read_is_told(conf: Path) -> None:
    scanner = Scanner([str(conf.parent)])
    scanner.scan()
    conf.rename(conf.with_name("old"))
    found = scanner.scan()
    assert found.unreadable == {str(conf)} and not found.files and len(found.problems) == 1
    conf.mkdir()
    assert scanner.scan().unreadable == frozenset() and not scanner.scan().problems


def test_broken_superd_toml_keeps_its_directories(conf: Path) -> None:
    (conf.parent / "more").mkdir()
    (conf.parent / "more" / "m.toml").write_text(TEXT.format("m"))
    (conf.parent / "superd.toml").write_text('conf_dirs = ["more"]')
    scanner = Scanner([str(conf.parent)])
    assert len(scanner.scan().files) == 12
    (conf.parent / "superd.toml").write_text('conf_dirs = ["mo')
    assert len(scanner.scan().files) == 12
    (conf.parent / "superd.toml").unlink()
    assert len(scanner.scan().files) == 10


def test_what_is_watched(conf: Path) -> None:  # K5 K6
    (conf / "..v1").mkdir()
    (conf / "..v1" / "x").write_text("")
    (conf / "..data").symlink_to("..v1")
    (conf / "k.toml").symlink_to("..data/x")
    (conf / "s1.toml.d").mkdir()
    base = str(conf.parent)
    watch = Scanner([base]).scan().watch
    assert watch[str(conf)][None] == {f"{conf}/"}
    assert watch[base] == {"conf.d": {""}, "superd.toml": {""}}
    assert watch[os.path.dirname(base)] == {"superd": {""}}
    assert watch[str(conf)]["..data"] == watch[f"{conf}/..v1"]["x"] == {f"{conf}/k.toml"}
    assert watch[f"{conf}/s1.toml.d"] == {None: {f"{conf}/s1.toml"}}
