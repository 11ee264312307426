"""Fixtures for tests that run the real daemon; conftest.py loads this."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import Superd

SERVICES = Path(__file__).parent / "counterparts" / "services"

_daemons = pytest.StashKey[list[Superd]]()


@pytest.fixture
def superd(request: pytest.FixtureRequest) -> Iterator[Superd]:
    """A daemon not started yet: write its services, then `superd.start()`. It is stopped in order at the end."""
    with Superd() as daemon:
        request.node.stash[_daemons] = [daemon]
        yield daemon
        if request.node.stash.get(_failed, False):
            daemon.kill()  # the failure is known; a second one from stop() would only hide it
    del request.node.stash[_daemons]  # items live as long as the run


_failed = pytest.StashKey[bool]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[Any]) -> Any:
    report = yield
    if report.failed:
        item.stash[_failed] = True
        for daemon in item.stash.get(_daemons, []):
            report.sections.append(("superd log", daemon.log()))
    return report


@pytest.fixture(scope="session")
def workshop() -> Iterator[Path]:
    """A directory that every service user can read, for programs that tests build."""
    path = Path(tempfile.mkdtemp(prefix="superd-services-"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


@pytest.fixture
def script(workshop: Path) -> Callable[[str], str]:
    """Name of a file in counterparts/services -> path of a copy that a service user can read."""

    def copy(name: str) -> str:
        target = workshop / name
        if not target.exists():
            target.write_bytes((SERVICES / name).read_bytes())
            target.chmod(0o755)
        return str(target)

    return copy


@pytest.fixture
def build(workshop: Path, require: Callable[[str], str]) -> Callable[..., str]:
    """build("probe.c", "-lsystemd") -> path of the program, compiled once per run."""

    def compile_(name: str, *flags: str) -> str:
        target = workshop / name.removesuffix(".c")
        if not target.exists():
            command = [require("cc"), "-O1", "-Wall", "-Werror", "-o", str(target), str(SERVICES / name), *flags]
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            target.chmod(0o755)
        return str(target)

    return compile_


@pytest.fixture(scope="session")
def service_user() -> str:
    """Whom superd runs services as when nothing is said."""
    return "nobody" if os.geteuid() == 0 else pwd.getpwuid(os.geteuid()).pw_name


@pytest.fixture
def root() -> None:
    """Only with it."""
    if os.geteuid() != 0:
        pytest.skip("needs root")
