"""`superctl show`: the effective configuration reads back as the same service, and says where each value is from."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from getpass import getuser
from pathlib import Path
from typing import Any

import pytest
import tomli
from core.test_schema import CAT
from harness import TIMEOUT_S, Superd, toml
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from loading import FakeMachine, load_all, sources

from superd.cli import superctl
from superd.core import effective
from superd.core.effective import BUILT_IN, Entry
from superd.core.schema import SourceFile
from superd.core.spec import ServiceSpec
from superd.core.toml import format_key, format_value
from superd.core.values import expand_runtime
from superd.system.configdir import RealMachine

ROOT = Path(__file__).resolve().parents[2]

PATH = {"PATH": "/usr/bin:/bin"}


def show(
    files: Mapping[str, str], name: str = "git", *, is_root: bool = True, environ: Mapping[str, str] = PATH
) -> tuple[ServiceSpec, list[Entry]]:
    machine = FakeMachine() if is_root else FakeMachine(uid=33, gid=33)
    spec, entries, problems = effective.load_one(
        name, sources(files), machine=machine, environ=environ, is_root=is_root
    )
    assert spec is not None, problems
    return spec, entries


def normal(spec: ServiceSpec) -> ServiceSpec:
    """Without what makes no difference: the order of limits, and which dollars came from a variable."""
    numbers = {socket.name: 7 for socket in spec.sockets}
    context = replace(spec.context, rlimits=tuple(sorted(spec.context.rlimits)))
    return replace(
        spec, context=context, command=tuple(expand_runtime(word, numbers, numbers) for word in spec.command)
    )


def check_round_trip(
    files: Mapping[str, str], name: str = "git", *, is_root: bool = True, environ: Mapping[str, str] = PATH
) -> str:
    """What is shown, read as the only file of that name, is the same service."""
    spec, entries = show(files, name, is_root=is_root, environ=environ)
    text = effective.format_entries(entries, origin=True, secrets=True)
    assert tomli.loads(text) == effective.tree_of(entries, secrets=True)
    snapshot, problems = load_all({f"{name.partition('@')[0]}.toml": text}, is_root=is_root, environ=PATH)
    assert not problems, (text, problems)
    (again,) = snapshot.services.values()
    again, spec = normal(again), normal(spec)
    # The user is written out, the name is not that of an instance.
    assert replace(again, name=spec.name, source=spec.source, user_assumed=spec.user_assumed, sockets=()) == replace(
        spec, sockets=()
    )
    names = [replace(socket, name="") if socket.name == again.name else socket for socket in again.sockets]
    assert names == [replace(socket, name="") if socket.name == spec.name else socket for socket in spec.sockets]
    return text


EVERYTHING = """
description = "Gi\\"t"
enabled = false
command = ["env", "-p", "${port:a}", "$${x}", "${A:-b}", "$x", "'"]
run = "on-demand"
fd_protocols = ["systemd", "einhorn"]
stderr = "null"
stdout = "file:/var/log/git.log"
user = 33
group = "www"
groups = ["www", 0]
cwd = "/srv"
umask = "0077"
environment_file = "git.env"
pass_environment = ["*"]
ready = "connect:unix:r.sock"
ready_timeout = "off"
notify_access = "all"
watchdog = "30s"
fdstore = 3
restart = "always"
restart_delay = "1.5s"
restart_delay_max = "1m"
restart_limit = "5/10s"
success_status = [0, 3, "SIGUSR1"]
stop_signal = "SIGINT"
stop_timeout = "off"
kill_mode = "group"
essential = true
idle_timeout = "1h30m"
reload_signal = "RTMIN+3"
start_pre = "cat -u"
stop_post = [["/bin/cat", "${port:a}"], "cat 'x y'"]
[environment]
A = "1"
B = "${fd:b}"
"C D" = "line\\nline"
[limits]
rate = "50/1s"
max_runtime = "2d"
[rlimit]
nofile = [1024, "off"]
core = 0
as = "1G"
cpu = "off"
[scheduling]
nice = -5
ioprio = "best-effort:3"
cpu_affinity = [1, 0]
[health]
check = "exec:cat '${port:a} x' y"
every = "1m"
[sandbox]
no_new_privileges = false
[[socket]]
listen = "tcp:http"
name = "a"
backlog = 16
keep_alive = { idle = "60s", count = 3 }
no_delay = true
defer_accept = "5s"
receive_buffer = "64K"
send_buffer = 65537
[[socket]]
listen = "unix:git.sock"
name = "b"
mode = "0660"
user = "www"
symlinks = ["/run/git"]
"""


def test_everything_round_trips() -> None:
    check_round_trip({"git.toml": EVERYTHING})


@pytest.mark.parametrize(
    "text",
    [
        'listen = "tcp:7"\ncommand = "/bin/cat"',
        'listen = ["tcp:localhost:7", "unix:s"]\ncommand = "cat -u"\nstdout = "log"\npass = "listen-fds"',
        'listen = "udp:7"\ncommand = "/bin/cat"\n[limits]\nrate = "off"',
        'command = "/bin/cat"\nready = "log:a\\\\d{2}"\nrun = "once"',
        'command = ["/bin/cat", "a\\nb", "\\u001b", "\\u2028", "\\\\", "\'\'\'\\n"]\nuser = "root"',
        'command = ["/bin/cat", "\\n$x${A}\\n  \\"y\\""]\nargv0 = ""',
        'command = "/bin/cat"\nlisten = "unix:/run/$${x}"\n[limits]\nrefuse_message = "no\\r\\n"',
        'command = "/bin/cat"\n[[socket]]\nlisten = "tcp:7"\nkeep_alive = true\n[[socket]]\nlisten = "tcp:8"',
    ],
)
@pytest.mark.parametrize("is_root", [True, False])
def test_round_trips(text: str, is_root: bool) -> None:
    if is_root or "user" not in text:
        check_round_trip({"git.toml": text}, is_root=is_root, environ={**PATH, "A": "$5 ${b}"})


def test_access_and_sandbox_round_trip() -> None:
    text = """
    listen = "tcp:7"
    command = "/bin/cat"
    [limits]
    max_load = 4
    min_memory = "64M"
    first_byte_timeout = "5s"
    [access]
    allow = ["10.0.0.0/8", "::ffff:192.0.2.1", "2001:DB8::/32", ".Example.org", "user:www"]
    hours = ["Mon-Fri 08:00-18:00"]
    [sandbox]
    capabilities = ["CAP_CHOWN", "kill"]
    private_tmp = true
    read_only = ["/srv", "rel"]
    """
    shown = check_round_trip({"git.toml": text})
    assert 'capabilities = ["CHOWN", "KILL"]' in shown and 'read_only = ["/srv", "/work/conf.d/rel"]' in shown


def test_a_handler_round_trips() -> None:
    shown = check_round_trip({"git.toml": 'listen = "tcp:7"\nhandler = "shout:serve"\n'})
    assert "workers = 1" in shown and "command" not in shown
    assert "workers" not in check_round_trip({"git.toml": 'listen = "tcp:7"\ncommand = "/bin/cat"\n'})


def test_a_builtin_service_round_trips() -> None:
    shown = check_round_trip({"git.toml": 'listen = "tcp:7"\nbuiltin = "echo"\n[limits]\nrate = "5/1s"\n'})
    assert "umask" not in shown and "run" not in shown


@pytest.mark.parametrize("path", sorted((ROOT / "conf.d").glob("*.toml")), ids=lambda path: path.stem)
def test_examples_round_trip(path: Path) -> None:
    """With this machine's users and programs, as the command does it."""
    found = []
    environ = {**os.environ, "USER": getuser()}  # as `make run` has it
    for data in (path.read_bytes(), None):
        if data is None:
            data = effective.format_entries(found[0][1], origin=True, secrets=True).encode()
        source = SourceFile(str(path), data, "service", path.stem)
        spec, entries, problems = effective.load_one(
            path.stem, [source], machine=RealMachine(), environ=environ, is_root=os.geteuid() == 0
        )
        assert spec is not None, problems
        found.append((normal(replace(spec, user_assumed=False)), entries))
    assert found[0][0] == found[1][0]


