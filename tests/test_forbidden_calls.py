"""What superd's code never does, whatever it is good for elsewhere: the `ast` of every file is walked."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from superd.core.keys import KEYS

SOURCES = sorted(path for path in (Path(__file__).parent.parent / "superd").rglob("*.py"))
# Where wall time is only shown, or compared with the times of files.
WALL_CLOCK = {
    "keeper.py": 1, "manager/builtins.py": 2, "manager/views.py": 1, "manager/logs.py": 1, "manager/metrics.py": 1,
    "system/usage.py": 1, "system/configdir.py": 1, "system/sockets.py": 1,
    "handler.py": 1, "spawner.py": 1, "manager/spawners.py": 1,  # when an import began, beside times of files
}  # fmt: skip


def trees() -> list[tuple[str, ast.Module]]:
    root = SOURCES[0].parent
    return [(str(path.relative_to(root)), ast.parse(path.read_text())) for path in SOURCES]


def words(tree: ast.AST) -> set[str]:
    """Names, attributes, keyword arguments and what is imported."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            found.add(node.id)
        elif isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.keyword) and node.arg:
            found.add(node.arg)
        elif isinstance(node, ast.alias):
            found.add(node.name)
    return found


@pytest.mark.parametrize(
    ("word", "allowed"),
    [
        ("preexec_fn", {"testing.py"}),  # F5: Python code between fork and exec of a process with threads
        ("_PR_SET_PDEATHSIG", set()), ("PR_SET_PDEATHSIG", set()),  # F4: follows the thread, not the process
        # F6 F16: threads for spawning, a cancellation that kills; a trial of another version is to be killed so.
        ("run_process", {"manager/upgrade.py"}), ("open_process", set()),
        ("pickle", set()), ("eval", set()), ("exec_module", set()),  # P1 J1
        ("marshal", {"manager/configuration.py"}),  # of what the manager itself left with the keeper
    ],
)  # fmt: skip
def test_nobody_calls(word: str, allowed: set[str]) -> None:  # F4 F5 F6 F16 P1
    assert {name for name, tree in trees() if word in words(tree)} <= allowed


def test_wall_time_is_for_people_and_files() -> None:  # M1 M2 M3
    """Every interval is monotonic: a jump of the clock changes what is shown, and nothing that is done.

    CLOCK_MONOTONIC stands still in suspend, so what is due comes late then, and never early.
    """
    found: dict[str, int] = {}
    for name, tree in trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                if (node.value.id, node.attr) in {("time", "time"), ("time", "time_ns"), ("datetime", "now")}:
                    found[name] = found.get(name, 0) + 1
    assert {name: count for name, count in found.items() if count > WALL_CLOCK.get(name, 0)} == {}


def test_no_pidfile_and_no_ban() -> None:  # D11 B9
    """superd reads no pidfile, so that nobody can plant one; no key bans an address because of what came from it."""
    names = {key.name for key in KEYS}
    assert not [name for name in names if re_words(name) & {"pidfile", "pid_file", "ban", "sensor", "fail2ban"}]
    assert not [name for name, tree in trees() if {"pidfile", "pid_file"} & words(tree) and "importers" not in name]


def re_words(name: str) -> set[str]:
    return {name, *name.split("_"), *name.split(".")}
