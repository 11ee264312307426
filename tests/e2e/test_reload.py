"""Reloads of the real daemon: what changes takes effect, and what runs, waits or listens does not notice."""

from __future__ import annotations

import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness import PYTHON, Superd, ask, eventually, fetch, injected, open_fds, read_all, toml

CAT = toml(listen="tcp:127.0.0.1:0", command=["/bin/cat"])


def echo(text: str, **keys: Any) -> str:
    return toml(**{"listen": "tcp:127.0.0.1:0", "command": ["/bin/echo", text], **keys})


def reload(superd: Superd, **parameters: bool) -> dict[str, Any]:
    return superd.call("Reload", **parameters)


def lines(reply: dict[str, Any]) -> dict[str, str]:
    return {row["name"]: row["action"] for row in reply["entries"]}


def superctl(superd: Superd, *words: str) -> tuple[int, str, str]:
    argv = [sys.executable, "-I", "-m", "superd.cli.superctl", "-s", superd.control, *words]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=30)
    return done.returncode, done.stdout, done.stderr


def names(superd: Superd) -> list[str]:
    return [row["name"] for row in superd.call("List")["services"]]


def start(superd: Superd, *arguments: str) -> None:
    """Not following the files: these tests say when."""
    superd.start("--no-watch", *arguments)


def test_add_change_remove(superd: Superd) -> None:
    superd.write("a", echo("one"))
    superd.write("gone", CAT)
    start(superd)
    gone = superd.address("gone")
    where = superd.address("a")
    superd.write("a", echo("two"))
    superd.write("new", CAT)
    (superd.conf / "conf.d" / "gone.toml").unlink()
    reply = reload(superd, dry_run=True)
    assert lines(reply) == {"gone": "remove", "a": "restart", "new": "add"} and not reply["applied"]
    assert names(superd) == ["a", "gone"] and fetch(superd.connect("a")) == b"one\n"
    assert lines(reload(superd)) == {"gone": "remove", "a": "restart", "new": "add"}
    assert names(superd) == ["a", "new"]
    assert superd.address("a") == where and fetch(superd.connect("a")) == b"two\n"
    assert ask(superd.connect("new"), b"x") == b"x"
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(gone)
    assert lines(reload(superd)) == {}
    record = superd.find_records(event="reload")[0]
    assert record["changed"] == 3 and "a: restart (command changed)" in record["message"]


def test_live_connections_go_on(superd: Superd) -> None:
    """Of a changed service, of one that is removed, and of one that becomes another kind."""
    for name in ("changed", "removed", "other"):
        superd.write(name, CAT)
    start(superd)
    clients = {name: superd.connect(name) for name in ("changed", "removed", "other")}
    for client in clients.values():
        client.sendall(b"a")
        assert client.recv(1) == b"a"
    removed = superd.address("removed")
    superd.write("changed", echo("new", user=0) if os.geteuid() == 0 else echo("new"))
    (superd.conf / "conf.d" / "removed.toml").unlink()
    superd.write("other", toml(listen="tcp:127.0.0.1:0", command=["/bin/sleep", "99"], run="on-demand"))
    reload(superd)
    for client in clients.values():
        client.sendall(b"b")
        assert client.recv(1) == b"b"
    assert fetch(superd.connect("changed")) == b"new\n"
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(removed)
    eventually(lambda: superd.status("changed")["now"], 1)
    assert superd.status("changed")["state"] == "listening"
    (row,) = [row for row in superd.call("List")["services"] if row["name"] == "removed"]
    assert row["state"] == "stopping" and row["now"] == 1 and "gone" in row["note"]
    for client in clients.values():
        assert ask(client, b"c") == b"c"
    eventually(lambda: names(superd), ["changed", "other"])


def test_leaving_service_and_the_next_manager(superd: Superd) -> None:
    """Its connections are known, logged and counted until they end."""
    superd.write("gone", toml(listen="tcp:127.0.0.1:0", command=["/bin/sh", "-c", "cat; echo last words >&2"]))
    start(superd)
    client = superd.connect("gone")
    client.sendall(b"a")
    assert client.recv(1) == b"a"
    (superd.conf / "conf.d" / "gone.toml").unlink()
    reload(superd)
    superd.kill_role("superd-manager")
    superd.wait_record(message=re.compile("took over"))
    eventually(lambda: [(row["name"], row["now"]) for row in superd.call("List")["services"]], [("gone", 1)])
    assert ask(client, b"b") == b"b"
    superd.wait_record(event="output", service="gone", message="last words")
    superd.wait_record(event="exit", service="gone", status=0)
    eventually(lambda: names(superd), [])


