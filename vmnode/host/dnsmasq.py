"""The dnsmasq of a virtual network."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Optional

import psutil


@dataclass(frozen=True)
class Dnsmasq:
    pid: int
    stopped: bool  # by SIGSTOP or a debugger


def find(pid_file: Path) -> Optional[Dnsmasq]:
    """The living dnsmasq that `pid_file` names; None if there is none.

    libvirt starts it as two processes with one command line; the one in the pid file answers the guests.
    """
    try:
        process = psutil.Process(int(pid_file.read_text(encoding="ascii")))
        status = process.status()
        if process.name() != "dnsmasq" or status == psutil.STATUS_ZOMBIE:
            return None
        return Dnsmasq(process.pid, status in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP))
    except (OSError, ValueError, psutil.Error):
        return None
