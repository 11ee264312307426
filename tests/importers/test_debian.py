"""What Debian's packages ship for inetd, xinetd and systemd: each is imported, and superd takes the result.

.ci/run unpacks the packages below $INTEROP_PKGS/imported; elsewhere these tests are skipped.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import tomli
from conftest import missing
from harness import Superd, ask, fetch
from importers.material import Anywhere, check

from superd.cli.importing import RealFiles
from superd.importers import Imported, import_files

PACKAGES = Path(os.environ.get("INTEROP_PKGS") or Path(tempfile.gettempdir()) / "superd-interop-pkgs") / "imported"
# A line for update-inetd in a script; the shell's \t stands for a tab there.
_BLANK = r"(?:\\t|[ \t])+"
LINE = re.compile(
    rf"[\"'](?:#<off># )?([\w-]+{_BLANK}(?:stream|dgram){_BLANK}\w+{_BLANK}(?:no)?wait{_BLANK}[^\"'\n]+)[\"']"
)


def inetd_lines() -> list[tuple[str, str]]:
    """(package, line of inetd.conf)."""
    found = []
    for script in sorted(PACKAGES.glob("*/DEBIAN/postinst")):
        for match in LINE.finditer(script.read_text(errors="replace")):
            found.append((script.parts[-3], match[1].replace("\\t", "\t")))
    return found


SOCKETS = sorted(PACKAGES.glob("*/lib/systemd/system/*.socket"))
XINETD = sorted(PACKAGES.glob("*/etc/xinetd.d/*"))
LINES = inetd_lines()


def test_there_is_enough() -> None:
    if not PACKAGES.is_dir():
        missing(f"{PACKAGES} is not there: .ci/run makes it")
    assert len(SOCKETS) + len(XINETD) + len(LINES) >= 25, (len(SOCKETS), len(XINETD), len(LINES))
    assert min(len(SOCKETS), len(XINETD), len(LINES)) >= 5


def bring(path: Path | str, text: str) -> tuple[list[Imported], list[str]]:
    services, notes, failures = import_files([(str(path), text)], RealFiles(), Anywhere())
    assert failures == []
    _, problems = check({one.name: one.text for one in services})
    assert [problem for problem in problems if problem.is_error] == []
    return services, [str(note) for note in notes]


@pytest.mark.parametrize("path", SOCKETS, ids=lambda path: path.name)
def test_socket_units(path: Path) -> None:
    services, notes = bring(path, path.read_text())
    (one,) = services
    table = tomli.loads(one.text)
    addresses = [table["listen"]] if isinstance(table.get("listen"), str) else table.get("listen", [])
    addresses += [socket["listen"] for socket in table.get("socket", [])]
    written = re.findall(r"^Listen\w+=(.+)", path.read_text(), re.M)
    assert len(addresses) == len(written), (addresses, written)
    # Whatever a unit protects its service with is carried over or said.
    unit = Path(re.sub(r"@?\.socket$", ".service", str(path)))
    if unit.exists():
        for key in re.findall(r"^((?:Protect|Private|Restrict|SystemCall)\w+)=", unit.read_text(), re.M):
            assert key in "".join(notes) or "sandbox" in one.text, key


@pytest.mark.parametrize("path", XINETD, ids=lambda path: f"{path.parts[-4]}-{path.name}")
def test_xinetd_files(path: Path) -> None:
    services, notes = bring(path, path.read_text())
    text = path.read_text()
    count = len(re.findall(r"^service\b", text, re.M))
    # xinetd's own lists of services, and what answers forged addresses with more than they sent.
    without = {"servers": 1, "services": 1, "chargen": 1, "chargen-udp": 1}.get(path.name, 0)
    assert (len(services), len([note for note in notes if "(internal)" in note])) == (count - without, without), notes


@pytest.mark.parametrize(("package", "line"), LINES, ids=[f"{package}-{line.split()[0]}" for package, line in LINES])
def test_lines_for_inetd(package: str, line: str) -> None:
    services, _ = bring("/etc/inetd.conf", line + "\n")
    (one,) = services
    table = tomli.loads(one.text)
    words = line.split()
    assert table["listen"] == f"{words[2]}:{words[0]}"
    assert table["user"] == words[4] or words[4].startswith(f"{table['user']}")
    assert table.get("run", "per-connection") == ("on-demand" if words[3].startswith("wait") else "per-connection")


# -- two of the programs, run by superd


def program(superd: Superd, package: str, path: str) -> str:
    """A copy in a directory that superd trusts."""
    source = PACKAGES / package / path.lstrip("/")
    if not source.exists():
        missing(f"{source} is not there: .ci/run makes it")
    target = superd.dir / source.name
    shutil.copyfile(source, target)
    target.chmod(0o755)
    return str(target)


def run(superd: Superd, path: str, text: str, **others: Any) -> None:
    services, _, failures = import_files([(path, text)], RealFiles(), Anywhere())
    assert failures == []
    for one in services:
        superd.write(one.name, one.text)
    superd.start()


@pytest.mark.usefixtures("root")
def test_nullidentd_by_its_line(superd: Superd) -> None:
    """ident, RFC 1413: every question gets an answer."""
    path = program(superd, "nullidentd", "/usr/sbin/nullidentd")
    (line,) = [line for package, line in LINES if package == "nullidentd"]
    run(superd, "/etc/inetd.conf", line.replace("/usr/sbin/nullidentd", path).replace("ident", "127.0.0.1:0", 1))
    with superd.connect("nullidentd") as client:
        assert b"USERID" in ask(client, b"6193, 23\r\n")


@pytest.mark.usefixtures("root")
def test_micro_httpd_by_its_units(superd: Superd) -> None:
    path = program(superd, "micro-httpd", "/usr/sbin/micro-httpd")
    web = superd.room("web")
    (web / "hello.txt").write_text("hello from micro-httpd")
    for unit in (PACKAGES / "micro-httpd" / "lib/systemd/system").iterdir():
        text = unit.read_text().replace("/usr/sbin/micro-httpd", path).replace("/var/www/html", str(web))
        (superd.dir / unit.name).write_text(text.replace("0.0.0.0:80", "127.0.0.1:0"))
    socket = superd.dir / "micro-httpd.socket"
    run(superd, str(socket), socket.read_text())
    with superd.connect("micro-httpd") as client:
        client.sendall(b"GET /hello.txt HTTP/1.0\r\n\r\n")
        assert fetch(client).endswith(b"hello from micro-httpd")
