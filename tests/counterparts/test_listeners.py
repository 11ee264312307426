"""Services that get the sockets themselves: on standard input (inetd's `wait`) or from fd 3 on (systemd)."""

from __future__ import annotations

import json
import os
import pwd
import re
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from harness import PYTHON, TIMEOUT_S, Superd, read_all, toml, wait_gone

Require = Callable[[str], str]
Script = Callable[[str], str]
Build = Callable[..., str]


def client(*argv: str | Path, home: Path) -> str:
    """Standard output of a client that has to succeed."""
    environment = {"PATH": os.environ["PATH"], "HOME": str(home), "LANG": "C.UTF-8"}
    done = subprocess.run(
        argv, cwd=home, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, f"{' '.join(map(str, argv))}: {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.mark.interop
def test_tftpd(superd: Superd, require: Require, root: None) -> None:
    """A datagram service on fd 0 finds the first request unread; when it has ended superd listens again."""
    tftpd, tftp = require("in.tftpd"), require("tftp")
    home, data = superd.room("home"), superd.room("data", mode=0o777)
    (data / "file").write_bytes(os.urandom(70_000))
    argv = [tftpd, "--secure", "--create", "--timeout", "1", str(data)]
    superd.write(
        "tftp",
        f'listen = "udp:127.0.0.1:0"\nrun = "on-demand"\npass = "stdio"\nuser = "root"\ncommand = {json.dumps(argv)}',
    )
    superd.start()
    host, port = superd.address("tftp")

    for number in range(2):  # --timeout 1: the second finds a new process
        client(tftp, "-m", "binary", host, str(port), "-c", "get", "file", f"got{number}", home=home)
        assert (home / f"got{number}").read_bytes() == (data / "file").read_bytes()
        superd.wait_records(number + 1, event="exit", service="tftp")
    (home / "sent").write_bytes(os.urandom(30_000))
    client(tftp, "-m", "binary", host, str(port), "-c", "put", "sent", "put", home=home)
    superd.wait_records(3, event="exit", service="tftp")
    assert (data / "put").read_bytes() == (home / "sent").read_bytes()
    assert len({record["pid"] for record in superd.wait_records(3, event="exit", service="tftp")}) == 3


@pytest.mark.interop
def test_nbdkit(superd: Superd, require: Require, service_user: str) -> None:
    """One nbdkit with a TCP and a UNIX listener, started by the first client, one process for all of them."""
    nbdkit, nbdinfo = require("nbdkit"), require("nbdinfo")
    home = superd.room("home")
    superd.write(
        "disk",
        f"""
        listen = ["tcp:127.0.0.1:0", "unix:{superd.dir}/nbd.sock"]
        run = "on-demand"
        pass = "listen-fds"
        user = "{service_user}"
        command = ["{nbdkit}", "--foreground", "memory", "7M"]
        """,
    )
    superd.start()
    assert superd.services() == []
    host, port = superd.address("disk")
    for uri in (f"nbd://{host}:{port}", f"nbd+unix:///?socket={superd.dir}/nbd.sock", f"nbd://{host}:{port}"):
        assert client(nbdinfo, "--size", uri, home=home) == f"{7 << 20}\n"
    assert len(superd.find_records(event="start", service="disk")) == 1
    assert len(superd.services()) == 1


@pytest.mark.interop
@pytest.mark.parametrize("mode", ["on-demand", "always-on"])
def test_gunicorn(superd: Superd, require: Require, script: Script, mode: str) -> None:
    gunicorn = Path(sys.executable).with_name("gunicorn")
    program = str(gunicorn) if gunicorn.exists() else require("gunicorn")
    curl = require("curl")
    home = superd.room("home")
    who = pwd.getpwuid(os.geteuid()).pw_name  # the virtual environment may be ours alone
    argv = [program, "--workers", "2", "--chdir", str(Path(script("wsgi_app.py")).parent), "wsgi_app:application"]
    superd.write(
        "web",
        f"""
        listen = "tcp:127.0.0.1:0"
        run = "{mode}"
        pass = "listen-fds"
        ready = "notify"
        user = "{who}"
        command = {json.dumps(argv)}
        """,
    )
    superd.start()
    url = "http://{}:{}".format(*superd.address("web"))
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda i: client(curl, "-sS", "--fail", f"{url}/{i}", home=home), range(24)))
    assert [re.sub(r"\d+$", "PID", answer.strip()) for answer in answers] == [f"hello /{i} from PID" for i in range(24)]
    workers = {int(answer.split()[-1]) for answer in answers}
    superd.wait_record(event="ready", service="web")
    start = superd.wait_record(event="start", service="web")
    assert workers <= set(superd.services()) - {start["pid"]}  # its children, found below superd
    superd.stop()
    assert superd.wait_record(event="exit", service="web")["status"] == 0


