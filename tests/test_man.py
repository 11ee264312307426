"""The manual pages are clean, and say what the code does: no key, option or variable more, none less."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from superd.cli import importing, manual, superctl
from superd.core import keys, plan
from superd.core.key_texts import HEADINGS, TEXTS
from superd.core.lifecycle import State
from superd.core.spec import Output

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted((ROOT / "man").iterdir())
TOML5 = (ROOT / "man" / "superd.toml.5").read_text()
SUPERD8 = (ROOT / "man" / "superd.8").read_text()
SUPERCTL1 = (ROOT / "man" / "superctl.1").read_text()

# Heading of superd.toml(5) -> table of core/keys.py, of those in which there is something.
TABLES = {heading: table for table, (heading, _) in HEADINGS.items()}
# These stand in superd.toml(5) under a heading of their own, not in a list.
HEADED = {"socket", "limits", "access", "rlimit", "scheduling", "cgroup", "sandbox", "health", "proxy", "defaults"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_mandoc_has_nothing_to_say(page: Path, require: Callable[[str], str]) -> None:
    lint = subprocess.run([require("mandoc"), "-T", "lint", str(page)], capture_output=True, text=True)
    # Which other pages are installed is this machine's business; containers have none.
    said = [line for line in lint.stdout.splitlines() if "referenced manual not found" not in line]
    assert said == []


def test_the_key_sections_are_those_of_the_table() -> None:
    assert manual.rewritten(TOML5) == TOML5, "run `make man` and look at what it has changed"


@pytest.mark.parametrize("table", TEXTS)
def test_every_key_has_its_text_once(table: str) -> None:
    named = [name for names, _ in TEXTS[table] for name in names.split()]
    assert len(named) == len(set(named)) and set(named) <= set(keys.BY_TABLE[table])
    left = keys.BY_TABLE[table].keys() - set(named) - HEADED
    assert left == set(), "write what they mean into superd/core/key_texts.py"


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("One. Two of `rate`.", ["One.", "Two of", ".Ic rate ."]),
        ('"a b", (`x.y`) and tcp(7).', [".Li \\(dqa b\\(dq ,", ".Pq Li x.y", "and", ".Xr tcp 7 ."]),
        ("`[[socket]]`; `LD_*` `SO_MARK` `/dev/log`", [".Ic [[socket]] ;", ".Ev LD_*", ".Dv SO_MARK", ".Pa /dev/log"]),
        ("'x' \\", ["\\&'x' \\e"]),
        ("", []),
        (
            'A.\n* "b": C.\n* "d": E.\nF.',
            [
                "A.",
                ".Bl -tag -width Ds",
                ".It Li \\(dqb\\(dq",
                "C.",
                ".It Li \\(dqd\\(dq",
                "E.",
                ".El",
                ".Pp",
                "F.",
            ],
        ),
    ],
)
def test_markup(text: str, lines: list[str]) -> None:
    assert manual.mdoc(text) == lines


def unescape(text: str) -> str:
    return text.replace("\\(dq", '"').replace("\\&", "")


def items(page: str) -> dict[str, dict[str, tuple[str | None, str]]]:
    """Heading -> key -> (default as written, text of its item).

    An item's line is `.It Ic NAME No = DEFAULT , Ic NAME , NAME …`.
    """
    found: dict[str, dict[str, tuple[str | None, str]]] = {}
    for heading, body in re.findall(r"^\.Ss (.*?)\n(.*?)(?=^\.S[sh] |\Z)", page, re.M | re.S):
        for line, text in re.findall(r"^\.It (Ic .*?)\n(.*?)(?=^\.It |^\.El|\Z)", body, re.M | re.S):
            for part in unescape(line).split(" , "):
                name, _, default = part.removeprefix("Ic ").partition(" No = ")
                assert name not in found.setdefault(heading, {}), f"{name} twice under {heading!r}"
                found[heading][name] = (default or None, unescape(text))
    return found


DOCUMENTED = items(TOML5)


def test_headings() -> None:
    assert set(DOCUMENTED) == set(TABLES)


@pytest.mark.parametrize("heading", TABLES)
def test_every_key_that_exists_is_documented_and_no_other(heading: str) -> None:
    assert sorted(DOCUMENTED[heading]) == sorted(keys.BY_TABLE[TABLES[heading]].keys() - HEADED)


def test_whole_tables() -> None:
    """Tables have a heading exactly if there is something in them."""
    for name, key in {**keys.BY_TABLE["service"], **keys.BY_TABLE["superd"]}.items():
        if key.kind in ("table", "tables"):
            assert re.search(rf"^\.Ss The \[+{name}\]+ table", TOML5, re.M), name


@pytest.mark.parametrize("heading", TABLES)
def test_defaults_and_choices(heading: str) -> None:
    for name, (default, text) in DOCUMENTED[heading].items():
        key = keys.BY_TABLE[TABLES[heading]][name]
        if default is None:
            assert key.default in (None, {}) or name == "listen", f"{name} has a default that is not said"
        elif key.default is None:
            assert default == '"off"' and key.off, f"{name} has no default {default}"
        else:
            assert default == json.dumps(key.default), name
        for word in key.choices:
            assert f'"{word}"' in text, f'{name} = "{word}"'


def test_keep_alive() -> None:
    text = DOCUMENTED["The [[socket]] tables"]["keep_alive"][1]
    assert re.findall(r"^\.Ic (\w+)", text, re.M) == list(keys.BY_TABLE["keep_alive"])


def test_variables_of_services() -> None:
    """Every variable that plan.py can set, and so a reader can find it."""
    program = plan.Program(
        service="s@i", executable="/x", argv=("/x",), base_environment={}, environment={}, stdio=False,
        stdout=Output(), stderr=Output(), names=("a",), addresses=("tcp:127.0.0.1:7",),
        fd_protocols=tuple(keys.BY_TABLE["service"]["fd_protocols"].choices),
    )  # fmt: skip
    unix = replace(program, addresses=("unix:/x",))
    every_fact = dict.fromkeys(
        ("remote", "remote_port", "local", "local_port", "number", "uid", "gid", "pid", "path"), "1"
    )
    variables = {*plan.listen_environment(program, 1, 1), *plan.listen_environment(unix, 1, 1)}
    for family in ("tcp", "unix", "vsock"):
        variables |= set(plan.connection_environment(family, every_fact))
    variables |= {"SUPERD_SERVICE", "SUPERD_CONNECTION", "INVOCATION_ID", "NOTIFY_SOCKET"}
    documented = set(re.findall(r"\b[A-Z][A-Z_0-9]{3,}\b", SUPERD8))
    assert sorted(variables - documented) == []


def test_options_of_superd() -> None:
    """What --help lists is what the page lists."""
    before, run, after = re.split(r"^\.Ss One service without a file|^\.Ss In a container", SUPERD8, flags=re.M)
    for words, text in (((), before + after), (("run",), run + ".It Fl h , Fl -help")):
        command = [sys.executable, "-I", "-m", "superd", *words, "--help"]
        told = subprocess.run(command, capture_output=True, text=True, check=True)
        options = set(re.findall(r"(?<=^  )--?[a-z][a-z-]*|(?<=^  -h, )--help", told.stdout, re.M))
        listed = re.findall(r"^\.It Fl (\S+)(?: , Fl (\S+))?", text, re.M)
        assert options - {"-h"} == {f"-{name}" for names in listed for name in names if name} - {"-h"}


def test_commands_of_superctl() -> None:
    listed = re.findall(r"^\.It Cm (\S+)", SUPERCTL1, re.M)
    assert sorted(listed) == sorted([*superctl.COMMANDS, *(row[0] for row in superctl._OFFLINE)])


@pytest.mark.parametrize("command", superctl.COMMANDS)
def test_options_of_a_command(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """What its --help lists is what the page lists, for the command or for all."""
    with pytest.raises(SystemExit):
        superctl.run([command, "--help"])
    options = set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", capsys.readouterr().out.partition("\noptions:")[2]))
    lines = re.findall(rf"^\.It (?:Cm {command}(?![\w-])|Fl ).*", SUPERCTL1, re.M)
    listed = {f"-{flag}" for line in lines for flag in re.findall(r"(?:Fl |\| (?=-))(-?[a-z][a-z-]*)", line)}
    assert options | {"--version"} == listed


@pytest.mark.parametrize("command", ["import", "export"])
def test_options_of_import_and_export(command: str) -> None:
    parser = importing.import_parser() if command == "import" else importing.export_parser()
    options = {flag for action in parser._actions for flag in action.option_strings} - {
        "-h",
        "--help",
        "-c",
        "--config",
    }
    line = re.findall(rf"^\.It Cm {command}\b.*", SUPERCTL1, re.M)[0]
    assert options == {f"-{flag}" for flag in re.findall(r"(?<=Fl )-?[a-z]+|(?<=\| )-[a-z]+", line)}


def test_states_of_services() -> None:
    states = SUPERCTL1.partition(".Ss States\n")[2].partition("\n.Ss ")[0]
    assert sorted(re.findall(r"^\.It Li (.*)", states, re.M)) == sorted(state.value for state in State)


def test_exit_statuses_of_superctl() -> None:
    told = subprocess.run([sys.executable, "-I", "-m", "superd.cli.superctl", "--help"], capture_output=True, text=True)
    text = " ".join(told.stdout.partition("Exit status: ")[2].split())
    listed = SUPERCTL1.partition(".Sh EXIT STATUS\n")[2].partition("\n.Sh ")[0]
    assert re.findall(r"\b\d+\b", text) == re.findall(r"^\.It (\d+)", listed, re.M)