def test_an_instance_round_trips() -> None:
    text = f'instances = ["a", "b"]\n{CAT}listen = "unix:/run/${{name}}"\nenvironment = {{ I = "${{instance}}" }}\n'
    shown = check_round_trip({"worker@.toml": text}, "worker@b")
    assert 'listen = "unix:/run/worker@b"' in shown and 'I = "b"' in shown


WORDS = st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=8), max_size=3)


@settings(max_examples=200, deadline=None)
@given(
    WORDS, st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=5), st.text(max_size=9), max_size=3),
    st.sampled_from(["tcp:7", "udp:7", "unix:@x y", "fifo:/f"]), st.integers(0, 10**7),
)  # fmt: skip
@example(["$${", "{"], {"A": "'''\n'"}, "tcp:7", 0)
def test_any_text_round_trips(words: list[str], environment: dict[str, str], listen: str, micros: int) -> None:
    tree = {
        "command": ["/bin/cat", *(word.replace("${", "$${") for word in words)], "listen": listen,
        "environment": environment, "stop_timeout": f"{micros + 1000}us",
    }  # fmt: skip
    text = "".join(f"{format_key(name)} = {format_value(value)}\n" for name, value in tree.items())
    assert tomli.loads(text) == tree
    _, problems = load_all({"git.toml": text})
    assume(not problems)
    check_round_trip({"git.toml": text})


