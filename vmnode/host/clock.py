"""The clocks that matter, read together."""

from __future__ import annotations

import time
from pathlib import Path

from vmnode.conditions import Now

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")  # random(4)


def now() -> Now:
    return Now(time.time(), time.clock_gettime(time.CLOCK_BOOTTIME), _BOOT_ID.read_text(encoding="ascii").strip())


def started(pid: int) -> int:
    """When a process started, in clock ticks after the boot (proc_pid_stat(5)); with its id it names it for good.

    Raises ProcessLookupError.
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        raise ProcessLookupError(f"process {pid} is gone") from None
    return int(text.rpartition(")")[2].split()[19])  # the name, in parentheses, may hold anything
