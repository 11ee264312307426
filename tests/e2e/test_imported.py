"""Files of other superservers: imported by superctl, checked, run by superd, and asked by a real client."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from harness import PYTHON, Superd, fetch

Require = Callable[[str], str]


def superctl(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-I", "-m", "superd.cli.superctl", *map(str, arguments)]
    return subprocess.run(argv, capture_output=True, text=True, timeout=60)


def bring(superd: Superd, *files: Path) -> str:
    """Import into the daemon's conf.d; what was said on stderr. The result has nothing that `check` does not like."""
    done = superctl("import", *files, "-o", superd.conf / "conf.d")
    assert done.returncode == 0, done.stderr
    checked = superctl("check", superd.conf)
    assert checked.returncode == 0, checked.stdout
    return done.stderr


def place(superd: Superd, name: str, text: str) -> Path:
    path = superd.dir / "old" / name
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text(text)
    return path


@pytest.mark.usefixtures("root")
def test_inetd_conf(superd: Superd, require: Require) -> None:
    busybox, cat = require("busybox"), require("cat")
    conf = place(superd, "inetd.conf", f"""
#<off># discard stream tcp nowait root internal
127.0.0.1:0     stream  tcp  nowait      nobody        {busybox} busybox echo hello
{superd.dir}/x  stream  unix nowait.100  nobody:games  {cat}     cat /proc/self/status
""")  # fmt: skip
    assert "not carried over" not in bring(superd, conf)
    superd.start()
    with superd.connect("busybox") as client:
        assert fetch(client) == b"hello\n"
    with superd.connect("x") as client:
        status = fetch(client).decode()
    assert "\nGid:\t60\t60" in status


@pytest.mark.usefixtures("root")
def test_xinetd_file_of_git(superd: Superd, require: Require) -> None:
    git = require("git")
    room = superd.room("repositories")
    environment = {"PATH": os.environ["PATH"], "HOME": str(room), "GIT_CONFIG_NOSYSTEM": "1"}
    subprocess.run([git, "init", "-q", "--bare", str(room / "r.git")], check=True, env=environment)
    subprocess.run(["chown", "-R", "nobody", str(room)], check=True)
    conf = place(superd, "xinetd.d/git", f"""
service git
{{
        disable         = no
        type            = UNLISTED
        port            = 0
        bind            = 127.0.0.1
        socket_type     = stream
        wait            = no
        user            = nobody
        server          = {git}
        server_args     = daemon --inetd --export-all --base-path={room}
        env             = HOME={room}
        log_on_failure  += USERID
}}
""")  # fmt: skip
    assert f"{conf}:14: warning: not carried over: log_on_failure = USERID" in bring(superd, conf)
    superd.start()
    host, port = superd.address("git")
    asked = [git, "ls-remote", f"git://{host}:{port}/r.git"]
    done = subprocess.run(asked, capture_output=True, text=True, timeout=30, env=environment)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.usefixtures("root")
def test_only_from(superd: Superd, require: Require) -> None:
    """Whom xinetd let in gets in, and nobody else."""
    block = """service NAME
{
    type = UNLISTED
    port = 0
    bind = 127.0.0.1
    socket_type = stream
    wait = no
    user = nobody
    server = PROGRAM
    server_args = hello
    only_from = NETWORK
}
""".replace("PROGRAM", require("echo"))
    inside = place(superd, "inside", block.replace("NAME", "inside").replace("NETWORK", "127.0.0.0"))
    outside = place(superd, "outside", block.replace("NAME", "outside").replace("NETWORK", "10.0.0.0"))
    assert "not carried over" not in bring(superd, inside, outside)
    superd.start()
    with superd.connect("inside") as client:
        assert fetch(client) == b"hello\n"
    with superd.connect("outside") as client:
        assert fetch(client) == b""


