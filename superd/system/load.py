"""How busy this machine is, as /proc tells; None where it does not."""

from __future__ import annotations


def load_average() -> float | None:
    """Of the last minute, proc_loadavg(5)."""
    try:
        with open("/proc/loadavg") as file:
            return float(file.read().split()[0])
    except (OSError, ValueError, IndexError):
        return None


def available_memory() -> int | None:
    """MemAvailable in bytes, proc_meminfo(5): what can be had without swapping."""
    try:
        with open("/proc/meminfo") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return None
