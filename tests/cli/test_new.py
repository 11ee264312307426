"""`superctl new`, `enable` and `disable`: files that a superd then reads, and nothing written that it would not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tomli
from harness import TIMEOUT_S, Superd, read_all, toml

from superd.cli import new
from superd.core.keys import BY_TABLE
from superd.system.newfile import put_file


def ctl(conf: Path, *arguments: str, code: int = 0, **options: Any) -> str:
    """stdout and stderr; the exit status has to be `code`."""
    done = subprocess.run(
        [sys.executable, "-I", "-m", "superd.cli.superctl", "-c", str(conf), *arguments],
        capture_output=True, text=True, timeout=TIMEOUT_S, **options,
    )  # fmt: skip
    assert done.returncode == code, (arguments, done.returncode, done.stdout, done.stderr)
    return done.stdout + done.stderr


@pytest.fixture
def conf(superd: Superd) -> Path:
    """Below a directory of mode 0755, which pytest's own are not."""
    return superd.conf


# -- new


def test_a_new_service_serves(superd: Superd) -> None:
    said = ctl(
        superd.conf, "new", "upper", "--listen", "tcp:127.0.0.1:0", "--max-connections", "4", "--", "tr", "a", "b"
    )
    path = superd.conf / "conf.d" / "upper.toml"
    assert f"wrote {path}\n" in said and f"superd -c {path}" in said
    assert (path.stat().st_mode & 0o7777, os.listdir(path.parent)) == (0o644, ["upper.toml"])
    tree = tomli.loads(path.read_text())
    assert tree == {"listen": "tcp:127.0.0.1:0", "command": ["tr", "a", "b"], "limits": {"max_connections": 4}}
    superd.start()
    with superd.connect("upper") as client:
        client.sendall(b"banana")
        client.shutdown(1)
        assert read_all(client) == b"bbnbnb"


def test_every_kind_of_option(conf: Path) -> None:
    ctl(
        conf, "new", "app", "--listen", "tcp:127.0.0.1:7", "--listen", "unix:/run/x", "--run", "on-demand",
        "--description", "it's \"x\"", "--enabled", "false", "--environment", "A=b=c", "--environment", "D=",
        "--success-status", "1,USR1", "--nofile", "64,off", "--limits.rate", "5/1s", "--mode", "0600", "--start_pre",
        "cat a", "--start-pre", "cat b", "--umask", "077", "--no-new-privileges", "true", "--health.timeout", "5s",
        "--check", "exec:cat", "--nice", "5", "--cpu-affinity", "0", "--user", "0", "--backlog", "5",
        "--", "cat", "-u", "x y", code=78,
    )  # fmt: skip
    assert os.listdir(conf / "conf.d") == []  # `mode` is nothing for TCP
    ctl(
        conf, "new", "app", "--listen", "unix:/run/x/y", "--listen", "unix:/run/x/z", "--run", "on-demand",
        "--description", "it's \"x\"", "--enabled", "false", "--environment", "A=b=c", "--environment", "D=",
        "--success-status", "1,USR1", "--nofile", "64,off", "--limits.rate", "5/1s", "--mode", "0600", "--start_pre",
        "cat a", "--start-pre", "cat b", "--umask", "077", "--no-new-privileges", "true", "--health.timeout", "5s",
        "--check", "exec:cat", "--nice", "5", "--cpu-affinity", "0", "--user", str(os.geteuid()), "--backlog", "5",
        "--", "cat", "-u", "x y",
    )  # fmt: skip
    socket = {"mode": "0600", "backlog": 5}
    assert tomli.loads((conf / "conf.d" / "app.toml").read_text()) == {
        "command": ["cat", "-u", "x y"], "run": "on-demand", "description": "it's \"x\"", "enabled": False,
        "environment": {"A": "b=c", "D": ""}, "success_status": [1, "USR1"], "rlimit": {"nofile": [64, "off"]},
        "limits": {"rate": "5/1s"}, "start_pre": ["cat a", "cat b"], "umask": "077", "user": os.geteuid(),
        "sandbox": {"no_new_privileges": True}, "health": {"timeout": "5s", "check": "exec:cat"},
        "scheduling": {"nice": 5, "cpu_affinity": [0]},
        "socket": [{"listen": "unix:/run/x/y", **socket}, {"listen": "unix:/run/x/z", **socket}],
    }  # fmt: skip


def test_every_key_is_an_option() -> None:
    flags = [flag for names, _ in new.key_options() for flag in names]
    assert len(flags) == len(set(flags)) and not {"--timeout", "--json", "--config"} & set(flags)
    offered = {(key.table, key.name) for _, key in new.key_options()}
    for table in ("service", "limits", "socket", "tls", "rlimit", "health"):
        left = {name for name in BY_TABLE[table] if (table, name) not in offered}
        assert left <= {
            "listen", "command", "socket", "limits", "access", "rlimit", "scheduling", "cgroup", "sandbox", "health",
            "proxy", "tls", "sni",
        }  # fmt: skip