@pytest.mark.interop
def test_starman(superd: Superd, require: Require) -> None:
    """A pre-forking server that knows Server::Starter's variable and no other."""
    starman, curl = require("starman"), require("curl")
    home = superd.room("home")
    (home / "app.psgi").write_text("sub { [200, [], ['hello ' . getppid()]] };")
    superd.write(
        "web",
        f"""
        listen = "tcp:127.0.0.1:0"
        run = "on-demand"
        fd_protocols = ["server-starter"]
        command = ["{starman}", "--workers", "2", "{home}/app.psgi"]
        """,
    )
    superd.start()
    url = "http://{}:{}/".format(*superd.address("web"))
    answers = {client(curl, "-sS", "--fail", url, home=home) for _ in range(3)}
    assert answers == {f"hello {superd.wait_record(event='start', service='web')['pid']}"}
    superd.call("Stop", names=["web"])
    assert superd.wait_record(event="exit", service="web")["status"] == 0


@pytest.mark.interop
@pytest.mark.parametrize("pass_", ["stdio", "listen-fds"])
def test_fcgiwrap(superd: Superd, require: Require, pass_: str) -> None:
    """The two ways to get a UNIX listener: FastCGI's own, on fd 0, and systemd's."""
    program = require("fcgiwrap")
    cgi = superd.room("www") / "script"
    cgi.write_text("#!/bin/sh\nprintf 'Content-Type: text/plain\\r\\n\\r\\n'; echo $QUERY_STRING $PPID\n")
    cgi.chmod(0o755)
    listen = f"unix:{superd.dir}/fcgi.sock"
    superd.write("cgi", toml(listen=listen, run="on-demand", pass_=pass_, command=[program]))
    superd.start()
    for number in range(3):
        variables = {"SCRIPT_FILENAME": str(cgi), "REQUEST_METHOD": "GET", "QUERY_STRING": f"n={number}"}
        pairs = b"".join(bytes([len(k), len(v)]) + f"{k}{v}".encode() for k, v in variables.items())
        with superd.connect("cgi") as conn:
            conn.sendall(
                fastcgi(1, b"\0\1\0\0\0\0\0\0") + fastcgi(4, pairs) + fastcgi(4, b"") + fastcgi(5, b"")
            )  # a responder without keep-alive, its variables, no standard input
            answer = read_all(conn)
        assert f"n={number} {superd.wait_record(event='start', service='cgi')['pid']}\n".encode() in answer
    assert len(superd.find_records(event="start", service="cgi")) == 1


def fastcgi(kind: int, content: bytes) -> bytes:
    return struct.pack(">BBHHBx", 1, kind, 1, len(content), 0) + content


@pytest.mark.interop
def test_ngircd(superd: Superd, require: Require, service_user: str) -> None:
    """Both of its clients are in one process, over two listeners of different families."""
    program = require("ngircd")
    (superd.dir / "ngircd.conf").write_text(
        "[Global]\nName=irc.example.net\nInfo=x\nMotdPhrase=x\n[Options]\nIdent=no\nDNS=no\nPAM=no\n"
    )
    argv = [program, "--nodaemon", "--config", str(superd.dir / "ngircd.conf")]
    listen = ["tcp:127.0.0.1:0", "tcp6:[::1]:0"]
    superd.write("irc", toml(listen=listen, run="on-demand", user=service_user, command=argv))
    superd.start()
    with superd.connect("irc", 0) as first, superd.connect("irc", 1) as second:
        for name, conn in {"first": first, "second": second}.items():
            conn.sendall(f"NICK {name}\r\nUSER {name} 0 * :x\r\n".encode())
            lines = conn.makefile("rb")
            while b" 376 " not in lines.readline():  # the end of its greeting
                pass
        first.sendall(b"PRIVMSG second :hello\r\n")
        assert lines.readline().endswith(b" PRIVMSG second :hello\r\n")
    superd.call("Stop", names=["irc"])
    assert superd.wait_record(event="exit", service="irc")["status"] == 0