def test_limits_in_place(superd: Superd) -> None:
    """Counts are kept: two are there, one may be; and then two more may."""
    superd.write("a", CAT + "[limits]\nmax_connections = 2\non_full = 'refuse'\n")
    start(superd)
    clients = [superd.connect("a") for _ in range(2)]
    for client in clients:
        client.sendall(b"a")
        assert client.recv(1) == b"a"
    pids = {record["pid"] for record in superd.wait_records(2, event="start")}
    for limit, served in ((1, False), (3, True)):
        superd.write("a", CAT + f"[limits]\nmax_connections = {limit}\non_full = 'refuse'\n")
        assert [(row["action"], row["keys"]) for row in reload(superd)["entries"]] == [
            ("in place", ["limits.max_connections"])
        ]
        with superd.connect("a") as extra:
            if served:
                assert ask(extra, b"x") == b"x"
            else:
                assert extra.recv(1) == b""
    assert pids <= {row["pid"] for row in superd.call("Connections")["connections"]}
    for client in clients:
        assert ask(client, b"c") == b"c"


SERVER = """
import os, select, socket, sys
listeners = [socket.socket(fileno=3 + number) for number in range(int(os.environ["LISTEN_FDS"]))]
while True:
    for listener in select.select(listeners, [], [])[0]:
        conn, _ = listener.accept()
        with conn:
            conn.sendall(sys.argv[1].encode())
"""


def server(word: str, **keys: Any) -> str:
    return toml(**{"listen": "tcp:127.0.0.1:0", "command": [PYTHON, "-c", SERVER, word], "run": "always-on", **keys})


def test_restart_of_a_process(superd: Superd) -> None:
    """Its sockets stay, so clients wait and are served; in place it is left alone."""
    superd.write("s", server("one"))
    start(superd)
    assert fetch(superd.connect("s")) == b"one"
    pid = superd.status("s")["pid"]
    superd.write("s", server("one", stop_timeout="3s", restart="always"))
    assert lines(reload(superd)) == {"s": "in place"}
    assert superd.status("s")["pid"] == pid
    superd.write("s", server("two"))
    assert lines(reload(superd)) == {"s": "restart"}
    superd.wait_record(event="exit", service="s", pid=pid)
    assert fetch(superd.connect("s")) == b"two"
    assert len(superd.find_records(event="listening")) == 1


def test_failed_starts_again_when_its_file_changes(superd: Superd) -> None:
    superd.write("s", toml(command=["/bin/false"], restart_limit="1/1m", restart_delay="1ms"))
    start(superd)
    superd.wait_record(message=re.compile("giving up"))
    superd.write("s", toml(command=["/bin/sleep", "99"], restart_limit="1/1m"))
    reload(superd)
    superd.wait_for("s", "ready")


def socket_inodes(path: Path) -> set[str]:
    """Of the listeners at a path: another number is another socket."""
    rows = [line.split() for line in Path("/proc/net/unix").read_text().splitlines()]
    return {row[6] for row in rows if row[-1] == str(path) and row[3] == "00010000"}


