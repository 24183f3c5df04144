"""The system log, for what is started by others and has no log of its own."""

from __future__ import annotations

import syslog


def write(program: str, line: str) -> None:
    """One line of warning (syslog(3)): `journalctl -t PROGRAM`. Says nothing where there is no log."""
    syslog.openlog(program, syslog.LOG_PID, syslog.LOG_DAEMON)
    syslog.syslog(syslog.LOG_WARNING, " ".join(line.split()))
