"""Inject every fault of the plan into a superd under load, and print what came of it.

    python tests/faults/run.py [--short] [--soak SECONDS] [--beside] [ROW...]

Root, strace, unshare and libfaketime are needed. Exit status 1 when a row misses its line.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
import traceback
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS), str(TESTS.parent)]

from faults.rows import ROWS, Row, soak  # noqa: E402
from faults.trial import Allowed, Figures, Trial  # noqa: E402


def run(row: Row, full: bool) -> Figures:
    """Its figures; what stopped it is a failure, the others go on."""
    with Trial(row.allowed) as trial:
        try:
            return row.work(trial, full)
        except (AssertionError, OSError, LookupError, ValueError) as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            return {"failed": [f"{type(error).__name__} at {Path(where.filename).name}:{where.lineno}: {error}"[:600]]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--short", action="store_true", help="short faults, as in `make test`")
    parser.add_argument("--soak", type=float, default=0.0, metavar="SECONDS", help="row X28, that long")
    parser.add_argument("--beside", action="store_true", help="instead: five figures beside xinetd and openbsd-inetd")
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"of {', '.join(ROWS)}; default all")
    arguments = parser.parse_args()
    chosen = [ROWS[name] for name in arguments.rows] if arguments.rows else list(ROWS.values())
    if arguments.soak:
        work = lambda trial, full: soak(trial, arguments.soak)  # noqa: E731
        chosen = [*(chosen if arguments.rows else []), Row("X28", "soak", work, Allowed(), False)]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # daemons are ended on the way out
    if arguments.beside:
        from faults.beside import run_beside

        return run_beside()
    failed = 0
    print(f"{'row':4} {'passed':6} {'s':>5}  fault and figures", flush=True)
    for row in chosen:
        began = time.monotonic()
        figures = run(row, not arguments.short)
        problems = figures.pop("failed", [])
        failed += bool(problems)
        text = ", ".join(f"{name} {value}" for name, value in figures.items())
        print(f"{row.name:4} {'no' if problems else 'yes':6} {time.monotonic() - began:5.1f}  {row.title}: {text}")
        for problem in problems:
            print(f"{'':18}  {problem}")
        sys.stdout.flush()
    print(f"{len(chosen) - failed} of {len(chosen)} passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
