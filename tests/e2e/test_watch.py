"""superd follows its files: whoever changes them, and in whatever way, the end state is what is on disk."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from harness import Superd, ask, cpu_s, eventually, fetch, toml

CAT = toml(listen="tcp:127.0.0.1:0", command=["/bin/cat"])


def echo(text: str) -> str:
    return toml(listen="tcp:127.0.0.1:0", command=["/bin/echo", text])


def names(superd: Superd) -> list[str]:
    return [row["name"] for row in superd.call("List")["services"]]


def says(superd: Superd, name: str, text: str) -> None:
    eventually(lambda: fetch(superd.connect(name)), f"{text}\n".encode())


def conf(superd: Superd, name: str = "a") -> Path:
    return superd.conf / "conf.d" / f"{name}.toml"


@pytest.fixture
def one(superd: Superd) -> Superd:
    """A superd that follows one service, `a`, and has done so from the first event on."""
    superd.write("a", echo("one"))
    superd.start()
    settle(superd)
    return superd


def settle(superd: Superd) -> None:
    """What a file says once it is in force: superd watches by then."""
    superd.write("settled", CAT)
    superd.wait_record(event="listening", service="settled")
    conf(superd, "settled").unlink()
    eventually(lambda: "settled" in names(superd), False)


def test_within_half_a_second(one: Superd) -> None:
    for change in (
        lambda: one.write("new", CAT),
        lambda: one.write("new", echo("x")),
        lambda: conf(one, "new").unlink(),
    ):
        mark, began = one.mark(), time.monotonic()
        change()
        one.wait_record(after=mark, event="reload")
        assert time.monotonic() - began < 0.5
    with pytest.raises(AssertionError):
        one.status("new")


def write_slowly(path: Path, text: str) -> None:
    """K3: a byte at a time; the middle is neither TOML nor a service."""
    with open(path, "wb", buffering=0) as file:
        for byte in text.encode():
            file.write(bytes([byte]))


def with_vim(path: Path, text: str) -> None:
    """backup, 4913, a new file, the backup gone, as `set backup writebackup` does it."""
    probe = path.with_name("4913")
    probe.touch()
    probe.unlink()
    backup = path.with_name(path.name + "~")
    path.rename(backup)
    path.write_text(text)
    backup.unlink()


def with_emacs(path: Path, text: str) -> None:
    lock = path.with_name(f".#{path.name}")
    lock.symlink_to("user@host.1:2")
    shutil.copy(path, path.with_name(path.name + "~"))
    path.write_text(text)
    lock.unlink()


def with_sed(path: Path, text: str) -> None:
    subprocess.run(["sed", "-i", "s/one/two/", str(path)], check=True)


def with_cp(path: Path, text: str) -> None:
    source = path.parent.parent / "source"
    source.write_text(text)
    subprocess.run(["cp", str(source), str(path)], check=True)


def by_rename(path: Path, text: str) -> None:
    fresh = path.with_name(".fresh")
    fresh.write_text(text)
    fresh.rename(path)


def by_hard_link(path: Path, text: str) -> None:
    fresh = path.with_name("fresh")
    fresh.write_text(text)
    path.unlink()
    os.link(fresh, path)
    fresh.unlink()


def with_old_times(path: Path, text: str) -> None:  # K19 M4
    path.write_text(text)
    os.utime(path, (0, 0))


def gone_and_back(path: Path, text: str) -> None:
    path.unlink()
    path.write_text(text)


@pytest.mark.parametrize(
    "edit",
    [write_slowly, with_vim, with_emacs, with_sed, with_cp, by_rename, by_hard_link, with_old_times, gone_and_back],
)
def test_editors(one: Superd, edit: Callable[[Path, str], None]) -> None:  # K3
    """The change is there, no wrong one was, and the service was never away: its socket stayed."""
    edit(conf(one), echo("two"))
    says(one, "a", "two")
    assert len(one.find_records(event="listening", service="a")) == 1
    assert not one.find_records(level="err") and names(one) == ["a"]


def test_slow_writer(one: Superd) -> None:  # K3
    """In pieces with pauses longer than the quiet that superd waits for: only the whole counts."""
    with socket.create_connection(one.address("a")), open(conf(one), "wb", buffering=0) as file:
        for piece in re.findall(r"(?s).{1,20}", echo("two")):
            file.write(piece.encode())
            one.write("other", echo(piece.strip()[:3].replace('"', "")))  # it wakes up and looks meanwhile
            one.wait_record(event="listening", service="other")
            assert fetch(one.connect("a")) == b"one\n"
    says(one, "a", "two")
    assert not one.find_records(level="err")


@pytest.mark.parametrize("bad", ["", 'listen = "tcp:0"\ncomm', "comand = 1"])
def test_bad_file(one: Superd, bad: str) -> None:  # K10
    conf(one).write_text(bad)
    one.wait_record(level="err", service="a")
    eventually(lambda: "running the last good version" in one.status("a")["note"], True)
    assert fetch(one.connect("a")) == b"one\n"
    one.write("bad", bad)
    eventually(lambda: names(one), ["a", "bad"])
    assert one.status("bad")["state"] == "bad config"
    one.write("a", echo("two"))
    says(one, "a", "two")
    assert one.status("a")["note"] == ""


def test_drop_ins(one: Superd) -> None:
    changes = conf(one).with_name("a.toml.d")
    changes.mkdir()
    (changes / "10.toml").write_text('command = ["/bin/echo", "ten"]\n')
    says(one, "a", "ten")
    (changes / "10.toml").write_text('command = ["/bin/echo", "eleven"]\n')
    says(one, "a", "eleven")
    shutil.rmtree(changes)
    says(one, "a", "one")


def test_superd_toml_and_its_directories(one: Superd) -> None:
    (one.conf / "more").mkdir()
    (one.conf / "more" / "m.toml").write_text(echo("m"))
    one.write_daemon('conf_dirs = ["more"]')
    one.wait_record(event="listening", service="m")
    (one.conf / "more" / "n.toml").write_text(echo("n"))
    one.wait_record(event="listening", service="n")
    (one.conf / "superd.toml").unlink()
    eventually(lambda: names(one), ["a"])


def test_config_map(superd: Superd) -> None:  # K6
    """Kubernetes renames one link; the names that superd reads stay what they were."""
    folder = superd.conf / "conf.d"

    def version(number: int) -> None:
        data = folder / f"..{number}"
        data.mkdir()
        for name in ("a", "b"):
            (data / f"{name}.toml").write_text(echo(f"{name}{number}"))
        link = folder / "..data_tmp"
        link.symlink_to(data.name)
        link.rename(folder / "..data")

    version(1)
    for name in ("a", "b"):
        (folder / f"{name}.toml").symlink_to(f"..data/{name}.toml")
    superd.start()
    settle(superd)
    for number in (2, 3):
        version(number)
        shutil.rmtree(folder / f"..{number - 1}")
        says(superd, "a", f"a{number}")
        says(superd, "b", f"b{number}")
    assert not superd.find_records(level="err")


def test_link_to_elsewhere(superd: Superd) -> None:
    target = superd.room("elsewhere") / "service"
    target.write_text(echo("one"))
    conf(superd).symlink_to(target)
    superd.start()
    settle(superd)
    target.write_text(echo("two"))
    says(superd, "a", "two")


def test_directory_is_replaced(one: Superd) -> None:  # K5
    folder = one.conf / "conf.d"
    for number in range(2):
        fresh = one.conf / "fresh"
        fresh.mkdir()
        (fresh / "a.toml").write_text(echo(f"new{number}"))
        folder.rename(one.conf / f"old{number}")
        fresh.rename(folder)
        says(one, "a", f"new{number}")
    conf(one).write_text(echo("last"))
    says(one, "a", "last")
    assert len(one.find_records(event="listening", service="a")) == 1


def test_parent_is_replaced(one: Superd) -> None:  # K5
    fresh = one.dir / "fresh"
    (fresh / "conf.d").mkdir(parents=True)
    (fresh / "conf.d" / "a.toml").write_text(echo("new"))
    one.conf.rename(one.dir / "old")
    fresh.rename(one.conf)
    says(one, "a", "new")
    conf(one).write_text(echo("last"))
    says(one, "a", "last")


def test_unmounted(superd: Superd, root: None, require: Callable[[str], str]) -> None:
    folder = superd.conf / "conf.d"
    mounted = subprocess.run([require("mount"), "-t", "tmpfs", "-o", "mode=0755", "none", str(folder)])
    if mounted.returncode:
        pytest.skip("cannot mount here")
    try:
        superd.write("a", echo("one"))
        superd.start()
        settle(superd)
        says(superd, "a", "one")
    finally:
        subprocess.run([require("umount"), "-l", str(folder)], check=True)
    superd.write("b", echo("below"))
    superd.wait_record(event="listening", service="b")
    eventually(lambda: names(superd), ["b"])


def test_ten_thousand_renames(one: Superd) -> None:  # K4
    """The kernel's queue overflows; the end state is right, and little CPU was used."""
    folder = one.conf / "conf.d"
    before = cpu_s(one.manager)
    x, y = folder / "x.toml", folder / "y.toml"
    x.write_text(echo("x"))
    for _ in range(5000):
        x.rename(y)
        y.rename(x)
    one.write("a", echo("two"))
    began = time.monotonic()
    says(one, "a", "two")
    eventually(lambda: names(one), ["a", "x"])
    assert time.monotonic() - began < 5 and cpu_s(one.manager) - before < 2


