"""`superctl explain`: every word that superd says can be asked for, and who has a port or path."""

from __future__ import annotations

import ast
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tomli
from core.test_schema import BOTH, CAT
from harness import TIMEOUT_S, Superd, toml
from loading import load_all

from superd.cli import superctl
from superd.core import explanations, key_texts
from superd.core.keys import KEYS, Key
from superd.core.lifecycle import State

ROOT = Path(__file__).resolve().parents[2]


def explain(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> str:
    assert superctl.main(["explain", *words]) == code
    out = capsys.readouterr()
    return out.out + out.err


def rows(capsys: pytest.CaptureFixture[str], *words: str) -> list[dict[str, Any]]:
    return json.loads(explain(capsys, "--json", *words))  # type: ignore[no-any-return]


@pytest.fixture(autouse=True)
def no_superd(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SUPERD_SOCKET", str(tmp_path / "nothing.sock"))
    monkeypatch.setenv("SUPERD_CONFIG", str(tmp_path / "nothing"))


# -- words


@pytest.mark.parametrize("key", KEYS, ids=lambda key: f"{key.table}.{key.name}")
def test_every_key(key: Key, capsys: pytest.CaptureFixture[str]) -> None:
    name = key.name if key.table == "service" else f"{key.table}.{key.name}"
    (row,) = [row for row in rows(capsys, name) if row.get("table") == key.table]
    assert row["name"] == name and key.sentence in row["text"] and row["takes"] and row["change"]
    for word in key.choices:
        assert f'"{word}"' in row["takes"]


@pytest.mark.parametrize(
    "key",
    [k for k in KEYS if not k.kind.startswith("table")],
    ids=lambda key: f"{key.table}.{key.name}",
)
def test_the_example_of_a_key_is_a_right_value(key: Key) -> None:
    line = f"{key.name} = {key_texts.example_of(key)}\n"
    tomli.loads(line)
    schemes = {"udp": "udp:7", "unix": "unix:/run/x"}
    listen = next((schemes[s] for s in schemes if key.modes and s in key.modes and "tcp" not in key.modes), "tcp:7")
    text = {
        "service": line + (CAT if key.name != "command" else ""),
        "socket": f'{CAT}[[socket]]\nlisten = "{listen}"\n' + (line if key.name != "listen" else ""),
        "keep_alive": f'{CAT}[[socket]]\nlisten = "tcp:7"\n[socket.keep_alive]\n{line}',
        "tls": f'{CAT}[[socket]]\nlisten = "tcp:7"\n[socket.tls]\n{line}',
        "limits": f"{BOTH}[limits]\n{line}",
        "access": f"{BOTH}[access]\n{line}",
        "superd": "",
    }.get(key.table, f'{CAT}run = "always-on"\n[{key.table}]\n{line}')
    files = {"superd.toml": line} if key.table == "superd" else {"git.toml": text}
    _, problems = load_all(files)
    # Whether it fits the rest of the service is another matter.
    assert not [p for p in problems if p.code in ("bad-value", "bad-type", "unknown-key", "syntax")], (text, problems)


def test_every_state(capsys: pytest.CaptureFixture[str]) -> None:
    for state in State:
        assert any(row["what"] == "state" for row in rows(capsys, state.value))
    assert "superctl check" in explain(capsys, "bad", "config") == explain(capsys, "bad-config")


def codes_in(text: str) -> set[str]:
    """The first or second argument of whatever makes a problem."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in ("wrong", "problem", "_problem", "_fail", "Problem", "WrongError", "Fault"):
                place = slice(3, 4) if name == "Fault" else slice(0, 2)
                words = [a.value for a in node.args[place] if isinstance(a, ast.Constant) and isinstance(a.value, str)]
                found |= {word for word in words if re.fullmatch(r"[a-z]+(-[a-z]+)*", word)}
    return found


def test_every_code_of_a_problem(capsys: pytest.CaptureFixture[str]) -> None:
    """Those that stand in the code as words; three are put together."""
    used = {"unknown-user", "unknown-group", "encoding"}
    for directory in ("core", "system", "cli"):
        for path in (ROOT / "superd" / directory).glob("*.py"):
            used |= codes_in(path.read_text())
    assert used == set(explanations.PROBLEMS)
    for code in used:
        assert f"{code} (error)" in explain(capsys, code)
    assert explain(capsys, "error[unknown-key]") == explain(capsys, "unknown-key")


def test_every_exit_status(capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "man" / "superctl.1").read_text().partition(".Sh EXIT STATUS")[2].partition(".Sh ")[0]
    assert set(map(int, re.findall(r"^\.It (\d+)", page, re.M))) <= set(explanations.EXIT_STATUSES)
    for status, text in explanations.EXIT_STATUSES.items():
        assert text in " ".join(explain(capsys, str(status)).split())


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("stop-timeout", "did you mean `stop_timeout`?"),
        ("umsk", "did you mean `umask`?"),
        ("autorestart", "did you mean `restart`?"),
        ("unknown-kye", "did you mean `unknown-key`?"),
        ("zzzzzzz", "--list shows them"),
        ("tcp:79x", "cannot parse address 'tcp:79x': a port is 0-65535"),
        ("", "--list"),
    ],
)
def test_other_words(word: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert said in explain(capsys, word, code=2)


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    found = explain(capsys, "--list")
    assert len(found.splitlines()) == len(KEYS) + sum(
        map(len, (explanations.STATES, explanations.PROBLEMS, explanations.EXIT_STATUSES))
    )
    names = {line[13:].partition(" ")[0] for line in found.splitlines() if line.startswith("key ")}
    assert names == {key.name if key.table == "service" else f"{key.table}.{key.name}" for key in KEYS}
    explain(capsys, code=2)
    explain(capsys, "--list", "rate", code=2)


def test_one_name_in_two_tables(capsys: pytest.CaptureFixture[str]) -> None:
    assert [row["name"] for row in rows(capsys, "user")] == ["user", "socket.user"]
    assert [row["name"] for row in rows(capsys, "limits.rate")] == ["limits.rate"]
    assert {row["what"] for row in rows(capsys, "ready")} == {"key", "state"}


def test_the_daemon_does_not_load_the_texts() -> None:
    modules = ["superd.manager.main", "superd.keeper", "superd.spawner"]
    code = f"import sys, {', '.join(modules)}; print([m for m in sys.modules if m.startswith('superd.')])"
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True)
    loaded = set(ast.literal_eval(done.stdout))
    assert not loaded & {f"superd.core.{name}" for name in ("key_texts", "explanations", "jsonschema", "effective")}


# -- ports and paths


def test_who_has_a_port(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        (tmp_path / "echo.toml").write_text(
            f'# mine\ncommand = "/bin/cat"\nlisten = ["unix:{tmp_path}/s", "tcp:{port}"]\n'
        )
        (tmp_path / "echo.toml").chmod(0o644)
        (tmp_path / "other.toml").write_text('command = "/bin/cat"\n')
        tmp_path.chmod(0o755)
        arguments = ["-c", str(tmp_path / "echo.toml")]
        (row,) = [row for row in rows(capsys, *arguments, str(port)) if row["name"] == f"tcp:{port}"]
    assert row["services"] == [
        {"name": "echo", "listen": f"tcp:{port}", "place": f"{tmp_path}/echo.toml:3"},
    ]
    assert row["pid"] == os.getpid() and f"It is held by pid {os.getpid()} (" in row["text"]
    assert "At the moment nobody holds it." in explain(capsys, *arguments, f"tcp:127.0.0.1:{port}")
    assert "echo.toml:3" in explain(capsys, *arguments, f"{tmp_path}/s")
    assert "Nobody that can be seen" in explain(capsys, *arguments, f"udp:{port}")


def test_who_has_a_path(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket(socket.AF_UNIX) as taken:
        taken.bind(str(tmp_path / "s"))
        taken.listen()
        assert f"pid {os.getpid()} (" in explain(capsys, str(tmp_path / "s"))
        assert f"pid {os.getpid()} (" in explain(capsys, f"unix:{tmp_path}/s")
    assert "is a directory, not a socket" in " ".join(explain(capsys, str(tmp_path)).split())
    assert "There is nothing at" in explain(capsys, str(tmp_path / "none"))


def test_who_has_a_port_of_a_running_superd(superd: Superd) -> None:
    """Also one that the kernel chose, which stands in no file."""
    superd.write("cat", toml(listen="tcp:127.0.0.1:0", command=["/bin/cat"]))
    superd.start()
    port = superd.address("cat")[1]
    superd.call("List")
    done = subprocess.run(
        [sys.executable, "-I", "-m", "superd.cli.superctl", "-s", superd.control, "explain", str(port)],
        capture_output=True, text=True, timeout=TIMEOUT_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    text = " ".join(done.stdout.split())
    assert f"It belongs to service 'cat': {superd.conf}/conf.d/cat.toml" in text
    assert re.search(r"It is held by pid \d+ \(superd-(keeper|manager)\) \(superd\)", text)
