"""Another version of superd takes over: the one that is installed where this one came from.

    try it out -> take no more clients -> hand over what is on its way -> deposit -> end

The rest is the keeper's: it executes the new code, keeps its pid, its children and all that it holds, and starts a
manager, which finds everything as after the death of an earlier one. What cannot be handed over is what superd itself
serves: connections of built-in services end.
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import trio

from superd.core import messages

if TYPE_CHECKING:
    from superd.manager.supervisor import Supervisor

_TRIAL_S = 30.0
_HAND_OVER_S = 2.0  # a client that says nothing before its first_byte_timeout is let go then
_LAST_RECORDS_S = 1.0
_REASON_CHARS = 500


async def try_out() -> tuple[str, str]:
    """(version of the installed code, why it cannot take over); one of the two is empty."""
    argv = [sys.executable, "-I", "-m", "superd", "--check-upgrade", str(messages.GENERATION)]
    done = None
    try:
        with trio.move_on_after(_TRIAL_S):
            done = await trio.run_process(
                argv, capture_stdout=True, stderr=subprocess.STDOUT, check=False, stdin=subprocess.DEVNULL
            )
    except OSError as error:
        return "", f"cannot execute {sys.executable}: {(error.strerror or str(error)).lower()}"
    if done is None:
        return "", f"it does not come up within {_TRIAL_S:g} s"
    said = done.stdout.decode(errors="replace").strip()
    if done.returncode != 0 or not said:
        last = said.splitlines()[-1][:_REASON_CHARS] if said else "no reason given"
        return "", f"it does not come up: {last}"
    return said.splitlines()[-1], ""


async def hand_over(supervisor: Supervisor) -> None:
    """Returns only where that is not possible, because superd stops or has no memory for what it would leave."""
    services = supervisor.everything()
    for service in services:
        service.hold_clients()
    try:
        with trio.move_on_after(_HAND_OVER_S):
            while _is_under_way(supervisor):
                await supervisor.next_turn()
        supervisor.end_of_turn()
        supervisor.deposit()
        if not supervisor.stopping and not supervisor.snapshot_wanted:
            supervisor.log.flush()
            supervisor.log.sink.finish(_LAST_RECORDS_S)
            supervisor.keeper.finish("upgrade")
            os._exit(0)
    finally:
        if not supervisor.stopping:
            for service in services:
                service.release_clients()


def _is_under_way(supervisor: Supervisor) -> bool:
    """Whether a client that was accepted has no process yet."""
    if any(member.queue or member.pending for member in supervisor.spawners.by_id.values()):
        return True
    return any(service.has_guests() for service in supervisor.everything())