def test_fifo_does_not_hang_it(one: Superd) -> None:  # F17 K16
    os.mkfifo(conf(one, "f"))
    one.write("b", echo("b"))
    one.wait_record(event="listening", service="b")
    assert one.status("f")["state"] == "bad config"


@pytest.mark.parametrize("how", ["--no-watch", "superd.toml"])
def test_switched_off(superd: Superd, how: str) -> None:
    superd.write("a", CAT)
    if how == "superd.toml":
        superd.write_daemon("watch = false")
    superd.start(*([how] if how.startswith("-") else []))
    assert not any("inotify" in link for link in links(superd.manager))
    superd.write("b", CAT)
    assert names(superd) == ["a"]
    superd.write_daemon("watch = true")
    superd.call("Reload")
    assert any("inotify" in link for link in links(superd.manager)) == (how == "superd.toml")
    assert names(superd) == ["a", "b"]


def links(pid: int) -> list[str]:
    return [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")
            if os.path.lexists(f"/proc/{pid}/fd/{fd}")]  # fmt: skip


@pytest.mark.parametrize("call, error", [("inotify_init1", "EMFILE"), ("inotify_add_watch", "ENOSPC")])
def test_without_inotify(superd: Superd, require: Callable[[str], str], call: str, error: str) -> None:  # K21
    """It looks now and then, and says so once."""
    tracer = [require("strace"), "-f", "-o", "/dev/null", "-e", f"trace={call}", "-e", f"inject={call}:error={error}"]
    superd.write("a", echo("one"))
    superd.start(wrapper=tracer)
    superd.wait_record(level="warning", message=re.compile("cannot watch the files: .*; looking every 5 s instead"))
    assert ask(superd.connect("a"), b"") == b"one\n"
    superd.write("b", CAT)
    superd.wait_record(event="listening", service="b")
    superd.write("a", echo("two"))
    says(superd, "a", "two")
    assert len(superd.find_records(message=re.compile("cannot watch"))) == 1


