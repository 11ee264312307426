"""Run a function in a forked child: for what a process does to itself and cannot undo."""

from __future__ import annotations

import json
import os
import traceback
from collections.abc import Callable
from typing import Any


class ChildFailed(AssertionError):
    """The function raised in the child; the text is its traceback."""


def in_child(function: Callable[[], Any], *, report_fd: int | None = None) -> Any:
    """What `function()` returns in a forked child, by way of JSON. report_fd: the number of the fd that carries it."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(reader)
            if report_fd is not None:
                os.dup2(writer, report_fd)
                writer = report_fd
            try:
                text = json.dumps([True, function()])
            except BaseException:
                text = json.dumps([False, traceback.format_exc()])
            os.write(writer, text.encode())
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader, "rb") as file:
        text_read = file.read()
    _, status = os.waitpid(pid, 0)
    if not text_read:
        raise ChildFailed(f"the child said nothing and ended with wait status {status}")
    good, value = json.loads(text_read)
    if not good:
        raise ChildFailed(value)
    return value
