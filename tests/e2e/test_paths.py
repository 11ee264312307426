"""UNIX paths and ports over the deaths of superd."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import pytest
from harness import PYTHON, Superd, ask, toml, wait_gone


def identity(path: Path) -> tuple[int, int]:
    return (found := path.stat()).st_dev, found.st_ino


def kill_keeper(superd: Superd) -> None:
    """As the OOM killer does; the manager and the spawners go by themselves."""
    roles = superd.roles()
    os.kill(superd.pid, signal.SIGKILL)
    for pid in roles:
        wait_gone(pid)
    superd.wait_exit()


def test_stale_path(superd: Superd) -> None:  # D4 X7
    path = superd.dir / "x.sock"
    superd.write("cat", toml(listen=f"unix:{path}", command=["/bin/cat"]))
    for _ in range(3):
        mark = superd.mark()
        superd.start()
        assert ask(superd.connect("cat"), b"x") == b"x"
        assert not superd.find_records(after=mark, level=re.compile("warning|err"))
        assert superd.call("Health")["ready"]
        kill_keeper(superd)
        assert path.is_socket()


@pytest.mark.parametrize("how", ["stale", "live"])
def test_second_superd(superd: Superd, how: str) -> None:  # D4 D5
    """It says who has the address, waits, and takes nothing away: neither while it runs nor when it ends."""
    path = superd.dir / "x.sock"
    text = toml(listen=f"unix:{path}", command=["/bin/cat"])
    superd.write("cat", text)
    superd.start()
    superd.call("Health")
    files = {file: identity(file) for file in (path, superd.dir / "control.sock")}
    with Superd() as second:
        second.write("cat", text)
        second.control = superd.control
        second.start()
        said = second.wait_record(service="cat", message=re.compile("cannot bind"))["message"]
        assert f"pid {superd.pid} (superd-keeper)" in said
        second.wait_record(message=re.compile("cannot bind the control socket"))
        assert ask(superd.connect("cat"), b"x") == b"x"
        if how == "live":
            second.stop()
        else:
            kill_keeper(second)
    assert {file: identity(file) for file in files} == files
    assert superd.call("Health")["ready"]
    assert ask(superd.connect("cat"), b"x") == b"x"


def test_removed_paths_come_back(superd: Superd) -> None:  # D13
    """Those of per-connection and on-demand services and the control socket, all at the next look."""
    code = "import socket; socket.socket(fileno=3).accept()[0].sendall(b'x')"
    superd.write("cat", toml(listen=f"unix:{superd.dir}/a.sock", command=["/bin/cat"]))
    superd.write("once", toml(listen=f"unix:{superd.dir}/b.sock", run="on-demand", command=[PYTHON, "-I", "-c", code]))
    superd.start()
    superd.call("Health")
    os.unlink(superd.dir / "a.sock")
    os.replace(superd.dir / "b.sock", superd.dir / "moved.sock")
    os.unlink(superd.dir / "control.sock")
    superd.wait_record(event="listening", service="cat", after=superd.mark())
    superd.wait_records(2, event="listening", service="once")
    assert ask(superd.connect("cat"), b"y") == b"y"
    with superd.connect("once") as client:
        assert client.recv(1) == b"x"
    superd.wait_record(message=re.compile("control.sock has gone; opening it again"))
    assert superd.call("Health")["live"]


def test_paths_are_removed_at_the_end(superd: Superd) -> None:
    keys = {"command": ["/bin/cat"], "run": "on-demand", "pass_": "listen-fds"}
    superd.write("a", toml(listen=[f"unix:{superd.dir}/a/b.sock", f"unix-dgram:{superd.dir}/d.sock"], **keys))
    superd.write("c", toml(listen=[f"fifo:{superd.dir}/c", f"unix-seqpacket:{superd.dir}/s.sock"], **keys))
    superd.start()
    superd.call("Health")
    mode = (superd.dir / "d.sock").stat().st_mode
    assert mode & 0o777 == 0o666
    assert (superd.dir / "control.sock").stat().st_mode & 0o777 == 0o600
    superd.stop()
    assert sorted(path.name for path in superd.dir.iterdir()) == ["a", "etc"]
    assert not list((superd.dir / "a").iterdir())


def test_keeper_killed_with_services_running(superd: Superd) -> None:  # X7 G17
    """Nobody can adopt anything then: what would hold a port ends, a session goes on, and superd starts again."""
    code = (
        "import os, socket, sys; s = socket.socket(fileno=3)\n"
        "while True: c = s.accept()[0]; c.sendall(b'%d' % os.getpid()); c.close()"
    )
    superd.write("own", toml(listen=f"unix:{superd.dir}/o.sock", run="always-on", command=[PYTHON, "-I", "-c", code]))
    superd.write("cat", toml(listen=f"unix:{superd.dir}/c.sock", command=["/bin/cat"]))
    superd.start()
    with superd.connect("own") as client:
        old = int(client.recv(100))
    with superd.connect("cat") as session:
        session.sendall(b"1")
        assert session.recv(1) == b"1"
        kill_keeper(superd)
        wait_gone(old)
        superd.start()
        session.sendall(b"2")
        assert session.recv(1) == b"2"
    with superd.connect("own") as client:
        new = int(client.recv(100))
    assert new != old and new == superd.status("own")["pid"]
    assert ask(superd.connect("cat"), b"x") == b"x"


def test_keeper_killed_and_a_service_holds_on(superd: Superd) -> None:  # G17 A14
    """A process that ignores TERM is ended all the same, and the next superd serves."""
    code = (
        "import signal, socket, sys; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "s = socket.socket(fileno=3); c = s.accept()[0]; c.sendall(b'x'); s.accept()"
    )
    keys = {"run": "on-demand", "stop_timeout": "200ms", "command": [PYTHON, "-I", "-c", code]}
    superd.write("own", toml(listen="tcp:127.0.0.1:0", **keys))
    superd.start()
    with superd.connect("own") as client:
        assert client.recv(1) == b"x"
    pid = superd.status("own")["pid"]
    superd.write("own", toml(listen=superd.listening("own"), **keys))
    kill_keeper(superd)
    superd.start()
    superd.wait_record(event="listening", service="own")
    wait_gone(pid)
    with superd.connect("own") as client:
        assert client.recv(1) == b"x"


def test_symlink_is_not_followed(superd: Superd) -> None:  # D2
    target = superd.dir / "target"
    target.write_text("precious")
    (superd.dir / "x.sock").symlink_to(target)
    superd.write("cat", toml(listen=f"unix:{superd.dir}/x.sock", command=["/bin/cat"]))
    superd.start()
    superd.wait_record(service="cat", message=re.compile("cannot bind"))
    superd.stop()
    assert target.read_text() == "precious" and (superd.dir / "x.sock").is_symlink()


def test_path_is_a_directory(superd: Superd) -> None:  # D12
    """Cured without a command: remove the directory."""
    path = superd.dir / "x.sock"
    path.mkdir()
    superd.write("cat", toml(listen=f"unix:{path}", command=["/bin/cat"]))
    superd.start()
    superd.wait_record(service="cat", message=re.compile("cannot bind"))
    path.rmdir()
    superd.wait_record(service="cat", event="listening")
    assert ask(superd.connect("cat"), b"x") == b"x"


def test_no_control_socket(superd: Superd) -> None:  # D14
    """Its directory is missing: services run, and it comes when it can."""
    superd.control = f"unix:{superd.dir}/file/control.sock"
    (superd.dir / "file").write_text("")
    superd.write("cat", toml(listen="tcp:127.0.0.1:0", command=["/bin/cat"]))
    superd.start()
    superd.wait_record(message=re.compile("cannot bind the control socket.*services go on"))
    assert ask(superd.connect("cat"), b"x") == b"x"
    (superd.dir / "file").unlink()
    (superd.dir / "file").mkdir()
    assert superd.call("Health")["live"]