def test_the_next_manager_follows_too(one: Superd) -> None:
    one.kill_role("superd-manager")
    one.wait_record(message=re.compile("took over"))
    one.write("a", echo("two"))
    says(one, "a", "two")


def test_config_map_volume(superd: Superd, root: None, require: Callable[[str], str]) -> None:  # K1 K6
    """As Kubernetes has it: mode 0777 and mounted read-only; the kubelet writes where only it can."""
    volume = superd.dir / "volume"

    def publish(number: int, text: str) -> None:
        """A new directory, and then the one rename that makes it count."""
        version = volume / f"..version_{number}"
        version.mkdir()
        version.chmod(0o777)
        (version / "a.toml").write_text(text)
        (volume / "..data_tmp").symlink_to(version.name)
        (volume / "..data_tmp").rename(volume / "..data")

    volume.mkdir()
    publish(1, echo("one"))
    (volume / "a.toml").symlink_to("..data/a.toml")
    volume.chmod(0o777)
    mount = f'mount --bind "{volume}" "$0" && mount -o remount,bind,ro "$0" && exec "$@"'
    wrapper = [require("unshare"), "--mount", "sh", "-c", mount, str(superd.conf / "conf.d")]
    try:
        superd.start(wrapper=wrapper)
    except AssertionError:
        if any("unshare" in line or "mount" in line for line in superd.garbage):
            pytest.skip("mounting is not permitted here")
        raise
    says(superd, "a", "one")
    publish(2, echo("two"))
    says(superd, "a", "two")
    assert superd.status("a")["note"] == ""
