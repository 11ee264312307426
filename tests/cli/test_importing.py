"""`superctl import` and `superctl export`: files in, files out, exit statuses."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import tomli

from superd.cli import superctl

LINE = "127.0.0.1:7 stream tcp nowait root /bin/cat cat -u\n"


def call(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    try:
        status = superctl.main([str(argument) for argument in arguments])
    except SystemExit as end:
        status = int(end.code or 0)
    done = capsys.readouterr()
    return status, done.out, done.err


@pytest.fixture
def conf(tmp_path: Path) -> Path:
    path = tmp_path / "inetd.conf"
    path.write_text(LINE)
    return path


def test_one_service_goes_to_stdout(conf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = call(capsys, "import", conf)
    assert (status, err) == (0, "")
    assert tomli.loads(out)["command"] == ["/bin/cat", "-u"]
    assert out.startswith(f"# From {conf}:1.\n\n")


def test_several_services_are_parted(conf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    conf.write_text(LINE + LINE.replace("127.0.0.1:7", "/run/x.sock").replace("tcp", "unix") + "nonsense here\n")
    status, out, err = call(capsys, "import", conf)
    assert status == 0
    head, *parts = out.split("# --- ")
    assert [part.split("\n")[0] for part in parts] == ["cat.toml", "x.toml"]
    assert all(tomli.loads("# " + part) for part in parts)
    # What belongs to no service stands above all of them.
    said = "not carried over: a line has service, type, protocol, wait, user, program, arguments; this has 2"
    assert head == f"# {conf}:3: {said}\n"
    assert f"{conf}:3: warning: {said}\n" in err


def test_directory(conf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "conf.d"
    status, text, err = call(capsys, "import", conf, "-o", out)
    assert (status, text) == (0, "")
    assert f"wrote {out}/cat.toml" in err
    assert os.listdir(out) == ["cat.toml"]
    # Nothing is overwritten, and nothing is written beside it.
    (out / "cat.toml").write_text("mine")
    conf.write_text(LINE + LINE.replace("127.0.0.1:7", "/run/x.sock").replace("tcp", "unix"))
    status, _, err = call(capsys, "import", conf, "-o", out)
    assert status == 1
    assert f"{out}/cat.toml" in err
    assert "x.toml" not in err
    assert (os.listdir(out), (out / "cat.toml").read_text()) == (["cat.toml"], "mine")


def test_strict(conf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(capsys, "import", "--strict", conf)[0] == 0
    conf.write_text(LINE + "x/1 dgram rpc/udp wait root /bin/cat cat\n")
    assert call(capsys, "import", conf)[0] == 0
    assert call(capsys, "import", "--strict", conf)[0] == 1


def test_what_cannot_be_read(conf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = call(capsys, "import", tmp_path / "missing", conf)
    assert status == 1
    assert f"superctl: cannot read {tmp_path}/missing: no such file or directory\n" in err
    assert "command" in out  # the other one is there
    (tmp_path / "prose").write_text("Dear Sir or Madam\n")
    status, _, err = call(capsys, "import", tmp_path / "prose")
    assert status == 1
    assert f"{tmp_path}/prose: error: cannot tell its format; --format says it: inetd, " in err
    (tmp_path / "x.service").write_text("[Service]\nnonsense\n")
    status, _, err = call(capsys, "import", tmp_path / "x.service")
    assert (status, err.split(": error")[0]) == (1, f"{tmp_path}/x.service:2")
    assert call(capsys, "import")[0] == 2
    assert call(capsys, "import", "--format", "launchd", conf)[0] == 2


def test_format_is_forced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x"
    path.write_text("80 stream tcp nowait root /bin/cat cat\n")
    assert tomli.loads(call(capsys, "import", path)[1])["listen"] == "tcp:80"
    assert tomli.loads(call(capsys, "import", "--format", "inetd-freebsd", path)[1])["listen"] == "tcp4:80"


def test_what_check_will_say(conf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    conf.write_text("80 stream tcp nowait nosuchuser /nowhere/x x\n")
    status, _, err = call(capsys, "import", conf)
    assert status == 0
    assert "`superctl check` will say on this machine:\n" in err
    assert "there is no program '/nowhere/x'" in err
    assert "there is no user 'nosuchuser'" in err


@pytest.mark.parametrize(
    ("name", "text", "kind"),
    [
        ("x", "service a\n{\n}\n", "xinetd"), ("x", "defaults\n{\n}\nincludedir /etc/xinetd.d\n", "xinetd"),
        ("x", "[Socket]\nListenStream=7\n", "systemd"), ("x.socket", "", "systemd"),
        ("x.conf", "[program:a]\ncommand=/x\n", "supervisord"), ("supervisord.conf", "", "supervisord"),
        ("x.conf", "start on socket PROTO=inet PORT=1\nexec /x\n", "upstart"), ("x", LINE, "inetd"),
        ("inetd.conf", "# nothing\n", "inetd"), ("x", "a on bind = 1 ;\n", "inetd"), ("x", "hello\n", None),
    ],
)  # fmt: skip
def test_detection(name: str, text: str, kind: str | None) -> None:
    from superd.importers import detect

    assert detect(f"/old/{name}", text) == kind


# -- export


@pytest.fixture
def service(tmp_path: Path) -> Path:
    path = tmp_path / "conf.d"
    path.mkdir()
    (path / "cat.toml").write_text(
        f'listen = "tcp:7007"\ncommand = "/bin/cat"\nuser = {os.geteuid()}\n[limits]\nrate = "5/1s"\n'
    )
    return path


def test_export_of_what_only_root_may(service: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whoever exports it, systemd will be root."""
    (service / "web.toml").write_text(
        'listen = "tcp:80"\ncommand = "/bin/cat"\nuser = "nobody"\n[sandbox]\nprivate_tmp = true\n'
    )
    status, out, err = call(capsys, "-c", service, "export", "systemd", "web")
    assert (status, err) == (0, "") and "User=nobody\n" in out and "PrivateTmp=" in out


