"""`superctl schema`: what an editor is told is what the loader does."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import tomli
from core.test_schema import ANY_KEY, CAT, TYPOS, VALUES, WRONG, toml
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft4Validator
from loading import load_all

from superd.cli import superctl
from superd.core import jsonschema
from superd.core.keys import BY_TABLE, KEYS, Key

ROOT = Path(__file__).resolve().parents[2]
SERVICE = Draft4Validator(jsonschema.service_schema())
DAEMON = Draft4Validator(jsonschema.daemon_schema())
EXAMPLES = sorted((ROOT / "conf.d").glob("*.toml"))

# What a schema cannot see, of what is wrong in core/test_schema.py, by what the loader says about it: other keys of
# the service, the machine, and what goes beyond a pattern.
UNSEEN = [
    "has no connections", "must say", "needs a socket", 'pass = "stdio" with run = ', "localhost is two",
    "needs a socket, and there is none", "collide", 'is the socket with pass = "stdio"', 'needs pass = "stdio"',
    'goes with pass = "listen-fds"', "is a key of run", "means nothing for tcp:7", '"udplite" goes with udp:',
    "cannot parse address 'tcp:79x'", "known only at run time", "is too small: stop_timeout is at least 1ms",
    "not a regular expression", "nobody can connect to udp:53", "is not a URL",
    "`start_pre` is a list of commands, and this is none", "there is no program", "has no `check`",
    "is above the hard limit", "'10.0.0.0/33' is not a network", "bits set below its mask", "there is no user 'nosuch'",
    "is not a day", "[access] cannot be kept", "come too late for datagrams", "there is no capability",
    "is not among `capabilities`", "they stand at 3 to 4", "is too small: every is at least 1ms",
    "`allow` is empty", "`proxy_protocol` means nothing", 'means nothing with run = "always-on"',
    "`proxy_protocol` needs", "`proxy_trusted` goes with", "tells nobody apart",
]  # fmt: skip


def says_no(text: str, schema: Draft4Validator = SERVICE) -> bool:
    return not schema.is_valid(tomli.loads(text))


@pytest.mark.parametrize("what", ["service", "superd"])
def test_the_files_are_what_is_printed(what: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert superctl.main(["schema", what]) == 0
    printed = capsys.readouterr().out
    assert (ROOT / "schema" / f"{what}.json").read_text() == printed, "run `make man`"
    Draft4Validator.check_schema(json.loads(printed))


def test_every_key_is_in_it_and_nothing_else() -> None:
    for table, keys in BY_TABLE.items():
        schema: dict[str, Any] = (DAEMON if table == "superd" else SERVICE).schema
        if table == "socket":
            schema = schema["properties"]["socket"]["items"]
        elif table == "keep_alive":
            schema = schema["properties"]["socket"]["items"]["properties"]["keep_alive"]["anyOf"][1]
        elif table == "tls":
            schema = schema["properties"]["socket"]["items"]["properties"]["tls"]
        elif table not in ("service", "superd"):
            schema = schema["properties"][table]
        assert set(schema["properties"]) == keys.keys(), table
        assert schema["additionalProperties"] is False


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples(path: Path) -> None:
    text = path.read_text()
    assert list(SERVICE.iter_errors(tomli.loads(text))) == []
    directive = re.match(r"#:schema (\S+)\n", text)
    assert directive and (path.parent / directive[1]).resolve() == ROOT / "schema" / "service.json"


@pytest.mark.parametrize(("text", "said"), WRONG)
def test_wrong(text: str, said: str) -> None:
    assert says_no(text) != any(words in said for words in UNSEEN), said


def test_superd_toml() -> None:
    assert not says_no('log = "json"\ncontrol = "off"\n[defaults.limits]\nrate = "5/1s"\n', DAEMON)
    for wrong in (
        'log = "xml"', 'control = "tcp:5"', 'user = "root"', 'log_levle = "info"', "stop_timeout = 5",
        '[defaults]\numask = "999"', "[defaults]\nusr = 5",
    ):  # fmt: skip
        _, problems = load_all({"superd.toml": wrong, "git.toml": 'command = "/bin/cat"\n'})
        assert says_no(wrong, DAEMON) and problems, wrong


@pytest.mark.parametrize("typo", TYPOS)
def test_every_unknown_key_is_seen(typo: str) -> None:
    assert says_no(f'command = "/bin/cat"\n{typo} = "www"\n')
    assert says_no(f'command = "/bin/cat"\n[limits]\n{typo} = "www"\n')


@pytest.mark.parametrize("key", KEYS, ids=lambda key: f"{key.table}.{key.name}")
def test_defaults_are_values(key: Key) -> None:
    if key.default is None or key.table in ("superd", "keep_alive", "tls") or key.default == []:
        return
    value: Any = {key.name: key.default}
    if key.table == "socket":
        value = {"socket": [{"listen": "tcp:7", **value}]}
    elif key.table != "service":
        value = {key.table: value}
    assert list(SERVICE.iter_errors(value)) == []


@settings(max_examples=500, deadline=None)
@given(st.dictionaries(ANY_KEY, VALUES, max_size=3))
def test_what_the_schema_rejects_the_loader_rejects(tree: dict[str, object]) -> None:
    text = "".join(f"{key} = {toml(value)}\n" for key, value in tree.items())
    if says_no(text):
        snapshot, _ = load_all({"git.toml": text, "git.toml.d/x.toml": CAT if "command" not in tree else ""})
        assert "git" in snapshot.broken


def test_taplo_reads_it(tmp_path: Path) -> None:
    """The program that most editors ask; it is no package of Debian, so this is not part of .ci/run."""
    taplo = shutil.which("taplo")
    if taplo is None:
        pytest.skip("taplo is not installed (npm install -g @taplo/cli)")
    wrong = tmp_path / "wrong.toml"
    wrong.write_text(f'#:schema {ROOT}/schema/service.json\nlisten = "tcp:7"\nusr = "www"\nstop_timeout = 5\n')
    for paths, good in ((EXAMPLES, True), ([wrong], False)):
        done = subprocess.run([taplo, "check", *paths], capture_output=True, text=True, timeout=60, cwd=tmp_path)
        assert (done.returncode == 0) == good, done.stderr
    assert "'usr' was unexpected" in done.stderr and "wrong.toml:4:16" in done.stderr