def test_origins() -> None:
    files = {
        "superd.toml": '[defaults]\numask = "0077"\nrestart = "always"\n[defaults.limits]\nmax_per_source = 3\n',
        "git.toml": f'listen = "tcp:7"\n{CAT}[limits]\nmax_connections = 5\nmax_per_source = 4\n',
        "git.toml.d/10.toml": '[limits]\nmax_connections = 9\n[environment]\nSECRET = "x"\n',
    }
    _, entries = show(files)
    origins = effective.origins_of(entries)
    expected = {
        "listen": "conf.d/git.toml:1", "command": "conf.d/git.toml:2", "umask": "superd.toml:2",
        "limits.max_connections": "conf.d/git.toml.d/10.toml:2", "limits.max_per_source": "conf.d/git.toml:5",
        "environment.SECRET": "conf.d/git.toml.d/10.toml:4", "user": BUILT_IN, "run": BUILT_IN,
        "limits.on_full": BUILT_IN,
    }  # fmt: skip
    assert {name: origins[name] for name in expected} == expected
    assert "restart" not in origins  # of [defaults], and nothing for a per-connection service
    text = effective.format_entries(entries, origin=True, secrets=False)
    assert "max_connections = 9" in text and text.count("# conf.d/git.toml.d/10.toml:") == 2
    assert 'SECRET = "(hidden)"' in text  # K18


# -- the command


def ctl(*arguments: str, code: int = 0, environ: Mapping[str, str] = {}) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-I", "-m", "superd.cli.superctl", *arguments],
        capture_output=True, text=True, timeout=TIMEOUT_S, env={**os.environ, **environ},
    )  # fmt: skip
    assert done.returncode == code, (done.stdout, done.stderr)
    return done


def test_from_the_files(superd: Superd) -> None:
    superd.write("cat", toml(listen="tcp:127.0.0.1:0", command=["/bin/cat"], environment={"A": "1"}))
    superd.write("bad", "descripton = 1\n")
    superd.garbage_expected = True
    nowhere = {"SUPERD_SOCKET": f"{superd.dir}/nothing.sock", "SUPERD_CONFIG": str(superd.conf)}
    done = ctl("show", "cat", environ=nowhere)
    assert done.stdout.startswith(f"# cat, from the files: {superd.conf}/conf.d/cat.toml\n")
    assert tomli.loads(done.stdout)["environment"] == {"A": "1"} and "superd is not running" in done.stderr
    assert ctl("-c", str(superd.conf), "show", "cat").stderr == ""
    assert "did you mean 'cat'?" in ctl("-c", str(superd.conf), "show", "cta", code=4).stderr
    assert "error[unknown-key]" in ctl("-c", str(superd.conf), "show", "bad", code=78).stderr
    ctl("-s", nowhere["SUPERD_SOCKET"], "show", "cat", code=69)


def test_in_force_is_what_superd_has_read(superd: Superd) -> None:
    path = superd.write("cat", toml(listen="tcp:127.0.0.1:0", command=["/bin/cat"]) + '\n[limits]\nrate = "5/1s"\n')
    superd.write("bad", "descripton = 1\n")
    superd.write("other", toml(listen="unix:s", command=["/bin/cat"]))
    superd.write("second", toml(listen="unix:s", command=["/bin/cat"]))
    superd.garbage_expected = True
    superd.write_daemon("watch = false\n")
    superd.start()
    superd.call("List")
    path.write_text("something else")
    for manager in ("the first", "the next"):
        done = ctl("-s", superd.control, "show", "--origin", "cat")
        assert done.stderr == "" and done.stdout.startswith(f"# cat, in force: {path}\n"), manager
        tree = tomli.loads(done.stdout)
        assert tree["listen"] == "tcp:127.0.0.1:0" and tree["limits"]["rate"] == "5/1s"
        (line,) = [line for line in done.stdout.splitlines() if line.startswith("rate = ")]
        assert line.split("  # ")[1].startswith(f"{path}:")
        if manager == "the first":
            superd.kill_role("superd-manager")
            superd.call("List")
    answer: dict[str, Any] = json.loads(ctl("-s", superd.control, "--json", "show", "cat").stdout)
    assert answer["from"] == "superd" and answer["config"]["command"] == ["/bin/cat"]
    assert answer["origins"]["limits.rate"].startswith(f"{path}:") and answer["origins"]["cwd"] == BUILT_IN
    assert "error[unknown-key]" in ctl("-s", superd.control, "show", "bad", code=78).stderr
    assert "belongs to service 'other' already" in ctl("-s", superd.control, "show", "second", code=78).stderr
    assert "no service 'cta'" in ctl("-s", superd.control, "show", "cta", code=4).stderr
    shutil.rmtree(superd.conf / "conf.d")


def test_usage(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        superctl.main(["show", "--help"])
    assert "--origin" in capsys.readouterr().out
    assert superctl.main(["show"]) == 2
    assert superctl.main(["-c", str(tmp_path), "show", "x", "y"]) == 2
