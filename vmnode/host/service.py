"""The service manager's side of the daemon: sd_notify(3) and the log."""

from __future__ import annotations

import logging
import os
import sys

from systemd.daemon import notify as sd_notify


def notify(state: str) -> None:
    """Tell the service manager, in one line; does nothing where there is none."""
    # It has to be UTF-8 without a NUL, and what a condition says holds names that others gave.
    sd_notify("".join(c if c.isprintable() else "?" for c in state))


def watchdog_s() -> float:
    """The watchdog's time in seconds, 0 without one (sd_watchdog_enabled(3))."""
    if os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return 0.0
    return int(os.environ.get("WATCHDOG_USEC", "0")) / 1e6


class _PriorityFormatter(logging.Formatter):
    """Prefixes each line with its syslog level, which the journal strips (sd-daemon(3))."""

    _LEVELS = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3, logging.CRITICAL: 2}

    def format(self, record: logging.LogRecord) -> str:
        line = super().format(record).replace("\n", "\\n")
        return f"<{self._LEVELS.get(record.levelno, 6)}>{line}"


def set_up_log(level: int) -> None:
    """To the journal when run by systemd, to stderr otherwise."""
    handler = logging.StreamHandler(sys.stderr)
    if "JOURNAL_STREAM" in os.environ:
        handler.setFormatter(_PriorityFormatter("%(message)s"))
    else:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(level=level, handlers=[handler], force=True)
