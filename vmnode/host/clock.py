"""The clocks that matter, read together."""

from __future__ import annotations

import time
from pathlib import Path

from vmnode.conditions import Now

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")  # random(4)


def now() -> Now:
    return Now(time.time(), time.clock_gettime(time.CLOCK_BOOTTIME), _BOOT_ID.read_text(encoding="ascii").strip())