@pytest.mark.parametrize("run", ["per-connection", "always-on"])
def test_sockets_that_stay_are_never_closed(superd: Superd, run: str) -> None:  # K9 O4
    """Also when others come, go, change their order, options and mode."""
    path = superd.dir / "s.sock"
    one = '[[socket]]\nlisten = "tcp:127.0.0.1:0"\nname = "one"\n{}\n'
    two = f'[[socket]]\nlisten = "unix:{path}"\nname = "two"\n{{}}\n'
    three = f'[[socket]]\nlisten = "unix:{superd.dir}/t.sock"\nname = "three"\n'
    begin = toml(command=["/bin/sleep", "99"] if run == "always-on" else ["/bin/cat"], run=run)
    superd.write("s", begin + one.format("") + two.format(""))
    start(superd)
    superd.wait_for("s", "active")
    inode = os.stat(path).st_ino

    def inodes() -> set[str]:
        found = socket_inodes(path)
        port = f"{superd.address('s')[1]:04X}"
        tcp = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()]
        return found | {words[9] for words in tcp if words[1].endswith(f":{port}") and words[3] == "0A"}

    before = inodes()
    assert len(before) == 2
    for text in (
        two.format('mode = "0600"') + one.format("backlog = 5\nno_delay = true"),
        three + two.format('mode = "0660"') + one.format(""),
        one.format("no_delay = true") + two.format(""),
    ):
        superd.write("s", begin + text)
        assert reload(superd)["entries"]
        assert inodes() == before and os.stat(path).st_ino == inode
        superd.wait_for("s", "active")
    assert not (superd.dir / "t.sock").exists()
    assert os.stat(path).st_mode & 0o777 == 0o666


def test_address_goes_to_another_service(superd: Superd) -> None:
    """A renamed service, and one kind after another: nothing is refused meanwhile."""
    superd.write("a", toml(listen=f"unix:{superd.dir}/x.sock", command=["/bin/echo", "a"]))
    superd.write("k", toml(listen="tcp:127.0.0.1:0", command=["/bin/echo", "k"]))
    start(superd)
    inode = socket_inodes(superd.dir / "x.sock")
    (superd.conf / "conf.d" / "a.toml").unlink()
    superd.write("b", toml(listen=f"unix:{superd.dir}/x.sock", command=["/bin/echo", "b"]))
    superd.write("k", server("other"))
    assert lines(reload(superd)) == {"a": "remove", "b": "add", "k": "restart"}
    assert len(inode) == 1 and socket_inodes(superd.dir / "x.sock") == inode
    assert fetch(superd.connect("b")) == b"b\n"
    assert fetch(superd.connect("k")) == b"other"
    superd.write("k", toml(listen="tcp:127.0.0.1:0", command=["/bin/echo", "k"]))
    reload(superd)
    assert fetch(superd.connect("k")) == b"k\n"
    superd.kill_role("superd-manager")  # the keeper has them under their new names
    superd.wait_record(message=re.compile("took over"))
    assert fetch(superd.connect("b")) == b"b\n" and fetch(superd.connect("k")) == b"k\n"


def test_two_services_swap_addresses(superd: Superd) -> None:
    x, y = f"unix:{superd.dir}/x.sock", f"unix:{superd.dir}/y.sock"
    superd.write("a", toml(listen=x, command=["/bin/echo", "a"]))
    superd.write("b", toml(listen=y, command=["/bin/echo", "b"]))
    start(superd)
    superd.write("a", toml(listen=y, command=["/bin/echo", "a"]))
    superd.write("b", toml(listen=x, command=["/bin/echo", "b"]))
    reload(superd)
    for path, said in (("x", b"b\n"), ("y", b"a\n")):
        client = socket.socket(socket.AF_UNIX)
        client.connect(f"{superd.dir}/{path}.sock")
        assert fetch(client) == said


