"""manager/environment.py: environment files and whose a service's paths are."""

from __future__ import annotations

import os
import pwd
from pathlib import Path

import pytest

from superd.core.spec import Context, ServiceSpec
from superd.manager.environment import read_file, trusted_uid


def service(**context: object) -> ServiceSpec:
    return ServiceSpec("web", "web.toml", ("/x",), "always-on", "stdio", context=Context(**context))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", {}),
        ("A=1\nB=2", {"A": "1", "B": "2"}),
        ("# comment\n; another\n\n   \nA=1\n", {"A": "1"}),
        ("  A = 1  \r\nB=2\r\n", {"A": "1", "B": "2"}),
        ('A="x y"\nB=\'x y\'\nE=""\nC="x', {"A": "x y", "B": "x y", "E": "", "C": '"x'}),  # one that nobody closes
        ("A=one \\\ntwo\nB=\\a\\", {"A": "one two", "B": "a"}),
        ("A=\"one \\\ntwo\nthree\"\nB='\\\n'", {"A": "one two\nthree", "B": "\\\n"}),
        ('A="\\$HOME \\" \\n"b\nB="a" c', {"A": '$HOME " \\nb', "B": "ac"}),
        ("A=a=b # no comment", {"A": "a=b # no comment"}),
        ("A=1\nA=2", {"A": "2"}),
        ("_X9=1", {"_X9": "1"}),
        ("A=x\x0cy\x0bz\x85\u2028w", {"A": "x\x0cy\x0bz\x85\u2028w"}),  # a line ends at a newline and nowhere else
    ],
)
def test_files(tmp_path: Path, text: str, found: dict[str, str]) -> None:
    path = tmp_path / "env"
    path.write_bytes(text.encode())
    assert read_file(str(path)) == found


def test_bytes_that_are_no_text_survive(tmp_path: Path) -> None:
    (tmp_path / "env").write_bytes(b"A=\xff\xfe\n")
    assert os.fsencode(read_file(str(tmp_path / "env"))["A"]) == b"\xff\xfe"


@pytest.mark.parametrize("line", ["A", "=1", "A B=1", "export A=1", "A-B=1", "A=\0", "\xc3=1", "A.B=1", "1A=2", "É=1"])
def test_a_line_that_is_wrong_is_named(tmp_path: Path, line: str) -> None:  # E15
    path = tmp_path / "env"
    path.write_bytes(b"GOOD=1\n" + line.encode())
    with pytest.raises(ValueError, match=":2: "):
        read_file(str(path))


@pytest.mark.parametrize("name", ["LISTEN_FDS", "LISTEN_PID", "NOTIFY_SOCKET", "WATCHDOG_USEC"])
def test_superds_own_words_are_refused(tmp_path: Path, name: str) -> None:  # E13, O2
    path = tmp_path / "env"
    path.write_text(f"{name}=1\n")
    with pytest.raises(ValueError, match=f":1: {name}"):
        read_file(str(path))


def test_what_is_too_large(tmp_path: Path) -> None:
    path = tmp_path / "env"
    path.write_text("A=1\n" + "#" * (1 << 20))
    with pytest.raises(ValueError, match="1 MiB"):
        read_file(str(path))
    with pytest.raises(ValueError, match="1 MiB"):
        read_file("/dev/zero")


@pytest.mark.parametrize("kind", ["missing", "directory", "fifo"])
def test_what_is_no_file(tmp_path: Path, kind: str) -> None:
    """Never waits, leaks nothing (the fixture looks)."""
    path = tmp_path / "env"
    if kind == "directory":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
        assert read_file(str(path)) == {}
        return
    with pytest.raises(OSError):
        read_file(str(path))


@pytest.mark.parametrize(
    ("user", "uid"),
    [
        (None, os.geteuid()), (4711, 4711), (0, 0), ("nobody", pwd.getpwnam("nobody").pw_uid),
        ("no such user", os.geteuid()),
    ],
)  # fmt: skip
def test_trusted_uid(user: str | int | None, uid: int) -> None:
    assert trusted_uid(service(user=user)) == uid