@pytest.mark.interop
def test_dbus_daemon(superd: Superd, require: Require) -> None:
    """It takes its listener from LISTEN_FDS and says READY=1 when it can be called; superd waits for that."""
    program, client_ = require("dbus-daemon"), require("dbus-send")
    home = superd.room("home")
    config = superd.dir / "bus.conf"
    config.write_text(
        f"<busconfig><type>session</type><listen>unix:path={superd.dir}/bus</listen><auth>EXTERNAL</auth>"
        '<policy context="default"><allow user="*"/><allow send_destination="*" eavesdrop="true"/>'
        '<allow eavesdrop="true"/></policy></busconfig>'
    )
    argv = [program, f"--config-file={config}", "--address=systemd:", "--nofork", "--nopidfile", "--nosyslog"]
    superd.write(
        "bus",
        f"""
        listen = "unix:{superd.dir}/bus"
        run = "always-on"
        ready = "notify"
        command = {json.dumps(argv)}
        """,
    )
    superd.start()
    superd.wait_record(event="ready", service="bus")
    call = [client_, f"--bus=unix:path={superd.dir}/bus", "--print-reply", "--dest=org.freedesktop.DBus"]
    answer = client(*call, "/org/freedesktop/DBus", "org.freedesktop.DBus.GetId", home=home)
    assert re.search(r'string "[0-9a-f]{32}"', answer)
    superd.stop()


@contextmanager
def datagram_client(path: Path, own: Path) -> Iterator[socket.socket]:
    """A UNIX datagram socket with a name, to be answered at, that any service user may write to."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.settimeout(TIMEOUT_S)
        sock.bind(str(own))
        own.chmod(0o777)
        sock.connect(str(path))
        yield sock


@pytest.mark.parametrize("mode", ["on-demand", "always-on"])
def test_libsystemd(superd: Superd, build: Build, service_user: str, mode: str) -> None:
    """sd_listen_fds_with_names and sd_is_socket on a stream, a datagram and a seqpacket socket, all in one service."""
    program = build("sd_sockets.c", "-lsystemd")
    datagrams = superd.dir / "d.sock"
    superd.write(
        "sockets",
        f"""
        run = "{mode}"
        user = "{service_user}"
        ready = "notify"
        command = "{program}"
        [[socket]]
        listen = "tcp4:127.0.0.1:0"
        name = "stream"
        [[socket]]
        listen = "unix-dgram:{datagrams}"
        name = "datagram"
        [[socket]]
        listen = "unix-seqpacket:{superd.dir}/s.sock"
        name = "seqpacket"
        """,
    )
    superd.start()
    report = b"3 fds: stream=stream datagram=datagram seqpacket=seqpacket"
    with superd.connect("sockets", 0) as stream:
        assert read_all(stream) == report
    with superd.connect("sockets", 2) as seqpacket:
        seqpacket.send(b"one")
        assert seqpacket.recv(100) == b"seqpacket one"
    with datagram_client(datagrams, superd.dir / "own.sock") as sock:
        sock.send(b"two")
        assert sock.recv(100) == b"datagram two"
        superd.wait_record(event="ready", service="sockets")
        output = superd.wait_record(event="output", service="sockets")
        assert (output["level"], output["message"]) == ("info", report.decode())
        sock.send(b"stop")
    first = superd.wait_record(event="exit", service="sockets")
    assert first["status"] == 0
    if mode == "on-demand":  # it listens again, and any of the three starts the next one
        with superd.connect("sockets", 2) as seqpacket:
            seqpacket.send(b"again")
            assert seqpacket.recv(100) == b"seqpacket again"
        assert superd.wait_records(2, event="start", service="sockets")[1]["pid"] != first["pid"]


@pytest.mark.parametrize("first", ["stream", "datagram", "seqpacket"])
def test_any_socket_starts_the_service(superd: Superd, build: Build, service_user: str, first: str) -> None:
    program = build("sd_sockets.c", "-lsystemd")
    tables = {
        "stream": "tcp4:127.0.0.1:0",
        "datagram": f"unix-dgram:{superd.dir}/d.sock",
        "seqpacket": f"unix-seqpacket:{superd.dir}/s.sock",
    }
    sockets = "".join(f'[[socket]]\nlisten = "{address}"\nname = "{name}"\n' for name, address in tables.items())
    superd.write("sockets", f'run = "on-demand"\nuser = "{service_user}"\ncommand = "{program}"\n{sockets}')
    superd.start()
    assert superd.services() == []
    if first == "datagram":
        with datagram_client(superd.dir / "d.sock", superd.dir / "own.sock") as sock:
            sock.send(b"x")
            assert sock.recv(100) == b"datagram x"
    else:
        with superd.connect("sockets", list(tables).index(first)) as sock:
            sock.sendall(b"x")
            assert sock.recv(100).startswith(b"3 fds" if first == "stream" else b"seqpacket x")


@pytest.mark.parametrize("language", ["python", "c"])
@pytest.mark.parametrize("protocols", [["upstart"], ["systemd", "upstart"]])
def test_upstart(
    superd: Superd, build: Build, script: Script, service_user: str, language: str, protocols: list[str]
) -> None:
    """socket.fromfd(int(os.environ["UPSTART_FDS"]), …), accept, answer, exit: and the next client starts it again."""
    argv = [PYTHON, "-I", script("upstart_service.py")] if language == "python" else [build("upstart_service.c")]
    superd.write(
        "job",
        f"""
        listen = "tcp4:127.0.0.1:0"
        run = "on-demand"
        pass = "listen-fds"
        fd_protocols = {json.dumps(protocols)}
        user = "{service_user}"
        command = {json.dumps(argv)}
        """,
    )
    superd.start()
    listen_fds = "1" if "systemd" in protocols else "-"
    for number in range(3):
        with superd.connect("job") as connection:
            assert read_all(connection) == f"{language} 3 socket {listen_fds}\n".encode()
        assert superd.wait_records(number + 1, event="exit", service="job")[number]["status"] == 0


def test_clients_queued_while_it_exits(superd: Superd, build: Build, service_user: str) -> None:
    """One client a process, ten clients at once: the nine that wait in the queue are served by the next ones.  # G18"""
    superd.write(
        "job",
        f"""
        listen = "tcp4:127.0.0.1:0"
        run = "on-demand"
        fd_protocols = ["upstart"]
        user = "{service_user}"
        command = "{build("upstart_service.c")}"
        """,
    )
    superd.start()
    clients = [superd.connect("job") for _ in range(10)]
    try:
        for connection in clients:
            assert read_all(connection) == b"c 3 socket -\n"
    finally:
        for connection in clients:
            connection.close()
    assert {record["status"] for record in superd.wait_records(10, event="exit", service="job")} == {0}