def test_export(service: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = call(capsys, "-c", service, "export", "systemd", "cat")
    assert status == 0
    parts = out.split("# --- ")[1:]
    assert [part.split("\n")[0] for part in parts] == ["cat.socket", "cat@.service"]
    assert "ListenStream=7007\n" in parts[0]
    lost = ["limits.rate"]
    if os.geteuid() != 0:
        lost.append("no user: it runs as superd's own; without User= systemd runs it as root")
    assert err == "".join(f"{service}/cat.toml: warning: not carried over: {what}\n" for what in lost)
    assert call(capsys, "export", "-c", service, "--strict", "systemd", "cat")[0] == 1
    assert call(capsys, "export", "-c", service, "systemd", "cat", "-o", tmp_path / "units")[0] == 0
    assert sorted(os.listdir(tmp_path / "units")) == ["cat.socket", "cat@.service"]
    assert call(capsys, "export", "-c", service, "systemd", "cat", "-o", tmp_path / "units")[0] == 1


def test_export_of_what_is_not_there(service: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = call(capsys, "-c", service, "export", "systemd", "dog")
    assert (status, err) == (4, f"superctl: there is no service 'dog' in {service}\n")
    (service / "cat.toml").write_text("command = 3\n")
    status, _, err = call(capsys, "-c", service, "export", "systemd", "cat")
    assert (status, "cat.toml:1:11: error" in err) == (78, True)


def test_superctl_does_not_pay_for_it() -> None:
    """Importers are imported by the two commands alone, and trio by none."""
    code = (
        "import sys; from superd.cli import superctl\n"
        "assert not [name for name in sys.modules if name.startswith('superd.importers')]\n"
        "superctl.main(['import', '--help'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code + "assert 'trio' not in sys.modules"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