def test_wildcard_follows_one_address(superd: Superd) -> None:
    """The new socket collides with the old one of the same service: it is opened when that has closed."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    superd.write("a", toml(listen=f"tcp:127.0.0.1:{port}", command=["/bin/echo", "a"]))
    start(superd)
    superd.write("a", toml(listen=f"tcp4:{port}", command=["/bin/echo", "a"]))
    assert lines(reload(superd)) == {"a": "rebind"}
    assert fetch(socket.create_connection(("127.0.0.2", port))) == b"a\n"


def test_busy_address_leaves_the_old_version(superd: Superd) -> None:  # K11
    """Nothing of the new version is taken; when the address is free all of it is."""
    superd.write("a", echo("old"))
    start(superd)
    before = {key: value for key, value in superd.call("Status", names=["a"])["services"][0].items()
              if key in ("command", "sockets", "run")}  # fmt: skip
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        superd.write("a", echo("new", listen=["tcp:127.0.0.1:0", f"tcp:127.0.0.1:{port}"]))
        superd.write("z", CAT)
        code, out, err = superctl(superd, "reload", "--strict")
        assert code == 1 and names(superd) == ["a"] and f"cannot bind tcp:127.0.0.1:{port}" in err
        code, out, err = superctl(superd, "reload")
        assert code == 1 and f"cannot bind tcp:127.0.0.1:{port}" in err and "z: add" in out
        after = superd.call("Status", names=["a"])["services"][0]
        assert {key: after[key] for key in before} == before
        assert "changed on disk: cannot bind" in after["service"]["note"]
        assert fetch(superd.connect("a")) == b"old\n" and ask(superd.connect("z"), b"x") == b"x"
    eventually(lambda: superd.status("a")["note"], "")
    assert fetch(superd.connect("a")) == b"new\n"
    assert fetch(socket.create_connection(("127.0.0.1", port))) == b"new\n"


BAD = {
    "empty": "",
    "cut short": 'listen = "tcp:127.0.0.1:0"\ncommand = ["/bin/ec',
    "misspelt": 'listen = "tcp:127.0.0.1:0"\ncomand = "/bin/echo"\n',
}


@pytest.mark.parametrize("what", [*BAD, "fifo", "not trusted", "directory not trusted"])
def test_bad_file_keeps_the_last_good_version(superd: Superd, what: str) -> None:  # K10 K1 K16
    superd.write("a", echo("good"))
    superd.write("b", echo("one"))
    start(superd)
    path = superd.conf / "conf.d" / "a.toml"
    superd.write("b", echo("two"))
    if what in BAD:
        path.write_text(BAD[what])
    elif what == "fifo":
        path.unlink()
        os.mkfifo(path)
    elif os.geteuid() != 0:
        pytest.skip("only root does not trust others")
    else:
        os.chmod(path if what == "not trusted" else path.parent, 0o777)
    code, out, err = superctl(superd, "reload")
    assert code == 78 and ("a.toml" in err or what == "directory not trusted")
    assert ("b: restart" in out) == (what != "directory not trusted")
    row = superd.status("a")
    assert row["state"] == "listening" and "running the last good version" in row["note"]
    if what == "misspelt":
        assert "a.toml:2:1: error: unknown key `comand`" in row["note"]
    assert fetch(superd.connect("a")) == b"good\n"
    assert superctl(superd, "diff")[0] == 78
    superd.kill_role("superd-manager")  # the next one has it, too
    superd.wait_record(message=re.compile("took over"))
    assert fetch(superd.connect("a")) == b"good\n" and "last good" in superd.status("a")["note"]
    if what == "fifo":
        path.unlink()
    os.chmod(path.parent, 0o755)
    superd.write("a", echo("better"))
    assert superctl(superd, "reload")[0] == 0
    assert superd.status("a")["note"] == "" and fetch(superd.connect("a")) == b"better\n"


def test_strict_with_a_bad_file(superd: Superd) -> None:
    superd.write("a", echo("one"))
    start(superd)
    superd.write("a", echo("two"))
    superd.write("bad", "listen = 1")
    assert superctl(superd, "reload", "--strict")[0] == 78
    assert fetch(superd.connect("a")) == b"one\n" and names(superd) == ["a"]
    assert superctl(superd, "reload")[0] == 78
    assert fetch(superd.connect("a")) == b"two\n"
    assert superd.status("bad")["state"] == "bad config"


def test_bad_superd_toml(superd: Superd) -> None:
    """The last good one holds, its conf_dirs and [defaults] too."""
    more = superd.conf / "more"
    more.mkdir()
    (more / "m.toml").write_text(echo("m"))
    superd.write_daemon('conf_dirs = ["more"]\n[defaults.environment]\nX = "1"\n')
    superd.write("a", CAT)
    start(superd)
    superd.write_daemon('conf_dirs = ["mo')
    code, _, err = superctl(superd, "reload")
    assert code == 78 and "superd.toml:1" in err
    assert names(superd) == ["a", "m"] and fetch(superd.connect("m")) == b"m\n"


def test_directory_that_is_gone(superd: Superd) -> None:  # K5
    superd.write("a", CAT)
    start(superd)
    conf = superd.conf / "conf.d"
    conf.rename(superd.dir / "old")
    assert superctl(superd, "reload")[0] == 78
    assert ask(superd.connect("a"), b"x") == b"x"
    conf.mkdir()
    assert superctl(superd, "reload")[0] == 0 and names(superd) == []


def test_changed_on_disk_is_shown(superd: Superd) -> None:
    superd.write("a", echo("one"))
    start(superd)
    assert superctl(superd, "diff")[:2] == (0, "nothing has changed\n")
    superd.write("a", echo("two"))
    assert superd.status("a")["note"].startswith("changed on disk")
    assert superctl(superd, "diff")[:2] == (1, "a: restart (command changed)\n")
    assert superctl(superd, "reload") == (0, "a: restart (command changed)\n", "")
    assert superd.status("a")["note"] == ""


def test_enabled(superd: Superd) -> None:
    superd.write("a", CAT)
    superd.write("p", server("p"))
    start(superd)
    client = superd.connect("a")
    client.sendall(b"a")
    assert client.recv(1) == b"a"
    superd.write("a", CAT + "enabled = false\n")
    superd.write("p", server("p", enabled=False))
    assert lines(reload(superd)) == {"a": "in place", "p": "in place"}
    assert ask(client, b"b") == b"b"
    eventually(lambda: superd.status("p")["state"], "disabled")
    assert superd.status("a")["state"] == "disabled"
    superd.write("a", CAT)
    superd.write("p", server("p"))
    mark = superd.mark()
    reload(superd)
    for name, request in (("a", b""), ("p", None)):
        address = superd.wait_record(after=mark, event="listening", service=name)["address"]
        where = socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2])), timeout=20)
        assert (fetch(where) if request is None else ask(where, b"x")) == (b"p" if request is None else b"x")


def test_disabled_and_started_by_hand(superd: Superd) -> None:
    superd.write("a", CAT + "enabled = false\n")
    start(superd)
    superd.call("Start", names=["a"])
    where = superd.address("a")
    superd.write("a", CAT + "enabled = false\ndescription = 'x'\n")
    assert lines(reload(superd)) == {"a": "in place"}
    assert ask(socket.create_connection(where), b"x") == b"x"


def test_from_on_demand_to_always_on_and_back(superd: Superd) -> None:
    """With and without a process that runs."""
    superd.write("s", server("one", run="on-demand"))
    start(superd)
    assert superd.status("s")["state"] == "listening"
    superd.write("s", server("two"))
    reload(superd)
    superd.wait_for("s", "ready")
    superd.write("s", server("three", run="on-demand"))
    reload(superd)
    eventually(lambda: fetch(superd.connect("s")), b"three")


NOTIFY = """
import os, socket, time
with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as there:
    there.connect(os.environ["NOTIFY_SOCKET"])
    there.send(b"READY=1\\nSTATUS=%d" % os.getuid())
