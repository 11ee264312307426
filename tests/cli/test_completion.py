"""Completion: the scripts of `superctl completion`, run by the shells themselves."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from shutil import which

import pytest
from harness import TIMEOUT_S, Superd, toml

from superd.cli import superctl

# What bash sets before it calls a completion function (bash(1), Programmable Completion); a word ends at @, too.
DRIVER = r"""
source "$1"; shift
compopt() { :; }
for line in "$@"; do
    COMP_LINE=$line COMP_POINT=${#line}
    read -ra COMP_WORDS <<<"${line//@/ @ }"
    [[ $line == *[[:space:]@] ]] && COMP_WORDS+=("")
    COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
    _superctl superctl
    echo "${COMPREPLY[*]}"
done
"""


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a script for each shell, and superctl."""
    found = tmp_path_factory.mktemp("completion")
    for shell in ("bash", "zsh", "fish"):
        argv = [sys.executable, "-I", "-m", "superd.cli.superctl", "completion", shell]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=TIMEOUT_S)
        assert (done.returncode, done.stderr) == (0, "")
        (found / shell).write_text(done.stdout)
    (found / "superctl").write_text(f'#!/bin/sh\nexec {sys.executable} -I -m superd.cli.superctl "$@"\n')
    (found / "superctl").chmod(0o755)
    return found


@pytest.fixture(scope="module")
def environment(scripts: Path) -> Iterator[dict[str, str]]:
    with Superd() as superd:
        for name in ("cat", "worker@one", "worker@two"):
            base, at, _ = name.partition("@")
            instances = {"instances": ["one", "two"]} if at else {}
            superd.write(f"{base}{at}", toml(listen="unix:@superd-test-${name}", command="/bin/cat", **instances))
        superd.start()
        yield {**os.environ, "PATH": f"{scripts}:{os.environ['PATH']}", "SUPERD_SOCKET": superd.control}


def test_bash(scripts: Path, environment: dict[str, str], require: Callable[[str], str]) -> None:
    cases = {
        "superctl sta": "status start",
        "superctl --json sta": "status start",
        "superctl status ": "cat worker@one worker@two",
        "superctl stop ca": "cat",
        "superctl stop worker@t": "two",
        "superctl wait --for st": "stopped",
        "superctl wait --for ready c": "cat",
        "superctl logs --f": "--follow",
        "superctl kill -s TER": "TERM",
        "superctl kill -s TERM c": "cat",
        "superctl completion z": "zsh",
        "superctl help is-r": "is-ready",
        "superctl check /etc/passw": "/etc/passwd",
        "superctl --socket /etc/passw": "/etc/passwd",
        "superctl top ": "",
        "superctl logs -n ": "",
    }
    argv = [require("bash"), "-c", DRIVER, "driver", str(scripts / "bash"), *cases]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, env=environment)
    assert done.stderr == ""
    answers = done.stdout.splitlines()
    # /etc/passwd- is there on some machines.
    found = {line: answer.replace("/etc/passwd-", "").strip() for line, answer in zip(cases, answers, strict=True)}
    assert found == cases


def test_without_superd_it_is_quiet(scripts: Path, environment: dict[str, str], require: Callable[[str], str]) -> None:
    argv = [require("bash"), "-c", DRIVER, "driver", str(scripts / "bash"), "superctl stop "]
    nowhere = {**environment, "SUPERD_SOCKET": "/nonexistent/sock"}
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, env=nowhere)
    assert (done.stdout, done.stderr) == ("\n", "")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_syntax(scripts: Path, shell: str) -> None:
    if which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    done = subprocess.run([shell, "-n", str(scripts / shell)], capture_output=True, text=True, timeout=TIMEOUT_S)
    assert (done.returncode, done.stderr) == (0, "")


def test_fish(scripts: Path, environment: dict[str, str]) -> None:
    if which("fish") is None:
        pytest.skip("fish is not installed")

    def complete(line: str) -> list[str]:
        argv = ["fish", "--no-config", "-c", f'source {scripts}/fish; complete -C "{line}"']
        done = subprocess.run(argv, capture_output=True, text=True, timeout=60, env=environment, cwd=scripts)
        return [row.partition("\t")[0] for row in done.stdout.splitlines()]

    assert complete("superctl sta") == ["start", "status"]
    assert complete("superctl status w") == ["worker@one", "worker@two"]


def test_every_command_is_there(scripts: Path) -> None:
    for shell in ("bash", "zsh", "fish"):
        text = (scripts / shell).read_text()
        for name in superctl.COMMANDS:
            assert name in text, (shell, name)
