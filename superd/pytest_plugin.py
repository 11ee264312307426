"""The fixture `superd` for tests of programs that superd starts: see superd.testing.

Loaded by every pytest of an environment that has superd, so it imports nothing but pytest until a test asks for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from superd.testing import Daemon

_DAEMON = pytest.StashKey["Daemon"]()


@pytest.fixture
def superd(request: pytest.FixtureRequest) -> Iterator[Daemon]:
    """A superd of this test alone: `superd.run(address, command, **keys)`, or `superd.start(conf_dir)`.

    When the test is over everything it has started is gone; if the test fails, its log is in the report.
    """
    from superd.testing import Daemon

    with Daemon() as daemon:
        request.node.stash[_DAEMON] = daemon
        yield daemon


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Any:
    report = yield
    daemon = item.stash.get(_DAEMON, None)
    if daemon is not None and report.failed:
        report.sections.append(("superd log", daemon.log()))
    return report