def test_nothing_wrong_is_written(conf: Path) -> None:
    (conf / "conf.d" / "echo.toml").write_text('listen = "tcp:7"\ncommand = "/bin/cat"\n')
    caret = ctl(conf, "new", "git", "--listen", "tcp:79x", "--", "/bin/cat", code=78)
    assert "error[bad-value]: cannot parse address 'tcp:79x'" in caret
    assert '| listen = "tcp:79x"\n' in caret and "^^^^^^^^^\n" in caret
    assert "nothing was written" in caret
    assert "belongs to service 'echo' already" in ctl(conf, "new", "git", "--listen", "tcp:7", "--", "cat", code=78)
    assert "no program" in ctl(conf, "new", "git", "--listen", "tcp:8", "--", "/nowhere", code=78)
    assert "is there already" in ctl(conf, "new", "echo", "--listen", "tcp:8", "--", "cat", code=1)
    assert "after --" in ctl(conf, "new", "git", "--listen", "tcp:8", code=2)
    assert "not a name" in ctl(conf, "new", "../git", "--listen", "tcp:8", "--", "cat", code=2)
    assert "--usr" in ctl(conf, "new", "git", "--usr", "x", "--", "cat", code=2)
    assert "given 2 times" in ctl(conf, "new", "git", "--user", "a", "--user", "b", "--", "cat", code=2)
    assert "NAME=VALUE" in ctl(conf, "new", "git", "--environment", "a", "--", "cat", code=2)
    assert "names the directory" in ctl(conf / "conf.d" / "x.toml", "new", "git", "--", "cat", code=2)
    assert os.listdir(conf / "conf.d") == ["echo.toml"]


def test_where_it_is_written(superd: Superd) -> None:
    fresh = superd.dir / "fresh" / "er"
    ctl(fresh, "new", "a", "--listen", "unix:s", "--", "cat")
    ctl(fresh, "new", "b@", "--instances", "x,y", "--", "cat")
    ctl(fresh / "conf.d", "new", "c", "--", "cat")
    assert sorted(os.listdir(fresh / "conf.d")) == ["a.toml", "b@.toml", "c.toml"] and os.listdir(fresh) == ["conf.d"]
    assert "3 services" not in ctl(fresh, "check") and "ok: 4 services, 1 socket" in ctl(fresh, "check")
    found = json.loads(ctl(fresh, "new", "d", "--json", "--", "cat"))
    assert found == {"name": "d", "file": f"{fresh}/conf.d/d.toml"}
    schema = (fresh / "conf.d" / "d.toml").read_text().splitlines()[0].removeprefix("#:schema ")
    assert json.loads(Path(schema).read_text())["title"] == "A service of superd"


def test_a_handler_needs_no_program(conf: Path) -> None:
    ctl(conf, "new", "shout", "--listen", "tcp:7", "--handler", "shout:serve")
    assert tomli.loads((conf / "conf.d" / "shout.toml").read_text()) == {"listen": "tcp:7", "handler": "shout:serve"}


# -- enable and disable


def enabled(conf: Path, name: str) -> bool:
    return bool(tomli.loads(ctl(conf, "show", name))["enabled"])


def test_enable_and_disable(conf: Path) -> None:
    (conf / "conf.d" / "git.toml").write_text('enabled = false\ncommand = "/bin/cat"\n')
    drop_in = conf / "conf.d" / "git.toml.d" / "50-enabled.toml"
    assert ctl(conf, "enable", "git", "git") == f"git: enabled, wrote {drop_in}\n"
    assert (drop_in.stat().st_mode & 0o7777, os.listdir(drop_in.parent)) == (0o644, ["50-enabled.toml"])
    assert enabled(conf, "git")
    inode = drop_in.stat().st_ino
    assert ctl(conf, "enable", "git") == "git: already enabled\n" and drop_in.stat().st_ino == inode
    assert ctl(conf, "disable", "git") == f"git: disabled, wrote {drop_in}\n"
    assert ctl(conf, "disable", "git") == "git: already disabled\n" and not enabled(conf, "git")
    assert json.loads(ctl(conf, "enable", "git", "--json")) == [
        {"name": "git", "enabled": True, "changed": True, "file": str(drop_in)}
    ]
    assert ctl(conf, "-q", "disable", "git") == ""
    assert "did you mean 'git'?" in ctl(conf, "enable", "gti", code=4)


