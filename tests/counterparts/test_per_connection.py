"""One process per connection: programs that people run from an inetd, and real clients of theirs."""

from __future__ import annotations

import grp
import json
import os
import pwd
import socket
import stat
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from harness import PYTHON, TIMEOUT_S, Superd

Require = Callable[[str], str]
Script = Callable[[str], str]


def toml(value: object) -> str:
    """Strings and lists of strings, as TOML writes them (JSON's escapes are TOML's)."""
    return json.dumps(value)


def run(argv: Sequence[str | Path], *, cwd: Path | None = None, home: Path, input: str | None = None) -> str:
    """Standard output of a client that has to succeed, in an environment of its own."""
    environment = {"PATH": os.environ["PATH"], "HOME": str(home), "LANG": "C.UTF-8", "GIT_CONFIG_NOSYSTEM": "1"}
    environment |= {
        f"GIT_{who}_{what}": "t@example.org" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")
    }
    done = subprocess.run(
        argv, cwd=cwd or home, env=environment, input=input, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, f"{' '.join(map(str, argv))}: {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


def run_all(commands: Sequence[Sequence[str | Path]], *, home: Path) -> None:
    """Several clients at once; each has to succeed."""
    environment = {"PATH": os.environ["PATH"], "HOME": str(home), "LANG": "C.UTF-8", "GIT_CONFIG_NOSYSTEM": "1"}
    clients = [
        subprocess.Popen(argv, cwd=home, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                         stderr=subprocess.STDOUT, text=True)
        for argv in commands
    ]  # fmt: skip
    try:
        ends = [(client.communicate(timeout=60)[0], client.returncode) for client in clients]
    finally:
        for client in clients:
            if client.poll() is None:
                client.kill()
                client.communicate()
    assert [code for _, code in ends] == [0] * len(commands), ends


def give(path: Path, user: str) -> None:
    """`path` and all below it to `user`, whom the service runs as."""
    if os.geteuid() == 0:
        uid, gid = pwd.getpwnam(user).pw_uid, pwd.getpwnam(user).pw_gid
        for one in [path, *path.rglob("*")]:
            os.chown(one, uid, gid, follow_symlinks=False)


@pytest.mark.interop
def test_git(superd: Superd, require: Require, service_user: str) -> None:
    git = require("git")
    home, base = superd.room("home"), superd.room("repositories")
    run([git, "init", "-q", "--bare", "-b", "main", base / "project.git"], home=home)
    give(base, service_user)
    argv = [git, "daemon", "--inetd", "--export-all", "--enable=receive-pack", f"--base-path={base}"]
    superd.write("git", f'listen = "tcp:127.0.0.1:0"\nuser = "{service_user}"\ncommand = {toml(argv)}')
    superd.start()
    url = "git://{}:{}/project.git".format(*superd.address("git"))

    run([git, "clone", "-q", url, "first"], home=home)
    (home / "first" / "blob").write_bytes(os.urandom(300_000))
    run([git, "add", "blob"], cwd=home / "first", home=home)
    run([git, "commit", "-q", "-m", "a blob"], cwd=home / "first", home=home)
    run([git, "push", "-q", "origin", "HEAD:main"], cwd=home / "first", home=home)
    # Eight at once, each complete.
    run_all([[git, "clone", "-q", url, f"clone{i}"] for i in range(8)], home=home)
    for i in range(8):
        assert (home / f"clone{i}" / "blob").read_bytes() == (home / "first" / "blob").read_bytes()

    exits = superd.wait_records(10, event="exit", service="git")
    assert [record["status"] for record in exits] == [0] * 10
    assert all(record["duration"] >= 0 for record in exits)
    assert len({record["connection"] for record in exits}) == 10


@pytest.mark.interop
def test_rsync(superd: Superd, require: Require, service_user: str) -> None:
    rsync = require("rsync")
    home, data = superd.room("home"), superd.room("data", user=service_user)
    conf = superd.dir / "rsyncd.conf"
    conf.write_text(f"use chroot = no\nlog file = {data}/.log\n[data]\npath = {data}\nread only = no\nexclude = .log\n")
    argv = [rsync, "--daemon", f"--config={conf}"]
    superd.write("rsync", f'listen = "tcp:127.0.0.1:0"\nuser = "{service_user}"\ncommand = {toml(argv)}')
    superd.start()
    url = "rsync://{}:{}/data/".format(*superd.address("rsync"))

    source = home / "source"
    (source / "below").mkdir(parents=True)
    for i in range(20):
        (source / "below" / f"{i}").write_bytes(os.urandom(20_000))
    assert run([rsync, url.removesuffix("data/")], home=home).split() == ["data"]
    run([rsync, "-r", f"{source}/", url], home=home)
    run_all([[rsync, "-r", url, f"copy{i}/"] for i in range(8)], home=home)
    for i in range(8):
        for file in (source / "below").iterdir():
            assert (home / f"copy{i}" / "below" / file.name).read_bytes() == file.read_bytes()
    exits = superd.wait_records(10, event="exit", service="rsync")
    # Listing modules ends with 255, as rsync's clientserver.c has it; the message must not call that unknown.
    assert [(record["status"], record["message"]) for record in exits] == [(255, ""), *[(0, "")] * 9]


@pytest.mark.interop
def test_svnserve(superd: Superd, require: Require, service_user: str) -> None:
    svnserve, svn, svnadmin = require("svnserve"), require("svn"), require("svnadmin")
    home, base = superd.room("home"), superd.room("base")
    run([svnadmin, "create", base / "project"], home=home)
    (base / "project" / "conf" / "svnserve.conf").write_text("[general]\nanon-access = write\n")
    give(base, service_user)
    argv = [svnserve, "-i", "-r", str(base)]
    superd.write("svn", f'listen = "tcp:127.0.0.1:0"\nuser = "{service_user}"\ncommand = {toml(argv)}')
    superd.start()
    url = "svn://{}:{}/project".format(*superd.address("svn"))

    run([svn, "checkout", "-q", "--non-interactive", url, "first"], home=home)
    (home / "first" / "notes").write_text("kept\n")
    run([svn, "add", "-q", "notes"], cwd=home / "first", home=home)
    run([svn, "commit", "-q", "--non-interactive", "-m", "a note"], cwd=home / "first", home=home)
    assert run([svn, "cat", "--non-interactive", f"{url}/notes"], home=home) == "kept\n"


def ssh_client(superd: Superd, home: Path, key: Path, who: str, service: str) -> list[str]:
    host, port = superd.address(service)
    options = (
        "IdentitiesOnly=yes",
        "StrictHostKeyChecking=no",
        f"UserKnownHostsFile={home}/known_hosts",
        "LogLevel=ERROR",
    )
    return [
        "ssh",
        "-F",
        "none",
        "-i",
        str(key),
        "-p",
        str(port),
        *(f"-o{option}" for option in options),
        f"{who}@{host}",
    ]


def check_ssh_session(superd: Superd, argv: list[str], home: Path, service: str) -> None:
    """Bytes in both directions, standard error apart, the remote exit status; two sessions at once are two."""
    command = [*argv, 'cat; echo "$SSH_CONNECTION" >&2; exit 7']
    done = subprocess.run(command, cwd=home, input="x" * 200_000, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (7, "x" * 200_000), done
    host, port = superd.address(service)
    assert done.stderr.split()[2:] == [host, str(port)], done.stderr
    run_all([[*argv, "true"] for _ in range(3)], home=home)


@pytest.mark.interop
def test_sshd(superd: Superd, require: Require) -> None:
    sshd, keygen = require("sshd"), require("ssh-keygen")
    require("ssh")
    who, shell = pwd.getpwuid(os.geteuid()).pw_name, pwd.getpwuid(os.geteuid()).pw_shell
    if shell.endswith(("nologin", "false")):
        pytest.skip(f"{who} has no shell to log in to")
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # where sshd as root separates privileges
    home = superd.room("home")
    for name in ("host", "user"):
        run([keygen, "-q", "-t", "ed25519", "-N", "", "-f", home / name], home=home)
    conf = home / "sshd_config"
    settings = ("StrictModes no", "UsePAM no", "PermitRootLogin yes", "PasswordAuthentication no", "PidFile none")
    lines = [f"HostKey {home}/host", f"AuthorizedKeysFile {home}/user.pub", *settings]
    conf.write_text("".join(f"{line}\n" for line in lines))
    superd.write(
        "ssh", f'listen = "tcp:127.0.0.1:0"\nuser = "{who}"\ncommand = {toml([sshd, "-i", "-e", "-f", str(conf)])}'
    )
    superd.start()
    check_ssh_session(superd, ssh_client(superd, home, home / "user", who, "ssh"), home, "ssh")
    # sshd -e: its log is on standard error, which is no business of the client's.  # E24
    output = superd.wait_record(event="output", service="ssh", message=lambda text: "Accepted publickey" in text)
    connection = superd.wait_record(event="start", service="ssh", connection=output["connection"])
    assert str(connection["peer"]).count("127.0.0.1")


@pytest.mark.interop
def test_dropbear(superd: Superd, require: Require) -> None:
    """Its user is one that only exists for it (nss_wrapper), so that nobody's real ~/.ssh is touched."""
    dropbear, dropbearkey, keygen = require("dropbear"), require("dropbearkey"), require("ssh-keygen")
    require("ssh")
    wrapper = next(iter(sorted(Path("/usr/lib").glob("**/libnss_wrapper.so"))), None)
    if wrapper is None:
        require("libnss_wrapper.so")
    uid, gid = os.geteuid(), os.getegid()
    home = superd.room("home", mode=0o700)
    (home / ".ssh").mkdir(mode=0o700)
    run([keygen, "-q", "-t", "ed25519", "-N", "", "-f", home / "user"], home=home)
    (home / ".ssh" / "authorized_keys").write_bytes((home / "user.pub").read_bytes())
    (home / ".ssh" / "authorized_keys").chmod(0o600)
    run([dropbearkey, "-t", "ed25519", "-f", home / "host"], home=home)
    (home / "passwd").write_text(f"tester:x:{uid}:{gid}::{home}:/bin/sh\n")
    (home / "group").write_text(f"tester:x:{gid}:\n")
    superd.write(
        "ssh",
        f"""
        listen = "tcp:127.0.0.1:0"
        user = {uid}
        command = ["{dropbear}", "-i", "-s", "-r", "{home}/host"]
        [environment]
        LD_PRELOAD = "{wrapper}"
        NSS_WRAPPER_PASSWD = "{home}/passwd"
        NSS_WRAPPER_GROUP = "{home}/group"
        """,
    )
    superd.start()
    check_ssh_session(superd, ssh_client(superd, home, home / "user", "tester", "ssh"), home, "ssh")


def connect_as(path: str, uid: int, gid: int, request: bytes) -> subprocess.CompletedProcess[bytes]:
    """A client of a UNIX socket with this identity: its answer, or exit status 1 when it is not let in."""
    code = (
        "import socket, sys\n"
        "s = socket.socket(socket.AF_UNIX)\n"
        "s.settimeout(20)\n"
        "try: s.connect(sys.argv[1])\n"
        "except PermissionError: sys.exit(1)\n"
        "s.sendall(sys.stdin.buffer.read())\n"
        "while part := s.recv(65536): sys.stdout.buffer.write(part)\n"
    )
    return subprocess.run(
        [PYTHON, "-I", "-c", code, path], input=request, capture_output=True, timeout=TIMEOUT_S,
        user=uid, group=gid, extra_groups=[], cwd="/",
    )  # fmt: skip


def test_unix_socket_of_a_group(superd: Superd, script: Script, root: None) -> None:
    """A helper with more rights behind a socket that only its group may open."""
    owner, group = pwd.getpwnam("daemon"), grp.getgrnam("daemon")
    stranger = pwd.getpwnam("nobody")
    path = superd.dir / "helper.sock"
    argv = [PYTHON, "-I", script("file_helper.py")]
    superd.write(
        "helper",
        f"""
        user = "root"
        command = {toml(argv)}
        [[socket]]
        listen = "unix:{path}"
        mode = "0660"
        user = "daemon"
        group = "daemon"
        """,
    )
    superd.start()
    facts = path.stat()
    assert (stat.filemode(facts.st_mode), facts.st_uid, facts.st_gid) == ("srw-rw----", owner.pw_uid, group.gr_gid)

    request = json.dumps({"numbers": [1, 2, 39]}).encode() + b"\n"
    for uid, gid in ((owner.pw_uid, stranger.pw_gid), (stranger.pw_uid, group.gr_gid)):
        done = connect_as(str(path), uid, gid, request)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout) == {"sum": 42, "uid": 0, "client": [str(uid), str(gid)]}
    assert connect_as(str(path), stranger.pw_uid, stranger.pw_gid, request).returncode == 1
    # One process each, no more.
    exits = superd.wait_records(2, event="exit", service="helper")
    assert [record["status"] for record in exits] == [0, 0]
    assert len({record["pid"] for record in exits}) == 2

    superd.stop()
    assert not path.exists()


def host_call(
    client: socket.socket, name: str, arguments: dict[str, object], fds: list[int]
) -> tuple[dict[str, Any], list[int]]:
    message = json.dumps({"type": "method", "data": {"name": name, "args": arguments, "fds": list(range(len(fds)))}})
    socket.send_fds(client, [message.encode()], fds)
    packet, received, flags, _ = socket.recv_fds(client, 65536, 8)
    assert not flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC)
    return json.loads(packet), received


