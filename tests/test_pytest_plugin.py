"""The fixture that superd brings for other people's tests, in a pytest of its own."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path

import pytest

pytest_plugins = ["pytester"]


def run(pytester: pytest.Pytester, text: str, *arguments: str) -> pytest.RunResult:
    pytester.makepyfile(text)
    installed = entry_points(group="pytest11", name="superd")  # not so where only the source is in the path
    plugin = () if installed else ("-p", "superd.pytest_plugin")
    return pytester.runpytest_subprocess(*plugin, "-p", "no:cacheprovider", *arguments)


def test_ten_lines(pytester: pytest.Pytester) -> None:
    result = run(pytester, """
        import sys
        assert "superd.testing" not in sys.modules

        def test_upper(superd):
            upper = superd.run("tcp:127.0.0.1:0", ["/usr/bin/tr", "a-z", "A-Z"])
            assert upper.ask(b"hello") == b"HELLO"
            (process,) = upper.exits(1)
            assert process.status == 0 and process.stderr == "" and process.duration_s < 20

        def test_several(superd):
            one = superd.run("tcp:127.0.0.1:0", "/bin/cat", limits={"max_connections": 1})
            two = superd.run("unix:@superd-plugin-test", ["/bin/sh", "-c", "echo oops >&2; exit 3"], name="two")
            assert one.ask(b"x") == b"x" and two.ask(b"") == b""
            assert [(p.status, p.stderr) for p in two.exits(1)] == [(3, "oops\\n")]
            two.wait_ready()
    """)  # fmt: skip
    result.assert_outcomes(passed=2)


def test_the_example_of_the_readme(pytester: pytest.Pytester, require: Callable[[str], str]) -> None:
    """As it stands there."""
    require("busybox")
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    (example,) = [text for text in re.findall(r"(?ms)^```python\n(.*?)^```", readme) if "(superd)" in text]
    assert len(example.splitlines()) == 10
    run(pytester, example).assert_outcomes(passed=1)


def test_a_wrong_service_is_said_at_once(pytester: pytest.Pytester) -> None:
    result = run(pytester, """
        def test_first(superd):
            superd.run("tcp:127.0.0.1:0", "/bin/cat", max_connections=3)

        def test_second(superd):
            one = superd.run("tcp:127.0.0.1:0", "/bin/cat")
            superd.run(one.address, "/bin/cat")
    """, "--durations=0", "--durations-min=0")  # fmt: skip
    result.assert_outcomes(failed=2)
    result.stdout.fnmatch_lines(["*`max_connections` is a key of *limits*"])
    result.stdout.fnmatch_lines(["*address already in use by*"])
    durations_s = [float(text) for text in re.findall(r"([\d.]+)s call ", result.stdout.str())]  # without pytest's own
    assert len(durations_s) == 2 and max(durations_s) < 15


def test_a_failure_shows_the_log_and_leaves_nothing(pytester: pytest.Pytester) -> None:
    result = run(pytester, """
        def test_it(superd):
            service = superd.run("tcp:127.0.0.1:0", ["/bin/sh", "-c", "echo I was here >&2; exec sleep 1000"])
            client = service.connect()
            superd.wait_records(1, event="output")
            (record,) = superd.records(event="start")
            open("pid", "w").write(str(record["pid"]))
            client.close()
            assert service.ask(b"x", timeout=0.1) == b"y"
    """)  # fmt: skip
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*superd log*", "*I was here*"])
    assert not Path(f"/proc/{(pytester.path / 'pid').read_text()}").exists()


def test_conf_dir(pytester: pytest.Pytester) -> None:
    conf = pytester.mkdir("conf.d")
    conf.chmod(0o755)
    (conf / "env.toml").write_text(
        'listen = "tcp:127.0.0.1:0"\ncommand = ["/bin/sh", "-c", "echo $COLOUR"]\npass_environment = ["COLOUR"]\n'
    )
    result = run(pytester, f"""
        def test_it(superd):
            superd.start({str(conf)!r}, env={{"COLOUR": "red", "PATH": "/usr/bin:/bin"}})
            assert superd.service("env").ask(b"") == b"red\\n"
    """)  # fmt: skip
    result.assert_outcomes(passed=1)


def test_a_crash(pytester: pytest.Pytester, build: Callable[..., str]) -> None:
    program = build("crash.c")
    result = run(pytester, f"""
        def test_it(superd):
            crash = superd.run("tcp:127.0.0.1:0", [{program!r}])
            assert crash.ask(b"") == b""
            (process,) = crash.exits(1)
            assert process.signal == "SEGV" and process.status is None and process.stderr == "about to crash\\n"
    """)  # fmt: skip
    result.assert_outcomes(passed=1)


def test_git_daemon(pytester: pytest.Pytester, require: Callable[[str], str]) -> None:
    require("git")
    result = run(pytester, """
        import subprocess

        def test_clone(superd, tmp_path):
            superd.directory.joinpath("x.git").mkdir()
            repo = superd.directory / "x.git"
            subprocess.run(["git", "init", "-q", "--bare", str(repo)], check=True)
            git = superd.run("tcp:127.0.0.1:0", ["git", "daemon", "--inetd", "--export-all",
                                                 f"--base-path={superd.directory}"], user="root")
            url = f"git://{git.address.removeprefix('tcp:')}/x.git"
            subprocess.run(["git", "clone", "-q", url, str(tmp_path / "y")], check=True)
            assert git.exits(1)[0].status == 0
    """ if os.geteuid() == 0 else "def test_clone(): pass")  # fmt: skip
    result.assert_outcomes(passed=1)


def test_busybox(pytester: pytest.Pytester) -> None:
    if shutil.which("busybox") is None:
        pytest.skip("busybox is not installed")
    result = run(pytester, """
        def test_it(superd):
            web = superd.run("tcp:127.0.0.1:0", ["busybox", "httpd", "-i", "-h", str(superd.directory)])
            (superd.directory / "index.html").write_text("here")
            assert web.ask(b"GET /index.html HTTP/1.0\\r\\n\\r\\n").endswith(b"here")
    """)  # fmt: skip
    result.assert_outcomes(passed=1)