time.sleep(99)
"""


def test_readiness_of_another_user(superd: Superd, root: None) -> None:
    """The notify socket is the new user's, and there is one where there was none."""
    for user, ready in ((1, "start"), (2, "notify"), (3, "notify")):
        superd.write("s", toml(command=[PYTHON, "-c", NOTIFY if ready == "notify" else "import time; time.sleep(99)"],
                               ready=ready, user=user))  # fmt: skip
        if user == 1:
            start(superd)
        else:
            reload(superd)
            eventually(lambda: superd.call("Status", names=["s"])["services"][0]["said"], str(user))
        superd.wait_for("s", "ready")


def test_stopped_stays_stopped(superd: Superd) -> None:
    superd.write("a", echo("one"))
    superd.write("p", server("p"))
    start(superd)
    superd.call("Stop", names=["a", "p"])
    superd.write("a", echo("two"))
    superd.write("p", server("q"))
    reload(superd)
    assert [row["state"] for row in superd.call("List")["services"]] == ["stopped", "stopped"]
    superd.call("Start", names=["a", "p"])
    assert fetch(superd.connect("a")) == b"two\n" and fetch(superd.connect("p")) == b"q"


def test_templates(superd: Superd) -> None:
    text = toml(listen=f"unix:{superd.dir}/${{name}}", command=["/bin/echo", "${instance}"])
    superd.write("w@", text)
    start(superd)
    assert names(superd) == []
    assert superctl(superd, "start", "w@c")[0] == 0
    assert fetch(superd.connect("w@c")) == b"c\n" and names(superd) == ["w@c"]
    for wrong in ("w@UPPER", "x@c", "w@"):
        assert superctl(superd, "start", wrong)[0] == 4
    superd.write("w@", 'instances = ["a", "b"]\n' + text)
    assert lines(reload(superd)) == {"w@a": "add", "w@b": "add"}
    superd.kill_role("superd-manager")
    superd.wait_record(message=re.compile("took over"))
    assert names(superd) == ["w@a", "w@b", "w@c"]
    superd.write("w@", 'instances = ["b"]\n' + text)
    assert lines(reload(superd)) == {"w@a": "remove"}
    superd.call("Stop", names=["w@c"])
    eventually(lambda: names(superd), ["w@b"])


