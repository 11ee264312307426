"""What ends superctl before its time, and its exit statuses. Apart, because every command is a module of its own."""

from __future__ import annotations

OK, FAILED, USAGE, NOT_RUNNING, NO_SUCH_SERVICE = 0, 1, 2, 3, 4
UNREACHABLE, TIMED_OUT, NOT_PERMITTED, CONFIG = 69, 75, 77, 78


class Failure(Exception):
    """What ends superctl: `str()` is what to say after "superctl: "."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code
