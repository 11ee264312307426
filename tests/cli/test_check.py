"""`superctl check`: exit status, formats, and that it does nothing but read."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from superd.cli.check import main

GOOD = 'listen = ["tcp:7", "unix:s"]\ncommand = "/bin/cat"\n'
BAD = 'listen = "tcp:8"\ncommand = "/bin/cat"\ndescripton = "Git"\n'


@pytest.fixture
def conf(tmp_path: Path) -> Path:
    (tmp_path / "conf.d").mkdir(mode=0o755)
    (tmp_path / "conf.d" / "good.toml").write_text(GOOD)
    for path in (tmp_path, tmp_path / "conf.d"):
        path.chmod(0o755)
    (tmp_path / "conf.d" / "good.toml").chmod(0o644)
    return tmp_path


def test_clean(conf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(conf)]) == 0
    assert capsys.readouterr() == ("ok: 1 service, 2 sockets\n", "")
    assert main([str(conf), "--format", "json"]) == 0
    assert capsys.readouterr() == ("", "")


def test_errors(conf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (conf / "conf.d" / "git.toml").write_text(BAD)
    place = f"{conf}/conf.d/git.toml:3:1"
    assert main([str(conf)]) == 78
    full = capsys.readouterr().out
    assert full.startswith("error[unknown-key]: unknown key `descripton`\n") and full.endswith("1 error in 1 file\n")
    assert f" --> {place}\n" in full
    assert main([str(conf), "--format", "short"]) == 78
    assert capsys.readouterr().out == f"{place}: error: unknown key `descripton`: did you mean `description`?\n"
    assert main([str(conf), "--format", "json"]) == 78
    record = json.loads(capsys.readouterr().out)
    assert (record["code"], record["line"], record["service"]) == ("unknown-key", 3, "git")
    assert main([str(conf), "--format=github"]) == 78
    assert capsys.readouterr().out.startswith(f"::error file={conf}/conf.d/git.toml,line=3,col=1,")


def test_warnings_are_no_errors(conf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (conf / "conf.d" / "A b.toml").write_text("")
    assert main([str(conf)]) == 0
    assert "warning[bad-name]" in capsys.readouterr().out


def test_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--format", "xml"]) == 2
    assert main(["--help"]) == 0
    capsys.readouterr()


def test_default_path(conf: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("SUPERD_CONFIG", str(conf))
    status = main([])
    monkeypatch.undo()
    assert status == 0 and capsys.readouterr().out.startswith("ok: ")


def test_a_path_that_is_not_there(conf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(conf / "none")]) == 78
    assert "no such file or directory" in capsys.readouterr().out


def test_as_a_module_and_without_trio(conf: Path) -> None:
    code = "import sys; from superd.cli.check import main; status = main(sys.argv[1:])\n"
    code += "assert 'trio' not in sys.modules; sys.exit(status)"
    for command in (["-m", "superd.cli.check"], ["-c", code]):
        run = subprocess.run([sys.executable, *command, str(conf)], capture_output=True, text=True, timeout=60)
        assert (run.returncode, run.stdout, run.stderr) == (0, "ok: 1 service, 2 sockets\n", "")


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
def test_no_effect(conf: Path, tmp_path: Path) -> None:
    # K20
    (conf / "conf.d" / "git.toml").write_text(BAD + 'user = "root"\n' if os.geteuid() == 0 else BAD)
    log = tmp_path / "log"
    calls = "bind,connect,socket,execve,unlink,unlinkat,rename,mkdir,mkdirat,kill,fork,vfork,clone,chmod,fchmod,sendto"
    strace = ["strace", "-f", "-o", str(log), "-e", f"trace={calls}", sys.executable, "-m", "superd.cli.check"]
    run = subprocess.run([*strace, str(conf)], capture_output=True, text=True, timeout=60)
    if "ptrace" in run.stderr.lower() and "denied" in run.stderr.lower():
        pytest.skip("strace may not trace here")
    assert run.returncode == 78
    seen = [line.split(None, 1)[1].partition("(")[0] for line in log.read_text().splitlines() if "(" in line]
    assert seen == ["execve"]  # Python itself
