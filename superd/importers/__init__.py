"""Files of other superservers and supervisors -> service files of superd, and service files -> systemd units.

    draft.py        a service in the making, and notes of what is not carried over
    inetd.py, xinetd.py, systemd.py (syntax: unitfile.py), upstart.py, supervisord.py
    export.py       the way back, to systemd

Each importer takes text and gives Drafts. Other files that a file names (includes, drop-ins, the service of a socket
unit) are read through Files; users and ports are asked of a Machine.
"""

from __future__ import annotations

import posixpath
from collections.abc import Sequence

from superd.core.machine import Machine
from superd.importers import inetd, supervisord, systemd, upstart, xinetd
from superd.importers.draft import Draft, Files, FormatError, Imported, Job, Note, finish

FORMATS = (
    "inetd", "inetd-openbsd", "inetd-freebsd", "inetd-netbsd", "inetd-gnu", "xinetd", "systemd",
    "supervisord", "upstart",
)  # fmt: skip

__all__ = ["FORMATS", "Files", "FormatError", "Imported", "Note", "detect", "import_files"]


def import_files(
    sources: Sequence[tuple[str, str]], files: Files, machine: Machine, format: str | None = None
) -> tuple[list[Imported], list[Note], list[str]]:
    """(services, what to know about them, files that could not be understood) of (path, text) pairs.

    format: one of FORMATS for all of them; None: each by its name and content.
    """
    job = Job(files, machine)
    drafts: list[Draft] = []
    failures: list[str] = []
    units = []
    for path, text in sources:
        kind = format or detect(path, text)
        if kind is None:
            known = ", ".join(FORMATS)
            failures.append(f"{path}: error: cannot tell its format; --format says it: {known}")
        elif "\0" in text:
            failures.append(f"{path}:{text[: text.index(chr(0))].count(chr(10)) + 1}: error: it contains a NUL")
        elif kind == "systemd":
            units.append((path, text))
        else:
            try:
                drafts += _read(kind, path, text, job)
            except FormatError as error:
                failures.append(str(error))
    try:
        drafts += systemd.read(units, job) if units else []
    except FormatError as error:
        failures.append(str(error))
    imported = finish(drafts)
    notes = [*job.notes, *(note for one in imported for note in one.notes)]
    order = {path: number for number, (path, _) in enumerate(sources)}
    ordered = sorted(dict.fromkeys(notes), key=lambda note: (order.get(note.place.path, -1), note.place))
    return imported, ordered, failures


def _read(kind: str, path: str, text: str, job: Job) -> list[Draft]:
    if kind == "xinetd":
        return xinetd.read(path, text, job)
    if kind == "supervisord":
        return supervisord.read(path, text, job)
    if kind == "upstart":
        return upstart.read(path, text, job)
    dialects: dict[str, inetd.Dialect] = {f"inetd-{name}": name for name in ("openbsd", "freebsd", "netbsd", "gnu")}
    return inetd.read(path, text, job, dialects.get(kind))


def detect(path: str, text: str) -> str | None:
    """The format of a file; None if nothing tells."""
    name = posixpath.basename(path)
    if systemd.looks_like(name, text) and not supervisord.looks_like(text):
        return "systemd"
    for kind, looks_like in (
        ("supervisord", supervisord.looks_like), ("xinetd", xinetd.looks_like), ("upstart", upstart.looks_like),
        ("inetd", inetd.looks_like),
    ):  # fmt: skip
        if looks_like(text):
            return kind
    parent = posixpath.basename(posixpath.dirname(path))
    by_name = {"inetd.conf": "inetd", "xinetd.conf": "xinetd", "supervisord.conf": "supervisord"}
    if name in by_name or parent in ("inetd.d", "xinetd.d"):
        return by_name.get(name, parent.removesuffix(".d"))
    if name.endswith((".socket", ".service")):
        return "systemd"
    return "upstart" if parent == "init" and name.endswith(".conf") else None
