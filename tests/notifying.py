"""Services for tests that say something to their notify socket, and a gate to hold them at."""

from __future__ import annotations

import os

from harness import PYTHON, Superd, toml

_SEND = """
import array, os, select, signal, socket, sys, time
def notify(*messages, fds=()):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.connect(os.environ["NOTIFY_SOCKET"])
        for message in messages:
            if fds: socket.send_fds(sock, [message], fds)
            else: sock.send(message)
def say(text):
    os.write(2, (text + "\\n").encode())
def gate(path):
    with open(path) as file: file.read()
"""


def service(superd: Superd, code: str, name: str = "s", **keys: object) -> None:
    """A service that runs `code`, in which notify(*messages, fds=[]), say(text) and gate(path) are defined."""
    keys = {"run": "always-on", "ready": "notify", "command": [PYTHON, "-I", "-c", _SEND + code], **keys}
    superd.write(name, toml(**keys))


def shell(superd: Superd, script: str, **keys: object) -> None:
    keys = {"run": "always-on", "ready": "notify", "command": ["/bin/sh", "-c", script], **keys}
    superd.write("s", toml(**keys))


class Gate:
    """A FIFO that holds whoever opens it for reading, until `open`."""

    def __init__(self, superd: Superd, name: str = "gate") -> None:
        self.path = superd.dir / name
        os.mkfifo(self.path)
        self.path.chmod(0o644)

    def __str__(self) -> str:
        return str(self.path)

    def __repr__(self) -> str:
        return repr(str(self.path))

    def __fspath__(self) -> str:
        return str(self.path)

    def open(self) -> None:
        self.path.write_text("go")


def details(superd: Superd, name: str = "s") -> dict[str, object]:
    found: dict[str, object] = superd.call("Status", names=[name])["services"][0]
    return found