def test_host_service(superd: Superd, script: Script, service_user: str) -> None:
    """JSON messages with fds over a SEQPACKET connection whose number stands in argv."""
    argv = [
        PYTHON,
        "-I",
        script("host_service.py"),
        "--service-id",
        "org.example.count",
        "--service-fd",
        "${fd:connection}",
    ]
    superd.write(
        "host",
        f"""
        listen = "unix-seqpacket:{superd.dir}/host.sock"
        user = "{service_user}"
        run = "per-connection"
        pass = "listen-fds"
        command = {toml(argv)}
        """,
    )
    superd.start()
    clients = [superd.connect("host") for _ in range(2)]
    try:
        for number, client in enumerate(clients):
            for round_ in range(3):
                reader, writer = os.pipe()
                memory = os.memfd_create("data")
                os.write(writer, b"x" * 1000 * (round_ + 1))
                os.close(writer)
                os.write(memory, b"y" * 70_000)
                os.lseek(memory, 0, os.SEEK_SET)
                reply, fds = host_call(client, "count", {"client": number, "round": round_}, [reader, memory])
                os.close(reader)
                os.close(memory)
                expected = {"service": "org.example.count", "client": number, "round": round_}
                assert reply == {"type": "reply", "data": {"reply": expected, "fds": [0]}}
                with open(fds[0], "rb") as answer:
                    assert json.load(answer) == [1000 * (round_ + 1), 70_000]
        reply, fds = host_call(clients[0], "nothing", {}, [])
        assert (reply["type"], fds) == ("exception", [])
        started = superd.wait_records(
            2, event="output", service="host", message="host service org.example.count on fd 3"
        )
        assert len({record["pid"] for record in started}) == 2
        # Closing one connection ends one service, the other goes on.
        clients[0].close()
        first = superd.wait_record(event="exit", service="host")
        assert (first["status"], first["connection"] in {record["connection"] for record in started}) == (0, True)
        assert host_call(clients[1], "nothing", {}, [])[0]["type"] == "exception"
    finally:
        for client in clients:
            client.close()
    superd.wait_records(2, event="exit", service="host")


def test_clients_at_once(superd: Superd) -> None:
    """Each of 40 connections that are open together has its own process, and its own bytes."""
    superd.write("cat", 'listen = "tcp:127.0.0.1:0"\ncommand = "/bin/cat"')
    superd.start()
    clients = [superd.connect("cat") for _ in range(40)]
    try:
        for number, client in enumerate(clients):
            client.sendall(f"client {number}\n".encode())
        for number, client in enumerate(clients):
            assert client.recv(100) == f"client {number}\n".encode()
        assert len(superd.services()) == 40
    finally:
        for client in clients:
            client.close()
    exits = superd.wait_records(40, event="exit", service="cat")
    assert {record["status"] for record in exits} == {0}