@pytest.mark.usefixtures("root")
def test_socket_and_service_of_nbdkit(superd: Superd, require: Require) -> None:
    nbdkit, nbdinfo = require("nbdkit"), require("nbdinfo")
    socket = place(superd, "nbdkit.socket", f"[Socket]\nListenStream={superd.dir}/nbd.sock\nSocketMode=0666\n")
    place(superd, "nbdkit.service", f"[Service]\nExecStart={nbdkit} memory 1M\nUser=nobody\n")
    bring(superd, socket)  # the service is found beside it
    superd.start()
    uri = f"nbd+unix:///?socket={superd.dir}/nbd.sock"
    done = subprocess.run([nbdinfo, "--size", uri], capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout) == (0, "1048576\n"), done.stderr


@pytest.mark.usefixtures("root")
def test_template_with_the_connection_on_stdin(superd: Superd) -> None:
    """Accept=yes, StandardInput=socket, a variable of an EnvironmentFile in the command line, a drop-in."""
    variables = superd.dir / "variables"
    variables.write_text('WORDS="one two"\nONE="three four"\n')
    socket = place(
        superd, "words.socket", f"[Socket]\nListenStream={superd.dir}/w.sock\nAccept=yes\nMaxConnections=5\n"
    )
    place(superd, "words@.service", f"""[Service]
ExecStart={PYTHON} -c 'import sys; print(sys.argv[1:])' $WORDS ${{ONE}} $NONE x%%y
EnvironmentFile={variables}
StandardInput=socket
StandardError=journal
User=nobody
""")  # fmt: skip
    place(superd, "words@.service.d/10.conf", "[Service]\nNoNewPrivileges=yes\n")
    bring(superd, socket)
    superd.start()
    with superd.connect("words") as client:
        assert fetch(client) == b"['one', 'two', 'three four', 'x%y']\n"


@pytest.mark.usefixtures("root")
def test_upstart_job(superd: Superd, script: Callable[[str], str]) -> None:
    job = place(superd, "upstart-socket.conf", f"""
description "upstart-socket-bridge(8)"
start on socket PROTO=inet PORT=0 ADDR=127.0.0.1
setuid nobody
exec {PYTHON} {script("upstart_service.py")}
""")  # fmt: skip
    bring(superd, job)
    superd.start()
    with superd.connect("upstart-socket") as client:
        assert fetch(client) == b"python 3 socket -\n"


@pytest.mark.usefixtures("root")
def test_supervisord_program_and_fcgi_program(superd: Superd) -> None:
    serve = 'import socket; s = socket.socket(fileno=0)\nwhile True: c, _ = s.accept(); c.sendall(b"fd 0"); c.close()'
    (superd.dir / "serve.py").write_text(serve)
    conf = place(superd, "supervisord.conf", f"""
[supervisord]
nodaemon=true
[program:tick]
command=/bin/sh -c "echo tick %(process_num)02d; exec sleep 1000"
process_name=%(program_name)s_%(process_num)02d
numprocs=2
user=nobody
[fcgi-program:f]
command={PYTHON} {superd.dir}/serve.py
socket=unix://{superd.dir}/f.sock
socket_mode=0777
user=nobody
""")  # fmt: skip
    bring(superd, conf)
    superd.start()
    for number in ("00", "01"):
        superd.wait_record(event="output", service=f"tick@{number}", message=f"tick {number}")
    with superd.connect("f") as client:
        assert fetch(client) == b"fd 0"


@pytest.mark.usefixtures("root")
def test_exported_and_imported_again_it_still_runs(superd: Superd) -> None:
    source = superd.dir / "a" / "conf.d"
    source.mkdir(parents=True)
    text = f'listen = "unix:{superd.dir}/e.sock"\ncommand = ["/bin/echo", "a  b", "$x", "%n"]\nuser = "nobody"\n'
    (source / "e.toml").write_text(text)
    units = superd.dir / "units"
    done = superctl("-c", source, "export", "systemd", "e", "-o", units)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in units.iterdir()) == ["e.socket", "e@.service"]
    bring(superd, *sorted(units.iterdir()))
    superd.start()
    with superd.connect("e") as client:
        assert fetch(client) == b"a  b $x %n\n"
