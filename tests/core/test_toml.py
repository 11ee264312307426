"""superd.core.toml: what tomli reads back is what was written."""

from __future__ import annotations

from typing import Any

import tomli
from hypothesis import given
from hypothesis import strategies as st

from superd.core.toml import format_comment, format_document, format_key, format_pair, format_value

TEXT = st.text(st.characters(codec="utf-8"))
SCALARS = st.one_of(TEXT, st.booleans(), st.integers(-(2**63), 2**63 - 1), st.floats(allow_nan=False))
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=3))


@given(TEXT, VALUES)
def test_a_pair_comes_back(key: str, value: Any) -> None:
    assert tomli.loads(format_pair(key, value)) == {key: value}
    assert tomli.loads(f"{format_key(key)} = {format_value(value)}") == {key: value}


@given(st.dictionaries(TEXT, VALUES, max_size=5), st.lists(st.text()))
def test_a_document_comes_back(table: dict[str, Any], header: list[str]) -> None:
    assert tomli.loads(format_document(table, header=header)) == table


@given(st.text())
def test_a_comment_is_nothing_else(text: str) -> None:
    assert tomli.loads(format_comment(text).encode(errors="replace").decode()) == {}


def test_how_it_looks() -> None:
    table = {
        "socket": [{"listen": "tcp:7"}, {"listen": "udp:7", "keep_alive": {"idle": "1m"}}],
        "command": ["/bin/sh", "-c", "x" * 90],
        "limits": {"rate": "5/1s"},
        "enabled": True,
    }
    assert format_document(table, header=["From\nthere."]) == (
        "# From\n# there.\n\n"
        f'command = [\n    "/bin/sh",\n    "-c",\n    "{"x" * 90}",\n]\nenabled = true\n\n'
        '[[socket]]\nlisten = "tcp:7"\n\n[[socket]]\nlisten = "udp:7"\nkeep_alive = { idle = "1m" }\n\n'
        '[limits]\nrate = "5/1s"\n'
    )
