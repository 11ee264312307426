"""superd.core.schema.Loader: what it gives after a change is what a loader gives that has never seen anything else."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loading import FakeMachine

from superd.core.machine import Remembered
from superd.core.schema import Loader, SourceFile
from superd.core.spec import Snapshot

CAT = 'command = "/bin/cat"\nuser = "root"\n'
TEXTS = (
    f'listen = "tcp:7"\n{CAT}',
    f'listen = "tcp:7"\n{CAT}description = "another"\n',
    f'listen = "tcp:8"\n{CAT}',
    f'listen = "tcp:7"\n{CAT}enabled = false\n',
    f'listen = "tcp:7"\n{CAT}requires = ["a"]\n',
    f'listen = "tcp:9"\n{CAT}conflicts = ["b"]\n',
    'listen = "tcp:7"\n',
    "[[[",
)
DAEMON = SourceFile("superd.toml", b'[defaults]\numask = "0077"\n', "daemon", "superd")


def source(name: str, text: str) -> SourceFile:
    return SourceFile(f"conf.d/{name}.toml", text.encode(), "service", name)


def loader() -> Loader:
    return Loader({}, is_root=True)


def load(one: Loader, files: list[SourceFile]) -> tuple[Snapshot, list[str]]:
    snapshot, problems = one.load(files, Remembered(FakeMachine()), look_again=False)
    return snapshot, list(map(str, problems))


steps = st.lists(st.dictionaries(st.sampled_from("abc"), st.sampled_from(TEXTS), min_size=1), min_size=2, max_size=6)


@settings(max_examples=100)
@given(steps=steps)
def test_after_each_change_it_is_as_if_loaded_anew(steps: list[dict[str, str]]) -> None:
    one = loader()
    known: dict[SourceFile, SourceFile] = {}
    for texts in steps:
        # As the scanner does it: a file that is the same is the same object.
        files = [DAEMON, *(known.setdefault(new, new) for new in (source(*item) for item in sorted(texts.items())))]
        assert load(one, files) == load(loader(), files)


@pytest.mark.parametrize("concerns_others", [False, True])
def test_a_change_that_concerns_no_other_is_loaded_alone(concerns_others: bool) -> None:
    files = [source(f"s{number}", TEXTS[0].replace("tcp:7", f"tcp:{number + 1}")) for number in range(50)]
    one = loader()
    before, _ = load(one, files)
    units = dict(one._units)
    text = files[7].data.decode() + ('requires = ["s8"]\n' if concerns_others else 'description = "new"\n')
    after, problems = load(one, [*files[:7], source("s7", text), *files[8:]])
    assert not problems and list(after.services) == list(before.services)
    assert {name for name in after.services if after.services[name] is not before.services[name]} == {"s7"}
    assert {path for path in units if one._units[path] is not units[path]} == {"conf.d/s7.toml"}
    assert (one._last is None) is concerns_others  # whether the next one can be
