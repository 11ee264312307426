"""The faults that run in seconds, one test a row; `make faults` runs all, for as long as the plan says."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace

import pytest
from conftest import missing
from faults.rows import FAKETIME, ROWS
from faults.trial import Trial

SHORT = [name for name, row in ROWS.items() if row.short]


@pytest.mark.quiet
@pytest.mark.parametrize("name", SHORT)
def test_fault(name: str, require: Callable[[str], str], root: None) -> None:
    """A test shares its machine with others: what is measured in `make faults` has room here."""
    row = ROWS[name]
    require("strace")
    if name in ("X12",) and not os.path.exists(FAKETIME):
        missing("libfaketime is not installed")
    if name in ("X29",):
        require("unshare")
    allowed = replace(row.allowed, slow_s=2.0, slow_inside_s=None, superctl=False)
    with Trial(allowed, settle_s=0.2) as trial:
        figures = row.work(trial, False)
    assert "failed" not in figures, figures
