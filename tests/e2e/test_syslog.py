"""syslog = "…" in superd.toml: what real programs send to syslog(3) is logged as theirs."""

from __future__ import annotations

import os
import re
import socket
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from harness import TIMEOUT_S, Superd, eventually, toml

from superd.system import fdpass

PROGRAM = r"""
#include <syslog.h>
#include <unistd.h>
int main(void) {
    openlog("program", LOG_PID, LOG_DAEMON);
    syslog(LOG_ERR, "first\n2026-11-21 superd: \033[31mforged");
    syslog(LOG_DEBUG, "number %d", 2);
    if (fork() == 0) { setsid(); syslog(LOG_WARNING, "from a child"); return 0; }
    pause();
}
"""
# A /dev of its own, so that superd can have /dev/log and glibc finds it there.
OWN_DEV = r"""
mkdir "$0" && mount -t tmpfs -o mode=0755 dev "$0" &&
cp -a /dev/null /dev/zero /dev/full /dev/random /dev/urandom /dev/tty /dev/fd "$0" &&
mount --move "$0" /dev && exec "$@"
"""


@pytest.fixture
def superd() -> Iterator[Superd]:
    with Superd() as superd:
        yield superd


def start(superd: Superd) -> Path:
    path = superd.dir / "log"
    superd.write_daemon(toml(syslog=path))
    superd.start()
    return path


def test_logger(superd: Superd, require: Callable[[str], str]) -> None:
    path = superd.dir / "log"
    command = [require("logger"), "-u", str(path), "-i", "-t", "prog", "-p", "daemon.warning"]
    superd.write(
        "hello", toml(run="once", command=["/bin/sh", "-c", '"$@"; sleep 1000', "sh", *command, "hello world"])
    )
    assert start(superd) == path
    assert stat.S_IMODE(path.stat().st_mode) == 0o666
    record = superd.wait_record(event="output", message=re.compile("hello world$"))
    assert (record["level"], record["source"], record["tag"]) == ("warning", "syslog", "prog")
    # By process, or, as logger may have ended, by user: with one service as nobody it is the same one.
    assert record.get("service") == "hello" or os.geteuid() != 0
    assert "hello world" in str(superd.call("Logs", names=["hello"])["records"]) or os.geteuid() != 0


def test_a_process_that_lives_is_told_by_its_pid(superd: Superd) -> None:
    """Two services of one user, and one that is none."""
    path = superd.dir / "log"
    send = (
        "import socket, time\nsock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)\n"
        f"sock.connect({str(path)!r})\nsock.send(b'<11>me: I am ' + NAME)\ntime.sleep(1000)"
    )
    for name in ("one", "two"):
        code = send.replace("NAME", repr(name.encode()))
        superd.write(name, toml(command=["/usr/bin/env", "python3", "-c", code], stop_timeout="1s"))
    start(superd)
    for name in ("one", "two"):
        assert superd.wait_record(event="output", message=f"I am {name}", level="err")["service"] == name
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as stranger:
        stranger.connect(str(path))
        stranger.send(b"<14>one: I am one, believe me")
        record = superd.wait_record(event="output", message=re.compile("believe me"))
        assert "service" not in record and record["pid"] == os.getpid() and record["uid"] == os.getuid()
        assert record["message"] == "one: I am one, believe me"


def test_nothing_is_lost_when_the_manager_dies(superd: Superd) -> None:
    path = start(superd)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.connect(str(path))
        sender.settimeout(TIMEOUT_S)
        for number in range(100):
            if number in (20, 60):
                superd.kill_role("superd-manager")
            sender.send(b"<14>t: line %d" % number)  # waits while the queue is full
    superd.wait_record(event="output", message="t: line 99")
    found = [record["message"] for record in superd.find_records(event="output")]
    assert found[-1] == "t: line 99"
    # Of what a manager had read and not yet written when it was killed nothing can be known.
    assert len(set(found)) >= 100 - 2 * 64
    superd.stop()
    assert not path.exists()


def test_descriptors_are_closed(superd: Superd) -> None:  # J12
    path = start(superd)
    superd.call("Health")
    before = superd.descriptors()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.connect(str(path))
        for number in range(50):
            fdpass.send(sender, b"<14>t: with fds %d" % number, [0, 1, 2])
    superd.wait_record(event="output", message="t: with fds 49")
    eventually(superd.descriptors, before)


def test_a_path_that_somebody_has_is_not_taken(superd: Superd) -> None:
    path = superd.dir / "log"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
        other.bind(str(path))
        superd.write_daemon(toml(syslog=path))
        superd.launch()
        record = superd.wait_record(level="err", message=re.compile("cannot bind unix-dgram:.*/log"))
        assert "trying again" in record["message"]
        superd.wait_record(message=re.compile("ready: "))
    # It is free now, and stale: taken at the next try.
    superd.wait_record(event="listening", address=f"unix-dgram:{path}")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, for a mount namespace")
def test_syslog_of_c_programs_and_a_daemon(superd: Superd, require: Callable[[str], str]) -> None:  # L1
    source = superd.dir / "program.c"
    source.write_text(PROGRAM)
    program = superd.dir / "program"
    subprocess.run([require("gcc"), "-o", program, source], check=True)
    superd.write("program", toml(command=[str(program)]))
    dropbear = [require("dropbear"), "-F", "-p", "127.0.0.1:0", "-r", "/nonexistent/key"]
    superd.write("dropbear", toml(run="once", command=dropbear, user="root"))
    superd.write_daemon(toml(syslog="/dev/log", log_level="debug"))
    wrapper = [require("unshare"), "--mount", "--propagation", "private", "/bin/sh", "-c", OWN_DEV]
    superd.start(wrapper=[*wrapper, str(superd.dir / "dev")])
    record = superd.wait_record(service="program", level="err")
    assert record["message"] == "first\n2026-11-21 superd: \x1b[31mforged", "as it was sent; JSON escapes it"
    assert superd.wait_record(service="program", level="debug", source="syslog")["message"] == "number 2"
    assert superd.wait_record(message="from a child", level="warning")["service"] == "program"
    assert superd.wait_record(tag="dropbear", source="syslog")["service"] == "dropbear"
    lines = [line for line in superd.lines if "forged" in line]
    assert len(lines) == 1 and "\x1b" not in lines[0], "one record, one line"