def test_what_cannot_be_enabled(conf: Path) -> None:
    (conf / "conf.d" / "a.toml").write_text('enabled = false\ncommand = "/nowhere/program"\n')
    (conf / "conf.d" / "b.toml").write_text('enabled = false\ncommand = "/bin/cat"\n')
    (conf / "conf.d" / "b.toml.d").mkdir(mode=0o755)
    (conf / "conf.d" / "b.toml.d" / "60.toml").write_text("\nenabled = false\n")
    (conf / "conf.d" / "c@.toml").write_text('instances = ["x"]\ncommand = "/bin/cat"\n')
    (conf / "conf.d" / "broken.toml").write_text("commnad = 5\n")
    assert "there is no program '/nowhere/program'" in ctl(conf, "enable", "a", code=78)
    assert f"{conf}/conf.d/b.toml.d/60.toml:2 has the last word" in ctl(conf, "enable", "b", code=1)
    assert "is an instance" in ctl(conf, "disable", "c@x", code=1)
    assert sorted(os.listdir(conf / "conf.d")) == ["a.toml", "b.toml", "b.toml.d", "broken.toml", "c@.toml"]
    assert os.listdir(conf / "conf.d" / "b.toml.d") == ["60.toml"]
    assert "wrote" in ctl(conf, "disable", "c@") and "wrote" in ctl(conf, "disable", "broken")


def test_a_running_superd_says_which_files(superd: Superd) -> None:
    superd.write("cat", toml(listen="tcp:127.0.0.1:0", command=["/bin/cat"]))
    superd.start()
    superd.call("List")
    done = subprocess.run(
        [sys.executable, "-I", "-m", "superd.cli.superctl", "-s", superd.control, "disable", "cat"],
        capture_output=True, text=True, timeout=TIMEOUT_S,
    )  # fmt: skip
    assert done.stdout == f"cat: disabled, wrote {superd.conf}/conf.d/cat.toml.d/50-enabled.toml\n", done.stderr


def test_a_running_superd_and_what_it_has_not_started(superd: Superd) -> None:
    """A template, a file with errors and a new one stand beside the others; a name that is in none of them is 4."""
    superd.write("cat", toml(listen="tcp:127.0.0.1:0", command=["/bin/cat"]))
    superd.write("worker@", toml(command=["/bin/cat"]))
    superd.write("wrong", "commnad = 5\n")
    superd.garbage_expected = True
    superd.start("--no-watch")
    superd.call("List")
    superd.write("fresh", toml(listen="tcp:127.0.0.1:0", command=["/bin/cat"]))

    def disable(name: str, code: int = 0) -> str:
        argv = [sys.executable, "-I", "-m", "superd.cli.superctl", "-s", superd.control, "disable", name]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
        assert done.returncode == code, done
        return done.stdout + done.stderr

    for name in ("worker@", "wrong", "fresh"):
        assert f"wrote {superd.conf}/conf.d/{name}.toml.d/" in disable(name)
    assert "there is no service 'nosuch'" in disable("nosuch", 4)


# -- files


def test_no_link_is_followed(conf: Path, superd: Superd) -> None:  # D2
    victim = superd.dir / "victim"
    victim.write_text("untouched")
    elsewhere = superd.room("elsewhere")
    (conf / "conf.d" / "a.toml").write_text('command = "/bin/cat"\n')
    (conf / "conf.d" / "a.toml.d").symlink_to(elsewhere)
    assert "it is a symbolic link" in ctl(conf, "disable", "a", code=1)
    assert os.listdir(elsewhere) == []
    (conf / "conf.d" / "a.toml.d").unlink()
    (conf / "conf.d" / "a.toml.d").mkdir(mode=0o755)
    (conf / "conf.d" / "a.toml.d" / "50-enabled.toml").symlink_to(victim)
    victim.write_text("enabled = true\n")
    ctl(conf, "disable", "a")
    assert victim.read_text() == "enabled = true\n"
    assert not (conf / "conf.d" / "a.toml.d" / "50-enabled.toml").is_symlink()
    (conf / "conf.d" / "b.toml").symlink_to(superd.dir / "nothing")
    assert "is there already" in ctl(conf, "new", "b", "--", "cat", code=1)
    assert not (superd.dir / "nothing").exists()


def test_root_writes_only_where_others_cannot(conf: Path, root: None) -> None:
    (conf / "conf.d").chmod(0o777)
    assert "not root's alone" in ctl(conf, "new", "a", "--", "cat", code=77)
    (conf / "conf.d").chmod(0o755)
    conf.chmod(0o777)
    assert "writable by everybody" in ctl(conf, "new", "a", "--", "cat", code=77)
    assert os.listdir(conf / "conf.d") == []


def test_a_file_that_is_there_stays(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    put_file(str(tmp_path / "d"), "x", b"1", replace=False)
    with pytest.raises(FileExistsError):
        put_file(str(tmp_path / "d"), "x", b"2", replace=False)
    assert (tmp_path / "d" / "x").read_bytes() == b"1"
    put_file(str(tmp_path / "d"), "x", b"3", replace=True)
    assert (tmp_path / "d" / "x").read_bytes() == b"3" and os.listdir(tmp_path / "d") == ["x"]