def test_hup_storm(superd: Superd) -> None:  # F9 K17
    """The last state counts."""
    superd.write("a", echo("0"))
    start(superd)
    for number in range(200):
        if number % 10 == 0:
            superd.write("a", echo(str(number // 10 + 1)))
        os.kill(superd.pid, signal.SIGHUP)
    os.kill(superd.pid, signal.SIGHUP)
    eventually(lambda: fetch(superd.connect("a")), b"20\n")
    assert len(superd.find_records(event="reload")) < 200


def test_reload_while_stopping_is_ignored(superd: Superd) -> None:  # G13
    code = "import signal,time; signal.signal(15, lambda *_: print('told', flush=True)); print('ready', flush=True); "
    superd.write("s", toml(command=[PYTHON, "-c", code + "\nwhile True: time.sleep(99)"], stop_timeout="1s"))
    start(superd)
    superd.wait_record(event="output", message="ready")
    os.kill(superd.pid, signal.SIGTERM)
    superd.wait_record(event="output", message="told")
    superd.write("new", CAT)
    os.kill(superd.pid, signal.SIGHUP)
    assert superd.wait_exit() == 0
    assert not superd.find_records(event="listening")


def test_disk_that_does_not_answer(superd: Superd, require: Callable[[str], str]) -> None:  # F17
    """The reload waits, and nothing else does."""
    superd.write("a", echo("one"))
    start(superd)
    superd.write("a", echo("two"))
    with injected(require("strace"), superd.manager, "getdents64:delay_enter=2000000"):
        began = time.monotonic()
        os.kill(superd.pid, signal.SIGHUP)
        for _ in range(5):
            assert fetch(superd.connect("a")) == b"one\n"
        assert time.monotonic() - began < 1.5
        superd.wait_record(event="reload")
        assert time.monotonic() - began > 1.5
    assert fetch(superd.connect("a")) == b"two\n"


def test_manager_above_is_told(superd: Superd) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as above:
        above.bind(f"{superd.dir}/above")
        above.settimeout(20)
        superd.write("a", CAT)
        start_with = {**os.environ, "NOTIFY_SOCKET": f"{superd.dir}/above"}
        superd.start("--no-watch", environment=start_with)
        assert above.recv(1000).startswith(b"READY=1")
        superd.write("a", echo("x"))
        reload(superd)
        assert re.fullmatch(rb"RELOADING=1\nMONOTONIC_USEC=\d+", above.recv(1000))
        assert above.recv(1000).startswith(b"READY=1")


def test_log_and_level_in_place(superd: Superd) -> None:
    superd.write("a", CAT)
    start(superd)
    assert not superd.find_records(level="debug")
    superd.write_daemon('log_level = "debug"\ncontrol_mode = "0660"\n')
    reply = reload(superd)
    assert set(reply["daemon"]) == {"log_level", "control_mode"}
    superd.call("Stop", names=["a"])
    superd.wait_record(event="state", level="debug")
    assert os.stat(superd.dir / "control.sock").st_mode & 0o777 == 0o660


def test_manager_dies_among_reloads(superd: Superd) -> None:
    """Whatever it was at: the next one has the old version or the new one of everything, and nothing is left over."""
    superd.write("a", echo("0"))
    superd.write("b", toml(listen=f"unix:{superd.dir}/b.sock", command=["/bin/cat"]))
    start(superd)
    fds: list[str] = []
    with superd.connect("b") as session:
        session.sendall(b"x")
        assert session.recv(1) == b"x"
        for number in range(1, 6):
            superd.write("a", echo(str(number)))
            superd.write(f"n{number % 2}", toml(listen=f"unix:{superd.dir}/n.sock", command=["/bin/cat"]))
            (superd.conf / "conf.d" / f"n{(number + 1) % 2}.toml").unlink(missing_ok=True)
            os.kill(superd.pid, signal.SIGHUP)
            superd.wait_records(2 * number - 1 if number % 2 else 1, message=re.compile("."))
            mark = superd.mark()
            superd.kill_role("superd-manager")
            superd.wait_record(after=mark, message=re.compile("took over"))
            reload(superd)
            assert names(superd) == ["a", "b", f"n{number % 2}"]
            assert fetch(superd.connect("a")) == f"{number}\n".encode()
            eventually(lambda name=f"n{number % 2}": superd.status(name)["note"], "")  # type: ignore[misc]
            client = socket.socket(socket.AF_UNIX)
            client.connect(f"{superd.dir}/n.sock")
            assert ask(client, b"n") == b"n"
            session.sendall(b"x")
            assert session.recv(1) == b"x"
            fds = fds or open_fds(superd.pid)
    eventually(lambda: len(open_fds(superd.pid)) <= len(fds) + 1, True)


VARIANTS: dict[str, list[str | None]] = {
    "a": [
        None,
        toml(listen="unix:{dir}/1", command=["/bin/echo", "a"]),
        toml(listen="unix:{dir}/1", command=["/bin/echo", "b"], umask="0077"),
        toml(listen=["unix:{dir}/1", "unix:{dir}/2"], command=["/bin/echo", "c"]),
        toml(listen="unix:{dir}/2", command=["/bin/echo", "d"]),
    ],
    "b": [
        None,
        toml(listen="unix:{dir}/2", command=["/bin/echo", "e"]),
        toml(listen="unix:{dir}/3", command=["/bin/echo", "f"], enabled=False),
        toml(listen=["unix:{dir}/3", "unix:{dir}/1"], command=[PYTHON, "-c", SERVER, "g\\n"], run="always-on"),
        toml(listen="unix:{dir}/3", command=[PYTHON, "-c", SERVER, "h\\n"], run="on-demand"),
    ],
    "c": [
        None,
        toml(listen="unix:{dir}/4", command=["/bin/echo", "i"]),
        toml(listen="unix:{dir}/3", command=["/bin/echo", "j"]),
        toml(command=["/bin/sleep", "99"]),
    ],
}


def observed(superd: Superd) -> Any:
    """What a client, an operator and the file system see."""
    said = {}
    for path in sorted(superd.dir.glob("[0-9]")):
        client = socket.socket(socket.AF_UNIX)
        client.settimeout(20)
        client.connect(str(path))
        said[path.name] = fetch(client)
    rows = [(row["name"], row["state"], row["listen"]) for row in superd.call("List")["services"]]
    return rows, said


def test_in_the_end_as_a_fresh_start() -> None:
    """After any chain of reloads everything is as if superd had been started with the last files."""
    chance = random.Random(7)
    with Superd() as changed, Superd() as fresh:
        start(changed)
        for _ in range(12):
            for name, variants in VARIANTS.items():
                text = chance.choice(variants)
                for superd in (changed, fresh):
                    path = superd.conf / "conf.d" / f"{name}.toml"
                    path.unlink(missing_ok=True)
                    if text is not None:
                        superd.write(name, text.replace("{dir}", str(superd.dir)))
            changed.garbage_expected = fresh.garbage_expected = True
            if subprocess.run([sys.executable, "-I", "-m", "superd.cli.check", str(fresh.conf)],
                              capture_output=True).returncode:  # fmt: skip
                continue  # two want one address: who was first has it, which no fresh start can know
            reload(changed)
            start(fresh)
            eventually(lambda: "starting" in str(observed(fresh)), False)
            wanted = str(observed(fresh)).replace(str(fresh.dir), "DIR")
            eventually(lambda wanted=wanted: str(observed(changed)).replace(str(changed.dir), "DIR"), wanted)  # type: ignore[misc]
            fresh.stop()


def memory_kb(pid: int) -> int:
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return int(re.search(r"^Pss_Anon: +(\d+) kB", text, re.M)[1])  # type: ignore[index]


@pytest.mark.quiet
@pytest.mark.parametrize("reloads", [int(os.environ.get("SUPERD_RELOADS", "100"))])
def test_many_reloads(superd: Superd, reloads: int) -> None:  # G16 K7 K8 K9
    """20 live sessions and a client each 20 ms, while everything changes all the time: nothing is refused or cut, no fd
    and no memory stays."""
    superd.write("steady", CAT)
    superd.write("busy", echo("0"))
    superd.write("p", server("p"))
    start(superd)
    sessions = [superd.connect("steady") for _ in range(20)]
    failures: list[str] = []
    served = 0
    done = threading.Event()
    where = {name: superd.address(name) for name in ("steady", "busy", "p")}

    def knock() -> None:
        nonlocal served
        turn = 0
        while not done.wait(0.02):
            turn += 1
            name = ("steady", "busy", "p")[turn % 3]
            try:
                with socket.create_connection(where[name], timeout=20) as client:
                    client.shutdown(socket.SHUT_WR)
                    said = read_all(client)
                if name != "steady" and not said:
                    failures.append(f"{name}: nothing said")
                served += 1
            except OSError as error:
                failures.append(f"{name}: {error}")

    def change(number: int) -> None:
        limits = f"[limits]\nmax_connections = {64 + number % 5}\n"
        superd.write("steady", CAT + f'description = "{number}"\n' + limits)
        superd.write("busy", echo(str(number), umask=f"00{number % 2}7"))
        extra = superd.conf / "conf.d" / f"extra{number % 3}.toml"
        if extra.exists():
            extra.unlink()
        else:
            superd.write(extra.stem, toml(listen=f"unix:{superd.dir}/{extra.stem}.sock", command=["/bin/cat"]))
        reply = reload(superd)
        assert reply["applied"] and not reply["problems"] and len(reply["entries"]) == 3, reply

    def keepers() -> set[tuple[str, ...]]:
        return superd.descriptors()["superd-keeper"]

    for number in range(6):
        change(number)
    fds = keepers()
    while (now := keepers()) != fds:  # a spawner was on its way
        fds = now
    thread = threading.Thread(target=knock)
    thread.start()
    try:
        for number in range(6, 30):
            change(number)
        manager = superd.manager
        memory = memory_kb(manager)
        own = len(open_fds(manager)) + 10  # clients come and go
        for number in range(30, 30 + reloads // 6 * 6):
            change(number)
    finally:
        done.set()
        thread.join()
    grown = memory_kb(manager) - memory
    print(f"{reloads} reloads, {served} served, {len(failures)} failed, {grown} kB more")
    assert superd.manager == manager and failures == [] and served > 10
    eventually(lambda: len(open_fds(manager)) <= own, True)
    for session in sessions:
        assert ask(session, b"still here") == b"still here"
    assert grown < 2048
    eventually(keepers, fds)


def test_what_a_removed_service_still_has_can_be_ended(superd: Superd) -> None:
    """A process that never ends by itself, and whose file has gone, is shown and can be told to go."""
    path = superd.write("cat", toml(listen="tcp:127.0.0.1:0", command=["/bin/cat"]))
    superd.start("--no-watch")
    with superd.connect("cat") as client:
        client.sendall(b"x")
        assert client.recv(1) == b"x"
        path.unlink()
        superd.call("Reload")
        assert superd.status("cat")["state"] == "stopping"
        for names in ({}, {"names": ["cat"]}):
            (row,) = superd.call("Connections", **names)["connections"]
            assert (row["service"], row["peer"]) == ("cat", "{}:{}".format(*client.getsockname()))
        result = superd.call("Kill", names=["cat"], signal="KILL")["results"][0]
        assert (result["ok"], result["state"], result["pid"]) == (True, "stopping", row["pid"])
        assert client.recv(1) == b""
    eventually(lambda: [one["name"] for one in superd.call("List")["services"]], [])