LEVELS = {"0": "emerg", "1": "alert", "2": "crit", "3": "err", "4": "warning", "5": "notice", "6": "info", "7": "debug"}


@pytest.mark.parametrize("how", ["stdio", "listen-fds"])
def test_datagrams_and_log_levels(superd: Superd, script: Script, service_user: str, how: str) -> None:
    """A UNIX datagram service that uses recvfrom and logs with `<5>` prefixes."""
    path = superd.dir / "log.sock"
    superd.write_daemon('log_level = "debug"')
    argv = [PYTHON, "-I", script("datagram_log.py"), "0" if how == "stdio" else "3", "8"]
    superd.write(
        "log",
        f"""
        listen = "unix-dgram:{path}"
        run = "on-demand"
        pass = "{how}"
        user = "{service_user}"
        command = {json.dumps(argv)}
        """,
    )
    superd.start()
    with datagram_client(path, superd.dir / "own.sock") as sock:
        for round_ in range(2):  # after eight datagrams it exits, the ninth starts the next process
            for digit in LEVELS:
                sock.send(f"{digit} round {round_} level {digit}".encode())
            for _ in LEVELS:
                assert sock.recv(100) == b"17"
    records = superd.wait_records(16, event="output", service="log")
    assert [record["message"] for record in records] == [
        f"round {r} level {digit}" for r in range(2) for digit in LEVELS
    ]
    assert [record["level"] for record in records] == [*LEVELS.values()] * 2
    assert len({record["pid"] for record in records}) == 2


def test_services_end_with_superd(superd: Superd) -> None:
    superd.write(
        "sleeper", 'command = ["/bin/sh", "-c", "echo $$ >&2; exec sleep 1000"]\nrun = "always-on"\nstop_timeout = "5s"'
    )
    superd.start()
    pid = int(superd.wait_record(event="output", service="sleeper")["message"])
    superd.stop()
    wait_gone(pid)
    assert superd.wait_record(event="exit", service="sleeper")["signal"] in ("TERM", "SIGTERM")
