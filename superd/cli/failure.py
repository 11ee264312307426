"""What ends superctl before its time, and its exit statuses. Apart, because every command is a module of its own."""

from __future__ import annotations

TYPE_CHECKING = False  # typing itself would cost each command time; type checkers know the name
if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable
    from typing import Any

OK, FAILED, USAGE, NOT_RUNNING, NO_SUCH_SERVICE = 0, 1, 2, 3, 4
UNREACHABLE, TIMED_OUT, NOT_PERMITTED, CONFIG = 69, 75, 77, 78


class Failure(Exception):
    """What ends superctl: `str()` is what to say after "superctl: "."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code


def running(options: argparse.Namespace, connect: Callable[[], Any]) -> tuple[Any, Failure | None]:
    """A connection to the superd that runs; or None, and why, where the files have to do: with -c, and when no superd
    can be reached and -s names none. Raises Failure."""
    if options.config is not None:
        return None, None
    try:
        return connect(), None
    except Failure as failure:
        if failure.code != UNREACHABLE or options.socket is not None:
            raise
        return None, failure
